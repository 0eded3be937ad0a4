//! Timing `parallel`: the plugin that makes all CPUs of an emulated machine advance together.
//!
//! It is a package of this workspace (`xtask/clock`), compiled when a run first needs it, by the compiler that compiles this;
//! QEMU loads it as a plugin and, preloaded, takes its time from it. At the end it says how it went: a run in which it had to
//! give up fails.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::image;
use crate::machine::Timing;
use crate::paths;
use crate::process;
use crate::qemu::{Qemu, Version};

/// How far clocks may be apart unless said otherwise.
const QUANTUM: u32 = 1000;

/// Options of the clock.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Pace {
    /// Under timing parallel: by how many instructions CPUs may be apart that do nothing that others see in order [default: 1000]
    #[arg(long, value_name = "INSNS", value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    quantum: Option<u32>,
    /// Under timing parallel: what a CPU that takes a line of 64 bytes from another is charged, in instructions; suite dirty runs
    /// with each [default: 0]
    #[arg(long, value_delimiter = ',', value_name = "INSNS,..", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub(crate) line_cost: Vec<u32>,
    /// Under timing parallel: tell which lines CPUs take from each other, by the code that takes them and the data in them
    #[arg(long)]
    pub(crate) lines: bool,
}

impl Pace {
    /// Refuses what only goes with timing `parallel` when that is not among `timings`.
    pub(crate) fn accept(&self, timings: &[Timing]) -> Result<()> {
        let given = [
            (self.quantum.is_some(), "--quantum"),
            (!self.line_cost.is_empty(), "--line-cost"),
            (self.lines, "--lines"),
        ];
        for (_, name) in given.into_iter().filter(|(given, _)| *given) {
            if !timings.contains(&Timing::Parallel) {
                bail!("{name} goes with --timing parallel only");
            }
        }
        Ok(())
    }

    /// What the plugin is told.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            quantum: self.quantum.unwrap_or(QUANTUM),
            line_cost: self.line_cost.first().copied().unwrap_or(0),
            lines: self.lines,
        }
    }
}

/// What the plugin is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) quantum: u32,
    pub(crate) line_cost: u32,
    /// Who takes lines where is told.
    pub(crate) lines: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Pace::default().settings()
    }
}

/// The plugin, if `qemu` takes it: found out before anything is built or run.
pub(crate) fn ready(qemu: &Qemu) -> Result<PathBuf> {
    static READY: Mutex<Option<(PathBuf, PathBuf)>> = Mutex::new(None);
    let mut ready = READY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, library)) = ready.as_ref().filter(|(it, _)| it == qemu.program()) {
        return Ok(library.clone());
    }
    let help = process::output(Command::new(qemu.program()).arg("--help"))?;
    if !help.lines().any(|line| line.starts_with("-plugin")) {
        bail!(
            "{} is QEMU {} without plugins, which --timing parallel needs",
            qemu.program().display(),
            qemu.version()
        );
    }
    let library = library().context("the plugin of --timing parallel cannot be built")?;
    try_out(qemu, &library).with_context(|| {
        format!(
            "QEMU {} does not take the plugin of --timing parallel",
            qemu.version()
        )
    })?;
    *ready = Some((qemu.program().to_path_buf(), library.clone()));
    Ok(library)
}

/// Has QEMU load the plugin and end.
fn try_out(qemu: &Qemu, library: &Path) -> Result<()> {
    let (input, mut monitor) = std::io::pipe()?;
    monitor.write_all(b"quit\n")?;
    drop(monitor);
    let mut command = Command::new(qemu.program());
    command.args(["-machine", "none", "-nodefaults", "-display", "none"]);
    command.args(["-monitor", "stdio", "-plugin"]).arg(library);
    command.env("PARALLEL_CLOCK_API", interface(qemu.number()).to_string());
    process::output_of(command.stdin(input)).map(drop)
}

/// Has QEMU, which `command` is about to start, run by the clock.
pub(crate) fn attach(command: &mut Command, qemu: &Qemu, settings: &Settings) -> Result<()> {
    let library = ready(qemu)?;
    command.env("LD_PRELOAD", &library);
    command.env("PARALLEL_CLOCK_API", interface(qemu.number()).to_string());
    command.arg("-plugin").arg(format!(
        "{},quantum={},line-cost={},sites={}",
        library.display(),
        settings.quantum,
        settings.line_cost,
        u8::from(settings.lines)
    ));
    Ok(())
}

/// The version of the plugin interface that a QEMU has. One that is newer than all that are known refuses the latest
/// itself, and says so.
fn interface(version: Version) -> u32 {
    match version {
        Version(..=10, _) => 5,
        Version(11, 0) => 6,
        _ => 7,
    }
}

/// Builds the plugin, if it was not yet.
fn library() -> Result<PathBuf> {
    let mut command = process::cargo();
    command
        .args(["build", "--release", "--package", "parallel-clock"])
        .arg("--message-format=json-render-diagnostics");
    let found = compile(&mut command)?;
    // A copy, in a folder of its own: QEMU may still run with it when it is built anew.
    let name = found.file_name().context("the library has no name")?;
    let hash: String = image::sha256(&found)?.chars().take(16).collect();
    let copy = paths::target("clock").join(hash).join(name);
    paths::write(&copy, std::fs::read(&found)?)?;
    Ok(copy)
}

/// Runs cargo and returns the library that it made.
fn compile(command: &mut Command) -> Result<PathBuf> {
    let output = command
        .stderr(Stdio::piped())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let error = said.lines().find(|line| line.starts_with("error"));
        bail!("{}", error.unwrap_or("cargo does not say why"));
    }
    file(&String::from_utf8_lossy(&output.stdout))
        .context("cargo does not say where the library is")
}

/// The library among cargo's messages.
fn file(messages: &str) -> Option<PathBuf> {
    let library = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        let files = message.get("filenames")?.as_array()?;
        let mut paths = files
            .iter()
            .filter_map(|file| Some(Path::new(file.as_str()?)));
        let found = paths.find(|path| {
            let stem = path
                .file_stem()
                .is_some_and(|stem| stem == "libparallel_clock");
            stem && path.extension().is_some_and(|end| end == "so")
        });
        found.map(Path::to_path_buf)
    };
    messages.lines().rev().find_map(library)
}

/// Whether the clock went well, by what QEMU wrote to standard error.
pub(crate) fn judge(said: &str) -> Result<()> {
    let report = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        message.get("clock")?.get("timeouts")?.as_u64()
    };
    match said.lines().find_map(report) {
        Some(0) => Ok(()),
        Some(timeouts) => bail!(
            "the parallel clock: timeouts {timeouts}; {}",
            said.lines()
                .find(|line| line.contains("stalled"))
                .unwrap_or_default()
        ),
        None => bail!("the parallel clock says nothing: QEMU was ended before it could"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Pace, Settings, compile, file, interface, judge};
    use crate::machine::Timing;
    use crate::qemu::Version;
    use std::path::PathBuf;
    use std::process::Command;

    #[test]
    fn a_run_fails_unless_the_clock_says_that_it_went_well() {
        assert!(judge("noise\n{\"clock\":{\"turns\":5,\"timeouts\":0}}\n").is_ok());
        let error = judge("{\"clock\":{\"timeouts\":1}}\nparallel clock: stalled; turn None\n")
            .expect_err("it gave up");
        assert!(error.to_string().contains("timeouts 1"), "{error}");
        assert!(error.to_string().contains("stalled"), "{error}");
        assert!(judge("").is_err());
    }

    #[test]
    fn the_interface_is_that_of_the_version() {
        let versions = [
            Version(10, 2),
            Version(11, 0),
            Version(11, 1),
            Version(12, 0),
        ];
        assert_eq!(versions.map(interface), [5, 6, 7, 7]);
    }

    #[test]
    fn the_quantum_goes_with_the_parallel_clock_only() {
        let options = Pace {
            quantum: Some(500),
            ..Pace::default()
        };
        let settings = Settings {
            quantum: 500,
            ..Settings::default()
        };
        assert_eq!(options.settings(), settings);
        assert!(options.accept(&[Timing::Wall, Timing::Parallel]).is_ok());
        let error = options.accept(&[Timing::Insn]).expect_err("no such clock");
        assert!(error.to_string().contains("--timing parallel"), "{error}");
        assert!(Pace::default().accept(&[Timing::Insn]).is_ok());
        let costly = Pace {
            line_cost: vec![0, 150],
            ..Pace::default()
        };
        let error = costly.accept(&[Timing::Wall]).expect_err("no such clock");
        assert!(error.to_string().contains("--line-cost"), "{error}");
        let curious = Pace {
            lines: true,
            ..Pace::default()
        };
        let error = curious.accept(&[Timing::Insn]).expect_err("no such clock");
        assert!(error.to_string().contains("--lines"), "{error}");
    }

    #[test]
    fn without_a_compiler_it_is_said_what_is_missing() {
        let error = compile(&mut Command::new("/nowhere/cargo")).expect_err("there is none");
        assert!(error.to_string().contains("cannot start cargo"), "{error}");
        let fails = |script: &str| {
            let mut shell = Command::new("sh");
            compile(shell.args(["-c", script]))
                .expect_err("it fails")
                .to_string()
        };
        let words = "error: linker `cc` not found";
        assert_eq!(
            fails(&format!("echo Compiling >&2; echo '{words}' >&2; exit 101")),
            words
        );
        assert_eq!(fails("exit 101"), "cargo does not say why");
        assert_eq!(fails("true"), "cargo does not say where the library is");
    }

    #[test]
    fn the_library_is_found_among_messages() {
        let messages = r#"{"filenames":["/t/liblibc.rlib"]}
{"reason":"compiler-artifact","filenames":["/t/release/libparallel_clock.so"]}
{"reason":"build-finished","success":true}"#;
        let expected = PathBuf::from("/t/release/libparallel_clock.so");
        assert_eq!(file(messages), Some(expected));
        assert_eq!(file("nothing"), None);
    }
}
