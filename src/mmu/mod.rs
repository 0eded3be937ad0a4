//! Stage 2.
pub mod bitmap;
pub mod descriptor;
pub mod geometry;
pub mod lock;
pub(crate) mod table;
pub mod vmid;
pub(crate) mod walk;
