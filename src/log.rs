//! The console: log lines for people and JSON lines for programs, whole lines at a time.
//!
//! A line holds the console's lock while it is sent, so lines of several CPUs never mix. Nothing on a hot path writes
//! here (see [`crate::trace`]).
//!
//! The console can be [shared](share) with a guest, whose bytes then go out as they are. From there on every line of the
//! hypervisor's own begins with the byte [`RECORD`], which is kept back from what the guest sends: whatever a guest prints,
//! nobody takes it for a line of ours. (RFC 7464 marks JSON records in a stream of text by the same byte.)

use core::fmt::{self, Write};

use log::{LevelFilter, Log, Metadata, Record};
use spin::Mutex;

use crate::arch;
use crate::dev::serial::Serial;
use crate::sync::padded::Padded;
use crate::sync::percpu;

/// Begins a line of the hypervisor's on a console that a guest shares: the ASCII record separator.
pub const RECORD: u8 = 0x1e;

static CONSOLE: Padded<Mutex<Port>> = Padded::new(Mutex::new(Port {
    uart: None,
    shared: false,
    mid_line: false,
}));

/// The UART and what was last sent to it.
struct Port {
    uart: Option<Serial>,
    /// A guest writes to it, too.
    shared: bool,
    /// The guest's last byte did not end a line.
    mid_line: bool,
}

struct Console;

/// Sends all output to `uart` from here on.
pub fn start(uart: Serial) {
    CONSOLE.lock().uart = Some(uart);
    let level = if cfg!(debug_assertions) {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    };
    if log::set_logger(&Console).is_ok() {
        log::set_max_level(level);
    }
}

/// Sends one line as it is; JSON lines go this way.
pub fn line(text: fmt::Arguments<'_>) {
    send(&mut CONSOLE.lock(), text);
}

/// As [`line()`], for an epitaph: breaks the lock of a CPU that will not release it any more.
pub fn last_line(text: fmt::Arguments<'_>) {
    const PATIENCE: u32 = 1 << 24;
    for _ in 0..PATIENCE {
        if let Some(mut console) = CONSOLE.try_lock() {
            return send(&mut console, text);
        }
        arch::yield_now();
    }
    // SAFETY: the machine is being switched off; a line of the lock's holder may be garbled, nothing else.
    unsafe { CONSOLE.force_unlock() };
    send(&mut CONSOLE.lock(), text);
}

/// Shares the console with a guest from here on: lines are marked by [`RECORD`], beginning with one that says so.
pub fn share() {
    let mut port = CONSOLE.lock();
    port.shared = true;
    send(
        &mut port,
        format_args!(
            "the console is the guest's; lines of the hypervisor begin with byte {RECORD:#x}"
        ),
    );
}

/// Sends a byte of the guest's that shares the console.
pub fn guest_byte(byte: u8) {
    let mut port = CONSOLE.lock();
    if let Some(uart) = &port.uart
        && byte != RECORD
    {
        uart.send_raw(byte);
        port.mid_line = byte != b'\n';
    }
}

/// The next byte that somebody typed.
pub fn typed() -> Option<u8> {
    CONSOLE.lock().uart.as_ref()?.receive()
}

/// Has typed bytes interrupt the CPU that the UART's interrupt goes to, or not.
pub fn listen(on: bool) {
    if let Some(uart) = &CONSOLE.lock().uart {
        uart.listen(on);
    }
}

/// Waits until everything has left the machine.
pub fn flush() {
    if let Some(console) = CONSOLE.try_lock()
        && let Some(uart) = console.uart.as_ref()
    {
        uart.flush();
    }
}

fn send(port: &mut Port, text: fmt::Arguments<'_>) {
    let Some(uart) = &mut port.uart else {
        return;
    };
    let fresh_line = if port.mid_line { "\n" } else { "" };
    let mark = if port.shared { "\u{1e}" } else { "" };
    port.mid_line = false;
    if uart
        .write_fmt(format_args!("{fresh_line}{mark}{text}\n"))
        .is_err()
    {
        // A value's own formatter failed; the rest of the line is lost and there is nobody to tell.
    }
}

/// A value's text as the inside of a JSON string.
#[derive(Debug)]
pub struct Escaped<T>(pub T);

impl<T: fmt::Display> fmt::Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escape(f), "{}", self.0)
    }
}

struct Escape<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Escape<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|it| match it {
            '"' | '\\' => write!(self.0, "\\{it}"),
            control if control < ' ' => write!(self.0, "\\u{:04x}", u32::from(control)),
            other => self.0.write_char(other),
        })
    }
}

/// Seconds since the counter started, to print.
struct Uptime;

impl fmt::Display for Uptime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ticks, hz) = (arch::counter(), arch::counter_hz().max(1));
        let micros = u128::from(ticks % hz) * 1_000_000 / u128::from(hz);
        write!(f, "{:3}.{micros:06}", ticks / hz)
    }
}

impl Log for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let module = record.target();
        let module = module.split_once("::").map_or(module, |(_, inner)| inner);
        let (cpu, level) = (percpu::index(), record.level());
        line(format_args!(
            "[{Uptime} cpu{cpu} {level:5} {module}] {}",
            record.args()
        ));
    }

    fn flush(&self) {
        flush();
    }
}

#[cfg(test)]
mod tests {
    use super::{Escaped, RECORD};

    #[test]
    fn the_mark_of_a_line_is_the_byte_that_guests_cannot_send() {
        assert_eq!("\u{1e}".as_bytes(), [RECORD]);
    }

    #[test]
    fn whatever_a_user_typed_stays_one_json_string() {
        let typed = std::format!("{}", Escaped(format_args!("suite={}", "a\"b\\c\nd")));
        assert_eq!(typed, r#"suite=a\"b\\c\u000ad"#);
    }
}
