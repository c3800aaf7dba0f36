//! Wildcard subscriptions: which topics they have, and the cursors that a new topic or a new subscription takes.

use std::collections::BTreeMap;

use super::access::Reads;
use super::{Decider, Event, Footprint, Plan, Reply, SHOWN_NAME_BYTES, State, TopicEntry, check_schema, too_many};
use crate::coordinator::protocol::{HandleRef, StartAt, TopicInfo};
use crate::error::Refusal;
use crate::pattern::{check_pattern, matches};
use crate::topic::{Mode, Schema};

/// A wildcard subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WildcardEntry {
    pub(crate) incarnation: u64,
    pub(crate) pattern: String,
    pub(crate) schema: Option<Schema>,
    pub(crate) start: StartAt,
    pub(crate) droppable: bool,
    /// How many cursors have ever been opened for it.
    pub(crate) opened: u64,
    /// Its notice's inode number. Absent only until it is granted.
    pub(crate) notice: Option<u64>,
}

impl WildcardEntry {
    /// Whether and how the subscription is to have the topic. Topics of another type, channels, and those on which its owner
    /// may not subscribe (or not like this) are passed over.
    fn wants(&self, state: &State, topic: &TopicEntry) -> Option<Reads> {
        let info = &topic.info;
        let fits = info.options.mode != Mode::Channel
            && matches(&self.pattern, &info.name)
            && check_schema(info, self.schema.as_ref()).is_ok();
        let owner = state.participants.get(&self.incarnation).filter(|_| fits)?;
        topic.reads(owner, self.droppable)
    }
}

impl State {
    pub(crate) fn wildcards(&self) -> &BTreeMap<u64, WildcardEntry> {
        &self.wildcards
    }

    /// The cursors of a wildcard subscription, as handles.
    pub(crate) fn cursors_of_wildcard(&self, wildcard: u64) -> Vec<HandleRef> {
        let owner = self.wildcards.get(&wildcard).map_or(0, |entry| entry.incarnation);
        self.handles_of(owner).into_iter().filter(|handle| self.wildcard_of(*handle) == Some(wildcard)).collect()
    }

    /// The wildcard subscription that a handle was opened for.
    pub(crate) fn wildcard_of(&self, handle: HandleRef) -> Option<u64> {
        let HandleRef::Subscriber { topic, cursor } = handle else { return None };
        self.topics.get(&topic)?.subscribers.get(&cursor)?.wildcard
    }

    /// Cursors that wildcard subscriptions ought to have and have not: their coordinator died between the creation of the
    /// topic and theirs. Nobody has been told that the topic exists, so nothing was missed yet. A topic that has had a
    /// publisher had them all: there one is missing because its owner has given it up.
    pub(crate) fn missing_cursors(&self) -> Vec<(u64, u64)> {
        let lacks =
            |entry: &&TopicEntry, wildcard: u64| entry.subscribers.values().all(|s| s.wildcard != Some(wildcard));
        let of = |(&wildcard, entry): (&u64, &WildcardEntry)| {
            let wants = |topic: &TopicEntry| entry.wants(self, topic).is_some();
            let wanted = self.topics.values().filter(|topic| topic.publishers_seen == 0 && wants(topic));
            wanted.filter(|topic| lacks(topic, wildcard)).map(|topic| (wildcard, topic.info.id)).collect::<Vec<_>>()
        };
        self.wildcards.iter().flat_map(of).collect()
    }

    /// The event that gives a wildcard subscription its cursor on a topic, from the oldest message on; `None` where no
    /// cursor is free.
    pub(crate) fn cursor_for(&self, wildcard: u64, topic: u64, footprint: Footprint) -> Option<Event> {
        let (entry, on) = (self.wildcards.get(&wildcard)?, self.topics.get(&topic)?);
        let (cursor, reads) = (on.free_cursor()?, entry.wants(self, on)?);
        Some(entry.cursor_on(wildcard, &on.info, cursor, StartAt::Oldest, reads, footprint))
    }

    pub(super) fn open_wildcard(&mut self, wildcard: u64, entry: WildcardEntry) {
        self.next_wildcard = self.next_wildcard.max(wildcard + 1);
        self.hold(entry.incarnation, HandleRef::Wildcard { wildcard });
        self.wildcards.insert(wildcard, entry);
    }

    /// Ends a wildcard subscription with all its cursors; its owner.
    pub(super) fn close_wildcard(&mut self, wildcard: u64) -> Option<u64> {
        self.cursors_of_wildcard(wildcard).into_iter().for_each(|handle| self.close(handle));
        self.wildcards.remove(&wildcard).map(|entry| entry.incarnation)
    }

    pub(super) fn snapshot_wildcards(&self, events: &mut Vec<Event>) {
        for (&wildcard, entry) in &self.wildcards {
            let WildcardEntry { incarnation, pattern, schema, start, droppable, opened, notice } = entry.clone();
            // The cursors that follow count themselves.
            let opened = opened - self.cursors_of_wildcard(wildcard).len() as u64;
            events.push(Event::WildcardOpened { wildcard, incarnation, pattern, schema, start, droppable, opened });
            events.extend(notice.map(|inode| Event::NoticeKnown { wildcard, inode }));
        }
    }
}

impl WildcardEntry {
    fn cursor_on(
        &self,
        wildcard: u64,
        info: &TopicInfo,
        cursor: u32,
        start: StartAt,
        reads: Reads,
        footprint: Footprint,
    ) -> Event {
        let (topic, incarnation, droppable) = (info.id, self.incarnation, self.droppable);
        let (wildcard, own) = (Some(wildcard), (reads == Reads::Own).then(|| (footprint.cursors)(info)));
        Event::SubscriberOpened { topic, cursor, incarnation, start, droppable, wildcard, own }
    }
}

impl Decider<'_> {
    /// A subscription with its cursors on every topic there is.
    pub(super) fn open_wildcard(
        &self,
        pattern: &str,
        schema: Option<&Schema>,
        start: StartAt,
        droppable: bool,
    ) -> Result<Plan, Refusal> {
        checked(pattern)?;
        if matches!(start, StartAt::Sequence(_) | StartAt::Scan) {
            let problem = "a pattern of topics starts at latest, oldest or last:N".to_owned();
            return Err(Refusal::Options { topic: pattern.to_owned(), problem });
        }
        let mine = self.state.wildcards.values().filter(|entry| entry.incarnation == self.incarnation).count();
        if mine >= self.limits.wildcards {
            let what = "wildcard subscriptions of one process".to_owned();
            return Err(Refusal::Limit { what, limit: self.limits.wildcards as u64, mend: "close some".to_owned() });
        }
        let (wildcard, incarnation) = (self.state.next_wildcard, self.incarnation);
        let (pattern, schema) = (pattern.to_owned(), schema.cloned());
        let entry = WildcardEntry { incarnation, pattern, schema, start, droppable, opened: 0, notice: None };
        let mut cursors = Vec::new();
        let wanted = self.state.topics.values();
        for (topic, reads) in wanted.filter_map(|topic| Some((topic, entry.wants(self.state, topic)?))) {
            let free = topic.free_cursor().ok_or_else(|| too_many("subscribers", topic, topic.max_subscribers()))?;
            cursors.push(entry.cursor_on(wildcard, &topic.info, free, start, reads, self.footprint));
        }
        self.check_handles_of(incarnation, cursors.len() + 1)?;
        self.check_own_cursors(&entry.pattern, self.uid, &cursors)?;
        let WildcardEntry { incarnation, pattern, schema, start, droppable, opened, .. } = entry;
        let mut events =
            vec![Event::WildcardOpened { wildcard, incarnation, pattern, schema, start, droppable, opened }];
        events.append(&mut cursors);
        Ok(Plan { events, reply: Reply::Wildcard { wildcard } })
    }

    /// The cursors that wildcard subscriptions take on a topic that is about to be created: from its first message on.
    pub(super) fn wildcard_cursors(&self, new: &TopicEntry) -> Result<Vec<Event>, Refusal> {
        let info = &new.info;
        let mut events = Vec::new();
        let mut taken: BTreeMap<u64, usize> = BTreeMap::new();
        let wanting = self.state.wildcards.iter();
        let wanting = wanting.filter_map(|(wildcard, entry)| Some((*wildcard, entry, entry.wants(self.state, new)?)));
        for (wildcard, entry, reads) in wanting {
            let cursor = events.len() as u32;
            let of_owner = taken.entry(entry.incarnation).or_default();
            let room = self.check_place(info, cursor, entry.incarnation, *of_owner + 1);
            match room {
                // Who may only subscribe does not prevent a topic of others.
                Err(_) if reads == Reads::Own => continue,
                other => other?,
            }
            *of_owner += 1;
            events.push(entry.cursor_on(wildcard, info, cursor, StartAt::Oldest, reads, self.footprint));
        }
        Ok(events)
    }

    /// Whether a topic that is about to be created has this cursor, and a wildcard's owner may have `more` handles.
    fn check_place(&self, info: &TopicInfo, cursor: u32, owner: u64, more: usize) -> Result<(), Refusal> {
        if cursor >= info.options.max_subscribers {
            let what = format!("subscribers of topic {:?}", info.name);
            let mend = "more wildcard subscriptions stand for it: create it for more".to_owned();
            return Err(Refusal::Limit { what, limit: info.options.max_subscribers.into(), mend });
        }
        self.check_handles_of(owner, more)
    }
}

fn checked(pattern: &str) -> Result<(), Refusal> {
    check_pattern(pattern).map_err(|source| {
        let shown = pattern.char_indices().take_while(|(at, _)| *at < SHOWN_NAME_BYTES).map(|(_, c)| c).collect();
        Refusal::Name { name: shown, source }
    })
}
