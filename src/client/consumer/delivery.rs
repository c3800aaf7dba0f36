//! One message in hand, and the token that stays when it is kept.

use std::marker::PhantomData;
use std::time::Duration;

use super::core::{Core, Item};
use crate::client::envelope::EnvelopeView;
use crate::client::received::{Received, received_message};
use crate::error::AckError;
use crate::ring::ledger::{Seen, State};
use crate::ring::sequence::Sequence;
use crate::topic::Payload;

/// A message that is leased to this consumer; dereferences to its payload, which is a private copy.
///
/// End it with [`ack`](Self::ack), [`nack`](Self::nack) or [`reject`](Self::reject), or [`keep`](Self::keep) it for
/// later. Dropped without any of these it is given back like with `nack`: an early `?` must not park a message for a whole
/// lease.
#[must_use = "dropping a delivery gives the message back"]
pub struct Delivery<'a, T: ?Sized> {
    core: &'a mut Core,
    payload: PhantomData<fn() -> &'a T>,
}

/// A right to one message, detached from its payload. It acts through the consumer that received the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    seen: Seen,
    token: u64,
}

impl Lease {
    pub(super) fn new(core: &Core, seen: Seen) -> Self {
        Lease { seen, token: core.token }
    }

    /// The lease, if it is of the consumer with this token.
    pub(super) fn of(&self, token: u64) -> Option<Seen> {
        (self.token == token).then_some(self.seen)
    }

    pub(super) fn seen(&self) -> Seen {
        self.seen
    }

    /// Whether there is anything to settle: what is delivered at most once is settled before.
    pub(super) fn is_unsettled(&self) -> bool {
        self.seen.state == State::Leased
    }

    pub(super) fn replace(&mut self, seen: Seen) {
        self.seen = seen;
    }

    /// The message's place in the topic.
    pub fn sequence(&self) -> Sequence {
        Sequence::new(self.seen.sequence())
    }

    /// Which delivery of the message this is, from 1.
    pub fn attempt(&self) -> u32 {
        self.seen.attempt.into()
    }
}

impl<'a, T: Payload + ?Sized> Delivery<'a, T> {
    /// What `core` has just taken.
    #[inline]
    pub(super) fn new(core: &'a mut Core) -> Self {
        Delivery { core, payload: PhantomData }
    }
}

impl<T: ?Sized> Delivery<'_, T> {
    #[inline]
    fn item(&self) -> &Item {
        &self.core.items[0]
    }

    /// Which delivery of the message to this group this is, from 1. Above 4,095 it counts no further.
    #[inline]
    pub fn attempt(&self) -> u32 {
        self.item().lease.attempt.into()
    }

    /// The payload as bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        self.core.payload(self.item())
    }

    /// Acknowledges the message: it is never delivered to this group again.
    ///
    /// # Errors
    /// [`AckError::LeaseLost`]: the lease had ended and the message was given to another; nothing has changed then.
    #[inline]
    pub fn ack(mut self) -> Result<(), AckError> {
        self.let_go().map_or(Ok(()), |lease| self.core.ack(lease))
    }

    /// Gives the message back; it rests for the group's back-off.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn nack(mut self) -> Result<(), AckError> {
        self.let_go().map_or(Ok(()), |lease| self.core.nack(lease, None))
    }

    /// Gives the message back; it rests for `delay`, at most 24 h.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn nack_after(mut self, delay: Duration) -> Result<(), AckError> {
        self.let_go().map_or(Ok(()), |lease| self.core.nack(lease, Some(delay)))
    }

    /// Gives the message back; it rests for the group's back-off. If this was its last attempt, the letter says why.
    pub(crate) fn fail(mut self, why: &str) -> Result<(), AckError> {
        self.let_go().map_or(Ok(()), |lease| self.core.fail(lease, why))
    }

    /// Sends the message to the dead-letter topic; it is never delivered to this group again.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn reject(mut self, reason: &str) -> Result<(), AckError> {
        self.let_go().map_or(Ok(()), |lease| self.core.reject(lease, reason))
    }

    /// Lets the lease end `time` from now, and not before.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn extend(&mut self, time: Duration) -> Result<(), AckError> {
        let lease = self.core.extend(self.item().lease, time)?;
        self.core.items[0].lease = lease;
        Ok(())
    }

    /// Keeps the lease and lets go of the payload: to be settled later, through the consumer.
    pub fn keep(mut self) -> Lease {
        let seen = self.item().lease;
        self.let_go();
        Lease::new(self.core, seen)
    }

    /// Takes the lease out of the hands of `drop`.
    #[inline]
    fn let_go(&mut self) -> Option<Seen> {
        self.core.items.pop().map(|item| item.lease)
    }
}

impl<T: ?Sized> Drop for Delivery<'_, T> {
    #[inline]
    fn drop(&mut self) {
        if let Some(lease) = self.let_go().filter(|lease| lease.state == State::Leased) {
            // Where it cannot be given back, it is not ours any more.
            let _ = self.core.nack(lease, None);
        }
    }
}

impl<T: ?Sized> Received for Delivery<'_, T> {
    #[inline]
    fn place(&self) -> u64 {
        self.item().lease.sequence()
    }

    fn author(&self) -> Option<(u64, u64)> {
        self.core.log.publisher_of(self.item().origin)
    }

    fn envelope(&self) -> Option<EnvelopeView<'_>> {
        self.core.envelope(self.item())
    }
}

received_message!(Delivery<'_, T>, attempt);
