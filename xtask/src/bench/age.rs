//! Suite `age`: marking memory idle, and what it costs those who use it.

use anyhow::Result;

use super::options::Options;
use super::rows::{cell, cpu, distinct, mean};
use super::scaling::{self, Curve};
use super::{Job, Row, unit};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

/// Rounds with and without aging while memory is faulted in.
const ROUNDS: u32 = 16;
/// Pages of each vCPU under the parallel clock, unless said otherwise: every case takes many passes, and every CPU's work is done in turn.
const PAGES: u32 = 16;
/// The CPU model without hardware access flags.
const NO_FLAGS: &str = "cortex-a72";

/// Heading, and the number below it.
type Column = (&'static str, fn(&Row) -> Option<f64>);

/// The passes of the guest, and those that mark memory idle.
const PHASES: [(&str, &str); 8] = [
    ("populate", "populate_ns"),
    ("write", "write_ns"),
    ("read", "read_ns"),
    ("mark idle", "mark_write_idle_ns"),
    ("write idle", "write_idle_ns"),
    ("mark idle", "mark_read_idle_ns"),
    ("read idle", "read_idle_ns"),
    ("mark marked", "mark_marked_ns"),
];
const COUNTS: [Column; 9] = [
    ("entries", |row| row.value("mark_read_idle_leaves")),
    ("young", |row| row.value("mark_read_idle_young")),
    ("locked", |row| row.value("mark_read_idle_lock_acquired")),
    ("desc. writes", |row| {
        row.value("mark_read_idle_descriptor_writes")
    }),
    ("TLBI bcast", |row| {
        row.value("mark_read_idle_tlbi_broadcast")
    }),
    ("whole VMID", |row| row.value("mark_read_idle_tlbi_vmid")),
    ("faults: write idle", |row| {
        row.value("write_idle_faults_access")
    }),
    ("read idle", |row| row.value("read_idle_faults_access")),
    ("populate", |row| row.value("populate_faults_translation")),
];
const TOUCHED: [Column; 5] = [
    ("touched", |row| row.value("pages_touched")),
    ("young", |row| row.value("pages_young")),
    ("touched, idle", |row| row.value("touched_idle")),
    ("in %", |row| {
        Some(100.0 * row.value("touched_idle")? / row.value("pages_touched")?)
    }),
    ("untouched, young", |row| row.value("untouched_young")),
];
const LIVE: [Column; 14] = [
    ("asleep, us", |row| {
        Some(row.value("without_vcpu_ns")? / 1e3)
    }),
    ("elsewhere", |row| {
        Some(row.value("elsewhere_vcpu_ns")? / 1e3)
    }),
    ("here", |row| Some(row.value("with_vcpu_ns")? / 1e3)),
    ("here/asleep", ratio),
    ("here/elsewhere", |row| {
        Some(row.value("with_vcpu_ns")? / row.value("elsewhere_vcpu_ns")?)
    }),
    ("of the least", |row| {
        Some(row.value("with_least_ns")? / row.value("without_least_ns")?)
    }),
    ("least/elsewhere", |row| {
        Some(row.value("with_least_ns")? / row.value("elsewhere_least_ns")?)
    }),
    ("passes", |row| row.value("passes")),
    ("pass, us", |row| Some(row.value("pass_ns")? / 1e3)),
    ("entries", |row| row.value("leaves")),
    ("entries/us", |row| {
        Some(1e3 * row.value("leaves")? / (row.value("pass_ns")? * row.value("passes")?))
    }),
    ("per us lost", per_disturbance),
    ("locked", |row| row.value("lock_acquired_aging")),
    ("access faults", |row| row.value("faults_access")),
];
const FAULTS: [Column; 6] = [
    ("missing", |row| per_page(row, "missing_insn")),
    ("here", |row| per_page(row, "missing_aging_insn")),
    ("difference", |row| {
        difference(row, "missing_insn", "missing_aging_insn")
    }),
    ("write", |row| per_page(row, "write_insn")),
    ("here", |row| per_page(row, "write_aging_insn")),
    ("difference", |row| {
        difference(row, "write_insn", "write_aging_insn")
    }),
];

fn ratio(row: &Row) -> Option<f64> {
    Some(row.value("with_vcpu_ns")? / row.value("without_vcpu_ns")?)
}

/// Entries aged for each microsecond that vCPUs took longer, all of them together; nothing where they did not.
fn per_disturbance(row: &Row) -> Option<f64> {
    let longer = row.value("with_vcpu_ns")? - row.value("without_vcpu_ns")?;
    let number = |key: &str| row.param(key).parse::<f64>().ok();
    let lost_us = longer * number("vcpus")? * number("rounds")? / 1e3;
    (lost_us > 0.0).then_some(row.value("leaves")? / lost_us)
}

fn per_page(row: &Row, key: &str) -> Option<f64> {
    Some(row.value(key)? / row.value("pages")?)
}

fn difference(row: &Row, without: &str, with: &str) -> Option<f64> {
    Some(row.value(with)? - row.value(without)?)
}

/// Instructions for each leaf that a pass looked at.
fn per_entry(row: &Row, pass: &str) -> Option<f64> {
    Some(row.value(&format!("{pass}_ns"))? / row.value(&format!("{pass}_leaves"))?)
}

/// Instructions of one vCPU, with flags set by hardware, by faults, and on a CPU that has no other way; and real concurrency.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    for timing in options.timing() {
        let vcpus = match timing {
            Timing::Insn => vec![1],
            Timing::Wall | Timing::Parallel => options.vcpus(),
        };
        for (model, flag) in machines(options, board, timing) {
            let mut options = options.clone();
            options.cpu = Some(model);
            options.aging.access_flag = Some(flag.to_owned());
            if timing == Timing::Parallel && !options.full && options.mib_per_vcpu.is_none() {
                options.pages = options.pages.or(Some(PAGES));
            }
            let most = vcpus.iter().copied().max().unwrap_or(1);
            // The parallel clock's rounds are all alike.
            let rounds = if timing == Timing::Parallel {
                1
            } else {
                ROUNDS
            };
            let guest_mib = u64::from(most) * options.mib_per_vcpu(timing);
            let machine = options.machine(board, most, guest_mib, timing)?;
            jobs.push(Job {
                title: format!(
                    "{}, access flags {flag}, timing {}",
                    machine.cpu,
                    timing.name()
                ),
                append: format!(
                    "{} rounds={rounds} {}",
                    options.append("age", &vcpus, timing),
                    options.aging.append()
                ),
                machine,
            });
        }
    }
    Ok(jobs)
}

/// CPU models and who sets flags there.
fn machines<'a>(options: &'a Options, board: &Board, timing: Timing) -> Vec<(String, &'a str)> {
    let named = options.cpu.clone();
    if let Some(flag) = &options.aging.access_flag {
        return vec![(named.unwrap_or_else(|| board.machine.cpu.clone()), flag)];
    }
    match (named, timing) {
        (Some(model), _) => vec![(model, "auto")],
        (None, Timing::Parallel) => vec![
            (board.machine.cpu.clone(), "hardware"),
            (board.machine.cpu.clone(), "software"),
        ],
        (None, Timing::Wall) => vec![
            (board.machine.cpu.clone(), "hardware"),
            (NO_FLAGS.to_owned(), "software"),
        ],
        (None, Timing::Insn) => vec![
            (board.machine.cpu.clone(), "hardware"),
            (board.machine.cpu.clone(), "software"),
            (NO_FLAGS.to_owned(), "software"),
        ],
    }
}

/// What is told over numbers of vCPUs; of a pass the vCPU that takes longest, of `live` the mean.
const CURVES: [Curve; 4] = [
    ("phases", "write_idle_vcpu_ns", "writing idle memory"),
    (
        "phases",
        "mark_read_idle_ns",
        "marking all memory idle, all of it young",
    ),
    ("live", "without_vcpu_ns", "faulting memory in"),
    (
        "live",
        "with_vcpu_ns",
        "faulting memory in while it is aged",
    ),
];

/// Who sets flags, and the mode.
fn way(row: &Row) -> String {
    format!("{}, {}", row.param("access_flag"), row.param("locking"))
}

const LINE: [&str; 4] = ["CPU", "access flag", "vCPUs", "locking"];
const LEFT: [usize; 3] = [0, 1, 3];

/// What a line of a table is about.
fn line(row: &Row) -> Vec<String> {
    let mut cells = vec![cpu(row)];
    cells.extend(["access_flag", "vcpus", "locking"].map(|key| row.param(key)));
    cells
}

/// Tables for each timing.
pub(super) fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    for timing in Timing::ALL {
        let of = |case: &str| -> Vec<&Row> {
            let wanted = |row: &&Row| row.timing == timing.name() && row.case == case;
            rows.iter().filter(wanted).collect()
        };
        let phases = of("phases");
        let Some(first) = phases.first() else {
            continue;
        };
        let (name, _) = unit(timing);
        text += &format!(
            "\nage, timing {}, {}\n{} MiB a vCPU in leaves of {}\n",
            timing.name(),
            first.machine_words(),
            first.param("mib_per_vcpu"),
            first.param("backing")
        );
        text += &format!("\nphases, {name}\n{}", times(&phases, timing));
        text += &format!("\nmarking idle, counts\n{}", table(&phases, &COUNTS));
        for (case, title) in [
            (
                "touched",
                "half of the pages, at random, are written after marking",
            ),
            ("hot", "one page of 64 is written all the time"),
        ] {
            let of = of(case);
            if !of.is_empty() {
                text += &format!("\n{title}: who is idle?\n{}", precise(&of, timing));
            }
        }
        let (live, faults) = (of("live"), of("faults"));
        if !live.is_empty() {
            text += &format!(
                "\nmemory is faulted in while all of it is aged (here), pass after pass, while the controller ages the memory of a VM that sleeps\n(elsewhere), or while it sleeps itself; time of a vCPU, median of the rounds, and the ratios of medians and of the least\n{}",
                table(&live, &LIVE)
            );
        }
        if !faults.is_empty() {
            text += &format!(
                "\ninstructions of a fault (missing page, write to a logged one), with a pass every 64 faults; the difference is of all\n{}",
                table(&faults, &FAULTS)
            );
        }
        if timing == Timing::Parallel {
            text += &scaling::report(rows, &CURVES, way);
        }
    }
    text
}

fn times(rows: &[&Row], timing: Timing) -> String {
    let (_, scale) = unit(timing);
    let mut heading = LINE.to_vec();
    heading.extend(PHASES.map(|(name, _)| name));
    heading.extend(match timing {
        Timing::Insn => ["insn/young entry", "insn/old entry"],
        Timing::Wall | Timing::Parallel => ["young entries/us", "old entries/us"],
    });
    let mut table = Table::new(&heading);
    for (case, group) in groups(rows) {
        let mut cells = case;
        cells.extend(PHASES.map(|(_, key)| cell(mean(&group, key).map(|time| time / scale))));
        for pass in ["mark_read_idle", "mark_marked"] {
            let each = group.first().and_then(|row| per_entry(row, pass));
            cells.push(cell(match timing {
                Timing::Insn => each,
                Timing::Wall | Timing::Parallel => each.map(|ns| 1e3 / ns),
            }));
        }
        table.row(cells);
    }
    table.left(&LEFT).to_string()
}

/// Rows that differ in their iteration only.
fn groups<'a>(rows: &[&'a Row]) -> Vec<(Vec<String>, Vec<&'a Row>)> {
    let mut groups: Vec<(Vec<String>, Vec<&Row>)> = Vec::new();
    for row in rows {
        match groups.iter_mut().find(|(case, _)| *case == line(row)) {
            Some((_, group)) => group.push(row),
            None => groups.push((line(row), vec![row])),
        }
    }
    groups
}

/// One line for each case, of its last row.
fn table(rows: &[&Row], columns: &[Column]) -> String {
    let mut heading = LINE.to_vec();
    heading.extend(columns.iter().map(|(name, _)| *name));
    let mut table = Table::new(&heading);
    for (case, group) in groups(rows) {
        let mut cells = case;
        let last = group.last();
        cells.extend(
            columns
                .iter()
                .map(|(_, of)| cell(last.and_then(|row| of(row)))),
        );
        table.row(cells);
    }
    table.left(&LEFT).to_string()
}

/// A line for each case and precision; where CPUs run at the same time, with what a pass takes and what omitting its end saves.
fn precise(rows: &[&Row], timing: Timing) -> String {
    let timed = timing != Timing::Insn && rows.iter().any(|row| row.value("pass_ns").is_some());
    let mut heading = LINE.to_vec();
    heading.push("passes");
    heading.extend(TOUCHED.map(|(name, _)| name));
    heading.extend(
        timed
            .then_some(["pass, us", "saved, us"])
            .into_iter()
            .flatten(),
    );
    let mut table = Table::new(&heading);
    for row in rows {
        let mut cells = line(row);
        cells.push(row.param("precision"));
        cells.extend(TOUCHED.map(|(_, of)| cell(of(row))));
        if timed {
            let pass = row.value("pass_ns");
            let alike = |it: &&&Row| line(it) == line(row) && it.param("precision") == "precise";
            let whole = rows.iter().find(alike).and_then(|it| it.value("pass_ns"));
            let saved = whole.zip(pass).map(|(whole, pass)| whole - pass);
            let saved = saved.filter(|_| row.param("precision") != "precise");
            cells.extend([pass, saved].map(|ns| cell(ns.map(|ns| ns / 1e3))));
        }
        table.row(cells);
    }
    let left = [&LEFT[..], &[4]].concat();
    table.left(&left).to_string()
}

/// Marking all memory idle, and what it costs vCPUs that fault memory in, over their number.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let wall = |case: &str| -> Vec<&Row> {
        let wanted = |row: &&Row| row.timing == Timing::Wall.name() && row.case == case;
        rows.iter().filter(wanted).collect()
    };
    let chart = |case: &str, title: &str, y: &str, value: fn(&Row) -> Option<f64>| {
        let rows = wall(case);
        let name = |row: &Row| format!("{}, {}", cpu(row), row.param("locking"));
        let owned: Vec<Row> = rows.iter().map(|row| (*row).clone()).collect();
        let series = distinct(&owned, name).into_iter().map(|wanted| {
            let of = rows.iter().filter(|row| name(row) == wanted);
            let point = |row: &&Row| Some((row.param("vcpus"), value(row)?));
            Series {
                points: of.filter_map(point).collect(),
                name: wanted,
            }
        });
        Chart {
            title: title.into(),
            x: "vCPUs".into(),
            y: y.into(),
            series: series.collect(),
        }
    };
    let mut charts = vec![
        chart("phases", "mark all memory idle", "microseconds", |row| {
            Some(row.value("mark_write_idle_ns")? / 1e3)
        }),
        chart(
            "live",
            "faulting memory in while it is aged",
            "times as long",
            ratio,
        ),
    ];
    if rows.iter().all(|row| row.timing != Timing::Wall.name()) {
        charts.clear();
    }
    charts.extend(scaling::charts(rows, &CURVES, way));
    charts
}

#[cfg(test)]
mod tests {
    use super::{charts, jobs, per_disturbance, report};
    use crate::bench::options::tests::options;
    use crate::bench::rows::Row;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    fn of(case: &str, timing: Timing, precision: &str, values: &str) -> Row {
        let params = format!(
            r#""vcpus":2,"rounds":8,"locking":"lockless","access_flag":"hardware","precision":"{precision}""#
        );
        let mut row = row(timing, &params, values);
        row.case = case.into();
        row
    }

    #[test]
    fn flags_are_set_by_hardware_and_by_faults_unless_one_is_named() {
        let board = Board::qemu_virt().expect("the board file is read");
        let count = |words: &[&str]| {
            let options = options(words).expect("good options");
            jobs(&options, &board).expect("they fit").len()
        };
        assert_eq!(count(&[]), 5);
        assert_eq!(count(&["--timing", "insn"]), 3);
        assert_eq!(count(&["--cpu", "max", "--timing", "wall"]), 1);
        assert_eq!(count(&["--access-flag", "software"]), 2);
    }

    #[test]
    fn disturbance_is_of_all_vcpus_and_all_rounds() {
        let live = |with: u32| {
            let values =
                format!(r#""without_vcpu_ns":1000000,"with_vcpu_ns":{with},"leaves":32000"#);
            per_disturbance(&of("live", Timing::Wall, "precise", &values))
        };
        assert_eq!(live(1_002_000), Some(1000.0));
        assert_eq!(live(999_000), None);
    }

    #[test]
    fn tables_have_entries_errors_and_what_is_saved() {
        let phases = r#""mark_read_idle_ns":230000,"mark_read_idle_leaves":2000,"mark_marked_ns":100000,"mark_marked_leaves":2000"#;
        let hot = |idle: u32, pass: u32| {
            format!(r#""pages_touched":400,"touched_idle":{idle},"pass_ns":{pass}"#)
        };
        let rows = [
            of("phases", Timing::Insn, "precise", phases),
            of(
                "faults",
                Timing::Insn,
                "precise",
                r#""pages":100,"missing_insn":78100,"missing_aging_insn":78103"#,
            ),
            of("phases", Timing::Wall, "precise", phases),
            of("hot", Timing::Wall, "precise", &hot(0, 30_000)),
            of("hot", Timing::Wall, "imprecise", &hot(300, 17_000)),
        ];
        let text = report(&rows);
        for words in ["115", "781", " 3 ", " 75 ", " 13"] {
            assert!(text.contains(words), "'{words}': {text}");
        }
        assert_eq!(charts(&rows).len(), 2);
        assert_eq!(report(&[]), "");
    }
}
