//! Grace periods.
