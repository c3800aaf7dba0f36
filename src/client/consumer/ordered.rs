//! Ordered by key (ARCHITECTURE.md §4.9): of each key only the first message that is not settled may be taken.
//!
//! Every consumer reads along all messages from the floor on and keeps them apart by key. That all earlier ones of a key
//! are settled stays true once it was seen, and the swap of the word admits one taker: so messages of one key are
//! delivered in order and one at a time, also across redelivery.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::BuildHasher;

use super::copies::Copy;
use super::core::Core;
use super::fetch::Got;
use crate::client::envelope;
use crate::error::RecvError;
use crate::ring::ledger::State;

/// Messages read along at a time.
const READ_AHEAD: u64 = 64;

/// Messages that a look passes over for each time that it reads along.
const PASSED_A_ROUND: usize = 4;

/// When to look again at what another consumer is moving to the dead-letter topic.
const MOVE_LOOK_MS: u64 = 10;

/// What a consumer has read along.
#[derive(Default)]
pub(super) struct Ordered {
    /// Everything from the floor to here is in the queues, or settled.
    read_to: u64,
    hasher: RandomState,
    /// By the hash of the key: two keys that share one are merely kept in order together.
    queues: HashMap<u64, VecDeque<u64>>,
    /// The first of each queue, and whose it is.
    heads: BTreeMap<u64, u64>,
    /// How far a look had come that left off.
    left_at: Along,
}

impl Ordered {
    fn add(&mut self, sequence: u64, key: &[u8]) {
        let key = self.hasher.hash_one(key);
        let queue = self.queues.entry(key).or_default();
        if queue.is_empty() {
            self.heads.insert(sequence, key);
        }
        queue.push_back(sequence);
    }

    /// The first head from `from` on.
    fn head(&self, from: u64) -> Option<u64> {
        self.heads.range(from..).next().map(|(sequence, _)| *sequence)
    }

    /// The head is settled: the next of its key takes its place.
    fn pop(&mut self, head: u64) {
        let Some(key) = self.heads.remove(&head) else { return };
        let Some(queue) = self.queues.get_mut(&key) else { return };
        queue.pop_front();
        match queue.front() {
            Some(next) => drop(self.heads.insert(*next, key)),
            None => drop(self.queues.remove(&key)),
        }
    }
}

/// How far one look at the heads has come.
#[derive(Default)]
struct Along {
    /// The clock of the look.
    at_ms: u64,
    /// The heads below have been tried.
    from: u64,
    /// How many of them had been settled, or were now, because they had expired.
    passed: usize,
    /// In how many milliseconds the first of the others may be had.
    due_in: Option<u64>,
}

impl Along {
    /// A head is not to be had before so many milliseconds have passed; `None`: it is settled.
    fn rests(&mut self, due_in: Option<u64>) {
        match due_in {
            None => self.passed += 1,
            Some(ms) => self.due_in = Some(self.due_in.map_or(ms, |least| least.min(ms))),
        }
    }
}

impl Core {
    /// Takes up to `count` messages, no two of one key.
    pub(super) fn take_ordered(&mut self, most: usize, count: usize, now: u64) -> Result<bool, RecvError> {
        let mut along = self.go_on_along(now);
        let goes_on = along.from > 0;
        for _ in 0..most / PASSED_A_ROUND {
            if let Err(error) = self.try_heads(&mut along, most, count, now) {
                // What has been taken comes first.
                return if self.items.is_empty() { Err(error) } else { Ok(true) };
            }
            let has_more = self.items.len() < count;
            if has_more && along.passed >= most {
                break;
            }
            if !has_more || !self.read_along()? {
                self.scan.wake_in(now, along.due_in);
                // What was given back behind it meanwhile has rung for nobody.
                self.left_off = has_more && goes_on;
                return Ok(!self.items.is_empty());
            }
        }
        self.left_off = true;
        self.ordered.left_at = along;
        Ok(!self.items.is_empty())
    }

    /// Where a look at the heads begins: at the first, or where the last one left off if the clock has not moved on since. What
    /// rested then rests still, and need not be asked once more for every few messages that are passed over.
    fn go_on_along(&mut self, now: u64) -> Along {
        let left_at = std::mem::take(&mut self.ordered.left_at);
        if left_at.at_ms == now { Along { passed: 0, ..left_at } } else { Along { at_ms: now, ..Along::default() } }
    }

    /// Tries the heads from where the look has come to, until there are `count` messages, or `most` have been passed over.
    fn try_heads(&mut self, along: &mut Along, most: usize, count: usize, now: u64) -> Result<(), RecvError> {
        while self.items.len() < count
            && along.passed < most
            && let Some(head) = self.ordered.head(along.from)
        {
            along.from = head + 1;
            let due_in = self.head_due_in(head, now);
            match due_in {
                Some(0) => self.try_head(along, head, now)?,
                _ => along.rests(due_in),
            }
        }
        Ok(())
    }

    /// Takes a head if it is still to be had.
    fn try_head(&mut self, along: &mut Along, head: u64, now: u64) -> Result<(), RecvError> {
        let taken = self.items.len();
        self.try_take(head, now)?;
        if self.items.len() == taken {
            // It had expired: the next of its key comes at once. Or somebody was faster: until the end of that lease.
            let due_in = self.head_due_in(head, now);
            // Zero: its owner is overdue and has the coordinator to answer to, which is not the others' affair.
            if due_in != Some(0) {
                along.rests(due_in);
            }
        }
        Ok(())
    }

    /// In how many milliseconds a head may be had. `None`: it is settled, and the next of its key in its place.
    fn head_due_in(&mut self, head: u64, now: u64) -> Option<u64> {
        let seen = self.ledger.look(head);
        match seen.state() {
            State::Settled => {
                self.ordered.pop(head);
                None
            }
            State::Returned | State::Leased => Some(seen.due_in(now)),
            State::Moving(_) if seen.owner().is_some() => Some(seen.due_in(now).min(MOVE_LOOK_MS)),
            _ => Some(0),
        }
    }

    /// Reads some more messages along. `false`: there are no more, or the window is full.
    fn read_along(&mut self) -> Result<bool, RecvError> {
        let floor = self.ledger.floor();
        let from = self.ordered.read_to.max(floor);
        let to = from.saturating_add(READ_AHEAD).min(self.ledger.window_end(floor));
        if to <= from {
            return Ok(false);
        }
        let end = self.log.committed_end(from, to);
        // Before anything is taken there: what is taken is found by those who repair.
        self.ledger.raise_hint(end);
        for sequence in from..end {
            self.read_one_along(sequence)?;
            self.ordered.read_to = sequence + 1;
        }
        Ok(end > from)
    }

    fn read_one_along(&mut self, sequence: u64) -> Result<(), RecvError> {
        let seen = self.ledger.look(sequence);
        if seen.state() == State::Settled {
            return Ok(());
        }
        match self.log.read(sequence, &mut self.copies) {
            Got::Message(copy, _) => {
                let added = self.add_ordered(sequence, copy);
                self.copies.undo(copy);
                if added { Ok(()) } else { self.unless_changed(seen, "a message's envelope is garbled") }
            }
            Got::Hole => {
                let settled = self.ledger.settle(seen);
                self.flush.count(settled);
                Ok(())
            }
            Got::Unsound(problem) => self.unless_changed(seen, problem),
        }
    }

    /// `false`: its envelope is garbled.
    fn add_ordered(&mut self, sequence: u64, copy: Copy) -> bool {
        let body = self.copies.bytes(copy);
        let key = if self.info.options.envelope {
            envelope::split(body, self.info.batch_align()).map(|(view, _)| view.key().unwrap_or_default())
        } else {
            Some(&[][..])
        };
        key.map(|key| self.ordered.add(sequence, key)).is_some()
    }
}
