//! From the first line of Rust to the first guest: a story, told once.
//!
//! Under UEFI there is a prologue ([`uefi`]), after which the image starts as it does everywhere. The entry code
//! (`arch/boot.S`) has checked the device tree and turned MMU and caches on, over a map of the image and
//! the tree only. Each step hands its result to the next; nothing is changed after the step that made it.

mod cpus;
mod memory;
mod uefi;

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Write;
use core::ops::Range;

use vellum::addr::{PAGE_BYTES, Pa, to_usize};
use vellum::arch::boot::Unusable;
use vellum::arch::features::{Features, IdRegisters, cpu_name};
use vellum::arch::mitigations::Mitigations;
use vellum::dev::gic::Gic;
use vellum::dev::machine::{self, Machine, Uart};
use vellum::dev::power;
use vellum::dev::psci;
use vellum::dev::serial::Serial;
use vellum::dev::tree::{self, Tree};
use vellum::mem::{frames, ram};
use vellum::mmu::{Format, Hardware, Permissions, Services, TlbFeatures, VmidAllocator, vmid};
use vellum::sync::percpu;
use vellum::sync::quiescence::Domain;
use vellum::vm::host::{self, Host};
use vellum::{arch, bench, log as console, panic};

/// The built-in guest, a flat file made by `cargo xtask` before this one.
static GUEST: &[u8] = include_bytes!(env!(
    "VELLUM_GUEST",
    "the hypervisor contains its guest: build it with `cargo xtask image`"
));

#[unsafe(no_mangle)]
extern "C" fn boot_cpu_main(tree: u64) -> ! {
    let (tree, at) = read_tree(Pa::new(tree));
    let uart = start_console(&tree);
    if uart.is_none() {
        // Nobody would hear anything: the machine is switched off instead.
        panic::refuse(format_args!("no usable console"));
    }
    let mut machine =
        Machine::new(&tree).unwrap_or_else(|error| panic::refuse(format_args!("{error}")));
    machine.console = uart;
    cpus::boot_cpu_first(&mut machine);
    let memory = memory::take_over(&machine, at, uart);
    let shared = cpus::Shared {
        gic: take_interrupt_controller(&machine),
        interrupts: machine.interrupts,
        idle_vttbr: idle_vttbr(),
        mitigations: bench::mitigations(&machine.bootargs),
    };
    let (shared, natures) = cpus::start(&machine, &memory, shared);
    let (identification, features, mitigations) = weakest(&natures);
    arch::set_lse(features.lse);
    arch::set_coherent_guests(features.fwb && features.idc, features.dic);
    introduce(&machine, &memory, &features, &natures);
    let host = host::install(share(
        machine,
        identification,
        features,
        mitigations,
        shared,
    ));
    cpus::release(host);
    let images = bench::Images {
        guest: GUEST,
        bundle: host.machine.initrd.as_ref().map(ram_disk),
    };
    match bench::main(host, &host.machine.bootargs, images) {
        Ok(status) => panic::exit(status),
        Err(reason) => panic::refuse(format_args!("{reason}")),
    }
}

#[unsafe(no_mangle)]
extern "C" fn other_cpu_main(found: u64) -> ! {
    cpus::join(found);
    vellum::vm::run::cpu_loop()
}

/// The entry code's last resort where EL2 cannot be used.
#[unsafe(no_mangle)]
extern "C" fn refuse_to_boot(tree: u64, why: Unusable) -> ! {
    let (tree, _) = read_tree(Pa::new(tree));
    start_console(&tree);
    match why {
        Unusable::El1 => panic::refuse(format_args!(
            "started at EL1, but a hypervisor needs EL2 (QEMU: -machine virt,virtualization=on)"
        )),
        Unusable::E2h => panic::refuse(format_args!(
            "this CPU has EL2 with E2H only (ID_AA64MMFR4_EL1.E2H0), which Vellum does not support"
        )),
    }
}

fn read_tree(at: Pa) -> (Tree<'static>, Range<Pa>) {
    let start = core::ptr::with_exposed_provenance::<u8>(to_usize(at.raw()));
    // SAFETY: the entry code checked and mapped what the header claims; nobody writes it.
    let header = unsafe { core::slice::from_raw_parts(start, 8) };
    let bytes = tree::total_bytes(header).unwrap_or(header.len());
    // SAFETY: as above.
    let tree = Tree::new(unsafe { core::slice::from_raw_parts(start, bytes) });
    match (tree, at.checked_add(bytes as u64)) {
        (Ok(tree), Some(end)) => (tree, at..end),
        // Nothing says where a UART is, nor how to switch off.
        _ => power::off(),
    }
}

/// The initial RAM disk, in place.
fn ram_disk(at: &Range<Pa>) -> &'static [u8] {
    let start = core::ptr::with_exposed_provenance::<u8>(to_usize(at.start.raw()));
    let bytes = to_usize(at.end.offset_from(at.start).unwrap_or(0));
    // SAFETY: the final map holds it, read-only; it was taken out of RAM that others get, and nobody writes it.
    unsafe { core::slice::from_raw_parts(start, bytes) }
}

fn start_console(tree: &Tree<'_>) -> Option<Uart> {
    if let Some(conduit) = machine::conduit(tree) {
        psci::set_conduit(conduit);
    }
    if let Some(manager) = machine::power_manager(tree) {
        // SAFETY: the tree says that it is there, and devices of a machine do not share 2 MiB with its RAM.
        if unsafe { arch::boot::map_early_device(manager) } {
            // SAFETY: it is mapped now, and by the final map, and nobody else drives it.
            unsafe { power::set_manager(manager) };
        }
    }
    machine::consoles(tree).find(|uart| {
        // SAFETY: the tree says that a UART is there, and devices of a machine do not share 2 MiB with its RAM.
        let mapped = unsafe { arch::boot::map_early_device(uart.base) };
        // SAFETY: it is mapped then, and by the final map, and this is its only driver.
        let serial = mapped.then(|| unsafe { Serial::new(*uart) }).flatten();
        serial.map(console::start).is_some()
    })
}

fn take_interrupt_controller(machine: &Machine) -> Gic {
    let affinities: Vec<_> = machine.cpus.iter().map(|it| it.mpidr).collect();
    // SAFETY: the tree says where it is, the final map holds it, and this is its only driver.
    unsafe { Gic::new(&machine.gic, &affinities) }
        .unwrap_or_else(|error| panic::refuse(format_args!("{error}")))
}

/// What VMs share, shaped by the weakest CPU.
fn share(
    machine: Machine,
    identification: IdRegisters,
    features: Features,
    mitigations: Mitigations,
    shared: &'static cpus::Shared,
) -> Host {
    let cpus = percpu::all().len();
    frames::prepare(cpus);
    let services = Services {
        quiescence: Domain::new(cpus),
        vmids: VmidAllocator::new(features.vmid_bits, cpus),
        frames: Box::new(frames::System),
        format: Format {
            forced_write_back: features.fwb,
            permissions: Permissions::Direct,
        },
        tlb: TlbFeatures {
            range: features.tlbi_range,
        },
        hardware: Hardware {
            indirection: features.s2pie,
            access_flag: features.hardware_access_flag,
            dirty_state: features.hardware_dirty,
        },
        idle_vttbr: shared.idle_vttbr,
        kick: Box::new(|cpu| host::kick(&shared.gic, cpu.0)),
    };
    Host {
        machine,
        gic: &shared.gic,
        features,
        identification,
        mitigations,
        services: Arc::new(services),
    }
}

/// VTTBR_EL2 for CPUs without a guest: empty tables, as many as any guest's root can be concatenated from.
fn idle_vttbr() -> u64 {
    const ROOT_BYTES: u64 = 16 * PAGE_BYTES;
    let Some(root) = frames::contiguous(ROOT_BYTES, ROOT_BYTES) else {
        panic::refuse(format_args!(
            "too little RAM: nothing is left for an empty table"
        ))
    };
    for page in (0..root.bytes).step_by(to_usize(PAGE_BYTES)) {
        // SAFETY: the page is new and nobody refers to it.
        unsafe { arch::zero_page(Pa::new(root.pa.raw() + page)) };
    }
    vmid::RESERVED.vttbr(root.pa)
}

/// What every CPU can do, and where the worst of them stands towards attacks on branch predictors.
fn weakest(natures: &[cpus::Nature]) -> (IdRegisters, Features, Mitigations) {
    let ids = natures.iter().map(|it| it.id);
    let features = natures.iter().map(|it| it.features);
    let mitigations = natures.iter().map(|it| it.mitigations);
    match (
        ids.reduce(IdRegisters::weakest),
        features.reduce(Features::weakest),
        mitigations.reduce(Mitigations::worst),
    ) {
        (Some(ids), Some(features), Some(mitigations)) => (ids, features, mitigations),
        _ => panic::refuse(format_args!("no CPU came up")),
    }
}

/// Says what was found, to people and to programs.
fn introduce(
    machine: &Machine,
    memory: &memory::Memory,
    features: &Features,
    natures: &[cpus::Nature],
) {
    let id = arch::id_registers();
    let mut cpu = String::new();
    let named = match cpu_name(id.midr) {
        Some(name) => cpu.write_str(name),
        None => write!(cpu, "midr-{:#x}", id.midr),
    };
    let mut names = String::new();
    let listed = features
        .names()
        .try_for_each(|it| write!(names, "{}\"{it}\"", if names.is_empty() { "" } else { "," }));
    debug_assert!(named.is_ok() && listed.is_ok(), "strings grow");
    let cpus = percpu::all().len();
    let gic = if matches!(machine.gic, machine::Gic::V2 { .. }) {
        2
    } else {
        3
    };
    let mib = memory.bytes >> 20;
    log::info!(
        "Vellum {} on {}: {cpus} of {} CPUs ({cpu}), {mib} MiB, GICv{gic}",
        env!("CARGO_PKG_VERSION"),
        machine.board,
        machine.cpus.len()
    );
    introduce_nodes(machine);
    let at_exits = introduce_mitigations(machine, features, natures);
    console::line(format_args!(
        r#"{{"vellum":"machine","board":"{}","cpu":"{cpu}","cpus":{cpus},"memory_mib":{mib},"gic":{gic},"image_base":{},"at_exits":"{at_exits}","features":[{names}]}}"#,
        console::Escaped(&machine.board),
        arch::image_base()
    ));
}

/// Says what is in which NUMA node, where there are several.
fn introduce_nodes(machine: &Machine) {
    let ram = ram::divide(&machine.ram, &machine.memory_nodes);
    let of_cpus = machine.cpus.iter().filter_map(|it| it.node);
    let last = of_cpus.chain(ram.iter().filter_map(|it| it.1)).max();
    for node in (0..=last.unwrap_or(0)).filter(|_| last > Some(0)) {
        let here = machine.cpus.iter().filter(|it| it.node == Some(node));
        let near = ram.iter().filter(|it| it.1 == Some(node));
        let near: Vec<_> = near.map(|it| it.0.clone()).collect();
        log::info!(
            "NUMA node {node}: {} CPUs, {} MiB",
            here.count(),
            ram::bytes(&near) >> 20
        );
    }
}

/// Says what each CPU does against attacks on branch predictors, and returns what their exits do, in a word.
fn introduce_mitigations(
    machine: &Machine,
    features: &Features,
    natures: &[cpus::Nature],
) -> String {
    let setting = bench::mitigations(&machine.bootargs).name();
    let Some(first) = natures.first().map(|it| it.mitigations) else {
        return String::new();
    };
    if natures.iter().all(|it| it.mitigations == first) {
        log::info!(
            "mitigations={setting}: all CPUs: {first} (csv2={} csv3={} ssbs={})",
            features.csv2,
            features.csv3,
            features.ssbs
        );
        return first.at_exit.to_string();
    }
    for (cpu, nature) in natures.iter().enumerate() {
        log::info!("mitigations={setting}: CPU {cpu}: {}", nature.mitigations);
    }
    String::from("mixed")
}
