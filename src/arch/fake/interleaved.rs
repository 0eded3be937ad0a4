//! Loom's `AtomicU64`, every access of which counts as a race with every other.
//!
//! Loom 0.7 explores another order of two accesses only if it sees them race, and it remembers the last access to each
//! word alone: when one CPU reads a word, and another reads it and then writes it, the first read is forgotten and the
//! other order is never tried. Exactly that is how summaries are set. So each access first writes one word that all share,
//! relaxed: that orders nothing (fences that meet over it synchronize with each other anyway), and loom then tries every
//! order, within its bound of preemptions.

use core::fmt;

use loom::sync::atomic::{AtomicU64 as Inner, Ordering};

loom::lazy_static! {
    static ref TURN: Inner = Inner::new(0);
}

/// A 64-bit word in a model.
#[derive(Default)]
pub struct AtomicU64(Inner);

macro_rules! access {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {$(
        #[doc = concat!("As `core`'s `", stringify!($name), "`.")]
        #[track_caller]
        pub fn $name(&self, $($argument: $type),*) -> $result {
            TURN.fetch_add(1, Ordering::Relaxed);
            self.0.$name($($argument),*)
        }
    )*};
}

impl AtomicU64 {
    /// A word that holds `value`.
    #[track_caller]
    pub fn new(value: u64) -> Self {
        Self(Inner::new(value))
    }

    access! {
        load(order: Ordering) -> u64;
        store(value: u64, order: Ordering) -> ();
        swap(value: u64, order: Ordering) -> u64;
        fetch_add(value: u64, order: Ordering) -> u64;
        fetch_sub(value: u64, order: Ordering) -> u64;
        fetch_or(value: u64, order: Ordering) -> u64;
        fetch_and(value: u64, order: Ordering) -> u64;
        compare_exchange(old: u64, new: u64, done: Ordering, failed: Ordering) -> Result<u64, u64>;
    }
}

impl fmt::Debug for AtomicU64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
