//! Suite `heat`: which memory is hot, beside what the guest is known to do: over CPU models that set access flags in hardware
//! and in software, and over memory mapped by pages and by blocks.

use anyhow::Result;

use super::options::Options;
use super::rows::{cell, cpu, distinct};
use super::{Job, Row};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Map, Panel, Series};
use crate::table::Table;

/// Everything, hardware access flags only, none.
const MODELS: [&str; 3] = ["max", "neoverse-n1", "cortex-a72"];
/// Passes that a working set is counted over, with what the text calls them.
const WINDOWS: [(&str, &str); 2] = [("1", "last pass"), ("4", "last 4 passes")];
const MIB: f64 = 1024.0 * 1024.0;

/// A boot for each CPU model and leaf size.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let models = match &options.cpu {
        Some(model) => vec![model.clone()],
        None => MODELS.map(str::to_owned).to_vec(),
    };
    let backings = match options.backing.is_empty() {
        true => vec!["4k".to_owned(), "2m".to_owned()],
        false => options.backing.clone(),
    };
    let vcpus = match options.vcpus.is_empty() {
        true => vec![1],
        false => options.vcpus(),
    };
    let most = vcpus.iter().copied().max().unwrap_or(1);
    let timing = options.timing.first().copied().unwrap_or(Timing::Wall);
    let mut jobs = Vec::new();
    for model in &models {
        for backing in &backings {
            let mut options = options.clone();
            options.cpu = Some(model.clone());
            options.backing = vec![backing.clone()];
            options.mib_per_vcpu = Some(options.aging.heat_mib);
            if options.locking.is_empty() {
                options.locking = vec![super::options::Locking::Lockless];
            }
            let guest_mib = u64::from(most) * options.mib_per_vcpu(timing);
            jobs.push(Job {
                title: format!("{model}, leaves of {backing}"),
                machine: options.machine(board, most, guest_mib, timing)?,
                append: format!(
                    "{} {}",
                    options.append("heat", &vcpus, timing),
                    options.aging.append()
                ),
            });
        }
    }
    Ok(jobs)
}

/// What tells the cases of a run apart.
fn about(row: &Row) -> Vec<String> {
    let mut words = vec![cpu(row)];
    let keys = ["access_flag", "backing", "vcpus", "locking", "precision"];
    words.extend(keys.map(|key| row.param(key)));
    words
}

/// The same in one line.
fn words(about: &[String]) -> String {
    match about {
        [cpu, flag, leaves, vcpus, locking, precision] => format!(
            "{cpu}, flags set by {flag}, leaves of {leaves}, {vcpus} vCPUs, {locking}, {precision}"
        ),
        _ => about.join(", "),
    }
}

/// Estimates beside the truth, what passes cost, and one map in letters.
pub(super) fn report(rows: &[Row]) -> String {
    let Some(first) = rows.first() else {
        return String::new();
    };
    let line = ["CPU", "access flag", "leaves", "vCPUs", "locking", "passes"];
    let mut estimates = line.to_vec();
    for (_, words) in WINDOWS {
        estimates.extend([words, "truth", "largest error, %"]);
    }
    let mut estimates = Table::new(&estimates);
    let mut costs = line.to_vec();
    costs.extend([
        "count",
        "pass, us",
        "in steps",
        "entries",
        "entries/us",
        "locked",
        "VM-wide TLBI",
        "access faults",
    ]);
    let mut costs = Table::new(&costs);
    for scan in rows.iter().filter(|row| row.case == "scan") {
        let passes: Vec<&Row> = passes_of(rows, scan).collect();
        let mut cells = about(scan);
        for (window, _) in WINDOWS {
            for of in ["estimate", "truth"] {
                let key = format!("{of}_{window}_bytes");
                cells.push(cell(super::rows::mean(&passes, &key).map(|it| it / MIB)));
            }
            let ppm = scan.value(&format!("error_{window}_ppm"));
            cells.push(cell(ppm.map(|ppm| ppm / 1e4)));
        }
        estimates.row(cells);
        let mut cells = about(scan);
        let value = |key: &str| scan.value(key);
        let rate = value("leaves").zip(value("busy_ns"));
        cells.extend([
            cell(value("passes")),
            cell(value("pass_ns").map(|ns| ns / 1e3)),
            cell(value("busy_ns").map(|ns| ns / 1e3)),
            cell(value("leaves")),
            cell(rate.map(|(leaves, ns)| 1e3 * leaves / ns)),
            cell(value("lock_acquired_aging")),
            cell(value("tlbi_vmid_aging")),
            cell(value("faults_access")),
        ]);
        costs.row(cells);
    }
    let left = [0, 1, 2, 4, 5];
    let mut text = format!(
        "\nheat, timing {}, {}\n{} MiB a vCPU, {} % hot, {} % warm (used in one pass of 4), the rest cold; both move on every 4 passes\n",
        first.timing,
        first.machine_words(),
        first.param("mib_per_vcpu"),
        first.param("hot_percent"),
        first.param("warm_percent"),
    );
    text += &format!(
        "\nworking set and truth, mean of all passes, MiB\n{}",
        estimates.left(&left)
    );
    text += &format!("\na pass, mean\n{}", costs.left(&left));
    let passes: Vec<&Row> = passes_of(rows, first).collect();
    text += &format!(
        "\nidle age of each 2 MiB after each pass (0: used since the pass before; z: 35 passes or more), {}\n",
        words(&about(first))
    );
    let mut map = Table::new(&["pass", "ages", "working set", "truth"]);
    for row in passes {
        map.row(vec![
            cell(row.value("pass")),
            ages(row).to_owned(),
            cell(row.value("estimate_1_bytes").map(|bytes| bytes / MIB)),
            cell(row.value("truth_1_bytes").map(|bytes| bytes / MIB)),
        ]);
    }
    text + &map.left(&[1]).to_string()
}

/// The passes of the case that `row` belongs to.
fn passes_of<'a>(rows: &'a [Row], row: &Row) -> impl Iterator<Item = &'a Row> {
    let wanted = about(row);
    rows.iter()
        .filter(move |row| row.case == "pass" && about(row) == wanted)
}

fn ages(row: &Row) -> &str {
    let ages = row.values.get("ages").and_then(|ages| ages.as_str());
    ages.unwrap_or_default()
}

/// For each case a map over address and pass, and the working set beside the truth.
pub(super) fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels = Vec::new();
    for case in distinct(rows, about) {
        let passes: Vec<&Row> = rows
            .iter()
            .filter(|row| row.case == "pass" && about(row) == case)
            .collect();
        panels.push(Panel::Map(Map {
            title: format!("idle age in passes: {}", words(&case)),
            x: "IPA from 0x80000000, MiB".into(),
            y: "pass".into(),
            x_step: 2,
            rows: passes
                .iter()
                .map(|row| ages(row).chars().map(age).collect())
                .collect(),
        }));
        let series = WINDOWS.iter().flat_map(|(window, words)| {
            ["estimate", "truth"].map(|of| {
                let key = format!("{of}_{window}_bytes");
                let point = |row: &&Row| {
                    let pass = row.value("pass")?;
                    Some((pass.to_string(), row.value(&key)? / MIB))
                };
                Series {
                    name: format!("{of}, {words}"),
                    points: passes.iter().filter_map(point).collect(),
                }
            })
        });
        panels.push(Panel::Lines(Chart {
            title: format!("working set: {}", words(&case)),
            x: "pass".into(),
            y: "MiB".into(),
            series: series.collect(),
        }));
    }
    panels
}

/// The age that a letter stands for; none where nothing is mapped.
fn age(letter: char) -> Option<u32> {
    letter.to_digit(36)
}

#[cfg(test)]
mod tests {
    use super::{age, jobs, panels, report};
    use crate::bench::options::tests::options;
    use crate::bench::rows::Row;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;
    use crate::plot::Panel;

    fn rows() -> Vec<Row> {
        let params = r#""vcpus":1,"backing":"4k","access_flag":"hardware""#;
        let pass = |number: u32, ages: &str| {
            let values = format!(
                r#""pass":{number},"ages":"{ages}","estimate_1_bytes":4194304,"truth_1_bytes":4194304,"estimate_4_bytes":8388608,"truth_4_bytes":8388608"#
            );
            let mut row = row(Timing::Wall, params, &values);
            row.case = "pass".into();
            row
        };
        let mut scan = row(
            Timing::Wall,
            params,
            r#""passes":2,"leaves":1000,"busy_ns":2000,"error_1_ppm":5000,"error_4_ppm":0"#,
        );
        scan.case = "scan".into();
        vec![pass(1, "01."), pass(2, "0z."), scan]
    }

    #[test]
    fn every_model_and_leaf_size_is_booted_unless_one_is_named() {
        let board = Board::qemu_virt().expect("the board file is read");
        let count = |words: &[&str]| {
            let jobs = jobs(&options(words).expect("good options"), &board).expect("they fit");
            assert!(jobs.iter().all(|job| job.append.contains("mib=64")));
            jobs.len()
        };
        assert_eq!(count(&[]), 6);
        assert_eq!(count(&["--cpu", "max", "--backing", "2m"]), 1);
    }

    #[test]
    fn the_table_has_estimate_truth_and_error() {
        let text = report(&rows());
        for words in ["0.5", "500", "0z.", "truth"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(report(&[]), "");
    }

    #[test]
    fn a_map_has_a_line_for_each_pass() {
        let panels = panels(&rows());
        let Some(Panel::Map(map)) = panels.first() else {
            panic!("no map")
        };
        let expected = [vec![Some(0), Some(1), None], vec![Some(0), Some(35), None]];
        assert_eq!(map.rows, expected);
        assert_eq!(panels.len(), 2);
        assert_eq!((age('a'), age('.')), (Some(10), None));
    }
}
