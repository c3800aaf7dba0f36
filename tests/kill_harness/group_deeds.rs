//! What a coordinator does for groups, pipelines and named publishers, and dies over.

use std::time::{Duration, Instant};

use shmbus::{Bus, Consumer, GroupOptions, OpenError, PublishError, Refusal, Start, Topic, Wait};

use crate::checker::{Violation, subscriber};
use crate::common::{Process, Scene, hear, say};
use crate::consumers::change_word;
use crate::coordinator::{DEADLINE, Deed, go_on, subject_of_many};
use crate::mutant::mapping_of;

const GROUP: &str = "group";
const NAME: &str = "name";

/// Messages that the group finds.
const MESSAGES: u64 = 3;

/// Messages that the owner of a name has committed.
const COMMITTED: u64 = 2;

/// How long a survivor waits for a message before it looks whether all is done.
const LOOK: Duration = Duration::from_millis(5);

/// What an idle consumer's lease comes to, before it is asked for.
const LATE: Duration = Duration::from_millis(30);

pub(crate) fn all() -> Vec<Deed> {
    vec![
        Deed { name: "group: create", prepare: |_, bus| prepare(bus, None), act: create },
        Deed { name: "group: open a consumer", prepare: |_, bus| prepare(bus, Some(lasting())), act: open },
        Deed {
            name: "group: close a consumer",
            prepare: |scene, bus| start(scene, bus, "close", lasting()),
            act: close,
        },
        Deed { name: "group: bury a consumer", prepare: |scene, bus| start(scene, bus, "bury", lasting()), act: bury },
        Deed { name: "group: reclaim", prepare: |scene, bus| start(scene, bus, "pipe", late()), act: reclaim },
        Deed { name: "group: rewind", prepare: |scene, bus| start(scene, bus, "fenced", lasting()), act: rewind },
        Deed { name: "group: remove", prepare: |scene, bus| start(scene, bus, "fenced", lasting()), act: remove },
        Deed {
            name: "bury a name before its swap",
            prepare: |scene, bus| start(scene, bus, "unswapped", lasting()),
            act: bury_name,
        },
        Deed {
            name: "bury a name after its swap",
            prepare: |scene, bus| start(scene, bus, "swapped", lasting()),
            act: bury_name,
        },
        Deed { name: "group: take a name", prepare: |scene, bus| start(scene, bus, "name", lasting()), act: take_name },
    ]
}

/// Where dead letters and outputs go.
pub(crate) fn results() -> Topic<[u8]> {
    Topic::new("subject.results").hold().envelope().messages(64).bytes(64 << 10)
}

fn lasting() -> GroupOptions {
    GroupOptions::new().lease(Duration::from_secs(3600)).dead_letter(results().name())
}

fn late() -> GroupOptions {
    // A pipeline's output cannot take its dead letters, too.
    GroupOptions::new().effectively_once().lease(LATE)
}

fn text<E: std::fmt::Display>(error: E) -> Violation {
    format!("the client's request failed: {error}")
}

fn payload(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(5)
}

fn prepare(bus: &Bus, options: Option<GroupOptions>) -> Result<Option<Process>, Violation> {
    let topic = subject_of_many().hold();
    bus.create(&topic).map_err(text)?;
    bus.create(&results()).map_err(text)?;
    if let Some(options) = options {
        bus.create_group(topic.name(), GROUP, &options, Start::Oldest, false).map_err(text)?;
    }
    let mut publisher = bus.publisher(topic).map_err(text)?;
    (0..MESSAGES).try_for_each(|number| publisher.publish(&payload(number)).map(drop)).map_err(text)?;
    Ok(None)
}

fn start(scene: &Scene, bus: &Bus, role: &str, options: GroupOptions) -> Result<Option<Process>, Violation> {
    prepare(bus, Some(options))?;
    let mut process = scene.start("member", &format!("{role} -"));
    process.expect("ready");
    Ok(Some(process))
}

/// Role: a consumer, pipeline or named publisher that does its part, and the rest when it is told.
pub(crate) fn member(bus: &Bus, role: &str) {
    let topic = subject_of_many();
    match role {
        "name" => {
            let mut publisher = bus.publisher_as(topic, NAME).unwrap();
            publisher.publish(&payload(MESSAGES)).unwrap();
            say("ready");
            hear();
            assert_eq!(publisher.publish(b"late"), Err(PublishError::Fenced));
        }
        "swapped" | "unswapped" => {
            let mut publisher = bus.publisher_as(topic, NAME).unwrap();
            (0..COMMITTED).for_each(|_| assert!(publisher.publish(&payload(MESSAGES)).is_ok()));
            leave_undecided(role == "swapped");
            say("ready");
            hear();
        }
        "pipe" => {
            let mut pipeline = bus.pipeline(topic, GROUP, results()).open().unwrap();
            let step = pipeline.step(|input, outputs| {
                say("ready");
                hear();
                outputs.push(input);
                Ok(())
            });
            assert!(step.is_err(), "a reclaimed consumer has made an output");
        }
        _ => {
            let mut consumer = bus.consumer(topic, GROUP).existing().open().unwrap();
            let lease = consumer.try_recv().unwrap().unwrap().keep();
            assert_eq!(lease.sequence().get(), 0);
            if role == "bury" {
                half_move(&mut consumer);
            }
            say("ready");
            hear();
            if role == "fenced" {
                assert!(consumer.ack(&lease).is_err() && consumer.try_recv().is_err());
            }
            drop(consumer);
        }
    }
    say("done");
    hear();
}

/// The line of the only publisher with a name is left as it is while a message is on its way: its last one, or the next.
fn leave_undecided(is_swapped: bool) {
    // Page of header, the log's own up to its notes: note, number, base (ARCHITECTURE.md §3.2).
    let lines = (mapping_of(":log (deleted)") + 4096 + 12_800) as *mut [u64; 8];
    for slot in 0..64 {
        // SAFETY: a line of the mapping, aligned, which lives as long as the publisher.
        let line = unsafe { lines.add(slot) };
        // SAFETY: as above; nobody else writes it while its owner rests.
        let [note, number, base, ..] = unsafe { line.read_volatile() };
        if (note & 0b11, number) != (2, COMMITTED) {
            continue;
        }
        let position = note >> 2;
        let (position, number, base) =
            if is_swapped { (position, number, number - 1) } else { (position + 1, number + 1, number.max(base)) };
        for (at, word) in [position << 2 | 1, number, base].into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { line.cast::<u64>().add(at).write_volatile(word) };
        }
        return;
    }
    panic!("no publisher has a name");
}

/// Message 1 is published as a dead letter and not settled, as if its consumer had died in between.
fn half_move(consumer: &mut Consumer<[u8]>) {
    let message = consumer.try_recv().unwrap().unwrap();
    let sequence = message.sequence().get();
    message.reject("bad").unwrap();
    // Settled, and again on its way: rejected.
    change_word(sequence, |word| word & !0b111 | 5);
}

/// What a new consumer of the group is given until all is settled: sequence and attempt.
fn drain(bus: &Bus) -> Result<Vec<(u64, u32)>, Violation> {
    let mut consumer = bus.consumer(subject_of_many(), GROUP).existing().open().map_err(text)?;
    let (mut found, end) = (Vec::new(), Instant::now() + DEADLINE);
    while consumer.floor().get() < MESSAGES {
        let floor = consumer.floor();
        match consumer.recv_timeout(LOOK) {
            Ok(message) if message[..] == payload(message.sequence().get()) => {
                found.push((message.sequence().get(), message.attempt()));
                message.ack().map_err(text)?;
            }
            Ok(message) => return Err(format!("sequence {} is garbled", message.sequence())),
            Err(shmbus::RecvError::TimedOut) if Instant::now() < end => {}
            Err(error) => return Err(format!("given {found:?}, the floor is {floor}: {error}")),
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn expect<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Result<(), Violation> {
    if found == expected { Ok(()) } else { Err(format!("found {found:?}, expected {expected:?}")) }
}

/// The payloads of all letters or outputs.
fn read_results(bus: &Bus) -> Result<Vec<Vec<u8>>, Violation> {
    let mut reader = subscriber(bus, &results(), Start::Oldest, Wait::Adaptive)?;
    let mut found = Vec::new();
    while let Some(result) = reader.try_recv().map_err(text)? {
        found.push(result.to_vec());
    }
    found.sort_unstable();
    Ok(found)
}

fn create(bus: &Bus, _: Option<Process>) -> Result<(), Violation> {
    bus.create_group(subject_of_many().name(), GROUP, &lasting(), Start::Oldest, true).map_err(text)?;
    expect(drain(bus)?, vec![(0, 1), (1, 1), (2, 1)])?;
    let groups = bus.topic(subject_of_many().name()).map_err(text)?.groups;
    expect(groups.len(), 1)
}

fn open(bus: &Bus, _: Option<Process>) -> Result<(), Violation> {
    let consumer = bus.consumer(subject_of_many(), GROUP).existing().open().map_err(text)?;
    drop(consumer);
    expect(drain(bus)?, vec![(0, 1), (1, 1), (2, 1)])
}

/// What it held comes again.
fn close(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    go_on(bus, process)?;
    expect(drain(bus)?, vec![(0, 2), (1, 1), (2, 1)])
}

/// What it held comes again, what it moved does not: there is one letter of it.
fn bury(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    process.ok_or("no process")?.kill();
    expect(drain(bus)?, vec![(0, 2), (2, 1)])?;
    expect(read_results(bus)?, vec![payload(1)])
}

/// Another pipeline takes over from one that sleeps over an input, and each input has one output.
fn reclaim(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    let mut pipeline = bus.pipeline(subject_of_many(), GROUP, results()).open().map_err(text)?;
    let end = Instant::now() + DEADLINE;
    while pipeline.consumer().floor().get() < MESSAGES {
        let step = pipeline.step_timeout(LOOK, |input, outputs| {
            outputs.push(input);
            Ok(())
        });
        step.map_err(text)?;
        if Instant::now() > end {
            return Err(format!("the sleeper's input is not given up: {:?}", bus.topic(subject_of_many().name())));
        }
    }
    go_on(bus, process)?;
    expect(read_results(bus)?, (0..MESSAGES).map(payload).collect())
}

fn rewind(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    bus.rewind_group(subject_of_many().name(), GROUP, Start::Oldest, true).map_err(text)?;
    go_on(bus, process)?;
    expect(drain(bus)?, vec![(0, 1), (1, 1), (2, 1)])?;
    let groups = bus.topic(subject_of_many().name()).map_err(text)?.groups;
    expect(groups.len(), 1)
}

fn remove(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    match bus.remove_group(subject_of_many().name(), GROUP, true) {
        // A removal that was finished by the successor is not there to be asked for again.
        Err(OpenError::Refused(Refusal::UnknownGroup { .. })) => {}
        other => other.map_err(text)?,
    }
    go_on(bus, process)?;
    // The name is free, and the group under it another one.
    create(bus, None)
}

/// A name goes on where what is there ends, whatever its owner could not decide.
fn bury_name(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    process.ok_or("no process")?.kill();
    let mut publisher = bus.publisher_as(subject_of_many(), NAME).map_err(text)?;
    expect(publisher.last_number(), Some(COMMITTED))?;
    publisher.publish_numbered(&payload(MESSAGES), COMMITTED + 1).map_err(text)?;
    let mut reader = subscriber(bus, &subject_of_many(), Start::Oldest, Wait::Adaptive)?;
    let mut numbers = Vec::new();
    while let Some(message) = reader.try_recv().map_err(text)? {
        numbers.extend(message.publisher_number().filter(|_| message[..] == payload(MESSAGES)));
    }
    expect(numbers, (1..=COMMITTED + 1).collect())
}

fn take_name(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    let mut publisher = bus.publisher_as(subject_of_many(), NAME).map_err(text)?;
    expect(publisher.last_number(), Some(1))?;
    publisher.publish_numbered(&payload(MESSAGES), 2).map_err(text)?;
    go_on(bus, process)?;
    let mut reader = subscriber(bus, &subject_of_many(), Start::Oldest, Wait::Adaptive)?;
    let mut numbers = Vec::new();
    while let Some(message) = reader.try_recv().map_err(text)? {
        if message[..] == payload(MESSAGES) {
            numbers.push(message.publisher_number());
        } else if message[..] == *b"late" {
            return Err("a fenced publisher's message is there".to_owned());
        }
    }
    expect(numbers, vec![Some(1), Some(2)])
}
