//! Named publishers: a fence stops whoever slept, and the last number is what readers see.
#![cfg(loom)]

use loom::thread;
use loom_tests::*;
use shmbus::model::*;

/// Openings of the name's publishers.
const FIRST: u64 = 7;
const SECOND: u64 = 8;

fn opened(log: &ManyLog, policy: Policy, slot: u32, opening: u64, last: u64) -> ManyWriter {
    log.gate().header.begin_note(slot, opening, last);
    ManyWriter::new(log.clone(), policy, slot).expect("a checkpoint").opened_as(opening, Some(last))
}

/// What is settled about a publisher that commits nothing any more.
fn last_number(log: &ManyLog, slot: u32, opening: u64) -> u64 {
    log.gate().header.note(slot).last(opening, |position| log.owns(slot, position)).expect("its own line")
}

/// Everything in the log, as a reader finds it now: the values, and `None` for each hole.
fn contents(log: &ManyLog, arenas: &Arenas) -> Vec<Option<u64>> {
    let mut reader = ManyReader::new(log.clone(), 0, 0);
    std::iter::from_fn(|| reader.read_word(|unit| arenas.locate(unit))).collect()
}

/// The numbers of a log's messages are dense, and none of the first publisher's is behind the fence.
fn check(all: &[Option<u64>], numbers_before_fence: Option<u64>) {
    let numbers: Vec<u64> = all.iter().flatten().copied().collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "{all:?}");
    if let (Some(fence), Some(before)) = (all.iter().position(Option::is_none), numbers_before_fence) {
        assert_eq!(fence as u64, before, "{all:?}");
    }
}

/// SPEC §3.3: a publisher anywhere in publish, a fencer, and a reader; then the successor's first message.
#[test]
fn a_fence_decides_between_a_publisher_and_its_successor() {
    explore(PREEMPTIONS, || {
        let (log, arenas) = (many(4, 0), Arenas::new(2));
        let mut zombie = opened(&log, gated(4), 0, FIRST, 0);
        let records = arenas.clone();
        let publishing = thread::spawn(move || {
            for record in 0..2 {
                match records.publish(&mut zombie, record, record + 1) {
                    Ok(_) => {}
                    Err(Stop::Fenced) => return,
                    Err(stop) => panic!("{stop:?}"),
                }
            }
        });
        let (theirs, records) = (log.clone(), arenas.clone());
        let reading = thread::spawn(move || contents(&theirs, &records));
        log.fence(&gated(4), 0, FIRST).unwrap();
        let last = last_number(&log, 0, FIRST);
        let mut successor = opened(&log, gated(4), 1, SECOND, last);
        arenas.publish(&mut successor, RECORDS, last + 1).unwrap();
        publishing.join().unwrap();
        for all in [contents(&log, &arenas), reading.join().unwrap()] {
            check(&all, Some(last));
        }
    });
}

/// A publisher right before its swap, replaced and lapped meanwhile, finds out although the fence is overwritten.
#[test]
fn who_is_lapped_together_with_its_fence_is_fenced() {
    explore(PREEMPTIONS, || {
        let (log, arenas) = (many(2, 0), Arenas::new(2));
        let mut zombie = opened(&log, overwriting(2), 0, FIRST, 0);
        let theirs = log.clone();
        let records = arenas.clone();
        let fencing = thread::spawn(move || {
            theirs.fence(&overwriting(2), 0, FIRST).unwrap();
            let last = last_number(&theirs, 0, FIRST);
            let mut successor = opened(&theirs, overwriting(2), 1, SECOND, last);
            for record in [0, 1, 0] {
                records.publish(&mut successor, RECORDS + record, 100).unwrap();
            }
            last
        });
        let published = arenas.publish(&mut zombie, 0, 1);
        let last = fencing.join().unwrap();
        match published {
            Ok(_) => assert_eq!(last, 1),
            Err(stop) => assert_eq!((stop, last), (Stop::Fenced, 0)),
        }
        assert_eq!(arenas.publish(&mut zombie, 1, 2), Err(Stop::Fenced));
    });
}

/// A publisher that dies after any step of its publish, while another one laps it: whoever raises the floor decides what
/// it had committed, and is right for ever.
#[test]
fn who_dies_before_it_knows_is_remembered() {
    for steps in 0..=3 {
        explore(PREEMPTIONS, move || {
            let (log, arenas) = (many(2, 0), Arenas::new(2));
            let mut victim = opened(&log, overwriting(2), 0, FIRST, 5);
            let (theirs, records) = (log.clone(), arenas.clone());
            let lapping = thread::spawn(move || {
                let mut other = ManyWriter::new(theirs, overwriting(2), 1).expect("a checkpoint");
                for n in 0..4 {
                    records.publish(&mut other, RECORDS + n % 2, 20).unwrap();
                }
            });
            let (arena, offset) = arenas.locate(0);
            let committed = victim.publish_and_die(&arena, offset, 0, 6, steps);
            lapping.join().unwrap();
            assert_eq!(last_number(&log, 0, FIRST), if committed { 6 } else { 5 }, "died after step {steps}");
        });
    }
}
