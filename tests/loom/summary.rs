//! The bitmap's summaries (rule 13): a page that is recorded is found.

use loom::sync::Arc;

use loom::thread;
use vellum::arch;
use vellum::arch::atomic::{AtomicU64, Ordering, fence};
use vellum::mmu::bitmap::Bitmap;

use crate::check;

/// Takes what the summaries lead to; how many pages.
fn take_found(bitmap: &Bitmap) -> u32 {
    let mut taken = 0;
    let mut at = 0;
    while let Some(group) = bitmap.next_group(at, bitmap.pages()) {
        let end = (group + 512).min(bitmap.pages());
        bitmap.take_group(group, end, |_, bits| taken += bits.count_ones());
        at = group + 512;
    }
    taken
}

#[test]
fn good_page_set_while_another_is_taken_is_found_then_or_next_time() {
    check(|| {
        let bitmap = Arc::new(Bitmap::new(64, 2));
        bitmap.set(1, 1);
        let setter = {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || bitmap.set(2, 1))
        };
        let first = take_found(&bitmap);
        setter.join().unwrap();
        assert_eq!(first + take_found(&bitmap), 2);
    });
}

#[test]
fn good_page_set_while_two_takers_take_is_found_exactly_once() {
    check(|| {
        let bitmap = Arc::new(Bitmap::new(64, 1));
        bitmap.set(1, 0);
        let spawn = |work: fn(&Bitmap) -> u32| {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || work(&bitmap))
        };
        let setter = spawn(|bitmap| {
            bitmap.set(2, 0);
            0
        });
        let taker = spawn(take_found);
        let mine = take_found(&bitmap);
        let found = setter.join().unwrap() + taker.join().unwrap() + mine;
        assert_eq!(found + take_found(&bitmap), 2);
    });
}

#[test]
fn good_reader_after_the_setter_sees_the_page() {
    check(|| {
        let bitmap = Arc::new(Bitmap::new(64, 2));
        let setter = {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || bitmap.set(2, 1))
        };
        bitmap.set(3, 0);
        setter.join().unwrap();
        let mut seen = 0;
        bitmap.read(0, 64, |_, bits| seen |= bits);
        assert_eq!(seen, 0b1100);
    });
}

/// One word and its summary bit, for the orders that the bitmap does not have.
#[derive(Default)]
struct Pair {
    word: AtomicU64,
    summary: AtomicU64,
}

impl Pair {
    fn set(&self, bit: u64, fenced: bool) {
        arch::fetch_or(&self.word, bit);
        if fenced {
            fence(Ordering::SeqCst);
        }
        if self.summary.load(Ordering::Relaxed) == 0 {
            arch::fetch_or(&self.summary, 1);
        }
    }

    fn take(&self, summary_first: bool, fenced: bool) -> u64 {
        if summary_first {
            self.summary.store(0, Ordering::Relaxed);
            if fenced {
                fence(Ordering::SeqCst);
            }
        }
        // As a plain load first, the way a taker skips empty words.
        let taken = match self.word.load(Ordering::Relaxed) {
            0 => 0,
            _ => arch::swap(&self.word, 0),
        };
        if !summary_first {
            fence(Ordering::SeqCst);
            self.summary.store(0, Ordering::Relaxed);
        }
        taken
    }
}

fn pair(summary_first: bool, setter_fenced: bool, taker_fenced: bool) {
    check(move || {
        let pair = Arc::new(Pair::default());
        // Left by a page that was taken alone.
        pair.summary.store(1, Ordering::Relaxed);
        let setter = {
            let pair = Arc::clone(&pair);
            thread::spawn(move || pair.set(2, setter_fenced))
        };
        pair.take(summary_first, taker_fenced);
        setter.join().unwrap();
        let left = pair.word.load(Ordering::Relaxed) != 0;
        let found = pair.summary.load(Ordering::Relaxed) != 0;
        assert!(!left || found, "a page is invisible");
    });
}

#[test]
fn good_summary_cleared_then_fence_then_words() {
    pair(true, true, true);
}

#[test]
#[should_panic = "a page is invisible"]
fn bad_taking_words_before_the_summary_hides_a_page() {
    pair(false, true, true);
}

#[test]
#[should_panic = "a page is invisible"]
fn bad_setter_without_fence_hides_a_page() {
    pair(true, false, true);
}

#[test]
#[should_panic = "a page is invisible"]
fn bad_taker_without_fence_hides_a_page() {
    pair(true, true, false);
}
