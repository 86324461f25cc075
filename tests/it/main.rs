//! The integration tests, one binary.

mod kernel_io;
mod kernel_sync;
