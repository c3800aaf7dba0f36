//! Receiving from all topics of a pattern.

use super::open::{AttachError, ConnectError};
use super::receive::{GoneReason, RecvError};
use super::refusal::Refusal;
use crate::ring::sequence::Sequence;

/// Why a wildcard subscriber received nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WildcardError {
    /// Messages of one topic were overwritten before they were read. The next receive goes on; this topic continues at `to`.
    #[error("topic {topic:?}: lost sequences {from}..{to}: the ring had overwritten them")]
    Lagged {
        /// The topic.
        topic: String,
        /// First lost sequence.
        from: Sequence,
        /// First sequence that is still there.
        to: Sequence,
    },
    /// The timeout ran out.
    #[error("nothing came within the time given")]
    TimedOut,
    /// The bus was stopped, and everything readable has been read.
    #[error("the topics are gone: {0}")]
    Gone(GoneReason),
    /// One topic's shared memory holds values that no correct process writes. The subscription goes on without it.
    #[error("topic {topic:?}: its shared memory is corrupt: {problem}; remove it with `shmbus rm --force {topic}`")]
    Corrupt {
        /// The topic.
        topic: String,
        /// What was found.
        problem: &'static str,
    },
    /// One topic's segments are not what was promised. The subscription goes on without it.
    #[error("topic {topic:?}: cannot attach: {source}")]
    Attach {
        /// The topic.
        topic: String,
        /// What is wrong.
        source: AttachError,
    },
    /// A topic that the pattern stands for is none of the subscription's: there was no room for it, in the topic, in what this
    /// process or user may have, or in the coordinator. Its messages are missed. The subscription goes on without it.
    #[error("topic {topic:?} is missed: {why}")]
    Missed {
        /// The topic.
        topic: String,
        /// What there was no room in.
        why: Refusal,
    },
    /// New topics were announced, and the coordinator that has them cannot be reached any more; or the handle was used in a
    /// forked child ([`ConnectError::Forked`]).
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

impl WildcardError {
    /// Why nothing can come after it, if that is so. What concerns one topic is not the others' end.
    pub(crate) fn end(&self) -> Option<RecvError> {
        match self {
            WildcardError::Gone(reason) => Some(RecvError::Gone(*reason)),
            WildcardError::Connect(ConnectError::Forked { opened_by, pid }) => {
                Some(RecvError::Forked { opened_by: *opened_by, pid: *pid })
            }
            _ => None,
        }
    }
}
