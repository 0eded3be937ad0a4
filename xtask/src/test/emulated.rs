//! Runs the cases of the table: two at a time where the host has CPUs for it, those that compare times alone, each boot
//! under a watchdog.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::Tally;
use super::cases::{self, Boot, Case, Expect};
use super::hostile;
use super::soak::Record;
use crate::board::Board;
use crate::image::{self, Image, Profile};
use crate::linux::{self, Series};
use crate::qemu::{Launch, Qemu};
use crate::setup;
use crate::setup::debian::NoSource;
use crate::uart::{Line, Transcript};

/// What every case needs.
struct Bench {
    qemu: Qemu,
    release: Image,
    debug: Image,
    bundles: Mutex<()>,
}

/// What the cases came to, written by whoever finishes one.
struct Ledger {
    tally: Tally,
    /// Of the long runs only.
    record: Option<Record>,
}

/// Runs the cases whose name contains `only`, those that can be behind the hostile boot loader if that is asked for.
pub(super) fn run(soak: bool, hostile: bool, only: &str) -> Result<Tally> {
    let board = Board::qemu_virt()?;
    let bench = Bench {
        qemu: setup::qemu(&setup::Choice::default())?,
        release: image::build(Profile::Release)?,
        debug: image::build(Profile::Debug)?,
        bundles: Mutex::new(()),
    };
    let fingerprint = image::fingerprint(&bench.release.flat)?;
    let record = (soak || hostile).then(|| Record::load(fingerprint, soak));
    let known = |case: &Case| {
        record
            .as_ref()
            .is_some_and(|record| record.knows(&case.name))
    };
    let mut cases = cases::all(&board, soak);
    if hostile {
        cases = cases.into_iter().filter_map(hostile::behind).collect();
    }
    cases.retain(|case| case.name.contains(only));
    let (before, wanted): (Vec<Case>, Vec<Case>) = cases.into_iter().partition(known);
    println!("{} cases under QEMU {}", wanted.len(), bench.qemu.version());
    if !before.is_empty() {
        println!("{} passed before, for the same image", before.len());
    }
    let (alone, together): (Vec<Case>, Vec<Case>) = wanted.into_iter().partition(|case| case.alone);
    let ledger = Mutex::new(Ledger {
        tally: Tally::default(),
        record,
    });
    work(&bench, &together, workers(), &ledger);
    work(&bench, &alone, 1, &ledger);
    let ledger = ledger.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(ledger.tally)
}

/// Takes cases from the list until it is empty, `workers` at a time.
fn work(bench: &Bench, cases: &[Case], workers: usize, ledger: &Mutex<Ledger>) {
    let next = AtomicUsize::new(0);
    let one = || {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let start = Instant::now();
            let result = bench.judge(case);
            ledger.lock().unwrap_or_else(PoisonError::into_inner).note(
                case,
                start.elapsed(),
                result,
            );
        }
    };
    thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(one))));
}

impl Ledger {
    fn note(&mut self, case: &Case, took: Duration, result: Result<()>) {
        if let Err(error) = &result
            && let Some(missing) = error.downcast_ref::<NoSource>()
        {
            println!("skipped {}: {missing}", case.name);
            self.tally.skip();
            return;
        }
        if let Err(error) = result {
            println!("FAILED  {}: {error:#}", case.name);
            self.tally.fail(format!("{}: {error:#}", case.name));
            return;
        }
        println!("ok      {} ({:.1} s)", case.name, took.as_secs_f64());
        self.tally.passed += 1;
        if let Some(Err(error)) = self.record.as_mut().map(|record| record.add(&case.name)) {
            eprintln!("the soak record could not be written: {error:#}");
        }
    }
}

fn workers() -> usize {
    thread::available_parallelism().map_or(1, |count| count.get().min(2))
}

impl Bench {
    fn judge(&self, case: &Case) -> Result<()> {
        let mut runs = Vec::new();
        for boot in &case.boots {
            runs.push(self.boot(case, boot)?);
        }
        match case.expect {
            Expect::Good(check) => {
                // What the rows say is closer to the cause than a status is.
                let judged = check(&runs);
                for (boot, run) in case.boots.iter().zip(&runs) {
                    match (run.fault(), &judged) {
                        (Some(fault), Err(why)) if !run.rows.is_empty() => bail!("{fault}; {why}"),
                        (Some(fault), _) => bail!("{fault}"),
                        (None, _) => whole(boot, run)?,
                    }
                }
                judged.map_err(|why| anyhow!("{why}"))
            }
            Expect::Refusal(words) => runs.iter().try_for_each(|run| refused(run, words)),
        }?;
        if case.hashed {
            let hash = image::sha256(&self.release.flat)?;
            println!("image   {}: sha256 {hash}", case.name);
        }
        Ok(())
    }

    fn boot(&self, case: &Case, boot: &Boot) -> Result<Transcript> {
        let mut machine = boot.machine.clone();
        machine.dtb = boot.tree.file(&self.qemu, &machine)?;
        let bundle = boot.linux.map(|series| self.bundle(series)).transpose()?;
        let limit = Duration::from_secs(case.seconds);
        let image = if case.debug {
            &self.debug
        } else {
            &self.release
        };
        let hostile = boot
            .hostile
            .then(|| hostile::files(image, machine.memory_mib, bundle.is_some()))
            .transpose()?;
        let launch = Launch {
            machine: &machine,
            image: hostile.as_ref().map_or(&image.flat, |it| &it.loader),
            placed: hostile
                .as_ref()
                .map(|it| (it.spoiled.as_path(), hostile::PLACE)),
            bundle: bundle.as_deref(),
            append: &boot.append,
            limit,
            silence: limit,
            gdb: false,
            record: None,
        };
        let (sender, keys) = mpsc::channel();
        let mut typist = Typist::new(boot.typed, sender);
        let keys = (!boot.typed.is_empty()).then_some(keys);
        self.qemu
            .run_with(&launch, keys, &mut |line| typist.hear(line))
    }

    /// The bundle of a series; one case at a time makes it.
    fn bundle(&self, series: Series) -> Result<PathBuf> {
        let _alone = self.bundles.lock().unwrap_or_else(PoisonError::into_inner);
        linux::bundle(series)
    }
}

/// Types as soon as a guest has written what it waits for.
struct Typist {
    left: &'static [(&'static str, &'static str)],
    /// What the guest has written since it was last answered.
    heard: Vec<u8>,
    keys: mpsc::Sender<Vec<u8>>,
}

impl Typist {
    fn new(left: &'static [(&'static str, &'static str)], keys: mpsc::Sender<Vec<u8>>) -> Self {
        Self {
            left,
            heard: Vec::new(),
            keys,
        }
    }

    fn hear(&mut self, line: &Line) {
        let Line::Guest(bytes) = line else {
            return;
        };
        self.heard.extend(bytes);
        if let Some(((wait, keys), left)) = self.left.split_first()
            && String::from_utf8_lossy(&self.heard).contains(wait)
        {
            // The run has ended if this fails.
            self.keys.send(keys.as_bytes().to_vec()).unwrap_or_default();
            self.heard.clear();
            self.left = left;
        }
    }
}

/// The hypervisor found the machine that was asked for.
fn whole(boot: &Boot, run: &Transcript) -> Result<()> {
    let machine = &boot.machine;
    for (key, wanted) in [("cpus", machine.cpus), ("gic", machine.gic)] {
        let found = run.machine.get(key).and_then(serde_json::Value::as_u64);
        if found != Some(wanted.into()) {
            bail!("the machine has {key} {wanted}, the hypervisor found {found:?}");
        }
    }
    Ok(())
}

/// A machine that is refused says why in one line, ends with a status, and panics nowhere.
fn refused(run: &Transcript, words: &str) -> Result<()> {
    let Some(error) = run.errors.first() else {
        bail!("no error line; last: {}", run.last_words());
    };
    if !error.to_lowercase().contains(&words.to_lowercase()) {
        bail!("the error line does not say '{words}': {error}");
    }
    match run.status {
        None | Some(0 | 101) => bail!("status {:?} after the error '{error}'", run.status),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::refused;
    use crate::uart::{Transcript, parse};

    fn run(console: &str) -> Transcript {
        let mut all = Transcript::default();
        console.lines().for_each(|line| all.add(parse(line)));
        all
    }

    #[test]
    fn a_refusal_has_a_reason_and_a_status() {
        let error = r#"{"vellum":"error","text":"too little RAM"}"#;
        let good = format!("{error}\n{{\"vellum\":\"exit\",\"status\":2}}");
        assert!(refused(&run(&good), "ram").is_ok());
        assert!(refused(&run(&good), "gic").is_err());
        assert!(refused(&run(error), "ram").is_err());
        for status in [0, 101] {
            let bad = format!("{error}\n{{\"vellum\":\"exit\",\"status\":{status}}}");
            assert!(refused(&run(&bad), "ram").is_err());
        }
        assert!(refused(&run("{\"vellum\":\"exit\",\"status\":2}"), "ram").is_err());
    }
}
