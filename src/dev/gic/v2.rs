//! GICv2 (Arm IHI 0048B): GIC-400 and QEMU's.
//!
//! `arm-gic`'s GICv2 driver is not used: it enables groups as a secure world sees them, ends interrupts in one step,
//! and its priority setter clears three neighbours. What is done here is right with one security state and with two:
//! group 0 is asked for, which a non-secure world's distributor ignores and presents as the only group there is.

use core::sync::atomic::{AtomicU32, Ordering};

use spin::Once;

use super::{ALL_SGIS, PRIORITIES, PRIVATE, bit_at, bits};
use crate::addr::Pa;
use crate::arch;
use crate::dev::machine::MOST_CPUS_GICV2;
use crate::dev::mmio::Registers;

const GICD_CTLR: usize = 0x000;
const GICD_TYPER: usize = 0x004;
const GICD_IGROUPR: usize = 0x080;
const GICD_ISENABLER: usize = 0x100;
const GICD_ICENABLER: usize = 0x180;
const GICD_ISPENDR: usize = 0x200;
const GICD_ICPENDR: usize = 0x280;
const GICD_ISACTIVER: usize = 0x300;
const GICD_ICACTIVER: usize = 0x380;
const GICD_IPRIORITYR: usize = 0x400;
const GICD_ITARGETSR: usize = 0x800;
const GICD_SGIR: usize = 0xf00;

const GICC_CTLR: usize = 0x00;
const GICC_PMR: usize = 0x04;
const GICC_BPR: usize = 0x08;
const GICC_IAR: usize = 0x0c;
const GICC_EOIR: usize = 0x10;
const GICC_APR: usize = 0xd0;
const GICC_NSAPR: usize = 0xe0;
const GICC_DIR: usize = 0x1000;

const GICH_HCR: usize = 0x000;
const GICH_VTR: usize = 0x004;
const GICH_VMCR: usize = 0x008;
const GICH_APR: usize = 0x0f0;
const GICH_LR: usize = 0x100;

/// GICC_CTLR: the group signals, and EOImode splits the end of an interrupt in two.
const ENABLE_SPLIT_END: u32 = 1 << 0 | 1 << 9;
/// First of the INTIDs that mean "nothing to take".
const SPECIAL: u32 = 1020;
const INTID: u32 = 0x3ff;

/// A GICv2.
#[derive(Debug)]
pub struct Gic {
    distributor: Registers,
    cpu_interface: Registers,
    hypervisor_interface: Registers,
    /// The bit by which the distributor names each CPU that was found; written by that CPU.
    own: [AtomicU32; MOST_CPUS_GICV2],
    /// The same, by number.
    targets: Once<[u32; MOST_CPUS_GICV2]>,
}

impl Gic {
    /// Takes the controller over: everything off, then its shared part set up.
    ///
    /// # Safety
    ///
    /// As for [`super::Gic::new`].
    pub unsafe fn new(distributor: Pa, cpu_interface: Pa, hypervisor_interface: Pa) -> Self {
        // SAFETY: the caller vouches for all three, and this driver names registers only.
        let [distributor, cpu_interface, hypervisor_interface] =
            [distributor, cpu_interface, hypervisor_interface]
                .map(|it| unsafe { Registers::new(it) });
        distributor.write(GICD_CTLR, 0);
        let lines = (distributor.read(GICD_TYPER) & 0x1f) as usize + 1;
        for word in 1..lines {
            distributor.write(GICD_ICENABLER + 4 * word, !0);
            distributor.write(GICD_ICPENDR + 4 * word, !0);
            distributor.write(GICD_ICACTIVER + 4 * word, !0);
            distributor.write(GICD_IGROUPR + 4 * word, 0);
            for priority in 8 * word..8 * (word + 1) {
                distributor.write(GICD_IPRIORITYR + 4 * priority, PRIORITIES);
            }
        }
        distributor.write(GICD_CTLR, 1);
        Self {
            distributor,
            cpu_interface,
            hypervisor_interface,
            own: Default::default(),
            targets: Once::new(),
        }
    }

    pub(super) fn init_cpu(&self, found: usize, enabled: &[u32]) {
        let gicd = self.distributor;
        gicd.write(GICD_ICENABLER, !0);
        gicd.write(GICD_ICPENDR, !0);
        gicd.write(GICD_ICACTIVER, !0);
        gicd.write(GICD_IGROUPR, 0);
        for priority in 0..PRIVATE as usize / 4 {
            gicd.write(GICD_IPRIORITYR + 4 * priority, PRIORITIES);
        }
        gicd.write(GICD_ISENABLER, ALL_SGIS | bits(enabled));
        if let Some(slot) = self.own.get(found) {
            slot.store(self.own_target(), Ordering::Release);
        }
        self.rest_virtual_interface();
        self.cpu_interface.write(GICC_CTLR, 0);
        // What was acknowledged and never ended keeps its priority active, and nothing less urgent is signalled.
        for register in 0..4 {
            self.cpu_interface.write(GICC_APR + 4 * register, 0);
            self.cpu_interface.write(GICC_NSAPR + 4 * register, 0);
        }
        self.cpu_interface.write(GICC_PMR, 0xff);
        self.cpu_interface.write(GICC_BPR, 0);
        self.cpu_interface.write(GICC_CTLR, ENABLE_SPLIT_END);
    }

    pub(super) fn number_cpus(&self, found: &[usize]) {
        self.targets.call_once(|| {
            core::array::from_fn(|cpu| {
                let slot = found.get(cpu).and_then(|&it| self.own.get(it));
                slot.map_or(0, |it| it.load(Ordering::Acquire))
            })
        });
    }

    fn rest_virtual_interface(&self) {
        let gich = self.hypervisor_interface;
        gich.write(GICH_HCR, 0);
        gich.write(GICH_VMCR, 0);
        gich.write(GICH_APR, 0);
        let list_registers = (gich.read(GICH_VTR) & 0x3f) as usize + 1;
        for list in 0..list_registers {
            gich.write(GICH_LR + 4 * list, 0);
        }
    }

    #[inline]
    pub(super) fn acknowledge(&self) -> Option<u32> {
        let iar = self.cpu_interface.read(GICC_IAR);
        // Whoever sent the interrupt wrote first; what it wrote must not be read before this.
        arch::dsb_ld();
        (iar & INTID < SPECIAL).then_some(iar)
    }

    #[inline]
    pub(super) fn end(&self, iar: u32) {
        self.cpu_interface.write(GICC_EOIR, iar);
    }

    #[inline]
    pub(super) fn deactivate(&self, iar: u32) {
        self.cpu_interface.write(GICC_DIR, iar);
    }

    #[inline]
    pub(super) fn send_sgi(&self, cpu: usize, sgi: u32) {
        let Some(target) = self.targets.get().and_then(|it| it.get(cpu)) else {
            return;
        };
        arch::dsb_ishst();
        self.distributor.write(GICD_SGIR, target << 16 | sgi & 0xf);
    }

    pub(super) fn is_active(&self, intid: u32) -> bool {
        self.distributor.read(GICD_ISACTIVER) & bits(&[intid]) != 0
    }

    /// Of a CPU's private interrupts, those that are pending or active, if it is this CPU.
    pub(super) fn in_flight(&self, cpu: usize) -> Option<u32> {
        let gicd = self.distributor;
        let target = self.targets.get()?.get(cpu)?;
        let is_own = self.own_target() == *target;
        is_own.then(|| gicd.read(GICD_ISPENDR) | gicd.read(GICD_ISACTIVER))
    }

    /// This CPU's bit, which its own target registers read as; on a machine of one CPU they read as zero.
    fn own_target(&self) -> u32 {
        (self.distributor.read(GICD_ITARGETSR) & 0xff).max(1)
    }

    pub(super) fn set_active(&self, intid: u32, active: bool) {
        self.distributor.write(
            if active {
                GICD_ISACTIVER
            } else {
                GICD_ICACTIVER
            },
            bits(&[intid]),
        );
        // The write may be posted, and must not arrive after a guest's deactivation.
        self.distributor.read(GICD_ISACTIVER);
        arch::dsb_ld();
    }

    pub(super) fn set_enabled(&self, intid: u32, enabled: bool) {
        self.distributor.write(
            if enabled {
                GICD_ISENABLER
            } else {
                GICD_ICENABLER
            },
            bits(&[intid]),
        );
    }

    pub(super) fn route(&self, intid: u32, cpu: usize) {
        let Some(target) = self.targets.get().and_then(|it| it.get(cpu)) else {
            return;
        };
        let shift = 8 * (intid % 4);
        let targets = GICD_ITARGETSR + (intid & !3) as usize;
        let others = self.distributor.read(targets) & !(0xff << shift);
        self.distributor.write(targets, others | target << shift);
        let (register, bit) = bit_at(GICD_ISENABLER, intid);
        self.distributor.write(register, bit);
    }

    /// GICH of the CPU that asks.
    pub fn hypervisor_interface(&self) -> Registers {
        self.hypervisor_interface
    }
}

#[cfg(test)]
mod tests {
    use spin::Once;

    use super::{
        ENABLE_SPLIT_END, GICC_APR, GICC_CTLR, GICC_IAR, GICC_NSAPR, GICD_ICACTIVER,
        GICD_ISACTIVER, Gic,
    };
    use crate::addr::Pa;
    use crate::dev::mmio::Registers;
    use crate::dev::posted::{Device, Done};

    const TIMER: u32 = 1 << 27;

    fn controller() -> Gic {
        // SAFETY: while a fake device is plugged in, nothing is at any address.
        let registers = unsafe { Registers::new(Pa::new(0)) };
        Gic {
            distributor: registers,
            cpu_interface: registers,
            hypervisor_interface: registers,
            own: Default::default(),
            targets: Once::new(),
        }
    }

    #[test]
    fn no_priority_stays_active_that_was_before() {
        let device = Device::plug(0, |_, _, _| ());
        controller().init_cpu(0, &[]);
        let done = device.take_done();
        let at = |wanted| done.iter().position(|it| *it == wanted);
        let enabled = at(Done::Write(GICC_CTLR, ENABLE_SPLIT_END));
        for register in (0..16).step_by(4) {
            for first in [GICC_APR, GICC_NSAPR] {
                let forgotten = at(Done::Write(first + register, 0));
                assert!(forgotten.is_some() && forgotten < enabled);
            }
        }
    }

    #[test]
    fn nothing_is_read_before_the_interrupt_that_announces_it() {
        let device = Device::plug(3 << 10 | 1, |_, _, _| ());
        assert_eq!(controller().acknowledge(), Some(3 << 10 | 1));
        assert_eq!(
            device.take_done(),
            [Done::Read(GICC_IAR), Done::WaitedForReads]
        );
    }

    #[test]
    fn the_active_state_is_there_before_a_guest_can_end_the_interrupt() {
        let device = Device::plug(0, |active, register, bits| match register {
            GICD_ISACTIVER => *active |= bits,
            GICD_ICACTIVER => *active &= !bits,
            _ => {}
        });
        let gic = controller();
        gic.set_active(27, true);
        // GICV_EOIR or GICV_DIR: another device, as far as the bus knows.
        device.change(|active| *active &= !TIMER);
        device.settle();
        assert_eq!(device.change(|_| ()), 0, "it stays active for ever");
        gic.set_active(27, true);
        gic.set_active(27, false);
        assert_eq!(device.change(|_| ()), 0);
    }
}
