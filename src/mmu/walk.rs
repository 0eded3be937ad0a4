//! The one walker: from an IPA to the slot that decides about it.
//!
//! Lockless: each step is an acquire load, and an [`Active`] section keeps every table it passes from being freed. It ends
//! at the first slot that is not a table: a leaf, an empty slot or a busy one. A deferred table is looked through on the way
//! (`lazy`), so that nobody above meets one.

use crate::addr::{Ipa, Pa};
use crate::mmu::descriptor::Descriptor;
use crate::mmu::geometry::{Level, Shape};
use crate::mmu::slot::Context;
use crate::mmu::stage2::Stage2;
use crate::mmu::table::{Slot, Table, root_at, table_at};
use crate::sync::quiescence::Active;

/// The initial tables of a tree.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Root {
    pub(crate) pa: Pa,
    pub(crate) shape: Shape,
}

/// A tree with what its translations are cached under.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Tree {
    pub(crate) root: Root,
    /// Which of the VM's two VMIDs.
    pub(crate) vmid: usize,
}

/// Where a walk ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position<'a> {
    pub(crate) slot: &'a Slot,
    pub(crate) level: Level,
    /// What the slot held when the walk read it.
    pub(crate) found: Descriptor,
}

impl Stage2 {
    /// Walks to the slot that decides about `ipa`; `None` outside the guest's address space.
    #[inline]
    pub(crate) fn walk<'a>(
        &self,
        context: &Context,
        ipa: Ipa,
        active: &'a Active<'_>,
    ) -> Option<Position<'a>> {
        self.walk_to(context, ipa, Level::L3, active)
    }

    /// As [`Stage2::walk`], but goes no deeper than `limit`, where it may end on a table.
    #[inline]
    pub(crate) fn walk_to<'a>(
        &self,
        context: &Context,
        ipa: Ipa,
        limit: Level,
        active: &'a Active<'_>,
    ) -> Option<Position<'a>> {
        let at = context.tree.root.walk_to(ipa, limit, active)?;
        if at.found.is_deferred() {
            return self.walk_deferred(context, ipa, limit, active);
        }
        Some(at)
    }
}

impl Root {
    /// Walks to the slot that decides about `ipa`, no deeper than `limit`, where it may end on a table, as on a deferred one.
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
