//! `shmbus stop`: ends a bus.

use serde::Serialize;
use shmbus::ConnectError;

use crate::output::{json_line, line};
use crate::{Ended, Globals};

/// End the bus: its coordinator, keeper and everything its topics hold.
///
/// Publishers and subscribers are told that the bus was stopped. Fine where nothing runs.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus stop")]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Stopped<'a> {
    bus: &'a str,
    /// Whether a coordinator ran.
    stopped: bool,
}

pub(crate) fn run(globals: &Globals, _args: Args) -> anyhow::Result<Ended> {
    let bus = globals.bus_name();
    let stopped = match globals.bus_options().spawn(false).open() {
        Ok(running) => running.stop().map(|()| true)?,
        Err(ConnectError::NotRunning { .. }) => false,
        Err(e) => return Err(e.into()),
    };
    match (globals.json, stopped) {
        (true, _) => json_line(&Stopped { bus, stopped })?,
        (false, true) => line(format_args!("stopped bus {bus}"))?,
        (false, false) => line(format_args!("bus {bus} was not running"))?,
    }
    Ok(Ended::Well)
}
