//! What a service manager hands over and is told: sockets and stored descriptors in, state and descriptors to store out
//! (sd_listen_fds(3), sd_notify(3)). Nothing of it is used where the environment names no manager.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::os::{process, socket};

/// The first descriptor that is handed over (SD_LISTEN_FDS_START).
const FIRST_FD: RawFd = 3;

/// Most descriptors that are believed.
const MAX_FDS: RawFd = 1 << 20;

/// Every descriptor that the manager started this process with, and its name. To be called once, before anything else
/// opens descriptors.
pub(crate) fn handed_over() -> io::Result<Vec<(String, OwnedFd)>> {
    let number = |name| env::var(name).ok()?.parse::<RawFd>().ok();
    // Both are inherited by our children, whom they do not concern.
    if number("LISTEN_PID") != RawFd::try_from(std::process::id()).ok() {
        return Ok(Vec::new());
    }
    let count = number("LISTEN_FDS").unwrap_or(0).clamp(0, MAX_FDS);
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    (FIRST_FD..FIRST_FD + count).zip(names).map(|(raw, name)| Ok((name, process::inherited(raw)?))).collect()
}

/// The manager that started this process as a service.
pub(crate) struct Manager {
    path: OsString,
}

impl Manager {
    /// `None` where `$NOTIFY_SOCKET` is not set.
    pub(crate) fn from_environment() -> Option<Manager> {
        env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()).map(|path| Manager { path })
    }

    /// Says that the service is up, or what else `state` says. No use failing for it.
    pub(crate) fn tell(&self, state: &str) {
        self.send(state, None);
    }

    /// Has the manager keep a descriptor and hand it to the next process of this service. It is not to be watched: that
    /// somebody died is our successor's to find out.
    pub(crate) fn store(&self, name: &str, fd: BorrowedFd<'_>) {
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), Some(fd));
    }

    /// Has it close everything of this name.
    pub(crate) fn forget(&self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
    }

    fn send(&self, state: &str, fd: Option<BorrowedFd<'_>>) {
        if let Err(error) = self.try_send(state, fd) {
            eprintln!("shmbus keeper: cannot notify {}: {error}", self.path.display());
        }
    }

    /// A socket for each message: the manager may have been started anew since the last one.
    fn try_send(&self, state: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let address = match self.path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&self.path)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket::send_waiting(socket.as_fd(), state.as_bytes(), fd.as_slice())
    }
}
