//! Break-before-make and claims against faults and `clear` (rule 9), and what a fault that loses a race does.

use loom::sync::Arc;

use loom::thread;
use vellum::addr::{Ipa, Pa};
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::Level;
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::table::Slot;

use crate::check;
use crate::hardware::{
    GUEST_CPU, Hardware, PAGE, bitmap, is_recorded, leaf, make_writable, page_slot, protect, take,
};

const TABLE: Pa = Pa::new(0x1000);
const IPA: Ipa = Ipa::new(0x8000_5000);

/// A block that somebody splits: its slot, and the slot for the page in the table that replaces it.
struct Tree {
    block: Slot,
    page: Slot,
    bitmap: Bitmap,
    hardware: Hardware,
    copied: AtomicU64,
}

impl Tree {
    /// A writable block whose page is recorded, as after `enable` with all bits set.
    fn new() -> Arc<Self> {
        let tree = Self {
            block: Slot::new(leaf(true, Level::L2)),
            page: page_slot(true),
            bitmap: bitmap(),
            hardware: Hardware::new(None),
            copied: AtomicU64::new(0),
        };
        tree.bitmap.set(PAGE, 0);
        Arc::new(tree)
    }

    /// The slot that decides about the page, `None` while it is busy.
    fn walk(&self) -> Option<(&Slot, Level)> {
        let found = self.block.load();
        if found == Descriptor::BUSY {
            None
        } else if found.is_table(Level::L2) {
            Some((&self.page, Level::L3))
        } else {
            Some((&self.block, Level::L2))
        }
    }

    /// Breaks the block, invalidates, makes a table of leaves that say the same.
    fn split(&self) {
        let found = self.block.load();
        let Ok(broken) = self.block.break_leaf(found, IPA) else {
            return;
        };
        if !found.is_writable() {
            protect(&self.page, Level::L3);
        }
        let clean = broken.invalidate();
        self.hardware.invalidate();
        clean.make(Descriptor::table(TABLE));
    }

    fn write(&self) {
        for _ in 0..4 {
            if self.hardware.store(|| {
                self.walk()
                    .map_or(Descriptor::BUSY, |(slot, _)| slot.load())
            }) {
                return;
            }
            match self.walk() {
                Some((slot, level)) if make_writable(slot, level) => {
                    self.bitmap.set(PAGE, GUEST_CPU);
                }
                Some(_) => {}
                None => thread::yield_now(),
            }
            self.hardware.invalidate();
        }
    }

    /// Takes the page's bit, protects its leaf wherever it is, copies. `wait` for a busy slot or skip it.
    fn clear(&self, wait: bool) {
        if !take(&self.bitmap) {
            return;
        }
        loop {
            match self.walk() {
                Some((slot, level)) => {
                    protect(slot, level);
                    // A block that became a table under our hands is looked at again.
                    if self.walk().is_some_and(|(now, _)| core::ptr::eq(now, slot)) {
                        break;
                    }
                }
                None if wait => thread::yield_now(),
                None => break,
            }
        }
        self.hardware.invalidate();
        self.copied.store(self.hardware.copy(), Ordering::Relaxed);
    }
}

fn clear_against_split(wait: bool) {
    check(move || {
        let tree = Tree::new();
        let splitter = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || tree.split())
        };
        tree.clear(wait);
        splitter.join().unwrap();
        // Both are over; now the guest writes.
        tree.write();
        let unseen = tree.hardware.copy() != tree.copied.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(&tree.bitmap), "a write was lost");
    });
}

#[test]
fn good_clear_waits_for_a_busy_slot() {
    clear_against_split(true);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_clear_that_skips_a_busy_slot_loses_a_write() {
    clear_against_split(false);
}

#[test]
fn good_fault_against_split_ends_writable_and_recorded() {
    check(|| {
        let tree = Tree::new();
        protect(&tree.block, Level::L2);
        take(&tree.bitmap);
        let splitter = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || tree.split())
        };
        tree.write();
        splitter.join().unwrap();
        tree.write();
        assert!(tree.hardware.copy() >= 1, "no progress");
        assert!(is_recorded(&tree.bitmap), "a write was lost");
    });
}

#[test]
fn good_two_splits_of_one_block_replace_it_once() {
    check(|| {
        let tree = Tree::new();
        let found = tree.block.load();
        let split = move |tree: &Tree| match tree.block.break_leaf(found, IPA) {
            Ok(broken) => {
                broken.invalidate().make(Descriptor::table(TABLE));
                1
            }
            Err(_) => 0,
        };
        let other = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || split(&tree))
        };
        assert_eq!(split(&tree) + other.join().unwrap(), 1);
        assert_eq!(tree.block.load(), Descriptor::table(TABLE));
    });
}

#[test]
fn good_table_is_filled_for_whoever_finds_it_linked() {
    check(|| {
        let parent = Arc::new(Slot::new(Descriptor::EMPTY));
        let child = Arc::new(AtomicU64::new(0));
        let walker = {
            let (parent, child) = (Arc::clone(&parent), Arc::clone(&child));
            thread::spawn(move || {
                if parent.load().is_table(Level::L2) {
                    assert_eq!(
                        child.load(Ordering::Relaxed),
                        7,
                        "an unfilled table was found"
                    );
                }
            })
        };
        child.store(7, Ordering::Relaxed);
        let Ok(clean) = parent.claim() else {
            panic!("nobody else claims")
        };
        clean.make(Descriptor::table(TABLE));
        walker.join().unwrap();
    });
}

#[test]
#[should_panic = "an unfilled table was found"]
fn bad_table_linked_before_it_is_filled_is_found_empty() {
    check(|| {
        let parent = Arc::new(Slot::new(Descriptor::EMPTY));
        let child = Arc::new(AtomicU64::new(0));
        let walker = {
            let (parent, child) = (Arc::clone(&parent), Arc::clone(&child));
            thread::spawn(move || {
                if parent.load().is_table(Level::L2) {
                    assert_eq!(
                        child.load(Ordering::Relaxed),
                        7,
                        "an unfilled table was found"
                    );
                }
            })
        };
        let Ok(clean) = parent.claim() else {
            panic!("nobody else claims")
        };
        clean.make(Descriptor::table(TABLE));
        child.store(7, Ordering::Relaxed);
        walker.join().unwrap();
    });
}

/// Two CPUs map one page, zeroing it first; the guest of whoever was first writes at once.
fn two_mappings(map: fn(&Slot, &AtomicU64) -> bool) {
    check(move || {
        let slot = Arc::new(Slot::new(Descriptor::EMPTY));
        let memory = Arc::new(AtomicU64::new(0xdead));
        let touch = move |slot: &Slot, memory: &AtomicU64| {
            if map(slot, memory) {
                memory.fetch_add(1, Ordering::Relaxed);
                1
            } else {
                0
            }
        };
        let other = {
            let (slot, memory) = (Arc::clone(&slot), Arc::clone(&memory));
            thread::spawn(move || touch(&slot, &memory))
        };
        let written = touch(&slot, &memory) + other.join().unwrap();
        assert_eq!(
            memory.load(Ordering::Relaxed),
            written,
            "a write was zeroed"
        );
    });
}

#[test]
fn good_claim_makes_one_cpu_zero_the_page() {
    two_mappings(|slot, memory| match slot.claim() {
        Ok(clean) => {
            memory.store(0, Ordering::Relaxed);
            clean.make(leaf(true, Level::L3));
            true
        }
        Err(_) => false,
    });
}

#[test]
#[should_panic = "a write was zeroed"]
fn bad_zeroing_without_a_claim_destroys_a_write() {
    two_mappings(|slot, memory| {
        if slot.load() != Descriptor::EMPTY {
            return false;
        }
        memory.store(0, Ordering::Relaxed);
        slot.compare_and_swap(Descriptor::EMPTY, leaf(true, Level::L3))
            .is_ok()
    });
}
