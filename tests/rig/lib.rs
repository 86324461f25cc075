//! What the integration tests share: the broker under test, the olive binary, foreign clients in Python, tasks that
//! report and wait, a proxy that breaks connections.
//!
//! Everything here waits for an event of the operating system (a line, a connection, an exit), never for a while; a wait
//! that exceeds [`PATIENCE`] fails the test and shows what the processes in question said. A guard that goes out of
//! scope takes its process group with it.
//!
//! The environment comes from `tests/run`. A test that needs a part of it fails with one line that says so; none skips.

mod broker;
mod deadline;
mod environment;
mod gate;
mod names;
mod olive;
mod process;
mod proxy;
mod python;
mod rabbit;
mod random;

pub use broker::Broker;
pub use deadline::{Deadline, PATIENCE};
pub use gate::{Gate, Visitor};
pub use names::unique;
pub use olive::Olive;
pub use process::{Ended, Process, Signal, wait_until_gone};
pub use proxy::{Direction, Proxy};
pub use python::{modules, script};
pub use rabbit::Rabbit;
pub use random::Random;
