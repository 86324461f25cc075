//! `amqp://` addresses.
