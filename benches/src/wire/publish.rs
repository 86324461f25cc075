//! Small messages on their way to the broker.

use super::ours::{Ours, on_kernel};
use super::{BODY, Meter, PER_MESSAGE, measured};
use crate::harness::{Bench, Error, Sample};
use amqp::client::{Confirm, Message, PublisherOptions};
use std::collections::VecDeque;

const MESSAGES: u64 = 100_000;
/// Most messages that wait for their confirm.
const WINDOW: u64 = 1000;

pub(super) fn unconfirmed() -> Bench {
    let bench = Bench::new(
        "amqp_publish",
        "100 bytes, transient, until the broker has them all; per message",
        PER_MESSAGE,
    )
    .on_all_cores()
    .with_broker()
    .ours(|| on_kernel(ours()));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("lapin", || super::peers::on_tokio(peers::lapin()))
        .peer("lapin joined", || {
            super::peers::on_tokio(peers::lapin_joined())
        })
        .peer("amqprs", || super::peers::on_tokio(peers::amqprs()));
    bench
}

pub(super) fn confirmed() -> Bench {
    let bench = Bench::new(
        "amqp_confirms",
        "100 bytes, transient, confirmed, at most 1,000 unconfirmed; per message",
        PER_MESSAGE,
    )
    .on_all_cores()
    .with_broker()
    .ours(|| on_kernel(ours_confirmed()));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("lapin", || super::peers::on_tokio(peers::lapin_confirmed()))
        .peer("lapin joined", || {
            super::peers::on_tokio(peers::lapin_confirmed_joined())
        })
        .peer("amqprs", || {
            super::peers::on_tokio(peers::amqprs_confirmed())
        });
    bench
}

async fn ours() -> Result<Sample, Error> {
    let client = Ours::connect().await?;
    let queue = client.declare("publish").await?;
    let meter = Meter::start()?;
    ours_fill(&client, &queue, measured(MESSAGES)).await?;
    client.barrier(&queue).await?;
    let sample = meter.stop(measured(MESSAGES));
    client.delete(&queue).await?;
    sample
}

pub(super) async fn ours_fill(client: &Ours, queue: &str, messages: u64) -> Result<(), Error> {
    for _ in 0..messages {
        client
            .channel
            .publish(Message::new(&BODY).key(queue))
            .await?;
    }
    Ok(())
}

/// Looks at each message's own outcome, the oldest first.
async fn ours_confirmed() -> Result<Sample, Error> {
    let client = Ours::connect().await?;
    let queue = client.declare("confirms").await?;
    let options = PublisherOptions {
        window: WINDOW as usize,
        ..PublisherOptions::default()
    };
    let publisher = client.connection.publisher(options).await?;
    let mut window: VecDeque<Confirm> = VecDeque::new();
    let meter = Meter::start()?;
    for _ in 0..measured(MESSAGES) {
        if window.len() as u64 == WINDOW {
            let oldest = window.pop_front().expect("the window is not empty");
            oldest.await?;
        }
        let message = Message::new(&BODY).key(&queue);
        window.push_back(publisher.publish(message).await?);
    }
    for confirm in window {
        confirm.await?;
    }
    let sample = meter.stop(measured(MESSAGES));
    client.delete(&queue).await?;
    sample
}

#[cfg(feature = "peers")]
pub(super) mod peers {
    use super::super::peers::{Amqprs, Lapin};
    use super::*;
    use ::amqprs::callbacks::{ChannelCallback, DefaultChannelCallback};
    use ::amqprs::channel::{BasicPublishArguments, Channel, ConfirmSelectArguments};
    use ::amqprs::{Ack, BasicProperties, Cancel, CloseChannel, Nack, Return};
    use ::lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
    use ::lapin::{Confirmation, PublisherConfirm};
    use futures_util::future::try_join_all;
    use tokio::sync::watch;

    type Result<T> = std::result::Result<T, Error>;

    /// Publishes that lapin is given at once. It resolves a publish only when the frame is on its way, so that a caller who awaits each by
    /// itself pays a change of threads for each.
    const JOINED: usize = 100;

    async fn lapin_publish(client: &Lapin, queue: &str) -> ::lapin::Result<PublisherConfirm> {
        let options = BasicPublishOptions::default();
        let properties = ::lapin::BasicProperties::default();
        client
            .channel
            .basic_publish("".into(), queue.into(), options, &BODY, properties)
            .await
    }

    pub(super) async fn lapin() -> Result<Sample> {
        let client = Lapin::connect().await?;
        let queue = client.declare("publish").await?;
        let meter = Meter::start()?;
        for _ in 0..measured(MESSAGES) {
            lapin_publish(&client, &queue).await?;
        }
        client.barrier(&queue).await?;
        let sample = meter.stop(measured(MESSAGES));
        client.delete(&queue).await?;
        sample
    }

    pub(super) async fn lapin_joined() -> Result<Sample> {
        let client = Lapin::connect().await?;
        let queue = client.declare("publish").await?;
        let meter = Meter::start()?;
        lapin_fill(&client, &queue, measured(MESSAGES)).await?;
        client.barrier(&queue).await?;
        let sample = meter.stop(measured(MESSAGES));
        client.delete(&queue).await?;
        sample
    }

    /// Publishes `messages` in groups.
    pub(in super::super) async fn lapin_fill(
        client: &Lapin,
        queue: &str,
        messages: u64,
    ) -> Result<()> {
        for _ in 0..messages / JOINED as u64 {
            try_join_all((0..JOINED).map(|_| lapin_publish(client, queue))).await?;
        }
        Ok(())
    }

    pub(super) async fn lapin_confirmed() -> Result<Sample> {
        let client = Lapin::connect().await?;
        let queue = client.declare("confirms").await?;
        client
            .channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let mut window = VecDeque::new();
        let meter = Meter::start()?;
        for _ in 0..measured(MESSAGES) {
            if window.len() as u64 == WINDOW {
                oldest_confirmed(&mut window).await?;
            }
            window.push_back(lapin_publish(&client, &queue).await?);
        }
        while !window.is_empty() {
            oldest_confirmed(&mut window).await?;
        }
        let sample = meter.stop(measured(MESSAGES));
        client.delete(&queue).await?;
        sample
    }

    pub(super) async fn lapin_confirmed_joined() -> Result<Sample> {
        let client = Lapin::connect().await?;
        let queue = client.declare("confirms").await?;
        client
            .channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let mut window = VecDeque::new();
        let meter = Meter::start()?;
        for _ in 0..measured(MESSAGES) / JOINED as u64 {
            while window.len() + JOINED > WINDOW as usize {
                oldest_confirmed(&mut window).await?;
            }
            let group = (0..JOINED).map(|_| lapin_publish(&client, &queue));
            window.extend(try_join_all(group).await?);
        }
        while !window.is_empty() {
            oldest_confirmed(&mut window).await?;
        }
        let sample = meter.stop(measured(MESSAGES));
        client.delete(&queue).await?;
        sample
    }

    async fn oldest_confirmed(window: &mut VecDeque<PublisherConfirm>) -> Result<()> {
        let oldest = window.pop_front().expect("the window is not empty");
        match oldest.await? {
            Confirmation::Ack(None) => Ok(()),
            other => Err(format!("not confirmed: {other:?}").into()),
        }
    }

    /// amqprs publishes by sending to its writer task; the properties' and arguments' strings are built anew for each message by its design.
    async fn amqprs_publish(client: &Amqprs, arguments: &BasicPublishArguments) -> Result<()> {
        let properties = BasicProperties::default();
        let content = BODY.to_vec();
        Ok(client
            .channel
            .basic_publish(properties, content, arguments.clone())
            .await?)
    }

    pub(super) async fn amqprs() -> Result<Sample> {
        let client = Amqprs::connect().await?;
        let queue = client.declare("publish").await?;
        let meter = Meter::start()?;
        amqprs_fill(&client, &queue, measured(MESSAGES)).await?;
        client.barrier(&queue).await?;
        let sample = meter.stop(measured(MESSAGES));
        client.delete(&queue).await?;
        sample
    }

    pub(in super::super) async fn amqprs_fill(
        client: &Amqprs,
        queue: &str,
        messages: u64,
    ) -> Result<()> {
        let arguments = BasicPublishArguments::new("", queue);
        for _ in 0..messages {
            amqprs_publish(client, &arguments).await?;
        }
        Ok(())
    }

    pub(super) async fn amqprs_confirmed() -> Result<Sample> {
        let client = Amqprs::connect().await?;
        let queue = client.declare("confirms").await?;
        let (report, mut confirmed) = watch::channel(0);
        let window = Window {
            confirmed: 0,
            later: VecDeque::new(),
            report,
        };
        client.channel.register_callback(window).await?;
        client
            .channel
            .confirm_select(ConfirmSelectArguments::default())
            .await?;
        let arguments = BasicPublishArguments::new("", &queue);
        let meter = Meter::start()?;
        let all = measured(MESSAGES);
        for sent in 0..all {
            // Looks before it waits: most of the time there is room.
            if *confirmed.borrow() + WINDOW <= sent {
                confirmed
                    .wait_for(|confirmed| confirmed + WINDOW > sent)
                    .await?;
            }
            amqprs_publish(&client, &arguments).await?;
        }
        confirmed.wait_for(|confirmed| *confirmed == all).await?;
        let sample = meter.stop(all);
        client.delete(&queue).await?;
        sample
    }

    /// amqprs hands over the acks as they come and leaves the counting to its caller.
    struct Window {
        /// All tags up to here are confirmed.
        confirmed: u64,
        /// Of the tags after it: which are confirmed out of order.
        later: VecDeque<bool>,
        report: watch::Sender<u64>,
    }

    impl Window {
        fn confirm(&mut self, tag: u64, multiple: bool) {
            let index = (tag - self.confirmed - 1) as usize;
            if self.later.len() <= index {
                self.later.resize(index + 1, false);
            }
            self.later[index] = true;
            if multiple {
                self.later.range_mut(..index).for_each(|done| *done = true);
            }
            while self.later.front() == Some(&true) {
                self.later.pop_front();
                self.confirmed += 1;
            }
            self.report.send_replace(self.confirmed);
        }
    }

    type Answer<T> = std::result::Result<T, ::amqprs::error::Error>;

    #[async_trait::async_trait]
    impl ChannelCallback for Window {
        async fn publish_ack(&mut self, _: &Channel, ack: Ack) {
            self.confirm(ack.delivery_tag(), ack.mutiple());
        }

        async fn publish_nack(&mut self, channel: &Channel, nack: Nack) {
            DefaultChannelCallback.publish_nack(channel, nack).await;
        }

        async fn close(&mut self, channel: &Channel, close: CloseChannel) -> Answer<()> {
            DefaultChannelCallback.close(channel, close).await
        }

        async fn cancel(&mut self, channel: &Channel, cancel: Cancel) -> Answer<()> {
            DefaultChannelCallback.cancel(channel, cancel).await
        }

        async fn flow(&mut self, channel: &Channel, active: bool) -> Answer<bool> {
            DefaultChannelCallback.flow(channel, active).await
        }

        async fn publish_return(
            &mut self,
            channel: &Channel,
            returned: Return,
            properties: BasicProperties,
            content: Vec<u8>,
        ) {
            DefaultChannelCallback
                .publish_return(channel, returned, properties, content)
                .await;
        }
    }
}
