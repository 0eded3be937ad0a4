//! A VM's console: its UART, the UART's interrupt, and who is told what.

use crate::vm::vm::Vm;
use crate::vm::vuart::{INTID, Output, Vuart};

impl Vm {
    /// Sends what the guest sends to `output` from here on.
    pub fn set_output(&self, output: Output) {
        self.uart.lock().set_output(output);
    }

    /// Gives the guest a byte that was typed. False: it has no room; the controller is kicked when it has.
    #[must_use]
    pub fn receive(&self, byte: u8) -> bool {
        self.with_uart(|uart| uart.receive(byte))
    }

    pub(crate) fn read_uart(&self, offset: u64) -> u32 {
        self.with_uart(|uart| uart.read(offset))
    }

    pub(crate) fn write_uart(&self, offset: u64, value: u32) {
        let line = self.with_uart(|uart| uart.write(offset, value));
        if let Some(line) = line {
            log::info!(target: "vellum::guest", "{line}");
        }
    }

    /// Logs the line that the guest has not ended yet.
    pub(crate) fn flush_uart(&self) {
        let line = self.uart.lock().flush();
        if let Some(line) = line {
            log::info!(target: "vellum::guest", "{line}");
        }
    }

    /// Does something with the UART. Its interrupt's line follows under the same lock, so that of two changes the later one
    /// holds.
    fn with_uart<R>(&self, work: impl FnOnce(&mut Vuart) -> R) -> R {
        let mut uart = self.uart.lock();
        let (had_room, asserted) = (uart.has_room(), uart.interrupts());
        let result = work(&mut uart);
        let (has_room, asserts) = (uart.has_room(), uart.interrupts());
        if asserts != asserted {
            self.set_line(INTID, asserts);
        }
        drop(uart);
        if has_room && !had_room {
            self.kick_controller();
        }
        result
    }
}
