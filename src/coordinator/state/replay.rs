//! What events change, and the fewest events that lead to the same state.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Event, Participant, State, SubscriberEntry, TopicEntry, WildcardEntry};
use crate::coordinator::memory::own_cursors_name;
use crate::coordinator::names::NameEntry;
use crate::coordinator::protocol::HandleRef;
use crate::coordinator::state::groups::GroupEntry;

impl State {
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
        self.forget_ended(topic, 0..=u32::MAX);
        if let Some(reserved) = self.reserved.get_mut(&entry.uid) {
            *reserved = reserved.saturating_sub(entry.bytes);
        }
        self.reserved.retain(|_, bytes| *bytes > 0);
    }

    pub(super) fn hold(&mut self, incarnation: u64, handle: HandleRef) {
        if let Some(participant) = self.participants.get_mut(&incarnation) {
            participant.handles.insert(handle);
        }
    }

    pub(super) fn close(&mut self, handle: HandleRef) {
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
}
