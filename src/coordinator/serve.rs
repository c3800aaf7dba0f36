//! `shmbus serve`, whichever process of the bus it is to become.

use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::access::Who;
use crate::coordinator::directory::Place;
use crate::coordinator::keeper;
use crate::coordinator::roles::{self, Role};
use crate::coordinator::server::Server;
use crate::error::ConnectError;
use crate::os::process;

/// What `shmbus serve` was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServeOptions {
    /// The bus's name.
    pub bus: String,
    /// The socket directory; `None` for the usual one.
    pub directory: Option<PathBuf>,
    /// Who may use the bus, besides root and the user who runs it. Kept when it is restarted.
    pub allow: Vec<Who>,
    /// Start the bus in the background and return (`--spawned`, hidden). It goes away when nobody needs it.
    pub spawned: bool,
    /// Be one of the bus's processes (`--role`, hidden).
    pub role: Option<Role>,
    /// The socket inherited from the other process (`--fd`, hidden).
    pub fd: Option<RawFd>,
}

/// Serves a bus in the foreground until it is stopped, or plays the part that the hidden options name.
///
/// SIGTERM and SIGINT end the bus in good order. Call it before the process has other threads.
pub fn serve(options: ServeOptions) -> Result<(), ConnectError> {
    let place = Place::find(&options.bus, options.directory.as_deref())?;
    place.check_serves()?;
    if options.spawned {
        let started = roles::start_detached(&place);
        return started.map(drop).map_err(|source| ConnectError::io("cannot start the bus", source));
    }
    process::raise_descriptor_limit()
        .map_err(|source| ConnectError::io("cannot raise the descriptor limit", source))?;
    match (options.role, options.fd) {
        (None, _) => keeper::run_foreground(place, &options.allow),
        (Some(Role::Keeper), None) => keeper::run_spawned(place),
        (Some(Role::Keeper), Some(fd)) => keeper::run_successor(place, inherited(fd)?),
        (Some(Role::Coordinator), Some(fd)) => coordinate(place, inherited(fd)?),
        (Some(Role::Coordinator), None) => {
            let mend = "start a bus with `shmbus serve`; the role is for its own use";
            Err(ConnectError::Refused {
                path: place.socket().to_owned(),
                problem: "a coordinator needs --fd".into(),
                mend,
            })
        }
    }
}

fn coordinate(place: Place, link: std::os::fd::OwnedFd) -> Result<(), ConnectError> {
    process::set_title(c"shmbus-coord");
    let signals = process::termination_signals().map_err(|source| ConnectError::io("cannot take signals", source))?;
    let server =
        Server::resume(place, link, signals).map_err(|source| ConnectError::io("cannot resume the bus", source))?;
    server.run().map_err(|source| ConnectError::io("the coordinator failed", source))
}

fn inherited(fd: RawFd) -> Result<std::os::fd::OwnedFd, ConnectError> {
    process::inherited(fd).map_err(|source| ConnectError::io(format!("--fd {fd} was not inherited"), source))
}
