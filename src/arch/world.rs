//! The world switch: entering a guest, moving a vCPU's state on and off a CPU, and what short exits rest on.
//!
//! What is written when:
//!
//! | when | what |
//! |---|---|
//! | once per CPU (`control.rs`) | every EL2 control register, so that none keeps what firmware left; the vectors ([`set_vectors`]) |
//! | a CPU takes a vCPU ([`load`]) | VTCR, VTTBR, VMPIDR, CNTVOFF, VDISR, EL1 state, SIMD state, virtual timer |
//! | a CPU takes a vCPU that debugs, or that changes what it debugs ([`super::set_debug_registers`]) | debug registers |
//! | entry and exit ([`enter`]) | nothing but general registers, ELR and SPSR |
//!
//! SIMD state is moved at every change of vCPU, whether the next one uses it or not. That takes 20 instructions out and 20 in.
//! To leave it until the first use would take a trap at that use instead, the way to EL2 and back (23 for the shortest exit
//! there is, and the loop of `mitigations.rs` where a CPU needs that) beside the same 40, and CPTR_EL2 and a barrier at every change. Guests
//! that use no SIMD register in a whole turn are rare: Linux copies and compares memory in user space by them.
//!
//! References: DDI 0487 issue K.a, D19.2 (registers).

use core::arch::{asm, global_asm};

use aarch64_cpu::registers::{
    CNTHP_CTL_EL2, CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTVOFF_EL2, ELR_EL2, HCR_EL2, ID_AA64PFR0_EL1,
    ReadWriteable, Readable, SCTLR_EL1, SPSR_EL2, VBAR_EL2, VTCR_EL2, Writeable,
};

use super::context::{
    El1, Exit, FRAME_ESR, FRAME_HOST_STACK, FRAME_PC, Frame, INSTRUCTION_BYTES, KEPT, PSTATE_BTYPE,
    PSTATE_SS, Simd, Stage2Geometry, VERDICT_LOAD_BIT, VERDICT_SAVE_BIT,
};
use super::mitigations::AtExit;
use super::{isb, note_register_writes, offsets, set_vttbr, shield_stage1};

/// ESR_EL2.EC is bits 31:26; ISS2 above it is not looked at by the short paths.
const ESR_EC_SHIFT: u32 = 26;
const EC_HVC: u64 = 0x16;
const EC_SYSTEM_REGISTER: u64 = 0x18;
const EC_INSTRUCTION_ABORT: u64 = 0x20;
const EC_DATA_ABORT: u64 = 0x24;
/// DFSC and IFSC without the level.
const FAULT_KIND_SHIFT: u32 = 2;
const TRANSLATION_FAULT: u64 = 0b0001;
/// Upper half of the function identifier of the null hypercall (0xC600_0000); the lower half is zero.
const NULL_CALL_HIGH: u64 = 0xc600;
const CALLEE_SAVED_BYTES: usize = 96;
/// x0 to x30 and the stack pointer.
const FATAL_BYTES: usize = 256;

global_asm!(
    include_str!("vectors.S"),
    EMERGENCY_STACK_TOP = const offsets::EMERGENCY_STACK_TOP,
    EXITS = const offsets::EXITS,
    MITIGATION = const offsets::MITIGATION,
    FATAL_BYTES = const FATAL_BYTES,
    ESR_EC_SHIFT = const ESR_EC_SHIFT,
    EC_HVC = const EC_HVC,
    EC_SYSTEM_REGISTER = const EC_SYSTEM_REGISTER,
    EC_INSTRUCTION_ABORT = const EC_INSTRUCTION_ABORT,
    EC_DATA_ABORT = const EC_DATA_ABORT,
    FAULT_KIND_SHIFT = const FAULT_KIND_SHIFT,
    TRANSLATION_FAULT = const TRANSLATION_FAULT,
    NULL_CALL_HIGH = const NULL_CALL_HIGH,
    CALLEE_SAVED_BYTES = const CALLEE_SAVED_BYTES,
    HOST_STACK = const FRAME_HOST_STACK,
    PC = const FRAME_PC,
    ESR = const FRAME_ESR,
    EXIT_SYNC = const Exit::Sync as u64,
    VERDICT_SAVE_BIT = const VERDICT_SAVE_BIT,
    VERDICT_LOAD_BIT = const VERDICT_LOAD_BIT,
    FIRST_KEPT = const *KEPT.start(),
    EXIT_SERROR = const Exit::SError as u64,
    EXIT_AARCH32 = const Exit::Aarch32 as u64,
);

// SAFETY: `vectors.S` defines them; `guest_enter` follows the C ABI.
unsafe extern "C" {
    static vectors_nothing: u8;
    static vectors_clear: u8;
    static vectors_loop: u8;
    static vectors_call: u8;
    fn guest_enter(frame: *mut Frame) -> u64;
}

/// VBAR_EL2: the vectors that do `at_exit`. Those that loop or call find how often, or what, in `CpuBlock::mitigation`.
///
/// # Safety
///
/// The block of this CPU holds what `at_exit` names, a count that is not zero; what is called has this CPU's firmware behind it.
pub unsafe fn set_vectors(at_exit: AtExit) {
    let table = match at_exit {
        AtExit::Nothing => &raw const vectors_nothing,
        AtExit::ClearHistory => &raw const vectors_clear,
        AtExit::Loop(_) => &raw const vectors_loop,
        AtExit::Call(_) => &raw const vectors_call,
    };
    VBAR_EL2.set(table.expose_provenance() as u64);
    isb();
}

/// Runs the guest whose general registers are in `frame` until something happens that no short path settles.
///
/// # Safety
///
/// The CPU holds the guest's state ([`load`]), and stage 2 confines it. `frame` is the first field of what the short paths
/// (`guest_abort` and its likes) take their argument for, and nobody else uses it meanwhile.
pub unsafe fn enter(frame: *mut Frame) -> Exit {
    // ELR_EL2 and SPSR_EL2.
    note_register_writes(2);
    // SAFETY: the caller vouches for frame and context; the assembly preserves what the C ABI preserves.
    Exit::from_code(unsafe { guest_enter(frame) })
}

/// VTCR_EL2.HA, HD: hardware management of access flags and dirty state.
const VTCR_HA: u64 = 1 << 21;
const VTCR_HD: u64 = 1 << 22;
/// VTCR_EL2.S2PIE.
const VTCR_S2PIE: u64 = 1 << 36;

/// VTCR_EL2 for 4 KiB granules and write-back, inner-shareable walks.
pub fn vtcr(geometry: Stage2Geometry) -> u64 {
    let start = 2_u64.saturating_sub(u64::from(geometry.start_level));
    let mut value = VTCR_EL2::RES1::SET
        + VTCR_EL2::T0SZ.val(u64::from(64_u32.saturating_sub(geometry.ipa_bits)))
        + VTCR_EL2::SL0.val(start)
        + VTCR_EL2::IRGN0::NormalWBRAWA
        + VTCR_EL2::ORGN0::NormalWBRAWA
        + VTCR_EL2::SH0::Inner
        + VTCR_EL2::TG0::Granule4KB
        + VTCR_EL2::PS.val(geometry.pa_range);
    if geometry.wide_vmid {
        value += VTCR_EL2::VS::Bits16;
    }
    let indirection = if geometry.indirection { VTCR_S2PIE } else { 0 };
    let access_flag = if geometry.access_flag { VTCR_HA } else { 0 };
    let dirty_state = if geometry.dirty_state { VTCR_HD } else { 0 };
    value.value | indirection | access_flag | dirty_state
}

macro_rules! move_registers {
    ($($field:ident $name:literal,)*) => {
        fn read_registers(el1: &mut El1) {
            $(
                // SAFETY: reading an EL1 register has no effect.
                unsafe { asm!(concat!("mrs {}, ", $name), out(reg) el1.$field, options(nostack, preserves_flags)) };
            )*
        }

        /// SCTLR_EL1 and TCR_EL1 are the last two of the list, synchronized apart as erratum 1319367 wants.
        fn write_registers(el1: &El1) {
            $(
                note_register_writes(1);
                if matches!($name, "sctlr_el1" | "tcr_el1") {
                    isb();
                }
                // SAFETY: EL1 registers do not affect EL2, and the caller is the CPU's only user of them.
                unsafe { asm!(concat!("msr ", $name, ", {}"), in(reg) el1.$field, options(nostack, preserves_flags)) };
            )*
            isb();
        }
    };
}
for_each_el1_register!(move_registers);

/// Makes the vCPU whose EL1 state is `el1` resident on this CPU: after it [`enter`] may run the guest.
///
/// # Safety
///
/// The CPU holds no vCPU. `vtcr` and `vttbr` describe a stage 2 that stays alive until [`put`] and that confines the
/// guest to what it may reach.
pub unsafe fn load(el1: &El1, vtcr: u64, vttbr: u64) {
    note_register_writes(1);
    VTCR_EL2.set(vtcr);
    set_vttbr(vttbr);
    // SAFETY: as for this function.
    unsafe { reload(el1) };
}

/// Gives the resident vCPU the EL1 state `el1` in place of its own.
///
/// # Safety
///
/// The CPU holds the vCPU that `el1` belongs to.
pub unsafe fn reload(el1: &El1) {
    // CNTV_CTL_EL0 twice, VMPIDR_EL2, CNTVOFF_EL2.
    note_register_writes(4);
    CNTV_CTL_EL0.set(0);
    forget_virtual_error();
    shield_stage1();
    // SAFETY: the register only supplies a value to the guest.
    unsafe {
        asm!("msr vmpidr_el2, {}", in(reg) el1.vmpidr, options(nomem, nostack, preserves_flags))
    };
    CNTVOFF_EL2.set(el1.cntvoff);
    write_simd(&el1.simd);
    if has_keys() {
        write_keys(&el1.keys);
    }
    write_registers(el1);
    CNTV_CTL_EL0.set(el1.cntv_ctl);
    isb();
}

/// Takes the resident vCPU's state off this CPU, which then holds `idle_vttbr` and walks no stage-1 tables.
///
/// # Safety
///
/// The CPU holds the vCPU that `el1` belongs to; `idle_vttbr` translates nothing under a VMID no guest uses.
pub unsafe fn put(el1: &mut El1, idle_vttbr: u64) {
    el1.cntv_ctl = CNTV_CTL_EL0.get();
    CNTV_CTL_EL0.set(0);
    read_registers(el1);
    read_simd(&mut el1.simd);
    if has_keys() {
        el1.keys = read_keys();
    }
    shield_stage1();
    set_vttbr(idle_vttbr);
}

/// Whether guests are given pointer authentication: every CPU has it, then.
fn has_keys() -> bool {
    HCR_EL2.is_set(HCR_EL2::APK)
}

macro_rules! keys {
    ($($index:literal $name:literal)*) => {
        fn read_keys() -> [u64; 10] {
            let mut keys = [0; 10];
            $(
                // SAFETY: reading a key has no effect; the CPU has FEAT_PAuth.
                unsafe { asm!(concat!("mrs {}, ", $name), out(reg) keys[$index], options(nomem, nostack, preserves_flags)) };
            )*
            keys
        }

        fn write_keys(keys: &[u64; 10]) {
            $(
                // SAFETY: EL2 authenticates no pointers; the CPU has FEAT_PAuth.
                unsafe { asm!(concat!("msr ", $name, ", {}"), in(reg) keys[$index], options(nomem, nostack, preserves_flags)) };
            )*
        }
    };
}
keys! {
    0 "s3_0_c2_c1_0" 1 "s3_0_c2_c1_1" 2 "s3_0_c2_c1_2" 3 "s3_0_c2_c1_3" 4 "s3_0_c2_c2_0"
    5 "s3_0_c2_c2_1" 6 "s3_0_c2_c2_2" 7 "s3_0_c2_c2_3" 8 "s3_0_c2_c3_0" 9 "s3_0_c2_c3_1"
}

/// Vector registers are moved through memory, two at a time.
macro_rules! simd {
    ($operation:literal) => {
        concat!(
            $operation,
            " q0, q1, [{base}]\n",
            $operation,
            " q2, q3, [{base}, #32]\n",
            $operation,
            " q4, q5, [{base}, #64]\n",
            $operation,
            " q6, q7, [{base}, #96]\n",
            $operation,
            " q8, q9, [{base}, #128]\n",
            $operation,
            " q10, q11, [{base}, #160]\n",
            $operation,
            " q12, q13, [{base}, #192]\n",
            $operation,
            " q14, q15, [{base}, #224]\n",
            $operation,
            " q16, q17, [{base}, #256]\n",
            $operation,
            " q18, q19, [{base}, #288]\n",
            $operation,
            " q20, q21, [{base}, #320]\n",
            $operation,
            " q22, q23, [{base}, #352]\n",
            $operation,
            " q24, q25, [{base}, #384]\n",
            $operation,
            " q26, q27, [{base}, #416]\n",
            $operation,
            " q28, q29, [{base}, #448]\n",
            $operation,
            " q30, q31, [{base}, #480]\n",
        )
    };
}

fn read_simd(simd: &mut Simd) {
    // SAFETY: stores the whole of v0-v31 into the 512 bytes of the array; EL2 code itself uses no vector register.
    unsafe {
        asm!(".arch_extension fp", ".arch_extension simd", simd!("stp"),
            base = in(reg) simd.v.as_mut_ptr(), options(nostack, preserves_flags))
    };
    // SAFETY: reading the registers has no effect.
    unsafe {
        asm!(".arch_extension fp", "mrs {}, fpsr", "mrs {}, fpcr", out(reg) simd.fpsr, out(reg) simd.fpcr,
            options(nomem, nostack, preserves_flags))
    };
}

fn write_simd(simd: &Simd) {
    // SAFETY: EL2 code itself uses no vector register, so only the guest's change.
    unsafe {
        asm!(".arch_extension fp", ".arch_extension simd", simd!("ldp"),
            base = in(reg) simd.v.as_ptr(), options(nostack, preserves_flags, readonly))
    };
    // SAFETY: EL2 code uses no floating point.
    unsafe {
        asm!(".arch_extension fp", "msr fpsr, {}", "msr fpcr, {}", in(reg) simd.fpsr, in(reg) simd.fpcr,
            options(nomem, nostack, preserves_flags))
    };
}

/// REVIDR_EL1 of this CPU.
pub fn revidr_el1() -> u64 {
    let value: u64;
    // SAFETY: reading an identification register has no effect.
    unsafe {
        asm!("mrs {}, revidr_el1", out(reg) value, options(pure, nomem, nostack, preserves_flags))
    };
    value
}

/// FAR_EL2.
#[inline]
pub fn far_el2() -> u64 {
    aarch64_cpu::registers::FAR_EL2.get()
}

/// HPFAR_EL2.
#[inline]
pub fn hpfar_el2() -> u64 {
    aarch64_cpu::registers::HPFAR_EL2.get()
}

/// Has the guest go on behind the instruction that trapped, as if it had been executed. On short paths only, where ELR_EL2 and
/// SPSR_EL2 are still in their registers. A guest that steps needs [`end_step`] then.
#[inline]
pub fn skip_trapped_instruction() {
    note_register_writes(1);
    ELR_EL2.set(ELR_EL2.get().wrapping_add(INSTRUCTION_BYTES));
    let pstate = SPSR_EL2.get();
    if pstate & PSTATE_BTYPE != 0 {
        note_register_writes(1);
        SPSR_EL2.set(pstate & !PSTATE_BTYPE);
    }
}

/// ELR_EL2: where the guest goes on, on short paths only.
pub fn elr_el2() -> u64 {
    ELR_EL2.get()
}

/// SPSR_EL2.SS: the instruction that the guest stepped over has been done, on short paths only.
pub fn end_step() {
    note_register_writes(1);
    SPSR_EL2.set(SPSR_EL2.get() & !PSTATE_SS);
}

/// SCTLR_EL1 of the resident vCPU.
pub fn sctlr_el1() -> u64 {
    SCTLR_EL1.get()
}

/// VBAR_EL1 of the resident vCPU.
pub fn vbar_el1() -> u64 {
    aarch64_cpu::registers::VBAR_EL1.get()
}

/// Tells the resident vCPU of an exception as hardware would: ELR_EL1, SPSR_EL1, ESR_EL1 and, where given, FAR_EL1.
pub fn set_exception_el1(pc: u64, pstate: u64, esr: u64, far: Option<u64>) {
    note_register_writes(3);
    aarch64_cpu::registers::ELR_EL1.set(pc);
    aarch64_cpu::registers::SPSR_EL1.set(pstate);
    aarch64_cpu::registers::ESR_EL1.set(esr);
    if let Some(far) = far {
        aarch64_cpu::registers::FAR_EL1.set(far);
    }
}

/// CNTV_CTL_EL0 of the resident vCPU: whether its virtual timer asserts its interrupt.
pub fn virtual_timer_asserted() -> bool {
    isb();
    CNTV_CTL_EL0.is_set(CNTV_CTL_EL0::ENABLE)
        && !CNTV_CTL_EL0.is_set(CNTV_CTL_EL0::IMASK)
        && CNTV_CTL_EL0.is_set(CNTV_CTL_EL0::ISTATUS)
}

/// Tick of the physical counter at which the resident vCPU's virtual timer asserts its interrupt, unless it is reprogrammed;
/// `None`: never.
pub fn virtual_timer_deadline() -> Option<u64> {
    isb();
    let runs =
        CNTV_CTL_EL0.is_set(CNTV_CTL_EL0::ENABLE) && !CNTV_CTL_EL0.is_set(CNTV_CTL_EL0::IMASK);
    runs.then(|| CNTV_CVAL_EL0.get().saturating_add(CNTVOFF_EL2.get()))
}

/// CNTHP: has the EL2 timer of this CPU assert its interrupt from tick `deadline` of the physical counter on, or never.
pub fn set_hypervisor_timer(deadline: Option<u64>) {
    note_register_writes(2);
    match deadline {
        Some(deadline) => {
            // SAFETY: the register only says when; the CPU's own interrupt follows.
            unsafe {
                asm!("msr cnthp_cval_el2, {}", in(reg) deadline, options(nomem, nostack, preserves_flags))
            };
            CNTHP_CTL_EL2.write(CNTHP_CTL_EL2::ENABLE::SET);
        }
        None => CNTHP_CTL_EL2.set(0),
    }
    isb();
}

/// HCR_EL2.{TWI,TWE}: whether WFI and WFE of the resident vCPU trap, with their variants.
pub fn trap_waits(trapped: bool) {
    let held = HCR_EL2.is_set(HCR_EL2::TWI);
    note_register_writes(u64::from(held != trapped));
    match (held, trapped) {
        (false, true) => HCR_EL2.modify(HCR_EL2::TWI::SET + HCR_EL2::TWE::SET),
        (true, false) => HCR_EL2.modify(HCR_EL2::TWI::CLEAR + HCR_EL2::TWE::CLEAR),
        _ => return,
    }
    isb();
}

/// ID_AA64PFR0_EL1.RAS.
const ID_AA64PFR0_RAS: u64 = 0xf << 28;

/// Whether this CPU has FEAT_RAS.
fn has_ras() -> bool {
    ID_AA64PFR0_EL1.get() & ID_AA64PFR0_RAS != 0
}

/// VDISR_EL2, where there is one: what a guest reads and writes as DISR_EL1. No guest is promised that it has it; what one left
/// there is not for the next.
fn forget_virtual_error() {
    if has_ras() {
        note_register_writes(1);
        // SAFETY: the CPU has FEAT_RAS; the register concerns guests only.
        unsafe {
            asm!(
                "msr S3_4_C12_C1_1, xzr",
                options(nomem, nostack, preserves_flags)
            )
        };
    }
}

/// ISR_EL1.A: whether an SError waits for a guest that it can be taken from. Stores of the guest have had their answers: the
/// barrier waits for those, and a read without effects may overtake it but for the second (Arm ARM, `DSB`).
pub fn serror_is_pending() -> bool {
    const PENDING: u64 = 1 << 8;
    let pending: u64;
    // SAFETY: barriers, and a register whose reading has no effect.
    unsafe {
        asm!(
            "dsb sy",
            "isb",
            "mrs {}, isr_el1",
            out(reg) pending,
            options(nostack, preserves_flags)
        )
    };
    pending & PENDING != 0
}

/// DISR_EL1, cleared: the syndrome of an SError that `ESB` deferred when the guest was left. `None` without FEAT_RAS.
pub fn take_deferred_serror() -> Option<u64> {
    const DEFERRED: u64 = 1 << 31;
    if !has_ras() {
        return None;
    }
    let syndrome: u64;
    // SAFETY: the CPU has FEAT_RAS; reading has no effect.
    unsafe {
        asm!("mrs {}, S3_0_C12_C1_1", out(reg) syndrome, options(nomem, nostack, preserves_flags))
    };
    if syndrome & DEFERRED == 0 {
        return None;
    }
    // SAFETY: acknowledges the error that is being reported.
    unsafe {
        asm!(
            "msr S3_0_C12_C1_1, xzr",
            options(nomem, nostack, preserves_flags)
        )
    };
    Some(syndrome)
}
