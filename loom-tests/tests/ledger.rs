//! The ledger: one lease at a time, and who comes late changes nothing (I-13, I-14).
//!
//! Consumers 1, 2, ... ; `now` is 10, a due time of 20 lies ahead and one of 0 has come.
#![cfg(loom)]

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;
use loom_tests::*;
use shmbus::model::*;

const NOW: u64 = 10;
const AHEAD: u64 = 20;
const PAST: u64 = 0;

/// What the models count, without ordering anything.
fn counts<const N: usize>() -> Arc<[AtomicU64; N]> {
    Arc::new(std::array::from_fn(|_| AtomicU64::new(0)))
}

/// Whether a consumer may take it, as consumers decide.
fn is_free(seen: Seen) -> bool {
    match seen.state() {
        LedgerState::Fresh => true,
        LedgerState::Returned | LedgerState::Leased => seen.is_due(NOW),
        _ => false,
    }
}

/// Leases what `owner` reserves, one at a time below `tail`, then whatever a scan finds.
fn lease_all(ledger: &Ledger, owner: u8, tail: u64, leased: &[AtomicU64]) {
    loop {
        let hint = ledger.hint();
        if hint == tail {
            break;
        }
        if ledger.reserve(hint, 1) {
            lease(ledger, owner, hint, leased);
        }
    }
    ledger.handed_out().for_each(|sequence| lease(ledger, owner, sequence, leased));
}

fn lease(ledger: &Ledger, owner: u8, sequence: u64, leased: &[AtomicU64]) {
    let seen = ledger.look(sequence);
    if is_free(seen) && ledger.take(seen, owner, AHEAD).is_some() {
        assert_eq!(leased[sequence as usize].fetch_add(1, Relaxed), 0, "{sequence} was leased twice at a time");
    }
}

/// Reservations and scans meet, also on what somebody reserved who then died.
#[test]
fn each_message_is_leased_once_at_a_time() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, leased) = (ledger(4, 0), counts::<3>());
        assert!(ledger.reserve(0, 1), "the dead one's");
        let (theirs, seen) = (ledger.clone(), leased.clone());
        let leasing = thread::spawn(move || lease_all(&theirs, 2, 3, &*seen));
        lease_all(&ledger, 1, 3, &*leased);
        leasing.join().unwrap();
        assert!(leased.iter().all(|count| count.load(Relaxed) == 1), "none is forgotten");
    });
}

/// One acknowledges late, gives up, and asks for more time; another takes the overdue lease over; a third looks on.
#[test]
fn who_is_late_changes_nothing() {
    explore(PREEMPTIONS_SMALL, || {
        let ledger = ledger(2, 0);
        ledger.raise_hint(1);
        let lease = ledger.take(ledger.look(0), 1, PAST).unwrap();
        let theirs = ledger.clone();
        let late = thread::spawn(move || {
            let acknowledged = theirs.settle(lease);
            assert!(theirs.extend(lease, AHEAD).is_none());
            assert!(!theirs.give_back(lease, PAST) && !theirs.settle(lease));
            acknowledged
        });
        let theirs = ledger.clone();
        let looking = thread::spawn(move || {
            let (first, second) = (theirs.look(0), theirs.look(0));
            let settled = |seen: Seen| seen.state() == LedgerState::Settled;
            assert!(!settled(first) || settled(second), "settled is final");
            assert!(first.attempt() <= second.attempt());
        });
        let seen = ledger.look(0);
        let taken = if is_free(seen) { ledger.take(seen, 2, AHEAD) } else { None };
        if let Some(taken) = taken {
            assert_eq!(ledger.look(0), taken);
            assert!(ledger.settle(taken), "the late one changed it");
        }
        assert_ne!(late.join().unwrap(), taken.is_some(), "exactly one of both");
        looking.join().unwrap();
    });
}

/// The publisher's way to `position`, which takes the place of `position - 2`.
fn make_room(log: &ExclusiveLog<1>, position: u64) -> Result<u64, Stop> {
    let want = Want { slot: 0, at: Place { position, sequence: position }, count: 1, give_up_below: 0, slack: 0 };
    log.gate().make_room(&gated(2), want).map_err(Stop::Blocked)
}

/// The copy is made before the word is taken: a word that was taken proves it whole, whoever else settles it, moves the
/// floor and the group's cursor, and lets the publisher in. Half of the consumers lease first, half settle at once.
#[test]
fn what_was_taken_was_copied_whole() {
    explore(PREEMPTIONS_SMALL, || {
        let (log, ledger, payload) = (exclusive(2, 1), ledger(2, 0), counts::<1>());
        gate_at(log.gate(), 0, 0);
        payload[0].store(value_of(0), Relaxed);
        ledger.raise_hint(1);
        let consume = |log: ExclusiveLog<1>, ledger: Ledger, payload: Arc<[AtomicU64; 1]>, lease_first: bool| {
            let seen = ledger.look(0);
            if is_free(seen) {
                let copy = payload[0].load(Relaxed);
                let lease = if lease_first { ledger.take(seen, 1, PAST) } else { None };
                if lease.is_some() || !lease_first && ledger.settle(seen) {
                    assert_eq!(copy, value_of(0), "overwritten before it was taken");
                }
                lease.map(|lease| ledger.settle(lease));
            }
            let floor = ledger.advance_floor();
            log.gate().cursors[0].raise(floor, floor);
        };
        let consuming = [true, false].map(|lease_first| {
            let (log, ledger, payload) = (log.clone(), ledger.clone(), payload.clone());
            thread::spawn(move || consume(log, ledger, payload, lease_first))
        });
        if make_room(&log, 2).is_ok() {
            payload[0].store(value_of(2), Relaxed);
        }
        consuming.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// The same on plain memory, where the copy's read must come before the overwriting: through the word.
#[test]
fn a_copy_comes_before_its_overwriting() {
    explore(PREEMPTIONS_SMALL, || {
        let (log, ledger, borrowed) = (exclusive(2, 1), ledger(2, 0), Arc::new(Borrowed::new(2)));
        gate_at(log.gate(), 0, 0);
        borrowed.write(0, value_of(0));
        // Looked at here: loom remembers an object's last access only, and a look of the thread's own right before its swap
        // would hide the look below, so that no execution would run the swap before it.
        let (theirs, copied, seen) = (ledger.clone(), borrowed.clone(), ledger.look(0));
        let consuming = thread::spawn(move || {
            assert_eq!(copied.read(0), value_of(0));
            assert!(theirs.settle(seen));
        });
        let floor = ledger.advance_floor();
        log.gate().cursors[0].raise(floor, floor);
        if make_room(&log, 2).is_ok() {
            borrowed.write(2, value_of(2));
        }
        consuming.join().unwrap();
    });
}

/// And through the cursor that a consumer has raised, who settled what another had leased.
#[test]
fn a_copy_comes_before_its_overwriting_through_the_cursor() {
    explore(PREEMPTIONS_SMALL, || {
        let (log, ledger, borrowed) = (exclusive(2, 1), ledger(2, 0), Arc::new(Borrowed::new(2)));
        gate_at(log.gate(), 0, 0);
        borrowed.write(0, value_of(0));
        let (theirs, copied) = (log.clone(), borrowed.clone());
        let consuming = thread::spawn(move || {
            assert_eq!(copied.read(0), value_of(0));
            assert!(ledger.settle(ledger.look(0)));
            let floor = ledger.advance_floor();
            theirs.gate().cursors[0].raise(floor, floor);
        });
        if make_room(&log, 2).is_ok() {
            borrowed.write(2, value_of(2));
        }
        consuming.join().unwrap();
    });
}

/// A consumer is told a floor that another has moved further than it has looked itself; what it does with it is right.
#[test]
fn a_floor_brings_the_view_of_who_moved_it() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, borrowed) = (ledger(2, 0), Arc::new(Borrowed::new(2)));
        borrowed.write(1, value_of(1));
        assert!(ledger.settle(ledger.look(0)));
        let (theirs, copied, seen) = (ledger.clone(), borrowed.clone(), ledger.look(1));
        let consuming = thread::spawn(move || {
            assert_eq!(copied.read(1), value_of(1));
            assert!(theirs.settle(seen));
            theirs.advance_floor()
        });
        if ledger.advance_floor() == 2 {
            borrowed.write(3, value_of(3));
        }
        let floor = consuming.join().unwrap();
        assert!(ledger.floor() >= floor, "a floor only rises");
    });
}

/// Of two that raise the group's cursor the slower one moves nothing back, and neither brings back what has left.
#[test]
fn a_cursor_is_never_lowered() {
    explore(PREEMPTIONS_SMALL, || {
        let log = exclusive(2, 1);
        gate_at(log.gate(), 0, 0);
        let theirs = log.clone();
        let raising = thread::spawn(move || theirs.gate().cursors[0].raise(1, 1));
        log.gate().cursors[0].raise(2, 2);
        assert!(make_room(&log, 3).is_ok(), "lowered");
        raising.join().unwrap();
        assert!(make_room(&log, 3).is_ok(), "lowered");
    });
}

/// Copies in a model of the dead-letter topic, by publisher; a fenced publisher commits nothing any more.
struct Notes([AtomicU64; 3]);

const COPIED: u64 = 1;
const FENCED: u64 = 2;

impl Notes {
    fn new() -> Arc<Self> {
        Arc::new(Notes(std::array::from_fn(|_| AtomicU64::new(0))))
    }

    /// Publishes the copy and the note, which are one commit.
    fn publish(&self, publisher: u8) -> bool {
        let others = self.0.iter().enumerate().filter(|(other, _)| *other != usize::from(publisher));
        let before = others.filter(|(_, note)| note.load(Relaxed) == COPIED).count();
        let published = self.0[usize::from(publisher)].compare_exchange(0, COPIED, Relaxed, Relaxed).is_ok();
        assert!(!published || before == 0, "a second copy");
        published
    }

    fn fence(&self, publisher: u8) {
        let _ = self.0[usize::from(publisher)].compare_exchange(0, FENCED, Relaxed, Relaxed);
    }

    fn committed(&self, publisher: u8) -> bool {
        self.0[usize::from(publisher)].load(Relaxed) == COPIED
    }

    fn copies(&self) -> usize {
        self.0.iter().filter(|note| note.load(Relaxed) == COPIED).count()
    }
}

/// Moves a message as far as `steps` go.
fn move_on(ledger: &Ledger, seen: Seen, owner: u8, notes: &Notes, steps: u32) -> bool {
    let Some(moving) = ledger.begin_move(seen, owner, AHEAD, MoveReason::Rejected) else { return false };
    if steps > 1 && notes.publish(owner) && steps > 2 {
        ledger.settle(moving);
    }
    true
}

/// What a living consumer does with sequence 0: adopts a move that is nobody's, takes what is free and acknowledges it.
fn carry_on(ledger: &Ledger, owner: u8, notes: &Notes) -> bool {
    let seen = ledger.look(0);
    if matches!(seen.state(), LedgerState::Moving(_)) && seen.owner().is_none() {
        move_on(ledger, seen, owner, notes, 3);
    }
    is_free(seen) && ledger.take(seen, owner, AHEAD).is_some_and(|lease| ledger.settle(lease))
}

/// The mover dies after each step. The coordinator knows it is dead (`join`) and releases it, while another consumer
/// looks for moves that are nobody's.
#[test]
fn a_mover_that_dies_leaves_exactly_one_copy() {
    for steps in 0..=3 {
        explore(PREEMPTIONS_SMALL, move || {
            let (ledger, notes) = (ledger(2, 0), Notes::new());
            ledger.raise_hint(1);
            let lease = ledger.take(ledger.look(0), 1, PAST).unwrap();
            let (theirs, copies) = (ledger.clone(), notes.clone());
            let moving = thread::spawn(move || steps > 0 && move_on(&theirs, lease, 1, &copies, steps));
            let (theirs, copies) = (ledger.clone(), notes.clone());
            let carrying_on = thread::spawn(move || {
                let first = carry_on(&theirs, 2, &copies);
                first | carry_on(&theirs, 2, &copies)
            });
            let moved = moving.join().unwrap();
            ledger.release_owner(1, NOW, |_, _| notes.committed(1));
            let delivered = carrying_on.join().unwrap() | carry_on(&ledger, 2, &notes);
            assert!(!(moved && delivered), "delivered after its move had begun");
            assert_eq!((delivered, notes.copies()), (!moved, usize::from(moved)));
            assert_eq!(ledger.look(0).state(), LedgerState::Settled);
        });
    }
}

/// The mover lives, slowly: it is fenced in the dead-letter topic before it is released, and goes on all the while.
#[test]
fn a_fenced_mover_leaves_exactly_one_copy() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, notes) = (ledger(2, 0), Notes::new());
        ledger.raise_hint(1);
        let lease = ledger.take(ledger.look(0), 1, PAST).unwrap();
        let (theirs, copies) = (ledger.clone(), notes.clone());
        let moving = thread::spawn(move || move_on(&theirs, lease, 1, &copies, 3));
        let (theirs, copies) = (ledger.clone(), notes.clone());
        let carrying_on = thread::spawn(move || carry_on(&theirs, 2, &copies));
        let reclaim = || {
            ledger.set_fenced(1, true);
            notes.fence(1);
            ledger.release_owner(1, NOW, |_, _| notes.committed(1));
        };
        reclaim();
        let (moved, delivered) = (moving.join().unwrap(), carrying_on.join().unwrap());
        // What it began after the release is overdue one day, and reclaimed again.
        reclaim();
        let delivered = delivered | carry_on(&ledger, 2, &notes);
        assert_eq!((delivered, notes.copies()), (!moved, usize::from(moved)));
        assert_eq!(ledger.look(0).state(), LedgerState::Settled);
    });
}

/// Two coordinators, which is more than a restart in the middle, release the same dead consumer, while a living one
/// acknowledges its own and takes what came back.
#[test]
fn a_release_touches_only_the_dead_ones() {
    explore(PREEMPTIONS_SMALL, || {
        let ledger = ledger(2, 0);
        ledger.raise_hint(2);
        ledger.take(ledger.look(0), 1, AHEAD).unwrap();
        let own = ledger.take(ledger.look(1), 2, AHEAD).unwrap();
        let releasing = [(); 2].map(|()| {
            let theirs = ledger.clone();
            thread::spawn(move || theirs.release_owner(1, NOW, |_, _| false))
        });
        let returned = ledger.look(0);
        let taken = if is_free(returned) { ledger.take(returned, 2, AHEAD) } else { None };
        assert!(ledger.settle(own), "a living consumer's lease");
        if let Some(taken) = taken {
            assert!(taken.attempt() == 2 && ledger.settle(taken), "what came back was taken again");
        }
        assert_eq!(releasing.map(|thread| thread.join().unwrap()).iter().sum::<u64>(), 1);
        let state = if taken.is_some() { LedgerState::Settled } else { LedgerState::Returned };
        assert_eq!((ledger.look(0).state(), ledger.look(1).state()), (state, LedgerState::Settled));
    });
}

/// I-14, on a ledger of two words that are used a second time: whoever sees the floor sees all below it done.
#[test]
fn the_floor_is_never_above_what_is_unsettled() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, done) = (ledger(2, 1), counts::<4>());
        ledger.raise_hint(4);
        let consume = |ledger: Ledger, done: Arc<[AtomicU64; 4]>, owner: u8| {
            for sequence in 1..4 {
                if sequence >= ledger.floor() + 2 {
                    break;
                }
                let seen = ledger.look(sequence);
                assert_ne!(seen.state(), LedgerState::Corrupt, "at most reused");
                if is_free(seen)
                    && ledger.take(seen, owner, AHEAD).is_some_and(|lease| {
                        done[sequence as usize].store(1, Relaxed);
                        ledger.settle(lease)
                    })
                {
                    ledger.advance_floor();
                }
            }
        };
        let consuming = [1, 2].map(|owner| {
            let (ledger, done) = (ledger.clone(), done.clone());
            thread::spawn(move || consume(ledger, done, owner))
        });
        let mut before = 0;
        for _ in 0..2 {
            let floor = ledger.floor();
            assert!(before <= floor, "a floor only rises");
            before = floor;
            assert!((1..floor).all(|below| done[below as usize].load(Relaxed) == 1), "{floor} is above a message");
        }
        consuming.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// A count of returns that has changed promises a word to be found.
#[test]
fn what_was_counted_as_returned_is_found() {
    explore(PREEMPTIONS_SMALL, || {
        let ledger = ledger(2, 0);
        ledger.raise_hint(1);
        let lease = ledger.take(ledger.look(0), 1, AHEAD).unwrap();
        let theirs = ledger.clone();
        let returning = thread::spawn(move || assert!(theirs.give_back(lease, PAST)));
        if ledger.returned() == 1 {
            assert_eq!(ledger.look(0).state(), LedgerState::Returned);
        }
        returning.join().unwrap();
    });
}

/// Whoever sees a word taken finds it among those that were handed out, also from behind a floor that has moved.
#[test]
fn what_was_taken_lies_below_the_hint() {
    explore(PREEMPTIONS_SMALL, || {
        let ledger = ledger(2, 0);
        let theirs = ledger.clone();
        let taking = thread::spawn(move || {
            (assert!(theirs.reserve(0, 1)), assert!(theirs.settle(theirs.look(0))));
            theirs.advance_floor();
            (assert!(theirs.reserve(1, 1)), theirs.take(theirs.look(1), 1, AHEAD).unwrap());
        });
        if ledger.look(1).owner() == Some(1) {
            assert_eq!(ledger.handed_out(), 1..2);
        }
        let floor = ledger.floor();
        assert!(ledger.hint() >= floor);
        taking.join().unwrap();
    });
}

/// Puts `owner` to work if nobody is, or the one at work is overdue.
fn stand_by(ledger: &Ledger, owner: u8) -> bool {
    let role = ledger.role();
    role.due_in(NOW) == 0 && ledger.take_role(role, owner, AHEAD)
}

/// One consumer at work; two that stand by for an overdue one, which leaves, do not supersede each other.
#[test]
fn an_exclusive_group_has_one_consumer_at_work() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, working) = (ledger(2, 0), counts::<1>());
        assert!(ledger.take_role(ledger.role(), 0, PAST));
        let theirs = ledger.clone();
        let leaving = thread::spawn(move || theirs.leave_role(0));
        let work = |ledger: Ledger, working: Arc<[AtomicU64; 1]>, owner: u8| {
            if stand_by(&ledger, owner) {
                assert_eq!(working[0].fetch_add(1, Relaxed), 0, "two at work");
                assert!(ledger.keep_role(owner, AHEAD) && ledger.active() == Some(owner));
                working[0].fetch_sub(1, Relaxed);
                assert!(ledger.leave_role(owner));
            }
        };
        let (theirs, seen) = (ledger.clone(), working.clone());
        let standing_by = thread::spawn(move || work(theirs, seen, 1));
        work(ledger, working, 2);
        let _ = (leaving.join().unwrap(), standing_by.join().unwrap());
    });
}

/// A ledger with runs (of two), on which the first of them has been handed out.
fn with_runs() -> Ledger {
    let ledger = ledger(8, 0);
    ledger.raise_hint(RUN);
    ledger
}

/// Takes the first run as a whole; counts what is leased.
fn lease_run(ledger: &Ledger, owner: u8, due: u64, leased: &[AtomicU64]) -> Option<Run> {
    let run = ledger.look_at_run(0)?;
    let taken = ledger.leased_run(run, owner, due);
    if !ledger.take_run(run, taken) {
        return None;
    }
    for sequence in run.sequences() {
        assert_eq!(leased[sequence as usize].fetch_add(1, Relaxed), 0, "{sequence} was leased twice at a time");
    }
    Some(taken)
}

/// Two take the run as a whole, or else one by one; a third takes one message alone.
#[test]
fn a_run_is_leased_once_at_a_time() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, leased) = (with_runs(), counts::<2>());
        let take = |ledger: Ledger, leased: Arc<[AtomicU64; 2]>, owner: u8| {
            if lease_run(&ledger, owner, AHEAD, &*leased).is_none() {
                (0..RUN).for_each(|sequence| lease(&ledger, owner, sequence, &*leased));
            }
        };
        let (theirs, seen) = (ledger.clone(), leased.clone());
        let taking = thread::spawn(move || take(theirs, seen, 1));
        let (theirs, seen) = (ledger.clone(), leased.clone());
        let alone = thread::spawn(move || lease(&theirs, 2, 1, &*seen));
        take(ledger, leased.clone(), 3);
        (taking.join().unwrap(), alone.join().unwrap());
        assert!(leased.iter().all(|count| count.load(Relaxed) == 1), "none is forgotten");
    });
}

/// The run's lease is overdue: its owner acknowledges all of it late, or what is left one by one; another takes one message
/// over; a third looks on.
#[test]
fn who_is_late_with_a_run_changes_nothing_of_what_is_anothers() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, leased) = (with_runs(), counts::<2>());
        let run = lease_run(&ledger, 1, PAST, &*leased).unwrap();
        let theirs = ledger.clone();
        let late = thread::spawn(move || {
            if theirs.settle_run(run, 1) {
                return [true; 2];
            }
            [0, 1].map(|sequence| theirs.settle(theirs.lease_in(run, sequence)))
        });
        let theirs = ledger.clone();
        let looking = thread::spawn(move || {
            let (first, second) = (theirs.look(0), theirs.look(0));
            assert!(first.state() != LedgerState::Settled || second.state() == LedgerState::Settled);
            assert!(first.attempt() <= second.attempt() && first.state() != LedgerState::Fresh);
        });
        let seen = ledger.look(0);
        let taken = if is_free(seen) { ledger.take(seen, 2, AHEAD) } else { None };
        if let Some(taken) = taken {
            assert_eq!((taken.attempt(), ledger.look(0)), (2, taken));
            assert!(ledger.settle(taken), "the late one changed it");
        }
        let acknowledged = late.join().unwrap();
        assert_eq!(acknowledged, [taken.is_none(), true], "exactly one of both");
        looking.join().unwrap();
        assert_eq!(ledger.advance_floor(), RUN);
    });
}

/// The owner of a run is proven dead; a living consumer takes what comes back, each message once.
#[test]
fn a_dead_ones_run_comes_back() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, leased) = (with_runs(), counts::<2>());
        let run = lease_run(&ledger, 1, AHEAD, &*leased).unwrap();
        assert!(ledger.settle(ledger.lease_in(run, 1)), "it had acknowledged one");
        let theirs = ledger.clone();
        let releasing = thread::spawn(move || theirs.release_owner(1, NOW, |_, _| false));
        let take = || {
            let seen = ledger.look(0);
            is_free(seen) && ledger.take(seen, 2, AHEAD).is_some()
        };
        let early = take();
        assert_eq!(releasing.join().unwrap(), 1);
        assert_ne!(early, take(), "it is taken once");
        assert_eq!((ledger.look(0).attempt(), ledger.look(1).state()), (2, LedgerState::Settled));
    });
}

/// One goes on for laps, by the run where it can; another wants a message of the first lap, slowly: whatever it has seen by
/// then, it takes that message or none.
#[test]
fn who_is_laps_behind_takes_nothing_of_later_ones() {
    explore(PREEMPTIONS_SMALL, || {
        let (ledger, leased) = (ledger(RUN, 0), counts::<6>());
        ledger.raise_hint(RUN);
        let finish = |ledger: &Ledger, owner: u8, leased: &[AtomicU64; 6]| {
            for first in (0..3 * RUN).step_by(RUN as usize) {
                if ledger.advance_floor() < first {
                    return;
                }
                ledger.raise_hint(first + RUN);
                let taken = ledger.look_at_run(first).map(|run| (run, ledger.leased_run(run, owner, AHEAD)));
                if let Some((run, taken)) = taken.filter(|(run, taken)| ledger.take_run(*run, *taken)) {
                    run.sequences().for_each(|sequence| {
                        assert_eq!(leased[sequence as usize].fetch_add(1, Relaxed), 0, "{sequence} twice");
                    });
                    assert!(ledger.settle_run(taken, owner), "nobody takes over what is not overdue");
                    continue;
                }
                (first..first + RUN).for_each(|sequence| settle_alone(ledger, owner, sequence, leased));
            }
        };
        let (theirs, seen) = (ledger.clone(), leased.clone());
        let behind = thread::spawn(move || settle_alone(&theirs, 2, 1, &seen));
        finish(&ledger, 1, &leased);
        behind.join().unwrap();
        finish(&ledger, 1, &leased);
        assert_eq!(ledger.advance_floor(), 3 * RUN);
        assert!(leased.iter().all(|count| count.load(Relaxed) == 1), "each once");
    });
}

fn settle_alone(ledger: &Ledger, owner: u8, sequence: u64, leased: &[AtomicU64; 6]) {
    let seen = ledger.look(sequence);
    assert_ne!(seen.state(), LedgerState::Corrupt, "at most reused");
    if is_free(seen)
        && let Some(lease) = ledger.take(seen, owner, AHEAD)
    {
        assert_eq!(leased[sequence as usize].fetch_add(1, Relaxed), 0, "{sequence} twice");
        assert!(ledger.settle(lease));
    }
}

/// As for one message, a copy is made before the run is settled, and so before the floor lets a publisher in.
#[test]
fn copies_come_before_the_overwriting_of_their_run() {
    for one_by_one in [false, true] {
        explore(PREEMPTIONS_SMALL, move || {
            let (ledger, borrowed) = (with_runs(), Arc::new(Borrowed::new(2)));
            (borrowed.write(0, value_of(0)), borrowed.write(1, value_of(1)));
            let run = ledger.look_at_run(0).unwrap();
            let (theirs, copied) = (ledger.clone(), borrowed.clone());
            let consuming = thread::spawn(move || {
                (0..RUN).for_each(|at| assert_eq!(copied.read(at), value_of(at)));
                let taken = theirs.leased_run(run, 1, AHEAD);
                assert!(theirs.take_run(run, taken));
                if one_by_one {
                    (0..RUN).for_each(|at| assert!(theirs.settle(theirs.lease_in(taken, at))));
                } else {
                    assert!(theirs.settle_run(taken, 1));
                }
            });
            let floor = ledger.advance_floor();
            (0..floor).for_each(|at| borrowed.write(at, value_of(at + RUN)));
            consuming.join().unwrap();
        });
    }
}

/// A consumer that is at work, and late, takes message 1; a standby takes the role. What the late one hands to its program
/// was leased while it was at work, and ends with its role; what it leases later it gives back unseen.
fn a_role_passes_on(until: u64) {
    explore(PREEMPTIONS_SMALL, move || {
        let ledger = ledger(2, 0);
        ledger.raise_hint(2);
        assert!(ledger.take_role(ledger.role(), 1, PAST));
        let theirs = ledger.clone();
        let late = thread::spawn(move || {
            let lease = theirs.take(theirs.look(1), 1, until).unwrap();
            let in_time = theirs.keep_role(1, until);
            if !in_time {
                theirs.give_back_unseen(lease, NOW);
            }
            in_time
        });
        let took_over = stand_by(&ledger, 2);
        if took_over {
            ledger.end_other_leases(2, NOW);
        }
        let in_time = late.join().unwrap();
        let seen = ledger.look(1);
        assert!(in_time || took_over, "nobody has taken its role");
        assert!(!took_over || seen.state() == LedgerState::Returned, "its program has what its successor goes past");
        assert!(took_over || seen.owner() == Some(1));
        // Where both renewed and took the role, the standby saw it before: it is never taken from who renewed it.
        assert!(!(in_time && took_over && until == AHEAD), "two at work");
    });
}

#[test]
fn what_a_late_one_leases_ends_with_its_role() {
    a_role_passes_on(PAST);
}

#[test]
fn a_role_that_was_renewed_is_not_taken() {
    a_role_passes_on(AHEAD);
}
