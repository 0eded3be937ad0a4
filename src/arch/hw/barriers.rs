//! Barriers and hints.

use core::arch::asm;

macro_rules! barriers {
    ($($(#[$doc:meta])* $name:ident => $text:literal;)*) => {$(
        $(#[$doc])*
        #[inline]
        pub fn $name() {
            // SAFETY: a barrier or hint changes no state that Rust can see. It is not `nomem`, so that the compiler
            // moves no memory access across it either.
            unsafe { asm!($text, options(nostack, preserves_flags)) };
        }
    )*};
}

barriers! {
    /// `DSB ISHST`: orders this CPU's earlier stores before its later invalidations, for all CPUs' walkers.
    dsb_ishst => "dsb ishst";
    /// `DSB ISH`: completes earlier accesses and invalidations on all CPUs.
    dsb_ish => "dsb ish";
    /// `DSB NSHST`: orders this CPU's earlier stores before its later local invalidations.
    dsb_nshst => "dsb nshst";
    /// `DSB NSH`: completes earlier local invalidations.
    dsb_nsh => "dsb nsh";
    /// `DSB LD`: waits for earlier loads, of devices too, before anything later.
    dsb_ld => "dsb ld";
    /// `ISB`: synchronizes the context of this CPU.
    isb => "isb";
    /// `WFI`: sleeps until an interrupt is pending, masked or not.
    wfi => "wfi";
    /// `SEV`: wakes every CPU that waits for an event.
    sev => "sev";
    /// `HINT #0x70`: nothing, but to an emulator's clock: what follows is measured.
    hint_measured => "hint #0x70";
    /// `HINT #0x71`: nothing, but to an emulator's clock: what follows is not measured.
    hint_unmeasured => "hint #0x71";
    /// `HINT #0x74`: nothing, but to an emulator's clock: forgets which lines CPUs took from each other between their marks.
    hint_forget_lines => "hint #0x74";
    /// `HINT #0x75`: nothing, but to an emulator's clock: tells which those were.
    hint_tell_lines => "hint #0x75";
    /// `YIELD`: gives the CPU away for a moment while polling.
    yield_now => "yield";
}
