//! Random programs of everything a VM's memory goes through, over several CPUs and VMs, against the flat model.
//!
//! A program is named by its seed. When one fails it says so; `MODEL_SEED=n MODEL_STEPS=m cargo test --test mmu random`
//! runs it alone and shorter, `MODEL_SEEDS=n` as many programs. Steps interleave at entry points; every few steps a CPU's guest also acts in the middle of
//! another CPU's entry point.

use std::cell::Cell;
use std::env;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use vellum::addr::Ipa;
use vellum::arch::fake::{Event, Random};
use vellum::mmu::{
    Access, Bbm, Engine, Error, Level, Locking, Policy, Precision, Splitting, Tracking,
};
use vellum::sync::quiescence::CpuId;

use crate::flat::Vm;
use crate::rig::{BLOCK_BYTES, Ended, Interruptions, MODES, Plan, RAM, Rig};

/// Pages of a slot that programs touch: neighbours, far ones, both sides of word, group and block bounds.
const PAGES: [u64; 14] = [
    0, 1, 2, 62, 63, 64, 127, 300, 511, 512, 513, 600, 1022, 1023,
];
const SLOT_BLOCKS: u64 = 2;
const READ_ONLY: u64 = RAM + 0x4000_0000;

struct Program {
    rig: Rc<Rig>,
    vms: Vec<Rc<Vm>>,
    random: Random,
}

/// What programs of one kind have in common.
#[derive(Clone, Copy)]
struct Kind {
    engine: Engine,
    tracking: Tracking,
    vms: usize,
    vmid_bits: u32,
}

impl Kind {
    const fn of(engine: Engine) -> Self {
        Self {
            engine,
            tracking: Tracking::Fault,
            vms: 1,
            vmid_bits: 8,
        }
    }
}

impl Program {
    fn new(seed: u64, kind: Kind) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan {
            cpus: 4,
            locking: MODES[random.below(3)],
            vmid_bits: kind.vmid_bits,
            range_tlbi: random.once_in(2),
            hpfar: random.once_in(2),
            splitting: splitting(&mut random),
            engine: kind.engine,
            tracking: kind.tracking,
        };
        let rig = Rc::new(Rig::new(plan));
        rig.machine.seed(seed);
        let vms = (0..kind.vms).map(|_| new_vm(&rig, &mut random)).collect();
        Self { rig, vms, random }
    }

    fn pick_vm(&mut self) -> (usize, Rc<Vm>) {
        let index = self.random.below(self.vms.len());
        (index, Rc::clone(&self.vms[index]))
    }

    /// A CPU that may call entry points of `vm`: it runs it or nothing.
    fn pick_cpu(&mut self, vm: &Rc<Vm>) -> usize {
        let cpu = self.random.below(self.rig.plan.cpus);
        match self.rig.vm_on(cpu) {
            Some(held) if !Rc::ptr_eq(&held, vm) => 0,
            _ => cpu,
        }
    }

    fn step(&mut self) {
        let (index, vm) = self.pick_vm();
        let cpu = self.pick_cpu(&vm);
        match self.random.below(41) {
            0..4 => self.switch(&vm),
            4..18 => self.access(),
            18 => self.toggle_logging(cpu, &vm),
            19..24 => self.interrupted(|program| program.clear(cpu, &vm)),
            24 => self.interrupted(|program| program.next_epoch(cpu, &vm)),
            25..27 => self.interrupted(|program| program.unmap(cpu, &vm)),
            27 => self.copy_to_guest(cpu, &vm),
            28 => self.protect_block_writers(cpu, &vm),
            29 if self.random.once_in(8) => self.replace(index, vm),
            30 => self.interrupted(|program| program.split(cpu, &vm)),
            31 => self.interrupted(|program| program.collapse(cpu, &vm)),
            32..34 => self.interrupted(|program| program.close(cpu, &vm)),
            34..36 => self.interrupted(|program| program.harvest(cpu, &vm)),
            36 => self.interrupted(|program| program.prepare(cpu, &vm)),
            37 => self.without_frames(cpu, &vm),
            38 => self.rest(),
            39 => self.interrupted(|program| program.age(cpu, &vm)),
            _ => self.access(),
        }
    }

    fn age(&mut self, cpu: usize, vm: &Rc<Vm>) {
        let precision = match self.random.below(2) {
            0 => Precision::Precise,
            _ => Precision::Imprecise,
        };
        let rig = &self.rig;
        rig.machine.on(cpu, || {
            vm.stage2.age_all(CpuId(cpu), precision, |_, _| {});
        });
    }

    /// A CPU other than the controller's changes what it runs.
    fn switch(&mut self, vm: &Rc<Vm>) {
        let cpu = 1 + self.random.below(self.rig.plan.cpus - 1);
        if self.random.once_in(6) {
            self.rig.unload(cpu);
        } else {
            self.rig.load(cpu, vm);
        }
    }

    fn access(&mut self) {
        let cpu = 1 + self.random.below(self.rig.plan.cpus - 1);
        let Some(vm) = self.rig.vm_on(cpu) else {
            return;
        };
        let page = PAGES[self.random.below(PAGES.len())];
        let slots = vm.slots.borrow().len();
        let slot = self.random.below(slots + 1);
        let (ipa, writable) = match vm.slots.borrow().get(slot) {
            Some(slot) => (slot.at(page), Some(slot.writable)),
            None => (Ipa::new(RAM - 0x1000 * (1 + page)), None),
        };
        let access = match self.random.below(8) {
            0..2 => Access::Read,
            2 => Access::Execute,
            _ => Access::Write,
        };
        let expected = match (writable, access) {
            (None, _) => Ended::NoSlot,
            (Some(false), Access::Write) => Ended::Denied,
            _ => Ended::Done,
        };
        assert_eq!(
            self.rig.access(cpu, ipa, access),
            expected,
            "{access:?} at {ipa}"
        );
    }

    fn toggle_logging(&mut self, cpu: usize, vm: &Rc<Vm>) {
        let logging = vm.slots.borrow()[0].copied.borrow().is_some();
        if logging {
            self.interrupted(|program| _ = program.rig.disable(cpu, vm, 0));
        } else {
            let all_set = self.random.once_in(3);
            self.interrupted(|program| _ = program.rig.enable(cpu, vm, 0, all_set));
        }
    }

    fn is_logged(vm: &Vm) -> bool {
        vm.slots.borrow()[0].copied.borrow().is_some()
    }

    fn clear(&mut self, cpu: usize, vm: &Rc<Vm>) {
        if !Self::is_logged(vm) {
            return;
        }
        let (from, to) = self.pick_range();
        self.rig.clear(cpu, vm, 0, from, to);
    }

    fn pick_range(&mut self) -> (u64, u64) {
        let words = usize::try_from(SLOT_BLOCKS * 512 / 64).expect("few");
        let from = 64 * self.random.below(words) as u64;
        let left = SLOT_BLOCKS * 512 - from;
        match self.random.below(3) {
            0 => (from, from + 64),
            1 => (from, from + left.min(512)),
            _ => (from, from + left),
        }
    }

    fn split(&mut self, cpu: usize, vm: &Rc<Vm>) {
        let (slot, (from, to)) = (self.random.below(2), self.pick_range());
        self.rig.split(cpu, vm, slot, from, to);
    }

    fn collapse(&mut self, cpu: usize, vm: &Rc<Vm>) {
        let slot = self.random.below(2);
        let (from, to) = match self.random.below(3) {
            0 => self.pick_range(),
            1 => (0, 512),
            _ => (0, SLOT_BLOCKS * 512),
        };
        self.rig.collapse(cpu, vm, slot, from, to);
    }

    fn next_epoch(&self, cpu: usize, vm: &Rc<Vm>) {
        if Self::is_logged(vm) && !Self::is_due(vm) {
            self.rig.next_epoch(cpu, vm, 0);
        }
    }

    fn is_due(vm: &Vm) -> bool {
        vm.slots.borrow()[0].closing.borrow().is_some()
    }

    /// Closes an epoch, to be harvested later; refused when there is nothing to close.
    fn close(&self, cpu: usize, vm: &Rc<Vm>) {
        let id = vm.slots.borrow()[0].id;
        let expected = match (Self::is_logged(vm), Self::is_due(vm)) {
            (false, _) => Err(Error::NotLogging),
            (true, true) => Err(Error::NotHarvested(id)),
            (true, false) => Ok(()),
        };
        assert_eq!(self.rig.close(cpu, vm).map(drop), expected);
    }

    fn harvest(&self, cpu: usize, vm: &Rc<Vm>) {
        self.rig.harvest(cpu, vm, 0);
    }

    fn prepare(&self, cpu: usize, vm: &Rc<Vm>) {
        let prepared = self.rig.prepare(cpu, vm);
        assert!(prepared.is_ok(), "{prepared:?}");
    }

    /// Prepares and closes an epoch while frames are short.
    fn without_frames(&mut self, cpu: usize, vm: &Rc<Vm>) {
        let left = self.random.below(4);
        let frames = self.rig.frames.swap(left, Ordering::Relaxed);
        if self.random.once_in(2) {
            let prepared = self.rig.prepare(cpu, vm);
            assert!(matches!(prepared, Ok(_) | Err(Error::NoMemory)));
        }
        if Self::is_logged(vm) && !Self::is_due(vm) {
            self.close(cpu, vm);
        }
        let now = self.rig.frames.load(Ordering::Relaxed);
        self.rig
            .frames
            .store(frames - left + now, Ordering::Relaxed);
    }

    /// A CPU sleeps until its guest has something to do again.
    fn rest(&mut self) {
        let cpu = 1 + self.random.below(self.rig.plan.cpus - 1);
        self.rig.cpus.rest(cpu);
    }

    fn unmap(&mut self, cpu: usize, vm: &Rc<Vm>) {
        let (rig, ipa) = (&self.rig, vm.slots.borrow()[0].at(0));
        let block = self.random.below(2) as u64;
        let ipa = Ipa::new(ipa.raw() + block * BLOCK_BYTES);
        let done = rig
            .machine
            .on(cpu, || vm.stage2.unmap(CpuId(cpu), ipa, BLOCK_BYTES));
        assert_eq!(done, Ok(()));
    }

    fn copy_to_guest(&mut self, cpu: usize, vm: &Rc<Vm>) {
        let ipa = vm.slots.borrow()[0].at(PAGES[self.random.below(PAGES.len())]);
        let rig = &self.rig;
        let done = rig
            .machine
            .on(cpu, || vm.stage2.copy_to_guest(CpuId(cpu), ipa, &[1; 16]));
        assert_eq!(done, Ok(()));
        vm.written_by_us(ipa);
    }

    /// What is left to a fault that finds no frame for a table.
    fn protect_block_writers(&mut self, cpu: usize, vm: &Rc<Vm>) {
        let page = PAGES[self.random.below(PAGES.len())];
        let ipa = vm.slots.borrow()[0].at(page);
        let first = page / 512 * 512;
        vm.slots.borrow()[0]
            .reportable
            .borrow_mut()
            .extend(first..first + 512);
        self.rig
            .machine
            .on(cpu, || vm.stage2.write_whole_block(CpuId(cpu), ipa));
    }

    /// Ends a VM and begins another.
    fn replace(&mut self, index: usize, vm: Rc<Vm>) {
        let successor = new_vm(&self.rig, &mut self.random);
        self.vms[index] = successor;
        self.rig.destroy(0, vm);
    }

    /// Runs `work` with guests of other CPUs acting in the middle of it, where one thread can play that.
    fn interrupted(&mut self, work: impl FnOnce(&mut Self)) {
        if self.rig.plan.locking == Locking::Mutex || self.random.once_in(2) {
            return work(self);
        }
        let random = Rc::new(Cell::new(Random::new(self.random.bits())));
        let rig = Rc::clone(&self.rig);
        let interruptions = Interruptions::new(move |event| {
            let mut choice = random.get();
            if choice.once_in(12) {
                interrupt(&rig, &mut choice);
            }
            if event == Event::Yield {
                obey(&rig, &mut choice);
            }
            random.set(choice);
        });
        self.rig.cpus.polled.set(true);
        work(self);
        drop(interruptions);
        self.rig.cpus.polled.set(false);
        (0..self.rig.plan.cpus).for_each(|cpu| self.rig.cpus.obey(cpu));
    }
}

/// A guest on a CPU that is not in the middle of an entry point accesses memory.
fn interrupt(rig: &Rig, random: &mut Random) {
    let cpu = 1 + random.below(rig.plan.cpus - 1);
    let Some(vm) = rig.vm_on(cpu).filter(|_| rig.machine.current() != cpu) else {
        return;
    };
    let Ok(slots) = vm.slots.try_borrow() else {
        return;
    };
    let ipa = slots[0].at(PAGES[random.below(PAGES.len())]);
    drop(slots);
    let access = if random.once_in(4) {
        Access::Read
    } else {
        Access::Write
    };
    rig.provoke(cpu, ipa, access);
}

/// Somebody waits: CPUs that were kicked obey, sooner or later, and their guests go on until then.
fn obey(rig: &Rig, random: &mut Random) {
    for cpu in (1..rig.plan.cpus).filter(|cpu| rig.cpus.is_kicked(*cpu)) {
        if random.once_in(2) {
            interrupt(rig, random);
        }
        if random.once_in(2) {
            rig.cpus.obey(cpu);
        }
    }
}

fn splitting(random: &mut Random) -> Splitting {
    let policies = [
        Policy::Fault,
        Policy::FaultEmpty,
        Policy::Enable,
        Policy::Clear,
    ];
    Splitting {
        policy: policies[random.below(4)],
        bbm: [Bbm::Zero, Bbm::Two][random.below(2)],
        batch: [1, 2, 16][random.below(3)],
        chunk_bytes: [BLOCK_BYTES, 512 * BLOCK_BYTES][random.below(2)],
        pause_ticks: 0,
    }
}

fn new_vm(rig: &Rig, random: &mut Random) -> Rc<Vm> {
    let vm = rig.vm();
    let leaf = if random.once_in(2) {
        Level::L2
    } else {
        Level::L3
    };
    if random.once_in(4) {
        vm.add_scattered_ram(RAM, SLOT_BLOCKS, leaf);
    } else {
        vm.add_ram(RAM, SLOT_BLOCKS, leaf, true);
    }
    vm.add_ram(READ_ONLY, SLOT_BLOCKS, leaf, false);
    vm
}

fn setting(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

/// Runs the programs `seeds` of `steps` steps, or the one that the environment names.
fn run(seeds: u64, steps: u64, kind: Kind) {
    let only = setting("MODEL_SEED");
    let count = setting("MODEL_SEEDS").unwrap_or(if only.is_some() { 1 } else { seeds });
    let first = only.unwrap_or(1);
    let steps = setting("MODEL_STEPS").unwrap_or(steps);
    for seed in first..first + count {
        let at = Rc::new(Cell::new(0));
        let _named = Named(seed, Rc::clone(&at));
        let mut program = Program::new(seed, kind);
        for step in 0..steps {
            at.set(step);
            program.step();
            // Asking what is dirty may record it: every other program is asked rarely.
            if seed % 2 == 0 || step % 16 == 0 {
                for vm in &program.vms {
                    program.rig.check(vm);
                }
            }
        }
        while let Some(vm) = program.vms.pop() {
            program.rig.destroy(0, vm);
        }
    }
}

/// Says which program failed.
struct Named(u64, Rc<Cell<u64>>);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "program MODEL_SEED={} failed in step {}",
                self.0,
                self.1.get()
            );
        }
    }
}

#[test]
fn good_random_programs_of_one_vm_report_exactly_what_was_written() {
    run(40, 300, Kind::of(Engine::Walk));
}

#[test]
fn good_random_programs_with_engine_lazy() {
    run(24, 300, Kind::of(Engine::Lazy));
}

#[test]
fn good_random_programs_with_engine_swap() {
    run(24, 300, Kind::of(Engine::Swap));
}

#[test]
fn good_random_programs_with_engine_pie() {
    run(24, 300, Kind::of(Engine::Pie));
}

#[test]
fn good_random_programs_with_tracking_dbm() {
    let tracking = Tracking::Dbm;
    run(
        24,
        300,
        Kind {
            tracking,
            ..Kind::of(Engine::Walk)
        },
    );
}

#[test]
fn good_random_programs_of_many_vms_survive_vmid_rollover() {
    for engine in Engine::ALL {
        let kind = Kind {
            vms: 12,
            vmid_bits: 3,
            ..Kind::of(engine)
        };
        run(5, 300, kind);
    }
}

#[test]
fn good_random_programs_with_8_bit_vmids_roll_over() {
    let kind = Kind {
        vms: 300,
        ..Kind::of(Engine::Walk)
    };
    run(1, 400, kind);
}
