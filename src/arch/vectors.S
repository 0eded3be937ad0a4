// The EL2 vectors: every exception is fatal.
//
// The first push goes to this CPU's emergency stack, because the current one may be what failed.

.macro fatal_vector number
.balign 128
    mrs     x30, tpidr_el2              // the interrupted x30 is lost; ELR_EL2 tells where it was
    b       fatal_\number
.endm

.macro fatal_body number
fatal_\number:
    ldr     x30, [x30, #{EMERGENCY_STACK_TOP}]
    str     x29, [x30, #-16]!
    mov     x29, sp
    sub     sp, x30, #256
    stp     x0, x1, [sp, #0]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    ldr     x0, [x30]
    stp     x28, x0, [sp, #224]
    stp     xzr, x29, [sp, #240]        // x30 is lost, the interrupted stack pointer
    mov     x0, sp
    mov     x1, #\number
    mov     x29, xzr
    bl      fatal_exception
    b       .
.endm

.section .text.vectors, "ax"
.balign 2048
.global vectors
vectors:
.irp number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    fatal_vector \number
.endr
.irp number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    fatal_body \number
.endr
