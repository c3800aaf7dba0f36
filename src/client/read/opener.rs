//! What happens to a message of a topic with envelopes between the ring and the caller: its envelope is taken off, and
//! it is skipped if it has expired or was not asked for.

use std::collections::BTreeSet;
use std::ptr::NonNull;

use super::{BAD_LENGTH, Found, Lengths};
use crate::client::envelope::{EnvelopeView, Opened};
use crate::error::RecvError;
use crate::shm::topic::SharedInfo;

/// What a subscriber wants of what its cursor passes.
pub(crate) enum Wanted {
    /// Everything.
    All,
    /// Nothing before the first message published at this time (CLOCK_REALTIME, ns) or later.
    Since(u64),
    /// Below the sequence `until`, these sequences alone.
    Among { sequences: BTreeSet<u64>, until: u64 },
}

/// Opens envelopes.
pub(crate) struct Opener {
    align: u64,
    lengths: Lengths,
    opened: Opened,
    wanted: Wanted,
    /// Whether what has expired is wanted as well.
    with_expired: bool,
    expired: u64,
}

impl Opener {
    /// For a topic that has envelopes.
    pub(crate) fn new(info: &SharedInfo) -> Option<Self> {
        info.options.envelope.then(|| Opener {
            align: info.batch_align(),
            lengths: Lengths::of_payload(&info.options),
            opened: Opened::default(),
            wanted: Wanted::All,
            with_expired: false,
            expired: 0,
        })
    }

    pub(crate) fn want(&mut self, wanted: Wanted) {
        self.wanted = wanted;
    }

    /// Skips nothing because it has expired.
    pub(crate) fn want_expired(&mut self) {
        self.with_expired = true;
    }

    /// How many messages were skipped because they had expired.
    pub(crate) fn expired(&self) -> u64 {
        self.expired
    }

    /// The envelope of the message that was opened last.
    pub(crate) fn envelope(&self) -> EnvelopeView<'_> {
        self.opened.view()
    }

    /// Takes the envelope off the message just found; whether it is one for the caller.
    pub(crate) fn open(&mut self, found: &mut Found) -> Result<bool, RecvError> {
        // SAFETY: as in `Message::as_bytes`: the port has checked that it lies in its ring, arena or buffer (I-8), where
        // it stays until the next poll (I-2, I-9, I-11).
        let body = unsafe { found.payload.as_ref() };
        let at = self.opened.read(body, self.align).ok_or(RecvError::Corrupt("a message's envelope is garbled"))?;
        let payload = &body[at..];
        if !self.lengths.allow(payload.len() as u64) {
            return Err(BAD_LENGTH);
        }
        found.payload = NonNull::from(payload);
        if !self.is_wanted(found.sequence) {
            return Ok(false);
        }
        let expired = !self.with_expired && self.opened.view().is_expired();
        self.expired += u64::from(expired);
        Ok(!expired)
    }

    fn is_wanted(&mut self, sequence: u64) -> bool {
        let wanted = match &self.wanted {
            Wanted::All => return true,
            Wanted::Since(from_ns) => self.opened.view().timestamp_ns() >= *from_ns,
            Wanted::Among { sequences, until } if sequence < *until => return sequences.contains(&sequence),
            Wanted::Among { .. } => true,
        };
        if wanted {
            self.wanted = Wanted::All;
        }
        wanted
    }
}
