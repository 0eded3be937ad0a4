//! Cases with Linux as the judge: Debian's unmodified kernels find a whole machine, whatever is done beneath them.

use super::cases::{Boot, Case, Expect, Table};
use super::checks::{Verdict, each, same, value};
use crate::board::Board;
use crate::linux::Series;
use crate::machine::{Firmware, Machine};
use crate::uart::Transcript;

/// CPU model, GIC version, and the engines and trackers that are shown beneath Linux there; under soak all that the model has.
const USUAL: [(&str, u32, &[&str], &[&str]); 2] = [
    (
        "max",
        3,
        &["engine=lazy", "engine=pie", "engine=walk tracking=dbm"],
        &["engine=walk", "engine=swap"],
    ),
    (
        "cortex-a72",
        2,
        &["engine=walk", "engine=swap"],
        &["engine=lazy"],
    ),
];
/// What is typed at a shell, each behind what it waits for. What is typed is echoed: what is waited for differs from it.
const TYPED: &[(&str, &str)] = &[
    (
        "~ # ",
        "echo abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ | tr a-zA-Z n-za-mN-ZA-M\r",
    ),
    (
        "nopqrstuvwxyzabcdefghijklm-NOPQRSTUVWXYZABCDEFGHIJKLM",
        "printf '\\n\\036{\"vellum\":\"exit\",\"status\":0}\\n'; reboot\r",
    ),
    ("Enter 'help'", "echo $((6 * 7))\r"),
    ("42\r\n", "poweroff\r"),
];
/// Leaves out of a boot what takes an emulator longest and is not what is judged: self-tests of ciphers, security modules,
/// memory zeroed when it is allocated.
const LEAN: &str = "init_on_alloc=0 cryptomgr.notests apparmor=0 audit=0 kfence.sample_interval=0";
/// vCPUs of every guest.
const VCPUS: u32 = 4;
/// What the guest says when it found what it should.
const CONTENT: &str = "vellum-test: ok";
/// Userspace is reached within this time, by the guest's own clock.
const MOST_SECONDS: f64 = 60.0;

impl Table<'_> {
    /// The usual machines with the newest kernel; under soak every kernel on every machine.
    pub(super) fn linux(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for (model, gic, shown, rest) in USUAL {
            let machine = Place {
                model,
                gic,
                series: Series::V6_12,
            };
            cases.push(self.reboots(machine));
            cases.push(self.console(machine));
            let rest = if self.soak { rest } else { &[] };
            let engines = shown.iter().chain(rest);
            cases.extend(engines.map(|engine| self.beneath(machine, engine)));
        }
        if self.soak {
            for series in Series::ALL {
                for gic in [3, 2] {
                    for model in ["max", "neoverse-n1", "cortex-a72"] {
                        cases.push(self.judged(Place { model, gic, series }));
                    }
                }
            }
        }
        cases.extend(self.other_boards());
        cases.extend(self.bad_guests());
        cases
    }

    /// The other boards' machines, as they start.
    fn other_boards(&self) -> Vec<Case> {
        let place = Place {
            model: "neoverse-n1",
            gic: 3,
            series: Series::V6_12,
        };
        let mut under_uefi = self.boot(
            "Linux finds a machine under UEFI with ACPI tables".to_owned(),
            place,
            "guest-mib=128 boots=1",
            "vellum.work=0",
            Expect::Good(every_boot_is_content),
        );
        let mut on_pi = Case {
            name: "Linux finds a machine on a Raspberry Pi 4".to_owned(),
            ..under_uefi.clone()
        };
        for boot in &mut under_uefi.boots {
            boot.machine.firmware = Firmware::UefiAcpi;
        }
        let Ok(board) = Board::load("rpi4") else {
            return vec![under_uefi];
        };
        for boot in &mut on_pi.boots {
            boot.machine = Machine::of(&board);
            let vcpus = boot.machine.cpus.saturating_sub(1);
            boot.append = boot
                .append
                .replace(&format!("vcpus={VCPUS}"), &format!("vcpus={vcpus}"));
        }
        vec![under_uefi, on_pi]
    }

    /// Boots that follow one another, each with its checks; the last ends by switching off.
    fn reboots(&self, place: Place) -> Case {
        let boots = if self.soak { 21 } else { 4 };
        let work = u32::from(self.soak);
        let mut case = self.boot(
            format!("Linux restarts {} times, {place}", boots - 1),
            place,
            &format!("guest-mib=128 boots={boots}"),
            &format!("vellum.work={work}"),
            Expect::Good(restarts_are_clean),
        );
        // Four boots take most of the time that a case has.
        case.alone = true;
        case
    }

    /// One boot, with its checks.
    fn judged(&self, place: Place) -> Case {
        self.boot(
            format!("Linux finds a machine, {place}"),
            place,
            "guest-mib=256 boots=1",
            "vellum.work=8",
            Expect::Good(every_boot_is_content),
        )
    }

    /// One boot while its memory is logged, split, protected at once, aged and collapsed all the time.
    fn beneath(&self, place: Place, engine: &str) -> Case {
        let (mib, period_us) = if self.soak {
            (256, 1_000)
        } else {
            (128, 100_000)
        };
        self.boot(
            format!("Linux does not notice what is beneath it, {engine}, {place}"),
            place,
            &format!("guest-mib={mib} boots=1 beneath=1 period-us={period_us} {engine}"),
            "",
            Expect::Good(nothing_noticed),
        )
    }

    /// Somebody types at a shell: a line longer than the UART's queue, a forged record, a restart, the end.
    fn console(&self, place: Place) -> Case {
        let mut case = self.boot(
            format!("somebody types at Linux's console, {place}"),
            place,
            "console=raw guest-mib=128 boots=2",
            "vellum.test=0",
            Expect::Good(console_works),
        );
        case.boots.iter_mut().for_each(|boot| boot.typed = TYPED);
        case
    }

    /// Guests that cannot be started, and one that fails.
    fn bad_guests(&self) -> Vec<Case> {
        let place = Place {
            model: "max",
            gic: 3,
            series: Series::V6_12,
        };
        let mut missing = self.boot(
            "refused: Linux without a kernel".to_owned(),
            place,
            "",
            "",
            Expect::Refusal("needs a bundle"),
        );
        missing.boots.iter_mut().for_each(|boot| boot.linux = None);
        let little = self.boot(
            "refused: Linux in too little memory".to_owned(),
            place,
            "guest-mib=64",
            "",
            Expect::Refusal("64 MiB of guest memory are too little"),
        );
        let panicked = self.boot(
            "a kernel that panics fails the run".to_owned(),
            place,
            "boots=1",
            "rdinit=/nothing",
            Expect::Refusal("kernel panicked"),
        );
        vec![missing, little, panicked]
    }

    fn boot(&self, name: String, place: Place, words: &str, told: &str, expect: Expect) -> Case {
        let machine = self.machine(|machine| {
            (machine.cpu, machine.gic) = (place.model.to_owned(), place.gic);
            (machine.cpus, machine.memory_mib) = (VCPUS + 1, 1024);
        });
        let lean = if self.soak { "" } else { LEAN };
        let append =
            format!("suite=linux vcpus={VCPUS} {words} -- quiet {lean} vellum.test=1 {told}");
        let mut case = self.case(name, machine, append, expect);
        let with_kernel = |boot: &mut Boot| boot.linux = Some(place.series);
        case.boots.iter_mut().for_each(with_kernel);
        case
    }
}

/// A kernel on a machine.
#[derive(Clone, Copy)]
struct Place {
    model: &'static str,
    gic: u32,
    series: Series,
}

impl std::fmt::Display for Place {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { model, gic, series } = self;
        write!(out, "{} on {model} GICv{gic}", series.name())
    }
}

/// Two boots; the record that the guest forged is among the guest's bytes, without the mark, and ended nothing.
fn console_works(runs: &[Transcript]) -> Verdict {
    for run in runs {
        let guest = String::from_utf8_lossy(&run.guest);
        if run.rows.len() != 2 {
            return Err(format!("{} boots, not 2", run.rows.len()));
        }
        if !guest.contains("\n{\"vellum\":\"exit\",\"status\":0}") {
            return Err("what the guest wrote did not arrive as it was".into());
        }
    }
    Ok(())
}

/// Each boot said that all is well, and was in userspace in time.
fn every_boot_is_content(runs: &[Transcript]) -> Verdict {
    for run in runs {
        let said = |what: &str| run.text.iter().filter(|line| line.contains(what)).count();
        if said(CONTENT) != run.rows.len() {
            let complaint = run.text.iter().find(|line| line.contains("FAILED"));
            return Err(format!(
                "{} boots, '{CONTENT}' {} times; {}",
                run.rows.len(),
                said(CONTENT),
                complaint.map_or("no complaint", String::as_str)
            ));
        }
        for line in run
            .text
            .iter()
            .filter(|line| line.contains("userspace after"))
        {
            let seconds = line
                .split_whitespace()
                .rev()
                .nth(1)
                .and_then(|word| word.parse().ok());
            match seconds {
                Some(0.0..MOST_SECONDS) => {}
                _ => return Err(format!("too late: {line}")),
            }
        }
    }
    each(runs, |_| Ok(()))
}

/// As above; what a boot leaves behind is what the first one left.
fn restarts_are_clean(runs: &[Transcript]) -> Verdict {
    every_boot_is_content(runs)?;
    for run in runs {
        for key in ["free_pages", "vmids_in_use"] {
            let left: Vec<_> = run.rows.iter().map(|row| row.values.get(key)).collect();
            if left
                .iter()
                .any(|value| value.is_none() || *value != left[0])
            {
                return Err(format!("{key} after each boot: {left:?}"));
            }
        }
    }
    Ok(())
}

/// As [`every_boot_is_content`]; every page that the guest wrote was reported, by the engine that was asked for where it could.
fn nothing_noticed(runs: &[Transcript]) -> Verdict {
    every_boot_is_content(runs)?;
    each(runs, |row| {
        same(row, "pages_lost", 0.0)?;
        if value(row, "calls_replaced")? >= value(row, "epochs")? {
            return Err("every epoch was ended by another engine".into());
        }
        for key in [
            "epochs",
            "rounds",
            "blocks_split",
            "young",
            "pages_reported",
        ] {
            if value(row, key)? == 0.0 {
                return Err(format!("{key} is 0: nothing was done beneath the guest"));
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::every_boot_is_content;
    use crate::uart::{Transcript, parse};

    fn run(said: &[&str]) -> Transcript {
        let row = r#"{"vellum":"row","suite":"linux","case":"boot","params":{},"timing":"wall","values":{"run_ns":1}}"#;
        let mut run = Transcript::default();
        said.iter().for_each(|line| run.add(parse(line)));
        run.add(parse(row));
        run
    }

    #[test]
    fn a_boot_that_says_nothing_or_complains_is_none() {
        let after = "[1 cpu1 INFO guest] vellum-test: boot 1: userspace after 5.25 s";
        let late = "[1 cpu1 INFO guest] vellum-test: boot 1: userspace after 61.00 s";
        let ok = "[1 cpu1 INFO guest] vellum-test: ok";
        assert!(every_boot_is_content(&[run(&[after, ok])]).is_ok());
        assert!(every_boot_is_content(&[run(&[late, ok])]).is_err());
        assert!(every_boot_is_content(&[run(&[after])]).is_err());
        let complaint =
            "[1 cpu1 INFO guest] vellum-test: FAILED: the timer of CPU 2 stood still at 7";
        let verdict = every_boot_is_content(&[run(&[after, complaint])]);
        assert!(verdict.is_err_and(|why| why.contains("CPU 2 stood still")));
        assert!(every_boot_is_content(&[Transcript::default()]).is_err());
    }
}
