//! What a measurement is asked to vary, checked before anything starts, and its translation to boot arguments.

use std::str::FromStr;

use anyhow::{Result, bail};

use super::aging::Aging;
use crate::board::Board;
use crate::clock;
use crate::machine::{Machine, Timing};

/// Options that describe what is measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Options {
    /// Numbers of vCPUs [default: 1,2,4,8]
    #[arg(long, value_delimiter = ',', value_name = "N,..", value_parser = clap::value_parser!(u32).range(1..=127))]
    pub(crate) vcpus: Vec<u32>,
    /// Locking modes of the MMU: mutex, rwlock, lockless [default: all]
    #[arg(long, value_delimiter = ',', value_name = "MODE,..")]
    pub(crate) locking: Vec<Locking>,
    /// Guest memory that each vCPU writes [default: 16; under timing parallel 2]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(2..))]
    pub(crate) mib_per_vcpu: Option<u64>,
    /// Pages of that which each vCPU goes over in suites dirty, split, protect and age [default: all; under timing parallel 64, in suite age 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) pages: Option<u32>,
    /// Rounds of write, get, clear [default: 5; under timing parallel 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) iterations: Option<u32>,
    /// Of 100 accesses, how many write; the others read
    #[arg(long, default_value_t = 100, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(0..=100))]
    pub(crate) write_percent: u32,
    /// Visit the pages in random order
    #[arg(long)]
    pub(crate) random: bool,
    /// Seed of everything random
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u32,
    /// Distance between accesses: 4k, 2m
    #[arg(long, default_value = "4k", value_parser = ["4k", "2m"], value_name = "SIZE")]
    pub(crate) stride: String,
    /// Largest leaf that maps guest memory: 4k, 2m, 1g; suite protect measures each named, the others take the first
    /// [default: 4k; suite split: 2m; suite protect: 4k and 2m]
    #[arg(long, value_delimiter = ',', value_parser = ["4k", "2m", "1g"], value_name = "SIZE,..")]
    pub(crate) backing: Vec<String>,
    /// Enable logging with every page reported dirty, so that enabling protects nothing
    #[arg(long)]
    pub(crate) initially_all_set: bool,
    /// Where a write fault takes its IPA from: at (walk stage 1 again), trust (HPFAR_EL2)
    #[arg(long, value_parser = ["at", "trust"], value_name = "HOW")]
    pub(crate) hpfar: Option<String>,
    /// What exits do against attacks on branch predictors: auto (what the CPU needs), on, off [default: auto; suite fault: off;
    /// suite exit: off and on]
    #[arg(long, value_delimiter = ',', value_parser = ["auto", "on", "off"], value_name = "WHAT,..")]
    pub(crate) mitigations: Vec<String>,
    /// Sizes of the slots of suite get
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1024,16384",
        value_name = "MIB,.."
    )]
    pub(crate) slot_mib: Vec<u64>,
    /// Memory that is mapped in suite protect [default: 256, 1024; with --full 4096 too]
    #[arg(long, value_delimiter = ',', value_name = "MIB,..", value_parser = clap::value_parser!(u64).range(2..))]
    pub(crate) mib: Vec<u64>,
    /// insn: nanoseconds are instructions, CPUs take turns; parallel: nanoseconds are instructions, all CPUs advance together; wall:
    /// CPUs run at the same time [default: insn, wall]
    #[arg(long, value_delimiter = ',', value_name = "TIMING,..")]
    pub(crate) timing: Vec<Timing>,
    /// CPU model
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu: Option<String>,
    /// GIC version: 2 or 3
    #[arg(long, value_name = "N")]
    pub(crate) gic: Option<u32>,
    /// RAM of the machine [default: what the guest needs]
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// When blocks are split: fault-empty, fault, enable, clear; suite split compares all, the others take the first [default
    /// there: fault]
    #[arg(long, value_delimiter = ',', value_parser = ["fault-empty", "fault", "enable", "clear"], value_name = "POLICY,..")]
    pub(crate) splitting: Vec<String>,
    /// Break-before-make levels: auto (what the CPU has), 0, 2 [default: auto; suite split: 2 and 0]
    #[arg(long, value_delimiter = ',', value_parser = ["auto", "0", "2"], value_name = "LEVEL,..")]
    pub(crate) bbm: Vec<String>,
    /// Level 0: blocks broken under one pair of invalidations, 1 to 64; 1 is what KVM does [default: 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) bbm_batch: Option<u32>,
    /// Memory that is split between two pauses: 2m, 1g [default: 1g]
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    pub(crate) chunk: Option<String>,
    /// Microseconds to pause between chunks [default: 0]
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(crate) pause: Option<u32>,
    /// Use level 2 on a CPU without it, to see what happens
    #[arg(long)]
    pub(crate) unsafe_bbm: bool,
    /// Engines that protect all memory at once: walk, lazy, swap, pie, auto (the best that the CPU can) [default: walk; suites
    /// protect and checkpoint: all that the CPU can]
    #[arg(long, value_delimiter = ',', value_parser = ["walk", "lazy", "swap", "pie", "auto"], value_name = "ENGINE,..")]
    pub(crate) engine: Vec<String>,
    /// How writes are noticed: fault, dbm (the CPU's dirty state, with engine walk) [default: fault; suites protect and
    /// checkpoint: all that the CPU can]
    #[arg(long, value_delimiter = ',', value_parser = ["fault", "dbm"], value_name = "HOW,..")]
    pub(crate) tracking: Vec<String>,
    /// Epochs of suite checkpoint for each length, at least
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) epochs: u32,
    /// Lengths of an epoch in suite checkpoint, in microseconds
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,100000", value_name = "US,..", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(crate) epoch_us: Vec<u32>,
    /// Rounds of each mode of suite ipi [default: 100000; under timing parallel 50]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) rounds: Option<u32>,
    /// What those do who receive interrupts in suite ipi: sleeping, running
    #[arg(long, default_value = "sleeping", value_parser = ["sleeping", "running"], value_name = "HOW")]
    pub(crate) receivers: String,
    /// The sizes of the published measurements: 1 to 64 vCPUs; suite protect: up to 4 GiB
    #[arg(long)]
    pub(crate) full: bool,
    #[command(flatten)]
    pub(crate) aging: Aging,
    #[command(flatten)]
    pub(crate) clock: clock::Pace,
}

/// A locking mode by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Locking {
    Mutex,
    Rwlock,
    Lockless,
}

impl Locking {
    pub(crate) const ALL: [Self; 3] = [Self::Mutex, Self::Rwlock, Self::Lockless];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mutex => "mutex",
            Self::Rwlock => "rwlock",
            Self::Lockless => "lockless",
        }
    }
}

impl FromStr for Locking {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|mode| mode.name() == name)
            .ok_or_else(|| format!("known modes: {}", known()))
    }
}

/// A size that a block can have.
fn block_size(name: &str) -> Result<String, String> {
    match name {
        "2m" | "1g" => Ok(name.to_owned()),
        _ => Err("not a block size; those are 2m, 1g".to_owned()),
    }
}

impl Options {
    pub(crate) fn vcpus(&self) -> Vec<u32> {
        let default: &[u32] = if self.full {
            &[1, 2, 4, 8, 16, 32, 64]
        } else {
            &[1, 2, 4, 8]
        };
        if self.vcpus.is_empty() {
            default.to_vec()
        } else {
            self.vcpus.clone()
        }
    }

    pub(crate) fn locking(&self) -> Vec<Locking> {
        if self.locking.is_empty() {
            Locking::ALL.to_vec()
        } else {
            self.locking.clone()
        }
    }

    /// Guest memory of each vCPU: the parallel clock has no noise to be averaged away, and every CPU's work is done in turn.
    pub(crate) fn mib_per_vcpu(&self, timing: Timing) -> u64 {
        let few = timing == Timing::Parallel && !self.full;
        self.mib_per_vcpu.unwrap_or(if few { 2 } else { 16 })
    }

    fn iterations(&self, timing: Timing) -> u32 {
        let few = timing == Timing::Parallel && !self.full;
        self.iterations.unwrap_or(if few { 1 } else { 5 })
    }

    /// Rounds of suite ipi.
    pub(crate) fn rounds(&self, timing: Timing) -> u32 {
        let few = timing == Timing::Parallel && !self.full;
        self.rounds.unwrap_or(if few { 50 } else { 100_000 })
    }

    fn pages(&self, timing: Timing) -> Option<u32> {
        let few = timing == Timing::Parallel && !self.full && self.mib_per_vcpu.is_none();
        self.pages.or(few.then_some(64))
    }

    /// The largest leaf, for suites that measure one.
    fn backing(&self) -> &str {
        self.backing.first().map_or("4k", String::as_str)
    }

    pub(crate) fn timing(&self) -> Vec<Timing> {
        if self.timing.is_empty() {
            vec![Timing::Insn, Timing::Wall]
        } else {
            self.timing.clone()
        }
    }

    /// A machine with one CPU for each of `vcpus` and one for the controller, and RAM for the guest's memory twice over
    /// (a copy of it is compared in some suites).
    pub(crate) fn machine(
        &self,
        board: &Board,
        vcpus: u32,
        guest_mib: u64,
        timing: Timing,
    ) -> Result<Machine> {
        let mut machine = Machine::of(board);
        machine
            .cpu
            .clone_from(self.cpu.as_ref().unwrap_or(&board.machine.cpu));
        machine.gic = self.gic.unwrap_or(machine.gic);
        machine.cpus = vcpus + 1;
        machine.memory_mib = self
            .memory
            .unwrap_or(256 + 2 * guest_mib.next_power_of_two());
        machine.timing = timing;
        machine.clock = self.clock.settings();
        let smallest = Machine {
            cpus: 1,
            ..machine.clone()
        };
        board.accept(&smallest)?;
        if let Err(error) = board.accept(&machine) {
            bail!("{vcpus} vCPUs and the controller: {error}; ask for fewer --vcpus");
        }
        Ok(machine)
    }

    /// Boot arguments for `suite`.
    pub(crate) fn append(&self, suite: &str, vcpus: &[u32], timing: Timing) -> String {
        let vcpus: Vec<String> = vcpus.iter().map(u32::to_string).collect();
        let order = if self.random { "random" } else { "sequential" };
        let mut words = vec![
            format!("suite={suite} timing={}", timing.name()),
            format!(
                "vcpus={} locking={}",
                vcpus.join(","),
                self.locking()
                    .iter()
                    .map(|mode| mode.name())
                    .collect::<Vec<_>>()
                    .join(",")
            ),
            format!(
                "mib={} iterations={}",
                self.mib_per_vcpu(timing),
                self.iterations(timing)
            ),
            format!(
                "write-percent={} order={order} seed={}",
                self.write_percent, self.seed
            ),
            format!("stride={} backing={}", self.stride, self.backing()),
            format!("initially-all-set={}", u8::from(self.initially_all_set)),
        ];
        words.extend(self.pages(timing).map(|pages| format!("pages={pages}")));
        words.extend(self.hpfar.iter().map(|source| format!("hpfar={source}")));
        let mitigations = self.mitigations.first();
        words.extend(mitigations.map(|what| format!("mitigations={what}")));
        let lists = [
            ("splitting", &self.splitting),
            ("bbm", &self.bbm),
            ("engine", &self.engine),
            ("tracking", &self.tracking),
        ];
        for (key, list) in lists {
            words.extend((!list.is_empty()).then(|| format!("{key}={}", list.join(","))));
        }
        words.extend(self.bbm_batch.map(|batch| format!("bbm-batch={batch}")));
        words.extend(self.chunk.iter().map(|chunk| format!("chunk={chunk}")));
        words.extend(self.pause.map(|pause| format!("pause-us={pause}")));
        words.extend(self.unsafe_bbm.then(|| "unsafe-bbm=1".to_owned()));
        words.join(" ")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{Locking, Options};
    use crate::board::Board;
    use crate::machine::Timing;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    /// Options as a command line gives them.
    pub(crate) fn options(words: &[&str]) -> Result<Options, String> {
        let line = Line::try_parse_from(["bench"].iter().chain(words));
        line.map(|line| line.options)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_measure_every_mode_with_one_to_eight_vcpus() {
        let options = options(&[]).expect("no options");
        assert_eq!(options.vcpus(), [1, 2, 4, 8]);
        assert_eq!(options.locking(), Locking::ALL);
        assert_eq!(options.timing(), [Timing::Insn, Timing::Wall]);
    }

    #[test]
    fn what_is_asked_for_reaches_the_boot_arguments() {
        let words = [
            "--locking",
            "rwlock,mutex",
            "--random",
            "--seed",
            "7",
            "--stride",
            "2m",
            "--hpfar",
            "trust",
            "--splitting",
            "enable,clear",
            "--bbm",
            "0",
            "--bbm-batch",
            "4",
            "--chunk",
            "2m",
            "--pause",
            "20",
            "--unsafe-bbm",
            "--backing",
            "2m,4k",
            "--engine",
            "swap,auto",
            "--tracking",
            "dbm",
            "--mitigations",
            "on,off",
        ];
        let options = options(&words).expect("good options");
        let append = options.append("dirty", &[1, 2], Timing::Insn);
        let expected = "suite=dirty timing=insn vcpus=1,2 locking=rwlock,mutex mib=16 iterations=5 write-percent=100 \
                        order=random seed=7 stride=2m backing=2m initially-all-set=0 hpfar=trust mitigations=on \
                        splitting=enable,clear bbm=0 engine=swap,auto tracking=dbm bbm-batch=4 chunk=2m pause-us=20 unsafe-bbm=1";
        assert_eq!(append, expected);
    }

    #[test]
    fn wrong_names_and_numbers_are_refused() {
        let wrong: [&[&str]; 20] = [
            &["--locking", "ticket"],
            &["--vcpus", "0"],
            &["--vcpus", "two"],
            &["--write-percent", "101"],
            &["--iterations", "0"],
            &["--stride", "8k"],
            &["--timing", "sundial"],
            &["--hpfar", "maybe"],
            &["--mitigations", "some"],
            &["--splitting", "eager"],
            &["--bbm", "1"],
            &["--bbm-batch", "65"],
            &["--chunk", "3m"],
            &["--engine", "steam"],
            &["--tracking", "ring"],
            &["--mib", "1"],
            &["--epochs", "0"],
            &["--epoch-us", "0"],
            &["--rounds", "0"],
            &["--receivers", "gone"],
        ];
        for words in wrong {
            assert!(options(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn a_machine_has_a_cpu_more_than_vcpus_and_is_refused_when_the_gic_has_too_few() {
        let board = Board::qemu_virt().expect("the board file is read");
        let options = options(&["--gic", "2"]).expect("good options");
        let machine = options
            .machine(&board, 7, 112, Timing::Wall)
            .expect("it fits");
        assert_eq!((machine.cpus, machine.memory_mib), (8, 512));
        let error = options
            .machine(&board, 8, 128, Timing::Wall)
            .expect_err("nine CPUs");
        assert!(error.to_string().contains("GICv2 has 1 to 8"), "{error}");
    }
}
