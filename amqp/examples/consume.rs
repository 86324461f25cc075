//! Prints what comes to a queue, eight messages in advance, and acks each when it is done with it:
//! `cargo run -p sweepea-amqp --example consume -- amqp://guest:guest@localhost/ tasks`. Ends with Ctrl-C; survives a restart of the
//! broker. Without arguments it has a broker of its own, to which `publish` can be sent from another terminal.

mod broker;

use std::error::Error;
use std::time::Duration;

use amqp::client::{self, Connection, Options};
use kernel::signal::{SIGINT, SIGTERM, SignalQueue};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (address, queue) = (arguments.next(), arguments.next());
    kernel::run(async move {
        let address = broker::address(address)?;
        let queue = queue.unwrap_or_else(|| "tasks".to_owned());
        let signals = SignalQueue::new(&[SIGINT, SIGTERM])?;
        let connection = client::connect(&address, Options::default()).await?;
        let printing = kernel::spawn(print(connection.clone(), queue));
        signals.next().await?;
        // What is not acked goes back to the queue.
        printing.cancel().await?;
        let _ = connection.close(Duration::from_secs(5)).await?;
        Ok(())
    })?
}

async fn print(connection: Connection, queue: String) -> Result<(), client::Error> {
    let channel = connection.channel().await?;
    channel.queue(&queue).durable().declare().await?;
    let mut consumer = channel.consume(&queue).prefetch(8).start().await?;
    while let Some(delivery) = consumer.next().await? {
        let again = if delivery.is_redelivered() {
            " (again)"
        } else {
            ""
        };
        println!("{}{again}", String::from_utf8_lossy(delivery.body()));
        delivery.ack();
    }
    Ok(())
}
