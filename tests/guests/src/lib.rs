//! What the test guests share. Expected values come from the ABI documents, never from what our hypervisor answers.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod front;
pub mod granted;
pub mod shared;
pub mod tables;
pub mod xenstore;

use unikernel::abi::domid;
pub use unikernel::abi::{self, Errno, Hypercall};
pub use unikernel::probe::{self, Registers, call};
pub use unikernel::{code, events, hypercall, memory, test};

/// RFLAGS bits.
pub mod flag {
    /// Trap after each instruction.
    pub const TF: u64 = 1 << 8;
    /// Interrupts enabled; in frames the inverted upcall mask.
    pub const IF: u64 = 1 << 9;
    /// Strings run backwards.
    pub const DF: u64 = 1 << 10;
    /// I/O privilege level.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// No debug exception at the next instruction.
    pub const RF: u64 = 1 << 16;
    /// Virtual 8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment checks.
    pub const AC: u64 = 1 << 18;
}

/// Our own number, as a port that only we may join shows it (core 5.2).
///
/// # Panics
/// If no port is free.
#[must_use]
pub fn own_number() -> u16 {
    let port = hypercall::allocate_unbound(domid::SELF, domid::SELF).expect("a port is free");
    let status = hypercall::port_status(domid::SELF, port).expect("the port is ours");
    hypercall::close(port).expect("the port is ours");
    u16::try_from(status.detail & 0xffff).expect("16 bits")
}

/// An address that is not canonical.
pub const NOT_CANONICAL: u64 = 0x8000_0000_0000_0000;

/// Registers with values that tell them apart.
#[must_use]
pub fn pattern() -> Registers {
    let value = |i: u64| 0x0101_0101_0101_0101 * i;
    Registers {
        rax: value(1),
        rbx: value(2),
        rcx: value(3),
        rdx: value(4),
        rsi: value(5),
        rdi: value(6),
        rbp: value(7),
        rsp: 0,
        r8: value(8),
        r9: value(9),
        r10: value(10),
        r11: value(11),
        r12: value(12),
        r13: value(13),
        r14: value(14),
        r15: value(15),
    }
}

/// The general registers of a frame, for comparison with those a probe started with.
#[must_use]
pub fn registers_of(frame: &unikernel::traps::TrapFrame) -> Registers {
    Registers {
        rax: frame.rax,
        rbx: frame.rbx,
        rcx: frame.rcx,
        rdx: frame.rdx,
        rsi: frame.rsi,
        rdi: frame.rdi,
        rbp: frame.rbp,
        rsp: frame.rsp,
        r8: frame.r8,
        r9: frame.r9,
        r10: frame.r10,
        r11: frame.r11,
        r12: frame.r12,
        r13: frame.r13,
        r14: frame.r14,
        r15: frame.r15,
    }
}

/// Sets the kernel's virtual I/O privilege level (core 8.2).
///
/// # Errors
/// What the hypervisor answered.
pub fn set_iopl(iopl: u32) -> Result<u64, Errno> {
    let arg = abi::physdev::SetIopl { iopl };
    let op = abi::physdev::PhysdevOp::SetIopl.number();
    call(Hypercall::PhysdevOp, [op, probe::address(&arg), 0, 0, 0])
}

/// The address of the upcall mask of vcpu 0.
#[must_use]
pub fn mask_address() -> u64 {
    events::shared_page().addr() as u64 + abi::shared::vcpu_info::UPCALL_MASK as u64
}

/// Installs one gate beside those there are.
///
/// # Panics
/// If the hypervisor refuses.
pub fn install_gate(gate: abi::callback::TrapInfo) {
    let gates = [gate, abi::callback::TrapInfo::default()];
    call(Hypercall::SetTrapTable, [probe::address(&gates), 0, 0, 0, 0]).expect("a gate is taken");
}
