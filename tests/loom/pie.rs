//! Permission indices that name epochs: the call, the fault, the harvest and the ring (rules 3, 28, 29 and 32).

use loom::sync::Arc;

use loom::thread;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::Descriptor;
use vellum::mmu::rights::{Rights, is_of, s2pir};
use vellum::mmu::table::Slot;
use vellum::mmu::{Epoch, Format, Level, Memory, Permissions, Tracking};
use vellum::sync::acks::Acks;
use vellum::sync::published::{Published, Retired};
use vellum::sync::quiescence::{CpuId, Domain};

use crate::hardware::{Cache, GUEST_CPU, PAGE, bitmap, is_recorded, leaf_in, take};
use crate::{check, check_within};

const FORMAT: Format = Format {
    forced_write_back: false,
    permissions: Permissions::Indirect,
};

/// What a TLB holds of a leaf.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Holds {
    /// What S2PIR_EL2 made of its index when it was cached.
    Permission,
    /// Its index: S2PIR_EL2 is asked at each use.
    Index,
}

#[derive(Clone, Copy)]
struct Entry {
    leaf: Descriptor,
    s2pir: u64,
}

/// A page, its leaf, both bitmaps, and what all CPUs know.
struct World {
    holds: Holds,
    /// Epochs that have an index of their own: three, as it ships, or two.
    ring: u64,
    slot: Slot,
    logs: [Bitmap; 2],
    context: Published<u64>,
    domain: Domain,
    acks: Acks,
    cache: Cache<Entry>,
    copied: AtomicU64,
    current: AtomicU64,
}

impl World {
    /// Epoch `now`; the page was written in `written`, if at all, and is cached as it was then.
    fn new(holds: Holds, ring: u64, now: u64, written: Option<u64>) -> Arc<Self> {
        let mut leaf = leaf_in(false, Level::L3, Permissions::Indirect);
        let logs = [bitmap(), bitmap()];
        if let Some(epoch) = written {
            leaf = rights(epoch, ring).grant(leaf);
            log(&logs, epoch).set(PAGE, GUEST_CPU);
        }
        let s2pir = register(now, ring);
        let world = Self {
            holds,
            ring,
            slot: Slot::new(leaf),
            logs,
            context: Published::new(now),
            domain: Domain::new(2),
            acks: Acks::new(2),
            cache: Cache::new(written.map(|_| Entry { leaf, s2pir })),
            copied: AtomicU64::new(0),
            current: AtomicU64::new(now),
        };
        world.acks.announce(now);
        world.acks.acknowledge(GUEST_CPU, now);
        Arc::new(world)
    }

    fn log(&self, epoch: u64) -> &Bitmap {
        log(&self.logs, epoch)
    }

    fn rights(&self, epoch: u64) -> Rights {
        rights(epoch, self.ring)
    }

    /// The first half of the call.
    fn publish(&self, next: u64) -> Retired<u64> {
        let before = self.context.replace(next);
        self.acks.announce(next);
        self.current.store(next, Ordering::Relaxed);
        before
    }

    /// As it ships: publish, acknowledgements, grace period, invalidation.
    fn call(&self, next: u64) {
        let before = self.publish(next);
        self.acks.await_all(next, |_| {});
        before.free(&self.domain);
        self.cache.invalidate(|_| true);
    }

    /// As it ships: relabel by the bits, then take them.
    fn harvest(&self, epoch: u64) {
        if is_recorded(self.log(epoch)) {
            self.relabel(epoch, Guard::CurrentIsKept);
        }
        self.take_and_copy(epoch);
    }

    fn take_and_copy(&self, epoch: u64) {
        if take(self.log(epoch)) {
            self.copied.store(self.cache.copy(), Ordering::Relaxed);
        }
    }

    /// Gives the leaf the read-only index if it carries that of `epoch`; nothing is invalidated.
    fn relabel(&self, epoch: u64, guard: Guard) {
        let active = self.domain.enter(CpuId(0));
        let now = self.rights(*self.context.load(&active));
        let named = Epoch::new(named(epoch, self.ring));
        loop {
            let found = self.slot.load();
            let kept = guard == Guard::CurrentIsKept && now.permits(found);
            if kept || guard != Guard::AnyIndexGoes && !is_of(found, named) {
                return;
            }
            let new = now.revoke(found, Level::L3);
            if self.slot.compare_and_swap(found, new).is_ok() {
                return;
            }
        }
    }

    /// Takes the page's bit of `epoch`, which is current, takes its permission away, and copies it.
    fn clear(&self, epoch: u64) {
        if !take(self.log(epoch)) {
            return;
        }
        let rights = self.rights(epoch);
        loop {
            let found = self.slot.load();
            if rights.is_revoked(found, Level::L3) {
                // Nobody owes an invalidation, so none is owed here.
                break;
            }
            let new = rights.revoke(found, Level::L3);
            if self.slot.compare_and_swap(found, new).is_ok() {
                self.cache.invalidate(|_| true);
                break;
            }
        }
        self.copied.store(self.cache.copy(), Ordering::Relaxed);
    }

    fn assert_nothing_lost(&self) {
        let unseen = self.cache.copy() != self.copied.load(Ordering::Relaxed);
        let now = self.current.load(Ordering::Relaxed);
        assert!(!unseen || is_recorded(self.log(now)), "a write was lost");
    }
}

/// Which leaves a relabelling leaves alone.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Guard {
    /// Those that permit stores now, too: as it ships.
    CurrentIsKept,
    /// Those without the epoch's index.
    OthersAreKept,
    /// None.
    AnyIndexGoes,
}

/// The epoch whose index `epoch` has in a ring of `ring`.
fn named(epoch: u64, ring: u64) -> u64 {
    if ring == 3 { epoch } else { epoch % ring }
}

fn rights(epoch: u64, ring: u64) -> Rights {
    let epoch = Epoch::new(named(epoch, ring));
    Rights::new(FORMAT, Memory::Normal, Tracking::Fault, Some(epoch))
}

fn register(epoch: u64, ring: u64) -> u64 {
    s2pir(Epoch::new(named(epoch, ring)))
}

fn log(logs: &[Bitmap; 2], epoch: u64) -> &Bitmap {
    let [even, odd] = logs;
    if epoch.is_multiple_of(2) { even } else { odd }
}

/// Whether a store through `leaf` succeeds under `s2pir`.
fn permits(leaf: Descriptor, s2pir: u64) -> bool {
    const ALL: u64 = 0b1111;
    let bits = leaf.bits();
    let index = bits >> 6 & 1 | (bits >> 51 & 1) << 1 | (bits >> 53 & 0b11) << 2;
    s2pir >> (4 * index) & 0xf == ALL
}

/// The CPU that runs the guest, with its S2PIR_EL2.
struct Guest<'w> {
    world: &'w World,
    s2pir: u64,
}

impl<'w> Guest<'w> {
    /// It runs under what was published at first.
    fn of(world: &'w World, epoch: u64) -> Self {
        let s2pir = register(epoch, world.ring);
        Self { world, s2pir }
    }

    fn store(&self) -> bool {
        let World { cache, slot, .. } = self.world;
        let walk = || {
            Some(Entry {
                leaf: slot.load(),
                s2pir: self.s2pir,
            })
        };
        let permits = |entry: Entry| match self.world.holds {
            Holds::Permission => permits(entry.leaf, entry.s2pir),
            Holds::Index => permits(entry.leaf, self.s2pir),
        };
        cache.store(|_| true, walk, permits)
    }

    /// A write fault as it ships: one section, one snapshot.
    fn fault(&mut self) {
        let World { acks, domain, .. } = self.world;
        let active = domain.enter(CpuId(GUEST_CPU));
        let epoch = *self.world.context.load(&active);
        let rights = self.world.rights(epoch);
        let found = self.world.slot.load();
        if !rights.permits(found) {
            let new = rights.grant(found);
            if self.world.slot.compare_and_swap(found, new).is_ok() {
                self.world.log(epoch).set(PAGE, GUEST_CPU);
            }
        } else if acks.seen(GUEST_CPU) != epoch {
            self.s2pir = register(epoch, self.world.ring);
            acks.acknowledge(GUEST_CPU, epoch);
        }
        drop(active);
        self.world.cache.invalidate(|_| true);
    }

    /// The guest writes once.
    fn write(&mut self, fault: impl Fn(&mut Self)) {
        for _ in 0..3 {
            if self.store() {
                return;
            }
            fault(self);
        }
    }

    /// The CPU obeys a kick, if there was one.
    fn refresh(&mut self) {
        let World { acks, domain, .. } = self.world;
        if acks.is_behind(GUEST_CPU) {
            acks.begin(GUEST_CPU);
            let active = domain.enter(CpuId(GUEST_CPU));
            let epoch = *self.world.context.load(&active);
            self.s2pir = register(epoch, self.world.ring);
            acks.acknowledge(GUEST_CPU, epoch);
        }
    }

    fn leave(&self) {
        self.world.acks.leave(GUEST_CPU);
    }
}

fn faults(guest: &mut Guest<'_>) {
    guest.fault();
}

/// The guest writes while epoch 1 is closed and harvested: before its CPU is kicked if the page was written in that epoch,
/// and after.
fn write_against_call(holds: Holds, written: bool, fault: fn(&mut Guest<'_>), close: fn(&World)) {
    check(move || {
        let world = World::new(holds, 3, 1, written.then_some(1));
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut guest = Guest::of(&world, 1);
                if written {
                    guest.store();
                    guest.refresh();
                }
                guest.write(fault);
                guest.leave();
            })
        };
        close(&world);
        guest.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_write_against_the_call_is_harvested_or_recorded_anew() {
    for written in [false, true] {
        write_against_call(Holds::Permission, written, faults, |world| {
            world.call(2);
            world.harvest(1);
        });
    }
}

#[test]
#[should_panic = "a write was lost"]
fn bad_harvest_after_a_grace_period_alone_loses_a_write() {
    write_against_call(Holds::Permission, true, faults, |world| {
        let before = world.publish(2);
        before.free(&world.domain);
        world.cache.invalidate(|_| true);
        world.harvest(1);
        world.acks.await_all(2, |_| {});
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_harvest_without_the_calls_invalidation_loses_a_write() {
    write_against_call(Holds::Permission, true, faults, |world| {
        let before = world.publish(2);
        world.acks.await_all(2, |_| {});
        before.free(&world.domain);
        world.harvest(1);
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_invalidation_before_the_last_acknowledgement_loses_a_write() {
    write_against_call(Holds::Permission, true, faults, |world| {
        let before = world.publish(2);
        world.cache.invalidate(|_| true);
        world.acks.await_all(2, |_| {});
        before.free(&world.domain);
        world.harvest(1);
    });
}

/// One fault, whose page the guest writes to as soon as its CPU is where the fault was.
fn fault_against_call(fault: fn(&mut Guest<'_>)) {
    check(move || {
        let world = World::new(Holds::Permission, 3, 1, None);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut guest = Guest::of(&world, 1);
                fault(&mut guest);
                guest.refresh();
                guest.store();
                guest.leave();
            })
        };
        world.call(2);
        world.harvest(1);
        guest.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_fault_uses_one_snapshot_to_its_end() {
    fault_against_call(faults);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_index_of_one_epoch_with_the_bitmap_of_another_loses_a_write() {
    fault_against_call(|guest| {
        let world = guest.world;
        let active = world.domain.enter(CpuId(GUEST_CPU));
        let log = world.log(*world.context.load(&active));
        let rights = world.rights(*world.context.load(&active));
        let found = world.slot.load();
        let new = rights.grant(found);
        if world.slot.compare_and_swap(found, new).is_ok() {
            log.set(PAGE, GUEST_CPU);
        }
        drop(active);
        world.cache.invalidate(|_| true);
    });
}

/// The hypervisor writes to the page on a CPU that runs nothing.
fn own_write_against_call(close: fn(&World)) {
    check(move || {
        let world = World::new(Holds::Permission, 3, 1, None);
        world.acks.leave(GUEST_CPU);
        let writer = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let active = world.domain.enter(CpuId(GUEST_CPU));
                let epoch = *world.context.load(&active);
                world.cache.write(|data| data + 1);
                world.log(epoch).set(PAGE, GUEST_CPU);
            })
        };
        close(&world);
        writer.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_own_write_is_in_one_epoch_or_the_other() {
    own_write_against_call(|world| {
        world.call(2);
        world.harvest(1);
    });
}

#[test]
#[should_panic = "a write was lost"]
fn bad_harvest_after_acknowledgements_alone_loses_an_own_write() {
    own_write_against_call(|world| {
        let before = world.publish(2);
        world.acks.await_all(2, |_| {});
        world.cache.invalidate(|_| true);
        world.harvest(1);
        before.free(&world.domain);
    });
}

/// A page of epoch 1, which has just been closed, while two more epochs end: the last call grants the index of epoch 1 again
/// (a ring of two does so one call earlier). `harvest` is what is done about the page's epoch.
fn write_against_ring(ring: u64, harvest: fn(&World, u64)) {
    check_within(2, move || {
        let world = World::new(Holds::Index, ring, 2, Some(1));
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut guest = Guest::of(&world, 2);
                guest.refresh();
                guest.refresh();
                guest.store();
                guest.leave();
            })
        };
        harvest(&world, 1);
        world.call(3);
        harvest(&world, 2);
        world.call(4);
        guest.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_index_is_granted_again_when_no_leaf_and_no_tlb_has_it() {
    write_against_ring(3, World::harvest);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_ring_of_two_grants_an_index_that_a_tlb_holds() {
    write_against_ring(2, World::harvest);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_harvest_that_relabels_nothing_grants_an_old_leaf() {
    write_against_ring(3, World::take_and_copy);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_relabelling_by_bits_that_were_taken_before_grants_an_old_leaf() {
    write_against_ring(3, |world, epoch| {
        world.take_and_copy(epoch);
        if is_recorded(world.log(epoch)) {
            world.relabel(epoch, Guard::CurrentIsKept);
        }
    });
}

/// The page is written in the epoch that is current, `now`, and cleared, while a harvest of epoch 1 relabels it: late, in a
/// slot whose log was ended and begun anew meanwhile, if `now` has the same index.
fn relabelling_against_write_and_clear(now: u64, guard: Guard) {
    check(move || {
        let world = World::new(Holds::Permission, 3, now, None);
        let harvester = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.relabel(1, guard))
        };
        let mut guest = Guest::of(&world, now);
        guest.write(faults);
        harvester.join().unwrap();
        world.clear(now);
        guest.store();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_harvest_leaves_what_is_written_now_alone() {
    for now in [2, 4] {
        relabelling_against_write_and_clear(now, Guard::CurrentIsKept);
    }
}

#[test]
#[should_panic = "a write was lost"]
fn bad_relabelling_of_the_next_epochs_leaf_loses_a_write() {
    relabelling_against_write_and_clear(2, Guard::AnyIndexGoes);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_relabelling_after_the_index_was_granted_again_loses_a_write() {
    relabelling_against_write_and_clear(4, Guard::OthersAreKept);
}

/// The guest's CPU was away while epoch 1 was closed, and its walker ran ahead under the old register.
fn return_against_old_entries(forget: bool) {
    check(move || {
        let world = World::new(Holds::Permission, 3, 1, Some(1));
        world.acks.leave(GUEST_CPU);
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut guest = Guest::of(&world, 1);
                let (leaf, s2pir) = (world.slot.load(), guest.s2pir);
                world.cache.fill(|| Some(Entry { leaf, s2pir }));
                world.acks.begin(GUEST_CPU);
                let active = world.domain.enter(CpuId(GUEST_CPU));
                let epoch = *world.context.load(&active);
                guest.s2pir = register(epoch, 3);
                if forget {
                    world.cache.invalidate(|_| true);
                }
                world.acks.acknowledge(GUEST_CPU, epoch);
                drop(active);
                guest.write(faults);
                guest.leave();
            })
        };
        world.call(2);
        world.harvest(1);
        guest.join().unwrap();
        world.assert_nothing_lost();
    });
}

#[test]
fn good_cpu_that_comes_back_forgets_what_it_cached_under_an_older_register() {
    return_against_old_entries(true);
}

#[test]
#[should_panic = "a write was lost"]
fn bad_cpu_that_comes_back_and_forgets_nothing_writes_unseen() {
    return_against_old_entries(false);
}
