//! What disks and networks are made of, grants, and what it takes to read from a disk, and to send.

use super::bars::Bar;
use super::columns::{Clock, Lab, Times};
use super::counts::{Counts, Record};
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use marker::{COPY_ODD, COPY_PAGE, COPY_SMALL, PACKETS, PIN, READS, STREAM, TRIPS};
use serde_json::json;
use std::time::Duration;
use xtask::bundle::Guest;

/// Elements of a window of grants.
const BATCH: u32 = 32;
/// What the test guest says when it has measured all.
const SAID: &str = "costs: all measured";
/// Memory in MiB of the guest that reads.
const MEMORY: u32 = 128;

/// What is done, in which window, and what it may take of ring 0.
const DEEDS: [(&str, u16, Option<f64>); 4] = [
    ("pin and unpin a page, of 32 in a batch", PIN, Some(850.0)),
    ("copy 4,000 bytes at an odd offset", COPY_ODD, Some(1600.0)),
    ("copy a page", COPY_PAGE, None),
    ("copy 8 bytes", COPY_SMALL, None),
];

/// What a read of [`microbench::READS`] may take in all, and of the hypervisor and dom0 together.
const READ_BARS: [(f64, Option<f64>); 4] =
    [(40_000.0, Some(18_000.0)), (36_000.0, Some(15_000.0)), (95_000.0, None), (70_000.0, None)];

/// What is done between two guests, in which window, and what it may take in all.
const NETWORK: [(microbench::Metric, u16, Option<f64>); 3] = [
    (microbench::MIB, STREAM, Some(2_000_000.0)),
    (microbench::TRIPS, TRIPS, Some(85_000.0)),
    (microbench::PACKETS, PACKETS, None),
];

/// What is done with the host, in which window, and how many times as much as on the bare machine it may take.
const WITH_HOST: [(microbench::Metric, u16, Option<f64>); 2] =
    [(microbench::TO_HOST, marker::TO_HOST, Some(2.0)), (microbench::FROM_HOST, marker::FROM_HOST, None)];

/// How often the exchange with the host is timed on Tenon and on bare Linux.
const PAIRS: u32 = 5;

/// A row: what is done so many times in a window, and its bars.
struct Row<'a> {
    name: String,
    counts: &'a Counts,
    operations: u32,
    /// Whether the row is about Linux alone on the machine.
    is_bare: bool,
    bars: Vec<Bar>,
}

impl<'a> Row<'a> {
    fn new(name: impl Into<String>, counts: &'a Counts, operations: u32) -> Self {
        Self { name: name.into(), counts, operations, is_bare: false, bars: Vec::new() }
    }

    fn per(&self, count: u64) -> f64 {
        exact(count) / f64::from(self.operations)
    }

    fn cells(&self) -> Vec<String> {
        let counts = self.counts;
        let guest = counts.total() - counts.hosts();
        let numbers = [counts.insns("ring0"), counts.insns("dom0"), guest, counts.total(), counts.entries()];
        let mut row = vec![self.name.clone()];
        row.extend(numbers.map(|count| short(self.per(count))));
        row
    }

    fn bar(&self) -> plot::Bar {
        if self.is_bare { plot::Bar::new("bare", self.counts, 1) } else { plot::Bar::hosts("Tenon", self.counts) }
    }
}

/// Has a test guest pin its own pages, and copy from them; and stock kernels read from disks, and send to each other and to the
/// host.
pub(super) fn measure(lab: &Lab) -> Result<Report> {
    let costs = Guest {
        name: "costs".into(),
        memory: 32,
        vcpus: 1,
        kernel: lab.image("costs")?,
        ramdisk: None,
        extra: String::new(),
        vif: Vec::new(),
    };
    let grants = lab.guests("tenon-io", &[costs], SAID, &[])?.record;
    let disks = lab.disks(MEMORY)?.record;
    let network = lab.network(MEMORY)?.record;
    let with_host = lab.guest_and_host(MEMORY, Clock::Passes)?.0.record;
    let bare = lab.bare_and_host(Clock::Passes)?.0.record;
    // In turn, as other work on this machine changes with time.
    let pair = |_| Ok([lab.guest_and_host(MEMORY, Clock::IsHosts)?.1, lab.bare_and_host(Clock::IsHosts)?.1]);
    let times = (0..PAIRS).map(pair).collect::<Result<Vec<_>>>()?;

    let mut rows = of_grants(&grants)?;
    rows.extend(of_disks(&disks)?);
    rows.extend(of_guests(&network)?);
    rows.extend(of_host(&with_host, &bare)?);
    let mut table = vec![["each", "ring 0", "dom0", "guest", "all", "entries"].map(str::to_owned).to_vec()];
    let (mut bars, mut plot, mut numbers, mut profiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in &rows {
        table.push(row.cells());
        plot.push(Group { label: row.name.clone(), bars: vec![row.bar()] });
        numbers.push(number(&row.name, row.counts, row.operations));
        if lab.profile && !row.is_bare {
            profiles.push((row.name.clone(), profile::lines(lab, row.counts, row.operations)?));
        }
    }
    let packets = rows.iter().find(|row| row.name == microbench::PACKETS.name).context("no row of packets")?;
    let mut results =
        vec![("packets of UDP guest to guest in a million instructions", 1e6 / packets.per(packets.counts.total()))];
    results.extend(slowdowns(&times).context("no window by the clock")?);
    let notes = results.iter().map(|(what, result)| format!("{what}: {}.", short(*result)));
    let notes = notes.collect();
    numbers.extend(results.iter().map(|(what, result)| json!({ "name": what, "result": result })));
    bars.extend(rows.into_iter().flat_map(|row| row.bars));
    Ok(Report {
        name: "io".into(),
        about: format!(
            "Instructions for grants, in batches of {BATCH}: a test guest pins its own pages for a device, and copies from them. \
             And for reads of a stock guest from its disks, past its kernel's cache; for TCP and UDP between two stock guests; and \
             for TCP with the host, through dom0's gateway and QEMU's user network, beside the same kernel alone on the machine: \
             the least of five windows."
        ),
        versions: lab.versions.clone(),
        date: lab.date.clone(),
        notes,
        tables: vec![table.into()],
        bars,
        plot,
        numbers,
        profiles,
    })
}

fn of_grants(record: &Record) -> Result<Vec<Row<'_>>> {
    let mut rows = Vec::new();
    for (name, window, limit) in DEEDS {
        // The first time is for what is remembered.
        let counts = record.windows(window).nth(1).with_context(|| format!("nothing says what it takes to {name}"))?;
        let mut row = Row::new(name, counts, BATCH);
        row.bars.extend(limit.map(|limit| Bar::new(name, row.per(counts.insns("ring0")), limit)));
        rows.push(row);
    }
    Ok(rows)
}

fn of_disks(record: &Record) -> Result<Vec<Row<'_>>> {
    let mut rows = Vec::new();
    for ((window, reading), (all, hosts)) in (READS..).zip(&microbench::READS).zip(READ_BARS) {
        let name = reading.name;
        let counts = least(record, window, name)?;
        let mut row = Row::new(name, counts, reading.operations);
        row.bars.push(Bar::new(format!("read {name}"), row.per(counts.total()), all));
        let of_hosts = |limit| Bar::new(format!("read {name}: hypervisor and dom0"), row.per(counts.hosts()), limit);
        let of_hosts = hosts.map(of_hosts);
        row.bars.extend(of_hosts);
        rows.push(row);
    }
    Ok(rows)
}

fn of_guests(record: &Record) -> Result<Vec<Row<'_>>> {
    let mut rows = Vec::new();
    for (metric, window, limit) in NETWORK {
        let counts = least(record, window, metric.name)?;
        let mut row = Row::new(metric.name, counts, metric.operations);
        row.bars.extend(limit.map(|limit| Bar::new(metric.name, row.per(counts.total()), limit)));
        rows.push(row);
    }
    Ok(rows)
}

fn of_host<'a>(guest: &'a Record, bare: &'a Record) -> Result<Vec<Row<'a>>> {
    let mut rows = Vec::new();
    for (metric, window, limit) in WITH_HOST {
        let (counts, alone) = (least(guest, window, metric.name)?, least(bare, window, metric.name)?);
        let mut row = Row::new(metric.name, counts, metric.operations);
        let times = exact(counts.total()) / exact(alone.total());
        row.bars.extend(limit.map(|limit| Bar::new(format!("{}: times bare Linux", metric.name), times, limit)));
        rows.push(row);
        let name = format!("{}: bare Linux", metric.name);
        rows.push(Row { is_bare: true, ..Row::new(name, alone, metric.operations) });
    }
    Ok(rows)
}

fn least<'a>(record: &'a Record, window: u16, name: &str) -> Result<&'a Counts> {
    record.least(window).with_context(|| format!("no window of {name}"))
}

/// How many times as long as on bare Linux the exchange with the host takes by the clock: the median of the pairs of runs, of
/// each of which the median of the windows counts. `None` if there are none.
fn slowdowns(pairs: &[[Times; 2]]) -> Option<Vec<(&'static str, f64)>> {
    let whats = [
        "TCP guest to host, times bare Linux by the clock, median of five",
        "TCP host to guest, times bare Linux by the clock, median of five",
    ];
    let slowdown = |way: usize| {
        let ratio = |[guest, bare]: &[Times; 2]| Some(median(&guest[way])?.div_duration_f64(median(&bare[way])?));
        let mut ratios = pairs.iter().map(ratio).collect::<Option<Vec<f64>>>()?;
        ratios.sort_by(f64::total_cmp);
        ratios.get(ratios.len() / 2).copied()
    };
    whats.into_iter().enumerate().map(|(way, what)| Some((what, slowdown(way)?))).collect()
}

fn median(times: &[Duration]) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort();
    sorted.get(sorted.len() / 2).copied()
}

#[allow(clippy::cast_precision_loss, reason = "counts of a window are far below 2^52")]
fn exact(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_compared() {
        let times = |seconds: [u64; 3]| seconds.map(Duration::from_secs).to_vec();
        let guest = [times([9, 3, 1]), times([4, 5, 6])];
        let bare = [times([2, 2, 90]), times([1, 10, 20])];
        let busy = [times([40, 40, 40]), times([40, 40, 40])];
        let pairs = [[guest.clone(), bare.clone()], [busy, bare.clone()], [guest, bare]];
        let found: Vec<f64> = slowdowns(&pairs).unwrap().iter().map(|(_, times)| *times).collect();
        assert_eq!(found, [1.5, 0.5]);
        assert!(slowdowns(&[]).is_none());
        assert!(slowdowns(&[Default::default()]).is_none());
    }
}
