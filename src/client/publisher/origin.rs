//! [`OriginPublisher`]: publishing for messages of a group.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::PublisherCore;
use super::port::Port;
use crate::client::control::Control;
use crate::client::envelope::Envelope;
use crate::client::write::WritePort;
use crate::coordinator::protocol::{Identity, input_number};
use crate::error::{OpenError, PublishError};
use crate::ring::sequence::Sequence;
use crate::topic::TopicOptions;

/// Publishes what belongs to messages of a group: outputs of a pipeline, dead letters. For each it leaves a note that says
/// which message was finished last, whatever dies, so that the coordinator can tell (ARCHITECTURE.md §4.9).
pub(crate) struct OriginPublisher {
    core: PublisherCore,
}

impl OriginPublisher {
    /// Opens it for a consumer of a group; the topic is created with these options where it does not exist.
    pub(crate) fn open(
        control: &Arc<Control>,
        topic: &str,
        options: TopicOptions,
        origin: Identity,
    ) -> Result<OriginPublisher, OpenError> {
        Ok(OriginPublisher { core: PublisherCore::open(control, topic, options, true, Some(origin), |_| Ok(()))? })
    }

    /// Publishes everything that belongs to the message `input`, all or nothing, waiting for room until `deadline`.
    pub(crate) fn publish(
        &mut self,
        input: u64,
        batch: &[(&[u8], &Envelope)],
        deadline: Instant,
    ) -> Result<Sequence, PublishError> {
        with_port!(&mut self.core.port, port => port.note_as(input_number(input)));
        self.core.publish_sealed_batch(batch, Some(deadline))
    }

    /// After [`PublishError::Duplicate`]: leaves out what has an id that is on the topic already, or earlier in the batch.
    pub(crate) fn leave_out_repeated(&self, batch: &mut Vec<(&[u8], &Envelope)>) {
        let mut ids = HashSet::new();
        let is_there = |id: &[u8]| with_port!(&self.core.port, port => port.has_id(id));
        batch.retain(|(_, envelope)| {
            let id = envelope.id_bytes();
            id.is_empty() || !is_there(id) && ids.insert(id)
        });
    }

    /// The options the topic was created with.
    pub(crate) fn options(&self) -> &TopicOptions {
        &self.core.options
    }
}
