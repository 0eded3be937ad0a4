//! Emulated devices: which one an access hits, and what it answers.

use crate::vm::resident::Resident;
use crate::vm::trap::{self, Transfer};
use crate::vm::vgic::access::{self, Frame};
use crate::vm::vm::Device;

const WORD: u64 = 4;

impl Resident<'_> {
    /// No slot is at the faulting address: a device is, or nothing.
    pub(crate) fn access_device(&mut self) {
        let (fetch, abort) = trap::abort_of(self.frame.esr);
        if abort.maintenance && !abort.stage1_walk {
            // Nothing can be cached of what is not memory. Where the walk failed it may be an address translation, whose
            // result somebody waits for.
            return self.frame.skip_instruction();
        }
        let target = self
            .vm
            .device_at(self.fault_ipa)
            .filter(|_| !fetch && !abort.stage1_walk);
        let (Some((device, offset)), Some(transfer)) = (target, abort.transfer) else {
            return self.external_abort(fetch, abort);
        };
        if offset % u64::from(transfer.bytes) != 0 {
            return self.external_abort(fetch, abort);
        }
        if transfer.write {
            let value = transfer.stored(self.frame.read(transfer.register));
            self.store(device, offset, transfer, value);
        } else {
            let value = self.load_from(device, offset, transfer);
            self.frame.write(transfer.register, transfer.loaded(value));
        }
        self.frame.skip_instruction();
    }

    #[inline(always)]
    pub(crate) fn load_from(&mut self, device: Device, offset: u64, transfer: Transfer) -> u64 {
        match device {
            Device::Interrupts(frame) => self.load_from_interrupts(frame, offset, transfer.bytes),
            Device::Uart if transfer.bytes == 8 => self.load_double_from_uart(offset),
            Device::Uart => {
                let base = offset & !(WORD - 1);
                u64::from(self.vm.read_uart(base)) >> (8 * (offset - base))
            }
        }
    }

    /// Apart, so that loads from other devices save no registers for it.
    #[inline(never)]
    fn load_from_interrupts(&mut self, frame: Frame, offset: u64, bytes: u8) -> u64 {
        access::read(self, frame, offset, bytes)
    }

    #[inline(never)]
    fn load_double_from_uart(&self, offset: u64) -> u64 {
        let [low, high] = [0, WORD].map(|word| u64::from(self.vm.read_uart(offset + word)));
        low | high << 32
    }

    pub(crate) fn store(&mut self, device: Device, offset: u64, transfer: Transfer, value: u64) {
        match device {
            Device::Interrupts(frame) => {
                access::write(self, frame, offset, transfer.bytes, value);
            }
            Device::Uart => self.store_to_uart(offset, transfer, value),
        }
    }

    fn store_to_uart(&self, offset: u64, transfer: Transfer, value: u64) {
        let base = offset & !(WORD - 1);
        let [low, high] = halves(value);
        let shift = 8 * u32::try_from(offset - base).unwrap_or(0);
        self.vm.write_uart(base, low << shift);
        if transfer.bytes == 8 {
            self.vm.write_uart(base + WORD, high);
        }
    }

    /// ICC_SGI1R_EL1 or ICC_SGI0R_EL1.
    pub(crate) fn send_sgi_v3(&self, value: u64, group1: bool) {
        access::send_v3(self, value, group1);
    }

    /// ICC_DIR_EL1.
    pub(crate) fn deactivate(&mut self, value: u64) {
        const INTID: u64 = 0xff_ffff;
        access::deactivate(self, u32::try_from(value & INTID).unwrap_or(0));
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

#[cfg(test)]
mod tests {
    use super::halves;

    #[test]
    fn a_double_word_is_two_words() {
        assert_eq!(halves(0x0123_4567_89ab_cdef), [0x89ab_cdef, 0x0123_4567]);
    }
}
