// A boot loader with the worst manners that the boot protocol allows: it fills RAM and every EL2 register it may write
// with garbage, leaves interrupts acknowledged that it never ends, and only then starts the image. What is not set by the image itself shows.
//
// The test patches the four words after the header: where the image is, where it ends, where the RAM that is filled ends, and
// where an initial RAM disk begins, which stays as it is.

.macro constant register, value
    movz    \register, #((\value) & 0xffff)
    movk    \register, #(((\value) >> 16) & 0xffff), lsl #16
    movk    \register, #(((\value) >> 32) & 0xffff), lsl #32
    movk    \register, #(((\value) >> 48) & 0xffff), lsl #48
.endm

.macro spoil register
    msr     \register, x9
.endm

.section .head, "ax"
.global start
start:
    b       begin
    nop
    .quad   0
    .quad   0x10000
    .quad   0xa
    .quad   0, 0, 0
    .ascii  "ARM\x64"
    .word   0
image:
    .quad   0
image_end:
    .quad   0
ram_end:
    .quad   0
ram_disk:
    .quad   -1

begin:
    mov     x19, x0
    ldr     x20, image
    ldr     x21, image_end
    ldr     x22, ram_end
    ldr     x23, ram_disk
    constant x9, 0xa5a5a5a55a5a5a5a
    // RAM: below this code, from the image to the tree or the RAM disk before it, and behind the tree.
    adr     x1, start
    and     x0, x1, #~0x3fffffff
    bl      fill
    mov     x0, x21
    cmp     x19, x23
    csel    x1, x19, x23, lo
    bl      fill
    add     x0, x19, #0x200000
    mov     x1, x22
    bl      fill

    // A register that this CPU does not have is passed over.
    adr     x10, vectors
    msr     vbar_el2, x10
    isb
    // Breakpoints and watchpoints everywhere, at EL0, EL1 and EL2.
    .macro debug number
    mov     x10, #0x21e7
    spoil   dbgbvr\number\()_el1
    msr     dbgbcr\number\()_el1, x10
    spoil   dbgwvr\number\()_el1
    constant x10, 0x1f003fff
    msr     dbgwcr\number\()_el1, x10
    .endm
    .irp    number, 0, 1, 2, 3, 4, 5
    debug   \number
    .endr
    spoil   mdscr_el1
    mov     x10, #1
    msr     oslar_el1, x10
    msr     osdlr_el1, x10
    spoil   ttbr0_el2
    spoil   tcr_el2
    spoil   mair_el2
    spoil   amair_el2
    spoil   actlr_el2
    spoil   hacr_el2
    spoil   hstr_el2
    spoil   cptr_el2
    spoil   mdcr_el2
    spoil   vttbr_el2
    spoil   vtcr_el2
    spoil   vpidr_el2
    spoil   vmpidr_el2
    spoil   tpidr_el2
    spoil   far_el2
    spoil   hpfar_el2
    spoil   afsr0_el2
    spoil   afsr1_el2
    spoil   cntvoff_el2
    spoil   cnthctl_el2
    spoil   cnthp_cval_el2
    spoil   sctlr_el1
    spoil   tcr_el1
    spoil   ttbr0_el1
    spoil   ttbr1_el1
    spoil   mair_el1
    spoil   vbar_el1
    spoil   sp_el1
    spoil   elr_el1
    spoil   cntv_cval_el0
    spoil   s3_4_c1_c2_2                // HCRX_EL2
    spoil   s3_4_c1_c1_4                // HFGRTR_EL2
    spoil   s3_4_c1_c1_5                // HFGWTR_EL2
    spoil   s3_4_c1_c1_6                // HFGITR_EL2
    spoil   s3_4_c3_c1_4                // HDFGRTR_EL2
    spoil   s3_4_c3_c1_5                // HDFGWTR_EL2
    spoil   s3_4_c3_c1_2                // HFGRTR2_EL2
    spoil   s3_4_c3_c1_3                // HFGWTR2_EL2
    spoil   s3_4_c3_c1_7                // HFGITR2_EL2
    spoil   s3_4_c3_c1_0                // HDFGRTR2_EL2
    spoil   s3_4_c3_c1_1                // HDFGWTR2_EL2
    spoil   s3_4_c3_c1_6                // HAFGRTR_EL2
    spoil   s3_4_c9_c9_0                // PMSCR_EL2
    spoil   s3_4_c1_c2_1                // TRFCR_EL2
    spoil   s3_4_c10_c5_0               // MPAM2_EL2
    spoil   s3_4_c10_c4_0               // MPAMHCR_EL2
    spoil   s3_4_c5_c2_3                // VSESR_EL2
    spoil   s3_4_c12_c1_1               // VDISR_EL2
    spoil   mdscr_el1
    spoil   s3_4_c2_c0_3                // TCR2_EL2
    spoil   s3_4_c1_c0_3                // SCTLR2_EL2
    spoil   s3_4_c12_c11_7              // ICH_VMCR_EL2
    spoil   s3_4_c12_c12_0              // ICH_LR0_EL2
    spoil   s3_4_c12_c12_1              // ICH_LR1_EL2
    spoil   s3_4_c12_c12_2              // ICH_LR2_EL2
    spoil   s3_4_c12_c12_3              // ICH_LR3_EL2
    spoil   s3_4_c12_c8_0               // ICH_AP0R0_EL2
    spoil   s3_4_c12_c9_0               // ICH_AP1R0_EL2
    mov     x10, #3
    msr     s3_4_c12_c11_0, x10         // ICH_HCR_EL2: on, with a maintenance interrupt
    // Interrupts that were acknowledged and never ended, of either group, and whose end is one step.
    mov     x10, #0xf
    msr     s3_4_c12_c9_5, x10          // ICC_SRE_EL2
    spoil   s3_0_c12_c8_4               // ICC_AP0R0_EL1
    spoil   s3_0_c12_c9_0               // ICC_AP1R0_EL1
    spoil   s3_0_c12_c8_3               // ICC_BPR0_EL1
    spoil   s3_0_c12_c12_3              // ICC_BPR1_EL1
    msr     s3_0_c12_c12_4, xzr         // ICC_CTLR_EL1
    msr     s3_0_c4_c6_0, xzr           // ICC_PMR_EL1
    mov     x10, #1
    msr     s3_0_c12_c12_6, x10         // ICC_IGRPEN0_EL1
    msr     s3_0_c12_c12_7, x10         // ICC_IGRPEN1_EL1
    spoil   s3_4_c12_c9_5               // ICC_SRE_EL2
    // The same at the registers of virt's GICv2; with GICv3 there are none. Shared interrupts are pending and active with both.
    constant x10, 0x08010000            // GICC
    .irp    apr, 0xd0, 0xd4, 0xd8, 0xdc, 0xe0, 0xe4, 0xe8, 0xec
    str     w9, [x10, #\apr]
    .endr
    constant x10, 0x08000000            // GICD
    mov     w12, #-1
    .irp    word, 4, 8, 12, 16
    str     w12, [x10, #0x200 + \word]  // GICD_ISPENDR
    str     w12, [x10, #0x300 + \word]  // GICD_ISACTIVER
    .endr
    mov     x10, #1
    msr     cnthp_ctl_el2, x10          // every timer rings
    msr     cntv_ctl_el0, x10
    msr     cntp_ctl_el0, x10
    // MMU off and little-endian, as the protocol demands; everything else at random.
    constant x10, 0x02000001
    bic     x10, x9, x10
    msr     sctlr_el2, x10
    isb
    // E2H and TGE with it.
    orr     x10, x9, #0x400000000
    orr     x10, x10, #0x8000000
    msr     hcr_el2, x10
    isb
    spoil   vbar_el2
    spoil   elr_el2
    spoil   esr_el2
    spoil   spsr_el2
    mov     x0, x19
    mov     sp, x9
    mov     x1, x9
    mov     x2, x9
    mov     x3, x9
    mov     x29, x9
    mov     x30, x9
    // From here on calls and returns go by a guarded stack that there is not, and no exception comes back.
    mrs     x10, id_aa64pfr1_el1
    tst     x10, #(0xf << 44)           // GCS
    b.eq    2f
    orr     x10, x9, #1
    msr     s3_4_c2_c5_0, x10           // GCSCR_EL2
    isb
2:  br      x20

// Fills [x0, x1) with x9.
fill:
    cmp     x0, x1
    b.hs    1f
    stp     x9, x9, [x0], #16
    b       fill
1:  ret

// Goes on behind the instruction that was undefined.
.macro pass_over
    .balign 0x80
    mrs     x11, elr_el2
    add     x11, x11, #4
    msr     elr_el2, x11
    eret
.endm

.balign 0x800
vectors:
    pass_over                           // on SP_EL0, synchronous
    .balign 0x200
    pass_over                           // on SP_EL2, synchronous
