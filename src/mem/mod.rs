//! Physical memory: who owns which frame.
