//! The client: `proto` run by one task per connection on the kernel.
