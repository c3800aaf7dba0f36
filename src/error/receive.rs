//! Receiving from one topic.

use crate::ring::sequence::Sequence;

/// Why nothing was received.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// Messages were overwritten before they were read. The next receive continues at `to`.
    #[error("lost sequences {from}..{to}: the ring had overwritten them")]
    Lagged {
        /// First lost sequence.
        from: Sequence,
        /// First sequence that is still there.
        to: Sequence,
    },
    /// The timeout ran out.
    #[error("nothing came within the time given")]
    TimedOut,
    /// The topic was removed or the bus stopped, and everything readable has been read.
    #[error("the topic is gone: {0}")]
    Gone(GoneReason),
    /// Shared memory holds values that no correct process writes.
    #[error("the topic's shared memory is corrupt: {0}")]
    Corrupt(&'static str),
    /// The consumer may not take messages any more.
    #[error("this consumer is fenced: its group was rewound or removed, or its leases were reclaimed; open it again")]
    Fenced,
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

impl RecvError {
    /// Whether nothing can come after it: another receive would say so again.
    pub(crate) fn is_final(&self) -> bool {
        !matches!(self, RecvError::Lagged { .. } | RecvError::TimedOut)
    }
}

/// How a topic went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GoneReason {
    /// `shmbus rm`.
    #[error("it was removed")]
    Removed,
    /// `shmbus stop`.
    #[error("the bus was stopped")]
    Stopped,
    /// A channel's other end was dropped.
    #[error("the other end is closed")]
    Closed,
}
