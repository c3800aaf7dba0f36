//! Publishing several messages at once.

use std::time::Instant;

use super::port::Port;
use super::{Publisher, PublisherCore};
use crate::client::envelope::Envelope;
use crate::client::write::WritePort;
use crate::error::{EnvelopeError, PublishError};
use crate::ring::sequence::Sequence;
use crate::shm::layout::batch_envelopes_bytes;
use crate::topic::Payload;

impl<T: Payload + ?Sized> Publisher<T> {
    /// Publishes up to 1,024 messages, all or nothing and consecutively, for little more than the price of one.
    /// Returns the sequence of the first.
    ///
    /// # Errors
    /// [`PublishError::BatchSize`] for an empty batch or one that the ring could never hold; otherwise as
    /// [`Self::publish`].
    pub fn publish_batch<'a>(&mut self, payloads: impl IntoIterator<Item = &'a T>) -> Result<Sequence, PublishError>
    where
        T: 'a,
    {
        let batch: Vec<&[u8]> = payloads.into_iter().map(|payload| payload.as_bytes()).collect();
        self.core.publish_batch(&batch)
    }

    /// The same with an envelope for each message.
    ///
    /// # Errors
    /// As [`Self::publish_batch`] and [`Self::publish_with`].
    pub fn publish_batch_with<'a>(
        &mut self,
        messages: impl IntoIterator<Item = (&'a T, &'a Envelope)>,
    ) -> Result<Sequence, PublishError>
    where
        T: 'a,
    {
        let batch: Vec<(&[u8], &Envelope)> =
            messages.into_iter().map(|(payload, envelope)| (payload.as_bytes(), envelope)).collect();
        self.core.publish_sealed_batch(&batch, None)
    }
}

impl PublisherCore {
    /// Publishes payloads without envelopes of their own.
    pub(super) fn publish_batch(&mut self, batch: &[&[u8]]) -> Result<Sequence, PublishError> {
        if self.sealer.is_some() {
            let plain = Envelope::new();
            return self
                .publish_sealed_batch(&batch.iter().map(|payload| (*payload, &plain)).collect::<Vec<_>>(), None);
        }
        self.check_batch(batch.iter().map(|payload| payload.len()))?;
        self.publish_bodies(batch, None)
    }

    /// Publishes payloads in their envelopes; all get one timestamp.
    pub(super) fn publish_sealed_batch(
        &mut self,
        batch: &[(&[u8], &Envelope)],
        deadline: Option<Instant>,
    ) -> Result<Sequence, PublishError> {
        self.check_batch(batch.iter().map(|(payload, _)| payload.len()))?;
        let Some(sealer) = &mut self.sealer else {
            if batch.iter().any(|(_, envelope)| !envelope.is_empty()) {
                return Err(EnvelopeError::LeanTopic.into());
            }
            let payloads: Vec<&[u8]> = batch.iter().map(|(payload, _)| *payload).collect();
            return self.publish_bodies(&payloads, deadline);
        };
        let mut bodies = std::mem::take(&mut sealer.scratch);
        let ends = sealer.seal_batch(batch, &mut bodies);
        let outcome = ends.map_err(PublishError::from).and_then(|ends| {
            let found = bodies.len() as u64 - batch.iter().map(|(payload, _)| payload.len() as u64).sum::<u64>();
            let max = batch_envelopes_bytes(&self.options, batch.len() as u64);
            if found > max {
                return Err(EnvelopeError::Batch { found, max }.into());
            }
            let starts = std::iter::once(0).chain(ends.iter().copied());
            let bodies: Vec<&[u8]> = starts.zip(&ends).map(|(start, end)| &bodies[start..*end]).collect();
            self.publish_bodies(&bodies, deadline)
        });
        self.keep_scratch(bodies);
        outcome
    }

    /// Whether payloads of these lengths may be a batch.
    pub(super) fn check_batch(
        &self,
        lengths: impl ExactSizeIterator<Item = usize> + Clone,
    ) -> Result<(), PublishError> {
        let max = with_port!(&self.port, port => port.max_batch());
        let found = lengths.len();
        if found == 0 || found > max {
            return Err(PublishError::BatchSize { found, max });
        }
        let total: u64 = lengths.clone().map(|len| len as u64).sum();
        if total > self.options.bytes {
            return Err(PublishError::TooLarge { found: total, max: self.options.bytes });
        }
        lengths.into_iter().try_for_each(|len| self.check_len(len))
    }

    /// Publishes what goes into the ring, all or nothing.
    fn publish_bodies(&mut self, batch: &[&[u8]], deadline: Option<Instant>) -> Result<Sequence, PublishError> {
        self.check_gone()?;
        match with_port!(&mut self.port, port => port.publish_batch(batch)) {
            Ok(sequence) => Ok(Sequence::new(sequence)),
            Err(stop) => {
                let attempt = |port: &mut Port| with_port!(port, port => port.publish_batch(batch));
                self.wait_for(stop, deadline, attempt).map(Sequence::new)
            }
        }
    }
}
