//! The processor as a guest sees it: CPUID and XCR0 (ABI core 3.13).
//!
//! Touches: nothing; it filters the hardware's values.
//! Never touches: the guest's registers; `emulate` writes them.
//! Keeps: an allow list. A leaf or bit that was not reviewed here reads 0 (P10). A feature bit is shown only together
//! with the features that it needs, whatever the hardware says, and only if guests have access to its MSRs.

use crate::addr::low32;
use crate::machine::{Clock, CpuState};
use crate::time;

/// The first of the hypervisor's CPUID leaves.
const HYPERVISOR: u32 = 0x4000_0000;
/// XCR0 components that a guest may use: x87, SSE, AVX, AVX-512.
const XCR0_KNOWN: u64 = 0b1110_0111;
/// CR0 as a guest reads it, without TS: PG AM WP NE ET MP PE (ABI core 1.5).
const CR0_FIXED: u64 = 0x8005_0033;
/// CR0: the next FPU instruction faults.
pub(crate) const CR0_TS: u64 = 1 << 3;
/// CR4 bits that a guest always reads as set: PAE MCE OSFXSR OSXMMEXCPT.
pub const CR4_FIXED: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10;
/// CR4: user mode cannot read the time-stamp counter.
pub(crate) const CR4_TSD: u64 = 1 << 2;
/// CR4: breakpoints on ports are possible, and debug registers 4 and 5 do not exist.
pub(crate) const CR4_DE: u64 = 1 << 3;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;
/// The width of machine addresses that guests are told. With this width no PV guest asks for version 2 grants (io 1.1).
const ADDRESS_BITS: u32 = 44;
/// The version that guests are told: the Xen version whose ABI this is.
pub const VERSION: u64 = 4 << 16 | 17;

const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut rest = list;
    while let [first, tail @ ..] = rest {
        mask |= 1 << *first;
        rest = tail;
    }
    mask
}

// FPU DE TSC MSR PAE CX8 APIC SEP CMOV PAT CLFSH MMX FXSR SSE SSE2 SS. Machine check is hidden, which keeps Linux away
// from its MSRs.
const F1_EDX: u32 = bits(&[0, 2, 4, 5, 6, 8, 9, 11, 15, 16, 19, 23, 24, 25, 26, 27]);
// SSE3 PCLMUL SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX F16C RDRAND.
const F1_ECX: u32 = bits(&[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
const F1_ECX_XSAVE: u32 = bits(&[26]);
const F1_ECX_OSXSAVE: u32 = bits(&[27]);
const F1_ECX_AVX: u32 = bits(&[28]);
const F1_ECX_HYPERVISOR: u32 = bits(&[31]);
// FSGSBASE BMI1 AVX2 FDP BMI2 ERMS FCS AVX512F,DQ RDSEED ADX IFMA CLFLUSHOPT CLWB AVX512PF,ER,CD SHA AVX512BW,VL.
const F7_EBX: u32 = bits(&[0, 3, 5, 6, 8, 9, 13, 16, 17, 18, 19, 21, 23, 24, 26, 27, 28, 29, 30, 31]);
const F7_EBX_FSGSBASE: u32 = bits(&[0]);
const F7_EBX_ERMS: u32 = bits(&[9]);
// PREFETCHWT1 VBMI VBMI2 GFNI VAES VPCLMUL VNNI BITALG VPOPCNTDQ RDPID MOVDIRI MOVDIR64B.
const F7_ECX: u32 = bits(&[0, 1, 6, 8, 9, 10, 11, 12, 14, 22, 27, 28]);
// 4VNNIW 4FMAPS FSRM VP2INTERSECT MD_CLEAR SERIALIZE AVX512FP16.
const F7_EDX: u32 = bits(&[2, 3, 4, 8, 10, 14, 23]);
// SHA512 SM3 SM4 AVX-VNNI AVX512-BF16 FZRM FSRS FSRCS AVX-IFMA.
const F7_1_EAX: u32 = bits(&[0, 1, 2, 4, 5, 10, 11, 12, 23]);
const F7_2_EDX: u32 = bits(&[5]);
// XSAVEOPT and XGETBV with ECX = 1. XSAVEC is left out, so no compacted size has to be computed.
const XSAVE_EXTRAS: u32 = bits(&[0, 2]);
// Bits of leaf 1 EDX that AMD repeats, then SYSCALL NX MMXEXT FFXSR RDTSCP LM 3DNOWEXT 3DNOW.
const AMD_REPEATS: u32 = bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24]);
const E1_EDX: u32 = F1_EDX & AMD_REPEATS | bits(&[11, 20, 22, 25, 27, 29, 30, 31]);
// LAHF ABM SSE4A MISALIGNSSE 3DNOWPREFETCH XOP FMA4 TBM.
const E1_ECX: u32 = bits(&[0, 5, 6, 7, 8, 11, 16, 21]);
const E1_EDX_RDTSCP: u32 = bits(&[27]);
const E7_EDX: u32 = bits(&[8]);
// CLZERO XSAVEERPTR.
const E8_EBX: u32 = bits(&[0, 2]);
// NO_NEST_BP LFENCE_DISPATCH NSCB.
const E21_EAX: u32 = bits(&[0, 2, 6]);

/// Feature bits that are hidden if a feature they need is missing: leaf, subleaf, EAX, EBX, ECX, EDX.
type Dependents = (u32, u32, [u32; 4]);
// FMA AVX F16C, AVX2, VAES VPCLMUL, SHA512 SM3 SM4 AVX-VNNI AVX-IFMA, XOP FMA4.
const NEED_AVX: [Dependents; 4] = [
    (1, 0, [0, 0, bits(&[12, 28, 29]), 0]),
    (7, 0, [0, bits(&[5]), bits(&[9, 10]), 0]),
    (7, 1, [bits(&[0, 1, 2, 4, 23]), 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, bits(&[11, 16]), 0]),
];
const NEED_AVX512: [Dependents; 2] = [
    (7, 0, [0, bits(&[16, 17, 21, 26, 27, 28, 30, 31]), bits(&[1, 6, 11, 12, 14]), bits(&[2, 3, 8, 23])]),
    (7, 1, [bits(&[5]), 0, 0, 0]),
];
// FSRM, FZRM FSRS FSRCS: a kernel that uses REP MOVSB for short strings because of these uses it for long strings as
// well.
const NEED_ERMS: [Dependents; 2] = [(7, 0, [0, 0, 0, bits(&[4])]), (7, 1, [bits(&[10, 11, 12]), 0, 0, 0])];
// RDPID reads TSC_AUX, which a vcpu keeps only on a machine with RDTSCP.
const NEED_RDTSCP: [Dependents; 1] = [(7, 0, [0, 0, bits(&[22]), 0])];

/// The XCR0 bits that a guest may set on this machine.
pub fn xcr0_allowed<M: CpuState>(m: &M) -> u64 {
    if !has_xsave(m) {
        return 1;
    }
    let [low, _, _, high] = m.cpuid(0xd, 0);
    let known = (u64::from(low) | u64::from(high) << 32) & XCR0_KNOWN;
    // AVX-512 needs all of its components, and AVX.
    if known & 0xe4 == 0xe4 { known } else { known & 0x7 }
}

/// Whether XSETBV may load `value`: bit 0 is set, all bits are allowed, and no component lacks one that it needs.
pub fn xcr0_valid<M: CpuState>(m: &M, value: u64) -> bool {
    let avx_needs_sse = value & 4 == 0 || value & 2 != 0;
    let avx512_whole = matches!(value & 0xe0, 0 | 0xe0) && (value & 0xe0 == 0 || value & 4 != 0);
    value & 1 != 0 && value & !xcr0_allowed(m) == 0 && avx_needs_sse && avx512_whole
}

/// Whether the guest may set CR4.FSGSBASE.
pub fn has_fsgsbase<M: CpuState>(m: &M) -> bool {
    m.cpuid(7, 0)[1] & F7_EBX_FSGSBASE != 0
}

/// Whether the guest may set CR4.OSXSAVE.
pub fn has_xsave<M: CpuState>(m: &M) -> bool {
    m.cpuid(1, 0)[2] & F1_ECX_XSAVE != 0
}

/// EAX, EBX, ECX, EDX of a leaf as a guest with this XCR0 sees them.
pub fn cpuid<M: CpuState + Clock>(m: &M, leaf: u32, subleaf: u32, xcr0: u64) -> [u32; 4] {
    if leaf & 0xffff_0000 == HYPERVISOR {
        return hypervisor_leaf(m, leaf, subleaf);
    }
    let [max_basic, ..] = m.cpuid(0, 0);
    let [max_extended, ..] = m.cpuid(0x8000_0000, 0);
    if leaf > max_basic.min(0xd) && !(0x8000_0000..=max_extended.min(0x8000_0021)).contains(&leaf) {
        return [0; 4];
    }
    let [a, b, c, d] = supported(m, leaf, subleaf);
    match (leaf, subleaf) {
        (0, _) => [a.min(0xd), b, c, d],
        (1, _) => {
            let mut ecx = c & F1_ECX | F1_ECX_HYPERVISOR;
            if ecx & F1_ECX_XSAVE != 0 {
                ecx |= F1_ECX_OSXSAVE; // shown even before the guest sets CR4.OSXSAVE: Linux looks for both
            }
            [a, b & 0xffff, ecx, d & F1_EDX]
        }
        (2, _) | (0x8000_0002..=0x8000_0006, _) => [a, b, c, d],
        (4, _) => [a & 0x3fff, b, c, d],
        (7, 0) => [a.min(2), b & F7_EBX, c & F7_ECX, d & F7_EDX],
        (7, 1) => [a & F7_1_EAX, 0, 0, 0],
        (7, 2) => [0, 0, 0, d & F7_2_EDX],
        (0xd, _) => xsave_leaf(m, subleaf, [a, b, c, d], xcr0),
        (0x8000_0000, _) => [a.min(0x8000_0021), b, c, d],
        (0x8000_0001, _) => [a, 0, c & E1_ECX, d & E1_EDX],
        (0x8000_0007, _) => [0, 0, 0, d & E7_EDX],
        (0x8000_0008, _) => [(a & 0xff).min(ADDRESS_BITS) | 48 << 8, b & E8_EBX, 0, 0],
        (0x8000_0021, _) => [a & E21_EAX, 0, 0, 0],
        _ => [0; 4],
    }
}

/// Returns a leaf of the hardware, without the bits of features that need a missing feature.
fn supported<M: CpuState>(m: &M, leaf: u32, subleaf: u32) -> [u32; 4] {
    const AVX: u64 = 1 << 2;
    const AVX512: u64 = 0xe0;
    let mut found = m.cpuid(leaf, subleaf);
    if !matches!(leaf, 1 | 7 | 0x8000_0001) {
        return found;
    }
    let states = xcr0_allowed(m);
    let has = |leaf, register: usize, mask| m.cpuid(leaf, 0).get(register).is_some_and(|word| word & mask != 0);
    for (there, dependents) in [
        (states & AVX != 0 && has(1, 2, F1_ECX_AVX), &NEED_AVX[..]),
        (states & AVX512 != 0, &NEED_AVX512),
        (has(7, 1, F7_EBX_ERMS), &NEED_ERMS),
        (has(0x8000_0001, 3, E1_EDX_RDTSCP), &NEED_RDTSCP),
    ] {
        let here = dependents.iter().filter(|(of, sub, _)| !there && *of == leaf && (leaf != 7 || *sub == subleaf));
        for (_, _, hidden) in here {
            found.iter_mut().zip(hidden).for_each(|(word, hidden)| *word &= !hidden);
        }
    }
    found
}

fn xsave_leaf<M: CpuState>(m: &M, subleaf: u32, [a, b, c, _]: [u32; 4], xcr0: u64) -> [u32; 4] {
    let allowed = xcr0_allowed(m);
    if !has_xsave(m) {
        return [0; 4];
    }
    match subleaf {
        0 => [low32(allowed), area_size(m, xcr0), area_size(m, allowed), 0],
        1 => [a & XSAVE_EXTRAS, 0, 0, 0],
        2..=62 if allowed >> subleaf & 1 != 0 => [a, b, c & 2, 0],
        _ => [0; 4],
    }
}

/// Bytes of a standard-format XSAVE area with these components.
fn area_size<M: CpuState>(m: &M, components: u64) -> u32 {
    let legacy_and_header = 512 + 64;
    (2..8).filter(|n| components >> n & 1 != 0).fold(legacy_and_header, |size, n| {
        let [bytes, offset, ..] = m.cpuid(0xd, n);
        size.max(offset.saturating_add(bytes))
    })
}

/// A guest's CR0; TS is the only bit that the guest can change.
#[must_use]
pub fn cr0(task_switched: bool) -> u64 {
    CR0_FIXED | if task_switched { CR0_TS } else { 0 }
}

fn hypervisor_leaf(m: &impl Clock, leaf: u32, subleaf: u32) -> [u32; 4] {
    let khz = u32::try_from(m.tsc_khz()).unwrap_or(u32::MAX);
    let (multiplier, shift) = time::scale(m.tsc_khz());
    match (leaf - HYPERVISOR, subleaf) {
        (0, _) => [HYPERVISOR + 5, 0x566e_6558, 0x6558_4d4d, 0x4d4d_566e],
        (1, _) => [low32(VERSION), 0, 0, 0],
        (2, _) => [1, HYPERVISOR, 1, 0],
        (3, 0) => [0, 0, khz, 0],
        (3, 1) => [0, 0, multiplier, u32::from(shift.cast_unsigned())],
        (3, 2) => [khz, 0, 0, 0],
        (5, _) => [0, ADDRESS_BITS, 0, 0],
        _ => [0; 4],
    }
}
/// The bits of CR4 that a guest may set on this machine.
#[must_use]
pub fn cr4_choice<M: CpuState + Clock>(m: &M) -> u64 {
    let fsgsbase = if has_fsgsbase(m) { CR4_FSGSBASE } else { 0 };
    let osxsave = if has_xsave(m) { CR4_OSXSAVE } else { 0 };
    CR4_TSD | CR4_DE | fsgsbase | osxsave
}
