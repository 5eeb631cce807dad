//! Domains, the books kept about them, and calls carried out on them.

use super::Totals;
use crate::machine::SimMachine;
use crate::rng::Rng;
use hv_core::addr::{CpuId, CpuSet, DomainId, Frame, GuestVirt};
use hv_core::frame::table::{NO_PFN, WORDS};
use hv_core::frame::{FrameTable, Owner, Refused};
use hv_core::lock::Held;
use hv_core::paging::{Holding, Outcome, Session, Slot, Space, Stop};
use hypercall_abi::mmu::MmuUpdate;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

/// Frames of the machine; the last few are devices.
pub const FRAMES: usize = 44;
/// The first frame that is no RAM.
pub const DEVICES: usize = 42;
/// How many CPUs a machine has, by the seed of its world.
const CPUS: [usize; 3] = [1, 2, 4];
/// Frames a domain may own.
pub const LIMIT: u64 = 18;
/// Frames set aside for a domain, of which one is lent to it at once.
const PROMISED: u32 = 3;
/// Vcpus of a domain.
pub const VCPUS: usize = 2;

/// Requests of a batch.
pub const BATCH: usize = 4;

/// Families of calls, for the table of totals.
pub const FAMILIES: [&str; 14] = [
    "pin",
    "unpin",
    "update L1",
    "update L2",
    "update L3",
    "update L4",
    "update plain",
    "root switch",
    "ptwr",
    "va mapping",
    "descriptors",
    "foreign map",
    "release/populate",
    "page and m2p",
];

/// A call, as a guest would have it in its registers: executed again after an interruption.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names are those of the operations")]
pub enum Op {
    Update { address: u64, value: u64 },
    Batch { requests: [(u64, u64); BATCH], done: usize },
    Va { vcpu: usize, at: GuestVirt, value: u64 },
    Pin { frame: Frame, level: u8 },
    Unpin { frame: Frame },
    Root { vcpu: usize, user: bool, new: Option<Frame> },
    TableWrite { vcpu: usize, at: GuestVirt, new: u64, exchange: bool },
    TakeDescriptors { frame: Frame },
    DropDescriptors { frame: Frame },
    UpdateDescriptor { address: u64, value: u64 },
    MapForeign { slot: Slot, raw: u64, from: DomainId },
    UnmapForeign { slot: Slot, frame: Frame, writable: bool },
    Hold { frame: Frame, from: DomainId },
    LetGo { frame: Frame },
    Populate { pfn: u64 },
    Release { frame: Frame },
    Clear { frame: Frame, from: DomainId },
    Copy { source: Frame, target: Frame },
    TearDown,
}

/// One domain and what it holds, as far as the rest of a hypervisor would know.
pub struct Dom {
    /// Its tables.
    pub space: Space,
    /// Whose frames it may map besides its own.
    pub may_map: Vec<DomainId>,
    /// Whether it may map the device frames.
    pub devices: bool,
    /// Kernel and user root of each vcpu.
    pub roots: [[Option<Frame>; 2]; VCPUS],
    /// Frames it pinned, and as what.
    pub pins: BTreeMap<Frame, u8>,
    /// Uses as writable held for it: vcpu_info and the like.
    pub holds: Vec<Frame>,
    /// Frames in its descriptor tables.
    pub descriptors: Vec<Frame>,
    /// Frames lent to it.
    pub lent: Vec<Frame>,
    /// A call that was interrupted.
    pub pending: Option<Op>,
    /// It is being destroyed.
    pub dying: bool,
}

/// What is known of a frame besides what its words say.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Who got it last.
    pub owner: Owner,
    /// The owner has not given it back.
    pub allocated: bool,
    /// How often it was handed out.
    pub turn: u32,
    /// What the machine-to-physical table should say.
    pub pfn: u64,
}

/// The machine, the domains, the books.
pub struct World {
    /// Memory and CPUs.
    pub m: SimMachine,
    /// The words under test.
    pub table: Box<FrameTable>,
    /// Two to three domains, living or dying.
    pub doms: Vec<Dom>,
    /// Which domain, vcpu and user (or kernel) root a CPU runs.
    pub running: Vec<Option<(usize, usize, bool)>>,
    /// By frame.
    pub known: Vec<Known>,
    /// By frame: how far it has come on the way table, writable, table.
    pub reuse: Vec<u8>,
    /// Where decisions come from.
    pub rng: Rng,
    /// Counts for the table.
    pub totals: Totals,
    /// The last call.
    pub last: Option<(usize, Op, Outcome<()>)>,
    /// Complaints of the rules before this run.
    pub complaints: u64,
    /// The audit's scratch.
    pub scratch: super::audit::Scratch,
    /// Requests of the last batch that were carried out.
    done: usize,
    next_id: u16,
}

/// A frame by number.
#[must_use]
pub fn frame(n: usize) -> Frame {
    Frame::new(n as u64).expect("small")
}

impl World {
    /// A machine with two domains, or three; with fast paths, or with slow ones alone.
    #[must_use]
    pub fn new(seed: u64, fast_paths: bool) -> Self {
        let table = Box::new(FrameTable::new());
        table.set_fast_paths(fast_paths);
        let words: Vec<AtomicU64> = (0..FRAMES * WORDS).map(|_| AtomicU64::new(0)).collect();
        table.init(words.leak());
        table.reserve(frame(0), 1);
        table.add(frame(1), u32::try_from(DEVICES - 1).expect("small"));
        let free = Known { owner: Owner::Free, allocated: false, turn: 0, pfn: NO_PFN };
        let mut known = vec![free; DEVICES];
        known[0] = Known { owner: Owner::Hypervisor, allocated: true, ..free };
        let mut world = Self {
            m: SimMachine::new(DEVICES),
            table,
            doms: Vec::new(),
            running: vec![None; Rng::new(seed).pick(&CPUS).unwrap_or(1)],
            known,
            reuse: vec![0; DEVICES],
            rng: Rng::new(seed),
            totals: Totals::default(),
            last: None,
            complaints: crate::complaints(),
            scratch: super::audit::Scratch::default(),
            done: 0,
            next_id: 1,
        };
        let domains = 2 + world.rng.below(2);
        for _ in 0..domains {
            world.create().expect("an empty machine has room");
        }
        world
    }

    /// Creates a domain with some memory, a frame lent to it, and rights over some of the others.
    ///
    /// # Errors
    /// What was wrong with a frame.
    pub fn create(&mut self) -> Result<(), String> {
        let slots: Vec<usize> = self.doms.iter().map(|d| d.space.id().slot()).collect();
        let free = |id: &DomainId| !slots.contains(&id.slot());
        let id = (self.next_id..).map(DomainId).find(free).expect("three domains do not fill all slots");
        self.next_id = id.0 + 1;
        let others: Vec<DomainId> = self.doms.iter().filter(|d| !d.dying).map(|d| d.space.id()).collect();
        let may_map = if self.rng.one_in(2) { others } else { Vec::new() };
        let devices = self.rng.one_in(2);
        let space = Space::of(id);
        if devices {
            let range = u32::try_from(DEVICES).expect("small")..u32::try_from(FRAMES).expect("small");
            let allowed = space.devices.allow(range);
            assert_eq!(allowed, Ok(()));
        }
        let roots = [[None; 2]; VCPUS];
        let mut dom = Dom {
            space,
            may_map,
            devices,
            roots,
            pins: BTreeMap::new(),
            holds: Vec::new(),
            descriptors: Vec::new(),
            lent: Vec::new(),
            pending: None,
            dying: false,
        };
        let _ = self.table.promise(id, PROMISED);
        for pfn in 0..10 {
            if let Ok(got) = self.table.populate(&self.m, id, 0, pfn, LIMIT) {
                self.handed_out(got, Owner::Guest(id), pfn)?;
            }
        }
        if let Ok(got) = self.table.lend(&self.m, id) {
            self.handed_out(got, Owner::Lent(id), NO_PFN)?;
            dom.lent.push(got);
        }
        self.doms.push(dom);
        Ok(())
    }

    fn handed_out(&mut self, got: Frame, owner: Owner, pfn: u64) -> Result<(), String> {
        let known = &mut self.known[got.index()];
        if !matches!(known.owner, Owner::Free | Owner::Orphan) && known.allocated {
            return Err(format!("I1: {got:?} handed out while {:?} has it", known.owner));
        }
        *known = Known { owner, allocated: true, turn: known.turn + 1, pfn };
        self.reuse[got.index()] = 0;
        if !self.m.words(got).is_empty() {
            return Err(format!("P10: {got:?} reaches {owner:?} with contents"));
        }
        Ok(())
    }

    fn session(
        &self,
        at: usize,
        budget: u32,
        work: impl FnOnce(&mut Session<'_, SimMachine>) -> Outcome<()>,
    ) -> Outcome<()> {
        let mut held = Held::entering_ring_0();
        let mut session = self.doms[at].space.open(&self.m, &self.table, budget, &mut held);
        work(&mut session)
    }

    /// Which family a call belongs to, judged before it is made.
    fn family(&self, op: &Op) -> usize {
        let name = match *op {
            Op::Update { address, .. } if address & 7 == 1 => "page and m2p",
            Op::Update { address, .. } | Op::Batch { requests: [(address, _), ..], .. } => {
                let live =
                    Frame::containing(address).and_then(|f| self.table.info(f)).and_then(|i| i.kind.live_table());
                return live.map_or(6, |level| 1 + usize::from(level));
            }
            Op::Va { .. } => "va mapping",
            Op::Pin { .. } => "pin",
            Op::Unpin { .. } => "unpin",
            Op::Root { .. } => "root switch",
            Op::TableWrite { .. } => "ptwr",
            Op::TakeDescriptors { .. } | Op::DropDescriptors { .. } | Op::UpdateDescriptor { .. } => "descriptors",
            Op::MapForeign { .. } | Op::UnmapForeign { .. } => "foreign map",
            Op::Populate { .. } | Op::Release { .. } | Op::TearDown => "release/populate",
            Op::Hold { .. } | Op::LetGo { .. } | Op::Clear { .. } | Op::Copy { .. } => "page and m2p",
        };
        FAMILIES.iter().position(|n| *n == name).expect("listed")
    }

    /// Makes one call for domain `at` and keeps the books.
    ///
    /// # Errors
    /// A call that did something else than it said.
    pub fn call(&mut self, at: usize, op: Op, budget: u32) -> Result<Outcome<()>, String> {
        let family = self.family(&op);
        // Unfinished work goes on first, and a climb corrects the entries it passes.
        let watched = self.watched(at, &op).filter(|_| !self.unfinished(at)).map(|s| (s, self.word(s)));
        let again = self.doms[at].pending == Some(op);
        let outcome = self.perform(at, op, budget)?;
        self.totals.calls += 1;
        self.last = Some((at, op, outcome));
        if let (Some((slot, before)), Err(_)) = (watched, outcome)
            && self.word(slot) != before
        {
            return Err(format!("{op:?} was not carried out, yet {slot:?} changed"));
        }
        if outcome == Err(Stop::More) {
            self.doms[at].pending = Some(self.rest(op));
            return Ok(outcome);
        }
        if again && op != Op::TearDown {
            self.doms[at].pending = None;
            self.totals.resumed += 1;
        }
        let (tried, granted) = &mut self.totals.families[family];
        *tried += 1;
        *granted += u64::from(outcome.is_ok());
        Ok(outcome)
    }

    /// What is left of a call that was interrupted.
    fn rest(&self, op: Op) -> Op {
        match op {
            Op::Batch { requests, done } => Op::Batch { requests, done: done + self.done },
            op => op,
        }
    }

    fn unfinished(&self, at: usize) -> bool {
        let mut held = Held::entering_ring_0();
        let session = self.doms[at].space.open(&self.m, &self.table, 1, &mut held);
        session.holdings().any(|h| matches!(h, Holding::OnTheWay { .. }))
    }

    fn word(&self, slot: Slot) -> u64 {
        self.m.words(slot.table).iter().find(|(at, _)| *at == slot.index).map_or(0, |&(_, word)| word)
    }

    /// The slot a call is to write, if it is one in RAM.
    fn watched(&self, at: usize, op: &Op) -> Option<Slot> {
        let slot = match *op {
            Op::Update { address, .. } => Slot::at(address & !7).ok()?,
            Op::Va { vcpu, at: va, .. } => {
                let root = self.doms[at].roots[vcpu][0]?;
                let path = hv_core::claim::walk(&self.m, &self.table, root, va)?;
                Slot { table: path.table, index: path.index }
            }
            Op::MapForeign { slot, .. } => slot,
            _ => return None,
        };
        self.table.is_ram(slot.table).then_some(slot)
    }

    fn perform(&mut self, at: usize, op: Op, budget: u32) -> Result<Outcome<()>, String> {
        let id = self.doms[at].space.id();
        let root = |vcpu: usize| self.doms[at].roots[vcpu][0].ok_or(Stop::Refused(Refused::NotMapped));
        Ok(match op {
            Op::Update { address, value } => {
                let done = self.session(at, budget, |s| s.mmu_update(address, value, id));
                if done.is_ok() && address & 7 == 1 {
                    self.known[Frame::containing(address).expect("it was found").index()].pfn = value;
                }
                done
            }
            Op::Batch { requests, done } => {
                let rest = requests[done..].iter().map(|&(ptr, val)| MmuUpdate { ptr, val });
                let (rest, mut done) = (rest.collect::<Vec<_>>(), 0);
                let outcome = self.session(at, budget, |s| s.mmu_updates(&rest, id, &mut done));
                self.done = done;
                outcome
            }
            Op::Va { vcpu, at: va, value } => {
                root(vcpu).and_then(|root| self.session(at, budget, |s| s.update_va(root, va, value, id)))
            }
            Op::Pin { frame, level } => {
                let done = self.session(at, budget, |s| s.pin(frame, level));
                if done.is_ok() {
                    if self.doms[at].pins.insert(frame, level).is_some() {
                        return Err(format!("{frame:?} pinned twice"));
                    }
                    self.totals.roots_pinned += u64::from(level == 4);
                }
                done
            }
            Op::Unpin { frame } => {
                let done = self.session(at, budget, |s| s.unpin(frame));
                if done.is_ok() && self.doms[at].pins.remove(&frame).is_none() {
                    return Err(format!("{frame:?} unpinned but was not pinned"));
                }
                done
            }
            Op::Root { vcpu, user, new } => self.switch_root(at, vcpu, user, new, budget),
            Op::TableWrite { vcpu, at: va, new, exchange } => root(vcpu).and_then(|root| {
                self.session(at, budget, |s| {
                    let found = s.find_table_write(root, va)?;
                    let left = s.write_table(found.slot, exchange.then_some(found.value), new)?;
                    assert_eq!(left, None, "nobody else writes here");
                    Ok(())
                })
            }),
            Op::TakeDescriptors { frame } => {
                let done = self.session(at, budget, |s| s.take_descriptors(frame));
                if done.is_ok() {
                    self.doms[at].descriptors.push(frame);
                }
                done
            }
            Op::DropDescriptors { frame } => {
                let held = self.doms[at].descriptors.iter().position(|f| *f == frame);
                held.map_or(Err(Refused::NotOwner.into()), |n| {
                    self.doms[at].descriptors.remove(n);
                    self.table.drop_use(frame, id);
                    Ok(())
                })
            }
            Op::UpdateDescriptor { address, value } => {
                self.session(at, budget, |s| s.update_descriptor(address, value))
            }
            Op::MapForeign { slot, raw, from } => self.session(at, budget, |s| s.map_leaf(slot, raw, from)),
            Op::UnmapForeign { slot, frame, writable } => {
                self.session(at, budget, |s| s.unmap_leaf(slot, frame, writable, None))
            }
            Op::Hold { frame, from } => {
                let done = self.table.take_writable(&self.m, frame, from, id).map_err(Stop::Refused);
                if done.is_ok() {
                    self.doms[at].holds.push(frame);
                }
                done
            }
            Op::LetGo { frame } => {
                let held = self.doms[at].holds.iter().position(|f| *f == frame);
                held.map_or(Err(Refused::NotOwner.into()), |n| {
                    self.doms[at].holds.remove(n);
                    self.table.drop_use(frame, id);
                    Ok(())
                })
            }
            Op::Populate { pfn } => match self.table.populate(&self.m, id, 0, pfn, LIMIT) {
                Ok(got) => {
                    self.handed_out(got, Owner::Guest(id), pfn)?;
                    Ok(())
                }
                Err(why) => Err(why.into()),
            },
            Op::Release { frame } => {
                let done = self.table.give_back(&self.m, frame, id).map_err(Stop::Refused);
                if done.is_ok() {
                    let known = &mut self.known[frame.index()];
                    (known.allocated, known.pfn) = (false, NO_PFN);
                }
                done
            }
            Op::Clear { frame, from } => self.session(at, budget, |s| s.clear_page(frame, from)),
            Op::Copy { source, target } => self.session(at, budget, |s| s.copy_page(source, target, id)),
            Op::TearDown => self.tear_down(at, budget)?,
        })
    }

    fn switch_root(&mut self, at: usize, vcpu: usize, user: bool, new: Option<Frame>, budget: u32) -> Outcome<()> {
        let old = self.doms[at].roots[vcpu][usize::from(user)];
        let on = self.running.iter().position(|r| *r == Some((at, vcpu, user)));
        let loaded = std::cell::Cell::new(false);
        let done = self.session(at, budget, |s| {
            s.switch_root(old, new, || {
                loaded.set(true);
                if let Some(cpu) = on {
                    self.m.forget(CpuId(u32::try_from(cpu).expect("small")));
                }
            })
        });
        assert_eq!(loaded.get(), done.is_ok(), "the root is loaded exactly if it was accepted");
        if done.is_ok() {
            self.doms[at].roots[vcpu][usize::from(user)] = new;
            if new.is_none()
                && let Some(cpu) = on
            {
                self.idle(cpu);
            }
        }
        done
    }

    /// A CPU runs a vcpu under one of its roots, or nobody.
    pub fn schedule(&mut self, cpu: usize, next: Option<(usize, usize, bool)>) {
        let id = CpuId(u32::try_from(cpu).expect("small"));
        let before = self.running[cpu];
        if let Some((at, _, _)) = next {
            self.doms[at].space.enter(&self.table, id);
        }
        let ticket = self.table.epochs().begin();
        self.m.forget(id);
        self.table.epochs().done(CpuSet::only(id), ticket);
        if let Some((at, _, _)) = before
            && next.is_none_or(|n| n.0 != at)
        {
            self.doms[at].space.leave(id);
        }
        self.running[cpu] = next;
    }

    /// A CPU runs nobody.
    pub fn idle(&mut self, cpu: usize) {
        self.schedule(cpu, None);
    }

    /// What destroying a domain does outside the rules of paging, then those.
    fn tear_down(&mut self, at: usize, budget: u32) -> Result<Outcome<()>, String> {
        for cpu in 0..self.running.len() {
            if self.running[cpu].is_some_and(|r| r.0 == at) {
                self.idle(cpu);
            }
        }
        let dom = &mut self.doms[at];
        {
            let mut held = Held::entering_ring_0();
            let mut session = dom.space.open(&self.m, &self.table, budget, &mut held);
            for root in dom.roots.iter_mut().flatten().filter_map(Option::take) {
                session.drop_root(root);
            }
        }
        for frame in dom.holds.drain(..).chain(dom.descriptors.drain(..)) {
            self.table.drop_use(frame, dom.space.id());
        }
        for frame in dom.lent.drain(..) {
            self.table.retire(frame);
            let known = &mut self.known[frame.index()];
            (known.owner, known.allocated) = (Owner::Orphan, false);
        }
        if !dom.dying {
            dom.dying = true;
            let climbing = {
                let mut held = Held::entering_ring_0();
                let session = dom.space.open(&self.m, &self.table, 1, &mut held);
                session.holdings().any(|h| matches!(h, Holding::OnTheWay { up: true, .. }))
            };
            self.totals.abandoned += u64::from(climbing);
        }
        dom.pending = None;
        let outcome = self.session(at, budget, |s| s.tear_down());
        // It goes through the frames in order; pins it has come to are gone from the books as well.
        let table = &self.table;
        self.doms[at].pins.retain(|f, _| table.info(*f).is_some_and(|i| i.kind.pinned));
        if outcome.is_ok() {
            let id = self.doms[at].space.id();
            if self.table.owned(id) != 0 {
                return Err(format!("P11: {id} is gone and owns {} frames", self.table.owned(id)));
            }
            self.table.end_promise(id);
            self.doms[at].pins.clear();
            for known in self.known.iter_mut().filter(|k| k.owner == Owner::Guest(id)) {
                (known.owner, known.allocated, known.pfn) = (Owner::Orphan, false, NO_PFN);
            }
            let last = self.doms.len() - 1;
            for running in self.running.iter_mut().flatten().filter(|r| r.0 == last) {
                running.0 = at;
            }
            self.doms.swap_remove(at);
            self.totals.destroyed += 1;
        }
        Ok(outcome)
    }

    /// Compares two worlds in which the same has happened.
    ///
    /// # Errors
    /// The first difference.
    pub fn differs(&self, other: &Self) -> Result<(), String> {
        if self.last != other.last {
            return Err(format!("{:?}, but {:?}", self.last, other.last));
        }
        for f in (0..DEVICES).map(frame) {
            let [(mine, mine_at), (others, others_at)] = [self, other].map(|world| {
                let mut info = world.table.info(f).expect("RAM");
                info.kind.turn = 0; // a batch holds its page once, and not once for each request
                (info, world.table.stamped(f))
            });
            if mine != others || mine_at != others_at {
                return Err(format!("{f:?} is {mine:?} of {mine_at:?}, but {others:?} of {others_at:?}"));
            }
            if *self.m.words(f) != *other.m.words(f) {
                return Err(format!("{f:?} holds {:x?}, but {:x?}", self.m.words(f), other.m.words(f)));
            }
            if self.m2p(f) != other.m2p(f) {
                return Err(format!("{f:?} is page {:x}, but {:x}", self.m2p(f), other.m2p(f)));
            }
        }
        if *self.m.cached.borrow() != *other.m.cached.borrow() || self.m.flushes != other.m.flushes {
            return Err("other CPUs were flushed".into());
        }
        Ok(())
    }

    /// The machine-to-physical table as it is.
    #[must_use]
    pub fn m2p(&self, frame: Frame) -> u64 {
        self.m.m2p(frame)
    }
}
