//! The words of a ledger: how they are packed, and what was seen of a message.

/// The owner of a move that nobody carries on with: anybody may.
pub(super) const NOBODY: u8 = 255;

pub(super) const STATE_BITS: u32 = 3;
pub(super) const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
pub(super) const OWNER_SHIFT: u32 = STATE_BITS;
pub(super) const ATTEMPT_SHIFT: u32 = OWNER_SHIFT + 8;
pub(super) const DUE_SHIFT: u32 = ATTEMPT_SHIFT + 12;
pub(super) const LAP_SHIFT: u32 = DUE_SHIFT + DUE_BITS;
pub(super) const DUE_BITS: u32 = 28;
pub(super) const DUE_MASK: u64 = (1 << DUE_BITS) - 1;

/// Longest time in milliseconds that a due time may lie ahead of now. What seems further ahead has long been due; the
/// field tells that for two days more ([`Ledger::renew_due`]). Half an hour beyond the longest lease: a coarse clock rounds
/// it up, and who compares may have read the clock before the lease was taken.
pub(super) const MAX_AHEAD_MS: u64 = *crate::group::LEASE_MS.end() + 30 * 60 * 1000;

/// How long ago a time may have come before [`Ledger::renew_due`] sets it anew: half a day.
pub(super) const RENEW_MS: u64 = MAX_AHEAD_MS / 2;

/// Attempts are counted up to here.
pub const MAX_ATTEMPT: u16 = (1 << 12) - 1;

/// Laps the field can tell apart. Half of them are laps before and half to come, which [`WORD_BY_WORD`] would not need;
/// the rest guards a swap that was slept through (I-13).
pub(super) const LAPS: u64 = 1 << 13;

pub(super) const RETURNED: u64 = 1;
pub(super) const LEASED: u64 = 2;
pub(super) const SETTLED: u64 = 3;
pub(super) const MOVING: u64 = 4;

/// What a word says in whose place there is one of another lap: a fresh message; nothing that makes sense.
pub(super) const UNTOUCHED: u64 = (NOBODY as u64) << OWNER_SHIFT;
pub(super) const FOREIGN: u64 = UNTOUCHED | 7;

/// Instead of a message's word that was not looked at: what no correct consumer writes.
pub(super) const UNREAD: u64 = u64::MAX;

/// Why a message goes to the dead-letter topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoveReason {
    /// It failed as often as the group allows.
    Exhausted = 0,
    /// A consumer rejected it.
    Rejected = 1,
    /// Its time-to-live ended first.
    Expired = 2,
}

/// What a word says about its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Never handed out.
    Fresh,
    /// Handed out before and given back; may be taken when due.
    Returned,
    /// Somebody's until due.
    Leased,
    /// On its way to the dead-letter topic: never delivered again.
    Moving(MoveReason),
    /// Done with.
    Settled,
    /// What no correct consumer writes.
    Corrupt,
}

/// A message as it was seen. Swaps succeed only while it is still exactly so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub(super) sequence: u64,
    /// Its own word.
    pub(super) raw: u64,
    /// The word of its run, where that still matters.
    pub(super) run: u64,
    /// What both together say, in the form of a word of its own.
    pub(super) says: u64,
}

impl Seen {
    /// The message's sequence.
    #[inline]
    pub fn sequence(self) -> u64 {
        self.sequence
    }

    /// What has become of it.
    #[inline]
    pub fn state(self) -> State {
        stored_state(self.says & STATE_MASK)
    }

    /// Whose lease or move it is; `None`: nobody's.
    #[inline]
    pub fn owner(self) -> Option<u8> {
        let owner = (self.says >> OWNER_SHIFT) as u8;
        (owner != NOBODY).then_some(owner)
    }

    /// Deliveries so far.
    #[inline]
    pub fn attempt(self) -> u16 {
        (self.says >> ATTEMPT_SHIFT) as u16 & MAX_ATTEMPT
    }

    #[inline]
    pub(super) fn due(self) -> u64 {
        self.says >> DUE_SHIFT & DUE_MASK
    }

    /// Whether what it says is not in its own word.
    #[inline]
    pub(super) fn stands_for_run(self) -> bool {
        self.raw != self.says
    }

    #[inline]
    pub(super) fn with_state(self, state: u64) -> Self {
        Seen { says: self.says & !STATE_MASK | state, ..self }
    }

    /// The same once it has been settled by a delivery at most once.
    #[inline]
    pub(crate) fn settled(self) -> Self {
        let first = if self.attempt() == 0 { 1 << ATTEMPT_SHIFT } else { 0 };
        Seen { says: self.says | first, ..self }.with_state(SETTLED)
    }

    /// Whether the time that the word names has come. `now` in milliseconds.
    #[inline]
    pub fn is_due(self, now: u64) -> bool {
        self.due_in(now) == 0
    }

    /// Milliseconds until due; what seems to lie further ahead than any due time can is taken for the past.
    #[inline]
    pub fn due_in(self, now: u64) -> u64 {
        let ahead = self.due().wrapping_sub(now) & DUE_MASK;
        if ahead > MAX_AHEAD_MS { 0 } else { ahead }
    }

    /// Whether somebody else has leased it.
    pub fn is_leased_by_other(self, owner: u8) -> bool {
        self.state() == State::Leased && self.owner() != Some(owner)
    }

    /// Milliseconds since it was due.
    pub(super) fn due_since(self, now: u64) -> u64 {
        if self.is_due(now) { now.wrapping_sub(self.due()) & DUE_MASK } else { 0 }
    }
}

pub(super) fn stored(state: State) -> u64 {
    match state {
        State::Fresh | State::Corrupt => 0,
        State::Returned => RETURNED,
        State::Leased => LEASED,
        State::Settled => SETTLED,
        State::Moving(reason) => MOVING + reason as u64,
    }
}

pub(super) fn stored_state(state: u64) -> State {
    match state {
        0 => State::Fresh,
        RETURNED => State::Returned,
        LEASED => State::Leased,
        SETTLED => State::Settled,
        MOVING => State::Moving(MoveReason::Exhausted),
        5 => State::Moving(MoveReason::Rejected),
        6 => State::Moving(MoveReason::Expired),
        _ => State::Corrupt,
    }
}
