// What a Raspberry Pi 4's firmware leaves at address 0 when no other is given: every CPU enters it at EL3. One goes on to the
// image; the others wait at EL2 for an entry point on a spin table. SMC is undefined, the counter runs at 54 MHz, and
// all interrupts are in group 1. Written from the published behaviour of that program, not from its text.

.equ GICD, 0xff841000
.equ GICC, 0xff842000
.equ SPIN_TABLE, 0xd8

.section .head, "ax"
.global start
start:
    ldr     x0, =54000000
    msr     cntfrq_el0, x0
    msr     cntvoff_el2, xzr
    msr     cptr_el3, xzr
    mov     x0, #0x5b1                  // SCR_EL3: RW, HCE, SMD, NS
    msr     scr_el3, x0
    ldr     x0, =0x30c50830
    msr     sctlr_el2, x0
    mov     x0, #0x3c9                  // EL2h, all masked
    msr     spsr_el3, x0
    adr     x0, at_el2
    msr     elr_el3, x0
    b       interrupts

    .org    0xf8
tree:
    .word   0
image:
    .word   0

interrupts:
    ldr     x1, =GICC
    mov     w0, #0x1e7
    str     w0, [x1]
    mov     w0, #0xff
    str     w0, [x1, #4]
    ldr     x1, =GICD
    mrs     x2, mpidr_el1
    ands    x2, x2, #3
    b.eq    1f
    mov     w0, #3
    str     w0, [x1]
1:  add     x1, x1, #0x80               // GICD_IGROUPR
    mov     w0, #-1
    mov     x3, #8
2:  str     w0, [x1], #4
    subs    x3, x3, #1
    b.ne    2b
    eret

at_el2:
    cbnz    x2, 3f
    ldr     w0, tree
    ldr     w4, image
    mov     x1, xzr
    mov     x2, xzr
    mov     x3, xzr
    br      x4
3:  mov     x5, #SPIN_TABLE
4:  wfe
    ldr     x4, [x5, x2, lsl #3]
    cbz     x4, 4b
    mov     x0, xzr
    br      x4
