//! The virtual interrupt controllers as guests see them: every access to every register, and random programs against a
//! reference model of the architecture, with list registers played by the virtual CPU interface of `cpu`.

mod cpu;
mod frames;
mod programs;
mod reference;
mod states;
