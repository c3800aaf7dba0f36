//! Giving up messages before the ring needs their room: all that nobody holds, or what has grown too old.

use super::{Parts, TopicMemory, wake};
use crate::client::envelope::now_ns;
use crate::error::Refusal;
use crate::ring::arena::Span;
use crate::ring::exclusive::{self, ExclusiveLog, Poll};
use crate::ring::gate::{Gate, Policy, Want};
use crate::ring::log::Place;
use crate::ring::many::{ManyLog, Record};
use crate::ring::slot::Kind;
use crate::shm::layout::{ENVELOPE_HEAD_BYTES, RECORD_HEADER_BYTES};
use crate::shm::topic;
use crate::sync::Ordering;
use crate::topic::Mode;

/// Positions looked at in one go, so that nobody waits long for the coordinator.
const POSITIONS_PER_LOOK: u64 = 1 << 16;

impl TopicMemory {
    /// Gives up everything that no gating reader holds; the cursor that keeps what stays. `checkpoint` is one that no
    /// publisher writes.
    pub(crate) fn give_up_all(&self, checkpoint: u32) -> Result<Option<u32>, Refusal> {
        let tail = self.tail()?;
        Ok(self.give_up(checkpoint, tail, tail.position))
    }

    /// Gives up what is older than the topic's `max_age_ms`, as far as no gating reader holds it. What is too much for one
    /// look goes with the next.
    pub(crate) fn give_up_old(&self, checkpoint: u32) -> Result<Option<u32>, Refusal> {
        let max_age_ns = self.info.options.max_age_ms.saturating_mul(1_000_000);
        let oldest_ns = now_ns().saturating_sub(max_age_ns);
        let tail = self.tail()?;
        let Parts::Log { segments, .. } = &self.parts else { return Ok(None) };
        // Acquire: A-INTENT, as a joiner would look at it.
        let intent = segments.header().intent.0.load(Ordering::Acquire);
        // One after the other: publishers take the time before they take their place, so it need not grow steadily.
        let is_old = |position: &u64| self.published_ns(*position).is_some_and(|at_ns| at_ns < oldest_ns);
        let old = (intent..tail.position.min(intent.saturating_add(POSITIONS_PER_LOOK))).take_while(is_old).count();
        Ok(if old > 0 { self.give_up(checkpoint, tail, intent + old as u64) } else { None })
    }

    /// Raises the floor to `below`, or as far as gating readers allow, in the way a publisher does (I-2 to I-5). Unread
    /// messages of a topic that holds go too: only readers are asked.
    fn give_up(&self, checkpoint: u32, tail: Place, below: u64) -> Option<u32> {
        let Parts::Log { segments, .. } = &self.parts else { return None };
        let (header, readers, lines) = (segments.header(), segments.readers(), segments.cursor_lines(&self.info));
        let gate = Gate { header: &header, readers: &readers, cursors: &lines };
        let policy = Policy { messages: u64::MAX, hold: false, ..self.info.policy() };
        let (mut below, mut held_by) = (below, None);
        loop {
            let want = Want { slot: checkpoint, at: tail, count: 0, give_up_below: below, slack: 0 };
            match gate.make_room(&policy, want) {
                Ok(_) => break,
                Err(blocked) => {
                    held_by = blocked.cursor;
                    if blocked.position >= below {
                        break;
                    }
                    below = blocked.position;
                }
            }
        }
        // Publishers may have waited for this room.
        wake(&readers.writers);
        held_by
    }

    /// When the message at `position` was published, as its envelope says; 0 for a hole. `None` where there is none.
    fn published_ns(&self, position: u64) -> Option<u64> {
        let Parts::Log { segments, .. } = &self.parts else { return None };
        match self.info.options.mode {
            Mode::Many => self.record_published_ns(&segments.many(&self.info), position),
            _ => self.slot_published_ns(segments.exclusive::<7>(&self.info), position),
        }
    }

    /// All messages of a batch have one timestamp.
    fn record_published_ns(&self, log: &ManyLog, position: u64) -> Option<u64> {
        let Parts::Log { arenas, .. } = &self.parts else { return None };
        let word = log.committed(position)?;
        let (slot, offset) = topic::locate(&self.info.geometry, word.unit());
        let arena = &arenas.get(slot as usize)?.as_ref()?.arena;
        Record::read(arena, offset)?;
        let table = if word.count() == 1 { 0 } else { (word.count() * 4).next_multiple_of(self.info.batch_align()) };
        let head = Span { offset: offset + RECORD_HEADER_BYTES + table, len: ENVELOPE_HEAD_BYTES as u64 };
        arena.contains(head).then(|| arena.load(head.offset))
    }

    fn slot_published_ns(&self, log: ExclusiveLog<7>, position: u64) -> Option<u64> {
        let Parts::Log { arenas, .. } = &self.parts else { return None };
        if let Some(span) = log.span_at(position) {
            let head = Span { offset: span.offset, len: ENVELOPE_HEAD_BYTES as u64 };
            let arena = &arenas.first()?.as_ref()?.arena;
            return arena.contains(head).then(|| arena.load(head.offset));
        }
        let reader = exclusive::Reader::new(log, position);
        let Poll::Ready(word) = reader.poll() else { return None };
        let mut published_ns = [0; 8];
        if word.kind() == Kind::Inline {
            reader.slot().read(&mut published_ns);
        }
        Some(u64::from_le_bytes(published_ns))
    }
}
