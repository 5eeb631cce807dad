//! The change of a vcpu between guest kernel and guest user mode.

use crate::prelude::*;

/// Changes between guest kernel and guest user mode: root and GS base. Returns false if the other mode has no root.
pub fn toggle<M: Machine>(ctx: &mut Ctx<'_, M>) -> bool {
    let to = if ctx.state.kernel_mode { ctx.state.user_root } else { ctx.state.kernel_root };
    let Some(root) = to else { return false };
    let (active, other) = (ctx.m.gs_base(), &ctx.m.entry().other_gs);
    ctx.m.set_gs_base(other.load(Relaxed));
    other.store(active, Relaxed);
    ctx.state.kernel_mode = !ctx.state.kernel_mode;
    ctx.m.load_root(root);
    if ctx.state.kernel_mode && ctx.state.areas_stale {
        super::runstate::write_areas(ctx);
    }
    true
}
