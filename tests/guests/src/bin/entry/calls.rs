//! The rows: every call and sub-operation of `hypercall-abi`, by its own lists. A call without a row does not compile.

use crate::ground::Ground;
use crate::shape::{Class, Place, Shape, Target, Wants, done, refused};
use crate::{cpu, domains, events, memory, mmu};
use alloc::vec;
use alloc::vec::Vec;
use guests::abi::Hypercall;
use guests::abi::callback::{Assist, CallbackOp, CallbackType, SegmentBase};
use guests::abi::domctl::DomctlOp;
use guests::abi::event::EventOp;
use guests::abi::grant::GrantOp;
use guests::abi::memory::MemoryOp;
use guests::abi::mmu::{MmuextCommand, UpdateCommand};
use guests::abi::physdev::{ConsoleIo, PhysdevOp};
use guests::abi::sched::SchedOp;
use guests::abi::sysctl::SysctlOp;
use guests::abi::tenon::TenonOp;
use guests::abi::vcpu::VcpuOp;
use guests::abi::version::VersionOp;

/// A domain that does not exist (core 10.7).
pub(crate) const NOBODY: u64 = 0x7123;
/// A port, vcpu or register that does not exist.
pub(crate) const NOTHING: u64 = 5000;

/// One target for each value of a list of numbers.
macro_rules! each {
    ($call:expr, $list:ty) => {
        <$list>::ALL.iter().map(|op| Target { op: op.number(), op_name: op.name(), ..plain($call) }).collect()
    };
}

fn plain(call: Hypercall) -> Target {
    Target { call, op: 0, op_name: "", sub: 0, sub_name: "" }
}

/// A call's sub-operations, or itself if it has none.
fn of_call(call: Hypercall) -> Vec<Target> {
    use Hypercall as H;
    match call {
        H::MmuUpdate => each!(call, UpdateCommand),
        H::MemoryOp => each!(call, MemoryOp),
        H::XenVersion => each!(call, VersionOp),
        H::ConsoleIo => each!(call, ConsoleIo),
        H::GrantTableOp => each!(call, GrantOp),
        H::VmAssist => each!(call, Assist),
        H::VcpuOp => each!(call, VcpuOp),
        H::SetSegmentBase => each!(call, SegmentBase),
        H::MmuextOp => each!(call, MmuextCommand),
        H::SchedOp => each!(call, SchedOp),
        H::EventChannelOp => each!(call, EventOp),
        H::PhysdevOp => each!(call, PhysdevOp),
        H::Sysctl => each!(call, SysctlOp),
        H::Domctl => each!(call, DomctlOp),
        H::Tenon => each!(call, TenonOp),
        H::CallbackOp => CallbackOp::ALL.iter().flat_map(|op| callbacks(call, *op)).collect(),
        H::NmiOp => {
            // core 8.2 names two.
            let op = |op, op_name| Target { op, op_name, ..plain(call) };
            vec![op(0, "Register"), op(1, "Unregister")]
        }
        H::SetTrapTable
        | H::SetGdt
        | H::StackSwitch
        | H::SetCallbacks
        | H::FpuTaskswitch
        | H::SchedOpCompat
        | H::PlatformOp
        | H::SetDebugreg
        | H::GetDebugreg
        | H::UpdateDescriptor
        | H::Multicall
        | H::UpdateVaMapping
        | H::SetTimerOp
        | H::EventChannelOpCompat
        | H::UpdateVaMappingOtherdomain
        | H::Iret => vec![plain(call)],
    }
}

fn callbacks(call: Hypercall, op: CallbackOp) -> impl Iterator<Item = Target> {
    let (op, op_name) = (op.number(), op.name());
    let kinds = CallbackType::ALL.iter();
    kinds.map(move |kind| Target { op, op_name, sub: kind.number(), sub_name: kind.name(), ..plain(call) })
}

/// Every call and sub-operation.
pub(crate) fn targets() -> Vec<Target> {
    Hypercall::ALL.iter().flat_map(|call| of_call(*call)).collect()
}

/// A well-formed call and what can be wrong with it.
pub(crate) fn shape(g: &Ground, t: &Target) -> Shape {
    Shape { words: words(t.call), ..row(g, t) }
}

/// The registers of a call that Xen 4.17 takes 32 bits from, or 16 (`update_va_mapping_otherdomain`).
fn words(call: Hypercall) -> &'static [usize] {
    use Hypercall as H;
    match call {
        H::FpuTaskswitch
        | H::SetDebugreg
        | H::GetDebugreg
        | H::XenVersion
        | H::SetSegmentBase
        | H::NmiOp
        | H::SchedOpCompat
        | H::SchedOp
        | H::CallbackOp
        | H::EventChannelOp
        | H::PhysdevOp => &[0],
        H::SetGdt | H::Multicall => &[1],
        H::ConsoleIo | H::VmAssist | H::VcpuOp => &[0, 1],
        H::GrantTableOp => &[0, 2],
        H::MmuUpdate | H::MmuextOp => &[1, 3],
        H::UpdateVaMappingOtherdomain => &[3],
        H::SetTrapTable
        | H::StackSwitch
        | H::SetCallbacks
        | H::PlatformOp
        | H::UpdateDescriptor
        | H::MemoryOp
        | H::UpdateVaMapping
        | H::SetTimerOp
        | H::EventChannelOpCompat
        | H::Iret
        | H::Sysctl
        | H::Domctl
        | H::Tenon => &[],
    }
}

fn row(g: &Ground, t: &Target) -> Shape {
    use Hypercall as H;
    match t.call {
        H::SetTrapTable => cpu::set_trap_table(),
        H::SetGdt => cpu::set_gdt(g),
        H::StackSwitch => Shape::new([0xe02b, 0, 0, 0, 0]).address(Place::Arg(1), Wants::any(done("core 3.10"))),
        H::SetCallbacks => cpu::set_callbacks(),
        H::FpuTaskswitch => Shape::new([0; 5]).address(Place::Arg(0), Wants::any(done("core 3.11"))),
        H::SetDebugreg => cpu::set_debugreg(),
        H::GetDebugreg => cpu::get_debugreg(),
        H::UpdateDescriptor => cpu::update_descriptor(),
        H::SetSegmentBase => cpu::set_segment_base(t),
        H::VmAssist => cpu::vm_assist(t),
        H::CallbackOp => cpu::callback_op(t),
        H::NmiOp => cpu::nmi_op(t),
        H::Iret => cpu::iret(),
        H::PhysdevOp => cpu::physdev_op(t),
        H::MmuUpdate => mmu::mmu_update(g, t),
        H::MmuextOp => mmu::mmuext_op(g, t),
        H::UpdateVaMapping => mmu::update_va_mapping(g),
        H::UpdateVaMappingOtherdomain => mmu::update_va_mapping_otherdomain(g),
        H::Multicall => mmu::multicall(),
        H::MemoryOp => memory::memory_op(g, t),
        H::GrantTableOp => memory::grant_table_op(g, t),
        H::EventChannelOp => events::event_channel_op(g, t),
        H::SchedOp => events::sched_op(g, t),
        H::VcpuOp => events::vcpu_op(t),
        H::SetTimerOp => Shape::new([0; 5]).address(Place::Arg(0), Wants::any(done("core 6.3"))),
        H::XenVersion => domains::xen_version(t),
        H::ConsoleIo => domains::console_io(g, t),
        H::Sysctl => domains::sysctl(g, t),
        H::Domctl => domains::domctl(g, t),
        H::Tenon => domains::tenon(g, t),
        H::PlatformOp => domains::platform_op(),
        // core 5.2, 8.2: forms for guests older than ours are not offered; Xen still has them.
        H::SchedOpCompat => {
            let never = refused(guests::abi::Errno::NoSys, "core 8.2");
            Shape::new([99, 0, 0, 0, 0]).address(Place::Arg(1), Wants::any(never))
        }
        H::EventChannelOpCompat => {
            let never = refused(guests::abi::Errno::NoSys, "core 5.2");
            let wants = Wants::any(never).on_xen(Wants::input(never).with(Class::ReadOnly, never));
            Shape::new([0; 5]).part(Place::Arg(0), &[99u64; 3], wants)
        }
    }
}
