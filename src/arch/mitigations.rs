//! What an exit from a guest does against branch predictors that the guest has trained.
//!
//! Two attacks: on branch *targets* (Spectre variant 2, CVE-2017-5715) and on branch *history* (Spectre-BHB, CVE-2022-23960).
//! Each CPU chooses once, from its ID registers and from what firmware says of it; the choice is a table of vectors, so a CPU
//! that needs nothing pays nothing. What is done stands at the top of the vector, before anything the guest could have trained
//! for.
//!
//! References: FEAT_CSV2, FEAT_CLRBHB and FEAT_ECBHB in DDI 0487 K.a, A2; "Spectre-BHB: speculative target reuse attacks" by
//! Arm for the loop and its counts; Arm DEN0028G, 7, for the calls.

use core::fmt;

use crate::arch::features::IdRegisters;

/// SMCCC_ARCH_WORKAROUND_1: drops branch targets.
pub const WORKAROUND_1: u32 = 0x8000_8000;
/// SMCCC_ARCH_WORKAROUND_3: drops branch targets and history.
pub const WORKAROUND_3: u32 = 0x8000_3fff;

/// The loop's count on a core for which none is published, where the loop is wanted all the same.
const COUNT_WITHOUT_NEED: u32 = 32;

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Setting {
    /// What the CPU needs.
    #[default]
    Auto,
    /// Also where the CPU needs nothing: what it would cost.
    On,
    /// Nothing.
    Off,
    /// Also where firmware offers nothing, call it: what the call would cost.
    Firmware,
}

impl Setting {
    /// All of them by their names.
    pub const ALL: [(&str, Self); 4] = [
        ("auto", Self::Auto),
        ("on", Self::On),
        ("off", Self::Off),
        ("firmware", Self::Firmware),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        let mut all = Self::ALL.iter();
        all.find(|(_, it)| *it == self).map_or("", |(name, _)| name)
    }
}

/// What firmware says of one of its calls on this CPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// It is there, and this CPU needs it.
    Offered,
    /// This CPU does not need it.
    NotNeeded,
    /// Firmware does not know it, or there is none.
    Absent,
}

/// What firmware says of this CPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Firmware {
    /// Whether it can be called at all, by `SMC`.
    pub callable: bool,
    /// Of [`WORKAROUND_1`].
    pub targets: Answer,
    /// Of [`WORKAROUND_3`].
    pub history: Answer,
}

/// What each exit does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AtExit {
    /// Nothing.
    Nothing,
    /// `CLRBHB`.
    ClearHistory,
    /// Fills the history with branches of its own: this many rounds.
    Loop(u32),
    /// Calls this function of firmware.
    Call(u32),
}

/// Where a CPU stands towards an attack. From best to worst.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Risk {
    /// The attack does not work on this CPU.
    Unaffected,
    /// What exits do stops it.
    Mitigated,
    /// Nothing stops it.
    Vulnerable,
}

/// What one CPU does, and what that achieves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mitigations {
    /// What each exit does.
    pub at_exit: AtExit,
    /// Branch targets.
    pub targets: Risk,
    /// Branch history.
    pub history: Risk,
}

/// Cores that do not speculate far enough: implementer and part.
const IN_ORDER: [(u64, u64); 5] = [
    (0x41, 0xd03), // Cortex-A53
    (0x41, 0xd04), // Cortex-A35
    (0x41, 0xd05), // Cortex-A55
    (0x41, 0xd46), // Cortex-A510
    (0x41, 0xd80), // Cortex-A520
];

/// The loop's published count: implementer, part, count.
const COUNTS: [(u64, u64, u32); 26] = [
    (0x41, 0xd07, 8),   // Cortex-A57
    (0x41, 0xd08, 8),   // Cortex-A72
    (0xc0, 0xac3, 11),  // AmpereOne
    (0x41, 0xd0b, 24),  // Cortex-A76
    (0x41, 0xd0e, 24),  // Cortex-A76AE
    (0x41, 0xd0d, 24),  // Cortex-A77
    (0x41, 0xd0c, 24),  // Neoverse-N1
    (0x51, 0x804, 24),  // Kryo 4xx Gold
    (0x41, 0xd41, 32),  // Cortex-A78
    (0x41, 0xd42, 32),  // Cortex-A78AE
    (0x41, 0xd4b, 32),  // Cortex-A78C
    (0x41, 0xd44, 32),  // Cortex-X1
    (0x41, 0xd47, 32),  // Cortex-A710
    (0x41, 0xd48, 32),  // Cortex-X2
    (0x41, 0xd49, 32),  // Neoverse-N2
    (0x41, 0xd40, 32),  // Neoverse-V1
    (0x48, 0xd01, 32),  // TSV110
    (0x48, 0xd02, 32),  // HIP09
    (0x41, 0xd4d, 38),  // Cortex-A715
    (0x41, 0xd81, 38),  // Cortex-A720
    (0x41, 0xd89, 38),  // Cortex-A720AE
    (0x41, 0xd4e, 132), // Cortex-X3
    (0x41, 0xd4f, 132), // Neoverse-V2
    (0x41, 0xd82, 132), // Cortex-X4
    (0x41, 0xd84, 132), // Neoverse-V3
    (0x4e, 0x010, 132), // Olympus
];

/// Cores on which [`WORKAROUND_1`] drops everything that the predictor holds, history too.
const WHOLLY_DROPPED: [(u64, u64); 2] = [(0x41, 0xd07), (0x41, 0xd08)];

/// Four bits of an ID register.
const fn field(register: u64, low_bit: u32) -> u64 {
    register >> low_bit & 0xf
}

const fn core(midr: u64) -> (u64, u64) {
    (midr >> 24 & 0xff, midr >> 4 & 0xfff)
}

fn count(midr: u64) -> Option<u32> {
    let known = COUNTS
        .iter()
        .find(|(implementer, part, _)| (*implementer, *part) == core(midr));
    known.map(|(.., count)| *count)
}

impl Mitigations {
    /// What the CPU with `id` does, of which `firmware` says what it can do.
    pub fn choose(id: &IdRegisters, firmware: Firmware, setting: Setting) -> Self {
        const CALL: AtExit = AtExit::Call(WORKAROUND_3);
        let needed = Self::needed(id, firmware);
        match (setting, needed.at_exit) {
            (Setting::Off, _) => needed.without(AtExit::Nothing),
            (Setting::Firmware, at_exit) if firmware.callable && at_exit != CALL => {
                needed.without(CALL)
            }
            (Setting::On | Setting::Firmware, AtExit::Nothing) => Self {
                at_exit: if clears_history(id) {
                    AtExit::ClearHistory
                } else {
                    AtExit::Loop(count(id.midr).unwrap_or(COUNT_WITHOUT_NEED))
                },
                ..needed
            },
            _ => needed,
        }
    }

    fn needed(id: &IdRegisters, firmware: Firmware) -> Self {
        let targets = targets(id, firmware);
        let history = history(id, firmware);
        if targets == Risk::Mitigated {
            return Self::calling(id, firmware, history);
        }
        let (at_exit, history) = match history {
            None => (AtExit::Nothing, Risk::Unaffected),
            Some(AtExit::Nothing) => (AtExit::Nothing, Risk::Vulnerable),
            Some(at_exit) => (at_exit, Risk::Mitigated),
        };
        Self {
            at_exit,
            targets,
            history,
        }
    }

    /// Branch targets take a call; `history` is what the history would take.
    fn calling(id: &IdRegisters, firmware: Firmware, history: Option<AtExit>) -> Self {
        let both = firmware.history == Answer::Offered;
        Self {
            at_exit: AtExit::Call(if both { WORKAROUND_3 } else { WORKAROUND_1 }),
            targets: Risk::Mitigated,
            history: match history {
                None => Risk::Unaffected,
                Some(_) if both || WHOLLY_DROPPED.contains(&core(id.midr)) => Risk::Mitigated,
                Some(_) => Risk::Vulnerable,
            },
        }
    }

    /// The CPU does `at_exit`, which helps it nothing, in place of what it needs.
    fn without(self, at_exit: AtExit) -> Self {
        let unhelped = |risk| match risk {
            Risk::Mitigated => Risk::Vulnerable,
            other => other,
        };
        Self {
            at_exit,
            targets: unhelped(self.targets),
            history: unhelped(self.history),
        }
    }

    /// Where a machine stands that has CPUs like `self` and `other`; what its exits do is of `self` only.
    #[must_use]
    pub fn worst(self, other: Self) -> Self {
        Self {
            targets: self.targets.max(other.targets),
            history: self.history.max(other.history),
            ..self
        }
    }
}

/// FEAT_CLRBHB.
fn clears_history(id: &IdRegisters) -> bool {
    field(id.isar2, 28) != 0
}

fn targets(id: &IdRegisters, firmware: Firmware) -> Risk {
    const CSV2: u32 = 56;
    /// Variant 2 does not work on it, though it does not say so: TSV110.
    const TSV110: (u64, u64) = (0x48, 0xd01);
    let core = core(id.midr);
    if field(id.pfr0, CSV2) >= 1 || IN_ORDER.contains(&core) || core == TSV110 {
        return Risk::Unaffected;
    }
    match firmware.targets {
        Answer::Offered => Risk::Mitigated,
        Answer::NotNeeded => Risk::Unaffected,
        Answer::Absent => Risk::Vulnerable,
    }
}

/// What an exit has to do against history; `None`: the CPU is not affected. `Nothing`: it is, and nothing is known to help.
fn history(id: &IdRegisters, firmware: Firmware) -> Option<AtExit> {
    const CSV2: u32 = 56;
    const CSV2_3: u64 = 3;
    const ECBHB: u32 = 60;
    let unaffected = field(id.pfr0, CSV2) >= CSV2_3
        || field(id.mmfr1, ECBHB) != 0
        || IN_ORDER.contains(&core(id.midr));
    if unaffected {
        None
    } else if clears_history(id) {
        Some(AtExit::ClearHistory)
    } else if let Some(count) = count(id.midr) {
        Some(AtExit::Loop(count))
    } else {
        match firmware.history {
            Answer::Offered => Some(AtExit::Call(WORKAROUND_3)),
            Answer::NotNeeded => None,
            Answer::Absent => Some(AtExit::Nothing),
        }
    }
}

impl fmt::Display for AtExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("none"),
            Self::ClearHistory => f.write_str("clrbhb"),
            Self::Loop(count) => write!(f, "loop-{count}"),
            Self::Call(WORKAROUND_1) => f.write_str("workaround-1"),
            Self::Call(_) => f.write_str("workaround-3"),
        }
    }
}

impl Risk {
    const fn text(self) -> &'static str {
        match self {
            Self::Unaffected => "not affected",
            Self::Mitigated => "mitigated",
            Self::Vulnerable => "vulnerable",
        }
    }
}

impl fmt::Display for Mitigations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "at exits {}; branch targets {}, branch history {}",
            self.at_exit,
            self.targets.text(),
            self.history.text()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Answer, AtExit, COUNTS, Firmware, IN_ORDER, Mitigations, Risk, Setting, WORKAROUND_1,
        WORKAROUND_3, history,
    };
    use crate::arch::features::IdRegisters;
    use AtExit::{Call, ClearHistory, Loop, Nothing};
    use Risk::{Mitigated, Unaffected, Vulnerable};
    use alloc::string::ToString;

    const A53: u64 = 0x410f_d034;
    const A72_R0: u64 = 0x410f_d083;
    const A73: u64 = 0x410f_d092;
    const N1: u64 = 0x413f_d0c1;
    const UNKNOWN: u64 = 0x0000_0510;
    const CSV2: u64 = 1 << 56;
    const CSV2_3: u64 = 3 << 56;
    const CLRBHB: u64 = 1 << 28;
    const ECBHB: u64 = 1 << 60;
    const NO_FIRMWARE: Firmware = Firmware {
        callable: false,
        ..firmware(Answer::Absent, Answer::Absent)
    };

    const fn firmware(targets: Answer, history: Answer) -> Firmware {
        Firmware {
            callable: true,
            targets,
            history,
        }
    }

    /// MIDR_EL1, ID_AA64PFR0_EL1, ID_AA64ISAR2_EL1 and ID_AA64MMFR1_EL1.
    fn id(midr: u64, pfr0: u64, isar2: u64, mmfr1: u64) -> IdRegisters {
        IdRegisters {
            midr,
            pfr0,
            isar2,
            mmfr1,
            ..IdRegisters::default()
        }
    }

    #[test]
    fn each_cpu_does_what_it_needs_and_no_more() {
        let offers_1 = firmware(Answer::Offered, Answer::Absent);
        let offers_3 = firmware(Answer::Offered, Answer::Offered);
        let needs_none = firmware(Answer::NotNeeded, Answer::NotNeeded);
        let table = [
            (
                id(N1, CSV2, 0, 0),
                NO_FIRMWARE,
                Loop(24),
                Unaffected,
                Mitigated,
            ),
            (
                id(N1, CSV2, 0, 0),
                offers_3,
                Loop(24),
                Unaffected,
                Mitigated,
            ),
            (
                id(A53, 0, 0, 0),
                NO_FIRMWARE,
                Nothing,
                Unaffected,
                Unaffected,
            ),
            (
                id(UNKNOWN, CSV2_3, 0, 0),
                NO_FIRMWARE,
                Nothing,
                Unaffected,
                Unaffected,
            ),
            (
                id(UNKNOWN, CSV2, 0, ECBHB),
                NO_FIRMWARE,
                Nothing,
                Unaffected,
                Unaffected,
            ),
            (
                id(UNKNOWN, CSV2, CLRBHB, 0),
                NO_FIRMWARE,
                ClearHistory,
                Unaffected,
                Mitigated,
            ),
            (
                id(N1, CSV2, CLRBHB, 0),
                NO_FIRMWARE,
                ClearHistory,
                Unaffected,
                Mitigated,
            ),
            (
                id(UNKNOWN, CSV2, 0, 0),
                NO_FIRMWARE,
                Nothing,
                Unaffected,
                Vulnerable,
            ),
            (
                id(UNKNOWN, CSV2, 0, 0),
                needs_none,
                Nothing,
                Unaffected,
                Unaffected,
            ),
            (
                id(UNKNOWN, 0, 0, 0),
                needs_none,
                Nothing,
                Unaffected,
                Unaffected,
            ),
            (
                id(UNKNOWN, 0, 0, 0),
                offers_1,
                Call(WORKAROUND_1),
                Mitigated,
                Vulnerable,
            ),
            // A Raspberry Pi 4 with the firmware it is sold with, and with Trusted Firmware-A, old and new.
            (
                id(A72_R0, 0, 0, 0),
                NO_FIRMWARE,
                Loop(8),
                Vulnerable,
                Mitigated,
            ),
            (
                id(A72_R0, 0, 0, 0),
                offers_1,
                Call(WORKAROUND_1),
                Mitigated,
                Mitigated,
            ),
            (
                id(A72_R0, 0, 0, 0),
                offers_3,
                Call(WORKAROUND_3),
                Mitigated,
                Mitigated,
            ),
            (
                id(A73, 0, 0, 0),
                offers_3,
                Call(WORKAROUND_3),
                Mitigated,
                Mitigated,
            ),
            (
                id(A73, 0, 0, 0),
                NO_FIRMWARE,
                Nothing,
                Vulnerable,
                Vulnerable,
            ),
        ];
        for (id, firmware, at_exit, targets, history) in table {
            assert_eq!(
                Mitigations::choose(&id, firmware, Setting::Auto),
                Mitigations {
                    at_exit,
                    targets,
                    history
                },
                "{id:x?} {firmware:?}"
            );
        }
    }

    #[test]
    fn off_does_nothing_and_says_what_that_means() {
        let off = |id| Mitigations::choose(&id, NO_FIRMWARE, Setting::Off);
        let n1 = off(id(N1, CSV2, 0, 0));
        assert_eq!(
            (n1.at_exit, n1.targets, n1.history),
            (Nothing, Unaffected, Vulnerable)
        );
        assert_eq!(off(id(UNKNOWN, CSV2_3, 0, 0)).history, Unaffected);
    }

    #[test]
    fn on_finds_something_to_do_on_every_cpu_and_less_on_none() {
        let on = |id| Mitigations::choose(&id, NO_FIRMWARE, Setting::On).at_exit;
        assert_eq!(on(id(N1, CSV2, 0, 0)), Loop(24));
        assert_eq!(on(id(UNKNOWN, CSV2_3, 0, 0)), Loop(32));
        assert_eq!(on(id(UNKNOWN, CSV2_3, CLRBHB, 0)), ClearHistory);
        let offers = firmware(Answer::Offered, Answer::Offered);
        let a72 = id(A72_R0, 0, 0, 0);
        assert_eq!(
            Mitigations::choose(&a72, offers, Setting::On),
            Mitigations::choose(&a72, offers, Setting::Auto)
        );
    }

    #[test]
    fn firmware_that_cannot_be_called_is_not_called() {
        let unaffected = id(UNKNOWN, CSV2_3, 0, 0);
        for (firmware, at_exit) in [
            (firmware(Answer::Absent, Answer::Absent), Call(WORKAROUND_3)),
            (NO_FIRMWARE, Loop(32)),
        ] {
            let chosen = Mitigations::choose(&unaffected, firmware, Setting::Firmware);
            assert_eq!((chosen.at_exit, chosen.history), (at_exit, Unaffected));
        }
        let unasked = firmware(Answer::Absent, Answer::Absent);
        let n1 = Mitigations::choose(&id(N1, CSV2, 0, 0), unasked, Setting::Firmware);
        assert_eq!((n1.at_exit, n1.history), (Call(WORKAROUND_3), Vulnerable));
    }

    #[test]
    fn a_machine_stands_where_its_worst_cpu_does() {
        let a72 = Mitigations::choose(&id(A72_R0, 0, 0, 0), NO_FIRMWARE, Setting::Auto);
        let a53 = Mitigations::choose(&id(A53, 0, 0, 0), NO_FIRMWARE, Setting::Auto);
        for both in [a72.worst(a53), a53.worst(a72)] {
            assert_eq!((both.targets, both.history), (Vulnerable, Mitigated));
        }
        assert_eq!(
            a72.to_string(),
            "at exits loop-8; branch targets vulnerable, branch history mitigated"
        );
    }

    #[test]
    fn every_core_is_listed_once() {
        let mut cores: Vec<_> = COUNTS
            .iter()
            .map(|(implementer, part, _)| (*implementer, *part))
            .chain(IN_ORDER)
            .collect();
        cores.sort_unstable();
        assert!(cores.is_sorted_by(|one, next| one < next));
        for (implementer, part, count) in COUNTS {
            let midr = implementer << 24 | 0xf_0000 | part << 4;
            assert_eq!(
                history(&id(midr, CSV2, 0, 0), NO_FIRMWARE),
                Some(Loop(count))
            );
        }
    }
}
