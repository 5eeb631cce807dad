// One stub per vector, 16 bytes apart: an error word for the exceptions that have none, the vector in its high half.
// In AT&T syntax, which tells a constant with a name from a place in memory.

.section .entry.text, "ax", @progbits
.global entry_vectors
.balign 16
entry_vectors:
.set vector, 0
.rept 256
    .balign 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    .else
    pushq $0
    .endif
    movl $vector, 4(%rsp)
    jmp entry_common
    .set vector, vector + 1
.endr
