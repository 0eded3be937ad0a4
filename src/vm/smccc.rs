//! Hypercalls by the SMC calling convention (Arm DEN0028G): which service a call belongs to.
//!
//! The vendor-specific service carries the bench protocol between a controller and the built-in guest. Its null call is
//! answered by the vectors and is here for completeness.
//!
//! The calls against attacks on branch predictors do nothing of their own: the exit itself has done what there is to do
//! (`arch/mitigations.rs`). So they are offered where exits do something, and said to be needless where no CPU is affected.

use super::psci;
use crate::arch::mitigations::{Mitigations, Risk, WORKAROUND_1, WORKAROUND_3};

/// NOT_SUPPORTED, for every unknown call.
pub const NOT_SUPPORTED: u64 = u64::MAX;
/// SUCCESS.
pub const SUCCESS: u64 = 0;
/// A workaround is not needed on any CPU.
pub const NOT_REQUIRED: u64 = 1;
/// SMCCC 1.2.
pub const VERSION: u64 = 0x1_0002;
/// The UID of this hypervisor's calls, in the four words in which it is returned.
pub const UID: [u64; 4] = [0x1d4a_8c56, 0x4e0b_92f3, 0x6a77_35b1, 0xe2c9_0f48];
/// Revision of the vendor-specific service: major, minor.
pub const REVISION: [u64; 2] = [1, 0];

/// A hypercall.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Hypercall {
    /// SMCCC_VERSION.
    Version,
    /// SMCCC_ARCH_FEATURES of a function.
    ArchFeatures(u32),
    /// SMCCC_ARCH_WORKAROUND_1 or 3.
    Workaround(u32),
    /// PSCI.
    Psci(psci::Call),
    /// The vendor-specific service's UID.
    VendorUid,
    /// The vendor-specific service's revision.
    VendorRevision,
    /// Does nothing.
    Null,
    /// Reports the results of the last command and asks for the next.
    Next,
    /// Anything else.
    Unknown,
}

/// Decodes `HVC #immediate` with function `function` and its first three arguments.
pub fn decode(immediate: u16, function: u64, arguments: [u64; 3]) -> Hypercall {
    let Ok(function) = u32::try_from(function & 0xffff_ffff) else {
        return Hypercall::Unknown;
    };
    match function {
        _ if immediate != 0 => Hypercall::Unknown,
        0x8000_0000 => Hypercall::Version,
        0x8000_0001 => u32::try_from(arguments[0] & 0xffff_ffff)
            .map_or(Hypercall::Unknown, Hypercall::ArchFeatures),
        WORKAROUND_1 | WORKAROUND_3 => Hypercall::Workaround(function),
        0x8600_ff01 => Hypercall::VendorUid,
        0x8600_ff03 => Hypercall::VendorRevision,
        0xc600_0000 => Hypercall::Null,
        0xc600_0001 => Hypercall::Next,
        _ => psci::decode(function, arguments).map_or(Hypercall::Unknown, Hypercall::Psci),
    }
}

/// What SMCCC_ARCH_FEATURES says of `function` on a machine with `mitigations`.
pub fn arch_features(function: u32, mitigations: &Mitigations) -> u64 {
    match function {
        0x8000_0000 | 0x8000_0001 => SUCCESS,
        WORKAROUND_1 => offered(mitigations.targets),
        // It drops branch targets, too, where that is needed.
        WORKAROUND_3 => offered(mitigations.history.max(mitigations.targets)),
        _ => NOT_SUPPORTED,
    }
}

const fn offered(risk: Risk) -> u64 {
    match risk {
        Risk::Unaffected => NOT_REQUIRED,
        Risk::Mitigated => SUCCESS,
        Risk::Vulnerable => NOT_SUPPORTED,
    }
}

/// What the call of the workaround `function` returns.
pub fn workaround(function: u32, mitigations: &Mitigations) -> u64 {
    match arch_features(function, mitigations) {
        NOT_SUPPORTED => NOT_SUPPORTED,
        _ => SUCCESS,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Hypercall, NOT_REQUIRED, NOT_SUPPORTED, SUCCESS, WORKAROUND_1, WORKAROUND_3, arch_features,
        decode, workaround,
    };
    use crate::arch::mitigations::Risk::{Mitigated, Unaffected, Vulnerable};
    use crate::arch::mitigations::{AtExit, Mitigations};
    use crate::vm::psci::Call;

    #[test]
    fn calls_go_to_the_service_that_owns_them() {
        assert_eq!(decode(0, 0x8000_0000, [0; 3]), Hypercall::Version);
        assert_eq!(
            decode(0, 0x8400_0000, [0; 3]),
            Hypercall::Psci(Call::Version)
        );
        assert_eq!(decode(0, 0xc600_0000, [0; 3]), Hypercall::Null);
        assert_eq!(decode(0, 0xc600_0001, [0; 3]), Hypercall::Next);
        assert_eq!(decode(0, 0x4b00_0000, [0; 3]), Hypercall::Unknown);
        assert_eq!(decode(0, 0xc600_0002, [0; 3]), Hypercall::Unknown);
    }

    #[test]
    fn only_immediate_zero_is_a_call() {
        assert_eq!(decode(1, 0x8000_0000, [0; 3]), Hypercall::Unknown);
    }

    #[test]
    fn the_upper_half_of_the_function_register_is_ignored() {
        assert_eq!(decode(0, 0xdead_beef_8000_0000, [0; 3]), Hypercall::Version);
    }

    #[test]
    fn workarounds_are_promised_where_exits_do_them() {
        let of = |targets, history| Mitigations {
            at_exit: AtExit::Nothing,
            targets,
            history,
        };
        let about = |function, mitigations| {
            [
                arch_features(function, &mitigations),
                workaround(function, &mitigations),
            ]
        };
        let (safe, half) = (of(Unaffected, Unaffected), of(Unaffected, Mitigated));
        assert_eq!(arch_features(0x8000_0001, &safe), SUCCESS);
        assert_eq!(about(WORKAROUND_1, safe), [NOT_REQUIRED, SUCCESS]);
        assert_eq!(about(WORKAROUND_3, safe), [NOT_REQUIRED, SUCCESS]);
        assert_eq!(about(WORKAROUND_1, half), [NOT_REQUIRED, SUCCESS]);
        assert_eq!(about(WORKAROUND_3, half), [SUCCESS, SUCCESS]);
        let pi = of(Vulnerable, Mitigated);
        assert_eq!(about(WORKAROUND_1, pi), [NOT_SUPPORTED; 2]);
        assert_eq!(about(WORKAROUND_3, pi), [NOT_SUPPORTED; 2]);
        assert_eq!(about(0x8000_7fff, safe), [NOT_SUPPORTED; 2]);
        assert_eq!(
            decode(0, WORKAROUND_1.into(), [0; 3]),
            Hypercall::Workaround(WORKAROUND_1)
        );
    }
}
