//! Suite `fault`: instructions from trap to resume of one dirty write fault, for each CPU model and locking mode, and with
//! the IPA taken from a second walk of stage 1 or from HPFAR_EL2. Without what exits do against attacks on branch predictors,
//! unless that is asked for: it is the same for every exit of a CPU (suite `exit`).

use anyhow::Result;

use super::options::Options;
use super::rows::{distinct, mean};
use super::{Job, Row};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::{Table, number};

/// One boot with one vCPU for each CPU model and source of the IPA.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let models = options.cpu.as_ref().map_or_else(
        || board.limits.cpu_models.clone(),
        |model| vec![model.clone()],
    );
    let sources = options.hpfar.as_ref().map_or_else(
        || vec!["at".to_owned(), "trust".to_owned()],
        |source| vec![source.clone()],
    );
    let mut jobs = Vec::new();
    for model in &models {
        for source in &sources {
            let options = Options {
                cpu: Some(model.clone()),
                hpfar: Some(source.clone()),
                mitigations: match options.mitigations.as_slice() {
                    [] => vec!["off".to_owned()],
                    asked => asked.to_vec(),
                },
                ..options.clone()
            };
            let machine =
                options.machine(board, 1, options.mib_per_vcpu(Timing::Insn), Timing::Insn)?;
            let append = options.append("dirty", &[1], Timing::Insn);
            jobs.push(Job {
                title: format!("{model}, hpfar={source}"),
                machine,
                append,
            });
        }
    }
    Ok(jobs)
}

/// A line for each CPU model and source, a column for each mode.
pub(super) fn report(rows: &[Row]) -> String {
    let modes = distinct(rows, |row| row.param("locking"));
    let mut heading = vec!["CPU", "IPA from"];
    heading.extend(modes.iter().map(String::as_str));
    let mut table = Table::new(&heading);
    for (cpu, source) in distinct(rows, key) {
        let mut cells = vec![cpu.clone(), source_words(&source).to_owned()];
        for mode in &modes {
            cells.push(value(rows, &cpu, &source, mode).map_or_else(|| "-".to_owned(), number));
        }
        table.row(cells);
    }
    format!(
        "\ninstructions from trap to resume of one dirty write fault\n{}",
        table.left(&[0, 1])
    )
}

/// A line for each mode and source over the CPU models.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let mut series = Vec::new();
    for (mode, source) in distinct(rows, |row| (row.param("locking"), row.param("hpfar"))) {
        let cpus = distinct(rows, |row| key(row).0);
        let point = |cpu: String| Some((cpu.clone(), value(rows, &cpu, &source, &mode)?));
        series.push(Series {
            name: format!("{mode}, {source}"),
            points: cpus.into_iter().filter_map(point).collect(),
        });
    }
    vec![Chart {
        title: "one dirty write fault".into(),
        x: "CPU model".into(),
        y: "instructions".into(),
        series,
    }]
}

fn key(row: &Row) -> (String, String) {
    let cpu = row
        .machine
        .get("cpu")
        .and_then(|cpu| cpu.as_str())
        .unwrap_or("?");
    (cpu.to_owned(), row.param("hpfar"))
}

fn value(rows: &[Row], cpu: &str, source: &str, mode: &str) -> Option<f64> {
    let wanted = |row: &&Row| {
        key(row) == (cpu.to_owned(), source.to_owned()) && row.param("locking") == mode
    };
    mean(
        &rows.iter().filter(wanted).collect::<Vec<_>>(),
        "fault_insn",
    )
}

fn source_words(source: &str) -> &str {
    match source {
        "at" => "AT S1E1R",
        "trust" => "HPFAR_EL2",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::{charts, jobs, report};
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    #[test]
    fn every_model_and_source_is_booted_unless_one_is_named() {
        let board = Board::qemu_virt().expect("the board file is read");
        let count = |words: &[&str]| {
            jobs(&options(words).expect("good options"), &board)
                .expect("they fit")
                .len()
        };
        assert_eq!(count(&[]), 2 * board.limits.cpu_models.len());
        assert_eq!(count(&["--cpu", "max"]), 2);
        assert_eq!(count(&["--cpu", "max", "--hpfar", "at"]), 1);
    }

    #[test]
    fn modes_are_columns() {
        let of = |mode: &str, insn: u32| {
            row(
                Timing::Insn,
                &format!(r#""locking":"{mode}","hpfar":"at""#),
                &format!(r#""fault_insn":{insn}"#),
            )
        };
        let rows = [of("mutex", 333), of("lockless", 222)];
        let text = report(&rows);
        assert!(
            text.contains("mutex  lockless") && text.contains("AT S1E1R") && text.contains("222"),
            "{text}"
        );
        assert_eq!(charts(&rows)[0].series.len(), 2);
    }
}
