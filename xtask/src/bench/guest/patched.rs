//! A kernel with our patches beside the same kernel without them.

use super::{MEMORY, Measured, per, ring0};
use crate::bench::bars::Bar;
use crate::bench::columns::{Column, Form, Lab};
use crate::bench::counts::Counts;
use crate::bench::plot::{self, Group};
use crate::bench::report::{Report, Table, number, short};
use anyhow::Result;
use microbench::{METRICS, mode};
use xshell::Shell;

/// The distribution's own kernel of the same version, which is shown beside the others.
const DISTRIBUTIONS: &str = "6.12";

/// What is promised of an operation in the patched kernel on Tenon.
struct Promise {
    /// The operation, in words.
    what: &'static str,
    metric: &'static str,
    /// The metric on Xen that the operation is held against, if it is another one.
    against: Option<&'static str>,
    /// The metric whose costs are not part of the operation.
    less: Option<&'static str>,
    /// Operations in one of the metric's.
    parts: f64,
    /// Instructions of ring 0, as a part of those with the unpatched kernel on Xen in the same run.
    part_of_xen: f64,
    /// Entries into the hypervisor.
    entries: f64,
}

const fn promise(what: &'static str, metric: &'static str, part_of_xen: f64, entries: f64) -> Promise {
    Promise { what, metric, against: None, less: None, parts: 1.0, part_of_xen, entries }
}

const PROMISES: [Promise; 8] = [
    promise("fork and exit, 8 MiB", "fork_exit_8M", 0.10, 80.0),
    promise("fork and exit", "fork_exit", 0.25, 49.0),
    promise("fork, exec and exit", "fork_exec", 0.25, 60.0),
    Promise { less: Some("page_fault"), ..promise("munmap, a page", "touch_unmap", 0.07, 0.05) },
    Promise { parts: 1024.0, ..promise("mprotect, a page", "mprotect_1024_pages", 0.12, 0.01) },
    // Six, and what timer interrupts add in a window of several milliseconds.
    promise("a switch through a pipe", "ctxsw_pipe", 0.18, 6.05),
    promise("file map, a page", "map_file_page", 0.12, 0.2),
    // The unpatched kernel on Xen makes no large folios: its pages come one by one.
    Promise { against: Some("page_fault"), ..promise("a page of a large folio", "page_fault_folios", 0.08, 0.3) },
];

/// No operation may load CR3 so many times as often as in the unpatched kernel on Tenon.
const TIMES_CR3: f64 = 1.01;

/// The columns, in the order of tables.
struct Columns {
    bare: Measured,
    xen: Measured,
    xen_patched: Measured,
    tenon: Measured,
    tenon_patched: Measured,
    /// The distribution's own kernel, on Xen and on Tenon.
    distributions: [Measured; 2],
}

impl Columns {
    fn measure(sh: &Shell, patched: &Lab, unpatched: &Lab) -> Result<Self> {
        let distributions = patched.with_kernel(sh, DISTRIBUTIONS)?;
        let xen = |lab: &Lab| {
            let run = lab.with_parts(Column::Xen).xen(Form::Elf, mode::GUEST, MEMORY)?;
            Measured::take(Column::Xen, &run)
        };
        let tenon = |lab: &Lab| Measured::take(Column::Tenon, &lab.tenon(Form::Elf, mode::GUEST, MEMORY)?);
        Ok(Self {
            bare: Measured::take(Column::Bare, &patched.bare(mode::GUEST)?)?,
            xen: xen(unpatched)?,
            xen_patched: xen(patched)?,
            tenon: tenon(unpatched)?,
            tenon_patched: tenon(patched)?,
            distributions: [xen(&distributions)?, tenon(&distributions)?],
        })
    }

    fn all(&self) -> [(&'static str, &Measured); 7] {
        let [on_xen, on_tenon] = &self.distributions;
        [
            ("bare", &self.bare),
            ("Xen", &self.xen),
            ("Xen, patched", &self.xen_patched),
            ("Tenon", &self.tenon),
            ("Tenon, patched", &self.tenon_patched),
            ("Debian's on Xen", on_xen),
            ("Debian's on Tenon", on_tenon),
        ]
    }
}

/// Runs the benchmark program in both kernels, and in the distribution's own.
pub(in crate::bench) fn measure(sh: &Shell, lab: &Lab, unpatched: &str) -> Result<Report> {
    let without = lab.with_kernel(sh, unpatched)?;
    let mut versions = lab.versions.clone();
    versions.push((unpatched.to_owned(), without.kernel_version()?));
    versions.push(("Debian's".to_owned(), lab.with_kernel(sh, DISTRIBUTIONS)?.kernel_version()?));
    let columns = Columns::measure(sh, lab, &without)?;
    let numbers = columns.all().into_iter().flat_map(|(name, measured)| {
        METRICS.iter().enumerate().filter_map(move |(index, metric)| {
            Some(number(&format!("{name}/{}", metric.name), measured.metric(index)?, metric.operations))
        })
    });
    Ok(Report {
        name: lab.name("guest"),
        about: "Instructions of an operation inside a Linux with our patches and inside the same Linux without them: on the \
                bare machine, as Xen's first domain, and as a guest of Tenon. The bare machine has the patched kernel, and \
                on Xen all parts of the patches are switched on. Beside \
                them stands Debian's own binary of the same version. Each number is of the best of five windows: that with the \
                fewest instructions, and for entries and CR3 loads that with the fewest of these."
            .into(),
        versions,
        date: lab.date.clone(),
        tables: tables(&columns),
        bars: bars(&columns),
        plot: groups(&columns),
        numbers: numbers.collect(),
        notes: Vec::new(),
        profiles: Vec::new(),
    })
}

/// A table for each thing that is counted.
fn tables(columns: &Columns) -> Vec<Table> {
    let all: Vec<_> = columns.all().into_iter().collect();
    let hosted = &all[1..];
    let least = |of: fn(&Counts) -> u64| {
        move |measured: &Measured, index| Some(per(of(measured.metric(index)?), &METRICS[index]))
    };
    let fewest =
        |which: usize| move |measured: &Measured, index| Some(per(measured.fewest(index)?[which], &METRICS[index]));
    vec![
        table("All instructions", &all, &least(Counts::total), false),
        table("Instructions of ring 0", hosted, &least(ring0), true),
        table("Entries into the hypervisor", hosted, &fewest(0), false),
        table("Loads of CR3", hosted, &fewest(1), false),
    ]
}

/// A number of a metric, for an operation.
type Cost = dyn Fn(&Measured, usize) -> Option<f64>;

/// A table of one number, with what the patched kernel's is on Tenon as a part of the unpatched one's on Xen if `shared`.
fn table(title: &str, columns: &[(&str, &Measured)], cost: &Cost, shared: bool) -> Table {
    let mut head = vec!["per operation".to_owned()];
    head.extend(columns.iter().map(|(name, _)| (*name).to_owned()));
    head.extend(shared.then(|| "Tenon, patched, of Xen's".to_owned()));
    let mut rows = vec![head];
    for (index, metric) in METRICS.iter().enumerate() {
        let cells: Vec<_> = columns.iter().map(|(name, measured)| (*name, cost(measured, index))).collect();
        let mut row = vec![metric.name.to_owned()];
        row.extend(cells.iter().map(|(_, number)| number.map_or_else(|| "-".into(), short)));
        if shared {
            let find = |wanted| cells.iter().find(|(name, _)| *name == wanted).and_then(|(_, number)| *number);
            let part = find("Tenon, patched").zip(find("Xen")).filter(|(_, xen)| *xen > 0.0);
            row.push(part.map_or_else(|| "-".into(), |(tenon, xen)| format!("{:.3}", tenon / xen)));
        }
        rows.push(row);
    }
    Table { title: title.to_owned(), rows }
}

/// What is promised, and met or missed.
fn bars(columns: &Columns) -> Vec<Bar> {
    let mut bars = Vec::new();
    for promise in &PROMISES {
        let Promise { what, part_of_xen, entries, .. } = promise;
        let (on_xen, on_tenon) = (promise.cost_before(&columns.xen), promise.cost(&columns.tenon_patched));
        let (Some([xen, _]), Some([tenon, entered])) = (on_xen, on_tenon) else { continue };
        bars.push(Bar::new(format!("{what}: ring 0, {part_of_xen} of Xen's"), tenon, part_of_xen * xen));
        bars.push(Bar::new(format!("{what}: entries"), entered, *entries));
    }
    bars.extend(cr3(&columns.tenon, &columns.tenon_patched));
    bars
}

impl Promise {
    /// Instructions of ring 0 and entries of the operation.
    fn cost(&self, measured: &Measured) -> Option<[f64; 2]> {
        self.cost_of(self.metric, measured)
    }

    /// The same of the operation that it is held against.
    fn cost_before(&self, measured: &Measured) -> Option<[f64; 2]> {
        self.cost_of(self.against.unwrap_or(self.metric), measured)
    }

    fn cost_of(&self, metric: &str, measured: &Measured) -> Option<[f64; 2]> {
        let [instructions, entries] = measured.cost(metric)?;
        let less = self.less.map_or(Some([0.0; 2]), |name| measured.cost(name))?;
        Some([(instructions - less[0]) / self.parts, (entries - less[1]) / self.parts])
    }
}

/// The operation whose loads of CR3 the patches raise most.
fn cr3(unpatched: &Measured, patched: &Measured) -> Option<Bar> {
    let times = |index: usize| {
        let (before, now) = (unpatched.fewest(index)?[1], patched.fewest(index)?[1]);
        // A metric that never loads CR3 must not begin to.
        let times =
            if before == 0 && now == 0 { 1.0 } else { per(now, &METRICS[index]) / per(before, &METRICS[index]) };
        Some((METRICS[index].name, times))
    };
    let most = (0..METRICS.len()).filter_map(times).max_by(|(_, a), (_, b)| a.total_cmp(b));
    most.map(|(name, times)| {
        Bar::new(format!("CR3 loads, times the unpatched kernel's on Tenon: the most is {name}'s"), times, TIMES_CR3)
    })
}

/// A group of bars for each operation that something is promised of.
fn groups(columns: &Columns) -> Vec<Group> {
    let index_of = |promise: &Promise| METRICS.iter().position(|metric| metric.name == promise.metric);
    let group = |index: usize| {
        let metric = &METRICS[index];
        let [bare, hosted @ .., _, _] = columns.all();
        let bars = hosted.into_iter().chain([bare]).filter_map(|(name, measured)| {
            let bar = plot::Bar::new(name, measured.metric(index)?, metric.operations);
            let entries = per(measured.fewest(index)?[0], metric);
            Some(if entries > 0.0 { bar.with_note(format!("{} entries", short(entries))) } else { bar })
        });
        Group { label: metric.name.to_owned(), bars: bars.collect() }
    };
    PROMISES.iter().filter_map(index_of).map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::counts::Record;

    /// A column in which windows of the metrics named have these numbers.
    fn column(windows: &[(&str, &str)]) -> Measured {
        let line = |(name, numbers): &(&str, &str)| {
            let index = METRICS.iter().position(|metric| metric.name == *name).unwrap();
            format!("window {} {numbers}\n", usize::from(marker::METRICS) + index)
        };
        Measured(Some(Record::parse(&windows.iter().map(line).collect::<String>()).unwrap()))
    }

    fn columns(xen: &[(&str, &str)], tenon: &[(&str, &str)], patched: &[(&str, &str)]) -> Columns {
        let [bare, xen_patched, on_xen, on_tenon] = [(); 4].map(|()| Measured::default());
        let [xen, tenon, tenon_patched] = [xen, tenon, patched].map(column);
        Columns { bare, xen, xen_patched, tenon, tenon_patched, distributions: [on_xen, on_tenon] }
    }

    #[test]
    fn each_promise_names_metrics() {
        let known = |name: &str| METRICS.iter().any(|metric| metric.name == name);
        assert!(PROMISES.iter().all(|promise| known(promise.metric)
            && promise.less.is_none_or(known)
            && promise.against.is_none_or(known)));
    }

    #[test]
    fn the_patched_kernel_on_tenon_is_held_against_the_unpatched_one_on_xen() {
        let bars = |insns, entries| {
            let numbers = format!("insns.ring0={insns} entry.kernel.ring0={entries}");
            let columns = columns(&[("fork_exit_8M", "insns.ring0=5000")], &[], &[("fork_exit_8M", &numbers)]);
            bars(&columns).iter().map(Bar::is_met).collect::<Vec<_>>()
        };
        assert_eq!(bars(500, 80), [true, true]);
        assert_eq!(bars(501, 81), [false, false]);
    }

    #[test]
    fn a_page_that_is_unmapped_costs_what_is_left_of_its_touch() {
        let windows = [
            ("touch_unmap", "insns.ring0=409600 entry.kernel.ring0=3123"),
            ("page_fault", "insns.ring0=307200 entry.kernel.ring0=3072"),
        ];
        let promise = PROMISES.iter().find(|promise| promise.metric == "touch_unmap").unwrap();
        let [instructions, entries] = promise.cost(&column(&windows)).unwrap();
        assert!((instructions - 100.0).abs() < 1e-9 && (entries - 51.0 / 1024.0).abs() < 1e-9);
    }

    #[test]
    fn a_page_of_a_large_folio_is_held_against_a_page_that_is_faulted_in_alone() {
        let met = |insns| {
            let xen = [("page_fault", "insns.ring0=1024000"), ("page_fault_folios", "insns.ring0=1")];
            let columns = columns(&xen, &[], &[("page_fault_folios", &format!("insns.ring0={insns}"))]);
            bars(&columns).iter().all(Bar::is_met)
        };
        assert!(met(81_920) && !met(81_921));
    }

    #[test]
    fn loads_of_cr3_may_not_rise() {
        let met = |before: &str, now: &str| {
            let of = |numbers| column(&[("fork_exit", numbers), ("null_syscall", "cr3.ring0=4000")]);
            cr3(&of(before), &of(now)).unwrap().is_met()
        };
        assert!(met("cr3.ring0=540", "cr3.ring0=545") && met("insns.user=1", "insns.user=1"));
        assert!(!met("cr3.ring0=540", "cr3.ring0=546") && !met("insns.user=1", "cr3.ring0=1"));
    }
}
