//! One VM's stage 2: its tree, its slots, its lock, its VMID. The entry points are spread over the verbs' files
//! ([`fault`](super::fault), [`logging`](super::logging), [`unmap`](super::unmap), ...); this one holds what they share.
//!
//! Every entry point takes `cpu`, the calling CPU's position, and is called outside any section and without any lock.

use alloc::boxed::Box;
use alloc::sync::Arc;

use crate::addr::{PAGE_BYTES, Pa};
use crate::arch;
use crate::mem::TableFrames;
use crate::mmu::descriptor::{Descriptor, Format, TAGS, Tag};
use crate::mmu::error::Error;
use crate::mmu::geometry::Shape;
use crate::mmu::lock::{Exclusive, Locking, MmuLock};
use crate::mmu::logging::SlotLog;
use crate::mmu::pool::TablePool;
use crate::mmu::slot::{Context, MemorySlot, SlotConfig, SlotId, SlotView};
use crate::mmu::splitting::Splitting;
use crate::mmu::table::root_at;
use crate::mmu::tlb::{OpenDebts, TlbFeatures};
use crate::mmu::vmid::{RESERVED, VmidAllocator, VmidCell};
use crate::mmu::walk::Root;
use crate::sync::mutex::Mutex;
use crate::sync::published::Published;
use crate::sync::quiescence::{CpuId, Domain};

/// What the MMUs of all VMs of a machine share.
pub struct Services {
    /// Grace periods over all CPUs.
    pub quiescence: Domain,
    /// VMIDs.
    pub vmids: VmidAllocator,
    /// Frames for tables.
    pub frames: Box<dyn TableFrames>,
    /// Memory type encoding of this machine.
    pub format: Format,
    /// TLB maintenance that this machine has beyond the base.
    pub tlb: TlbFeatures,
}

/// What is chosen when a VM is created.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Locking mode.
    pub locking: Locking,
    /// Shape of the tree.
    pub shape: Shape,
    /// How blocks become tables and tables blocks.
    pub splitting: Splitting,
}

/// One VM's stage 2.
pub struct Stage2 {
    pub(crate) context: Published<Context>,
    pub(crate) lock: MmuLock,
    pub(crate) services: Arc<Services>,
    pub(crate) pool: TablePool,
    pub(crate) admin: Mutex<Admin>,
    pub(crate) splitting: Splitting,
    root: Root,
    vmid: VmidCell,
    debts: OpenDebts,
}

/// What only configuration changes: slots and their logs.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) slots: [Option<AdminSlot>; TAGS],
}

#[derive(Debug)]
pub(crate) struct AdminSlot {
    pub(crate) slot: Arc<MemorySlot>,
    pub(crate) log: Option<SlotLog>,
}

impl Admin {
    /// The slot `id`.
    pub(crate) fn slot(&mut self, id: SlotId) -> Result<&mut AdminSlot, Error> {
        self.slots
            .get_mut(id.index())
            .and_then(Option::as_mut)
            .ok_or(Error::NoSlot)
    }

    /// The snapshot that describes this state over `root`.
    pub(crate) fn snapshot(&self, root: Root) -> Context {
        let view = |slot: &AdminSlot| SlotView {
            slot: slot.slot.clone(),
            log: slot.log.as_ref().map(SlotLog::current),
        };
        Context {
            root,
            slots: core::array::from_fn(|index| self.slots.get(index)?.as_ref().map(view)),
        }
    }
}

impl Stage2 {
    /// An empty stage 2.
    ///
    /// Rounding: none. Races: none, nobody knows it yet. TLB: nothing owed. Cost: the initial tables.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`], [`Error::BadChunk`], [`Error::BadBatch`].
    pub fn new(config: Config, services: Arc<Services>) -> Result<Self, Error> {
        config.splitting.check()?;
        let root = Self::allocate_root(config.shape, &services)?;
        let cpus = services.quiescence.cpus();
        let admin = Admin {
            slots: core::array::from_fn(|_| None),
        };
        Ok(Self {
            context: Published::new(admin.snapshot(root)),
            lock: MmuLock::new(config.locking),
            pool: TablePool::new(cpus),
            admin: Mutex::new(admin),
            splitting: config.splitting,
            root,
            vmid: VmidCell::default(),
            debts: OpenDebts::default(),
            services,
        })
    }

    fn allocate_root(shape: Shape, services: &Services) -> Result<Root, Error> {
        let pa = services
            .frames
            .allocate(shape.root_pages())
            .ok_or(Error::NoMemory)?;
        note_root(pa, shape, true);
        // The section belongs to no CPU's protocol: nobody else can reach these frames yet.
        let nobody = Domain::new(1);
        let active = nobody.enter(CpuId(0));
        // SAFETY: The frames were just allocated for these tables.
        let slots = unsafe { root_at(pa, shape.root_entries(), &active) };
        for slot in slots {
            slot.prepare(Descriptor::EMPTY);
        }
        arch::dsb_ishst();
        Ok(Root { pa, shape })
    }

    /// The locking mode.
    ///
    /// Rounding: none. Races: none. TLB: nothing owed. Cost: constant.
    pub fn locking(&self) -> Locking {
        self.lock.locking()
    }

    /// The shape of the tree.
    ///
    /// Rounding: none. Races: none. TLB: nothing owed. Cost: constant.
    pub fn shape(&self) -> Shape {
        self.root.shape
    }

    /// Takes the MMU lock's exclusive side, for measuring how long that takes among faulting vCPUs.
    ///
    /// Rounding: none. Races: any number of faults, which wait except in lockless mode. TLB: nothing owed. Cost: bounded by
    /// the faults already inside.
    pub fn exclusive(&self) -> Exclusive<'_> {
        self.lock.exclusive()
    }

    /// VTTBR_EL2 to run a vCPU of this VM on `cpu`, the calling CPU, which keeps the VMID until [`Stage2::unload`].
    ///
    /// Rounding: none. Races: other CPUs' loads and rollovers. TLB: a rollover invalidates everything, inside. Cost: one
    /// compare-and-swap of a CPU's own line, or the allocator's lock.
    pub fn load(&self, cpu: CpuId) -> u64 {
        self.services
            .vmids
            .load(&self.vmid, cpu)
            .vttbr(self.root.pa)
    }

    /// `cpu`, the calling CPU, no longer runs this VM: its VTTBR_EL2 already names an idle root.
    ///
    /// Rounding: none. Races: rollovers. TLB: nothing owed, entries stay cached. Cost: one swap.
    pub fn unload(&self, cpu: CpuId) {
        self.services.vmids.unload(cpu);
    }

    /// Adds a slot; its pages are mapped when they are first touched.
    ///
    /// Rounding: none, unaligned is refused. Races: faults see the slot as a whole or not at all. TLB: nothing owed, nothing
    /// was mapped. Cost: one snapshot, one grace period.
    ///
    /// # Errors
    ///
    /// [`Error::BadRange`], [`Error::Overlap`], or [`Error::NoSlot`] when all eight are taken.
    pub fn add_slot(&self, config: SlotConfig) -> Result<SlotId, Error> {
        let slot = Arc::new(MemorySlot::new(config, self.root.shape)?);
        let mut admin = self.admin.lock();
        if let Some(other) = admin
            .slots
            .iter()
            .flatten()
            .find(|other| other.slot.overlaps(&slot))
        {
            return Err(Error::Overlap(other.slot.config.ipa));
        }
        let (index, free) = admin
            .slots
            .iter_mut()
            .enumerate()
            .find(|(_, slot)| slot.is_none())
            .ok_or(Error::NoSlot)?;
        *free = Some(AdminSlot { slot, log: None });
        self.publish(&admin);
        Tag::new(index).map(SlotId).ok_or(Error::NoSlot)
    }

    /// Publishes what `admin` says and waits until no fault uses the snapshot before.
    pub(crate) fn publish(&self, admin: &Admin) {
        self.context
            .replace(admin.snapshot(self.root))
            .free(&self.services.quiescence);
    }

    pub(crate) fn root(&self) -> Root {
        self.root
    }

    pub(crate) fn debts(&self) -> &OpenDebts {
        &self.debts
    }

    pub(crate) fn tlb_features(&self) -> TlbFeatures {
        self.services.tlb
    }

    pub(crate) fn format(&self) -> Format {
        self.services.format
    }

    pub(crate) fn vmid(&self) -> &VmidCell {
        &self.vmid
    }

    /// Runs `work`, which invalidates, with this VM's VMID in VTTBR_EL2 of `cpu`, the calling CPU; not at all when no
    /// translation of this VM can be cached. A CPU that is running the VM has it already; another one holds no VM.
    pub(crate) fn under_vmid(&self, cpu: CpuId, work: impl FnOnce()) {
        let vmids = &self.services.vmids;
        let Some(cached) = vmids.cached(&self.vmid) else {
            return;
        };
        if cached != RESERVED && arch::vttbr() == cached.vttbr(self.root.pa) {
            return work();
        }
        // Loading keeps the number from being given away while it is being invalidated. If a rollover came first,
        // everything under the old number is gone and the new one is right.
        let vmid = vmids.load(&self.vmid, cpu);
        arch::with_vttbr(vmid.vttbr(self.root.pa), work);
        vmids.unload(cpu);
    }

    /// Fills the calling CPU's stash of table frames.
    ///
    /// Rounding: none. Races: none. TLB: nothing owed. Cost: at most four frames.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`] when not a single frame could be had.
    pub fn top_up(&self, cpu: CpuId) -> Result<(), Error> {
        self.pool.top_up(cpu, &*self.services.frames)
    }

    /// Host address of the initial tables, for models and messages.
    ///
    /// Rounding: none. Races: none. TLB: nothing owed. Cost: constant.
    pub fn root_pa(&self) -> Pa {
        self.root.pa
    }
}

/// Tells the machine that the initial tables at `root` begin or cease to be tables.
pub(crate) fn note_root(root: Pa, shape: Shape, live: bool) {
    for page in 0..shape.root_pages() as u64 {
        arch::note_table(Pa::new(root.raw() + page * PAGE_BYTES), live);
    }
}
