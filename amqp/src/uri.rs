//! `amqp://` addresses: `amqp://user:password@host1,host2:5673/vhost?heartbeat=30`.
//!
//! Our own parser, because the common ones take `[::1]` for `localhost`, ignore options they do not know, and print passwords.
//! Here an unknown option is an error that lists the known ones, and neither `Debug` nor `Display` shows a secret.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use crate::proto::handshake::{Auth, Limits};

/// Where a server listens, who we are there, and how we want to talk.
///
/// ```
/// use amqp::uri::Uri;
///
/// let uri: Uri = "amqp://olive:s3cret@[::1],mq2:5673/%2fprod?heartbeat=30".parse()?;
/// assert_eq!(uri.hosts[0].name, "::1");
/// assert_eq!((uri.hosts[1].port, uri.virtual_host.as_str()), (5673, "/prod"));
/// assert_eq!(uri.to_string(), "amqp://olive:***@[::1]:5672,mq2:5673/%2Fprod");
/// # Ok::<(), amqp::uri::UriError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// `amqps`.
    pub tls: bool,
    /// To be tried one after the other; at least one.
    pub hosts: Vec<Host>,
    /// Who we are: by password, with whichever mechanism the server has for that, unless `auth_mechanism` names one.
    pub auth: Auth,
    /// `/` if the address names none.
    pub virtual_host: String,
    /// `channel_max`, `frame_max` and `heartbeat` (seconds).
    pub limits: Limits,
    /// `connection_timeout`, given in milliseconds: for each attempt, handshake included.
    pub connection_timeout: Option<Duration>,
    /// `connection_name`: how the connection shows in the server's lists.
    pub connection_name: Option<String>,
    /// Files for `amqps`.
    pub tls_options: TlsOptions,
}

/// One server. `Display` is what a socket address looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// A name, or an IP address without brackets.
    pub name: String,
    /// 5672, or 5671 for `amqps`, if the address names none.
    pub port: u16,
}

/// What the address says about certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// `cacertfile`: PEM file with the authorities to trust, instead of the system's.
    pub cacertfile: Option<PathBuf>,
    /// `certfile`: PEM file with our own certificate.
    pub certfile: Option<PathBuf>,
    /// `keyfile`: PEM file with its key.
    pub keyfile: Option<PathBuf>,
    /// `server_name_indication`: the name the server's certificate must have, if not the host's.
    pub server_name: Option<String>,
    /// `verify`, and `server_name_indication=disable`.
    pub verify: Verify,
}

/// What is looked at in a server's certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// That an authority we trust has signed it, and that it is for the server's name: `verify_peer`, and what goes without saying.
    #[default]
    Name,
    /// Its authority alone: `server_name_indication=disable`. Whoever has any certificate of that authority can pass for the server.
    Authority,
    /// Nothing: `verify_none`. Anybody can pass for the server.
    Nothing,
}

/// What is wrong with an address. Never quotes the part that may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UriError {
    /// Neither `amqp://` nor `amqps://`.
    #[error("an address starts with amqp:// or amqps://")]
    Scheme,
    /// A port that is none.
    #[error("the port of host {0:?} is not a number from 1 to 65535")]
    Port(String),
    /// No closing bracket, or something odd behind it, or no IPv6 address between them.
    #[error("{0:?} is not an IPv6 address in brackets")]
    Ipv6(String),
    /// A host without a name beside others.
    #[error("an empty host name in the list of hosts")]
    EmptyHost,
    /// Percent encoding that is none, or no UTF-8 behind it.
    #[error("bad percent-encoding in the {0}")]
    Percent(&'static str),
    /// More than one path segment.
    #[error("the virtual host contains a '/'; write it as %2F")]
    SlashInVirtualHost,
    /// Longer than AMQP can say.
    #[error("the virtual host is longer than 255 bytes")]
    VirtualHostTooLong,
    /// An option that does not exist; most likely misspelt.
    #[error("unknown option {0:?}, there are: {known}", known = OPTIONS.join(", "))]
    UnknownOption(String),
    /// The same option a second time.
    #[error("option {0} is given twice")]
    Twice(&'static str),
    /// An option with a value it cannot have.
    #[error("option {option}: {value:?} is not {expected}")]
    BadValue {
        /// Which.
        option: &'static str,
        /// What was given.
        value: String,
        /// What could be.
        expected: &'static str,
    },
    /// A certificate is of no use without its key.
    #[error("option {given} needs {missing} as well; they may name the same file")]
    Alone {
        /// What was given.
        given: &'static str,
        /// What was not.
        missing: &'static str,
    },
    /// TLS files on a plain connection would be silently useless.
    #[error("option {0} needs amqps://")]
    NeedsTls(&'static str),
}

const OPTIONS: [&str; 11] = [
    "auth_mechanism",
    "cacertfile",
    "certfile",
    "channel_max",
    "connection_name",
    "connection_timeout",
    "frame_max",
    "heartbeat",
    "keyfile",
    "server_name_indication",
    "verify",
];

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let (tls, rest) = if let Some(rest) = strip_scheme(text, "amqp://") {
            (false, rest)
        } else if let Some(rest) = strip_scheme(text, "amqps://") {
            (true, rest)
        } else {
            return Err(UriError::Scheme);
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match rest.split_once('/') {
            Some((authority, path)) => (authority, Some(path)),
            None => (rest, None),
        };
        // The last '@': a password may contain one that is not encoded.
        let (login, hosts) = match authority.rsplit_once('@') {
            Some((login, hosts)) => (Some(login), hosts),
            None => (None, authority),
        };
        let (user, password) = match login {
            Some(login) => {
                let (user, password) = login.split_once(':').unwrap_or((login, ""));
                (decode(user, "user name")?, decode(password, "password")?)
            }
            None => ("guest".to_owned(), "guest".to_owned()),
        };
        let mut uri = Self {
            tls,
            hosts: parse_hosts(hosts, if tls { 5671 } else { 5672 })?,
            auth: Auth::Password { user, password },
            virtual_host: parse_virtual_host(path)?,
            limits: Limits::default(),
            connection_timeout: None,
            connection_name: None,
            tls_options: TlsOptions::default(),
        };
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let option = OPTIONS.into_iter().find(|known| *known == name);
            let option = option.ok_or_else(|| {
                // A '?' in a password that is not encoded gets here as well.
                let is_word = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
                UriError::UnknownOption(if is_word { name } else { "..." }.to_owned())
            })?;
            if seen.contains(&option) {
                return Err(UriError::Twice(option));
            }
            seen.push(option);
            uri.set(option, decode(value, option)?)?;
        }
        let (given, missing) = match &uri.tls_options {
            TlsOptions {
                certfile: Some(_),
                keyfile: None,
                ..
            } => ("certfile", "keyfile"),
            TlsOptions {
                certfile: None,
                keyfile: Some(_),
                ..
            } => ("keyfile", "certfile"),
            _ => return Ok(uri),
        };
        Err(UriError::Alone { given, missing })
    }
}

impl Uri {
    fn set(&mut self, option: &'static str, value: String) -> Result<(), UriError> {
        if !self.tls
            && matches!(
                option,
                "cacertfile" | "certfile" | "keyfile" | "server_name_indication" | "verify"
            )
        {
            return Err(UriError::NeedsTls(option));
        }
        match option {
            "heartbeat" => {
                self.limits.heartbeat = Some(number(option, &value, "seconds from 0 to 65535")?);
            }
            "channel_max" => {
                self.limits.channel_max = number(option, &value, "a number from 0 to 65535")?;
            }
            "frame_max" => {
                let expected = "0 or a number of bytes from 4096 on";
                let max = number(option, &value, expected)?;
                if max != 0 && max < crate::wire::frame::FRAME_MIN as u32 {
                    return Err(UriError::BadValue {
                        option,
                        value,
                        expected,
                    });
                }
                self.limits.frame_max = max;
            }
            "connection_timeout" => {
                let ms = number(option, &value, "a number of milliseconds")?;
                self.connection_timeout = Some(Duration::from_millis(ms));
            }
            "auth_mechanism" => self.set_mechanism(&value)?,
            "connection_name" => self.connection_name = Some(value),
            "cacertfile" => self.tls_options.cacertfile = Some(value.into()),
            "certfile" => self.tls_options.certfile = Some(value.into()),
            "keyfile" => self.tls_options.keyfile = Some(value.into()),
            "server_name_indication" if value == "disable" => {
                if self.tls_options.verify == Verify::Name {
                    self.tls_options.verify = Verify::Authority;
                }
            }
            "server_name_indication" => self.tls_options.server_name = Some(value),
            "verify" => match value.as_str() {
                "verify_peer" => {}
                "verify_none" => self.tls_options.verify = Verify::Nothing,
                _ => {
                    return Err(UriError::BadValue {
                        option,
                        value,
                        expected: "verify_peer or verify_none",
                    });
                }
            },
            other => return Err(UriError::UnknownOption(other.to_owned())),
        }
        Ok(())
    }

    fn set_mechanism(&mut self, name: &str) -> Result<(), UriError> {
        let (user, password) = match &self.auth {
            Auth::Password { user, password }
            | Auth::Plain { user, password }
            | Auth::AmqPlain { user, password } => (user.clone(), password.clone()),
            Auth::External => Default::default(),
        };
        self.auth = match name.to_ascii_uppercase().as_str() {
            "PLAIN" => Auth::Plain { user, password },
            "AMQPLAIN" => Auth::AmqPlain { user, password },
            "EXTERNAL" => Auth::External,
            _ => {
                return Err(UriError::BadValue {
                    option: "auth_mechanism",
                    value: name.to_owned(),
                    expected: "PLAIN, AMQPLAIN or EXTERNAL",
                });
            }
        };
        Ok(())
    }
}

impl fmt::Display for Uri {
    /// Without password and options: enough to say in a log where something happened.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "amqps://" } else { "amqp://" })?;
        match &self.auth {
            Auth::Password { user, .. }
            | Auth::Plain { user, .. }
            | Auth::AmqPlain { user, .. } => {
                write!(f, "{}:***@", Encoded(user))?;
            }
            Auth::External => {}
        }
        for (i, host) in self.hosts.iter().enumerate() {
            write!(f, "{}{host}", if i == 0 { "" } else { "," })?;
        }
        write!(f, "/{}", Encoded(&self.virtual_host))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') {
            write!(f, "[{}]:{}", self.name, self.port)
        } else {
            write!(f, "{}:{}", self.name, self.port)
        }
    }
}

fn strip_scheme<'a>(text: &'a str, scheme: &str) -> Option<&'a str> {
    let (head, rest) = text.split_at_checked(scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

fn parse_hosts(list: &str, default_port: u16) -> Result<Vec<Host>, UriError> {
    if list.is_empty() {
        return parse_host("localhost", default_port).map(|host| vec![host]);
    }
    list.split(',')
        .map(|host| parse_host(host, default_port))
        .collect()
}

fn parse_host(text: &str, default_port: u16) -> Result<Host, UriError> {
    let (name, port) = if let Some(rest) = text.strip_prefix('[') {
        let bad = || UriError::Ipv6(text.to_owned());
        let (address, behind) = rest.split_once(']').ok_or_else(bad)?;
        // A scope, `%eth0` or `%25eth0`, is no part of the address proper.
        let bare = address.split('%').next().unwrap_or(address);
        bare.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
        let port = match behind {
            "" => None,
            behind => Some(behind.strip_prefix(':').ok_or_else(bad)?),
        };
        (address.replacen("%25", "%", 1), port)
    } else {
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        };
        (decode(name, "host name")?, port)
    };
    if name.is_empty() {
        return Err(UriError::EmptyHost);
    }
    let port = match port {
        None => default_port,
        Some(port) => port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            // Where the host was forgotten, this "port" is the password.
            .ok_or_else(|| UriError::Port(name.clone()))?,
    };
    Ok(Host { name, port })
}

/// No path, or nothing behind the slash, is the default one, as nearly every client has it (the specification of AMQP URIs
/// would have the empty one).
fn parse_virtual_host(path: Option<&str>) -> Result<String, UriError> {
    match path {
        None | Some("") => Ok("/".to_owned()),
        Some(path) if path.contains('/') => Err(UriError::SlashInVirtualHost),
        Some(path) => {
            let name = decode(path, "virtual host")?;
            if name.len() > 255 {
                return Err(UriError::VirtualHostTooLong);
            }
            Ok(name)
        }
    }
}

fn number<T: FromStr>(
    option: &'static str,
    value: &str,
    expected: &'static str,
) -> Result<T, UriError> {
    value.parse().map_err(|_| UriError::BadValue {
        option,
        value: value.to_owned(),
        expected,
    })
}

fn decode(text: &str, what: &'static str) -> Result<String, UriError> {
    let bad = || UriError::Percent(what);
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        let (high, low) = digit().zip(digit()).ok_or_else(bad)?;
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// Percent-encoded, so that what is printed can be parsed.
struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    write!(f, "{}", char::from(byte))?;
                }
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Uri {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    fn login(user: &str, password: &str) -> Auth {
        Auth::Password {
            user: user.into(),
            password: password.into(),
        }
    }

    fn hosts(uri: &Uri) -> Vec<String> {
        uri.hosts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_left_out_has_rabbitmqs_defaults() {
        for text in [
            "amqp://",
            "amqp://localhost",
            "AMQP://localhost:5672/",
            "amqp://guest:guest@localhost/%2f",
        ] {
            let uri = parse(text);
            assert_eq!(hosts(&uri), ["localhost:5672"], "{text}");
            assert_eq!(uri.auth, login("guest", "guest"));
            assert_eq!((uri.tls, uri.virtual_host.as_str()), (false, "/"));
        }
        assert_eq!(hosts(&parse("amqps://mq")), ["mq:5671"]);
    }

    /// Accepts: feature/uri
    #[test]
    fn ipv6_literals_several_hosts_and_encoded_names_are_what_they_say() {
        let uri =
            parse("amqp://a%40b:p%3Aw%2F@[::1],mq2:5673,[fe80::1%25eth0]:5674/my%2Fvhost%20x");
        assert_eq!(
            hosts(&uri),
            ["[::1]:5672", "mq2:5673", "[fe80::1%eth0]:5674"]
        );
        assert_eq!(uri.auth, login("a@b", "p:w/"));
        assert_eq!(uri.virtual_host, "my/vhost x");
        assert_eq!(parse("amqp://u:p@ss@h/v").auth, login("u", "p@ss"));
        assert_eq!(parse("amqp://u@h").auth, login("u", ""));
    }

    /// Accepts: feature/uri
    #[test]
    fn query_options_set_what_they_name() {
        let uri = parse(
            "amqps://u:p@h/v?heartbeat=0&connection_timeout=1500&channel_max=7&frame_max=8192&auth_mechanism=external\
             &cacertfile=/etc/ca%20x.pem&certfile=c.pem&keyfile=k.pem&server_name_indication=mq&connection_name=me",
        );
        let limits = Limits {
            channel_max: 7,
            frame_max: 8192,
            heartbeat: Some(0),
        };
        assert_eq!(uri.limits, limits);
        assert_eq!(uri.connection_timeout, Some(Duration::from_millis(1500)));
        assert_eq!(uri.auth, Auth::External);
        assert_eq!(uri.connection_name.as_deref(), Some("me"));
        let tls = TlsOptions {
            cacertfile: Some("/etc/ca x.pem".into()),
            certfile: Some("c.pem".into()),
            keyfile: Some("k.pem".into()),
            server_name: Some("mq".into()),
            verify: Verify::Name,
        };
        assert_eq!(uri.tls_options, tls);
        for (query, verify) in [
            ("verify=verify_peer", Verify::Name),
            ("server_name_indication=disable", Verify::Authority),
            (
                "server_name_indication=disable&verify=verify_none",
                Verify::Nothing,
            ),
            (
                "verify=verify_none&server_name_indication=disable",
                Verify::Nothing,
            ),
        ] {
            let options = parse(&format!("amqps://h?{query}")).tls_options;
            assert_eq!(
                (options.verify, options.server_name),
                (verify, None),
                "{query}"
            );
        }
        let (user, password) = ("u".to_owned(), "p".to_owned());
        let auth = parse("amqp://u:p@h?auth_mechanism=AMQPLAIN").auth;
        assert_eq!(auth, Auth::AmqPlain { user, password });
    }

    /// Accepts: feature/uri
    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        let known = OPTIONS.join(", ");
        for (text, expected) in [
            (
                "http://h",
                "an address starts with amqp:// or amqps://".to_owned(),
            ),
            (
                "amqp",
                "an address starts with amqp:// or amqps://".to_owned(),
            ),
            (
                "amqp://u:s3cret@h:0",
                r#"the port of host "h" is not a number from 1 to 65535"#.to_owned(),
            ),
            (
                "amqp://h:56:72",
                r#"the port of host "h" is not a number from 1 to 65535"#.to_owned(),
            ),
            (
                "amqp://u:s3cret/v",
                r#"the port of host "u" is not a number from 1 to 65535"#.to_owned(),
            ),
            (
                "amqp://u:?s3cret@h",
                "the port of host \"u\" is not a number from 1 to 65535".to_owned(),
            ),
            (
                "amqp://u?s3cret@h",
                format!("unknown option \"...\", there are: {known}"),
            ),
            (
                "amqp://[::1",
                r#""[::1" is not an IPv6 address in brackets"#.to_owned(),
            ),
            (
                "amqp://[mq]:5672",
                r#""[mq]:5672" is not an IPv6 address in brackets"#.to_owned(),
            ),
            (
                "amqp://a,,b",
                "an empty host name in the list of hosts".to_owned(),
            ),
            (
                "amqp://u:s3cret%zz@h",
                "bad percent-encoding in the password".to_owned(),
            ),
            (
                "amqp://h/%ff",
                "bad percent-encoding in the virtual host".to_owned(),
            ),
            (
                "amqp://h/a/b",
                "the virtual host contains a '/'; write it as %2F".to_owned(),
            ),
            (
                "amqp://h?hearbeat=3",
                format!("unknown option \"hearbeat\", there are: {known}"),
            ),
            (
                "amqp://h?x",
                format!("unknown option \"x\", there are: {known}"),
            ),
            (
                "amqp://h?heartbeat=3&heartbeat=4",
                "option heartbeat is given twice".to_owned(),
            ),
            (
                "amqp://h?heartbeat=-1",
                r#"option heartbeat: "-1" is not seconds from 0 to 65535"#.to_owned(),
            ),
            (
                "amqp://h?heartbeat",
                r#"option heartbeat: "" is not seconds from 0 to 65535"#.to_owned(),
            ),
            (
                "amqp://h?frame_max=4095",
                r#"option frame_max: "4095" is not 0 or a number of bytes from 4096 on"#.to_owned(),
            ),
            (
                "amqp://h?auth_mechanism=GSSAPI",
                r#"option auth_mechanism: "GSSAPI" is not PLAIN, AMQPLAIN or EXTERNAL"#.to_owned(),
            ),
            (
                "amqps://h?certfile=x",
                "option certfile needs keyfile as well; they may name the same file".to_owned(),
            ),
            (
                "amqps://h?keyfile=x",
                "option keyfile needs certfile as well; they may name the same file".to_owned(),
            ),
            (
                "amqps://h?verify=no",
                r#"option verify: "no" is not verify_peer or verify_none"#.to_owned(),
            ),
            (
                "amqp://h?verify=verify_none",
                "option verify needs amqps://".to_owned(),
            ),
            (
                "amqp://h?cacertfile=x",
                "option cacertfile needs amqps://".to_owned(),
            ),
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert_eq!(error, expected, "{text}");
            assert!(!error.contains("s3cret"));
        }
        let uri = parse("amqp://olive:s3cret@h/%2Fx?heartbeat=3");
        assert!(!format!("{uri:?} {uri}").contains("s3cret"));
        assert_eq!(uri.to_string(), "amqp://olive:***@h:5672/%2Fx");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(amqps?://)?[a-z:@/%?&=,\\[\\]0-9\u{e9}]{0,40}") {
            let _ = text.parse::<Uri>();
        }
    }
}
