//! Calls about pages: entries of page tables, and memory that comes and goes.

use super::{Args, Invented, Pen};
use crate::world::build::{self, SLOTS, at, page};
use hypercall_abi::memory::{Exchange, MemoryMap, MemoryOp, Reservation};
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, pte};
use hypercall_abi::{Hypercall, domid};
use zerocopy::IntoBytes;

impl Pen<'_, '_> {
    /// A list of updates.
    pub(super) fn mmu_updates(&mut self, args: &mut Args) {
        let (list, count) = self.list(20, Self::mmu_update);
        let count_out = if self.rng.one_in(2) { 0 } else { self.put(&0u32) };
        [args[0], args[1], args[2]] = [list, count, count_out];
        args[3] = match self.rng.below(8) {
            0 => self.edge(),
            1 => u64::from(self.other()) | (u64::from(self.other()) + 1) << 16,
            2 => u64::from(self.other()),
            _ => u64::from(domid::SELF),
        };
    }

    fn mmu_update(&mut self) -> MmuUpdate {
        let val = self.entry();
        let slot = (build::PAGES + self.rng.below(SLOTS - build::PAGES)) as u64;
        let l1 = self.page(page::L1) << 12;
        let ptr = match self.rng.below(10) {
            0 => self.frame() << 12 | 1,
            1 => self.frame() << 12 | self.below(512) << 3,
            2 => self.data_page() << 12 | self.below(512) << 3,
            3 => {
                // An entry of an upper table, which may lead to a table to be.
                let upper = [page::L2, page::L3, page::KERNEL_ROOT, page::USER_ROOT];
                let at = self.rng.pick(&upper).unwrap_or(0);
                let spare = self.rng.pick(&page::SPARE).unwrap_or(0);
                let to = self.page(spare) << 12 | 0x27;
                let slot = self.below(512) << 3;
                return MmuUpdate { ptr: self.page(at) << 12 | slot, val: self.mostly(&[to, 0, val]) };
            }
            4 => l1 | slot << 3 | 2,
            _ => l1 | slot << 3,
        };
        MmuUpdate { ptr, val }
    }

    /// An entry for an address.
    pub(super) fn va_mapping(&mut self, args: &mut Args) {
        [args[0], args[1]] = [self.play(), self.entry()];
        args[2] = match self.rng.below(8) {
            0 => self.edge(),
            1 => self.put(&u64::MAX) & !3 | 1,
            n => n as u64 & 7,
        };
        args[3] = u64::from(self.other());
    }

    /// One operation of `mmuext_op`, or a list.
    pub(super) fn mmuext_ops(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.mmuext_op();
        let first = self.mmuext(op, number as u32);
        let to = self.place(24);
        self.put_at(to, &first);
        let count_out = if self.rng.one_in(2) { 0 } else { self.put(&0u32) };
        [args[0], args[1], args[2]] = [to, 1, count_out];
        if self.rng.one_in(4) {
            let (list, count) = self.list(5, |pen| {
                let (op, number) = pen.mmuext_op();
                pen.mmuext(op, number as u32)
            });
            [args[0], args[1]] = [list, count];
        }
        args[3] = u64::from(if self.rng.one_in(6) { self.other() } else { domid::SELF });
        op.map_or("?", MmuextCommand::name)
    }

    /// An operation of `mmuext_op`: half the time one that makes or unmakes a table.
    fn mmuext_op(&mut self) -> (Option<MmuextCommand>, u64) {
        use MmuextCommand as C;
        const TABLES: [C; 9] =
            [C::PinL1, C::PinL2, C::PinL3, C::PinL4, C::PinL4, C::Unpin, C::Unpin, C::NewUserBaseptr, C::SetLdt];
        let all = if self.rng.one_in(2) { &TABLES[..] } else { C::ALL };
        self.op(all, |op| u64::from(op as u32))
    }

    fn mmuext(&mut self, op: Option<MmuextCommand>, cmd: u32) -> MmuextOp {
        use MmuextCommand as C;
        let spare = self.rng.pick(&page::SPARE).unwrap_or(0);
        // A table of the level, a spare page that may become one, or a table of another level.
        let table = |pen: &mut Self, own: usize| {
            let tables = [own, own, spare, spare, spare, page::L1, page::L3, page::KERNEL_ROOT, page::USER_ROOT];
            let which = pen.rng.pick(&tables).unwrap_or(0);
            let frame = pen.page(which);
            (pen.mostly(&[frame]), 0)
        };
        let (arg1, arg2) = match op {
            Some(C::PinL1) => table(self, page::L1),
            Some(C::PinL2) => table(self, page::L2),
            Some(C::PinL3) => table(self, page::L3),
            Some(C::PinL4) => table(self, page::USER_ROOT),
            Some(C::Unpin) => table(self, spare),
            Some(C::NewBaseptr) => (self.mostly(&[self.page(page::KERNEL_ROOT), self.page(page::USER_ROOT)]), 0),
            Some(C::NewUserBaseptr) => (self.mostly(&[self.page(page::USER_ROOT), self.page(spare), 0]), 0),
            Some(C::InvlpgLocal | C::InvlpgMulti | C::InvlpgAll) => (self.play(), self.place(8)),
            Some(C::TlbFlushMulti) => (0, self.place(8)),
            Some(C::SetLdt) => (self.mostly(&[at(page::LDT), 0]), self.mostly(&[512, 0, 8192, 8193])),
            Some(C::ClearPage) => (self.data_page(), 0),
            Some(C::CopyPage) => (self.data_page(), self.frame()),
            _ => (self.frame(), self.edge()),
        };
        MmuextOp { cmd, pad: 0, arg1, arg2 }
    }

    pub(super) fn memory(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(MemoryOp::ALL, |op| u64::from(op as u32));
        args[0] = number | if self.rng.one_in(10) { self.edge() << 6 } else { 0 };
        args[1] = match op {
            Some(MemoryOp::IncreaseReservation | MemoryOp::DecreaseReservation | MemoryOp::PopulatePhysmap) => {
                let decrease = op == Some(MemoryOp::DecreaseReservation);
                let order = if self.rng.one_in(6) { self.small32(12) } else { 0 };
                let (extent_start, nr_extents) =
                    self.list(4, |pen| if decrease { pen.data_page() } else { pen.below(64) });
                let domid = if self.rng.one_in(4) { self.other() } else { self.domid() };
                let extent_order = order;
                self.put(&Reservation { extent_start, nr_extents, extent_order, mem_flags: 0, domid, pad: [0; 3] })
            }
            Some(MemoryOp::CurrentReservation | MemoryOp::MaximumReservation) => {
                let id = self.domid();
                self.put(&id)
            }
            Some(MemoryOp::Exchange) => {
                let (extent_start, domid) = (self.play(), self.domid());
                let (nr_extents, nr_exchanged) = (self.below(4), self.below(4));
                let side = Reservation { extent_start, nr_extents, domid, ..Default::default() };
                self.put(&Exchange { given: side, wanted: side, nr_exchanged })
            }
            Some(MemoryOp::MemoryMap) => {
                let buffer = self.place(20);
                self.put(&MemoryMap { nr_entries: 4, pad: 0, buffer })
            }
            _ => self.place(24),
        };
        op.map_or("?", MemoryOp::name)
    }

    /// A step of a page on its way from memory to a table and back, which its domain's vcpus take together: no mistakes but
    /// that of the order. Other CPUs may know the page by what it was before.
    pub fn retype(&mut self) -> Invented {
        let which = self.rng.pick(&[5, 6, 7, 7, 7, page::ARGS]).unwrap_or(0);
        let (frame, seen) = (self.page(which), pte::PRESENT | pte::USER | pte::ACCESSED);
        let flags = match self.rng.below(8) {
            0 | 1 => seen | pte::WRITE | pte::DIRTY,
            2 | 3 => seen,
            n => {
                let op =
                    [MmuextCommand::ClearPage, MmuextCommand::PinL1, MmuextCommand::PinL1, MmuextCommand::Unpin][n - 4];
                let to = at(page::CODE) + 0xa00 + 0x40 * u64::from(self.ctx.vcpu.number().0);
                self.write(to, MmuextOp { cmd: op as u32, pad: 0, arg1: frame, arg2: 0 }.as_bytes());
                let args = [to, 1, 0, u64::from(domid::SELF), 0, 0];
                return Invented { call: Hypercall::MmuextOp, op: op.name(), args, status: None };
            }
        };
        let args = [at(which), frame << 12 | flags, 0, 0, 0, 0];
        Invented { call: Hypercall::UpdateVaMapping, op: "", args, status: None }
    }
}
