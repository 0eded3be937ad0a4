//! A snapshot that many read by one acquire load and one replaces as a whole.
//!
//! Readers must not be quiescent ([`Active`]); what is replaced is freed after a grace period. There is one writer at a
//! time (the caller's lock), and [`Published::replace`] hands back a [`Retired`] that has to be settled outside it.

use alloc::boxed::Box;
use core::ptr::NonNull;

use crate::arch::atomic::{AtomicPtr, Ordering};
use crate::sync::quiescence::{Active, Domain};

/// A replaceable `T`, read without locks.
#[derive(Debug)]
pub struct Published<T>(AtomicPtr<T>);

/// A `T` that readers may still be looking at.
#[derive(Debug)]
#[must_use = "the old snapshot may be in use until a grace period has passed: call `free`"]
pub struct Retired<T>(NonNull<T>);

// SAFETY: A `Retired` owns its `T` like the `Box` it came from.
unsafe impl<T: Send> Send for Retired<T> {}

impl<T> Published<T> {
    /// Publishes `first`.
    pub fn new(first: T) -> Self {
        Self(AtomicPtr::new(Box::into_raw(Box::new(first))))
    }

    /// The current snapshot, valid as long as `_active`.
    #[inline]
    pub fn load<'a>(&'a self, _active: &'a Active<'_>) -> &'a T {
        let current = self.0.load(Ordering::Acquire);
        // SAFETY: `current` came from `Box::into_raw` and is freed by `Retired::free` only, after a grace period that
        // the caller's `Active` holds up.
        unsafe { &*current }
    }

    /// Publishes `next`. Readers that began earlier keep the old snapshot until they are quiescent.
    pub fn replace(&self, next: T) -> Retired<T> {
        let old = self.0.swap(Box::into_raw(Box::new(next)), Ordering::AcqRel);
        // SAFETY: The cell never holds null: both `new` and `replace` store a `Box`'s pointer.
        Retired(unsafe { NonNull::new_unchecked(old) })
    }
}

impl<T> Retired<T> {
    /// Waits for a grace period and gives the snapshot back. The caller is quiescent and holds no lock.
    pub fn free(self, domain: &Domain) -> T {
        domain.wait();
        // SAFETY: The pointer came from `Box::into_raw`, is no longer published, and since the grace period nobody
        // refers to it.
        *unsafe { Box::from_raw(self.0.as_ptr()) }
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        let current = self.0.load(Ordering::Acquire);
        // SAFETY: `&mut self` means that no reader is left, and the pointer came from `Box::into_raw`.
        drop(unsafe { Box::from_raw(current) });
    }
}
