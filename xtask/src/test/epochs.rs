//! Cases about epochs: protecting everything at once by each engine, and what must hold of their rows.

use super::cases::{Case, Expect, Table};
use super::checks::{Verdict, each, nothing_lost, row, same, value};
use crate::bench::Row;
use crate::machine::{Machine, Timing};
use crate::uart::Transcript;

/// What is tested on each CPU model: the one with 8-bit VMIDs and the one with everything.
const MODELS: [(&str, &[&str]); 2] = [
    ("cortex-a72", &["engine=walk", "engine=lazy", "engine=swap"]),
    (
        "max",
        &[
            "engine=walk",
            "engine=lazy",
            "engine=swap",
            "engine=swap bbm=0",
            "engine=pie",
            "engine=walk tracking=dbm",
        ],
    ),
];
/// How much longer the call may take with four times the memory, where it does not depend on it.
const FLAT: f64 = 1.05;
/// Instructions by which two calls of engine `lazy` may differ for other reasons, as those that end odd and even epochs do.
const FLAT_LAZY: f64 = 40.0;
/// Instructions that engine `lazy` may spend on a root entry.
const ROOT_ENTRY: f64 = 12.0;
/// How much longer rewriting everything may take after engine `pie` than after `walk`.
const REWRITING: f64 = 1.03;

impl Table<'_> {
    /// Epochs by every engine.
    pub(super) fn epochs(&self) -> Vec<Case> {
        let (epochs, mib) = if self.soak { (10_000, 16) } else { (1000, 4) };
        let mut cases = Vec::new();
        for (model, engines) in MODELS {
            for engine in engines {
                let append =
                    format!("suite=epochs vcpus=2 mib={mib} backing=2m epochs={epochs} {engine}");
                let name = format!("{epochs} epochs report what was written, {engine}, {model}");
                cases.push(self.epoch(name, model, append, epochs_are_exact));
            }
            for suite in ["verify iterations=3 rounds=8", "churn seconds=2"] {
                for words in engines {
                    let append = format!("suite={suite} vcpus=3 mib=4 backing=2m {words}");
                    let suite = suite.split(' ').next().unwrap_or_default();
                    let name = format!("suite {suite} loses nothing with {words}, {model}");
                    cases.push(self.epoch(name, model, append, nothing_lost));
                }
            }
            let engines = names(engines);
            for backing in ["4k", "2m"] {
                let append = format!(
                    "suite=protect timing=insn vcpus=1 slot-mib=64 backing={backing} engine={engines} bbm=0"
                );
                let name =
                    format!("a call costs what its engine says, leaves of {backing}, {model}");
                let case = self.epoch(name, model, append, calls_are_as_promised);
                cases.push(timed(case));
            }
        }
        let entries = "suite=protect timing=insn vcpus=1 slot-mib=1024,16384 stride=1g backing=2m engine=walk,lazy,swap,pie";
        let name = "a call costs a few instructions for each root entry at most";
        let mut entries = timed(self.epoch(
            name.to_owned(),
            "max",
            entries.to_owned(),
            calls_do_not_grow,
        ));
        for boot in &mut entries.boots {
            boot.machine.memory_mib = 18_000;
        }
        cases.push(entries);
        let sizes = if self.soak { "256,2048" } else { "32,128" };
        for backing in ["4k", "2m"] {
            let append = format!(
                "suite=protect timing=insn vcpus=1 slot-mib={sizes} backing={backing} engine=walk,lazy,swap,pie"
            );
            let name =
                format!("a call takes as long with four times the memory, leaves of {backing}");
            let case = self.epoch(name, "max", append, calls_do_not_grow);
            cases.push(timed(case));
        }
        let append = "suite=checkpoint vcpus=2 mib=4 backing=2m epochs=5 epoch-us=1000 engine=walk,lazy,swap,pie";
        cases.push(self.epoch(
            "checkpoints of a running guest are whole".to_owned(),
            "max",
            append.to_owned(),
            nothing_lost,
        ));
        cases.extend(self.refused_engines());
        cases
    }

    /// Engines and trackers that cannot be had.
    fn refused_engines(&self) -> Vec<Case> {
        let refused = [
            (
                "permission indirection on a CPU without it",
                "cortex-a72",
                "engine=pie",
                "engine=pie': the CPU does not have FEAT_S2PIE",
            ),
            (
                "dirty state on a CPU without it",
                "cortex-a72",
                "tracking=dbm",
                "tracking=dbm': the CPU does not have FEAT_HAFDBS",
            ),
            (
                "dirty state with an engine that needs faults",
                "max",
                "engine=swap tracking=dbm",
                "only engine=walk",
            ),
            (
                "an unknown engine",
                "max",
                "engine=steam",
                "engine is one of auto, walk, lazy, swap, pie",
            ),
            (
                "an unknown tracker",
                "max",
                "tracking=ring",
                "tracking is one of fault, dbm",
            ),
        ];
        let case = |(name, model, words, said): (&str, &str, &str, &'static str)| {
            let machine = self.machine(|machine| machine.cpu = model.to_owned());
            let append = format!("suite=epochs {words}");
            self.case(
                format!("refused: {name}"),
                machine,
                append,
                Expect::Refusal(said),
            )
        };
        refused.into_iter().map(case).collect()
    }

    fn epoch(
        &self,
        name: String,
        model: &str,
        append: String,
        check: fn(&[Transcript]) -> Verdict,
    ) -> Case {
        let machine = self.machine(|machine| {
            (machine.cpu, machine.cpus) = (model.to_owned(), 4);
            machine.memory_mib = if self.soak { 4096 } else { 1024 };
        });
        self.case(name, machine, append, Expect::Good(check))
    }
}

/// The engines of a list of boot arguments, each once.
fn names(engines: &[&str]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for words in engines {
        let name = words
            .split(' ')
            .next()
            .and_then(|it| it.strip_prefix("engine="));
        names.extend(name.filter(|name| !names.contains(name)));
    }
    names.join(",")
}

/// The same case with instructions counted, and a vCPU's worth of CPUs.
fn timed(mut case: Case) -> Case {
    for boot in &mut case.boots {
        boot.machine = Machine {
            timing: Timing::Insn,
            cpus: 2,
            ..boot.machine.clone()
        };
    }
    case
}

/// Every epoch was closed by the engine asked for, and reported what was written in it: exactly with the vCPUs stopped,
/// byte for byte in a copy while they ran.
fn epochs_are_exact(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        about(row, || {
            same(row, "pages_lost", 0.0)?;
            same(row, "calls_replaced", 0.0)?;
            same(row, "unprepared", 0.0)?;
            if row.case == "stopped" {
                same(row, "pages_extra", 0.0)?;
            } else {
                at_least(row, "stores", 1.0)?;
            }
            at_least(row, "pages_reported", 1.0)?;
            at_least(row, "epochs", 1000.0)
        })
    })?;
    let cases = |case: &str| {
        runs.iter()
            .flat_map(|run| &run.rows)
            .any(|row| row.case == case)
    };
    match cases("stopped") && cases("running") {
        true => Ok(()),
        false => Err("a case is missing".into()),
    }
}

/// What a call writes and invalidates, and what readers meet after it.
fn calls_are_as_promised(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        about(row, || {
            same(row, "pages_lost", 0.0)?;
            same(row, "pages_extra", 0.0)?;
            same(row, "calls_replaced", 0.0)?;
            same(row, "calls_late", 0.0)?;
            let entries = value(row, "root_entries")?;
            match row.param("engine").as_str() {
                "walk" => {
                    same(row, "read_faults", 0.0)?;
                    at_least(row, "descriptor_writes_call", 64.0 * 256.0)
                }
                "lazy" => {
                    at_most(row, "descriptor_writes_call", entries)?;
                    // A table for each 2 MiB, which the pages written have made, and one below each root entry, which
                    // whoever comes first goes through on the way.
                    same(row, "read_faults", 64.0 / 2.0)?;
                    same(row, "read_push_downs", 64.0 / 2.0 + entries)
                }
                "swap" => {
                    same(row, "descriptor_writes_call", 0.0)?;
                    same(row, "tlbi_broadcast_call", 0.0)?;
                    same(row, "read_faults", 0.0)
                }
                _ => {
                    same(row, "descriptor_writes_call", 0.0)?;
                    same(row, "tlbi_broadcast_call", 1.0)?;
                    same(row, "tlbi_vmid_call", 1.0)?;
                    same(row, "read_faults", 0.0)
                }
            }
        })
    })
}

/// With more memory the call takes as long, but for engine `walk`, and a few instructions a root entry for `lazy`; and
/// after `pie` everything is rewritten about as fast as after `walk`.
fn calls_do_not_grow(runs: &[Transcript]) -> Verdict {
    let rows: Vec<Row> = runs.iter().flat_map(|run| &run.rows).map(row).collect();
    let of = |engine: &str| -> Result<(&Row, &Row), String> {
        let mut of = rows.iter().filter(|row| row.param("engine") == engine);
        let least = of.next().ok_or_else(|| format!("no row for {engine}"))?;
        Ok((least, of.next_back().unwrap_or(least)))
    };
    for engine in ["lazy", "swap", "pie"] {
        let (least, most) = of(engine)?;
        let (before, after) = (value(least, "call_mean_ns")?, value(most, "call_mean_ns")?);
        let entries = value(most, "root_entries")? - value(least, "root_entries")?;
        let allowed = match engine {
            "lazy" => before + FLAT_LAZY + ROOT_ENTRY * entries,
            _ => FLAT * before,
        };
        if after > allowed {
            return Err(format!(
                "{engine}: {before} instructions, then {after} with {entries} root entries more; {allowed} at most"
            ));
        }
    }
    let (_, walk) = of("walk")?;
    let (_, pie) = of("pie")?;
    let (walk, pie) = (value(walk, "rewrite_ns")?, value(pie, "rewrite_ns")?);
    match pie <= REWRITING * walk {
        true => nothing_lost(runs),
        false => Err(format!(
            "rewriting takes {walk} instructions after walk, {pie} after pie"
        )),
    }
}

/// Names the case and engine that a verdict is about.
fn about(row: &Row, judge: impl FnOnce() -> Verdict) -> Verdict {
    judge().map_err(|why| format!("{}, {}: {why}", row.case, row.param("engine")))
}

fn at_most(row: &Row, key: &str, most: f64) -> Verdict {
    let found = value(row, key)?;
    match found <= most {
        true => Ok(()),
        false => Err(format!("{key} is {found}, {most} at most")),
    }
}

fn at_least(row: &Row, key: &str, least: f64) -> Verdict {
    let found = value(row, key)?;
    match found >= least {
        true => Ok(()),
        false => Err(format!("{key} is {found}, {least} at least")),
    }
}

#[cfg(test)]
mod tests {
    use super::{calls_are_as_promised, calls_do_not_grow, epochs_are_exact, names};
    use crate::uart::{Transcript, parse};

    fn run(rows: &[(&str, &str, &str)]) -> Transcript {
        let mut all = Transcript::default();
        for (case, engine, values) in rows {
            all.add(parse(&format!(
                r#"{{"vellum":"row","suite":"epochs","case":"{case}","params":{{"engine":"{engine}"}},"values":{{{values}}}}}"#
            )));
        }
        all
    }

    const EXACT: &str = r#""pages_lost":0,"pages_extra":0,"calls_replaced":0,"unprepared":0,"pages_reported":9,"stores":9,"epochs":1000"#;

    #[test]
    fn an_epoch_that_lost_a_page_or_had_another_engine_is_found() {
        let of = |values: &str| {
            epochs_are_exact(&[run(&[
                ("stopped", "swap", values),
                ("running", "swap", values),
            ])])
        };
        assert_eq!(of(EXACT), Ok(()));
        for (from, to) in [
            (r#"lost":0"#, r#"lost":1"#),
            (r#"extra":0"#, r#"extra":1"#),
            (r#"replaced":0"#, r#"replaced":1"#),
            (r#"epochs":1000"#, r#"epochs":999"#),
            (r#"stores":9"#, r#"stores":0"#),
        ] {
            let bad = EXACT.replace(from, to);
            assert_ne!(bad, EXACT);
            assert!(of(&bad).is_err(), "{to}");
        }
        assert!(epochs_are_exact(&[run(&[("stopped", "swap", EXACT)])]).is_err());
    }

    #[test]
    fn each_engine_has_promises_of_its_own() {
        let of = |engine: &str, writes: u32, broadcast: u32, faults: u32| {
            let values = format!(
                r#""pages_lost":0,"pages_extra":0,"calls_replaced":0,"calls_late":0,"root_entries":1,"descriptor_writes_call":{writes},"tlbi_broadcast_call":{broadcast},"tlbi_vmid_call":{broadcast},"read_faults":{faults},"read_push_downs":33"#
            );
            calls_are_as_promised(&[run(&[("stopped", engine, &values)])])
        };
        for (engine, writes, broadcast, faults) in [
            ("walk", 16_384, 1, 0),
            ("lazy", 1, 1, 32),
            ("swap", 0, 0, 0),
            ("pie", 0, 1, 0),
        ] {
            assert_eq!(of(engine, writes, broadcast, faults), Ok(()), "{engine}");
            assert!(
                of(engine, writes, broadcast, faults + 1).is_err(),
                "{engine}"
            );
        }
        assert!(of("lazy", 2, 1, 32).is_err());
        assert!(of("swap", 1, 0, 0).is_err() && of("swap", 0, 1, 0).is_err());
        assert!(of("pie", 1, 1, 0).is_err() && of("pie", 0, 2, 0).is_err());
    }

    #[test]
    fn calls_are_compared_with_those_on_less_memory() {
        let of = |lazy: u32, pie: u32, rewrite: u32| {
            let values = |call: u32, entries: u32, rewrite: u32| {
                format!(
                    r#""pages_lost":0,"call_mean_ns":{call},"root_entries":{entries},"rewrite_ns":{rewrite}"#
                )
            };
            let (small, walk) = (values(1000, 1, 1000), values(9000, 3, 1000));
            let (lazy, pie) = (values(lazy, 3, 1000), values(pie, 3, rewrite));
            calls_do_not_grow(&[run(&[
                ("stopped", "walk", &small),
                ("stopped", "lazy", &small),
                ("stopped", "swap", &small),
                ("stopped", "pie", &small),
                ("stopped", "walk", &walk),
                ("stopped", "lazy", &lazy),
                ("stopped", "pie", &pie),
            ])])
        };
        assert_eq!(of(1064, 1050, 1030), Ok(()));
        assert!(of(1065, 1050, 1030).is_err());
        assert!(of(1032, 1051, 1030).is_err());
        assert!(of(1032, 1050, 1031).is_err());
    }

    #[test]
    fn engines_are_named_once() {
        assert_eq!(
            names(&[
                "engine=walk",
                "engine=swap",
                "engine=swap bbm=0",
                "engine=walk tracking=dbm"
            ]),
            "walk,swap"
        );
    }
}
