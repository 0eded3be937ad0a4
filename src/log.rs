//! The console: log lines for people and JSON lines for programs, whole lines at a time.
//!
//! A line of the hypervisor's holds the console's lock until it is sent, at the speed of the wire, so lines of several CPUs never
//! mix. Only controllers, CPUs that start and epitaphs write such lines. A CPU that runs guests never waits for that lock: it
//! tries it ([`try_with`]), moves a few bytes into the [`wire`](crate::dev::wire)'s queue or to the UART, and leaves the rest to whoever is
//! next. Nothing on a hot path writes here (see [`crate::trace`]).
//!
//! The console can be [shared](share) with a guest, whose bytes then go out as they are. From there on every line of the
//! hypervisor's own begins with the byte [`RECORD`], which is kept back from what the guest sends: whatever a guest prints,
//! nobody takes it for a line of ours. (RFC 7464 marks JSON records in a stream of text by the same byte.)

use core::fmt::{self, Write};

use log::{LevelFilter, Log, Metadata, Record};
use spin::{Mutex, MutexGuard};

use crate::arch;
use crate::dev::serial::Serial;
pub use crate::dev::wire::RECORD;
use crate::dev::wire::{Pace, Wire};
use crate::sync::padded::Padded;
use crate::sync::percpu;

/// Longer than a full queue takes at 9600 baud.
const PATIENCE_S: u64 = 5;

static CONSOLE: Padded<Mutex<Wire<Serial>>> = Padded::new(Mutex::new(Wire::new()));

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
    CONSOLE.lock().line(text);
}

/// As [`line()`], for an epitaph: breaks the lock of a CPU that will not release it any more.
pub fn last_line(text: fmt::Arguments<'_>) {
    take().line(text);
}

/// The console, from whoever has it: everybody gives it back within [`PATIENCE_S`], but for a CPU that failed with it.
fn take() -> MutexGuard<'static, Wire<Serial>> {
    let deadline = arch::counter() + PATIENCE_S * arch::counter_hz();
    loop {
        if let Some(wire) = CONSOLE.try_lock() {
            return wire;
        }
        if arch::counter() > deadline {
            break;
        }
        arch::yield_now();
    }
    // SAFETY: the machine is being switched off; a line of the lock's holder may be garbled, nothing else.
    unsafe { CONSOLE.force_unlock() };
    CONSOLE.lock()
}

/// Shares the console with a guest from here on: lines are marked by [`RECORD`], beginning with one that says so.
pub fn share() {
    let mut wire = CONSOLE.lock();
    wire.share();
    wire.line(format_args!(
        "the console is the guest's; lines of the hypervisor begin with byte {RECORD:#x}"
    ));
}

/// Makes the console as slow as a UART of `baud`.
pub fn slow_down(baud: u64) {
    CONSOLE.lock().pace = Some(Pace::new(baud, arch::counter_hz()));
}

/// Does something short with the wire, if nobody else has it now.
pub fn try_with<R>(work: impl FnOnce(&mut Wire<Serial>) -> R) -> Option<R> {
    CONSOLE.try_lock().map(|mut wire| work(&mut wire))
}

/// Does something short with the wire. For controllers: whoever has it may be waiting for it.
pub fn with<R>(work: impl FnOnce(&mut Wire<Serial>) -> R) -> R {
    work(&mut CONSOLE.lock())
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

/// Waits until everything has left the machine, which is about to be switched off.
pub fn flush() {
    let mut wire = take();
    wire.drain();
    if let Some(uart) = &wire.uart {
        uart.flush();
    }
}

/// What a line of the log begins with.
#[derive(Debug)]
pub struct Head<'a> {
    /// Whose fault it is.
    pub level: log::Level,
    /// What it is about.
    pub module: &'a str,
}

impl fmt::Display for Head<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, module } = self;
        write!(f, "[{Uptime} cpu{} {level:5} {module}]", percpu::index())
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
        let level = record.level();
        line(format_args!("{} {}", Head { level, module }, record.args()));
    }

    fn flush(&self) {
        flush();
    }
}

#[cfg(test)]
mod tests {
    use super::Escaped;

    #[test]
    fn whatever_a_user_typed_stays_one_json_string() {
        let typed = std::format!("{}", Escaped(format_args!("suite={}", "a\"b\\c\nd")));
        assert_eq!(typed, r#"suite=a\"b\\c\u000ad"#);
    }
}
