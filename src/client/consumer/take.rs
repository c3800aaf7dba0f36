//! Finding messages and taking them (ARCHITECTURE.md §4.9, *Take*).

use std::cell::Cell;

use super::copies::Copy;
use super::core::{Core, Item};
use super::fetch::Got;
use crate::client::envelope;
use crate::error::RecvError;
use crate::group::Guarantee;
use crate::os::clock;
use crate::ring::ledger::{MoveReason, RUN, Seen, State};
use crate::sync::{Ordering, fence};
use crate::wait::PASSED_OVER;

/// Fewest and most sequences reserved at a time: two lines of the ledger, and what takes well below a step of the clock.
const STRIDES: std::ops::RangeInclusive<u64> = 16..=256;

/// How many messages ahead a payload is asked for: taking a message is a locked operation, which waits for every load before
/// it but not for prefetches.
const AHEAD: u64 = 8;

/// Attempts to reserve, each lost to another consumer that went on.
const RESERVE_ATTEMPTS: usize = 16;

/// Copying more than this takes long enough for the clock to move on.
pub(super) const LONG_COPY_BYTES: usize = 1024;

/// How many sequences to reserve at a time. Each reservation is a transfer of the hint's line, so who is fast takes longer
/// strides; who is slow must not keep messages from others, who take over what is left only after a step of the clock.
pub(super) struct Stride {
    length: u64,
    at_ms: u64,
}

impl Default for Stride {
    fn default() -> Self {
        Stride { length: *STRIDES.start(), at_ms: 0 }
    }
}

impl Stride {
    /// Twice the last one if that is used up within the same step of the clock.
    fn next(&mut self, now: u64) -> u64 {
        let doubled = (self.length * 2).min(*STRIDES.end());
        self.length = if now == self.at_ms { doubled } else { *STRIDES.start() };
        self.at_ms = now;
        self.length
    }
}

impl Core {
    /// Takes up to `count` messages into `items`. Never waits, but passes over as many messages as the group's window holds
    /// before it says that none is to be had.
    #[inline]
    pub(super) fn poll(&mut self, count: usize) -> Result<bool, RecvError> {
        self.look_past(PASSED_OVER.max(self.ledger.window() as usize), count)
    }

    /// Takes up to `count` messages into `items`, or passes over a few that nobody is to have (`left_off`): for who has a
    /// deadline, or others to look after.
    #[inline]
    pub(super) fn look(&mut self, count: usize) -> Result<bool, RecvError> {
        self.look_past(PASSED_OVER, count)
    }

    /// Takes up to `count` messages into `items`, or passes over `most` that nobody is to have, and leaves off there.
    #[inline]
    fn look_past(&mut self, most: usize, count: usize) -> Result<bool, RecvError> {
        self.items.clear();
        self.copies.clear();
        self.left_off = false;
        if !self.home.is_here() {
            return Err(RecvError::Forked { opened_by: self.home.pid(), pid: std::process::id() });
        }
        if self.ledger.is_fenced(self.me) {
            return Err(RecvError::Fenced);
        }
        let now = clock::now_ms();
        if now != self.polled_ms {
            self.polled_ms = now;
            self.drop_settled();
        }
        self.raise_floor_now_and_then(now);
        self.work_off_moves();
        if self.group.options.exclusive && !self.is_at_work(now) {
            return self.nothing();
        }
        let count = if self.is_limited() { count.min(self.room(now) as usize) } else { count };
        let ordered = self.group.options.ordered_by_key;
        if !ordered {
            self.scan_if_due(now);
        }
        let taken = if ordered { self.take_ordered(most, count, now)? } else { self.take_up_to(most, count, now)? };
        let taken = taken || !self.left_off && self.take_idle(most, count, now)?;
        let taken = if self.group.options.max_in_flight > 0 { self.keep_group_limit() } else { taken };
        let taken = if self.group.options.exclusive { self.confirm_taken(taken) } else { taken };
        if !taken && self.left_off {
            // Nobody knows when we look again: what was settled makes room now, and what moves must not become overdue.
            self.raise_floor();
            self.work_off_moves();
        }
        self.left_off |= !taken && self.moves.are_left_over(now);
        if taken || self.left_off { Ok(taken) } else { self.nothing() }
    }

    /// Forgets what others have settled while we were away: far behind the floor, words are those of other messages.
    fn drop_settled(&mut self) {
        let floor = self.ledger.floor();
        if self.reserved.start < floor {
            self.reserved.start = floor.min(self.reserved.end);
        }
        self.candidates.retain(|sequence| *sequence >= floor);
    }

    /// Nothing can be taken: because the topic is gone?
    #[cold]
    fn nothing(&self) -> Result<bool, RecvError> {
        match self.gone() {
            Some(reason) => Err(RecvError::Gone(reason)),
            None => Ok(false),
        }
    }

    #[inline]
    fn take_up_to(&mut self, most: usize, count: usize, now: u64) -> Result<bool, RecvError> {
        let mut passed = 0;
        while self.items.len() < count {
            if passed == most {
                self.left_off = true;
                break;
            }
            let had = self.items.len();
            let wanted = count - had;
            let is_new = self.candidates.is_empty();
            let sequence = match self.candidates.pop_front() {
                // What comes back goes before what is new.
                Some(sequence) => sequence,
                None if self.reserved.is_empty() && !self.reserve(wanted as u64, now) => break,
                None if self.take_run(wanted, now) => continue,
                None => self.next_reserved(),
            };
            let was_to_be_had = match self.try_take(sequence, now) {
                Ok(was_to_be_had) => was_to_be_had,
                Err(error) if self.items.is_empty() => return Err(error),
                Err(_) => {
                    // What has been taken comes first.
                    self.candidates.push_front(sequence);
                    break;
                }
            };
            // What a scan finds again and again, and the coordinator has to release, must not keep a look from what is new.
            passed += usize::from(self.items.len() == had && (is_new || was_to_be_had));
        }
        Ok(!self.items.is_empty())
    }

    /// There is nothing new. A good moment for everything else, and then for one more look.
    #[cold]
    fn take_idle(&mut self, most: usize, count: usize, now: u64) -> Result<bool, RecvError> {
        self.raise_floor();
        self.work_off_moves();
        self.moves.close_unused(now);
        if self.group.options.ordered_by_key {
            return self.take_ordered(most, count, now);
        }
        self.scan_idle(now);
        self.take_up_to(most, count, now)
    }

    /// The first of what is reserved, which must not be nothing.
    #[inline]
    fn next_reserved(&mut self) -> u64 {
        let sequence = self.reserved.start;
        self.reserved.start += 1;
        let ahead = sequence.saturating_add(AHEAD);
        if ahead < self.reserved.end {
            self.log.prefetch(ahead);
        }
        sequence
    }

    /// Reserves messages that nobody has been handed yet.
    fn reserve(&mut self, wanted: u64, now: u64) -> bool {
        let stride = self.stride.next(now);
        for _ in 0..RESERVE_ATTEMPTS {
            let hint = self.ledger.hint();
            let window_end = self.ledger.window_end(self.ledger.floor());
            let to = hint.saturating_add(wanted.max(stride)).min(window_end);
            if to <= hint {
                return false;
            }
            let end = self.log.committed_end(hint, to);
            if end <= hint {
                return false;
            }
            // As far as runs go, so that what is left begins with one.
            let whole = end / RUN * RUN;
            let end = if whole > hint { whole } else { end };
            if self.ledger.reserve(hint, end - hint) {
                self.reserved = hint..end;
                self.ledger.prefetch_runs(hint..end);
                (hint..end.min(hint.saturating_add(AHEAD))).for_each(|sequence| self.log.prefetch(sequence));
                return true;
            }
        }
        false
    }

    /// Takes the message if it is to be had; whether it was when it was looked at. Then it has been read.
    #[inline]
    pub(super) fn try_take(&mut self, sequence: u64, now: u64) -> Result<bool, RecvError> {
        let exclusive = self.group.options.exclusive;
        let mut seen = self.ledger.look(sequence);
        if exclusive && seen.is_leased_by_other(self.me) {
            seen = self.end_late_lease(seen, now);
        }
        if seen.state() != State::Fresh && !self.may_take_again(seen, now)? {
            return Ok(false);
        }
        let (body, origin) = match self.log.read(sequence, &mut self.copies) {
            Got::Message(body, origin) => (body, origin),
            Got::Hole => {
                let settled = self.ledger.settle(seen);
                self.flush.count(settled);
                return Ok(true);
            }
            Got::Unsound(problem) => return self.unless_changed(seen, problem).map(|()| true),
        };
        let payload_at = if self.info.options.envelope {
            match self.open_envelope(seen, body, now) {
                Ok(Some(payload_at)) => payload_at,
                other => {
                    self.copies.undo(body);
                    return other.map(|_| true);
                }
            }
        } else {
            0
        };
        let at_most_once = self.guarantee() == Guarantee::AtMostOnce;
        let taken = if at_most_once && !exclusive {
            let settled = self.ledger.settle(seen);
            self.flush.count(settled);
            settled.then(|| seen.settled())
        } else {
            let now = if self.copies.bytes(body).len() > LONG_COPY_BYTES { clock::now_ms() } else { now };
            self.ledger.take(seen, self.me, self.lease_end(now))
        };
        let Some(lease) = taken else {
            self.copies.undo(body);
            // Whoever was faster has a lease that no scan of ours has seen.
            self.scan.look_again(now);
            return Ok(true);
        };
        if seen.state() != State::Fresh {
            self.count_redelivery();
        }
        self.in_flight += u64::from(!at_most_once);
        self.items.push(Item { lease, run: None, body, payload_at, origin, kept: Cell::new(false) });
        Ok(true)
    }

    /// Where the payload of a message on a topic with envelopes begins. `None`: it is not to be delivered, because it has
    /// expired or somebody else has had it meanwhile.
    pub(super) fn open_envelope(&mut self, seen: Seen, body: Copy, now: u64) -> Result<Option<usize>, RecvError> {
        let bytes = self.copies.bytes(body);
        let opened = envelope::split(bytes, self.info.batch_align());
        let sound = opened.filter(|(_, payload)| self.lengths.allow(payload.len() as u64));
        let Some((view, payload)) = sound else {
            return self.unless_changed(seen, "a message's envelope is garbled").map(|()| None);
        };
        if !view.is_expired() {
            return Ok(Some(bytes.len() - payload.len()));
        }
        self.expire(seen, now);
        Ok(None)
    }

    /// Its time-to-live has ended: it is settled, or goes to the dead-letter topic.
    #[cold]
    fn expire(&mut self, seen: Seen, now: u64) {
        let expired = if self.group.options.dead_letter_expired {
            self.take_move(seen, MoveReason::Expired, now)
        } else {
            let settled = self.ledger.settle(seen);
            self.flush.count(settled);
            settled
        };
        // Relaxed: only shown to people.
        self.ledger.header().counters.expired.fetch_add(u64::from(expired), Ordering::Relaxed);
    }

    /// What was read makes no sense. That is no error if somebody else has had the message meanwhile.
    #[cold]
    pub(super) fn unless_changed(&self, seen: Seen, problem: &'static str) -> Result<(), RecvError> {
        if self.ledger.look(seen.sequence()) == seen { Err(RecvError::Corrupt(problem)) } else { Ok(()) }
    }

    #[cold]
    fn count_redelivery(&self) {
        // Relaxed: only shown to people.
        self.ledger.header().counters.redelivered.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a message that was handed out before may be delivered now. Also does what else is to be done about it.
    #[cold]
    fn may_take_again(&mut self, seen: Seen, now: u64) -> Result<bool, RecvError> {
        match seen.state() {
            State::Fresh => return Ok(true),
            State::Settled => return Ok(false),
            State::Corrupt => return Err(RecvError::Corrupt("a word of the group's ledger makes no sense")),
            State::Moving(reason) if seen.owner().is_none() => {
                self.take_move(seen, reason, now);
                return Ok(false);
            }
            _ => {}
        }
        // A clock read before the word might be a clock of long ago, if we slept between.
        if !seen.is_due(clock::now_ms()) {
            return Ok(false);
        }
        let moving = matches!(seen.state(), State::Moving(_));
        let leased = seen.state() == State::Leased;
        if moving || leased && self.guarantee() == Guarantee::EffectivelyOnce {
            if let Some(owner) = seen.owner().filter(|owner| *owner != self.me) {
                self.reclaim(owner, now);
            }
            return Ok(false);
        }
        let most = self.group.options.max_attempts;
        if most > 0 && u32::from(seen.attempt()) >= most {
            self.take_move(seen, MoveReason::Exhausted, now);
            return Ok(false);
        }
        Ok(true)
    }

    /// Begins to move a message to the dead-letter topic, or goes on with a move that nobody carries on with.
    pub(super) fn take_move(&mut self, seen: Seen, reason: MoveReason, now: u64) -> bool {
        let Some(seen) = self.ledger.begin_move(seen, self.me, self.lease_end(now), reason) else { return false };
        self.moves.add(seen, None);
        true
    }

    pub(super) fn is_limited(&self) -> bool {
        self.has_own_limit() || self.group.options.max_in_flight > 0
    }

    /// How many more leases this consumer and its group may have.
    fn room(&mut self, now: u64) -> u64 {
        if self.in_flight >= self.max_in_flight {
            // Leases that have ended, or were lost, count no more.
            self.in_flight = self.ledger.leased(Some(self.me), now);
        }
        let own = self.max_in_flight.saturating_sub(self.in_flight);
        match u64::from(self.group.options.max_in_flight) {
            0 => own,
            most => own.min(most.saturating_sub(self.ledger.leased(None, now))),
        }
    }

    /// Gives back what was taken beyond what the group may have, counted once for all of it. Whether something is left.
    fn keep_group_limit(&mut self) -> bool {
        // At most once nothing is leased.
        if self.items.is_empty() || self.guarantee() == Guarantee::AtMostOnce {
            return !self.items.is_empty();
        }
        let now = clock::now_ms();
        let beyond = self.beyond_group_limit(now).min(self.items.len() as u64);
        for _ in 0..beyond {
            let Some(item) = self.items.pop() else { break };
            self.copies.undo(item.body);
            self.ledger.give_back_unseen(item.lease, now);
            self.in_flight = self.in_flight.saturating_sub(1);
        }
        if beyond > 0 {
            self.ring_readers();
            self.scan.look_again(now);
        }
        !self.items.is_empty()
    }

    /// How many leases the group has more than it may have, after some were added. Two consumers that add the last one at
    /// the same time both count after their swap, so at least one of them sees both.
    pub(super) fn beyond_group_limit(&self, now: u64) -> u64 {
        let most = u64::from(self.group.options.max_in_flight);
        if most == 0 {
            return 0;
        }
        // SeqCst: R-COUNTED, then A-COUNTED; pairs with the same fence of another consumer.
        // Store, then look: our leases, then everybody's. Of two, at least one sees both.
        fence(Ordering::SeqCst);
        self.ledger.leased(None, now).saturating_sub(most)
    }
}
