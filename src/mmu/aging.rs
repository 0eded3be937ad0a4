//! Aging: which memory was accessed since somebody last asked.
//!
//! A pass takes the access flag of every leaf and then invalidates the VMID once. A leaf without the flag is not cached, so
//! the next access walks and sets it: hardware (FEAT_HAFDBS, VTCR_EL2.HA) or an access-flag fault, which the fast path of
//! [`fault`](super::fault) settles by one compare-and-swap.
//!
//! # Why one invalidation, and what it costs to omit it
//!
//! Clearing a flag owes nothing for any single entry: no permission changes, and an entry that stays cached is an access that is
//! not seen. But a cached entry is used without a walk, so the flag is not set again for as long as it stays: the hottest
//! memory would look coldest (rule 33). [`Precision::Imprecise`] omits the invalidation for measuring that error.
//!
//! # Races
//!
//! Under the shared side of the lock, by compare-and-swap from what was read: a pass never gives a permission back that was
//! taken meanwhile, nor loses one that was given. A leaf that is held by a structural change is waited for, outside lock and
//! section; a table is looked at inside a section only, and freed after a grace period. Where hardware marks what is written
//! (tracking `dbm`) a marked leaf loses mark and flag together, and its page is recorded: a leaf is never marked and old.
//! In lockless mode a pass writes nothing that faults read but the leaves.
//!
//! With engine `swap` the flags of the tree that was live before are taken too: who accessed a page under it has accessed it.

use alloc::sync::Arc;

use crate::addr::Ipa;
use crate::arch;
use crate::mmu::epoch::Tracking;
use crate::mmu::error::Error;
use crate::mmu::geometry::Level;
use crate::mmu::map::record;
use crate::mmu::protect::{Busy, Looked};
use crate::mmu::slot::{MemorySlot, SlotId, SlotView};
use crate::mmu::stage2::Stage2;
use crate::mmu::swap::was_accessed;
use crate::mmu::table::Slot;
use crate::mmu::tlb::{self, Debt};
use crate::sync::quiescence::CpuId;

/// Who sets access flags.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AccessFlag {
    /// The walker (FEAT_HAFDBS).
    Hardware,
    /// Faults.
    Software,
}

impl AccessFlag {
    /// Its name on command lines and in results.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hardware => "hardware",
            Self::Software => "software",
        }
    }

    /// The one called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Hardware, Self::Software]
            .into_iter()
            .find(|flag| flag.name() == name)
    }
}

/// Whether a pass ends with an invalidation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Precision {
    /// It does: an access after the pass is seen by the next.
    Precise,
    /// It does not: an access through an entry that was cached before the pass is not seen.
    Imprecise,
}

/// What a pass says of some pages that one leaf translates, or that nothing does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sighting {
    /// The first of them, as the slot counts.
    pub page: u64,
    /// How many: one, or those of a block, as far as they lie in the range.
    pub pages: u64,
    /// What was found.
    pub found: Found,
}

/// How a leaf was found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Found {
    /// Accessed since its flag was last taken.
    Young,
    /// Not accessed.
    Old,
    /// Not mapped.
    Absent,
}

/// What a pass came to.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Aged {
    /// Leaves looked at.
    pub leaves: u64,
    /// Those that were young.
    pub young: u64,
}

impl Stage2 {
    /// Pages of the slot `id`.
    ///
    /// Rounding: none. Races: removal of the slot. TLB: nothing owed. Cost: the configuration lock.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`].
    pub fn slot_pages(&self, id: SlotId) -> Result<u64, Error> {
        Ok(self.named(id)?.pages)
    }

    /// The slot that has the name `id` now.
    pub(crate) fn named(&self, id: SlotId) -> Result<Arc<MemorySlot>, Error> {
        Ok(self.admin.lock().slot(id)?.slot.clone())
    }

    /// Tells `visit` which pages of `[from, to)` of the slot were accessed since their flag was last taken, and takes nothing.
    /// `visit` is called in a section, in ascending order; it neither allocates nor waits.
    ///
    /// Rounding: none; `from` and `to` are multiples of 64 pages, or `to` is the slot's end. Races: everything. TLB: nothing owed.
    /// Cost: the leaves.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::BadRange`].
    pub fn test_young(
        &self,
        cpu: CpuId,
        id: SlotId,
        from: u64,
        to: u64,
        mut visit: impl FnMut(Sighting),
    ) -> Result<Aged, Error> {
        let _operation = self.begin_operation();
        self.look(cpu, id, from, to, false, &mut visit)
    }

    /// As [`Stage2::test_young`], and takes the flags; the next pass says what was accessed after this one.
    ///
    /// Rounding: none; as there. Races: everything. TLB: with [`Precision::Precise`] the VMID is invalidated on return; otherwise
    /// accesses through cached entries will not be seen. Cost: the leaves, one compare-and-swap for each young one.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::BadRange`]; nothing is taken then.
    pub fn age(
        &self,
        cpu: CpuId,
        id: SlotId,
        from: u64,
        to: u64,
        precision: Precision,
        mut visit: impl FnMut(Sighting),
    ) -> Result<Aged, Error> {
        let _operation = self.begin_operation();
        let aged = self.look(cpu, id, from, to, true, &mut visit)?;
        self.end_pass(cpu, precision);
        Ok(aged)
    }

    /// Takes the flags of all memory, as [`Stage2::age`] does, under one invalidation. `visit` is told the slot too.
    ///
    /// Rounding: none. Races: everything; a slot that is removed meanwhile ends there. TLB: as for [`Stage2::age`]. Cost: the
    /// leaves.
    pub fn age_all(
        &self,
        cpu: CpuId,
        precision: Precision,
        mut visit: impl FnMut(SlotId, Sighting),
    ) -> Aged {
        let _operation = self.begin_operation();
        let mut sum = Aged::default();
        for id in SlotId::all() {
            let pages = match self.admin.lock().slot(id) {
                Ok(entry) => entry.slot.pages,
                Err(_) => continue,
            };
            let mut visit = |sighting| visit(id, sighting);
            if let Ok(aged) = self.look(cpu, id, 0, pages, true, &mut visit) {
                sum.leaves += aged.leaves;
                sum.young += aged.young;
            }
        }
        self.end_pass(cpu, precision);
        sum
    }

    fn end_pass(&self, cpu: CpuId, precision: Precision) {
        if precision == Precision::Precise {
            arch::dsb_ishst();
            self.under_vmid(cpu, self.tree(), tlb::everything);
        }
    }

    fn look(
        &self,
        cpu: CpuId,
        id: SlotId,
        from: u64,
        to: u64,
        take: bool,
        visit: &mut impl FnMut(Sighting),
    ) -> Result<Aged, Error> {
        let (slot, other) = {
            let mut admin = self.admin.lock();
            let slot = admin.slot(id)?.slot.clone();
            (slot, admin.spare.root())
        };
        slot.check_range(from, to)?;
        let span = slot.ipa_of(from)..slot.ipa_of(to);
        let mut aged = Aged::default();
        // Marks that are taken are owed an invalidation whatever the precision.
        let mut marks = (take && self.tracking() == Tracking::Dbm).then(|| Debt::open(self, cpu));
        self.visit_slots(cpu, id, span, |place, ipa, level, view, active| {
            let mut on_mark = |leaf_at, level| {
                record(view, leaf_at, level, cpu);
                if let Some(debt) = &mut marks {
                    debt.add(leaf_at, level);
                }
            };
            let found = match look_at(place, ipa, level, view, take, &mut on_mark)? {
                Look::Leaf(found) => found,
                Look::Deeper => return Ok(Looked::Deeper),
            };
            let elsewhere = other.is_some_and(|root| was_accessed(root, ipa, level, take, active));
            let found = match found {
                Found::Old if elsewhere => Found::Young,
                found => found,
            };
            aged.leaves += u64::from(found != Found::Absent);
            aged.young += u64::from(found == Found::Young);
            let page = slot.page_of(ipa);
            let next = ipa.align_down(level.span_bytes()).raw() + level.span_bytes();
            let pages = slot.page_of(Ipa::new(next)).min(to) - page;
            visit(Sighting { page, pages, found });
            Ok(Looked::Done)
        });
        if let Some(debt) = marks {
            debt.pay();
        }
        Ok(aged)
    }
}

enum Look {
    Leaf(Found),
    Deeper,
}

/// Looks at what `slot` holds and, if it is to, takes its flag. `on_mark` is told of a leaf that hardware had marked as
/// written: mark and flag go together.
#[inline]
fn look_at(
    slot: &Slot,
    ipa: Ipa,
    level: Level,
    view: &SlotView,
    take: bool,
    on_mark: &mut impl FnMut(Ipa, Level),
) -> Result<Look, Busy> {
    let mut found = slot.load();
    loop {
        if found.is_held() {
            return Err(Busy);
        }
        if found.is_table(level) {
            return Ok(Look::Deeper);
        }
        if !found.is_leaf(level) {
            return Ok(Look::Leaf(Found::Absent));
        }
        if !found.is_young() {
            return Ok(Look::Leaf(Found::Old));
        }
        if !take {
            return Ok(Look::Leaf(Found::Young));
        }
        let marked = view.rights.is_marked(found);
        let new = if marked {
            view.rights.revoke(found, level).old()
        } else {
            found.old()
        };
        match slot.compare_and_swap(found, new) {
            Ok(()) => {
                if marked {
                    on_mark(ipa, level);
                }
                return Ok(Look::Leaf(Found::Young));
            }
            Err(now) => found = now,
        }
    }
}
