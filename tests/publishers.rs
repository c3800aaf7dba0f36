//! Publishers with names: numbers, resumption after death, fencing of those that live on, with real processes.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{LIMIT, LOGS, Process, Random, Scene, SetAtEnd, mode_of, of_mode, once_free, say, seed};
use nix::sys::signal::{Signal, kill};
use shmbus::{
    Bus, Envelope, Full, Mode, OpenError, PublishError, Publisher, RecvError, Refusal, Sequence, Start, Subscriber,
    Topic,
};

/// Who all the tests' publishers are.
const NAME: &str = "feeder";

/// Publishers killed on each kind of topic.
const KILLS: u64 = 60;

/// Publishers stopped and replaced.
const FENCED: u64 = 60;

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "resume" => resume(&bus, &arguments),
        "publish ids" => publish_ids(&bus, &arguments),
        "publish until fenced" => publish_until_fenced(&bus, &arguments),
        _ => panic!("no role {role}"),
    }
}

fn topic(mode: Mode) -> Topic<[u8]> {
    of_mode(mode, Topic::named(format!("names.{mode}"))).messages(256).bytes(64 << 10)
}

/// Opens the name as soon as its dead holder has been noticed.
fn publisher_as(bus: &Bus, topic: &Topic<[u8]>) -> Publisher<[u8]> {
    once_free("the name", || bus.publisher_as(topic.clone(), NAME))
}

fn subscriber(bus: &Bus, topic: &Topic<[u8]>) -> Subscriber<[u8]> {
    bus.subscriber(topic.clone()).start(Start::Oldest).open().unwrap()
}

fn text(message: &[u8]) -> String {
    String::from_utf8_lossy(message).into_owned()
}

#[test]
fn numbers_are_dense_and_each_is_published_once() {
    let scene = Scene::new("numbers");
    let bus = scene.open();
    for mode in LOGS {
        let mut publisher = bus.publisher_as(topic(mode), NAME).unwrap();
        let mut subscriber = subscriber(&bus, &topic(mode));
        assert_eq!(publisher.last_number(), Some(0));
        assert_eq!(publisher.publish_numbered(b"one", 1), Ok(Sequence::new(0)));
        assert_eq!(publisher.publish(b"two"), Ok(Sequence::new(1)));
        let batch: [&[u8]; 3] = [b"three", b"four", b"five"];
        assert_eq!(publisher.publish_batch(batch), Ok(Sequence::new(2)));
        assert_eq!(publisher.last_number(), Some(5));
        for (number, sequence) in [(1, 0), (2, 1), (4, 3), (5, 4)] {
            let duplicate = PublishError::Duplicate { sequence: Some(Sequence::new(sequence)) };
            assert_eq!(publisher.publish_numbered(b"again", number), Err(duplicate), "{mode}");
        }
        for found in [0, 7, u64::MAX] {
            let gap = PublishError::NumberGap { expected: 6, found };
            assert_eq!(publisher.publish_numbered(b"gap", found), Err(gap));
        }
        assert_eq!(publisher.publish_numbered(b"six", 6), Ok(Sequence::new(5)));
        for (number, expected) in (1..).zip(["one", "two", "three", "four", "five", "six"]) {
            let message = subscriber.recv_timeout(LIMIT).unwrap();
            assert_eq!((text(&message).as_str(), message.publisher_number()), (expected, Some(number)));
            assert_eq!(message.publisher(), Some(publisher.id()));
        }
        assert!(subscriber.try_recv().unwrap().is_none());
    }
}

/// A batch that is given again is there as a whole, or published as a whole; one that is cut differently is neither.
#[test]
fn a_numbered_batch_is_published_once_and_whole() {
    let scene = Scene::new("batches");
    let bus = scene.open();
    let batch: [&[u8]; 3] = [b"one", b"two", b"three"];
    for mode in LOGS {
        let mut publisher = bus.publisher_as(topic(mode), NAME).unwrap();
        assert_eq!(publisher.publish_batch_numbered(batch, 1), Ok(Sequence::new(0)));
        assert_eq!(publisher.publish_batch_numbered([&b"four"[..]], 4), Ok(Sequence::new(3)));
        drop(publisher);
        let mut publisher = bus.publisher_as(topic(mode), NAME).unwrap();
        let duplicate = |sequence| Err(PublishError::Duplicate { sequence: Some(Sequence::new(sequence)) });
        for (first, sequence) in [(1, 0), (2, 1)] {
            assert_eq!(publisher.publish_batch_numbered(batch, first), duplicate(sequence), "{mode}");
        }
        for first in [3, 4] {
            let overlap = PublishError::BatchOverlap { expected: 5, found: first };
            assert_eq!(publisher.publish_batch_numbered(batch, first), Err(overlap), "{mode}");
        }
        for found in [0, 6, u64::MAX] {
            let gap = PublishError::NumberGap { expected: 5, found };
            assert_eq!(publisher.publish_batch_numbered(batch, found), Err(gap), "{mode}");
        }
        let none: [&[u8]; 0] = [];
        assert!(matches!(publisher.publish_batch_numbered(none, 1), Err(PublishError::BatchSize { .. })));
        assert_eq!(publisher.last_number(), Some(4));
        assert_eq!(publisher.publish_batch_numbered(batch, 5), Ok(Sequence::new(4)));
        let mut subscriber = subscriber(&bus, &topic(mode));
        for (number, expected) in (1..).zip(["one", "two", "three", "four", "one", "two", "three"]) {
            let message = subscriber.recv_timeout(LIMIT).unwrap();
            assert_eq!((text(&message).as_str(), message.publisher_number()), (expected, Some(number)));
        }
        assert!(subscriber.try_recv().unwrap().is_none());
    }
    let mut fenced = bus.publisher_as(topic(Mode::Many), NAME).unwrap();
    let mut successor = bus.publisher_as(topic(Mode::Many), NAME).unwrap();
    assert_eq!(fenced.publish_batch_numbered(batch, 8), Err(PublishError::Fenced));
    assert_eq!(successor.publish_batch_numbered(batch, 8).map(|_| successor.last_number()), Ok(Some(10)));
}

#[test]
fn a_name_goes_on_where_it_ended_and_belongs_to_its_topic() {
    let scene = Scene::new("goes-on");
    let bus = scene.open();
    for mode in LOGS {
        let mut first = bus.publisher_as(topic(mode), NAME).unwrap();
        for number in 1..=3 {
            first.publish_numbered(b"first", number).unwrap();
        }
        let id = first.id();
        drop(first);
        let mut unnamed = bus.publisher(topic(mode)).unwrap();
        unnamed.publish(b"nobody").unwrap();
        assert_eq!(unnamed.last_number(), None);
        drop(unnamed);
        let mut second = bus.publisher_as(topic(mode), NAME).unwrap();
        assert_eq!((second.id(), second.last_number()), (id, Some(3)));
        let retained = PublishError::Duplicate { sequence: Some(Sequence::new(1)) };
        assert_eq!(second.publish_numbered(b"again", 2), Err(retained), "{mode}");
        assert_eq!(second.publish_numbered(b"second", 4), Ok(Sequence::new(4)));
        assert_eq!(
            bus.publisher_as(Topic::<[u8]>::named(format!("other.{mode}")), NAME).unwrap().last_number(),
            Some(0)
        );
        let names = bus.publisher_names(topic(mode).name()).unwrap();
        let found: Vec<(&str, u64)> = names.iter().map(|name| (name.name.as_str(), name.last_number)).collect();
        assert_eq!(found, [(NAME, 4)]);
    }
}

#[test]
fn a_duplicate_that_is_no_longer_retained_is_a_duplicate_all_the_same() {
    let scene = Scene::new("forgotten");
    let bus = scene.open();
    for mode in LOGS {
        let topic = topic(mode).full(Full::Overwrite);
        let mut publisher = bus.publisher_as(topic.clone(), NAME).unwrap();
        for _ in 0..20_000 {
            publisher.publish(b"x").unwrap();
        }
        drop(publisher);
        let mut publisher = bus.publisher_as(topic, NAME).unwrap();
        assert_eq!(publisher.last_number(), Some(20_000), "{mode}");
        assert_eq!(publisher.publish_numbered(b"x", 1), Err(PublishError::Duplicate { sequence: None }));
    }
}

#[test]
fn channels_keep_no_names_and_bad_names_are_refused() {
    let scene = Scene::new("refused");
    let bus = scene.open();
    let channel = bus.publisher_as(Topic::<[u8]>::new("c").channel(), NAME);
    assert!(matches!(channel.err(), Some(OpenError::Refused(Refusal::Options { .. }))));
    let bad = bus.publisher_as(Topic::<[u8]>::new("t"), "a b");
    assert!(matches!(bad.err(), Some(OpenError::Refused(Refusal::Name { .. }))));
}

#[test]
fn an_exclusive_name_stays_with_who_lives() {
    let scene = Scene::new("exclusive");
    let bus = scene.open();
    let mut holder = bus.publisher_as(topic(Mode::Exclusive), NAME).unwrap();
    let taken = bus.publisher_as(topic(Mode::Exclusive), NAME);
    assert!(matches!(taken.err(), Some(OpenError::Refused(Refusal::Taken { .. }))));
    holder.publish_numbered(b"x", 1).unwrap();
}

/// SPEC §3.3: after the successor was opened, its predecessor publishes nothing, and the numbers agree.
#[test]
fn who_takes_a_name_fences_its_holder() {
    let scene = Scene::new("taken");
    let bus = scene.open();
    let topic = topic(Mode::Many);
    let mut subscriber = subscriber(&bus, &topic_created(&bus, &topic));
    let mut publishers = vec![bus.publisher_as(topic.clone(), NAME).unwrap()];
    for number in 1..=5 {
        publishers.last_mut().unwrap().publish_numbered(b"x", number).unwrap();
        let successor = bus.publisher_as(topic.clone(), NAME).unwrap();
        assert_eq!(successor.last_number(), Some(number));
        for fenced in &mut publishers {
            assert_eq!(fenced.publish(b"zombie"), Err(PublishError::Fenced));
            assert_eq!(fenced.try_publish(b"zombie"), Err(PublishError::Fenced));
        }
        publishers.push(successor);
    }
    // Five messages, and a hole after each.
    for number in 1..=5 {
        let message = subscriber.recv_timeout(LIMIT).unwrap();
        assert_eq!((message.sequence().get(), message.publisher_number()), (2 * (number - 1), Some(number)));
    }
    assert!(subscriber.try_recv().unwrap().is_none());
    // Holes are no loss, wherever a subscriber begins.
    let all = |start| {
        let mut late = bus.subscriber(topic.clone()).start(start).open().unwrap();
        std::iter::from_fn(|| late.try_recv().unwrap().map(|message| message.sequence().get())).collect::<Vec<_>>()
    };
    assert_eq!(all(Start::Sequence(Sequence::new(3))), [4, 6, 8]);
    assert_eq!(all(Start::Last(1)), []);
    assert_eq!(all(Start::Oldest), [0, 2, 4, 6, 8]);
}

/// Creates the topic.
fn topic_created(bus: &Bus, topic: &Topic<[u8]>) -> Topic<[u8]> {
    bus.create(topic).unwrap();
    topic.clone()
}

/// The ring is full to the last message: the fence takes the slack, and when that is used up the error names the reader.
#[test]
fn a_full_ring_has_room_for_fences_and_then_says_who_holds_it() {
    let scene = Scene::new("full");
    let bus = scene.open();
    let topic = topic_created(&bus, &topic(Mode::Many).messages(1000));
    let mut reader = subscriber(&bus, &topic);
    let mut publisher = bus.publisher_as(topic.clone(), NAME).unwrap();
    let full = (0..).find_map(|_| publisher.try_publish(b"x").err()).unwrap();
    assert!(matches!(full, PublishError::Full { .. }), "{full:?}");
    let last = publisher.last_number().unwrap();
    let mut opened = vec![publisher];
    let refused = loop {
        match bus.publisher_as(topic.clone(), NAME) {
            Ok(successor) => {
                assert_eq!(successor.last_number(), Some(last));
                opened.push(successor);
                // A fenced publisher keeps its slot until it goes.
                drop(opened.remove(0));
            }
            Err(error) => break error,
        }
        assert!(opened.len() < 2000);
    };
    let OpenError::Refused(Refusal::FullForFence { holder, .. }) = refused else { panic!("{refused}") };
    assert!(holder.contains("subscriber"), "{holder}");
    assert!(matches!(opened[0].try_publish(b"x"), Err(PublishError::Full { .. })), "still the name's publisher");
    for number in 1..=last {
        assert_eq!(reader.recv_timeout(LIMIT).unwrap().publisher_number(), Some(number));
    }
    assert!(reader.try_recv().unwrap().is_none());
    assert_eq!(bus.publisher_as(topic, NAME).unwrap().last_number(), Some(last));
}

/// Publishes its number, from the last one on, for ever.
fn resume(bus: &Bus, arguments: &str) {
    let (mode, blind) = arguments.split_once(' ').unwrap();
    common::end_with_the_test();
    let mut publisher = publisher_as(bus, &topic(mode_of(mode)));
    let last = publisher.last_number().unwrap();
    say(&last.to_string());
    // Blind retries begin with what may be there already.
    let first = if blind == "blind" { last.saturating_sub(20).max(1) } else { last + 1 };
    for number in first.. {
        match publisher.publish_numbered(number.to_string().as_bytes(), number) {
            Ok(_) => assert!(number > last),
            Err(PublishError::Duplicate { .. }) => assert!(number <= last),
            Err(error) => panic!("{error}"),
        }
    }
}

/// SPEC §3, third column, rows 1 and 2: each number exactly once, whenever the publisher was killed.
#[test]
fn who_is_killed_goes_on_with_each_number_exactly_once() {
    let scene = Scene::new("killed");
    let bus = scene.open();
    let mut random = Random::new(seed());
    for mode in LOGS {
        let topic = topic_created(&bus, &topic(mode));
        let mut subscriber = subscriber(&bus, &topic);
        let mut next = 1;
        for life in 0..KILLS {
            let mut child = scene.start("resume", &format!("{mode} {}", if life % 2 == 0 { "blind" } else { "asks" }));
            let last: u64 = child.line().parse().unwrap();
            assert!(last + 1 >= next, "{mode}: published up to {last}, received up to {next}");
            let until = next + random.below(2000);
            while next < until {
                next = receive_number(&mut subscriber, next);
            }
            if life % 8 == 7 {
                kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
            }
            child.kill();
        }
        let last = publisher_as(&bus, &topic).last_number().unwrap();
        while next <= last {
            next = receive_number(&mut subscriber, next);
        }
        assert!(subscriber.try_recv().unwrap().is_none(), "{mode}: more than number {last}");
    }
}

/// Receives the message with number `expected`; returns the next.
fn receive_number(subscriber: &mut Subscriber<[u8]>, expected: u64) -> u64 {
    let message = subscriber.recv_timeout(LIMIT).unwrap();
    assert_eq!((text(&message), message.publisher_number()), (expected.to_string(), Some(expected)));
    expected + 1
}

/// Publishes until it is fenced, and says which number it had committed last.
fn publish_until_fenced(bus: &Bus, arguments: &str) {
    common::end_with_the_test();
    let mut publisher = bus.publisher_as(topic(Mode::Many), NAME).unwrap();
    let mut last = publisher.last_number().unwrap();
    say(&last.to_string());
    loop {
        match publisher.publish_numbered(format!("{arguments}:{}", last + 1).as_bytes(), last + 1) {
            Ok(_) => last += 1,
            Err(PublishError::Fenced) => break say(&last.to_string()),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(publisher.publish(b"zombie"), Err(PublishError::Fenced));
    common::hear();
}

/// SPEC §3.3, §4.3: a publisher stopped anywhere in publish, replaced, and woken.
#[test]
fn who_slept_through_its_replacement_is_fenced_and_never_seen() {
    let scene = Scene::new("zombies");
    let bus = scene.open();
    let mut random = Random::new(seed());
    let topic = topic_created(&bus, &topic(Mode::Many));
    let done = AtomicBool::new(false);
    // Before the first life: without a reader the ring keeps only the newest.
    let subscriber = subscriber(&bus, &topic);
    thread::scope(|scope| {
        // Also when an assertion fails: the scope waits for its reader.
        let end = SetAtEnd(&done);
        let reading = scope.spawn(|| read_lives(subscriber, &done));
        let mut zombies: Vec<(Process, u64)> = Vec::new();
        let mut last = 0;
        for life in 1..=FENCED {
            // Sometimes the victim runs while it is replaced.
            let mut child = scene.start("publish until fenced", &life.to_string());
            assert_eq!(child.line().parse::<u64>().unwrap(), last);
            thread::sleep(Duration::from_micros(random.below(3000)));
            if life % 4 != 0 {
                child.signal(Signal::SIGSTOP);
            }
            if life % 10 == 9 {
                kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
            }
            let mut successor = bus.publisher_as(topic.clone(), NAME).unwrap();
            last = successor.last_number().unwrap();
            // Sometimes by more than a lap of the ring.
            let count = if life % 3 == 0 { 5000 } else { random.below(50) };
            for _ in 0..count {
                last += 1;
                successor.publish_numbered(format!("0:{last}").as_bytes(), last).unwrap();
            }
            zombies.push((child, last - count));
            if random.below(2) == 0 {
                wake_zombies(&mut zombies);
            }
            drop(successor);
        }
        wake_zombies(&mut zombies);
        drop(end);
        assert_eq!(reading.join().unwrap(), last);
    });
}

/// Each of them finds out that it was fenced, and that it had committed what its successor began with.
fn wake_zombies(zombies: &mut Vec<(Process, u64)>) {
    for (mut zombie, last) in zombies.drain(..) {
        zombie.signal(Signal::SIGCONT);
        assert_eq!(zombie.line().parse::<u64>().unwrap(), last);
    }
}

/// Reads every number once and in order, and no life's message after a later life's; returns the last number.
fn read_lives(mut subscriber: Subscriber<[u8]>, done: &AtomicBool) -> u64 {
    let (mut last, mut seen, mut present) = (0, Vec::new(), String::new());
    loop {
        // Acquire: what had been published before `done` is found after it.
        let over = done.load(Ordering::Acquire);
        let message = match subscriber.recv_timeout(Duration::from_millis(20)) {
            Ok(message) => message,
            Err(RecvError::TimedOut) if over => return last,
            Err(RecvError::TimedOut) => continue,
            Err(error) => panic!("{error}"),
        };
        let text = text(&message);
        let (life, number) = text.split_once(':').unwrap();
        assert_eq!((number, message.publisher_number()), ((last + 1).to_string().as_str(), Some(last + 1)));
        last += 1;
        if life != present {
            assert!(life == "0" || !seen.iter().any(|earlier| earlier == life), "life {life} came back");
            present = life.to_owned();
            seen.push(present.clone());
        }
    }
}

/// The name is asked for while coordinators die: the fence is there, and the numbers agree.
#[test]
fn names_survive_the_coordinator() {
    let scene = Scene::new("coordinators");
    let bus = scene.open();
    for mode in LOGS {
        let topic = topic_created(&bus, &topic(mode).full(Full::Overwrite));
        let mut publisher = publisher_as(&bus, &topic);
        for number in 1..=40 {
            publisher.publish_numbered(b"x", number).unwrap();
            if number % 4 == 0 {
                kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
            }
            if mode == Mode::Exclusive {
                drop(publisher);
                publisher = publisher_as(&bus, &topic);
            } else {
                let successor = publisher_as(&bus, &topic);
                assert_eq!(publisher.publish(b"zombie"), Err(PublishError::Fenced));
                publisher = successor;
            }
            assert_eq!(publisher.last_number(), Some(number), "{mode}");
        }
    }
}

fn with_ids(mode: Mode) -> Topic<[u8]> {
    of_mode(mode, Topic::named(format!("ids.{mode}"))).messages(64).bytes(64 << 10).dedup()
}

fn id(text: &str) -> Envelope {
    Envelope::new().id(text.as_bytes())
}

fn duplicate_of(sequence: u64) -> PublishError {
    PublishError::Duplicate { sequence: Some(Sequence::new(sequence)) }
}

#[test]
fn an_id_is_published_once_within_the_window() {
    let scene = Scene::new("ids");
    let bus = scene.open();
    for mode in LOGS {
        let topic = with_ids(mode).full(Full::Overwrite);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        publisher.publish_with(b"a", &id("a")).unwrap();
        publisher.publish(b"none").unwrap();
        publisher.publish(b"none").unwrap();
        let publish = |publisher: &mut Publisher<[u8]>, ids: [&str; 2]| {
            let envelopes = ids.map(id);
            publisher.publish_batch_with(envelopes.iter().map(|envelope| (&b"batch"[..], envelope)))
        };
        assert_eq!(publish(&mut publisher, ["b", "c"]), Ok(Sequence::new(3)), "{mode}");
        assert_eq!(publisher.publish_with(b"again", &id("a")), Err(duplicate_of(0)), "{mode}");
        assert_eq!(publisher.publish_with(b"again", &id("c")), Err(duplicate_of(4)), "{mode}");
        assert_eq!(publish(&mut publisher, ["d", "b"]), Err(duplicate_of(3)), "all or nothing");
        assert_eq!(publish(&mut publisher, ["e", "e"]), Err(PublishError::Duplicate { sequence: None }));
        // A newcomer finds them in the log.
        drop(publisher);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        assert_eq!(publisher.publish_with(b"again", &id("b")), Err(duplicate_of(3)), "{mode}");
        assert_eq!(publisher.publish_with(b"d", &id("d")), Ok(Sequence::new(5)));
        // The window is what the topic retains.
        (0..4096).for_each(|_| assert!(publisher.publish(b"fills the ring").is_ok()));
        assert!(publisher.publish_with(b"a", &id("a")).is_ok(), "{mode}");
    }
}

/// On a topic for many, another publisher may have published the id a moment ago, in an arena that is new.
#[test]
fn ids_of_other_publishers_count() {
    let scene = Scene::new("others-ids");
    let bus = scene.open();
    let other = scene.open();
    let mut first = bus.publisher(with_ids(Mode::Many)).unwrap();
    first.publish_with(b"a", &id("a")).unwrap();
    for n in 0..8 {
        let name = format!("id {n}");
        let mut newcomer = other.publisher(with_ids(Mode::Many)).unwrap();
        assert_eq!(newcomer.publish_with(b"a", &id("a")), Err(duplicate_of(0)));
        let sequence = newcomer.publish_with(b"x", &id(&name)).unwrap();
        assert_eq!(first.publish_with(b"x", &id(&name)), Err(duplicate_of(sequence.get())));
        std::mem::forget(newcomer); // its slot stays taken, so the next one gets a new arena
    }
}

/// How many ids are raced for.
const RACED: u64 = 3000;

/// Publishes every id, and says how many of them it was the first with.
fn publish_ids(bus: &Bus, _arguments: &str) {
    let mut publisher = bus.publisher(with_ids(Mode::Many).messages(4096)).unwrap();
    say("ready");
    common::hear();
    let first = (0..RACED).filter(|n| match publisher.publish_with(&n.to_le_bytes(), &id(&n.to_string())) {
        Ok(_) => true,
        Err(PublishError::Duplicate { sequence: Some(_) }) => false,
        Err(error) => panic!("{error}"),
    });
    say(&first.count().to_string());
    common::hear();
}

#[test]
fn ids_that_processes_race_for_are_published_once() {
    let scene = Scene::new("race");
    let bus = scene.open();
    let topic = topic_created(&bus, &with_ids(Mode::Many).messages(4096));
    let mut subscriber = subscriber(&bus, &topic);
    let mut racers: Vec<Process> = (0..3).map(|_| scene.start("publish ids", "")).collect();
    racers.iter_mut().for_each(|racer| racer.expect("ready"));
    racers.iter_mut().for_each(|racer| racer.tell("go"));
    let published: u64 = racers.iter_mut().map(|racer| racer.line().parse::<u64>().unwrap()).sum();
    assert_eq!(published, RACED);
    for expected in 0..RACED {
        let message = subscriber.recv_timeout(LIMIT).unwrap();
        assert_eq!(u64::from_le_bytes(message.as_bytes().try_into().unwrap()), expected);
    }
    assert!(subscriber.try_recv().unwrap().is_none());
}
