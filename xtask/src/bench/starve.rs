//! Suite `starve`: how long the exclusive side of the MMU lock is waited for while every vCPU faults as fast as it can.

use anyhow::Result;

use super::options::Options;
use super::{Job, Row};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::{Table, number};

/// One boot with real concurrency; without it nobody is in the way.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let vcpus = options.vcpus();
    let most = vcpus.iter().copied().max().unwrap_or(1);
    let machine = options.machine(
        board,
        most,
        u64::from(most) * options.mib_per_vcpu(Timing::Wall),
        Timing::Wall,
    )?;
    let append = options.append("starve", &vcpus, Timing::Wall);
    Ok(vec![Job {
        title: format!("up to {most} vCPUs"),
        machine,
        append,
    }])
}

/// A line for each number of vCPUs and mode.
pub(super) fn report(rows: &[Row]) -> String {
    let mut table = Table::new(&["vCPUs", "locking", "times", "mean wait, us", "longest, us"]);
    for row in rows {
        let microseconds = |key: &str| {
            row.value(key)
                .map_or_else(|| "-".to_owned(), |wait| number(wait / 1e3))
        };
        let times = row
            .value("exclusive_acquired")
            .map_or_else(|| "-".to_owned(), number);
        table.row(vec![
            row.param("vcpus"),
            row.param("locking"),
            times,
            microseconds("exclusive_mean_ns"),
            microseconds("exclusive_max_ns"),
        ]);
    }
    format!(
        "\nexclusive side of the MMU lock among faulting vCPUs\n{}",
        table.left(&[1])
    )
}

/// Mean wait over vCPUs, a line for each mode.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let Some(wait) = row.value("exclusive_mean_ns") else {
            continue;
        };
        let (name, point) = (row.param("locking"), (row.param("vcpus"), wait / 1e3));
        match series.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => series.push(Series {
                name,
                points: vec![point],
            }),
        }
    }
    let title = "mean wait for the exclusive side".into();
    vec![Chart {
        title,
        x: "vCPUs".into(),
        y: "microseconds".into(),
        series,
    }]
}

#[cfg(test)]
mod tests {
    use super::{charts, jobs, report};
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    #[test]
    fn one_boot_with_all_vcpus_at_once() {
        let board = Board::qemu_virt().expect("the board file is read");
        let jobs = jobs(
            &options(&["--vcpus", "2,16"]).expect("good options"),
            &board,
        )
        .expect("they fit");
        assert_eq!((jobs.len(), jobs[0].machine.cpus), (1, 17));
    }

    #[test]
    fn waits_are_microseconds() {
        let of = |vcpus: u32| {
            let params = format!(r#""vcpus":{vcpus},"locking":"rwlock""#);
            row(
                Timing::Wall,
                &params,
                r#""exclusive_acquired":128,"exclusive_mean_ns":1500,"exclusive_max_ns":9000"#,
            )
        };
        let rows = [of(1), of(2)];
        assert!(report(&rows).contains("1.50"), "{}", report(&rows));
        assert_eq!(charts(&rows)[0].series[0].points.len(), 2);
    }
}
