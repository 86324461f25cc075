//! What the other clients need before the work begins: a connection, a channel, a queue of one's own.

use super::{Broker, queue_name};
use crate::harness::{Error, Sample};
use amqprs::channel::{QueueDeclareArguments, QueueDeleteArguments};
use amqprs::connection::OpenConnectionArguments;
use lapin::ConnectionProperties;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::uri::AMQPUri;

/// Runs a client's work as a task of tokio's current-thread runtime.
pub(super) fn on_tokio(
    main: impl Future<Output = Result<Sample, Error>> + Send + 'static,
) -> Result<Sample, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async { tokio::spawn(main).await })?
}

pub(super) struct Lapin {
    pub(super) channel: lapin::Channel,
    /// Closed when dropped.
    _connection: lapin::Connection,
}

impl Lapin {
    pub(super) async fn connect() -> Result<Self, Error> {
        let url = Broker::from_env()?.url;
        let connection = lapin::Connection::connect(&url, ConnectionProperties::default()).await?;
        Ok(Self {
            channel: connection.create_channel().await?,
            _connection: connection,
        })
    }

    pub(super) async fn declare(&self, role: &str) -> Result<String, Error> {
        let name = queue_name(role);
        let options = QueueDeclareOptions::default();
        self.channel
            .queue_declare(name.as_str().into(), options, FieldTable::default())
            .await?;
        Ok(name)
    }

    /// Comes back when the broker has worked off all that this channel sent before.
    pub(super) async fn barrier(&self, queue: &str) -> Result<(), Error> {
        let options = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        self.channel
            .queue_declare(queue.into(), options, FieldTable::default())
            .await?;
        Ok(())
    }

    pub(super) async fn delete(&self, queue: &str) -> Result<(), Error> {
        self.channel
            .queue_delete(queue.into(), QueueDeleteOptions::default())
            .await?;
        Ok(())
    }
}

pub(super) struct Amqprs {
    pub(super) channel: amqprs::channel::Channel,
    /// Closed when dropped.
    _connection: amqprs::connection::Connection,
}

impl Amqprs {
    pub(super) async fn connect() -> Result<Self, Error> {
        let uri: AMQPUri = Broker::from_env()?.url.parse()?;
        let at = uri.authority;
        let user = at.userinfo;
        let arguments =
            OpenConnectionArguments::new(&at.host, at.port, &user.username, &user.password)
                .virtual_host(&uri.vhost)
                .finish();
        let connection = amqprs::connection::Connection::open(&arguments).await?;
        Ok(Self {
            channel: connection.open_channel(None).await?,
            _connection: connection,
        })
    }

    pub(super) async fn declare(&self, role: &str) -> Result<String, Error> {
        let name = queue_name(role);
        self.channel
            .queue_declare(QueueDeclareArguments::new(&name))
            .await?;
        Ok(name)
    }

    /// Comes back when the broker has worked off all that this channel sent before.
    pub(super) async fn barrier(&self, queue: &str) -> Result<(), Error> {
        let arguments = QueueDeclareArguments::new(queue).passive(true).finish();
        self.channel.queue_declare(arguments).await?;
        Ok(())
    }

    pub(super) async fn delete(&self, queue: &str) -> Result<(), Error> {
        self.channel
            .queue_delete(QueueDeleteArguments::new(queue))
            .await?;
        Ok(())
    }
}
