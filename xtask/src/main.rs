//! `cargo xtask`: everything one does with Vellum.
fn main() {}
