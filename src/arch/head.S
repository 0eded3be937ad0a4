// The first page of the image: a Linux Image header that is a PE/COFF header, too; and the way in from UEFI.
//
// Boot loaders that know Linux jump to the first byte; UEFI loads the two sections wherever it likes and calls
// `uefi_entry`, at EL2, on its own stack and map, MMU and caches on. There is no .reloc section: the image relocates
// itself. Its code is never written under that map, so firmware may enforce both sections' permissions.

.section .head, "ax"
.global image_head
image_head:
    .inst   0xfa405a4d                  // "MZ", which is ccmp x18, #0, #0xd, pl: it changes flags only
    b       boot_cpu_entry
    .quad   0                           // text_offset: any 2 MiB boundary
    .quad   image_bytes                 // image_size: what must stay free, BSS and stacks included
    .quad   0xa                         // flags: little-endian, 4 KiB pages, anywhere in memory
    .quad   0, 0, 0
    .ascii  "ARM\x64"
    .word   pe_header - image_head

pe_header:
    .ascii  "PE\0\0"
    .short  0xaa64                      // machine: arm64
    .short  2                           // sections
    .word   0, 0, 0                     // no time stamp, no symbols
    .short  pe_sections - pe_optional
    .short  0x0206                      // executable, no line numbers, no debug information
pe_optional:
    .short  0x020b                      // PE32+
    .byte   0, 0                        // linker version
    .word   image_pe_code_bytes
    .word   image_pe_data_bytes
    .word   0                           // no uninitialized data: the file has it
    .word   image_uefi_entry
    .word   image_pe_code
    .quad   0                           // preferred base: none
    .word   0x1000                      // section alignment
    .word   0x1000                      // file alignment
    .short  0, 0, 0, 0, 0, 0            // versions
    .word   0
    .word   image_pe_bytes
    .word   0x1000                      // bytes of headers
    .word   0                           // no checksum
    .short  10                          // subsystem: EFI application
    .short  0x0100                      // NX_COMPAT: code is not written, data not executed
    .quad   0, 0, 0, 0                  // stack and heap sizes, which UEFI ignores
    .word   0
    .word   (pe_sections - pe_directories) / 8
pe_directories:
    .quad   0, 0, 0, 0, 0, 0
pe_sections:
    .ascii  ".text\0\0\0"
    .word   image_pe_code_bytes, image_pe_code, image_pe_code_bytes, image_pe_code
    .word   0, 0, 0
    .word   0x60000020                  // code, read, execute
    .ascii  ".data\0\0\0"
    .word   image_pe_data_bytes, image_pe_data, image_pe_data_bytes, image_pe_data
    .word   0, 0, 0
    .word   0xc0000040                  // data, read, write

.section .text.boot, "ax"

// x0 = image handle, x1 = system table. Returns a status if there is nothing to be done here.
.global uefi_entry
uefi_entry:
    stp     x29, x30, [sp, #-48]!
    mov     x29, sp
    stp     x0, x1, [sp, #16]
    bl      relocate
    ldp     x0, x1, [sp, #16]
    mrs     x2, CurrentEL
    cmp     x2, #{CURRENT_EL2}
    b.ne    1f
    mrs     x9, tpidr_el2
    str     x9, [sp, #32]
    address x9, boot_cpu_block
    msr     tpidr_el2, x9
1:  bl      uefi_main
    mrs     x2, CurrentEL
    cmp     x2, #{CURRENT_EL2}
    b.ne    2f
    ldr     x9, [sp, #32]
    msr     tpidr_el2, x9
2:  ldp     x29, x30, [sp], #48
    ret

// Jumps to x0 as a boot loader would, with x1 in x0: MMU and caches off. Both the code here and what x0 and x1 name have
// been cleaned to the point of coherency.
.global leave_firmware
leave_firmware:
    msr     daifset, #0xf
    mrs     x9, sctlr_el2
    constant x10, {SCTLR_MMU_AND_CACHES}
    bic     x9, x9, x10
    msr     sctlr_el2, x9
    isb
    ic      iallu
    tlbi    alle2
    dsb     nsh
    isb
    mov     x9, x0
    mov     x0, x1
    mov     x1, xzr
    mov     x2, xzr
    mov     x3, xzr
    br      x9
