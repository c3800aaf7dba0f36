//! The ledger of a group: one word a message says who has it (ARCHITECTURE.md §4.9).
//!
//! ```text
//! word: 63 ...... 51   50 ....... 23   22 ..... 11   10 .... 3   2 .. 0
//!       lap (13)       due (28, ms)    attempt       owner       state
//! ```
//!
//! A message is taken, settled, given back and taken over by compare-and-swap on the exact word that was seen. The word
//! names owner, attempt and due time, so it *is* the lease: whoever comes late holds a word that is there no more, and
//! changes nothing. `hint` says up to where words have been handed out; it only saves looking, the words are the truth.
//!
//! A message's payload is copied out *before* its word is taken. The swap then proves the copy whole: while the word
//! was what it was, the message was unsettled, so the floor had not passed it and no publisher wrote there.
//!
//! *Runs.* [`RUN`] messages that lie side by side share one more word, of the same form, by which a consumer takes and
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

use crate::shm::shared::Shared;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// Consumers of one group, at most.
pub const MAX_CONSUMERS: u32 = 255;

/// Messages that one swap takes or settles, where they begin at a multiple of it.
pub const RUN: u64 = if cfg!(loom) { 2 } else { 16 };

/// Every so many laps no run is taken as a whole, so that no message's word is older than that and its lap can be told
/// from a later one.
const WORD_BY_WORD: u64 = 2048;

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
/// field tells that for two days more ([`Ledger::renew_due`]). Half an hour beyond the longest lease: a coarse clock rounds
/// it up, and who compares may have read the clock before the lease was taken.
const MAX_AHEAD_MS: u64 = *crate::group::LEASE_MS.end() + 30 * 60 * 1000;

/// How long ago a time may have come before [`Ledger::renew_due`] sets it anew: half a day.
const RENEW_MS: u64 = MAX_AHEAD_MS / 2;

/// Attempts are counted up to here.
pub const MAX_ATTEMPT: u16 = (1 << 12) - 1;

/// Laps the field can tell apart. Half of them are laps before and half to come, which [`WORD_BY_WORD`] would not need;
/// the rest guards a swap that was slept through (I-13).
const LAPS: u64 = 1 << 13;

const RETURNED: u64 = 1;
const LEASED: u64 = 2;
const SETTLED: u64 = 3;
const MOVING: u64 = 4;

/// What a word says in whose place there is one of another lap: a fresh message; nothing that makes sense.
const UNTOUCHED: u64 = (NOBODY as u64) << OWNER_SHIFT;
const FOREIGN: u64 = UNTOUCHED | 7;

/// What a run's word may say besides LEASED and SETTLED.
const APART: u64 = 1;
const SPLIT: u64 = 4;

/// Instead of a message's word that was not looked at: what no correct consumer writes.
const UNREAD: u64 = u64::MAX;

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
    sequence: u64,
    /// Its own word.
    raw: u64,
    /// The word of its run, where that still matters.
    run: u64,
    /// What both together say, in the form of a word of its own.
    says: u64,
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
    fn due(self) -> u64 {
        self.says >> DUE_SHIFT & DUE_MASK
    }

    /// Whether what it says is not in its own word.
    #[inline]
    fn stands_for_run(self) -> bool {
        self.raw != self.says
    }

    #[inline]
    fn with_state(self, state: u64) -> Self {
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
    fn due_since(self, now: u64) -> u64 {
        if self.is_due(now) { now.wrapping_sub(self.due()) & DUE_MASK } else { 0 }
    }
}

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
enum RunState {
    /// That of the lap before: nobody has taken one of its messages yet.
    Untouched,
    Apart,
    Leased,
    Split,
    Settled,
    Corrupt,
}

/// Bits of a role's word that say whose it is.
const ROLE_OWNER_BITS: u32 = 9;

/// The role of the consumer at work in an exclusive group, as it was seen: a lease of its own, which its holder renews.
///
/// ```text
/// word: 63 ........... 9   8 ......... 0
///       due (ms)           owner + 1, 0 nobody's
/// ```
///
/// It ends no sooner than any lease of its holder, so whoever finds it overdue knows that all of those are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role(u64);

impl Role {
    fn new(owner: u8, due: u64) -> Self {
        Role(due << ROLE_OWNER_BITS | (u64::from(owner) + 1))
    }

    /// Who is at work.
    pub fn owner(self) -> Option<u8> {
        let owner = (self.0 & ((1 << ROLE_OWNER_BITS) - 1)).checked_sub(1)?;
        u8::try_from(owner).ok()
    }

    fn due(self) -> u64 {
        self.0 >> ROLE_OWNER_BITS
    }

    /// Milliseconds until another may take it: 0 where it is nobody's, has ended, or says what nobody writes.
    pub fn due_in(self, now: u64) -> u64 {
        let ahead = self.due().saturating_sub(now);
        if self.owner().is_none() || ahead > MAX_AHEAD_MS { 0 } else { ahead }
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
    /// Exclusive groups: who is at work, see [`Role`].
    role: Line,
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
    #[cfg(any(loom, test))]
    pub fn new(start: u64) -> Self {
        let line = |value| Line(AtomicU64::new(value));
        LedgerHeader {
            hint: line(start),
            floor: line(start),
            returned: line(0),
            role: line(0),
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
    /// Two words a run of the window; none where the window is too short.
    runs: Shared<[AtomicU64]>,
    lap_shift: u32,
}

impl Ledger {
    /// A ledger over this memory; the number of words is a power of two, that of run words [`runs_in`] tells.
    pub fn new(header: Shared<LedgerHeader>, words: Shared<[AtomicU64]>, runs: Shared<[AtomicU64]>) -> Self {
        assert!(words.len().is_power_of_two(), "a window is a power of two, found {}", words.len());
        assert_eq!(runs.len() as u64, runs_in(words.len() as u64), "run words");
        let lap_shift = words.len().trailing_zeros();
        Ledger { header, words, runs, lap_shift }
    }

    pub(crate) fn header(&self) -> &LedgerHeader {
        &self.header
    }

    /// Sequences that may be handed out above the floor.
    pub fn window(&self) -> u64 {
        self.words.len() as u64
    }

    /// Up to where messages may be handed out while the floor is there.
    #[inline]
    pub fn window_end(&self, floor: u64) -> u64 {
        floor.saturating_add(self.window())
    }

    fn word(&self, sequence: u64) -> &AtomicU64 {
        &self.words[(sequence & (self.window() - 1)) as usize]
    }

    /// The word of the run that `sequence` is in; used every other lap, because the run that the floor is in may still need
    /// its word when the one a window above begins.
    #[inline]
    fn run_word(&self, sequence: u64) -> Option<&AtomicU64> {
        self.runs.get(((sequence & (2 * self.window() - 1)) / RUN) as usize)
    }

    /// What that word says. Without runs: that every message stands alone.
    #[inline(always)]
    fn load_run(&self, sequence: u64) -> u64 {
        // Acquire: A-LEDGER pairs with R-LEDGER (swap_run).
        let apart = || self.pack(sequence, 0, 0, NOBODY, APART);
        self.run_word(sequence).map_or_else(apart, |word| word.load(Ordering::Acquire))
    }

    /// The lap as stored.
    #[inline]
    fn lap_field(&self, sequence: u64) -> u64 {
        self.lap(sequence) % LAPS
    }

    #[inline]
    fn lap(&self, sequence: u64) -> u64 {
        sequence >> self.lap_shift
    }

    /// Whether a word of `sequence` was written in its own lap. No state is written as 0, so that zeroed memory never was.
    #[inline]
    fn is_of_lap(&self, sequence: u64, raw: u64) -> bool {
        raw >> LAP_SHIFT == self.lap_field(sequence) && raw & STATE_MASK != 0
    }

    /// Whether a message's word says nothing about its lap: nobody has written it yet, or in a lap before.
    #[inline]
    fn is_old(&self, sequence: u64, raw: u64) -> bool {
        let age = self.lap(sequence).wrapping_sub(raw >> LAP_SHIFT) % LAPS;
        raw == 0 || raw & STATE_MASK == SETTLED && (1..=LAPS / 2).contains(&age)
    }

    /// What the word of `sequence` says. The caller has seen that `sequence < floor + window`; where the floor has passed
    /// the sequence since, it is settled.
    #[inline(always)]
    pub fn look(&self, sequence: u64) -> Seen {
        // The run's word first: if it says parted, the message's own word is the truth from then on. Where the message's
        // own word is of this lap, it is so whatever the run's word said.
        let run = self.load_run(sequence);
        // Acquire: A-LEDGER pairs with R-LEDGER (swap).
        let seen = self.read(sequence, run, self.word(sequence).load(Ordering::Acquire));
        // A word of a later lap may look like anything: like one before, where we slept after loading the run's, or like
        // this one's. Whoever wrote it had seen the floor above us; so, after the load, do we.
        if seen.state() != State::Settled && self.is_passed(sequence) {
            return Seen { says: FOREIGN, ..seen }.with_state(SETTLED);
        }
        seen
    }

    /// Whether the floor has passed a sequence: what has been loaded before in its place may be of any lap.
    #[inline]
    fn is_passed(&self, sequence: u64) -> bool {
        sequence < self.floor()
    }

    #[inline(always)]
    fn read(&self, sequence: u64, run: u64, raw: u64) -> Seen {
        if self.is_of_lap(sequence, raw) {
            return Seen { sequence, raw, run: 0, says: raw };
        }
        let says = match self.run_state(sequence, run) {
            _ if !self.is_old(sequence, raw) => FOREIGN,
            RunState::Untouched | RunState::Apart => UNTOUCHED,
            RunState::Leased | RunState::Settled => run,
            RunState::Split => run & !STATE_MASK | LEASED,
            RunState::Corrupt => FOREIGN,
        };
        Seen { sequence, raw, run, says }
    }

    #[inline(always)]
    fn run_state(&self, sequence: u64, run: u64) -> RunState {
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

    fn pack(&self, sequence: u64, due: u64, attempt: u16, owner: u8, state: u64) -> u64 {
        let attempt = u64::from(attempt.min(MAX_ATTEMPT));
        let due = due & DUE_MASK;
        self.lap_field(sequence) << LAP_SHIFT
            | due << DUE_SHIFT
            | attempt << ATTEMPT_SHIFT
            | u64::from(owner) << OWNER_SHIFT
            | state
    }

    /// The word as it was seen, with another due time and state.
    #[inline]
    fn repack(&self, seen: Seen, due: u64, state: u64) -> u64 {
        self.pack(seen.sequence, due, seen.attempt(), seen.owner().unwrap_or(NOBODY), state)
    }

    /// Puts `new` in the place of exactly what was seen. What is settled stays settled, what is corrupt stays for people
    /// to see.
    #[inline(always)]
    fn swap(&self, seen: Seen, new: u64) -> Option<Seen> {
        if matches!(seen.state(), State::Settled | State::Corrupt) {
            return None;
        }
        let raw = if seen.stands_for_run() { self.part(seen)? } else { seen.raw };
        // Release: R-LEDGER pairs with A-LEDGER (look): our copy of the payload was made before we took or settled it, and
        // whoever moves the floor over a settled word has seen all who read the message. No Acquire: what is replaced
        // was seen by `look`, or written by whoever handed us the lease.
        // Crash points: before this the message was as it was seen, after it it is as the new word says.
        let word = self.word(seen.sequence);
        word.compare_exchange(raw, new, Ordering::Release, Ordering::Relaxed).ok()?;
        Some(Seen { raw: new, run: 0, says: new, ..seen })
    }

    /// Parts the run of a message whose own word has not been written in this lap. Returns that word; `None`: the message
    /// is not as seen.
    /// Crash points: a run that was parted for nothing says the same about each of its messages as before.
    #[inline(never)]
    fn part(&self, seen: Seen) -> Option<u64> {
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

    /// How often the lap's field has come round. It stands in the due time of what is settled for good or has none: the
    /// field's laps, a small window goes through in milliseconds, and no word may be what it was by then.
    #[inline]
    fn round(&self, sequence: u64) -> u64 {
        self.lap(sequence) / LAPS
    }

    /// Leases the message to `owner` until `due`, one attempt more. `None`: somebody was faster, or it is being moved to
    /// the dead-letter topic, and such a message is never delivered again.
    #[inline(always)]
    pub fn take(&self, seen: Seen, owner: u8, due: u64) -> Option<Seen> {
        if matches!(seen.state(), State::Moving(_)) {
            return None;
        }
        let attempt = seen.attempt().saturating_add(1);
        self.swap(seen, self.pack(seen.sequence, due, attempt, owner, LEASED))
    }

    /// Settles the message: an ack, the end of a move, a delivery at most once, a hole. `false`: it was not as seen.
    #[inline(always)]
    pub fn settle(&self, seen: Seen) -> bool {
        let new = match seen.state() {
            State::Fresh => self.pack(seen.sequence, self.round(seen.sequence), 1, NOBODY, SETTLED),
            _ => seen.with_state(SETTLED).says,
        };
        self.swap(seen, new).is_some()
    }

    /// Gives a lease back, to be taken by anybody from `due` on, which is at most 24 hours from now.
    pub fn give_back(&self, lease: Seen, due: u64) -> bool {
        self.give_back_after(lease, due, lease.attempt())
    }

    fn give_back_after(&self, lease: Seen, due: u64, attempt: u16) -> bool {
        let new = self.pack(lease.sequence, due, attempt, NOBODY, RETURNED);
        if lease.state() != State::Leased || self.swap(lease, new).is_none() {
            return false;
        }
        self.tell_returned();
        true
    }

    /// Gives a message back at once that was leased but never seen by its consumer: the attempt does not count.
    pub fn give_back_unseen(&self, lease: Seen, now: u64) -> bool {
        self.give_back_after(lease, now, lease.attempt().saturating_sub(1))
    }

    /// Lets a lease end later (or sooner), at most 24 hours from now.
    pub fn extend(&self, lease: Seen, due: u64) -> Option<Seen> {
        if lease.state() != State::Leased {
            return None;
        }
        self.swap(lease, self.repack(lease, due, LEASED))
    }

    /// Takes an extension back: `extended` becomes the lease again that it was. `false`: it is `extended` no more.
    pub fn undo_extend(&self, extended: Seen, lease: Seen) -> bool {
        self.swap(extended, lease.says).is_some()
    }

    /// Begins to move the message to the dead-letter topic, or takes a move over that is nobody's. `None`: somebody was
    /// faster, or it is another's move, overdue or not: only the coordinator can tell whether that one's copy is there.
    pub fn begin_move(&self, seen: Seen, owner: u8, due: u64, reason: MoveReason) -> Option<Seen> {
        if matches!(seen.state(), State::Moving(_)) && seen.owner().is_some_and(|mover| mover != owner) {
            return None;
        }
        self.swap(seen, self.pack(seen.sequence, due, seen.attempt(), owner, MOVING + reason as u64))
    }

    /// After its owner was proven dead or fenced: what it had leased goes back, what it was moving is anybody's to move,
    /// and what `committed` says it had finished is settled. Idempotent. Returns how many messages it concerned.
    /// `now` is when: it may be taken again at once.
    pub fn release_owner(&self, owner: u8, now: u64, committed: impl Fn(u64, State) -> bool) -> u64 {
        let mut released = 0;
        for sequence in self.handed_out() {
            let seen = self.look(sequence);
            if seen.owner() != Some(owner) {
                continue;
            }
            let swapped = match seen.state() {
                State::Leased | State::Moving(_) if committed(sequence, seen.state()) => self.settle(seen),
                State::Leased => self.give_back(seen, now),
                State::Moving(reason) => self
                    .swap(seen, self.pack(sequence, seen.due(), seen.attempt(), NOBODY, MOVING + reason as u64))
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
        let counts = |seen: &Seen| {
            seen.state() == State::Leased && (owner.is_none() || seen.owner() == owner) && !seen.is_due(now)
        };
        self.handed_out().map(|sequence| self.look(sequence)).filter(counts).count() as u64
    }

    /// Sets times anew that came more than half a day ago, before the due field comes round and they seem to lie ahead
    /// again. The coordinator does it at least once a day, for groups on which nobody looks. A lease that ended so long ago
    /// is lost to its owner by this, as it may be at any time.
    pub fn renew_due(&self, now: u64) {
        for sequence in self.handed_out() {
            let seen = self.look(sequence);
            let timed = matches!(seen.state(), State::Returned | State::Leased | State::Moving(_));
            if timed && seen.due_since(now) > RENEW_MS {
                self.swap(seen, self.repack(seen, now, stored(seen.state())));
            }
        }
    }

    /// Everything between the floor and the hint.
    pub fn handed_out(&self) -> std::ops::Range<u64> {
        let floor = self.floor();
        floor..self.hint().clamp(floor, self.window_end(floor))
    }

    /// Up to where words have been handed out.
    #[inline]
    pub fn hint(&self) -> u64 {
        // Relaxed: a number that stands for nothing but itself. Who has seen a word taken, or a floor above it, finds
        // the hint above it too: it was raised first, and what came before a swap is seen with it (A-LEDGER).
        self.header.hint.0.load(Ordering::Relaxed)
    }

    /// Whether everything that the floor allows has been handed out.
    #[inline]
    pub fn is_window_full(&self) -> bool {
        self.hint() >= self.window_end(self.floor())
    }

    /// Asks for the words of the runs that will be looked at next.
    #[cfg(not(loom))]
    pub(crate) fn prefetch_runs(&self, sequences: std::ops::Range<u64>) {
        const RUNS_PER_LINE: u64 = 64 / size_of::<AtomicU64>() as u64;
        for first in sequences.step_by((RUN * RUNS_PER_LINE) as usize) {
            self.run_word(first).inspect(|word| crate::os::cache::prefetch_line(word.as_ptr().cast()));
        }
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
        while next < self.window_end(floor) {
            if self.run_state(next, self.load_run(next)) == RunState::Settled {
                next = (next | (RUN - 1)).saturating_add(1);
            } else if self.look(next).state() == State::Settled {
                next += 1;
            } else {
                break;
            }
        }
        if next == floor {
            return floor;
        }
        // AcqRel: R-SETTLED-FLOOR pairs with A-SETTLED-FLOOR, and is one: where another has moved it further, we return
        // its floor and need its view. Monotone by max: a floor moved back would stand on words that have been reused.
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

    /// Who is at work in an exclusive group, and until when at least.
    #[inline]
    pub fn role(&self) -> Role {
        // Relaxed: it only chooses who tries; what it means for the words is ordered by the fences of `keep_role` and
        // `end_other_leases`.
        Role(self.header.role.0.load(Ordering::Relaxed))
    }

    /// Puts `owner` to work in an exclusive group until `due`, in the place of `seen`, which is nobody's or overdue. `false`:
    /// it was not as seen. The newcomer ends what others have leased before it takes anything ([`Self::end_other_leases`]).
    pub fn take_role(&self, seen: Role, owner: u8, due: u64) -> bool {
        self.swap_role(seen, Role::new(owner, due))
    }

    /// Lets `owner` be at work until `due` at least. `false`: it is at work no more.
    ///
    /// After messages were taken it also tells whether that was in time: while nobody else was at work.
    #[inline]
    pub fn keep_role(&self, owner: u8, due: u64) -> bool {
        // Store, then look: pairs with the fence in `end_other_leases`. Either we see that another is at work, or it sees
        // what we have just leased, and ends it.
        fence(Ordering::SeqCst);
        let seen = self.role();
        seen.owner() == Some(owner) && (seen.due() >= due || self.swap_role(seen, Role::new(owner, due)))
    }

    /// Ends what others have leased in an exclusive group, for whoever has just been put to work: order would not hold
    /// if they settled it later. What somebody leases after this finds out that it came too late (`keep_role`).
    pub fn end_other_leases(&self, owner: u8, now: u64) {
        // Store, then look: pairs with the fence in `keep_role`.
        fence(Ordering::SeqCst);
        for sequence in self.handed_out() {
            let seen = self.look(sequence);
            if seen.is_leased_by_other(owner) {
                self.give_back(seen, now);
            }
        }
    }

    /// The consumer at work of an exclusive group.
    pub fn active(&self) -> Option<u8> {
        self.role().owner()
    }

    /// `owner` is at work no more: another may take the role. Whether it was.
    pub fn leave_role(&self, owner: u8) -> bool {
        let seen = self.role();
        // A renewal may come between; nobody but the one at work, and whoever speaks for the dead, writes it then.
        seen.owner() == Some(owner) && (self.swap_role(seen, Role(0)) || self.leave_role(owner))
    }

    fn swap_role(&self, seen: Role, new: Role) -> bool {
        // Relaxed: as in `role`. Crash points: before this the role was as seen; after it it is the newcomer's, whose leases
        // are returned, and whose role is freed, when it is proven dead.
        self.header.role.0.compare_exchange(seen.0, new.0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
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

/// Run words that belong to a window of so many words; none if it is too short for a run.
pub fn runs_in(window: u64) -> u64 {
    window / RUN * 2
}

fn stored(state: State) -> u64 {
    match state {
        State::Fresh | State::Corrupt => 0,
        State::Returned => RETURNED,
        State::Leased => LEASED,
        State::Settled => SETTLED,
        State::Moving(reason) => MOVING + reason as u64,
    }
}

fn stored_state(state: u64) -> State {
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

#[cfg(not(loom))]
const _: () = assert!(size_of::<LedgerHeader>() == crate::shm::layout::LEDGER_WORDS_OFFSET as usize);

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::HashMap;
    use std::ptr::NonNull;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    const HOUR: u64 = 3_600_000;

    fn share<T: ?Sized + Send + Sync>(target: Box<T>) -> Shared<T> {
        let keep = Arc::new(target);
        // SAFETY: I-11: `keep` owns the memory, which does not move; atomics only.
        unsafe { Shared::new(NonNull::from(&**keep), keep) }
    }

    /// A ledger on which all of the first window has been handed out.
    fn ledger(window: u64, start: u64) -> Ledger {
        let words = |count| (0..count).map(|_| AtomicU64::new(0)).collect::<Box<[_]>>();
        let header = share(Box::new(LedgerHeader::new(start)));
        let ledger = Ledger::new(header, share(words(window)), share(words(runs_in(window))));
        ledger.raise_hint(start.saturating_add(window));
        ledger
    }

    fn settle_fresh(ledger: &Ledger, sequence: u64) {
        let seen = ledger.look(sequence);
        assert_eq!(seen.state(), State::Fresh, "{sequence}");
        assert!(ledger.settle(seen));
    }

    /// Hands the ledger on by `laps` laps at most once, as far as one word sees it.
    fn skip_laps(ledger: &Ledger, sequence: u64, laps: u64) {
        let later = sequence + (laps - 1) * ledger.window();
        ledger.word(sequence).store(ledger.pack(later, 0, 1, NOBODY, SETTLED), Ordering::Relaxed);
        ledger.header().floor.0.store(later + 1, Ordering::Relaxed);
    }

    #[test]
    fn laps_come_round_without_a_foreign_word() {
        let start = 2 * (LAPS - 2) + 1;
        let ledger = ledger(2, start);
        for sequence in start..start + 8 {
            settle_fresh(&ledger, sequence);
            assert_eq!(ledger.look(sequence).state(), State::Settled);
            assert_eq!(ledger.advance_floor(), sequence + 1);
        }
    }

    #[test]
    fn a_word_that_was_reused_is_settled_and_one_from_nowhere_is_corrupt() {
        let ledger = ledger(2, 0);
        let slow = ledger.look(0);
        settle_fresh(&ledger, 0);
        ledger.advance_floor();
        let reused = ledger.take(ledger.look(2), 1, 10).unwrap();
        assert_eq!(ledger.look(0).state(), State::Settled);
        assert!(ledger.take(slow, 2, 10).is_none() && !ledger.settle(ledger.look(0)));
        assert_eq!(ledger.look(2), reused);

        let foreign = ledger.pack(4, 0, 1, 1, LEASED);
        ledger.word(1).store(foreign, Ordering::Relaxed);
        let seen = ledger.look(1);
        assert_eq!((seen.state(), seen.owner()), (State::Corrupt, None));
        assert!(ledger.take(seen, 1, 10).is_none() && !ledger.settle(seen));
        assert_eq!(ledger.advance_floor(), 1, "no floor moves over it");
    }

    /// A consumer that copied a message at most once, slept while all laps of the field went by, and then settles it.
    #[test]
    fn a_swap_slept_through_for_all_laps_fails_at_most_once() {
        let ledger = ledger(2, 0);
        settle_fresh(&ledger, 0);
        ledger.advance_floor();
        let slow = ledger.look(2);
        settle_fresh(&ledger, 2);
        let later = 2 + LAPS * 2;
        for lap in 1..LAPS {
            skip_laps(&ledger, 0, lap + 1);
            settle_fresh(&ledger, 2 + lap * 2);
            ledger.header().floor.0.store(3 + lap * 2, Ordering::Relaxed);
        }
        assert_eq!(ledger.lap_field(2), ledger.lap_field(later), "the field has come round");
        assert_eq!(ledger.look(later).state(), State::Fresh);
        assert!(!ledger.settle(slow), "it would have settled {later} undelivered");
    }

    /// What other consumers make of the memory of `sequence` while somebody sleeps for so many laps: its word is one of a
    /// later lap.
    fn sleep_for_laps(ledger: &Ledger, sequence: u64, laps: u64, state: u64) {
        let later = sequence + laps * ledger.window();
        ledger.word(sequence).store(ledger.pack(later, 77, 1, 9, state), Ordering::Relaxed);
        ledger.header().floor.0.store(later, Ordering::Relaxed);
    }

    /// Half of all laps to come look like laps before to whoever still believes the run's word that it saw first.
    #[test]
    fn a_look_slept_through_between_its_two_words_finds_what_is_settled() {
        for laps in [1, LAPS / 2 - 1, LAPS / 2, LAPS / 2 + 1, 5000, LAPS - 1, LAPS, LAPS + 1] {
            for (split, state) in [(false, SETTLED), (true, SETTLED), (false, LEASED), (true, RETURNED)] {
                let ledger = ledger(4 * RUN, 0);
                if split {
                    let run = ledger.look_at_run(0).unwrap();
                    let leased = ledger.leased_run(run, 1, 10);
                    assert!(ledger.take_run(run, leased) && ledger.settle(ledger.lease_in(leased, 0)));
                } else {
                    settle_fresh(&ledger, 0);
                }
                // Between the looks at both words.
                sleep_for_laps(&ledger, 5, laps, state);
                let seen = ledger.look(5);
                assert_eq!(seen.state(), State::Settled, "{laps} {split} {state}");
                assert!(ledger.take(seen, 2, 10).is_none() && !ledger.settle(seen));
            }
        }
    }

    /// The holder of a run parts it to settle one message, and sleeps before it looks at that message's own word.
    #[test]
    fn a_settling_slept_through_between_its_two_swaps_changes_nothing() {
        for laps in [1, LAPS / 2 - 1, LAPS / 2, 5000, LAPS - 1, LAPS, LAPS + 1] {
            let ledger = ledger(4 * RUN, 0);
            let run = ledger.look_at_run(0).unwrap();
            let leased = ledger.leased_run(run, 1, 10);
            assert!(ledger.take_run(run, leased));
            let lease = ledger.lease_in(leased, 5);
            assert!(ledger.part(lease).is_some());
            sleep_for_laps(&ledger, 5, laps, SETTLED);
            let before = ledger.word(5).load(Ordering::Relaxed);
            assert!(!ledger.settle(lease) && !ledger.give_back(lease, 20), "{laps}");
            assert_eq!(ledger.word(5).load(Ordering::Relaxed), before, "{laps}: the word is of another lap");
        }
    }

    /// A reservation slept through for nearly all laps of the field: the run's word of then is the mark of a lap before.
    #[test]
    fn a_reservation_slept_through_takes_no_run() {
        let ledger = ledger(4 * RUN, 0);
        let later = 2 * LAPS * ledger.window() - 2 * ledger.window();
        for mark in [APART, SPLIT, SETTLED] {
            let raw = ledger.pack(later, ledger.round(later), 1, 1, mark);
            ledger.run_word(0).unwrap().store(raw, Ordering::Relaxed);
            ledger.header().floor.0.store(later, Ordering::Relaxed);
            assert_eq!(ledger.look_at_run(0), None);
        }
    }

    /// What each operation makes of each state; `None`: it changes nothing and says so.
    #[test]
    fn every_transition_from_every_state() {
        use State::{Fresh, Leased, Moving, Returned, Settled};
        let (mine, nobodys) = (Moving(MoveReason::Expired), Moving(MoveReason::Exhausted));
        type Operation = (&'static str, fn(&Ledger, Seen) -> bool);
        let operations: [Operation; 6] = [
            ("take", |ledger, seen| ledger.take(seen, 7, 9).is_some()),
            ("settle", |ledger, seen| ledger.settle(seen)),
            ("give back", |ledger, seen| ledger.give_back(seen, 9)),
            ("give back unseen", |ledger, seen| ledger.give_back_unseen(seen, 9)),
            ("extend", |ledger, seen| ledger.extend(seen, 9).is_some()),
            ("move", |ledger, seen| ledger.begin_move(seen, 7, 9, MoveReason::Rejected).is_some()),
        ];
        let moved = Some(Moving(MoveReason::Rejected));
        let table = [
            (Fresh, [Some(Leased), Some(Settled), None, None, None, moved]),
            (Returned, [Some(Leased), Some(Settled), None, None, None, moved]),
            (Leased, [Some(Leased), Some(Settled), Some(Returned), Some(Returned), Some(Leased), moved]),
            (mine, [None, Some(Settled), None, None, None, None]),
            (nobodys, [None, Some(Settled), None, None, None, moved]),
            (Settled, [None; 6]),
        ];
        for (state, results) in table {
            for ((name, operation), expected) in operations.iter().zip(results) {
                let ledger = ledger(2, 5);
                let fresh = ledger.look(5);
                match state {
                    Fresh => {}
                    Settled => assert!(ledger.settle(fresh)),
                    Moving(reason) => drop(ledger.begin_move(fresh, 3, 4, reason).unwrap()),
                    _ => drop(ledger.take(fresh, 3, 4).unwrap()),
                }
                match state {
                    Returned => assert!(ledger.give_back(ledger.look(5), 4)),
                    Moving(MoveReason::Exhausted) => drop(ledger.release_owner(3, 0, |_, _| false)),
                    _ => {}
                }
                let before = ledger.look(5);
                assert_eq!(before.state(), state);
                assert_eq!(operation(&ledger, before), expected.is_some(), "{name} of {state:?}");
                let after = ledger.look(5);
                assert_eq!(after.state(), expected.unwrap_or(state), "{name} of {state:?}");
                assert_eq!(expected.is_some(), after != before, "{name} of {state:?}");
                assert!(expected.is_none() || !operation(&ledger, before), "{name} twice of {state:?}");
            }
        }
    }

    #[test]
    fn attempts_are_counted_up_to_the_most() {
        let ledger = ledger(2, 0);
        for attempt in 1..=MAX_ATTEMPT + 2 {
            let lease = ledger.take(ledger.look(0), 254, 0).unwrap();
            assert_eq!((lease.attempt(), lease.owner()), (attempt.min(MAX_ATTEMPT), Some(254)));
        }
        let lease = ledger.look(0);
        assert!(ledger.give_back_unseen(lease, 5));
        assert_eq!((ledger.look(0).attempt(), ledger.look(0).owner()), (MAX_ATTEMPT - 1, None));
        assert!(ledger.look(0).is_due(5), "nobody has seen it: at once");
    }

    #[test]
    fn what_the_dead_held_may_be_taken_at_once() {
        let ledger = ledger(4, 0);
        let now = 1 << 40;
        for (sequence, owner) in [(0, 3), (1, 3), (2, 4)] {
            ledger.take(ledger.look(sequence), owner, now + 24 * HOUR).unwrap();
        }
        assert_eq!(ledger.release_owner(3, now, |sequence, state| sequence == 1 && state == State::Leased), 2);
        assert_eq!((ledger.look(0).state(), ledger.look(0).attempt()), (State::Returned, 1));
        assert!(ledger.look(0).is_due(now));
        assert_eq!((ledger.look(1).state(), ledger.look(2).state()), (State::Settled, State::Leased));
        assert_eq!(ledger.release_owner(3, now, |_, _| true), 0);
    }

    /// Nobody looks at a group for weeks; the coordinator renews once a day what has long been due.
    #[test]
    fn what_is_due_stays_due() {
        let ledger = ledger(4, 0);
        let begin = 1 << 40;
        let returned = ledger.take(ledger.look(0), 1, begin).unwrap();
        assert!(ledger.give_back(returned, begin + 24 * HOUR));
        ledger.take(ledger.look(1), 2, begin + HOUR).unwrap();
        ledger.begin_move(ledger.look(2), 2, begin + HOUR, MoveReason::Rejected).unwrap();
        for day in 1..20 {
            let now = begin + day * 24 * HOUR;
            ledger.renew_due(now);
            assert!((0..3).all(|sequence| ledger.look(sequence).is_due(now)), "day {day}");
        }
        assert_eq!((ledger.look(1).owner(), ledger.look(2).owner()), (Some(2), Some(2)));
        assert_eq!(ledger.look(2).state(), State::Moving(MoveReason::Rejected));
    }

    #[test]
    fn what_was_handed_out_is_never_more_than_a_window() {
        let ledger = ledger(4, 10);
        assert_eq!(ledger.handed_out(), 10..14);
        assert!(!ledger.reserve(13, 1) && ledger.reserve(14, u64::MAX));
        assert_eq!((ledger.hint(), ledger.handed_out()), (u64::MAX, 10..14));
        ledger.header().hint.0.store(3, Ordering::Relaxed);
        assert!(ledger.handed_out().is_empty());
        ledger.header().floor.0.store(u64::MAX, Ordering::Relaxed);
        assert_eq!((ledger.handed_out().count(), ledger.advance_floor()), (0, u64::MAX), "garbage is no panic");
    }

    #[test]
    fn each_consumer_is_fenced_alone() {
        let ledger = ledger(2, 0);
        for owner in [0, 63, 64, 254] {
            ledger.set_fenced(owner, true);
            assert!((0..=254).all(|other| ledger.is_fenced(other) == (other == owner)));
            ledger.set_fenced(owner, false);
        }
        ledger.end();
        assert!((0..=254).all(|owner| ledger.is_fenced(owner)));
    }

    #[test]
    fn a_standby_takes_the_role_that_it_saw() {
        let ledger = ledger(2, 0);
        let nobodys = ledger.role();
        assert_eq!((nobodys.owner(), nobodys.due_in(0)), (None, 0));
        assert!(ledger.take_role(nobodys, 0, 100) && !ledger.take_role(nobodys, 254, 100));
        let seen = ledger.role();
        assert_eq!((seen.owner(), seen.due_in(40), seen.due_in(101)), (Some(0), 60, 0));
        assert!(!ledger.keep_role(254, 200) && ledger.keep_role(0, 50));
        assert_eq!(ledger.role(), seen, "it is never shortened");
        assert!(ledger.keep_role(0, 200) && !ledger.take_role(seen, 254, 300), "renewed in time");
        assert!(ledger.take_role(ledger.role(), 254, 300) && !ledger.keep_role(0, 400));
        assert!(!ledger.leave_role(0) && ledger.active() == Some(254));
        assert!(ledger.leave_role(254) && ledger.active().is_none());
    }

    #[test]
    fn garbage_in_the_role_is_overdue() {
        for raw in [u64::MAX, 256 << 1, 300, u64::MAX << ROLE_OWNER_BITS | 1] {
            let ledger = ledger(2, 0);
            ledger.header().role.0.store(raw, Ordering::Relaxed);
            assert_eq!(ledger.role().due_in(1000), 0, "{raw:#x}");
            assert!(ledger.take_role(ledger.role(), 3, 2000) && ledger.active() == Some(3));
        }
    }

    #[test]
    fn who_is_put_to_work_ends_the_leases_of_others_alone() {
        let ledger = ledger(4, 0);
        for (sequence, owner) in [(0, 1), (1, 2), (2, 1)] {
            ledger.take(ledger.look(sequence), owner, 100).unwrap();
        }
        assert!(ledger.settle(ledger.look(0)));
        ledger.end_other_leases(2, 10);
        let states = [State::Settled, State::Leased, State::Returned, State::Fresh];
        assert_eq!([0, 1, 2, 3].map(|sequence| ledger.look(sequence).state()), states);
        assert!(ledger.look(2).is_due(10));
    }

    /// A word of the model: what it says, and how often it has changed.
    #[derive(Clone, Copy)]
    struct Word {
        state: State,
        owner: Option<u8>,
        attempt: u16,
        due: u64,
        changes: u64,
    }

    /// Four runs.
    const WINDOW: u64 = 4 * RUN;

    const FRESH: Word = Word { state: State::Fresh, owner: None, attempt: 0, due: 0, changes: 0 };

    /// A ledger beside what it should be. The clock runs, so that no word is written twice.
    struct Pair {
        ledger: Ledger,
        words: HashMap<u64, Word>,
        /// Runs as they were seen, by whom they were leased since if they were, and whether they should be so still.
        runs: Vec<(Run, Option<u8>)>,
        floor: u64,
        now: u64,
        /// Words as they were seen, and how often they had changed by then.
        seen: Vec<(Seen, u64)>,
    }

    impl Pair {
        fn new(window: u64, start: u64, now: u64) -> Self {
            let (words, runs, seen) = (HashMap::new(), Vec::new(), Vec::new());
            Pair { ledger: ledger(window, start), words, runs, floor: start, now, seen }
        }

        fn expected(&self, sequence: u64) -> Word {
            let settled = Word { state: State::Settled, ..FRESH };
            self.words.get(&sequence).copied().unwrap_or(if sequence < self.floor { settled } else { FRESH })
        }

        fn look(&mut self, sequence: u64) {
            let (seen, word) = (self.ledger.look(sequence), self.expected(sequence));
            assert_eq!(seen.state(), word.state, "{sequence}");
            if !matches!(word.state, State::Fresh | State::Settled) {
                assert_eq!((seen.owner(), seen.attempt()), (word.owner, word.attempt), "{sequence}");
                assert_eq!(seen.due_in(self.now), word.due.saturating_sub(self.now), "{sequence}");
            }
            self.seen.push((seen, word.changes));
        }

        /// Does something to a word as it was seen, perhaps long ago.
        fn act(&mut self, which: usize, operation: u8, owner: u8, ahead: u64) {
            if self.seen.is_empty() {
                return;
            }
            let (seen, changes) = self.seen[which % self.seen.len()];
            let (word, due) = (self.expected(seen.sequence()), self.now + ahead);
            let unchanged = word.changes == changes && word.state == seen.state();
            let leased = seen.state() == State::Leased;
            let moving = matches!(seen.state(), State::Moving(_));
            let alive = unchanged && seen.state() != State::Settled;
            let attempt = seen.attempt();
            let (done, expected, new) = match operation % 6 {
                0 => {
                    let word = Word { state: State::Leased, owner: Some(owner), attempt: attempt + 1, due, ..FRESH };
                    (self.ledger.take(seen, owner, due).is_some(), alive && !moving, word)
                }
                1 => (self.ledger.settle(seen), alive, Word { state: State::Settled, ..FRESH }),
                2 => {
                    let word = Word { state: State::Returned, owner: None, attempt, due, ..FRESH };
                    (self.ledger.give_back(seen, due), alive && leased, word)
                }
                3 => {
                    let attempt = attempt.saturating_sub(1);
                    let word = Word { state: State::Returned, owner: None, attempt, due: self.now, ..FRESH };
                    (self.ledger.give_back_unseen(seen, self.now), alive && leased, word)
                }
                4 => {
                    let word = Word { state: State::Leased, owner: seen.owner(), attempt, due, ..FRESH };
                    (self.ledger.extend(seen, due).is_some(), alive && leased, word)
                }
                _ => {
                    let reason = MoveReason::Exhausted;
                    let word = Word { state: State::Moving(reason), owner: Some(owner), attempt, due, ..FRESH };
                    let mine = !moving || seen.owner().is_none_or(|mover| mover == owner);
                    (self.ledger.begin_move(seen, owner, due, reason).is_some(), alive && mine, word)
                }
            };
            assert_eq!(done, expected, "{operation} of {seen:?}");
            if done {
                self.words.insert(seen.sequence(), Word { changes: word.changes + 1, ..new });
            }
        }

        /// Looks at a run, and perhaps leases it.
        fn take_run(&mut self, which: u64, owner: u8, ahead: u64) {
            let first = (self.floor / RUN + which % (self.ledger.window() / RUN)) * RUN;
            if first < self.floor || first + RUN > self.ledger.window_end(self.floor) {
                return;
            }
            let fresh = (first..first + RUN).all(|sequence| self.expected(sequence).changes == 0);
            let word_by_word = first / self.ledger.window() % WORD_BY_WORD == WORD_BY_WORD - 1;
            let Some(run) = self.ledger.look_at_run(first) else {
                return assert!(!fresh || word_by_word, "{first} is untouched");
            };
            assert!(fresh && !word_by_word, "{first} is not untouched");
            self.runs.push((run, None));
            let due = self.now + ahead;
            let leased = self.ledger.leased_run(run, owner, due);
            if which.is_multiple_of(3) {
                return;
            }
            assert!(self.ledger.take_run(run, leased) && !self.ledger.take_run(run, leased));
            self.runs.push((leased, Some(owner)));
            for sequence in run.sequences() {
                let word = Word { state: State::Leased, owner: Some(owner), attempt: 1, due, changes: 1 };
                assert_eq!(self.ledger.lease_in(leased, sequence).state(), State::Leased);
                self.seen.push((self.ledger.lease_in(leased, sequence), 1));
                self.words.insert(sequence, word);
            }
        }

        /// Settles a run as it was seen, perhaps long ago.
        fn settle_run(&mut self, which: usize) {
            if self.runs.is_empty() {
                return;
            }
            let (run, owner) = self.runs[which % self.runs.len()];
            let changes = u64::from(owner.is_some());
            let unchanged = |word: Word| word.changes == changes && word.owner == owner;
            let expected =
                run.first >= self.floor && run.sequences().all(|sequence| unchanged(self.expected(sequence)));
            assert_eq!(self.ledger.settle_run(run, 1), expected, "{run:?}");
            if expected {
                for sequence in run.sequences() {
                    self.words.insert(sequence, Word { state: State::Settled, changes: changes + 1, ..FRESH });
                }
            }
        }

        fn release(&mut self, owner: u8) {
            let mut concerned = 0;
            for (sequence, word) in self.words.iter_mut().filter(|(_, word)| word.owner == Some(owner)) {
                let new = match word.state {
                    _ if sequence % 3 == 0 => Word { state: State::Settled, ..FRESH },
                    State::Leased => Word { state: State::Returned, owner: None, due: self.now, ..*word },
                    _ => Word { owner: None, ..*word },
                };
                *word = Word { changes: word.changes + 1, ..new };
                concerned += 1;
            }
            assert_eq!(self.ledger.release_owner(owner, self.now, |sequence, _| sequence % 3 == 0), concerned);
        }

        fn advance(&mut self) {
            while self.expected(self.floor).state == State::Settled {
                self.floor += 1;
            }
            assert_eq!(self.ledger.advance_floor(), self.floor);
            self.ledger.raise_hint(self.ledger.window_end(self.floor));
        }
    }

    proptest! {
        #[test]
        fn a_word_says_what_was_packed(
            sequence: u64, due in 0..=DUE_MASK, attempt in 0..=MAX_ATTEMPT, owner: u8, state in 1..7_u64,
        ) {
            let ledger = ledger(8, sequence);
            let seen = ledger.read(sequence, 0, ledger.pack(sequence, due, attempt, owner, state));
            prop_assert_eq!(seen.state(), stored_state(state));
            prop_assert_eq!((seen.due(), seen.attempt()), (due, attempt));
            prop_assert_eq!(seen.owner(), (owner != NOBODY).then_some(owner));
            for other in [1, 7, 8, 9] {
                let other = ledger.read(sequence ^ other << 3, 0, seen.raw);
                prop_assert!(matches!(other.state(), State::Corrupt | State::Fresh));
            }
        }

        /// Nothing but errors comes of it, also where it is nearly right or at the end of all numbers.
        #[test]
        fn garbage_in_words_and_runs_is_neither_panic_nor_hang(
            start in prop_oneof![Just(0), Just((1 << 63) - 24), Just(u64::MAX - 40), Just(u64::MAX - 12), any::<u64>()],
            hint: u64,
            garbage in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u64>(), 0..12_u8), 1..40),
        ) {
            let ledger = ledger(WINDOW, start);
            for (is_run, at, word, how) in garbage {
                let sequence = start.saturating_add(u64::from(at) % WINDOW);
                let word = match how {
                    0..9 => ledger.pack(sequence.wrapping_sub(u64::from(how / 4) * WINDOW), word, at.into(), at, word % 8),
                    9 => [0, u64::MAX, UNTOUCHED, FOREIGN][at as usize % 4],
                    _ => word,
                };
                let place = if is_run { ledger.run_word(sequence).unwrap() } else { ledger.word(sequence) };
                place.store(word, Ordering::Relaxed);
            }
            if hint.is_multiple_of(2) {
                ledger.header().hint.0.store(hint, Ordering::Relaxed);
            }
            ledger.leased(None, 5);
            ledger.renew_due(5);
            ledger.release_owner(1, 5, |sequence, _| sequence.is_multiple_of(2));
            for sequence in ledger.handed_out() {
                if let Some(run) = ledger.look_at_run(sequence) {
                    let leased = ledger.leased_run(run, 1, 9);
                    prop_assert!(!ledger.settle_run(leased, 1) && ledger.take_run(run, leased));
                    ledger.settle(ledger.lease_in(leased, sequence));
                    ledger.settle_run(leased, 1);
                }
                let seen = ledger.look(sequence);
                if ledger.take(seen, 1, 9).is_none() && ledger.begin_move(seen, 1, 9, MoveReason::Expired).is_none() {
                    ledger.settle(seen);
                }
                prop_assert!(seen.state() != State::Corrupt || ledger.look(sequence) == seen, "it stays to be seen");
            }
            prop_assert!(ledger.advance_floor() >= start);
        }

        #[test]
        fn times_are_told_from_a_day_ahead_to_two_days_ago(
            now: u64, ahead in 0..=24 * HOUR + HOUR / 2, ago in 0..=50 * HOUR,
        ) {
            let ledger = ledger(2, 0);
            let at = |due| ledger.read(0, 0, ledger.pack(0, due, 1, 1, LEASED));
            prop_assert_eq!(at(now.wrapping_add(ahead)).due_in(now), ahead);
            prop_assert!(at(now.wrapping_sub(ago)).is_due(now));
            prop_assert_eq!(at(now.wrapping_sub(ago)).due_since(now), ago);
        }

        #[test]
        fn a_ledger_is_what_its_model_says(
            runs in prop::sample::select(vec![1_u64, 2, 4]),
            // In laps of the longest window.
            start in prop_oneof![
                Just(0), 0..1000_u64, (LAPS - 2) * WINDOW..(LAPS + 2) * WINDOW,
                (WORD_BY_WORD - 3) * WINDOW..(WORD_BY_WORD + 1) * WINDOW, (1_u64 << 63) - 3 * WINDOW..1 << 63,
            ],
            now in prop_oneof![Just(1 << 28), (1_u64 << 40)..1 << 50, (1_u64 << 28) - 50..1 << 28],
            steps in prop::collection::vec((0..16_u8, any::<usize>(), 0..6_u8, 0..3_u8, 1..=24 * HOUR), 0..600),
        ) {
            let window = runs * RUN;
            let is_in_laps = (1000..1 << 60).contains(&start);
            let start = if is_in_laps { start / WINDOW * window + start % window } else { start };
            let mut pair = Pair::new(window, start, now);
            for (kind, which, operation, owner, ahead) in steps {
                pair.now += 1;
                match kind {
                    0..4 => pair.look(pair.floor + which as u64 % window),
                    // As fresh as can be, so that most swaps succeed.
                    4..7 => {
                        pair.look(pair.floor + which as u64 % 3);
                        pair.act(pair.seen.len() - 1, operation, owner, ahead);
                    }
                    7 => pair.act(which, operation, owner, ahead),
                    8 => pair.release(owner),
                    9 => pair.advance(),
                    10..13 => pair.take_run(which as u64, owner, ahead),
                    13..15 => pair.settle_run(pair.runs.len().wrapping_sub(1 + which % 3)),
                    _ => pair.settle_run(which),
                }
            }
            (pair.floor..pair.ledger.window_end(pair.floor)).for_each(|sequence| pair.look(sequence));
        }
    }
}
