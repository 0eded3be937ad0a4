//! The PL011 UART (Arm DDI 0183G), transmit side, as firmware left it configured.
//!
//! Only what the SBSA subset has too is used, so `arm,sbsa-uart` works as well. Baud rate and format are firmware's.

use core::fmt;

use crate::addr::{Pa, to_usize};

const DATA: usize = 0x00;
const FLAGS: usize = 0x18;
const CONTROL: usize = 0x30;
const INTERRUPT_MASK: usize = 0x38;
/// FR.TXFF: the transmit queue is full.
const TRANSMIT_FULL: u32 = 1 << 5;
/// FR.BUSY: something is still being sent.
const BUSY: u32 = 1 << 3;
/// CR.UARTEN, CR.TXE, CR.RXE.
const ENABLED: u32 = 1 << 0 | 1 << 8 | 1 << 9;

/// One UART.
#[derive(Debug)]
pub struct Pl011 {
    base: Pa,
}

impl Pl011 {
    /// Takes the UART at `base`, with its interrupts masked.
    ///
    /// # Safety
    ///
    /// A PL011 (or SBSA UART) that nobody else drives is mapped at `base` as device memory for ever. `full`: it is a
    /// PL011, which has a control register.
    pub unsafe fn new(base: Pa, full: bool) -> Self {
        let mut uart = Self { base };
        uart.write(INTERRUPT_MASK, 0);
        if full {
            uart.write(CONTROL, ENABLED);
        }
        uart
    }

    fn register(&self, offset: usize) -> *mut u32 {
        core::ptr::with_exposed_provenance_mut::<u32>(to_usize(self.base.raw()) + offset)
    }

    fn read(&self, offset: usize) -> u32 {
        // SAFETY: `new`'s caller vouched for the device; the offsets above are registers.
        unsafe { self.register(offset).read_volatile() }
    }

    fn write(&mut self, offset: usize, value: u32) {
        // SAFETY: as in `read`.
        unsafe { self.register(offset).write_volatile(value) };
    }

    fn send(&mut self, byte: u8) {
        while self.read(FLAGS) & TRANSMIT_FULL != 0 {}
        self.write(DATA, byte.into());
    }

    /// Waits until everything has left the UART.
    pub fn flush(&mut self) {
        while self.read(FLAGS) & BUSY != 0 {}
    }
}

impl fmt::Write for Pl011 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.send(b'\r');
            }
            self.send(byte);
        }
        Ok(())
    }
}
