//! The mini-UART of a BCM2711 (BCM2711 ARM peripherals, chapter 2), as firmware left it configured.
//!
//! In shape an 8250 without its clock: baud rate and format are firmware's, for the clock depends on what firmware made of
//! the GPU's. It shares its page with two SPI masters and a register that says which of the three are on; registers of
//! one that is off must not be touched.

use super::mmio::Registers;
use crate::addr::Pa;

const DATA: usize = 0x00;
const INTERRUPT_ENABLE: usize = 0x04;
const LINE_STATUS: usize = 0x14;
/// Bytes of the page that all three share, and the register of those that are on, from its start.
const PAGE_BYTES: u64 = 0x1000;
const ENABLES: usize = 0x04;
/// AUX_ENABLES: the mini-UART is on.
const UART_ON: u32 = 1 << 0;
/// LSR: something was received.
const RECEIVED: u32 = 1 << 0;
/// LSR: the transmit queue takes a byte.
const ROOM: u32 = 1 << 5;
/// LSR: everything was sent.
const IDLE: u32 = 1 << 6;
/// IER: something was received; the second bit has to go with it.
const RECEIVE_INTERRUPTS: u32 = 1 << 0 | 1 << 2;

/// One mini-UART.
#[derive(Debug)]
pub struct MiniUart {
    registers: Registers,
}

impl MiniUart {
    /// Takes the mini-UART at `base`, with its interrupts masked; nothing where firmware has not turned it on.
    ///
    /// # Safety
    ///
    /// The page that `base` is in is the one of a BCM2711's mini-UART, mapped as device memory for ever, and nobody else
    /// drives what is in it.
    pub unsafe fn new(base: Pa) -> Option<Self> {
        // SAFETY: the caller vouches for the page.
        let page = unsafe { Registers::new(base.align_down(PAGE_BYTES)) };
        if page.read(ENABLES) & UART_ON == 0 {
            return None;
        }
        // SAFETY: as above; the offsets above are registers, which are there now.
        let registers = unsafe { Registers::new(base) };
        registers.write(INTERRUPT_ENABLE, 0);
        Some(Self { registers })
    }

    /// Sends `byte` as it is, if the queue takes it at once. False: it is full.
    #[must_use]
    pub fn try_send(&self, byte: u8) -> bool {
        let room = self.registers.read(LINE_STATUS) & ROOM != 0;
        if room {
            self.registers.write(DATA, byte.into());
        }
        room
    }

    /// The next byte that was received.
    pub fn receive(&self) -> Option<u8> {
        let received = self.registers.read(LINE_STATUS) & RECEIVED != 0;
        let [byte, ..] = received.then(|| self.registers.read(DATA))?.to_le_bytes();
        Some(byte)
    }

    /// Has received bytes interrupt, or not.
    pub fn listen(&self, on: bool) {
        let interrupts = if on { RECEIVE_INTERRUPTS } else { 0 };
        self.registers.write(INTERRUPT_ENABLE, interrupts);
    }

    /// Waits until everything has left the UART.
    pub fn flush(&self) {
        while self.registers.read(LINE_STATUS) & IDLE == 0 {}
    }
}

#[cfg(test)]
mod tests {
    use super::{MiniUart, Pa};
    use std::boxed::Box;
    use std::vec::Vec;

    /// The page, its mini-UART at the offset that a BCM2711 has it at.
    #[repr(align(4096))]
    struct Page([u32; 1024]);

    const UART: usize = 0x40;
    const LINE_STATUS: usize = UART + 0x14;

    /// A page that nobody frees, with words at offsets.
    fn page(words: &[(usize, u32)]) -> *mut u32 {
        let page = Box::leak(Box::new(Page([0; 1024]))).0.as_mut_ptr();
        page.expose_provenance();
        words.iter().for_each(|&(at, word)| write(page, at, word));
        page
    }

    fn write(page: *mut u32, at: usize, word: u32) {
        // SAFETY: offsets of these tests are inside the page.
        let place = unsafe { page.byte_add(at) };
        // SAFETY: it is aligned, and of a page that lives for ever.
        unsafe { place.write_volatile(word) };
    }

    fn read(page: *mut u32, at: usize) -> u32 {
        // SAFETY: offsets of these tests are inside the page.
        let place = unsafe { page.byte_add(at) };
        // SAFETY: it is aligned, and of a page that lives for ever.
        unsafe { place.read_volatile() }
    }

    fn uart(page: *mut u32) -> Option<MiniUart> {
        let base = Pa::new((page.addr() + UART) as u64);
        // SAFETY: the page lives for ever and is nobody else's.
        unsafe { MiniUart::new(base) }
    }

    #[test]
    fn one_that_firmware_left_off_is_not_touched() {
        let page = page(&[(UART + 4, 7)]);
        assert!(uart(page).is_none());
        assert_eq!(read(page, UART + 4), 7);
    }

    #[test]
    fn interrupts_are_masked_until_somebody_listens() {
        let page = page(&[(4, 1), (UART + 4, 0xf)]);
        let uart = uart(page).unwrap();
        assert_eq!(read(page, UART + 4), 0);
        uart.listen(true);
        assert_eq!(read(page, UART + 4), 0b101);
        uart.listen(false);
        assert_eq!(read(page, UART + 4), 0);
    }

    #[test]
    fn a_byte_is_sent_where_there_is_room_and_the_format_stays_firmwares() {
        let page = page(&[(4, 1), (LINE_STATUS, 0x60), (UART + 0xc, 3)]);
        let uart = uart(page).unwrap();
        assert!(uart.try_send(b'x'));
        uart.flush();
        assert_eq!(read(page, UART), u32::from(b'x'));
        write(page, LINE_STATUS, 0x40);
        assert!(!uart.try_send(b'y'), "the queue is full");
        assert_eq!(read(page, UART), u32::from(b'x'));
        let others: Vec<_> = (UART + 8..UART + 0x40)
            .step_by(4)
            .filter(|&at| at != LINE_STATUS)
            .map(|at| read(page, at))
            .collect();
        assert_eq!(others.iter().sum::<u32>(), 3, "only the format's register");
    }

    #[test]
    fn a_byte_is_received_when_there_is_one() {
        let page = page(&[(4, 1), (LINE_STATUS, 0x60), (UART, 0xee)]);
        let uart = uart(page).unwrap();
        assert_eq!(uart.receive(), None);
        write(page, LINE_STATUS, 0x61);
        assert_eq!(uart.receive(), Some(0xee));
    }
}
