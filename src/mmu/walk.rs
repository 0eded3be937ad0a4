//! The one walker: from an IPA to the slot that decides about it.
//!
//! Lockless and read-only: each step is an acquire load, and an [`Active`] section keeps every table it passes from
//! being freed. It ends at the first slot that is not a table: a leaf, an empty slot or a busy one.

use crate::addr::{Ipa, Pa};
use crate::mmu::descriptor::Descriptor;
use crate::mmu::geometry::{Level, Shape};
use crate::mmu::table::{Slot, Table, root_at, table_at};
use crate::sync::quiescence::Active;

/// The initial tables of a tree.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Root {
    pub(crate) pa: Pa,
    pub(crate) shape: Shape,
}

/// Where a walk ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position<'a> {
    pub(crate) slot: &'a Slot,
    pub(crate) level: Level,
    /// What the slot held when the walk read it.
    pub(crate) found: Descriptor,
}

impl Root {
    /// Walks to the slot that decides about `ipa`; `None` outside the guest's address space.
    #[inline]
    pub(crate) fn walk<'a>(self, ipa: Ipa, active: &'a Active<'_>) -> Option<Position<'a>> {
        self.walk_to(ipa, Level::L3, active)
    }

    /// As [`Root::walk`], but goes no deeper than `limit`, where it may end on a table.
    #[inline]
    pub(crate) fn walk_to<'a>(
        self,
        ipa: Ipa,
        limit: Level,
        active: &'a Active<'_>,
    ) -> Option<Position<'a>> {
        // SAFETY: A root lives until its VM is destroyed, after a grace period.
        let root = unsafe { root_at(self.pa, self.shape.root_entries(), active) };
        let mut level = self.shape.start();
        let mut slot = root.get(usize::try_from(ipa.raw() >> level.shift()).ok()?)?;
        loop {
            let found = slot.load();
            if !found.is_table(level) || level == limit {
                return Some(Position { slot, level, found });
            }
            level = level.deeper()?;
            slot = table_of(found, active).get(level.index_of(ipa))?;
        }
    }
}

/// The table that `descriptor`, found by a walk in this section, leads to.
#[inline]
pub(crate) fn table_of<'a>(descriptor: Descriptor, active: &'a Active<'_>) -> &'a Table {
    // SAFETY: The descriptor was loaded from a live tree inside `active`, so the table is freed only after a grace
    // period that begins once it is unlinked and that `active` holds up.
    unsafe { table_at(descriptor.address(), active) }
}
