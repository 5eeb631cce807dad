//! Reads from disks, past the kernel's cache.

use crate::linux::{self, Asynchronous, Map, Transfer};
use crate::window;
use microbench::{DEPTH, DISK_BYTES, DRIVER, READS, REPETITIONS, Reading};

/// Major number of the first 16 disks (ABI io 3.8), each of which has 16 minor ones.
const MAJOR: usize = 202;
/// Bytes that are written at once before anything is measured.
const FILL: usize = 128 << 10;

/// Where the next read is.
struct Places {
    next: u64,
    random: bool,
    bytes: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        // Numbers that look random, the same in each run.
        self.next =
            if self.random { self.next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) } else { self.next + 1 };
        (self.next >> if self.random { 33 } else { 0 }) % (DISK_BYTES / self.bytes) * self.bytes
    }
}

/// Measures everything.
pub(crate) fn run() {
    linux::load_module(DRIVER);
    let disks = [linux::make_disk(c"/xvda", MAJOR, 0), linux::make_disk(c"/xvdb", MAJOR, 16)];
    let memory = Map::new(DEPTH as usize * FILL);
    memory.touch();
    // A disk in memory has only the pages that were written.
    for disk in disks {
        for at in (0..DISK_BYTES).step_by(FILL) {
            linux::transfer(&Transfer::write(disk, &memory, 0, FILL, at));
        }
    }
    linux::sleep(2, 0);
    read::<{ marker::READS }>(disks, &memory);
    read::<{ marker::READS + 1 }>(disks, &memory);
    read::<{ marker::READS + 2 }>(disks, &memory);
    read::<{ marker::READS + 3 }>(disks, &memory);
    const { assert!(READS.len() == 4, "each is measured above") }
}

/// One run outside of all windows, then those inside.
fn read<const WINDOW: u16>(disks: [usize; 2], memory: &Map) {
    let reading = const { &READS[(WINDOW - marker::READS) as usize] };
    let mut places = Places { next: 1, random: reading.random, bytes: reading.bytes.into() };
    let queue = Asynchronous::new(DEPTH);
    let disk = disks[reading.disk as usize];
    let mut work = || once(reading, disk, memory, &mut places, &queue);
    work();
    for _ in 0..REPETITIONS {
        window::window::<WINDOW>(&mut work);
    }
}

fn once(reading: &Reading, disk: usize, memory: &Map, places: &mut Places, queue: &Asynchronous) {
    let bytes = reading.bytes as usize;
    let mut one = |slot: usize| Transfer::read(disk, memory, slot * bytes, bytes, places.next());
    if reading.depth == 1 {
        (0..reading.operations).for_each(|_| linux::transfer(&one(0)));
        return;
    }
    for _ in 0..reading.operations / DEPTH {
        let transfers: [Transfer; DEPTH as usize] = core::array::from_fn(&mut one);
        queue.run(&transfers);
    }
}
