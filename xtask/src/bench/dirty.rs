//! Suite `dirty`: the phases of dirty logging over numbers of vCPUs and locking modes.

use anyhow::Result;

use super::options::Options;
use super::rows::{cell, distinct, mean};
use super::scaling::{self, Curve, by_cost, report as curves};
use super::{Job, Row, unit};
use crate::board::Board;
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

const PHASES: [&str; 6] = ["populate", "enable", "dirty", "get", "clear", "disable"];

/// Counts of the write phase: heading, key.
const COUNTS: [(&str, &str); 10] = [
    ("written", "pages_written"),
    ("reported", "pages_reported"),
    ("lost", "pages_lost"),
    ("faults", "faults_permission"),
    ("TLBI local", "tlbi_local"),
    ("TLBI bcast", "tlbi_broadcast"),
    ("desc. writes", "descriptor_writes"),
    ("locked", "lock_acquired"),
    ("contended", "lock_contended"),
    ("spins", "lock_spins"),
];

/// Lines written that another vCPU's fault writes too, but the leaf's and the bitmap word's.
const SHARED: (&str, &str) = ("shared lines", "shared_line_writes");

/// One boot for each timing, large enough for the largest number of vCPUs.
pub(super) fn jobs(options: &Options, board: &Board) -> Result<Vec<Job>> {
    let vcpus = options.vcpus();
    let most = vcpus.iter().copied().max().unwrap_or(1);
    let job = |timing: Timing| {
        let guest_mib = u64::from(most) * options.mib_per_vcpu(timing);
        let machine = options.machine(board, most, guest_mib, timing)?;
        let title = format!(
            "{} GICv{} timing {}",
            machine.cpu,
            machine.gic,
            timing.name()
        );
        Ok(Job {
            title,
            append: options.append("dirty", &vcpus, timing),
            machine,
        })
    };
    options.timing().into_iter().map(job).collect()
}

/// Populating, whose frames come from one allocator.
const POPULATE: Curve = ("phases", "populate_vcpu_ns", "populating");

fn locking(row: &Row) -> String {
    row.param("locking")
}

/// Times and counts, for each timing.
pub(super) fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    for timing in timings(rows) {
        let of: Vec<&Row> = rows
            .iter()
            .filter(|row| row.timing == timing.name())
            .collect();
        let Some(first) = of.first() else { continue };
        let (name, scale) = unit(timing);
        text += &format!(
            "\ndirty, timing {}, {}\n",
            timing.name(),
            first.machine_words()
        );
        text += &format!(
            "{} MiB a vCPU, {} written in order {}, stride {}, leaves of {}\n",
            first.param("mib_per_vcpu"),
            percent(first),
            first.param("order"),
            first.param("stride"),
            first.param("backing")
        );
        text += &format!(
            "\nphases, mean of {} iterations, {name}",
            distinct(rows, |row| row.param("iteration")).len()
        );
        text += match timing {
            Timing::Insn => " (of all CPUs together; the last columns in instructions)\n",
            Timing::Wall | Timing::Parallel => " (the last column in nanoseconds)\n",
        };
        text += &times(rows, timing, scale);
        if timing == Timing::Parallel {
            text += "\nthe longest pass of a vCPU, in times that of one vCPU; T1: of one, for each fault; S: what of a fault is done one after the\nother (holding the lock and handing it over), from the smallest number of vCPUs that take as many times as long as the number before as they are\nmore, where that waits already; predicted: max(1, vCPUs x S / T1)\n";
            text += &bends(rows);
            text += &curves(rows, &[POPULATE], locking);
        }
        text += "\ncounts of the write phase, mean of the iterations\n";
        text += &counts(rows, timing);
    }
    text
}

fn percent(row: &Row) -> String {
    format!("{} %", row.param("write_percent"))
}

fn times(rows: &[Row], timing: Timing, scale: f64) -> String {
    let mut heading = vec!["vCPUs", "locking"];
    heading.extend(PHASES);
    heading.push("dirty/page");
    if timing == Timing::Insn {
        heading.push("fault");
    }
    let mut table = Table::new(&heading);
    for (vcpus, locking, group) in groups(rows, timing) {
        let mut cells = vec![vcpus, locking];
        let scaled =
            |phase: &&str| cell(mean(&group, &format!("{phase}_ns")).map(|time| time / scale));
        cells.extend(PHASES.iter().map(scaled));
        cells.push(cell(ratio(&group, "dirty_ns", "pages_written")));
        if timing == Timing::Insn {
            cells.push(cell(mean(&group, "fault_insn")));
        }
        table.row(cells);
    }
    table.left(&[1]).to_string()
}

/// KVM's times of one pass in milliseconds, on a real machine: its lock taken exclusively, then for reading.
const PUBLISHED: [(u32, f64, f64); 7] = [
    (1, 926.0, 803.0),
    (2, 1189.0, 843.0),
    (4, 2503.0, 942.0),
    (8, 5069.0, 1458.0),
    (16, 10_340.0, 2853.0),
    (32, 20_351.0, 5886.0),
    (64, 40_994.0, 12_190.0),
];

/// One mode's passes under the parallel clock: vCPUs, nanoseconds, faults of one vCPU.
fn curve(rows: &[Row], mode: &str) -> Vec<(u32, f64, f64)> {
    let groups = groups(rows, Timing::Parallel).into_iter();
    let of_mode = groups.filter(|(_, locking, _)| locking == mode);
    let point = |(vcpus, _, group): (String, String, Vec<&Row>)| {
        let vcpus: u32 = vcpus.parse().ok()?;
        let faults = mean(&group, "faults_permission")? / f64::from(vcpus);
        Some((vcpus, mean(&group, "vcpu_ns")?, faults))
    };
    of_mode.filter_map(point).collect()
}

/// By how much passes may differ from proportional to the number of vCPUs, when all of them wait for one thing.
const PROPORTIONAL: f64 = 0.1;

/// What of a fault is done one after the other, in nanoseconds: a pass of many vCPUs, for each of their faults. From the smallest
/// number of vCPUs that take as many times as long as the number before as they are more, where that waits already.
fn serialized(curve: &[(u32, f64, f64)]) -> Option<f64> {
    let waits = 1.5 * curve.first()?.1;
    let pairs = curve.iter().zip(curve.iter().skip(1));
    let mut saturated = pairs.filter(|((fewer, less, _), (more, ns, _))| {
        let times = f64::from(*more) / f64::from(*fewer);
        *less > waits && (ns / less / times - 1.0).abs() <= PROPORTIONAL
    });
    let (_, (vcpus, ns, faults)) = saturated.next()?;
    Some(ns / faults / f64::from(*vcpus))
}

/// A line for each mode and number of vCPUs, with what the serialized part predicts.
fn bends(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "locking",
        "vCPUs",
        "ns/fault",
        "times one",
        "T1, ns",
        "S, ns",
        "S/T1",
        "predicted",
        "off, %",
        "KVM",
        "KVM's S/T1",
    ]);
    for mode in distinct(rows, |row| row.param("locking")) {
        let curve = curve(rows, &mode);
        let Some((1, one, faults)) = curve.first().copied() else {
            continue;
        };
        let serial = serialized(&curve);
        for (vcpus, ns, each) in &curve {
            let n = f64::from(*vcpus);
            let share = serial.map(|serial| serial / (one / faults));
            let published = PUBLISHED.iter().find(|(at, ..)| at == vcpus);
            let kvm = published.and_then(|(_, mutex, rwlock)| match mode.as_str() {
                "mutex" => Some(mutex / PUBLISHED[0].1),
                "rwlock" => Some(rwlock / PUBLISHED[0].2),
                _ => None,
            });
            let predicted = share.map_or(1.0, |share| (n * share).max(1.0));
            table.row(vec![
                mode.clone(),
                vcpus.to_string(),
                cell(Some(ns / each)),
                cell(Some(ns / one)),
                cell(Some(one / faults)),
                cell(serial),
                cell(share),
                cell(Some(predicted)),
                format!("{:+.1}", 100.0 * (ns / one / predicted - 1.0)),
                cell(kvm),
                cell(kvm.map(|times| times / n)),
            ]);
        }
    }
    table.left(&[0]).to_string()
}

/// The curves of [`bends`], and KVM's beside them.
fn bends_chart(rows: &[Row]) -> Option<Chart> {
    let mut series = Vec::new();
    for mode in distinct(rows, |row| row.param("locking")) {
        let curve = curve(rows, &mode);
        let (1, one, _) = curve.first().copied()? else {
            return None;
        };
        series.push(Series {
            points: curve
                .iter()
                .map(|(vcpus, ns, _)| (vcpus.to_string(), ns / one))
                .collect(),
            name: mode,
        });
    }
    let measured = |vcpus: &str| {
        series
            .iter()
            .any(|line| line.points.iter().any(|(at, _)| at == vcpus))
    };
    let published = |name: &str, of: fn(&(u32, f64, f64)) -> f64| Series {
        name: name.into(),
        points: PUBLISHED
            .iter()
            .map(|point| (point.0.to_string(), of(point) / of(&PUBLISHED[0])))
            .filter(|(vcpus, _)| measured(vcpus))
            .collect(),
    };
    let kvm = [
        published("KVM, exclusive lock", |point| point.1),
        published("KVM, read lock", |point| point.2),
    ];
    series.extend(kvm);
    Some(Chart {
        title: format!(
            "longest pass of a vCPU, timing parallel, a line costs {}",
            rows.first()
                .map_or_else(String::new, |row| row.param("line_cost"))
        ),
        x: "vCPUs".into(),
        y: "times that of one vCPU".into(),
        series,
    })
}

fn counts(rows: &[Row], timing: Timing) -> String {
    let mut columns = COUNTS.to_vec();
    // Only a debug build records these.
    if rows
        .iter()
        .any(|row| row.value(SHARED.1).is_some_and(|count| count > 0.0))
    {
        columns.push(SHARED);
    }
    let mut heading = vec!["vCPUs", "locking"];
    heading.extend(columns.iter().map(|(name, _)| *name));
    heading.push("cont. %");
    let mut table = Table::new(&heading);
    for (vcpus, locking, group) in groups(rows, timing) {
        let mut cells = vec![vcpus, locking];
        cells.extend(columns.iter().map(|(_, key)| cell(mean(&group, key))));
        let contended = ratio(&group, "lock_contended", "lock_acquired");
        cells.push(cell(contended.map(|ratio| 100.0 * ratio)));
        table.row(cells);
    }
    table.left(&[1]).to_string()
}

fn ratio(rows: &[&Row], above: &str, below: &str) -> Option<f64> {
    let below = mean(rows, below).filter(|&count| count > 0.0)?;
    Some(mean(rows, above)? / below)
}

/// The write phase and the clear phase over vCPUs, a line for each mode.
pub(super) fn charts(rows: &[Row]) -> Vec<Chart> {
    let of_costs = by_cost(rows).into_iter();
    let mut charts: Vec<Chart> = of_costs.flat_map(|rows| charts_of(&rows)).collect();
    charts.extend(scaling::charts(rows, &[POPULATE], locking));
    charts
}

fn charts_of(rows: &[Row]) -> Vec<Chart> {
    let phases = [("dirty_ns", "write phase"), ("clear_ns", "clear")];
    let charts = timings(rows)
        .into_iter()
        .flat_map(|timing| phases.map(|phase| chart(rows, timing, phase)));
    charts.chain(bends_chart(rows)).collect()
}

fn chart(rows: &[Row], timing: Timing, (key, name): (&str, &str)) -> Chart {
    let (unit, scale) = unit(timing);
    let groups = groups(rows, timing);
    let mut series: Vec<Series> = Vec::new();
    for (vcpus, locking, group) in &groups {
        let Some(value) = mean(group, key) else {
            continue;
        };
        let point = (vcpus.clone(), value / scale);
        match series.iter_mut().find(|line| line.name == *locking) {
            Some(line) => line.points.push(point),
            None => series.push(Series {
                name: locking.clone(),
                points: vec![point],
            }),
        }
    }
    Chart {
        title: format!("{name}, timing {}", timing.name()),
        x: "vCPUs".into(),
        y: unit.into(),
        series,
    }
}

fn timings(rows: &[Row]) -> Vec<Timing> {
    Timing::ALL
        .into_iter()
        .filter(|timing| rows.iter().any(|row| row.timing == timing.name()))
        .collect()
}

/// The iterations of each pair of vCPUs and mode that was measured under `timing`, smallest number of vCPUs first.
fn groups(rows: &[Row], timing: Timing) -> Vec<(String, String, Vec<&Row>)> {
    let key = |row: &Row| (row.param("vcpus"), row.param("locking"));
    let mut keys = distinct(rows, key);
    keys.sort_by_key(|(vcpus, _)| vcpus.parse::<u32>().unwrap_or(u32::MAX));
    let group = |wanted: (String, String)| {
        let found: Vec<&Row> = rows
            .iter()
            .filter(|row| row.timing == timing.name() && key(row) == wanted)
            .collect();
        (wanted.0, wanted.1, found)
    };
    keys.into_iter()
        .map(group)
        .filter(|(_, _, found)| !found.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{charts, jobs, report, serialized};
    use crate::bench::Row;
    use crate::bench::options::tests::options;
    use crate::bench::rows::tests::row;
    use crate::board::Board;
    use crate::machine::Timing;

    fn rows() -> Vec<Row> {
        let mut rows = Vec::new();
        for (vcpus, locking, dirty) in [
            (8, "mutex", 80_000_000),
            (1, "mutex", 4_000_000),
            (1, "lockless", 2_000_000),
        ] {
            for iteration in 0..2 {
                let params =
                    format!(r#""vcpus":{vcpus},"locking":"{locking}","iteration":{iteration}"#);
                let values = format!(
                    r#""dirty_ns":{dirty},"pages_written":1000,"lock_acquired":200,"lock_contended":10,"fault_insn":291"#
                );
                rows.push(row(Timing::Wall, &params, &values));
            }
        }
        rows
    }

    #[test]
    fn a_boot_for_each_timing_with_room_for_the_most_vcpus() {
        let board = Board::qemu_virt().expect("the board file is read");
        let jobs =
            jobs(&options(&["--vcpus", "1,4"]).expect("good options"), &board).expect("they fit");
        assert_eq!(jobs.len(), 2);
        assert!(
            jobs.iter()
                .all(|job| job.machine.cpus == 5 && job.append.contains("vcpus=1,4"))
        );
    }

    #[test]
    fn the_tables_have_a_line_for_each_pair_in_order_of_vcpus() {
        let text = report(&rows());
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("mutex") || line.contains("lockless"))
            .collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert!(
            lines[0].trim_start().starts_with('1') && lines[2].trim_start().starts_with('8'),
            "{text}"
        );
        assert!(lines[2].contains("80") && lines[5].ends_with('5'), "{text}");
    }

    #[test]
    fn the_serialized_part_is_what_doubling_doubles() {
        let flat = [(1, 100.0, 1.0), (2, 100.0, 1.0), (4, 110.0, 1.0)];
        assert_eq!(serialized(&flat), None);
        let bent = [
            (1, 100.0, 1.0),
            (2, 110.0, 1.0),
            (4, 200.0, 1.0),
            (8, 400.0, 1.0),
        ];
        assert_eq!(serialized(&bent), Some(50.0));
        assert_eq!(serialized(&[(1, 100.0, 1.0)]), None);
        let early = [
            (1, 100.0, 1.0),
            (2, 100.0, 1.0),
            (4, 210.0, 1.0),
            (8, 500.0, 1.0),
        ];
        assert_eq!(serialized(&early), None);
    }

    #[test]
    fn a_chart_for_each_timing_and_phase_that_was_measured() {
        let charts = charts(&rows());
        assert_eq!(charts.len(), 2);
        assert_eq!(charts[0].series.len(), 2);
        assert_eq!(
            charts[0].series[0].points,
            [("1".to_owned(), 4000.0), ("8".to_owned(), 80_000.0)]
        );
    }
}
