//! Engine `swap`: a second root, prepared while the guest runs, takes the place of the first.
//!
//! ```text
//!   prepare   retired VMID: VMALLS12E1IS, number given back ── the retired tree becomes the next spare, region by region
//!   call      mapping suspended, grace period ── regions mapped since are brought up to date ──
//!             publish the spare root under its own VMID ── each CPU: DSB, VTTBR_EL2, ISB, acknowledges ── grace period
//! ```
//!
//! The spare translates what the live tree does, read-only where memory is logged: a region of 2 MiB that was not written
//! lately as one block, a written one as a table of 512 leaves that is already linked, so that its pages need no split. A
//! region that is not contiguous in host memory has a table always. Reads never fault for it.
//!
//! # Why this is sound
//!
//! - Entries are cached under a VMID; the new root has another one than the old. No CPU runs under the old one after the last
//!   acknowledgement, so what is still cached under it is used by nobody, and the call invalidates nothing. The number is
//!   given back, and tables of the old tree are edited or linked, only after `prepare` has invalidated it (rule 31).
//! - A fault acts on the tree that was published when it began; whatever it recorded there was recorded before the grace
//!   period that ends the call.
//! - Nothing is mapped between the last look at the live tree and the spare's going live: a page that is zeroed when it is
//!   first mapped would be zeroed again by whoever missed it there.
//! - What changes which memory is translated, or which is logged, makes the spare unready: it is gone through again before
//!   it is used. Splits and collapses change neither.
//!
//! An access flag that was set in the old tree stays there until it is copied or a pass of `aging` takes it: a flag in
//! either tree says that memory was accessed.
//!
//! Operations of controllers wait for each other in a VM with this engine ([`Stage2::begin_operation`]): there is one live tree
//! and one VMID while any of them runs (rule 16). Faults wait for nobody.

use crate::addr::Ipa;
use crate::arch;
use crate::mmu::bitmap::{Bitmap, GROUP_PAGES, WORD_PAGES};
use crate::mmu::descriptor::Descriptor;
use crate::mmu::epoch::{Closed, Engine};
use crate::mmu::error::Error;
use crate::mmu::geometry::Level;
use crate::mmu::pool::{SpareTable, Spares};
use crate::mmu::slot::Context;
use crate::mmu::stage2::{Admin, Stage2};
use crate::mmu::table::{Slot, Table};
use crate::mmu::tlb;
use crate::mmu::walk::{Position, Root, Tree, table_of};
use crate::sync::percpu;
use crate::sync::quiescence::{Active, CpuId};
use crate::trace::Event;

/// What [`Stage2::prepare`] did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Prepared {
    /// Tables that were linked.
    pub tables: u64,
    /// Descriptors that were written.
    pub descriptors: u64,
    /// Regions of 2 MiB that got a table.
    pub hot: u64,
    /// Regions of 2 MiB, or larger blocks, that did not.
    pub cold: u64,
}

/// The tree that no CPU runs under.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    root: Option<Root>,
    /// CPUs ran under it: its VMID is to be invalidated before anything else.
    retired: bool,
    /// It translates what the live one does.
    pub(crate) is_ready: bool,
}

/// Tables that one region can need: two on the way and its own.
const REGION_TABLES: usize = 3;

/// Why a region could not be copied yet.
enum Wait {
    /// An entry of the live tree is being replaced.
    Busy,
    /// Tables are wanted.
    Tables,
}

/// The copying of the live tree into the spare.
struct Copy<'a> {
    stage2: &'a Stage2,
    cpu: CpuId,
    spare: Root,
    tables: Spares<'a>,
    done: Prepared,
}

impl Spare {
    /// The root, where there is one.
    pub(crate) fn root(&self) -> Option<Root> {
        self.root
    }
}

/// Whether the tree at `root`, which no CPU runs under, says that what the leaf of `level` at `ipa` translates was accessed;
/// its flags are taken if `take`. A flag that stands for more than that leaf is taken with the last of what it stands for.
pub(crate) fn was_accessed(
    root: Root,
    ipa: Ipa,
    level: Level,
    take: bool,
    active: &Active<'_>,
) -> bool {
    let Some(at) = root.walk_to(ipa, level, active) else {
        return false;
    };
    if at.found.is_table(at.level) {
        return at
            .level
            .deeper()
            .is_some_and(|level| any_accessed(table_of(at.found, active), level, take, active));
    }
    let young = at.found.is_leaf(at.level) && at.found.is_young();
    let end = |level: Level| ipa.align_down(level.span_bytes()).raw() + level.span_bytes();
    if young && take && end(level) == end(at.level) {
        at.slot.edit(at.found.old());
    }
    young
}

fn any_accessed(table: &Table, level: Level, take: bool, active: &Active<'_>) -> bool {
    let mut any = false;
    for slot in table {
        let found = slot.load();
        if let Some(deeper) = level.deeper().filter(|_| found.is_table(level)) {
            any |= any_accessed(table_of(found, active), deeper, take, active);
        } else if found.is_leaf(level) && found.is_young() {
            any = true;
            if take {
                slot.edit(found.old());
            }
        }
    }
    any
}

impl Stage2 {
    /// With engine `swap`: makes the spare root ready, so that the next call of [`Stage2::next_epoch`] finds it so. Does nothing
    /// when it is, or when no slot is logged, or with another engine.
    ///
    /// Rounding: out to 2 MiB. Races: faults; operations wait. TLB: nothing owed on return; the retired VMID is invalidated.
    /// Cost: regions, and 512 descriptors for each written one.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`]: tables ran out; until another try succeeds calls are engine `walk`'s.
    pub fn prepare(&self, cpu: CpuId) -> Result<Prepared, Error> {
        let _operation = self.begin_operation();
        let mut admin = self.admin.lock();
        let wanted = self.engine() == Engine::Swap && admin.logged().next().is_some();
        if !wanted || admin.spare.is_ready {
            return Ok(Prepared::default());
        }
        self.prepare_spare(cpu, &mut admin)
    }

    /// The call.
    pub(crate) fn next_by_swap(&self, cpu: CpuId, admin: &mut Admin) -> Closed {
        let late = !admin.spare.is_ready;
        let ready = if late {
            self.prepare_spare(cpu, admin).map(drop)
        } else {
            Ok(())
        };
        let closed = ready.and_then(|()| self.exchange_roots(cpu, admin));
        match closed {
            Ok(closed) => Closed { late, ..closed },
            Err(_) => {
                let closed = self.next_by_walk(cpu, admin);
                Closed { late, ..closed }
            }
        }
    }

    fn exchange_roots(&self, cpu: CpuId, admin: &mut Admin) -> Result<Closed, Error> {
        let spare = self.spare_tree(admin).ok_or(Error::NoMemory)?;
        // Whoever began to map before has finished when this returns, and nobody begins.
        admin.mapping = false;
        self.publish(admin);
        admin.mapping = true;
        if let Err(error) = self.follow_mappings(cpu, admin, spare.root) {
            admin.spare.is_ready = false;
            self.publish(admin);
            return Err(error);
        }
        arch::dsb_ish();
        let epoch = self.flip(admin);
        let retired = core::mem::replace(&mut admin.tree, spare);
        self.set_tree(spare);
        let (kicked, wait_ticks) = self.publish_registers(cpu, admin);
        admin.spare = Spare {
            root: Some(retired.root),
            retired: true,
            is_ready: false,
        };
        Ok(Closed {
            epoch,
            engine: Engine::Swap,
            late: false,
            kicked,
            wait_ticks,
        })
    }

    fn spare_tree(&self, admin: &Admin) -> Option<Tree> {
        Some(Tree {
            root: admin.spare.root?,
            vmid: 1 - admin.tree.vmid,
        })
    }

    /// The trees of this VM, for taking them apart: the live one and the spare.
    pub(crate) fn trees(&self) -> (Tree, Option<Tree>) {
        let admin = self.admin.lock();
        (admin.tree, self.spare_tree(&admin))
    }

    /// What is translated or logged changes: the spare has to be gone through before it is used. Nothing of it is cached
    /// afterwards either, so that memory which is unmapped next is reached by nobody.
    pub(crate) fn outdate_spare(&self, cpu: CpuId) {
        if self.engine() == Engine::Swap {
            let mut admin = self.admin.lock();
            admin.spare.is_ready = false;
            self.forget_retired(cpu, &mut admin);
        }
    }

    /// Invalidates the VMID of a tree that CPUs ran under before the last call, and gives its number back.
    fn forget_retired(&self, cpu: CpuId, admin: &mut Admin) {
        if let Some(tree) = self.spare_tree(admin).filter(|_| admin.spare.retired) {
            arch::dsb_ishst();
            self.under_vmid(cpu, tree, tlb::everything);
            self.services.vmids.release(self.vmid(tree));
            admin.spare.retired = false;
        }
    }

    fn prepare_spare(&self, cpu: CpuId, admin: &mut Admin) -> Result<Prepared, Error> {
        let root = match admin.spare.root {
            Some(root) => root,
            None => Self::allocate_root(self.shape(), &self.services)?,
        };
        admin.spare.root = Some(root);
        self.forget_retired(cpu, admin);
        for mapped in admin
            .slots
            .iter()
            .flatten()
            .filter_map(|slot| slot.mapped.as_ref())
        {
            // What is mapped from here on is looked at again by the call.
            take_regions(mapped, |_| Ok(()))?;
        }
        let mut copy = self.copy_to(cpu, root);
        let end = 1_u64
            .checked_shl(self.shape().ipa_bits())
            .unwrap_or(u64::MAX);
        let mut at = 0;
        while at < end {
            at = copy.region(Ipa::new(at))?;
        }
        let done = copy.done;
        drop(copy);
        admin.spare.is_ready = true;
        Ok(done)
    }

    fn copy_to(&self, cpu: CpuId, spare: Root) -> Copy<'_> {
        Copy {
            stage2: self,
            cpu,
            spare,
            tables: Spares::new(&*self.services.frames),
            done: Prepared::default(),
        }
    }

    /// Brings the regions up to date in which something was mapped since the spare was prepared.
    fn follow_mappings(&self, cpu: CpuId, admin: &Admin, spare: Root) -> Result<(), Error> {
        let mut copy = self.copy_to(cpu, spare);
        for entry in admin.slots.iter().flatten() {
            let Some(mapped) = &entry.mapped else {
                continue;
            };
            let base = entry.slot.config.ipa.align_down(Level::L2.span_bytes());
            take_regions(mapped, |region| {
                let at = base.raw() + region * Level::L2.span_bytes();
                copy.region(Ipa::new(at)).map(drop)
            })?;
        }
        Ok(())
    }
}

/// Takes every region out of `mapped`.
fn take_regions(
    mapped: &Bitmap,
    mut visit: impl FnMut(u64) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut at = 0;
    let mut outcome = Ok(());
    while let Some(group) = mapped.next_group(at, mapped.pages()) {
        at = group + GROUP_PAGES;
        mapped.take_group(group, at.min(mapped.pages()), |first, bits| {
            for region in (0..WORD_PAGES).filter(|bit| bits & (1 << bit) != 0) {
                if outcome.is_ok() {
                    outcome = visit(first + region);
                }
            }
        });
    }
    outcome
}

impl Copy<'_> {
    /// Copies the region around `at`, or more where the live tree has nothing or a larger block there, and returns where it
    /// ends.
    fn region(&mut self, at: Ipa) -> Result<u64, Error> {
        loop {
            let tried = {
                let active = self.stage2.services.quiescence.enter(self.cpu);
                let context = self.stage2.context.load(&active);
                self.try_region(context, at, &active)
            };
            match tried {
                Ok(next) => return Ok(next),
                Err(Wait::Busy) => arch::yield_now(),
                Err(Wait::Tables) => {
                    self.tables.reserve(REGION_TABLES);
                    if self.tables.is_empty() {
                        return Err(Error::NoMemory);
                    }
                }
            }
        }
    }

    fn try_region(&mut self, context: &Context, at: Ipa, active: &Active<'_>) -> Result<u64, Wait> {
        let live = context.tree.root.walk_to(at, Level::L2, active);
        let Some(live) = live else {
            return Ok(u64::MAX);
        };
        if live.found.is_held() {
            return Err(Wait::Busy);
        }
        let base = at.align_down(live.level.span_bytes());
        let next = base.raw().saturating_add(live.level.span_bytes());
        let spare = self.descend(context, base, live.level, active)?;
        let old = spare.load();
        let was_written = live.level == Level::L2
            && old.is_table(live.level)
            && is_written(context, table_of(old, active));
        if !live.found.is_table(live.level) {
            if was_written && live.found.is_leaf(live.level) {
                // Written in the last epoch and, so far, not in this one: it will be.
                let first = live.found.of_level(Level::L3);
                for (page, to) in (0..).zip(table_of(old, active)) {
                    let page = first.further(page * Level::L3.span_bytes());
                    self.write(to, copied(context, page, Level::L3), false);
                }
                self.done.hot += 1;
                return Ok(next);
            }
            let copied = copied(context, live.found, live.level);
            self.put(spare, live.level, copied, active);
            self.done.cold += u64::from(copied != Descriptor::EMPTY);
            return Ok(next);
        }
        let table = table_of(live.found, active);
        if table.iter().any(|slot| slot.load().is_held()) {
            return Err(Wait::Busy);
        }
        let written = was_written || is_written(context, table);
        if !written && let Some(block) = block_of(self.stage2, context, base, table) {
            self.put(spare, live.level, block, active);
            self.done.cold += 1;
            return Ok(next);
        }
        if !old.is_table(live.level) {
            let new = self.tables.take().ok_or(Wait::Tables)?;
            new.fill(active, |_| Descriptor::EMPTY);
            self.link(spare, &new);
        }
        let into = table_of(spare.load(), active);
        let young = old.is_leaf(live.level) && old.is_young();
        for (from, to) in table.iter().zip(into) {
            self.write(to, copied(context, from.load(), Level::L3), young);
        }
        self.done.hot += 1;
        Ok(next)
    }

    /// The spare tree's slot of `level` for `ipa`; tables on the way are made, of what was there.
    fn descend<'a>(
        &mut self,
        context: &Context,
        ipa: Ipa,
        level: Level,
        active: &'a Active<'_>,
    ) -> Result<&'a Slot, Wait> {
        loop {
            let Some(Position {
                slot,
                level: found_at,
                found,
            }) = self.spare.walk_to(ipa, level, active)
            else {
                return Err(Wait::Busy);
            };
            let Some(deeper) = found_at.deeper().filter(|_| found_at < level) else {
                return Ok(slot);
            };
            let new = self.tables.take().ok_or(Wait::Tables)?;
            let first = copied(context, found, found_at).of_level(deeper);
            let is_leaf = found.is_leaf(found_at);
            new.fill(active, |index| {
                if is_leaf {
                    first.further(index as u64 * deeper.span_bytes())
                } else {
                    Descriptor::EMPTY
                }
            });
            self.link(slot, &new);
        }
    }

    fn link(&mut self, slot: &Slot, table: &SpareTable) {
        slot.edit(table.descriptor());
        self.done.descriptors += 1;
        self.done.tables += 1;
        percpu::count(Event::TablesPrepared);
    }

    /// Puts what is no table into `slot`, of `level`; a table that was there is given back.
    fn put(&mut self, slot: &Slot, level: Level, new: Descriptor, active: &Active<'_>) {
        let old = slot.load();
        let Some(deeper) = level.deeper().filter(|_| old.is_table(level)) else {
            return self.write(slot, new, false);
        };
        let young = any_accessed(table_of(old, active), deeper, false, active);
        slot.edit(if young { accessed(new) } else { new });
        self.done.descriptors += 1;
        self.tables.reclaim_linked(old.address(), deeper, active);
    }

    /// Puts the leaf or hole `new` where a leaf or hole is; it is young if that was, or if `young`.
    fn write(&mut self, slot: &Slot, new: Descriptor, young: bool) {
        let old = slot.load();
        let new = if young || old.is_young() {
            accessed(new)
        } else {
            new
        };
        if old != new {
            slot.edit(new);
            self.done.descriptors += 1;
        }
    }
}

/// The leaf or hole `new`, young if it is a leaf.
fn accessed(new: Descriptor) -> Descriptor {
    if new == Descriptor::EMPTY {
        new
    } else {
        new.young()
    }
}

/// What the spare has for the leaf or hole `found`, of `level`: the same, read-only where memory is logged.
fn copied(context: &Context, found: Descriptor, level: Level) -> Descriptor {
    if !found.is_leaf(level) {
        return Descriptor::EMPTY;
    }
    match context.tagged(found.tag()) {
        Some(view) if view.log.is_some() => view.rights.revoke(found, level),
        _ => found,
    }
}

/// Whether a logged leaf of `table`, of level 3, permits stores.
fn is_written(context: &Context, table: &Table) -> bool {
    table.iter().any(|slot| {
        let found = slot.load();
        let view = context.tagged(found.tag());
        found.is_leaf(Level::L3)
            && view.is_some_and(|view| view.log.is_some() && view.rights.permits(found))
    })
}

/// The read-only block that translates what `table`, of level 3 and for memory from `base`, does, if all of it is logged.
fn block_of(stage2: &Stage2, context: &Context, base: Ipa, table: &Table) -> Option<Descriptor> {
    let first = table.first()?.load();
    let view = context.tagged(first.tag())?;
    let slot = &view.slot;
    let whole = view.log.is_some()
        && slot.config.ipa <= base
        && slot.level_at(base, Level::L2) == Level::L2;
    if !whole {
        return None;
    }
    let leaf = slot.leaf(base, Level::L3, first.tag(), false)?;
    let expected = Descriptor::leaf(&leaf, Level::L3, stage2.format());
    let same = |(index, found): (usize, &Slot)| {
        let expected = expected.further(index as u64 * Level::L3.span_bytes());
        view.rights.revoke(found.load(), Level::L3).young() == expected
    };
    table.iter().enumerate().all(same).then_some(())?;
    let block = view.rights.revoke(expected.of_level(Level::L2), Level::L2);
    let young = table.iter().any(|slot| slot.load().is_young());
    Some(if young { block } else { block.old() })
}
