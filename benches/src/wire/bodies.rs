//! Large messages, published and consumed at once on two connections.

use super::ours::{Ours, on_kernel};
use super::{Meter, PER_MESSAGE, measured};
use crate::harness::{Bench, Error, Sample};
use amqp::client::Message;

const BODY: usize = 1 << 20;
const MESSAGES: u64 = 200;
const PREFETCH: u16 = 10;

pub(super) fn one_mebibyte() -> Bench {
    let bench = Bench::new(
        "amqp_body_1mib",
        "1 MiB published on one connection and consumed on another, each acked; per message",
        PER_MESSAGE,
    )
    .on_all_cores()
    .with_broker()
    .ours(|| on_kernel(ours()));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("lapin", || super::peers::on_tokio(peers::lapin()))
        .peer("amqprs", || super::peers::on_tokio(peers::amqprs()));
    bench
}

async fn ours() -> Result<Sample, Error> {
    let (sender, receiver) = (Ours::connect().await?, Ours::connect().await?);
    let queue = receiver.declare("bodies").await?;
    let meter = Meter::start()?;
    let consume = receiver.channel.consume(&queue).prefetch(PREFETCH);
    let mut deliveries = consume.start().await?;
    let to = queue.clone();
    let publishing = kernel::spawn(async move {
        let body = vec![b'x'; BODY];
        for _ in 0..measured(MESSAGES) {
            let message = Message::new(&body).key(&to);
            sender.channel.publish(message).await?;
        }
        Ok::<_, amqp::client::Error>(sender)
    });
    for _ in 0..measured(MESSAGES) {
        let delivery = deliveries.next().await?.ok_or("the consumer ended")?;
        assert_eq!(delivery.body().len(), BODY);
        delivery.ack();
    }
    receiver.barrier(&queue).await?;
    let sample = meter.stop(measured(MESSAGES));
    publishing.join().await??;
    receiver.delete(&queue).await?;
    sample
}

#[cfg(feature = "peers")]
mod peers {
    use super::super::peers::{Amqprs, Lapin};
    use super::*;
    use ::amqprs::BasicProperties;
    use ::amqprs::channel::{
        BasicAckArguments, BasicConsumeArguments, BasicPublishArguments, BasicQosArguments,
    };
    use ::lapin::options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    };
    use ::lapin::types::FieldTable;
    use futures_util::StreamExt;

    type Result<T> = std::result::Result<T, Error>;

    pub(super) async fn lapin() -> Result<Sample> {
        let (sender, receiver) = (Lapin::connect().await?, Lapin::connect().await?);
        let queue = receiver.declare("bodies").await?;
        let prefetch = BasicQosOptions::default();
        receiver.channel.basic_qos(PREFETCH, prefetch).await?;
        let meter = Meter::start()?;
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let mut consumer = receiver
            .channel
            .basic_consume(queue.as_str().into(), "".into(), options, arguments)
            .await?;
        let to = queue.clone();
        let publishing = tokio::spawn(async move {
            let body = vec![b'x'; BODY];
            for _ in 0..measured(MESSAGES) {
                let options = BasicPublishOptions::default();
                let properties = ::lapin::BasicProperties::default();
                sender
                    .channel
                    .basic_publish("".into(), to.as_str().into(), options, &body, properties)
                    .await?;
            }
            Ok::<_, ::lapin::Error>(sender)
        });
        for _ in 0..measured(MESSAGES) {
            let delivery = consumer.next().await.ok_or("the consumer ended")??;
            assert_eq!(delivery.data.len(), BODY);
            delivery.ack(BasicAckOptions::default()).await?;
        }
        receiver.barrier(&queue).await?;
        let sample = meter.stop(measured(MESSAGES));
        publishing.await??;
        receiver.delete(&queue).await?;
        sample
    }

    pub(super) async fn amqprs() -> Result<Sample> {
        let (sender, receiver) = (Amqprs::connect().await?, Amqprs::connect().await?);
        let queue = receiver.declare("bodies").await?;
        let qos = BasicQosArguments::new(0, PREFETCH, false);
        receiver.channel.basic_qos(qos).await?;
        let meter = Meter::start()?;
        let arguments = BasicConsumeArguments::new(&queue, "consumer");
        let (_tag, mut deliveries) = receiver.channel.basic_consume_rx(arguments).await?;
        let to = BasicPublishArguments::new("", &queue);
        let publishing = tokio::spawn(async move {
            for _ in 0..measured(MESSAGES) {
                // It takes the body by value, so a sender that keeps it must copy.
                let body = vec![b'x'; BODY];
                sender
                    .channel
                    .basic_publish(BasicProperties::default(), body, to.clone())
                    .await?;
            }
            Ok::<_, ::amqprs::error::Error>(sender)
        });
        for _ in 0..measured(MESSAGES) {
            let message = deliveries.recv().await.ok_or("the consumer ended")?;
            assert_eq!(message.content.map(|body| body.len()), Some(BODY));
            let tag = message.deliver.ok_or("not a delivery")?.delivery_tag();
            receiver
                .channel
                .basic_ack(BasicAckArguments::new(tag, false))
                .await?;
        }
        receiver.barrier(&queue).await?;
        let sample = meter.stop(measured(MESSAGES));
        publishing.await??;
        receiver.delete(&queue).await?;
        sample
    }
}
