//! The local APIC: this CPU's timer, interrupts to other CPUs, acknowledgement.

use crate::Hardware;
use crate::insn::{self, msr};
use crate::memory::device_register;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use hv_core::addr::low32;
use hv_core::machine::Devices;

/// Vectors. All above the exceptions and INT 0x80, and in priority order.
pub(crate) const SERIAL: u32 = 0xe0;
pub(crate) const TIMER: u32 = 0xf0;
pub(crate) const KICK: u32 = 0xf1;
pub(crate) const FLUSH: u32 = 0xf2;
pub(crate) const SPURIOUS: u32 = 0xff;

/// Registers, by their offset in the page; the MSR form counts 16 bytes as one.
pub(crate) mod register {
    pub(crate) const ID: u32 = 0x20;
    pub(crate) const TASK_PRIORITY: u32 = 0x80;
    pub(crate) const EOI: u32 = 0xb0;
    pub(crate) const SPURIOUS: u32 = 0xf0;
    pub(crate) const COMMAND: u32 = 0x300;
    pub(crate) const COMMAND_HIGH: u32 = 0x310;
    pub(crate) const TIMER: u32 = 0x320;
    pub(crate) const LINT0: u32 = 0x350;
    pub(crate) const LINT1: u32 = 0x360;
    pub(crate) const ERROR: u32 = 0x370;
    pub(crate) const INITIAL_COUNT: u32 = 0x380;
    pub(crate) const CURRENT_COUNT: u32 = 0x390;
    pub(crate) const DIVIDE: u32 = 0x3e0;
}

/// Mask bit of a local vector table entry.
pub(crate) const MASKED: u32 = 1 << 16;

/// The firmware left it in its MSR form.
static BY_MSR: AtomicBool = AtomicBool::new(false);

/// Machine address of the register page.
pub(crate) fn address() -> u64 {
    insn::rdmsr(msr::APIC_BASE) & 0x000f_ffff_ffff_f000
}

/// Reads a register.
pub(crate) fn read(register: u32) -> u32 {
    if BY_MSR.load(Relaxed) {
        return low32(insn::rdmsr(msr::X2APIC + register / 16));
    }
    let at = device_register(register.into());
    // SAFETY: the page of registers is mapped uncached at DEVICES; `register` is one of `register`'s constants.
    unsafe { at.read_volatile() }
}

/// Writes a register.
pub(crate) fn write(register: u32, value: u32) {
    if BY_MSR.load(Relaxed) {
        // SAFETY: registers of the LAPIC decide which interrupts come, never what memory means.
        return unsafe { insn::wrmsr(msr::X2APIC + register / 16, value.into()) };
    }
    let at = device_register(register.into());
    // SAFETY: as for `read`; and as above.
    unsafe { at.write_volatile(value) };
}

/// Turns this CPU's LAPIC on, with nothing but what we ask for later.
pub(crate) fn init() {
    let base = insn::rdmsr(msr::APIC_BASE);
    BY_MSR.store(base & 1 << 10 != 0, Relaxed);
    // SAFETY: sets the global enable bit alone; the register page stays where it is mapped.
    unsafe { insn::wrmsr(msr::APIC_BASE, base | 1 << 11) };
    for entry in [register::TIMER, register::LINT0, register::ERROR] {
        write(entry, MASKED | SPURIOUS);
    }
    // NMI, as on every PC; the entry code counts it.
    write(register::LINT1, 4 << 8);
    write(register::TASK_PRIORITY, 0);
    write(register::SPURIOUS, 1 << 8 | SPURIOUS);
}

/// This CPU's APIC number.
pub(crate) fn id() -> u32 {
    if BY_MSR.load(Relaxed) { read(register::ID) } else { read(register::ID) >> 24 }
}

/// The destination that names all CPUs.
const BROADCAST: u8 = 0xff;

/// What a device writes where in order to raise a vector on this CPU, as far as a device can name the CPU (Intel SDM volume 3,
/// "Message Signalled Interrupts").
fn message(vector: u8) -> Option<(u64, u32)> {
    let id = u8::try_from(id()).ok().filter(|id| *id != BROADCAST)?;
    Some((0xfee0_0000 | u64::from(id) << 12, vector.into()))
}

/// Ends the interrupt in service.
pub(crate) fn acknowledge() {
    write(register::EOI, 0);
}

/// Sends an interrupt to the CPU with this APIC number.
pub(crate) fn send(apic_id: u32, vector: u32) {
    let command = 1 << 14 | vector;
    if BY_MSR.load(Relaxed) {
        let both = u64::from(apic_id) << 32 | u64::from(command);
        // SAFETY: as for `write`.
        return unsafe { insn::wrmsr(msr::X2APIC + register::COMMAND / 16, both) };
    }
    while read(register::COMMAND) & 1 << 12 != 0 {
        core::hint::spin_loop();
    }
    write(register::COMMAND_HIGH, apic_id << 24);
    write(register::COMMAND, command);
}

impl Devices for Hardware {
    fn message(&self, vector: u8) -> Option<(u64, u32)> {
        message(vector)
    }

    fn hold_messages(&self, hold: bool) {
        // The interrupts of ring 0 itself lie above.
        write(register::TASK_PRIORITY, if hold { SERIAL - 1 } else { 0 });
    }

    fn read_config(&self, port: u16, size: u8) -> u32 {
        insn::input(port, size)
    }

    fn write_config(&self, port: u16, size: u8, value: u32) {
        insn::output(port, size, value);
    }
}
