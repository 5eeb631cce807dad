//! What disks and networks are made of: grants, so far.

use super::bars::Bar;
use super::columns::Lab;
use super::plot::{self, Group};
use super::profile;
use super::report::{Report, number, short};
use anyhow::{Context, Result};
use marker::{COPY_ODD, COPY_PAGE, COPY_SMALL, PIN};
use xtask::bundle::Guest;

/// Elements of a window.
const BATCH: u32 = 32;
/// What the test guest says when it has measured all.
const SAID: &str = "costs: all measured";

/// What is done, in which window, and what it may take of ring 0.
const DEEDS: [(&str, u16, Option<f64>); 4] = [
    ("pin and unpin a page, of 32 in a batch", PIN, Some(850.0)),
    ("copy 4,000 bytes at an odd offset", COPY_ODD, Some(1600.0)),
    ("copy a page", COPY_PAGE, None),
    ("copy 8 bytes", COPY_SMALL, None),
];

/// Has a test guest pin its own pages, and copy from them.
pub(super) fn measure(lab: &Lab) -> Result<Report> {
    let costs = Guest {
        name: "costs".into(),
        memory: 32,
        vcpus: 1,
        kernel: lab.image("costs")?,
        ramdisk: None,
        extra: String::new(),
    };
    let record = lab.guests("tenon-io", &[costs], SAID, &[])?.record;
    let mut table = vec![["each", "ring 0", "guest"].map(str::to_owned).to_vec()];
    let (mut bars, mut plot, mut numbers, mut profiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (name, window, limit) in DEEDS {
        // The first time is for what is remembered.
        let counts = record.windows(window).nth(1).with_context(|| format!("nothing says what it takes to {name}"))?;
        let each = |owner: &str| exact(counts.insns(owner)) / f64::from(BATCH);
        table.push(vec![name.to_owned(), short(each("ring0")), short(each("costs"))]);
        bars.extend(limit.map(|limit| Bar::new(name, each("ring0"), limit)));
        plot.push(Group { label: name.to_owned(), bars: vec![plot::Bar::hosts("Tenon", counts)] });
        numbers.push(number(name, counts, BATCH));
        if lab.profile {
            profiles.push((name.to_owned(), profile::lines(lab, counts, BATCH)?));
        }
    }
    Ok(Report {
        name: "io".into(),
        about: format!(
            "Instructions of ring 0 for grants, in batches of {BATCH}: a test guest pins its own pages for a device, and copies \
             from them."
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
