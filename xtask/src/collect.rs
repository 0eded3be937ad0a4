//! `cargo xtask collect`: results of a board without a host, from its serial port or from a file of what it said.
//!
//! A serial port is set to 115200 8n1 and read until the line that ends every run; then the same tables, JSON and plots
//! are made as of a run here.

use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::bench;
use crate::process;
use crate::uart::{Line, Record, Transcript, parse};

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Serial port (/dev/ttyUSB0) or file
    #[arg(long, value_name = "PATH")]
    port: PathBuf,
}

/// Reads to the end of the run and prints what it measured.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let port = &args.port;
    let file = File::open(port).with_context(|| port.display().to_string())?;
    if file.metadata()?.file_type().is_char_device() {
        set_up(port)?;
    }
    let run = read(BufReader::new(file), &mut |line| println!("{line}"))?;
    if let Some(fault) = run.fault() {
        bail!("{fault}");
    }
    let used = bench::publish_collected(&run)?;
    println!("{} rows, {used} of them in tables", run.rows.len());
    Ok(ExitCode::SUCCESS)
}

fn set_up(port: &Path) -> Result<()> {
    let line = ["115200", "cs8", "-cstopb", "-parenb", "raw", "-echo"];
    process::run(Command::new("stty").arg("-F").arg(port).args(line))
        .with_context(|| format!("{} cannot be set to 115200 8n1", port.display()))
}

/// Everything up to the line that ends the run; `show` gets what is meant for people.
fn read(mut console: impl std::io::BufRead, show: &mut dyn FnMut(&str)) -> Result<Transcript> {
    let mut run = Transcript::default();
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if console.read_until(b'\n', &mut bytes)? == 0 {
            return Ok(run);
        }
        let text = String::from_utf8_lossy(&bytes);
        // A line may begin with what was on the wire before it, and with the mark of a shared console.
        let text = text.find("{\"vellum\":\"").map_or(&*text, |at| &text[at..]);
        let line = parse(text);
        if let Line::Text(text) = &line {
            show(text);
        }
        let last = matches!(line, Line::Record(Record::Exit { .. }));
        run.add(line);
        if last {
            return Ok(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::read;

    #[test]
    fn a_run_is_read_to_its_last_line_and_no_further() {
        let console = b"Pi firmware\r\n\xff\xfe{\"vellum\":\"machine\",\"board\":\"rpi4\"}\r\n\
            {\"vellum\":\"row\",\"suite\":\"dirty\",\"values\":{\"x\":1}}\r\n\
            {\"vellum\":\"exit\",\"status\":0}\r\nthe next run\r\n";
        let mut shown = Vec::new();
        let run = read(&console[..], &mut |line| shown.push(line.to_owned())).expect("read");
        assert_eq!(run.fault(), None);
        assert_eq!(run.machine["board"], "rpi4");
        assert_eq!(run.rows.len(), 1);
        assert_eq!(shown, ["Pi firmware"]);
    }

    #[test]
    fn a_console_that_falls_silent_is_a_run_without_a_status() {
        let run = read(&b"U-Boot\n"[..], &mut |_| ()).expect("read");
        assert!(run.fault().is_some_and(|it| it.contains("U-Boot")));
    }
}
