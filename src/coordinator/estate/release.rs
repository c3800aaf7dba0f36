//! Taking handles out of force, and settling what publishers committed last.

use std::collections::{BTreeMap, BTreeSet};

use super::Estate;
use crate::coordinator::protocol::{HandleRef, StartAt};
use crate::coordinator::state::{Event, SubscriberEntry};
use crate::error::Refusal;
use crate::ring::ledger::Owners;

/// Words of ledgers that are walked before others have their turn: the longest window.
const WORDS_AT_ONCE: u64 = 1 << 20;

impl Estate {
    /// Stops a publisher by the log itself and settles its identity. Idempotent: twice leaves one more hole.
    pub(super) fn fence(&mut self, topic: u64, slot: u32) -> Result<(), Refusal> {
        let opening = self.entry(topic)?.publishers.get(&slot).map(|publisher| publisher.opening);
        if let Some(opening) = opening {
            self.memory(topic)?.fence(slot, opening)?;
        }
        self.settle_identity(topic, slot)
    }

    /// Writes down what a publisher that commits nothing any more has committed last.
    fn settle_identity(&mut self, topic: u64, slot: u32) -> Result<(), Refusal> {
        match self.settled_number(topic, slot) {
            Ok(Some(last_number)) => self.carry_out(Event::IdentitySettled { topic, slot, last_number }),
            Ok(None) => Ok(()),
            // The number stays what it was: nobody else is to suffer for one garbled topic.
            Err(error) => {
                eprintln!("shmbus coordinator: the last number of publisher slot {slot} of topic {topic}: {error}");
                Ok(())
            }
        }
    }

    fn settled_number(&self, topic: u64, slot: u32) -> Result<Option<u64>, Refusal> {
        let entry = self.entry(topic)?;
        let Some(publisher) = entry.publishers.get(&slot).filter(|publisher| publisher.identity.is_some()) else {
            return Ok(None);
        };
        // Where its line never came into force, nothing was published under it.
        Ok(self.memory(topic)?.last_number(slot, publisher)?.or(entry.number_before(publisher)))
    }

    /// Takes handles out of force in memory, consumers first: those of one group together. Idempotent. Fails only where the
    /// registry cannot be written.
    pub(super) fn release_all(&mut self, mut handles: BTreeSet<HandleRef>) -> Result<(), Refusal> {
        let consumers = self.release_consumers_among(&handles);
        handles.retain(|handle| !consumers.contains(handle));
        handles.into_iter().try_for_each(|handle| self.release(handle))
    }

    /// From now on others have had their turn.
    pub(crate) fn begin_round(&mut self) {
        self.walked = 0;
    }

    /// Whether so much was done in this round that the rest is for the next.
    pub(crate) fn has_done_its_part(&self) -> bool {
        self.walked >= WORDS_AT_ONCE
    }

    /// Closes some of the consumers among these handles, where all of them would take too long at once, or others have used up
    /// this round: those of so many groups as one may wait for. Whether to come again for the others.
    pub(crate) fn close_in_part(&mut self, handles: impl IntoIterator<Item = HandleRef>) -> Result<bool, Refusal> {
        let mut groups: BTreeMap<_, Vec<HandleRef>> = BTreeMap::new();
        for handle in handles {
            if let HandleRef::Consumer { topic, group, .. } = handle {
                groups.entry((topic, group)).or_default().push(handle);
            }
        }
        let mut closed = Vec::new();
        // What such a consumer had finished is looked for in all topics.
        let least = self.state.topics().len() as u64;
        for ((topic, group), consumers) in groups {
            if self.has_done_its_part() {
                let events = closed.into_iter().map(|handle| Event::Closed { handle });
                return self.carry_out_all(events.collect()).map(|()| true);
            }
            let entry = self.state.topic(topic).zip(self.state.group(topic, group));
            let words = entry.map_or(0, |(topic, group)| group.info.options.window_words(topic.info.options.messages));
            self.walked += words.max(least);
            closed.extend(consumers);
        }
        Ok(false)
    }

    /// Takes the consumers among these handles out of force, and returns them.
    pub(super) fn release_consumers_among(&self, handles: &BTreeSet<HandleRef>) -> BTreeSet<HandleRef> {
        let (mut groups, mut released) = (BTreeMap::<_, Owners>::new(), BTreeSet::new());
        for handle in handles {
            if let HandleRef::Consumer { topic, group, consumer } = *handle {
                // The state gives numbers below the ledger's limit only.
                groups.entry((topic, group)).or_default().insert(consumer as u8);
                released.insert(*handle);
            }
        }
        groups.iter().for_each(|((topic, group), consumers)| self.release_consumers(*topic, *group, consumers));
        released
    }

    /// Takes a handle out of force in memory. Idempotent. Fails only where the registry cannot be written.
    pub(super) fn release(&mut self, handle: HandleRef) -> Result<(), Refusal> {
        match handle {
            HandleRef::Publisher { topic, slot } => {
                // Before the slot can be anybody else's.
                self.settle_identity(topic, slot)?;
                let ended = self.memory(topic).and_then(|memory| memory.end_publisher(slot));
                if let Err(error) = ended {
                    eprintln!("shmbus coordinator: repairing after publisher slot {slot} of topic {topic}: {error}");
                }
            }
            HandleRef::Consumer { topic, group, consumer } => {
                self.release_consumers(topic, group, &Owners::from_iter([consumer as u8]));
            }
            HandleRef::Subscriber { topic, cursor } => {
                if let Ok(memory) = self.memory(topic) {
                    let entry = self.entry(topic).ok().and_then(|entry| entry.subscribers.get(&cursor));
                    // Who is droppable holds nothing, and so has nothing to release.
                    let holds = |entry: &SubscriberEntry| !entry.droppable && entry.own.is_none();
                    let from_oldest = entry.is_some_and(|entry| entry.start == StartAt::Oldest && holds(entry));
                    memory.leave(cursor, from_oldest);
                }
                if let Some(memory) = self.memories.get_mut(&topic) {
                    memory.drop_own_cursors(cursor);
                }
            }
            // Its cursors are handles of their own.
            HandleRef::Wildcard { .. } => {}
        }
        Ok(())
    }
}
