//! What each CPU of a rig runs, whether it is inside the guest, and how it is made to leave.
//!
//! A CPU refreshes what it holds whenever it enters the guest, and stays inside until a fault or a kick. A kick is obeyed at
//! once, or, while others act in the middle of the call that kicks, some time later (`polled`).

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use vellum::arch::fake::Machine;
use vellum::sync::quiescence::CpuId;

use crate::flat::Vm;

std::thread_local! {
    static CPUS: RefCell<Weak<Cpus>> = const { RefCell::new(Weak::new()) };
}

#[derive(Clone, Default)]
struct OnCpu {
    vm: Option<Rc<Vm>>,
    in_guest: bool,
    kicked: bool,
}

/// The CPUs of this thread's rig.
pub(crate) struct Cpus {
    machine: Rc<Machine>,
    on: RefCell<Vec<OnCpu>>,
    /// Whoever is kicked waits for [`Cpus::obey`].
    pub(crate) polled: Cell<bool>,
    /// This CPU does not notice kicks: it works at EL2.
    pub(crate) deaf: Cell<Option<usize>>,
}

/// The `kick` of [`vellum::mmu::Services`]: it reaches the CPUs of this thread's rig.
pub(crate) fn kick(cpu: CpuId) {
    if let Some(cpus) = CPUS.with_borrow(Weak::upgrade) {
        cpus.kick(cpu.0);
    }
}

impl Cpus {
    pub(crate) fn new(machine: &Rc<Machine>, count: usize) -> Rc<Self> {
        let cpus = Rc::new(Self {
            machine: Rc::clone(machine),
            on: RefCell::new(vec![OnCpu::default(); count]),
            polled: Cell::new(false),
            deaf: Cell::new(None),
        });
        CPUS.set(Rc::downgrade(&cpus));
        cpus
    }

    pub(crate) fn vm(&self, cpu: usize) -> Option<Rc<Vm>> {
        self.on.borrow()[cpu].vm.clone()
    }

    /// `cpu` begins to run `vm`, or ends to run what it ran, which is returned.
    pub(crate) fn set(&self, cpu: usize, vm: Option<Rc<Vm>>) -> Option<Rc<Vm>> {
        let fresh = OnCpu {
            vm,
            ..OnCpu::default()
        };
        std::mem::replace(&mut self.on.borrow_mut()[cpu], fresh).vm
    }

    /// `cpu` enters its guest, unless it is inside.
    pub(crate) fn enter(&self, cpu: usize) {
        if std::mem::replace(&mut self.on.borrow_mut()[cpu].in_guest, true) {
            return;
        }
        if let Some(vm) = self.vm(cpu) {
            self.machine.on(cpu, || vm.stage2.refresh(CpuId(cpu)));
            self.machine.enter_guest(cpu);
        }
    }

    /// `cpu` has left its guest.
    pub(crate) fn leave(&self, cpu: usize) {
        self.on.borrow_mut()[cpu].in_guest = false;
    }

    /// `cpu` sleeps at EL2 until it enters again.
    pub(crate) fn rest(&self, cpu: usize) {
        self.leave(cpu);
        if let Some(vm) = self.vm(cpu) {
            self.machine.on(cpu, || vm.stage2.rest(CpuId(cpu)));
            self.machine.leave_guest(cpu);
        }
    }

    fn kick(&self, cpu: usize) {
        if self.deaf.get() == Some(cpu) {
            panic!("CPU {cpu} waits for itself");
        }
        self.on.borrow_mut()[cpu].kicked = true;
        if !self.polled.get() || self.machine.current() == cpu {
            self.obey(cpu);
        }
    }

    /// `cpu` leaves its guest and enters it again, if it was kicked.
    pub(crate) fn obey(&self, cpu: usize) {
        if std::mem::replace(&mut self.on.borrow_mut()[cpu].kicked, false) {
            self.leave(cpu);
            self.enter(cpu);
        }
    }

    pub(crate) fn is_kicked(&self, cpu: usize) -> bool {
        self.on.borrow()[cpu].kicked
    }
}
