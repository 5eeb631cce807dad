// From the loader to `start`: 32-bit protected mode without paging in, 64-bit mode in the image's slot out.
// EBX holds the physical address of the loader's information; EAX the Multiboot2 magic, cleared for PVH.

// ---- Multiboot2 header
.section .boot.header, "a"
.balign 8
multiboot2_header:
    .long 0xe85250d6, 0, multiboot2_header_end - multiboot2_header
    .long -(0xe85250d6 + 0 + (multiboot2_header_end - multiboot2_header))
    .balign 8
    .short 6, 0                         // modules on page boundaries
    .long 8
    .balign 8
    .short 0, 0
    .long 8
multiboot2_header_end:

// ---- PVH note: XEN_ELFNOTE_PHYS32_ENTRY
.section .note.Xen, "a", @note
.balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh_entry

.section .boot.text, "ax"
.code32
.global pvh_entry, multiboot2_entry
pvh_entry:
    xor eax, eax
multiboot2_entry:
    cli
    cld
    mov ebp, eax
    // 4 GiB in 2 MiB pages ...
    mov edi, offset boot_l2_physical
    mov eax, 0x83                       // present, writable, large
    mov ecx, 2048
2:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 2b
    // ... through one L3 ...
    mov edi, offset boot_l3_physical
    mov eax, offset boot_l2_physical
    or eax, 3
    mov ecx, 4
3:  mov [edi], eax
    add eax, 4096
    add edi, 8
    dec ecx
    jnz 3b
    // ... three times: identity for the next instructions, the image (slot 261), the direct map (slot 262).
    mov edi, offset boot_l4_physical
    mov eax, offset boot_l3_physical
    or eax, 3
    mov [edi], eax
    mov [edi + 261 * 8], eax
    mov [edi + 262 * 8], eax
    mov cr3, edi
    mov eax, cr4
    or eax, 0x20                        // PAE
    mov cr4, eax
    mov ecx, 0xc0000080                 // EFER
    rdmsr
    or eax, 0x900                       // LME, NXE
    wrmsr
    mov eax, 0x80050033                 // PG, AM, WP, NE, ET, MP, PE
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    mov esi, ebx
    mov edi, ebp
    mov esp, offset boot_stack_physical
    push 8
    mov eax, offset boot_long_mode
    push eax
    retf
.code64
boot_long_mode:
    xor eax, eax
    .irp segment, ds, es, ss, fs, gs
    mov \segment, eax
    .endr
    mov edi, edi
    mov esi, esi
    movabs rsp, offset boot_stack_end
    xor ebp, ebp
    movabs rax, offset {start}
    call rax
    ud2

.section .boot.data, "aw"
.balign 8
boot_gdt:
    .quad 0, 0x00af9b000000ffff
boot_gdt_pointer:
    .short 15
    .long boot_gdt

.section .bss.boot, "aw", @nobits
.balign 4096
.global boot_l4, boot_l3, boot_l2, boot_stack_guard, boot_stack_end
boot_l4: .skip 4096
boot_l3: .skip 4096
boot_l2: .skip 4 * 4096
// Not mapped by the final tables: running over the end of the stack faults.
boot_stack_guard: .skip 4096
boot_stack: .skip 65536
boot_stack_end:
