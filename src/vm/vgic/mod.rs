//! The virtual interrupt controller: a GICv3 on GICv3 machines, a GICv2 on GICv2 machines.
//!
//! | file | what |
//! |---|---|
//! | [`private`], [`registers`] | the state of one vCPU's interrupts, a pure model, and its registers |
//! | [`shared`], [`shared_registers`] | the same of the interrupts that all vCPUs share |
//! | [`homes`] | which vCPU a shared interrupt is for |
//! | [`flight`], [`listing`] | what goes to the list registers and comes back; which interrupts get one |
//! | [`lists`] | the two formats of list registers |
//! | [`distributor`] | which register an access to a frame names, who gets an SGI |
//! | [`access`] | what accesses to registers answer and do |
//! | [`interface`] | the list registers of the CPU that holds the vCPU |
//! | [`state`] | all of it as plain data, to save and to restore |
//!
//! Interrupts cost nothing while none is in flight: a vCPU's `attention` flag says that its model changed, and only then
//! are list registers taken back and written anew, on its own CPU, before it goes on.
//!
//! Each vCPU's private interrupts have a lock of their own, and the shared ones have one per VM, which SGIs and PPIs never
//! take: a vCPU looks at the shared ones only if its `spis` flag says that one may be for it. Lock order: a vCPU's
//! `private`, then `shared`, then a vCPU's `power`.

pub mod access;
pub mod distributor;
pub mod flight;
pub mod homes;
pub mod interface;
pub mod listing;
pub mod lists;
pub mod private;
pub mod registers;
pub mod shared;
pub mod shared_registers;
pub mod state;
