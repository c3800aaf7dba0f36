//! The writing end of each kind of ring behind one interface: bytes in, sequence out, never waits.

mod channel;
mod exclusive;
mod many;
mod slots;

use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Span};
use crate::ring::cursor::Readers;
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::Stop;

pub(crate) use channel::{ChannelEnd, channel};
pub(crate) use exclusive::exclusive;
pub(crate) use many::ManyPort;
pub(crate) use slots::SlotPort;

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

    /// Publishes all of `batch` (1 to `max_batch` messages) or nothing, consecutively; the first one's sequence.
    fn publish_batch(&mut self, batch: &[&[u8]]) -> Result<u64, Stop>;

    /// Reserves arena space for a payload of `len` bytes and the place to publish it.
    fn lend(&mut self, len: u64) -> Result<Span, Stop>;

    /// Where lent space lies in this process.
    fn pointer(&self, span: Span) -> *mut u8;

    /// Publishes a payload written into lent space.
    fn publish_lent(&mut self, span: Span) -> Result<u64, Stop>;

    /// The bell to wait on after `Stop::Blocked`.
    fn space_bell(&self) -> &Doorbell;

    /// Whether the topic is gone. Cheap while it is not.
    fn gone(&self) -> Option<GoneReason>;

    /// Who reads; stale at once.
    fn readers(&self) -> Readers;

    /// Longest payload that travels in the slot.
    fn inline_bytes(&self) -> usize;

    /// Most messages in one batch.
    fn max_batch(&self) -> usize;

    /// Called once, by the handle's drop.
    fn leave(&mut self);
}

/// How many live allocations are given up at once when an arena is full.
fn arena_slack(allocator: &Allocator) -> u64 {
    allocator.live() / 16
}
