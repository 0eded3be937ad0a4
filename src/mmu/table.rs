//! Slots and tables in memory: the only code that reads or writes live descriptors.
//!
//! Every change of a live slot is a compare-and-swap; hardware may set AF or W in it at any time, and other CPUs change
//! it too. Tables are reached only through an [`Active`] section, which is what keeps them from being freed.

use core::ptr::with_exposed_provenance;

use crate::addr::{Pa, to_index};
use crate::arch;
use crate::arch::atomic::{AtomicU64, Ordering};
use crate::mmu::descriptor::Descriptor;
use crate::mmu::geometry::ENTRIES;
use crate::sync::percpu;
use crate::sync::quiescence::Active;
use crate::trace::Event;

/// A place in a table.
#[derive(Debug)]
#[repr(transparent)]
pub struct Slot(AtomicU64);

const _: () = assert!(cfg!(loom) || size_of::<Slot>() == 8);

impl Slot {
    /// A slot holding `descriptor`, outside any table: for models and tests.
    pub fn new(descriptor: Descriptor) -> Self {
        Self(AtomicU64::new(descriptor.bits()))
    }

    /// What the slot holds now; what a table descriptor leads to is visible (acquire).
    #[inline]
    pub fn load(&self) -> Descriptor {
        Descriptor::from_bits(self.0.load(Ordering::Acquire))
    }

    /// Replaces `old` by `new` if nobody changed it meanwhile (acquire, release).
    ///
    /// # Errors
    ///
    /// What the slot holds instead.
    #[inline]
    pub fn compare_and_swap(&self, old: Descriptor, new: Descriptor) -> Result<(), Descriptor> {
        match arch::cas(&self.0, old.bits(), new.bits()) {
            Ok(_) => {
                percpu::count(Event::DescriptorWrites);
                arch::note_descriptor(self.pa(), old.bits(), new.bits());
                Ok(())
            }
            Err(found) => Err(Descriptor::from_bits(found)),
        }
    }

    /// Replaces a table descriptor by its deferred form. False: the slot, which is not one of level 3, held none. The caller
    /// counts.
    #[inline]
    pub(crate) fn defer(&self) -> bool {
        let found = self.load();
        let Some(deferred) = found.deferred_table() else {
            return false;
        };
        let done = arch::cas(&self.0, found.bits(), deferred.bits()).is_ok();
        if done {
            arch::note_descriptor(self.pa(), found.bits(), deferred.bits());
        }
        done
    }

    /// Stores `new` over the busy marker that the caller itself put here: nobody else changes a busy slot (release).
    pub(crate) fn replace_busy(&self, new: Descriptor) {
        debug_assert_eq!(self.load(), Descriptor::BUSY);
        self.0.store(new.bits(), Ordering::Release);
        percpu::count(Event::DescriptorWrites);
        arch::note_descriptor(self.pa(), Descriptor::BUSY.bits(), new.bits());
    }

    /// Stores `new` in a slot of a tree that no CPU runs under and nothing of which is cached.
    pub(crate) fn edit(&self, new: Descriptor) {
        let old = self.load();
        self.0.store(new.bits(), Ordering::Release);
        percpu::count(Event::DescriptorsPrepared);
        arch::note_descriptor(self.pa(), old.bits(), new.bits());
    }

    /// Fills a slot of a table that no walker can reach yet.
    pub(crate) fn prepare(&self, descriptor: Descriptor) {
        self.0.store(descriptor.bits(), Ordering::Relaxed);
        arch::note_descriptor(self.pa(), 0, descriptor.bits());
    }

    #[inline]
    fn pa(&self) -> Pa {
        Pa::new((&raw const *self).expose_provenance() as u64)
    }
}

/// One table of 512 slots.
pub(crate) type Table = [Slot; ENTRIES];

/// The table at `table`, for as long as the section lasts.
///
/// # Safety
///
/// 1. `table` is a page of slots that was reachable from a live root when `active` already existed, or that the caller
///    owns.
/// 2. It is freed only after a grace period that `active` holds up.
#[inline]
pub(crate) unsafe fn table_at<'a>(table: Pa, _active: &'a Active<'_>) -> &'a Table {
    let pointer = with_exposed_provenance::<Table>(to_index(table.raw()));
    // SAFETY: EL2 maps all memory at its physical address; by (1) this is a table, by (2) it stays one; slots are
    // atomics, so sharing them is sound.
    unsafe { &*pointer }
}

/// The `entries` slots of the initial tables at `root`, for as long as the section lasts.
///
/// # Safety
///
/// As [`table_at`], for `entries` contiguous slots.
#[inline]
pub(crate) unsafe fn root_at<'a>(root: Pa, entries: usize, _active: &'a Active<'_>) -> &'a [Slot] {
    let pointer = with_exposed_provenance::<Slot>(to_index(root.raw()));
    // SAFETY: As for a table; the initial tables are contiguous.
    unsafe { core::slice::from_raw_parts(pointer, entries) }
}
