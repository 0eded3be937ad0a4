//! A copy of the logged memory that is fed only by what is reported: what a migration's destination would hold.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use crate::addr::{Ipa, PAGE_BYTES, to_index};
use crate::guest::abi;
use crate::mmu::{PageSet, Stage2};

use super::Refusal;
use super::scene::{Scene, cpu};

const PAGE: usize = to_index(PAGE_BYTES);

/// The copy, page by page.
pub(super) struct Shadow {
    base: Ipa,
    pages: Vec<Vec<u8>>,
}

impl AsRef<Stage2> for Scene {
    fn as_ref(&self) -> &Stage2 {
        self.stage2()
    }
}

impl Shadow {
    /// A copy of a scene's `pages` pages, which nobody wrote.
    pub(super) fn new(pages: u64) -> Self {
        Self::of(Ipa::new(abi::DATA), pages)
    }

    /// A copy of `pages` pages from `base` on, which nobody wrote.
    pub(super) fn of(base: Ipa, pages: u64) -> Self {
        Self {
            base,
            pages: (0..pages).map(|_| vec![0; PAGE]).collect(),
        }
    }

    /// Copies every page.
    pub(super) fn copy_all(&mut self, memory: &impl AsRef<Stage2>) -> Result<(), Refusal> {
        (0..self.pages.len() as u64).try_for_each(|page| self.copy_page(memory.as_ref(), page))
    }

    /// Copies what was reported.
    pub(super) fn copy(
        &mut self,
        memory: &impl AsRef<Stage2>,
        reported: &PageSet,
    ) -> Result<(), Refusal> {
        reported
            .pages()
            .try_for_each(|page| self.copy_page(memory.as_ref(), page))
    }

    fn copy_page(&mut self, memory: &Stage2, page: u64) -> Result<(), Refusal> {
        let at = self.at(page);
        match self.pages.get_mut(to_index(page)) {
            Some(copy) => read(memory, at, copy),
            None => Err(format!("page {page} was reported and does not exist")),
        }
    }

    /// Pages that differ from the guest's memory.
    pub(super) fn differing(&self, memory: &impl AsRef<Stage2>) -> Result<u64, Refusal> {
        let mut now = vec![0; PAGE];
        let mut differing = 0;
        for (page, copy) in (0_u64..).zip(&self.pages) {
            read(memory.as_ref(), self.at(page), &mut now)?;
            differing += u64::from(now != *copy);
        }
        Ok(differing)
    }

    fn at(&self, page: u64) -> Ipa {
        Ipa::new(self.base.raw() + page * PAGE_BYTES)
    }
}

fn read(memory: &Stage2, ipa: Ipa, into: &mut [u8]) -> Result<(), Refusal> {
    let read = memory.copy_from_guest(cpu(), ipa, into);
    read.map_err(|error| format!("cannot read the guest: {error}"))
}
