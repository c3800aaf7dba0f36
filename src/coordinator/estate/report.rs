//! What the coordinator tells `shmbus doctor` of its bus.

use std::time::Instant;

use super::Estate;
use crate::coordinator::memory::LedgerCount;
use crate::coordinator::protocol::{BlockedTopic, BlockingGroup, BusReport, ParticipantStatus};
use crate::coordinator::state::{GroupEntry, TopicEntry};
use crate::topic::{Full, Mode};

/// Blocked topics that are named, at most; a page is a packet.
const MAX_BLOCKED: usize = 64;

impl Estate {
    /// The bus as it is now, as far as it is for the eyes of who `asks`: root and who runs the bus see everything, others their
    /// own processes and the topics on which they have a right.
    pub(crate) fn report(
        &self,
        asks: u64,
        since: Instant,
        keeper_pid: Option<u32>,
        is_connected: impl Fn(u64) -> bool,
    ) -> BusReport {
        let is_host = self.check_host(asks).is_ok();
        let me = self.state().participant(asks);
        let is_mine = |uid: u32| is_host || me.is_some_and(|me| me.uid == uid);
        let everybody = self.state().participants().iter().filter(|(_, participant)| is_mine(participant.uid));
        let participants = everybody.map(|(&incarnation, participant)| ParticipantStatus {
            incarnation,
            pid: participant.pid,
            uid: participant.uid,
            handles: participant.handles.len() as u32,
            connected: is_connected(incarnation),
        });
        BusReport {
            coordinator_pid: std::process::id(),
            keeper_pid,
            budget_bytes: self.limits().budget_bytes,
            most_reserved_bytes: self.state().most_reserved_bytes(),
            participants: participants.collect(),
            blocked: self.blocked_for(asks).map(|blocked| self.blocked_topic(&blocked, since)).collect(),
        }
    }

    /// The groups among those that hold full rings in this report.
    pub(super) fn blocking_groups(&self, asks: u64) -> Vec<(u64, u32)> {
        let group = |blocked: Blocked<'_>| match blocked.holder {
            Holder::Group(group) => Some((blocked.entry.info.id, group.info.id)),
            Holder::Subscriber(_) => None,
        };
        self.blocked_for(asks).filter_map(group).collect()
    }

    /// The full rings that one participant is told of.
    fn blocked_for(&self, asks: u64) -> impl Iterator<Item = Blocked<'_>> {
        let is_host = self.check_host(asks).is_ok();
        let me = self.state().participant(asks);
        let sees = move |entry: &&TopicEntry| is_host || me.is_some_and(|me| entry.is_seen_by(me));
        self.state().topics().values().filter(sees).filter_map(|entry| self.blocked(entry)).take(MAX_BLOCKED)
    }

    /// Who holds a full ring, if the topic has one.
    fn blocked<'a>(&'a self, entry: &'a TopicEntry) -> Option<Blocked<'a>> {
        let memory = self.memories.get(&entry.info.id)?;
        let options = &entry.info.options;
        if options.full == Full::Overwrite {
            return None;
        }
        let gating = entry.subscribers.iter().filter(|(_, subscriber)| !subscriber.droppable);
        let subscribers = gating.map(|(&cursor, subscriber)| (cursor, Holder::Subscriber(subscriber.incarnation)));
        let groups = entry.living_groups().map(|group| (group.info.cursor, Holder::Group(group)));
        let places = subscribers.chain(groups).map(|(cursor, holder)| (memory.cursor_sequence(cursor), cursor, holder));
        let (sequence, cursor, holder) = places.min_by_key(|(sequence, cursor, _)| (*sequence, *cursor))?;
        let lag = memory.range().ok()?.1.saturating_sub(sequence);
        // A publisher that spins leaves no mark, so a ring that holds all it promises counts as well.
        let is_full = memory.is_waited_for() || lag >= options.messages;
        (is_full && lag > 0).then_some(Blocked { entry, cursor, holder, sequence, lag })
    }

    fn blocked_topic(&self, blocked: &Blocked<'_>, since: Instant) -> BlockedTopic {
        let Blocked { entry, cursor, holder, sequence, lag } = *blocked;
        let group = match holder {
            Holder::Group(group) => Some(self.blocking_group(entry.info.id, group, since)),
            Holder::Subscriber(_) => None,
        };
        let pid = match holder {
            Holder::Subscriber(incarnation) => self.pid_of(incarnation),
            Holder::Group(_) => {
                group.as_ref().and_then(|group| group.oldest_lease.as_ref()).map_or(0, |lease| lease.pid)
            }
        };
        let (topic, channel) = (entry.info.name.clone(), entry.info.options.mode == Mode::Channel);
        BlockedTopic { topic, channel, cursor, pid, sequence, lag, group }
    }

    /// What was counted `since` then is not counted again.
    fn blocking_group(&self, topic: u64, group: &GroupEntry, since: Instant) -> BlockingGroup {
        let of = |count: &LedgerCount| BlockingGroup {
            name: group.info.name.clone(),
            consumers: group.consumers.len() as u32,
            moving: count.moving,
            oldest_lease: count.oldest.and_then(|seen| self.lease_status(group, seen)),
        };
        match self.counted_since(topic, group.info.id, since) {
            Some(count) => of(count),
            None => {
                of(&self.memory(topic).ok().and_then(|memory| memory.count_ledger(group.info.id)).unwrap_or_default())
            }
        }
    }
}

/// A full ring and who holds it.
struct Blocked<'a> {
    entry: &'a TopicEntry,
    cursor: u32,
    holder: Holder<'a>,
    sequence: u64,
    lag: u64,
}

/// Whose cursor it is.
#[derive(Clone, Copy)]
enum Holder<'a> {
    /// A participant's.
    Subscriber(u64),
    Group(&'a GroupEntry),
}
