//! The hardware of tests on real threads, where there is no fake machine: each guest has registers and a TLB that keeps what
//! a walk of the shipped tables found until an invalidation is complete.
//!
//! A guest holds its TLB's lock for one access, and `DSB ISH` after a `TLBI` takes every such lock: what was in flight through
//! an old translation is over. Entries are kept under the VMID they were found under, resolved by S2PIR_EL2 or not. Whoever
//! is kicked notices before some later access.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use vellum::arch::fake::{self, Event};
use vellum::mmu::{Access, FaultKind, Tracking};

use crate::flat::usize_of;
use crate::rig::RAM;

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const YOUNG: u64 = 1 << 10;
const DBM: u64 = 1 << 51;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// What a TLB holds: a leaf, and the S2PIR_EL2 that its permission was resolved by.
#[derive(Clone, Copy)]
struct Entry {
    raw: u64,
    rights: u64,
}

#[derive(Default)]
struct Guest {
    vttbr: AtomicU64,
    s2pir: AtomicU64,
    kicked: AtomicBool,
    /// By VMID and page. Held during an access.
    tlb: Mutex<HashMap<(u64, u64), Entry>>,
}

/// The CPUs that run guests.
pub(crate) struct Guests {
    cpus: Vec<Guest>,
    /// Permissions are indices into S2PIR_EL2.
    indirect: bool,
    tracking: Tracking,
}

fn word(address: u64) -> &'static AtomicU64 {
    let pointer = std::ptr::with_exposed_provenance::<AtomicU64>(usize_of(address));
    // SAFETY: The address is a slot of a table that this walk's TLB lock keeps; nobody keeps the reference longer.
    unsafe { &*pointer }
}

impl Guests {
    pub(crate) fn new(count: usize, indirect: bool, tracking: Tracking) -> Arc<Self> {
        Arc::new(Self {
            cpus: (0..count).map(|_| Guest::default()).collect(),
            indirect,
            tracking,
        })
    }

    pub(crate) fn kick(&self, cpu: usize) {
        self.cpus[cpu].kicked.store(true, Ordering::Release);
    }

    /// Whether `cpu` was kicked since it last asked.
    pub(crate) fn is_kicked(&self, cpu: usize) -> bool {
        self.cpus[cpu].kicked.swap(false, Ordering::Acquire)
    }

    pub(crate) fn set_vttbr(&self, cpu: usize, vttbr: u64) {
        self.cpus[cpu].vttbr.store(vttbr, Ordering::Relaxed);
    }

    /// The slot of the last descriptor on the way to `page`, what it holds, and how far it reaches.
    fn walk(root: u64, page: u64) -> (&'static AtomicU64, u64, u32) {
        let ipa = RAM + page * 4096;
        let mut table = root;
        let mut index = ipa >> 30;
        for shift in [30, 21, 12] {
            let slot = word(table + 8 * index);
            let raw = slot.load(Ordering::Acquire);
            if shift == 12 || raw & (VALID | TABLE_OR_PAGE) != VALID | TABLE_OR_PAGE {
                return (slot, raw, shift);
            }
            table = raw & ADDRESS;
            index = ipa >> (shift - 9) & 511;
        }
        unreachable!("the last level ends the walk")
    }

    /// One access of the guest on `cpu` to `page`, which has to lead to `expected`; `reached` runs before anybody may call
    /// it over. Why it failed, otherwise.
    pub(crate) fn access(
        &self,
        cpu: usize,
        page: u64,
        expected: u64,
        access: Access,
        reached: impl FnOnce(),
    ) -> Option<FaultKind> {
        let on = &self.cpus[cpu];
        let mut tlb = on.tlb.lock().expect("no guest fails");
        let vttbr = on.vttbr.load(Ordering::Relaxed);
        let rights = on.s2pir.load(Ordering::Relaxed);
        let key = (vttbr >> 48, page);
        loop {
            let known = tlb.get(&key).copied();
            if let Some(entry) = known.filter(|entry| !self.wants_mark(entry.raw, access)) {
                if !self.permits(entry, rights, access) {
                    return Some(FaultKind::Permission);
                }
                reached();
                return None;
            }
            // What is cached of a leaf to be marked is not believed.
            let (slot, raw, shift) = Self::walk(vttbr & ADDRESS, page);
            if raw & VALID == 0 {
                return Some(FaultKind::Translation);
            }
            let found = (raw & ADDRESS) + (RAM + page * 4096) % (1 << shift);
            assert_eq!(found, expected, "page {page}: {raw:#x}");
            let marked = self.marked(raw, access);
            let (order, failed) = (Ordering::AcqRel, Ordering::Relaxed);
            if marked != raw && slot.compare_exchange(raw, marked, order, failed).is_err() {
                continue;
            }
            if marked & YOUNG == 0 {
                return Some(FaultKind::AccessFlag);
            }
            let entry = Entry {
                raw: marked,
                rights,
            };
            tlb.insert(key, entry);
        }
    }

    /// What hardware makes of the leaf `raw` for `access`.
    fn marked(&self, raw: u64, access: Access) -> u64 {
        match (self.tracking, access) {
            (Tracking::Fault, _) => raw,
            (Tracking::Dbm, Access::Write) if raw & DBM != 0 => raw | YOUNG | WRITE,
            (Tracking::Dbm, _) => raw | YOUNG,
        }
    }

    fn wants_mark(&self, raw: u64, access: Access) -> bool {
        self.marked(raw, access) != raw
    }

    /// Whether `entry` permits `access`: as it was resolved, or as its index is by `now`.
    fn permits(&self, entry: Entry, now: u64, access: Access) -> bool {
        if !self.indirect {
            let needed = if access == Access::Write { WRITE } else { READ };
            return entry.raw & needed != 0;
        }
        let raw = entry.raw;
        let index = raw >> 6 & 1 | (raw >> 51 & 1) << 1 | (raw >> 53 & 3) << 2;
        let permits = |rights: u64| match (access, rights >> (4 * index) & 0b1111) {
            (Access::Write, right) => right >> 2 == 0b11 && raw & WRITE != 0,
            (_, right) => right & 0b1000 != 0,
        };
        permits(entry.rights) || permits(now)
    }

    /// Drops what the TLB of `cpu`, or all of them, hold.
    fn invalidate(&self, cpu: Option<usize>) {
        for (index, on) in self.cpus.iter().enumerate() {
            if cpu.is_none_or(|cpu| cpu == index) {
                on.tlb.lock().expect("no guest fails").clear();
            }
        }
    }

    /// Makes this thread CPU `cpu`: its barriers complete its invalidations, and its registers are its own.
    pub(crate) fn observe(self: &Arc<Self>, cpu: usize) {
        let guests = Arc::clone(self);
        let pending = Cell::new(false);
        fake::observe(Some(Rc::new(move |event| match event {
            Event::TlbiIpas2e1is(_)
            | Event::TlbiRipas2e1is(..)
            | Event::TlbiVmalle1is
            | Event::TlbiVmalls12e1is
            | Event::TlbiAlle1is => pending.set(true),
            Event::DsbIsh if pending.replace(false) => guests.invalidate(None),
            Event::DsbNsh => guests.invalidate(Some(cpu)),
            Event::Yield => thread::yield_now(),
            Event::Vttbr(vttbr) if cpu < guests.cpus.len() => guests.set_vttbr(cpu, vttbr),
            Event::S2pir(s2pir) if cpu < guests.cpus.len() => {
                guests.cpus[cpu].s2pir.store(s2pir, Ordering::Relaxed);
            }
            _ => {}
        })));
    }
}
