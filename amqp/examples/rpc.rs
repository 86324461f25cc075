//! Asks and answers over a broker: a server that doubles numbers, and a client that asks it, on two connections.
//! `cargo run -p sweepea-amqp --example rpc -- amqp://guest:guest@localhost/`; without an address, with a broker of its own.

mod broker;

use std::error::Error;
use std::time::Duration;

use amqp::client::{self, Cap, Connection, Message, Options};
use amqp::wire::Properties;

/// RabbitMQ's queue that is none: answers come straight back on the channel that asked.
const REPLY_TO: &str = "amq.rabbitmq.reply-to";

fn main() -> Result<(), Box<dyn Error>> {
    let given = std::env::args().nth(1);
    kernel::run(async move {
        let address = broker::address(given)?;
        let server = client::connect(&address, Options::default()).await?;
        let channel = server.channel().await?;
        let queue = channel.queue("").exclusive().declare().await?.name;
        kernel::spawn(serve(server, queue.clone()));

        let connection = client::connect(&address, Options::default()).await?;
        let channel = connection.channel().await?;
        let cap = Cap {
            count: 100,
            bytes: 1 << 20,
        };
        let mut answers = channel.consume(REPLY_TO).no_ack(cap).start().await?;
        for n in 1..=5_u32 {
            let (id, question) = (n.to_string(), n.to_string());
            let properties = Properties {
                correlation_id: Some(&id),
                reply_to: Some(REPLY_TO),
                ..Properties::default()
            };
            let message = Message::new(question.as_bytes()).key(&queue);
            channel.publish(message.properties(&properties)).await?;
            let answer = kernel::timeout_after(Duration::from_secs(10), answers.next()).await?;
            let answer = answer.ok_or("the answers have ended")?;
            assert_eq!(answer.props().correlation_id(), Some(&*id));
            println!("{n} doubled is {}", String::from_utf8_lossy(answer.body()));
        }
        let _ = connection.close(Duration::from_secs(5)).await?;
        Ok(())
    })?
}

async fn serve(connection: Connection, queue: String) -> Result<(), client::Error> {
    let channel = connection.channel().await?;
    let mut questions = channel.consume(&queue).prefetch(10).start().await?;
    while let Some(question) = questions.next().await? {
        let number = std::str::from_utf8(question.body()).ok();
        let number: Option<u32> = number.and_then(|text| text.parse().ok());
        let answer = match number.and_then(|n| n.checked_mul(2)) {
            Some(double) => double.to_string(),
            None => "not a number that can be doubled".to_owned(),
        };
        if let Some(reply_to) = question.props().reply_to() {
            let properties = Properties {
                correlation_id: question.props().correlation_id(),
                ..Properties::default()
            };
            let message = Message::new(answer.as_bytes()).key(reply_to);
            channel.publish(message.properties(&properties)).await?;
        }
        // Only now: a crash before leaves the question in the queue.
        question.ack();
    }
    Ok(())
}
