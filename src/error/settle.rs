//! Settling messages of a group, and waiting until it has.

use super::open::OpenError;
use super::receive::GoneReason;
use crate::ring::sequence::Sequence;

/// Why an ack, nack, reject or extend changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AckError {
    /// The lease had ended and the message was given to another consumer, or back to the group.
    #[error("the lease on sequence {sequence} is lost: it had ended and the message was given away")]
    LeaseLost {
        /// The message.
        sequence: Sequence,
    },
    /// It was to be extended, but it had ended, and there is no room for it any more: as many others are in flight as may be.
    /// It is as it was: until somebody else gets the message it can still be settled or given back.
    #[error(
        "the lease on sequence {sequence} had ended, and as many messages are in flight as may be; it was not extended"
    )]
    Ended {
        /// The message.
        sequence: Sequence,
    },
    /// This very lease was used up before, or the group settles messages when it hands them out.
    #[error("sequence {sequence} was settled before with this lease")]
    AlreadySettled {
        /// The message.
        sequence: Sequence,
    },
    /// The lease was given to another consumer handle.
    #[error("the lease on sequence {sequence} was given to another consumer; use it there")]
    Foreign {
        /// The message.
        sequence: Sequence,
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
    /// The consumer's leases are void.
    #[error("this consumer is fenced: its group was rewound or removed, or its leases were reclaimed; open it again")]
    Fenced,
    /// The topic was removed or the bus stopped.
    #[error("the topic is gone: {0}")]
    Gone(GoneReason),
}

/// Why waiting for a group has ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettleError {
    /// The timeout ran out.
    #[error("the group has not settled the message within the time given")]
    TimedOut,
    /// The topic has no such group (any more).
    #[error("the topic has no group of this name; create it, or look at `shmbus show`")]
    NoGroup,
    /// The topic was removed or the bus stopped.
    #[error("the topic is gone: {0}")]
    Gone(GoneReason),
    /// The coordinator could not be asked for the group.
    #[error(transparent)]
    Open(#[from] OpenError),
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
