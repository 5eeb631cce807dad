//! All state of ring 0, and the context in which a call of a guest is judged.

use crate::claim::walks::{Kind, WalkCache};
use crate::claim::{Access, GuestMemory};
use crate::domain::visit::Visits;
use crate::domain::{Life, Powers, Spec};
use crate::event::vectors::Messages;
use crate::frame::FrameTable;
use crate::frame::owned::OwnedFrames;
use crate::lock::{Domains, Held, Lock, Nothing, Ports};
use crate::paging::{BUDGET, LockedFastPath, Session};
use crate::prelude::*;
use crate::sched::Scheduler;
use core::cell::Cell;
use core::sync::atomic::AtomicU32;
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use crate::addr::{MAX_DOMAINS, MAX_VCPUS};

with_new! {
    /// Everything ring 0 knows.
    pub struct World {
        /// Owners, types and counts of all frames.
        pub frames: FrameTable = FrameTable::new(),
        /// Domains by slot.
        pub domains: [Domain; DomainId::SLOTS] = [const { Domain::new() }; DomainId::SLOTS],
        /// Vcpus.
        pub vcpus: [Vcpu; MAX_VCPUS] = [const { Vcpu::new() }; MAX_VCPUS],
        /// Who runs next.
        pub sched: Scheduler = Scheduler::new(),
        /// Who takes the messages of devices. Changed under the lock of ports, but for reservations.
        pub(crate) messages: Messages = Messages::new(),
        /// Held while ports are joined or parted.
        pub(crate) ports: Lock<Ports, ()> = Lock::new(()),
        /// Held while domains are made or unmade; the next id to try.
        pub(crate) census: Lock<Domains, u16> = Lock::new(0),
        /// 0, or one more than the reason for which a domain that may turn the machine off has shut down.
        pub(crate) ended: AtomicU32 = AtomicU32::new(0),
        /// Who looks at domains that are not his own.
        pub(crate) visits: Visits = Visits::new(),
        /// How far the log has been read and cleared.
        pub(crate) log: LogMarks = LogMarks { start: AtomicU32::new(0), read: AtomicU32::new(0) },
    }
}

/// Positions in the log of ring 0.
pub(crate) struct LogMarks {
    /// What lies before this has been cleared.
    pub(crate) start: AtomicU32,
    /// How far it was read last.
    pub(crate) read: AtomicU32,
}

impl World {
    /// The domain with this id, if it is alive.
    pub fn domain(&self, id: DomainId) -> Option<&Domain> {
        self.slot(id).filter(|domain| domain.life() == Life::Alive && domain.id() == id)
    }

    /// The slot for a domain with this id, whoever has it.
    pub(crate) fn slot(&self, id: DomainId) -> Option<&Domain> {
        self.domains.get(id.slot())
    }

    /// A vcpu of a domain.
    pub fn vcpu(&self, domain: &Domain, number: VcpuId) -> Option<&Vcpu> {
        self.vcpus.get(usize::from(nth(&domain.vcpus, number.0)?.load(Acquire)).checked_sub(1)?)
    }

    /// The vcpus of a domain.
    pub fn vcpus_of<'a>(&'a self, domain: &'a Domain) -> impl Iterator<Item = &'a Vcpu> {
        (0..).take(domain.vcpus.len()).filter_map(|number| self.vcpu(domain, VcpuId(number)))
    }

    /// The domain a vcpu belongs to.
    pub fn domain_of(&self, vcpu: &Vcpu) -> Option<&Domain> {
        nth(&self.domains, vcpu.domain.load(Acquire).checked_sub(1)?)
    }
}

/// Shown by those who may control other domains; only [`Ctx::control`] makes one.
#[derive(Clone, Copy, Debug)]
pub struct ControlAuthority(());

/// Where rules are carried out: a machine, its world, and the proof that this CPU holds no lock.
pub struct CpuCtx<'a, M> {
    /// The machine.
    pub m: &'a M,
    /// The world.
    pub world: &'a World,
    /// The proof.
    pub held: &'a mut Held<Nothing>,
}

impl<M: Machine> CpuCtx<'_, M> {
    /// Work on the page tables of a domain, within the budget of a step.
    pub fn session<'s>(&'s mut self, domain: &'s Domain) -> Session<'s, M> {
        domain.space.open(self.m, &self.world.frames, BUDGET, self.held)
    }
}

/// A domain being made, which nobody else sees yet.
pub(crate) struct DomainBuilder<'a, M> {
    /// The machine.
    pub(crate) m: &'a M,
    /// The world.
    pub(crate) world: &'a World,
    /// Its slot.
    pub(crate) domain: &'a Domain,
    /// What it is to be.
    pub(crate) spec: &'a Spec,
    /// The proof that this CPU holds the census and nothing above.
    pub(crate) held: &'a mut Held<Domains>,
}

/// A vcpu on this CPU: the world, the machine, and what it owns.
pub struct Ctx<'a, M> {
    /// The machine.
    pub m: &'a M,
    /// The world.
    pub world: &'a World,
    /// The caller's domain.
    pub domain: &'a Domain,
    /// The caller.
    pub vcpu: &'a Vcpu,
    /// What it owns.
    pub state: &'a mut VcpuState,
    /// The proof that no lock is held.
    pub held: &'a mut Held<Nothing>,
    /// What this CPU has found by walking tables.
    pub walks: &'a WalkCache,
    /// RCX and R11 may be lost on the way back to the guest.
    pub may_sysret: bool,
    /// Writes to page tables are carried out, as far as is known since the entry code was told.
    pub(crate) writes_tables: bool,
    /// The domain's own frames; none where fast paths are switched off.
    owned_frames: OwnedFrames<'a>,
    /// This step has looked for other domains, see [`Ctx::visit`].
    visits: Cell<bool>,
}

impl<'a, M: Machine> Ctx<'a, M> {
    /// A vcpu of a domain, with what it owns.
    #[must_use]
    pub fn new(cpu_ctx: &'a mut CpuCtx<'_, M>, domain: &'a Domain, vcpu: &'a Vcpu, state: &'a mut VcpuState) -> Self {
        let (m, world, held) = (cpu_ctx.m, cpu_ctx.world, &mut *cpu_ctx.held);
        let (walks, owned_frames) = (&world.sched.here(m).walks, OwnedFrames::or_none(&world.frames, domain.id()));
        Self {
            m,
            world,
            domain,
            vcpu,
            state,
            held,
            walks,
            may_sysret: false,
            writes_tables: false,
            owned_frames,
            visits: Cell::new(false),
        }
    }

    /// Memory as the guest kernel sees it: only a guest's kernel may call.
    ///
    /// # Errors
    /// A vcpu without a root has no addresses.
    #[inline(always)]
    pub fn memory(&self) -> Result<GuestMemory<'a, M>, Errno> {
        let root = self.state.kernel_root.ok_or(Errno::Fault)?;
        Ok(GuestMemory::new(self.m, &self.world.frames, root).remembering(self.walks, Kind::Data))
    }

    /// Copies a structure in, once.
    ///
    /// # Errors
    /// `Fault` if the address is not readable by the guest.
    #[inline(always)]
    pub fn read<T: FromBytes + IntoBytes>(&self, at: u64) -> Result<T, Errno> {
        self.memory()?.read_recalled(GuestVirt(at)).map_or_else(|| self.read_walking(at), Ok)
    }

    #[cold]
    fn read_walking<T: FromBytes + IntoBytes>(&self, at: u64) -> Result<T, Errno> {
        self.memory()?.read(GuestVirt(at)).map_err(|_| Errno::Fault)
    }

    /// The frame behind an address of the guest kernel's, whose root that is.
    #[inline(always)]
    pub(crate) fn frame(&self, root: Frame, at: GuestVirt, kind: Kind, access: Access) -> Option<Frame> {
        let view = GuestMemory::new(self.m, &self.world.frames, root).remembering(self.walks, kind);
        view.recall(at, access).or_else(|| self.walk(at, kind, access))
    }

    #[cold]
    fn walk(&self, at: GuestVirt, kind: Kind, access: Access) -> Option<Frame> {
        self.memory().ok()?.of_kind(kind).frame(at, access).ok()
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// As [`Ctx::read`].
    pub fn read_bytes(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        self.memory()?.read_bytes(GuestVirt(at), to).map_err(|_| Errno::Fault)
    }

    /// Copies a structure out.
    ///
    /// # Errors
    /// `Fault` if the address is not writable by the guest.
    #[inline]
    pub fn write<T: IntoBytes + Immutable>(&self, at: u64, value: &T) -> Result<(), Errno> {
        self.memory()?.write_recalled(GuestVirt(at), value).map_or_else(|| self.write_walking(at, value), Ok)
    }

    #[cold]
    fn write_walking<T: IntoBytes + Immutable>(&self, at: u64, value: &T) -> Result<(), Errno> {
        self.memory()?.write(GuestVirt(at), value).map_err(|_| Errno::Fault)
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// As [`Ctx::write`].
    pub fn write_bytes(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.memory()?.write_bytes(GuestVirt(at), from).map_err(|_| Errno::Fault)
    }

    /// Where the call is carried out.
    pub fn cpu_ctx(&mut self) -> CpuCtx<'_, M> {
        CpuCtx { m: self.m, world: self.world, held: self.held }
    }

    /// As [`CpuCtx::session`].
    pub fn session<'s>(&'s mut self, domain: &'s Domain) -> Session<'s, M> {
        domain.space.open(self.m, &self.world.frames, BUDGET, self.held)
    }

    /// The fast paths over the tables of the caller's domain, if there are any.
    #[inline(always)]
    pub(crate) fn fast_path(&mut self) -> Option<LockedFastPath<'_, 'a, M>> {
        self.domain.space.fast_path(self.m, &self.owned_frames, self.held)
    }

    /// Whether an argument names the caller.
    pub fn is_own(&self, id: u16) -> bool {
        id == domid::SELF || id == self.domain.id().0
    }

    /// This step is about to look for a domain that is not the caller's: until it ends, none is unmade that it finds.
    pub(crate) fn visit(&self) {
        self.world.visits.begin(self.m.this_cpu());
        self.visits.set(true);
    }

    /// This step is over.
    pub(crate) fn end_visits(&self) {
        if self.visits.take() {
            self.world.visits.end(self.m.this_cpu());
        }
    }

    /// The domain an argument names: SELF, or a living domain, which stays until the step ends.
    ///
    /// # Errors
    /// `Srch` if there is none.
    pub fn named(&self, id: u16) -> Result<&'a Domain, Errno> {
        if self.is_own(id) {
            return Ok(self.domain);
        }
        self.visit();
        self.world.domain(DomainId(id)).ok_or(Errno::Srch)
    }

    /// The domain an argument names, which must be the caller unless the caller controls others.
    ///
    /// # Errors
    /// `Perm` without the power, `Srch` if there is no such domain.
    pub fn controlled(&self, id: u16) -> Result<&'a Domain, Errno> {
        let domain = self.named(id)?;
        if !self.is_own(id) {
            self.control()?;
        }
        Ok(domain)
    }

    /// The caller's authority over other domains.
    ///
    /// # Errors
    /// `Perm` if it has none.
    pub fn control(&self) -> Result<ControlAuthority, Errno> {
        if self.domain.may(Powers::CONTROL) { Ok(ControlAuthority(())) } else { Err(Errno::Perm) }
    }
}
