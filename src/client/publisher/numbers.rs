//! Numbered messages: each published once, whatever its publisher knows.

use super::port::Port;
use super::{Publisher, PublisherCore};
use crate::client::write::WritePort;
use crate::error::PublishError;
use crate::ring::sequence::Sequence;
use crate::topic::Payload;

impl<T: Payload + ?Sized> Publisher<T> {
    /// Publishes the message with this number, once: a publisher under a name ([`Bus::publisher_as`](crate::Bus::publisher_as)) that does not know how
    /// far it came asks [`Self::last_number`], or tries again from wherever it likes.
    ///
    /// Numbers are dense and begin with 1. Without a name they count this handle's messages.
    ///
    /// # Errors
    /// [`PublishError::Duplicate`] for a number that has been published, [`PublishError::NumberGap`] for one that
    /// is not the next; otherwise as [`Self::publish`].
    pub fn publish_numbered(&mut self, payload: &T, number: u64) -> Result<Sequence, PublishError> {
        self.core.check_numbers(number, 1)?;
        self.publish(payload)
    }

    /// Publishes a batch ([`Self::publish_batch`]) whose messages have the numbers from `first` on, once: the batch of a
    /// publisher that was killed between its commit and the answer is given again as it was.
    ///
    /// # Errors
    /// [`PublishError::Duplicate`] where all of its numbers have been published, with the sequence of the first (the others
    /// follow it if they were one batch then too); [`PublishError::NumberGap`] where `first` is above the next number;
    /// [`PublishError::BatchOverlap`] where some of its numbers have been published and some have not, which only a batch
    /// that is cut differently can meet; otherwise as [`Self::publish_batch`]. Nothing of it is published then.
    pub fn publish_batch_numbered<'a>(
        &mut self,
        payloads: impl IntoIterator<Item = &'a T>,
        first: u64,
    ) -> Result<Sequence, PublishError>
    where
        T: 'a,
    {
        let batch: Vec<&[u8]> = payloads.into_iter().map(|payload| payload.as_bytes()).collect();
        // What could never have been published is no duplicate.
        self.core.check_batch(batch.iter().map(|payload| payload.len()))?;
        self.core.check_numbers(first, batch.len() as u64)?;
        self.core.publish_batch(&batch)
    }

    /// Under a name: the number of the message that was published last under it, 0 for none. `None` without a name.
    pub fn last_number(&self) -> Option<u64> {
        self.core.named.then(|| self.core.last_number())
    }
}

impl PublisherCore {
    /// The number of the message published last.
    fn last_number(&self) -> u64 {
        self.before + with_port!(&self.port, port => port.published())
    }

    /// Whether `count` messages, numbered from `number` on, come next. A batch is committed whole, so a retry of it finds
    /// all of its numbers published or none; any other overlap is a batch cut differently.
    fn check_numbers(&mut self, number: u64, count: u64) -> Result<(), PublishError> {
        self.check_home()?;
        let last = self.last_number();
        let expected = last + 1;
        if number == expected {
            return Ok(());
        }
        if number == 0 || number > last {
            return Err(PublishError::NumberGap { expected, found: number });
        }
        if expected - number < count {
            return Err(PublishError::BatchOverlap { expected, found: number });
        }
        let (port, id) = (&mut self.port, self.id);
        let sequence = self.runs.sequence_of(number, last, || with_port!(port, port => port.runs_of(id)));
        Err(PublishError::Duplicate { sequence: sequence.map(Sequence::new) })
    }
}
