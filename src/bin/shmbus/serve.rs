//! `shmbus serve`: the coordinator and its keeper in the foreground.

use std::os::fd::RawFd;

use shmbus::Who;
use shmbus::coordinator::{Role, ServeOptions, serve};

use crate::{Ended, Globals};

/// Run the coordinator and its keeper in the foreground, until `shmbus stop`, SIGTERM or Ctrl-C.
///
/// Nobody has to do this by hand: every command starts one where none runs, and that one goes away by itself when
/// nothing is left to keep. Use it under systemd, or to see what the coordinator says.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus --bus trading serve")]
pub(crate) struct Args {
    /// Who may use the bus besides root and you: a user's name or number, @GROUP, or * (repeat it or separate by commas)
    ///
    /// They must be able to search the socket directory (--dir): mode 0755, or 0750 or 0770 and a group. It must belong to you, or you
    /// are root. A group that may write it can take the bus's names away, and so end it for newcomers; it cannot serve in your place.
    /// Writable by everybody it is refused, unless it is sticky. What they may do on a topic is for its creator to say: `shmbus create --allow`.
    #[arg(long, value_name = "WHO", value_delimiter = ',')]
    allow: Vec<Who>,
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
        allow: args.allow,
        spawned: args.spawned,
        role: args.role,
        fd: args.fd,
    })?;
    Ok(Ended::Well)
}
