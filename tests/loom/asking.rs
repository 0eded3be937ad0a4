//! A vCPU asks what another has in its list registers, which makes that one take its interrupts back and answer; or it
//! disables a group, which does the same. Whoever waits is answered, and once a group is off none of it is listed.
//!
//! The interrupts and their questions are the shipped `Private` and `Shared`, behind a lock of loom's; the flag, the kick and the order of
//! steps are those of `vgic::access`, `Vm::alert` and `Resident::relist`, written again.

use loom::sync::{Arc, Mutex};
use loom::thread;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::vm::vgic::flight::Models;
use vellum::vm::vgic::listing::Groups;
use vellum::vm::vgic::lists::{Entry, State};
use vellum::vm::vgic::private::{Private, Wiring};
use vellum::vm::vgic::shared::{Routing, Shared};

use crate::check;

const SGI: u8 = 3;
const OTHER: u8 = 5;
const ISENABLER: u64 = 0x100;
const GROUP1: u64 = 2;

/// What is done in another order than it ships.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Broken {
    Nothing,
    /// Who asks demands attention before the question is there.
    AlertFirst,
    /// The vCPU clears its flag when it has looked.
    FlagLast,
    /// It reads which groups are forwarded before it locks its interrupts.
    ControlFirst,
}

/// One vCPU's interrupts.
struct Interrupts {
    model: Private,
    listed: Vec<Entry>,
    /// Who asks has disabled the group before.
    disables: bool,
    /// It was told that the group is off.
    is_off: bool,
}

/// A vCPU in its guest, as others and its CPU see it.
struct World {
    interrupts: Mutex<Interrupts>,
    control: AtomicU64,
    attention: AtomicU64,
    kicked: AtomicU64,
}

impl World {
    /// With an SGI pending, and listed unless somebody is about to disable its group.
    fn new(disables: bool) -> Arc<Self> {
        let mut model = Private::new(true);
        model.write(ISENABLER, u32::MAX, u32::MAX);
        model.send(SGI, 0);
        let mut interrupts = Interrupts {
            model,
            listed: Vec::new(),
            disables,
            is_off: false,
        };
        if !disables {
            interrupts.list(GROUP1);
        }
        Arc::new(Self {
            interrupts: Mutex::new(interrupts),
            control: AtomicU64::new(GROUP1),
            attention: AtomicU64::new(0),
            kicked: AtomicU64::new(0),
        })
    }

    fn alert(&self) {
        if self.attention.swap(1, Ordering::SeqCst) == 0 {
            self.kicked.swap(1, Ordering::SeqCst);
        }
    }

    /// Its CPU is interrupted, if somebody kicked it, and looks. Whether it was.
    fn run(&self, broken: Broken) -> bool {
        if self.kicked.swap(0, Ordering::SeqCst) == 0 {
            return false;
        }
        if self.attention.fetch_add(0, Ordering::SeqCst) != 0 {
            self.relist(broken);
        }
        true
    }

    /// `Resident::relist`.
    fn relist(&self, broken: Broken) {
        if broken != Broken::FlagLast {
            self.attention.swap(0, Ordering::AcqRel);
        }
        let early = self.control.load(Ordering::Relaxed);
        let mut interrupts = self.interrupts.lock().unwrap();
        let control = match broken {
            Broken::ControlFirst => early,
            _ => self.control.load(Ordering::Relaxed),
        };
        interrupts.take_back();
        interrupts.list(control);
        drop(interrupts);
        if broken == Broken::FlagLast {
            self.attention.swap(0, Ordering::AcqRel);
        }
    }

    /// The first half of `access::look`: the answer, or the number of the last one, to be waited for.
    fn ask(&self, broken: Broken) -> Option<u32> {
        if broken == Broken::AlertFirst {
            self.alert();
        }
        let mut interrupts = self.interrupts.lock().unwrap();
        if interrupts.model.look().is_some() {
            interrupts.answered();
            return None;
        }
        let last = interrupts.model.ask().number;
        drop(interrupts);
        if broken != Broken::AlertFirst {
            self.alert();
        }
        Some(last)
    }

    /// What it does at each poll.
    fn poll(&self, last: u32) -> bool {
        let mut interrupts = self.interrupts.lock().unwrap();
        let model = &interrupts.model;
        let found = model.answer().number != last || model.look().is_some();
        if found {
            interrupts.answered();
        }
        found
    }
}

fn wiring(control: u64) -> Wiring {
    Wiring {
        group0_enabled: false,
        group1_enabled: control & GROUP1 != 0,
        linked: (27, 27),
        asserted: false,
        lists: 4,
    }
}

impl Interrupts {
    fn take_back(&mut self) {
        for entry in core::mem::take(&mut self.listed) {
            self.model.take_back(&entry, Some(State::Pending));
        }
        self.model.settle();
    }

    fn list(&mut self, control: u64) {
        let mut models = Models {
            home: 0,
            private: &mut self.model,
            shared: None,
        };
        let listing = models.list(&wiring(control), |_| false, || Groups::BOTH).0;
        self.listed = listing.listed().copied().collect();
        assert!(!self.is_off || self.listed.is_empty(), "it is off");
    }

    fn answered(&mut self) {
        self.is_off |= self.disables;
    }
}

/// One vCPU's shared interrupts: SPI 33, an edge that it never takes.
struct Spis {
    model: Shared,
    listed: Vec<Entry>,
}

impl Spis {
    fn exchange(&mut self) {
        for entry in core::mem::take(&mut self.listed) {
            self.model.take_back(&entry, Some(State::Pending));
        }
        let mut private = Private::new(true);
        let mut models = Models {
            home: 0,
            private: &mut private,
            shared: Some(&mut self.model),
        };
        let listing = models.list(&wiring(GROUP1), |_| true, || Groups::BOTH).0;
        self.listed = listing.listed().copied().collect();
    }
}

/// Two look at shared interrupts that a vCPU has listed, one of them again and again: the other is answered though the first asks
/// once more before it polls.
fn look_at_shared_ones(broken: Broken) {
    check(move || {
        let mut model = Shared::new(Routing::Affinity);
        model.write(0x104, 1 << 1, u32::MAX, |_| None);
        model.write(0xc08, 1 << 3, u32::MAX, |_| None);
        model.pulse(33);
        let mut spis = Spis {
            model,
            listed: Vec::new(),
        };
        spis.exchange();
        let world = Arc::new((Mutex::new(spis), AtomicU64::new(0), AtomicU64::new(0)));
        let alert = |(_, attention, kicked): &(_, AtomicU64, AtomicU64)| {
            if attention.swap(1, Ordering::SeqCst) == 0 {
                kicked.swap(1, Ordering::SeqCst);
            }
        };
        let run = |(spis, attention, kicked): &(Mutex<Spis>, AtomicU64, AtomicU64)| {
            if kicked.swap(0, Ordering::SeqCst) == 0 {
                return false;
            }
            if attention.swap(0, Ordering::SeqCst) != 0 {
                spis.lock().unwrap().exchange();
            }
            true
        };
        let cpu = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                run(&world);
                run(&world);
            })
        };
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.0.lock().unwrap().model.ask(0);
                alert(&world);
            })
        };
        if broken == Broken::AlertFirst {
            alert(&world);
        }
        let seen = world.0.lock().unwrap().model.ask(0);
        if broken != Broken::AlertFirst {
            alert(&world);
        }
        cpu.join().unwrap();
        other.join().unwrap();
        while run(&world) {}
        let mut spis = world.0.lock().unwrap();
        spis.model.ask(0);
        let found = spis.model.found(0, seen).expect("nobody answers");
        assert_eq!((found.pending, found.active), (1 << 1, 0));
    });
}

/// One looks at what is listed while another sends an SGI, and the vCPU is interrupted at any time.
fn look_at_a_running_vcpu(broken: Broken) {
    check(move || {
        let world = World::new(false);
        let sender = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.interrupts.lock().unwrap().model.send(OTHER, 0);
                world.alert();
            })
        };
        let cpu = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.run(broken);
                world.run(broken);
            })
        };
        let last = world.ask(broken);
        sender.join().unwrap();
        cpu.join().unwrap();
        while world.run(broken) {}
        let mut interrupts = world.interrupts.lock().unwrap();
        let answer = interrupts.model.answer().number;
        assert!(last.is_none_or(|last| last != answer), "nobody answers");
        interrupts.take_back();
        assert_eq!(
            interrupts.model.look().unwrap().pending,
            1 << SGI | 1 << OTHER
        );
    });
}

/// `access::set_control`, while the vCPU lists what is pending.
fn disable_a_group(broken: Broken) {
    check(move || {
        let world = World::new(true);
        world.alert();
        let cpu = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.run(broken);
                world.run(broken);
            })
        };
        world.control.swap(0, Ordering::Relaxed);
        world.alert();
        if let Some(last) = world.ask(broken) {
            world.poll(last);
        }
        cpu.join().unwrap();
        while world.run(broken) {}
        assert!(world.interrupts.lock().unwrap().listed.is_empty());
    });
}

#[test]
fn good_who_asks_is_answered() {
    look_at_a_running_vcpu(Broken::Nothing);
}

#[test]
#[should_panic = "nobody answers"]
fn bad_a_question_behind_its_kick_waits_for_ever() {
    look_at_a_running_vcpu(Broken::AlertFirst);
}

#[test]
#[should_panic = "nobody answers"]
fn bad_a_flag_cleared_behind_the_look_loses_a_question() {
    look_at_a_running_vcpu(Broken::FlagLast);
}

#[test]
fn good_who_asks_for_shared_ones_is_answered() {
    look_at_shared_ones(Broken::Nothing);
}

#[test]
#[should_panic = "nobody answers"]
fn bad_a_question_for_shared_ones_behind_its_kick_waits_for_ever() {
    look_at_shared_ones(Broken::AlertFirst);
}

#[test]
fn good_a_group_that_is_off_stays_off() {
    disable_a_group(Broken::Nothing);
}

#[test]
#[should_panic = "it is off"]
fn bad_a_control_read_before_the_lock_lists_what_is_off() {
    disable_a_group(Broken::ControlFirst);
}
