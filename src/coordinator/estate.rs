//! What the coordinator holds, and how an event is carried out: descriptors to the keeper, event to the registry,
//! change to the memory, in the order that lets a successor finish what a dead coordinator began.
//!
//! Whatever takes something (a topic, an arena, a slot, a cursor) is logged *before* the memory is touched, so that
//! nothing is ever held anonymously (I-10). Whatever gives something back is done in memory first and logged after:
//! doing it twice does no harm, forgetting it would.
//!
//! What ends for everybody (a topic, the bus) is logged before the memory says so: a topic that its handles take for
//! gone must not be there again after a restart. Who finds it logged says it once more.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::coordinator::limits::Limits;
use crate::coordinator::link::{self, Link, participant_name, segment_name, space_name};
use crate::coordinator::memory::{Joined, TopicMemory};
use crate::coordinator::protocol::{
    Answer, HandleRef, MAX_PACKET_BYTES, PROTOCOL_VERSION, PublisherStatus, Request, SegmentRef, StartAt,
    SubscriberStatus, TopicStatus,
};
use crate::coordinator::registry::{AppendError, FIRST_HALF_BYTES, Registry, RegistryError};
use crate::coordinator::state::{Event, Footprint, Plan, Reply, State, TopicEntry};
use crate::error::Refusal;
use crate::os::{address_space, pidfd};
use crate::ring::log::TopicState;
use crate::topic::Mode;

/// Bytes that the segments of a topic take.
const FOOTPRINT: Footprint =
    Footprint { topic: TopicMemory::footprint_bytes, arena: TopicMemory::arena_footprint_bytes };

/// Part of a packet that the topics of one status page may fill.
const STATUS_BYTES: usize = MAX_PACKET_BYTES * 3 / 4;

/// An answer with its descriptors.
pub(crate) type Granted = (Answer, Vec<OwnedFd>);

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
    /// Where the subscriber that opens right now begins.
    joined: Option<Joined>,
    /// Arenas that came into being and have not been announced.
    announcements: Vec<(u64, u32)>,
}

impl Estate {
    /// A new bus.
    pub(crate) fn found(bus: u64) -> std::io::Result<Estate> {
        let began = Event::Began { bus, stay: false };
        let registry = Registry::create(bus, FIRST_HALF_BYTES, std::slice::from_ref(&began))?;
        let mut state = State::default();
        state.apply(&began);
        Ok(Estate::new(state, registry, None))
    }

    /// The bus that an earlier coordinator left: `store` is what the keeper kept of it.
    pub(crate) fn resume(
        mut store: BTreeMap<String, OwnedFd>,
        registry: OwnedFd,
        link: Link,
    ) -> Result<Estate, (RegistryError, Link)> {
        let (registry, events) = match Registry::open(registry) {
            Ok(opened) => opened,
            Err(error) => return Err((error, link)),
        };
        let (mut state, mut removed) = (State::default(), Vec::new());
        for event in &events {
            if let Event::TopicRemoved { topic } = event {
                removed.extend(state.topic(*topic).cloned());
            }
            state.apply(event);
        }
        let mut estate = Estate::new(state, registry, Some(link));
        removed.iter().for_each(|entry| estate.finish_removal(entry, &mut store));
        for event in estate.adopt(&mut store) {
            if let Err(error) = estate.carry_out(event) {
                eprintln!("shmbus coordinator: {error}");
            }
        }
        // What was stored but never logged belongs to nobody.
        store.into_keys().for_each(|name| estate.forget(name));
        if estate.state.ending {
            estate.end_topics();
        }
        Ok(estate)
    }

    /// Lets everybody who holds a removed topic know, if the coordinator that removed it may have died before it did:
    /// then the store has the topic yet, and the registry was not compacted since.
    fn finish_removal(&mut self, entry: &TopicEntry, store: &mut BTreeMap<String, OwnedFd>) {
        let segments = segments_of(entry, store);
        let names: Vec<String> = segments.iter().map(|(name, _)| segment_name(entry.info.id, name)).collect();
        // Segments are missing only if their names have been given up, and that comes after the end.
        if let Ok(memory) = TopicMemory::adopt(&entry.info, segments) {
            memory.end(TopicState::Removed);
        }
        names.into_iter().for_each(|name| self.forget(name));
    }

    fn new(state: State, registry: Registry, link: Option<Link>) -> Estate {
        Estate {
            limits: Limits::from_environment(state.reserved_bytes()),
            state,
            registry,
            memories: BTreeMap::new(),
            pidfds: BTreeMap::new(),
            spaces: BTreeMap::new(),
            link,
            joined: None,
            announcements: Vec::new(),
        }
    }

    /// Takes every descriptor that the registry names out of the store; what cannot be had any more, leaves.
    fn adopt(&mut self, store: &mut BTreeMap<String, OwnedFd>) -> Vec<Event> {
        let mut losses = Vec::new();
        for (&topic, entry) in self.state.topics() {
            match TopicMemory::adopt(&entry.info, segments_of(entry, store)) {
                Ok(memory) => drop(self.memories.insert(topic, memory)),
                Err(error) => {
                    eprintln!("shmbus coordinator: topic {:?} is lost: {error}", entry.info.name);
                    losses.push(Event::TopicRemoved { topic });
                }
            }
        }
        for &incarnation in self.state.participants().keys() {
            match store.remove(&participant_name(incarnation)) {
                Some(pidfd) => drop(self.pidfds.insert(incarnation, pidfd)),
                None => losses.push(Event::Left { incarnation }),
            }
            self.spaces.extend(store.remove(&space_name(incarnation)).map(|space| (incarnation, space)));
        }
        losses
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

    /// Puts another keeper, or none, in the place of the present one.
    pub(crate) fn replace_link(&mut self, link: Option<Link>) -> Option<Link> {
        std::mem::replace(&mut self.link, link)
    }

    /// Everything a new keeper must hold, but for the listener and the lock.
    pub(crate) fn stored(&self) -> Vec<(String, BorrowedFd<'_>)> {
        let mut items = vec![(link::REGISTRY.to_owned(), self.registry.as_fd())];
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
        let kept = |entry: &TopicEntry| entry.kept;
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
    }

    /// Takes the arenas to be announced to the subscribers of their topics.
    pub(crate) fn take_announcements(&mut self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.announcements)
    }

    /// Every arena that a returning participant must know.
    pub(crate) fn arenas_for(&self, incarnation: u64) -> Vec<(u64, u32)> {
        let reads = |entry: &&TopicEntry| entry.subscribers.values().any(|s| s.incarnation == incarnation);
        let arenas = |entry: &TopicEntry| entry.arenas.iter().map(|slot| (entry.info.id, *slot)).collect::<Vec<_>>();
        let many = |entry: &&TopicEntry| entry.info.options.mode == Mode::Many;
        self.state.topics().values().filter(many).filter(reads).flat_map(arenas).collect()
    }

    /// An arena's descriptor for readers.
    pub(crate) fn arena_fd(&self, topic: u64, slot: u32) -> Result<OwnedFd, Refusal> {
        self.memory(topic)?.arena_fd(slot)
    }

    /// Lets a process in.
    pub(crate) fn admit(&mut self, pid: u32, uid: u32, pidfd: OwnedFd) -> Result<u64, Refusal> {
        let plan = self.state.join(&self.limits, pid, uid)?;
        let Reply::Welcome { incarnation } = plan.reply else { return Err(broken("a join without a welcome")) };
        if let Some(link) = &mut self.link {
            link.store(&participant_name(incarnation), pidfd.as_fd())?;
        }
        self.pidfds.insert(incarnation, pidfd);
        if let Err(refusal) = self.carry_out_all(plan.events) {
            self.pidfds.remove(&incarnation);
            self.forget(participant_name(incarnation));
            return Err(refusal);
        }
        Ok(incarnation)
    }

    /// Notes the address space that a participant joined from.
    pub(crate) fn watch_space(&mut self, incarnation: u64, space: OwnedFd) {
        if let Some(link) = &mut self.link {
            // Without it a successor only learns later that the process runs another program.
            let _ = link.store(&space_name(incarnation), space.as_fd());
        }
        self.spaces.insert(incarnation, space);
    }

    /// Whether no store of this participant can follow: its process is dead, or has executed another program and left
    /// the address space behind in which it had its handles. In doubt one can.
    pub(crate) fn is_past(&self, incarnation: u64) -> bool {
        self.spaces.get(&incarnation).is_some_and(|space| address_space::is_gone(space.as_fd()))
            || self.pidfds.get(&incarnation).is_some_and(|pidfd| pidfd::is_dead(pidfd.as_fd()).unwrap_or(false))
    }

    /// Lets a process back in whose connection broke, if it is the one it says it is.
    pub(crate) fn readmit(
        &mut self,
        incarnation: u64,
        pid: u32,
        pidfd: BorrowedFd<'_>,
        holds: &[HandleRef],
    ) -> Result<(), Refusal> {
        let known = self.pidfds.get(&incarnation).zip(self.state.participant(incarnation));
        let (registered, participant) = known.ok_or(Refusal::UnknownParticipant { incarnation })?;
        // While the registered process lives nobody else can have its number.
        let lives = !pidfd::is_dead(registered.as_fd()).map_err(|error| system("looking at a process", &error))?;
        let same =
            pidfd::may_be_same(registered.as_fd(), pidfd).map_err(|error| system("comparing processes", &error))?;
        if !(lives && same && participant.pid == pid) || self.is_past(incarnation) {
            return Err(Refusal::UnknownParticipant { incarnation });
        }
        let plan = self.state.rejoin(incarnation, holds)?;
        self.carry_out_all(plan.events)
    }

    /// Releases everything a participant had: it is dead, or has said good-bye.
    pub(crate) fn bury(&mut self, incarnation: u64) -> Result<(), Refusal> {
        if self.state.participant(incarnation).is_none() {
            return Ok(());
        }
        self.carry_out(Event::Left { incarnation })
    }

    /// Grants a participant's request, or declines it. `None`: the bus is to be stopped.
    pub(crate) fn request(&mut self, incarnation: u64, request: &Request) -> Result<Option<Granted>, Refusal> {
        let Plan { events, reply } = self.state.request(&self.limits, FOOTPRINT, incarnation, request)?;
        self.carry_out_all(events)?;
        let opened = match reply {
            Reply::Stop => return Ok(None),
            Reply::Publisher { topic, slot } => Some(HandleRef::Publisher { topic, slot }),
            Reply::Subscriber { topic, cursor } => Some(HandleRef::Subscriber { topic, cursor }),
            _ => None,
        };
        let granted = self.granted(reply);
        if let (Err(_), Some(handle)) = (&granted, opened) {
            self.carry_out(Event::Closed { handle })?;
        }
        granted.map(Some)
    }

    fn carry_out_all(&mut self, events: Vec<Event>) -> Result<(), Refusal> {
        events.into_iter().try_for_each(|event| self.carry_out(event))
    }

    fn carry_out(&mut self, event: Event) -> Result<(), Refusal> {
        self.prepare(&event)?;
        self.log(&event)?;
        // Who is about to lose the topic or participant is known only before the event is applied.
        let given_up = self.names_given_up(&event);
        self.state.apply(&event);
        let acted = self.act(&event);
        // Last: as long as the keeper has them a successor can act in our place.
        given_up.into_iter().for_each(|name| self.forget(name));
        acted
    }

    /// Before the event is logged: new memory is created and stored, what is given back is taken out of force.
    fn prepare(&mut self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::TopicCreated { info, .. } => {
                let memory = TopicMemory::create(info)?;
                self.store_segments(info.id, &memory)?;
                self.memories.insert(info.id, memory);
            }
            Event::ArenaAdded { topic, slot, .. } => self.prepare_arena(*topic, *slot)?,
            Event::Closed { handle } => self.release(*handle),
            Event::Left { incarnation } => {
                self.state.handles_of(*incarnation).into_iter().for_each(|handle| self.release(handle));
            }
            _ => {}
        }
        Ok(())
    }

    /// After the event was logged and applied.
    fn act(&mut self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::PublisherOpened { topic, slot, publisher, tenancy, .. } => {
                let exclusive = self.state.topic(*topic).is_some_and(|t| t.info.options.mode == Mode::Exclusive);
                if exclusive && let Err(refusal) = self.memory(*topic)?.begin_tenancy(*tenancy, *publisher) {
                    self.carry_out(Event::Closed { handle: HandleRef::Publisher { topic: *topic, slot: *slot } })?;
                    return Err(refusal);
                }
            }
            Event::SubscriberOpened { topic, cursor, incarnation, start, droppable } => {
                match self.memory(*topic)?.join(*cursor, *incarnation, *start, *droppable) {
                    Ok(joined) => self.joined = Some(joined),
                    Err(refusal) => {
                        let handle = HandleRef::Subscriber { topic: *topic, cursor: *cursor };
                        self.carry_out(Event::Closed { handle })?;
                        return Err(refusal);
                    }
                }
            }
            Event::ArenaAdded { topic, slot, .. } => self.announcements.push((*topic, *slot)),
            Event::TopicRemoved { topic } => {
                if let Some(memory) = self.memories.remove(topic) {
                    memory.end(TopicState::Removed);
                }
            }
            Event::Left { incarnation } => {
                self.pidfds.remove(incarnation);
                self.spaces.remove(incarnation);
            }
            _ => {}
        }
        Ok(())
    }

    /// What the keeper need not hold any longer.
    fn names_given_up(&self, event: &Event) -> Vec<String> {
        match event {
            Event::TopicRemoved { topic } => {
                let names: Vec<String> = match (self.memories.get(topic), self.state.topic(*topic)) {
                    (Some(memory), _) => memory.segments().into_iter().map(|segment| segment.name).collect(),
                    (None, Some(entry)) => segment_parts(entry),
                    (None, None) => Vec::new(),
                };
                names.into_iter().map(|name| segment_name(*topic, &name)).collect()
            }
            Event::Left { incarnation } => vec![participant_name(*incarnation), space_name(*incarnation)],
            _ => Vec::new(),
        }
    }

    fn prepare_arena(&mut self, topic: u64, slot: u32) -> Result<(), Refusal> {
        let (Some(entry), Some(memory)) = (self.state.topic(topic), self.memories.get_mut(&topic)) else {
            return Err(broken("an arena for a topic that is not there"));
        };
        // It may be there from an attempt that failed later on.
        if !memory.has_arena(slot) {
            memory.add_arena(&entry.info, slot)?;
        }
        let name = format!("arena-{slot}");
        let Some(segment) = memory.segments().into_iter().find(|segment| segment.name == name) else {
            return Err(broken("a new arena without a segment"));
        };
        match &mut self.link {
            Some(link) => link.store(&segment_name(topic, &name), segment.fd),
            None => Ok(()),
        }
    }

    fn store_segments(&mut self, topic: u64, memory: &TopicMemory) -> Result<(), Refusal> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let mut stored: Vec<String> = Vec::new();
        for segment in memory.segments() {
            let name = segment_name(topic, &segment.name);
            if let Err(refusal) = link.store(&name, segment.fd) {
                stored.into_iter().for_each(|name| link.forget(name));
                return Err(refusal);
            }
            stored.push(name);
        }
        Ok(())
    }

    /// Takes a handle out of force in memory. Idempotent.
    fn release(&self, handle: HandleRef) {
        match handle {
            HandleRef::Publisher { topic, slot } => {
                let ended = self.memory(topic).and_then(|memory| memory.end_publisher(slot));
                if let Err(error) = ended {
                    eprintln!("shmbus coordinator: repairing after publisher slot {slot} of topic {topic}: {error}");
                }
            }
            HandleRef::Subscriber { topic, cursor } => {
                if let Ok(memory) = self.memory(topic) {
                    let entry = self.entry(topic).ok().and_then(|entry| entry.subscribers.get(&cursor));
                    memory.leave(cursor, entry.is_some_and(|entry| entry.start == StartAt::Oldest));
                }
            }
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

    /// Puts a registry twice as large in the place of the present one, by one message to the keeper.
    fn grow_registry(&mut self, snapshot: &[Event]) -> Result<(), Refusal> {
        let larger = Registry::create(self.state.bus, self.registry.half_bytes() * 2, snapshot)
            .map_err(|error| system("growing the registry", &error))?;
        if let Some(link) = &mut self.link {
            link.store(link::REGISTRY, larger.as_fd())?;
        }
        self.registry = larger;
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

    fn granted(&mut self, reply: Reply) -> Result<Granted, Refusal> {
        match reply {
            Reply::Welcome { incarnation } => Ok((self.welcome(incarnation), Vec::new())),
            Reply::Created { existed } => Ok((Answer::Created { existed }, Vec::new())),
            Reply::Done | Reply::Stop => Ok((Answer::Done, Vec::new())),
            Reply::Publisher { topic, slot } => self.publisher_opened(topic, slot),
            Reply::Subscriber { topic, cursor } => self.subscriber_opened(topic, cursor),
            Reply::Status { topics, more } => Ok((self.status(&topics, more), Vec::new())),
        }
    }

    pub(crate) fn welcome(&self, incarnation: u64) -> Answer {
        Answer::Welcome { protocol: PROTOCOL_VERSION, incarnation, bus: self.state.bus }
    }

    fn publisher_opened(&self, topic: u64, slot: u32) -> Result<Granted, Refusal> {
        let entry = self.entry(topic)?;
        let opened = entry.publishers.get(&slot).ok_or_else(|| broken("a publisher that is not there"))?;
        let segments = match entry.info.options.mode {
            Mode::Channel => vec![SegmentRef::Channel],
            _ => vec![SegmentRef::Log, SegmentRef::Cursors, SegmentRef::Arena(slot)],
        };
        let (info, publisher, tenancy) = (entry.info.clone(), opened.publisher, opened.tenancy);
        let answer = Answer::PublisherOpened { info, slot, publisher, tenancy, segments };
        Ok((answer, self.memory(topic)?.publisher_fds(slot)?))
    }

    fn subscriber_opened(&mut self, topic: u64, cursor: u32) -> Result<Granted, Refusal> {
        let Joined { position, sequence, asked } =
            self.joined.take().ok_or_else(|| broken("a subscriber that never joined"))?;
        let (segments, fds) = self.memory(topic)?.subscriber_fds()?.into_iter().unzip();
        let info = self.entry(topic)?.info.clone();
        Ok((Answer::SubscriberOpened { info, cursor, position, sequence, asked, segments }, fds))
    }

    /// As many topics as fit in a packet, at least one.
    fn status(&self, topics: &[u64], more: bool) -> Answer {
        let (mut page, mut bytes) = (Vec::new(), 0);
        for entry in topics.iter().filter_map(|topic| self.state.topic(*topic)) {
            let status = self.topic_status(entry);
            bytes += postcard::to_stdvec(&status).map_or(0, |encoded| encoded.len());
            if bytes > STATUS_BYTES && !page.is_empty() {
                return Answer::Status { topics: page, more: true };
            }
            page.push(status);
        }
        Answer::Status { topics: page, more }
    }

    fn topic_status(&self, entry: &TopicEntry) -> TopicStatus {
        let memory = self.memories.get(&entry.info.id);
        let (oldest, tail) = memory.and_then(|memory| memory.range().ok()).unwrap_or((0, 0));
        let pid = |incarnation: u64| self.state.participant(incarnation).map_or(0, |p| p.pid);
        let publishers = entry.publishers.iter();
        let subscribers = entry.subscribers.iter();
        TopicStatus {
            id: entry.info.id,
            name: entry.info.name.clone(),
            options: entry.info.options.clone(),
            oldest_sequence: oldest,
            tail_sequence: tail,
            memory_bytes: entry.bytes,
            publishers: publishers
                .map(|(&slot, p)| PublisherStatus { slot, publisher: p.publisher, pid: pid(p.incarnation) })
                .collect(),
            subscribers: subscribers
                .map(|(&cursor, s)| {
                    let sequence = memory.map_or(0, |memory| memory.cursor_sequence(cursor));
                    let lag = tail.saturating_sub(sequence);
                    SubscriberStatus { cursor, pid: pid(s.incarnation), sequence, lag, droppable: s.droppable }
                })
                .collect(),
        }
    }
}

/// A topic's segments in the store; an arena that was never logged stays there, as an orphan.
fn segments_of(entry: &TopicEntry, store: &mut BTreeMap<String, OwnedFd>) -> Vec<(String, OwnedFd)> {
    let names = segment_parts(entry).into_iter();
    names.filter_map(|name| Some((name.clone(), store.remove(&segment_name(entry.info.id, &name))?))).collect()
}

/// What the segments of a topic may be called.
fn segment_parts(entry: &TopicEntry) -> Vec<String> {
    let fixed = ["log", "cursors", "channel"].map(str::to_owned);
    fixed.into_iter().chain(entry.arenas.iter().map(|slot| format!("arena-{slot}"))).collect()
}

fn system(context: &str, error: &std::io::Error) -> Refusal {
    Refusal::System { context: context.to_owned(), problem: error.to_string() }
}

/// Something this program promises itself does not hold.
fn broken(problem: &str) -> Refusal {
    Refusal::System { context: "coordinator".to_owned(), problem: problem.to_owned() }
}

#[path = "report.rs"]
mod report;

#[cfg(test)]
#[path = "estate_tests.rs"]
mod tests;
