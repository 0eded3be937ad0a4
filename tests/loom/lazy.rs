//! Tables that are deferred: the call, push-down by faults and by the harvest, and what links tables meanwhile (rules 28 and
//! 30).

use loom::sync::Arc;

use loom::thread;
use vellum::addr::Pa;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::Level;
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::table::Slot;
use vellum::mmu::tlb::OpenDebts;
use vellum::sync::published::{Published, Retired};
use vellum::sync::quiescence::{CpuId, Domain};

use crate::hardware::{
    Cache, GUEST_CPU, PAGE, bitmap, is_recorded, make_writable, page_slot, protect, take,
};
use crate::{check, check_within};

const TABLE: Descriptor = Descriptor::table(Pa::new(0x1000));
const OTHER_CPU: usize = 0;

/// A root entry, the page's leaf in the table that it leads to, and two bitmaps.
struct World {
    root: Slot,
    page: Slot,
    logs: [Bitmap; 2],
    /// Which bitmap is current; the other is the closed epoch's.
    context: Published<usize>,
    domain: Domain,
    /// Nonzero while the call's invalidation is not complete.
    deferring: AtomicU64,
    debts: OpenDebts,
    cache: Cache<Descriptor>,
    copied: AtomicU64,
}

impl World {
    /// The root holds `root`; the page was written in the epoch of bitmap 0 and is cached so, or was not.
    fn new(root: Descriptor, current: usize, written: bool) -> Arc<Self> {
        let page = page_slot(written);
        let cached = (written && root == TABLE).then(|| page.load());
        let world = Self {
            root: Slot::new(root),
            page,
            logs: [bitmap(), bitmap()],
            context: Published::new(current),
            domain: Domain::new(2),
            deferring: AtomicU64::new(0),
            debts: OpenDebts::default(),
            cache: Cache::new(cached),
            copied: AtomicU64::new(0),
        };
        if written {
            world.logs[0].set(PAGE, 0);
        }
        Arc::new(world)
    }

    /// A store by the guest, as far as hardware gets.
    fn store(&self) -> bool {
        let walk = || {
            let leads = self.root.load().is_table(Level::L2);
            leads
                .then(|| self.page.load())
                .filter(|leaf| *leaf != Descriptor::EMPTY)
        };
        self.cache.store(|_| true, walk, Descriptor::is_writable)
    }

    fn invalidate(&self) {
        self.cache.invalidate(|_| true);
    }

    /// As it ships: claim, look into the closed epoch's bitmap, link.
    fn push_down(&self, deferred: Descriptor, current: usize) {
        if self
            .root
            .compare_and_swap(deferred, Descriptor::BUSY)
            .is_ok()
        {
            self.look_through(current);
            replace(&self.root, Descriptor::BUSY, TABLE);
        }
    }

    fn look_through(&self, current: usize) {
        if is_recorded(&self.logs[1 - current]) {
            protect(&self.page, Level::L3);
        }
    }

    /// Whether a walk reaches the page; if not, something is busy.
    fn walk(&self, current: usize) -> bool {
        loop {
            let found = self.root.load();
            if !found.is_deferred() {
                return found == TABLE;
            }
            if self.deferring.load(Ordering::Acquire) != 0 {
                return false;
            }
            self.push_down(found, current);
        }
    }

    /// A write fault as it ships.
    fn fault(&self, cpu: usize) {
        let active = self.domain.enter(CpuId(cpu));
        let current = *self.context.load(&active);
        if self.walk(current) && make_writable(&self.page, Level::L3) {
            self.logs[current].set(PAGE, cpu);
        }
        drop(active);
        if cpu == GUEST_CPU {
            self.invalidate();
        }
    }

    /// The guest writes, if it gets anywhere.
    fn write(&self) {
        for _ in 0..2 {
            if self.store() {
                return;
            }
            self.fault(GUEST_CPU);
        }
    }

    fn publish(&self) -> Retired<usize> {
        self.context.replace(1)
    }

    /// The root's table is taken out of hardware's reach.
    fn defer(&self, busy: Busy) {
        self.deferring.store(1, Ordering::Release);
        self.debts.open();
        loop {
            let found = self.root.load();
            if found == Descriptor::BUSY && busy == Busy::IsWaitedFor {
                thread::yield_now();
                continue;
            }
            let done =
                found != TABLE || self.root.compare_and_swap(found, TABLE.deferred()).is_ok();
            if done {
                break;
            }
        }
        self.invalidate();
        self.debts.settle();
        self.deferring.store(0, Ordering::Release);
    }

    /// As it ships: publish, grace period, defer, invalidate.
    fn call(&self) {
        self.publish().free(&self.domain);
        self.defer(Busy::IsWaitedFor);
    }

    /// As it ships: push down to the tables of the closed epoch's pages, then take those.
    fn harvest(&self) {
        if is_recorded(&self.logs[0]) {
            while !self.reaches() {
                thread::yield_now();
            }
        }
        self.take_and_copy();
    }

    fn reaches(&self) -> bool {
        let active = self.domain.enter(CpuId(0));
        self.walk(*self.context.load(&active))
    }

    fn take_and_copy(&self) {
        if take(&self.logs[0]) {
            self.copy();
        }
    }

    fn copy(&self) {
        self.copied.store(self.cache.copy(), Ordering::Relaxed);
    }

    /// A clear of what the first epoch recorded, as it ships: it has the bits, walks to the page and protects it.
    fn clear_by_walk(&self, cpu: usize, unreached: Unreached) {
        if !take(&self.logs[0]) {
            return;
        }
        loop {
            let active = self.domain.enter(CpuId(cpu));
            let reached = self.walk(*self.context.load(&active));
            if reached {
                protect(&self.page, Level::L3);
            }
            drop(active);
            if reached || unreached == Unreached::IsAHole {
                break;
            }
            thread::yield_now();
        }
        self.invalidate();
        self.copy();
    }

    /// Takes the page's bit of the current epoch, protects it and copies it.
    fn clear(&self) {
        if !take(&self.logs[1]) {
            return;
        }
        // Nothing is deferred here any more, and no call is under way.
        if protect(&self.page, Level::L3) || self.debts.any() {
            self.invalidate();
        }
        self.copy();
    }

    fn assert_nothing_lost(&self) {
        let unseen = self.cache.copy() != self.copied.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(&self.logs[1]), "a write was lost");
    }
}

/// What a deferral does about an entry that somebody is replacing.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Busy {
    IsWaitedFor,
    IsSkipped,
}

/// What a clear does about a page that it does not reach while a call's invalidation is not complete.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Unreached {
    IsWaitedFor,
    IsAHole,
}

fn replace(slot: &Slot, old: Descriptor, new: Descriptor) {
    assert!(slot.compare_and_swap(old, new).is_ok());
}

/// The guest writes while the epoch is closed and harvested.
fn write_against_call(written: bool, close: fn(&World)) {
    check(move || {
        let world = World::new(TABLE, 0, written);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.write())
        };
        close(&world);
        guest.join().unwrap();
        world.write();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_write_against_the_call_is_harvested_or_recorded_anew() {
    for written in [false, true] {
        write_against_call(written, |world| {
            world.call();
            world.harvest();
        });
    }
}

#[test]
#[should_panic = "a write was lost"]
fn bad_deferral_before_the_grace_period_loses_a_write() {
    write_against_call(false, |world| {
        let before = world.publish();
        world.defer(Busy::IsWaitedFor);
        world.harvest();
        before.free(&world.domain);
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_deferral_that_is_not_invalidated_loses_a_write() {
    write_against_call(true, |world| {
        world.publish().free(&world.domain);
        replace(&world.root, TABLE, TABLE.deferred());
        world.harvest();
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_bits_taken_before_the_push_down_lose_a_write() {
    write_against_call(true, |world| {
        world.call();
        world.take_and_copy();
    });
}

/// The root's table is deferred, its page was written in the closed epoch and is written again; another fault on the same
/// page pushes down, too; then the page is cleared, and written once more.
fn two_push_downs(other: fn(&World)) {
    check(move || {
        let world = World::new(TABLE.deferred(), 1, true);
        let fault = {
            let world = Arc::clone(&world);
            thread::spawn(move || other(&world))
        };
        world.write();
        fault.join().unwrap();
        world.clear();
        world.store();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_one_of_two_faults_claims_a_deferred_entry() {
    two_push_downs(|world| world.fault(OTHER_CPU));
}

#[test]
#[should_panic = "a write was lost"]
fn bad_push_down_without_a_claim_takes_away_what_a_fault_has_just_given() {
    two_push_downs(|world| {
        let active = world.domain.enter(CpuId(OTHER_CPU));
        let current = *world.context.load(&active);
        let found = world.root.load();
        if found.is_deferred() {
            world.look_through(current);
            let _linked = world.root.compare_and_swap(found, TABLE);
        }
    });
}

/// The harvest pushes down to a deferred table while a fault does.
#[test]
fn good_push_down_by_a_fault_against_that_by_the_harvest() {
    check(|| {
        let world = World::new(TABLE.deferred(), 1, true);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.write())
        };
        world.harvest();
        guest.join().unwrap();
        world.write();
        world.assert_nothing_lost();
    });
}

/// A clear has taken the page's bit when the call comes, so the push-down does not know the page for a writable one.
fn clear_against_call(unreached: Unreached) {
    check_within(2, move || {
        let world = World::new(TABLE, 0, true);
        let clearer = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.clear_by_walk(GUEST_CPU, unreached))
        };
        world.call();
        world.harvest();
        clearer.join().unwrap();
        world.write();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_clear_waits_until_what_is_deferred_may_be_looked_through() {
    clear_against_call(Unreached::IsWaitedFor);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_clear_that_takes_what_is_deferred_for_a_hole_loses_a_write() {
    clear_against_call(Unreached::IsAHole);
}

/// A writable block, recorded in the closed epoch, is being replaced by a table when the call comes.
fn split_against_call(busy: Busy) {
    check(move || {
        let world = World::new(Descriptor::BUSY, 0, true);
        let splitter = {
            let world = Arc::clone(&world);
            thread::spawn(move || replace(&world.root, Descriptor::BUSY, TABLE))
        };
        world.publish().free(&world.domain);
        world.defer(busy);
        world.harvest();
        splitter.join().unwrap();
        world.write();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_call_waits_for_an_entry_that_is_being_replaced() {
    split_against_call(Busy::IsWaitedFor);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_call_that_skips_a_busy_entry_leaves_a_writable_table() {
    split_against_call(Busy::IsSkipped);
}

/// A page is mapped, with the table above it, while the call comes: `map` has the claim on the root's entry.
fn map_against_call(map: fn(&World)) {
    check(move || {
        let world = World::new(Descriptor::EMPTY, 0, false);
        let mapper = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                map(&world);
                world.store();
            })
        };
        world.call();
        world.harvest();
        mapper.join().unwrap();
        world.write();
        world.assert_nothing_lost();
    });
}

/// Links the table, with the page writable in it, and records that in the epoch of `current`.
fn link(world: &World, current: usize) {
    if world.root.claim().is_ok() {
        make_writable(&world.page, Level::L3);
        replace(&world.root, Descriptor::BUSY, TABLE);
        world.logs[current].set(PAGE, GUEST_CPU);
    }
}

#[test]
fn good_table_that_is_linked_meanwhile_is_deferred_or_of_the_next_epoch() {
    map_against_call(|world| {
        let active = world.domain.enter(CpuId(GUEST_CPU));
        link(world, *world.context.load(&active));
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_table_linked_after_its_section_is_of_an_epoch_that_is_over() {
    map_against_call(|world| {
        let current = {
            let active = world.domain.enter(CpuId(GUEST_CPU));
            *world.context.load(&active)
        };
        link(world, current);
    });
}
