//! Recounts, from memory and the books, what every frame is used for (P1-P3, P6), what CPUs may remember (P4), who is
//! joined to whom (P5), and who waits for a CPU; then compares.

use super::Context;
use super::machine::WholeMachine;
use crate::machine::Seen;
use crate::tally::{Found, Memory, Tally, books};
use hv_core::addr::{CpuId, DomainId, Frame, Port};
use hv_core::audit::Held;
use hv_core::domain::life::kept_frames;
use hv_core::domain::{Domain, Life, Powers};
use hv_core::event::port::{Binding, PortState};
use hv_core::frame::{Owner, Use};
use hv_core::grant::Grants;
use hv_core::lock;
use hv_core::paging::Sweep;
use hv_core::vcpu::{Place, Vcpu, VcpuState};
use hv_core::world::World;
use hypercall_abi::grant::ENTRIES_PER_FRAME;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

/// Room to recount in, and what is remembered between two audits.
pub struct Audit {
    tally: Tally,
    /// Who keeps each frame besides those who use it.
    keepers: Vec<Option<Owner>>,
    /// What each frame that a CPU may remember was when it was remembered.
    remembered: BTreeMap<(Frame, u8), Owner>,
    /// How many frames each domain owned.
    owned: BTreeMap<DomainId, u32>,
    complaints: u64,
    /// Frames set aside from outside.
    pub reserve: Vec<Frame>,
}

/// Memory as a domain may use it.
struct Seeing<'a> {
    m: &'a WholeMachine,
    world: &'a World,
    id: DomainId,
    /// Frames of others that it maps, and how often.
    foreign: RefCell<BTreeMap<Frame, usize>>,
}

impl Memory for Seeing<'_> {
    fn words<R>(&self, frame: Frame, look: impl FnOnce(&[(usize, u64)]) -> R) -> R {
        self.m.words(frame, look)
    }

    fn owner(&self, frame: Frame) -> Option<Owner> {
        owner(self.world, frame)
    }

    fn mappable(&self, frame: Frame) -> Found {
        match self.owner(frame) {
            None => return Err("P3: a device".into()),
            Some(Owner::Guest(owner) | Owner::Lent(owner)) if owner == self.id => {}
            Some(Owner::Guest(_) | Owner::Lent(_) | Owner::Orphan) => {
                *self.foreign.borrow_mut().entry(frame).or_default() += 1;
            }
            owner => return Err(format!("P3: a leaf to a frame of {owner:?}")),
        }
        Ok(())
    }
}

fn owner(world: &World, frame: Frame) -> Option<Owner> {
    world.frames.info(frame).map(|info| info.owner.owner)
}

impl Audit {
    /// An audit of a machine of so many frames.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self {
            tally: Tally::default(),
            keepers: vec![None; frames],
            remembered: BTreeMap::new(),
            owned: BTreeMap::new(),
            complaints: crate::complaints(),
            reserve: Vec::new(),
        }
    }

    fn kept(&mut self, frame: Frame, owner: Owner) -> Found {
        match self.keepers[frame.index()].replace(owner) {
            None => Ok(()),
            Some(other) => Err(format!("I1: {frame:?} is kept by {other:?} and by {owner:?}")),
        }
    }

    /// Looks at everything. `current`: the vcpu on the CPU.
    ///
    /// # Errors
    /// The first promise found broken, by its number.
    pub fn look(&mut self, m: &WholeMachine, world: &World, current: Option<&Context<'_>>) -> Found {
        if crate::complaints() != self.complaints {
            return Err("the rules complained about themselves".into());
        }
        let race = m.set_race(None);
        let work = m.work.load(Relaxed);
        let current = current.map(|ctx| (ctx.vcpu, &*ctx.own));
        let found = self
            .recount(m, world, current)
            .and_then(|()| self.compare(m, world))
            .and_then(|()| self.limits(world))
            .and_then(|()| self.caches(m, world))
            .and_then(|()| ports(m, world))
            .and_then(|()| queue(world));
        m.work.store(work, Relaxed);
        m.set_race(race);
        found
    }

    fn recount(&mut self, m: &WholeMachine, world: &World, current: Option<(&Vcpu, &VcpuState)>) -> Found {
        self.tally.begin(self.keepers.len());
        self.keepers.fill(None);
        for n in 0..self.keepers.len() {
            let frame = Frame::from_u32(n as u32);
            let owner = world.frames.info(frame).ok_or("no words")?.owner;
            if let (true, keeper @ (Owner::Guest(_) | Owner::Orphan)) = (owner.allocated, owner.owner) {
                self.kept(frame, keeper)?; // the domain's own: nothing else says so
            }
        }
        self.kept(Frame::from_u32(0), Owner::Hypervisor)?;
        for n in 0..self.reserve.len() {
            self.kept(self.reserve[n], Owner::Hypervisor)?;
        }
        let mut pins: BTreeMap<(DomainId, u32, Frame), [u64; 2]> = BTreeMap::new();
        for domain in world.domains.iter().filter(|domain| domain.life() != Life::Free) {
            self.domain(m, world, domain, current)?;
            for handle in handles(m, domain) {
                self.tally.held(handle.frame, owner(world, handle.frame), domain.id(), handle.writable)?;
                let counts = pins.entry((handle.owner, handle.gref, handle.frame)).or_default();
                counts[usize::from(handle.writable)] += 1;
            }
        }
        for domain in world.domains.iter().filter(|domain| domain.life() != Life::Free) {
            for (gref, frame, readers, writers) in in_use(m, domain) {
                let found = pins.remove(&(domain.id(), gref, frame)).unwrap_or_default();
                if found != [readers, writers] {
                    return Err(format!(
                        "P6: {} grant {gref} of {frame:?} has {readers}+{writers} uses, and handles for {found:?}",
                        domain.id()
                    ));
                }
            }
        }
        // Handles whose granter lives must have been found; those of the dead hold their frames alone.
        let orphaned = pins.keys().find(|(owner, ..)| {
            world.domains.iter().any(|domain| domain.life() != Life::Free && domain.id() == *owner)
        });
        orphaned.map_or(Ok(()), |pin| Err(format!("P6: {pin:?} is held, but not in use")))
    }

    fn domain(
        &mut self,
        m: &WholeMachine,
        world: &World,
        domain: &Domain,
        current: Option<(&Vcpu, &VcpuState)>,
    ) -> Found {
        let id = domain.id();
        for frame in domain.shared_info().into_iter().chain(domain.grants.table_frames()) {
            self.kept(frame, Owner::Lent(id))?;
            self.tally.used(frame, Use::Writable)?;
        }
        for frame in domain.port_frames().chain(domain.grants.active_frames()).chain(domain.grants.handle_frames()) {
            self.kept(frame, Owner::Hypervisor)?;
        }
        for vcpu in world.vcpus_of(domain) {
            let taken = vcpu.own.try_take();
            let own = match (&taken, current) {
                (Some(own), _) => own,
                (None, Some((on, own))) if std::ptr::eq(on, vcpu) => own,
                _ => return Err(format!("{id} {:?} is owned by nobody we know", vcpu.number())),
            };
            for frame in [own.traps, own.fpu].into_iter().flatten() {
                self.kept(frame, Owner::Hypervisor)?;
            }
            for frame in [own.kernel_root, own.user_root].into_iter().flatten() {
                self.tally.table(frame, 4)?;
            }
            for frame in own.gdt.iter().chain(&own.ldt_mapped).flatten() {
                m.words(*frame, |words| self.tally.descriptors(*frame, words))?;
            }
            if let Some(frame) = vcpu.info_frame().filter(|frame| Some(*frame) != domain.shared_info()) {
                self.tally.used(frame, Use::Writable)?;
            }
        }
        let mut held = lock::Held::entering_ring_0();
        let session = domain.space.open(m, &world.frames, 1, &mut held);
        let sweep = session.sweep().filter(|_| domain.life() == Life::Dying);
        if matches!(sweep, Some(Sweep::Frames(_))) {
            self.tally.leaves(id);
            return Ok(());
        }
        for n in 0..self.keepers.len() {
            let frame = Frame::from_u32(n as u32);
            let info = world.frames.info(frame).ok_or("no words")?;
            if info.kind.pinned && info.owner.owner == Owner::Guest(id) {
                let level = info.kind.used_as.level().ok_or(format!("P2: {frame:?} is pinned as no table"))?;
                self.tally.pinned(frame, level)?;
            }
        }
        self.tally.unfinished(&session)?;
        let memory = Seeing { m, world, id, foreign: RefCell::default() };
        self.tally.follow(&memory, id, sweep)?;
        let foreign = memory.foreign.into_inner();
        if domain.life() == Life::Alive && !domain.may(Powers::CONTROL) {
            for (frame, entries) in foreign {
                let granted =
                    handles(m, domain).into_iter().filter(|handle| handle.host && handle.frame == frame).count();
                if granted < entries {
                    return Err(format!("P3: {id} maps {frame:?} {entries} times and has {granted} grants of it"));
                }
            }
        }
        Ok(())
    }

    fn compare(&self, m: &WholeMachine, world: &World) -> Found {
        let mut free = 0;
        for (n, &keeper) in self.keepers.iter().enumerate() {
            let frame = Frame::from_u32(n as u32);
            let info = world.frames.info(frame).ok_or("no words")?;
            let (e, owner) = (&self.tally[frame], info.owner);
            match (keeper, owner.owner) {
                (Some(keeper), owner) if keeper != owner => {
                    return Err(format!("I1: {frame:?} is kept by {keeper:?}, but is {owner:?}'s"));
                }
                (Some(_), _) => {}
                (None, Owner::Free) if e.held() == 0 => free += 1,
                (None, Owner::Guest(_) | Owner::Orphan | Owner::Lent(_)) if e.held() > 0 => {}
                (None, owner) if self.tally.is_uncounted(owner) => {}
                _ => return Err(format!("P11: {frame:?} is {owner:?}, but {e:?}")),
            }
            if !owner.allocated && m.m2p(frame) != u64::MAX {
                return Err(format!("P10: the machine-to-physical entry of {frame:?} is {:#x}", m.m2p(frame)));
            }
            self.tally.agrees(frame, info, keeper.is_some())?;
        }
        if world.frames.free_frames() != free {
            return Err(format!("P11: {} frames in the pool, {free} are free", world.frames.free_frames()));
        }
        Ok(())
    }

    /// P13: domains own what is counted, no more than before if that is more than they may; and what the hypervisor keeps
    /// for a domain, and what is set aside for it, is together what a domain may need.
    fn limits(&mut self, world: &World) -> Found {
        let domains: Vec<&Domain> = world.domains.iter().filter(|domain| domain.life() != Life::Free).collect();
        let ids: Vec<DomainId> = domains.iter().map(|domain| domain.id()).collect();
        books(&world.frames, world.frames.free_frames(), &ids)?;
        self.owned.retain(|id, _| ids.contains(id));
        for domain in domains {
            let (id, owned) = (domain.id(), world.frames.owned(domain.id()));
            let before = self.owned.insert(id, owned).unwrap_or(0);
            if owned > before && u64::from(owned) > domain.max_pages.load(Relaxed) {
                return Err(format!("P13: {id} owns {owned} frames and may have {:?}", domain.max_pages));
            }
            let (kept, needed) = (keeps(world, domain), kept_frames(world.vcpus_of(domain).count() as u32));
            let promised = world.frames.promised(id);
            if domain.life() == Life::Alive && kept + promised != needed {
                return Err(format!("P13: {kept} frames are kept for {id}, {promised} set aside, {needed} needed"));
            }
        }
        Ok(())
    }

    /// What the CPU may remember is true still, or harmless.
    fn caches(&mut self, m: &WholeMachine, world: &World) -> Found {
        let cached = m.cached.lock().expect("one thread");
        self.remembered.retain(|(frame, _), _| cached.iter().any(|c| c.frame == *frame));
        for c in cached.iter() {
            if self.tally[c.frame].is_harmed_by(c.seen) {
                return Err(format!("P4: {c:?}, but it is {:?} now", self.tally[c.frame].used_as));
            }
            let level = if let Seen::Table(level) = c.seen { level } else { 0 };
            let owner = world.frames.info(c.frame).ok_or("no words")?.owner.owner;
            let before = *self.remembered.entry((c.frame, level)).or_insert(owner);
            let harmless = matches!(owner, Owner::Free | Owner::Orphan);
            if owner != before && !harmless {
                return Err(format!("P4: {c:?} of {before:?}, and now it is {owner:?}'s"));
            }
        }
        Ok(())
    }
}

/// How many frames the hypervisor keeps on behalf of a domain.
#[must_use]
pub fn keeps(world: &World, domain: &Domain) -> u32 {
    let grants = &domain.grants;
    let frames = domain.shared_info().into_iter().chain(domain.port_frames()).chain(grants.table_frames());
    let frames = frames.chain(grants.active_frames()).chain(grants.handle_frames());
    (frames.count() + 2 * world.vcpus_of(domain).count()) as u32
}

/// What a domain holds of others' grants.
fn handles(m: &WholeMachine, domain: &Domain) -> Vec<Held> {
    let mut found = Vec::new();
    for frame in domain.grants.handle_frames() {
        m.words(frame, |words| {
            // The first word of a handle in use is not 0; the second follows, unless it is.
            for (at, word) in words.iter().filter(|(at, _)| at % 2 == 0) {
                found.extend(Grants::read_handle([*word, m.peek(frame, at + 1)]));
            }
        });
    }
    found
}

/// References in use: the frame, uses for reading, uses for writing.
fn in_use(m: &WholeMachine, domain: &Domain) -> Vec<(u32, Frame, u64, u64)> {
    let mut found = Vec::new();
    for (n, frame) in (0u32..).zip(domain.grants.active_frames()) {
        m.words(frame, |words| {
            for (at, word) in words {
                let (granted, readers, writers) = Grants::read_active(*word);
                if readers + writers > 0 {
                    found.push((n * ENTRIES_PER_FRAME + *at as u32, granted, readers, writers));
                }
            }
        });
    }
    found
}

/// Ports that are not closed.
fn bound(m: &WholeMachine, domain: &Domain) -> Vec<(Port, PortState)> {
    let mut found = Vec::new();
    for (n, frame) in (0u32..).zip(domain.port_frames()) {
        m.words(frame, |words| {
            found.extend(words.iter().map(|(at, word)| (Port(n * 512 + *at as u32), PortState::from_word(*word))));
        });
    }
    found
}

/// P5: each end names the other or nobody; a virtual interrupt and its port name each other.
fn ports(m: &WholeMachine, world: &World) -> Found {
    for domain in world.domains.iter().filter(|domain| domain.life() == Life::Alive) {
        let id = domain.id();
        for (port, state) in bound(m, domain) {
            match state.binding {
                Binding::Interdomain(other, at) => {
                    let end = world.domain(other).map(|other| world.port(m, other, at).binding);
                    if end != Some(Binding::Interdomain(id, port)) {
                        return Err(format!("P5: {id} {port:?} is joined to {other} {at:?}, which is {end:?}"));
                    }
                }
                Binding::Virq(virq) => {
                    let slots = world.vcpus_of(domain);
                    let named = slots.filter(|vcpu| vcpu.virq_port(virq as usize) == Some(port)).count();
                    if named != 1 {
                        return Err(format!("P5: {id} {port:?} is virq {virq}, named by {named} vcpus"));
                    }
                }
                Binding::Closed | Binding::Unbound(_) | Binding::Ipi => {}
            }
        }
        for vcpu in world.vcpus_of(domain) {
            for virq in 0..hypercall_abi::event::VIRQS {
                let port = vcpu.virq_port(virq as usize);
                let bound = port.map(|port: Port| world.port(m, domain, port).binding);
                if bound.is_some_and(|binding| binding != Binding::Virq(virq)) {
                    return Err(format!("P5: {id} virq {virq} goes to {port:?}, which is {bound:?}"));
                }
            }
        }
    }
    Ok(())
}

/// A vcpu is in the queue exactly once if it is to be, and not at all otherwise.
fn queue(world: &World) -> Found {
    let (queue, waiting) = world.run_queue(CpuId(0));
    if queue.len() != usize::from(waiting) {
        return Err(format!("{} in the run queue, counted as {waiting}", queue.len()));
    }
    for (index, vcpu) in (0u16..).zip(&world.vcpus) {
        let times = queue.iter().filter(|other| **other == index).count();
        let exists = world.domain_of(vcpu).is_some();
        if times != usize::from(exists && vcpu.place() == Place::Queued) {
            return Err(format!("vcpu {index} ({exists}) is {:?} and {times} times in the run queue", vcpu.place()));
        }
    }
    Ok(())
}
