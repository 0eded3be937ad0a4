//! The console's two ends: what comes out is cut into lines of the hypervisor and bytes of a guest; what is typed goes in.
//!
//! A guest that has the console to itself writes to it byte by byte. From the moment it does, each line of the hypervisor's
//! begins with [`RECORD`], a byte that the hypervisor keeps back from the guest: so no output of a guest is ever taken for a
//! record, and until then there is no guest.

use std::io::{IsTerminal as _, Read as _};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anyhow::Result;

use crate::process;

/// Begins a line of the hypervisor's on a console that a guest has.
pub(crate) const RECORD: u8 = 0x1e;
/// Typed, it ends the run: `Ctrl-]`.
const LEAVE: u8 = 0x1d;

/// A piece of the console.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Piece {
    /// A line of the hypervisor's.
    Line(String),
    /// What a guest wrote.
    Guest(Vec<u8>),
}

/// Cuts a stream of bytes, however it arrives.
#[derive(Debug, Default)]
pub(crate) struct Cutter {
    line: Vec<u8>,
    /// A line has begun with [`RECORD`]: what is not such a line is a guest's.
    shared: bool,
    in_line: bool,
}

impl Cutter {
    /// Takes `bytes` in; `each` gets the pieces that they complete.
    pub(crate) fn cut(&mut self, bytes: &[u8], mut each: impl FnMut(Piece)) {
        let mut guest = Vec::new();
        for &byte in bytes {
            if byte == RECORD {
                self.shared = true;
                self.in_line = true;
                continue;
            }
            if self.shared && !self.in_line {
                guest.push(byte);
                continue;
            }
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            if !guest.is_empty() {
                each(Piece::Guest(std::mem::take(&mut guest)));
            }
            each(Piece::Line(self.take_line()));
            self.in_line = false;
        }
        if !guest.is_empty() {
            each(Piece::Guest(guest));
        }
    }

    /// What is left of a line that never ended.
    pub(crate) fn rest(&mut self) -> Option<Piece> {
        (!self.line.is_empty()).then(|| Piece::Line(self.take_line()))
    }

    fn take_line(&mut self) -> String {
        let line = String::from_utf8_lossy(&self.line).trim_end().to_owned();
        self.line.clear();
        line
    }
}

/// This program's standard input as a guest's keyboard. A terminal passes every key on while this lives.
pub(crate) struct Keyboard {
    /// How the terminal was set before, if it is one.
    before: Option<String>,
}

impl Keyboard {
    /// Begins to read. The sender is dropped when `Ctrl-]` is typed; where input just ends, it stays.
    pub(crate) fn open() -> Result<(Self, Receiver<Vec<u8>>)> {
        let before = match std::io::stdin().is_terminal() {
            true => {
                let before = settings("-g")?;
                settings("raw -echo opost onlcr")?;
                Some(before.trim().to_owned())
            }
            false => None,
        };
        let keyboard = Self { before };
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 256];
            let mut input = std::io::stdin().lock();
            while let Ok(count @ 1..) = input.read(&mut bytes) {
                let typed = bytes.get(..count).unwrap_or_default();
                let left = typed.iter().position(|&byte| byte == LEAVE);
                let kept = typed.get(..left.unwrap_or(count)).unwrap_or_default();
                if sender.send(kept.to_vec()).is_err() || left.is_some() {
                    return;
                }
            }
            // Nothing more will be typed, and the guest goes on.
            loop {
                thread::park();
            }
        });
        Ok((keyboard, receiver))
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // The terminal is gone if this fails, and nobody is there to be told.
            drop(settings(before));
        }
    }
}

/// Runs `stty` on this program's terminal.
fn settings(words: &str) -> Result<String> {
    let mut command = Command::new("stty");
    command.args(words.split_whitespace());
    process::output_of(command.stdin(Stdio::inherit()))
}

#[cfg(test)]
mod tests {
    use super::{Cutter, Piece};

    /// Cut whole, and byte by byte: guests' pieces put together again.
    fn cut(bytes: &[u8]) -> Vec<Piece> {
        let gather = |step: usize| {
            let mut cutter = Cutter::default();
            let mut pieces: Vec<Piece> = Vec::new();
            for part in bytes.chunks(step) {
                cutter.cut(part, |piece| match (pieces.last_mut(), piece) {
                    (Some(Piece::Guest(all)), Piece::Guest(more)) => all.extend(more),
                    (_, piece) => pieces.push(piece),
                });
            }
            pieces.extend(cutter.rest());
            pieces
        };
        let whole = gather(bytes.len().max(1));
        assert_eq!(gather(1), whole);
        whole
    }

    fn line(text: &str) -> Piece {
        Piece::Line(text.to_owned())
    }

    #[test]
    fn before_a_guest_has_the_console_every_line_is_ours() {
        let pieces = cut(b"one\r\n{\"vellum\":\"x\"}\n\nlast");
        assert_eq!(
            pieces,
            [
                line("one"),
                line("{\"vellum\":\"x\"}"),
                line(""),
                line("last")
            ]
        );
    }

    #[test]
    fn a_guest_cannot_forge_a_record() {
        let pieces = cut(b"boot\n\x1eshared\nlogin: \n{\"vellum\":\"exit\",\"status\":0}\n\x1e{\"vellum\":\"exit\",\"status\":2}\nmore");
        assert_eq!(
            pieces,
            [
                line("boot"),
                line("shared"),
                Piece::Guest(b"login: \n{\"vellum\":\"exit\",\"status\":0}\n".to_vec()),
                line("{\"vellum\":\"exit\",\"status\":2}"),
                Piece::Guest(b"more".to_vec()),
            ]
        );
    }
}
