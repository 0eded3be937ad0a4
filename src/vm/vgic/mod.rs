//! The virtual interrupt controller.
pub mod lists;
pub mod private;
