//! What the coordinator does to memory for publishers: puts them in force, reads what they committed last, fences them,
//! and clears up after them.

use super::{Parts, TopicMemory, corrupt, wake};
use crate::coordinator::protocol::{Identity, TopicInfo};
use crate::coordinator::state::PublisherEntry;
use crate::error::{Holder, Refusal};
use crate::ring::gate::Stop;
use crate::ring::log::MAX_PLACE;
use crate::ring::spsc::Channel;
use crate::shm::segment::Segment;
use crate::shm::topic;
use crate::topic::Mode;

impl TopicMemory {
    /// Puts a publisher in force before it is told: on exclusive topics its tenancy, under an identity (whose last number is
    /// `before`) its note.
    pub(crate) fn begin_publisher(
        &self,
        slot: u32,
        opened: &PublisherEntry,
        before: Option<u64>,
    ) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(()) };
        let header = segments.header();
        if self.info.options.mode == Mode::Exclusive {
            let tail = self.tail()?.position;
            header.begin_tenancy(opened.tenancy, tail, opened.publisher, before.unwrap_or(0) + 1);
        }
        // Last: it says that the tenancy is there, too.
        if let Some(last) = before {
            header.begin_note(slot, opened.opening, last);
        }
        Ok(())
    }

    /// The number that a publisher with an identity committed last; `None` where it never came into force. Final once the
    /// publisher is dead, closed or fenced.
    pub(crate) fn last_number(&self, slot: u32, publisher: &PublisherEntry) -> Result<Option<u64>, Refusal> {
        let last = self.noted_number(slot, publisher)?;
        // Numbers go on from here, and must not overflow.
        match last.filter(|last| *last > MAX_PLACE) {
            Some(last) => Err(corrupt(&self.info, format!("its publisher's last number is said to be {last}"))),
            None => Ok(last),
        }
    }

    fn noted_number(&self, slot: u32, publisher: &PublisherEntry) -> Result<Option<u64>, Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(None) };
        let header = segments.header();
        let note = header.note(slot);
        if self.info.options.mode == Mode::Many {
            let log = segments.many(&self.info);
            return Ok(note.last(publisher.opening, |position| log.owns(slot, position)));
        }
        let noted = note.last(publisher.opening, |position| self.commits(position));
        if noted.is_none() || matches!(publisher.identity, Some(Identity::Origin { .. })) {
            return Ok(noted);
        }
        // A name's numbers are dense, so where nobody else publishes the tail says it.
        let (position, number) = header.tenancy(publisher.tenancy);
        let published = self.tail()?.position.saturating_sub(position);
        Ok(Some(number.saturating_sub(1).saturating_add(published)))
    }

    /// Whether an exclusive topic's message at `position` is committed and still there.
    fn commits(&self, position: u64) -> bool {
        match &self.parts {
            Parts::Log { segments, .. } if self.info.small_slots() => {
                segments.exclusive::<1>(&self.info).tenancy_at(position).is_some()
            }
            Parts::Log { segments, .. } => segments.exclusive::<7>(&self.info).tenancy_at(position).is_some(),
            Parts::Channel { .. } => false,
        }
    }

    /// Whether there is room for a fence; who holds the ring, where there is none.
    pub(crate) fn has_room_for_fence(&self) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(()) };
        let fenced = segments.many(&self.info).has_room_for_fence(&self.info.policy());
        fenced.map_err(|stop| self.cannot_fence(stop))
    }

    /// Commits a fence for a publisher of a topic for many: after this it commits nothing any more.
    pub(crate) fn fence(&self, slot: u32, opening: u64) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(()) };
        let fenced = segments.many(&self.info).fence(&self.info.policy(), slot, opening);
        fenced.map_err(|stop| self.cannot_fence(stop))?;
        // Readers step over it, and the fenced one may be waiting for room.
        wake(&segments.readers().readers);
        wake(&segments.readers().writers);
        Ok(())
    }

    fn cannot_fence(&self, stop: Stop) -> Refusal {
        match stop {
            Stop::Blocked(blocked) => {
                let holder = blocked.cursor.map_or(Holder::Hold, |cursor| self.holder(cursor));
                Refusal::FullForFence { topic: self.info.name.clone(), holder: holder.to_string() }
            }
            Stop::Corrupt(problem) => corrupt(&self.info, problem.to_owned()),
            Stop::Fenced | Stop::Duplicate(_) => corrupt(&self.info, "the coordinator cannot fence".to_owned()),
        }
    }

    /// Repairs what a dead (or leaves tidy what a departed) publisher left, and wakes the readers that it may have died over
    /// waking. Idempotent.
    pub(crate) fn end_publisher(&self, _slot: u32) -> Result<(), Refusal> {
        let repaired = self.clear_after_publisher();
        match &self.parts {
            Parts::Channel { segment, .. } => topic::channel_header(segment).readers.ring_again(),
            Parts::Log { segments, .. } => segments.readers().readers.ring_again(),
        }
        repaired
    }

    fn clear_after_publisher(&self) -> Result<(), Refusal> {
        match (&self.parts, self.info.options.mode, self.info.small_slots()) {
            (Parts::Channel { segment, .. }, _, true) => clear_channel::<1>(segment, &self.info),
            (Parts::Channel { segment, .. }, _, false) => clear_channel::<7>(segment, &self.info),
            (Parts::Log { segments, .. }, Mode::Exclusive, small) => {
                let tail = self.tail()?;
                if small {
                    segments.exclusive::<1>(&self.info).clear_above(tail.position);
                } else {
                    segments.exclusive::<7>(&self.info).clear_above(tail.position);
                }
                segments.header().store_checkpoint(0, tail);
            }
            // One compare-and-swap leaves nothing behind; the arena passes on with what is in it.
            (Parts::Log { .. }, _, _) => {}
        }
        Ok(())
    }
}

fn clear_channel<const W: usize>(segment: &Segment, info: &TopicInfo) {
    let (channel, _): (Channel<W>, _) = topic::channel(segment, &info.geometry);
    let (_, tail) = channel.ends();
    channel.clear_above(tail);
}
