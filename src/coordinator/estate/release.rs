//! Taking handles out of force, and settling what publishers committed last.

use std::collections::{BTreeMap, BTreeSet};

use super::Estate;
use super::rounds::{HANDLE_WORDS, SEGMENT_WORDS};
use crate::coordinator::protocol::{HandleRef, StartAt};
use crate::coordinator::state::{Event, SubscriberEntry};
use crate::error::Refusal;
use crate::ring::ledger::Owners;

/// Publishers and subscribers that are closed at once, whatever others have used up: to come again would take as long.
const FEW_HANDLES: usize = 8;

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

    /// Releases some of what a participant has, where all of it would take too long at once, or others have used up this round.
    /// Whether to come again for the rest.
    pub(crate) fn release_in_part(&mut self, incarnation: u64) -> Result<bool, Refusal> {
        for topic in self.state.topics_of(incarnation) {
            if self.has_done_its_part() {
                return Ok(true);
            }
            self.count_work(SEGMENT_WORDS * self.entry(topic)?.segments() as u64);
            self.carry_out(Event::TopicRemoved { topic })?;
        }
        self.close_in_part(self.state.handles_of(incarnation))
    }

    /// Closes some of these handles, where all of them would take too long at once, or others have used up this round: the
    /// consumers of one group together. Whether to come again for the others.
    pub(crate) fn close_in_part(&mut self, handles: impl IntoIterator<Item = HandleRef>) -> Result<bool, Refusal> {
        let (mut groups, mut others) = (BTreeMap::<_, Vec<HandleRef>>::new(), Vec::new());
        for handle in handles {
            match handle {
                HandleRef::Consumer { topic, group, .. } => groups.entry((topic, group)).or_default().push(handle),
                HandleRef::Publisher { .. } | HandleRef::Subscriber { .. } => others.push(handle),
                // It goes last: its cursors are handles of their own.
                HandleRef::Wildcard { .. } => {}
            }
        }
        if groups.is_empty() && others.len() <= FEW_HANDLES {
            self.count_work(others.len() as u64 * HANDLE_WORDS);
            return Ok(false);
        }
        let groups = groups.into_iter().map(|((topic, group), consumers)| (self.words_of(topic, group), consumers));
        let others = others.into_iter().map(|handle| (HANDLE_WORDS, vec![handle]));
        let works: Vec<_> = groups.chain(others).collect();
        let mut closed = Vec::new();
        for (words, handles) in works {
            if self.has_done_its_part() {
                let events = closed.into_iter().map(|handle| Event::Closed { handle });
                return self.carry_out_all(events.collect()).map(|()| true);
            }
            self.count_work(words);
            closed.extend(handles);
        }
        Ok(false)
    }

    /// What it takes to release consumers of a group. What they had finished is looked for in all topics.
    fn words_of(&self, topic: u64, group: u32) -> u64 {
        let entry = self.state.topic(topic).zip(self.state.group(topic, group));
        let words = entry.map_or(0, |(topic, group)| group.info.options.window_words(topic.info.options.messages));
        words.max(SEGMENT_WORDS).max(self.state.topics().len() as u64)
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
