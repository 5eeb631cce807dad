//! The machine: how an x86-64 CPU and a PC's few devices do what the rules ask.
//!
//! Touches: registers, descriptor tables, page tables of the hypervisor's own slots, LAPIC, IOAPIC, UART, PIT, RTC.
//! Never touches: a rule. It returns facts (an exit, a fault, an address) and carries out orders; it never looks at a
//! guest's tables and never follows a guest's address.
//! Keeps: P12 together with the rules (a guest runs in ring 3 or not at all). It is the only crate of ring 0 with
//! `unsafe`.
//!
//! Ring 0 runs with interrupts off. The only places that let one in are a running guest ([`Hardware::enter`] returns then),
//! [`Hardware::idle`], and the moment between two steps of a call (`Machine::let_in`). To Rust, running a guest is a function
//! call:
//!
//! ```text
//! hardware.enter(&mut registers, Return::Exact);
//! match hardware.end(&registers) { Exit::Syscall => .., Exit::Fault { .. } => .. }
//! ```
//!
//! Every CPU shares one set of upper page tables (slots 256..272 of every root):
//!
//! ```text
//! 256  machine-to-physical table, readable in ring 3      260  windows for GDT and LDT, one set per CPU
//! 257  LAPIC and IOAPIC, uncached                         261  the image
//! 262+ RAM, frame by frame (direct map)
//! ```
#![cfg_attr(not(test), no_std)]
// The assembly that calls much of this is built for the image alone; hosts check and test the rest.
#![cfg_attr(not(target_os = "none"), allow(dead_code))]

mod acpi;
mod apic;
mod boot;
mod cpu;
mod entry;
mod insn;
mod ioapic;
mod memory;
mod percpu;
mod ranges;
mod report;
mod serial;
mod smp;
mod timer;

pub use boot::BootInfo;
pub use entry::Return;
pub use ranges::Ranges;
pub use report::init_logger;

/// The machine this code runs on: a handle without content, since there is only one.
#[derive(Clone, Copy, Debug)]
pub struct Hardware(());

/// The handle [`BootInfo`] carries.
static HARDWARE: Hardware = Hardware(());

/// How the machine stops: what goes to the exit port. An emulator ends with twice as much and one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict(u32);

impl Verdict {
    /// All went well: status 33.
    pub const SUCCESS: Self = Self(0x10);
    /// The hypervisor failed: status 35.
    pub const FAILURE: Self = Self(0x11);

    /// The domain that may turn the machine off ended for this reason, which is less than 32: status 65 and up.
    #[must_use]
    pub const fn of_domain(reason: u32) -> Self {
        Self(0x20 | (reason & 0x1f))
    }
}

/// Names the function that boot ends in, `fn(BootInfo) -> !`. To be used once, by the image.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        fn hypervisor_main(boot: $crate::BootInfo) -> ! {
            let main: fn($crate::BootInfo) -> ! = $main;
            main(boot)
        }
    };
}
