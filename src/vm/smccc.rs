//! Hypercalls by the SMC calling convention (Arm DEN0028G): which service a call belongs to.
//!
//! The vendor-specific service carries the bench protocol between a controller and the built-in guest. Its null call is
//! answered by the vectors and is here for completeness.

use super::psci;

/// NOT_SUPPORTED, for every unknown call.
pub const NOT_SUPPORTED: u64 = u64::MAX;
/// SUCCESS.
pub const SUCCESS: u64 = 0;
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
        0x8600_ff01 => Hypercall::VendorUid,
        0x8600_ff03 => Hypercall::VendorRevision,
        0xc600_0000 => Hypercall::Null,
        0xc600_0001 => Hypercall::Next,
        _ => psci::decode(function, arguments).map_or(Hypercall::Unknown, Hypercall::Psci),
    }
}

/// What SMCCC_ARCH_FEATURES says of `function`.
pub fn arch_features(function: u32) -> u64 {
    match function {
        0x8000_0000 | 0x8000_0001 => SUCCESS,
        _ => NOT_SUPPORTED,
    }
}

#[cfg(test)]
mod tests {
    use super::{Hypercall, NOT_SUPPORTED, SUCCESS, arch_features, decode};
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
    fn workarounds_are_not_promised() {
        assert_eq!(arch_features(0x8000_0001), SUCCESS);
        assert_eq!(arch_features(0x8000_8000), NOT_SUPPORTED);
    }
}
