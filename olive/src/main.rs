//! The olive command.

fn main() {}
