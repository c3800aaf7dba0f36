//! One publisher of a topic with many.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::ids::Ids;
use super::runs::Run;
use super::{WritePort, arena_slack};
use crate::client::control::Control;
use crate::client::envelope::{ID_WITHIN_BYTES, id_in};
use crate::error::GoneReason;
use crate::ring::arena::{Allocator, Arena, Live, Span};
use crate::ring::cursor::{Cursor, Readers, readers};
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::{Stop, still_retained};
use crate::ring::many::{self, EntryWord, ManyLog, Record};
use crate::shm::layout::{ARENA_ALIGN, MAX_BATCH, RECORD_HEADER_BYTES};
use crate::shm::segment::{Access, Segment};
use crate::shm::shared::Shared;
use crate::shm::topic::{self, SharedInfo, locate, unit_of};
use crate::sync::{Ordering, fence};

/// The arenas of other slots, where messages of the same name may lie: mapped when they are first needed.
pub(crate) struct Others {
    given: BTreeMap<u32, OwnedFd>,
    mapped: BTreeMap<u32, Arena>,
    /// Who knows of later ones.
    control: Option<Arc<Control>>,
    /// Whether it was asked since this walk along the log began, and an arena was not there.
    asked: bool,
}

impl Others {
    /// What the coordinator handed out.
    pub(crate) fn new(given: impl IntoIterator<Item = (u32, OwnedFd)>) -> Self {
        Others { given: given.into_iter().collect(), mapped: BTreeMap::new(), control: None, asked: false }
    }

    /// And those that come later, which the coordinator announces.
    pub(crate) fn and_later(self, control: Arc<Control>) -> Self {
        Others { control: Some(control), ..self }
    }

    /// A slot's arena, if it was there when we came, or has been announced since, and is what was promised.
    fn arena(&mut self, slot: u32, info: &SharedInfo) -> Option<&Arena> {
        if !self.mapped.contains_key(&slot)
            && slot < info.options.max_publishers
            && let Some(fd) = self.given.remove(&slot).or_else(|| self.announced(info.id, slot))
            && let Ok(segment) = Segment::attach(fd.as_fd(), &info.arena(slot), Access::ReadOnly)
        {
            self.mapped.insert(slot, topic::arena(&segment, &info.geometry));
        }
        self.mapped.get(&slot)
    }

    /// An arena that came into being after us. Of all garbled entries of a walk one costs a question: the arenas of what lies
    /// below its end were announced before the answer.
    fn announced(&mut self, topic: u64, slot: u32) -> Option<OwnedFd> {
        let control = self.control.as_ref()?;
        if self.asked {
            return control.announced_arena(topic, slot);
        }
        let announced = control.arena(topic, slot);
        self.asked = announced.is_none();
        announced
    }
}

/// What a publisher reads of the records of all.
struct Records<'a> {
    info: &'a SharedInfo,
    /// Its own slot and arena.
    slot: u32,
    arena: &'a Arena,
    others: &'a mut Others,
}

impl<'a> Records<'a> {
    /// For one walk along the log, whose end is known.
    fn new(info: &'a SharedInfo, slot: u32, arena: &'a Arena, others: &'a mut Others) -> Self {
        others.asked = false;
        Records { info, slot, arena, others }
    }

    /// The arena and place of the record at `position`, with its entry's word; `None` where there is none, or it has
    /// been overwritten.
    fn at(&mut self, log: &ManyLog, position: u64) -> Result<Option<(EntryWord, &Arena, u64, Record)>, Stop> {
        let Some(word) = log.committed(position).filter(|word| !word.is_fence()) else { return Ok(None) };
        let (slot, offset) = locate(&self.info.geometry, word.unit());
        let arena = if slot == self.slot { Some(self.arena) } else { self.others.arena(slot, self.info) };
        let arena = arena.ok_or(Stop::Corrupt("an entry points to no arena"))?;
        let record = Record::read(arena, offset).filter(|record| record.position == position);
        let sound = record.filter(|_| still_retained(&log.header, position));
        Ok(sound.map(|record| (word, arena, offset + RECORD_HEADER_BYTES, record)))
    }

    /// Tells the ids of the messages at `position`, as far as they are retained, with their sequences.
    fn ids_at(&mut self, log: &ManyLog, position: u64, found: &mut dyn FnMut(&[u8], u64)) -> Result<(), Stop> {
        let align = self.info.batch_align();
        let Some((word, arena, start, record)) = self.at(log, position)? else { return Ok(()) };
        let table = if word.count() == 1 { 0 } else { (word.count() * 4).next_multiple_of(align) };
        // Garbled: whoever reads the batch will say so.
        if table > record.body_bytes {
            return Ok(());
        }
        let (mut at, end) = (start + table, start + record.body_bytes);
        let mut buffer = [0; ID_WITHIN_BYTES.next_multiple_of(8)];
        for index in 0..word.count() {
            let len = match word.count() {
                1 => record.body_bytes,
                _ => arena.load(start + index / 2 * 8) >> (index % 2 * 32) & u64::from(u32::MAX),
            };
            // Garbled, or overwritten: whoever reads the message will say so.
            if at.saturating_add(len) > end {
                return Ok(());
            }
            let body = &mut buffer[..(len as usize).min(ID_WITHIN_BYTES)];
            arena.read(at, body);
            if !still_retained(&log.header, position) {
                return Ok(());
            }
            id_in(body).into_iter().for_each(|id| found(id, record.first_sequence + index));
            at += len.next_multiple_of(align);
        }
        Ok(())
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
    /// Where ids are compared.
    ids: Option<Ids>,
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
        let ids = info.options.dedup.then(Ids::default);
        ManyPort { writer, info, slot, publisher, first, number, noted: None, arena, others, ids, allocator }
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

    /// Commits the record at `offset`, whose body has `body` bytes: these messages.
    fn commit(&mut self, offset: u64, body: u64, messages: &[&[u8]]) -> Result<u64, Stop> {
        let count = messages.len() as u64;
        Record::write(&self.arena, offset, self.publisher, body, self.number);
        let unit = unit_of(&self.info.geometry, self.slot, offset);
        let last = self.noted.unwrap_or(self.number + count - 1);
        let ManyPort { writer, info, arena, others, ids, .. } = self;
        let slot = self.slot;
        let with_id = messages.iter().any(|body| id_in(body).is_some());
        let place = match ids.as_mut().filter(|_| with_id) {
            None => writer.publish(arena, offset, unit, count, last, |_, _| Ok(()))?,
            Some(ids) => writer.publish(arena, offset, unit, count, last, |log, at| {
                let oldest = oldest_retained(log, at.position);
                let mut records = Records::new(info, slot, arena, others);
                ids.catch_up(oldest, at.position, |position, found| records.ids_at(log, position, found))?;
                ids.check(messages.iter().copied())
            })?,
        };
        self.allocator.commit(place.position, offset, RECORD_HEADER_BYTES + body);
        self.number += count;
        self.writer.notify();
        Ok(place.sequence)
    }
}

/// Where what is retained below `tail` begins; at most a lap of it, whatever the memory says.
fn oldest_retained(log: &ManyLog, tail: u64) -> u64 {
    log.header.announced().max(tail.saturating_sub(log.ring.len()))
}

impl WritePort for ManyPort {
    fn note_as(&mut self, input: u64) {
        self.noted = Some(input);
    }

    fn has_id(&self, id: &[u8]) -> bool {
        self.ids.as_ref().is_some_and(|ids| ids.has(id))
    }

    fn publish(&mut self, bytes: &[u8]) -> Result<u64, Stop> {
        let body = bytes.len() as u64;
        let offset = self.allocate(body)?;
        self.arena.write(offset + RECORD_HEADER_BYTES, bytes);
        self.commit(offset, body, &[bytes])
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
        self.commit(offset, body, batch)
    }

    fn lend(&mut self, len: u64) -> Result<Span, Stop> {
        let offset = self.allocate(len)?;
        Ok(Span { offset: offset + RECORD_HEADER_BYTES, len })
    }

    fn pointer(&self, span: Span) -> *mut u8 {
        self.arena.pointer(span)
    }

    fn publish_lent(&mut self, span: Span) -> Result<u64, Stop> {
        // What is lent has no id.
        self.commit(span.offset - RECORD_HEADER_BYTES, span.len, &[&[]])
    }

    fn space_bell(&self) -> Shared<Doorbell> {
        self.writer.log().readers.part(|header| &header.writers)
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
        let log = self.writer.log().clone();
        let log = &log;
        let Some(tail) = log.tail_from(Some(self.writer.at())).map(|tail| tail.position) else { return Vec::new() };
        let oldest = oldest_retained(log, tail);
        let ManyPort { info, arena, others, .. } = self;
        let mut records = Records::new(info, self.slot, arena, others);
        let mut runs = Vec::new();
        for position in oldest..tail {
            let Ok(Some((word, _, _, record))) = records.at(log, position) else { continue };
            if record.publisher == publisher {
                runs.push(Run { number: record.first_number, sequence: record.first_sequence, count: word.count() });
            }
        }
        runs
    }

    fn leave(&mut self) {
        self.writer.checkpoint();
    }
}
