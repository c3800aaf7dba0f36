//! Runs: messages side by side that are taken and settled with one swap.
//!
//! [`RUN`] messages that lie side by side share one more word, of the same form, by which a consumer takes and
//! settles all of them with one swap each. In every lap a run's word goes one of these ways:
//!
//! ```text
//! untouched ──▶ leased ──▶ settled
//!     │           └──────▶ split     each message is leased as the run was, until its own word says otherwise
//!     └──────────────────▶ apart     each message is fresh, until its own word says otherwise
//! ```
//!
//! Whoever changes one message alone first parts the run, and a run once parted stays so for the lap (I-13). So while a
//! run is not parted its messages' own words are those of laps before, and not looked at; afterwards each of them changes
//! in this very lap. [`WORD_BY_WORD`] bounds how old a word can grow.

use super::Ledger;
use super::word::*;
use crate::sync::{AtomicU64, Ordering};

/// Messages that one swap takes or settles, where they begin at a multiple of it.
pub const RUN: u64 = if cfg!(loom) { 2 } else { 16 };

/// Every so many laps no run is taken as a whole, so that no message's word is older than that and its lap can be told
/// from a later one.
pub(super) const WORD_BY_WORD: u64 = 2048;

/// What a run's word may say besides LEASED and SETTLED.
pub(super) const APART: u64 = 1;
pub(super) const SPLIT: u64 = 4;

/// Messages side by side whose run is not parted, as its word was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: u64,
    raw: u64,
}

impl Run {
    /// The sequences.
    pub fn sequences(self) -> std::ops::Range<u64> {
        self.first..self.first.saturating_add(RUN)
    }
}

/// What a run's word says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RunState {
    /// That of the lap before: nobody has taken one of its messages yet.
    Untouched,
    Apart,
    Leased,
    Split,
    Settled,
    Corrupt,
}

/// Run words that belong to a window of so many words; none if it is too short for a run.
pub fn runs_in(window: u64) -> u64 {
    window / RUN * 2
}

impl Ledger {
    /// The word of the run that `sequence` is in; used every other lap, because the run that the floor is in may still need
    /// its word when the one a window above begins.
    #[inline]
    pub(super) fn run_word(&self, sequence: u64) -> Option<&AtomicU64> {
        self.runs.get(((sequence & (2 * self.window() - 1)) / RUN) as usize)
    }

    /// What that word says. Without runs: that every message stands alone.
    #[inline(always)]
    pub(super) fn load_run(&self, sequence: u64) -> u64 {
        // Acquire: A-LEDGER pairs with R-LEDGER (swap_run).
        let apart = || self.pack(sequence, 0, 0, NOBODY, APART);
        self.run_word(sequence).map_or_else(apart, |word| word.load(Ordering::Acquire))
    }

    #[inline(always)]
    pub(super) fn run_state(&self, sequence: u64, run: u64) -> RunState {
        let state = run & STATE_MASK;
        if self.is_of_lap(sequence, run) {
            return match state {
                APART => RunState::Apart,
                LEASED => RunState::Leased,
                SETTLED => RunState::Settled,
                SPLIT => RunState::Split,
                _ => RunState::Corrupt,
            };
        }
        // Every lap leaves its mark on the run's word, and every other lap it is this one.
        let preceding = ((run >> LAP_SHIFT) + 2) % LAPS == self.lap_field(sequence);
        if run == 0 || preceding && matches!(state, APART | SETTLED | SPLIT) {
            RunState::Untouched
        } else {
            RunState::Corrupt
        }
    }

    /// Parts the run of a message whose own word has not been written in this lap. Returns that word; `None`: the message
    /// is not as seen.
    /// Crash points: a run that was parted for nothing says the same about each of its messages as before.
    #[inline(never)]
    pub(super) fn part(&self, seen: Seen) -> Option<u64> {
        let parted = match self.run_state(seen.sequence, seen.run) {
            RunState::Apart | RunState::Split => seen.run,
            RunState::Untouched => self.pack(seen.sequence, self.round(seen.sequence), 0, NOBODY, APART),
            RunState::Leased => seen.run & !STATE_MASK | SPLIT,
            RunState::Settled | RunState::Corrupt => return None,
        };
        // Where it fails, the run may have been parted alike for another one's message.
        if parted != seen.run && self.swap_run(seen.sequence, seen.run, parted).is_err_and(|now| now != parted) {
            return None;
        }
        if seen.raw != UNREAD {
            return Some(seen.raw);
        }
        // Not by its own word alone: while we slept it may have become one of a later lap.
        let now = self.look(seen.sequence);
        (now.says == seen.says).then_some(now.raw)
    }

    #[inline]
    fn swap_run(&self, sequence: u64, seen: u64, new: u64) -> Result<(), u64> {
        // Release: R-LEDGER pairs with A-LEDGER (load_run), for the reasons in `swap`, for all messages of the run.
        // Relaxed where it fails: what is there is compared, and then the message's own word decides.
        let Some(word) = self.run_word(sequence) else { return Err(0) };
        word.compare_exchange(seen, new, Ordering::Release, Ordering::Relaxed).map(drop)
    }

    /// The run that begins at `first`, if none of its messages has been touched: to be copied, and then taken. The caller
    /// has seen that all of it lies below `floor + window`.
    #[inline]
    pub fn look_at_run(&self, first: u64) -> Option<Run> {
        if self.runs.is_empty() || !first.is_multiple_of(RUN) || self.lap(first) % WORD_BY_WORD == WORD_BY_WORD - 1 {
            return None;
        }
        let raw = self.load_run(first);
        // The floor as in `look`.
        let untouched = self.run_state(first, raw) == RunState::Untouched && !self.is_passed(first);
        untouched.then_some(Run { first, raw })
    }

    /// What an untouched run becomes when it is leased to `owner` until `due`.
    #[inline]
    pub fn leased_run(&self, run: Run, owner: u8, due: u64) -> Run {
        Run { raw: self.pack(run.first, due, 1, owner, LEASED), ..run }
    }

    /// Leases all messages of an untouched run. `false`: somebody was faster with one of them.
    #[inline]
    pub fn take_run(&self, run: Run, leased: Run) -> bool {
        self.swap_run(run.first, run.raw, leased.raw).is_ok()
    }

    /// Settles all messages of a run that was taken or, for a delivery at most once, is untouched. `false`: one of them
    /// has been changed alone since.
    #[inline]
    pub fn settle_run(&self, run: Run, owner: u8) -> bool {
        let settled = self.pack(run.first, self.round(run.first), 1, owner, SETTLED);
        self.swap_run(run.first, run.raw, settled).is_ok()
    }

    /// The lease of one message of a run that was taken.
    #[inline]
    pub fn lease_in(&self, run: Run, sequence: u64) -> Seen {
        Seen { sequence, raw: UNREAD, run: run.raw, says: run.raw }
    }

    /// Asks for the words of the runs that will be looked at next.
    #[cfg(not(loom))]
    pub(crate) fn prefetch_runs(&self, sequences: std::ops::Range<u64>) {
        const RUNS_PER_LINE: u64 = 64 / size_of::<AtomicU64>() as u64;
        for first in sequences.step_by((RUN * RUNS_PER_LINE) as usize) {
            self.run_word(first).inspect(|word| crate::os::cache::prefetch_line(word.as_ptr().cast()));
        }
    }
}
