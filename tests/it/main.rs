//! The integration tests: one binary, so that they link once. `tests/run` runs it against the embedded broker and again,
//! without what needs no broker or has its own, against RabbitMQ; no test knows which one it has.
//!
//! | module | what belongs there |
//! |---|---|
//! | [`broker`] | what foreign clients (pika, kombu, celery) see of the broker: one check of a script in tests/python each |
//! | [`chaos`] | our own client doing anything at random, on a network that breaks at random |
//! | [`client`] | our own client against the broker under test, and what it makes of a connection that breaks |
//! | [`delivery`] | a task there and back: submit, workers, results, signals, timeouts |
//! | [`demo`] | what `olive demo` says; its broker is its own, so once is enough |
//! | [`network`] | our own client on networks that are slow, silent, cut or lie |
//! | [`nodes`] | RabbitMQ nodes of the test's own: a cluster, restarts, alarms; `tests/run` runs it apart |
//! | [`endurance`] | what many messages and connections leave behind |
//! | [`examples`] | the client's examples, run as the programs they are |
//! | [`recovery`] | our own client's connections made again: cut, reset, refused, their broker killed |
//! | [`seed`] | sweepea's own producer, its message, its function names, its environment |
//! | [`faults`] | what a user sees when something is killed, absent, refused or wrong |
//! | [`tls`] | `amqps` and the ways to log in |
//! | [`kernel_budget`] | what the kernel does, in system calls, counted by strace; no broker |
//! | [`kernel_curio`] | random programs: what Curio on Python makes of them, our kernel must too; no broker |
//! | [`kernel_debug`] | what one sees of a kernel while it runs: observers, panics, task tree, watchdog, monitor |
//! | [`kernel_leaks`] | what is left in a process when its kernels are gone; no broker |
//! | [`kernel_process`] | calls in worker processes: what crosses the border, and how both sides die |
//! | [`kernel_process_faults`] | worker processes that are killed at any moment, or lie; what is left then |
//! | `kernel_*` | the kernel through its public interface, where that takes more than a module's own tests; no broker |
//!
//! A regression test is named `r<issue>_<claim>` and stands in the module that the bug belongs to.

mod broker;
mod chaos;
mod client;
mod delivery;
mod demo;
mod endurance;
mod examples;
mod faults;
mod kernel_budget;
mod kernel_core;
mod kernel_curio;
mod kernel_debug;
mod kernel_examples;
mod kernel_foreign;
mod kernel_interop;
mod kernel_io;
mod kernel_leaks;
mod kernel_local;
mod kernel_model;
mod kernel_net;
mod kernel_process;
mod kernel_process_faults;
mod kernel_sync;
mod kernel_tls;
mod kernel_universal;
mod kernel_user;
mod ledger;
mod network;
mod nodes;
mod recovery;
mod replies;
mod seed;
mod tls;
