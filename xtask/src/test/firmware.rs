//! Cases of the ways into the image: the same file, started by UEFI.

use super::cases::{Case, Expect, Table};
use super::checks;
use crate::machine::Firmware;

impl Table<'_> {
    /// UEFI loads the image from a disk and describes the machine, once in each of its languages.
    pub(super) fn firmware(&self) -> Vec<Case> {
        let machines = [
            (
                "UEFI with ACPI tables, max GICv3",
                ("max", 3, 4, false),
                Firmware::UefiAcpi,
            ),
            (
                "UEFI with a device tree, cortex-a72 GICv2",
                ("cortex-a72", 2, 4, false),
                Firmware::UefiTree,
            ),
            (
                "UEFI with ACPI tables, 16 neoverse-n1 in two NUMA nodes",
                ("neoverse-n1", 3, 16, true),
                Firmware::UefiAcpi,
            ),
        ];
        machines
            .map(|(name, (cpu, gic, cpus, numa), firmware)| {
                let machine = self.machine(|machine| {
                    (machine.cpu, machine.gic, machine.cpus) = (cpu.into(), gic, cpus);
                    (machine.numa, machine.firmware) = (numa, firmware);
                });
                self.case(
                    name,
                    machine,
                    "suite=selftest vcpus=1,3",
                    Expect::Good(checks::guest_is_content),
                )
            })
            .into()
    }
}
