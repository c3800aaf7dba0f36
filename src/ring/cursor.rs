//! Cursors: where each reader stands, one cache line each (ARCHITECTURE.md §3.3).

use crate::ring::doorbell::Doorbell;
use crate::sync::{AtomicU64, Ordering};

/// Position of a cursor that is not in force.
pub(crate) const NOT_IN_FORCE: u64 = u64::MAX;

const GATING: u64 = 1;
const DROPPABLE: u64 = 2;
/// A group's cursor: gates like a subscriber's, and stays while no consumer is connected.
const GROUP: u64 = 3;

/// The head of a cursors segment's body.
#[repr(C)]
pub struct CursorsHeader {
    /// Subscribers sleep here, publishers ring.
    pub readers: Doorbell,
    /// Blocked publishers sleep here, subscribers ring.
    pub writers: Doorbell,
    /// How many cursors, counted from the first, have ever been in force: what a scan must look at.
    used: UsedCount,
}

#[repr(C, align(128))]
struct UsedCount(AtomicU64);

/// One reader's line.
#[repr(C, align(128))]
pub struct Cursor {
    position: AtomicU64,
    sequence: AtomicU64,
    mode: AtomicU64,
    owner: AtomicU64,
    /// A group's connected consumers, stored by the coordinator; 0 for subscribers.
    consumers: AtomicU64,
}

/// Who reads a topic, counted from shared memory: true at some moment, stale at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Readers {
    /// Subscribers whose cursors are in force, those opened by wildcards among them. A channel's receiver counts only where
    /// it is known to be gone (0) or not (1).
    pub subscribers: u64,
    /// Groups, with and without consumers.
    pub groups: u64,
    /// Connected consumers of all groups together.
    pub consumers: u64,
}

impl Readers {
    /// Whether somebody is there to take a message now: a subscriber, or a consumer of a group.
    pub fn any(&self) -> bool {
        self.subscribers > 0 || self.consumers > 0
    }
}

/// The lowest gating cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lowest {
    pub(crate) position: u64,
    pub(crate) cursor: u32,
}

impl CursorsHeader {
    /// A head outside shared memory.
    #[cfg(loom)]
    pub fn new() -> Self {
        CursorsHeader { readers: Doorbell::new(), writers: Doorbell::new(), used: UsedCount(AtomicU64::new(0)) }
    }
}

impl Cursor {
    /// A free cursor outside shared memory.
    #[cfg(loom)]
    pub fn new() -> Self {
        Cursor {
            position: AtomicU64::new(NOT_IN_FORCE),
            sequence: AtomicU64::new(0),
            mode: AtomicU64::new(0),
            owner: AtomicU64::new(0),
            consumers: AtomicU64::new(0),
        }
    }

    /// Turns zeroed memory into a free cursor.
    pub(crate) fn format(&self) {
        self.position.store(NOT_IN_FORCE, Ordering::Relaxed);
    }

    /// Moves the cursor forward, after everything below `position` has been read for the last time.
    #[inline]
    pub fn advance(&self, position: u64, sequence: u64) {
        // Release: R-SETTLED pairs with A-SETTLED (settled_below): when a group's line has become another reader's, who sees
        // the new sequence sees the new owner.
        self.sequence.store(sequence, Ordering::Release);
        // Release: R-CURSOR pairs with A-CURSOR (lowest): our reads are over before the publisher overwrites.
        self.position.store(position, Ordering::Release);
    }

    /// Moves the line of a group forward; several consumers may do so at once. Everything below `position` has been
    /// settled, and everything below `sequence`.
    pub fn raise(&self, position: u64, sequence: u64) {
        // AcqRel: R-CURSOR pairs with A-CURSOR (lowest): who settled those messages had read them, and we have seen that
        // (A-LEDGER). Monotone by max: a slow consumer moves nothing back, and a line that is out of force stays so.
        self.position.fetch_max(position, Ordering::AcqRel);
        // Release: R-SETTLED pairs with A-SETTLED (settled_below): who sees it sees what the consumers did before.
        self.sequence.fetch_max(sequence, Ordering::Release);
    }

    /// The line of `group`: what lies below has been settled. `None`: the line is not that group's any more.
    #[cfg(not(loom))]
    pub(crate) fn settled_below(&self, group: u64) -> Option<u64> {
        // Acquire: A-SETTLED pairs with R-SETTLED (raise).
        let sequence = self.sequence.load(Ordering::Acquire);
        // Acquire: A-MODE pairs with R-MODE (occupy_as): another group's line names another owner, and a group's number
        // is never given twice. Relaxed: ordered after the sequence.
        let same = self.mode.load(Ordering::Acquire) == GROUP && self.owner.load(Ordering::Relaxed) == group;
        (same && self.position.load(Ordering::Relaxed) != NOT_IN_FORCE).then_some(sequence)
    }

    /// The group whose line this is, if it is a group's. Stale the moment it is read.
    #[cfg(not(loom))]
    pub(crate) fn group(&self) -> Option<u64> {
        // Acquire: A-MODE pairs with R-MODE (occupy_as): the owner is visible with the mode.
        (self.mode.load(Ordering::Acquire) == GROUP).then(|| self.owner.load(Ordering::Relaxed))
    }

    /// Stores a position a joining reader would like; see `gate::join` for what must follow.
    pub(crate) fn propose(&self, position: u64) {
        // Release: R-CURSOR pairs with A-CURSOR (lowest): the mode is visible with the position.
        self.position.store(position, Ordering::Release);
    }

    /// Prepares the cursor for its new owner, before [`Self::propose`].
    pub fn occupy(&self, owner: u64, droppable: bool) {
        self.occupy_as(owner, if droppable { DROPPABLE } else { GATING });
    }

    /// The same for a group, which has no consumers yet; `owner` is the group's own number.
    pub fn occupy_group(&self, owner: u64) {
        self.occupy_as(owner, GROUP);
    }

    fn occupy_as(&self, owner: u64, mode: u64) {
        // Relaxed: published by `propose`.
        self.owner.store(owner, Ordering::Relaxed);
        self.consumers.store(0, Ordering::Relaxed);
        // Release: R-MODE pairs with A-MODE (lowest, readers), as in `vacate`.
        self.mode.store(mode, Ordering::Release);
    }

    /// Says how many consumers of the group are connected.
    pub fn set_consumers(&self, count: u64) {
        // Relaxed: a count that `readers` takes as it finds it. A consumer that was granted its place before its count was
        // stored is at worst not counted yet, and the coordinator stores first.
        self.consumers.store(count, Ordering::Relaxed);
    }

    /// Takes the cursor out of force, for its reader: the rest of the line is the coordinator's, who may already have
    /// given it away.
    #[cfg(not(loom))]
    pub(crate) fn withdraw(&self) {
        // Release: R-CURSOR pairs with A-CURSOR (lowest): a departing reader's reads are over.
        self.position.store(NOT_IN_FORCE, Ordering::Release);
    }

    /// Takes the cursor out of force and frees its line.
    pub fn vacate(&self) {
        // Release: R-CURSOR pairs with A-CURSOR (lowest): a departing reader's reads are over.
        self.position.store(NOT_IN_FORCE, Ordering::Release);
        // Release: R-MODE pairs with A-MODE (lowest): a scan may see the new mode beside the old position, and takes the
        // mode's word for it that nobody reads here any more.
        self.mode.store(0, Ordering::Release);
        // Relaxed: whoever counts has seen the mode go, or counts what was true a moment ago.
        self.consumers.store(0, Ordering::Relaxed);
        self.owner.store(0, Ordering::Relaxed);
    }

    /// Whether the cursor is in force, and for this owner.
    #[cfg(not(loom))]
    pub(crate) fn is_in_force_for(&self, owner: u64) -> bool {
        // Acquire: A-CURSOR pairs with R-CURSOR (propose): the owner is visible with the position.
        self.position.load(Ordering::Acquire) != NOT_IN_FORCE && self.owner.load(Ordering::Relaxed) == owner
    }

    /// Where a cursor stands whose reader has not begun; `None` where it is not in force.
    #[cfg(not(loom))]
    pub(crate) fn place(&self) -> Option<crate::ring::log::Place> {
        // Acquire: A-CURSOR pairs with R-CURSOR (advance, raise): the sequence was stored before the position, where there is
        // one reader; and what another consumer saw settled is settled for us.
        let position = self.position.load(Ordering::Acquire);
        let place = crate::ring::log::Place { position, sequence: self.sequence() };
        (position != NOT_IN_FORCE).then_some(place)
    }

    /// The sequence people see. Stale the moment it is read.
    pub(crate) fn sequence(&self) -> u64 {
        // Relaxed: only shown to people.
        self.sequence.load(Ordering::Relaxed)
    }
}

/// Counts `cursor` among those a scan looks at, before it comes into force.
pub(crate) fn mark_used(header: &CursorsHeader, cursor: u32) {
    // Relaxed: `gate::join` puts a SeqCst fence between this and the look at the intent, as for the position.
    header.used.0.fetch_max(u64::from(cursor) + 1, Ordering::Relaxed);
}

/// How many cursors are in force. Stale the moment it is counted.
#[cfg(not(loom))]
pub(crate) fn in_force(header: &CursorsHeader, cursors: &[Cursor]) -> usize {
    // Relaxed: a hint.
    let used = (header.used.0.load(Ordering::Relaxed) as usize).min(cursors.len());
    cursors[..used].iter().filter(|cursor| cursor.position.load(Ordering::Relaxed) != NOT_IN_FORCE).count()
}

/// Who reads. Stale the moment it is counted.
#[cfg(not(loom))]
pub(crate) fn readers(header: &CursorsHeader, cursors: &[Cursor]) -> Readers {
    // Relaxed: whoever was granted a cursor before we were asked is counted, because the grant, which we cannot have
    // heard of otherwise, came after the store.
    let used = (header.used.0.load(Ordering::Relaxed) as usize).min(cursors.len());
    let mut counted = Readers::default();
    for cursor in &cursors[..used] {
        // Acquire: A-CURSOR pairs with R-CURSOR (propose): the mode is that of whoever stored the position, or newer.
        if cursor.position.load(Ordering::Acquire) == NOT_IN_FORCE {
            continue;
        }
        // Acquire: A-MODE pairs with R-MODE (occupy_as): a group's count is not that of the line's owner before.
        if cursor.mode.load(Ordering::Acquire) == GROUP {
            counted.groups += 1;
            counted.consumers = counted.consumers.saturating_add(cursor.consumers.load(Ordering::Relaxed));
        } else {
            counted.subscribers += 1;
        }
    }
    counted
}

/// The lowest gating cursor. Positions only grow while a cursor is in force, so an old answer is a careful one.
pub(crate) fn lowest(header: &CursorsHeader, cursors: &[Cursor]) -> Option<Lowest> {
    // Relaxed: ordered against a joiner's store by the fences in `gate` (I-4).
    let used = (header.used.0.load(Ordering::Relaxed) as usize).min(cursors.len());
    let mut lowest: Option<Lowest> = None;
    for (index, cursor) in cursors[..used].iter().enumerate() {
        // Acquire: A-CURSOR pairs with R-CURSOR (advance, propose, vacate).
        let position = cursor.position.load(Ordering::Acquire);
        if position == NOT_IN_FORCE {
            continue;
        }
        // Acquire: A-MODE pairs with R-MODE (occupy_as, vacate).
        let mode = cursor.mode.load(Ordering::Acquire);
        if mode != GATING && mode != GROUP {
            continue;
        }
        if lowest.is_none_or(|l| position < l.position) {
            lowest = Some(Lowest { position, cursor: index as u32 });
        }
    }
    lowest
}
