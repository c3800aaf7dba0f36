//! A channel's sender as a [`SlotEnd`].

use super::runs::Run;
use super::slots::{SlotEnd, SlotPort};
use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Arena};
use crate::ring::cursor::{Cursor, Readers};
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::{Blocked, Stop};
use crate::ring::slot::Body;
use crate::ring::spsc;
use crate::shm::layout::ARENA_ALIGN;
use crate::shm::shared::Shared;

/// The port of a channel's sender.
pub(crate) fn channel<const W: usize>(
    channel: spsc::Channel<W>,
    arena: Arena,
    messages: u64,
    stand_alone: bool,
) -> SlotPort<W, ChannelEnd<W>> {
    let (head, tail) = channel.ends();
    let spans = channel.clone();
    let live = (head..tail).filter_map(|position| Some((position, spans.span_at(position)?)));
    let slots = channel.slots();
    let end = ChannelEnd { sender: spsc::Sender::new(channel, tail), stand_alone };
    SlotPort::new(end, arena, live, messages.min(slots))
}

/// A channel's sender as a [`SlotEnd`].
pub(crate) struct ChannelEnd<const W: usize> {
    sender: spsc::Sender<W>,
    /// Stand-alone senders tell the receiver good-bye; on a bus another sender may follow.
    stand_alone: bool,
}

impl<const W: usize> ChannelEnd<W> {
    #[cold]
    fn blocked(&self) -> Stop {
        let oldest = self.sender.next().saturating_sub(self.sender.channel().slots());
        Stop::Blocked(Blocked { cursor: None, position: oldest })
    }
}

impl<const W: usize> SlotEnd for ChannelEnd<W> {
    #[inline]
    fn next(&self) -> u64 {
        self.sender.next()
    }

    #[inline(always)]
    fn is_ready(&mut self) -> bool {
        self.sender.has_room(1) && !self.sender.channel().header.readers.wants_attention()
    }

    #[inline]
    fn reserve(&mut self, count: u64) -> Result<(), Stop> {
        if self.sender.has_room(count) { Ok(()) } else { Err(self.blocked()) }
    }

    #[inline]
    fn fill(&self, ahead: u64, body: Body<'_>) {
        self.sender.fill(ahead, body);
    }

    #[inline]
    fn commit(&self, ahead: u64, body: Body<'_>) {
        self.sender.commit(ahead, body);
    }

    #[inline]
    fn advance(&mut self, count: u64) {
        self.sender.advance(count);
        self.sender.notify();
    }

    fn reclaim(&mut self, allocator: &mut Allocator, bytes: u64) -> Result<(), Stop> {
        let needed = allocator.floor_for(bytes, ARENA_ALIGN).ok_or(Stop::Corrupt("arena too small"))?;
        // The receiver frees in order: the newest that is in the way speaks for the older ones.
        if needed > 0 && !self.sender.channel().is_freed(needed - 1) {
            return Err(self.blocked());
        }
        allocator.reclaim(needed);
        Ok(())
    }

    fn space_bell(&self) -> Shared<Doorbell> {
        self.sender.channel().header.part(|header| &header.writers)
    }

    fn cursors(&self) -> &[Cursor] {
        &[]
    }

    #[inline]
    fn gone(&self) -> Option<GoneReason> {
        let header = &self.sender.channel().header;
        if !header.readers.wants_attention() {
            return None;
        }
        header.ended().or_else(|| header.is_closed(spsc::End::Receiver).then_some(GoneReason::Closed))
    }

    fn runs_of(&self, _publisher: u64) -> Vec<Run> {
        // A channel keeps no record of who published.
        Vec::new()
    }

    /// A channel has no cursors: its receiver counts until it is known to be gone.
    fn readers(&self) -> Readers {
        let gone = self.sender.channel().header.is_closed(spsc::End::Receiver);
        Readers { subscribers: u64::from(!gone), ..Readers::default() }
    }

    fn leave(&mut self) {
        if self.stand_alone {
            self.sender.channel().header.close(spsc::End::Sender);
        }
    }
}
