//! Checkpoints and tenancies: small records that are replaced while they are read.
#![cfg(loom)]

use loom::thread;
use loom_tests::*;
use shmbus::model::*;

/// The place that the models store at `position`.
fn place(position: u64) -> Place {
    Place { position, sequence: position * 10 }
}

fn header() -> Shared<LogHeader> {
    Shared::heap(Box::new(LogHeader::new(0)))
}

#[test]
fn no_checkpoint_is_found_that_was_not_left() {
    explore(PREEMPTIONS_SMALL, || {
        let header = header();
        let theirs = header.clone();
        let storing = thread::spawn(move || (1..=4).for_each(|position| theirs.store_checkpoint(0, place(position))));
        let found = header.newest_checkpoint().expect("there is always one");
        assert_eq!(found, place(found.position));
        storing.join().unwrap();
    });
}

/// I-5, through the gate: the floor rises while somebody looks for the newest checkpoint.
#[test]
fn the_newest_checkpoint_is_not_below_the_floor() {
    explore(PREEMPTIONS_SMALL, || {
        let log = exclusive(2, 0);
        let theirs = log.clone();
        let raising = thread::spawn(move || {
            for position in [3, 5, 7, 9] {
                let want = Want { slot: 0, at: place(position), count: 1, give_up_below: 0, slack: 1 };
                theirs.gate().make_room(&overwriting(2), want).unwrap();
            }
        });
        let floor = log.gate().header.floor();
        let found = log.gate().header.newest_checkpoint().expect("there is always one");
        assert!(found.position >= floor, "{found:?} below {floor}");
        raising.join().unwrap();
    });
}

#[test]
fn two_publishers_checkpoints_do_not_hide_each_other() {
    explore(PREEMPTIONS, || {
        let log = exclusive(2, 0);
        let raising = [0, 1].map(|slot| {
            let theirs = log.clone();
            thread::spawn(move || {
                for position in [3 + u64::from(slot), 5 + u64::from(slot)] {
                    let want = Want { slot, at: place(position), count: 1, give_up_below: 0, slack: 1 };
                    theirs.gate().make_room(&overwriting(2), want).unwrap();
                }
            })
        });
        let floor = log.gate().header.floor();
        let found = log.gate().header.newest_checkpoint().expect("there is always one");
        assert!(found.position >= floor, "{found:?} below {floor}");
        assert_eq!(found, place(found.position));
        for thread in raising {
            thread.join().unwrap();
        }
    });
}

/// Whoever finds a topic ended finds what was stored before its end.
#[test]
fn the_end_comes_last() {
    explore(PREEMPTIONS_SMALL, || {
        let header = header();
        let theirs = header.clone();
        let ending = thread::spawn(move || {
            theirs.begin_tenancy(1, 10, 7, 70);
            theirs.end(TopicState::Removed);
        });
        if header.state() == TopicState::Removed {
            assert_eq!(header.publisher_at(1, 15), Some((7, 75)));
        }
        ending.join().unwrap();
    });
}

/// The place of a tenancy is used again while a reader asks who published in the old one.
#[test]
fn a_message_is_never_ascribed_to_another_tenancy() {
    explore(PREEMPTIONS_SMALL, || {
        let header = header();
        header.begin_tenancy(1, 10, 7, 70);
        let theirs = header.clone();
        let beginning = thread::spawn(move || theirs.begin_tenancy(1, 20, 8, 80));
        let found = header.publisher_at(1, 15);
        assert!(matches!(found, None | Some((7, 75))), "{found:?}");
        beginning.join().unwrap();
    });
}

/// Who sees where the new tenancy begins sees whose it is.
#[test]
fn a_new_tenancy_is_seen_whole() {
    explore(PREEMPTIONS_SMALL, || {
        let header = header();
        header.begin_tenancy(1, 10, 7, 70);
        let theirs = header.clone();
        let beginning = thread::spawn(move || theirs.begin_tenancy(1, 20, 8, 90));
        let found = header.publisher_at(1, 22);
        assert!(matches!(found, None | Some((7, 82) | (8, 92))), "{found:?}");
        beginning.join().unwrap();
    });
}
