//! The integration tests: one binary, so that they link once. `tests/run` runs it against the embedded broker and again,
//! without what needs no broker, against RabbitMQ; no test knows which one it has.
//!
//! | module | what belongs there |
//! |---|---|
//! | [`broker`] | what foreign clients (pika, kombu) see of the broker: one check of a script in tests/python each |
//! | [`delivery`] | a task there and back: submit, workers, results, signals, timeouts |
//! | [`seed`] | sweepea's own producer, its message, its function names, its environment |
//! | [`faults`] | what a user sees when something is killed, absent, refused or wrong |
//! | `kernel_*` | the kernel through its public interface, where that takes more than a module's own tests; no broker |
//!
//! A regression test is named `r<issue>_<claim>` and stands in the module that the bug belongs to.

mod broker;
mod delivery;
mod faults;
mod kernel_core;
mod kernel_interop;
mod kernel_io;
mod kernel_model;
mod kernel_sync;
mod replies;
mod seed;
