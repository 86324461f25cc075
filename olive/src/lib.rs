//! Olive: a light task queue. A message arrives, a worker runs the function, the result goes back, the message is acked.

pub mod cli;
pub mod config;
pub mod deliver;
pub mod error;
pub mod message;
pub mod outcome;
pub mod pool;
pub mod registry;
pub mod retry;
pub mod topology;

pub use config::Config;
pub use error::Error;
pub use registry::Ctx;
pub use retry::{TaskError, TaskResult};
