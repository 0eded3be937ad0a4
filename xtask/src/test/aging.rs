//! Cases about aging: whether the working set is the truth, whether what is touched is young, and what aging costs others.

use super::cases::{Case, Expect, MODES, Table};
use super::checks::{Verdict, each, every_mode, same, value};
use crate::bench::Row;
use crate::machine::Timing;
use crate::uart::Transcript;

/// CPU models, and whether they set access flags themselves.
const MODELS: [(&str, bool); 3] = [("max", true), ("neoverse-n1", true), ("cortex-a72", false)];
/// How far from the truth a working set may be, in millionths of it.
const MOST_ERROR_PPM: f64 = 10_000.0;
/// Clocks are read a moment apart.
const SLACK: f64 = 1.1;
/// Engines and trackers of the soak, with the CPU model that has them and access flags set as said.
const SOAKS: [(&str, &str); 7] = [
    ("max", "engine=walk"),
    ("max", "engine=lazy"),
    ("max", "engine=swap"),
    ("max", "engine=pie"),
    ("max", "engine=walk tracking=dbm"),
    ("max", "engine=swap bbm=0 access-flag=software"),
    ("cortex-a72", "engine=lazy"),
];

impl Table<'_> {
    /// Aging, on every kind of CPU.
    pub(super) fn aging(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        let (mib, passes) = if self.soak { (64, 64) } else { (16, 9) };
        for (model, _) in MODELS {
            for backing in ["4k", "2m"] {
                let append = format!(
                    "suite=heat vcpus=2 mib={mib} backing={backing} passes={passes} period-us=1000"
                );
                let name = format!("the working set is the truth, leaves of {backing}, {model}");
                cases.push(self.age(name, model, 3, append, working_set_is_true));
            }
        }
        let budget = "suite=heat vcpus=1 mib=32 passes=6 period-us=5000 budget=2";
        cases.push(self.age(
            "a scan keeps to its period and budget".to_owned(),
            "max",
            2,
            budget.to_owned(),
            pace_is_kept,
        ));
        cases.extend(self.ageless_faults());
        for (model, _) in MODELS {
            let append =
                format!("suite=age vcpus=3 {MODES} mib=4 iterations=2 rounds=2 backing=4k");
            let name = format!("what is touched is young, {model}");
            cases.push(self.age(name, model, 4, append, touched_is_young));
        }
        let append = "suite=age vcpus=1 mib=4 iterations=1 rounds=1 precision=imprecise";
        cases.push(self.age(
            "without its invalidation a pass takes hot memory for idle".to_owned(),
            "max",
            2,
            append.to_owned(),
            imprecise_is_wrong,
        ));
        let seconds = if self.soak { 60 } else { 5 };
        for (model, words) in SOAKS {
            let append = format!("suite=ages vcpus=8 mib=4 seconds={seconds} backing=2m {words}");
            let name = format!("aging meets everything and nothing is lost, {words}, {model}");
            cases.push(self.age(name, model, 9, append, nothing_lost_nor_idle));
        }
        cases.extend(self.refused_aging());
        cases
    }

    /// Instructions of faults, with passes in between and without.
    fn ageless_faults(&self) -> Vec<Case> {
        let flags = [
            ("max", "hardware"),
            ("max", "software"),
            ("cortex-a72", "software"),
        ];
        let case = |(model, flag): (&str, &str)| {
            let append = format!(
                "suite=age timing=insn vcpus=1 {MODES} mib=4 iterations=1 access-flag={flag}"
            );
            let name = format!("faults do not notice aging, flags set by {flag}, {model}");
            let mut case = self.age(name, model, 2, append, faults_do_not_notice);
            for boot in &mut case.boots {
                boot.machine.timing = Timing::Insn;
            }
            case
        };
        flags.into_iter().map(case).collect()
    }

    /// What cannot be had, or is out of bounds.
    fn refused_aging(&self) -> Vec<Case> {
        let refused = [
            (
                "access flags by hardware on a CPU without",
                "cortex-a72",
                "access-flag=hardware",
                "access-flag=hardware': the CPU does not have FEAT_HAFDBS",
            ),
            (
                "access flags by faults where hardware tracks writes",
                "max",
                "access-flag=software tracking=dbm",
                "access-flag=software': only access-flag=hardware goes with tracking=dbm",
            ),
            (
                "a period of nothing",
                "max",
                "period-us=0",
                "period-us is a number from 1 to 3600000000",
            ),
            (
                "a period of more than an hour",
                "max",
                "period-us=3600000001",
                "period-us is a number from 1 to 3600000000",
            ),
            (
                "more than a whole CPU",
                "max",
                "budget=101",
                "budget is a number from 1 to 100",
            ),
            (
                "more memory hot than there is",
                "max",
                "pattern=60,50",
                "of 100 together",
            ),
        ];
        let case = |(name, model, words, said): (&str, &str, &str, &'static str)| {
            let machine = self.machine(|machine| machine.cpu = model.to_owned());
            self.case(
                format!("refused: {name}"),
                machine,
                format!("suite=heat {words}"),
                Expect::Refusal(said),
            )
        };
        refused.into_iter().map(case).collect()
    }

    fn age(
        &self,
        name: String,
        model: &str,
        cpus: u32,
        append: String,
        check: fn(&[Transcript]) -> Verdict,
    ) -> Case {
        let machine = self.machine(|machine| {
            (machine.cpu, machine.cpus, machine.memory_mib) = (model.to_owned(), cpus, 1024);
        });
        self.case(name, machine, append, Expect::Good(check))
    }
}

/// Whether the CPU that a run was on sets access flags itself.
fn has_flags(run: &Transcript) -> Result<bool, String> {
    let features = run.machine.get("features").and_then(|it| it.as_array());
    let features = features.ok_or("the run does not say what its CPUs can")?;
    Ok(features.iter().any(|feature| feature == "haf"))
}

/// Every pass found what was used, under one invalidation and, in mode `lockless`, no lock; access-flag faults are taken where
/// hardware sets no flags, and there only. The scan ends when its slot does.
fn working_set_is_true(runs: &[Transcript]) -> Verdict {
    let mut scans = 0;
    for run in runs {
        let hardware = has_flags(run)?;
        for row in run.rows.iter().map(super::checks::row) {
            if row.case == "scan" {
                scans += 1;
                scan_is_true(&row, hardware)?;
            }
        }
    }
    match scans {
        0 => Err("no scan".into()),
        _ => Ok(()),
    }
}

fn scan_is_true(row: &Row, hardware: bool) -> Verdict {
    for window in ["1", "4"] {
        at_most(row, &format!("error_{window}_ppm"), MOST_ERROR_PPM)?;
    }
    same(row, "tlbi_vmid_aging", value(row, "passes")?)?;
    if row.param("locking") == "lockless" {
        same(row, "lock_acquired_aging", 0.0)?;
    }
    if row.values.get("ends_with_its_slot") != Some(&true.into()) {
        return Err("the scan goes on without its slot".into());
    }
    match hardware {
        true => same(row, "faults_access", 0.0),
        false => at_least(row, "faults_access", 1.0),
    }
}

/// Passes begin a period apart, and take no more than their share of the time: whichever takes longer.
fn pace_is_kept(runs: &[Transcript]) -> Verdict {
    working_set_is_true(runs)?;
    let rows = runs
        .iter()
        .flat_map(|run| &run.rows)
        .map(super::checks::row);
    let passes: Vec<Row> = rows.filter(|row| row.case == "pass").collect();
    let [first, .., last] = &passes[..] else {
        return Err("fewer than two passes".into());
    };
    let param = |key: &str| {
        let number = first.param(key).parse::<f64>();
        number.map_err(|_| format!("no {key}"))
    };
    let span = value(last, "began_ns")? - value(first, "began_ns")?;
    let (mut busy, mut periods) = (0.0, 0.0);
    for pass in passes.iter().rev().skip(1) {
        busy += value(pass, "busy_ns")?;
        periods += 1e3 * param("period_us")?;
    }
    let rested = busy * 100.0 / param("budget")?;
    if span * SLACK < periods || span * SLACK < rested {
        return Err(format!(
            "{span} ns for {} passes of {busy} ns together",
            passes.len() - 1
        ));
    }
    Ok(())
}

/// Faults take as many instructions with passes in between as without, or fewer where a fault settles more at once; in mode `lockless` a pass takes no lock; and idle memory
/// costs a fault a page where faults set the flags, none where hardware does.
fn faults_do_not_notice(runs: &[Transcript]) -> Verdict {
    every_mode(runs)?;
    each(runs, |row| match row.case.as_str() {
        "faults" => {
            for fault in ["missing", "write"] {
                let pages = value(row, "pages")?;
                same(row, &format!("{fault}_faults"), pages)?;
                same(row, &format!("{fault}_aging_faults"), pages)?;
                let without = value(row, &format!("{fault}_insn"))?;
                let with = format!("{fault}_aging_insn");
                match (fault, row.param("access_flag").as_str()) {
                    // An access-flag fault settles the write too, and a leaf that is old is not cached: one invalidation less.
                    ("write", "software") => at_most(row, &with, without)?,
                    _ => same(row, &with, without)?,
                }
            }
            Ok(())
        }
        "phases" => {
            let young = value(row, "mark_read_idle_young")?;
            for pass in ["mark_write_idle", "mark_read_idle", "mark_marked"] {
                same(row, &format!("{pass}_tlbi_broadcast"), 1.0)?;
                match row.param("locking").as_str() {
                    "lockless" => same(row, &format!("{pass}_lock_acquired"), 0.0)?,
                    _ => at_least(row, &format!("{pass}_lock_acquired"), 1.0)?,
                }
            }
            for pass in ["write_idle", "read_idle"] {
                let key = format!("{pass}_faults_access");
                match row.param("access_flag").as_str() {
                    "hardware" => same(row, &key, 0.0)?,
                    // Those of the guest's own code, tables and stack among them.
                    _ => at_most(row, &key, young + 8.0).and(at_least(row, &key, young))?,
                }
            }
            Ok(())
        }
        _ => touched_in(row),
    })
}

/// Nothing that was touched after it had been marked is idle; in mode `lockless` no pass takes a lock while vCPUs fault.
fn touched_is_young(runs: &[Transcript]) -> Verdict {
    every_mode(runs)?;
    each(runs, |row| match row.case.as_str() {
        "live" => {
            at_least(row, "passes", 1.0)?;
            match row.param("locking").as_str() {
                "lockless" => same(row, "lock_acquired_aging", 0.0),
                _ => at_least(row, "lock_acquired_aging", 1.0),
            }
        }
        "phases" => Ok(()),
        _ => touched_in(row),
    })
}

fn touched_in(row: &Row) -> Verdict {
    at_least(row, "pages_touched", 1.0)?;
    same(row, "touched_idle", 0.0)?;
    match row.case.as_str() {
        "touched" => same(row, "untouched_young", 0.0),
        _ => Ok(()),
    }
}

/// An imprecise pass does not see what is used all the time; a precise one does.
fn imprecise_is_wrong(runs: &[Transcript]) -> Verdict {
    each(runs, |row| match row.case.as_str() {
        "touched" | "hot" if row.param("precision") == "precise" => touched_in(row),
        _ => Ok(()),
    })?;
    let rows = runs
        .iter()
        .flat_map(|run| &run.rows)
        .map(super::checks::row);
    let mut wrong = 0.0;
    for row in rows.filter(|row| row.param("precision") == "imprecise") {
        wrong += value(&row, "touched_idle")?;
    }
    match wrong > 0.0 {
        true => Ok(()),
        false => Err("it sees all".into()),
    }
}

/// The copy is the memory, each engine did its own work, and what was touched at last is young.
fn nothing_lost_nor_idle(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        for (key, least) in [
            ("rounds", 1.0),
            ("passes", 4.0),
            ("young", 1.0),
            ("stores", 1.0),
        ] {
            at_least(row, key, least)?;
        }
        same(row, "pages_lost", 0.0)?;
        same(row, "lock_acquired", 0.0)?;
        touched_in(row)
    })
}

fn at_most(row: &Row, key: &str, most: f64) -> Verdict {
    let found = value(row, key)?;
    match found <= most {
        true => Ok(()),
        false => Err(format!("{}: {key} is {found}, {most} at most", row.case)),
    }
}

fn at_least(row: &Row, key: &str, least: f64) -> Verdict {
    let found = value(row, key)?;
    match found >= least {
        true => Ok(()),
        false => Err(format!("{}: {key} is {found}, {least} at least", row.case)),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        faults_do_not_notice, imprecise_is_wrong, nothing_lost_nor_idle, pace_is_kept,
        touched_is_young, working_set_is_true,
    };
    use crate::uart::{Transcript, parse};

    /// A run on a CPU with `features` whose rows have a case, parameters and values.
    fn run(features: &str, rows: &[(&str, &str, &str)]) -> [Transcript; 1] {
        let mut run = Transcript::default();
        run.add(parse(&format!(
            r#"{{"vellum":"machine","cpu":"x","features":[{features}]}}"#
        )));
        for (case, params, values) in rows {
            run.add(parse(&format!(
                r#"{{"vellum":"row","suite":"age","case":"{case}","params":{{{params}}},"values":{{{values}}}}}"#
            )));
        }
        [run]
    }

    /// A row of `case` in each mode.
    fn modes<'a>(case: &'a str, values: &'a str) -> [(&'a str, &'static str, &'a str); 3] {
        [
            (
                case,
                r#""locking":"mutex","access_flag":"hardware""#,
                values,
            ),
            (
                case,
                r#""locking":"rwlock","access_flag":"hardware""#,
                values,
            ),
            (
                case,
                r#""locking":"lockless","access_flag":"hardware""#,
                values,
            ),
        ]
    }

    const SCAN: &str = r#""passes":9,"error_1_ppm":10000,"error_4_ppm":0,"tlbi_vmid_aging":9,"lock_acquired_aging":0,"faults_access":0,"ends_with_its_slot":true"#;
    const LOCKLESS: &str = r#""locking":"lockless""#;

    #[test]
    fn a_working_set_that_is_not_the_truth_is_found() {
        let of =
            |values: &str| working_set_is_true(&run(r#""haf""#, &[("scan", LOCKLESS, values)]));
        assert_eq!(of(SCAN), Ok(()));
        for (from, to) in [
            ("10000", "10001"),
            (r#"4_ppm":0"#, r#"4_ppm":10001"#),
            (r#"aging":9"#, r#"aging":8"#),
            (r#"aging":0"#, r#"aging":1"#),
            (r#"access":0"#, r#"access":1"#),
            ("true", "false"),
        ] {
            let bad = SCAN.replace(from, to);
            assert_ne!(bad, SCAN);
            assert!(of(&bad).is_err(), "{to}");
        }
        let faulting = SCAN.replace(r#"access":0"#, r#"access":1"#);
        let without = |values: &str| working_set_is_true(&run("", &[("scan", LOCKLESS, values)]));
        assert_eq!(without(&faulting), Ok(()));
        assert!(without(SCAN).is_err(), "who set the flags?");
        assert!(working_set_is_true(&run(r#""haf""#, &[])).is_err());
    }

    #[test]
    fn a_scan_that_comes_too_early_is_found() {
        let of = |began: u32, busy: u32| {
            let params = r#""period_us":1000,"budget":10"#;
            let pass = |at: u32| format!(r#""began_ns":{at},"busy_ns":{busy}"#);
            let (first, second) = (pass(0), pass(began));
            pace_is_kept(&run(
                r#""haf""#,
                &[
                    ("scan", LOCKLESS, SCAN),
                    ("pass", params, &first),
                    ("pass", params, &second),
                ],
            ))
        };
        assert_eq!(of(1_000_000, 100_000), Ok(()));
        assert!(of(900_000, 1).is_err() && of(1_000_000, 120_000).is_err());
    }

    #[test]
    fn touched_memory_that_is_idle_is_found() {
        let of = |case: &str, values: &str| touched_is_young(&run("", &modes(case, values)));
        let good = r#""pages_touched":9,"touched_idle":0,"untouched_young":0"#;
        assert_eq!(of("touched", good), Ok(()));
        assert!(of("touched", &good.replace(r#"idle":0"#, r#"idle":1"#)).is_err());
        assert!(of("touched", &good.replace(r#"young":0"#, r#"young":1"#)).is_err());
        assert!(of("hot", &good.replace(r#"touched":9"#, r#"touched":0"#)).is_err());
        let live = |locks: u32| format!(r#""passes":3,"lock_acquired_aging":{locks}"#);
        assert!(of("live", &live(0)).is_err(), "mutex takes it");
        assert!(of("live", &live(1)).is_err(), "lockless does not");
    }

    #[test]
    fn a_fault_that_takes_longer_is_found() {
        let good = r#""pages":9,"missing_faults":9,"missing_aging_faults":9,"missing_insn":7,"missing_aging_insn":7,"write_faults":9,"write_aging_faults":9,"write_insn":5,"write_aging_insn":5"#;
        let of = |values: &str| faults_do_not_notice(&run("", &modes("faults", values)));
        assert_eq!(of(good), Ok(()));
        for (from, to) in [
            (r#"missing_aging_insn":7"#, r#"missing_aging_insn":8"#),
            (r#"write_aging_insn":5"#, r#"write_aging_insn":4"#),
            (r#"write_aging_faults":9"#, r#"write_aging_faults":10"#),
        ] {
            assert!(of(&good.replace(from, to)).is_err(), "{to}");
        }
    }

    #[test]
    fn an_imprecise_pass_that_sees_all_is_found() {
        let of = |idle: u32| {
            let values = format!(r#""pages_touched":9,"touched_idle":{idle}"#);
            imprecise_is_wrong(&run("", &[("hot", r#""precision":"imprecise""#, &values)]))
        };
        assert_eq!(of(3), Ok(()));
        assert!(of(0).is_err());
    }

    #[test]
    fn a_soak_that_lost_a_page_is_found() {
        let good = r#""rounds":1,"passes":4,"young":1,"stores":1,"pages_lost":0,"lock_acquired":0,"pages_touched":1,"touched_idle":0"#;
        let of = |values: &str| nothing_lost_nor_idle(&run("", &[("loop", LOCKLESS, values)]));
        assert_eq!(of(good), Ok(()));
        for (from, to) in [
            (r#"lost":0"#, r#"lost":1"#),
            (r#"idle":0"#, r#"idle":1"#),
            (r#"acquired":0"#, r#"acquired":1"#),
            (r#"stores":1"#, r#"stores":0"#),
        ] {
            assert!(of(&good.replace(from, to)).is_err(), "{to}");
        }
    }
}
