//! Suite `get`: what reading the dirty bitmap costs when few pages of a large slot are dirty.

use anyhow::Result;

use super::options::Options;
use super::rows::{distinct, mean};
use super::{Job, Row};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::{Table, number};

/// One boot for each slot size, with one vCPU.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let job = |&slot_mib: &u64| {
        let mut machine = options.machine(board, 1, 64, Timing::Insn)?;
        machine.memory_mib = options.memory.unwrap_or(slot_mib + slot_mib / 4 + 512);
        let append = format!(
            "{} slot-mib={slot_mib}",
            options.append("get", &[1], Timing::Insn)
        );
        Ok(Job {
            title: format!("slot of {slot_mib} MiB"),
            machine,
            append,
        })
    };
    options.slot_mib.iter().map(job).collect()
}

/// A line for each slot size.
pub(super) fn report(rows: &[Row]) -> String {
    let mut table = Table::new(&["slot MiB", "dirty pages", "get, instructions"]);
    for size in distinct(rows, |row| row.param("slot_mib")) {
        let group: Vec<&Row> = rows
            .iter()
            .filter(|row| row.param("slot_mib") == size)
            .collect();
        let cell = |key: &str| mean(&group, key).map_or_else(|| "-".to_owned(), number);
        table.row(vec![size, cell("pages_reported"), cell("get_ns")]);
    }
    format!("\nget\n{table}")
}

/// Cost over slot size.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let point = |size: String| {
        let group: Vec<&Row> = rows
            .iter()
            .filter(|row| row.param("slot_mib") == size)
            .collect();
        mean(&group, "get_ns").map(|cost| (size, cost))
    };
    let points = distinct(rows, |row| row.param("slot_mib"))
        .into_iter()
        .filter_map(point)
        .collect();
    let series = vec![Series {
        name: "get".into(),
        points,
    }];
    vec![Chart {
        title: "get with few dirty pages".into(),
        x: "slot, MiB".into(),
        y: "instructions".into(),
        series,
    }]
}

#[cfg(test)]
mod tests {
    use super::{jobs, report};
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    #[test]
    fn a_boot_for_each_size_with_more_ram_than_the_slot() {
        let board = Board::qemu_virt().expect("the board file is read");
        let jobs = jobs(
            &options(&["--slot-mib", "1024,2048"]).expect("good options"),
            &board,
        )
        .expect("they fit");
        assert_eq!(jobs.len(), 2);
        assert!(jobs[1].machine.memory_mib > 2048 && jobs[1].append.ends_with("slot-mib=2048"));
    }

    #[test]
    fn a_line_for_each_size() {
        let of = |size: u32| {
            row(
                Timing::Insn,
                &format!(r#""slot_mib":{size}"#),
                r#""get_ns":1500,"pages_reported":100"#,
            )
        };
        let text = report(&[of(1024), of(16_384)]);
        assert!(text.contains("16384") && text.contains("1 500"), "{text}");
    }
}
