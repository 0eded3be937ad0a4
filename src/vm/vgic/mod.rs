//! The virtual interrupt controller: a GICv3 on GICv3 machines, a GICv2 on GICv2 machines.
//!
//! | file | what |
//! |---|---|
//! | [`private`], [`registers`] | the state of one vCPU's interrupts, a pure model, and its registers |
//! | [`lists`] | the two formats of list registers |
//! | [`distributor`] | which register an access to a frame names, who gets an SGI |
//! | [`interface`] | the list registers of the CPU that holds the vCPU |
//!
//! Interrupts cost nothing while none is in flight: a vCPU's `attention` flag says that its model changed, and only then
//! are list registers taken back and written anew, on its own CPU, before it goes on.

pub mod distributor;
pub mod interface;
pub mod lists;
pub mod private;
pub mod registers;
