//! Cases about exits: what they cost, and whether every interrupt between vCPUs arrives.

use super::cases::{Case, Expect, Table};
use super::checks::{self, Verdict, each, row, same, value};
use crate::bench::Row;
use crate::bench::exit::{geometric_mean, goal};
use crate::machine::Timing;
use crate::uart::Transcript;

/// Machines on which IPIs are exchanged: CPU model and GIC.
const MACHINES: [(&str, u32); 3] = [("max", 3), ("neoverse-n1", 2), ("cortex-a72", 2)];

/// What judges a case's runs.
type Judge = fn(&[Transcript]) -> Verdict;

/// What exits can be made to do on a CPU that needs nothing, and how that is seen.
const FORCED: [(&str, Judge); 2] = [("on", loops), ("firmware", calls)];

impl Table<'_> {
    /// Exits and interrupts.
    pub(super) fn exits(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for model in ["max", "neoverse-n1"] {
            let machine = self.machine(|machine| {
                (machine.cpu, machine.cpus, machine.timing) = (model.to_owned(), 5, Timing::Insn);
            });
            let mut case = self.case(
                format!("exits are as short as promised, {model}"),
                machine,
                "suite=exit timing=insn mib=8 mitigations=off",
                Expect::Good(exits_are_short),
            );
            case.boots.extend(case.boots.clone());
            if let Some(mitigated) = case.boots.last_mut() {
                mitigated.append = "suite=exit timing=insn mib=8 mitigations=on".into();
            }
            cases.push(case);
        }
        for (what, word) in FORCED {
            let machine = self.machine(|machine| machine.cpus = 3);
            let mut case = self.case(
                format!("a guest finds what it should where exits mitigate, {what}"),
                machine,
                format!("suite=selftest vcpus=2 mib=2 mitigations={what}"),
                Expect::Good(word),
            );
            case.debug = true;
            cases.push(case);
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

/// Every kind of exit keeps to its goal, and ending an interrupt is no exit at all. Two VMs and eight vCPUs exist. With
/// mitigations each exit takes as much more as they take, and no more.
fn exits_are_short(runs: &[Transcript]) -> Verdict {
    let [run, mitigated] = runs else {
        return Err("there are two runs, without mitigations and with them".into());
    };
    mitigations_are_in_each_exit(run, mitigated)?;
    let runs = core::slice::from_ref(run);
    each(runs, |row| {
        same(row, "lost", 0.0)?;
        let existing = (row.param("vms"), row.param("vcpus"));
        if row.case != "vcpu_switch" && existing != ("2".to_owned(), "8".to_owned()) {
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

/// Whether each exit of `mitigated` takes the loop longer than without, and nothing else takes longer.
fn mitigations_are_in_each_exit(run: &Transcript, mitigated: &Transcript) -> Verdict {
    // The loop's rounds are three instructions; loading the count takes two, and two barriers follow.
    let [plain, rounds] = [run, mitigated].map(|run| {
        let word = run.machine.get("at_exits")?.as_str()?;
        match word {
            "none" => Some(0.0),
            word => word.strip_prefix("loop-")?.parse::<f64>().ok(),
        }
    });
    let rounds = match (plain, rounds) {
        (Some(0.0), Some(rounds)) if rounds > 0.0 => rounds,
        other => return Err(format!("exits loop as often as {other:?}")),
    };
    let each_exit = 3.0 * rounds + 4.0;
    let pairs = run.rows.iter().zip(&mitigated.rows);
    if run.rows.len() != mitigated.rows.len() {
        return Err("not the same rows".into());
    }
    for (one, other) in pairs.map(|(one, other)| (row(one), row(other))) {
        let more = value(&other, "insn")? - value(&one, "insn")?;
        // The operation itself comes and goes by exits, once for hundreds of runs, and a slice may end in one.
        let expected = value(&one, "exits")?.round() * each_exit;
        if one.case != other.case || (more - expected).abs() > 2.0 {
            return Err(format!(
                "{} takes {more:.1} instructions more, not {expected:.1}",
                one.case
            ));
        }
    }
    Ok(())
}

fn loops(runs: &[Transcript]) -> Verdict {
    does(runs, "loop-32")
}

fn calls(runs: &[Transcript]) -> Verdict {
    does(runs, "workaround-3")
}

/// The guest's checks hold, and exits did what `word` says.
fn does(runs: &[Transcript], word: &str) -> Verdict {
    for run in runs {
        match run.machine.get("at_exits").and_then(|it| it.as_str()) {
            Some(found) if found == word => {}
            other => return Err(format!("exits did {other:?}, not {word}")),
        }
    }
    checks::ends(runs)
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
            "vcpu_switch" => writes < 1.0,
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

    /// Without mitigations, and with a loop of one round, which is seven instructions.
    fn all(vgic: u32, eoi: &str, call: u32) -> [Transcript; 2] {
        [(0, 23, "none"), (7, call, "loop-1")].map(|(more, call, word)| {
            let [mut run] = transcript(&[
                exit("hypercall", call, "1"),
                exit("mmio_vgic", vgic + more, "1"),
                exit("mmio_vgic", 100 + more, "1"),
                exit("mmio_device", 200 + more, "1"),
                exit("ipi_running", 650 + 2 * more, "2"),
                exit("fault_write", 299 + more, "1"),
                exit("eoi", 8, eoi),
            ]);
            run.machine.insert("at_exits".into(), word.into());
            run
        })
    }

    #[test]
    fn goals_are_for_the_mean_of_a_kind() {
        assert_eq!(exits_are_short(&all(600, "0", 30)), Ok(()));
        let error = exits_are_short(&all(700, "0", 30)).expect_err("265 instructions");
        assert!(error.contains("mmio_vgic takes 265"), "{error}");
        assert!(exits_are_short(&all(100, "1", 30)).is_err());
        assert!(exits_are_short(&transcript(&[exit("hypercall", 23, "1")])).is_err());
    }

    #[test]
    fn an_exit_that_does_not_mitigate_is_found() {
        let error = exits_are_short(&all(600, "0", 23)).expect_err("no loop");
        assert!(error.contains("0.0 instructions more, not 7.0"), "{error}");
        let [run, _] = all(600, "0", 23);
        let [again, _] = all(600, "0", 23);
        assert!(exits_are_short(&[run, again]).is_err(), "both without");
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
