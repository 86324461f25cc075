//! What the task dump says of a task that waits in a call of the client: it waits where the call was made, not in there.

use std::net::TcpListener;
use std::pin::Pin;
use std::rc::Rc;

use kernel::{spawn, wait_until_idle};

use super::tests::{consumer, open, publisher, publisher_with, secs, with_server};
use super::*;
use crate::wire::TableBuf;
use crate::wire::cold::{Method, tx};

/// Where there is no answer to anything any more.
struct Silence {
    /// Nobody says hello there.
    address: String,
    connection: Connection,
    channel: Channel,
    /// All that has come was taken.
    consumer: Consumer,
    publisher: Publisher,
    /// It waits for its only confirm.
    full: Publisher,
    events: Events,
    none: TableBuf,
}

impl Silence {
    fn message(&self) -> Message<'static> {
        Message::new(b"x").key("tasks")
    }

    fn select(&self) -> Method {
        Method::Tx(tx::AMQPMethod::Select(tx::Select {}))
    }
}

type Call = (
    &'static str,
    fn(Silence) -> Pin<Box<dyn Future<Output = ()>>>,
);

/// Each call with its text.
macro_rules! calls {
    ($silence:ident: $($call:expr),* $(,)?) => {
        [$((stringify!($call), |mut $silence| Box::pin(async move { let _ = &mut $silence; let _ = $call.await; }))),*]
    };
}

/// Has each task wait at its call, on a connection that is silent or lost, and looks where.
#[track_caller]
fn wait_at_their_lines(calls: &[Call], is_lost: bool) {
    let listener = Rc::new(TcpListener::bind("127.0.0.1:0").unwrap());
    let address = format!("amqp://{}", listener.local_addr().unwrap());
    for (text, call) in calls {
        let (text, call, address) = (*text, *call, address.clone());
        with_server(
            Options::default(),
            move |connection, mut server, _| async move {
                let publisher = publisher(&connection, &mut server).await?;
                let window = PublisherOptions {
                    window: 1,
                    ..PublisherOptions::default()
                };
                let full = publisher_with(window, &connection, &mut server).await?;
                let channel = open(&connection, &mut server).await?;
                let mut consumer = consumer(&channel, &mut server).await?;
                consumer.next().await?.unwrap().ack();
                let events = connection.events();
                let silence = Silence {
                    address,
                    connection,
                    channel,
                    consumer,
                    publisher,
                    full,
                    events,
                    none: TableBuf::new(),
                };
                let _confirm = silence.full.post(&silence.message())?;
                if is_lost {
                    drop(server);
                    wait_until_idle().await?;
                }
                let task = spawn(call(silence));
                wait_until_idle().await?;
                let waits = task
                    .info()
                    .unwrap_or_else(|| panic!("{text} does not wait"))
                    .waits;
                assert!(!waits.is_empty(), "{text}");
                for (kind, at) in waits {
                    assert_eq!(at.file(), file!(), "{text} waits for {kind:?} at {at}");
                }
                task.abort();
                Ok(())
            },
        );
    }
}

#[test]
fn a_task_that_waits_for_an_answer_waits_at_its_own_line() {
    let calls: &[Call] = &calls!(at:
        connect(&at.address, Options::default()),
        connect_to(&at.address.parse().unwrap(), Options::default()),
        at.connection.channel(),
        at.connection.publisher(PublisherOptions::default()),
        at.connection.update_secret("secret", "reason"),
        at.connection.closed(),
        at.connection.close(secs(9)),
        at.events.next(),
        at.channel.queue("tasks").declare(),
        at.channel.exchange("tasks", "direct").declare(),
        at.channel.bind_queue("tasks", "tasks", ""),
        at.channel.bind_queue_with("tasks", "tasks", "", &at.none),
        at.channel.unbind_queue("tasks", "tasks", ""),
        at.channel.unbind_queue_with("tasks", "tasks", "", &at.none),
        at.channel.bind_exchange("tasks", "tasks", ""),
        at.channel.unbind_exchange("tasks", "tasks", ""),
        at.channel.purge_queue("tasks"),
        at.channel.delete_queue("tasks"),
        at.channel.delete_queue_if("tasks", true, true),
        at.channel.delete_exchange("tasks", true),
        at.channel.qos(1),
        at.channel.recover(),
        at.channel.get("tasks"),
        at.channel.flow(true),
        at.channel.tx_select(),
        at.channel.tx_commit(),
        at.channel.tx_rollback(),
        at.channel.call(at.select()),
        at.channel.close(),
        at.channel.consume("tasks").start(),
        at.consumer.next(),
        at.consumer.cancel(),
        at.publisher.post(&at.message()).unwrap(),
        at.publisher.publish(at.message()).await.unwrap(),
        at.publisher.send(at.message()),
        at.full.publish(at.message()),
        at.full.send(at.message()),
        at.full.flush(),
        at.full.close(),
    );
    wait_at_their_lines(calls, false);
}

#[test]
fn a_task_that_waits_for_the_connection_to_recover_waits_at_its_own_line() {
    let calls: &[Call] = &calls!(at:
        at.connection.channel(),
        at.connection.publisher(PublisherOptions::default()),
        at.connection.update_secret("secret", "reason"),
        at.channel.queue("tasks").declare(),
        at.channel.delete_queue("tasks"),
        at.channel.get("tasks"),
        at.channel.publish(at.message()),
        at.channel.consume("tasks").start(),
        at.consumer.next(),
        at.publisher.publish(at.message()),
        at.publisher.send(at.message()),
        at.full.flush(),
    );
    wait_at_their_lines(calls, true);
}
