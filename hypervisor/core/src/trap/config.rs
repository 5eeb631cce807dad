//! PCI configuration by its two ports (PCI Local Bus 3.0, 3.2.2.3.2), for a domain with devices. Ring 0 passes accesses on
//! and does not know what they mean.
//!
//! Never touches: any other port.

use crate::domain::Powers;
use crate::prelude::*;

/// Where the function and register are chosen that the data ports lead to: 32 bits at once.
const ADDRESS: u16 = 0xcf8;
/// The first data port.
const DATA: u16 = 0xcfc;
/// One after the last.
const DATA_END: u16 = DATA + 4;
/// Bits of the address that some machines take for a larger register space.
const RESERVED: u32 = 0x7f << 24;

/// Whether an access of the caller's is one to PCI configuration.
fn is_config<M>(ctx: &Ctx<'_, M>, port: u16, size: u8) -> bool {
    let chooses = (port, size) == (ADDRESS, 4);
    let reaches = (DATA..DATA_END).contains(&port) && port + u16::from(size) <= DATA_END;
    (chooses || reaches) && ctx.domain.may(Powers::DEVICES)
}

/// Reads from a port, if it is one of these and the caller's domain has devices.
pub(super) fn read<M: Machine>(ctx: &Ctx<'_, M>, port: u16, size: u8) -> Option<u64> {
    is_config(ctx, port, size).then(|| ctx.m.read_config(port, size).into())
}

/// Writes to a port, if it is one of these and the caller's domain has devices.
pub(super) fn write<M: Machine>(ctx: &Ctx<'_, M>, port: u16, size: u8, value: u32) {
    if is_config(ctx, port, size) {
        ctx.m.write_config(port, size, if port == ADDRESS { value & !RESERVED } else { value });
    }
}
