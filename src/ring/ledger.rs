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
const OWNER_SHIFT: u32 = STATE_BITS;
const ATTEMPT_SHIFT: u32 = OWNER_SHIFT + 8;
const DUE_SHIFT: u32 = ATTEMPT_SHIFT + 12;
const LAP_SHIFT: u32 = DUE_SHIFT + DUE_BITS;
const DUE_BITS: u32 = 28;
const DUE_MASK: u64 = (1 << DUE_BITS) - 1;

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

    /// The same once it has been settled by a delivery at most once.
    pub(crate) fn settled(self) -> Self {
        Seen { state: State::Settled, attempt: self.attempt.max(1), ..self }
    }

    /// Whether the time that the word names has come. `now` in milliseconds; times more than 37 hours apart are taken for
    /// the other side of now.
    pub fn is_due(self, now: u64) -> bool {
        self.due_in(now) == 0
    }

    /// Milliseconds until due.
    pub fn due_in(self, now: u64) -> u64 {
        let ahead = self.due.wrapping_sub(now) & DUE_MASK;
        if ahead > DUE_MASK / 2 { 0 } else { ahead }
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

    /// What the word of `sequence` says. The caller knows that `floor <= sequence < floor + window`.
    #[inline]
    pub fn look(&self, sequence: u64) -> Seen {
        // Acquire: A-LEDGER pairs with R-LEDGER (swap).
        let raw = self.word(sequence).load(Ordering::Acquire);
        self.read(sequence, raw)
    }

    #[inline]
    fn read(&self, sequence: u64, raw: u64) -> Seen {
        let (lap, state) = (raw >> LAP_SHIFT, raw & ((1 << STATE_BITS) - 1));
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

    /// Puts `new` in the place of exactly what was seen.
    #[inline]
    fn swap(&self, seen: Seen, new: u64) -> Option<Seen> {
        // AcqRel: R-LEDGER pairs with A-LEDGER (look, and every later swap): our copy of the payload was made before we
        // took or settled it, and whoever moves the floor over a settled word has seen all who read the message.
        // Crash points: before this the message was as it was seen, after it it is as the new word says.
        let word = self.word(seen.sequence);
        word.compare_exchange(seen.raw, new, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        Some(self.read(seen.sequence, new))
    }

    /// Leases the message to `owner` until `due`, one attempt more. `None`: somebody was faster.
    #[inline]
    pub fn take(&self, seen: Seen, owner: u8, due: u64) -> Option<Seen> {
        let attempt = seen.attempt.saturating_add(1);
        self.swap(seen, self.pack(seen.sequence, due, attempt, owner, LEASED))
    }

    /// Settles the message: an ack, the end of a move, a delivery at most once, a hole. `false`: it was not as seen.
    #[inline]
    pub fn settle(&self, seen: Seen) -> bool {
        let new = seen.raw & !((1 << STATE_BITS) - 1) | SETTLED;
        let new = if seen.state == State::Fresh { self.pack(seen.sequence, 0, 1, NOBODY, SETTLED) } else { new };
        self.swap(seen, new).is_some()
    }

    /// Gives a lease back, to be taken by anybody from `due` on.
    pub fn give_back(&self, lease: Seen, due: u64) -> bool {
        let new = self.pack(lease.sequence, due, lease.attempt, NOBODY, RETURNED);
        if self.swap(lease, new).is_none() {
            return false;
        }
        self.tell_returned();
        true
    }

    /// Gives a message back at once that was leased but never seen by its consumer: the attempt does not count.
    pub fn give_back_unseen(&self, lease: Seen, now: u64) -> bool {
        self.give_back(Seen { attempt: lease.attempt.saturating_sub(1), ..lease }, now)
    }

    /// Lets a lease end later (or sooner).
    pub fn extend(&self, lease: Seen, due: u64) -> Option<Seen> {
        let owner = lease.owner.unwrap_or(NOBODY);
        self.swap(lease, self.pack(lease.sequence, due, lease.attempt, owner, LEASED))
    }

    /// Begins to move the message to the dead-letter topic, or takes a move over that is nobody's.
    pub fn begin_move(&self, seen: Seen, owner: u8, due: u64, reason: MoveReason) -> Option<Seen> {
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

    /// Leases that have not ended, of one consumer or of all. A lease that has ended is anybody's, so it counts no more.
    pub fn leased(&self, owner: Option<u8>, now: u64) -> u64 {
        let counts =
            |seen: &Seen| seen.state == State::Leased && (owner.is_none() || seen.owner == owner) && !seen.is_due(now);
        self.handed_out().map(|sequence| self.look(sequence)).filter(counts).count() as u64
    }

    /// Everything between the floor and the hint.
    pub fn handed_out(&self) -> std::ops::Range<u64> {
        let floor = self.floor();
        // Acquire: A-HINT pairs with R-HINT (reserve, raise_hint): nothing that was taken lies above.
        let hint = self.header.hint.0.load(Ordering::Acquire);
        floor..hint.clamp(floor, floor.saturating_add(self.window()))
    }

    /// Up to where words have been handed out.
    #[inline]
    pub fn hint(&self) -> u64 {
        // Acquire: A-HINT pairs with R-HINT (reserve, raise_hint).
        self.header.hint.0.load(Ordering::Acquire)
    }

    /// Reserves `count` sequences from `from` on, which is the hint as last seen. It keeps others from trying the same
    /// words; whoever finds nothing else to do tries them all the same, so a reservation that dies costs nothing.
    #[inline]
    pub fn reserve(&self, from: u64, count: u64) -> bool {
        // Release: R-HINT pairs with A-HINT: who sees a word taken by us, or repairs after us, finds it below the hint.
        self.header.hint.0.compare_exchange(from, from + count, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Lets the hint be at least `to`: for consumers that choose among messages (ordered by key).
    pub fn raise_hint(&self, to: u64) {
        // Release: R-HINT pairs with A-HINT, as in `reserve`.
        self.header.hint.0.fetch_max(to, Ordering::AcqRel);
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
        while next < floor + self.window() && self.look(next).state == State::Settled {
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

    /// Puts `owner` in the place of the consumer at work, whose lease has ended.
    pub fn supersede(&self, owner: u8) {
        // Relaxed: as in `activate`.
        self.header.active.0.store(u64::from(owner) + 1, Ordering::Relaxed);
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
        // Release: R-FENCED pairs with A-FENCED (is_fenced).
        if fenced {
            word.fetch_or(bit, Ordering::Release);
        } else {
            word.fetch_and(!bit, Ordering::Release);
        }
    }

    /// Whether a consumer may not take anything any more: it was fenced, or the group was rewound or removed.
    #[inline]
    pub fn is_fenced(&self, owner: u8) -> bool {
        let state = &self.header.state;
        // Acquire: A-FENCED pairs with R-FENCED (set_fenced, end).
        let fenced = state.fenced[usize::from(owner) / 64].load(Ordering::Acquire) >> (owner % 64) & 1 == 1;
        fenced || state.ended.load(Ordering::Acquire) != 0
    }

    /// Ends the ledger: its group was rewound or removed, and all consumers on it are fenced.
    pub fn end(&self) {
        // Release: R-FENCED pairs with A-FENCED (is_fenced).
        self.header.state.ended.store(1, Ordering::Release);
    }
}

fn stored_state(state: u64) -> State {
    match state {
        RETURNED => State::Returned,
        LEASED => State::Leased,
        SETTLED => State::Settled,
        4 => State::Moving(MoveReason::Exhausted),
        5 => State::Moving(MoveReason::Rejected),
        6 => State::Moving(MoveReason::Expired),
        _ => State::Corrupt,
    }
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<LedgerHeader>() == crate::shm::layout::LEDGER_WORDS_OFFSET as usize);
