//! What a guest gets of the processor, told as stories.

use hv_core::machine::{Exit, Frames};
use hv_core::{policy, trap};
use sim::world::build::{at, page};
use sim::world::script::{Actor, Stage, tell};

/// What RDMSR answers; `None`: a fault.
fn rdmsr(stage: &mut Stage, guest: &Actor, register: u64) -> Option<u64> {
    stage.m.write(guest.pages[page::CODE], 0, &[0x0f, 0x32]);
    stage.on_cpu(guest, |ctx, _| {
        (ctx.own.regs.rip, ctx.own.regs.rcx) = (at(page::CODE), register);
        trap::handle(ctx, Exit::Fault { vector: 13, error: 0, address: 0 });
        let answer = ctx.own.regs.rdx << 32 | ctx.own.regs.rax;
        ctx.own.trap.take().is_none().then_some(answer)
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
