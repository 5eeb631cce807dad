//! What is too long for every day: `cargo xtask soak`.

use crate::{blocks, cpus, crowds, debian, durability, many, parts, patched, scarcity, seeds, verbs, vifs};
use anyhow::{Context, Result};
use boot::guests::{self, Run};
use libtest_mimic::Trial;
use std::time::Duration;
use xtask::debian::Suite;
use xtask::{build, built, kernels};

/// Rounds of the hostile guest in the usual suite, and about the seconds they take on a busy machine.
const ROUNDS: u32 = 20_000;
const SECONDS: u32 = 30;

/// The long forms: the hostile guest, each of its tests so many times longer; fifty kernels unpacked for guests that come and
/// go; so many times more power cuts, lives of disks and of hostile front ends, and re-plugs of network devices; networks with
/// many guests; Debian 13 on a disk, Debian set up by cloud-init, and without room for the disk; every stock kernel, and those
/// that are built here; the patched one under load and with the kernel's own tests; and on every CPU model the stock kernels of
/// every day, and the guest that tries features.
pub(crate) fn trials(times: u32) -> Result<Vec<Trial>> {
    let path = build::image(&boot::images()?, "fuzz")?;
    let mut trials = Vec::new();
    for test in guests::tests(&path)? {
        let name = test.clone().context("the hostile guest has tests with names")?;
        let path = path.clone();
        let (rounds, limit) = (ROUNDS.saturating_mul(times), SECONDS.saturating_mul(times));
        trials.push(crate::trial(format!("fuzz::{name}"), move || {
            let (more, limit) = (format!("rounds={rounds}"), Duration::from_secs(limit.into()));
            guests::run(&path, &Run { test: test.as_deref(), more: &more, limit, ..Run::default() }).map(drop)
        }));
    }
    let title = "hypervisor_and_dom0_are_small_after_fifty_rounds";
    trials.push(crate::trial(title.to_owned(), || verbs::small_after(50)));
    let title = "what_was_flushed_outlives_power_cuts";
    trials.push(crate::trial(title.to_owned(), move || durability::cuts(title, 10 * times as usize)));
    let title = "lives_leave_nothing_of_their_disks";
    trials.push(crate::trial(title.to_owned(), move || blocks::lives_leave_nothing(title, 100 * u64::from(times))));
    let title = "hostile_front_ends_harm_nobody";
    trials.push(crate::trial(title.to_owned(), move || blocks::harm(title, 60 * u64::from(times))));
    let title = "re_plugs_leave_nothing";
    trials.push(crate::trial(title.to_owned(), move || vifs::re_plugs(title, 25 * u64::from(times))));
    let title = "a_flood_leaves_others_their_round_trips";
    trials.push(crate::trial(title.to_owned(), || crowds::a_flood_leaves_others_their_round_trips(title)));
    let title = "twenty_guests_share_an_uplink";
    trials.push(crate::trial(title.to_owned(), || crowds::twenty_guests_share_an_uplink(title)));
    let title = "debian_13_keeps_what_was_written";
    trials.push(crate::trial(title.to_owned(), || debian::keeps_what_was_written(title, Suite::Trixie)));
    let title = "sixteen_debian_guests_share_a_disk";
    trials.push(crate::trial(title.to_owned(), || many::share_a_disk(title, 16)));
    trials.push(crate::trial("a_full_disk_is_told".to_owned(), scarcity::a_full_disk_is_told));
    let title = "cloud_init_reads_a_seed";
    trials.push(crate::trial(title.to_owned(), || seeds::cloud_init_reads_a_seed(title)));
    trials.extend(kernels::all_names().flat_map(crate::kernel_trials));
    for (title, parts) in choices()? {
        let title = format!("patched_kernel_carries_load_{title}");
        trials.push(crate::trial(title.clone(), move || patched::carries_load(&title, &parts)));
    }
    let title = "selftests_have_the_verdicts_of_an_unpatched_guest";
    trials.push(crate::trial(title.to_owned(), || patched::has_the_verdicts_of_an_unpatched_guest(title)));
    for (title, words, made) in
        [("with_all_parts", "all", true), ("with_their_part_alone", "folio", true), ("with_no_part", "none", false)]
    {
        let title = format!("large_folios_hold_what_was_written_{title}");
        trials.push(crate::trial(title.clone(), move || parts::folios_hold_what_was_written(&title, words, made)));
    }
    for (title, words, together) in [("each", "count", false), ("together", "ipi,count", true)] {
        let title = format!("cpus_are_interrupted_{title}");
        trials.push(crate::trial(title.clone(), move || parts::cpus_are_interrupted(&title, words, together)));
    }
    let on = |model| kernels::DAILY.map(|kernel| cpus::soak(model, kernel));
    trials.extend(cpus::MODELS.into_iter().flat_map(on));
    let features = build::image(&boot::images()?, "features")?;
    trials.extend(cpus::MODELS.map(|model| cpus::features(model, features.clone())));
    Ok(trials)
}

/// All parts of the patches, none, and each alone, with what a title calls them.
fn choices() -> Result<Vec<(String, Vec<String>)>> {
    let parts = built::parts(&built::series(built::DEFAULT)?);
    let alone = parts.iter().map(|part| (format!("with_{part}_alone"), vec![part.clone()])).collect();
    Ok([vec![("with_all_parts".to_owned(), parts), ("with_no_part".to_owned(), Vec::new())], alone].concat())
}
