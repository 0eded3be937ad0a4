//! The world switch of a machine without a second world: registers are this thread's variables and no guest runs.

extern crate std;

use std::cell::{Cell, RefCell};

use crate::arch::context::{DebugRegisters, El1, Exit, Frame, Stage2Geometry};
use crate::arch::features::IdRegisters;

/// List registers that there can be.
const MOST_LIST_REGISTERS: usize = 16;

/// ELR_EL1, SPSR_EL1, ESR_EL1 and FAR_EL1.
pub type Exception = (u64, u64, u64, Option<u64>);

std::thread_local! {
    static LRS: RefCell<[u64; MOST_LIST_REGISTERS]> = const { RefCell::new([0; MOST_LIST_REGISTERS]) };
    static LIST_REGISTERS: Cell<usize> = const { Cell::new(4) };
    static ICH_HCR: Cell<u64> = const { Cell::new(0) };
    static ICH_VMCR: Cell<u64> = const { Cell::new(0) };
    static ACTIVE_PRIORITIES: Cell<[u64; 8]> = const { Cell::new([0; 8]) };
    static FAR: Cell<u64> = const { Cell::new(0) };
    static HPFAR: Cell<u64> = const { Cell::new(0) };
    static TIMER_ASSERTED: Cell<bool> = const { Cell::new(false) };
    static EXCEPTION: Cell<Option<Exception>> = const { Cell::new(None) };
}

/// Comes back at once: there is no guest to run.
///
/// # Safety
///
/// As on the target.
pub unsafe fn enter(_frame: *mut Frame) -> Exit {
    Exit::Interrupt
}

/// VTCR_EL2; the fake walks by the shape alone.
pub fn vtcr(_geometry: Stage2Geometry) -> u64 {
    0
}

/// Makes a vCPU resident.
///
/// # Safety
///
/// As on the target.
pub unsafe fn load(_el1: &El1, _vtcr: u64, _vttbr: u64) {}

/// Replaces the resident vCPU's EL1 state.
///
/// # Safety
///
/// As on the target.
pub unsafe fn reload(_el1: &El1) {}

/// Takes the resident vCPU's state.
///
/// # Safety
///
/// As on the target.
pub unsafe fn put(_el1: &mut El1, _idle_vttbr: u64) {}

/// The ID registers of a CPU that has nothing.
pub fn id_registers() -> IdRegisters {
    IdRegisters::default()
}

/// REVIDR_EL1.
pub fn revidr_el1() -> u64 {
    0
}

/// FAR_EL2.
pub fn far_el2() -> u64 {
    FAR.get()
}

/// HPFAR_EL2.
pub fn hpfar_el2() -> u64 {
    HPFAR.get()
}

/// Sets what [`far_el2`] and [`hpfar_el2`] read.
pub fn set_fault_address(far: u64, hpfar: u64) {
    FAR.set(far);
    HPFAR.set(hpfar);
}

/// The guest goes on behind the instruction; there is none.
pub fn skip_trapped_instruction() {}

/// ELR_EL2; there is no guest.
pub fn elr_el2() -> u64 {
    0
}

/// SPSR_EL2.SS; nothing steps.
pub fn end_step() {}

/// Number of the last breakpoint.
pub fn last_breakpoint() -> u64 {
    5
}

/// Nothing is debugged here.
pub fn set_debug_registers(_to: &DebugRegisters) {}

/// SCTLR_EL1 of the resident vCPU.
pub fn sctlr_el1() -> u64 {
    crate::arch::context::SCTLR_EL1_RESET
}

/// VBAR_EL1 of the resident vCPU.
pub fn vbar_el1() -> u64 {
    0
}

/// Records an exception of the resident vCPU.
pub fn set_exception_el1(pc: u64, pstate: u64, esr: u64, far: Option<u64>) {
    EXCEPTION.set(Some((pc, pstate, esr, far)));
}

/// The last exception that [`set_exception_el1`] was told of.
pub fn exception_el1() -> Option<Exception> {
    EXCEPTION.get()
}

/// Whether the virtual timer asserts its interrupt.
pub fn virtual_timer_asserted() -> bool {
    TIMER_ASSERTED.get()
}

/// Sets what [`virtual_timer_asserted`] reads.
pub fn set_virtual_timer_asserted(asserted: bool) {
    TIMER_ASSERTED.set(asserted);
}

/// When the virtual timer fires: it never does.
pub fn virtual_timer_deadline() -> Option<u64> {
    None
}

/// CNTHP: nothing here interrupts.
pub fn set_hypervisor_timer(_deadline: Option<u64>) {}

/// HCR_EL2.{TWI,TWE}: no guest waits here.
pub fn trap_waits(_trapped: bool) {}

/// No error is ever pending.
pub fn serror_is_pending() -> bool {
    false
}

/// No error is ever deferred.
pub fn take_deferred_serror() -> Option<u64> {
    None
}

/// Number of list registers.
pub fn ich_lr_count() -> usize {
    LIST_REGISTERS.get()
}

/// Sets what [`ich_lr_count`] reads; 4 otherwise.
pub fn set_ich_lr_count(count: usize) {
    LIST_REGISTERS.set(count.clamp(1, MOST_LIST_REGISTERS));
}

/// Whether a guest's deactivations can trap by themselves.
pub fn ich_traps_deactivation() -> bool {
    true
}

/// ICH_LR`n`_EL2; zero for a list register that does not exist.
pub fn ich_lr(n: usize) -> u64 {
    LRS.with_borrow(|lrs| lrs.get(n).copied().unwrap_or(0))
}

/// Sets ICH_LR`n`_EL2.
pub fn set_ich_lr(n: usize, value: u64) {
    LRS.with_borrow_mut(|lrs| {
        if let Some(lr) = lrs.get_mut(n) {
            *lr = value;
        }
    });
}

/// ICH_HCR_EL2.
pub fn ich_hcr() -> u64 {
    ICH_HCR.get()
}

/// Sets ICH_HCR_EL2.
pub fn set_ich_hcr(value: u64) {
    ICH_HCR.set(value);
}

/// ICH_VMCR_EL2.
pub fn ich_vmcr() -> u64 {
    ICH_VMCR.get()
}

/// Sets ICH_VMCR_EL2.
pub fn set_ich_vmcr(value: u64) {
    ICH_VMCR.set(value);
}

/// Active priorities.
pub fn ich_active_priorities() -> [u64; 8] {
    ACTIVE_PRIORITIES.get()
}

/// Sets active priorities.
pub fn set_ich_active_priorities(values: [u64; 8]) {
    ACTIVE_PRIORITIES.set(values);
}

/// Empties the interface.
pub fn ich_reset() {
    set_ich_hcr(0);
    set_ich_vmcr(0);
    set_ich_active_priorities([0; 8]);
    for n in 0..MOST_LIST_REGISTERS {
        set_ich_lr(n, 0);
    }
}

/// Nothing is delayed here.
pub fn ich_settle() {}
