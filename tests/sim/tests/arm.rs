//! What the entry code may do by itself: nothing, if one thing is out of the ordinary that it does not look at. Some of these
//! no guest can bring about, because whoever writes them checks: a mistake there is to be none here.

use hv_core::addr::GuestVirt;
use hv_core::lean;
use hv_core::machine::{CpuState, mode};
use hypercall_abi::mmu::pte;
use sim::world::Context;
use sim::world::build::{self, HANDLER, at, page};
use sim::world::script::tell;
use std::sync::atomic::Ordering::Relaxed;

/// The words of the gate of page faults in a trap table.
const GATE: usize = 2 * 14;
const ADDRESS: usize = GATE + 1;
/// Vector and flags: no ring, and events are masked.
const MASKS: u64 = 14 | 7 << 8;

/// The lowest and highest addresses that are not canonical, and some between.
const BAD: [u64; 4] = [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 0x1234_0000_0000_0000, 1 << 63];
const GOOD: [u64; 3] = [1, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000];

/// What the entry code may do.
fn armed(ctx: &mut Context<'_>) -> u64 {
    lean::arm(ctx);
    let mode = ctx.m.entry().mode.load(Relaxed);
    lean::left(ctx);
    mode
}

/// Changes one thing, which decides whether the entry code acts, and then takes it back, after which it does.
fn try_out(
    ctx: &mut Context<'_>,
    what: &str,
    acts: bool,
    change: impl Fn(&mut Context<'_>),
    back: impl Fn(&mut Context<'_>),
) {
    change(ctx);
    assert_eq!(matches!(armed(ctx), mode::USER | mode::KERNEL), acts, "{what}");
    back(ctx);
    assert_eq!(armed(ctx), mode::KERNEL, "after {what}");
}

#[test]
fn one_thing_out_of_the_ordinary_is_enough() {
    tell(300, |stage| {
        let mut guests = (0..4).map(|_| stage.enter(false));
        let guest = guests.find(|guest| build::is_ordinary(&guest.pages)).expect("most are");
        drop(guests);
        stage.on_cpu(&guest, |ctx, _| {
            let traps = ctx.state.traps.expect("it has handlers");
            assert_eq!(armed(ctx), mode::KERNEL, "fast paths are open to this guest");
            for (address, acts) in BAD.map(|bad| (bad, false)).into_iter().chain(GOOD.map(|good| (good, true))) {
                let syscall = |address: u64| move |ctx: &mut Context<'_>| ctx.state.callbacks.syscall.address = address;
                try_out(ctx, "the handler of system calls", acts, syscall(address), syscall(HANDLER));
                let fault = |address: u64| move |ctx: &mut Context<'_>| ctx.m.poke(traps, ADDRESS, address);
                try_out(ctx, "the handler of page faults", acts, fault(address), fault(HANDLER));
                let base = |base: u64| move |ctx: &mut Context<'_>| ctx.m.entry().other_gs.store(base, Relaxed);
                try_out(ctx, "the other GS base", acts, base(address), base(0));
            }
            let syscall = |address: u64| move |ctx: &mut Context<'_>| ctx.state.callbacks.syscall.address = address;
            try_out(ctx, "no handler of system calls", false, syscall(0), syscall(HANDLER));
            let fault = |address: u64| move |ctx: &mut Context<'_>| ctx.m.poke(traps, ADDRESS, address);
            try_out(ctx, "no handler of page faults", false, fault(0), fault(HANDLER));
            let masks = |masks: bool| move |ctx: &mut Context<'_>| ctx.state.callbacks.syscall.masks_events = masks;
            try_out(ctx, "system calls with events", false, masks(false), masks(true));
            let gate = |word: u64| move |ctx: &mut Context<'_>| ctx.m.poke(traps, GATE, word);
            try_out(ctx, "page faults with events", false, gate(MASKS & !(4 << 8)), gate(MASKS));
            let nmi = |masked: bool| move |ctx: &mut Context<'_>| ctx.state.nmi_masked = masked;
            try_out(ctx, "NMIs that are masked", false, nmi(true), nmi(false));
            let stale = |stale: bool| move |ctx: &mut Context<'_>| ctx.state.areas_stale = stale;
            try_out(ctx, "areas that wait", false, stale(true), stale(false));
            let fsgsbase = |on: bool| move |ctx: &mut Context<'_>| ctx.m.set_guest_cr4(u64::from(on) << 16);
            try_out(ctx, "no GS instructions", false, fsgsbase(false), fsgsbase(true));
            let user = guest.pages[page::USER_ROOT];
            let root = |on: bool| move |ctx: &mut Context<'_>| ctx.state.user_root = on.then_some(user);
            try_out(ctx, "no root of user mode", false, root(false), root(true));
            root(false)(ctx);
            assert_eq!(armed(ctx), mode::ROOTLESS, "the rules may take fast paths without a root of user mode");
            root(true)(ctx);
            let lean = |on: bool| move |ctx: &mut Context<'_>| ctx.world.frames.set_fast_paths(on);
            try_out(ctx, "the option", false, lean(false), lean(true));
            // The stack: where it ends, and what is there.
            let end = at(page::STACK + 1);
            let stack = |sp: u64| move |ctx: &mut Context<'_>| ctx.state.kernel_sp = sp;
            let nowhere = at(build::PAGES + 2);
            for sp in [end - 4, end - 4096 + 64, end - 4096 + 71, 0, 8, 72, nowhere, BAD[0], u64::MAX - 7] {
                try_out(ctx, "a stack that ends elsewhere", false, stack(sp), stack(end));
            }
            for sp in [end - 8, end - 16, end - 4096, end - 4096 + 72, at(page::DATA + 1)] {
                try_out(ctx, "another stack", true, stack(sp), stack(end));
            }
            try_out(ctx, "a stack that is read-only", false, stack(at(page::L1 + 1)), stack(end));
            let frame = guest.pages[page::STACK];
            let leaf = |flags: u64| {
                move |ctx: &mut Context<'_>| {
                    let (domain, id, root) = (ctx.domain, ctx.domain.id(), ctx.state.kernel_root.expect("a root"));
                    let entry = if flags == 0 { 0 } else { frame.address() | pte::PRESENT | pte::ACCESSED | flags };
                    let updated = ctx.session(domain).update_va(root, GuestVirt(end - 4096), entry, id);
                    assert_eq!(updated, Ok(()));
                }
            };
            let usual = pte::USER | pte::WRITE | pte::DIRTY;
            for flags in [0, pte::USER] {
                try_out(ctx, "a stack that has become read-only, or went", false, leaf(flags), leaf(usual));
            }
        });
    });
}
