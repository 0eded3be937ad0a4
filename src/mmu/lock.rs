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

use core::sync::atomic::{AtomicU32, Ordering};

use crate::arch;
use crate::sync::percpu;
use crate::trace::Event;

/// What the shared side of a VM's MMU lock costs; chosen when the VM is created.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Locking {
    /// One lock, exclusively.
    Mutex,
    /// The same lock, for reading.
    Rwlock,
    /// Nothing.
    Lockless,
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

/// The MMU lock of one VM.
#[derive(Debug)]
#[repr(align(128))]
pub struct MmuLock {
    locking: Locking,
    /// Exclusive users that wait or hold. While there is one, `share` does not touch `lock`: see
    /// [`MmuLock::exclusive`].
    intents: AtomicU32,
    lock: spin::RwLock<()>,
}

/// Leaves may be changed while this is held.
#[derive(Debug)]
#[must_use = "the lock is released as soon as this is dropped"]
pub struct Shared<'a> {
    _held: Option<Held<'a>>,
}

/// Nothing else runs under this lock while this is held (except `share` in lockless mode).
#[derive(Debug)]
#[must_use = "the lock is released as soon as this is dropped"]
pub struct Exclusive<'a> {
    _held: spin::RwLockWriteGuard<'a, ()>,
    _intent: Intent<'a>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held for their drops")]
enum Held<'a> {
    Read(spin::RwLockReadGuard<'a, ()>),
    Write(spin::RwLockWriteGuard<'a, ()>),
}

impl MmuLock {
    /// A free lock.
    pub fn new(locking: Locking) -> Self {
        Self {
            locking,
            intents: AtomicU32::new(0),
            lock: spin::RwLock::new(()),
        }
    }

    /// The mode.
    pub fn locking(&self) -> Locking {
        self.locking
    }

    /// Permits changes of leaves.
    #[inline]
    pub fn share(&self) -> Shared<'_> {
        let held = match self.locking {
            Locking::Lockless => None,
            Locking::Rwlock => Some(Held::Read(poll(|| self.if_welcome()?.try_read()))),
            Locking::Mutex => Some(Held::Write(poll(|| self.if_welcome()?.try_write()))),
        };
        if cfg!(debug_assertions) && held.is_some() {
            // Taking the lock and releasing it each write its line, which every CPU's fault path writes.
            percpu::count_many(Event::SharedLineWrites, 2);
        }
        Shared { _held: held }
    }

    /// The lock, unless an exclusive user wants it.
    #[inline]
    fn if_welcome(&self) -> Option<&spin::RwLock<()>> {
        (self.intents.load(Ordering::Relaxed) == 0).then_some(&self.lock)
    }

    /// Permits what tolerates no concurrent change.
    ///
    /// Goes through the upgradeable side, which lets no new reader in: a plain writer starves under 64 faulting vCPUs. That
    /// alone is not enough. A reader that is not let in has counted itself in and out again, and 63 of them that try in a
    /// loop leave hardly a moment in which the count is the one that the upgrade needs (measured: seconds). So they are
    /// told to stay away before they touch the count.
    pub fn exclusive(&self) -> Exclusive<'_> {
        self.intents.fetch_add(1, Ordering::Relaxed);
        let mut intent = poll(|| self.lock.try_upgradeable_read());
        let held = loop {
            match intent.try_upgrade() {
                Ok(held) => break held,
                Err(again) => intent = again,
            }
            percpu::count(Event::LockSpins);
            arch::yield_now();
        };
        Exclusive {
            _held: held,
            _intent: Intent(&self.intents),
        }
    }
}

/// An exclusive user is there until this is dropped.
#[derive(Debug)]
struct Intent<'a>(&'a AtomicU32);

impl Drop for Intent<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tries until `attempt` succeeds, counting as the kernel's lock_stat does.
#[inline]
fn poll<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    percpu::count(Event::LockAcquired);
    match attempt() {
        Some(held) => held,
        None => contend(attempt),
    }
}

#[cold]
fn contend<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    percpu::count(Event::LockContended);
    loop {
        percpu::count(Event::LockSpins);
        arch::yield_now();
        if let Some(held) = attempt() {
            return held;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{Locking, MmuLock};

    #[test]
    fn modes_have_names_that_come_back() {
        for mode in [Locking::Mutex, Locking::Rwlock, Locking::Lockless] {
            assert_eq!(Locking::from_name(mode.name()), Some(mode));
        }
        assert_eq!(Locking::from_name("spinlock"), None);
    }

    #[test]
    fn readers_share_and_a_mutex_does_not() {
        let lock = MmuLock::new(Locking::Rwlock);
        let first = lock.share();
        let second = lock.share();
        assert!(lock.lock.try_write().is_none());
        drop((first, second));

        let lock = MmuLock::new(Locking::Mutex);
        let only = lock.share();
        assert!(lock.lock.try_read().is_none());
        drop(only);
        drop(lock.exclusive());
    }

    #[test]
    fn lockless_sharing_touches_no_lock() {
        let lock = MmuLock::new(Locking::Lockless);
        let exclusive = lock.exclusive();
        drop(lock.share());
        drop(exclusive);
    }

    #[test]
    fn nobody_touches_the_count_while_an_exclusive_user_waits() {
        for mode in [Locking::Rwlock, Locking::Mutex] {
            let lock = MmuLock::new(mode);
            assert!(lock.if_welcome().is_some());
            let exclusive = lock.exclusive();
            assert!(lock.if_welcome().is_none(), "{mode:?}");
            drop(exclusive);
            assert!(lock.if_welcome().is_some());
        }
    }

    #[test]
    fn an_exclusive_user_gets_through_a_crowd_of_readers() {
        let lock = MmuLock::new(Locking::Rwlock);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        drop(lock.share());
                    }
                });
            }
            for _ in 0..100 {
                drop(lock.exclusive());
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
