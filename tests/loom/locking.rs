//! The MMU lock: what is done under its exclusive side is seen by, and overlaps with, nobody on its shared side.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use vellum::arch;
use vellum::arch::atomic::{AtomicU32, Ordering};
use vellum::mmu::Locking;
use vellum::mmu::lock::MmuLock;

use crate::check_within;

/// What the lock guards: loom complains when somebody reads it while another writes, or without having synchronized.
struct Guarded(UnsafeCell<u32>);

// SAFETY: loom checks every access.
unsafe impl Sync for Guarded {}

impl Guarded {
    fn read(&self) -> u32 {
        // SAFETY: loom checks it.
        self.0.with(|value| unsafe { *value })
    }

    fn change(&self) {
        // SAFETY: loom checks it.
        self.0.with_mut(|value| unsafe { *value += 1 });
    }
}

fn with_exclusive_users(locking: Locking, users: usize) {
    check_within(2, move || {
        let world = Arc::new((MmuLock::new(locking), Guarded(UnsafeCell::new(0))));
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                let held = world.0.exclusive();
                world.1.change();
                drop(held);
            })
        };
        for user in 0..2 {
            if user < users - 1 {
                let held = world.0.exclusive();
                world.1.change();
                drop(held);
            } else {
                let held = world.0.share();
                world.1.read();
                drop(held);
            }
        }
        other.join().unwrap();
        let held = world.0.exclusive();
        assert_eq!(usize::try_from(world.1.read()).unwrap(), users);
        drop(held);
    });
}

#[test]
fn good_readers_and_an_exclusive_user_never_overlap() {
    with_exclusive_users(Locking::Rwlock, 1);
    with_exclusive_users(Locking::Rwlock, 2);
}

#[test]
fn good_a_mutex_and_an_exclusive_user_never_overlap() {
    with_exclusive_users(Locking::Mutex, 1);
    with_exclusive_users(Locking::Mutex, 2);
}

#[test]
fn good_holders_of_a_mutex_never_overlap() {
    check_within(2, || {
        let world = Arc::new((MmuLock::new(Locking::Mutex), Guarded(UnsafeCell::new(0))));
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    let held = world.0.share();
                    world.1.change();
                    drop(held);
                }
            })
        };
        let held = world.0.share();
        world.1.change();
        drop(held);
        other.join().unwrap();
        let held = world.0.share();
        assert_eq!(world.1.read(), 3);
        drop(held);
    });
}

/// A reader that looks for an exclusive user before it counts itself in, rather than by counting itself in.
#[test]
#[should_panic(expected = "Causality violation")]
fn bad_looking_before_counting_lets_a_reader_in_beside_an_exclusive_user() {
    const HELD: u32 = 1;
    const READER: u32 = 2;
    check_within(2, || {
        let world = Arc::new((AtomicU32::new(0), Guarded(UnsafeCell::new(0))));
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                let taken = world
                    .0
                    .compare_exchange(0, HELD, Ordering::Acquire, Ordering::Relaxed);
                if taken.is_ok() {
                    world.1.change();
                    world.0.fetch_sub(HELD, Ordering::Release);
                }
            })
        };
        while world.0.load(Ordering::Acquire) & HELD != 0 {
            arch::yield_now();
        }
        world.0.fetch_add(READER, Ordering::Acquire);
        world.1.read();
        world.0.fetch_sub(READER, Ordering::Release);
        other.join().unwrap();
    });
}
