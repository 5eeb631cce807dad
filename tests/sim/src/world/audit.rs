//! Recounts, from memory and the books, what every frame is used for (P1-P3, P6), what CPUs may remember (P4), who is
//! joined to whom (P5), and who waits for a CPU; then compares.

use super::Context;
use super::machine::{WholeMachine, owner_number};
use crate::tally::{Found, Memory, Tally, Words, books};
use hv_core::addr::{CpuId, DomainId, Frame, Port};
use hv_core::audit::Held;
use hv_core::domain::life::kept_frames;
use hv_core::domain::{Domain, Life, Powers};
use hv_core::event::port::{Binding, PortState};
use hv_core::frame::{Info, Owner, Use};
use hv_core::grant::Grants;
use hv_core::lock;
use hv_core::machine::FIRST_MESSAGE;
use hv_core::paging::Sweep;
use hv_core::vcpu::{Place, Vcpu, VcpuState};
use hv_core::world::World;
use hypercall_abi::grant::ENTRIES_PER_FRAME;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

/// Subsystem to recount in, and what is remembered between two audits.
pub struct Audit {
    tally: Tally,
    /// The words of all frames, read once for each audit of all.
    words: Words,
    /// Frames that are pinned, with whose they are and as what.
    pinned: Vec<(DomainId, Frame, Use)>,
    /// Who keeps each frame besides those who use it.
    keepers: Vec<Option<Owner>>,
    /// How many frames each domain owned after the last step.
    owned: BTreeMap<DomainId, u32>,
    complaints: u64,
    /// Frames set aside from outside.
    pub reserve: Vec<Frame>,
}

/// A vcpu on a CPU that rests.
#[derive(Clone, Copy, Debug)]
pub struct On {
    /// The CPU.
    pub cpu: CpuId,
    /// The vcpu, by its index.
    pub vcpu: u16,
    /// What it owns.
    pub own: VcpuState,
    /// It is to run on.
    pub stays: bool,
    /// Its CPU is about to look at the deadlines it keeps.
    pub ticks: bool,
}

impl On {
    /// A vcpu as its CPU sees it now; `stays`: it is to run on.
    #[must_use]
    pub fn of(ctx: &Context<'_>, stays: bool) -> Self {
        let cpu = hv_core::machine::Cpus::this_cpu(ctx.m);
        Self { cpu, vcpu: ctx.vcpu.index(), own: *ctx.state, stays, ticks: false }
    }

    /// A vcpu that a story has put on the CPU, without the scheduler.
    #[must_use]
    pub fn stage(ctx: &Context<'_>) -> Self {
        Self::of(ctx, false)
    }
}

/// Memory as a domain may use it.
struct Seeing<'a> {
    m: &'a WholeMachine,
    table: &'a Words,
    id: DomainId,
    /// Frames of devices that it may map.
    devices: Vec<Range<u32>>,
    /// Frames of others that it maps, and how often.
    foreign: RefCell<BTreeMap<Frame, usize>>,
}

impl Memory for Seeing<'_> {
    fn words<R>(&self, frame: Frame, look: impl FnOnce(&[(usize, u64)]) -> R) -> R {
        self.m.words(frame, look)
    }

    fn owner(&self, frame: Frame) -> Option<Owner> {
        self.table.get(frame).map(|info| info.owner.owner)
    }

    fn mappable(&self, frame: Frame) -> Found {
        match self.owner(frame) {
            None if self.devices.iter().any(|range| range.contains(&frame.as_u32())) => {}
            None => return Err("P3: a device of nobody".into()),
            Some(Owner::Guest(owner) | Owner::Lent(owner)) if owner == self.id => {}
            Some(Owner::Guest(_) | Owner::Lent(_) | Owner::Orphan) => {
                *self.foreign.borrow_mut().entry(frame).or_default() += 1;
            }
            owner => return Err(format!("P3: a leaf to a frame of {owner:?}")),
        }
        Ok(())
    }
}

impl Audit {
    /// An audit of a machine of so many frames.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self {
            tally: Tally::default(),
            words: Words::default(),
            pinned: Vec::new(),
            keepers: vec![None; frames],
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

    /// Looks at everything. `on`: the vcpus on the CPUs, of which all are at rest.
    ///
    /// # Errors
    /// The first promise found broken, by its number.
    pub fn look(&mut self, m: &WholeMachine, world: &World, on: &[On]) -> Found {
        let domains: Vec<&Domain> = there(world).collect();
        m.for_free(|| {
            self.no_complaint()?;
            self.recount(m, world, &domains, on)?;
            self.compare(m, world)?;
            self.growth(m, world)?;
            m.forget_limits(world);
            self.set_aside(world, &domains)?;
            caches(m, world, Some(&self.tally))?;
            ports(m, world, &domains)?;
            queues(m, world)?;
            if on.iter().all(|on| on.stays && !on.ticks) {
                timers(m, world)?;
            }
            places(world, on)
        })
    }

    /// Looks at what holds at any time, whatever other CPUs are in the middle of. `on`: the vcpu on this CPU.
    ///
    /// # Errors
    /// As [`Audit::look`].
    pub fn glance(&mut self, m: &WholeMachine, world: &World, on: &[On]) -> Found {
        m.for_free(|| {
            self.no_complaint()?;
            self.growth(m, world)?;
            caches(m, world, None)?;
            places(world, on)
        })
    }

    fn no_complaint(&self) -> Found {
        let silent = crate::complaints() == self.complaints;
        if silent { Ok(()) } else { Err("the rules complained about themselves".into()) }
    }

    fn recount(&mut self, m: &WholeMachine, world: &World, domains: &[&Domain], on: &[On]) -> Found {
        self.words.read(&world.frames);
        if self.words.count() != self.keepers.len() {
            return Err(format!("the frame table has words for {} frames", self.words.count()));
        }
        self.tally.begin(self.keepers.len());
        self.keepers.fill(None);
        self.pinned.clear();
        for (frame, Info { owner, kind }) in self.words.iter() {
            if let (true, Owner::Guest(id)) = (kind.pinned, owner.owner) {
                self.pinned.push((id, frame, kind.used_as));
            }
            if let (true, keeper @ (Owner::Guest(_) | Owner::Orphan)) = (owner.allocated, owner.owner) {
                self.keepers[frame.index()] = Some(keeper); // the domain's own: nothing else says so
            }
        }
        self.kept(Frame::from_u32(0), Owner::Hypervisor)?;
        for n in 0..self.reserve.len() {
            self.kept(self.reserve[n], Owner::Hypervisor)?;
        }
        let mut pins: BTreeMap<(DomainId, u32, Frame), [u64; 2]> = BTreeMap::new();
        for domain in domains {
            self.domain(m, world, domain, on)?;
            unsearched(m, domain)?;
            for handle in handles(m, domain) {
                let owner = self.words.get(handle.frame).map(|info| info.owner.owner);
                self.tally.held(handle.frame, owner, domain.id(), handle.writable)?;
                let counts = pins.entry((handle.owner, handle.gref, handle.frame)).or_default();
                counts[usize::from(handle.writable)] += 1;
            }
        }
        for domain in domains {
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
        let orphaned = pins.keys().find(|(owner, ..)| domains.iter().any(|domain| domain.id() == *owner));
        orphaned.map_or(Ok(()), |pin| Err(format!("P6: {pin:?} is held, but not in use")))
    }

    fn domain(&mut self, m: &WholeMachine, world: &World, domain: &Domain, on: &[On]) -> Found {
        let id = domain.id();
        for frame in domain.shared_info().into_iter().chain(domain.grants.table_frames()) {
            self.kept(frame, Owner::Lent(id))?;
            self.tally.used(frame, Use::Writable)?;
        }
        for frame in domain.port_frames().chain(domain.grants.active_frames()).chain(domain.grants.handle_frames()) {
            self.kept(frame, Owner::Hypervisor)?;
        }
        for vcpu in world.vcpus_of(domain) {
            let taken = vcpu.state.try_take();
            let own = match (&taken, on.iter().find(|on| on.vcpu == vcpu.index())) {
                (Some(own), _) => own,
                (None, Some(on)) => &on.own,
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
        for (_, frame, used_as) in self.pinned.iter().filter(|(owner, ..)| *owner == id) {
            let level = used_as.level().ok_or_else(|| format!("P2: {frame:?} is pinned as no table"))?;
            self.tally.pinned(*frame, level)?;
        }
        self.tally.unfinished(&session)?;
        let memory = Seeing {
            m,
            table: &self.words,
            id,
            devices: domain.space.devices.known().collect(),
            foreign: RefCell::default(),
        };
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
        for ((frame, info), &keeper) in self.words.iter().zip(&self.keepers) {
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

    /// P13: a domain that owns more frames than before owns no more than it might since the last audit of all. A limit may
    /// have been raised, used and lowered since: the machine notes limits whenever the turn passes to another CPU.
    fn growth(&mut self, m: &WholeMachine, world: &World) -> Found {
        m.note_limits(world);
        for domain in there(world) {
            let (id, owned) = (domain.id(), world.frames.owned(domain.id()));
            let before = self.owned.insert(id, owned).unwrap_or(0);
            let limit = m.highest_limit(id);
            if owned > before && u64::from(owned) > limit {
                return Err(format!("P13: {id} owns {owned} frames and might have {limit}"));
            }
        }
        Ok(())
    }

    /// P13: domains own what is counted; and what the hypervisor keeps for a domain, and what is set aside for it, is together
    /// what a domain may need.
    fn set_aside(&mut self, world: &World, domains: &[&Domain]) -> Found {
        let ids: Vec<DomainId> = domains.iter().map(|domain| domain.id()).collect();
        books(&world.frames, &self.words, world.frames.free_frames(), &ids)?;
        self.owned.retain(|id, _| ids.contains(id));
        for domain in domains {
            let id = domain.id();
            let (kept, needed) = (keeps(world, domain), kept_frames(world.vcpus_of(domain).count() as u32));
            let promised = world.frames.promised(id);
            if domain.life() == Life::Alive && kept + promised != needed {
                return Err(format!("P13: {kept} frames are kept for {id}, {promised} set aside, {needed} needed"));
            }
        }
        Ok(())
    }
}

/// The domains there are.
fn there(world: &World) -> impl Iterator<Item = &Domain> {
    world.domains.iter().filter(|domain| domain.life() != Life::Free)
}

/// What CPUs may remember is true still, or harmless: by the words of the frames, and by what was recounted, if it was.
fn caches(m: &WholeMachine, world: &World, tally: Option<&Tally>) -> Found {
    for c in m.cached() {
        let info = world.frames.info(c.frame).ok_or("no words")?;
        if info.kind.count > 0 && c.seen.harms(info.kind.used_as) {
            return Err(format!("P4: {c:?}, but it is {:?} now", info.kind));
        }
        if let Some(tally) = tally.filter(|tally| tally[c.frame].is_harmed_by(c.seen)) {
            return Err(format!("P4: {c:?}, but it is {:?} now", tally[c.frame].used_as));
        }
        let owner = owner_number(&world.frames, c.frame);
        if owner != c.turn && owner != 0 {
            return Err(format!("P4: {c:?}, and now it is {:?}'s", info.owner));
        }
    }
    Ok(())
}

/// A vcpu that is to run on is on the CPU where the scheduler has it, and on no other.
fn places(world: &World, on: &[On]) -> Found {
    for it in on.iter().filter(|on| on.stays) {
        let place = world.vcpus[usize::from(it.vcpu)].place();
        if place != Place::Running(it.cpu) {
            return Err(format!("vcpu {} runs on {:?}, and is {place:?}", it.vcpu, it.cpu));
        }
    }
    Ok(())
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

/// No handle before the one from which a search begins is free: it would be lost.
fn unsearched(m: &WholeMachine, domain: &Domain) -> Found {
    let first = domain.grants.first_free();
    for (number, frame) in (0u32..).step_by(256).zip(domain.grants.handle_frames()) {
        for handle in (number..number + 256).take_while(|handle| *handle < first) {
            if m.peek(frame, 2 * (handle - number) as usize) == 0 {
                return Err(format!("{} has the free handle {handle}, and looks from {first} on", domain.id()));
            }
        }
    }
    Ok(())
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
fn ports(m: &WholeMachine, world: &World, domains: &[&Domain]) -> Found {
    for vector in FIRST_MESSAGE..=u8::MAX {
        let Some((id, port)) = world.message_taker(vector) else { continue };
        // One that is being destroyed has its ports until its vcpus have left their CPUs.
        let taker = domains.iter().find(|domain| domain.id() == id);
        let binding = taker.map(|taker| world.port(m, taker, port).binding);
        if binding != Some(Binding::Message(vector)) {
            return Err(format!("P5: vector {vector:#x} leads to {id} {port:?}, which is {binding:?}"));
        }
    }
    for domain in domains.iter().filter(|domain| domain.life() == Life::Alive) {
        let id = domain.id();
        for (port, state) in bound(m, domain) {
            match state.binding {
                Binding::Interdomain(other, at) => {
                    // One that is being destroyed has its ports until its vcpus have left their CPUs.
                    let other_end = domains.iter().find(|domain| domain.id() == other);
                    let end = other_end.map(|other| world.port(m, other, at).binding);
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
                Binding::Message(vector) => {
                    let taker = world.message_taker(vector);
                    if taker != Some((id, port)) {
                        return Err(format!("P5: {id} {port:?} takes vector {vector:#x}, which leads to {taker:?}"));
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

/// A vcpu is in one queue exactly once if it is to be, and in none otherwise.
fn queues(m: &WholeMachine, world: &World) -> Found {
    let mut all = Vec::new();
    for cpu in 0..m.cpu_count() as u32 {
        let queue = world.run_queue(CpuId(cpu));
        let (queue, waiting) =
            queue.ok_or_else(|| format!("the urgent vcpus in the queue of CPU {cpu} are miscounted"))?;
        if queue.len() != usize::from(waiting) {
            return Err(format!("{} in the run queue of CPU {cpu}, counted as {waiting}", queue.len()));
        }
        all.extend(queue);
    }
    for (index, vcpu) in (0u16..).zip(&world.vcpus) {
        let times = all.iter().filter(|other| **other == index).count();
        let queued = vcpu.place() == Place::Queued && world.domain_of(vcpu).is_some();
        if times != usize::from(queued) {
            return Err(format!("vcpu {index} ({queued}) is {:?} and {times} times in a run queue", vcpu.place()));
        }
        let may_run = vcpu.is_online() && world.domain_of(vcpu).is_some_and(Domain::runs);
        if may_run && vcpu.place() == Place::Off {
            return Err(format!("vcpu {index} may run, and nobody has it run"));
        }
    }
    Ok(())
}

/// The timer of a CPU fires in time for every vcpu of a living domain whose deadlines it keeps, and for the one that runs
/// there; or the CPU has been kicked, and will look.
fn timers(m: &WholeMachine, world: &World) -> Found {
    let alive = |vcpu: &&Vcpu| world.domain_of(vcpu).is_some_and(|domain| domain.life() == Life::Alive);
    for vcpu in world.vcpus.iter().filter(alive) {
        let cpu = vcpu.last_cpu();
        let (armed, kicked) = (m.armed_at(cpu.0 as usize), m.is_kicked(cpu.0 as usize));
        let (index, deadline) = (vcpu.index(), vcpu.earliest());
        if deadline != u64::MAX && !world.keeps_deadlines(cpu, vcpu) {
            return Err(format!("vcpu {index} has a deadline, and {cpu:?} does not keep it"));
        }
        if deadline < armed && !kicked {
            return Err(format!("vcpu {index} has a deadline at {deadline}, and {cpu:?} looks at {armed}"));
        }
        if let (Place::Running(on), Some(tick)) = (vcpu.place(), vcpu.next_tick())
            && on == cpu
            && tick < armed
            && !kicked
        {
            return Err(format!("vcpu {index} ticks at {tick}, and {cpu:?} looks at {armed}"));
        }
    }
    Ok(())
}
