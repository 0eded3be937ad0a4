//! What an SError that came while a guest ran is worth: nothing, one VM, or the machine.
//!
//! References: DDI 0487 issue K.a, D19.2.39 (the ISS of an SError, whose layout DISR_EL1 shares); for CPUs without FEAT_RAS
//! DDI 0500J, Exception Syndrome Register (Cortex-A53), and its likes.

use crate::arch::features::{Features, IdRegisters};

/// Who cannot go on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Loss {
    /// Nobody: the CPU corrected the error, or it has done no harm yet.
    Nothing,
    /// The VM: the error is confined to what the CPU was doing.
    Vm,
    /// The machine: nobody knows where the error has got to.
    Machine,
}

/// ESR_EL2.ISS: what is below is implementation defined. Cores without FEAT_RAS set it where there is anything.
const IDS: u64 = 1 << 24;

/// Judges the `syndrome` of ESR_EL2 or DISR_EL1 of the CPU with these ID registers.
pub const fn judge(syndrome: u64, id: &IdRegisters) -> Loss {
    if Features::new(id).ras {
        judge_classified(syndrome)
    } else if tells_bus_errors(id.midr) && is_bus_error(syndrome) {
        Loss::Vm
    } else {
        Loss::Machine
    }
}

/// Errors that the CPU corrected, or calls restartable, hold up nothing. Recoverable ones have not been consumed beyond the
/// guest. Uncontainable ones may be anywhere. Unrecoverable ones are taken for such: Neoverse N1 calls uncontainable errors that
/// (erratum 1349291). What has no severity may be as bad.
const fn judge_classified(syndrome: u64) -> Loss {
    const DFSC: u64 = 0x3f;
    /// Asynchronous SError: the severity is valid.
    const CLASSIFIED: u64 = 0x11;
    const AET_SHIFT: u32 = 10;
    const AET_BITS: u64 = 0x7;
    const RESTARTABLE: u64 = 0b010;
    const RECOVERABLE: u64 = 0b011;
    const CORRECTED: u64 = 0b110;
    if syndrome & IDS != 0 || syndrome & DFSC != CLASSIFIED {
        return Loss::Machine;
    }
    match syndrome >> AET_SHIFT & AET_BITS {
        RESTARTABLE | CORRECTED => Loss::Nothing,
        RECOVERABLE => Loss::Vm,
        _ => Loss::Machine,
    }
}

/// Whether a core without FEAT_RAS tells errors of the bus from errors of its caches, as [`is_bus_error`] takes them.
const fn tells_bus_errors(midr: u64) -> bool {
    const ARM: u64 = 0x41;
    midr >> 24 & 0xff == ARM
        && matches!(
            midr >> 4 & 0xfff,
            0xd03 | 0xd04 | 0xd07 | 0xd08 // Cortex-A53, A35, A57, A72
        )
}

/// A store that a device refused (SLVERR) or that found none (DECERR): it is lost, and nothing else is. Guests can provoke it
/// where they have a device's registers to themselves, as GICV with GICv2, by an access of a size that it does not take. EL2's own
/// stores go to registers that there are. Double-bit errors of a cache and what comes by a pin may be anybody's.
const fn is_bus_error(syndrome: u64) -> bool {
    const ISS: u64 = (1 << 25) - 1;
    const DECODE: u64 = 0b00;
    const SLAVE: u64 = 0b10;
    matches!(syndrome & ISS ^ IDS, DECODE | SLAVE)
}

#[cfg(test)]
mod tests {
    use super::{IDS, Loss, judge};
    use crate::arch::features::IdRegisters;

    const SERROR: u64 = 0x2f << 26 | 1 << 25;
    const DEFERRED: u64 = 1 << 31;

    /// The ID registers of a CPU of Arm's, with or without FEAT_RAS.
    fn cpu(part: u64, ras: bool) -> IdRegisters {
        IdRegisters {
            midr: 0x41 << 24 | part << 4,
            pfr0: u64::from(ras) << 28,
            ..Default::default()
        }
    }

    #[test]
    fn only_what_is_known_to_be_confined_costs_no_more_than_the_vm() {
        let with_ras = cpu(0xd0c, true);
        let expected = [
            Loss::Machine, // uncontainable
            Loss::Machine, // unrecoverable
            Loss::Nothing, // restartable
            Loss::Vm,      // recoverable
            Loss::Machine,
            Loss::Machine,
            Loss::Nothing, // corrected
            Loss::Machine,
        ];
        for (severity, expected) in (0..).zip(expected) {
            for register in [SERROR, DEFERRED] {
                let syndrome = register | severity << 10 | 0x11;
                assert_eq!(judge(syndrome, &with_ras), expected, "AET {severity:#b}");
                // An external abort, and one that an error synchronization event brought.
                assert_eq!(judge(syndrome | 1 << 9 | 1 << 13, &with_ras), expected);
            }
        }
    }

    #[test]
    fn what_is_not_classified_costs_the_machine() {
        let with_ras = cpu(0xd0c, true);
        for severity in [0b010, 0b011, 0b110] {
            let confined = SERROR | severity << 10 | 0x11;
            assert_eq!(judge(confined | IDS, &with_ras), Loss::Machine);
            for status in (0..64).filter(|status| *status != 0x11) {
                let syndrome = confined & !0x3f | status;
                assert_eq!(
                    judge(syndrome, &with_ras),
                    Loss::Machine,
                    "DFSC {status:#x}"
                );
            }
        }
    }

    #[test]
    fn a_bus_error_costs_the_vm_where_the_core_tells_it_from_others() {
        for part in [0xd03, 0xd04, 0xd07, 0xd08] {
            let without_ras = cpu(part, false);
            let loss = |iss: u64| judge(SERROR | iss, &without_ras);
            // Cortex-A72's report of a refused store is 0xbf000002.
            assert_eq!(loss(IDS | 0b10), Loss::Vm);
            assert_eq!(loss(IDS), Loss::Vm);
            for other in [0b01, 0b11, 1 << 22, 1 << 22 | 1, 0x40_c000, 0x11] {
                assert_eq!(loss(IDS | other), Loss::Machine, "ISS {other:#x}");
            }
            assert_eq!(loss(0), Loss::Machine);
            assert_eq!(loss(0b10), Loss::Machine);
            assert_eq!(loss(0b011 << 10 | 0x11), Loss::Machine);
        }
    }

    #[test]
    fn a_core_whose_syndrome_is_not_known_costs_the_machine() {
        let mut strange = cpu(0xd08, false);
        strange.midr = 0x51 << 24 | 0xd08 << 4;
        for id in [cpu(0xd09, false), strange, cpu(0xd08, true)] {
            for iss in [0, IDS, IDS | 0b10] {
                assert_eq!(judge(SERROR | iss, &id), Loss::Machine);
            }
        }
    }
}
