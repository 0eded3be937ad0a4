//! Emulated devices: which one an access hits, and what it answers.

use crate::vm::resident::Resident;
use crate::vm::trap::{self, Transfer};
use crate::vm::vcpu::Vcpu;
use crate::vm::vgic::distributor::{self, Receivers, Register};
use crate::vm::vgic::shared_registers;
use crate::vm::vm::Device;

const WORD: u64 = 4;

impl Resident<'_> {
    /// No slot is at the faulting address: a device is, or nothing.
    pub(crate) fn access_device(&mut self) {
        let (fetch, abort) = trap::abort_of(self.frame.esr);
        if abort.maintenance {
            // Nothing can be cached of what is not memory.
            return self.skip_instruction();
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
        self.skip_instruction();
    }

    /// Loads a word, or two, or the bytes of one.
    #[inline(always)]
    pub(crate) fn load_from(&mut self, device: Device, offset: u64, transfer: Transfer) -> u64 {
        if transfer.bytes == 8 {
            return self.load_double(device, offset);
        }
        let base = offset & !(WORD - 1);
        u64::from(self.read_word(device, base)) >> (8 * (offset - base))
    }

    #[inline(never)]
    fn load_double(&mut self, device: Device, offset: u64) -> u64 {
        let [low, high] = [0, WORD].map(|word| u64::from(self.read_word(device, offset + word)));
        low | high << 32
    }

    pub(crate) fn store(&mut self, device: Device, offset: u64, transfer: Transfer, value: u64) {
        let base = offset & !(WORD - 1);
        let [low, high] = halves(value);
        if transfer.bytes == 8 {
            self.write_word(device, base, low, u32::MAX);
            self.write_word(device, base + WORD, high, u32::MAX);
            return;
        }
        let shift = 8 * u32::try_from(offset - base).unwrap_or(0);
        let lanes = u32::MAX.unbounded_shr(32 - 8 * u32::from(transfer.bytes));
        self.write_word(device, base, low << shift, lanes << shift);
    }

    #[inline(always)]
    fn read_word(&mut self, device: Device, offset: u64) -> u32 {
        let vm = self.vm;
        match device {
            Device::Uart => vm.read_uart(offset),
            Device::DistributorV2 => {
                self.read_register(distributor::v2(offset, vm.vcpus().len()), self.vcpu.index)
            }
            Device::DistributorV3 => self.read_register(distributor::v3(offset), self.vcpu.index),
            Device::Redistributor(of) => self.read_register(self.redistributor(offset, of), of),
        }
    }

    fn write_word(&mut self, device: Device, offset: u64, value: u32, lanes: u32) {
        let vm = self.vm;
        let own = self.vcpu.index;
        match device {
            Device::Uart => vm.write_uart(offset, value),
            Device::DistributorV2 => {
                self.write_register(distributor::v2(offset, vm.vcpus().len()), own, value, lanes);
            }
            Device::DistributorV3 => {
                self.write_register(distributor::v3(offset), own, value, lanes)
            }
            Device::Redistributor(of) => {
                self.write_register(self.redistributor(offset, of), of, value, lanes)
            }
        }
    }

    #[inline(always)]
    fn redistributor(&self, offset: u64, of: usize) -> Register {
        distributor::redistributor(offset, of, self.vm.vcpus().len(), distributor::vmpidr(of))
    }

    /// Reads a register of vCPU `of`. What this CPU has listed is taken back first; another vCPU's interrupts are read as
    /// they were when they were last listed.
    #[inline(always)]
    fn read_register(&mut self, register: Register, of: usize) -> u32 {
        const AFFINITY_ROUTING_ONLY: u32 = 1 << 6 | 1 << 4;
        match register {
            Register::Constant(value) => value,
            Register::Control => {
                let groups = self
                    .vm
                    .gic_control
                    .load(core::sync::atomic::Ordering::Relaxed);
                if self.vm.gic_version() == 3 {
                    groups | AFFINITY_ROUTING_ONLY
                } else {
                    groups
                }
            }
            Register::Private(offset) => {
                self.private_of(of, |vcpu| vcpu.private.lock().read(offset))
            }
            Register::Shared(offset) => {
                self.take_back();
                self.vm.shared.lock().read(offset)
            }
            Register::SgiSenders(first, _) => {
                self.private_of(of, |vcpu| vcpu.private.lock().sgi_senders(first))
            }
            Register::OwnTarget => 0x0101_0101 << (self.vcpu.index & 7),
            Register::SendSgi => 0,
            Register::Waker => 0,
        }
    }

    fn write_register(&mut self, register: Register, of: usize, value: u32, lanes: u32) {
        let gicv3 = self.vm.gic_version() == 3;
        match register {
            Register::Private(offset) if gicv3 => {
                self.private_of(of, |vcpu| {
                    vcpu.private.lock().write_v3(offset, value, lanes)
                });
            }
            Register::Private(offset) => {
                self.private_of(of, |vcpu| vcpu.private.lock().write(offset, value, lanes))
            }
            Register::SgiSenders(first, pending) => {
                self.private_of(of, |vcpu| {
                    vcpu.private
                        .lock()
                        .change_sgi_senders(first, value & lanes, pending)
                });
            }
            Register::SendSgi => {
                let (intid, receivers) = distributor::sgi_v2(value, self.vcpu.index);
                self.send_sgi(intid, receivers, None);
            }
            Register::Control => self.set_control(value),
            Register::Shared(offset) => return self.write_shared(offset, value, lanes),
            Register::Constant(_) | Register::OwnTarget | Register::Waker => return,
        }
        if let Some(vcpu) = self.vm.vcpus().get(of) {
            self.notify(vcpu);
        }
    }

    fn write_shared(&mut self, offset: u64, value: u32, lanes: u32) {
        self.take_back();
        let vm = self.vm;
        let mut shared = vm.shared.lock();
        shared.write(offset, value, lanes);
        let intids = shared_registers::interrupts(offset, shared.routing());
        let concerned = vm.concern(&shared, intids);
        drop(shared);
        for vcpu in vm.members(concerned) {
            self.notify(vcpu);
        }
    }

    /// Does something with the interrupts of vCPU `of`, which are up to date if it is this one.
    #[inline(always)]
    fn private_of<R: Default>(&mut self, of: usize, work: impl FnOnce(&Vcpu) -> R) -> R {
        if of == self.vcpu.index && self.interface.is_in_use() {
            self.take_back();
        }
        self.vm.vcpus().get(of).map(work).unwrap_or_default()
    }

    fn set_control(&self, value: u32) {
        const GROUPS: u32 = 0b11;
        self.vm
            .gic_control
            .store(value & GROUPS, core::sync::atomic::Ordering::Relaxed);
        let vm = self.vm;
        for vcpu in vm.vcpus() {
            self.notify(vcpu);
        }
    }

    /// ICC_SGI1R_EL1 or ICC_SGI0R_EL1.
    pub(crate) fn send_sgi_v3(&self, value: u64, group1: bool) {
        let (intid, receivers) = distributor::sgi_v3(value);
        self.send_sgi(intid, receivers, Some(group1));
    }

    /// Sends `intid`; to receivers that have it in the given group, if one is given.
    fn send_sgi(&self, intid: u8, receivers: Receivers, group1: Option<bool>) {
        let vm = self.vm;
        match receivers {
            Receivers::Some { first, bits } => {
                let mut left = bits;
                while let Some(others) = left.checked_sub(1) {
                    let position = left.trailing_zeros() as usize;
                    left &= others;
                    if let Some(vcpu) = vm.vcpus().get(first + position) {
                        self.send_to(vcpu, intid, group1);
                    }
                }
            }
            Receivers::Others => {
                for vcpu in vm
                    .vcpus()
                    .iter()
                    .filter(|vcpu| vcpu.index != self.vcpu.index)
                {
                    self.send_to(vcpu, intid, group1);
                }
            }
        }
    }

    fn send_to(&self, vcpu: &Vcpu, intid: u8, group1: Option<bool>) {
        let mut private = vcpu.private.lock();
        if group1.is_some_and(|group1| group1 != private.is_group1(intid)) {
            return;
        }
        // GICv3 has no senders: all SGIs of one number merge.
        let sender = if group1.is_some() {
            0
        } else {
            u8::try_from(self.vcpu.index & 7).unwrap_or(0)
        };
        private.send(intid, sender);
        drop(private);
        self.notify(vcpu);
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
