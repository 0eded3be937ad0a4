//! What an SError that came while a guest ran is worth: one VM, or the machine.
//!
//! Reference: DDI 0487 issue K.a, D19.2.39 (the ISS of an SError, whose layout DISR_EL1 shares).

/// Who cannot go on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Loss {
    /// The VM: the error is confined to what the CPU was doing.
    Vm,
    /// The machine: nobody knows where the error has got to.
    Machine,
}

/// Judges the `syndrome` of ESR_EL2 or DISR_EL1 of a CPU with or without FEAT_`ras`.
///
/// Errors that the CPU calls recoverable, restartable or corrected have not been consumed beyond the guest. Uncontainable ones may
/// be anywhere. Unrecoverable ones are taken for such: Neoverse N1 calls uncontainable errors that (erratum 1349291). What has no
/// severity, as all without FEAT_RAS, may be as bad.
pub const fn judge(syndrome: u64, ras: bool) -> Loss {
    /// The rest is implementation defined.
    const IDS: u64 = 1 << 24;
    const DFSC: u64 = 0x3f;
    /// Asynchronous SError: the severity is valid.
    const CLASSIFIED: u64 = 0x11;
    const AET_SHIFT: u32 = 10;
    const AET_BITS: u64 = 0x7;
    const RESTARTABLE: u64 = 0b010;
    const RECOVERABLE: u64 = 0b011;
    const CORRECTED: u64 = 0b110;
    if !ras || syndrome & IDS != 0 || syndrome & DFSC != CLASSIFIED {
        return Loss::Machine;
    }
    match syndrome >> AET_SHIFT & AET_BITS {
        RESTARTABLE | RECOVERABLE | CORRECTED => Loss::Vm,
        _ => Loss::Machine,
    }
}

#[cfg(test)]
mod tests {
    use super::{Loss, judge};

    const SERROR: u64 = 0x2f << 26 | 1 << 25;
    const DEFERRED: u64 = 1 << 31;

    #[test]
    fn only_what_is_known_to_be_confined_costs_no_more_than_the_vm() {
        for severity in 0..8 {
            let confined = matches!(severity, 0b010 | 0b011 | 0b110);
            let expected = if confined { Loss::Vm } else { Loss::Machine };
            for register in [SERROR, DEFERRED] {
                let syndrome = register | severity << 10 | 0x11;
                assert_eq!(judge(syndrome, true), expected, "AET {severity:#b}");
                // An external abort, and one that an error synchronization event brought.
                assert_eq!(judge(syndrome | 1 << 9 | 1 << 13, true), expected);
            }
        }
    }

    #[test]
    fn what_is_not_classified_costs_the_machine() {
        let recoverable = SERROR | 0b011 << 10 | 0x11;
        assert_eq!(judge(recoverable, true), Loss::Vm);
        assert_eq!(judge(recoverable, false), Loss::Machine);
        assert_eq!(judge(recoverable | 1 << 24, true), Loss::Machine);
        for status in (0..64).filter(|status| *status != 0x11) {
            let syndrome = recoverable & !0x3f | status;
            assert_eq!(judge(syndrome, true), Loss::Machine, "DFSC {status:#x}");
        }
    }
}
