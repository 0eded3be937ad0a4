//! The short paths: what the vectors call with x19 to x29 of the guest still in place.
//!
//! A stage-2 abort that the MMU resolves, an access to an emulated device, an SGI sent and an interrupt taken return from here
//! straight to the guest. Nothing is allocated. Nothing is waited for but the locks of the MMU and of the device, which are held
//! for a moment only, and siblings that have interrupts listed which the guest looks at or turns off: their CPUs take these back
//! at once, and whoever waits has none listed ([`access`](crate::vm::vgic::access)). What a device sends out is left to others
//! where somebody else has the wire ([`console`](crate::vm::console)). Whatever is rare leaves the guest for the run loop.

use crate::addr::{Ipa, PAGE_BYTES, Va};
use crate::arch;
use crate::arch::context::{Exit, Frame, Verdict};
use crate::mmu::{Access, Fault, FaultKind, Resolution};
use crate::sync::percpu;
use crate::trace::Event;
use crate::vm::resident::Resident;
use crate::vm::trap::{self, FaultStatus};
use crate::vm::vm;

/// Judges a stage-2 abort that is no translation fault.
#[unsafe(no_mangle)]
extern "C" fn guest_abort(frame: *mut Frame, esr: u64) -> Verdict {
    // SAFETY: the frame that was entered is the first field of this CPU's resident vCPU, whose run loop is suspended in
    // `arch::enter` meanwhile.
    let resident = unsafe { &mut *frame.cast::<Resident<'_>>() };
    if is_watched() {
        return watched(|| resident.judge_abort_apart(esr));
    }
    resident.judge_abort(esr)
}

/// Judges a translation fault of stage 2: memory that is not mapped yet, or a device. `kept`: whether x19 to x29 are in the frame.
#[unsafe(no_mangle)]
extern "C" fn guest_translation(frame: *mut Frame, esr: u64, kept: bool) -> Verdict {
    // SAFETY: as for `guest_abort`.
    let resident = unsafe { &mut *frame.cast::<Resident<'_>>() };
    if is_watched() {
        return watched(|| resident.judge_translation(esr, kept));
    }
    resident.judge_translation(esr, kept)
}

/// Judges a trapped system register. `kept`: whether x19 to x29 are in the frame.
#[unsafe(no_mangle)]
extern "C" fn guest_register(frame: *mut Frame, esr: u64, kept: bool) -> Verdict {
    // SAFETY: as for `guest_abort`.
    let resident = unsafe { &mut *frame.cast::<Resident<'_>>() };
    if is_watched() {
        return watched(|| resident.judge_register(esr, kept));
    }
    resident.judge_register(esr, kept)
}

/// Takes the physical interrupt that ended a guest's run.
#[unsafe(no_mangle)]
extern "C" fn guest_interrupt(frame: *mut Frame) -> Verdict {
    // SAFETY: as for `guest_abort`.
    let resident = unsafe { &mut *frame.cast::<Resident<'_>>() };
    if is_watched() {
        return watched(|| resident.judge_interrupt());
    }
    resident.judge_interrupt()
}

#[inline(always)]
fn is_watched() -> bool {
    percpu::this().exit_times.is_watched()
}

/// A path whose time is measured, or whose guest steps; apart, so that the path that is neither is straight. A step over an
/// instruction that was done for the guest ends here.
#[cold]
#[inline(never)]
fn watched(judge: impl FnOnce() -> Verdict) -> Verdict {
    let times = &percpu::this().exit_times;
    let begun = times.begin();
    let trapped = arch::elr_el2();
    let verdict = judge();
    if arch::elr_el2() != trapped {
        arch::end_step();
    }
    times.end(begun);
    verdict
}

impl Resident<'_> {
    #[inline(always)]
    fn judge_translation(&mut self, esr: u64, kept: bool) -> Verdict {
        let ipa = fault_ipa(arch::hpfar_el2(), arch::far_el2());
        // No memory is below RAM but devices: emulated ones, and what GICv2 maps.
        if ipa < vm::RAM
            && let Some(verdict) = self.access_device_quickly(ipa, esr, kept)
        {
            return verdict;
        }
        self.judge_abort_apart(esr)
    }

    #[inline(never)]
    fn judge_abort_apart(&mut self, esr: u64) -> Verdict {
        self.judge_abort(esr)
    }

    #[inline(always)]
    fn judge_abort(&mut self, esr: u64) -> Verdict {
        let (kind, access, unpromised) = if trap::is_forbidden_store(esr) {
            (FaultKind::Permission, Access::Write, true)
        } else if trap::is_store_to_old(esr) {
            (FaultKind::AccessFlag, Access::Write, false)
        } else {
            let abort = trap::abort(esr);
            let FaultStatus::Stage2(kind) = abort.status else {
                return self.rare_abort(abort.status);
            };
            let is_walk = abort.stage1_walk;
            if is_walk && kind == FaultKind::Permission && self.walked_device() {
                return Verdict::leave(Exit::Denied);
            }
            (
                kind,
                abort.access,
                kind == FaultKind::Permission && !is_walk,
            )
        };
        let far = arch::far_el2();
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
            access,
        };
        match self.vm.stage2.fault(self.cpu, &fault) {
            Resolution::Resume => {
                percpu::count(Event::Exits);
                Verdict::RESUME
            }
            other => self.give_up(ipa, other),
        }
    }

    /// Whether the guest's tables are where a device is, which HCR_EL2.PTW forbids: nothing that stage 2 could permit.
    #[cold]
    fn walked_device(&mut self) -> bool {
        self.fault_ipa = fault_ipa(arch::hpfar_el2(), 0);
        self.fault_ipa < vm::RAM
    }

    #[cold]
    fn give_up(&mut self, ipa: Ipa, resolution: Resolution) -> Verdict {
        self.fault_ipa = ipa;
        match resolution {
            Resolution::NoSlot => Verdict::leave(Exit::NoSlot),
            Resolution::Denied => Verdict::leave(Exit::Denied),
            Resolution::TopUp => Verdict::leave(Exit::TopUp),
            Resolution::Resume => Verdict::RESUME,
        }
    }

    /// The guest's own tables do not translate the address any more, but its TLB did: the entry must go, or the guest
    /// would hit it, fault and come back for ever. Its next try walks.
    #[cold]
    fn retry_walk(far: u64) -> Verdict {
        percpu::count(Event::Exits);
        percpu::count(Event::TlbiLocal);
        Self::forget_translation(far);
        Verdict::RESUME
    }

    #[cold]
    fn rare_abort(&self, status: FaultStatus) -> Verdict {
        if status != FaultStatus::TlbConflict {
            return Verdict::leave(Exit::OtherAbort);
        }
        // A guest can cause these by its own break-before-make-free changes; dropping everything of this VMID here
        // removes one of the two entries whichever stage they come from (I_JCCRT).
        percpu::count(Event::Exits);
        percpu::count(Event::TlbConflicts);
        arch::tlbi_vmalls12e1();
        arch::dsb_nsh();
        Verdict::RESUME
    }
}

/// The IPA that HPFAR_EL2 and FAR_EL2 report, but on a Cortex-A57 of erratum 834220, which is not worked around. On a stage-1 walk FAR's offset is not the walk's; nobody looks at it then.
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
