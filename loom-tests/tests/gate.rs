//! The gate: a reader that joins while the floor rises (I-4).
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use loom_tests::*;
use shmbus::model::*;

/// The writer raises the floor over nobody while a reader joins: from where the join says, nothing is overwritten.
#[test]
fn a_joiner_loses_nothing_from_where_it_stands() {
    explore(PREEMPTIONS, || {
        let (log, borrowed) = (exclusive(2, 1), Arc::new(Borrowed::new(2)));
        let (theirs, written) = (log.clone(), borrowed.clone());
        let writing = thread::spawn(move || {
            let mut writer = Writer::new(theirs, gated(2), 0, 0);
            for position in 0..4 {
                until_room(|| writer.reserve(1));
                written.write(position, value_of(position));
                writer.publish_word(value_of(position)).unwrap();
            }
        });
        log.gate().cursors[0].occupy(1, false);
        let mut reader = Reader::new(log.clone(), log.gate().join(0, 0));
        while reader.next() < 4 {
            assert_ne!(reader.poll(), Poll::Lapped, "position {} is held", reader.next());
            let value = until(|| reader.peek_word());
            assert_eq!((value, borrowed.read(reader.next())), (value_of(reader.next()), value));
            reader.recv_word(0);
        }
        writing.join().unwrap();
    });
}

/// Two readers, the lower of which leaves while the other joins: the second scan looks at all.
#[test]
fn a_joiner_holds_although_another_leaves() {
    explore(PREEMPTIONS, || {
        let log = exclusive(2, 2);
        gate_at(log.gate(), 0, 0);
        let theirs = log.clone();
        let writing = thread::spawn(move || {
            let mut writer = Writer::new(theirs, gated(2), 0, 0);
            for position in 0..3 {
                until_room(|| writer.publish_word(value_of(position)));
            }
        });
        log.gate().cursors[1].occupy(1, false);
        let mut reader = Reader::new(log.clone(), log.gate().join(1, 0));
        log.gate().cursors[0].vacate();
        while reader.next() < 3 {
            assert_ne!(reader.poll(), Poll::Lapped, "position {} is held", reader.next());
            let position = reader.next();
            assert_eq!(until(|| reader.recv_word(1)), value_of(position));
        }
        writing.join().unwrap();
    });
}

/// One publisher raises, the other uses what was raised, a reader joins. With one word for both, the second would take
/// an announced floor for a confirmed one.
#[test]
fn a_joiner_is_safe_from_the_publisher_that_did_not_raise() {
    explore(PREEMPTIONS, || {
        let (log, arenas) = (many(2, 1), Arenas::new(2));
        let mut first = ManyWriter::new(log.clone(), gated(2), 0).unwrap();
        for record in [0, 1] {
            arenas.publish(&mut first, record, 10 + record).unwrap();
        }
        let mut second = ManyWriter::new(log.clone(), gated(2), 1).unwrap();
        let raising = thread::spawn(move || {
            let _ = first.make_room(0, 0);
        });
        let records = arenas.clone();
        let publishing = thread::spawn(move || {
            let _ = records.publish(&mut second, RECORDS, 20);
        });
        log.gate().cursors[0].occupy(1, false);
        let position = log.gate().join(0, 0);
        let mut reader = ManyReader::new(log, position, position);
        for position in position..2 {
            assert_ne!(reader.poll(), ManyPoll::Lapped, "position {position} is held");
            assert_eq!(reader.recv_word(0, |unit| arenas.locate(unit)), Some(10 + position));
        }
        (raising.join().unwrap(), publishing.join().unwrap());
    });
}

/// The other publisher's writes come after the reads of a reader that only the raising publisher saw join and pass.
#[test]
fn a_floor_hands_on_the_view_of_the_readers() {
    explore(PREEMPTIONS, || {
        let (log, borrowed) = (exclusive(2, 1), Arc::new(Borrowed::new(2)));
        (borrowed.write(0, value_of(0)), borrowed.write(1, value_of(1)));
        let want = |slot| Want { slot, at: Place { position: 2, sequence: 2 }, count: 1, give_up_below: 0, slack: 0 };
        let theirs = log.clone();
        let raising = thread::spawn(move || {
            let _ = theirs.gate().make_room(&gated(2), want(0));
        });
        let (theirs, seen) = (log.clone(), borrowed.clone());
        let reading = thread::spawn(move || {
            theirs.gate().cursors[0].occupy(1, false);
            if theirs.gate().join(0, 0) == 0 {
                assert_eq!(seen.read(0), value_of(0));
                theirs.gate().cursors[0].advance(1, 1);
            }
        });
        if log.gate().make_room(&gated(2), want(1)).is_ok() {
            borrowed.write(2, value_of(2));
        }
        (raising.join().unwrap(), reading.join().unwrap());
    });
}

/// The place a joiner is sent to can be read at once: what is there is of this lap, or of the one before. The publisher
/// that announces it has itself published nothing, only walked over what the other did.
#[test]
fn a_joiner_is_not_sent_into_the_past() {
    explore(PREEMPTIONS_LARGE, || {
        let (log, arenas) = (many(2, 1), Arenas::new(1));
        let mut writer = ManyWriter::new(log.clone(), gated(2), 0).unwrap();
        (0..2).for_each(|position| assert_eq!(arenas.publish(&mut writer, position, value_of(position)), Ok(position)));
        let theirs = log.clone();
        let announcing = thread::spawn(move || {
            let mut announcer = ManyWriter::new(theirs, gated(2), 1).unwrap();
            let _ = announcer.make_room(0, 1);
        });
        let theirs = log.clone();
        let joining = thread::spawn(move || {
            theirs.gate().cursors[0].occupy(1, false);
            let position = theirs.gate().join(0, 0);
            let reader = ManyReader::new(theirs, position, position);
            assert_ne!(reader.poll(), ManyPoll::Lapped, "position {position} is held");
        });
        for position in 2..4 {
            let _ = arenas.publish(&mut writer, position % RECORDS, value_of(position));
        }
        (announcing.join().unwrap(), joining.join().unwrap());
    });
}
