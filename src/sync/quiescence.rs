//! Grace periods: when has every CPU let go of what it may have been looking at?
//!
//! A CPU is *quiescent* while its software holds no reference to translation tables, slots, bitmaps or snapshots. A CPU
//! in the guest is quiescent; so is one that waits for others. A *grace period* is over once every CPU has been
//! quiescent at some moment since it began. What was unreachable when it began is then referenced by nobody.
//!
//! # Protocol
//!
//! ```text
//!   walker                              waiter
//!   mark := odd                         unlink / publish
//!   fence(SeqCst)          \  /         fence(SeqCst)
//!   load tables             \/          load mark ──── even: not looking, or will see what was published
//!   ...                     /\                    └─── odd: poll until it changes
//!   mark := even (release) ─────────▶   (acquire) the walker's accesses are over
//! ```
//!
//! The two fences make one of two things true: the waiter reads the odd mark and waits, or the walker's loads see what
//! the waiter published. Without the walker's fence its loads may be satisfied before its mark is visible, and a table
//! is freed under it (`tests/loom`, `bad_walker_without_fence_reads_a_freed_table`).
//!
//! Each mark is written by one CPU only and has cache lines of its own, so entering and leaving costs two plain stores
//! and one barrier, and shares nothing.
//!
//! Nobody calls [`Domain::wait`] while holding a lock that a walker may be spinning on, nor while not quiescent itself:
//! two such waiters would wait for each other.

use alloc::boxed::Box;

use crate::arch;
use crate::arch::atomic::{AtomicU64, Ordering, fence};

/// Position of a CPU in the list of CPUs found at boot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CpuId(pub usize);

/// Even: quiescent. Odd: inside a section. Changed by its own CPU only.
#[derive(Debug)]
#[repr(align(128))]
struct Mark(AtomicU64);

/// The CPUs whose grace periods are tracked together.
#[derive(Debug)]
pub struct Domain {
    marks: Box<[Mark]>,
}

/// Proof that the calling CPU is not quiescent: references obtained through it stay valid until it is dropped.
///
/// It must be dropped on the CPU that created it, with no wait for another CPU in between.
#[derive(Debug)]
#[must_use = "the CPU is quiescent again as soon as this is dropped"]
pub struct Active<'d> {
    mark: &'d Mark,
}

impl Domain {
    /// A domain of `cpus` CPUs, all quiescent.
    pub fn new(cpus: usize) -> Self {
        Self {
            marks: (0..cpus).map(|_| Mark(AtomicU64::new(0))).collect(),
        }
    }

    /// Number of CPUs.
    pub fn cpus(&self) -> usize {
        self.marks.len()
    }

    /// Leaves quiescence on the calling CPU, which must be `cpu` and must be quiescent.
    ///
    /// # Panics
    ///
    /// When `cpu` is not of this domain: a mistake of ours that no guest can cause.
    #[inline]
    pub fn enter(&self, cpu: CpuId) -> Active<'_> {
        let mark = &self.marks[cpu.0];
        let count = mark.0.load(Ordering::Relaxed);
        debug_assert!(count & 1 == 0, "sections do not nest");
        mark.0.store(count.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        arch::note_section(true);
        Active { mark }
    }

    /// Waits until every CPU has been quiescent at some moment since the call. The caller must be quiescent and hold no
    /// lock.
    pub fn wait(&self) {
        fence(Ordering::SeqCst);
        for mark in &self.marks {
            let seen = mark.0.load(Ordering::Acquire);
            if seen & 1 == 0 {
                continue;
            }
            while mark.0.load(Ordering::Acquire) == seen {
                arch::yield_now();
            }
        }
    }
}

impl Drop for Active<'_> {
    #[inline]
    fn drop(&mut self) {
        arch::note_section(false);
        let count = self.mark.0.load(Ordering::Relaxed);
        self.mark.0.store(count.wrapping_add(1), Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{CpuId, Domain};

    #[test]
    fn a_grace_period_without_walkers_is_immediate() {
        Domain::new(4).wait();
    }

    #[test]
    fn a_grace_period_waits_for_a_walker_that_was_there_before() {
        let domain = Domain::new(2);
        let active = domain.enter(CpuId(1));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| domain.wait());
            assert!(!waiter.is_finished());
            drop(active);
            waiter.join().unwrap();
        });
    }
}
