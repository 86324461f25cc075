//! Workers: threads for what would block the kernel.

mod thread;

pub use thread::{ThreadPool, run_in_thread};
