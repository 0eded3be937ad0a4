//! One device tree out of what UEFI leaves behind, so that the rest of boot knows one description only.
//!
//! Processors, interrupt controller, timers, console and firmware calls come from ACPI or from firmware's own tree;
//! RAM comes from the memory map alone, which also knows what firmware keeps; boot arguments and initial RAM disk from
//! whoever loaded the image. Pure: tested with tables of real machines on the host.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::ops::Range;

use vm_fdt::{Error, FdtWriter};

use super::acpi::Platform;
use super::machine::{self, Gic, Uart};
use super::psci::Conduit;
use super::tree::{Node, Tree};
use crate::addr::Pa;
use crate::mem::ram;

const GIC_PHANDLE: u32 = 1;
/// Kinds of interrupts in the GIC's binding.
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Where the machine is described.
#[derive(Clone, Copy, Debug)]
pub enum Description<'a, 't> {
    /// In firmware's device tree.
    Tree(&'a Tree<'t>),
    /// In ACPI tables.
    Acpi(&'a Platform),
}

/// What comes from elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Boot<'a> {
    /// RAM that firmware has given up.
    pub memory: &'a [Range<Pa>],
    /// Boot arguments.
    pub arguments: &'a str,
    /// The initial RAM disk.
    pub initrd: Option<Range<Pa>>,
}

/// Whether `tree` describes a machine: a boot loader's own may hold `/chosen` only, beside ACPI.
pub fn describes_a_machine(tree: &Tree<'_>) -> bool {
    tree.at("/cpus")
        .is_some_and(|it| it.children().next().is_some())
}

/// The tree.
///
/// # Errors
///
/// What the writer cannot write.
pub fn tree(description: Description<'_, '_>, boot: &Boot<'_>) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    match description {
        Description::Tree(tree) => of_tree(&mut fdt, tree, boot)?,
        Description::Acpi(platform) => of_platform(&mut fdt, platform, boot)?,
    }
    fdt.end_node(root)?;
    fdt.finish()
}

/// Copies firmware's tree but for memory and what the loader says.
fn of_tree(fdt: &mut FdtWriter, tree: &Tree<'_>, boot: &Boot<'_>) -> Result<(), Error> {
    let Some(root) = tree.nodes().next() else {
        return Ok(());
    };
    copy_properties(fdt, &root, &[]);
    let cells = |name, usual| root.u32(name).unwrap_or(usual);
    memory(
        fdt,
        &ram::divide(boot.memory, &machine::memory_nodes(tree)),
        [cells("#address-cells", 2), cells("#size-cells", 1)],
    )?;
    let is_chosen = |it: &Node<'_, '_>| it.name().is_some_and(|(name, _)| name == "chosen");
    for child in root.children() {
        let is_memory = child.string("device_type") == Some("memory");
        if !is_memory && !is_chosen(&child) {
            copy(fdt, &child)?;
        }
    }
    let node = fdt.begin_node("chosen")?;
    if let Some(chosen) = root.children().find(is_chosen) {
        copy_properties(
            fdt,
            &chosen,
            &["bootargs", "linux,initrd-start", "linux,initrd-end"],
        );
    }
    chosen(fdt, boot)?;
    fdt.end_node(node)
}

/// Copies `node` with all below it; one whose name cannot be written is left out.
fn copy(fdt: &mut FdtWriter, node: &Node<'_, '_>) -> Result<(), Error> {
    let Some((name, unit)) = node.name() else {
        return Ok(());
    };
    let name = unit.map_or_else(|| name.to_string(), |it| format!("{name}@{it}"));
    let Ok(copied) = fdt.begin_node(&name) else {
        return Ok(());
    };
    copy_properties(fdt, node, &[]);
    for child in node.children() {
        copy(fdt, &child)?;
    }
    fdt.end_node(copied)
}

/// Copies properties but `without`; one whose name cannot be written is left out.
fn copy_properties(fdt: &mut FdtWriter, node: &Node<'_, '_>, without: &[&str]) {
    for (name, value) in node.properties() {
        if !without.contains(&name) {
            // Nothing that is read has such a name.
            let (Ok(()) | Err(_)) = fdt.property(name, value);
        }
    }
}

fn of_platform(fdt: &mut FdtWriter, platform: &Platform, boot: &Boot<'_>) -> Result<(), Error> {
    fdt.property_string("compatible", &platform.name)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC_PHANDLE)?;
    let psci = fdt.begin_node("psci")?;
    fdt.property_string("compatible", "arm,psci-1.0")?;
    let method = match platform.psci {
        Conduit::Smc => "smc",
        Conduit::Hvc => "hvc",
    };
    fdt.property_string("method", method)?;
    fdt.end_node(psci)?;
    let ranges = ram::divide(boot.memory, &platform.memory_nodes);
    memory(fdt, &ranges, [2, 2])?;
    processors(fdt, platform)?;
    interrupt_controller(fdt, platform)?;
    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    let it = &platform.interrupts;
    // The secure one stands first; nobody here uses it.
    let timers = [
        it.physical_timer,
        it.physical_timer,
        it.virtual_timer,
        it.hypervisor_timer,
    ];
    let cells: Vec<u32> = timers.iter().flat_map(|&it| interrupt(it)).collect();
    fdt.property_array_u32("interrupts", &cells)?;
    fdt.end_node(timer)?;
    if let Some(uart) = &platform.console {
        console(fdt, uart)?;
    }
    let node = fdt.begin_node("chosen")?;
    if platform.console.is_some() {
        fdt.property_string("stdout-path", "/serial")?;
    }
    chosen(fdt, boot)?;
    fdt.end_node(node)
}

fn processors(fdt: &mut FdtWriter, platform: &Platform) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for found in &platform.cpus {
        let cpu = fdt.begin_node(&format!("cpu@{:x}", found.mpidr))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u64("reg", found.mpidr)?;
        if let Some(node) = found.node {
            fdt.property_u32(machine::NODE, node)?;
        }
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)
}

fn interrupt_controller(fdt: &mut FdtWriter, platform: &Platform) -> Result<(), Error> {
    /// Bytes of a GICv2's frames, and of a distributor with affinity routing.
    const FRAME: u64 = 0x1000;
    const DISTRIBUTOR: u64 = 0x1_0000;
    let gic = fdt.begin_node("interrupt-controller")?;
    let mut cells = Vec::new();
    match &platform.gic {
        Gic::V2 {
            distributor,
            cpu_interface,
            hypervisor_interface,
            virtual_interface,
        } => {
            fdt.property_string("compatible", "arm,gic-400")?;
            let frames = [
                distributor,
                cpu_interface,
                hypervisor_interface,
                virtual_interface,
            ];
            for (frame, pages) in frames.into_iter().zip([1, 2, 1, 2]) {
                cells.extend([frame.raw(), pages * FRAME]);
            }
        }
        Gic::V3 {
            distributor,
            redistributors,
        } => {
            fdt.property_string("compatible", "arm,gic-v3")?;
            let count =
                u32::try_from(redistributors.len()).map_err(|_| Error::TotalSizeTooLarge)?;
            fdt.property_u32("#redistributor-regions", count)?;
            cells.extend([distributor.raw(), DISTRIBUTOR]);
            for region in redistributors {
                cells.extend([
                    region.start.raw(),
                    region.end.offset_from(region.start).unwrap_or(0),
                ]);
            }
        }
    }
    fdt.property_array_u64("reg", &cells)?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_array_u32("interrupts", &interrupt(platform.interrupts.maintenance))?;
    fdt.property_phandle(GIC_PHANDLE)?;
    fdt.end_node(gic)
}

fn console(fdt: &mut FdtWriter, uart: &Uart) -> Result<(), Error> {
    let node = fdt.begin_node("serial")?;
    fdt.property_string("compatible", uart.kind.compatible())?;
    fdt.property_array_u64("reg", &[uart.base.raw(), 0x1000])?;
    if let Some(intid) = uart.intid {
        fdt.property_array_u32("interrupts", &interrupt(intid))?;
    }
    fdt.end_node(node)
}

/// An interrupt in the GIC's binding.
fn interrupt(intid: u32) -> [u32; 3] {
    match intid {
        32.. => [SHARED, intid - 32, LEVEL_HIGH],
        _ => [PRIVATE, intid.saturating_sub(16), LEVEL_HIGH],
    }
}

/// RAM in cells as the root counts them, in a tree's node for each NUMA node and one for what is in none.
fn memory(
    fdt: &mut FdtWriter,
    ranges: &[(Range<Pa>, Option<u32>)],
    cells: [u32; 2],
) -> Result<(), Error> {
    let mut nodes: Vec<_> = ranges.iter().map(|&(_, node)| node).collect();
    nodes.sort();
    nodes.dedup();
    for node in nodes {
        let inside = ranges.iter().filter(|&&(_, it)| it == node);
        let name = node.map_or_else(|| "memory".into(), |it| format!("memory-{it}"));
        let opened = fdt.begin_node(&name)?;
        fdt.property_string("device_type", "memory")?;
        fdt.property("reg", &rows(inside.map(|(range, _)| range), cells))?;
        if let Some(node) = node {
            fdt.property_u32(machine::NODE, node)?;
        }
        fdt.end_node(opened)?;
    }
    Ok(())
}

/// `reg` of RAM; what the cells cannot hold is left out.
fn rows<'a>(ranges: impl Iterator<Item = &'a Range<Pa>>, cells: [u32; 2]) -> Vec<u8> {
    /// What one cell can count, in whole pages.
    const PIECE: u64 = 1 << 31;
    let [of_address, of_size] = cells;
    let mut reg = Vec::new();
    for range in ranges {
        let mut at = range.start.raw();
        while at < range.end.raw() {
            let left = range.end.raw() - at;
            let bytes = if of_size == 1 { left.min(PIECE) } else { left };
            if let Some(row) = number(at, of_address).zip(number(bytes, of_size)) {
                reg.extend(row.0);
                reg.extend(row.1);
            }
            at += bytes;
        }
    }
    reg
}

fn number(value: u64, cells: u32) -> Option<Vec<u8>> {
    match cells {
        1 => Some(u32::try_from(value).ok()?.to_be_bytes().to_vec()),
        2 => Some(value.to_be_bytes().to_vec()),
        _ => None,
    }
}

fn chosen(fdt: &mut FdtWriter, boot: &Boot<'_>) -> Result<(), Error> {
    fdt.property_string("bootargs", boot.arguments)?;
    if let Some(initrd) = &boot.initrd {
        fdt.property_u64("linux,initrd-start", initrd.start.raw())?;
        fdt.property_u64("linux,initrd-end", initrd.end.raw())?;
    }
    Ok(())
}
