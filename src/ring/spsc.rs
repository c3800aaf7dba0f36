//! The channel: one sender, one receiver, no cursor.
//!
//! FastForward's idea (Giacomoni, Moseley, Vachharajani, 2008): each slot tells by itself whether it is full or free, so
//! the two ends share no index. The receiver frees a slot by storing `empty(position + slots)`, the position it is free
//! for. That store dirties the line in the receiver's cache, where the sender fetches it in one transfer a lap later; a
//! line left clean in both caches would cost the sender an upgrade for each message.

use std::ops::Range;

#[cfg(not(loom))]
use crate::ring::arena::Span;
use crate::ring::doorbell::Doorbell;
use crate::ring::slot::{Body, Kind, Ring, Slot, Word};
use crate::shm::layout::MAX_BATCH;
use crate::shm::shared::Shared;
use crate::sync::{AtomicU32, Ordering};

const SENDER_CLOSED: u32 = 1;
const RECEIVER_CLOSED: u32 = 2;
const REMOVED: u32 = 4;
const STOPPED: u32 = 8;
const SENDER_TAKEN: u32 = 16;
const RECEIVER_TAKEN: u32 = 32;

/// The head of a channel segment's body.
#[repr(C)]
pub struct ChannelHeader {
    /// The receiver sleeps here.
    pub readers: Doorbell,
    /// The sender sleeps here.
    pub writers: Doorbell,
    state: StateLine,
}

#[repr(C, align(128))]
struct StateLine(AtomicU32);

/// Which end is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Sender,
    Receiver,
}

/// The memory of a channel, without its arena.
pub struct Channel<const W: usize> {
    pub header: Shared<ChannelHeader>,
    ring: Ring<Slot<W>>,
}

impl<const W: usize> Clone for Channel<W> {
    fn clone(&self) -> Self {
        Channel { header: self.header.clone(), ring: self.ring.clone() }
    }
}

impl ChannelHeader {
    /// A head outside shared memory.
    #[cfg(loom)]
    pub fn new() -> Self {
        ChannelHeader { readers: Doorbell::new(), writers: Doorbell::new(), state: StateLine(AtomicU32::new(0)) }
    }

    fn set(&self, bits: u32) {
        // Release: R-STATE pairs with A-STATE (is_closed): what the end did last comes before its good-bye.
        self.state.0.fetch_or(bits, Ordering::Release);
        self.readers.call_attention();
        self.writers.call_attention();
    }

    /// Says that one end has gone for good.
    pub fn close(&self, end: End) {
        self.set(if end == End::Sender { SENDER_CLOSED } else { RECEIVER_CLOSED });
    }

    /// Says that the topic was removed, or the bus stopped.
    #[cfg(not(loom))]
    pub(crate) fn end(&self, state: crate::ring::log::TopicState) {
        self.set(if state == crate::ring::log::TopicState::Removed { REMOVED } else { STOPPED });
    }

    /// Takes one end of a stand-alone channel. False where somebody has taken it before.
    #[cfg(not(loom))]
    pub(crate) fn take(&self, end: End) -> bool {
        let bit = if end == End::Sender { SENDER_TAKEN } else { RECEIVER_TAKEN };
        // AcqRel: whoever takes an end sees the channel formatted; only one can.
        self.state.0.fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Whether that end has gone for good.
    pub fn is_closed(&self, end: End) -> bool {
        let bit = if end == End::Sender { SENDER_CLOSED } else { RECEIVER_CLOSED };
        // Acquire: A-STATE pairs with R-STATE (set).
        self.state.0.load(Ordering::Acquire) & bit != 0
    }

    /// Whether the topic was removed or the bus stopped.
    #[cfg(not(loom))]
    pub(crate) fn ended(&self) -> Option<crate::error::GoneReason> {
        let state = self.state.0.load(Ordering::Acquire);
        match (state & STOPPED != 0, state & REMOVED != 0) {
            (true, _) => Some(crate::error::GoneReason::Stopped),
            (_, true) => Some(crate::error::GoneReason::Removed),
            _ => None,
        }
    }
}

/// The word of a slot that is free for `position`.
#[inline]
fn empty(position: u64) -> Word {
    Word::new(position, 0, Kind::Empty, 0)
}

/// What words carry of positions.
const POSITIONS: u64 = u64::MAX >> 16;

/// The first below `end` from which on `is_there` holds, or `end`.
fn first(end: u64, is_there: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0, end);
    while low < high {
        let middle = low + (high - low) / 2;
        if is_there(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

impl<const W: usize> Channel<W> {
    /// A channel over formatted memory.
    pub fn new(header: Shared<ChannelHeader>, ring: Ring<Slot<W>>) -> Self {
        Channel { header, ring }
    }

    /// Frees slots for their first lap.
    pub fn format(&self, positions: Range<u64>) {
        for position in positions {
            // Relaxed: nobody else sees the channel before its descriptor is passed on.
            self.ring.at(position).word.store(empty(position).0, Ordering::Relaxed);
        }
    }

    /// Ring length.
    #[cfg(not(loom))]
    pub(crate) fn slots(&self) -> u64 {
        self.ring.len()
    }

    /// Where sender and receiver stand, told from the words alone: the lowest position that is free, or will be when its
    /// slot is freed, is the tail; the lowest committed one below it the head. One end may be alive meanwhile: freeing a
    /// slot does not change what it says about the tail, nor committing one what it says about the head.
    ///
    /// The words are in order round the ring, so a few tell it. Where they are garbage the answer is some place or other, and head
    /// and tail no further apart than the ring is long.
    pub fn ends(&self) -> (u64, u64) {
        let tail = self.tail();
        let lap_before = tail.wrapping_sub(self.ring.len());
        let read = first(self.ring.len(), |ahead| {
            let position = lap_before.wrapping_add(ahead);
            self.word(position).commits(position)
        });
        (lap_before.wrapping_add(read) & POSITIONS, tail & POSITIONS)
    }

    fn tail(&self) -> u64 {
        let lap = self.ring.len();
        // Words carry only 48 bits of positions.
        let free_for = |position| {
            let word = self.word(position);
            (word.0 >> 16).wrapping_add(if word.kind() == Kind::Empty { 0 } else { lap }) & POSITIONS
        };
        // From the first slot on they are free for the lap after the one that the sender has begun there, from the tail on for that one.
        let began = free_for(0).wrapping_sub(lap);
        let is_of_that = |index| {
            let further = free_for(index).wrapping_sub(began.wrapping_add(index));
            (further << 16).cast_signed() < (lap << 16).cast_signed()
        };
        let end = began.wrapping_add(first(lap, is_of_that));
        // A batch that is being committed, from its last message to its first, or that died half-way, looks like that, too. Then the
        // tail is where it begins.
        let begin = end.wrapping_sub(lap.min(MAX_BATCH as u64));
        (0..end.wrapping_sub(begin))
            .map(|ahead| begin.wrapping_add(ahead) & POSITIONS)
            .find(|position| free_for(*position) == *position)
            .unwrap_or(end)
    }

    fn word(&self, position: u64) -> Word {
        // Acquire: A-COMMIT, A-FREE: whoever resumes here sees what its predecessor left.
        Word(self.ring.at(position).word.load(Ordering::Acquire))
    }

    /// Frees what a batch that died half-way left above `tail`. Only while no sender lives. Idempotent.
    pub fn clear_above(&self, tail: u64) {
        // A batch is no longer than that.
        for position in tail..tail + self.ring.len().min(MAX_BATCH as u64) {
            let slot = self.ring.at(position);
            if Word(slot.word.load(Ordering::Relaxed)).commits(position) {
                // Release: ordered before the next sender's start.
                slot.word.store(empty(position).0, Ordering::Release);
            }
        }
    }

    /// The arena payload that the message at `position` refers to, if it has one and is not received yet.
    #[cfg(not(loom))]
    pub(crate) fn span_at(&self, position: u64) -> Option<Span> {
        let slot = self.ring.at(position);
        let word = Word(slot.word.load(Ordering::Acquire));
        (word.commits(position) && word.kind() == Kind::Arena).then(|| slot.read_span())
    }

    /// Whether the receiver has freed `position`.
    pub fn is_freed(&self, position: u64) -> bool {
        // Acquire: A-FREE pairs with R-FREE (Receiver::free).
        !Word(self.ring.at(position).word.load(Ordering::Acquire)).commits(position)
    }
}

/// The writing end.
pub struct Sender<const W: usize> {
    channel: Channel<W>,
    next: u64,
    /// Slots below this position are known to be free.
    limit: u64,
}

impl<const W: usize> Sender<W> {
    /// Goes on at `next`, the tail. The caller is the channel's only sender.
    pub fn new(channel: Channel<W>, next: u64) -> Self {
        Sender { channel, next, limit: next }
    }

    pub(crate) fn channel(&self) -> &Channel<W> {
        &self.channel
    }

    /// The position of the next message.
    #[inline]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether the next `count` slots are free.
    #[inline]
    pub fn has_room(&mut self, count: u64) -> bool {
        self.next + count <= self.limit || self.look_for_room(count)
    }

    /// Looks a good way ahead first: a slot that is read before it is written costs a transfer of its line more.
    #[cold]
    fn look_for_room(&mut self, count: u64) -> bool {
        let chunk = (self.channel.ring.len() / 8).max(count);
        let found = [chunk, count].into_iter().find(|count| self.are_free(*count));
        self.limit = found.map_or(self.limit, |found| self.next + found);
        found.is_some()
    }

    /// The receiver frees in order, so the last slot speaks for all.
    fn are_free(&self, count: u64) -> bool {
        let last = self.next + count - 1;
        // Acquire: A-FREE pairs with R-FREE (Receiver::free): its reads are over before we overwrite.
        count <= self.channel.ring.len() && self.channel.ring.at(last).word.load(Ordering::Acquire) == empty(last).0
    }

    /// Stores a payload `ahead` positions further on, uncommitted. There is room.
    #[inline]
    pub(crate) fn fill(&self, ahead: u64, body: Body<'_>) {
        self.channel.ring.at(self.next + ahead).fill(body);
    }

    /// Commits what was filled `ahead` positions further on.
    #[inline]
    pub(crate) fn commit(&self, ahead: u64, body: Body<'_>) {
        let position = self.next + ahead;
        let word = body.word(position, 0);
        // Release: R-COMMIT pairs with A-COMMIT (Receiver::poll): payload before word.
        self.channel.ring.at(position).word.store(word.0, Ordering::Release);
    }

    /// Counts `count` committed messages.
    #[inline]
    pub fn advance(&mut self, count: u64) {
        self.next += count;
    }

    /// Wakes the receiver if it sleeps.
    #[inline]
    pub fn notify(&self) {
        if !self.channel.header.readers.is_quiet() {
            self.channel.header.readers.ring();
        }
    }

    /// What a sender that dies in a batch has done by then (models): all is filled, and committed from the last down to
    /// `first`. There is room.
    #[cfg(loom)]
    pub fn send_words_down_to(&self, first: usize, values: &[u64]) {
        let bodies: Vec<[u8; 8]> = values.iter().map(|value| value.to_ne_bytes()).collect();
        for (ahead, bytes) in bodies.iter().enumerate() {
            self.fill(ahead as u64, Body::Inline(bytes));
        }
        for (ahead, bytes) in bodies.iter().enumerate().skip(first).rev() {
            self.commit(ahead as u64, Body::Inline(bytes));
        }
    }

    /// Sends one small message (models and tests; handles use the steps above). False where there is no room.
    #[cfg(loom)]
    pub fn send_word(&mut self, value: u64) -> bool {
        if !self.has_room(1) {
            return false;
        }
        let bytes = value.to_ne_bytes();
        self.fill(0, Body::Inline(&bytes));
        self.commit(0, Body::Inline(&bytes));
        self.advance(1);
        self.notify();
        true
    }
}

/// The reading end.
pub struct Receiver<const W: usize> {
    channel: Channel<W>,
    next: u64,
    freed: u64,
}

impl<const W: usize> Receiver<W> {
    /// Goes on at `next`, the head. The caller is the channel's only receiver.
    pub fn new(channel: Channel<W>, next: u64) -> Self {
        Receiver { channel, next, freed: next }
    }

    pub(crate) fn channel(&self) -> &Channel<W> {
        &self.channel
    }

    /// The position of the next message.
    #[inline]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The next message's word, if it is there.
    #[inline]
    pub(crate) fn poll(&self) -> Option<Word> {
        // Acquire: A-COMMIT pairs with R-COMMIT (Sender::commit).
        let word = Word(self.slot().word.load(Ordering::Acquire));
        word.commits(self.next).then_some(word)
    }

    /// The slot of the next position.
    #[inline]
    pub(crate) fn slot(&self) -> &Slot<W> {
        self.channel.ring.at(self.next)
    }

    /// Steps over the message just read; its slot stays until [`Self::free`].
    #[inline]
    pub fn step(&mut self) {
        self.next += 1;
    }

    /// Frees what has been stepped over, and wakes the sender if it sleeps.
    #[inline]
    pub fn free(&mut self) {
        while self.freed != self.next {
            let slot = self.channel.ring.at(self.freed);
            // Release: R-FREE pairs with A-FREE (Sender::has_room): our reads come before the sender's next lap.
            slot.word.store(empty(self.freed + self.channel.ring.len()).0, Ordering::Release);
            self.freed += 1;
            if !self.channel.header.writers.is_quiet() {
                self.channel.header.writers.ring();
            }
        }
    }

    /// Copies the next small message out, if it is there, and stays where it is (models).
    #[cfg(loom)]
    pub fn peek_word(&self) -> Option<u64> {
        self.poll().map(|_| self.slot().first_word())
    }

    /// Receives one small message (models and tests).
    #[cfg(loom)]
    pub fn recv_word(&mut self) -> Option<u64> {
        self.poll()?;
        let value = self.slot().first_word();
        self.step();
        self.free();
        Some(value)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const BATCH: u64 = 3;

    fn channel(slots: u64) -> Channel<1> {
        let header = Shared::<[ChannelHeader]>::zeroed(1).part(|headers| &headers[0]);
        Channel::new(header, Ring::new(Shared::zeroed(slots as usize)))
    }

    fn store(channel: &Channel<1>, position: u64, word: Word) {
        channel.ring.at(position).word.store(word.0, Ordering::Relaxed);
    }

    /// A channel with these ends, and committed words at these positions above the tail.
    fn stands(channel: &Channel<1>, head: u64, tail: u64, above: std::ops::Range<u64>) {
        for position in tail..tail + channel.ring.len() {
            let before = position.wrapping_sub(channel.ring.len());
            let word = if above.contains(&position) {
                Word::new(position, 0, Kind::Arena, 0)
            } else if before.wrapping_sub(head) < tail - head {
                Word::new(before, 0, Kind::Inline, 3)
            } else {
                empty(position)
            };
            store(channel, position, word);
        }
    }

    #[test]
    fn the_words_tell_the_ends_whatever_a_batch_left_above_them() {
        for slots in [1, 2, 8, 16] {
            let channel = channel(slots);
            channel.format(0..channel.slots());
            assert_eq!(channel.ends(), (0, 0));
            // Also where positions go round, as far as words carry them.
            for tail in (0..3 * slots).chain((1 << 48) - slots..(1 << 48) + slots) {
                for head in tail.saturating_sub(slots)..=tail {
                    for (from, to) in (1..=BATCH).flat_map(|from| (from..=BATCH).map(move |to| (from, to))) {
                        let above = tail + from..(tail + to).min(head + slots);
                        stands(&channel, head, tail, above.clone());
                        let expected = (head & POSITIONS, tail & POSITIONS);
                        assert_eq!(channel.ends(), expected, "{slots} slots, {above:?} above");
                    }
                }
            }
        }
    }

    #[test]
    fn a_long_batch_that_died_is_above_the_tail_of_a_long_ring() {
        let channel = channel(1 << 14);
        for tail in [1 << 20, (1 << 20) - 500, (1 << 20) - MAX_BATCH as u64, (1 << 20) + 8000] {
            stands(&channel, tail - 5, tail, tail + 1..tail + MAX_BATCH as u64);
            assert_eq!(channel.ends(), (tail - 5, tail));
        }
    }

    #[test]
    fn garbage_has_ends_no_further_apart_than_the_ring_is_long() {
        let channel = channel(16);
        let mut random = 1u64;
        for round in 0..100_000 {
            for position in 0..16 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                store(&channel, position, Word(random.rotate_left(round)));
            }
            let (head, tail) = channel.ends();
            assert!(tail.wrapping_sub(head) & POSITIONS <= 16, "{head} {tail}");
        }
    }
}
