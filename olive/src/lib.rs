//! Olive: a light task queue. A message arrives, a worker runs the function, the result goes back, the message is acked.

pub mod app;
pub mod cli;
pub mod config;
pub mod deliver;
pub mod demo;
pub mod dev;
mod dispatch;
pub mod error;
pub mod message;
mod outbox;
pub mod outcome;
pub mod pool;
pub mod registry;
pub mod results;
pub mod retry;
pub mod stats;
pub mod submit;
pub mod topology;

pub use app::App;
pub use config::Config;
pub use error::Error;
pub use registry::Ctx;
pub use retry::{TaskError, TaskResult};
