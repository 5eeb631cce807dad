//! The words of one frame under several CPUs at once: a frame is never two things, and no count is lost.

use hv_core::addr::{CpuId, CpuSet, DomainId, Frame};
use hv_core::frame::table::{Taker, WORDS};
use hv_core::frame::{FrameTable, Left, Owner, Taken, Use};
use hv_core::lock::Held;
use hv_core::machine::{Cpus, Flush, Frames, Page};
use hv_core::paging::Space;
use sim::rng::Rng;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

struct Flat(Vec<Page>);

impl Frames for Flat {
    fn frame_limit(&self) -> u64 {
        self.0.len() as u64
    }
    fn page(&self, frame: Frame) -> &Page {
        &self.0[frame.index()]
    }
    fn read(&self, _: Frame, _: usize, _: &mut [u8]) {}
    fn write(&self, _: Frame, _: usize, _: &[u8]) {}
    fn zero(&self, _: Frame) {}
    fn copy(&self, _: (Frame, usize), _: (Frame, usize), _: usize) {}
    fn set_m2p(&self, _: Frame, _: u64) {}
    fn direct(&self, _: Frame) -> u64 {
        0
    }
    fn hole_entry(&self, _: usize) -> u64 {
        0
    }
}

impl Cpus for Flat {
    fn this_cpu(&self) -> CpuId {
        CpuId(0)
    }
    fn flush(&self, _: CpuSet, _: Flush) {}
    fn flushes(&self) -> u64 {
        0
    }
    fn forget(&self) {}
    fn kick(&self, _: CpuId) {}
}

/// A machine of so many frames, all free, with one CPU that runs guests.
fn machine(frames: u32) -> (Flat, Box<FrameTable>) {
    let table = Box::new(FrameTable::new());
    let words: Vec<AtomicU64> = (0..frames as usize * WORDS).map(|_| AtomicU64::new(0)).collect();
    table.init(words.leak());
    table.add(Frame::from_u32(0), frames);
    table.epochs().runs_guest(CpuId(0));
    // There may be fewer CPUs than threads here: whoever waits for a ticket lets the others run.
    hv_core::lock::while_waiting(std::thread::yield_now);
    (Flat((0..frames).map(|_| [const { AtomicU64::new(0) }; 512]).collect()), table)
}

#[test]
fn cpus_that_race_for_frames_agree() {
    const FRAMES: u32 = 4;
    const ROUNDS: u32 = 100_000;
    let (m, table) = machine(FRAMES);
    let us = DomainId(1);
    let frames: Vec<Frame> = (0..FRAMES - 1).map(|_| table.populate(&m, us, 0, 0, u64::MAX).unwrap()).collect();
    let writers: Vec<AtomicU32> = (0..FRAMES).map(|_| AtomicU32::new(0)).collect();
    let tables: Vec<AtomicU32> = (0..FRAMES).map(|_| AtomicU32::new(0)).collect();
    let taken = AtomicU32::new(0);
    let seed = 11;
    std::thread::scope(|scope| {
        for cpu in 0..3 {
            let (m, table, frames, writers, tables, taken) = (&m, &table, &frames, &writers, &tables, &taken);
            scope.spawn(move || {
                let mut rng = Rng::new(seed + cpu);
                let complaints = sim::complaints(); // on this thread
                let taker = Taker { from: us, by: us, cpus: CpuSet(1) };
                for _ in 0..ROUNDS {
                    let frame = rng.pick(frames).unwrap();
                    let (w, t) = (&writers[frame.index()], &tables[frame.index()]);
                    match rng.below(64) {
                        0..=31 => {
                            if table.take_use(m, frame, Use::Writable, taker).is_ok() {
                                w.fetch_add(1, SeqCst);
                                assert_eq!(t.load(SeqCst), 0, "seed {seed}: writable while a table");
                                w.fetch_sub(1, SeqCst);
                                taken.fetch_add(1, SeqCst);
                                assert_ne!(table.drop_use(frame, us), Left::TakeDown(1));
                            }
                        }
                        32..=62 => match table.take_use(m, frame, Use::L1, taker) {
                            Ok(state) => {
                                t.fetch_add(1, SeqCst);
                                assert_eq!(w.load(SeqCst), 0, "seed {seed}: a table while writable");
                                if state == Taken::Started {
                                    table.promoted(frame);
                                }
                                t.fetch_sub(1, SeqCst);
                                taken.fetch_add(1, SeqCst);
                                if let Left::TakeDown(1) = table.drop_use(frame, us) {
                                    table.demoted(frame, us);
                                }
                            }
                            Err(_) => std::hint::spin_loop(),
                        },
                        _ => {
                            if let Ok(other) = table.populate(m, us, 0, 0, u64::MAX) {
                                assert!(!frames.contains(&other), "seed {seed}: handed out twice");
                                table.give_back(m, other, us).unwrap();
                            }
                        }
                    }
                }
                assert_eq!(sim::complaints(), complaints, "seed {seed}");
            });
        }
    });
    assert!(taken.load(SeqCst) > ROUNDS / 2);
    for f in frames {
        let info = table.info(f).unwrap();
        assert_eq!((info.kind.count, info.owner.refs), (0, 1));
    }
    assert_eq!((table.free_frames(), table.owned(us)), (1, FRAMES - 1));
}

#[test]
fn frames_of_the_dead_go_when_the_last_of_the_others_lets_go() {
    const FRAMES: u32 = 64;
    const DEATHS: u32 = 400;
    let (m, table) = machine(FRAMES);
    let (us, them) = (DomainId(1), DomainId(2));
    let frames: Vec<Frame> = (0..FRAMES).map(Frame::from_u32).collect();
    let over = AtomicU32::new(0);
    let taken = AtomicU32::new(0);
    let seed = 5;
    std::thread::scope(|scope| {
        let holders = [0, 1].map(|cpu| {
            let (m, table, frames, over, taken) = (&m, &table, &frames, &over, &taken);
            scope.spawn(move || {
                let mut rng = Rng::new(seed + cpu);
                let complaints = sim::complaints(); // on this thread
                while over.load(SeqCst) == 0 {
                    let (frame, write) = (rng.pick(frames).unwrap(), rng.one_in(2));
                    if table.hold(m, frame, us, them, write).is_ok() {
                        taken.fetch_add(1, SeqCst);
                        if rng.one_in(4) {
                            std::thread::yield_now();
                        }
                        let owner = table.info(frame).unwrap().owner;
                        assert!(owner.refs > 0 && owner.owner != Owner::Free, "seed {seed}: {frame:?} is {owner:?}");
                        table.let_go(frame, them, write);
                    }
                }
                assert_eq!(sim::complaints(), complaints, "seed {seed}");
            })
        });
        for _ in 0..DEATHS {
            while table.populate(&m, us, 0, 0, u64::MAX).is_ok() {}
            let before = taken.load(SeqCst);
            while taken.load(SeqCst) == before && !holders.iter().all(|holder| holder.is_finished()) {
                std::thread::yield_now();
            }
            let space = Space::of(us);
            while space.open(&m, &table, 16, &mut Held::entering_ring_0()).tear_down().is_err() {}
        }
        over.store(1, SeqCst);
    });
    assert_eq!((table.free_frames(), table.owned(us)), (FRAMES, 0), "seed {seed}: every frame came back");
}

#[test]
fn cpus_that_populate_at_once_do_not_pass_the_limit_together() {
    const FRAMES: u32 = 64;
    const LIMIT: u64 = 5;
    let (m, table) = machine(FRAMES);
    let us = DomainId(1);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for round in 0..20_000 {
                    let order = round % 3;
                    let Ok(first) = table.populate(&m, us, order, 0, LIMIT) else { continue };
                    assert!(u64::from(table.owned(us)) <= LIMIT);
                    for frame in first.as_u32()..first.as_u32() + (1 << order) {
                        table.give_back(&m, Frame::from_u32(frame), us).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!((table.owned(us), table.free_frames()), (0, FRAMES));
    assert!(table.populate(&m, us, 6, 0, 64).is_ok(), "all blocks are one again");
}
