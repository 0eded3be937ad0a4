//! Real threads: guests write while others clear, split and collapse; in the end a copy made of what `clear` reported
//! equals memory.
//!
//! There is no fake machine on these threads, so a test's own hardware walks the shipped tables: each guest has a TLB that
//! keeps what it found until an invalidation is complete. A guest holds its TLB's lock for one access, and `DSB ISH` after
//! a `TLBI` takes every such lock: what was in flight through an old translation is over.
//!
//! `STRESS_MILLIS=n` sets how long each combination runs.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::collections::HashMap;
use std::env;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vellum::addr::{Ipa, PAGE_BYTES, Pa, Va};
use vellum::arch::fake::{self, Event, Random};
use vellum::mmu::{
    Access, AccessFlag, Bbm, Config, Contents, Engine, Extent, Fault, FaultKind, Format, Hardware,
    Level, Locking, Memory, PageSet, Permissions, Policy, Resolution, Services, Shape, SlotConfig,
    SlotId, Splitting, Stage2, TlbFeatures, Tracking, VmidAllocator,
};
use vellum::sync::quiescence::{CpuId, Domain};

use crate::flat::usize_of;
use crate::rig::{BLOCK_BYTES, HostFrames, MODES, RAM};

const BLOCKS: u64 = 3;
const PAGES: u64 = BLOCKS * 512;
/// CPUs that run guests; the two after them clear and copy, and split and collapse.
const GUESTS: usize = 2;
const CLEARER: CpuId = CpuId(GUESTS);
const SPLITTER: CpuId = CpuId(GUESTS + 1);

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const YOUNG: u64 = 1 << 10;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// What a guest's TLB holds: the last descriptor of a walk, by page.
type Tlb = Mutex<HashMap<u64, u64>>;

struct World {
    stage2: Stage2,
    slot: SlotId,
    memory: *mut u8,
    tlbs: [Tlb; GUESTS],
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
    // SAFETY: The address is a slot of a table that this walk's TLB lock keeps, or guest memory that lives as long as the
    // world; nobody keeps the reference longer.
    unsafe { &*pointer }
}

impl World {
    fn new(locking: Locking, splitting: Splitting) -> Self {
        let cpus = GUESTS + 2;
        let services = Services {
            quiescence: Domain::new(cpus),
            vmids: VmidAllocator::new(8, cpus),
            frames: Box::new(HostFrames(Arc::new(AtomicUsize::new(1 << 40)))),
            format: Format {
                forced_write_back: false,
                permissions: Permissions::Direct,
            },
            tlb: TlbFeatures { range: false },
            hardware: Hardware::default(),
            idle_vttbr: 0,
            kick: Box::new(|_| {}),
        };
        let config = Config {
            locking,
            shape: Shape::new(40).expect("a shape"),
            splitting,
            engine: Engine::Walk,
            tracking: Tracking::Fault,
            access_flag: AccessFlag::Software,
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
            tlbs: Default::default(),
            copied: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            stop: AtomicBool::new(false),
            translation_faults: AtomicU64::new(0),
        }
    }

    fn page(&self, page: u64) -> &AtomicU64 {
        word(self.memory.expose_provenance() as u64 + page * PAGE_BYTES)
    }

    /// The last descriptor on the way to `page`, as hardware reads it.
    fn walk(&self, page: u64) -> u64 {
        let ipa = RAM + page * PAGE_BYTES;
        let mut table = self.stage2.root_pa().raw();
        let mut index = ipa >> 30;
        for shift in [30, 21, 12] {
            let raw = word(table + 8 * index).load(Ordering::Acquire);
            if shift == 12 || raw & (VALID | TABLE_OR_PAGE) != VALID | TABLE_OR_PAGE {
                let found = (raw & ADDRESS) + ipa % (1 << shift);
                let expected = self.memory.expose_provenance() as u64 + page * PAGE_BYTES;
                assert!(
                    raw & VALID == 0 || found == expected,
                    "page {page}: {raw:#x}"
                );
                return raw;
            }
            table = raw & ADDRESS;
            index = ipa >> (shift - 9) & 511;
        }
        unreachable!("the last level ends the walk")
    }

    /// One access of the guest on `cpu`; why it failed.
    fn access(&self, cpu: usize, page: u64, access: Access) -> Option<FaultKind> {
        let mut tlb = self.tlbs[cpu].lock().expect("no guest fails");
        let raw = tlb.get(&page).copied().unwrap_or_else(|| self.walk(page));
        if raw & VALID == 0 {
            return Some(FaultKind::Translation);
        }
        if raw & YOUNG == 0 {
            return Some(FaultKind::AccessFlag);
        }
        tlb.insert(page, raw);
        let needed = if access == Access::Write { WRITE } else { READ };
        if raw & needed == 0 {
            return Some(FaultKind::Permission);
        }
        if access == Access::Write {
            self.page(page).fetch_add(1, Ordering::Relaxed);
        }
        None
    }

    /// The same with all the faults it takes.
    fn run(&self, cpu: usize, page: u64, access: Access) {
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
        }
    }

    fn clear(&self, from: u64, to: u64) {
        let mut set = PageSet::default();
        let cleared = self.stage2.clear(CLEARER, self.slot, from, to, &mut set);
        cleared.expect("a good range");
        for page in set.pages() {
            let now = self.page(page).load(Ordering::Relaxed);
            self.copied[usize_of(page)].store(now, Ordering::Relaxed);
        }
    }

    fn clearer(&self, seed: u64) {
        let mut random = Random::new(seed);
        while !self.stop.load(Ordering::Relaxed) {
            let (from, to) = range(&mut random);
            self.clear(from, to);
            if random.once_in(64) {
                self.restart_logging(random.once_in(2));
            }
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
                copied.store(self.page(page).load(Ordering::Relaxed), Ordering::Relaxed);
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

    /// Drops what the TLB of `cpu`, or all of them, hold.
    fn invalidate(&self, cpu: Option<usize>) {
        for (index, tlb) in self.tlbs.iter().enumerate() {
            if cpu.is_none_or(|cpu| cpu == index) {
                tlb.lock().expect("no guest fails").clear();
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

/// Makes this thread CPU `cpu` of `world`: its barriers complete its invalidations.
fn become_cpu(world: &Arc<World>, cpu: CpuId) {
    let world = Arc::clone(world);
    let pending = Cell::new(false);
    world.stage2.load(cpu);
    fake::observe(Some(Rc::new(move |event| match event {
        Event::TlbiIpas2e1is(_)
        | Event::TlbiRipas2e1is(..)
        | Event::TlbiVmalle1is
        | Event::TlbiVmalls12e1is => pending.set(true),
        Event::DsbIsh if pending.replace(false) => world.invalidate(None),
        Event::DsbNsh => world.invalidate(Some(cpu.0)),
        Event::Yield => thread::yield_now(),
        _ => {}
    })));
}

/// The world's thread `work` on `cpu`.
fn start(
    world: &Arc<World>,
    cpu: CpuId,
    work: impl FnOnce(&World) + Send + 'static,
) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || {
        become_cpu(&world, cpu);
        let stop = StopAll(&world);
        work(&world);
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

/// With `holes` pages are unmapped meanwhile, too.
fn stress(locking: Locking, policy: Policy, bbm: Bbm, batch: usize, holes: bool) {
    let seed = batch as u64;
    let splitting = Splitting {
        policy,
        bbm,
        batch,
        ..Splitting::default()
    };
    let world = Arc::new(World::new(locking, splitting));
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
        world.clear(0, PAGES);
        let mut written = 0;
        for page in 0..PAGES {
            let now = world.page(page).load(Ordering::Relaxed);
            let copied = world.copied[usize_of(page)].load(Ordering::Relaxed);
            assert_eq!(copied, now, "page {page}: a write was lost");
            written += now;
        }
        assert!(written > 0, "the guests made progress");
        let faults = world.translation_faults.load(Ordering::Relaxed);
        assert!(
            bbm == Bbm::Zero || holes || faults == 0,
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

fn stress_every_mode(bbm: Bbm, holes: bool) {
    for locking in MODES {
        for policy in [Policy::Fault, Policy::Enable, Policy::Clear] {
            for batch in [1, 16] {
                stress(locking, policy, bbm, batch, holes);
            }
        }
    }
}

#[test]
fn good_level_0_threads_that_write_clear_split_and_collapse_lose_nothing() {
    stress_every_mode(Bbm::Zero, false);
}

#[test]
fn good_level_2_threads_that_write_clear_split_and_collapse_lose_nothing() {
    stress_every_mode(Bbm::Two, false);
}

#[test]
fn good_threads_that_unmap_pages_as_well_lose_nothing() {
    for bbm in [Bbm::Zero, Bbm::Two] {
        stress_every_mode(bbm, true);
    }
}
