//! The debug registers of a vcpu: which values they may hold, and which of these the CPU gets (ABI core 3.11).
//!
//! Touches: values.
//! Never touches: the CPU; `ops` loads the registers.
//! Keeps: no breakpoint in the hypervisor's addresses; no breakpoint on ports in the CPU, where accesses of ring 0
//! could hit it.

use crate::policy::CR4_DE;
use crate::prelude::*;

/// DR6 without any event recorded.
pub const DR6_CLEAR: u64 = 0xffff_0ff0;
/// DR7 at reset, without any breakpoint enabled.
pub const DR7_CLEAR: u64 = 0x400;
/// Bits of DR7: breakpoints enabled. Below: general detect, the bits that read as 1, and those that read as 0.
pub(crate) const ENABLED: u64 = 0xff;
const DETECT: u64 = 1 << 13;
const ONE: u64 = 1 << 10;
const ZERO: u64 = 1 << 11 | 1 << 12 | 1 << 14 | 1 << 15;

/// Returns the value that the CPU gets for a DR7.
pub(crate) fn loaded(dr7: u64) -> u64 {
    let wanted = if dr7 & ENABLED == 0 { 0 } else { dr7 & !on_ports(dr7) };
    if wanted & ENABLED == 0 { DR7_CLEAR } else { wanted }
}

/// Checks a write to the debug register with this number. Returns the register's index, and the value as it is stored.
///
/// # Errors
/// `Perm` for addresses of the hypervisor, for bits that would trap the hypervisor, and for breakpoints on ports unless
/// CR4.DE is set; `Inval` for a value wider than the register; `NoDev` for a register that does not exist, with CR4.DE
/// also 4 and 5.
pub fn accept(cr4: u64, register: u64, value: u64) -> Result<(usize, u64), Errno> {
    Ok(match index(cr4, register)? {
        6 | 7 if value >> 32 != 0 => return Err(Errno::Inval),
        6 => (6, value & !(1 << 12) | DR6_CLEAR),
        7 if value & DETECT != 0 => return Err(Errno::Perm),
        7 if value & ENABLED != 0 && cr4 & CR4_DE == 0 && on_ports(value) != 0 => return Err(Errno::Perm),
        7 => (7, value & !ZERO | ONE),
        _ if !GuestVirt(value).is_guests() => return Err(Errno::Perm),
        index => (index, value),
    })
}

/// Returns the index of the debug register with this number: 4 and 5 are other names of 6 and 7, unless CR4.DE is set.
///
/// # Errors
/// `NoDev` for a register that does not exist.
pub(crate) fn index(cr4: u64, register: u64) -> Result<usize, Errno> {
    match register {
        4 | 5 if cr4 & CR4_DE != 0 => Err(Errno::NoDev),
        4 | 5 => Ok(low16(register + 2).into()),
        0..=7 => Ok(low16(register).into()),
        _ => Err(Errno::NoDev),
    }
}

/// The bits of DR7 that belong to breakpoints on ports: enable, kind and length.
fn on_ports(dr7: u64) -> u64 {
    const ON_PORT: u64 = 2;
    let fields = (0..4).filter(|n| dr7 >> (16 + 4 * n) & 3 == ON_PORT);
    fields.fold(0, |bits, n| bits | 3 << (2 * n) | 0xf << (16 + 4 * n))
}

/// Returns the bits of DR6 for the port breakpoints that an access hits. The CPU never detects such a hit, since guests
/// have no ports.
pub(crate) fn port_breakpoints((cr4, debug): (u64, &[u64; 8]), port: u16, size: u8) -> u64 {
    let dr7 = debug[7] & on_ports(debug[7]);
    if cr4 & CR4_DE == 0 {
        return 0;
    }
    let met = |n: usize, address: u64| {
        let length = match dr7 >> (18 + 4 * n) & 3 {
            2 => 8,
            length => length + 1,
        };
        let (first, at) = (address & !(length - 1), u64::from(port));
        dr7 >> (2 * n) & 3 != 0 && at < first.saturating_add(length) && first < at + u64::from(size)
    };
    let breakpoints = debug.iter().enumerate().take(4);
    breakpoints.fold(0, |bits, (n, &address)| bits | u64::from(met(n, address)) << n)
}
