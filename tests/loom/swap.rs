//! Two roots that take turns: the call, mapping, and the spare's preparation (rules 28, 29 and 31).

use loom::sync::Arc;

use loom::thread;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::Level;
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::table::Slot;
use vellum::sync::acks::Acks;
use vellum::sync::published::{Published, Retired};
use vellum::sync::quiescence::{CpuId, Domain};

use crate::check;
use crate::hardware::{Cache, GUEST_CPU, PAGE, bitmap, is_recorded, leaf, protect, take};

#[derive(Clone, Copy)]
struct Context {
    generation: u64,
    /// The tree that the VM runs under, and the bitmap of its epoch.
    tree: usize,
    mapping: bool,
}

const FIRST: Context = Context {
    generation: 1,
    tree: 0,
    mapping: true,
};
const SECOND: Context = Context {
    generation: 2,
    tree: 1,
    mapping: true,
};
const THIRD: Context = Context {
    generation: 3,
    tree: 0,
    mapping: true,
};

/// What a TLB keeps its entries under.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Vmids {
    OneEach,
    Shared,
}

/// A page with its leaf in either tree.
struct World {
    vmids: Vmids,
    trees: [Slot; 2],
    logs: [Bitmap; 2],
    context: Published<Context>,
    domain: Domain,
    acks: Acks,
    /// Entries, each with the tree that it came from.
    cache: Cache<(usize, Descriptor)>,
    /// Something was mapped since the spare was prepared.
    mapped: AtomicU64,
    copied: AtomicU64,
    /// Stores of the guest that succeeded.
    stores: AtomicU64,
}

impl World {
    /// The first tree is live and holds `page`, the spare the same, read-only. A page that is writable is recorded.
    fn new(vmids: Vmids, page: Descriptor) -> Arc<Self> {
        let world = Self {
            vmids,
            trees: [Slot::new(page), Slot::new(copied(page))],
            logs: [bitmap(), bitmap()],
            context: Published::new(FIRST),
            domain: Domain::new(2),
            acks: Acks::new(2),
            cache: Cache::new(None),
            mapped: AtomicU64::new(0),
            copied: AtomicU64::new(0),
            stores: AtomicU64::new(0),
        };
        if page.is_writable() {
            world.logs[0].set(PAGE, GUEST_CPU);
        }
        world.acks.announce(FIRST.generation);
        world.acks.acknowledge(GUEST_CPU, FIRST.generation);
        Arc::new(world)
    }

    /// Nothing is mapped from here on, once the grace period is over.
    fn suspend_mapping(&self) -> Retired<Context> {
        self.context.replace(Context {
            mapping: false,
            ..FIRST
        })
    }

    /// Brings the spare up to date with what was mapped.
    fn follow(&self) {
        if self.mapped.swap(0, Ordering::AcqRel) != 0 {
            self.copy_tree(0, 1);
        }
    }

    fn copy_tree(&self, from: usize, to: usize) {
        let new = copied(self.trees[from].load());
        while self.trees[to]
            .compare_and_swap(self.trees[to].load(), new)
            .is_err()
        {}
    }

    fn publish(&self, next: Context) -> Retired<Context> {
        let before = self.context.replace(next);
        self.acks.announce(next.generation);
        before
    }

    fn exchange(&self, next: Context) {
        let before = self.publish(next);
        self.acks.await_all(next.generation, |_| {});
        before.free(&self.domain);
    }

    /// As it ships.
    fn call(&self) {
        self.suspend_mapping().free(&self.domain);
        self.follow();
        self.exchange(SECOND);
    }

    /// As it ships: the retired tree's entries go, then it becomes the spare of `live`.
    fn prepare(&self, live: usize) {
        self.cache.invalidate(|(tree, _)| tree != live);
        self.copy_tree(live, 1 - live);
    }

    fn harvest(&self, log: usize) {
        if take(&self.logs[log]) {
            self.copied.store(self.cache.copy(), Ordering::Relaxed);
        }
    }

    fn assert_nothing_lost(&self, log: usize) {
        let unseen = self.cache.copy() != self.copied.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(&self.logs[log]), "a write was lost");
    }
}

/// What the spare has for `leaf`.
fn copied(leaf: Descriptor) -> Descriptor {
    leaf.read_only()
}

/// The CPU that runs the guest, with its VTTBR_EL2.
struct Guest<'w> {
    world: &'w World,
    tree: usize,
}

impl<'w> Guest<'w> {
    fn of(world: &'w World) -> Self {
        Self { world, tree: 0 }
    }

    fn store(&self) -> bool {
        let world = self.world;
        let walk = || {
            let found = world.trees[self.tree].load();
            found.is_leaf(Level::L3).then_some((self.tree, found))
        };
        let usable = |(tree, _)| tree == self.tree || world.vmids == Vmids::Shared;
        let done = world
            .cache
            .store(usable, walk, |(_, leaf)| leaf.is_writable());
        if done {
            world.stores.fetch_add(1, Ordering::Relaxed);
        }
        done
    }

    fn load(&mut self, context: Context) {
        self.tree = context.tree;
        self.world.acks.acknowledge(GUEST_CPU, context.generation);
    }

    fn catch_up(&mut self, context: Context) {
        if self.world.acks.seen(GUEST_CPU) != context.generation {
            self.load(context);
        }
    }

    /// A write fault as it ships.
    fn fault(&mut self) {
        let world = self.world;
        let active = world.domain.enter(CpuId(GUEST_CPU));
        let context = *world.context.load(&active);
        let slot = &world.trees[context.tree];
        let found = slot.load();
        if found == Descriptor::EMPTY && context.mapping {
            self.catch_up(context);
            if let Ok(clean) = slot.claim() {
                world.cache.write(|_| 0);
                clean.make(leaf(true, Level::L3));
                world.mapped.store(1, Ordering::Release);
                world.logs[context.tree].set(PAGE, GUEST_CPU);
            }
        } else if found.is_writable() {
            self.catch_up(context);
        } else if found.is_leaf(Level::L3) && slot.compare_and_swap(found, found.writable()).is_ok()
        {
            world.logs[context.tree].set(PAGE, GUEST_CPU);
        }
        drop(active);
        let own = self.tree;
        world.cache.invalidate(|(tree, _)| tree == own);
    }

    /// The guest writes, if it gets anywhere.
    fn write(&mut self) {
        for _ in 0..3 {
            if self.store() {
                return;
            }
            self.fault();
        }
    }

    /// The CPU obeys a kick, if there was one, or comes back.
    fn refresh(&mut self) {
        let world = self.world;
        if world.acks.is_behind(GUEST_CPU) {
            world.acks.begin(GUEST_CPU);
            let active = world.domain.enter(CpuId(GUEST_CPU));
            self.load(*world.context.load(&active));
        }
    }

    fn leave(&self) {
        self.world.acks.leave(GUEST_CPU);
    }
}

/// The guest writes while the first epoch is closed and harvested: before its CPU is kicked if the page was written in that
/// epoch, and after.
fn write_against_call(vmids: Vmids, written: bool, close: fn(&World)) {
    check(move || {
        let world = World::new(vmids, leaf(written, Level::L3));
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut guest = Guest::of(&world);
                if written {
                    guest.store();
                    guest.refresh();
                }
                guest.write();
                guest.leave();
            })
        };
        close(&world);
        guest.join().unwrap();
        world.assert_nothing_lost(1);
    });
}

#[test]
fn good_write_against_the_call_is_harvested_or_recorded_anew() {
    for written in [false, true] {
        write_against_call(Vmids::OneEach, written, |world| {
            world.exchange(SECOND);
            world.harvest(0);
        });
    }
}

#[test]
#[should_panic = "a write was lost"]
fn bad_harvest_after_a_grace_period_alone_loses_a_write() {
    write_against_call(Vmids::OneEach, true, |world| {
        world.publish(SECOND).free(&world.domain);
        world.harvest(0);
        world.acks.await_all(SECOND.generation, |_| {});
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_two_roots_under_one_vmid_lose_a_write() {
    write_against_call(Vmids::Shared, true, |world| {
        world.exchange(SECOND);
        world.harvest(0);
    });
}

/// A page that is zeroed when it is first mapped is mapped and written while the roots are exchanged.
fn map_against_call(exchange: fn(&World)) {
    check(move || {
        let world = World::new(Vmids::OneEach, Descriptor::EMPTY);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut guest = Guest::of(&world);
                guest.fault();
                guest.store();
                guest.leave();
            })
        };
        exchange(&world);
        guest.join().unwrap();
        let mut guest = Guest::of(&world);
        guest.refresh();
        guest.write();
        let stores = world.stores.load(Ordering::Relaxed);
        assert_eq!(world.cache.copy(), stores, "a write was zeroed");
    });
}

#[test]
fn good_page_mapped_during_the_call_is_zeroed_once() {
    map_against_call(World::call);
}

#[test]
#[should_panic = "a write was zeroed"]
fn bad_last_look_before_mapping_is_suspended_zeroes_a_page_twice() {
    map_against_call(|world| {
        world.follow();
        world.suspend_mapping().free(&world.domain);
        world.exchange(SECOND);
    });
}

#[test]
#[should_panic = "a write was zeroed"]
fn bad_last_look_before_the_grace_period_zeroes_a_page_twice() {
    map_against_call(|world| {
        let before = world.suspend_mapping();
        world.follow();
        before.free(&world.domain);
        world.exchange(SECOND);
    });
}

/// Two calls, the second of which puts the first tree back; the guest runs during the first.
fn two_calls(first: fn(&World), prepare: fn(&World)) {
    check(move || {
        let world = World::new(Vmids::OneEach, leaf(false, Level::L3));
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut guest = Guest::of(&world);
                guest.fault();
                guest.store();
                guest.leave();
            })
        };
        first(&world);
        world.harvest(0);
        guest.join().unwrap();
        prepare(&world);
        world.exchange(THIRD);
        world.harvest(1);
        let mut guest = Guest::of(&world);
        guest.refresh();
        guest.store();
        world.assert_nothing_lost(0);
    });
}

#[test]
fn good_tree_that_comes_back_is_read_only_in_memory_and_in_every_tlb() {
    two_calls(|world| world.exchange(SECOND), |world| world.prepare(1));
}

#[test]
#[should_panic = "a write was lost"]
fn bad_retired_vmid_that_is_not_invalidated_brings_old_entries_back() {
    two_calls(
        |world| world.exchange(SECOND),
        |world| world.copy_tree(1, 0),
    );
}

#[test]
#[should_panic = "a write was lost"]
fn bad_spare_prepared_before_the_grace_period_is_written_by_a_late_fault() {
    two_calls(
        |world| {
            let before = world.publish(SECOND);
            world.prepare(1);
            world.acks.await_all(SECOND.generation, |_| {});
            before.free(&world.domain);
        },
        |world| world.cache.invalidate(|(tree, _)| tree == 0),
    );
}

/// A leaf of the live tree that was made read-only since it was copied is read-only in the spare as well.
#[test]
fn good_spare_does_not_care_what_was_cleared_meanwhile() {
    check(|| {
        let world = World::new(Vmids::OneEach, leaf(true, Level::L3));
        let clearer = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                if take(&world.logs[0]) {
                    protect(&world.trees[0], Level::L3);
                    world.cache.invalidate(|_| true);
                    world.copied.store(world.cache.copy(), Ordering::Relaxed);
                }
            })
        };
        world.copy_tree(0, 1);
        clearer.join().unwrap();
        world.acks.leave(GUEST_CPU);
        world.exchange(SECOND);
        world.harvest(0);
        let mut guest = Guest::of(&world);
        guest.refresh();
        guest.write();
        world.assert_nothing_lost(1);
    });
}
