//! The machine that QEMU is asked to be, and how time passes in it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::board::{Board, Media};
use crate::clock;

/// What a nanosecond of the run means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Timing {
    /// Virtual nanoseconds are executed instructions, the CPUs take turns: repeatable path lengths.
    Insn,
    /// CPUs are host threads and time is the host's: real concurrency, noisy.
    Wall,
    /// Virtual nanoseconds are executed instructions, and all CPUs advance together: a plugin gives each its turn.
    Parallel,
}

impl Timing {
    /// In the order of tables.
    pub(crate) const ALL: [Self; 3] = [Self::Insn, Self::Parallel, Self::Wall];

    /// The name on command lines and in rows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Insn => "insn",
            Self::Wall => "wall",
            Self::Parallel => "parallel",
        }
    }
}

impl FromStr for Timing {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|timing| timing.name() == name)
            .ok_or_else(|| "known timings: insn, parallel, wall".to_owned())
    }
}

/// Which of QEMU's boards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Model {
    /// The generic one.
    Virt,
    /// A Raspberry Pi 4: four cortex-a72, GICv2, 2 GiB, spin table, no PSCI.
    Raspi4b,
}

/// What starts the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Firmware {
    /// QEMU itself, as a boot loader for Linux.
    None,
    /// UEFI, from a disk, describing the machine by ACPI tables.
    UefiAcpi,
    /// UEFI, from a disk, describing the machine by a device tree.
    UefiTree,
    /// GRUB, which UEFI loads from a disk and which hands the image back to UEFI; ACPI tables.
    Grub,
    /// On a Raspberry Pi 4: a program that behaves like its own stub.
    PiStub,
    /// On a Raspberry Pi 4: Trusted Firmware, which offers PSCI.
    PiTrusted,
}

impl FromStr for Firmware {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "none" => Ok(Self::None),
            "uefi-acpi" => Ok(Self::UefiAcpi),
            "uefi-tree" => Ok(Self::UefiTree),
            "grub" => Ok(Self::Grub),
            "pi-stub" => Ok(Self::PiStub),
            "pi-tfa" => Ok(Self::PiTrusted),
            _ => {
                Err("known firmware: none, uefi-acpi, uefi-tree, grub, pi-stub, pi-tfa".to_owned())
            }
        }
    }
}

/// One machine.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) model: Model,
    pub(crate) cpu: String,
    pub(crate) gic: u32,
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) timing: Timing,
    /// Under `parallel`: how far clocks may be apart.
    pub(crate) clock: clock::Settings,
    /// Without it QEMU enters the image at EL1.
    pub(crate) virtualization: bool,
    /// A device tree instead of QEMU's own.
    pub(crate) dtb: Option<PathBuf>,
    pub(crate) firmware: Firmware,
    /// RAM and CPUs in two NUMA nodes, half of both in each.
    pub(crate) numa: bool,
    /// The console is the second UART: on a Raspberry Pi 4, the mini-UART.
    pub(crate) second_uart: bool,
}

impl Machine {
    /// The board's own defaults.
    pub(crate) fn of(board: &Board) -> Self {
        Self {
            model: match board.name.as_str() {
                "rpi4" => Model::Raspi4b,
                _ => Model::Virt,
            },
            cpu: board.machine.cpu.clone(),
            gic: board.machine.gic_version,
            cpus: board.machine.cpus,
            memory_mib: board.machine.memory_mib,
            timing: Timing::Wall,
            clock: clock::Settings::default(),
            virtualization: true,
            dtb: None,
            firmware: match board.boot.media {
                Media::Esp => Firmware::UefiAcpi,
                Media::Image | Media::Sd => Firmware::None,
            },
            numa: false,
            second_uart: false,
        }
    }

    /// The part of QEMU's command line that describes the machine.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        if self.model == Model::Raspi4b {
            return self.raspberry();
        }
        let switch = if self.virtualization { "on" } else { "off" };
        let mut words: Vec<OsString> = Vec::new();
        let mut option = |name: &str, value: String| words.extend([name.into(), value.into()]);
        let acpi = match self.firmware {
            Firmware::UefiTree => ",acpi=off",
            _ => "",
        };
        option(
            "-M",
            format!(
                "virt,virtualization={switch},gic-version={}{acpi}",
                self.gic
            ),
        );
        // One counter tick is one nanosecond on every model, as it is on `max`; under `insn`, one instruction.
        option("-cpu", format!("{},cntfrq=1000000000", self.cpu));
        option("-smp", self.cpus.to_string());
        option("-m", format!("{}M", self.memory_mib));
        if self.numa {
            let (half, last) = (self.cpus / 2, self.cpus.saturating_sub(1));
            for (node, cpus) in [
                format!("0-{}", half.saturating_sub(1)),
                format!("{half}-{last}"),
            ]
            .into_iter()
            .enumerate()
            {
                let size = self.memory_mib / 2;
                option(
                    "-object",
                    format!("memory-backend-ram,id=ram{node},size={size}M"),
                );
                option("-numa", format!("node,cpus={cpus},memdev=ram{node}"));
            }
        }
        match self.timing {
            Timing::Insn => option("-icount", "shift=0,sleep=off".into()),
            Timing::Wall | Timing::Parallel => option("-accel", "tcg,thread=multi".into()),
        }
        if let Some(dtb) = &self.dtb {
            words.extend(["-dtb".into(), dtb.into()]);
        }
        words
    }

    /// The board is as it is; only time can be chosen.
    fn raspberry(&self) -> Vec<OsString> {
        let mut words = vec!["-M", "raspi4b", "-smp", "4", "-m", "2G"];
        match self.timing {
            Timing::Insn => words.extend(["-icount", "shift=0,sleep=off"]),
            Timing::Wall | Timing::Parallel => words.extend(["-accel", "tcg,thread=multi"]),
        }
        words.into_iter().map(OsString::from).collect()
    }

    /// The command line that makes QEMU write its device tree for this machine to `path` and end.
    pub(crate) fn dump_device_tree(&self, path: &Path) -> Vec<OsString> {
        let mut words = self.arguments();
        let mut dump = OsString::from("dumpdtb=");
        dump.push(path);
        words.extend([
            "-M".into(),
            dump,
            "-display".into(),
            "none".into(),
            "-nodefaults".into(),
        ]);
        words
    }
}

#[cfg(test)]
mod tests {
    use super::{Firmware, Machine, Timing};
    use crate::board::Board;

    fn line(change: impl Fn(&mut Machine)) -> String {
        let mut machine = Machine::of(&Board::qemu_virt().expect("the board file is read"));
        change(&mut machine);
        let words = machine.arguments();
        words
            .iter()
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn timing_chooses_how_cpus_run() {
        assert!(
            line(|machine| machine.timing = Timing::Insn).contains("-icount shift=0,sleep=off")
        );
        assert!(line(|machine| machine.timing = Timing::Wall).contains("thread=multi"));
    }

    #[test]
    fn el2_can_be_taken_away() {
        assert!(line(|_| ()).contains("virtualization=on"));
        assert!(line(|machine| machine.virtualization = false).contains("virtualization=off"));
    }

    #[test]
    fn numa_nodes_share_cpus_and_ram_evenly() {
        let line = line(|machine| {
            (machine.numa, machine.cpus, machine.memory_mib) = (true, 16, 512);
        });
        assert!(line.contains("node,cpus=0-7,memdev=ram0"), "{line}");
        assert!(line.contains("node,cpus=8-15,memdev=ram1"), "{line}");
        assert!(line.contains("id=ram1,size=256M"), "{line}");
    }

    #[test]
    fn a_device_tree_is_what_uefi_gives_without_acpi() {
        assert!(line(|machine| machine.firmware = Firmware::UefiTree).contains("acpi=off"));
        assert!(!line(|machine| machine.firmware = Firmware::UefiAcpi).contains("acpi=off"));
    }

    #[test]
    fn timing_names_parse_back() {
        for timing in Timing::ALL {
            assert_eq!(timing.name().parse(), Ok(timing));
        }
        assert!("sundial".parse::<Timing>().is_err());
    }
}
