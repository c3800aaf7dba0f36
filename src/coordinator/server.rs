//! The coordinator's loop: it sleeps in epoll until a client asks, a process dies or the keeper speaks. One request a
//! client and round, and no wait for any of them, so nobody delays the others.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Uid;

use crate::coordinator::adoption;
use crate::coordinator::burial::Burial;
use crate::coordinator::connection::{Broken, Connection, Push, Received};
use crate::coordinator::directory::Place;
use crate::coordinator::estate::{Estate, Granted};
use crate::coordinator::limits::{LINGER, RENEW_DUE};
use crate::coordinator::link::{self, GIVEN_LISTENER, Incoming, LISTENER, LOCK, Link, Message};
use crate::coordinator::protocol::{Answer, HandleRef, MAX_PACKET_BYTES, PROTOCOL_VERSION, Request, TopicInfo};
use crate::coordinator::roles::{self, Role};
use crate::error::Refusal;
use crate::os::address_space;
use crate::os::memfd;
use crate::os::socket::{self, Peer, User};

/// A bus that nobody has found yet waits longer than one that was left.
const FIRST_LINGER: Duration = Duration::from_secs(5);

/// After a keeper could not be started, the next attempt waits so long.
const KEEPER_RETRY: Duration = Duration::from_secs(1);

/// How often a bus on which nobody is looks whether it can still be found.
const NAMES_LOOK: Duration = Duration::from_secs(30);

/// How often to look for messages that have expired at groups' floors.
const EXPIRY_LOOK: Duration = Duration::from_millis(500);

/// When to look again at participants that have lost their connection and live; doubled from there, since most of them
/// come back or stay for good.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LONGEST_LOOK: Duration = Duration::from_secs(30);

/// When to try again to send what could not be sent for want of descriptors.
const SHORT_RETRY: Duration = Duration::from_millis(20);

/// Connections of users whom the bus does not let in, which wait to be told so.
const MAX_STRANGERS: usize = 16;

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
    /// When to look for messages that have grown too old; never while no topic gives them up by age.
    age_at: Option<Instant>,
    /// When to look for messages that have expired; never while no group may have such.
    expiry_at: Option<Instant>,
    burial: Burial,
    /// When to look at those without a connection, and how long was waited for it.
    look: Option<(Instant, Duration)>,
    /// When to try again what could not be sent for want of descriptors.
    retry_at: Option<Instant>,
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
                adoption::gather(registry.as_fd(), path, listener.as_fd(), &mut store, None)?;
                Estate::resume(store, registry, Some(path), None).map_err(|(error, _)| io::Error::other(error))?
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
        let (lock, listener, registry) = (take(LOCK)?, take(LISTENER)?, take(link::REGISTRY)?);
        let mut link = Link::new(link, None);
        let path = place.registry();
        // Nothing to do where the keeper has been there all the time.
        adoption::gather(registry.as_fd(), path, listener.as_fd(), &mut store, Some(&mut link))?;
        match Estate::resume(store, registry, Some(path), Some(link)) {
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
            age_at,
            expiry_at: None,
            burial: Burial::default(),
            look: None,
            retry_at: None,
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
            for event in &events[..count] {
                self.handle(event.data(), event.events())?;
                // Once the topics are marked as stopped nothing may be granted any more.
                if self.ended {
                    break;
                }
            }
            self.look_at_the_clock()?;
        }
        self.leave()
    }

    /// Until the next thing to do.
    fn timeout(&self) -> EpollTimeout {
        let look_at = self.look.map(|(at, _)| at);
        let sometimes =
            self.leave_at.into_iter().chain(self.keeper_at).chain(self.age_at).chain(self.expiry_at).chain(look_at);
        let sometimes = sometimes.chain(self.retry_at);
        let next = sometimes.fold(self.renew_at, Instant::min);
        let wait = socket::round_up(next.saturating_duration_since(Instant::now())).as_millis();
        wait.map_or(EpollTimeout::NONE, |ms| EpollTimeout::try_from(ms).unwrap_or(EpollTimeout::MAX))
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
            _ => self.bury(number),
        }
    }

    /// Whether it is time to go, to start a keeper, or to look after the ledgers.
    fn look_at_the_clock(&mut self) -> io::Result<()> {
        let now = Instant::now();
        if self.age_at.is_some_and(|at| at <= now) {
            self.age_at = None;
            self.estate.give_up_old();
        }
        if self.age_at.is_none() {
            self.age_at = self.estate.age_look().map(|look| now + look);
        }
        if self.expiry_at.is_some_and(|at| at <= now) {
            let (more, letters) = self.estate.settle_expired();
            self.burial.begin(&self.place, letters);
            self.expiry_at = more.then_some(now);
        }
        if self.expiry_at.is_none() && self.estate.may_expire() {
            self.expiry_at = Some(now + EXPIRY_LOOK);
        }
        if self.renew_at <= now {
            self.estate.renew_due();
            self.renew_at = now + RENEW_DUE;
        }
        if self.keeper_at.is_some_and(|at| at <= now) {
            self.start_keeper()?;
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_the_short()?;
        }
        if let Some((_, waited)) = self.look.filter(|(at, _)| *at <= now) {
            self.look_after_the_lost(waited)?;
        }
        if !self.estate.state().participants().is_empty() {
            self.leave_at = None;
        } else if self.leave_at.is_some_and(|at| at <= now) {
            self.leave_at = None;
            // Who cannot be found is not needed, whatever it keeps.
            if self.estate.is_needed() && self.place.leads_to(self.lock.as_fd()) {
                self.leave_at = Some(now + NAMES_LOOK);
            } else {
                self.stop();
            }
        }
        Ok(())
    }

    /// Somebody or something has gone; perhaps it was the last.
    fn linger(&mut self) {
        if self.estate.state().participants().is_empty() {
            self.leave_at = Some(Instant::now() + LINGER);
        }
    }
}

/// Connections.
impl Server {
    fn accept(&mut self) -> io::Result<()> {
        for _ in 0..ACCEPTS_PER_ROUND {
            match socket::accept(self.listener.as_fd()) {
                Ok(socket) => self.welcome_connection(socket)?,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE) => return self.turn_away(),
                    // Whatever is wrong with one connection is no reason to stop serving the others.
                    _ => return Ok(()),
                },
            }
        }
        Ok(())
    }

    /// Without a descriptor left, the connection would stay at the door and the loop would never sleep again.
    fn turn_away(&mut self) -> io::Result<()> {
        self.spare = None;
        if let Ok(socket) = socket::accept(self.listener.as_fd()) {
            decline(&socket, too_many_connections(self.clients.len()));
        }
        self.spare = spare();
        Ok(())
    }

    fn welcome_connection(&mut self, socket: OwnedFd) -> io::Result<()> {
        let Ok(peer) = socket::peer(socket.as_fd()) else { return Ok(()) };
        let Ok(user) = socket::user(socket.as_fd()) else { return Ok(()) };
        let stranger = !self.estate.lets_in(&user);
        let of_kind = |client: &&Connection| if stranger { client.stranger } else { client.peer.uid == user.uid };
        let alike = self.clients.values().filter(of_kind).count();
        // He is told so when he says Hello, if there are not too many of his kind.
        if stranger && alike >= MAX_STRANGERS {
            return Ok(());
        }
        // Each participant has at most one connection, and as many again may be about to say Hello.
        let limit = self.estate.limits().participants * 2;
        let of_user = self.estate.limits().user_participants * 2;
        if self.clients.len() >= limit || alike >= of_user {
            let limit = if alike >= of_user { of_user } else { limit };
            decline(&socket, too_many_connections(limit));
            return Ok(());
        }
        let id = self.next_client;
        self.next_client += 1;
        self.watch(&socket, token(KIND_CLIENT, id))?;
        let mut connection = Connection::new(socket, peer);
        connection.stranger = stranger;
        self.clients.insert(id, connection);
        Ok(())
    }

    fn serve_client(&mut self, id: u64, flags: EpollFlags) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        if client.flush(&|push| self.estate.resolve(push)).is_err() {
            self.expel(id);
            return Ok(());
        }
        let gone = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        if !client.is_congested() {
            match client.receive(&mut self.buffer) {
                Received::Request(request, once) => self.serve_request(id, request, once)?,
                Received::HungUp => return self.hang_up(id),
                Received::Garbled => self.expel(id),
                Received::Foreign(fds) => self.bar(id, fds),
                Received::Nothing => {}
            }
        } else if gone {
            return self.hang_up(id);
        }
        self.update_interest(id)
    }

    /// A client that does not read is not listened to.
    fn update_interest(&mut self, id: u64) -> io::Result<()> {
        let Some(client) = self.clients.get(&id) else { return Ok(()) };
        let flags = match (client.is_short(), client.is_congested()) {
            // It could be sent, if we had it: nobody tells us when we can.
            (true, _) => EpollFlags::empty(),
            (_, true) => EpollFlags::EPOLLOUT,
            _ => EpollFlags::EPOLLIN,
        };
        if client.is_short() && self.retry_at.is_none() {
            self.retry_at = Some(Instant::now() + SHORT_RETRY);
        }
        Ok(self.epoll.modify(client, &mut EpollEvent::new(flags, token(KIND_CLIENT, id)))?)
    }

    /// The connection broke without a good-bye: the process is dead, about to be, or runs another program. If it can be
    /// proven right now, so much the better; a living one keeps its places, for it may still write (SPEC §4.2).
    fn hang_up(&mut self, id: u64) -> io::Result<()> {
        match self.disconnect(id) {
            Some(incarnation) if self.estate.is_past(incarnation) => self.bury(incarnation),
            _ => Ok(()),
        }
    }

    /// We close the connection. What the process holds stays in force: it may come back, and if not, it will die.
    fn expel(&mut self, id: u64) {
        self.disconnect(id);
    }

    /// Somebody presented something else than memory. His user is not asked for descriptors again.
    fn bar(&mut self, id: u64, fds: Vec<OwnedFd>) {
        memfd::close_elsewhere(fds);
        let Some(uid) = self.clients.get(&id).map(|client| client.peer.uid) else { return };
        eprintln!("shmbus coordinator: a process of user {uid} presented something else than a segment");
        self.barred.insert(uid);
        self.clients.values_mut().filter(|client| client.peer.uid == uid).for_each(Connection::refuse_fds);
        self.expel(id);
    }

    /// Forgets a connection; whose it was, if that participant has no other one now.
    fn disconnect(&mut self, id: u64) -> Option<u64> {
        let incarnation = self.clients.remove(&id).and_then(|client| client.incarnation);
        let incarnation = incarnation.filter(|incarnation| self.connected.get(incarnation) == Some(&id))?;
        self.connected.remove(&incarnation);
        self.look_soon();
        Some(incarnation)
    }

    fn look_soon(&mut self) {
        self.look = Some((Instant::now() + FIRST_LOOK, FIRST_LOOK));
    }

    /// Buries participants without a connection that have executed another program since. Nothing tells us when they do:
    /// their connection may have broken long before, with an earlier coordinator. Deaths are told by the pidfd.
    fn look_after_the_lost(&mut self, waited: Duration) -> io::Result<()> {
        let everybody = self.estate.state().participants().keys().copied();
        let lost: Vec<u64> = everybody.filter(|incarnation| !self.connected.contains_key(incarnation)).collect();
        let next = (waited * 2).min(LONGEST_LOOK);
        self.look = (!lost.is_empty()).then(|| (Instant::now() + next, next));
        for incarnation in lost {
            if self.estate.is_past(incarnation) {
                self.bury(incarnation)?;
            }
        }
        Ok(())
    }

    /// A participant has dropped everything. It is told once that is noted, so that it can turn to our successor if we
    /// die before.
    fn bid_farewell(&mut self, id: u64, incarnation: u64) -> io::Result<()> {
        let client = self.clients.remove(&id);
        if self.connected.get(&incarnation) == Some(&id) {
            self.bury(incarnation)?;
        }
        if let Some(mut client) = client {
            // Whoever does not wait for it needs it no more.
            let _ = client.send(&Answer::Farewell, Vec::new());
        }
        Ok(())
    }

    /// A participant is past, or has left.
    fn bury(&mut self, incarnation: u64) -> io::Result<()> {
        if let Some(id) = self.connected.remove(&incarnation) {
            self.clients.remove(&id);
        }
        // epoll drops a descriptor only with its last duplicate, and the keeper has one.
        if let Some(pidfd) = self.estate.pidfds().get(&incarnation) {
            self.epoll.delete(pidfd)?;
        }
        // A coordinator that cannot write down who left would give their places away wrongly after a restart. It ends,
        // and its successor tries again.
        self.estate.bury(incarnation).map_err(io::Error::other)?;
        self.linger();
        Ok(())
    }

    fn send(&mut self, id: u64, answer: &Answer, fds: Vec<OwnedFd>) -> io::Result<()> {
        self.queue(id, |client| client.answer(answer, fds))
    }

    /// Tells a client something unasked.
    fn push(&mut self, id: u64, push: Push) -> io::Result<()> {
        self.queue(id, |client| client.push(push))
    }

    fn queue(&mut self, id: u64, add: impl FnOnce(&mut Connection) -> Result<(), Broken>) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        let sent = add(client).and_then(|()| client.flush(&|push| self.estate.resolve(push)));
        let (uid, waits) = (client.peer.uid, client.queued_fds() > 0);
        if sent.is_err() || waits && self.queued_fds_of(uid) > self.estate.limits().user_queued_fds {
            self.expel(id);
            return Ok(());
        }
        self.update_interest(id)
    }

    /// Descriptors that wait for a user's processes to read.
    fn queued_fds_of(&self, uid: u32) -> usize {
        self.clients.values().filter(|client| client.peer.uid == uid).map(Connection::queued_fds).sum()
    }

    /// Tries again to send what could not be sent for want of descriptors.
    fn retry_the_short(&mut self) -> io::Result<()> {
        self.retry_at = None;
        let short: Vec<u64> = self.clients.iter().filter(|(_, client)| client.is_short()).map(|(id, _)| *id).collect();
        short.into_iter().try_for_each(|id| self.queue(id, |_| Ok(())))
    }
}

/// Requests.
impl Server {
    fn serve_request(&mut self, id: u64, request: Request, once: u64) -> io::Result<()> {
        let Some(client) = self.clients.get(&id) else { return Ok(()) };
        match (client.incarnation, request) {
            (None, Request::Hello { protocol, token, incarnation, holds }) => {
                self.hello(id, protocol, token, incarnation, &holds)
            }
            (Some(_), Request::Present { info, names }) => {
                self.hear_too_late(id, &info, names);
                Ok(())
            }
            (Some(incarnation), Request::PresentNotice { wildcard }) => {
                self.hear_of_notice(id, incarnation, wildcard);
                Ok(())
            }
            // Nothing depends on it: what was lost is lost.
            (Some(_), Request::AllPresented) => Ok(()),
            (None, _) => {
                self.expel(id);
                Ok(())
            }
            (Some(incarnation), Request::Goodbye) => self.bid_farewell(id, incarnation),
            (Some(incarnation), Request::Report) => self.report(id, incarnation),
            (Some(incarnation), request) => self.grant(id, incarnation, &request, once),
        }
    }

    fn hello(
        &mut self,
        id: u64,
        protocol: u32,
        token: u64,
        incarnation: Option<u64>,
        holds: &[HandleRef],
    ) -> io::Result<()> {
        if protocol != PROTOCOL_VERSION {
            // Tells the client our version; it does not get any further.
            self.send(id, &self.estate.welcome(0), Vec::new())?;
            self.expel(id);
            return Ok(());
        }
        let Some(client) = self.clients.get(&id) else { return Ok(()) };
        let peer = client.peer;
        let user = socket::user(client.as_fd())?;
        if client.stranger {
            let refusal = Refusal::NotAllowed { uid: user.uid, host: Uid::effective().as_raw() };
            self.send(id, &Answer::Refused(refusal), Vec::new())?;
            self.expel(id);
            return Ok(());
        }
        let watched = socket::peer_pidfd(client.as_fd(), peer);
        let space = address_space::open(peer.pid);
        // Who is still connected is still the process and the program that connected: both descriptors are its own, and no
        // newcomer's that was given its number. One that came back only to say good-bye may be gone again.
        let hung_up = socket::is_hung_up(client.as_fd());
        if incarnation.is_none() && hung_up {
            self.expel(id);
            return Ok(());
        }
        let space = space.ok().filter(|_| !hung_up);
        let admitted = match watched {
            Ok(pidfd) => {
                // Whom a predecessor of ours had let in, and could not tell.
                let incarnation = incarnation.or_else(|| self.estate.known_as(peer, token));
                self.let_in((peer, user), token, pidfd, space, incarnation, holds)?
            }
            Err(error) => {
                Err(Refusal::System { context: "watching the process".to_owned(), problem: error.to_string() })
            }
        };
        match admitted {
            Ok(incarnation) => {
                self.ask_for_lost(id, incarnation, holds)?;
                self.connect(id, incarnation, holds)
            }
            Err(refusal) => {
                self.send(id, &Answer::Refused(refusal), Vec::new())?;
                self.expel(id);
                Ok(())
            }
        }
    }

    /// A participant comes back with handles on topics that are lost: it slept while everybody else presented theirs.
    fn ask_for_lost(&mut self, id: u64, incarnation: u64, holds: &[HandleRef]) -> io::Result<()> {
        let (topics, wildcards) = (self.estate.topics_to_end(holds), self.estate.notices_to_present(incarnation));
        let wanted = !topics.is_empty() || !wildcards.is_empty();
        let asked = |client: &&mut Connection| wanted && !self.barred.contains(&client.peer.uid);
        let Some(client) = self.clients.get_mut(&id).filter(asked) else { return Ok(()) };
        client.accept_fds();
        self.send(id, &Answer::Present { topics, wildcards }, Vec::new())
    }

    /// The notice of a wildcard subscription has come.
    fn hear_of_notice(&mut self, id: u64, incarnation: u64, wildcard: u64) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Some(notice) = client.take_fds().pop() else { return };
        if let Err(refusal) = self.estate.adopt_presented(incarnation, wildcard, notice) {
            eprintln!("shmbus coordinator: process {}: {refusal}", client.peer.pid);
        }
    }

    /// What is presented of a topic that is lost or removed serves to tell those who hold it.
    fn hear_too_late(&mut self, id: u64, info: &TopicInfo, names: Vec<String>) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let segments = names.into_iter().zip(client.take_fds()).collect();
        if let Err(refusal) = self.estate.end_presented(info, segments) {
            eprintln!("shmbus coordinator: process {}: {refusal}", client.peer.pid);
        }
    }

    fn let_in(
        &mut self,
        (peer, user): (Peer, User),
        name: u64,
        pidfd: OwnedFd,
        space: Option<OwnedFd>,
        incarnation: Option<u64>,
        holds: &[HandleRef],
    ) -> io::Result<Result<u64, Refusal>> {
        if let Some(incarnation) = incarnation {
            let readmitted = self.estate.readmit(incarnation, peer, pidfd.as_fd(), holds);
            if readmitted.is_ok() {
                // Its address space was known to coordinator and keeper alone; who can say Hello under this number has its
                // handles where it runs now.
                space.into_iter().for_each(|space| self.estate.watch_space(incarnation, space));
            }
            return Ok(readmitted.map(|()| incarnation));
        }
        let admitted = self.estate.admit(peer.pid, user, name, pidfd);
        if let Ok(incarnation) = admitted
            && let Some(pidfd) = self.estate.pidfds().get(&incarnation)
        {
            self.watch(pidfd, token(KIND_PARTICIPANT, incarnation))?;
            space.into_iter().for_each(|space| self.estate.watch_space(incarnation, space));
        }
        Ok(admitted)
    }

    /// Makes this connection the participant's, and tells it every topic and arena it may have missed.
    fn connect(&mut self, id: u64, incarnation: u64, holds: &[HandleRef]) -> io::Result<()> {
        if let Some(earlier) = self.connected.insert(incarnation, id) {
            self.clients.remove(&earlier);
        }
        let welcome = self.estate.welcome(incarnation);
        let arenas = self.estate.arenas_for(incarnation);
        let (news, wildcards) = self.estate.news_for(incarnation, holds);
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        client.incarnation = Some(incarnation);
        let mut queued = client.answer(&welcome, Vec::new());
        // Topics before their arenas: who does not know the topic has no use for an arena. And before the number of topics.
        client.push_all(news.into_iter().map(Push::Wildcard));
        for (wildcard, told) in wildcards {
            queued = queued.and_then(|()| client.answer_unbounded(&Answer::WildcardTold { wildcard, told }));
        }
        client.push_all(arenas.into_iter().map(|(topic, slot)| Push::Arena { topic, slot }));
        self.queue(id, |_| queued)
    }

    fn grant(&mut self, id: u64, incarnation: u64, request: &Request, once: u64) -> io::Result<()> {
        let granted = self.estate.request_once(incarnation, request, once);
        self.announce()?;
        self.spread_news()?;
        let (answer, fds): Granted = match granted {
            Ok(Some(granted)) => granted,
            Ok(None) => {
                self.stop();
                (Answer::Done, Vec::new())
            }
            Err(refusal) => (Answer::Refused(refusal), Vec::new()),
        };
        self.send(id, &answer, fds)
    }

    /// Hands new topics to the owners of wildcard subscriptions, before their creator learns that they exist; then wakes
    /// the owners. One without a connection comes back for them, and so does one that must be disconnected.
    fn spread_news(&mut self) -> io::Result<()> {
        let news = self.estate.take_news();
        for news in &news {
            let Some(&id) = self.connected.get(&news.incarnation) else { continue };
            self.push(id, Push::Wildcard(*news))?;
        }
        let wildcards: BTreeSet<u64> = news.iter().map(|news| news.wildcard).collect();
        wildcards.into_iter().for_each(|wildcard| self.estate.tell(wildcard));
        Ok(())
    }

    fn report(&mut self, id: u64, incarnation: u64) -> io::Result<()> {
        let keeper = self.estate.link().and_then(Link::pid);
        let report = self.estate.report(incarnation, keeper, |incarnation| self.connected.contains_key(&incarnation));
        self.send(id, &Answer::Report(report), Vec::new())
    }

    /// Hands new arenas to their readers, before the publisher that will write them learns that it may.
    fn announce(&mut self) -> io::Result<()> {
        for (topic, slot) in self.estate.take_announcements() {
            for reader in self.estate.state().readers_of(topic) {
                let Some(&id) = self.connected.get(&reader) else { continue };
                self.push(id, Push::Arena { topic, slot })?;
            }
        }
        Ok(())
    }
}

/// Keeper, and the end.
impl Server {
    fn listen_to_keeper(&mut self) -> io::Result<()> {
        let Some(link) = self.estate.link() else { return Ok(()) };
        match link.receive() {
            Ok(Incoming::Message(Message::Stop, _)) => self.stop(),
            Ok(Incoming::Message(..) | Incoming::Nothing) => {}
            Ok(Incoming::HungUp) | Err(_) => {
                if let Some(link) = self.estate.replace_link(None) {
                    self.epoll.delete(&link)?;
                    link.bury();
                }
                self.start_keeper()?;
            }
        }
        Ok(())
    }

    /// Starts a keeper in the place of the dead one and hands it everything.
    fn start_keeper(&mut self) -> io::Result<()> {
        self.keeper_at = None;
        if self.hosted {
            return Ok(());
        }
        let started = roles::start(Role::Keeper, &self.place).and_then(|(link, child)| {
            let listener = if self.place.socket_is_given() { GIVEN_LISTENER } else { LISTENER };
            let names = [(LOCK, self.lock.as_fd()), (listener, self.listener.as_fd())];
            let names = names.into_iter().map(|(name, fd)| (name.to_owned(), fd));
            let link = Link::new(link, Some(child));
            let handed = link::hand_over(link.as_fd(), names.chain(self.estate.stored()));
            let watched = handed.and_then(|()| self.watch(&link, token(KIND_KEEPER, 0)));
            match watched {
                Ok(()) => Ok(link),
                Err(error) => {
                    link.bury();
                    Err(error)
                }
            }
        });
        match started {
            Ok(link) => drop(self.estate.replace_link(Some(link))),
            Err(error) => {
                eprintln!("shmbus coordinator: cannot start a keeper: {error}");
                self.keeper_at = Some(Instant::now() + KEEPER_RETRY);
            }
        }
        Ok(())
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

/// Tells a connection that it is not served; the client may be gone, or read it later.
fn decline(socket: &OwnedFd, refusal: Refusal) {
    let mut connection = match socket.try_clone() {
        Ok(socket) => Connection::new(socket, Peer { pid: 0, uid: 0 }),
        Err(_) => return,
    };
    let _ = connection.send(&Answer::Refused(refusal), Vec::new());
}

fn too_many_connections(limit: usize) -> Refusal {
    let mend = "end some programs that use the bus".to_owned();
    Refusal::Limit { what: "connections".to_owned(), limit: limit as u64, mend }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
