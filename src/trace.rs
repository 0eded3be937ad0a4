//! What happened, counted per CPU: the portable truth of every benchmark, and the last words of an epitaph.
//!
//! Counting never writes a line that another CPU writes: each CPU owns its [`Counters`] and adds by a plain load and
//! store. Reading all CPUs' counters ([`Counters::read`]) while they run gives values that are each exact at some
//! recent moment.

pub mod ring;
pub mod times;

// Counters are no part of any protocol, so loom need not see them: `core`'s atomics, always.
use core::sync::atomic::{AtomicU64, Ordering};

/// One thing worth counting. The names are those of the result format.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub enum Event {
    /// Stage-2 permission faults handled.
    FaultsPermission,
    /// Stage-2 translation faults handled.
    FaultsTranslation,
    /// Stage-2 access-flag faults handled.
    FaultsAccess,
    /// Invalidations of one address on one CPU.
    TlbiLocal,
    /// Invalidations broadcast to all CPUs, of any scope.
    TlbiBroadcast,
    /// Broadcast invalidations of a range (FEAT_TLBIRANGE).
    TlbiRange,
    /// Broadcast invalidations of a whole VMID, both stages and walk caches (`VMALLS12E1IS`).
    TlbiVmid,
    /// Broadcast invalidations of one address of stage 2 (`IPAS2E1IS`).
    TlbiIpa,
    /// Broadcast invalidations of everything that combines both stages, of a whole VMID (`VMALLE1IS`).
    TlbiStage1,
    /// Stores to live stage-2 descriptors.
    DescriptorWrites,
    /// Acquisitions of a VM's MMU lock, either side.
    LockAcquired,
    /// Acquisitions that had to wait.
    LockContended,
    /// Polls spent waiting for the MMU lock.
    LockSpins,
    /// Interrupts sent to make a CPU look at its work.
    Kicks,
    /// Blocks replaced by tables.
    Splits,
    /// Tables replaced by blocks.
    Collapses,
    /// Times a slot was left without translation for a moment (break-before-make).
    BbmWindows,
    /// Faults that met a busy slot and went back to the guest to retry.
    BusyRetries,
    /// Exits from guests, of any kind.
    Exits,
    /// TLB conflict aborts resolved.
    TlbConflicts,
    /// Deferred tables that were looked through and linked again (engine `lazy`).
    PushDowns,
    /// Tables linked into a spare tree (engine `swap`).
    TablesPrepared,
    /// Descriptors written to a spare tree (engine `swap`).
    DescriptorsPrepared,
    /// Writes by the fault path to a cache line that other CPUs' fault paths write too, other than the leaf's line and
    /// the bitmap word's (counted in debug builds).
    SharedLineWrites,
    /// Writes of system registers, the instructions and the switch of a vCPU included (counted in debug builds).
    RegisterWrites,
    /// Reads and writes of list registers and of their control register (counted in debug builds).
    ListAccesses,
    /// SErrors that the CPU corrected, or that did no harm, while a guest ran.
    ErrorsSurvived,
}

/// Every event with the name it has in results, in the order of their numbers.
pub const EVENT_NAMES: [(Event, &str); EVENTS] = [
    (Event::FaultsPermission, "faults_permission"),
    (Event::FaultsTranslation, "faults_translation"),
    (Event::FaultsAccess, "faults_access"),
    (Event::TlbiLocal, "tlbi_local"),
    (Event::TlbiBroadcast, "tlbi_broadcast"),
    (Event::TlbiRange, "tlbi_range"),
    (Event::TlbiVmid, "tlbi_vmid"),
    (Event::TlbiIpa, "tlbi_ipa"),
    (Event::TlbiStage1, "tlbi_stage1"),
    (Event::DescriptorWrites, "descriptor_writes"),
    (Event::LockAcquired, "lock_acquired"),
    (Event::LockContended, "lock_contended"),
    (Event::LockSpins, "lock_spins"),
    (Event::Kicks, "kicks"),
    (Event::Splits, "splits"),
    (Event::Collapses, "collapses"),
    (Event::BbmWindows, "bbm_windows"),
    (Event::BusyRetries, "busy_retries"),
    (Event::Exits, "exits"),
    (Event::TlbConflicts, "tlb_conflicts"),
    (Event::PushDowns, "push_downs"),
    (Event::TablesPrepared, "tables_prepared"),
    (Event::DescriptorsPrepared, "descriptors_prepared"),
    (Event::SharedLineWrites, "shared_line_writes"),
    (Event::RegisterWrites, "register_writes"),
    (Event::ListAccesses, "list_accesses"),
    (Event::ErrorsSurvived, "errors_survived"),
];

/// Number of [`Event`]s.
pub const EVENTS: usize = Event::ErrorsSurvived as usize + 1;

/// The counters of one CPU. Only that CPU adds to them.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Counters([AtomicU64; EVENTS]);

impl Default for Counters {
    fn default() -> Self {
        Self(core::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Counters {
    /// Adds `n` to `event`. May be called by the owning CPU only; another caller loses counts, nothing else.
    pub fn add(&self, event: Event, n: u64) {
        let counter = &self.0[event as usize];
        counter.store(
            counter.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// The value of `event`, by any CPU.
    pub fn read(&self, event: Event) -> u64 {
        self.0[event as usize].load(Ordering::Relaxed)
    }
}
