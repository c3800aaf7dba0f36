//! When to look at what has been handed out before, and what was seen then.

use std::collections::HashMap;
use std::time::Duration;

use super::core::Core;
use crate::group::Guarantee;
use crate::os::clock;
use crate::ring::ledger::State;

/// Candidates collected by one scan; there is another one behind them.
const MAX_CANDIDATES: usize = 1024;

/// A consumer that always finds something new looks all the same so often at what others have left behind.
const SCAN_EVERY_MS: u64 = 100;

/// Messages that scans look at within a step of the clock before they leave what is given back meanwhile to the next one:
/// well below a step's time. Whoever gives back as fast as he can would have every look see all of the window.
const SEEN_A_STEP: u64 = 1 << 16;

/// When to wake up for a move of ours that waits.
const MOVE_AGAIN_MS: u64 = 10;

/// How often the coordinator is asked about one owner.
const RECLAIM_EVERY_MS: u64 = 1000;

/// What the last scan saw.
#[derive(Default)]
pub(super) struct Scan {
    /// The clock when it was done.
    at_ms: u64,
    /// How many messages were looked at within that step of the clock.
    seen: u64,
    /// The count of what had been given back then.
    returned: u64,
    /// Up to where messages had been handed out then.
    hint: u64,
    /// Whether it looked at everything: also for what others had reserved and not taken.
    was_whole: bool,
    /// The earliest moment at which something seen comes due.
    due_at: Option<u64>,
    reclaimed: HashMap<u8, u64>,
}

impl Scan {
    /// The earliest moment at which something will be due, as far as is known.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.due_at
    }

    /// How long to sleep at most because of it.
    pub(super) fn nap(&self) -> Option<Duration> {
        let due_at = self.due_at?;
        Some(Duration::from_millis(due_at.saturating_sub(clock::now_ms()).max(1)))
    }

    /// Something comes due in so many milliseconds from `now`.
    pub(super) fn wake_in(&mut self, now: u64, due_in: Option<u64>) {
        self.due_at = due_in.map(|ms| now + ms);
    }

    /// Something was not as it had been seen: look again when the clock has moved on.
    pub(super) fn look_again(&mut self, now: u64) {
        self.look_by(now + 1);
    }

    /// Look again at this moment at the latest.
    pub(super) fn look_by(&mut self, at: u64) {
        self.due_at = Some(self.due_at.map_or(at, |due_at| due_at.min(at)));
    }

    /// Whether the coordinator may be asked about `owner` again.
    pub(super) fn may_reclaim(&self, owner: u8, now: u64) -> bool {
        self.reclaimed.get(&owner).is_none_or(|last| now >= last + RECLAIM_EVERY_MS)
    }

    /// The coordinator has been asked about `owner`.
    pub(super) fn has_reclaimed(&mut self, owner: u8, now: u64) {
        self.reclaimed.insert(owner, now);
    }
}

impl Core {
    /// How long to sleep at most before the next look; `None`: until the bell rings.
    pub(super) fn nap(&self) -> Option<Duration> {
        if self.left_off { Some(Duration::ZERO) } else { self.scan.nap() }
    }

    /// Looks for messages to be delivered again, if there is reason to: something was given back, the earliest moment known
    /// has come, or it is long since. Not more often than the clock moves on, and not before it has since the last one.
    #[inline]
    pub(super) fn scan_if_due(&mut self, now: u64) {
        if now <= self.scan.at_ms {
            return;
        }
        let due = self.scan.due_at.is_some_and(|due_at| now >= due_at);
        if due || now >= self.scan.at_ms + SCAN_EVERY_MS || self.ledger.returned() != self.scan.returned {
            self.scan(now, self.scan.hint);
        }
    }

    /// Looks at everything between floor and hint, with nothing better to do: also takes over what others have reserved
    /// and not taken. What is given back it looks for at once, as long as that takes no time to speak of.
    pub(super) fn scan_idle(&mut self, now: u64) {
        let anew = self.ledger.returned() != self.scan.returned;
        if now <= self.scan.at_ms && self.scan.was_whole && !(anew && self.scan.seen < SEEN_A_STEP) {
            // What was handed out or given back since will be looked at when the clock has moved on.
            if anew || self.scan.hint != self.ledger.hint() {
                self.scan.due_at = Some(self.scan.at_ms + 1);
            }
            return;
        }
        self.scan(now, u64::MAX);
    }

    /// Looks at everything between floor and hint: after a consumer of an exclusive group has become the one at work,
    /// so that it begins where the other one ended.
    pub(super) fn scan_all(&mut self, now: u64) {
        self.scan(now, u64::MAX);
    }

    /// What was reserved below `stranded` and has not been taken, nobody seems to come to.
    #[cold]
    fn scan(&mut self, now: u64, stranded: u64) {
        self.scan.was_whole = stranded == u64::MAX;
        // Before the words: what is given back while we look is looked for again.
        self.scan.returned = self.ledger.returned();
        self.scan.hint = self.ledger.hint();
        let keeps_own = self.guarantee() == Guarantee::EffectivelyOnce;
        self.candidates.clear();
        let mut due_in: Option<u64> = None;
        let mut come_due = |ms: u64| due_in = Some(due_in.map_or(ms, |least: u64| least.min(ms)));
        let handed_out = self.ledger.handed_out();
        let seen_before = if now <= self.scan.at_ms { self.scan.seen } else { 0 };
        self.scan.seen = seen_before + (handed_out.end - handed_out.start);
        for sequence in handed_out {
            let seen = self.ledger.look(sequence);
            let wait_ms = match seen.state() {
                State::Fresh if sequence < stranded && !self.reserved.contains(&sequence) => 0,
                // Only the coordinator knows whether we have committed the outputs of what we let lie.
                State::Leased if keeps_own && seen.owner() == Some(self.me) => continue,
                State::Returned | State::Leased => seen.due_in(now),
                State::Moving(_) if seen.owner().is_none() => 0,
                State::Moving(_) if seen.owner() != Some(self.me) => seen.due_in(now),
                // Ours waits for room.
                State::Moving(_) => MOVE_AGAIN_MS,
                State::Corrupt => 0,
                _ => continue,
            };
            if wait_ms > 0 {
                come_due(wait_ms);
            } else if self.candidates.len() < MAX_CANDIDATES {
                self.candidates.push_back(sequence);
            } else {
                come_due(1);
            }
        }
        self.scan.due_at = due_in.map(|ms| now + ms);
        // It may have taken longer than a step: then others have their turn before the next.
        self.scan.at_ms = clock::now_ms();
    }
}
