//! PCI configuration by its I/O ports (PCI Local Bus 3.0, section 3.2.2.3.2), for a domain with devices. Ring 0 passes accesses
//! on, and does not interpret them.
//!
//! Never touches: any other port.

use crate::domain::Powers;
use crate::prelude::*;

/// The address port: an access of 32 bits chooses the function and the register that the data ports access.
const ADDRESS: u16 = 0xcf8;
/// The first data port.
const DATA: u16 = 0xcfc;
/// The port after the last data port.
const DATA_END: u16 = DATA + 4;
/// Reserved bits of the address, always written as zeroes: some machines use them for registers above 255.
const RESERVED: u32 = 0x7f << 24;

/// Returns whether the access is one to PCI configuration, and the caller's domain has devices.
fn is_config<M>(ctx: &Ctx<'_, M>, port: u16, size: u8) -> bool {
    let chooses = (port, size) == (ADDRESS, 4);
    let reaches = (DATA..DATA_END).contains(&port) && port + u16::from(size) <= DATA_END;
    (chooses || reaches) && ctx.domain.may(Powers::DEVICES)
}

/// Reads `size` bytes from a port of PCI configuration. `None`, without a read, if [`is_config`] is false.
pub(super) fn read<M: Machine>(ctx: &Ctx<'_, M>, port: u16, size: u8) -> Option<u64> {
    is_config(ctx, port, size).then(|| ctx.m.read_config(port, size).into())
}

/// Writes `size` bytes to a port of PCI configuration. Ignores the write if [`is_config`] is false.
pub(super) fn write<M: Machine>(ctx: &Ctx<'_, M>, port: u16, size: u8, value: u32) {
    if is_config(ctx, port, size) {
        ctx.m.write_config(port, size, if port == ADDRESS { value & !RESERVED } else { value });
    }
}
