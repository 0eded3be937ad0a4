//! The virtual PL011 (Arm DDI 0183G): a transmitter and a receiver, each with its queue.
//!
//! What a guest sends goes to the log a line at a time, or byte by byte to whoever has the console. It leaves the transmit queue at
//! once, into a line, as long as the line before has been taken away ([`Vuart::hand_over`]); while it has not, the queue fills, and
//! the guest sees TXFF, BUSY and no transmit interrupt, as on a machine whose wire is slow. A byte written to a full queue is lost
//! there as it is here, and counted. What is received waits outside while the queue is full or the receiver is off, so
//! nothing typed is lost. There is no baud rate, and the receive time-out has always passed.
//!
//! The transmit interrupt is set when a byte leaves and no more than the trigger level remain. (A PL011 sets it when the level is
//! crossed. A driver that fills the queue and sleeps relies on that, but here the bytes may have left one by one without
//! ever coming up to the level, so each that leaves below it counts.)

use crate::dev::fifo::Fifo;

/// Bytes of its register frame.
pub const BYTES: u64 = 0x1000;
/// Its interrupt: the second shared one, level-triggered.
pub const INTID: u16 = 33;
/// Longest line kept back for its end.
const LONGEST_LINE: usize = 240;
/// Bytes that wait to be sent or to be read, with and without the queue.
const QUEUE_BYTES: usize = 16;
const HOLDING_BYTES: usize = 1;
/// Lines that can wait to be handed over: each byte of the queue may end one, and there is one before and one without end behind.
pub(crate) const MOST_LINES: usize = QUEUE_BYTES + 2;

const DR: u64 = 0x000;
const FR: u64 = 0x018;
const IBRD: u64 = 0x024;
const FBRD: u64 = 0x028;
const LCR_H: u64 = 0x02c;
const CR: u64 = 0x030;
const IFLS: u64 = 0x034;
const IMSC: u64 = 0x038;
const RIS: u64 = 0x03c;
const MIS: u64 = 0x040;
const ICR: u64 = 0x044;
const PERIPHERAL_ID: u64 = 0xfe0;

/// FR.TXFE, FR.TXFF and FR.BUSY: nothing waits in the queue; it is full; something has not been sent yet.
const TRANSMIT_EMPTY: u32 = 1 << 7;
const TRANSMIT_FULL: u32 = 1 << 5;
const BUSY: u32 = 1 << 3;
/// FR.RXFF and FR.RXFE.
const RECEIVE_FULL: u32 = 1 << 6;
const RECEIVE_EMPTY: u32 = 1 << 4;
/// LCR_H.FEN: the queue is in use.
const QUEUE_ENABLED: u32 = 1 << 4;
/// CR: UARTEN and RXE.
const RECEIVING: u32 = 1 << 0 | 1 << 9;
/// RIS, MIS, IMSC: the receive time-out has passed; there is room for output; there is input.
const TIMEOUT_INTERRUPT: u32 = 1 << 6;
const TRANSMIT_INTERRUPT: u32 = 1 << 5;
const RECEIVE_INTERRUPT: u32 = 1 << 4;
/// UARTPeriphID0..3 and UARTPCellID0..3 of a PL011 r1p4.
const IDENTIFICATION: [u8; 8] = [0x11, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// How the bytes go that a guest sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Output {
    /// A line at a time, with what is not printable replaced.
    Lines,
    /// As they are.
    Bytes,
}

/// Takes away what was sent. Neither waits.
pub trait Outlet {
    /// Takes `line` as a whole. False: later.
    #[must_use]
    fn line(&mut self, line: &str) -> bool;
    /// Takes `byte`. False: later.
    #[must_use]
    fn byte(&mut self, byte: u8) -> bool;
}

/// The state of one.
#[derive(Debug)]
pub struct Vuart {
    output: Output,
    /// Written and not sent.
    sending: Fifo<QUEUE_BYTES>,
    line: Line,
    received: Fifo<QUEUE_BYTES>,
    control: u32,
    line_control: u32,
    divisors: [u32; 2],
    levels: u32,
    mask: u32,
    /// The transmit interrupt's raw state; those of the receiver follow from its queue.
    sent: bool,
    /// Bytes that the guest wrote although the queue was full.
    overruns: u64,
}

/// A line as far as it was sent.
#[derive(Debug)]
struct Line {
    bytes: [u8; LONGEST_LINE],
    len: usize,
    /// It has ended and waits to be taken away.
    complete: bool,
}

impl Line {
    const EMPTY: Self = Self {
        bytes: [0; LONGEST_LINE],
        len: 0,
        complete: false,
    };

    /// Adds `byte`, or ends there. It has not ended yet.
    fn add(&mut self, byte: u8) {
        let printable = match byte {
            b'\n' => return self.complete = true,
            b'\r' => return,
            b' '..=b'~' | b'\t' => byte,
            _ => b'.',
        };
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = printable;
            self.len += 1;
        }
        self.complete = self.len == LONGEST_LINE;
    }

    fn text(&self) -> &str {
        let text = self.bytes.get(..self.len).map(str::from_utf8);
        text.and_then(Result::ok).unwrap_or_default()
    }
}

impl Default for Vuart {
    fn default() -> Self {
        Self {
            output: Output::Lines,
            sending: Fifo::new(),
            line: Line::EMPTY,
            received: Fifo::new(),
            control: 0x300,
            line_control: 0,
            divisors: [0; 2],
            levels: 0x12,
            mask: 0,
            sent: false,
            overruns: 0,
        }
    }
}

impl Vuart {
    /// Sends everything as `output` from here on.
    pub fn set_output(&mut self, output: Output) {
        self.output = output;
    }

    /// Reads the register at `offset`.
    pub fn read(&mut self, offset: u64) -> u32 {
        match offset & !3 {
            DR => self.received.pop().map_or(0, u32::from),
            FR => self.flags(),
            IBRD => self.divisors[0],
            FBRD => self.divisors[1],
            LCR_H => self.line_control,
            CR => self.control,
            IFLS => self.levels,
            IMSC => self.mask,
            RIS => self.raw(),
            MIS => self.raw() & self.mask,
            id @ PERIPHERAL_ID..BYTES => usize::try_from((id - PERIPHERAL_ID) / 4)
                .ok()
                .and_then(|index| IDENTIFICATION.get(index))
                .map_or(0, |id| u32::from(*id)),
            _ => 0,
        }
    }

    /// Writes the register at `offset`.
    pub fn write(&mut self, offset: u64, value: u32) {
        match offset & !3 {
            DR => self.send(value),
            IBRD => self.divisors[0] = value & 0xffff,
            FBRD => self.divisors[1] = value & 0x3f,
            LCR_H => self.set_line_control(value & 0xff),
            CR => self.control = value & 0xffff,
            IFLS => self.levels = value & 0x3f,
            IMSC => self.mask = value & 0x7ff,
            ICR => self.sent &= value & TRANSMIT_INTERRUPT == 0,
            _ => {}
        }
    }

    /// Takes `byte` in. False: the queue is full or the receiver off, so it has to wait.
    #[must_use]
    pub fn receive(&mut self, byte: u8) -> bool {
        self.has_room() && self.received.push(byte)
    }

    /// Whether [`Vuart::receive`] would take a byte in.
    pub fn has_room(&self) -> bool {
        self.control & RECEIVING == RECEIVING && self.received.len() < self.capacity()
    }

    /// Whether it asks for an interrupt.
    pub fn interrupts(&self) -> bool {
        self.raw() & self.mask != 0
    }

    /// Whether something was sent that nobody has taken away. A line without end does not count.
    #[inline]
    pub fn is_waiting(&self) -> bool {
        self.line.complete || !self.sending.is_empty()
    }

    /// Hands `outlet` what was sent, as far as it takes it.
    pub fn hand_over(&mut self, outlet: &mut impl Outlet) {
        loop {
            if self.line.complete {
                if !outlet.line(self.line.text()) {
                    break;
                }
                (self.line.len, self.line.complete) = (0, false);
            }
            match self.output {
                Output::Lines => self.fill_line(),
                Output::Bytes => self.hand_over_bytes(outlet),
            }
            if !self.line.complete {
                break;
            }
        }
    }

    /// Ends the line that the guest has not ended yet.
    pub fn end_line(&mut self) {
        self.line.complete |= self.line.len > 0;
    }

    /// Bytes that were lost because the guest did not wait for room, since this was last asked.
    pub fn take_overruns(&mut self) -> u64 {
        core::mem::take(&mut self.overruns)
    }

    fn capacity(&self) -> usize {
        if self.line_control & QUEUE_ENABLED != 0 {
            QUEUE_BYTES
        } else {
            HOLDING_BYTES
        }
    }

    /// Bytes from which on there is enough input for an interrupt: eighths of the queue.
    fn receive_trigger(&self) -> usize {
        (self.capacity() * eighths(self.levels >> 3) / 8).max(1)
    }

    /// Bytes down to which there is room enough for output to interrupt.
    fn transmit_trigger(&self) -> usize {
        match self.capacity() {
            QUEUE_BYTES => QUEUE_BYTES * eighths(self.levels) / 8,
            _ => 0,
        }
    }

    fn flags(&self) -> u32 {
        let (waiting, sending) = (self.received.len(), self.sending.len());
        bit(TRANSMIT_EMPTY, sending == 0)
            | bit(TRANSMIT_FULL, sending >= self.capacity())
            | bit(BUSY, self.is_waiting())
            | bit(RECEIVE_EMPTY, waiting == 0)
            | bit(RECEIVE_FULL, waiting >= self.capacity())
    }

    fn raw(&self) -> u32 {
        let waiting = self.received.len();
        bit(TRANSMIT_INTERRUPT, self.sent)
            | bit(RECEIVE_INTERRUPT, waiting >= self.receive_trigger())
            | bit(TIMEOUT_INTERRUPT, waiting > 0)
    }

    /// Turning the queue on or off empties the receiver's. What was written to be sent is: a faster wire would have sent it.
    fn set_line_control(&mut self, value: u32) {
        if (self.line_control ^ value) & QUEUE_ENABLED != 0 {
            self.received.clear();
        }
        self.line_control = value;
    }

    fn send(&mut self, value: u32) {
        let [byte, ..] = value.to_le_bytes();
        if self.sending.len() >= self.capacity() || !self.sending.push(byte) {
            self.overruns = self.overruns.saturating_add(1);
            return;
        }
        self.sent &= self.sending.len() <= self.transmit_trigger();
        if self.output == Output::Lines {
            self.fill_line();
        }
    }

    /// Moves what is to be sent into the line, up to its end.
    fn fill_line(&mut self) {
        while !self.line.complete
            && let Some(byte) = self.sending.pop()
        {
            self.line.add(byte);
            self.byte_left();
        }
    }

    fn hand_over_bytes(&mut self, outlet: &mut impl Outlet) {
        while let Some(byte) = self.sending.first()
            && outlet.byte(byte)
        {
            self.sending.pop();
            self.byte_left();
        }
    }

    fn byte_left(&mut self) {
        self.sent |= self.sending.len() <= self.transmit_trigger();
    }
}

/// What a field of IFLS stands for.
const fn eighths(level: u32) -> usize {
    match level & 7 {
        0 => 1,
        1 => 2,
        3 => 6,
        4 => 7,
        _ => 4,
    }
}

const fn bit(bit: u32, when: bool) -> u32 {
    if when { bit } else { 0 }
}

#[cfg(test)]
mod tests {
    use std::borrow::ToOwned;
    use std::string::String;
    use std::vec::Vec;

    use super::{BYTES, CR, DR, FR, ICR, IFLS, IMSC, LCR_H, MIS, Outlet, Output, RIS, Vuart};

    /// Takes so much more, and keeps it.
    #[derive(Default)]
    struct Taker {
        more: usize,
        lines: Vec<String>,
        bytes: Vec<u8>,
    }

    impl Taker {
        fn takes(&mut self) -> bool {
            let takes = self.more > 0;
            self.more -= usize::from(takes);
            takes
        }
    }

    impl Outlet for Taker {
        fn line(&mut self, line: &str) -> bool {
            let takes = self.takes();
            self.lines.extend(takes.then(|| line.to_owned()));
            takes
        }

        fn byte(&mut self, byte: u8) -> bool {
            let takes = self.takes();
            self.bytes.extend(takes.then_some(byte));
            takes
        }
    }

    fn send(uart: &mut Vuart, bytes: &[u8]) {
        bytes
            .iter()
            .for_each(|byte| uart.write(DR, u32::from(*byte)));
    }

    /// What `taker` gets when it takes `more`.
    fn hand_over(uart: &mut Vuart, taker: &mut Taker, more: usize) {
        taker.more = more;
        uart.hand_over(taker);
    }

    /// One with its queue on whose wire stands still, with `bytes` in the queue.
    fn stuck(bytes: &[u8]) -> Vuart {
        let mut uart = started();
        uart.write(IMSC, 0x20);
        uart.set_output(Output::Bytes);
        send(&mut uart, bytes);
        uart
    }

    /// As a driver sets it up: queue on, everything enabled, receive interrupts.
    fn started() -> Vuart {
        let mut uart = Vuart::default();
        uart.write(LCR_H, 0x70);
        uart.write(CR, 0x301);
        uart.write(IMSC, 0x50);
        uart
    }

    fn type_in(uart: &mut Vuart, bytes: &[u8]) -> usize {
        bytes.iter().take_while(|byte| uart.receive(**byte)).count()
    }

    #[test]
    fn output_is_handed_over_by_the_line() {
        let (mut uart, mut taker) = (Vuart::default(), Taker::default());
        send(&mut uart, b"hello\r");
        assert!(!uart.is_waiting());
        send(&mut uart, b"\n");
        assert!(uart.is_waiting());
        hand_over(&mut uart, &mut taker, 9);
        assert_eq!((taker.lines, taker.more), (["hello".to_owned()].into(), 8));
        assert!(!uart.is_waiting());
    }

    #[test]
    fn a_line_that_nobody_takes_makes_the_guest_wait_and_nothing_is_lost() {
        let (mut uart, mut taker) = (started(), Taker::default());
        send(&mut uart, b"first\nsecond\nthe third\n");
        assert_eq!(uart.read(FR), 0x38, "full and busy");
        assert_eq!(uart.take_overruns(), 1, "17 bytes are more than fit");
        for line in ["first", "second", "the third"] {
            hand_over(&mut uart, &mut taker, 0);
            assert_ne!(taker.lines.last().map(String::as_str), Some(line));
            hand_over(&mut uart, &mut taker, 1);
            if line == "the third" {
                send(&mut uart, b"\n");
                hand_over(&mut uart, &mut taker, 1);
            }
            assert_eq!(taker.lines.last().map(String::as_str), Some(line));
        }
        assert_eq!((uart.read(FR), uart.take_overruns()), (0x90, 0));
    }

    #[test]
    fn a_line_without_end_is_cut_and_control_characters_do_not_reach_the_log() {
        let (mut uart, mut taker) = (Vuart::default(), Taker::default());
        for _ in 0..1000 {
            send(&mut uart, b"\x1b");
            hand_over(&mut uart, &mut taker, 1);
        }
        assert_eq!(taker.lines.len(), 4);
        assert!(taker.lines.iter().all(|line| *line == ".".repeat(240)));
    }

    #[test]
    fn the_last_line_needs_no_end() {
        let (mut uart, mut taker) = (started(), Taker::default());
        send(&mut uart, b"one\ntwo");
        uart.end_line();
        hand_over(&mut uart, &mut taker, 9);
        assert_eq!(taker.lines, ["one"]);
        uart.end_line();
        hand_over(&mut uart, &mut taker, 9);
        assert_eq!(taker.lines, ["one", "two"]);
        uart.end_line();
        assert!(!uart.is_waiting(), "there is no line after it");
    }

    #[test]
    fn bytes_go_out_as_they_are_and_in_order_where_that_is_wanted() {
        let (mut uart, mut taker) = (stuck(&[]), Taker::default());
        for first in (0..=255_u8).step_by(16) {
            let bytes: Vec<u8> = (first..=first + 15).collect();
            send(&mut uart, &bytes);
            for more in [3, 0, 12, 1] {
                hand_over(&mut uart, &mut taker, more);
            }
        }
        assert_eq!(taker.bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((uart.take_overruns(), uart.read(FR)), (0, 0x90));
    }

    #[test]
    fn a_full_queue_says_so_and_loses_what_is_written_nevertheless() {
        for (queue, line_control) in [(1, 0x60), (16, 0x70)] {
            let (mut uart, mut taker) = (stuck(&[]), Taker::default());
            uart.write(LCR_H, line_control);
            for byte in 1..=queue {
                assert_eq!(uart.read(FR) & 0x20, 0, "byte {byte} has room");
                uart.write(DR, byte);
            }
            assert_eq!(uart.read(FR), 0x38);
            send(&mut uart, &[98, 99]);
            assert_eq!((uart.take_overruns(), uart.take_overruns()), (2, 0));
            hand_over(&mut uart, &mut taker, 1);
            let empty = if queue == 1 { 0x90 } else { 0x18 };
            assert_eq!(uart.read(FR), empty);
            hand_over(&mut uart, &mut taker, 99);
            assert_eq!(uart.read(FR), 0x90);
            assert!((1..=queue).eq(taker.bytes.iter().map(|byte| u32::from(*byte))));
        }
    }

    #[test]
    fn the_transmit_interrupt_comes_when_the_level_is_reached() {
        for (levels, trigger) in [(0, 2), (1, 4), (2, 8), (3, 12), (4, 14)] {
            let (mut uart, mut taker) = (stuck(&[7; 16]), Taker::default());
            uart.write(IFLS, levels);
            for left in (0..16).rev() {
                assert!(!uart.interrupts(), "level {levels}, before {left} are left");
                hand_over(&mut uart, &mut taker, 1);
                assert_eq!(
                    uart.interrupts(),
                    left <= trigger,
                    "level {levels}, {left} left"
                );
                uart.write(ICR, 0x20);
            }
        }
    }

    #[test]
    fn writing_above_the_level_takes_the_transmit_interrupt_back() {
        let (mut uart, mut taker) = (stuck(&[7; 9]), Taker::default());
        hand_over(&mut uart, &mut taker, 1);
        assert!(uart.interrupts(), "8 are left");
        send(&mut uart, &[7]);
        assert!(!uart.interrupts(), "9 are");
        let (mut uart, mut taker) = (stuck(&[]), Taker::default());
        uart.write(LCR_H, 0x60);
        send(&mut uart, &[7]);
        hand_over(&mut uart, &mut taker, 1);
        assert!(uart.interrupts(), "the place is free");
        send(&mut uart, &[7]);
        assert!(!uart.interrupts(), "it is not");
    }

    #[test]
    fn it_identifies_itself_and_is_ready() {
        let mut uart = Vuart::default();
        let id: Vec<u32> = (0..8).map(|index| uart.read(0xfe0 + 4 * index)).collect();
        assert_eq!(id, [0x11, 0x10, 0x14, 0, 0x0d, 0xf0, 0x05, 0xb1]);
        assert_eq!(uart.read(FR), 0x90);
    }

    #[test]
    fn what_is_typed_is_read_in_order_and_waits_while_there_is_no_room() {
        let mut uart = started();
        let typed: Vec<u8> = (1..=20).collect();
        assert_eq!(type_in(&mut uart, &typed), 16);
        assert_eq!(uart.read(FR), 0xc0, "full");
        let read: Vec<u32> = (0..16).map(|_| uart.read(DR)).collect();
        assert_eq!(read, (1..=16).collect::<Vec<u32>>());
        assert_eq!((uart.read(FR), uart.read(DR)), (0x90, 0));
        assert_eq!(type_in(&mut uart, &typed[16..]), 4);
    }

    #[test]
    fn a_receiver_that_is_off_takes_nothing() {
        let mut uart = Vuart::default();
        assert!(!uart.receive(b'x'), "UARTEN is off out of reset");
        uart.write(CR, 0x101);
        assert!(!uart.receive(b'x'), "RXE is off");
        uart.write(CR, 0x201);
        assert!(
            uart.receive(b'x') && !uart.receive(b'y'),
            "one without queue"
        );
    }

    #[test]
    fn input_interrupts_until_it_is_read() {
        let mut uart = started();
        assert!(!uart.interrupts());
        assert!(uart.receive(b'x'));
        assert!(uart.interrupts());
        assert_eq!(uart.read(MIS), 0x40, "the time-out, below the trigger");
        uart.write(ICR, 0x7ff);
        assert!(uart.interrupts(), "what asks for it is still there");
        assert_eq!(type_in(&mut uart, &[0; 7]), 7);
        assert_eq!(uart.read(MIS), 0x50, "half full");
        uart.write(IFLS, 4 << 3);
        assert_eq!(uart.read(MIS), 0x40, "not 7/8 full");
        let read: Vec<u32> = (0..8).map(|_| uart.read(DR)).collect();
        assert_eq!(read, [0x78, 0, 0, 0, 0, 0, 0, 0]);
        assert!(!uart.interrupts());
    }

    #[test]
    fn a_byte_sent_interrupts_until_that_is_acknowledged() {
        let mut uart = started();
        uart.write(IMSC, 0x20);
        assert!(!uart.interrupts(), "nothing was sent yet");
        uart.write(DR, 0x41);
        assert!(uart.interrupts());
        uart.write(ICR, 0x10);
        assert!(uart.interrupts());
        uart.write(ICR, 0x20);
        assert_eq!((uart.interrupts(), uart.read(RIS)), (false, 0));
    }

    #[test]
    fn turning_the_queue_off_empties_the_receivers() {
        let mut uart = started();
        assert_eq!(type_in(&mut uart, &[1; 9]), 9);
        uart.write(LCR_H, 0x60);
        assert_eq!((uart.read(FR), uart.interrupts()), (0x90, false));
    }

    #[test]
    fn every_offset_can_be_accessed() {
        let mut uart = Vuart::default();
        for value in [u32::MAX, 0, 0x5555_5555] {
            for offset in 0..BYTES {
                uart.write(offset, value);
                uart.read(offset);
                let _taken: bool = uart.receive(1);
                assert!(uart.received.len() <= 16 && uart.sending.len() <= 16);
            }
        }
    }
}
