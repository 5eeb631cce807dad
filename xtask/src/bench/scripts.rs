//! What shell scripts cost in a stock guest.

use super::bars::Bar;
use super::columns::{Column, Form, Lab};
use super::counts::OWNERS;
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use microbench::{SCRIPTS, mode};

/// Memory of the guest in MiB.
const MEMORY: u32 = 256;

/// Instructions of the whole machine that a script may take, as times what the bare machine takes. Runs of `processes` differ
/// by a hundredth.
const TIMES_BARE: [(&str, f64); 2] = [("pipes", 1.05), ("processes", 1.90)];

/// Runs the scripts in each column.
pub(super) fn measure(lab: &Lab) -> Result<Report> {
    let mut runs = Vec::new();
    if lab.wants(Column::Bare) {
        runs.push(("bare", lab.bare(mode::SCRIPTS)?.record));
    }
    if lab.wants(Column::Xen) {
        runs.push(("Xen", lab.xen(Form::Elf, mode::SCRIPTS, MEMORY)?.record));
    }
    if lab.wants(Column::Tenon) {
        runs.push(("Tenon", lab.tenon(Form::Elf, mode::SCRIPTS, MEMORY)?.record));
    }
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
            if *name == "bare" {
                bare = Some(total);
            }
            let mut row = vec![script.name.to_owned(), (*name).to_owned()];
            row.extend(OWNERS[1..].iter().map(|owner| short(exact(counts.insns(owner)))));
            row.push(short(total));
            row.push(bare.map_or_else(|| "-".into(), |bare| format!("{:.3}", total / bare)));
            table.push(row);
            if let (Some(bare), "Tenon", Some(bar)) = (bare, *name, promise(script.name)) {
                let what = format!("{}: all instructions, {bar} times bare", script.name);
                bars.push(Bar::new(what, total, bar * bare));
            }
            shown.push(plot::Bar::new(*name, counts, 1));
            numbers.push(number(&format!("{name}/{}", script.name), counts, 1));
            if lab.profile && *name == "Tenon" {
                profiles.push((script.name.to_owned(), profile::lines(lab, counts, 1)?));
            }
        }
        plot.push(Group { label: script.name.to_owned(), bars: shown });
    }
    Ok(Report {
        name: "scripts".into(),
        about: "Instructions of a whole script inside a stock Linux, busybox being the shell and its commands: on the bare \
                machine, as Xen's first domain, and as a guest of Tenon. The scripts are in tests/bench/scripts."
            .into(),
        versions: lab.versions.clone(),
        date: lab.date.clone(),
        tables: vec![table.into()],
        notes: Vec::new(),
        bars,
        plot,
        numbers,
        profiles,
    })
}

fn promise(script: &str) -> Option<f64> {
    TIMES_BARE.iter().find(|(name, _)| *name == script).map(|(_, times)| *times)
}

#[allow(clippy::cast_precision_loss, reason = "counts of a window are far below 2^52")]
fn exact(count: u64) -> f64 {
    count as f64
}
