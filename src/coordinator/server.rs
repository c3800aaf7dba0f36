//! The coordinator's loop: it sleeps in epoll until a client asks, a process dies or the keeper speaks. One request a
//! client and round, and no wait for any of them, so nobody delays the others.
//!
//! This file is the loop, from its start to its end; what it calls is beside it.

mod clock;
mod connections;
mod counting;
mod keeper;
mod participants;
mod requests;
mod unfinished;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::signalfd::SignalFd;

use crate::coordinator::adoption;
use crate::coordinator::burial::Burial;
use crate::coordinator::connection::Connection;
use crate::coordinator::directory::Place;
use crate::coordinator::estate::Estate;
use crate::coordinator::link::{self, GIVEN_LISTENER, LISTENER, LOCK, Link, Message};
use crate::coordinator::protocol::MAX_PACKET_BYTES;
use crate::coordinator::server::connections::{decline, spare};
use crate::coordinator::server::counting::Asked;
use crate::error::Refusal;
use crate::os::socket;

/// A bus that nobody has found yet waits longer than one that was left.
const FIRST_LINGER: Duration = Duration::from_secs(5);

/// Connections accepted in one round, and events looked at.
const ACCEPTS_PER_ROUND: usize = 16;
const EVENTS_PER_ROUND: usize = 64;

/// What an epoll event is about; clients and participants add their number.
const KIND_SHIFT: u32 = 60;
const KIND_LISTENER: u64 = 1;
const KIND_KEEPER: u64 = 2;
const KIND_SIGNAL: u64 = 3;
const KIND_CLIENT: u64 = 4;
const KIND_PARTICIPANT: u64 = 5;

fn token(kind: u64, number: u64) -> u64 {
    kind << KIND_SHIFT | number
}

/// A serving coordinator.
pub(crate) struct Server {
    place: Place,
    lock: OwnedFd,
    listener: OwnedFd,
    epoll: Epoll,
    signals: Option<SignalFd>,
    estate: Estate,
    clients: HashMap<u64, Connection>,
    /// Which connection a participant has; those without one wait for it to come back.
    connected: HashMap<u64, u64>,
    next_client: u64,
    /// Users of whom some process presented what is no segment.
    barred: HashSet<u32>,
    /// Given up for a moment when there is no descriptor left to accept, and thus refuse, a connection with.
    spare: Option<File>,
    /// When the bus goes away, unless somebody comes.
    leave_at: Option<Instant>,
    /// When to look at the ledgers' due times.
    renew_at: Instant,
    /// When to start a keeper again; never where the bus is hosted on a thread.
    keeper_at: Option<Instant>,
    /// When to tell the keeper once more what it did not take, if there is any.
    keep_at: Instant,
    /// When to look for messages that have grown too old; never while no topic gives them up by age.
    age_at: Option<Instant>,
    /// When to look for messages that have expired; never while no group may have such.
    expiry_at: Option<Instant>,
    burial: Burial,
    /// When to look at those without a connection, and how long was waited for it.
    look: Option<(Instant, Duration)>,
    /// By user and connection: who waits for the status of a topic with long ledgers.
    counting: BTreeMap<(u32, u64), Asked>,
    /// For which user that was done last.
    counted_for: u32,
    /// When to try again what could not be sent for want of descriptors.
    retry_at: Option<Instant>,
    /// What is done in parts.
    unfinished: unfinished::Queue,
    hosted: bool,
    ended: bool,
    /// Where packets are received.
    buffer: Box<[u8]>,
}

impl Server {
    /// A bus without a keeper, on a thread of this process: new, or what is left of one whose processes died.
    pub(crate) fn host(place: Place, lock: OwnedFd, listener: OwnedFd) -> io::Result<Server> {
        let estate = match adoption::left_behind(&place, false, &[]) {
            None => Estate::found(crate::coordinator::random_u64(), Some(place.registry()))?,
            Some(registry) => {
                let (mut store, path) = (BTreeMap::new(), place.registry());
                place.open_socket(adoption::lets_others_in(registry.as_fd(), path))?;
                let gathered = adoption::gather(registry.as_fd(), path, listener.as_fd(), &mut store, None)?;
                let resumed = Estate::resume(store, &gathered, registry, Some(path), None);
                resumed.map_err(|(error, _)| io::Error::other(error))?
            }
        };
        Server::new(place, lock, listener, estate, None)
    }

    /// The bus that the keeper at the other end of `link` holds.
    pub(crate) fn resume(place: Place, link: OwnedFd, signals: SignalFd) -> io::Result<Server> {
        let mut store: BTreeMap<String, OwnedFd> = link::take_over(link.as_fd())?.into_iter().collect();
        let given = store.remove(GIVEN_LISTENER);
        let place = if given.is_some() { place.with_given_socket() } else { place };
        store.extend(given.map(|listener| (LISTENER.to_owned(), listener)));
        let mut take = |name: &str| {
            let missing = || io::Error::other(format!("the keeper handed over no {name}"));
            store.remove(name).ok_or_else(missing)
        };
        let (lock, listener, mut registry) = (take(LOCK)?, take(LISTENER)?, take(link::REGISTRY)?);
        let mut link = Link::new(link, None);
        let path = place.registry();
        if let Some(grown) = adoption::outgrown(&place, registry.as_fd()) {
            // If it cannot be told now, our successor finds out like us.
            let _ = link.store(link::REGISTRY, grown.as_fd());
            registry = grown;
        }
        // Nothing to do where the keeper has been there all the time.
        let gathered = adoption::gather(registry.as_fd(), path, listener.as_fd(), &mut store, Some(&mut link))?;
        match Estate::resume(store, &gathered, registry, Some(path), Some(link)) {
            Ok(estate) => Server::new(place, lock, listener, estate, Some(signals)),
            Err((error, link)) => {
                // Without its registry a bus has no owners; better none than one that gives things away twice.
                let removed = place.remove(lock.as_fd());
                link.into_iter().for_each(|link| link.tell(&Message::Leaving));
                removed.and(Err(io::Error::other(error)))
            }
        }
    }

    fn new(
        place: Place,
        lock: OwnedFd,
        listener: OwnedFd,
        estate: Estate,
        signals: Option<SignalFd>,
    ) -> io::Result<Server> {
        let hosted = estate.link().is_none();
        let age_at = estate.age_look().map(|look| Instant::now() + look);
        // Our predecessor died while it ended the bus: nothing is left but to leave.
        let ended = estate.state().ending;
        let mut server = Server {
            place,
            lock,
            listener,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            signals,
            estate,
            clients: HashMap::new(),
            connected: HashMap::new(),
            next_client: 0,
            barred: HashSet::new(),
            spare: spare(),
            leave_at: Some(Instant::now() + FIRST_LINGER),
            renew_at: Instant::now(),
            keeper_at: None,
            keep_at: Instant::now(),
            age_at,
            expiry_at: None,
            burial: Burial::default(),
            look: None,
            counting: BTreeMap::new(),
            counted_for: 0,
            retry_at: None,
            unfinished: unfinished::Queue::default(),
            hosted,
            ended,
            buffer: vec![0; MAX_PACKET_BYTES].into_boxed_slice(),
        };
        server.watch_all()?;
        server.look_soon();
        Ok(server)
    }

    fn watch_all(&self) -> io::Result<()> {
        self.watch(&self.listener, token(KIND_LISTENER, 0))?;
        if let Some(signals) = &self.signals {
            self.watch(signals, token(KIND_SIGNAL, 0))?;
        }
        if let Some(link) = self.estate.link() {
            self.watch(link, token(KIND_KEEPER, 0))?;
        }
        for (incarnation, pidfd) in self.estate.pidfds() {
            self.watch(pidfd, token(KIND_PARTICIPANT, *incarnation))?;
        }
        Ok(())
    }

    fn watch(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))?)
    }

    /// Serves until the bus ends.
    pub(crate) fn run(mut self) -> io::Result<()> {
        if let Some(link) = self.estate.link().filter(|_| !self.ended) {
            link.tell(&Message::Ready);
        }
        let mut events = [EpollEvent::empty(); EVENTS_PER_ROUND];
        while !self.ended {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Err(Errno::EINTR) => 0,
                other => other?,
            };
            self.estate.begin_round();
            for event in &events[..count] {
                self.handle(event.data(), event.events())?;
                // Once the topics are marked as stopped nothing may be granted any more.
                if self.ended {
                    break;
                }
            }
            if !self.ended {
                self.go_on()?;
            }
            self.look_at_the_clock()?;
        }
        self.leave()
    }

    fn handle(&mut self, token: u64, flags: EpollFlags) -> io::Result<()> {
        let number = token & ((1 << KIND_SHIFT) - 1);
        match token >> KIND_SHIFT {
            KIND_LISTENER => self.accept(),
            KIND_KEEPER => self.listen_to_keeper(),
            KIND_SIGNAL => {
                self.stop();
                Ok(())
            }
            KIND_CLIENT => self.serve_client(number, flags),
            _ => self.release_participant(number),
        }
    }

    fn stop(&mut self) {
        self.estate.stop();
        self.ended = true;
    }

    /// Ends the bus: the names first, so that whoever comes now finds or starts another one. Names that cannot be
    /// removed are no reason to stay: the next holder of the lock replaces them.
    fn leave(mut self) -> io::Result<()> {
        let removed = self.place.remove(self.lock.as_fd());
        // As many as can wait; whoever goes on knocking finds the door gone.
        for _ in 0..socket::BACKLOG {
            let Ok(socket) = socket::accept(self.listener.as_fd()) else { break };
            decline(&socket, Refusal::Leaving);
        }
        if let Some(link) = self.estate.replace_link(None) {
            link.tell(&Message::Leaving);
        }
        removed
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
