//! Calls of domains: each is carried out by the rules under test, and what it changes is noted in the books.

use super::{Dom, FAMILIES, LIMIT, Op, World};
use crate::machine::SimMachine;
use hv_core::addr::{CpuId, DomainId, Frame, GuestVirt};
use hv_core::frame::table::NO_PFN;
use hv_core::frame::{Owner, Refused};
use hv_core::lock::Held;
use hv_core::paging::{Holding, Outcome, Session, Slot, Stop};
use hypercall_abi::mmu::MmuUpdate;

impl World {
    pub(super) fn session(
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

    /// Carries a call out and notes what it changed.
    fn perform(&mut self, at: usize, op: Op, budget: u32) -> Result<Outcome<()>, String> {
        let id = self.doms[at].space.id();
        Ok(match op {
            Op::Update { address, value } => self.update(at, address, value, budget),
            Op::Batch { requests, done } => {
                let rest = requests[done..].iter().map(|&(ptr, val)| MmuUpdate { ptr, val });
                let (rest, mut done) = (rest.collect::<Vec<_>>(), 0);
                let outcome = self.session(at, budget, |s| s.mmu_updates(&rest, id, &mut done));
                self.done = done;
                outcome
            }
            Op::Va { vcpu, at: va, value } => {
                self.root(at, vcpu).and_then(|root| self.session(at, budget, |s| s.update_va(root, va, value, id)))
            }
            Op::Pin { frame, level } => self.pin(at, frame, level, budget)?,
            Op::Unpin { frame } => self.unpin(at, frame, budget)?,
            Op::Root { vcpu, user, new } => self.switch_root(at, vcpu, user, new, budget),
            Op::TableWrite { vcpu, at: va, new, exchange } => self.table_write(at, (vcpu, va), new, exchange, budget),
            Op::TakeDescriptors { frame } => {
                let done = self.session(at, budget, |s| s.take_descriptors(frame));
                if done.is_ok() {
                    self.doms[at].descriptors.push(frame);
                }
                done
            }
            Op::DropDescriptors { frame } => self.drop_use(at, frame, |dom| &mut dom.descriptors),
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
            Op::LetGo { frame } => self.drop_use(at, frame, |dom| &mut dom.holds),
            Op::Populate { pfn } => self.populate(id, pfn)?,
            Op::Release { frame } => self.release(id, frame),
            Op::Clear { frame, from } => self.session(at, budget, |s| s.clear_page(frame, from)),
            Op::Copy { source, target } => self.session(at, budget, |s| s.copy_page(source, target, id)),
            Op::TearDown => self.tear_down(at, budget)?,
        })
    }

    /// The kernel's root of a vcpu.
    fn root(&self, at: usize, vcpu: usize) -> Outcome<Frame> {
        self.doms[at].roots[vcpu][0].ok_or(Stop::Refused(Refused::NotMapped))
    }

    fn update(&mut self, at: usize, address: u64, value: u64, budget: u32) -> Outcome<()> {
        let id = self.doms[at].space.id();
        let done = self.session(at, budget, |s| s.mmu_update(address, value, id));
        if done.is_ok() && address & 7 == 1 {
            self.known[Frame::containing(address).expect("it was found").index()].pfn = value;
        }
        done
    }

    fn pin(&mut self, at: usize, frame: Frame, level: u8, budget: u32) -> Result<Outcome<()>, String> {
        let done = self.session(at, budget, |s| s.pin(frame, level));
        if done.is_ok() {
            if self.doms[at].pins.insert(frame, level).is_some() {
                return Err(format!("{frame:?} pinned twice"));
            }
            self.totals.roots_pinned += u64::from(level == 4);
        }
        Ok(done)
    }

    fn unpin(&mut self, at: usize, frame: Frame, budget: u32) -> Result<Outcome<()>, String> {
        let done = self.session(at, budget, |s| s.unpin(frame));
        if done.is_ok() && self.doms[at].pins.remove(&frame).is_none() {
            return Err(format!("{frame:?} unpinned but was not pinned"));
        }
        Ok(done)
    }

    /// A store of a vcpu to a table that it sees read-only.
    fn table_write(
        &self,
        at: usize,
        (vcpu, va): (usize, GuestVirt),
        new: u64,
        exchange: bool,
        budget: u32,
    ) -> Outcome<()> {
        let root = self.root(at, vcpu)?;
        self.session(at, budget, |s| {
            let found = s.find_table_write(root, va)?;
            let left = s.write_table(found.slot, exchange.then_some(found.value), new)?;
            assert_eq!(left, None, "nobody else writes here");
            Ok(())
        })
    }

    /// Drops a use of a frame that stands in a list of the domain.
    fn drop_use(&mut self, at: usize, frame: Frame, list: impl Fn(&mut Dom) -> &mut Vec<Frame>) -> Outcome<()> {
        let held = list(&mut self.doms[at]);
        let n = held.iter().position(|f| *f == frame).ok_or(Stop::Refused(Refused::NotOwner))?;
        held.remove(n);
        self.table.drop_use(frame, self.doms[at].space.id());
        Ok(())
    }

    fn populate(&mut self, id: DomainId, pfn: u64) -> Result<Outcome<()>, String> {
        match self.table.populate(&self.m, id, 0, pfn, LIMIT) {
            Ok(got) => self.handed_out(got, Owner::Guest(id), pfn).map(Ok),
            Err(why) => Ok(Err(why.into())),
        }
    }

    fn release(&mut self, id: DomainId, frame: Frame) -> Outcome<()> {
        let done = self.table.give_back(&self.m, frame, id).map_err(Stop::Refused);
        if done.is_ok() {
            let known = &mut self.known[frame.index()];
            (known.allocated, known.pfn) = (false, NO_PFN);
        }
        done
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
}
