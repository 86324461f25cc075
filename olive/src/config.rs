//! Settings: defaults < file < environment < flags, and for every value where it came from.
//!
//! Environment names and defaults are sweepea's where sweepea has them. Values are parsed when they are read, never later: a bad one is
//! refused by name, all bad ones at once. The file is `olive.toml` with the same names as tables (`[amqp] url = …` is
//! `olive_amqp_url`), flags are the same names with dashes (`--amqp-url`).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Error;
use crate::retry::Policy;
use crate::topology;

/// One setting: its name in the environment and what is known about it without a value.
#[derive(Debug)]
#[non_exhaustive]
pub struct Setting {
    /// Name in the environment, and the name that errors use.
    pub name: &'static str,
    /// Default, as it would be written.
    pub default: &'static str,
    /// One line for the help.
    pub help: &'static str,
}

impl Setting {
    /// The name as a flag, without the two dashes in front: `olive_amqp_url` is `amqp-url`.
    #[must_use]
    pub fn flag(&self) -> String {
        self.name.trim_start_matches("olive_").replace('_', "-")
    }
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A file.
    File(PathBuf),
    /// The environment.
    Environment,
    /// A flag on the command line.
    Flag,
    /// The program that embeds olive.
    Program,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment => f.write_str("environment"),
            Self::Flag => f.write_str("flag"),
            Self::Program => f.write_str("program"),
        }
    }
}

macro_rules! settings {
    ($($(#[doc = $help:literal])+ $field:ident: $type:ty = $name:literal, $default:literal;)*) => {
        /// All settings of an app. Fields may be changed freely; [`Config::origin`] then says `program`.
        #[derive(Debug, Clone)]
        #[non_exhaustive]
        pub struct Config {
            $($(#[doc = $help])+ pub $field: $type,)*
            origins: BTreeMap<&'static str, (Origin, String)>,
            warnings: Vec<String>,
        }

        /// Every setting, in the order of the help.
        pub const SETTINGS: &[Setting] =
            &[$(Setting { name: $name, default: $default, help: concat!($($help),+) }),*];

        impl Default for Config {
            fn default() -> Self {
                Self {
                    $($field: Value::parse($default).expect(concat!("the default of ", $name, " is a good value")),)*
                    origins: BTreeMap::new(),
                    warnings: Vec::new(),
                }
            }
        }

        impl Config {
            fn assign(&mut self, name: &str, value: &str) -> Result<(), String> {
                match name {
                    $($name => self.$field = Value::parse(value)?,)*
                    _ => return Err("is no setting".into()),
                }
                Ok(())
            }

            /// The value of the setting `name` as text, a password masked; `None` when there is no such setting.
            #[must_use]
            pub fn show(&self, name: &str) -> Option<String> {
                match name {
                    $($name => Some(self.$field.show()),)*
                    _ => None,
                }
            }
        }
    };
}

settings! {
    /// Log level: error, warn, info, debug, trace or off
    log_level: log::LevelFilter = "log_level", "info";
    /// Broker, amqp://user:password@host:port/vhost
    amqp_url: Url = "olive_amqp_url", "amqp://guest:guest@localhost:5672/%2F";
    /// Direct exchange that tasks are published to
    exchange_name: Name = "olive_amqp_exchange_name", "Olive.x";
    /// Queue that the app consumes
    queue_name: QueueName = "olive_amqp_queue_name", "Olive.q";
    /// Routing key that binds the two
    routing_key: Name = "olive_amqp_routing_key", "Olive.k";
    /// Most deliveries that are not acked yet; 0 or less: workers + 1
    qos: Prefetch = "olive_amqp_qos", "80";
    /// Accepted for sweepea's sake; prefetch is always set for the one consumer, which amounts to the same
    global_qos: bool = "olive_amqp_global_qos", "true";
    /// Whether exchange and queue survive a restart of the broker (sweepea's do not: set false to keep those)
    durable: bool = "olive_amqp_durable", "true";
    /// Heartbeat interval asked of the broker
    heartbeat: Duration = "olive_amqp_heartbeat", "30s";
    /// Longest wait between two attempts to reconnect
    reconnect_max: Duration = "olive_amqp_reconnect_max", "30s";
    /// Largest body of a task message
    max_body: Size = "olive_amqp_max_body", "64MiB";
    /// Workers: threads, or child processes
    num_workers: Workers = "olive_worker_num_workers", "20";
    /// Where Rust functions run: thread or process
    worker_type: WorkerType = "olive_worker_worker_type", "thread";
    /// Accepted for sweepea's sake (curio or concurrent): there is one pool
    pool_imp: PoolImp = "olive_worker_pool_imp", "curio";
    /// Python modules whose functions may run, by import path: proj.tasks, proj.jobs.*
    allow: AllowList = "olive_worker_allow", "";
    /// Python modules that every child imports at its start
    preload: List = "olive_worker_preload", "";
    /// Python interpreter, 3.8 or later
    python: String = "olive_worker_python", "python3";
    /// Directories put in front of Python's module path
    path: List = "olive_worker_path", ".";
    /// Largest frame between olive and a child
    max_frame: Size = "olive_worker_max_frame", "64MiB";
    /// Time limit of a task whose message sets none
    task_timeout: Option<Duration> = "olive_task_timeout", "none";
    /// When a task is asked to end; it is killed at its time limit
    soft_timeout: Option<Duration> = "olive_task_soft_timeout", "none";
    /// Attempts after the first; 0 runs a task once
    max_retries: u32 = "olive_task_max_retries", "3";
    /// Attempts after a worker died with the task
    max_crashes: u32 = "olive_task_max_crashes", "2";
    /// Longest wait before the first further attempt; doubles each time
    retry_base: Duration = "olive_retry_base", "2s";
    /// Longest wait before any further attempt
    retry_cap: Duration = "olive_retry_cap", "1h";
    /// How long running tasks may take to end after the first signal
    shutdown_grace: Duration = "olive_shutdown_grace", "30s";
}

/// Name of the file that is read when it exists and no other is named.
pub const DEFAULT_FILE: &str = "olive.toml";
/// Environment name of the file to read; not a setting itself.
const FILE_NAME: &str = "olive_config";

impl Config {
    /// Defaults, then `olive.toml` (or the file that `olive_config` names), then the environment.
    pub fn from_env() -> Result<Self, Error> {
        Self::load(None, std::env::vars_os(), std::iter::empty())
    }

    /// Defaults, then the file, then `environment`, then `flags` (names as in the environment). `file` wins over the environment's
    /// `olive_config`; a file that was named must exist. All bad values are reported at once.
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (OsString, OsString)>,
        flags: impl Iterator<Item = (String, String)>,
    ) -> Result<Self, Error> {
        let mut config = Self::default();
        let mut bad = Vec::new();
        let environment: Vec<(String, OsString)> = environment
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .collect();

        let named = file.map(Path::to_owned).or_else(|| {
            environment
                .iter()
                .find(|(name, _)| name == FILE_NAME)
                .map(|(_, value)| PathBuf::from(value))
        });
        let path = named.clone().unwrap_or_else(|| DEFAULT_FILE.into());
        match std::fs::read_to_string(&path) {
            Ok(text) => config.read_file(&path, &text, &mut bad),
            Err(e) if named.is_none() && e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => bad.push(format!("cannot read {}: {e}", path.display())),
        }

        for (name, value) in environment {
            let Some(setting) = SETTINGS.iter().find(|s| s.name == name) else {
                if name.starts_with("olive_") && name != FILE_NAME {
                    let warning = config.unknown("environment variable", &name);
                    config.warnings.push(warning);
                }
                continue;
            };
            match value.to_str() {
                Some("") => {} // sweepea's rule: empty means not set
                Some(value) => config.put(setting.name, value, Origin::Environment, &mut bad),
                None => bad.push(format!("{name} is not UTF-8 (from environment)")),
            }
        }
        for (name, value) in flags {
            config.put(&name, &value, Origin::Flag, &mut bad);
        }
        if bad.is_empty() {
            Ok(config)
        } else {
            Err(Error::Config(bad))
        }
    }

    /// Sets one value by its environment name, as a program would that takes settings from its own users.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), Error> {
        let mut bad = Vec::new();
        self.put(name, value, Origin::Program, &mut bad);
        if bad.is_empty() {
            Ok(())
        } else {
            Err(Error::Config(bad))
        }
    }

    /// Where the value of the setting `name` came from.
    #[must_use]
    pub fn origin(&self, name: &str) -> Origin {
        let shown = self.show(name).unwrap_or_default();
        match self.origins.get(name) {
            Some((origin, as_read)) if *as_read == shown => origin.clone(),
            None if Self::default()
                .show(name)
                .is_none_or(|default| default == shown) =>
            {
                Origin::Default
            }
            _ => Origin::Program,
        }
    }

    /// What should be said once, at the start: names in the environment that look like settings and are none.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// When and how often a task is tried again.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            max_retries: self.max_retries,
            max_crashes: self.max_crashes,
            base: self.retry_base,
            cap: self.retry_cap,
        }
    }

    /// Most deliveries that may be unacked at once.
    #[must_use]
    pub fn prefetch(&self) -> u16 {
        match self.qos.0 {
            0 => self.num_workers.0.saturating_add(1),
            n => n,
        }
    }

    fn put(&mut self, name: &str, value: &str, origin: Origin, bad: &mut Vec<String>) {
        match self.assign(name, value) {
            Ok(()) => {
                let setting = SETTINGS
                    .iter()
                    .find(|s| s.name == name)
                    .expect("assign knows the names of SETTINGS only");
                let shown = self.show(name).expect("a setting can be shown");
                self.origins.insert(setting.name, (origin, shown));
            }
            Err(problem) => {
                let value = if name == "olive_amqp_url" {
                    mask(value)
                } else {
                    value.to_owned()
                };
                bad.push(format!("{name}={value:?} {problem} (from {origin})"));
            }
        }
    }

    fn read_file(&mut self, path: &Path, text: &str, bad: &mut Vec<String>) {
        let table: toml::Table = match text.parse() {
            Ok(table) => table,
            Err(e) => {
                let text = e.to_string();
                return bad.push(format!("{} is not TOML: {}", path.display(), text.trim()));
            }
        };
        let mut values = Vec::new();
        flatten("", &toml::Value::Table(table), &mut values);
        for (key, value) in values {
            let name = if key == "log_level" {
                key.clone()
            } else {
                format!("olive_{key}")
            };
            if SETTINGS.iter().any(|s| s.name == name) {
                self.put(&name, &value, Origin::File(path.to_owned()), bad);
            } else {
                bad.push(format!(
                    "{} (from {})",
                    self.unknown("setting", &name),
                    path.display()
                ));
            }
        }
    }

    fn unknown(&self, what: &str, name: &str) -> String {
        match nearest_setting(&name.to_lowercase()) {
            Some(near) => format!("{what} {name} is not known — did you mean {near}?"),
            None => format!("{what} {name} is not known; `olive config` prints those that are"),
        }
    }
}

/// Names that begin alike have that in common with many: the rest must be alike.
fn nearest_setting(name: &str) -> Option<&'static str> {
    let rest = |setting: &'static str| {
        let words = name.split('_').zip(setting.split('_'));
        let shared = words.take_while(|(a, b)| a == b).map(|(a, _)| a.len() + 1);
        let shared = shared.sum::<usize>().min(name.len()).min(setting.len());
        strsim::normalized_damerau_levenshtein(&name[shared..], &setting[shared..])
    };
    SETTINGS
        .iter()
        .map(|setting| (rest(setting.name), setting.name))
        .filter(|(likeness, _)| *likeness > 0.6)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, near)| near)
}

fn flatten(prefix: &str, value: &toml::Value, out: &mut Vec<(String, String)>) {
    let text = match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let name = if prefix.is_empty() {
                    key.clone()
                } else {
                    format!("{prefix}_{key}")
                };
                flatten(&name, value, out);
            }
            return;
        }
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(items) => items
            .iter()
            .map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join(","),
        other => other.to_string(),
    };
    out.push((prefix.to_owned(), text));
}

/// A type that a setting can have.
trait Value: Sized {
    /// Parses `text`; the error goes on after `name="text" `, for instance `is not a number`.
    fn parse(text: &str) -> Result<Self, String>;
    /// The value as it would be written.
    fn show(&self) -> String;
}

impl Value for String {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            Err("must not be empty".into())
        } else {
            Ok(text.to_owned())
        }
    }
    fn show(&self) -> String {
        self.clone()
    }
}

impl Value for u32 {
    fn parse(text: &str) -> Result<Self, String> {
        number(text, 0, Self::MAX.into()).map(|n| n as Self)
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for bool {
    fn parse(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(true),
            "false" | "0" | "no" | "off" => Ok(false),
            _ => Err("is not true or false".into()),
        }
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for log::LevelFilter {
    fn parse(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "warning" => Ok(Self::Warn), // Python's names, which sweepea took
            "critical" | "fatal" => Ok(Self::Error),
            level => level
                .parse()
                .map_err(|_| "is not one of error, warn, info, debug, trace, off".into()),
        }
    }
    fn show(&self) -> String {
        self.to_string().to_lowercase()
    }
}

impl Value for Duration {
    fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let unit_at = text
            .find(|c: char| c.is_ascii_alphabetic())
            .unwrap_or(text.len());
        let (number, unit) = (text[..unit_at].trim(), &text[unit_at..]);
        let wrong = || "is not a time such as 30s, 1.5h or 250ms".to_owned();
        let seconds = match unit {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86400.0,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        Self::try_from_secs_f64(number * seconds).map_err(|_| wrong())
    }
    fn show(&self) -> String {
        const UNITS: [(u128, &str); 4] = [
            (86_400_000, "d"),
            (3_600_000, "h"),
            (60_000, "m"),
            (1000, "s"),
        ];
        let ms = self.as_millis();
        match UNITS
            .iter()
            .find(|(unit, _)| ms > 0 && ms.is_multiple_of(*unit))
        {
            Some((unit, name)) => format!("{}{name}", ms / unit),
            None if ms == 0 => "0s".into(),
            None => format!("{ms}ms"),
        }
    }
}

impl Value for Option<Duration> {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "none" | "0" | "-1" => Ok(None),
            text => Duration::parse(text).map(|d| Some(d).filter(|d| !d.is_zero())),
        }
    }
    fn show(&self) -> String {
        self.as_ref().map_or_else(|| "none".into(), Value::show)
    }
}

macro_rules! plain {
    ($($(#[doc = $doc:literal])+ $name:ident($inner:ty): $parse:expr, $show:expr;)*) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name(pub $inner);

        impl Value for $name {
            fn parse(text: &str) -> Result<Self, String> {
                let parse: fn(&str) -> Result<$inner, String> = $parse;
                parse(text).map(Self)
            }
            fn show(&self) -> String {
                let show: fn(&$inner) -> String = $show;
                show(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.show())
            }
        }
    )*};
}

plain! {
    /// A broker's address. Displayed with its password masked.
    Url(String): |text| {
        let has_scheme = |scheme| text.starts_with(scheme);
        if has_scheme("amqp://") || has_scheme("amqps://") && cfg!(feature = "tls") { Ok(text.into()) }
        else if text.starts_with("amqps://") { Err("asks for TLS, which this program was built without; build olive with its feature `tls`".into()) }
        else { Err("is not an AMQP address such as amqp://user:password@host:5672/%2F".into()) }
    }, |url| mask(url);
    /// Name of an exchange, or a routing key: at most 255 bytes.
    Name(String): |text| if text.len() > 255 { Err("is longer than 255 bytes".into()) } else { Ok(text.into()) }, String::clone;
    /// Name of a queue; short enough that a delayed message's routing key still fits.
    QueueName(String): |text| match text.len() {
        0 => Err("must not be empty".into()),
        n if n > topology::MAX_QUEUE_NAME => Err(format!("is longer than {} bytes", topology::MAX_QUEUE_NAME)),
        _ => Ok(text.into()),
    }, String::clone;
    /// Most unacked deliveries; 0 for workers + 1.
    Prefetch(u16): |text| number(text, i64::MIN, u16::MAX.into()).map(|n| n.max(0) as u16), u16::to_string;
    /// How many workers: 1 to 1024.
    Workers(u16): |text| number(text, 1, 1024).map(|n| n as u16), u16::to_string;
    /// A number of bytes.
    Size(usize): size, |n| match n {
        n if *n > 0 && n % (1 << 20) == 0 => format!("{}MiB", n >> 20),
        n if *n > 0 && n % (1 << 10) == 0 => format!("{}KiB", n >> 10),
        n => n.to_string(),
    };
    /// Words separated by commas.
    List(Vec<String>): |text| Ok(words(text)), |words| words.join(",");
    /// Python modules whose functions may run. An entry is a module (`proj.tasks`), or every module below one (`proj.jobs.*`).
    AllowList(Vec<String>): |text| {
        let entries = words(text);
        match entries.iter().find(|entry| !is_module(entry.strip_suffix(".*").unwrap_or(entry))) {
            Some(wrong) => Err(format!("has {wrong:?}, which is not a module such as proj.tasks or proj.jobs.*")),
            None => Ok(entries),
        }
    }, |entries| entries.join(",");
}

impl AllowList {
    /// Whether `func` could be a function of an allowed module. The child that imports it decides for good.
    #[must_use]
    pub fn admits(&self, func: &str) -> bool {
        let modules = func.match_indices('.').map(|(at, _)| &func[..at]);
        modules
            .into_iter()
            .any(|module| self.0.iter().any(|entry| matches_module(entry, module)))
    }
}

fn matches_module(entry: &str, module: &str) -> bool {
    match entry.strip_suffix('*') {
        Some(prefix) => module
            .strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty()),
        None => entry == module,
    }
}

fn is_module(text: &str) -> bool {
    text.split('.').all(|part| {
        let mut chars = part.chars();
        chars.next().is_some_and(|c| c.is_alphabetic() || c == '_')
            && chars.all(|c| c.is_alphanumeric() || c == '_')
    })
}

macro_rules! choice {
    ($($(#[doc = $doc:literal])+ $name:ident { $($(#[doc = $each:literal])+ $variant:ident = $text:literal),+ })*) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[doc = $each])+ $variant),+ }

        impl Value for $name {
            fn parse(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(concat!("is not one of", $(" ", $text),+).into()),
                }
            }
            fn show(&self) -> String {
                match self { $(Self::$variant => $text),+ }.into()
            }
        }
    )*};
}

choice! {
    /// Where Rust functions run.
    WorkerType {
        /// Threads of this process.
        Thread = "thread",
        /// Child processes: this program again.
        Process = "process"
    }
    /// Sweepea's choice of pools; both mean the same here.
    PoolImp {
        /// Curio's pool.
        Curio = "curio",
        /// `concurrent.futures`.
        Concurrent = "concurrent"
    }
}

/// Parses a time such as `30s`, `1.5h` or `250ms`; a bare number is seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    Duration::parse(text)
}

fn number(text: &str, least: i64, most: i64) -> Result<i64, String> {
    match text.trim().parse::<i64>() {
        Err(_) => Err("is not a number".into()),
        Ok(n) if n < least => Err(format!("must be at least {least}")),
        Ok(n) if n > most => Err(format!("must be at most {most}")),
        Ok(n) => Ok(n),
    }
}

fn size(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let unit_at = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let shift = match text[unit_at..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err("is not a size such as 64MiB".into()),
    };
    let n: usize = text[..unit_at]
        .trim()
        .parse()
        .map_err(|_| "is not a size such as 64MiB".to_owned())?;
    n.checked_mul(1 << shift)
        .ok_or_else(|| "is too large".to_owned())
}

fn words(text: &str) -> Vec<String> {
    text.split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// `url` with its password replaced by `***`.
#[must_use]
pub fn mask(url: &str) -> String {
    let Some(start) = url.find("://").map(|at| at + 3) else {
        return url.to_owned();
    };
    let authority_end = url[start..]
        .find(['/', '?'])
        .map_or(url.len(), |at| start + at);
    let Some(at) = url[start..authority_end].rfind('@').map(|at| start + at) else {
        return url.to_owned();
    };
    match url[start..at].find(':') {
        Some(colon) => format!("{}:***{}", &url[..start + colon], &url[at..]),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, String> {
        let environment = environment
            .iter()
            .map(|(n, v)| (OsString::from(n), OsString::from(v)));
        let flags = flags
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        Config::load(None, environment, flags).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_are_sweepeas() {
        let c = Config::default();
        assert_eq!(c.amqp_url.0, "amqp://guest:guest@localhost:5672/%2F");
        assert_eq!(
            (
                c.exchange_name.0.as_str(),
                c.queue_name.0.as_str(),
                c.routing_key.0.as_str()
            ),
            ("Olive.x", "Olive.q", "Olive.k")
        );
        assert_eq!((c.qos.0, c.global_qos, c.num_workers.0), (80, true, 20));
        assert_eq!(
            (c.worker_type, c.pool_imp),
            (WorkerType::Thread, PoolImp::Curio)
        );
        assert_eq!(c.log_level, log::LevelFilter::Info);
    }

    /// Accepts: seed/env_config
    #[test]
    fn every_name_of_sweepea_is_read_and_parsed() {
        let c = load(
            &[
                ("olive_amqp_url", "amqp://u:p@h:1/v"),
                ("olive_amqp_exchange_name", "x"),
                ("olive_amqp_queue_name", "q"),
                ("olive_amqp_routing_key", "k"),
                ("olive_amqp_qos", "10"),
                ("olive_amqp_global_qos", "False"),
                ("olive_worker_num_workers", "3"),
                ("olive_worker_worker_type", "process"),
                ("olive_worker_pool_imp", "concurrent"),
                ("log_level", "DEBUG"),
            ],
            &[],
        )
        .unwrap();
        assert_eq!(c.amqp_url.0, "amqp://u:p@h:1/v");
        assert_eq!(
            (
                c.exchange_name.0.as_str(),
                c.queue_name.0.as_str(),
                c.routing_key.0.as_str()
            ),
            ("x", "q", "k")
        );
        assert_eq!((c.qos.0, c.global_qos, c.num_workers.0), (10, false, 3));
        assert_eq!(
            (c.worker_type, c.pool_imp),
            (WorkerType::Process, PoolImp::Concurrent)
        );
        assert_eq!(c.log_level, log::LevelFilter::Debug);
        assert_eq!(c.origin("olive_amqp_qos"), Origin::Environment);
        assert_eq!(c.origin("olive_task_timeout"), Origin::Default);
    }

    /// Accepts: seed/env_config
    #[test]
    fn bad_values_are_refused_by_name_all_at_once() {
        let text = load(
            &[
                ("olive_amqp_qos", "ten"),
                ("olive_amqp_global_qos", "maybe"),
                ("olive_worker_num_workers", "0"),
                ("olive_worker_worker_type", "green"),
                ("olive_amqp_url", "http://u:secret@h"),
                ("olive_task_timeout", "soon"),
                ("olive_amqp_max_body", "9999999999999GiB"),
                ("olive_worker_allow", "proj.tasks,os;system"),
            ],
            &[("olive_amqp_heartbeat", "x")],
        )
        .unwrap_err();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "config: olive_amqp_qos=\"ten\" is not a number (from environment)",
                "config: olive_amqp_global_qos=\"maybe\" is not true or false (from environment)",
                "config: olive_worker_num_workers=\"0\" must be at least 1 (from environment)",
                "config: olive_worker_worker_type=\"green\" is not one of thread process (from environment)",
                "config: olive_amqp_url=\"http://u:***@h\" is not an AMQP address such as amqp://user:password@host:5672/%2F (from environment)",
                "config: olive_task_timeout=\"soon\" is not a time such as 30s, 1.5h or 250ms (from environment)",
                "config: olive_amqp_max_body=\"9999999999999GiB\" is too large (from environment)",
                "config: olive_worker_allow=\"proj.tasks,os;system\" has \"os;system\", which is not a module such as proj.tasks or proj.jobs.* (from environment)",
                "config: olive_amqp_heartbeat=\"x\" is not a time such as 30s, 1.5h or 250ms (from flag)",
            ]
        );
    }

    /// Accepts: cli/config
    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let mut c = Config::default();
        let mut bad = Vec::new();
        let file = "log_level = 'warn'\n[amqp]\nqos = 1\nheartbeat = '5s'\nqueue_name = 'file'\n[worker]\nallow = ['a.b', 'c']\n";
        c.read_file(Path::new("olive.toml"), file, &mut bad);
        c.put("olive_amqp_qos", "2", Origin::Environment, &mut bad);
        c.put("olive_amqp_heartbeat", "6s", Origin::Environment, &mut bad);
        c.put("olive_amqp_qos", "3", Origin::Flag, &mut bad);
        assert_eq!(bad, Vec::<String>::new());
        assert_eq!(
            (c.qos.0, c.heartbeat, c.queue_name.0.as_str()),
            (3, Duration::from_secs(6), "file")
        );
        assert_eq!(c.allow.0, ["a.b", "c"]);
        assert_eq!(c.log_level, log::LevelFilter::Warn);
        let origins = [
            "olive_amqp_qos",
            "olive_amqp_heartbeat",
            "olive_amqp_queue_name",
            "olive_amqp_routing_key",
        ]
        .map(|n| c.origin(n));
        assert_eq!(
            origins,
            [
                Origin::Flag,
                Origin::Environment,
                Origin::File("olive.toml".into()),
                Origin::Default
            ]
        );
        c.qos = Prefetch(9);
        c.durable = false;
        assert_eq!(
            (c.origin("olive_amqp_qos"), c.origin("olive_amqp_durable")),
            (Origin::Program, Origin::Program)
        );
    }

    #[test]
    fn a_file_with_a_typing_error_is_refused_with_the_nearest_name() {
        let (mut c, mut bad) = (Config::default(), Vec::new());
        c.read_file(Path::new("o.toml"), "[amqp]\nqoss = 1", &mut bad);
        c.read_file(Path::new("o.toml"), "[amqp", &mut bad);
        assert_eq!(
            bad[0],
            "setting olive_amqp_qoss is not known — did you mean olive_amqp_qos? (from o.toml)"
        );
        assert!(bad[1].starts_with("o.toml is not TOML: "), "{}", bad[1]);
        let missing = Config::load(
            Some(Path::new("/nonexistent/o.toml")),
            std::iter::empty(),
            std::iter::empty(),
        );
        assert!(
            missing
                .unwrap_err()
                .to_string()
                .starts_with("config: cannot read /nonexistent/o.toml: ")
        );
    }

    #[test]
    fn an_unknown_variable_warns_with_the_nearest_name() {
        let c = load(
            &[
                ("olive_amqp_qps", "1"),
                ("olive_worker_nmu", "1"),
                ("olive_wroker_allow", "jobs"),
                ("OLIVE_WORKER_FD", "3"),
                ("HOME", "/"),
            ],
            &[],
        )
        .unwrap();
        assert_eq!(
            c.warnings(),
            [
                "environment variable olive_amqp_qps is not known — did you mean olive_amqp_qos?",
                "environment variable olive_worker_nmu is not known; `olive config` prints those that are",
                "environment variable olive_wroker_allow is not known — did you mean olive_worker_allow?",
            ]
        );
    }

    #[test]
    fn sweepeas_no_qos_and_empty_values_mean_the_default() {
        let c = load(
            &[("olive_amqp_qos", "-1"), ("olive_amqp_queue_name", "")],
            &[("olive_worker_num_workers", "4")],
        )
        .unwrap();
        assert_eq!((c.prefetch(), c.queue_name.0.as_str()), (5, "Olive.q"));
    }

    #[test]
    fn times_and_sizes_are_shown_as_they_are_written() {
        for text in ["250ms", "30s", "90m", "1h", "7d", "0s"] {
            assert_eq!(Duration::parse(text).unwrap().show(), text);
        }
        assert_eq!(Duration::parse("1.5").unwrap(), Duration::from_millis(1500));
        for (text, shown) in [
            ("64MiB", "64MiB"),
            ("1k", "1KiB"),
            ("2G", "2048MiB"),
            ("100", "100"),
            ("0", "0"),
        ] {
            assert_eq!(Size::parse(text).unwrap().show(), shown);
        }
        for text in ["-1s", "1e999h", "s", "5 parsecs", "é"] {
            assert!(Duration::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_default_is_shown_as_it_is_written() {
        let c = Config::default();
        for s in SETTINGS.iter().filter(|s| s.name != "olive_amqp_url") {
            assert_eq!(c.show(s.name).as_deref(), Some(s.default), "{}", s.name);
        }
    }

    #[test]
    fn passwords_are_masked_wherever_they_stand() {
        assert_eq!(
            mask("amqp://guest:guest@localhost:5672/%2F"),
            "amqp://guest:***@localhost:5672/%2F"
        );
        assert_eq!(mask("amqp://u:p:q@r@h/a:b@c"), "amqp://u:***@h/a:b@c");
        assert_eq!(mask("amqp://u@h/v"), "amqp://u@h/v");
        assert_eq!(mask("amqp://h:5672"), "amqp://h:5672");
        assert_eq!(
            Config::default().amqp_url.to_string(),
            "amqp://guest:***@localhost:5672/%2F"
        );
    }

    #[test]
    fn only_functions_below_an_allowed_module_are_admitted() {
        let allow = AllowList::parse("proj.tasks, proj.jobs.*").unwrap();
        for func in [
            "proj.tasks.add",
            "proj.tasks.Mail.send",
            "proj.jobs.night.run",
            "proj.jobs.a.b.run",
        ] {
            assert!(allow.admits(func), "{func}");
        }
        for func in [
            "proj.tasks",
            "os.system",
            "proj.task.add",
            "proj.tasksx.add",
            "proj.jobs.run",
            "add",
            "",
            ".",
        ] {
            assert!(!allow.admits(func), "{func}");
        }
        assert!(
            !AllowList(vec![]).admits("proj.tasks.add"),
            "an empty list allows nothing"
        );
    }
}
