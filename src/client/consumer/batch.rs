//! Several messages in hand, settled together.

use std::marker::PhantomData;
use std::time::Duration;

use super::core::{Core, Item};
use super::delivery::Lease;
use crate::client::envelope::EnvelopeView;
use crate::client::received::{Received, received_message};
use crate::error::AckError;
use crate::ring::ledger::{Seen, State};
use crate::topic::Payload;

/// Messages that are leased to this consumer, in the order in which they were taken.
///
/// [`ack`](Self::ack) and [`nack`](Self::nack) settle all that have not been kept one by one. Dropped without either, they
/// are given back.
#[must_use = "dropping a batch gives its messages back"]
pub struct Batch<'a, T: ?Sized> {
    core: &'a mut Core,
    payload: PhantomData<fn() -> &'a T>,
}

/// One message of a batch; dereferences to its payload.
#[derive(Clone, Copy)]
pub struct BatchItem<'a, T: ?Sized> {
    core: &'a Core,
    item: &'a Item,
    payload: PhantomData<fn() -> &'a T>,
}

impl<'a, T: Payload + ?Sized> Batch<'a, T> {
    /// What `core` has just taken.
    #[inline]
    pub(super) fn new(core: &'a mut Core) -> Self {
        Batch { core, payload: PhantomData }
    }
}

impl<T: ?Sized> Batch<'_, T> {
    /// The messages.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = BatchItem<'_, T>> {
        let core = &*self.core;
        core.items.iter().map(move |item| BatchItem { core, item, payload: PhantomData })
    }

    /// How many messages there are, the kept ones included.
    pub fn len(&self) -> usize {
        self.core.items.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.core.items.is_empty()
    }

    /// Acknowledges every message that was not kept: none of them is delivered to this group again.
    ///
    /// # Errors
    /// The first [`AckError`]. All the others have been acknowledged all the same, unless they fail alike.
    #[inline]
    pub fn ack(mut self) -> Result<(), AckError> {
        self.settle(Core::ack)
    }

    /// Gives every message back that was not kept; they rest for the group's back-off.
    ///
    /// # Errors
    /// As [`Self::ack`].
    pub fn nack(mut self) -> Result<(), AckError> {
        self.settle(|core, lease| core.nack(lease, None))
    }

    /// Gives every message back that was not kept; they rest for `delay`, at most 24 h.
    ///
    /// # Errors
    /// As [`Self::ack`].
    pub fn nack_after(mut self, delay: Duration) -> Result<(), AckError> {
        self.settle(|core, lease| core.nack(lease, Some(delay)))
    }

    #[inline]
    fn settle(&mut self, mut settle: impl FnMut(&mut Core, Seen) -> Result<(), AckError>) -> Result<(), AckError> {
        let mut first = Ok(());
        // By index: settling needs the whole consumer, but never touches what is in hand.
        for index in 0..self.core.items.len() {
            let item = &self.core.items[index];
            if item.kept.get() {
                continue;
            }
            let lease = item.lease;
            let outcome = settle(self.core, lease);
            if first.is_ok() {
                first = outcome;
            }
        }
        self.core.items.clear();
        first
    }
}

impl<T: ?Sized> Drop for Batch<'_, T> {
    fn drop(&mut self) {
        // Where one cannot be given back, it is not ours any more.
        let _ = self.settle(|core, lease| match lease.state {
            State::Leased => core.nack(lease, None),
            _ => Ok(()),
        });
    }
}

impl<'a, T: ?Sized> BatchItem<'a, T> {
    /// Which delivery of the message to this group this is, from 1. Above 4,095 it counts no further.
    #[inline]
    pub fn attempt(&self) -> u32 {
        self.item.lease.attempt.into()
    }

    /// The payload as bytes.
    #[inline]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.core.payload(self.item)
    }

    /// Keeps this message's lease, whatever happens to the rest of the batch: to be settled later, through the consumer.
    pub fn keep(&self) -> Lease {
        self.item.kept.set(true);
        Lease::new(self.core, self.item.lease)
    }
}

impl<T: ?Sized> Received for BatchItem<'_, T> {
    #[inline]
    fn place(&self) -> u64 {
        self.item.lease.sequence()
    }

    fn author(&self) -> Option<(u64, u64)> {
        self.core.log.publisher_of(self.item.origin)
    }

    fn envelope(&self) -> Option<EnvelopeView<'_>> {
        self.core.envelope(self.item)
    }
}

received_message!(BatchItem<'_, T>, attempt);
