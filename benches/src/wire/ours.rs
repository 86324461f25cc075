//! What our client needs before the work begins: a connection, a channel, a queue of one's own.

use super::{Broker, queue_name};
use crate::harness::{Error, Sample};
use amqp::client::{self, Channel, Connection, Options};

/// Runs the work as a task of a kernel.
pub(crate) fn on_kernel(
    main: impl Future<Output = Result<Sample, Error>> + 'static,
) -> Result<Sample, Error> {
    kernel::run(async { kernel::spawn(main).join().await })??
}

pub(crate) struct Ours {
    pub(crate) channel: Channel,
    pub(crate) connection: Connection,
}

impl Ours {
    pub(crate) async fn connect() -> Result<Self, Error> {
        let connection = client::connect(&Broker::from_env()?.url, Options::default()).await?;
        Ok(Self {
            channel: connection.channel().await?,
            connection,
        })
    }

    pub(crate) async fn declare(&self, role: &str) -> Result<String, Error> {
        Ok(self.channel.queue(&queue_name(role)).declare().await?.name)
    }

    /// As every task queue declares its queue, without arguments.
    pub(crate) async fn declare_durable(&self, role: &str) -> Result<String, Error> {
        let declare = self.channel.queue(&queue_name(role)).durable();
        Ok(declare.declare().await?.name)
    }

    /// How many messages wait in the queue, those excepted that a consumer holds.
    pub(crate) async fn messages(&self, queue: &str) -> Result<u32, Error> {
        Ok(self
            .channel
            .queue(queue)
            .passive()
            .declare()
            .await?
            .messages)
    }

    /// Comes back when the broker has worked off all that this channel sent before.
    pub(crate) async fn barrier(&self, queue: &str) -> Result<(), Error> {
        self.messages(queue).await?;
        Ok(())
    }

    pub(crate) async fn delete(&self, queue: &str) -> Result<(), Error> {
        self.channel.delete_queue(queue).await?;
        Ok(())
    }
}
