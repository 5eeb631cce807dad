//! From power-on to a stock guest's init.

use super::bars::Bar;
use super::columns::{Column, Form, Lab};
use super::counts::{Counts, OWNERS, Record};
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use marker::{INIT, LISTED};
use microbench::mode;

/// Memory of the guest in MiB; Xen refuses to start this kernel as its first domain with so little.
const MEMORY: u32 = 128;
const XEN_MEMORY: u32 = 256;
/// Tenon may take so many times what the bare machine takes.
const TIMES_BARE: f64 = 1.5;
/// dom0 lists its guests after this many instructions.
const LISTED_LIMIT: f64 = 0.5e9;
/// Xen, a Linux as dom0 with Debian's tools, `xl create` of this kernel as bzImage: to the guest's init.
const XEN_WITH_DOM0: f64 = 18.0e9;

/// Boots each column to init.
pub(super) fn measure(lab: &Lab) -> Result<Report> {
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
        table,
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
