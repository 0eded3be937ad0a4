//! Suite `checkpoint`: how much slower a guest is while checkpoint after checkpoint is taken of it, over the length of an
//! epoch.

use anyhow::Result;

use super::options::Options;
use super::protect::{engine, possible};
use super::rows::{cell, distinct};
use super::{Job, Row, unit};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

/// Heading, key, what it is divided by.
type Column = (&'static str, &'static str, f64);

const COLUMNS: [Column; 14] = [
    ("epochs", "epochs", 1.0),
    ("epoch was", "epoch_ns", 1e3),
    ("call", "call_ns", 1e3),
    ("longest", "call_max_ns", 1e3),
    ("ack", "ack_ns", 1e3),
    ("harvest", "harvest_ns", 1e3),
    ("copy", "copy_ns", 1e3),
    ("background", "background_ns", 1e3),
    ("pages", "pages_per_epoch", 1.0),
    ("faults", "faults_per_epoch", 1.0),
    ("splits", "splits_per_epoch", 1.0),
    ("late", "calls_late", 1.0),
    ("replaced", "calls_replaced", 1.0),
    ("lost", "pages_lost", 1.0),
];
const LINE: [&str; 5] = ["engine", "leaves", "vCPUs", "epoch, us", "slower by, %"];

/// One vCPU with instructions counted, and as many as were asked for with real concurrency.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let mut options = possible(options, board);
    if options.backing.is_empty() {
        options.backing = vec!["2m".to_owned()];
    }
    let job = |timing: Timing| {
        let vcpus = match timing {
            Timing::Insn => vec![1],
            Timing::Wall | Timing::Parallel if options.vcpus.is_empty() => vec![1],
            Timing::Wall | Timing::Parallel => options.vcpus(),
        };
        let most = vcpus.iter().copied().max().unwrap_or(1);
        let guest_mib = u64::from(most) * options.mib_per_vcpu(timing);
        let machine = options.machine(board, most, guest_mib, timing)?;
        let lengths: Vec<String> = options.epoch_us.iter().map(u32::to_string).collect();
        Ok(Job {
            title: format!("{}, timing {}", machine.cpu, timing.name()),
            append: format!(
                "{} epochs={} epoch-us={}",
                options.append("checkpoint", &vcpus, timing),
                options.epochs,
                lengths.join(",")
            ),
            machine,
        })
    };
    options.timing().into_iter().map(job).collect()
}

/// A line for each engine and length.
pub(super) fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    for timing in Timing::ALL {
        let mut of = rows
            .iter()
            .filter(|row| row.timing == timing.name())
            .peekable();
        let Some(first) = of.peek() else {
            continue;
        };
        text += &format!(
            "\ncheckpoint, timing {}, {}\n{} MiB a vCPU, which store at random; means of an epoch, {}\n",
            timing.name(),
            first.machine_words(),
            first.param("mib_per_vcpu"),
            unit(timing).0
        );
        let mut heading = LINE.to_vec();
        heading.extend(COLUMNS.iter().map(|(name, ..)| *name));
        let mut table = Table::new(&heading);
        for row in of {
            let mut cells = vec![
                engine(row),
                row.param("backing"),
                row.param("vcpus"),
                row.param("epoch_us"),
                cell(slower(row)),
            ];
            let column = |(_, key, scale): &Column| cell(row.value(key).map(|it| it / scale));
            cells.extend(COLUMNS.iter().map(column));
            table.row(cells);
        }
        text += &table.left(&[0, 1]).to_string();
    }
    text
}

/// Percent of its stores that the guest loses.
fn slower(row: &Row) -> Option<f64> {
    let alone = row.value("stores_per_s_alone").filter(|&rate| rate > 0.0)?;
    Some(100.0 * (1.0 - row.value("stores_per_s")? / alone))
}

/// The guest's loss over the length of an epoch, a line for each engine.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let name = |row: &Row| format!("{}, {} vCPUs", engine(row), row.param("vcpus"));
    let chart = |timing: Timing| {
        let of: Vec<Row> = rows
            .iter()
            .filter(|row| row.timing == timing.name())
            .cloned()
            .collect();
        let line = |wanted: String| {
            let points = of.iter().filter(|row| name(row) == wanted);
            // Below nothing is noise.
            let point = |row: &Row| Some((row.param("epoch_us"), slower(row)?.max(0.0)));
            Series {
                points: points.filter_map(point).collect(),
                name: wanted,
            }
        };
        Chart {
            title: format!(
                "checkpoints while the guest stores, timing {}",
                timing.name()
            ),
            x: "epoch, microseconds".into(),
            y: "slower by, %".into(),
            series: distinct(&of, name).into_iter().map(line).collect(),
        }
    };
    let timings = Timing::ALL.into_iter();
    let measured = |timing: &Timing| rows.iter().any(|row| row.timing == timing.name());
    timings.filter(measured).map(chart).collect()
}

#[cfg(test)]
mod tests {
    use super::{charts, jobs, report};
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    #[test]
    fn every_length_under_both_timings() {
        let board = Board::qemu_virt().expect("the board file is read");
        let words = ["--epoch-us", "500,2000", "--epochs", "7"];
        let jobs = jobs(&options(&words).expect("good options"), &board).expect("they fit");
        assert_eq!(jobs.len(), 2);
        assert!(
            jobs.iter()
                .all(|job| job.append.ends_with("epochs=7 epoch-us=500,2000"))
        );
    }

    #[test]
    fn the_loss_is_told_in_percent() {
        let rows = [row(
            Timing::Wall,
            r#""vcpus":1,"engine":"walk","tracking":"dbm","epoch_us":1000"#,
            r#""stores_per_s":750,"stores_per_s_alone":1000,"call_ns":2000"#,
        )];
        let text = report(&rows);
        assert!(
            text.contains("walk, dbm") && text.contains(" 25 "),
            "{text}"
        );
        assert_eq!(
            charts(&rows)[0].series[0].points,
            [("1000".to_owned(), 25.0)]
        );
        assert_eq!(report(&[]), "");
    }
}
