//! The guest's instructions: the only file of the program with assembly in it.

use core::arch::{asm, global_asm};

use vellum::addr::to_index;
use vellum::guest::abi::{self, status};

const VALID: u64 = 1;
const DEVICE: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
const PRIVILEGED_EXECUTE_NEVER: u64 = 1 << 53;
const EXECUTE_NEVER: u64 = 1 << 54;
const NO_EXECUTE: u64 = PRIVILEGED_EXECUTE_NEVER | EXECUTE_NEVER;
const USER: u64 = 1 << 6;

/// MAIR_EL1: attribute 0 Normal write-back, attribute 1 Device-nGnRE.
const MAIR: u64 = 0xff | 0x04 << 8;
/// TCR_EL1: 39-bit addresses below, none above, 4 KiB granule, cacheable and inner-shareable walks, 40-bit output.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 0b11 << 12 | 1 << 23 | 0b010 << 32;
/// TCR_EL1.EPD1: nothing above.
const UPPER_OFF: u64 = 1 << 23;
/// TCR_EL1: 39-bit addresses above as below.
const UPPER_ON: u64 = 25 << 16 | 1 << 24 | 1 << 26 | 0b11 << 28 | 0b10 << 30;
/// The lowest address above.
pub(crate) const UPPER: u64 = 0xffff_ff80_0000_0000;
/// SCTLR_EL1: MMU, caches, stack alignment, and the bits that are one on a CPU without the features they belong to.
const SCTLR: u64 = 0x30d0_0800 | 1 | 1 << 2 | 1 << 3 | 1 << 12;

global_asm!(
    include_str!("entry.S"),
    tables = const abi::TABLES,
    areas = const abi::AREAS,
    area_shift = const abi::AREA_BYTES.trailing_zeros(),
    device_block = const VALID | DEVICE | ACCESSED | NO_EXECUTE,
    data_block = const VALID | INNER_SHAREABLE | ACCESSED | NO_EXECUTE,
    code_block = const VALID | INNER_SHAREABLE | ACCESSED | READ_ONLY | USER,
    user = const USER,
    mair = const MAIR,
    tcr = const TCR,
    sctlr = const SCTLR,
    // CPACR_EL1.FPEN and ZEN: what is hidden has to be hidden by EL2, not by this guest.
    vectors_on = const 0b11 << 20 | 0b11 << 16,
);

// SAFETY: `entry.S` defines these functions with these arguments.
unsafe extern "C" {
    fn guest_secondary();
    fn guest_run_el0() -> u64;
    fn guest_run_aarch32(address: u64) -> !;
    fn guest_step_through(device: u64);
    fn guest_stepped();
    fn guest_run_watched(address: u64);
    fn guest_broken();
}

const PSCI_CPU_OFF: u64 = 0x8400_0002;
const PSCI_CPU_ON: u64 = 0xc400_0003;
const PSCI_AFFINITY_INFO: u64 = 0xc400_0004;

macro_rules! read_register {
    ($name:ident, $register:literal, $what:literal) => {
        #[doc = $what]
        pub(crate) fn $name() -> u64 {
            let value;
            // SAFETY: Reads a register that this guest may read; a trap is caught by the vectors.
            unsafe { asm!(concat!("mrs {}, ", $register), out(reg) value, options(nomem, nostack)) };
            value
        }
    };
}

read_register!(affinity_register, "mpidr_el1", "MPIDR_EL1.");
read_register!(counter_hz, "cntfrq_el0", "CNTFRQ_EL0.");
read_register!(
    pmu_counter,
    "pmccntr_el0",
    "PMCCNTR_EL0, which the machine does not offer."
);
read_register!(
    sve_control,
    "s3_0_c1_c2_0",
    "ZCR_EL1, which the machine does not offer."
);
read_register!(
    sme_identification,
    "s3_1_c0_c0_6",
    "SMIDR_EL1, which the machine does not offer."
);
read_register!(revision, "revidr_el1", "REVIDR_EL1.");
read_register!(auxiliary, "aidr_el1", "AIDR_EL1.");
read_register!(endianness, "id_aa64mmfr0_el1", "ID_AA64MMFR0_EL1.");
read_register!(vttbr, "vttbr_el2", "VTTBR_EL2, which belongs to EL2.");
read_register!(icc_pmr, "s3_0_c4_c6_0", "ICC_PMR_EL1.");
read_register!(physical_timer_control, "cntp_ctl_el0", "CNTP_CTL_EL0.");
read_register!(icc_iar1, "s3_0_c12_c12_0", "ICC_IAR1_EL1.");

read_register!(os_lock_status, "oslsr_el1", "OSLSR_EL1.");
read_register!(debug_control, "mdscr_el1", "MDSCR_EL1.");
read_register!(breakpoint_value_0, "dbgbvr0_el1", "DBGBVR0_EL1.");
read_register!(breakpoint_value_1, "dbgbvr1_el1", "DBGBVR1_EL1.");
read_register!(breakpoint_control_0, "dbgbcr0_el1", "DBGBCR0_EL1.");
read_register!(breakpoint_control_1, "dbgbcr1_el1", "DBGBCR1_EL1.");
read_register!(watchpoint_value_0, "dbgwvr0_el1", "DBGWVR0_EL1.");
read_register!(watchpoint_control_0, "dbgwcr0_el1", "DBGWCR0_EL1.");
read_register!(
    deferred_error,
    "s3_0_c12_c1_1",
    "DISR_EL1, where there is one."
);

macro_rules! write_register {
    ($name:ident, $register:literal, $what:literal) => {
        #[doc = $what]
        pub(crate) fn $name(value: u64) {
            // SAFETY: Writes a register of this guest's own; a trap is caught by the vectors.
            unsafe { asm!(concat!("msr ", $register, ", {}"), "isb", in(reg) value, options(nostack)) };
        }
    };
}

write_register!(
    set_feature_access,
    "cpacr_el1",
    "CPACR_EL1: what EL1 and EL0 may use."
);
write_register!(set_os_lock, "oslar_el1", "OSLAR_EL1.");
write_register!(set_debug_control, "mdscr_el1", "MDSCR_EL1.");
write_register!(set_breakpoint_value_0, "dbgbvr0_el1", "DBGBVR0_EL1.");
write_register!(set_breakpoint_value_1, "dbgbvr1_el1", "DBGBVR1_EL1.");
write_register!(set_breakpoint_control_0, "dbgbcr0_el1", "DBGBCR0_EL1.");
write_register!(set_breakpoint_control_1, "dbgbcr1_el1", "DBGBCR1_EL1.");
write_register!(set_watchpoint_value_0, "dbgwvr0_el1", "DBGWVR0_EL1.");
write_register!(set_watchpoint_control_0, "dbgwcr0_el1", "DBGWCR0_EL1.");
write_register!(set_context, "contextidr_el1", "CONTEXTIDR_EL1.");
write_register!(
    set_deferred_error,
    "s3_0_c12_c1_1",
    "DISR_EL1, where there is one."
);
write_register!(set_timer_control, "cntv_ctl_el0", "CNTV_CTL_EL0.");
write_register!(set_timer_value, "cntv_tval_el0", "CNTV_TVAL_EL0.");
write_register!(set_timer_compare, "cntv_cval_el0", "CNTV_CVAL_EL0.");
write_register!(set_physical_timer_control, "cntp_ctl_el0", "CNTP_CTL_EL0.");
write_register!(set_physical_timer_value, "cntp_tval_el0", "CNTP_TVAL_EL0.");
write_register!(set_icc_sre, "s3_0_c12_c12_5", "ICC_SRE_EL1.");
write_register!(set_icc_pmr, "s3_0_c4_c6_0", "ICC_PMR_EL1.");
write_register!(set_icc_igrpen1, "s3_0_c12_c12_7", "ICC_IGRPEN1_EL1.");
write_register!(set_icc_eoir1, "s3_0_c12_c12_1", "ICC_EOIR1_EL1.");
write_register!(set_icc_dir, "s3_0_c12_c11_1", "ICC_DIR_EL1.");
write_register!(set_icc_ctlr, "s3_0_c12_c12_4", "ICC_CTLR_EL1.");
write_register!(set_icc_sgi1r, "s3_0_c12_c11_5", "ICC_SGI1R_EL1.");

/// This vCPU's affinity.
pub(crate) fn affinity() -> u64 {
    affinity_register() & 0xff_00ff_ffff
}

/// CNTVCT_EL0, not earlier than what comes before.
pub(crate) fn counter() -> u64 {
    let value;
    // SAFETY: Reads a counter.
    unsafe { asm!("isb", "mrs {}, cntvct_el0", out(reg) value, options(nostack)) };
    value
}

/// `HINT #0x72`: nothing, but to an emulator's clock: lines that this CPU takes from others are counted apart from here on.
pub(crate) fn hint_begin() {
    // SAFETY: A hint.
    unsafe { asm!("hint #0x72", options(nostack)) };
}

/// `HINT #0x73`: nothing, but to an emulator's clock: that ends here.
pub(crate) fn hint_end() {
    // SAFETY: A hint.
    unsafe { asm!("hint #0x73", options(nostack)) };
}

/// TPIDR_EL1: the address of this vCPU's area.
pub(crate) fn set_area_address(area: u64) {
    // SAFETY: The register is this program's own.
    unsafe { asm!("msr tpidr_el1, {}", in(reg) area, options(nostack)) };
}

/// The address of this vCPU's area.
pub(crate) fn area_address() -> u64 {
    let area;
    // SAFETY: Set at the start of `guest_main`.
    unsafe { asm!("mrs {}, tpidr_el1", out(reg) area, options(nomem, nostack)) };
    area
}

/// One hypercall without arguments; x0 of the answer.
pub(crate) fn hvc(function: u64) -> u64 {
    let answer;
    // SAFETY: SMCCC 1.1 clobbers x0 to x3 only, x0 to x17 with 1.0.
    unsafe {
        asm!("hvc #0", inout("x0") function => answer, clobber_abi("C"), options(nostack));
    }
    answer
}

/// PSCI CPU_ON: the vCPU at `affinity` starts as vCPU `index`.
pub(crate) fn cpu_on(affinity: u64, index: u64) -> u64 {
    let answer;
    let entry = guest_secondary as *const () as u64;
    // SAFETY: The target starts on its own stack.
    unsafe {
        asm!("hvc #0", inout("x0") PSCI_CPU_ON => answer, in("x1") affinity, in("x2") entry, in("x3") index,
             clobber_abi("C"), options(nostack));
    }
    answer
}

/// PSCI AFFINITY_INFO of the vCPU at `affinity`.
pub(crate) fn affinity_info(affinity: u64) -> u64 {
    let answer;
    // SAFETY: As for every hypercall.
    unsafe {
        asm!("hvc #0", inout("x0") PSCI_AFFINITY_INFO => answer, in("x1") affinity, in("x2") 0,
             clobber_abi("C"), options(nostack));
    }
    answer
}

/// PSCI CPU_OFF: does not return.
pub(crate) fn cpu_off() -> ! {
    hvc(PSCI_CPU_OFF);
    fail(status::UNKNOWN, PSCI_CPU_OFF, 0)
}

/// Reports the operation just finished and waits for the next: its code and five arguments.
pub(crate) fn next(status: u64, ticks: u64, results: [u64; 2]) -> [u64; 6] {
    let (x0, x1, x2, x3, x4, x5);
    // SAFETY: As for every hypercall.
    unsafe {
        asm!("hvc #0", inout("x0") abi::HVC_NEXT => x0, inout("x1") status => x1, inout("x2") ticks => x2,
             inout("x3") results[0] => x3, inout("x4") results[1] => x4, out("x5") x5,
             clobber_abi("C"), options(nostack));
    }
    [x0, x1, x2, x3, x4, x5]
}

/// Reports that this vCPU cannot go on, for ever.
pub(crate) fn fail(status: u64, first: u64, second: u64) -> ! {
    loop {
        next(status, 0, [first, second]);
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_fail(esr: u64, elr: u64) -> ! {
    fail(status::EXCEPTION, esr, elr)
}

/// Executes HVC at EL0; ESR_EL1 of what came of it.
pub(crate) fn hvc_at_el0() -> u64 {
    // SAFETY: The assembly restores what it changes and comes back by its own vector.
    unsafe { guest_run_el0() }
}

/// Reads `address` at EL0 in AArch32 state: ends this vCPU one way or the other.
pub(crate) fn run_aarch32(address: u64) -> ! {
    // SAFETY: The assembly leaves this program for good.
    unsafe { guest_run_aarch32(address) }
}

/// Runs a few instructions, among them a load from `device`, with a step's exception after each.
pub(crate) fn step_through(device: u64) {
    // SAFETY: The vectors have it go on; the assembly clobbers what the C ABI does.
    unsafe { guest_step_through(device) };
}

/// Address of the first of those instructions.
pub(crate) fn stepped() -> u64 {
    guest_stepped as *const () as u64
}

/// Runs the instruction at [`broken`], and then a load from `address`, with debug exceptions let in.
pub(crate) fn run_watched(address: u64) {
    // SAFETY: As for `step_through`.
    unsafe { guest_run_watched(address) };
}

/// Address of that instruction.
pub(crate) fn broken() -> u64 {
    guest_broken as *const () as u64
}

/// SPSR_EL1: the next instruction is stepped over, too, when the handler returns (SS), or no more (D).
pub(crate) fn step_on(more: bool) {
    let bit: u64 = if more { 1 << 21 } else { 1 << 9 };
    // SAFETY: Called by the vectors, which return by this SPSR_EL1.
    unsafe {
        asm!("mrs {t}, spsr_el1", "orr {t}, {t}, {bit}", "msr spsr_el1, {t}", t = out(reg) _, bit = in(reg) bit,
             options(nomem, nostack));
    }
}

/// Lets interrupts in and waits for one.
pub(crate) fn wait_for_interrupt() {
    // SAFETY: The handlers touch this vCPU's area by volatile accesses only.
    unsafe {
        asm!(
            "wfi",
            "msr daifclr, #2",
            "isb",
            "msr daifset, #2",
            options(nostack)
        )
    };
}

/// Lets pending interrupts in.
pub(crate) fn take_interrupts() {
    // SAFETY: As above.
    unsafe {
        asm!(
            "msr daifclr, #2",
            "isb",
            "nop",
            "msr daifset, #2",
            options(nostack)
        )
    };
}

/// The null hypercall, with nothing around it.
#[inline(always)]
pub(crate) fn null_call() {
    // SAFETY: As for every hypercall; this one promises to leave all registers but x0 alone.
    unsafe { asm!("hvc #0", inout("x0") abi::HVC_NULL => _, options(nostack)) };
}

macro_rules! load_into {
    ($name:ident, $instruction:literal, $register:tt, $what:literal) => {
        #[doc = $what]
        #[inline(always)]
        pub(crate) fn $name(address: u64) {
            // SAFETY: The address is a device's.
            unsafe { asm!(concat!($instruction, ", [{}]"), in(reg) address, out($register) _, options(nostack)) };
        }
    };
}

load_into!(load_x0, "ldr w0", "x0", "A load of a word into x0.");
load_into!(load_x25, "ldr w25", "x25", "A load of a word into x25.");
load_into!(
    load_wide_x0,
    "ldr x0",
    "x0",
    "A load of a double word into x0."
);
load_into!(
    load_wide_x25,
    "ldr x25",
    "x25",
    "A load of a double word into x25."
);

macro_rules! through_kept {
    ($($register:literal)*) => {
        /// Loads a word from a device, and stores it there again, through each of x19 to x29: what was loaded each time.
        pub(crate) fn load_and_store_through_kept(address: u64) -> [u64; 11] {
            let mut loaded = [0; 11];
            let mut next = loaded.iter_mut();
            $({
                let value: u64;
                // SAFETY: The register holds what it held before; the address is a device's register that can be written.
                unsafe {
                    asm!(
                        concat!("mov x9, x", $register),
                        concat!("ldr w", $register, ", [x10]"),
                        concat!("str w", $register, ", [x10]"),
                        concat!("mov x11, x", $register),
                        concat!("mov x", $register, ", x9"),
                        in("x10") address, out("x9") _, out("x11") value, options(nostack)
                    );
                }
                if let Some(place) = next.next() {
                    *place = value;
                }
            })*
            loaded
        }
    };
}
through_kept!("19" "20" "21" "22" "23" "24" "25" "26" "27" "28" "29");

/// Lets interrupts in from here on.
pub(crate) fn unmask() {
    // SAFETY: As for `wait_for_interrupt`.
    unsafe { asm!("msr daifclr, #2", "isb", options(nostack)) };
}

/// Keeps interrupts out from here on.
pub(crate) fn mask() {
    // SAFETY: Changes nothing but the mask.
    unsafe { asm!("msr daifset, #2", options(nostack)) };
}

/// `WFI`; what ends it is taken when interrupts are let in.
pub(crate) fn wfi() {
    // SAFETY: Waits.
    unsafe { asm!("wfi", options(nostack)) };
}

/// `WFE` until an event that comes after this: one that was noticed before, as returning from an exception is, is used up first.
#[inline(always)]
pub(crate) fn wait_for_event() {
    // SAFETY: Waits.
    unsafe { asm!("sevl", "wfe", "wfe", options(nostack)) };
}

/// Waits until the word at `address` is `least` or more: an exclusive load, then `WFE`, which the store by another ends.
pub(crate) fn wait_for_store(address: u64, least: u64) {
    // SAFETY: The address is this program's own data.
    unsafe {
        asm!("2: ldaxr {v}, [{a}]", "cmp {v}, {least}", "b.hs 3f", "wfe", "b 2b", "3: clrex",
             v = out(reg) _, a = in(reg) address, least = in(reg) least, options(nostack));
    }
}

/// `SEV`.
pub(crate) fn send_event() {
    // SAFETY: A hint.
    unsafe { asm!("sev", options(nostack)) };
}

/// `YIELD`: under an emulator that runs one CPU at a time, the next one's turn; nothing on most machines.
#[inline(always)]
pub(crate) fn yield_now() {
    // SAFETY: A hint.
    unsafe { asm!("yield", options(nostack)) };
}

/// `DSB SY`.
pub(crate) fn dsb() {
    // SAFETY: A barrier.
    unsafe { asm!("dsb sy", options(nostack)) };
}

/// A load that may fault.
pub(crate) fn load(address: u64) -> u64 {
    let value;
    // SAFETY: Whatever comes of it is caught by the vectors.
    unsafe { asm!("ldr {}, [{}]", inout(reg) 0_u64 => value, in(reg) address, options(nostack)) };
    value
}

/// A load of one byte that may fault.
pub(crate) fn load_byte(address: u64) -> u64 {
    let value;
    // SAFETY: As for `load`.
    unsafe {
        asm!("ldrb {:w}, [{}]", inout(reg) 0_u64 => value, in(reg) address, options(nostack))
    };
    value
}

/// A store that may fault or be unaligned.
pub(crate) fn store(address: u64, value: u64) {
    // SAFETY: As for `load`; the addresses are this program's own data or nobody's.
    unsafe { asm!("str {}, [{}]", in(reg) value, in(reg) address, options(nostack)) };
}

/// A store of two double words that may fault.
pub(crate) fn store_pair(address: u64) {
    // SAFETY: As for `store`.
    unsafe { asm!("stp xzr, xzr, [{}]", in(reg) address, options(nostack)) };
}

/// A 32-bit store to a device.
pub(crate) fn store_word(address: u64, value: u64) {
    // SAFETY: As for `store`.
    unsafe { asm!("str {:w}, [{}]", in(reg) value, in(reg) address, options(nostack)) };
}

/// A 32-bit load from a device.
pub(crate) fn load_word(address: u64) -> u64 {
    let value;
    // SAFETY: As for `load`.
    unsafe { asm!("ldr {:w}, [{}]", inout(reg) 0_u64 => value, in(reg) address, options(nostack)) };
    value
}

/// Adds one to the word at `address` by an exclusive pair.
pub(crate) fn exclusive_add(address: u64) {
    // SAFETY: As for `store`.
    unsafe {
        asm!("2: ldaxr {v}, [{a}]", "add {v}, {v}, #1", "stlxr {s:w}, {v}, [{a}]", "cbnz {s:w}, 2b",
             v = out(reg) _, s = out(reg) _, a = in(reg) address, options(nostack));
    }
}

/// `DC CIVAC`.
pub(crate) fn clean_and_invalidate(address: u64) {
    // SAFETY: Memory keeps its contents.
    unsafe { asm!("dc civac, {}", in(reg) address, options(nostack)) };
}

/// `DC IVAC`, of a line that holds nothing unwritten.
pub(crate) fn invalidate(address: u64) {
    // SAFETY: The caller has cleaned the line.
    unsafe { asm!("dc ivac, {}", in(reg) address, options(nostack)) };
}

/// `UDF`.
pub(crate) fn undefined() {
    // SAFETY: The vectors skip it.
    unsafe { asm!("udf #0", options(nostack)) };
}

/// `SMC #0` with function `function`; x0 of the answer.
pub(crate) fn smc(function: u64) -> u64 {
    let answer;
    // SAFETY: As for a hypercall.
    unsafe { asm!("smc #0", inout("x0") function => answer, clobber_abi("C"), options(nostack)) };
    answer
}

/// Runs `attempt` with stage-1 tables at `tables` for the upper half of addresses, from [`UPPER`] on.
pub(crate) fn with_upper_tables<T>(tables: u64, attempt: impl FnOnce() -> T) -> T {
    set_upper(tables, TCR & !UPPER_OFF | UPPER_ON);
    let outcome = attempt();
    set_upper(0, TCR);
    outcome
}

fn set_upper(tables: u64, control: u64) {
    // SAFETY: No code, stack or data is up there.
    unsafe {
        asm!("msr ttbr1_el1, {}", "isb", "msr tcr_el1, {}", "isb", "tlbi vmalle1", "dsb nsh", "isb",
             in(reg) tables, in(reg) control, options(nostack));
    }
}

/// `AT S1E1R`, after PAR_EL1 has been set to a success; PAR_EL1 then.
pub(crate) fn translate(address: u64) -> u64 {
    let outcome;
    // SAFETY: Changes PAR_EL1 only; a fault is caught by the vectors.
    unsafe {
        asm!("msr par_el1, xzr", "isb", "at s1e1r, {}", "isb", "mrs {}, par_el1", in(reg) address, out(reg) outcome,
             options(nostack));
    }
    outcome
}

/// A one-gigabyte block of Normal memory from address 0 on, as a descriptor of level 1.
pub(crate) const FIRST_GIGABYTE: u64 = VALID | INNER_SHAREABLE | ACCESSED | NO_EXECUTE;

/// Calls whatever is at `address`; the vectors bring it back.
pub(crate) fn call(address: u64) {
    // SAFETY: A fetch that faults returns to the link register.
    unsafe { asm!("blr {}", in(reg) address, clobber_abi("C"), options(nostack)) };
}

/// The `T` at `address`, in this program's own memory: parameters, areas, log words.
pub(crate) fn place<T>(address: u64) -> &'static T {
    let pointer = core::ptr::with_exposed_provenance::<T>(to_index(address));
    // SAFETY: The memory map of `abi` puts a `T` there, made of integers or atomics, for as long as the guest runs; what
    // changes is atomic.
    unsafe { &*pointer }
}
