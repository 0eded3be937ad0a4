//! Hardware that marks what it writes: a leaf is cleaned, then invalidated, then its page is copied, and a mark is recorded
//! in the epoch in which it was taken (rules 3, 10, 11 and 28).

use loom::sync::Arc;

use loom::thread;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::rights::Rights;
use vellum::mmu::table::Slot;
use vellum::mmu::tlb::OpenDebts;
use vellum::mmu::{Epoch, Format, Level, Memory, Permissions, Tracking};
use vellum::sync::published::Published;
use vellum::sync::quiescence::{CpuId, Domain};

use crate::check;
use crate::hardware::{Cache, PAGE, bitmap, is_recorded, leaf, take};

const CALLER: usize = 0;
const CLEARER: usize = 1;

fn rights() -> Rights {
    let format = Format {
        forced_write_back: false,
        permissions: Permissions::Direct,
    };
    let logged = Some(Epoch::new(1));
    Rights::new(format, Memory::Normal, Tracking::Dbm, logged)
}

/// A page, its leaf, and two bitmaps, the first of which is current.
struct World {
    slot: Slot,
    logs: [Bitmap; 2],
    /// Which bitmap is current.
    context: Published<usize>,
    domain: Domain,
    debts: OpenDebts,
    cache: Cache<Descriptor>,
    copied: AtomicU64,
}

impl World {
    /// A page that is marked and cached so, or neither.
    fn new(marked: bool) -> Arc<Self> {
        let clean = rights().revoke(leaf(false, Level::L3), Level::L3);
        let slot = if marked { rights().grant(clean) } else { clean };
        Arc::new(Self {
            slot: Slot::new(slot),
            logs: [bitmap(), bitmap()],
            context: Published::new(0),
            domain: Domain::new(2),
            debts: OpenDebts::default(),
            cache: Cache::new(marked.then_some(slot)),
            copied: AtomicU64::new(0),
        })
    }

    /// The guest stores: hardware marks the leaf, if its entry is clean, by an atomic update that memory still permits.
    fn store(&self) {
        for _ in 0..3 {
            let entry = self.cache.store(
                |entry| rights().permits(entry),
                || self.mark(),
                |entry| rights().permits(entry),
            );
            if entry {
                return;
            }
        }
    }

    fn mark(&self) -> Option<Descriptor> {
        let found = self.slot.load();
        let marked = rights().grant(found);
        let done = found == marked || self.slot.compare_and_swap(found, marked).is_ok();
        done.then_some(marked)
    }

    /// Takes the mark, if there is one.
    fn clean(&self) -> bool {
        loop {
            let found = self.slot.load();
            if !rights().permits(found) {
                return false;
            }
            let clean = rights().revoke(found, Level::L3);
            if self.slot.compare_and_swap(found, clean).is_ok() {
                return true;
            }
        }
    }

    fn invalidate(&self) {
        self.cache.invalidate(|_| true);
    }

    fn copy(&self) {
        self.copied.store(self.cache.copy(), Ordering::Relaxed);
    }

    /// As it ships: flip, grace period, clean, invalidate everything.
    fn call(&self, closed: usize) {
        self.context.replace(1 - closed).free(&self.domain);
        self.debts.open();
        if self.clean() {
            self.logs[closed].set(PAGE, CALLER);
        }
        self.invalidate();
        self.debts.settle();
    }

    fn harvest(&self, closed: usize) {
        if take(&self.logs[closed]) {
            self.copy();
        }
    }

    /// Takes marks and bits into the bitmap `log`, and copies what was reported.
    fn clear(&self, log: usize, marks: Marks) {
        self.debts.open();
        let active = self.domain.enter(CpuId(CLEARER));
        let current = *self.context.load(&active);
        if (marks == Marks::OfAnyEpoch || current == log) && self.clean() {
            self.logs[log].set(PAGE, CLEARER);
        }
        drop(active);
        let reported = take(&self.logs[log]);
        if reported {
            let active = self.domain.enter(CpuId(CLEARER));
            let current = *self.context.load(&active);
            if self.clean() && marks == Marks::OfItsOwnEpoch && current != log {
                self.logs[current].set(PAGE, CLEARER);
            }
        }
        self.invalidate();
        self.debts.settle();
        if reported {
            self.copy();
        }
    }

    /// What was written after it was copied is marked or recorded.
    fn assert_nothing_lost(&self) {
        let unseen = self.cache.copy() != self.copied.load(Ordering::Relaxed);
        let active = self.domain.enter(CpuId(CALLER));
        let current = *self.context.load(&active);
        let known = rights().permits(self.slot.load()) || is_recorded(&self.logs[current]);
        assert!(!unseen || known, "a write was lost");
    }
}

/// Which marks a clear takes that began in an epoch and may outlive it.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Marks {
    OfItsOwnEpoch,
    OfAnyEpoch,
}

fn write_against(marked: bool, scan: fn(&World)) {
    check(move || {
        let world = World::new(marked);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.store();
                world.store();
            })
        };
        scan(&world);
        guest.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_write_against_the_call_is_harvested_or_marked_anew() {
    for marked in [false, true] {
        write_against(marked, |world| {
            world.call(0);
            world.harvest(0);
        });
    }
}

#[test]
fn good_write_against_clear_is_reported_or_marked_anew() {
    for marked in [false, true] {
        write_against(marked, |world| world.clear(0, Marks::OfItsOwnEpoch));
    }
}

#[test]
#[should_panic = "a write was lost"]
fn bad_copy_before_the_invalidation_loses_a_write() {
    write_against(true, |world| {
        world.context.replace(1).free(&world.domain);
        if world.clean() {
            world.copy();
        }
        world.invalidate();
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_invalidation_before_the_leaf_is_cleaned_loses_a_write() {
    write_against(true, |world| {
        world.context.replace(1).free(&world.domain);
        world.invalidate();
        if world.clean() {
            world.copy();
        }
    });
}

/// A clear that began in the first epoch meets the second, whose page is written: the call is over, the harvest is not.
fn clear_against_harvest(marks: Marks) {
    check(move || {
        let world = World::new(true);
        world.context.replace(1).free(&world.domain);
        let clearer = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.clear(0, marks))
        };
        world.harvest(0);
        // The guest writes through whatever entry it has.
        world.store();
        clearer.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_clear_that_outlives_its_epoch_leaves_marks_to_the_next() {
    clear_against_harvest(Marks::OfItsOwnEpoch);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_marks_recorded_in_an_epoch_that_is_being_harvested_are_copied_unpaid() {
    clear_against_harvest(Marks::OfAnyEpoch);
}
