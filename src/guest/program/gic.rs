//! The guest's interrupt controller: GICv3 by system registers, GICv2 by its CPU interface's frame.

use core::sync::atomic::Ordering::Relaxed;

use super::{affinity_of, asm, params, this_area};

const GICD: u64 = 0x0800_0000;
const GICC: u64 = 0x0801_0000;
const GICR: u64 = 0x080a_0000;
const GICR_STRIDE: u64 = 0x2_0000;
const SGI_FRAME: u64 = 0x1_0000;

const GICD_CTLR: u64 = GICD;
const GICD_SGIR: u64 = GICD + 0xf00;
const IGROUPR0: u64 = 0x80;
const ISENABLER0: u64 = 0x100;
const ICENABLER0: u64 = 0x180;
const ISPENDR0: u64 = 0x200;
const ISACTIVER0: u64 = 0x300;
const ICACTIVER0: u64 = 0x380;
const GICR_WAKER: u64 = 0x14;

const GICC_CTLR: u64 = GICC;
const GICC_PMR: u64 = GICC + 0x4;
const GICC_IAR: u64 = GICC + 0xc;
const GICC_EOIR: u64 = GICC + 0x10;
const GICC_DIR: u64 = GICC + 0x1000;
const GICC_CTLR_ENABLE: u64 = 1;
const GICC_CTLR_EOI_MODE: u64 = 1 << 9;
const ICC_CTLR_EOI_MODE: u64 = 1 << 1;

/// All SGIs and the timers' PPIs.
const ENABLED: u64 = 0xffff | 1 << TIMER | 1 << PHYSICAL_TIMER;
/// INTID of the virtual timer.
pub(super) const TIMER: u64 = 27;
/// INTID of the physical timer.
pub(super) const PHYSICAL_TIMER: u64 = 30;
const INTID: u64 = 0x3ff;
/// [`set_priority_mask`]: all interrupts are signalled.
pub(super) const EVERY_PRIORITY: u64 = 0xff;
/// As above: none is.
pub(super) const NO_PRIORITY: u64 = 0;
/// What acknowledging gives when nothing is pending; ending it has no effect.
pub(super) const SPURIOUS: u64 = 1023;

/// Sets up this vCPU's interface.
pub(super) fn init(version: u64, index: u64) {
    if version == 2 {
        asm::store_word(GICD_CTLR, 1);
        asm::store_word(GICD + ISENABLER0, ENABLED);
        return init_interface();
    }
    let redistributor = GICR + index * GICR_STRIDE;
    asm::store_word(redistributor + GICR_WAKER, 0);
    asm::store_word(redistributor + SGI_FRAME + IGROUPR0, u64::from(u32::MAX));
    asm::store_word(redistributor + SGI_FRAME + ISENABLER0, ENABLED);
    // Affinity routing, group 1 on.
    asm::store_word(GICD_CTLR, 1 << 4 | 1 << 1);
    asm::set_icc_sre(0b111);
    init_interface();
}

/// What of it is the CPU's own: nothing here traps.
pub(super) fn init_interface() {
    if params().gic == 2 {
        set_priority_mask(EVERY_PRIORITY);
        asm::store_word(GICC_CTLR, 1);
    } else {
        set_priority_mask(EVERY_PRIORITY);
        asm::set_icc_igrpen1(1);
    }
}

/// See [`set_priority_mask`].
pub(super) fn priority_mask() -> u64 {
    if params().gic == 2 {
        asm::load_word(GICC_PMR)
    } else {
        asm::icc_pmr()
    }
}

/// SGI `intid` of this vCPU is not active any more, whoever acknowledged it.
pub(super) fn forget_active(intid: u64) {
    asm::store_word(private_frame() + ICACTIVER0, 1 << intid);
}

/// Enables private interrupt `intid` of this vCPU, or disables it.
pub(super) fn set_enabled(intid: u64, enabled: bool) {
    let register = if enabled { ISENABLER0 } else { ICENABLER0 };
    asm::store_word(private_frame() + register, 1 << intid);
}

/// Whether private interrupt `intid` of this vCPU is pending.
pub(super) fn is_pending(intid: u64) -> bool {
    asm::load_word(private_frame() + ISPENDR0) >> intid & 1 != 0
}

/// Where the private interrupts of this vCPU are.
fn private_frame() -> u64 {
    if params().gic == 2 {
        GICD
    } else {
        GICR + this_area().index.load(Relaxed) * GICR_STRIDE + SGI_FRAME
    }
}

/// Interrupts of priorities less than `mask` are signalled; none with zero.
pub(super) fn set_priority_mask(mask: u64) {
    if params().gic == 2 {
        asm::store_word(GICC_PMR, mask);
    } else {
        asm::set_icc_pmr(mask);
    }
}

/// Sends SGI `intid` to vCPU `target`.
pub(super) fn send(target: u64, intid: u64) {
    asm::dsb();
    if params().gic == 2 {
        asm::store_word(GICD_SGIR, 1 << (16 + target) | intid);
        return;
    }
    let affinity = affinity_of(target);
    asm::set_icc_sgi1r((affinity >> 8 & 0xff) << 16 | intid << 24 | 1 << (affinity & 0xf));
}

/// Sends SGI `intid` to all other vCPUs.
pub(super) fn broadcast(intid: u64) {
    asm::dsb();
    if params().gic == 2 {
        asm::store_word(GICD_SGIR, 1 << 24 | intid);
        return;
    }
    asm::set_icc_sgi1r(1 << 40 | intid << 24);
}

/// Acknowledges the highest pending interrupt: what to end it with.
pub(super) fn acknowledge() -> u64 {
    if params().gic == 2 {
        asm::load_word(GICC_IAR)
    } else {
        asm::icc_iar1()
    }
}

/// INTID of an acknowledged interrupt.
pub(super) fn intid(acknowledged: u64) -> u64 {
    if params().gic == 2 {
        acknowledged & INTID
    } else {
        acknowledged & 0xff_ffff
    }
}

/// Ends it.
pub(super) fn end(acknowledged: u64) {
    if params().gic == 2 {
        asm::store_word(GICC_EOIR, acknowledged);
    } else {
        asm::set_icc_eoir1(acknowledged);
    }
}

/// Has this vCPU deactivate interrupts apart from dropping their priority (EOImode 1), or not.
pub(super) fn set_separate_deactivation(separate: bool) {
    let or_none = |mode| if separate { mode } else { 0 };
    if params().gic == 2 {
        asm::store_word(GICC_CTLR, GICC_CTLR_ENABLE | or_none(GICC_CTLR_EOI_MODE));
    } else {
        asm::set_icc_ctlr(or_none(ICC_CTLR_EOI_MODE));
    }
}

/// Deactivates it, after its end.
pub(super) fn deactivate(acknowledged: u64) {
    if params().gic == 2 {
        asm::store_word(GICC_DIR, acknowledged);
    } else {
        asm::set_icc_dir(intid(acknowledged));
    }
}

/// Looks at what is pending and active of vCPU `of`, and enables again what it has enabled; of this vCPU, where others' registers
/// cannot be reached (GICv2).
pub(super) fn look_at(of: u64) {
    let frame = if params().gic == 2 {
        GICD
    } else {
        GICR + of * GICR_STRIDE + SGI_FRAME
    };
    asm::load_word(frame + ISPENDR0);
    asm::load_word(frame + ISACTIVER0);
    asm::store_word(frame + ISENABLER0, ENABLED);
}
