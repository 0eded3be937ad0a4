//! The MMU lock of a VM, in three modes.
//!
//! The code above is one: [`MmuLock::share`] guards changes of leaves, [`MmuLock::exclusive`] guards what tolerates no
//! concurrent change. The mode decides what they cost:
//!
//! | mode | `share` | `exclusive` | reproduces |
//! |---|---|---|---|
//! | [`Locking::Mutex`] | excludes everybody | excludes everybody | KVM before 2022 |
//! | [`Locking::Rwlock`] | excludes `exclusive` | excludes everybody | KVM since 2022 |
//! | [`Locking::Lockless`] | nothing, writes nothing | excludes other `exclusive` only | beyond |
//!
//! Correctness never rests on the mode: every change of a live slot is a compare-and-swap, and what is freed is freed
//! after a grace period. Nothing is waited for, allocated or freed while a guard is held.

use crate::arch;
use crate::arch::atomic::{AtomicU32, Ordering};
use crate::sync::percpu;
use crate::trace::Event;

/// What the shared side of a VM's MMU lock costs; chosen when the VM is created.
///
/// Nothing is the first: faults tell it from the others by a comparison with zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Locking {
    /// Nothing.
    Lockless,
    /// The lock, exclusively.
    Mutex,
    /// The lock, for reading.
    Rwlock,
}

impl Locking {
    /// The mode's name on command lines and in results.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mutex => "mutex",
            Self::Rwlock => "rwlock",
            Self::Lockless => "lockless",
        }
    }

    /// The mode called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Mutex, Self::Rwlock, Self::Lockless]
            .into_iter()
            .find(|mode| mode.name() == name)
    }
}

/// Somebody has the lock for himself.
const HELD: u32 = 1;
/// One exclusive user that waits; a VM has less than 255 CPUs that could. While there is one, `share` stays away: see [`MmuLock::exclusive`].
const INTENT: u32 = 1 << 1;
const INTENTS: u32 = 0xff << 1;
/// One more on the shared side: who holds it in mode `rwlock`, who waits for it in mode `mutex`.
const SHARER: u32 = 1 << 9;
const SHARERS: u32 = !(HELD | INTENTS);

/// How long somebody who waits does not look, in rounds of a loop: for each other who waits, about what it takes to take the
/// lock, use it and give it back twice; and who waits alone looks again soon.
const ROUNDS_EACH: u32 = 300;
const ROUNDS_ALONE: u32 = 20;
/// For so many at most: those who waited may be gone long before.
const MOST_WAITING: u32 = 64;

/// The MMU lock of one VM.
///
/// What is written by whoever takes it has a line of its own: a CPU that reads the mode takes no line from another.
#[derive(Debug)]
pub struct MmuLock {
    word: Word,
    locking: Locking,
}

/// [`HELD`], [`INTENTS`] and [`SHARERS`].
#[derive(Debug)]
#[repr(align(128))]
struct Word(AtomicU32);

/// Leaves may be changed while this is held.
#[derive(Debug)]
#[must_use = "the lock is released as soon as this is dropped"]
pub struct Shared<'a> {
    word: &'a AtomicU32,
    locking: Locking,
}

/// Nothing else runs under this lock while this is held (except `share` in lockless mode).
#[derive(Debug)]
#[must_use = "the lock is released as soon as this is dropped"]
pub struct Exclusive<'a> {
    word: &'a AtomicU32,
}

impl Drop for Shared<'_> {
    #[inline]
    fn drop(&mut self) {
        let what = match self.locking {
            Locking::Lockless => return,
            Locking::Rwlock => SHARER,
            Locking::Mutex => HELD,
        };
        self.word.fetch_sub(what, Ordering::Release);
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.word.fetch_sub(HELD, Ordering::Release);
    }
}

impl MmuLock {
    /// A free lock.
    pub fn new(locking: Locking) -> Self {
        Self {
            word: Word(AtomicU32::new(0)),
            locking,
        }
    }

    /// The mode.
    pub fn locking(&self) -> Locking {
        self.locking
    }

    /// Permits changes of leaves.
    #[inline]
    pub fn share(&self) -> Shared<'_> {
        let word = &self.word.0;
        let locking = self.locking;
        match locking {
            Locking::Lockless => {}
            Locking::Rwlock => {
                percpu::count(Event::LockAcquired);
                if word.fetch_add(SHARER, Ordering::Acquire) & !SHARERS != 0 {
                    self.wait_to_read();
                }
            }
            Locking::Mutex => {
                percpu::count(Event::LockAcquired);
                let taken = word.compare_exchange(0, HELD, Ordering::Acquire, Ordering::Relaxed);
                if taken.is_err() {
                    self.wait_to_hold();
                }
            }
        }
        if cfg!(debug_assertions) && locking != Locking::Lockless {
            // Taking the lock and releasing it each write its line, which every CPU's fault path writes.
            percpu::count_many(Event::SharedLineWrites, 2);
        }
        Shared { word, locking }
    }

    /// Counts itself out again, and in when no exclusive user is there. It only looks until then: readers that count
    /// themselves in and out in a loop leave an exclusive user hardly a moment in which there is none.
    #[cold]
    fn wait_to_read(&self) {
        let word = &self.word.0;
        percpu::count(Event::LockContended);
        loop {
            word.fetch_sub(SHARER, Ordering::Relaxed);
            while word.load(Ordering::Relaxed) & !SHARERS != 0 {
                percpu::count(Event::LockSpins);
                arch::yield_now();
            }
            if word.fetch_add(SHARER, Ordering::Acquire) & !SHARERS == 0 {
                return;
            }
        }
    }

    /// Counts itself among those who wait, and looks the less often the more they are: then what is spent on looking is
    /// the same for any number of them. Whoever finds the lock free takes it. (A queue would hand it to one of them, who
    /// may not be running where CPUs are threads of an emulator.)
    #[cold]
    fn wait_to_hold(&self) {
        let word = &self.word.0;
        percpu::count(Event::LockContended);
        let mut waiting = 0;
        let mut now = word.load(Ordering::Acquire);
        loop {
            if now & (HELD | INTENTS) == 0 {
                let taken = word.compare_exchange(
                    now,
                    (now - waiting) | HELD,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                );
                match taken {
                    Ok(_) => return,
                    Err(other) => now = other,
                }
                continue;
            }
            percpu::count(Event::LockSpins);
            if waiting == 0 {
                waiting = SHARER;
                now = word.fetch_add(SHARER, Ordering::Relaxed) + SHARER;
            }
            let others = (now / SHARER).saturating_sub(1).min(MOST_WAITING);
            for _ in 0..ROUNDS_ALONE + others * ROUNDS_EACH {
                arch::yield_now();
            }
            now = word.load(Ordering::Acquire);
        }
    }

    /// Permits what tolerates no concurrent change.
    ///
    /// Says so before it waits: whoever faults then stays away. Otherwise it would starve under 64 faulting vCPUs.
    pub fn exclusive(&self) -> Exclusive<'_> {
        let word = &self.word.0;
        let hindrance = match self.locking {
            Locking::Mutex => HELD,
            Locking::Rwlock | Locking::Lockless => HELD | SHARERS,
        };
        percpu::count(Event::LockAcquired);
        let mut now = word.fetch_add(INTENT, Ordering::Relaxed) + INTENT;
        if now & hindrance != 0 {
            percpu::count(Event::LockContended);
        }
        loop {
            if now & hindrance == 0 {
                let taken = word.compare_exchange(
                    now,
                    (now - INTENT) | HELD,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                );
                match taken {
                    Ok(_) => break,
                    Err(other) => now = other,
                }
                continue;
            }
            percpu::count(Event::LockSpins);
            arch::yield_now();
            now = word.load(Ordering::Relaxed);
        }
        Exclusive { word }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{HELD, INTENTS, Locking, MmuLock, SHARER};
    use core::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn modes_have_names_that_come_back() {
        for mode in [Locking::Mutex, Locking::Rwlock, Locking::Lockless] {
            assert_eq!(Locking::from_name(mode.name()), Some(mode));
        }
        assert_eq!(Locking::from_name("spinlock"), None);
    }

    fn word(lock: &MmuLock) -> u32 {
        lock.word.0.load(Ordering::Relaxed)
    }

    #[test]
    fn readers_share_and_a_mutex_does_not() {
        let lock = MmuLock::new(Locking::Rwlock);
        let first = lock.share();
        let second = lock.share();
        assert_eq!(word(&lock), 2 * SHARER);
        drop((first, second));
        assert_eq!(word(&lock), 0);

        let lock = MmuLock::new(Locking::Mutex);
        let only = lock.share();
        assert_eq!(word(&lock), HELD);
        drop(only);
        drop(lock.exclusive());
        assert_eq!(word(&lock), 0);
    }

    #[test]
    fn lockless_sharing_touches_no_lock() {
        let lock = MmuLock::new(Locking::Lockless);
        let exclusive = lock.exclusive();
        drop(lock.share());
        drop(exclusive);
    }

    #[test]
    fn nobody_takes_the_lock_that_an_exclusive_user_waits_for() {
        for mode in [Locking::Rwlock, Locking::Mutex] {
            let lock = MmuLock::new(mode);
            let held = lock.share();
            std::thread::scope(|scope| {
                let exclusive = scope.spawn(|| drop(lock.exclusive()));
                while word(&lock) & INTENTS == 0 {
                    std::thread::yield_now();
                }
                let newcomer = scope.spawn(|| drop(lock.share()));
                // In mode mutex who comes later is counted; a reader has counted itself out again at some time.
                std::thread::sleep(std::time::Duration::from_millis(20));
                assert!(
                    !exclusive.is_finished() && !newcomer.is_finished(),
                    "{mode:?}"
                );
                drop(held);
            });
            assert_eq!(word(&lock), 0, "{mode:?}");
        }
    }

    #[test]
    fn changes_under_the_lock_are_never_at_the_same_time() {
        for mode in [Locking::Rwlock, Locking::Mutex] {
            let lock = MmuLock::new(mode);
            let (inside, sum) = (AtomicU32::new(0), AtomicU32::new(0));
            let alone = || {
                assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                sum.store(sum.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                inside.fetch_sub(1, Ordering::Relaxed);
            };
            std::thread::scope(|scope| {
                for number in 0..4 {
                    let (lock, alone) = (&lock, &alone);
                    scope.spawn(move || {
                        for _ in 0..500 {
                            if mode == Locking::Mutex && number > 0 {
                                let held = lock.share();
                                alone();
                                drop(held);
                            } else {
                                drop(lock.share());
                                let held = lock.exclusive();
                                alone();
                                drop(held);
                            }
                        }
                    });
                }
            });
            assert_eq!((word(&lock), sum.into_inner()), (0, 2000), "{mode:?}");
        }
    }

    #[test]
    fn an_exclusive_user_gets_through_a_crowd_of_readers() {
        let lock = MmuLock::new(Locking::Rwlock);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        drop(lock.share());
                    }
                });
            }
            for _ in 0..100 {
                drop(lock.exclusive());
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
