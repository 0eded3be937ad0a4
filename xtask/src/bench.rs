//! `cargo xtask bench [SUITE..]`: boots what a suite needs, collects its rows, prints its tables and writes
//! `target/bench/<suite>.json` and `.svg`.
//!
//! Names are checked before anything is built; nothing is written before every run of a suite has ended well.

mod age;
mod aging;
mod checkpoint;
mod dirty;
pub(crate) mod exit;
mod fault;
mod get;
mod heat;
mod ipi;
mod moving;
mod options;
mod protect;
mod rows;
mod scaling;
mod split;
mod starve;

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use crate::board::Board;
use crate::clock;
use crate::image::{self, Image, Profile};
use crate::lines;
use crate::machine::{Machine, Timing};
use crate::paths;
use crate::plot::{self, Panel};
use crate::qemu::{Launch, Qemu};
use crate::setup;
use crate::uart::{Line, Measured, Record, Transcript};
pub(crate) use options::Options;
pub(crate) use rows::Row;

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// dirty: the phases of dirty logging; fault: instructions of one write fault, over CPU models; get: cost of reading
    /// few dirty pages of large slots; starve: how long the exclusive side of the MMU lock waits for faulting vCPUs; split: splitting blocks by
    /// faults and eagerly, at break-before-make levels 2 and 0, and what vCPUs notice of it; protect: protecting all memory at
    /// once, over engines and amounts of memory; checkpoint: how much slower a guest is while epoch after epoch is harvested; age: marking
    /// memory idle, and what it costs those who use it; heat: which memory is hot, beside what the guest is known to do; exit: what exits of each kind cost, beside KVM's; ipi: the kernel's IPI
    /// benchmark; lines: what moves between CPUs, by the parallel clock
    #[arg(default_value = "dirty", value_name = "SUITE")]
    suites: Vec<Suite>,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    qemu: setup::Choice,
    /// Write the rows of all suites to this file too; '-' is standard output, with nothing else on it
    #[arg(long, value_name = "FILE")]
    json: Option<String>,
    /// Build with debug assertions and the record of shared lines; times mean little then
    #[arg(long)]
    debug: bool,
    /// Kill a run after this many seconds [default: 540; under timing parallel 1800]
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suite {
    Dirty,
    Fault,
    Get,
    Starve,
    Split,
    Protect,
    Checkpoint,
    Age,
    Heat,
    Exit,
    Ipi,
    Lines,
}

/// One boot.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) title: String,
    pub(crate) machine: Machine,
    pub(crate) append: String,
}

impl Suite {
    const ALL: [Self; 12] = [
        Self::Dirty,
        Self::Fault,
        Self::Get,
        Self::Starve,
        Self::Split,
        Self::Protect,
        Self::Checkpoint,
        Self::Age,
        Self::Heat,
        Self::Exit,
        Self::Ipi,
        Self::Lines,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Dirty => "dirty",
            Self::Fault => "fault",
            Self::Get => "get",
            Self::Starve => "starve",
            Self::Split => "split",
            Self::Protect => "protect",
            Self::Checkpoint => "checkpoint",
            Self::Age => "age",
            Self::Heat => "heat",
            Self::Exit => "exit",
            Self::Ipi => "ipi",
            Self::Lines => "lines",
        }
    }

    fn jobs(self, options: &Options, board: &Board) -> Result<Vec<Job>> {
        let jobs = self.with_one_cost(options, board)?;
        Ok(match self {
            // It has a cost where none is named.
            Self::Lines => jobs,
            _ => scaling::with_costs(options, jobs),
        })
    }

    fn with_one_cost(self, options: &Options, board: &Board) -> Result<Vec<Job>> {
        match self {
            Self::Dirty => dirty::jobs(options, board),
            Self::Fault => fault::jobs(options, board),
            Self::Get => get::jobs(options, board),
            Self::Starve => starve::jobs(options, board),
            Self::Split => split::jobs(options, board),
            Self::Protect => protect::jobs(options, board),
            Self::Checkpoint => checkpoint::jobs(options, board),
            Self::Age => age::jobs(options, board),
            Self::Heat => heat::jobs(options, board),
            Self::Exit => exit::jobs(options, board),
            Self::Ipi => ipi::jobs(options, board),
            Self::Lines => moving::jobs(options, board),
        }
    }

    fn report(self, rows: &[Row]) -> String {
        let each = scaling::by_cost(rows);
        each.iter().map(|rows| self.report_of(rows)).collect()
    }

    fn report_of(self, rows: &[Row]) -> String {
        match self {
            Self::Dirty => dirty::report(rows),
            Self::Fault => fault::report(rows),
            Self::Get => get::report(rows),
            Self::Starve => starve::report(rows),
            Self::Split => split::report(rows),
            Self::Protect => protect::report(rows),
            Self::Checkpoint => checkpoint::report(rows),
            Self::Age => age::report(rows),
            Self::Heat => heat::report(rows),
            Self::Exit => exit::report(rows),
            Self::Ipi => ipi::report(rows),
            Self::Lines => moving::report(rows),
        }
    }

    fn panels(self, rows: &[Row]) -> Vec<Panel> {
        let charts = match self {
            Self::Dirty => dirty::charts(rows),
            Self::Fault => fault::charts(rows),
            Self::Get => get::charts(rows),
            Self::Starve => starve::charts(rows),
            Self::Split => split::charts(rows),
            Self::Protect => protect::charts(rows),
            Self::Checkpoint => checkpoint::charts(rows),
            Self::Age => age::charts(rows),
            Self::Heat => return heat::panels(rows),
            Self::Exit => exit::charts(rows),
            Self::Ipi => ipi::charts(rows),
            Self::Lines => moving::charts(rows),
        };
        charts.into_iter().map(Panel::Lines).collect()
    }
}

impl std::str::FromStr for Suite {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|suite| suite.name() == name)
            .ok_or_else(|| format!("no such suite; known suites: {}", known()))
    }
}

/// Measures the suites in the order given.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let board = Board::qemu_virt()?;
    let mut timing = args.options.timing();
    if args.suites.contains(&Suite::Lines) {
        timing.push(Timing::Parallel);
    }
    args.options.clock.accept(&timing)?;
    let mut plans = Vec::new();
    for &suite in &args.suites {
        plans.push((suite, suite.jobs(&args.options, &board)?));
    }
    let qemu = setup::qemu(&args.qemu)?;
    if timing.contains(&Timing::Parallel) {
        clock::ready(&qemu)?;
    }
    eprintln!("building the image");
    let image = image::build(Profile::of(args.debug))?;
    let hash = image::sha256(&image.flat)?;
    let quiet = args.json.as_deref() == Some("-");
    let mut all = Vec::new();
    for (suite, jobs) in plans {
        let (rows, sharing) = measure(
            suite,
            &jobs,
            &qemu,
            (&image, &hash),
            args.seconds.map(Duration::from_secs),
        )?;
        let written = publish(suite, &rows)?;
        if !quiet {
            print!("{}{sharing}", suite.report(&rows));
            println!("\nimage: {} sha256 {hash}", short(&image.flat));
            println!("written: {written}");
        }
        all.extend(rows);
    }
    match args.json.as_deref() {
        Some("-") => print!("{}", rows::json(&all)?),
        Some(file) => paths::write(file.as_ref(), &rows::json(&all)?)?,
        None => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes what a suite measured, and says where.
fn publish(suite: Suite, rows: &[Row]) -> Result<String> {
    let plot = paths::target(&format!("bench/{}.svg", suite.name()));
    let data = paths::target(&format!("bench/{}.json", suite.name()));
    paths::write(&plot, plot::svg(&suite.panels(rows))?)?;
    paths::write(&data, rows::json(rows)?)?;
    Ok(format!("{}, {}", short(&data), short(&plot)))
}

/// What a board measured by itself: prints the tables of every suite in it and writes the same files as a run here.
/// Rows of suites that have no tables are left out; the number of rows that were used comes back.
pub(crate) fn publish_collected(run: &Transcript) -> Result<usize> {
    let mut used = 0;
    for suite in Suite::ALL {
        let rows: Vec<Row> = run
            .rows
            .iter()
            .filter(|row| row.suite == suite.name())
            .map(|row| Row::collected(row.clone(), &run.machine))
            .collect();
        if !rows.is_empty() {
            print!("{}", suite.report(&rows));
            println!("\nwritten: {}", publish(suite, &rows)?);
            used += rows.len();
        }
    }
    Ok(used)
}

/// A path as seen from the root of the repository.
fn short(path: &Path) -> String {
    path.strip_prefix(paths::root())
        .unwrap_or(path)
        .display()
        .to_string()
}

/// Runs every job of a suite with an image, whose hash is given, and gives each row its machine. Who shared what comes back in
/// words, if that was asked for.
fn measure(
    suite: Suite,
    jobs: &[Job],
    qemu: &Qemu,
    (image, hash): (&Image, &str),
    limit: Option<Duration>,
) -> Result<(Vec<Row>, String)> {
    let mut rows = Vec::new();
    let mut sharing = String::new();
    for (index, job) in jobs.iter().enumerate() {
        let title = format!(
            "{} {}/{}: {}",
            suite.name(),
            index + 1,
            jobs.len(),
            job.title
        );
        let progress = Progress::new(title);
        let limit = limit.unwrap_or(patience(job.machine.timing));
        let launch = Launch {
            machine: &job.machine,
            image: &image.flat,
            placed: None,
            bundle: None,
            append: &job.append,
            limit,
            silence: limit,
            gdb: false,
            record: None,
        };
        let run = qemu
            .run(&launch, &mut |line| progress.hear(line))
            .with_context(|| job.title.clone())?;
        progress.end();
        if let Some(fault) = run.fault() {
            bail!("{}: {fault}", job.title);
        }
        if run.rows.is_empty() {
            bail!("{}: the run measured nothing", job.title);
        }
        if job.machine.clock.lines {
            sharing += &tables(&run, image)?;
        }
        let mut machine = run.machine.clone();
        machine.insert("image_sha256".into(), hash.into());
        rows.extend(run.rows.into_iter().map(|mut row| {
            if job.machine.timing == Timing::Parallel {
                let cost = job.machine.clock.line_cost;
                row.params.insert("line_cost".into(), cost.into());
            }
            Row::new(
                row,
                suite.name(),
                &machine,
                qemu.version(),
                job.machine.timing,
            )
        }));
    }
    Ok((rows, sharing))
}

/// How long a run may take unless said otherwise.
fn patience(timing: Timing) -> Duration {
    Duration::from_secs(match timing {
        // Every CPU's work is done in turn.
        Timing::Parallel => 1800,
        Timing::Insn | Timing::Wall => 540,
    })
}

/// Who took which lines, for each row that has a section and for what is in none.
pub(crate) fn tables(run: &Transcript, image: &Image) -> Result<String> {
    let base = run.machine.get("image_base").and_then(|it| it.as_u64());
    let base = base.context("the image does not say where it is")?;
    let files = lines::Files::of(image)?;
    let names = lines::Symbols::of(&files, base)?;
    let mut text = String::new();
    for section in &run.sharing {
        let number = section.number.and_then(|it| usize::try_from(it).ok());
        let row = number.and_then(|number| run.rows.get(number));
        let faults = row.and_then(|row| {
            let kinds = ["faults_permission", "faults_translation"];
            kinds
                .iter()
                .find_map(|kind| row.values.get(*kind)?.as_f64())
        });
        let words = |row: &Measured| {
            let params = ["vcpus", "locking", "layout"].map(|key| row.params.get(key));
            let params = params.into_iter().flatten().map(Value::to_string);
            format!("{} {}", row.case, params.collect::<Vec<_>>().join(" "))
        };
        text += &format!(
            "\nlines taken from other CPUs, {}: {} moved and {} upgraded, of which {} and {} among vCPUs in their operations\n",
            row.map_or_else(|| "otherwise".to_owned(), words),
            section.transfers,
            section.upgrades,
            section.among,
            section.upgrades_among
        );
        text += &lines::report(section, &names, faults);
    }
    Ok(text)
}

/// A bar on a terminal, plain lines elsewhere; on standard error in both cases.
struct Progress {
    bar: ProgressBar,
    plain: bool,
    title: String,
}

impl Progress {
    fn new(title: String) -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target = if plain {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        if let Ok(style) =
            ProgressStyle::with_template("{elapsed:>4} {bar:24} {pos}/{len} {prefix}: {msg}")
        {
            bar.set_style(style);
        }
        bar.set_prefix(title.clone());
        bar.set_message("booting");
        bar.enable_steady_tick(Duration::from_millis(250));
        if plain {
            eprintln!("{title}");
        }
        Self { bar, plain, title }
    }

    fn hear(&self, line: &Line) {
        let Line::Record(Record::Progress { done, of, text }) = line else {
            return;
        };
        self.bar.set_length(*of);
        self.bar.set_position(*done);
        self.bar.set_message(text.clone());
        if self.plain {
            eprintln!("{}: {done}/{of} {text}", self.title);
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// `ns` of a run in the words of its timing: what a table's title says about its unit.
pub(crate) fn unit(timing: Timing) -> (&'static str, f64) {
    match timing {
        Timing::Wall => ("microseconds", 1e3),
        Timing::Parallel => ("virtual microseconds, a nanosecond an instruction", 1e3),
        Timing::Insn => ("thousands of instructions", 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::Suite;

    #[test]
    fn suites_are_found_by_name_and_others_are_refused_with_the_list() {
        for suite in Suite::ALL {
            assert_eq!(suite.name().parse(), Ok(suite));
        }
        let error = "migrate".parse::<Suite>().expect_err("not yet");
        assert!(error.contains("dirty"), "{error}");
    }
}
