//! From power-on to a stock guest's init, and from the first instruction of a kernel with our patches.

use super::bars::Bar;
use super::columns::{Column, Form, Lab, Run};
use super::counts::{Counts, OWNERS, Record};
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use marker::{INIT, LISTED};
use microbench::mode;
use xshell::Shell;

/// Memory of the guest in MiB; Xen refuses to start this kernel as its first domain with so little.
const MEMORY: u32 = 128;
const XEN_MEMORY: u32 = 256;
/// Tenon may take so many times what the bare machine takes.
const TIMES_BARE: f64 = 1.5;
/// dom0 lists its guests after this many instructions.
const LISTED_LIMIT: f64 = 0.5e9;
/// Xen, a Linux as dom0 with Debian's tools, `xl create` of this kernel as bzImage: to the guest's init.
const XEN_WITH_DOM0: f64 = 18.0e9;

/// The patched kernel and ring 0 may take so many times what the same kernel takes on the bare machine.
const PATCHED_TIMES_BARE: f64 = 1.20;
/// The small configuration of it, and what it may take by its own clock, which counts all instructions.
const SMALL: (&str, f64) = ("patched-small", 130e6);

/// Boots each column to init.
pub(super) fn measure(sh: &Shell, lab: &Lab) -> Result<Report> {
    match lab.compared_with() {
        Some(unpatched) if !lab.profile => measure_patched(lab, (&unpatched, &lab.with_kernel(sh, &unpatched)?)),
        _ => measure_one(lab),
    }
}

/// Boots a kernel with our patches and the same one without in each column, all of them with the same memory.
fn measure_patched(lab: &Lab, (name, unpatched): (&str, &Lab)) -> Result<Report> {
    let mut runs: Vec<(&str, Run)> = Vec::new();
    if lab.wants(Column::Bare) {
        runs.push(("bare, patched", lab.bare_in(mode::BOOT, XEN_MEMORY)?));
    }
    for (column, [without, with]) in
        [(Column::Xen, ["Xen, first domain", "Xen, patched"]), (Column::Tenon, ["Tenon, guest", "Tenon, patched"])]
    {
        for (name, lab) in [(without, unpatched), (with, lab)] {
            if lab.wants(column) {
                runs.push((name, lab.with_parts(column).hosted(column, Form::Elf, mode::BOOT, XEN_MEMORY)?));
            }
        }
    }
    let head = ["to init", "kernel", "ring 0", "both", "times bare", "kernel's clock"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    let (mut shown, mut numbers, mut bars, mut of_bare) = (Vec::new(), Vec::new(), Vec::new(), None);
    for (name, run) in &runs {
        let counts = run.record.since_kernel(INIT).with_context(|| format!("{name}: init was not reached"))?;
        let parts = ["kernel", "ring0"].map(|owner| exact(counts.insns(owner)));
        let both: f64 = parts.iter().sum();
        if name.starts_with("bare") {
            of_bare = Some(both);
        }
        let mut row = vec![(*name).to_owned()];
        row.extend(parts.iter().chain([&both]).map(|number| short(*number)));
        row.push(of_bare.map_or_else(|| "-".into(), |bare| format!("{:.3}", both / bare)));
        // The bare machine's clock has counted the firmware as well.
        let clock = clock(&run.printed.text()).filter(|_| !name.starts_with("bare"));
        row.push(clock.map_or_else(|| "-".into(), short));
        table.push(row);
        shown.push(plot::Bar::new(*name, &counts, 1));
        numbers.push(number(name, &counts, 1));
        if let (Some(bare), "Tenon, patched") = (of_bare, *name) {
            let what = format!("kernel and ring 0, patched, to init: {PATCHED_TIMES_BARE} times bare");
            bars.push(Bar::new(what, both, PATCHED_TIMES_BARE * bare));
        }
    }
    if lab.is(SMALL.0) && lab.wants(Column::Tenon) {
        let run = lab.tenon(Form::Elf, mode::BOOT, MEMORY)?;
        let clock = clock(&run.printed.text()).context("the guest's log has no line about init")?;
        bars.push(Bar::new(format!("init in {MEMORY} MiB, by the kernel's clock"), clock, SMALL.1));
    }
    let mut versions = lab.versions.clone();
    versions.push((name.to_owned(), unpatched.kernel_version()?));
    Ok(Report {
        name: lab.name("boot"),
        about: format!(
            "Instructions of the kernel and of ring 0 from the first instruction of the kernel, which is unpacked before, to \
             the first instruction of init: of a Linux with our patches and of the same Linux without, each with \
             {XEN_MEMORY} MiB. On Xen all parts of the patches are switched on. The bare machine's kernel also finds devices, and waits for clocks to be calibrated. The kernel's \
             own clock counts all instructions of the machine from a moment early in its start."
        ),
        versions,
        date: lab.date.clone(),
        notes: Vec::new(),
        tables: vec![table.into()],
        bars,
        plot: vec![Group { label: String::new(), bars: shown }],
        numbers,
        profiles: Vec::new(),
    })
}

/// When the kernel starts its init, in nanoseconds of its clock: an instruction takes one.
pub(super) fn clock(console: &str) -> Option<f64> {
    let line = console.lines().find(|line| line.contains("Run /init as init process"))?;
    let seconds = line.split_once('[')?.1.split_once(']')?.0.trim();
    Some(seconds.parse::<f64>().ok()? * 1e9)
}

/// Boots each column to init, with one kernel.
fn measure_one(lab: &Lab) -> Result<Report> {
    let mut runs: Vec<(&str, Record)> = Vec::new();
    if lab.wants(Column::Bare) {
        runs.push(("bare, bzImage", lab.bare(mode::BOOT)?.record));
    }
    if lab.wants(Column::Xen) {
        runs.push(("Xen, first domain, bzImage", lab.xen(Form::BzImage, mode::BOOT, XEN_MEMORY)?.record));
    }
    if lab.wants(Column::Tenon) {
        runs.push(("Tenon, guest, bzImage", lab.tenon(Form::BzImage, mode::BOOT, MEMORY)?.record));
        runs.push(("Tenon, guest, ELF", lab.tenon(Form::Elf, mode::BOOT, MEMORY)?.record));
    }
    let head = ["to init", "firmware", "programs", "kernel", "dom0", "ring 0", "all"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    let (mut shown, mut numbers, mut profiles) = (Vec::new(), Vec::new(), Vec::new());
    for (name, record) in &runs {
        let init = record.point(INIT).with_context(|| format!("{name}: init was not reached"))?;
        let mut row = vec![(*name).to_owned()];
        row.extend(OWNERS.map(|owner| short(exact(init.insns(owner)))));
        row.push(short(exact(init.total())));
        table.push(row);
        shown.push(plot::Bar::new(*name, init, 1));
        numbers.push(number(name, init, 1));
        if lab.profile && name.starts_with("Tenon") {
            profiles.push(((*name).to_owned(), profile::lines(lab, &record.all, 1)?));
        }
    }
    let mut mark = vec!["Xen, Linux dom0, xl create, bzImage (mark)".to_owned()];
    mark.extend(OWNERS.map(|_| "-".to_owned()));
    mark.push(short(XEN_WITH_DOM0));
    table.push(mark);
    shown.push(plot::Bar::mark("Xen with dom0 (mark)", XEN_WITH_DOM0));
    let find = |name: &str| runs.iter().find(|(it, _)| *it == name).map(|(_, record)| record);
    let total = |record: &Record, point| record.point(point).map(Counts::total).map(exact);
    let mut bars = Vec::new();
    let promised = lab.is_default_kernel();
    if let (true, Some(bare), Some(tenon)) = (promised, find("bare, bzImage"), find("Tenon, guest, bzImage")) {
        let (bare, tenon) = (total(bare, INIT).unwrap_or(0.0), total(tenon, INIT).unwrap_or(f64::MAX));
        bars.push(Bar::new("init of a stock guest from bzImage: 1.5 times bare", tenon, TIMES_BARE * bare));
    }
    for (name, form) in [("Tenon, guest, bzImage", "bzImage"), ("Tenon, guest, ELF", "ELF")] {
        if let (true, Some(tenon)) = (promised, find(name)) {
            let listed = total(tenon, LISTED).with_context(|| format!("{name}: dom0 did not list its guests"))?;
            bars.push(Bar::new(format!("dom0 lists its guests ({form})"), listed, LISTED_LIMIT));
        }
    }
    Ok(Report {
        name: lab.name("boot"),
        about: format!(
            "Instructions from power-on to the first instruction of init in a stock Linux. Tenon's guest has {MEMORY} MiB, \
             Xen's first domain {XEN_MEMORY} (with {MEMORY} it does not start). The mark was taken with Debian's Xen and \
             tools in the same emulator."
        ),
        versions: lab.versions.clone(),
        date: lab.date.clone(),
        notes: Vec::new(),
        tables: vec![table.into()],
        bars,
        plot: vec![Group { label: String::new(), bars: shown }],
        numbers,
        profiles,
    })
}

#[allow(clippy::cast_precision_loss, reason = "counts of a boot are far below 2^52")]
pub(super) fn exact(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_that_of_the_line_about_init() {
        let console = "[    0.000000] Linux\r\n[    0.101250] Run /init as init process\r\n[    9.0] x";
        assert_eq!(clock(console), Some(101_250_000.0));
        assert_eq!(clock("[    0.1] nothing"), None);
    }
}
