//! Making and ending guests.

use super::bars::Bar;
use super::columns::{Form, Lab};
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use marker::{CREATE, DESTROY};
use microbench::{REACHED, mode};
use xtask::bundle::Guest;

/// Memory of the Linux and of the test guest in MiB.
const LINUX: u32 = 128;
const TEST_GUEST: u32 = 32;

/// What is done, what it may take, and what it takes with Xen and a Linux as dom0.
const DEEDS: [(&str, f64, f64); 3] =
    [("create test guest", 8e6, 54e6), ("create Linux", 80e6, 290e6), ("destroy Linux", 6e6, 59e6)];

/// Makes a Linux from its ELF file and a test guest, and destroys the Linux.
pub(super) fn measure(lab: &Lab) -> Result<Report> {
    let linux = lab.linux(Form::Elf, mode::WAIT, LINUX);
    let hello = Guest {
        name: "test".into(),
        memory: TEST_GUEST,
        vcpus: 1,
        kernel: lab.image("hello")?,
        ramdisk: None,
        extra: String::new(),
        vif: Vec::new(),
    };
    // Ctrl-] leads from the guest's console to the prompt. The test guest has ended by then, so this ends the machine.
    let typed = [(REACHED, "\x1d"), ("dom0> ", "destroy linux\r")];
    // The test guest first, so that the Linux does not run while it is made.
    let record = lab.guests("tenon-create", &[hello, linux], REACHED, &typed)?.record;
    let mut created = record.windows(CREATE);
    let mut next = || created.next().context("dom0 made no two guests");
    let windows = [next()?, next()?, record.windows(DESTROY).next().context("dom0 destroyed nothing")?];

    let head = ["to", "dom0", "ring 0", "both", "Xen (mark)"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    let (mut bars, mut plot, mut numbers, mut profiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for ((name, limit, xen), counts) in DEEDS.into_iter().zip(windows) {
        let mut row = vec![name.to_owned()];
        row.extend(["dom0", "ring0"].iter().map(|owner| short(exact(counts.insns(owner)))));
        row.extend([exact(counts.hosts()), xen].map(short));
        table.push(row);
        bars.push(Bar::new(name, exact(counts.hosts()), limit));
        let shown = vec![plot::Bar::mark("Xen (mark)", xen), plot::Bar::hosts("Tenon", counts)];
        plot.push(Group { label: name.to_owned(), bars: shown });
        numbers.push(number(name, counts, 1));
        if lab.profile {
            profiles.push((name.to_owned(), profile::lines(lab, counts, 1)?));
        }
    }
    Ok(Report {
        name: "create".into(),
        about: format!(
            "Instructions of dom0 and ring 0 to make a Linux of {LINUX} MiB from its ELF file and a test guest of \
             {TEST_GUEST} MiB, and to destroy the Linux; what guests do in that time \
             is left out. The marks are those of `xl create` and `xl destroy` in a Linux dom0 \
             on Debian's Xen, in the same emulator."
        ),
        versions: lab.versions.clone(),
        date: lab.date.clone(),
        notes: Vec::new(),
        tables: vec![table.into()],
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
