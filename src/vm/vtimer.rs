//! The virtual timer: the guest programs CNTV itself, and its interrupt is linked to the physical one.
//!
//! | moment | physical interrupt |
//! |---|---|
//! | the timer fires | EL2 takes it, drops the priority, leaves it active; the model *holds* it |
//! | the guest deactivates the virtual one | hardware deactivates the physical one, too |
//! | the line drops before the guest took it | deactivated by EL2 when it is next listed, or its pending state is read |
//! | the vCPU leaves the CPU | deactivated; pending or not follows the line when it is loaded again |
//! | it comes to a CPU, held | made active there, before the timer is enabled |

use crate::arch;
use crate::sync::quiescence::CpuId;
use crate::vm::host::Host;
use crate::vm::vgic::private::Private;

/// The virtual timer's interrupt in every guest.
pub const INTID: u8 = 27;

/// Virtual and physical number of the timer's interrupt.
pub(crate) fn link(host: &Host) -> (u8, u16) {
    (
        INTID,
        u16::try_from(host.machine.interrupts.virtual_timer).unwrap_or(u16::from(INTID)),
    )
}

/// EL2 has taken the physical interrupt of the resident vCPU's timer.
pub(crate) fn fired(private: &mut Private) {
    private.hold(INTID);
}

/// The vCPU is about to be loaded: what its guest has taken and not deactivated is active on this CPU, too.
pub(crate) fn load(host: &Host, cpu: CpuId, private: &Private) {
    if private.holds() {
        set_active(host, cpu, true);
    }
}

/// Whether the resident guest would be given the timer's interrupt now, had the timer fired: it is enabled, and EL2 has not
/// taken it yet.
pub(crate) fn is_wanted(private: &Private) -> bool {
    !private.holds() && private.is_enabled(INTID)
}

/// Tick of the physical counter at which the resident vCPU's timer would wake its guest. The list registers are taken back.
pub(crate) fn wakes_at(private: &Private) -> Option<u64> {
    arch::virtual_timer_deadline().filter(|_| is_wanted(private))
}

/// The vCPU leaves: its physical interrupt is another's now.
pub(crate) fn put(host: &Host, cpu: CpuId, private: &mut Private) {
    if !private.holds() {
        return;
    }
    set_active(host, cpu, false);
    if !private.handles(INTID) {
        // Untaken, it follows the timer's line again wherever the vCPU is loaded next.
        private.let_go();
    }
}

/// The line dropped before the guest took the interrupt.
pub(crate) fn deactivate(host: &Host, cpu: CpuId) {
    set_active(host, cpu, false);
}

fn set_active(host: &Host, cpu: CpuId, active: bool) {
    host.gic
        .set_active(cpu.0, host.machine.interrupts.virtual_timer, active);
}
