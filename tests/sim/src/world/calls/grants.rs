//! Calls about grants.

use super::{Args, Pen};
use crate::world::build::{self, SLOTS, page};
use hypercall_abi::domid;
use hypercall_abi::grant::{
    Copy as GrantCopy, CopySide, GetVersion, GrantOp, MapGrantRef, QuerySize, SetVersion, SetupTable, UnmapAndReplace,
    UnmapGrantRef,
};

impl Pen<'_, '_> {
    /// A reference that somebody has granted to the caller, most of the time.
    fn granted(&mut self) -> (u16, u32) {
        let me = self.ctx.domain.id().0;
        let mut all = Vec::new();
        for domain in self.others().into_iter().chain([self.ctx.domain]) {
            if let Some(table) = domain.grants.table_frames().next() {
                let grants = (0..24u32).filter(|gref| {
                    let word = self.ctx.m.peek(table, *gref as usize);
                    word & 3 == 1 && word >> 16 & 0xffff == u64::from(me)
                });
                all.extend(grants.map(|gref| (domain.id().0, gref)));
            }
        }
        match self.rng.pick(&all) {
            Some(one) if !self.rng.one_in(5) => one,
            _ => (if self.rng.one_in(6) { self.domid() } else { self.other() }, self.gref()),
        }
    }

    /// A reference somebody may have granted.
    fn gref(&mut self) -> u32 {
        self.small32(24)
    }

    /// An operation: most of them take a list, at whose first element `status` is.
    pub(super) fn grant(&mut self, args: &mut Args, status: &mut Option<u64>) -> &'static str {
        const OFTEN: [GrantOp; 7] = [
            GrantOp::MapGrantRef,
            GrantOp::MapGrantRef,
            GrantOp::UnmapGrantRef,
            GrantOp::UnmapGrantRef,
            GrantOp::UnmapAndReplace,
            GrantOp::Copy,
            GrantOp::SetupTable,
        ];
        let all = if self.rng.one_in(3) { GrantOp::ALL } else { &OFTEN[..] };
        let (op, number) = self.op(all, |op| u64::from(op as u32));
        args[0] = number;
        args[2] = self.mostly(&[1, 1, 1, 1, 1, 0, 2]);
        let (list, status_at) = match op {
            Some(GrantOp::MapGrantRef) => (self.grants_to_map(), 18),
            Some(GrantOp::UnmapGrantRef) => (self.grants_to_unmap(), 20),
            Some(GrantOp::UnmapAndReplace) => (self.grants_to_replace(), 20),
            Some(GrantOp::Copy) => (self.grants_to_copy(), 36),
            op => {
                args[1] = self.grant_table(op, status);
                return op.map_or("?", GrantOp::name);
            }
        };
        (args[1], args[2]) = list;
        *status = Some(args[1].wrapping_add(status_at));
        op.map_or("?", GrantOp::name)
    }

    fn grants_to_map(&mut self) -> (u64, u64) {
        self.list(3, |pen| {
            let contains = pen.rng.one_in(6);
            let slot = (build::PAGES + pen.rng.below(SLOTS - build::PAGES)) as u64;
            let host_addr = if contains { pen.page(page::L1) << 12 | slot << 3 } else { pen.play() };
            let flags = pen.mostly(&[2, 2, 6, 3, 1, 5]) as u32 | if contains { 16 } else { 0 };
            let (dom, gref) = pen.granted();
            MapGrantRef { host_addr, flags, gref, dom, ..Default::default() }
        })
    }

    fn grants_to_unmap(&mut self) -> (u64, u64) {
        self.list(2, |pen| {
            let known = pen.rng.pick(&pen.model.handles).unwrap_or_default();
            let host_addr = pen.mostly(&[known.1, known.1, known.1, 0]);
            let dev_bus_addr = pen.mostly(&[known.2, 0, 0]);
            let handle = if pen.rng.one_in(10) { pen.edge32() } else { known.0 };
            UnmapGrantRef { host_addr, dev_bus_addr, handle, ..Default::default() }
        })
    }

    fn grants_to_replace(&mut self) -> (u64, u64) {
        self.list(2, |pen| {
            let known = pen.rng.pick(&pen.model.handles).unwrap_or_default();
            let (host_addr, new_addr) = (pen.mostly(&[known.1, known.1, 0]), pen.rng.pick(&[0, 1, 2, 3]));
            let new_addr = if new_addr == Some(0) { 0 } else { pen.play() };
            UnmapAndReplace { host_addr, new_addr, handle: known.0, ..Default::default() }
        })
    }

    fn grants_to_copy(&mut self) -> (u64, u64) {
        self.list(3, |pen| {
            let flags = pen.below(4) as u16;
            let (source, dest) = (pen.copy_side(flags & 1 != 0), pen.copy_side(flags & 2 != 0));
            let len = pen.mostly(&[1, 64, 96, 4096]) as u16;
            GrantCopy { source, dest, len, flags, ..Default::default() }
        })
    }

    fn copy_side(&mut self, by_grant: bool) -> CopySide {
        let (dom, gref) = self.granted();
        let gref_or_frame = if by_grant { u64::from(gref) } else { self.data_page() };
        let domid = if by_grant { dom } else { domid::SELF };
        CopySide { gref_or_frame, domid, offset: self.mostly(&[0, 100, 4000]) as u16, pad: 0 }
    }

    /// The argument of an operation on the table as a whole.
    fn grant_table(&mut self, op: Option<GrantOp>, status: &mut Option<u64>) -> u64 {
        match op {
            Some(GrantOp::SetupTable) => {
                let dom = self.domid();
                let nr_frames = self.mostly(&[1, 1, 1, 2, 4, 32, 33]) as u32;
                let frame_list = self.place(32 * 8);
                let to = self.put(&SetupTable { dom, nr_frames, frame_list, ..Default::default() });
                *status = Some(to.wrapping_add(8));
                to
            }
            Some(GrantOp::QuerySize) => {
                let dom = self.domid();
                let to = self.put(&QuerySize { dom, ..Default::default() });
                *status = Some(to.wrapping_add(12));
                to
            }
            Some(GrantOp::SetVersion) => {
                let version = self.small32(4);
                self.put(&SetVersion { version })
            }
            Some(GrantOp::GetVersion) => {
                let dom = self.domid();
                self.put(&GetVersion { dom, ..Default::default() })
            }
            _ => self.place(64),
        }
    }
}
