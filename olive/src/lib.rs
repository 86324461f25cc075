//! Olive.
