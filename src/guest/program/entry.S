// The guest's first instructions and its vectors.

.section .text.entry, "ax"

// vCPU 0: MMU off, x0 the parameters' address, which is fixed anyway. Builds the tables that all vCPUs use.
.global guest_entry
guest_entry:
    ldr     x1, ={tables}
    add     x2, x1, #0x1000             // level 2, for the GiB with RAM's start
    ldr     x3, ={device_block}
    str     x3, [x1]                    // 0 to 1 GiB: devices
    orr     x3, x2, #3
    str     x3, [x1, #8]                // 1 to 2 GiB: the level-2 table
    ldr     x3, ={data_block}
    mov     x4, #0x80000000
    mov     x5, #2
    mov     x6, #0x40000000
1:  orr     x7, x3, x4                  // 2 GiB and up: data
    str     x7, [x1, x5, lsl #3]
    add     x4, x4, x6
    add     x5, x5, #1
    cmp     x5, #512
    b.ne    1b
    ldr     x7, ={code_block}
    orr     x7, x7, x6
    str     x7, [x2]                    // the image's 2 MiB: read and execute
    mov     x5, #1
2:  add     x6, x6, #0x200000           // the rest: read and write
    orr     x7, x3, x6
    str     x7, [x2, x5, lsl #3]
    add     x5, x5, #1
    cmp     x5, #512
    b.ne    2b
    orr     x7, x7, #{user}             // the last 2 MiB, where no memory is, are EL0's to reach for
    str     x7, [x2, #4088]
    dsb     ish
    mov     x0, #0

// Every other vCPU comes here by PSCI CPU_ON: x0 its position.
.global guest_secondary
guest_secondary:
    ldr     x1, ={areas}
    add     x2, x0, #1
    lsl     x2, x2, #{area_shift}
    add     x1, x1, x2
    mov     sp, x1                      // the stack grows down from the area's end
    ldr     x1, ={tables}
    msr     ttbr0_el1, x1
    ldr     x1, ={mair}
    msr     mair_el1, x1
    ldr     x1, ={tcr}
    msr     tcr_el1, x1
    adr     x1, guest_vectors
    msr     vbar_el1, x1
    ldr     x1, ={vectors_on}
    msr     cpacr_el1, x1
    isb
    tlbi    vmalle1
    dsb     nsh
    isb
    ldr     x1, ={sctlr}
    msr     sctlr_el1, x1
    isb
    b       guest_main

.macro enter
    sub     sp, sp, #176
    stp     x0, x1, [sp, #0]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x29, [sp, #144]
    str     x30, [sp, #160]
.endm

.macro leave
    ldp     x0, x1, [sp, #0]
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldp     x18, x29, [sp, #144]
    ldr     x30, [sp, #160]
    add     sp, sp, #176
    eret
.endm

.macro unexpected
    .balign 128
    mrs     x0, esr_el1
    mrs     x1, elr_el1
    b       guest_fail
.endm

.balign 2048
guest_vectors:
    unexpected                          // current EL with SP_EL0: not used
    unexpected
    unexpected
    unexpected
    .balign 128
    b       on_sync
    .balign 128
    b       on_irq
    unexpected                          // FIQ
    unexpected                          // SError
    .balign 128
    b       on_sync_el0
    unexpected
    unexpected
    unexpected
    unexpected                          // AArch32: not used
    unexpected
    unexpected
    unexpected

on_sync:
    enter
    mrs     x0, esr_el1
    mrs     x1, elr_el1
    mrs     x2, far_el1
    ldr     x3, [sp, #160]
    bl      guest_sync
    msr     elr_el1, x0
    leave

on_irq:
    enter
    bl      guest_irq
    leave

// The only EL0 code is `guest_el0_hvc`, which must take an exception: go on behind `guest_run_el0`'s ERET.
on_sync_el0:
    mrs     x0, esr_el1
    b       guest_el0_done

// Runs one HVC at EL0 and returns the ESR_EL1 of what came of it.
.global guest_run_el0
guest_run_el0:
    stp     x29, x30, [sp, #-16]!
    mrs     x1, elr_el1
    mrs     x2, spsr_el1
    stp     x1, x2, [sp, #-16]!
    adr     x0, guest_el0_hvc
    msr     elr_el1, x0
    mov     x0, #0x3c0                  // EL0t, all masked
    msr     spsr_el1, x0
    isb
    eret
guest_el0_done:
    ldp     x1, x2, [sp], #16
    msr     elr_el1, x1
    msr     spsr_el1, x2
    ldp     x29, x30, [sp], #16
    ret
.balign 8
guest_el0_hvc:
    hvc     #0
    svc     #0

// x0 = an address. Reads it at EL0 in AArch32; whatever comes of that, this does not return.
.global guest_run_aarch32
guest_run_aarch32:
    adr     x1, 1f
    msr     elr_el1, x1
    mov     x1, #0x1d0                  // User mode, A32, all masked
    msr     spsr_el1, x1
    isb
    eret
.balign 8
1:  .inst   0xe5901000                  // ldr r1, [r0]
    .inst   0xef000000                  // svc #0

// x0 = the address of a device's register. Single-steps from `guest_stepped` to the return.
.global guest_step_through
guest_step_through:
    mov     x9, x0
    adr     x1, guest_stepped
    msr     elr_el1, x1
    mov     x1, #0x1c5                  // EL1 with SP_EL1; A, I and F masked, D not
    orr     x1, x1, #(1 << 21)          // SS
    msr     spsr_el1, x1
    isb
    eret
.global guest_stepped
guest_stepped:
    nop
    ldr     w1, [x9]
    mrs     x1, id_aa64pfr0_el1
    movz    w0, #0xc600, lsl #16        // the null hypercall
    hvc     #0
    movz    w0, #0x8400, lsl #16        // PSCI_VERSION
    hvc     #0
    ret                                 // the handler has masked D

// x0 = an address. An instruction to break at, and a load to watch.
.global guest_run_watched
guest_run_watched:
    msr     daifclr, #8
    isb
.global guest_broken
guest_broken:
    nop
    ldr     x1, [x0]
    msr     daifset, #8
    ret
