//! Suite `lines`: what moves between CPUs, by the parallel clock.

use anyhow::Result;

use super::options::Options;
use super::rows::cell;
use super::{Job, Row};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

/// What a line costs unless said otherwise.
pub(crate) const COST: u32 = 150;
/// Additions of each vCPU to one word.
const ROUNDS: u32 = 1000;
/// Harvests.
const ITERATIONS: u32 = 5;

/// One boot for each cost of a line.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let vcpus = match options.vcpus.as_slice() {
        [] => vec![8],
        some => some.to_vec(),
    };
    let costs = match options.clock.line_cost.as_slice() {
        [] => vec![COST],
        some => some.to_vec(),
    };
    let timing = Timing::Parallel;
    let most = vcpus.iter().copied().max().unwrap_or(1);
    let job = |cost| {
        let guest_mib = u64::from(most) * options.mib_per_vcpu(timing);
        let mut machine = options.machine(board, most, guest_mib, timing)?;
        machine.clock.line_cost = cost;
        let mut append = options.append("lines", &vcpus, timing);
        append += &format!(" rounds={ROUNDS}");
        if options.iterations.is_none() {
            append += &format!(" iterations={ITERATIONS}");
        }
        Ok(Job {
            title: format!("up to {most} vCPUs, a line costs {cost}"),
            machine,
            append,
        })
    };
    costs.into_iter().map(job).collect()
}

/// Three tables.
pub(super) fn report(rows: &[Row]) -> String {
    let of = |case: &'static str| rows.iter().filter(move |row| row.case == case);
    let of_row = |row: &Row, key: &str| cell(row.value(key));
    let mut words = Table::new(&["vCPUs", "a line costs", "ns for an addition"]);
    for row in of("one word") {
        words.row(vec![
            row.param("vcpus"),
            row.param("line_cost"),
            of_row(row, "ns_per_add"),
        ]);
    }
    let mut faults = Table::new(&[
        "vCPUs",
        "locking",
        "what",
        "layout",
        "faults",
        "ns/fault",
        "moved",
        "upgraded",
        "all moved",
        "all upgraded",
    ]);
    for row in rows.iter().filter(|row| !row.param("layout").is_empty()) {
        let count = faults_of(row);
        let each = |key: &str| cell(each_fault(row, key));
        let vcpus: Option<f64> = row.param("vcpus").parse().ok();
        let ns = row.value("vcpu_ns").zip(count).zip(vcpus);
        faults.row(vec![
            row.param("vcpus"),
            row.param("locking"),
            row.case.clone(),
            row.param("layout"),
            cell(count),
            cell(ns.map(|((ns, count), vcpus)| ns * vcpus / count)),
            each("line_transfers_among"),
            each("line_upgrades_among"),
            each("line_transfers"),
            each("line_upgrades"),
        ]);
    }
    let mut harvests = Table::new(&[
        "vCPUs",
        "locking",
        "stores/ms alone",
        "beside",
        "slower by",
        "get, us",
        "clear, us",
        "clear, ns/page",
    ]);
    for row in of("harvest") {
        let slower = row
            .value("stores_per_ms_beside")
            .zip(row.value("stores_per_ms_alone"));
        let microseconds = |key: &str| cell(row.value(key).map(|ns| ns / 1e3));
        harvests.row(vec![
            row.param("vcpus"),
            row.param("locking"),
            of_row(row, "stores_per_ms_alone"),
            of_row(row, "stores_per_ms_beside"),
            slower.map_or_else(
                || "-".into(),
                |(beside, alone)| format!("{:.1} %", 100.0 * (1.0 - beside / alone)),
            ),
            microseconds("get_ns"),
            microseconds("clear_ns"),
            of_row(row, "clear_ns_per_page"),
        ]);
    }
    format!(
        "\nall vCPUs add to one word\n{words}\n\
         lines for each fault: those that moved from one vCPU to another, those of which another lost its copy, and both with those \
         that the controller had\n{}\n\
         vCPUs that store at random while the controller reads and clears the log\n{}",
        faults.left(&[1, 2, 3]),
        harvests.left(&[1])
    )
}

/// Faults that map pages, or that make them writable.
fn faults_of(row: &Row) -> Option<f64> {
    let faults = row.value("faults_permission");
    let faults = faults.or_else(|| row.value("faults_translation"));
    faults.filter(|faults| *faults > 0.0)
}

/// A count for each fault.
pub(crate) fn each_fault(row: &Row, key: &str) -> Option<f64> {
    Some(row.value(key)? / faults_of(row)?)
}

/// What an addition takes, over vCPUs.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let points = rows.iter().filter(|row| row.case == "one word");
    let points = points.filter_map(|row| Some((row.param("vcpus"), row.value("ns_per_add")?)));
    vec![Chart {
        title: "all vCPUs add to one word".into(),
        x: "vCPUs".into(),
        y: "virtual nanoseconds for an addition".into(),
        series: vec![Series {
            name: "atomic".into(),
            points: points.collect(),
        }],
    }]
}

#[cfg(test)]
mod tests {
    use super::{charts, each_fault, jobs, report};
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    #[test]
    fn lines_cost_something_unless_said_otherwise() {
        let board = Board::qemu_virt().expect("the board file is read");
        let of = |words: &[&str]| {
            let jobs = jobs(&options(words).expect("good options"), &board).expect("they fit");
            let costs = jobs.iter().map(|job| job.machine.clock.line_cost);
            costs.collect::<Vec<_>>()
        };
        assert_eq!(of(&[]), [150]);
        assert_eq!(of(&["--line-cost", "0,90"]), [0, 90]);
    }

    #[test]
    fn lines_are_counted_for_each_fault() {
        let mut faults = row(
            Timing::Parallel,
            r#""vcpus":8,"locking":"lockless","layout":"apart""#,
            r#""faults_permission":512,"vcpu_ns":28160,"line_transfers_among":1024"#,
        );
        faults.case = "write faults".into();
        assert_eq!(each_fault(&faults, "line_transfers_among"), Some(2.0));
        let mut word = row(Timing::Parallel, r#""vcpus":8"#, r#""ns_per_add":151"#);
        word.case = "one word".into();
        let mut harvest = row(
            Timing::Parallel,
            r#""vcpus":8,"locking":"lockless""#,
            r#""stores_per_ms_alone":200,"stores_per_ms_beside":150"#,
        );
        harvest.case = "harvest".into();
        let rows = [word, faults, harvest];
        let text = report(&rows);
        for expected in ["440", "151", "25.0 %"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert_eq!(charts(&rows)[0].series[0].points.len(), 1);
    }
}
