//! The chapters and the README, as doctests.

#[doc = include_str!("../architecture.md")]
pub mod architecture {}

#[doc = include_str!("../contributing.md")]
pub mod contributing {}

#[doc = include_str!("../measuring.md")]
pub mod measuring {}

#[doc = include_str!("../../README.md")]
pub mod readme {}
