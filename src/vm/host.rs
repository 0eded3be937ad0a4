//! What all VMs of this machine share: made by boot, once, and never changed.

use alloc::sync::Arc;

use spin::Once;

use crate::arch::features::{Features, IdRegisters};
use crate::arch::mitigations::Mitigations;
use crate::dev::gic::{Gic, KICK};
use crate::dev::machine::{Machine, QEMU_VIRT};
use crate::mmu::{AccessFlag, Bbm, Engine, Services};
use crate::sync::percpu;
use crate::trace::Event;
use crate::trace::ring::Mark;

/// The machine as VMs use it. CPUs are numbered from 0, which is the controller's and runs no guest.
pub struct Host {
    /// What the firmware tables told.
    pub machine: Machine,
    /// The physical interrupt controller.
    pub gic: &'static Gic,
    /// What the weakest CPU can do.
    pub features: Features,
    /// The identification registers of a CPU that has what all of them have.
    pub identification: IdRegisters,
    /// Where the CPUs stand towards attacks on branch predictors: the worst of them.
    pub mitigations: Mitigations,
    /// What the MMUs share: grace periods, VMIDs, frames for tables.
    pub services: Arc<Services>,
}

impl core::fmt::Debug for Host {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Host")
            .field("machine", &self.machine)
            .field("features", &self.features)
            .finish_non_exhaustive()
    }
}

static HOST: Once<Host> = Once::new();

/// Makes CPU `cpu` look at its work. What the caller wrote before is visible to it then.
pub fn kick(gic: &Gic, cpu: usize) {
    percpu::count(Event::Kicks);
    percpu::this()
        .ring
        .record(Mark::Kick, [cpu as u64, u64::from(KICK)]);
    gic.send_sgi(cpu, KICK);
}

impl Host {
    /// The version of the interrupt controller, and so of the guests'.
    pub fn gic_version(&self) -> u32 {
        self.gic.version()
    }

    /// The break-before-make level that VMs may rely on: 2 where every CPU has it and none raises TLB conflict aborts, which
    /// an emulated one never does; a real one has to be known for it, because a conflict may surface inside a guest.
    pub fn auto_bbm(&self) -> Bbm {
        let emulated = self.machine.board == QEMU_VIRT;
        if self.features.bbm >= 2 && (emulated || self.features.bbm_without_conflicts) {
            Bbm::Two
        } else {
            Bbm::Zero
        }
    }

    /// The engine that takes least time to protect everything on this machine.
    pub fn auto_engine(&self) -> Engine {
        if self.features.s2pie {
            Engine::Pie
        } else {
            Engine::Swap
        }
    }

    /// Who sets access flags on this machine if nobody says otherwise.
    pub fn auto_access_flag(&self) -> AccessFlag {
        if self.features.hardware_access_flag {
            AccessFlag::Hardware
        } else {
            AccessFlag::Software
        }
    }

    /// Number of CPUs that run.
    pub fn cpus(&self) -> usize {
        self.services.quiescence.cpus()
    }
}

/// Makes `host` known to every CPU. Called once, by boot.
pub fn install(host: Host) -> &'static Host {
    HOST.call_once(|| host)
}

/// The machine, or `None` before boot has installed it.
#[inline]
pub fn get() -> Option<&'static Host> {
    HOST.get()
}
