//! `shmbus serve`: the coordinator and its keeper in the foreground.

use shmbus::coordinator::{ServeOptions, serve};

use crate::{Ended, Globals};

/// Run the coordinator and its keeper in the foreground, until `shmbus stop`, SIGTERM or Ctrl-C.
///
/// Nobody has to do this by hand: every command starts one where none runs, and that one goes away by itself when
/// nothing is left to keep. Use it under systemd, or to see what the coordinator says.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus --bus trading serve")]
pub(crate) struct Args {}

pub(crate) fn run(globals: &Globals, _args: Args) -> anyhow::Result<Ended> {
    serve(ServeOptions { name: globals.bus.clone(), directory: globals.dir.clone() })?;
    Ok(Ended::Well)
}
