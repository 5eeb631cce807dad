//! What each part of the patches for guest kernels gains, alone and with the others.

use super::Options;
use super::columns::{Column, Form, Lab, Run};
use super::counts::{Counts, Record};
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use microbench::{METRICS, Metric, mode};
use xshell::Shell;
use xtask::built;

/// Memory of the guest in MiB, and of the one that is only booted.
const MEMORY: u32 = 256;
const BOOTED: u32 = 128;
/// What is shown of an operation: a name, and the count.
type Shown = (&'static str, fn(&Counts) -> u64);
const SHOWN: [Shown; 3] = [
    ("entries", Counts::entries),
    ("ring 0", |counts| counts.insns("ring0")),
    ("kernel", |counts| counts.insns("kernel")),
];

/// A kernel that was measured, with what was said to it.
struct Step {
    name: String,
    record: Record,
}

/// Runs the benchmark program in the unpatched kernel, and in the patched one with no part, each part, and all parts.
pub(super) fn measure(sh: &Shell, options: &Options) -> Result<Report> {
    let lab = |name: &str| Lab::new(sh, &Options { kernel: name.into(), ..options.clone() });
    let [patched, unpatched] = built::NAMES;
    let (mut patched, mut unpatched) = (lab(patched)?, lab(unpatched)?);
    let parts = built::parts(&built::series(built::DEFAULT)?);
    let mut steps = Vec::new();
    let mut boots = vec!["to init, by the kernel's clock".to_owned()];
    for (column, prefix) in [(Column::Tenon, ""), (Column::Xen, "Xen: ")] {
        if !patched.wants(column) {
            continue;
        }
        // On Xen the least and the most is enough: what is between costs minutes each.
        let some = if column == Column::Tenon { parts.as_slice() } else { &[] };
        let words = ["none"].into_iter().chain(some.iter().map(String::as_str)).chain(["all"]);
        let words = std::iter::once(None).chain(words.map(Some));
        for words in words {
            let lab = if words.is_some() { &mut patched } else { &mut unpatched };
            lab.words = words.map(|words| format!("tenon={words} ")).unwrap_or_default();
            let run = run(lab, column, mode::GUEST, MEMORY)?;
            steps.push(Step { name: format!("{prefix}{}", words.unwrap_or("unpatched")), record: run.record });
            // The switches come after what takes the time of a boot.
            let booted = if column == Column::Tenon && matches!(words, None | Some("none" | "all")) {
                let console = run_boot(lab)?;
                short(clock(&console).context("the guest's log has no line about init")?)
            } else {
                "-".to_owned()
            };
            boots.push(booted);
        }
    }
    let mut table = vec![["per operation".to_owned()].into_iter().chain(names(&steps)).collect::<Vec<_>>(), boots];
    let mut numbers = Vec::new();
    for (index, metric) in METRICS.iter().enumerate() {
        let window = u16::try_from(index).map_or(u16::MAX, |index| marker::METRICS.saturating_add(index));
        let least = |step: &Step| step.record.least(window).cloned();
        let counts: Vec<Option<Counts>> = steps.iter().map(least).collect();
        for (what, of) in SHOWN {
            let cell =
                |counts: &Option<Counts>| counts.as_ref().map_or_else(|| "-".into(), |it| short(per(of(it), metric)));
            let mut row = vec![format!("{}, {what}", metric.name)];
            row.extend(counts.iter().map(cell));
            table.push(row);
        }
        for (step, counts) in steps.iter().zip(&counts) {
            let counts = counts.as_ref().with_context(|| format!("{}: no window of {}", step.name, metric.name))?;
            numbers.push(number(&format!("{}/{}", step.name, metric.name), counts, metric.operations));
        }
    }
    Ok(Report {
        name: "patches".into(),
        about: format!(
            "Entries into the hypervisor, its instructions (\"ring 0\") and those of the kernel, for an operation in a guest \
             of {MEMORY} MiB. `unpatched` is the source as it is; the other columns are one kernel with the patches and the \
             boot parameter `tenon=`, which switches parts. Each is the least of five windows. Columns of Xen are of its \
             first domain. A boot has {BOOTED} MiB, and its clock counts the instructions of the whole machine."
        ),
        versions: patched.versions.clone(),
        date: patched.date.clone(),
        table,
        bars: Vec::new(),
        plot: Vec::new(),
        numbers,
        notes: Vec::new(),
        profiles: Vec::new(),
    })
}

fn names(steps: &[Step]) -> impl Iterator<Item = String> {
    steps.iter().map(|step| step.name.clone())
}

fn run(lab: &Lab, column: Column, mode: &str, memory: u32) -> Result<Run> {
    match column {
        Column::Xen => lab.xen(Form::Elf, mode, memory),
        _ => lab.tenon(Form::Elf, mode, memory),
    }
}

/// What a guest prints that is only booted.
fn run_boot(lab: &Lab) -> Result<String> {
    Ok(run(lab, Column::Tenon, mode::BOOT, BOOTED)?.printed.text())
}

/// When the kernel starts its init, in nanoseconds of its clock: an instruction takes one.
fn clock(console: &str) -> Option<f64> {
    let line = console.lines().find(|line| line.contains("Run /init as init process"))?;
    let seconds = line.split_once('[')?.1.split_once(']')?.0.trim();
    Some(seconds.parse::<f64>().ok()? * 1e9)
}

#[allow(clippy::cast_precision_loss, reason = "counts of a window are far below 2^52")]
fn per(count: u64, metric: &Metric) -> f64 {
    count as f64 / f64::from(metric.operations)
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
