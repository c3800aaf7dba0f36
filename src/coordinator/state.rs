//! Who is on the bus and what they hold: the coordinator's state machine, free of any operating system.
//!
//! [`State::request`] looks at a request and changes nothing: it answers with a [`Plan`], the events that would grant
//! it. The estate carries the events out one by one; [`State::apply`] is the only way to change anything, whether an
//! event has just happened or is replayed from the registry.
//!
//! This file says what a bus is and where requests arrive; what is decided about each of its things is beside it.

mod access;
mod event;
mod groups;
mod handles;
mod limits;
mod participants;
mod replay;
mod topics;
mod wildcards;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::access::{Access, Who};
use crate::coordinator::limits::Limits;
use crate::coordinator::names::NameEntry;
use crate::coordinator::protocol::{GroupInfo, HandleRef, Identity, Request, StartAt, TopicInfo};
pub(crate) use crate::coordinator::state::event::Event;
pub(crate) use crate::coordinator::state::groups::GroupEntry;
use crate::coordinator::state::groups::GroupName;
pub(crate) use crate::coordinator::state::handles::GIVEN_UP;
use crate::coordinator::state::limits::Owned;
pub(crate) use crate::coordinator::state::limits::{Aside, AsideOf};
use crate::error::Refusal;
use crate::os::pidfd::Birth;

pub(crate) use wildcards::{WildcardEntry, missed_event};

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
    /// Inode numbers of its segments, by name, or [`GIVEN_UP`].
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

    pub(crate) fn is_held(&self, incarnation: u64, handle: HandleRef) -> bool {
        self.participants.get(&incarnation).is_some_and(|participant| participant.handles.contains(&handle))
    }

    /// Connected processes that read the topic's messages: they must know its arenas.
    pub(crate) fn readers_of(&self, topic: u64) -> BTreeSet<u64> {
        self.topics.get(&topic).into_iter().flat_map(TopicEntry::readers).collect()
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
}

/// One participant's request, being decided.
struct Decider<'a> {
    state: &'a State,
    limits: &'a Limits,
    footprint: Footprint,
    /// What others' requests are about to get.
    aside: AsideOf<'a>,
    incarnation: u64,
    uid: u32,
}

impl State {
    /// What granting a participant's request takes, or why it is declined.
    pub(crate) fn request(
        &self,
        limits: &Limits,
        footprint: Footprint,
        incarnation: u64,
        request: &Request,
    ) -> Result<Plan, Refusal> {
        self.request_beside(limits, footprint, &|_| Aside::default(), incarnation, request)
    }

    /// The same while memory is set `aside` for other requests.
    fn request_beside(
        &self,
        limits: &Limits,
        footprint: Footprint,
        aside: AsideOf<'_>,
        incarnation: u64,
        request: &Request,
    ) -> Result<Plan, Refusal> {
        let participant = self.participants.get(&incarnation).ok_or(Refusal::UnknownParticipant { incarnation })?;
        let decider = Decider { state: self, limits, footprint, aside, incarnation, uid: participant.uid };
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
            Request::Present { .. } | Request::PresentNotice { .. } | Request::AllPresented { .. } => {
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
        aside: AsideOf<'_>,
        incarnation: u64,
        number: u64,
        request: &Request,
    ) -> Result<Plan, Refusal> {
        let granted = match request {
            _ if number == 0 => return self.request_beside(limits, footprint, aside, incarnation, request),
            Request::CreateTopic { .. } | Request::CreateGroup { .. } => Reply::Created { existed: false },
            Request::RemoveTopic { .. } | Request::RemoveGroup { .. } | Request::RewindGroup { .. } => Reply::Done,
            _ => return Err(Refusal::Protocol { problem: "numbered what is not done once".to_owned() }),
        };
        let last_once = self.participants.get(&incarnation).map_or(0, |participant| participant.last_once);
        if number <= last_once {
            return Ok(Plan { events: Vec::new(), reply: granted });
        }
        let mut plan = self.request_beside(limits, footprint, aside, incarnation, request)?;
        if let Some(first) = plan.events.first_mut() {
            let event = Some(Box::new(first.clone()));
            *first = Event::Once { incarnation, number, event };
        }
        Ok(plan)
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
