//! A received message.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use crate::client::subscriber::SubscriberCore;
use crate::ring::sequence::Sequence;
use crate::topic::Payload;

/// A received message; dereferences to its payload.
///
/// It borrows the subscriber: the next receive ends it. Where the subscriber holds the ring back, the payload lies in
/// shared memory and stays whole until then; on `overwrite` topics and for droppable subscribers it is a checked copy.
pub struct Message<'a, T: ?Sized> {
    subscriber: &'a SubscriberCore,
    payload: PhantomData<fn() -> &'a T>,
}

impl<'a, T: Payload + ?Sized> Message<'a, T> {
    /// What `subscriber` has just found.
    #[inline]
    pub(crate) fn new(subscriber: &'a SubscriberCore) -> Self {
        Message { subscriber, payload: PhantomData }
    }

    /// The message's place in the topic.
    #[inline]
    pub fn sequence(&self) -> Sequence {
        Sequence::new(self.subscriber.found().sequence)
    }

    /// The publisher's number on the bus. `None` on channels, and on exclusive topics where more than 255 publishers
    /// have followed since.
    pub fn publisher(&self) -> Option<u64> {
        self.subscriber.publisher_and_number().map(|(publisher, _)| publisher)
    }

    /// The publisher's own number of this message, from 1. `None` where [`Self::publisher`] is.
    pub fn publisher_number(&self) -> Option<u64> {
        self.subscriber.publisher_and_number().map(|(_, number)| number)
    }

    /// When it was published: CLOCK_REALTIME, in nanoseconds. `None` on topics without envelopes.
    pub fn timestamp_ns(&self) -> Option<u64> {
        self.subscriber.envelope().map(|envelope| envelope.timestamp_ns())
    }

    /// The key, if the publisher gave one.
    pub fn key(&self) -> Option<&[u8]> {
        self.subscriber.envelope().and_then(|envelope| envelope.key())
    }

    /// The publisher's own id of the message, if it gave one.
    pub fn id(&self) -> Option<&[u8]> {
        self.subscriber.envelope().and_then(|envelope| envelope.id())
    }

    /// The headers' names and values, in the order in which the publisher added them.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.subscriber.envelope().into_iter().flat_map(|envelope| envelope.headers())
    }

    /// The value of the first header of this name.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers().find(|(found, _)| *found == name).map(|(_, value)| value)
    }

    /// The payload as bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the port has checked that the payload lies in its ring, arena or buffer (I-8). There it stays until
        // the next poll, which needs the subscriber that we borrow: its position is not below our gating cursor, so
        // no publisher that keeps to the protocol writes there (I-2, I-9), and the mappings outlive the port (I-11).
        unsafe { self.subscriber.found().payload.as_ref() }
    }
}

impl<T: Payload + ?Sized> Deref for Message<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        match T::ref_from_bytes(self.as_bytes()) {
            Ok(payload) => payload,
            Err(_) => unreachable!("size and alignment were checked on receipt"),
        }
    }
}

impl<T: Payload + fmt::Debug + ?Sized> fmt::Debug for Message<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message").field("sequence", &self.sequence()).field("payload", &&**self).finish()
    }
}
