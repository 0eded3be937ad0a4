//! The virtual PL011 (Arm DDI 0183G): a transmitter that is always ready and a receiver with its queue.
//!
//! What a guest sends goes to the log a line at a time, or byte by byte to whoever is given it. What is received waits
//! outside while the queue is full or the receiver is off, so nothing typed is lost. There is no baud rate: a byte is sent at
//! once, and the receive time-out has always passed.

use alloc::collections::VecDeque;
use alloc::string::String;

/// Bytes of its register frame.
pub const BYTES: u64 = 0x1000;
/// Its interrupt: the second shared one, level-triggered.
pub const INTID: u16 = 33;
/// Longest line kept back for its end.
const LONGEST_LINE: usize = 240;
/// Bytes that wait to be read, with and without the queue.
const QUEUE_BYTES: usize = 16;
const HOLDING_BYTES: usize = 1;

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

/// FR.TXFE: nothing waits to be sent.
const TRANSMIT_EMPTY: u32 = 1 << 7;
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

/// Where the bytes go that a guest sends.
#[derive(Clone, Copy, Debug)]
pub enum Output {
    /// To the log, a line at a time, with what is not printable replaced.
    Lines,
    /// To this, as they are.
    Bytes(fn(u8)),
}

/// The state of one.
#[derive(Debug)]
pub struct Vuart {
    output: Output,
    line: String,
    received: VecDeque<u8>,
    control: u32,
    line_control: u32,
    divisors: [u32; 2],
    levels: u32,
    mask: u32,
    /// The transmit interrupt's raw state; those of the receiver follow from its queue.
    sent: bool,
}

impl Default for Vuart {
    fn default() -> Self {
        Self {
            output: Output::Lines,
            line: String::new(),
            received: VecDeque::new(),
            control: 0x300,
            line_control: 0,
            divisors: [0; 2],
            levels: 0x12,
            mask: 0,
            sent: false,
        }
    }
}

impl Vuart {
    /// Sends everything to `output` from here on.
    pub fn set_output(&mut self, output: Output) {
        self.output = output;
    }

    /// Reads the register at `offset`.
    pub fn read(&mut self, offset: u64) -> u32 {
        match offset & !3 {
            DR => self.received.pop_front().map_or(0, u32::from),
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

    /// Writes the register at `offset`. A line that this completes is returned.
    pub fn write(&mut self, offset: u64, value: u32) -> Option<String> {
        match offset & !3 {
            DR => return self.send(value),
            IBRD => self.divisors[0] = value & 0xffff,
            FBRD => self.divisors[1] = value & 0x3f,
            LCR_H => self.set_line_control(value & 0xff),
            CR => self.control = value & 0xffff,
            IFLS => self.levels = value & 0x3f,
            IMSC => self.mask = value & 0x7ff,
            ICR => self.sent &= value & TRANSMIT_INTERRUPT == 0,
            _ => {}
        }
        None
    }

    /// Takes `byte` in. False: the queue is full or the receiver off, so it has to wait.
    #[must_use]
    pub fn receive(&mut self, byte: u8) -> bool {
        let room = self.has_room();
        if room {
            self.received.push_back(byte);
        }
        room
    }

    /// Whether [`Vuart::receive`] would take a byte in.
    pub fn has_room(&self) -> bool {
        self.control & RECEIVING == RECEIVING && self.received.len() < self.capacity()
    }

    /// Whether it asks for an interrupt.
    pub fn interrupts(&self) -> bool {
        self.raw() & self.mask != 0
    }

    /// What was sent since the last line's end.
    pub fn flush(&mut self) -> Option<String> {
        (!self.line.is_empty()).then(|| core::mem::take(&mut self.line))
    }

    fn capacity(&self) -> usize {
        if self.line_control & QUEUE_ENABLED != 0 {
            QUEUE_BYTES
        } else {
            HOLDING_BYTES
        }
    }

    /// Bytes from which on there is enough input for an interrupt: eighths of the queue.
    fn trigger(&self) -> usize {
        let eighths = match self.levels >> 3 {
            0 => 1,
            1 => 2,
            3 => 6,
            4 => 7,
            _ => 4,
        };
        (self.capacity() * eighths / 8).max(1)
    }

    fn flags(&self) -> u32 {
        let waiting = self.received.len();
        TRANSMIT_EMPTY
            | if waiting == 0 { RECEIVE_EMPTY } else { 0 }
            | if waiting >= self.capacity() {
                RECEIVE_FULL
            } else {
                0
            }
    }

    fn raw(&self) -> u32 {
        let waiting = self.received.len();
        let bit = |interrupt, when| if when { interrupt } else { 0 };
        bit(TRANSMIT_INTERRUPT, self.sent)
            | bit(RECEIVE_INTERRUPT, waiting >= self.trigger())
            | bit(TIMEOUT_INTERRUPT, waiting > 0)
    }

    /// Turning the queue on or off empties it.
    fn set_line_control(&mut self, value: u32) {
        if (self.line_control ^ value) & QUEUE_ENABLED != 0 {
            self.received.clear();
        }
        self.line_control = value;
    }

    fn send(&mut self, value: u32) -> Option<String> {
        self.sent = true;
        let [byte, ..] = value.to_le_bytes();
        match self.output {
            Output::Lines => self.add(byte),
            Output::Bytes(to) => {
                to(byte);
                None
            }
        }
    }

    fn add(&mut self, byte: u8) -> Option<String> {
        match byte {
            b'\n' => return Some(core::mem::take(&mut self.line)),
            b'\r' => {}
            b' '..=b'~' | b'\t' => self.line.push(char::from(byte)),
            _ => self.line.push('.'),
        }
        if self.line.len() >= LONGEST_LINE {
            self.flush()
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicU32, Ordering};

    use super::{BYTES, CR, DR, FR, ICR, IFLS, IMSC, LCR_H, MIS, Output, RIS, Vuart};

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
        let mut uart = Vuart::default();
        for byte in b"hello\r" {
            assert_eq!(uart.write(DR, u32::from(*byte)), None);
        }
        assert_eq!(uart.write(DR, 0x0a).as_deref(), Some("hello"));
        assert_eq!(uart.flush(), None);
    }

    #[test]
    fn a_line_without_end_is_cut_and_control_characters_do_not_reach_the_log() {
        let mut uart = Vuart::default();
        let lines: usize = (0..1000).filter(|_| uart.write(DR, 0x1b).is_some()).count();
        assert_eq!(lines, 4);
        assert!(uart.flush().unwrap().bytes().all(|byte| byte == b'.'));
    }

    #[test]
    fn bytes_go_out_as_they_are_where_that_is_wanted() {
        static SUM: AtomicU32 = AtomicU32::new(0);
        fn add(byte: u8) {
            SUM.fetch_add(u32::from(byte), Ordering::Relaxed);
        }
        let mut uart = Vuart::default();
        uart.set_output(Output::Bytes(add));
        for byte in 0..=255 {
            assert_eq!(uart.write(DR, byte), None);
        }
        assert_eq!(SUM.load(Ordering::Relaxed), 255 * 128);
        assert_eq!(uart.flush(), None);
    }

    #[test]
    fn it_identifies_itself_and_is_always_ready() {
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
    fn turning_the_queue_off_empties_it() {
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
                assert!(uart.received.len() <= 16);
            }
        }
    }
}
