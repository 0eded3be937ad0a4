//! The registers of a vCPU's private interrupts, by their offset in a distributor (GICv2, IHI 0048B 4.3) or in a
//! redistributor's SGI frame (GICv3, IHI 0069H 12.11).
//!
//! Split from the model because what registers do is the manual's and what the model does is ours.

use super::private::{Bits, PRIVATE, Private, SGI_BITS, SGIS, bit};
use super::shared_registers::PRIORITY;

/// Offset of GICD_IGROUPR0 and its likes.
pub const IGROUPR: u64 = 0x080;
pub(super) const ISENABLER: u64 = 0x100;
pub(super) const ICENABLER: u64 = 0x180;
pub(super) const ISPENDR: u64 = 0x200;
pub(super) const ICPENDR: u64 = 0x280;
pub(super) const ISACTIVER: u64 = 0x300;
pub(super) const ICACTIVER: u64 = 0x380;
pub(super) const IPRIORITYR: u64 = 0x400;
const IPRIORITYR_END: u64 = 0x420;
pub(super) const ICFGR0: u64 = 0xc00;

impl Private {
    /// Reads the word at `offset`, a multiple of four; zero where nothing is.
    #[inline(always)]
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            IGROUPR => self.group1,
            ISENABLER | ICENABLER => self.enabled,
            ISPENDR | ICPENDR => self.all_pending(),
            ISACTIVER | ICACTIVER => self.active,
            IPRIORITYR..IPRIORITYR_END => {
                u32::from_le_bytes(bytes(&self.priority, offset - IPRIORITYR))
            }
            ICFGR0 => 0xaaaa_aaaa,
            _ => 0,
        }
    }

    /// Writes the word at `offset`, a multiple of four; `lanes` selects bytes (only priorities have bytes). Pending SGIs are
    /// read-only on GICv2, which has senders for them instead.
    pub fn write(&mut self, offset: u64, value: u32, lanes: u32) {
        if lanes != u32::MAX && !(IPRIORITYR..IPRIORITYR_END).contains(&offset) {
            return;
        }
        match offset {
            IGROUPR => self.group1 = value,
            ISENABLER => self.enabled |= value,
            ICENABLER => self.enabled &= !value,
            ISPENDR => self.set_pending(value & !SGI_BITS, true),
            ICPENDR => self.set_pending(value & !SGI_BITS, false),
            ISACTIVER => self.set_active(value, true),
            ICACTIVER => self.set_active(value, false),
            IPRIORITYR..IPRIORITYR_END => self.set_priorities(offset - IPRIORITYR, value, lanes),
            _ => {}
        }
    }

    /// As [`Self::write`], where the pending bits of SGIs can be written, too: GICv3's redistributor.
    pub fn write_v3(&mut self, offset: u64, value: u32, lanes: u32) {
        self.write(offset, value, lanes);
        if lanes != u32::MAX {
            return;
        }
        let sgis = Bits(value & SGI_BITS);
        match offset {
            ISPENDR => sgis.for_each(|intid| self.send(intid, 0)),
            ICPENDR => {
                self.unpend_listed(value & SGI_BITS);
                sgis.for_each(|intid| self.set_senders(intid, 0));
            }
            _ => {}
        }
    }

    /// GICR_WAKER: ProcessorSleep, and ChildrenAsleep, which follows it at once.
    pub fn waker(&self) -> u32 {
        if self.sleeps { 0b110 } else { 0 }
    }

    /// Writes GICR_WAKER.
    pub fn set_waker(&mut self, value: u32) {
        self.sleeps = value & 0b10 != 0;
    }

    /// GICv2's GICD_SPENDSGIR and GICD_CPENDSGIR: the senders of four SGIs.
    pub fn sgi_senders(&self, first: u64) -> u32 {
        u32::from_le_bytes(bytes(&self.senders, first))
    }

    /// GICv2: changes the pending senders of four SGIs.
    pub fn change_sgi_senders(&mut self, first: u64, senders: u32, pending: bool) {
        let Ok(first) = u8::try_from(first) else {
            return;
        };
        for (intid, change) in (first..SGIS).zip(senders.to_le_bytes()) {
            let now = self.senders_of(intid);
            self.set_senders(intid, if pending { now | change } else { now & !change });
        }
    }

    fn set_senders(&mut self, intid: u8, senders: u8) {
        if let Some(of) = self.senders.get_mut(usize::from(intid)) {
            *of = senders;
            self.pending = if senders != 0 {
                self.pending | bit(intid)
            } else {
                self.pending & !bit(intid)
            };
        }
    }

    fn set_priorities(&mut self, first: u64, value: u32, lanes: u32) {
        let first = usize::try_from(first).unwrap_or(usize::from(PRIVATE));
        for (it, value) in lanes_of(value, lanes) {
            if let Some(priority) = self.priority.get_mut(first + it) {
                *priority = value & PRIORITY;
            }
        }
    }
}

/// The bytes of `value` that `lanes` selects, and which they are.
pub(super) fn lanes_of(value: u32, lanes: u32) -> impl Iterator<Item = (usize, u8)> {
    let bytes = value.to_le_bytes().into_iter().zip(lanes.to_le_bytes());
    bytes
        .enumerate()
        .filter(|(_, (_, lane))| *lane != 0)
        .map(|(it, (value, _))| (it, value))
}

fn bytes<const N: usize>(of: &[u8; N], first: u64) -> [u8; 4] {
    let first = usize::try_from(first).unwrap_or(N);
    core::array::from_fn(|it| of.get(first + it).copied().unwrap_or(0))
}

/// Puts each of sixteen bits into the upper bit of its two-bit field.
pub(super) fn spread(bits: u32) -> u32 {
    (0..16)
        .filter(|position| bits >> position & 1 != 0)
        .fold(0, |fields, position| fields | 0b10 << (2 * position))
}

/// Inverse of [`spread`].
pub(super) fn gather(fields: u32) -> u32 {
    (0..16)
        .filter(|position| fields >> (2 * position) & 0b10 != 0)
        .fold(0, |bits, position| bits | 1 << position)
}

#[cfg(test)]
mod tests {
    use super::{ICPENDR, IPRIORITYR, ISENABLER, ISPENDR};
    use crate::vm::vgic::private::Private;

    fn enabled() -> Private {
        let mut private = Private::new(true);
        private.write(ISENABLER, u32::MAX, u32::MAX);
        private
    }

    #[test]
    fn registers_read_back_what_they_may() {
        let mut private = Private::new(false);
        private.write(IPRIORITYR + 4, 0xffff_ffff, 0x0000_ff00);
        assert_eq!(private.read(IPRIORITYR + 4), 0x0000_f800);
        private.write(0xc04, u32::MAX, u32::MAX);
        assert_eq!(private.read(0xc04), 0, "PPIs are level-sensitive");
        private.write(ISENABLER, 0xff, 0xff);
        assert_eq!(private.read(ISENABLER), 0, "enables have no byte access");
        private.write(ISPENDR, 0xffff_ffff, u32::MAX);
        assert_eq!(
            private.read(ISPENDR),
            0xffff_0000,
            "SGIs are read-only here on GICv2"
        );
        private.write(ICPENDR, 0xffff_ffff, u32::MAX);
        assert_eq!(private.read(ISPENDR), 0);
        for offset in (0..0x1_0000).step_by(4) {
            private.write(offset, 0x5555_5555, u32::MAX);
            private.read(offset);
        }
    }

    #[test]
    fn gicv2_senders_are_written_by_the_byte() {
        let mut private = enabled();
        private.change_sgi_senders(4, 0x0000_0300, true);
        assert_eq!(private.sgi_senders(4), 0x300);
        private.change_sgi_senders(4, 0x0000_0100, false);
        assert_eq!(private.sgi_senders(4), 0x200);
        private.change_sgi_senders(400, u32::MAX, true);
        assert_eq!(private.sgi_senders(400), 0);
    }
}
