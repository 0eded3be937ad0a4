//! Rows: what was measured and under what, and how they reach a file.

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use crate::machine::Timing;
use crate::table::number;
use crate::uart::{Measured, Object};

/// One result with the machine it was measured on.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) suite: String,
    pub(crate) case: String,
    pub(crate) machine: Object,
    pub(crate) params: Object,
    pub(crate) timing: String,
    pub(crate) values: Object,
}

impl Row {
    /// Adds what only the host knows: the suite asked for, the emulator, its own CPUs and the timing.
    pub(crate) fn new(
        row: Measured,
        suite: &str,
        machine: &Object,
        qemu: &str,
        timing: Timing,
    ) -> Self {
        let mut machine = machine.clone();
        machine.insert("qemu".into(), qemu.into());
        let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
        machine.insert("host_cpus".into(), host_cpus.into());
        Self {
            suite: suite.to_owned(),
            machine,
            timing: timing.name().to_owned(),
            ..Self::collected(row, &Object::new())
        }
    }

    /// A row as the machine itself told it. A board's own clock counts as wall time.
    pub(crate) fn collected(row: Measured, machine: &Object) -> Self {
        let timing = row.timing.parse().unwrap_or(Timing::Wall);
        Self {
            suite: row.suite,
            case: row.case,
            machine: machine.clone(),
            params: row.params,
            timing: timing.name().to_owned(),
            values: row.values,
        }
    }

    /// A number among the values.
    pub(crate) fn value(&self, key: &str) -> Option<f64> {
        self.values.get(key)?.as_f64()
    }

    /// A parameter in words.
    pub(crate) fn param(&self, key: &str) -> String {
        match self.params.get(key) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => String::new(),
        }
    }

    /// What the machine is, in a few words.
    pub(crate) fn machine_words(&self) -> String {
        let word = |key: &str| match self.machine.get(key) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => "?".to_owned(),
        };
        let cost = match self.param("line_cost") {
            cost if cost.is_empty() => cost,
            cost => format!(", a line costs {cost}"),
        };
        let machine = format!(
            "{} {}, GICv{}, {} CPUs, {} MiB",
            word("board"),
            word("cpu"),
            word("gic"),
            word("cpus"),
            word("memory_mib")
        );
        match self.machine.contains_key("qemu") {
            true => format!(
                "{machine}, QEMU {} on a host with {} CPUs{cost}",
                word("qemu"),
                word("host_cpus")
            ),
            false => format!("{machine}, collected from its console"),
        }
    }
}

/// The mean of a value over rows; nothing if no row has it.
pub(crate) fn mean(rows: &[&Row], key: &str) -> Option<f64> {
    let values: Vec<f64> = rows.iter().filter_map(|row| row.value(key)).collect();
    let count = u32::try_from(values.len())
        .ok()
        .filter(|&count| count > 0)?;
    Some(values.iter().sum::<f64>() / f64::from(count))
}

/// A cell of a table: the number, or a dash.
pub(crate) fn cell(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), number)
}

/// The CPU model that a row was measured on.
pub(crate) fn cpu(row: &Row) -> String {
    let model = row.machine.get("cpu").and_then(Value::as_str);
    model.unwrap_or("?").to_owned()
}

/// The distinct values of `key`, in order of appearance.
pub(crate) fn distinct<T: PartialEq>(rows: &[Row], key: impl Fn(&Row) -> T) -> Vec<T> {
    let mut found = Vec::new();
    for value in rows.iter().map(key) {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// One JSON array, a row a line.
pub(crate) fn json(rows: &[Row]) -> Result<String> {
    let lines: Vec<String> = rows
        .iter()
        .map(serde_json::to_string)
        .collect::<Result<_, _>>()?;
    Ok(format!("[\n{}\n]\n", lines.join(",\n")))
}

#[cfg(test)]
pub(super) mod tests {
    use super::{Row, distinct, json, mean};
    use crate::machine::Timing;
    use crate::uart::{Line, Record, parse};

    /// A row as the console gives it.
    pub(crate) fn row(timing: Timing, params: &str, values: &str) -> Row {
        let line = format!(
            r#"{{"vellum":"row","suite":"dirty","case":"","params":{{{params}}},"timing":"","values":{{{values}}}}}"#
        );
        let Line::Record(Record::Row(measured)) = parse(&line) else {
            panic!("not a row: {line}")
        };
        let machine = [("board", "qemu-virt"), ("cpu", "max")]
            .map(|(key, value)| (key.to_owned(), value.into()));
        Row::new(
            measured,
            "dirty",
            &machine.into_iter().collect(),
            "11.1.3",
            timing,
        )
    }

    #[test]
    fn a_row_names_the_emulator_and_the_timing() {
        let row = row(
            Timing::Insn,
            r#""vcpus":2,"locking":"mutex""#,
            r#""dirty_ns":5"#,
        );
        assert_eq!(row.machine["qemu"], "11.1.3");
        assert_eq!(row.timing, "insn");
        assert_eq!(
            (row.param("vcpus"), row.param("locking")),
            ("2".into(), "mutex".into())
        );
        assert_eq!(row.value("dirty_ns"), Some(5.0));
        assert_eq!(row.value("absent"), None);
    }

    #[test]
    fn the_array_is_json_with_a_row_a_line() {
        let rows = [row(Timing::Insn, "", ""), row(Timing::Wall, "", "")];
        let text = json(&rows).expect("rows are JSON");
        assert_eq!(text.lines().count(), 4);
        let read: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
        assert_eq!(read[1]["timing"], "wall");
        assert_eq!(json(&[]).expect("also without rows").lines().count(), 3);
    }

    #[test]
    fn means_and_distinct_values() {
        let rows = [
            row(Timing::Wall, r#""vcpus":1"#, r#""x":1"#),
            row(Timing::Wall, r#""vcpus":1"#, r#""x":2"#),
        ];
        let all: Vec<&Row> = rows.iter().collect();
        assert_eq!(mean(&all, "x"), Some(1.5));
        assert_eq!(mean(&all, "y"), None);
        assert_eq!(distinct(&rows, |row| row.param("vcpus")), ["1"]);
    }
}
