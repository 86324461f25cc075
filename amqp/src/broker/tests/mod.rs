//! The broker without sockets: frames in, frames out, time moved by hand.

mod delivery;
mod errors;
mod model;
mod resources;
mod rig;
mod serve;
mod transactions;
