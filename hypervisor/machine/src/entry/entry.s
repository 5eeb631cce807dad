// Into ring 0 and out of it.
//
// A guest runs between `enter_guest` and the next entry below. All entries build the same frame, which is the vcpu's
// `Registers`: the CPU's stack for entries from ring 3 is the end of that structure, so it pushes the last five words
// itself. The high half of the error word says which entry it was: a vector, FAILED_RETURN + a vector, or one of the
// three system-call instructions.
//
// In ring 0 the GS base is our `Cpu`, except from `swapgs` to the return instruction and from an entry to its
// `swapgs`. Only NMI, machine check, double fault and debug exceptions can arrive in those gaps. They have stacks
// of their own and do not use GS.

.macro save_registers
    .irp register, rdi, rsi, rdx, rcx, rax, r8, r9, r10, r11, rbx, rbp, r12, r13, r14, r15
    push \register
    .endr
.endm

.macro load_registers
    .irp register, r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi
    pop \register
    .endr
.endm

// From `enter` to a guest's registers, on the way in. It expects nothing but RBX and RBP to be kept.
.macro leave_host
    push rbp
    push rbx
    mov gs:[{HOST_STACK}], rsp
    lea rsp, [rdi + 8]
    load_registers
.endm

// R11 is the address of `Entry`: the other GS base becomes the active one. RAX and the scratch register are lost.
.macro swap_gs_bases scratch
    rdgsbase \scratch
    mov rax, [r11 + {OTHER_GS}]
    mov [r11 + {OTHER_GS}], \scratch
    wrgsbase rax
.endm

// SYSRET must not meet an address that is not canonical: goes elsewhere with it. RAX is lost.
.macro check_canonical address, elsewhere
    mov rax, \address
    sar rax, 47
    inc rax
    cmp rax, 1
    ja \elsewhere
.endm

// A place the CPU, or `run`, comes to.
.macro begin name
    .balign 16
    .global \name
\name:
.endm

.section .entry.text, "ax", @progbits

begin entry_common
    test byte ptr [rsp + 16], 3         // CS: from ring 3?
    jz 1f
2:  swapgs
entry_save:
    cld
.global entry_clac
entry_clac:
    nop dword ptr [rax]                 // becomes CLAC where there is SMAP
    save_registers
    mov rsp, gs:[{HOST_STACK}]
    pop rbx
    pop rbp
    ret
1:  test byte ptr [rsp + 26], {VM} >> 16
    jz entry_nested
    jmp 2b                              // from virtual-8086 mode, whose CS is any number: see `enter`

// ---- fn enter_guest(rdi = registers): comes back through `entry_save`.
begin enter_guest
    leave_host
    add rsp, 8
    swapgs
entry_return:
    iretq

// ---- The same by SYSRET: RCX and R11 are lost. RIP has been found canonical, CS and SS flat.
begin enter_guest_sysret
    leave_host
    mov rcx, [rsp + 8]
    mov r11, [rsp + 24]
    mov rsp, [rsp + 32]
    swapgs
    sysretq

// ---- SYSCALL. SFMASK has cleared IF, DF, TF, NT, AC.
//
// What user code and the way back to it need is done here, without saving registers, where `Entry` says that nothing about it is
// out of the ordinary; else the rules find everything as it was. Until it is certain, RAX alone is changed, and has its value
// back then. RSP is the address of `Entry`.
begin entry_syscall
    swapgs
    mov gs:[{SCRATCH}], rsp
    mov rsp, gs:[{ENTRY}]
    cmp dword ptr [rsp + {MODE}], {USER}
    jne 2f
    // A system call: the frame on the kernel's stack, events masked, its root, GS base and handler.
    mov [rsp + {ENTRY_RAX}], rax
    mov rax, [rsp + {INFO}]
    cmp byte ptr [rax + 1], 0
    jne 8f
    mov byte ptr [rax + 1], 1
    mov [rsp + {ENTRY_RDX}], rdx
    mov rax, [rsp + {FRAME}]
    mov [rax], rcx
    mov [rax + 8], r11
    mov [rax + 16], rcx
    mov qword ptr [rax + 24], 0xe033
    mov [rax + 32], r11
    mov rdx, gs:[{SCRATCH}]
    mov [rax + 40], rdx
    mov qword ptr [rax + 48], 0xe02b
    mov dword ptr [rsp + {MODE}], {KERNEL}
    inc qword ptr [rsp + {FROM_USER}]
    mov rax, [rsp + {KERNEL_CR3}]
    mov gs:[{ROOT}], rax
    mov cr3, rax
    mov rcx, [rsp + {HANDLER}]
    and r11d, 0xfff88aff                // without TF, DF, IOPL, NT, RF, VM, AC
    swapgs
    rdgsbase rdx
    mov rax, [rsp + {OTHER_GS}]
    wrgsbase rax
    mov [rsp + {OTHER_GS}], rdx
    mov rax, [rsp + {ENTRY_RAX}]
    mov rdx, [rsp + {ENTRY_RDX}]
    mov rsp, [rsp + {FRAME_SP}]
    sysretq

2:  cmp rax, {IRET}
    jne 3f
    cmp dword ptr [rsp + {MODE}], {KERNEL}
    jne 9f
    // Back to user code, from where Linux has the frame. What is read twice is made safe the second time.
    mov rax, [rsp + {BACK_SP}]
    cmp rax, gs:[{SCRATCH}]
    jne 7f
    mov rax, [rsp + {BACK}]
    test byte ptr [rax + 40], 1         // CS of ring 3?
    jz 7f
    test byte ptr [rax + 40], 2
    jz 7f
    test byte ptr [rax + 49], 2         // IF?
    jz 7f
    mov rax, [rsp + {INFO}]
    lock and byte ptr [rax + 1], 0      // before the look: who sends an event sets the one and looks at the other
    cmp byte ptr [rax], 0               // one waits
    jne 7f
    mov rax, [rsp + {USER_CR3}]
    mov gs:[{ROOT}], rax
    mov cr3, rax
    mov dword ptr [rsp + {MODE}], {USER}
    mov rcx, [rsp + {BACK}]
    mov r11, rsp
    mov rsp, gs:[{REGISTERS_END}]
    movzx eax, word ptr [rcx + 64]
    or eax, 3
    push rax
    push qword ptr [rcx + 56]
    mov eax, [rcx + 48]
    and eax, {GUEST_FLAGS}
    or eax, 0x202
    push rax
    movzx eax, word ptr [rcx + 40]
    or eax, 3
    push rax
    push qword ptr [rcx + 32]
    test byte ptr [rcx + 25], 1         // VGCF_in_syscall: RCX and R11 may be lost
    jnz 4f
5:  swapgs
    swap_gs_bases rcx
    mov rcx, [r11 + {BACK}]
    mov rax, [rcx]
    mov r11, [rcx + 8]
    mov rcx, [rcx + 16]
    jmp entry_return

    // By SYSRET, under the conditions of `may_sysret`, which here are those of the words that were pushed. SYSCALL has loaded SS.
4:  check_canonical [rsp], 5b
    cmp qword ptr [rsp + 8], 0xe033
    jne 5b
    test dword ptr [rsp + 16], {EXACT_FLAGS}
    jnz 5b
    cmp qword ptr [rsp + 32], 0xe02b
    jne 5b
    swapgs
    swap_gs_bases rcx
    mov rcx, [r11 + {BACK}]
    mov rax, [rcx]
    mov rcx, [rsp]
    mov r11, [rsp + 16]
    mov rsp, [rsp + 24]
    sysretq

    // The GS base of user mode.
3:  cmp rax, {SET_SEGMENT_BASE}
    jne 9f
    cmp edi, {GS_USER}
    jne 9f
    cmp dword ptr [rsp + {MODE}], {KERNEL}
    jne 9f
    mov rax, [rsp + {INFO}]
    cmp byte ptr [rax + 1], 0
    jne 5f
    cmp byte ptr [rax], 0               // upcalls are let in, and one waits
    jne 6f
5:  check_canonical rsi, 6f
    check_canonical rcx, 6f
    test r11d, {EXACT_FLAGS} | 0x3000
    jnz 6f
    mov [rsp + {OTHER_GS}], rsi
    inc qword ptr [rsp + {RULED}]
    xor eax, eax
    mov rsp, gs:[{SCRATCH}]
    swapgs
    sysretq

6:  mov eax, {SET_SEGMENT_BASE}
    jmp 9f
7:  mov eax, {IRET}
    jmp 9f
8:  mov rax, [rsp + {ENTRY_RAX}]
9:  mov rsp, gs:[{REGISTERS_END}]
    push 0xe02b
    push qword ptr gs:[{SCRATCH}]
    push r11
    push 0xe033
    push rcx
    push 0
    mov dword ptr [rsp + 4], {SYSCALL}
    jmp entry_save

// ---- SYSCALL tells neither SS nor CS: here the flat ones of compatibility code.
begin entry_syscall32
    swapgs
    mov gs:[{SCRATCH}], rsp
    mov rsp, gs:[{REGISTERS_END}]
    push 0xe02b
    push qword ptr gs:[{SCRATCH}]
    push r11
    push 0xe023
    push rcx
    push 0
    mov dword ptr [rsp + 4], {SYSCALL32}
    jmp entry_save

// ---- SYSENTER clears IF alone and tells neither RIP nor RSP. A guest that single-steps has us stepped to `flags_saved`.
begin entry_sysenter
    swapgs
    mov rsp, gs:[{REGISTERS_END}]
    push 0xe02b
    push 0
    pushfq
flags_saved:
    or qword ptr [rsp], 0x200
    push 0xe023
    push 0
    push 0
    mov dword ptr [rsp + 4], {SYSENTER}
    push 2
    popfq
    jmp entry_save

// ---- A fault at the return itself. The frame lies right below RIP in `Registers`, over registers that are still
// in the CPU: move the error word to its place and save as if the guest had faulted.
entry_failed_return:
    swapgs
    pop qword ptr [rsp + 40]
    add rsp, 40
    or dword ptr [rsp + 4], {FAILED_RETURN}
    jmp entry_save

// ---- From ring 0: the return, an interrupt in `idle` or `let_in`, an instruction with a fix-up, or our bug.
entry_nested:
    push rax
    lea rax, [rip + entry_return]
    cmp rax, [rsp + 16]
    pop rax
    je entry_failed_return
entry_report:
    cld
    save_registers
    mov rbx, rsp
    lea rdi, [rsp - 8]
    sub rsp, 8
    and rsp, -16
    call {nested}
    mov rsp, rbx
    load_registers
    add rsp, 8
    iretq

// ---- Page faults: those of user code are its kernel's, and are taken there as system calls are.
begin entry_page_fault
    test byte ptr [rsp + 16], 3
    jz 8f
    swapgs
    cmp dword ptr gs:[{MODE_IN_CPU}], {USER}
    jne 6f
    push rax
    push rcx
    push rdx
    mov rax, gs:[{ENTRY}]
    mov edx, [rsp + 24]
    and edx, 12
    cmp edx, 4                          // by ring 3 itself, no reserved bit
    jne 7f
    mov rcx, [rax + {INFO}]
    cmp byte ptr [rcx + 1], 0
    jne 7f
    mov byte ptr [rcx + 1], 1
    mov rdx, cr2
    mov [rcx + {RECORD_CR2}], rdx
    mov [rax + {ENTRY_CR2}], rdx
    mov rdx, [rax + {FRAME}]            // of a system call, above which the error code takes one word more
    mov rcx, [rsp + 8]
    mov [rdx - 8], rcx
    mov [rdx], r11
    mov ecx, [rsp + 24]
    mov [rdx + 8], rcx
    mov rcx, [rsp + 32]
    mov [rdx + 16], rcx
    movzx ecx, word ptr [rsp + 40]
    mov [rdx + 24], rcx
    .irp word, 48, 56, 64
    mov rcx, [rsp + \word]
    mov [rdx + \word - 16], rcx
    .endr
    mov rcx, [rax + {FAULT}]
    mov [rsp + 32], rcx
    mov qword ptr [rsp + 40], 0xe033
    and dword ptr [rsp + 48], 0xfff88eff // without TF, IOPL, NT, RF, VM, AC
    or dword ptr [rsp + 48], 0x200      // see `enter`
    mov rcx, [rax + {FRAME_SP}]
    sub rcx, 8
    mov [rsp + 56], rcx
    mov qword ptr [rsp + 64], 0xe02b
    mov dword ptr [rax + {MODE}], {KERNEL}
    inc qword ptr [rax + {FROM_USER}]
    mov rcx, [rax + {KERNEL_CR3}]
    mov gs:[{ROOT}], rcx
    mov cr3, rcx
    swapgs
    rdgsbase rdx
    mov rcx, [rax + {OTHER_GS}]
    wrgsbase rcx
    mov [rax + {OTHER_GS}], rdx
    pop rdx
    pop rcx
    pop rax
    add rsp, 8
    jmp entry_return
7:  pop rdx
    pop rcx
    pop rax
6:  mov dword ptr [rsp + 4], 14
    jmp entry_save
8:  mov dword ptr [rsp + 4], 14
    jmp entry_common

// ---- #DB, on its own stack. In ring 0 it is the guest's: a breakpoint on the stack slot of MOV SS before SYSCALL
// or INT, or a single step over SYSENTER, whose TF must be in the frame and not go on stepping through us after that.
// Either way DR6 must not keep it for the next vcpu.
begin entry_debug
    test byte ptr [rsp + 8], 3
    jnz 2f
    test byte ptr [rsp + 18], {VM} >> 16
    jnz 2f
    push rax
    mov eax, {DR6_CLEAR}
    mov dr6, rax
    lea rax, [rip + entry_sysenter]
    cmp [rsp + 8], rax
    jb 1f
    lea rax, [rip + flags_saved]
    cmp [rsp + 8], rax
    jb 3f
1:  and qword ptr [rsp + 24], -257
3:  pop rax
    iretq
2:  swapgs
    push rax
    push rbx
    mov rax, gs:[{REGISTERS_END}]
    .irp word, 0, 8, 16, 24, 32
    mov rbx, [rsp + 16 + \word]
    mov [rax - 40 + \word], rbx
    .endr
    pop rbx
    pop rax
    mov rsp, gs:[{REGISTERS_END}]
    sub rsp, 40
    push 0
    mov dword ptr [rsp + 4], 1
    jmp entry_save

// ---- NMI, on its own stack: counted, nothing else. A second one cannot come before IRETQ.
begin entry_nmi
    lock inc qword ptr [rip + {nmis}]
    iretq

// ---- Double fault and machine check, on their own stacks: the end.
begin entry_double_fault
    mov dword ptr [rsp + 4], 8
    jmp entry_report
begin entry_machine_check
    push 0
    mov dword ptr [rsp + 4], 18
    jmp entry_report
