//! Recounts everything from the page tables, the roots, the pins and the other books, and compares.
//!
//! What counts as a page table is found by following entries down from roots, pins and unfinished work; the words of the
//! frame table are believed in nothing.

use super::world::{DEVICES, Dom, LIMIT, World, frame};
use crate::tally::{Found, Memory, Tally, Words, books};
use hv_core::addr::{Frame, HOLE_SLOTS};
use hv_core::frame::table::GROUP;
use hv_core::frame::{Info, Owner, Use};
use hv_core::lock::Held;
use hv_core::paging::Sweep;

/// Subsystem to recount in.
#[derive(Default)]
pub struct Scratch {
    /// What was counted last.
    pub tally: Tally,
    /// The words of all frames, read once for each audit.
    words: Words,
    audits: u64,
}

impl Scratch {
    /// How many audits there have been.
    #[must_use]
    pub fn audits(&self) -> u64 {
        self.audits
    }
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
    scratch.words.read(&world.table);
    let result = recount(world, &mut scratch.tally).and_then(|()| compare(world, &scratch.words, &scratch.tally));
    if result.is_ok() {
        note_reuse(world, &scratch.tally);
    }
    world.scratch = scratch;
    result
}

/// Memory as one of the domains may use it.
struct Seeing<'a> {
    world: &'a World,
    dom: &'a Dom,
}

impl Memory for Seeing<'_> {
    fn words<R>(&self, frame: Frame, look: impl FnOnce(&[(usize, u64)]) -> R) -> R {
        look(&self.world.m.words(frame))
    }

    fn owner(&self, frame: Frame) -> Option<Owner> {
        self.world.known.get(frame.index()).map(|known| known.owner)
    }

    /// A leaf leads to the domain's own memory, to memory of a domain it may map, or to what such a domain left behind.
    fn mappable(&self, frame: Frame) -> Found {
        let dom = self.dom;
        match self.owner(frame) {
            None if dom.devices => Ok(()),
            Some(Owner::Guest(id) | Owner::Lent(id)) if id == dom.space.id() || dom.may_map.contains(&id) => Ok(()),
            Some(Owner::Orphan) if dom.dying || !dom.may_map.is_empty() => Ok(()),
            owner => Err(format!("P3: {} maps {frame:?} of {owner:?}", dom.space.id())),
        }
    }
}

fn recount(world: &mut World, tally: &mut Tally) -> Found {
    tally.begin(DEVICES);
    let mut unfinished = 0;
    for dom in &world.doms {
        let (id, memory) = (dom.space.id(), Seeing { world, dom });
        let mut held = Held::entering_ring_0();
        let session = dom.space.open(&world.m, &world.table, 1, &mut held);
        let sweep = session.sweep();
        if matches!(sweep, Some(Sweep::Frames(_))) {
            tally.leaves(id);
            continue;
        }
        for (&f, &level) in &dom.pins {
            tally.pinned(f, level)?;
        }
        for &f in dom.roots.iter().flatten().flatten() {
            tally.table(f, 4)?;
        }
        for &f in dom.holds.iter().chain(&dom.lent) {
            tally.held(f, memory.owner(f), id, true)?;
        }
        for &f in &dom.descriptors {
            tally.descriptors(f, &world.m.words(f))?;
        }
        unfinished += u64::from(tally.unfinished(&session)? > 0);
        tally.follow(&memory, id, sweep)?;
    }
    world.totals.two_unfinished += u64::from(unfinished > 1);
    Ok(())
}

fn compare(world: &mut World, words: &Words, tally: &Tally) -> Found {
    if crate::complaints() != world.complaints {
        return Err("the rules complained about themselves".into());
    }
    let mut free = 0;
    for n in 0..DEVICES {
        let f = frame(n);
        let info = words.get(f).expect("RAM");
        let owner = info.owner;
        let mut known = world.known[n];
        // While a domain is taken down its frames leave it one by one.
        let leaving =
            matches!(known.owner, Owner::Guest(id) if world.doms.iter().any(|d| d.dying && d.space.id() == id));
        if leaving && owner.owner == Owner::Orphan {
            known.owner = Owner::Orphan;
        }
        if leaving && owner.owner != known.owner || known.owner == Owner::Orphan {
            (known.allocated, known.pfn) = (false, u64::MAX);
        }
        if !known.allocated && tally[f].held() == 0 && !tally.is_uncounted(owner.owner) {
            known.owner = Owner::Free;
        }
        world.known[n] = known;
        free += u32::from(known.owner == Owner::Free);
        if owner.owner != known.owner || owner.allocated != known.allocated {
            return Err(format!("I1: {f:?} should be {known:?}: {owner:?}, {:?}", tally[f]));
        }
        if world.m2p(f) != known.pfn {
            return Err(format!("P10: the machine-to-physical entry of {f:?} is {:#x}: {known:?}", world.m2p(f)));
        }
        tally.agrees(f, info, known.allocated)?;
        sparse(world, f, info)?;
    }
    if world.table.free_frames() != free {
        return Err(format!("P11: {} frames in the pool, {free} are free", world.table.free_frames()));
    }
    let ids: Vec<_> = world.doms.iter().map(|dom| dom.space.id()).collect();
    books(&world.table, words, free, &ids)?;
    if let Some(id) = ids.iter().find(|id| u64::from(world.table.owned(**id)) > LIMIT) {
        return Err(format!("P13: {id} owns {} frames", world.table.owned(*id)));
    }
    caches(world, tally)
}

/// What is not noted of a table holds nothing: it would not be taken down.
fn sparse(world: &World, f: Frame, info: Info) -> Found {
    let Some(level) = info.kind.live_table() else { return Ok(()) };
    let filled = world.table.filled(f);
    let missed = |&&(at, word): &&(usize, u64)| {
        word & 1 != 0 && filled >> (at / GROUP) & 1 == 0 && !(level == 4 && HOLE_SLOTS.contains(&at))
    };
    match world.m.words(f).iter().find(missed) {
        Some((at, word)) => Err(format!("P2: {f:?} holds {word:#x} at {at}, and {filled:#x} does not say so")),
        None => Ok(()),
    }
}

/// What CPUs may remember is true still, or harmless.
fn caches(world: &World, tally: &Tally) -> Found {
    for c in world.m.cached.borrow().iter() {
        let known = &world.known[c.frame.index()];
        let owned = !matches!(known.owner, Owner::Free | Owner::Orphan);
        if owned && known.turn != c.turn {
            return Err(format!("P4: {c:?}, but it has a new owner {known:?}"));
        }
        if tally[c.frame].is_harmed_by(c.seen) {
            return Err(format!("P4: {c:?}, but it is {:?} now", tally[c.frame].used_as));
        }
    }
    Ok(())
}

/// Follows frames on the way table, writable, table.
fn note_reuse(world: &mut World, tally: &Tally) {
    let used = (0..DEVICES).map(|n| (n, &tally[frame(n)])).filter(|(_, e)| e.uses > 0 && e.partial.is_none());
    for (n, e) in used {
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
