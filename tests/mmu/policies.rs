//! When blocks are split: each policy, and what a guest pays for it.

use std::collections::BTreeSet;

use vellum::addr::{Ipa, Pa};
use vellum::arch;
use vellum::arch::fake;
use vellum::mmu::{
    Bbm, Contents, Error, Extent, Level, Memory, PageSet, Policy, SlotConfig, Split,
};
use vellum::sync::quiescence::CpuId;
use vellum::trace::Event;

use crate::rig::{BLOCK_BYTES, RAM, Rig};
use crate::splitting::{
    FAR, GIB, LEVELS, always_reaches, everywhere, levels, of_blocks, page, plan,
};

#[test]
fn good_enable_policy_leaves_no_block() {
    everywhere(Policy::Enable, |rig| {
        for all_set in [false, true] {
            let vm = of_blocks(rig, 3);
            let split = rig.enable(0, &vm, 0, all_set);
            assert_eq!(split, Split { blocks: 3, left: 0 });
            assert_eq!(levels(&rig.leaves(&vm)), (0, 0, 1536));
            rig.check(&vm);
            rig.destroy(0, vm);
        }
    });
}

#[test]
fn good_enable_policy_makes_dirtying_cost_one_permission_fault_a_page() {
    everywhere(Policy::Enable, |rig| {
        let vm = of_blocks(rig, 2);
        rig.enable(0, &vm, 0, false);
        arch::dsb_ish();
        let faults = |event| rig.count(event);
        let before = (
            faults(Event::FaultsTranslation),
            faults(Event::FaultsPermission),
        );
        let pages = [0, 1, 64, 511, 512, 600, 1023];
        for number in pages {
            rig.write(1, page(number));
        }
        assert_eq!(faults(Event::FaultsTranslation), before.0);
        let permission = faults(Event::FaultsPermission) - before.1;
        assert_eq!(permission, pages.len() as u64);
        assert_eq!(rig.dirty(0, &vm, 0), BTreeSet::from(pages));
        rig.check(&vm);
    });
}

#[test]
fn good_clear_policy_splits_only_what_was_taken() {
    for chunk_bytes in [BLOCK_BYTES, GIB] {
        for bbm in LEVELS {
            let mut plan = plan(Policy::Clear, bbm);
            plan.splitting.chunk_bytes = chunk_bytes;
            let rig = Rig::new(plan);
            let vm = of_blocks(&rig, 6);
            let enabled = rig.enable(0, &vm, 0, true);
            assert_eq!(enabled, Split::default());
            let (pages, split) = rig.clear_and_split(0, &vm, 0, 1024, 1088);
            assert_eq!((pages.len(), split), (64, Split { blocks: 1, left: 0 }));
            assert_eq!(levels(&rig.leaves(&vm)), (0, 5, 512));
            let (_, split) = rig.clear_and_split(0, &vm, 0, 1024, 1088);
            assert_eq!(split, Split::default());
            let (pages, split) = rig.clear_and_split(0, &vm, 0, 1536, 2560);
            assert_eq!((pages.len(), split), (1024, Split { blocks: 2, left: 0 }));
            let (pages, split) = rig.clear_and_split(0, &vm, 0, 0, 3072);
            assert_eq!(pages.len(), 3072 - 64 - 1024);
            assert_eq!(split, Split { blocks: 3, left: 0 });
            assert_eq!(levels(&rig.leaves(&vm)), (0, 0, 3072));
            rig.write(1, page(77));
            assert_eq!(rig.dirty(0, &vm, 0), BTreeSet::from([77]));
            rig.check(&vm);
        }
    }
}

#[test]
fn good_clear_policy_names_the_pages_of_a_slot_that_is_not_aligned_to_its_chunks() {
    for chunk_bytes in [BLOCK_BYTES, GIB] {
        let mut plan = plan(Policy::Clear, Bbm::Two);
        plan.splitting.chunk_bytes = chunk_bytes;
        let rig = Rig::new(plan);
        let vm = rig.vm();
        let bytes = 3 * BLOCK_BYTES - 0x1000;
        let to = Pa::new(FAR.raw() + 0x1000);
        vm.add_slot(RAM + 0x1000, to, bytes, Level::L2, true);
        for cpu in 1..4 {
            rig.load(cpu, &vm);
        }
        let pages = bytes / 4096;
        rig.enable(0, &vm, 0, false);
        let written = [
            0,
            5,
            100,
            510,
            511,
            512,
            513,
            600,
            1022,
            1023,
            1024,
            pages - 1,
        ];
        for number in written {
            rig.write(1, page(number + 1));
        }
        assert_eq!(rig.dirty(0, &vm, 0), BTreeSet::from(written));
        assert_eq!(rig.clear(0, &vm, 0, 0, pages), BTreeSet::from(written));
        for number in written {
            assert!(!always_reaches(&rig, number + 1, fake::Access::Write));
        }
        rig.check(&vm);
    }
}

#[test]
fn good_fault_empty_policy_maps_the_written_page_only() {
    everywhere(Policy::FaultEmpty, |rig| {
        let vm = of_blocks(rig, 1);
        rig.enable(0, &vm, 0, false);
        let windows = rig.count(Event::BbmWindows);
        rig.write(1, page(5));
        assert_eq!(rig.count(Event::BbmWindows), windows + 1);
        assert_eq!(levels(&rig.leaves(&vm)), (0, 0, 1));
        let before = rig.count(Event::FaultsTranslation);
        rig.read(2, page(6));
        assert!(rig.count(Event::FaultsTranslation) > before);
        assert_eq!(levels(&rig.leaves(&vm)), (0, 0, 2));
        assert_eq!(rig.dirty(0, &vm, 0), BTreeSet::from([5]));
        rig.check(&vm);
    });
}

#[test]
fn good_fault_empty_policy_refuses_memory_that_it_would_zero() {
    let rig = Rig::new(plan(Policy::FaultEmpty, Bbm::Zero));
    let vm = rig.vm();
    let config = SlotConfig {
        ipa: Ipa::new(RAM),
        backing: vec![Extent {
            pa: FAR,
            bytes: BLOCK_BYTES,
        }],
        max_leaf: Level::L2,
        memory: Memory::Normal,
        writable: true,
        contents: Contents::Zero,
    };
    let id = vm.stage2.add_slot(config).expect("room for a slot");
    let refused = vm.stage2.enable_logging(CpuId(0), id, false);
    assert_eq!(refused, Err(Error::MustKeep));
    let dirty = vm.stage2.dirty(CpuId(0), id, &mut PageSet::default());
    assert_eq!(dirty, Err(Error::NotLogging));
}
