//! The writing end of each kind of ring behind one interface: bytes in, sequence out, never waits.

use std::collections::VecDeque;

use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Arena, Live, Span};
use crate::ring::doorbell::Doorbell;
use crate::ring::exclusive::{self, Body};
use crate::ring::gate::{Blocked, Stop};
use crate::ring::log::{LogHeader, TopicState};
use crate::ring::many::{self, Record};
use crate::ring::slot::Slot;
use crate::ring::spsc;
use crate::shm::layout::{ARENA_ALIGN, MAX_BATCH, RECORD_HEADER_BYTES};
use crate::shm::topic::{SharedInfo, locate, unit_of};
use crate::sync::Ordering;

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

fn reason(header: &LogHeader) -> Option<GoneReason> {
    match header.state() {
        TopicState::Live => None,
        TopicState::Removed => Some(GoneReason::Removed),
        TopicState::Stopped => Some(GoneReason::Stopped),
    }
}

/// A ring of slots, seen from its one writing end: exclusive topics and channels.
pub(crate) trait SlotEnd: Send {
    /// The position of the next message.
    fn next(&self) -> u64;
    /// Whether the next position may be written, nobody has to be asked and the topic lives.
    fn is_ready(&mut self) -> bool;
    /// Makes sure that the next `count` positions may be written.
    fn reserve(&mut self, count: u64) -> Result<(), Stop>;
    /// Stores a payload `ahead` positions further on, uncommitted.
    fn fill(&self, ahead: u64, body: Body<'_>);
    /// Commits what was filled.
    fn commit(&self, ahead: u64, body: Body<'_>);
    /// Counts committed messages and wakes readers.
    fn advance(&mut self, count: u64);
    /// Takes back arena space until `bytes` fit, as far as readers allow.
    fn reclaim(&mut self, allocator: &mut Allocator, bytes: u64) -> Result<(), Stop>;
    /// The bell to wait on for space.
    fn space_bell(&self) -> &Doorbell;
    /// Whether the topic is gone.
    fn gone(&self) -> Option<GoneReason>;
    /// The last call.
    fn leave(&mut self);
}

/// The publisher of an exclusive topic, or a channel's sender; slots have room for `W` words.
pub(crate) struct SlotPort<const W: usize, E> {
    end: E,
    arena: Arena,
    allocator: Allocator,
    max_batch: usize,
}

impl<const W: usize, E: SlotEnd> SlotPort<W, E> {
    /// `live` are the spans that the ring refers to, in order.
    fn new(end: E, arena: Arena, live: impl Iterator<Item = (u64, Span)>, most: u64) -> Self {
        let live = live.filter(|(_, span)| arena.contains(*span));
        let live =
            live.map(|(position, span)| Live { position, offset: span.offset, end: span.offset + span.len.max(1) });
        let allocator = Allocator::new(arena.len_bytes(), live.collect());
        SlotPort { end, arena, allocator, max_batch: (most as usize).min(MAX_BATCH) }
    }

    /// Arena space for `len` bytes.
    fn allocate(&mut self, len: u64) -> Result<Span, Stop> {
        let bytes = len.max(1);
        if self.allocator.find(bytes, ARENA_ALIGN).is_none() {
            self.end.reclaim(&mut self.allocator, bytes)?;
        }
        let offset = self.allocator.find(bytes, ARENA_ALIGN).ok_or(Stop::Corrupt("arena space did not come back"))?;
        Ok(Span { offset, len })
    }

    fn commit_span(&mut self, span: Span) -> u64 {
        let position = self.end.next();
        self.end.fill(0, Body::Span(span));
        self.end.commit(0, Body::Span(span));
        self.allocator.commit(position, span.offset, span.len.max(1));
        self.end.advance(1);
        position
    }

    /// Stores a whole batch, uncommitted. Returns where each message's payload went, `None` for its own slot.
    fn fill_batch(&mut self, batch: &[&[u8]]) -> Result<Vec<Option<Span>>, Stop> {
        let is_large = |bytes: &&&[u8]| bytes.len() > Slot::<W>::INLINE_BYTES;
        let large: u64 = batch.iter().filter(is_large).map(|bytes| room(bytes.len() as u64)).sum();
        let mut offset = if large > 0 { self.allocate(large)?.offset } else { 0 };
        let fill = |(ahead, bytes): (u64, &&[u8])| {
            if !is_large(&bytes) {
                self.end.fill(ahead, Body::Inline(bytes));
                return None;
            }
            let span = Span { offset, len: bytes.len() as u64 };
            self.arena.write(span.offset, bytes);
            self.end.fill(ahead, Body::Span(span));
            offset += room(span.len);
            Some(span)
        };
        Ok((0..).zip(batch).map(fill).collect())
    }
}

impl<const W: usize, E: SlotEnd> WritePort for SlotPort<W, E> {
    #[inline(always)]
    fn publish_fast(&mut self, bytes: &[u8]) -> Option<u64> {
        if bytes.len() > Slot::<W>::INLINE_BYTES || !self.end.is_ready() {
            return None;
        }
        let position = self.end.next();
        self.end.fill(0, Body::Inline(bytes));
        self.end.commit(0, Body::Inline(bytes));
        self.end.advance(1);
        Some(position)
    }

    fn publish(&mut self, bytes: &[u8]) -> Result<u64, Stop> {
        self.end.reserve(1)?;
        if bytes.len() > Slot::<W>::INLINE_BYTES {
            let span = self.allocate(bytes.len() as u64)?;
            self.arena.write(span.offset, bytes);
            return Ok(self.commit_span(span));
        }
        let body = Body::Inline(bytes);
        self.end.fill(0, body);
        self.end.commit(0, body);
        self.end.advance(1);
        Ok(self.end.next() - 1)
    }

    fn publish_batch(&mut self, batch: &[&[u8]]) -> Result<u64, Stop> {
        self.end.reserve(batch.len() as u64)?;
        let first = self.end.next();
        let spans = self.fill_batch(batch)?;
        // From the last to the first: readers pass the first only when all are there.
        for (ahead, (span, bytes)) in spans.iter().zip(batch).enumerate().rev() {
            self.end.commit(ahead as u64, span.map_or(Body::Inline(bytes), Body::Span));
        }
        for (position, span) in (first..).zip(spans) {
            if let Some(span) = span {
                self.allocator.commit(position, span.offset, span.len);
            }
        }
        self.end.advance(batch.len() as u64);
        Ok(first)
    }

    fn lend(&mut self, len: u64) -> Result<Span, Stop> {
        self.end.reserve(1)?;
        self.allocate(len)
    }

    fn pointer(&self, span: Span) -> *mut u8 {
        self.arena.pointer(span)
    }

    fn publish_lent(&mut self, span: Span) -> Result<u64, Stop> {
        self.end.reserve(1)?;
        Ok(self.commit_span(span))
    }

    fn space_bell(&self) -> &Doorbell {
        self.end.space_bell()
    }

    #[inline]
    fn gone(&self) -> Option<GoneReason> {
        self.end.gone()
    }

    fn inline_bytes(&self) -> usize {
        Slot::<W>::INLINE_BYTES
    }

    fn max_batch(&self) -> usize {
        self.max_batch
    }

    fn leave(&mut self) {
        self.end.leave();
    }
}

/// The port of an exclusive topic's publisher.
pub(crate) fn exclusive<const W: usize>(
    writer: exclusive::Writer<W>,
    arena: Arena,
    messages: u64,
) -> SlotPort<W, exclusive::Writer<W>> {
    let log = writer.log().clone();
    // Acquire: A-FLOOR, as in the gate; what lies below is no longer ours to keep.
    let floor = log.header.floor.0.load(Ordering::Acquire);
    let live = (floor..writer.next()).filter_map(|position| Some((position, log.span_at(position)?)));
    SlotPort::new(writer, arena, live, messages)
}

impl<const W: usize> SlotEnd for exclusive::Writer<W> {
    #[inline]
    fn next(&self) -> u64 {
        self.next()
    }

    #[inline(always)]
    fn is_ready(&mut self) -> bool {
        self.has_room() && !self.log().readers.readers.wants_attention()
    }

    #[inline]
    fn reserve(&mut self, count: u64) -> Result<(), Stop> {
        self.reserve(count)
    }

    #[inline]
    fn fill(&self, ahead: u64, body: Body<'_>) {
        self.fill(ahead, body);
    }

    #[inline]
    fn commit(&self, ahead: u64, body: Body<'_>) {
        self.commit(ahead, body);
    }

    #[inline]
    fn advance(&mut self, count: u64) {
        self.advance(count);
        self.notify();
    }

    fn reclaim(&mut self, allocator: &mut Allocator, bytes: u64) -> Result<(), Stop> {
        let give_up_below = allocator.floor_for(bytes, ARENA_ALIGN).ok_or(Stop::Corrupt("arena too small"))?;
        self.make_room(1, give_up_below, arena_slack(allocator))?;
        // Acquire: A-FLOOR: readers of what lies below have finished.
        allocator.reclaim(self.log().header.floor.0.load(Ordering::Acquire));
        Ok(())
    }

    fn space_bell(&self) -> &Doorbell {
        &self.log().readers.writers
    }

    #[inline]
    fn gone(&self) -> Option<GoneReason> {
        if self.log().readers.readers.wants_attention() { reason(&self.log().header) } else { None }
    }

    fn leave(&mut self) {
        self.checkpoint();
    }
}

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

    fn space_bell(&self) -> &Doorbell {
        &self.sender.channel().header.writers
    }

    #[inline]
    fn gone(&self) -> Option<GoneReason> {
        let header = &self.sender.channel().header;
        if !header.readers.wants_attention() {
            return None;
        }
        header.ended().or_else(|| header.is_closed(spsc::End::Receiver).then_some(GoneReason::Closed))
    }

    fn leave(&mut self) {
        if self.stand_alone {
            self.sender.channel().header.close(spsc::End::Sender);
        }
    }
}

/// What a payload of `len` bytes takes up among others in an arena.
fn room(len: u64) -> u64 {
    len.next_multiple_of(ARENA_ALIGN)
}

/// One publisher of a topic with many.
pub(crate) struct ManyPort {
    writer: many::Writer,
    info: SharedInfo,
    slot: u32,
    publisher: u64,
    /// The number of the next message.
    number: u64,
    arena: Arena,
    allocator: Allocator,
}

impl ManyPort {
    pub(crate) fn new(writer: many::Writer, info: SharedInfo, slot: u32, publisher: u64, arena: Arena) -> Self {
        let log = writer.log();
        // Acquire: A-FLOOR, as in the gate.
        let floor = log.header.floor.0.load(Ordering::Acquire);
        let live: VecDeque<Live> = (floor..writer.at().position)
            .filter_map(|position| {
                let (owner, offset) = locate(&info.geometry, log.committed(position)?.unit());
                let record = if owner == slot { Record::read(&arena, offset)? } else { return None };
                Some(Live { position, offset, end: offset + RECORD_HEADER_BYTES + record.body_bytes })
            })
            .collect();
        let allocator = Allocator::new(arena.len_bytes(), live);
        ManyPort { writer, info, slot, publisher, number: 1, arena, allocator }
    }

    /// Arena space for a record with a body of `body` bytes.
    fn allocate(&mut self, body: u64) -> Result<u64, Stop> {
        let bytes = RECORD_HEADER_BYTES + body;
        if let Some(offset) = self.allocator.find(bytes, ARENA_ALIGN) {
            return Ok(offset);
        }
        // Acquire: A-FLOOR: others may have raised it for us.
        self.allocator.reclaim(self.writer.log().header.floor.0.load(Ordering::Acquire));
        if let Some(offset) = self.allocator.find(bytes, ARENA_ALIGN) {
            return Ok(offset);
        }
        let give_up_below = self.allocator.floor_for(bytes, ARENA_ALIGN).ok_or(Stop::Corrupt("arena too small"))?;
        self.writer.make_room(give_up_below, arena_slack(&self.allocator))?;
        self.allocator.reclaim(self.writer.log().header.floor.0.load(Ordering::Acquire));
        self.allocator.find(bytes, ARENA_ALIGN).ok_or(Stop::Corrupt("the floor went back"))
    }

    fn commit(&mut self, offset: u64, body: u64, count: u64) -> Result<u64, Stop> {
        Record::write(&self.arena, offset, self.publisher, body, self.number);
        let unit = unit_of(&self.info.geometry, self.slot, offset);
        let place = self.writer.publish(&self.arena, offset, unit, count)?;
        self.allocator.commit(place.position, offset, RECORD_HEADER_BYTES + body);
        self.number += count;
        self.writer.notify();
        Ok(place.sequence)
    }
}

impl WritePort for ManyPort {
    fn publish(&mut self, bytes: &[u8]) -> Result<u64, Stop> {
        let body = bytes.len() as u64;
        let offset = self.allocate(body)?;
        self.arena.write(offset + RECORD_HEADER_BYTES, bytes);
        self.commit(offset, body, 1)
    }

    fn publish_batch(&mut self, batch: &[&[u8]]) -> Result<u64, Stop> {
        if let [bytes] = batch {
            return self.publish(bytes);
        }
        let align = self.info.batch_align();
        let table = (batch.len() as u64 * 4).next_multiple_of(align);
        let body = table + batch.iter().map(|b| (b.len() as u64).next_multiple_of(align)).sum::<u64>();
        let offset = self.allocate(body)?;
        let start = offset + RECORD_HEADER_BYTES;
        for (index, pair) in (0u64..).zip(batch.chunks(2)) {
            let second = pair.get(1).map_or(0, |b| b.len() as u64);
            self.arena.store(start + index * 8, second << 32 | pair[0].len() as u64);
        }
        let mut at = start + table;
        for bytes in batch {
            self.arena.write(at, bytes);
            at += (bytes.len() as u64).next_multiple_of(align);
        }
        self.commit(offset, body, batch.len() as u64)
    }

    fn lend(&mut self, len: u64) -> Result<Span, Stop> {
        let offset = self.allocate(len)?;
        Ok(Span { offset: offset + RECORD_HEADER_BYTES, len })
    }

    fn pointer(&self, span: Span) -> *mut u8 {
        self.arena.pointer(span)
    }

    fn publish_lent(&mut self, span: Span) -> Result<u64, Stop> {
        self.commit(span.offset - RECORD_HEADER_BYTES, span.len, 1)
    }

    fn space_bell(&self) -> &Doorbell {
        &self.writer.log().readers.writers
    }

    #[inline]
    fn gone(&self) -> Option<GoneReason> {
        if self.writer.log().readers.readers.wants_attention() { reason(&self.writer.log().header) } else { None }
    }

    fn inline_bytes(&self) -> usize {
        0
    }

    fn max_batch(&self) -> usize {
        MAX_BATCH
    }

    fn leave(&mut self) {
        self.writer.checkpoint();
    }
}
