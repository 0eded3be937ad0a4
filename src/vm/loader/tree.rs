//! The device tree of a guest: what a kernel has to know of its machine, and nothing that it can find out by itself.
//!
//! Addresses are those of [`vm`](crate::vm::vm), which are QEMU's `virt` board's. References: Devicetree Specification v0.4;
//! Linux, `Documentation/devicetree/bindings` (psci, timer, interrupt controllers, pl011).

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use vm_fdt::{Error, FdtWriter};

use crate::addr::Ipa;
use crate::vm::vgic::distributor::{
    REDISTRIBUTOR_BYTES, V2_DISTRIBUTOR_BYTES, V3_DISTRIBUTOR_BYTES, vmpidr,
};
use crate::vm::vm::{GICC, GICC_BYTES, GICD, GICR, RAM, UART};
use crate::vm::vuart;

/// References from node to node.
const GIC_HANDLE: u32 = 1;
const CLOCK_HANDLE: u32 = 2;
/// The GIC's interrupt cells: kinds, and a level that is high while it asks.
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
const LEVEL: u32 = 4;
/// First INTID of either kind.
const FIRST_SHARED: u32 = 32;
/// The timers' PPIs, in the binding's order: secure, physical, virtual, EL2's.
const TIMERS: [u32; 4] = [13, 14, 11, 10];
/// A clock that the UART's divisors are computed from; its output goes nowhere at any speed.
const CLOCK_HZ: u32 = 24_000_000;
/// MPIDR_EL1's affinity fields below 32 bits.
const AFFINITY: u64 = 0xff_ffff;

/// What a tree says.
#[derive(Clone, Debug)]
pub struct Description<'a> {
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// 2 or 3.
    pub gic_version: u32,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Where the initial RAM disk is.
    pub initrd: Range<Ipa>,
}

/// Draws the tree.
///
/// # Errors
///
/// A string of `description` contains a zero.
pub fn draw(description: &Description<'_>) -> Result<Vec<u8>, Error> {
    let mut tree = FdtWriter::new()?;
    let root = tree.begin_node("")?;
    tree.property_string("model", "Vellum virtual machine")?;
    tree.property_string("compatible", "linux,dummy-virt")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    tree.property_u32("interrupt-parent", GIC_HANDLE)?;
    chosen(&mut tree, description)?;
    memory(&mut tree, description.ram_bytes)?;
    cpus(&mut tree, description.vcpus)?;
    firmware(&mut tree)?;
    interrupt_controller(&mut tree, description)?;
    timer(&mut tree, description)?;
    uart(&mut tree)?;
    tree.end_node(root)?;
    tree.finish()
}

fn chosen(tree: &mut FdtWriter, description: &Description<'_>) -> Result<(), Error> {
    let node = tree.begin_node("chosen")?;
    tree.property_string("bootargs", description.command_line)?;
    tree.property_string("stdout-path", &uart_path())?;
    tree.property_u64("linux,initrd-start", description.initrd.start.raw())?;
    tree.property_u64("linux,initrd-end", description.initrd.end.raw())?;
    tree.end_node(node)
}

fn memory(tree: &mut FdtWriter, bytes: u64) -> Result<(), Error> {
    let node = tree.begin_node(&format!("memory@{:x}", RAM.raw()))?;
    tree.property_string("device_type", "memory")?;
    tree.property_array_u64("reg", &[RAM.raw(), bytes])?;
    tree.end_node(node)
}

fn cpus(tree: &mut FdtWriter, count: usize) -> Result<(), Error> {
    let node = tree.begin_node("cpus")?;
    tree.property_u32("#address-cells", 1)?;
    tree.property_u32("#size-cells", 0)?;
    for index in 0..count {
        let affinity = u32::try_from(vmpidr(index) & AFFINITY).unwrap_or(0);
        let cpu = tree.begin_node(&format!("cpu@{affinity:x}"))?;
        tree.property_string("device_type", "cpu")?;
        tree.property_string("compatible", "arm,armv8")?;
        tree.property_u32("reg", affinity)?;
        tree.property_string("enable-method", "psci")?;
        tree.end_node(cpu)?;
    }
    tree.end_node(node)
}

fn firmware(tree: &mut FdtWriter) -> Result<(), Error> {
    let node = tree.begin_node("psci")?;
    let names = ["arm,psci-1.0", "arm,psci-0.2"].map(|name| name.to_string());
    tree.property_string_list("compatible", names.to_vec())?;
    tree.property_string("method", "hvc")?;
    tree.end_node(node)
}

fn interrupt_controller(tree: &mut FdtWriter, description: &Description<'_>) -> Result<(), Error> {
    let node = tree.begin_node(&format!("interrupt-controller@{:x}", GICD.raw()))?;
    let (name, registers) = if description.gic_version == 3 {
        let redistributors = REDISTRIBUTOR_BYTES * description.vcpus as u64;
        let frames = [GICD.raw(), V3_DISTRIBUTOR_BYTES, GICR.raw(), redistributors];
        ("arm,gic-v3", frames)
    } else {
        let frames = [GICD.raw(), V2_DISTRIBUTOR_BYTES, GICC.raw(), GICC_BYTES];
        ("arm,cortex-a15-gic", frames)
    };
    tree.property_string("compatible", name)?;
    tree.property_array_u64("reg", &registers)?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 3)?;
    tree.property_phandle(GIC_HANDLE)?;
    tree.end_node(node)
}

fn timer(tree: &mut FdtWriter, description: &Description<'_>) -> Result<(), Error> {
    // GICv2's cells name the CPUs that a private interrupt goes to: all of them.
    let targets = match description.gic_version {
        2 => (0..description.vcpus.min(8)).fold(0, |bits, cpu| bits | 1 << cpu),
        _ => 0,
    };
    let node = tree.begin_node("timer")?;
    tree.property_string("compatible", "arm,armv8-timer")?;
    let cells: Vec<u32> = TIMERS
        .into_iter()
        .flat_map(|timer| [PRIVATE, timer, targets << 8 | LEVEL])
        .collect();
    tree.property_array_u32("interrupts", &cells)?;
    // It goes on counting and interrupts whatever the vCPU's power state is.
    tree.property_null("always-on")?;
    tree.end_node(node)
}

fn uart(tree: &mut FdtWriter) -> Result<(), Error> {
    let clock = tree.begin_node("clock")?;
    tree.property_string("compatible", "fixed-clock")?;
    tree.property_u32("#clock-cells", 0)?;
    tree.property_u32("clock-frequency", CLOCK_HZ)?;
    tree.property_phandle(CLOCK_HANDLE)?;
    tree.end_node(clock)?;
    let path = uart_path();
    let node = tree.begin_node(path.trim_start_matches('/'))?;
    let names = ["arm,pl011", "arm,primecell"].map(|name| name.to_string());
    tree.property_string_list("compatible", names.to_vec())?;
    tree.property_array_u64("reg", &[UART.raw(), vuart::BYTES])?;
    let interrupt = u32::from(vuart::INTID) - FIRST_SHARED;
    tree.property_array_u32("interrupts", &[SHARED, interrupt, LEVEL])?;
    tree.property_array_u32("clocks", &[CLOCK_HANDLE; 2])?;
    let names = ["uartclk", "apb_pclk"].map(|name| name.to_string());
    tree.property_string_list("clock-names", names.to_vec())?;
    tree.end_node(node)
}

fn uart_path() -> String {
    format!("/pl011@{:x}", UART.raw())
}

#[cfg(test)]
mod tests {
    use super::{Description, draw};
    use crate::addr::{Ipa, Pa};
    use crate::dev::machine::{Error, Gic, Machine, UartKind, consoles};
    use crate::dev::psci::Conduit;
    use crate::dev::tree::Tree;

    fn description(gic_version: u32, vcpus: usize) -> Description<'static> {
        Description {
            vcpus,
            ram_bytes: 256 << 20,
            gic_version,
            command_line: "quiet vellum.test=1",
            initrd: Ipa::new(0x4400_0000)..Ipa::new(0x4410_0001),
        }
    }

    /// With a GICv3 the hypervisor would boot on it; a GICv2 without virtualization it refuses.
    #[test]
    fn a_tree_describes_a_whole_machine() {
        for vcpus in [1, 17, 123] {
            let bytes = draw(&description(3, vcpus)).unwrap();
            assert!(bytes.len() < 64 << 10);
            let tree = Tree::new(&bytes).unwrap();
            let machine = Machine::new(&tree).unwrap();
            assert_eq!(machine.cpus.len(), vcpus);
            assert!(machine.cpus.iter().all(|cpu| cpu.psci));
            assert_eq!(machine.psci, Some(Conduit::Hvc));
            assert_eq!(machine.ram, [Pa::new(0x4000_0000)..Pa::new(0x5000_0000)]);
            assert_eq!(machine.bootargs, "quiet vellum.test=1");
            assert_eq!(machine.interrupts.virtual_timer, 27);
            assert_eq!(machine.interrupts.physical_timer, 30);
            assert!(matches!(machine.gic, Gic::V3 { .. }));
            let uart = consoles(&tree).next().unwrap();
            assert_eq!((uart.base, uart.intid), (Pa::new(0x900_0000), Some(33)));
            assert_eq!(uart.kind, UartKind::Pl011);
        }
    }

    #[test]
    fn a_gicv2_has_one_cpu_interface_and_no_virtualization() {
        let bytes = draw(&description(2, 4)).unwrap();
        let tree = Tree::new(&bytes).unwrap();
        let gic = tree.compatible(&["arm,cortex-a15-gic"]).unwrap();
        let frames = [(0x800_0000, 0x1000), (0x801_0000, 0x2000)];
        assert_eq!(
            gic.regions(),
            frames.map(|(at, bytes)| (Pa::new(at), bytes))
        );
        assert_eq!(Machine::new(&tree).unwrap_err(), Error::NoGic);
        let timer = tree.compatible(&["arm,armv8-timer"]).unwrap();
        assert_eq!(timer.interrupts(), [29, 30, 27, 26]);
        assert_eq!(timer.property("interrupts").unwrap()[8..12], [0, 0, 0xf, 4]);
    }

    #[test]
    fn the_ram_disk_is_told_to_the_byte() {
        let bytes = draw(&description(3, 1)).unwrap();
        let tree = Tree::new(&bytes).unwrap();
        let chosen = tree.at("/chosen").unwrap();
        assert_eq!(chosen.address("linux,initrd-start"), Some(0x4400_0000));
        assert_eq!(chosen.address("linux,initrd-end"), Some(0x4410_0001));
        assert_eq!(chosen.string("stdout-path"), Some("/pl011@9000000"));
    }
}
