//! The hypervisor's side of a GICv3 CPU interface: ICH_* registers (IHI 0069H, section 12.4).

use core::arch::asm;

use aarch64_cpu::registers::{ICH_HCR_EL2, ICH_VMCR_EL2, ICH_VTR_EL2, Readable, Writeable};

use super::{dsb_ish, isb, note_register_writes};

macro_rules! indexed {
    ($index:ident, $($n:literal $name:literal)*; $instruction:ident) => {
        match $index {
            $($n => $instruction!($name),)*
            _ => Default::default(),
        }
    };
}

macro_rules! read {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading this register has no effect; the CPU implements it (ICH_VTR_EL2).
        unsafe { asm!(concat!("mrs {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }};
}

/// Number of list registers.
pub fn ich_lr_count() -> usize {
    usize::try_from(ICH_VTR_EL2.read(ICH_VTR_EL2::ListRegs)).map_or(1, |last| last + 1)
}

/// Whether a guest's deactivations can trap by themselves (ICH_VTR_EL2.TDS).
pub fn ich_traps_deactivation() -> bool {
    const TDS: u64 = 1 << 19;
    ICH_VTR_EL2.get() & TDS != 0
}

/// Number of active-priority registers per group: one for 5 bits of preemption, two for 6, four for 7.
fn active_priority_registers() -> usize {
    match ICH_VTR_EL2.read(ICH_VTR_EL2::PREbits) {
        6 => 4,
        5 => 2,
        _ => 1,
    }
}

/// ICH_LR`n`_EL2; zero for a list register that does not exist.
#[inline]
pub fn ich_lr(n: usize) -> u64 {
    indexed!(n,
        0 "ich_lr0_el2" 1 "ich_lr1_el2" 2 "ich_lr2_el2" 3 "ich_lr3_el2" 4 "ich_lr4_el2" 5 "ich_lr5_el2"
        6 "ich_lr6_el2" 7 "ich_lr7_el2" 8 "ich_lr8_el2" 9 "ich_lr9_el2" 10 "ich_lr10_el2" 11 "ich_lr11_el2"
        12 "ich_lr12_el2" 13 "ich_lr13_el2" 14 "ich_lr14_el2" 15 "ich_lr15_el2"; read)
}

/// Sets ICH_LR`n`_EL2, `n` below [`ich_lr_count`].
#[inline]
pub fn set_ich_lr(n: usize, value: u64) {
    macro_rules! write {
        ($name:literal) => {{
            note_register_writes(1);
            // SAFETY: list registers only hold interrupts of the resident vCPU; the CPU implements this one.
            unsafe { asm!(concat!("msr ", $name, ", {}"), in(reg) value, options(nomem, nostack, preserves_flags)) };
        }};
    }
    indexed!(n,
        0 "ich_lr0_el2" 1 "ich_lr1_el2" 2 "ich_lr2_el2" 3 "ich_lr3_el2" 4 "ich_lr4_el2" 5 "ich_lr5_el2"
        6 "ich_lr6_el2" 7 "ich_lr7_el2" 8 "ich_lr8_el2" 9 "ich_lr9_el2" 10 "ich_lr10_el2" 11 "ich_lr11_el2"
        12 "ich_lr12_el2" 13 "ich_lr13_el2" 14 "ich_lr14_el2" 15 "ich_lr15_el2"; write)
}

/// ICH_HCR_EL2.
pub fn ich_hcr() -> u64 {
    ICH_HCR_EL2.get()
}

/// Sets ICH_HCR_EL2.
pub fn set_ich_hcr(value: u64) {
    note_register_writes(1);
    ICH_HCR_EL2.set(value);
}

/// ICH_VMCR_EL2: the guest's view of its CPU interface.
pub fn ich_vmcr() -> u64 {
    ICH_VMCR_EL2.get()
}

/// Sets ICH_VMCR_EL2.
pub fn set_ich_vmcr(value: u64) {
    note_register_writes(1);
    ICH_VMCR_EL2.set(value);
}

/// ICH_AP0R0..3_EL2 and ICH_AP1R0..3_EL2, in this order; those that do not exist are zero.
pub fn ich_active_priorities() -> [u64; 8] {
    let count = active_priority_registers();
    core::array::from_fn(|i| match i {
        _ if i % 4 >= count => 0,
        0 => read!("ich_ap0r0_el2"),
        1 => read!("ich_ap0r1_el2"),
        2 => read!("ich_ap0r2_el2"),
        3 => read!("ich_ap0r3_el2"),
        4 => read!("ich_ap1r0_el2"),
        5 => read!("ich_ap1r1_el2"),
        6 => read!("ich_ap1r2_el2"),
        _ => read!("ich_ap1r3_el2"),
    })
}

/// Sets what [`ich_active_priorities`] reads.
pub fn set_ich_active_priorities(values: [u64; 8]) {
    let count = active_priority_registers();
    for (i, value) in values
        .into_iter()
        .enumerate()
        .filter(|(i, _)| i % 4 < count)
    {
        macro_rules! write {
            ($name:literal) => {{
                note_register_writes(1);
                // SAFETY: holds priorities of the resident vCPU's interrupts only; the CPU implements it.
                unsafe { asm!(concat!("msr ", $name, ", {}"), in(reg) value, options(nomem, nostack, preserves_flags)) };
            }};
        }
        indexed!(i,
            0 "ich_ap0r0_el2" 1 "ich_ap0r1_el2" 2 "ich_ap0r2_el2" 3 "ich_ap0r3_el2"
            4 "ich_ap1r0_el2" 5 "ich_ap1r1_el2" 6 "ich_ap1r2_el2" 7 "ich_ap1r3_el2"; write);
    }
}

/// Empties the interface: no interrupt listed, none active, reset control values.
pub fn ich_reset() {
    set_ich_hcr(0);
    set_ich_vmcr(0);
    set_ich_active_priorities([0; 8]);
    for n in 0..ich_lr_count() {
        set_ich_lr(n, 0);
    }
    isb();
}

/// Waits until what the guest last did with its interrupts has reached the list registers.
#[inline]
pub fn ich_settle() {
    dsb_ish();
    isb();
}
