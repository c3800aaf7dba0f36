//! What participants are answered, and what is pushed to them.

use std::collections::BTreeSet;
use std::time::Instant;

use super::{Estate, FOOTPRINT, Granted, broken, system};
use crate::coordinator::connection::Push;
use crate::coordinator::estate::groups::ConsumerRef;
use crate::coordinator::limits::MAX_PAGE_NAMES;
use crate::coordinator::memory::{Joined, LedgerCount};
use crate::coordinator::protocol::{
    Answer, HandleRef, MAX_PACKET_BYTES, PROTOCOL_VERSION, PublisherStatus, Request, SegmentRef, SubscriberStatus,
    TopicStatus,
};
use crate::coordinator::state::{Reply, TopicEntry};
use crate::error::Refusal;
use crate::topic::Mode;

/// Part of a packet that the topics of one status page may fill.
const STATUS_BYTES: usize = MAX_PACKET_BYTES * 3 / 4;

/// Words of ledgers that are looked at for one status page: who asks comes back for the rest, and others are served in between.
/// A topic that has more is counted piece by piece before it is answered.
const STATUS_WORDS: u64 = 1 << 18;

impl Estate {
    pub(super) fn granted(&mut self, reply: Reply) -> Result<Granted, Refusal> {
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
            Reply::Status { topics, more } => Ok((self.status(&topics, more, Instant::now()), Vec::new())),
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

    /// The groups whose ledgers are to be counted before this is answered, since it takes long, and have not been since then.
    pub(crate) fn to_count(&self, incarnation: u64, request: &Request, since: Instant) -> Vec<(u64, u32)> {
        let groups = match request {
            Request::Status { .. } => self.groups_of_status(incarnation, request).unwrap_or_default(),
            Request::Report => self.blocking_groups(incarnation),
            _ => return Vec::new(),
        };
        let words = |(topic, group): &(u64, u32)| self.memory(*topic).map_or(0, |memory| memory.window_words(*group));
        if groups.iter().map(words).sum::<u64>() <= STATUS_WORDS {
            return Vec::new();
        }
        groups.into_iter().filter(|(topic, group)| self.counted_since(*topic, *group, since).is_none()).collect()
    }

    /// The groups of a status' first topic: the others of its page are short.
    fn groups_of_status(&self, incarnation: u64, request: &Request) -> Option<Vec<(u64, u32)>> {
        let plan = self.state.request(&self.limits, FOOTPRINT, incarnation, request).ok()?;
        let Reply::Status { topics, .. } = plan.reply else { return None };
        let first = self.state.topic(*topics.first()?)?;
        Some(first.living_groups().map(|group| (first.info.id, group.info.id)).collect())
    }

    /// Counts these ledgers, until `end`.
    pub(crate) fn count_ahead(&mut self, groups: &mut Vec<(u64, u32)>, end: Instant) {
        while let Some((topic, group)) = groups.pop() {
            let at = Instant::now();
            let count = self.memory(topic).ok().and_then(|memory| memory.count_ledger(group)).unwrap_or_default();
            self.counted.insert((topic, group), (at, count));
            if Instant::now() >= end {
                break;
            }
        }
    }

    /// A status for which all was counted.
    pub(crate) fn counted_status(
        &self,
        incarnation: u64,
        request: &Request,
        since: Instant,
    ) -> Result<Answer, Refusal> {
        match self.state.request(&self.limits, FOOTPRINT, incarnation, request)?.reply {
            Reply::Status { topics, more } => Ok(self.status(&topics, more, since)),
            _ => Err(broken("the status of something else")),
        }
    }

    pub(crate) fn counted_since(&self, topic: u64, group: u32, since: Instant) -> Option<&LedgerCount> {
        self.counted.get(&(topic, group)).filter(|(at, _)| *at >= since).map(|(_, count)| count)
    }

    /// Nobody waits for what was counted.
    pub(crate) fn forget_counts(&mut self) {
        self.counted.clear();
    }

    /// As many topics as fit in a packet and are counted soon, at least one. What was counted `since` then is not counted again.
    fn status(&self, topics: &[u64], more: bool, since: Instant) -> Answer {
        let (mut page, mut bytes, mut words) = (Vec::new(), 0, 0);
        for entry in topics.iter().filter_map(|topic| self.state.topic(*topic)) {
            words += self.window_words(entry);
            if words > STATUS_WORDS && !page.is_empty() {
                return Answer::Status { topics: page, more: true };
            }
            let status = self.topic_status(entry, since);
            bytes += postcard::to_stdvec(&status).map_or(0, |encoded| encoded.len());
            if bytes > STATUS_BYTES && !page.is_empty() {
                return Answer::Status { topics: page, more: true };
            }
            page.push(status);
        }
        Answer::Status { topics: page, more }
    }

    fn topic_status(&self, entry: &TopicEntry, since: Instant) -> TopicStatus {
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
            groups: self.group_statuses(entry, tail, since),
            subscribers: subscribers
                .map(|(&cursor, s)| {
                    let sequence = memory.map_or(0, |memory| memory.cursor_sequence(cursor));
                    let lag = tail.saturating_sub(sequence);
                    SubscriberStatus { cursor, pid: self.pid_of(s.incarnation), sequence, lag, droppable: s.droppable }
                })
                .collect(),
        }
    }

    /// A participant's process; 0 where it has left.
    pub(super) fn pid_of(&self, incarnation: u64) -> u32 {
        self.state.participant(incarnation).map_or(0, |participant| participant.pid)
    }

    /// Every arena that a returning participant must know: of each topic whose readers it is among ([`TopicEntry::readers`]).
    pub(crate) fn arenas_for(&self, incarnation: u64) -> Vec<(u64, u32)> {
        let many = |topic: &u64| self.state.topic(*topic).filter(|entry| entry.info.options.mode == Mode::Many);
        let read = |handle: &HandleRef| match handle {
            HandleRef::Subscriber { topic, .. } | HandleRef::Consumer { topic, .. } => Some(*topic),
            HandleRef::Publisher { topic, .. } => many(topic).filter(|entry| entry.info.options.dedup).map(|_| *topic),
            HandleRef::Wildcard { .. } => None,
        };
        let topics: BTreeSet<u64> = self.state.handles_of(incarnation).iter().filter_map(read).collect();
        let arenas = |entry: &TopicEntry| entry.arenas.iter().map(|slot| (entry.info.id, *slot)).collect::<Vec<_>>();
        topics.iter().filter_map(many).flat_map(arenas).collect()
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
}
