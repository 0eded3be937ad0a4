//! Suite `split`: when blocks are split and how, over policies, break-before-make levels and numbers of vCPUs.

use anyhow::Result;

use super::options::{Locking, Options};
use super::rows::{cell, cpu, distinct, mean};
use super::scaling::{self, Curve};
use super::{Job, Row, unit};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

/// In the order of the tables: the baseline first.
const POLICIES: [&str; 4] = ["fault-empty", "fault", "enable", "clear"];
/// CPU models whose ID register says FEAT_BBM level 2.
const LEVEL_2: [&str; 3] = ["max", "neoverse-v1", "neoverse-n2"];
/// What is measured unless a model is named: one with level 2, one without.
const MODELS: [&str; 2] = ["max", "neoverse-n1"];
const WORKLOADS: [&str; 2] = ["sparse", "read-mostly"];

/// Heading, key, what it is divided by.
type Column = (&'static str, &'static str, f64);

const EAGER: [Column; 9] = [
    ("splits", "splits_eager", 1.0),
    ("windows", "bbm_windows_eager", 1.0),
    ("TLBI one IPA", "tlbi_ipa_eager", 1.0),
    ("range", "tlbi_range_eager", 1.0),
    ("VM-wide S1", "tlbi_stage1_eager", 1.0),
    ("S1+S2", "tlbi_vmid_eager", 1.0),
    ("transl. faults", "faults_translation_eager", 1.0),
    ("collapsed", "collapses_disable", 1.0),
    ("windows then", "bbm_windows_disable", 1.0),
];
const PASS: [Column; 8] = [
    ("written", "pages_written", 1.0),
    ("lost", "pages_lost", 1.0),
    ("perm. faults", "faults_permission", 1.0),
    ("transl. faults", "faults_translation", 1.0),
    ("splits", "splits_dirty", 1.0),
    ("VM-wide TLBI", "tlbi_stage1", 1.0),
    ("busy retries", "busy_retries", 1.0),
    ("exits", "exits", 1.0),
];
const STALLS: [Column; 2] = [
    ("exit p99, us", "exit_p99_ns", 1e3),
    ("longest, us", "exit_max_ns", 1e3),
];
const CHANGED: [Column; 2] = [
    ("leaves changed", "leaves_changed", 1.0),
    ("RAM changed", "ram_changed", 1.0),
];
const ROUNDS: Column = ("rounds", "rounds", 1.0);
const LIVE: [Column; 5] = [
    ("splits", "splits", 1.0),
    ("windows", "bbm_windows", 1.0),
    ("transl. faults", "faults_translation", 1.0),
    ("busy retries", "busy_retries", 1.0),
    ("perm. faults", "faults_permission", 1.0),
];

/// For each CPU model: one vCPU with instructions counted, and all numbers of them with real concurrency.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    for (model, bbm) in models(options) {
        for timing in options.timing() {
            // How it bends is no question of the model.
            if timing == Timing::Parallel && options.cpu.is_none() && model != MODELS[0] {
                continue;
            }
            jobs.push(job(options, board, &model, &bbm, timing)?);
        }
    }
    Ok(jobs)
}

/// The CPU models and the levels measured on each; on a model that is named, whatever was asked for.
fn models(options: &Options) -> Vec<(String, Vec<String>)> {
    let words = |levels: &[&str]| levels.iter().map(|&level| level.to_owned()).collect();
    let own = |model: &str| match LEVEL_2.contains(&model) {
        true => words(&["2", "0"]),
        false => words(&["0"]),
    };
    if let Some(model) = &options.cpu {
        let asked = match options.bbm.is_empty() {
            true => own(model),
            false => options.bbm.clone(),
        };
        return vec![(model.clone(), asked)];
    }
    let levels = |model: &str| -> Vec<String> {
        if options.bbm.is_empty() {
            return own(model);
        }
        let possible =
            |level: &&String| *level != "2" || options.unsafe_bbm || LEVEL_2.contains(&model);
        options.bbm.iter().filter(possible).cloned().collect()
    };
    MODELS
        .iter()
        .map(|&model| (model.to_owned(), levels(model)))
        .filter(|(_, levels)| !levels.is_empty())
        .collect()
}

fn job(
    options: &Options,
    board: &Board,
    model: &str,
    bbm: &[String],
    timing: Timing,
) -> Result<Job> {
    let vcpus = match timing {
        Timing::Insn => vec![1],
        Timing::Wall | Timing::Parallel if options.vcpus.is_empty() && !options.full => {
            vec![1, 8]
        }
        Timing::Wall | Timing::Parallel => options.vcpus(),
    };
    let most = vcpus.iter().copied().max().unwrap_or(1);
    let mut options = Options {
        cpu: Some(model.to_owned()),
        bbm: bbm.to_vec(),
        ..options.clone()
    };
    if options.splitting.is_empty() {
        options.splitting = POLICIES.map(str::to_owned).to_vec();
    }
    if options.locking.is_empty() {
        options.locking = vec![Locking::Lockless];
    }
    options.backing.retain(|size| size != "4k");
    let backing = options.backing.first().cloned();
    options.backing = vec![backing.unwrap_or_else(|| "2m".to_owned())];
    let mut guest_mib = u64::from(most) * options.mib_per_vcpu(timing);
    if options.backing == ["1g"] {
        // Whole gigabytes, wherever they can be aligned.
        guest_mib = guest_mib.next_multiple_of(1024) + 1024;
    }
    let machine = options.machine(board, most, guest_mib, timing)?;
    Ok(Job {
        title: format!("{model}, bbm {}, timing {}", bbm.join(","), timing.name()),
        append: options.append("split", &vcpus, timing),
        machine,
    })
}

/// Times, the eager phase, the pass, the stalls, and what a block costs.
pub(super) fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    for timing in [Timing::Wall, Timing::Parallel, Timing::Insn] {
        let of = |case: &str| -> Vec<Row> {
            let wanted = |row: &&Row| row.timing == timing.name() && row.case == case;
            sorted(rows.iter().filter(wanted))
        };
        let (sparse, mostly) = (of("sparse"), of("read-mostly"));
        let Some(first) = sparse.first() else {
            continue;
        };
        let (name, _) = unit(timing);
        text += &format!(
            "\nsplit, timing {}, {}\n{} MiB a vCPU in leaves of {}, batches of {}, chunks of {}, pauses of {} us\n",
            timing.name(),
            first.machine_words(),
            first.param("mib_per_vcpu"),
            first.param("backing"),
            first.param("bbm_batch"),
            first.param("chunk"),
            first.param("pause_us")
        );
        text += &format!("\nphases, {name}\n{}", times(&sparse, &mostly, timing));
        text += &format!(
            "\nbefore the pass (enable, first clear), and collapsing after it\n{}",
            counts(&mostly, &EAGER)
        );
        for (workload, rows) in WORKLOADS.iter().zip([&sparse, &mostly]) {
            let title = match *workload {
                "sparse" => "sparse pass: one page of each 2 MiB is written",
                _ => "read-mostly pass: every page is touched, one in ten written",
            };
            text += &format!("\n{title}\n{}", passes(rows, timing));
        }
        let live = of("live");
        if !live.is_empty() {
            let columns = [&LIVE[..], &STALLS[..]].concat();
            text += &format!(
                "\nsplit {} times while every vCPU stores at random, and collapsed in between\n{}",
                live.first()
                    .map_or_else(String::new, |row| count(row, &ROUNDS)),
                counts(&live, &columns)
            );
        }
        let cost = of("cost");
        if !cost.is_empty() {
            text += &format!("\ninstructions, nothing running\n{}", costs(&cost));
        }
        text += &scaling::report(&sorted(rows.iter()), &CURVES, way);
    }
    text
}

/// What is told over numbers of vCPUs; of a pass the vCPU that takes longest.
const CURVES: [Curve; 3] = [
    ("sparse", "vcpu_ns", "sparse pass, one page of each block"),
    ("read-mostly", "vcpu_ns", "read-mostly pass"),
    (
        "live",
        "exit_max_ns",
        "longest exit while blocks are split and collapsed",
    ),
];

/// The policy at its level, and the mode where several are measured.
fn way(row: &Row) -> String {
    ["splitting", "bbm", "locking"]
        .map(|key| match key {
            "bbm" => format!("bbm {}", row.param(key)),
            _ => row.param(key),
        })
        .join(", ")
}

/// Rows in the order of the tables.
fn sorted<'a>(rows: impl Iterator<Item = &'a Row>) -> Vec<Row> {
    let mut rows: Vec<Row> = rows.cloned().collect();
    let place = |policy: &str| POLICIES.iter().position(|&known| known == policy);
    rows.sort_by_key(|row| {
        let vcpus = row.param("vcpus").parse::<u32>().unwrap_or(u32::MAX);
        let level = std::cmp::Reverse(row.param("bbm"));
        (
            cpu(row),
            level,
            vcpus,
            row.param("locking"),
            place(&row.param("splitting")),
        )
    });
    rows
}

/// What a line of a table is about.
fn line(row: &Row) -> Vec<String> {
    let mut cells = vec![cpu(row)];
    cells.extend(["bbm", "vcpus", "locking", "splitting"].map(|key| row.param(key)));
    cells
}

const LINE: [&str; 5] = ["CPU", "bbm", "vCPUs", "locking", "splitting"];
const LEFT: [usize; 3] = [0, 3, 4];

fn times(sparse: &[Row], mostly: &[Row], timing: Timing) -> String {
    let (_, scale) = unit(timing);
    let mut heading = LINE.to_vec();
    heading.extend([
        "enable",
        "first clear",
        "sparse",
        "read-mostly",
        "clear",
        "disable",
    ]);
    let mut table = Table::new(&heading);
    for row in sparse {
        let other = mostly.iter().find(|other| line(other) == line(row));
        let both: Vec<&Row> = std::iter::once(row).chain(other).collect();
        let scaled = |key: &str| cell(mean(&both, key).map(|time| time / scale));
        let mut cells = line(row);
        cells.extend(["enable_ns", "clear_first_ns"].map(scaled));
        cells.push(cell(row.value("dirty_ns").map(|time| time / scale)));
        cells.push(scaled("read_mostly_ns"));
        cells.extend(["clear_ns", "collapse_ns"].map(scaled));
        table.row(cells);
    }
    table.left(&LEFT).to_string()
}

fn counts(rows: &[Row], columns: &[Column]) -> String {
    let mut heading = LINE.to_vec();
    heading.extend(columns.iter().map(|(name, ..)| *name));
    let mut table = Table::new(&heading);
    for row in rows {
        let mut cells = line(row);
        cells.extend(columns.iter().map(|column| count(row, column)));
        table.row(cells);
    }
    table.left(&LEFT).to_string()
}

/// The pass's counts, and how many times as many exits the baseline takes.
fn passes(rows: &[Row], timing: Timing) -> String {
    let stalls: &[Column] = match timing {
        Timing::Wall | Timing::Parallel => &STALLS,
        Timing::Insn => &[],
    };
    let mut heading = LINE.to_vec();
    heading.extend(PASS.iter().map(|(name, ..)| *name));
    heading.push("fault-empty/this");
    let last = || stalls.iter().chain(&CHANGED);
    heading.extend(last().map(|(name, ..)| *name));
    let mut table = Table::new(&heading);
    for row in rows {
        let mut cells = line(row);
        cells.extend(PASS.iter().map(|column| count(row, column)));
        cells.push(cell(against_baseline(rows, row)));
        cells.extend(last().map(|column| count(row, column)));
        table.row(cells);
    }
    table.left(&LEFT).to_string()
}

/// Exits of the baseline case over those of this one.
fn against_baseline(rows: &[Row], row: &Row) -> Option<f64> {
    let alike = |other: &&Row| {
        line(other)[..4] == line(row)[..4] && other.param("splitting") == POLICIES[0]
    };
    let baseline = rows.iter().find(alike)?.value("exits")?;
    Some(baseline / row.value("exits").filter(|&exits| exits > 0.0)?)
}

fn costs(rows: &[Row]) -> String {
    let mut table = Table::new(&["CPU", "bbm", "locking", "split block", "collapsed table"]);
    for row in rows {
        table.row(vec![
            cpu(row),
            row.param("bbm"),
            row.param("locking"),
            cell(row.value("block_insn")),
            cell(row.value("collapse_insn")),
        ]);
    }
    table.left(&[0, 2]).to_string()
}

fn count(row: &Row, (_, key, scale): &Column) -> String {
    cell(row.value(key).map(|value| value / scale))
}

/// Time and exits of both passes, and the longest exit, over policies; a line for each CPU, level and number of vCPUs.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let wall: Vec<Row> = sorted(rows.iter().filter(|row| row.timing == Timing::Wall.name()));
    let charts = [
        ("sparse", "dirty_ns", "sparse pass", "microseconds", 1e3),
        (
            "read-mostly",
            "read_mostly_ns",
            "read-mostly pass",
            "microseconds",
            1e3,
        ),
        ("read-mostly", "exits", "read-mostly pass", "exits", 1.0),
        (
            "read-mostly",
            "exit_max_ns",
            "read-mostly pass: longest exit",
            "microseconds",
            1e3,
        ),
    ];
    let chart = |(case, key, title, y, scale): (&str, &str, &str, &str, f64)| {
        let of: Vec<Row> = wall
            .iter()
            .filter(|row| row.case == case)
            .cloned()
            .collect();
        Chart {
            title: title.to_owned(),
            x: "policy".to_owned(),
            y: y.to_owned(),
            series: series(&of, key, scale),
        }
    };
    let mut charts: Vec<Chart> = charts.into_iter().map(chart).collect();
    if wall.is_empty() {
        charts.clear();
    }
    charts.extend(scaling::charts(&sorted(rows.iter()), &CURVES, way));
    charts
}

fn series(rows: &[Row], key: &str, scale: f64) -> Vec<Series> {
    let name = |row: &Row| {
        format!(
            "{} bbm {}, {} vCPUs {}",
            cpu(row),
            row.param("bbm"),
            row.param("vcpus"),
            row.param("locking")
        )
    };
    let of = |wanted: String| {
        let points = rows.iter().filter(|row| name(row) == wanted);
        let point = |row: &Row| Some((row.param("splitting"), row.value(key)? / scale));
        Series {
            points: points.filter_map(point).collect(),
            name: wanted,
        }
    };
    distinct(rows, name).into_iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::{charts, jobs, report};
    use crate::bench::Row;
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    fn titles(words: &[&str]) -> Vec<String> {
        let board = Board::qemu_virt().expect("the board file is read");
        let jobs = jobs(&options(words).expect("good options"), &board).expect("they fit");
        jobs.into_iter().map(|job| job.title).collect()
    }

    fn of(case: &str, policy: &str, values: &str) -> Row {
        let params = format!(
            r#""vcpus":8,"locking":"lockless","splitting":"{policy}","bbm":2,"bbm_batch":16"#
        );
        Row {
            case: case.into(),
            ..row(Timing::Wall, &params, values)
        }
    }

    #[test]
    fn level_2_is_asked_of_cpus_that_have_it() {
        let both = [
            "max, bbm 2,0, timing wall",
            "neoverse-n1, bbm 0, timing wall",
        ];
        assert_eq!(titles(&["--timing", "wall"]), both);
        assert_eq!(titles(&["--timing", "wall", "--bbm", "2"]).len(), 1);
        assert_eq!(
            titles(&["--timing", "wall", "--bbm", "2", "--unsafe-bbm"]).len(),
            2
        );
        let named = ["--timing", "insn", "--cpu", "cortex-a72", "--bbm", "2"];
        assert_eq!(titles(&named), ["cortex-a72, bbm 2, timing insn"]);
    }

    #[test]
    fn every_policy_is_compared_and_blocks_are_what_is_split() {
        let board = Board::qemu_virt().expect("the board file is read");
        let options = options(&[]).expect("good options");
        for job in jobs(&options, &board).expect("they fit") {
            for words in [
                "splitting=fault-empty,fault,enable,clear",
                "backing=2m",
                "locking=lockless",
            ] {
                assert!(job.append.contains(words), "{}", job.append);
            }
        }
    }

    #[test]
    fn exits_are_told_against_the_baseline_and_stalls_in_microseconds() {
        let rows = [
            of("read-mostly", "enable", r#""exits":100,"exit_max_ns":7000"#),
            of("read-mostly", "fault-empty", r#""exits":950"#),
            of("sparse", "enable", r#""dirty_ns":2000"#),
        ];
        let text = report(&rows);
        let line = text.lines().find(|line| line.contains("9.50"));
        let line = line.expect("the ratio is printed");
        assert!(line.contains("enable") && line.contains('7'), "{text}");
        let charts = charts(&rows);
        assert_eq!(charts.len(), 4);
        assert_eq!(charts[0].series[0].points, [("enable".to_owned(), 2.0)]);
    }
}
