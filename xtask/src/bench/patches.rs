//! What each part of the patches for guest kernels gains, alone and with the others.

use super::columns::{Column, Form, Lab};
use super::counts::{Counts, Record};
use super::report::{Report, Table, number, short};
use super::{Options, boot};
use anyhow::{Context, Result};
use microbench::{METRICS, Metric, mode};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;
use xshell::Shell;
use xtask::built;

/// Memory of the guest in MiB, and of the one that is only booted.
const MEMORY: u32 = 256;
const BOOTED: u32 = 128;
/// What is shown of an operation: a title, and the count.
type Shown = (&'static str, fn(&Counts) -> u64);
const SHOWN: [Shown; 3] = [
    ("entries", Counts::entries),
    ("instructions of ring 0", |counts| counts.insns("ring0")),
    ("instructions of the kernel", |counts| counts.insns("kernel")),
];
/// Operations are left out of a table if no column differs from the first by more than this part of it.
const SAME: f64 = 0.01;

/// A kernel that is measured, with what is said to it.
struct Step {
    place: Column,
    /// The value of the boot parameter; without one it is the unpatched kernel.
    parts: Option<String>,
    record: Record,
    /// When the kernel starts its init in a machine that is only booted.
    clock: Option<f64>,
}

impl Step {
    fn name(&self) -> &str {
        self.parts.as_deref().unwrap_or("unpatched")
    }

    /// Runs the benchmark program.
    fn measure(patched: &Lab, unpatched: &Lab, place: Column, parts: Option<String>) -> Result<Self> {
        let lab =
            parts.as_ref().map_or_else(|| unpatched.clone(), |parts| patched.with_words(format!("tenon={parts} ")));
        let record = lab.hosted(place, Form::Elf, mode::GUEST, MEMORY)?.record;
        for (index, metric) in METRICS.iter().enumerate() {
            record.least(window(index)).with_context(|| format!("no window of {}", metric.name))?;
        }
        // The switches come after what takes the time of a boot.
        let boots = place == Column::Tenon && matches!(parts.as_deref(), None | Some("none" | "all"));
        let clock = boots.then(|| -> Result<_> {
            let run = lab.tenon(Form::Elf, mode::BOOT, BOOTED)?;
            boot::clock(&run.printed.text()).context("the guest's log has no line about init")
        });
        Ok(Self { place, parts, record, clock: clock.transpose()? })
    }

    fn counts(&self, index: usize) -> Option<&Counts> {
        self.record.least(window(index))
    }
}

/// The number of a metric's windows.
fn window(index: usize) -> u16 {
    u16::try_from(index).map_or(u16::MAX, |index| marker::METRICS.saturating_add(index))
}

/// Runs the benchmark program in the unpatched kernel, and in the patched one with no part, each part, and all parts.
pub(super) fn measure(sh: &Shell, options: &Options) -> Result<Report> {
    let [patched, unpatched, ..] = built::NAMES;
    let patched = Lab::new(sh, &Options { kernel: patched.into(), ..options.clone() })?;
    let unpatched = patched.with_kernel(sh, unpatched)?;
    let parts = built::parts(&built::series(built::DEFAULT)?);
    let mut wanted = Vec::new();
    for place in [Column::Tenon, Column::Xen].into_iter().filter(|place| patched.wants(*place)) {
        let parts = ["none"].into_iter().chain(parts.iter().map(String::as_str)).chain(["all"]);
        wanted.push((place, None));
        wanted.extend(parts.map(|part| (place, Some(part.to_owned()))));
    }
    let start = Instant::now();
    let steps = side_by_side(wanted, |(place, parts)| Step::measure(&patched, &unpatched, place, parts))?;
    eprintln!("all {} kernels: {:.0} s", steps.len(), start.elapsed().as_secs_f64());
    let mut tables = Vec::new();
    let booted: Vec<&Step> = steps.iter().filter(|step| step.clock.is_some()).collect();
    if !booted.is_empty() {
        let title = "Boot on Tenon, to init by the kernel's clock".to_owned();
        let cells = booted.iter().filter_map(|step| step.clock).map(short);
        let row = ["instructions of the machine".to_owned()].into_iter().chain(cells).collect();
        tables.push(Table { title, rows: vec![head("", &booted), row] });
    }
    let mut numbers = Vec::new();
    for (place, name, prefix) in [(Column::Tenon, "Tenon", ""), (Column::Xen, "Xen", "Xen: ")] {
        let steps: Vec<&Step> = steps.iter().filter(|step| step.place == place).collect();
        if !steps.is_empty() {
            tables.extend(SHOWN.map(|(what, of)| table(&format!("On {name}: {what}"), &steps, of)));
        }
        for step in steps {
            for (index, metric) in METRICS.iter().enumerate() {
                let name = format!("{prefix}{}/{}", step.name(), metric.name);
                numbers.extend(step.counts(index).map(|counts| number(&name, counts, metric.operations)));
            }
        }
    }
    Ok(Report {
        name: "patches".into(),
        about: format!(
            "Entries into the hypervisor, instructions of ring 0 and of the kernel, for an operation in a guest of {MEMORY} MiB \
             and in Xen's first domain. `unpatched` is the source as it is; the other columns are one kernel with the patches \
             and the boot parameter `tenon=`, which switches parts. Each is the least of five windows. Operations are left out \
             of a table in which no column differs by a hundredth. A boot has {BOOTED} MiB."
        ),
        versions: patched.versions.clone(),
        date: patched.date.clone(),
        tables,
        bars: Vec::new(),
        plot: Vec::new(),
        numbers,
        notes: Vec::new(),
        profiles: Vec::new(),
    })
}

fn head(first: &str, steps: &[&Step]) -> Vec<String> {
    [first].into_iter().chain(steps.iter().map(|step| step.name())).map(str::to_owned).collect()
}

/// One count of every operation, with a column for each step.
fn table(title: &str, steps: &[&Step], of: fn(&Counts) -> u64) -> Table {
    let mut rows = vec![head("per operation", steps)];
    for (index, metric) in METRICS.iter().enumerate() {
        let numbers: Vec<f64> = steps.iter().filter_map(|step| Some(per(of(step.counts(index)?), metric))).collect();
        if changes(&numbers) {
            rows.push([metric.name.to_owned()].into_iter().chain(numbers.into_iter().map(short)).collect());
        }
    }
    Table { title: title.to_owned(), rows }
}

/// Whether some number is another than the first.
fn changes(numbers: &[f64]) -> bool {
    let first = numbers.first().copied().unwrap_or_default();
    numbers.iter().any(|number| (number - first).abs() > SAME * first)
}

/// Does `work` for each of `things`, several at a time: what is counted does not depend on what else the machine does.
fn side_by_side<T: Send, R: Send>(things: Vec<T>, work: impl Fn(T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let at_a_time = thread::available_parallelism().map_or(1, usize::from);
    let results: Mutex<Vec<Option<Result<R>>>> = Mutex::new(things.iter().map(|_| None).collect());
    let things = Mutex::new(things.into_iter().enumerate());
    let next = || things.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                while let Some((index, thing)) = next() {
                    let result = work(thing);
                    results.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.into_iter().map(|result| result.context("a run was not made")?).collect()
}

#[allow(clippy::cast_precision_loss, reason = "counts of a window are far below 2^52")]
fn per(count: u64, metric: &Metric) -> f64 {
    count as f64 / f64::from(metric.operations)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_part_changes_is_left_out() {
        assert!(!changes(&[]) && !changes(&[0.0, 0.0]) && !changes(&[200.0, 198.0, 202.0]));
        assert!(changes(&[200.0, 200.0, 197.9]) && changes(&[0.0, 0.01]));
    }

    #[test]
    fn work_side_by_side_keeps_its_order_and_its_errors() {
        assert_eq!(
            side_by_side((0..50).collect(), |number| Ok(number * 2)).unwrap(),
            (0..100).step_by(2).collect::<Vec<_>>()
        );
        let fails = |number| if number == 7 { Err(anyhow::anyhow!("no {number}")) } else { Ok(number) };
        assert_eq!(side_by_side((0..9).collect(), fails).unwrap_err().to_string(), "no 7");
    }
}
