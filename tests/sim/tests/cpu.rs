//! What a guest gets of the processor, told as stories.

use hv_core::addr::{Frame, VcpuId};
use hv_core::call::Halt;
use hv_core::machine::{Clock, Exit, Frames};
use hv_core::vcpu::debug::DR6_CLEAR;
use hv_core::vcpu::{Trap, VcpuState, context};
use hv_core::{policy, trap};
use hypercall_abi::callback::{CallbackOp, CallbackRegister, CallbackType};
use hypercall_abi::context::{VcpuContext, flags};
use hypercall_abi::vcpu::VcpuOp;
use hypercall_abi::{Errno, Hypercall, selector};
use sim::world::Context;
use sim::world::build::{self, at, page};
use sim::world::script::{Actor, Stage, tell};

/// The guest executes bytes that fault with #GP(0) where it stands; what is delivered for it.
fn privileged(ctx: &mut Context<'_>, code: Frame, bytes: &[u8]) -> Option<Trap> {
    ctx.m.write(code, 0, bytes);
    ctx.state.regs.rip = at(page::CODE);
    let _ = trap::handle(ctx, Exit::Fault { vector: 13, error: 0, address: 0 });
    ctx.state.trap.take()
}

const DEBUG: Option<Trap> = Some(Trap { vector: 1, error: None });
const PROTECTION: Option<Trap> = Some(Trap { vector: 13, error: Some(0) });
const TF: u64 = 1 << 8;

/// What RDMSR answers; `None`: a fault.
fn rdmsr(stage: &mut Stage, guest: &Actor, register: u64) -> Option<u64> {
    let code = guest.pages[page::CODE];
    stage.on_cpu(guest, |ctx, _| {
        ctx.state.regs.rcx = register;
        let trap = privileged(ctx, code, &[0x0f, 0x32]);
        trap.is_none().then_some(ctx.state.regs.rdx << 32 | ctx.state.regs.rax)
    })
}

/// Linux on Intel's CPUs drops ERMS where fast strings are off, keeps FSRM, and then walks over memory: no guest booted on
/// CPUs that have both (ABI core 3.14).
#[test]
fn fast_strings_are_on() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let misc_enable = rdmsr(stage, &guest, 0x1a0).expect("it can be read");
        assert_eq!(misc_enable & 1, 1, "fast strings: {misc_enable:#x}");
        assert_eq!(misc_enable & (1 << 11 | 1 << 12), 1 << 11 | 1 << 12, "no branch trace, no precise events");
        // Performance monitoring, MONITOR, limited CPUID, execute-disable taken away.
        assert_eq!(misc_enable & (1 << 7 | 1 << 18 | 1 << 22 | 1 << 34), 0, "{misc_enable:#x}");
    });
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// A CPU with every feature, AVX-512 too.
fn everything(leaf: u32, subleaf: u32) -> [u32; 4] {
    match (leaf, subleaf) {
        (0xd, 0) => [0xe7, 2688, 2688, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0xd, 5) => [64, 1088, 0, 0],
        (0xd, 6) => [512, 1152, 0, 0],
        (0xd, 7) => [1024, 1664, 0, 0],
        (0x8000_0000, _) => [0x8000_0021, 0, 0, 0],
        _ => [u32::MAX; 4],
    }
}

/// The same without one bit of a leaf's register.
fn but(at: (u32, u32), register: usize, bit: u32, asked: (u32, u32)) -> [u32; 4] {
    let mut words = everything(asked.0, asked.1);
    if asked == at {
        words[register] &= !(1 << bit);
    }
    words
}

/// Bits by leaf, subleaf and register.
type Bits = &'static [(u32, u32, usize, &'static [u32])];

const AVX: Bits = &[
    (1, 0, ECX, &[12, 28, 29]),
    (1, 7, ECX, &[12, 28, 29]),
    (7, 0, EBX, &[5]),
    (7, 0, ECX, &[9, 10]),
    (7, 1, EAX, &[0, 1, 2, 4, 23]),
    (0x8000_0001, 0, ECX, &[11, 16]),
];
const AVX512: Bits = &[
    (7, 0, EBX, &[16, 17, 21, 26, 27, 28, 30, 31]),
    (7, 0, ECX, &[1, 6, 11, 12, 14]),
    (7, 0, EDX, &[2, 3, 8, 23]),
    (7, 1, EAX, &[5]),
];
const SHORT_STRINGS: Bits = &[(7, 0, EDX, &[4]), (7, 1, EAX, &[10, 11, 12])];
const RDPID: Bits = &[(7, 0, ECX, &[22])];
const XSAVEOPT: Bits = &[(0xd, 1, EAX, &[0, 2])];

/// Bits that build on others were shown wherever the hardware has them, also where those others are missing or cannot be
/// used: short strings without ERMS, AVX-512 without its registers in XCR0 (ABI core 3.13).
#[test]
fn no_feature_is_shown_without_what_it_builds_on() {
    type Cpu = fn(u32, u32) -> [u32; 4];
    let cases: [(&str, Cpu, &[Bits], &[Bits]); 6] = [
        ("everything", everything, &[], &[AVX, AVX512, SHORT_STRINGS, RDPID, XSAVEOPT]),
        ("no ERMS", |l, s| but((7, 0), EBX, 9, (l, s)), &[SHORT_STRINGS], &[AVX, AVX512, RDPID, XSAVEOPT]),
        ("no XSAVE", |l, s| but((1, s), ECX, 26, (l, s)), &[AVX, AVX512, XSAVEOPT], &[SHORT_STRINGS, RDPID]),
        ("no AVX state", |l, s| but((0xd, 0), EAX, 2, (l, s)), &[AVX, AVX512], &[SHORT_STRINGS, RDPID, XSAVEOPT]),
        ("no AVX-512 state", |l, s| but((0xd, 0), EAX, 6, (l, s)), &[AVX512], &[AVX, SHORT_STRINGS, RDPID, XSAVEOPT]),
        ("no RDTSCP", |l, s| but((0x8000_0001, s), EDX, 27, (l, s)), &[RDPID], &[AVX, AVX512, SHORT_STRINGS]),
    ];
    tell(200, move |stage| {
        for (name, cpu, hidden, shown) in cases {
            *stage.m.cpuid.lock().expect("one thread") = cpu;
            for (lists, wanted) in [(hidden, false), (shown, true)] {
                for (leaf, subleaf, register, bits) in lists.iter().copied().flatten() {
                    let word = policy::cpuid(stage.m, *leaf, *subleaf, 1)[*register];
                    for bit in *bits {
                        let is = word >> bit & 1 == 1;
                        assert_eq!(is, wanted, "{name}: leaf {leaf:#x}.{subleaf} register {register} bit {bit}");
                    }
                }
            }
        }
    });
}

fn set_debug(stage: &mut Stage, guest: &Actor, register: u64, value: u64) -> Result<u64, Errno> {
    stage.call(guest, Hypercall::SetDebugreg, &[register, value]).result
}

fn get_debug(stage: &mut Stage, guest: &Actor, register: u64) -> Result<u64, Errno> {
    stage.call(guest, Hypercall::GetDebugreg, &[register]).result
}

/// A guest without breakpoints ran with the addresses of another in DR0-3, since its DR7 was off. A single step is compared
/// with them all the same: where the other had a breakpoint, it read B0 to B3 in its DR6 (P10; ABI core 3.11).
#[test]
fn breakpoints_of_one_guest_do_not_show_in_another() {
    tell(300, |stage| {
        let [owner, other] = [stage.enter(false), stage.enter(false)];
        let canary = |n: u64| build::BREAKPOINTS + 16 * n;
        for dr7 in [0x4ff, 0] {
            for n in 0..4 {
                assert_eq!(set_debug(stage, &owner, n, canary(n)), Ok(0));
            }
            assert_eq!(set_debug(stage, &owner, 7, dr7), Ok(0));
            for n in 0..4 {
                assert_eq!(get_debug(stage, &other, n), Ok(0));
                for (who, own) in [(&owner, 1 << n), (&other, 0)] {
                    assert_eq!(set_debug(stage, who, 6, 0), Ok(0));
                    stage.on_cpu(who, |ctx, _| {
                        ctx.m.single_step(canary(n));
                        let _ = trap::handle(ctx, Exit::Fault { vector: 1, error: 0, address: 0 });
                        assert_eq!(ctx.state.trap.take(), DEBUG);
                        assert_eq!(ctx.m.loaded().debug[6], DR6_CLEAR, "nothing is left for the next");
                    });
                    let dr6 = get_debug(stage, who, 6).expect("it is there");
                    assert_eq!(dr6, DR6_CLEAR | 1 << 14 | own, "{:?} at breakpoint {n}, DR7 {dr7:#x}", who.id);
                }
            }
        }
    });
}

/// The debug registers of a context were forgotten: a vcpu started without the breakpoints its guest gave it.
#[test]
fn a_vcpu_starts_with_the_breakpoints_of_its_context() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let mut context = build::context(&guest.pages);
        context.debugreg = [at(page::CODE), 1 << 63, 0, 0, 7, 7, 0x4001, 0x1];
        let arg = stage.put(&guest, 0, &context);
        assert_eq!(stage.call(&guest, Hypercall::VcpuOp, &[VcpuOp::Initialise.number(), 1, arg]).result, Ok(0));
        let vcpu = stage.world.vcpu(stage.domain(&guest), VcpuId(1)).expect("it has two");
        let debug = vcpu.state.try_take().expect("nobody has it").debug;
        assert_eq!(debug, [at(page::CODE), 0, 0, 0, 0, 0, DR6_CLEAR | 0x4001, 0x401]);
    });
}

/// Breakpoints on ports were turned off in silence. They need CR4.DE, else they are refused; they are met by what ring 0
/// carries out, never by its own accesses; and with CR4.DE there are no debug registers 4 and 5 (ABI core 3.11).
#[test]
fn breakpoints_on_ports_need_debugging_extensions() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let code = guest.pages[page::CODE];
        // DR1: two bytes, ports 0x60 and 0x61. DR0 is an ordinary one.
        let (dr7, plain) = (0x0060_040d_u64, 0x0000_0401_u64);
        assert_eq!(set_debug(stage, &guest, 0, at(page::CODE) + 0x40), Ok(0));
        assert_eq!(set_debug(stage, &guest, 1, 0x60), Ok(0));
        assert_eq!(set_debug(stage, &guest, 7, dr7), Err(Errno::Perm));
        assert_eq!(get_debug(stage, &guest, 7), Ok(0x400), "nothing has changed");
        assert_eq!((set_debug(stage, &guest, 4, 0), get_debug(stage, &guest, 5)), (Ok(0), Ok(0x400)));
        let refused = stage.on_cpu(&guest, |ctx, _| {
            ctx.state.regs.rax = dr7;
            privileged(ctx, code, &[0x0f, 0x23, 0xf8]) // mov dr7, rax
        });
        assert_eq!(refused, PROTECTION);
        let taken = stage.on_cpu(&guest, |ctx, _| {
            ctx.state.regs.rax = 1 << 3;
            privileged(ctx, code, &[0x0f, 0x22, 0xe0]) // mov cr4, rax
        });
        assert_eq!(taken, None);
        assert_eq!(set_debug(stage, &guest, 7, dr7), Ok(0));
        assert_eq!(get_debug(stage, &guest, 7), Ok(dr7));
        assert_eq!(
            (set_debug(stage, &guest, 5, 0), get_debug(stage, &guest, 4)),
            (Err(Errno::NoDev), Err(Errno::NoDev))
        );
        // DR2: eight bytes at the end of memory, which are no ports.
        assert_eq!(
            (set_debug(stage, &guest, 2, u64::MAX), set_debug(stage, &guest, 7, dr7 | 0xa00_0020)),
            (Ok(0), Ok(0))
        );
        stage.on_cpu(&guest, |ctx, _| {
            assert_eq!(ctx.m.loaded().debug[7] & 0xff, plain & 0xff, "ring 0's own accesses meet none");
            ctx.state.iopl = 3;
            for (port, bytes, met) in [
                (0x60, &[0xec][..], true),
                (0x61, &[0xee], true),
                (0x5f, &[0xed], true), // four bytes: 0x5f to 0x62
                (0x5f, &[0x66, 0xef], true),
                (0x5f, &[0xec], false),
                (0x62, &[0xef], false),
                (0x1_0060, &[0xec], true),
            ] {
                ctx.state.debug[6] = DR6_CLEAR;
                ctx.state.regs.rdx = port;
                let trap = privileged(ctx, code, bytes);
                assert_eq!(trap, if met { DEBUG } else { None }, "port {port:#x}");
                assert_eq!(ctx.state.debug[6], if met { DR6_CLEAR | 2 } else { DR6_CLEAR }, "port {port:#x}");
                assert_eq!(ctx.state.regs.rip, at(page::CODE) + bytes.len() as u64, "after the instruction");
            }
        });
    });
}

/// SYSENTER lost TF; and without a handler it was let in, where its RIP and RSP are lost (ABI core 3.2, 3.4).
#[test]
fn sysenter_keeps_the_trap_flag_and_faults_without_a_handler() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        stage.on_cpu(&guest, |ctx, _| assert!(!ctx.m.loaded().sysenter, "it faults where it stands"));
        let kind = CallbackType::Sysenter as u16;
        let arg = stage.put(&guest, 0, &CallbackRegister { kind, address: build::HANDLER, ..Default::default() });
        let register = [CallbackOp::Register.number(), arg];
        assert_eq!(stage.call(&guest, Hypercall::CallbackOp, &register).result, Ok(0));
        stage.on_cpu(&guest, |ctx, _| {
            assert!(ctx.m.loaded().sysenter);
            (ctx.state.kernel_mode, ctx.state.regs.rflags) = (false, ctx.state.regs.rflags | TF);
            let _ = trap::handle(ctx, Exit::Sysenter);
            let regs = ctx.state.regs;
            assert_eq!((regs.rip, regs.rflags & TF), (build::HANDLER, 0), "the handler is not stepped");
            let frame: [u64; 7] = ctx.read(regs.rsp).expect("the frame");
            assert_eq!([frame[2], frame[3] & 0xffff, frame[5], frame[6]], [0, 3, 0, u64::from(selector::GUEST_SS)]);
            assert_eq!(frame[4] & TF, TF, "its caller is");
        });
    });
}

/// With CR4.TSD the guest's kernel took #GP for RDTSC as its processes do, and died of `prctl(PR_SET_TSC)` in one of them.
#[test]
fn the_kernel_reads_the_counter_it_keeps_from_processes() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let code = guest.pages[page::CODE];
        stage.on_cpu(&guest, |ctx, _| {
            (ctx.state.cr4, ctx.state.tsc_aux) = (1 << 2, 77);
            for bytes in [&[0x0f, 0x31][..], &[0x0f, 0x01, 0xf9]] {
                let before = ctx.m.tsc();
                (ctx.state.regs.rax, ctx.state.regs.rdx, ctx.state.regs.rcx) = (u64::MAX, u64::MAX, 1);
                assert_eq!(privileged(ctx, code, bytes), None);
                let regs = ctx.state.regs;
                assert!((before..=ctx.m.tsc()).contains(&(regs.rdx << 32 | regs.rax)), "{regs:x?}");
                assert_eq!(
                    (regs.rcx, regs.rip),
                    (if bytes.len() == 3 { 77 } else { 1 }, at(page::CODE) + bytes.len() as u64)
                );
                ctx.state.regs.rflags |= TF;
                assert_eq!(privileged(ctx, code, bytes), DEBUG, "a step over it");
                ctx.state.regs.rflags &= !TF;
                ctx.state.kernel_mode = false;
                assert_eq!(privileged(ctx, code, bytes), PROTECTION);
                ctx.state.kernel_mode = true;
            }
        });
    });
}

/// What the toolstack reads of a vcpu is what it can set again: both go by one list.
#[test]
fn a_context_that_was_read_can_be_set_again() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let (m, domain) = (stage.m, stage.domain(&guest));
        let vcpu = stage.world.vcpu(domain, VcpuId(0)).expect("it has one");
        let mut own = vcpu.state.try_take().expect("nobody has it");
        let mut wanted = build::context(&guest.pages);
        (wanted.user_regs.rbx, wanted.user_regs.fs, wanted.fs_base, wanted.gs_base_user) = (7, 3, 0x1000, 0x2000);
        wanted.debugreg[1] = 0x3000;
        let masks = flags::FAILSAFE_MASKS_EVENTS | flags::SYSCALL_MASKS_EVENTS;
        (wanted.ctrlreg[0], wanted.flags) = (1 << 3, wanted.flags | masks | flags::I387_VALID);
        wanted.user_regs.rflags |= 1 << 12; // IOPL 1
        wanted.fpu_ctxt = core::array::from_fn(|at| at.to_le_bytes()[0]);
        let mut set = |own: &mut VcpuState, context: &VcpuContext| {
            (0..64).find_map(|_| match context::set(&mut stage.cpu_ctx(), domain, vcpu, own, context) {
                Err(Halt::More) => None,
                done => Some(done),
            })
        };
        assert_eq!(set(&mut own, &wanted), Some(Ok(0)));
        let first = context::get(m, domain, vcpu, &own);
        assert_eq!(set(&mut own, &first), Some(Ok(0)));
        assert!(context::get(m, domain, vcpu, &own) == first, "all that is read is set");
        let kept = |c: &VcpuContext| {
            let regs = (c.user_regs.rip, c.user_regs.rsp, c.user_regs.rbx, c.user_regs.fs, c.debugreg[1]);
            let tables = (c.ctrlreg[1], c.ctrlreg[3], c.gdt_frames, c.gdt_ents, c.ldt_base, c.ldt_ents);
            let stack = (c.kernel_ss, c.kernel_sp, c.fs_base, c.gs_base_kernel, c.gs_base_user);
            let callbacks = (c.event_callback_eip, c.syscall_callback_eip, c.failsafe_callback_eip);
            let more = (c.flags & !flags::ONLINE, c.ctrlreg[0] & 1 << 3, c.user_regs.rflags & 3 << 12, c.fpu_ctxt);
            (regs, tables, stack, callbacks, more, c.vm_assist)
        };
        assert_eq!(kept(&first), kept(&wanted));
    });
}
