//! Cases of the ways into the image: the same file, started by UEFI, and on another board.

use super::cases::{Case, Expect, Table};
use super::checks;
use crate::board::Board;
use crate::machine::{Firmware, Machine};

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
        let mut cases: Vec<Case> = machines
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
            .into();
        cases.extend(self.raspberry());
        cases
    }

    /// A Raspberry Pi 4, started by QEMU, by a program that behaves like the Pi's stub (CPUs on a spin table, SMC undefined,
    /// 54 MHz, interrupts in group 1), and by Trusted Firmware, which offers PSCI.
    fn raspberry(&self) -> Vec<Case> {
        let Ok(board) = Board::load("rpi4") else {
            return Vec::new();
        };
        [
            ("Raspberry Pi 4, started by QEMU", Firmware::None),
            (
                "Raspberry Pi 4, started by a stub like its own",
                Firmware::PiStub,
            ),
            (
                "Raspberry Pi 4, started by Trusted Firmware",
                Firmware::PiTrusted,
            ),
        ]
        .map(|(name, firmware)| {
            let mut machine = Machine::of(&board);
            machine.firmware = firmware;
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
