//! What CPUs share and how: per-CPU data and grace periods.

pub mod percpu;
pub mod quiescence;
