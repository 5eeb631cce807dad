//! Whole-machine tests: the tests inside the test guests, and the stories below.

#![forbid(unsafe_code)]

#[path = "system/blocks.rs"]
mod blocks;
#[path = "system/clouds.rs"]
mod clouds;
#[path = "system/containers.rs"]
mod containers;
#[path = "system/cpus.rs"]
mod cpus;
#[path = "system/crowds.rs"]
mod crowds;
#[path = "system/debian.rs"]
mod debian;
#[path = "system/durability.rs"]
mod durability;
#[path = "system/entry.rs"]
mod entry;
#[path = "system/images.rs"]
mod images;
#[path = "system/many.rs"]
mod many;
#[path = "system/media.rs"]
mod media;
#[path = "system/networks.rs"]
mod networks;
#[path = "system/parts.rs"]
mod parts;
#[path = "system/patched.rs"]
mod patched;
#[path = "system/run.rs"]
mod run;
#[path = "system/scarcity.rs"]
mod scarcity;
#[path = "system/seeds.rs"]
mod seeds;
#[path = "system/soak.rs"]
mod soak;
#[path = "system/stories.rs"]
mod stories;
#[path = "system/verbs.rs"]
mod verbs;
#[path = "system/vifs.rs"]
mod vifs;

use anyhow::Result;
use boot::guests::{self, Run};
use libtest_mimic::{Arguments, Failed, Trial};
use std::path::PathBuf;
use std::process::ExitCode;
use xtask::debian::{Suite, User};
use xtask::{build, built, kernels};

/// A story, and what it is called.
type Story = (&'static str, fn() -> Result<()>);

/// The guests that look for a difference between the hypervisor's fast paths and its slow ones, and the option that leaves it
/// the slow ones alone. `cargo xtask soak` runs all suites with it.
const BOTH_WAYS: &[&str] = &["stubs", "entry", "traps", "fuzz"];
const LONG_WAY: &str = "lean=off";

/// Tests of guests that have found something with a seed: QEMU's emulation saves flags that no CPU has in ring 3, and lets ring
/// 3 return to virtual-8086 mode.
const FOUND: &[(&str, &str, &str)] =
    &[("fuzz", "fuzz.instructions", "seed=425437818"), ("fuzz", "fuzz.instructions", "seed=394706780")];

/// Every story that starts at dom0.
const STORIES: &[Story] = &[
    ("stock_kernel_has_a_shell_and_powers_off", stories::stock_kernel_has_a_shell_and_powers_off),
    ("a_stock_kernel_uses_all_its_vcpus", stories::a_stock_kernel_uses_all_its_vcpus),
    ("restarts_leave_nothing_behind", stories::restarts_leave_nothing_behind),
    ("a_guest_that_reboots_is_made_anew", stories::a_guest_that_reboots_is_made_anew),
    ("guests_do_not_notice_when_others_crash", stories::guests_do_not_notice_when_others_crash),
    ("breakpoints_stay_with_their_guest", stories::breakpoints_stay_with_their_guest),
    ("every_crash_is_told_with_reason_and_registers", stories::every_crash_is_told_with_reason_and_registers),
    ("what_the_dead_were_refused_is_told", stories::what_the_dead_were_refused_is_told),
    ("bad_guests_are_refused_in_a_line_each", stories::bad_guests_are_refused_in_a_line_each),
    ("others_are_served_while_a_kernel_is_unpacked", stories::others_are_served_while_a_kernel_is_unpacked),
    ("a_guest_is_given_up_while_it_is_made", stories::a_guest_is_given_up_while_it_is_made),
    ("kernels_with_few_notes_run", stories::kernels_with_few_notes_run),
    ("a_paused_guest_waits_and_a_renamed_one_answers", verbs::a_paused_guest_waits_and_a_renamed_one_answers),
    ("guests_obey_the_store_and_are_made_anew", verbs::guests_obey_the_store_and_are_made_anew),
    ("a_balloon_shrinks_and_grows", verbs::a_balloon_shrinks_and_grows),
    ("commands_from_outside_answer_in_json", run::commands_from_outside_answer_in_json),
    ("disks_of_the_machine_are_found", run::disks_of_the_machine_are_found),
    ("network_devices_of_the_machine_are_found", run::network_devices_of_the_machine_are_found),
    ("memory_disks_come_and_go", blocks::memory_disks_come_and_go),
    ("overlays_on_a_base_take_little", blocks::overlays_on_a_base_take_little),
    ("a_machine_with_a_disk_is_small", blocks::a_machine_with_a_disk_is_small),
    ("machine_disks_have_one_writer", blocks::machine_disks_have_one_writer),
    ("a_hundred_lives_leave_nothing_of_their_disks", blocks::a_hundred_lives_leave_nothing_of_their_disks),
    (
        "a_disk_that_does_not_answer_holds_up_its_guest_alone",
        blocks::a_disk_that_does_not_answer_holds_up_its_guest_alone,
    ),
    ("hostile_front_ends_harm_nobody", blocks::hostile_front_ends_harm_nobody),
    ("every_request_gets_one_response", blocks::every_request_gets_one_response),
    ("a_guest_is_reached_by_ssh", networks::a_guest_is_reached_by_ssh),
    ("guests_exchange_files", networks::guests_exchange_files),
    ("networks_keep_apart_and_are_told", networks::networks_keep_apart_and_are_told),
    ("unplugs_under_load_are_borne", networks::unplugs_under_load_are_borne),
    ("any_slots_of_a_network_device_harm_nobody", vifs::any_slots_of_a_network_device_harm_nobody),
    ("a_hundred_re_plugs_leave_nothing", vifs::a_hundred_re_plugs_leave_nothing),
    ("files_arrive_whoever_cuts_packets", vifs::files_arrive_whoever_cuts_packets),
    ("a_receiver_without_buffers_slows_nobody", vifs::a_receiver_without_buffers_slows_nobody),
    ("a_flood_leaves_a_pair_its_round_trips", crowds::a_flood_leaves_a_pair_its_round_trips),
    ("a_guest_routes_between_networks", vifs::a_guest_routes_between_networks),
    ("guest_files_run_and_are_refused_with_their_lines", run::guest_files_run_and_are_refused_with_their_lines),
    ("a_container_image_is_a_guest", containers::a_container_image_is_a_guest),
    ("a_container_has_a_user_and_an_entrypoint", containers::a_container_has_a_user_and_an_entrypoint),
    ("a_cd_boots_with_bios", images::a_cd_boots_with_bios),
    ("a_cd_boots_with_uefi", images::a_cd_boots_with_uefi),
    ("a_stick_boots_with_either_firmware", images::a_stick_boots_with_either_firmware),
    ("what_is_no_image_is_refused", images::what_is_no_image_is_refused),
    ("a_cloud_image_boots", clouds::a_cloud_image_boots),
    ("bad_images_and_seeds_are_refused", clouds::bad_images_and_seeds_are_refused),
    ("a_machine_without_a_network_is_told", scarcity::a_machine_without_a_network_is_told),
    ("the_exit_status_says_who_failed", images::the_exit_status_says_who_failed),
    ("the_entry_table_holds_for_dom0", entry::the_entry_table_holds_for_dom0),
    ("the_entry_table_holds_on_xen", entry::the_entry_table_holds_on_xen),
    ("the_entry_table_holds_for_a_guest", entry::the_entry_table_holds_for_a_guest),
    ("the_patched_kernel_boots_everywhere", patched::the_patched_kernel_boots_everywhere),
    ("guests_without_a_stack_end_the_same_way", entry::guests_without_a_stack_end_the_same_way),
    ("the_table_of_differences_is_true", entry::the_table_of_differences_is_true),
    ("the_exit_status_says_how_guests_ended", run::the_exit_status_says_how_guests_ended),
    ("a_stock_kernel_alone_has_a_console", run::a_stock_kernel_alone_has_a_console),
    ("the_exit_status_says_who_was_killed", run::the_exit_status_says_who_was_killed),
    ("a_machine_with_many_devices_boots", run::a_machine_with_many_devices_boots),
    ("a_flooding_console_slows_only_its_guest", verbs::a_flooding_console_slows_only_its_guest),
    ("making_a_large_guest_keeps_nobody_waiting", verbs::making_a_large_guest_keeps_nobody_waiting),
    ("a_call_without_an_end_keeps_nobody_out", verbs::a_call_without_an_end_keeps_nobody_out),
    ("guests_that_fill_the_store_do_not_harm_dom0", verbs::guests_that_fill_the_store_do_not_harm_dom0),
    ("a_guest_cannot_flood_the_operator_with_warnings", verbs::a_guest_cannot_flood_the_operator_with_warnings),
    ("consoles_that_flood_take_turns", verbs::consoles_that_flood_take_turns),
    ("the_log_has_what_guests_write", verbs::the_log_has_what_guests_write),
    ("a_balloon_grows_beyond_the_beginning", verbs::a_balloon_grows_beyond_the_beginning),
    ("hypervisor_and_dom0_are_small_and_stay_so", verbs::hypervisor_and_dom0_are_small_and_stay_so),
    ("stock_kernels_keep_file_systems", media::stock_kernels_keep_file_systems),
    ("disks_that_fail_are_borne", media::disks_that_fail_are_borne),
    ("what_was_flushed_outlives_power_cuts", durability::what_was_flushed_outlives_power_cuts),
    ("a_disk_that_ignores_flushes_is_found", durability::a_disk_that_ignores_flushes_is_found),
    ("a_gzipped_kernel_runs", stories::a_gzipped_kernel_runs),
    ("a_ramdisk_that_cannot_be_unpacked_is_warned_of", stories::a_ramdisk_that_cannot_be_unpacked_is_warned_of),
    ("a_bundle_without_a_first_domain_is_refused", stories::a_bundle_without_a_first_domain_is_refused),
    ("an_unknown_hypervisor_option_is_refused", stories::an_unknown_hypervisor_option_is_refused),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Two machines at a time: more are slower on the machines this is developed on, and no surer.
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(2).min(2));
    match boot::soak().map_or_else(trials, soak::trials) {
        Ok(trials) => libtest_mimic::run(&arguments, trials).exit_code(),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn trials() -> Result<Vec<Trial>> {
    let sh = boot::shell()?;
    let images = build::bare_metal_packages(&sh);
    let mut trials = Vec::new();
    if ["hypervisor", "guests"].iter().all(|name| images.contains(name)) {
        for name in build::test_guests(&sh)? {
            let path = build::image(&boot::images()?, &name)?;
            for test in guests::tests(&path)? {
                let title = test.as_ref().map_or_else(|| name.clone(), |test| format!("{name}::{test}"));
                trials.push(guest_trial(title.clone(), path.clone(), test.clone(), ""));
                if BOTH_WAYS.contains(&&*name) && boot::options().is_empty() {
                    trials.push(guest_trial(format!("{title} with {LONG_WAY}"), path.clone(), test, LONG_WAY));
                }
            }
        }
        for (guest, test, seed) in FOUND {
            let path = build::image(&boot::images()?, guest)?;
            trials.push(trial(format!("{guest}::{test} with {seed}"), move || {
                guests::run(&path, &Run { test: Some(test), more: seed, ..Run::default() }).map(drop)
            }));
        }
    }
    if ["hypervisor", "dom0"].iter().all(|name| images.contains(name)) {
        trials.extend(kernels::DAILY.into_iter().flat_map(kernel_trials));
        trials.extend(cpus::DAILY.map(|(model, kernel)| cpus::daily(model, kernel)));
        trials.extend(STORIES.iter().map(|(name, story)| trial((*name).to_owned(), story)));
        let title = "debian_keeps_what_was_written";
        let debian = trial(title.to_owned(), || debian::keeps_what_was_written(title, Suite::Bookworm));
        trials.push(debian.with_ignored_flag(User::find().is_err()));
    }
    Ok(trials)
}

/// A stock kernel, or one that is built here, in both of its forms.
fn kernel_trials(name: &'static str) -> [Trial; 2] {
    let kind = if built::NAMES.contains(&name) { "built" } else { "stock" };
    [("ELF", true), ("bzImage", false)].map(|(form, elf)| {
        let title = format!("{kind}_{name}_answers_from_its_shell_as_{form}");
        trial(title.clone(), move || stories::kernel_answers(&title, name, elf, None).map(drop))
    })
}

/// A test of a guest, with more options for the hypervisor.
fn guest_trial(title: String, path: PathBuf, test: Option<String>, options: &'static str) -> Trial {
    trial(title, move || guests::run(&path, &Run { test: test.as_deref(), options, ..Run::default() }).map(drop))
}

fn trial(name: String, run: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:#}"))))
}
