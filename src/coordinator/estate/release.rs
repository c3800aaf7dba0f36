//! Taking handles out of force, and settling what publishers committed last.

use super::Estate;
use crate::coordinator::estate::groups::ConsumerRef;
use crate::coordinator::protocol::{HandleRef, StartAt};
use crate::coordinator::state::{Event, SubscriberEntry};
use crate::error::Refusal;

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
                self.release_consumer(ConsumerRef { topic, group, consumer });
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
