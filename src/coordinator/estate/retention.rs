//! Giving up messages that nobody holds: when they have grown too old, and on request.

use std::time::{Duration, Instant};

use super::Estate;
use crate::coordinator::protocol::Purged;
use crate::coordinator::state::GroupEntry;
use crate::error::Refusal;

/// How often, at most and at least, topics are looked at whose messages are given up by age.
const MIN_AGE_LOOK: Duration = Duration::from_millis(100);
const MAX_AGE_LOOK: Duration = Duration::from_secs(10);

impl Estate {
    /// How long what has grown too old may stay: until the clock is looked at next. `None` while there is no such topic.
    pub(crate) fn age_look(&self) -> Option<Duration> {
        let ages = self.ageing.iter().filter_map(|topic| self.state.topic(*topic));
        ages.map(|entry| Duration::from_millis(entry.info.options.max_age_ms / 10).clamp(MIN_AGE_LOOK, MAX_AGE_LOOK))
            .min()
    }

    /// Gives up what has grown too old and nobody holds, until `time` is up. Whether that was all.
    pub(crate) fn give_up_old(&mut self, time: Duration) -> bool {
        let end = Instant::now() + time;
        self.ageing.retain(|topic| self.memories.contains_key(topic));
        if self.rest.ageing.is_empty() {
            self.rest.ageing.clone_from(&self.ageing);
        }
        while let Some(topic) = self.rest.ageing.pop() {
            if let Err(error) = self.give_up_old_of(topic) {
                eprintln!("shmbus coordinator: giving up old messages: {error}");
            }
            if Instant::now() >= end {
                break;
            }
        }
        self.rest.ageing.is_empty()
    }

    fn give_up_old_of(&self, topic: u64) -> Result<(), Refusal> {
        let (Ok(entry), Ok(memory)) = (self.entry(topic), self.memory(topic)) else { return Ok(()) };
        // With every slot taken it waits for one; what is too old then goes when the ring needs the room.
        entry.spare_checkpoint().map_or(Ok(()), |checkpoint| memory.give_up_old(checkpoint))
    }

    /// Gives up what nobody holds.
    pub(super) fn purge(&self, topic: u64) -> Result<Purged, Refusal> {
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
}
