//! What to run, from the boot arguments: `key=value` words, every one of them checked before anything is launched.

use alloc::string::{String, ToString};
use alloc::{format, vec::Vec};

use crate::arch::mitigations::Setting;
use crate::mmu::bbm::MOST_BATCH;
use crate::mmu::{AccessFlag, Bbm, Engine, Hardware, Level, Locking, Policy, Precision, Tracking};

use super::words::{list, name_of, named, number};

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Suite {
    /// Say what the machine is, and end.
    None,
    /// The phases of dirty logging.
    Dirty,
    /// Whether every write is reported.
    Verify,
    /// What a guest finds.
    Selftest,
    /// The cost of `get` on a large slot.
    Get,
    /// How long the exclusive side of the MMU lock is waited for among faulting vCPUs.
    Starve,
    /// Splitting blocks, eagerly and by faults, and collapsing them.
    Split,
    /// Whether anything is lost while splits, clears and collapses loop.
    Churn,
    /// Protecting everything at once, and what it costs afterwards.
    Protect,
    /// Epoch after epoch while the guest runs: how much slower it is.
    Checkpoint,
    /// Whether epoch after epoch reports what was written in it.
    Epochs,
    /// Marking memory idle, and what it costs those who use it.
    Age,
    /// Which memory is hot while a guest runs a pattern that is known.
    Heat,
    /// Whether anything is lost while aging, splits, collapses and epochs loop.
    Ages,
    /// What VMs get of CPUs that they share.
    Share,
    /// A vCPU moves between CPUs in the middle of its timer's interrupt.
    Moves,
    /// VMs come and go.
    Lives,
    /// Interrupts between all vCPUs, as many as they can send.
    Storm,
    /// What exits of each kind cost.
    Exit,
    /// The kernel's IPI benchmark.
    Ipi,
    /// An unmodified Linux kernel.
    Linux,
    /// What vCPUs do by themselves, beside others.
    Private,
    /// What moves between CPUs: one word, leaves and words of the bitmap, and what a harvest costs those who write.
    Lines,
}

/// Which of several ways is used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Choice<T> {
    /// What the machine is trusted with, or the best it can do.
    Auto,
    /// This one.
    Fixed(T),
}

/// Which clock the run is under; only the caller knows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Timing {
    /// Virtual nanoseconds are instructions.
    Insn,
    /// Real concurrency, host time.
    Wall,
    /// Virtual nanoseconds are instructions, and all CPUs advance together.
    Parallel,
    /// A board's own clock.
    Hw,
}

/// Everything a run can be told.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// What is measured, one after the other.
    pub suites: Vec<Suite>,
    /// vCPU counts, each measured on its own.
    pub vcpus: Vec<usize>,
    /// Locking modes, each measured on its own.
    pub locking: Vec<Locking>,
    /// Memory per vCPU, in MiB.
    pub mib: u64,
    /// Pages of that which each vCPU goes over in suite `dirty`, from its region's start.
    pub pages: u64,
    /// Passes while logging.
    pub iterations: u64,
    /// Percent of the steps that store.
    pub write_percent: u64,
    /// Whether steps are in random order.
    pub random: bool,
    /// Seed of random orders and choices.
    pub seed: u64,
    /// Bytes from one step to the next.
    pub stride: u64,
    /// The largest leaf that guest memory is mapped with.
    pub backing: Level,
    /// Whether enabling protects nothing and reports everything once.
    pub initially_all_set: bool,
    /// Which clock.
    pub timing: Timing,
    /// What exits do against attacks on branch predictors.
    pub mitigations: Setting,
    /// Whether HPFAR_EL2 is believed on permission faults.
    pub trust_hpfar: bool,
    /// Sizes of the logged memory of suites `get` and `protect`, in MiB.
    pub slot_mib: Vec<u64>,
    /// Rounds of suites that loop while vCPUs run.
    pub rounds: u64,
    /// Suite `exit`: how often each kind is done, at most.
    pub runs: u64,
    /// Suite `share`: what the vCPUs of each VM weigh.
    pub weights: Vec<u32>,
    /// Suite `storm`: how often each vCPU's timer ticks in a second.
    pub tick_hz: u64,
    /// Suite `share`: milliseconds that are counted.
    pub run_ms: u64,
    /// Suite `share`: the last VM floods its console, which is as slow as a UART of so many baud; 0: it computes.
    pub flood_baud: u64,
    /// Suite `share`: the vCPUs of the last VM interrupt each other without end; otherwise they compute.
    pub flood_sgis: bool,
    /// Policies of splitting; suites that do not compare them take the first.
    pub splitting: Vec<Policy>,
    /// Break-before-make levels; suites that do not compare them take the first.
    pub bbm: Vec<Choice<Bbm>>,
    /// Blocks broken under one pair of invalidations.
    pub bbm_batch: usize,
    /// Bytes split between pauses.
    pub chunk: Level,
    /// Length of a pause.
    pub pause_us: u64,
    /// Level 2 is used on a CPU that does not have it, too.
    pub unsafe_bbm: bool,
    /// How long suites run that run for a time.
    pub seconds: u64,
    /// Engines that protect everything; suites that do not compare them take the first.
    pub engine: Vec<Choice<Engine>>,
    /// How writes are noticed; suites that do not compare it take the first.
    pub tracking: Vec<Tracking>,
    /// Consecutive epochs.
    pub epochs: u64,
    /// Lengths of an epoch.
    pub epoch_us: Vec<u64>,
    /// Who sets access flags.
    pub access_flag: Choice<AccessFlag>,
    /// Whether a pass of aging ends with an invalidation. Imprecise passes are measured beside precise ones.
    pub precision: Precision,
    /// From the beginning of one pass in the background to that of the next.
    pub period_us: u64,
    /// Percent of the controller's time that passes in the background may take.
    pub budget: u64,
    /// Passes in the background.
    pub passes: u64,
    /// What the guest of suite `heat` does.
    pub pattern: Pattern,
    /// Whether those who receive IPIs in suite `ipi` sleep or run in a loop.
    pub receivers: Receivers,
    /// What suite `linux` alone is told.
    pub linux: Linux,
}

/// What a vCPU does that waits for interrupts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Receivers {
    /// WFI.
    Sleeping,
    /// A loop.
    Running,
}

/// How a kernel is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Linux {
    /// Its memory, in MiB.
    pub guest_mib: u64,
    /// Its console.
    pub console: Console,
    /// Boots after which it must switch itself off; 0 for any number.
    pub boots: u64,
    /// Whether its memory is logged, split, protected and aged in loops meanwhile.
    pub beneath: bool,
}

/// Where a guest's console is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Console {
    /// In the log, line by line; it has no input.
    Log,
    /// On the machine's UART, byte by byte, both ways.
    Raw,
}

/// How much of its memory a guest uses all the time, and how much now and then; percent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Pattern {
    /// All the time.
    pub hot: u64,
    /// Now and then.
    pub warm: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            suites: Vec::from([Suite::None]),
            vcpus: Vec::from([1]),
            locking: Vec::from([Locking::Lockless]),
            mib: 16,
            pages: u64::MAX,
            iterations: 2,
            write_percent: 100,
            random: false,
            seed: 1,
            stride: 4096,
            backing: Level::L3,
            initially_all_set: false,
            timing: Timing::Wall,
            mitigations: Setting::Auto,
            trust_hpfar: false,
            slot_mib: Vec::from([1024]),
            rounds: 16,
            runs: 4096,
            weights: Vec::from([100, 300]),
            run_ms: 2000,
            flood_baud: 0,
            flood_sgis: false,
            tick_hz: 1000,
            splitting: Vec::from([Policy::Fault]),
            bbm: Vec::from([Choice::Auto]),
            bbm_batch: 16,
            chunk: Level::L1,
            pause_us: 0,
            unsafe_bbm: false,
            seconds: 5,
            engine: Vec::from([Choice::Fixed(Engine::Walk)]),
            tracking: Vec::from([Tracking::Fault]),
            epochs: 100,
            epoch_us: Vec::from([1_000, 10_000, 100_000]),
            access_flag: Choice::Auto,
            precision: Precision::Precise,
            period_us: 10_000,
            budget: 100,
            passes: 16,
            pattern: Pattern { hot: 10, warm: 20 },
            receivers: Receivers::Sleeping,
            linux: Linux {
                guest_mib: 256,
                console: Console::Log,
                boots: 0,
                beneath: false,
            },
        }
    }
}

const SIZES: [(&str, u64, Level); 3] = [
    ("4k", 4 << 10, Level::L3),
    ("2m", 2 << 20, Level::L2),
    ("1g", 1 << 30, Level::L1),
];
const SUITES: [(&str, Suite); 23] = [
    ("none", Suite::None),
    ("dirty", Suite::Dirty),
    ("verify", Suite::Verify),
    ("selftest", Suite::Selftest),
    ("get", Suite::Get),
    ("starve", Suite::Starve),
    ("split", Suite::Split),
    ("churn", Suite::Churn),
    ("protect", Suite::Protect),
    ("checkpoint", Suite::Checkpoint),
    ("epochs", Suite::Epochs),
    ("age", Suite::Age),
    ("heat", Suite::Heat),
    ("ages", Suite::Ages),
    ("exit", Suite::Exit),
    ("ipi", Suite::Ipi),
    ("share", Suite::Share),
    ("moves", Suite::Moves),
    ("storm", Suite::Storm),
    ("lives", Suite::Lives),
    ("linux", Suite::Linux),
    ("private", Suite::Private),
    ("lines", Suite::Lines),
];
const TIMINGS: [(&str, Timing); 4] = [
    ("insn", Timing::Insn),
    ("wall", Timing::Wall),
    ("parallel", Timing::Parallel),
    ("hw", Timing::Hw),
];
const LOCKINGS: [(&str, Locking); 3] = [
    ("mutex", Locking::Mutex),
    ("rwlock", Locking::Rwlock),
    ("lockless", Locking::Lockless),
];
const POLICIES: [(&str, Policy); 4] = [
    ("fault", Policy::Fault),
    ("fault-empty", Policy::FaultEmpty),
    ("enable", Policy::Enable),
    ("clear", Policy::Clear),
];
const BBMS: [(&str, Choice<Bbm>); 3] = [
    ("auto", Choice::Auto),
    ("0", Choice::Fixed(Bbm::Zero)),
    ("2", Choice::Fixed(Bbm::Two)),
];
const ENGINES: [(&str, Choice<Engine>); 5] = [
    ("auto", Choice::Auto),
    ("walk", Choice::Fixed(Engine::Walk)),
    ("lazy", Choice::Fixed(Engine::Lazy)),
    ("swap", Choice::Fixed(Engine::Swap)),
    ("pie", Choice::Fixed(Engine::Pie)),
];
const TRACKINGS: [(&str, Tracking); 2] = [("fault", Tracking::Fault), ("dbm", Tracking::Dbm)];
const ACCESS_FLAGS: [(&str, Choice<AccessFlag>); 3] = [
    ("auto", Choice::Auto),
    ("hardware", Choice::Fixed(AccessFlag::Hardware)),
    ("software", Choice::Fixed(AccessFlag::Software)),
];
const PRECISIONS: [(&str, Precision); 2] = [
    ("precise", Precision::Precise),
    ("imprecise", Precision::Imprecise),
];
const RECEIVERS: [(&str, Receivers); 2] = [
    ("sleeping", Receivers::Sleeping),
    ("running", Receivers::Running),
];
const CONSOLES: [(&str, Console); 2] = [("log", Console::Log), ("raw", Console::Raw)];
const ORDERS: [(&str, bool); 2] = [("sequential", false), ("random", true)];
const BITS: [(&str, bool); 2] = [("0", false), ("1", true)];
const SOURCES: [(&str, bool); 2] = [("at", false), ("trust", true)];

impl Params {
    /// Reads the boot arguments. Words without `=` belong to others and are ignored.
    ///
    /// # Errors
    ///
    /// The word and what is wrong with it.
    pub fn parse(arguments: &str) -> Result<Self, String> {
        let mut params = Self::default();
        for word in arguments.split_whitespace() {
            if let Some((key, value)) = word.split_once('=') {
                params.set(key, value)?;
            }
        }
        Ok(params)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "suite" => self.suites = list(value, |word| named(key, word, &SUITES))?,
            "vcpus" => self.vcpus = list(value, |word| number(key, word, 1, 1024))?,
            "locking" => self.locking = list(value, |word| named(key, word, &LOCKINGS))?,
            "mib" => self.mib = number(key, value, 1, 1 << 20)?,
            "pages" => self.pages = number(key, value, 1, 1 << 20)?,
            "iterations" => self.iterations = number(key, value, 1, 1 << 20)?,
            "write-percent" => self.write_percent = number(key, value, 0, 100)?,
            "order" => self.random = named(key, value, &ORDERS)?,
            "seed" => self.seed = number(key, value, 0, u64::from(u32::MAX))?,
            "stride" => self.stride = size(key, value)?.0,
            "backing" => self.backing = size(key, value)?.1,
            "initially-all-set" => self.initially_all_set = named(key, value, &BITS)?,
            "timing" => self.timing = named(key, value, &TIMINGS)?,
            "mitigations" => self.mitigations = named(key, value, &Setting::ALL)?,
            "hpfar" => self.trust_hpfar = named(key, value, &SOURCES)?,
            "slot-mib" => self.slot_mib = list(value, |word| number(key, word, 2, 1 << 24))?,
            "runs" => self.runs = number(key, value, 8, 4096)?,
            "rounds" => self.rounds = number(key, value, 1, 1 << 20)?,
            "splitting" => self.splitting = list(value, |word| named(key, word, &POLICIES))?,
            "bbm" => self.bbm = list(value, |word| named(key, word, &BBMS))?,
            "bbm-batch" => self.bbm_batch = number(key, value, 1, MOST_BATCH)?,
            "chunk" => self.chunk = block(key, value)?,
            "pause-us" => self.pause_us = number(key, value, 0, 1_000_000)?,
            "unsafe-bbm" => self.unsafe_bbm = named(key, value, &BITS)?,
            "seconds" => self.seconds = number(key, value, 1, 3600)?,
            "engine" => self.engine = list(value, |word| named(key, word, &ENGINES))?,
            "tracking" => self.tracking = list(value, |word| named(key, word, &TRACKINGS))?,
            "epochs" => self.epochs = number(key, value, 1, 1 << 20)?,
            "epoch-us" => self.epoch_us = list(value, |word| number(key, word, 1, 10_000_000))?,
            "access-flag" => self.access_flag = named(key, value, &ACCESS_FLAGS)?,
            "precision" => self.precision = named(key, value, &PRECISIONS)?,
            "period-us" => self.period_us = number(key, value, 1, 3_600_000_000)?,
            "budget" => self.budget = number(key, value, 1, 100)?,
            "passes" => self.passes = number(key, value, 1, 1 << 20)?,
            "weights" => self.weights = list(value, |word| number(key, word, 1, 1000))?,
            "tick-hz" => self.tick_hz = number(key, value, 1, 100_000)?,
            "flood-sgis" => self.flood_sgis = named(key, value, &BITS)?,
            "flood-baud" => self.flood_baud = number(key, value, 300, 10_000_000)?,
            "run-ms" => self.run_ms = number(key, value, 1, 100_000)?,
            "pattern" => self.pattern = pattern(key, value)?,
            "receivers" => self.receivers = named(key, value, &RECEIVERS)?,
            "guest-mib" => self.linux.guest_mib = number(key, value, 2, 1 << 20)?,
            "console" => self.linux.console = named(key, value, &CONSOLES)?,
            "boots" => self.linux.boots = number(key, value, 0, 1 << 20)?,
            "beneath" => self.linux.beneath = named(key, value, &BITS)?,
            _ => return Err(format!("boot argument '{key}={value}': no key '{key}'")),
        }
        Ok(())
    }

    /// The break-before-make levels asked for, on a machine whose CPUs all have level `found` of FEAT_BBM and that is trusted
    /// with `auto`.
    ///
    /// # Errors
    ///
    /// Level 2 where the CPUs do not have it, unless that is what is wanted.
    pub fn bbm_levels(&self, found: u32, auto: Bbm) -> Result<Vec<Bbm>, String> {
        let level = |choice: &Choice<Bbm>| match *choice {
            Choice::Auto => Ok(auto),
            Choice::Fixed(Bbm::Two) if found < 2 && !self.unsafe_bbm => Err(format!(
                "boot argument 'bbm=2': the CPU has level {found} of FEAT_BBM only; unsafe-bbm=1 would show what happens"
            )),
            Choice::Fixed(level) => Ok(level),
        };
        self.bbm.iter().map(level).collect()
    }

    /// What is measured one after the other, on a machine with `found` and `auto` as its best engine: every engine with
    /// faults, and engine `walk` with hardware dirty state too where that is asked for.
    ///
    /// # Errors
    ///
    /// An engine or a tracker that the CPUs do not have, or a tracker without the engine it goes with.
    pub fn trackers(
        &self,
        found: Hardware,
        auto: Engine,
    ) -> Result<Vec<(Engine, Tracking)>, String> {
        let mut trackers = Vec::new();
        for &tracking in &self.tracking {
            let mut possible = false;
            for choice in &self.engine {
                let engine = match *choice {
                    Choice::Auto if tracking == Tracking::Dbm => Engine::Walk,
                    Choice::Auto => auto,
                    Choice::Fixed(engine) => engine,
                };
                if engine == Engine::Pie && !found.indirection {
                    return Err(String::from(
                        "boot argument 'engine=pie': the CPU does not have FEAT_S2PIE, permission indirection at stage 2",
                    ));
                }
                if tracking == Tracking::Dbm && engine != Engine::Walk {
                    continue;
                }
                possible = true;
                if !trackers.contains(&(engine, tracking)) {
                    trackers.push((engine, tracking));
                }
            }
            if tracking == Tracking::Dbm && !found.dirty_state {
                return Err(String::from(
                    "boot argument 'tracking=dbm': the CPU does not have FEAT_HAFDBS with dirty state",
                ));
            }
            if !possible {
                return Err(String::from(
                    "boot argument 'tracking=dbm': only engine=walk goes with it",
                ));
            }
        }
        Ok(trackers)
    }

    /// Who sets access flags, on a machine with `found` that is trusted with `auto`.
    ///
    /// # Errors
    ///
    /// Hardware that the CPUs do not have, or software where what is measured needs hardware.
    pub fn access_flags(&self, found: Hardware, auto: AccessFlag) -> Result<AccessFlag, String> {
        match self.access_flag {
            Choice::Auto => Ok(auto),
            Choice::Fixed(AccessFlag::Hardware) if !found.access_flag => Err(String::from(
                "boot argument 'access-flag=hardware': the CPU does not have FEAT_HAFDBS with access flags",
            )),
            Choice::Fixed(AccessFlag::Software) if self.tracking.contains(&Tracking::Dbm) => {
                Err(String::from(
                    "boot argument 'access-flag=software': only access-flag=hardware goes with tracking=dbm",
                ))
            }
            Choice::Fixed(flag) => Ok(flag),
        }
    }
}

impl Receivers {
    /// Their name in results.
    pub fn name(self) -> &'static str {
        name_of(self, &RECEIVERS)
    }
}

/// The name of a precision, as in arguments and results.
pub fn precision_name(precision: Precision) -> &'static str {
    name_of(precision, &PRECISIONS)
}

impl Suite {
    /// Its name in arguments and results.
    pub fn name(self) -> &'static str {
        name_of(self, &SUITES)
    }
}

impl Timing {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        name_of(self, &TIMINGS)
    }
}

/// The name of a leaf size, as in arguments and results.
pub fn size_name(level: Level) -> &'static str {
    SIZES
        .iter()
        .find(|(_, _, size)| *size == level)
        .map_or("", |(name, ..)| name)
}

/// The name of a stride in bytes, as in arguments and results.
pub fn stride_name(bytes: u64) -> String {
    SIZES
        .iter()
        .find(|(_, size, _)| *size == bytes)
        .map_or_else(|| bytes.to_string(), |(name, ..)| (*name).to_string())
}

fn size(key: &str, value: &str) -> Result<(u64, Level), String> {
    named(
        key,
        value,
        &SIZES.map(|(name, bytes, level)| (name, (bytes, level))),
    )
}

fn block(key: &str, value: &str) -> Result<Level, String> {
    let blocks = SIZES.iter().filter(|(_, _, level)| *level != Level::L3);
    let found = blocks.clone().find(|(name, ..)| *name == value);
    found.map(|(_, _, level)| *level).ok_or_else(|| {
        let names: Vec<&str> = blocks.map(|(name, ..)| *name).collect();
        format!(
            "boot argument '{key}={value}': that is not a block size; {key} is one of {}",
            names.join(", ")
        )
    })
}

fn pattern(key: &str, value: &str) -> Result<Pattern, String> {
    let shares = list(value, |word| number(key, word, 0, 100));
    match shares.as_deref() {
        Ok(&[hot, warm]) if hot > 0 && hot + warm <= 100 => Ok(Pattern { hot, warm }),
        _ => Err(format!(
            "boot argument '{key}={value}': {key} is two percentages, hot from 1 and warm from 0, of 100 together at most"
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::{
        ACCESS_FLAGS, Choice, Console, ENGINES, Linux, POLICIES, Params, Pattern, Receivers,
        Setting, Suite, TRACKINGS, Timing, precision_name, size_name, stride_name,
    };
    use crate::mmu::{
        AccessFlag, Bbm, Engine, Hardware, Level, Locking, Policy, Precision, Tracking,
    };

    #[test]
    fn everything_can_be_said() {
        let params = Params::parse(
            "quiet suite=dirty,exit vcpus=1,2,64 locking=mutex,lockless mib=4 pages=64 iterations=3 write-percent=10 order=random \
             seed=9 stride=2m backing=1g initially-all-set=1 timing=insn hpfar=trust slot-mib=16384 rounds=5 runs=64 \
             splitting=clear,fault-empty bbm=auto,2 bbm-batch=64 chunk=2m pause-us=20 unsafe-bbm=1 seconds=60 \
             engine=swap,auto tracking=fault,dbm epochs=10000 epoch-us=500,2000 access-flag=software precision=imprecise \
             period-us=500 budget=5 passes=3 pattern=1,99 receivers=running guest-mib=96 console=raw boots=4 \
             beneath=1 mitigations=off flood-baud=9600 flood-sgis=1",
        )
        .unwrap();
        let expected = Params {
            suites: vec![Suite::Dirty, Suite::Exit],
            vcpus: vec![1, 2, 64],
            locking: vec![Locking::Mutex, Locking::Lockless],
            mib: 4,
            pages: 64,
            iterations: 3,
            write_percent: 10,
            random: true,
            seed: 9,
            stride: 2 << 20,
            backing: Level::L1,
            initially_all_set: true,
            timing: Timing::Insn,
            mitigations: Setting::Off,
            trust_hpfar: true,
            slot_mib: vec![16384],
            rounds: 5,
            runs: 64,
            weights: Vec::from([100, 300]),
            run_ms: 2000,
            flood_baud: 9600,
            flood_sgis: true,
            tick_hz: 1000,
            splitting: vec![Policy::Clear, Policy::FaultEmpty],
            bbm: vec![Choice::Auto, Choice::Fixed(Bbm::Two)],
            bbm_batch: 64,
            chunk: Level::L2,
            pause_us: 20,
            unsafe_bbm: true,
            seconds: 60,
            engine: vec![Choice::Fixed(Engine::Swap), Choice::Auto],
            tracking: vec![Tracking::Fault, Tracking::Dbm],
            epochs: 10_000,
            epoch_us: vec![500, 2000],
            access_flag: Choice::Fixed(AccessFlag::Software),
            precision: Precision::Imprecise,
            period_us: 500,
            budget: 5,
            passes: 3,
            pattern: Pattern { hot: 1, warm: 99 },
            receivers: Receivers::Running,
            linux: Linux {
                guest_mib: 96,
                console: Console::Raw,
                boots: 4,
                beneath: true,
            },
        };
        assert_eq!(params, expected);
        assert_eq!(size_name(params.backing), "1g");
        assert_eq!(stride_name(params.stride), "2m");
        assert_eq!(precision_name(params.precision), "imprecise");
        assert_eq!(params.mitigations.name(), "off");
    }

    #[test]
    fn mitigations_are_known_before_all_else_is_judged() {
        let of = crate::bench::mitigations;
        assert_eq!(
            of("suite=none mitigations=on -- mitigations=off"),
            Setting::On
        );
        assert_eq!(of("suite=none -- mitigations=off"), Setting::Auto);
        assert_eq!(of("mitigations=off suite=sweet"), Setting::Auto);
    }

    #[test]
    fn a_wrong_word_is_named_with_what_would_be_right() {
        for (word, says) in [
            ("suite=sweet", "suite is one of none, dirty"),
            ("locking=ticket", "one of mutex, rwlock, lockless"),
            ("colour=red", "no key 'colour'"),
            ("vcpus=0", "1 to 1024"),
            ("mib=-1", "1 to"),
            ("pages=0", "1 to"),
            ("write-percent=101", "0 to 100"),
            ("mib=99999999999999999999999", "1 to"),
            ("splitting=eager", "fault, fault-empty, enable, clear"),
            ("bbm=1", "auto, 0, 2"),
            ("bbm-batch=65", "1 to 64"),
            ("chunk=3m", "not a block size; chunk is one of 2m, 1g"),
            ("chunk=4k", "not a block size"),
            ("engine=steam", "auto, walk, lazy, swap, pie"),
            ("tracking=ring", "one of fault, dbm"),
            ("mitigations=some", "auto, on, off, firmware"),
            ("epochs=0", "1 to"),
            ("epoch-us=0", "1 to"),
            ("access-flag=firmware", "one of auto, hardware, software"),
            ("precision=rough", "one of precise, imprecise"),
            ("period-us=0", "1 to 3600000000"),
            ("period-us=3600000001", "1 to 3600000000"),
            ("budget=0", "1 to 100"),
            ("budget=101", "1 to 100"),
            ("passes=0", "1 to"),
            ("pattern=10", "two percentages"),
            ("pattern=0,20", "hot from 1"),
            ("pattern=60,50", "of 100 together"),
            ("receivers=gone", "one of sleeping, running"),
            ("guest-mib=1", "2 to"),
            ("console=lines", "one of log, raw"),
            ("beneath=yes", "one of 0, 1"),
        ] {
            let error = Params::parse(word).unwrap_err();
            assert!(error.contains(word) && error.contains(says), "{error}");
        }
        assert!(Params::parse("vcpus=1,,2").is_err());
    }

    #[test]
    fn nothing_said_means_the_defaults() {
        assert_eq!(Params::parse("").unwrap(), Params::default());
    }

    #[test]
    fn level_2_is_refused_on_a_cpu_without_it_unless_that_is_wanted() {
        let levels = |words: &str, found, auto| {
            let params = Params::parse(words).unwrap();
            params.bbm_levels(found, auto)
        };
        assert_eq!(levels("", 2, Bbm::Two), Ok(vec![Bbm::Two]));
        assert_eq!(
            levels("bbm=auto,0,2", 2, Bbm::Zero),
            Ok(vec![Bbm::Zero, Bbm::Zero, Bbm::Two])
        );
        let refused = levels("bbm=0,2", 1, Bbm::Zero).unwrap_err();
        assert!(refused.contains("level 1") && refused.contains("unsafe-bbm"));
        assert_eq!(
            levels("bbm=2 unsafe-bbm=1", 0, Bbm::Zero),
            Ok(vec![Bbm::Two])
        );
    }

    #[test]
    fn engines_and_trackers_are_what_the_machine_has() {
        let trackers = |words: &str, indirection, dirty_state, auto| {
            let params = Params::parse(words).unwrap();
            params.trackers(
                Hardware {
                    access_flag: true,
                    indirection,
                    dirty_state,
                },
                auto,
            )
        };
        let every = trackers(
            "engine=walk,auto tracking=fault,dbm",
            true,
            true,
            Engine::Pie,
        );
        let expected = [
            (Engine::Walk, Tracking::Fault),
            (Engine::Pie, Tracking::Fault),
            (Engine::Walk, Tracking::Dbm),
        ];
        assert_eq!(every.unwrap(), expected);
        for (words, says) in [
            ("engine=pie", "FEAT_S2PIE"),
            ("tracking=dbm", "FEAT_HAFDBS"),
        ] {
            let error = trackers(words, false, false, Engine::Swap).unwrap_err();
            assert!(error.contains(words) && error.contains(says), "{error}");
        }
        let error = trackers("engine=swap tracking=dbm", true, true, Engine::Pie).unwrap_err();
        assert!(error.contains("engine=walk"), "{error}");
    }

    #[test]
    fn access_flags_are_set_by_who_is_there() {
        let flag = |words: &str, access_flag| {
            let found = Hardware {
                access_flag,
                indirection: false,
                dirty_state: access_flag,
            };
            let params = Params::parse(words).unwrap();
            params.access_flags(found, AccessFlag::Software)
        };
        assert_eq!(flag("", true), Ok(AccessFlag::Software));
        assert_eq!(flag("access-flag=hardware", true), Ok(AccessFlag::Hardware));
        let error = flag("access-flag=hardware", false).unwrap_err();
        assert!(error.contains("FEAT_HAFDBS"), "{error}");
        let error = flag("access-flag=software tracking=dbm", true).unwrap_err();
        assert!(error.contains("access-flag=hardware"), "{error}");
    }

    #[test]
    fn names_are_those_of_the_mmu() {
        for (name, choice) in ACCESS_FLAGS {
            let fixed = AccessFlag::from_name(name).map(Choice::Fixed);
            assert_eq!(fixed.unwrap_or(Choice::Auto), choice);
        }
        for (name, policy) in POLICIES {
            assert_eq!(policy.name(), name);
        }
        for (name, choice) in ENGINES {
            let fixed = |engine: Engine| engine.name() == name;
            assert!(
                matches!(choice, Choice::Auto)
                    || matches!(choice, Choice::Fixed(engine) if fixed(engine))
            );
        }
        for (name, tracking) in TRACKINGS {
            assert_eq!(tracking.name(), name);
        }
    }
}
