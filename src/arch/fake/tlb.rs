//! Everything that the TLBs of the fake machine may keep although memory says otherwise by now.
//!
//! What memory says *now* may always be cached and needs no record. Recorded is each leaf and each table descriptor that
//! was replaced while a CPU could walk to it, with the CPUs that may still hold it, in three forms:
//!
//! Each is recorded with the S2PIR_EL2 that its permission was resolved by (`rights`). A leaf that memory still holds is
//! recorded, too, when it was cached under another value than its CPU has now.
//!
//! | form | dropped by |
//! |---|---|
//! | stage 2 only, and table entries (walk caches) | IPAS2E1, RIPAS2E1, VMALLS12E1, ALLE1 |
//! | combined with stage 1, under the address the test uses | VAAE1, VMALLE1, VMALLS12E1, ALLE1 |
//! | combined with stage 1, under an alias | VMALLE1, VMALLS12E1, ALLE1 |
//!
//! An invalidation drops what it covers once its DSB has completed it, and only where the entry could not have been
//! cached anew meanwhile: the new descriptor must be visible to that CPU's walker when the invalidation is issued, no
//! stale table entry may lead to the old one, and a combined entry must have no stage-2 entry left to be derived from.

extern crate std;

use std::collections::BTreeMap;
use std::vec::Vec;

use super::descriptor::span_bytes;
use super::memory::{Place, Tables};

/// A set of CPUs, one bit each.
pub(super) type Cpus = u64;
pub(super) const ALL_CPUS: Cpus = u64::MAX;
const PAGE_BYTES: u64 = 0x1000;

/// Why a stale entry is still there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// Nothing that covers it was issued.
    NotInvalidated,
    /// Its stage-2 form was invalidated, the one combined with stage 1 was not.
    CombinedLeft,
    /// Stage 1 was invalidated first: the combined form was derived again.
    WrongOrder,
    /// The address was invalidated, under another VMID.
    WrongVmid,
    /// It was invalidated before a barrier made the new descriptor visible to walkers.
    BeforeBarrier,
    /// Its invalidation has not been completed by a DSB.
    NotCompleted,
}

/// What an invalidation covers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    Stage2 { ipa: u64, bytes: u64 },
    Stage1,
    Stage1Page { ipa: u64 },
    Vmid,
    Everything,
}

/// A leaf that memory no longer holds.
#[derive(Clone, Debug)]
pub(super) struct StaleLeaf {
    pub(super) place: Place,
    pub(super) vmid: u16,
    /// S2PIR_EL2 when it was cached; 0 with direct permissions.
    pub(super) rights: u64,
    pub(super) stage2: Cpus,
    pub(super) combined: Cpus,
    pub(super) alias: Cpus,
    /// CPUs whose walkers certainly see what replaced it.
    sees_new: Cpus,
    doomed: Vec<Doom>,
    /// Pages of a block whose combined entry was dropped from a CPU.
    evicted: Vec<(Cpus, u64)>,
    unsynchronized: bool,
    wrong_order: bool,
    wrong_vmid: bool,
}

/// Forms that an issued invalidation drops when it completes.
#[derive(Clone, Copy, Debug)]
struct Doom {
    by: u64,
    stage2: Cpus,
    combined: Cpus,
    alias: Cpus,
    /// Only this page's combined entry.
    page: Option<u64>,
}

impl Doom {
    /// Leaves `cpus` alone; whether anything is left.
    fn spare(&mut self, cpus: Cpus) -> bool {
        for form in [&mut self.stage2, &mut self.combined, &mut self.alias] {
            *form &= !cpus;
        }
        self.stage2 | self.combined | self.alias != 0
    }
}

/// A table descriptor that memory no longer holds.
#[derive(Clone, Debug)]
pub(super) struct StaleTable {
    pub(super) vmid: u16,
    pub(super) ipa: u64,
    /// The table it leads to, and that table's level.
    pub(super) table: u64,
    pub(super) level: u8,
    pub(super) cpus: Cpus,
    sees_new: Cpus,
    doomed: Vec<(u64, Cpus)>,
}

#[derive(Debug)]
struct Issued {
    id: u64,
    order: Order,
}

/// The stale contents of all TLBs.
#[derive(Debug, Default)]
pub(super) struct Tlb {
    leaves: BTreeMap<(u16, u64), Vec<StaleLeaf>>,
    tables: Vec<StaleTable>,
    issued: Vec<Issued>,
    next: u64,
}

impl StaleLeaf {
    /// Whether any TLB may hold this in any form.
    pub(super) fn is_held(&self) -> bool {
        self.held() != 0
    }

    /// CPUs that may hold this in any form.
    pub(super) fn held(&self) -> Cpus {
        self.stage2 | self.combined | self.alias
    }

    /// Whether an access by `cpu` to the page at `ipa` may use this.
    pub(super) fn may_hit(&self, cpu: usize, ipa: u64) -> bool {
        let bit = 1 << cpu;
        let page = ipa & !(PAGE_BYTES - 1);
        let evicted = self
            .evicted
            .iter()
            .any(|(cpus, at)| cpus & bit != 0 && *at == page);
        self.stage2 & bit != 0 || self.combined & bit != 0 && !evicted
    }

    pub(super) fn covers(&self, ipa: u64) -> bool {
        ipa.wrapping_sub(self.place.ipa) < self.place.leaf.bytes
    }

    pub(super) fn cause(&self) -> Cause {
        if !self.doomed.is_empty() {
            Cause::NotCompleted
        } else if self.unsynchronized {
            Cause::BeforeBarrier
        } else if self.stage2 == 0 && self.wrong_order {
            Cause::WrongOrder
        } else if self.wrong_vmid {
            Cause::WrongVmid
        } else if self.stage2 == 0 {
            Cause::CombinedLeft
        } else {
            Cause::NotInvalidated
        }
    }

    /// Notes that invalidation `by` will drop what of this cannot come back. `walkers` reach the old slot still; `others`
    /// walk no more, or bring it back resolved otherwise, by the S2PIR_EL2 that they have now.
    fn doom(&mut self, by: u64, scope: Scope, targets: Cpus, walkers: Cpus, others: Cpus) {
        let stuck = (!self.sees_new | walkers) & !others;
        let from_stage2 = stuck | self.stage2;
        let (stage2, combined, alias) = match scope {
            Scope::Stage2 { .. } => (!stuck, 0, 0),
            Scope::Stage1 => (0, !from_stage2, !from_stage2),
            Scope::Stage1Page { .. } => (0, !from_stage2, 0),
            Scope::Vmid | Scope::Everything => (!stuck, !stuck, !stuck),
        };
        let held = targets & self.held();
        self.unsynchronized |= held & !self.sees_new != 0;
        if matches!(scope, Scope::Stage1 | Scope::Stage1Page { .. }) {
            self.wrong_order |= targets & (self.combined | self.alias) & self.stage2 != 0;
        }
        let page = match scope {
            Scope::Stage1Page { ipa } if self.place.leaf.bytes > PAGE_BYTES => {
                Some(ipa & !(PAGE_BYTES - 1))
            }
            _ => None,
        };
        let doom = Doom {
            by,
            stage2: targets & self.stage2 & stage2,
            combined: targets & self.combined & combined,
            alias: targets & self.alias & alias,
            page,
        };
        if doom.stage2 | doom.combined | doom.alias != 0 {
            self.doomed.push(doom);
        }
    }

    fn settle(&mut self, by: u64) {
        let (done, left): (Vec<_>, Vec<_>) = self.doomed.iter().partition(|doom| doom.by == by);
        self.doomed = left;
        for doom in done {
            self.stage2 &= !doom.stage2;
            self.alias &= !doom.alias;
            match doom.page {
                Some(page) => self.evicted.push((doom.combined, page)),
                None => self.combined &= !doom.combined,
            }
        }
    }

    fn is_gone(&self) -> bool {
        !self.is_held() && self.sees_new == ALL_CPUS
    }
}

impl StaleTable {
    pub(super) fn bytes(&self) -> u64 {
        span_bytes(self.level - 1)
    }

    pub(super) fn covers(&self, ipa: u64) -> bool {
        ipa.wrapping_sub(self.ipa) < self.bytes()
    }

    fn overlaps(&self, ipa: u64, bytes: u64) -> bool {
        self.ipa < ipa.saturating_add(bytes) && ipa < self.ipa + self.bytes()
    }
}

impl Tlb {
    /// Records that `place` was replaced while `cpus`, whose S2PIR_EL2 was `rights`, could walk to it under `vmid`.
    pub(super) fn add_leaf(&mut self, vmid: u16, place: Place, rights: u64, cpus: Cpus) {
        self.add(vmid, place, rights, cpus, 0);
    }

    /// Records that `cpus` may have cached `place` by an S2PIR_EL2 that was `rights`, and walk by another one now.
    pub(super) fn add_resolved(&mut self, vmid: u16, place: Place, rights: u64, cpus: Cpus) {
        self.add(vmid, place, rights, cpus, ALL_CPUS);
    }

    fn add(&mut self, vmid: u16, place: Place, rights: u64, cpus: Cpus, sees_new: Cpus) {
        let fresh = StaleLeaf {
            place,
            vmid,
            rights,
            stage2: cpus,
            combined: cpus,
            alias: cpus,
            sees_new,
            doomed: Vec::new(),
            evicted: Vec::new(),
            unsynchronized: false,
            wrong_order: false,
            wrong_vmid: false,
        };
        let leaves = self.leaves.entry((vmid, place.ipa)).or_default();
        let same = |leaf: &&mut StaleLeaf| {
            let at = leaf.place;
            at.leaf == place.leaf
                && at.table == place.table
                && at.index == place.index
                && leaf.rights == rights
        };
        match leaves.iter_mut().find(same) {
            Some(leaf) => {
                let held = (leaf.stage2, leaf.combined, leaf.alias);
                let mut doomed = core::mem::take(&mut leaf.doomed);
                // What is cached anew is not dropped by what was issued before.
                doomed.retain_mut(|doom| sees_new != 0 && doom.spare(cpus));
                let sees_new = leaf.sees_new & sees_new;
                *leaf = StaleLeaf {
                    doomed,
                    sees_new,
                    ..fresh
                };
                leaf.stage2 |= held.0;
                leaf.combined |= held.1;
                leaf.alias |= held.2;
            }
            None => leaves.push(fresh),
        }
    }

    /// Records that a descriptor for `table`, which is of `level` and translates from `ipa`, was replaced.
    pub(super) fn add_table(&mut self, vmid: u16, table: u64, level: u8, ipa: u64, cpus: Cpus) {
        self.tables.push(StaleTable {
            vmid,
            ipa,
            table,
            level,
            cpus,
            sees_new: 0,
            doomed: Vec::new(),
        });
    }

    /// Stale table entries.
    pub(super) fn tables(&self) -> impl Iterator<Item = &StaleTable> {
        self.tables.iter().filter(|table| table.cpus != 0)
    }

    /// Stale leaves under `vmid` that translate any of `bytes` bytes from `ipa`.
    pub(super) fn overlapping(&self, vmid: u16, ipa: u64, bytes: u64) -> Vec<&StaleLeaf> {
        let inside = self
            .leaves
            .range((vmid, ipa)..(vmid, ipa.saturating_add(bytes)));
        let blocks = enclosing(ipa).filter_map(|(start, span)| {
            let leaves = self.leaves.get(&(vmid, start))?;
            Some(
                leaves
                    .iter()
                    .filter(move |leaf| leaf.place.leaf.bytes == span),
            )
        });
        inside
            .flat_map(|(_, leaves)| leaves)
            .chain(blocks.flatten())
            .filter(|leaf| leaf.is_held())
            .collect()
    }

    /// Stale leaves under `vmid` that `cpu` may hold.
    pub(super) fn held_by(&self, vmid: u16, cpu: usize) -> Vec<Place> {
        let held = |leaf: &&StaleLeaf| leaf.held() & (1 << cpu) != 0;
        self.leaves
            .range((vmid, 0)..=(vmid, u64::MAX))
            .flat_map(|(_, leaves)| leaves)
            .filter(held)
            .map(|leaf| leaf.place)
            .collect()
    }

    /// Stale leaves under any VMID.
    pub(super) fn leaves(&self) -> impl Iterator<Item = &StaleLeaf> {
        self.leaves.values().flatten().filter(|leaf| leaf.is_held())
    }

    /// `cpu` walks under `vmid` and by `rights`: it may yet find what it does not see replaced.
    pub(super) fn walks(&mut self, vmid: u16, cpu: usize, rights: u64) {
        let bit = 1 << cpu;
        let leaves = self.leaves.range((vmid, 0)..=(vmid, u64::MAX));
        let unseen = leaves.flat_map(|(_, leaves)| leaves);
        let unseen = unseen.filter(|leaf| leaf.sees_new & bit == 0);
        let unseen: Vec<_> = unseen.map(|leaf| (leaf.place, leaf.sees_new)).collect();
        for (place, sees_new) in unseen {
            self.add(vmid, place, rights, bit, sees_new);
        }
    }

    /// `cpu` loads `vmid`.
    pub(super) fn load(&mut self, vmid: u16, cpu: usize) {
        let bit = 1 << cpu;
        for table in &mut self.tables {
            if table.vmid == vmid && table.sees_new & bit == 0 {
                table.cpus |= bit;
            }
        }
        for issued in &mut self.issued {
            for (forgotten, cpus) in &mut issued.order.forgets {
                if *forgotten == vmid {
                    *cpus &= !bit;
                }
            }
        }
    }

    /// A barrier: the walkers of `cpus` see every replacement so far.
    pub(super) fn show(&mut self, cpus: Cpus) {
        self.leaves.retain(|_, leaves| {
            for leaf in &mut *leaves {
                leaf.sees_new |= cpus;
            }
            leaves.retain(|leaf| !leaf.is_gone());
            !leaves.is_empty()
        });
        for table in &mut self.tables {
            table.sees_new |= cpus;
        }
        self.tables
            .retain(|table| table.cpus != 0 || table.sees_new != ALL_CPUS);
    }

    /// Issues an invalidation.
    pub(super) fn issue(&mut self, order: Order, memory: &Tables) {
        let by = self.next;
        self.next += 1;
        let Order {
            vmid,
            scope,
            targets,
            ref now,
            ..
        } = order;
        let mut anew = Vec::new();
        for table in &mut self.tables {
            let hit = match scope {
                Scope::Stage2 { ipa, bytes } => table.vmid == vmid && table.overlaps(ipa, bytes),
                Scope::Stage1 | Scope::Stage1Page { .. } => false,
                Scope::Vmid => table.vmid == vmid,
                Scope::Everything => true,
            };
            if hit {
                table
                    .doomed
                    .push((by, targets & table.cpus & table.sees_new));
            }
        }
        let tables = core::mem::take(&mut self.tables);
        self.visit(scope, vmid, |leaf| {
            let walkers = walkers(leaf, &tables, by, memory);
            let mut others = 0;
            let walked = !matches!(scope, Scope::Stage1 | Scope::Stage1Page { .. });
            let otherwise = |(rights, _): &&(u64, Cpus)| walked && *rights != leaf.rights;
            for (rights, cpus) in now.iter().filter(otherwise) {
                others |= cpus;
                let back = (!leaf.sees_new | walkers) & leaf.held() & targets & cpus;
                if back != 0 {
                    anew.push((leaf.vmid, leaf.place, *rights, back, leaf.sees_new));
                }
            }
            let idle = now.iter().fold(ALL_CPUS, |idle, (_, cpus)| idle & !cpus);
            leaf.doom(by, scope, targets, walkers, others | idle & !walkers);
        });
        self.tables = tables;
        for (vmid, place, rights, cpus, sees_new) in anew {
            self.add(vmid, place, rights, cpus, sees_new);
        }
        if let Scope::Stage2 { ipa, bytes } = scope {
            self.blame_vmid(vmid, ipa, bytes);
        }
        self.issued.push(Issued { id: by, order });
    }

    /// A DSB by `cpu` completes its invalidations, or only its local ones. Returns the contexts that CPUs forgot.
    pub(super) fn complete(&mut self, cpu: usize, local_only: bool) -> Vec<(u16, Cpus)> {
        let (done, left) = core::mem::take(&mut self.issued)
            .into_iter()
            .partition(|Issued { order, .. }| order.cpu == cpu && !(local_only && order.broadcast));
        self.issued = left;
        let done: Vec<Issued> = done;
        let mut forgotten = Vec::new();
        for Issued { id, order } in done {
            for table in &mut self.tables {
                for (by, cpus) in &table.doomed {
                    if *by == id {
                        table.cpus &= !cpus;
                    }
                }
                table.doomed.retain(|(by, _)| *by != id);
            }
            self.visit(order.scope, order.vmid, |leaf| leaf.settle(id));
            forgotten.extend(order.forgets);
        }
        self.tables
            .retain(|table| table.cpus != 0 || table.sees_new != ALL_CPUS);
        forgotten
    }

    /// Visits the leaves that an invalidation of `scope` under `vmid` can concern.
    fn visit(&mut self, scope: Scope, vmid: u16, mut work: impl FnMut(&mut StaleLeaf)) {
        let (from, to) = match scope {
            Scope::Stage2 { ipa, bytes } => ((vmid, ipa), (vmid, ipa.saturating_add(bytes - 1))),
            Scope::Stage1Page { ipa } => ((vmid, ipa), (vmid, ipa + PAGE_BYTES - 1)),
            Scope::Stage1 | Scope::Vmid => ((vmid, 0), (vmid, u64::MAX)),
            Scope::Everything => ((0, 0), (u16::MAX, u64::MAX)),
        };
        let mut empty = Vec::new();
        for (key, leaves) in self.leaves.range_mut(from..=to) {
            leaves.iter_mut().for_each(&mut work);
            leaves.retain(|leaf| !leaf.is_gone());
            if leaves.is_empty() {
                empty.push(*key);
            }
        }
        for (start, span) in enclosing(from.1) {
            if let Some(leaves) = self.leaves.get_mut(&(vmid, start)) {
                leaves
                    .iter_mut()
                    .filter(|leaf| leaf.place.leaf.bytes == span)
                    .for_each(&mut work);
            }
        }
        for key in empty {
            self.leaves.remove(&key);
        }
    }

    fn blame_vmid(&mut self, vmid: u16, ipa: u64, bytes: u64) {
        for leaf in self.leaves.values_mut().flatten() {
            let hit = leaf.place.ipa < ipa.saturating_add(bytes)
                && ipa < leaf.place.ipa + leaf.place.leaf.bytes;
            leaf.wrong_vmid |= hit && leaf.vmid != vmid;
        }
    }
}

/// What [`Tlb::issue`] is told.
#[derive(Debug)]
pub(super) struct Order {
    /// Whose DSB completes it.
    pub(super) cpu: usize,
    pub(super) vmid: u16,
    pub(super) scope: Scope,
    pub(super) targets: Cpus,
    pub(super) broadcast: bool,
    /// S2PIR_EL2 of the CPUs that walk under the VMID, or under any if there is none.
    pub(super) now: Vec<(u64, Cpus)>,
    /// Which CPUs hold nothing of which VMID any more once it is complete, memory's present contents included.
    pub(super) forgets: Vec<(u16, Cpus)>,
}

/// Starts and sizes of the blocks that would translate `ipa` and begin below it.
fn enclosing(ipa: u64) -> impl Iterator<Item = (u64, u64)> {
    [2, 1]
        .into_iter()
        .map(move |level| (ipa & !(span_bytes(level) - 1), span_bytes(level)))
        .filter(move |(start, _)| *start < ipa)
}

/// CPUs that still walk to the slot of `leaf` and find it there, once invalidation `by` is complete.
fn walkers(leaf: &StaleLeaf, tables: &[StaleTable], by: u64, memory: &Tables) -> Cpus {
    if memory.word(leaf.place.table, leaf.place.index) != leaf.place.raw {
        return 0;
    }
    tables
        .iter()
        .filter(|table| table.vmid == leaf.vmid && table.covers(leaf.place.ipa))
        .fold(0, |cpus, table| {
            let doomed = table.doomed.iter().filter(|(id, _)| *id == by);
            cpus | table.cpus & !doomed.fold(0, |all, (_, cpus)| all | cpus)
        })
}
