//! The reader's side of the gate.

use super::Glance;
use crate::ring::cursor::{Cursor, CursorsHeader, in_force};
use crate::shm::shared::Shared;
use crate::shm::topic::SharedInfo;

/// The reader's side of the gate: when to store the cursor, and whom to wake.
pub(super) struct CursorKeeper {
    pub(super) readers: Shared<CursorsHeader>,
    cursors: Shared<[Cursor]>,
    index: usize,
    stored: u64,
    period: u64,
    /// Arena bytes read since the cursor was last stored, and how many may be.
    bytes: u64,
    byte_period: u64,
    hold: bool,
}

impl CursorKeeper {
    pub(super) fn new(
        readers: Shared<CursorsHeader>,
        cursors: Shared<[Cursor]>,
        cursor: u32,
        stored: u64,
        info: &SharedInfo,
    ) -> Self {
        // Often enough that a full ring never waits for a reader that has long read on.
        let period = (info.options.messages / 16).clamp(1, info.geometry.slack());
        let byte_period = info.geometry.arena_bytes / 16;
        let index = cursor as usize;
        CursorKeeper { readers, cursors, index, stored, period, bytes: 0, byte_period, hold: info.options.hold }
    }

    /// The ring is empty at `position`: is there anything to be done about it?
    #[inline]
    pub(super) fn glance_at_nothing(&self, position: u64) -> Glance {
        let settled = position == self.stored && !self.readers.readers.wants_attention();
        if settled { Glance::Nothing } else { Glance::Unclear }
    }

    /// Whether no other reader's cursor is in force. Stale at once, and not for every message.
    pub(super) fn is_alone(&self) -> bool {
        in_force(&self.readers, &self.cursors) == 1
    }

    /// Whether it is time to store the cursor: a sixteenth of the ring or of an arena has been read, or a publisher waits.
    #[inline]
    pub(super) fn is_due(&self, position: u64) -> bool {
        position - self.stored >= self.period
            || self.bytes >= self.byte_period
            || (position != self.stored && self.readers.writers.is_waited_on())
    }

    /// Counts a payload that lies in an arena.
    #[inline]
    pub(super) fn count_bytes(&mut self, len: usize) {
        self.bytes += len as u64;
    }

    #[inline]
    pub(super) fn maybe_store(&mut self, position: u64, sequence: u64) {
        if self.is_due(position) {
            self.store(position, sequence);
        }
    }

    /// Takes the cursor out of force: publishers need not wait until the coordinator learns of it. On topics that hold,
    /// the coordinator does so after it has noted what was read.
    pub(super) fn leave(&mut self, position: u64, sequence: u64) {
        self.store(position, sequence);
        if self.hold {
            return;
        }
        self.cursors[self.index].withdraw();
        if !self.readers.writers.is_quiet() {
            self.readers.writers.ring();
        }
    }

    /// Stores the cursor and wakes publishers that wait for it.
    pub(super) fn store(&mut self, position: u64, sequence: u64) {
        self.bytes = 0;
        if position == self.stored {
            return;
        }
        self.cursors[self.index].advance(position, sequence);
        self.stored = position;
        if !self.readers.writers.is_quiet() {
            self.readers.writers.ring();
        }
    }
}
