//! An app: functions, a broker, workers, and a life cycle.
//!
//! ```no_run
//! let mut app = olive::App::new(olive::Config::from_env()?);
//! app.task("add", |_, (a, b): (i64, i64)| Ok(a + b));
//! app.start()?;
//! # Ok::<(), olive::Error>(())
//! ```
//!
//! **Connections come and go, tasks stay.** A task of the kernel holds a *session*: connect, declare, consume, hand every delivery to
//! [`Dispatch`], until the connection is lost; then wait a little, and again. Tasks that run meanwhile run on. What they want to
//! publish waits for the next session, and the deliveries they belong to come anew over it and find them in the ledger.
//!
//! **Leaving has three steps.** *Quiet* on the first signal: the consumer is cancelled, tasks that had not begun go back to
//! the queue, those that run end and are settled. *Gone* when that is done, or the grace is over. *At once* on the second signal:
//! the kernel is dropped, and with it every worker process; what was not acked, the broker gives to others.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use amqp::client::{self, Connection, Consumer, Options};
use amqp::error::ReplyCode;
use amqp::uri::Uri;
use kernel::signal::{SIGINT, SIGTERM, SignalQueue};
use kernel::sync::Event;
use kernel::{Interrupt, Task};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{Config, Url, WorkerType};
use crate::dispatch::Dispatch;
use crate::error::Error;
use crate::outbox::Pause;
use crate::pool::Workers;
use crate::pool::process::serve_if_child;
use crate::registry::{Ctx, Registry};
use crate::retry::TaskResult;
use crate::stats::Stats;

/// First wait before connecting again.
const RECONNECT_FIRST: Duration = Duration::from_millis(200);
/// How long the broker may take to agree that no more deliveries shall come, and to say goodbye.
const GOODBYE_WITHIN: Duration = Duration::from_secs(2);

/// Settings and functions; [`App::start`] runs them.
#[derive(Debug)]
pub struct App {
    config: Config,
    registry: Registry,
    /// What the banner calls the broker, if not by its address.
    broker: Option<&'static str>,
}

impl App {
    /// An app without functions.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            registry: Registry::default(),
            broker: None,
        }
    }

    /// Its settings.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Another broker than the settings', and what to call it.
    pub(crate) fn set_broker(&mut self, url: Url, name: &'static str) {
        self.config.amqp_url = url;
        self.broker = Some(name);
    }

    /// Registers a function under a name; see [`registry`](crate::registry) for what it may take. A second one of the same name replaces
    /// the first.
    pub fn task<A, R>(
        &mut self,
        name: impl Into<String>,
        function: impl Fn(&Ctx, A) -> TaskResult<R> + Send + Sync + 'static,
    ) -> &mut Self
    where
        A: DeserializeOwned,
        R: Serialize,
    {
        self.registry.add(name, function);
        self
    }

    /// Connects and runs tasks until SIGTERM or Ctrl-C, then finishes what runs. Returns when that is done. Must be called by the thread that the program
    /// began with, before it starts others: worker processes are this program again, and end here.
    ///
    /// # Errors
    /// [`Error::Unreachable`], [`Error::LoginRefused`], [`Error::Mismatch`], [`Error::Broker`] if it cannot begin; [`Error::WorkerBoot`];
    /// [`Error::Forced`] if tasks were left unfinished, because of a second signal or because the grace was over.
    pub fn start(self) -> Result<(), Error> {
        if let Some(served) = self.serve_if_child() {
            return served;
        }
        in_kernel(async move {
            let signals = SignalQueue::new(&[SIGTERM, SIGINT])
                .map_err(|cause| system("watching for signals", cause))?;
            let app = match race(self.launch(), signals.next()).await {
                Either::Left(launched) => launched?,
                Either::Right(_) => return Ok(()), // nothing had begun
            };
            app.until(&signals).await
        })
    }

    /// In a program that was started as a worker process: serves until its app goes, then `Some`. [`App::start`] does it first
    /// of all; a program that does something else before calls this before that.
    pub fn serve_if_child(&self) -> Option<Result<(), Error>> {
        let served = serve_if_child(&self.registry)?;
        Some(served.map_err(|cause| system("serving as a worker process", cause)))
    }

    /// Connects, starts the first worker and consumes, inside a kernel.
    ///
    /// # Errors
    /// As [`App::start`].
    pub async fn launch(self) -> Result<Running, Error> {
        let Self {
            config,
            registry,
            broker,
        } = self;
        for warning in config.warnings() {
            log::warn!("{warning}");
        }
        let registry = Arc::new(registry);
        let workers = Workers::new(&config, registry.clone());
        banner(&config, &registry, &workers, broker);
        let dispatch = Rc::new(Dispatch::new(config, workers));
        let mut session = Session::open(&dispatch.config).await?;
        dispatch.workers.warm_up().await?;
        session.consume(&dispatch.config).await?;
        log::info!(
            "ready: taking tasks from queue {}",
            dispatch.config.queue_name
        );
        let life = Rc::new(Life::default());
        let sessions = kernel::spawn(sessions(dispatch.clone(), life.clone(), session));
        sessions.set_name("olive sessions");
        Ok(Running {
            dispatch,
            life,
            sessions,
        })
    }
}

fn banner(config: &Config, registry: &Registry, workers: &Workers, broker: Option<&str>) {
    let url = config.amqp_url.to_string();
    log::info!(
        "olive {}: broker {}, exchange {}, key {}, queue {}, prefetch {}",
        env!("CARGO_PKG_VERSION"),
        broker.unwrap_or(&url),
        config.exchange_name,
        config.routing_key,
        config.queue_name,
        config.prefetch(),
    );
    log::info!("workers: {}", workers.describe(config.num_workers.0));
    let names: Vec<&str> = registry.names().collect();
    log::info!("Rust functions: {}", names.join(", "));
    let limit = config.show("olive_task_timeout").unwrap_or_default();
    log::info!(
        "time limit {limit}, {} retries, {} after a dead worker",
        config.max_retries,
        config.max_crashes
    );
    let threads = config.worker_type == WorkerType::Thread;
    if threads && config.task_timeout.is_some() {
        log::warn!(
            "a thread that runs past olive_task_timeout cannot be killed; a process can (olive_worker_worker_type=process)"
        );
    }
}

/// Where an app stands.
#[derive(Debug, Default)]
struct Life {
    /// Nothing new shall be taken.
    quiet: Event,
    /// Nothing new is taken.
    is_quiet: Event,
}

/// An app that runs, inside a kernel. Dropping it leaves it running; it ends with its kernel.
#[derive(Debug)]
pub struct Running {
    dispatch: Rc<Dispatch>,
    life: Rc<Life>,
    sessions: Task<()>,
}

impl Running {
    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.dispatch.stats
    }

    /// How many tasks run, or are being settled.
    #[must_use]
    pub fn active(&self) -> usize {
        self.dispatch.active()
    }

    /// Runs until a signal comes, then leaves: in order after the first one, at once after the second.
    ///
    /// # Errors
    /// [`Error::Forced`].
    pub async fn until(&self, signals: &SignalQueue) -> Result<(), Error> {
        let first = signals.next().await;
        first.map_err(|cause| system("waiting for signals", cause))?;
        match race(self.leave(), signals.next()).await {
            Either::Left(left) => left,
            Either::Right(_) => {
                let unfinished = self.active();
                log::warn!("second signal: leaving {unfinished} tasks unfinished");
                Err(Error::Forced { unfinished })
            }
        }
    }

    /// Takes nothing new, lets what runs end within `olive_shutdown_grace`, and closes the connection.
    ///
    /// # Errors
    /// [`Error::Forced`] if tasks were left unfinished.
    pub async fn leave(&self) -> Result<(), Error> {
        let Self {
            dispatch,
            life,
            sessions,
        } = self;
        life.quiet.set();
        life.is_quiet.wait().await.map_err(interrupted)?;
        log::info!("draining: {} tasks run", dispatch.active());
        let grace = dispatch.config.shutdown_grace;
        let done = kernel::ignore_after(grace, dispatch.idle()).await;
        let unfinished = match done.map_err(interrupted)? {
            Some(()) => 0,
            None => dispatch.active(),
        };
        if unfinished > 0 {
            log::warn!("olive_shutdown_grace is over, {unfinished} tasks are unfinished");
            return Err(Error::Forced { unfinished });
        }
        dispatch.workers.close().await.map_err(interrupted)?;
        sessions.cancel().await.map_err(interrupted)?;
        log::info!("left: {}", dispatch.stats);
        Ok(())
    }
}

/// Holds one session after the other, until it is cancelled.
async fn sessions(dispatch: Rc<Dispatch>, life: Rc<Life>, first: Session) {
    let mut session = Some(first);
    let mut pause = Pause::new(RECONNECT_FIRST, dispatch.config.reconnect_max);
    loop {
        let mut current = match session.take() {
            Some(session) => session,
            None => match reopen(&dispatch, &life, &mut pause).await {
                Ok(session) => session,
                Err(_) => return,
            },
        };
        let connection = current.connection.clone();
        dispatch.outbox.attach(connection.clone());
        let lost = current.hold(&dispatch, &life).await;
        dispatch.outbox.detach();
        match lost {
            Err(client::Error::Interrupted(_)) => {
                let goodbye = kernel::shield(connection.close(GOODBYE_WITHIN)).await;
                if let Ok(closed) = goodbye
                    && closed.unconfirmed > 0
                {
                    log::warn!("{} messages were not confirmed", closed.unconfirmed);
                }
                return;
            }
            Err(why) => log::warn!("lost the broker: {why}"),
            Ok(()) => log::warn!("lost the broker: the consumer ended"),
        }
        // A consumer may end alone; then the deliveries that are out must become void before the next one starts.
        let _ = connection.close(GOODBYE_WITHIN).await;
        dispatch.stats.reconnected();
    }
}

/// Connects until it works.
async fn reopen(dispatch: &Dispatch, life: &Life, pause: &mut Pause) -> Result<Session, Interrupt> {
    loop {
        let wait = pause.take();
        log::info!("connecting again in {:.1} s", wait.as_secs_f64());
        if life.quiet.is_set() {
            quieten(dispatch, life);
        }
        kernel::sleep(wait).await?;
        match Session::open(&dispatch.config).await {
            Ok(mut session) => {
                let consumes = match life.quiet.is_set() {
                    true => Ok(()),
                    false => session.consume(&dispatch.config).await,
                };
                match consumes {
                    Ok(()) => {
                        log::info!("connected again");
                        *pause = Pause::new(RECONNECT_FIRST, dispatch.config.reconnect_max);
                        return Ok(session);
                    }
                    Err(error) => log::warn!("{error}"),
                }
            }
            Err(error) => log::warn!("{error}"),
        }
        if kernel::current_task().is_cancelled() {
            return Err(Interrupt::cancelled());
        }
    }
}

fn quieten(dispatch: &Dispatch, life: &Life) {
    dispatch.workers.quiet();
    life.is_quiet.set();
}

/// One connection, with everything declared.
#[derive(Debug)]
struct Session {
    connection: Connection,
    consumer: Option<Consumer>,
}

impl Session {
    async fn open(config: &Config) -> Result<Self, Error> {
        let connection = connect(config, "olive run").await?;
        declare(&connection, config).await?;
        Ok(Self {
            connection,
            consumer: None,
        })
    }

    async fn consume(&mut self, config: &Config) -> Result<(), Error> {
        let start = async {
            let channel = self.connection.channel().await?;
            let consume = channel.consume(&config.queue_name.0);
            consume.prefetch(config.prefetch()).start().await
        };
        self.consumer = Some(start.await.map_err(|error| broker(config, &error))?);
        Ok(())
    }

    /// Takes deliveries until the app is quiet or the connection is lost; in quiet, keeps the connection for what is still to be
    /// published. Answers with what ended it.
    async fn hold(&mut self, dispatch: &Rc<Dispatch>, life: &Life) -> Result<(), client::Error> {
        if let Some(mut consumer) = self.consumer.take() {
            consume_until_quiet(&mut consumer, dispatch, life).await?;
            let cancelled = kernel::ignore_after(GOODBYE_WITHIN, consumer.cancel()).await?;
            if cancelled.is_none() {
                log::warn!("the broker does not answer; draining all the same");
            }
        }
        // Only now: what goes back to the queue must not come to us again.
        quieten(dispatch, life);
        let down = self.connection.closed().await?;
        Err(client::Error::from(down))
    }
}

async fn consume_until_quiet(
    consumer: &mut Consumer,
    dispatch: &Rc<Dispatch>,
    life: &Life,
) -> Result<(), client::Error> {
    loop {
        match race(consumer.next(), life.quiet.wait()).await {
            Either::Left(Ok(Some(delivery))) => dispatch.take(delivery),
            Either::Left(Ok(None)) => return Err(client::Error::Closed),
            Either::Left(Err(error)) => return Err(error),
            Either::Right(quiet) => return Ok(quiet?),
        }
    }
}

/// Connects as the settings say.
pub(crate) async fn connect(config: &Config, name: &str) -> Result<Connection, Error> {
    let url = &config.amqp_url;
    let uri: Uri = url.0.parse().map_err(|error| {
        Error::Config(vec![format!(
            "olive_amqp_url={:?} {error} (from {})",
            url.to_string(),
            config.origin("olive_amqp_url")
        )])
    })?;
    let heartbeat = u16::try_from(config.heartbeat.as_secs()).unwrap_or(u16::MAX);
    let options = Options {
        heartbeat: Some(heartbeat),
        name: Some(format!("{name} {}", std::process::id())),
        // Sessions end with their connection; deliveries that come anew find their tasks in the ledger.
        recovery: None,
        ..Options::default()
    };
    let url = url.to_string();
    client::connect_to(&uri, options).await.map_err(|error| {
        let cause = error.to_string();
        match error {
            client::Error::Connect { tried, .. } => Error::Unreachable {
                url,
                cause: match &tried[..] {
                    // Its host is in the address.
                    [only] => only
                        .split_once(": ")
                        .map_or(&only[..], |(_, why)| why)
                        .to_owned(),
                    several => several.join("; "),
                },
            },
            client::Error::LoginRefused { user, reason, .. } => Error::LoginRefused {
                url,
                user,
                cause: reason.code.name().to_owned(),
            },
            client::Error::VirtualHost { name, reason, .. } => Error::Broker {
                url,
                cause: format!(
                    "it does not open the virtual host {name:?} ({reason}); the last part of olive_amqp_url names it, %2F is the usual one"
                ),
            },
            _ => Error::Broker { url, cause },
        }
    })
}

/// Makes exchange, queue and binding. What is there already stays: a broker's refusal to make it again only counts where it
/// would cost messages.
async fn declare(connection: &Connection, config: &Config) -> Result<(), Error> {
    let (exchange, queue) = (&config.exchange_name.0, &config.queue_name.0);
    let failed = |error: client::Error| broker(config, &error);
    let channel = connection.channel().await.map_err(failed)?;
    if !exchange.is_empty() {
        let mut wanted = channel.exchange(exchange, "direct");
        if config.durable {
            wanted = wanted.durable();
        }
        if let Err(error) = wanted.declare().await {
            let name = format!("exchange \"{exchange}\"");
            accept_what_is_there(&name, &error, config)?;
            let channel = connection.channel().await.map_err(failed)?;
            let there = channel.exchange(exchange, "direct").passive().declare();
            there.await.map_err(failed)?;
        }
    }
    let channel = connection.channel().await.map_err(failed)?;
    let mut wanted = channel.queue(queue);
    if config.durable {
        wanted = wanted.durable();
    }
    if let Err(error) = wanted.declare().await {
        let name = format!("queue \"{queue}\"");
        accept_what_is_there(&name, &error, config)?;
        let channel = connection.channel().await.map_err(failed)?;
        let there = channel.queue(queue).passive().declare();
        there.await.map_err(failed)?;
    }
    if !exchange.is_empty() {
        let channel = connection.channel().await.map_err(failed)?;
        let bound = channel.bind_queue(queue, exchange, &config.routing_key.0);
        bound.await.map_err(failed)?;
    }
    Ok(())
}

/// Whether something that the broker does not declare as we want it will do.
fn accept_what_is_there(name: &str, error: &client::Error, config: &Config) -> Result<(), Error> {
    let cause = match error {
        client::Error::ChannelClosed(reason) => &reason.text,
        error => return Err(broker(config, error)),
    };
    match error.reply_code() {
        // Others may have given it a type, a length, a priority: that is theirs to decide. Whether it survives the broker is a promise of ours.
        Some(ReplyCode::PRECONDITION_FAILED) if cause.contains("'durable'") => {
            Err(Error::Mismatch {
                name: name.to_owned(),
                cause: cause.clone(),
                keep: if config.durable { "false" } else { "true" },
            })
        }
        Some(ReplyCode::PRECONDITION_FAILED | ReplyCode::ACCESS_REFUSED) => {
            log::info!("{name} is used as it is: {cause}");
            Ok(())
        }
        _ => Err(Error::Broker {
            url: config.amqp_url.to_string(),
            cause: format!("{name}: {cause}"),
        }),
    }
}

pub(crate) fn broker(config: &Config, error: &client::Error) -> Error {
    Error::Broker {
        url: config.amqp_url.to_string(),
        cause: error.to_string(),
    }
}

/// Runs `main` in a kernel of its own, with the errors of both as one.
///
/// # Errors
/// Those of `main`; [`Error::System`] for the kernel's.
pub fn in_kernel<T>(main: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match kernel::run(main) {
        Ok(ended) => ended,
        Err(error) => Err(system(
            "running the kernel",
            std::io::Error::other(error.to_string()),
        )),
    }
}

pub(crate) fn system(what: &str, cause: std::io::Error) -> Error {
    Error::System {
        what: what.to_owned(),
        cause,
    }
}

pub(crate) fn interrupted(interrupt: Interrupt) -> Error {
    system("interrupted", interrupt.into())
}

/// The first of two.
pub(crate) enum Either<A, B> {
    Left(A),
    Right(B),
}

/// Waits for whichever comes first and drops the other.
pub(crate) async fn race<A: Future, B: Future>(a: A, b: B) -> Either<A::Output, B::Output> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    poll_fn(|cx| {
        if let Poll::Ready(a) = a.as_mut().poll(cx) {
            return Poll::Ready(Either::Left(a));
        }
        b.as_mut().poll(cx).map(Either::Right)
    })
    .await
}
