//! [`Loan`]: messages written in place.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use super::port::Port;
use super::{Publisher, PublisherCore};
use crate::client::envelope::{self, Envelope};
use crate::client::write::WritePort;
use crate::error::PublishError;
use crate::ring::arena::Span;
use crate::ring::sequence::Sequence;
use crate::ring::slot::MAX_INLINE_BYTES;
use crate::shm::layout::ENVELOPE_HEAD_BYTES;
use crate::topic::Payload;

/// Memory lent by a publisher; dereferences to the payload. Dropping it without [`Loan::publish`] publishes nothing.
pub struct Loan<'a, T: ?Sized> {
    core: &'a mut PublisherCore,
    space: Space,
    /// Bytes at the front of an arena space that are the envelope's.
    envelope_bytes: usize,
    payload: PhantomData<fn(&T)>,
}

/// A small payload before it is copied to its slot, aligned for every payload type.
#[repr(C, align(32))]
struct SmallPayload([u8; MAX_INLINE_BYTES]);

/// Where a loan lies.
enum Space {
    /// Will travel in the slot: a copy of a cache line is cheaper than a visit to the arena.
    Inline(SmallPayload, usize),
    Arena(Span),
}

impl<T: Payload> Publisher<T> {
    /// Lends memory for one message, to be filled in place. It holds a valid `T` of unspecified content.
    ///
    /// # Errors
    /// As [`Self::publish`]: the room is taken now.
    pub fn loan(&mut self) -> Result<Loan<'_, T>, PublishError> {
        Loan::new(&mut self.core, size_of::<T>())
    }
}

impl Publisher<[u8]> {
    /// Lends memory for a message of `len` bytes, to be filled in place. Its content is unspecified.
    ///
    /// # Errors
    /// As [`Self::publish`]: the room is taken now.
    pub fn loan_bytes(&mut self, len: usize) -> Result<Loan<'_, [u8]>, PublishError> {
        Loan::new(&mut self.core, len)
    }
}

impl<'a, T: Payload + ?Sized> Loan<'a, T> {
    fn new(core: &'a mut PublisherCore, len: usize) -> Result<Self, PublishError> {
        core.check_len(len)?;
        core.check_gone()?;
        let envelope_bytes = if core.sealer.is_some() { ENVELOPE_HEAD_BYTES } else { 0 };
        let inline = with_port!(&core.port, port => port.inline_bytes()).min(MAX_INLINE_BYTES);
        let space = if len + envelope_bytes <= inline {
            Space::Inline(SmallPayload([0; MAX_INLINE_BYTES]), len)
        } else {
            let body = (len + envelope_bytes) as u64;
            let first = with_port!(&mut core.port, port => port.lend(body));
            let span = match first {
                Ok(span) => span,
                Err(stop) => core.wait_for(stop, None, |port| with_port!(port, port => port.lend(body)))?,
            };
            Space::Arena(span)
        };
        Ok(Loan { core, space, envelope_bytes, payload: PhantomData })
    }

    /// Publishes what was written. On a full ring it waits (`block`) or fails at once (`reject`).
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    pub fn publish(mut self) -> Result<Sequence, PublishError> {
        self.core.check_home()?;
        self.write_envelope();
        match self.space {
            Space::Inline(small, len) => {
                let publish = |core: &mut PublisherCore, body: &[u8]| core.publish(body, None);
                self.core.publish_sealed(&small.0[..len], &Envelope::new(), publish)
            }
            Space::Arena(span) => {
                self.core.check_gone()?;
                let first = with_port!(&mut self.core.port, port => port.publish_lent(span));
                let sequence = match first {
                    Ok(sequence) => sequence,
                    Err(stop) => {
                        self.core.wait_for(stop, None, |port| with_port!(port, port => port.publish_lent(span)))?
                    }
                };
                Ok(Sequence::new(sequence))
            }
        }
    }

    /// Says when the message was published, where the topic wants to know.
    fn write_envelope(&mut self) {
        if let (Some(sealer), Space::Arena(_)) = (&self.core.sealer, &self.space) {
            let head = envelope::plain(envelope::now_ns(), sealer.default_ttl_ms);
            self.body_mut()[..ENVELOPE_HEAD_BYTES].copy_from_slice(&head);
        }
    }

    /// The payload.
    fn bytes(&self) -> &[u8] {
        self.core.home.assert_here("loan");
        match &self.space {
            Space::Inline(small, len) => &small.0[..*len],
            Space::Arena(span) => {
                let pointer = with_port!(&self.core.port, port => port.pointer(*span));
                // SAFETY: the span lies in our arena (the allocator hands out nothing else), no reader has been told
                // of it, and no other publisher writes this arena (I-9).
                let body = unsafe { std::slice::from_raw_parts(pointer, span.len as usize) };
                &body[self.envelope_bytes..]
            }
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let payload_at = if matches!(self.space, Space::Arena(_)) { self.envelope_bytes } else { 0 };
        &mut self.body_mut()[payload_at..]
    }

    /// All of the space.
    fn body_mut(&mut self) -> &mut [u8] {
        self.core.home.assert_here("loan");
        match &mut self.space {
            Space::Inline(small, len) => &mut small.0[..*len],
            Space::Arena(span) => {
                let pointer = with_port!(&self.core.port, port => port.pointer(*span));
                // SAFETY: as in `bytes`, and `&mut self` is the only path to it.
                unsafe { std::slice::from_raw_parts_mut(pointer, span.len as usize) }
            }
        }
    }
}

impl<T: Payload + ?Sized> Deref for Loan<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match T::ref_from_bytes(self.bytes()) {
            Ok(payload) => payload,
            Err(_) => unreachable!("a loan has the payload's size and alignment"),
        }
    }
}

impl<T: Payload + ?Sized> DerefMut for Loan<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match T::mut_from_bytes(self.bytes_mut()) {
            Ok(payload) => payload,
            Err(_) => unreachable!("a loan has the payload's size and alignment"),
        }
    }
}
