//! Exchanges, queues and bindings: a topic exchange, an alternate for what nobody takes, a queue that keeps at most 1000 messages.
//! `cargo run -p sweepea-amqp --example topology -- amqp://guest:guest@localhost/`; without an address, with a broker of its own.

mod broker;

use std::error::Error;
use std::time::Duration;

use amqp::client::{self, Message, Options, PublisherOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let given = std::env::args().nth(1);
    kernel::run(async move {
        let address = broker::address(given)?;
        let connection = client::connect(&address, Options::default()).await?;
        let channel = connection.channel().await?;
        // What the connection has declared is declared again when it has been lost, in an order that works; what was deleted is not.
        channel
            .exchange("example.rest", "fanout")
            .auto_delete()
            .declare()
            .await?;
        let news = channel.exchange("example.news", "topic").auto_delete();
        let news = news.arg("alternate-exchange", "example.rest");
        news.declare().await?;
        let weather = channel.queue("").exclusive().arg("x-max-length", 1000);
        let weather = weather.declare().await?.name;
        channel
            .bind_queue(&weather, "example.news", "weather.#")
            .await?;
        let rest = channel.queue("").exclusive().declare().await?.name;
        channel.bind_queue(&rest, "example.rest", "").await?;

        let publisher = connection.publisher(PublisherOptions::default()).await?;
        for key in ["weather.north", "weather.south.coast", "sports.chess"] {
            let message = Message::new(key.as_bytes())
                .exchange("example.news")
                .key(key);
            publisher.send(message.mandatory()).await?;
        }
        for queue in [&weather, &rest] {
            while let Some(got) = channel.get(queue).await? {
                println!("{queue}: {}", got.routing_key());
                got.ack();
            }
        }

        // An error closes the channel it happens on, and no other.
        let doomed = connection.channel().await?;
        let error = doomed.queue("no such queue").passive().declare().await;
        println!("{}", error.unwrap_err());
        channel.check()?;
        let _ = connection.close(Duration::from_secs(5)).await?;
        Ok(())
    })?
}
