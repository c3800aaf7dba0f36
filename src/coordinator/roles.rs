//! How the processes of a bus start each other: `shmbus --bus NAME serve --role ROLE --fd N`.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Child;

use crate::coordinator::directory::{DIRECTORY_VARIABLE, Place};
use crate::os::{process, socket};

/// Which of a bus's two processes to be. Part of the hidden arguments of `shmbus serve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Holds every descriptor and restarts the coordinator.
    Keeper,
    /// Serves the bus.
    Coordinator,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Keeper => "keeper",
            Role::Coordinator => "coordinator",
        }
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Role, String> {
        [Role::Keeper, Role::Coordinator]
            .into_iter()
            .find(|role| role.name() == text)
            .ok_or_else(|| format!("{text:?} is no role; keeper and coordinator are"))
    }
}

/// Starts the other process of the bus from our own program; returns our end of the socket between the two.
pub(crate) fn start(role: Role, place: &Place) -> io::Result<(OwnedFd, Child)> {
    let (ours, theirs) = socket::pair()?;
    let fd = theirs.as_raw_fd().to_string();
    let args = ["--bus", &place.bus, "serve", "--role", role.name(), "--fd", &fd];
    let program = Path::new(process::OWN_PROGRAM);
    let child = process::spawn_with_fd(program, &args, &environment(place), theirs.as_fd())?;
    Ok((ours, child))
}

/// Starts the first keeper of a bus in the background. The caller exits soon after, so that nobody has to reap it.
pub(crate) fn start_detached(place: &Place) -> io::Result<Child> {
    let args = ["--bus", &place.bus, "serve", "--role", Role::Keeper.name()];
    process::spawn_detached(Path::new(process::OWN_PROGRAM), &args, &environment(place))
}

/// Starts `program` so that it starts a bus in the background and exits.
pub(crate) fn start_launcher(program: &Path, place: &Place) -> io::Result<Child> {
    process::spawn_detached(program, &["--bus", &place.bus, "serve", "--spawned"], &environment(place))
}

fn environment(place: &Place) -> [(&'static str, &OsStr); 1] {
    [(DIRECTORY_VARIABLE, place.directory().as_os_str())]
}
