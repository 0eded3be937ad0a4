//! A vCPU is moved to another CPU while somebody has something for it: whoever has it in the end looks.
//!
//! The flag is `Vcpu::attention`, the place `Vcpu::cpu`; who wakes writes the flag and then reads the place, who moves writes the
//! place and then kicks the CPU that was there, and a CPU that finds the vCPU belongs elsewhere hands it on and kicks there. A CPU
//! that keeps it looks at the flag, at the place, and at the flag once more: what was set in between may have kicked a CPU that
//! never got the vCPU. The CPU that has it sets the flag, too (`Vcpu::look_again`), maybe over what another has just set.

use loom::sync::Arc;
use loom::sync::Mutex;
use loom::thread;
use vellum::arch::atomic::{AtomicU64, Ordering};

use crate::check;

const CPUS: usize = 2;
/// On no queue: in the hands of the CPU that hands it on.
const NOWHERE: usize = usize::MAX;

/// Two CPUs and a vCPU that sleeps on the first of them.
struct World {
    attention: AtomicU64,
    place: AtomicU64,
    /// An interrupt is pending for the CPU.
    kicked: [AtomicU64; CPUS],
    /// On whose queue the vCPU is.
    queue: Mutex<usize>,
    /// How often somebody had something for it, and how much of that it has seen.
    asked: AtomicU64,
    seen: AtomicU64,
}

/// What is done in another order than it ships.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Broken {
    Nothing,
    /// Who wakes reads the place before it sets the flag.
    PlaceFirst,
    /// The CPU that hands the vCPU on does not kick.
    SilentHandOver,
    /// A CPU that keeps the vCPU does not look at the flag again after the place.
    LooksOnce,
    /// The CPU that has the vCPU sets the flag by a plain store.
    PlainStore,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            attention: AtomicU64::new(0),
            place: AtomicU64::new(0),
            kicked: [AtomicU64::new(0), AtomicU64::new(0)],
            queue: Mutex::new(0),
            asked: AtomicU64::new(0),
            seen: AtomicU64::new(0),
        })
    }

    /// What is pending stays so until it is taken: no store of another's comes before it.
    fn kick(&self, cpu: u64) {
        self.kicked[usize::try_from(cpu).unwrap()].swap(1, Ordering::SeqCst);
    }

    /// `Vm::alert`.
    fn alert(&self, broken: Broken) {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let before = latest(&self.place);
        if self.attention.swap(1, Ordering::SeqCst) == 0 {
            let place = match broken {
                Broken::PlaceFirst => before,
                _ => latest(&self.place),
            };
            self.kick(place);
        }
    }

    /// `Vm::move_vcpu`.
    fn move_to(&self, cpu: u64) {
        let left = self.place.swap(cpu, Ordering::SeqCst);
        if left != cpu {
            self.kick(left);
        }
    }

    /// A CPU that sleeps until it is kicked, and then looks once. Whether it was.
    fn look(&self, cpu: usize, broken: Broken) -> bool {
        if self.kicked[cpu].swap(0, Ordering::SeqCst) == 0 {
            return false;
        }
        let mut queue = self.queue.lock().unwrap();
        if *queue != cpu {
            return true;
        }
        loop {
            let flagged = self.attention.swap(0, Ordering::SeqCst) != 0;
            let asked = self.asked.load(Ordering::Relaxed);
            let place = latest(&self.place);
            if usize::try_from(place).unwrap() != cpu {
                // Whoever loads it next looks anew.
                if flagged {
                    self.attention.swap(1, Ordering::SeqCst);
                }
                *queue = NOWHERE;
                drop(queue);
                *self.queue.lock().unwrap() = usize::try_from(place).unwrap();
                if broken != Broken::SilentHandOver {
                    self.kick(place);
                }
                return true;
            }
            if flagged {
                self.seen.store(asked, Ordering::Relaxed);
            }
            if broken == Broken::LooksOnce || latest(&self.attention) == 0 {
                break;
            }
        }
        true
    }
}

/// What a load reads where all accesses are sequentially consistent: loom takes them for acquire and release, by which a load may
/// read what is older.
fn latest(word: &AtomicU64) -> u64 {
    word.fetch_add(0, Ordering::SeqCst)
}

/// One wakes, one moves, there only or there and back, each CPU looks once meanwhile; then both CPUs look as long as they are
/// kicked.
fn wake_against_move(moves: &'static [u64], broken: Broken) {
    check(move || {
        let world = World::new();
        let waker = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.alert(broken))
        };
        let first = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.look(0, broken);
                world.look(1, broken);
            })
        };
        moves.iter().for_each(|cpu| world.move_to(*cpu));
        waker.join().unwrap();
        first.join().unwrap();
        while (0..CPUS).any(|cpu| world.look(cpu, broken)) {}
        let asked = world.asked.load(Ordering::Relaxed);
        assert_eq!(world.seen.load(Ordering::Relaxed), asked, "it sleeps on");
    });
}

/// One wakes, and the CPU that has the vCPU sets the flag itself and looks; then it looks whenever it was kicked and the flag is
/// set.
fn wake_against_own_demand(broken: Broken) {
    check(move || {
        let world = World::new();
        let waker = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.alert(broken))
        };
        if broken == Broken::PlainStore {
            world.attention.store(1, Ordering::Relaxed);
        } else {
            world.attention.swap(1, Ordering::AcqRel);
        }
        world.attention.swap(0, Ordering::AcqRel);
        let mut seen = world.asked.load(Ordering::Relaxed);
        waker.join().unwrap();
        while world.kicked[0].swap(0, Ordering::SeqCst) != 0 {
            if world.attention.swap(0, Ordering::AcqRel) != 0 {
                seen = world.asked.load(Ordering::Relaxed);
            }
        }
        assert_eq!(seen, world.asked.load(Ordering::Relaxed), "it sleeps on");
    });
}

#[test]
fn good_a_vcpu_that_wakes_itself_sees_what_others_woke_it_for() {
    wake_against_own_demand(Broken::Nothing);
}

#[test]
#[should_panic = "it sleeps on"]
fn bad_a_plain_store_over_a_demand_hides_what_it_was_for() {
    wake_against_own_demand(Broken::PlainStore);
}

#[test]
fn good_a_vcpu_that_is_moved_and_woken_wakes() {
    wake_against_move(&[1], Broken::Nothing);
}

#[test]
fn good_a_vcpu_that_is_moved_there_and_back_and_woken_wakes() {
    wake_against_move(&[1, 0], Broken::Nothing);
}

#[test]
#[should_panic = "it sleeps on"]
fn bad_a_flag_that_is_not_looked_at_after_the_place_was_set_for_another_cpu() {
    wake_against_move(&[1, 0], Broken::LooksOnce);
}

#[test]
#[should_panic = "it sleeps on"]
fn bad_a_place_read_before_the_flag_is_set_may_be_the_old_one() {
    wake_against_move(&[1], Broken::PlaceFirst);
}

#[test]
#[should_panic = "it sleeps on"]
fn bad_a_vcpu_handed_on_in_silence_sleeps_on() {
    wake_against_move(&[1], Broken::SilentHandOver);
}
