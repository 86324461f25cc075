//! The integration tests, one binary.

mod kernel_core;
