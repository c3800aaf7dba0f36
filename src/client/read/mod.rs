//! The reading end of each kind of ring behind one interface: finds the next message, never waits.

mod channel;
mod evictor;
mod exclusive;
mod in_place;
mod keeper;
mod many;
mod opener;

use std::ptr::NonNull;

use zerocopy::IntoBytes;

use crate::client::blocks::Block;
use crate::coordinator::protocol::TopicInfo;
use crate::error::{GoneReason, RecvError};
use crate::ring::doorbell::Doorbell;
use crate::ring::log::Place;
use crate::shm::layout::{ENVELOPE_HEAD_BYTES, MAX_ENVELOPE_BYTES};
use crate::shm::shared::Shared;
use crate::topic::TopicOptions;

pub(crate) use channel::ChannelPort;
pub(crate) use exclusive::ExclusivePort;
pub(crate) use many::ManyPort;
pub(crate) use opener::{Opener, Wanted};

/// A kind of ring, seen from its reading end.
pub(crate) trait ReadPort: Send {
    /// Finds the next message, or that there is none, if that takes a few loads and nothing else. It looks at the ring
    /// once: a second look without a pause would take the line from a publisher that is writing it.
    fn poll_fast(&mut self, found: &mut Found) -> Glance;

    /// Goes on to what comes next, after everything handed out before has been given back.
    fn poll(&mut self, found: &mut Found) -> Result<Step, RecvError>;

    /// Where the next poll looks: the position in the ring, and the sequence of the message there.
    fn place(&self) -> Place;

    /// How many positions the ring has.
    fn ring_len(&self) -> u64;

    /// Gives back what was handed out and says whether a poll would find something: a message, a loss, garbage. At worst
    /// it says so of something that a poll then skips.
    fn is_ready(&mut self) -> bool;

    /// The bell to wait on for messages.
    fn bell(&self) -> Shared<Doorbell>;

    /// Whether the topic is gone. Messages that are still there come first.
    fn gone(&self) -> Option<GoneReason>;

    /// How many messages lie between this reader and the tail; stale at once.
    fn lag(&self) -> u64;

    /// Publisher and its number of a message, as far as they are known.
    fn publisher_of(&self, origin: Origin) -> Option<(u64, u64)>;

    /// Called once, by the handle's drop.
    fn leave(&mut self);
}

/// What a glance at the ring showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Glance {
    /// The next message.
    Found,
    /// Nothing, and nothing to be done about it.
    Nothing,
    /// Something that takes [`ReadPort::poll`] to tell.
    Unclear,
}

/// What a poll has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The next message.
    Found,
    /// Something that is not for the caller, and it has gone past it. There may be more behind it.
    Passed,
    /// The end of what is there.
    Nothing,
}

/// The message found last. It lies in the handle and is filled in place: passing it up through results would cost
/// more than finding it.
pub(crate) struct Found {
    pub(crate) sequence: u64,
    /// In the ring or an arena, where it stays whole until the next poll, or in the handle's buffer.
    pub(crate) payload: NonNull<[u8]>,
    origin: Origin,
    buffer: Buffer,
}

/// Who published, in the port's own terms: index and position of a tenancy, or publisher and number.
#[derive(Clone, Copy, Default)]
pub(crate) struct Origin(u64, u64);

// SAFETY: the pointer is only followed through the handle that owns the port whose memory it points to.
unsafe impl Send for Found {}
// SAFETY: as above; through a shared reference the payload is only read, and nothing moves it.
unsafe impl Sync for Found {}

impl Found {
    /// Nothing found yet.
    pub(crate) fn nothing() -> Self {
        let payload = NonNull::slice_from_raw_parts(NonNull::dangling(), 0);
        Found { sequence: 0, payload, origin: Origin::default(), buffer: Buffer::default() }
    }

    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }

    #[inline]
    fn set(&mut self, sequence: u64, payload: NonNull<[u8]>, origin: Origin) {
        self.sequence = sequence;
        self.payload = payload;
        self.origin = origin;
    }
}

/// `len` bytes at `pointer`, which is not null.
#[inline]
fn payload_at(pointer: *const u8, len: usize) -> NonNull<[u8]> {
    // SAFETY: every caller passes a pointer into a mapping or a buffer.
    NonNull::slice_from_raw_parts(unsafe { NonNull::new_unchecked(pointer.cast_mut()) }, len)
}

/// A handle's own memory for copied payloads, aligned for every payload type.
#[derive(Default)]
pub(crate) struct Buffer {
    blocks: Vec<Block>,
}

impl Buffer {
    /// `len` bytes to fill.
    fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        let blocks = Block::count(len);
        if self.blocks.len() < blocks {
            self.blocks.resize(blocks, Block::ZERO);
        }
        &mut self.blocks.as_mut_bytes()[..len]
    }

    /// The first `len` bytes, just filled.
    fn filled(&self, len: usize) -> NonNull<[u8]> {
        payload_at(self.blocks.as_ptr().cast(), len)
    }
}

/// The publisher may have died or the topic be garbled; either way this message is not one.
const BAD_LENGTH: RecvError = RecvError::Corrupt("a message's length does not fit its place");

/// What every port checks of a payload's length.
#[derive(Clone, Copy)]
pub(crate) struct Lengths {
    min: u64,
    max: u64,
}

impl Lengths {
    /// Of what the ring carries: payloads, with their envelopes where the topic has them.
    pub(crate) fn of(info: &TopicInfo) -> Self {
        let Lengths { min, max } = Self::of_payload(&info.options);
        match info.options.envelope {
            true => Lengths { min: min + ENVELOPE_HEAD_BYTES as u64, max: max + MAX_ENVELOPE_BYTES },
            false => Lengths { min, max },
        }
    }

    /// Of payloads alone.
    pub(crate) fn of_payload(options: &TopicOptions) -> Self {
        match &options.schema {
            Some(schema) => Lengths { min: schema.size_bytes, max: schema.size_bytes },
            None => Lengths { min: 0, max: options.bytes },
        }
    }

    #[inline]
    pub(crate) fn allow(self, len: u64) -> bool {
        self.min <= len && len <= self.max
    }
}
