//! Publishes its arguments to a queue, and knows of each that the broker has it:
//! `cargo run -p sweepea-amqp --example publish -- amqp://guest:guest@localhost/ tasks one two three`. Without arguments, three messages to a broker
//! of its own.

mod broker;

use std::error::Error;
use std::time::Duration;

use amqp::client::{self, Message, Options, PublisherOptions};
use amqp::wire::Properties;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (address, queue) = (arguments.next(), arguments.next());
    let bodies: Vec<String> = match &queue {
        Some(_) => arguments.collect(),
        None => ["one", "two", "three"].map(str::to_owned).into(),
    };
    kernel::run(async move {
        let address = broker::address(address)?;
        let queue = queue.unwrap_or_else(|| "tasks".to_owned());
        let connection = client::connect(&address, Options::default()).await?;
        let channel = connection.channel().await?;
        channel.queue(&queue).durable().declare().await?;
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let mut confirms = Vec::new();
        for (n, body) in bodies.into_iter().enumerate() {
            // An id tells a message that was published again from another with the same text.
            let id = format!("{}-{n}", std::process::id());
            let properties = Properties {
                message_id: Some(&id),
                delivery_mode: Some(2),
                ..Properties::default()
            };
            let message = Message::new(body.as_bytes()).key(&queue);
            let message = message.properties(&properties).mandatory();
            // All are under way at once; publishing waits when the window is full.
            confirms.push((publisher.publish(message).await?, body));
        }
        for (confirm, body) in confirms {
            confirm.await?;
            println!("the broker has {body:?}");
        }
        let closed = connection.close(Duration::from_secs(5)).await?;
        assert_eq!(closed.unconfirmed, 0);
        Ok(())
    })?
}
