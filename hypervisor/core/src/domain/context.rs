//! A vcpu's state from and to the ABI's structure (ABI core 7, 10.3).

use super::Domain;
use super::vcpu::{Handler, Vcpu, VcpuState};
use crate::addr::{Frame, GuestVirt};
use crate::dispatch::{Progress, stopped};
use crate::lock::{Held, Nothing};
use crate::machine::{Machine, Registers};
use crate::paging::{BUDGET, Stop};
use crate::trap::flags as rflags;
use crate::world::{Ctx, World};
use core::sync::atomic::Ordering;
use hypercall_abi::callback::TrapInfo;
use hypercall_abi::context::{UserRegs, VcpuContext, flags};
use hypercall_abi::{Errno, selector};
use zerocopy::IntoBytes;

/// `VCPUOP_initialise`: the first state of a vcpu of the caller's own domain.
///
/// # Errors
/// `Exist` if it has one, `Busy` while it runs, and those of [`set`].
pub fn initialise<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu, arg: u64) -> Result<Progress, Errno> {
    if vcpu.number() == ctx.vcpu.number() {
        return Err(Errno::Exist);
    }
    let mut own = vcpu.own.try_take().ok_or(Errno::Busy)?;
    if own.initialised {
        return Err(Errno::Exist);
    }
    let context: VcpuContext = ctx.read(arg)?;
    set(ctx.world, ctx.m, ctx.held, ctx.domain, vcpu, &mut own, &context)
}

/// Gives a vcpu that does not run a new state.
///
/// # Errors
/// `Inval` for addresses, tables or roots the domain may not have; the vcpu is then as it was.
pub fn set<M: Machine>(
    world: &World,
    m: &M,
    held: &mut Held<Nothing>,
    domain: &Domain,
    vcpu: &Vcpu,
    own: &mut VcpuState,
    context: &VcpuContext,
) -> Result<Progress, Errno> {
    let traps = own.traps.ok_or(Errno::NoMem)?;
    check_addresses(context)?;
    let gdt_entries = u32::try_from(context.gdt_ents)
        .ok()
        .filter(|n| *n <= u32::from(selector::GUEST_ENTRIES))
        .ok_or(Errno::Inval)?;
    // Everything that can be refused is taken here; if one thing is, all that was taken goes back.
    let mut taken = Taken::default();
    if let Err(stop) = taken.take(world, m, held, domain, context) {
        taken.give_back(world, m, held, domain);
        return stopped(stop);
    }
    let old = Taken { gdt: own.gdt, roots: [own.kernel_root, own.user_root] };
    let ldt_pages = core::mem::take(&mut own.ldt_mapped);
    *own = VcpuState {
        regs: registers(&context.user_regs),
        kernel_mode: context.flags & flags::IN_KERNEL != 0,
        kernel_root: taken.roots[0],
        user_root: taken.roots[1],
        gs_kernel: context.gs_base_kernel,
        gs_user: context.gs_base_user,
        kernel_sp: context.kernel_sp,
        kernel_ss: context.kernel_ss & 0xffff | 3,
        traps: Some(traps),
        fpu: own.fpu,
        fpu_fresh: context.flags & flags::I387_VALID == 0,
        task_switched: context.ctrlreg[0] & 8 != 0,
        cr4: context.ctrlreg[4] & crate::emulate::cr4_choice(m),
        iopl: u8::try_from(context.user_regs.rflags >> 12 & 3).unwrap_or(0),
        gdt: taken.gdt,
        gdt_entries,
        ldt_base: GuestVirt(context.ldt_base),
        ldt_entries: u32::try_from(context.ldt_ents).unwrap_or(0),
        runstate: own.runstate,
        runstate_area: own.runstate_area,
        time_area: own.time_area,
        initialised: true,
        ..VcpuState::new()
    };
    let callback = |address, masks_events| Handler { address, masks_events };
    own.callbacks.event = callback(context.event_callback_eip, true);
    own.callbacks.failsafe = callback(context.failsafe_callback_eip, context.flags & flags::FAILSAFE_MASKS_EVENTS != 0);
    own.callbacks.syscall = callback(context.syscall_callback_eip, context.flags & flags::SYSCALL_MASKS_EVENTS != 0);
    let regs = &context.user_regs;
    own.segments.selectors = [regs.ds, regs.es, regs.fs, regs.gs].map(|word| u16::try_from(word & 0xffff).unwrap_or(0));
    own.segments.fs_base = context.fs_base;
    own.segments.gs_base = if own.kernel_mode { context.gs_base_kernel } else { context.gs_base_user };
    if let (Some(area), false) = (own.fpu, own.fpu_fresh) {
        m.zero(area);
        m.write(area, 0, &context.fpu_ctxt);
    }
    m.zero(traps);
    for gate in &context.trap_ctxt {
        if gate.address != 0 {
            m.write(traps, usize::from(gate.vector) * size_of::<TrapInfo>(), gate.as_bytes());
        }
    }
    old.give_back(world, m, held, domain);
    ldt_pages.iter().flatten().for_each(|frame| _ = world.frames.drop_use(*frame));
    if vcpu.number().0 == 0 {
        domain.assists.fetch_or(context.vm_assist, Ordering::Relaxed);
    }
    if context.flags & flags::ONLINE != 0 {
        vcpu.online.store(true, Ordering::SeqCst);
        if domain.runs() {
            world.sched.start(m, vcpu);
        }
    }
    Ok(Progress::Done(0))
}

/// Uses that a context needs: GDT frames, kernel root, user root.
#[derive(Clone, Copy, Default)]
pub(super) struct Taken {
    pub(super) gdt: [Option<Frame>; 14],
    pub(super) roots: [Option<Frame>; 2],
}

impl Taken {
    fn take<M: Machine>(
        &mut self,
        world: &World,
        m: &M,
        held: &mut Held<Nothing>,
        domain: &Domain,
        context: &VcpuContext,
    ) -> Result<(), Stop> {
        const NO_FRAME: Stop = Stop::Refused(crate::paging::Refused::NoSuchFrame);
        let mut session = domain.space.open(m, &world.frames, BUDGET, held);
        let frames = usize::try_from(context.gdt_ents.div_ceil(512)).unwrap_or(0);
        for (slot, number) in self.gdt.iter_mut().zip(context.gdt_frames.iter().take(frames)) {
            let frame = Frame::new(*number).ok_or(NO_FRAME)?;
            session.take_descriptors(frame)?;
            *slot = Some(frame);
        }
        let user_needed = context.flags & flags::IN_KERNEL == 0;
        for (slot, (address, needed)) in
            self.roots.iter_mut().zip([(context.ctrlreg[3], true), (context.ctrlreg[1], user_needed)])
        {
            if address == 0 && !needed {
                continue;
            }
            let frame = Frame::containing(address).ok_or(NO_FRAME)?;
            session.switch_root(None, Some(frame), || {})?;
            *slot = Some(frame);
        }
        Ok(())
    }

    /// Drops what is held.
    pub(super) fn give_back<M: Machine>(&self, world: &World, m: &M, held: &mut Held<Nothing>, domain: &Domain) {
        self.gdt.iter().flatten().for_each(|frame| _ = world.frames.drop_use(*frame));
        let mut session = domain.space.open(m, &world.frames, BUDGET, held);
        for root in self.roots.iter().flatten() {
            session.drop_root(*root);
        }
    }
}

fn check_addresses(context: &VcpuContext) -> Result<(), Errno> {
    let handlers = context.trap_ctxt.iter().map(|gate| gate.address);
    let callbacks = [context.event_callback_eip, context.failsafe_callback_eip, context.syscall_callback_eip];
    let bases = [context.fs_base, context.gs_base_kernel, context.gs_base_user, context.user_regs.rip];
    if handlers.chain(callbacks).chain(bases).any(|address| !GuestVirt(address).is_canonical()) {
        return Err(Errno::Inval);
    }
    let ldt = GuestVirt(context.ldt_base);
    if context.ldt_ents > 8192 || (context.ldt_ents > 0 && (ldt.offset() != 0 || !ldt.is_guests())) {
        return Err(Errno::Inval);
    }
    Ok(())
}

/// Registers that a guest may run with (P12).
fn registers(regs: &UserRegs) -> Registers {
    Registers {
        scratch: 0,
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        rbp: regs.rbp,
        rbx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        rax: regs.rax,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        error: 0,
        rip: regs.rip,
        cs: u64::from(regs.cs) | 3,
        rflags: regs.rflags & rflags::GUEST | rflags::IF | 2,
        rsp: regs.rsp,
        ss: regs.ss & 0xffff | 3,
    }
}

/// The state of a vcpu that does not run, for the toolstack.
pub fn get<M: Machine>(m: &M, own: &VcpuState, masked: bool) -> VcpuContext {
    let regs = &own.regs;
    let [ds, es, fs, gs] = own.segments.selectors.map(u64::from);
    let mut context = VcpuContext {
        flags: if own.kernel_mode { flags::IN_KERNEL } else { 0 },
        user_regs: UserRegs {
            r15: regs.r15,
            r14: regs.r14,
            r13: regs.r13,
            r12: regs.r12,
            rbp: regs.rbp,
            rbx: regs.rbx,
            r11: regs.r11,
            r10: regs.r10,
            r9: regs.r9,
            r8: regs.r8,
            rax: regs.rax,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            rip: regs.rip,
            cs: u16::try_from(regs.cs & 0xffff).unwrap_or(0),
            saved_upcall_mask: u8::from(masked),
            rflags: regs.rflags,
            rsp: regs.rsp,
            ss: regs.ss,
            es,
            ds,
            fs,
            gs,
            ..UserRegs::default()
        },
        ldt_base: own.ldt_base.0,
        ldt_ents: u64::from(own.ldt_entries),
        gdt_ents: u64::from(own.gdt_entries),
        kernel_ss: own.kernel_ss,
        kernel_sp: own.kernel_sp,
        debugreg: own.debug,
        event_callback_eip: own.callbacks.event.address,
        failsafe_callback_eip: own.callbacks.failsafe.address,
        syscall_callback_eip: own.callbacks.syscall.address,
        fs_base: own.segments.fs_base,
        gs_base_kernel: if own.kernel_mode { own.segments.gs_base } else { own.gs_kernel },
        gs_base_user: if own.kernel_mode { own.gs_user } else { own.segments.gs_base },
        ..VcpuContext::default()
    };
    let address = |root: Option<Frame>| root.map_or(0, Frame::address);
    (context.ctrlreg[1], context.ctrlreg[3]) = (address(own.user_root), address(own.kernel_root));
    (context.ctrlreg[2], context.ctrlreg[4]) = (own.cr2, own.cr4 | crate::emulate::CR4_FIXED);
    for (number, frame) in context.gdt_frames.iter_mut().zip(own.gdt) {
        *number = frame.map_or(0, Frame::number);
    }
    if let Some(traps) = own.traps {
        m.read(traps, 0, context.trap_ctxt.as_mut_bytes());
    }
    context
}
