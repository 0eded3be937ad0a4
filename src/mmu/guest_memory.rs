//! The hypervisor's own accesses to guest memory: through the slots, checked, and recorded like the guest's.
//!
//! A guest may hand over any address; what is not memory of one of its slots is refused. Data is stored before the bit is
//! set, inside one section, so that whoever harvests after a grace period copies what was stored (rule 14).

use core::ptr::{copy_nonoverlapping, with_exposed_provenance, with_exposed_provenance_mut};

use crate::addr::{Ipa, PAGE_BYTES, to_index};
use crate::mmu::descriptor::{Descriptor, Memory};
use crate::mmu::error::Error;
use crate::mmu::fault::{Access, Attempt, Resolution};
use crate::mmu::geometry::Level;
use crate::mmu::map::record;
use crate::mmu::slot::{Contents, Context, SlotView};
use crate::mmu::stage2::Stage2;
use crate::sync::quiescence::{Active, CpuId};

impl Stage2 {
    /// Writes `data` to guest memory at `ipa`, mapping what was never touched. Read-only slots may be written: this is how
    /// they are filled.
    ///
    /// Rounding: none. Races: the guest's own accesses, byte by byte. TLB: nothing owed. Cost: one walk a page.
    ///
    /// # Errors
    ///
    /// [`Error::NotMemory`] with the first address that is not; what lies before it was written. [`Error::NoMemory`].
    pub fn copy_to_guest(&self, cpu: CpuId, ipa: Ipa, data: &[u8]) -> Result<(), Error> {
        self.by_page(ipa, data.len(), |at, range| {
            let Some(part) = data.get(range) else {
                return Err(Error::NotMemory(at));
            };
            self.write_page(cpu, at, part)
        })
    }

    /// Reads guest memory at `ipa` into `data`. Memory that was never touched reads as zeros where it will be zeroed.
    ///
    /// Rounding: none. Races: the guest's own accesses, byte by byte. TLB: nothing owed. Cost: one walk a page.
    ///
    /// # Errors
    ///
    /// [`Error::NotMemory`] with the first address that is not.
    pub fn copy_from_guest(&self, cpu: CpuId, ipa: Ipa, data: &mut [u8]) -> Result<(), Error> {
        self.by_page(ipa, data.len(), |at, range| {
            let Some(part) = data.get_mut(range) else {
                return Err(Error::NotMemory(at));
            };
            self.read_page(cpu, at, part)
        })
    }

    /// Calls `each` with pieces of `bytes` from `ipa` that do not cross a page.
    fn by_page(
        &self,
        ipa: Ipa,
        bytes: usize,
        mut each: impl FnMut(Ipa, core::ops::Range<usize>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes {
            let at = ipa.checked_add(done as u64).ok_or(Error::NotMemory(ipa))?;
            let in_page = PAGE_BYTES - at.raw() % PAGE_BYTES;
            let step = usize::try_from(in_page).map_or(bytes - done, |room| room.min(bytes - done));
            each(at, done..done + step)?;
            done += step;
        }
        Ok(())
    }

    fn write_page(&self, cpu: CpuId, ipa: Ipa, data: &[u8]) -> Result<(), Error> {
        loop {
            let attempt = {
                let active = self.services.quiescence.enter(cpu);
                let context = self.context.load(&active);
                self.try_write(cpu, context, ipa, data, &active)?
            };
            match attempt {
                Attempt::Done => return Ok(()),
                Attempt::Give(Resolution::TopUp) => self.top_up(cpu)?,
                Attempt::Give(_) => return Err(Error::NotMemory(ipa)),
                Attempt::Stale | Attempt::Again => crate::arch::yield_now(),
            }
        }
    }

    fn try_write(
        &self,
        cpu: CpuId,
        context: &Context,
        ipa: Ipa,
        data: &[u8],
        active: &Active<'_>,
    ) -> Result<Attempt, Error> {
        let view = memory_at(context, ipa)?;
        let Some(at) = self.walk(context, ipa, active) else {
            return Err(Error::NotMemory(ipa));
        };
        if at.found == Descriptor::BUSY {
            return Ok(Attempt::Again);
        }
        if !at.found.is_leaf(at.level) {
            return Ok(match self.map_at(cpu, context, ipa, Access::Read, active) {
                Attempt::Done => Attempt::Again,
                other => other,
            });
        }
        let (pa, _) = view.slot.backing_of(ipa).ok_or(Error::NotMemory(ipa))?;
        let to = with_exposed_provenance_mut::<u8>(to_index(pa.raw()));
        // SAFETY: The slot's backing is memory of this VM that stays its own while the slot is published, which the
        // section holds up; EL2 maps it at its physical address, and `data` does not cross the page.
        unsafe { copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        crate::arch::show_to_guest(pa, data.len() as u64);
        record(view, ipa, Level::L3, cpu);
        Ok(Attempt::Done)
    }

    fn read_page(&self, cpu: CpuId, ipa: Ipa, data: &mut [u8]) -> Result<(), Error> {
        loop {
            let active = self.services.quiescence.enter(cpu);
            let context = self.context.load(&active);
            let view = memory_at(context, ipa)?;
            let at = self
                .walk(context, ipa, &active)
                .ok_or(Error::NotMemory(ipa))?;
            if at.found == Descriptor::BUSY {
                drop(active);
                crate::arch::yield_now();
                continue;
            }
            if !at.found.is_leaf(at.level) && view.slot.config.contents == Contents::Zero {
                data.fill(0);
                return Ok(());
            }
            let (pa, _) = view.slot.backing_of(ipa).ok_or(Error::NotMemory(ipa))?;
            let from = with_exposed_provenance::<u8>(to_index(pa.raw()));
            // SAFETY: As for writing; the guest may write meanwhile, which tears bytes and nothing else.
            unsafe { copy_nonoverlapping(from, data.as_mut_ptr(), data.len()) };
            return Ok(());
        }
    }
}

/// The slot at `ipa`, if it is memory and not a device.
fn memory_at(context: &Context, ipa: Ipa) -> Result<&SlotView, Error> {
    let (_, view) = context.slot_of(ipa).ok_or(Error::NotMemory(ipa))?;
    if view.slot.config.memory == Memory::Normal {
        Ok(view)
    } else {
        Err(Error::NotMemory(ipa))
    }
}
