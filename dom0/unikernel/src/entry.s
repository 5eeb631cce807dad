// What the builder reads (core 1.2).
.macro note_string type, text
    .long 4, 2f - 1f, \type
    .asciz "Xen"
1:  .asciz "\text"
2:  .balign 4
.endm
.macro note_number type, value
    .long 4, 8, \type
    .asciz "Xen"
    .quad \value
.endm

.section .note.Xen, "a", @note
.balign 4
    note_number 1, _start                   // ENTRY
    note_number 3, VIRT_BASE                // VIRT_BASE
    note_number 4, 0                        // PADDR_OFFSET
    note_string 5, "xen-3.0"                // XEN_VERSION
    note_string 6, "tenon"                  // GUEST_OS
    note_string 8, "generic"                // LOADER
    note_number 16, 1                       // MOD_START_PFN: the ramdisk need not be mapped

.section .text
// RSI = start info, RSP = end of the builder's boot stack (core 1.5). We leave that stack at once: it is one page.
.globl _start
_start:
    cld
    xor ebp, ebp
    mov rdi, rsi
    mov rsi, rsp
    lea rsp, [rip + entry_stack_end]
    call image_main
    ud2

// Every way into the kernel ends here with a frame of one form on the stack, lowest address first:
//   vector, r15..r12, r10..r8, rbp, rdi, rsi, rdx, rbx, rax, r11, rcx, error code, rip, cs, rflags, rsp, ss
// From rax on it is what the `iret` hypercall takes (core 3.7), with the error code in place of its flags.
// RSP is 0 mod 16 at the call: the hypervisor rounds its frame's base down to 16 (core 3.3) and 22 words follow.
trap_common:
    push rbx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r12
    push r13
    push r14
    push r15
    push rax
    cld                                     // the hypervisor leaves DF as it was
    mov rdi, rsp
    call trap_entry
    pop rax
    pop r15
    pop r14
    pop r13
    pop r12
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rbx
    mov qword ptr [rsp + 24], 0
    mov eax, 23
    syscall
    ud2

// The frame the hypervisor pushes starts with RCX and R11 (core 3.3); some vectors have an error code after them.
.macro trap_stub vector, has_error
    pop rcx
    pop r11
    .if \has_error == 0
    push 0
    .endif
    push rcx
    push r11
    push rax
    mov eax, \vector
    jmp trap_common
.endm

.balign 32
.globl trap_stubs
trap_stubs:
.set vector, 0
.rept 256
    .balign 32
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    trap_stub vector, 1
    .else
    trap_stub vector, 0
    .endif
    .set vector, vector + 1
.endr

.globl event_stub
event_stub:
    trap_stub 256, 0

.globl syscall_stub
syscall_stub:
    trap_stub 257, 0

// Four selectors more than other frames (core 3.5); we load none, so they carry no news.
.globl failsafe_stub
failsafe_stub:
    pop rcx
    pop r11
    add rsp, 32
    push 0
    push rcx
    push r11
    push rax
    mov eax, 258
    jmp trap_common

.section .bss
.balign 16
    .space 128 * 1024
entry_stack_end:
.section .text
