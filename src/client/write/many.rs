//! One publisher of a topic with many.

use std::collections::VecDeque;

use super::{WritePort, arena_slack};
use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Arena, Live, Span};
use crate::ring::cursor::{Readers, readers};
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::Stop;
use crate::ring::many::{self, Record};
use crate::shm::layout::{ARENA_ALIGN, MAX_BATCH, RECORD_HEADER_BYTES};
use crate::shm::topic::{SharedInfo, locate, unit_of};
use crate::sync::{Ordering, fence};

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
        let tail = writer.at().position;
        let oldest = floor.max(tail.saturating_sub(log.ring.len()));
        let live: VecDeque<Live> = (oldest..tail)
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
        // Release: R-COPY pairs with A-COPY (still_retained): whoever raised that floor announced it before we write.
        fence(Ordering::Release);
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
        if self.writer.log().readers.readers.wants_attention() { self.writer.log().header.gone() } else { None }
    }

    fn readers(&self) -> Readers {
        let log = self.writer.log();
        readers(&log.readers, &log.cursors)
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
