//! State machines without I/O: bytes and the time in; bytes, events and deadlines out.
