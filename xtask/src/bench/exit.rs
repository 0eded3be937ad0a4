//! Suite `exit`: what exits of each kind cost, beside what KVM needs on the same emulator, without and with what exits do against
//! attacks on branch predictors.

use anyhow::Result;

use super::options::Options;
use super::rows::{cell, cpu, distinct};
use super::{Job, Row};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

/// CPU models that are measured unless one is named.
const MODELS: [&str; 2] = ["neoverse-n1", "max"];
/// vCPUs of the VM that is measured; the other VM has as many, which hold no CPU.
const VCPUS: u32 = 4;
/// Guest memory of each vCPU: what faults are measured on.
const MIB: u64 = 8;

/// Where KVM's figures come from.
const SOURCE: &str = "KVM: Linux 6.12.95 with VHE under QEMU 10.0.2, measured before and not by this run: kvm-unit-tests' micro-bench \
                      (hypercall, MMIO, EOI, IPI, timer) and dirty_log_perf_test (write fault)";

/// Instructions that KVM needs on `neoverse-n1` and on `max`, and the most that Vellum may.
const KVM: [(&str, [f64; 2], Option<f64>); 7] = [
    ("hypercall", [1308.0, 1367.0], Some(100.0)),
    ("mmio_vgic", [2150.0, 2211.0], Some(250.0)),
    ("mmio_device", [7038.0, 7250.0], Some(300.0)),
    ("eoi", [21.0, 21.0], None),
    ("ipi_running", [5110.0, 5218.0], Some(700.0)),
    ("timer", [5302.0, 5428.0], None),
    ("fault_write", [3349.0, 3530.0], Some(300.0)),
];

/// One boot for each CPU model and timing; instructions are counted without mitigations and with them.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let models = options.cpu.as_ref().map_or_else(
        || MODELS.map(str::to_owned).to_vec(),
        |cpu| vec![cpu.clone()],
    );
    let mut jobs = Vec::new();
    for timing in options.timing() {
        let mitigations = match (options.mitigations.as_slice(), timing) {
            ([], Timing::Insn) => vec!["off".to_owned(), "on".to_owned()],
            ([], _) => vec!["auto".to_owned()],
            (asked, _) => asked.to_vec(),
        };
        for model in &models {
            for what in &mitigations {
                let options = Options {
                    cpu: Some(model.clone()),
                    mib_per_vcpu: Some(MIB),
                    mitigations: vec![what.clone()],
                    ..options.clone()
                };
                let machine = options.machine(board, VCPUS, u64::from(VCPUS) * MIB, timing)?;
                jobs.push(Job {
                    title: format!("{model}, {}, mitigations={what}", timing.name()),
                    append: options.append("exit", &[VCPUS], timing),
                    machine,
                });
            }
        }
    }
    Ok(jobs)
}

/// A table for each machine and timing.
pub(super) fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    for (model, timing) in distinct(rows, |row| (cpu(row), row.timing.clone())) {
        let group: Vec<&Row> = rows
            .iter()
            .filter(|row| cpu(row) == model && row.timing == timing)
            .collect();
        let Some(first) = group.first() else { continue };
        let (group, mitigated): (Vec<&Row>, Vec<&Row>) = group
            .iter()
            .partition(|row| at_exits(row) == at_exits(first));
        text += &format!(
            "\n{}; 2 VMs, {} vCPUs\n",
            first.machine_words(),
            first.param("vcpus")
        );
        text += &if timing == Timing::Insn.name() {
            let more = mitigated.first().map_or_else(String::new, |row| {
                format!("; mitigated: with {}", at_exits(row))
            });
            format!(
                "instructions, the guest's side and all CPUs included; at exits against attacks on branch predictors: {}{more}\n{}{SOURCE}\n",
                at_exits(first),
                instructions(&group, &mitigated)
            )
        } else {
            format!(
                "nanoseconds; at exits against attacks on branch predictors: {}\n{}",
                at_exits(first),
                nanoseconds(&group)
            )
        };
    }
    text
}

/// What exits do on the machine of a row.
fn at_exits(row: &Row) -> String {
    let word = row.machine.get("at_exits").and_then(|word| word.as_str());
    word.unwrap_or("?").to_owned()
}

fn instructions(rows: &[&Row], mitigated: &[&Row]) -> Table {
    let heading = [
        "case",
        "of",
        "insn",
        "mitigated",
        "goal",
        "KVM",
        "KVM/Vellum",
        "min",
        "median",
        "p99",
        "exits",
    ];
    let mut table = Table::new(&heading);
    let mut told = Vec::new();
    for row in rows {
        if row.case == "mmio_vgic" && !told.contains(&row.case) {
            table.row(mean_cells(rows, mitigated, &row.case, &cpu(row)));
        }
        told.push(row.case.clone());
        let kvm = kvm(&row.case, &cpu(row)).filter(|_| row.case != "mmio_vgic");
        let insn = row.value("insn");
        let twin = mitigated
            .iter()
            .find(|it| it.case == row.case && detail(it) == detail(row));
        let more = twin.and_then(|twin| twin.value("insn"));
        let mut cells = vec![row.case.clone(), detail(row), cell(insn), cell(more)];
        cells.extend(compared(insn, kvm));
        cells.extend(["min_ns", "median_ns", "p99_ns", "exits"].map(|key| cell(row.value(key))));
        table.row(cells);
    }
    table.left(&[0, 1])
}

/// The line of a case that is judged by its geometric mean.
fn mean_cells(rows: &[&Row], mitigated: &[&Row], case: &str, cpu: &str) -> Vec<String> {
    let mean = geometric_mean(rows, case);
    let mut cells = vec![
        case.to_owned(),
        "geometric mean".to_owned(),
        cell(mean),
        cell(geometric_mean(mitigated, case)),
    ];
    cells.extend(compared(mean, kvm(case, cpu)));
    cells.extend(["-", "-", "-", "-"].map(str::to_owned));
    cells
}

fn compared(insn: Option<f64>, kvm: Option<(f64, Option<f64>)>) -> [String; 3] {
    let ratio = insn
        .zip(kvm)
        .filter(|(insn, _)| *insn > 0.0)
        .map(|(insn, (kvm, _))| (kvm / insn * 10.0).round() / 10.0);
    let goal = kvm.and_then(|(_, goal)| goal);
    [
        goal.map_or_else(|| "-".to_owned(), |goal| format!("<= {goal}")),
        cell(kvm.map(|(kvm, _)| kvm)),
        cell(ratio),
    ]
}

fn nanoseconds(rows: &[&Row]) -> Table {
    let mut table = Table::new(&["case", "of", "mean", "min", "median", "p99", "exits"]);
    for row in rows {
        let mut cells = vec![row.case.clone(), detail(row)];
        let keys = ["mean_ns", "min_ns", "median_ns", "p99_ns", "exits"];
        cells.extend(keys.map(|key| cell(row.value(key))));
        table.row(cells);
    }
    table.left(&[0, 1])
}

/// What tells rows of one case apart.
fn detail(row: &Row) -> String {
    let words = ["access", "register", "locking"].map(|key| row.param(key));
    words
        .into_iter()
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The geometric mean of a case's rows.
pub(crate) fn geometric_mean(rows: &[&Row], case: &str) -> Option<f64> {
    let values: Vec<f64> = rows
        .iter()
        .filter(|row| row.case == case)
        .filter_map(|row| row.value("insn"))
        .collect();
    let count = u32::try_from(values.len())
        .ok()
        .filter(|count| *count > 0)?;
    let logarithms: f64 = values.iter().map(|value| value.ln()).sum();
    Some((logarithms / f64::from(count)).exp())
}

/// The most instructions that a case may take.
pub(crate) fn goal(case: &str) -> Option<f64> {
    KVM.iter().find(|(name, ..)| *name == case)?.2
}

/// KVM's figure and Vellum's goal. Models that KVM was not measured on are compared with `max`.
fn kvm(case: &str, cpu: &str) -> Option<(f64, Option<f64>)> {
    let (_, figures, goal) = KVM.iter().find(|(name, ..)| *name == case)?;
    let figure = match cpu {
        "neoverse-n1" => figures[0],
        _ => figures[1],
    };
    Some((figure, *goal))
}

/// A line for each CPU model, and KVM's.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let insn: Vec<&Row> = rows
        .iter()
        .filter(|row| row.timing == Timing::Insn.name())
        .collect();
    let mut series = Vec::new();
    for model in distinct(rows, cpu) {
        let mut group: Vec<&Row> = insn
            .iter()
            .copied()
            .filter(|row| cpu(row) == model)
            .collect();
        let shown = group.first().map(|row| at_exits(row));
        group.retain(|row| Some(at_exits(row)) == shown);
        let point = |(case, ..): &(&str, [f64; 2], Option<f64>)| {
            Some(((*case).to_owned(), geometric_mean(&group, case)?))
        };
        series.push(Series {
            name: format!("Vellum, {model}"),
            points: KVM.iter().filter_map(point).collect(),
        });
        series.push(Series {
            name: format!("KVM, {model}"),
            points: KVM
                .iter()
                .filter_map(|(case, ..)| Some(((*case).to_owned(), kvm(case, &model)?.0)))
                .collect(),
        });
    }
    vec![Chart {
        title: "exits".into(),
        x: "case".into(),
        y: "instructions".into(),
        series,
    }]
}

#[cfg(test)]
mod tests {
    use super::{charts, geometric_mean, jobs, report};
    use crate::bench::Row;
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    fn of(case: &str, params: &str, insn: u32) -> Row {
        let values = format!(r#""insn":{insn},"min_ns":1,"median_ns":2,"p99_ns":3,"exits":1.00"#);
        Row {
            case: case.to_owned(),
            ..row(Timing::Insn, params, &values)
        }
    }

    #[test]
    fn two_models_are_booted_under_both_timings_unless_named() {
        let board = Board::qemu_virt().expect("the board file is read");
        let count = |words: &[&str]| {
            let jobs = jobs(&options(words).expect("good options"), &board).expect("they fit");
            assert!(jobs.iter().all(|job| job.machine.cpus == 5));
            jobs.len()
        };
        assert_eq!(count(&[]), 6);
        assert_eq!(count(&["--timing", "insn"]), 4);
        assert_eq!(count(&["--timing", "insn", "--mitigations", "auto"]), 2);
        assert_eq!(
            count(&["--cpu", "cortex-a72", "--gic", "2", "--timing", "wall"]),
            1
        );
    }

    #[test]
    fn mitigated_exits_stand_beside_those_that_are_not() {
        let with = |mut row: Row, what: &str| {
            row.machine.insert("at_exits".into(), what.into());
            row
        };
        let rows = [
            with(of("hypercall", "", 23), "none"),
            with(of("hypercall", "", 99), "loop-24"),
        ];
        let text = report(&rows);
        let lines: Vec<&str> = text
            .lines()
            .filter(|it| it.contains("hypercall "))
            .collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert!(
            lines[0].contains(" 23 ") && lines[0].contains(" 99 "),
            "{text}"
        );
        assert!(text.contains("mitigated: with loop-24"), "{text}");
    }

    #[test]
    fn the_mean_of_the_vgic_stands_beside_kvms_with_its_source() {
        let rows = [
            of("hypercall", "", 20),
            of("mmio_vgic", r#""access":"GICD_IIDR","register":"x0""#, 100),
            of("mmio_vgic", r#""access":"GICD_IIDR","register":"x25""#, 400),
        ];
        let all: Vec<&Row> = rows.iter().collect();
        let mean = geometric_mean(&all, "mmio_vgic");
        assert!(mean.is_some_and(|mean| (mean - 200.0).abs() < 1e-6));
        assert_eq!(geometric_mean(&all, "timer"), None);
        let text = report(&rows);
        for words in [
            "geometric mean",
            "<= 250",
            "2 211",
            "1 367",
            "68.4",
            "QEMU 10.0.2",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(charts(&rows)[0].series.len(), 2);
    }
}
