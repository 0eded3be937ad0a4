//! GICv3 and later (Arm IHI 0069H): distributor and redistributors by `arm-gic`, the CPU interface by [`crate::arch`].
//!
//! The bits that `arm-gic` calls ARE_S and EnableGrp1NS are, where a distributor has one security state or is seen from
//! the non-secure one of two, those of the only affinity routing and the only group 1 there are; both exist at the
//! same place in all views. Writes to groups are ignored where they are not ours to choose.

use alloc::vec::Vec;
use core::ops::Range;
use core::ptr::NonNull;

use arm_gic::UniqueMmioPointer;
use arm_gic::gicv3::registers::{Gicd, GicdCtlr, GicrSgi};
use arm_gic::gicv3::{GicDistributor, GicRedistributor};
use spin::Once;

use super::{ALL_SGIS, Error, bit_at, bits};
use crate::addr::{Pa, to_usize};
use crate::arch;
use crate::dev::mmio::Registers;

/// Bytes of a redistributor's frames, and of one with virtual LPIs.
const FRAMES: u64 = 0x2_0000;
const FRAMES_WITH_VLPIS: u64 = 0x4_0000;

/// Registers of the SGI frame, from the start of the redistributor.
const GICR_ISENABLER0: usize = 0x1_0100;
const GICR_ICENABLER0: usize = 0x1_0180;
const GICR_ISPENDR0: usize = 0x1_0200;
const GICR_ICPENDR0: usize = 0x1_0280;
const GICR_ISACTIVER0: usize = 0x1_0300;
const GICR_ICACTIVER0: usize = 0x1_0380;

/// Registers of the distributor.
const GICD_TYPER: usize = 0x0004;
const GICD_ISENABLER: usize = 0x0100;
const GICD_ICPENDR: usize = 0x0280;
const GICD_ICACTIVER: usize = 0x0380;
const GICD_IROUTER: usize = 0x6000;
/// GICD_IROUTER: affinities, without the bit that means any CPU.
const AFFINITIES: u64 = 0xff_00ff_ffff;

#[derive(Clone, Copy, Debug)]
struct Cpu {
    affinity: u64,
    redistributor: Registers,
}

/// A GICv3.
#[derive(Debug)]
pub struct Gic {
    distributor: Registers,
    /// The CPUs that were found; nothing for those that have no redistributor.
    found: Vec<Option<Cpu>>,
    /// Those that came up, by number.
    cpus: Once<Vec<Cpu>>,
}

impl Gic {
    /// Takes the controller over: finds each CPU's redistributor and sets the distributor up.
    ///
    /// # Safety
    ///
    /// As for [`super::Gic::new`].
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub unsafe fn new(distributor: Pa, regions: &[Range<Pa>], cpus: &[u64]) -> Result<Self, Error> {
        let gicd = NonNull::new(core::ptr::with_exposed_provenance_mut::<Gicd>(to_usize(
            distributor.raw(),
        )));
        // SAFETY: the caller vouches for the device and its exclusivity.
        let gicd = unsafe { UniqueMmioPointer::new(gicd.ok_or(Error::NotThere)?) };
        let mut gicd = GicDistributor::new(gicd);
        if gicd.pidr2().arch_rev() < 3 {
            return Err(Error::NotThere);
        }
        let mut frames = Vec::new();
        for region in regions {
            // SAFETY: the caller vouches for the regions.
            unsafe { walk_region(region, &mut frames) };
        }
        let frame_of = |affinity| frames.iter().find(|it| it.affinity == affinity).copied();
        let found: Vec<_> = cpus.iter().map(|&affinity| frame_of(affinity)).collect();
        if let (Some(None), Some(&first)) = (found.first(), cpus.first()) {
            return Err(Error::NoRedistributor(first));
        }
        gicd.modify_control(GicdCtlr::EnableGrp0 | GicdCtlr::EnableGrp1NS, false);
        gicd.enable_all_interrupts(false);
        gicd.configure_default_settings();
        // SAFETY: the caller vouches for the device; `arm-gic`'s driver of it ends here.
        let distributor = unsafe { Registers::new(distributor) };
        forget_shared(distributor);
        Ok(Self {
            distributor,
            found,
            cpus: Once::new(),
        })
    }

    pub(super) fn init_cpu(&self, found: usize, enabled: &[u32]) -> Result<(), Error> {
        let this = self.found.get(found).and_then(Option::as_ref);
        let this = this.ok_or(Error::NotThere)?;
        let frames = core::ptr::with_exposed_provenance_mut::<GicrSgi>(to_usize(
            this.redistributor.base().raw(),
        ));
        let frames = NonNull::new(frames).ok_or(Error::NotThere)?;
        // SAFETY: each CPU makes one of its own redistributor, here, once.
        let mut redistributor = GicRedistributor::new(unsafe { UniqueMmioPointer::new(frames) });
        redistributor.power_on();
        // An error says that it is awake already, which is as good.
        let (Ok(()) | Err(_)) = redistributor.mark_core_awake();
        redistributor.configure_default_settings();
        this.redistributor.write(GICR_ICPENDR0, !0);
        this.redistributor.write(GICR_ICACTIVER0, !0);
        this.redistributor
            .write(GICR_ISENABLER0, ALL_SGIS | bits(enabled));
        let beyond_15 = arch::icc_init();
        match this.affinity & 0xff {
            16.. if !beyond_15 => Err(Error::Unreachable(this.affinity)),
            _ => Ok(()),
        }
    }

    pub(super) fn reaches(&self, found: usize) -> bool {
        self.found.get(found).is_some_and(Option::is_some)
    }

    pub(super) fn number_cpus(&self, found: &[usize]) {
        self.cpus.call_once(|| {
            found
                .iter()
                .filter_map(|&it| self.found.get(it).copied().flatten())
                .collect()
        });
    }

    fn cpu(&self, cpu: usize) -> Option<&Cpu> {
        self.cpus.get()?.get(cpu)
    }

    #[inline]
    pub(super) fn send_sgi(&self, cpu: usize, sgi: u32) {
        if let Some(cpu) = self.cpu(cpu) {
            arch::icc_sgi1r(sgi_value(cpu.affinity, sgi));
        }
    }

    pub(super) fn is_active(&self, cpu: usize, intid: u32) -> bool {
        self.cpu(cpu)
            .is_some_and(|it| it.redistributor.read(GICR_ISACTIVER0) & bits(&[intid]) != 0)
    }

    /// Of a CPU's private interrupts, those that are pending or active.
    pub(super) fn in_flight(&self, cpu: usize) -> Option<u32> {
        let redistributor = self.cpu(cpu)?.redistributor;
        Some(redistributor.read(GICR_ISPENDR0) | redistributor.read(GICR_ISACTIVER0))
    }

    pub(super) fn set_active(&self, cpu: usize, intid: u32, active: bool) {
        self.write(
            cpu,
            if active {
                GICR_ISACTIVER0
            } else {
                GICR_ICACTIVER0
            },
            intid,
        );
        // The write may be posted, and must not arrive after a guest's deactivation, which is no access to memory.
        self.is_active(cpu, intid);
        arch::dsb_ld();
    }

    pub(super) fn set_enabled(&self, cpu: usize, intid: u32, enabled: bool) {
        self.write(
            cpu,
            if enabled {
                GICR_ISENABLER0
            } else {
                GICR_ICENABLER0
            },
            intid,
        );
    }

    pub(super) fn route(&self, intid: u32, cpu: usize) {
        let Some(cpu) = self.cpu(cpu) else {
            return;
        };
        let [a, b, c, d, e, f, g, h] = (cpu.affinity & AFFINITIES).to_le_bytes();
        let router = GICD_IROUTER + 8 * intid as usize;
        self.distributor
            .write(router, u32::from_le_bytes([a, b, c, d]));
        self.distributor
            .write(router + 4, u32::from_le_bytes([e, f, g, h]));
        let (register, bit) = bit_at(GICD_ISENABLER, intid);
        self.distributor.write(register, bit);
    }

    fn write(&self, cpu: usize, register: usize, intid: u32) {
        if let Some(cpu) = self.cpu(cpu) {
            cpu.redistributor.write(register, bits(&[intid]));
        }
    }
}

/// No shared interrupt is pending or active: whoever acknowledged one before does not end it any more.
fn forget_shared(distributor: Registers) {
    let lines = (distributor.read(GICD_TYPER) & 0x1f) as usize + 1;
    for word in 1..lines {
        distributor.write(GICD_ICPENDR + 4 * word, !0);
        distributor.write(GICD_ICACTIVER + 4 * word, !0);
    }
}

/// ICC_SGI1R_EL1 for one CPU: Aff3 63:48 (of which 8 are used), range selector 47:44, Aff2 39:32, INTID 27:24, Aff1
/// 23:16, one of sixteen CPUs 15:0.
const fn sgi_value(affinity: u64, sgi: u32) -> u64 {
    let [aff0, aff1, aff2, _, aff3, ..] = affinity.to_le_bytes();
    (aff3 as u64) << 48
        | ((aff0 >> 4) as u64) << 44
        | (aff2 as u64) << 32
        | (sgi as u64 & 0xf) << 24
        | (aff1 as u64) << 16
        | 1 << (aff0 & 0xf)
}

/// Lists the redistributors of one region, which ends at its Last or where it ends.
///
/// # Safety
///
/// Redistributors are mapped there.
unsafe fn walk_region(region: &Range<Pa>, found: &mut Vec<Cpu>) {
    let mut at = region.start;
    while let Some(end) = at.checked_add(FRAMES)
        && end <= region.end
        && let Some(frames) = NonNull::new(core::ptr::with_exposed_provenance_mut::<GicrSgi>(
            to_usize(at.raw()),
        ))
    {
        // SAFETY: the caller vouches for the region; no other pointer to it is in use during boot.
        let typer = GicRedistributor::new(unsafe { UniqueMmioPointer::new(frames) }).typer();
        // SAFETY: as above, and this driver names registers only.
        let redistributor = unsafe { Registers::new(at) };
        found.push(Cpu {
            affinity: typer.core_mpidr(),
            redistributor,
        });
        let stride = if typer.virtual_lpis_supported() {
            FRAMES_WITH_VLPIS
        } else {
            FRAMES
        };
        match at.checked_add(stride) {
            Some(next) if !typer.last_redistributor() => at = next,
            _ => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use spin::Once;

    use super::{
        Cpu, GICD_ICACTIVER, GICD_ICPENDR, GICD_TYPER, GICR_ICACTIVER0, GICR_ISACTIVER0, Gic,
        forget_shared, sgi_value,
    };
    use crate::addr::Pa;
    use crate::dev::mmio::Registers;
    use crate::dev::posted::{Device, Done};

    const TIMER: u32 = 1 << 27;

    /// A controller of one CPU, whose redistributor is a fake one.
    fn controller() -> Gic {
        // SAFETY: while a fake device is plugged in, nothing is at any address.
        let registers = unsafe { Registers::new(Pa::new(0)) };
        let cpu = Cpu {
            affinity: 0,
            redistributor: registers,
        };
        Gic {
            distributor: registers,
            found: [Some(cpu)].into(),
            cpus: Once::initialized([cpu].into()),
        }
    }

    #[test]
    fn the_active_state_is_there_before_a_guest_can_end_the_interrupt() {
        let redistributor = Device::plug(0, |active, register, bits| match register {
            GICR_ISACTIVER0 => *active |= bits,
            GICR_ICACTIVER0 => *active &= !bits,
            _ => {}
        });
        let gic = controller();
        gic.set_active(0, 27, true);
        assert_eq!(
            redistributor.take_done(),
            [
                Done::Write(GICR_ISACTIVER0, TIMER),
                Done::Read(GICR_ISACTIVER0),
                Done::WaitedForReads
            ]
        );
        // ICC_EOIR1_EL1 or ICC_DIR_EL1: on its own way to the controller.
        redistributor.change(|active| *active &= !TIMER);
        redistributor.settle();
        assert_eq!(redistributor.change(|_| ()), 0, "it stays active for ever");
        gic.set_active(0, 27, true);
        gic.set_active(0, 27, false);
        assert_eq!(redistributor.change(|_| ()), 0);
    }

    #[test]
    fn no_shared_interrupt_stays_active_that_was_before() {
        let distributor = Device::plug(2, |_, _, _| ());
        // SAFETY: while a fake device is plugged in, nothing is at any address.
        forget_shared(unsafe { Registers::new(Pa::new(0)) });
        let all = |register: usize| Done::Write(register, !0);
        assert_eq!(
            distributor.take_done(),
            [
                Done::Read(GICD_TYPER),
                all(GICD_ICPENDR + 4),
                all(GICD_ICACTIVER + 4),
                all(GICD_ICPENDR + 8),
                all(GICD_ICACTIVER + 8),
            ]
        );
    }

    #[test]
    fn an_sgi_names_its_cpu_by_affinity() {
        assert_eq!(sgi_value(0x0, 0), 1);
        assert_eq!(sgi_value(0x10f, 3), 1 << 16 | 3 << 24 | 1 << 15);
        assert_eq!(
            sgi_value(0x1_0027_0100, 1),
            1 << 48 | 0x27 << 32 | 1 << 24 | 1 << 16 | 1
        );
        assert_eq!(sgi_value(0x1f, 0), 1 << 44 | 1 << 15);
    }
}
