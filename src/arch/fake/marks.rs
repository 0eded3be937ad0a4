//! Hardware management of access flags and dirty state (FEAT_HAFDBS, VTCR_EL2.HA and HD; DDI 0487 issue K.a, D8.4.6).
//!
//! A walk that needs the access flag, or the write permission of a leaf with DBM, sets it in memory by one atomic update.
//! What a TLB holds of a leaf that is not yet marked permits nothing more: hardware looks at memory again before it
//! updates (R_SGJBL). An update owes no invalidation (R_KLVVN).

use core::sync::atomic::{AtomicU64, Ordering};

use super::descriptor::{Access as Permissions, Leaf, marked};
use super::guest::Access;
use super::oracle::Violation;
use super::state::State;
use crate::addr::Pa;

/// An update that an access brings with it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Mark {
    table: u64,
    index: usize,
    old: u64,
    pub(super) new: u64,
}

impl State {
    /// Whether hardware that finds `leaf` in a TLB asks memory instead: it lacks a mark that `access` would set.
    pub(super) fn asks_memory(&self, leaf: &Leaf, access: Access) -> bool {
        let clean = matches!(
            leaf.access,
            Permissions::Direct {
                write: false,
                dbm: true,
                ..
            }
        );
        self.features.dirty_state && access == Access::Write && clean
    }

    /// The update that `access` makes in the leaf `raw`, if one is needed.
    pub(super) fn mark_for(
        &self,
        table: u64,
        index: usize,
        raw: u64,
        access: Access,
    ) -> Option<Mark> {
        let new = marked(raw, access == Access::Write);
        (self.features.dirty_state && new != raw).then_some(Mark {
            table,
            index,
            old: raw,
            new,
        })
    }

    /// Whether memory still says what `mark` changes.
    pub(super) fn is_current(&self, mark: &Mark) -> bool {
        self.memory.word(mark.table, mark.index) == mark.old
    }

    /// Makes an update.
    pub(super) fn mark(&mut self, mark: Mark) {
        self.memory.set_word(mark.table, mark.index, mark.new);
        let slot = mark.table + mark.index as u64 * 8;
        if self.tables_are_memory && !update(slot, mark.old, mark.new) {
            self.report(Violation::UnnotedStore {
                slot: Pa::new(slot),
            });
        }
    }
}

fn update(slot: u64, old: u64, new: u64) -> bool {
    let at = core::ptr::with_exposed_provenance::<AtomicU64>(crate::addr::to_usize(slot));
    // SAFETY: `Machine::tables_are_memory` was called: a live table is memory of this process, and every access to it
    // is atomic.
    let word = unsafe { &*at };
    word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
        .is_ok()
}
