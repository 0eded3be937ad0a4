//! The way from everybody who writes to the console to its one UART.
//!
//! A UART takes 90 microseconds for a byte at 115200 baud, and as long as its own queue is full whoever wants to send waits. The
//! hypervisor may: it sends line by line ([`Wire::line`]). For guests there is a queue here. What it takes it takes at once,
//! a line as a whole ([`Wire::take_line`]), and [`Wire::push`] sends as much as the UART has room for and no more than
//! [`PUSH_BYTES`]: a constant number of accesses whatever the state of the wire.
//!
//! Nobody drowns the others: whoever had a line taken has the next one taken when the first has left ([`Place`]), so each waits
//! for a line of each other and no more, as long as there are no more writers than lines fit into the queue. A line of the
//! hypervisor's goes behind what is queued, so that the order is the order of time. A guest that has the console to itself
//! ([`Wire::take_byte`]) comes after all lines; there is one such guest, and then no others that send lines.

use core::fmt::{self, Write};

use super::fifo::Fifo;
use crate::arch;

/// Begins a line of the hypervisor's on a console that a guest shares: the ASCII record separator.
pub const RECORD: u8 = 0x1e;
/// Most bytes of a line that is taken: its text and what is put before and behind it.
pub const LINE_BYTES: usize = 320;
/// Bytes that one push sends at most: what the largest queue of a PL011 holds.
pub const PUSH_BYTES: usize = 32;
/// Bytes queued here.
const QUEUE_BYTES: usize = 4096;
/// Bytes of a guest that has the console to itself that are taken ahead of the UART.
const AHEAD_BYTES: usize = 64;

/// A UART's sending half.
pub trait Transmitter {
    /// Sends `byte` if there is room for it at once. False: there is none.
    #[must_use]
    fn try_send(&self, byte: u8) -> bool;
}

/// How far a writer has come: what it had taken ends here, in bytes since boot.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place(u64);

/// The UART, once there is one, and what waits for it.
#[derive(Debug)]
pub struct Wire<T> {
    /// What is written before there is one is lost.
    pub uart: Option<T>,
    /// To find out how a slower one would do.
    pub pace: Option<Pace>,
    queue: Fifo<QUEUE_BYTES>,
    /// Bytes that have left the queue since boot.
    sent: u64,
    /// A guest writes to it, too.
    shared: bool,
    /// The guest's last byte did not end a line.
    mid_line: bool,
}

impl<T> Wire<T> {
    /// One without UART.
    pub const fn new() -> Self {
        Self {
            uart: None,
            pace: None,
            queue: Fifo::new(),
            sent: 0,
            shared: false,
            mid_line: false,
        }
    }

    /// Whether something is queued.
    pub fn is_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// A guest has the console from here on, and lines of others are marked by [`RECORD`].
    pub fn share(&mut self) {
        self.shared = true;
    }

    fn end(&self) -> u64 {
        self.sent + self.queue.len() as u64
    }

    /// Begins a line: what goes before it.
    fn head(&mut self) -> &'static str {
        let fresh_line = core::mem::take(&mut self.mid_line);
        match (fresh_line, self.shared) {
            (false, false) => "",
            (false, true) => "\u{1e}",
            (true, false) => "\n",
            (true, true) => "\n\u{1e}",
        }
    }
}

impl<T> Default for Wire<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Transmitter> Wire<T> {
    /// Queues a line of at most [`LINE_BYTES`] for the writer at `place`. False, and nothing has happened: there is no room, or the
    /// writer's last one has not left yet.
    #[must_use]
    pub fn take_line(&mut self, place: &mut Place, text: fmt::Arguments<'_>) -> bool {
        if place.0 > self.sent || self.queue.room() < LINE_BYTES {
            return false;
        }
        let head = self.head();
        let written = Queued(&mut self.queue).write_fmt(format_args!("{head}{text}\n"));
        debug_assert!(written.is_ok(), "there was room");
        place.0 = self.end();
        true
    }

    /// Queues a byte of the guest's that has the console. False: there is no room yet.
    #[must_use]
    pub fn take_byte(&mut self, byte: u8) -> bool {
        if byte == RECORD {
            return true;
        }
        let taken = self.queue.len() < AHEAD_BYTES && self.queue.push(byte);
        if taken {
            self.mid_line = byte != b'\n';
        }
        taken
    }

    /// Sends what is queued as far as the UART has room for it, and no more than [`PUSH_BYTES`]. Whether any was sent.
    pub fn push(&mut self) -> bool {
        let before = self.sent;
        for _ in 0..PUSH_BYTES {
            let Some(byte) = self.queue.first() else {
                break;
            };
            if !self.try_send(byte) {
                break;
            }
            self.queue.pop();
            self.sent += 1;
        }
        self.sent != before
    }

    /// Sends what is queued, and waits for that.
    pub fn drain(&mut self) {
        while self.is_waiting() {
            self.push();
        }
    }

    /// Sends a line of the hypervisor's behind what is queued, and waits for that.
    pub fn line(&mut self, text: fmt::Arguments<'_>) {
        self.drain();
        let head = self.head();
        if Direct(self)
            .write_fmt(format_args!("{head}{text}\n"))
            .is_err()
        {
            // A value's own formatter failed; the rest of the line is lost and there is nobody to tell.
        }
    }

    fn try_send(&mut self, byte: u8) -> bool {
        let Some(uart) = &self.uart else {
            return true;
        };
        if let Some(pace) = &mut self.pace {
            return pace.has_room(arch::counter()) && uart.try_send(byte) && pace.took();
        }
        uart.try_send(byte)
    }
}

/// Text on its way into the queue.
struct Queued<'a>(&'a mut Fifo<QUEUE_BYTES>);

impl Write for Queued<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let taken = bytes(text).all(|byte| self.0.push(byte));
        if taken { Ok(()) } else { Err(fmt::Error) }
    }
}

/// Text on its way to the UART.
struct Direct<'a, T>(&'a mut Wire<T>);

impl<T: Transmitter> Write for Direct<'_, T> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in bytes(text) {
            while !self.0.try_send(byte) {}
        }
        Ok(())
    }
}

/// As terminals want it: a line ends in two bytes.
fn bytes(text: &str) -> impl Iterator<Item = u8> {
    let returned = |byte| (byte == b'\n').then_some(b'\r');
    text.bytes()
        .flat_map(move |byte| returned(byte).into_iter().chain([byte]))
}

/// Makes a UART as slow as one of so many baud, with a queue of 16 bytes.
#[derive(Debug)]
pub struct Pace {
    ticks_per_byte: u64,
    /// When the last byte will have left.
    idle_at: u64,
    now: u64,
}

impl Pace {
    const QUEUE: u64 = 16;
    const BITS_PER_BYTE: u64 = 10;

    /// That of `baud` where the counter has `hz`.
    pub fn new(baud: u64, hz: u64) -> Self {
        Self {
            ticks_per_byte: hz * Self::BITS_PER_BYTE / baud.max(1),
            idle_at: 0,
            now: 0,
        }
    }

    fn has_room(&mut self, now: u64) -> bool {
        self.now = now;
        self.idle_at + self.ticks_per_byte <= now + Self::QUEUE * self.ticks_per_byte
    }

    fn took(&mut self) -> bool {
        self.idle_at = self.idle_at.max(self.now) + self.ticks_per_byte;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{LINE_BYTES, PUSH_BYTES, Pace, Place, RECORD, Transmitter, Wire};
    use std::cell::{Cell, RefCell};
    use std::string::String;
    use std::vec::Vec;

    /// A UART with a queue of so many bytes, which counts how often it was asked.
    #[derive(Debug)]
    pub(super) struct Fake {
        size: usize,
        queued: Cell<usize>,
        asked: Cell<usize>,
        sent: RefCell<Vec<u8>>,
    }

    impl Fake {
        fn of(size: usize) -> Self {
            Self {
                size,
                queued: Cell::new(0),
                asked: Cell::new(0),
                sent: RefCell::default(),
            }
        }

        fn leave(&self, bytes: usize) {
            self.queued.set(self.queued.get().saturating_sub(bytes));
        }
    }

    impl Transmitter for Fake {
        fn try_send(&self, byte: u8) -> bool {
            self.asked.set(self.asked.get() + 1);
            let room = self.queued.get() < self.size;
            if room {
                self.queued.set(self.queued.get() + 1);
                self.sent.borrow_mut().push(byte);
            }
            room
        }
    }

    fn wire(size: usize) -> Wire<Fake> {
        Wire {
            uart: Some(Fake::of(size)),
            ..Wire::new()
        }
    }

    fn fake(wire: &Wire<Fake>) -> &Fake {
        wire.uart.as_ref().unwrap()
    }

    fn sent(wire: &Wire<Fake>) -> String {
        String::from_utf8(fake(wire).sent.borrow().clone()).unwrap()
    }

    #[test]
    fn a_push_asks_a_constant_number_of_times_whatever_the_state_of_the_wire() {
        for size in [0, 1, 8, 16, 32, usize::MAX] {
            let mut wire = wire(size);
            let line = "x".repeat(240);
            assert!(wire.take_line(&mut Place::default(), format_args!("{line}")));
            wire.push();
            let asked = fake(&wire).asked.get();
            assert_eq!(asked, PUSH_BYTES.min(size.saturating_add(1)), "{size}");
            assert!(wire.is_waiting());
        }
    }

    #[test]
    fn lines_stay_whole_however_few_bytes_leave_at_a_time() {
        for step in 1..=16 {
            let mut wire = wire(16);
            let mut places = [Place::default(); 3];
            let mut taken = Vec::new();
            for round in 0..400 {
                let writer = round % 3;
                let line = std::format!("writer {writer} round {round}");
                if wire.take_line(&mut places[writer], format_args!("{line}")) {
                    taken.push(line);
                }
                wire.push();
                fake(&wire).leave(step);
            }
            while wire.is_waiting() {
                wire.push();
                fake(&wire).leave(step);
            }
            let sent = sent(&wire);
            let lines: Vec<&str> = sent.split("\r\n").filter(|it| !it.is_empty()).collect();
            assert_eq!(lines, taken);
        }
    }

    #[test]
    fn who_floods_waits_for_a_line_of_each_other() {
        let mut wire = wire(16);
        let (mut flood, mut other) = (Place::default(), Place::default());
        for _ in 0..50 {
            let _may_wait: bool = wire.take_line(&mut flood, format_args!("flood"));
            let _may_wait: bool = wire.take_line(&mut flood, format_args!("flood"));
            fake(&wire).leave(1);
            wire.push();
        }
        assert!(wire.take_line(&mut other, format_args!("other")));
        assert!(
            wire.queue.len() <= 2 * "flood\r\n".len(),
            "one line of each at most"
        );
    }

    #[test]
    fn a_line_that_might_not_fit_is_not_taken() {
        let mut wire = wire(0);
        let line = "x".repeat(LINE_BYTES - 2);
        let lines =
            (0..100).take_while(|_| wire.take_line(&mut Place::default(), format_args!("{line}")));
        assert_eq!(lines.count(), 4096 / LINE_BYTES);
    }

    #[test]
    fn a_shared_console_marks_lines_and_keeps_the_mark_from_the_guest() {
        assert_eq!("\u{1e}".as_bytes(), [RECORD]);
        let mut wire = wire(usize::MAX);
        wire.share();
        assert!(b"$ \x1e{".iter().all(|byte| wire.take_byte(*byte)));
        wire.line(format_args!("row"));
        assert!(wire.take_line(&mut Place::default(), format_args!("said")));
        wire.drain();
        assert_eq!(sent(&wire), "$ {\r\n\u{1e}row\r\n\u{1e}said\r\n");
    }

    #[test]
    fn a_guest_that_has_the_console_is_not_far_ahead_of_the_wire() {
        let mut wire = wire(16);
        let taken = (0..1000).take_while(|_| wire.take_byte(b'x')).count();
        assert_eq!(taken, 64);
        wire.push();
        assert_eq!((0..1000).take_while(|_| wire.take_byte(b'x')).count(), 16);
    }

    #[test]
    fn a_slow_uart_takes_its_queue_at_once_and_then_a_byte_at_a_time() {
        let mut pace = Pace::new(115_200, 115_200);
        let mut takes = |now| {
            (0..100)
                .take_while(|_| pace.has_room(now) && pace.took())
                .count()
        };
        assert_eq!(takes(1000), 16);
        assert_eq!((takes(1000), takes(1009), takes(1010)), (0, 0, 1));
        assert_eq!(takes(9000), 16);
    }
}
