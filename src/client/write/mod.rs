//! The writing end of each kind of ring behind one interface: bytes in, sequence out, never waits.

mod channel;
mod exclusive;
mod ids;
mod many;
mod runs;
mod slots;

use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Span};
use crate::ring::cursor::{Cursor, Readers};
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::Stop;
use crate::shm::shared::Shared;

pub(crate) use channel::{ChannelEnd, channel};
pub(crate) use exclusive::exclusive;
pub(crate) use many::{ManyPort, Others};
pub(crate) use runs::Runs;
pub(crate) use slots::SlotPort;

use runs::Run;

/// A kind of ring, seen from its writing end. Lengths have been checked against the topic's largest message.
pub(crate) trait WritePort: Send {
    /// Publishes one message if that takes a few stores and nothing else; `None`: call [`Self::publish`]. Compiled into
    /// the caller, where a typed payload's length is a constant.
    #[inline(always)]
    fn publish_fast(&mut self, _bytes: &[u8]) -> Option<u64> {
        None
    }

    /// Publishes one message.
    fn publish(&mut self, bytes: &[u8]) -> Result<u64, Stop>;

    /// What is published from now on belongs to this message of a group: the note says so in the place of a number of ours.
    /// Only topics for many keep such notes.
    fn note_as(&mut self, _input: u64) {}

    /// Whether a message with this id was there when the last one with an id was published, or refused.
    fn has_id(&self, _id: &[u8]) -> bool {
        false
    }

    /// Publishes all of `batch` (1 to `max_batch` messages) or nothing, consecutively; the first one's sequence.
    fn publish_batch(&mut self, batch: &[&[u8]]) -> Result<u64, Stop>;

    /// Reserves arena space for a payload of `len` bytes and the place to publish it.
    fn lend(&mut self, len: u64) -> Result<Span, Stop>;

    /// Where lent space lies in this process.
    fn pointer(&self, span: Span) -> *mut u8;

    /// Publishes a payload written into lent space.
    fn publish_lent(&mut self, span: Span) -> Result<u64, Stop>;

    /// The bell to wait on after `Stop::Blocked`.
    fn space_bell(&self) -> Shared<Doorbell>;

    /// Every reader's cursor, the groups' lines among them; none on channels.
    fn cursors(&self) -> &[Cursor];

    /// Whether the topic is gone. Cheap while it is not.
    fn gone(&self) -> Option<GoneReason>;

    /// Who reads; stale at once.
    fn readers(&self) -> Readers;

    /// Longest payload that travels in the slot.
    fn inline_bytes(&self) -> usize;

    /// Most messages in one batch.
    fn max_batch(&self) -> usize;

    /// How many messages this port has published.
    fn published(&self) -> u64;

    /// Where the retained messages of `publisher` are, whichever port published them; unsorted.
    fn runs_of(&mut self, publisher: u64) -> Vec<Run>;

    /// Called once, by the handle's drop.
    fn leave(&mut self);
}

/// How many live allocations are given up at once when an arena is full.
fn arena_slack(allocator: &Allocator) -> u64 {
    allocator.live() / 16
}
