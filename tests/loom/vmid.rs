//! VMID rollover against entry (rule 16): two CPUs never run two VMs under one number.

use loom::sync::{Arc, Mutex};
use loom::thread;
use vellum::arch;
use vellum::arch::atomic::{AtomicU64, Ordering};
use vellum::mmu::vmid::{VmidAllocator, VmidCell};
use vellum::sync::quiescence::CpuId;

use crate::check;

/// Who runs what: VM and number, by CPU.
#[derive(Default)]
struct Running(Mutex<[Option<(usize, u16)>; 2]>);

impl Running {
    fn enter(&self, cpu: usize, vm: usize, number: u16) {
        let mut running = self.0.lock().unwrap();
        running[cpu] = Some((vm, number));
        if let [Some((a, first)), Some((b, second))] = *running {
            assert!(a == b || first != second, "two VMs share a VMID");
        }
    }

    fn leave(&self, cpu: usize) {
        self.0.lock().unwrap()[cpu] = None;
    }
}

struct Host {
    vmids: VmidAllocator,
    cells: [VmidCell; 5],
    running: Running,
}

impl Host {
    /// Three numbers, all taken by VMs 0 to 2.
    fn new() -> Arc<Self> {
        let host = Self {
            vmids: VmidAllocator::new(2, 2),
            cells: Default::default(),
            running: Running::default(),
        };
        for vm in 0..3 {
            host.run(0, vm);
        }
        Arc::new(host)
    }

    /// `cpu` runs `vm`, whatever it ran before.
    fn enter(&self, cpu: usize, vm: usize) {
        let number = self.vmids.load(&self.cells[vm], CpuId(cpu)).number();
        assert_ne!(number, 0);
        self.running.enter(cpu, vm, number);
    }

    fn run(&self, cpu: usize, vm: usize) {
        self.enter(cpu, vm);
        self.leave(cpu);
    }

    /// `cpu` loads the idle root, then says so.
    fn leave(&self, cpu: usize) {
        self.running.leave(cpu);
        self.vmids.unload(CpuId(cpu));
    }
}

#[test]
fn good_rollover_against_entry_keeps_numbers_apart() {
    check(|| {
        let host = Host::new();
        let other = {
            let host = Arc::clone(&host);
            thread::spawn(move || host.enter(1, 0))
        };
        host.enter(0, 3);
        other.join().unwrap();
    });
}

#[test]
fn good_rollover_against_reentry_keeps_the_number_of_a_running_vm() {
    check(|| {
        let host = Host::new();
        host.enter(1, 0);
        let other = {
            let host = Arc::clone(&host);
            thread::spawn(move || {
                host.enter(1, 0);
                host.leave(1);
                host.run(1, 1);
            })
        };
        host.run(0, 3);
        host.run(0, 4);
        other.join().unwrap();
    });
}

#[test]
fn good_one_vm_entered_twice_at_once_has_one_number() {
    check(|| {
        let host = Host::new();
        let other = {
            let host = Arc::clone(&host);
            thread::spawn(move || host.vmids.load(&host.cells[3], CpuId(1)))
        };
        let mine = host.vmids.load(&host.cells[3], CpuId(0));
        assert_eq!(mine, other.join().unwrap());
    });
}

/// CPU 1 exchanges the root that it runs under for one with another number, while numbers run out.
fn exchange_against_rollover(exchange: fn(&Host)) {
    check(move || {
        let host = Host::new();
        host.enter(1, 0);
        let other = {
            let host = Arc::clone(&host);
            thread::spawn(move || exchange(&host))
        };
        host.enter(0, 3);
        other.join().unwrap();
    });
}

#[test]
fn good_root_exchanged_by_way_of_the_idle_one_keeps_numbers_apart() {
    exchange_against_rollover(|host| {
        host.running.leave(1);
        host.enter(1, 1);
    });
}

#[test]
#[should_panic = "two VMs share a VMID"]
fn bad_number_loaded_before_the_root_of_another_is_gone_is_given_away() {
    exchange_against_rollover(|host| host.enter(1, 1));
}

/// The allocator's fast path and a rollover, reduced to one CPU's mark and one number.
struct Reduced {
    generation: AtomicU64,
    active: AtomicU64,
}

const IDLE: u64 = 9;
const ROLLED: u64 = 0;
const OLD: u64 = 1;

impl Reduced {
    /// Whether the CPU now runs under its old number.
    fn enter(&self, compare: bool) -> bool {
        let seen = self.active.load(Ordering::Relaxed);
        if seen == ROLLED || self.generation.load(Ordering::Acquire) != OLD {
            return false;
        }
        if compare {
            return arch::cas(&self.active, seen, OLD).is_ok();
        }
        self.active.store(OLD, Ordering::Release);
        true
    }

    /// Whether the number is free for another VM.
    fn roll_over(&self) -> bool {
        self.generation.store(OLD + 1, Ordering::Release);
        arch::swap(&self.active, ROLLED) != OLD
    }
}

fn reduced(compare: bool) {
    check(move || {
        let reduced = Arc::new(Reduced {
            generation: AtomicU64::new(OLD),
            active: AtomicU64::new(IDLE),
        });
        let entering = {
            let reduced = Arc::clone(&reduced);
            thread::spawn(move || reduced.enter(compare))
        };
        let free = reduced.roll_over();
        let runs = entering.join().unwrap();
        assert!(!(free && runs), "two VMs share a VMID");
    });
}

#[test]
fn good_entry_by_compare_and_swap_is_seen_by_rollover() {
    reduced(true);
}

#[test]
#[should_panic = "two VMs share a VMID"]
fn bad_plain_store_shares_a_vmid() {
    reduced(false);
}
