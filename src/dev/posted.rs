//! A fake device for host tests, whose bus posts writes: the device sees them when it is next read, or when it pleases
//! ([`Device::settle`]). Registers of this thread are that device's while it is plugged in; barriers are noted in between.

extern crate std;

use core::cell::RefCell;
use std::rc::Rc;
use std::vec::Vec;

use crate::arch::fake::{self, Event};

/// What a driver did, in its order; registers by their addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Done {
    Read(usize),
    Write(usize, u32),
    /// `DSB LD`, which waits for what was read.
    WaitedForReads,
}

/// What the device makes of a write (address, value), and reads as afterwards.
type Words = fn(&mut u32, usize, u32);

/// A device of one word.
pub(crate) struct Device {
    state: RefCell<State>,
    write: Words,
}

#[derive(Default)]
struct State {
    word: u32,
    posted: Vec<(usize, u32)>,
    done: Vec<Done>,
}

std::thread_local! {
    static PLUGGED: RefCell<Option<Rc<Device>>> = const { RefCell::new(None) };
}

impl Device {
    /// Plugs one in that reads `word` everywhere and takes writes as `write` says.
    pub(crate) fn plug(word: u32, write: Words) -> Rc<Self> {
        let state = State {
            word,
            ..State::default()
        };
        let device = Rc::new(Self {
            state: RefCell::new(state),
            write,
        });
        PLUGGED.set(Some(device.clone()));
        let noted = device.clone();
        fake::observe(Some(Rc::new(move |event| {
            if event == Event::DsbLd {
                noted.state.borrow_mut().done.push(Done::WaitedForReads);
            }
        })));
        device
    }

    /// What is on its way arrives.
    pub(crate) fn settle(&self) {
        let mut state = self.state.borrow_mut();
        for (address, value) in core::mem::take(&mut state.posted) {
            (self.write)(&mut state.word, address, value);
        }
    }

    /// Its word, which something else than a write may change.
    pub(crate) fn change(&self, change: impl FnOnce(&mut u32)) -> u32 {
        let word = &mut self.state.borrow_mut().word;
        change(word);
        *word
    }

    /// What was done since this was last asked.
    pub(crate) fn take_done(&self) -> Vec<Done> {
        core::mem::take(&mut self.state.borrow_mut().done)
    }
}

/// What the device that is plugged in reads as at `address`.
pub(crate) fn read(address: usize) -> Option<u32> {
    let device = PLUGGED.with_borrow(Option::clone)?;
    device.settle();
    let mut state = device.state.borrow_mut();
    state.done.push(Done::Read(address));
    Some(state.word)
}

/// Whether a device is plugged in, which takes the write.
pub(crate) fn write(address: usize, value: u32) -> bool {
    let Some(device) = PLUGGED.with_borrow(Option::clone) else {
        return false;
    };
    let mut state = device.state.borrow_mut();
    state.posted.push((address, value));
    state.done.push(Done::Write(address, value));
    true
}
