//! From an address to a server that has said welcome: all addresses of all hosts, one after the other, handshake included.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU32, Ordering};

use kernel::net::Address;
use kernel::{Interrupt, ignore_after};

use super::Options;
use super::driver::{Input, Pipe};
use super::error::Error;
use super::tls::security;
use super::transport::Transport;
use crate::error::ReplyCode;
use crate::proto::connection::Connection as Core;
use crate::proto::event::{Down, Event};
use crate::proto::handshake::{Auth, ClientConfig};
use crate::proto::outbox::Sending;
use crate::uri::{Host, Uri};

/// Makes what belongs to one connection a stranger to every other.
static NEXT_EPOCH: AtomicU32 = AtomicU32::new(0);

/// A connection that is open, and nobody runs yet.
pub(super) struct Link {
    pub(super) pipe: Pipe,
    pub(super) core: Core,
    /// Which server it is, for people.
    pub(super) server: String,
    /// The server took no publishings before anybody could publish.
    pub(super) blocked: Option<String>,
}

/// Where connections come from.
pub(super) enum Dialer {
    Address(Box<Uri>),
    #[cfg(test)]
    Script(Box<dyn FnMut() -> std::io::Result<(Transport, ClientConfig)>>),
}

impl Dialer {
    /// Uses another password, or what stands for one.
    pub(super) fn set_secret(&mut self, secret: String) {
        match self {
            Self::Address(uri) => match &mut uri.auth {
                Auth::Password { password, .. }
                | Auth::Plain { password, .. }
                | Auth::AmqPlain { password, .. } => *password = secret,
                Auth::External => {}
            },
            #[cfg(test)]
            Self::Script(_) => {}
        }
    }

    pub(super) async fn dial(&mut self, options: &Options) -> Result<Link, Error> {
        match self {
            Self::Address(uri) => dial(uri, options).await,
            #[cfg(test)]
            Self::Script(next) => {
                let failed = |cause: String| Error::Connect {
                    to: "script".to_owned(),
                    tried: vec![cause],
                };
                let (transport, config) = next().map_err(|error| failed(error.to_string()))?;
                let shaken = shake_hands(transport, config, "script".to_owned());
                match ignore_after(options.connect_timeout, shaken).await {
                    Ok(Some(link)) => Ok(link),
                    Ok(None) => Err(failed("no answer in time".to_owned())),
                    Err(Failure::Interrupted(interrupt)) => Err(interrupt.into()),
                    Err(failure) => Err(failed(failure.to_string())),
                }
            }
        }
    }
}

/// Tries hosts in random order, so that clients spread, and all addresses of each.
async fn dial(uri: &Uri, options: &Options) -> Result<Link, Error> {
    let security = security(uri, options)?;
    let timeout = uri.connection_timeout.unwrap_or(options.connect_timeout);
    let mut tried = Vec::new();
    for host in shuffled(&uri.hosts) {
        let address = Address::from((host.name.as_str(), host.port));
        let found = ignore_after(timeout, async { Ok(address.resolve().await?) }).await;
        let peers = match found {
            Ok(Some(peers)) if !peers.is_empty() => peers,
            Ok(Some(_)) => {
                tried.push(format!("{host}: the name has no address"));
                continue;
            }
            Ok(None) => {
                let secs = timeout.as_secs_f64();
                tried.push(format!("{host}: the name was not found within {secs} s"));
                continue;
            }
            Err(Failure::Interrupted(interrupt)) => return Err(interrupt.into()),
            Err(failure) => {
                tried.push(format!("{host}: {failure}"));
                continue;
            }
        };
        for peer in peers {
            let server = if host.name.parse::<std::net::IpAddr>().is_ok() {
                host.to_string()
            } else {
                format!("{host} ({peer})")
            };
            let attempt = async {
                let transport = Transport::connect(uri, host, peer, security.as_ref()).await?;
                shake_hands(transport, config(uri, options), server.clone()).await
            };
            match ignore_after(timeout, attempt).await {
                Ok(Some(link)) => return Ok(link),
                Ok(None) => {
                    let secs = timeout.as_secs_f64();
                    tried.push(format!("{server}: no answer within {secs} s"));
                }
                Err(Failure::Interrupted(interrupt)) => return Err(interrupt.into()),
                Err(Failure::Down(down)) if down.is_final() => {
                    return Err(refused(server, uri, down));
                }
                Err(failure) => {
                    // The address once is enough.
                    let (text, again) =
                        (failure.to_string(), format!("cannot connect to {peer}: "));
                    let text = text.strip_prefix(&again).unwrap_or(&text);
                    tried.push(format!("{server}: {text}"));
                }
            }
        }
    }
    let to = uri.to_string();
    Err(Error::Connect { to, tried })
}

fn config(uri: &Uri, options: &Options) -> ClientConfig {
    let mut limits = uri.limits;
    limits.heartbeat = limits.heartbeat.or(options.heartbeat);
    let name = uri.connection_name.as_ref().or(options.name.as_ref());
    ClientConfig {
        auth: uri.auth.clone(),
        virtual_host: uri.virtual_host.clone(),
        limits,
        name: name.cloned().unwrap_or_default(),
    }
}

/// Leads a handshake to its end.
pub(super) async fn shake_hands(
    transport: Transport,
    config: ClientConfig,
    server: String,
) -> Result<Link, Failure> {
    let epoch = NEXT_EPOCH.fetch_add(1, Ordering::Relaxed);
    let mut core = Core::new(config, epoch, kernel::now());
    let (mut input, mut sending) = (Input::new(), Sending::default());
    let (mut down, mut blocked) = (None, None);
    loop {
        sending.fill(&mut core);
        while !sending.rest().is_empty() {
            match transport.write(sending.rest()).await {
                Ok(n) => sending.advance(n),
                // The answer to a refusal is a courtesy.
                Err(_) if down.is_some() => break,
                Err(error) => return Err(error.into()),
            }
            core.wrote(kernel::now());
        }
        if let Some(down) = down {
            return Err(Failure::Down(down));
        }
        if core.tuned().is_some() {
            return Ok(Link {
                pipe: Pipe { transport, input },
                core,
                server,
                blocked,
            });
        }
        let read = transport.read(input.space()).await?;
        let mut note = |event: Event<'_>| match event {
            Event::Down(why) => down = Some(why.clone()),
            Event::Blocked(reason) => blocked = Some(reason.to_owned()),
            Event::Unblocked => blocked = None,
            _ => {}
        };
        if read == 0 {
            core.stream_ended(None, &mut note);
        } else {
            input.feed(read, |bytes| core.feed(bytes, kernel::now(), &mut note));
        }
    }
}

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Io(std::io::Error),
    #[error(transparent)]
    Down(Down),
    #[error(transparent)]
    Interrupted(#[from] Interrupt),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match kernel::MaybeInterrupt::interrupt(&error) {
            Some(interrupt) => Self::Interrupted(interrupt.clone()),
            None => Self::Io(error),
        }
    }
}

impl kernel::MaybeInterrupt for Failure {
    fn interrupt(&self) -> Option<&Interrupt> {
        match self {
            Self::Interrupted(interrupt) => Some(interrupt),
            Self::Io(_) | Self::Down(_) => None,
        }
    }
}

/// A refusal that the next attempt would meet again.
fn refused(server: String, uri: &Uri, down: Down) -> Error {
    match down {
        Down::ClosedByPeer(reason) if reason.code == ReplyCode::ACCESS_REFUSED => {
            let user = match &uri.auth {
                Auth::Password { user, .. }
                | Auth::Plain { user, .. }
                | Auth::AmqPlain { user, .. } => user.clone(),
                Auth::External => "of the certificate".to_owned(),
            };
            Error::LoginRefused {
                server,
                user,
                reason,
            }
        }
        Down::ClosedByPeer(reason) => Error::VirtualHost {
            server,
            name: uri.virtual_host.clone(),
            reason,
        },
        down => Error::Connect {
            to: uri.to_string(),
            tried: vec![format!("{server}: {down}")],
        },
    }
}

/// Chance from the standard library's own hasher: not for secrets, good enough to spread clients.
pub(super) fn chance(n: u64) -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(n);
    hasher.finish()
}

fn shuffled(hosts: &[Host]) -> Vec<&Host> {
    let mut hosts: Vec<_> = hosts.iter().collect();
    for i in (1..hosts.len()).rev() {
        hosts.swap(i, (chance(i as u64) % (i as u64 + 1)) as usize);
    }
    hosts
}
