//! Rings of slots, seen from their one writing end: exclusive topics and channels.

use super::WritePort;
use super::ids::Ids;
use super::runs::Run;
use crate::client::envelope::{ID_WITHIN_BYTES, id_in};
use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Arena, Live, Span};
use crate::ring::cursor::{Cursor, Readers};
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::Stop;
use crate::ring::slot::{Body, Slot};
use crate::shm::layout::{ARENA_ALIGN, MAX_BATCH};
use crate::shm::shared::Shared;

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
    fn space_bell(&self) -> Shared<Doorbell>;
    /// Every reader's cursor.
    fn cursors(&self) -> &[Cursor];
    /// Whether the topic is gone.
    fn gone(&self) -> Option<GoneReason>;
    /// Where the retained messages of a publisher are.
    fn runs_of(&self, publisher: u64) -> Vec<Run>;
    /// Who reads; stale at once.
    fn readers(&self) -> Readers;
    /// Messages from this position on are retained.
    fn oldest(&self) -> u64 {
        self.next()
    }
    /// Copies the beginning of what was published at a retained position; how many bytes it has.
    fn read_body(&self, _position: u64, _arena: &Arena, _buffer: &mut [u8]) -> usize {
        0
    }
    /// The last call.
    fn leave(&mut self);
}

/// The publisher of an exclusive topic, or a channel's sender; slots have room for `W` words.
pub(crate) struct SlotPort<const W: usize, E> {
    end: E,
    arena: Arena,
    allocator: Allocator,
    max_batch: usize,
    /// The position of the first message.
    start: u64,
    /// Where ids are compared.
    ids: Option<Ids>,
}

impl<const W: usize, E: SlotEnd> SlotPort<W, E> {
    /// `live` are the spans that the ring refers to, in order.
    pub(super) fn new(end: E, arena: Arena, live: impl Iterator<Item = (u64, Span)>, most: u64) -> Self {
        let live = live.filter(|(_, span)| arena.contains(*span));
        let live =
            live.map(|(position, span)| Live { position, offset: span.offset, end: span.offset + span.len.max(1) });
        let allocator = Allocator::new(arena.len_bytes(), live.collect());
        let start = end.next();
        SlotPort { end, arena, allocator, max_batch: (most as usize).min(MAX_BATCH), start, ids: None }
    }

    /// Refuses ids that are there already.
    pub(super) fn with_ids(self) -> Self {
        SlotPort { ids: Some(Ids::default()), ..self }
    }

    /// Whether these bodies' ids are new. Nobody else publishes, so what is there now is there before them.
    fn check_ids(&mut self, bodies: &[&[u8]]) -> Result<(), Stop> {
        let SlotPort { end, arena, ids: Some(ids), .. } = self else { return Ok(()) };
        if bodies.iter().all(|body| id_in(body).is_none()) {
            return Ok(());
        }
        let mut buffer = [0; ID_WITHIN_BYTES.next_multiple_of(8)];
        ids.catch_up(end.oldest(), end.next(), |position, found| {
            let len = end.read_body(position, arena, &mut buffer);
            id_in(&buffer[..len]).into_iter().for_each(|id| found(id, position));
            Ok(())
        })?;
        ids.check(bodies.iter().copied())
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
        self.check_ids(&[bytes])?;
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
        self.check_ids(batch)?;
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

    fn space_bell(&self) -> Shared<Doorbell> {
        self.end.space_bell()
    }

    fn cursors(&self) -> &[Cursor] {
        self.end.cursors()
    }

    #[inline]
    fn gone(&self) -> Option<GoneReason> {
        self.end.gone()
    }

    fn readers(&self) -> Readers {
        self.end.readers()
    }

    fn inline_bytes(&self) -> usize {
        Slot::<W>::INLINE_BYTES
    }

    fn max_batch(&self) -> usize {
        self.max_batch
    }

    fn published(&self) -> u64 {
        self.end.next() - self.start
    }

    fn runs_of(&mut self, publisher: u64) -> Vec<Run> {
        self.end.runs_of(publisher)
    }

    fn leave(&mut self) {
        self.end.leave();
    }
}

/// What a payload of `len` bytes takes up among others in an arena.
fn room(len: u64) -> u64 {
    len.next_multiple_of(ARENA_ALIGN)
}
