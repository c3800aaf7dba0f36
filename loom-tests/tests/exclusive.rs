//! The exclusive log: one writer against gating readers, against readers that hold nothing back, and its death.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use loom_tests::*;
use shmbus::model::*;

/// Publishes the values of the next `count` positions, with their borrowed part.
fn publish_all(writer: &mut Writer<1>, borrowed: &Borrowed, count: u64) {
    for _ in 0..count {
        until_room(|| writer.reserve(1));
        let value = value_of(writer.next());
        borrowed.write(writer.next(), value);
        writer.publish_word(value).unwrap();
    }
}

/// Reads up to `end` through `cursor`, demanding each position's own value.
fn read_until(reader: &mut Reader<1>, cursor: u32, borrowed: &Borrowed, end: u64) {
    while reader.next() < end {
        assert_ne!(reader.poll(), Poll::Lapped, "position {} is held", reader.next());
        let value = until(|| reader.peek_word());
        assert_eq!(borrowed.read(reader.next()), value);
        assert_eq!(value, value_of(reader.next()));
        reader.recv_word(cursor);
    }
}

#[test]
fn a_gating_reader_misses_nothing() {
    explore(PREEMPTIONS, || {
        let (log, borrowed) = (exclusive(2, 1), Arc::new(Borrowed::new(2)));
        gate_at(log.gate(), 0, 0);
        let (theirs, written) = (log.clone(), borrowed.clone());
        let writing = thread::spawn(move || publish_all(&mut Writer::new(theirs, gated(2), 0, 0), &written, 5));
        read_until(&mut Reader::new(log, 0), 0, &borrowed, 5);
        writing.join().unwrap();
    });
}

/// They look a few times and do not wait: two threads that wait keep loom from ever running a third.
#[test]
fn two_readers_see_the_same_order() {
    explore(PREEMPTIONS, || {
        let (log, borrowed) = (exclusive(2, 2), Arc::new(Borrowed::new(2)));
        (gate_at(log.gate(), 0, 0), gate_at(log.gate(), 1, 0));
        let read = |log: ExclusiveLog<1>, borrowed: Arc<Borrowed>, cursor| {
            let mut reader = Reader::new(log, 0);
            for _ in 0..3 {
                let end = reader.next() + u64::from(reader.peek_word().is_some());
                read_until(&mut reader, cursor, &borrowed, end);
            }
        };
        let (theirs, written) = (log.clone(), borrowed.clone());
        let writing = thread::spawn(move || {
            let mut writer = Writer::new(theirs, gated(2), 0, 0);
            while writer.next() < 3 && writer.reserve(1).is_ok() {
                publish_all(&mut writer, &written, 1);
            }
        });
        let (theirs, seen) = (log.clone(), borrowed.clone());
        let reading = thread::spawn(move || read(theirs, seen, 0));
        read(log, borrowed, 1);
        (writing.join().unwrap(), reading.join().unwrap());
    });
}

/// A reader that leaves has finished reading, and holds nothing from then on.
#[test]
fn a_reader_that_leaves_lets_the_writer_go_on() {
    explore(PREEMPTIONS, || {
        let (log, borrowed) = (exclusive(2, 1), Arc::new(Borrowed::new(2)));
        gate_at(log.gate(), 0, 0);
        let (theirs, written) = (log.clone(), borrowed.clone());
        let writing = thread::spawn(move || publish_all(&mut Writer::new(theirs, gated(2), 0, 0), &written, 4));
        let reader = Reader::new(log.clone(), 0);
        assert_eq!(until(|| reader.peek_word()), borrowed.read(0));
        log.gate().cursors[0].vacate();
        writing.join().unwrap();
    });
}

#[test]
fn overwriting_passes_no_wrong_copy_off_as_whole() {
    explore(PREEMPTIONS_SMALL, || {
        let log = exclusive(2, 0);
        let theirs = log.clone();
        let writing = thread::spawn(move || {
            let mut writer = Writer::new(theirs, overwriting(2), 0, 0);
            (0..5).for_each(|position| assert_eq!(writer.publish_word(value_of(position)), Ok(position)));
        });
        let mut reader = Reader::new(log.clone(), 0);
        for _ in 0..3 {
            match reader.peek_word() {
                Some(copy) if still_retained(log.gate().header, reader.next()) => {
                    assert_eq!(copy, value_of(reader.next()));
                    reader.step();
                }
                Some(_) => assert!(reader.skip_to_retained()),
                None if reader.poll() == Poll::Lapped => assert!(reader.skip_to_retained()),
                None => thread::yield_now(),
            }
        }
        writing.join().unwrap();
    });
}

#[test]
fn a_batch_is_all_or_nothing() {
    explore(PREEMPTIONS_SMALL, || {
        let log = exclusive(4, 1);
        gate_at(log.gate(), 0, 0);
        let theirs = log.clone();
        let writing = thread::spawn(move || {
            let mut writer = Writer::new(theirs, gated(4), 0, 0);
            writer.publish_words(&[value_of(0), value_of(1), value_of(2)]).unwrap();
        });
        let mut reader = Reader::new(log, 0);
        if let Some(first) = reader.recv_word(0) {
            assert_eq!(first, value_of(0));
            assert_eq!((reader.recv_word(0), reader.recv_word(0)), (Some(value_of(1)), Some(value_of(2))));
        }
        writing.join().unwrap();
    });
}

#[test]
fn a_writer_that_dies_in_a_batch_leaves_nothing() {
    explore(PREEMPTIONS, || {
        let (log, borrowed) = (exclusive(2, 1), Arc::new(Borrowed::new(2)));
        gate_at(log.gate(), 0, 0);
        let (theirs, written) = (log.clone(), borrowed.clone());
        let writing = thread::spawn(move || {
            let mut dies = Writer::new(theirs.clone(), gated(2), 0, 0);
            publish_all(&mut dies, &written, 1);
            until_room(|| dies.reserve(2));
            dies.publish_words_down_to(1, &[666, 667]);
            drop(dies);
            let tail = theirs.tail().unwrap();
            assert_eq!(tail, 1);
            theirs.clear_above(tail);
            theirs.gate().header.store_checkpoint(0, Place { position: tail, sequence: tail });
            publish_all(&mut Writer::new(theirs, gated(2), 1, tail), &written, 2);
        });
        read_until(&mut Reader::new(log, 0), 0, &borrowed, 3);
        writing.join().unwrap();
    });
}

/// The coordinator looks for the tail while the writer runs.
#[test]
fn the_tail_is_never_below_what_was_seen_before() {
    explore(PREEMPTIONS_SMALL, || {
        let log = exclusive(2, 0);
        let theirs = log.clone();
        let writing = thread::spawn(move || {
            let mut writer = Writer::new(theirs, overwriting(2), 0, 0);
            (0..4).for_each(|position| assert_eq!(writer.publish_word(value_of(position)), Ok(position)));
        });
        let floor = log.gate().header.floor();
        let tail = log.tail().expect("a checkpoint");
        assert!(floor <= tail && tail <= 4, "floor {floor}, tail {tail}");
        writing.join().unwrap();
    });
}
