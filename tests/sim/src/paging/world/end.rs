//! The end of a domain.

use super::World;
use hv_core::frame::Owner;
use hv_core::frame::table::NO_PFN;
use hv_core::lock::Held;
use hv_core::paging::{Holding, Outcome};

impl World {
    /// What destroying a domain does outside the rules of paging, then those.
    pub(super) fn tear_down(&mut self, at: usize, budget: u32) -> Result<Outcome<()>, String> {
        self.leave_all(at);
        self.drop_roots(at, budget);
        self.drop_uses(at);
        if !self.doms[at].dying {
            self.doms[at].dying = true;
            self.totals.abandoned += u64::from(self.climbs(at));
        }
        self.doms[at].pending = None;
        let outcome = self.session(at, budget, |s| s.tear_down());
        // It goes through the frames in order; pins it has come to are gone from the books as well.
        let table = &self.table;
        self.doms[at].pins.retain(|f, _| table.info(*f).is_some_and(|i| i.kind.pinned));
        if outcome.is_ok() {
            self.bury(at)?;
        }
        Ok(outcome)
    }

    /// No CPU runs the domain any more.
    fn leave_all(&mut self, at: usize) {
        for cpu in 0..self.running.len() {
            if self.running[cpu].is_some_and(|r| r.0 == at) {
                self.idle(cpu);
            }
        }
    }

    fn drop_roots(&mut self, at: usize, budget: u32) {
        let dom = &mut self.doms[at];
        let mut held = Held::entering_ring_0();
        let mut session = dom.space.open(&self.m, &self.table, budget, &mut held);
        for root in dom.roots.iter_mut().flatten().filter_map(Option::take) {
            session.drop_root(root);
        }
    }

    /// Drops what the domain holds of frames, and retires the frames lent to it.
    fn drop_uses(&mut self, at: usize) {
        let dom = &mut self.doms[at];
        for frame in dom.holds.drain(..).chain(dom.descriptors.drain(..)) {
            self.table.drop_use(frame, dom.space.id());
        }
        for frame in dom.lent.drain(..) {
            self.table.retire(frame);
            let known = &mut self.known[frame.index()];
            (known.owner, known.allocated) = (Owner::Orphan, false);
        }
    }

    /// Whether a table of the domain is on its way up.
    fn climbs(&self, at: usize) -> bool {
        let mut held = Held::entering_ring_0();
        let session = self.doms[at].space.open(&self.m, &self.table, 1, &mut held);
        session.holdings().any(|h| matches!(h, Holding::OnTheWay { up: true, .. }))
    }

    /// Removes a domain that has been torn down from the books.
    ///
    /// # Errors
    /// It still owns frames.
    fn bury(&mut self, at: usize) -> Result<(), String> {
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
        Ok(())
    }
}
