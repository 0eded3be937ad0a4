//! What the hypervisor says on its console: text, and records, which are lines of JSON that start with `{"vellum":"`.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::lines::Section;

/// A JSON object with its keys in alphabetical order.
pub(crate) type Object = Map<String, Value>;

pub(crate) const MARK: &str = "{\"vellum\":\"";

/// One machine-readable line.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "vellum", rename_all = "lowercase")]
pub(crate) enum Record {
    /// What machine this is; once, before the first row.
    Machine {
        #[serde(flatten)]
        facts: Object,
    },
    /// How far a long task has come.
    Progress { done: u64, of: u64, text: String },
    /// One result.
    Row(Measured),
    /// Why the run will fail.
    Error { text: String },
    /// The run's status; the last line.
    Exit { status: u8 },
}

/// A result as the hypervisor writes it; the machine is added by whoever started it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Measured {
    pub(crate) suite: String,
    #[serde(default)]
    pub(crate) case: String,
    #[serde(default)]
    pub(crate) params: Object,
    #[serde(default)]
    pub(crate) timing: String,
    pub(crate) values: Object,
}

/// One line of the console.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Line {
    Text(String),
    Record(Record),
    /// It starts like a record and is none: two writers were mixed, or a format is wrong.
    Garbled(String),
    /// Not a line at all: what a guest wrote to a console of its own.
    Guest(Vec<u8>),
}

/// Reads one line.
pub(crate) fn parse(line: &str) -> Line {
    let line = line.trim_end();
    if !line.starts_with(MARK) {
        return Line::Text(line.to_owned());
    }
    match serde_json::from_str(line) {
        Ok(record) => Line::Record(record),
        Err(_) => Line::Garbled(line.to_owned()),
    }
}

/// Everything one run said.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    pub(crate) machine: Object,
    pub(crate) rows: Vec<Measured>,
    pub(crate) errors: Vec<String>,
    pub(crate) garbled: Vec<String>,
    pub(crate) text: Vec<String>,
    /// What a guest wrote to a console of its own.
    pub(crate) guest: Vec<u8>,
    pub(crate) status: Option<u8>,
    /// What the parallel clock says of lines that CPUs took from each other.
    pub(crate) sharing: Vec<Section>,
}

impl Transcript {
    /// Takes in one more line.
    pub(crate) fn add(&mut self, line: Line) {
        match line {
            Line::Text(text) => self.text.push(text),
            Line::Garbled(text) => self.garbled.push(text),
            Line::Guest(bytes) => self.guest.extend(bytes),
            Line::Record(Record::Machine { facts }) => self.machine = facts,
            Line::Record(Record::Progress { .. }) => {}
            Line::Record(Record::Row(row)) => self.rows.push(row),
            Line::Record(Record::Error { text }) => self.errors.push(text),
            Line::Record(Record::Exit { status }) => self.status = Some(status),
        }
    }

    /// Takes what the parallel clock says of lines; each row gets what was taken in its section, where there is one for each.
    pub(crate) fn share(&mut self, sections: Vec<Section>) {
        let numbered = sections.iter().filter(|it| it.number.is_some());
        if numbered.clone().count() == self.rows.len() {
            for (row, section) in self.rows.iter_mut().zip(numbered) {
                let values = [
                    ("line_transfers", section.transfers),
                    ("line_transfers_among", section.among),
                    ("line_upgrades", section.upgrades),
                    ("line_upgrades_among", section.upgrades_among),
                    ("line_wait_ns", section.charged),
                ];
                let values = values.map(|(key, value)| (key.to_owned(), value.into()));
                row.values.extend(values);
            }
        }
        self.sharing = sections;
    }

    /// Why this run is no good, or nothing.
    pub(crate) fn fault(&self) -> Option<String> {
        if let Some(error) = self.errors.first() {
            return Some(error.clone());
        }
        if let Some(line) = self.garbled.first() {
            return Some(format!("unreadable record: {line}"));
        }
        match self.status {
            Some(0) if self.panic().is_some() => Some(self.last_words()),
            Some(0) => None,
            Some(status) => Some(format!("ended with status {status}: {}", self.last_words())),
            None => Some(format!("ended without a status: {}", self.last_words())),
        }
    }

    fn panic(&self) -> Option<&String> {
        self.text.iter().find(|line| line.starts_with("PANIC"))
    }

    /// The first line of a panic if there was one, else the end of what the guest wrote to its console, else the first error, else
    /// the last line.
    pub(crate) fn last_words(&self) -> String {
        const MOST: usize = 240;
        let error = || self.text.iter().find(|line| line.contains(" ERROR "));
        let panic = self.panic();
        if panic.is_none() && !self.guest.is_empty() {
            let from = self.guest.len().saturating_sub(MOST);
            let end = self.guest.get(from..).unwrap_or_default();
            return format!("... {}", end.escape_ascii());
        }
        let last = || self.text.iter().rev().find(|line| !line.is_empty());
        panic
            .or_else(error)
            .or_else(last)
            .map_or("it said nothing", String::as_str)
            .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::{Line, Record, Section, Transcript, parse};

    const RUN: &str = r#"[info] 3 CPUs
{"vellum":"machine","board":"qemu-virt","cpu":"Cortex-A72","cpus":3,"memory_mib":512,"gic":3,"features":["lse"]}
{"vellum":"progress","done":1,"of":2,"text":"dirty mutex 1 vCPU"}
{"vellum":"row","suite":"dirty","case":"","params":{"vcpus":1,"locking":"mutex"},"timing":"insn","values":{"dirty_ns":12}}
{"vellum":"exit","status":0}
"#;

    fn transcript(console: &str) -> Transcript {
        let mut all = Transcript::default();
        console.lines().for_each(|line| all.add(parse(line)));
        all
    }

    #[test]
    fn lines_belong_to_rows_only_if_there_are_as_many_sections() {
        let section = |number, transfers| Section {
            number,
            transfers,
            ..Section::default()
        };
        let mut run = transcript(RUN);
        run.share(vec![section(Some(0), 5), section(None, 9)]);
        assert_eq!(run.rows[0].values.get("line_transfers"), Some(&5.into()));
        assert_eq!(run.sharing.len(), 2);
        let mut run = transcript(RUN);
        run.share(vec![section(Some(0), 5), section(Some(1), 9)]);
        assert_eq!(run.rows[0].values.get("line_transfers"), None);
    }

    #[test]
    fn a_whole_run_is_read() {
        let run = transcript(RUN);
        assert_eq!(run.fault(), None);
        assert_eq!(run.machine["cpu"], "Cortex-A72");
        assert_eq!(run.rows[0].values["dirty_ns"], 12);
        assert_eq!(run.text, ["[info] 3 CPUs"]);
    }

    #[test]
    fn progress_is_a_record_of_its_own() {
        let line = r#"{"vellum":"progress","done":1,"of":2,"text":"x"}"#;
        let said = Record::Progress {
            done: 1,
            of: 2,
            text: "x".into(),
        };
        assert_eq!(parse(line), Line::Record(said));
    }

    #[test]
    fn text_that_looks_like_json_stays_text() {
        assert!(matches!(parse("{\"hello\":1}"), Line::Text(_)));
        assert!(matches!(parse(""), Line::Text(_)));
    }

    #[test]
    fn a_torn_record_is_a_fault() {
        let run =
            transcript("{\"vellum\":\"row\",\"suite\":\"dir\n{\"vellum\":\"exit\",\"status\":0}\n");
        assert!(
            run.fault()
                .is_some_and(|fault| fault.contains("unreadable"))
        );
    }

    #[test]
    fn a_run_without_a_status_failed_with_its_last_words() {
        let run = transcript("booting\nPANIC on cpu0 at src/boot.rs:1: no RAM\nregisters\n");
        assert!(run.fault().is_some_and(|fault| fault.contains("no RAM")));
    }

    #[test]
    fn a_panic_is_a_fault_whatever_the_status() {
        let run = transcript("PANIC on cpu1: no frame\n{\"vellum\":\"exit\",\"status\":0}\n");
        assert!(run.fault().is_some_and(|fault| fault.contains("no frame")));
    }

    #[test]
    fn an_error_is_told_before_what_came_last() {
        let console = "[ 1.4 cpu0 ERROR vellum::bench] suite lives: no\n[ 1.5 cpu2 INFO  guest] pass 1 ns\n\
            {\"vellum\":\"exit\",\"status\":1}\n";
        let fault = transcript(console).fault();
        assert!(fault.is_some_and(|fault| fault.contains("suite lives: no")));
    }

    #[test]
    fn a_status_other_than_zero_and_an_error_are_faults() {
        assert!(
            transcript("{\"vellum\":\"exit\",\"status\":101}\n")
                .fault()
                .is_some()
        );
        let refused = "{\"vellum\":\"error\",\"text\":\"too little RAM\"}\n{\"vellum\":\"exit\",\"status\":2}\n";
        assert_eq!(
            transcript(refused).fault().as_deref(),
            Some("too little RAM")
        );
    }
}
