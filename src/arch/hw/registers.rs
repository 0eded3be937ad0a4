//! Single registers and calls that the rest of the hypervisor needs one at a time.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use aarch64_cpu::registers::{
    CNTFRQ_EL0, CNTPCT_EL0, ELR_EL2, ESR_EL2, FAR_EL2, HPFAR_EL2, PAR_EL1, Readable, SPSR_EL2,
    TPIDR_EL2, Writeable,
};

use super::isb;
use crate::addr::{Ipa, PAGE_BYTES, Va};

/// Reads a register that `aarch64-cpu` lacks.
macro_rules! mrs {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading this register has no effect.
        unsafe { core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }};
}
pub(super) use mrs;

/// Writes a register that `aarch64-cpu` lacks.
///
/// # Safety
///
/// The value is valid for the register, and EL2 can live with its effect.
macro_rules! msr {
    ($name:literal, $value:expr) => {
        core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) $value, options(nostack, preserves_flags))
    };
}
pub(super) use msr;

/// In debug builds, counts writes of system registers on this CPU.
#[inline]
pub fn note_register_writes(count: u64) {
    if cfg!(debug_assertions) {
        let counter = percpu_pointer() + crate::arch::offsets::REGISTER_WRITES;
        let counter = core::ptr::with_exposed_provenance::<AtomicU64>(counter);
        // SAFETY: the CPU's block has an atomic counter there (`sync::percpu` asserts it) and is never freed.
        let counter = unsafe { &*counter };
        counter.store(counter.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }
}

/// TPIDR_EL2: the address of this CPU's [`crate::sync::percpu::CpuBlock`]. Never zero once Rust runs on the CPU.
#[inline]
pub fn percpu_pointer() -> usize {
    let pointer: usize;
    // SAFETY: reads a register that boot wrote before Rust ran on this CPU and nobody writes again, hence `pure`.
    unsafe {
        asm!("mrs {}, tpidr_el2", out(reg) pointer, options(pure, nomem, nostack, preserves_flags))
    };
    pointer
}

/// Gives this CPU its block.
///
/// # Safety
///
/// `pointer` is the address of an initialized [`crate::sync::percpu::CpuBlock`] that is never freed and that no other
/// CPU was given. Code compiled around the call must not have read the old pointer: called by boot only.
pub unsafe fn set_percpu_pointer(pointer: usize) {
    TPIDR_EL2.set(pointer as u64);
}

/// Sets S2PIR_EL2 (FEAT_S2PIE), what the permission indices of this CPU's stage 2 mean, and synchronizes. Entries that were
/// cached before may keep the meaning they had.
#[inline]
pub fn set_s2pir(value: u64) {
    // SAFETY: the CPU has the register, or no VM would use it; it concerns EL1&0 only.
    unsafe { msr!("s3_4_c10_c2_5", value) };
    isb();
}

/// CNTPCT_EL0, read in program order.
#[inline]
pub fn counter() -> u64 {
    isb();
    CNTPCT_EL0.get()
}

/// CNTFRQ_EL0: ticks of [`counter`] in a second, as firmware declares it.
#[inline]
pub fn counter_hz() -> u64 {
    CNTFRQ_EL0.get()
}

/// `AT S1E1R`: what stage 1 of the guest on this CPU makes of `va` for a read at EL1, or `None` when its walk fails.
///
/// PAR_EL1 belongs to the guest and is left as found. Erratum 1508412 (Cortex-A77 before r1p1) would want a DMB on both sides of each
/// reading; guests read it without, so firmware has to answer for that core.
#[inline]
pub fn at_s1e1r(va: Va) -> Option<Ipa> {
    const OUTPUT: u64 = 0x000f_ffff_ffff_f000;
    const FAULT: u64 = 1;
    let guests = PAR_EL1.get();
    // SAFETY: translating changes PAR_EL1 only, which is restored below.
    unsafe { asm!("at s1e1r, {}", in(reg) va.raw(), options(nostack, preserves_flags)) };
    isb();
    let result = PAR_EL1.get();
    PAR_EL1.set(guests);
    (result & FAULT == 0).then(|| Ipa::new(result & OUTPUT | va.raw() & (PAGE_BYTES - 1)))
}

/// What the CPU said of the last exception taken to EL2.
#[derive(Clone, Copy, Debug, Default)]
pub struct Syndrome {
    /// ESR_EL2.
    pub esr: u64,
    /// ELR_EL2.
    pub elr: u64,
    /// FAR_EL2.
    pub far: u64,
    /// HPFAR_EL2.
    pub hpfar: u64,
    /// SPSR_EL2.
    pub spsr: u64,
}

/// The syndrome registers, still those of the exception that led here: EL2 takes no other meanwhile.
pub fn syndrome() -> Syndrome {
    Syndrome {
        esr: ESR_EL2.get(),
        elr: ELR_EL2.get(),
        far: FAR_EL2.get(),
        hpfar: HPFAR_EL2.get(),
        spsr: SPSR_EL2.get(),
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident => $text:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        ///
        /// What firmware does for `function` is not undone by Rust: the caller answers for its effect on memory and CPUs.
        pub unsafe fn $name(function: u32, arguments: [u64; 3]) -> u64 {
            let result: u64;
            // SAFETY: SMCCC preserves everything but x0-x17, which are declared; the effect is the caller's duty.
            unsafe {
                asm!($text, inout("x0") u64::from(function) => result, inout("x1") arguments[0] => _,
                    inout("x2") arguments[1] => _, inout("x3") arguments[2] => _, out("x4") _, out("x5") _, out("x6") _,
                    out("x7") _, out("x8") _, out("x9") _, out("x10") _, out("x11") _, out("x12") _, out("x13") _,
                    out("x14") _, out("x15") _, out("x16") _, out("x17") _, options(nostack))
            };
            result
        }
    )*};
}

calls! {
    /// `SMC #0`: an SMCCC call to EL3.
    smc => "smc #0";
    /// `HVC #0`: an SMCCC call to whoever runs at EL2 above this program.
    hvc => "hvc #0";
}
