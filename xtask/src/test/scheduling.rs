//! Cases about CPUs that several vCPUs share, vCPUs that move, and VMs that come and go.

use super::cases::{Case, Expect, Table};
use super::checks::{Verdict, each, guest_is_content, row, same, value};
use crate::bench::Row;
use crate::machine::Timing;
use crate::uart::Transcript;

/// How far a share may be from what the weights say, and equal vCPUs from each other.
const TOLERANCE: f64 = 0.05;
/// Ticks during which a vCPU is moved, at least.
const TICKS: f64 = 10_000.0;

impl Table<'_> {
    /// Shares, moves and lives.
    pub(super) fn scheduling(&self) -> Vec<Case> {
        let share = |name: &str, cpus, append: &str| {
            let machine = self.machine(|machine| {
                "max".clone_into(&mut machine.cpu);
                machine.cpus = cpus;
                machine.memory_mib = 2048;
                machine.timing = Timing::Insn;
            });
            let append = format!("suite=share timing=insn mib=1 run-ms=2000 {append}");
            self.case(name, machine, append, Expect::Good(shares_are_fair))
        };
        let mut cases = vec![
            share(
                "two VMs of weights 1:3 get 25:75 of four CPUs",
                5,
                "vcpus=4 weights=100,300",
            ),
            share(
                "three VMs of weights 1:3:6 get 10:30:60 of one CPU",
                2,
                "vcpus=2 weights=50,150,300",
            ),
            share(
                "64 vCPUs on four CPUs all make progress",
                5,
                "vcpus=64 weights=100",
            ),
            share(
                "64 vCPUs get equal shares of one CPU",
                2,
                "vcpus=64 weights=100",
            ),
        ];
        cases.push(self.flood());
        cases.push(self.sgi_flood());
        let rounds = if self.soak { 100_000 } else { 10_000 };
        for (model, gic) in [("max", 3), ("neoverse-n1", 3), ("cortex-a72", 2)] {
            let machine = self.machine(|machine| {
                model.clone_into(&mut machine.cpu);
                machine.gic = gic;
                machine.cpus = 3;
            });
            let name = format!("no tick is lost while its vCPU moves, {model}, GICv{gic}");
            let append = format!("suite=moves vcpus=1 rounds={rounds}");
            let case = self.case(name, machine, append, Expect::Good(no_tick_is_lost));
            // Three threads that hand work to each other are slow where others want the same cores.
            cases.push(Case {
                alone: true,
                ..case
            });
        }
        for (model, gic) in [("max", 3), ("cortex-a72", 2)] {
            let machine = self.machine(|machine| {
                model.clone_into(&mut machine.cpu);
                machine.gic = gic;
                machine.cpus = 3;
            });
            let name = format!("five vCPUs on two CPUs find their machine, {model}, GICv{gic}");
            let append = "suite=selftest vcpus=5 locking=rwlock";
            cases.push(self.case(name, machine, append, Expect::Good(guest_is_content)));
        }
        cases.extend(self.storms());
        let machine = self.machine(|machine| {
            "cortex-a72".clone_into(&mut machine.cpu);
            machine.cpus = 3;
        });
        cases.push(self.case(
            "1000 VMs come and go and leave nothing, cortex-a72",
            machine,
            "suite=lives vcpus=2 mib=8 rounds=1000",
            Expect::Good(nothing_is_left),
        ));
        cases
    }

    /// Two VMs that compute on one CPU, and then one that does beside one that floods a slow console.
    fn flood(&self) -> Case {
        let machine = self.machine(|machine| {
            "max".clone_into(&mut machine.cpu);
            machine.cpus = 2;
            machine.timing = Timing::Insn;
        });
        let append = "suite=share timing=insn mib=1 vcpus=1 weights=100,100 run-ms=300";
        let name = "a VM that floods its console takes nothing from others";
        let mut case = self.case(name, machine, append, Expect::Good(flood_hurts_nobody));
        case.boots.extend(case.boots.clone());
        if let Some(flooded) = case.boots.last_mut() {
            flooded.append.push_str(" flood-baud=115200");
        }
        case
    }

    /// Two VMs that compute on two CPUs, and then one that does beside one whose vCPUs interrupt each other without end. On the
    /// parallel clock: the vCPUs of one that share no CPU run at the same time.
    fn sgi_flood(&self) -> Case {
        let machine = self.machine(|machine| {
            "max".clone_into(&mut machine.cpu);
            machine.cpus = 3;
            machine.timing = Timing::Parallel;
        });
        let append = "suite=share timing=parallel mib=1 vcpus=2 weights=100,100 run-ms=50";
        let name = "a VM whose vCPUs interrupt each other without end takes nothing from others";
        let mut case = self.case(name, machine, append, Expect::Good(sgis_hurt_nobody));
        case.boots.extend(case.boots.clone());
        if let Some(flooded) = case.boots.last_mut() {
            flooded.append.push_str(" flood-sgis=1");
        }
        case
    }

    /// Interrupts between all vCPUs, with as many CPUs and with fewer.
    fn storms(&self) -> Vec<Case> {
        let (rounds, hz) = if self.soak {
            (1_000_000, 10_000)
        } else {
            (20_000, 1000)
        };
        let machines = [
            ("max", 3, 9),
            ("cortex-a72", 2, 8),
            ("max", 3, 4),
            ("cortex-a72", 2, 4),
        ];
        let cases = machines.map(|(model, gic, cpus)| {
            let machine = self.machine(|machine| {
                model.clone_into(&mut machine.cpu);
                (machine.gic, machine.cpus) = (gic, cpus);
            });
            let guests = cpus - 1;
            let name = format!(
                "an interrupt storm among eight vCPUs on {guests} CPUs loses nothing, {model}, GICv{gic}"
            );
            let append = format!("suite=storm vcpus=8 mib=1 rounds={rounds} tick-hz={hz}");
            let case = self.case(name, machine, append, Expect::Good(nothing_is_lost));
            // Eight threads that wait for each other are slow where others want the same cores.
            Case {
                alone: true,
                ..case
            }
        });
        cases.into()
    }
}

fn nothing_is_lost(transcripts: &[Transcript]) -> Verdict {
    each(transcripts, |row: &Row| {
        same(row, "failed_mask", 0.0)?;
        let restored = if row.case == "restored" { 200.0 } else { 0.0 };
        same(row, "restored", restored)?;
        let (sent, handled) = (value(row, "sent")?, value(row, "handled")?);
        if row.case == "paced" {
            return same(row, "handled", sent);
        }
        if handled > 0.0 && handled <= sent {
            Ok(())
        } else {
            Err(format!("{handled} handled of {sent} sent"))
        }
    })
}

fn shares_are_fair(transcripts: &[Transcript]) -> Verdict {
    each(transcripts, |row: &Row| {
        let [share, expected] = [
            value(row, "share_permille")?,
            value(row, "expected_permille")?,
        ];
        let spread = value(row, "spread_permille")? / 1000.0;
        if (share / expected - 1.0).abs() > TOLERANCE {
            return Err(format!("{share} of 1000 instead of {expected}"));
        }
        // An emulator that runs CPUs in turn gives several of them unequal parts of each slice.
        if row.param("guest_cpus") == "1" && spread > TOLERANCE {
            return Err(format!("equal vCPUs are {spread:.3} apart"));
        }
        match value(row, "rounds_least")? {
            least if least > 0.0 => Ok(()),
            _ => Err("a vCPU got nowhere".to_owned()),
        }
    })
}

/// The first VM gets as far beside the last one's flood, in the second run, as beside its computing, and no exit is long.
fn first_keeps_its_share(transcripts: &[Transcript]) -> Result<&Transcript, String> {
    const LONGEST_EXIT_NS: f64 = 1e6;
    let [beside_one, beside_flood] = transcripts else {
        return Err("there are two runs, without a flood and with it".to_owned());
    };
    let first = |run: &Transcript| {
        run.rows
            .first()
            .map_or(Ok(0.0), |it| value(&row(it), "rounds"))
    };
    let (usual, flooded) = (first(beside_one)?, first(beside_flood)?);
    if flooded < usual * (1.0 - TOLERANCE) || usual == 0.0 {
        return Err(format!("{flooded} rounds instead of {usual}"));
    }
    each(core::slice::from_ref(beside_flood), |row| {
        match value(row, "exit_max_ns")? {
            0.0..LONGEST_EXIT_NS => Ok(()),
            long => Err(format!("an exit took {long} ns")),
        }
    })?;
    Ok(beside_flood)
}

/// Whoever floods sends more than one SGI while others have its CPUs.
fn sgis_hurt_nobody(transcripts: &[Transcript]) -> Verdict {
    const SENT: f64 = 1000.0;
    let beside_flood = first_keeps_its_share(transcripts)?;
    match beside_flood
        .rows
        .last()
        .map(|it| value(&row(it), "rounds_least"))
    {
        Some(Ok(SENT..)) => Ok(()),
        other => Err(format!("SGIs of the vCPU that sent least: {other:?}")),
    }
}

/// Where sending a line takes 5 ms, the other VM's lines come whole, and what it overran is counted.
fn flood_hurts_nobody(transcripts: &[Transcript]) -> Verdict {
    let beside_flood = first_keeps_its_share(transcripts)?;
    let said = |what: &'static str| {
        beside_flood
            .text
            .iter()
            .filter(move |line| line.contains(what))
    };
    if said("a flood").any(|line| !line.starts_with('[')) || said("a flood").count() < 10 {
        return Err("the flood's lines are not whole, or missing".to_owned());
    }
    match said("bytes that a guest wrote to its UART").count() {
        1 => Ok(()),
        times => Err(format!("the bytes lost are spoken of {times} times")),
    }
}

fn no_tick_is_lost(transcripts: &[Transcript]) -> Verdict {
    each(transcripts, |row: &Row| {
        if row.case == "asleep" {
            return same(row, "moves", 50.0);
        }
        for key in ["ticks_wrong", "ticks_late", "cpus_stuck"] {
            same(row, key, 0.0)?;
        }
        same(row, "ticks", value(row, "ticks_moved")?)?;
        match value(row, "ticks_moved")? {
            moved if moved >= TICKS => Ok(()),
            moved => Err(format!("only {moved} ticks during which the vCPU moved")),
        }
    })
}

fn nothing_is_left(transcripts: &[Transcript]) -> Verdict {
    each(transcripts, |row: &Row| {
        for what in ["free_pages", "vmids"] {
            let before = value(row, &format!("{what}_before"))?;
            same(row, &format!("{what}_after"), before)?;
        }
        if value(row, "interrupts_of_cpus")? < 1.0 {
            return Err("nobody looked at the CPUs' interrupts".to_owned());
        }
        same(row, "interrupts_after", 0.0)
    })
}
