//! One line of JSON for each result: what programs read from the UART.
//!
//! Keys and words are this crate's own and need no escaping.

use alloc::string::String;
use core::fmt::{self, Display, Write as _};

use crate::log;

/// A result being put together.
#[derive(Clone, Debug)]
pub struct Row {
    head: String,
    params: String,
    values: String,
}

impl Row {
    /// A row of `suite`, case `case`, under `timing`.
    pub fn new(suite: &str, case: &str, timing: &str) -> Self {
        let mut head = String::new();
        append(
            &mut head,
            format_args!(r#""suite":"{suite}","case":"{case}","timing":"{timing}""#),
        );
        Self {
            head,
            params: String::new(),
            values: String::new(),
        }
    }

    /// Adds a parameter that is a word.
    #[must_use]
    pub fn word(mut self, key: &str, word: impl Display) -> Self {
        field(&mut self.params, key, format_args!(r#""{word}""#));
        self
    }

    /// Adds a parameter that is a number or a truth.
    #[must_use]
    pub fn param(mut self, key: &str, value: impl Display) -> Self {
        field(&mut self.params, key, format_args!("{value}"));
        self
    }

    /// Adds a value.
    #[must_use]
    pub fn value(mut self, key: &str, value: impl Display) -> Self {
        field(&mut self.values, key, format_args!("{value}"));
        self
    }

    /// Adds what each of `count` comes to of `total`, with two digits behind the point.
    #[must_use]
    pub fn share(self, key: &str, total: u64, count: u64) -> Self {
        let hundredths = total.saturating_mul(100) / count.max(1);
        let (whole, rest) = (hundredths / 100, hundredths % 100);
        self.value(key, format_args!("{whole}.{rest:02}"))
    }

    /// Adds values.
    #[must_use]
    pub fn values<'a>(self, values: impl IntoIterator<Item = (&'a str, u64)>) -> Self {
        values
            .into_iter()
            .fold(self, |row, (key, value)| row.value(key, value))
    }

    /// Prints the line.
    pub fn print(&self) {
        log::line(format_args!("{self}"));
    }
}

impl Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            head,
            params,
            values,
        } = self;
        write!(
            f,
            r#"{{"vellum":"row",{head},"params":{{{params}}},"values":{{{values}}}}}"#
        )
    }
}

/// Says how far the run is.
pub fn progress(done: usize, of: usize, text: fmt::Arguments<'_>) {
    log::line(format_args!(
        r#"{{"vellum":"progress","done":{done},"of":{of},"text":"{text}"}}"#
    ));
}

fn field(to: &mut String, key: &str, value: fmt::Arguments<'_>) {
    let comma = if to.is_empty() { "" } else { "," };
    append(to, format_args!(r#"{comma}"{key}":{value}"#));
}

fn append(to: &mut String, what: fmt::Arguments<'_>) {
    let written = to.write_fmt(what);
    debug_assert!(written.is_ok(), "strings grow");
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::Row;

    #[test]
    fn a_row_is_one_object_on_one_line() {
        let row = Row::new("dirty", "phases", "insn")
            .param("vcpus", 4)
            .word("locking", "mutex")
            .param("all", true)
            .values([("dirty_ns", 7), ("get_ns", 0)]);
        assert_eq!(
            row.to_string(),
            r#"{"vellum":"row","suite":"dirty","case":"phases","timing":"insn","params":{"vcpus":4,"locking":"mutex","all":true},"values":{"dirty_ns":7,"get_ns":0}}"#
        );
    }

    #[test]
    fn shares_have_two_digits_behind_the_point() {
        let row = Row::new("exit", "eoi", "insn").share("insn", 2105, 100);
        assert!(row.to_string().ends_with(r#""values":{"insn":21.05}}"#));
        let row = Row::new("exit", "eoi", "insn").share("insn", 1, 0);
        assert!(row.to_string().contains(r#""insn":1.00"#));
    }

    #[test]
    fn an_empty_row_is_still_an_object() {
        let row = Row::new("get", "slot", "wall").to_string();
        assert!(row.ends_with(r#""params":{},"values":{}}"#));
    }
}
