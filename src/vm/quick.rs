//! What short paths do beside faults of memory: accesses to emulated devices, SGIs sent, interrupts taken.
//!
//! They call what the run loop calls; what is quick is the way there and back. No list register is read or written unless an
//! interrupt is in flight. A change of the vCPU's own interrupts is listed before the guest goes on, as the run loop would.

use core::sync::atomic::Ordering;

use crate::addr::Ipa;
use crate::arch;
use crate::arch::context::{Exit, KEPT, Verdict};
use crate::sync::percpu;
use crate::trace::Event;
use crate::vm::resident::Resident;
use crate::vm::run;
use crate::vm::trap::{self, SystemRegister, Transfer};
use crate::vm::vm::Device;

/// The register that a load or store cannot name but as zero.
const ZERO_REGISTER: u8 = 31;

impl Resident<'_> {
    /// An access to an emulated device. `None`: to none, or in a way that the run loop has to judge.
    #[inline(always)]
    pub(crate) fn access_device_quickly(
        &mut self,
        ipa: Ipa,
        esr: u64,
        kept: bool,
    ) -> Option<Verdict> {
        let transfer = trap::transfer_of(esr)?;
        let (device, offset) = self.vm.device_at(ipa)?;
        if offset & (u64::from(transfer.bytes) - 1) != 0 {
            return None;
        }
        if transfer.write {
            return Some(self.store_quickly(device, offset, transfer, kept));
        }
        let data = self.load_from(device, offset, transfer);
        let value = transfer.loaded(data);
        self.go_on_behind();
        if KEPT.contains(&transfer.register) {
            return Some(Verdict::load(transfer.register, value));
        }
        self.frame.write(transfer.register, value);
        Some(Verdict::RESUME)
    }

    #[inline(never)]
    fn store_quickly(
        &mut self,
        device: Device,
        offset: u64,
        transfer: Transfer,
        kept: bool,
    ) -> Verdict {
        let Some(value) = self.operand(transfer.register, kept) else {
            return Verdict::SAVE;
        };
        self.store(device, offset, transfer, transfer.stored(value));
        self.go_on_behind();
        Verdict::RESUME
    }

    /// A trapped system register: the one that sends SGIs is judged here.
    #[inline(always)]
    pub(crate) fn judge_register(&mut self, esr: u64, kept: bool) -> Verdict {
        const ICC_SGI1R: SystemRegister = SystemRegister::new(3, 0, 12, 11, 5);
        let access = trap::system_register_of(esr);
        if access.register != ICC_SGI1R || !access.write || self.vm.gic_version() != 3 {
            return Verdict::leave(Exit::Sync);
        }
        let Some(value) = self.operand(access.general, kept) else {
            return Verdict::SAVE;
        };
        self.send_sgi_v3(value, true);
        self.go_on_behind();
        Verdict::RESUME
    }

    /// Takes the interrupt that is pending. A CPU that has no other vCPU goes on with this one.
    #[inline(always)]
    pub(crate) fn judge_interrupt(&mut self) -> Verdict {
        self.take_interrupt();
        let elsewhere = self.vcpu.cpu() != Some(self.cpu.0);
        if self.vm.is_stopping() || elsewhere || run::is_shared(self.cpu.0) {
            return Verdict::leave(Exit::Interrupt);
        }
        self.vm.stage2.refresh(self.cpu);
        self.bring_up_to_date();
        percpu::count(Event::Exits);
        Verdict::RESUME
    }

    /// What the guest's register holds; `None` if it is not in the frame yet.
    #[inline]
    fn operand(&self, register: u8, kept: bool) -> Option<u64> {
        if register == ZERO_REGISTER {
            return Some(0);
        }
        (kept || !KEPT.contains(&register)).then(|| self.frame.read(register))
    }

    /// The trapped instruction has been done.
    #[inline]
    fn go_on_behind(&mut self) {
        arch::skip_trapped_instruction();
        self.bring_up_to_date();
        percpu::count(Event::Exits);
    }

    #[inline]
    fn bring_up_to_date(&mut self) {
        if self.vcpu.attention.load(Ordering::Relaxed) {
            self.relist();
        }
    }
}
