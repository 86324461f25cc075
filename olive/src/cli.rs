//! The command line: what can be asked of the `olive` command, and the settings as flags.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, Parser, Subcommand};
use serde_json::value::RawValue;

use crate::config::{Config, SETTINGS};
use crate::error::Error;

/// A light task queue: a message arrives, a worker runs the function, the result goes back, the message is acked.
#[derive(Debug, Parser)]
#[command(name = "olive", version, arg_required_else_help = true, after_help = examples(&[
    ("olive demo", "see it work, with nothing else installed"),
    ("olive help run", "what a command can do"),
]))]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Cmd,
    /// File with settings (olive.toml if there is one)
    #[arg(long, global = true, value_name = "FILE", help_heading = "Settings")]
    pub config: Option<PathBuf>,
    /// The settings that were given as flags.
    #[command(flatten)]
    pub settings: Flags,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Cmd {
    /// Run tasks from the queue until SIGTERM or Ctrl-C; a second one leaves at once
    #[command(after_help = examples(&[
        ("olive run --worker-allow proj.tasks --worker-num-workers 4", "Python functions of proj/tasks.py, four at a time"),
        ("olive_amqp_url=amqp://me:secret@rabbit/%2F olive run", "settings come from the environment as well"),
    ]))]
    Run,
    /// Send a task, and wait for its result if asked to
    #[command(after_help = examples(&[
        ("olive submit proj.tasks.add 40 2 --wait", "prints 42"),
        ("olive submit mail.send --kw to=me@home --kw 'copies=2' --timeout 30s", "keyword arguments; prints the task id"),
    ]))]
    Submit(Submit),
    /// Run a broker and workers in one process, with nothing else installed
    #[command(after_help = examples(&[
        ("olive dev", "then, elsewhere: olive submit olive.tasks.sleep_n 1 --wait"),
        ("olive dev --port 5673 --worker-allow proj.tasks", "another port, and Python functions"),
    ]))]
    Dev(Dev),
    /// Show it all once: broker, thread workers and Python process workers under a few thousand tasks
    #[command(after_help = examples(&[
        ("olive demo", "a table at the end; exit 0 if every outcome is the expected one"),
        ("olive demo --tasks 20000", "more of them"),
    ]))]
    Demo(Demo),
    /// Print every setting, its value and where it came from
    #[command(after_help = examples(&[
        ("olive config", "what `olive run` would use here"),
        ("olive config --amqp-qos 10", "with a flag"),
    ]))]
    Config,
}

/// What to send.
#[derive(Debug, Args)]
pub struct Submit {
    /// Function: a registered name, or a Python import path
    pub func: String,
    /// Arguments: JSON where it is JSON, else a string
    #[arg(allow_negative_numbers = true)]
    pub args: Vec<String>,
    /// Keyword argument; the value is read as an argument is
    #[arg(long = "kw", value_name = "NAME=VALUE")]
    pub kwargs: Vec<String>,
    /// Wait for the result and print it: exit 0, 1 if the task failed, 124 if --wait-for is over
    #[arg(long)]
    pub wait: bool,
    /// How long to wait at most
    #[arg(long, value_name = "TIME", value_parser = duration, requires = "wait")]
    pub wait_for: Option<Duration>,
    /// Time limit of the task
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Attempts after the first that fails [as the app has it]
    #[arg(long, value_name = "N")]
    pub max_retries: Option<u32>,
    /// Task id (made up if absent)
    #[arg(long, value_name = "ID")]
    pub tid: Option<String>,
}

/// How to run broker and workers together.
#[derive(Debug, Args)]
pub struct Dev {
    /// Port of the broker on 127.0.0.1, 0 for any [that of olive_amqp_url if it names this machine, else 5672; the next free one if it is taken]
    #[arg(long)]
    pub port: Option<u16>,
}

/// How much to show.
#[derive(Debug, Args)]
pub struct Demo {
    /// How many tasks
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(50..=1_000_000))]
    pub tasks: u32,
}

impl Submit {
    /// The positional arguments as a JSON array.
    pub fn args_json(&self) -> Result<Box<RawValue>, Error> {
        let parts: Vec<String> = self.args.iter().map(|text| json(text)).collect();
        raw(format!("[{}]", parts.join(",")))
    }

    /// The keyword arguments as a JSON object.
    pub fn kwargs_json(&self) -> Result<Box<RawValue>, Error> {
        let mut parts = Vec::new();
        for pair in &self.kwargs {
            let Some((name, value)) = pair.split_once('=').filter(|(name, _)| !name.is_empty())
            else {
                return Err(Error::Config(vec![format!(
                    "--kw {pair:?} is not NAME=VALUE"
                )]));
            };
            parts.push(format!("{}:{}", quoted(name), json(value)));
        }
        raw(format!("{{{}}}", parts.join(",")))
    }
}

fn json(text: &str) -> String {
    match serde_json::from_str::<&RawValue>(text) {
        Ok(value) => value.get().to_owned(),
        Err(_) => quoted(text),
    }
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("strings always encode")
}

fn raw(text: String) -> Result<Box<RawValue>, Error> {
    RawValue::from_string(text)
        .map_err(|e| Error::Config(vec![format!("arguments are not JSON: {e}")]))
}

fn duration(text: &str) -> Result<Duration, String> {
    crate::config::duration(text)
}

// The explanation stands on a line of its own, so that neither is wrapped on a narrow terminal.
fn examples(both: &[(&str, &str); 2]) -> String {
    let lines = both
        .iter()
        .map(|(command, what)| format!("  {command}\n      {what}"));
    format!("Examples:\n{}", lines.collect::<Vec<_>>().join("\n"))
}

/// Settings given as flags: one flag for each, the name of the environment with dashes.
#[derive(Debug, Clone, Default)]
pub struct Flags(Vec<(String, String)>);

impl Flags {
    /// Names as in the environment, and values.
    pub fn iter(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.0.iter().cloned()
    }
}

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        SETTINGS.iter().fold(command, |command, setting| {
            let default = if setting.default.is_empty() {
                "none"
            } else {
                setting.default
            };
            let arg = Arg::new(setting.name)
                .long(setting.flag())
                .help(format!("{} [{default}]", setting.help.trim()))
                .value_name("VALUE")
                .allow_hyphen_values(true)
                .hide_short_help(true)
                .help_heading("Settings");
            command.arg(arg.global(true))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let value =
            |name: &'static str| Some((name.to_owned(), matches.get_one::<String>(name)?.clone()));
        Ok(Self(
            SETTINGS
                .iter()
                .filter_map(|setting| value(setting.name))
                .collect(),
        ))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Cli {
    /// The settings: defaults, file, environment, these flags.
    pub fn load(&self) -> Result<Config, Error> {
        Config::load(
            self.config.as_deref(),
            std::env::vars_os(),
            self.settings.iter(),
        )
    }
}

/// What `olive config` prints.
#[must_use]
pub fn show(config: &Config) -> String {
    let rows: Vec<(&str, String, String)> = SETTINGS
        .iter()
        .map(|s| {
            (
                s.name,
                config.show(s.name).expect("a setting can be shown"),
                config.origin(s.name).to_string(),
            )
        })
        .collect();
    let width =
        |column: fn(&(&str, String, String)) -> usize| rows.iter().map(column).max().unwrap_or(0);
    let (name, value) = (width(|r| r.0.len()), width(|r| r.1.len()));
    rows.iter()
        .map(|r| format!("{:name$}  {:value$}  {}\n", r.0, r.1, r.2))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).expect("a good command line")
    }

    fn submit(line: &str) -> Submit {
        match parse(line).command {
            Cmd::Submit(submit) => submit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_of_every_command_ends_with_two_examples() {
        let mut olive = Cli::command();
        olive.build();
        for command in olive
            .get_subcommands_mut()
            .filter(|c| c.get_name() != "help")
        {
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            let (_, end) = help
                .rsplit_once("Examples:\n")
                .expect("examples at the end");
            let commands = end
                .lines()
                .filter(|line| line.starts_with("  ") && !line.starts_with("   "));
            let commands: Vec<&str> = commands.collect();
            assert_eq!(commands.len(), 2, "{name}: {end}");
            assert!(
                commands.iter().all(|line| line.contains("olive")),
                "{name}: {end}"
            );
        }
    }

    #[test]
    fn arguments_are_json_where_they_are_json_and_strings_elsewhere() {
        let s = submit(
            "olive submit add 40 -2.5 x [1,{\"a\":null}] true 007 1e --kw b=3 --kw c=d=e --timeout 1.5m",
        );
        assert_eq!(
            s.args_json().unwrap().get(),
            r#"[40,-2.5,"x",[1,{"a":null}],true,"007","1e"]"#
        );
        assert_eq!(s.kwargs_json().unwrap().get(), r#"{"b":3,"c":"d=e"}"#);
        assert_eq!(s.timeout, Some(Duration::from_secs(90)));
        let text = submit("olive submit f --kw x")
            .kwargs_json()
            .unwrap_err()
            .to_string();
        assert_eq!(text, "config: --kw \"x\" is not NAME=VALUE");
    }

    #[test]
    fn settings_are_flags_of_every_command() {
        let flags = |line| parse(line).settings.iter().collect::<Vec<_>>();
        assert_eq!(
            flags("olive run --amqp-qos 5"),
            [("olive_amqp_qos".into(), "5".into())]
        );
        assert_eq!(
            flags("olive --log-level debug run"),
            [("log_level".into(), "debug".into())]
        );
        assert_eq!(flags("olive run"), []);
    }

    /// Accepts: cli/config
    #[test]
    fn config_shows_every_setting_and_no_password() {
        let mut config = Config::default();
        config
            .set("olive_amqp_url", "amqp://me:secret@h/v")
            .unwrap();
        let text = show(&config);
        assert_eq!(text.lines().count(), SETTINGS.len());
        assert!(
            text.contains("amqp://me:***@h/v") && !text.contains("secret"),
            "{text}"
        );
        assert!(
            text.lines()
                .any(|l| l.starts_with("olive_amqp_url ") && l.ends_with(" program")),
            "{text}"
        );
    }
}
