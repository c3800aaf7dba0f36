//! The gate: what a publisher may overwrite (ARCHITECTURE.md §4.3).
//!
//! ```text
//! publisher: intent := new ── fence ── scan cursors ── floor := min(new, lowest)
//! joiner:    cursor := at  ── fence ── look at intent; above the cursor? move up and again
//! ```

use crate::ring::cursor::{Cursor, CursorsHeader, Lowest, lowest, mark_used};
use crate::ring::log::{LogHeader, Place};
use crate::sync::{Ordering, fence};

/// Looks at the intent that a joiner makes. A reader that holds the ring stops publishers with the first, and each has at most one
/// raise under way; past others they run on, and garbage may do so for ever.
const JOIN_LOOKS: usize = if cfg!(loom) { 8 } else { 1000 };

/// What a topic's options say about overwriting.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// A publisher is stopped when the lowest gating reader is this many positions behind.
    pub messages: u64,
    /// Ring length in positions.
    pub slots: u64,
    /// Readers hold nothing back.
    pub overwrite: bool,
    /// Unread messages stay even without a reader.
    pub hold: bool,
    /// How far the floor is raised ahead of need.
    pub slack: u64,
}

/// Why there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The reader; `None` where the topic is `hold` and has none.
    pub cursor: Option<u32>,
    /// The position that is held.
    pub position: u64,
}

/// Why a publisher cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A reader holds the ring.
    Blocked(Blocked),
    /// Shared memory holds what no correct process writes.
    Corrupt(&'static str),
    /// A successor has taken the publisher's name.
    Fenced,
    /// A message with the same id is there already; its sequence, unless it is one of the same batch.
    Duplicate(Option<u64>),
}

/// What a publisher asks of the gate.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    /// The publisher's checkpoint slot.
    pub slot: u32,
    /// Where it will publish next.
    pub at: Place,
    /// How many positions it needs there.
    pub count: u64,
    /// Positions below this must be given up, because their arena space is needed.
    pub give_up_below: u64,
    /// How much further the floor may be raised, to be asked less often.
    pub slack: u64,
}

/// The memory the gate looks at.
#[derive(Clone, Copy)]
pub struct Gate<'m> {
    pub header: &'m LogHeader,
    pub readers: &'m CursorsHeader,
    pub cursors: &'m [Cursor],
}

impl Gate<'_> {
    /// Makes room as wanted. Returns the position up to which the caller may write without asking again.
    pub fn make_room(&self, policy: &Policy, want: Want) -> Result<u64, Blocked> {
        self.make_room_after(policy, want, |_| ())
    }

    /// The same; `settle` is told of every floor before it is raised to it.
    pub fn make_room_after(&self, policy: &Policy, want: Want, settle: impl Fn(u64)) -> Result<u64, Blocked> {
        // Before the floor may pass it: I-5.
        self.header.store_checkpoint(want.slot, want.at);
        let end = want.at.position + want.count;
        // Acquire: A-FLOOR pairs with R-FLOOR (raise): readers of what lies below have finished.
        let floor = self.header.floor.0.load(Ordering::Acquire);
        let held = self.held_from(policy, floor);
        if let Some(blocked) = held
            && end > blocked.position.saturating_add(policy.messages)
        {
            return Err(blocked);
        }
        let need = end.saturating_sub(policy.slots).max(want.give_up_below);
        let floor = if need > floor { self.raise(policy, want, need, held, settle)? } else { floor };
        // Release: R-COPY pairs with A-COPY (still_retained): the intent comes before whatever we write below the
        // floor, also where another publisher raised it.
        fence(Ordering::Release);
        let by_readers = held.map_or(u64::MAX, |b| b.position.saturating_add(policy.messages));
        // Not further than a chunk: the checkpoint, from which a tail is walked, should not grow old.
        let chunk = want.at.position + policy.slack.max(want.count);
        Ok(floor.saturating_add(policy.slots).min(by_readers).min(chunk))
    }

    /// Raises the floor to at least `need`, by `slack` more where nobody minds.
    fn raise(
        &self,
        policy: &Policy,
        want: Want,
        need: u64,
        held: Option<Blocked>,
        settle: impl Fn(u64),
    ) -> Result<u64, Blocked> {
        let ceiling = held.map_or(want.at.position, |b| b.position.min(want.at.position));
        if ceiling < need {
            return Err(held.unwrap_or(Blocked { cursor: None, position: ceiling }));
        }
        let target = (need + want.slack).min(ceiling);
        // Release: R-INTENT pairs with A-INTENT (announced): a joiner that is sent to the intent sees the ring as we saw it,
        // not entries of laps before; monotone by max.
        self.header.intent.0.fetch_max(target, Ordering::Release);
        // SeqCst: R-RAISED, then A-JOINED; pairs with R-JOINED, then A-RAISED (join).
        // Store, then look: the intent, then the cursors. Whose cursor we do not see sees the intent (I-4).
        fence(Ordering::SeqCst);
        let joined = self.held_from(policy, need);
        let confirmed = joined.map_or(target, |b| b.position.min(target));
        settle(confirmed);
        // AcqRel: R-FLOOR pairs with A-FLOOR (make_room): whoever uses this floor has our view of the readers, and what
        // lies below it has been settled.
        let floor = self.header.floor.0.fetch_max(confirmed, Ordering::AcqRel).max(confirmed);
        if floor < need {
            return Err(joined.unwrap_or(Blocked { cursor: None, position: floor }));
        }
        Ok(floor)
    }

    /// Notes that every gating reader has read up to its position: for topics that hold, before their last reader
    /// leaves. What has been read holds publishers up no longer, and stays until they need the room.
    pub(crate) fn release_read(&self, tail: u64) {
        if let Some(lowest) = self.lowest() {
            // Relaxed: publishers only compare it; what it lets them overwrite is guarded by the floor.
            self.header.released.0.fetch_max(lowest.position.min(tail), Ordering::Relaxed);
        }
    }

    /// Who holds positions from where on.
    fn held_from(&self, policy: &Policy, floor: u64) -> Option<Blocked> {
        match self.lowest() {
            _ if policy.overwrite => None,
            Some(lowest) => Some(Blocked { cursor: Some(lowest.cursor), position: lowest.position }),
            None if policy.hold => {
                // Relaxed: see `release_read`.
                let released = self.header.released.0.load(Ordering::Relaxed);
                Some(Blocked { cursor: None, position: floor.max(released) })
            }
            None => None,
        }
    }

    fn lowest(&self) -> Option<Lowest> {
        lowest(self.readers, self.cursors)
    }

    /// Puts a prepared cursor in force at `position` or, where that is no longer retained, at the lowest position that
    /// is. Returns where it stands. Where the intent never stands still it may be overtaken there, which only readers that hold
    /// nothing back can be: those find out when they read.
    pub fn join(&self, cursor: u32, position: u64) -> u64 {
        mark_used(self.readers, cursor);
        let mut position = position;
        for _ in 0..JOIN_LOOKS {
            self.cursors[cursor as usize].propose(position);
            // SeqCst: R-JOINED, then A-RAISED; pairs with R-RAISED, then A-JOINED (raise).
            // Store, then look: our cursor, then the intent. If we do not see the intent, its owner sees our cursor (I-4).
            fence(Ordering::SeqCst);
            let intent = self.header.announced();
            if intent <= position {
                return position;
            }
            position = intent;
        }
        position
    }
}

/// For readers that hold nothing back, after they have copied a message at `position`: is the copy whole?
#[inline]
pub fn still_retained(header: &LogHeader, position: u64) -> bool {
    // Acquire: A-COPY pairs with R-COPY (make_room): a copy that saw a store made below a new floor sees the intent
    // that went before it.
    fence(Ordering::Acquire);
    header.intent.0.load(Ordering::Relaxed) <= position
}
