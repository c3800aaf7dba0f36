//! `shmbus respond`: a command replies to requests.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use shmbus::{GoneReason, RecvError, Topic};

use crate::{Ended, Globals, signals, values};

/// How often a waiting `respond` looks for signals.
const LOOK: Duration = Duration::from_millis(100);

/// Run a command for each request: the request is its standard input, its standard output the reply.
///
/// The command is run by the shell, one request at a time. Where it fails nothing is replied and a line on standard error
/// says so. Runs until Ctrl-C. A missing topic is created, with envelopes.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus respond upper --exec 'tr a-z A-Z'")]
pub(crate) struct Args {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// The command
    #[arg(long, value_name = "COMMAND")]
    exec: String,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let mut responder = globals.open_bus()?.responder(Topic::named(args.topic.as_str()))?;
    let stuck = || "ended by a signal while the command was running".to_owned();
    signals::install(Duration::from_secs(1), Box::new(stuck))?;
    loop {
        if let Some(signal) = signals::caught() {
            return Ok(Ended::BySignal(signal));
        }
        let request = match responder.recv_timeout(LOOK) {
            Ok(request) => request,
            Err(RecvError::TimedOut) => continue,
            Err(RecvError::Gone(GoneReason::Stopped)) => return Ok(Ended::Well),
            Err(RecvError::Lagged { from, to }) => {
                eprintln!("shmbus: topic {:?} lost requests {from}..{to}: overwritten", args.topic);
                continue;
            }
            Err(error) => anyhow::bail!("topic {:?}: {error}", args.topic),
        };
        let output = execute(&args.exec, request.payload())?;
        if !output.status.success() {
            eprintln!("shmbus: no reply: the command ended with {}", output.status);
        } else if let Err(error) = request.reply(&output.stdout) {
            eprintln!("shmbus: no reply: {error}");
        }
    }
}

/// Runs the command with `input`; its standard error is ours.
fn execute(command: &str, input: &[u8]) -> anyhow::Result<Output> {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = shell.spawn().context("cannot start the shell")?;
    let stdin = child.stdin.take();
    // Both ends at once: the command may write before it has read everything, and need not read at all.
    thread::scope(|scope| {
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        child.wait_with_output().context("cannot wait for the command")
    })
}
