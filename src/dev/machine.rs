//! What the machine consists of, as its device tree tells.
//!
//! A [`Machine`] is plain data: nothing here touches a device. What is missing or not supported comes back as an
//! [`Error`] whose text tells the user what to do.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use super::psci::Conduit;
use super::tree::{Node, Tree};
use crate::addr::{Pa, to_usize};
use crate::mem::nodes::MOST_NODES;
use crate::mem::ram;

/// Most CPUs of one machine.
pub const MOST_CPUS: usize = 512;
/// Most CPUs that a GICv2 can name.
pub const MOST_CPUS_GICV2: usize = 8;
/// RAM below this cannot hold hypervisor, controller and one guest.
pub const LEAST_RAM_BYTES: u64 = 128 << 20;

/// Name of the emulated machine.
pub const QEMU_VIRT: &str = "qemu-virt";

/// The property that names a NUMA node.
pub(super) const NODE: &str = "numa-node-id";

/// Affinity fields of MPIDR_EL1.
pub(super) const AFFINITY: u64 = 0xff_00ff_ffff;

/// One CPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CpuInfo {
    /// Affinity, as in MPIDR_EL1.
    pub mpidr: u64,
    /// Whether PSCI starts it.
    pub psci: bool,
    /// Where it looks for its entry point, when firmware has parked it on a spin table.
    pub spin_table: Option<Pa>,
    /// The NUMA node it is in, when the tree says that; see [`Machine::memory_nodes`].
    pub node: Option<usize>,
}

/// The console.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Uart {
    /// Its registers.
    pub base: Pa,
    /// Its interrupt, when it has one.
    pub intid: Option<u32>,
    /// How it is driven.
    pub kind: UartKind,
}

/// Kinds of UARTs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum UartKind {
    /// A PL011.
    Pl011,
    /// The part of it that SBSA asks for.
    Sbsa,
    /// The second UART of a BCM2711, usable if firmware has turned it on.
    Mini,
}

impl UartKind {
    /// In the order in which they are tried when nothing is chosen.
    const ALL: [Self; 3] = [Self::Pl011, Self::Sbsa, Self::Mini];

    /// What device trees call it.
    pub const fn compatible(self) -> &'static str {
        match self {
            Self::Pl011 => "arm,pl011",
            Self::Sbsa => "arm,sbsa-uart",
            Self::Mini => "brcm,bcm2835-aux-uart",
        }
    }
}

/// The interrupt controller.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Gic {
    /// GICv2 with virtualization.
    V2 {
        /// GICD.
        distributor: Pa,
        /// GICC, banked per CPU.
        cpu_interface: Pa,
        /// GICH, banked per CPU.
        hypervisor_interface: Pa,
        /// GICV, banked per CPU, for guests.
        virtual_interface: Pa,
    },
    /// GICv3 or later.
    V3 {
        /// GICD.
        distributor: Pa,
        /// Regions of redistributor frames.
        redistributors: Vec<Range<Pa>>,
    },
}

/// Private interrupts this hypervisor uses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Interrupts {
    /// The GIC's maintenance interrupt.
    pub maintenance: u32,
    /// CNTV, a guest's timer.
    pub virtual_timer: u32,
    /// CNTHP, ours.
    pub hypervisor_timer: u32,
    /// CNTP.
    pub physical_timer: u32,
}

/// Everything the device tree told.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Name of the board.
    pub board: String,
    /// CPUs, in the tree's order.
    pub cpus: Vec<CpuInfo>,
    /// All of RAM, sorted.
    pub ram: Vec<Range<Pa>>,
    /// RAM and the NUMA node it is in, as far as the tree says. Nodes are numbered from 0 without gaps, in the order of the
    /// tree's own numbers; all that are more than [`MOST_NODES`] count as the last.
    pub memory_nodes: Vec<(Range<Pa>, usize)>,
    /// RAM that firmware keeps, and the initial RAM disk.
    pub reserved: Vec<Range<Pa>>,
    /// How firmware is called, when PSCI exists.
    pub psci: Option<Conduit>,
    /// The interrupt controller.
    pub gic: Gic,
    /// Private interrupts.
    pub interrupts: Interrupts,
    /// `/chosen/bootargs`.
    pub bootargs: String,
    /// The initial RAM disk, to the byte.
    pub initrd: Option<Range<Pa>>,
    /// The console: the first that can be, until boot knows which one is.
    pub console: Option<Uart>,
    /// The power manager of a machine without PSCI.
    pub power: Option<Pa>,
}

/// Why a machine cannot be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Error {
    /// No RAM in the tree.
    NoMemory,
    /// Less RAM than needed.
    LittleMemory(u64),
    /// No CPU in the tree.
    NoCpus,
    /// More CPUs than the interrupt controller or this hypervisor supports.
    ManyCpus(usize, usize),
    /// No interrupt controller with virtualization.
    NoGic,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory => write!(f, "the device tree names no RAM"),
            Self::LittleMemory(bytes) => {
                write!(
                    f,
                    "{} MiB of RAM are too little: give the machine {} MiB or more",
                    bytes >> 20,
                    LEAST_RAM_BYTES >> 20
                )
            }
            Self::NoCpus => write!(f, "the device tree names no CPU"),
            Self::ManyCpus(found, most) => {
                write!(f, "{found} CPUs are too many: this machine may have {most}")
            }
            Self::NoGic => write!(
                f,
                "no usable interrupt controller: a GICv3, or a GICv2 with virtualization, is needed (QEMU: -machine virt,gic-version=3)"
            ),
        }
    }
}

/// Usable consoles: the one that the tree chooses, then the first of each kind. Found separately, so that everything else
/// can be complained about.
pub fn consoles(tree: &Tree<'_>) -> impl Iterator<Item = Uart> {
    let chosen = tree
        .at("/chosen")
        .and_then(|it| it.string("stdout-path"))
        .and_then(|it| {
            let path = it.split(':').next()?;
            if path.starts_with('/') {
                tree.at(path)
            } else {
                tree.at(tree.at("/aliases")?.string(path)?)
            }
        });
    let others = UartKind::ALL
        .into_iter()
        .filter_map(|kind| tree.compatible(&[kind.compatible()]));
    chosen.into_iter().chain(others).filter_map(|node| {
        let known = |kind: &UartKind| node.is_compatible(&[kind.compatible()]);
        let kind = UartKind::ALL.into_iter().find(known)?;
        let &(base, _) = node.regions().first()?;
        let intid = node.interrupts().first().copied();
        Some(Uart { base, intid, kind })
    })
}

/// How firmware is called, when it offers PSCI 0.2 or later.
pub fn conduit(tree: &Tree<'_>) -> Option<Conduit> {
    let node = tree.compatible(&["arm,psci-1.0", "arm,psci-0.2"])?;
    match node.string("method")? {
        "smc" => Some(Conduit::Smc),
        "hvc" => Some(Conduit::Hvc),
        _ => None,
    }
}

/// The power manager that is known how to be used where there is no PSCI.
pub fn power_manager(tree: &Tree<'_>) -> Option<Pa> {
    let node = tree.compatible(&["brcm,bcm2711-pm", "brcm,bcm2835-pm"])?;
    Some(node.regions().first()?.0)
}

impl Machine {
    /// Reads everything from `tree`.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn new(tree: &Tree<'_>) -> Result<Self, Error> {
        let ram = memory(tree);
        match ram::bytes(&ram) {
            0 => return Err(Error::NoMemory),
            bytes @ 1..LEAST_RAM_BYTES => return Err(Error::LittleMemory(bytes)),
            _ => {}
        }
        let (gic, maintenance) = interrupt_controller(tree).ok_or(Error::NoGic)?;
        let most = if matches!(gic, Gic::V2 { .. }) {
            MOST_CPUS_GICV2
        } else {
            MOST_CPUS
        };
        let mut cpus = processors(tree);
        let memory_nodes = number_nodes(&mut cpus, memory_nodes(tree));
        match cpus.len() {
            0 => return Err(Error::NoCpus),
            found if found > most => return Err(Error::ManyCpus(found, most)),
            _ => {}
        }
        let initrd = initrd(tree);
        let mut reserved = reserved(tree);
        reserved.extend(initrd.clone().and_then(ram::covering_pages));
        let chosen = tree.at("/chosen");
        Ok(Self {
            board: board(tree),
            cpus,
            ram,
            memory_nodes,
            reserved,
            psci: conduit(tree),
            gic,
            interrupts: interrupts(tree, maintenance),
            bootargs: chosen
                .and_then(|it| it.string("bootargs"))
                .unwrap_or_default()
                .into(),
            initrd,
            console: consoles(tree).next(),
            power: power_manager(tree),
        })
    }
}

/// The name results are filed under: the project's for boards it knows, else the tree's own.
fn board(tree: &Tree<'_>) -> String {
    let compatible = tree
        .at("/")
        .and_then(|it| it.string("compatible"))
        .unwrap_or("unknown");
    let known = [
        ("linux,dummy-virt", QEMU_VIRT),
        ("bochs,bxpc", QEMU_VIRT),
        ("raspberrypi,4-model-b", "rpi4"),
        ("ampere,altra", "ampere-altra"),
    ];
    known
        .into_iter()
        .find(|&(name, _)| name == compatible)
        .map_or(compatible, |(_, board)| board)
        .into()
}

fn memory(tree: &Tree<'_>) -> Vec<Range<Pa>> {
    let mut ram: Vec<_> = banks(tree).map(|(range, _)| range).collect();
    ram::sort(&mut ram);
    ram
}

/// RAM of which the tree says in which NUMA node it is, by the tree's own numbers.
pub(super) fn memory_nodes(tree: &Tree<'_>) -> Vec<(Range<Pa>, u32)> {
    banks(tree)
        .filter_map(|(range, node)| Some((range, node?)))
        .collect()
}

/// Every piece of RAM, and its NUMA node.
fn banks(tree: &Tree<'_>) -> impl Iterator<Item = (Range<Pa>, Option<u32>)> {
    let nodes = tree
        .nodes()
        .filter(|it| it.string("device_type") == Some("memory") && it.is_available());
    nodes.flat_map(|node| {
        let number = node.u32(NODE);
        let ranges = node.regions().into_iter();
        ranges.filter_map(move |(start, bytes)| Some((ram::whole_pages(start, bytes)?, number)))
    })
}

/// NUMA nodes by position instead of the tree's own numbers, of which `cpus` have theirs so far.
fn number_nodes(cpus: &mut [CpuInfo], memory: Vec<(Range<Pa>, u32)>) -> Vec<(Range<Pa>, usize)> {
    let of_memory = memory.iter().map(|&(_, node)| to_usize(node.into()));
    let of_cpus = cpus.iter().filter_map(|it| it.node);
    let mut all: Vec<_> = of_cpus.chain(of_memory).collect();
    all.sort();
    all.dedup();
    let position = |node| {
        let found = all.iter().position(|&it| it == node);
        found.map(|it| it.min(MOST_NODES - 1))
    };
    for cpu in cpus {
        cpu.node = cpu.node.and_then(position);
    }
    let numbered = |(range, node): (_, u32)| Some((range, position(to_usize(node.into()))?));
    memory.into_iter().filter_map(numbered).collect()
}

/// The reservation block and `/reserved-memory`, rounded outwards to pages.
fn reserved(tree: &Tree<'_>) -> Vec<Range<Pa>> {
    let listed = tree.reservations().iter().cloned();
    let nodes = tree
        .at("/reserved-memory")
        .into_iter()
        .flat_map(|it| it.children());
    let of_nodes = nodes
        .flat_map(|it| it.regions())
        .filter_map(|(start, bytes)| Some(start..start.checked_add(bytes)?));
    listed
        .chain(of_nodes)
        .filter_map(ram::covering_pages)
        .collect()
}

fn processors(tree: &Tree<'_>) -> Vec<CpuInfo> {
    let nodes = tree.at("/cpus").into_iter().flat_map(|it| it.children());
    nodes
        .filter(|it| it.string("device_type") == Some("cpu") && it.string("status") != Some("fail"))
        .filter_map(|it| {
            // A CPU's `reg` has no size, so it is an address on a bus that nobody translates.
            let mpidr = it.address("reg")? & AFFINITY;
            let method = it.string("enable-method");
            let spins = method == Some("spin-table");
            Some(CpuInfo {
                mpidr,
                psci: method == Some("psci"),
                spin_table: spins
                    .then(|| it.address("cpu-release-addr"))
                    .flatten()
                    .map(Pa::new),
                node: it.u32(NODE).map(|it| to_usize(it.into())),
            })
        })
        .collect()
}

/// The GIC and its maintenance interrupt, PPI 9 where an old tree leaves it out.
fn interrupt_controller(tree: &Tree<'_>) -> Option<(Gic, u32)> {
    const DEFAULT_MAINTENANCE: u32 = 25;
    const V2: [&str; 3] = ["arm,gic-400", "arm,cortex-a15-gic", "arm,cortex-a7-gic"];
    let maintenance = |node: &Node<'_, '_>| {
        node.interrupts()
            .first()
            .copied()
            .unwrap_or(DEFAULT_MAINTENANCE)
    };
    if let Some(node) = tree.compatible(&["arm,gic-v3"]) {
        let count = node.u32("#redistributor-regions").unwrap_or(1);
        let regions = node.regions();
        let (&(distributor, _), rest) = regions.split_first()?;
        let redistributors: Vec<_> = rest
            .iter()
            .take(usize::try_from(count).ok()?)
            .filter_map(|&(start, bytes)| Some(start..start.checked_add(bytes)?))
            .collect();
        (!redistributors.is_empty()).then_some(())?;
        return Some((
            Gic::V3 {
                distributor,
                redistributors,
            },
            maintenance(&node),
        ));
    }
    let node = tree.compatible(&V2)?;
    let &[
        (distributor, _),
        (cpu_interface, _),
        (hypervisor_interface, _),
        (virtual_interface, _),
        ..,
    ] = node.regions().as_slice()
    else {
        return None;
    };
    Some((
        Gic::V2 {
            distributor,
            cpu_interface,
            hypervisor_interface,
            virtual_interface,
        },
        maintenance(&node),
    ))
}

/// The timers' private interrupts, in the binding's order; the architecture's usual ones where the tree is silent.
fn interrupts(tree: &Tree<'_>, maintenance: u32) -> Interrupts {
    let listed = tree
        .compatible(&["arm,armv8-timer"])
        .map(|it| it.interrupts())
        .unwrap_or_default();
    let timer = |position: usize, usual| {
        listed
            .get(position)
            .copied()
            .filter(|it| (16..32).contains(it))
            .unwrap_or(usual)
    };
    Interrupts {
        maintenance,
        physical_timer: timer(1, 30),
        virtual_timer: timer(2, 27),
        hypervisor_timer: timer(3, 26),
    }
}

/// The initial RAM disk that a boot loader put into `tree`.
pub fn initrd(tree: &Tree<'_>) -> Option<Range<Pa>> {
    let chosen = tree.at("/chosen")?;
    let (start, end) = (
        chosen.address("linux,initrd-start")?,
        chosen.address("linux,initrd-end")?,
    );
    (start < end).then_some(Pa::new(start)..Pa::new(end))
}
