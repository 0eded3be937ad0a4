//! One run under QEMU: started, watched, and ended whatever happens.
//!
//! The watchdog owns the child: it is killed by its handle when the time is up, when it falls silent for too long, and
//! when this program leaves the function for any other reason.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::clock;
use crate::console::{Cutter, Piece};
use crate::lines;
use crate::linux;
use crate::loaders;
use crate::machine::{Firmware, Machine, Model, Timing};
use crate::media;
use crate::paths;
use crate::process;
use crate::setup::firmware;
use crate::uart::{self, Line, Transcript};

/// The oldest version whose `virt` board has what Vellum uses.
pub(crate) const OLDEST: Version = Version(10, 2);

/// Major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32);

impl Version {
    /// From the first line of `--version`.
    pub(crate) fn parse(line: &str) -> Option<(Self, String)> {
        let text = line.split("version ").nth(1)?.split_whitespace().next()?;
        let mut numbers = text.split('.').map(str::parse);
        let version = Self(numbers.next()?.ok()?, numbers.next()?.ok()?);
        Some((version, text.to_owned()))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}.{}", self.0, self.1)
    }
}

/// A `qemu-system-aarch64` that was asked for its version.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    program: PathBuf,
    version: Version,
    text: String,
}

/// What is run and for how long.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) image: &'a Path,
    /// A file that is put into RAM beside it, and where.
    pub(crate) placed: Option<(&'a Path, u64)>,
    /// The initial RAM disk: kernel and RAM disk of a guest.
    pub(crate) bundle: Option<&'a Path>,
    /// Boot arguments, `key=value` separated by spaces.
    pub(crate) append: &'a str,
    /// The run is killed after this time.
    pub(crate) limit: Duration,
    /// The run is killed when it says nothing for this time.
    pub(crate) silence: Duration,
    /// Wait for a debugger on port 1234 before the first instruction.
    pub(crate) gdb: bool,
    /// What the console says is written there too, byte by byte.
    pub(crate) record: Option<&'a Path>,
}

impl Qemu {
    /// Asks `program` for its version.
    pub(crate) fn probe(program: &Path) -> Result<Self> {
        let said = process::output(Command::new(program).arg("--version"))?;
        let (version, text) = said
            .lines()
            .next()
            .and_then(Version::parse)
            .ok_or_else(|| anyhow!("{} does not say which QEMU it is", program.display()))?;
        Ok(Self {
            program: program.to_path_buf(),
            version,
            text,
        })
    }

    /// The version as QEMU writes it.
    pub(crate) fn version(&self) -> &str {
        &self.text
    }

    /// Whether it is new enough.
    pub(crate) fn recent(&self) -> bool {
        self.version >= OLDEST
    }

    /// The program.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Boots the image and follows its console to the end; `hear` sees every line as it comes.
    ///
    /// An error means that the run did not end by itself; how it ended otherwise is in the transcript.
    pub(crate) fn run(
        &self,
        launch: &Launch<'_>,
        hear: &mut dyn FnMut(&Line),
    ) -> Result<Transcript> {
        self.run_with(launch, None, hear)
    }

    /// Puts a program at address 0, where a Raspberry Pi 4 begins, and image and tree where its firmware does. The tree is
    /// QEMU's, with RAM and boot arguments filled in.
    fn boot_from_address_0(
        &self,
        command: &mut Command,
        launch: &Launch<'_>,
        trusted: bool,
    ) -> Result<Scratch> {
        let folder = Scratch::new();
        std::fs::create_dir_all(&folder.0)?;
        let stub = loaders::raspberry(trusted, &folder.0)?;
        let tree = folder.0.join("tree.dtb");
        let mut dump = Command::new(&self.program);
        dump.args(launch.machine.dump_device_tree(&tree));
        dump.arg("-dtb")
            .arg(linux::pi4_tree(launch.machine.second_uart)?);
        dump.arg("-kernel").arg(launch.image);
        process::output(dump.arg("-append").arg(launch.append))?;
        load(command, &stub, 0);
        load(command, &tree, loaders::PI_TREE.into());
        load(command, launch.image, loaders::PI_IMAGE.into());
        Ok(folder)
    }

    /// As [`Qemu::run`], with a keyboard. The run ends when the keyboard's sender is dropped.
    pub(crate) fn run_with(
        &self,
        launch: &Launch<'_>,
        keyboard: Option<Receiver<Vec<u8>>>,
        hear: &mut dyn FnMut(&Line),
    ) -> Result<Transcript> {
        let mut command = Command::new(&self.program);
        command.args(launch.machine.arguments());
        let parallel = launch.machine.timing == Timing::Parallel;
        if parallel {
            clock::attach(&mut command, self, &launch.machine.clock)?;
        }
        command.args([
            "-nodefaults",
            "-no-reboot",
            "-display",
            "none",
            "-monitor",
            "none",
        ]);
        if launch.machine.second_uart {
            command.args(["-serial", "null"]);
        }
        command.args(["-serial", "stdio"]);
        // The folder lives as long as the run.
        let volume = match launch.machine.firmware {
            Firmware::None => {
                command
                    .arg("-kernel")
                    .arg(launch.image)
                    .arg("-append")
                    .arg(launch.append);
                if launch.machine.model == Model::Raspi4b {
                    command
                        .arg("-dtb")
                        .arg(linux::pi4_tree(launch.machine.second_uart)?);
                }
                if let Some(bundle) = launch.bundle {
                    command.arg("-initrd").arg(bundle);
                }
                None
            }
            Firmware::UefiAcpi | Firmware::UefiTree | Firmware::Grub => {
                Some(boot_from_volume(&mut command, launch)?)
            }
            Firmware::PiStub => Some(self.boot_from_address_0(&mut command, launch, false)?),
            Firmware::PiTrusted => Some(self.boot_from_address_0(&mut command, launch, true)?),
        };
        if let Some((file, address)) = launch.placed {
            load(&mut command, file, address);
        }
        if launch.gdb {
            command.args(["-S", "-gdb", "tcp::1234"]);
        }
        let input = match keyboard {
            Some(_) => Stdio::piped(),
            None => Stdio::null(),
        };
        command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = Running::start(&mut command)?;
        let record = launch
            .record
            .map(|path| File::create(path).with_context(|| path.display().to_string()));
        let console = running.console(keyboard, record.transpose()?)?;
        let errors = running.errors()?;
        let heard = follow(&console, launch, hear);
        let ended = match heard {
            // The clock's last words come when QEMU has ended a hundred threads.
            Ok(_) => running.end(Duration::from_secs(if parallel { 60 } else { 5 })),
            Err(_) => running.kill(),
        };
        let complaint = errors.join().unwrap_or_default();
        let mut transcript = heard?;
        ended?;
        drop(volume);
        if transcript.status.is_none() && transcript.text.is_empty() && !complaint.trim().is_empty()
        {
            bail!(
                "QEMU: {}",
                complaint.trim().lines().next().unwrap_or_default()
            );
        }
        if parallel {
            clock::judge(&complaint)?;
            transcript.share(lines::sections(&complaint));
        }
        Ok(transcript)
    }

    /// Its version's numbers.
    pub(crate) fn number(&self) -> Version {
        self.version
    }
}

/// Adds UEFI and a disk that it finds the image on.
fn boot_from_volume(command: &mut Command, launch: &Launch<'_>) -> Result<Scratch> {
    let folder = Scratch::new();
    if launch.machine.firmware == Firmware::Grub {
        let program = firmware::grub()?;
        media::grub(
            &folder.0,
            &program,
            launch.image,
            launch.bundle,
            launch.append,
        )?;
    } else {
        media::esp(&folder.0, launch.image, launch.bundle, launch.append)?;
    }
    command.arg("-bios").arg(firmware::uefi()?);
    // Without a menu it would wait for a key for seconds; with one it waits for as long as it is told.
    command.args(["-boot", "menu=on,splash-time=0"]);
    let mut disk = OsString::from("format=raw,if=virtio,file=fat:rw:");
    disk.push(&folder.0);
    command.arg("-drive").arg(disk);
    Ok(folder)
}

/// A folder that does not outlive its owner.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    /// Its path; who uses it makes it.
    pub(crate) fn new() -> Self {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        Self(paths::target(&format!("runs/{}-{run}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays is in nobody's way.
        std::fs::remove_dir_all(&self.0).unwrap_or_default();
    }
}

fn load(command: &mut Command, file: &Path, address: u64) {
    let mut device = OsString::from(format!("loader,addr={address:#x},force-raw=on,file="));
    device.push(file);
    command.arg("-device").arg(device);
}

/// Reads the console until it closes or a limit is reached.
fn follow(
    console: &Receiver<Heard>,
    launch: &Launch<'_>,
    hear: &mut dyn FnMut(&Line),
) -> Result<Transcript> {
    let end = Instant::now() + launch.limit;
    let mut transcript = Transcript::default();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match console.recv_timeout(left.min(launch.silence)) {
            Ok(Heard::Piece(piece)) => {
                let line = match piece {
                    Piece::Line(text) => uart::parse(&text),
                    Piece::Guest(bytes) => Line::Guest(bytes),
                };
                hear(&line);
                transcript.add(line);
            }
            Ok(Heard::Left) => bail!("left by Ctrl-]"),
            Ok(Heard::End) | Err(RecvTimeoutError::Disconnected) => return Ok(transcript),
            Err(RecvTimeoutError::Timeout) if left <= launch.silence => {
                bail!(
                    "no end after {} s; last: {}",
                    launch.limit.as_secs(),
                    transcript.last_words()
                )
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "silent for {} s; last: {}",
                    launch.silence.as_secs(),
                    transcript.last_words()
                )
            }
        }
    }
}

/// What the threads at the console's ends tell.
enum Heard {
    Piece(Piece),
    /// The console is closed.
    End,
    /// Nobody types any more, and wants the run to end.
    Left,
}

/// A child that does not outlive its owner.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        Ok(Self(child))
    }

    /// Pieces of standard output, read by a thread that ends with the pipe; another writes what is typed.
    fn console(
        &mut self,
        keyboard: Option<Receiver<Vec<u8>>>,
        record: Option<File>,
    ) -> Result<Receiver<Heard>> {
        let pipe = self.0.stdout.take().context("QEMU has no console")?;
        let (sender, receiver) = mpsc::channel();
        if let (Some(keyboard), Some(pipe)) = (keyboard, self.0.stdin.take()) {
            let sender = sender.clone();
            thread::spawn(move || write_keys(pipe, &keyboard, &sender));
        }
        thread::spawn(move || read_pieces(pipe, record, &sender));
        Ok(receiver)
    }

    /// Everything on standard error, once the pipe is closed.
    fn errors(&mut self) -> Result<thread::JoinHandle<String>> {
        let mut pipe = self.0.stderr.take().context("QEMU has no standard error")?;
        Ok(thread::spawn(move || {
            let mut bytes = Vec::new();
            match pipe.read_to_end(&mut bytes) {
                Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
                Err(error) => error.to_string(),
            }
        }))
    }

    /// Waits for the end that a closed console announces.
    fn end(&mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while self.0.try_wait()?.is_none() {
            if Instant::now() >= end {
                return self.kill();
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn kill(&mut self) -> Result<()> {
        self.0.kill().context("cannot stop QEMU")?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for a child that has been waited for, which is what is wanted.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn read_pieces(mut pipe: ChildStdout, mut record: Option<File>, sender: &mpsc::Sender<Heard>) {
    let mut cutter = Cutter::default();
    let mut bytes = [0; 4096];
    let tell = |piece| sender.send(Heard::Piece(piece)).unwrap_or_default();
    while let Ok(count @ 1..) = pipe.read(&mut bytes) {
        let heard = bytes.get(..count).unwrap_or_default();
        // A full disk does not end a run; the record is short then.
        record = record.and_then(|mut it| it.write_all(heard).is_ok().then_some(it));
        cutter.cut(heard, tell);
    }
    cutter.rest().into_iter().for_each(tell);
    // Whoever listened is gone if this fails.
    sender.send(Heard::End).unwrap_or_default();
}

fn write_keys(mut pipe: ChildStdin, keyboard: &Receiver<Vec<u8>>, sender: &mpsc::Sender<Heard>) {
    for bytes in keyboard {
        if pipe.write_all(&bytes).and_then(|()| pipe.flush()).is_err() {
            return;
        }
    }
    sender.send(Heard::Left).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::{Launch, OLDEST, Qemu, Version};
    use crate::board::Board;
    use crate::machine::{Machine, Timing};
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::{Path, PathBuf};
    use std::time::{Duration, Instant};

    #[test]
    fn versions_are_read_and_compared() {
        let (version, text) = Version::parse("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)")
            .expect("a version");
        assert_eq!((version, text.as_str()), (Version(11, 1), "11.1.3"));
        assert!(
            version > OLDEST
                && Version(10, 2) == OLDEST
                && Version(10, 0) < OLDEST
                && Version(9, 9) < OLDEST
        );
        assert_eq!(Version::parse("something else"), None);
    }

    /// A program that answers like QEMU and then does `body`.
    fn fake(name: &str, body: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vellum-xtask-{}-{name}", std::process::id()));
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && {{ echo 'QEMU emulator version 11.1.0'; exit; }}\n{body}\n"
        );
        std::fs::write(&path, script).expect("a script");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
            .expect("an executable");
        path
    }

    fn run(name: &str, body: &str) -> Result<Option<u8>, String> {
        run_by(Timing::Wall, name, body)
    }

    fn run_by(timing: Timing, name: &str, body: &str) -> Result<Option<u8>, String> {
        let program = fake(name, body);
        let board = Board::qemu_virt().expect("the board file is read");
        let mut machine = Machine::of(&board);
        machine.timing = timing;
        let launch = Launch {
            machine: &machine,
            image: Path::new("image"),
            placed: None,
            bundle: None,
            append: "",
            limit: Duration::from_millis(800),
            silence: Duration::from_millis(400),
            gdb: false,
            record: None,
        };
        // Another test's fork may hold the script open for writing for a moment.
        let answer = (0..100).find_map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            Qemu::probe(&program).ok()
        });
        let qemu = answer.expect("it answers");
        let result = qemu.run(&launch, &mut |_| ());
        std::fs::remove_file(&program).expect("the script goes");
        result
            .map(|transcript| transcript.status)
            .map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_parallel_clock_needs_plugins() {
        let help = r#"[ "$1" = --help ] && { echo '-machine [type=]name'; exit; }; exit 9"#;
        let error = run_by(Timing::Parallel, "plain", help).expect_err("it has no plugins");
        assert!(error.contains("without plugins"), "{error}");
        assert!(error.contains("--timing parallel"), "{error}");
    }

    #[test]
    fn a_plugin_that_is_refused_is_qemus_one_line() {
        // What QEMU says of a version of the interface that it does not have.
        let words = "Could not load plugin libparallel_clock.so: plugin requires API version 7, but this QEMU supports only \
                     a minimum version of 8";
        let error = run("refuses", &format!("echo '{words}' >&2; exit 1")).expect_err("refused");
        assert_eq!(error, format!("QEMU: {words}"));
    }

    #[test]
    fn a_run_that_ends_gives_its_status() {
        assert_eq!(
            run("ends", r#"echo '{"vellum":"exit","status":3}'"#),
            Ok(Some(3))
        );
    }

    #[test]
    fn a_run_that_hangs_is_killed() {
        let start = Instant::now();
        let error = run("hangs", "echo booting; exec sleep 60").expect_err("the watchdog bites");
        assert!(
            error.contains("silent") && error.contains("booting"),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_run_that_talks_for_ever_is_killed() {
        let error = run("talks", "while :; do echo again; sleep 0.05; done")
            .expect_err("the watchdog bites");
        assert!(error.contains("no end"), "{error}");
    }

    #[test]
    fn what_qemu_complains_about_is_the_message() {
        let error =
            run("complains", "echo 'no such machine' >&2; exit 1").expect_err("it did not run");
        assert_eq!(error, "QEMU: no such machine");
    }

    #[test]
    fn a_program_that_is_not_there_is_one_line() {
        let error = Qemu::probe(Path::new("/nowhere/qemu")).expect_err("there is none");
        assert!(error.to_string().contains("/nowhere/qemu"));
    }
}
