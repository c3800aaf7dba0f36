//! `shmbus serve`: the coordinator and its keeper in the foreground.

use std::os::fd::RawFd;

use shmbus::coordinator::{Role, ServeOptions, serve};

use crate::{Ended, Globals};

/// Run the coordinator and its keeper in the foreground, until `shmbus stop`, SIGTERM or Ctrl-C.
///
/// Nobody has to do this by hand: every command starts one where none runs, and that one goes away by itself when
/// nothing is left to keep. Use it under systemd, or to see what the coordinator says.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus --bus trading serve")]
pub(crate) struct Args {
    /// Start the bus in the background and return; how clients start one
    #[arg(long, hide = true)]
    spawned: bool,
    /// Be one of the bus's two processes; how they start each other
    #[arg(long, hide = true)]
    role: Option<Role>,
    /// The socket between the two
    #[arg(long, hide = true)]
    fd: Option<RawFd>,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    serve(ServeOptions {
        bus: globals.bus_name().to_owned(),
        directory: globals.dir.clone(),
        spawned: args.spawned,
        role: args.role,
        fd: args.fd,
    })?;
    Ok(Ended::Well)
}
