//! Frames for translation tables, ready before they are needed.
//!
//! Each CPU has a stash that its own faults take from; it is refilled outside all locks and sections
//! ([`TablePool::top_up`]), so that nothing is ever allocated under the MMU lock. An empty stash is not an error: the
//! fault goes back, the stash is topped up, the guest tries again.
//!
//! A table that was linked comes back only through [`Unlinked::free`], which waits for a grace period; the caller has
//! paid the invalidation that reaches walk caches before (rule 20).

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::addr::Pa;
use crate::arch;
use crate::mem::TableFrames;
use crate::mmu::descriptor::Descriptor;
use crate::mmu::error::Error;
use crate::mmu::geometry::Level;
use crate::mmu::table::{Slot, Table, table_at};
use crate::sync::mutex::Mutex;
use crate::sync::quiescence::{Active, CpuId, Domain};

/// Tables that one fault can need: three to map a page below a level-0 root.
pub(crate) const STASH_TABLES: usize = 4;

/// The stashes of one VM, one per CPU.
#[derive(Debug)]
pub(crate) struct TablePool {
    stashes: Box<[Stash]>,
}

#[derive(Debug)]
#[repr(align(128))]
struct Stash(Mutex<Vec<Pa>>);

/// A table that no walker can reach: being filled, or never linked.
#[derive(Debug)]
#[must_use = "link it or put it back"]
pub(crate) struct SpareTable(Pa);

/// A table that was linked and is no longer: walkers that came before may still be in it.
#[derive(Debug)]
#[must_use = "owes an invalidation that reaches walk caches, then a grace period"]
pub(crate) struct Unlinked(Pa);

impl TablePool {
    /// Empty stashes for `cpus` CPUs.
    pub(crate) fn new(cpus: usize) -> Self {
        Self {
            stashes: (0..cpus)
                .map(|_| Stash(Mutex::new(Vec::with_capacity(STASH_TABLES))))
                .collect(),
        }
    }

    /// A frame from the stash of `cpu`.
    pub(crate) fn take(&self, cpu: CpuId) -> Option<SpareTable> {
        self.stashes.get(cpu.0)?.0.lock().pop().map(SpareTable)
    }

    /// Returns a table that was never linked.
    pub(crate) fn put_back(&self, cpu: CpuId, table: SpareTable) {
        if let Some(stash) = self.stashes.get(cpu.0) {
            stash.0.lock().push(table.0);
        }
    }

    /// Fills the stash of `cpu` up to [`STASH_TABLES`]. The caller holds no lock and no section.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`] when the stash is still empty afterwards.
    pub(crate) fn top_up(&self, cpu: CpuId, frames: &dyn TableFrames) -> Result<(), Error> {
        let stash = self.stashes.get(cpu.0).ok_or(Error::NoMemory)?;
        let missing = STASH_TABLES.saturating_sub(stash.0.lock().len());
        for _ in 0..missing {
            let Some(frame) = frames.allocate(1) else {
                break;
            };
            stash.0.lock().push(frame);
        }
        if stash.0.lock().is_empty() {
            Err(Error::NoMemory)
        } else {
            Ok(())
        }
    }

    /// Gives all frames back; the VM is being destroyed.
    pub(crate) fn drain(&self, frames: &dyn TableFrames) {
        for stash in &self.stashes {
            let tables = core::mem::take(&mut *stash.0.lock());
            for table in tables {
                frames.release(table, 1);
            }
        }
    }
}

impl SpareTable {
    /// Writes all 512 descriptors, in order.
    pub(crate) fn fill(
        &self,
        active: &Active<'_>,
        mut descriptor: impl FnMut(usize) -> Descriptor,
    ) {
        arch::note_table(self.0, true);
        // SAFETY: The frame belongs to this table alone and holds no live object; a table of atomics is valid whatever
        // its bytes are.
        let table: &Table = unsafe { table_at(self.0, active) };
        for (index, slot) in table.iter().enumerate() {
            Slot::prepare(slot, descriptor(index));
        }
    }

    /// The descriptor that links this table.
    pub(crate) fn descriptor(&self) -> Descriptor {
        Descriptor::table(self.0)
    }

    /// Says that the table was not linked after all; its frame may be reused as it is.
    pub(crate) fn abandon(self) -> Self {
        arch::note_table(self.0, false);
        self
    }
}

/// Frames of one splitting call, reserved outside locks and sections and given back at its end.
pub(crate) struct Spares<'f> {
    frames: &'f dyn TableFrames,
    tables: Vec<Pa>,
}

impl<'f> Spares<'f> {
    /// No frame yet.
    pub(crate) fn new(frames: &'f dyn TableFrames) -> Self {
        Self {
            frames,
            tables: Vec::new(),
        }
    }

    /// Holds `tables` frames, or as many as can be had. The caller holds no lock and no section.
    pub(crate) fn reserve(&mut self, tables: usize) {
        let missing = tables.saturating_sub(self.tables.len());
        if self.tables.try_reserve(missing).is_err() {
            return;
        }
        for _ in 0..missing {
            let Some(frame) = self.frames.allocate(1) else {
                return;
            };
            self.tables.push(frame);
        }
    }

    /// One of them.
    pub(crate) fn take(&mut self) -> Option<SpareTable> {
        self.tables.pop().map(SpareTable)
    }

    /// Takes back a table of `level` that was filled and never linked, with what it leads to. Nothing is allocated: the
    /// frames were here before.
    pub(crate) fn reclaim(&mut self, table: SpareTable, level: Level, active: &Active<'_>) {
        if let Some(deeper) = level.deeper() {
            // SAFETY: Nobody else knows the table.
            let slots: &Table = unsafe { table_at(table.0, active) };
            for below in slots.iter().map(Slot::load) {
                if below.is_table(level) {
                    self.reclaim(SpareTable(below.address()), deeper, active);
                }
            }
        }
        self.tables.push(table.abandon().0);
    }

    /// Takes back the table at `table`, of `level`, which was just unlinked from a tree that nobody walks any more, with what
    /// it leads to.
    pub(crate) fn reclaim_linked(&mut self, table: Pa, level: Level, active: &Active<'_>) {
        self.reclaim(SpareTable(table), level, active);
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }
}

impl Drop for Spares<'_> {
    fn drop(&mut self) {
        for table in self.tables.drain(..) {
            self.frames.release(table, 1);
        }
    }
}

impl Unlinked {
    /// The table at `table`, which the caller has just unlinked from a live tree.
    pub(crate) fn new(table: Pa) -> Self {
        Self(table)
    }

    /// Waits for a grace period and releases the frames of `tables`. The invalidation that reaches walk caches is
    /// complete; the caller is quiescent and holds no lock.
    pub(crate) fn free(tables: Vec<Self>, domain: &Domain, frames: &dyn TableFrames) {
        if tables.is_empty() {
            return;
        }
        domain.wait();
        for table in tables {
            arch::note_table(table.0, false);
            frames.release(table.0, 1);
        }
    }
}
