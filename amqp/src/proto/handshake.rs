//! From the protocol header to `connection.open-ok`, for both sides.
//!
//! A state is an enum variant named for what we wait for, with the data known by then inside; a step consumes it.

use std::fmt;

use thiserror::Error;

use crate::error::{EncodeError, ReplyCode, WireError};
use crate::wire::cold::{self, FieldTable, LongString, Method, connection};
use crate::wire::frame::{FRAME_MIN, PROTOCOL_HEADER};
use crate::wire::{Table, TableBuf, Value};

/// What both sides have agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuned {
    /// How many channels may be open at once, never 0.
    pub channel_max: u16,
    /// The largest frame in bytes, with its eight of overhead, never less than [`FRAME_MIN`].
    pub frame_max: u32,
    /// Seconds; 0 is no heartbeats.
    pub heartbeat: u16,
}

/// What one side would like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// At most so many channels; 0 leaves it to the other side.
    pub channel_max: u16,
    /// At most so large a frame, in bytes; 0 leaves it to the other side.
    pub frame_max: u32,
    /// Seconds, 0 for none; `None` leaves it to the other side.
    pub heartbeat: Option<u16>,
}

impl Limits {
    /// RabbitMQ's: 2047 channels, 128 KiB, 60 s.
    pub const RABBITMQ: Self = Self {
        channel_max: 2047,
        frame_max: 131_072,
        heartbeat: Some(60),
    };
}

impl Default for Limits {
    /// Whatever the server says, up to 65535 channels and 128 KiB frames.
    fn default() -> Self {
        Self {
            channel_max: 0,
            frame_max: 131_072,
            heartbeat: None,
        }
    }
}

/// What the client answers to a server's `tune`: the smaller of what each says, where 0 says nothing. For the heartbeat the
/// client's 0 means none, and wins: that is what the user asked for, and servers accept it.
pub fn negotiate(client: Limits, server: Tuned) -> Tuned {
    fn smaller<T: Ord + Default + Copy>(a: T, b: T) -> T {
        let zero = T::default();
        if a == zero || (b != zero && b < a) {
            b
        } else {
            a
        }
    }
    let channel_max = smaller(client.channel_max, server.channel_max);
    let frame_max = smaller(client.frame_max, server.frame_max);
    Tuned {
        channel_max: if channel_max == 0 {
            u16::MAX
        } else {
            channel_max
        },
        // No side has a limit: keep one, so that a frame cannot ask for 4 GiB.
        frame_max: if frame_max == 0 {
            Limits::default().frame_max
        } else {
            frame_max.max(FRAME_MIN as u32)
        },
        heartbeat: match client.heartbeat {
            None => server.heartbeat,
            Some(0) => 0,
            Some(ours) => smaller(ours, server.heartbeat),
        },
    }
}

/// How to prove who we are. Secrets stay out of `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub enum Auth {
    /// Name and password, by whichever mechanism for them the server offers: PLAIN if it does, else AMQPLAIN.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// SASL PLAIN: name and password.
    Plain {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// AMQPLAIN: the same in a field table, from AMQP 0-8.
    AmqPlain {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// By the TLS certificate.
    External,
}

impl Auth {
    /// The mechanisms that will do, as servers list them, the best first.
    pub fn mechanisms(&self) -> &'static [&'static str] {
        match self {
            Self::Password { .. } => &["PLAIN", "AMQPLAIN"],
            Self::Plain { .. } => &["PLAIN"],
            Self::AmqPlain { .. } => &["AMQPLAIN"],
            Self::External => &["EXTERNAL"],
        }
    }

    /// The mechanism for a server that offers these, separated by blanks, and the bytes of `start-ok`'s response.
    ///
    /// # Errors
    /// [`HandshakeError::Mechanism`].
    pub fn answer(&self, offered: &str) -> Result<(&'static str, Vec<u8>), HandshakeError> {
        let is_offered = |ours: &&&str| offered.split(' ').any(|theirs| theirs == **ours);
        let Some(mechanism) = self.mechanisms().iter().find(is_offered) else {
            return Err(HandshakeError::Mechanism {
                ours: self.mechanisms().join(" or "),
                theirs: offered.to_owned(),
            });
        };
        Ok((mechanism, self.response(mechanism)))
    }

    fn response(&self, mechanism: &str) -> Vec<u8> {
        match self {
            Self::Password { user, password } | Self::Plain { user, password }
                if mechanism == "PLAIN" =>
            {
                format!("\0{user}\0{password}").into_bytes()
            }
            Self::Password { user, password }
            | Self::Plain { user, password }
            | Self::AmqPlain { user, password } => {
                let mut table = TableBuf::new();
                table
                    .insert("LOGIN", user.as_str())
                    .and_then(|t| t.insert("PASSWORD", password.as_str()))
                    .expect("both keys are short strings");
                table.as_table().as_bytes().to_vec()
            }
            Self::External => Vec::new(),
        }
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { user, .. }
            | Self::Plain { user, .. }
            | Self::AmqPlain { user, .. } => {
                let mechanisms = self.mechanisms().join(" or ");
                write!(f, "{mechanisms}({user:?}, password hidden)")
            }
            Self::External => f.write_str("EXTERNAL"),
        }
    }
}

/// Why the two sides do not come together, before or beside a `connection.close`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HandshakeError {
    /// It answered the protocol header with its own.
    #[error("the server does not speak AMQP 0-9-1, it offers {0}")]
    Version(String),
    /// No common mechanism.
    #[error(
        "the server does not offer the mechanism {ours}, it has: {theirs}; name one of those with auth_mechanism"
    )]
    Mechanism {
        /// What we wanted.
        ours: String,
        /// What it lists.
        theirs: String,
    },
    /// It asks a second question, which none of our mechanisms has.
    #[error("the server sent a challenge, which {0} does not have")]
    Challenge(String),
    /// The virtual host cannot be put on the wire.
    #[error(transparent)]
    VirtualHost(#[from] EncodeError),
    /// Bytes or methods that do not belong here.
    #[error(transparent)]
    Violation(#[from] WireError),
}

/// The client's side.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    state: ClientState,
}

/// What the client's side brings along.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Who we are.
    pub auth: Auth,
    /// Where to, `/` as a rule.
    pub virtual_host: String,
    /// What we would like.
    pub limits: Limits,
    /// How the connection calls itself in RabbitMQ's lists; empty for no name.
    pub name: String,
}

#[derive(Debug)]
#[expect(
    clippy::enum_variant_names,
    reason = "a state is named for what we wait for"
)]
enum ClientState {
    AwaitStart,
    AwaitTune,
    AwaitOpenOk(Tuned),
}

/// What a step of the client's side leads to.
#[derive(Debug)]
pub enum ClientStep {
    /// There is more to come.
    Continue(Client),
    /// `tune-ok` has been sent: frames of the new size may come from now on.
    Tuned(Client, Tuned),
    /// `open-ok` has come.
    Open(Tuned),
}

impl Client {
    /// Appends the protocol header.
    pub fn start(config: ClientConfig, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&PROTOCOL_HEADER);
        Self {
            config,
            state: ClientState::AwaitStart,
        }
    }

    /// Whether the server's answer may still be a protocol header of its own, in place of a frame.
    pub fn awaits_first_frame(&self) -> bool {
        matches!(self.state, ClientState::AwaitStart)
    }

    /// Takes a method of the connection class and appends the answer. `connection.close` is the caller's to handle.
    ///
    /// # Errors
    /// See [`HandshakeError`]. The handshake has failed then.
    pub fn step(self, method: Method, out: &mut Vec<u8>) -> Result<ClientStep, HandshakeError> {
        use connection::AMQPMethod as M;
        let Self { config, state } = self;
        match (state, method) {
            (ClientState::AwaitStart, Method::Connection(M::Start(start))) => {
                if (start.version_major, start.version_minor) != (0, 9) {
                    let theirs = format!("{}-{}", start.version_major, start.version_minor);
                    return Err(HandshakeError::Version(theirs));
                }
                let (mechanism, response) = config.auth.answer(&start.mechanisms.to_string())?;
                let answer = connection::StartOk {
                    client_properties: client_properties(&config.name)?,
                    mechanism: cold::short_text(mechanism),
                    response: LongString::from(response),
                    locale: cold::short_text("en_US"),
                };
                cold::put(out, 0, &Method::Connection(M::StartOk(answer)));
                Ok(ClientStep::Continue(Self {
                    config,
                    state: ClientState::AwaitTune,
                }))
            }
            (ClientState::AwaitTune, Method::Connection(M::Tune(tune))) => {
                let server = Tuned {
                    channel_max: tune.channel_max,
                    frame_max: tune.frame_max,
                    heartbeat: tune.heartbeat,
                };
                let tuned = negotiate(config.limits, server);
                let answer = connection::TuneOk {
                    channel_max: tuned.channel_max,
                    frame_max: tuned.frame_max,
                    heartbeat: tuned.heartbeat,
                };
                let open = connection::Open {
                    virtual_host: cold::short("virtual host", &config.virtual_host)?,
                };
                cold::put(out, 0, &Method::Connection(M::TuneOk(answer)));
                cold::put(out, 0, &Method::Connection(M::Open(open)));
                let next = Self {
                    config,
                    state: ClientState::AwaitOpenOk(tuned),
                };
                Ok(ClientStep::Tuned(next, tuned))
            }
            (ClientState::AwaitOpenOk(tuned), Method::Connection(M::OpenOk(_))) => {
                Ok(ClientStep::Open(tuned))
            }
            (ClientState::AwaitTune, Method::Connection(M::Secure(_))) => Err(
                HandshakeError::Challenge(config.auth.mechanisms().join(" or ")),
            ),
            (_, method) => Err(out_of_turn(&method).into()),
        }
    }
}

fn out_of_turn(method: &Method) -> WireError {
    let (class, id) = (method.get_amqp_class_id(), method.get_amqp_method_id());
    let detail = format_args!("method {id} of class {class} is out of turn in the handshake");
    WireError::new(ReplyCode::COMMAND_INVALID, detail).in_method(class, id)
}

fn client_properties(name: &str) -> Result<FieldTable, EncodeError> {
    let capabilities = table(&[
        ("authentication_failure_close", true.into()),
        ("basic.nack", true.into()),
        ("connection.blocked", true.into()),
        ("consumer_cancel_notify", true.into()),
        ("exchange_exchange_bindings", true.into()),
        ("publisher_confirms", true.into()),
    ])?;
    let mut entries = vec![
        ("capabilities", capabilities.as_table().into()),
        ("platform", "Rust".into()),
        ("product", "sweepea".into()),
        ("version", env!("CARGO_PKG_VERSION").into()),
    ];
    if !name.is_empty() {
        entries.push(("connection_name", name.into()));
    }
    cold::field_table(table(&entries)?.as_table())
}

fn table(entries: &[(&str, Value<'_>)]) -> Result<TableBuf, EncodeError> {
    let mut table = TableBuf::new();
    for (key, value) in entries {
        table.insert(key, *value)?;
    }
    Ok(table)
}

/// The server's side, for PLAIN and AMQPLAIN.
#[derive(Debug)]
pub enum Server {
    /// The client has said nothing yet.
    AwaitStartOk(Limits),
    /// It is who it says it is.
    AwaitTuneOk {
        /// What we offered.
        offered: Tuned,
        /// The user.
        user: String,
    },
    /// It has agreed to our limits.
    AwaitOpen {
        /// The agreement.
        tuned: Tuned,
        /// The user.
        user: String,
    },
}

/// What a step of the server's side leads to.
#[derive(Debug)]
pub enum ServerStep {
    /// There is more to come.
    Continue(Server),
    /// `tune-ok` has come: frames of the new size may come from now on.
    Tuned(Server, Tuned),
    /// `connection.open` has come for this virtual host; the caller answers `open-ok`, or closes with 530.
    Open {
        /// The agreement.
        tuned: Tuned,
        /// The user.
        user: String,
        /// Where to.
        virtual_host: String,
    },
}

/// Why the server's side refuses. The code and text are for `connection.close`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Name and password do not fit; RabbitMQ waits a second before it says so.
    #[error("login refused for mechanism {mechanism}: {error}")]
    Login {
        /// The mechanism the client chose.
        mechanism: String,
        /// 403, with RabbitMQ's text.
        error: WireError,
    },
    /// Anything else.
    #[error(transparent)]
    Violation(#[from] WireError),
}

impl Server {
    /// The client's protocol header has come: appends `connection.start`.
    pub fn start(limits: Limits, server_properties: Table<'_>, out: &mut Vec<u8>) -> Self {
        let start = connection::Start {
            version_major: 0,
            version_minor: 9,
            server_properties: cold::field_table(server_properties).unwrap_or_default(),
            mechanisms: "PLAIN AMQPLAIN".into(),
            locales: "en_US".into(),
        };
        let start = Method::Connection(connection::AMQPMethod::Start(start));
        cold::put(out, 0, &start);
        Self::AwaitStartOk(limits)
    }

    /// Takes a method on channel 0 and appends the answer. `is_valid` knows the passwords.
    ///
    /// # Errors
    /// The refusal to be sent in `connection.close`.
    pub fn step(
        self,
        method: Method,
        out: &mut Vec<u8>,
        is_valid: impl FnOnce(&str, &str) -> bool,
    ) -> Result<ServerStep, Refusal> {
        use connection::AMQPMethod as M;
        match (self, method) {
            (Self::AwaitStartOk(limits), Method::Connection(M::StartOk(start_ok))) => {
                let mechanism = start_ok.mechanism.as_str();
                let login = match mechanism {
                    "PLAIN" => read_plain(start_ok.response.as_bytes()),
                    "AMQPLAIN" => read_amqplain(start_ok.response.as_bytes()),
                    _ => {
                        let detail = format_args!("unknown mechanism '{mechanism}'");
                        return Err(WireError::new(ReplyCode::COMMAND_INVALID, detail)
                            .in_method(10, 11)
                            .into());
                    }
                };
                let Some((user, _)) = login.filter(|(user, password)| is_valid(user, password))
                else {
                    let detail = format_args!(
                        "Login was refused using authentication mechanism {mechanism}. For details see the broker logfile."
                    );
                    return Err(Refusal::Login {
                        mechanism: mechanism.to_owned(),
                        error: WireError::new(ReplyCode::ACCESS_REFUSED, detail),
                    });
                };
                let tune = connection::Tune {
                    channel_max: limits.channel_max,
                    frame_max: limits.frame_max,
                    heartbeat: limits.heartbeat.unwrap_or(0),
                };
                let offered = Tuned {
                    channel_max: tune.channel_max,
                    frame_max: tune.frame_max,
                    heartbeat: tune.heartbeat,
                };
                cold::put(out, 0, &Method::Connection(M::Tune(tune)));
                Ok(ServerStep::Continue(Self::AwaitTuneOk { offered, user }))
            }
            (Self::AwaitTuneOk { offered, user }, Method::Connection(M::TuneOk(ok))) => {
                let refuse = |detail: fmt::Arguments<'_>| {
                    Err(WireError::new(ReplyCode::NOT_ALLOWED, detail)
                        .in_method(10, 31)
                        .into())
                };
                let (ours, theirs) = (offered.frame_max, ok.frame_max);
                if theirs < FRAME_MIN as u32 {
                    return refuse(format_args!(
                        "negotiated frame_max = {theirs} is lower than the minimum allowed value ({FRAME_MIN})"
                    ));
                }
                if ours != 0 && theirs > ours {
                    return refuse(format_args!(
                        "negotiated frame_max = {theirs} is higher than the maximum allowed value ({ours})"
                    ));
                }
                let (ours, theirs) = (offered.channel_max, ok.channel_max);
                if ours != 0 && (theirs == 0 || theirs > ours) {
                    return refuse(format_args!(
                        "negotiated channel_max = {theirs} is higher than the maximum allowed value ({ours})"
                    ));
                }
                let tuned = Tuned {
                    channel_max: if theirs == 0 { u16::MAX } else { theirs },
                    frame_max: ok.frame_max,
                    heartbeat: ok.heartbeat,
                };
                Ok(ServerStep::Tuned(Self::AwaitOpen { tuned, user }, tuned))
            }
            (Self::AwaitOpen { tuned, user }, Method::Connection(M::Open(open))) => {
                Ok(ServerStep::Open {
                    tuned,
                    user,
                    virtual_host: open.virtual_host.into(),
                })
            }
            (_, method) => Err(out_of_turn(&method).into()),
        }
    }
}

fn read_plain(response: &[u8]) -> Option<(String, String)> {
    let mut parts = std::str::from_utf8(response).ok()?.split('\0');
    let (_authorize_as, user, password) = (parts.next()?, parts.next()?, parts.next()?);
    parts
        .next()
        .is_none()
        .then(|| (user.to_owned(), password.to_owned()))
}

fn read_amqplain(response: &[u8]) -> Option<(String, String)> {
    let table = Table::from_bytes(response);
    let text = |key| table.get(key)?.as_str().map(str::to_owned);
    Some((text("LOGIN")?, text("PASSWORD")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{AnyMethod, Frame, Splitter};

    fn config(auth: Auth) -> ClientConfig {
        ClientConfig {
            auth,
            virtual_host: "/".into(),
            limits: Limits::default(),
            name: String::new(),
        }
    }

    fn methods(bytes: &mut Vec<u8>) -> Vec<Method> {
        let mut methods = Vec::new();
        let mut at = 0;
        while let Some((frame, used)) = Splitter::new().next_frame(&bytes[at..]).unwrap() {
            let Frame::Method {
                class,
                method,
                args,
                ..
            } = frame
            else {
                panic!("{frame:?}")
            };
            match AnyMethod::decode(class, method, args).unwrap() {
                AnyMethod::Cold(method) => methods.push(method),
                other => panic!("{other:?}"),
            }
            at += used;
        }
        bytes.clear();
        methods
    }

    /// Accepts: feature/tune
    #[test]
    fn both_sides_come_together_with_each_mechanism() {
        let (user, password) = ("olive".to_owned(), "p\u{e9}:@".to_owned());
        let plain = Auth::Plain {
            user: user.clone(),
            password: password.clone(),
        };
        for auth in [plain, Auth::AmqPlain { user, password }] {
            let (mut up, mut down) = (Vec::new(), Vec::new());
            let mut client = Client::start(config(auth), &mut up);
            assert_eq!(up, PROTOCOL_HEADER);
            up.clear();
            let mut server = Server::start(Limits::RABBITMQ, Table::default(), &mut down);
            let (tuned, virtual_host) = 'done: loop {
                for method in methods(&mut down) {
                    client = match client.step(method, &mut up).unwrap() {
                        ClientStep::Continue(next) | ClientStep::Tuned(next, _) => next,
                        ClientStep::Open(_) => panic!("before the server's open-ok"),
                    };
                }
                for method in methods(&mut up) {
                    let valid = |u: &str, p: &str| (u, p) == ("olive", "p\u{e9}:@");
                    server = match server.step(method, &mut down, valid).unwrap() {
                        ServerStep::Continue(next) | ServerStep::Tuned(next, _) => next,
                        ServerStep::Open {
                            tuned,
                            virtual_host,
                            ..
                        } => break 'done (tuned, virtual_host),
                    };
                }
            };
            let expected = Tuned {
                channel_max: 2047,
                frame_max: 131_072,
                heartbeat: 60,
            };
            assert_eq!((tuned, virtual_host.as_str()), (expected, "/"));
        }
    }

    /// Accepts: feature/tune
    #[test]
    fn the_smaller_limit_holds_and_zero_says_nothing() {
        let limits = |channel_max, frame_max, heartbeat| Limits {
            channel_max,
            frame_max,
            heartbeat,
        };
        let tuned = |channel_max, frame_max, heartbeat| Tuned {
            channel_max,
            frame_max,
            heartbeat,
        };
        for (client, server, expected) in [
            (
                limits(0, 0, None),
                tuned(2047, 131_072, 60),
                tuned(2047, 131_072, 60),
            ),
            (
                limits(10, 8192, Some(5)),
                tuned(2047, 131_072, 60),
                tuned(10, 8192, 5),
            ),
            (
                limits(3000, 1 << 20, Some(90)),
                tuned(2047, 131_072, 60),
                tuned(2047, 131_072, 60),
            ),
            (
                limits(0, 0, Some(0)),
                tuned(0, 0, 60),
                tuned(u16::MAX, 131_072, 0),
            ),
            (
                limits(0, 0, Some(7)),
                tuned(0, 0, 0),
                tuned(u16::MAX, 131_072, 7),
            ),
            (limits(1, 100, None), tuned(1, 100, 0), tuned(1, 4096, 0)),
        ] {
            assert_eq!(negotiate(client, server), expected, "{client:?} {server:?}");
        }
    }

    /// Accepts: amqp/R38
    #[test]
    fn a_wrong_password_is_refused_with_rabbitmqs_text_and_shown_nowhere() {
        let auth = Auth::Plain {
            user: "olive".into(),
            password: "s3cret".into(),
        };
        assert_eq!(format!("{auth:?}"), r#"PLAIN("olive", password hidden)"#);
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let client = Client::start(config(auth), &mut up);
        assert!(!format!("{client:?}").contains("s3cret"));
        up.clear();
        let server = Server::start(Limits::RABBITMQ, Table::default(), &mut down);
        client.step(methods(&mut down).remove(0), &mut up).unwrap();
        let start_ok = methods(&mut up).remove(0);
        let refusal = server.step(start_ok, &mut down, |_, _| false).unwrap_err();
        let Refusal::Login { error, .. } = refusal else {
            panic!("{refusal:?}")
        };
        assert_eq!(
            error.to_string(),
            "403: ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile."
        );
    }

    #[test]
    fn a_server_without_our_mechanism_is_left_with_what_it_has() {
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let client = Client::start(config(Auth::External), &mut up);
        Server::start(Limits::RABBITMQ, Table::default(), &mut down);
        let error = client
            .step(methods(&mut down).remove(0), &mut up)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the server does not offer the mechanism EXTERNAL, it has: PLAIN AMQPLAIN; name one of those with auth_mechanism"
        );
    }

    /// Accepts: feature/auth
    #[test]
    fn the_answer_is_the_best_mechanism_that_the_server_offers() {
        let (user, password) = ("olive".to_owned(), "p\u{e4}ss".to_owned());
        let (u, p) = (user.clone(), password.clone());
        let any = Auth::Password { user, password };
        let (user, password) = (u.clone(), p.clone());
        let plain = Auth::Plain { user, password };
        let (user, password) = (u, p);
        let amqplain = Auth::AmqPlain { user, password };
        let external = Auth::External;

        let plain_bytes = "\0olive\0p\u{e4}ss".as_bytes();
        let table_bytes = "\x05LOGINS\0\0\0\x05olive\x08PASSWORDS\0\0\0\x05p\u{e4}ss".as_bytes();
        for (auth, offered, mechanism, response) in [
            (&any, "AMQPLAIN PLAIN", "PLAIN", plain_bytes),
            (&any, "EXTERNAL AMQPLAIN", "AMQPLAIN", table_bytes),
            (&plain, "AMQPLAIN PLAIN", "PLAIN", plain_bytes),
            (&amqplain, "PLAIN AMQPLAIN", "AMQPLAIN", table_bytes),
            (&external, "PLAIN EXTERNAL", "EXTERNAL", b""),
        ] {
            let answer = auth.answer(offered);
            assert_eq!(answer, Ok((mechanism, response.to_vec())), "{auth:?}");
        }
        // A name that only begins alike is another mechanism.
        let error = any.answer("XPLAIN PLAIN2 EXTERNAL").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the server does not offer the mechanism PLAIN or AMQPLAIN, it has: XPLAIN PLAIN2 EXTERNAL; name one of those with auth_mechanism"
        );
        assert!(plain.answer("AMQPLAIN").is_err());
        assert!(!format!("{any:?} {amqplain:?}").contains("p\u{e4}ss"));
    }
}
