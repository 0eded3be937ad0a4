//! Guest accesses: everything that may happen to one, given what memory says and what TLBs may keep.
//!
//! Stage 1 maps `va = ipa + STAGE1_OFFSET`, so that code which takes one for the other is noticed.

extern crate std;

use std::vec::Vec;

use super::descriptor::{Leaf, Meaning, level_of_span, span_bytes};
use super::marks::Mark;
use super::state::{State, base_of, vmid_of};
use crate::addr::{Ipa, Pa, Va};

/// What the fake guest's stage 1 adds to an IPA to get its VA.
pub const STAGE1_OFFSET: u64 = 0x0000_4000_0000_0000;

/// Where the fake guest's stage 1 maps `ipa`.
pub const fn va_of(ipa: Ipa) -> Va {
    Va::new(ipa.raw() + STAGE1_OFFSET)
}

/// Where the fake guest's stage 1 leads from `va`.
pub const fn ipa_of(va: Va) -> Option<Ipa> {
    match va.raw().checked_sub(STAGE1_OFFSET) {
        Some(raw) => Some(Ipa::new(raw)),
        None => None,
    }
}

/// What a guest does to memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An instruction fetch.
    Execute,
}

/// Why stage 2 refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FaultKind {
    /// No valid descriptor.
    Translation,
    /// The access flag is clear.
    AccessFlag,
    /// The leaf forbids it.
    Permission,
}

/// A stage-2 abort as EL2 sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Abort {
    /// Why.
    pub kind: FaultKind,
    /// Level of the descriptor that refused, 0 to 3.
    pub level: u8,
    /// FAR_EL2.
    pub far: Va,
    /// HPFAR_EL2 as an address. A permission fault need not fill it (rule 7), and here it holds nonsense then.
    pub hpfar: Ipa,
}

/// What came of an access.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It reached memory.
    Hit(Pa),
    /// Stage 2 refused it.
    Abort(Abort),
}

/// HPFAR_EL2 where the architecture does not define it.
const POISON: u64 = 0x00de_adde_a000;

/// An outcome, and what hardware does to memory on the way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Possible {
    pub(super) outcome: Outcome,
    pub(super) mark: Option<Mark>,
}

/// One access, as a walker makes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    pub(super) cpu: usize,
    pub(super) root: u64,
    pub(super) vmid: u16,
    /// S2PIR_EL2 of the CPU.
    pub(super) rights: u64,
    pub(super) ipa: Ipa,
    pub(super) access: Access,
}

impl State {
    /// Everything that may come of `access` to `ipa` by the guest on `cpu`, the fresh walk's first. Empty when the CPU
    /// holds no guest.
    pub(super) fn possible(&self, cpu: usize, ipa: Ipa, access: Access) -> Vec<Possible> {
        let Some(on) = self.cpus.get(cpu).filter(|on| base_of(on.vttbr) != 0) else {
            return Vec::new();
        };
        self.possible_by(Walk {
            cpu,
            root: base_of(on.vttbr),
            vmid: vmid_of(on.vttbr),
            rights: on.rights,
            ipa,
            access,
        })
    }

    /// The same for any registers.
    pub(super) fn possible_by(&self, walk: Walk) -> Vec<Possible> {
        let (cpu, vmid, raw) = (walk.cpu, walk.vmid, walk.ipa.raw());
        let mut found = Vec::new();
        let level = self.features.initial_level;
        let table_bytes = span_bytes(level) << 9;
        let table = walk.root + raw / table_bytes * 0x1000;
        if raw / table_bytes < self.features.initial_tables {
            self.walk(&walk, table, level, &mut found);
        } else {
            found.push(self.refuse(FaultKind::Translation, 0, walk.ipa));
        }
        let tables = self.tlb.tables().filter(|stale| {
            stale.vmid == vmid && stale.cpus & (1 << cpu) != 0 && stale.covers(raw)
        });
        for stale in tables {
            self.walk(&walk, stale.table, stale.level, &mut found);
        }
        for stale in self.tlb.overlapping(vmid, raw & !0xfff, 0x1000) {
            if !(stale.covers(raw) && stale.may_hit(cpu, raw)) {
                continue;
            }
            let at = &stale.place;
            if self.asks_memory(&at.leaf, walk.access) {
                continue;
            }
            // A TLB may hold the permission as it was resolved, or the index.
            for rights in [stale.rights, walk.rights] {
                found.push(self.translate(at.ipa, &at.leaf, rights, &walk));
            }
        }
        let mut unique = Vec::new();
        for possible in found {
            if !unique.contains(&possible) {
                unique.push(possible);
            }
        }
        unique
    }

    fn walk(&self, walk: &Walk, table: u64, level: u8, found: &mut Vec<Possible>) {
        let span = span_bytes(level);
        let index = ((walk.ipa.raw() / span) & 511) as usize;
        for raw in self.readings(walk.cpu, table, index) {
            match self.memory.decode(raw, level) {
                Meaning::Nothing => {
                    found.push(self.refuse(FaultKind::Translation, level, walk.ipa));
                }
                Meaning::Table(next) => self.walk(walk, next, level + 1, found),
                Meaning::Leaf(leaf) => {
                    let start = walk.ipa.raw() & !(span - 1);
                    let Some(mark) = self.mark_for(table, index, raw, walk.access) else {
                        found.push(self.translate(start, &leaf, walk.rights, walk));
                        continue;
                    };
                    // An update is made in memory, so that what memory no longer says cannot be updated.
                    if let (true, Meaning::Leaf(leaf)) =
                        (self.is_current(&mark), self.memory.decode(mark.new, level))
                    {
                        let possible = self.translate(start, &leaf, walk.rights, walk);
                        found.push(Possible {
                            mark: Some(mark),
                            ..possible
                        });
                    }
                }
            }
        }
    }

    fn translate(&self, start: u64, leaf: &Leaf, rights: u64, walk: &Walk) -> Possible {
        let level = level_of_span(leaf.bytes);
        if !leaf.young {
            self.refuse(FaultKind::AccessFlag, level, walk.ipa)
        } else if !leaf.permits(walk.access, rights) {
            self.refuse(FaultKind::Permission, level, walk.ipa)
        } else {
            let to = Pa::new(leaf.to + (walk.ipa.raw() - start));
            Possible {
                outcome: Outcome::Hit(to),
                mark: None,
            }
        }
    }

    fn refuse(&self, kind: FaultKind, level: u8, ipa: Ipa) -> Possible {
        let defined = kind != FaultKind::Permission || self.features.hpfar_on_permission;
        let hpfar = Ipa::new(if defined { ipa.raw() & !0xfff } else { POISON });
        let outcome = Outcome::Abort(Abort {
            kind,
            level,
            far: va_of(ipa),
            hpfar,
        });
        Possible {
            outcome,
            mark: None,
        }
    }
}
