//! Stage 2.
pub mod bitmap;
pub mod descriptor;
pub mod geometry;
pub mod lock;
pub mod table;
pub mod vmid;
pub(crate) mod walk;
