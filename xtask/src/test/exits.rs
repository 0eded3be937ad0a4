//! Cases about exits: what they cost, and whether every interrupt between vCPUs arrives.

use super::cases::{Case, Expect, Table};
use super::checks::{Verdict, each, row, same, value};
use crate::bench::Row;
use crate::bench::exit::{geometric_mean, goal};
use crate::machine::Timing;
use crate::uart::Transcript;

/// Machines on which IPIs are exchanged: CPU model and GIC.
const MACHINES: [(&str, u32); 3] = [("max", 3), ("neoverse-n1", 2), ("cortex-a72", 2)];

impl Table<'_> {
    /// Exits and interrupts.
    pub(super) fn exits(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for model in ["max", "neoverse-n1"] {
            let machine = self.machine(|machine| {
                (machine.cpu, machine.cpus, machine.timing) = (model.to_owned(), 5, Timing::Insn);
            });
            cases.push(self.case(
                format!("exits are as short as promised, {model}"),
                machine,
                "suite=exit timing=insn mib=8",
                Expect::Good(exits_are_short),
            ));
        }
        for (model, gic) in MACHINES {
            let machine = self.machine(|machine| {
                (machine.cpu, machine.gic, machine.cpus) = (model.to_owned(), gic, 5);
                machine.timing = Timing::Insn;
            });
            let mut case = self.case(
                format!("a null hypercall writes no system register, {model} GICv{gic}"),
                machine,
                "suite=exit timing=insn mib=2",
                Expect::Good(nothing_needless),
            );
            case.debug = true;
            cases.push(case);
        }
        // With more CPUs that never sleep than the host has, each IPI waits for the host's scheduler.
        let ways = match self.soak {
            true => [("sleeping", 100_000), ("running", 1000)],
            false => [("sleeping", 1000), ("running", 16)],
        };
        for (model, gic) in MACHINES {
            for (receivers, rounds) in ways {
                let machine = self.machine(|machine| {
                    (machine.cpu, machine.gic, machine.cpus) = (model.to_owned(), gic, 5);
                });
                cases.push(self.case(
                    format!("every IPI arrives once, receivers {receivers}, {model} GICv{gic}"),
                    machine,
                    format!("suite=ipi vcpus=2,4 mib=2 rounds={rounds} receivers={receivers}"),
                    Expect::Good(every_ipi_arrives),
                ));
            }
        }
        cases
    }
}

/// Every kind of exit keeps to its goal, and ending an interrupt is no exit at all. Two VMs and eight vCPUs exist.
fn exits_are_short(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        same(row, "lost", 0.0)?;
        if (row.param("vms"), row.param("vcpus")) != ("2".to_owned(), "8".to_owned()) {
            return Err("measured without the other VM".into());
        }
        match row.case.as_str() {
            // The operation itself comes and goes by exits: a handful for thousands of runs.
            "eoi" | "nothing" if value(row, "exits")? > 0.01 => Err("it exits".into()),
            // All of a timer's handling but the physical interrupt is the guest's own.
            "timer" if value(row, "exits")? > 1.01 => Err("it exits more than once".into()),
            _ => Ok(()),
        }
    })?;
    let rows: Vec<Row> = runs.iter().flat_map(|run| &run.rows).map(row).collect();
    let measured: Vec<&Row> = rows.iter().filter(|row| is_judged(row)).collect();
    for case in [
        "hypercall",
        "mmio_vgic",
        "mmio_device",
        "ipi_running",
        "fault_write",
    ] {
        let cost = geometric_mean(&measured, case).ok_or(format!("{case} was not measured"))?;
        let most = goal(case).ok_or(format!("{case} has no goal"))?;
        if cost > most {
            return Err(format!(
                "{case} takes {cost:.0} instructions; the goal is {most}"
            ));
        }
    }
    Ok(())
}

/// In a debug build, which counts them: a null hypercall writes no system register, and no list register is touched by an exit
/// while no interrupt is in flight. What does write and touch them shows that they are counted.
fn nothing_needless(runs: &[Transcript]) -> Verdict {
    // The operation itself comes and goes by exits.
    const FEW: f64 = 0.1;
    each(runs, |row| {
        let (writes, lists) = (value(row, "register_writes")?, value(row, "list_accesses")?);
        let bad = match row.case.as_str() {
            "hypercall" | "eoi" | "nothing" => writes > FEW || lists > FEW,
            "mmio_vgic" | "mmio_device" => writes < 1.0 || lists > FEW,
            "fault_write" | "fault_access" => lists > FEW,
            _ => lists < 1.0,
        };
        match bad {
            true => Err(format!(
                "{}: {writes} writes of system registers, {lists} accesses to list registers",
                row.case
            )),
            false => Ok(()),
        }
    })
}

/// Faults are judged in the locking mode that has no lock.
fn is_judged(row: &Row) -> bool {
    matches!(row.param("locking").as_str(), "" | "lockless")
}

/// As many deliveries as sends, each of which waits for the one before.
fn every_ipi_arrives(runs: &[Transcript]) -> Verdict {
    each(runs, |row| same(row, "delivered", value(row, "expected")?))
}

#[cfg(test)]
mod tests {
    use super::{every_ipi_arrives, exits_are_short};
    use crate::uart::{Line, Record, Transcript, parse};

    fn transcript(rows: &[String]) -> [Transcript; 1] {
        let mut run = Transcript::default();
        for row in rows {
            let line = format!(r#"{{"vellum":"row","suite":"exit","timing":"insn",{row}}}"#);
            let Line::Record(Record::Row(row)) = parse(&line) else {
                panic!("not a row: {line}")
            };
            run.rows.push(row);
        }
        [run]
    }

    fn exit(case: &str, insn: u32, exits: &str) -> String {
        format!(
            r#""case":"{case}","params":{{"vms":2,"vcpus":8}},"values":{{"insn":{insn},"exits":{exits},"lost":0}}"#
        )
    }

    fn all(vgic: u32, eoi: &str) -> [Transcript; 1] {
        transcript(&[
            exit("hypercall", 23, "1"),
            exit("mmio_vgic", vgic, "1"),
            exit("mmio_vgic", 100, "1"),
            exit("mmio_device", 200, "1"),
            exit("ipi_running", 650, "2"),
            exit("fault_write", 299, "1"),
            exit("eoi", 8, eoi),
        ])
    }

    #[test]
    fn goals_are_for_the_mean_of_a_kind() {
        assert_eq!(exits_are_short(&all(600, "0")), Ok(()));
        let error = exits_are_short(&all(700, "0")).expect_err("265 instructions");
        assert!(error.contains("mmio_vgic takes 265"), "{error}");
        assert!(exits_are_short(&all(100, "1")).is_err());
        assert!(exits_are_short(&transcript(&[exit("hypercall", 23, "1")])).is_err());
    }

    #[test]
    fn a_lost_ipi_is_found() {
        let of = |delivered: u32| {
            transcript(&[format!(
                r#""case":"normal","params":{{}},"values":{{"delivered":{delivered},"expected":10}}"#
            )])
        };
        assert_eq!(every_ipi_arrives(&of(10)), Ok(()));
        assert!(every_ipi_arrives(&of(9)).is_err() && every_ipi_arrives(&of(11)).is_err());
    }
}
