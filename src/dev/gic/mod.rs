//! The physical interrupt controller, as seen from EL2.
//!
//! EOImode = 1 on both versions: taking an interrupt is [`Gic::acknowledge`], then [`Gic::priority_drop`] at once, then
//! [`Gic::deactivate`] unless the interrupt is handed to a guest, whose own end of interrupt deactivates it.
//!
//! Everything a CPU does here is on its own interface or a write-only register, so nothing is locked; what is not
//! (the distributor's set-up) happens once, on the boot CPU, before the others run.

pub mod v2;
pub mod v3;

use super::machine;
use crate::arch;

/// The kick: makes a CPU look at its work.
pub const KICK: u32 = 0;

/// Number of private interrupts.
const PRIVATE: u32 = 32;
/// The first INTID that no shared interrupt has.
const END_OF_SHARED: u32 = 1020;
/// Priority of all interrupts, in the half that a non-secure world may use.
const PRIORITY: u32 = 0x80;

/// An interrupt that was taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Irq(u32);

impl Irq {
    /// Which interrupt it is. The rest of the acknowledged value (GICv2: the sender of an SGI) is kept inside.
    pub const fn intid(self) -> u32 {
        const INTID: u32 = 0xff_ffff;
        const V2_INTID: u32 = 0x3ff;
        // GICv2 puts an SGI's sender above bit 9; GICv3 has no SGIs there, and its LPIs start at 8192.
        if self.0 < 8192 {
            self.0 & V2_INTID
        } else {
            self.0 & INTID
        }
    }
}

/// Why the controller cannot be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Error {
    /// No redistributor answers for this CPU, which has this affinity.
    NoRedistributor(u64),
    /// The distributor is not what the device tree says.
    NotThere,
    /// An SGI cannot reach a CPU of this affinity.
    Unreachable(u64),
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NoRedistributor(mpidr) => {
                write!(f, "no GIC redistributor answers for CPU {mpidr:#x}")
            }
            Self::NotThere => write!(
                f,
                "the interrupt controller is not where the device tree says"
            ),
            Self::Unreachable(mpidr) => {
                write!(f, "the GIC cannot send interrupts to CPU {mpidr:#x}")
            }
        }
    }
}

/// The controller of this machine.
#[derive(Debug)]
pub enum Gic {
    /// GICv2.
    V2(v2::Gic),
    /// GICv3 or later.
    V3(v3::Gic),
}

impl Gic {
    /// Takes the controller over and sets its shared part up for CPUs of the given affinities, the first of which is this
    /// one. Others may have no redistributor; see [`Gic::reaches`].
    ///
    /// # Safety
    ///
    /// The devices are where `description` says, mapped as device memory for ever, and driven by nobody else.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub unsafe fn new(description: &machine::Gic, cpus: &[u64]) -> Result<Self, Error> {
        match *description {
            machine::Gic::V2 {
                distributor,
                cpu_interface,
                hypervisor_interface,
                ..
            } => {
                // SAFETY: the caller's duty.
                Ok(Self::V2(unsafe {
                    v2::Gic::new(distributor, cpu_interface, hypervisor_interface)
                }))
            }
            machine::Gic::V3 {
                distributor,
                ref redistributors,
            } => {
                // SAFETY: the caller's duty.
                Ok(Self::V3(unsafe {
                    v3::Gic::new(distributor, redistributors, cpus)
                }?))
            }
        }
    }

    /// Sets this CPU's interface up, all SGIs and the `enabled` private interrupts included. Once per CPU; `found` is
    /// its position among the affinities that [`Gic::new`] was given.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn init_cpu(&self, found: usize, enabled: &[u32]) -> Result<(), Error> {
        match self {
            Self::V2(gic) => {
                gic.init_cpu(found, enabled);
                Ok(())
            }
            Self::V3(gic) => gic.init_cpu(found, enabled),
        }
    }

    /// Whether the CPU at position `found` among the affinities that [`Gic::new`] was given can get interrupts at all.
    pub fn reaches(&self, found: usize) -> bool {
        match self {
            Self::V2(_) => true,
            Self::V3(gic) => gic.reaches(found),
        }
    }

    /// Numbers the CPUs that came up: from here on CPU `n` of every other call is the one found at `found[n]`.
    pub fn number_cpus(&self, found: &[usize]) {
        match self {
            Self::V2(gic) => gic.number_cpus(found),
            Self::V3(gic) => gic.number_cpus(found),
        }
    }

    /// 2 or 3.
    pub const fn version(&self) -> u32 {
        match self {
            Self::V2(_) => 2,
            Self::V3(_) => 3,
        }
    }

    /// Takes the most urgent interrupt pending for this CPU.
    #[inline]
    pub fn acknowledge(&self) -> Option<Irq> {
        match self {
            Self::V2(gic) => gic.acknowledge().map(Irq),
            Self::V3(_) => arch::icc_iar1().map(Irq),
        }
    }

    /// Lets interrupts as urgent as `irq` come again; `irq` itself stays active.
    #[inline]
    pub fn priority_drop(&self, irq: Irq) {
        match self {
            Self::V2(gic) => gic.end(irq.0),
            Self::V3(_) => arch::icc_eoir1(irq.0),
        }
    }

    /// Lets `irq` come again.
    #[inline]
    pub fn deactivate(&self, irq: Irq) {
        match self {
            Self::V2(gic) => gic.deactivate(irq.0),
            Self::V3(_) => arch::icc_dir(irq.0),
        }
    }

    /// Interrupts the CPU at position `cpu`; what this CPU wrote before is visible to it then.
    #[inline]
    pub fn send_sgi(&self, cpu: usize, sgi: u32) {
        match self {
            Self::V2(gic) => gic.send_sgi(cpu, sgi),
            Self::V3(gic) => gic.send_sgi(cpu, sgi),
        }
    }

    /// Whether the private interrupt `intid` of this CPU, which is at position `cpu`, is active.
    pub fn is_active(&self, cpu: usize, intid: u32) -> bool {
        match self {
            Self::V2(gic) => gic.is_active(intid),
            Self::V3(gic) => gic.is_active(cpu, intid),
        }
    }

    /// Of the SGIs and `intid`, which is private, those that are pending or active on the CPU at position `cpu`, one bit each.
    /// `None`: it is another CPU, and the controller a GICv2, where only the CPU itself sees them.
    pub fn in_flight(&self, cpu: usize, intid: u32) -> Option<u32> {
        let found = match self {
            Self::V2(gic) => gic.in_flight(cpu),
            Self::V3(gic) => gic.in_flight(cpu),
        };
        found.map(|found| found & (ALL_SGIS | bits(&[intid])))
    }

    /// Makes the private interrupt `intid` of this CPU, which is at position `cpu`, active or inactive. It is when this returns.
    pub fn set_active(&self, cpu: usize, intid: u32, active: bool) {
        match self {
            Self::V2(gic) => gic.set_active(intid, active),
            Self::V3(gic) => gic.set_active(cpu, intid, active),
        }
    }

    /// Sends the shared interrupt `intid`, which is a level, to the CPU at position `cpu` from here on. On the boot CPU only.
    pub fn route(&self, intid: u32, cpu: usize) {
        if (PRIVATE..END_OF_SHARED).contains(&intid) {
            match self {
                Self::V2(gic) => gic.route(intid, cpu),
                Self::V3(gic) => gic.route(intid, cpu),
            }
        }
    }

    /// Enables or disables the private interrupt `intid` of this CPU, which is at position `cpu`.
    pub fn set_enabled(&self, cpu: usize, intid: u32, enabled: bool) {
        match self {
            Self::V2(gic) => gic.set_enabled(intid, enabled),
            Self::V3(gic) => gic.set_enabled(cpu, intid, enabled),
        }
    }
}

/// The bits of `intids`, all private, in a register of one bit each.
fn bits(intids: &[u32]) -> u32 {
    intids
        .iter()
        .filter(|&&it| it < PRIVATE)
        .fold(0, |bits, &it| bits | 1 << it)
}

/// Where the register of one bit for `intid` is among those from `first` on, and the bit.
fn bit_at(first: usize, intid: u32) -> (usize, u32) {
    (first + 4 * (intid / 32) as usize, 1 << (intid % 32))
}

/// The four priorities of one priority register.
const PRIORITIES: u32 = PRIORITY * 0x0101_0101;

/// The SGIs, one bit each.
const ALL_SGIS: u32 = 0xffff;

#[cfg(test)]
mod tests {
    use super::bit_at;

    #[test]
    fn each_interrupt_has_its_bit() {
        assert_eq!(bit_at(0x100, 33), (0x104, 2));
        assert_eq!(bit_at(0x100, 1019), (0x17c, 1 << 27));
    }
}
