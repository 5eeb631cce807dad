//! Domains, the books kept about them, and calls carried out on them.

mod calls;
mod end;

use super::Totals;
use crate::machine::SimMachine;
use crate::rng::Rng;
use hv_core::addr::{CpuId, CpuSet, DomainId, Frame, GuestVirt};
use hv_core::frame::table::{NO_PFN, WORDS};
use hv_core::frame::{FrameTable, Owner};
use hv_core::paging::{Outcome, Slot, Space};
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
