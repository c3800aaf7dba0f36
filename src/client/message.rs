//! Received messages: borrowed from a subscriber, and owned.

use std::marker::PhantomData;

use zerocopy::IntoBytes;

use crate::client::blocks::{self, Block};
use crate::client::envelope::{EnvelopeView, Head};
use crate::client::received::{Received, received_message};
use crate::client::subscriber::SubscriberCore;
use crate::topic::Payload;

/// A received message; dereferences to its payload.
///
/// It borrows the subscriber: the next receive ends it. Where the subscriber holds the ring back, the payload lies in
/// shared memory and stays whole until then; on `overwrite` topics and for droppable subscribers it is a checked copy.
/// To keep it for longer, [`detach`](Self::detach) it.
pub struct Message<'a, T: ?Sized> {
    subscriber: &'a SubscriberCore,
    payload: PhantomData<fn() -> &'a T>,
}

/// A received message in memory of its own; dereferences to its payload.
///
/// It borrows nothing and holds nothing back, and may go to another thread: what [`Message::detach`] and iterators
/// give. One allocation, and one copy of the payload.
pub struct OwnedMessage<T: ?Sized> {
    sequence: u64,
    author: Option<(u64, u64)>,
    head: Option<Head>,
    /// The payload; from the next block on, what the envelope's head speaks of.
    body: Box<[Block]>,
    payload_bytes: usize,
    payload: PhantomData<fn() -> Box<T>>,
}

impl<'a, T: Payload + ?Sized> Message<'a, T> {
    /// What `subscriber` has just found.
    #[inline]
    pub(crate) fn new(subscriber: &'a SubscriberCore) -> Self {
        Message { subscriber, payload: PhantomData }
    }
}

impl<T: ?Sized> Message<'_, T> {
    /// The payload as bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the port has checked that the payload lies in its ring, arena or buffer (I-8). There it stays until
        // the next poll, which needs the subscriber that we borrow: its position is not below our gating cursor, so
        // no publisher that keeps to the protocol writes there (I-2, I-9), and the mappings outlive the port (I-11).
        unsafe { self.subscriber.found().payload.as_ref() }
    }

    /// The message in memory of its own, which the next receive leaves alone.
    pub fn detach(&self) -> OwnedMessage<T> {
        OwnedMessage::copy_of(self, self.as_bytes())
    }
}

impl<T: ?Sized> Received for Message<'_, T> {
    #[inline]
    fn place(&self) -> u64 {
        self.subscriber.found().sequence
    }

    fn author(&self) -> Option<(u64, u64)> {
        self.subscriber.publisher_and_number()
    }

    fn envelope(&self) -> Option<EnvelopeView<'_>> {
        self.subscriber.envelope()
    }
}

received_message!(Message<'_, T>);

impl<T: ?Sized> OwnedMessage<T> {
    /// A copy of a message and its payload.
    pub(crate) fn copy_of(message: &impl Received, payload: &[u8]) -> Self {
        let (head, fields) = message.envelope().map(|envelope| envelope.parts()).unzip();
        OwnedMessage {
            sequence: message.place(),
            author: message.author(),
            head,
            body: blocks::copy_of([payload, fields.unwrap_or_default()]),
            payload_bytes: payload.len(),
            payload: PhantomData,
        }
    }

    /// The payload as bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        &self.body.as_bytes()[..self.payload_bytes]
    }
}

impl<T: ?Sized> Received for OwnedMessage<T> {
    #[inline]
    fn place(&self) -> u64 {
        self.sequence
    }

    fn author(&self) -> Option<(u64, u64)> {
        self.author
    }

    fn envelope(&self) -> Option<EnvelopeView<'_>> {
        let fields = &self.body[Block::count(self.payload_bytes)..];
        self.head.map(|head| EnvelopeView::of_parts(head, fields.as_bytes()))
    }
}

received_message!(OwnedMessage<T>);
