//! Every way into the image: whatever starts the same file, its guest finds a machine, and the benchmarks `dirty`, `split` and
//! `exit` measure in a quick form.

use super::cases::{Case, Expect, Table};
use super::checks::{self, Verdict};
use crate::board::Board;
use crate::machine::{Firmware, Machine};
use crate::uart::Transcript;

/// What each way in runs, in one boot.
const SUITES: [&str; 4] = ["selftest", "dirty", "split", "exit"];
const QUICK: &str = "vcpus=1,3 mib=2 iterations=1 runs=64";
/// Values of a row that must be 0 where there are such.
const ZERO: [&str; 5] = [
    "failed_mask",
    "pages_lost",
    "lost",
    "cpus_stuck",
    "ticks_wrong",
];

/// CPU model, GIC version, number of CPUs, and whether they are in two NUMA nodes.
type Shape = (&'static str, u32, u32, bool);
const VIRT: [(&str, Firmware, Shape); 6] = [
    (
        "virt with GICv2",
        Firmware::None,
        ("cortex-a72", 2, 4, false),
    ),
    ("virt with GICv3", Firmware::None, ("max", 3, 4, false)),
    (
        "UEFI with ACPI tables",
        Firmware::UefiAcpi,
        ("neoverse-n1", 3, 4, false),
    ),
    (
        "UEFI with a device tree",
        Firmware::UefiTree,
        ("cortex-a72", 2, 4, false),
    ),
    (
        "GRUB's chainloader",
        Firmware::Grub,
        ("neoverse-n1", 3, 4, false),
    ),
    (
        "UEFI with ACPI tables and 16 CPUs in two NUMA nodes",
        Firmware::UefiAcpi,
        ("neoverse-n1", 3, 16, true),
    ),
];
const PI: [(&str, Firmware); 3] = [
    ("a Raspberry Pi 4", Firmware::None),
    ("a stub like the Raspberry Pi's", Firmware::PiStub),
    ("Trusted Firmware on a Raspberry Pi 4", Firmware::PiTrusted),
];

impl Table<'_> {
    /// One case for each way in.
    pub(super) fn ways(&self) -> Vec<Case> {
        let mut ways: Vec<(&str, Machine)> = VIRT
            .map(|(name, firmware, (cpu, gic, cpus, numa))| {
                let machine = self.machine(|machine| {
                    (machine.cpu, machine.gic, machine.cpus) = (cpu.into(), gic, cpus);
                    (machine.numa, machine.firmware) = (numa, firmware);
                });
                (name, machine)
            })
            .into();
        if let Ok(board) = Board::load("rpi4") {
            ways.extend(PI.map(|(name, firmware)| {
                let mut machine = Machine::of(&board);
                machine.firmware = firmware;
                (name, machine)
            }));
        }
        let mut cases: Vec<Case> = ways.into_iter().map(|way| self.way(way)).collect();
        cases.extend(self.mini_uart());
        cases
    }

    /// A Raspberry Pi 4 whose device tree has the mini-UART as console.
    fn mini_uart(&self) -> Option<Case> {
        let mut machine = Machine::of(&Board::load("rpi4").ok()?);
        machine.second_uart = true;
        let name = "a Raspberry Pi 4 speaks through its mini-UART";
        let expect = Expect::Good(checks::guest_is_content);
        Some(self.case(name, machine, "suite=selftest vcpus=3", expect))
    }

    fn way(&self, (name, machine): (&str, Machine)) -> Case {
        let words = format!("suite={} {QUICK}", SUITES.join(","));
        let expect = Expect::Good(match machine.numa {
            true => everything_is_measured_and_near,
            false => everything_is_measured,
        });
        Case {
            hashed: true,
            ..self.case(
                format!("one image, by way of {name}"),
                machine,
                words,
                expect,
            )
        }
    }
}

fn everything_is_measured(runs: &[Transcript]) -> Verdict {
    measured(&SUITES, runs)
}

/// Each of these suites measured, the guest is content, and nothing was lost.
pub(super) fn measured(suites: &[&str], runs: &[Transcript]) -> Verdict {
    for run in runs {
        let silent = |suite: &&&str| run.rows.iter().all(|row| row.suite != **suite);
        if let Some(suite) = suites.iter().find(silent) {
            return Err(format!("suite {suite} did not measure"));
        }
        for (row, key) in run.rows.iter().flat_map(|row| ZERO.map(|key| (row, key))) {
            let found = row.values.get(key).and_then(serde_json::Value::as_f64);
            if found.is_some_and(|found| found != 0.0) {
                return Err(format!("{} {}: {key} is not 0", row.suite, row.case));
            }
        }
    }
    Ok(())
}

/// As [`everything_is_measured`]; and memory came from each of the two nodes, to the VM whose CPU is there.
fn everything_is_measured_and_near(runs: &[Transcript]) -> Verdict {
    everything_is_measured(runs)?;
    for run in runs {
        let nodes = run.rows.iter().find(|row| row.case == "nodes");
        let checks = nodes.and_then(|row| row.values.get("checks")?.as_u64());
        if checks != Some(2) {
            return Err(format!("checks of two nodes: {checks:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{SUITES, ZERO, everything_is_measured, everything_is_measured_and_near};
    use crate::uart::{Transcript, parse};

    fn run(suites: &[&str], key: &str, value: u32) -> Transcript {
        let mut run = Transcript::default();
        for suite in suites {
            run.add(parse(&format!(
                r#"{{"vellum":"row","suite":"{suite}","case":"x","params":{{}},"timing":"wall","values":{{"{key}":{value}}}}}"#
            )));
        }
        run
    }

    #[test]
    fn two_nodes_have_to_be_seen() {
        let mut run = run(&SUITES, "lost", 0);
        assert!(everything_is_measured_and_near(&[]).is_ok());
        let row = |checks: u32, failed: u32| {
            let text = format!(
                r#"{{"vellum":"row","suite":"selftest","case":"nodes","values":{{"checks":{checks},"failed_mask":{failed}}}}}"#
            );
            parse(&text)
        };
        for (checks, failed, good) in [(2, 0, true), (1, 0, false), (2, 2, false)] {
            run.add(row(checks, failed));
            let runs = [run];
            assert_eq!(everything_is_measured_and_near(&runs).is_ok(), good);
            [run] = runs;
            run.rows.pop();
        }
        assert!(everything_is_measured_and_near(&[run]).is_err());
    }

    #[test]
    fn a_suite_that_did_not_run_or_lost_something_is_noticed() {
        for key in ZERO {
            assert!(everything_is_measured(&[run(&SUITES, key, 0)]).is_ok());
            assert!(everything_is_measured(&[run(&SUITES, key, 1)]).is_err());
        }
        assert!(everything_is_measured(&[run(&SUITES[..3], "lost", 0)]).is_err());
    }
}
