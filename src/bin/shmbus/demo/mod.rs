//! `shmbus demo`: the whole bus in under a minute, with separate processes; every claim is checked.

mod figures;
mod file;
mod kill;
mod order;
mod screen;
mod worker;

use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::sandbox::Sandbox;
use crate::{Ended, Globals, signals};
use screen::Screen;

/// See the whole bus at work: order, a file, two kills and the figures of this machine, in under a minute.
///
/// Everything runs in separate processes on a private bus that is gone at the end. Each step is checked; the exit code
/// is 1 when one fails. With --json: one object a step, {step, ok, ...}.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus demo")]
pub(crate) struct Args {
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(clap::Subcommand)]
enum Role {
    /// A process of the demo; started by it
    #[command(hide = true)]
    Worker(worker::Args),
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    if let Some(Role::Worker(worker)) = args.role {
        return worker::run(globals, worker);
    }
    // Every wait looks for signals: what the grace cannot end is stuck.
    signals::install(Duration::from_secs(20), Box::new(Sandbox::abandon))?;
    let started = Instant::now();
    let screen = Screen::new(globals.json);
    screen.line("shmbus demo: separate processes on a private bus; every claim is checked")?;
    let sandbox = Sandbox::new()?;
    let shown = show(&screen, &sandbox);
    let closed = sandbox.close();
    if let Some(signal) = signals::caught() {
        return Ok(Ended::BySignal(signal));
    }
    shown?;
    closed.context("the demo left something behind")?;
    let seconds = started.elapsed().as_secs_f64();
    screen.line(&format!("\nAll checks passed in {seconds:.0} s. No process, file or memory is left."))?;
    Ok(Ended::Well)
}

fn show(screen: &Screen, sandbox: &Sandbox) -> anyhow::Result<()> {
    let bus = sandbox.open()?;
    order::run(screen, sandbox, &bus).map_err(|e| e.context("step 1, order"))?;
    file::run(screen, sandbox, &bus).map_err(|e| e.context("step 2, a file"))?;
    kill::run(screen, sandbox, &bus).map_err(|e| e.context("step 3, kills"))?;
    drop(bus);
    figures::run(screen, sandbox).map_err(|e| e.context("step 4, figures"))
}
