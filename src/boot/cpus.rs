//! Bringing up the other CPUs, all at once, and finding out what the weakest of them can do.
//!
//! A CPU is *found* (the tree lists it), *online* (it runs Rust on the final map, with its interrupt interface open) or
//! *left out*. Online CPUs are numbered without gaps, the boot CPU first, once all have had their time; until then
//! none uses a number. A CPU that comes up after it was left out parks itself.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, Ordering};

use spin::Once;
use vellum::addr::Pa;
use vellum::arch::boot::{
    Launch, other_cpu_entry_point, publish_launches, release_from_spin_table,
};
use vellum::arch::features::{Features, IdRegisters};
use vellum::arch::mitigations::{AtExit, Mitigations, Setting};
use vellum::dev::gic::{Gic, KICK};
use vellum::dev::machine::{Interrupts, Machine};
use vellum::dev::psci;
use vellum::sync::percpu::{self, CpuBlock};
use vellum::trace::ring::Mark;
use vellum::vm::host::{self, Host};
use vellum::{arch, panic};

use super::memory::{Memory, Stacks, zeroed_page_near};

/// How long the other CPUs have to come up.
const PATIENCE_SECONDS: u64 = 60;

const STARTING: u8 = 0;
const ONLINE: u8 = 1;
const LEFT_OUT: u8 = 2;

/// What all CPUs need to come up.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) gic: Gic,
    pub(super) interrupts: Interrupts,
    /// VTTBR_EL2 of a CPU without a guest: tables that translate nothing, under the reserved VMID.
    pub(super) idle_vttbr: u64,
    /// What is asked for against attacks on branch predictors.
    pub(super) mitigations: Setting,
}

/// What a CPU found out about itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nature {
    pub(super) id: IdRegisters,
    pub(super) features: Features,
    pub(super) mitigations: Mitigations,
}

/// One CPU that was found.
#[derive(Debug)]
struct Cpu {
    launch: Launch,
    affinity: u64,
    block: &'static CpuBlock,
    nature: Once<Nature>,
    state: AtomicU8,
}

static SHARED: Once<Shared> = Once::new();
static FOUND: Once<Vec<Cpu>> = Once::new();

/// The CPUs in the order in which the rest of boot lists them: the boot CPU first.
pub(super) fn boot_cpu_first(machine: &mut Machine) {
    let this = arch::affinity();
    match machine.cpus.iter().position(|it| it.mpidr == this) {
        Some(position) => machine.cpus[..=position].rotate_right(1),
        None => panic::refuse(format_args!(
            "the device tree does not list the CPU {this:#x} that was started"
        )),
    }
}

/// Brings all CPUs up and returns what each of them is, by number. The others then sleep until [`release`].
pub(super) fn start(
    machine: &Machine,
    memory: &Memory,
    shared: Shared,
) -> (&'static Shared, Vec<Nature>) {
    let shared = SHARED.call_once(|| shared);
    let cpus = FOUND.call_once(|| describe(machine, memory));
    come_up(0, cpus, shared);
    for cpu in cpus {
        let launch = address(&cpu.launch);
        arch::dc_civac_range(Pa::new(launch), size_of::<Launch>() as u64);
    }
    publish_launches(cpus.get(1).map_or(0, |it| address(&it.launch)));
    for (position, (cpu, found)) in cpus.iter().zip(&machine.cpus).enumerate().skip(1) {
        if !shared.gic.reaches(position) {
            leave_out(cpu, "no GIC redistributor answers for it");
            continue;
        }
        if let Some(word) = found.spin_table {
            // SAFETY: the tree says that the CPU polls this word, which the final map holds; its launch is published.
            unsafe { release_from_spin_table(word) };
            continue;
        }
        if !found.psci {
            leave_out(cpu, "firmware says neither PSCI nor spin-table of it");
            continue;
        }
        let launch = address(&cpu.launch);
        // SAFETY: the entry expects a Launch in memory, and this one lives for ever.
        if let Err(refusal) = unsafe { psci::cpu_on(cpu.affinity, other_cpu_entry_point(), launch) }
        {
            leave_out(cpu, refusal.text());
        }
    }
    wait(cpus);
    number(cpus, &shared.gic);
    let online = cpus
        .iter()
        .filter(|it| it.state.load(Ordering::Acquire) == ONLINE);
    let natures = online.filter_map(|it| it.nature.get().copied()).collect();
    (shared, natures)
}

/// Lets the other CPUs run guests: they find the host installed.
pub(super) fn release(host: &Host) {
    arch::level_with(&host.features);
    for cpu in 1..host.cpus() {
        host.gic.send_sgi(cpu, KICK);
    }
}

fn address(launch: &Launch) -> u64 {
    core::ptr::from_ref(launch).expose_provenance() as u64
}

fn describe(machine: &Machine, memory: &Memory) -> Vec<Cpu> {
    let mut cpus = list(machine, memory);
    for index in 1..cpus.len() {
        cpus[index - 1].launch.next = address(&cpus[index].launch);
    }
    cpus
}

fn list(machine: &Machine, memory: &Memory) -> Vec<Cpu> {
    let none = None::<Stacks>;
    let stacks = core::iter::once(none).chain(memory.stacks.iter().copied().map(Some));
    machine
        .cpus
        .iter()
        .zip(stacks)
        .zip(0..)
        .map(|((found, stacks), argument)| {
            let node = found.node.unwrap_or(0);
            let number = u32::try_from(node).unwrap_or(0);
            let block = match stacks {
                Some(stacks) => new_block(stacks, found.mpidr, node),
                None => percpu::this(),
            };
            block.node.store(number, Ordering::Relaxed);
            block.affinity.store(found.mpidr, Ordering::Relaxed);
            let address = core::ptr::from_ref(block).expose_provenance() as u64;
            let stack_top = stacks.map_or(0, Stacks::top);
            Cpu {
                launch: Launch {
                    tables: memory.root,
                    stack_top,
                    block: address,
                    argument,
                    affinity: found.mpidr,
                    next: 0,
                },
                affinity: found.mpidr,
                block,
                nature: Once::new(),
                state: AtomicU8::new(STARTING),
            }
        })
        .collect()
}

fn new_block(stacks: Stacks, affinity: u64, node: usize) -> &'static CpuBlock {
    const _: () = assert!(size_of::<CpuBlock>() <= 4096);
    let Some(page) = zeroed_page_near(node) else {
        panic::refuse(format_args!(
            "too little RAM: no page is left for CPU {affinity:#x}"
        ))
    };
    let block = core::ptr::with_exposed_provenance::<CpuBlock>(vellum::addr::to_usize(page.raw()));
    // SAFETY: a zeroed page that is never given back; all-zero bytes are a valid block.
    let block = unsafe { &*block };
    block
        .emergency_stack_top
        .store(stacks.emergency_top(), Ordering::Relaxed);
    block
}

/// The rest of a CPU's life before it runs guests; the last thing it does is to count itself in.
fn come_up(found: usize, cpus: &[Cpu], shared: &Shared) {
    let cpu = &cpus[found];
    let id = arch::id_registers();
    let features = Features::new(&id);
    arch::write_control_registers(&features, shared.idle_vttbr);
    let mitigations = mitigate(cpu, &id, shared.mitigations);
    let Interrupts {
        maintenance,
        virtual_timer,
        hypervisor_timer,
        ..
    } = shared.interrupts;
    if let Err(error) = shared
        .gic
        .init_cpu(found, &[maintenance, virtual_timer, hypervisor_timer])
    {
        panic::refuse(format_args!("{error}"));
    }
    cpu.block
        .ring
        .record(Mark::Online, [found as u64, cpu.affinity]);
    cpu.nature.call_once(|| Nature {
        id,
        features,
        mitigations,
    });
    if cpu
        .state
        .compare_exchange(STARTING, ONLINE, Ordering::AcqRel, Ordering::Relaxed)
        .is_err()
    {
        loop {
            arch::wfi();
        }
    }
}

/// Chooses what exits from guests do on this CPU, and has them do it.
fn mitigate(cpu: &Cpu, id: &IdRegisters, setting: Setting) -> Mitigations {
    let mitigations = Mitigations::choose(id, psci::mitigations(), setting);
    let operand = match mitigations.at_exit {
        AtExit::Loop(operand) | AtExit::Call(operand) => operand,
        AtExit::Nothing | AtExit::ClearHistory => 0,
    };
    cpu.block
        .mitigation
        .store(operand.into(), Ordering::Relaxed);
    // SAFETY: the operand has just been written to this CPU's block; this CPU's firmware offered what is called.
    unsafe { arch::set_vectors(mitigations.at_exit) };
    mitigations
}

/// The other CPUs' first Rust: comes up, and returns once guests may run.
pub(super) fn join(found: u64) {
    arch::boot::forbid_writable_code();
    let (Some(shared), Some(cpus), Ok(found)) = (SHARED.get(), FOUND.get(), usize::try_from(found))
    else {
        return;
    };
    come_up(found, cpus, shared);
    loop {
        arch::wfi();
        while let Some(irq) = shared.gic.acknowledge() {
            shared.gic.priority_drop(irq);
            shared.gic.deactivate(irq);
        }
        if let Some(host) = host::get() {
            return arch::level_with(&host.features);
        }
    }
}

fn wait(cpus: &[Cpu]) {
    let deadline = arch::counter() + PATIENCE_SECONDS * arch::counter_hz();
    while cpus
        .iter()
        .any(|it| it.state.load(Ordering::Acquire) == STARTING)
        && arch::counter() < deadline
    {
        arch::yield_now();
    }
    for cpu in cpus
        .iter()
        .filter(|it| it.state.load(Ordering::Acquire) == STARTING)
    {
        leave_out(cpu, "it did not come up");
    }
}

fn leave_out(cpu: &Cpu, reason: &str) {
    if cpu
        .state
        .compare_exchange(STARTING, LEFT_OUT, Ordering::AcqRel, Ordering::Relaxed)
        .is_ok()
    {
        log::error!("CPU {:#x} is left out: {reason}", cpu.affinity);
    }
}

fn number(cpus: &[Cpu], gic: &Gic) {
    let online = || {
        cpus.iter()
            .enumerate()
            .filter(|(_, it)| it.state.load(Ordering::Acquire) == ONLINE)
    };
    let found: Vec<_> = online().map(|(found, _)| found).collect();
    gic.number_cpus(&found);
    percpu::publish(online().map(|(_, it)| it.block).collect());
}
