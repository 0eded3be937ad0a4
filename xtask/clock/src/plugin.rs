//! What QEMU calls.

use core::ffi::{c_char, c_int, c_uint, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::OnceLock;

use crate::api::{
    ADD, AT_LEAST, Api, Counter, Handle, Id, KNOWN, LOADS, NO_REGS, POINTERS, STORES, api, options,
};
use crate::clock::{CLOCK, FULL};
use crate::decode::{Access, Marker, meaning};
use crate::interpose;
use crate::schedule::{MOST, Quanta};

/// The version of the interface that is wanted: QEMU looks here.
#[cfg_attr(not(test), unsafe(export_name = "qemu_plugin_version"))]
pub(crate) static VERSION: AtomicI32 = AtomicI32::new(POINTERS);

/// Runs when the library is loaded, before QEMU looks: the version is what the environment says.
#[used]
#[unsafe(link_section = ".init_array")]
static CHOOSE: extern "C" fn() = {
    extern "C" fn choose() {
        let wanted = std::env::var("PARALLEL_CLOCK_API");
        let wanted = wanted.ok().and_then(|word| word.parse().ok());
        if let Some(version) = wanted.filter(|version| KNOWN.contains(version)) {
            VERSION.store(version, Ordering::Relaxed);
        }
    }
    choose
};

/// The counter at which what orders memory waits for others.
static ORDERED: AtomicU64 = AtomicU64::new(FULL);
/// The counter at which loops that wait do.
static WAITING: AtomicU64 = AtomicU64::new(FULL);
/// Accesses to memory are looked at.
static CHARGED: AtomicBool = AtomicBool::new(false);
/// What translated code adds to.
static COUNTER: OnceLock<Counter> = OnceLock::new();

/// What QEMU calls when it loads the plugin.
///
/// # Safety
///
/// `words` points to `count` C strings.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn qemu_plugin_install(
    id: Id,
    _info: *const c_void,
    count: c_int,
    words: *const *const c_char,
) -> c_int {
    // SAFETY: QEMU's arguments.
    let options = unsafe { options(count, words) };
    match install(id, &options) {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("parallel clock: {why}");
            -1
        }
    }
}

fn install(id: Id, options: &[(String, String)]) -> Result<(), String> {
    let api = api().ok_or("this QEMU lacks functions of the plugin interface")?;
    let mut quanta = Quanta {
        fine: 1000,
        coarse: 50_000,
    };
    let (mut slack, mut spin, mut line_cost, mut sites) = (0, 50, 0, 0);
    for (key, value) in options {
        let number = value.parse::<u64>().ok().filter(|number| *number < 1 << 30);
        let number = number.ok_or_else(|| format!("option {key}={value}: not a number"))?;
        match key.as_str() {
            "quantum" => quanta.fine = number.max(1),
            "coarse" => quanta.coarse = number.max(1),
            "slack" => slack = number,
            "spin" => spin = number,
            "line-cost" => line_cost = number,
            "sites" => sites = number,
            _ => return Err(format!("no option {key}")),
        }
    }
    quanta.coarse = quanta.coarse.max(quanta.fine);
    for (mark, slack) in [(&ORDERED, slack), (&WAITING, spin)] {
        let early = quanta.fine.saturating_sub(slack);
        mark.store(FULL - early, Ordering::Relaxed);
    }
    // SAFETY: QEMU's function.
    let board = unsafe { (api.board)(size_of::<u64>()) };
    let counter = Counter::of(board);
    COUNTER.get_or_init(|| counter);
    if line_cost > 0 || sites > 0 {
        CHARGED.store(true, Ordering::Relaxed);
        CLOCK.watch_lines(line_cost, sites > 0);
    }
    CLOCK.start(counter, quanta, interpose::host_ns());
    register(api, id);
    Ok(())
}

fn register(api: &Api, id: Id) {
    let none = null_mut();
    if VERSION.load(Ordering::Relaxed) >= POINTERS {
        // SAFETY: QEMU's function, with a call back of this version.
        unsafe { (api.on_idle)(id, idle, none) };
        // SAFETY: as above.
        unsafe { (api.on_resume)(id, resume, none) };
        // SAFETY: as above.
        unsafe { (api.on_translation)(id, translated, none) };
        // SAFETY: as above.
        unsafe { (api.on_end)(id, end, none) };
    } else {
        // SAFETY: QEMU's function, with a call back of this version.
        unsafe { (api.old_on_idle)(id, old_idle) };
        // SAFETY: as above.
        unsafe { (api.old_on_resume)(id, old_resume) };
        // SAFETY: as above.
        unsafe { (api.old_on_translation)(id, old_translated) };
        // SAFETY: as above.
        unsafe { (api.old_on_end)(id, old_end, none) };
    }
}

/// A CPU's number, whose thread this is.
fn own(cpu: c_uint) -> usize {
    let cpu = usize::try_from(cpu).unwrap_or(MOST);
    if cpu >= MOST {
        eprintln!("parallel clock: more than {MOST} CPUs");
        // SAFETY: ends the process.
        unsafe { libc::_exit(3) };
    }
    interpose::this_is(cpu);
    cpu
}

extern "C" fn idle(cpu: c_uint, _: *mut c_void) {
    CLOCK.sleep(own(cpu));
}

extern "C" fn resume(cpu: c_uint, _: *mut c_void) {
    CLOCK.resume(own(cpu));
}

extern "C" fn pause(cpu: c_uint, _: *mut c_void) {
    CLOCK.pause(own(cpu));
}

extern "C" fn fine(cpu: c_uint, _: *mut c_void) {
    CLOCK.measure(own(cpu), true);
}

extern "C" fn coarse(cpu: c_uint, _: *mut c_void) {
    CLOCK.measure(own(cpu), false);
}

extern "C" fn begin(cpu: c_uint, _: *mut c_void) {
    CLOCK.count_apart(own(cpu), true);
}

extern "C" fn end_of_pass(cpu: c_uint, _: *mut c_void) {
    CLOCK.count_apart(own(cpu), false);
}

extern "C" fn forget(_: c_uint, _: *mut c_void) {
    CLOCK.forget_apart();
}

extern "C" fn tell(_: c_uint, _: *mut c_void) {
    CLOCK.tell_apart();
}

/// Below a site in what [`accessed`] is given: the access counts as a store.
const CLAIMS: u64 = 1;

/// The thread's CPU has accessed memory; `site` is twice the instruction's address.
extern "C" fn accessed(cpu: c_uint, kind: u32, address: u64, site: *mut c_void) {
    if !CLOCK.measured() {
        return;
    }
    let Some(api) = api() else { return };
    // SAFETY: QEMU's functions, within its call back, here and below.
    let reached = unsafe { (api.reached)(kind, address) };
    // SAFETY: as above; tested for null.
    if reached.is_null() || unsafe { (api.is_device)(reached) } {
        return;
    }
    // SAFETY: as above.
    let physical = unsafe { (api.physical)(reached) };
    let site = site.addr() as u64;
    // SAFETY: as above.
    let stores = site & CLAIMS != 0 || unsafe { (api.is_store)(kind) };
    CLOCK.accessed(own(cpu), site >> 1, physical, stores);
}

extern "C" fn end(_: *mut c_void) {
    CLOCK.report(&CLOCK.lock());
}

extern "C" fn old_idle(_: Id, cpu: c_uint) {
    idle(cpu, null_mut());
}

extern "C" fn old_resume(_: Id, cpu: c_uint) {
    resume(cpu, null_mut());
}

extern "C" fn old_translated(_: Id, block: Handle) {
    translated(block, null_mut());
}

extern "C" fn old_end(_: Id, _: *mut c_void) {
    end(null_mut());
}

/// Has a block's instructions counted, piece by piece where one may be aborted, and its CPU wait where it must.
extern "C" fn translated(block: Handle, _: *mut c_void) {
    let Some((api, &counter)) = api().zip(COUNTER.get()) else {
        return;
    };
    let none = null_mut();
    // SAFETY: QEMU's function and block, here and below.
    unsafe { (api.at_block_if)(block, pause, NO_REGS, AT_LEAST, counter, FULL, none) };
    // SAFETY: as above.
    let count = unsafe { (api.instructions)(block) };
    let mut first = None;
    let mut piece = 0;
    for number in 0..count {
        // SAFETY: as above.
        let instruction = unsafe { (api.instruction)(block, number) };
        let mut word = 0_u32;
        // SAFETY: as above; four bytes of a local variable.
        unsafe { (api.bytes)(instruction, (&raw mut word).cast(), size_of::<u32>()) };
        let meaning = meaning(u32::from_le(word));
        let start = *first.get_or_insert(instruction);
        piece += 1;
        for (applies, mark) in [(meaning.orders, &ORDERED), (meaning.waits, &WAITING)] {
            if applies {
                let mark = mark.load(Ordering::Relaxed);
                // SAFETY: as above.
                unsafe {
                    (api.at_instruction_if)(
                        instruction,
                        pause,
                        NO_REGS,
                        AT_LEAST,
                        counter,
                        mark,
                        none,
                    )
                };
            }
        }
        let (accesses, claims) = match meaning.access {
            Access::None => (0, 0),
            Access::Plain => (LOADS | STORES, 0),
            Access::Claim => (LOADS, CLAIMS),
            Access::Update => (STORES, CLAIMS),
        };
        if accesses != 0 && CHARGED.load(Ordering::Relaxed) {
            // SAFETY: as above.
            let site = unsafe { (api.address)(instruction) } << 1 | claims;
            let site = core::ptr::without_provenance_mut(usize::try_from(site).unwrap_or(0));
            // SAFETY: as above.
            unsafe { (api.after_access)(instruction, accessed, NO_REGS, accesses, site) };
        }
        if let Some(marker) = meaning.marker {
            let callback = match marker {
                Marker::Fine => fine,
                Marker::Coarse => coarse,
                Marker::Begin => begin,
                Marker::End => end_of_pass,
                Marker::Forget => forget,
                Marker::Tell => tell,
            };
            // SAFETY: as above.
            unsafe { (api.at_instruction)(instruction, callback, NO_REGS, none) };
        }
        if meaning.faults || number + 1 == count {
            // SAFETY: as above.
            unsafe { (api.count_instruction)(start, ADD, counter, piece) };
            (first, piece) = (None, 0);
        }
    }
}
