//! Putting messages into envelopes.

use super::PublisherCore;
use crate::client::envelope::{self, Envelope};
use crate::coordinator::protocol::TopicInfo;
use crate::error::{EnvelopeError, PublishError};
use crate::ring::sequence::Sequence;

/// Puts messages into envelopes.
pub(super) struct Sealer {
    align: u64,
    pub(super) default_ttl_ms: u64,
    /// Where messages are put together; kept, so that publishing does not allocate.
    pub(super) scratch: Vec<u8>,
}

/// A sealer does not keep more memory than this for the next message.
const KEPT_SCRATCH_BYTES: usize = 1 << 20;

impl Sealer {
    pub(super) fn new(info: &TopicInfo) -> Option<Sealer> {
        let default_ttl_ms = info.options.ttl_ms;
        let sealer = || Sealer { align: info.batch_align(), default_ttl_ms, scratch: Vec::new() };
        info.options.envelope.then(sealer)
    }

    /// Puts a batch together in `bodies`; where each message ends.
    pub(super) fn seal_batch(
        &self,
        batch: &[(&[u8], &Envelope)],
        bodies: &mut Vec<u8>,
    ) -> Result<Vec<usize>, EnvelopeError> {
        bodies.clear();
        let now_ns = envelope::now_ns();
        let seal = |(payload, envelope): &(&[u8], &Envelope)| {
            self.seal(payload, envelope, now_ns, bodies)?;
            Ok(bodies.len())
        };
        batch.iter().map(seal).collect()
    }

    /// Appends envelope and payload to `body`.
    fn seal(&self, payload: &[u8], envelope: &Envelope, now_ns: u64, body: &mut Vec<u8>) -> Result<(), EnvelopeError> {
        envelope.seal(now_ns, self.default_ttl_ms, self.align, body)?;
        body.extend_from_slice(payload);
        Ok(())
    }
}

impl PublisherCore {
    /// Publishes a payload in an envelope with `publish`, which gets both in one piece.
    #[inline(never)]
    pub(super) fn publish_sealed(
        &mut self,
        payload: &[u8],
        envelope: &Envelope,
        publish: impl FnOnce(&mut Self, &[u8]) -> Result<Sequence, PublishError>,
    ) -> Result<Sequence, PublishError> {
        let Some(body) = self.seal(payload, envelope)? else { return publish(self, payload) };
        let outcome = publish(self, &body);
        self.keep_scratch(body);
        outcome
    }

    /// A payload in its envelope; `None`: the topic has none.
    pub(super) fn seal(&mut self, payload: &[u8], envelope: &Envelope) -> Result<Option<Vec<u8>>, PublishError> {
        let Some(sealer) = &mut self.sealer else {
            return if envelope.is_empty() { Ok(None) } else { Err(EnvelopeError::LeanTopic.into()) };
        };
        let mut body = std::mem::take(&mut sealer.scratch);
        body.clear();
        sealer.seal(payload, envelope, envelope::now_ns(), &mut body)?;
        Ok(Some(body))
    }

    /// Memory for the next message.
    pub(super) fn keep_scratch(&mut self, scratch: Vec<u8>) {
        if let Some(sealer) = &mut self.sealer
            && scratch.capacity() <= KEPT_SCRATCH_BYTES
        {
            sealer.scratch = scratch;
        }
    }
}
