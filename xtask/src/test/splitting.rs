//! Cases about splitting and collapsing blocks, and what must hold of their rows.

use super::cases::{Case, Expect, MODES, Table};
use super::checks::{Verdict, each, every_mode, every_mode_completes, row, same, value};
use crate::bench::Row;
use crate::uart::Transcript;

/// CPU models with FEAT_BBM level 2.
const LEVEL_2: [&str; 3] = ["max", "neoverse-v1", "neoverse-n2"];
/// CPU models without it.
const LEVEL_0: [&str; 2] = ["neoverse-n1", "cortex-a72"];
/// VM-wide invalidations before the pass that are not a batch's: one for protecting everything, one for a batch that is
/// not full.
const BESIDE_BATCHES: f64 = 2.0;
/// Times as many exits as eager splitting that the baseline takes at least, read-mostly.
const BASELINE_EXITS: f64 = 9.0;

impl Table<'_> {
    /// Blocks that are split and collapsed again.
    pub(super) fn splitting(&self) -> Vec<Case> {
        let mib = self.size.mib.clamp(16, 32);
        let mut cases = Vec::new();
        for model in LEVEL_2 {
            let append =
                format!("suite=split vcpus=4 splitting=fault,enable,clear bbm=2 mib={mib}");
            let name = format!("splits at level 2 leave no window, {model}");
            cases.push(self.split(name, model, 5, append, no_window));
        }
        for model in LEVEL_0 {
            let append =
                format!("suite=split vcpus=4 splitting=fault,enable,clear bbm=0 mib={mib}");
            let name = format!("a batch of splits at level 0 shares its invalidation, {model}");
            cases.push(self.split(name, model, 5, append, batches_are_shared));
        }
        for model in ["max", "cortex-a72"] {
            let append = "suite=split vcpus=8 splitting=fault-empty,enable,clear mib=16".to_owned();
            let name = format!("eager splits save eight exits of nine, {model}");
            cases.push(self.split(name, model, 9, append, exits_are_saved));
        }
        // It is near the limit of a case with one mode alone: copying, hashing and comparing a whole gigabyte takes long.
        let whole: &[&str] = if self.soak {
            &["max", "cortex-a72"]
        } else {
            &[]
        };
        for model in whole {
            let append =
                format!("suite=split vcpus=1 {MODES} splitting=enable backing=1g mib=1024");
            let name = format!("1 GiB becomes pages and 1 GiB again, {model}");
            cases.push(self.split(name, model, 2, append, everything_comes_back));
        }
        let append = format!(
            "suite=verify vcpus=4 {MODES} splitting=fault-empty backing=2m mib=4 iterations=2 rounds=6"
        );
        cases.push(self.split(
            "every write is reported and read where tables have holes".to_owned(),
            "max",
            5,
            append,
            every_mode_completes,
        ));
        let seconds = if self.soak { 60 } else { 2 };
        for model in ["max", "cortex-a72"] {
            for policy in ["fault", "clear"] {
                let append = format!(
                    "suite=churn vcpus=8 {MODES} splitting={policy} mib=4 seconds={seconds}"
                );
                let name = format!(
                    "nothing is lost while splits, clears and collapses loop, {policy}, {model}"
                );
                cases.push(self.split(name, model, 9, append, churn_loses_nothing));
            }
        }
        let refused = |name: &str, model: &str, append: &str, said| {
            let machine = self.machine(|machine| machine.cpu = model.to_owned());
            let name = format!("refused: {name}");
            self.case(name, machine, append, Expect::Refusal(said))
        };
        cases.extend([
            refused(
                "level 2 on a CPU without it",
                "cortex-a72",
                "suite=split bbm=2",
                "unsafe-bbm",
            ),
            refused(
                "a chunk that is no block size",
                "max",
                "suite=split chunk=3m",
                "not a block size",
            ),
            refused(
                "an unknown policy",
                "max",
                "suite=split splitting=eager",
                "splitting",
            ),
        ]);
        cases
    }

    fn split(
        &self,
        name: String,
        model: &str,
        cpus: u32,
        append: String,
        check: fn(&[Transcript]) -> Verdict,
    ) -> Case {
        let machine = self.machine(|machine| {
            (machine.cpu, machine.cpus) = (model.to_owned(), cpus);
            machine.memory_mib = 4096;
        });
        self.case(name, machine, append, Expect::Good(check))
    }
}

/// No window and no translation fault, and what holds at every level.
fn no_window(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        about(row, || {
            same(row, "bbm_windows", 0.0)?;
            same(row, "bbm_windows_eager", 0.0)?;
            same(row, "bbm_windows_disable", 0.0)?;
            same(row, "faults_translation_eager", 0.0)?;
            same(row, "faults_translation", 0.0)
        })
    })?;
    everything_comes_back(runs)
}

/// VM-wide invalidations once a batch, others once a block, and what holds at every level.
fn batches_are_shared(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        about(row, || {
            // While vCPUs run, some blocks are split by their faults, each on its own.
            if !is_eager(row) || row.case == "live" {
                return Ok(());
            }
            let splits = value(row, "splits_eager")?;
            let batch = row.param("bbm_batch").parse::<f64>().unwrap_or(1.0);
            let wide = value(row, "tlbi_stage1_eager")? + value(row, "tlbi_vmid_eager")?;
            at_most(
                "VM-wide invalidations",
                wide,
                splits / batch + BESIDE_BATCHES,
            )?;
            let single = value(row, "tlbi_ipa_eager")?;
            at_most("invalidations of one address", single, splits)
        })
    })?;
    everything_comes_back(runs)
}

/// Memory is mapped as before and holds what it held. Each page written faults once; a fault-time split costs one more
/// fault at most, an eager one none in the pass.
fn everything_comes_back(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        about(row, || {
            same(row, "leaves_changed", 0.0)?;
            same(row, "ram_changed", 0.0)?;
            same(row, "blocks_left", 0.0)?;
            if is_eager(row) {
                at_least("eager splits", value(row, "splits_eager")?, 1.0)?;
            }
            if row.case == "live" {
                return Ok(());
            }
            let written = value(row, "pages_written")?;
            same(row, "pages_lost", 0.0)?;
            same(row, "faults_translation", 0.0)?;
            if is_eager(row) {
                same(row, "splits_dirty", 0.0)?;
                return same(row, "faults_permission", written);
            }
            let faults = value(row, "faults_permission")?;
            let splits = value(row, "splits_dirty")?;
            at_most("permission faults", faults, written + splits)
        })
    })
}

/// Read-mostly: the baseline takes nine times as many exits as each eager policy.
fn exits_are_saved(runs: &[Transcript]) -> Verdict {
    let rows: Vec<Row> = runs.iter().flat_map(|run| &run.rows).map(row).collect();
    let exits = |row: &Row| value(row, "exits");
    let mut mostly = rows.iter().filter(|row| row.case == "read-mostly");
    let baseline = mostly
        .clone()
        .find(|row| row.param("splitting") == "fault-empty")
        .ok_or("no baseline")?;
    let baseline = exits(baseline)?;
    at_least(
        "eager cases",
        mostly.clone().filter(|row| is_eager(row)).count() as f64,
        2.0,
    )?;
    mostly.try_for_each(|row| match is_eager(row) {
        true => at_least(
            "exits of the baseline",
            baseline,
            BASELINE_EXITS * exits(row)?,
        ),
        false => Ok(()),
    })?;
    each(runs, |row| match row.case.as_str() {
        "live" => Ok(()),
        _ => same(row, "pages_lost", 0.0),
    })
}

/// Splits, collapses and clears happened in every mode, and the copy equals memory.
fn churn_loses_nothing(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        about(row, || {
            same(row, "pages_lost", 0.0)?;
            for key in ["rounds", "stores", "splits", "collapses", "pages_reported"] {
                at_least(key, value(row, key)?, 1.0)?;
            }
            Ok(())
        })
    })?;
    every_mode(runs)
}

fn is_eager(row: &Row) -> bool {
    ["enable", "clear"].contains(&row.param("splitting").as_str())
}

/// Names the case and policy that a verdict is about.
fn about(row: &Row, judge: impl FnOnce() -> Verdict) -> Verdict {
    judge().map_err(|why| format!("{}, {}: {why}", row.case, row.param("splitting")))
}

fn at_most(what: &str, found: f64, most: f64) -> Verdict {
    match found <= most {
        true => Ok(()),
        false => Err(format!("{found} {what}, {most} at most")),
    }
}

fn at_least(what: &str, found: f64, least: f64) -> Verdict {
    match found >= least {
        true => Ok(()),
        false => Err(format!("{found} {what}, {least} at least")),
    }
}

#[cfg(test)]
mod tests {
    use super::{batches_are_shared, churn_loses_nothing, exits_are_saved, no_window};
    use crate::uart::{Transcript, parse};

    const GOOD: &str = r#""bbm_windows":0,"bbm_windows_eager":0,"bbm_windows_disable":0,"faults_translation_eager":0,"faults_translation":0,"leaves_changed":0,"ram_changed":0,"blocks_left":0,"splits_eager":32,"splits_dirty":0,"pages_written":9,"pages_lost":0,"faults_permission":9,"tlbi_stage1_eager":3,"tlbi_vmid_eager":1,"tlbi_ipa_eager":32"#;

    fn run(rows: &[(&str, &str, &str)]) -> Transcript {
        let mut all = Transcript::default();
        for (case, policy, values) in rows {
            all.add(parse(&format!(
                r#"{{"vellum":"row","suite":"split","case":"{case}","params":{{"splitting":"{policy}","locking":"mutex","bbm_batch":16}},"values":{{{values}}}}}"#
            )));
        }
        all
    }

    #[test]
    fn a_window_a_changed_leaf_and_a_fault_too_many_are_found() {
        assert_eq!(no_window(&[run(&[("sparse", "enable", GOOD)])]), Ok(()));
        for (from, to) in [
            (r#""bbm_windows":0"#, r#""bbm_windows":1"#),
            (r#""leaves_changed":0"#, r#""leaves_changed":1"#),
            (r#""ram_changed":0"#, r#""ram_changed":1"#),
            (r#""faults_translation":0"#, r#""faults_translation":1"#),
            (r#""faults_permission":9"#, r#""faults_permission":10"#),
            (r#""splits_eager":32"#, r#""splits_eager":0"#),
        ] {
            let bad = GOOD.replace(from, to);
            assert_ne!(bad, GOOD);
            assert!(
                no_window(&[run(&[("sparse", "enable", &bad)])]).is_err(),
                "{to}"
            );
        }
    }

    #[test]
    fn a_fault_time_split_may_cost_one_fault_more() {
        let of = |faults: u32| {
            GOOD.replace(r#""splits_dirty":0"#, r#""splits_dirty":1"#)
                .replace(
                    r#""faults_permission":9"#,
                    &format!(r#""faults_permission":{faults}"#),
                )
        };
        assert!(no_window(&[run(&[("sparse", "fault", &of(10))])]).is_ok());
        assert!(no_window(&[run(&[("sparse", "fault", &of(11))])]).is_err());
    }

    #[test]
    fn invalidations_beyond_one_a_batch_are_found() {
        assert_eq!(
            batches_are_shared(&[run(&[("sparse", "clear", GOOD)])]),
            Ok(())
        );
        for (from, to) in [
            (r#""tlbi_stage1_eager":3"#, r#""tlbi_stage1_eager":4"#),
            (r#""tlbi_ipa_eager":32"#, r#""tlbi_ipa_eager":33"#),
        ] {
            let bad = GOOD.replace(from, to);
            assert!(
                batches_are_shared(&[run(&[("sparse", "clear", &bad)])]).is_err(),
                "{to}"
            );
            assert!(
                batches_are_shared(&[run(&[("live", "clear", &bad)])]).is_ok(),
                "{to}"
            );
        }
    }

    #[test]
    fn exits_are_compared_with_the_baseline() {
        let of = |exits: u32| {
            let values = |exits: u32| format!(r#""pages_lost":0,"exits":{exits}"#);
            let (baseline, eager) = (values(900), values(exits));
            run(&[
                ("read-mostly", "fault-empty", &baseline),
                ("read-mostly", "enable", &eager),
                ("read-mostly", "clear", &eager),
            ])
        };
        assert_eq!(exits_are_saved(&[of(100)]), Ok(()));
        assert!(exits_are_saved(&[of(101)]).is_err());
        assert!(exits_are_saved(&[run(&[])]).is_err());
    }

    #[test]
    fn churn_that_lost_a_page_or_did_nothing_is_found() {
        let values = |lost: u32, collapses: u32| {
            format!(
                r#""pages_lost":{lost},"rounds":1,"stores":1,"splits":1,"pages_reported":1,"collapses":{collapses}"#
            )
        };
        let of = |lost, collapses| {
            let line = format!(
                r#"{{"vellum":"row","suite":"churn","params":{{"locking":"MODE"}},"values":{{{}}}}}"#,
                values(lost, collapses)
            );
            let mut all = Transcript::default();
            for mode in ["mutex", "rwlock", "lockless"] {
                all.add(parse(&line.replace("MODE", mode)));
            }
            all
        };
        assert_eq!(churn_loses_nothing(&[of(0, 1)]), Ok(()));
        assert!(churn_loses_nothing(&[of(1, 1)]).is_err());
        assert!(churn_loses_nothing(&[of(0, 0)]).is_err());
    }
}
