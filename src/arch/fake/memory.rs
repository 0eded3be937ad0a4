//! What the fake machine knows of translation tables: their descriptors, as noted, and where each table hangs.
//!
//! It never reads the memory that tables live in, so a store that goes round `arch::note_descriptor` is noticed by the
//! next one that does not.

extern crate std;

use std::collections::BTreeMap;
use std::vec::Vec;

use super::descriptor::{Leaf, Meaning, decode, span_bytes};

/// Where a table hangs in a tree.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Home {
    pub(super) level: u8,
    /// First address that the table translates.
    pub(super) ipa: u64,
    pub(super) up: Up,
}

/// What leads to a table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Up {
    /// VTTBR_EL2 with this base.
    Root(u64),
    /// A descriptor.
    Slot { table: u64, index: usize },
}

#[derive(Debug, Default)]
struct Table {
    /// Descriptors other than zero.
    words: BTreeMap<usize, u64>,
    home: Option<Home>,
}

/// Every live table.
#[derive(Debug)]
pub(super) struct Tables {
    tables: BTreeMap<u64, Table>,
    /// Whether permissions are indirect (VTCR_EL2.S2PIE).
    indirect: bool,
}

impl Tables {
    /// None yet.
    pub(super) fn new(indirect: bool) -> Self {
        Self {
            tables: BTreeMap::new(),
            indirect,
        }
    }

    /// What a walk makes of `raw`, found at `level`.
    pub(super) fn decode(&self, raw: u64, level: u8) -> Meaning {
        decode(raw, level, self.indirect)
    }

    pub(super) fn is_live(&self, table: u64) -> bool {
        self.tables.contains_key(&table)
    }

    /// Begins `table` with zeros; false when it is one already.
    pub(super) fn insert(&mut self, table: u64) -> bool {
        self.tables.insert(table, Table::default()).is_none()
    }

    /// Ends `table`; false when it was none.
    pub(super) fn remove(&mut self, table: u64) -> bool {
        self.tables.remove(&table).is_some()
    }

    pub(super) fn home(&self, table: u64) -> Option<Home> {
        self.tables.get(&table)?.home
    }

    pub(super) fn word(&self, table: u64, index: usize) -> u64 {
        self.tables
            .get(&table)
            .and_then(|table| table.words.get(&index))
            .map_or(0, |word| *word)
    }

    pub(super) fn set_word(&mut self, table: u64, index: usize, raw: u64) {
        if let Some(table) = self.tables.get_mut(&table) {
            if raw == 0 {
                table.words.remove(&index);
            } else {
                table.words.insert(index, raw);
            }
        }
    }

    /// Hangs `table`, and what it leads to, at `home`.
    pub(super) fn hang(&mut self, table: u64, home: Home) {
        let Some(entry) = self.tables.get_mut(&table) else {
            return;
        };
        if entry.home == Some(home) {
            return;
        }
        entry.home = Some(home);
        let words: Vec<_> = entry.words.iter().map(|(i, raw)| (*i, *raw)).collect();
        for (index, raw) in words {
            if let Meaning::Table(child) = self.decode(raw, home.level) {
                let up = Up::Slot { table, index };
                let ipa = home.ipa + index as u64 * span_bytes(home.level);
                let level = home.level + 1;
                self.hang(child, Home { level, ipa, up });
            }
        }
    }

    /// Every leaf below `table`: where, in which slot, and what.
    pub(super) fn leaves(&self, table: u64, level: u8, ipa: u64) -> Vec<Place> {
        let mut found = Vec::new();
        self.collect(table, level, ipa, &mut found);
        found
    }

    /// Every table below and including `table`: its level, first address and place.
    pub(super) fn subtree(&self, table: u64, level: u8, ipa: u64) -> Vec<(u64, u8, u64)> {
        let mut found = std::vec![(table, level, ipa)];
        let mut next = 0;
        while let Some(&(table, level, ipa)) = found.get(next) {
            next += 1;
            let Some(entry) = self.tables.get(&table) else {
                continue;
            };
            for (index, raw) in &entry.words {
                if let Meaning::Table(child) = self.decode(*raw, level) {
                    found.push((child, level + 1, ipa + *index as u64 * span_bytes(level)));
                }
            }
        }
        found
    }

    fn collect(&self, table: u64, level: u8, ipa: u64, found: &mut Vec<Place>) {
        let Some(entry) = self.tables.get(&table) else {
            return;
        };
        for (&index, &raw) in &entry.words {
            let ipa = ipa + index as u64 * span_bytes(level);
            match self.decode(raw, level) {
                Meaning::Nothing => {}
                Meaning::Table(child) => self.collect(child, level + 1, ipa, found),
                Meaning::Leaf(leaf) => found.push(Place {
                    table,
                    index,
                    raw,
                    ipa,
                    leaf,
                }),
            }
        }
    }
}

/// A leaf and its slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) table: u64,
    pub(super) index: usize,
    pub(super) raw: u64,
    pub(super) ipa: u64,
    pub(super) leaf: Leaf,
}
