// Entry of every CPU, up to its first line of Rust.
//
// The state at entry is that of the Linux boot protocol: MMU off, data cache off or clean for the image, x0 = device
// tree (boot CPU) or what PSCI was given (the others). EL2 system registers are UNKNOWN. No Rust runs before the MMU
// and caches are on: without them atomics and unaligned accesses need not work.
//
// What is written while caches are off goes past them, so it is invalidated from them before they come on.

.macro address register, symbol
    adrp    \register, \symbol
    add     \register, \register, :lo12:\symbol
.endm

.macro constant register, value
    movz    \register, #((\value) & 0xffff)
    movk    \register, #(((\value) >> 16) & 0xffff), lsl #16
    movk    \register, #(((\value) >> 32) & 0xffff), lsl #32
    movk    \register, #(((\value) >> 48) & 0xffff), lsl #48
.endm

// Has no call or return checked against a guarded stack: GCSCR_EL2 is UNKNOWN. Before the first of them. Clobbers x9.
.macro drop_guarded_stack
    mrs     x9, CurrentEL
    cmp     x9, #{CURRENT_EL2}
    b.ne    9f
    mrs     x9, id_aa64pfr1_el1
    tst     x9, #(0xf << 44)            // GCS
    b.eq    9f
    msr     s3_4_c2_c5_0, xzr           // GCSCR_EL2
    isb
9:
.endm

.section .text.boot, "ax"

boot_cpu_entry:
    msr     daifset, #0xf
    drop_guarded_stack
    mov     x19, x0                     // device tree
    bl      check_device_tree
    bl      judge_level
    mov     x21, x0                     // why this is no place for a hypervisor, or 0
    bl      zero_bss
    bl      relocate
    bl      map_boot_memory
    address x22, boot_cpu_block
    address x9, boot_emergency_stack_top
    str     x9, [x22, #{EMERGENCY_STACK_TOP}]
    bl      invalidate_image
    cbnz    x21, refuse
    bl      enter_el2
    msr     tpidr_el2, x22
    address x0, early_tables
    bl      enable_mmu
    address x9, boot_stack_top
    mov     sp, x9
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x19
    bl      boot_cpu_main
    b       park

// A CPU from a spin table is given nothing: it finds its Launch record by its affinity, or parks.
.global spin_table_entry
spin_table_entry:
    msr     daifset, #0xf
    mrs     x1, mpidr_el1
    constant x2, {AFFINITY}
    and     x1, x1, x2
    address x2, first_launch
    ldr     x0, [x2]
1:  cbz     x0, park
    ldr     x2, [x0, #{LAUNCH_AFFINITY}]
    cmp     x1, x2
    b.eq    other_cpu_entry
    ldr     x0, [x0, #{LAUNCH_NEXT}]
    b       1b

// x0 = physical address of a Launch record, cleaned to the point of coherency by the boot CPU.
.global other_cpu_entry
other_cpu_entry:
    msr     daifset, #0xf
    drop_guarded_stack
    mov     x19, x0
    bl      judge_level
    cbnz    x0, park                    // the boot CPU reports that this one did not come up
    bl      enter_el2
    ldr     x0, [x19, #{LAUNCH_TABLES}]
    bl      enable_mmu
    ldp     x9, x10, [x19, #{LAUNCH_STACK_TOP}]
    mov     sp, x9
    msr     tpidr_el2, x10
    mov     x29, xzr
    mov     x30, xzr
    ldr     x0, [x19, #{LAUNCH_ARGUMENT}]
    bl      other_cpu_main
    b       park

// Runs just enough Rust to say why not. EL1's registers control this level's translation: it is EL1, or EL2 with E2H,
// whose accesses to them are redirected.
refuse:
    constant x9, {MAIR}
    msr     mair_el1, x9
    mrs     x10, id_aa64mmfr0_el1
    constant x9, {TCR_EL1}
    bfi     x9, x10, #32, #3            // IPS = PARange
    msr     tcr_el1, x9
    address x9, early_tables
    msr     ttbr0_el1, x9
    isb
    cmp     x21, #{REFUSED_E2H}
    b.eq    1f
    tlbi    vmalle1
    b       2f
1:  tlbi    alle2
2:  ic      iallu
    dsb     nsh
    isb
    constant x9, {SCTLR_EL1_ON}
    msr     sctlr_el1, x9
    isb
    address x9, boot_stack_top
    mov     sp, x9
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x19
    mov     x1, x21
    bl      refuse_to_boot
park:
    wfi
    b       park

// x0 = why EL2 cannot be used as this hypervisor uses it, or 0. Clears E2H. Clobbers x9.
judge_level:
    mrs     x9, CurrentEL
    cmp     x9, #{CURRENT_EL2}
    mov     x0, #{REFUSED_EL1}
    b.ne    1f
    constant x9, {HCR_RESET}
    msr     hcr_el2, x9
    isb
    mrs     x9, hcr_el2
    ubfx    x9, x9, #34, #1             // E2H stays set where ID_AA64MMFR4_EL1.E2H0 says so
    mov     x0, #{REFUSED_E2H}
    mul     x0, x0, x9
1:  ret

// A tree that is absent, misaligned, no tree, or inside the image cannot be reported: nothing says where a UART is.
// x19 = tree; x20 = its bytes. Clobbers x9-x11.
check_device_tree:
    cbz     x19, park
    tst     x19, #7
    b.ne    park
    ldr     w9, [x19]
    rev     w9, w9
    constant x10, 0xd00dfeed
    cmp     x9, x10
    b.ne    park
    ldr     w20, [x19, #4]
    rev     w20, w20
    address x9, image_start
    address x10, image_end
    add     x11, x19, x20
    cmp     x19, x10
    b.hs    1f
    cmp     x11, x9
    b.hi    park
1:  ret

zero_bss:
    address x9, image_bss_start
    address x10, image_bss_end
1:  cmp     x9, x10
    b.hs    2f
    stp     xzr, xzr, [x9], #16
    b       1b
2:  ret

// Applies R_AARCH64_RELATIVE, the only relocation the link may leave (the image builder refuses others).
relocate:
    address x9, image_start
    address x10, image_rela_start
    address x11, image_rela_end
1:  cmp     x10, x11
    b.hs    3f
    ldp     x12, x13, [x10], #16        // where, kind
    ldr     x14, [x10], #8              // addend
    cmp     x13, #{R_AARCH64_RELATIVE}
    b.ne    park
    add     x14, x14, x9
    str     x14, [x12, x9]
    b       1b
3:  ret

// Identity-maps the image, executable and writable until the final map replaces this one, and the tree, read-only.
map_boot_memory:
    mov     x28, x30
    constant x1, {BLOCK_IMAGE}
    constant x10, {BLOCK_IMAGE_EL1}
    cmp     x21, #0
    csel    x1, x1, x10, eq
    address x0, image_start
    address x7, image_end
    bl      map_blocks
    constant x1, {BLOCK_TREE}
    mov     x0, x19
    add     x7, x19, x20
    bl      map_blocks
    br      x28

// Maps [x0, x7) by blocks with attributes x1. Clobbers x0, x2-x6, x8, x27.
map_blocks:
    mov     x27, x30
    lsr     x8, x0, #21
    lsl     x8, x8, #21
1:  mov     x0, x8
    bl      map_early_block
    cbnz    x0, park
    add     x8, x8, #0x200000
    cmp     x8, x7
    b.lo    1b
    br      x27

// Maps the 2 MiB block that holds x0 with attributes x1, unless it is mapped. x0 = 0: done; 1: out of tables.
// Callable from Rust: clobbers x0, x2-x6 only.
.global map_early_block
map_early_block:
    address x2, early_tables
    mov     x3, #39
1:  lsr     x4, x0, x3
    and     x4, x4, #511
    add     x4, x2, x4, lsl #3          // slot
    ldr     x5, [x4]
    cmp     x3, #21
    b.eq    3f
    cbnz    x5, 2f
    address x6, early_tables_used
    ldr     x5, [x6]
    cmp     x5, #{EARLY_TABLES}
    b.hs    5f
    add     x5, x5, #1
    str     x5, [x6]
    address x6, early_tables
    add     x5, x6, x5, lsl #12
    orr     x5, x5, #3                  // table descriptor
    dsb     ishst                       // the table's zeros before its address
    str     x5, [x4]
2:  and     x2, x5, #0x0000fffffffff000
    sub     x3, x3, #9
    b       1b
3:  cbnz    x5, 4f
    lsr     x5, x0, #21
    lsl     x5, x5, #21
    orr     x5, x5, x1
    str     x5, [x4]
4:  dsb     ishst
    isb
    mov     x0, #0
    ret
5:  mov     x0, #1
    ret

// Drops what caches hold of the memory written above; memory has the truth.
invalidate_image:
    mrs     x9, ctr_el0
    ubfx    x9, x9, #16, #4
    mov     x10, #4
    lsl     x9, x10, x9                 // bytes in the smallest line
    address x10, image_start
    address x11, image_end
1:  dc      ivac, x10
    add     x10, x10, x9
    cmp     x10, x11
    b.lo    1b
    dsb     sy
    ret

// Gives EL2 a known translation regime: MMU off, vectors set (those of a CPU that mitigates nothing). Rust writes the remaining registers.
enter_el2:
    constant x9, {SCTLR_OFF}
    msr     sctlr_el2, x9
    isb
    mrs     x9, s3_0_c0_c7_3            // ID_AA64MMFR3_EL1
    tst     x9, #0xf                    // TCRX
    b.eq    1f
    msr     s3_4_c2_c0_3, xzr           // TCR2_EL2
1:  tst     x9, #0xf0                   // SCTLRX
    b.eq    2f
    msr     s3_4_c1_c0_3, xzr           // SCTLR2_EL2
2:  address x9, vectors_nothing
    msr     vbar_el2, x9
    isb
    ret

// x0 = TTBR0_EL2.
enable_mmu:
    constant x9, {MAIR}
    msr     mair_el2, x9
    mrs     x10, id_aa64mmfr0_el1
    and     x10, x10, #0xf
    cmp     x10, #5                     // this format addresses 48 bits
    mov     x11, #5
    csel    x10, x10, x11, ls
    constant x9, {TCR_EL2}
    bfi     x9, x10, #16, #3            // PS
    msr     tcr_el2, x9
    msr     ttbr0_el2, x0
    isb
    tlbi    alle2
    ic      iallu
    dsb     nsh
    isb
    constant x9, {SCTLR_ON}
    msr     sctlr_el2, x9
    isb
    ret

// x0 = new TTBR0_EL2, x1 = SCTLR_EL2 under it. Blocks become pages here, so the MMU is off in between; no memory is
// accessed then, and the code is the same at the same address in both maps.
.global switch_tables
switch_tables:
    mrs     x2, sctlr_el2
    bic     x2, x2, #1
    dsb     ish
    msr     sctlr_el2, x2
    isb
    msr     ttbr0_el2, x0
    isb
    tlbi    alle2
    dsb     nsh
    isb
    msr     sctlr_el2, x1
    isb
    ret

.section .bss.boot, "aw", %nobits
.balign 4096
early_tables:
    .skip   4096 * ({EARLY_TABLES} + 1)
.global boot_stack_guard, boot_stack_top, boot_emergency_stack_guard, boot_emergency_stack_top
boot_stack_guard:
    .skip   4096
    .skip   {BOOT_STACK}
boot_stack_top:
boot_emergency_stack_guard:
    .skip   4096
    .skip   {EMERGENCY_STACK}
boot_emergency_stack_top:
boot_cpu_block:
    .skip   4096
early_tables_used:
    .skip   8
.balign 64
.global first_launch
first_launch:
    .skip   64
