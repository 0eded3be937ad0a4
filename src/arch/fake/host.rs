//! Instructions whose effect any computer offers: time, zeroing, giving the CPU away.

extern crate std;

use core::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{PAGE_BYTES, Pa, to_usize};

/// `WFI`: comes back at once, as the architecture permits.
pub fn wfi() {
    super::instructions::yield_now();
}

/// `SEV`: nobody waits for events here.
pub fn sev() {}

/// CNTPCT_EL0: one tick later at every look.
pub fn counter() -> u64 {
    static TICKS: AtomicU64 = AtomicU64::new(0);
    TICKS.fetch_add(1, Ordering::Relaxed)
}

/// CNTFRQ_EL0: a tick is a nanosecond.
pub fn counter_hz() -> u64 {
    1_000_000_000
}

/// Whether atomics are single instructions; the host's own are used here.
pub fn use_lse() -> bool {
    true
}

/// `DC CIVAC` over `bytes` bytes from `start`: the host is coherent.
pub fn dc_civac_range(_start: Pa, _bytes: u64) {}

/// Fills the page at `page` with zeros that a guest sees with its caches off, too.
///
/// # Safety
///
/// `page` is a page of memory that the caller owns and to which no reference exists.
pub unsafe fn zero_page(page: Pa) {
    let bytes =
        core::ptr::with_exposed_provenance_mut::<[u8; to_usize(PAGE_BYTES)]>(to_usize(page.raw()));
    // SAFETY: the caller owns the page; a `Pa` of the fake machine is an address of this process.
    unsafe { bytes.write_bytes(0, 1) };
}

/// What the CPU said of the last exception taken to EL2; the host takes none.
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

/// The syndrome registers.
pub fn syndrome() -> Syndrome {
    Syndrome::default()
}

/// MPIDR_EL1's affinity fields; the host's threads are all one CPU here.
pub fn affinity() -> u64 {
    0
}

/// Where the image was loaded; the host's is nowhere.
pub fn image_base() -> u64 {
    0
}

/// `SMC #0`: there is no firmware to call.
///
/// # Safety
///
/// None needed here; the machine's has obligations.
pub unsafe fn smc(_function: u32, _arguments: [u64; 3]) -> u64 {
    u64::MAX
}

/// `HVC #0`: there is no hypervisor to call.
///
/// # Safety
///
/// None needed here; the machine's has obligations.
pub unsafe fn hvc(_function: u32, _arguments: [u64; 3]) -> u64 {
    u64::MAX
}

/// Opens this CPU's interrupt interface; the host has none.
pub fn icc_init() -> bool {
    true
}

/// ICC_IAR1_EL1: nothing is ever pending.
pub fn icc_iar1() -> Option<u32> {
    None
}

/// ICC_EOIR1_EL1.
pub fn icc_eoir1(_intid: u32) {}

/// ICC_DIR_EL1.
pub fn icc_dir(_intid: u32) {}

/// ICC_SGI1R_EL1.
pub fn icc_sgi1r(_value: u64) {}
