//! Adoption: a bus whose coordinator and keeper have both died goes on with what its participants still hold.
//!
//! The registry has a name in the socket directory, so it survives. It says who the participants are (process number and
//! [`Birth`](crate::os::pidfd::Birth), which together prove a death), what they hold, and by their inode numbers which
//! segments there are. Missing are only the descriptors, and each participant keeps those of the segments that it maps.
//!
//! So the next coordinator first *gathers*: it opens a pidfd of every participant that lives, lets them present the
//! segments that are missing, and puts them where the keeper would have had them. Then it resumes the bus as after any
//! restart: who is not there any more is dead, by proof, and what it held is repaired. Gathering changes nothing but the
//! keeper's store; whoever is killed over it is succeeded by one that gathers the rest.
//!
//! The notices of wildcard subscriptions are gathered like segments. One that does not come in time is not lost: its owner's
//! cursors are in force without it, and it is asked for it when it comes (`Estate::adopt_presented`).
//!
//! Who says good-bye meanwhile has left: it presents what it has kept, and its places are given back when we resume.
//!
//! It ends when nothing is missing, when nobody is left who could present it, or after [`WINDOW`]: somebody may be stopped.
//! What nobody has presented by then is lost. Who comes too late learns so through the memory that it presents
//! (`Estate::end_presented`).
//!
//! A descriptor is believed if it is the very inode that the registry names, ours, for nobody else's eyes, sealed and as
//! long as it was made. Readers have read-only descriptors of it; since the file is ours we may open it again for writing,
//! as anybody of our user could. That gives nobody anything: it is not the reader who gets the new descriptor.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::stat::fstat;
use nix::unistd::Uid;

use crate::access::Who;
use crate::coordinator::connection::{Connection, Received};
use crate::coordinator::directory::Place;
use crate::coordinator::link::{Link, participant_name, segment_name};
use crate::coordinator::notices::notice_name;
use crate::coordinator::protocol::{Answer, HandleRef, MAX_PACKET_BYTES, PROTOCOL_VERSION, Request};
use crate::coordinator::registry::{Registry, bus_of};
use crate::coordinator::state::{Event, GIVEN_UP, State, TopicEntry};
use crate::error::Refusal;
use crate::os::pidfd::Birth;
use crate::os::{memfd, pidfd, socket};

/// How long participants have to present what they hold; only a stopped one needs more than milliseconds.
const WINDOW: Duration = Duration::from_secs(2);

/// Connections that may wait while we gather. Whoever is turned away tries again.
const MAX_CONNECTIONS: usize = 2048;

/// Connections of one user beyond those that his participants have: of newcomers, who wait until we serve.
const MAX_NEWCOMERS: usize = 16;

/// Connections accepted, and packets of one user's connections looked at, before the others have their turn and the clock is
/// looked at.
const ACCEPTS_PER_ROUND: usize = 64;
const PACKETS_PER_ROUND: usize = 256;

/// The registry of a bus whose processes died and of which somebody is left. Only with the lock. `stay`: what the bus is
/// to be from now on, where it was not already; `allow`: whom it lets in from now on, if anybody is named.
pub(crate) fn left_behind(place: &Place, stay: bool, allow: &[Who]) -> Option<OwnedFd> {
    let (path, file) = (place.registry(), named(place)?);
    // What cannot be read, or names only the dead, is as good as none: the next bus puts its own in its place.
    let (mut registry, events) = Registry::open(file, Some(path)).ok()?;
    let state = replayed(&events);
    let holds = |incarnation: &u64| !state.handles_of(*incarnation).is_empty();
    let lives = |incarnation: &u64| !matches!(living(&state, *incarnation), Ok(None));
    let left = registry.is_of_this_boot().ok()? && state.participants().keys().any(|who| holds(who) && lives(who));
    if state.ending || !left {
        return None;
    }
    if stay && !state.stay {
        registry.append(&Event::Stays).ok()?;
    }
    if !allow.is_empty() && state.allowed != allow {
        registry.append(&Event::Allowed { users: allow.to_vec() }).ok()?;
    }
    registry.as_fd().try_clone_to_owned().ok()
}

/// Whether the bus of this registry lets others in than root and who runs it.
pub(crate) fn lets_others_in(registry: BorrowedFd<'_>, path: &Path) -> bool {
    let opened = registry.try_clone_to_owned().ok().and_then(|fd| Registry::open(fd, Some(path)).ok());
    opened.is_some_and(|(_, events)| !replayed(&events).allowed.is_empty())
}

/// The registry that is found by its name, if it is of the same bus as one that was kept. It is the newer one, where they differ.
pub(crate) fn named_like(place: &Place, kept: BorrowedFd<'_>) -> Option<OwnedFd> {
    let named = named(place)?;
    (bus_of(named.as_fd()).ok()? == bus_of(kept).ok()?).then_some(named)
}

/// The larger registry in which a coordinator put its events before it could tell the keeper, which still has this one: it was
/// killed in between, or the keeper was stopped. What else may lie under the name does not count.
pub(crate) fn outgrown(place: &Place, kept: BorrowedFd<'_>) -> Option<OwnedFd> {
    let grown = named_like(place, kept)?;
    let len = |fd: BorrowedFd<'_>| fstat(fd).map(|found| found.st_size).ok();
    let is_larger = len(grown.as_fd())? > len(kept)?;
    (is_larger && Registry::open(grown.try_clone().ok()?, None).is_ok()).then_some(grown)
}

fn named(place: &Place) -> Option<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(place.registry()).ok()?;
    let found = file.metadata().ok()?;
    (found.is_file() && found.uid() == Uid::effective().as_raw()).then(|| file.into())
}

/// A participant's pidfd, if it lives. An error where that cannot be told: it is in a pid namespace that we do not see.
fn living(state: &State, incarnation: u64) -> io::Result<Option<OwnedFd>> {
    let Some(participant) = state.participant(incarnation) else { return Ok(None) };
    match participant.birth {
        Some(birth) => pidfd::reopen(participant.pid, birth),
        // It has never been let in.
        None => Ok(None),
    }
}

fn replayed(events: &[Event]) -> State {
    let mut state = State::default();
    events.iter().for_each(|event| state.apply(event));
    state
}

/// What those who gathered have learned, beside what they put in the store.
#[derive(Default)]
pub(crate) struct Gathered {
    /// Publishers that their owners have dropped: nothing comes from them any more, though nobody wrote down yet that they went.
    pub(crate) dropped: BTreeSet<HandleRef>,
    /// Participants that have not said that what they presented was all that they map, though they may map what is missing.
    pub(crate) silent: BTreeSet<u64>,
    /// What the keeper did not take, being stopped, by name.
    pub(crate) unkept: BTreeSet<String>,
}

/// Fills `store` with what the registry names and the keeper, being new itself, does not have. Returns at once where
/// nothing is missing.
pub(crate) fn gather(
    registry: BorrowedFd<'_>,
    path: &Path,
    listener: BorrowedFd<'_>,
    store: &mut BTreeMap<String, OwnedFd>,
    link: Option<&mut Link>,
) -> io::Result<Gathered> {
    // One that cannot be read is reported by who resumes from it.
    let Ok((_, events)) = Registry::open(registry.try_clone_to_owned()?, Some(path)) else {
        return Ok(Gathered::default());
    };
    let state = replayed(&events);
    let mut gathering = Gathering::new(state, store, link);
    if gathering.state.ending {
        return Ok(Gathered::default());
    }
    gathering.find_the_living()?;
    let connections = gathering.run(listener)?;
    gathering.give_up_unproven();
    gathering.forget_the_leaving();
    if !gathering.unkept.is_empty() {
        eprintln!(
            "shmbus coordinator: the keeper process did not take {} descriptors; is it stopped?",
            gathering.unkept.len()
        );
    }
    // Those who made them come back to the coordinator that serves.
    drop(connections);
    Ok(Gathered { silent: gathering.silent(), dropped: gathering.dropped, unkept: gathering.unkept })
}

/// The segments that are not in the store, by topic.
fn missing(state: &State, store: &BTreeMap<String, OwnedFd>) -> BTreeMap<u64, BTreeSet<String>> {
    let of = |entry: &TopicEntry| -> BTreeSet<String> {
        let id = entry.info.id;
        let kept = entry.inodes.iter().filter(|(_, inode)| **inode != GIVEN_UP).map(|(name, _)| name);
        kept.filter(|name| !store.contains_key(&segment_name(id, name))).cloned().collect()
    };
    let topics = state.topics().iter().map(|(topic, entry)| (*topic, of(entry)));
    topics.filter(|(_, missing)| !missing.is_empty()).collect()
}

/// The wildcard subscriptions whose notices are not in the store.
fn missing_notices(state: &State, store: &BTreeMap<String, OwnedFd>) -> BTreeSet<u64> {
    let granted = state.wildcards().iter().filter(|(_, entry)| entry.notice.is_some()).map(|(wildcard, _)| *wildcard);
    granted.filter(|wildcard| !store.contains_key(&notice_name(*wildcard))).collect()
}

/// A coordinator before it serves.
struct Gathering<'a> {
    state: State,
    store: &'a mut BTreeMap<String, OwnedFd>,
    link: Option<&'a mut Link>,
    missing: BTreeMap<u64, BTreeSet<String>>,
    missing_notices: BTreeSet<u64>,
    /// Living participants that may hold what is missing and have not said that this was all, with their pidfds.
    expected: BTreeMap<u64, OwnedFd>,
    /// Participants of which nobody can tell whether they live until they say so.
    unseen: BTreeSet<u64>,
    /// Participants that have said good-bye.
    leaving: BTreeSet<u64>,
    /// Participants that have said that this was all.
    heard: BTreeSet<u64>,
    /// Publishers that their owners have dropped.
    dropped: BTreeSet<HandleRef>,
    /// What the keeper did not take.
    unkept: BTreeSet<String>,
}

impl<'a> Gathering<'a> {
    fn new(state: State, store: &'a mut BTreeMap<String, OwnedFd>, link: Option<&'a mut Link>) -> Gathering<'a> {
        let (missing, missing_notices) = (missing(&state, store), missing_notices(&state, store));
        let (expected, unseen, leaving) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        let (heard, dropped, unkept) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        Gathering { state, store, link, missing, missing_notices, expected, unseen, leaving, heard, dropped, unkept }
    }
}

impl Gathering<'_> {
    /// Has the keeper keep something. One that is stopped takes nothing: it is told when it goes on, and a successor that misses it with
    /// the keeper until then gathers it from the participants as we do.
    fn keep(&mut self, name: String, fd: OwnedFd) {
        if let Some(Err(_)) = self.link.as_mut().map(|link| link.store(&name, fd.as_fd())) {
            self.unkept.insert(name.clone());
        }
        self.store.insert(name, fd);
    }

    /// Opens a pidfd of every participant that lives. Where that fails for want of something, we end, and our successor tries
    /// again: nobody is taken for dead who is not.
    fn find_the_living(&mut self) -> io::Result<()> {
        let participants: Vec<u64> = self.state.participants().keys().copied().collect();
        for incarnation in participants {
            let name = participant_name(incarnation);
            if !self.store.contains_key(&name) {
                if self.state.participant(incarnation).is_some_and(|participant| participant.pid == 0) {
                    self.unseen.insert(incarnation);
                    continue;
                }
                let Some(pidfd) = living(&self.state, incarnation)? else { continue };
                self.keep(name.clone(), pidfd);
            }
            self.expect(incarnation)?;
        }
        Ok(())
    }

    /// Waits for a living participant, if it may hold what is missing.
    fn expect(&mut self, incarnation: u64) -> io::Result<()> {
        let holds = self.state.handles_of(incarnation);
        if holds.iter().any(|handle| self.is_missing(*handle))
            && let Some(pidfd) = self.store.get(&participant_name(incarnation))
        {
            self.expected.insert(incarnation, pidfd.try_clone()?);
        }
        Ok(())
    }

    /// Whether a handle's owner may have something that is missing.
    fn is_missing(&self, handle: HandleRef) -> bool {
        match handle {
            HandleRef::Wildcard { wildcard } => self.missing_notices.contains(&wildcard),
            on_topic => on_topic.topic().is_some_and(|topic| self.missing.contains_key(&topic)),
        }
    }

    /// Who may map what is missing, and has not said that it maps nothing more.
    fn silent(&self) -> BTreeSet<u64> {
        let may_have = |incarnation| self.state.handles_of(incarnation).iter().any(|handle| self.is_missing(*handle));
        let participants = self.state.participants().keys().copied();
        participants.filter(|who| !self.heard.contains(who) && may_have(*who)).collect()
    }

    /// Notes which of a participant's publishers it has dropped.
    fn note_dropped(&mut self, incarnation: u64, is_dropped: impl Fn(&HandleRef) -> bool) {
        let handles = self.state.handles_of(incarnation).into_iter();
        let publishers = handles.filter(|handle| matches!(handle, HandleRef::Publisher { .. }));
        self.dropped.extend(publishers.filter(is_dropped));
    }

    /// Without a pidfd of theirs they are released when we resume. From here on nobody needs what they would have presented.
    fn forget_the_leaving(&mut self) {
        for incarnation in &self.leaving {
            let name = participant_name(*incarnation);
            self.store.remove(&name);
            self.link.iter_mut().for_each(|link| link.forget(name.clone()));
        }
    }

    /// Topics on which somebody may live whom nobody sees are lost: his place cannot be given to others.
    fn give_up_unproven(&mut self) {
        let handles = self.unseen.iter().flat_map(|incarnation| self.state.handles_of(*incarnation));
        let topics: BTreeSet<u64> = handles.filter_map(|handle| handle.topic()).collect();
        let segments = topics.into_iter().filter_map(|topic| self.state.topic(topic)).flat_map(|entry| {
            let id = entry.info.id;
            entry.inodes.keys().map(move |name| segment_name(id, name))
        });
        for name in segments {
            self.store.remove(&name);
            self.link.iter_mut().for_each(|link| link.forget(name.clone()));
        }
    }

    /// Hears whoever comes, as long as it may help. Returns the connections that are still there.
    fn run(&mut self, listener: BorrowedFd<'_>) -> io::Result<Vec<Presenter>> {
        let deadline = Instant::now() + WINDOW;
        let mut presenters: Vec<Presenter> = Vec::new();
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        while self.waits_for_somebody() && Instant::now() < deadline {
            self.wait(listener, &presenters, deadline)?;
            for _ in 0..ACCEPTS_PER_ROUND {
                let Ok(socket) = socket::accept(listener) else { break };
                let presenter = Presenter::new(socket, &self.state);
                presenters.extend(presenter.filter(|presenter| self.has_room(presenter, &presenters)));
            }
            self.listen_to_all(&mut presenters, &mut buffer);
            self.expected.retain(|_, pidfd| !pidfd::is_dead(pidfd.as_fd()).unwrap_or(false));
        }
        Ok(presenters)
    }

    /// Whether one more may wait: of one user as many as come back, and a few.
    fn has_room(&self, newcomer: &Presenter, presenters: &[Presenter]) -> bool {
        let uid = newcomer.connection.peer.uid;
        let of_user = presenters.iter().filter(|presenter| presenter.connection.peer.uid == uid).count();
        let known = self.state.participants().values().filter(|participant| participant.uid == uid).count();
        presenters.len() < MAX_CONNECTIONS && of_user < known + MAX_NEWCOMERS
    }

    fn waits_for_somebody(&self) -> bool {
        let complete = self.missing.is_empty() && self.missing_notices.is_empty();
        !self.unseen.is_empty() || !complete && !self.expected.is_empty()
    }

    fn wait(&self, listener: BorrowedFd<'_>, presenters: &[Presenter], deadline: Instant) -> io::Result<()> {
        let sockets = presenters.iter().map(|presenter| presenter.connection.as_fd());
        let readable = self.expected.values().map(AsFd::as_fd).chain(sockets).chain([listener]);
        let mut fds: Vec<PollFd<'_>> = readable.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, socket::round_up(deadline.saturating_duration_since(Instant::now()))) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// A round: each user has his turn, however many connections he has and however much they say. Whoever breaks the rules, or
    /// is refused, is not listened to any longer.
    fn listen_to_all(&mut self, presenters: &mut Vec<Presenter>, buffer: &mut [u8]) {
        let mut left_of_user = BTreeMap::new();
        presenters.retain_mut(|presenter| {
            let left = left_of_user.entry(presenter.connection.peer.uid).or_insert(PACKETS_PER_ROUND);
            self.listen_to(presenter, buffer, left)
        });
        // Of his connections another comes first in the next one.
        if !presenters.is_empty() {
            presenters.rotate_left(1);
        }
    }

    /// Takes what a connection has sent, `left` packets at most; whether to go on with it.
    fn listen_to(&mut self, presenter: &mut Presenter, buffer: &mut [u8], left: &mut usize) -> bool {
        while *left > 0 {
            let request = match presenter.connection.receive(buffer) {
                Received::Request(request, _) => request,
                Received::Nothing => return true,
                Received::Foreign(fds) => {
                    memfd::close_elsewhere(fds);
                    presenter.incarnation.map(|incarnation| self.expected.remove(&incarnation));
                    return false;
                }
                Received::HungUp | Received::Garbled => {
                    // Who leaves does not come back.
                    let left = presenter.incarnation.filter(|incarnation| self.leaving.contains(incarnation));
                    left.map(|incarnation| self.expected.remove(&incarnation));
                    return false;
                }
            };
            *left -= 1;
            let heard = match (presenter.incarnation, request) {
                (None, Request::Hello { protocol, incarnation, holds, .. }) => {
                    self.hear_hello(presenter, protocol, incarnation, &holds)
                }
                (Some(_), Request::Present { info, names }) => {
                    let fds = presenter.connection.take_fds();
                    self.accept(info.id, names, fds)
                }
                (Some(incarnation), Request::PresentNotice { wildcard }) => {
                    let notice = presenter.connection.take_fds().pop();
                    notice.map_or(Ok(()), |notice| self.accept_notice(incarnation, wildcard, notice))
                }
                (Some(incarnation), Request::AllPresented { maps_more }) => {
                    self.expected.remove(&incarnation);
                    self.heard.extend((!maps_more).then_some(incarnation));
                    Ok(())
                }
                // It does so once more, by not naming them, when it comes back to who serves.
                (Some(incarnation), Request::Close { handles }) => {
                    let closed: BTreeSet<HandleRef> = handles.into_iter().collect();
                    self.note_dropped(incarnation, |handle| closed.contains(handle));
                    Ok(())
                }
                // What it has kept it has been asked for before, and presents it yet.
                (Some(incarnation), Request::Goodbye) => {
                    self.leaving.insert(incarnation);
                    Ok(())
                }
                // It asks again, of who serves then.
                _ => return false,
            };
            if let Err(refusal) = heard {
                eprintln!("shmbus coordinator: process {}: {refusal}", presenter.connection.peer.pid);
                // For want of something: it comes again.
                let comes_again = matches!(refusal, Refusal::System { .. });
                let done = presenter.incarnation.filter(|_| !comes_again);
                done.map(|incarnation| self.expected.remove(&incarnation));
                // It may be gone.
                let _ = presenter.connection.send(&Answer::Refused(refusal), Vec::new());
                return false;
            }
        }
        true
    }

    /// Somebody is there. A participant is asked for what it may hold; everybody else waits until we serve.
    fn hear_hello(
        &mut self,
        presenter: &mut Presenter,
        protocol: u32,
        incarnation: Option<u64>,
        holds: &[HandleRef],
    ) -> Result<(), Refusal> {
        let Some(incarnation) = incarnation.filter(|_| protocol == PROTOCOL_VERSION) else { return Ok(()) };
        let system = |error: io::Error| Refusal::System {
            context: "looking at a process".to_owned(),
            problem: error.to_string(),
        };
        let peer = presenter.connection.peer;
        let theirs = socket::peer_pidfd(presenter.connection.as_fd(), peer).map_err(system)?;
        let birth = pidfd::birth(peer.pid, theirs.as_fd()).map_err(system)?;
        let known = self.state.participant(incarnation);
        let is_same = |noted: Birth| noted.may_be_same(birth);
        if !known.is_some_and(|known| known.pid == peer.pid && known.birth.is_some_and(is_same)) {
            return Err(Refusal::UnknownParticipant { incarnation });
        }
        if self.unseen.remove(&incarnation) {
            self.keep(participant_name(incarnation), theirs);
            self.expect(incarnation).map_err(system)?;
        }
        presenter.incarnation = Some(incarnation);
        let holds: BTreeSet<HandleRef> = holds.iter().copied().collect();
        self.note_dropped(incarnation, |handle| !holds.contains(handle));
        let mut handles = self.state.handles_of(incarnation);
        handles.retain(|handle| self.is_missing(*handle));
        let topics: BTreeSet<u64> = handles.iter().filter_map(HandleRef::topic).collect();
        let topics = topics.into_iter().collect();
        let wildcards = handles.iter().filter_map(|handle| match *handle {
            HandleRef::Wildcard { wildcard } => Some(wildcard),
            _ => None,
        });
        let wildcards = wildcards.collect();
        presenter.connection.accept_fds();
        // If it does not read, it is as if it were stopped.
        let _ = presenter.connection.send(&Answer::Present { topics, wildcards }, Vec::new());
        Ok(())
    }

    /// Takes presented segments, if they are what they are said to be. What somebody else has presented is compared, too.
    fn accept(&mut self, topic: u64, names: Vec<String>, fds: Vec<OwnedFd>) -> Result<(), Refusal> {
        let Some(entry) = self.state.topic(topic) else { return Ok(()) };
        if names.len() != fds.len() {
            let problem = format!("presented {} segments with {} descriptors", names.len(), fds.len());
            return Err(Refusal::Protocol { problem });
        }
        let mut accepted = Vec::new();
        for (name, fd) in names.into_iter().zip(fds) {
            // Of a group that has gone meanwhile, say, or given up while its reader was stopped.
            let Some(&inode) = entry.inodes.get(&name).filter(|inode| **inode != GIVEN_UP) else { continue };
            check_inode(&entry.info.name, &name, fd.as_fd(), inode)?;
            if self.missing.get(&topic).is_some_and(|missing| missing.contains(&name)) {
                accepted.push((name.clone(), reopened(&entry.info.name, &name, fd)?));
            }
        }
        for (name, fd) in accepted {
            self.keep(segment_name(topic, &name), fd);
            if let Some(missing) = self.missing.get_mut(&topic) {
                missing.remove(&name);
            }
        }
        self.missing.retain(|_, missing| !missing.is_empty());
        Ok(())
    }

    /// The same for the notice of a participant's own wildcard subscription.
    fn accept_notice(&mut self, incarnation: u64, wildcard: u64, fd: OwnedFd) -> Result<(), Refusal> {
        let entry = self.state.wildcards().get(&wildcard).filter(|entry| entry.incarnation == incarnation);
        let Some((entry, inode)) = entry.and_then(|entry| Some((entry, entry.notice?))) else { return Ok(()) };
        let name = notice_name(wildcard);
        check_inode(&entry.pattern, &name, fd.as_fd(), inode)?;
        if self.missing_notices.contains(&wildcard) {
            let fd = reopened(&entry.pattern, &name, fd)?;
            self.keep(name, fd);
            self.missing_notices.remove(&wildcard);
        }
        Ok(())
    }
}

/// Refuses any other file than the one that the registry names. `topic`: the topic's name, or the pattern whose notice it is.
pub(crate) fn check_inode(topic: &str, name: &str, fd: BorrowedFd<'_>, inode: u64) -> Result<(), Refusal> {
    let found = fstat(fd).map_err(|error| refused(topic, name, format!("cannot stat it: {error}")))?.st_ino;
    if found == inode {
        return Ok(());
    }
    Err(refused(topic, name, format!("it is inode {found}, the topic's is {inode}")))
}

/// The same memory open for reading and writing, if it is a segment of ours that nobody can shorten.
pub(crate) fn reopened(topic: &str, name: &str, fd: OwnedFd) -> Result<OwnedFd, Refusal> {
    let found = fstat(&fd).map_err(|error| refused(topic, name, format!("cannot stat it: {error}")))?;
    let us = Uid::effective().as_raw();
    if found.st_uid != us {
        return Err(refused(topic, name, format!("it belongs to user {}, expected {us}", found.st_uid)));
    }
    if found.st_mode & 0o7777 != 0o600 {
        return Err(refused(topic, name, format!("its mode is {:04o}, expected 0600", found.st_mode & 0o7777)));
    }
    memfd::check_sealed(fd.as_fd()).map_err(|problem| refused(topic, name, problem))?;
    memfd::read_write(fd.as_fd()).map_err(|error| match error.raw_os_error() {
        // It is what it should be, and may come again.
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
            Refusal::System { context: format!("opening segment {name} of {topic:?}"), problem: error.to_string() }
        }
        _ => refused(topic, name, format!("cannot open it for writing: {error}")),
    })
}

fn refused(topic: &str, name: &str, problem: String) -> Refusal {
    Refusal::Presented { topic: topic.to_owned(), segment: name.to_owned(), problem }
}

/// A connection while we gather.
struct Presenter {
    connection: Connection,
    /// Who it is, once it has shown to be a participant.
    incarnation: Option<u64>,
}

impl Presenter {
    /// `None`: somebody else's.
    fn new(socket: OwnedFd, state: &State) -> Option<Presenter> {
        let (peer, user) = (socket::peer(socket.as_fd()).ok()?, socket::user(socket.as_fd()).ok()?);
        let trusted = peer.uid == 0 || peer.uid == Uid::effective().as_raw() || state.allows(&user);
        trusted.then(|| Presenter { connection: Connection::new(socket, peer), incarnation: None })
    }
}

#[cfg(test)]
#[path = "adoption_tests.rs"]
mod tests;
