//! What our client needs before the work begins: a connection, a channel, a queue of one's own.

use super::{Broker, queue_name};
use crate::harness::{Error, Sample};
use amqp::client::{self, Channel, Connection, Options};

/// Runs the work as a task of a kernel.
pub(super) fn on_kernel(
    main: impl Future<Output = Result<Sample, Error>> + 'static,
) -> Result<Sample, Error> {
    kernel::run(async { kernel::spawn(main).join().await })??
}

pub(super) struct Ours {
    pub(super) channel: Channel,
    pub(super) connection: Connection,
}

impl Ours {
    pub(super) async fn connect() -> Result<Self, Error> {
        let connection = client::connect(&Broker::from_env()?.url, Options::default()).await?;
        Ok(Self {
            channel: connection.channel().await?,
            connection,
        })
    }

    pub(super) async fn declare(&self, role: &str) -> Result<String, Error> {
        Ok(self.channel.queue(&queue_name(role)).declare().await?.name)
    }

    /// Comes back when the broker has worked off all that this channel sent before.
    pub(super) async fn barrier(&self, queue: &str) -> Result<(), Error> {
        self.channel.queue(queue).passive().declare().await?;
        Ok(())
    }

    pub(super) async fn delete(&self, queue: &str) -> Result<(), Error> {
        self.channel.delete_queue(queue).await?;
        Ok(())
    }
}
