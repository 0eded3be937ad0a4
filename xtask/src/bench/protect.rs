//! Suite `protect`: what it costs to protect all memory at once, over engines and amounts of memory, and what it costs
//! afterwards.

use anyhow::Result;

use super::options::{Locking, Options};
use super::rows::{cell, cpu, distinct};
use super::scaling::{self, Curve};
use super::{Job, Row, unit};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

/// In the order of the tables: the baseline first.
const ENGINES: [&str; 4] = ["walk", "lazy", "swap", "pie"];
/// CPU models with FEAT_S2PIE.
const INDIRECTION: [&str; 1] = ["max"];
/// CPU models without FEAT_HAFDBS.
const NO_DIRTY_STATE: [&str; 1] = ["cortex-a72"];
/// CPU models with FEAT_BBM level 2.
const LEVEL_2: [&str; 3] = ["max", "neoverse-v1", "neoverse-n2"];

/// Distance between the pages that are touched where root entries are what is compared, and the sizes there.
const SPARSE: &str = "1g";
const SPARSE_MIB: [u64; 2] = [1024, 16_384];

/// Heading, key.
type Column = (&'static str, &'static str);

/// The call, in ticks.
const CALLS: [Column; 5] = [
    ("call", "call_ns"),
    ("mean of 8", "call_mean_ns"),
    ("first", "call_first_ns"),
    ("after 1 %", "call_1pct_ns"),
    ("after none", "call_idle_ns"),
];
/// The call, in counts.
const INSIDE: [Column; 8] = [
    ("root entries", "root_entries"),
    ("desc. writes", "descriptor_writes_call"),
    ("TLBI bcast", "tlbi_broadcast_call"),
    ("whole VMID", "tlbi_vmid_call"),
    ("range", "tlbi_range_call"),
    ("kicks", "kicks_call"),
    ("late", "calls_late"),
    ("replaced", "calls_replaced"),
];
/// Passes after a call: heading, prefix of the keys.
const PASSES: [Column; 4] = [
    ("read all", "read"),
    ("rewrite all", "rewrite"),
    ("cold", "rewrite_cold"),
    ("1 %", "rewrite_1pct"),
];
const COUNTS: [Column; 11] = [
    ("read faults", "read_faults"),
    ("push-downs", "read_push_downs"),
    ("rewrite faults", "rewrite_faults"),
    ("cold faults", "rewrite_cold_faults"),
    ("splits", "rewrite_cold_splits"),
    ("windows", "rewrite_cold_bbm_windows"),
    ("1 % faults", "rewrite_1pct_faults"),
    ("written", "pages_written"),
    ("reported", "pages_reported"),
    ("lost", "pages_lost"),
    ("extra", "pages_extra"),
];
/// Background work after everything was written, and after nothing was.
const WORK: [Column; 4] = [
    ("tables", "tables"),
    ("descriptors", "descriptors"),
    ("hot", "hot"),
    ("cold", "cold"),
];
const RUNNING: [Column; 7] = [
    ("call", "call_ns"),
    ("longest", "call_max_ns"),
    ("kick to last ack", "ack_ns"),
    ("least", "ack_min_ns"),
    ("median", "ack_median_ns"),
    ("most", "ack_max_ns"),
    ("call without", "call_without_ack_ns"),
];
const RUNNING_COUNTS: [Column; 4] = [
    ("calls", "rounds"),
    ("kicked", "kicked"),
    ("late", "calls_late"),
    ("replaced", "calls_replaced"),
];

/// One vCPU with instructions counted, and several with real concurrency, on memory of pages and of blocks.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    for timing in options.timing() {
        let backings = match timing {
            _ if !options.backing.is_empty() => options.backing.clone(),
            Timing::Parallel if !options.full => vec!["4k".to_owned()],
            _ => vec!["4k".to_owned(), "2m".to_owned()],
        };
        for backing in &backings {
            jobs.push(job(options, board, timing, backing)?);
        }
        if timing == Timing::Insn && options.mib.is_empty() {
            jobs.push(many_root_entries(options, board)?);
        }
    }
    Ok(jobs)
}

/// One page in each GiB: what a root entry costs, without the memory below it.
fn many_root_entries(options: &Options, board: &Board) -> Result<Job> {
    let sparse = Options {
        mib: SPARSE_MIB.to_vec(),
        stride: SPARSE.to_owned(),
        bbm: vec!["auto".to_owned()],
        ..options.clone()
    };
    let job = job(&sparse, board, Timing::Insn, "2m")?;
    Ok(Job {
        title: format!("{}, a page in each GiB", job.title),
        ..job
    })
}

fn job(options: &Options, board: &Board, timing: Timing, backing: &str) -> Result<Job> {
    let vcpus = match timing {
        Timing::Insn => vec![1],
        Timing::Wall | Timing::Parallel if options.vcpus.is_empty() => vec![1, 4],
        Timing::Wall | Timing::Parallel => options.vcpus(),
    };
    let sizes: &[u64] = match (timing, options.full) {
        _ if !options.mib.is_empty() => &options.mib,
        (Timing::Insn, false) => &[256, 1024],
        (Timing::Insn, true) => &[256, 1024, 4096],
        // A block for each vCPU, so that all have the same to do.
        (Timing::Parallel, _) => &[2],
        (Timing::Wall, false) => &[256],
        (Timing::Wall, true) => &[256, 1024],
    };
    let mut options = possible(options, board);
    options.backing = vec![backing.to_owned()];
    if options.bbm.is_empty() && backing != "4k" && LEVEL_2.contains(&model(&options, board)) {
        options.bbm = match timing {
            Timing::Parallel if !options.full => vec!["2".to_owned()],
            _ => vec!["2".to_owned(), "0".to_owned()],
        };
    }
    let most = vcpus.iter().copied().max().unwrap_or(1);
    let largest = sizes
        .iter()
        .copied()
        .max()
        .unwrap_or(0)
        .max(2 * u64::from(most));
    // Every vCPU's part is made of whole blocks; 1 GiB leaves want whole gigabytes wherever they can be aligned.
    let spare = if backing == "1g" { 2048 } else { 512 };
    let need = largest + largest / 4 + 4 * u64::from(most) + spare;
    let mut machine = options.machine(board, most, 64, timing)?;
    machine.memory_mib = options.memory.unwrap_or(need);
    let sizes: Vec<String> = sizes.iter().map(u64::to_string).collect();
    Ok(Job {
        title: format!(
            "{}, leaves of {backing}, timing {}",
            machine.cpu,
            timing.name()
        ),
        append: format!(
            "{} slot-mib={}",
            options.append("protect", &vcpus, timing),
            sizes.join(",")
        ),
        machine,
    })
}

fn model<'a>(options: &'a Options, board: &'a Board) -> &'a str {
    options.cpu.as_deref().unwrap_or(&board.machine.cpu)
}

/// The options with every engine and tracker that the CPU model has where none is named; what is named stays, so that it
/// is refused in words.
pub(super) fn possible(options: &Options, board: &Board) -> Options {
    let model = model(options, board);
    let mut all = options.clone();
    if all.engine.is_empty() {
        let has = |engine: &&&str| **engine != "pie" || INDIRECTION.contains(&model);
        all.engine = ENGINES
            .iter()
            .filter(has)
            .map(|&it| it.to_owned())
            .collect();
        if all.tracking.is_empty() {
            let has = |how: &&&str| **how != "dbm" || !NO_DIRTY_STATE.contains(&model);
            let both = ["fault", "dbm"];
            all.tracking = both.iter().filter(has).map(|&it| it.to_owned()).collect();
        }
    }
    if all.locking.is_empty() {
        all.locking = vec![Locking::Lockless];
    }
    all
}

/// The engine, and the tracker where it is not the usual one.
pub(super) fn engine(row: &Row) -> String {
    match row.param("tracking").as_str() {
        "fault" => row.param("engine"),
        other => format!("{}, {other}", row.param("engine")),
    }
}

/// The call, what comes after it, the background work, and how the call grows with memory.
pub(super) fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    for timing in Timing::ALL {
        let of = |case: &str| -> Vec<Row> {
            let wanted = |row: &&Row| row.timing == timing.name() && row.case == case;
            sorted(rows.iter().filter(wanted))
        };
        let (sparse, stopped): (Vec<Row>, Vec<Row>) = of("stopped")
            .into_iter()
            .partition(|row| row.param("stride") == SPARSE);
        let Some(first) = stopped.first() else {
            continue;
        };
        let ticks = match timing {
            Timing::Insn => ("instructions", 1.0),
            Timing::Wall | Timing::Parallel => ("microseconds", 1e3),
        };
        text += &format!(
            "\nprotect, timing {}, {}\n",
            timing.name(),
            first.machine_words()
        );
        text += &format!(
            "\nthe call, no vCPU running, {}\n{}",
            ticks.0,
            table(&stopped, &[(&CALLS, ticks.1), (&INSIDE, 1.0)])
        );
        let (name, scale) = unit(timing);
        text += &format!(
            "\nafter the call, {name}; in brackets times what it takes after walk\n{}",
            passes(&stopped, scale)
        );
        text += &format!(
            "\ncounts after the call\n{}",
            table(&stopped, &[(&COUNTS, 1.0)])
        );
        text += &format!(
            "\nharvest and background work, {}\n{}",
            ticks.0,
            work(&stopped, timing)
        );
        let running = of("running");
        if !running.is_empty() {
            text += &format!(
                "\nthe call while every vCPU stores at random, {}\n{}",
                ticks.0,
                table(&running, &[(&RUNNING, ticks.1), (&RUNNING_COUNTS, 1.0)])
            );
        }
        if timing == Timing::Insn {
            text += &format!(
                "\nhow the call grows with memory\n{}",
                growth(&[stopped, sparse].concat())
            );
        }
        if timing == Timing::Parallel {
            text += &scaling::report(&sorted(rows.iter()), &CURVES, way);
        }
    }
    text
}

/// What is told over numbers of vCPUs; of a pass the vCPU that takes longest.
const CURVES: [Curve; 5] = [
    ("stopped", "call_mean_ns", "the call, vCPUs asleep"),
    ("running", "call_ns", "the call, vCPUs running"),
    (
        "running",
        "ack_ns",
        "from the first kick to the last acknowledgement",
    ),
    ("stopped", "read_vcpu_ns", "reading all after the call"),
    ("stopped", "rewrite_vcpu_ns", "rewriting all after the call"),
];

/// The engine with its leaves.
fn way(row: &Row) -> String {
    let mut words = format!("{}, {}", row.param("backing"), engine(row));
    if row.param("locking") != Locking::Lockless.name() {
        words += &format!(", {}", row.param("locking"));
    }
    if row.param("engine") == "swap" {
        words += &format!(", bbm {}", row.param("bbm"));
    }
    words
}

/// Rows in the order of the tables.
fn sorted<'a>(rows: impl Iterator<Item = &'a Row>) -> Vec<Row> {
    let mut rows: Vec<Row> = rows.cloned().collect();
    let place = |engine: &str| ENGINES.iter().position(|&known| known == engine);
    let number = |text: String| text.parse::<u64>().unwrap_or(u64::MAX);
    rows.sort_by_key(|row| {
        (
            std::cmp::Reverse(row.param("backing")),
            number(row.param("vcpus")),
            row.param("locking"),
            place(&row.param("engine")),
            std::cmp::Reverse(row.param("tracking")),
            std::cmp::Reverse(row.param("bbm")),
            number(row.param("mapped_mib")),
        )
    });
    rows
}

const LINE: [&str; 5] = ["leaves", "engine", "bbm", "vCPUs", "MiB"];
const LEFT: [usize; 2] = [0, 1];

/// What a line of a table is about.
fn line(row: &Row) -> Vec<String> {
    vec![
        row.param("backing"),
        engine(row),
        row.param("bbm"),
        row.param("vcpus"),
        row.param("mapped_mib"),
    ]
}

/// A table of groups of columns, each group divided by a number of its own.
fn table(rows: &[Row], groups: &[(&[Column], f64)]) -> String {
    let mut heading = LINE.to_vec();
    let columns = || {
        groups
            .iter()
            .flat_map(|(columns, scale)| columns.iter().map(move |it| (it, scale)))
    };
    heading.extend(columns().map(|((name, _), _)| *name));
    let mut table = Table::new(&heading);
    for row in rows {
        let mut cells = line(row);
        cells.extend(columns().map(|((_, key), scale)| cell(row.value(key).map(|it| it / scale))));
        table.row(cells);
    }
    table.left(&LEFT).to_string()
}

fn passes(rows: &[Row], scale: f64) -> String {
    let mut heading = LINE.to_vec();
    for (name, _) in &PASSES {
        heading.extend([name, ""]);
    }
    let mut table = Table::new(&heading);
    for row in rows {
        let mut cells = line(row);
        for (_, prefix) in &PASSES {
            let key = format!("{prefix}_ns");
            cells.push(cell(row.value(&key).map(|it| it / scale)));
            let ratio = against_walk(rows, row, &key);
            cells.push(ratio.map_or_else(String::new, |it| format!("({it:.3})")));
        }
        table.row(cells);
    }
    table.left(&LEFT).to_string()
}

/// A value over that of engine `walk` with faults, on as much memory.
fn against_walk(rows: &[Row], row: &Row, key: &str) -> Option<f64> {
    let same = |other: &Row| {
        ["backing", "vcpus", "locking", "mapped_mib"]
            .iter()
            .all(|key| other.param(key) == row.param(key))
    };
    let walk = rows
        .iter()
        .find(|other| same(other) && engine(other) == ENGINES[0])?;
    Some(row.value(key)? / walk.value(key).filter(|&it| it > 0.0)?)
}

fn work(rows: &[Row], timing: Timing) -> String {
    let (name, scale) = match timing {
        Timing::Insn => ("insn", 1.0),
        Timing::Wall | Timing::Parallel => ("ns", 1e3),
    };
    let mut heading = LINE.to_vec();
    heading.extend(["harvest", "harvest 1 %"]);
    for phase in ["all written", "none written"] {
        heading.push(phase);
        heading.extend(WORK.map(|(name, _)| name));
    }
    let mut table = Table::new(&heading);
    for row in rows {
        let ticks = |key: &str| cell(row.value(key).map(|it| it / scale));
        let mut cells = line(row);
        cells.extend(["harvest_ns", "harvest_1pct_ns"].map(ticks));
        for suffix in ["", "_cold"] {
            cells.push(ticks(&format!("background{suffix}_{name}")));
            for (_, key) in WORK {
                let key = match key {
                    "hot" | "cold" => format!("regions_{key}{suffix}"),
                    _ => format!("background{suffix}_{key}"),
                };
                cells.push(cell(row.value(&key)));
            }
        }
        table.row(cells);
    }
    table.left(&LEFT).to_string()
}

/// The call of the most memory against that of the least, and what each further root entry costs.
fn growth(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "CPU",
        "leaves",
        "a page each",
        "engine",
        "bbm",
        "MiB",
        "mean call",
        "MiB",
        "mean call",
        "ratio",
        "a root entry more",
    ]);
    let key = |row: &Row| {
        let words = ["backing", "stride"].map(|key| row.param(key));
        let [backing, stride] = words;
        vec![cpu(row), backing, stride, engine(row), row.param("bbm")]
    };
    for wanted in distinct(rows, key) {
        let of: Vec<&Row> = rows.iter().filter(|row| key(row) == wanted).collect();
        let (Some(least), Some(most)) = (of.first(), of.last()) else {
            continue;
        };
        let of = |key: &str| least.value(key).zip(most.value(key));
        let call = of("call_mean_ns");
        let entry = call
            .zip(of("root_entries"))
            .filter(|(_, (least, most))| least < most)
            .map(|((before, after), (least, most))| (after - before) / (most - least));
        let mut cells = wanted.clone();
        for row in [least, most] {
            cells.extend([row.param("mapped_mib"), cell(row.value("call_mean_ns"))]);
        }
        cells.push(call.map_or_else(
            || "-".to_owned(),
            |(before, after)| format!("{:.3}", after / before),
        ));
        cells.push(cell(entry));
        table.row(cells);
    }
    table.left(&[0, 1, 2, 3]).to_string()
}

/// The call, and rewriting everything after it, over memory; a line for each engine.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let mut charts = Vec::new();
    for timing in [Timing::Insn, Timing::Wall] {
        let wanted = |row: &&Row| {
            row.timing == timing.name() && row.case == "stopped" && row.param("stride") != SPARSE
        };
        let stopped = sorted(rows.iter().filter(wanted));
        for backing in distinct(&stopped, |row| row.param("backing")) {
            let of: Vec<Row> = stopped
                .iter()
                .filter(|row| row.param("backing") == backing)
                .cloned()
                .collect();
            let (name, scale) = unit(timing);
            for (title, key) in [
                ("the call", "call_ns"),
                ("rewriting all memory", "rewrite_ns"),
            ] {
                charts.push(Chart {
                    title: format!("{title}, leaves of {backing}, timing {}", timing.name()),
                    x: "MiB mapped".into(),
                    y: name.into(),
                    series: series(&of, key, scale),
                });
            }
        }
    }
    charts.extend(scaling::charts(&sorted(rows.iter()), &CURVES, way));
    charts
}

fn series(rows: &[Row], key: &str, scale: f64) -> Vec<Series> {
    let name = |row: &Row| {
        let bbm = match row.param("engine").as_str() {
            "swap" => format!(" bbm {}", row.param("bbm")),
            _ => String::new(),
        };
        format!("{}{bbm}, {} vCPUs", engine(row), row.param("vcpus"))
    };
    let of = |wanted: String| {
        let points = rows.iter().filter(|row| name(row) == wanted);
        let point = |row: &Row| Some((row.param("mapped_mib"), row.value(key)? / scale));
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

    fn appends(words: &[&str]) -> Vec<String> {
        let board = Board::qemu_virt().expect("the board file is read");
        let jobs = jobs(&options(words).expect("good options"), &board).expect("they fit");
        jobs.into_iter().map(|job| job.append).collect()
    }

    fn of(engine: &str, mib: u64, values: &str) -> Row {
        let params = format!(
            r#""vcpus":1,"engine":"{engine}","tracking":"fault","backing":"4k","bbm":2,"mapped_mib":{mib}"#
        );
        Row {
            case: "stopped".into(),
            ..row(Timing::Insn, &params, values)
        }
    }

    #[test]
    fn every_engine_that_the_cpu_has_is_measured_on_pages_and_on_blocks() {
        let all = appends(&["--timing", "insn"]);
        assert_eq!(all.len(), 3);
        assert!(all[2].contains("stride=1g") && all[2].ends_with("slot-mib=1024,16384"));
        let all = &all[..2];
        for words in [
            "engine=walk,lazy,swap,pie",
            "tracking=fault,dbm",
            "slot-mib=256,1024",
            "vcpus=1 ",
        ] {
            assert!(all.iter().all(|append| append.contains(words)), "{all:?}");
        }
        assert!(all[0].contains("backing=4k") && !all[0].contains("bbm="));
        assert!(all[1].contains("backing=2m") && all[1].contains("bbm=2,0"));
        let old = appends(&["--cpu", "cortex-a72", "--backing", "2m", "--mib", "8,16"]);
        assert!(
            old[0].contains("engine=walk,lazy,swap tracking=fault slot-mib=8,16"),
            "{old:?}"
        );
    }

    #[test]
    fn what_is_named_is_asked_for_whatever_the_cpu_has() {
        let words = [
            "--cpu",
            "cortex-a72",
            "--engine",
            "pie",
            "--tracking",
            "dbm",
        ];
        assert!(appends(&words)[0].contains("engine=pie tracking=dbm"));
    }

    #[test]
    fn growth_is_told_against_the_least_memory_and_costs_against_walk() {
        let rows = [
            of(
                "walk",
                1024,
                r#""call_ns":4000000,"call_mean_ns":4000000,"root_entries":1,"rewrite_ns":2000"#,
            ),
            of(
                "walk",
                256,
                r#""call_ns":1000000,"call_mean_ns":1000000,"root_entries":1"#,
            ),
            of("lazy", 256, r#""call_mean_ns":500,"root_entries":1"#),
            of("lazy", 4096, r#""call_mean_ns":533,"root_entries":4"#),
            of("pie", 1024, r#""call_ns":700,"rewrite_ns":2050"#),
        ];
        let text = report(&rows);
        for found in ["4.000", "1.066", "(1.025)", "11\n"] {
            assert!(text.contains(found), "{found}: {text}");
        }
        let charts = charts(&rows);
        assert_eq!(charts.len(), 2);
        assert_eq!(charts[0].series.len(), 3);
        assert_eq!(charts[0].series[0].points[1], ("1024".to_owned(), 4000.0));
    }
}
