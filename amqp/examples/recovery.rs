//! Publishes a number each second, consumes it, and tells what happens to the connection: restart the broker meanwhile.
//! `cargo run -p sweepea-amqp --example recovery -- amqp://guest:guest@localhost/`. Ends after the given number of messages, 60 if not said.
//! Without an address it has a broker of its own, with which nothing happens.

mod broker;

use std::error::Error;
use std::time::Duration;

use amqp::client::{
    self, Connection, ConnectionEvent, Message, Options, PublisherOptions, Recovery,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let given = arguments.next();
    let messages = arguments.next().map_or(Ok(60), |n| n.parse::<u32>())?;
    kernel::run(async move {
        let address = broker::address(given)?;
        let options = Options {
            recovery: Some(Recovery {
                max_wait: Duration::from_secs(5),
                ..Recovery::default()
            }),
            ..Options::default()
        };
        let connection = client::connect(&address, options).await?;
        kernel::spawn(tell(connection.clone()));
        let channel = connection.channel().await?;
        // The server chooses the name, and another one after each loss.
        let queue = channel.queue("").exclusive().declare().await?.name;
        channel.bind_queue(&queue, "amq.direct", "numbers").await?;
        let mut consumer = channel.consume(&queue).prefetch(10).start().await?;
        let printing = kernel::spawn(async move {
            while let Some(delivery) = consumer.next().await? {
                println!("got {}", String::from_utf8_lossy(delivery.body()));
                // What was delivered by a connection that is gone comes again; then this does nothing.
                delivery.ack();
            }
            Ok::<(), client::Error>(())
        });
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        for n in 0..messages {
            let body = n.to_string();
            let message = Message::new(body.as_bytes())
                .exchange("amq.direct")
                .key("numbers");
            // Returns when the broker has it, however many connections that took.
            publisher.send(message).await?;
            kernel::sleep(Duration::from_secs(1)).await?;
        }
        printing.cancel().await?;
        let _ = connection.close(Duration::from_secs(5)).await?;
        Ok(())
    })?
}

async fn tell(connection: Connection) -> Result<(), kernel::Interrupt> {
    let mut events = connection.events();
    while let Some(event) = events.next().await? {
        match event {
            ConnectionEvent::Lost(why) => println!("lost: {why}"),
            ConnectionEvent::Recovering { attempt, wait } => {
                println!("attempt {attempt} in {:.1} s", wait.as_secs_f64());
            }
            ConnectionEvent::Recovered { renamed } => println!("recovered, renamed {renamed:?}"),
            ConnectionEvent::EntityFailed { entity, error } => println!("{entity}: {error}"),
            ConnectionEvent::GaveUp(why) => println!("given up: {why}"),
            other => println!("{other:?}"),
        }
    }
    Ok(())
}
