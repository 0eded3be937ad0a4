//! A copy of the logged memory that is fed only by what is reported: what a migration's destination would hold.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use crate::addr::{Ipa, PAGE_BYTES, to_index};
use crate::guest::abi;
use crate::mmu::PageSet;

use super::Refusal;
use super::scene::Scene;

const PAGE: usize = to_index(PAGE_BYTES);

/// The copy, page by page.
pub(super) struct Shadow(Vec<Vec<u8>>);

impl Shadow {
    /// A copy of `pages` pages that nobody wrote.
    pub(super) fn new(pages: u64) -> Self {
        Self((0..pages).map(|_| vec![0; PAGE]).collect())
    }

    /// Copies every page.
    pub(super) fn copy_all(&mut self, scene: &Scene) -> Result<(), Refusal> {
        (0..scene.pages()).try_for_each(|page| self.copy_page(scene, page))
    }

    /// Copies what was reported.
    pub(super) fn copy(&mut self, scene: &Scene, reported: &PageSet) -> Result<(), Refusal> {
        reported
            .pages()
            .try_for_each(|page| self.copy_page(scene, page))
    }

    fn copy_page(&mut self, scene: &Scene, page: u64) -> Result<(), Refusal> {
        match self.0.get_mut(to_index(page)) {
            Some(copy) => scene.read(Ipa::new(abi::DATA + page * PAGE_BYTES), copy),
            None => Err(format!("page {page} was reported and does not exist")),
        }
    }

    /// Pages that differ from the guest's memory.
    pub(super) fn differing(&self, scene: &Scene) -> Result<u64, Refusal> {
        let mut now = vec![0; PAGE];
        let mut differing = 0;
        for (page, copy) in (0_u64..).zip(&self.0) {
            scene.read(Ipa::new(abi::DATA + page * PAGE_BYTES), &mut now)?;
            differing += u64::from(now != *copy);
        }
        Ok(differing)
    }
}
