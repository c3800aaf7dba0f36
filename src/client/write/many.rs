//! One publisher of a topic with many.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};

use super::runs::Run;
use super::{WritePort, arena_slack};
use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Arena, Live, Span};
use crate::ring::cursor::{Cursor, Readers, readers};
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::{Stop, still_retained};
use crate::ring::many::{self, Record};
use crate::shm::layout::{ARENA_ALIGN, MAX_BATCH, RECORD_HEADER_BYTES};
use crate::shm::segment::{Access, Segment};
use crate::shm::topic::{self, SharedInfo, locate, unit_of};
use crate::sync::{Ordering, fence};

/// The arenas of other slots, where messages of the same name may lie: mapped when they are first needed.
pub(crate) struct Others {
    given: BTreeMap<u32, OwnedFd>,
    mapped: BTreeMap<u32, Arena>,
}

impl Others {
    /// What the coordinator handed out.
    pub(crate) fn new(given: impl IntoIterator<Item = (u32, OwnedFd)>) -> Self {
        Others { given: given.into_iter().collect(), mapped: BTreeMap::new() }
    }

    /// A slot's arena, if it was there when we came and is what was promised.
    fn arena(&mut self, slot: u32, info: &SharedInfo) -> Option<&Arena> {
        if let Some(fd) = self.given.remove(&slot)
            && let Ok(segment) = Segment::attach(fd.as_fd(), &info.arena(slot), Access::ReadOnly)
        {
            self.mapped.insert(slot, topic::arena(&segment, &info.geometry));
        }
        self.mapped.get(&slot)
    }
}

/// One publisher of a topic with many.
pub(crate) struct ManyPort {
    writer: many::Writer,
    info: SharedInfo,
    slot: u32,
    publisher: u64,
    /// The numbers of the first and the next message.
    first: u64,
    number: u64,
    /// What the note says instead, where what we publish belongs to messages of a group.
    noted: Option<u64>,
    arena: Arena,
    others: Others,
    allocator: Allocator,
}

impl ManyPort {
    /// `before`: the number of the message before the first.
    pub(crate) fn new(
        writer: many::Writer,
        info: SharedInfo,
        slot: u32,
        publisher: u64,
        before: u64,
        arena: Arena,
        others: Others,
    ) -> Self {
        let log = writer.log();
        // Acquire: A-FLOOR, as in the gate.
        let floor = log.header.floor.0.load(Ordering::Acquire);
        let tail = writer.at().position;
        let oldest = floor.max(tail.saturating_sub(log.ring.len()));
        let live: VecDeque<Live> = (oldest..tail)
            .filter_map(|position| {
                let word = log.committed(position).filter(|word| !word.is_fence())?;
                let (owner, offset) = locate(&info.geometry, word.unit());
                let record = if owner == slot { Record::read(&arena, offset)? } else { return None };
                Some(Live { position, offset, end: offset + RECORD_HEADER_BYTES + record.body_bytes })
            })
            .collect();
        let allocator = Allocator::new(arena.len_bytes(), live);
        let (first, number) = (before + 1, before + 1);
        ManyPort { writer, info, slot, publisher, first, number, noted: None, arena, others, allocator }
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
        let noted = self.noted.unwrap_or(self.number + count - 1);
        let place = self.writer.publish(&self.arena, offset, unit, count, noted)?;
        self.allocator.commit(place.position, offset, RECORD_HEADER_BYTES + body);
        self.number += count;
        self.writer.notify();
        Ok(place.sequence)
    }
}

impl WritePort for ManyPort {
    fn note_as(&mut self, input: u64) {
        self.noted = Some(input);
    }

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

    fn cursors(&self) -> &[Cursor] {
        &self.writer.log().cursors
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

    fn published(&self) -> u64 {
        self.number - self.first
    }

    fn runs_of(&mut self, publisher: u64) -> Vec<Run> {
        let log = self.writer.log();
        // Acquire: A-INTENT, as a joiner would look at it.
        let oldest = log.header.intent.0.load(Ordering::Acquire);
        let tail = log.tail_from(Some(self.writer.at())).map_or(oldest, |tail| tail.position);
        let mut runs = Vec::new();
        for position in oldest..tail {
            let Some(word) = log.committed(position).filter(|word| !word.is_fence()) else { continue };
            let (slot, offset) = locate(&self.info.geometry, word.unit());
            let arena = if slot == self.slot { Some(&self.arena) } else { self.others.arena(slot, &self.info) };
            let record = arena.and_then(|arena| Record::read(arena, offset));
            let sound = record.filter(|r| r.position == position && still_retained(&log.header, position));
            if let Some(record) = sound.filter(|record| record.publisher == publisher) {
                runs.push(Run { number: record.first_number, sequence: record.first_sequence, count: word.count() });
            }
        }
        runs
    }

    fn leave(&mut self) {
        self.writer.checkpoint();
    }
}
