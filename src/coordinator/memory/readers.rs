//! Cursors: putting them in force at their start, finding that start in the log, taking them out of force again.

use super::{Parts, TopicMemory, channel_ends, corrupt, wake};
use crate::coordinator::protocol::StartAt;
use crate::error::Refusal;
use crate::ring::cursor::Cursor;
use crate::ring::gate::{Gate, still_retained};
use crate::ring::log::{MAX_PLACE, Place, find_place};
use crate::ring::many::{EntryWord, MAX_BETWEEN, ManyLog, Record};
use crate::shm::topic;
use crate::topic::Mode;

/// Garbled records in a row that a search for a start steps over.
const MAX_UNSOUND: u32 = 1024;

/// Where a subscriber begins. On topics with many publishers this is the batch that holds the sequence asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joined {
    pub(crate) position: u64,
    pub(crate) sequence: u64,
    /// The sequence asked for: what the batch holds below it is not to be delivered.
    pub(crate) asked: u64,
}

impl TopicMemory {
    /// Puts a subscriber's cursor in force at its start position. Idempotent for one owner.
    pub(crate) fn join(&self, cursor: u32, owner: u64, start: StartAt, droppable: bool) -> Result<Joined, Refusal> {
        self.join_line(cursor, start, |line| line.occupy(owner, droppable))
    }

    /// The same for a group's cursor.
    pub(super) fn join_group(&self, cursor: u32, group: u32, start: StartAt) -> Result<Joined, Refusal> {
        self.join_line(cursor, start, |line| line.occupy_group(group.into()))
    }

    fn join_line(&self, cursor: u32, start: StartAt, occupy: impl FnOnce(&Cursor)) -> Result<Joined, Refusal> {
        let Some(segments) = self.segments_of(cursor) else { return self.join_channel() };
        let lines = segments.cursor_lines(&self.info);
        let line = lines.get(cursor as usize).ok_or_else(|| corrupt(&self.info, format!("no cursor {cursor}")))?;
        let (header, readers) = (segments.header(), segments.readers());
        let gate = Gate { header: &header, readers: &readers, cursors: &lines };
        let tail = self.tail()?;
        let asked = match start {
            StartAt::Latest => tail.sequence,
            StartAt::Oldest | StartAt::Scan => 0,
            StartAt::Last(count) => tail.sequence.saturating_sub(count),
            StartAt::Sequence(sequence) if sequence > tail.sequence => {
                let topic = self.info.name.clone();
                return Err(Refusal::BeyondTail { topic, asked: sequence, tail: tail.sequence });
            }
            StartAt::Sequence(sequence) => sequence,
        };
        occupy(line);
        let place = self.find_start(&gate, cursor, asked, tail);
        match place {
            Some(place) => line.advance(place.position, place.sequence),
            None => line.vacate(),
        }
        // While the search ran, the cursor stood lower than it stands now: a publisher may have gone to sleep over that.
        wake(&readers.writers);
        let Place { position, sequence } =
            place.ok_or_else(|| corrupt(&self.info, "no record leads to the start position".into()))?;
        Ok(Joined { position, sequence, asked })
    }

    /// Puts the cursor in force at the batch that holds `asked`, or at the oldest retained one.
    fn find_start(&self, gate: &Gate<'_>, cursor: u32, asked: u64, tail: Place) -> Option<Place> {
        if asked >= tail.sequence || self.info.options.mode == Mode::Exclusive {
            let wanted = if asked >= tail.sequence { tail } else { Place { position: asked, sequence: asked } };
            // Not lower than what is retained, not even for a moment: publishers would take it for a reader to wait for.
            let position = gate.join(cursor, wanted.position.max(gate.header.announced()));
            if position == wanted.position {
                return Some(wanted);
            }
            if self.info.options.mode == Mode::Exclusive {
                // Not retained any more. An intent far ahead of the tail is garbage.
                let sane = position <= tail.position.saturating_add(2 * self.info.geometry.slots);
                return sane.then_some(Place { position, sequence: position });
            }
        }
        // In force at the oldest first: from here on the search runs over memory that stays (I-4). Only a reader that
        // holds nothing back can be overtaken by publishers meanwhile; it tries again from what is the oldest then.
        find_place(|| gate.join(cursor, gate.header.announced()), |oldest, _| self.place_of(asked, oldest, tail))
    }

    fn join_channel(&self) -> Result<Joined, Refusal> {
        let Parts::Channel { segment, .. } = &self.parts else { unreachable!("join handles logs") };
        let (head, _) = channel_ends(segment, &self.info);
        Ok(Joined { position: head, sequence: head, asked: head })
    }

    /// The batch that holds `sequence`, or the oldest from `oldest` on; `None` where it was overwritten during the search.
    pub(super) fn place_of(&self, sequence: u64, oldest: u64, tail: Place) -> Option<Place> {
        // Invariant: the batch at `low` begins at or before `sequence`, or is the oldest. No more is retained than the ring has
        // entries.
        let (mut low, mut high) = (oldest, tail.position.max(oldest));
        if high - low > self.info.geometry.slots {
            return None;
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match self.place_on(middle, Some(tail)) {
                Some(place) if place.sequence > sequence => high = middle,
                // Overwritten meanwhile: later ones are still there.
                _ => low = middle,
            }
        }
        self.place_on(low, Some(tail))
    }

    /// Position and sequence of what is at `position`, or of the tail; `None` where it is neither there nor next.
    pub(super) fn confirmed_place(&self, position: u64) -> Result<Option<Place>, Refusal> {
        if self.info.options.mode != Mode::Exclusive {
            return Ok(self.place_at(position));
        }
        let tail = self.tail()?.position;
        Ok((position <= tail).then_some(Place { position, sequence: position }))
    }

    /// Position and sequence of the batch at `position`, from its record, or from the next one that has any to say: a fence has
    /// none, and a garbled one tells nothing. Its reader is to meet it: who reads from there on is told.
    pub(super) fn place_at(&self, position: u64) -> Option<Place> {
        self.place_on(position, None)
    }

    /// The same, for who has just looked where the tail is.
    fn place_on(&self, position: u64, tail: Option<Place>) -> Option<Place> {
        let Parts::Log { segments, .. } = &self.parts else { return None };
        if position > MAX_PLACE {
            return None;
        }
        let log: ManyLog = segments.many(&self.info);
        let (mut at, mut between, mut unsound) = (position, 0, 0);
        let sequence = loop {
            let Some(word) = log.committed(at) else {
                // Below what was the tail it has been overwritten; beyond, the tail may have moved there.
                let known = tail.filter(|tail| at <= tail.position).or_else(|| log.tail_from(None));
                break known.filter(|tail| tail.position == at)?.sequence;
            };
            if !word.is_fence() {
                match self.first_sequence(at, word) {
                    Some(sequence) => break sequence,
                    None if unsound == MAX_UNSOUND => return None,
                    None => unsound += 1,
                }
            }
            between += word.count();
            at += 1;
            if at - position > self.info.geometry.slots.min(MAX_BETWEEN) {
                return None;
            }
        };
        // Overwritten while it was copied, it may tell the position of one message and the sequence of another.
        let sequence = sequence.checked_sub(between).filter(|_| still_retained(&segments.header(), position))?;
        Some(Place { position, sequence })
    }

    /// What the record of a committed entry says; `None` where it is another's, or none.
    fn first_sequence(&self, position: u64, word: EntryWord) -> Option<u64> {
        let Parts::Log { arenas, .. } = &self.parts else { return None };
        let (slot, offset) = topic::locate(&self.info.geometry, word.unit());
        let record = Record::read(&arenas.get(slot as usize)?.as_ref()?.arena, offset)?;
        (record.position == position).then_some(record.first_sequence)
    }

    /// Takes a cursor out of force and wakes publishers that it held, or died over waking. Idempotent. `from_oldest`: its reader began with the
    /// oldest message, so that on a topic that holds nothing below the cursor is unread.
    pub(crate) fn leave(&self, cursor: u32, from_oldest: bool) {
        let segments = match (&self.parts, self.segments_of(cursor)) {
            (Parts::Channel { segment, .. }, _) => return topic::channel_header(segment).writers.ring_again(),
            (_, Some(segments)) => segments,
            (_, None) => return,
        };
        let (header, readers, lines) = (segments.header(), segments.readers(), segments.cursor_lines(&self.info));
        let Some(line) = lines.get(cursor as usize) else { return };
        if self.info.options.hold
            && from_oldest
            && let Ok(tail) = self.tail()
        {
            Gate { header: &header, readers: &readers, cursors: &lines }.release_read(tail.position);
        }
        line.vacate();
        readers.writers.ring_again();
    }

    /// A cursor's sequence.
    pub(crate) fn cursor_sequence(&self, cursor: u32) -> u64 {
        match (&self.parts, self.segments_of(cursor)) {
            (Parts::Channel { segment, .. }, _) => channel_ends(segment, &self.info).0,
            (_, Some(segments)) => {
                segments.cursor_lines(&self.info).get(cursor as usize).map_or(0, |line| line.sequence())
            }
            (_, None) => 0,
        }
    }

    /// Whether a cursor is in force for this owner.
    pub(crate) fn is_in_force(&self, cursor: u32, owner: u64) -> bool {
        let Some(segments) = self.segments_of(cursor) else { return true };
        segments.cursor_lines(&self.info).get(cursor as usize).is_some_and(|line| line.is_in_force_for(owner))
    }

    /// Where a cursor stands; `None` where it is not in force.
    pub(crate) fn cursor_place(&self, cursor: u32) -> Option<Place> {
        let segments = self.segments_of(cursor)?;
        segments.cursor_lines(&self.info).get(cursor as usize)?.place()
    }
}
