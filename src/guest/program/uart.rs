//! The PL011, polled: the guest's own voice.

use core::fmt::{self, Write as _};
use core::sync::atomic::Ordering::Relaxed;

use vellum::guest::abi::Area;

use super::{Done, asm};

const DR: u64 = 0x0900_0000;
const FR: u64 = DR + 0x18;
const FULL: u64 = 1 << 5;

struct Uart;

impl fmt::Write for Uart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while asm::load_word(FR) & FULL != 0 {}
            asm::store_word(DR, u64::from(byte));
        }
        Ok(())
    }
}

/// Prints what the last pass took.
pub(super) fn report(area: &Area, nanoseconds: u64) -> Done {
    let index = area.index.load(Relaxed);
    let failed = writeln!(Uart, "guest: vcpu {index} pass {nanoseconds} ns").is_err();
    Done::ok(1, u64::from(failed))
}

/// Lines without end, waiting for nothing: see [`vellum::guest::abi::op::FLOOD`].
pub(super) fn flood(area: &Area) -> Done {
    const LINE: &[u8] = b"guest: a flood, a flood, a flood, a flood, a flood, a flood\n";
    let mut rounds = 0;
    while area.stop.load(Relaxed) == 0 {
        for byte in LINE {
            asm::store_word(DR, u64::from(*byte));
        }
        rounds += 1;
        area.rounds.store(rounds, Relaxed);
    }
    Done::ok(rounds, 0)
}
