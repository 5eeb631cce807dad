//! Calls about vcpus: their registers, tables and handlers, and when they run.

use super::{Args, Pen};
use crate::world::build::{self, at, page};
use hv_core::addr::HOLE_START;
use hv_core::machine::Clock;
use hypercall_abi::callback::{
    Assist, CallbackOp, CallbackRegister, CallbackType, CallbackUnregister, IretContext, SegmentBase, TrapInfo,
};
use hypercall_abi::physdev::{PhysdevOp, SetIobitmap, SetIopl};
use hypercall_abi::sched::{Poll, RemoteShutdown, SchedOp, Shutdown};
use hypercall_abi::selector;
use hypercall_abi::vcpu::{RegisterArea, RegisterVcpuInfo, SetPeriodicTimer, SetSingleshotTimer, VcpuOp};

/// Frames the longest GDT has.
const GDT_FRAMES: usize = 14;
const _: () = assert!(page::GDT + GDT_FRAMES <= build::PAGES);

impl Pen<'_, '_> {
    pub(super) fn trap_table(&mut self) -> u64 {
        let count = 1 + self.rng.below(12);
        let to = self.place((count + 1) * 16);
        for n in 0..count {
            let gate = TrapInfo {
                vector: (self.edge() & 0xff) as u8,
                flags: self.rng.below(8) as u8,
                address: self.mostly(&[build::HANDLER]),
                ..TrapInfo::default()
            };
            self.put_at(to.wrapping_add(n as u64 * 16), &gate);
        }
        if !self.rng.one_in(20) {
            self.write(to.wrapping_add(count as u64 * 16), &[0; 16]);
        }
        to
    }

    /// A GDT: as long as it may be, or of a few frames.
    pub(super) fn gdt(&mut self, args: &mut Args) {
        let gdt = self.page(page::GDT);
        let (list, count) = if self.rng.one_in(4) {
            let pages: [u64; GDT_FRAMES] = core::array::from_fn(|n| self.page(page::GDT + n));
            (self.put(&pages), GDT_FRAMES as u64)
        } else {
            self.list(3, |pen| if pen.rng.one_in(4) { pen.frame() } else { gdt })
        };
        [args[0], args[1]] = [list, count.wrapping_mul(512).wrapping_sub(self.rng.below(512) as u64)];
    }

    /// A descriptor, and where it goes.
    pub(super) fn descriptor(&mut self, args: &mut Args) {
        let frame = self.mostly(&[self.page(page::GDT), self.page(page::LDT), self.page(page::DATA)]);
        args[0] = frame << 12 | self.below(512) << 3;
        args[1] = self.mostly(&[0, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0x0000_8b00_0000_0067]);
    }

    /// A debug register, and what it is to hold.
    pub(super) fn breakpoint(&mut self, args: &mut Args) {
        let [here, there] = [build::BREAKPOINTS, build::BREAKPOINTS + 1];
        let values = [here, there, 0, 0x400, 0x401, 0x2_0401, 0xffff_0ff0];
        (args[0], args[1]) = (self.below(8), self.mostly(&values));
    }

    /// When the timer fires.
    pub(super) fn timer(&mut self, args: &mut Args) {
        let now = self.ctx.m.now();
        args[0] = self.mostly(&[0, 1, now, now + 100_000, now + 5_000_000]);
    }

    /// A handler of NMIs, or none.
    pub(super) fn nmi(&mut self, args: &mut Args) {
        let handler = self.mostly(&[build::HANDLER]);
        (args[0], args[1]) = (self.below(2), self.put(&handler));
    }

    pub(super) fn segment_base(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(SegmentBase::ALL, SegmentBase::number);
        (args[0], args[1]) = (number, self.mostly(&[0, at(page::DATA), 0x2b, 3]));
        op.map_or("?", SegmentBase::name)
    }

    pub(super) fn assist(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(Assist::ALL, Assist::number);
        (args[0], args[1]) = (self.below(2), number);
        op.map_or("?", Assist::name)
    }

    pub(super) fn callback(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(CallbackOp::ALL, CallbackOp::number);
        args[0] = number;
        let mut kind = self.rng.pick(CallbackType::ALL).map_or(0, |kind| kind.number() as u16);
        if self.rng.one_in(3) {
            kind = CallbackType::Sysenter as u16; // without a handler the instruction only faults
        }
        let address = self.mostly(&[build::HANDLER]);
        let flags = self.rng.below(2) as u16;
        args[1] = match op {
            Some(CallbackOp::Unregister) => self.put(&CallbackUnregister { kind, pad: 0 }),
            _ => self.put(&CallbackRegister { kind, flags, pad: 0, address }),
        };
        op.map_or("?", CallbackOp::name)
    }

    /// What a vcpu may do with I/O ports.
    pub(super) fn physdev(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(PhysdevOp::ALL, PhysdevOp::number);
        args[0] = number;
        args[1] = match op {
            Some(PhysdevOp::SetIopl) => {
                let iopl = self.small32(4);
                self.put(&SetIopl { iopl })
            }
            _ => {
                let (bitmap, nr_ports) = (self.mostly(&[at(page::DATA)]), self.small32(0x1_0001));
                self.put(&SetIobitmap { bitmap, nr_ports, pad: 0 })
            }
        };
        op.map_or("?", PhysdevOp::name)
    }

    pub(super) fn vcpu_op(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(VcpuOp::ALL, VcpuOp::number);
        args[0] = number;
        let mine = u64::from(self.ctx.vcpu.number().0);
        args[1] = if self.rng.one_in(2) { mine } else { u64::from(self.vcpu()) };
        let now = self.ctx.m.now();
        args[2] = match op {
            Some(VcpuOp::Initialise) => {
                args[1] = self.mostly(&[1]); // vcpu 0 has been
                let context = build::context(&self.model.pages);
                if self.model.pages.len() < build::PAGES { 0 } else { self.put(&context) }
            }
            Some(VcpuOp::Down) if !self.rng.one_in(10) => {
                args[1] = 1; // vcpu 0 stays up, most of the time
                0
            }
            Some(VcpuOp::RegisterRunstateMemoryArea | VcpuOp::RegisterVcpuTimeMemoryArea) => {
                let address = self.mostly(&[at(page::DATA), at(page::DATA) + 4090, at(page::L1), 0]);
                self.put(&RegisterArea { address })
            }
            Some(VcpuOp::SetPeriodicTimer) => {
                let period_ns = self.mostly(&[1_000_000, 999_999, 5_000_000]);
                self.put(&SetPeriodicTimer { period_ns })
            }
            Some(VcpuOp::SetSingleshotTimer) => {
                let timeout_abs_ns = self.mostly(&[0, now, now + 1_000_000, now + 50_000]);
                self.put(&SetSingleshotTimer { timeout_abs_ns, flags: 1, pad: 0 })
            }
            Some(VcpuOp::RegisterVcpuInfo) => {
                let (mfn, offset) = (self.data_page(), self.mostly(&[0, 64, 0xfc0, 0x108]) as u32);
                self.put(&RegisterVcpuInfo { mfn, offset, reserved: 0 })
            }
            Some(VcpuOp::SendNmi) => self.mostly(&[0]),
            _ => self.place(64),
        };
        op.map_or("?", VcpuOp::name)
    }

    pub(super) fn sched(&mut self, args: &mut Args) -> &'static str {
        let (mut op, mut number) = self.op(SchedOp::ALL, SchedOp::number);
        if op == Some(SchedOp::Shutdown) && !self.rng.one_in(30) {
            (op, number) = (Some(SchedOp::Poll), SchedOp::Poll.number());
        }
        args[0] = number;
        let now = self.ctx.m.now();
        args[1] = match op {
            Some(SchedOp::Shutdown) => {
                let reason = self.small32(7);
                self.put(&Shutdown { reason })
            }
            Some(SchedOp::RemoteShutdown) => {
                let (domain, reason) = (self.other(), self.edge32());
                self.put(&RemoteShutdown { domain, pad: 0, reason })
            }
            Some(SchedOp::Poll) => {
                let (ports, count) = self.list(3, Self::port);
                let timeout = self.mostly(&[1, now, now + 200_000, 0]);
                self.put(&Poll { ports, nr_ports: count as u32, pad: 0, timeout })
            }
            _ => self.edge(),
        };
        op.map_or("?", SchedOp::name)
    }

    /// A frame for `iret` on the guest's stack.
    pub fn iret_frame(&mut self) -> u64 {
        let to = at(page::STACK) + 8 * self.rng.below(480) as u64;
        let user = self.rng.one_in(2);
        let ring = if user { 3 } else { 0 };
        let selectors = [
            u64::from(selector::GUEST_CS) & !3 | ring,
            u64::from(selector::GUEST_CS) & !3 | ring,
            ring,
            0xe008,
            0x28 | ring,
        ];
        let frame = IretContext {
            rax: self.rng.word(),
            r11: self.rng.word(),
            rcx: self.rng.word(),
            flags: self.mostly(&[0, 0x100]),
            rip: self.mostly(&[at(page::CODE), at(page::CODE), 1 << 47, HOLE_START]),
            cs: self.mostly(&selectors),
            rflags: self.mostly(&[0x202, 2, 0x3202, u64::MAX, 0x4302]),
            rsp: self.mostly(&[at(page::STACK + 1), 1 << 47]),
            ss: self.mostly(&[u64::from(selector::GUEST_SS), 0]),
        };
        self.put_at(to, &frame);
        to
    }
}
