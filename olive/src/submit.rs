//! The other end: sends tasks, and waits for what becomes of them.

use std::time::Duration;

use amqp::client::{self, Connection, Message, Publisher, PublisherOptions};
use amqp::error::ReplyCode;
use amqp::proto::event::Lost;
use amqp::wire::{Properties, TableBuf};
use serde_json::value::RawValue;

pub use crate::app::in_kernel;
use crate::app::{broker, connect, interrupted};
use crate::config::Config;
use crate::dispatch::{INTERIM, MAX_RETRIES};
use crate::error::Error;
use crate::message::{Failure, Heard, MAX_NAME, Next, TaskMessage};
use crate::results::{Expected, Replies};

/// How long a goodbye may take.
const GOODBYE_WITHIN: Duration = Duration::from_secs(2);

/// A task to be sent.
#[derive(Debug, Clone)]
pub struct Request {
    /// Function: a registered name, or a Python import path.
    pub func: String,
    /// JSON array.
    pub args: Box<RawValue>,
    /// JSON object.
    pub kwargs: Box<RawValue>,
    /// Task id; made up if `None`.
    pub tid: Option<String>,
    /// Time limit.
    pub timeout: Option<Duration>,
    /// Attempts after the first; `None` leaves it to the app.
    pub max_retries: Option<u32>,
}

impl Request {
    /// A call without arguments.
    #[must_use]
    pub fn new(func: impl Into<String>) -> Self {
        let json = |text: &str| RawValue::from_string(text.into()).expect("it is JSON");
        Self {
            func: func.into(),
            args: json("[]"),
            kwargs: json("{}"),
            tid: None,
            timeout: None,
            max_retries: None,
        }
    }
}

/// Sends tasks over a connection of its own, inside a kernel.
#[derive(Debug)]
pub struct Client {
    config: Config,
    connection: Connection,
    publisher: Publisher,
    replies: Option<Replies>,
}

impl Client {
    /// Connects as the settings say. With `replies`, tasks can be waited for.
    ///
    /// # Errors
    /// [`Error::Unreachable`], [`Error::LoginRefused`], [`Error::Broker`].
    pub async fn connect(config: &Config, replies: bool) -> Result<Self, Error> {
        let connection = connect(config, "olive submit").await?;
        let failed = |error| broker(config, &error);
        let publisher = connection.publisher(PublisherOptions::default());
        let publisher = publisher.await.map_err(failed)?;
        let replies = match replies {
            true => Some(Replies::open(&connection).await.map_err(failed)?),
            false => None,
        };
        Ok(Self {
            config: config.clone(),
            connection,
            publisher,
            replies,
        })
    }

    /// Sends a task. `Ok`: the broker has it in a queue.
    ///
    /// # Errors
    /// [`Error::Unroutable`] if no queue takes it; [`Error::Config`] for names that are too long; [`Error::Broker`].
    pub async fn send(&self, request: &Request) -> Result<Sent, Error> {
        let tid = request
            .tid
            .clone()
            .unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        for (what, name) in [("function", &request.func), ("task id", &tid)] {
            if name.is_empty() || name.len() > MAX_NAME {
                let bytes = name.len();
                return Err(Error::Config(vec![format!(
                    "the {what} has {bytes} bytes; 1 to {MAX_NAME} are possible"
                )]));
            }
        }
        let body = TaskMessage::encode(
            &request.func,
            &request.args,
            &request.kwargs,
            &tid,
            request.timeout,
        );
        let mut headers = TableBuf::new();
        let fits = "the names of our headers are short";
        if self.replies.is_some() {
            headers.insert(INTERIM, true).expect(fits);
        }
        if let Some(retries) = request.max_retries {
            headers.insert(MAX_RETRIES, i64::from(retries)).expect(fits);
        }
        let properties = Properties {
            content_type: Some("application/json"),
            content_encoding: Some("utf-8"),
            headers: Some(headers.as_table()),
            delivery_mode: Some(2),
            correlation_id: Some(&tid),
            message_id: Some(&tid),
            reply_to: self.replies.as_ref().map(Replies::queue),
            ..Properties::default()
        };
        let expected = self.replies.as_ref().map(|replies| replies.expect(&tid));
        let (exchange, routing_key) = (&self.config.exchange_name.0, &self.config.routing_key.0);
        let message = Message::new(&body)
            .exchange(exchange)
            .key(routing_key)
            .properties(&properties)
            .mandatory();
        self.publisher.send(message).await.map_err(|error| {
            let is_missing = match &error {
                client::Error::Returned(_) => true,
                client::Error::ChannelClosed(reason)
                | client::Error::Unconfirmed(Lost::ChannelClosed(reason)) => {
                    reason.code == ReplyCode::NOT_FOUND
                }
                _ => false,
            };
            if is_missing {
                Error::Unroutable {
                    exchange: exchange.clone(),
                    routing_key: routing_key.clone(),
                }
            } else {
                broker(&self.config, &error)
            }
        })?;
        Ok(Sent { tid, expected })
    }

    /// Closes the connection.
    ///
    /// # Errors
    /// An interrupt.
    pub async fn close(self) -> Result<(), Error> {
        drop(self.replies);
        let closed = self.connection.close(GOODBYE_WITHIN).await;
        closed.map(|_| ()).map_err(interrupted)
    }
}

/// A task that the broker has.
#[derive(Debug)]
pub struct Sent {
    /// Its id.
    pub tid: String,
    expected: Option<Expected>,
}

impl Sent {
    /// Waits for the task's end: the JSON text of its result, or how it failed. `retried` hears of attempts that failed.
    ///
    /// # Errors
    /// [`Error::TaskFailed`]; [`Error::WaitedTooLong`] after `limit`; [`Error::Broker`] if the connection is lost, or if the client was
    /// made without replies.
    pub async fn wait(
        &self,
        limit: Option<Duration>,
        mut retried: impl FnMut(&Failure, Option<Next>),
    ) -> Result<String, Error> {
        let gone = || Error::Broker {
            url: "the reply queue".into(),
            cause: format!(
                "it is gone; task {} goes on, its result is not known",
                self.tid
            ),
        };
        let expected = self.expected.as_ref().ok_or_else(gone)?;
        let wait = async {
            loop {
                match expected.next().await? {
                    Some(Heard::End(reply)) => return Ok(Some(reply.result)),
                    Some(Heard::Retry(failure, next)) => retried(&failure, next),
                    Some(Heard::News) => {}
                    None => return Ok(None),
                }
            }
        };
        let ended = kernel::ignore_after(limit, wait).await;
        match ended.map_err(interrupted)? {
            Some(Some(Ok(result))) => Ok(result),
            Some(Some(Err(failure))) => Err(Error::TaskFailed {
                tid: self.tid.clone(),
                failure,
            }),
            Some(None) => Err(gone()),
            None => Err(Error::WaitedTooLong {
                tid: self.tid.clone(),
                waited: format!("{} s", limit.unwrap_or_default().as_secs_f64()),
            }),
        }
    }
}
