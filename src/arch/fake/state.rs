//! The state of one fake machine, and what each instruction does to it.

extern crate std;

use std::collections::BTreeMap;
use std::vec::Vec;

use super::Features;
use super::descriptor::{Meaning, span_bytes};
use super::memory::{Home, Place, Tables, Up};
use super::oracle::{Violation, needs_break};
use super::tlb::{ALL_CPUS, Cpus, Order, Scope, StaleLeaf, Tlb};
use super::walkers::Walkers;
use crate::addr::{Ipa, Pa};

const PAGE_BYTES: u64 = 0x1000;
const SLOT_BYTES: u64 = 8;
/// VTTBR_EL2: base in bits 47:1 (bit 0 is CnP), VMID in 63:48.
const BASE: u64 = 0x0000_ffff_ffff_f000;
const VMID_SHIFT: u32 = 48;

/// One CPU.
#[derive(Debug)]
pub(super) struct Cpu {
    /// VTTBR_EL2 as loaded for a guest.
    pub(super) vttbr: u64,
    /// VTTBR_EL2 while an invalidation is issued for another guest. Stage-1 walks are forbidden meanwhile, so nothing
    /// is cached under it.
    pub(super) borrowed: Option<u64>,
    /// S2PIR_EL2; 0 where permissions are direct.
    pub(super) rights: u64,
    /// It stays at EL2 until it enters the guest anew.
    pub(super) outside: bool,
}

/// Who may have cached anything under a VMID.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) root: u64,
    pub(super) cpus: Cpus,
    /// S2PIR_EL2 of CPUs when they ran under this VMID last.
    pub(super) rights: BTreeMap<usize, u64>,
}

/// A descriptor's former value, which some CPU's walker may still read.
#[derive(Debug)]
struct Former {
    table: u64,
    index: usize,
    raw: u64,
    sees_new: Cpus,
}

/// Everything about one machine.
#[derive(Debug)]
pub(super) struct State {
    pub(super) features: Features,
    pub(super) cpus: Vec<Cpu>,
    pub(super) current: usize,
    pub(super) memory: Tables,
    pub(super) tlb: Tlb,
    pub(super) walkers: Walkers,
    pub(super) contexts: BTreeMap<u16, Context>,
    /// Whether a live table is memory of this process.
    pub(super) tables_are_memory: bool,
    formers: Vec<Former>,
    pub(super) violations: Vec<Violation>,
}

pub(super) const fn base_of(vttbr: u64) -> u64 {
    vttbr & BASE
}

pub(super) const fn vmid_of(vttbr: u64) -> u16 {
    (vttbr >> VMID_SHIFT) as u16
}

impl State {
    pub(super) fn new(cpus: usize, features: Features) -> Self {
        Self {
            features,
            cpus: (0..cpus)
                .map(|_| Cpu {
                    vttbr: 0,
                    borrowed: None,
                    rights: 0,
                    outside: false,
                })
                .collect(),
            current: 0,
            memory: Tables::new(features.indirection),
            tlb: Tlb::default(),
            walkers: Walkers::new(cpus),
            contexts: BTreeMap::new(),
            tables_are_memory: false,
            formers: Vec::new(),
            violations: Vec::new(),
        }
    }

    pub(super) fn report(&mut self, violation: Violation) {
        self.violations.push(violation);
    }

    /// VTTBR_EL2 of the current CPU.
    pub(super) fn vttbr(&self) -> u64 {
        self.cpus
            .get(self.current)
            .map_or(0, |cpu| cpu.borrowed.unwrap_or(cpu.vttbr))
    }

    /// Loads VTTBR_EL2 of the current CPU for a guest.
    pub(super) fn load(&mut self, vttbr: u64) {
        let cpu = self.current;
        if let Some(cpu) = self.cpus.get_mut(cpu) {
            cpu.vttbr = vttbr;
            cpu.outside = false;
        }
        self.hold(cpu, vttbr);
    }

    /// `cpu` walks by `vttbr` from here on.
    pub(super) fn hold(&mut self, cpu: usize, vttbr: u64) {
        let (root, vmid) = (base_of(vttbr), vmid_of(vttbr));
        if root == 0 {
            return;
        }
        if !self.memory.is_live(root) {
            if vmid != 0 {
                self.report(Violation::RootIsNoTable {
                    root: Pa::new(root),
                });
            }
            return;
        }
        let known = self.contexts.get(&vmid);
        if known.is_none_or(|context| context.root != root) {
            self.judge_root(vmid, root);
        }
        let context = self.contexts.entry(vmid).or_insert_with(|| Context {
            root,
            cpus: 0,
            rights: BTreeMap::new(),
        });
        let other = |at: u64| vmid_of(at) == vmid && base_of(at) != root && base_of(at) != 0;
        // One that sleeps at EL2 with another root has nothing cached, and is about to (rule 21).
        let named = self.cpus.iter().any(|cpu| other(cpu.vttbr));
        let mixed = named || context.root != root && context.cpus != 0;
        context.root = root;
        context.cpus |= 1 << cpu;
        if mixed {
            self.report(Violation::VmidWithTwoRoots { vmid });
        }
        self.tlb.load(vmid, cpu);
        if !self.features.indirection {
            self.tlb.walks(vmid, cpu, 0);
        }
        let level = self.features.initial_level;
        for page in 0..self.features.initial_tables {
            let ipa = page << (12 + 9 * (4 - u32::from(level)));
            let up = Up::Root(root);
            self.memory
                .hang(root + page * PAGE_BYTES, Home { level, ipa, up });
        }
    }

    /// DSB. Everything that the host program did so far counts as observed by the CPU that executes it, whoever stored
    /// it: by multi-copy atomicity, what a CPU has read is visible to all once its DSB is complete.
    pub(super) fn dsb(&mut self, inner: bool, loads_too: bool) {
        let cpu = self.current;
        let seers = if inner { ALL_CPUS } else { 1 << cpu };
        self.tlb.show(seers);
        self.formers.retain_mut(|former| {
            former.sees_new |= seers;
            former.sees_new != ALL_CPUS
        });
        if loads_too {
            for (vmid, cpus) in self.tlb.complete(cpu, !inner) {
                if let Some(context) = self.contexts.get_mut(&vmid) {
                    context.cpus &= !cpus;
                    context.rights.retain(|cpu, _| cpus & (1 << cpu) == 0);
                }
            }
            self.contexts.retain(|_, context| context.cpus != 0);
        }
    }

    /// TLBI.
    pub(super) fn invalidate(&mut self, scope: Scope, broadcast: bool) {
        let cpu = self.current;
        let vttbr = self.vttbr();
        let vmid = vmid_of(vttbr);
        if scope != Scope::Everything && (vmid == 0 || base_of(vttbr) == 0) {
            self.report(Violation::InvalidatedNoGuest);
        }
        let targets = if broadcast { ALL_CPUS } else { 1 << cpu };
        let forgets = self
            .contexts
            .iter()
            .filter(|(at, _)| match scope {
                Scope::Everything => true,
                Scope::Vmid => **at == vmid,
                _ => false,
            })
            .map(|(at, _)| (*at, targets & !self.holders(*at)))
            .collect();
        let order = Order {
            cpu,
            vmid,
            scope,
            targets,
            broadcast,
            now: self.registers(vmid, scope),
            forgets,
        };
        self.tlb.issue(order, &self.memory);
    }

    /// S2PIR_EL2 of the CPUs that walk under what an invalidation concerns.
    fn registers(&self, vmid: u16, scope: Scope) -> Vec<(u64, Cpus)> {
        let walking = match scope {
            Scope::Everything => ALL_CPUS,
            _ => self.holders(vmid),
        };
        let cpus = self.cpus.iter().enumerate();
        let cpus = cpus.filter(|(index, _)| walking & (1 << index) != 0);
        cpus.map(|(index, cpu)| (cpu.rights, 1 << index)).collect()
    }

    /// CPUs whose VTTBR_EL2 names `vmid` for a guest, but for those that walk by it no more until they enter anew.
    pub(super) fn holders(&self, vmid: u16) -> Cpus {
        let holds = |(index, cpu): (usize, &Cpu)| {
            u64::from(vmid_of(cpu.vttbr) == vmid && !cpu.outside) << index
        };
        self.cpus
            .iter()
            .enumerate()
            .map(holds)
            .fold(0, |all, bit| all | bit)
    }

    /// The VMIDs under which CPUs may walk through `table`, now or by what they cached.
    pub(super) fn reachers(&self, table: u64) -> BTreeMap<u16, Cpus> {
        let mut found = BTreeMap::new();
        match self.memory.home(table).map(|home| (home, home.up)) {
            Some((_, Up::Root(root))) => {
                for (vmid, context) in &self.contexts {
                    if context.root == root {
                        *found.entry(*vmid).or_default() |= context.cpus;
                    }
                }
            }
            Some((home, Up::Slot { table: up, index })) => {
                let raw = self.memory.word(up, index);
                if self.memory.decode(raw, home.level - 1) == Meaning::Table(table) {
                    found = self.reachers(up);
                }
            }
            None => {}
        }
        for stale in self.tlb.tables().filter(|stale| stale.table == table) {
            *found.entry(stale.vmid).or_default() |= stale.cpus;
        }
        found
    }

    /// Everything that the walker of `cpu` may read from a slot.
    pub(super) fn readings(&self, cpu: usize, table: u64, index: usize) -> Vec<u64> {
        let mut raws = std::vec![self.memory.word(table, index)];
        for former in &self.formers {
            let here = former.table == table && former.index == index;
            if here && former.sees_new & (1 << cpu) == 0 && !raws.contains(&former.raw) {
                raws.push(former.raw);
            }
        }
        raws
    }

    /// `table` begins or ends.
    pub(super) fn note_table(&mut self, table: u64, live: bool) {
        let pa = Pa::new(table);
        let stale = self.tlb.tables().any(|stale| stale.table == table);
        if live {
            if stale {
                self.report(Violation::TableReusedWhileWalkable { table: pa });
            }
            if !self.memory.insert(table) {
                self.report(Violation::TableLifeConfused { table: pa });
            }
            return;
        }
        if self.walkers.end(table) {
            self.report(Violation::TableFreedInGracePeriod { table: pa });
        }
        if !self.memory.is_live(table) {
            self.report(Violation::TableLifeConfused { table: pa });
        } else if !self.reachers(table).is_empty() {
            let is_root = matches!(
                self.memory.home(table),
                Some(Home {
                    up: Up::Root(_),
                    ..
                })
            );
            self.report(match is_root {
                true => Violation::RootFreedWhileLoaded { root: pa },
                false => Violation::TableFreedWhileWalkable { table: pa },
            });
        } else if self.is_deferred(table) {
            self.report(Violation::TableFreedWhileDeferred { table: pa });
        } else if self.cpus.iter().any(|cpu| base_of(cpu.vttbr) == table) {
            self.report(Violation::RootFreedWhileLoaded { root: pa });
        }
        self.memory.remove(table);
    }

    /// The descriptor at `slot` went from `old` to `new`.
    pub(super) fn note_descriptor(&mut self, slot: u64, old: u64, new: u64) {
        let table = slot & !(PAGE_BYTES - 1);
        let index = ((slot - table) / SLOT_BYTES) as usize;
        if !self.memory.is_live(table) {
            return self.report(Violation::WrittenOutsideTables {
                slot: Pa::new(slot),
            });
        }
        if self.memory.word(table, index) != old {
            self.report(Violation::UnnotedStore {
                slot: Pa::new(slot),
            });
        }
        self.memory.set_word(table, index, new);
        let Some(home) = self.memory.home(table) else {
            return;
        };
        let ipa = home.ipa + index as u64 * span_bytes(home.level);
        let place = Slot {
            table,
            index,
            level: home.level,
            ipa,
        };
        self.change(place, old, new);
    }

    /// Judges and records a change of a slot that hangs in a tree.
    fn change(&mut self, slot: Slot, old_raw: u64, new_raw: u64) {
        let Slot {
            table,
            index,
            level,
            ipa,
        } = slot;
        let (old, new) = (
            self.memory.decode(old_raw, level),
            self.memory.decode(new_raw, level),
        );
        if let Meaning::Table(child) = new {
            if !self.memory.is_live(child) {
                self.report(Violation::LinkedNoTable {
                    table: Pa::new(child),
                });
            }
            let up = Up::Slot { table, index };
            let home = Home {
                level: level + 1,
                ipa,
                up,
            };
            self.judge_link(child, home, table);
            self.memory.hang(child, home);
        }
        let reachers = self.reachers(table);
        if let Meaning::Table(child) = old
            && old != new
        {
            // In a tree that no CPU runs under, whoever edits it knows what it still refers to.
            let sole = reachers.is_empty().then_some(self.current);
            for (table, ..) in self.memory.subtree(child, level + 1, ipa) {
                self.walkers.unlink(table, sole);
            }
        }
        if reachers.is_empty() || old == new {
            return;
        }
        if let Some(changed) = needs_break(&old, &new, self.features.bbm) {
            self.report(Violation::BreakBeforeMake {
                ipa: Ipa::new(ipa),
                changed,
            });
        }
        self.judge_size(&slot, &old, &new);
        for (vmid, cpus) in reachers {
            if !old.is_cacheable() {
                self.judge_make(vmid, slot, &new);
            }
            self.retire(vmid, slot, old_raw, &old, cpus);
        }
        self.formers.push(Former {
            table,
            index,
            raw: old_raw,
            sees_new: 0,
        });
    }

    /// What was reachable through `slot` and is no longer becomes stale.
    fn retire(&mut self, vmid: u16, slot: Slot, raw: u64, old: &Meaning, cpus: Cpus) {
        let Slot {
            table,
            index,
            level,
            ipa,
        } = slot;
        match *old {
            Meaning::Leaf(leaf) if leaf.young => {
                let place = Place {
                    table,
                    index,
                    raw,
                    ipa,
                    leaf,
                };
                self.retire_leaf(vmid, place, cpus);
            }
            Meaning::Table(child) => {
                for (table, level, ipa) in self.memory.subtree(child, level + 1, ipa) {
                    self.tlb.add_table(vmid, table, level, ipa, cpus);
                }
                for place in self.memory.leaves(child, level + 1, ipa) {
                    if place.leaf.young {
                        self.retire_leaf(vmid, place, cpus);
                    }
                }
            }
            _ => {}
        }
    }

    fn retire_leaf(&mut self, vmid: u16, place: Place, cpus: Cpus) {
        for (rights, cpus) in self.rights_of(vmid, cpus) {
            self.tlb.add_leaf(vmid, place, rights, cpus);
        }
    }

    /// Whether `leaf` is not what memory says under its VMID.
    pub(super) fn is_stale(&self, leaf: &StaleLeaf) -> bool {
        let at = &leaf.place;
        let Some(home) = self.memory.home(at.table) else {
            return true;
        };
        let raw = self.memory.word(at.table, at.index);
        let now = self.memory.decode(raw, home.level);
        let root = self.contexts.get(&leaf.vmid).map(|context| context.root);
        now != Meaning::Leaf(at.leaf)
            || self.linked_root(at.table) != root
            || self.is_resolved_otherwise(leaf)
    }

    /// The root from which memory leads to `table` now.
    fn linked_root(&self, table: u64) -> Option<u64> {
        let home = self.memory.home(table)?;
        match home.up {
            Up::Root(root) => Some(root),
            Up::Slot { table: up, index } => {
                let raw = self.memory.word(up, index);
                let linked = self.memory.decode(raw, home.level - 1) == Meaning::Table(table);
                linked.then(|| self.linked_root(up)).flatten()
            }
        }
    }

    /// Every leaf that memory leads to from a root that some CPU holds or held.
    pub(super) fn current_leaves(&self) -> Vec<Place> {
        let roots = self.contexts.values().map(|context| context.root);
        roots.flat_map(|root| self.leaves_of(root)).collect()
    }

    /// Every leaf that memory leads to from `root`.
    pub(super) fn leaves_of(&self, root: u64) -> Vec<Place> {
        let mut found = Vec::new();
        for page in 0..self.features.initial_tables {
            let table = root + page * PAGE_BYTES;
            if let Some(home) = self.memory.home(table) {
                found.extend(self.memory.leaves(table, home.level, home.ipa));
            }
        }
        found
    }
}

/// A slot that hangs in a tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) table: u64,
    pub(super) index: usize,
    pub(super) level: u8,
    pub(super) ipa: u64,
}
