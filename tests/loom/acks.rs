//! Acknowledgements: once they are all there, nobody runs under what was published before (rules 28 and 29).

use loom::sync::Arc;

use loom::thread;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::sync::acks::Acks;
use vellum::sync::published::Published;
use vellum::sync::quiescence::{CpuId, Domain};

use crate::hardware::GUEST_CPU;
use crate::{check, check_within};

const OLD: u64 = 1;
const NEW: u64 = 2;

/// A page, and what was published about it. What the guest's CPU has in its register is its thread's own.
struct World {
    acks: Acks,
    context: Published<u64>,
    domain: Domain,
    page: AtomicU64,
    /// Whether the page was written under what is new: that is somebody else's business.
    fresh: AtomicU64,
    copied: AtomicU64,
}

impl World {
    /// The guest's CPU runs under what is old, or is away.
    fn new(runs: bool) -> Arc<Self> {
        let world = Self {
            acks: Acks::new(2),
            context: Published::new(OLD),
            domain: Domain::new(2),
            page: AtomicU64::new(0),
            fresh: AtomicU64::new(0),
            copied: AtomicU64::new(0),
        };
        world.acks.announce(OLD);
        if runs {
            world.acks.acknowledge(GUEST_CPU, OLD);
        }
        Arc::new(world)
    }

    /// A guest's store under `register`.
    fn write(&self, register: u64) {
        self.page.fetch_add(1, Ordering::Relaxed);
        if register == NEW {
            self.fresh.store(1, Ordering::Relaxed);
        }
    }

    fn published(&self) -> u64 {
        let active = self.domain.enter(CpuId(GUEST_CPU));
        *self.context.load(&active)
    }

    /// As it ships: what the register is to hold now.
    fn refresh(&self) -> u64 {
        self.acks.begin(GUEST_CPU);
        let register = self.published();
        self.acks.acknowledge(GUEST_CPU, register);
        register
    }

    /// The CPU leaves its guest for good.
    fn leave(&self) {
        self.acks.leave(GUEST_CPU);
    }

    /// Everybody is to run under what is new; then the page is copied.
    fn call(&self) {
        let before = self.context.replace(NEW);
        self.acks.announce(NEW);
        self.acks.await_all(NEW, |_| {});
        before.free(&self.domain);
        self.copied
            .store(self.page.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// `run` is what the guest's CPU does while another calls.
fn against_call(runs: bool, run: fn(&World)) {
    check_within(2, move || {
        let world = World::new(runs);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || run(&world))
        };
        world.call();
        guest.join().unwrap();
        let unseen = world.page.load(Ordering::Relaxed) != world.copied.load(Ordering::Relaxed);
        let fresh = world.fresh.load(Ordering::Relaxed) != 0;
        assert!(!unseen || fresh, "a write was lost");
    });
}

#[test]
fn good_cpu_that_enters_is_waited_for_or_loads_what_is_new() {
    against_call(false, |world| {
        let register = world.refresh();
        world.write(register);
        world.leave();
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_context_loaded_before_the_mark_is_run_under_unseen() {
    against_call(false, |world| {
        let register = world.published();
        world.acks.begin(GUEST_CPU);
        world.acks.acknowledge(GUEST_CPU, register);
        world.write(register);
        world.leave();
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_mark_without_a_fence_is_seen_too_late() {
    against_call(false, |world| {
        let active = world.domain.enter(CpuId(GUEST_CPU));
        // The store that `begin` makes, without the fence behind it.
        world.acks.acknowledge(GUEST_CPU, 0);
        let register = *world.context.load(&active);
        world.acks.acknowledge(GUEST_CPU, register);
        drop(active);
        world.write(register);
        world.leave();
    });
}

#[test]
fn good_cpu_that_runs_is_waited_for_until_it_was_kicked() {
    against_call(true, |world| {
        world.write(OLD);
        let register = world.refresh();
        world.write(register);
        world.leave();
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_acknowledgement_before_the_register_is_loaded_lets_the_old_one_write() {
    against_call(true, |world| {
        world.acks.begin(GUEST_CPU);
        let register = world.published();
        world.acks.acknowledge(GUEST_CPU, register);
        world.write(OLD);
        world.leave();
    });
}

#[test]
fn good_fault_that_catches_up_acknowledges_from_within_its_section() {
    against_call(true, |world| {
        world.write(OLD);
        let mut register = OLD;
        let active = world.domain.enter(CpuId(GUEST_CPU));
        let published = *world.context.load(&active);
        if world.acks.seen(GUEST_CPU) != published {
            register = published;
            world.acks.acknowledge(GUEST_CPU, register);
        }
        drop(active);
        world.write(register);
        world.leave();
    });
}

#[test]
fn good_cpu_that_rests_is_not_waited_for_and_comes_back_under_what_is_new() {
    against_call(true, |world| {
        world.write(OLD);
        world.leave();
        let register = world.refresh();
        world.write(register);
        world.leave();
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_rest_before_the_writes_are_complete_hides_one() {
    against_call(true, |world| {
        world.leave();
        world.write(OLD);
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_return_from_rest_that_nobody_is_told_of_runs_under_what_is_old() {
    against_call(true, |world| {
        world.leave();
        let register = world.published();
        world.acks.acknowledge(GUEST_CPU, register);
        world.write(register);
        world.leave();
    });
}

#[test]
fn good_kicks_go_to_those_who_are_behind_only() {
    check(|| {
        let world = World::new(false);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.refresh();
                world.leave();
            })
        };
        let before = world.context.replace(NEW);
        world.acks.announce(NEW);
        let mut kicks = 0;
        let kicked = world.acks.await_all(NEW, |cpu| {
            assert_eq!(cpu, GUEST_CPU);
            kicks += 1;
        });
        assert_eq!(kicked, kicks);
        before.free(&world.domain);
        guest.join().unwrap();
    });
}
