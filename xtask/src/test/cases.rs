//! The table of cases under QEMU: which machine, which boot arguments, and what must come out.

use super::checks::{self, Verdict};
use super::trees::Tree;
use crate::board::Board;
use crate::linux::Series;
use crate::machine::{Machine, Timing};
use crate::uart::Transcript;

/// One case: one or more boots and a judgement over all of them.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) boots: Vec<Boot>,
    pub(super) expect: Expect,
    /// Watchdog of each boot.
    pub(super) seconds: u64,
    /// Nothing else runs meanwhile: host time is compared.
    pub(super) alone: bool,
    /// The debug build of the image.
    pub(super) debug: bool,
    /// Whether the image's hash is printed beside its result.
    pub(super) hashed: bool,
}

/// One boot.
#[derive(Clone, Debug)]
pub(super) struct Boot {
    pub(super) machine: Machine,
    pub(super) append: String,
    /// The kernel that the hypervisor is given.
    pub(super) linux: Option<Series>,
    /// What is typed, each as soon as the guest has written what stands before it.
    pub(super) typed: &'static [(&'static str, &'static str)],
    /// Which device tree QEMU is given.
    pub(super) tree: Tree,
    /// Behind a boot loader that leaves garbage everywhere.
    pub(super) hostile: bool,
}

/// What must come out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect {
    /// Every boot ends with status 0 and this holds of what they said.
    Good(fn(&[Transcript]) -> Verdict),
    /// Every boot ends with one error line that contains these words, and a status that says so.
    Refusal(&'static str),
}

/// All locking modes.
pub(super) const MODES: &str = "locking=mutex,rwlock,lockless";

/// Every case, at full size under `soak`.
pub(super) fn all(board: &Board, soak: bool) -> Vec<Case> {
    let size = if soak {
        Size {
            mib: 16,
            iterations: 5,
            rounds: 64,
            vcpus: 8,
        }
    } else {
        Size {
            mib: 4,
            iterations: 2,
            rounds: 6,
            vcpus: 4,
        }
    };
    let table = Table {
        board,
        size,
        soak,
        seconds: if soak { 1800 } else { 60 },
    };
    let groups = [
        table.machines(),
        table.sizes(),
        table.models(),
        table.patterns(),
        table.figures(),
        table.splitting(),
        table.epochs(),
        table.aging(),
        table.linux(),
        table.exits(),
        table.ways(),
        table.hostile(),
        table.scheduling(),
        table.parallel(),
        table.refusals(),
        table.left_out(),
    ];
    groups.into_iter().flatten().collect()
}

/// How large a run is.
pub(super) struct Size {
    pub(super) mib: u64,
    iterations: u32,
    rounds: u32,
    vcpus: u32,
}

/// What cases are made from.
pub(super) struct Table<'a> {
    board: &'a Board,
    pub(super) size: Size,
    pub(super) soak: bool,
    seconds: u64,
}

impl Table<'_> {
    pub(super) fn machine(&self, change: impl FnOnce(&mut Machine)) -> Machine {
        let mut machine = Machine::of(self.board);
        change(&mut machine);
        machine
    }

    pub(super) fn case(
        &self,
        name: impl Into<String>,
        machine: Machine,
        append: impl Into<String>,
        expect: Expect,
    ) -> Case {
        let boot = Boot {
            machine,
            append: append.into(),
            linux: None,
            typed: &[],
            tree: Tree::Own,
            hostile: false,
        };
        Case {
            name: name.into(),
            boots: vec![boot],
            expect,
            seconds: self.seconds,
            alone: false,
            debug: false,
            hashed: false,
        }
    }

    /// The built-in guest's own checks, on every CPU model with both interrupt controllers.
    fn machines(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for model in &self.board.limits.cpu_models {
            for gic in [3, 2] {
                let machine = self.machine(|machine| {
                    (machine.cpu, machine.gic, machine.cpus) = (model.clone(), gic, 4)
                });
                let name = format!("the guest finds a machine, {model} GICv{gic}");
                cases.push(self.case(
                    name,
                    machine,
                    "suite=selftest vcpus=1,3",
                    Expect::Good(checks::guest_is_content),
                ));
            }
        }
        cases
    }

    /// From the smallest machine to the largest.
    fn sizes(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for (cpus, gic) in [
            (1, 3),
            (1, 2),
            (8, 2),
            (16, 3),
            (123, 3),
            (124, 3),
            (128, 3),
        ] {
            let machine = self.machine(|machine| (machine.cpus, machine.gic) = (cpus, gic));
            let name = format!("{cpus} CPUs boot on GICv{gic}");
            cases.push(self.case(name, machine, "suite=none", Expect::Good(checks::ends)));
        }
        let least = self.machine(|machine| machine.memory_mib = self.board.limits.memory_mib_min);
        cases.push(self.case(
            "the least RAM is enough",
            least,
            "suite=dirty vcpus=1 mib=16 iterations=1",
            Expect::Good(checks::nothing_lost),
        ));
        let many = self.machine(|machine| {
            (machine.cpus, machine.memory_mib, machine.timing) = (65, 1024, Timing::Wall)
        });
        let append = format!("suite=dirty vcpus=64 {MODES} mib=2 iterations=1");
        cases.push(self.case(
            "64 vCPUs complete in every mode",
            many,
            append,
            Expect::Good(checks::every_mode_completes),
        ));
        let many = self.machine(|machine| (machine.cpus, machine.memory_mib) = (65, 1024));
        let append = format!(
            "suite=starve vcpus=64 {MODES} mib=2 rounds={}",
            self.size.rounds
        );
        cases.push(self.case(
            "64 faulting vCPUs do not starve the exclusive side",
            many,
            append,
            Expect::Good(checks::exclusive_gets_its_turn),
        ));
        cases
    }

    /// What the guest wrote is what is reported: exactly with the vCPUs stopped, byte for byte in a copy while they run.
    fn models(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        let size = &self.size;
        for model in &self.board.limits.cpu_models {
            for gic in [3, 2] {
                let vcpus = size.vcpus.min(7);
                let machine = self.machine(|machine| {
                    (machine.cpu, machine.gic, machine.cpus) = (model.clone(), gic, vcpus + 1);
                    machine.memory_mib = 512 + 4 * u64::from(vcpus) * size.mib;
                });
                let append = format!(
                    "suite=verify vcpus={vcpus} {MODES} mib={} iterations={} rounds={}",
                    size.mib, size.iterations, size.rounds
                );
                let name = format!("every write is reported, {model} GICv{gic}");
                cases.push(self.case(
                    name,
                    machine,
                    append,
                    Expect::Good(checks::every_mode_completes),
                ));
            }
        }
        cases
    }

    /// Other ways to write, to map and to log.
    fn patterns(&self) -> Vec<Case> {
        let patterns = [
            ("2 MiB blocks are split where a write hits", "backing=2m"),
            ("1 GiB blocks are split where a write hits", "backing=1g"),
            ("pages are written in random order", "order=random seed=7"),
            ("one page of each 2 MiB is written", "stride=2m backing=2m"),
            (
                "half of the accesses are reads",
                "write-percent=50 order=random",
            ),
            (
                "everything is dirty at first",
                "initially-all-set=1 backing=2m",
            ),
            ("HPFAR_EL2 is believed", "hpfar=trust"),
        ];
        let case = |(name, words): (&str, &str)| {
            let machine = self.machine(|machine| (machine.cpus, machine.memory_mib) = (3, 4096));
            let append = format!(
                "suite=dirty vcpus=2 {MODES} mib={} iterations=3 {words}",
                self.size.mib
            );
            self.case(
                name,
                machine,
                append,
                Expect::Good(checks::every_mode_completes),
            )
        };
        let mut cases: Vec<Case> = patterns.into_iter().map(case).collect();
        for suite in ["selftest", "verify"] {
            let machine = self.machine(|machine| machine.cpus = 4);
            let append = format!("suite={suite} vcpus=3 mib=2 iterations=1 rounds=2");
            let name = format!("no debug assertion fails in suite {suite}");
            let case = self.case(name, machine, append, Expect::Good(checks::ends));
            cases.push(Case {
                debug: true,
                ..case
            });
        }
        cases
    }

    /// Figures that the project promises.
    fn figures(&self) -> Vec<Case> {
        let size = &self.size;
        let one = format!(
            "suite=dirty timing=insn vcpus=1 {MODES} mib={} iterations={}",
            size.mib, size.iterations
        );
        let mut cases = Vec::new();
        for model in &self.board.limits.cpu_models {
            let machine = self
                .machine(|machine| (machine.cpu, machine.timing) = (model.clone(), Timing::Insn));
            let exact = Expect::Good(checks::faults_are_exact);
            cases.push(self.case(
                format!("one fault for each page written, {model}"),
                machine.clone(),
                &one,
                exact,
            ));
            let short = Expect::Good(checks::fault_is_short);
            cases.push(self.case(
                format!("a write fault is short, {model}"),
                machine,
                format!("{one} mitigations=off"),
                short,
            ));
        }
        let insn = self.machine(|machine| machine.timing = Timing::Insn);
        let mut twice = self.case(
            "instruction counts repeat",
            insn.clone(),
            &one,
            Expect::Good(checks::runs_agree),
        );
        twice.boots.extend(twice.boots.clone());
        cases.push(twice);
        let shared = self.machine(|machine| machine.cpus = 5);
        let append = format!("suite=dirty vcpus=4 {MODES} mib=2 iterations=1");
        let mut shared = self.case(
            "lockless faults share no line",
            shared,
            append,
            Expect::Good(checks::nothing_shared),
        );
        shared.debug = true;
        cases.push(shared);
        let eight = self.machine(|machine| (machine.cpus, machine.memory_mib) = (9, 1024));
        let append = format!("suite=dirty timing=wall vcpus=8 {MODES} mib=16 iterations=2");
        let mut contended = self.case(
            "8 vCPUs contend as each mode lets them",
            eight,
            append,
            Expect::Good(checks::contention_is_as_expected),
        );
        contended.alone = true;
        cases.push(contended);
        let get = |slot_mib: u64| Boot {
            machine: self.machine(|machine| {
                (machine.memory_mib, machine.timing) = (slot_mib + slot_mib / 4 + 512, Timing::Insn)
            }),
            append: format!("suite=get timing=insn vcpus=1 slot-mib={slot_mib}"),
            linux: None,
            typed: &[],
            tree: Tree::Own,
            hostile: false,
        };
        let mut scaling = self.case(
            "get costs by dirty pages, not by memory",
            insn,
            "",
            Expect::Good(checks::get_scales_with_dirty_pages),
        );
        scaling.boots = vec![get(1024), get(16_384)];
        cases.push(scaling);
        cases
    }

    /// Input that cannot be worked with.
    fn refusals(&self) -> Vec<Case> {
        let plain = || self.machine(|_| ());
        let mut cases = vec![
            self.case(
                "refused: no EL2",
                self.machine(|machine| machine.virtualization = false),
                "suite=none",
                Expect::Refusal("EL2"),
            ),
            self.case(
                "refused: too little RAM",
                self.machine(|machine| machine.memory_mib = 64),
                "suite=none",
                Expect::Refusal("MiB"),
            ),
            self.case(
                "refused: no GIC",
                plain(),
                "suite=none",
                Expect::Refusal("GIC"),
            ),
        ];
        if let Some(case) = cases.last_mut() {
            case.boots
                .iter_mut()
                .for_each(|boot| boot.tree = Tree::NoGic);
        }
        let words = [
            ("an unknown suite", "suite=sweet", "suite"),
            (
                "an unknown locking mode",
                "suite=dirty locking=ticket",
                "locking",
            ),
            ("an unknown key", "suite=none colour=red", "colour"),
            ("a number that is none", "suite=dirty vcpus=many", "vcpus"),
            ("more vCPUs than CPUs", "suite=dirty vcpus=64", "CPU"),
            (
                "more guest memory than RAM",
                "suite=dirty vcpus=1 mib=4096",
                "memory",
            ),
        ];
        cases.extend(words.map(|(name, append, said)| {
            self.case(
                format!("refused: {name}"),
                plain(),
                append,
                Expect::Refusal(said),
            )
        }));
        cases
    }
}

#[cfg(test)]
mod tests {
    use super::all;
    use crate::board::Board;
    use crate::machine::Model;

    #[test]
    fn names_are_distinct_and_every_boot_has_a_watchdog() {
        let board = Board::qemu_virt().expect("the board file is read");
        for soak in [false, true] {
            let cases = all(&board, soak);
            let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), cases.len());
            assert!(
                cases
                    .iter()
                    .all(|case| case.seconds > 0 && !case.boots.is_empty())
            );
            assert!(soak || cases.iter().all(|case| case.seconds <= 60));
        }
    }

    #[test]
    fn every_machine_that_is_not_refused_is_within_the_boards_limits() {
        let board = Board::qemu_virt().expect("the board file is read");
        for case in all(&board, false)
            .iter()
            .filter(|case| !case.name.starts_with("refused"))
        {
            assert!(
                case.boots
                    .iter()
                    .all(|boot| boot.machine.model != Model::Virt
                        || board.accept(&boot.machine).is_ok()),
                "{}",
                case.name
            );
        }
    }
}
