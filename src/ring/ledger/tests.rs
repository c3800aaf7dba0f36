use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;

use proptest::prelude::*;

use super::role::*;
use super::run::*;
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

#[test]
fn several_owners_are_released_in_one_walk() {
    let ledger = ledger(256, 0);
    let take = |owner: u8| ledger.take(ledger.look(owner.into()), owner, 5).map(drop).unwrap();
    (0..255).for_each(take);
    let owners = Owners::from_iter([0, 63, 64, 200, 254]);
    let is_among = |owner: &u8| [0, 63, 64, 200, 254].contains(owner);
    // Each is asked about for itself.
    assert_eq!(ledger.release_owners(&owners, 5, |owner, sequence, _| (owner, sequence) == (64, 64)), 5);
    for owner in 0..255 {
        let expected = match owner {
            64 => State::Settled,
            _ if is_among(&owner) => State::Returned,
            _ => State::Leased,
        };
        assert_eq!(ledger.look(owner.into()).state(), expected, "{owner}");
    }
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
            run.sequences().start >= self.floor && run.sequences().all(|sequence| unchanged(self.expected(sequence)));
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
