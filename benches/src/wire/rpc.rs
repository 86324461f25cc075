//! A question and its answer over two queues and two connections, one at a time.

use super::ours::{Ours, on_kernel};
use super::{BODY, Meter, measured};
use crate::harness::{Bench, Better, Error, Figure, Sample};
use amqp::client::{Cap, Consumer, Message};
use amqp::wire::Properties;
use std::time::{Duration, Instant};

const CALLS: u64 = 3000;
/// Calls before those that count.
const WARM_UP: u64 = 200;

pub(super) fn round_trips() -> Bench {
    const FIGURES: &[Figure] = &[
        Figure {
            key: "p50_us",
            unit: "us, median call",
            better: Better::Less,
        },
        Figure {
            key: "cpu_us",
            unit: "us CPU, both ends",
            better: Better::Less,
        },
        Figure {
            key: "broker_us",
            unit: "us broker CPU",
            better: Better::Less,
        },
    ];
    let bench = Bench::new(
        "amqp_rpc",
        "100 bytes there and back over two queues and two connections, no acks; per call",
        FIGURES,
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

/// The meter's sample with the median of the calls.
fn with_median(meter: Meter, mut calls: Vec<Duration>) -> Result<Sample, Error> {
    let mut sample = meter.stop(calls.len() as u64)?;
    calls.sort_unstable();
    let median = calls[calls.len() / 2];
    sample.insert("p50_us".into(), median.as_secs_f64() * 1e6);
    Ok(sample)
}

async fn ours() -> Result<Sample, Error> {
    let (caller, callee) = (Ours::connect().await?, Ours::connect().await?);
    let (questions, answers) = (
        callee.declare("ask").await?,
        caller.declare("answer").await?,
    );
    let mut answered = ours_consumer(&caller, &answers).await?;
    let mut asked = ours_consumer(&callee, &questions).await?;
    let answering = kernel::spawn(async move {
        for _ in 0..WARM_UP + measured(CALLS) {
            let question = asked.next().await?.ok_or("the consumer ended")?;
            let to = question.props().reply_to().ok_or("no reply_to")?;
            let properties = Properties {
                correlation_id: question.props().correlation_id(),
                ..Default::default()
            };
            let answer = Message::new(question.body()).key(to);
            callee
                .channel
                .publish(answer.properties(&properties))
                .await?;
        }
        Ok::<_, Error>(callee)
    });
    let mut calls = Vec::with_capacity(CALLS as usize);
    let mut meter = Meter::start()?;
    for n in 0..WARM_UP + measured(CALLS) {
        if n == WARM_UP {
            meter = Meter::start()?;
        }
        let begin = Instant::now();
        let id = n.to_string();
        let properties = Properties {
            reply_to: Some(&answers),
            correlation_id: Some(&id),
            ..Default::default()
        };
        let question = Message::new(&BODY).key(&questions);
        caller
            .channel
            .publish(question.properties(&properties))
            .await?;
        let answer = answered.next().await?.ok_or("the consumer ended")?;
        assert_eq!(answer.body(), BODY);
        if n >= WARM_UP {
            calls.push(begin.elapsed());
        }
    }
    let sample = with_median(meter, calls);
    let callee = answering.join().await??;
    callee.delete(&questions).await?;
    caller.delete(&answers).await?;
    sample
}

async fn ours_consumer(client: &Ours, queue: &str) -> Result<Consumer, Error> {
    // Never more than one is on its way.
    let cap = Cap {
        count: 16,
        bytes: 1 << 20,
    };
    Ok(client.channel.consume(queue).no_ack(cap).start().await?)
}

#[cfg(feature = "peers")]
mod peers {
    use super::super::peers::{Amqprs, Lapin};
    use super::*;
    use ::amqprs::BasicProperties;
    use ::amqprs::channel::{BasicConsumeArguments, BasicPublishArguments, ConsumerMessage};
    use ::lapin::Consumer;
    use ::lapin::options::{BasicConsumeOptions, BasicPublishOptions};
    use ::lapin::types::FieldTable;
    use futures_util::StreamExt;
    use tokio::sync::mpsc::UnboundedReceiver;

    type Result<T> = std::result::Result<T, Error>;

    pub(super) async fn lapin() -> Result<Sample> {
        let (caller, callee) = (Lapin::connect().await?, Lapin::connect().await?);
        let (questions, answers) = (
            callee.declare("ask").await?,
            caller.declare("answer").await?,
        );
        let mut answered = lapin_consumer(&caller, &answers).await?;
        let mut asked = lapin_consumer(&callee, &questions).await?;
        let answering = tokio::spawn(async move {
            for _ in 0..WARM_UP + measured(CALLS) {
                let question = asked.next().await.ok_or("the consumer ended")??;
                let to = question
                    .properties
                    .reply_to()
                    .as_ref()
                    .ok_or("no reply_to")?;
                let mut properties = ::lapin::BasicProperties::default();
                if let Some(id) = question.properties.correlation_id() {
                    properties = properties.with_correlation_id(id.clone());
                }
                lapin_send(&callee, to.as_str(), &question.data, properties).await?;
            }
            Ok::<_, Error>(callee)
        });
        let mut calls = Vec::with_capacity(CALLS as usize);
        let mut meter = Meter::start()?;
        for n in 0..WARM_UP + measured(CALLS) {
            if n == WARM_UP {
                meter = Meter::start()?;
            }
            let begin = Instant::now();
            let properties = ::lapin::BasicProperties::default()
                .with_reply_to(answers.as_str().into())
                .with_correlation_id(n.to_string().into());
            lapin_send(&caller, &questions, &BODY, properties).await?;
            let answer = answered.next().await.ok_or("the consumer ended")??;
            assert_eq!(answer.data, BODY);
            if n >= WARM_UP {
                calls.push(begin.elapsed());
            }
        }
        let sample = with_median(meter, calls);
        let callee = answering.await??;
        callee.delete(&questions).await?;
        caller.delete(&answers).await?;
        sample
    }

    async fn lapin_consumer(client: &Lapin, queue: &str) -> Result<Consumer> {
        let options = BasicConsumeOptions {
            no_ack: true,
            ..Default::default()
        };
        let arguments = FieldTable::default();
        Ok(client
            .channel
            .basic_consume(queue.into(), "".into(), options, arguments)
            .await?)
    }

    async fn lapin_send(
        client: &Lapin,
        queue: &str,
        body: &[u8],
        properties: ::lapin::BasicProperties,
    ) -> Result<()> {
        let options = BasicPublishOptions::default();
        client
            .channel
            .basic_publish("".into(), queue.into(), options, body, properties)
            .await?;
        Ok(())
    }

    pub(super) async fn amqprs() -> Result<Sample> {
        let (caller, callee) = (Amqprs::connect().await?, Amqprs::connect().await?);
        let (questions, answers) = (
            callee.declare("ask").await?,
            caller.declare("answer").await?,
        );
        let mut answered = amqprs_consumer(&caller, &answers).await?;
        let mut asked = amqprs_consumer(&callee, &questions).await?;
        let answering = tokio::spawn(async move {
            for _ in 0..WARM_UP + measured(CALLS) {
                let question = asked.recv().await.ok_or("the consumer ended")?;
                let about = question.basic_properties.ok_or("no properties")?;
                let to = about.reply_to().ok_or("no reply_to")?;
                let mut properties = BasicProperties::default();
                if let Some(id) = about.correlation_id() {
                    properties.with_correlation_id(id);
                }
                let body = question.content.ok_or("no content")?;
                let arguments = BasicPublishArguments::new("", to);
                callee
                    .channel
                    .basic_publish(properties, body, arguments)
                    .await?;
            }
            Ok::<_, Error>(callee)
        });
        let arguments = BasicPublishArguments::new("", &questions);
        let mut calls = Vec::with_capacity(CALLS as usize);
        let mut meter = Meter::start()?;
        for n in 0..WARM_UP + measured(CALLS) {
            if n == WARM_UP {
                meter = Meter::start()?;
            }
            let begin = Instant::now();
            let properties = BasicProperties::default()
                .with_reply_to(&answers)
                .with_correlation_id(&n.to_string())
                .finish();
            let (body, arguments) = (BODY.to_vec(), arguments.clone());
            caller
                .channel
                .basic_publish(properties, body, arguments)
                .await?;
            let answer = answered.recv().await.ok_or("the consumer ended")?;
            assert_eq!(answer.content.as_deref(), Some(&BODY[..]));
            if n >= WARM_UP {
                calls.push(begin.elapsed());
            }
        }
        let sample = with_median(meter, calls);
        let callee = answering.await??;
        callee.delete(&questions).await?;
        caller.delete(&answers).await?;
        sample
    }

    async fn amqprs_consumer(
        client: &Amqprs,
        queue: &str,
    ) -> Result<UnboundedReceiver<ConsumerMessage>> {
        let arguments = BasicConsumeArguments::new(queue, "consumer")
            .manual_ack(false)
            .finish();
        let (_tag, deliveries) = client.channel.basic_consume_rx(arguments).await?;
        Ok(deliveries)
    }
}
