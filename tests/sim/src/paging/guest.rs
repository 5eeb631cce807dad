//! What random guests do. They know enough to succeed often: which of their frames are tables, how to prepare a page
//! before it becomes one. They are wrong on purpose the rest of the time.

use super::world::{BATCH, DEVICES, FRAMES, Op, VCPUS, World, frame};
use crate::machine::{Seen, address};
use hv_core::addr::{CpuId, DomainId, Frame, HOLE_SLOTS};
use hv_core::frame::{Owner, Use};
use hv_core::machine::Frames;
use hv_core::paging::Slot;
use hv_core::paging::entry::{ACCESSED, DIRTY, NO_EXECUTE, PRESENT, Target, USER, WRITABLE, target};
use std::sync::atomic::Ordering::SeqCst;

/// The slots guests use most, so that their tables stay sparse.
const SLOTS: [usize; 6] = [0, 1, 2, 272, 273, 511];
/// Entries a call may look at.
const BUDGETS: [u32; 6] = [40, 300, 700, 1500, 4096, 20_000];

/// A domain's frames by what they are now.
struct Mine {
    live: [Vec<Frame>; 5],
    idle: Vec<Frame>,
    all: Vec<Frame>,
}

fn mine(w: &World, at: usize) -> Mine {
    let id = w.doms[at].space.id();
    let mut mine = Mine { live: Default::default(), idle: Vec::new(), all: Vec::new() };
    for n in 0..DEVICES {
        let info = w.table.info(frame(n)).expect("RAM");
        if info.owner.owner != Owner::Guest(id) || !info.owner.allocated {
            continue;
        }
        mine.all.push(frame(n));
        match info.kind.live_table() {
            Some(level) => mine.live[usize::from(level)].push(frame(n)),
            None if info.kind.count == 0 => mine.idle.push(frame(n)),
            None => {}
        }
    }
    mine
}

/// One step of the simulated world.
///
/// # Errors
/// A call that did something else than it said.
pub fn act(w: &mut World) -> Result<(), String> {
    match w.rng.below(100) {
        0..=5 => {
            wander(w);
            Ok(())
        }
        6..=7 => {
            schedule(w);
            Ok(())
        }
        8..=9 => {
            stale_store(w);
            Ok(())
        }
        _ => {
            if w.doms.len() < 3 && w.table.free_frames() > 11 && w.rng.one_in(20) {
                return w.create();
            }
            if w.doms.is_empty() {
                return Ok(());
            }
            let at = w.rng.below(w.doms.len());
            let cpu = w.rng.below(w.running.len());
            w.m.cpu.set(u32::try_from(cpu).expect("small"));
            let op = match w.doms[at].pending {
                _ if w.doms[at].dying => Op::TearDown,
                _ if w.rng.one_in(600) => Op::TearDown,
                Some(_) if w.rng.one_in(150) => Op::TearDown,
                Some(op) if !w.rng.one_in(8) => op,
                _ => match invent(w, at) {
                    Some(op) => op,
                    None => return Ok(()),
                },
            };
            let budget = w.rng.pick(&BUDGETS).expect("not empty");
            w.call(at, op, budget).map(|_| ())
        }
    }
}

/// A running guest uses its memory: its CPU fills its caches.
fn wander(w: &mut World) {
    let cpu = w.rng.below(w.running.len());
    let Some((at, vcpu, user)) = w.running[cpu] else { return };
    let Some(root) = w.doms[at].roots[vcpu][usize::from(user)] else {
        return;
    };
    let turn = |f: Frame| w.known[f.index()].turn;
    let mut rng = w.rng.clone();
    w.m.wander(CpuId(u32::try_from(cpu).expect("small")), root, turn, &mut rng);
    w.rng = rng;
}

fn schedule(w: &mut World) {
    let cpu = w.rng.below(w.running.len());
    if w.doms.is_empty() || w.rng.one_in(8) {
        return w.idle(cpu);
    }
    let (at, vcpu, user) = (w.rng.below(w.doms.len()), w.rng.below(VCPUS), w.rng.one_in(3));
    let taken = w.running.iter().flatten().any(|r| (r.0, r.1) == (at, vcpu));
    if !taken && !w.doms[at].dying && w.doms[at].roots[vcpu][usize::from(user)].is_some() {
        w.schedule(cpu, Some((at, vcpu, user)));
    }
}

/// A guest writes through a translation its CPU remembers, which may be one it should not have any more.
fn stale_store(w: &mut World) {
    let writable: Vec<Frame> =
        w.m.cached
            .borrow()
            .iter()
            .filter(|c| c.seen == Seen::Page { writable: true })
            .map(|c| c.frame)
            .filter(|f| w.table.info(*f).is_some_and(|i| i.kind.used_as == Use::Writable || i.kind.count == 0))
            .collect();
    if let Some(to) = w.rng.pick(&writable) {
        let slot = slot(w);
        let value = leaf(w, 0, &[to], &[]);
        w.m.page(to)[slot].store(value, SeqCst);
    }
}

fn slot(w: &mut World) -> usize {
    match w.rng.below(40) {
        0 => HOLE_SLOTS.start + w.rng.below(HOLE_SLOTS.len()),
        1 => w.rng.below(512),
        _ => w.rng.pick(&SLOTS).expect("not empty"),
    }
}

/// A leaf: writable to frames of `data`, read-only to those of `tables`, sometimes the wrong way round or wrong.
fn leaf(w: &mut World, at: usize, data: &[Frame], tables: &[Frame]) -> u64 {
    let to_table = w.rng.below(3) == 0;
    let (mut to, mut flags) = match if to_table { w.rng.pick(tables) } else { w.rng.pick(data) } {
        Some(f) => (f, if to_table { PRESENT } else { PRESENT | WRITABLE }),
        None => (frame(w.rng.below(FRAMES)), PRESENT),
    };
    match w.rng.below(24) {
        0 => to = frame(w.rng.below(FRAMES + 2)),
        1 => flags ^= WRITABLE,
        2 if w.doms.get(at).is_some_and(|d| d.devices) => {
            to = frame(DEVICES + w.rng.below(FRAMES - DEVICES));
            flags |= 1 << 4;
        }
        3 => flags ^= 1 << w.rng.below(64),
        4..=7 => flags &= !WRITABLE,
        _ => {}
    }
    flags | to.address() | if w.rng.one_in(2) { USER } else { 0 } | if w.rng.one_in(4) { NO_EXECUTE } else { 0 }
}

fn clean(w: &World, f: Frame) {
    let used: Vec<usize> = w.m.words(f).iter().map(|&(n, _)| n).collect();
    for n in used {
        w.m.page(f)[n].store(0, SeqCst);
    }
}

/// Writes a page of the guest's ordinary memory so that it can become a table.
fn prepare(w: &mut World, at: usize, f: Frame, level: u8, mine: &Mine) {
    clean(w, f);
    for _ in 0..w.rng.below(4) {
        let slot = slot(w);
        let value = entry(w, at, f, level, mine);
        w.m.page(f)[slot].store(value, SeqCst);
    }
}

/// An entry for a table of a level.
fn entry(w: &mut World, at: usize, of: Frame, level: u8, mine: &Mine) -> u64 {
    if level == 1 {
        let data: Vec<Frame> = mine.idle.iter().copied().filter(|f| *f != of).chain(w.doms[at].lent.clone()).collect();
        return leaf(w, at, &data, &mine.live[1]);
    }
    let below = &mine.live[usize::from(level) - 1];
    let to = match w.rng.pick(below) {
        Some(f) if !w.rng.one_in(4) => f,
        _ => match w.rng.pick(&mine.idle) {
            Some(f) if f != of => {
                prepare(w, at, f, level - 1, mine);
                f
            }
            _ => frame(w.rng.below(FRAMES + 2)),
        },
    };
    let flags = PRESENT | WRITABLE | USER | ACCESSED;
    let wrong = if w.rng.one_in(24) { 1 << w.rng.below(64) } else { 0 };
    (flags | to.address()) ^ wrong
}

/// The pages a root shows, up to a few dozen: slots and L1 entry.
fn leaves(w: &World, root: Frame) -> Vec<([usize; 4], u64)> {
    let mut found = Vec::new();
    let mut todo = vec![(root, 4u8, [0; 4])];
    while let Some((table, level, path)) = todo.pop() {
        for &(slot, raw) in w.m.words(table).iter() {
            if raw & PRESENT == 0 || level == 4 && HOLE_SLOTS.contains(&slot) || found.len() > 40 {
                continue;
            }
            let mut path = path;
            path[4 - usize::from(level)] = slot;
            match target(raw, level) {
                Target::Table(to) => todo.push((to, level - 1, path)),
                _ => found.push((path, raw)),
            }
        }
    }
    found
}

fn foreign(w: &mut World, at: usize, mine: &Mine) -> Option<Op> {
    let table = w.rng.pick(&mine.live[1])?;
    if w.rng.one_in(2) {
        // Whatever stands in one of the own tables may be asked to be removed; foreign leaves for choice.
        let id = w.doms[at].space.id();
        let mut present = Vec::new();
        for &table in &mine.live[1] {
            for &(index, raw) in w.m.words(table).iter().filter(|(_, raw)| raw & PRESENT != 0) {
                let Target::Leaf { frame, writable } = target(raw, 1) else {
                    continue;
                };
                let ours = w.known.get(frame.index()).is_none_or(|k| k.owner == Owner::Guest(id));
                present.push((ours, Op::UnmapForeign { slot: Slot { table, index }, frame, writable }));
            }
        }
        let others: Vec<Op> = present.iter().filter(|p| !p.0).map(|p| p.1).collect();
        let any: Vec<Op> = present.iter().map(|p| p.1).collect();
        let op = w.rng.pick(&others).or_else(|| w.rng.pick(&any))?;
        return Some(match op {
            Op::UnmapForeign { slot, frame, writable } if w.rng.one_in(5) => {
                Op::UnmapForeign { slot, frame, writable: !writable }
            }
            op => op,
        });
    }
    let may = w.doms[at].may_map.clone();
    let from = w.rng.pick(&may).unwrap_or(w.doms[at].space.id());
    let theirs: Vec<Frame> = (0..DEVICES)
        .filter(|&n| matches!(w.known[n].owner, Owner::Guest(id) | Owner::Lent(id) if id == from))
        .map(frame)
        .collect();
    let to = w.rng.pick(&theirs).unwrap_or(frame(w.rng.below(FRAMES)));
    let writable = if w.rng.one_in(2) { WRITABLE } else { 0 };
    let raw = PRESENT | USER | ACCESSED | DIRTY | NO_EXECUTE | to.address() | writable;
    Some(Op::MapForeign { slot: Slot { table, index: slot(w) }, raw, from })
}

fn descriptors(w: &mut World, at: usize, mine: &Mine) -> Option<Op> {
    let value = match w.rng.below(6) {
        0 => w.rng.word(),
        1 => 0,
        _ => 0x00af_9b00_0000_ffff,
    };
    let held = w.doms[at].descriptors.clone();
    Some(match w.rng.below(4) {
        0 => {
            let f = w.rng.pick(&mine.idle)?;
            if !w.rng.one_in(4) {
                clean(w, f);
                let at = slot(w);
                w.m.page(f)[at].store(value, SeqCst);
            }
            Op::TakeDescriptors { frame: f }
        }
        1 => Op::DropDescriptors { frame: w.rng.pick(&held)? },
        _ => {
            let f = if w.rng.one_in(3) { w.rng.pick(&mine.all) } else { w.rng.pick(&held) };
            Op::UpdateDescriptor { address: f?.address() + 8 * slot(w) as u64, value }
        }
    })
}

/// Several requests, most of them for one frame.
fn batch(w: &mut World, at: usize, first: (u64, u64), mine: &Mine) -> Op {
    let mut requests = [first; BATCH];
    for n in 1..BATCH {
        let f = w.rng.pick(&mine.live[1]).or(w.rng.pick(&mine.idle));
        let table = f.filter(|_| w.rng.one_in(4)).map_or(requests[n - 1].0 & !0xfff, Frame::address);
        let target = w.rng.pick(&mine.all).unwrap_or(frame(1));
        let command = if w.rng.one_in(3) { 2 } else { 0 };
        requests[n] = (table + 8 * slot(w) as u64 + command, entry(w, at, target, 1, mine));
    }
    Op::Batch { requests, done: 0 }
}

fn anywhere(w: &mut World, at: usize) -> Option<(usize, [usize; 4], u64)> {
    let vcpu = w.rng.below(VCPUS);
    let root = w.doms[at].roots[vcpu][0].or(w.doms[at].roots[1 - vcpu][0])?;
    let vcpu = if w.doms[at].roots[vcpu][0].is_some() { vcpu } else { 1 - vcpu };
    let found = leaves(w, root);
    w.rng.pick(&found).map(|(path, raw)| (vcpu, path, raw))
}

/// Invents a call for a domain.
fn invent(w: &mut World, at: usize) -> Option<Op> {
    let mine = mine(w, at);
    let some_frame = frame(w.rng.below(FRAMES + 2));
    match w.rng.below(100) {
        0..=11 => pin(w, at, some_frame, &mine),
        12..=20 => Some(unpin(w, at, some_frame, &mine)),
        21..=28 => update(w, at, 1, &mine),
        29..=35 => update(w, at, 2, &mine),
        36..=42 => update(w, at, 3, &mine),
        43..=48 => update(w, at, 4, &mine),
        49..=51 => Some(update_no_table(w, at, some_frame, &mine)),
        52..=60 => root(w, at, &mine),
        61..=69 => table_write(w, at, &mine),
        70..=77 => va_mapping(w, at, some_frame, &mine),
        78..=82 => descriptors(w, at, &mine),
        83..=89 => foreign(w, at, &mine),
        90..=94 => memory(w, at, some_frame, &mine),
        _ => page(w, at, some_frame, &mine),
    }
}

/// Pins a page that was prepared for it, a table, or any frame.
fn pin(w: &mut World, at: usize, some_frame: Frame, mine: &Mine) -> Option<Op> {
    let level = [1, 1, 1, 2, 2, 3, 4, 4][w.rng.below(8)];
    let frame = match w.rng.below(6) {
        0 => w.rng.pick(&mine.all).unwrap_or(some_frame),
        1 => w.rng.pick(&mine.live[usize::from(level)])?,
        _ => {
            let f = w.rng.pick(&mine.idle)?;
            prepare(w, at, f, level, mine);
            f
        }
    };
    Some(Op::Pin { frame, level })
}

fn unpin(w: &mut World, at: usize, some_frame: Frame, mine: &Mine) -> Op {
    let pinned: Vec<Frame> = w.doms[at].pins.keys().copied().collect();
    match w.rng.pick(&pinned) {
        Some(frame) if !w.rng.one_in(10) => Op::Unpin { frame },
        _ => Op::Unpin { frame: w.rng.pick(&mine.all).unwrap_or(some_frame) },
    }
}

/// Changes an entry of a table of a level.
fn update(w: &mut World, at: usize, level: u8, mine: &Mine) -> Option<Op> {
    let table = w.rng.pick(&mine.live[usize::from(level)])?;
    let value = match w.rng.below(8) {
        0..=2 => 0,
        3 => w.rng.word() & !PRESENT,
        _ => entry(w, at, table, level, mine),
    };
    let command = w.rng.pick(&[0, 0, 2, 3]).expect("not empty");
    let mut index = slot(w);
    if value & PRESENT == 0 && w.rng.one_in(2) {
        let used: Vec<usize> = w.m.words(table).iter().map(|&(n, _)| n).collect();
        index = w.rng.pick(&used).unwrap_or(index);
    }
    let address = table.address() + 8 * index as u64 + command;
    let update = Op::Update { address, value };
    Some(if command == 1 || w.rng.one_in(2) { update } else { batch(w, at, (address, value), mine) })
}

/// Writes an entry into a page that is no table.
fn update_no_table(w: &mut World, at: usize, some_frame: Frame, mine: &Mine) -> Op {
    let f = w.rng.pick(&mine.idle).unwrap_or(some_frame);
    let value = entry(w, at, f, 1, mine);
    let address = f.address() + 8 * slot(w) as u64;
    if w.rng.one_in(2) { Op::Update { address, value } } else { batch(w, at, (address, value), mine) }
}

/// Switches a vcpu to another root.
fn root(w: &mut World, at: usize, mine: &Mine) -> Option<Op> {
    let new = match w.rng.below(8) {
        0 => None,
        1 => w.rng.pick(&mine.all),
        2 | 3 => {
            let f = w.rng.pick(&mine.idle)?;
            prepare(w, at, f, 4, mine);
            Some(f)
        }
        _ => w.rng.pick(&mine.live[4]),
    };
    Some(Op::Root { vcpu: w.rng.below(VCPUS), user: w.rng.one_in(4), new })
}

/// Stores to a table through a read-only mapping.
fn table_write(w: &mut World, at: usize, mine: &Mine) -> Option<Op> {
    // Some writable leaf made read-only to a live L1 first would be Linux's way; here we look for one there is.
    let mut best = anywhere(w, at)?;
    for _ in 0..6 {
        let (_, _, raw) = best;
        let to = target(raw, 1);
        if matches!(to, Target::Leaf { frame, writable: false } if mine.live[1].contains(&frame)) {
            break;
        }
        best = anywhere(w, at)?;
    }
    let (vcpu, path, _) = best;
    let of = w.rng.pick(&mine.live[1])?;
    let new = if w.rng.one_in(3) { w.rng.word() & !PRESENT } else { entry(w, at, of, 1, mine) };
    Some(Op::TableWrite { vcpu, at: address(path).plus(8 * slot(w) as u64), new, exchange: w.rng.one_in(2) })
}

/// Maps or unmaps a page by its virtual address.
fn va_mapping(w: &mut World, at: usize, some_frame: Frame, mine: &Mine) -> Option<Op> {
    let (vcpu, mut path, raw) = anywhere(w, at)?;
    path[3] = slot(w);
    let of = target(raw, 1);
    let table = if let Target::Leaf { frame, .. } = of { frame } else { some_frame };
    let value = if w.rng.one_in(3) { 0 } else { entry(w, at, table, 1, mine) };
    Some(Op::Va { vcpu, at: address(path), value })
}

/// Takes memory from the machine, or gives it back.
fn memory(w: &mut World, at: usize, some_frame: Frame, mine: &Mine) -> Option<Op> {
    let owned = w.table.owned(w.doms[at].space.id());
    Some(if owned < 9 || owned < 13 && w.rng.one_in(2) {
        Op::Populate { pfn: w.rng.word() >> 40 }
    } else if w.rng.one_in(4) {
        Op::Release { frame: w.rng.pick(&mine.all).unwrap_or(some_frame) }
    } else {
        Op::Release { frame: w.rng.pick(&mine.idle)? }
    })
}

/// Has something done with a page as a whole, or with its place in the machine-to-physical table.
fn page(w: &mut World, at: usize, some_frame: Frame, mine: &Mine) -> Option<Op> {
    let id: DomainId = w.doms[at].space.id();
    let f = if w.rng.one_in(3) { w.rng.pick(&mine.all) } else { w.rng.pick(&mine.idle) }.unwrap_or(some_frame);
    let may = w.doms[at].may_map.clone();
    let from = if w.rng.one_in(3) { w.rng.pick(&may).unwrap_or(id) } else { id };
    let held = w.doms[at].holds.clone();
    Some(match w.rng.below(6) {
        0 if held.len() < 3 => Op::Hold { frame: f, from },
        0 | 1 => Op::LetGo { frame: w.rng.pick(&held)? },
        2 => Op::Clear { frame: f, from },
        3 => Op::Copy { source: w.rng.pick(&mine.all)?, target: f },
        _ => Op::Update { address: f.address() | 1, value: w.rng.word() >> 40 },
    })
}
