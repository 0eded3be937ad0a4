//! Aging against faults, protection, collapse and freeing: a pass changes nothing but access flags, and what it takes it has.

use loom::sync::Arc;
use loom::thread;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::Level;
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::table::Slot;
use vellum::sync::quiescence::{CpuId, Domain};

use crate::check;
use crate::hardware::{
    GUEST_CPU, Hardware, PAGE, bitmap, is_recorded, leaf, make_writable, page_slot, protect, take,
};

/// A logged page that was accessed.
struct World {
    slot: Slot,
    bitmap: Bitmap,
    hardware: Hardware,
    seen_young: AtomicU64,
}

impl World {
    fn new(write: bool) -> Arc<Self> {
        let world = Self {
            slot: page_slot(write),
            bitmap: bitmap(),
            hardware: Hardware::new(None),
            seen_young: AtomicU64::new(0),
        };
        if write {
            world.bitmap.set(PAGE, GUEST_CPU);
        }
        Arc::new(world)
    }

    /// A pass, as shipped: from what was read, by compare-and-swap.
    fn age(&self) {
        let mut found = self.slot.load();
        while found.is_young() && !found.is_held() {
            match self.slot.compare_and_swap(found, found.old()) {
                Ok(()) => {
                    self.seen_young.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Err(now) => found = now,
            }
        }
        self.hardware.invalidate();
    }

    /// A pass that puts back what it read, whatever came since.
    fn age_by_store(&self) {
        let found = self.slot.load();
        let mut now = self.slot.load();
        while let Err(other) = self.slot.compare_and_swap(now, found.old()) {
            now = other;
        }
        self.hardware.invalidate();
    }

    /// The guest writes, with the fault that it takes.
    fn write(&self) {
        if make_writable(&self.slot, Level::L3) {
            self.bitmap.set(PAGE, GUEST_CPU);
        }
        self.hardware.store(|| self.slot.load());
    }

    /// Takes the bit, protects, invalidates, copies.
    fn clear(&self) -> Option<u64> {
        let taken = take(&self.bitmap);
        if taken {
            protect(&self.slot, Level::L3);
            self.hardware.invalidate();
        }
        taken.then(|| self.hardware.copy())
    }
}

/// A write, a clear and a pass; afterwards memory is what was copied, or the page is recorded.
fn write_clear_age(age: fn(&World)) {
    let world = World::new(true);
    let writer = {
        let world = world.clone();
        thread::spawn(move || world.write())
    };
    let ager = {
        let world = world.clone();
        thread::spawn(move || age(&world))
    };
    let copied = world.clear();
    writer.join().unwrap();
    ager.join().unwrap();
    assert!(
        is_recorded(&world.bitmap) || copied == Some(world.hardware.copy()),
        "a write is neither copied nor recorded"
    );
    assert!(
        is_recorded(&world.bitmap) || !world.slot.load().is_writable(),
        "a permission that was taken away came back"
    );
}

#[test]
fn good_aging_gives_no_permission_back() {
    check(|| write_clear_age(World::age));
}

#[test]
#[should_panic(expected = "a permission that was taken away came back")]
fn bad_aging_by_store_gives_a_permission_back() {
    check(|| write_clear_age(World::age_by_store));
}

/// A fault makes the page writable while a pass takes its flag: the permission stays.
fn fault_against_age(age: fn(&World)) {
    let world = World::new(false);
    let ager = {
        let world = world.clone();
        thread::spawn(move || age(&world))
    };
    world.write();
    ager.join().unwrap();
    assert!(world.slot.load().is_writable(), "the fault was in vain");
    assert!(is_recorded(&world.bitmap));
}

#[test]
fn good_aging_takes_no_permission() {
    check(|| fault_against_age(World::age));
}

#[test]
#[should_panic(expected = "the fault was in vain")]
fn bad_aging_by_store_takes_a_permission() {
    check(|| fault_against_age(World::age_by_store));
}

/// Two passes: one of them has the flag.
#[test]
fn good_a_flag_is_taken_once() {
    check(|| {
        let world = World::new(true);
        let other = {
            let world = world.clone();
            thread::spawn(move || world.age())
        };
        world.age();
        other.join().unwrap();
        assert_eq!(world.seen_young.load(Ordering::Relaxed), 1);
    });
}

/// A table is collapsed: its leaf is frozen, the block takes its flag over, thaws. A pass ages the leaf before, or the block
/// after: the access is seen once at least.
fn collapse_against_age(age: fn(&Slot) -> bool) {
    let page = Arc::new(page_slot(true));
    let parent = Arc::new(Slot::new(Descriptor::table(vellum::addr::Pa::new(0x1000))));
    let pass = {
        let (page, parent) = (page.clone(), parent.clone());
        thread::spawn(move || {
            let found = parent.load();
            if found.is_table(Level::L2) {
                age(&page)
            } else {
                age(&parent)
            }
        })
    };
    let found = page.load();
    if page.compare_and_swap(found, found.frozen()).is_ok() {
        let block = leaf(true, Level::L2);
        let block = if found.is_young() {
            block.young()
        } else {
            block.old()
        };
        let table = parent.load();
        assert!(parent.compare_and_swap(table, block).is_ok());
    }
    let seen = pass.join().unwrap();
    let left = parent.load();
    let decides = if left.is_table(Level::L2) {
        page.load()
    } else {
        left
    };
    assert!(seen || decides.is_young(), "an access is forgotten");
    assert!(!(seen && decides.is_young()), "an access is seen twice");
}

fn age_what_is_not_held(slot: &Slot) -> bool {
    let found = slot.load();
    !found.is_held() && found.is_young() && slot.compare_and_swap(found, found.old()).is_ok()
}

fn age_whatever_is_there(slot: &Slot) -> bool {
    let found = slot.load();
    found.is_young() && slot.compare_and_swap(found, found.old()).is_ok()
}

#[test]
fn good_a_frozen_leaf_keeps_its_flag() {
    check(|| collapse_against_age(age_what_is_not_held));
}

#[test]
#[should_panic(expected = "an access is seen twice")]
fn bad_aging_a_frozen_leaf_sees_an_access_twice() {
    check(|| collapse_against_age(age_whatever_is_there));
}

/// A table that a pass walks to is freed after a grace period.
fn free_against_age(section: bool) {
    let domain = Arc::new(Domain::new(2));
    let linked = Arc::new(AtomicU64::new(1));
    let freed = Arc::new(AtomicU64::new(0));
    let pass = {
        let (domain, linked, freed) = (domain.clone(), linked.clone(), freed.clone());
        thread::spawn(move || {
            let active = section.then(|| domain.enter(CpuId(1)));
            if linked.load(Ordering::Acquire) == 1 {
                let gone = freed.load(Ordering::Relaxed);
                assert_eq!(gone, 0, "a freed table is aged");
            }
            drop(active);
        })
    };
    linked.store(0, Ordering::Release);
    domain.wait();
    freed.store(1, Ordering::Relaxed);
    pass.join().unwrap();
}

#[test]
fn good_a_table_is_freed_when_no_pass_is_in_it() {
    check(|| free_against_age(true));
}

#[test]
#[should_panic(expected = "a freed table is aged")]
fn bad_a_pass_outside_a_section_reads_a_freed_table() {
    check(|| free_against_age(false));
}
