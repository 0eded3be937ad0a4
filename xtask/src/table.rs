//! Tables for a terminal: columns as wide as their widest cell, numbers to the right.

use std::fmt;

/// Rows below a heading.
#[derive(Debug)]
pub(crate) struct Table {
    heading: Vec<String>,
    rows: Vec<Vec<String>>,
    left: Vec<usize>,
}

impl Table {
    /// An empty table with one column per heading.
    pub(crate) fn new(heading: &[&str]) -> Self {
        let heading = heading.iter().map(|&name| name.to_owned()).collect();
        Self {
            heading,
            rows: Vec::new(),
            left: Vec::new(),
        }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Names the columns that stand to the left.
    pub(crate) fn left(mut self, columns: &[usize]) -> Self {
        self.left = columns.to_vec();
        self
    }

    fn width(&self, column: usize) -> usize {
        let cells = std::iter::once(&self.heading).chain(&self.rows);
        cells
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in std::iter::once(&self.heading).chain(&self.rows) {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = self.width(column);
                let gap = if column == 0 { "" } else { "  " };
                line.push_str(&match self.left.contains(&column) {
                    true => format!("{gap}{cell:<width$}"),
                    false => format!("{gap}{cell:>width$}"),
                });
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A number with at most three digits after the point and its thousands apart.
pub(crate) fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => 0,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let (whole, fraction) = text.split_once('.').unwrap_or((text.as_str(), ""));
    let grouped = group(whole);
    if fraction.is_empty() {
        grouped
    } else {
        format!("{grouped}.{fraction}")
    }
}

fn group(whole: &str) -> String {
    let (sign, digits) = whole
        .strip_prefix('-')
        .map_or(("", whole), |digits| ("-", digits));
    let mut text = String::from(sign);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Table, number};

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["mode", "ms"]);
        table.row(vec!["mutex".into(), "1".into()]);
        table.row(vec!["rw".into(), "12345".into()]);
        let text = table.left(&[0]).to_string();
        assert_eq!(text, "mode      ms\nmutex      1\nrw     12345\n");
    }

    #[test]
    fn numbers_are_short_and_grouped() {
        let cases = [
            (0.0, "0"),
            (0.1234, "0.123"),
            (12.345, "12.35"),
            (123.45, "123"),
            (1000.0, "1 000"),
            (1_234_567.0, "1 234 567"),
            (-1000.0, "-1 000"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }
}
