//! The chapters and the README, as doctests.

#[doc = include_str!("../adding-a-trap.md")]
pub mod adding_a_trap {}

#[doc = include_str!("../architecture.md")]
pub mod architecture {}

#[doc = include_str!("../cancellation.md")]
pub mod cancellation {}

#[doc = include_str!("../channels.md")]
pub mod channels {}

#[doc = include_str!("../contributing.md")]
pub mod contributing {}

#[doc = include_str!("../executor.md")]
pub mod executor {}

#[doc = include_str!("../framing.md")]
pub mod framing {}

#[doc = include_str!("../io.md")]
pub mod io {}

#[doc = include_str!("../measuring.md")]
pub mod measuring {}

#[doc = include_str!("../observing.md")]
pub mod observing {}

#[doc = include_str!("../timers.md")]
pub mod timers {}

#[doc = include_str!("../traps.md")]
pub mod traps {}

#[doc = include_str!("../workers.md")]
pub mod workers {}

#[doc = include_str!("../../README.md")]
pub mod readme {}
