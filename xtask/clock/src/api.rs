//! The part of QEMU's plugin interface that is used: versions 5 and 6, and version 7, which gives every callback a pointer of
//! the plugin's where earlier ones gave some of them the plugin's number.
//!
//! The functions are looked up when the plugin is installed, so that the library can also be loaded into programs that do not
//! have them (it is preloaded into QEMU, and into the shell that may start it).

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// The first version whose callbacks all have a pointer.
pub(crate) const POINTERS: c_int = 7;
/// The versions that are known.
pub(crate) const KNOWN: core::ops::RangeInclusive<c_int> = 5..=7;

/// A plugin's number.
pub(crate) type Id = u64;
/// No registers are looked at.
pub(crate) const NO_REGS: c_int = 0;
/// Add to a counter.
pub(crate) const ADD: c_int = 0;
/// Loads, and stores.
pub(crate) const LOADS: c_int = 1;
/// Stores.
pub(crate) const STORES: c_int = 2;
/// A counter has reached a value.
pub(crate) const AT_LEAST: c_int = 7;

/// A translation block, or an instruction in it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Handle(*mut c_void);

/// A counter that every CPU has one of.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Counter {
    board: *mut c_void,
    offset: usize,
}

impl Counter {
    /// The only counter of a board of its own.
    pub(crate) fn of(board: *mut c_void) -> Self {
        Self { board, offset: 0 }
    }
}

// SAFETY: QEMU's functions may be called with it from any thread.
unsafe impl Send for Counter {}
// SAFETY: as above.
unsafe impl Sync for Counter {}

/// Called by a CPU's thread when it executes something.
pub(crate) type Executed = extern "C" fn(c_uint, *mut c_void);
/// Called by a CPU's thread after it accessed memory: what kind of access, and where.
pub(crate) type Accessed = extern "C" fn(c_uint, u32, u64, *mut c_void);
/// A CPU's life: versions before 7.
pub(crate) type OldCpu = extern "C" fn(Id, c_uint);
/// Something was translated: versions before 7.
pub(crate) type OldTranslated = extern "C" fn(Id, Handle);
/// QEMU ends: versions before 7.
pub(crate) type OldEnd = extern "C" fn(Id, *mut c_void);
/// Something was translated.
pub(crate) type Translated = extern "C" fn(Handle, *mut c_void);
/// QEMU ends.
pub(crate) type End = extern "C" fn(*mut c_void);

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident: $symbol:literal = fn($($kind:ty),*) $(-> $result:ty)?;)*) => {
        /// QEMU's functions.
        #[derive(Clone, Copy)]
        pub(crate) struct Api {
            $($(#[$doc])* pub(crate) $name: unsafe extern "C" fn($($kind),*) $(-> $result)?,)*
        }

        impl Api {
            fn find() -> Option<Self> {
                Some(Self {
                    $($name: {
                        let found = find($symbol)?;
                        // SAFETY: QEMU's function of that name has this signature in the versions that are known.
                        unsafe { core::mem::transmute::<*mut c_void, unsafe extern "C" fn($($kind),*) $(-> $result)?>(found) }
                    },)*
                })
            }
        }
    };
}

functions! {
    /// Registers a call back for idle CPUs.
    on_idle: c"qemu_plugin_register_vcpu_idle_cb" = fn(Id, Executed, *mut c_void);
    /// Registers a call back for idle CPUs: versions before 7.
    old_on_idle: c"qemu_plugin_register_vcpu_idle_cb" = fn(Id, OldCpu);
    /// Registers a call back for CPUs that go on.
    on_resume: c"qemu_plugin_register_vcpu_resume_cb" = fn(Id, Executed, *mut c_void);
    /// Registers a call back for CPUs that go on: versions before 7.
    old_on_resume: c"qemu_plugin_register_vcpu_resume_cb" = fn(Id, OldCpu);
    /// Registers a call back for translations.
    on_translation: c"qemu_plugin_register_vcpu_tb_trans_cb" = fn(Id, Translated, *mut c_void);
    /// Registers a call back for translations: versions before 7.
    old_on_translation: c"qemu_plugin_register_vcpu_tb_trans_cb" = fn(Id, OldTranslated);
    /// Registers a call back for the end.
    on_end: c"qemu_plugin_register_atexit_cb" = fn(Id, End, *mut c_void);
    /// Registers a call back for the end: versions before 7.
    old_on_end: c"qemu_plugin_register_atexit_cb" = fn(Id, OldEnd, *mut c_void);
    /// How many instructions a block has.
    instructions: c"qemu_plugin_tb_n_insns" = fn(Handle) -> usize;
    /// An instruction of a block.
    instruction: c"qemu_plugin_tb_get_insn" = fn(Handle, usize) -> Handle;
    /// The bytes of an instruction.
    bytes: c"qemu_plugin_insn_data" = fn(Handle, *mut c_void, usize) -> usize;
    /// Calls when a block is executed and a counter compares.
    at_block_if: c"qemu_plugin_register_vcpu_tb_exec_cond_cb" = fn(Handle, Executed, c_int, c_int, Counter, u64, *mut c_void);
    /// Calls when an instruction is executed and a counter compares.
    at_instruction_if: c"qemu_plugin_register_vcpu_insn_exec_cond_cb" = fn(Handle, Executed, c_int, c_int, Counter, u64, *mut c_void);
    /// Calls when an instruction is executed.
    at_instruction: c"qemu_plugin_register_vcpu_insn_exec_cb" = fn(Handle, Executed, c_int, *mut c_void);
    /// Counts when an instruction is executed.
    count_instruction: c"qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu" = fn(Handle, c_int, Counter, u64);
    /// Calls when an instruction has accessed memory.
    after_access: c"qemu_plugin_register_vcpu_mem_cb" = fn(Handle, Accessed, c_int, c_int, *mut c_void);
    /// Where an instruction is.
    address: c"qemu_plugin_insn_vaddr" = fn(Handle) -> u64;
    /// What an access reached, within its call back.
    reached: c"qemu_plugin_get_hwaddr" = fn(u32, u64) -> *mut c_void;
    /// Whether that is a device.
    is_device: c"qemu_plugin_hwaddr_is_io" = fn(*const c_void) -> bool;
    /// Its physical address.
    physical: c"qemu_plugin_hwaddr_phys_addr" = fn(*const c_void) -> u64;
    /// Whether an access stores.
    is_store: c"qemu_plugin_mem_is_store" = fn(u32) -> bool;
    /// A board of counters.
    board: c"qemu_plugin_scoreboard_new" = fn(usize) -> *mut c_void;
    /// A CPU's counter.
    get: c"qemu_plugin_u64_get" = fn(Counter, c_uint) -> u64;
    /// Sets a CPU's counter.
    set: c"qemu_plugin_u64_set" = fn(Counter, c_uint, u64);
}

/// Finds a function in the running program.
fn find(symbol: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a C string.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// QEMU's functions, if this is QEMU.
pub(crate) fn api() -> Option<&'static Api> {
    static API: OnceLock<Option<Api>> = OnceLock::new();
    API.get_or_init(Api::find).as_ref()
}

/// The options that the plugin was given.
///
/// # Safety
///
/// `words` points to `count` C strings.
pub(crate) unsafe fn options(count: c_int, words: *const *const c_char) -> Vec<(String, String)> {
    (0..usize::try_from(count).unwrap_or(0))
        .map(|number| {
            // SAFETY: within the array, says the caller.
            let word = unsafe { words.add(number) };
            // SAFETY: as above.
            let word = unsafe { word.read() };
            // SAFETY: a C string, says the caller.
            let word = unsafe { CStr::from_ptr(word) }.to_string_lossy();
            let (key, value) = word.split_once('=').unwrap_or((&word, ""));
            (key.to_owned(), value.to_owned())
        })
        .collect()
}
