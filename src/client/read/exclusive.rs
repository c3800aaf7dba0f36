//! A subscriber of an exclusive topic.

use std::ptr::NonNull;

use super::evictor::Evictor;
use super::in_place::{fits_slots, inline_in_place, span_in_place};
use super::keeper::CursorKeeper;
use super::{BAD_LENGTH, Buffer, Found, Glance, Lengths, Origin, ReadPort, Step, payload_at};
use crate::error::{GoneReason, RecvError};
use crate::os::cache::evict_line;
use crate::ring::arena::Arena;
use crate::ring::doorbell::Doorbell;
use crate::ring::exclusive;
use crate::ring::gate::still_retained;
use crate::ring::log::Place;
use crate::ring::sequence::Sequence;
use crate::ring::slot::{Kind, Slot, Word};
use crate::shm::shared::Shared;
use crate::shm::topic::SharedInfo;

/// A subscriber of an exclusive topic.
pub(crate) struct ExclusivePort<const W: usize> {
    reader: exclusive::Reader<W>,
    keeper: CursorKeeper,
    lengths: Lengths,
    arena: Arena,
    gating: bool,
    /// Slots are aligned well enough for the payload's type.
    in_place: bool,
    /// Where the ring was last found empty.
    dry_at: u64,
    evictor: Evictor,
    /// First lost sequence, until it has been reported.
    lost_from: Option<u64>,
}

impl<const W: usize> ExclusivePort<W> {
    pub(crate) fn new(
        log: exclusive::ExclusiveLog<W>,
        info: SharedInfo,
        arena: Arena,
        cursor: u32,
        position: u64,
        gating: bool,
        lost_from: Option<u64>,
    ) -> Self {
        let keeper = CursorKeeper::new(log.readers.clone(), log.cursors.clone(), cursor, position, &info);
        let (lengths, in_place) = (Lengths::of(&info), fits_slots(&info));
        let evictor = Evictor::new(log.ring.len(), position);
        let reader = exclusive::Reader::new(log, position);
        ExclusivePort { reader, keeper, lengths, arena, gating, in_place, dry_at: position, evictor, lost_from }
    }

    /// Evicts the line of the message before where that pays, if the one at `position` was there already when it was
    /// asked for. In lockstep with the writer it would only cost; and so it would the other readers, if there are any.
    #[inline(always)]
    fn hand_back_line(&mut self, position: u64) {
        let line_is_read = W == 7 || position.is_multiple_of(4);
        if line_is_read && self.evictor.is_on() && position != self.dry_at {
            evict_line(self.reader.log().ring.at(position.wrapping_sub(1)).pointer());
        }
    }

    /// Gives back what has been read, if that is due.
    fn give_back(&mut self, position: u64) {
        if !self.keeper.is_due(position) {
            return;
        }
        self.keeper.store(position, position);
        if self.keeper.is_alone() {
            self.evictor.observe(position);
        } else {
            self.evictor.rest(position);
        }
    }

    #[cold]
    fn lagged(&mut self) -> RecvError {
        let from = self.lost_from.take().unwrap_or(self.reader.next());
        if !self.reader.skip_to_retained() {
            return RecvError::Corrupt("what was overwritten is said to be retained");
        }
        let log = self.reader.log();
        if log.tail().is_none_or(|tail| self.reader.next() > tail.saturating_add(2 * log.ring.len())) {
            return RecvError::Corrupt("what is said to be retained lies far beyond the tail");
        }
        RecvError::Lagged { from: Sequence::new(from), to: Sequence::new(self.reader.next()) }
    }

    /// Nothing new: a good moment to give back what has been read.
    #[cold]
    fn idle(&mut self) {
        self.dry_at = self.reader.next();
        self.keeper.store(self.reader.next(), self.reader.next());
    }

    /// The message's payload, copied where nobody keeps it for us; `None`: overwritten meanwhile.
    #[inline]
    fn payload(&self, word: Word, buffer: &mut Buffer) -> Result<Option<NonNull<[u8]>>, RecvError> {
        let slot = self.reader.slot();
        if word.kind() == Kind::Inline && self.gating {
            return inline_in_place(slot, word, self.lengths, self.in_place, buffer).map(Some);
        }
        if self.gating {
            return span_in_place(slot, &self.arena, self.lengths).map(Some);
        }
        self.copy(word, buffer)
    }

    /// Copies a payload that may be overwritten at any time; the copy counts if it was still retained afterwards.
    fn copy(&self, word: Word, buffer: &mut Buffer) -> Result<Option<NonNull<[u8]>>, RecvError> {
        let slot = self.reader.slot();
        let (len, sound) = if word.kind() == Kind::Inline {
            let len = word.length().min(Slot::<W>::INLINE_BYTES);
            slot.read(buffer.bytes_mut(len));
            (len, len == word.length())
        } else {
            let span = slot.read_span();
            let sound = self.arena.contains(span);
            if sound {
                self.arena.read(span.offset, buffer.bytes_mut(span.len as usize));
            }
            (span.len as usize, sound)
        };
        if !still_retained(&self.reader.log().header, self.reader.next()) {
            return Ok(None);
        }
        if sound && self.lengths.allow(len as u64) { Ok(Some(buffer.filled(len))) } else { Err(BAD_LENGTH) }
    }
}

impl<const W: usize> ReadPort for ExclusivePort<W> {
    #[inline(always)]
    fn poll_fast(&mut self, found: &mut Found) -> Glance {
        let position = self.reader.next();
        if !self.gating || !self.in_place || self.lost_from.is_some() || self.keeper.is_due(position) {
            return Glance::Unclear;
        }
        let word = match self.reader.poll() {
            exclusive::Poll::Ready(word) => word,
            exclusive::Poll::Empty => return self.keeper.glance_at_nothing(position),
            exclusive::Poll::Lapped => return Glance::Unclear,
        };
        let len = word.length();
        if word.kind() != Kind::Inline || len > Slot::<W>::INLINE_BYTES || !self.lengths.allow(len as u64) {
            return Glance::Unclear;
        }
        found.set(position, payload_at(self.reader.slot().pointer(), len), Origin(word.tenancy().into(), position));
        self.hand_back_line(position);
        self.reader.step();
        Glance::Found
    }

    #[inline]
    fn poll(&mut self, found: &mut Found) -> Result<Step, RecvError> {
        if let Some(from) = self.lost_from.take() {
            let (from, to) = (Sequence::new(from), Sequence::new(self.reader.next()));
            return Err(RecvError::Lagged { from, to });
        }
        let position = self.reader.next();
        self.give_back(position);
        let word = match self.reader.poll() {
            exclusive::Poll::Ready(word) => word,
            // Repair clears what a dead publisher's batch left behind; a reader that nobody waits for may have been
            // a lap behind there.
            exclusive::Poll::Empty if !self.gating && !still_retained(&self.reader.log().header, position) => {
                return Err(self.lagged());
            }
            exclusive::Poll::Empty => {
                self.idle();
                return Ok(Step::Nothing);
            }
            exclusive::Poll::Lapped if self.gating => {
                return Err(RecvError::Corrupt("the ring went on past a reader that holds it"));
            }
            exclusive::Poll::Lapped => return Err(self.lagged()),
        };
        if word.kind() == Kind::Hole {
            self.reader.step();
            return Ok(Step::Passed);
        }
        let Some(payload) = self.payload(word, &mut found.buffer)? else { return Err(self.lagged()) };
        if word.kind() == Kind::Arena {
            self.keeper.count_bytes(payload.len());
        }
        self.reader.step();
        found.set(position, payload, Origin(word.tenancy().into(), position));
        Ok(Step::Found)
    }

    fn place(&self) -> Place {
        Place { position: self.reader.next(), sequence: self.reader.next() }
    }

    fn ring_len(&self) -> u64 {
        self.reader.log().ring.len()
    }

    fn is_ready(&mut self) -> bool {
        let position = self.reader.next();
        self.give_back(position);
        if self.lost_from.is_some() || self.reader.poll() != exclusive::Poll::Empty {
            return true;
        }
        // See `poll`: an empty slot may be one that a reader which holds nothing back has missed.
        let missed = !self.gating && !still_retained(&self.reader.log().header, position);
        if !missed {
            self.idle();
        }
        missed
    }

    fn bell(&self) -> Shared<Doorbell> {
        self.keeper.readers.part(|header| &header.readers)
    }

    fn gone(&self) -> Option<GoneReason> {
        if self.keeper.readers.readers.wants_attention() { self.reader.log().header.gone() } else { None }
    }

    fn lag(&self) -> u64 {
        self.reader.log().tail().map_or(0, |tail| tail.saturating_sub(self.reader.next()))
    }

    fn publisher_of(&self, origin: Origin) -> Option<(u64, u64)> {
        let Origin(index, position) = origin;
        self.reader.log().header.publisher_at(index as u8, position)
    }

    fn leave(&mut self) {
        self.keeper.leave(self.reader.next(), self.reader.next());
    }
}
