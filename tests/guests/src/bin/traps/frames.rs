//! What is delivered, and the words of the frame (core 3.2, 3.3, 3.6).

use guests::abi::callback::TrapInfo;
use guests::abi::{Errno, Hypercall, selector};
use guests::probe::{self, Registers, Stop, call, execute};
use guests::{NOT_CANONICAL, code, events, flag, memory, pattern, registers_of, test};
use unikernel::traps;

/// CS as a frame from kernel mode shows it: RPL 0 (core 3.3), and the upcall mask, which is set while tests run.
const KERNEL_CS_MASKED: u64 = (selector::GUEST_CS & !3) as u64 | 1 << 32;
const SS: u64 = selector::GUEST_SS as u64;

/// What core 3.3 says of every frame from kernel mode with upcalls masked.
#[track_caller]
fn check_kernel_frame(stop: &Stop, rip: u64) {
    let frame = &stop.frame;
    assert_eq!(frame.rip, rip, "{frame}");
    assert_eq!(frame.cs, KERNEL_CS_MASKED, "{frame}");
    assert_eq!(frame.ss, SS, "{frame}");
    assert_eq!(frame.rsp, probe::stack_end(), "{frame}");
    assert_eq!(stop.base, frame.rsp & !15);
    assert_eq!(frame.rflags & (flag::IF | flag::IOPL), 0, "IF is the inverted mask");
    assert_eq!(stop.handler_selectors, (selector::GUEST_CS, selector::GUEST_SS));
    assert_eq!(stop.handler_mask, 1);
    // core 3.8: the real IF is always set.
    assert_eq!(stop.handler_rflags & flag::IF, flag::IF);
}

fn an_exception_carries_all_registers() {
    let code = code!("ud2", "nop");
    let mut registers = pattern();
    let stop = execute(code, &registers).trapped(6);
    check_kernel_frame(&stop, code.start);
    registers.rsp = probe::stack_end();
    assert_eq!(registers_of(&stop.frame), registers);
}
test!("traps.frame.registers", an_exception_carries_all_registers);

fn the_base_is_rounded_down_to_16() {
    for offset in 0..32 {
        let rsp = probe::stack_end() - 256 - offset;
        let registers = Registers { rsp, ..pattern() };
        // Without and with an error code.
        for (stop, vector) in [(execute(code!("ud2", "nop"), &registers), 6), (execute(code!("hlt"), &registers), 13)] {
            let stop = stop.trapped(vector);
            assert_eq!(stop.frame.rsp, rsp);
            assert_eq!(stop.base, rsp & !15);
            assert_eq!(stop.frame.error, 0);
        }
    }
}
test!("traps.frame.alignment", the_base_is_rounded_down_to_16);

fn faults_arrive_by_their_vectors() {
    let code = code!("xor edx, edx", "xor ecx, ecx", "div ecx");
    check_kernel_frame(&execute(code, &pattern()).trapped(0), code.start + 4);
    let code = code!("int3");
    check_kernel_frame(&execute(code, &pattern()).trapped(3), code.start + 1);
    let code = code!("hlt");
    let stop = execute(code, &pattern()).trapped(13);
    check_kernel_frame(&stop, code.start);
    assert_eq!(stop.frame.error, 0);
}
test!("traps.vectors", faults_arrive_by_their_vectors);

fn addresses_that_are_not_canonical() {
    let registers = Registers { rdi: NOT_CANONICAL, ..pattern() };
    let stop = execute(code!("mov rax, [rdi]"), &registers).trapped(13);
    assert_eq!(stop.frame.error, 0);
    // Addressed through RBP it is a stack fault on hardware; QEMU raises #GP there too.
    let registers = Registers { rbp: NOT_CANONICAL, ..pattern() };
    let stop = execute(code!("mov rax, [rbp]"), &registers);
    assert!(matches!(stop.frame.vector, 12 | 13), "{}", stop.frame);
    assert_eq!(stop.frame.error, 0);
}
test!("traps.not-canonical", addresses_that_are_not_canonical);

/// core 3.2: INT n goes through the gate's privilege; RIP is after it, and there is no error code.
fn int_n_obeys_the_gate() {
    guests::install_gate(traps::gate(0x40, 0, true));
    let code = code!("int 0x40");
    let stop = execute(code, &pattern()).trapped(13);
    check_kernel_frame(&stop, code.start);
    assert_eq!(stop.frame.error, 0x40 << 3 | 2);

    guests::install_gate(traps::gate(0x40, 1, true));
    check_kernel_frame(&execute(code, &pattern()).trapped(0x40), code.start + 2);
}
test!("traps.int-n", int_n_obeys_the_gate);

/// core 3.2: a redundant prefix makes the instruction longer. (Xen 4.17 still assumed two bytes.)
fn int_n_with_a_prefix() {
    guests::install_gate(traps::gate(0x40, 1, true));
    let prefixed = code!(".byte 0x48, 0xcd, 0x40");
    check_kernel_frame(&execute(prefixed, &pattern()).trapped(0x40), prefixed.start + 3);
}
test!("traps.int-n.prefix", int_n_with_a_prefix);

/// core 3.2: INT 0x80 has a way of its own: no privilege check, but #GP(0x402) where no gate is.
fn int_80_needs_only_a_gate() {
    guests::install_gate(traps::gate(0x80, 0, true));
    let code = code!("int 0x80");
    check_kernel_frame(&execute(code, &pattern()).trapped(0x80), code.start + 2);

    call(Hypercall::SetTrapTable, [0; 5]).expect("the table is cleared");
    let gates = [traps::gate(6, 0, true), traps::gate(13, 0, true), TrapInfo::default()];
    call(Hypercall::SetTrapTable, [probe::address(&gates), 0, 0, 0, 0]).expect("gates are taken");
    let stop = execute(code, &pattern()).trapped(13);
    check_kernel_frame(&stop, code.start);
    assert_eq!(stop.frame.error, 0x402);
    for vector in 0..=255 {
        guests::install_gate(traps::gate(vector, if vector == 3 || vector == 0x80 { 3 } else { 0 }, true));
    }
}
test!("traps.int-80", int_80_needs_only_a_gate);

/// core 3.6: the U bit says which mode the guest was in, the address is in vcpu_info.
fn page_faults_of_the_kernel() {
    let unmapped = 0x1234_5678_9000;
    let cases = [(code!("mov rax, [rdi]"), 0), (code!("mov [rdi], rax"), 2)];
    for (code, error) in cases {
        let registers = Registers { rdi: unmapped + 0xabc, ..pattern() };
        let stop = execute(code, &registers).trapped(14);
        check_kernel_frame(&stop, code.start);
        assert_eq!(stop.frame.error, error);
        assert_eq!(events::page_fault_address(), unmapped + 0xabc);
        // core 3.9: and MOV from CR2 says the same.
        let cr2 = execute(code!("mov rax, cr2"), &pattern()).ended().rax;
        assert_eq!(cr2, unmapped + 0xabc);
    }
    let registers = Registers { rdi: unmapped, ..pattern() };
    let stop = execute(code!("jmp rdi"), &registers).trapped(14);
    assert_eq!(stop.frame.rip, unmapped);
    assert_eq!(stop.frame.error & !0x10, 0, "a fetch, of a page not present");

    // A root table is mapped read-only, and no emulation is for roots (core 4.7).
    let root = unikernel::memory::entry_address(0, 4).expect("there is a root");
    let registers = Registers { rdi: root, rax: 0, ..pattern() };
    let stop = execute(code!("mov [rdi], rax"), &registers).trapped(14);
    assert_eq!(stop.frame.error, 3);
    assert_eq!(events::page_fault_address(), root);
}
test!("traps.page-fault", page_faults_of_the_kernel);

/// core 2.1: the machine-to-physical table is readable and nothing else; the rest of the hole is closed.
fn the_hypervisors_hole_is_closed() {
    let table = 0xffff_8000_0000_0000;
    let own = memory::frame_of_page(1).expect("page 1 is ours");
    assert_eq!(probe::read(table + own * 8), Ok(1));
    let fault = probe::write(table + own * 8, 0).expect_err("the table is read-only");
    assert_eq!((fault.vector, fault.error), (14, 3));
    let inside = (257u64..272).map(|slot| 0xffff_0000_0000_0000 | slot << 39);
    for address in inside.chain([0xffff_87ff_ffff_fff8]) {
        for fault in [probe::read(address).expect_err("closed"), probe::write(address, 0).expect_err("closed")] {
            assert_eq!(fault.vector, 14, "at {address:#x}");
            assert_eq!(fault.error & 4, 0, "the fault is the kernel's");
            assert_eq!(fault.address, address);
        }
    }
}
test!("traps.hole", the_hypervisors_hole_is_closed);

/// core 3.3: what a frame says of flags, and what the handler runs with.
fn flags_of_frame_and_handler() {
    let set = |bits: u64| Registers { rax: bits, ..pattern() };
    let code = code!("pushfq", "or [rsp], rax", "popfq", "nop", "ud2", "nop");
    for bits in [flag::AC, flag::NT, flag::DF, flag::AC | flag::NT | flag::DF] {
        let stop = execute(code, &set(bits)).trapped(6);
        assert_eq!(stop.frame.rflags & bits, bits, "{}", stop.frame);
        assert_eq!(stop.handler_rflags & (flag::AC | flag::NT | flag::TF), 0);
    }
    // POPF cannot change IF or IOPL at ring 3 (core 3.8); the frame shows IF by the mask and IOPL 0.
    let stop = execute(code, &set(flag::IOPL)).trapped(6);
    assert_eq!(stop.frame.rflags & (flag::IOPL | flag::IF), 0);
    // The trap comes after the instruction that follows POPF.
    let stop = execute(code!("pushfq", "or [rsp], rax", "popfq", "nop", "nop"), &set(flag::TF)).trapped(1);
    assert_eq!(stop.frame.rflags & flag::TF, flag::TF);
    assert_eq!(stop.handler_rflags & flag::TF, 0);
}
test!("traps.flags", flags_of_frame_and_handler);

/// core 3.3: the mask before the delivery is in the frame, twice; the gate says whether the handler is masked.
fn the_upcall_mask_of_frame_and_handler() {
    let unmask = code!("mov byte ptr [rdi], 0", "ud2", "nop");
    let registers = Registers { rdi: guests::mask_address(), ..pattern() };
    for masks in [true, false] {
        guests::install_gate(traps::gate(6, 0, masks));
        let stop = execute(unmask, &registers).trapped(6);
        assert_eq!(stop.frame.saved_mask(), 0);
        assert_eq!(stop.frame.cs, u64::from(selector::GUEST_CS & !3));
        assert_eq!(stop.frame.rflags & flag::IF, flag::IF);
        assert_eq!(stop.handler_mask, u8::from(masks));
        let _ = events::mask_upcalls();

        let stop = execute(code!("ud2", "nop"), &pattern()).trapped(6);
        assert_eq!(stop.frame.cs, KERNEL_CS_MASKED);
        assert_eq!(stop.frame.rflags & flag::IF, 0);
        assert_eq!(stop.handler_mask, 1, "a gate never unmasks");
    }
    guests::install_gate(traps::gate(6, 0, true));
}
test!("traps.mask", the_upcall_mask_of_frame_and_handler);

/// core 10.4, 3.4.
fn bad_handlers_are_refused() {
    let gates = [TrapInfo { address: NOT_CANONICAL, ..traps::gate(6, 0, true) }, TrapInfo::default()];
    let refused = call(Hypercall::SetTrapTable, [probe::address(&gates), 0, 0, 0, 0]);
    assert_eq!(refused, Err(Errno::Inval));
    // core 1.7: a handle that does not resolve.
    let refused = call(Hypercall::SetTrapTable, [0x1234_5678_9000, 0, 0, 0, 0]);
    assert_eq!(refused, Err(Errno::Fault));
    // The gates there were still work.
    let _ = execute(code!("ud2", "nop"), &pattern()).trapped(6);
}
test!("traps.bad-gates", bad_handlers_are_refused);

/// core 3.8: an NMI is an ordinary frame through gate 2; here it arrives when the call that sends it returns.
fn a_nonmaskable_interrupt_ignores_the_mask() {
    let registers = Registers { rdi: 11, rsi: 0, rdx: 0, ..pattern() };
    let code = code!("mov eax, 24", "syscall", "nop");
    let stop = execute(code, &registers).trapped(2);
    assert_eq!(stop.frame.rip, code.start + 7);
    assert_eq!(stop.frame.rax, 0);
    assert_eq!(stop.handler_mask, 1);
    // It may be sent again: `iret` ended the first.
    let _ = execute(code, &registers).trapped(2);
}
test!("traps.nmi", a_nonmaskable_interrupt_ignores_the_mask);

/// core 1.7: only RAX, RCX, R11 and the argument registers may change; unknown numbers answer ENOSYS.
fn a_hypercall_keeps_registers() {
    let registers = Registers { rax: 17, rdi: 0, ..pattern() };
    let frame = execute(code!("syscall"), &registers).ended();
    let kept = |r: &Registers| [r.rbx, r.rbp, r.r9, r.r12, r.r13, r.r14, r.r15];
    let after = registers_of(&frame);
    assert_eq!(kept(&after), kept(&registers));
    assert_eq!(after.rsp, probe::stack_end());
    assert!(frame.rax >> 16 >= 3);
    for number in [11, 43, 56, 1000, u64::from(u32::MAX), u64::MAX] {
        let result = probe::call_number(number, [0; 5]);
        assert_eq!(result, Errno::NoSys.to_rax(), "call {number}");
    }
}
test!("traps.hypercall", a_hypercall_keeps_registers);
