//! Publishers' slots and subscribers' cursors: what is decided about opening and closing them.

use std::collections::BTreeSet;

use super::topics::{check_schema, checked, unknown};
use super::{Decider, Event, Plan, PublisherEntry, Reply, TopicEntry};
use crate::access::Right;
use crate::coordinator::names;
use crate::coordinator::protocol::{HandleRef, Identity, StartAt};
use crate::error::Refusal;
use crate::shm::layout::MAX_PUBLISHERS;
use crate::topic::{Mode, Schema, TopicOptions};

/// In the place of an inode: the segment is given up, whoever may still have it.
pub(crate) const GIVEN_UP: u64 = 0;

/// Tenancies a log can name at a time (ARCHITECTURE.md §3.2).
const TENANCIES: u64 = 256;

impl TopicEntry {
    /// A checkpoint that no publisher writes now, so that the coordinator may; `None` while every slot is taken.
    pub(crate) fn spare_checkpoint(&self) -> Option<u32> {
        (0..MAX_PUBLISHERS).rev().find(|slot| !self.publishers.contains_key(slot))
    }

    /// A free publisher slot, if possible one whose arena exists already.
    fn free_slot(&self) -> Option<u32> {
        let free = |slot: &u32| !self.publishers.contains_key(slot) && !self.is_given_up(*slot);
        self.arenas.iter().copied().find(free).or_else(|| (0..self.max_publishers()).find(free))
    }

    /// Whether a slot has no arena any more, and gets none: readers may have the former one mapped.
    pub(crate) fn is_given_up(&self, slot: u32) -> bool {
        self.inodes.get(&format!("arena-{slot}")) == Some(&GIVEN_UP)
    }

    /// A cursor that is neither a subscriber's nor a group's; a retired group keeps its own.
    pub(super) fn free_cursor(&self) -> Option<u32> {
        let groups: BTreeSet<u32> = self.groups.values().map(|group| group.info.cursor).collect();
        let free = |cursor: &u32| !self.subscribers.contains_key(cursor) && !groups.contains(cursor);
        (0..self.max_subscribers()).find(free)
    }

    pub(crate) fn max_publishers(&self) -> u32 {
        if self.info.options.mode == Mode::Many { self.info.options.max_publishers } else { 1 }
    }

    pub(super) fn max_subscribers(&self) -> u32 {
        if self.info.options.mode == Mode::Channel { 1 } else { self.info.options.max_subscribers }
    }
}

impl Decider<'_> {
    pub(super) fn open_publisher(
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

    pub(super) fn open_subscriber(
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

    pub(super) fn close(&self, handles: &[HandleRef]) -> Result<Plan, Refusal> {
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

    fn taken(&self, entry: &TopicEntry, role: &str, holder: Option<u64>) -> Refusal {
        let mode = if entry.info.options.mode == Mode::Channel { "a channel" } else { "exclusive" };
        let pid = holder.and_then(|incarnation| self.state.participants.get(&incarnation)).map_or(0, |p| p.pid);
        Refusal::Taken { topic: entry.info.name.clone(), mode: mode.to_owned(), role: role.to_owned(), pid }
    }
}

pub(super) fn too_many(what: &str, entry: &TopicEntry, limit: u32) -> Refusal {
    let what = format!("{what} of topic {:?}", entry.info.name);
    Refusal::Limit { what, limit: limit.into(), mend: "close some, or create the topic with more".to_owned() }
}
