// The EL2 vectors, entry into a guest and the way back.
//
// While a guest runs, SP_EL2 is the address of its frame (arch::context::Frame), so the first store needs no scratch
// register; the stack of the code that entered the guest is found in the frame. Three paths, from short to long:
//
//   null hypercall      two registers, no Rust
//   abort, trapped      x0-x18 and x30 are saved, a Rust function decides (vm/short.rs); x19-x29 stay where they are,
//   register, interrupt because Rust preserves them; ELR, SPSR, ESR, FAR and HPFAR stay in their registers
//   everything else,    x19-x29, ELR, SPSR, ESR, FAR and HPFAR are saved, too, and guest_enter() returns to its caller
//   and what those leave
//
// No path switches a system register. D, A, I and F are masked from the vector to ERET. An SError that is pending then is taken
// from the guest as soon as ERET is back in it, which EL1 cannot mask (HCR_EL2.AMO); short paths need do nothing for that. The
// others may be the last of the guest on this CPU: ESB defers it to DISR_EL1 where there is FEAT_RAS, and is a NOP elsewhere.

// --------------------------------------------------------------------------------------------------------------------
// Exceptions from EL2 itself are fatal. The stack may be what failed, so nothing is pushed before the CPU's emergency
// stack is in use. CNTHP_CVAL_EL2 lends its storage: the machine is dying and its timer with it; no guest register is
// touched.

.macro from_el2 number
.balign 128
    msr     cnthp_cval_el2, x0
    mrs     x0, tpidr_el2
    ldr     x0, [x0, #{EMERGENCY_STACK_TOP}]
    sub     x0, x0, #{FATAL_BYTES}
    stp     x1, x2, [x0, #8]
    mov     x1, sp
    str     x1, [x0, #248]
    mov     sp, x0
    mrs     x2, cnthp_cval_el2
    str     x2, [x0]
    mov     x1, #\number
    b       fatal
.endm

// --------------------------------------------------------------------------------------------------------------------
// Exceptions from a guest. What stands between the first stores and the rest is done against branch predictors that the
// guest has trained (arch/mitigations.rs), before any indirect branch and any return. There is a table of vectors for each
// way; a CPU's block has the loop's count or the function of firmware that is called. The flags are in SPSR_EL2 by then.

.macro mitigate_nothing
.endm

.macro mitigate_clear
    hint    #22                         // CLRBHB
    isb
.endm

// Branches whose target is the next instruction, because it is taken branches that history is made of.
.macro mitigate_loop
    mrs     x0, tpidr_el2
    ldr     x0, [x0, #{MITIGATION}]
1:  b       2f
2:  subs    x0, x0, #1
    b.ne    1b
    dsb     nsh                         // no speculation past the loop
    isb
.endm

// SMCCC 1.1 preserves everything but x0 to x3.
.macro mitigate_call
    stp     x2, x3, [sp, #16]
    mrs     x0, tpidr_el2
    ldr     w0, [x0, #{MITIGATION}]
    smc     #0
    ldp     x2, x3, [sp, #16]
.endm

.macro enter_from_guest mitigation
.balign 128
    stp     x0, x1, [sp]
    mitigate_\mitigation
.endm

.macro interrupt_from_guest mitigation
    enter_from_guest \mitigation
    b       interrupt
.endm

.macro exit_from_guest mitigation, exit
    enter_from_guest \mitigation
    mov     x0, #\exit
    b       save_and_leave
.endm

.macro table mitigation
.balign 2048
.global vectors_\mitigation
vectors_\mitigation:
    from_el2 0
    from_el2 1
    from_el2 2
    from_el2 3
    from_el2 4
    from_el2 5
    from_el2 6
    from_el2 7
    enter_from_guest \mitigation        // synchronous
    mrs     x0, esr_el2
    ubfx    x1, x0, #{ESR_EC_SHIFT}, #6
    cmp     x1, #{EC_HVC}
    b.ne    trap
    tst     x0, #0xffff                 // HVC #0 only
    b.eq    hypercall
    b       trap
    interrupt_from_guest \mitigation    // IRQ
    interrupt_from_guest \mitigation    // FIQ
    exit_from_guest \mitigation, {EXIT_SERROR}
    exit_from_guest \mitigation, {EXIT_AARCH32}
    exit_from_guest \mitigation, {EXIT_AARCH32}
    exit_from_guest \mitigation, {EXIT_AARCH32}
    exit_from_guest \mitigation, {EXIT_AARCH32}
.balign 128
.endm

.section .text.vectors, "ax"
    table nothing
    table clear
    table loop
    table call

// x0 = ESR_EL2; x0 and x1 are in the frame.
hypercall:
    ldr     w1, [sp]
    mov     w0, #{NULL_CALL_HIGH} << 16
    cmp     w1, w0
    b.ne    1f
    mrs     x1, tpidr_el2
    ldr     x0, [x1, #{EXITS}]
    add     x0, x0, #1
    str     x0, [x1, #{EXITS}]
    ldr     x1, [sp, #8]
    mov     x0, xzr                     // SMCCC SUCCESS
    eret
    dsb     nsh                         // no speculation past ERET
    isb
1:  mov     x0, #{EXIT_SYNC}
    b       save_and_leave

.macro save_caller_saved
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    str     x18, [sp, #144]
    str     x30, [sp, #240]
.endm

.macro save_kept
    stp     x19, x20, [sp, #152]
    stp     x21, x22, [sp, #168]
    stp     x23, x24, [sp, #184]
    stp     x25, x26, [sp, #200]
    stp     x27, x28, [sp, #216]
    str     x29, [sp, #232]
.endm

// Calls Rust with the frame's address in x0; sp = frame before and after. x0 and x1: the verdict.
.macro ask function
    mov     x0, sp
    ldr     x9, [sp, #{HOST_STACK}]
    mov     sp, x9
    bl      \function
    ldr     x9, [sp, #{CALLEE_SAVED_BYTES}]
    mov     sp, x9
.endm

// x0 and x1 are in the frame.
interrupt:
    save_caller_saved
    ask     guest_interrupt
    cbz     x0, resume
    b       leave

// x0 = ESR_EL2; x0 and x1 are in the frame.
trap:
    save_caller_saved
    mov     x1, x0
    mov     x2, xzr                     // x19-x29 are not in the frame
    ubfx    x3, x0, #{ESR_EC_SHIFT}, #6
    and     x4, x3, #~({EC_DATA_ABORT} ^ {EC_INSTRUCTION_ABORT})
    cmp     x4, #{EC_INSTRUCTION_ABORT}
    b.ne    1f
    ubfx    x3, x0, #{FAULT_KIND_SHIFT}, #4
    cmp     x3, #{TRANSLATION_FAULT}
    b.eq    2f
    ask     guest_abort
    cbnz    x0, not_resumed
    b       resume
1:  cmp     x3, #{EC_SYSTEM_REGISTER}
    mov     x0, #{EXIT_SYNC}
    b.ne    leave
    ask     guest_register
    cbnz    x0, not_resumed
    b       resume
2:  ask     guest_translation
    cbnz    x0, not_resumed

// sp = frame; everything but x0-x18 and x30 is the guest's already.
resume:
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldr     x18, [sp, #144]
    ldr     x30, [sp, #240]
    ldp     x0, x1, [sp]
    sevl                                // what ERET is anyway, but not under QEMU 11.1; see below
    eret
    dsb     nsh                         // no speculation past ERET
    isb

// An exception between a guest's exclusive load and its WFE disarms the monitor, so that no store to the lock would end the
// wait. Returning from the exception sets the event register instead (DDI 0487, Wait for Event), and the WFE does not wait.
// QEMU 11.1 does not set it: there a vCPU in an interrupt handler that waited for a lock slept for ever. A hypercall cannot
// stand between the two for any reason, so its path leaves the event to ERET.

not_resumed:
    tbnz    x0, #{VERDICT_LOAD_BIT}, load
    tbz     x0, #{VERDICT_SAVE_BIT}, leave
    save_kept
    mrs     x1, esr_el2
    mov     x2, #1                      // x19-x29 are in the frame
    ubfx    x3, x1, #{ESR_EC_SHIFT}, #6
    cmp     x3, #{EC_SYSTEM_REGISTER}
    b.eq    1f
    ask     guest_translation
    cbz     x0, resume
    b       leave
1:  ask     guest_register
    cbz     x0, resume
    b       leave

// x0 = a bit and the number of a register from x19 to x29, which is to hold x1.
load:
    adr     x2, 1f
    sub     x0, x0, #(1 << {VERDICT_LOAD_BIT}) + {FIRST_KEPT}
    add     x2, x2, x0, lsl #3
    br      x2
.macro loaded registers:vararg
.irp register, \registers
    mov     \register, x1
    b       resume
.endr
.endm
1:  loaded  x19, x20, x21, x22, x23, x24, x25, x26, x27, x28, x29

// x0 = exit number; x0 and x1 are in the frame.
save_and_leave:
    save_caller_saved
leave:
    hint    #16                         // ESB
    save_kept
    mrs     x1, elr_el2
    mrs     x2, spsr_el2
    stp     x1, x2, [sp, #{PC}]
    mrs     x1, esr_el2
    mrs     x2, far_el2
    mrs     x3, hpfar_el2
    stp     x1, x2, [sp, #{ESR}]
    str     x3, [sp, #{ESR} + 16]
    ldr     x9, [sp, #{HOST_STACK}]
    mov     sp, x9
    ldp     x19, x20, [sp, #0]
    ldp     x21, x22, [sp, #16]
    ldp     x23, x24, [sp, #32]
    ldp     x25, x26, [sp, #48]
    ldp     x27, x28, [sp, #64]
    ldp     x29, x30, [sp, #80]
    add     sp, sp, #{CALLEE_SAVED_BYTES} + 16
    ret

// x0 = frame. Runs the guest; returns the exit number in x0.
.global guest_enter
guest_enter:
    sub     sp, sp, #{CALLEE_SAVED_BYTES} + 16
    stp     x19, x20, [sp, #0]
    stp     x21, x22, [sp, #16]
    stp     x23, x24, [sp, #32]
    stp     x25, x26, [sp, #48]
    stp     x27, x28, [sp, #64]
    stp     x29, x30, [sp, #80]
    str     x0, [sp, #{CALLEE_SAVED_BYTES}]
    mov     x9, sp
    str     x9, [x0, #{HOST_STACK}]
    mov     sp, x0
    ldp     x1, x2, [sp, #{PC}]
    msr     elr_el2, x1
    msr     spsr_el2, x2
    ldp     x19, x20, [sp, #152]
    ldp     x21, x22, [sp, #168]
    ldp     x23, x24, [sp, #184]
    ldp     x25, x26, [sp, #200]
    ldp     x27, x28, [sp, #216]
    ldr     x29, [sp, #232]
    b       resume

// x0 = sp = frame of the dead, x1 = vector; x0-x2 and the old stack pointer are in it.
fatal:
    stp     x3, x4, [sp, #24]
    stp     x5, x6, [sp, #40]
    stp     x7, x8, [sp, #56]
    stp     x9, x10, [sp, #72]
    stp     x11, x12, [sp, #88]
    stp     x13, x14, [sp, #104]
    stp     x15, x16, [sp, #120]
    stp     x17, x18, [sp, #136]
    stp     x19, x20, [sp, #152]
    stp     x21, x22, [sp, #168]
    stp     x23, x24, [sp, #184]
    stp     x25, x26, [sp, #200]
    stp     x27, x28, [sp, #216]
    stp     x29, x30, [sp, #232]
    mov     x29, xzr
    bl      fatal_exception
1:  wfi
    b       1b
