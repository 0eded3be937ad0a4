//! S2PIR_EL2: what permission indices mean (FEAT_S2PIE; DDI 0487 issue K.a, D8.4.2 and D24.2), and who remembers what they
//! meant before.
//!
//! The register may be cached in TLBs: an entry may hold the permission that its index led to when it was cached, or the
//! index itself. So each CPU that ran a guest under one value and has another one now may keep every leaf that it could
//! walk to, *resolved* by the old value, until an invalidation; and each stale leaf, wherever it comes from, counts as
//! resolved by what it was cached under and by what the CPU has now.
//!
//! A CPU caches under a value from when it enters the guest: EL2's own registers translate while EL2 runs.

extern crate std;

use std::vec::Vec;

use super::descriptor::{Access as Permissions, Leaf};
use super::guest::{Access, Outcome, Walk};
use super::oracle::Violation;
use super::state::{State, base_of, vmid_of};
use super::tlb::{Cpus, StaleLeaf};
use crate::addr::{Ipa, Pa};

impl Leaf {
    /// Whether this permits `access` where S2PIR_EL2 is `rights`.
    pub(super) fn permits(&self, access: Access, rights: u64) -> bool {
        let (read, write, execute) = match self.access {
            Permissions::Direct {
                read,
                write,
                execute,
                ..
            } => (read, write, execute),
            Permissions::Index { index, dirty } => {
                let right = rights >> (4 * index) & 0b1111;
                let read = right & 0b1000 != 0;
                (
                    read,
                    right >> 2 == 0b11 && dirty,
                    read && right & 0b11 == 0b11,
                )
            }
        };
        match access {
            Access::Read => read,
            Access::Write => write,
            Access::Execute => execute,
        }
    }
}

impl State {
    /// Sets S2PIR_EL2 of the current CPU.
    pub(super) fn set_s2pir(&mut self, rights: u64) {
        let index = self.current;
        let Some(cpu) = self
            .cpus
            .get_mut(index)
            .filter(|_| self.features.indirection)
        else {
            return;
        };
        if core::mem::replace(&mut cpu.rights, rights) != rights {
            let vmid = vmid_of(cpu.vttbr);
            self.forsake_rights(vmid, index);
        }
    }

    /// The guest on `cpu` runs: whatever it can reach may be cached as its registers say.
    pub(super) fn enter(&mut self, cpu: usize) {
        let Some(on) = self.cpus.get_mut(cpu) else {
            return;
        };
        let (vttbr, rights) = (on.vttbr, on.rights);
        if core::mem::replace(&mut on.outside, false) {
            self.hold(cpu, vttbr);
        }
        let vmid = vmid_of(vttbr);
        if base_of(vttbr) == 0 || self.rights_in(vmid, cpu) == Some(rights) {
            return;
        }
        self.forsake_rights(vmid, cpu);
        if self.features.indirection {
            self.tlb.walks(vmid, cpu, rights);
        }
        if let Some(context) = self.contexts.get_mut(&vmid) {
            context.rights.insert(cpu, rights);
        }
    }

    /// What `cpu` last ran under with `vmid`, if it may still have anything cached.
    fn rights_in(&self, vmid: u16, cpu: usize) -> Option<u64> {
        self.contexts.get(&vmid)?.rights.get(&cpu).copied()
    }

    /// `cpu` no longer runs `vmid` under what it ran under before: what it cached stays, resolved.
    fn forsake_rights(&mut self, vmid: u16, cpu: usize) {
        let Some(context) = self.contexts.get_mut(&vmid) else {
            return;
        };
        let (root, rights) = (context.root, context.rights.remove(&cpu));
        if let Some(rights) = rights {
            let stale = self.tlb.held_by(vmid, cpu);
            let found = self.leaves_of(root).into_iter().filter(|at| at.leaf.young);
            for place in found.chain(stale) {
                self.tlb.add_resolved(vmid, place, rights, 1 << cpu);
            }
        }
    }

    /// By which values of S2PIR_EL2 `cpus` may hold entries of `vmid`.
    pub(super) fn rights_of(&self, vmid: u16, cpus: Cpus) -> Vec<(u64, Cpus)> {
        let mut found: Vec<(u64, Cpus)> = Vec::new();
        for cpu in (0..self.cpus.len()).filter(|cpu| cpus & (1 << cpu) != 0) {
            let loaded = self.cpus.get(cpu).map_or(0, |cpu| cpu.rights);
            let rights = self.rights_in(vmid, cpu).unwrap_or(loaded);
            match found.iter_mut().find(|(other, _)| *other == rights) {
                Some((_, cpus)) => *cpus |= 1 << cpu,
                None => found.push((rights, 1 << cpu)),
            }
        }
        found
    }

    /// Whether some CPU that holds the stale `leaf` may write by it.
    pub(super) fn permits_writes(&self, leaf: &StaleLeaf) -> bool {
        let held = leaf.held();
        let now = self.cpus.iter().enumerate();
        let mut now = now.filter(|(cpu, _)| held & (1 << cpu) != 0);
        let at = &leaf.place.leaf;
        at.permits(Access::Write, leaf.rights)
            || now.any(|(_, cpu)| at.permits(Access::Write, cpu.rights))
    }

    /// Whether some CPU that holds `leaf` has another S2PIR_EL2 than it was resolved by.
    pub(super) fn is_resolved_otherwise(&self, leaf: &StaleLeaf) -> bool {
        let held = leaf.held();
        let mut cpus = self.cpus.iter().enumerate();
        cpus.any(|(cpu, on)| held & (1 << cpu) != 0 && on.rights != leaf.rights)
    }

    /// Reports every CPU that may write to the page `memory` at `ipa`, under a VMID that some CPU has loaded, unless
    /// hardware marks that. One that sleeps at EL2 may not: it is judged again when it comes back.
    pub(super) fn judge_unwritable(&mut self, ipa: Ipa, memory: Pa) {
        let mut found = Vec::new();
        for (&vmid, context) in &self.contexts {
            if self.holders(vmid) == 0 {
                continue;
            }
            for (rights, cpus) in self.rights_of(vmid, context.cpus) {
                let inside = self.cpus.iter().enumerate();
                let inside = inside.filter(|(cpu, on)| cpus & (1 << cpu) != 0 && !on.outside);
                for (cpu, _) in inside {
                    let walk = Walk {
                        cpu,
                        root: context.root,
                        vmid,
                        rights,
                        ipa,
                        access: Access::Write,
                    };
                    let reaches = self.possible_by(walk).into_iter().any(|possible| {
                        possible.outcome == Outcome::Hit(memory) && possible.mark.is_none()
                    });
                    if reaches || self.writes_by_alias(&walk, memory) {
                        found.push(Violation::WritableUnrecorded { ipa, vmid, cpu });
                    }
                }
            }
        }
        self.violations.extend(found);
    }

    fn writes_by_alias(&self, walk: &Walk, memory: Pa) -> bool {
        let stale = self.tlb.overlapping(walk.vmid, walk.ipa.raw(), 0x1000);
        stale.into_iter().any(|stale| {
            let at = &stale.place;
            let to = at.leaf.to.wrapping_add(walk.ipa.raw().wrapping_sub(at.ipa));
            let permits = |rights| at.leaf.permits(Access::Write, rights);
            stale.alias & (1 << walk.cpu) != 0
                && to == memory.raw()
                && (permits(stale.rights) || permits(walk.rights))
        })
    }
}
