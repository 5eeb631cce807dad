//! From a kernel's first instruction to the login prompt of Debian.

use super::bars::Bar;
use super::boot::exact;
use super::columns::{Column, Lab, Run, System};
use super::counts::OWNERS;
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use marker::PRINTED;
use xshell::Shell;
use xtask::debian::{self, Recipe};
use xtask::kernels;

/// Memory of the kernel in MiB: as much as the guest of `cargo xtask run --guest debian` has.
const MEMORY: u32 = 512;
/// The end of the prompt.
const PROMPT: &str = "login:";
/// Tenon may take so many times what the bare machine takes.
const TIMES_BARE: f64 = 1.3;

/// Boots Debian 12 to the login prompt in each column.
pub(super) fn measure(sh: &Shell, lab: &Lab) -> Result<Report> {
    let system = System { disk: &debian::cached(sh, &Recipe::default())?, memory: MEMORY };
    let mut runs: Vec<(&str, Run)> = Vec::new();
    if lab.wants(Column::Bare) {
        let ramdisk = kernels::ramdisk_for_machine(sh, kernels::DEFAULT)?;
        runs.push(("bare", lab.bare_system(&system, &ramdisk, PROMPT)?));
    }
    if lab.wants(Column::Tenon) {
        let ramdisk = kernels::ramdisk_with_ssh(sh, kernels::DEFAULT)?;
        runs.push(("Tenon, guest", lab.system(&system, &ramdisk, PROMPT)?));
    }
    let head = ["to the login prompt", "programs", "kernel", "dom0", "ring 0", "all"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    let (mut shown, mut numbers, mut profiles, mut totals) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut minutes = Vec::new();
    for (name, run) in &runs {
        let counts = run.record.least(PRINTED).with_context(|| format!("{name}: no login prompt was counted"))?;
        let mut row = vec![(*name).to_owned()];
        // The firmware and the kernel's own unpacking come before the kernel.
        row.extend(OWNERS.iter().skip(1).map(|owner| short(exact(counts.insns(owner)))));
        row.push(short(exact(counts.total())));
        table.push(row);
        totals.push((*name, exact(counts.total())));
        shown.push(plot::Bar::new(*name, counts, 1));
        numbers.push(number(name, counts, 1));
        let moment = run.printed.moment(PROMPT).context("no login prompt")?;
        minutes.push(format!("{name} {:.1}", moment.as_secs_f64() / 60.0));
        if lab.profile && *name != "bare" {
            profiles.push(((*name).to_owned(), profile::lines(lab, counts, 1)?));
        }
    }
    let bars = match *totals {
        [("bare", bare), (_, tenon)] => {
            vec![Bar::new("login prompt of Debian: 1.3 times bare", tenon, TIMES_BARE * bare)]
        }
        _ => Vec::new(),
    };
    Ok(Report {
        name: "boot-debian".into(),
        about: format!(
            "Instructions of the whole machine from the first instruction of the kernel to the login prompt of Debian 12, \
             from the same disk, which is then as it was. Both kernels have {MEMORY} MiB, a network device, and our \
             initramfs with dropbear: for the bare machine with the drivers of virtio disks, for the guest with those of its \
             own devices."
        ),
        versions: lab.versions.clone(),
        date: lab.date.clone(),
        notes: vec![format!(
            "Minutes from power-on by the clock of the machine that this ran on, with whatever else ran there: {}.",
            minutes.join(", ")
        )],
        tables: vec![table.into()],
        bars,
        plot: vec![Group { label: String::new(), bars: shown }],
        numbers,
        profiles,
    })
}
