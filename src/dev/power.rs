//! Switching the machine off: by PSCI, or where firmware has none, by a board's own power manager.
//!
//! The only one known is the BCM2711's (Raspberry Pi 4): its watchdog resets the chip, and firmware, which finds the
//! partition number of "halt" in the status register, stays off then.

use core::sync::atomic::{AtomicU64, Ordering};

use super::mmio::Registers;
use super::psci;
use crate::addr::Pa;
use crate::arch;

/// Bytes of the power manager's registers.
pub const BCM2711_BYTES: u64 = 4 << 10;
const RESET_CONTROL: usize = 0x1c;
const RESET_STATUS: usize = 0x20;
const WATCHDOG: usize = 0x24;
/// Every write carries it.
const PASSWORD: u32 = 0x5a00_0000;
/// RSTC.WRCFG: what the watchdog does, and its value for a full reset.
const CONFIGURATION: u32 = 0x30;
const FULL_RESET: u32 = 0x20;
/// RSTS: boot partition 63, in the bits it is spread over, means "halt".
const HALT: u32 = 0x555;
/// Watchdog ticks of 16 microseconds.
const SOON: u32 = 10;

/// The power manager of a machine without PSCI; 0 where there is none.
static MANAGER: AtomicU64 = AtomicU64::new(0);

/// Declares the power manager at `base`.
///
/// # Safety
///
/// A BCM2711's power manager is mapped there as device memory for ever, and nobody else drives it.
pub unsafe fn set_manager(base: Pa) {
    MANAGER.store(base.raw(), Ordering::Relaxed);
}

/// Switches the machine off, or sleeps for ever where nothing can.
pub fn off() -> ! {
    psci::system_off();
    if let base @ 1.. = MANAGER.load(Ordering::Relaxed) {
        // SAFETY: `set_manager`'s caller vouched for it.
        let manager = unsafe { Registers::new(Pa::new(base)) };
        let kept = |register| manager.read(register) & 0x00ff_ffff;
        manager.write(RESET_STATUS, PASSWORD | kept(RESET_STATUS) | HALT);
        manager.write(WATCHDOG, PASSWORD | SOON);
        let control = kept(RESET_CONTROL) & !CONFIGURATION | FULL_RESET;
        manager.write(RESET_CONTROL, PASSWORD | control);
    }
    loop {
        arch::wfi();
    }
}
