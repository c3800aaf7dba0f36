//! What the coordinator holds, and how an event is carried out: descriptors to the keeper, event to the registry,
//! change to the memory, in the order that lets a successor finish what a dead coordinator began.
//!
//! Whatever takes something (a topic, an arena, a slot, a cursor) is logged *before* the memory is touched, so that
//! nothing is ever held anonymously (I-10). Whatever gives something back is done in memory first and logged after:
//! doing it twice does no harm, forgetting it would.
//!
//! What ends for everybody (a topic, the bus) is logged before the memory says so: a topic that its handles take for
//! gone must not be there again after a restart. Who finds it logged says it once more.
//!
//! This file says what is held and grants requests; `events` is the order above.

mod answers;
mod events;
mod groups;
mod participants;
mod presented;
mod release;
mod report;
mod resume;
mod retention;
mod rounds;
mod wildcards;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use nix::unistd::Uid;

pub(crate) use crate::coordinator::estate::groups::Expired;
use crate::coordinator::estate::groups::Reclaims;
pub(crate) use crate::coordinator::estate::rounds::Progress;
use crate::coordinator::estate::rounds::{Others, aside_of};
pub(crate) use crate::coordinator::estate::wildcards::News;
use crate::coordinator::limits::{LOOK, Limits};
use crate::coordinator::link::{self, Link, participant_name, segment_name, space_name};
use crate::coordinator::memory::{Joined, LedgerCount, Reservation, TopicMemory};
use crate::coordinator::notices::Notices;
use crate::coordinator::protocol::{Answer, HandleRef, Request};
use crate::coordinator::registry::{AppendError, FIRST_HALF_BYTES, Registry};
use crate::coordinator::state::{Aside, Event, Footprint, Plan, Reply, State, TopicEntry};
use crate::error::Refusal;
use crate::ring::log::TopicState;

/// Bytes that the segments of a topic take.
const FOOTPRINT: Footprint = Footprint {
    topic: TopicMemory::footprint_bytes,
    cursors: TopicMemory::cursors_footprint_bytes,
    arena: TopicMemory::arena_footprint_bytes,
    group: TopicMemory::group_footprint_bytes,
};

/// An answer with its descriptors.
pub(crate) type Granted = (Answer, Vec<OwnedFd>);

/// What became of a request.
#[expect(clippy::large_enum_variant, reason = "answered at once")]
pub(crate) enum Outcome {
    Granted(Granted),
    /// The bus is to be stopped.
    Stop,
    /// It takes longer than others may wait: ask again in the next round, with the progress made.
    PutOff,
}

/// Everything a bus consists of, but for its sockets.
pub(crate) struct Estate {
    state: State,
    limits: Limits,
    registry: Registry,
    memories: BTreeMap<u64, TopicMemory>,
    pidfds: BTreeMap<u64, OwnedFd>,
    /// The address spaces in which participants have their handles, as far as we may look into them.
    spaces: BTreeMap<u64, OwnedFd>,
    /// The keeper; `None` where the bus is hosted on a thread, or while the keeper is dead.
    link: Option<Link>,
    /// What the keeper has yet to be told to keep, by name: it was stopped.
    unkept: BTreeSet<String>,
    /// Topics whose messages are given up by age.
    ageing: Vec<u64>,
    /// Groups on topics whose messages may have a time-to-live, with some that are gone.
    expiring: Vec<(u64, u32)>,
    /// What the looks under way have still to look at.
    rest: Rest,
    reclaims: Reclaims,
    /// What was done since the last round of the loop, in words of ledgers walked.
    worked_words: u64,
    /// Memory for the event that is about to be carried out.
    at_hand: Reservation,
    /// What was counted in ledgers for a status that is to be given, and when, by topic and group.
    counted: BTreeMap<(u64, u32), (Instant, LedgerCount)>,
    /// Where the subscriber that opens right now begins.
    joined: Option<Joined>,
    /// Arenas that came into being and have not been announced.
    announcements: Vec<(u64, u32)>,
    /// The notices of wildcard subscriptions.
    notices: Notices,
    /// Subscribers opened for wildcard subscriptions whose owners have not been told.
    news: Vec<News>,
    /// Consumers released whose events are about to be carried out.
    released: BTreeSet<HandleRef>,
}

/// What a look has not come to: each topic or group has its turn before any has the next, however long they take.
#[derive(Default)]
struct Rest {
    ageing: Vec<u64>,
    expiring: Vec<(u64, u32)>,
    /// What those found that had their turn.
    expired: Expired,
    to_renew: Vec<(u64, u32)>,
}

impl Estate {
    /// A new bus, whose registry is found at `path`.
    pub(crate) fn found(bus: u64, path: Option<&Path>) -> std::io::Result<Estate> {
        let began = Event::Began { bus, stay: false };
        let registry = Registry::create(path, bus, FIRST_HALF_BYTES, std::slice::from_ref(&began))?;
        let mut state = State::default();
        state.apply(&began);
        Ok(Estate::new(state, registry, None))
    }

    fn new(state: State, registry: Registry, link: Option<Link>) -> Estate {
        Estate {
            limits: Limits::from_environment(state.reserved_bytes()),
            state,
            registry,
            memories: BTreeMap::new(),
            ageing: Vec::new(),
            expiring: Vec::new(),
            rest: Rest::default(),
            reclaims: Reclaims::new(),
            worked_words: 0,
            at_hand: Reservation::default(),
            counted: BTreeMap::new(),
            pidfds: BTreeMap::new(),
            spaces: BTreeMap::new(),
            link,
            unkept: BTreeSet::new(),
            joined: None,
            announcements: Vec::new(),
            notices: Notices::default(),
            news: Vec::new(),
            released: BTreeSet::new(),
        }
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Every participant's pidfd.
    pub(crate) fn pidfds(&self) -> &BTreeMap<u64, OwnedFd> {
        &self.pidfds
    }

    pub(crate) fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    /// Whether the keeper has yet to be told to keep something.
    pub(crate) fn has_unkept(&self) -> bool {
        !self.unkept.is_empty()
    }

    /// Has the keeper keep what it did not take while it was stopped, as far as it takes it now, for `LOOK`. Whether it took any.
    pub(crate) fn keep_again(&mut self) -> bool {
        let Some(mut link) = self.link.take() else { return false };
        let mut unkept = std::mem::take(&mut self.unkept);
        let before = unkept.len();
        let stored = self.stored();
        // Only now: to name all that a large bus has may take longer than that.
        let until = Instant::now() + LOOK;
        // What is not there any more need not be kept.
        let left = stored.into_iter().filter(|(name, _)| unkept.remove(name));
        let left = left.skip_while(|(name, fd)| Instant::now() < until && link.store(name, *fd).is_ok());
        let left: BTreeSet<String> = left.map(|(name, _)| name).collect();
        (self.link, self.unkept) = (Some(link), left);
        self.unkept.len() < before
    }

    /// Puts another keeper, or none, in the place of the present one. It is handed everything.
    pub(crate) fn replace_link(&mut self, link: Option<Link>) -> Option<Link> {
        self.unkept.clear();
        std::mem::replace(&mut self.link, link)
    }

    /// Everything a new keeper must hold, but for the listener and the lock.
    pub(crate) fn stored(&self) -> Vec<(String, BorrowedFd<'_>)> {
        let mut items = vec![(link::REGISTRY.to_owned(), self.registry.as_fd())];
        items.extend(self.notices.stored());
        items.extend(self.pidfds.iter().map(|(incarnation, fd)| (participant_name(*incarnation), fd.as_fd())));
        items.extend(self.spaces.iter().map(|(incarnation, fd)| (space_name(*incarnation), fd.as_fd())));
        for (topic, memory) in &self.memories {
            items
                .extend(memory.segments().into_iter().map(|segment| (segment_name(*topic, &segment.name), segment.fd)));
        }
        items
    }

    /// Whether anybody or anything needs the bus.
    pub(crate) fn is_needed(&self) -> bool {
        let holds_messages = |memory: &TopicMemory| memory.range().is_ok_and(|(oldest, tail)| oldest < tail);
        let kept = |entry: &TopicEntry| entry.kept || !entry.groups.is_empty();
        self.state.stay
            || !self.state.participants().is_empty()
            || self.state.topics().values().any(kept)
            || self.memories.values().any(holds_messages)
    }

    /// Ends the bus for everybody who holds a topic. From now on a successor would end it too.
    pub(crate) fn stop(&mut self) {
        if let Err(error) = self.log(&Event::Ending) {
            // All the same: we are about to finish it ourselves.
            eprintln!("shmbus coordinator: the end of the bus is not in its registry: {error}");
        }
        self.state.apply(&Event::Ending);
        self.end_topics();
    }

    fn end_topics(&self) {
        self.memories.values().for_each(|memory| memory.end(TopicState::Stopped));
        self.notices.end();
    }

    /// Takes the arenas to be announced to the readers of their topics.
    pub(crate) fn take_announcements(&mut self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.announcements)
    }

    /// Grants a participant's request, or declines it. `once`: the number under which it is granted once, or 0. `progress`: how far
    /// it came in earlier rounds.
    pub(crate) fn request_once(
        &mut self,
        incarnation: u64,
        request: &Request,
        once: u64,
        progress: &mut Progress,
        others: Others<'_>,
    ) -> Result<Outcome, Refusal> {
        if matches!(request, Request::Stop) {
            self.check_host(incarnation)?;
        }
        if progress.opening.is_some() {
            return self.grant_wildcard(progress, others);
        }
        // Anew in each round: much may have changed since the last, and then it is decided as if nothing had been reserved.
        let plan = |aside| self.state.request_once(&self.limits, FOOTPRINT, aside, incarnation, once, request);
        let Plan { events, reply } = match plan(&|uid| aside_of(others, uid)) {
            Ok(plan) => plan,
            // What leaves no room may be the very thing that is asked for.
            Err(_) if plan(&|_| Aside::default()).is_ok_and(|plan| self.is_under_way(&plan.events, others)) => {
                // Who waits holds nothing, or two could wait for each other.
                progress.reservation = Reservation::default();
                return Ok(self.put_off());
            }
            Err(refusal) => return Err(refusal),
        };
        if let Reply::Wildcard { wildcard } = reply {
            progress.opening = Some(self.begin_opening(wildcard, events)?);
            return self.grant_wildcard(progress, others);
        }
        if !self.reserve_for(&events, &mut progress.reservation, others)? {
            return Ok(Outcome::PutOff);
        }
        self.at_hand = std::mem::take(&mut progress.reservation);
        let carried_out = self.carry_out_all(events);
        self.at_hand = Reservation::default();
        carried_out.and_then(|()| self.answered(reply))
    }

    fn grant_wildcard(&mut self, progress: &mut Progress, others: Others<'_>) -> Result<Outcome, Refusal> {
        let Some(opening) = &mut progress.opening else { return Err(broken("a wildcard that is not being opened")) };
        let wildcard = opening.wildcard;
        match self.go_on_opening(opening, others) {
            Ok(true) => self.answered(Reply::Wildcard { wildcard }),
            Ok(false) => Ok(Outcome::PutOff),
            Err(refusal) => {
                self.close_again(HandleRef::Wildcard { wildcard })?;
                Err(refusal)
            }
        }
    }

    /// A handle that was opened and cannot be handed out.
    fn close_again(&mut self, handle: HandleRef) -> Result<(), Refusal> {
        let cursors = match handle {
            HandleRef::Wildcard { wildcard } => self.state.cursors_of_wildcard(wildcard),
            _ => Vec::new(),
        };
        self.carry_out_all(cursors.into_iter().chain([handle]).map(|handle| Event::Closed { handle }).collect())
    }

    fn answered(&mut self, reply: Reply) -> Result<Outcome, Refusal> {
        let opened = match reply {
            Reply::Stop => return Ok(Outcome::Stop),
            Reply::Publisher { topic, slot } => Some(HandleRef::Publisher { topic, slot }),
            Reply::Subscriber { topic, cursor } => Some(HandleRef::Subscriber { topic, cursor }),
            Reply::Consumer { topic, group, consumer } => Some(HandleRef::Consumer { topic, group, consumer }),
            Reply::Wildcard { wildcard } => Some(HandleRef::Wildcard { wildcard }),
            _ => None,
        };
        let granted = self.granted(reply);
        if let (Err(_), Some(handle)) = (&granted, opened) {
            self.close_again(handle)?;
        }
        granted.map(Outcome::Granted)
    }

    #[cfg(test)]
    pub(crate) fn request(&mut self, incarnation: u64, request: &Request) -> Result<Option<Granted>, Refusal> {
        self.request_numbered(incarnation, request, 0)
    }

    /// The same under a number, and however many rounds it takes.
    #[cfg(test)]
    pub(crate) fn request_numbered(
        &mut self,
        incarnation: u64,
        request: &Request,
        once: u64,
    ) -> Result<Option<Granted>, Refusal> {
        let mut progress = Progress::default();
        loop {
            self.begin_round();
            match self.request_once(incarnation, request, once, &mut progress, &|_| {})? {
                Outcome::Granted(granted) => return Ok(Some(granted)),
                Outcome::Stop => return Ok(None),
                Outcome::PutOff => {}
            }
        }
    }

    /// Whether a participant may do what concerns the whole bus.
    fn check_host(&self, incarnation: u64) -> Result<(), Refusal> {
        let (uid, host) = (self.state.participant(incarnation).map(|who| who.uid), Uid::effective().as_raw());
        match uid {
            Some(uid) if uid != 0 && uid != host => Err(Refusal::NotHost { uid, host }),
            _ => Ok(()),
        }
    }

    /// Logs an event, making room for it where there is none.
    fn log(&mut self, event: &Event) -> Result<(), Refusal> {
        match self.registry.append(event) {
            Ok(()) => return Ok(()),
            Err(AppendError::Full) => {}
            Err(AppendError::Io(error)) => return Err(system("writing the registry", &error)),
        }
        let snapshot = self.state.snapshot();
        match self.registry.compact(&snapshot) {
            Ok(()) => {}
            Err(AppendError::Full) => self.grow_registry(&snapshot)?,
            Err(AppendError::Io(error)) => return Err(system("compacting the registry", &error)),
        }
        self.registry
            .append(event)
            .map_err(|error| broken(&format!("no room in the registry after compaction: {error}")))
    }

    /// Puts a registry twice as large in the place of the present one. Once it has the name it is the one that counts, whatever the
    /// keeper knows of it: our successor takes it up by its name.
    fn grow_registry(&mut self, snapshot: &[Event]) -> Result<(), Refusal> {
        self.registry =
            self.registry.grown(self.state.bus, snapshot).map_err(|error| system("growing the registry", &error))?;
        if let Some(link) = &mut self.link {
            // Who takes nothing now, being stopped, keeps the former one.
            let _ = link.store(link::REGISTRY, self.registry.as_fd());
        }
        Ok(())
    }

    fn forget(&mut self, name: String) {
        if let Some(link) = &mut self.link {
            link.forget(name);
        }
    }

    fn memory(&self, topic: u64) -> Result<&TopicMemory, Refusal> {
        self.memories.get(&topic).ok_or_else(|| broken("a topic without memory"))
    }

    fn entry(&self, topic: u64) -> Result<&TopicEntry, Refusal> {
        self.state.topic(topic).ok_or_else(|| broken("a reply about a topic that is not there"))
    }
}

fn system(context: &str, error: &std::io::Error) -> Refusal {
    Refusal::System { context: context.to_owned(), problem: error.to_string() }
}

/// Something this program promises itself does not hold.
fn broken(problem: &str) -> Refusal {
    Refusal::System { context: "coordinator".to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
#[path = "estate_tests.rs"]
mod tests;
