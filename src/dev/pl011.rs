//! The PL011 UART (Arm DDI 0183G), as firmware left it configured.
//!
//! Only what the SBSA subset has too is used, so `arm,sbsa-uart` works as well. Baud rate and format are firmware's.

use super::mmio::Registers;
use crate::addr::Pa;

const DATA: usize = 0x00;
const FLAGS: usize = 0x18;
const CONTROL: usize = 0x30;
const INTERRUPT_MASK: usize = 0x38;
/// FR.TXFF: the transmit queue is full.
const TRANSMIT_FULL: u32 = 1 << 5;
/// FR.RXFE: nothing was received.
const RECEIVE_EMPTY: u32 = 1 << 4;
/// FR.BUSY: something is still being sent.
const BUSY: u32 = 1 << 3;
/// IMSC: something was received, be it long ago.
const RECEIVE_INTERRUPTS: u32 = 1 << 4 | 1 << 6;
/// CR.UARTEN, CR.TXE, CR.RXE.
const ENABLED: u32 = 1 << 0 | 1 << 8 | 1 << 9;

/// One UART.
#[derive(Debug)]
pub struct Pl011 {
    registers: Registers,
}

impl Pl011 {
    /// Takes the UART at `base`, with its interrupts masked.
    ///
    /// # Safety
    ///
    /// A PL011 (or SBSA UART) that nobody else drives is mapped at `base` as device memory for ever. `full`: it is a
    /// PL011, which has a control register.
    pub unsafe fn new(base: Pa, full: bool) -> Self {
        // SAFETY: the caller vouches for the device; the offsets above are registers.
        let registers = unsafe { Registers::new(base) };
        registers.write(INTERRUPT_MASK, 0);
        // What firmware uses is left as it is.
        if full && registers.read(CONTROL) & ENABLED != ENABLED {
            registers.write(CONTROL, ENABLED);
        }
        Self { registers }
    }

    /// Sends `byte` as it is, if the queue takes it at once. False: it is full.
    #[must_use]
    pub fn try_send(&self, byte: u8) -> bool {
        let room = self.registers.read(FLAGS) & TRANSMIT_FULL == 0;
        if room {
            self.registers.write(DATA, byte.into());
        }
        room
    }

    /// The next byte that was received.
    pub fn receive(&self) -> Option<u8> {
        let empty = self.registers.read(FLAGS) & RECEIVE_EMPTY != 0;
        let [byte, ..] = (!empty).then(|| self.registers.read(DATA))?.to_le_bytes();
        Some(byte)
    }

    /// Has received bytes interrupt, or not.
    pub fn listen(&self, on: bool) {
        let interrupts = if on { RECEIVE_INTERRUPTS } else { 0 };
        self.registers.write(INTERRUPT_MASK, interrupts);
    }

    /// Waits until everything has left the UART.
    pub fn flush(&self) {
        while self.registers.read(FLAGS) & BUSY != 0 {}
    }
}
