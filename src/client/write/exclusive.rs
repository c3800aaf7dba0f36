//! An exclusive topic's publisher as a [`SlotEnd`].

use super::arena_slack;
use super::runs::Run;
use super::slots::{SlotEnd, SlotPort};
use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Arena};
use crate::ring::cursor::{Cursor, Readers, readers};
use crate::ring::doorbell::Doorbell;
use crate::ring::exclusive;
use crate::ring::gate::Stop;
use crate::ring::slot::Body;
use crate::shm::layout::ARENA_ALIGN;
use crate::shm::shared::Shared;
use crate::sync::Ordering;

/// The port of an exclusive topic's publisher.
pub(crate) fn exclusive<const W: usize>(
    writer: exclusive::Writer<W>,
    arena: Arena,
    messages: u64,
    dedup: bool,
) -> SlotPort<W, exclusive::Writer<W>> {
    let log = writer.log().clone();
    // Acquire: A-FLOOR, as in the gate; what lies below is no longer ours to keep.
    let floor = log.header.floor.0.load(Ordering::Acquire);
    let oldest = floor.max(writer.next().saturating_sub(log.ring.len()));
    let live = (oldest..writer.next()).filter_map(|position| Some((position, log.span_at(position)?)));
    let port = SlotPort::new(writer, arena, live, messages);
    if dedup { port.with_ids() } else { port }
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

    fn space_bell(&self) -> Shared<Doorbell> {
        self.log().readers.part(|header| &header.writers)
    }

    fn cursors(&self) -> &[Cursor] {
        &self.log().cursors
    }

    #[inline]
    fn gone(&self) -> Option<GoneReason> {
        if self.log().readers.readers.wants_attention() { self.log().header.gone() } else { None }
    }

    fn runs_of(&self, publisher: u64) -> Vec<Run> {
        let log = self.log();
        // Acquire: A-FLOOR, as in the gate.
        let oldest = log.header.floor.0.load(Ordering::Acquire).max(self.next().saturating_sub(log.ring.len()));
        let number = |position: u64| {
            let (owner, number) = log.header.publisher_at(log.tenancy_at(position)?, position)?;
            (owner == publisher).then_some(Run { number, sequence: position, count: 1 })
        };
        (oldest..self.next()).filter_map(number).collect()
    }

    fn readers(&self) -> Readers {
        readers(&self.log().readers, &self.log().cursors)
    }

    fn oldest(&self) -> u64 {
        // At most a lap, whatever the memory says.
        let intent = self.log().header.announced();
        intent.max(self.next().saturating_sub(self.log().ring.len()))
    }

    fn read_body(&self, position: u64, arena: &Arena, buffer: &mut [u8]) -> usize {
        let slot = self.log().ring.at(position);
        if let Some(span) = self.log().span_at(position).filter(|span| arena.contains(*span)) {
            let len = buffer.len().min(span.len as usize);
            arena.read(span.offset, &mut buffer[..len]);
            return len;
        }
        let len = self.log().inline_at(position).unwrap_or(0).min(buffer.len()).min(W * 8);
        slot.read(&mut buffer[..len]);
        len
    }

    fn leave(&mut self) {
        self.checkpoint();
    }
}
