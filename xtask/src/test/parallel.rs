//! Cases about the parallel clock itself.

use super::cases::{Boot, Case, Expect, Table};
use super::checks::{Verdict, row, value};
use super::trees::Tree;
use crate::bench::Row;
use crate::machine::Timing;
use crate::uart::Transcript;

/// By how much private work may differ over numbers of CPUs.
const FLAT: f64 = 0.02;
/// By how much runs may differ, with other quanta among them.
const REPEATS: f64 = 0.01;
/// By how much runs of one quantum may differ.
const SAME: f64 = 0.0;
/// By how much twice the vCPUs may take other than twice the time, when all wait for one lock.
const SERIAL: f64 = 0.1;

/// How many times as long 16 vCPUs take as one where all wait for one lock that is held for 0.4 to 0.7 of what a fault takes.
const SERIAL_TIMES: core::ops::RangeInclusive<f64> = 6.0..=14.0;
/// What a line costs where one does, and by how much a contended one may move faster or slower.
const COST: u32 = 150;
const RATE: f64 = 0.05;
/// Lines that move for each fault of vCPUs that share leaf tables and words of the bitmap: one of either.
const LINES: f64 = 2.05;
/// How many times as long 64 vCPUs may take as one, in mode lockless.
const LOCKLESS: f64 = 1.25;
/// As many times 16 may. One line that the controller writes for each, and all of them read, made it 1.20.
const APART: f64 = 1.05;

impl Table<'_> {
    /// Two runs with the same quantum and one with another.
    pub(super) fn parallel(&self) -> Vec<Case> {
        let runs = |name: &str, cpus, quanta: [u32; 3], append: &str, check| {
            let boots = quanta.map(|quantum| Boot {
                machine: self.machine(|machine| {
                    (machine.cpus, machine.memory_mib) = (cpus, 512);
                    machine.timing = Timing::Parallel;
                    machine.clock.quantum = quantum;
                }),
                append: format!("timing=parallel {append}"),
                linux: None,
                typed: &[],
                tree: Tree::Own,
                hostile: false,
            });
            let first = self.case(name, boots[0].machine.clone(), "", Expect::Good(check));
            Case {
                boots: boots.to_vec(),
                ..first
            }
        };
        let mut cases = vec![
            runs(
                "parallel clock: private work takes as long beside 63 others and invalidations",
                65,
                [100, 100, 1000],
                "suite=private vcpus=1,64 mib=1 rounds=5000",
                private_is_flat,
            ),
            runs(
                "parallel clock: a contended lock serializes, and nothing else does",
                17,
                [100, 1000, 10_000],
                "suite=dirty vcpus=1,8,16 locking=mutex,lockless mib=1 pages=64 iterations=1",
                locks_serialize,
            ),
        ];
        let mut lines = self.once(
            "parallel clock: a contended line moves once in what it costs, none where vCPUs write apart, and that repeats",
            9,
            "suite=lines vcpus=8 locking=lockless,mutex mib=2 pages=64 rounds=300 iterations=1",
            lines_move,
        );
        lines.boots.extend(lines.boots.clone());
        cases.push(lines);
        cases.push(self.once(
            "parallel clock: lockless vCPUs take no line from each other or from the controller",
            17,
            "suite=dirty vcpus=1,16 locking=lockless mib=2 pages=64 iterations=1",
            |runs| lockless_is_flat(&runs.first().map(rows).ok_or("nothing ran")??, "16", APART),
        ));
        if self.soak {
            cases.push(self.once(
                "parallel clock: with 64 vCPUs the locks take what their serialized part says, and lockless nothing",
                65,
                "suite=dirty vcpus=1,8,16,64 locking=mutex,rwlock,lockless mib=2 pages=64 iterations=1",
                scales,
            ));
        }
        cases
    }

    /// One run in which lines cost something.
    fn once(
        &self,
        name: &str,
        cpus: u32,
        append: &str,
        check: fn(&[Transcript]) -> Verdict,
    ) -> Case {
        let machine = self.machine(|machine| {
            (machine.cpus, machine.memory_mib) = (cpus, 512);
            machine.timing = Timing::Parallel;
            machine.clock.line_cost = COST;
        });
        let append = format!("timing=parallel {append}");
        self.case(name, machine, append, Expect::Good(check))
    }
}

fn near(what: &str, found: f64, wanted: f64, tolerance: f64) -> Verdict {
    if (found / wanted - 1.0).abs() <= tolerance {
        return Ok(());
    }
    Err(format!(
        "{what}: {found} where {wanted} was expected, within {} %",
        100.0 * tolerance
    ))
}

/// The rows of one run.
fn rows(run: &Transcript) -> Result<Vec<Row>, String> {
    if run.rows.is_empty() {
        return Err("the run measured nothing".into());
    }
    Ok(run.rows.iter().map(row).collect())
}

/// Every value of that name is in each run what it is in the first.
fn repeats(runs: &[Transcript], key: &str, tolerance: f64) -> Verdict {
    let Some((first, others)) = runs.split_first() else {
        return Err("nothing ran".into());
    };
    let first = rows(first)?;
    if first.iter().all(|row| row.value(key).is_none()) {
        return Err(format!("no row has {key}"));
    }
    for run in others {
        for (row, again) in first.iter().zip(rows(run)?) {
            let Some(wanted) = row.value(key) else {
                continue;
            };
            let what = format!("{key}, {}, {} vCPUs, again", row.case, row.param("vcpus"));
            near(&what, value(&again, key)?, wanted, tolerance)?;
        }
    }
    Ok(())
}

fn private_is_flat(runs: &[Transcript]) -> Verdict {
    for run in runs {
        let rows = rows(run)?;
        let [one, many] = rows.as_slice() else {
            return Err(format!("{} rows", rows.len()));
        };
        let alone = value(one, "most_ns")?;
        for key in ["least_ns", "most_ns"] {
            near(key, value(many, key)?, alone, FLAT)?;
        }
        if value(many, "tlbi_vmid")? < 1.0 {
            return Err("nothing was invalidated meanwhile".into());
        }
    }
    repeats(runs, "most_ns", REPEATS)
}

fn locks_serialize(runs: &[Transcript]) -> Verdict {
    for run in runs {
        let rows = rows(run)?;
        let time = |vcpus: &str, locking: &str| pass_time(&rows, vcpus, locking);
        // Who waits looks now and then, so that how long depends on when; but each waits for all others.
        let times = time("16", "mutex")? / time("1", "mutex")?;
        if !SERIAL_TIMES.contains(&times) {
            return Err(format!(
                "16 vCPUs in mode mutex take {times} times as long as one"
            ));
        }
        near(
            "lockless, 16 vCPUs",
            time("16", "lockless")?,
            time("1", "lockless")?,
            FLAT,
        )?;
    }
    repeats(runs, "vcpu_ns", REPEATS)
}

fn lines_move(runs: &[Transcript]) -> Verdict {
    let rows = runs.first().map(rows).ok_or("nothing ran")??;
    let of = |case: &str, layout: &str| {
        let found = rows
            .iter()
            .find(|row| row.case == case && (layout.is_empty() || row.param("layout") == layout));
        found.ok_or_else(|| format!("no row {case} {layout}"))
    };
    let addition = value(of("one word", "")?, "ns_per_add")?;
    near("an addition", addition, f64::from(COST), RATE)?;
    let each = |layout: &str, key: &str| -> Result<f64, String> {
        let row = of("write faults", layout)?;
        Ok(value(row, key)? / value(row, "faults_permission")?)
    };
    let apart = each("apart", "line_transfers_among")? + each("apart", "line_upgrades_among")?;
    if apart > 0.0 {
        return Err(format!(
            "vCPUs that write apart take {apart} lines from each other for each fault"
        ));
    }
    let together = each("interleaved", "line_transfers_among")?;
    if !(1.0..=LINES).contains(&together) {
        return Err(format!(
            "{together} lines move for each fault of vCPUs that write in turn"
        ));
    }
    if value(of("harvest", "")?, "stores_per_ms_beside")? < 1.0 {
        return Err("nobody stores beside a harvest".into());
    }
    let keys = ["ns_per_add", "vcpu_ns", "clear_ns", "stores_per_ms_beside"];
    keys.iter().try_for_each(|key| repeats(runs, key, SAME))
}

/// What a vCPU's pass took.
fn pass_time(rows: &[Row], vcpus: &str, locking: &str) -> Result<f64, String> {
    let found = rows
        .iter()
        .find(|row| row.param("vcpus") == vcpus && row.param("locking") == locking);
    value(found.ok_or("no such row")?, "vcpu_ns")
}

fn lockless_is_flat(rows: &[Row], vcpus: &str, most: f64) -> Verdict {
    let slower = pass_time(rows, vcpus, "lockless")? / pass_time(rows, "1", "lockless")?;
    if slower > most {
        return Err(format!(
            "{vcpus} lockless vCPUs take {slower} times as long as one"
        ));
    }
    Ok(())
}

fn scales(runs: &[Transcript]) -> Verdict {
    let rows = runs.first().map(rows).ok_or("nothing ran")??;
    for locking in ["mutex", "rwlock"] {
        let serial = pass_time(&rows, "16", locking)? / 16.0;
        let predicted = (64.0 * serial).max(pass_time(&rows, "1", locking)?);
        near(locking, pass_time(&rows, "64", locking)?, predicted, SERIAL)?;
    }
    lockless_is_flat(&rows, "64", LOCKLESS)
}

#[cfg(test)]
mod tests {
    use super::{FLAT, near};

    #[test]
    fn two_percent_are_near_and_three_are_not() {
        assert!(near("it", 1.019, 1.0, FLAT).is_ok());
        assert!(near("it", 0.981, 1.0, FLAT).is_ok());
        let error = near("it", 1.03, 1.0, FLAT).expect_err("too far");
        assert!(error.contains("it: 1.03"), "{error}");
    }
}
