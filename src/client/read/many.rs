//! A subscriber of a topic with many publishers.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::keeper::CursorKeeper;
use super::{BAD_LENGTH, Found, Glance, Lengths, Origin, ReadPort, Step, payload_at};
use crate::client::control::Control;
use crate::error::{GoneReason, RecvError};
use crate::ring::arena::{Arena, Span};
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::still_retained;
use crate::ring::log::{Patience, Place, find_place};
use crate::ring::many::{self, EntryWord, Record};
use crate::ring::sequence::Sequence;
use crate::shm::layout::RECORD_HEADER_BYTES;
use crate::shm::segment::{Access, Segment};
use crate::shm::shared::Shared;
use crate::shm::topic::{self, Arenas, SharedInfo, locate};

/// A subscriber of a topic with many publishers.
pub(crate) struct ManyPort {
    reader: many::Reader,
    keeper: CursorKeeper,
    info: SharedInfo,
    lengths: Lengths,
    arenas: Arenas,
    control: Arc<Control>,
    gating: bool,
    batch: Option<Batch>,
    /// Sequences below this were not asked for.
    skip_below: u64,
    lost_from: Option<u64>,
}

/// The batch being read; it is given back as a whole.
#[derive(Clone, Copy)]
struct Batch {
    word: EntryWord,
    record: Record,
    slot: u32,
    /// Where the length table begins.
    start: u64,
    index: u64,
    /// Where the next payload begins.
    at: u64,
}

impl ManyPort {
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        log: many::ManyLog,
        info: SharedInfo,
        arenas: Arenas,
        control: Arc<Control>,
        cursor: u32,
        place: Place,
        gating: bool,
        skip_below: u64,
        lost_from: Option<u64>,
    ) -> Self {
        let keeper = CursorKeeper::new(log.readers.clone(), log.cursors.clone(), cursor, place.position, &info);
        let reader = many::Reader::new(log, place.position, place.sequence);
        let lengths = Lengths::of(&info);
        ManyPort { reader, keeper, info, lengths, arenas, control, gating, batch: None, skip_below, lost_from }
    }

    #[inline]
    fn has_arena(&self, slot: u32) -> bool {
        self.arenas.get(slot as usize).is_some_and(Option::is_some)
    }

    /// Maps the arena of a publisher slot. One that is new since we joined lies in our control socket: the coordinator
    /// pushed it before its publisher could publish.
    #[cold]
    fn load_arena(&mut self, slot: u32) -> Result<(), RecvError> {
        if slot >= self.info.options.max_publishers {
            return Err(RecvError::Corrupt("an entry points outside every arena"));
        }
        let fd = self.control.arena(self.info.id, slot).ok_or(RecvError::Corrupt("an entry points to no arena"))?;
        let segment = Segment::attach(fd.as_fd(), &self.info.arena(slot), Access::ReadOnly);
        let segment = segment.map_err(|_| RecvError::Corrupt("a new arena is not what was promised"))?;
        if self.arenas.len() <= slot as usize {
            self.arenas.resize_with(slot as usize + 1, || None);
        }
        self.arenas[slot as usize] = Some(topic::arena(&segment, &self.info.geometry));
        Ok(())
    }

    fn arena(&self, slot: u32) -> &Arena {
        self.arenas[slot as usize].as_ref().expect("loaded before its span was handed out")
    }

    /// Opens the batch that `word` points to. `Ok(None)`: overwritten meanwhile.
    #[inline]
    fn open(&mut self, word: EntryWord) -> Result<Option<Batch>, RecvError> {
        let position = self.reader.next().position;
        let (slot, offset) = locate(&self.info.geometry, word.unit());
        if !self.has_arena(slot) {
            self.load_arena(slot)?;
        }
        let Some(record) = Record::read(self.arena(slot), offset) else {
            return self.unless_overwritten(position, RecvError::Corrupt("a record does not fit its arena"));
        };
        if record.position != position {
            return self.unless_overwritten(position, RecvError::Corrupt("an entry points to another entry's record"));
        }
        let table = if word.count() == 1 { 0 } else { (word.count() * 4).next_multiple_of(self.info.batch_align()) };
        if table > record.body_bytes {
            return self.unless_overwritten(position, RecvError::Corrupt("a batch is too short for its table"));
        }
        let start = offset + RECORD_HEADER_BYTES;
        Ok(Some(Batch { word, record, slot, start, index: 0, at: start + table }))
    }

    /// Nonsense in memory that may have been overwritten is no error.
    #[cold]
    fn unless_overwritten<R>(&self, position: u64, error: RecvError) -> Result<Option<R>, RecvError> {
        if self.gating || still_retained(&self.reader.log().header, position) { Err(error) } else { Ok(None) }
    }

    /// Finds the next message of the open batch. `Ok(false)`: overwritten meanwhile.
    #[inline]
    fn take(&mut self, mut batch: Batch, found: &mut Found) -> Result<bool, RecvError> {
        let position = batch.record.position;
        let arena = self.arena(batch.slot);
        let len = if batch.word.count() == 1 {
            batch.record.body_bytes
        } else {
            arena.load(batch.start + batch.index / 2 * 8) >> (batch.index % 2 * 32) & u64::from(u32::MAX)
        };
        let span = Span { offset: batch.at, len };
        let end = batch.start + batch.record.body_bytes;
        if batch.at + len > end || !self.lengths.allow(len) {
            return self.unless_overwritten(position, BAD_LENGTH).map(|never: Option<()>| never.is_some());
        }
        let payload = if self.gating {
            payload_at(arena.pointer(span), len as usize)
        } else {
            arena.read(span.offset, found.buffer.bytes_mut(len as usize));
            if !still_retained(&self.reader.log().header, position) {
                return Ok(false);
            }
            found.buffer.filled(len as usize)
        };
        let origin = Origin(batch.record.publisher, batch.record.first_number.wrapping_add(batch.index));
        // Our own count, not the record's: what we report follows from the words alone.
        let sequence = self.reader.next().sequence + batch.index;
        batch.index += 1;
        batch.at += len.next_multiple_of(self.info.batch_align());
        self.batch = Some(batch);
        self.keeper.count_bytes(len as usize);
        found.set(sequence, payload, origin);
        Ok(true)
    }

    /// Gives back the batch that has been read to its end.
    #[inline]
    fn finish_batch(&mut self) {
        if let Some(batch) = self.batch.filter(|batch| batch.index == batch.word.count()) {
            self.reader.step(batch.word);
            self.batch = None;
        }
        let next = self.reader.next();
        self.keeper.maybe_store(next.position, next.sequence);
    }

    #[cold]
    fn idle(&mut self) {
        let next = self.reader.next();
        self.keeper.store(next.position, next.sequence);
    }

    /// Continues at the oldest batch that is retained for certain, and says what was lost.
    #[cold]
    fn lagged(&mut self) -> RecvError {
        let read = self.batch.take().map_or(0, |batch| batch.index);
        let from = self.reader.next().sequence + read;
        let log = self.reader.log().clone();
        let place_at = |oldest, patience: &mut Patience| self.place_at(oldest, patience).transpose();
        match find_place(|| log.header.announced(), place_at) {
            // Overwritten where we stood: what is retained begins further on.
            Some(Ok(place)) if place.position <= self.reader.next().position || place.sequence < from => {
                RecvError::Corrupt("what was overwritten is said to be retained")
            }
            Some(Ok(place)) => {
                self.reader.move_to(place);
                RecvError::Lagged { from: Sequence::new(from), to: Sequence::new(place.sequence) }
            }
            Some(Err(error)) => error,
            None => RecvError::Corrupt("no record leads back into the ring"),
        }
    }

    /// Position and sequence of the batch at `position`, if it is still retained.
    fn place_at(&mut self, position: u64, patience: &mut Patience) -> Result<Option<Place>, RecvError> {
        // A fence has no record to say its sequence; it takes one, and so does each behind it.
        let (fence, position) = (position, self.reader.log().past_fences(position));
        let back = |place: Place| {
            let sequence = place.sequence.checked_sub(place.position - fence)?;
            Some(Place { position: fence, sequence })
        };
        let Some(word) = self.reader.log().committed(position) else {
            let tail = self.reader.log().tail_from(None);
            return Ok(match fence == position {
                true => tail.filter(|tail| tail.position >= position),
                false => tail.filter(|tail| tail.position == position).and_then(back),
            });
        };
        // Committed since it was looked at: the next attempt counts it, too.
        if word.is_fence() {
            return Ok(None);
        }
        let (slot, offset) = locate(&self.info.geometry, word.unit());
        if !self.has_arena(slot) {
            patience.aside(|| self.load_arena(slot))?;
        }
        let record = Record::read(self.arena(slot), offset).filter(|record| record.position == position);
        let sound = record.filter(|_| still_retained(&self.reader.log().header, fence));
        Ok(sound.and_then(|record| back(Place { position, sequence: record.first_sequence })))
    }
}

impl ReadPort for ManyPort {
    #[inline(always)]
    fn poll_fast(&mut self, _found: &mut Found) -> Glance {
        if self.batch.is_some() || self.lost_from.is_some() || self.reader.poll() != many::Poll::Empty {
            return Glance::Unclear;
        }
        self.keeper.glance_at_nothing(self.reader.next().position)
    }

    #[inline]
    fn poll(&mut self, found: &mut Found) -> Result<Step, RecvError> {
        if let Some(from) = self.lost_from.take() {
            let (from, to) = (Sequence::new(from), Sequence::new(self.reader.next().sequence));
            return Err(RecvError::Lagged { from, to });
        }
        self.finish_batch();
        let batch = match self.batch {
            Some(batch) => batch,
            None => match self.reader.poll() {
                many::Poll::Ready(word) if word.is_fence() => {
                    self.reader.step(word);
                    return Ok(Step::Passed);
                }
                many::Poll::Ready(word) => match self.open(word)? {
                    Some(batch) => batch,
                    None => return Err(self.lagged()),
                },
                many::Poll::Empty => {
                    self.idle();
                    return Ok(Step::Nothing);
                }
                many::Poll::Lapped if self.gating => {
                    return Err(RecvError::Corrupt("the ring went on past a reader that holds it"));
                }
                many::Poll::Lapped => return Err(self.lagged()),
            },
        };
        if !self.take(batch, found)? {
            return Err(self.lagged());
        }
        Ok(if found.sequence < self.skip_below { Step::Passed } else { Step::Found })
    }

    fn place(&self) -> Place {
        let Place { position, sequence } = self.reader.next();
        Place { position, sequence: sequence + self.batch.map_or(0, |batch| batch.index) }
    }

    fn ring_len(&self) -> u64 {
        self.reader.log().ring.len()
    }

    fn is_ready(&mut self) -> bool {
        self.finish_batch();
        if self.lost_from.is_some() || self.batch.is_some() || self.reader.poll() != many::Poll::Empty {
            return true;
        }
        self.idle();
        false
    }

    fn bell(&self) -> Shared<Doorbell> {
        self.keeper.readers.part(|header| &header.readers)
    }

    fn gone(&self) -> Option<GoneReason> {
        if self.keeper.readers.readers.wants_attention() { self.reader.log().header.gone() } else { None }
    }

    fn lag(&self) -> u64 {
        let next = self.reader.next();
        let tail = self.reader.log().tail_from(Some(next)).or_else(|| self.reader.log().tail_from(None));
        tail.map_or(0, |tail| tail.sequence.saturating_sub(self.place().sequence))
    }

    fn publisher_of(&self, origin: Origin) -> Option<(u64, u64)> {
        let Origin(publisher, number) = origin;
        Some((publisher, number))
    }

    fn leave(&mut self) {
        self.finish_batch();
        let next = self.reader.next();
        self.keeper.leave(next.position, next.sequence);
    }
}
