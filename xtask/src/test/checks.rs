//! What must hold of the rows of a run. Each check says in words what it found when it does not hold.

use crate::bench::Row;
use crate::machine::Timing;
use crate::uart::{Measured, Object, Transcript};

/// The result of a check.
pub(super) type Verdict = Result<(), String>;

/// It is enough that the run ended well.
pub(super) fn ends(_: &[Transcript]) -> Verdict {
    Ok(())
}

/// At least one row, and nothing that was written went unreported.
pub(super) fn nothing_lost(runs: &[Transcript]) -> Verdict {
    each(runs, |row| same(row, "pages_lost", 0.0))
}

/// One vCPU, every page written in each iteration: a permission fault for each page, no broadcast invalidation and one
/// descriptor write for each fault, and no lock at all in mode `lockless`.
pub(super) fn faults_are_exact(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        let written = value(row, "pages_written")?;
        same(row, "pages_reported", written)?;
        same(row, "pages_lost", 0.0)?;
        same(row, "faults_permission", written)?;
        same(row, "descriptor_writes", written)?;
        same(row, "tlbi_broadcast", 0.0)?;
        if row.param("locking") == "lockless" {
            same(row, "lock_acquired", 0.0)
        } else {
            Ok(())
        }
    })
}

/// The fast path stays below its target in mode `lockless`.
pub(super) fn fault_is_short(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        let cost = value(row, "fault_insn")?;
        match row.param("locking").as_str() {
            "lockless" if cost > 300.0 => Err(format!(
                "a write fault takes {cost:.0} instructions; the target is 300"
            )),
            _ => Ok(()),
        }
    })
}

/// In a debug build: mode `lockless` writes no line that another vCPU's fault writes, but the leaf's and the bitmap word's.
pub(super) fn nothing_shared(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        if row.param("locking") == "lockless" {
            same(row, "shared_line_writes", 0.0)
        } else {
            Ok(())
        }
    })
}

/// Under `insn` timing two runs agree within 0.1 %.
pub(super) fn runs_agree(runs: &[Transcript]) -> Verdict {
    let [first, second] = runs else {
        return Err("two runs are compared".into());
    };
    if first.rows.len() != second.rows.len() || first.rows.is_empty() {
        return Err(format!(
            "{} rows, then {}",
            first.rows.len(),
            second.rows.len()
        ));
    }
    for (before, after) in first.rows.iter().zip(&second.rows) {
        for key in before.values.keys().filter(|key| key.ends_with("_ns")) {
            let (a, b) = (value(&row(before), key)?, value(&row(after), key)?);
            if (a - b).abs() > 0.001 * a.max(b) {
                return Err(format!("{key} was {a}, then {b}"));
            }
        }
    }
    Ok(())
}

/// Eight vCPUs that fault at once: they contend for the lock in mode `mutex`, hardly in `rwlock`, and take none in
/// `lockless`. How much they contend in `mutex` is the host's: on few CPUs, and with traps that cost the emulator far more
/// than what the lock protects, vCPUs seldom meet there.
pub(super) fn contention_is_as_expected(runs: &[Transcript]) -> Verdict {
    let share = |mode: &str| -> Result<f64, String> {
        let (mut acquired, mut contended) = (0.0, 0.0);
        for row in runs
            .iter()
            .flat_map(|run| &run.rows)
            .map(row)
            .filter(|row| row.param("locking") == mode)
        {
            acquired += value(&row, "lock_acquired")?;
            contended += value(&row, "lock_contended")?;
        }
        match mode {
            "lockless" => Ok(acquired),
            _ if acquired == 0.0 => Err(format!("{mode} took no lock")),
            _ => Ok(contended / acquired),
        }
    };
    let (mutex, rwlock, lockless) = (share("mutex")?, share("rwlock")?, share("lockless")?);
    if lockless != 0.0 {
        return Err(format!("lockless took {lockless} locks"));
    }
    if rwlock > 0.001 || mutex < rwlock {
        return Err(format!(
            "contended: {:.3} % in mutex, {:.3} % in rwlock (at most 0.1)",
            100.0 * mutex,
            100.0 * rwlock
        ));
    }
    Ok(())
}

/// `get` of the second, larger slot costs less than twice that of the first.
pub(super) fn get_scales_with_dirty_pages(runs: &[Transcript]) -> Verdict {
    let cost = |run: Option<&Transcript>| {
        let row = run.and_then(|run| run.rows.first()).ok_or("no row")?;
        value(&self::row(row), "get_ns")
    };
    let (small, large) = (cost(runs.first())?, cost(runs.get(1))?);
    if large >= 2.0 * small {
        Err(format!(
            "{small} for the small slot, {large} for the large one"
        ))
    } else {
        Ok(())
    }
}

/// Every exclusive acquisition ended, in every mode.
pub(super) fn exclusive_gets_its_turn(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        if value(row, "exclusive_acquired")? > 0.0 {
            Ok(())
        } else {
            Err("no exclusive section".into())
        }
    })?;
    every_mode(runs)
}

/// The guest checked something and found what it was promised.
pub(super) fn guest_is_content(runs: &[Transcript]) -> Verdict {
    each(runs, |row| {
        same(row, "failed_mask", 0.0).map_err(|why| format!("{}: {why}", row.case))
    })?;
    let checks = |measured: &Measured| value(&row(measured), "checks");
    let counts: Vec<f64> = runs
        .iter()
        .flat_map(|run| &run.rows)
        .map(checks)
        .collect::<Result<_, _>>()?;
    // One vCPU has nobody to send an interrupt to, so a single row may be empty.
    if counts.iter().sum::<f64>() > 0.0 {
        Ok(())
    } else {
        Err("nothing was checked".into())
    }
}

/// Three modes completed and lost nothing.
pub(super) fn every_mode_completes(runs: &[Transcript]) -> Verdict {
    nothing_lost(runs)?;
    every_mode(runs)
}

/// A row for each of the three modes.
pub(super) fn every_mode(runs: &[Transcript]) -> Verdict {
    for mode in ["mutex", "rwlock", "lockless"] {
        let mut rows = runs.iter().flat_map(|run| &run.rows).map(row);
        if !rows.any(|row| row.param("locking") == mode) {
            return Err(format!("no row for {mode}"));
        }
    }
    Ok(())
}

/// `check` holds of every row, and there is one.
pub(super) fn each(runs: &[Transcript], check: impl Fn(&Row) -> Verdict) -> Verdict {
    let mut count = 0;
    for measured in runs.iter().flat_map(|run| &run.rows) {
        let row = row(measured);
        check(&row).map_err(|why| {
            format!(
                "{} vCPUs, {}: {why}",
                row.param("vcpus"),
                row.param("locking")
            )
        })?;
        count += 1;
    }
    if count == 0 {
        Err("the run measured nothing".into())
    } else {
        Ok(())
    }
}

/// A row as the checks read it.
pub(super) fn row(measured: &Measured) -> Row {
    Row::new(
        measured.clone(),
        &measured.suite,
        &Object::new(),
        "",
        Timing::Insn,
    )
}

/// A value that must be there.
pub(super) fn value(row: &Row, key: &str) -> Result<f64, String> {
    row.value(key).ok_or_else(|| format!("no value {key}"))
}

/// A value that must be this.
pub(super) fn same(row: &Row, key: &str, expected: f64) -> Verdict {
    let found = value(row, key)?;
    if found == expected {
        Ok(())
    } else {
        Err(format!("{key} is {found}, not {expected}"))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        contention_is_as_expected, ends, every_mode_completes, faults_are_exact,
        get_scales_with_dirty_pages, guest_is_content, nothing_lost, runs_agree,
    };
    use crate::uart::{Transcript, parse};

    fn run(rows: &[(&str, &str)]) -> Transcript {
        let mut all = Transcript::default();
        for (locking, values) in rows {
            let line = format!(
                r#"{{"vellum":"row","suite":"dirty","params":{{"locking":"{locking}"}},"values":{{{values}}}}}"#
            );
            all.add(parse(&line));
        }
        all
    }

    #[test]
    fn a_lost_page_and_an_empty_run_are_found() {
        assert!(nothing_lost(&[run(&[("mutex", r#""pages_lost":0"#)])]).is_ok());
        assert!(nothing_lost(&[run(&[("mutex", r#""pages_lost":1"#)])]).is_err());
        assert!(nothing_lost(&[run(&[])]).is_err());
        assert!(ends(&[run(&[])]).is_ok());
    }

    #[test]
    fn counts_of_the_fault_path_are_compared_one_by_one() {
        let good = r#""pages_written":9,"pages_reported":9,"pages_lost":0,"faults_permission":9,"descriptor_writes":9,"tlbi_broadcast":0,"lock_acquired":0"#;
        assert!(faults_are_exact(&[run(&[("lockless", good)])]).is_ok());
        for (from, to) in [
            ("reported\":9", "reported\":8"),
            ("permission\":9", "permission\":10"),
            ("writes\":9", "writes\":18"),
            ("broadcast\":0", "broadcast\":1"),
            ("acquired\":0", "acquired\":9"),
        ] {
            let bad = good.replace(from, to);
            assert!(
                faults_are_exact(&[run(&[("lockless", &bad)])]).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn repeated_runs_may_differ_by_a_thousandth() {
        let of = |time: u32| run(&[("mutex", &format!(r#""dirty_ns":{time},"pages_written":5"#))]);
        assert!(runs_agree(&[of(100_000), of(100_099)]).is_ok());
        assert!(runs_agree(&[of(100_000), of(100_200)]).is_err());
        assert!(runs_agree(&[of(1)]).is_err());
    }

    #[test]
    fn contention_is_judged_by_mode() {
        let of = |mutex: u32, rwlock: u32, lockless: u32| {
            let values = |acquired: u32, contended: u32| {
                format!(r#""lock_acquired":{acquired},"lock_contended":{contended}"#)
            };
            run(&[
                ("mutex", &values(1000, mutex)),
                ("rwlock", &values(1000, rwlock)),
                ("lockless", &values(lockless, 0)),
            ])
        };
        assert!(contention_is_as_expected(&[of(60, 1, 0)]).is_ok());
        for bad in [of(0, 1, 0), of(60, 2, 0), of(60, 1, 1)] {
            assert!(contention_is_as_expected(&[bad]).is_err());
        }
    }

    #[test]
    fn a_guest_that_finds_a_fault_or_checks_nothing_is_found() {
        let of = |checks: u32, failed: u32| {
            run(&[
                (
                    "lockless",
                    &format!(r#""checks":{checks},"failed_mask":{failed}"#),
                ),
                ("lockless", r#""checks":0,"failed_mask":0"#),
            ])
        };
        assert!(guest_is_content(&[of(9, 0)]).is_ok());
        assert!(guest_is_content(&[of(9, 2)]).is_err());
        assert!(guest_is_content(&[of(0, 0)]).is_err());
    }

    #[test]
    fn get_may_cost_less_than_twice() {
        let of = |cost: u32| run(&[("mutex", &format!(r#""get_ns":{cost}"#))]);
        assert!(get_scales_with_dirty_pages(&[of(10), of(19)]).is_ok());
        assert!(get_scales_with_dirty_pages(&[of(10), of(20)]).is_err());
    }

    #[test]
    fn a_missing_mode_is_found() {
        let zero = r#""pages_lost":0"#;
        assert!(
            every_mode_completes(&[run(&[
                ("mutex", zero),
                ("rwlock", zero),
                ("lockless", zero)
            ])])
            .is_ok()
        );
        assert!(every_mode_completes(&[run(&[("mutex", zero), ("rwlock", zero)])]).is_err());
    }
}
