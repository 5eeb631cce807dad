//! What CPUID shows a guest works in it: an instruction for each feature that has one, and the registers that features come
//! with (core 3.13, 3.14). What the machine lacks is skipped, and printed.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::string::String;
use guests::memory::Pages;
use guests::probe::{self, Code, Registers, execute};
use guests::{code, pattern, test};
use unikernel::println;

unikernel::entry!(unikernel::testing::run);

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Forced CPUID: UD2, "xen", CPUID (core 3.13).
fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let registers = Registers { rax: leaf.into(), rcx: subleaf.into(), ..pattern() };
    let frame = execute(code!("ud2", ".ascii \"xen\"", "cpuid"), &registers).ended();
    [frame.rax, frame.rbx, frame.rcx, frame.rdx].map(|word| u32::try_from(word).expect("zero-extended"))
}

/// A register of a leaf: leaf, subleaf, register.
type Word = (u32, u32, usize);

/// Every word of CPUID whose bits are features.
const WORDS: [Word; 13] = [
    (1, 0, EDX),
    (1, 0, ECX),
    (7, 0, EBX),
    (7, 0, ECX),
    (7, 0, EDX),
    (7, 1, EAX),
    (7, 2, EDX),
    (0xd, 1, EAX),
    (0x8000_0001, 0, EDX),
    (0x8000_0001, 0, ECX),
    (0x8000_0007, 0, EDX),
    (0x8000_0008, 0, EBX),
    (0x8000_0021, 0, EAX),
];

/// A feature: its word and bit, its name, and an instruction, unless it is none that a guest could try.
type Feature = (Word, u32, &'static str, Option<Code>);

/// Calls a function with every feature that may be shown. RDI and RSI of the instructions lead to memory of their own, at a
/// boundary of 64 bytes; RAX is as RDI.
fn each(mut of: impl FnMut(Feature)) {
    macro_rules! features {
        ($word:expr; $($bit:literal $name:ident $($line:literal),*;)*) => {
            $(of(($word, $bit, stringify!($name), features!(@ $($line),*)));)*
        };
        (@) => { None };
        (@ $($line:literal),+) => { Some(code!($($line),+)) };
    }
    features! { (1, 0, EDX);
        0 FPU "fninit", "fld1", "fstp st(0)";
        2 DE;
        4 TSC "rdtsc";
        5 MSR "mov ecx, 0x10", "rdmsr";
        6 PAE;
        8 CX8 "cmpxchg8b [rdi]";
        9 APIC;
        11 SEP;
        15 CMOV "cmovz eax, ecx";
        16 PAT "mov ecx, 0x277", "rdmsr";
        19 CLFSH "clflush [rdi]";
        23 MMX "pxor mm0, mm0", "emms";
        24 FXSR "fxsave [rdi]", "fxrstor [rdi]";
        25 SSE "xorps xmm0, xmm0";
        26 SSE2 "pxor xmm0, xmm0", "lfence";
        27 SS;
    }
    features! { (1, 0, ECX);
        0 SSE3 "haddps xmm0, xmm0";
        1 PCLMUL "pclmulqdq xmm0, xmm0, 0";
        9 SSSE3 "pshufb xmm0, xmm0";
        12 FMA "vfmadd132ps ymm0, ymm0, ymm0";
        13 CX16 "cmpxchg16b [rdi]";
        19 SSE41 "ptest xmm0, xmm0";
        20 SSE42 "crc32 eax, ecx", "pcmpgtq xmm0, xmm0";
        22 MOVBE "movbe eax, [rdi]";
        23 POPCNT "popcnt eax, ecx";
        25 AES "aesenc xmm0, xmm0";
        26 XSAVE "mov eax, 1", "xor edx, edx", "xsave [rdi]", "xrstor [rdi]";
        27 OSXSAVE "xor ecx, ecx", "xgetbv";
        28 AVX "vxorps ymm0, ymm0, ymm0", "vzeroupper";
        29 F16C "vcvtph2ps ymm0, xmm0";
        30 RDRAND "rdrand eax";
        31 HYPERVISOR;
    }
    features! { (7, 0, EBX);
        0 FSGSBASE "rdgsbase rax", "wrgsbase rax";
        3 BMI1 "andn eax, ecx, edx", "tzcnt eax, ecx";
        5 AVX2 "vpaddd ymm0, ymm0, ymm0";
        6 FDP_EXCPTN_ONLY;
        8 BMI2 "pdep eax, ecx, edx";
        9 ERMS "mov ecx, 64", "rep movsb";
        13 FCS_FDS;
        16 AVX512F "vpxord zmm0, zmm0, zmm0";
        17 AVX512DQ "vandps zmm0, zmm0, zmm0";
        18 RDSEED "rdseed eax";
        19 ADX "adcx eax, ecx", "adox eax, ecx";
        21 AVX512IFMA "vpmadd52luq zmm0, zmm0, zmm0";
        23 CLFLUSHOPT "clflushopt [rdi]";
        24 CLWB "clwb [rdi]";
        26 AVX512PF;
        27 AVX512ER;
        28 AVX512CD "vplzcntd zmm0, zmm0";
        29 SHA "sha1nexte xmm0, xmm0";
        30 AVX512BW "vpaddb zmm0, zmm0, zmm0";
        31 AVX512VL "vpxord xmm0, xmm0, xmm0";
    }
    features! { (7, 0, ECX);
        0 PREFETCHWT1 "prefetchwt1 [rdi]";
        1 AVX512VBMI "vpermb zmm0, zmm0, zmm0";
        6 AVX512VBMI2 "vpshldd zmm0, zmm0, zmm0, 1";
        8 GFNI "gf2p8mulb xmm0, xmm0";
        9 VAES "vaesenc ymm0, ymm0, ymm0";
        10 VPCLMULQDQ "vpclmulqdq ymm0, ymm0, ymm0, 0";
        11 AVX512VNNI "vpdpbusd zmm0, zmm0, zmm0";
        12 AVX512BITALG "vpopcntb zmm0, zmm0";
        14 AVX512VPOPCNTDQ "vpopcntd zmm0, zmm0";
        22 RDPID "rdpid rax";
        27 MOVDIRI "movdiri [rdi], eax";
        28 MOVDIR64B "movdir64b rdi, [rsi]";
    }
    features! { (7, 0, EDX);
        2 AVX5124VNNIW;
        3 AVX5124FMAPS;
        4 FSRM "mov ecx, 5", "rep movsb";
        8 AVX512VP2INTERSECT "vp2intersectd k0, zmm0, zmm0";
        10 MD_CLEAR "mov eax, ss", "verw ax";
        14 SERIALIZE "serialize";
        23 AVX512FP16 "vaddph zmm0, zmm0, zmm0";
    }
    features! { (7, 1, EAX);
        0 SHA512 "vsha512msg2 ymm0, ymm0";
        1 SM3 "vsm3msg1 xmm0, xmm0, xmm0";
        2 SM4 "vsm4key4 xmm0, xmm0, xmm0";
        4 AVX_VNNI "{{vex}} vpdpbusd ymm0, ymm0, ymm0";
        5 AVX512BF16 "vdpbf16ps zmm0, zmm0, zmm0";
        10 FZRM "xor ecx, ecx", "rep movsb";
        11 FSRS "mov ecx, 5", "rep stosb";
        12 FSRC "mov ecx, 5", "repe cmpsb";
        23 AVX_IFMA "{{vex}} vpmadd52luq ymm0, ymm0, ymm0";
    }
    features! { (7, 2, EDX); 5 MCDT_NO; }
    features! { (0xd, 1, EAX);
        0 XSAVEOPT "mov eax, 1", "xor edx, edx", "xsaveopt [rdi]";
        2 XGETBV1 "mov ecx, 1", "xgetbv";
    }
    features! { (0x8000_0001, 0, EDX);
        0 FPU; 2 DE; 4 TSC; 5 MSR; 6 PAE; 8 CX8; 9 APIC; 15 CMOV; 16 PAT; 23 MMX; 24 FXSR;
        11 SYSCALL;
        20 NX;
        22 MMXEXT "pmaxub mm0, mm0", "emms";
        25 FFXSR;
        27 RDTSCP "rdtscp";
        29 LM;
        30 AMD_3DNOWEXT "pswapd mm0, mm0", "emms";
        31 AMD_3DNOW "pfadd mm0, mm0", "emms";
    }
    features! { (0x8000_0001, 0, ECX);
        0 LAHF_LM "lahf", "sahf";
        5 ABM "lzcnt eax, ecx";
        6 SSE4A "movntss [rdi], xmm0", "extrq xmm0, xmm0";
        7 MISALIGNSSE;
        8 PREFETCHW "prefetchw [rdi]";
        11 XOP "vphaddbd xmm0, xmm0";
        16 FMA4 "vfmaddps xmm0, xmm0, xmm0, xmm0";
        21 TBM "blsfill eax, ecx";
    }
    features! { (0x8000_0007, 0, EDX); 8 ITSC; }
    features! { (0x8000_0008, 0, EBX); 0 CLZERO "clzero"; 2 XSAVEERPTR; }
    features! { (0x8000_0021, 0, EAX); 0 NO_NESTED_BP; 2 LFENCE_DISPATCH "lfence"; 6 NULL_SELECTOR_CLEARS_BASE; }
}

/// Turns on what a kernel has to turn on: FSGSBASE, OSXSAVE and every state that XCR0 may hold.
fn turn_on() {
    let has = |(leaf, subleaf, register): Word, bit: u32| cpuid(leaf, subleaf)[register] >> bit & 1 == 1;
    let bit = |on: bool, bit: u32| u64::from(on) << bit;
    let cr4 = execute(code!("mov rax, cr4"), &pattern()).ended().rax;
    let more = bit(has((7, 0, EBX), 0), 16) | bit(has((1, 0, ECX), 26), 18);
    let _ = execute(code!("mov cr4, rax"), &Registers { rax: cr4 | more, ..pattern() }).ended();
    if has((1, 0, ECX), 26) {
        let states = u64::from(cpuid(0xd, 0)[EAX]);
        let registers = Registers { rax: states, rdx: 0, rcx: 0, ..pattern() };
        let _ = execute(code!("xsetbv"), &registers).ended();
    }
}

fn shown_instructions_work() {
    turn_on();
    let memory = Pages::allocate(2).expect("pages are free");
    let registers =
        Registers { rax: memory.address(), rdi: memory.address(), rsi: memory.address() + 4096, ..pattern() };
    (0..1024).for_each(|word| probe::store(memory.address() + word * 8, 0));
    let words = WORDS.map(|(leaf, subleaf, _)| cpuid(leaf, subleaf));
    let mut left = [0; WORDS.len()];
    for ((left, words), (.., register)) in left.iter_mut().zip(&words).zip(WORDS) {
        *left = words[register];
    }
    let (mut executed, mut silent, mut skipped, mut broken) = (0, String::new(), String::new(), String::new());
    each(|(word, bit, name, code)| {
        let at = WORDS.iter().position(|other| *other == word).expect("every word is listed");
        let shown = left[at] >> bit & 1 == 1;
        left[at] &= !(1 << bit);
        let list = match code {
            _ if !shown => &mut skipped,
            None => &mut silent,
            Some(code) => {
                let stop = execute(code, &registers);
                executed += 1;
                if stop.ended {
                    return;
                }
                println!("{name}: {}", stop.frame);
                &mut broken
            }
        };
        *list += " ";
        *list += name;
    });
    println!("features: {executed} shown and executed");
    println!("features: shown, without an instruction to try:{silent}");
    println!("features: skipped, since they are not shown:{skipped}");
    for (word, (leaf, subleaf, register)) in left.iter().zip(WORDS) {
        assert_eq!(*word, 0, "leaf {leaf:#x}.{subleaf} register {register} shows bits that nobody tries");
    }
    assert!(broken.is_empty(), "shown, and do not work:{broken}");
    assert!(executed >= 10, "{executed}: every CPU in 64-bit mode has ten of them");
}
test!("features.instructions", shown_instructions_work);

/// A feature is shown only with its registers: word, bit, register.
const REGISTERS: [(Word, u32, u64); 25] = [
    ((1, 0, EDX), 5, 0x10),
    ((1, 0, EDX), 7, 0x179),
    ((1, 0, EDX), 9, 0x1b),
    ((1, 0, EDX), 12, 0xfe),
    ((1, 0, EDX), 14, 0x179),
    ((1, 0, EDX), 16, 0x277),
    ((1, 0, EDX), 21, 0x600),
    ((1, 0, ECX), 15, 0x345),
    ((1, 0, ECX), 21, 0x802),
    ((1, 0, ECX), 24, 0x6e0),
    ((6, 0, ECX), 0, 0xe8),
    ((6, 0, ECX), 3, 0x1b0),
    ((7, 0, EBX), 1, 0x3b),
    ((7, 0, EBX), 11, 0x122),
    ((7, 0, ECX), 5, 0xe1),
    ((7, 0, ECX), 22, 0xc000_0103),
    ((7, 0, EDX), 26, 0x48),
    ((7, 0, EDX), 27, 0x48),
    ((7, 0, EDX), 29, 0x10a),
    ((7, 0, EDX), 30, 0xcf),
    ((0xd, 1, EAX), 3, 0xda0),
    ((0xd, 1, EAX), 4, 0x1c4),
    ((0x8000_0001, 0, EDX), 27, 0xc000_0103),
    ((0x8000_0008, 0, EBX), 14, 0x48),
    ((0x8000_0008, 0, EBX), 25, 0xc001_011f),
];

fn features_come_with_their_registers() {
    let mut shown = 0;
    for ((leaf, subleaf, register), bit, msr) in REGISTERS {
        if cpuid(leaf, subleaf)[register] >> bit & 1 == 1 {
            shown += 1;
            let stop = execute(code!("rdmsr"), &Registers { rcx: msr, ..pattern() });
            assert!(stop.ended, "leaf {leaf:#x}.{subleaf} register {register} bit {bit}, but no MSR {msr:#x}");
        }
    }
    assert!(shown >= 3, "TSC, APIC and PAT are always there");
    // MISC_ENABLE agrees with CPUID: short strings rely on fast ones; no MONITOR, no limit of leaves, no way round NX.
    let misc = execute(code!("rdmsr"), &Registers { rcx: 0x1a0, ..pattern() }).ended();
    let misc = misc.rdx << 32 | misc.rax;
    let erms = cpuid(7, 0)[EBX] >> 9 & 1;
    assert!(erms == 0 || misc & 1 == 1, "fast strings");
    assert!(cpuid(7, 0)[EDX] >> 4 & 1 <= erms && (cpuid(7, 1)[EAX] & 7 << 10 == 0 || erms == 1), "without ERMS");
    assert_eq!(misc >> 18 & 1, u64::from(cpuid(1, 0)[ECX] >> 3 & 1), "MONITOR");
    assert_eq!(misc & (1 << 22 | 1 << 34), 0, "{misc:#x}");
    assert!(cpuid(0, 0)[EAX] >= 7 || erms == 0);
}
test!("features.registers", features_come_with_their_registers);
