//! Cases about the parallel clock itself.

use super::cases::{Boot, Case, Expect, Table};
use super::checks::{Verdict, row, value};
use crate::bench::Row;
use crate::machine::Timing;
use crate::uart::Transcript;

/// By how much private work may differ over numbers of CPUs.
const FLAT: f64 = 0.02;
/// By how much runs may differ, with the same quantum or with others.
const REPEATS: f64 = 0.01;
/// By how much twice the vCPUs may take other than twice the time, when all wait for one lock.
const SERIAL: f64 = 0.1;

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
                without_gic: false,
                hostile: false,
            });
            let first = self.case(name, boots[0].machine.clone(), "", Expect::Good(check));
            Case {
                boots: boots.to_vec(),
                ..first
            }
        };
        vec![
            runs(
                "parallel clock: private work takes as long beside 63 others and invalidations",
                65,
                [100, 100, 1000],
                "suite=private vcpus=1,64 mib=1 rounds=10000",
                private_is_flat,
            ),
            runs(
                "parallel clock: a contended lock serializes, and nothing else does",
                9,
                [100, 1000, 10_000],
                "suite=dirty vcpus=1,4,8 locking=mutex,lockless mib=1 pages=64 iterations=1",
                locks_serialize,
            ),
        ]
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

/// Every value of each run is that of the first.
fn repeats(runs: &[Transcript], key: &str) -> Verdict {
    let Some((first, others)) = runs.split_first() else {
        return Err("nothing ran".into());
    };
    let first = rows(first)?;
    for run in others {
        for (row, again) in first.iter().zip(rows(run)?) {
            let what = format!("{key}, {} vCPUs, again", row.param("vcpus"));
            near(&what, value(&again, key)?, value(row, key)?, REPEATS)?;
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
    repeats(runs, "most_ns")
}

fn locks_serialize(runs: &[Transcript]) -> Verdict {
    for run in runs {
        let rows = rows(run)?;
        let time = |vcpus: &str, locking: &str| {
            let found = rows
                .iter()
                .find(|row| row.param("vcpus") == vcpus && row.param("locking") == locking);
            value(found.ok_or("no such row")?, "vcpu_ns")
        };
        near(
            "mutex, 8 vCPUs",
            time("8", "mutex")?,
            2.0 * time("4", "mutex")?,
            SERIAL,
        )?;
        near(
            "lockless, 8 vCPUs",
            time("8", "lockless")?,
            time("1", "lockless")?,
            FLAT,
        )?;
    }
    repeats(runs, "vcpu_ns")
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
