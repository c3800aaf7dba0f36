//! The `shmbus` command: publish, subscribe, look, create, measure. A file per subcommand.

mod bench;
mod create;
mod demo;
mod dlq;
mod doctor;
mod group;
mod ls;
mod output;
mod peek;
mod publish;
mod purge;
mod remove;
mod request;
mod respond;
mod route;
mod sandbox;
mod serve;
mod show;
mod signals;
mod stop;
mod subscribe;
mod values;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use shmbus::{Bus, BusOptions, ConnectError};

use crate::output::{explain, one_line, stdout_is_closed};

/// A message bus for the processes of one host, in shared memory.
///
/// Publishers and subscribers share memory; a coordinator that starts by itself hands it out. Try `shmbus demo`.
#[derive(Parser)]
#[command(name = "shmbus", version, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 ok, 1 failed, 2 wrong usage, 130 ended by Ctrl-C.\n\
    Example:    seq 5 | shmbus pub numbers && shmbus sub numbers --from oldest --count 5")]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(clap::Args)]
#[command(next_help_heading = "Options of every command")]
struct Globals {
    /// Which bus [default: default]
    #[arg(long, global = true, env = "SHMBUS_BUS", value_name = "NAME", hide_env_values = true)]
    bus: Option<String>,
    /// Directory of the buses' sockets [default: /run/shmbus, $XDG_RUNTIME_DIR/shmbus, else /tmp/shmbus-UID]
    #[arg(long, global = true, env = "SHMBUS_DIR", value_name = "PATH", hide_env_values = true)]
    dir: Option<PathBuf>,
    /// Print one JSON object a line instead of text for people
    #[arg(long, global = true)]
    json: bool,
    /// Fail where no coordinator runs instead of starting one
    #[arg(long, global = true)]
    no_spawn: bool,
}

impl Globals {
    /// The library's options for the bus these flags name.
    fn bus_options(&self) -> BusOptions {
        let mut options = Bus::options();
        if let Some(name) = &self.bus {
            options = options.name(name);
        }
        if let Some(directory) = &self.dir {
            options = options.directory(directory.clone());
        }
        options.spawn(!self.no_spawn)
    }

    /// Finds the bus, or starts its coordinator unless `--no-spawn` forbids it.
    fn open_bus(&self) -> Result<Bus, ConnectError> {
        self.bus_options().open()
    }

    /// The bus's name, for messages.
    fn bus_name(&self) -> &str {
        self.bus.as_deref().unwrap_or("default")
    }
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Serve(serve::Args),
    Stop(stop::Args),
    Pub(publish::Args),
    Sub(subscribe::Args),
    Request(request::Args),
    Respond(respond::Args),
    Ls(ls::Args),
    Show(show::Args),
    Create(create::Args),
    Rm(remove::Args),
    Group(group::Args),
    Route(route::Args),
    Dlq(dlq::Args),
    Purge(purge::Args),
    Peek(peek::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
}

/// How a command ended when it did not fail.
enum Ended {
    Well,
    /// It did what it was asked to, and the answer is no: exit code 1 without a word more.
    Badly,
    /// By this signal (SIGINT, SIGTERM), tidily.
    BySignal(i32),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    match run(cli) {
        Ok(Ended::Well) => ExitCode::SUCCESS,
        Ok(Ended::Badly) => ExitCode::FAILURE,
        Ok(Ended::BySignal(signal)) => ExitCode::from(128 + signal as u8),
        // `shmbus sub t | head -1`: the reader has all it wanted.
        Err(e) if stdout_is_closed(&e) => ExitCode::SUCCESS,
        Err(e) if e.is::<clap::Error>() => e.downcast_ref().map_or(ExitCode::FAILURE, usage),
        Err(e) => {
            eprintln!("shmbus: {}", explain(&e));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<Ended> {
    let globals = &cli.globals;
    match cli.command {
        Command::Demo(args) => demo::run(globals, args),
        Command::Serve(args) => serve::run(globals, args),
        Command::Stop(args) => stop::run(globals, args),
        Command::Pub(args) => publish::run(globals, args),
        Command::Sub(args) => subscribe::run(globals, args),
        Command::Request(args) => request::run(globals, args),
        Command::Respond(args) => respond::run(globals, args),
        Command::Ls(args) => ls::run(globals, args),
        Command::Show(args) => show::run(globals, args),
        Command::Create(args) => create::run(globals, args),
        Command::Rm(args) => remove::run(globals, args),
        Command::Group(args) => group::run(globals, args),
        Command::Route(args) => route::run(globals, args),
        Command::Dlq(args) => dlq::run(globals, args),
        Command::Purge(args) => purge::run(globals, args),
        Command::Peek(args) => peek::run(globals, args),
        Command::Bench(args) => bench::run(globals, args),
        Command::Doctor(args) => doctor::run(globals, args),
    }
}

/// Arguments that are each well formed and do not go together.
fn wrong_usage(what: impl std::fmt::Display) -> anyhow::Error {
    clap::Error::raw(ErrorKind::ArgumentConflict, what).into()
}

/// Help and version go out as asked; a wrong command line gets one line that says what is wrong.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(2)
        }
        _ => {
            let text = error.to_string();
            let what = text.split("\n\nUsage").next().unwrap_or(&text);
            let what = what.trim_start_matches("error: ").split("\n\nFor more").next().unwrap_or(what);
            // To pass a mistyped option as a value is nobody's wish.
            let what = what.split("\n\n  tip: to pass '").next().unwrap_or(what);
            let _ = writeln!(io::stderr(), "shmbus: {} (see `{} --help`)", one_line(what), command_given());
            ExitCode::from(2)
        }
    }
}

/// The command whose help says more: as far as the arguments name one.
fn command_given() -> String {
    let (mut name, mut command) = ("shmbus".to_owned(), Cli::command());
    for argument in std::env::args().skip(1) {
        if let Some(found) = command.find_subcommand(&argument).cloned() {
            name = format!("{name} {argument}");
            command = found;
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
