//! Faults against `clear`, `enable` and the change of epochs: no write is lost (rules 1, 2, 3, 10, 11, 12, 14).

use loom::sync::Arc;

use loom::thread;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::Level;
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::table::Slot;
use vellum::mmu::tlb::OpenDebts;
use vellum::sync::published::Published;
use vellum::sync::quiescence::{CpuId, Domain};

use crate::check;
use crate::hardware::{
    GUEST_CPU, Hardware, PAGE, bitmap, is_recorded, make_writable, page_slot, protect, take,
};

/// A page, its bit, the hardware, and what the last copy of the page held.
struct World {
    slot: Slot,
    bitmap: Bitmap,
    hardware: Hardware,
    copied: AtomicU64,
}

impl World {
    /// A page that is writable and recorded, or neither.
    fn new(dirty: bool) -> Arc<Self> {
        let world = Self {
            slot: page_slot(dirty),
            bitmap: bitmap(),
            hardware: Hardware::new(None),
            copied: AtomicU64::new(0),
        };
        if dirty {
            world.bitmap.set(PAGE, GUEST_CPU);
        }
        Arc::new(world)
    }

    /// The guest writes once; `fault` is what EL2 does when it may not.
    fn write(&self, fault: impl Fn(&Self)) {
        for _ in 0..3 {
            if self.hardware.store(|| self.slot.load()) {
                return;
            }
            fault(self);
            self.hardware.invalidate();
        }
    }

    fn copy(&self) {
        self.copied.store(self.hardware.copy(), Ordering::Relaxed);
    }

    fn assert_nothing_lost(&self) {
        let unseen = self.hardware.copy() != self.copied.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(&self.bitmap), "a write was lost");
    }
}

fn leaf_then_bit(world: &World) {
    if make_writable(&world.slot, Level::L3) {
        world.bitmap.set(PAGE, GUEST_CPU);
    }
}

fn bit_then_leaf(world: &World) {
    world.bitmap.set(PAGE, GUEST_CPU);
    make_writable(&world.slot, Level::L3);
}

fn take_then_protect(world: &World) {
    if take(&world.bitmap) {
        protect(&world.slot, Level::L3);
        world.hardware.invalidate();
        world.copy();
    }
}

fn protect_then_take(world: &World) {
    protect(&world.slot, Level::L3);
    world.hardware.invalidate();
    if take(&world.bitmap) {
        world.copy();
    }
}

/// The guest writes while another CPU clears.
fn write_against_clear(dirty: bool, fault: fn(&World), clear: fn(&World)) {
    check(move || {
        let world = World::new(dirty);
        if dirty {
            // Its entry is cached.
            world.write(fault);
        }
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.write(fault))
        };
        clear(&world);
        guest.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_write_against_clear_is_reported_or_still_recorded() {
    for dirty in [false, true] {
        write_against_clear(dirty, leaf_then_bit, take_then_protect);
    }
}

#[test]
#[should_panic = "a write was lost"]
fn bad_bit_before_the_leaf_loses_a_write() {
    write_against_clear(false, bit_then_leaf, take_then_protect);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_protecting_before_taking_loses_a_write() {
    write_against_clear(true, leaf_then_bit, protect_then_take);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_copy_before_the_invalidation_loses_a_write() {
    fn clear(world: &World) {
        if take(&world.bitmap) {
            protect(&world.slot, Level::L3);
            world.copy();
            world.hardware.invalidate();
        }
    }
    write_against_clear(true, leaf_then_bit, clear);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_test_then_set_loses_a_write() {
    fn fault(world: &World) {
        if make_writable(&world.slot, Level::L3) && !is_recorded(&world.bitmap) {
            world.bitmap.set(PAGE, GUEST_CPU);
        }
    }
    // The page is recorded already, by the hypervisor's own write, and still read-only.
    check(|| {
        let world = World::new(false);
        world.bitmap.set(PAGE, 0);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.write(fault))
        };
        take_then_protect(&world);
        guest.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_two_faults_on_one_page_record_it_and_one_changes_the_leaf() {
    check(|| {
        let world = World::new(false);
        let fault = |world: &World, cpu: usize| {
            let changed = make_writable(&world.slot, Level::L3);
            if changed {
                world.bitmap.set(PAGE, cpu);
            }
            u64::from(changed)
        };
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || fault(&world, 1))
        };
        let changes = fault(&world, 0) + other.join().unwrap();
        assert_eq!(changes, 1);
        assert!(world.slot.load().is_writable() && is_recorded(&world.bitmap));
    });
}

/// One CPU protects the page on its way to a neighbour, `clear` of the page finds it read-only, and the guest writes
/// through the entry that its TLB still holds.
fn clear_against_protection(believe: fn(&OpenDebts) -> bool) {
    check(move || {
        let world = World::new(true);
        // The entry is cached before anything begins.
        world.write(leaf_then_bit);
        let debts = Arc::new(OpenDebts::default());
        let protector = {
            let (world, debts) = (Arc::clone(&world), Arc::clone(&debts));
            thread::spawn(move || {
                debts.open();
                protect(&world.slot, Level::L3);
                world.hardware.invalidate();
                debts.settle();
            })
        };
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.write(leaf_then_bit))
        };
        if take(&world.bitmap) {
            let mine = protect(&world.slot, Level::L3);
            if mine || !believe(&debts) {
                world.hardware.invalidate();
            }
            world.copy();
        }
        protector.join().unwrap();
        guest.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_clear_joins_the_debt_of_who_protected_before_it() {
    clear_against_protection(|debts| !debts.any());
}

#[test]
#[should_panic = "a write was lost"]
fn bad_clear_that_believes_a_read_only_leaf_loses_a_write() {
    clear_against_protection(|_| true);
}

/// A page that is being logged from some moment on: snapshots name the bitmap, if any.
struct Logged {
    context: Published<Option<usize>>,
    domain: Domain,
    world: Arc<World>,
    /// The bitmap of the epoch after the first.
    second: Bitmap,
}

impl Logged {
    fn new(context: Option<usize>, dirty: bool) -> Arc<Self> {
        Arc::new(Self {
            context: Published::new(context),
            domain: Domain::new(2),
            world: World::new(dirty),
            second: bitmap(),
        })
    }

    fn epoch(&self, index: usize) -> &Bitmap {
        if index == 0 {
            &self.world.bitmap
        } else {
            &self.second
        }
    }

    /// A write fault as it ships: one section, one snapshot.
    fn fault(&self) {
        let active = self.domain.enter(CpuId(GUEST_CPU));
        let context = self.context.load(&active);
        if make_writable(&self.world.slot, Level::L3)
            && let Some(index) = context
        {
            self.epoch(*index).set(PAGE, GUEST_CPU);
        }
    }

    /// The same, but the bit is set after the section.
    fn fault_with_a_late_bit(&self) {
        let (index, changed) = {
            let active = self.domain.enter(CpuId(GUEST_CPU));
            (
                *self.context.load(&active),
                make_writable(&self.world.slot, Level::L3),
            )
        };
        if let Some(index) = index.filter(|_| changed) {
            self.epoch(index).set(PAGE, GUEST_CPU);
        }
    }

    fn write(&self, fault: fn(&Self)) {
        self.world.write(|_| fault(self));
    }
}

/// Logging begins while the guest writes. Every write that comes after is recorded.
fn write_against_enable(enable: fn(&Logged)) {
    check(move || {
        let logged = Logged::new(None, false);
        let guest = {
            let logged = Arc::clone(&logged);
            thread::spawn(move || logged.write(Logged::fault))
        };
        enable(&logged);
        // What was written by now is no business of the log.
        logged.world.copy();
        guest.join().unwrap();
        logged.write(Logged::fault);
        logged.world.assert_nothing_lost();
    });
}

#[test]
fn good_write_after_enable_is_recorded() {
    write_against_enable(|logged| {
        logged.context.replace(Some(0)).free(&logged.domain);
        protect(&logged.world.slot, Level::L3);
        logged.world.hardware.invalidate();
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_enable_that_protects_before_the_grace_period_loses_a_write() {
    write_against_enable(|logged| {
        let retired = logged.context.replace(Some(0));
        protect(&logged.world.slot, Level::L3);
        logged.world.hardware.invalidate();
        retired.free(&logged.domain);
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_enable_that_protects_before_it_publishes_loses_a_write() {
    write_against_enable(|logged| {
        protect(&logged.world.slot, Level::L3);
        logged.world.hardware.invalidate();
        logged.context.replace(Some(0)).free(&logged.domain);
    });
}

/// An epoch is closed and harvested while one vCPU faults and another writes, if it finds the page writable.
fn write_against_next_epoch(fault: fn(&Logged), next: fn(&Logged)) {
    check(move || {
        let logged = Logged::new(Some(0), false);
        let faulting = {
            let logged = Arc::clone(&logged);
            thread::spawn(move || fault(&logged))
        };
        let writing = {
            let logged = Arc::clone(&logged);
            thread::spawn(move || logged.world.hardware.store(|| logged.world.slot.load()))
        };
        next(&logged);
        faulting.join().unwrap();
        writing.join().unwrap();
        let unseen = logged.world.hardware.copy() != logged.world.copied.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(&logged.second), "a write was lost");
    });
}

fn harvest(logged: &Logged) {
    if take(&logged.world.bitmap) {
        logged.world.copy();
    }
}

#[test]
fn good_write_against_next_epoch_is_in_one_of_the_two() {
    write_against_next_epoch(Logged::fault, |logged| {
        logged.context.replace(Some(1)).free(&logged.domain);
        protect(&logged.world.slot, Level::L3);
        logged.world.hardware.invalidate();
        harvest(logged);
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_bit_set_after_the_section_misses_its_epoch() {
    write_against_next_epoch(Logged::fault_with_a_late_bit, |logged| {
        logged.context.replace(Some(1)).free(&logged.domain);
        protect(&logged.world.slot, Level::L3);
        logged.world.hardware.invalidate();
        harvest(logged);
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_harvest_before_the_grace_period_loses_a_write() {
    write_against_next_epoch(Logged::fault, |logged| {
        let retired = logged.context.replace(Some(1));
        protect(&logged.world.slot, Level::L3);
        logged.world.hardware.invalidate();
        harvest(logged);
        retired.free(&logged.domain);
    });
}

/// The hypervisor writes the page itself while another CPU clears it.
fn own_write_against_clear(write: fn(&World, &AtomicU64)) {
    check(move || {
        let world = World::new(false);
        let data = Arc::new(AtomicU64::new(0));
        let writer = {
            let (world, data) = (Arc::clone(&world), Arc::clone(&data));
            thread::spawn(move || write(&world, &data))
        };
        let mut copied = 0;
        if take(&world.bitmap) {
            copied = data.load(Ordering::Relaxed);
        }
        writer.join().unwrap();
        let unseen = copied != data.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(&world.bitmap), "a write was lost");
    });
}

#[test]
fn good_own_write_stores_the_data_then_the_bit() {
    own_write_against_clear(|world, data| {
        data.store(1, Ordering::Relaxed);
        world.bitmap.set(PAGE, 1);
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_own_write_with_the_bit_first_is_lost() {
    own_write_against_clear(|world, data| {
        world.bitmap.set(PAGE, 1);
        data.store(1, Ordering::Relaxed);
    });
}
