//! What a guest was told is on its disk is there after a power cut.

use crate::media::{start, with_disks};
use crate::stories::{BOOT, SHELL};
use anyhow::{Context, Result, bail, ensure};
use boot::nbd::Server;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Blocks of the disk: those that are flushed, and as many that are not.
const BLOCKS: usize = 2048;
/// What the guest does: it writes numbered blocks, each to be on the disk before it says so, and beside each a block of which
/// it says nothing.
const WRITER: &str = "n=0; while [ $n -lt 2000 ]; do yes $n | head -c 4096 > /tmp/b; \
                      dd if=/tmp/b of=/dev/xvda bs=4096 seek=$((2048 + n)) oflag=direct 2> /dev/null; \
                      dd if=/tmp/b of=/dev/xvda bs=4096 seek=$n conv=fsync 2> /dev/null || break; \
                      echo block $n is there; n=$((n + 1)); done";

/// What one power cut left.
struct Cut {
    seed: u64,
    /// The number of blocks that the guest was told are there, from the first on.
    told: usize,
    /// Those of them that are not.
    missing: Vec<usize>,
}

/// Cuts the power when the guest has been told of so many blocks.
fn cut(title: &str, seed: u64, blocks: usize, faulty: bool) -> Result<Cut> {
    let folder = tempfile::tempdir()?;
    let server = Server::new(vec![0; 2 * BLOCKS * BLOCK])?;
    if faulty {
        server.ignore_flushes();
    }
    let guest = with_disks(folder.path(), "linux", "6.1", &["serial:numbers,,xvda,w"])?;
    let mut machine = start(title, &[&guest], &[("numbers", &server)])?;
    machine.expect(SHELL, BOOT)?;
    machine.type_line(WRITER)?;
    machine.expect(&format!("block {blocks} is there\r\n"), Duration::from_secs(120))?;
    ensure!(server.counts().flushes >= blocks as u64, "{server:?}");
    let left = server.power_cut(seed);
    // What was answered before the cut may still be on its way to the console.
    std::thread::sleep(Duration::from_millis(200));
    let console = machine.console();
    drop(machine);
    let number = |line: &str| line.trim().strip_prefix("block ")?.strip_suffix(" is there")?.parse::<usize>().ok();
    let told = console.lines().filter_map(number).next_back().context("no block")? + 1;
    let there = |block: &usize| {
        let line = format!("{block}\n");
        let content = line.bytes().cycle().take(BLOCK);
        left[block * BLOCK..][..BLOCK].iter().copied().eq(content)
    };
    Ok(Cut { seed, told, missing: (0..told).filter(|block| !there(block)).collect() })
}

fn seed() -> Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() & u128::from(u64::MAX))?)
}

/// Ten power cuts lose no block that the guest was told is there.
pub(crate) fn what_was_flushed_outlives_power_cuts() -> Result<()> {
    cuts("what_was_flushed_outlives_power_cuts", 10)
}

/// As above, with so many power cuts.
pub(crate) fn cuts(title: &str, count: usize) -> Result<()> {
    let mut told = 0;
    for round in 0..count {
        let cut = cut(title, seed()?, 10 + 7 * (round % 10), false)?;
        let Cut { seed, missing, .. } = &cut;
        ensure!(missing.is_empty(), "power cut {round} with seed {seed} lost blocks {missing:?} of {}", cut.told);
        told += cut.told;
    }
    println!("{count} power cuts, {told} blocks of which the guest was told, all there");
    Ok(())
}

/// The same test finds a disk that answers flushes and keeps nothing.
pub(crate) fn a_disk_that_ignores_flushes_is_found() -> Result<()> {
    let cut = cut("a_disk_that_ignores_flushes_is_found", seed()?, 20, true)?;
    if cut.missing.is_empty() {
        bail!("{} blocks, none of them lost with seed {}: the test finds nothing", cut.told, cut.seed);
    }
    Ok(())
}
