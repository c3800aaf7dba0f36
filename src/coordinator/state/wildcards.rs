//! Wildcard subscriptions: which topics they have, and the cursors that a new topic or a new subscription takes.

use std::collections::{BTreeMap, VecDeque};

use super::access::Reads;
use super::handles::too_many;
use super::topics::{SHOWN_NAME_BYTES, check_schema, check_schema_len};
use super::{AsideOf, Decider, Event, Footprint, Plan, Reply, State, TopicEntry};
use crate::coordinator::limits::Limits;
use crate::coordinator::protocol::{HandleRef, StartAt, TopicInfo};
use crate::error::Refusal;
use crate::pattern::{check_pattern, matches};
use crate::shm::notice;
use crate::topic::{Mode, Schema};

/// Topics that a subscription has missed and that it is told of by name, should it have been away.
const MAX_MISSED: usize = 64;

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
    /// The last of the topics that it was to have and has not.
    pub(crate) missed: VecDeque<Missed>,
}

/// A topic that a wildcard subscription was to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Missed {
    /// Its place among the topics that the subscription has been told of.
    pub(crate) number: u64,
    pub(crate) topic: u64,
    pub(crate) name: String,
    pub(crate) why: Refusal,
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

    pub(super) fn miss(&mut self, number: Option<u64>, topic: u64, name: &str, why: &Refusal) {
        let number = number.unwrap_or(self.opened + 1);
        self.opened = self.opened.max(number);
        self.missed.push_back(Missed { number, topic, name: name.to_owned(), why: why.clone() });
        if self.missed.len() > MAX_MISSED {
            self.missed.pop_front();
        }
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
            let told = |topic: &TopicEntry| entry.missed.iter().any(|missed| missed.topic == topic.info.id);
            let wanted = self.topics.values().filter(|t| t.publishers_seen == 0 && wants(t) && !told(t));
            wanted.filter(|topic| lacks(topic, wildcard)).map(|topic| (wildcard, topic.info.id)).collect::<Vec<_>>()
        };
        self.wildcards.iter().flat_map(of).collect()
    }

    /// The event that gives a wildcard subscription its cursor on a topic, or says that it misses the topic because no cursor is
    /// free; `None` where it is not to have it.
    pub(crate) fn cursor_for(&self, wildcard: u64, topic: u64, start: StartAt, footprint: Footprint) -> Option<Event> {
        let (entry, on) = (self.wildcards.get(&wildcard)?, self.topics.get(&topic)?);
        let reads = entry.wants(self, on)?;
        Some(match on.free_cursor() {
            Some(cursor) => entry.cursor_on(wildcard, &on.info, cursor, start, reads, footprint),
            None => missed_event(wildcard, &on.info, too_many("subscribers", on, on.max_subscribers())),
        })
    }

    /// The same for a subscription that is being opened, from where it asked to start. What is beyond its owner's limits by now is
    /// missed.
    pub(crate) fn cursor_at_opening(
        &self,
        limits: &Limits,
        footprint: Footprint,
        aside: AsideOf<'_>,
        wildcard: u64,
        topic: u64,
    ) -> Option<Event> {
        let (entry, on) = (self.wildcards.get(&wildcard)?, self.topics.get(&topic)?);
        let event = self.cursor_for(wildcard, topic, entry.start, footprint)?;
        let Event::SubscriberOpened { own, .. } = event else { return Some(event) };
        let (incarnation, uid) = (entry.incarnation, self.participants.get(&entry.incarnation)?.uid);
        let owner = Decider { state: self, limits, footprint, aside, incarnation, uid };
        let room = owner.check_handles_of(incarnation, 1);
        let room = room.and_then(|()| own.map_or(Ok(()), |bytes| owner.check_own(&on.info.name, uid, 1, bytes)));
        Some(room.map_or_else(|why| missed_event(wildcard, &on.info, why), |()| event))
    }

    pub(super) fn open_wildcard(&mut self, wildcard: u64, entry: WildcardEntry) {
        self.next_wildcard = self.next_wildcard.max(wildcard + 1);
        self.hold(entry.incarnation, HandleRef::Wildcard { wildcard });
        if let Some(uid) = self.participants.get(&entry.incarnation).map(|who| who.uid) {
            self.count_segment(uid, notice::LEN_BYTES, true);
        }
        self.wildcards.insert(wildcard, entry);
    }

    /// Ends a wildcard subscription with all its cursors; its owner.
    pub(super) fn close_wildcard(&mut self, wildcard: u64) -> Option<u64> {
        self.cursors_of_wildcard(wildcard).into_iter().for_each(|handle| self.close(handle));
        let owner = self.wildcards.remove(&wildcard)?.incarnation;
        if let Some(uid) = self.participants.get(&owner).map(|who| who.uid) {
            self.count_segment(uid, notice::LEN_BYTES, false);
        }
        Some(owner)
    }

    pub(super) fn snapshot_wildcards(&self, events: &mut Vec<Event>) {
        let mut cursors: BTreeMap<u64, u64> = BTreeMap::new();
        let subscribers = self.topics.values().flat_map(|topic| topic.subscribers.values());
        subscribers.filter_map(|s| s.wildcard).for_each(|wildcard| *cursors.entry(wildcard).or_default() += 1);
        for (&wildcard, entry) in &self.wildcards {
            let WildcardEntry { incarnation, pattern, schema, start, droppable, opened, notice, .. } = entry.clone();
            // The cursors that follow count themselves.
            let opened = opened - cursors.get(&wildcard).copied().unwrap_or(0);
            events.push(Event::WildcardOpened { wildcard, incarnation, pattern, schema, start, droppable, opened });
            events.extend(notice.map(|inode| Event::NoticeKnown { wildcard, inode }));
        }
    }

    /// After the cursors: each of these has its number already.
    pub(super) fn snapshot_missed(&self, events: &mut Vec<Event>) {
        for (&wildcard, entry) in &self.wildcards {
            events.extend(entry.missed.iter().map(|missed| {
                let Missed { number, topic, name, why } = missed.clone();
                Event::WildcardMissed { wildcard, number: Some(number), topic, name, why }
            }));
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
        check_schema_len(schema).map_err(|problem| Refusal::Options { topic: pattern.to_owned(), problem })?;
        let mine = self.state.wildcards.values().filter(|entry| entry.incarnation == self.incarnation).count();
        if mine >= self.limits.wildcards {
            let what = "wildcard subscriptions of one process".to_owned();
            return Err(Refusal::Limit { what, limit: self.limits.wildcards as u64, mend: "close some".to_owned() });
        }
        let (wildcard, incarnation) = (self.state.next_wildcard, self.incarnation);
        let (pattern, schema) = (pattern.to_owned(), schema.cloned());
        let (opened, notice, missed) = (0, None, VecDeque::new());
        let entry = WildcardEntry { incarnation, pattern, schema, start, droppable, opened, notice, missed };
        let mut cursors = Vec::new();
        let wanted = self.state.topics.values();
        for (topic, reads) in wanted.filter_map(|topic| Some((topic, entry.wants(self.state, topic)?))) {
            // What others have filled is missed, and said; it does not keep the rest from anybody.
            cursors.push(match topic.free_cursor() {
                Some(free) => entry.cursor_on(wildcard, &topic.info, free, start, reads, self.footprint),
                None => missed_event(wildcard, &topic.info, too_many("subscribers", topic, topic.max_subscribers())),
            });
        }
        self.check_handles_of(incarnation, cursors.len() + 1)?;
        let own = cursors.iter().filter_map(|event| match event {
            Event::SubscriberOpened { own, .. } => *own,
            _ => None,
        });
        let (segments, bytes) = own.fold((1, notice::LEN_BYTES), |(count, sum), bytes| (count + 1, sum + bytes));
        self.check_own(&entry.pattern, self.uid, segments, bytes)?;
        let WildcardEntry { incarnation, pattern, schema, start, droppable, opened, .. } = entry;
        let mut events =
            vec![Event::WildcardOpened { wildcard, incarnation, pattern, schema, start, droppable, opened }];
        events.append(&mut cursors);
        Ok(Plan { events, reply: Reply::Wildcard { wildcard } })
    }

    /// The cursors that wildcard subscriptions take on a topic that is about to be created: from its first message on. Whoever
    /// has no room for one misses the topic, and is told; its creator has nothing to do with that.
    pub(super) fn wildcard_cursors(&self, new: &TopicEntry) -> Vec<Event> {
        let info = &new.info;
        let mut events = Vec::new();
        let (mut by_owner, mut by_uid): (BTreeMap<u64, usize>, BTreeMap<u32, u64>) = Default::default();
        let wanting = self.state.wildcards.iter();
        let wanting = wanting.filter_map(|(wildcard, entry)| Some((*wildcard, entry, entry.wants(self.state, new)?)));
        let mut cursor = 0;
        for (wildcard, entry, reads) in wanting {
            let uid = self.state.participants.get(&entry.incarnation).map_or(self.uid, |owner| owner.uid);
            let handles = by_owner.get(&entry.incarnation).map_or(1, |taken| taken + 1);
            let own = by_uid.get(&uid).copied().unwrap_or(0) + u64::from(reads == Reads::Own);
            let room = self.check_cursor(info, cursor);
            let room = room.and_then(|()| self.check_handles_of(entry.incarnation, handles));
            match room.and_then(|()| self.check_own(&info.name, uid, own, own * (self.footprint.cursors)(info))) {
                Ok(()) => {
                    by_owner.insert(entry.incarnation, handles);
                    by_uid.insert(uid, own);
                    events.push(entry.cursor_on(wildcard, info, cursor, StartAt::Oldest, reads, self.footprint));
                    cursor += 1;
                }
                Err(why) => events.push(missed_event(wildcard, info, why)),
            }
        }
        events
    }

    /// Whether a topic that is about to be created has this cursor.
    fn check_cursor(&self, info: &TopicInfo, cursor: u32) -> Result<(), Refusal> {
        if cursor < info.options.max_subscribers {
            return Ok(());
        }
        let what = format!("subscribers of topic {:?}", info.name);
        let mend = "more wildcard subscriptions stand for it: create it for more".to_owned();
        Err(Refusal::Limit { what, limit: info.options.max_subscribers.into(), mend })
    }
}

/// A wildcard subscription does not get a topic.
pub(crate) fn missed_event(wildcard: u64, info: &TopicInfo, why: Refusal) -> Event {
    Event::WildcardMissed { wildcard, number: None, topic: info.id, name: info.name.clone(), why }
}

fn checked(pattern: &str) -> Result<(), Refusal> {
    check_pattern(pattern).map_err(|source| {
        let shown = pattern.char_indices().take_while(|(at, _)| *at < SHOWN_NAME_BYTES).map(|(_, c)| c).collect();
        Refusal::Name { name: shown, source }
    })
}
