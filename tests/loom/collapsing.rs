//! Tables that become blocks against faults, `clear` and unmapping (rule 27), at both levels of break-before-make.

use loom::sync::Arc;

use loom::thread;
use vellum::addr::{Ipa, Pa};
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::table::Slot;
use vellum::mmu::{Bbm, Level};

use crate::check;
use crate::hardware::{GUEST_CPU, Hardware, PAGE, bitmap, is_recorded, leaf, page_slot, take};
use crate::splitting::LEVELS;

const TABLE: Descriptor = Descriptor::table(Pa::new(0x1000));
const IPA: Ipa = Ipa::new(0x8000_0000);

/// A logged table with the page's leaf in it, and the slot that leads to the table.
struct Tree {
    parent: Slot,
    page: Slot,
    bitmap: Bitmap,
    hardware: Hardware,
    copied: AtomicU64,
}

/// What software does about a leaf that is held by another.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Held {
    Waits,
    IsIgnored,
}

impl Tree {
    /// A page that is writable and recorded, or neither.
    fn new(dirty: bool) -> Arc<Self> {
        let tree = Self {
            parent: Slot::new(TABLE),
            page: page_slot(dirty),
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
        let found = self.parent.load();
        if found.is_table(Level::L2) {
            (&self.page, Level::L3, self.page.load())
        } else {
            (&self.parent, Level::L2, found)
        }
    }

    /// As it ships: freeze, replace, invalidate, let go.
    fn collapse(&self, bbm: Bbm) {
        let page = freeze(&self.page);
        let block = leaf(page.is_writable(), Level::L2);
        match bbm {
            Bbm::Zero => {
                let Ok(broken) = self.parent.break_table(TABLE, IPA) else {
                    panic!("nobody else replaces it")
                };
                let clean = broken.invalidate();
                self.hardware.invalidate();
                clean.make(block);
            }
            Bbm::Two => {
                swap(&self.parent, TABLE, block.frozen());
                self.hardware.invalidate();
                thaw(&self.parent);
            }
        }
    }

    /// A write fault: whether it made a leaf writable and recorded it.
    fn fault(&self, held: Held) -> bool {
        let (slot, level, found) = self.walk();
        if found.is_held() && held == Held::Waits || found == Descriptor::BUSY {
            thread::yield_now();
            return false;
        }
        if !found.is_leaf(level) || found.is_writable() {
            return false;
        }
        let changed = slot.compare_and_swap(found, found.writable()).is_ok();
        if changed {
            self.bitmap.set(PAGE, GUEST_CPU);
        }
        changed
    }

    /// The guest writes once, if it gets anywhere.
    fn write(&self) {
        for _ in 0..3 {
            if self.hardware.store(|| self.walk().2) {
                return;
            }
            self.fault(Held::Waits);
            self.hardware.invalidate();
        }
    }

    /// Takes the page's bit, protects its leaf wherever it is, invalidates that leaf's address, copies.
    fn clear(&self, held: Held) {
        if !take(&self.bitmap) {
            return;
        }
        loop {
            let (slot, level, found) = self.walk();
            if found.is_held() && held == Held::Waits || found == Descriptor::BUSY {
                thread::yield_now();
                continue;
            }
            if found.is_writable() && slot.compare_and_swap(found, found.read_only()).is_err() {
                continue;
            }
            if level == Level::L3 {
                self.hardware.invalidate();
            } else {
                self.hardware.invalidate_block();
            }
            break;
        }
        self.copied.store(self.hardware.copy(), Ordering::Relaxed);
    }

    fn assert_nothing_lost(&self) {
        let unseen = self.hardware.copy() != self.copied.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(&self.bitmap), "a write was lost");
    }
}

/// Freezes the leaf in `slot` and returns it as it was.
fn freeze(slot: &Slot) -> Descriptor {
    let mut found = slot.load();
    while let Err(now) = slot.compare_and_swap(found, found.frozen()) {
        found = now;
    }
    found
}

fn thaw(slot: &Slot) {
    let mut found = slot.load();
    while let Err(now) = slot.compare_and_swap(found, found.thawed()) {
        found = now;
    }
}

/// Replaces what only the caller may replace.
fn swap(slot: &Slot, old: Descriptor, new: Descriptor) {
    assert!(slot.compare_and_swap(old, new).is_ok());
}

fn collapse_against_write(collapse: impl Fn(&Tree) + Copy + Send + Sync + 'static, dirty: bool) {
    check(move || {
        let tree = Tree::new(dirty);
        let collapser = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || collapse(&tree))
        };
        tree.write();
        collapser.join().unwrap();
        tree.write();
        assert!(tree.hardware.copy() > 0, "no progress");
        tree.assert_nothing_lost();
    });
}

#[test]
fn good_collapse_against_write_fault_ends_writable_and_recorded() {
    for bbm in LEVELS {
        for dirty in [false, true] {
            collapse_against_write(move |tree| tree.collapse(bbm), dirty);
        }
    }
}

/// One fault and one collapse: what the fault permitted is still permitted afterwards.
fn collapse_against_fault(bbm: Bbm, held: Held) {
    check(move || {
        let tree = Tree::new(false);
        let collapser = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || tree.collapse(bbm))
        };
        let permitted = tree.fault(held);
        collapser.join().unwrap();
        assert!(
            !permitted || tree.walk().2.is_writable(),
            "a permission was lost"
        );
    });
}

#[test]
fn good_fault_leaves_a_frozen_leaf_alone() {
    for bbm in LEVELS {
        collapse_against_fault(bbm, Held::Waits);
    }
}

#[test]
#[should_panic = "a permission was lost"]
fn bad_fault_that_relaxes_a_frozen_leaf_at_level_0_loses_the_permission() {
    collapse_against_fault(Bbm::Zero, Held::IsIgnored);
}

#[test]
#[should_panic = "a permission was lost"]
fn bad_fault_that_relaxes_a_frozen_leaf_at_level_2_loses_the_permission() {
    collapse_against_fault(Bbm::Two, Held::IsIgnored);
}

fn collapse_against_clear(
    collapse: impl Fn(&Tree) + Copy + Send + Sync + 'static,
    held: Held,
    guest: bool,
) {
    check(move || {
        let tree = Tree::new(true);
        // The page's entry is cached.
        tree.write();
        let collapser = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || collapse(&tree))
        };
        let writer = guest.then(|| {
            let tree = Arc::clone(&tree);
            thread::spawn(move || {
                // Through what is cached, if it is yet.
                tree.hardware.store(|| Descriptor::EMPTY);
            })
        });
        tree.clear(held);
        if let Some(writer) = writer {
            writer.join().unwrap();
        }
        collapser.join().unwrap();
        tree.assert_nothing_lost();
        tree.write();
        tree.assert_nothing_lost();
    });
}

#[test]
fn good_collapse_against_clear_loses_no_bit() {
    for bbm in LEVELS {
        collapse_against_clear(move |tree| tree.collapse(bbm), Held::Waits, false);
    }
}

#[test]
fn good_collapse_against_clear_leaves_nothing_cached_that_writes_unseen() {
    for bbm in LEVELS {
        collapse_against_clear(move |tree| tree.collapse(bbm), Held::Waits, true);
    }
}

#[test]
#[should_panic = "a write was lost"]
fn bad_clear_that_protects_a_frozen_leaf_at_level_0_loses_a_write() {
    collapse_against_clear(|tree| tree.collapse(Bbm::Zero), Held::IsIgnored, false);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_clear_that_protects_a_frozen_leaf_at_level_2_loses_a_write() {
    collapse_against_clear(|tree| tree.collapse(Bbm::Two), Held::IsIgnored, false);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_collapse_that_does_not_freeze_loses_a_write() {
    let collapse = |tree: &Tree| {
        let block = leaf(tree.page.load().is_writable(), Level::L2);
        swap(&tree.parent, TABLE, block);
        tree.hardware.invalidate();
    };
    collapse_against_clear(collapse, Held::Waits, false);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_block_let_go_at_level_2_before_the_invalidation_loses_a_write() {
    let collapse = |tree: &Tree| {
        let page = freeze(&tree.page);
        swap(&tree.parent, TABLE, leaf(page.is_writable(), Level::L2));
        tree.hardware.invalidate();
    };
    collapse_against_clear(collapse, Held::Waits, true);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_block_made_at_level_0_before_the_invalidation_loses_a_write() {
    let collapse = |tree: &Tree| {
        let page = freeze(&tree.page);
        swap(&tree.parent, TABLE, Descriptor::BUSY);
        swap(
            &tree.parent,
            Descriptor::BUSY,
            leaf(page.is_writable(), Level::L2),
        );
        tree.hardware.invalidate();
    };
    collapse_against_clear(collapse, Held::Waits, true);
}

/// The page is unmapped, to be given to somebody else, while its table is collapsed.
fn collapse_against_unmap(bbm: Bbm, held: Held) {
    check(move || {
        let tree = Tree::new(false);
        let collapser = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || {
                if tree.page.load() != Descriptor::EMPTY {
                    let found = tree.page.load();
                    if found == Descriptor::EMPTY
                        || tree.page.compare_and_swap(found, found.frozen()).is_err()
                    {
                        return;
                    }
                    let block = leaf(false, Level::L2);
                    match bbm {
                        Bbm::Zero => {
                            let Ok(broken) = tree.parent.break_table(TABLE, IPA) else {
                                panic!("nobody else replaces it")
                            };
                            broken.invalidate().make(block);
                        }
                        Bbm::Two => {
                            swap(&tree.parent, TABLE, block.frozen());
                            thaw(&tree.parent);
                        }
                    }
                }
            })
        };
        let (slot, level, found) = tree.walk();
        let unmapped = level == Level::L3
            && !(found.is_held() && held == Held::Waits)
            && slot.compare_and_swap(found, Descriptor::EMPTY).is_ok();
        collapser.join().unwrap();
        let (_, level, found) = tree.walk();
        assert!(!(unmapped && found.is_leaf(level)), "memory is reachable");
    });
}

#[test]
fn good_unmap_leaves_a_frozen_leaf_alone() {
    for bbm in LEVELS {
        collapse_against_unmap(bbm, Held::Waits);
    }
}

#[test]
#[should_panic = "memory is reachable"]
fn bad_unmap_of_a_frozen_leaf_leaves_its_memory_reachable() {
    collapse_against_unmap(Bbm::Two, Held::IsIgnored);
}

/// Hardware walks through a table entry that it has cached, and sets the access flag of a page, until an invalidation
/// forgets the entry.
fn access_flag_against_collapse(collapse: fn(&Slot, &Slot, &AtomicU64)) {
    check(move || {
        let old = leaf(false, Level::L3).old();
        let shared = Arc::new((
            Slot::new(TABLE),
            Slot::new(old),
            // Nonzero while the walker holds the table entry; a step of its own, as `TLBI; DSB` waits for it.
            AtomicU64::new(1),
            loom::sync::Mutex::new(()),
        ));
        let walker = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let _one_step = shared.3.lock().unwrap();
                if shared.2.load(Ordering::Acquire) == 0 {
                    return false;
                }
                let found = shared.1.load();
                shared.1.compare_and_swap(found, found.young()).is_ok()
            })
        };
        freeze(&shared.1);
        let invalidated = AtomicU64::new(0);
        collapse(&shared.0, &shared.1, &invalidated);
        {
            let _one_step = shared.3.lock().unwrap();
            shared.2.store(0, Ordering::Release);
        }
        if invalidated.load(Ordering::Relaxed) != 0 && shared.1.load().is_young() {
            let block = shared.0.load();
            swap(&shared.0, block, block.young());
        }
        thaw(&shared.0);
        let set = walker.join().unwrap();
        assert!(
            !set || shared.0.load().is_young(),
            "an access flag was lost"
        );
    });
}

/// The block as the table says it is now.
fn replace(parent: &Slot, page: &Slot) {
    let block = leaf(false, Level::L2).old().frozen();
    let block = if page.load().is_young() {
        block.young()
    } else {
        block
    };
    swap(parent, TABLE, block);
}

#[test]
fn good_access_flag_set_in_a_detached_table_is_folded_after_the_invalidation() {
    access_flag_against_collapse(|parent, page, fold| {
        replace(parent, page);
        fold.store(1, Ordering::Relaxed);
    });
}

#[test]
#[should_panic = "an access flag was lost"]
fn bad_access_flag_folded_before_the_invalidation_is_lost() {
    access_flag_against_collapse(|parent, page, _| replace(parent, page));
}
