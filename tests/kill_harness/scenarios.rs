//! The operations that victims die in. A scenario is what the victim does and who lives through it; to add one, add it to
//! [`all`].

use shmbus::{Bus, Full, Mode, RecvError, Start, Topic};

use crate::checker::{Messages, Published, Readers, Survivors, TO_RECEIVE, Violation, Writers, message};
use crate::common::of_mode;
use crate::tracer::between_markers;
use crate::{consumers, joining, mutant, named as numbered, requests, sleepers};

/// An operation under test.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// A short run kills wherever others could notice; of the other instructions it takes one in so many.
    pub(crate) stride: usize,
    /// What a long run covers.
    pub(crate) grain: Grain,
    /// The victim's part: set-up, then the operation in [`between_markers`].
    pub(crate) victim: fn(&Bus, u64),
    /// Who lives through it, on a bus of their own.
    pub(crate) survivors: fn(&Bus) -> Result<Box<dyn Survivors>, Violation>,
}

/// Before what a long run kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Each instruction.
    Instruction,
    /// Each that reads or writes shared memory or enters the kernel: the operation is too long for more.
    Access,
    /// As in a short run, until the planted fault is found.
    Fault,
}

/// All scenarios.
pub(crate) fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(publishing());
    all.extend(stopping());
    all.extend(receiving());
    all.extend(numbered::all());
    all.extend(dropping());
    all.extend(sleepers::all());
    all.extend(joining::all());
    all.extend(requests::all());
    all.extend(consumers::all());
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
/// Does not fit into a slot.
const LARGE: usize = 150;

/// One message before the operation, one in it.
fn one(life: u64, len: usize) -> Messages {
    (vec![message(life, 0, len)], vec![message(life, 1, len)])
}

fn small(life: u64) -> Messages {
    one(life, SMALL)
}

fn large(life: u64) -> Messages {
    one(life, LARGE)
}

/// Nothing before the operation, so that the handle is as it was opened.
fn first(life: u64) -> Messages {
    (Vec::new(), vec![message(life, 0, SMALL)])
}

fn batch(life: u64) -> Messages {
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

/// A message with its envelope, and a number under a name.
fn publish_named(bus: &Bus, published: Published, life: u64) -> ! {
    let mut publisher = bus.publisher_as(topic(Mode::Many), "name").unwrap();
    let (before, operation) = published(life);
    for message in before {
        publisher.publish(&message).unwrap();
    }
    let number = publisher.last_number().unwrap() + 1;
    between_markers(|| publisher.publish_numbered(&operation[0], number).unwrap())
}

/// Its topic has envelopes.
fn publish_keyed(bus: &Bus, mode: Mode, published: Published, life: u64) -> ! {
    let mut publisher = bus.publisher(topic(mode).envelope()).unwrap();
    let (before, operation) = published(life);
    for message in before {
        publisher.publish(&message).unwrap();
    }
    let envelope = shmbus::Envelope::new().key(b"key").header("name", b"value");
    between_markers(|| publisher.publish_with(&operation[0], &envelope).unwrap())
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
    ($name:literal, $how:ident, $mode:ident, $published:ident, stride: $stride:literal, asleep: $asleep:literal) => {
        Scenario {
            name: $name,
            stride: $stride,
            grain: Grain::Instruction,
            victim: |bus, life| $how(bus, Mode::$mode, $published, life),
            survivors: |bus| readers(bus, Mode::$mode, $asleep, $published),
        }
    };
}

macro_rules! publishing_enveloped {
    ($name:literal, $mode:ident) => {
        Scenario {
            name: $name,
            stride: 800,
            grain: Grain::Instruction,
            victim: |bus, life| publish_keyed(bus, Mode::$mode, small, life),
            survivors: |bus| Ok(Box::new(Readers::new(bus, topic(Mode::$mode).envelope(), false, small)?)),
        }
    };
}

fn publishing() -> Vec<Scenario> {
    vec![
        publishing!("publish exclusive inline", publish, Exclusive, small, stride: 10, asleep: false),
        publishing!("publish exclusive first", publish, Exclusive, first, stride: 400, asleep: false),
        publishing!("publish exclusive arena", publish, Exclusive, large, stride: 400, asleep: false),
        publishing!("publish exclusive batch", publish, Exclusive, batch, stride: 2048, asleep: false),
        publishing!("publish exclusive loan", lend, Exclusive, large, stride: 400, asleep: false),
        publishing!("publish exclusive, reader asleep", publish, Exclusive, small, stride: 400, asleep: true),
        publishing!("publish many", publish, Many, small, stride: 400, asleep: false),
        publishing!("publish many first", publish, Many, first, stride: 400, asleep: false),
        publishing!("publish many batch", publish, Many, batch, stride: 2048, asleep: false),
        publishing!("publish many loan", lend, Many, large, stride: 400, asleep: false),
        publishing!("publish many, reader asleep", publish, Many, small, stride: 400, asleep: true),
        Scenario {
            name: "publish many under a name",
            stride: 400,
            grain: Grain::Instruction,
            victim: |bus, life| publish_named(bus, small, life),
            survivors: |bus| readers(bus, Mode::Many, false, small),
        },
        publishing_enveloped!("publish exclusive, keyed", Exclusive),
        publishing_enveloped!("publish many, keyed", Many),
        publishing!("publish channel inline", publish, Channel, small, stride: 400, asleep: false),
        publishing!("publish channel arena", publish, Channel, large, stride: 400, asleep: false),
        publishing!("publish channel batch", publish, Channel, batch, stride: 2048, asleep: false),
        publishing!("publish channel, reader asleep", publish, Channel, small, stride: 400, asleep: true),
    ]
}

/// Publishers that stand in their operation for a while before they die.
fn stopping() -> Vec<Scenario> {
    macro_rules! stopping {
        ($name:literal, $victim:expr, $topic:expr, $published:ident) => {
            Scenario {
                name: $name,
                stride: 400,
                grain: Grain::Instruction,
                victim: $victim,
                survivors: |bus| Ok(Box::new(Readers::of_the_stopped(bus, $topic, $published)?)),
            }
        };
    }
    vec![
        stopping!("stop many", |bus, life| publish(bus, Mode::Many, small, life), topic(Mode::Many), small),
        stopping!("stop many arena", |bus, life| publish(bus, Mode::Many, large, life), topic(Mode::Many), large),
        stopping!("stop many batch", |bus, life| publish(bus, Mode::Many, batch, life), topic(Mode::Many), batch),
        stopping!("stop many under a name", |bus, life| publish_named(bus, small, life), topic(Mode::Many), small),
        stopping!(
            "stop many, keyed",
            |bus, life| publish_keyed(bus, Mode::Many, small, life),
            topic(Mode::Many).envelope(),
            small
        ),
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
    ($name:literal, $how:ident, $mode:ident, stride: $stride:literal, waits: $waits:literal) => {
        Scenario {
            name: $name,
            stride: $stride,
            grain: Grain::Instruction,
            victim: |bus, _| $how(bus, Mode::$mode),
            survivors: |bus| Ok(Box::new(Writers::new(bus, topic(Mode::$mode), $waits)?)),
        }
    };
}

fn receiving() -> Vec<Scenario> {
    vec![
        receiving!("receive exclusive", receive, Exclusive, stride: 40, waits: false),
        receiving!("receive exclusive, publisher waits", receive_all, Exclusive, stride: 400, waits: true),
        receiving!("receive many", receive, Many, stride: 400, waits: false),
        receiving!("receive many, publisher waits", receive_all, Many, stride: 400, waits: true),
        receiving!("receive channel", receive, Channel, stride: 400, waits: false),
    ]
}

/// Receives what a reader finds that does not hold the ring: first what it has lost.
fn receive_late(bus: &Bus, topic: Topic<[u8]>, droppable: bool) -> ! {
    let subscriber = bus.subscriber(topic).start(Start::Latest);
    let mut subscriber = if droppable { subscriber.droppable() } else { subscriber }.open().unwrap();
    between_markers(|| {
        match subscriber.try_recv() {
            Err(RecvError::Lagged { .. }) => {}
            other => panic!("expected a loss, found {other:?}"),
        }
        for _ in 0..TO_RECEIVE {
            std::hint::black_box(subscriber.try_recv().unwrap().unwrap().len());
        }
    })
}

fn overwritten(mode: Mode) -> Topic<[u8]> {
    topic(mode).full(Full::Overwrite)
}

fn dropping() -> Vec<Scenario> {
    macro_rules! dropping {
        ($name:literal, $topic:expr, $droppable:literal) => {
            Scenario {
                name: $name,
                stride: 4000,
                grain: Grain::Instruction,
                victim: |bus, _| receive_late(bus, $topic, $droppable),
                survivors: |bus| Ok(Box::new(Writers::for_the_late(bus, $topic)?)),
            }
        };
    }
    vec![
        dropping!("receive exclusive, droppable", topic(Mode::Exclusive), true),
        dropping!("receive many, droppable", topic(Mode::Many), true),
        dropping!("receive exclusive, overwritten", overwritten(Mode::Exclusive), false),
        dropping!("receive many, overwritten", overwritten(Mode::Many), false),
    ]
}
