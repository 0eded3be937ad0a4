//! The registers of a vCPU's private interrupts, by their offset in a distributor (GICv2, IHI 0048B 4.3) or in a
//! redistributor's SGI frame (GICv3, IHI 0069H 12.11).
//!
//! Split from the model because what registers do is the manual's and what the model does is ours.

use super::private::{Private, SGI_BITS, SGIS, bit, sgi_bits};

/// Offset of GICD_IGROUPR0 and its likes.
pub const IGROUPR: u64 = 0x080;
pub(super) const ISENABLER: u64 = 0x100;
pub(super) const ICENABLER: u64 = 0x180;
pub(super) const ISPENDR: u64 = 0x200;
const ICPENDR: u64 = 0x280;
pub(super) const ISACTIVER: u64 = 0x300;
const ICACTIVER: u64 = 0x380;
pub(super) const IPRIORITYR: u64 = 0x400;
const IPRIORITYR_END: u64 = 0x420;
const ICFGR0: u64 = 0xc00;
const ICFGR1: u64 = 0xc04;

impl Private {
    /// Reads the word at `offset`, a multiple of four; zero where nothing is.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            IGROUPR => self.group1,
            ISENABLER | ICENABLER => self.enabled,
            ISPENDR | ICPENDR => {
                self.pending | self.held & !self.active | sgi_bits(&self.sgi_pending)
            }
            ISACTIVER | ICACTIVER => self.active | sgi_bits(&self.sgi_active),
            IPRIORITYR..IPRIORITYR_END => {
                u32::from_le_bytes(self.bytes(&self.priority, offset - IPRIORITYR))
            }
            ICFGR0 => 0xaaaa_aaaa,
            ICFGR1 => spread(self.edge >> SGIS),
            _ => 0,
        }
    }

    /// Writes the word at `offset`, a multiple of four; `lanes` selects bytes (only priorities have bytes).
    pub fn write(&mut self, offset: u64, value: u32, lanes: u32) {
        if lanes != u32::MAX && !(IPRIORITYR..IPRIORITYR_END).contains(&offset) {
            return;
        }
        match offset {
            IGROUPR => self.group1 = value,
            ISENABLER => self.enabled |= value,
            ICENABLER => self.enabled &= !value,
            ISPENDR => self.pending |= value & !SGI_BITS,
            ICPENDR => self.pending &= !value,
            ISACTIVER => self.active |= value & !SGI_BITS,
            ICACTIVER => self.active &= !value,
            IPRIORITYR..IPRIORITYR_END => self.set_priorities(offset - IPRIORITYR, value, lanes),
            ICFGR1 => self.edge = SGI_BITS | gather(value) << SGIS,
            _ => {}
        }
    }

    /// As [`Self::write`], where the pending and active bits of SGIs can be written, too: GICv3's redistributor.
    pub fn write_v3(&mut self, offset: u64, value: u32, lanes: u32) {
        self.write(offset, value, lanes);
        if lanes != u32::MAX {
            return;
        }
        let set = |of: &mut [u8; SGIS as usize], it: bool| {
            for (intid, senders) in (0..SGIS)
                .zip(of.iter_mut())
                .filter(|(intid, _)| value & bit(*intid) != 0)
            {
                debug_assert!(intid < SGIS);
                *senders = u8::from(it);
            }
        };
        match offset {
            ISPENDR => set(&mut self.sgi_pending, true),
            ICPENDR => set(&mut self.sgi_pending, false),
            ISACTIVER => set(&mut self.sgi_active, true),
            ICACTIVER => set(&mut self.sgi_active, false),
            _ => {}
        }
    }

    /// GICv2's GICD_SPENDSGIR and GICD_CPENDSGIR: the senders of four SGIs.
    pub fn sgi_senders(&self, first: u64) -> u32 {
        u32::from_le_bytes(self.bytes(&self.sgi_pending, first))
    }

    /// GICv2: changes the pending senders of four SGIs.
    pub fn change_sgi_senders(&mut self, first: u64, senders: u32, pending: bool) {
        for (offset, senders) in senders.to_le_bytes().into_iter().enumerate() {
            let index = usize::try_from(first)
                .ok()
                .and_then(|first| first.checked_add(offset));
            if let Some(word) = index.and_then(|index| self.sgi_pending.get_mut(index)) {
                *word = if pending {
                    *word | senders
                } else {
                    *word & !senders
                };
            }
        }
    }

    fn set_priorities(&mut self, first: u64, value: u32, lanes: u32) {
        let bytes = value.to_le_bytes().into_iter().zip(lanes.to_le_bytes());
        for (offset, (value, _)) in bytes.enumerate().filter(|(_, (_, lane))| *lane != 0) {
            let index = usize::try_from(first)
                .ok()
                .and_then(|first| first.checked_add(offset));
            if let Some(priority) = index.and_then(|index| self.priority.get_mut(index)) {
                *priority = value & 0xf8;
            }
        }
    }

    fn bytes<const N: usize>(&self, of: &[u8; N], first: u64) -> [u8; 4] {
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        core::array::from_fn(|offset| {
            first
                .checked_add(offset)
                .and_then(|index| of.get(index))
                .copied()
                .unwrap_or(0)
        })
    }
}

/// Puts each of sixteen bits into the upper bit of its two-bit field.
fn spread(bits: u32) -> u32 {
    (0..16)
        .filter(|position| bits >> position & 1 != 0)
        .fold(0, |fields, position| fields | 0b10 << (2 * position))
}

/// Inverse of [`spread`].
fn gather(fields: u32) -> u32 {
    (0..16)
        .filter(|position| fields >> (2 * position) & 0b10 != 0)
        .fold(0, |bits, position| bits | 1 << position)
}

#[cfg(test)]
mod tests {
    use super::{ICFGR1, ICPENDR, IPRIORITYR, ISENABLER, ISPENDR};
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
        private.write(ICFGR1, 0xaaaa_aaaa, u32::MAX);
        assert_eq!(private.read(ICFGR1), 0xaaaa_aaaa);
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
