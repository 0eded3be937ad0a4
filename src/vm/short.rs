//! The abort short path: what the vectors call with most of the guest's registers still in place.
//!
//! A stage-2 abort that the MMU resolves returns from here straight to the guest. Nothing is formatted, allocated or
//! locked but what [`Stage2::fault`](crate::mmu::Stage2::fault) locks.

use crate::addr::{Ipa, PAGE_BYTES, Va};
use crate::arch;
use crate::arch::context::{Exit, Frame, RESUME};
use crate::mmu::{Fault, FaultKind, Resolution};
use crate::sync::percpu;
use crate::trace::Event;
use crate::vm::resident::Resident;
use crate::vm::trap::{self, FaultStatus};

/// Judges a stage-2 abort: [`RESUME`], or the number of an [`Exit`].
#[unsafe(no_mangle)]
extern "C" fn guest_abort(frame: *mut Frame, esr: u64) -> u64 {
    // SAFETY: the frame that was entered is the first field of this CPU's resident vCPU, whose run loop is suspended in
    // `arch::enter` meanwhile.
    let resident = unsafe { &mut *frame.cast::<Resident<'_>>() };
    let times = &percpu::this().exit_times;
    let begun = times.begin();
    let verdict = resident.judge_abort(esr);
    times.end(begun);
    verdict
}

impl Resident<'_> {
    #[inline]
    fn judge_abort(&mut self, esr: u64) -> u64 {
        let abort = trap::abort(esr);
        let FaultStatus::Stage2(kind) = abort.status else {
            return self.rare_abort(abort.status);
        };
        let far = arch::far_el2();
        let unpromised = kind == FaultKind::Permission && !abort.stage1_walk;
        let ipa = if unpromised && !self.vm.trust_hpfar {
            match arch::at_s1e1r(Va::new(far)) {
                Some(ipa) => ipa,
                None => return Self::retry_walk(far),
            }
        } else {
            fault_ipa(arch::hpfar_el2(), far)
        };
        let fault = Fault {
            ipa,
            va: Va::new(far),
            kind,
            access: abort.access,
        };
        match self.vm.stage2.fault(self.cpu, &fault) {
            Resolution::Resume => {
                percpu::count(Event::Exits);
                RESUME
            }
            other => self.give_up(ipa, other),
        }
    }

    #[cold]
    fn give_up(&mut self, ipa: Ipa, resolution: Resolution) -> u64 {
        self.fault_ipa = ipa;
        match resolution {
            Resolution::NoSlot => Exit::NoSlot as u64,
            Resolution::Denied => Exit::Denied as u64,
            Resolution::TopUp => Exit::TopUp as u64,
            Resolution::Resume => RESUME,
        }
    }

    /// The guest's own tables do not translate the address any more, but its TLB did: the entry must go, or the guest
    /// would hit it, fault and come back for ever. Its next try walks.
    #[cold]
    fn retry_walk(far: u64) -> u64 {
        percpu::count(Event::Exits);
        percpu::count(Event::TlbiLocal);
        Self::forget_translation(far);
        RESUME
    }

    #[cold]
    fn rare_abort(&self, status: FaultStatus) -> u64 {
        if status != FaultStatus::TlbConflict {
            return Exit::OtherAbort as u64;
        }
        // A guest can cause these by its own break-before-make-free changes; dropping everything of this VMID here
        // removes one of the two entries whichever stage they come from (I_JCCRT).
        percpu::count(Event::Exits);
        percpu::count(Event::TlbConflicts);
        arch::tlbi_vmalls12e1();
        arch::dsb_nsh();
        RESUME
    }
}

/// The IPA that HPFAR_EL2 and FAR_EL2 report. On a stage-1 walk FAR's offset is not the walk's; nobody looks at it then.
#[inline]
fn fault_ipa(hpfar: u64, far: u64) -> Ipa {
    const FIPA: u64 = (1 << 44) - 0x10;
    const FIPA_SHIFT: u32 = 8;
    Ipa::new((hpfar & FIPA) << FIPA_SHIFT | far & (PAGE_BYTES - 1))
}

#[cfg(test)]
mod tests {
    use super::fault_ipa;
    use crate::addr::Ipa;

    #[test]
    fn the_address_is_put_together_from_two_registers() {
        assert_eq!(
            fault_ipa(0x90_0000, 0xffff_0000_1234_5018),
            Ipa::new(0x9000_0018)
        );
        assert_eq!(
            fault_ipa(1 << 63 | 0xf | 0x4000_0000, 0),
            Ipa::new(0x40_0000_0000)
        );
    }
}
