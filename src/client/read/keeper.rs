//! The reader's side of the gate.

use crate::ring::cursor::{Cursor, CursorsHeader};
use crate::shm::shared::Shared;
use crate::shm::topic::SharedInfo;

/// The reader's side of the gate: when to store the cursor, and whom to wake.
pub(super) struct CursorKeeper {
    pub(super) readers: Shared<CursorsHeader>,
    cursors: Shared<[Cursor]>,
    index: usize,
    stored: u64,
    period: u64,
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
        CursorKeeper { readers, cursors, index: cursor as usize, stored, period }
    }

    /// Whether it is time to store the cursor: a period has passed, or a publisher waits.
    #[inline]
    pub(super) fn is_due(&self, position: u64) -> bool {
        position - self.stored >= self.period || (position != self.stored && self.readers.writers.is_waited_on())
    }

    #[inline]
    pub(super) fn maybe_store(&mut self, position: u64, sequence: u64) {
        if self.is_due(position) {
            self.store(position, sequence);
        }
    }

    /// Stores the cursor and wakes publishers that wait for it.
    pub(super) fn store(&mut self, position: u64, sequence: u64) {
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
