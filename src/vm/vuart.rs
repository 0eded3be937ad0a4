//! The virtual PL011 (Arm DDI 0183G): a transmitter whose lines go to the log, and a receiver that never has anything.

use alloc::string::String;

/// Bytes of its register frame.
pub const BYTES: u64 = 0x1000;
/// Longest line kept back for its end.
const LONGEST_LINE: usize = 240;

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

/// FR: transmitter empty, receiver empty.
const FR_EMPTY: u32 = 1 << 7 | 1 << 4;
/// RIS and MIS: there is room for output.
const TX_INTERRUPT: u32 = 1 << 5;
/// UARTPeriphID0..3 and UARTPCellID0..3 of a PL011 r1p4.
const IDENTIFICATION: [u8; 8] = [0x11, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// The state of one.
#[derive(Debug)]
pub struct Vuart {
    line: String,
    control: u32,
    line_control: u32,
    divisors: [u32; 2],
    levels: u32,
    mask: u32,
    raw: u32,
}

impl Default for Vuart {
    fn default() -> Self {
        Self {
            line: String::new(),
            control: 0x300,
            line_control: 0,
            divisors: [0; 2],
            levels: 0x12,
            mask: 0,
            raw: 0,
        }
    }
}

impl Vuart {
    /// Reads the register at `offset`.
    pub fn read(&self, offset: u64) -> u32 {
        match offset & !3 {
            FR => FR_EMPTY,
            IBRD => self.divisors[0],
            FBRD => self.divisors[1],
            LCR_H => self.line_control,
            CR => self.control,
            IFLS => self.levels,
            IMSC => self.mask,
            RIS => self.raw,
            MIS => self.raw & self.mask,
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
            LCR_H => self.line_control = value & 0xff,
            CR => self.control = value & 0xffff,
            IFLS => self.levels = value & 0x3f,
            IMSC => self.mask = value & 0x7ff,
            ICR => self.raw &= !value,
            _ => {}
        }
        None
    }

    /// What was sent since the last line's end.
    pub fn flush(&mut self) -> Option<String> {
        (!self.line.is_empty()).then(|| core::mem::take(&mut self.line))
    }

    fn send(&mut self, value: u32) -> Option<String> {
        self.raw |= TX_INTERRUPT;
        let [byte, ..] = value.to_le_bytes();
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
    use super::{BYTES, DR, FR, Vuart};

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
    fn it_identifies_itself_and_is_always_ready() {
        let uart = Vuart::default();
        let id: Vec<u32> = (0..8).map(|index| uart.read(0xfe0 + 4 * index)).collect();
        assert_eq!(id, [0x11, 0x10, 0x14, 0, 0x0d, 0xf0, 0x05, 0xb1]);
        assert_eq!(uart.read(FR), 0x90);
    }

    #[test]
    fn every_offset_can_be_accessed() {
        let mut uart = Vuart::default();
        for offset in 0..BYTES {
            uart.write(offset, u32::MAX);
            uart.read(offset);
        }
    }
}
