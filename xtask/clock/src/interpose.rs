//! Functions of the C library that QEMU calls, replaced by preloading this library: time is the clock's, and who waits for
//! whom is seen.

use core::cell::Cell;
use core::ffi::{CStr, c_int, c_void};
use core::mem::transmute;
use std::sync::OnceLock;

use libc::{
    clockid_t, nfds_t, pollfd, pthread_cond_t, pthread_mutex_t, sigset_t, ssize_t, timespec,
};

use crate::clock::CLOCK;
use crate::schedule::NEVER;

const SECOND: u64 = 1_000_000_000;

thread_local! {
    static CPU: Cell<Option<usize>> = const { Cell::new(None) };
}

/// This thread is that of a CPU.
pub(crate) fn this_is(cpu: usize) {
    CPU.set(Some(cpu));
}

fn this_cpu() -> Option<usize> {
    CPU.get()
}

fn main_thread() -> bool {
    // SAFETY: no memory is involved.
    let process = unsafe { libc::getpid() };
    // SAFETY: as above.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    i64::from(process) == thread
}

/// The host's monotonic time in nanoseconds.
pub(crate) fn host_ns() -> u64 {
    let mut time = timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is a local variable.
    unsafe {
        libc::syscall(
            libc::SYS_clock_gettime,
            libc::CLOCK_MONOTONIC,
            &raw mut time,
        )
    };
    nanoseconds(&time)
}

fn nanoseconds(time: &timespec) -> u64 {
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec)
        .saturating_mul(SECOND)
        .saturating_add(part(time.tv_nsec))
}

/// Replaces the C library's: monotonic time is the clock's.
///
/// # Safety
///
/// As the C library's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn clock_gettime(id: clockid_t, time: *mut timespec) -> c_int {
    if id == libc::CLOCK_MONOTONIC && CLOCK.active() {
        let now = CLOCK.read(this_cpu());
        let part = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let value = timespec {
            tv_sec: part(now / SECOND),
            tv_nsec: part(now % SECOND),
        };
        // SAFETY: the caller's structure.
        unsafe { time.write(value) };
        return 0;
    }
    // SAFETY: the caller's arguments.
    let done = unsafe { libc::syscall(libc::SYS_clock_gettime, id, time) };
    c_int::try_from(done).unwrap_or(-1)
}

/// Replaces the C library's: a CPU's thread that wakes the main loop is seen.
///
/// # Safety
///
/// As the C library's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn write(file: c_int, bytes: *const c_void, count: usize) -> ssize_t {
    // SAFETY: the caller's arguments.
    let done = unsafe { libc::syscall(libc::SYS_write, file, bytes, count) };
    if count == size_of::<u64>()
        && CLOCK.active()
        && let Some(cpu) = this_cpu()
    {
        // SAFETY: the caller's eight bytes.
        let value = unsafe { bytes.cast::<u64>().read_unaligned() };
        if value == 1 {
            CLOCK.told_main(cpu);
        }
    }
    isize::try_from(done).unwrap_or(-1)
}

/// Replaces the C library's: the main loop waits by the clock.
///
/// # Safety
///
/// As the C library's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn ppoll(
    files: *mut pollfd,
    count: nfds_t,
    limit: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    if !CLOCK.active() || !main_thread() {
        // SAFETY: the caller's arguments.
        return unsafe { poll(files, count, limit, mask) };
    }
    // SAFETY: null, or the caller's structure.
    let after = unsafe { limit.as_ref() }.map_or(NEVER, nanoseconds);
    let now = timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Input first: idle time may be jumped over at once.
    // SAFETY: the caller's arguments.
    let found = unsafe { poll(files, count, &raw const now, mask) };
    if found != 0 || after == 0 {
        return found;
    }
    let event = pollfd {
        fd: CLOCK.event(),
        events: libc::POLLIN,
        revents: 0,
    };
    let length = usize::try_from(count).unwrap_or(0);
    let mut all = Vec::with_capacity(length + 1);
    for number in 0..length {
        // SAFETY: within the caller's array.
        let file = unsafe { files.add(number) };
        // SAFETY: as above.
        all.push(unsafe { file.read() });
    }
    all.push(event);
    CLOCK.main_waits(after);
    while !CLOCK.main_due() {
        // SAFETY: the vector's elements.
        let found = unsafe { poll(all.as_mut_ptr(), count + 1, core::ptr::null(), mask) };
        if found < 0 {
            CLOCK.main_goes_on();
            return found;
        }
        let rung = all.last().is_some_and(|event| event.revents != 0);
        if !rung || found > 1 {
            CLOCK.main_goes_on();
        }
        if rung {
            drain(CLOCK.event());
        }
    }
    // SAFETY: the caller's arguments.
    unsafe { poll(files, count, &raw const now, mask) }
}

fn drain(event: c_int) {
    let mut count = 0_u64;
    // SAFETY: eight bytes of a local variable.
    unsafe { libc::syscall(libc::SYS_read, event, &raw mut count, size_of::<u64>()) };
}

/// The system's call, which may write to the limit it is given.
///
/// # Safety
///
/// As the C library's function.
unsafe fn poll(
    files: *mut pollfd,
    count: nfds_t,
    limit: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: null, or the caller's structure.
    let mut limit = unsafe { limit.as_ref() }.copied();
    let pointer = limit
        .as_mut()
        .map_or(core::ptr::null_mut(), |limit| &raw mut *limit);
    // SAFETY: the caller's arguments, and a copy.
    let done = unsafe { libc::syscall(libc::SYS_ppoll, files, count, pointer, mask, 8_usize) };
    c_int::try_from(done).unwrap_or(-1)
}

type Wait = unsafe extern "C" fn(*mut pthread_cond_t, *mut pthread_mutex_t) -> c_int;
type Signal = unsafe extern "C" fn(*mut pthread_cond_t) -> c_int;

/// The C library's own functions.
struct Own {
    wait: Wait,
    signal: Signal,
    broadcast: Signal,
}

fn own() -> &'static Own {
    static OWN: OnceLock<Own> = OnceLock::new();
    OWN.get_or_init(|| {
        let [wait, signal, broadcast] = [
            c"pthread_cond_wait",
            c"pthread_cond_signal",
            c"pthread_cond_broadcast",
        ]
        .map(find);
        // SAFETY: the C library's function of that name.
        let wait = unsafe { transmute::<*mut c_void, Wait>(wait) };
        // SAFETY: the C library's function of that name.
        let signal = unsafe { transmute::<*mut c_void, Signal>(signal) };
        // SAFETY: the C library's function of that name.
        let broadcast = unsafe { transmute::<*mut c_void, Signal>(broadcast) };
        Own {
            wait,
            signal,
            broadcast,
        }
    })
}

/// Conditions changed once; where both kinds exist the newer is meant.
fn find(name: &CStr) -> *mut c_void {
    // SAFETY: names are C strings.
    let found = unsafe { libc::dlvsym(libc::RTLD_NEXT, name.as_ptr(), c"GLIBC_2.3.2".as_ptr()) };
    if !found.is_null() {
        return found;
    }
    // SAFETY: as above.
    unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) }
}

/// Replaces the C library's: a CPU that sleeps, and a thread that waits for others, are seen.
///
/// # Safety
///
/// As the C library's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn pthread_cond_wait(
    condition: *mut pthread_cond_t,
    mutex: *mut pthread_mutex_t,
) -> c_int {
    let cpu = this_cpu();
    if !CLOCK.active() || cpu.is_none() && !main_thread() {
        // SAFETY: the caller's arguments.
        return unsafe { (own().wait)(condition, mutex) };
    }
    if let Some(cpu) = cpu.filter(|cpu| CLOCK.asleep(*cpu)) {
        CLOCK.await_kick(cpu, condition.addr(), || {
            // SAFETY: the caller's, who holds it.
            unsafe { libc::pthread_mutex_unlock(mutex) };
        });
        // SAFETY: the caller's, who wants it back.
        return unsafe { libc::pthread_mutex_lock(mutex) };
    }
    CLOCK.begin_wait(cpu, condition.addr());
    // SAFETY: the caller's arguments.
    let done = unsafe { (own().wait)(condition, mutex) };
    CLOCK.end_wait(cpu);
    done
}

/// Replaces the C library's: who is woken is seen.
///
/// # Safety
///
/// As the C library's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn pthread_cond_signal(condition: *mut pthread_cond_t) -> c_int {
    if CLOCK.active() {
        CLOCK.signal(this_cpu(), condition.addr());
    }
    // SAFETY: the caller's argument.
    unsafe { (own().signal)(condition) }
}

/// Replaces the C library's: who is woken is seen.
///
/// # Safety
///
/// As the C library's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn pthread_cond_broadcast(condition: *mut pthread_cond_t) -> c_int {
    if CLOCK.active() {
        CLOCK.signal(this_cpu(), condition.addr());
    }
    // SAFETY: the caller's argument.
    unsafe { (own().broadcast)(condition) }
}
