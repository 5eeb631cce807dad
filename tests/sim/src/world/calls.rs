//! Invents calls: every number and operation of the ABI, with arguments that often make sense and often do not.

use super::Context;
use super::build::{self, SLOTS, at, page};
use crate::rng::Rng;
use hv_core::addr::{Frame, GuestVirt, HOLE_START, Port};
use hv_core::domain::{Domain, Life};
use hv_core::event::port::Binding;
use hv_core::frame::Owner;
use hv_core::machine::{Clock, Frames};
use hypercall_abi::callback::{
    Assist, CallbackOp, CallbackRegister, CallbackType, CallbackUnregister, IretContext, SegmentBase, TrapInfo,
};
use hypercall_abi::domctl::{CreateDomain, Domctl, DomctlOp, INTERFACE_VERSION, MaxMem, MaxVcpus, VcpuContextArg};
use hypercall_abi::event::{
    AllocUnbound, BindInterdomain, BindIpi, BindVcpu, BindVirq, EventOp, InitControl, PORTS, PortArg, Reset, Status,
    VIRQS,
};
use hypercall_abi::grant::{
    Copy as GrantCopy, CopySide, GetVersion, GrantOp, MapGrantRef, QuerySize, SetVersion, SetupTable, UnmapAndReplace,
    UnmapGrantRef,
};
use hypercall_abi::memory::{Exchange, MemoryMap, MemoryOp, Reservation};
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, MulticallEntry, pte};
use hypercall_abi::physdev::{ConsoleIo, PhysdevOp, SetIobitmap, SetIopl};
use hypercall_abi::sched::{Poll, RemoteShutdown, SchedOp, Shutdown};
use hypercall_abi::sysctl::{self, Sysctl, SysctlOp};
use hypercall_abi::tenon::TenonOp;
use hypercall_abi::vcpu::{RegisterArea, RegisterVcpuInfo, SetPeriodicTimer, SetSingleshotTimer, VcpuOp};
use hypercall_abi::version::{FeatureInfo, VersionOp};
use hypercall_abi::{Hypercall, domid, selector};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Frames the longest GDT has.
const GDT_FRAMES: usize = 14;
const _: () = assert!(page::GDT + GDT_FRAMES <= build::PAGES);

/// A call to be made.
#[derive(Clone, Copy, Debug)]
pub struct Invented {
    /// Its number and name.
    pub call: Hypercall,
    /// The operation.
    pub op: &'static str,
    /// Arguments.
    pub args: [u64; 6],
    /// Where a status of 16 bits must be 0 for success.
    pub status: Option<u64>,
}

/// What is known of a domain besides what the hypervisor knows.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Its first pages.
    pub pages: Vec<Frame>,
    /// Handles of grants it has mapped, where, and the bus address it was told.
    pub handles: Vec<(u32, u64, u64)>,
}

/// Invents for one vcpu.
pub struct Pen<'p, 'c> {
    /// Dice.
    pub rng: &'p mut Rng,
    /// The vcpu.
    pub ctx: &'p Context<'c>,
    /// Its domain.
    pub model: &'p Model,
}

impl Pen<'_, '_> {
    /// A number hypervisors have stumbled over.
    pub fn edge(&mut self) -> u64 {
        const EDGES: [u64; 26] = [
            0,
            1,
            2,
            3,
            7,
            8,
            15,
            16,
            31,
            32,
            63,
            64,
            511,
            512,
            4095,
            4096,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            1 << 40,
            1 << 52,
            i64::MAX as u64,
            u64::MAX,
        ];
        match self.rng.below(3) {
            0 => self.rng.word(),
            1 => self.rng.word() & 0xff,
            _ => self.rng.pick(&EDGES).unwrap_or(0),
        }
    }

    fn edge32(&mut self) -> u32 {
        (self.edge() & 0xffff_ffff) as u32
    }

    /// One of `usual`, or an edge value once in eight times.
    fn mostly(&mut self, usual: &[u64]) -> u64 {
        if self.rng.one_in(8) { self.edge() } else { self.rng.pick(usual).unwrap_or(0) }
    }

    /// A number below `n`, or an edge value once in twelve times.
    fn below(&mut self, n: u64) -> u64 {
        if self.rng.one_in(12) { self.edge() } else { self.rng.below(n as usize) as u64 }
    }

    fn small32(&mut self, n: u64) -> u32 {
        (self.below(n) & 0xffff_ffff) as u32
    }

    /// An address a guest should not pass.
    pub fn evil(&mut self) -> u64 {
        let odd = self.rng.word() & 0xfff;
        let usual = [
            0,
            8,
            at(page::KERNEL_ROOT) + (odd & !7),
            at(page::L1) + (odd & !7),
            at(page::GDT),
            at(SLOTS - 1) + odd,
            at(page::MORE_ARGS) + 4096 - (odd & 15),
            HOLE_START,
            HOLE_START - 1,
            HOLE_START + (4 << 39),
            HOLE_START + (16 << 39) - 4,
            1 << 47,
            (1 << 47) - 4,
            u64::MAX,
            u64::MAX - 7,
            u64::MAX << 47,
        ];
        self.mostly(&usual)
    }

    /// Where an argument of so many bytes goes.
    fn place(&mut self, length: usize) -> u64 {
        let room = 4096usize.saturating_sub(length);
        match self.rng.below(24) {
            0 => at(page::MORE_ARGS) - self.rng.below(length.max(1)) as u64, // crosses
            1 => at(page::ARGS) + self.rng.below(room + 1) as u64,           // is not aligned
            2 => self.evil(),
            _ if length > 4096 => at(page::ARGS),
            _ => at(page::ARGS) + (self.rng.below(room / 8 + 1) * 8) as u64,
        }
    }

    /// Writes bytes where the guest can write.
    pub fn write(&mut self, to: u64, bytes: &[u8]) {
        _ = self.ctx.view().map(|view| view.write_bytes(GuestVirt(to), bytes));
    }

    /// Puts an argument into memory, often a bit wrong; says where.
    fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> u64 {
        let to = self.place(size_of::<T>());
        self.put_at(to, value);
        to
    }

    fn put_at<T: IntoBytes + Immutable>(&mut self, to: u64, value: &T) {
        let mut bytes = value.as_bytes().to_vec();
        if self.rng.one_in(12) && !bytes.is_empty() {
            let width = [1, 2, 4, 8][self.rng.below(4)].min(bytes.len());
            let slot = self.rng.below(bytes.len() / width) * width;
            let edge = self.edge().to_le_bytes();
            bytes[slot..slot + width].copy_from_slice(&edge[..width]);
        }
        self.write(to, &bytes);
    }

    /// An array with a few elements, one of four times many; its address and a count that usually fits. A list is done
    /// only if every element is, so most of them are short.
    fn list<T: IntoBytes + Immutable>(&mut self, most: usize, mut one: impl FnMut(&mut Self) -> T) -> (u64, u64) {
        let most = if self.rng.one_in(4) { most } else { most.min(2) };
        let count = 1 + self.rng.below(most);
        let to = self.place(count * size_of::<T>());
        for n in 0..count {
            let element = one(self);
            self.put_at(to.wrapping_add((n * size_of::<T>()) as u64), &element);
        }
        let claimed = if self.rng.one_in(15) { self.edge() } else { count as u64 };
        (to, claimed)
    }

    fn own_page(&mut self) -> u64 {
        self.model.pages.get(self.rng.below(self.model.pages.len())).map_or(0, |frame| frame.number())
    }

    pub(super) fn page(&self, n: usize) -> u64 {
        self.model.pages.get(n).map_or(0, |frame| frame.number())
    }

    /// A frame number: usually the guest's own.
    fn frame(&mut self) -> u64 {
        match self.rng.below(16) {
            0 => self.rng.below(self.ctx.m.frame_limit() as usize) as u64,
            1 => self.ctx.m.frame_limit() + self.rng.below(3) as u64 - 1,
            2 => self.ctx.domain.shared_info().map_or(0, Frame::number),
            3 => self.edge(),
            4 => self.ctx.own.traps.map_or(0, Frame::number),
            5..=9 => {
                let n = page::DATA + self.rng.below(build::PAGES - page::DATA);
                self.page(n)
            }
            _ => self.own_page(),
        }
    }

    fn data_page(&mut self) -> u64 {
        if self.rng.one_in(8) {
            return self.frame();
        }
        let n = page::DATA + self.rng.below(build::PAGES - page::DATA);
        self.page(n)
    }

    fn entry(&mut self) -> u64 {
        let frame = self.data_page() << 12;
        let usual = pte::PRESENT | pte::USER | pte::ACCESSED;
        match self.rng.below(12) {
            0 => 0,
            1 => self.rng.word(),
            2 => frame | usual | 1 << self.rng.below(64),
            3 => self.frame() << 12 | usual | pte::WRITE,
            4..=6 => frame | usual,
            7 => frame | usual | pte::NX,
            _ => frame | usual | pte::WRITE | pte::DIRTY,
        }
    }

    /// An address whose entry is free for play.
    fn play(&mut self) -> u64 {
        if self.rng.one_in(10) {
            return self.evil();
        }
        at(build::PAGES + self.rng.below(SLOTS - build::PAGES))
    }

    fn others(&self) -> Vec<&Domain> {
        self.ctx.world.domains.iter().filter(|d| d.life() != Life::Free && d.id() != self.ctx.domain.id()).collect()
    }

    fn other(&mut self) -> u16 {
        let others: Vec<u16> = self.others().iter().map(|domain| domain.id().0).collect();
        if others.is_empty() || self.rng.one_in(12) { self.domid() } else { self.rng.pick(&others).unwrap_or(0) }
    }

    /// A domain id: usually the caller.
    fn domid(&mut self) -> u16 {
        let roles = [domid::IO, domid::XEN, domid::COW, domid::INVALID, domid::IDLE, 0, 0xffff];
        let others: Vec<u16> = self.others().iter().map(|domain| domain.id().0).collect();
        match self.rng.below(12) {
            0 => self.rng.pick(&roles).unwrap_or(0),
            1 => (self.edge() & 0xffff) as u16,
            2 | 3 => self.rng.pick(&others).unwrap_or(0),
            4 => self.ctx.domain.id().0,
            _ => domid::SELF,
        }
    }

    /// A port of the caller: usually one in use.
    fn port(&mut self) -> u32 {
        let ctx = self.ctx;
        let used: Vec<u32> = (1..64u32)
            .filter(|port| ctx.world.port(ctx.m, ctx.domain, Port(*port)).binding != Binding::Closed)
            .collect();
        if used.is_empty() || self.rng.one_in(8) {
            return self.small32(u64::from(PORTS) + 2);
        }
        self.rng.pick(&used).unwrap_or(0)
    }

    fn vcpu(&mut self) -> u32 {
        self.small32(self.ctx.world.vcpus_of(self.ctx.domain).count() as u64 + 1)
    }

    /// Any operation of a family, or a number that is none.
    fn op<T: Copy>(&mut self, all: &[T], number: impl Fn(T) -> u64) -> (Option<T>, u64) {
        if self.rng.one_in(40) {
            return (None, self.edge());
        }
        let one = self.rng.pick(all);
        (one, one.map_or(0, number))
    }

    /// A call. Families that make the others interesting come more often.
    pub fn invent(&mut self) -> Invented {
        const OFTEN: [Hypercall; 12] = [
            Hypercall::MmuUpdate,
            Hypercall::MmuextOp,
            Hypercall::UpdateVaMapping,
            Hypercall::GrantTableOp,
            Hypercall::GrantTableOp,
            Hypercall::GrantTableOp,
            Hypercall::EventChannelOp,
            Hypercall::EventChannelOp,
            Hypercall::VcpuOp,
            Hypercall::MemoryOp,
            Hypercall::Multicall,
            Hypercall::Domctl,
        ];
        let all = if self.rng.one_in(2) { &OFTEN[..] } else { Hypercall::ALL };
        let call = self.rng.pick(all).unwrap_or(Hypercall::Iret);
        self.arguments(call)
    }

    /// A call of a family.
    pub fn arguments(&mut self, call: Hypercall) -> Invented {
        let mut status = None;
        let mut args = [0; 6];
        for arg in &mut args {
            *arg = self.edge();
        }
        let op = match call {
            Hypercall::SetTrapTable => {
                args[0] = if self.rng.one_in(30) { 0 } else { self.trap_table() };
                ""
            }
            Hypercall::MmuUpdate => {
                let (list, count) = self.list(20, Self::mmu_update);
                let count_out = if self.rng.one_in(2) { 0 } else { self.put(&0u32) };
                [args[0], args[1], args[2]] = [list, count, count_out];
                args[3] = match self.rng.below(8) {
                    0 => self.edge(),
                    1 => u64::from(self.other()) | (u64::from(self.other()) + 1) << 16,
                    2 => u64::from(self.other()),
                    _ => u64::from(domid::SELF),
                };
                ""
            }
            Hypercall::SetGdt => {
                let gdt = self.page(page::GDT);
                let (list, count) = if self.rng.one_in(4) {
                    let pages: [u64; GDT_FRAMES] = core::array::from_fn(|n| self.page(page::GDT + n));
                    (self.put(&pages), GDT_FRAMES as u64)
                } else {
                    self.list(3, |pen| if pen.rng.one_in(4) { pen.frame() } else { gdt })
                };
                [args[0], args[1]] = [list, count.wrapping_mul(512).wrapping_sub(self.rng.below(512) as u64)];
                ""
            }
            Hypercall::StackSwitch => {
                args[1] = self.mostly(&[at(page::STACK + 1), at(page::STACK) + 0x800]);
                ""
            }
            Hypercall::SetCallbacks => {
                for arg in &mut args[..3] {
                    *arg = self.mostly(&[build::HANDLER]);
                }
                ""
            }
            Hypercall::SetDebugreg => {
                let [here, there] = [build::BREAKPOINTS, build::BREAKPOINTS + 1];
                let values = [here, there, 0, 0x400, 0x401, 0x2_0401, 0xffff_0ff0];
                (args[0], args[1]) = (self.below(8), self.mostly(&values));
                ""
            }
            Hypercall::GetDebugreg => {
                args[0] = self.below(8);
                ""
            }
            Hypercall::UpdateDescriptor => {
                let frame = self.mostly(&[self.page(page::GDT), self.page(page::LDT), self.page(page::DATA)]);
                args[0] = frame << 12 | self.below(512) << 3;
                args[1] = self.mostly(&[0, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0x0000_8b00_0000_0067]);
                ""
            }
            Hypercall::MemoryOp => self.memory(&mut args),
            Hypercall::Multicall => {
                let (list, count) = self.list(6, |pen| {
                    let inner = pen.arguments_inside();
                    MulticallEntry { op: inner.call.number(), result: 0, args: inner.args }
                });
                [args[0], args[1]] = [list, count];
                ""
            }
            Hypercall::UpdateVaMapping | Hypercall::UpdateVaMappingOtherdomain => {
                [args[0], args[1]] = [self.play(), self.entry()];
                args[2] = match self.rng.below(8) {
                    0 => self.edge(),
                    1 => self.put(&u64::MAX) & !3 | 1,
                    n => n as u64 & 7,
                };
                args[3] = u64::from(self.other());
                if call == Hypercall::UpdateVaMappingOtherdomain && self.rng.one_in(2) {
                    args[3] = u64::from(domid::SELF);
                }
                ""
            }
            Hypercall::SetTimerOp => {
                let now = self.ctx.m.now();
                args[0] = self.mostly(&[0, 1, now, now + 100_000, now + 5_000_000]);
                ""
            }
            Hypercall::XenVersion => {
                let (op, number) = self.op(VersionOp::ALL, VersionOp::number);
                args[0] = number;
                args[1] = match op {
                    Some(VersionOp::GetFeatures) => self.put(&FeatureInfo { submap_idx: 0, submap: 0 }),
                    Some(VersionOp::Pagesize) => self.mostly(&[0]),
                    _ => self.place(1024),
                };
                op.map_or("?", VersionOp::name)
            }
            Hypercall::ConsoleIo => {
                let (op, number) = self.op(ConsoleIo::ALL, ConsoleIo::number);
                args[0] = number;
                args[1] = self.mostly(&[0, 1, 100, 3000]);
                args[2] = self.place(3000);
                op.map_or("?", ConsoleIo::name)
            }
            Hypercall::GrantTableOp => self.grant(&mut args, &mut status),
            Hypercall::VmAssist => {
                let (op, number) = self.op(Assist::ALL, Assist::number);
                (args[0], args[1]) = (self.below(2), number);
                op.map_or("?", Assist::name)
            }
            Hypercall::VcpuOp => self.vcpu_op(&mut args),
            Hypercall::SetSegmentBase => {
                let (op, number) = self.op(SegmentBase::ALL, SegmentBase::number);
                (args[0], args[1]) = (number, self.mostly(&[0, at(page::DATA), 0x2b, 3]));
                op.map_or("?", SegmentBase::name)
            }
            Hypercall::MmuextOp => {
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
            Hypercall::NmiOp => {
                let handler = self.mostly(&[build::HANDLER]);
                (args[0], args[1]) = (self.below(2), self.put(&handler));
                ""
            }
            Hypercall::SchedOp => self.sched(&mut args),
            Hypercall::CallbackOp => {
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
            Hypercall::EventChannelOp => self.event(&mut args),
            Hypercall::PhysdevOp => {
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
            Hypercall::Domctl => self.domctl(&mut args),
            Hypercall::Sysctl => {
                let (op, number) = self.op(SysctlOp::ALL, SysctlOp::number);
                let call =
                    Sysctl { cmd: number as u32, interface_version: sysctl::INTERFACE_VERSION, payload: [0; 128] };
                args[0] = self.put(&call);
                op.map_or("?", SysctlOp::name)
            }
            Hypercall::Tenon => {
                let (op, number) = self.op(TenonOp::ALL, TenonOp::number);
                (args[0], args[1], args[2]) = (number, u64::from(self.other()), self.place(328));
                op.map_or("?", TenonOp::name)
            }
            _ => "",
        };
        Invented { call, op, args, status }
    }

    /// A call for a list of calls: no list again, most of the time, and nothing that ends the domain.
    fn arguments_inside(&mut self) -> Invented {
        const SIMPLE: [Hypercall; 12] = [
            Hypercall::UpdateVaMapping,
            Hypercall::StackSwitch,
            Hypercall::FpuTaskswitch,
            Hypercall::SetSegmentBase,
            Hypercall::UpdateDescriptor,
            Hypercall::SetDebugreg,
            Hypercall::XenVersion,
            Hypercall::SetTimerOp,
            Hypercall::MmuUpdate,
            Hypercall::MmuextOp,
            Hypercall::GrantTableOp,
            Hypercall::Iret,
        ];
        if self.rng.one_in(30) {
            // A list in a list: the first entry of the arguments, whatever it is by now.
            return Invented {
                call: Hypercall::Multicall,
                op: "",
                args: [at(page::ARGS), 3, 0, 0, 0, 0],
                status: None,
            };
        }
        let call = self.rng.pick(&SIMPLE).unwrap_or(Hypercall::XenVersion);
        self.arguments(call)
    }

    fn trap_table(&mut self) -> u64 {
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

    fn memory(&mut self, args: &mut [u64; 6]) -> &'static str {
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

    fn grant(&mut self, args: &mut [u64; 6], status: &mut Option<u64>) -> &'static str {
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
        let mut count = self.mostly(&[1, 1, 1, 1, 1, 0, 2]);
        args[1] = match op {
            Some(GrantOp::MapGrantRef) => {
                let (list, n) = self.list(3, |pen| {
                    let contains = pen.rng.one_in(6);
                    let slot = (build::PAGES + pen.rng.below(SLOTS - build::PAGES)) as u64;
                    let host_addr = if contains { pen.page(page::L1) << 12 | slot << 3 } else { pen.play() };
                    let flags = pen.mostly(&[2, 2, 6, 3, 1, 5]) as u32 | if contains { 16 } else { 0 };
                    let (dom, gref) = pen.granted();
                    MapGrantRef { host_addr, flags, gref, dom, ..Default::default() }
                });
                count = n;
                *status = Some(list.wrapping_add(18));
                list
            }
            Some(GrantOp::UnmapGrantRef) => {
                let (list, n) = self.list(2, |pen| {
                    let known = pen.rng.pick(&pen.model.handles).unwrap_or_default();
                    let host_addr = pen.mostly(&[known.1, known.1, known.1, 0]);
                    let dev_bus_addr = pen.mostly(&[known.2, 0, 0]);
                    let handle = if pen.rng.one_in(10) { pen.edge32() } else { known.0 };
                    UnmapGrantRef { host_addr, dev_bus_addr, handle, ..Default::default() }
                });
                count = n;
                *status = Some(list.wrapping_add(20));
                list
            }
            Some(GrantOp::UnmapAndReplace) => {
                let (list, n) = self.list(2, |pen| {
                    let known = pen.rng.pick(&pen.model.handles).unwrap_or_default();
                    let (host_addr, new_addr) = (pen.mostly(&[known.1, known.1, 0]), pen.rng.pick(&[0, 1, 2, 3]));
                    let new_addr = if new_addr == Some(0) { 0 } else { pen.play() };
                    UnmapAndReplace { host_addr, new_addr, handle: known.0, ..Default::default() }
                });
                count = n;
                *status = Some(list.wrapping_add(20));
                list
            }
            Some(GrantOp::Copy) => {
                let (list, n) = self.list(3, |pen| {
                    let flags = pen.below(4) as u16;
                    let side = |pen: &mut Self, granted: bool| {
                        let (dom, gref) = pen.granted();
                        let gref_or_frame = if granted { u64::from(gref) } else { pen.data_page() };
                        let domid = if granted { dom } else { domid::SELF };
                        CopySide { gref_or_frame, domid, offset: pen.mostly(&[0, 100, 4000]) as u16, pad: 0 }
                    };
                    let (source, dest) = (side(pen, flags & 1 != 0), side(pen, flags & 2 != 0));
                    let len = pen.mostly(&[1, 64, 96, 4096]) as u16;
                    GrantCopy { source, dest, len, flags, ..Default::default() }
                });
                count = n;
                *status = Some(list.wrapping_add(36));
                list
            }
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
        };
        args[2] = count;
        op.map_or("?", GrantOp::name)
    }

    fn vcpu_op(&mut self, args: &mut [u64; 6]) -> &'static str {
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

    fn sched(&mut self, args: &mut [u64; 6]) -> &'static str {
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

    /// Ports of living domains that wait for the caller.
    fn waiting(&self) -> Vec<(u16, u32)> {
        let (ctx, me) = (self.ctx, self.ctx.domain.id());
        let alive = ctx.world.domains.iter().filter(|domain| domain.life() == Life::Alive);
        alive
            .flat_map(|domain| (1..48).map(move |port| (domain, port)))
            .filter(|(domain, port)| ctx.world.port(ctx.m, domain, Port(*port)).binding == Binding::Unbound(me))
            .map(|(domain, port)| (domain.id().0, port))
            .collect()
    }

    fn event(&mut self, args: &mut [u64; 6]) -> &'static str {
        let (mut op, mut number) = self.op(EventOp::ALL, EventOp::number);
        let waiting = self.waiting();
        if op == Some(EventOp::Reset) && !self.rng.one_in(5) {
            (op, number) = (Some(EventOp::Send), EventOp::Send.number());
        }
        // Who finds nobody waiting mostly waits for somebody.
        if op == Some(EventOp::BindInterdomain) && waiting.is_empty() && !self.rng.one_in(4) {
            (op, number) = (Some(EventOp::AllocUnbound), EventOp::AllocUnbound.number());
        }
        args[0] = number;
        let port = self.port();
        args[1] = match op {
            Some(EventOp::BindInterdomain) => {
                let (remote_dom, remote_port) = self.rng.pick(&waiting).unwrap_or((domid::SELF, port));
                self.put(&BindInterdomain { remote_dom, remote_port, ..Default::default() })
            }
            Some(EventOp::BindVirq) => {
                let (virq, vcpu) = (self.small32(u64::from(VIRQS) + 1), self.rng.below(2) as u32);
                self.put(&BindVirq { virq, vcpu, port: 0 })
            }
            Some(EventOp::Status) => {
                let dom = self.domid();
                self.put(&Status { dom, port, ..Default::default() })
            }
            Some(EventOp::AllocUnbound) => {
                let (dom, remote_dom) = (self.domid(), if self.rng.one_in(4) { self.domid() } else { self.other() });
                self.put(&AllocUnbound { dom, remote_dom, port: 0 })
            }
            Some(EventOp::BindIpi) => {
                let vcpu = self.vcpu();
                self.put(&BindIpi { vcpu, port: 0 })
            }
            Some(EventOp::BindVcpu) => {
                let vcpu = self.vcpu();
                self.put(&BindVcpu { port, vcpu })
            }
            Some(EventOp::Reset) => {
                let dom = self.domid();
                self.put(&Reset { dom })
            }
            Some(EventOp::InitControl) => {
                let (control_gfn, offset, vcpu) = (self.frame(), self.small32(4096), self.vcpu());
                self.put(&InitControl { control_gfn, offset, vcpu, ..Default::default() })
            }
            _ => self.put(&PortArg { port }),
        };
        op.map_or("?", EventOp::name)
    }

    fn domctl(&mut self, args: &mut [u64; 6]) -> &'static str {
        let (mut op, mut number) = self.op(DomctlOp::ALL, DomctlOp::number);
        let domains = self.others().len();
        let skip = match op {
            Some(DomctlOp::CreateDomain) => domains > 4 && !self.rng.one_in(8),
            Some(DomctlOp::DestroyDomain) => domains < 4 && !self.rng.one_in(4),
            _ => false,
        };
        if skip {
            (op, number) = (Some(DomctlOp::GetDomainInfo), DomctlOp::GetDomainInfo.number());
        }
        let domain = self.other();
        args[0] = self.domctl_of(op, number as u32, domain);
        op.map_or("?", DomctlOp::name)
    }

    fn domctl_of(&mut self, op: Option<DomctlOp>, cmd: u32, domain: u16) -> u64 {
        let mut call = Domctl { cmd, interface_version: INTERFACE_VERSION, domain, pad: [0; 3], payload: [0; 128] };
        let mut payload = |bytes: &[u8]| call.payload[..bytes.len()].copy_from_slice(bytes);
        match op {
            Some(DomctlOp::CreateDomain) => {
                let max_vcpus = self.mostly(&[1, 2, 2, 3, 0, 33]) as u32;
                payload(CreateDomain { max_vcpus, ..Default::default() }.as_bytes());
            }
            Some(DomctlOp::MaxMem) => payload(MaxMem { max_memkb: self.mostly(&[136, 160, 0]) }.as_bytes()),
            Some(DomctlOp::MaxVcpus) => payload(MaxVcpus { max: self.small32(4) }.as_bytes()),
            Some(DomctlOp::SetVcpuContext | DomctlOp::GetVcpuContext) => {
                let pages = self.foreign_pages(domain);
                let to = self.place(0x1430);
                if op == Some(DomctlOp::SetVcpuContext) && pages.len() == build::PAGES {
                    self.put_at(to, &build::context(&pages));
                }
                let vcpu = self.small32(2);
                payload(VcpuContextArg { vcpu, pad: 0, context: to }.as_bytes());
                // The structure is larger than a page: the call itself goes elsewhere.
                let call_at = at(page::DATA) + 8 * self.rng.below(64) as u64;
                self.write(call_at, call.as_bytes());
                return call_at;
            }
            _ => {}
        }
        self.put(&call)
    }

    /// What looks like the first pages of another domain, by the machine-to-physical table.
    fn foreign_pages(&self, id: u16) -> Vec<Frame> {
        let owned = |frame: &Frame| {
            let owner = self.ctx.world.frames.info(*frame).map(|info| info.owner.owner);
            matches!(owner, Some(Owner::Guest(owner)) if owner.0 == id)
        };
        let limit = self.ctx.m.frame_limit();
        let mut pages: Vec<(u64, Frame)> = (0..limit)
            .filter_map(Frame::new)
            .filter(owned)
            .map(|frame| (self.ctx.m.m2p(frame), frame))
            .filter(|(pfn, _)| *pfn < build::PAGES as u64)
            .collect();
        pages.sort();
        pages.dedup_by_key(|(pfn, _)| *pfn);
        pages.into_iter().map(|(_, frame)| frame).collect()
    }

    /// The call with which a reaper unmakes a domain: no mistakes.
    pub fn destroy(&mut self, domain: u16) -> Invented {
        self.control(domain, DomctlOp::DestroyDomain, "DestroyDomain", &[])
    }

    /// A domain is paused, or runs again: no mistakes.
    pub fn pause(&mut self, domain: u16) -> Invented {
        let pauses = self.rng.one_in(3);
        let (op, name) =
            if pauses { (DomctlOp::PauseDomain, "PauseDomain") } else { (DomctlOp::UnpauseDomain, "UnpauseDomain") };
        self.control(domain, op, name, &[])
    }

    /// A domain may own so many frames from now on: no mistakes.
    pub fn set_limit(&mut self, domain: u16, frames: u64) -> Invented {
        self.control(domain, DomctlOp::MaxMem, "MaxMem", MaxMem { max_memkb: 4 * frames }.as_bytes())
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

    fn control(&mut self, domain: u16, op: DomctlOp, name: &'static str, payload: &[u8]) -> Invented {
        let mut call = Domctl { cmd: op as u32, interface_version: INTERFACE_VERSION, domain, ..Domctl::default() };
        call.payload[..payload.len()].copy_from_slice(payload);
        let to = at(page::CODE) + 0xc00 + 0x100 * u64::from(self.ctx.vcpu.number().0);
        self.write(to, call.as_bytes());
        Invented { call: Hypercall::Domctl, op: name, args: [to, 0, 0, 0, 0, 0], status: None }
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

    /// Reads a value at an address of the guest.
    pub fn read<T: FromBytes + IntoBytes>(&self, from: u64) -> Option<T> {
        self.ctx.view().ok()?.read(GuestVirt(from)).ok()
    }
}
