//! Suite `ipi`: the five modes of the kernel's IPI benchmark, over numbers of vCPUs.

use anyhow::Result;

use super::options::Options;
use super::rows::{cell, distinct};
use super::scaling::{self, Curve};
use super::{Job, Row};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

/// One boot for each timing, with as many CPUs as the largest number of vCPUs needs.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    const MIB: u64 = 2;
    let vcpus = options.vcpus();
    let most = vcpus.iter().copied().max().unwrap_or(1);
    let options = Options {
        mib_per_vcpu: Some(MIB),
        ..options.clone()
    };
    let job = |timing| {
        let append = options.append("ipi", &vcpus, timing);
        Ok(Job {
            title: format!("up to {most} vCPUs, {timing:?}"),
            machine: options.machine(board, most, u64::from(most) * MIB, timing)?,
            append: format!(
                "{append} rounds={} receivers={}",
                options.rounds(timing),
                options.receivers
            ),
        })
    };
    options.timing().into_iter().map(job).collect()
}

/// What is told over numbers of vCPUs.
const CURVES: [Curve; 2] = [("", "total_ns", "a round"), ("", "send_ns", "a send")];

fn mode(row: &Row) -> String {
    row.case.clone()
}

/// A table for each timing: a line for each mode and number of vCPUs.
pub(super) fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    for timing in distinct(rows, |row| row.timing.clone()) {
        let heading = [
            "mode",
            "vCPUs",
            "rounds",
            "send",
            "total",
            "exits",
            "kicks",
            "delivered",
        ];
        let mut table = Table::new(&heading);
        for row in rows.iter().filter(|row| row.timing == timing) {
            let mut cells = vec![row.case.clone(), row.param("vcpus"), row.param("rounds")];
            let keys = ["send_ns", "total_ns", "exits", "kicks", "delivered"];
            cells.extend(keys.map(|key| cell(row.value(key))));
            table.row(cells);
        }
        let what = match timing.as_str() {
            "insn" => "instructions of a round, all CPUs together",
            _ => "nanoseconds of a round",
        };
        let receivers = rows.first().map(|row| row.param("receivers"));
        text += &format!(
            "\n{what}, receivers {}\n{}",
            receivers.unwrap_or_default(),
            table.left(&[0])
        );
    }
    text += &scaling::report(rows, &CURVES, mode);
    text
}

/// Time of a round over vCPUs, a line for each mode.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let chart = |timing: String| {
        let line = |mode: String| Series {
            points: rows
                .iter()
                .filter(|row| row.timing == timing && row.case == mode)
                .filter_map(|row| Some((row.param("vcpus"), row.value("total_ns")?)))
                .collect(),
            name: mode,
        };
        Chart {
            title: format!("one round, {timing}"),
            x: "vCPUs".into(),
            y: "nanoseconds".into(),
            series: distinct(rows, |row| row.case.clone())
                .into_iter()
                .map(line)
                .collect(),
        }
    };
    let timings = distinct(rows, |row| row.timing.clone()).into_iter();
    let others = timings.filter(|timing| timing != Timing::Parallel.name());
    let mut charts: Vec<Chart> = others.map(chart).collect();
    charts.extend(scaling::charts(rows, &CURVES, mode));
    charts
}

#[cfg(test)]
mod tests {
    use super::{charts, jobs, report};
    use crate::bench::Row;
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    #[test]
    fn each_timing_is_one_boot_with_a_hundred_thousand_rounds() {
        let board = Board::qemu_virt().expect("the board file is read");
        let jobs = jobs(&options(&[]).expect("good options"), &board).expect("they fit");
        assert_eq!((jobs.len(), jobs[0].machine.cpus), (2, 9));
        assert!(jobs[0].append.ends_with("rounds=100000 receivers=sleeping"));
    }

    #[test]
    fn modes_are_lines() {
        let of = |vcpus: u32| Row {
            case: "broadcast".to_owned(),
            ..row(
                Timing::Insn,
                &format!(r#""vcpus":{vcpus},"rounds":10,"receivers":"sleeping""#),
                r#""send_ns":120.5,"total_ns":1500.00,"exits":2.00,"kicks":1.00,"delivered":10"#,
            )
        };
        let rows = [of(2), of(4)];
        let text = report(&rows);
        assert!(
            text.contains("1 500") && text.contains("sleeping"),
            "{text}"
        );
        assert_eq!(charts(&rows)[0].series[0].points.len(), 2);
    }
}
