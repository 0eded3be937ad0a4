//! Heat maps: a coloured cell for each place and moment, the first moment at the top.

use anyhow::{Result, anyhow};
use plotters::chart::ChartBuilder;
use plotters::element::{Rectangle, Text};
use plotters::style::{Color as _, RGBColor};

use super::Area;

/// One map.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Map {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) y: String,
    /// What a cell stands for on the horizontal axis.
    pub(crate) x_step: u32,
    /// A line for each moment: an age for each place, none where there is nothing.
    pub(crate) rows: Vec<Vec<Option<u32>>>,
}

/// Ages from which a colour is used, from hot to cold; told apart also in grey.
const COLOURS: [(u32, RGBColor); 7] = [
    (0, RGBColor(122, 4, 3)),
    (1, RGBColor(217, 56, 6)),
    (2, RGBColor(251, 126, 33)),
    (4, RGBColor(238, 207, 58)),
    (8, RGBColor(125, 200, 180)),
    (16, RGBColor(150, 190, 230)),
    (32, RGBColor(215, 230, 245)),
];
/// Where nothing is mapped.
const NOTHING: RGBColor = RGBColor(255, 255, 255);
/// Pixels of a legend's box.
const BOX: i32 = 10;
/// Pixels from one box of the legend to the next.
const LEGEND_STEP: i32 = 40;

fn colour(age: Option<u32>) -> RGBColor {
    let Some(age) = age else { return NOTHING };
    let found = COLOURS.iter().rev().find(|(from, _)| *from <= age);
    found.map_or(NOTHING, |(_, colour)| *colour)
}

/// Neighbours of one colour: first, end, colour.
fn runs(row: &[Option<u32>]) -> Vec<(u32, u32, RGBColor)> {
    let mut runs: Vec<(u32, u32, RGBColor)> = Vec::new();
    for (at, age) in (0..).zip(row) {
        let colour = colour(*age);
        match runs.last_mut() {
            Some((_, end, before)) if *before == colour => *end = at + 1,
            _ => runs.push((at, at + 1, colour)),
        }
    }
    runs
}

pub(super) fn draw(area: &Area<'_>, map: &Map) -> Result<()> {
    let failed = |error| anyhow!("cannot draw '{}': {error:?}", map.title);
    let width = map.rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let right = u32::try_from(width)? * map.x_step;
    let bottom = u32::try_from(map.rows.len().max(1))? + 1;
    let (plot, legend) = area.split_vertically(290);
    let mut canvas = ChartBuilder::on(&plot)
        .caption(&map.title, ("sans-serif", 12))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(0..right, bottom..1)
        .map_err(failed)?;
    canvas
        .configure_mesh()
        .disable_mesh()
        .x_desc(&map.x)
        .y_desc(&map.y)
        .draw()
        .map_err(failed)?;
    for (moment, row) in (1..).zip(&map.rows) {
        let cells = runs(row).into_iter().map(|(first, end, colour)| {
            let corners = [(first * map.x_step, moment), (end * map.x_step, moment + 1)];
            Rectangle::new(corners, colour.filled())
        });
        canvas.draw_series(cells).map_err(failed)?;
    }
    for (place, (from, colour)) in (0..).zip(COLOURS) {
        let left = 80 + place * LEGEND_STEP;
        let boxed = [(left, 4), (left + BOX, 4 + BOX)];
        legend
            .draw(&Rectangle::new(boxed, colour.filled()))
            .map_err(failed)?;
        let text = match place {
            0..2 => from.to_string(),
            _ => format!("{from}+"),
        };
        let style = ("sans-serif", 11);
        legend
            .draw(&Text::new(text, (left + BOX + 4, 4), style))
            .map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{COLOURS, NOTHING, colour, runs};

    #[test]
    fn every_age_has_a_colour_and_older_ones_never_a_hotter_one() {
        let place = |age| COLOURS.iter().position(|(_, it)| *it == colour(Some(age)));
        let mut before = Some(0);
        for age in 0..300 {
            let now = place(age);
            assert!(now.is_some() && now >= before, "{age}");
            before = now;
        }
        assert_eq!(colour(None), NOTHING);
    }

    #[test]
    fn neighbours_of_one_colour_are_one_rectangle() {
        let row = [Some(0), Some(0), Some(9), Some(10), None];
        let spans: Vec<_> = runs(&row).iter().map(|run| (run.0, run.1)).collect();
        assert_eq!(spans, [(0, 2), (2, 4), (4, 5)]);
        assert!(runs(&[]).is_empty());
    }
}
