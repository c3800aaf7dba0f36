//! What the coordinator holds, and how an event is carried out: descriptors to the keeper, event to the registry,
//! change to the memory, in the order that lets a successor finish what a dead coordinator began.
//!
//! Whatever takes something (a topic, an arena, a slot, a cursor) is logged *before* the memory is touched, so that
//! nothing is ever held anonymously (I-10). Whatever gives something back is done in memory first and logged after:
//! doing it twice does no harm, forgetting it would.
//!
//! What ends for everybody (a topic, the bus) is logged before the memory says so: a topic that its handles take for
//! gone must not be there again after a restart. Who finds it logged says it once more.

mod groups;
mod presented;

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::unistd::Uid;

use crate::coordinator::connection::Push;
use crate::coordinator::estate::groups::ConsumerRef;
use crate::coordinator::limits::{Limits, MAX_PAGE_NAMES};
use crate::coordinator::link::{self, Link, participant_name, segment_name, space_name};
use crate::coordinator::memory::{Joined, TopicMemory, own_cursors_name};
use crate::coordinator::notices::{Notices, notice_name};
use crate::coordinator::protocol::{
    Answer, HandleRef, MAX_PACKET_BYTES, PROTOCOL_VERSION, PublisherStatus, Purged, Request, SegmentRef, StartAt,
    SubscriberStatus, TopicInfo, TopicStatus,
};
use crate::coordinator::registry::{AppendError, FIRST_HALF_BYTES, Registry, RegistryError};
use crate::coordinator::state::{
    Event, Footprint, GroupEntry, Plan, Reply, State, SubscriberEntry, TopicEntry, missed_event,
};
use crate::error::Refusal;
use crate::os::socket::{Peer, User};
use crate::os::{address_space, pidfd};
use crate::ring::log::TopicState;
use crate::topic::Mode;

/// Bytes that the segments of a topic take.
const FOOTPRINT: Footprint = Footprint {
    topic: TopicMemory::footprint_bytes,
    cursors: TopicMemory::cursors_footprint_bytes,
    arena: TopicMemory::arena_footprint_bytes,
    group: TopicMemory::group_footprint_bytes,
};

/// Part of a packet that the topics of one status page may fill.
const STATUS_BYTES: usize = MAX_PACKET_BYTES * 3 / 4;

/// How often, at most and at least, topics are looked at whose messages are given up by age.
const MIN_AGE_LOOK: Duration = Duration::from_millis(100);
const MAX_AGE_LOOK: Duration = Duration::from_secs(10);

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
    /// Topics whose messages are given up by age.
    ageing: Vec<u64>,
    /// Groups on topics whose messages may have a time-to-live, with some that are gone.
    expiring: Vec<(u64, u32)>,
    /// Where the subscriber that opens right now begins.
    joined: Option<Joined>,
    /// Arenas that came into being and have not been announced.
    announcements: Vec<(u64, u32)>,
    /// The notices of wildcard subscriptions.
    notices: Notices,
    /// Subscribers opened for wildcard subscriptions whose owners have not been told.
    news: Vec<News>,
}

/// A topic that came for a wildcard subscription.
#[derive(Clone, Copy, Debug)]
pub(crate) struct News {
    pub(crate) incarnation: u64,
    pub(crate) wildcard: u64,
    /// How many the subscription has had, with this one; 0 where the owner learns that in another way.
    pub(crate) told: u64,
    what: NewsOf,
}

/// What became of a topic for a wildcard subscription.
#[derive(Clone, Copy, Debug)]
enum NewsOf {
    Cursor { topic: u64, cursor: u32 },
    Missed,
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

    /// The bus that an earlier coordinator left: `store` is what the keeper kept of it, or its participants.
    pub(crate) fn resume(
        mut store: BTreeMap<String, OwnedFd>,
        registry: OwnedFd,
        path: Option<&Path>,
        link: Option<Link>,
    ) -> Result<Estate, (RegistryError, Option<Link>)> {
        let (registry, events) = match Registry::open(registry, path) {
            Ok(opened) => opened,
            Err(error) => return Err((error, link)),
        };
        let (mut state, mut removed) = (State::default(), Vec::new());
        for event in &events {
            if let Event::TopicRemoved { topic } = event.plain() {
                removed.extend(state.topic(*topic).cloned());
            }
            state.apply(event);
        }
        let mut estate = Estate::new(state, registry, link);
        removed.iter().for_each(|entry| estate.finish_removal(entry, &mut store));
        let mut losses = estate.adopt(&mut store);
        estate.renew_own_cursors();
        losses.extend(estate.adopt_groups(&mut store));
        for event in losses {
            if let Err(error) = estate.carry_out(event) {
                eprintln!("shmbus coordinator: {error}");
            }
        }
        estate.record_all_segments();
        estate.finish_fencing();
        estate.repair_wildcards();
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

    /// Fences whom the registry says to be fenced, if the coordinator that wrote it may have died before it did.
    fn finish_fencing(&mut self) {
        let topics = self.state.topics().values();
        let unsettled: Vec<(u64, u32)> =
            topics.flat_map(|entry| entry.unsettled().into_iter().map(|slot| (entry.info.id, slot))).collect();
        for (topic, slot) in unsettled {
            // If it fails now, whoever asks for the identity next tries again.
            if let Err(error) = self.fence(topic, slot) {
                eprintln!("shmbus coordinator: fencing publisher slot {slot} of topic {topic}: {error}");
            }
        }
    }

    fn new(state: State, registry: Registry, link: Option<Link>) -> Estate {
        Estate {
            limits: Limits::from_environment(state.reserved_bytes()),
            state,
            registry,
            memories: BTreeMap::new(),
            ageing: Vec::new(),
            expiring: Vec::new(),
            pidfds: BTreeMap::new(),
            spaces: BTreeMap::new(),
            link,
            joined: None,
            announcements: Vec::new(),
            notices: Notices::default(),
            news: Vec::new(),
        }
    }

    /// Takes every descriptor that the registry names out of the store; what cannot be had any more, leaves.
    fn adopt(&mut self, store: &mut BTreeMap<String, OwnedFd>) -> Vec<Event> {
        let mut losses = Vec::new();
        for (&topic, entry) in self.state.topics() {
            match TopicMemory::adopt(&entry.info, segments_of(entry, store)) {
                Ok(memory) => {
                    self.ageing.extend((entry.info.options.max_age_ms > 0).then_some(topic));
                    self.memories.insert(topic, memory);
                }
                Err(error) => {
                    eprintln!("shmbus coordinator: topic {:?} is lost: {error}", entry.info.name);
                    losses.push(Event::TopicRemoved { topic });
                }
            }
        }
        for (&incarnation, participant) in self.state.participants() {
            let pidfd = store.remove(&participant_name(incarnation));
            // Who was not recognized has not been let in, and will come as a newcomer.
            match pidfd.filter(|_| participant.birth.is_some()) {
                Some(pidfd) => drop(self.pidfds.insert(incarnation, pidfd)),
                None => losses.extend(self.state.leave(incarnation)),
            }
            self.spaces.extend(store.remove(&space_name(incarnation)).map(|space| (incarnation, space)));
        }
        for &wildcard in self.state.wildcards().keys() {
            // Its owner may still write its cursors. Without a notice they stay in force all the same, and the owner is asked
            // for it when it comes.
            let fd = store.remove(&notice_name(wildcard));
            let adopted = fd.map(|fd| self.notices.adopt(self.state.bus, wildcard, fd));
            if let Some(Err(error)) = adopted {
                eprintln!("shmbus coordinator: the notice of wildcard subscription {wildcard}: {error}");
            }
        }
        losses.extend(self.replace_lost_arenas());
        losses
    }

    /// Cursors that one subscriber has for itself hold nobody. Where they are lost to all but it, or garbled by it, others stand in for
    /// them, which show where it began.
    fn renew_own_cursors(&mut self) {
        for (topic, entry) in self.state.topics() {
            let Some(memory) = self.memories.get_mut(topic) else { continue };
            for (&cursor, subscriber) in entry.subscribers.iter().filter(|(_, subscriber)| subscriber.own.is_some()) {
                if memory.has_own_cursors(cursor) {
                    continue;
                }
                let renewed = memory.add_own_cursors(cursor, true);
                let joined = renewed
                    .and_then(|()| memory.join(cursor, subscriber.incarnation, StartAt::Oldest, subscriber.droppable));
                if let Err(error) = joined {
                    eprintln!("shmbus coordinator: cursor {cursor} of topic {topic}: {error}");
                }
            }
        }
    }

    /// Whether the bus lets a user in.
    pub(crate) fn lets_in(&self, user: &User) -> bool {
        user.uid == 0 || user.uid == Uid::effective().as_raw() || self.state.allows(user)
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

    /// Every arena that a returning participant must know.
    pub(crate) fn arenas_for(&self, incarnation: u64) -> Vec<(u64, u32)> {
        let reads = |entry: &&TopicEntry| entry.readers().any(|reader| reader == incarnation);
        let arenas = |entry: &TopicEntry| entry.arenas.iter().map(|slot| (entry.info.id, *slot)).collect::<Vec<_>>();
        let many = |entry: &&TopicEntry| entry.info.options.mode == Mode::Many;
        self.state.topics().values().filter(many).filter(reads).flat_map(arenas).collect()
    }

    /// Finishes what a dead coordinator had begun for wildcard subscriptions: a topic whose creation was logged may lack
    /// their cursors, or have them in the registry only. Nobody was told of such a topic, so nothing has been missed.
    fn repair_wildcards(&mut self) {
        for (wildcard, topic) in self.state.missing_cursors() {
            let event = self.state.cursor_for(wildcard, topic, FOOTPRINT);
            if let Err(error) = event.map_or(Ok(()), |event| self.carry_out_for_others(event)) {
                eprintln!("shmbus coordinator: topic {topic} is not in wildcard subscription {wildcard}: {error}");
            }
        }
        for &wildcard in self.state.wildcards().keys() {
            for handle in self.state.cursors_of_wildcard(wildcard) {
                self.repair_cursor(handle);
            }
        }
        // Their owners come back for what was opened while they had no connection.
        self.news.clear();
        self.state.wildcards().keys().for_each(|wildcard| self.tell(*wildcard));
    }

    /// Puts a cursor in force that is so in the registry only.
    fn repair_cursor(&self, handle: HandleRef) {
        let HandleRef::Subscriber { topic, cursor } = handle else { return };
        let entry = self.state.topic(topic).and_then(|entry| entry.subscribers.get(&cursor));
        if let (Some(entry), Ok(memory)) = (entry, self.memory(topic))
            && !memory.is_in_force(cursor, entry.incarnation)
            && let Err(error) = memory.join(cursor, entry.incarnation, entry.start, entry.droppable)
        {
            eprintln!("shmbus coordinator: cursor {cursor} of topic {topic}: {error}");
        }
    }

    /// Takes the subscribers of which the owners of wildcard subscriptions are to be told.
    pub(crate) fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// What a returning participant's wildcard subscriptions have and it does not name, and how many each has had.
    pub(crate) fn news_for(&self, incarnation: u64, holds: &[HandleRef]) -> (Vec<News>, Vec<(u64, u64)>) {
        let named: HashSet<HandleRef> = holds.iter().copied().collect();
        let unnamed = self.state.handles_of(incarnation).into_iter().filter(|handle| !named.contains(handle));
        let news = unnamed.filter_map(|handle| {
            let (wildcard, HandleRef::Subscriber { topic, cursor }) = (self.state.wildcard_of(handle)?, handle) else {
                return None;
            };
            Some(News { incarnation, wildcard, told: 0, what: NewsOf::Cursor { topic, cursor } })
        });
        let wildcards = self.state.wildcards().iter().filter(|(_, entry)| entry.incarnation == incarnation);
        let mine = wildcards.clone();
        let missed = mine.flat_map(|(&wildcard, entry)| {
            let of = move |told| News { incarnation, wildcard, told, what: NewsOf::Missed };
            entry.missed.iter().map(move |missed| of(missed.number))
        });
        (news.chain(missed).collect(), wildcards.map(|(wildcard, entry)| (*wildcard, entry.opened)).collect())
    }

    /// What a push says now, when it is its turn; `None` where its topic has gone meanwhile. Fails for want of descriptors.
    pub(crate) fn resolve(&self, push: Push) -> Result<Option<Granted>, Refusal> {
        match push {
            Push::Arena { topic, slot } => match self.memory(topic) {
                Ok(memory) if memory.has_arena(slot) => {
                    Ok(Some((Answer::ArenaAdded { topic, slot }, vec![memory.arena_fd(slot)?])))
                }
                _ => Ok(None),
            },
            Push::Wildcard(news) => self.wildcard_topic(news),
        }
    }

    /// A wildcard subscription's new subscriber, for its owner. Its cursor is where it was put in force: nobody reads yet.
    fn wildcard_topic(&self, news: News) -> Result<Option<Granted>, Refusal> {
        let News { wildcard, told, what, .. } = news;
        let NewsOf::Cursor { topic, cursor } = what else { return Ok(Some((self.missed(wildcard, told), Vec::new()))) };
        let memory = self.memory(topic).ok();
        let found = memory.and_then(|memory| Some((memory, memory.cursor_place(cursor)?)));
        let subscriber = HandleRef::Subscriber { topic, cursor };
        let Some((memory, place)) = found.filter(|_| self.state.wildcard_of(subscriber) == Some(wildcard)) else {
            return Ok(Some((Answer::WildcardTold { wildcard, told }, Vec::new())));
        };
        let (segments, fds) = memory.subscriber_fds(cursor)?.into_iter().unzip();
        let (info, position, sequence) = (self.entry(topic)?.info.clone(), place.position, place.sequence);
        Ok(Some((Answer::WildcardTopic { wildcard, told, info, cursor, position, sequence, segments }, fds)))
    }

    /// What a wildcard subscription has missed, by its number.
    fn missed(&self, wildcard: u64, told: u64) -> Answer {
        let entry = self.state.wildcards().get(&wildcard);
        match entry.and_then(|entry| entry.missed.iter().find(|missed| missed.number == told)) {
            Some(missed) => {
                Answer::WildcardMissed { wildcard, told, topic: missed.name.clone(), why: missed.why.clone() }
            }
            // It has missed so many since that the last of them have to stand for all.
            None => Answer::WildcardTold { wildcard, told },
        }
    }

    /// Wakes a wildcard subscription's owner, after it has been sent what there is.
    pub(crate) fn tell(&self, wildcard: u64) {
        if let Some(entry) = self.state.wildcards().get(&wildcard) {
            self.notices.tell(wildcard, entry.opened);
        }
    }

    /// Lets a process in.
    pub(crate) fn admit(&mut self, pid: u32, user: User, token: u64, pidfd: OwnedFd) -> Result<u64, Refusal> {
        let plan = self.state.join(&self.limits, pid, user.uid, user.gids)?;
        let Reply::Welcome { incarnation } = plan.reply else { return Err(broken("a join without a welcome")) };
        let birth = pidfd::birth(pid, pidfd.as_fd()).map_err(|error| system("looking at a process", &error))?;
        if let Some(link) = &mut self.link {
            link.store(&participant_name(incarnation), pidfd.as_fd())?;
        }
        self.pidfds.insert(incarnation, pidfd);
        let recognized = Event::Recognized { incarnation, birth, token };
        if let Err(refusal) = self.carry_out_all(plan.events.into_iter().chain([recognized]).collect()) {
            self.pidfds.remove(&incarnation);
            self.forget(participant_name(incarnation));
            return Err(refusal);
        }
        Ok(incarnation)
    }

    /// Whom a process without a number was let in as, where the answer to its Hello was lost. Whether it is the same process is
    /// for [`Self::readmit`] to say.
    pub(crate) fn known_as(&self, peer: Peer, token: u64) -> Option<u64> {
        let mut all = self.state.participants().iter();
        all.find(|(_, known)| known.token == token && (known.pid, known.uid) == (peer.pid, peer.uid))
            .map(|(who, _)| *who)
    }

    /// Notes the address space in which a participant has its handles, unless it is known.
    pub(crate) fn watch_space(&mut self, incarnation: u64, space: OwnedFd) {
        if self.spaces.contains_key(&incarnation) {
            return;
        }
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
        peer: Peer,
        pidfd: BorrowedFd<'_>,
        holds: &[HandleRef],
    ) -> Result<(), Refusal> {
        let known = self.pidfds.get(&incarnation).zip(self.state.participant(incarnation));
        let (registered, participant) = known.ok_or(Refusal::UnknownParticipant { incarnation })?;
        // While the registered process lives nobody else can have its number.
        let lives = !pidfd::is_dead(registered.as_fd()).map_err(|error| system("looking at a process", &error))?;
        let same =
            pidfd::may_be_same(registered.as_fd(), pidfd).map_err(|error| system("comparing processes", &error))?;
        // Who has become another user keeps what it joined as, if it is still the same program: where nobody can tell, it may
        // be anybody's that was executed since.
        let same_program = participant.uid == peer.uid || self.spaces.contains_key(&incarnation);
        if !(lives && same && participant.pid == peer.pid && same_program) || self.is_past(incarnation) {
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
        self.carry_out_all(self.state.leave(incarnation))
    }

    /// Grants a participant's request, or declines it. `None`: the bus is to be stopped. `once`: the number under which it is granted
    /// once, or 0.
    pub(crate) fn request_once(
        &mut self,
        incarnation: u64,
        request: &Request,
        once: u64,
    ) -> Result<Option<Granted>, Refusal> {
        if matches!(request, Request::Stop) {
            self.check_host(incarnation)?;
        }
        let Plan { events, reply } = self.state.request_once(&self.limits, FOOTPRINT, incarnation, once, request)?;
        self.carry_out_all(events)?;
        let opened = match reply {
            Reply::Stop => return Ok(None),
            Reply::Publisher { topic, slot } => Some(HandleRef::Publisher { topic, slot }),
            Reply::Subscriber { topic, cursor } => Some(HandleRef::Subscriber { topic, cursor }),
            Reply::Consumer { topic, group, consumer } => Some(HandleRef::Consumer { topic, group, consumer }),
            Reply::Wildcard { wildcard } => Some(HandleRef::Wildcard { wildcard }),
            _ => None,
        };
        let granted = self.granted(reply);
        if let (Err(_), Some(handle)) = (&granted, opened) {
            self.carry_out(Event::Closed { handle })?;
        }
        granted.map(Some)
    }

    #[cfg(test)]
    pub(crate) fn request(&mut self, incarnation: u64, request: &Request) -> Result<Option<Granted>, Refusal> {
        self.request_once(incarnation, request, 0)
    }

    /// Whether a participant may do what concerns the whole bus.
    fn check_host(&self, incarnation: u64) -> Result<(), Refusal> {
        let (uid, host) = (self.state.participant(incarnation).map(|who| who.uid), Uid::effective().as_raw());
        match uid {
            Some(uid) if uid != 0 && uid != host => Err(Refusal::NotHost { uid, host }),
            _ => Ok(()),
        }
    }

    fn carry_out_all(&mut self, events: Vec<Event>) -> Result<(), Refusal> {
        events.into_iter().try_for_each(|event| self.carry_out_for_others(event))
    }

    /// A wildcard subscription that cannot have a topic, for want of a descriptor say, misses it and is told so: whoever
    /// creates a topic has nothing to do with that, nor have the subscription's other topics.
    fn carry_out_for_others(&mut self, event: Event) -> Result<(), Refusal> {
        let concerned = match &event {
            Event::SubscriberOpened { topic, wildcard: Some(wildcard), .. } => Some((*topic, *wildcard)),
            _ => None,
        };
        match (self.carry_out(event), concerned) {
            (Err(why), Some((topic, wildcard))) => {
                let info = self.entry(topic)?.info.clone();
                self.carry_out(missed_event(wildcard, &info, why))
            }
            (outcome, _) => outcome,
        }
    }

    fn carry_out(&mut self, logged: Event) -> Result<(), Refusal> {
        let event = logged.plain();
        self.prepare(event)?;
        self.log(&logged)?;
        // Who is about to lose the topic or participant is known only before the event is applied.
        let (given_up, groups) = (self.names_given_up(event), self.groups_concerned(event));
        self.state.apply(&logged);
        let acted = self.act(event);
        self.follow_groups(groups);
        let recorded = match event {
            Event::TopicCreated { info: TopicInfo { id: topic, .. }, .. }
            | Event::ArenaAdded { topic, .. }
            | Event::GroupCreated { topic, .. }
            | Event::SubscriberOpened { topic, own: Some(_), .. } => self.record_segments(*topic),
            Event::WildcardOpened { wildcard, .. } => self.record_notice(*wildcard),
            _ => Ok(()),
        };
        // Last: as long as the keeper has them a successor can act in our place.
        given_up.into_iter().for_each(|name| self.forget(name));
        acted.and(recorded)
    }

    /// Before the event is logged: new memory is created and stored, what is given back is taken out of force.
    fn prepare(&mut self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::TopicCreated { info, .. } => {
                let memory = TopicMemory::create(info)?;
                self.store_segments(info.id, &memory)?;
                self.memories.insert(info.id, memory);
                self.ageing.extend((info.options.max_age_ms > 0).then_some(info.id));
            }
            Event::ArenaAdded { topic, slot, .. } => self.prepare_arena(*topic, *slot)?,
            Event::GroupCreated { topic, info, start, replaces, .. } => {
                self.prepare_group(*topic, info, *start, *replaces)?;
            }
            Event::GroupRetired { topic, group } => self.fence_group(*topic, *group)?,
            Event::SubscriberOpened { topic, cursor, own: Some(_), .. } => {
                let memory = self.memories.get_mut(topic).ok_or_else(|| broken("a subscriber without a topic"))?;
                memory.add_own_cursors(*cursor, false)?;
                self.store_segment(*topic, &own_cursors_name(*cursor))?;
            }
            // What is there under its number is what a subscriber that was never logged has left.
            Event::SubscriberOpened { topic, cursor, .. } => {
                self.memories.get_mut(topic).into_iter().for_each(|memory| memory.drop_own_cursors(*cursor));
            }
            Event::PublisherOpened { opened, .. } => self.check_origin(opened.identity.as_ref())?,
            // Once it is logged it must succeed.
            Event::Fenced { topic, .. } => self.memory(*topic)?.has_room_for_fence()?,
            Event::WildcardOpened { wildcard, .. } => {
                let fd = self.notices.add(self.state.bus, *wildcard).map_err(|e| system("reserving a notice", &e))?;
                if let Some(link) = &mut self.link {
                    link.store(&notice_name(*wildcard), fd)?;
                }
            }
            Event::Closed { handle } => self.release(*handle)?,
            Event::Left { incarnation } => {
                let handles = self.state.handles_of(*incarnation);
                handles.into_iter().try_for_each(|handle| self.release(handle))?;
            }
            _ => {}
        }
        Ok(())
    }

    /// After the event was logged and applied.
    fn act(&mut self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::PublisherOpened { topic, slot, opened } => {
                let before = self.entry(*topic)?.number_before(opened);
                if let Err(refusal) = self.memory(*topic)?.begin_publisher(*slot, opened, before) {
                    self.carry_out(Event::Closed { handle: HandleRef::Publisher { topic: *topic, slot: *slot } })?;
                    return Err(refusal);
                }
            }
            Event::Fenced { topic, slot } => self.fence(*topic, *slot)?,
            Event::SubscriberOpened { topic, cursor, incarnation, start, droppable, wildcard, .. } => {
                match self.memory(*topic)?.join(*cursor, *incarnation, *start, *droppable) {
                    Ok(joined) => match wildcard {
                        Some(wildcard) => {
                            let what = NewsOf::Cursor { topic: *topic, cursor: *cursor };
                            self.add_news(*incarnation, *wildcard, what);
                        }
                        None => self.joined = Some(joined),
                    },
                    Err(refusal) => {
                        let handle = HandleRef::Subscriber { topic: *topic, cursor: *cursor };
                        self.carry_out(Event::Closed { handle })?;
                        return Err(refusal);
                    }
                }
            }
            Event::WildcardMissed { wildcard, .. } => {
                if let Some(incarnation) = self.state.wildcards().get(wildcard).map(|entry| entry.incarnation) {
                    self.add_news(incarnation, *wildcard, NewsOf::Missed);
                }
            }
            Event::ArenaAdded { topic, slot, .. } => self.announcements.push((*topic, *slot)),
            Event::GroupCreated { topic, info, start, .. } => self.begin_group(*topic, info.id, *start)?,
            Event::ConsumerOpened { topic, group, consumer, .. } => {
                self.begin_consumer(ConsumerRef { topic: *topic, group: *group, consumer: *consumer })?;
            }
            Event::TopicRemoved { topic } => {
                if let Some(memory) = self.memories.remove(topic) {
                    memory.end(TopicState::Removed);
                }
            }
            Event::Left { incarnation } => {
                self.pidfds.remove(incarnation);
                self.spaces.remove(incarnation);
                self.give_up_notices();
            }
            Event::Closed { handle: HandleRef::Wildcard { .. } } => self.give_up_notices(),
            _ => {}
        }
        Ok(())
    }

    fn add_news(&mut self, incarnation: u64, wildcard: u64, what: NewsOf) {
        let told = self.state.wildcards().get(&wildcard).map_or(0, |entry| entry.opened);
        self.news.push(News { incarnation, wildcard, told, what });
    }

    fn give_up_notices(&mut self) {
        let held = self.state.wildcards();
        self.notices.retain(|wildcard| held.contains_key(&wildcard));
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
            Event::Left { incarnation } => {
                let wildcards = self.state.wildcards().iter().filter(|(_, entry)| entry.incarnation == *incarnation);
                let notices = wildcards.map(|(wildcard, _)| notice_name(*wildcard));
                let handles = self.state.handles_of(*incarnation);
                let own: Vec<String> = handles.into_iter().filter_map(|handle| self.own_cursors(handle)).collect();
                notices.chain(own).chain([participant_name(*incarnation), space_name(*incarnation)]).collect()
            }
            Event::Closed { handle: HandleRef::Wildcard { wildcard } } => vec![notice_name(*wildcard)],
            Event::Closed { handle } => self.own_cursors(*handle).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// The keeper's name of the cursors that a subscriber has for itself.
    fn own_cursors(&self, handle: HandleRef) -> Option<String> {
        let HandleRef::Subscriber { topic, cursor } = handle else { return None };
        let subscriber = self.state.topic(topic)?.subscribers.get(&cursor)?;
        subscriber.own.map(|_| segment_name(topic, &own_cursors_name(cursor)))
    }

    fn prepare_arena(&mut self, topic: u64, slot: u32) -> Result<(), Refusal> {
        let (Some(entry), Some(memory)) = (self.state.topic(topic), self.memories.get_mut(&topic)) else {
            return Err(broken("an arena for a topic that is not there"));
        };
        // It may be there from an attempt that failed later on.
        if !memory.has_arena(slot) {
            memory.add_arena(&entry.info, slot)?;
        }
        self.store_segment(topic, &format!("arena-{slot}"))
    }

    /// Has the keeper keep a new segment.
    fn store_segment(&mut self, topic: u64, name: &str) -> Result<(), Refusal> {
        let segments = self.memories.get(&topic).map(TopicMemory::segments).unwrap_or_default();
        let Some(segment) = segments.into_iter().find(|segment| segment.name == name) else {
            return Err(broken("a new segment that is not there"));
        };
        match &mut self.link {
            Some(link) => link.store(&segment_name(topic, name), segment.fd),
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

    /// Stops a publisher by the log itself and settles its identity. Idempotent: twice leaves one more hole.
    fn fence(&mut self, topic: u64, slot: u32) -> Result<(), Refusal> {
        let opening = self.entry(topic)?.publishers.get(&slot).map(|publisher| publisher.opening);
        if let Some(opening) = opening {
            self.memory(topic)?.fence(slot, opening)?;
        }
        self.settle_identity(topic, slot)
    }

    /// Writes down what a publisher that commits nothing any more has committed last.
    fn settle_identity(&mut self, topic: u64, slot: u32) -> Result<(), Refusal> {
        match self.settled_number(topic, slot) {
            Ok(Some(last_number)) => self.carry_out(Event::IdentitySettled { topic, slot, last_number }),
            Ok(None) => Ok(()),
            // The number stays what it was: nobody else is to suffer for one garbled topic.
            Err(error) => {
                eprintln!("shmbus coordinator: the last number of publisher slot {slot} of topic {topic}: {error}");
                Ok(())
            }
        }
    }

    fn settled_number(&self, topic: u64, slot: u32) -> Result<Option<u64>, Refusal> {
        let entry = self.entry(topic)?;
        let Some(publisher) = entry.publishers.get(&slot).filter(|publisher| publisher.identity.is_some()) else {
            return Ok(None);
        };
        // Where its line never came into force, nothing was published under it.
        Ok(self.memory(topic)?.last_number(slot, publisher)?.or(entry.number_before(publisher)))
    }

    /// Takes a handle out of force in memory. Idempotent. Fails only where the registry cannot be written.
    fn release(&mut self, handle: HandleRef) -> Result<(), Refusal> {
        match handle {
            HandleRef::Publisher { topic, slot } => {
                // Before the slot can be anybody else's.
                self.settle_identity(topic, slot)?;
                let ended = self.memory(topic).and_then(|memory| memory.end_publisher(slot));
                if let Err(error) = ended {
                    eprintln!("shmbus coordinator: repairing after publisher slot {slot} of topic {topic}: {error}");
                }
            }
            HandleRef::Consumer { topic, group, consumer } => {
                self.release_consumer(ConsumerRef { topic, group, consumer });
            }
            HandleRef::Subscriber { topic, cursor } => {
                if let Ok(memory) = self.memory(topic) {
                    let entry = self.entry(topic).ok().and_then(|entry| entry.subscribers.get(&cursor));
                    // Who is droppable holds nothing, and so has nothing to release.
                    let holds = |entry: &SubscriberEntry| !entry.droppable && entry.own.is_none();
                    let from_oldest = entry.is_some_and(|entry| entry.start == StartAt::Oldest && holds(entry));
                    memory.leave(cursor, from_oldest);
                }
                if let Some(memory) = self.memories.get_mut(&topic) {
                    memory.drop_own_cursors(cursor);
                }
            }
            // Its cursors are handles of their own.
            HandleRef::Wildcard { .. } => {}
        }
        Ok(())
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
        let larger =
            self.registry.grown(self.state.bus, snapshot).map_err(|error| system("growing the registry", &error))?;
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
            Reply::Consumer { topic, group, consumer } => self.consumer_opened(ConsumerRef { topic, group, consumer }),
            Reply::Reclaim { topic, group, consumer } => {
                self.reclaim(ConsumerRef { topic, group, consumer })?;
                Ok((Answer::Done, Vec::new()))
            }
            Reply::Names { topic, after } => Ok((self.names(topic, after.as_deref())?, Vec::new())),
            Reply::Wildcard { wildcard } => {
                let notice = self.notices.descriptor(wildcard).map_err(|e| system("duplicating a notice", &e))?;
                Ok((Answer::WildcardOpened { wildcard }, vec![notice]))
            }
            Reply::Purge { topic } => Ok((Answer::Purged(self.purge(topic)?), Vec::new())),
            Reply::Status { topics, more } => Ok((self.status(&topics, more), Vec::new())),
        }
    }

    pub(crate) fn welcome(&self, incarnation: u64) -> Answer {
        Answer::Welcome { protocol: PROTOCOL_VERSION, incarnation, bus: self.state.bus }
    }

    fn publisher_opened(&self, topic: u64, slot: u32) -> Result<Granted, Refusal> {
        let entry = self.entry(topic)?;
        let opened = entry.publishers.get(&slot).ok_or_else(|| broken("a publisher that is not there"))?;
        let mut segments = match entry.info.options.mode {
            Mode::Channel => vec![SegmentRef::Channel],
            _ => vec![SegmentRef::Log, SegmentRef::Cursors, SegmentRef::Arena(slot)],
        };
        let memory = self.memory(topic)?;
        let mut fds = memory.publisher_fds(slot)?;
        if opened.identity.is_some() || entry.info.options.dedup {
            // Where its predecessors' messages lie, or ids.
            for other in (0..entry.max_publishers()).filter(|other| *other != slot && memory.has_arena(*other)) {
                segments.push(SegmentRef::Arena(other));
                fds.push(memory.arena_fd(other)?);
            }
        }
        let (info, tenancy, last_number) = (entry.info.clone(), opened.tenancy, entry.number_before(opened));
        let (publisher, opening) = (opened.publisher, opened.opening);
        Ok((Answer::PublisherOpened { info, slot, publisher, opening, tenancy, last_number, segments }, fds))
    }

    fn subscriber_opened(&mut self, topic: u64, cursor: u32) -> Result<Granted, Refusal> {
        let Joined { position, sequence, asked } =
            self.joined.take().ok_or_else(|| broken("a subscriber that never joined"))?;
        let (segments, fds) = self.memory(topic)?.subscriber_fds(cursor)?.into_iter().unzip();
        let info = self.entry(topic)?.info.clone();
        Ok((Answer::SubscriberOpened { info, cursor, position, sequence, asked, segments }, fds))
    }

    fn names(&self, topic: u64, after: Option<&str>) -> Result<Answer, Refusal> {
        let (entry, memory) = (self.entry(topic)?, self.memory(topic)?);
        // Stale at once while the holder publishes on.
        let last = |slot: u32| memory.last_number(slot, entry.publishers.get(&slot)?).ok().flatten();
        let mut rest = entry.names(after, last);
        let names = rest.by_ref().take(MAX_PAGE_NAMES).collect();
        let more = rest.next().is_some();
        Ok(Answer::Names { names, more })
    }

    /// Gives up what nobody holds.
    fn purge(&self, topic: u64) -> Result<Purged, Refusal> {
        let (entry, memory) = (self.entry(topic)?, self.memory(topic)?);
        let (oldest_before, _) = memory.range()?;
        let Some(checkpoint) = entry.spare_checkpoint() else {
            let what = format!("publishers of topic {:?}", entry.info.name);
            let mend = "a purge takes the place of one; close some".to_owned();
            return Err(Refusal::Limit { what, limit: entry.publishers.len() as u64, mend });
        };
        let holder = memory.give_up_all(checkpoint)?;
        let (oldest_sequence, tail_sequence) = memory.range()?;
        let holder_pid = holder
            .and_then(|cursor| entry.subscribers.get(&cursor))
            .and_then(|subscriber| self.state.participant(subscriber.incarnation))
            .map(|participant| participant.pid);
        let held_by = |group: &&GroupEntry| holder == Some(group.info.cursor);
        let holder_group = entry.living_groups().find(held_by).map(|group| group.info.name.clone());
        Ok(Purged { oldest_before, oldest_sequence, tail_sequence, holder, holder_pid, holder_group })
    }

    /// How long what has grown too old may stay: until the clock is looked at next. `None` while there is no such topic.
    pub(crate) fn age_look(&self) -> Option<Duration> {
        let ages = self.ageing.iter().filter_map(|topic| self.state.topic(*topic));
        ages.map(|entry| Duration::from_millis(entry.info.options.max_age_ms / 10).clamp(MIN_AGE_LOOK, MAX_AGE_LOOK))
            .min()
    }

    /// Gives up what has grown too old and nobody holds.
    pub(crate) fn give_up_old(&mut self) {
        self.ageing.retain(|topic| self.memories.contains_key(topic));
        for topic in &self.ageing {
            let (Ok(entry), Ok(memory)) = (self.entry(*topic), self.memory(*topic)) else { continue };
            // With every slot taken it waits for one; what is too old then goes when the ring needs the room.
            let Some(checkpoint) = entry.spare_checkpoint() else { continue };
            if let Err(error) = memory.give_up_old(checkpoint) {
                eprintln!("shmbus coordinator: giving up old messages: {error}");
            }
        }
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

    /// A participant's process; 0 where it has left.
    fn pid_of(&self, incarnation: u64) -> u32 {
        self.state.participant(incarnation).map_or(0, |participant| participant.pid)
    }

    fn topic_status(&self, entry: &TopicEntry) -> TopicStatus {
        let memory = self.memories.get(&entry.info.id);
        let (oldest, tail) = memory.and_then(|memory| memory.range().ok()).unwrap_or((0, 0));
        let publishers = entry.publishers.iter();
        let subscribers = entry.subscribers.iter();
        TopicStatus {
            id: entry.info.id,
            name: entry.info.name.clone(),
            options: entry.info.options.clone(),
            owner: entry.uid,
            access: entry.access.clone(),
            oldest_sequence: oldest,
            tail_sequence: tail,
            memory_bytes: entry.bytes,
            publishers: publishers
                .map(|(&slot, p)| PublisherStatus { slot, publisher: p.publisher, pid: self.pid_of(p.incarnation) })
                .collect(),
            groups: self.group_statuses(entry, tail),
            subscribers: subscribers
                .map(|(&cursor, s)| {
                    let sequence = memory.map_or(0, |memory| memory.cursor_sequence(cursor));
                    let lag = tail.saturating_sub(sequence);
                    SubscriberStatus { cursor, pid: self.pid_of(s.incarnation), sequence, lag, droppable: s.droppable }
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
    let own = entry.subscribers.iter().filter(|(_, subscriber)| subscriber.own.is_some());
    let own = own.map(|(cursor, _)| own_cursors_name(*cursor));
    fixed.into_iter().chain(entry.arenas.iter().map(|slot| format!("arena-{slot}"))).chain(own).collect()
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
