//! The ledger of a group: one word a message says who has it (ARCHITECTURE.md §4.9).
//!
//! ```text
//! word: 63 ...... 51   50 ....... 23   22 ..... 11   10 .... 3   2 .. 0
//!       lap + 1 (13)   due (28, ms)    attempt       owner       state
//! ```
//!
//! A message is taken, settled, given back and taken over by compare-and-swap on the exact word that was seen. The word
//! names owner, attempt and due time, so it *is* the lease: whoever comes late holds a word that is there no more, and
//! changes nothing. `hint` says up to where words have been handed out; it only saves looking, the words are the truth.
//!
//! A message's payload is copied out *before* its word is taken. The swap then proves the copy whole: while the word
//! was what it was, the message was unsettled, so the floor had not passed it and no publisher wrote there.

use crate::shm::shared::Shared;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Consumers of one group, at most.
pub const MAX_CONSUMERS: u32 = 255;

/// The owner of a move that nobody carries on with: anybody may.
const NOBODY: u8 = 255;

const STATE_BITS: u32 = 3;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
const OWNER_SHIFT: u32 = STATE_BITS;
const ATTEMPT_SHIFT: u32 = OWNER_SHIFT + 8;
const DUE_SHIFT: u32 = ATTEMPT_SHIFT + 12;
const LAP_SHIFT: u32 = DUE_SHIFT + DUE_BITS;
const DUE_BITS: u32 = 28;
const DUE_MASK: u64 = (1 << DUE_BITS) - 1;

/// Longest time in milliseconds that a due time may lie ahead of now. What seems further ahead has long been due; the
/// field tells that for two days more ([`Ledger::renew_due`]).
const MAX_AHEAD_MS: u64 = *crate::group::LEASE_MS.end();

/// How long ago a time may have come before [`Ledger::renew_due`] sets it anew: half a day.
const RENEW_MS: u64 = MAX_AHEAD_MS / 2;

/// Attempts are counted up to here.
pub const MAX_ATTEMPT: u16 = (1 << 12) - 1;

/// Laps the field can tell apart. One lap's words are compared with the one before only, so that few would do; the rest
/// guards a swap that was slept through (I-13).
const LAPS: u64 = (1 << 13) - 1;

const RETURNED: u64 = 1;
const LEASED: u64 = 2;
const SETTLED: u64 = 3;
const MOVING: u64 = 4;

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

/// A word as it was seen. Swaps succeed only while it is still exactly this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    sequence: u64,
    raw: u64,
    pub state: State,
    /// Whose lease or move it is; `None`: nobody's.
    pub owner: Option<u8>,
    /// Deliveries so far.
    pub attempt: u16,
    due: u64,
}

impl Seen {
    /// The message's sequence.
    pub fn sequence(self) -> u64 {
        self.sequence
    }

    /// Whether the time that the word names has come. `now` in milliseconds.
    pub fn is_due(self, now: u64) -> bool {
        self.due_in(now) == 0
    }

    /// Milliseconds until due; 24 hours at most, what seems to lie further ahead is taken for the past.
    pub fn due_in(self, now: u64) -> u64 {
        let ahead = self.due.wrapping_sub(now) & DUE_MASK;
        if ahead > MAX_AHEAD_MS { 0 } else { ahead }
    }

    /// Milliseconds since it was due.
    fn due_since(self, now: u64) -> u64 {
        if self.is_due(now) { now.wrapping_sub(self.due) & DUE_MASK } else { 0 }
    }
}

/// A word on a line of its own.
#[repr(C, align(128))]
struct Line(AtomicU64);

/// The head of a ledger segment's body. Zeroed memory plus [`LedgerHeader::format`] is a group without deliveries.
#[repr(C)]
pub struct LedgerHeader {
    /// Words below this have been handed out, or will be found by a scan.
    hint: Line,
    /// Everything below is settled.
    floor: Line,
    /// Counts what has been given back: look for it.
    returned: Line,
    /// Exclusive groups: the consumer at work, plus one.
    active: Line,
    state: StateLine,
    /// Counters, only shown to people.
    pub counters: Counters,
}

#[repr(C, align(128))]
struct StateLine {
    /// 0 live · 1 replaced (rewound) or removed.
    ended: AtomicU32,
    /// One bit a consumer that has been fenced.
    fenced: [AtomicU64; 4],
}

/// What a group has seen.
#[repr(C, align(128))]
pub struct Counters {
    pub redelivered: AtomicU64,
    pub expired: AtomicU64,
    pub dead_lettered: AtomicU64,
}

impl LedgerHeader {
    /// A head outside shared memory, starting at `start`.
    #[cfg(loom)]
    pub fn new(start: u64) -> Self {
        let line = |value| Line(AtomicU64::new(value));
        LedgerHeader {
            hint: line(start),
            floor: line(start),
            returned: line(0),
            active: line(0),
            state: StateLine { ended: AtomicU32::new(0), fenced: std::array::from_fn(|_| AtomicU64::new(0)) },
            counters: Counters {
                redelivered: AtomicU64::new(0),
                expired: AtomicU64::new(0),
                dead_lettered: AtomicU64::new(0),
            },
        }
    }

    /// Lets a zeroed ledger begin at `start`.
    pub(crate) fn format(&self, start: u64) {
        // Relaxed: nobody else sees the ledger before its descriptor is passed on.
        self.hint.0.store(start, Ordering::Relaxed);
        self.floor.0.store(start, Ordering::Relaxed);
    }
}

/// A group's ledger. As many words as sequences may be handed out above the floor: the group's window.
#[derive(Clone)]
pub struct Ledger {
    header: Shared<LedgerHeader>,
    words: Shared<[AtomicU64]>,
    lap_shift: u32,
}

impl Ledger {
    /// A ledger over this memory; the number of words is a power of two.
    pub fn new(header: Shared<LedgerHeader>, words: Shared<[AtomicU64]>) -> Self {
        assert!(words.len().is_power_of_two(), "a window is a power of two, found {}", words.len());
        let lap_shift = words.len().trailing_zeros();
        Ledger { header, words, lap_shift }
    }

    pub(crate) fn header(&self) -> &LedgerHeader {
        &self.header
    }

    /// Sequences that may be handed out above the floor.
    pub fn window(&self) -> u64 {
        self.words.len() as u64
    }

    fn word(&self, sequence: u64) -> &AtomicU64 {
        &self.words[(sequence & (self.window() - 1)) as usize]
    }

    /// The lap as stored: never 0, so that zeroed memory is no lap.
    fn lap_field(&self, sequence: u64) -> u64 {
        (sequence >> self.lap_shift) % LAPS + 1
    }

    /// What the word of `sequence` says. The caller has seen that `sequence < floor + window`; where the floor has passed
    /// the sequence since, it is settled.
    #[inline]
    pub fn look(&self, sequence: u64) -> Seen {
        // Acquire: A-LEDGER pairs with R-LEDGER (swap).
        let seen = self.read(sequence, self.word(sequence).load(Ordering::Acquire));
        // A word of a later lap was written by somebody who had seen the floor above us; so, after the load, do we.
        if seen.state == State::Corrupt && sequence < self.floor() {
            return Seen { state: State::Settled, ..seen };
        }
        seen
    }

    #[inline]
    fn read(&self, sequence: u64, raw: u64) -> Seen {
        let (lap, state) = (raw >> LAP_SHIFT, raw & STATE_MASK);
        let owner = (raw >> OWNER_SHIFT) as u8;
        let seen = Seen {
            sequence,
            raw,
            state: State::Fresh,
            owner: (owner != NOBODY).then_some(owner),
            attempt: (raw >> ATTEMPT_SHIFT) as u16 & MAX_ATTEMPT,
            due: raw >> DUE_SHIFT & DUE_MASK,
        };
        if lap == self.lap_field(sequence) {
            return Seen { state: stored_state(state), ..seen };
        }
        let fresh = Seen { owner: None, attempt: 0, due: 0, ..seen };
        // Below the window's reach nothing but the settled word of the lap before, or nothing at all, can be here.
        let preceding = raw == 0 || state == SETTLED && lap % LAPS + 1 == self.lap_field(sequence);
        if preceding { fresh } else { Seen { state: State::Corrupt, ..fresh } }
    }

    fn pack(&self, sequence: u64, due: u64, attempt: u16, owner: u8, state: u64) -> u64 {
        let attempt = u64::from(attempt.min(MAX_ATTEMPT));
        let due = due & DUE_MASK;
        self.lap_field(sequence) << LAP_SHIFT
            | due << DUE_SHIFT
            | attempt << ATTEMPT_SHIFT
            | u64::from(owner) << OWNER_SHIFT
            | state
    }

    /// Puts `new` in the place of exactly what was seen. What is settled stays settled, what is corrupt stays for people
    /// to see.
    #[inline]
    fn swap(&self, seen: Seen, new: u64) -> Option<Seen> {
        if matches!(seen.state, State::Settled | State::Corrupt) {
            return None;
        }
        // AcqRel: R-LEDGER pairs with A-LEDGER (look, and every later swap): our copy of the payload was made before we
        // took or settled it, and whoever moves the floor over a settled word has seen all who read the message.
        // Crash points: before this the message was as it was seen, after it it is as the new word says.
        let word = self.word(seen.sequence);
        word.compare_exchange(seen.raw, new, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        Some(self.read(seen.sequence, new))
    }

    /// Leases the message to `owner` until `due`, one attempt more. `None`: somebody was faster, or it is being moved to
    /// the dead-letter topic, and such a message is never delivered again.
    #[inline]
    pub fn take(&self, seen: Seen, owner: u8, due: u64) -> Option<Seen> {
        if matches!(seen.state, State::Moving(_)) {
            return None;
        }
        let attempt = seen.attempt.saturating_add(1);
        self.swap(seen, self.pack(seen.sequence, due, attempt, owner, LEASED))
    }

    /// Settles the message: an ack, the end of a move, a delivery at most once, a hole. `false`: it was not as seen.
    #[inline]
    pub fn settle(&self, seen: Seen) -> bool {
        let new = match seen.state {
            // No due time tells this word from the one 8,191 laps before, which a small window at full speed goes
            // through in milliseconds. So it says how often the lap's field has come round.
            State::Fresh => self.pack(seen.sequence, (seen.sequence >> self.lap_shift) / LAPS, 1, NOBODY, SETTLED),
            _ => seen.raw & !STATE_MASK | SETTLED,
        };
        self.swap(seen, new).is_some()
    }

    /// Gives a lease back, to be taken by anybody from `due` on, which is at most 24 hours from now.
    pub fn give_back(&self, lease: Seen, due: u64) -> bool {
        let new = self.pack(lease.sequence, due, lease.attempt, NOBODY, RETURNED);
        if lease.state != State::Leased || self.swap(lease, new).is_none() {
            return false;
        }
        self.tell_returned();
        true
    }

    /// Gives a message back at once that was leased but never seen by its consumer: the attempt does not count.
    pub fn give_back_unseen(&self, lease: Seen, now: u64) -> bool {
        self.give_back(Seen { attempt: lease.attempt.saturating_sub(1), ..lease }, now)
    }

    /// Lets a lease end later (or sooner), at most 24 hours from now.
    pub fn extend(&self, lease: Seen, due: u64) -> Option<Seen> {
        if lease.state != State::Leased {
            return None;
        }
        let owner = lease.owner.unwrap_or(NOBODY);
        self.swap(lease, self.pack(lease.sequence, due, lease.attempt, owner, LEASED))
    }

    /// Begins to move the message to the dead-letter topic, or takes a move over that is nobody's. `None`: somebody was
    /// faster, or it is another's move, overdue or not: only the coordinator can tell whether that one's copy is there.
    pub fn begin_move(&self, seen: Seen, owner: u8, due: u64, reason: MoveReason) -> Option<Seen> {
        if matches!(seen.state, State::Moving(_)) && seen.owner.is_some_and(|mover| mover != owner) {
            return None;
        }
        self.swap(seen, self.pack(seen.sequence, due, seen.attempt, owner, MOVING + reason as u64))
    }

    /// After its owner was proven dead or fenced: what it had leased goes back, what it was moving is anybody's to move,
    /// and what `committed` says it had finished is settled. Idempotent. Returns how many messages it concerned.
    /// `now` is when: it may be taken again at once.
    pub fn release_owner(&self, owner: u8, now: u64, committed: impl Fn(u64, State) -> bool) -> u64 {
        let mut released = 0;
        for sequence in self.handed_out() {
            let seen = self.look(sequence);
            if seen.owner != Some(owner) {
                continue;
            }
            let swapped = match seen.state {
                State::Leased | State::Moving(_) if committed(sequence, seen.state) => self.settle(seen),
                State::Leased => self.give_back(seen, now),
                State::Moving(reason) => self
                    .swap(seen, self.pack(sequence, seen.due, seen.attempt, NOBODY, MOVING + reason as u64))
                    .is_some(),
                _ => false,
            };
            released += u64::from(swapped);
        }
        self.tell_returned();
        released
    }

    /// Sets times anew that came more than half a day ago, before the due field comes round and they seem to lie ahead
    /// again. The coordinator does it at least once a day, for groups on which nobody looks. A lease that ended so long ago
    /// is lost to its owner by this, as it may be at any time.
    pub fn renew_due(&self, now: u64) {
        for sequence in self.handed_out() {
            let seen = self.look(sequence);
            let timed = matches!(seen.state, State::Returned | State::Leased | State::Moving(_));
            if timed && seen.due_since(now) > RENEW_MS {
                self.swap(seen, seen.raw & !(DUE_MASK << DUE_SHIFT) | (now & DUE_MASK) << DUE_SHIFT);
            }
        }
    }

    /// Everything between the floor and the hint.
    pub fn handed_out(&self) -> std::ops::Range<u64> {
        let floor = self.floor();
        floor..self.hint().clamp(floor, floor.saturating_add(self.window()))
    }

    /// Up to where words have been handed out.
    #[inline]
    pub fn hint(&self) -> u64 {
        // Relaxed: a number that stands for nothing but itself. Who has seen a word taken, or a floor above it, finds
        // the hint above it too: it was raised first, and what came before a swap is seen with it (A-LEDGER).
        self.header.hint.0.load(Ordering::Relaxed)
    }

    /// Reserves `count` sequences from `from` on, which is the hint as last seen. It keeps others from trying the same
    /// words; whoever finds nothing else to do tries them all the same, so a reservation that dies costs nothing.
    #[inline]
    pub fn reserve(&self, from: u64, count: u64) -> bool {
        // Relaxed: as in `hint`.
        let to = from.saturating_add(count);
        self.header.hint.0.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Lets the hint be at least `to`: for consumers that choose among messages (ordered by key).
    pub fn raise_hint(&self, to: u64) {
        // Relaxed: as in `hint`.
        self.header.hint.0.fetch_max(to, Ordering::Relaxed);
    }

    /// The lowest sequence that is not settled, as far as anybody has looked.
    #[inline]
    pub fn floor(&self) -> u64 {
        // Acquire: A-SETTLED-FLOOR pairs with R-SETTLED-FLOOR (advance_floor): words below have been seen settled.
        self.header.floor.0.load(Ordering::Acquire)
    }

    /// Moves the floor over what is settled. Returns it.
    pub fn advance_floor(&self) -> u64 {
        let floor = self.floor();
        let mut next = floor;
        while next < floor.saturating_add(self.window()) && self.look(next).state == State::Settled {
            next += 1;
        }
        if next == floor {
            return floor;
        }
        // AcqRel: R-SETTLED-FLOOR pairs with A-SETTLED-FLOOR; monotone by max, so a slow one does no harm.
        self.header.floor.0.fetch_max(next, Ordering::AcqRel).max(next)
    }

    /// How often something has been given back. Looking again is worth it when this changes.
    #[inline]
    pub fn returned(&self) -> u64 {
        // Acquire: A-RETURNED pairs with R-RETURNED (tell_returned): the words given back are visible.
        self.header.returned.0.load(Ordering::Acquire)
    }

    fn tell_returned(&self) {
        // Release: R-RETURNED pairs with A-RETURNED. If the caller dies before this, a scan finds the word later.
        self.header.returned.0.fetch_add(1, Ordering::Release);
    }

    /// Whether `owner` is the consumer at work of an exclusive group, or becomes it because there is none.
    pub fn activate(&self, owner: u8) -> bool {
        let active = &self.header.active.0;
        let me = u64::from(owner) + 1;
        // Relaxed: it only chooses who tries; the words decide.
        match active.load(Ordering::Relaxed) {
            0 => active.compare_exchange(0, me, Ordering::Relaxed, Ordering::Relaxed).is_ok(),
            other => other == me,
        }
    }

    /// Puts `owner` in the place of `overdue`, the consumer at work, whose lease has ended. `false`: it is that one's
    /// place no more; another standby was faster, and has only just begun.
    pub fn supersede(&self, overdue: u8, owner: u8) -> bool {
        let (from, to) = (u64::from(overdue) + 1, u64::from(owner) + 1);
        // Relaxed: as in `activate`.
        self.header.active.0.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// The consumer at work of an exclusive group.
    pub fn active(&self) -> Option<u8> {
        // Relaxed: as in `activate`.
        self.header.active.0.load(Ordering::Relaxed).checked_sub(1).map(|slot| slot as u8)
    }

    /// `owner` leaves: a standby may take over.
    pub fn deactivate(&self, owner: u8) {
        let me = u64::from(owner) + 1;
        // Relaxed: as in `activate`.
        let _ = self.header.active.0.compare_exchange(me, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Marks a consumer as fenced (or, for its place's next owner, not).
    pub fn set_fenced(&self, owner: u8, fenced: bool) {
        let (word, bit) = (&self.header.state.fenced[usize::from(owner) / 64], 1 << (owner % 64));
        // Relaxed: it stops whoever sees it. Who does not yet may take one more word, and leave it to the next release.
        if fenced {
            word.fetch_or(bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Whether a consumer may not take anything any more: it was fenced, or the group was rewound or removed.
    #[inline]
    pub fn is_fenced(&self, owner: u8) -> bool {
        let state = &self.header.state;
        // Relaxed: as in `set_fenced`.
        let fenced = state.fenced[usize::from(owner) / 64].load(Ordering::Relaxed) >> (owner % 64) & 1 == 1;
        fenced || state.ended.load(Ordering::Relaxed) != 0
    }

    /// Ends the ledger: its group was rewound or removed, and all consumers on it are fenced.
    pub fn end(&self) {
        // Relaxed: as in `set_fenced`; what is still written here touches nobody else's ledger.
        self.header.state.ended.store(1, Ordering::Relaxed);
    }
}

fn stored_state(state: u64) -> State {
    match state {
        RETURNED => State::Returned,
        LEASED => State::Leased,
        SETTLED => State::Settled,
        MOVING => State::Moving(MoveReason::Exhausted),
        5 => State::Moving(MoveReason::Rejected),
        6 => State::Moving(MoveReason::Expired),
        _ => State::Corrupt,
    }
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<LedgerHeader>() == crate::shm::layout::LEDGER_WORDS_OFFSET as usize);
