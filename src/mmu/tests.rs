//! The entry points together, on one CPU: what a slot's life looks like from outside.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::boxed::Box;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

use crate::addr::{Ipa, Pa, Va, to_index};
use crate::mem::TableFrames;
use crate::mmu::{
    Access, AccessFlag, Config, Contents, Engine, Error, Extent, Fault, FaultKind, Format,
    Hardware, Level, Locking, Memory, PageSet, Permissions, Resolution, Services, Shape,
    SlotConfig, SlotId, Splitting, Stage2, TlbFeatures, Tracking, VmidAllocator,
};
use crate::sync::quiescence::{CpuId, Domain};

const CPU: CpuId = CpuId(0);
const BASE: u64 = 0x8000_0000;
const BLOCK: u64 = 0x20_0000;

/// Frames from the host's heap.
struct HostFrames;

fn layout(pages: usize) -> Layout {
    Layout::from_size_align(pages * 4096, (pages * 4096).next_power_of_two()).unwrap()
}

impl TableFrames for HostFrames {
    fn allocate(&self, pages: usize) -> Option<Pa> {
        // SAFETY: The layout is not empty.
        let pointer = unsafe { alloc_zeroed(layout(pages)) };
        Some(Pa::new(pointer.expose_provenance() as u64))
    }

    fn release(&self, frames: Pa, pages: usize) {
        let pointer = std::ptr::with_exposed_provenance_mut(to_index(frames.raw()));
        // SAFETY: `frames` came from `allocate` with the same number of pages.
        unsafe { dealloc(pointer, layout(pages)) };
    }
}

fn stage2(locking: Locking) -> Stage2 {
    stage2_with(locking, Engine::Walk)
}

fn stage2_with(locking: Locking, engine: Engine) -> Stage2 {
    let services = Services {
        quiescence: Domain::new(2),
        vmids: VmidAllocator::new(8, 2),
        frames: Box::new(HostFrames),
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
        shape: Shape::new(40).unwrap(),
        splitting: Splitting::default(),
        engine,
        tracking: Tracking::Fault,
        access_flag: AccessFlag::Software,
    };
    let stage2 = Stage2::new(config, Arc::new(services)).unwrap();
    stage2.load(CPU);
    stage2
}

fn ram(max_leaf: Level) -> SlotConfig {
    SlotConfig {
        ipa: Ipa::new(BASE),
        backing: vec![Extent {
            pa: Pa::new(0x1_0000_0000),
            bytes: 4 * BLOCK,
        }],
        max_leaf,
        memory: Memory::Normal,
        writable: true,
        contents: Contents::Keep,
    }
}

fn touch(stage2: &Stage2, page: u64, access: Access) -> Resolution {
    let ipa = Ipa::new(BASE + page * 4096);
    let fault = Fault {
        ipa,
        va: Va::new(ipa.raw()),
        kind: FaultKind::Translation,
        access,
    };
    loop {
        match stage2.fault(CPU, &fault) {
            Resolution::TopUp => stage2.top_up(CPU).unwrap(),
            other => return other,
        }
    }
}

fn leaves(stage2: &Stage2) -> Vec<(u64, Level, bool)> {
    let mut all = Vec::new();
    stage2.for_each_leaf(CPU, |ipa, level, leaf| {
        all.push(((ipa.raw() - BASE) / 4096, level, leaf.write))
    });
    all
}

fn dirty(stage2: &Stage2, slot: SlotId) -> Vec<u64> {
    let mut set = PageSet::default();
    stage2.dirty(CPU, slot, &mut set).unwrap();
    set.pages().collect()
}

fn clear_all(stage2: &Stage2, slot: SlotId) -> Vec<u64> {
    let mut set = PageSet::default();
    stage2.clear(CPU, slot, 0, 2048, &mut set).unwrap();
    set.pages().collect()
}

const MODES: [Locking; 3] = [Locking::Mutex, Locking::Rwlock, Locking::Lockless];

#[test]
fn a_write_is_recorded_once_between_clears() {
    for mode in MODES {
        let stage2 = stage2(mode);
        let slot = stage2.add_slot(ram(Level::L3)).unwrap();
        for page in [0, 7, 600] {
            assert_eq!(touch(&stage2, page, Access::Write), Resolution::Resume);
        }
        stage2.enable_logging(CPU, slot, false).unwrap();
        assert!(
            leaves(&stage2)
                .iter()
                .all(|(_, level, write)| *level == Level::L3 && !write)
        );
        assert!(dirty(&stage2, slot).is_empty());
        touch(&stage2, 7, Access::Write);
        touch(&stage2, 600, Access::Read);
        touch(&stage2, 1000, Access::Write);
        touch(&stage2, 1001, Access::Read);
        assert_eq!(dirty(&stage2, slot), [7, 1000], "{mode:?}");
        assert_eq!(clear_all(&stage2, slot), [7, 1000]);
        assert!(leaves(&stage2).iter().all(|(_, _, write)| !write));
        assert!(clear_all(&stage2, slot).is_empty());
        touch(&stage2, 7, Access::Write);
        let mut closed = PageSet::default();
        let epoch = stage2.next_epoch(CPU).unwrap().epoch;
        assert_eq!(stage2.next_epoch(CPU), Err(Error::NotHarvested(slot)));
        stage2.harvest(CPU, slot, epoch, &mut closed).unwrap();
        assert_eq!(closed.pages().collect::<Vec<_>>(), [7]);
        assert!(dirty(&stage2, slot).is_empty());
        stage2.disable_logging(CPU, slot).unwrap();
        touch(&stage2, 7, Access::Write);
        assert_eq!(stage2.dirty(CPU, slot, &mut closed), Err(Error::NotLogging));
        stage2.unload(CPU);
        stage2.destroy(CPU);
    }
}

#[test]
fn a_logged_block_is_split_where_the_write_hits() {
    let stage2 = stage2(Locking::Lockless);
    let slot = stage2.add_slot(ram(Level::L2)).unwrap();
    touch(&stage2, 0, Access::Write);
    touch(&stage2, 512, Access::Read);
    assert_eq!(
        leaves(&stage2),
        [(0, Level::L2, true), (512, Level::L2, true)]
    );
    stage2.enable_logging(CPU, slot, false).unwrap();
    touch(&stage2, 5, Access::Write);
    let all = leaves(&stage2);
    assert_eq!(all.len(), 513);
    assert_eq!(
        all.iter()
            .filter(|(_, _, write)| *write)
            .collect::<Vec<_>>(),
        [&(5, Level::L3, true)]
    );
    assert_eq!(dirty(&stage2, slot), [5]);
    stage2.destroy(CPU);
}

#[test]
fn a_block_without_a_table_to_split_into_counts_as_written_whole() {
    let stage2 = stage2(Locking::Rwlock);
    let slot = stage2.add_slot(ram(Level::L2)).unwrap();
    touch(&stage2, 0, Access::Read);
    stage2.enable_logging(CPU, slot, false).unwrap();
    assert!(stage2.write_whole_block(CPU, Ipa::new(BASE + 0x5000)));
    assert!(!stage2.write_whole_block(CPU, Ipa::new(BASE + BLOCK)));
    assert_eq!(dirty(&stage2, slot).len(), 512);
    assert_eq!(leaves(&stage2), [(0, Level::L2, true)]);
    assert_eq!(clear_all(&stage2, slot).len(), 512);
    assert_eq!(leaves(&stage2), [(0, Level::L2, false)]);
    stage2.destroy(CPU);
}

#[test]
fn initially_all_set_reports_everything_and_protects_at_the_first_clear() {
    let stage2 = stage2(Locking::Lockless);
    let slot = stage2.add_slot(ram(Level::L3)).unwrap();
    touch(&stage2, 3, Access::Write);
    stage2.enable_logging(CPU, slot, true).unwrap();
    assert_eq!(leaves(&stage2), [(3, Level::L3, true)]);
    assert_eq!(clear_all(&stage2, slot).len(), 2048);
    assert_eq!(leaves(&stage2), [(3, Level::L3, false)]);
    stage2.destroy(CPU);
}

#[test]
fn what_a_slot_forbids_is_denied_and_what_is_no_slot_is_said_so() {
    let stage2 = stage2(Locking::Mutex);
    let rom = SlotConfig {
        writable: false,
        ..ram(Level::L2)
    };
    let slot = stage2.add_slot(rom).unwrap();
    assert_eq!(touch(&stage2, 0, Access::Write), Resolution::Denied);
    assert_eq!(touch(&stage2, 0, Access::Read), Resolution::Resume);
    assert_eq!(touch(&stage2, 0, Access::Write), Resolution::Denied);
    assert_eq!(touch(&stage2, 0, Access::Execute), Resolution::Resume);
    assert_eq!(touch(&stage2, 1 << 20, Access::Read), Resolution::NoSlot);
    assert_eq!(
        stage2.enable_logging(CPU, slot, false),
        Err(Error::NotLoggable)
    );
    stage2.destroy(CPU);
}

#[test]
fn bad_ranges_and_slots_are_refused_and_change_nothing() {
    let stage2 = stage2(Locking::Lockless);
    let slot = stage2.add_slot(ram(Level::L2)).unwrap();
    assert_eq!(
        stage2.add_slot(ram(Level::L2)),
        Err(Error::Overlap(Ipa::new(BASE)))
    );
    touch(&stage2, 0, Access::Write);
    stage2.enable_logging(CPU, slot, true).unwrap();
    let mut set = PageSet::default();
    for (from, to) in [(0, 0), (1, 64), (0, 65), (0, 4096), (64, 0)] {
        assert!(
            matches!(
                stage2.clear(CPU, slot, from, to, &mut set),
                Err(Error::BadRange(..))
            ),
            "{from} {to}"
        );
    }
    assert!(set.is_empty());
    assert_eq!(dirty(&stage2, slot).len(), 2048);
    assert!(stage2.unmap(CPU, Ipa::new(BASE + 0x1000), 0x1000).is_err());
    assert_eq!(leaves(&stage2).len(), 1);
    stage2.unmap(CPU, Ipa::new(BASE), BLOCK).unwrap();
    assert!(leaves(&stage2).is_empty());
    stage2.remove_slot(CPU, slot).unwrap();
    assert_eq!(touch(&stage2, 0, Access::Read), Resolution::NoSlot);
    stage2.destroy(CPU);
}

#[test]
fn the_hypervisor_writes_through_the_same_slots_and_is_recorded() {
    let stage2 = stage2(Locking::Lockless);
    let mut memory = vec![0xa5_u8; 3 * to_index(BLOCK)];
    let aligned = memory
        .as_mut_ptr()
        .expose_provenance()
        .next_multiple_of(to_index(BLOCK));
    let backing = vec![Extent {
        pa: Pa::new(aligned as u64),
        bytes: BLOCK,
    }];
    let slot = stage2
        .add_slot(SlotConfig {
            backing,
            contents: Contents::Zero,
            ..ram(Level::L3)
        })
        .unwrap();
    stage2.enable_logging(CPU, slot, false).unwrap();
    let mut read = [1; 16];
    stage2
        .copy_from_guest(CPU, Ipa::new(BASE + 0xff8), &mut read)
        .unwrap();
    assert_eq!(read, [0; 16]);
    stage2
        .copy_to_guest(CPU, Ipa::new(BASE + 0xff8), b"sixteen bytes ok")
        .unwrap();
    stage2
        .copy_from_guest(CPU, Ipa::new(BASE + 0xff8), &mut read)
        .unwrap();
    assert_eq!(&read, b"sixteen bytes ok");
    assert_eq!(dirty(&stage2, slot), [0, 1]);
    assert!(
        stage2
            .copy_to_guest(CPU, Ipa::new(BASE + BLOCK - 4), &[0; 8])
            .is_err()
    );
    assert!(
        stage2
            .copy_from_guest(CPU, Ipa::new(u64::MAX - 3), &mut read)
            .is_err()
    );
    stage2.destroy(CPU);
}

#[test]
fn a_region_written_in_the_last_epoch_needs_no_split_in_the_next() {
    let stage2 = stage2_with(Locking::Lockless, Engine::Swap);
    let slot = stage2.add_slot(ram(Level::L2)).unwrap();
    for page in [0, 512, 1024, 1536] {
        touch(&stage2, page, Access::Write);
    }
    stage2.enable_logging(CPU, slot, false).unwrap();
    // The CPU that faults is not in the guest; another one closes epochs.
    stage2.rest(CPU);
    let controller = CpuId(1);
    let turn = || {
        stage2.prepare(controller).unwrap();
        let epoch = stage2.next_epoch(controller).unwrap().epoch;
        stage2
            .harvest(controller, slot, epoch, &mut PageSet::default())
            .unwrap();
    };
    stage2.prepare(controller).unwrap();
    touch(&stage2, 512, Access::Write);
    turn();
    // Nobody has written since: the block that is live now was written in the last epoch.
    turn();
    let split = leaves(&stage2);
    let of = |level| split.iter().filter(|it| it.1 == level).count();
    assert_eq!((of(Level::L2), of(Level::L3)), (3, 512));
    assert!(split.iter().all(|(_, _, write)| !write));
    turn();
    turn();
    assert_eq!(leaves(&stage2).len(), 4, "nothing is hot any more");
    stage2.unload(CPU);
    stage2.destroy(CPU);
}
