//! The console's UART, of whichever kind.

use super::machine::{Uart, UartKind};
use super::mini_uart::MiniUart;
use super::pl011::Pl011;
use super::wire::Transmitter;

/// A UART that is driven.
#[derive(Debug)]
pub enum Serial {
    /// A PL011, or its SBSA subset.
    Pl011(Pl011),
    /// A BCM2711's second one.
    Mini(MiniUart),
}

impl Serial {
    /// Takes `uart`; nothing where firmware has not set up one that only firmware can.
    ///
    /// # Safety
    ///
    /// It is there, mapped as device memory for ever, and nobody else drives it.
    pub unsafe fn new(uart: Uart) -> Option<Self> {
        let full = uart.kind == UartKind::Pl011;
        match uart.kind {
            UartKind::Pl011 | UartKind::Sbsa => {
                // SAFETY: as the caller vouches.
                let driven = unsafe { Pl011::new(uart.base, full) };
                Some(Self::Pl011(driven))
            }
            UartKind::Mini => {
                // SAFETY: as the caller vouches; what shares the UART's page is driven by nobody.
                let driven = unsafe { MiniUart::new(uart.base) };
                driven.map(Self::Mini)
            }
        }
    }

    /// The next byte that was received.
    pub fn receive(&self) -> Option<u8> {
        match self {
            Self::Pl011(uart) => uart.receive(),
            Self::Mini(uart) => uart.receive(),
        }
    }

    /// Has received bytes interrupt, or not.
    pub fn listen(&self, on: bool) {
        match self {
            Self::Pl011(uart) => uart.listen(on),
            Self::Mini(uart) => uart.listen(on),
        }
    }

    /// Waits until everything has left the UART.
    pub fn flush(&self) {
        match self {
            Self::Pl011(uart) => uart.flush(),
            Self::Mini(uart) => uart.flush(),
        }
    }
}

impl Transmitter for Serial {
    fn try_send(&self, byte: u8) -> bool {
        match self {
            Self::Pl011(uart) => uart.try_send(byte),
            Self::Mini(uart) => uart.try_send(byte),
        }
    }
}
