//! Real threads: guests write while others clear, close and harvest epochs, split and collapse; in the end a copy made of
//! what was reported equals memory. Hardware is `hardware`'s.
//!
//! `STRESS_MILLIS=n` sets how long each combination runs.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vellum::addr::{Ipa, PAGE_BYTES, Pa, Va};
use vellum::arch::fake::{self, Random};
use vellum::mmu::{
    Access, AccessFlag, Bbm, Config, Contents, Engine, Epoch, Error, Extent, Fault, FaultKind,
    Format, Hardware, Level, Locking, Memory, PageSet, Permissions, Policy, Resolution, Services,
    Shape, SlotConfig, SlotId, Splitting, Stage2, TlbFeatures, Tracking, VmidAllocator,
};
use vellum::sync::quiescence::{CpuId, Domain};

use crate::flat::usize_of;
use crate::hardware::Guests;
use crate::rig::{BLOCK_BYTES, HostFrames, MODES, RAM};

const BLOCKS: u64 = 3;
const PAGES: u64 = BLOCKS * 512;
/// CPUs that run guests; the two after them clear and copy, and split and collapse.
const GUESTS: usize = 2;
const CLEARER: CpuId = CpuId(GUESTS);
const SPLITTER: CpuId = CpuId(GUESTS + 1);

/// What a world is made with.
#[derive(Clone, Copy, Debug)]
struct Plan {
    locking: Locking,
    engine: Engine,
    tracking: Tracking,
    splitting: Splitting,
    /// Pages are unmapped meanwhile, too.
    holes: bool,
}

struct World {
    stage2: Stage2,
    slot: SlotId,
    memory: *mut u8,
    guests: Arc<Guests>,
    /// What was copied of each page.
    copied: Vec<AtomicU64>,
    stop: AtomicBool,
    translation_faults: AtomicU64,
}

// SAFETY: Guest memory is accessed by atomics only.
unsafe impl Send for World {}
// SAFETY: As above; everything else is shared by its own locks and atomics.
unsafe impl Sync for World {}

fn layout() -> Layout {
    Layout::from_size_align(usize_of(BLOCKS * BLOCK_BYTES), usize_of(BLOCK_BYTES))
        .expect("a layout")
}

fn word(address: u64) -> &'static AtomicU64 {
    let pointer = std::ptr::with_exposed_provenance::<AtomicU64>(usize_of(address));
    // SAFETY: Guest memory lives as long as the world, and nobody keeps the reference longer.
    unsafe { &*pointer }
}

impl World {
    fn new(plan: Plan) -> Self {
        let cpus = GUESTS + 2;
        let indirect = plan.engine == Engine::Pie;
        let marks = plan.tracking == Tracking::Dbm;
        let guests = Guests::new(GUESTS, indirect, plan.tracking);
        let kicked = Arc::clone(&guests);
        let services = Services {
            quiescence: Domain::new(cpus),
            vmids: VmidAllocator::new(8, cpus),
            frames: Box::new(HostFrames(Arc::new(AtomicUsize::new(1 << 40)))),
            format: Format {
                forced_write_back: false,
                permissions: Permissions::Direct,
            },
            tlb: TlbFeatures { range: false },
            hardware: Hardware {
                indirection: indirect,
                access_flag: marks,
                dirty_state: marks,
            },
            idle_vttbr: 0,
            kick: Box::new(move |cpu| kicked.kick(cpu.0)),
        };
        let config = Config {
            locking: plan.locking,
            shape: Shape::new(40).expect("a shape"),
            splitting: plan.splitting,
            engine: plan.engine,
            tracking: plan.tracking,
            access_flag: match plan.tracking {
                Tracking::Fault => AccessFlag::Software,
                Tracking::Dbm => AccessFlag::Hardware,
            },
        };
        let stage2 = Stage2::new(config, Arc::new(services)).expect("frames for a root");
        // SAFETY: The layout is not empty.
        let memory = unsafe { alloc_zeroed(layout()) };
        let slot = SlotConfig {
            ipa: Ipa::new(RAM),
            backing: vec![Extent {
                pa: Pa::new(memory.expose_provenance() as u64),
                bytes: BLOCKS * BLOCK_BYTES,
            }],
            max_leaf: Level::L2,
            memory: Memory::Normal,
            writable: true,
            contents: Contents::Keep,
        };
        let slot = stage2.add_slot(slot).expect("room for a slot");
        Self {
            stage2,
            slot,
            memory,
            guests,
            copied: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            stop: AtomicBool::new(false),
            translation_faults: AtomicU64::new(0),
        }
    }

    fn page(&self, page: u64) -> &AtomicU64 {
        word(self.memory.expose_provenance() as u64 + page * PAGE_BYTES)
    }

    /// One access of the guest on `cpu`; why it failed.
    fn access(&self, cpu: usize, page: u64, access: Access) -> Option<FaultKind> {
        let memory = self.page(page);
        let expected = self.memory.expose_provenance() as u64 + page * PAGE_BYTES;
        self.guests.access(cpu, page, expected, access, || {
            if access == Access::Write {
                memory.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    /// The same with all the faults it takes, inside the guest and in between.
    fn run(&self, cpu: usize, page: u64, access: Access) {
        if self.guests.is_kicked(cpu) {
            self.stage2.refresh(CpuId(cpu));
        }
        while let Some(kind) = self.access(cpu, page, access) {
            if kind == FaultKind::Translation {
                self.translation_faults.fetch_add(1, Ordering::Relaxed);
            }
            let ipa = Ipa::new(RAM + page * PAGE_BYTES);
            let va = Va::new(ipa.raw());
            let fault = Fault {
                ipa,
                va,
                kind,
                access,
            };
            match self.stage2.fault(CpuId(cpu), &fault) {
                Resolution::Resume => {}
                Resolution::TopUp => self.stage2.top_up(CpuId(cpu)).expect("frames"),
                other => panic!("{other:?}"),
            }
            self.stage2.refresh(CpuId(cpu));
        }
    }

    fn guest(&self, cpu: usize, seed: u64) {
        let mut random = Random::new(seed);
        while !self.stop.load(Ordering::Relaxed) {
            // Few pages, so that everybody meets.
            let page = random.below(usize_of(BLOCKS)) * 512 + random.below(4) * 63;
            let access = if random.once_in(8) {
                Access::Read
            } else {
                Access::Write
            };
            self.run(cpu, page as u64, access);
            if random.once_in(64) {
                self.stage2.rest(CpuId(cpu));
                thread::yield_now();
                self.stage2.refresh(CpuId(cpu));
            } else if random.once_in(256) {
                self.leave(cpu);
                thread::yield_now();
                self.load(cpu);
            }
        }
    }

    fn load(&self, cpu: usize) {
        let vttbr = self.stage2.load(CpuId(cpu));
        self.guests.set_vttbr(cpu, vttbr);
        self.stage2.refresh(CpuId(cpu));
    }

    fn leave(&self, cpu: usize) {
        self.guests.set_vttbr(cpu, 0);
        self.stage2.unload(CpuId(cpu));
    }

    fn copy(&self, set: &PageSet) {
        for page in set.pages() {
            let now = self.page(page).load(Ordering::Relaxed);
            // Who reads a page later may be sooner here.
            self.copied[usize_of(page)].fetch_max(now, Ordering::Relaxed);
        }
    }

    fn clear(&self, cpu: CpuId, from: u64, to: u64) -> Result<(), Error> {
        let mut set = PageSet::default();
        self.stage2.clear(cpu, self.slot, from, to, &mut set)?;
        self.copy(&set);
        Ok(())
    }

    fn harvest(&self, epoch: Epoch) {
        let mut set = PageSet::default();
        let harvested = self.stage2.harvest(CLEARER, self.slot, epoch, &mut set);
        harvested.expect("a closed epoch");
        self.copy(&set);
    }

    fn clearer(&self, seed: u64) {
        let mut random = Random::new(seed);
        let mut closed: Option<Epoch> = None;
        while !self.stop.load(Ordering::Relaxed) {
            match random.below(8) {
                0..3 => {
                    let (from, to) = range(&mut random);
                    self.clear(CLEARER, from, to).expect("a good range");
                }
                3 => {
                    self.stage2.prepare(CLEARER).expect("frames");
                }
                _ => match closed.take() {
                    Some(epoch) => self.harvest(epoch),
                    None => {
                        let call = self.stage2.next_epoch(CLEARER);
                        closed = Some(call.expect("a logged slot").epoch);
                    }
                },
            }
            if random.once_in(64) {
                closed = None;
                self.restart_logging(random.once_in(2));
            }
        }
        if let Some(epoch) = closed {
            self.harvest(epoch);
        }
    }

    /// Ends logging, which collapses and relaxes everything, and begins it anew; what was written in between is copied
    /// at once or counts as recorded.
    fn restart_logging(&self, all_set: bool) {
        let disabled = self.stage2.disable_logging(CLEARER, self.slot);
        disabled.expect("a logged slot");
        let enabled = self.stage2.enable_logging(CLEARER, self.slot, all_set);
        enabled.expect("a slot of RAM");
        if !all_set {
            for (page, copied) in (0..).zip(&self.copied) {
                copied.fetch_max(self.page(page).load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
    }

    fn splitter(&self, seed: u64, holes: bool) {
        let mut random = Random::new(seed);
        while !self.stop.load(Ordering::Relaxed) {
            let (from, to) = range(&mut random);
            if holes && random.once_in(4) {
                let ipa = Ipa::new(RAM + from * PAGE_BYTES);
                // Refused when it would cut a block.
                let _cut = self.stage2.unmap(SPLITTER, ipa, PAGE_BYTES);
            } else if random.once_in(4) {
                // Refused while logging is off.
                let _cleared = self.clear(SPLITTER, from, to);
            } else if random.once_in(2) {
                let done = self.stage2.split(SPLITTER, self.slot, from, to);
                assert_eq!(done.map(|split| split.left), Ok(0));
            } else {
                let from = from / 512 * 512;
                let to = to.next_multiple_of(512);
                let done = self.stage2.collapse(SPLITTER, self.slot, from, to);
                done.expect("a good range");
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: Allocated in `new` with this layout.
        unsafe { dealloc(self.memory, layout()) };
    }
}

fn range(random: &mut Random) -> (u64, u64) {
    let from = random.below(usize_of(PAGES / 64)) as u64 * 64;
    let pages = [64, 512, PAGES][random.below(3)];
    (from, (from + pages).min(PAGES))
}

/// The world's thread `work` on `cpu`.
fn start(
    world: &Arc<World>,
    cpu: CpuId,
    work: impl FnOnce(&World) + Send + 'static,
) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || {
        world.guests.observe(cpu.0);
        let stop = StopAll(&world);
        if cpu.0 < GUESTS {
            world.load(cpu.0);
        }
        work(&world);
        if cpu.0 < GUESTS {
            world.leave(cpu.0);
        }
        drop(stop);
        fake::observe(None);
    })
}

/// Ends everybody's work when one thread fails.
struct StopAll<'w>(&'w World);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop.store(true, Ordering::Relaxed);
        }
    }
}

fn stress(plan: Plan) {
    let Plan {
        splitting, holes, ..
    } = plan;
    let seed = splitting.batch as u64;
    let bbm = splitting.bbm;
    let world = Arc::new(World::new(plan));
    let setup = start(&world, CpuId(0), |world| {
        for block in 0..BLOCKS {
            world.run(0, block * 512, Access::Read);
        }
        let enabled = world.stage2.enable_logging(CpuId(0), world.slot, false);
        enabled.expect("a slot of RAM");
    });
    setup.join().expect("set up");
    world.translation_faults.store(0, Ordering::Relaxed);
    let millis = env::var("STRESS_MILLIS").ok().and_then(|n| n.parse().ok());
    let until = Instant::now() + Duration::from_millis(millis.unwrap_or(80));
    let mut threads: Vec<_> = (0..GUESTS)
        .map(|cpu| {
            let seed = seed * 10 + cpu as u64;
            start(&world, CpuId(cpu), move |world| world.guest(cpu, seed))
        })
        .collect();
    threads.push(start(&world, CLEARER, move |world| world.clearer(seed)));
    threads.push(start(&world, SPLITTER, move |world| {
        world.splitter(!seed, holes);
    }));
    while Instant::now() < until && !world.stop.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(5));
    }
    world.stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().expect("everybody is content");
    }
    // The pages that were unmapped are the first of their words.
    let fill = start(&world, CpuId(0), |world| {
        for page in (0..PAGES).step_by(64) {
            world.run(0, page, Access::Write);
        }
    });
    fill.join().expect("everybody is content");
    let last = start(&world, CLEARER, move |world| {
        world.clear(CLEARER, 0, PAGES).expect("a logged slot");
        let mut written = 0;
        for page in 0..PAGES {
            let now = world.page(page).load(Ordering::Relaxed);
            let copied = world.copied[usize_of(page)].load(Ordering::Relaxed);
            assert_eq!(copied, now, "page {page}: a write was lost, {plan:?}");
            written += now;
        }
        assert!(written > 0, "the guests made progress");
        let faults = world.translation_faults.load(Ordering::Relaxed);
        assert!(
            bbm == Bbm::Zero || holes || plan.engine == Engine::Lazy || faults == 0,
            "{faults} at level 2"
        );
        let done = world.stage2.disable_logging(CLEARER, world.slot);
        assert_eq!(done.map(|done| done.left), Ok(0));
        let mut blocks = 0;
        world.stage2.for_each_leaf(CLEARER, |_, level, leaf| {
            assert!(leaf.write && !leaf.frozen);
            assert_eq!(level, Level::L2);
            blocks += 1;
        });
        assert_eq!(blocks, BLOCKS);
    });
    last.join().expect("everybody is content");
    let world = Arc::into_inner(world).expect("the last reference");
    drop(world);
}

fn stress_every_mode(engine: Engine, tracking: Tracking, bbm: Bbm, holes: bool) {
    for locking in MODES {
        for policy in [Policy::Fault, Policy::Enable, Policy::Clear] {
            let splitting = Splitting {
                policy,
                bbm,
                batch: if holes { 16 } else { 1 },
                ..Splitting::default()
            };
            stress(Plan {
                locking,
                engine,
                tracking,
                splitting,
                holes,
            });
        }
    }
}

fn stress_both_levels(engine: Engine, tracking: Tracking) {
    for bbm in [Bbm::Zero, Bbm::Two] {
        for holes in [false, true] {
            stress_every_mode(engine, tracking, bbm, holes);
        }
    }
}

#[test]
fn good_threads_with_engine_walk_lose_nothing() {
    stress_both_levels(Engine::Walk, Tracking::Fault);
}

#[test]
fn good_threads_with_engine_lazy_lose_nothing() {
    stress_both_levels(Engine::Lazy, Tracking::Fault);
}

#[test]
fn good_threads_with_engine_swap_lose_nothing() {
    stress_both_levels(Engine::Swap, Tracking::Fault);
}

#[test]
fn good_threads_with_engine_pie_lose_nothing() {
    stress_both_levels(Engine::Pie, Tracking::Fault);
}

#[test]
fn good_threads_with_tracking_dbm_lose_nothing() {
    stress_both_levels(Engine::Walk, Tracking::Dbm);
}
