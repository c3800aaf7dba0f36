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
//! Sixteen messages that lie side by side have one more word besides, see [`run`].

mod role;
mod run;
#[cfg(all(test, not(loom)))]
mod tests;
mod word;

use self::run::RunState;
use self::word::*;
use crate::shm::shared::Shared;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

pub use self::run::{RUN, Run, runs_in};
pub use self::word::{MAX_ATTEMPT, MoveReason, Seen, State};

/// Consumers of one group, at most.
pub const MAX_CONSUMERS: u32 = 255;

/// A word on a line of its own.
#[repr(C, align(128))]
struct Line(AtomicU64);

/// Some of a group's consumers, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners([u64; 4]);

impl Owners {
    /// Whether this one is among them.
    #[inline]
    pub fn contains(&self, owner: u8) -> bool {
        self.0[usize::from(owner) / 64] >> (owner % 64) & 1 == 1
    }

    /// One more.
    pub fn insert(&mut self, owner: u8) {
        self.0[usize::from(owner) / 64] |= 1 << (owner % 64);
    }
}

impl FromIterator<u8> for Owners {
    fn from_iter<I: IntoIterator<Item = u8>>(owners: I) -> Self {
        let mut all = Owners::default();
        owners.into_iter().for_each(|owner| all.insert(owner));
        all
    }
}

/// The head of a ledger segment's body. Zeroed memory plus [`LedgerHeader::format`] is a group without deliveries.
#[repr(C)]
pub struct LedgerHeader {
    /// Words below this have been handed out, or will be found by a scan.
    hint: Line,
    /// Everything below is settled.
    floor: Line,
    /// Counts what has been given back: look for it.
    returned: Line,
    /// Exclusive groups: who is at work, see [`role::Role`].
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
        self.release_owners(&Owners::from_iter([owner]), now, |_, sequence, state| committed(sequence, state))
    }

    /// The same for several owners, in one walk.
    pub fn release_owners(&self, owners: &Owners, now: u64, committed: impl Fn(u8, u64, State) -> bool) -> u64 {
        let mut released = 0;
        for sequence in self.handed_out() {
            let seen = self.look(sequence);
            let Some(owner) = seen.owner().filter(|owner| owners.contains(*owner)) else { continue };
            let swapped = match seen.state() {
                State::Leased | State::Moving(_) if committed(owner, sequence, seen.state()) => self.settle(seen),
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

#[cfg(not(loom))]
const _: () = assert!(size_of::<LedgerHeader>() == crate::shm::layout::LEDGER_WORDS_OFFSET as usize);
