//! The keeper: holds every descriptor of the bus by name and restarts the coordinator. It runs no bus logic, so there
//! is little in it that could fail; if it dies all the same, the coordinator starts the next one (ARCHITECTURE.md §4.7).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::coordinator::adoption;
use crate::coordinator::directory::Place;
use crate::coordinator::link::{self, Incoming, LISTENER, LOCK, Message};
use crate::coordinator::registry::{FIRST_HALF_BYTES, Registry};
use crate::coordinator::roles::{self, Role};
use crate::coordinator::state::Event;
use crate::error::ConnectError;
use crate::os::{process, socket};

/// A coordinator that lived for less has failed at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// So many short lives in a row are restarted without delay: somebody may just be killing it.
const FREE_RESTARTS: u32 = 8;

/// The delay after one more; doubled from there.
const FIRST_DELAY: Duration = Duration::from_millis(10);

/// The longest delay.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// How long a signalled keeper waits for its coordinator to end the bus in good order.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// What ended the wait for the coordinator.
enum Outcome {
    /// The bus has ended.
    Ended,
    /// The coordinator died.
    Died,
}

/// The keeper's whole state.
struct Keeper {
    place: Place,
    store: BTreeMap<String, OwnedFd>,
    signals: SignalFd,
    /// Since a signal told us to end the bus.
    stopping: Option<Instant>,
    short_lives: u32,
}

/// Starts a bus, or goes on with one whose processes died, and keeps it until it ends. `stay`: also while nobody needs it.
pub(crate) fn run_first(place: Place, stay: bool) -> Result<(), ConnectError> {
    let lock = place.lock()?.ok_or_else(|| ConnectError::AlreadyServed { bus: place.bus.clone() })?;
    let listener = place.listen()?;
    let registry = match adoption::left_behind(&place, stay) {
        Some(registry) => registry,
        None => new_registry(&place, stay).map_err(|source| ConnectError::io("cannot create the registry", source))?,
    };
    let store = [(LOCK, lock), (LISTENER, listener), (link::REGISTRY, registry)];
    let store = store.into_iter().map(|(name, fd)| (name.to_owned(), fd)).collect();
    Keeper::new(place, store)?.run(None)
}

/// The registry of a bus of which there is nothing yet.
fn new_registry(place: &Place, stay: bool) -> io::Result<OwnedFd> {
    let bus = crate::coordinator::random_u64();
    let began = Event::Began { bus, stay };
    Registry::create(Some(place.registry()), bus, FIRST_HALF_BYTES, &[began])?.as_fd().try_clone_to_owned()
}

/// Takes the place of a keeper that died: the coordinator at the other end of `link` hands everything over.
pub(crate) fn run_successor(place: Place, link: OwnedFd) -> Result<(), ConnectError> {
    let store =
        link::take_over(link.as_fd()).map_err(|source| ConnectError::io("taking over from the coordinator", source))?;
    Keeper::new(place, store.into_iter().collect())?.run(Some(link))
}

impl Keeper {
    fn new(place: Place, store: BTreeMap<String, OwnedFd>) -> Result<Keeper, ConnectError> {
        process::set_title(c"shmbus-keeper");
        let signals =
            process::termination_signals().map_err(|source| ConnectError::io("cannot take signals", source))?;
        Ok(Keeper { place, store, signals, stopping: None, short_lives: 0 })
    }

    /// Restarts the coordinator until the bus has ended. `link` leads to one that runs already.
    fn run(mut self, link: Option<OwnedFd>) -> Result<(), ConnectError> {
        let mut running = link.map(|link| (link, None));
        loop {
            let started = Instant::now();
            let (link, child) = match running.take() {
                Some(running) => running,
                None => self.start_coordinator()?,
            };
            let outcome = self.serve(link.as_fd());
            drop(link);
            reap(child, &outcome);
            match outcome {
                Ok(Outcome::Ended) => return Ok(()),
                _ if self.stopping.is_some() => return self.remove_names(),
                Ok(Outcome::Died) => {}
                Err(error) => eprintln!("shmbus keeper: lost the coordinator: {error}"),
            }
            if self.pause_after(started.elapsed())? {
                return self.remove_names();
            }
        }
    }

    fn start_coordinator(&self) -> Result<(OwnedFd, Option<Child>), ConnectError> {
        let (link, child) = roles::start(Role::Coordinator, &self.place)
            .map_err(|source| ConnectError::io("cannot start the coordinator", source))?;
        let items = self.store.iter().map(|(name, fd)| (name.clone(), fd.as_fd()));
        // If it dies while it is handed everything, its hang-up is found next.
        if let Err(error) = link::hand_over(link.as_fd(), items) {
            eprintln!("shmbus keeper: handing over to the coordinator: {error}");
        }
        Ok((link, Some(child)))
    }

    /// Keeps what the coordinator sends until it dies or leaves.
    fn serve(&mut self, link: BorrowedFd<'_>) -> io::Result<Outcome> {
        loop {
            match link::receive(link)? {
                Incoming::Message(Message::Store { name }, Some(fd)) => drop(self.store.insert(name, fd)),
                Incoming::Message(Message::Forget { name }, _) => drop(self.store.remove(&name)),
                Incoming::Message(Message::Ready, _) => notify_ready(),
                Incoming::Message(Message::Leaving, _) => return Ok(Outcome::Ended),
                Incoming::Message(..) => {}
                Incoming::HungUp => return Ok(Outcome::Died),
                Incoming::Nothing => {
                    if self.wait(link)? {
                        link::send(link, &Message::Stop, None, Instant::now())?;
                    }
                    if self.stopping.is_some_and(|since| since.elapsed() >= STOP_PATIENCE) {
                        return Ok(Outcome::Died);
                    }
                }
            }
        }
    }

    /// Waits for the coordinator or a signal; whether it was a signal, for the first time.
    fn wait(&mut self, link: BorrowedFd<'_>) -> io::Result<bool> {
        let timeout = match self.stopping {
            None => PollTimeout::NONE,
            Some(since) => socket::round_up(STOP_PATIENCE.saturating_sub(since.elapsed())),
        };
        let mut fds = [PollFd::new(link, PollFlags::POLLIN), PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => Ok(false),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(self.signalled()? && self.stopping.replace(Instant::now()).is_none()),
        }
    }

    fn signalled(&self) -> io::Result<bool> {
        Ok(self.signals.read_signal()?.is_some())
    }

    /// Delays the next start if coordinators keep dying young; whether a signal came meanwhile.
    fn pause_after(&mut self, life: Duration) -> Result<bool, ConnectError> {
        self.short_lives = if life < SHORT_LIFE { self.short_lives + 1 } else { 0 };
        let Some(doublings) = self.short_lives.checked_sub(FREE_RESTARTS) else { return Ok(false) };
        let delay = FIRST_DELAY.saturating_mul(1 << doublings.min(16)).min(MAX_DELAY);
        socket::wait(self.signals.as_fd(), PollFlags::POLLIN, Some(Instant::now() + delay))
            .and_then(|_| self.signalled())
            .map_err(|source| ConnectError::io("cannot wait", source))
    }

    /// Ends the bus without a coordinator.
    fn remove_names(&self) -> Result<(), ConnectError> {
        let Some(lock) = self.store.get(LOCK) else { return Ok(()) };
        self.place.remove(lock.as_fd()).map_err(|source| ConnectError::io("cannot remove the socket", source))
    }
}

/// Reaps our child. A coordinator that hung up is dead or about to be; one that broke the protocol or does not end is
/// killed, since there must never be two.
fn reap(child: Option<Child>, outcome: &io::Result<Outcome>) {
    let Some(mut child) = child else { return };
    if !matches!(outcome, Ok(Outcome::Ended)) {
        let _ = child.kill();
    }
    let _ = child.wait();
}

/// Tells systemd that the service is up, if it asked for it.
fn notify_ready() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::SocketAddr;

    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = sent {
        eprintln!("shmbus keeper: cannot notify {}: {error}", path.display());
    }
}
