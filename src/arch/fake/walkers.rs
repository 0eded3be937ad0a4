//! Software walkers: which CPUs may still look at a table although it hangs nowhere any more.
//!
//! A CPU inside a section may have walked to a table before it was unlinked. Once it has left that section it refers to
//! no such table: when each has, a grace period is over (rule 20).

extern crate std;

use std::collections::BTreeMap;
use std::vec::Vec;

use super::tlb::Cpus;

/// Sections of each CPU, and the tables that were unlinked during them.
#[derive(Debug)]
pub(super) struct Walkers {
    /// Sections that each CPU is in: those of different domains nest.
    depths: Vec<u32>,
    /// Unlinked tables, with the CPUs that are still in the section they were in then.
    unlinked: BTreeMap<u64, Cpus>,
}

impl Walkers {
    /// Nobody walks.
    pub(super) fn new(cpus: usize) -> Self {
        Self {
            depths: std::vec![0; cpus],
            unlinked: BTreeMap::new(),
        }
    }

    /// `cpu` enters a section, or leaves one.
    pub(super) fn note(&mut self, cpu: usize, entered: bool) {
        let Some(depth) = self.depths.get_mut(cpu) else {
            return;
        };
        *depth = if entered {
            *depth + 1
        } else {
            depth.saturating_sub(1)
        };
        if *depth == 0 {
            self.unlinked.retain(|_, cpus| {
                *cpus &= !(1 << cpu);
                *cpus != 0
            });
        }
    }

    /// `table` was unlinked: whoever is in a section now may refer to it, but for `sole`.
    pub(super) fn unlink(&mut self, table: u64, sole: Option<usize>) {
        let inside =
            |(cpu, depth): (usize, &u32)| u64::from(*depth > 0 && sole != Some(cpu)) << cpu;
        let inside = self.depths.iter().enumerate().map(inside);
        let inside = inside.fold(0, |all, bit| all | bit);
        if inside != 0 {
            *self.unlinked.entry(table).or_default() |= inside;
        }
    }

    /// `table` ends: whether somebody may still refer to it.
    pub(super) fn end(&mut self, table: u64) -> bool {
        self.unlinked.remove(&table).is_some()
    }
}
