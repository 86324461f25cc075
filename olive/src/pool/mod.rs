//! The workers: what takes a task message and gives back an outcome.

pub mod child;
