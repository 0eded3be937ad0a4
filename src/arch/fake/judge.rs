//! What the oracle makes of a descriptor that is made, of a table that is linked and of a root that is loaded: what may be
//! cached must go together with it.

extern crate std;

use std::vec::Vec;

use super::descriptor::{Leaf, Meaning, deferred, span_bytes};
use super::memory::{Home, Up};
use super::oracle::{Change, Violation};
use super::state::{Slot, State};
use super::tlb::{Cause, StaleTable, Tlb};
use crate::addr::{Ipa, Pa};

impl State {
    /// A block and a table that replace each other in one step must lead to the same memory.
    pub(super) fn judge_size(&mut self, slot: &Slot, old: &Meaning, new: &Meaning) {
        let (block, child) = match (*old, *new) {
            (Meaning::Leaf(block), Meaning::Table(child))
            | (Meaning::Table(child), Meaning::Leaf(block)) => (block, child),
            _ => return,
        };
        let leaves = self.memory.leaves(child, slot.level + 1, slot.ipa);
        let other = leaves
            .iter()
            .find(|at| at.leaf.young && !at.leaf.agrees(at.ipa, &block, slot.ipa));
        if let Some(ipa) = other.map(|at| at.ipa).filter(|_| block.young) {
            self.report(Violation::BreakBeforeMake {
                ipa: Ipa::new(ipa),
                changed: Change::Contents,
            });
        }
    }

    /// Reports stale entries that may not coexist with what is made in `slot`.
    pub(super) fn judge_make(&mut self, vmid: u16, slot: Slot, new: &Meaning) {
        let Slot { level, ipa, .. } = slot;
        let (span, bbm) = (span_bytes(level), self.features.bbm);
        let mut found: Vec<(u64, Cause)> = Vec::new();
        let mut clash = |tlb: &Tlb, ipa: u64, leaf: &Leaf| {
            for stale in tlb.overlapping(vmid, ipa, leaf.bytes) {
                let at = &stale.place;
                let sized = at.leaf.bytes == leaf.bytes || bbm >= 2;
                if !(sized && at.leaf.agrees(at.ipa, leaf, ipa)) {
                    found.push((at.ipa, stale.cause()));
                }
            }
        };
        match *new {
            Meaning::Nothing => return,
            Meaning::Leaf(leaf) if leaf.young => clash(&self.tlb, ipa, &leaf),
            Meaning::Leaf(_) => return,
            Meaning::Table(child) => {
                for place in self.memory.leaves(child, level + 1, ipa) {
                    if place.leaf.young {
                        clash(&self.tlb, place.ipa, &place.leaf);
                    }
                }
                if bbm < 2 {
                    let stale = self.tlb.overlapping(vmid, ipa, span);
                    let wide = stale.iter().filter(|stale| stale.place.leaf.bytes >= span);
                    found.extend(wide.map(|stale| (stale.place.ipa, stale.cause())));
                }
            }
        }
        let child = match *new {
            Meaning::Table(child) => child,
            _ => 0,
        };
        let within = |stale: &&StaleTable| {
            stale.vmid == vmid
                && stale.bytes() >= span
                && stale.covers(ipa)
                && stale.table != slot.table
        };
        for stale in self.tlb.tables().filter(within) {
            let same = stale.table == child || bbm >= 2 && child == 0;
            if !same && !self.leads_to(stale.table, slot.table) {
                found.push((stale.ipa, Cause::NotInvalidated));
            }
        }
        found.dedup();
        for (ipa, cause) in found {
            self.report(Violation::MadeOverStale {
                ipa: Ipa::new(ipa),
                vmid,
                cause,
            });
        }
    }

    /// Reports VMIDs other than those of the new `home`, in `up`, under which `child` or what it leads to may be cached:
    /// a walk may take what was read under one for what is there under the other (rule 31).
    pub(super) fn judge_link(&mut self, child: u64, home: Home, up: u64) {
        let reachers = self.reachers(up);
        if reachers.is_empty() || self.memory.home(child) == Some(home) {
            return;
        }
        for (table, ..) in self.memory.subtree(child, home.level, home.ipa) {
            for vmid in self.reachers(table).into_keys() {
                if !reachers.contains_key(&vmid) {
                    self.report(Violation::TableUnderTwoVmids {
                        table: Pa::new(table),
                        vmid,
                    });
                }
            }
        }
    }

    /// The same for the tree of `root`, which `vmid` is loaded with.
    pub(super) fn judge_root(&mut self, vmid: u16, root: u64) {
        let level = self.features.initial_level;
        let mut tables = Vec::new();
        for page in 0..self.features.initial_tables {
            let subtree = self.memory.subtree(root + page * 0x1000, level, 0);
            tables.extend(subtree.into_iter().map(|(table, ..)| table));
        }
        for table in tables {
            for other in self
                .reachers(table)
                .into_keys()
                .filter(|other| *other != vmid)
            {
                self.report(Violation::TableUnderTwoVmids {
                    table: Pa::new(table),
                    vmid: other,
                });
            }
        }
    }

    /// Whether a slot that walks reach keeps `table` for later, deferred.
    pub(super) fn is_deferred(&self, table: u64) -> bool {
        match self.memory.home(table).map(|home| home.up) {
            Some(Up::Slot { table: up, index }) => {
                deferred(self.memory.word(up, index)) == Some(table)
                    && !self.reachers(up).is_empty()
            }
            _ => false,
        }
    }

    /// Whether `table` hangs below `above`.
    fn leads_to(&self, above: u64, table: u64) -> bool {
        match self.memory.home(table).map(|home| home.up) {
            Some(Up::Slot { table: up, .. }) => up == above || self.leads_to(above, up),
            _ => false,
        }
    }
}
