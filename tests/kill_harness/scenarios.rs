//! The operations that victims die in. A scenario is what the victim does and who lives through it; to add one, add it to
//! [`all`].

use shmbus::{Bus, Mode, Start, Topic};

use crate::checker::{Published, Readers, Survivors, TO_RECEIVE, Violation, message};
use crate::common::of_mode;
use crate::mutant;
use crate::tracer::between_markers;

/// An operation under test.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Kill at every instruction also in a short run; else wherever others could notice and at a sample of the rest.
    pub(crate) every: bool,
    /// The victim's part: set-up, then the operation in [`between_markers`].
    pub(crate) victim: fn(&Bus, u64),
    /// Who lives through it, on a bus of their own.
    pub(crate) survivors: fn(&Bus) -> Result<Box<dyn Survivors>, Violation>,
}

/// All scenarios.
pub(crate) fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(publishing());
    all.extend(receiving());
    all.push(mutant::scenario());
    all
}

/// The scenario of a name.
pub(crate) fn named(name: &str) -> Scenario {
    let known = all().into_iter().find(|scenario| scenario.name == name);
    known.unwrap_or_else(|| panic!("there is no scenario {name:?}"))
}

pub(crate) fn topic(mode: Mode) -> Topic<[u8]> {
    of_mode(mode, Topic::new("killed")).messages(64).bytes(64 << 10)
}

const SMALL: usize = 48;
const LARGE: usize = 700;

/// One message before the operation, one in it.
fn one(life: u64, len: usize) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    (vec![message(life, 0, len)], vec![message(life, 1, len)])
}

fn small(life: u64) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    one(life, SMALL)
}

fn large(life: u64) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    one(life, LARGE)
}

/// Nothing before the operation, so that the handle is as it was opened.
fn first(life: u64) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    (Vec::new(), vec![message(life, 0, SMALL)])
}

fn batch(life: u64) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let lens = [SMALL, LARGE, 16, SMALL];
    (vec![message(life, 0, SMALL)], (1..).zip(lens).map(|(number, len)| message(life, number, len)).collect())
}

/// How the operation publishes what is to be published.
fn publish(bus: &Bus, mode: Mode, published: Published, life: u64) -> ! {
    let mut publisher = bus.publisher(topic(mode)).unwrap();
    let (before, operation) = published(life);
    for message in before {
        publisher.publish(&message).unwrap();
    }
    let operation: Vec<&[u8]> = operation.iter().map(Vec::as_slice).collect();
    match operation[..] {
        [message] => between_markers(|| publisher.publish(message).unwrap()),
        _ => between_markers(|| publisher.publish_batch(operation.iter().copied()).unwrap()),
    }
}

/// A loan filled in place.
fn lend(bus: &Bus, mode: Mode, published: Published, life: u64) -> ! {
    let mut publisher = bus.publisher(topic(mode)).unwrap();
    let (before, operation) = published(life);
    for message in before {
        publisher.publish(&message).unwrap();
    }
    between_markers(|| {
        let mut loan = publisher.loan_bytes(operation[0].len()).unwrap();
        loan.copy_from_slice(&operation[0]);
        loan.publish().unwrap()
    })
}

fn readers(bus: &Bus, mode: Mode, asleep: bool, published: Published) -> Result<Box<dyn Survivors>, Violation> {
    Ok(Box::new(Readers::new(bus, topic(mode), asleep, published)?))
}

/// A publish scenario; a macro, since function pointers capture nothing.
macro_rules! publishing {
    ($name:literal, $how:ident, $mode:ident, $published:ident, every: $every:literal, asleep: $asleep:literal) => {
        Scenario {
            name: $name,
            every: $every,
            victim: |bus, life| $how(bus, Mode::$mode, $published, life),
            survivors: |bus| readers(bus, Mode::$mode, $asleep, $published),
        }
    };
}

fn publishing() -> Vec<Scenario> {
    vec![
        publishing!("publish exclusive inline", publish, Exclusive, small, every: true, asleep: false),
        publishing!("publish exclusive first", publish, Exclusive, first, every: false, asleep: false),
        publishing!("publish exclusive arena", publish, Exclusive, large, every: false, asleep: false),
        publishing!("publish exclusive batch", publish, Exclusive, batch, every: false, asleep: false),
        publishing!("publish exclusive loan", lend, Exclusive, large, every: false, asleep: false),
        publishing!("publish exclusive, reader asleep", publish, Exclusive, small, every: false, asleep: true),
        publishing!("publish many", publish, Many, small, every: false, asleep: false),
        publishing!("publish many first", publish, Many, first, every: false, asleep: false),
        publishing!("publish many batch", publish, Many, batch, every: false, asleep: false),
        publishing!("publish many loan", lend, Many, large, every: false, asleep: false),
        publishing!("publish many, reader asleep", publish, Many, small, every: false, asleep: true),
        publishing!("publish channel inline", publish, Channel, small, every: false, asleep: false),
        publishing!("publish channel arena", publish, Channel, large, every: false, asleep: false),
        publishing!("publish channel batch", publish, Channel, batch, every: false, asleep: false),
        publishing!("publish channel, reader asleep", publish, Channel, small, every: false, asleep: true),
    ]
}

/// Receives all there is; the last look, which finds nothing, stores the cursor.
fn receive(bus: &Bus, mode: Mode) -> ! {
    let mut subscriber = bus.subscriber(topic(mode)).start(Start::Latest).open().unwrap();
    between_markers(|| {
        for _ in 0..TO_RECEIVE {
            std::hint::black_box(subscriber.try_recv().unwrap().unwrap().len());
        }
        assert!(subscriber.try_recv().unwrap().is_none());
    })
}

/// Receives until the publisher that waits has got its room; it shows by one message more.
fn receive_all(bus: &Bus, mode: Mode) -> ! {
    let mut subscriber = bus.subscriber(topic(mode)).start(Start::Latest).open().unwrap();
    between_markers(|| {
        for _ in 0..TO_RECEIVE {
            std::hint::black_box(subscriber.try_recv().unwrap().unwrap().len());
        }
    })
}

macro_rules! receiving {
    ($name:literal, $how:ident, $mode:ident, every: $every:literal, waits: $waits:literal) => {
        Scenario {
            name: $name,
            every: $every,
            victim: |bus, _| $how(bus, Mode::$mode),
            survivors: |bus| Ok(Box::new(crate::checker::Writers::new(bus, topic(Mode::$mode), $waits)?)),
        }
    };
}

fn receiving() -> Vec<Scenario> {
    vec![
        receiving!("receive exclusive", receive, Exclusive, every: true, waits: false),
        receiving!("receive exclusive, publisher waits", receive_all, Exclusive, every: false, waits: true),
        receiving!("receive many", receive, Many, every: false, waits: false),
        receiving!("receive many, publisher waits", receive_all, Many, every: false, waits: true),
        receiving!("receive channel", receive, Channel, every: false, waits: false),
    ]
}
