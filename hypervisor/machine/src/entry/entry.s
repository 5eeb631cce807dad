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
    sub rsp, 8
.endm

.macro load_registers
    add rsp, 8
    .irp register, r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi
    pop \register
    .endr
.endm

// From `run` to a guest's registers, on the way in.
.macro leave_host
    .irp register, rbp, rbx, r12, r13, r14, r15
    push \register
    .endr
    mov gs:[{HOST_STACK}], rsp
    mov rsp, rdi
    load_registers
.endm

// SYSCALL tells neither SS nor CS: the flat ones of 64-bit code, or of compatibility code.
.macro system_call cs, kind
    swapgs
    mov gs:[{SCRATCH}], rsp
    mov rsp, gs:[{REGISTERS_END}]
    push 0xe02b
    push qword ptr gs:[{SCRATCH}]
    push r11
    push \cs
    push rcx
    push 0
    mov dword ptr [rsp + 4], \kind
    jmp entry_save
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
    jz entry_nested
    swapgs
entry_save:
    cld
.global entry_clac
entry_clac:
    nop dword ptr [rax]                 // becomes CLAC where there is SMAP
    save_registers
    mov rsp, gs:[{HOST_STACK}]
    .irp register, r15, r14, r13, r12, rbx, rbp
    pop \register
    .endr
    ret

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
begin entry_syscall
    system_call 0xe033, {SYSCALL}

begin entry_syscall32
    system_call 0xe023, {SYSCALL32}

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
    mov rdi, rsp
    mov rbx, rsp
    and rsp, -16
    call {nested}
    mov rsp, rbx
    load_registers
    add rsp, 8
    iretq

// ---- #DB, on its own stack. In ring 0 it is the guest's: a breakpoint on the stack slot of MOV SS before SYSCALL
// or INT, or a single step over SYSENTER, whose TF must be in the frame and not go on stepping through us after that.
// Either way DR6 must not keep it for the next vcpu.
begin entry_debug
    test byte ptr [rsp + 8], 3
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
