//! The keeper: holds every descriptor of the bus by name and restarts the coordinator. It runs no bus logic, so there
//! is little in it that could fail; if it dies all the same, the coordinator starts the next one (ARCHITECTURE.md §4.7).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::access::Who;
use crate::coordinator::adoption;
use crate::coordinator::directory::Place;
use crate::coordinator::link::{self, GIVEN_LISTENER, Incoming, LISTENER, LOCK, Message};
use crate::coordinator::registry::{FIRST_HALF_BYTES, Registry};
use crate::coordinator::roles::{self, Role};
use crate::coordinator::state::Event;
use crate::error::ConnectError;
use crate::os::memfd::{self, free_elsewhere};
use crate::os::systemd::{self, Manager};
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

/// Every descriptor of the bus, by name.
type Store = BTreeMap<String, OwnedFd>;

/// The keeper's whole state.
struct Keeper {
    place: Place,
    store: Store,
    /// Keeps the same as we do, for the case that all of us die.
    manager: Option<Manager>,
    signals: SignalFd,
    /// Since a signal told us to end the bus.
    stopping: Option<Instant>,
    short_lives: u32,
}

/// Starts a bus and keeps it until it ends, in the background: it goes away when nobody needs it.
pub(crate) fn run_spawned(place: Place) -> Result<(), ConnectError> {
    let store = found(&place, false, &[], Store::new())?;
    Keeper::new(place, store, None)?.run(None)
}

/// Serves a bus in the foreground until it is stopped. Under a service manager: on the socket that it hands over, if it
/// does, and with what it kept of the bus when all of its processes died.
pub(crate) fn run_foreground(place: Place, allow: &[Who]) -> Result<(), ConnectError> {
    let handed_over = systemd::handed_over()
        .map_err(|source| ConnectError::io("taking what the service manager hands over", source))?;
    let manager = systemd::Manager::from_environment();
    let (store, strange) = service_store(&place, handed_over)?;
    let store = found(&place, true, allow, store)?;
    if let Some(manager) = &manager {
        strange.iter().for_each(|name| manager.forget(name));
        store.iter().for_each(|(name, fd)| manager.store(name, fd.as_fd()));
    }
    Keeper::new(place, store, manager)?.run(None)
}

/// What of the descriptors that a service manager handed over belongs to the bus, and the names of the rest.
fn service_store(place: &Place, items: Vec<(String, OwnedFd)>) -> Result<(Store, Vec<String>), ConnectError> {
    let (mut store, mut strange) = (Store::new(), Vec::new());
    for (name, fd) in items {
        if socket::adopt_listener(fd.as_fd(), place.socket()).unwrap_or(false) {
            let name = if name == LISTENER { LISTENER } else { GIVEN_LISTENER };
            store.insert(name.to_owned(), fd);
        } else {
            // A registry that was outgrown may lie beside its successor, under the same name: the larger one counts.
            match store.get(&name) {
                Some(known) if len_of(known) >= len_of(&fd) => {}
                _ => drop(store.insert(name, fd)),
            }
        }
    }
    let is_alive = match (store.get(LOCK), store.contains_key(link::REGISTRY)) {
        (Some(lock), true) => {
            place.names(lock.as_fd()).map_err(|source| ConnectError::io("cannot look at the lock", source))?
        }
        _ => false,
    };
    if is_alive
        && let Some(newest) = store.get(link::REGISTRY).and_then(|kept| adoption::named_like(place, kept.as_fd()))
    {
        // It may have outgrown the one that the manager was told of; what else it was not told of, participants have.
        store.insert(link::REGISTRY.to_owned(), newest);
    }
    if !is_alive {
        // Of a bus whose names are gone nobody knows any more; a listener serves the next one as well.
        let is_socket = |name: &str| name == GIVEN_LISTENER;
        strange.extend(store.keys().filter(|name| !is_socket(name)).cloned());
        store.retain(|name, _| is_socket(name));
    }
    Ok((store, strange))
}

fn len_of(fd: &OwnedFd) -> u64 {
    fd.try_clone().and_then(|fd| File::from(fd).metadata()).map_or(0, |metadata| metadata.len())
}

/// Adds to `store` what a bus cannot do without and is not there: lock, listener, registry.
fn found(place: &Place, stay: bool, allow: &[Who], mut store: Store) -> Result<Store, ConnectError> {
    if !store.contains_key(LOCK) {
        let lock = place.lock()?.ok_or_else(|| ConnectError::AlreadyServed { bus: place.bus.clone() })?;
        store.insert(LOCK.to_owned(), lock);
    }
    if !store.contains_key(LISTENER) && !store.contains_key(GIVEN_LISTENER) {
        store.insert(LISTENER.to_owned(), place.listen()?);
    }
    if !store.contains_key(link::REGISTRY) {
        let registry = match adoption::left_behind(place, stay, allow) {
            Some(registry) => registry,
            None => new_registry(place, stay, allow)
                .map_err(|source| ConnectError::io("cannot create the registry", source))?,
        };
        store.insert(link::REGISTRY.to_owned(), registry);
    }
    // A service manager has its own idea of its socket.
    if store.contains_key(LISTENER)
        && let Some(registry) = store.get(link::REGISTRY)
    {
        let others = adoption::lets_others_in(registry.as_fd(), place.registry());
        place.open_socket(others).map_err(|source| ConnectError::io("cannot set the socket's mode", source))?;
    }
    Ok(store)
}

/// The registry of a bus of which there is nothing yet.
fn new_registry(place: &Place, stay: bool, allow: &[Who]) -> io::Result<OwnedFd> {
    let bus = crate::coordinator::random_u64();
    let allowed = (!allow.is_empty()).then(|| Event::Allowed { users: allow.to_vec() });
    let events: Vec<Event> = [Event::Began { bus, stay }].into_iter().chain(allowed).collect();
    Registry::create(Some(place.registry()), bus, FIRST_HALF_BYTES, &events)?.as_fd().try_clone_to_owned()
}

/// Takes the place of a keeper that died: the coordinator at the other end of `link` hands everything over.
pub(crate) fn run_successor(place: Place, link: OwnedFd) -> Result<(), ConnectError> {
    let store =
        link::take_over(link.as_fd()).map_err(|source| ConnectError::io("taking over from the coordinator", source))?;
    Keeper::new(place, store.into_iter().collect(), None)?.run(Some(link))
}

impl Keeper {
    fn new(place: Place, store: Store, manager: Option<Manager>) -> Result<Keeper, ConnectError> {
        let place = if store.contains_key(GIVEN_LISTENER) { place.with_given_socket() } else { place };
        process::set_title(c"shmbus-keeper");
        let signals =
            process::termination_signals().map_err(|source| ConnectError::io("cannot take signals", source))?;
        Ok(Keeper { place, store, manager, signals, stopping: None, short_lives: 0 })
    }

    /// Restarts the coordinator until the bus has ended. `link` leads to one that runs already.
    fn run(mut self, link: Option<OwnedFd>) -> Result<(), ConnectError> {
        let mut running = link.map(|link| (link, None));
        let mut has_run = false;
        loop {
            let started = Instant::now();
            match running.take().map_or_else(|| self.start_coordinator(), Ok) {
                Ok((link, child)) => {
                    has_run = true;
                    if let Some(ended) = self.attend(link, child) {
                        return ended;
                    }
                }
                // For want of a process or a descriptor, say: what we keep would be lost with us.
                Err(error) if has_run => eprintln!("shmbus keeper: {error}"),
                Err(error) => return Err(error),
            }
            if self.pause_after(started.elapsed())? {
                return self.remove_names();
            }
        }
    }

    /// Serves a coordinator until it is no more; how the bus has ended, if it has.
    fn attend(&mut self, link: OwnedFd, child: Option<Child>) -> Option<Result<(), ConnectError>> {
        let outcome = self.serve(link.as_fd());
        drop(link);
        reap(child, &outcome);
        match outcome {
            Ok(Outcome::Ended) => return Some(self.give_up_store()),
            _ if self.stopping.is_some() => return Some(self.remove_names()),
            Ok(Outcome::Died) => {}
            Err(error) => eprintln!("shmbus keeper: lost the coordinator: {error}"),
        }
        None
    }

    fn start_coordinator(&self) -> Result<(OwnedFd, Option<Child>), ConnectError> {
        let (link, mut child) = roles::start(Role::Coordinator, &self.place)
            .map_err(|source| ConnectError::io("cannot start the coordinator", source))?;
        let items = self.store.iter().map(|(name, fd)| (name.clone(), fd.as_fd()));
        if let Err(error) = link::hand_over(link.as_fd(), items) {
            eprintln!("shmbus keeper: handing over to the coordinator: {error}");
            // It is dead, or stopped before it has touched anything: going on later it would wait for the rest, and we for it.
            // Its hang-up is found next.
            let _ = child.kill();
        }
        Ok((link, Some(child)))
    }

    /// Keeps what the coordinator sends until it dies or leaves.
    fn serve(&mut self, link: BorrowedFd<'_>) -> io::Result<Outcome> {
        loop {
            match link::receive(link)? {
                Incoming::Message(Message::Store { name }, Some(fd)) => self.keep(name, fd),
                Incoming::Message(Message::Forget { name }, _) => self.forget(&name),
                Incoming::Message(Message::Ready, _) => self.tell("READY=1"),
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

    /// Keeps a descriptor here, and with the service manager.
    fn keep(&mut self, name: String, fd: OwnedFd) {
        if let Some(manager) = &self.manager {
            manager.store(&name, fd.as_fd());
        }
        self.store.insert(name, fd);
    }

    fn forget(&mut self, name: &str) {
        let Some(fd) = self.store.remove(name) else { return };
        if let Some(manager) = &self.manager {
            manager.forget(name);
        }
        // It may be the last of a topic of gigabytes.
        free_elsewhere(memfd::held_bytes(fd.as_fd()), fd);
    }

    fn tell(&self, state: &str) {
        if let Some(manager) = &self.manager {
            manager.tell(state);
        }
    }

    /// The bus has ended: the next process of the service begins a new one.
    fn give_up_store(&self) -> Result<(), ConnectError> {
        self.tell("STOPPING=1");
        if let Some(manager) = &self.manager {
            self.store.keys().for_each(|name| manager.forget(name));
        }
        Ok(())
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
        self.give_up_store()?;
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
