//! Small messages on their way from the broker, with prefetch 1,000.

use super::ours::{Ours, on_kernel};
use super::publish::ours_fill;
use super::{Meter, PER_MESSAGE, measured, prepared};
use crate::harness::{Bench, Error, Sample};

const MESSAGES: u64 = 50_000;
const PREFETCH: u16 = 1000;
/// Deliveries that one ack with `multiple` settles.
const MANY: u64 = 100;

pub(super) fn acking_each() -> Bench {
    let bench = Bench::new(
        "amqp_consume",
        "100 bytes, preloaded, each acked by itself; per message",
        PER_MESSAGE,
    )
    .on_all_cores()
    .with_broker()
    .ours(|| on_kernel(ours(1)));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("lapin", || super::peers::on_tokio(peers::lapin(1)))
        .peer("lapin joined", || {
            super::peers::on_tokio(peers::lapin_joined())
        })
        .peer("amqprs", || super::peers::on_tokio(peers::amqprs(1)));
    bench
}

pub(super) fn acking_many() -> Bench {
    let bench = Bench::new(
        "amqp_consume_multiple",
        "100 bytes, preloaded, every 100th acked with multiple; per message",
        PER_MESSAGE,
    )
    .on_all_cores()
    .with_broker()
    .ours(|| on_kernel(ours(MANY as usize)));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("lapin", || super::peers::on_tokio(peers::lapin(MANY)))
        .peer("amqprs", || super::peers::on_tokio(peers::amqprs(MANY)));
    bench
}

/// Acks each delivery by itself, `together` of them at a time. There is no `multiple` to ask for: acks that are given in one turn of the
/// kernel leave merged.
async fn ours(together: usize) -> Result<Sample, Error> {
    let client = Ours::connect().await?;
    let queue = client.declare("consume").await?;
    ours_fill(&client, &queue, prepared(MESSAGES)).await?;
    client.barrier(&queue).await?;
    let meter = Meter::start()?;
    let consume = client.channel.consume(&queue).prefetch(PREFETCH);
    let mut deliveries = consume.start().await?;
    let mut held = Vec::with_capacity(together);
    for _ in 0..measured(MESSAGES) {
        held.push(deliveries.next().await?.ok_or("the consumer ended")?);
        if held.len() == together {
            for delivery in held.drain(..) {
                delivery.ack();
            }
        }
    }
    client.barrier(&queue).await?;
    let sample = meter.stop(measured(MESSAGES));
    client.delete(&queue).await?;
    sample
}

#[cfg(feature = "peers")]
mod peers {
    use super::super::peers::{Amqprs, Lapin};
    use super::super::publish::peers::{amqprs_fill, lapin_fill};
    use super::*;
    use ::amqprs::channel::{BasicAckArguments, BasicConsumeArguments, BasicQosArguments};
    use ::lapin::Consumer;
    use ::lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
    use ::lapin::types::FieldTable;
    use futures_util::{StreamExt, TryStreamExt};

    type Result<T> = std::result::Result<T, Error>;

    /// Fills the queue, then asks for deliveries.
    async fn lapin_consumer() -> Result<(Lapin, String, Meter, Consumer)> {
        let client = Lapin::connect().await?;
        let queue = client.declare("consume").await?;
        lapin_fill(&client, &queue, prepared(MESSAGES)).await?;
        client.barrier(&queue).await?;
        client
            .channel
            .basic_qos(PREFETCH, BasicQosOptions::default())
            .await?;
        let meter = Meter::start()?;
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let consumer = client
            .channel
            .basic_consume(queue.as_str().into(), "".into(), options, arguments)
            .await?;
        Ok((client, queue, meter, consumer))
    }

    /// Acks every `every`th delivery, with `multiple` if that is more than one.
    pub(super) async fn lapin(every: u64) -> Result<Sample> {
        let (client, queue, meter, mut consumer) = lapin_consumer().await?;
        for n in 1..=measured(MESSAGES) {
            let delivery = consumer.next().await.ok_or("the consumer ended")??;
            if n % every == 0 {
                let multiple = every > 1;
                delivery.ack(BasicAckOptions { multiple }).await?;
            }
        }
        client.barrier(&queue).await?;
        let sample = meter.stop(measured(MESSAGES));
        client.delete(&queue).await?;
        sample
    }

    /// lapin resolves an ack only when the frame is on its way, so several are awaited together.
    pub(super) async fn lapin_joined() -> Result<Sample> {
        let (client, queue, meter, consumer) = lapin_consumer().await?;
        consumer
            .take(measured(MESSAGES) as usize)
            .try_for_each_concurrent(100, async |delivery| {
                delivery.ack(BasicAckOptions::default()).await?;
                Ok(())
            })
            .await?;
        client.barrier(&queue).await?;
        let sample = meter.stop(measured(MESSAGES));
        client.delete(&queue).await?;
        sample
    }

    /// Through the receiver rather than a consumer object: one task less on the way.
    pub(super) async fn amqprs(every: u64) -> Result<Sample> {
        let client = Amqprs::connect().await?;
        let queue = client.declare("consume").await?;
        amqprs_fill(&client, &queue, prepared(MESSAGES)).await?;
        client.barrier(&queue).await?;
        let qos = BasicQosArguments::new(0, PREFETCH, false);
        client.channel.basic_qos(qos).await?;
        let meter = Meter::start()?;
        let arguments = BasicConsumeArguments::new(&queue, "consumer");
        let (_tag, mut deliveries) = client.channel.basic_consume_rx(arguments).await?;
        for n in 1..=measured(MESSAGES) {
            let message = deliveries.recv().await.ok_or("the consumer ended")?;
            if n % every == 0 {
                let tag = message.deliver.ok_or("not a delivery")?.delivery_tag();
                let ack = BasicAckArguments::new(tag, every > 1);
                client.channel.basic_ack(ack).await?;
            }
        }
        client.barrier(&queue).await?;
        let sample = meter.stop(measured(MESSAGES));
        client.delete(&queue).await?;
        sample
    }
}
