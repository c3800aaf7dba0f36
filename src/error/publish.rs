//! Publishing, and what goes into an envelope.

use super::receive::GoneReason;
use crate::ring::sequence::Sequence;
use crate::topic::Schema;

/// Why a message was not published. Whatever the error, no reader will see the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The ring is full and a reader holds it.
    #[error("the ring is full: {holder} holds sequence {held}")]
    Full {
        /// Who holds it back.
        holder: Holder,
        /// The oldest sequence (position, on topics with many publishers) it has not released.
        held: u64,
    },
    /// The message can never fit.
    #[error("message of {found} bytes; the topic takes at most {max} (create it with --bytes to take more)")]
    TooLarge {
        /// Bytes given.
        found: u64,
        /// Most the topic takes.
        max: u64,
    },
    /// Raw bytes on a typed topic, of the wrong size.
    #[error("message of {found} bytes; the topic carries {expected}")]
    WrongSize {
        /// Bytes given.
        found: u64,
        /// What the topic carries.
        expected: Schema,
    },
    /// More messages in one batch than a batch may have, or none.
    #[error("batch of {found} messages; 1 to {max} are allowed")]
    BatchSize {
        /// Messages given.
        found: usize,
        /// Most allowed.
        max: usize,
    },
    /// The envelope does not go with the topic, or is too long.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// The topic was removed or the bus stopped.
    #[error("the topic is gone: {0}")]
    Gone(GoneReason),
    /// Shared memory holds values that no correct process writes.
    #[error("the topic's shared memory is corrupt: {0}")]
    Corrupt(&'static str),
    /// The publisher's number, or the message's id, has been published already; it was not published again.
    #[error("published already{}", .sequence.map_or(String::new(), |sequence| format!(" as sequence {sequence}")))]
    Duplicate {
        /// Where it is; `None` where the topic no longer retains it.
        sequence: Option<Sequence>,
    },
    /// Numbers are dense: this is not the next one.
    #[error("number {found} leaves a gap; the publisher's next number is {expected}")]
    NumberGap {
        /// The next number.
        expected: u64,
        /// The number given.
        found: u64,
    },
    /// A batch whose first messages have been published and whose last ones have not. A batch is all or nothing, so none
    /// of it was published: give the rest as a batch of its own.
    #[error(
        "the batch begins with number {found}, but all up to number {} are published already; begin with {expected}",
        expected - 1
    )]
    BatchOverlap {
        /// The next number.
        expected: u64,
        /// The number given for the batch's first message.
        found: u64,
    },
    /// Another publisher has been opened under this one's name; this handle publishes nothing any more.
    #[error("fenced: another publisher has taken the name")]
    Fenced,
    /// A `publish_timeout` ran out.
    #[error("timed out: {holder} holds sequence {held}")]
    TimedOut {
        /// Who holds the ring.
        holder: Holder,
        /// The oldest sequence (position, on topics with many publishers) it has not released.
        held: u64,
    },
    /// The handle was opened by this process's parent, before it forked.
    #[error(
        "this handle was opened by process {opened_by}, before a fork; open the bus again in the child (process {pid})"
    )]
    Forked {
        /// The process that opened it.
        opened_by: u32,
        /// The process that used it.
        pid: u32,
    },
}

/// Who holds a full ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holder {
    /// A subscriber: its cursor's number on the topic (as `shmbus show` prints it).
    Subscriber(u32),
    /// A group that has not settled it: its number on the topic (as `shmbus show` prints it, with who holds the lease).
    Group(u32),
    /// Nobody reads, and the topic was created with `hold`.
    Hold,
    /// A channel's receiver has not read on.
    Receiver,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Holder::Subscriber(n) => write!(f, "subscriber {n}"),
            Holder::Group(n) => write!(f, "group {n}"),
            Holder::Hold => f.write_str("the topic's hold option"),
            Holder::Receiver => f.write_str("the channel's receiver"),
        }
    }
}

/// An envelope that cannot be published.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvelopeError {
    /// The topic was created without envelopes.
    #[error(
        "the topic carries no key, id, headers or time-to-live; create it with --envelope (`Topic::envelope`), \
             or publish without them"
    )]
    LeanTopic,
    /// The key, id or headers are too long.
    #[error("{part} of {found} bytes; a message takes at most {max}")]
    TooLong {
        /// "a key", "an id", "headers".
        part: &'static str,
        /// Bytes given; of headers, bytes they have when encoded.
        found: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The envelopes of a batch are too long together.
    #[error("envelopes of {found} bytes in one batch; it takes at most {max}, publish it in parts")]
    Batch {
        /// Bytes of all envelopes.
        found: u64,
        /// Bytes allowed for a batch of so many messages.
        max: u64,
    },
}
