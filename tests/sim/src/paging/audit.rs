//! Recounts everything from the page tables, the roots, the pins and the other books, and compares.
//!
//! What counts as a page table is found by following entries down from roots, pins and unfinished work; the words of the
//! frame table are believed in nothing.

use super::world::{DEVICES, World, frame};
use crate::machine::{HOLE_MARK, Seen};
use hv_core::addr::{DomainId, Frame, HOLE_SLOTS};
use hv_core::frame::{Owner, Use};
use hv_core::lock::Held;
use hv_core::paging::entry::{CACHE, GLOBAL, Target, USER, target};
use hv_core::paging::{Holding, Sweep};

/// What a frame should look like.
#[derive(Clone, Debug)]
pub struct Expect {
    /// Uses, all of one kind.
    pub used_as: Use,
    /// How many.
    pub uses: u32,
    /// References besides those of uses and of ownership.
    pub plain: u32,
    /// Half way up or down, with so many entries counted.
    pub partial: Option<usize>,
    /// Pinned.
    pub pinned: bool,
    /// How many of all those are of domains that do not own it.
    pub others: u16,
    scanned: bool,
}

const NOTHING: Expect =
    Expect { used_as: Use::None, uses: 0, plain: 0, partial: None, pinned: false, others: 0, scanned: false };

/// Room to recount in.
#[derive(Default)]
pub struct Scratch {
    /// By frame.
    pub expect: Vec<Expect>,
    todo: Vec<(Frame, u8, usize)>,
    /// Domains whose frames leave them without being counted down.
    leaving: Vec<DomainId>,
    audits: u64,
}

fn use_of(expect: &mut [Expect], f: Frame, want: Use) -> Result<(), String> {
    let Some(e) = expect.get_mut(f.index()) else {
        return Err(format!("P3: {f:?} is no RAM, but used as {want:?}"));
    };
    if e.uses > 0 && e.used_as != want {
        return Err(format!("P1: {f:?} is used as {:?} and as {want:?}", e.used_as));
    }
    (e.used_as, e.uses) = (want, e.uses + 1);
    Ok(())
}

/// Recounts and compares.
///
/// # Errors
/// The first promise found broken, by its number.
pub fn audit(world: &mut World) -> Result<(), String> {
    let mut scratch = std::mem::take(&mut world.scratch);
    scratch.audits += 1;
    if scratch.audits.is_multiple_of(512) {
        world.m.touch_all();
    }
    let result = recount(world, &mut scratch).and_then(|()| compare(world, &scratch));
    if result.is_ok() {
        note_reuse(world, &scratch.expect);
    }
    world.scratch = scratch;
    result
}

/// Whether a domain is another than the one whose memory a frame is.
fn is_other(world: &World, f: Frame, by: DomainId) -> bool {
    let known = world.known.get(f.index()).map(|known| known.owner);
    matches!(known, Some(Owner::Guest(id) | Owner::Lent(id)) if id != by)
}

fn recount(world: &mut World, scratch: &mut Scratch) -> Result<(), String> {
    scratch.leaving.clear();
    scratch.expect.clear();
    scratch.expect.resize(DEVICES, NOTHING);
    let expect = &mut scratch.expect;
    let mut unfinished = 0;
    for at in 0..world.doms.len() {
        let dom = &world.doms[at];
        let id = dom.space.id();
        let sweep = dom.space.open(&world.m, &world.table, 1, &mut Held::entering_ring_0()).sweep();
        if matches!(sweep, Some(Sweep::Frames(_))) {
            scratch.leaving.push(id); // its tables hold nothing any more
            continue;
        }
        scratch.todo.clear();
        for (&f, &level) in &dom.pins {
            use_of(expect, f, Use::table(level).expect("a level"))?;
            expect[f.index()].pinned = true;
            scratch.todo.push((f, level, 512));
        }
        for &f in dom.roots.iter().flatten().flatten() {
            use_of(expect, f, Use::L4)?;
            scratch.todo.push((f, 4, 512));
        }
        for &f in &dom.holds {
            use_of(expect, f, Use::Writable)?;
            expect[f.index()].others += u16::from(is_other(world, f, id));
        }
        for &f in &dom.lent {
            use_of(expect, f, Use::Writable)?;
        }
        for &f in &dom.descriptors {
            use_of(expect, f, Use::Descriptors)?;
            for &(_, word) in world.m.words(f).iter() {
                let system = word >> 47 & 1 == 1 && word >> 44 & 1 == 0 && word >> 40 & 0xf != 0;
                let other_ring = word >> 47 & 1 == 1 && word >> 44 & 1 == 1 && word >> 45 & 3 != 3;
                if system || other_ring {
                    return Err(format!("P12: {f:?} holds descriptor {word:#x}"));
                }
            }
        }
        {
            let mut held = Held::entering_ring_0();
            let session = dom.space.open(&world.m, &world.table, 1, &mut held);
            let mut on_the_way = 0;
            for holding in session.holdings() {
                let (f, level, counted) = match holding {
                    Holding::OnTheWay { table, level, counted, .. } => (table, level, counted),
                    Holding::Waiting { table, level } => (table, level, 512),
                };
                use_of(expect, f, Use::table(level).expect("a level"))?;
                if matches!(holding, Holding::OnTheWay { .. }) {
                    on_the_way += 1;
                    if expect[f.index()].partial.replace(counted).is_some() {
                        return Err(format!("P8: {f:?} is on the way twice"));
                    }
                }
                scratch.todo.push((f, level, counted));
            }
            unfinished += u64::from(on_the_way > 0);
        }
        while let Some((f, level, counted)) = scratch.todo.pop() {
            if std::mem::replace(&mut expect[f.index()].scanned, true) {
                continue;
            }
            let counted = expect[f.index()].partial.unwrap_or(counted);
            let partial = expect[f.index()].partial.is_some();
            let swept = matches!(sweep, Some(Sweep::Tables(from)) if level == 1 && f.as_u32() < from);
            owned(world, f, dom.space.id())?;
            let mut hole = 0;
            for &(slot, raw) in world.m.words(f).iter() {
                if level == 4 && HOLE_SLOTS.contains(&slot) {
                    hole += 1;
                    if !partial && raw != HOLE_MARK | (slot - HOLE_SLOTS.start) as u64 {
                        return Err(format!("P3: slot {slot} of root {f:?} holds {raw:#x}"));
                    }
                    continue;
                }
                if slot >= counted || raw & 1 == 0 {
                    continue;
                }
                if raw & USER == 0 || raw & GLOBAL != 0 {
                    return Err(format!("4.2: {f:?} level {level} slot {slot} holds {raw:#x}"));
                }
                match target(raw, level) {
                    Target::Nothing => return Err(format!("P3: {f:?} slot {slot} leads beyond memory: {raw:#x}")),
                    Target::Leaf { frame: to, .. } if to.index() >= DEVICES => {
                        if !dom.devices {
                            return Err(format!("P3: {} maps device {to:?}", dom.space.id()));
                        }
                    }
                    Target::Leaf { frame: to, .. } if swept && world.known[to.index()].owner != Owner::Guest(id) => {}
                    Target::Leaf { frame: to, writable } => {
                        mappable(world, at, to)?;
                        expect[to.index()].others += u16::from(is_other(world, to, id));
                        if raw & CACHE != 0 {
                            return Err(format!("XSA-402: {to:?} mapped with {raw:#x}"));
                        }
                        if writable {
                            use_of(expect, to, Use::Writable)?;
                        } else {
                            expect[to.index()].plain += 1;
                        }
                    }
                    Target::Table(to) => {
                        if raw & 0x180 != 0 {
                            return Err(format!("XSA-148: {f:?} slot {slot} holds {raw:#x}"));
                        }
                        use_of(expect, to, Use::table(level - 1).ok_or("P3: a table below L1")?)?;
                        scratch.todo.push((to, level - 1, 512));
                    }
                }
            }
            if level == 4 && !partial && hole != HOLE_SLOTS.len() {
                return Err(format!("P3: root {f:?} lacks slots of the hypervisor"));
            }
        }
    }
    world.totals.two_unfinished += u64::from(unfinished > 1);
    Ok(())
}

fn owned(world: &World, f: Frame, id: DomainId) -> Result<(), String> {
    let owner = world.known[f.index()].owner;
    if owner == Owner::Guest(id) { Ok(()) } else { Err(format!("P3: {id} uses {f:?} of {owner:?} as a table")) }
}

/// A leaf leads to the domain's own memory, to memory of a domain it may map, or to what such a domain left behind.
fn mappable(world: &World, at: usize, f: Frame) -> Result<(), String> {
    let dom = &world.doms[at];
    match world.known[f.index()].owner {
        Owner::Guest(id) | Owner::Lent(id) if id == dom.space.id() || dom.may_map.contains(&id) => Ok(()),
        Owner::Orphan if dom.dying || !dom.may_map.is_empty() => Ok(()),
        owner => Err(format!("P3: {} maps {f:?} of {owner:?}", dom.space.id())),
    }
}

fn compare(world: &mut World, scratch: &Scratch) -> Result<(), String> {
    let expect = &scratch.expect[..];
    if crate::complaints() != world.complaints {
        return Err("the rules complained about themselves".into());
    }
    let mut free = 0;
    for (n, e) in expect.iter().enumerate() {
        let f = frame(n);
        let info = world.table.info(f).expect("RAM");
        let (kind, owner) = (info.kind, info.owner);
        let mut known = world.known[n];
        let held = e.uses + e.plain;
        // While a domain is taken down its frames leave it one by one.
        let leaving =
            matches!(known.owner, Owner::Guest(id) if world.doms.iter().any(|d| d.dying && d.space.id() == id));
        if leaving && owner.owner == Owner::Orphan {
            known.owner = Owner::Orphan;
        }
        if leaving && owner.owner != known.owner || known.owner == Owner::Orphan {
            (known.allocated, known.pfn) = (false, u64::MAX);
        }
        // What a domain being destroyed held of its own frames goes with them.
        let uncounted = matches!(owner.owner, Owner::Guest(id) if scratch.leaving.contains(&id));
        if !known.allocated && held == 0 && !uncounted {
            known.owner = Owner::Free;
        }
        world.known[n] = known;
        free += u32::from(known.owner == Owner::Free);
        if owner.owner != known.owner || owner.allocated != known.allocated {
            return Err(format!("I1: {f:?} should be {known:?}: {owner:?}, {e:?}"));
        }
        if known.owner != Owner::Orphan && owner.others != e.others {
            return Err(format!("P2: others hold {f:?} as {owner:?}, but {e:?}"));
        }
        if world.m2p(f) != known.pfn {
            return Err(format!("P10: the machine-to-physical entry of {f:?} is {:#x}: {known:?}", world.m2p(f)));
        }
        if uncounted {
            continue;
        }
        if owner.refs != held + u32::from(known.allocated) {
            return Err(format!("P2: {f:?} has references {owner:?}, but {e:?}"));
        }
        if known.owner == Owner::Orphan && kind.count >= e.uses {
            continue;
        }
        if kind.count != e.uses || e.uses > 0 && kind.used_as != e.used_as {
            return Err(format!("P2: {f:?} has uses {kind:?}, but {e:?}"));
        }
        if e.uses > 0 && (kind.partial != e.partial.is_some() || kind.validated == kind.partial) {
            return Err(format!("I6: {f:?} is {kind:?}, but {e:?}"));
        }
        if e.partial.is_some() && e.uses != 1 {
            return Err(format!("I6: {f:?} is on its way and used: {e:?}"));
        }
        if kind.pinned != e.pinned {
            return Err(format!("P2: {f:?} is {kind:?}, but {e:?}"));
        }
    }
    if world.table.free_frames() != free {
        return Err(format!("P11: {} frames in the pool, {free} are free", world.table.free_frames()));
    }
    caches(world, expect)
}

/// What CPUs may remember is true still, or harmless.
fn caches(world: &World, expect: &[Expect]) -> Result<(), String> {
    for c in world.m.cached.borrow().iter() {
        let (known, e) = (&world.known[c.frame.index()], &expect[c.frame.index()]);
        let owned = !matches!(known.owner, Owner::Free | Owner::Orphan);
        if owned && known.turn != c.turn {
            return Err(format!("P4: {c:?}, but it has a new owner {known:?}"));
        }
        let used = e.uses > 0;
        let harmful = match c.seen {
            Seen::Page { writable } => writable && used && e.used_as != Use::Writable,
            Seen::Table(level) => used && e.used_as != Use::table(level).expect("a level"),
        };
        if harmful {
            return Err(format!("P4: {c:?}, but it is {:?} now", e.used_as));
        }
    }
    Ok(())
}

/// Follows frames on the way table, writable, table.
fn note_reuse(world: &mut World, expect: &[Expect]) {
    for (n, e) in expect.iter().enumerate().filter(|(_, e)| e.uses > 0 && e.partial.is_none()) {
        let table = e.used_as.level().is_some();
        let next = match (world.reuse[n], table, e.used_as == Use::Writable) {
            (0, true, _) => 1,
            (1, _, true) => 2,
            (2, true, _) => {
                world.totals.reused += 1;
                1
            }
            (same, ..) => same,
        };
        world.reuse[n] = next;
    }
}
