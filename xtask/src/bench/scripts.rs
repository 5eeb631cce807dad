//! What shell scripts cost in a stock guest.

use super::bars::Bar;
use super::columns::{Column, Form, Lab};
use super::counts::{OWNERS, Record};
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use microbench::{SCRIPTS, mode};
use xshell::Shell;

/// Memory of the guest in MiB.
const MEMORY: u32 = 256;

/// Instructions of the whole machine that a script may take, as times what the bare machine takes. Runs of `processes` differ
/// by a hundredth.
const TIMES_BARE: [(&str, f64); 2] = [("pipes", 1.05), ("processes", 1.90)];
/// The same with a kernel that has our patches.
const PATCHED_TIMES_BARE: [(&str, f64); 2] = [("pipes", 1.04), ("processes", 1.60)];

/// Runs the scripts in each column. A kernel with our patches stands behind the one without.
pub(super) fn measure(sh: &Shell, lab: &Lab) -> Result<Report> {
    let mut runs = Vec::new();
    let mut versions = lab.versions.clone();
    if let Some(name) = lab.compared_with() {
        let unpatched = lab.with_kernel(sh, &name)?;
        versions.push((name, unpatched.kernel_version()?));
        run(&unpatched, ["bare", "Xen", "Tenon"], &mut runs)?;
        run(lab, ["bare, patched", "Xen, patched", "Tenon, patched"], &mut runs)?;
    } else {
        run(lab, ["bare", "Xen", "Tenon"], &mut runs)?;
    }
    let promised = match lab.compared_with() {
        Some(_) => ("Tenon, patched", &PATCHED_TIMES_BARE[..]),
        None if lab.is_default_kernel() => ("Tenon", &TIMES_BARE[..]),
        None => ("Tenon", &[][..]),
    };
    let head = ["script", "column", "programs", "kernel", "dom0", "ring 0", "all", "times bare"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    let (mut bars, mut plot, mut numbers, mut profiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, script) in (0..).zip(SCRIPTS) {
        let window = marker::SCRIPTS + index;
        let mut bare = None;
        let mut shown = Vec::new();
        for (name, record) in &runs {
            let counts = record.least(window).with_context(|| format!("{name}: no window of {}", script.name))?;
            let total = exact(counts.total());
            if name.starts_with("bare") {
                bare = Some(total);
            }
            let mut row = vec![script.name.to_owned(), (*name).to_owned()];
            row.extend(OWNERS[1..].iter().map(|owner| short(exact(counts.insns(owner)))));
            row.push(short(total));
            row.push(bare.map_or_else(|| "-".into(), |bare| format!("{:.3}", total / bare)));
            table.push(row);
            let promise = promised.1.iter().find(|(name, _)| *name == script.name);
            if let (Some(bare), true, Some((_, bar))) = (bare, *name == promised.0, promise) {
                let what = format!("{}: all instructions, {bar} times bare", script.name);
                bars.push(Bar::new(what, total, bar * bare));
            }
            shown.push(plot::Bar::new(*name, counts, 1));
            numbers.push(number(&format!("{name}/{}", script.name), counts, 1));
            if lab.profile && *name == promised.0 {
                profiles.push((script.name.to_owned(), profile::lines(lab, counts, 1)?));
            }
        }
        plot.push(Group { label: script.name.to_owned(), bars: shown });
    }
    Ok(Report {
        name: lab.name("scripts"),
        about: "Instructions of a whole script inside a stock Linux, busybox being the shell and its commands: on the bare \
                machine, as Xen's first domain, and as a guest of Tenon. The scripts are in tests/bench/scripts."
            .into(),
        versions,
        date: lab.date.clone(),
        tables: vec![table.into()],
        notes: Vec::new(),
        bars,
        plot,
        numbers,
        profiles,
    })
}

/// Adds a run for each column that is wanted.
fn run(lab: &Lab, names: [&'static str; 3], runs: &mut Vec<(&'static str, Record)>) -> Result<()> {
    for (column, name) in [Column::Bare, Column::Xen, Column::Tenon].into_iter().zip(names) {
        if lab.wants(column) {
            let run = match column {
                Column::Bare => lab.bare(mode::SCRIPTS)?,
                _ => lab.with_parts(column).hosted(column, Form::Elf, mode::SCRIPTS, MEMORY)?,
            };
            runs.push((name, run.record));
        }
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "counts of a window are far below 2^52")]
fn exact(count: u64) -> f64 {
    count as f64
}
