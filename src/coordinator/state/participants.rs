//! Participants: who may join or come back, and what goes with who leaves.

use std::collections::BTreeSet;

use super::{Event, Plan, Reply, State};
use crate::coordinator::limits::Limits;
use crate::coordinator::protocol::HandleRef;
use crate::error::Refusal;

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

    /// What a participant's end takes: the topics that go with it, then itself.
    pub(crate) fn leave(&self, incarnation: u64) -> Vec<Event> {
        let removed = self.topics_of(incarnation).into_iter().map(|topic| Event::TopicRemoved { topic });
        removed.chain([Event::Left { incarnation }]).collect()
    }

    /// The topics that go with a participant.
    pub(crate) fn topics_of(&self, incarnation: u64) -> Vec<u64> {
        let owned = self.topics.iter().filter(|(_, entry)| entry.owner == Some(incarnation));
        owned.map(|(&topic, _)| topic).collect()
    }
}
