//! Whether to evict lines that have been read: found out by trying.
//!
//! A line that a reader leaves in its cache costs the publisher an upgrade a lap later; a line that it evicts costs the
//! publisher a fetch instead. Which is dearer depends on how far the two cores are from each other: with distant ones
//! evicting makes a stream up to twice as fast, with near ones less than half as fast. Cores move (virtual ones every few
//! seconds), so a reader keeps comparing: now and then it does the other thing for a few laps.

use std::time::Instant;

/// A window of one way, in laps: what is done in one lap shows in the next, so only the last ones are timed.
const WINDOW_LAPS: u64 = 4;
const TIMED_LAPS: u64 = 2;

/// After so many windows the other way gets one.
const WINDOWS_PER_TRIAL: u32 = 32;

/// Evicting must be this much better to be chosen.
const MARGIN: f64 = 0.9;

/// Weight of the newest window in a way's mean.
const NEWEST: f64 = 0.25;

pub(super) struct Evictor {
    slots: u64,
    /// What is being done in this window.
    on: bool,
    /// What has proved better.
    chosen: bool,
    windows: u32,
    window_start: u64,
    timed_from: Option<(Instant, u64)>,
    /// Nanoseconds a message: without evicting, with it.
    cost_ns: [Option<f64>; 2],
}

impl Evictor {
    pub(super) fn new(slots: u64, position: u64) -> Self {
        let cost_ns = [None; 2];
        Evictor { slots, on: false, chosen: false, windows: 0, window_start: position, timed_from: None, cost_ns }
    }

    /// Whether to evict.
    #[inline(always)]
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// Does nothing of the kind for now, because others read, too.
    pub(super) fn rest(&mut self, position: u64) {
        *self = Evictor::new(self.slots, position);
    }

    /// Called once in a while with the reader's position.
    pub(super) fn observe(&mut self, position: u64) {
        let begins = self.timed_from.is_none() && self.is_done(position, WINDOW_LAPS - TIMED_LAPS);
        // The clock is read only where it matters.
        if begins || self.is_done(position, WINDOW_LAPS) {
            self.observe_at(position, Instant::now());
        }
    }

    /// Whether so many laps of the window are over.
    fn is_done(&self, position: u64, laps: u64) -> bool {
        position - self.window_start >= self.slots * laps
    }

    fn observe_at(&mut self, position: u64, now: Instant) {
        if self.timed_from.is_none() && self.is_done(position, WINDOW_LAPS - TIMED_LAPS) {
            self.timed_from = Some((now, position));
        }
        if !self.is_done(position, WINDOW_LAPS) {
            return;
        }
        if let Some((since, from)) = self.timed_from.take() {
            let cost = (now - since).as_nanos() as f64 / (position - from).max(1) as f64;
            let mean = &mut self.cost_ns[usize::from(self.on)];
            *mean = Some(mean.map_or(cost, |mean| mean + NEWEST * (cost - mean)));
        }
        self.begin_window(position);
    }

    fn begin_window(&mut self, position: u64) {
        if let [Some(off), Some(on)] = self.cost_ns {
            self.chosen = on < off * MARGIN;
        }
        self.windows = (self.windows + 1) % WINDOWS_PER_TRIAL;
        self.on = self.chosen != (self.windows == 0);
        self.window_start = position;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Feeds laps that cost so much a message with what is done, by a clock of its own; returns what was chosen.
    fn settle(off_ns: u64, on_ns: u64) -> bool {
        const SLOTS: u64 = 16;
        let (mut evictor, mut now) = (Evictor::new(SLOTS, 0), Instant::now());
        for lap in 1..=200 * WINDOW_LAPS {
            let cost_ns = if evictor.is_on() { on_ns } else { off_ns };
            now += Duration::from_nanos(cost_ns * SLOTS);
            evictor.observe_at(lap * SLOTS, now);
        }
        evictor.chosen
    }

    #[test]
    fn the_cheaper_way_wins() {
        assert!(settle(1500, 500));
        assert!(!settle(500, 1500));
        assert!(!settle(1000, 950), "not worth it");
    }
}
