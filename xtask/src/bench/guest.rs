//! What a stock guest's system calls, faults and processes cost.

mod patched;

use super::bars::Bar;
use super::columns::{Column, Form, Lab, Run};
use super::counts::{Counts, Record};
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use super::stays::{self, Places};
use anyhow::{Context, Result};
use microbench::{METRICS, Metric, mode};
use xshell::Shell;

/// Memory of the guest in MiB.
const MEMORY: u32 = 256;

/// Instructions in the hypervisor that an operation may take, as a part of what Xen takes in the same run.
const PARTS_OF_XEN: [(&str, f64); 10] = [
    ("null_syscall", 0.12),
    ("signal_self", 0.12),
    ("page_fault", 0.23),
    ("mprotect_1024_pages", 0.13),
    ("fork_dirty_8M", 0.20),
    ("fork_exit", 0.30),
    ("fork_exec", 0.30),
    ("ctxsw_pipe", 0.23),
    ("nanosleep", 0.35),
    ("map_file_64_pages", 0.26),
];
/// The same for the unmapping of a page. 0.195 to 0.1995 is reached, and Xen's own number varies by a hundredth.
const PART_OF_XEN_UNMAPPING: f64 = 0.202;

/// The same for each metric on the kernels that are measured on request.
const PART_OF_XEN: f64 = 0.35;

/// Entries and loads of CR3 of an operation before the lean paths (f96ab16), which made entries shorter and not rarer: the
/// most of five runs. Those of small forks are of now: they depend on the addresses of programs, which were random then, and on
/// the pages of the benchmark program, so they are measured anew when that program grows.
const BEFORE: [(&str, f64, f64); 14] = [
    ("null_syscall", 2.0, 2.0),
    ("open_close", 4.0, 4.0),
    ("page_fault", 3.02, 2.01),
    ("touch_unmap", 4.05, 2.02),
    ("mmap_munmap_1M", 7.0, 6.0),
    ("mprotect_1024_pages", 38.9, 3.0),
    ("fork_exit", 47.3, 27.0),
    ("fork_dirty_8M", 8329.0, 4132.0),
    ("fork_exec", 69.6, 43.0),
    ("ctxsw_pipe", 8.01, 5.0),
    ("signal_self", 4.0, 4.0),
    ("nanosleep", 13.04, 4.54),
    ("map_file_64_pages", 141.1, 13.0),
    ("fork_exit_8M", 2164.0, 35.0),
];
/// An operation may have so many times as many now.
const TIMES_BEFORE: f64 = 1.01;

/// One column, as far as it was measured.
#[derive(Default)]
struct Measured(Option<Record>);

impl Measured {
    /// What a run has measured, which must be everything.
    fn take(column: Column, run: &Run) -> Result<Self> {
        let measured = Self(Some(run.record.clone()));
        for (index, metric) in METRICS.iter().enumerate() {
            measured.metric(index).with_context(|| format!("{column:?}: no window of {}", metric.name))?;
        }
        Ok(measured)
    }

    fn metric(&self, index: usize) -> Option<&Counts> {
        self.0.as_ref()?.least(window(index))
    }

    /// Instructions of ring 0 for the unmapping of a page: what a page costs that is touched and unmapped, beyond the touch.
    fn unmapping(&self) -> Option<f64> {
        Some(self.cost("touch_unmap")?[0] - self.cost("page_fault")?[0])
    }

    /// Instructions of ring 0 and entries of an operation.
    fn cost(&self, name: &str) -> Option<[f64; 2]> {
        let (index, metric) = METRICS.iter().enumerate().find(|(_, metric)| metric.name == name)?;
        Some([per(ring0(self.metric(index)?), metric), per(self.fewest(index)?[0], metric)])
    }

    /// The fewest entries and the fewest loads of CR3 in a window of the metric.
    fn fewest(&self, index: usize) -> Option<[u64; 2]> {
        let record = self.0.as_ref()?;
        Some([record.fewest(window(index), Counts::entries)?, record.fewest(window(index), Counts::cr3)?])
    }
}

/// The number of a metric's windows.
fn window(index: usize) -> u16 {
    u16::try_from(index).map_or(u16::MAX, |index| marker::METRICS.saturating_add(index))
}

/// Runs the benchmark program in each column. A kernel with our patches is compared with the one without, unless only some
/// columns or profiles are wanted.
pub(super) fn measure(sh: &Shell, lab: &Lab) -> Result<Report> {
    match lab.compared_with() {
        Some(unpatched) if lab.wants_all() && !lab.profile && !lab.stays => patched::measure(sh, lab, &unpatched),
        _ => measure_one(lab),
    }
}

/// Runs the benchmark program in each column, with one kernel.
fn measure_one(lab: &Lab) -> Result<Report> {
    let run = |column, run: &dyn Fn() -> Result<Run>| -> Result<Measured> {
        if lab.wants(column) { Measured::take(column, &run()?) } else { Ok(Measured::default()) }
    };
    let bare = run(Column::Bare, &|| lab.bare(mode::GUEST))?;
    let xen = run(Column::Xen, &|| lab.xen(Form::Elf, mode::GUEST, MEMORY))?;
    let tenon_run = run(Column::Tenon, &|| lab.tenon(Form::Elf, mode::GUEST, MEMORY))?;

    let head = [
        "per operation",
        "bare",
        "Xen",
        "Tenon",
        "Xen ring 0",
        "Tenon ring 0",
        "of Xen's",
        "Xen entries",
        "Tenon entries",
        "Xen CR3",
        "Tenon CR3",
    ];
    let (ours, others) = (Places::of(&lab.image("hypervisor")?)?, Places::default());
    let mut table = vec![head.map(str::to_owned).to_vec()];
    let (mut bars, mut plot, mut numbers, mut profiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, metric) in METRICS.iter().enumerate() {
        let columns = [("bare", bare.metric(index)), ("Xen", xen.metric(index)), ("Tenon", tenon_run.metric(index))];
        let [_, (_, on_xen), (_, on_tenon)] = columns;
        let cell = |counts: Option<&Counts>, of: fn(&Counts) -> u64| {
            counts.map_or_else(|| "-".into(), |counts| short(per(of(counts), metric)))
        };
        let mut row = vec![metric.name.to_owned()];
        row.extend(columns.map(|(_, counts)| cell(counts, Counts::total)));
        row.extend([on_xen, on_tenon].map(|counts| cell(counts, ring0)));
        row.push(on_xen.zip(on_tenon).map_or_else(|| "-".into(), |(xen, tenon)| part(tenon, xen)));
        row.extend([on_xen, on_tenon].map(|counts| cell(counts, Counts::entries)));
        row.extend([on_xen, on_tenon].map(|counts| cell(counts, Counts::cr3)));
        table.push(row);
        let found: Vec<_> = columns.iter().filter_map(|(name, counts)| Some((*name, (*counts)?))).collect();
        let label = metric.name.to_owned();
        let new = |(name, counts): &(&str, &Counts)| plot::Bar::new(*name, counts, metric.operations);
        plot.push(Group { label, bars: found.iter().map(new).collect() });
        let number =
            |(name, counts): &(&str, &Counts)| number(&format!("{name}/{}", metric.name), counts, metric.operations);
        numbers.extend(found.iter().map(number));
        if let Some(tenon) = on_tenon {
            if lab.is_default_kernel() {
                bars.extend(promises(metric, tenon, on_xen));
                bars.extend(tenon_run.fewest(index).into_iter().flat_map(|fewest| as_before(metric, fewest)));
            } else {
                bars.extend(on_xen.and_then(|xen| promise_of_others(metric, tenon, xen)));
            }
            if lab.profile {
                profiles.push((metric.name.to_owned(), profile::lines(lab, tenon, metric.operations)?));
            }
        }
        if lab.stays {
            for (name, counts) in found.iter().filter(|(_, counts)| ring0(counts) > 0) {
                let places = if *name == "Tenon" { &ours } else { &others };
                let lines = stays::lines(places, &counts.stays, metric.operations);
                profiles.push((format!("{}, stays in ring 0 of {name}", metric.name), lines));
            }
        }
    }
    if lab.is_default_kernel()
        && let (Some(xen), Some(tenon)) = (xen.unmapping(), tenon_run.unmapping())
    {
        let what = format!("munmap, a page (touch_unmap less page_fault): ring 0, {PART_OF_XEN_UNMAPPING} of Xen's");
        bars.push(Bar::new(what, tenon, PART_OF_XEN_UNMAPPING * xen));
    }
    Ok(Report {
        name: lab.name("guest"),
        about: "Instructions of an operation inside a stock Linux: on the bare machine, as Xen's first domain, and as a guest \
                of Tenon. \"Ring 0\" are those of the hypervisor, \"entries\" the times it was entered. Each is the least of \
                five windows."
            .into(),
        versions: lab.versions.clone(),
        date: lab.date.clone(),
        tables: vec![table.into()],
        bars,
        plot,
        numbers,
        notes: Vec::new(),
        profiles,
    })
}

fn ring0(counts: &Counts) -> u64 {
    counts.insns("ring0")
}

#[allow(clippy::cast_precision_loss, reason = "counts of a window are far below 2^52")]
fn per(count: u64, metric: &Metric) -> f64 {
    count as f64 / f64::from(metric.operations)
}

/// Tenon's ring 0 as a part of Xen's.
#[allow(clippy::cast_precision_loss, reason = "counts of a window are far below 2^52")]
fn part(tenon: &Counts, xen: &Counts) -> String {
    match (ring0(tenon), ring0(xen)) {
        (_, 0) => "-".into(),
        (tenon, xen) => format!("{:.3}", tenon as f64 / xen as f64),
    }
}

/// What is promised of a metric on a kernel that is measured on request.
fn promise_of_others(metric: &Metric, tenon: &Counts, xen: &Counts) -> Option<Bar> {
    let what = format!("{}: ring 0, {PART_OF_XEN} of Xen's", metric.name);
    (ring0(xen) > 0).then(|| Bar::new(what, per(ring0(tenon), metric), PART_OF_XEN * per(ring0(xen), metric)))
}

/// Entries and loads of CR3 are no more than before the lean paths. Each is the fewest in a window: the others have met more
/// timer interrupts.
fn as_before(metric: &Metric, [entries, cr3]: [u64; 2]) -> Vec<Bar> {
    let before = BEFORE.iter().find(|(name, ..)| *name == metric.name);
    let bar = |what: &str, now, before: f64| {
        let name = format!("{}: {what}, {TIMES_BEFORE} times before", metric.name);
        Bar::new(name, per(now, metric), TIMES_BEFORE * before)
    };
    before.map_or_else(Vec::new, |(_, e, c)| vec![bar("entries", entries, *e), bar("CR3 loads", cr3, *c)])
}

fn promises(metric: &Metric, tenon: &Counts, xen: Option<&Counts>) -> Vec<Bar> {
    let mut bars = Vec::new();
    if metric.name == "clock_gettime" {
        // A timer interrupt may fall into the window.
        bars.push(Bar::new("clock_gettime: times it leaves the program", per(tenon.left_user(), metric), 0.01));
    }
    let Some(xen) = xen else { return bars };
    if let Some((name, part)) = PARTS_OF_XEN.iter().find(|(name, _)| *name == metric.name) {
        let what = format!("{name}: ring 0, {part} of Xen's");
        bars.push(Bar::new(what, per(ring0(tenon), metric), part * per(ring0(xen), metric)));
    }
    if metric.name == "fork_exec" {
        let what = "fork_exec: entries no more than Xen's (its mark: 149)";
        bars.push(Bar::new(what, per(tenon.entries(), metric), per(xen.entries(), metric)));
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(numbers: &str) -> Counts {
        let record = Record::parse(&format!("window 256 {numbers}\n")).unwrap();
        record.least(256).unwrap().clone()
    }

    fn bars(name: &str, tenon: &str, xen: &str) -> Vec<(bool, f64, f64)> {
        let metric = METRICS.iter().find(|metric| metric.name == name).unwrap();
        let bars = promises(metric, &counts(tenon), Some(&counts(xen)));
        bars.iter().map(|bar| (bar.is_met(), bar.measured, bar.limit)).collect()
    }

    #[test]
    fn a_part_of_the_instructions_of_xen_is_allowed_and_not_one_more() {
        // 2000 operations; what the kernel and the program execute is theirs.
        let xen = "insns.ring0=1600000 insns.kernel=1";
        assert_eq!(bars("null_syscall", "insns.ring0=192000 insns.kernel=9000000", xen), [(true, 96.0, 96.0)]);
        assert_eq!(bars("null_syscall", "insns.ring0=192001", xen), [(false, 96.0005, 96.0)]);
        assert_eq!(bars("open_close", "insns.ring0=1600001", xen), [], "no bar is set for it");
    }

    #[test]
    fn processes_have_a_bar_for_entries_too() {
        let entered = "insns.ring0=10 entry.user.ring0=20 entry.kernel.ring0=1";
        let met = bars("fork_exec", entered, "insns.ring0=40 entry.user.ring0=20 entry.kernel.ring0=1");
        assert_eq!(met, [(true, 0.5, 0.6), (true, 1.05, 1.05)]);
        let missed = bars("fork_exec", entered, "insns.ring0=40 entry.user.ring0=20");
        assert_eq!(missed, [(true, 0.5, 0.6), (false, 1.05, 1.0)]);
    }

    #[test]
    fn entries_and_cr3_loads_are_those_of_before_and_a_hundredth() {
        let metric = METRICS.iter().find(|metric| metric.name == "null_syscall").unwrap();
        let met = |fewest| as_before(metric, fewest).iter().map(Bar::is_met).collect::<Vec<_>>();
        assert_eq!(met([4040, 4040]), [true, true]);
        assert_eq!(met([4041, 4041]), [false, false]);
        assert_eq!(as_before(&Metric { name: "new", operations: 1 }, [9, 9]), []);
        assert!(BEFORE.iter().all(|(name, ..)| METRICS.iter().any(|metric| metric.name == *name)));
    }

    #[test]
    fn other_kernels_have_one_bar_for_every_metric_that_enters_the_hypervisor() {
        let metric = METRICS.iter().find(|metric| metric.name == "nanosleep").unwrap();
        let met =
            |tenon| promise_of_others(metric, &counts(tenon), &counts("insns.ring0=1000")).map(|bar| bar.is_met());
        assert_eq!([met("insns.ring0=350"), met("insns.ring0=351")], [Some(true), Some(false)]);
        assert_eq!(promise_of_others(metric, &counts("insns.user=1"), &counts("insns.user=1")), None);
    }

    #[test]
    fn time_is_read_without_leaving_the_program() {
        let left =
            |times| bars("clock_gettime", &format!("insns.user=1 entry.user.kernel={times}"), "insns.user=1")[0].0;
        assert_eq!([left(0), left(20), left(21), left(2000)], [true, true, false, false]);
    }
}
