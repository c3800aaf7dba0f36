//! Settling what has expired for groups whose consumers do not come to it, or that have none: so that it does not hold
//! publishers back for ever.
//!
//! Only what lies at the floor matters for that. A message's times are read before its word is swapped, as consumers copy
//! payloads: while the word was unsettled no publisher wrote there.

use super::Parts;
use super::TopicMemory;
use super::groups::GroupMemory;
use crate::error::Refusal;
use crate::ring::arena::Span;
use crate::ring::exclusive::{self, Poll};
use crate::ring::ledger::{Ledger, State};
use crate::ring::log::Place;
use crate::ring::many::Record;
use crate::ring::slot::Kind;
use crate::shm::layout::{ENVELOPE_HEAD_BYTES, MAX_BATCH, RECORD_HEADER_BYTES};
use crate::shm::topic;
use crate::sync::Ordering;
use crate::topic::Mode;

/// Messages settled in one look, so that nobody waits long for the coordinator.
const MESSAGES_PER_LOOK: u64 = 1 << 14;

/// What stopped a look at a group's floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtFloor {
    /// Something that lives, or is a consumer's, or nothing.
    Nothing,
    /// Something that belongs into the dead-letter topic, and is nobody's yet.
    Letter,
    /// There is more to settle.
    More,
}

/// What is known of a message: when it dies (0: never); `None`: it is a hole.
type Expiry = Option<u64>;

impl TopicMemory {
    /// Settles a group's messages from its floor on that nobody has and that had died by `now_ns`, unless they are to go to the
    /// dead-letter topic. Idempotent, and may be cut short anywhere: each swap is whole, and the floor is moved by
    /// whoever looks next.
    pub(crate) fn settle_expired(&self, group: u32, to_dead_letters: bool, now_ns: u64) -> Result<AtFloor, Refusal> {
        let memory = self.group(group)?;
        let (ledger, tail) = (memory.ledger(&self.info), self.tail()?);
        let floor = ledger.advance_floor();
        if floor >= tail.sequence {
            return Ok(AtFloor::Nothing);
        }
        let most = ledger.window().min(MESSAGES_PER_LOOK);
        let end = tail.sequence.min(floor.saturating_add(most));
        let Some(mut place) = self.place_of_floor(memory, floor, tail) else { return Ok(AtFloor::Nothing) };
        let (mut settled, mut stop) = (0, None);
        while place.sequence < end && stop.is_none() {
            // Nothing that makes sense: who reads it will say so.
            let Some(messages) = self.expiries_at(place) else { break };
            let next = Place { position: place.position + 1, sequence: place.sequence + messages.len() as u64 };
            for (at, expiry) in (place.sequence..end).zip(messages).filter(|(at, _)| *at >= floor) {
                stop = settle_one(&ledger, at, expiry, to_dead_letters, now_ns);
                if stop.is_some() {
                    break;
                }
                settled += 1;
            }
            place = next;
        }
        if settled > 0 {
            self.raise_floor(memory);
            // Who waits for the next of a key.
            self.wake_readers();
        }
        Ok(stop.unwrap_or(if settled == most { AtFloor::More } else { AtFloor::Nothing }))
    }

    /// Where what holds `floor` begins, which is a group's floor. Not further below it than a batch is long: each position takes a
    /// sequence at least, so whoever walks from there has few positions to go, whatever floor and log say.
    fn place_of_floor(&self, memory: &GroupMemory, floor: u64, tail: Place) -> Option<Place> {
        if self.info.options.mode == Mode::Exclusive {
            return Some(Place { position: floor, sequence: floor });
        }
        let oldest = self.group_place(memory.cursor()).ok()?;
        let holds_it = |place: &Place| floor.checked_sub(place.sequence).is_some_and(|below| below < MAX_BATCH as u64);
        self.place_of(floor, oldest.position, tail).filter(holds_it)
    }

    /// When each message at `place` dies. `None`: nothing that makes sense is there.
    fn expiries_at(&self, place: Place) -> Option<Vec<Expiry>> {
        let Parts::Log { segments, .. } = &self.parts else { return None };
        if self.info.options.mode == Mode::Exclusive {
            let reader = exclusive::Reader::new(segments.exclusive::<7>(&self.info), place.position);
            return Some(vec![self.expiry_in_slot(&reader)?]);
        }
        let word = segments.many(&self.info).committed(place.position)?;
        if word.is_fence() {
            return Some(vec![None]);
        }
        let (slot, offset) = topic::locate(&self.info.geometry, word.unit());
        let (arena, align) = (self.arena(slot)?, self.info.batch_align());
        let is_its = |record: &Record| (record.position, record.first_sequence) == (place.position, place.sequence);
        let record = Record::read(arena, offset).filter(is_its)?;
        let start = offset + RECORD_HEADER_BYTES;
        let (count, end) = (word.count(), start + record.body_bytes);
        let mut at = if count == 1 { start } else { start + (count * 4).next_multiple_of(align) };
        let mut expiries = Vec::with_capacity(count as usize);
        for index in 0..count {
            let len = match count {
                1 => record.body_bytes,
                _ => arena.load(start + index / 2 * 8) >> (index % 2 * 32) & u64::from(u32::MAX),
            };
            if at.saturating_add(len) > end {
                return None;
            }
            expiries.push(Some(self.expiry_in_arena(slot, at)?));
            at += len.next_multiple_of(align);
        }
        Some(expiries)
    }

    fn expiry_in_slot(&self, reader: &exclusive::Reader<7>) -> Option<Expiry> {
        let Poll::Ready(word) = reader.poll() else { return None };
        match word.kind() {
            Kind::Arena => self.expiry_in_arena(0, reader.slot().read_span().offset).map(Some),
            Kind::Inline => {
                let mut times = [0; 16];
                reader.slot().read(&mut times);
                times.last_chunk().map(|expires_ns| Some(u64::from_le_bytes(*expires_ns)))
            }
            Kind::Hole | Kind::Empty => Some(None),
        }
    }

    /// When the message dies whose envelope begins there.
    fn expiry_in_arena(&self, slot: u32, offset: u64) -> Option<u64> {
        let arena = self.arena(slot)?;
        let head = Span { offset, len: ENVELOPE_HEAD_BYTES as u64 };
        arena.contains(head).then(|| arena.load(offset + 8))
    }
}

/// Settles a message that has died and is nobody's; why it and what follows stay otherwise.
fn settle_one(ledger: &Ledger, sequence: u64, expiry: Expiry, to_dead_letters: bool, now_ns: u64) -> Option<AtFloor> {
    let seen = ledger.look(sequence);
    match seen.state() {
        State::Settled => return None,
        State::Fresh | State::Returned => {}
        State::Moving(_) if seen.owner().is_none() => return Some(AtFloor::Letter),
        _ => return Some(AtFloor::Nothing),
    }
    let has_died = expiry.is_none_or(|expires_ns| expires_ns != 0 && expires_ns <= now_ns);
    if !has_died {
        return Some(AtFloor::Nothing);
    }
    if to_dead_letters && expiry.is_some() {
        return Some(AtFloor::Letter);
    }
    // Before the word changes: what is settled lies below the hint.
    ledger.raise_hint(sequence + 1);
    let settled = ledger.settle(seen);
    // Relaxed: only shown to people.
    ledger.header().counters.expired.fetch_add(u64::from(settled && expiry.is_some()), Ordering::Relaxed);
    (!settled).then_some(AtFloor::Nothing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::memory::Reservation;
    use crate::coordinator::protocol::{GroupInfo, StartAt, TopicInfo};
    use crate::group::GroupOptions;
    use crate::ring::many::Writer;
    use crate::shm::layout::Geometry;
    use crate::topic::TopicOptions;

    /// A topic for many with one batch of two messages, and group 0 from the first on.
    fn topic() -> TopicMemory {
        let options = TopicOptions { messages: 16, bytes: 4096, envelope: true, ..TopicOptions::default() };
        let geometry = Geometry::from_options(&options).unwrap();
        let info = TopicInfo { id: 0, bus: 7, name: "t".to_owned(), generation: 0, options, geometry };
        let mut memory = TopicMemory::create(&info, &mut Reservation::default()).unwrap();
        let group = GroupInfo { id: 0, name: "g".to_owned(), options: GroupOptions::default(), cursor: 0 };
        memory.create_ledger(&group, &mut Reservation::default()).unwrap();
        memory.begin_group(0, StartAt::Oldest).unwrap();
        let Parts::Log { segments, .. } = &memory.parts else { panic!("no log") };
        let mut writer = Writer::new(segments.many(&info), info.policy(), 0).unwrap();
        writer.make_room(0, 0).unwrap();
        let arena = memory.arena(0).unwrap();
        Record::write(arena, 0, 0, 64, 0);
        writer.publish(arena, 0, 0, 2, 0, |_, _| Ok(())).unwrap();
        memory
    }

    #[test]
    fn a_walk_begins_where_the_floor_is_and_nowhere_else() {
        let memory = topic();
        let found = |floor, tail| memory.place_of_floor(memory.group(0).unwrap(), floor, tail);
        let first = Some(Place { position: 0, sequence: 0 });
        let tail = Place { position: 1, sequence: 2 };
        assert_eq!([0, 1].map(|floor| found(floor, tail)), [first; 2]);
        // Ledger and checkpoint tell of messages far ahead, to which a walk along the entries would never come.
        assert_eq!(found(1 << 50, Place { sequence: 1 << 60, ..tail }), None);
        assert_eq!(found(MAX_BATCH as u64, Place { sequence: 1 << 60, ..tail }), None);
    }
}
