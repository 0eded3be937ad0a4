//! Suite `get`: what reading the dirty pages costs when few of a large slot are dirty. It should depend on the pages
//! written, not on the memory there is; untouched memory is never zeroed, so large slots cost nothing to set up.

use crate::addr::PAGE_BYTES;
use crate::guest::abi::op;
use crate::mmu::{Locking, PageSet};
use crate::vm::Command;

use super::Refusal;
use super::clock::timed;
use super::report::Row;
use super::scene::{Cast, Stage, cpu};

const DIRTY_PAGES: u64 = 100;
const REPEATS: u64 = 5;

/// One row for each slot size, the fastest of a few repeats; false when a page was lost.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let mut good = true;
    for &slot_mib in &stage.params.slot_mib {
        let cast = Cast {
            region_bytes: slot_mib << 20,
            ..stage.cast(Locking::Lockless, 1)
        };
        let scene = stage.open(cast)?;
        let failed = |error| alloc::format!("dirty logging: {error}");
        scene
            .stage2()
            .enable_logging(cpu(), scene.data, false)
            .map_err(failed)?;
        let stride = (cast.region_bytes / DIRTY_PAGES).next_multiple_of(PAGE_BYTES) - PAGE_BYTES;
        scene.perform(|_| Command {
            op: op::PASS,
            args: [scene.region(0), DIRTY_PAGES, stride, 100, 1],
        })?;
        let mut fastest = u64::MAX;
        let mut pages = 0;
        for _ in 0..REPEATS {
            let mut reported = PageSet::default();
            let (got, get_ns) = timed(|| scene.stage2().dirty(cpu(), scene.data, &mut reported));
            got.map_err(failed)?;
            fastest = fastest.min(get_ns);
            pages = reported.len();
        }
        scene.close();
        good &= pages == DIRTY_PAGES;
        Row::new("get", "slot", stage.params.timing.name())
            .param("slot_mib", slot_mib)
            .param("vcpus", 1)
            .value("get_ns", fastest)
            .value("pages_written", DIRTY_PAGES)
            .value("pages_reported", pages)
            .value("pages_lost", DIRTY_PAGES.saturating_sub(pages))
            .print();
    }
    Ok(good)
}
