//! Atomic memory as the machine offers it.
//!
//! [`AtomicU64`] and [`fence`] are `core`'s, or loom's when the protocols are model-checked (`--cfg loom`), so that
//! what is checked is what ships. The read-modify-writes of the hot paths are functions here rather than methods
//! because Cortex-A72 has no FEAT_LSE: the choice between one LSE instruction and an exclusive loop is made once at
//! boot ([`crate::arch::use_lse`]) and costs one predictable branch.

#[cfg(loom)]
pub use crate::arch::fake::interleaved::AtomicU64;
#[cfg(not(loom))]
pub use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
