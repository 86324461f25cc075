//! The olive command.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use olive::cli::{Cli, Cmd, Submit, show};
use olive::config::Origin;
use olive::message::{Failure, Next};
use olive::submit::{Client, Request};
use olive::{App, Config, Error};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = String::new();
            if let Error::TaskFailed { failure, .. } = &error
                && !failure.trace.is_empty()
            {
                text.push_str(failure.trace.trim_end());
                text.push('\n');
            }
            match &error {
                Error::Config(_) => text.push_str(&error.to_string()),
                _ => text.push_str(&format!("error: {error}")),
            }
            let _ = writeln!(std::io::stderr(), "{text}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), Error> {
    let config = cli.load()?;
    match &cli.command {
        Cmd::Run => {
            log_at(config.log_level);
            app(config).start()
        }
        Cmd::Submit(task) => {
            log_at(config.log_level.min(log::LevelFilter::Warn));
            submit(task, &config)
        }
        Cmd::Dev(dev) => {
            log_at(config.log_level);
            olive::dev::dev(app(config), dev.port, print)
        }
        Cmd::Demo(demo) => {
            // Failing tasks are part of the show, and its table says all of them.
            let asked = config.origin("log_level") != Origin::Default;
            log_at(if asked {
                config.log_level
            } else {
                log::LevelFilter::Error
            });
            olive::demo::demo(&config, demo.tasks, print)
        }
        Cmd::Config => {
            print(show(&config).trim_end());
            Ok(())
        }
    }
}

fn log_at(level: log::LevelFilter) {
    env_logger::Builder::new().filter_level(level).init();
}

/// A reader that went away is no reason to panic.
fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// The functions that sweepea's own producers name, in Rust. An allow-list that names `olive.tasks` has them from Python.
fn app(config: Config) -> App {
    let mut app = App::new(config);
    app.task("olive.tasks.sleep_n", |ctx, (seconds,): (f64,)| {
        let until = std::time::Instant::now() + Duration::try_from_secs_f64(seconds.max(0.0))?;
        while let Some(left) = until.checked_duration_since(std::time::Instant::now())
            && !ctx.cancelled()
        {
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
        Ok(())
    });
    app.task("olive.tasks.do_nothing", |_, ()| Ok(()));
    app
}

fn submit(task: &Submit, config: &Config) -> Result<(), Error> {
    for warning in config.warnings() {
        // Nothing is logged here, and a setting that is not heeded may be why it fails.
        let _ = writeln!(std::io::stderr(), "warning: {warning}");
    }
    let request = Request {
        args: task.args_json()?,
        kwargs: task.kwargs_json()?,
        tid: task.tid.clone(),
        timeout: task.timeout,
        max_retries: task.max_retries,
        ..Request::new(task.func.as_str())
    };
    let result = olive::submit::in_kernel(async {
        let client = Client::connect(config, task.wait).await?;
        let sent = client.send(&request).await?;
        let result = match task.wait {
            true => sent.wait(task.wait_for, tell).await?,
            false => sent.tid.clone(),
        };
        drop(sent);
        client.close().await?;
        Ok(result)
    })?;
    print(&result);
    Ok(())
}

/// Says that an attempt failed, so that waiting for the next one does not look like being stuck.
fn tell(failure: &Failure, next: Option<Next>) {
    let (kind, message) = (&failure.kind, &failure.message);
    let text = match next {
        Some(Next { attempt, of, after }) => format!(
            "attempt {attempt} of {of} failed: {kind}: {message}; again in {:.1} s",
            after.as_secs_f64()
        ),
        None => format!("an attempt failed: {kind}: {message}; it is tried again"),
    };
    let _ = writeln!(std::io::stderr(), "{text}");
}
