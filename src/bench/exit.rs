//! Suite `exit`: what an exit of each kind costs, the guest's side included.
//!
//! Most kinds are measured twice: many runs at once, which gives the instructions of a run exactly (its loop adds two), and one
//! by one, which gives the least, the median and the 99th percentile, less the time that reading the counter takes. Kinds
//! that wait for a moment of their own are measured one by one only. What the other CPUs execute counts, too: under `insn`
//! time is the sum of what all CPUs execute. A second VM exists meanwhile.

use alloc::format;
use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::arch;
use crate::guest::abi::{MAX_SAMPLES, measure, op};
use crate::mmu::{AccessFlag, Locking, Precision};
use crate::vm::{Command, Placement};

use super::Refusal;
use super::clock::{Counts, nanoseconds};
use super::cycle::count;
use super::listen::Listening;
use super::params::Timing;
use super::report::{Row, progress};
use super::scene::{Cast, Scene, Stage, cpu};
use super::verify::clear;

/// Runs of a kind, all at once and one by one, unless fewer are asked for.
const RUNS: u64 = if cfg!(debug_assertions) { 512 } else { 4096 };
/// A kind that waits is run once for so many runs of the others.
const WAITING: u64 = 8;
/// How far ahead timers are set.
const TIMER_NS: u64 = 50_000;
/// vCPUs of the VM that is measured, and of the other.
const VCPUS: usize = 4;
/// The vCPU that receives interrupts.
const RECEIVER: u64 = 1;

const GICD: u64 = 0x0800_0000;
const REDISTRIBUTOR: u64 = 0x080a_0000;
const PRIVATE: u64 = 0x080b_0000;
const UART: u64 = 0x0900_0000;

/// Registers that are read: case, name, address, and whether as a double word.
type Access = (&'static str, &'static str, u64, bool);
const ACCESSES_V3: [Access; 8] = [
    ("mmio_vgic", "GICD_IIDR", GICD + 0x8, false),
    ("mmio_vgic", "GICD_ISENABLER1", GICD + 0x104, false),
    ("mmio_vgic", "GICD_IPRIORITYR8", GICD + 0x420, false),
    ("mmio_vgic", "GICR_ISENABLER0", PRIVATE + 0x100, false),
    ("mmio_vgic", "GICR_IPRIORITYR0", PRIVATE + 0x400, false),
    ("mmio_vgic", "GICR_TYPER", REDISTRIBUTOR + 0x8, true),
    ("mmio_device", "UARTFR", UART + 0x18, false),
    ("mmio_device", "UARTIMSC", UART + 0x38, false),
];
const ACCESSES_V2: [Access; 8] = [
    ("mmio_vgic", "GICD_IIDR", GICD + 0x8, false),
    ("mmio_vgic", "GICD_ISENABLER1", GICD + 0x104, false),
    ("mmio_vgic", "GICD_IPRIORITYR8", GICD + 0x420, false),
    ("mmio_vgic", "GICD_ISENABLER0", GICD + 0x100, false),
    ("mmio_vgic", "GICD_IPRIORITYR0", GICD + 0x400, false),
    ("mmio_vgic", "GICD_TYPER", GICD + 0x4, false),
    ("mmio_device", "UARTFR", UART + 0x18, false),
    ("mmio_device", "UARTIMSC", UART + 0x38, false),
];

/// Something that is measured.
#[derive(Clone, Copy)]
struct Kind {
    what: u64,
    argument: u64,
    runs: u64,
    /// Cannot be done many times at once.
    alone: bool,
}

/// What was found.
struct Found {
    kind: Kind,
    ticks_together: u64,
    samples: Vec<u64>,
    /// Events while the samples were taken.
    counts: Vec<(&'static str, u64)>,
    lost: u64,
}

/// Every kind; false when an interrupt was lost.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let cast = stage.cast(Locking::Lockless, VCPUS.min(stage.host.cpus() - 1));
    if cast.vcpus < 2 {
        return Err(format!(
            "suite exit needs 3 CPUs, one of them for the controller; this machine has {}",
            stage.host.cpus()
        ));
    }
    let other = stage.bystander(cast)?;
    let vcpus = cast.vcpus + other.vcpus();
    progress(0, 3, format_args!("exit: calls, devices, interrupts"));
    let mut good = interrupts(stage, cast, vcpus)?;
    progress(1, 3, format_args!("exit: switches"));
    good &= switches(stage, cast, other.vcpus())?;
    progress(2, 3, format_args!("exit: faults"));
    for &locking in &stage.params.locking {
        good &= faults(stage, Cast { locking, ..cast }, vcpus)?;
    }
    other.close();
    Ok(good)
}

impl Kind {
    const fn new(what: u64, argument: u64) -> Self {
        Self {
            what,
            argument,
            runs: RUNS,
            alone: false,
        }
    }

    const fn waiting(what: u64, argument: u64) -> Self {
        Self {
            runs: RUNS / WAITING,
            alone: true,
            ..Self::new(what, argument)
        }
    }

    /// With as many runs as are asked for where those are fewer.
    fn of(self, stage: &Stage<'_>) -> Self {
        let most = stage.params.runs / if self.alone { WAITING } else { 1 };
        Self {
            runs: self.runs.min(most),
            ..self
        }
    }

    fn command(self, single: bool) -> Command {
        Command {
            op: op::MEASURE,
            args: [self.what, self.runs, self.argument, u64::from(single), 0],
        }
    }

    /// Has vCPU 0 do it. `renew` is called before each of the two times.
    fn measure(
        self,
        scene: &Scene,
        renew: impl Fn() -> Result<(), Refusal>,
    ) -> Result<Found, Refusal> {
        renew()?;
        let together = if self.alone {
            [0, 0]
        } else {
            scene.perform_one(0, self.command(false))?.results
        };
        renew()?;
        let before = Counts::now();
        let single = scene.perform_one(0, self.command(true))?.results;
        let mut samples = scene.samples(self.runs.min(MAX_SAMPLES))?;
        samples.sort_unstable();
        Ok(Found {
            kind: self,
            ticks_together: together[0],
            samples,
            counts: before.since().collect(),
            lost: together[1] + single[1],
        })
    }
}

/// What needs no memory of its own.
fn interrupts(stage: &Stage<'_>, cast: Cast, vcpus: usize) -> Result<bool, Refusal> {
    let scene = stage.open(cast)?;
    let none = || Ok(());
    let idle = Kind::new(measure::NOTHING, 0)
        .of(stage)
        .measure(&scene, none)?;
    let empty = idle.least();
    let mut lost = 0;
    let mut tell = |row: Row, found: &Found| {
        lost += found.lost;
        found.told(row, empty, stage.params.timing).print();
    };
    let row = |case: &str| {
        Row::new("exit", case, stage.params.timing.name())
            .param("vms", 2)
            .param("vcpus", vcpus)
    };
    tell(row("nothing"), &idle);
    for (case, what) in [("hypercall", measure::HYPERCALL), ("eoi", measure::EOI)] {
        tell(
            row(case),
            &Kind::new(what, 0).of(stage).measure(&scene, none)?,
        );
    }
    let accesses = if scene.gic_version() == 2 {
        ACCESSES_V2
    } else {
        ACCESSES_V3
    };
    for (case, name, address, wide) in accesses {
        let ways = if wide {
            [
                ("x0", measure::LOAD_WIDE_X0),
                ("x25", measure::LOAD_WIDE_X25),
            ]
        } else {
            [("x0", measure::LOAD_X0), ("x25", measure::LOAD_X25)]
        };
        for (register, what) in ways {
            let found = Kind::new(what, address).of(stage).measure(&scene, none)?;
            tell(
                row(case).word("access", name).word("register", register),
                &found,
            );
        }
    }
    tell(
        row("ipi_self"),
        &Kind::new(measure::IPI, 0).of(stage).measure(&scene, none)?,
    );
    let ticks = arch::counter_hz() / (1_000_000_000 / TIMER_NS);
    for (case, what) in [("timer", measure::TIMER), ("wfi_wake", measure::WAKE)] {
        tell(
            row(case),
            &Kind::waiting(what, ticks).of(stage).measure(&scene, none)?,
        );
    }
    for (case, how) in [
        ("ipi_running", Listening::Running),
        ("ipi_sleeping", Listening::Asleep),
    ] {
        scene.listen(1, how)?;
        let kind = if how == Listening::Asleep {
            Kind::waiting(measure::IPI_AFTER_PAUSE, RECEIVER)
        } else {
            Kind::new(measure::IPI, RECEIVER)
        };
        let found = kind.of(stage).measure(&scene, none)?;
        scene.hear_out(1)?;
        tell(row(case), &found);
    }
    scene.close();
    Ok(lost == 0)
}

/// Two vCPUs of one VM that share a CPU and hand it to each other: one's state is saved and the other's loaded in full, and the
/// CPU's TLB entries of the VM are dropped. One by one, a run is there and back, so each counts as two. False where a vCPU
/// that waits for an event is not noticed to.
fn switches(stage: &Stage<'_>, cast: Cast, others: usize) -> Result<bool, Refusal> {
    const CPU: usize = 1;
    let cast = Cast {
        vcpus: 2,
        placement: Placement::On(CPU),
        ..cast
    };
    let scene = stage.open(cast)?;
    let empty = Kind::new(measure::NOTHING, 0)
        .of(stage)
        .measure(&scene, || Ok(()))?;
    scene.listen(1, Listening::HandingOn)?;
    let kind = Kind::new(measure::HAND_ON, 0).of(stage);
    let before = Counts::now();
    let together = scene.perform_one(0, kind.command(false))?.results[0];
    // A CPU invalidates its own entries when it loads another vCPU of the VM than it held before, and then only.
    let counts: Vec<_> = before.since().collect();
    let switches = count(&counts, "tlbi_local");
    let found = kind.measure(&scene, || Ok(()))?;
    scene.hear_out(1)?;
    scene.close();
    let halves = found.samples.iter();
    let each = Found {
        kind: Kind {
            runs: switches.max(1),
            ..kind
        },
        ticks_together: together,
        samples: halves
            .map(|ticks| ticks.saturating_sub(empty.least()) / 2)
            .collect(),
        counts,
        lost: 0,
    };
    let row = Row::new("exit", "vcpu_switch", stage.params.timing.name())
        .param("vms", 2)
        .param("vcpus", others + cast.vcpus);
    each.told(row, 0, stage.params.timing).print();
    Ok(switches >= kind.runs)
}

/// Write faults of logged memory, and faults of memory that was marked idle.
fn faults(stage: &Stage<'_>, cast: Cast, vcpus: usize) -> Result<bool, Refusal> {
    let cast = Cast {
        access_flag: AccessFlag::Software,
        ..cast
    };
    let scene = stage.open(cast)?;
    let pages = (cast.region_bytes / PAGE_BYTES)
        .min(RUNS)
        .min(stage.params.runs);
    let kind = |what| Kind {
        runs: pages,
        ..Kind::new(what, scene.region(0))
    };
    let store = kind(measure::STORE_PAGES);
    scene.perform_one(0, store.command(false))?;
    let idle = Kind::new(measure::NOTHING, 0)
        .of(stage)
        .measure(&scene, || Ok(()))?;
    let enabled = scene.stage2().enable_logging(cpu(), scene.data, false);
    enabled.map_err(|error| format!("dirty logging: {error}"))?;
    let written = store.measure(&scene, || clear(&scene).map(drop))?;
    let accessed = kind(measure::LOAD_PAGES).measure(&scene, || {
        scene.stage2().age_all(cpu(), Precision::Precise, |_, _| ());
        Ok(())
    })?;
    let mut good = true;
    let cases = [
        ("fault_write", &written, "faults_permission"),
        ("fault_access", &accessed, "faults_access"),
    ];
    for (case, found, event) in cases {
        let row = Row::new("exit", case, stage.params.timing.name())
            .param("vms", 2)
            .param("vcpus", vcpus)
            .word("locking", cast.locking.name())
            .word(
                "hpfar",
                if stage.params.trust_hpfar {
                    "trust"
                } else {
                    "at"
                },
            );
        found.told(row, idle.least(), stage.params.timing).print();
        good &= count(&found.counts, event) >= pages;
    }
    scene.close();
    Ok(good)
}

impl Found {
    fn least(&self) -> u64 {
        self.samples.first().copied().unwrap_or(0)
    }

    /// Adds the figures to `row`; reading the counter takes `empty`.
    fn told(&self, row: Row, empty: u64, timing: Timing) -> Row {
        let at = |place: usize| {
            let ticks = self.samples.get(place).copied().unwrap_or(0);
            nanoseconds(ticks.saturating_sub(self.overhead(empty)))
        };
        let runs = self.kind.runs;
        let last = self.samples.len().saturating_sub(1);
        let total = if self.kind.alone {
            let sum: u64 = self.samples.iter().sum();
            sum.saturating_sub(self.overhead(empty) * runs)
        } else {
            self.ticks_together
        };
        let row = row.value("runs", runs);
        let row = match timing {
            Timing::Insn => row.share("insn", nanoseconds(total), runs),
            Timing::Wall | Timing::Parallel | Timing::Hw => {
                row.share("mean_ns", nanoseconds(total), runs)
            }
        };
        let row = row
            .value("min_ns", at(0))
            .value("median_ns", at(last / 2))
            .value("p99_ns", at(last * 99 / 100))
            .share("exits", count(&self.counts, "exits"), runs)
            .share("kicks", count(&self.counts, "kicks"), runs)
            .value("lost", self.lost);
        if !cfg!(debug_assertions) {
            return row;
        }
        ["register_writes", "list_accesses"]
            .into_iter()
            .fold(row, |row, name| {
                row.share(name, count(&self.counts, name), runs)
            })
    }

    /// Timers are compared with a deadline, which reading the counter twice is no part of.
    fn overhead(&self, empty: u64) -> u64 {
        match self.kind.what {
            measure::TIMER | measure::WAKE | measure::NOTHING => 0,
            _ => empty,
        }
    }
}
