//! Which domains there are: they come, get memory, and go.

use super::{CONTROLLER, EPISODE, Everybody, Mood, RESERVE};
use crate::world::audit::keeps;
use crate::world::calls::Model;
use crate::world::{Context, build, crowd};
use hv_core::addr::DomainId;
use hv_core::domain::{Domain, Life, Powers, Spec};
use hv_core::lock::{Held, Nothing};
use hv_core::machine::Frames;
use hv_core::vcpu::Place;
use hv_core::world::CpuCtx;
use std::ops::ControlFlow;

impl Everybody {
    /// Makes a domain with every power, as boot does.
    pub(in crate::world) fn controller(&mut self, held: &mut Held<Nothing>) -> ControlFlow<()> {
        let powers = Powers::all();
        let vcpus = if self.mood == Mood::Crowded { crowd::VCPUS } else { 2 };
        let spec = Spec { id: None, powers, vcpus, max_pages: 0, handle: [7; 16] };
        let limit = self.m.frame_limit() as u32;
        let created = CpuCtx { m: self.m, world: self.world, held: &mut *held }.create(&spec).map(Domain::id);
        match created.map(|id| self.world.domain(id).expect("it lives")) {
            Ok(domain) => {
                domain.space.devices.allow(limit..limit + 2).expect("it has none yet");
                self.build(held, domain)
            }
            Err(_) => {
                self.note("worlds given up for lack of memory");
                self.end()
            }
        }
    }

    fn build(&mut self, held: &mut Held<Nothing>, domain: &Domain) -> ControlFlow<()> {
        // With several CPUs, most domains use two from the beginning.
        let vcpus = match self.mood {
            Mood::Crowded => crowd::VCPUS,
            _ if self.m.cpu_count() > 1 && !self.rng.one_in(4) => 2,
            _ => 1,
        };
        match build::build(self.m, self.world, held, domain, vcpus) {
            Ok(pages) => {
                self.models.insert(domain.id().0, Model { pages, ..Model::default() });
                self.note("domains built");
            }
            Err(_) => {
                self.models.insert(domain.id().0, Model::default());
                self.note("domains that got too little memory");
            }
        }
        ControlFlow::Continue(())
    }

    pub(super) fn alive(&self) -> impl Iterator<Item = &'static Domain> + use<> {
        self.world.domains.iter().filter(|domain| domain.life() != Life::Free)
    }

    /// Whether a domain has a vcpu that may run one day.
    fn able(&self, domain: &Domain) -> bool {
        let mut vcpus = self.world.vcpus_of(domain);
        domain.runs() && vcpus.any(|vcpu| vcpu.is_online() && vcpu.place() != Place::Off)
    }

    /// Domains that were made by a call get their memory; if nobody who controls others is left, a new one comes.
    pub(in crate::world) fn attend(&mut self, held: &mut Held<Nothing>) -> ControlFlow<()> {
        if self.mood == Mood::Crowded {
            self.forgotten()?;
            return self.gather_crowd(held);
        }
        let new: Vec<&Domain> = self
            .alive()
            .filter(|domain| domain.life() == Life::Alive && !self.models.contains_key(&domain.id().0))
            .collect();
        for domain in new {
            self.build(held, domain)?;
        }
        self.models.retain(|id, _| self.world.domains.iter().any(|d| d.life() != Life::Free && d.id().0 == *id));
        if let Mood::Reaping(id) = self.mood
            && let Some(reaper) = self.world.domain(id)
        {
            self.world.unpause(self.m, reaper);
        }
        let reaps = |domain: &Domain| match self.mood {
            Mood::Reaping(id) => domain.id() == id && self.able(domain),
            Mood::Hostile | Mood::Crowded | Mood::Paired => false,
        };
        if self.episode >= EPISODE && !self.alive().any(reaps) {
            self.make_room();
            self.controller(held)?;
            let newest = self.alive().filter(|domain| domain.may(Powers::CONTROL) && self.able(domain));
            let reaper = newest.max_by_key(|domain| domain.id());
            self.mood = reaper.map_or(Mood::Hostile, |reaper| Mood::Reaping(reaper.id()));
        } else if !self.controlled() {
            self.make_room();
            self.controller(held)?;
            self.note("controllers replaced");
        }
        self.set_aside();
        ControlFlow::Continue(())
    }

    /// Whether a domain controls others, or does when it is not kept paused any more.
    fn controlled(&self) -> bool {
        let controls = |domain: &&Domain| domain.life() == Life::Alive && domain.may(Powers::CONTROL);
        if !self.alive().filter(controls).any(|domain| self.able(domain)) {
            self.alive().filter(controls).for_each(|domain| self.world.unpause(self.m, domain));
        }
        self.alive().filter(controls).any(|domain| self.able(domain))
    }

    /// The guests may have all the memory: what was set aside is for a domain that must come.
    fn make_room(&mut self) {
        // No more than one domain needs: the next may have to come before anything has been returned.
        let left = self.audit.reserve.len().saturating_sub(CONTROLLER);
        self.audit.reserve.drain(left..).for_each(|frame| self.world.frames.retire(frame));
    }

    fn set_aside(&mut self) {
        while self.audit.reserve.len() < RESERVE && self.world.frames.unpromised_frames() > 0 {
            self.audit.reserve.extend(self.world.frames.allocate(self.m));
        }
    }

    /// All but the reaper are gone: nothing may be left of them.
    pub(super) fn funeral(&mut self, ctx: &Context<'_>, reaper: DomainId) -> ControlFlow<()> {
        let owned = self.world.frames.owned(reaper);
        let kept = owned + keeps(ctx.world, ctx.domain) + self.audit.reserve.len() as u32;
        let free = self.world.frames.free_frames();
        if free + kept != self.free {
            return self.fail(format!("P11: {free} frames free and {kept} in use of {} at the beginning", self.free));
        }
        self.note("times everything was destroyed");
        (self.mood, self.episode) = (Mood::Hostile, 0);
        if self.steps >= self.wanted { self.end() } else { ControlFlow::Continue(()) }
    }
}
