//! The console: log lines for people and JSON lines for programs, whole lines at a time.
//!
//! A line holds the console's lock while it is sent, so lines of several CPUs never mix. Nothing on a hot path writes
//! here (see [`crate::trace`]).

use core::fmt::{self, Write};

use log::{LevelFilter, Log, Metadata, Record};
use spin::Mutex;

use crate::arch;
use crate::dev::pl011::Pl011;
use crate::sync::percpu;

static CONSOLE: Mutex<Option<Pl011>> = Mutex::new(None);

struct Console;

/// Sends all output to `uart` from here on.
pub fn start(uart: Pl011) {
    *CONSOLE.lock() = Some(uart);
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

/// Waits until everything has left the machine.
pub fn flush() {
    if let Some(console) = CONSOLE.try_lock()
        && let Some(uart) = console.as_ref()
    {
        uart.flush();
    }
}

fn send(console: &mut Option<Pl011>, text: fmt::Arguments<'_>) {
    if let Some(uart) = console
        && uart.write_fmt(format_args!("{text}\n")).is_err()
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
        let module = record.module_path().unwrap_or_default();
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
    use super::Escaped;

    #[test]
    fn whatever_a_user_typed_stays_one_json_string() {
        let typed = std::format!("{}", Escaped(format_args!("suite={}", "a\"b\\c\nd")));
        assert_eq!(typed, r#"suite=a\"b\\c\u000ad"#);
    }
}
