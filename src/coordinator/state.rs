//! Who is on the bus and what they hold: the coordinator's state machine, free of any operating system.
//!
//! [`State::request`] looks at a request and changes nothing: it answers with a [`Plan`], the events that would grant
//! it. The server carries the events out one by one; [`State::apply`] is the only way to change anything, whether an
//! event has just happened or is replayed from the registry.

mod access;
mod groups;
mod limits;
mod wildcards;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::access::{Access, Right, Who};
use crate::coordinator::limits::{Limits, MAX_STATUS_TOPICS};
use crate::coordinator::memory::own_cursors_name;
use crate::coordinator::names;
use crate::coordinator::names::NameEntry;
use crate::coordinator::protocol::{GroupInfo, HandleRef, Identity, Request, StartAt, TopicInfo};
pub(crate) use crate::coordinator::state::groups::GroupEntry;
use crate::coordinator::state::groups::GroupName;
use crate::coordinator::state::limits::Owned;
use crate::error::Refusal;
use crate::os::pidfd::Birth;
use crate::shm::layout::{Geometry, MAX_PUBLISHERS};
use crate::topic::{Mode, Schema, TopicOptions, check_name};

pub(crate) use wildcards::{WildcardEntry, missed_event};

/// Tenancies a log can name at a time (ARCHITECTURE.md §3.2).
const TENANCIES: u64 = 256;

/// Longest type name of a schema in bytes; keeps events and answers small.
const MAX_SCHEMA_NAME_BYTES: usize = 1024;

/// Bytes of a refused name that are repeated in the error.
const SHOWN_NAME_BYTES: usize = 64;

/// Everything that can happen to the state. What the registry holds is a sequence of these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Event {
    /// First event of a registry: the bus, and whether it stays when nobody needs it.
    Began { bus: u64, stay: bool },
    /// The users who may connect, besides root and who runs the bus.
    Allowed { users: Vec<Who> },
    /// Ids below these have been given away (part of a compacted registry).
    Given { participants: u64, topics: u64, publishers: u64 },
    /// The same for wildcard subscriptions.
    WildcardsGiven { wildcards: u64 },
    /// A process connected.
    Joined { incarnation: u64, pid: u32, uid: u32, gids: Vec<u32> },
    /// Which process a participant is, beside its number: proof of its death for a coordinator that has no descriptor of it.
    /// Its `token` is what it has called itself in its Hello.
    Recognized { incarnation: u64, birth: Birth, token: u64 },
    /// What a participant asked for under a number, and the event that grants it; without one, it was the last that was granted
    /// (part of a compacted registry).
    Once { incarnation: u64, number: u64, event: Option<Box<Event>> },
    /// A process left or died; everything it held has been released.
    Left { incarnation: u64 },
    /// A topic exists. `publishers` of it have been there (0, but for a compacted registry). It goes with its `owner`.
    TopicCreated {
        info: TopicInfo,
        uid: u32,
        access: Access,
        bytes: u64,
        publishers: u64,
        kept: bool,
        owner: Option<u64>,
    },
    /// Inode numbers of a topic's segments by their names: what is presented for one of them must be this one.
    SegmentsKnown { topic: u64, inodes: Vec<(String, u64)> },
    /// It is gone, with all its handles.
    TopicRemoved { topic: u64 },
    /// A publisher slot got its arena.
    ArenaAdded { topic: u64, slot: u32, bytes: u64 },
    /// A publisher holds a slot, and its identity, if it has one.
    PublisherOpened { topic: u64, slot: u32, opened: PublisherEntry },
    /// An identity exists on a topic; what it committed last (part of a compacted registry).
    IdentityKnown { topic: u64, identity: Identity, publisher: u64, last_number: u64 },
    /// A publisher is to be fenced: somebody else asked for its identity. Who reads this and finds its identity not settled
    /// does it (again).
    Fenced { topic: u64, slot: u32 },
    /// A publisher has lost its identity, whose last number is this: it is fenced, dead, or has left.
    IdentitySettled { topic: u64, slot: u32, last_number: u64 },
    /// A subscriber holds a cursor, perhaps for a wildcard subscription. With `own` its cursor lies in a segment of its own, of so
    /// many bytes.
    SubscriberOpened {
        topic: u64,
        cursor: u32,
        incarnation: u64,
        start: StartAt,
        droppable: bool,
        wildcard: Option<u64>,
        own: Option<u64>,
    },
    /// A group exists, in the place of the one it `replaces` (a rewind), which is retired.
    GroupCreated { topic: u64, info: GroupInfo, start: StartAt, bytes: u64, replaces: Option<u32> },
    /// A group has lost its name: it was removed. It goes with its last consumer.
    GroupRetired { topic: u64, group: u32 },
    /// Groups below this number have been on the topic (part of a compacted registry).
    GroupsGiven { topic: u64, groups: u32 },
    /// A consumer holds its number in the group.
    ConsumerOpened { topic: u64, group: u32, consumer: u32, incarnation: u64 },
    /// A wildcard subscription exists. `opened` cursors were opened for it (0, but for a compacted registry).
    WildcardOpened {
        wildcard: u64,
        incarnation: u64,
        pattern: String,
        schema: Option<Schema>,
        start: StartAt,
        droppable: bool,
        opened: u64,
    },
    /// A wildcard subscription does not get a topic that it stands for. Its `number` among the subscription's topics: the next,
    /// or, of a compacted registry, the one that it had.
    WildcardMissed { wildcard: u64, number: Option<u64>, topic: u64, name: String, why: Refusal },
    /// Inode number of a wildcard subscription's notice, as of a topic's segments.
    NoticeKnown { wildcard: u64, inode: u64 },
    /// A handle was given back.
    Closed { handle: HandleRef },
    /// The bus stays from now on, also when nobody needs it.
    Stays,
    /// The bus ends: nothing is granted any more, and whoever reads this finishes it.
    Ending,
}

impl Event {
    /// What happens, whoever asked for it.
    pub(crate) fn plain(&self) -> &Event {
        match self {
            Event::Once { event: Some(event), .. } => event,
            event => event,
        }
    }
}

/// What granting a request takes: events to carry out in order, then the reply to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) events: Vec<Event>,
    pub(crate) reply: Reply,
}

/// What to answer once the events have been carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Welcome { incarnation: u64 },
    Created { existed: bool },
    Done,
    Publisher { topic: u64, slot: u32 },
    Subscriber { topic: u64, cursor: u32 },
    Consumer { topic: u64, group: u32, consumer: u32 },
    Reclaim { topic: u64, group: u32, consumer: u32 },
    Wildcard { wildcard: u64 },
    Purge { topic: u64 },
    Status { topics: Vec<u64>, more: bool },
    Names { topic: u64, after: Option<String> },
    Stop,
}

/// A connected process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Participant {
    pub(crate) pid: u32,
    pub(crate) uid: u32,
    /// Its group and supplementary groups.
    pub(crate) gids: Vec<u32>,
    /// Absent only until it is let in.
    pub(crate) birth: Option<Birth>,
    /// What it calls itself.
    pub(crate) token: u64,
    /// The last of its numbered requests that was granted.
    last_once: u64,
    pub(crate) handles: BTreeSet<HandleRef>,
}

/// A topic and who is on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TopicEntry {
    pub(crate) info: TopicInfo,
    pub(crate) uid: u32,
    pub(crate) access: Access,
    pub(crate) bytes: u64,
    pub(crate) arenas: BTreeSet<u32>,
    /// Inode numbers of its segments, by name.
    pub(crate) inodes: BTreeMap<String, u64>,
    pub(crate) publishers: BTreeMap<u32, PublisherEntry>,
    pub(crate) subscribers: BTreeMap<u32, SubscriberEntry>,
    pub(crate) groups: BTreeMap<u32, GroupEntry>,
    next_group: u32,
    pub(crate) identities: BTreeMap<Identity, NameEntry>,
    publishers_seen: u64,
    /// Created by request, not by a publisher in passing: it keeps the bus until it is removed, also while it is empty.
    pub(crate) kept: bool,
    /// The participant it goes with.
    pub(crate) owner: Option<u64>,
}

/// Who has a publisher slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PublisherEntry {
    pub(crate) incarnation: u64,
    /// What its messages carry: one number for all openings under one identity.
    pub(crate) publisher: u64,
    /// Never given twice.
    pub(crate) opening: u64,
    pub(crate) tenancy: u32,
    /// What it is, until it is settled.
    pub(crate) identity: Option<Identity>,
    pub(crate) fenced: bool,
}

/// Who has a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SubscriberEntry {
    pub(crate) incarnation: u64,
    pub(crate) start: StartAt,
    pub(crate) droppable: bool,
    /// The wildcard subscription it belongs to.
    pub(crate) wildcard: Option<u64>,
    /// Bytes of the segment of its own that its cursor lies in, counted to its user.
    pub(crate) own: Option<u64>,
}

/// Bytes that segments take; asked of whoever lays them out.
#[derive(Clone, Copy)]
pub(crate) struct Footprint {
    /// A new topic: log, cursors and first arena, or the channel.
    pub(crate) topic: fn(&TopicInfo) -> u64,
    /// Cursors of a subscriber's own.
    pub(crate) cursors: fn(&TopicInfo) -> u64,
    /// One more arena.
    pub(crate) arena: fn(&TopicInfo) -> u64,
    /// A group's ledger.
    pub(crate) group: fn(&TopicInfo, &GroupInfo) -> u64,
}

/// The whole state of a bus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) bus: u64,
    pub(crate) stay: bool,
    pub(crate) ending: bool,
    pub(crate) allowed: Vec<Who>,
    participants: BTreeMap<u64, Participant>,
    topics: BTreeMap<u64, TopicEntry>,
    names: BTreeMap<String, u64>,
    wildcards: BTreeMap<u64, WildcardEntry>,
    reserved: BTreeMap<u32, u64>,
    owned: BTreeMap<u32, Owned>,
    next_incarnation: u64,
    next_topic: u64,
    next_publisher: u64,
    next_wildcard: u64,
}

impl State {
    pub(crate) fn participants(&self) -> &BTreeMap<u64, Participant> {
        &self.participants
    }

    pub(crate) fn participant(&self, incarnation: u64) -> Option<&Participant> {
        self.participants.get(&incarnation)
    }

    pub(crate) fn topics(&self) -> &BTreeMap<u64, TopicEntry> {
        &self.topics
    }

    pub(crate) fn topic(&self, id: u64) -> Option<&TopicEntry> {
        self.topics.get(&id)
    }

    /// Memory that all topics together have reserved.
    pub(crate) fn reserved_bytes(&self) -> u64 {
        self.reserved.values().sum()
    }

    /// What the user with most of it has reserved.
    pub(crate) fn most_reserved_bytes(&self) -> u64 {
        self.reserved.values().copied().max().unwrap_or(0)
    }

    /// Every handle of a participant.
    pub(crate) fn handles_of(&self, incarnation: u64) -> Vec<HandleRef> {
        self.participants.get(&incarnation).into_iter().flat_map(|p| &p.handles).copied().collect()
    }

    /// Connected processes that read the topic's messages: they must know its arenas.
    pub(crate) fn readers_of(&self, topic: u64) -> BTreeSet<u64> {
        self.topics.get(&topic).into_iter().flat_map(TopicEntry::readers).collect()
    }

    /// Changes the state. Events are true: one that names what does not exist changes nothing.
    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Began { bus, stay } => {
                (self.bus, self.stay) = (*bus, *stay);
                // 0 means nobody in shared memory.
                (self.next_incarnation, self.next_publisher, self.next_wildcard) = (1, 1, 1);
            }
            Event::Given { participants, topics, publishers } => {
                self.next_incarnation = self.next_incarnation.max(*participants);
                self.next_topic = self.next_topic.max(*topics);
                self.next_publisher = self.next_publisher.max(*publishers);
            }
            Event::WildcardsGiven { wildcards } => self.next_wildcard = self.next_wildcard.max(*wildcards),
            Event::Allowed { users } => self.allowed.clone_from(users),
            Event::Joined { incarnation, pid, uid, gids } => {
                let (pid, uid, gids) = (*pid, *uid, gids.clone());
                let (birth, token, last_once, handles) = (None, 0, 0, BTreeSet::new());
                let participant = Participant { pid, uid, gids, birth, token, last_once, handles };
                self.participants.insert(*incarnation, participant);
                self.next_incarnation = self.next_incarnation.max(incarnation + 1);
            }
            Event::Recognized { incarnation, birth, token } => {
                let Some(participant) = self.participants.get_mut(incarnation) else { return };
                (participant.birth, participant.token) = (Some(*birth), *token);
            }
            Event::Once { incarnation, number, event } => {
                event.iter().for_each(|event| self.apply(event));
                let participant = self.participants.get_mut(incarnation);
                participant.into_iter().for_each(|participant| participant.last_once = *number);
            }
            Event::Left { incarnation } => {
                self.handles_of(*incarnation).into_iter().for_each(|handle| self.close(handle));
                self.participants.remove(incarnation);
            }
            Event::TopicCreated { info, uid, access, bytes, publishers, kept, owner } => {
                let new = TopicEntry::new(info, *uid, access, *bytes, *publishers, *kept, *owner);
                self.add_topic(new);
            }
            Event::SegmentsKnown { topic, inodes } => {
                let entry = self.topics.get_mut(topic);
                entry.into_iter().for_each(|entry| entry.inodes.extend(inodes.iter().cloned()));
            }
            Event::TopicRemoved { topic } => self.remove_topic(*topic),
            Event::ArenaAdded { topic, slot, bytes } => {
                let Some(entry) = self.topics.get_mut(topic) else { return };
                if entry.arenas.insert(*slot) {
                    entry.bytes += bytes;
                    self.owned.entry(entry.uid).or_default().segments += 1;
                    *self.reserved.entry(entry.uid).or_default() += bytes;
                }
            }
            Event::PublisherOpened { topic, slot, opened } => {
                self.close(HandleRef::Publisher { topic: *topic, slot: *slot });
                let Some(entry) = self.topics.get_mut(topic) else { return };
                entry.publishers_seen += 1;
                entry.attach_identity(*slot, opened);
                entry.publishers.insert(*slot, opened.clone());
                self.next_publisher = self.next_publisher.max(opened.opening + 1);
                self.hold(opened.incarnation, HandleRef::Publisher { topic: *topic, slot: *slot });
            }
            Event::IdentityKnown { topic, identity, publisher, last_number } => {
                let Some(entry) = self.topics.get_mut(topic) else { return };
                let known = NameEntry { publisher: *publisher, last_number: *last_number, holder: None };
                entry.identities.insert(identity.clone(), known);
            }
            Event::Fenced { topic, slot } => {
                let publisher = self.topics.get_mut(topic).and_then(|entry| entry.publishers.get_mut(slot));
                publisher.into_iter().for_each(|publisher| publisher.fenced = true);
            }
            Event::IdentitySettled { topic, slot, last_number } => {
                let Some(entry) = self.topics.get_mut(topic) else { return };
                entry.settle_identity(*slot, *last_number);
                self.forget_origins(*topic);
            }
            Event::SubscriberOpened { topic, cursor, incarnation, start, droppable, wildcard, own } => {
                self.close(HandleRef::Subscriber { topic: *topic, cursor: *cursor });
                let Some(entry) = self.topics.get_mut(topic) else { return };
                let (start, droppable, wildcard, own) = (*start, *droppable, *wildcard, *own);
                let new = SubscriberEntry { incarnation: *incarnation, start, droppable, wildcard, own };
                if let Some(subscription) = wildcard.and_then(|wildcard| self.wildcards.get_mut(&wildcard)) {
                    subscription.opened += 1;
                }
                entry.subscribers.insert(*cursor, new);
                self.count_own_cursors(&new, true);
                self.hold(*incarnation, HandleRef::Subscriber { topic: *topic, cursor: *cursor });
            }
            Event::GroupCreated { topic, info, start, bytes, replaces } => {
                let (info, start, bytes) = (info.clone(), *start, *bytes);
                let new = GroupEntry { info, start, bytes, retired: false, consumers: BTreeMap::new() };
                self.add_group(*topic, new, *replaces);
            }
            Event::GroupRetired { topic, group } => self.retire_group(*topic, *group),
            Event::GroupsGiven { topic, groups } => {
                if let Some(entry) = self.topics.get_mut(topic) {
                    entry.next_group = entry.next_group.max(*groups);
                }
            }
            Event::ConsumerOpened { topic, group, consumer, incarnation } => {
                self.add_consumer(*topic, *group, *consumer, *incarnation);
            }
            Event::WildcardOpened { wildcard, incarnation, pattern, schema, start, droppable, opened } => {
                let (incarnation, start, droppable, opened) = (*incarnation, *start, *droppable, *opened);
                let (pattern, schema) = (pattern.clone(), schema.clone());
                let (notice, missed) = (None, VecDeque::new());
                let entry = WildcardEntry { incarnation, pattern, schema, start, droppable, opened, notice, missed };
                self.open_wildcard(*wildcard, entry);
            }
            Event::WildcardMissed { wildcard, number, topic, name, why } => {
                if let Some(entry) = self.wildcards.get_mut(wildcard) {
                    entry.miss(*number, *topic, name, why);
                }
            }
            Event::NoticeKnown { wildcard, inode } => {
                let entry = self.wildcards.get_mut(wildcard);
                entry.into_iter().for_each(|entry| entry.notice = Some(*inode));
            }
            Event::Closed { handle } => self.close(*handle),
            Event::Stays => self.stay = true,
            Event::Ending => self.ending = true,
        }
    }

    /// The fewest events from which the same state comes again.
    pub(crate) fn snapshot(&self) -> Vec<Event> {
        let mut events = vec![Event::Began { bus: self.bus, stay: self.stay }];
        events.extend((!self.allowed.is_empty()).then(|| Event::Allowed { users: self.allowed.clone() }));
        for (&incarnation, p) in &self.participants {
            events.push(Event::Joined { incarnation, pid: p.pid, uid: p.uid, gids: p.gids.clone() });
            events.extend(p.birth.map(|birth| Event::Recognized { incarnation, birth, token: p.token }));
            let (number, event) = (p.last_once, None);
            events.extend((number > 0).then_some(Event::Once { incarnation, number, event }));
        }
        self.snapshot_wildcards(&mut events);
        for entry in self.topics.values() {
            entry.snapshot(&mut events);
        }
        self.snapshot_missed(&mut events);
        events.push(Event::WildcardsGiven { wildcards: self.next_wildcard });
        events.push(Event::Given {
            participants: self.next_incarnation,
            topics: self.next_topic,
            publishers: self.next_publisher,
        });
        events.extend(self.ending.then_some(Event::Ending));
        events
    }

    /// What a participant's end takes: the topics that go with it, then itself.
    pub(crate) fn leave(&self, incarnation: u64) -> Vec<Event> {
        let owned = self.topics.iter().filter(|(_, entry)| entry.owner == Some(incarnation));
        let removed = owned.map(|(&topic, _)| Event::TopicRemoved { topic });
        removed.chain([Event::Left { incarnation }]).collect()
    }

    fn add_topic(&mut self, new: TopicEntry) {
        let id = new.info.id;
        self.next_topic = self.next_topic.max(id + 1);
        self.names.insert(new.info.name.clone(), id);
        *self.reserved.entry(new.uid).or_default() += new.bytes;
        let owned = self.owned.entry(new.uid).or_default();
        (owned.topics, owned.segments) = (owned.topics + 1, owned.segments + new.segments());
        self.topics.insert(id, new);
    }

    fn remove_topic(&mut self, topic: u64) {
        for handle in self.topics.get(&topic).map(TopicEntry::handles).unwrap_or_default() {
            self.close(handle);
        }
        let Some(entry) = self.topics.remove(&topic) else { return };
        self.disown(entry.uid, 1, entry.segments());
        self.names.remove(&entry.info.name);
        self.forget_all_origins();
        if let Some(reserved) = self.reserved.get_mut(&entry.uid) {
            *reserved = reserved.saturating_sub(entry.bytes);
        }
        self.reserved.retain(|_, bytes| *bytes > 0);
    }

    fn hold(&mut self, incarnation: u64, handle: HandleRef) {
        if let Some(participant) = self.participants.get_mut(&incarnation) {
            participant.handles.insert(handle);
        }
    }

    fn close(&mut self, handle: HandleRef) {
        let owner = match handle {
            HandleRef::Publisher { topic, slot } => {
                let removed = self.topics.get_mut(&topic).and_then(|t| t.remove_publisher(slot));
                if removed.is_some() {
                    self.forget_origins(topic);
                }
                removed.map(|publisher| publisher.incarnation)
            }
            HandleRef::Subscriber { topic, cursor } => {
                let removed = self.topics.get_mut(&topic).and_then(|t| t.subscribers.remove(&cursor));
                removed.iter().for_each(|subscriber| self.count_own_cursors(subscriber, false));
                if removed.is_some_and(|subscriber| subscriber.own.is_some())
                    && let Some(entry) = self.topics.get_mut(&topic)
                {
                    entry.inodes.remove(&own_cursors_name(cursor));
                }
                removed.map(|subscriber| subscriber.incarnation)
            }
            HandleRef::Consumer { topic, group, consumer } => self.remove_consumer(topic, group, consumer),
            HandleRef::Wildcard { wildcard } => self.close_wildcard(wildcard),
        };
        if let Some(participant) = owner.and_then(|incarnation| self.participants.get_mut(&incarnation)) {
            participant.handles.remove(&handle);
        }
    }
}

impl TopicEntry {
    fn new(
        info: &TopicInfo,
        uid: u32,
        access: &Access,
        bytes: u64,
        publishers_seen: u64,
        kept: bool,
        owner: Option<u64>,
    ) -> TopicEntry {
        TopicEntry {
            info: info.clone(),
            uid,
            access: access.clone(),
            bytes,
            arenas: BTreeSet::from([0]),
            inodes: BTreeMap::new(),
            publishers: BTreeMap::new(),
            subscribers: BTreeMap::new(),
            groups: BTreeMap::new(),
            next_group: 0,
            identities: BTreeMap::new(),
            publishers_seen,
            kept,
            owner,
        }
    }

    /// Who reads its messages: subscribers, consumers and, where ids are compared, publishers.
    pub(crate) fn readers(&self) -> impl Iterator<Item = u64> + '_ {
        let publishers = self.publishers.values().filter(|_| self.info.options.dedup).map(|p| p.incarnation);
        self.subscribers.values().map(|s| s.incarnation).chain(publishers).chain(self.consuming())
    }

    /// Every handle on the topic.
    pub(crate) fn handles(&self) -> Vec<HandleRef> {
        let topic = self.info.id;
        let publishers = self.publishers.keys().map(|&slot| HandleRef::Publisher { topic, slot });
        let subscribers = self.subscribers.keys().map(|&cursor| HandleRef::Subscriber { topic, cursor });
        self.group_handles().chain(publishers).chain(subscribers).collect()
    }

    /// A checkpoint that no publisher writes now, so that the coordinator may; `None` while every slot is taken.
    pub(crate) fn spare_checkpoint(&self) -> Option<u32> {
        (0..MAX_PUBLISHERS).rev().find(|slot| !self.publishers.contains_key(slot))
    }

    fn snapshot(&self, events: &mut Vec<Event>) {
        let topic = self.info.id;
        // What the added arenas take is counted in the topic already; the publishers and groups that follow count themselves.
        let publishers = self.publishers_seen - self.publishers.len() as u64;
        let (info, kept, owner) = (self.info.clone(), self.kept, self.owner);
        let bytes = self.bytes - self.group_bytes();
        let access = self.access.clone();
        events.push(Event::TopicCreated { info, uid: self.uid, access, bytes, publishers, kept, owner });
        for &slot in self.arenas.iter().filter(|slot| **slot != 0) {
            events.push(Event::ArenaAdded { topic, slot, bytes: 0 });
        }
        if !self.inodes.is_empty() {
            let inodes = self.inodes.iter().map(|(name, inode)| (name.clone(), *inode)).collect();
            events.push(Event::SegmentsKnown { topic, inodes });
        }
        for (identity, name) in &self.identities {
            let (identity, NameEntry { publisher, last_number, .. }) = (identity.clone(), *name);
            events.push(Event::IdentityKnown { topic, identity, publisher, last_number });
        }
        for (&slot, opened) in &self.publishers {
            events.push(Event::PublisherOpened { topic, slot, opened: opened.clone() });
        }
        for (&cursor, s) in &self.subscribers {
            let SubscriberEntry { incarnation, start, droppable, wildcard, own } = *s;
            events.push(Event::SubscriberOpened { topic, cursor, incarnation, start, droppable, wildcard, own });
        }
        self.snapshot_groups(events);
    }

    /// A free publisher slot, if possible one whose arena exists already.
    fn free_slot(&self) -> Option<u32> {
        let free = |slot: &u32| !self.publishers.contains_key(slot);
        self.arenas.iter().copied().find(free).or_else(|| (0..self.max_publishers()).find(free))
    }

    /// A cursor that is neither a subscriber's nor a group's; a retired group keeps its own.
    fn free_cursor(&self) -> Option<u32> {
        let groups: BTreeSet<u32> = self.groups.values().map(|group| group.info.cursor).collect();
        let free = |cursor: &u32| !self.subscribers.contains_key(cursor) && !groups.contains(cursor);
        (0..self.max_subscribers()).find(free)
    }

    pub(crate) fn max_publishers(&self) -> u32 {
        if self.info.options.mode == Mode::Many { self.info.options.max_publishers } else { 1 }
    }

    fn max_subscribers(&self) -> u32 {
        if self.info.options.mode == Mode::Channel { 1 } else { self.info.options.max_subscribers }
    }
}

/// One participant's request, being decided.
struct Decider<'a> {
    state: &'a State,
    limits: &'a Limits,
    footprint: Footprint,
    incarnation: u64,
    uid: u32,
}

impl State {
    /// A process without an incarnation connects.
    pub(crate) fn join(&self, limits: &Limits, pid: u32, uid: u32, gids: Vec<u32>) -> Result<Plan, Refusal> {
        if self.participants.len() >= limits.participants {
            let mend = "end some programs that use the bus".to_owned();
            return Err(Refusal::Limit { what: "participants".to_owned(), limit: limits.participants as u64, mend });
        }
        self.check_user_participants(limits, uid)?;
        let incarnation = self.next_incarnation;
        let events = vec![Event::Joined { incarnation, pid, uid, gids }];
        Ok(Plan { events, reply: Reply::Welcome { incarnation } })
    }

    /// A participant comes back after its connection broke; what it no longer names is released. The caller has proven
    /// that it is the same process.
    pub(crate) fn rejoin(&self, incarnation: u64, holds: &[HandleRef]) -> Result<Plan, Refusal> {
        if !self.participants.contains_key(&incarnation) {
            return Err(Refusal::UnknownParticipant { incarnation });
        }
        // A set: both lists may be long, and who comes back may be hostile.
        let kept: BTreeSet<HandleRef> = holds.iter().copied().collect();
        // A wildcard subscription's topics may have come while their owner was away: it learns of them when it is back.
        let goes_with = |handle: HandleRef| self.wildcard_of(handle).map(|wildcard| HandleRef::Wildcard { wildcard });
        let given_up = self.handles_of(incarnation).into_iter();
        let given_up = given_up.filter(|handle| !kept.contains(&goes_with(*handle).unwrap_or(*handle)));
        let events = given_up.map(|handle| Event::Closed { handle }).collect();
        Ok(Plan { events, reply: Reply::Welcome { incarnation } })
    }

    /// What granting a participant's request takes, or why it is declined.
    pub(crate) fn request(
        &self,
        limits: &Limits,
        footprint: Footprint,
        incarnation: u64,
        request: &Request,
    ) -> Result<Plan, Refusal> {
        let participant = self.participants.get(&incarnation).ok_or(Refusal::UnknownParticipant { incarnation })?;
        let decider = Decider { state: self, limits, footprint, incarnation, uid: participant.uid };
        match request {
            // These are the server's business, and never come here from a connection that is what it should be.
            Request::Hello { .. } | Request::Goodbye | Request::Report => {
                Err(Refusal::Protocol { problem: "out of turn".to_owned() })
            }
            Request::CreateTopic { topic, options, access, exist_ok, ephemeral } => {
                decider.create_topic(topic, options, access.as_ref(), *exist_ok, *ephemeral)
            }
            Request::RemoveTopic { topic, force } => decider.remove_topic(topic, *force),
            Request::OpenPublisher { topic, schema, create, identity } => {
                decider.open_publisher(topic, schema.as_ref(), create.as_ref(), identity.as_ref())
            }
            Request::OpenSubscriber { topic, schema, start, droppable } => {
                decider.open_subscriber(topic, schema.as_ref(), *start, *droppable)
            }
            Request::CreateGroup { topic, group, options, start, exist_ok } => {
                decider.create_group(GroupName { topic, group }, options, *start, *exist_ok)
            }
            Request::RemoveGroup { topic, group, force } => decider.remove_group(GroupName { topic, group }, *force),
            Request::RewindGroup { topic, group, start, force } => {
                decider.rewind_group(GroupName { topic, group }, *start, *force)
            }
            Request::OpenConsumer { topic, group, schema, create } => {
                decider.open_consumer(GroupName { topic, group }, schema.as_ref(), create.as_ref())
            }
            Request::Reclaim { topic, group, consumer } => decider.reclaim(*topic, *group, *consumer),
            Request::OpenWildcard { pattern, schema, start, droppable } => {
                decider.open_wildcard(pattern, schema.as_ref(), *start, *droppable)
            }
            Request::Close { handles } => decider.close(handles),
            Request::Purge { topic } => decider.purge(topic),
            Request::Status { topic, after } => decider.status(topic.as_deref(), after.as_deref()),
            Request::Names { topic, after } => decider.names(topic, after.clone()),
            Request::Present { .. } | Request::PresentNotice { .. } | Request::AllPresented => {
                Err(Refusal::Protocol { problem: "presented what was not asked for".to_owned() })
            }
            Request::Stop => Ok(Plan { events: Vec::new(), reply: Reply::Stop }),
        }
    }

    /// The same for one that is to be granted once: the registry says so together with its first event, so that whoever has the one has
    /// the other. `number` 0: it is granted as often as it is asked for.
    pub(crate) fn request_once(
        &self,
        limits: &Limits,
        footprint: Footprint,
        incarnation: u64,
        number: u64,
        request: &Request,
    ) -> Result<Plan, Refusal> {
        let granted = match request {
            _ if number == 0 => return self.request(limits, footprint, incarnation, request),
            Request::CreateTopic { .. } | Request::CreateGroup { .. } => Reply::Created { existed: false },
            Request::RemoveTopic { .. } | Request::RemoveGroup { .. } | Request::RewindGroup { .. } => Reply::Done,
            _ => return Err(Refusal::Protocol { problem: "numbered what is not done once".to_owned() }),
        };
        let last_once = self.participants.get(&incarnation).map_or(0, |participant| participant.last_once);
        if number <= last_once {
            return Ok(Plan { events: Vec::new(), reply: granted });
        }
        let mut plan = self.request(limits, footprint, incarnation, request)?;
        if let Some(first) = plan.events.first_mut() {
            let event = Some(Box::new(first.clone()));
            *first = Event::Once { incarnation, number, event };
        }
        Ok(plan)
    }
}

impl Decider<'_> {
    fn create_topic(
        &self,
        name: &str,
        options: &TopicOptions,
        access: Option<&Access>,
        exist_ok: bool,
        ephemeral: bool,
    ) -> Result<Plan, Refusal> {
        checked(name)?;
        let Some(existing) = self.state.names.get(name).and_then(|id| self.state.topics.get(id)) else {
            let (_, events) =
                self.new_topic(name, options, access, !ephemeral, ephemeral.then_some(self.incarnation))?;
            return Ok(Plan { events, reply: Reply::Created { existed: false } });
        };
        if !exist_ok {
            return Err(Refusal::AlreadyExists { topic: name.to_owned() });
        }
        self.check_sees(existing)?;
        let other_access = access.filter(|access| **access != existing.access);
        let other_access = other_access.map(|access| format!("access is {}, asked for {access}", existing.access));
        match difference(&existing.info.options, options).or(other_access) {
            Some(difference) => Err(Refusal::Exists { topic: name.to_owned(), difference }),
            None => Ok(Plan { events: Vec::new(), reply: Reply::Created { existed: true } }),
        }
    }

    fn remove_topic(&self, name: &str, force: bool) -> Result<Plan, Refusal> {
        let entry = self.existing(name)?;
        self.check_right(entry, Right::Administer)?;
        let (publishers, subscribers) = (entry.publishers.len() as u32, entry.subscribers.len() as u32);
        let consumers = entry.consuming().count() as u32;
        if !force && publishers + subscribers + consumers > 0 {
            let topic = name.to_owned();
            return Err(Refusal::InUse { topic, publishers, subscribers, consumers });
        }
        Ok(Plan { events: vec![Event::TopicRemoved { topic: entry.info.id }], reply: Reply::Done })
    }

    fn open_publisher(
        &self,
        name: &str,
        schema: Option<&Schema>,
        create: Option<&TopicOptions>,
        identity: Option<&Identity>,
    ) -> Result<Plan, Refusal> {
        checked(name)?;
        self.check_handles()?;
        identity.map_or(Ok(()), names::check)?;
        self.check_origin(identity)?;
        let existing = self.state.names.get(name).and_then(|id| self.state.topics.get(id));
        let mut events = Vec::new();
        let (info, slot, tenancy) = match (existing, create) {
            (None, None) => return Err(unknown(name)),
            (None, Some(options)) => {
                let (info, created) = self.new_topic(name, options, None, false, None)?;
                events.extend(created);
                (info, 0, 0)
            }
            (Some(entry), _) => {
                self.check_right(entry, Right::Publish)?;
                let slot = self.publisher_slot(entry)?;
                identity.map_or(Ok(()), |identity| names::check_room(entry, identity))?;
                // First what may fail for want of memory: a holder is fenced for a successor that comes.
                events.extend(self.arena_for(entry, slot)?);
                events.extend(identity.and_then(|identity| names::fencing(entry, identity)));
                (entry.info.clone(), slot, (entry.publishers_seen % TENANCIES) as u32)
            }
        };
        check_schema(&info, schema)?;
        identity.map_or(Ok(()), |_| names::check_mode(&info))?;
        let (opening, incarnation, topic) = (self.state.next_publisher, self.incarnation, info.id);
        let known = existing.zip(identity).and_then(|(entry, identity)| entry.identities.get(identity));
        let publisher = known.map_or(opening, |known| known.publisher);
        let identity = identity.cloned();
        let opened = PublisherEntry { incarnation, publisher, opening, tenancy, identity, fenced: false };
        events.push(Event::PublisherOpened { topic, slot, opened });
        Ok(Plan { events, reply: Reply::Publisher { topic, slot } })
    }

    fn open_subscriber(
        &self,
        name: &str,
        schema: Option<&Schema>,
        start: StartAt,
        droppable: bool,
    ) -> Result<Plan, Refusal> {
        let entry = self.existing(name)?;
        let own = self.check_subscribe(entry, droppable)?;
        self.check_handles()?;
        check_schema(&entry.info, schema)?;
        let (topic, incarnation, wildcard) = (entry.info.id, self.incarnation, None);
        let Some(cursor) = entry.free_cursor() else {
            return Err(match entry.info.options.mode {
                Mode::Channel => {
                    self.taken(entry, "subscriber", entry.subscribers.values().next().map(|s| s.incarnation))
                }
                _ => too_many("subscribers and groups", entry, entry.max_subscribers()),
            });
        };
        let events = vec![Event::SubscriberOpened { topic, cursor, incarnation, start, droppable, wildcard, own }];
        Ok(Plan { events, reply: Reply::Subscriber { topic, cursor } })
    }

    fn close(&self, handles: &[HandleRef]) -> Result<Plan, Refusal> {
        let held = self.state.participants.get(&self.incarnation).map(|p| &p.handles);
        // A handle that is held no more went with its topic: closing it is no mistake.
        // Named twice it is closed once.
        let named: BTreeSet<HandleRef> = handles.iter().copied().collect();
        let mine = named.iter().copied().filter(|key| held.is_some_and(|held| held.contains(key)));
        let closed: Vec<HandleRef> = mine.collect();
        // A wildcard subscription goes with its cursors.
        let wildcards = closed.iter().filter_map(|handle| match handle {
            HandleRef::Wildcard { wildcard } => Some(*wildcard),
            _ => None,
        });
        let cursors = wildcards.flat_map(|wildcard| self.state.cursors_of_wildcard(wildcard));
        let cursors: Vec<HandleRef> = cursors.filter(|handle| !named.contains(handle)).collect();
        let events = cursors.into_iter().chain(closed).map(|handle| Event::Closed { handle }).collect();
        Ok(Plan { events, reply: Reply::Done })
    }

    /// Changes memory alone: what is given up is nobody's.
    fn purge(&self, name: &str) -> Result<Plan, Refusal> {
        let entry = self.existing(name)?;
        self.check_right(entry, Right::Administer)?;
        let info = &entry.info;
        if info.options.mode == Mode::Channel {
            let problem = "a channel's messages are its receiver's; read them, or remove the topic".to_owned();
            return Err(Refusal::Options { topic: name.to_owned(), problem });
        }
        Ok(Plan { events: Vec::new(), reply: Reply::Purge { topic: info.id } })
    }

    fn status(&self, topic: Option<&str>, after: Option<&str>) -> Result<Plan, Refusal> {
        if let Some(name) = topic {
            let entry = self.existing(name)?;
            self.check_sees(entry)?;
            let topics = vec![entry.info.id];
            return Ok(Plan { events: Vec::new(), reply: Reply::Status { topics, more: false } });
        }
        let start = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let rest = self.state.names.range::<str, _>((start, std::ops::Bound::Unbounded)).map(|(_, id)| *id);
        let seen = |id: &u64| self.state.topics.get(id).is_some_and(|entry| self.sees(entry));
        let mut rest = rest.filter(seen);
        let topics = rest.by_ref().take(MAX_STATUS_TOPICS).collect();
        let more = rest.next().is_some();
        Ok(Plan { events: Vec::new(), reply: Reply::Status { topics, more } })
    }

    fn names(&self, topic: &str, after: Option<String>) -> Result<Plan, Refusal> {
        let entry = self.existing(topic)?;
        self.check_sees(entry)?;
        let topic = entry.info.id;
        Ok(Plan { events: Vec::new(), reply: Reply::Names { topic, after } })
    }

    fn existing(&self, name: &str) -> Result<&TopicEntry, Refusal> {
        checked(name)?;
        self.state.names.get(name).and_then(|id| self.state.topics.get(id)).ok_or_else(|| unknown(name))
    }

    /// A topic's creation, with the cursors of the wildcard subscriptions that stand for it: they are in force before
    /// anybody is told that it exists.
    fn new_topic(
        &self,
        name: &str,
        options: &TopicOptions,
        access: Option<&Access>,
        kept: bool,
        owner: Option<u64>,
    ) -> Result<(TopicInfo, Vec<Event>), Refusal> {
        let topic = name.to_owned();
        if self.state.topics.len() >= self.limits.topics {
            let mend = "remove some with `shmbus rm`".to_owned();
            return Err(Refusal::Limit {
                what: "topics of the bus".to_owned(),
                limit: self.limits.topics as u64,
                mend,
            });
        }
        check_schema_len(options.schema.as_ref())
            .map_err(|problem| Refusal::Options { topic: topic.clone(), problem })?;
        let geometry = Geometry::from_options(options).map_err(|problem| Refusal::Options { topic, problem })?;
        let info = TopicInfo {
            id: self.state.next_topic,
            bus: self.state.bus,
            name: name.to_owned(),
            generation: 0,
            options: options.clone(),
            geometry,
        };
        let bytes = (self.footprint.topic)(&info);
        self.check_budget(name, self.uid, bytes)?;
        self.check_owned(self.uid, 1, limits::first_segments(options.mode))?;
        self.check_letters(name)?;
        let access = access.cloned().or_else(|| self.access_of_dead_letters(name)).unwrap_or_default();
        access.check().map_err(|problem| Refusal::Options { topic: name.to_owned(), problem })?;
        let new = TopicEntry::new(&info, self.uid, &access, bytes, 0, kept, owner);
        let cursors = self.wildcard_cursors(&new);
        let created =
            Event::TopicCreated { info: info.clone(), uid: self.uid, access, bytes, publishers: 0, kept, owner };
        Ok((info, [created].into_iter().chain(cursors).collect()))
    }

    fn publisher_slot(&self, entry: &TopicEntry) -> Result<u32, Refusal> {
        entry.free_slot().ok_or_else(|| match entry.info.options.mode {
            Mode::Many => too_many("publishers", entry, entry.max_publishers()),
            _ => self.taken(entry, "publisher", entry.publishers.values().next().map(|p| p.incarnation)),
        })
    }

    /// The event that gives a slot its arena, where it has none.
    fn arena_for(&self, entry: &TopicEntry, slot: u32) -> Result<Option<Event>, Refusal> {
        if entry.arenas.contains(&slot) {
            return Ok(None);
        }
        let bytes = (self.footprint.arena)(&entry.info);
        self.check_budget(&entry.info.name, entry.uid, bytes)?;
        self.check_owned(entry.uid, 0, 1)?;
        Ok(Some(Event::ArenaAdded { topic: entry.info.id, slot, bytes }))
    }

    fn check_budget(&self, name: &str, uid: u32, needed: u64) -> Result<(), Refusal> {
        let budget = self.limits.budget_bytes;
        let available = budget.saturating_sub(self.state.reserved.get(&uid).copied().unwrap_or(0));
        if needed <= available {
            return Ok(());
        }
        Err(Refusal::Budget { topic: name.to_owned(), needed, available, budget })
    }

    fn check_handles(&self) -> Result<(), Refusal> {
        self.check_handles_of(self.incarnation, 1)
    }

    /// Whether a participant may hold `more` handles.
    fn check_handles_of(&self, incarnation: u64, more: usize) -> Result<(), Refusal> {
        let held = self.state.participants.get(&incarnation).map_or(0, |p| p.handles.len());
        if held + more <= self.limits.handles {
            return Ok(());
        }
        let what = "publishers, subscribers and consumers of one process".to_owned();
        Err(Refusal::Limit { what, limit: self.limits.handles as u64, mend: "close some".to_owned() })
    }

    fn taken(&self, entry: &TopicEntry, role: &str, holder: Option<u64>) -> Refusal {
        let mode = if entry.info.options.mode == Mode::Channel { "a channel" } else { "exclusive" };
        let pid = holder.and_then(|incarnation| self.state.participants.get(&incarnation)).map_or(0, |p| p.pid);
        Refusal::Taken { topic: entry.info.name.clone(), mode: mode.to_owned(), role: role.to_owned(), pid }
    }
}

fn checked(name: &str) -> Result<(), Refusal> {
    check_name(name).map_err(|source| Refusal::Name { name: shown(name), source })
}

/// The part of a name that an error repeats.
fn shown(name: &str) -> String {
    name.char_indices().take_while(|(at, _)| *at < SHOWN_NAME_BYTES).map(|(_, c)| c).collect()
}

/// Raw handles may open any topic; a typed one only a topic of its own type.
fn check_schema(info: &TopicInfo, handle: Option<&Schema>) -> Result<(), Refusal> {
    match handle {
        Some(handle) if info.options.schema.as_ref() != Some(handle) => Err(Refusal::Schema {
            topic: info.name.clone(),
            expected: schema_text(info.options.schema.as_ref()),
            found: handle.to_string(),
        }),
        _ => Ok(()),
    }
}

/// What is kept in the registry is bounded.
fn check_schema_len(schema: Option<&Schema>) -> Result<(), String> {
    match schema.map_or(0, |schema| schema.name.len()) {
        0..=MAX_SCHEMA_NAME_BYTES => Ok(()),
        len => Err(format!("the type's name has {len} bytes; at most {MAX_SCHEMA_NAME_BYTES} are allowed")),
    }
}

fn schema_text(schema: Option<&Schema>) -> String {
    schema.map_or_else(|| "raw bytes".to_owned(), Schema::to_string)
}

fn unknown(name: &str) -> Refusal {
    Refusal::UnknownTopic { topic: name.to_owned() }
}

fn too_many(what: &str, entry: &TopicEntry, limit: u32) -> Refusal {
    let what = format!("{what} of topic {:?}", entry.info.name);
    Refusal::Limit { what, limit: limit.into(), mend: "close some, or create the topic with more".to_owned() }
}

/// The first difference between a topic's options and those asked for.
fn difference(have: &TopicOptions, asked: &TopicOptions) -> Option<String> {
    let pairs = [
        ("mode", have.mode.to_string(), asked.mode.to_string()),
        ("messages", have.messages.to_string(), asked.messages.to_string()),
        ("bytes", have.bytes.to_string(), asked.bytes.to_string()),
        ("full", have.full.to_string(), asked.full.to_string()),
        ("hold", have.hold.to_string(), asked.hold.to_string()),
        ("max publishers", have.max_publishers.to_string(), asked.max_publishers.to_string()),
        ("max subscribers", have.max_subscribers.to_string(), asked.max_subscribers.to_string()),
        ("envelope", have.envelope.to_string(), asked.envelope.to_string()),
        ("ttl_ms", have.ttl_ms.to_string(), asked.ttl_ms.to_string()),
        ("max_age_ms", have.max_age_ms.to_string(), asked.max_age_ms.to_string()),
        ("dedup", have.dedup.to_string(), asked.dedup.to_string()),
        ("payload", schema_text(have.schema.as_ref()), schema_text(asked.schema.as_ref())),
    ];
    let (what, have, asked) = pairs.into_iter().find(|(_, have, asked)| have != asked)?;
    Some(format!("{what} is {have}, asked for {asked}"))
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
