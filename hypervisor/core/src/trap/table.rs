//! The trap table of a vcpu: which of the guest's handlers takes which vector (ABI core 3.2).

use crate::prelude::*;
use crate::vcpu::Handler;
use hypercall_abi::callback::{TRAP_MASKS_EVENTS, TrapInfo};
use zerocopy::{FromZeros, IntoBytes};

/// The guest's gate of a vector; its address is 0 if there is none.
pub fn gate_of<M: Machine>(ctx: &Ctx<'_, M>, vector: u8) -> TrapInfo {
    let mut gate = TrapInfo::new_zeroed();
    let (to, first) = (gate.as_mut_bytes().as_chunks_mut().0, usize::from(vector) * 2);
    let words = ctx.state.traps.and_then(|frame| ctx.m.page(frame).get(first..first + 2));
    to.iter_mut().zip(words.unwrap_or_default()).for_each(|(to, word)| *to = word.load(Relaxed).to_le_bytes());
    gate
}

/// The guest's handler of a vector.
pub(crate) fn gate<M: Machine>(ctx: &Ctx<'_, M>, vector: u8) -> Handler {
    let TrapInfo { address, flags, .. } = gate_of(ctx, vector);
    Handler { address, masks_events: flags & TRAP_MASKS_EVENTS != 0 }
}

/// Sets a gate in a trap table.
pub(crate) fn set_gate<M: Machine>(m: &M, table: Frame, gate: &TrapInfo) {
    m.write(table, usize::from(gate.vector) * size_of::<TrapInfo>(), gate.as_bytes());
}
