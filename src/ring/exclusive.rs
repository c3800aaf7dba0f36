//! The log of an exclusive topic: one writer, any number of readers that map it read-only.
//!
//! The writer stores a payload, then the slot's word, whose position says for which lap it counts: the single-writer
//! case of the sequence-per-slot rings (Vyukov's bounded queue, the Disruptor), with the sequence in the payload's own
//! cache line so that one line moves, not two. A message is there when its word is, so a writer that dies or stops
//! leaves nothing to wait for.

#[cfg(not(loom))]
use crate::ring::arena::Span;
use crate::ring::cursor::{Cursor, CursorsHeader};
use crate::ring::gate::{Gate, Policy, Stop, Want};
use crate::ring::log::{JUMPS, LogHeader, Place};
use crate::ring::slot::{Body, Kind, Ring, Slot, Word};
use crate::shm::layout::MAX_BATCH;
use crate::shm::shared::Shared;
use crate::sync::Ordering;

/// The memory of an exclusive log.
pub struct ExclusiveLog<const W: usize> {
    pub(crate) header: Shared<LogHeader>,
    pub(crate) readers: Shared<CursorsHeader>,
    pub(crate) cursors: Shared<[Cursor]>,
    pub(crate) ring: Ring<Slot<W>>,
}

impl<const W: usize> Clone for ExclusiveLog<W> {
    fn clone(&self) -> Self {
        ExclusiveLog {
            header: self.header.clone(),
            readers: self.readers.clone(),
            cursors: self.cursors.clone(),
            ring: self.ring.clone(),
        }
    }
}

impl<const W: usize> ExclusiveLog<W> {
    /// A log over this memory.
    pub fn new(
        header: Shared<LogHeader>,
        readers: Shared<CursorsHeader>,
        cursors: Shared<[Cursor]>,
        ring: Ring<Slot<W>>,
    ) -> Self {
        ExclusiveLog { header, readers, cursors, ring }
    }

    pub fn gate(&self) -> Gate<'_> {
        Gate { header: &self.header, readers: &self.readers, cursors: &self.cursors }
    }

    /// The next position: the first, from the newest checkpoint on, that is not committed. True at some moment during
    /// the call. `None` where the checkpoints or the words are garbage.
    pub fn tail(&self) -> Option<u64> {
        let mut position = self.header.newest_checkpoint()?.position;
        let mut jumps = 0;
        for _ in 0..=self.ring.len() {
            // Acquire: A-COMMIT pairs with R-COMMIT (Writer::commit).
            let word = Word(self.ring.at(position).word.load(Ordering::Acquire));
            if !word.commits(position) {
                if word.kind() == Kind::Empty || word.distance_from(position) < 0 {
                    return Some(position);
                }
                // A writer that lapped us has left a newer checkpoint before: it is never further than a chunk from its last
                // one, and a lap from us. Else nobody lapped us, and the word is garbage.
                if jumps == JUMPS {
                    return None;
                }
                jumps += 1;
                position = self.header.newest_checkpoint().filter(|c| c.position > position)?.position;
                continue;
            }
            position += 1;
        }
        Some(position)
    }

    /// The word at `position`, if it is committed and still there.
    #[cfg(not(loom))]
    #[inline]
    pub(crate) fn committed(&self, position: u64) -> Option<Word> {
        // Acquire: A-COMMIT pairs with R-COMMIT (Writer::commit).
        let word = Word(self.ring.at(position).word.load(Ordering::Acquire));
        word.commits(position).then_some(word)
    }

    /// The tenancy's index in the message at `position`, if that is committed and still there.
    #[cfg(not(loom))]
    pub(crate) fn tenancy_at(&self, position: u64) -> Option<u8> {
        // Acquire: A-COMMIT pairs with R-COMMIT (Writer::commit).
        let word = Word(self.ring.at(position).word.load(Ordering::Acquire));
        (word.commits(position) && word.kind() != Kind::Hole).then(|| word.tenancy())
    }

    /// Length of the payload in the slot of the message at `position`, if it is there and has one.
    #[cfg(not(loom))]
    pub(crate) fn inline_at(&self, position: u64) -> Option<usize> {
        // Acquire: A-COMMIT pairs with R-COMMIT (Writer::commit).
        let word = Word(self.ring.at(position).word.load(Ordering::Acquire));
        (word.commits(position) && word.kind() == Kind::Inline).then(|| word.length())
    }

    /// The arena payload that the message at `position` refers to, if it has one.
    #[cfg(not(loom))]
    pub(crate) fn span_at(&self, position: u64) -> Option<Span> {
        let slot = self.ring.at(position);
        // Acquire: A-COMMIT pairs with R-COMMIT (Writer::commit).
        let word = Word(slot.word.load(Ordering::Acquire));
        (word.commits(position) && word.kind() == Kind::Arena).then(|| slot.read_span())
    }

    /// Clears what a batch that died half-way left above `tail`. Only while no writer lives (I-12). Idempotent.
    pub fn clear_above(&self, tail: u64) {
        // A batch is no longer than that.
        for position in tail..tail + self.ring.len().min(MAX_BATCH as u64) {
            let slot = self.ring.at(position);
            let word = Word(slot.word.load(Ordering::Relaxed));
            if word.kind() != Kind::Empty && word.distance_from(tail) >= 0 {
                // Release: ordered before the checkpoint and the tenancy that let the next writer begin.
                slot.word.store(0, Ordering::Release);
            }
        }
    }
}

/// The writing end.
pub struct Writer<const W: usize> {
    log: ExclusiveLog<W>,
    policy: Policy,
    tenancy: u8,
    next: u64,
    limit: u64,
}

impl<const W: usize> Writer<W> {
    /// Goes on at `next`, the tail. The caller is the topic's only writer (I-12).
    pub fn new(log: ExclusiveLog<W>, policy: Policy, tenancy: u8, next: u64) -> Self {
        Writer { log, policy, tenancy, next, limit: next }
    }

    pub(crate) fn log(&self) -> &ExclusiveLog<W> {
        &self.log
    }

    /// The position of the next message.
    #[inline]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether the next position may be written without asking the gate.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.next < self.limit
    }

    /// Makes sure that the next `count` positions may be written.
    #[inline]
    pub fn reserve(&mut self, count: u64) -> Result<(), Stop> {
        if self.next + count <= self.limit {
            return Ok(());
        }
        self.make_room(count, 0, self.policy.slack)
    }

    /// The same, and gives up what lies below `give_up_below`.
    #[cold]
    pub(crate) fn make_room(&mut self, count: u64, give_up_below: u64, slack: u64) -> Result<(), Stop> {
        let at = Place { position: self.next, sequence: self.next };
        let want = Want { slot: 0, at, count, give_up_below, slack };
        self.limit = self.log.gate().make_room(&self.policy, want).map_err(Stop::Blocked)?;
        Ok(())
    }

    /// Stores a payload `ahead` positions further on, uncommitted. The place is reserved.
    #[inline]
    pub(crate) fn fill(&self, ahead: u64, body: Body<'_>) {
        self.log.ring.at(self.next + ahead).fill(body);
    }

    /// Commits what was filled `ahead` positions further on.
    #[inline]
    pub(crate) fn commit(&self, ahead: u64, body: Body<'_>) {
        let position = self.next + ahead;
        let word = body.word(position, self.tenancy);
        // Release: R-COMMIT pairs with A-COMMIT (Reader::poll): payload before word. Crash points: before this store
        // the message does not exist, after it it is whole.
        self.log.ring.at(position).word.store(word.0, Ordering::Release);
    }

    /// Counts `count` committed messages.
    #[inline]
    pub fn advance(&mut self, count: u64) {
        self.next += count;
    }

    /// Publishes one small message (models and tests; handles use the steps above).
    #[cfg(loom)]
    pub fn publish_word(&mut self, value: u64) -> Result<u64, Stop> {
        self.reserve(1)?;
        let bytes = value.to_ne_bytes();
        self.fill(0, Body::Inline(&bytes));
        self.commit(0, Body::Inline(&bytes));
        self.advance(1);
        Ok(self.next - 1)
    }

    /// Publishes a batch of small messages (models and tests): committed from the last to the first.
    #[cfg(loom)]
    pub fn publish_words(&mut self, values: &[u64]) -> Result<(), Stop> {
        self.reserve(values.len() as u64)?;
        self.publish_words_down_to(0, values);
        self.advance(values.len() as u64);
        Ok(())
    }

    /// What a writer that dies in a batch has done by then (models): all is filled, and committed from the last down to
    /// `first`. The place is reserved.
    #[cfg(loom)]
    pub fn publish_words_down_to(&self, first: usize, values: &[u64]) {
        let bodies: Vec<[u8; 8]> = values.iter().map(|value| value.to_ne_bytes()).collect();
        for (ahead, bytes) in bodies.iter().enumerate() {
            self.fill(ahead as u64, Body::Inline(bytes));
        }
        for (ahead, bytes) in bodies.iter().enumerate().skip(first).rev() {
            self.commit(ahead as u64, Body::Inline(bytes));
        }
    }

    /// Wakes readers that sleep.
    #[inline]
    pub fn notify(&self) {
        if !self.log.readers.readers.is_quiet() {
            self.log.readers.readers.ring();
        }
    }

    /// Leaves a fresh checkpoint: for whoever comes next.
    pub fn checkpoint(&self) {
        self.log.header.store_checkpoint(0, Place { position: self.next, sequence: self.next });
    }
}

/// What a reader finds at its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poll {
    /// Nothing yet.
    Empty,
    /// A message with this word.
    Ready(Word),
    /// The writer has gone round; only readers that hold nothing back see this.
    Lapped,
}

/// The reading end.
pub struct Reader<const W: usize> {
    log: ExclusiveLog<W>,
    next: u64,
}

impl<const W: usize> Reader<W> {
    /// Starts at `next`.
    pub fn new(log: ExclusiveLog<W>, next: u64) -> Self {
        Reader { log, next }
    }

    pub(crate) fn log(&self) -> &ExclusiveLog<W> {
        &self.log
    }

    /// The position of the next message.
    #[inline]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Looks at the next position.
    #[inline]
    pub fn poll(&self) -> Poll {
        // Acquire: A-COMMIT pairs with R-COMMIT (Writer::commit).
        let word = Word(self.slot().word.load(Ordering::Acquire));
        if word.commits(self.next) {
            return Poll::Ready(word);
        }
        if word.kind() != Kind::Empty && word.distance_from(self.next) > 0 { Poll::Lapped } else { Poll::Empty }
    }

    /// The slot of the next position.
    #[inline]
    pub(crate) fn slot(&self) -> &Slot<W> {
        self.log.ring.at(self.next)
    }

    /// Steps over the message just read.
    #[inline]
    pub fn step(&mut self) {
        self.next += 1;
    }

    /// Continues at the oldest position that is retained for certain, for who was overtaken. `false`: that is not further on,
    /// so it is garbage, and we stay where we are.
    #[must_use]
    pub fn skip_to_retained(&mut self) -> bool {
        let retained = self.log.header.announced();
        let further_on = retained > self.next;
        self.next = retained.max(self.next);
        further_on
    }

    /// Copies the next small message out, if it is there, and stays where it is (models).
    #[cfg(loom)]
    pub fn peek_word(&self) -> Option<u64> {
        matches!(self.poll(), Poll::Ready(_)).then(|| self.slot().first_word())
    }

    /// Receives one small message of a gated log (models and tests).
    #[cfg(loom)]
    pub fn recv_word(&mut self, cursor: u32) -> Option<u64> {
        let Poll::Ready(_) = self.poll() else { return None };
        let value = self.slot().first_word();
        self.step();
        self.log.cursors[cursor as usize].advance(self.next, self.next);
        if !self.log.readers.writers.is_quiet() {
            self.log.readers.writers.ring();
        }
        Some(value)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::thread;

    use super::*;

    const SLOTS: u64 = 4096;

    fn log(slots: u64) -> ExclusiveLog<1> {
        let header = Shared::<[LogHeader]>::zeroed(1).part(|headers| &headers[0]);
        header.format(0);
        let readers = Shared::<[CursorsHeader]>::zeroed(1).part(|headers| &headers[0]);
        ExclusiveLog::new(header, readers, Shared::zeroed(1), Ring::new(Shared::zeroed(slots as usize)))
    }

    fn writer(log: &ExclusiveLog<1>) -> Writer<1> {
        let slots = log.ring.len();
        let policy = Policy { messages: slots / 2, slots, overwrite: true, hold: false, slack: slots / 16 };
        Writer::new(log.clone(), policy, 0, 0)
    }

    fn publish(writer: &mut Writer<1>) {
        writer.reserve(1).unwrap();
        writer.fill(0, Body::Inline(b"message"));
        writer.commit(0, Body::Inline(b"message"));
        writer.advance(1);
    }

    #[test]
    fn a_ring_that_is_far_ahead_of_its_checkpoints_is_garbage_and_not_walked() {
        let log = log(SLOTS);
        for position in 0..SLOTS {
            let ahead = Word::new(position + (1 << 46), 0, Kind::Hole, 0);
            log.ring.at(position).word.store(ahead.0, Ordering::Relaxed);
        }
        assert_eq!(log.tail(), None);
        let place = Place { position: 7, sequence: 7 };
        log.header.store_checkpoint(0, place);
        assert_eq!(log.tail(), None);
    }

    #[test]
    fn there_is_always_a_tail_behind_a_writer_that_goes_round() {
        for slots in [16, SLOTS] {
            let log = log(slots);
            let mut writer = writer(&log);
            let writing = thread::spawn(move || {
                (0..100 * SLOTS).for_each(|_| publish(&mut writer));
                writer.next()
            });
            while !writing.is_finished() {
                assert!(log.tail().expect("a tail") <= 100 * SLOTS);
            }
            assert_eq!(log.tail(), Some(writing.join().unwrap()));
        }
    }
}
