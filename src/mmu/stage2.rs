//! One VM's stage 2: its tree, its slots, its lock, its VMID. The entry points are spread over the verbs' files
//! ([`fault`](super::fault), [`logging`](super::logging), [`unmap`](super::unmap), ...); this one holds what they share.
//!
//! Every entry point takes `cpu`, the calling CPU's position, and is called outside any section and without any lock.

use alloc::boxed::Box;
use alloc::sync::Arc;

use crate::addr::{PAGE_BYTES, Pa};
use crate::arch;
use crate::arch::atomic::{AtomicU64, Ordering};
use crate::mem::TableFrames;
use crate::mmu::aging::AccessFlag;
use crate::mmu::bitmap::Bitmap;
use crate::mmu::descriptor::{Descriptor, Format, Permissions, TAGS, Tag};
use crate::mmu::epoch::{Engine, Epoch, Tracking};
use crate::mmu::error::Error;
use crate::mmu::geometry::Shape;
use crate::mmu::lock::{Exclusive, Locking, MmuLock};
use crate::mmu::logging::SlotLog;
use crate::mmu::pool::TablePool;
use crate::mmu::rights::{Rights, s2pir};
use crate::mmu::slot::{Context, MemorySlot, SlotConfig, SlotId, SlotView};
use crate::mmu::splitting::Splitting;
use crate::mmu::swap::Spare;
use crate::mmu::table::root_at;
use crate::mmu::tlb::{OpenDebts, TlbFeatures};
use crate::mmu::vmid::{RESERVED, VmidAllocator, VmidCell};
use crate::mmu::walk::{Root, Tree};
use crate::sync::acks::Acks;
use crate::sync::mutex::{Guard, Mutex};
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
    /// What else its translation has.
    pub hardware: Hardware,
    /// VTTBR_EL2 of a CPU that runs no guest.
    pub idle_vttbr: u64,
    /// Makes a CPU leave its guest, if it is in one, and call [`Stage2::refresh`] before it enters one again.
    pub kick: Box<dyn Fn(CpuId) + Send + Sync>,
}

/// What every CPU's stage-2 translation has beyond the base.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Hardware {
    /// FEAT_S2PIE.
    pub indirection: bool,
    /// FEAT_HAFDBS, access flag.
    pub access_flag: bool,
    /// FEAT_HAFDBS, dirty state.
    pub dirty_state: bool,
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
    /// Who protects everything when an epoch ends.
    pub engine: Engine,
    /// How a write becomes known.
    pub tracking: Tracking,
    /// Who sets access flags.
    pub access_flag: AccessFlag,
}

impl Config {
    /// Refuses what makes no sense, or not on this `hardware`.
    ///
    /// # Errors
    ///
    /// [`Error::NoIndirection`], [`Error::NoDirtyState`], [`Error::NotTogether`], [`Error::NoAccessFlag`], and those of
    /// [`Splitting::check`].
    pub fn check(&self, hardware: Hardware) -> Result<(), Error> {
        self.splitting.check()?;
        match (self.engine, self.tracking) {
            (Engine::Pie, _) if !hardware.indirection => Err(Error::NoIndirection),
            (_, Tracking::Dbm) if !hardware.dirty_state => Err(Error::NoDirtyState),
            (Engine::Lazy | Engine::Swap | Engine::Pie, Tracking::Dbm) => Err(Error::NotTogether),
            _ if self.access_flag == AccessFlag::Hardware && !hardware.access_flag => {
                Err(Error::NoAccessFlag)
            }
            (_, Tracking::Dbm) if self.access_flag == AccessFlag::Software => {
                Err(Error::NoAccessFlag)
            }
            _ => Ok(()),
        }
    }
}

/// One VM's stage 2.
pub struct Stage2 {
    pub(crate) context: Published<Context>,
    pub(crate) lock: MmuLock,
    pub(crate) services: Arc<Services>,
    pub(crate) pool: TablePool,
    pub(crate) admin: Mutex<Admin>,
    pub(crate) splitting: Splitting,
    /// What CPUs that run this VM have loaded.
    pub(crate) acks: Acks,
    engine: Engine,
    tracking: Tracking,
    format: Format,
    /// The tree that operations work on: its root's address, and in bit 0 which VMID is its. Changed under the operation lock.
    live: AtomicU64,
    shape: Shape,
    vmids: [VmidCell; 2],
    debts: OpenDebts,
    /// Nonzero while the invalidation of what was deferred is not complete (engine `lazy`).
    pub(crate) deferring: AtomicU64,
    /// Held by what may not run while roots are exchanged (engine `swap`); not by faults.
    operations: Mutex<()>,
}

/// What only configuration changes: slots and their logs.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) slots: [Option<AdminSlot>; TAGS],
    /// The current epoch.
    pub(crate) epoch: Epoch,
    /// See [`Context::generation`].
    pub(crate) generation: u64,
    pub(crate) tree: Tree,
    /// See [`Context::mapping`].
    pub(crate) mapping: bool,
    pub(crate) spare: Spare,
    format: Format,
    tracking: Tracking,
    engine: Engine,
}

#[derive(Debug)]
pub(crate) struct AdminSlot {
    pub(crate) slot: Arc<MemorySlot>,
    pub(crate) log: Option<SlotLog>,
    /// See [`SlotView::mapped`].
    pub(crate) mapped: Option<Arc<Bitmap>>,
}

impl Admin {
    /// The slot `id`.
    pub(crate) fn slot(&mut self, id: SlotId) -> Result<&mut AdminSlot, Error> {
        self.slots
            .get_mut(id.index())
            .and_then(Option::as_mut)
            .ok_or(Error::NoSlot)
    }

    /// The logged slots.
    pub(crate) fn logged(&self) -> impl Iterator<Item = (SlotId, &Arc<MemorySlot>, &SlotLog)> {
        self.slots.iter().enumerate().filter_map(|(index, entry)| {
            let entry = entry.as_ref()?;
            Some((SlotId(Tag::new(index)?), &entry.slot, entry.log.as_ref()?))
        })
    }

    /// The snapshot that describes this state.
    pub(crate) fn snapshot(&self) -> Context {
        let view = |slot: &AdminSlot| {
            let log = slot.log.as_ref();
            let memory = slot.slot.config.memory;
            let logged = log.map(|_| self.epoch);
            SlotView {
                slot: slot.slot.clone(),
                log: log.map(|log| log.current().clone()),
                closed: log
                    .filter(|_| self.engine == Engine::Lazy)
                    .map(|log| log.closed().clone()),
                mapped: slot.mapped.clone(),
                rights: Rights::new(self.format, memory, self.tracking, logged),
            }
        };
        Context {
            tree: self.tree,
            generation: self.generation,
            s2pir: s2pir(self.epoch),
            mapping: self.mapping,
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
    /// [`Error::NoMemory`], and those of [`Config::check`].
    pub fn new(config: Config, services: Arc<Services>) -> Result<Self, Error> {
        config.check(services.hardware)?;
        let root = Self::allocate_root(config.shape, &services)?;
        let cpus = services.quiescence.cpus();
        let tree = Tree { root, vmid: 0 };
        let format = Format {
            permissions: match config.engine {
                Engine::Pie => Permissions::Indirect,
                _ => Permissions::Direct,
            },
            ..services.format
        };
        let admin = Admin {
            slots: core::array::from_fn(|_| None),
            epoch: Epoch::new(1),
            generation: 1,
            tree,
            mapping: true,
            spare: Spare::default(),
            format,
            tracking: config.tracking,
            engine: config.engine,
        };
        let acks = Acks::new(cpus);
        acks.announce(admin.generation);
        Ok(Self {
            context: Published::new(admin.snapshot()),
            lock: MmuLock::new(config.locking),
            pool: TablePool::new(cpus),
            admin: Mutex::new(admin),
            splitting: config.splitting,
            acks,
            engine: config.engine,
            tracking: config.tracking,
            format,
            live: AtomicU64::new(tree_bits(tree)),
            shape: config.shape,
            vmids: [VmidCell::default(), VmidCell::default()],
            debts: OpenDebts::default(),
            deferring: AtomicU64::new(0),
            operations: Mutex::new(()),
            services,
        })
    }

    pub(crate) fn allocate_root(shape: Shape, services: &Services) -> Result<Root, Error> {
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
        self.shape
    }

    /// Takes the MMU lock's exclusive side, for measuring how long that takes among faulting vCPUs.
    ///
    /// Rounding: none. Races: any number of faults, which wait except in lockless mode. TLB: nothing owed. Cost: bounded by
    /// the faults already inside.
    pub fn exclusive(&self) -> Exclusive<'_> {
        self.lock.exclusive()
    }

    /// VTTBR_EL2 to run a vCPU of this VM on `cpu`, the calling CPU, which keeps the VMID until [`Stage2::unload`]. Before it
    /// enters the guest it calls [`Stage2::refresh`].
    ///
    /// Rounding: none. Races: other CPUs' loads and rollovers. TLB: a rollover invalidates everything, inside. Cost: one
    /// compare-and-swap of a CPU's own line, or the allocator's lock.
    pub fn load(&self, cpu: CpuId) -> u64 {
        self.acks.begin(cpu.0);
        let active = self.services.quiescence.enter(cpu);
        let tree = self.context.load(&active).tree;
        self.vttbr_of(cpu, tree)
    }

    /// VTTBR_EL2 of `tree` for `cpu`, the calling CPU, which keeps the VMID until it loads another or none.
    pub(crate) fn vttbr_of(&self, cpu: CpuId, tree: Tree) -> u64 {
        let vmid = self.services.vmids.load(self.vmid(tree), cpu);
        vmid.vttbr(tree.root.pa)
    }

    /// Loads what is published, on `cpu`, the calling CPU, which runs this VM: called before every entry of the guest, and
    /// after every kick. Its earlier writes are complete and it has acknowledged when this returns.
    ///
    /// Rounding: none. Races: calls of [`Stage2::next_epoch`], which wait for it. TLB: nothing owed. Cost: two loads when there
    /// is nothing new; otherwise a barrier and the register.
    #[inline]
    pub fn refresh(&self, cpu: CpuId) {
        if self.acks.is_behind(cpu.0) {
            self.load_published(cpu);
        }
    }

    #[cold]
    fn load_published(&self, cpu: CpuId) {
        arch::dsb_ish();
        let entering = !self.acks.is_running(cpu.0);
        self.acks.begin(cpu.0);
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        if entering && self.engine == Engine::Pie {
            // Its walkers may have run ahead under an older S2PIR_EL2: while it slept, after the invalidation that it was not
            // asked about, or since the root was loaded.
            arch::set_s2pir(context.s2pir);
            arch::tlbi_vmalls12e1();
            arch::dsb_nsh();
        }
        self.adopt(cpu, context);
    }

    /// `cpu`, the calling CPU, which runs this VM, sleeps at EL2: it need not be kicked until it calls [`Stage2::refresh`].
    ///
    /// Rounding: none. Races: calls of [`Stage2::next_epoch`]. TLB: nothing owed. Cost: a barrier, and with engine `swap` the
    /// idle root's VTTBR_EL2.
    pub fn rest(&self, cpu: CpuId) {
        match self.engine {
            Engine::Walk | Engine::Lazy => return,
            Engine::Pie => {}
            // No CPU may hold a root that is being edited (rule 21).
            Engine::Swap => {
                arch::replace_vttbr(self.services.idle_vttbr);
                self.services.vmids.unload(cpu);
            }
        }
        arch::dsb_ish();
        self.acks.leave(cpu.0);
    }

    /// Loads what `context` says into the calling CPU's registers, and acknowledges it.
    #[cold]
    fn adopt(&self, cpu: CpuId, context: &Context) {
        match self.engine {
            Engine::Walk | Engine::Lazy => {}
            Engine::Pie => arch::set_s2pir(context.s2pir),
            Engine::Swap => {
                // While a number is loaded the one before is nobody's: a rollover may give it away.
                arch::replace_vttbr(self.services.idle_vttbr);
                arch::replace_vttbr(self.vttbr_of(cpu, context.tree));
            }
        }
        self.acks.acknowledge(cpu.0, context.generation);
    }

    /// `cpu`, the calling CPU, acts on `context`: if it runs this VM under something older, it is brought up to date, so that
    /// what it invalidates is what it acts on.
    #[inline]
    pub(crate) fn catch_up(&self, cpu: CpuId, context: &Context) {
        if self.acks.seen(cpu.0) != context.generation && !self.acks.is_away(cpu.0) {
            arch::dsb_ish();
            self.adopt(cpu, context);
        }
    }

    /// Keeps roots from being exchanged until the guard is dropped. Nothing is held with other engines: operations run
    /// side by side there.
    pub(crate) fn begin_operation(&self) -> Option<Guard<'_, ()>> {
        (self.engine == Engine::Swap).then(|| self.operations.lock())
    }

    /// `cpu`, the calling CPU, no longer runs this VM: its VTTBR_EL2 already names an idle root.
    ///
    /// Rounding: none. Races: rollovers, calls of [`Stage2::next_epoch`]. TLB: nothing owed, entries stay cached. Cost: a barrier
    /// and one swap.
    pub fn unload(&self, cpu: CpuId) {
        arch::dsb_ish();
        self.acks.leave(cpu.0);
        self.services.vmids.unload(cpu);
    }

    /// Adds a slot; its pages are mapped when they are first touched.
    ///
    /// Rounding: none, unaligned is refused. Races: faults see the slot as a whole or not at all. TLB: nothing owed, nothing
    /// was mapped; instruction caches hold nothing of the memory's last owner. Cost: one snapshot, one grace period, without
    /// CTR_EL0.DIC all instruction caches.
    ///
    /// # Errors
    ///
    /// [`Error::BadRange`], [`Error::Overlap`], or [`Error::NoSlot`] when all eight are taken.
    pub fn add_slot(&self, config: SlotConfig) -> Result<SlotId, Error> {
        let slot = Arc::new(MemorySlot::new(config, self.shape)?);
        let _operation = self.begin_operation();
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
        let mapped = (self.engine == Engine::Swap)
            .then(|| Arc::new(Bitmap::new(slot.regions(), self.services.quiescence.cpus())));
        *free = Some(AdminSlot {
            slot,
            log: None,
            mapped,
        });
        admin.spare.is_ready = false;
        // Nothing of the last owner's may be executed where this memory is mapped.
        arch::forget_instructions();
        self.publish(&admin);
        Tag::new(index).map(SlotId).ok_or(Error::NoSlot)
    }

    /// Publishes what `admin` says and waits until no fault uses the snapshot before.
    pub(crate) fn publish(&self, admin: &Admin) {
        self.context
            .replace(admin.snapshot())
            .free(&self.services.quiescence);
    }

    /// The tree that operations work on; it stays so while [`Stage2::begin_operation`]'s guard is held.
    pub(crate) fn tree(&self) -> Tree {
        let bits = self.live.load(Ordering::Acquire);
        Tree {
            root: Root {
                pa: Pa::new(bits & !1),
                shape: self.shape,
            },
            vmid: usize::from(bits & 1 != 0),
        }
    }

    pub(crate) fn set_tree(&self, tree: Tree) {
        self.live.store(tree_bits(tree), Ordering::Release);
    }

    pub(crate) fn engine(&self) -> Engine {
        self.engine
    }

    pub(crate) fn tracking(&self) -> Tracking {
        self.tracking
    }

    pub(crate) fn debts(&self) -> &OpenDebts {
        &self.debts
    }

    pub(crate) fn tlb_features(&self) -> TlbFeatures {
        self.services.tlb
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// The VMID of `tree`.
    pub(crate) fn vmid(&self, tree: Tree) -> &VmidCell {
        let [first, second] = &self.vmids;
        if tree.vmid == 0 { first } else { second }
    }

    /// Runs `work`, which invalidates, with the VMID of `tree` in VTTBR_EL2 of `cpu`, the calling CPU; not at all when no
    /// translation of that tree can be cached. A CPU that is running the VM has it already, if it has caught up and `tree` is
    /// the live one; another CPU holds no VM.
    pub(crate) fn under_vmid(&self, cpu: CpuId, tree: Tree, work: impl FnOnce()) {
        let vmids = &self.services.vmids;
        let cell = self.vmid(tree);
        let Some(cached) = vmids.cached(cell) else {
            return;
        };
        if cached != RESERVED && arch::vttbr() == cached.vttbr(tree.root.pa) {
            return work();
        }
        if !self.acks.is_away(cpu.0) {
            // The VM's other tree: this CPU keeps the number that it runs under. A rollover meanwhile gives the one that is
            // being invalidated to somebody else, who loses entries in vain.
            return arch::with_vttbr(cached.vttbr(tree.root.pa), work);
        }
        // Loading keeps the number from being given away while it is being invalidated. If a rollover came first,
        // everything under the old number is gone and the new one is right.
        let vmid = vmids.load(cell, cpu);
        arch::with_vttbr(vmid.vttbr(tree.root.pa), work);
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
    /// Rounding: none. Races: with engine `swap`, calls of [`Stage2::next_epoch`]. TLB: nothing owed. Cost: constant.
    pub fn root_pa(&self) -> Pa {
        self.tree().root.pa
    }
}

const fn tree_bits(tree: Tree) -> u64 {
    tree.root.pa.raw() | tree.vmid as u64
}

/// Tells the machine that the initial tables at `root` begin or cease to be tables.
pub(crate) fn note_root(root: Pa, shape: Shape, live: bool) {
    for page in 0..shape.root_pages() as u64 {
        arch::note_table(Pa::new(root.raw() + page * PAGE_BYTES), live);
    }
}
