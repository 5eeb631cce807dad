//! Converts a vcpu's state from and to the ABI's structure (ABI core 7, 10.3).

use super::{Handler, MAX_LDT, debug};
use crate::event::UpcallMask;
use crate::flags as rflags;
use crate::paging::{Outcome, Refused, Session, Stop};
use crate::policy::{CR0_TS, CR4_FIXED, cr0, cr4_choice};
use crate::prelude::*;
use crate::trap::table::set_gate;
use hypercall_abi::context::{VcpuContext, flags};
use hypercall_abi::selector;
use zerocopy::IntoBytes;

/// The state bits of the XSAVE header after an FXSAVE image: x87 and SSE are present.
const XSAVE_LEGACY: u64 = 3;

/// `VCPUOP_initialise`: sets the initial state of a vcpu of the caller's own domain.
///
/// # Errors
/// `Exist` if the vcpu has a state, `Busy` while it runs, and those of [`set`].
pub fn initialise<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu, arg: u64) -> Answer {
    let context: VcpuContext = ctx.read(arg)?;
    ensure!(vcpu.number() != ctx.vcpu.number(), Errno::Exist);
    let mut state = vcpu.state.try_take().ok_or(Errno::Busy)?;
    ensure!(!state.initialised, Errno::Exist);
    let domain = ctx.domain;
    set(&mut ctx.cpu_ctx(), domain, vcpu, &mut state, &context)
}

/// Sets the whole state of a vcpu that does not run.
///
/// # Errors
/// `Inval` for addresses, tables or roots that the domain may not use; the vcpu is then unchanged.
pub fn set<M: Machine>(
    cpu_ctx: &mut CpuCtx<'_, M>,
    domain: &Domain,
    vcpu: &Vcpu,
    state: &mut VcpuState,
    context: &VcpuContext,
) -> Answer {
    let (m, world) = (cpu_ctx.m, cpu_ctx.world);
    ensure!(state.traps.is_some(), Errno::NoMem);
    check(context)?;
    // All that can be refused is taken here; if anything is refused, everything taken is given back.
    let mut taken = VcpuUses::default();
    let outcome = taken.take(&mut cpu_ctx.session(domain), context);
    if let Err(stop) = outcome {
        taken.give_back(cpu_ctx, domain);
        return Err(stop.into());
    }
    let old = VcpuUses { gdt: state.gdt, roots: [state.kernel_root, state.user_root], ldt: state.ldt_mapped };
    *state = VcpuState {
        kernel_root: taken.roots[0],
        user_root: taken.roots[1],
        gdt: taken.gdt,
        traps: state.traps,
        fpu: state.fpu,
        runstate: state.runstate,
        runstate_area: state.runstate_area,
        time_area: state.time_area,
        time_stale: state.time_area.is_some(), // another root may map another page at this address
        initialised: true,
        ..VcpuState::new()
    };
    Part::ALL.iter().for_each(|part| (part.set)(state, context, m));
    old.give_back(cpu_ctx, domain);
    if vcpu.number().0 == 0 {
        domain.assists.fetch_or(context.vm_assist, Relaxed);
    }
    if context.flags & flags::ONLINE != 0 {
        vcpu.online.store(true, SeqCst);
        if domain.runs() {
            world.sched.start(m, vcpu);
        }
    }
    Ok(0)
}

/// The uses of frames that a vcpu holds: GDT frames, kernel root and user root, LDT pages.
#[derive(Clone, Copy, Default)]
pub(crate) struct VcpuUses {
    pub(crate) gdt: [Option<Frame>; 14],
    pub(crate) roots: [Option<Frame>; 2],
    pub(crate) ldt: [Option<Frame>; 16],
}

impl VcpuUses {
    /// Takes the frames of a GDT with this many entries.
    pub(crate) fn take_gdt<M: Machine>(
        &mut self,
        session: &mut Session<'_, M>,
        numbers: &[u64],
        entries: u64,
    ) -> Outcome<()> {
        let count = usize::try_from(entries.div_ceil(512)).unwrap_or(usize::MAX).min(numbers.len());
        session.take_gdt(numbers.get(..count).unwrap_or_default(), &mut self.gdt)
    }

    /// Takes all frames that a context names. On `More`, the roots taken so far are kept in `session` until the same
    /// request is made again.
    fn take<M: Machine>(&mut self, session: &mut Session<'_, M>, context: &VcpuContext) -> Outcome<()> {
        let taken = self.take_roots(session, context);
        let taken = taken.and_then(|()| self.take_gdt(session, &context.gdt_frames, context.gdt_ents));
        if taken == Err(Stop::More) {
            self.roots.iter_mut().filter_map(Option::take).for_each(|root| session.set_aside(root));
        }
        taken
    }

    fn take_roots<M: Machine>(&mut self, session: &mut Session<'_, M>, context: &VcpuContext) -> Outcome<()> {
        let user_needed = context.flags & flags::IN_KERNEL == 0;
        let roots = [(context.ctrlreg[3], true), (context.ctrlreg[1], user_needed)];
        for (slot, (address, needed)) in self.roots.iter_mut().zip(roots) {
            if address != 0 || needed {
                let frame = Frame::containing(address).ok_or(Refused::NoSuchFrame)?;
                session.switch_root(None, Some(frame), || {})?;
                *slot = Some(frame);
            }
        }
        Ok(())
    }

    /// Drops all uses.
    pub(crate) fn give_back<M: Machine>(&self, cpu_ctx: &mut CpuCtx<'_, M>, domain: &Domain) {
        for frame in self.gdt.iter().chain(&self.ldt).flatten() {
            cpu_ctx.world.frames.drop_use(*frame, domain.id());
        }
        let mut session = cpu_ctx.session(domain);
        self.roots.iter().flatten().for_each(|root| session.drop_root(*root));
    }
}

/// Refuses addresses that no guest may use, and tables that are too large.
fn check(context: &VcpuContext) -> Result<(), Errno> {
    let handlers = context.trap_ctxt.iter().map(|gate| gate.address);
    let callbacks = [context.event_callback_eip, context.failsafe_callback_eip, context.syscall_callback_eip];
    let bases = [context.fs_base, context.gs_base_kernel, context.gs_base_user, context.user_regs.rip];
    let mut addresses = handlers.chain(callbacks).chain(bases);
    ensure!(addresses.all(|address| GuestVirt(address).is_canonical()), Errno::Inval);
    let ldt = GuestVirt(context.ldt_base);
    ensure!(context.ldt_ents == 0 || ldt.offset() == 0 && ldt.is_guests(), Errno::Inval);
    ensure!(context.ldt_ents <= u64::from(MAX_LDT), Errno::Inval);
    ensure!(context.gdt_ents <= u64::from(selector::GUEST_ENTRIES), Errno::Inval);
    Ok(())
}

/// Returns the state of a vcpu that does not run, for the toolstack.
pub fn get<M: Machine>(m: &M, domain: &Domain, vcpu: &Vcpu, state: &VcpuState) -> VcpuContext {
    let mut context = VcpuContext::default();
    Part::ALL.iter().for_each(|part| (part.get)(state, &mut context, m));
    context.user_regs.saved_upcall_mask = UpcallMask::of(m, vcpu).is_set().into();
    context.vm_assist = domain.assists.load(Relaxed);
    context.flags |= flag(vcpu.online.load(SeqCst), flags::ONLINE);
    context
}

/// Returns `flag` if `on`, else 0.
fn flag(on: bool, flag: u64) -> u64 {
    if on { flag } else { 0 }
}

/// One part of a vcpu's state: how to set it from the ABI's context, and how to get it back.
struct Part<M: Machine> {
    set: fn(&mut VcpuState, &VcpuContext, &M),
    get: fn(&VcpuState, &mut VcpuContext, &M),
}

impl<M: Machine> Part<M> {
    /// All parts that the ABI's context has. The frames among them have been taken before. The order matters: segment
    /// bases depend on the mode, debug registers on CR4.
    const ALL: [Self; 9] = [
        Self { set: set_registers, get: get_registers },
        Self { set: set_mode, get: get_mode },
        Self { set: set_segments, get: get_segments },
        Self { set: set_control, get: get_control },
        Self { set: set_debug, get: get_debug },
        Self { set: set_tables, get: get_tables },
        Self { set: set_callbacks, get: get_callbacks },
        Self { set: set_fpu, get: get_fpu },
        Self { set: set_gates, get: get_gates },
    ];
}

/// Sets registers to values with which a guest may run (P12). Both structures have the same layout, after our first
/// word.
fn set_registers<M>(state: &mut VcpuState, context: &VcpuContext, _m: &M) {
    let (user, regs) = (&context.user_regs, &mut state.regs);
    fill(regs.as_mut_bytes().iter_mut().skip(size_of::<u64>()), user.as_bytes());
    regs.error = 0;
    (regs.cs, regs.ss) = (u64::from(user.cs) | 3, user.ss & 0xffff | 3);
    regs.rflags = user.rflags & rflags::GUEST | rflags::IF | 2;
    state.iopl = rflags::iopl(user.rflags);
}

fn get_registers<M>(state: &VcpuState, context: &mut VcpuContext, _m: &M) {
    let user = &mut context.user_regs;
    fill(user.as_mut_bytes(), state.regs.as_bytes().iter().skip(size_of::<u64>()));
    (user.error_code, user.entry_vector) = (0, 0);
    user.rflags |= u64::from(state.iopl) << 12;
}

/// Sets the mode (guest kernel or guest user) and the stack with which the kernel begins.
fn set_mode<M>(state: &mut VcpuState, context: &VcpuContext, _m: &M) {
    state.kernel_mode = context.flags & flags::IN_KERNEL != 0;
    (state.kernel_sp, state.kernel_ss) = (context.kernel_sp, context.kernel_ss & 0xffff | 3);
}

fn get_mode<M>(state: &VcpuState, context: &mut VcpuContext, _m: &M) {
    context.flags |= flag(state.kernel_mode, flags::IN_KERNEL);
    (context.kernel_sp, context.kernel_ss) = (state.kernel_sp, state.kernel_ss);
}

fn set_segments<M>(state: &mut VcpuState, context: &VcpuContext, _m: &M) {
    let regs = &context.user_regs;
    state.segments.selectors = [regs.ds, regs.es, regs.fs, regs.gs].map(low16);
    state.segments.fs_base = context.fs_base;
    let (kernel, user) = (context.gs_base_kernel, context.gs_base_user);
    (state.segments.gs_base, state.segments.other_gs) = if state.kernel_mode { (kernel, user) } else { (user, kernel) };
}

fn get_segments<M>(state: &VcpuState, context: &mut VcpuContext, _m: &M) {
    let regs = &mut context.user_regs;
    [regs.ds, regs.es, regs.fs, regs.gs] = state.segments.selectors.map(u64::from);
    context.fs_base = state.segments.fs_base;
    let (active, other) = (state.segments.gs_base, state.segments.other_gs);
    (context.gs_base_kernel, context.gs_base_user) = if state.kernel_mode { (active, other) } else { (other, active) };
}

fn set_control<M: Machine>(state: &mut VcpuState, context: &VcpuContext, m: &M) {
    state.task_switched = context.ctrlreg[0] & CR0_TS != 0;
    state.cr4 = context.ctrlreg[4] & cr4_choice(m);
}

fn get_control<M>(state: &VcpuState, context: &mut VcpuContext, _m: &M) {
    let address = |root: Option<Frame>| root.map_or(0, Frame::address);
    context.ctrlreg = [
        cr0(state.task_switched),
        address(state.user_root),
        state.cr2,
        address(state.kernel_root),
        state.cr4 | CR4_FIXED,
        0,
        0,
        0,
    ];
}

/// Sets the debug registers. As in Xen, values that a register cannot hold are ignored.
fn set_debug<M>(state: &mut VcpuState, context: &VcpuContext, _m: &M) {
    for (register, value) in (0u64..).zip(context.debugreg).filter(|(register, _)| !matches!(register, 4 | 5)) {
        if let Ok((index, value)) = debug::accept(state.cr4, register, value)
            && let Some(slot) = state.debug.get_mut(index)
        {
            *slot = value;
        }
    }
}

fn get_debug<M>(state: &VcpuState, context: &mut VcpuContext, _m: &M) {
    context.debugreg = state.debug;
}

/// Sets the descriptor tables.
fn set_tables<M>(state: &mut VcpuState, context: &VcpuContext, _m: &M) {
    state.gdt_entries = low32(context.gdt_ents);
    (state.ldt_base, state.ldt_entries) = (GuestVirt(context.ldt_base), low32(context.ldt_ents));
}

fn get_tables<M>(state: &VcpuState, context: &mut VcpuContext, _m: &M) {
    for (number, frame) in context.gdt_frames.iter_mut().zip(state.gdt) {
        *number = frame.map_or(0, Frame::number);
    }
    context.gdt_ents = state.gdt_entries.into();
    (context.ldt_base, context.ldt_ents) = (state.ldt_base.0, state.ldt_entries.into());
}

fn set_callbacks<M>(state: &mut VcpuState, context: &VcpuContext, _m: &M) {
    let masks = |flag| context.flags & flag != 0;
    let callback = |address, masks_events| Handler { address, masks_events };
    state.callbacks.event = callback(context.event_callback_eip, true);
    state.callbacks.failsafe = callback(context.failsafe_callback_eip, masks(flags::FAILSAFE_MASKS_EVENTS));
    state.callbacks.syscall = callback(context.syscall_callback_eip, masks(flags::SYSCALL_MASKS_EVENTS));
}

fn get_callbacks<M>(state: &VcpuState, context: &mut VcpuContext, _m: &M) {
    context.event_callback_eip = state.callbacks.event.address;
    context.failsafe_callback_eip = state.callbacks.failsafe.address;
    context.syscall_callback_eip = state.callbacks.syscall.address;
    context.flags |= flag(state.callbacks.failsafe.masks_events, flags::FAILSAFE_MASKS_EVENTS);
    context.flags |= flag(state.callbacks.syscall.masks_events, flags::SYSCALL_MASKS_EVENTS);
}

fn set_fpu<M: Machine>(state: &mut VcpuState, context: &VcpuContext, m: &M) {
    state.fpu_fresh = context.flags & flags::I387_VALID == 0;
    if let (Some(area), false) = (state.fpu, state.fpu_fresh) {
        m.zero(area);
        m.write(area, 0, &context.fpu_ctxt);
        m.write(area, context.fpu_ctxt.len(), &XSAVE_LEGACY.to_le_bytes());
    }
}

/// Gets the FPU state as FXSAVE would store it. A vcpu that has not run yet has none.
fn get_fpu<M: Machine>(state: &VcpuState, context: &mut VcpuContext, m: &M) {
    if let (Some(area), false) = (state.fpu, state.fpu_fresh) {
        m.read(area, 0, &mut context.fpu_ctxt);
        context.flags |= flags::I387_VALID;
    }
}

fn set_gates<M: Machine>(state: &mut VcpuState, context: &VcpuContext, m: &M) {
    let Some(traps) = state.traps else { return };
    m.zero(traps);
    context.trap_ctxt.iter().filter(|gate| gate.address != 0).for_each(|gate| set_gate(m, traps, gate));
}

fn get_gates<M: Machine>(state: &VcpuState, context: &mut VcpuContext, m: &M) {
    if let Some(traps) = state.traps {
        m.read(traps, 0, context.trap_ctxt.as_mut_bytes());
    }
}
