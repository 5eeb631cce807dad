//! Recounts, from memory and the books, what every frame is used for (P1-P3, P6), what CPUs may remember (P4), who is
//! joined to whom (P5), and who waits for a CPU; then compares.

use super::life::Context;
use super::machine::WholeMachine;
use crate::machine::{HOLE_MARK, Seen};
use hv_core::addr::{DomainId, Frame, HOLE_SLOTS, Port};
use hv_core::audit::Held;
use hv_core::domain::vcpu::{Place, Vcpu, VcpuState};
use hv_core::domain::{Domain, Life, Powers};
use hv_core::event::port::{Binding, PortState};
use hv_core::frame::{Owner, Use};
use hv_core::grant::Grants;
use hv_core::lock;
use hv_core::paging::entry::{CACHE, GLOBAL, Target, USER, target};
use hv_core::paging::{Holding, Sweep};
use hv_core::world::World;
use hypercall_abi::grant::ENTRIES_PER_FRAME;
use std::collections::BTreeMap;

/// What a frame should look like.
#[derive(Clone, Debug)]
struct Expect {
    /// Who keeps it besides those who use it.
    keeper: Option<Owner>,
    used_as: Use,
    uses: u32,
    plain: u32,
    partial: Option<usize>,
    /// How many of all those are of domains that do not own it.
    others: u16,
    scanned: bool,
}

const NOTHING: Expect =
    Expect { keeper: None, used_as: Use::None, uses: 0, plain: 0, partial: None, others: 0, scanned: false };

/// Room to recount in, and what is remembered between two audits.
pub struct Audit {
    expect: Vec<Expect>,
    todo: Vec<(Frame, u8, usize)>,
    /// Domains whose frames leave them without being counted down.
    leaving: Vec<DomainId>,
    /// What each frame that a CPU may remember was when it was remembered.
    remembered: BTreeMap<(Frame, u8), Owner>,
    complaints: u64,
    /// Frames set aside from outside.
    pub reserve: Vec<Frame>,
}

type Found = Result<(), String>;

impl Audit {
    /// An audit of a machine of so many frames.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self {
            expect: vec![NOTHING; frames],
            todo: Vec::new(),
            leaving: Vec::new(),
            remembered: BTreeMap::new(),
            complaints: crate::complaints(),
            reserve: Vec::new(),
        }
    }

    fn used(&mut self, frame: Frame, want: Use) -> Found {
        let Some(e) = self.expect.get_mut(frame.index()) else {
            return Err(format!("P3: {frame:?} is no RAM, but used as {want:?}"));
        };
        if e.uses > 0 && e.used_as != want {
            return Err(format!("P1: {frame:?} is used as {:?} and as {want:?}", e.used_as));
        }
        (e.used_as, e.uses) = (want, e.uses + 1);
        Ok(())
    }

    /// Notes a use or reference that a domain holds: another than the owner's outlives the owner.
    fn held(&mut self, world: &World, frame: Frame, by: DomainId) {
        let owner = world.frames.info(frame).map(|info| info.owner.owner);
        if matches!(owner, Some(Owner::Guest(id) | Owner::Lent(id)) if id != by) {
            self.expect[frame.index()].others += 1;
        }
    }

    fn kept(&mut self, frame: Frame, owner: Owner) -> Found {
        match self.expect[frame.index()].keeper.replace(owner) {
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
        let work = m.work.load(std::sync::atomic::Ordering::Relaxed);
        let current = current.map(|ctx| (ctx.vcpu, &*ctx.own));
        let found = self
            .recount(m, world, current)
            .and_then(|()| self.compare(m, world))
            .and_then(|()| self.caches(m, world))
            .and_then(|()| ports(m, world))
            .and_then(|()| queue(world));
        m.work.store(work, std::sync::atomic::Ordering::Relaxed);
        m.set_race(race);
        found
    }

    fn recount(&mut self, m: &WholeMachine, world: &World, current: Option<(&Vcpu, &VcpuState)>) -> Found {
        self.expect.fill(NOTHING);
        self.leaving.clear();
        for n in 0..self.expect.len() {
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
                self.held(world, handle.frame, domain.id());
                if handle.writable {
                    self.used(handle.frame, Use::Writable)?;
                } else {
                    self.expect[handle.frame.index()].plain += 1;
                }
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
            self.used(frame, Use::Writable)?;
        }
        for frame in domain.port_frames().chain(domain.grants.active_frames()).chain(domain.grants.handle_frames()) {
            self.kept(frame, Owner::Hypervisor)?;
        }
        let sweep = domain.space.open(m, &world.frames, 1, &mut lock::Held::entering_ring_0()).sweep();
        let sweep = sweep.filter(|_| domain.life() == Life::Dying);
        if matches!(sweep, Some(Sweep::Frames(_))) {
            self.leaving.push(id); // its tables hold nothing any more
        }
        self.todo.clear();
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
                self.used(frame, Use::L4)?;
                self.todo.push((frame, 4, 512));
            }
            for frame in own.gdt.iter().chain(&own.ldt_mapped).flatten() {
                self.used(*frame, Use::Descriptors)?;
                descriptors(m, *frame)?;
            }
            if let Some(frame) = vcpu.info_frame().filter(|frame| Some(*frame) != domain.shared_info()) {
                self.used(frame, Use::Writable)?;
            }
        }
        if self.leaving.contains(&id) {
            return Ok(());
        }
        for n in 0..self.expect.len() {
            let frame = Frame::from_u32(n as u32);
            let info = world.frames.info(frame).ok_or("no words")?;
            if info.kind.pinned && info.owner.owner == Owner::Guest(id) {
                let level = info.kind.used_as.level().ok_or(format!("P2: {frame:?} is pinned as no table"))?;
                self.used(frame, info.kind.used_as)?;
                self.todo.push((frame, level, 512));
            }
        }
        {
            let mut held = lock::Held::entering_ring_0();
            let session = domain.space.open(m, &world.frames, 1, &mut held);
            for holding in session.holdings() {
                let (frame, level, counted, on_the_way) = match holding {
                    Holding::OnTheWay { table, level, counted, .. } => (table, level, counted, true),
                    Holding::Waiting { table, level } => (table, level, 512, false),
                };
                self.used(frame, Use::table(level).expect("a level"))?;
                if on_the_way && self.expect[frame.index()].partial.replace(counted).is_some() {
                    return Err(format!("P8: {frame:?} is on the way twice"));
                }
                self.todo.push((frame, level, counted));
            }
        }
        let mut foreign: BTreeMap<Frame, u32> = BTreeMap::new();
        while let Some((frame, level, counted)) = self.todo.pop() {
            if std::mem::replace(&mut self.expect[frame.index()].scanned, true) {
                continue;
            }
            let owner = world.frames.info(frame).ok_or("no words")?.owner.owner;
            if owner != Owner::Guest(id) {
                return Err(format!("P3: {id} uses {frame:?} of {owner:?} as a table"));
            }
            let partial = self.expect[frame.index()].partial;
            let counted = partial.unwrap_or(counted);
            let list: Vec<(usize, u64)> = m.words(frame, <[_]>::to_vec);
            let mut hole = 0;
            for (slot, raw) in list {
                if level == 4 && HOLE_SLOTS.contains(&slot) {
                    hole += 1;
                    if partial.is_none() && raw != HOLE_MARK | (slot - HOLE_SLOTS.start) as u64 {
                        return Err(format!("P3: slot {slot} of root {frame:?} holds {raw:#x}"));
                    }
                } else if slot < counted && raw & 1 != 0 {
                    let swept = matches!(sweep, Some(Sweep::Tables(from)) if level == 1 && frame.as_u32() < from);
                    if let (true, Target::Leaf { frame: to, .. }) = (swept, target(raw, level))
                        && world.frames.info(to).is_none_or(|info| info.owner.owner != Owner::Guest(id))
                    {
                        continue;
                    }
                    self.entry(world, id, level, raw, &mut foreign)
                        .map_err(|why| format!("{why}: {id} {frame:?} level {level} slot {slot} {raw:#x}"))?;
                }
            }
            if level == 4 && partial.is_none() && hole != HOLE_SLOTS.len() {
                return Err(format!("P3: root {frame:?} lacks slots of the hypervisor"));
            }
        }
        if domain.life() == Life::Alive && !domain.may(Powers::CONTROL) {
            for (frame, entries) in foreign {
                let granted =
                    handles(m, domain).into_iter().filter(|handle| handle.host && handle.frame == frame).count();
                if granted < entries as usize {
                    return Err(format!("P3: {id} maps {frame:?} {entries} times and has {granted} grants of it"));
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, world: &World, id: DomainId, level: u8, raw: u64, foreign: &mut BTreeMap<Frame, u32>) -> Found {
        if raw & USER == 0 || raw & GLOBAL != 0 {
            return Err("4.2: a bit no guest may set".into());
        }
        match target(raw, level) {
            Target::Nothing => Err("P3: leads beyond memory".into()),
            Target::Leaf { frame, .. } if frame.index() >= self.expect.len() => Err("P3: a device".into()),
            Target::Leaf { frame, writable } => {
                match world.frames.info(frame).ok_or("no words")?.owner.owner {
                    Owner::Guest(owner) | Owner::Lent(owner) if owner == id => {}
                    Owner::Guest(_) | Owner::Lent(_) | Owner::Orphan => *foreign.entry(frame).or_default() += 1,
                    owner => return Err(format!("P3: a leaf to a frame of {owner:?}")),
                }
                self.held(world, frame, id);
                if raw & CACHE != 0 {
                    return Err("XSA-402: RAM not write-back".into());
                }
                if writable {
                    return self.used(frame, Use::Writable);
                }
                self.expect[frame.index()].plain += 1;
                Ok(())
            }
            Target::Table(frame) => {
                if raw & 0x180 != 0 {
                    return Err("XSA-148: a large page".into());
                }
                self.used(frame, Use::table(level - 1).ok_or("P3: a table below L1")?)?;
                self.todo.push((frame, level - 1, 512));
                Ok(())
            }
        }
    }

    fn compare(&self, m: &WholeMachine, world: &World) -> Found {
        let mut free = 0;
        for (n, e) in self.expect.iter().enumerate() {
            let frame = Frame::from_u32(n as u32);
            let info = world.frames.info(frame).ok_or("no words")?;
            let (kind, owner) = (info.kind, info.owner);
            let held = e.uses + e.plain;
            // What a domain being destroyed held of its own frames goes with them.
            let uncounted = matches!(owner.owner, Owner::Guest(id) if self.leaving.contains(&id));
            match (e.keeper, owner.owner) {
                (Some(keeper), owner) if keeper != owner => {
                    return Err(format!("I1: {frame:?} is kept by {keeper:?}, but is {owner:?}'s"));
                }
                (Some(_), _) => {}
                (None, Owner::Free) if held == 0 => free += 1,
                (None, Owner::Guest(_) | Owner::Orphan | Owner::Lent(_)) if held > 0 || uncounted => {}
                _ => return Err(format!("P11: {frame:?} is {owner:?}, but {e:?}")),
            }
            if owner.others != e.others {
                return Err(format!("P2: others hold {frame:?} as {owner:?}, but {e:?}"));
            }
            if !owner.allocated && m.m2p(frame) != u64::MAX {
                return Err(format!("P10: the machine-to-physical entry of {frame:?} is {:#x}", m.m2p(frame)));
            }
            if uncounted {
                continue;
            }
            if owner.refs != held + u32::from(e.keeper.is_some()) {
                return Err(format!("P2: {frame:?} has references {owner:?}, but {e:?}"));
            }
            if owner.owner == Owner::Orphan && kind.count >= e.uses {
                continue;
            }
            if kind.count != e.uses || e.uses > 0 && kind.used_as != e.used_as {
                return Err(format!("P2: {frame:?} has uses {kind:?}, but {e:?}"));
            }
            if e.uses > 0 && (kind.partial != e.partial.is_some() || kind.validated == kind.partial) {
                return Err(format!("I6: {frame:?} is {kind:?}, but {e:?}"));
            }
        }
        if world.frames.free_frames() != free {
            return Err(format!("P11: {} frames in the pool, {free} are free", world.frames.free_frames()));
        }
        Ok(())
    }

    /// What the CPU may remember is true still, or harmless.
    fn caches(&mut self, m: &WholeMachine, world: &World) -> Found {
        let cached = m.cached.lock().expect("one thread");
        self.remembered.retain(|(frame, _), _| cached.iter().any(|c| c.frame == *frame));
        for c in cached.iter() {
            let e = &self.expect[c.frame.index()];
            let harmful = match c.seen {
                Seen::Page { writable } => writable && e.uses > 0 && e.used_as != Use::Writable,
                Seen::Table(level) => e.uses > 0 && Use::table(level) != Some(e.used_as),
            };
            if harmful {
                return Err(format!("P4: {c:?}, but it is {:?} now", e.used_as));
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

fn descriptors(m: &WholeMachine, frame: Frame) -> Found {
    m.words(frame, |words| {
        for (_, word) in words {
            let present = word >> 47 & 1 == 1;
            let system = word >> 44 & 1 == 0 && word >> 40 & 0xf != 0;
            if present && (system || word >> 44 & 1 == 1 && word >> 45 & 3 != 3) {
                return Err(format!("P12: {frame:?} holds descriptor {word:#x}"));
            }
        }
        Ok(())
    })
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
    let (queue, waiting) = world.run_queue();
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
