//! What disks and networks are made of, grants, and what it takes to read from a disk.

use super::bars::Bar;
use super::columns::Lab;
use super::counts::Counts;
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use marker::{COPY_ODD, COPY_PAGE, COPY_SMALL, PIN, READS, STREAM, TRIPS};
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
const NETWORK: [(microbench::Metric, u16, f64); 2] =
    [(microbench::MIB, STREAM, 2_000_000.0), (microbench::TRIPS, TRIPS, 85_000.0)];

/// A row: what is done so many times in a window, and its bars.
struct Row<'a> {
    name: &'a str,
    counts: &'a Counts,
    operations: u32,
    bars: Vec<Bar>,
}

impl Row<'_> {
    fn per(&self, count: u64) -> f64 {
        exact(count) / f64::from(self.operations)
    }

    fn cells(&self) -> Vec<String> {
        let counts = self.counts;
        let guest = counts.total() - counts.hosts();
        let numbers = [counts.insns("ring0"), counts.insns("dom0"), guest, counts.total(), counts.entries()];
        let mut row = vec![self.name.to_owned()];
        row.extend(numbers.map(|count| short(self.per(count))));
        row
    }
}

/// Has a test guest pin its own pages, and copy from them; and a stock kernel read from disks.
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
    let mut rows = Vec::new();
    for (name, window, limit) in DEEDS {
        // The first time is for what is remembered.
        let counts = grants.windows(window).nth(1).with_context(|| format!("nothing says what it takes to {name}"))?;
        let mut row = Row { name, counts, operations: BATCH, bars: Vec::new() };
        row.bars.extend(limit.map(|limit| Bar::new(name, row.per(counts.insns("ring0")), limit)));
        rows.push(row);
    }
    for ((window, reading), (all, hosts)) in (READS..).zip(&microbench::READS).zip(READ_BARS) {
        let name = reading.name;
        let counts = disks.least(window).with_context(|| format!("no window of reads: {name}"))?;
        let mut row = Row { name, counts, operations: reading.operations, bars: Vec::new() };
        row.bars.push(Bar::new(format!("read {name}"), row.per(counts.total()), all));
        let of_hosts = |limit| Bar::new(format!("read {name}: hypervisor and dom0"), row.per(counts.hosts()), limit);
        let of_hosts = hosts.map(of_hosts);
        row.bars.extend(of_hosts);
        rows.push(row);
    }
    let network = lab.network(MEMORY)?.record;
    for (metric, window, limit) in NETWORK {
        let counts = network.least(window).with_context(|| format!("no window of {}", metric.name))?;
        let mut row = Row { name: metric.name, counts, operations: metric.operations, bars: Vec::new() };
        row.bars.push(Bar::new(metric.name, row.per(counts.total()), limit));
        rows.push(row);
    }
    let mut table = vec![["each", "ring 0", "dom0", "guest", "all", "entries"].map(str::to_owned).to_vec()];
    let (mut bars, mut plot, mut numbers, mut profiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        table.push(row.cells());
        plot.push(Group { label: row.name.to_owned(), bars: vec![plot::Bar::hosts("Tenon", row.counts)] });
        numbers.push(number(row.name, row.counts, row.operations));
        if lab.profile {
            profiles.push((row.name.to_owned(), profile::lines(lab, row.counts, row.operations)?));
        }
        bars.extend(row.bars);
    }
    Ok(Report {
        name: "io".into(),
        about: format!(
            "Instructions for grants, in batches of {BATCH}: a test guest pins its own pages for a device, and copies from them. \
             And for reads of a stock guest from its disks, past its kernel's cache, and for TCP between two stock guests: the least of five windows."
        ),
        versions: lab.versions.clone(),
        date: lab.date.clone(),
        notes: Vec::new(),
        table,
        bars,
        plot,
        numbers,
        profiles,
    })
}

#[allow(clippy::cast_precision_loss, reason = "counts of a window are far below 2^52")]
fn exact(count: u64) -> f64 {
    count as f64
}
