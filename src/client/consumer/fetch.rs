//! Reads any message between a group's floor and the topic's tail.
//!
//! Nothing here is certain by itself: while we read, other consumers may settle the message and publishers overwrite it.
//! The caller compares the message's word afterwards; what was read counts only if that is unchanged.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::copies::{Copies, Copy};
use crate::client::control::Control;
use crate::client::read::Lengths;
use crate::coordinator::protocol::TopicInfo;
use crate::os::cache::prefetch_line;
use crate::ring::arena::{Arena, Span};
use crate::ring::exclusive::ExclusiveLog;
use crate::ring::gate::still_retained;
use crate::ring::log::{LogHeader, MAX_PLACE, Patience, Place, find_place};
use crate::ring::many::{self, EntryWord, ManyLog, Record};
use crate::ring::slot::{Kind, Slot};
use crate::shm::layout::RECORD_HEADER_BYTES;
use crate::shm::segment::{Access, Segment};
use crate::shm::topic::{self, Arenas, SharedInfo, locate};

/// Who published, in the log's own terms: index and position of a tenancy, or publisher and number.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Origin(u64, u64);

/// Times that one look goes on from the group's line, because the ring was overwritten where it stood: others have then settled a
/// whole lap between two steps. Each look also steps over a lap of entries at most. What it looks for was committed before it began,
/// and from the first entry that it finds not overwritten, no more lie between.
const JUMPS: u32 = 4;

/// What was found at a sequence.
pub(super) enum Got {
    Message(Copy, Origin),
    /// A sequence without message.
    Hole,
    /// Nothing that makes sense: overwritten, or garbage.
    Unsound(&'static str),
}

const BAD_LENGTH: Got = Got::Unsound("a message's length does not fit its place");
const NOT_THERE: Got = Got::Unsound("a message that was handed out is not in the ring");

/// The topic's log, as a consumer reads it.
#[expect(clippy::large_enum_variant, reason = "one a consumer, and never moved")]
pub(super) enum Log {
    Exclusive(SlotLog<7>),
    ExclusiveSmall(SlotLog<1>),
    Many(EntryLog),
}

/// Runs `$body` with the log inside `$log`, whichever kind it is.
macro_rules! with_log {
    ($log:expr, $name:ident => $body:expr) => {
        match $log {
            Log::Exclusive($name) => $body,
            Log::ExclusiveSmall($name) => $body,
            Log::Many($name) => $body,
        }
    };
}

impl Log {
    /// The end of what is committed from `from` on, looking no further than `to`. `from` is not beyond the tail.
    #[inline]
    pub(super) fn committed_end(&mut self, from: u64, to: u64) -> u64 {
        with_log!(self, log => log.committed_end(from, to))
    }

    /// Asks for the memory of a message that will be read soon.
    #[inline]
    pub(super) fn prefetch(&self, sequence: u64) {
        match self {
            Log::Exclusive(log) => prefetch_line(log.log.ring.at(sequence).pointer()),
            Log::ExclusiveSmall(log) => prefetch_line(log.log.ring.at(sequence).pointer()),
            // Its record is known only from the entry, and entries are read in order.
            Log::Many(_) => {}
        }
    }

    /// Copies the message's body out: envelope, where the topic has them, and payload. `sequence` is below the tail.
    #[inline]
    pub(super) fn read(&mut self, sequence: u64, copies: &mut Copies) -> Got {
        with_log!(self, log => log.read(sequence, copies))
    }

    /// Publisher and its number of a message, as far as they are known.
    pub(super) fn publisher_of(&self, origin: Origin) -> Option<(u64, u64)> {
        let Origin(first, second) = origin;
        match self {
            Log::Many(_) => Some((first, second)),
            _ => self.header().publisher_at(first as u8, second),
        }
    }

    /// The ring position that holds sequence `floor`, or a lower one: what the group's line may be raised to.
    pub(super) fn position_of_floor(&mut self, floor: u64) -> u64 {
        match self {
            Log::Many(log) => log.position_of_floor(floor),
            _ => floor,
        }
    }

    pub(super) fn header(&self) -> &LogHeader {
        match self {
            Log::Exclusive(log) => &log.log.header,
            Log::ExclusiveSmall(log) => &log.log.header,
            Log::Many(log) => &log.log.header,
        }
    }
}

/// An exclusive topic's log: sequence = position.
pub(super) struct SlotLog<const W: usize> {
    log: ExclusiveLog<W>,
    arena: Arena,
    lengths: Lengths,
    /// Everything below is committed: the publisher's checkpoint as last seen.
    known_end: u64,
}

impl<const W: usize> SlotLog<W> {
    pub(super) fn new(log: ExclusiveLog<W>, arena: Arena, info: &TopicInfo) -> Self {
        SlotLog { log, arena, lengths: Lengths::of(info), known_end: 0 }
    }

    #[inline]
    fn committed_end(&mut self, from: u64, to: u64) -> u64 {
        if from >= self.known_end {
            // A line a chunk of messages instead of a line each.
            self.known_end = self.log.header.checkpoint(0).map_or(0, |place| place.position);
        }
        if from < self.known_end {
            return to.min(self.known_end);
        }
        // No more is committed at a time: who writes faster than this has the rest looked at later.
        let to = to.min(from.saturating_add(self.log.ring.len()));
        let mut end = from;
        while end < to && self.log.committed(end).is_some() {
            end += 1;
        }
        end
    }

    #[inline]
    fn read(&mut self, sequence: u64, copies: &mut Copies) -> Got {
        let Some(word) = self.log.committed(sequence) else { return NOT_THERE };
        let slot = self.log.ring.at(sequence);
        let origin = Origin(word.tenancy().into(), sequence);
        match word.kind() {
            Kind::Inline => {
                let len = word.length();
                if len > Slot::<W>::INLINE_BYTES || !self.lengths.allow(len as u64) {
                    return BAD_LENGTH;
                }
                let (copy, bytes) = copies.add(len);
                slot.read(bytes);
                Got::Message(copy, origin)
            }
            Kind::Arena => {
                let span = slot.read_span();
                if !self.arena.contains(span) || !self.lengths.allow(span.len) {
                    return BAD_LENGTH;
                }
                let (copy, bytes) = copies.add(span.len as usize);
                self.arena.read(span.offset, bytes);
                Got::Message(copy, origin)
            }
            _ => Got::Hole,
        }
    }
}

/// The log of a topic with many publishers: a position holds a batch, so places are walked to.
pub(super) struct EntryLog {
    log: ManyLog,
    info: SharedInfo,
    lengths: Lengths,
    arenas: Arenas,
    control: Arc<Control>,
    /// The group's line.
    line: usize,
    /// The first entry that was not committed when last looked at, or one below.
    tail: many::Reader,
    /// The entry read from last.
    read: many::Reader,
    /// The entry that holds the floor, or one below.
    floor: many::Reader,
    batch: Option<OpenBatch>,
}

/// A batch that messages are read from.
#[derive(Clone, Copy)]
struct OpenBatch {
    place: Place,
    count: u64,
    record: Record,
    slot: u32,
    /// Where the length table begins.
    start: u64,
    /// The next message, and where its payload begins.
    index: u64,
    at: u64,
}

impl EntryLog {
    /// `place` is at or below the group's floor.
    pub(super) fn new(
        log: ManyLog,
        info: SharedInfo,
        arenas: Arenas,
        control: Arc<Control>,
        line: u32,
        place: Place,
    ) -> Self {
        let reader = || many::Reader::new(log.clone(), place.position, place.sequence);
        let (tail, read, floor, lengths) = (reader(), reader(), reader(), Lengths::of(&info));
        EntryLog { log, info, lengths, arenas, control, line: line as usize, tail, read, floor, batch: None }
    }

    fn committed_end(&mut self, from: u64, to: u64) -> u64 {
        let (mut jumps, mut steps) = (0, self.log.ring.len());
        while self.tail.next().sequence < to && jumps < JUMPS {
            match self.tail.walk_to(to - 1, &mut steps) {
                Some(many::Poll::Ready(word)) => self.tail.step(word),
                Some(many::Poll::Empty) | None => break,
                // Other consumers have settled all this, and publishers went on.
                Some(many::Poll::Lapped) => {
                    jumps += 1;
                    match self.place_beyond(self.tail.next()) {
                        Some(place) => self.tail.move_to(place),
                        None => break,
                    }
                }
            }
        }
        self.tail.next().sequence.clamp(from, to)
    }

    fn read(&mut self, sequence: u64, copies: &mut Copies) -> Got {
        let in_batch = |batch: &&OpenBatch| sequence.wrapping_sub(batch.place.sequence) < batch.count;
        let batch = match self.batch.as_ref().filter(in_batch) {
            Some(batch) => *batch,
            None => {
                let Some((place, word)) = self.find(sequence) else { return NOT_THERE };
                if word.is_fence() {
                    return Got::Hole;
                }
                match self.open(place, word) {
                    Ok(batch) => batch,
                    Err(problem) => return Got::Unsound(problem),
                }
            }
        };
        self.read_from(batch, sequence - batch.place.sequence, copies)
    }

    /// The entry that holds `sequence`.
    fn find(&mut self, sequence: u64) -> Option<(Place, EntryWord)> {
        if sequence < self.read.next().sequence {
            let place = self.search(sequence)?;
            self.read.move_to(place);
        }
        let (mut jumps, mut steps) = (0, self.log.ring.len());
        while jumps < JUMPS {
            match self.read.walk_to(sequence, &mut steps)? {
                many::Poll::Ready(word) => return Some((self.read.next(), word)),
                many::Poll::Empty => return None,
                many::Poll::Lapped => {
                    jumps += 1;
                    let beyond = self.place_beyond(self.read.next()).filter(|line| line.sequence <= sequence)?;
                    self.read.move_to(beyond);
                }
            }
        }
        None
    }

    /// The last entry at or above the group's line whose messages begin at or below `sequence`.
    fn search(&mut self, sequence: u64) -> Option<Place> {
        let mut low = self.line_place().filter(|line| line.sequence <= sequence)?;
        let mut high = self.read.next().position.max(low.position + 1);
        let mut patience = Patience::new();
        while low.position + 1 < high {
            let middle = low.position + (high - low.position) / 2;
            let place = self.place_at(middle, &mut patience).ok()??;
            if place.sequence <= sequence {
                low = place;
            } else {
                high = middle;
            }
        }
        Some(low)
    }

    /// Position and sequence of the entry at `position`, if it is there and so is the record that says its sequence. An error:
    /// it names an arena that is not there, and looking again would ask for it again.
    fn place_at(&mut self, position: u64, patience: &mut Patience) -> Result<Option<Place>, &'static str> {
        // A fence has no record; it takes one sequence, and so does each behind it.
        let with_record = self.log.past_fences(position);
        let fences = with_record - position;
        let first_sequence = match self.log.committed(with_record) {
            None => self.log.tail_from(None).filter(|tail| tail.position == with_record).map(|tail| tail.sequence),
            // Committed since it was looked at.
            Some(word) if word.is_fence() => None,
            Some(word) => {
                let (slot, offset) = locate(&self.info.geometry, word.unit());
                if !self.has_arena(slot) {
                    patience.aside(|| self.load_arena(slot))?;
                }
                let record = Record::read(self.arena(slot)?, offset);
                record.filter(|record| record.position == with_record).map(|record| record.first_sequence)
            }
        };
        let sequence = first_sequence.and_then(|first| first.checked_sub(fences));
        let sequence = sequence.filter(|_| still_retained(&self.log.header, position));
        Ok(sequence.map(|sequence| Place { position, sequence }))
    }

    /// Where the group's line stands, for who finds the ring overwritten at `place`: it must be further on, or one of them is
    /// garbage.
    #[cold]
    fn place_beyond(&mut self, place: Place) -> Option<Place> {
        // It only moves forward: where it is not beyond, no search is worth its while, which every look would make again.
        let at = self.log.cursors[self.line].place().filter(|line| line.position > place.position)?;
        self.line_place().filter(|line| line.position >= at.position)
    }

    /// Where the group's line stands: for who finds the ring overwritten where it stood.
    #[cold]
    fn line_place(&mut self) -> Option<Place> {
        // Others may raise the line while we look; each time it is a batch further on.
        let (log, line) = (self.log.clone(), self.line);
        let line = || log.cursors[line].place().map_or(MAX_PLACE, |place| place.position.min(MAX_PLACE));
        find_place(line, |position, patience| self.place_at(position, patience).transpose())?.ok()
    }

    fn position_of_floor(&mut self, floor: u64) -> u64 {
        let (mut jumps, mut steps) = (0, self.log.ring.len());
        while jumps < JUMPS && self.floor.walk_to(floor, &mut steps) == Some(many::Poll::Lapped) {
            jumps += 1;
            match self.place_beyond(self.floor.next()) {
                Some(place) => self.floor.move_to(place),
                None => break,
            }
        }
        self.floor.next().position
    }

    /// Opens the batch that `word`, found at `place`, points to.
    fn open(&mut self, place: Place, word: EntryWord) -> Result<OpenBatch, &'static str> {
        let (slot, offset) = locate(&self.info.geometry, word.unit());
        let record = Record::read(self.arena(slot)?, offset).ok_or("a record does not fit its arena")?;
        if record.position != place.position {
            return Err("an entry points to another entry's record");
        }
        let count = word.count();
        let table = if count == 1 { 0 } else { (count * 4).next_multiple_of(self.info.batch_align()) };
        if table > record.body_bytes {
            return Err("a batch is too short for its table");
        }
        let start = offset + RECORD_HEADER_BYTES;
        Ok(OpenBatch { place, count, record, slot, start, index: 0, at: start + table })
    }

    /// Copies the message at `index` of a batch out.
    fn read_from(&mut self, mut batch: OpenBatch, index: u64, copies: &mut Copies) -> Got {
        let (align, lengths) = (self.info.batch_align(), self.lengths);
        let Ok(arena) = self.arena(batch.slot) else { return NOT_THERE };
        let end = batch.start + batch.record.body_bytes;
        let table = if batch.count == 1 { 0 } else { (batch.count * 4).next_multiple_of(align) };
        if index < batch.index {
            (batch.index, batch.at) = (0, batch.start + table);
        }
        let len = loop {
            let len = if batch.count == 1 {
                batch.record.body_bytes
            } else {
                arena.load(batch.start + batch.index / 2 * 8) >> (batch.index % 2 * 32) & u64::from(u32::MAX)
            };
            if batch.at + len > end {
                return BAD_LENGTH;
            }
            if batch.index == index {
                break len;
            }
            batch.index += 1;
            batch.at += len.next_multiple_of(align);
        };
        if !lengths.allow(len) || !arena.contains(Span { offset: batch.at, len }) {
            return BAD_LENGTH;
        }
        let (copy, bytes) = copies.add(len as usize);
        arena.read(batch.at, bytes);
        let origin = Origin(batch.record.publisher, batch.record.first_number.wrapping_add(index));
        batch.index += 1;
        batch.at += len.next_multiple_of(align);
        self.batch = Some(batch);
        Got::Message(copy, origin)
    }

    /// The arena of a publisher slot. One that is new since we joined lies in our control socket: the coordinator
    /// pushed it before its publisher could publish.
    fn arena(&mut self, slot: u32) -> Result<&Arena, &'static str> {
        if !self.has_arena(slot) {
            self.load_arena(slot)?;
        }
        self.arenas[slot as usize].as_ref().ok_or("an entry points to no arena")
    }

    fn has_arena(&self, slot: u32) -> bool {
        self.arenas.get(slot as usize).is_some_and(Option::is_some)
    }

    #[cold]
    fn load_arena(&mut self, slot: u32) -> Result<(), &'static str> {
        if slot >= self.info.options.max_publishers {
            return Err("an entry points outside every arena");
        }
        let fd = self.control.arena(self.info.id, slot).ok_or("an entry points to no arena")?;
        let segment = Segment::attach(fd.as_fd(), &self.info.arena(slot), Access::ReadOnly);
        let segment = segment.map_err(|_| "a new arena is not what was promised")?;
        if self.arenas.len() <= slot as usize {
            self.arenas.resize_with(slot as usize + 1, || None);
        }
        self.arenas[slot as usize] = Some(topic::arena(&segment, &self.info.geometry));
        Ok(())
    }
}
