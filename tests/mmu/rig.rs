//! A rig for tests of the shipped MMU on the fake machine: several CPUs, several VMs, guests that access memory and
//! take the faults they get, and a flat model of what they wrote.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vellum::addr::{Ipa, PAGE_BYTES, Pa};
use vellum::arch::fake::{self, Machine, Outcome};
use vellum::mem::TableFrames;
use vellum::mmu::descriptor::Leaf;
use vellum::mmu::{
    Access, AccessFlag, Collapse, Config, Engine, Fault, FaultKind, Format, Hardware, Level,
    Locking, PageSet, Permissions, Resolution, Services, Shape, Split, Splitting, Stage2,
    TlbFeatures, Tracking, VmidAllocator,
};
use vellum::sync::percpu;
use vellum::sync::quiescence::{CpuId, Domain};
use vellum::trace::Event;

use crate::closing::Closing;
use crate::cpus::{self, Cpus};
use crate::flat::{ModelSlot, Vm, usize_of};

/// Bytes of a level-2 block.
pub(crate) const BLOCK_BYTES: u64 = 0x20_0000;
/// Where the first slot of every VM begins.
pub(crate) const RAM: u64 = 0x8000_0000;
/// The three modes.
pub(crate) const MODES: [Locking; 3] = [Locking::Mutex, Locking::Rwlock, Locking::Lockless];
/// Faults after which one access is said to make no progress.
const PATIENCE: usize = 24;

/// Frames from the host's heap, which may run out: how many are left.
pub(crate) struct HostFrames(pub(crate) Arc<AtomicUsize>);

/// More frames than anybody takes.
const PLENTY: usize = 1 << 40;

fn frames_layout(pages: usize) -> Layout {
    let bytes = pages * 4096;
    Layout::from_size_align(bytes, bytes.next_power_of_two()).expect("a layout")
}

impl TableFrames for HostFrames {
    fn allocate(&self, pages: usize) -> Option<Pa> {
        let take = |left: usize| left.checked_sub(pages);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .ok()?;
        // SAFETY: The layout is not empty.
        let pointer = unsafe { alloc_zeroed(frames_layout(pages)) };
        // Whatever was here before: the pool may not rely on zeros.
        // SAFETY: Just allocated, with this size.
        unsafe { pointer.write_bytes(0xa5, pages * 4096) };
        Some(Pa::new(pointer.expose_provenance() as u64))
    }

    fn release(&self, frames: Pa, pages: usize) {
        self.0.fetch_add(pages, Ordering::Relaxed);
        let at = usize::try_from(frames.raw()).expect("an address");
        // SAFETY: `frames` came from `allocate` with the same number of pages.
        unsafe {
            dealloc(
                std::ptr::with_exposed_provenance_mut(at),
                frames_layout(pages),
            )
        };
    }
}

/// What a rig is made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) cpus: usize,
    pub(crate) locking: Locking,
    pub(crate) vmid_bits: u32,
    pub(crate) range_tlbi: bool,
    pub(crate) hpfar: bool,
    pub(crate) splitting: Splitting,
    pub(crate) engine: Engine,
    pub(crate) tracking: Tracking,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            cpus: 4,
            locking: Locking::Lockless,
            vmid_bits: 8,
            range_tlbi: false,
            hpfar: false,
            splitting: Splitting::default(),
            engine: Engine::Walk,
            tracking: Tracking::Fault,
        }
    }
}

/// A machine with VMs.
pub(crate) struct Rig {
    pub(crate) machine: Rc<Machine>,
    pub(crate) services: Arc<Services>,
    pub(crate) plan: Plan,
    /// Frames that are left for tables.
    pub(crate) frames: Arc<AtomicUsize>,
    /// Which VM each CPU holds.
    pub(crate) cpus: Rc<Cpus>,
}

/// How an access ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Ended {
    Done,
    NoSlot,
    Denied,
}

impl Rig {
    pub(crate) fn new(plan: Plan) -> Self {
        let features = fake::Features {
            initial_tables: 2,
            hpfar_on_permission: plan.hpfar,
            bbm: u8::try_from(plan.splitting.bbm.level()).expect("a level"),
            indirection: plan.engine == Engine::Pie,
            dirty_state: plan.tracking == Tracking::Dbm,
            ..fake::Features::default()
        };
        let machine = Rc::new(Machine::new(plan.cpus, features));
        // SAFETY: Tables are frames of `HostFrames`, given back after the machine is told that they end; the MMU
        // accesses them by atomics.
        unsafe { machine.tables_are_memory() };
        for cpu in 0..plan.cpus {
            let index = u32::try_from(cpu).expect("few CPUs");
            machine.on(cpu, || percpu::this().index.store(index, Ordering::Relaxed));
        }
        let frames = Arc::new(AtomicUsize::new(PLENTY));
        let services = Services {
            quiescence: Domain::new(plan.cpus),
            vmids: VmidAllocator::new(plan.vmid_bits, plan.cpus),
            frames: Box::new(HostFrames(Arc::clone(&frames))),
            format: Format {
                forced_write_back: false,
                permissions: Permissions::Direct,
            },
            tlb: TlbFeatures {
                range: plan.range_tlbi,
            },
            hardware: Hardware {
                indirection: features.indirection,
                access_flag: features.dirty_state,
                dirty_state: features.dirty_state,
            },
            idle_vttbr: 0,
            kick: Box::new(cpus::kick),
        };
        let cpus = Cpus::new(&machine, plan.cpus);
        Self {
            machine,
            services: Arc::new(services),
            plan,
            frames,
            cpus,
        }
    }

    /// A VM without slots.
    pub(crate) fn vm(&self) -> Rc<Vm> {
        let shape = Shape::new(40).expect("40 bits are a shape");
        let config = Config {
            locking: self.plan.locking,
            shape,
            splitting: self.plan.splitting,
            engine: self.plan.engine,
            tracking: self.plan.tracking,
            access_flag: match self.plan.tracking {
                Tracking::Fault => AccessFlag::Software,
                Tracking::Dbm => AccessFlag::Hardware,
            },
        };
        let stage2 = Stage2::new(config, Arc::clone(&self.services)).expect("frames for a root");
        Rc::new(Vm {
            stage2,
            slots: RefCell::default(),
            memory: RefCell::default(),
        })
    }

    /// A VM with one slot of RAM, loaded on every CPU but 0, the controller's.
    pub(crate) fn running_vm(&self, blocks: u64, max_leaf: Level) -> Rc<Vm> {
        let vm = self.vm();
        vm.add_ram(RAM, blocks, max_leaf, true);
        for cpu in 1..self.plan.cpus {
            self.load(cpu, &vm);
        }
        vm
    }

    /// `cpu` stops running what it runs and runs `vm`.
    pub(crate) fn load(&self, cpu: usize, vm: &Rc<Vm>) {
        self.unload(cpu);
        let vttbr = self.machine.on(cpu, || vm.stage2.load(CpuId(cpu)));
        self.machine.load_vttbr(cpu, vttbr);
        self.cpus.set(cpu, Some(Rc::clone(vm)));
        self.cpus.enter(cpu);
    }

    /// `cpu` becomes idle.
    pub(crate) fn unload(&self, cpu: usize) {
        let Some(vm) = self.cpus.set(cpu, None) else {
            return;
        };
        self.machine.load_vttbr(cpu, 0);
        self.machine.on(cpu, || vm.stage2.unload(CpuId(cpu)));
    }

    pub(crate) fn vm_on(&self, cpu: usize) -> Option<Rc<Vm>> {
        self.cpus.vm(cpu)
    }

    /// VMID under which some CPU runs `vm`.
    pub(crate) fn vmid_of(&self, vm: &Vm) -> Option<u16> {
        let mut vttbrs = (0..self.plan.cpus)
            .filter(|cpu| self.vm_on(*cpu).is_some_and(|held| same(&held, vm)))
            .map(|cpu| self.machine.on(cpu, vellum::arch::vttbr));
        // One that rests holds no root.
        let vttbr = vttbrs.find(|vttbr| *vttbr != 0)?;
        u16::try_from(vttbr >> 48).ok()
    }

    /// One access by the guest on `cpu`, with every fault it takes until it is done.
    pub(crate) fn access(&self, cpu: usize, ipa: Ipa, access: Access) -> Ended {
        self.attempt(cpu, ipa, access, PATIENCE)
            .unwrap_or_else(|| panic!("CPU {cpu} makes no progress with {access:?} at {ipa}"))
    }

    /// As [`Rig::access`], but gives up after `faults` faults: what a guest gets done in the middle of another CPU's
    /// break-before-make.
    pub(crate) fn attempt(
        &self,
        cpu: usize,
        ipa: Ipa,
        access: Access,
        faults: usize,
    ) -> Option<Ended> {
        let vm = self.vm_on(cpu).expect("a guest on this CPU");
        let how = hardware(access);
        for _ in 0..=faults {
            self.cpus.enter(cpu);
            if access == Access::Write && self.plan.tracking == Tracking::Dbm {
                vm.with_slot(ipa, |slot, page| slot.reportable.borrow_mut().insert(page));
            }
            let abort = match self.machine.guest_access(cpu, ipa, how) {
                Some(Outcome::Hit(pa)) => {
                    vm.reached(ipa, pa, access);
                    return Some(Ended::Done);
                }
                Some(Outcome::Abort(abort)) => abort,
                None => panic!("no guest on CPU {cpu}"),
            };
            if access == Access::Write {
                vm.with_slot(ipa, |slot, page| slot.reportable.borrow_mut().insert(page));
            }
            match self.take(cpu, &vm, abort, access) {
                Resolution::Resume => {}
                Resolution::TopUp => self.top_up(cpu, &vm, ipa),
                Resolution::NoSlot => return Some(Ended::NoSlot),
                Resolution::Denied => return Some(Ended::Denied),
            }
        }
        None
    }

    /// Takes a fault for `access` if one is possible at all, once, then accesses as far as that goes: what a guest gets
    /// done in the middle of another CPU's work.
    pub(crate) fn provoke(&self, cpu: usize, ipa: Ipa, access: Access) {
        let vm = self.vm_on(cpu).expect("a guest on this CPU");
        let outcomes = self.machine.outcomes(cpu, ipa, hardware(access));
        let abort = outcomes.into_iter().find_map(|outcome| match outcome {
            Outcome::Abort(abort) => Some(abort),
            Outcome::Hit(_) => None,
        });
        if let Some(abort) = abort {
            if access == Access::Write {
                vm.with_slot(ipa, |slot, page| slot.reportable.borrow_mut().insert(page));
            }
            if self.take(cpu, &vm, abort, access) == Resolution::TopUp {
                self.top_up(cpu, &vm, ipa);
            }
        }
        self.attempt(cpu, ipa, access, 3);
    }

    /// Fills the stash, or lets the guest write the whole block around `ipa` when there is no frame.
    fn top_up(&self, cpu: usize, vm: &Vm, ipa: Ipa) {
        let filled = self.machine.on(cpu, || vm.stage2.top_up(CpuId(cpu)));
        if filled.is_ok() {
            return;
        }
        vm.with_slot(ipa, |slot, page| {
            let block = page / 512 * 512;
            slot.reportable.borrow_mut().extend(block..block + 512);
        });
        let written = self
            .machine
            .on(cpu, || vm.stage2.write_whole_block(CpuId(cpu), ipa));
        assert!(written, "frames for tables");
    }

    /// One fault, decoded as `vm` decodes it.
    pub(crate) fn take(
        &self,
        cpu: usize,
        vm: &Vm,
        abort: fake::Abort,
        access: Access,
    ) -> Resolution {
        self.cpus.leave(cpu);
        self.machine.on(cpu, || {
            let (kind, ipa) = match abort.kind {
                fake::FaultKind::Translation => (FaultKind::Translation, Some(abort.hpfar)),
                fake::FaultKind::AccessFlag => (FaultKind::AccessFlag, Some(abort.hpfar)),
                fake::FaultKind::Permission => {
                    (FaultKind::Permission, vellum::arch::at_s1e1r(abort.far))
                }
            };
            let ipa = ipa
                .expect("stage 1 of the fake guest never fails")
                .align_down(PAGE_BYTES);
            vm.stage2.fault(
                CpuId(cpu),
                &Fault {
                    ipa,
                    va: abort.far,
                    kind,
                    access,
                },
            )
        })
    }

    pub(crate) fn write(&self, cpu: usize, ipa: Ipa) -> Ended {
        self.access(cpu, ipa, Access::Write)
    }

    pub(crate) fn read(&self, cpu: usize, ipa: Ipa) -> Ended {
        self.access(cpu, ipa, Access::Read)
    }

    /// Begins to log slot `index`; what was split.
    pub(crate) fn enable(&self, cpu: usize, vm: &Vm, index: usize, all_set: bool) -> Split {
        let slots = vm.slots.borrow();
        let slot = &slots[index];
        slot.reportable.borrow_mut().clear();
        let enabled = self.machine.on(cpu, || {
            vm.stage2.enable_logging(CpuId(cpu), slot.id, all_set)
        });
        let split = enabled.expect("logging can be enabled");
        if all_set {
            slot.reportable.borrow_mut().extend(0..slot.pages);
            *slot.copied.borrow_mut() = Some(vec![u64::MAX; usize_of(slot.pages)]);
        } else {
            *slot.copied.borrow_mut() = Some(slot.writes.borrow().clone());
            self.no_stale_writable(vm, slot, 0..slot.pages);
        }
        split
    }

    /// Ends logging of slot `index`; what was collapsed.
    pub(crate) fn disable(&self, cpu: usize, vm: &Vm, index: usize) -> Collapse {
        let slots = vm.slots.borrow();
        let disabled = self.machine.on(cpu, || {
            vm.stage2.disable_logging(CpuId(cpu), slots[index].id)
        });
        *slots[index].copied.borrow_mut() = None;
        *slots[index].closing.borrow_mut() = None;
        disabled.expect("logging can be disabled")
    }

    /// Splits `[from, to)` of slot `index`.
    pub(crate) fn split(&self, cpu: usize, vm: &Vm, index: usize, from: u64, to: u64) -> Split {
        let id = vm.slots.borrow()[index].id;
        let done = self
            .machine
            .on(cpu, || vm.stage2.split(CpuId(cpu), id, from, to));
        done.expect("a slot and a good range")
    }

    /// Collapses `[from, to)` of slot `index`.
    pub(crate) fn collapse(
        &self,
        cpu: usize,
        vm: &Vm,
        index: usize,
        from: u64,
        to: u64,
    ) -> Collapse {
        let id = vm.slots.borrow()[index].id;
        let done = self
            .machine
            .on(cpu, || vm.stage2.collapse(CpuId(cpu), id, from, to));
        done.expect("a slot and a good range")
    }

    /// Every leaf of `vm`.
    pub(crate) fn leaves(&self, vm: &Vm) -> Vec<(Ipa, Level, Leaf)> {
        let mut leaves = Vec::new();
        self.machine.on(0, || {
            vm.stage2
                .for_each_leaf(CpuId(0), |ipa, level, leaf| leaves.push((ipa, level, leaf)));
        });
        leaves
    }

    /// How often `event` was counted, on all CPUs.
    pub(crate) fn count(&self, event: Event) -> u64 {
        let of = |cpu| self.machine.on(cpu, || percpu::this().counters.read(event));
        (0..self.plan.cpus).map(of).sum()
    }

    /// What is recorded of slot `index` now.
    pub(crate) fn dirty(&self, cpu: usize, vm: &Vm, index: usize) -> BTreeSet<u64> {
        let mut set = PageSet::default();
        let id = vm.slots.borrow()[index].id;
        self.machine
            .on(cpu, || vm.stage2.dirty(CpuId(cpu), id, &mut set))
            .expect("a logged slot");
        set.pages().collect()
    }

    /// Clears `[from, to)` of slot `index` and copies what is reported.
    pub(crate) fn clear(
        &self,
        cpu: usize,
        vm: &Vm,
        index: usize,
        from: u64,
        to: u64,
    ) -> BTreeSet<u64> {
        self.clear_and_split(cpu, vm, index, from, to).0
    }

    /// The same, and what was split.
    pub(crate) fn clear_and_split(
        &self,
        cpu: usize,
        vm: &Vm,
        index: usize,
        from: u64,
        to: u64,
    ) -> (BTreeSet<u64>, Split) {
        let slots = vm.slots.borrow();
        let slot = &slots[index];
        let mut set = PageSet::default();
        // Tries that end while `clear` runs may be recorded before or after it.
        let tried = slot.reportable.borrow().clone();
        slot.reportable
            .borrow_mut()
            .retain(|page| !(from..to).contains(page));
        let cleared = self.machine.on(cpu, || {
            vm.stage2.clear(CpuId(cpu), slot.id, from, to, &mut set)
        });
        let split = cleared.expect("a logged slot and a good range");
        for page in set.pages() {
            let known = tried.contains(&page) || slot.reportable.borrow().contains(&page);
            assert!(known, "page {page} was reported but not written");
        }
        self.copy(vm, slot, &set);
        (set.pages().collect(), split)
    }

    /// `set` was reported: nothing of it may still be written unseen. Copies it.
    pub(crate) fn copy(&self, vm: &Vm, slot: &ModelSlot, set: &PageSet) {
        let mut copied = slot.copied.borrow_mut();
        let copied = copied.as_mut().expect("the model logs, too");
        for page in set.pages() {
            copied[usize_of(page)] = slot.writes.borrow()[usize_of(page)];
            self.no_stale_writable(vm, slot, page..page + 1);
        }
    }

    fn no_stale_writable(&self, vm: &Vm, slot: &ModelSlot, pages: core::ops::Range<u64>) {
        if let Some(vmid) = self.vmid_of(vm) {
            let bytes = (pages.end - pages.start) * PAGE_BYTES;
            self.machine
                .assert_no_writable(vmid, slot.at(pages.start), bytes);
        }
    }

    /// Checks that every page written since it was copied is recorded, no page is that nobody wrote, and that the oracle
    /// is content. All CPUs are between entry points.
    pub(crate) fn check(&self, vm: &Vm) {
        for index in 0..vm.slots.borrow().len() {
            let copied = vm.slots.borrow()[index].copied.borrow().clone();
            let Some(copied) = copied else { continue };
            let recorded = self.dirty(0, vm, index);
            let slots = vm.slots.borrow();
            let writes = slots[index].writes.borrow();
            let closing = slots[index].closing.borrow();
            let is_due = |page| {
                let due = |closing: &Closing| closing.tried.contains(&page);
                closing.as_ref().is_some_and(due)
            };
            for page in 0..slots[index].pages {
                let at = usize_of(page);
                if writes[at] != 0 && !recorded.contains(&page) {
                    let (slot, ipa) = (&slots[index], slots[index].at(page));
                    self.machine.assert_unwritable(ipa, slot.memory(ipa));
                }
                let missed = writes[at] != copied[at] && !recorded.contains(&page) && !is_due(page);
                assert!(
                    !missed,
                    "page {page} of slot {index} was written and is not recorded"
                );
            }
            let reportable = slots[index].reportable.borrow();
            let excess = recorded.difference(&reportable).next();
            assert_eq!(excess, None, "recorded in slot {index} but not written");
        }
        self.content();
    }

    /// Checks that the oracle is content.
    #[track_caller]
    pub(crate) fn content(&self) {
        assert_eq!(self.machine.violations(), []);
    }

    /// Ends `vm`, which nobody else refers to.
    pub(crate) fn destroy(&self, cpu: usize, vm: Rc<Vm>) {
        for other in 0..self.plan.cpus {
            if self.vm_on(other).is_some_and(|held| same(&held, &vm)) {
                self.unload(other);
            }
        }
        let vm = Rc::into_inner(vm).expect("the last reference");
        self.machine.on(cpu, || vm.stage2.destroy(CpuId(cpu)));
        for slot in vm.slots.borrow().iter() {
            self.machine
                .assert_unreachable(slot.pa, slot.pages * PAGE_BYTES);
        }
        self.content();
    }
}

/// Lets `work` run on other CPUs in the middle of what this thread does: once after each event that `when` picks.
pub(crate) struct Interruptions;

impl Interruptions {
    pub(crate) fn new(work: impl Fn(fake::Event) + 'static) -> Self {
        let armed = Cell::new(true);
        fake::observe(Some(Rc::new(move |event| {
            // What runs inside is not interrupted itself.
            if armed.replace(false) {
                work(event);
                armed.set(true);
            }
        })));
        Self
    }
}

impl Drop for Interruptions {
    fn drop(&mut self) {
        fake::observe(None);
    }
}

fn same(a: &Rc<Vm>, b: &Vm) -> bool {
    std::ptr::eq(Rc::as_ptr(a), b)
}

const fn hardware(access: Access) -> fake::Access {
    match access {
        Access::Read => fake::Access::Read,
        Access::Write => fake::Access::Write,
        Access::Execute => fake::Access::Execute,
    }
}
