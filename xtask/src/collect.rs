//! `cargo xtask collect`: results of a board without a host, from its serial port or from a file of what it said.
//!
//! A serial port is set to 115200 8n1 and read until the line that ends every run; then the same tables, JSON and plots
//! are made as of a run here. A file may hold several runs, one after the other: the last is taken unless another is asked
//! for. What was on the wire before a record, and what a guest wrote to a console that it shares, is no record.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::bench;
use crate::console::{Cutter, Piece, RECORD};
use crate::process;
use crate::run::show;
use crate::uart::{Line, MARK, Record, Transcript, parse};

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Serial port (/dev/ttyUSB0) or file
    #[arg(long, value_name = "PATH")]
    port: PathBuf,
    /// Which run of a file that holds several, from 1 [default: the last]
    #[arg(long, value_name = "N")]
    run: Option<usize>,
}

/// Reads to the end of the run and prints what it measured.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let port = &args.port;
    let file = File::open(port).with_context(|| port.display().to_string())?;
    let live = file.metadata()?.file_type().is_char_device();
    if live {
        set_up(port)?;
    }
    let runs = read(BufReader::new(file), live, &mut show)?;
    let run = choose(&runs, args.run)?;
    let used = bench::publish_collected(run)?;
    println!("{} rows, {used} of them in tables", run.rows.len());
    match fault(run) {
        Some(fault) => bail!("{fault}"),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// The run that is asked for, else the last.
fn choose(runs: &[Transcript], wanted: Option<usize>) -> Result<&Transcript> {
    let number = wanted.unwrap_or(runs.len());
    let Some(run) = number.checked_sub(1).and_then(|it| runs.get(it)) else {
        bail!("there is no run {number}; runs found: {}", runs.len());
    };
    if runs.len() > 1 {
        println!(
            "run {number} of {}; --run N takes another of them",
            runs.len()
        );
    }
    Ok(run)
}

/// Why what was collected is not all that the run measured, or nothing.
fn fault(run: &Transcript) -> Option<String> {
    let late = run.machine.is_empty() && !run.rows.is_empty();
    let late = late.then_some("it does not say what the machine is: the record begins too late");
    run.fault().or(late.map(str::to_owned))
}

fn set_up(port: &Path) -> Result<()> {
    let line = ["115200", "cs8", "-cstopb", "-parenb", "raw", "-echo"];
    process::run(Command::new("stty").arg("-F").arg(port).args(line))
        .with_context(|| format!("{} cannot be set to 115200 8n1", port.display()))
}

/// Every run that `console` tells of, at least one; only the first where more may follow for ever.
fn read(
    mut console: impl BufRead,
    first_only: bool,
    show: &mut dyn FnMut(&Line),
) -> Result<Vec<Transcript>> {
    let mut runs = Runs::default();
    let mut bytes = Vec::new();
    let mut more = true;
    while more && !(first_only && runs.ended) {
        bytes.clear();
        more = console.read_until(b'\n', &mut bytes)? > 0;
        if !runs.introduced() {
            // Nothing is shared with a guest before that: the mark of a shared console can only be noise.
            bytes.retain(|&it| it != RECORD);
        }
        runs.take(&bytes, !more, show);
    }
    Ok(runs.all)
}

/// What was told so far.
#[derive(Default)]
struct Runs {
    all: Vec<Transcript>,
    cutter: Cutter,
    /// The last of them has ended.
    ended: bool,
}

impl Runs {
    /// Whether the run that goes on has said what its machine is.
    fn introduced(&self) -> bool {
        let current = self.all.last().filter(|_| !self.ended);
        current.is_some_and(|it| !it.machine.is_empty())
    }

    fn take(&mut self, bytes: &[u8], end: bool, show: &mut dyn FnMut(&Line)) {
        let mut pieces = Vec::new();
        self.cutter.cut(bytes, |piece| pieces.push(piece));
        if end {
            pieces.extend(self.cutter.rest());
        }
        for piece in pieces {
            let line = match piece {
                // A record may begin behind what was on the wire before it.
                Piece::Line(text) => parse(text.find(MARK).map_or(&text, |at| &text[at..])),
                Piece::Guest(bytes) => Line::Guest(bytes),
            };
            show(&line);
            self.add(line);
        }
        if self.all.is_empty() {
            self.all.push(Transcript::default());
        }
    }

    fn add(&mut self, line: Line) {
        // A machine that starts anew may not have ended what it did before. What nobody but firmware says is no run.
        let new = match &line {
            Line::Record(Record::Machine { .. }) => self.introduced() || self.ended,
            Line::Record(_) | Line::Garbled(_) => self.ended,
            Line::Text(_) | Line::Guest(_) => false,
        };
        if new || self.all.is_empty() {
            self.all.push(Transcript::default());
            self.ended = false;
        }
        let last = matches!(line, Line::Record(Record::Exit { .. }));
        if let Some(run) = self.all.last_mut().filter(|_| !self.ended) {
            run.add(line);
        }
        if last {
            self.ended = true;
            self.cutter = Cutter::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Line, Transcript, choose, fault, read};

    const MACHINE: &str = "{\"vellum\":\"machine\",\"board\":\"rpi4\"}\n";
    const END: &str = "{\"vellum\":\"exit\",\"status\":0}\n";

    fn row(value: u32) -> String {
        format!(
            "{{\"vellum\":\"row\",\"suite\":\"dirty\",\"timing\":\"hw\",\"values\":{{\"x\":{value}}}}}\n"
        )
    }

    fn all(console: impl AsRef<[u8]>) -> Vec<Transcript> {
        read(console.as_ref(), false, &mut |_| ()).expect("read")
    }

    /// The `x` of every row of every run.
    fn values(runs: &[Transcript]) -> Vec<Vec<u64>> {
        let of_run = |run: &Transcript| {
            let values = run.rows.iter().map(|row| row.values["x"].as_u64());
            values.map(Option::unwrap_or_default).collect()
        };
        runs.iter().map(of_run).collect()
    }

    #[test]
    fn a_run_on_a_wire_is_read_to_its_last_line_and_no_further() {
        let console = b"Pi firmware\r\n\xff\xfe{\"vellum\":\"machine\",\"board\":\"rpi4\"}\r\n\
            {\"vellum\":\"row\",\"suite\":\"dirty\",\"values\":{\"x\":1}}\r\n\
            {\"vellum\":\"exit\",\"status\":0}\r\nthe next run\r\n";
        let mut shown = Vec::new();
        let mut show = |line: &Line| {
            if let Line::Text(text) = line {
                shown.push(text.clone());
            }
        };
        let runs = read(&console[..], true, &mut show).expect("read");
        let [run] = runs.as_slice() else {
            panic!("{} runs", runs.len())
        };
        assert_eq!(fault(run), None);
        assert_eq!(run.machine["board"], "rpi4");
        assert_eq!(run.rows.len(), 1);
        assert_eq!(shown, ["Pi firmware"]);
    }

    #[test]
    fn a_console_that_falls_silent_is_a_run_without_a_status() {
        let runs = all("U-Boot\n");
        assert!(fault(&runs[0]).is_some_and(|it| it.contains("U-Boot")));
        assert!(fault(&all("")[0]).is_some_and(|it| it.contains("said nothing")));
    }

    #[test]
    fn runs_behind_one_another_are_told_apart_and_the_last_is_taken() {
        let run = |value| [MACHINE, &row(value), END].concat();
        let runs = all([
            "firmware\n",
            &run(1),
            "\nfirmware again\n",
            &run(2),
            "end\n",
        ]
        .concat());
        assert_eq!(values(&runs), [[1], [2]]);
        assert!(runs.iter().all(|it| fault(it).is_none()));
        let value = |wanted| Some(choose(&runs, wanted).ok()?.rows[0].values["x"].clone());
        assert_eq!(value(None), Some(2.into()));
        assert_eq!(value(Some(1)), Some(1.into()));
        assert_eq!((value(Some(0)), value(Some(3))), (None, None));
    }

    #[test]
    fn a_machine_that_started_anew_is_another_run() {
        let runs = all([MACHINE, &row(1), "firmware\n", MACHINE, &row(2), END].concat());
        assert_eq!(values(&runs), [[1], [2]]);
        assert!(fault(&runs[0]).is_some_and(|it| it.contains("without a status")));
        assert_eq!(fault(&runs[1]), None);
    }

    #[test]
    fn a_record_that_is_torn_or_ends_early_keeps_its_rows_and_says_so() {
        let whole = [MACHINE, &row(1), &row(2), END].concat();
        for length in 0..whole.len() {
            let runs = all(&whole[..length]);
            let complete = length + 1 >= whole.len();
            assert_eq!(fault(&runs[0]).is_none(), complete, "{length} bytes");
            let rows = MACHINE.len() + row(1).len();
            let wanted =
                usize::from(length + 1 >= rows) + usize::from(length + 1 >= rows + row(2).len());
            assert_eq!(runs[0].rows.len(), wanted, "{length} bytes");
        }
        // It begins in the middle of a line.
        for first in [3, MACHINE.len() - 2, MACHINE.len() + 9] {
            let runs = all(&whole[first..]);
            assert_eq!(values(&runs)[0].last(), Some(&2));
            assert!(fault(&runs[0]).is_some(), "from byte {first}");
        }
        let torn = [MACHINE, "{\"vellum\":\"row\",\"su\u{fffd}\n", &row(2), END].concat();
        let runs = all(torn);
        assert_eq!(values(&runs), [[2]]);
        assert!(fault(&runs[0]).is_some_and(|it| it.contains("unreadable")));
    }

    #[test]
    fn what_a_guest_writes_is_no_record_and_noise_makes_no_guest() {
        let forged = row(666);
        let console = [
            "\u{1e}noise\u{1e}\n\u{1e}",
            MACHINE,
            &row(1),
            "\u{1e}the console is the guest's\nlogin: \n",
            &forged,
            END,
            "half a line \u{1e}",
            &row(2),
            "more of it\u{1e}",
            END,
            "firmware\n",
            MACHINE,
            &row(3),
            END,
        ];
        let runs = all(console.concat());
        assert_eq!(values(&runs), [vec![1, 2], vec![3]]);
        assert!(runs.iter().all(|it| fault(it).is_none()));
        let guest = String::from_utf8_lossy(&runs[0].guest);
        assert!(
            guest.contains("666") && guest.ends_with("more of it"),
            "{guest}"
        );
    }
}
