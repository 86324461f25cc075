//! Workers: threads and processes for what would block the kernel.

mod call;
mod child;
mod crew;
mod own;
mod process;
mod thread;

pub use child::{ProcessFn, process_worker};
pub use own::{PoolJob, run_on};
pub use process::{ProcessCallError, ProcessPool, run_in_process};
pub use thread::{ThreadPool, run_in_thread};
