//! Grace periods (rules 20, 22, 23): nothing is freed under a walker, and waiting ends.

use loom::cell::UnsafeCell;
use loom::sync::Arc;

use loom::thread;
use vellum::addr::Pa;
use vellum::arch::atomic::{AtomicU64, Ordering, fence};
use vellum::mmu::Level;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::table::Slot;
use vellum::sync::published::Published;
use vellum::sync::quiescence::{CpuId, Domain};

use crate::check;

/// A slot that leads to a table, whose memory loom watches.
struct Tree {
    link: Slot,
    table: UnsafeCell<u64>,
    domain: Domain,
    /// The mark of a walker that does not use the domain.
    mark: AtomicU64,
}

// SAFETY: Loom reports every access to the cell that is not ordered; that is what is tested.
unsafe impl Sync for Tree {}
// SAFETY: Nothing in it belongs to a thread.
unsafe impl Send for Tree {}

const LINKED: Descriptor = Descriptor::table(Pa::new(0x1000));

impl Tree {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            link: Slot::new(LINKED),
            table: UnsafeCell::new(7),
            domain: Domain::new(2),
            mark: AtomicU64::new(0),
        })
    }

    fn read_if_linked(&self) {
        if self.link.load().is_table(Level::L2) {
            // SAFETY: Reads an integer.
            self.table.with(|table| unsafe { assert_eq!(*table, 7) });
        }
    }

    fn walk(&self) {
        let _active = self.domain.enter(CpuId(1));
        self.read_if_linked();
    }

    fn unlink(&self) {
        self.link
            .compare_and_swap(LINKED, Descriptor::EMPTY)
            .unwrap();
    }

    fn free(&self) {
        // SAFETY: Writes an integer.
        self.table.with_mut(|table| unsafe { *table = 0xdead });
    }
}

fn walker_against(walk: fn(&Tree), free: fn(&Tree)) {
    check(move || {
        let tree = Tree::new();
        let walker = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || walk(&tree))
        };
        free(&tree);
        walker.join().unwrap();
    });
}

#[test]
fn good_table_is_freed_after_a_grace_period() {
    walker_against(Tree::walk, |tree| {
        tree.unlink();
        tree.domain.wait();
        tree.free();
    });
}

#[test]
#[should_panic]
fn bad_table_freed_without_a_grace_period_is_read() {
    walker_against(Tree::walk, |tree| {
        tree.unlink();
        tree.free();
    });
}

#[test]
#[should_panic]
fn bad_grace_period_before_unlinking_frees_a_table_that_is_read() {
    walker_against(Tree::walk, |tree| {
        tree.domain.wait();
        tree.unlink();
        tree.free();
    });
}

#[test]
#[should_panic]
fn bad_walker_outside_a_section_reads_a_freed_table() {
    walker_against(Tree::read_if_linked, |tree| {
        tree.unlink();
        tree.domain.wait();
        tree.free();
    });
}

/// The protocol of `Domain` for one walker, with or without its fences.
fn by_hand(walker_fenced: bool, waiter_fenced: bool) {
    check(move || {
        let tree = Tree::new();
        let walker = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || {
                tree.mark.store(1, Ordering::Relaxed);
                if walker_fenced {
                    fence(Ordering::SeqCst);
                }
                tree.read_if_linked();
                tree.mark.store(2, Ordering::Release);
            })
        };
        tree.unlink();
        if waiter_fenced {
            fence(Ordering::SeqCst);
        }
        while tree.mark.load(Ordering::Acquire) == 1 {
            thread::yield_now();
        }
        tree.free();
        walker.join().unwrap();
    });
}

#[test]
fn good_walker_and_waiter_with_fences() {
    by_hand(true, true);
}

#[test]
#[should_panic]
fn bad_walker_without_fence_reads_a_freed_table() {
    by_hand(false, true);
}

#[test]
#[should_panic]
fn bad_waiter_without_fence_frees_a_table_that_is_read() {
    by_hand(true, false);
}

#[test]
fn good_snapshot_lives_as_long_as_its_readers() {
    check(|| {
        let shared = Arc::new((Published::new(Arc::new(1_u64)), Domain::new(2)));
        let reader = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let active = shared.1.enter(CpuId(1));
                let value = **shared.0.load(&active);
                assert!(value == 1 || value == 2);
            })
        };
        let old = shared.0.replace(Arc::new(2)).free(&shared.1);
        assert_eq!(Arc::strong_count(&old), 1);
        reader.join().unwrap();
    });
}

#[test]
fn good_two_quiescent_waiters_both_end() {
    check(|| {
        let domain = Arc::new(Domain::new(2));
        let other = {
            let domain = Arc::clone(&domain);
            thread::spawn(move || {
                drop(domain.enter(CpuId(1)));
                domain.wait();
            })
        };
        drop(domain.enter(CpuId(0)));
        domain.wait();
        other.join().unwrap();
    });
}

#[test]
#[should_panic]
fn bad_two_waiters_inside_their_sections_wait_for_each_other() {
    check(|| {
        let domain = Arc::new(Domain::new(2));
        let other = {
            let domain = Arc::clone(&domain);
            thread::spawn(move || {
                let _active = domain.enter(CpuId(1));
                domain.wait();
            })
        };
        let _active = domain.enter(CpuId(0));
        domain.wait();
        other.join().unwrap();
    });
}
