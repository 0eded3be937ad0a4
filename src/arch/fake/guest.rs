//! Guest accesses: everything that may happen to one, given what memory says and what TLBs may keep.
//!
//! Stage 1 maps `va = ipa + STAGE1_OFFSET`, so that code which takes one for the other is noticed.

extern crate std;

use std::vec::Vec;

use super::descriptor::{Leaf, Meaning, decode, level_of_span, span_bytes};
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

impl State {
    /// Everything that may come of `access` to `ipa` by the guest on `cpu`, the fresh walk's first. Empty when the CPU
    /// holds no guest.
    pub(super) fn outcomes(&self, cpu: usize, ipa: Ipa, access: Access) -> Vec<Outcome> {
        let Some(vttbr) = self.cpus.get(cpu).map(|cpu| cpu.vttbr) else {
            return Vec::new();
        };
        let (root, vmid) = (base_of(vttbr), vmid_of(vttbr));
        if root == 0 {
            return Vec::new();
        }
        let raw = ipa.raw();
        let mut found = Vec::new();
        let level = self.features.initial_level;
        let table_bytes = span_bytes(level) << 9;
        let table = root + raw / table_bytes * 0x1000;
        if raw / table_bytes < self.features.initial_tables {
            self.walk(cpu, table, level, ipa, access, &mut found);
        } else {
            found.push(self.refuse(FaultKind::Translation, 0, ipa));
        }
        let walks = self.tlb.tables().filter(|stale| {
            stale.vmid == vmid && stale.cpus & (1 << cpu) != 0 && stale.covers(raw)
        });
        for stale in walks {
            self.walk(cpu, stale.table, stale.level, ipa, access, &mut found);
        }
        for stale in self.tlb.overlapping(vmid, raw & !0xfff, 0x1000) {
            if stale.covers(raw) && stale.may_hit(cpu, raw) {
                let at = &stale.place;
                found.push(self.translate(at.ipa, &at.leaf, ipa, access));
            }
        }
        let mut unique = Vec::new();
        for outcome in found {
            if !unique.contains(&outcome) {
                unique.push(outcome);
            }
        }
        unique
    }

    fn walk(
        &self,
        cpu: usize,
        table: u64,
        level: u8,
        ipa: Ipa,
        access: Access,
        found: &mut Vec<Outcome>,
    ) {
        let span = span_bytes(level);
        let index = ((ipa.raw() / span) & 511) as usize;
        for raw in self.readings(cpu, table, index) {
            match decode(raw, level) {
                Meaning::Nothing => found.push(self.refuse(FaultKind::Translation, level, ipa)),
                Meaning::Table(next) => self.walk(cpu, next, level + 1, ipa, access, found),
                Meaning::Leaf(leaf) => {
                    found.push(self.translate(ipa.raw() & !(span - 1), &leaf, ipa, access));
                }
            }
        }
    }

    fn translate(&self, start: u64, leaf: &Leaf, ipa: Ipa, access: Access) -> Outcome {
        let level = level_of_span(leaf.bytes);
        let permitted = match access {
            Access::Read => leaf.read,
            Access::Write => leaf.write,
            Access::Execute => leaf.execute,
        };
        if !leaf.young {
            self.refuse(FaultKind::AccessFlag, level, ipa)
        } else if !permitted {
            self.refuse(FaultKind::Permission, level, ipa)
        } else {
            Outcome::Hit(Pa::new(leaf.to + (ipa.raw() - start)))
        }
    }

    fn refuse(&self, kind: FaultKind, level: u8, ipa: Ipa) -> Outcome {
        let defined = kind != FaultKind::Permission || self.features.hpfar_on_permission;
        let hpfar = Ipa::new(if defined { ipa.raw() & !0xfff } else { POISON });
        Outcome::Abort(Abort {
            kind,
            level,
            far: va_of(ipa),
            hpfar,
        })
    }
}
