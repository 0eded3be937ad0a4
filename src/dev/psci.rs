//! The physical machine's PSCI (Arm DEN0022F): starting CPUs and switching off.

use core::sync::atomic::{AtomicU8, Ordering};

use crate::addr::Pa;
use crate::arch;
use crate::arch::mitigations::{Answer, Firmware, WORKAROUND_1, WORKAROUND_3};

/// How firmware is called.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Conduit {
    /// `SMC`, to EL3.
    Smc = 1,
    /// `HVC`, to a hypervisor above this one.
    Hvc = 2,
}

/// What firmware answers to a request it does not carry out (DEN0022F, 5.2.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Refusal(pub i32);

impl Refusal {
    /// The answer in words.
    pub const fn text(self) -> &'static str {
        match self.0 {
            -1 => "firmware does not start CPUs",
            -2 => "firmware does not know it",
            -3 => "firmware denies it",
            -4 => "it is on already",
            -5 => "it is being started by somebody else",
            -9 => "firmware rejects the entry point",
            _ => "firmware failed to start it",
        }
    }
}

const VERSION: u32 = 0x8400_0000;
const SYSTEM_OFF: u32 = 0x8400_0008;
const SYSTEM_RESET: u32 = 0x8400_0009;
const CPU_ON: u32 = 0xc400_0003;

/// The conduit, for calls made when nothing else is known any more; 0 until [`set_conduit`].
static CONDUIT: AtomicU8 = AtomicU8::new(0);

/// Declares how firmware is called. Called once, by boot.
pub fn set_conduit(conduit: Conduit) {
    CONDUIT.store(conduit as u8, Ordering::Relaxed);
}

/// # Safety
///
/// As for [`arch::smc`].
unsafe fn call(function: u32, arguments: [u64; 3]) -> Result<u64, Refusal> {
    const NOT_SUPPORTED: Refusal = Refusal(-1);
    let result = match CONDUIT.load(Ordering::Relaxed) {
        // SAFETY: the caller's duty.
        it if it == Conduit::Smc as u8 => unsafe { arch::smc(function, arguments) },
        // SAFETY: the caller's duty.
        it if it == Conduit::Hvc as u8 => unsafe { arch::hvc(function, arguments) },
        _ => return Err(NOT_SUPPORTED),
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "PSCI error codes are 32 bits of the register"
    )]
    match result as i32 {
        error @ ..0 => Err(Refusal(error)),
        _ => Ok(result),
    }
}

/// Major and minor version.
///
/// # Errors
///
/// What firmware answered.
pub fn version() -> Result<(u64, u64), Refusal> {
    // SAFETY: asking for the version changes nothing.
    let version = unsafe { call(VERSION, [0; 3]) }?;
    Ok((version >> 16, version & 0xffff))
}

/// What firmware says of its calls against attacks on the branch predictor of this CPU. Those are made from the vectors, by
/// `SMC` only; so where that is not how firmware is called there are none.
pub fn mitigations() -> Firmware {
    const PSCI_FEATURES: u32 = 0x8400_000a;
    const SMCCC_VERSION: u32 = 0x8000_0000;
    let callable = CONDUIT.load(Ordering::Relaxed) == Conduit::Smc as u8;
    // SAFETY: questions change nothing.
    let known = callable && unsafe { call(PSCI_FEATURES, [SMCCC_VERSION.into(), 0, 0]) }.is_ok();
    let about = |function| {
        if known {
            arch_features(function)
        } else {
            Answer::Absent
        }
    };
    Firmware {
        callable,
        targets: about(WORKAROUND_1),
        history: about(WORKAROUND_3),
    }
}

/// What SMCCC_ARCH_FEATURES says of `function` on this CPU (DEN0028G, 7.4): 0 that it is needed, 1 that it is not.
fn arch_features(function: u32) -> Answer {
    const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;
    // SAFETY: questions change nothing.
    match unsafe { call(SMCCC_ARCH_FEATURES, [function.into(), 0, 0]) } {
        Ok(0) => Answer::Offered,
        Ok(_) => Answer::NotNeeded,
        Err(_) => Answer::Absent,
    }
}

/// Starts the CPU with affinity `mpidr` at `entry` with `argument` in x0.
///
/// # Safety
///
/// `entry` is code for a CPU with its MMU off, and `argument` what it expects.
///
/// # Errors
///
/// What firmware answered.
pub unsafe fn cpu_on(mpidr: u64, entry: Pa, argument: u64) -> Result<(), Refusal> {
    // SAFETY: the new CPU's effects are the caller's duty.
    unsafe { call(CPU_ON, [mpidr, entry.raw(), argument]) }.map(|_| ())
}

/// Switches the machine off; where firmware cannot, resets it; returns where it cannot either.
pub fn system_off() {
    for function in [SYSTEM_OFF, SYSTEM_RESET] {
        // SAFETY: nothing runs afterwards.
        let refused = unsafe { call(function, [0; 3]) };
        debug_assert!(refused.is_err(), "a machine that is off does not answer");
    }
}
