//! Curves under the parallel clock: what one vCPU takes, and how many times as long more of them do, a line for each way of
//! doing it, with each cost of a shared line.

use super::options::Options;
use super::rows::{cell, distinct, mean};
use super::{Job, Row};
use crate::machine::Timing;
use crate::plot::{Chart, Series};
use crate::table::Table;

/// Something whose time is told over numbers of vCPUs: the case it is of (none: all), its value, and what it is.
pub(super) type Curve = (&'static str, &'static str, &'static str);

/// One boot for each cost of a shared line, where there is such a thing: each job of `jobs`, and who runs longest.
pub(super) fn with_costs(options: &Options, jobs: Vec<Job>) -> Vec<Job> {
    let mut all = Vec::new();
    for job in jobs {
        if job.machine.timing != Timing::Parallel || options.clock.line_cost.is_empty() {
            all.push(job);
            continue;
        }
        for &cost in &options.clock.line_cost {
            let mut machine = job.machine.clone();
            machine.clock.line_cost = cost;
            all.push(Job {
                title: format!("{}, a line costs {cost}", job.title),
                machine,
                append: job.append.clone(),
            });
        }
    }
    all
}

/// Rows of each cost of shared lines; what was not measured under the parallel clock has none.
pub(super) fn by_cost(rows: &[Row]) -> Vec<Vec<Row>> {
    let of = |cost: String| {
        let wanted = |row: &&Row| row.param("line_cost") == cost;
        rows.iter().filter(wanted).cloned().collect()
    };
    let costs = distinct(rows, |row| row.param("line_cost"));
    costs.into_iter().map(of).collect()
}

/// The tables: `way` names what a row's line is about.
pub(super) fn report(rows: &[Row], curves: &[Curve], way: fn(&Row) -> String) -> String {
    let mut text = String::new();
    for rows in by_cost(rows) {
        for curve in curves {
            let of = of(&rows, curve);
            let vcpus = counts(&of);
            if vcpus.len() < 2 {
                continue;
            }
            text += &format!(
                "\n{}, a line costs {}: nanoseconds with the fewest vCPUs, and times that\n",
                curve.2,
                rows[0].param("line_cost")
            );
            let words: Vec<String> = vcpus.iter().map(u32::to_string).collect();
            let mut heading = vec!["vCPUs", "ns"];
            heading.extend(words.iter().map(String::as_str));
            let mut table = Table::new(&heading);
            for (name, points) in lines(&of, curve, way) {
                let least = points.first().map(|(_, ns)| *ns);
                let at = |wanted: &u32| points.iter().find(|(vcpus, _)| vcpus == wanted);
                let mut cells = vec![name, cell(least)];
                cells.extend(vcpus.iter().map(|vcpus| {
                    let times = at(vcpus).zip(least).map(|((_, ns), least)| ns / least);
                    times.map_or_else(|| "-".to_owned(), |times| format!("{times:.2}"))
                }));
                table.row(cells);
            }
            text += &table.left(&[0]).to_string();
        }
    }
    text
}

/// The same as pictures.
pub(super) fn charts(rows: &[Row], curves: &[Curve], way: fn(&Row) -> String) -> Vec<Chart> {
    let mut charts = Vec::new();
    for rows in by_cost(rows) {
        for curve in curves {
            let of = of(&rows, curve);
            let lines = lines(&of, curve, way).into_iter();
            let series: Vec<Series> = lines
                .filter_map(|(name, points)| {
                    let least = points.first()?.1;
                    let point = |(vcpus, ns): &(u32, f64)| (vcpus.to_string(), ns / least);
                    Some(Series {
                        name,
                        points: points.iter().map(point).collect(),
                    })
                })
                .collect();
            if counts(&of).len() > 1 && !series.is_empty() {
                charts.push(Chart {
                    title: format!("{}, a line costs {}", curve.2, rows[0].param("line_cost")),
                    x: "vCPUs".into(),
                    y: "times that of the fewest".into(),
                    series,
                });
            }
        }
    }
    charts
}

/// Rows under the parallel clock that have the value.
fn of(rows: &[Row], (case, key, _): &Curve) -> Vec<Row> {
    let wanted = |row: &&Row| {
        let named = case.is_empty() || row.case == *case;
        named && row.timing == Timing::Parallel.name() && row.value(key).is_some()
    };
    rows.iter().filter(wanted).cloned().collect()
}

fn vcpus(row: &Row) -> u32 {
    row.param("vcpus").parse().unwrap_or(u32::MAX)
}

fn counts(rows: &[Row]) -> Vec<u32> {
    let mut counts = distinct(rows, vcpus);
    counts.sort_unstable();
    counts
}

/// Each way's time over vCPUs; of iterations the mean. What takes no time has no line.
fn lines(
    rows: &[Row],
    (_, key, _): &Curve,
    way: fn(&Row) -> String,
) -> Vec<(String, Vec<(u32, f64)>)> {
    let line = |name: String| {
        let point = |count: u32| {
            let wanted = |row: &&Row| way(row) == name && vcpus(row) == count;
            let rows: Vec<&Row> = rows.iter().filter(wanted).collect();
            mean(&rows, key).map(|ns| (count, ns))
        };
        let points: Vec<(u32, f64)> = counts(rows).into_iter().filter_map(point).collect();
        (name, points)
    };
    let all = distinct(rows, way).into_iter().map(line);
    all.filter(|(_, points)| points.iter().all(|(_, ns)| *ns > 0.0))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Curve, charts, report};
    use crate::bench::Row;
    use crate::bench::rows::tests::row;
    use crate::machine::Timing;

    const PASS: Curve = ("pass", "vcpu_ns", "the pass");

    fn of(vcpus: u32, cost: u32, ns: u32) -> Row {
        let params = format!(r#""vcpus":{vcpus},"line_cost":{cost},"locking":"mutex""#);
        Row {
            case: "pass".into(),
            ..row(Timing::Parallel, &params, &format!(r#""vcpu_ns":{ns}"#))
        }
    }

    fn locking(row: &Row) -> String {
        row.param("locking")
    }

    #[test]
    fn times_are_told_against_the_fewest_vcpus_for_each_cost() {
        let rows = [
            of(4, 0, 1500),
            of(1, 0, 1000),
            of(1, 150, 2000),
            of(4, 150, 9000),
        ];
        let text = report(&rows, &[PASS], locking);
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("mutex"))
            .collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[0].ends_with("1.50") && lines[1].ends_with("4.50"),
            "{text}"
        );
        let charts = charts(&rows, &[PASS], locking);
        assert_eq!(charts.len(), 2);
        let points = [("1".to_owned(), 1.0), ("4".to_owned(), 4.5)];
        assert_eq!(charts[1].series[0].points, points);
    }

    #[test]
    fn one_number_of_vcpus_and_other_clocks_make_no_curve() {
        assert_eq!(report(&[of(1, 0, 1000)], &[PASS], locking), "");
        let nothing = report(&[of(1, 0, 0), of(2, 0, 0)], &[PASS], locking);
        assert!(
            !nothing.contains("mutex") && !nothing.contains("NaN"),
            "{nothing}"
        );
        let mut wall = [of(1, 0, 1000), of(2, 0, 1000)];
        wall.iter_mut().for_each(|row| row.timing = "wall".into());
        assert_eq!(report(&wall, &[PASS], locking), "");
        assert!(charts(&wall, &[PASS], locking).is_empty());
    }
}
