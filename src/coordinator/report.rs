//! What the coordinator tells `shmbus doctor` of its bus.

use super::Estate;
use crate::coordinator::protocol::{BlockedTopic, BusReport, ParticipantStatus};
use crate::coordinator::state::TopicEntry;
use crate::topic::{Full, Mode};

/// Blocked topics that are named, at most; a page is a packet.
const MAX_BLOCKED: usize = 64;

impl Estate {
    /// The bus as it is now.
    pub(crate) fn report(&self, keeper_pid: Option<u32>, is_connected: impl Fn(u64) -> bool) -> BusReport {
        let participants = self.state().participants().iter().map(|(&incarnation, participant)| ParticipantStatus {
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
            blocked: self.state().topics().values().filter_map(|t| self.blocked(t)).take(MAX_BLOCKED).collect(),
        }
    }

    /// Who holds a full ring, if the topic has one.
    fn blocked(&self, entry: &TopicEntry) -> Option<BlockedTopic> {
        let memory = self.memories.get(&entry.info.id)?;
        let options = &entry.info.options;
        if options.full == Full::Overwrite {
            return None;
        }
        let gating = entry.subscribers.iter().filter(|(_, subscriber)| !subscriber.droppable);
        let places = gating.map(|(&cursor, subscriber)| (memory.cursor_sequence(cursor), cursor, subscriber));
        let (sequence, cursor, holder) = places.min_by_key(|(sequence, cursor, _)| (*sequence, *cursor))?;
        let lag = memory.range().ok()?.1.saturating_sub(sequence);
        // A publisher that spins leaves no mark, so a ring that holds all it promises counts as well.
        let is_full = memory.is_waited_for() || lag >= options.messages;
        (is_full && lag > 0).then(|| BlockedTopic {
            topic: entry.info.name.clone(),
            channel: options.mode == Mode::Channel,
            cursor,
            pid: self.state().participant(holder.incarnation).map_or(0, |participant| participant.pid),
            sequence,
            lag,
        })
    }
}
