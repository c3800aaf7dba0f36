//! The log for many: one total order, each message once, whoever stops or is lapped.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use loom_tests::*;
use shmbus::model::*;

/// A publisher in `slot`, whose arena has the same number, publishing `values` in records of their own.
fn publish_all(log: &ManyLog, arenas: &Arenas, slot: u32, values: &[u64]) {
    let mut writer = ManyWriter::new(log.clone(), gated(2), slot).expect("a checkpoint");
    for (record, value) in values.iter().enumerate() {
        until_room(|| arenas.publish(&mut writer, u64::from(slot) * RECORDS + record as u64, *value));
    }
}

fn receive(reader: &mut ManyReader, arenas: &Arenas) -> u64 {
    until(|| {
        assert_ne!(reader.poll(), ManyPoll::Lapped, "{:?} is held", reader.next());
        reader.recv_word(0, |unit| arenas.locate(unit))
    })
}

#[test]
fn two_publishers_share_one_order() {
    explore(PREEMPTIONS_LARGE, || {
        let (log, arenas) = (many(2, 1), Arenas::new(2));
        gate_at(log.gate(), 0, 0);
        let publishing = [(0, [10, 11].as_slice()), (1, [20].as_slice())].map(|(slot, values)| {
            let (log, arenas) = (log.clone(), arenas.clone());
            thread::spawn(move || publish_all(&log, &arenas, slot, values))
        });
        let mut reader = ManyReader::new(log, 0, 0);
        let received = [(); 3].map(|()| receive(&mut reader, &arenas));
        assert!([[10, 11, 20], [10, 20, 11], [20, 10, 11]].contains(&received), "{received:?}");
        for thread in publishing {
            thread.join().unwrap();
        }
    });
}

#[test]
fn two_readers_see_the_same_order() {
    explore(PREEMPTIONS, || {
        let (log, arenas) = (many(2, 0), Arenas::new(2));
        let publishing = [0, 1].map(|slot| {
            let (log, arenas) = (log.clone(), arenas.clone());
            thread::spawn(move || publish_all(&log, &arenas, slot, &[10 + u64::from(slot)]))
        });
        // Looks, and does not wait: two threads that wait keep loom from ever running a third.
        let read = |log: ManyLog, arenas: Arenas| {
            let mut reader = ManyReader::new(log, 0, 0);
            [(); 2].map(|()| {
                let (position, value) = reader.peek_word(|unit| arenas.locate(unit))?;
                assert_eq!(position, reader.next().position);
                reader.move_to(Place { position: position + 1, sequence: position + 1 });
                Some(value)
            })
        };
        let (theirs, seen) = (log.clone(), arenas.clone());
        let reading = thread::spawn(move || read(theirs, seen));
        let (here, there) = (read(log, arenas), reading.join().unwrap());
        for (here, there) in here.iter().zip(&there).filter(|(here, there)| here.is_some() && there.is_some()) {
            assert_eq!(here, there);
        }
        for thread in publishing {
            thread.join().unwrap();
        }
    });
}

/// A publisher that stops for ever right before its compare-and-swap was never there.
#[test]
fn who_stops_before_the_swap_delays_nobody() {
    explore(PREEMPTIONS_LARGE, || {
        let (log, arenas) = (many(2, 1), Arenas::new(2));
        gate_at(log.gate(), 0, 0);
        let (theirs, stopped) = (log.clone(), arenas.clone());
        let stopping = thread::spawn(move || {
            let mut writer = ManyWriter::new(theirs, gated(2), 0).unwrap();
            let (arena, offset) = stopped.locate(0);
            // Blocked is fine too: it has published nothing either way.
            drop(writer.stop_before_claim(&arena, offset, 0, 666));
        });
        let (theirs, others) = (log.clone(), arenas.clone());
        let publishing = thread::spawn(move || publish_all(&theirs, &others, 1, &[20, 21]));
        let mut reader = ManyReader::new(log, 0, 0);
        assert_eq!([(); 2].map(|()| receive(&mut reader, &arenas)), [20, 21]);
        (stopping.join().unwrap(), publishing.join().unwrap());
    });
}

/// I-6: stopped before its swap on a zeroed entry, and woken while others publish, also a lap later.
#[test]
fn who_was_lapped_before_the_swap_fails() {
    explore(PREEMPTIONS_SMALL, || {
        let (log, arenas) = (many(2, 1), Arenas::new(3));
        gate_at(log.gate(), 0, 0);
        let mut stopped = ManyWriter::new(log.clone(), gated(2), 0).unwrap();
        let (arena, offset) = arenas.locate(0);
        let claim = stopped.stop_before_claim(&arena, offset, 0, 10).unwrap();
        let (theirs, others) = (log.clone(), arenas.clone());
        let publishing = thread::spawn(move || {
            publish_all(&theirs, &others, 1, &[20, 21]);
            let mut writer = ManyWriter::new(theirs, gated(2), 1).unwrap();
            until_room(|| others.publish(&mut writer, 2 * RECORDS, 22));
        });
        let mut reader = ManyReader::new(log, 0, 0);
        let first = receive(&mut reader, &arenas);
        let published = stopped.claim_late(claim);
        assert!(!published, "position 0 was taken by {first}");
        assert_eq!([(); 2].map(|()| receive(&mut reader, &arenas)), [21, 22]);
        publishing.join().unwrap();
    });
}

/// Two swaps of the same entry, one of them from a stopped publisher: exactly one succeeds.
#[test]
fn an_entry_is_claimed_once() {
    explore(PREEMPTIONS_SMALL, || {
        let (log, arenas) = (many(2, 1), Arenas::new(2));
        gate_at(log.gate(), 0, 0);
        let mut stopped = ManyWriter::new(log.clone(), gated(2), 0).unwrap();
        let (arena, offset) = arenas.locate(0);
        let claim = stopped.stop_before_claim(&arena, offset, 0, 10).unwrap();
        let (theirs, others) = (log.clone(), arenas.clone());
        let publishing = thread::spawn(move || publish_all(&theirs, &others, 1, &[20]));
        let published = stopped.claim_late(claim);
        let mut reader = ManyReader::new(log, 0, 0);
        let first = receive(&mut reader, &arenas);
        assert_eq!(first, if published { 10 } else { 20 });
        if published {
            assert_eq!(receive(&mut reader, &arenas), 20);
        }
        publishing.join().unwrap();
    });
}

/// I-9: a record is written again only when its position lies below the floor.
#[test]
fn a_record_is_not_reused_while_it_is_read() {
    explore(PREEMPTIONS, || {
        let (log, arenas, borrowed) = (many(2, 1), Arenas::new(1), Arc::new(Borrowed::new(1)));
        gate_at(log.gate(), 0, 0);
        let (theirs, written, records) = (log.clone(), borrowed.clone(), arenas.clone());
        let publishing = thread::spawn(move || {
            let mut writer = ManyWriter::new(theirs, gated(2), 0).unwrap();
            for position in 0..3 {
                until_room(|| writer.make_room(position, 0));
                written.write(0, value_of(position));
                assert_eq!(records.publish(&mut writer, 0, value_of(position)), Ok(position));
            }
        });
        let mut reader = ManyReader::new(log, 0, 0);
        for position in 0..3 {
            let (_, value) = until(|| reader.peek_word(|unit| arenas.locate(unit)));
            assert_eq!(borrowed.read(0), value);
            assert_eq!((receive(&mut reader, &arenas), value), (value, value_of(position)));
        }
        publishing.join().unwrap();
    });
}

/// One publisher raises the floor, the other writes its record again on the strength of that; a reader that holds
/// nothing back is copying it.
#[test]
fn overwriting_below_anothers_floor_is_noticed() {
    explore(PREEMPTIONS, || {
        let (log, arenas) = (many(2, 0), Arenas::new(2));
        let mut reuses = ManyWriter::new(log.clone(), overwriting(2), 0).unwrap();
        assert_eq!(arenas.publish(&mut reuses, 0, value_of(0)), Ok(0));
        let (theirs, records) = (log.clone(), arenas.clone());
        let copying = thread::spawn(move || {
            let reader = ManyReader::new(theirs.clone(), 0, 0);
            let (position, copy) = reader.peek_word(|unit| records.locate(unit)).expect("published before");
            if still_retained(theirs.gate().header, 0) {
                assert_eq!((position, copy), (0, value_of(0)));
            }
        });
        let theirs = log.clone();
        let raising = thread::spawn(move || {
            let mut writer = ManyWriter::new(theirs, overwriting(2), 1).unwrap();
            writer.make_room(1, 0).unwrap();
        });
        raising.join().unwrap();
        reuses.make_room(1, 0).unwrap();
        assert_eq!(arenas.publish(&mut reuses, 0, value_of(1)), Ok(1));
        copying.join().unwrap();
    });
}

/// A publisher that slept for more than a lap finds the tail again by the checkpoints.
#[test]
fn a_publisher_that_was_lapped_goes_on() {
    explore(PREEMPTIONS, || {
        let (log, arenas) = (many(2, 0), Arenas::new(2));
        let mut slept = ManyWriter::new(log.clone(), overwriting(2), 0).unwrap();
        let (theirs, others) = (log.clone(), arenas.clone());
        let publishing = thread::spawn(move || {
            let mut writer = ManyWriter::new(theirs, overwriting(2), 1).unwrap();
            for record in [0, 1, 0, 1] {
                others.publish(&mut writer, RECORDS + record, 20).unwrap();
            }
        });
        let position = arenas.publish(&mut slept, 0, 10).unwrap();
        assert!(position <= 4);
        publishing.join().unwrap();
    });
}
