//! PSCI as guests are given it (Arm DEN0022F): calls decoded, and the power state of a vCPU.

/// PSCI 1.1.
pub const VERSION: u64 = 0x1_0001;
/// AFFINITY_INFO and the like: the answer for a CPU that is on.
pub const AFFINITY_ON: u64 = 0;
/// As above, off.
pub const AFFINITY_OFF: u64 = 1;
/// As above, about to come on.
pub const AFFINITY_PENDING: u64 = 2;
/// SYSTEM_RESET2: the architecture's warm reset.
pub const WARM_RESET: u64 = 0;
/// MIGRATE_INFO_TYPE: there is no trusted OS to migrate.
pub const NO_TRUSTED_OS: u64 = 2;

/// A refusal, as the guest reads it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(i64)]
pub enum Refusal {
    /// NOT_SUPPORTED.
    NotSupported = -1,
    /// INVALID_PARAMETERS.
    InvalidParameters = -2,
    /// ALREADY_ON.
    AlreadyOn = -4,
    /// ON_PENDING.
    OnPending = -5,
    /// INVALID_ADDRESS.
    InvalidAddress = -9,
}

impl Refusal {
    /// The value of x0.
    pub const fn value(self) -> u64 {
        (self as i64).cast_unsigned()
    }
}

/// A call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Call {
    /// PSCI_VERSION.
    Version,
    /// PSCI_FEATURES of a function.
    Features(u32),
    /// CPU_ON.
    CpuOn {
        /// MPIDR_EL1 of the CPU.
        target: u64,
        /// Where it starts.
        entry: u64,
        /// Its x0.
        context: u64,
    },
    /// CPU_OFF.
    CpuOff,
    /// AFFINITY_INFO.
    AffinityInfo {
        /// MPIDR_EL1 of the CPU.
        target: u64,
        /// Affinity level; only 0 is known.
        level: u64,
    },
    /// CPU_SUSPEND; whatever depth is asked for, a standby state is entered.
    CpuSuspend,
    /// MIGRATE_INFO_TYPE.
    MigrateInfoType,
    /// SYSTEM_OFF.
    SystemOff,
    /// SYSTEM_RESET.
    SystemReset,
    /// SYSTEM_RESET2 of this type.
    SystemReset2 {
        /// What kind of reset; only [`WARM_RESET`] is known.
        kind: u64,
    },
}

/// Decodes function `function` with its first three arguments; `None` for what is not PSCI or not offered.
pub fn decode(function: u32, arguments: [u64; 3]) -> Option<Call> {
    const SMC64: u32 = 1 << 30;
    let [first, second, third] = if function & SMC64 != 0 {
        arguments
    } else {
        arguments.map(|argument| argument & 0xffff_ffff)
    };
    // Parameters of 32 bits stay that in calls of 64: what else is in their registers is not looked at.
    let word = |argument: u64| argument & 0xffff_ffff;
    Some(match function {
        0x8400_0000 => Call::Version,
        0x8400_0001 | 0xc400_0001 => Call::CpuSuspend,
        0x8400_0002 => Call::CpuOff,
        0x8400_0003 | 0xc400_0003 => Call::CpuOn {
            target: first,
            entry: second,
            context: third,
        },
        0x8400_0004 | 0xc400_0004 => Call::AffinityInfo {
            target: first,
            level: word(second),
        },
        0x8400_0006 => Call::MigrateInfoType,
        0x8400_0008 => Call::SystemOff,
        0x8400_0009 => Call::SystemReset,
        0x8400_0012 | 0xc400_0012 => Call::SystemReset2 { kind: word(first) },
        0x8400_000a => Call::Features(u32::try_from(first & 0xffff_ffff).ok()?),
        _ => return None,
    })
}

/// What PSCI_FEATURES says of `function`: zero, or NOT_SUPPORTED.
pub fn features(function: u32) -> u64 {
    const SMCCC_VERSION: u32 = 0x8000_0000;
    if function == SMCCC_VERSION || decode(function, [0; 3]).is_some() {
        0
    } else {
        Refusal::NotSupported.value()
    }
}

/// The affinity fields of a call's target, which has no other bits set (DEN0022F, CPU_ON and AFFINITY_INFO: target_cpu).
pub const fn affinity_of(target: u64) -> Option<u64> {
    const AFFINITY: u64 = 0xff_00ff_ffff;
    if target & !AFFINITY == 0 {
        Some(target)
    } else {
        None
    }
}

/// Whether a vCPU runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Power {
    /// Off.
    Off,
    /// CPU_ON has been called and the vCPU has not begun.
    Pending {
        /// Where it starts.
        entry: u64,
        /// Its x0.
        context: u64,
    },
    /// On.
    On,
}

impl Power {
    /// Carries CPU_ON out.
    ///
    /// # Errors
    ///
    /// Already on, or about to be; or an entry point that no A64 code can have.
    pub fn turn_on(&mut self, entry: u64, context: u64) -> Result<(), Refusal> {
        match self {
            Self::On => Err(Refusal::AlreadyOn),
            Self::Pending { .. } => Err(Refusal::OnPending),
            Self::Off if entry & 3 != 0 => Err(Refusal::InvalidAddress),
            Self::Off => {
                *self = Self::Pending { entry, context };
                Ok(())
            }
        }
    }

    /// The answer of AFFINITY_INFO.
    pub const fn affinity_info(self) -> u64 {
        match self {
            Self::Off => AFFINITY_OFF,
            Self::Pending { .. } => AFFINITY_PENDING,
            Self::On => AFFINITY_ON,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        AFFINITY_OFF, AFFINITY_ON, AFFINITY_PENDING, Call, Power, Refusal, WARM_RESET, affinity_of,
        decode, features,
    };

    #[test]
    fn thirty_two_bit_calls_have_thirty_two_bit_arguments() {
        let arguments = [0xffff_ffff_0000_0001, 0x1_4008_0000, 7];
        assert_eq!(
            decode(0x8400_0003, arguments),
            Some(Call::CpuOn {
                target: 1,
                entry: 0x4008_0000,
                context: 7
            })
        );
        assert_eq!(
            decode(0xc400_0003, arguments),
            Some(Call::CpuOn {
                target: 0xffff_ffff_0000_0001,
                entry: 0x1_4008_0000,
                context: 7
            })
        );
    }

    #[test]
    fn what_is_offered_is_what_features_claims() {
        for function in (0x8400_0000_u32..0x8400_0040).chain(0xc400_0000..0xc400_0040) {
            let offered = decode(function, [0; 3]).is_some();
            assert_eq!(features(function) == 0, offered, "{function:#x}");
        }
        assert_eq!(features(0x8000_0000), 0);
        assert_eq!(features(0x8000_0001), u64::MAX);
        // 64-bit forms exist only where the specification has them.
        assert_eq!(decode(0xc400_0002, [0; 3]), None);
        assert_eq!(decode(0xc400_0008, [0; 3]), None);
    }

    #[test]
    fn a_reset_tells_its_kind_in_32_bits_in_both_conventions() {
        let arguments = [0x1_8000_0001, 0, 0];
        let kind = |function| match decode(function, arguments) {
            Some(Call::SystemReset2 { kind }) => kind,
            other => panic!("{other:?}"),
        };
        assert_eq!(kind(0x8400_0012), 0x8000_0001);
        assert_eq!(kind(0xc400_0012), 0x8000_0001);
        let warm = decode(0xc400_0012, [0x5_0000_0000 | WARM_RESET, 0, 0]);
        assert_eq!(warm, Some(Call::SystemReset2 { kind: WARM_RESET }));
        assert_eq!(decode(0x8400_0009, arguments), Some(Call::SystemReset));
    }

    #[test]
    fn an_affinity_level_has_32_bits() {
        let asked = decode(0xc400_0004, [0x1_0000_0002, 0x7_0000_0000, 0]);
        let wanted = Call::AffinityInfo {
            target: 0x1_0000_0002,
            level: 0,
        };
        assert_eq!(asked, Some(wanted));
    }

    #[test]
    fn a_target_is_named_by_its_affinity_alone() {
        assert_eq!(affinity_of(0xff_00ff_ffff), Some(0xff_00ff_ffff));
        for reserved in [1 << 24, 1 << 31, 1 << 40, 1 << 63] {
            assert_eq!(affinity_of(reserved | 1), None, "{reserved:#x}");
        }
    }

    #[test]
    fn a_cpu_is_turned_on_once() {
        let mut power = Power::Off;
        assert_eq!(power.affinity_info(), AFFINITY_OFF);
        assert_eq!(power.turn_on(0x4000_0002, 0), Err(Refusal::InvalidAddress));
        assert_eq!(power.turn_on(0x4000_0000, 5), Ok(()));
        assert_eq!(power.affinity_info(), AFFINITY_PENDING);
        assert_eq!(power.turn_on(0x4000_0000, 5), Err(Refusal::OnPending));
        power = Power::On;
        assert_eq!(power.affinity_info(), AFFINITY_ON);
        assert_eq!(power.turn_on(0x4000_0000, 5), Err(Refusal::AlreadyOn));
    }

    #[test]
    fn refusals_have_the_specified_values() {
        assert_eq!(Refusal::NotSupported.value(), u64::MAX);
        assert_eq!(Refusal::InvalidAddress.value(), (-9_i64) as u64);
    }
}
