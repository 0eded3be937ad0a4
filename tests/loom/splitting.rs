//! Blocks that are split against faults, `clear` and each other (rules 9, 10, 18, 25), at both levels of
//! break-before-make.

use loom::sync::Arc;

use loom::thread;
use vellum::addr::{Ipa, Pa};
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::table::Slot;
use vellum::mmu::{Bbm, Level};

use crate::check;
use crate::hardware::{GUEST_CPU, Hardware, PAGE, bitmap, is_recorded, leaf, make_writable, take};

pub(crate) const LEVELS: [Bbm; 2] = [Bbm::Zero, Bbm::Two];
const TABLE: Descriptor = Descriptor::table(Pa::new(0x1000));
const IPA: Ipa = Ipa::new(0x8000_5000);

/// A logged block, and the slot for the page in the table that replaces it.
struct Tree {
    block: Slot,
    page: Slot,
    bitmap: Bitmap,
    hardware: Hardware,
    copied: AtomicU64,
}

impl Tree {
    /// A block that is writable and its page recorded, or neither.
    fn new(dirty: bool) -> Arc<Self> {
        let tree = Self {
            block: Slot::new(leaf(dirty, Level::L2)),
            page: Slot::new(Descriptor::EMPTY),
            bitmap: bitmap(),
            hardware: Hardware::new(None),
            copied: AtomicU64::new(0),
        };
        if dirty {
            tree.bitmap.set(PAGE, GUEST_CPU);
        }
        Arc::new(tree)
    }

    /// The slot that decides about the page, with its level and contents.
    fn walk(&self) -> (&Slot, Level, Descriptor) {
        let found = self.block.load();
        if found.is_table(Level::L2) {
            (&self.page, Level::L3, self.page.load())
        } else {
            (&self.block, Level::L2, found)
        }
    }

    /// Fills the table with what the block `found` says.
    fn fill(&self, found: Descriptor) {
        let page = leaf(found.is_writable(), Level::L3);
        let filled = self.page.compare_and_swap(Descriptor::EMPTY, page);
        assert!(filled.is_ok(), "a table was filled twice");
    }

    /// As it ships: fill off-line, then replace the very block that was read.
    fn split(&self, bbm: Bbm) {
        let found = self.block.load();
        self.fill(found);
        self.replace(found, bbm);
    }

    fn replace(&self, found: Descriptor, bbm: Bbm) {
        match bbm {
            Bbm::Zero => {
                if let Ok(broken) = self.block.break_leaf(found, IPA) {
                    let clean = broken.invalidate();
                    self.hardware.invalidate();
                    clean.make(TABLE);
                }
            }
            Bbm::Two => {
                // The invalidation is owed; old entries lead to the same memory.
                let _changed_meanwhile = self.block.compare_and_swap(found, TABLE);
            }
        }
    }

    /// The guest writes once, if it gets anywhere: a fault makes the leaf writable, then sets the page's bit.
    fn write(&self) {
        for _ in 0..3 {
            if self.hardware.store(|| self.walk().2) {
                return;
            }
            let (slot, level, found) = self.walk();
            if found.is_held() {
                thread::yield_now();
            } else if make_writable(slot, level) {
                self.bitmap.set(PAGE, GUEST_CPU);
            }
            self.hardware.invalidate();
        }
    }

    /// Takes the page's bit, protects its leaf wherever it is, runs `invalidate`, copies.
    fn clear(&self, invalidate: fn(&Hardware)) {
        if !take(&self.bitmap) {
            return;
        }
        loop {
            let (slot, level, found) = self.walk();
            if found.is_held() {
                thread::yield_now();
                continue;
            }
            // What is protected is what was found: a block that became a table under our hands is looked at again.
            if !found.is_writable() || slot.compare_and_swap(found, found.read_only()).is_ok() {
                assert!(found.is_leaf(level));
                break;
            }
        }
        invalidate(&self.hardware);
        self.copied.store(self.hardware.copy(), Ordering::Relaxed);
    }

    fn assert_nothing_lost(&self) {
        let unseen = self.hardware.copy() != self.copied.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(&self.bitmap), "a write was lost");
    }
}

/// `clear` meets a block on its way through a split and a collapse, which both keep what it says.
fn second_look(clear: fn(&Slot) -> bool) {
    check(move || {
        let block = leaf(true, Level::L2);
        let slot = Arc::new(Slot::new(block));
        let other = {
            let slot = Arc::clone(&slot);
            thread::spawn(move || {
                // Either step fails if the block was protected first, and what follows keeps the permission.
                if slot.compare_and_swap(block, TABLE).is_ok() {
                    assert!(slot.compare_and_swap(TABLE, block).is_ok());
                }
            })
        };
        let protected = clear(&slot);
        other.join().unwrap();
        assert!(
            !(protected && slot.load().is_writable()),
            "a write was lost"
        );
    });
}

/// Protects the leaf, if it is one; whether it was.
fn protect_leaf(slot: &Slot) -> bool {
    let mut found = slot.load();
    while found.is_leaf(Level::L2) {
        match slot.compare_and_swap(found, found.read_only()) {
            Ok(()) => return true,
            Err(now) => found = now,
        }
    }
    false
}

#[test]
fn good_clear_believes_what_it_saw_at_one_moment() {
    second_look(protect_leaf);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_second_look_at_a_block_loses_a_write() {
    second_look(|slot| {
        protect_leaf(slot);
        !slot.load().is_table(Level::L2)
    });
}

fn against(split: impl Fn(&Tree) + Copy + Send + Sync + 'static, work: fn(&Tree), dirty: bool) {
    check(move || {
        let tree = Tree::new(dirty);
        if dirty {
            // The block's entry is cached.
            tree.write();
        }
        let splitter = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || split(&tree))
        };
        work(&tree);
        splitter.join().unwrap();
        // Both are over; now the guest writes.
        tree.write();
        tree.assert_nothing_lost();
        assert!(tree.hardware.copy() > 0, "no progress");
    });
}

#[test]
fn good_split_against_write_fault_ends_writable_and_recorded() {
    for bbm in LEVELS {
        against(move |tree| tree.split(bbm), Tree::write, false);
    }
}

#[test]
fn good_split_against_clear_loses_no_bit() {
    for bbm in LEVELS {
        against(
            move |tree| tree.split(bbm),
            |tree| tree.clear(Hardware::invalidate),
            true,
        );
    }
}

/// The table says what the block said before somebody changed it.
fn split_whatever_is_there(tree: &Tree, bbm: Bbm) {
    tree.fill(tree.block.load());
    tree.replace(tree.block.load(), bbm);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_split_at_level_2_of_a_block_that_changed_meanwhile_loses_a_write() {
    against(
        |tree| split_whatever_is_there(tree, Bbm::Two),
        |tree| tree.clear(Hardware::invalidate),
        true,
    );
}

#[test]
#[should_panic = "a write was lost"]
fn bad_split_at_level_0_of_a_block_that_changed_meanwhile_loses_a_write() {
    against(
        |tree| split_whatever_is_there(tree, Bbm::Zero),
        |tree| tree.clear(Hardware::invalidate),
        true,
    );
}

#[test]
#[should_panic = "a write was lost"]
fn bad_level_hint_after_a_split_at_level_2_leaves_the_block_entry() {
    against(
        |tree| tree.split(Bbm::Two),
        |tree| tree.clear(Hardware::invalidate_pages),
        true,
    );
}

/// A guest that reads at every moment of a split at level 2.
fn read_against_split(split: fn(&Tree)) {
    check(move || {
        let tree = Tree::new(false);
        let splitter = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || split(&tree))
        };
        let (_, level, found) = tree.walk();
        assert!(found.is_leaf(level), "memory was not mapped");
        splitter.join().unwrap();
    });
}

#[test]
fn good_split_at_level_2_keeps_memory_mapped() {
    read_against_split(|tree| tree.split(Bbm::Two));
}

#[test]
#[should_panic = "memory was not mapped"]
fn bad_table_linked_at_level_2_before_it_is_filled_unmaps() {
    read_against_split(|tree| {
        let found = tree.block.load();
        tree.replace(found, Bbm::Two);
        tree.fill(found);
    });
}

/// Two CPUs split one block, each into a table of its own, expecting what `expect` makes of the block each read first. The
/// table that is linked in the end is that of the one that succeeded.
fn split_against_split(expect: fn(&Slot, Descriptor) -> Descriptor, bbm: Bbm) {
    check(move || {
        let block = Arc::new(Slot::new(leaf(false, Level::L2)));
        let split = move |block: &Slot, table: u64| {
            let read = block.load();
            if !read.is_leaf(Level::L2) {
                return 0;
            }
            let table = Descriptor::table(Pa::new(table));
            let expected = expect(block, read);
            match bbm {
                Bbm::Zero => match block.break_leaf(expected, IPA) {
                    Ok(broken) => broken.invalidate().make(table),
                    Err(_) => return 0,
                },
                Bbm::Two => {
                    if block.compare_and_swap(expected, table).is_err() {
                        return 0;
                    }
                }
            }
            table.address().raw()
        };
        let other = {
            let block = Arc::clone(&block);
            thread::spawn(move || split(&block, 0x1000))
        };
        let mine = split(&block, 0x2000);
        let others = other.join().unwrap();
        let linked = block.load().address().raw();
        assert_eq!(mine + others, linked, "a block was split twice");
    });
}

#[test]
fn good_two_splits_of_one_block_link_one_table() {
    for bbm in LEVELS {
        split_against_split(|_, read| read, bbm);
    }
}

#[test]
#[should_panic = "a block was split twice"]
fn bad_split_at_level_2_that_replaces_whatever_is_there_drops_a_table() {
    split_against_split(|block, _| block.load(), Bbm::Two);
}

#[test]
#[should_panic = "a block was split twice"]
fn bad_split_at_level_0_that_breaks_whatever_is_there_drops_a_table() {
    split_against_split(|block, _| block.load(), Bbm::Zero);
}
