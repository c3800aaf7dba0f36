//! Giving up messages before the ring needs their room: all that nobody holds, or what has grown too old.

use std::ops::Range;

use super::{Parts, TopicMemory, wake};
use crate::client::envelope::now_ns;
use crate::error::Refusal;
use crate::ring::arena::{Arena, Span};
use crate::ring::cursor::lowest;
use crate::ring::exclusive::{self, Poll};
use crate::ring::gate::{Gate, Policy, Want};
use crate::ring::log::Place;
use crate::ring::many::{ManyLog, Record};
use crate::ring::slot::Kind;
use crate::shm::layout::{ENVELOPE_HEAD_BYTES, RECORD_HEADER_BYTES};
use crate::shm::topic;
use crate::topic::{Full, Mode};

/// Positions looked at in one go, so that nobody waits long for the coordinator.
const POSITIONS_PER_LOOK: u64 = 1 << 16;

/// Attempts to give up, each below a reader that the one before met. Readers go forward, so a few suffice; who joins meanwhile makes it
/// one more. Garbage may always be lower: what is left then goes with the next look.
const GIVE_UP_LOOKS: usize = 64;

impl TopicMemory {
    /// Gives up everything that no gating reader holds; the cursor that keeps what stays. `checkpoint` is one that no
    /// publisher writes.
    pub(crate) fn give_up_all(&self, checkpoint: u32) -> Result<Option<u32>, Refusal> {
        let tail = self.tail()?;
        Ok(self.give_up(checkpoint, tail, tail.position))
    }

    /// Gives up what is older than the topic's `max_age_ms`, as far as no gating reader holds it. What is too much for one
    /// look goes with the next.
    pub(crate) fn give_up_old(&self, checkpoint: u32) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(()) };
        let tail = self.tail()?;
        let intent = segments.header().announced();
        // What is held is not worth a look; the gate asks the readers once more.
        let held = lowest(&segments.readers(), &segments.cursor_lines(&self.info));
        let held = held.filter(|_| self.info.options.full != Full::Overwrite);
        let held_from = held.map_or(u64::MAX, |lowest| lowest.position);
        let end = tail.position.min(held_from).min(intent.saturating_add(POSITIONS_PER_LOOK));
        let max_age_ns = self.info.options.max_age_ms.saturating_mul(1_000_000);
        let old = self.count_older(intent..end, now_ns().saturating_sub(max_age_ns));
        if old > 0 {
            self.give_up(checkpoint, tail, intent + old);
        }
        Ok(())
    }

    /// Raises the floor to `below`, or as far as gating readers allow, in the way a publisher does (I-2 to I-5). Unread
    /// messages of a topic that holds go too: only readers are asked.
    fn give_up(&self, checkpoint: u32, tail: Place, below: u64) -> Option<u32> {
        let Parts::Log { segments, .. } = &self.parts else { return None };
        let (header, readers, lines) = (segments.header(), segments.readers(), segments.cursor_lines(&self.info));
        let gate = Gate { header: &header, readers: &readers, cursors: &lines };
        let policy = Policy { messages: u64::MAX, hold: false, ..self.info.policy() };
        let (mut below, mut held_by) = (below, None);
        for _ in 0..GIVE_UP_LOOKS {
            let want = Want { slot: checkpoint, at: tail, count: 0, give_up_below: below, slack: 0 };
            match gate.make_room_after(&policy, want, |floor| self.settle_notes(floor)) {
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

    /// How many of these positions, from the first on, hold what was published before this time. One after the other:
    /// publishers take the time before they take their place, so it need not grow steadily.
    fn count_older(&self, positions: Range<u64>, than_ns: u64) -> u64 {
        let Parts::Log { segments, .. } = &self.parts else { return 0 };
        let is_old = |published_ns: Option<u64>| published_ns.is_some_and(|at_ns| at_ns < than_ns);
        let count = if self.info.options.mode == Mode::Many {
            let log = segments.many(&self.info);
            positions.take_while(|position| is_old(self.record_published_ns(&log, *position))).count()
        } else {
            let mut reader = exclusive::Reader::new(segments.exclusive::<7>(&self.info), positions.start);
            let mut is_next_old = || {
                let old = is_old(self.slot_published_ns(&reader));
                reader.step();
                old
            };
            positions.take_while(|_| is_next_old()).count()
        };
        count as u64
    }

    /// What publishers noted below a floor is decided before it is raised, whoever raises it.
    fn settle_notes(&self, floor: u64) {
        if let (Mode::Many, Parts::Log { segments, .. }) = (self.info.options.mode, &self.parts) {
            segments.many(&self.info).settle_notes(floor);
        }
    }

    /// When the batch at `position` was published, which is the same for all its messages; `None` where there is none.
    fn record_published_ns(&self, log: &ManyLog, position: u64) -> Option<u64> {
        let word = log.committed(position)?;
        if word.is_fence() {
            return Some(0);
        }
        let (slot, offset) = topic::locate(&self.info.geometry, word.unit());
        // Its arena was given up, and nobody else can say when it was published.
        let Some(arena) = self.arena(slot) else { return Some(0) };
        Record::read(arena, offset)?;
        let table = if word.count() == 1 { 0 } else { (word.count() * 4).next_multiple_of(self.info.batch_align()) };
        self.envelope_published_ns(slot, offset + RECORD_HEADER_BYTES + table)
    }

    /// When the reader's next message was published; 0 for a hole, `None` where there is none.
    fn slot_published_ns(&self, reader: &exclusive::Reader<7>) -> Option<u64> {
        let Poll::Ready(word) = reader.poll() else { return None };
        match word.kind() {
            Kind::Arena => self.envelope_published_ns(0, reader.slot().read_span().offset),
            Kind::Inline => {
                let mut published_ns = [0; 8];
                reader.slot().read(&mut published_ns);
                Some(u64::from_le_bytes(published_ns))
            }
            Kind::Hole | Kind::Empty => Some(0),
        }
    }

    fn envelope_published_ns(&self, slot: u32, offset: u64) -> Option<u64> {
        let arena = self.arena(slot)?;
        let head = Span { offset, len: ENVELOPE_HEAD_BYTES as u64 };
        arena.contains(head).then(|| arena.load(offset))
    }

    pub(super) fn arena(&self, slot: u32) -> Option<&Arena> {
        let Parts::Log { arenas, .. } = &self.parts else { return None };
        Some(&arenas.get(slot as usize)?.as_ref()?.arena)
    }
}
