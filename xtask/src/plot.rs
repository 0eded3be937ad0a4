//! Charts as one SVG: lines over named places on the horizontal axis, and maps, side by side in two columns.

mod map;

use anyhow::{Result, anyhow};
use plotters::backend::SVGBackend;
use plotters::chart::{ChartBuilder, SeriesLabelPosition};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea as _};
use plotters::element::{Circle, PathElement};
use plotters::series::LineSeries;
use plotters::style::{BLACK, Color as _, RGBColor, WHITE};

pub(crate) use map::Map;

/// A line through named places.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(String, f64)>,
}

/// One chart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) y: String,
    pub(crate) series: Vec<Series>,
}

/// Part of a picture.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Panel {
    Lines(Chart),
    Map(Map),
}

const WIDTH: u32 = 480;
const HEIGHT: u32 = 320;
/// Told apart also without colour vision.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// All panels in one picture.
pub(crate) fn svg(panels: &[Panel]) -> Result<String> {
    let columns = panels.len().clamp(1, 2);
    let lines = panels.len().div_ceil(columns).max(1);
    let size = (
        WIDTH * u32::try_from(columns)?,
        HEIGHT * u32::try_from(lines)?,
    );
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let failed = |error| anyhow!("cannot draw: {error:?}");
        root.fill(&WHITE).map_err(failed)?;
        for (area, panel) in root.split_evenly((lines, columns)).iter().zip(panels) {
            match panel {
                Panel::Lines(chart) => draw(area, chart)?,
                Panel::Map(map) => map::draw(area, map)?,
            }
        }
        root.present().map_err(failed)?;
    }
    Ok(text)
}

fn draw(area: &Area<'_>, chart: &Chart) -> Result<()> {
    let failed = |error| anyhow!("cannot draw '{}': {error:?}", chart.title);
    let places = places(chart);
    let right = f64::from(u32::try_from(places.len())?.saturating_sub(1)).max(1.0);
    let top = chart
        .series
        .iter()
        .flat_map(|line| &line.points)
        .map(|point| point.1)
        .fold(0.0, f64::max);
    let top = if top > 0.0 { top * 1.08 } else { 1.0 };
    let mut canvas = ChartBuilder::on(area)
        .caption(&chart.title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.15..right + 0.15, 0.0..top)
        .map_err(failed)?;
    let name = |position: &f64| place_at(&places, *position);
    canvas
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(places.len().max(2))
        .x_label_formatter(&name)
        .y_label_formatter(&|value| crate::table::number(*value))
        .x_desc(&chart.x)
        .y_desc(&chart.y)
        .draw()
        .map_err(failed)?;
    for (line, &colour) in chart.series.iter().zip(COLOURS.iter().cycle()) {
        let points = positions(&places, line)?;
        canvas
            .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))
            .map_err(failed)?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        canvas
            .draw_series(
                points
                    .into_iter()
                    .map(|point| Circle::new(point, 3, colour.filled())),
            )
            .map_err(failed)?;
    }
    canvas
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.2))
        .draw()
        .map_err(failed)
}

/// Every named place, in order of appearance.
fn places(chart: &Chart) -> Vec<&str> {
    let mut places = Vec::new();
    for (name, _) in chart.series.iter().flat_map(|line| &line.points) {
        if !places.contains(&name.as_str()) {
            places.push(name.as_str());
        }
    }
    places
}

/// The name of a place if the position is one.
fn place_at(places: &[&str], position: f64) -> String {
    let at = |(index, _): &(usize, &&str)| {
        u32::try_from(*index).is_ok_and(|index| (f64::from(index) - position).abs() < 0.01)
    };
    places
        .iter()
        .enumerate()
        .find(at)
        .map_or_else(String::new, |(_, name)| (*name).to_owned())
}

fn positions(places: &[&str], line: &Series) -> Result<Vec<(f64, f64)>> {
    let mut points = Vec::new();
    for (name, value) in &line.points {
        if let Some(index) = places.iter().position(|place| place == name) {
            points.push((f64::from(u32::try_from(index)?), *value));
        }
    }
    Ok(points)
}

#[cfg(test)]
mod tests {
    use super::{Chart, Map, Panel, Series, place_at, svg};

    fn chart(name: &str, points: &[(&str, f64)]) -> Panel {
        let points = points
            .iter()
            .map(|&(place, value)| (place.to_owned(), value))
            .collect();
        let series = vec![Series {
            name: name.into(),
            points,
        }];
        Panel::Lines(Chart {
            title: "a chart".into(),
            x: "vCPUs".into(),
            y: "ms".into(),
            series,
        })
    }

    #[test]
    fn every_chart_has_its_labels_and_lines() {
        let charts = [
            chart("mutex", &[("1", 2.0), ("2", 4.0)]),
            chart("lockless", &[("1", 1.0), ("2", 1.0)]),
        ];
        let text = svg(&charts).expect("it is drawn");
        for word in [
            "mutex", "lockless", "vCPUs", "ms", "a chart", "<svg", "polyline",
        ] {
            assert!(text.contains(word), "{word}");
        }
    }

    #[test]
    fn nothing_measured_still_gives_a_picture() {
        for charts in [
            vec![],
            vec![chart("mutex", &[])],
            vec![chart("mutex", &[("1", 0.0)])],
        ] {
            assert!(svg(&charts).expect("it is drawn").contains("<svg"));
        }
    }

    #[test]
    fn a_map_is_drawn_with_its_ages() {
        let map = |rows| {
            Panel::Map(Map {
                title: "ages".into(),
                x: "MiB".into(),
                y: "pass".into(),
                x_step: 2,
                rows,
            })
        };
        let text = svg(&[map(vec![vec![Some(0), None], vec![Some(40), Some(3)]])]);
        let text = text.expect("it is drawn");
        for word in ["ages", "MiB", "pass", "32+", "#7A0403"] {
            assert!(text.contains(word), "{word}");
        }
        assert!(svg(&[map(vec![])]).expect("it is drawn").contains("<svg"));
    }

    #[test]
    fn only_places_have_names() {
        assert_eq!(place_at(&["1", "2"], 1.0), "2");
        assert_eq!(place_at(&["1", "2"], 0.5), "");
        assert_eq!(place_at(&["1", "2"], 2.0), "");
    }
}
