//! The I/O APICs. One of their inputs matters to us: the console's. Guests get none yet.

use crate::acpi::{Override, Topology};
use crate::insn::out8;
use crate::memory::device_register;
use crate::{apic, serial};
use hv_core::addr::{PAGE_BYTES, long};

/// ISA interrupt of COM1.
const COM1: u8 = 4;
/// Mask bit of a redirection entry.
const MASKED: u32 = 1 << 16;

/// An I/O APIC's two registers, in the device page after the LAPIC's and those of the I/O APICs before it.
#[derive(Clone, Copy)]
struct Registers(u64);

impl Registers {
    fn of(index: usize) -> Self {
        Self((long(index) + 1) * PAGE_BYTES)
    }

    fn select(self, register: u32) {
        // SAFETY: `of` is called only for I/O APICs that `memory::build` has mapped.
        unsafe { device_register(self.0).write_volatile(register) };
    }

    fn read(self, register: u32) -> u32 {
        self.select(register);
        // SAFETY: as for `select`; the data register is 16 bytes further on.
        unsafe { device_register(self.0 + 16).read_volatile() }
    }

    fn write(self, register: u32, value: u32) {
        self.select(register);
        // SAFETY: as for `read`; redirection entries only say which vector a line raises.
        unsafe { device_register(self.0 + 16).write_volatile(value) };
    }

    /// How many inputs it has.
    fn inputs(self) -> u32 {
        (self.read(1) >> 16 & 0xff) + 1
    }
}

/// Masks every line, the old controllers' too, and then lets the console's through to this CPU.
pub(crate) fn init(topology: &Topology) {
    for port in [0x21, 0xa1] {
        out8(port, 0xff);
    }
    for (index, _) in topology.ioapics.iter().enumerate() {
        let registers = Registers::of(index);
        for input in 0..registers.inputs() {
            registers.write(0x10 + 2 * input, MASKED);
        }
    }
    route(topology, topology.isa(COM1));
    // Whatever arrived before the line was open would never raise it again.
    serial::receive();
}

/// Sends a line to this CPU as the console's vector.
fn route(topology: &Topology, line: Override) {
    for (index, ioapic) in topology.ioapics.iter().enumerate() {
        let registers = Registers::of(index);
        let Some(input) = line.global.checked_sub(ioapic.first).filter(|&input| input < registers.inputs()) else {
            continue;
        };
        let signals = u32::from(line.low) << 13 | u32::from(line.level) << 15;
        registers.write(0x11 + 2 * input, apic::id() << 24);
        registers.write(0x10 + 2 * input, signals | apic::SERIAL);
        return;
    }
    log::warn!("no I/O APIC has input {} of the console: typing will be noticed late", line.global);
}
