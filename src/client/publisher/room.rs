//! Waiting for room, and saying who holds it.

use std::time::Instant;

use super::PublisherCore;
use super::port::Port;
use crate::client::write::WritePort;
use crate::error::{Holder, PublishError};
use crate::ring::cursor::Cursor;
use crate::ring::gate::{Blocked, Stop};
use crate::ring::sequence::Sequence;
use crate::topic::{Full, Mode};
use crate::wait;

/// What came of one attempt to publish.
pub(super) enum Attempt<R> {
    Done(Result<R, PublishError>),
    /// There is no room, and the topic's policy is to wait.
    NoRoom(Blocked),
}

impl PublisherCore {
    /// Waits until `attempt` succeeds, where the topic's policy is to wait.
    #[cold]
    pub(super) fn wait_for<R>(
        &mut self,
        stop: Stop,
        deadline: Option<Instant>,
        mut attempt: impl FnMut(&mut Port) -> Result<R, Stop>,
    ) -> Result<R, PublishError> {
        let mut last = match stop {
            Stop::Blocked(blocked) if self.options.full != Full::Reject => blocked,
            stop => return Err(self.refused(stop)),
        };
        let poll = |core: &mut Self| match core.attempt(&mut attempt) {
            Attempt::Done(outcome) => Some(outcome),
            Attempt::NoRoom(blocked) => {
                last = blocked;
                None
            }
        };
        let outcome = wait::until(self, self.wait, deadline, |core| core.space_bell(), poll);
        outcome.unwrap_or_else(|| Err(self.timed_out(last)))
    }

    /// Tries once, where the topic may have gone meanwhile.
    pub(super) fn attempt<R>(&mut self, attempt: impl FnOnce(&mut Port) -> Result<R, Stop>) -> Attempt<R> {
        if let Err(gone) = self.check_gone() {
            return Attempt::Done(Err(gone));
        }
        match attempt(&mut self.port) {
            Ok(done) => Attempt::Done(Ok(done)),
            Err(Stop::Blocked(blocked)) if self.options.full != Full::Reject => Attempt::NoRoom(blocked),
            Err(stop) => Attempt::Done(Err(self.refused(stop))),
        }
    }

    /// There was no room in time.
    pub(super) fn timed_out(&self, blocked: Blocked) -> PublishError {
        match self.refused(Stop::Blocked(blocked)) {
            PublishError::Full { holder, held } => PublishError::TimedOut { holder, held },
            other => other,
        }
    }

    #[cold]
    pub(super) fn refused(&self, stop: Stop) -> PublishError {
        match stop {
            Stop::Corrupt(problem) => PublishError::Corrupt(problem),
            Stop::Fenced => PublishError::Fenced,
            Stop::Duplicate(sequence) => PublishError::Duplicate { sequence: sequence.map(Sequence::new) },
            Stop::Blocked(Blocked { cursor, position }) => {
                // Readers give back in steps; whoever meets a full ring wants what they have read already.
                self.space_bell().urge();
                let holder = match (self.options.mode, cursor) {
                    (Mode::Channel, _) => Holder::Receiver,
                    (_, Some(cursor)) => self.holder(cursor),
                    (_, None) => Holder::Hold,
                };
                PublishError::Full { holder, held: position }
            }
        }
    }

    /// Whose cursor holds the ring.
    fn holder(&self, cursor: u32) -> Holder {
        let lines = with_port!(&self.port, port => port.cursors());
        let group = lines.get(cursor as usize).and_then(Cursor::group);
        group.map_or(Holder::Subscriber(cursor), |group| Holder::Group(group as u32))
    }
}
