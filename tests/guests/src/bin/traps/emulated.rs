//! Instructions a PV kernel executes though they are privileged (core 3.9, 3.11, 3.13, 3.14).

use guests::abi::physdev::{PhysdevOp, SetIobitmap};
use guests::abi::{Errno, Hypercall};
use guests::probe::{self, Registers, UserSpace, call, execute};
use guests::{NOT_CANONICAL, code, flag, memory, pattern, registers_of, set_iopl, test};

/// core 3.9: CLI and STI succeed without any effect, where the virtual I/O privilege allows them at all.
fn cli_and_sti_do_nothing() {
    set_iopl(1).expect("level 1 is taken");
    for code in [code!("cli"), code!("sti")] {
        let registers = pattern();
        let frame = execute(code, &registers).ended();
        assert_eq!(Registers { rsp: 0, ..registers_of(&frame) }, registers);
        assert_eq!(frame.saved_mask(), 1, "the mask is not touched");
    }
    set_iopl(0).expect("level 0 is taken");
    for code in [code!("cli"), code!("sti")] {
        assert_eq!(execute(code, &pattern()).trapped(13).frame.error, 0);
    }
    assert_eq!(set_iopl(4), Err(Errno::Inval));
}
test!("emulated.cli-sti", cli_and_sti_do_nothing);

/// core 3.9: ports nobody granted read as ones; port 0x20 (interrupt controller) is nobody's.
fn ports_read_as_ones() {
    let registers = Registers { rax: 0, rdx: 0x20, ..pattern() };
    let accesses = [
        (code!("in al, 0x20"), 0xff),
        (code!("in al, dx"), 0xff),
        (code!("in ax, dx"), 0xffff),
        (code!("in eax, dx"), 0xffff_ffff),
    ];
    set_iopl(1).expect("level 1 is taken");
    for (code, ones) in accesses {
        assert_eq!(execute(code, &registers).ended().rax, ones);
    }
    let _ = execute(code!("out dx, al"), &registers).ended();
    set_iopl(0).expect("level 0 is taken");
    for (code, _) in accesses {
        let _ = execute(code, &registers).trapped(13);
    }
    let _ = execute(code!("out dx, al"), &registers).trapped(13);
}
test!("emulated.ports", ports_read_as_ones);

/// core 3.9: the bitmap opens ports one by one; a set bit closes.
fn the_bitmap_opens_ports() {
    let mut bitmap = [0xffu8; 16];
    bitmap[4] = 0xfc;
    let set = |bitmap: u64, nr_ports| {
        let arg = SetIobitmap { bitmap, nr_ports, pad: 0 };
        let op = PhysdevOp::SetIobitmap.number();
        call(Hypercall::PhysdevOp, [op, probe::address(&arg), 0, 0, 0])
    };
    set(probe::address(&bitmap), 64).expect("a bitmap is taken");
    let at = |port| Registers { rdx: port, ..pattern() };
    let _ = execute(code!("in al, dx"), &at(0x20)).ended();
    let _ = execute(code!("in ax, dx"), &at(0x20)).ended();
    let _ = execute(code!("in eax, dx"), &at(0x20)).trapped(13);
    let _ = execute(code!("in al, dx"), &at(0x22)).trapped(13);
    let _ = execute(code!("in al, dx"), &at(0x40)).trapped(13);
    set(0, 0).expect("no bitmap is taken");
    let _ = execute(code!("in al, dx"), &at(0x20)).trapped(13);
}
test!("emulated.iobitmap", the_bitmap_opens_ports);

/// P10: where ring 0 keeps its tables is not shown. On CPUs with UMIP the instructions are carried out with constants
/// (core 3.9); a bad address is the guest's own page fault. CPUs without it (CPUID of the machine) show the real ones.
fn system_registers_are_constants() {
    if core::arch::x86_64::__cpuid_count(7, 0).ecx & 4 == 0 {
        return;
    }
    let mut table = [0x5au8; 16];
    let registers = Registers { rdi: probe::address_mut(&mut table), ..pattern() };
    for code in [code!("sgdt [rdi]"), code!("sidt [rdi]")] {
        let _ = execute(code, &registers).ended();
        assert_eq!(table[..10], [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(table[10..], [0x5a; 6]);
    }
    assert_eq!(execute(code!("str eax"), &registers).ended().rax, 0);
    assert_eq!(execute(code!("sldt rax"), &registers).ended().rax, 0);
    assert_eq!(execute(code!("smsw rax"), &registers).ended().rax, 0x8005_0033);
    let bad = Registers { rdi: 0x10_0000, ..pattern() };
    let _ = execute(code!("sgdt [rdi]"), &bad).trapped(14);
}
test!("emulated.umip", system_registers_are_constants);

/// Forced CPUID: UD2, "xen", CPUID (core 3.13).
fn cpuid(leaf: u64, subleaf: u64) -> [u64; 4] {
    let registers = Registers { rax: leaf, rcx: subleaf, rbx: u64::MAX, rdx: u64::MAX, ..pattern() };
    let frame = execute(code!("ud2", ".ascii \"xen\"", "cpuid"), &registers).ended();
    [frame.rax, frame.rbx, frame.rcx, frame.rdx]
}

fn forced_cpuid_shows_the_hypervisor() {
    let [max, b, c, d] = cpuid(0x4000_0000, 0);
    assert!((0x4000_0002..0x4000_0100).contains(&max));
    assert_eq!([b, c, d], [0x566e_6558, 0x6558_4d4d, 0x4d4d_566e]);
    let [version, ..] = cpuid(0x4000_0001, 0);
    assert_eq!(version, unikernel::hypercall::version());
    let [pages, msr, ..] = cpuid(0x4000_0002, 0);
    assert_eq!((pages, msr), (1, 0x4000_0000));
    // The scan for other hypervisors must find nothing.
    for base in (0x4000_0100..0x4001_0000).step_by(0x100) {
        assert_eq!(cpuid(base, 0), [0; 4], "leaf {base:#x}");
    }
}
test!("emulated.cpuid.hypervisor", forced_cpuid_shows_the_hypervisor);

fn forced_cpuid_shows_what_a_kernel_needs_and_hides_ring_0() {
    let [_, _, c, d] = cpuid(1, 0);
    // FPU TSC MSR PAE CX8 APIC CMOV FXSR SSE SSE2.
    for bit in [0, 4, 5, 6, 8, 9, 15, 24, 25, 26] {
        assert!(d >> bit & 1 == 1, "leaf 1 EDX bit {bit}");
    }
    // PSE and PGE.
    for bit in [3, 13] {
        assert!(d >> bit & 1 == 0, "leaf 1 EDX bit {bit}");
    }
    assert!(c >> 31 & 1 == 1, "a hypervisor is present");
    // MONITOR, VMX, SMX, PCID, deadline timer.
    for bit in [3, 5, 6, 17, 24] {
        assert!(c >> bit & 1 == 0, "leaf 1 ECX bit {bit}");
    }
    // The quirk: OSXSAVE is shown with XSAVE even before CR4 has it.
    assert_eq!(c >> 26 & 1, c >> 27 & 1, "XSAVE and OSXSAVE");
    let [_, b, c, d] = cpuid(7, 0);
    assert!(d >> 4 & 1 <= b >> 9 & 1, "FSRM without ERMS");
    for (name, bit) in [("SMEP", 7), ("INVPCID", 10), ("SMAP", 20)] {
        assert!(b >> bit & 1 == 0, "{name}");
    }
    for (name, bit) in [("UMIP", 2), ("PKU", 3), ("OSPKE", 4), ("CET_SS", 7), ("LA57", 16)] {
        assert!(c >> bit & 1 == 0, "{name}");
    }
    let [_, _, c, d] = cpuid(0x8000_0001, 0);
    assert!(c >> 2 & 1 == 0, "SVM");
    for (name, bit) in [("SYSCALL", 11), ("NX", 20), ("LM", 29)] {
        assert!(d >> bit & 1 == 1, "{name}");
    }
    assert!(d >> 26 & 1 == 0, "1 GiB pages");
    let [_, b, ..] = cpuid(0x8000_0008, 0);
    assert!(b >> 3 & 1 == 0, "INVLPGB");
}
test!("emulated.cpuid.policy", forced_cpuid_shows_what_a_kernel_needs_and_hides_ring_0);

fn rdmsr(msr: u64) -> Option<u64> {
    let registers = Registers { rcx: msr, ..pattern() };
    let stop = execute(code!("rdmsr"), &registers);
    if stop.ended {
        return Some(stop.frame.rdx << 32 | stop.frame.rax);
    }
    assert_eq!(stop.trapped(13).frame.error, 0);
    None
}

fn wrmsr(msr: u64, value: u64) -> Option<()> {
    let registers = Registers { rcx: msr, rax: value & 0xffff_ffff, rdx: value >> 32, ..pattern() };
    let stop = execute(code!("wrmsr"), &registers);
    if stop.ended {
        return Some(());
    }
    assert_eq!(stop.trapped(13).frame.error, 0);
    None
}

/// core 3.14.
fn model_specific_registers() {
    let efer = rdmsr(0xc000_0080).expect("EFER is readable");
    // SCE, LME, LMA, NXE; not SVME.
    assert_eq!(efer & 0x1d01, 0xd01);
    assert_eq!(wrmsr(0xc000_0080, efer), Some(()));
    assert_eq!(wrmsr(0xc000_0080, efer ^ 0x800), None, "NXE stays");
    assert_eq!(rdmsr(0x277), Some(0x0000_0501_0007_0406), "PAT");
    // Fast strings, or Linux drops ERMS; neither performance monitoring nor MONITOR, as CPUID says.
    assert_eq!(rdmsr(0x1a0).map(|misc_enable| misc_enable & 0x4_0081), Some(1), "MISC_ENABLE");
    assert!(rdmsr(0x10).expect("the counter is readable") > 0);
    let apic = rdmsr(0x1b).expect("the APIC base is readable");
    assert_eq!(apic & 0xffff_fc00, 0xfee0_0800, "enabled, not x2APIC");
    assert_eq!(apic & 0x100, 0x100, "vcpu 0 is the boot processor");
    // What nobody offers is #GP.
    for msr in [0x174, 0xc000_0082, 0x800, 0x1234_5678] {
        assert_eq!(rdmsr(msr), None, "MSR {msr:#x}");
        assert_eq!(wrmsr(msr, 0), None, "MSR {msr:#x}");
    }
}
test!("emulated.msr", model_specific_registers);

/// core 3.14: the segment bases by MSR; 0xC0000101 is the first thing Linux writes.
fn bases_by_msr() {
    let word = [0x1122_3344_5566_7788u64, 2];
    let address = probe::address(&word);
    assert_eq!(wrmsr(0xc000_0101, address), Some(()));
    assert_eq!(rdmsr(0xc000_0101), Some(address));
    assert_eq!(execute(code!("mov rax, gs:[8]"), &pattern()).ended().rax, 2);
    assert_eq!(wrmsr(0xc000_0100, address), Some(()));
    assert_eq!(execute(code!("mov rax, fs:[0]"), &pattern()).ended().rax, word[0]);
    assert_eq!(wrmsr(0xc000_0102, address + 8), Some(()));
    assert_eq!(rdmsr(0xc000_0102), Some(address + 8));
    assert_eq!(rdmsr(0xc000_0101), Some(address), "the active base is another");
    for msr in [0xc000_0100, 0xc000_0101, 0xc000_0102] {
        assert_eq!(wrmsr(msr, NOT_CANONICAL), None);
        assert_eq!(wrmsr(msr, 0), Some(()));
    }
}
test!("emulated.msr.bases", bases_by_msr);

/// core 3.9.
fn control_registers() {
    let cr0 = execute(code!("mov rax, cr0"), &pattern()).ended().rax;
    // PG, WP, PE; TS is clear.
    assert_eq!(cr0 & 0x8001_0009, 0x8001_0001);
    let set_cr0 = |value| execute(code!("mov cr0, rax"), &Registers { rax: value, ..pattern() });
    let _ = set_cr0(cr0).ended();
    let _ = set_cr0(cr0 ^ 0x1_0000).trapped(13);
    let _ = set_cr0(cr0 | 8).ended();
    assert_eq!(execute(code!("mov rax, cr0"), &pattern()).ended().rax, cr0 | 8);
    let _ = execute(code!("clts"), &pattern()).ended();
    assert_eq!(execute(code!("mov rax, cr0"), &pattern()).ended().rax, cr0);

    let root = memory::entry_address(0, 4).and_then(memory::frame_of).expect("there is a root");
    let cr3 = execute(code!("mov rax, cr3"), &pattern()).ended().rax;
    assert_eq!(cr3 >> 12, root);

    let registers = Registers { rax: 0x1234_5000, ..pattern() };
    let _ = execute(code!("mov cr2, rax"), &registers).ended();
    assert_eq!(execute(code!("mov rax, cr2"), &pattern()).ended().rax, 0x1234_5000);
    assert_eq!(guests::events::page_fault_address(), 0x1234_5000);

    let cr4 = execute(code!("mov rax, cr4"), &pattern()).ended().rax;
    assert_eq!(cr4 & 0x20, 0x20, "PAE");
    // Writes never fault, and change only what they may: PGE and SMEP are not among it.
    let registers = Registers { rax: cr4 ^ 0x10_0080, ..pattern() };
    let _ = execute(code!("mov cr4, rax"), &registers).ended();
    assert_eq!(execute(code!("mov rax, cr4"), &pattern()).ended().rax, cr4);
}
test!("emulated.cr", control_registers);

/// core 3.2, 3.11: the trap clears TS before it is delivered.
fn device_not_available() {
    call(Hypercall::FpuTaskswitch, [1, 0, 0, 0, 0]).expect("TS is set");
    let cr0 = |()| execute(code!("mov rax, cr0"), &pattern()).ended().rax;
    assert_eq!(cr0(()) & 8, 8);
    let code = code!("fninit");
    assert_eq!(execute(code, &pattern()).trapped(7).frame.rip, code.start);
    assert_eq!(cr0(()) & 8, 0);
    let _ = execute(code, &pattern()).ended();
    call(Hypercall::FpuTaskswitch, [1, 0, 0, 0, 0]).expect("TS is set");
    call(Hypercall::FpuTaskswitch, [0, 0, 0, 0, 0]).expect("TS is cleared");
    let _ = execute(code, &pattern()).ended();
}
test!("emulated.ts", device_not_available);

/// core 3.9: everything privileged that is not emulated is the guest's #GP.
fn the_rest_is_refused() {
    let table = [0u64; 2];
    let registers = Registers { rdi: probe::address(&table), ..pattern() };
    let codes = [
        code!("hlt"),
        code!("invlpg [rdi]"),
        code!("lgdt [rdi]"),
        code!("lidt [rdi]"),
        code!("lldt di"),
        code!("ltr di"),
        code!("lmsw di"),
        code!("swapgs"),
        code!("sysretq"),
    ];
    for (i, code) in codes.into_iter().enumerate() {
        let stop = execute(code, &registers);
        assert_eq!(stop.frame.vector, 13, "instruction {i}: {}", stop.frame);
        assert_eq!(stop.frame.rip, code.start, "instruction {i}");
        assert_eq!(stop.frame.error, 0);
    }
    let _ = execute(code!("wbinvd"), &registers).ended();
}
test!("emulated.refused", the_rest_is_refused);

/// core 3.9: an emulated instruction under TF traps after it like any other.
fn single_step_over_an_emulated_instruction() {
    let code = code!("pushfq", "or qword ptr [rsp], 0x100", "popfq", "mov rax, cr0", "nop");
    let stop = execute(code, &pattern()).trapped(1);
    let past_the_move = execute(code!("mov rax, cr0", "int3"), &pattern()).trapped(3);
    let _ = past_the_move;
    assert_eq!(stop.frame.rflags & flag::TF, flag::TF);
    // PUSHFQ 1, OR 8, POPFQ 1 bytes; then MOV.
    assert_eq!(stop.frame.rip, code.start + 13);
    assert!(stop.frame.rax & 1 == 1, "the move was done");
}
test!("emulated.single-step", single_step_over_an_emulated_instruction);

/// core 3.11.
fn debug_registers() {
    let set = |register: u64, value: u64| call(Hypercall::SetDebugreg, [register, value, 0, 0, 0]);
    let get = |register: u64| call(Hypercall::GetDebugreg, [register, 0, 0, 0, 0]);
    for register in 0..4 {
        set(register, 0x1000 * (register + 1)).expect("an address is taken");
        assert_eq!(get(register), Ok(0x1000 * (register + 1)));
    }
    assert_eq!(set(0, 0xffff_8800_0000_0000 - 8), Err(Errno::Perm), "the hole");
    assert!(set(7, 1 << 32).is_err(), "upper bits");
    assert_eq!(set(7, 0x400 | 1 << 13), Err(Errno::Perm), "GD");
    assert!(set(8, 0).is_err());
    assert!(get(8).is_err());
    set(7, 0).expect("all off");
    assert_eq!(get(7).map(|value| value & 0xff), Ok(0));

    // An execution breakpoint at the second instruction.
    let code = code!("nop", "nop");
    set(0, code.start + 1).expect("an address is taken");
    set(7, 0x401 | 1).expect("a breakpoint is taken");
    let stop = execute(code, &pattern()).trapped(1);
    assert_eq!(stop.frame.rip, code.start + 1);
    set(7, 0).expect("all off");
    for register in 0..4 {
        set(register, 0).expect("zero is taken");
    }
}
test!("emulated.debug-registers", debug_registers);

/// core 3.11: breakpoints on ports need CR4.DE, and then come after the access.
fn breakpoints_on_ports() {
    let set = |register: u64, value: u64| call(Hypercall::SetDebugreg, [register, value, 0, 0, 0]);
    let get = |register: u64| call(Hypercall::GetDebugreg, [register, 0, 0, 0, 0]);
    // DR1: the two bytes at ports 0x60 and 0x61.
    let dr7 = 0x60_0404;
    set(1, 0x60).expect("a port is taken");
    assert_eq!(set(7, dr7), Err(Errno::Perm));
    let mov = |value| execute(code!("mov dr7, rax"), &Registers { rax: value, ..pattern() });
    assert_eq!(mov(dr7).trapped(13).frame.error, 0);
    assert_eq!(get(7), Ok(0x400));
    let cr4 = execute(code!("mov rax, cr4"), &pattern()).ended().rax;
    let set_cr4 = |value| execute(code!("mov cr4, rax"), &Registers { rax: value, ..pattern() }).ended();
    let _ = set_cr4(cr4 | 8);
    let _ = mov(dr7).ended();
    assert_eq!(get(7), Ok(dr7));
    assert_eq!((set(5, 0), get(4)), (Err(Errno::NoDev), Err(Errno::NoDev)), "with CR4.DE");
    set_iopl(1).expect("level 1 is taken");
    let read = |port| execute(code!("in al, dx", "nop"), &Registers { rdx: port, ..pattern() });
    let _ = read(0x62).ended();
    set(6, 0).expect("DR6 is cleared");
    let code = code!("out dx, al", "nop");
    let stop = execute(code, &Registers { rdx: 0x61, ..pattern() }).trapped(1);
    assert_eq!((stop.frame.rip, get(6)), (code.start + 1, Ok(0xffff_0ff2)));
    let _ = read(0x60).trapped(1);
    set_iopl(0).expect("level 0 is taken");
    set(7, 0).expect("all off");
    let _ = set_cr4(cr4);
    assert_eq!((set(5, 0), set(1, 0)), (Ok(0), Ok(0)), "without it, 5 is 7");
}
test!("emulated.debug-registers.ports", breakpoints_on_ports);

/// core 3.9: with CR4.TSD the kernel still reads the counter, and user code takes #GP.
fn the_counter_is_kept_from_user_code_alone() {
    let cr4 = execute(code!("mov rax, cr4"), &pattern()).ended().rax;
    let set_cr4 = |value| execute(code!("mov cr4, rax"), &Registers { rax: value, ..pattern() }).ended();
    let aux = 0x1234_5678;
    assert_eq!(wrmsr(0xc000_0103, aux), Some(()));
    let space = UserSpace::new();
    let user = |code| {
        let stop = space.run(code, &UserSpace::frame(), &pattern());
        let _ = guests::events::mask_upcalls();
        stop
    };
    for tsd in [0, 4] {
        let _ = set_cr4(cr4 & !4 | tsd);
        let mut before = 0;
        for code in [code!("rdtsc"), code!("rdtscp"), code!("rdtsc")] {
            let frame = execute(code, &pattern()).ended();
            let now = frame.rdx << 32 | frame.rax;
            assert!(frame.rax >> 32 == 0 && now > before, "{frame}");
            before = now;
        }
        assert_eq!(execute(code!("rdtscp"), &pattern()).ended().rcx, aux);
        let step = code!("pushfq", "or qword ptr [rsp], 0x100", "popfq", "rdtsc", "nop");
        // PUSHFQ 1, OR 8, POPFQ 1, RDTSC 2 bytes.
        assert_eq!(execute(step, &pattern()).trapped(1).frame.rip, step.start + 12);
        for code in [code!("rdtsc"), code!("rdtscp")] {
            let stop = user(code);
            assert_eq!(stop.ended, tsd == 0, "{}", stop.frame);
            if tsd != 0 {
                let frame = stop.trapped(13).frame;
                assert_eq!((frame.rip, frame.error), (UserSpace::CODE, 0));
            }
        }
    }
    let _ = set_cr4(cr4);
}
test!("emulated.tsc", the_counter_is_kept_from_user_code_alone);
