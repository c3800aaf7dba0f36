//! Where subscribers start, what they lose and are told, what they hold back, how they wait.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    LIMIT, LOGS, MODES, Random, Scene, SetAtEnd, await_that, checksum, hear, number, of_mode, raw, receive, say, seed,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use shmbus::{
    Bus, Full, GoneReason, Holder, Mode, OpenError, PublishError, Publisher, RecvError, Refusal, Sequence, Start,
    Subscriber, Topic, Wait,
};

/// A sleeper looks again after a second, which would hide a lost wake-up.
const LOOKS_AGAIN: Duration = Duration::from_millis(900);

fn publish(bus: &Bus, topic: &Topic<[u8]>, numbers: std::ops::Range<u64>) {
    let mut publisher = common::publisher_after(bus, topic);
    send(&mut publisher, numbers);
}

fn send(publisher: &mut Publisher<[u8]>, numbers: std::ops::Range<u64>) {
    for number in numbers {
        publisher.publish(&number.to_le_bytes()).unwrap();
    }
}

/// What is there now; each message's sequence must be its number.
fn numbers(subscriber: &mut Subscriber<[u8]>) -> Vec<u64> {
    let mut numbers = Vec::new();
    while let Some(message) = subscriber.try_recv().unwrap() {
        assert_eq!(message.sequence().get(), number(&message));
        numbers.push(number(&message));
    }
    numbers
}

fn lagged(outcome: Result<Option<shmbus::Message<'_, [u8]>>, RecvError>) -> (u64, u64) {
    match outcome {
        Err(RecvError::Lagged { from, to }) => (from.get(), to.get()),
        other => panic!("no loss but {:?}", other.map(|message| message.map(|message| message.sequence()))),
    }
}

fn open(bus: &Bus, topic: &Topic<[u8]>, start: Start) -> Subscriber<[u8]> {
    bus.subscriber(topic.clone()).start(start).open().unwrap()
}

/// Not a test: what the tests' other processes do. Arguments: a topic.
#[test]
fn role() {
    match common::role() {
        Some((role, topic)) if role == "subscribe" => subscribe(&topic),
        Some((_, topic)) => open_without_descriptors(&topic),
        None => {}
    }
}

/// Role: a subscriber that may have no more descriptors while an arena comes.
fn subscribe(topic: &str) {
    let bus = Bus::open_default().unwrap();
    let mut subscriber = open(&bus, &Topic::named(topic), Start::Latest);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
    say("open");
    hear();
    say(if subscriber.try_recv().is_err() { "no room" } else { "received" });
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    say(&String::from_utf8_lossy(&receive(&mut subscriber).1));
}

/// Role: may have no more descriptors, and opens a subscriber and a wildcard.
fn open_without_descriptors(topic: &str) {
    let bus = Bus::open_default().unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
    let outcomes = [
        bus.subscriber(Topic::<[u8]>::named(topic)).open().map(drop),
        bus.wildcard::<[u8]>(">").open().map(drop),
        bus.publisher(Topic::<[u8]>::named(topic)).map(drop),
    ];
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    outcomes.into_iter().for_each(|outcome| say(&outcome.unwrap_err().to_string()));
}

#[test]
fn who_may_have_no_more_descriptors_is_told_so() {
    let scene = Scene::new("crowded");
    let bus = scene.open();
    bus.create(&Topic::<[u8]>::named("crowded")).unwrap();
    let mut short = scene.start("short", "crowded");
    for _ in 0..3 {
        let told = short.line();
        assert!(told.contains("raise its limit (ulimit -n)"), "{told}");
    }
    await_that("what was opened is closed", || bus.topic("crowded").unwrap().subscribers.is_empty());
}

#[test]
fn an_arena_that_came_when_there_was_no_descriptor_for_it_comes_again() {
    let scene = Scene::new("crowded");
    let bus = scene.open();
    let topic = Topic::<[u8]>::named("crowded");
    let _has_the_first_arena = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = scene.start("subscribe", topic.name());
    subscriber.expect("open");
    let mut publisher = bus.publisher(topic).unwrap();
    publisher.publish(b"first").unwrap();
    subscriber.tell("receive");
    subscriber.expect("no room");
    subscriber.expect("first");
}

#[test]
fn who_was_overtaken_by_a_publisher_whose_arena_takes_long_to_map_goes_on() {
    let scene = Scene::new("overtaken");
    let bus = scene.open();
    let topic = Topic::<[u8]>::named("overtaken").messages(64).bytes(256 << 20).full(Full::Overwrite);
    let _has_the_first_arena = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = open(&bus, &topic, Start::Latest);
    let mut publisher = bus.publisher(topic).unwrap();
    send(&mut publisher, 0..20_000);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = SetAtEnd(&over);
        // What the subscriber looks at while it maps the arena is overwritten before it has done so.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                send(&mut publisher, 20_000..20_100);
            }
        });
        assert_eq!(lagged(subscriber.try_recv()).0, 0);
    });
}

#[test]
fn subscribers_start_where_they_ask_to() {
    let scene = Scene::new("starts");
    let bus = scene.open();
    for mode in LOGS {
        let topic = raw(mode, "starts").messages(64);
        publish(&bus, &topic, 0..20);
        let starts = [
            (Start::Latest, 20),
            (Start::Oldest, 0),
            (Start::Last(0), 20),
            (Start::Last(5), 15),
            (Start::Last(1000), 0),
            (Start::Sequence(Sequence::new(0)), 0),
            (Start::Sequence(Sequence::new(13)), 13),
            (Start::Sequence(Sequence::new(20)), 20),
        ];
        for (start, first) in starts {
            let mut subscriber = open(&bus, &topic, start);
            assert_eq!(subscriber.lag(), 20 - first, "{start:?} on {mode}");
            assert_eq!(numbers(&mut subscriber), (first..20).collect::<Vec<_>>(), "{start:?} on {mode}");
        }
        let beyond = bus.subscriber(topic.clone()).start(Start::Sequence(Sequence::new(21))).open().err().unwrap();
        let OpenError::Refused(Refusal::BeyondTail { asked: 21, tail: 20, .. }) = beyond else { panic!("{beyond}") };
        assert!(beyond.to_string().contains("has no sequence 21 yet; its next is 20"), "{beyond}");
        assert_eq!(bus.topic(topic.name()).unwrap().subscribers.len(), 0, "the refused one left something behind");
    }
}

#[test]
fn subscribers_start_inside_a_batch() {
    let scene = Scene::new("inside");
    let bus = scene.open();
    for mode in LOGS {
        let topic = raw(mode, "inside").messages(64);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let payloads: Vec<[u8; 8]> = (0..30u64).map(u64::to_le_bytes).collect();
        for batch in payloads.chunks(10) {
            publisher.publish_batch(batch.iter().map(<[u8; 8]>::as_slice)).unwrap();
        }
        for first in 0..30 {
            for start in [Start::Sequence(Sequence::new(first)), Start::Last(30 - first)] {
                let mut subscriber = open(&bus, &topic, start);
                assert_eq!(numbers(&mut subscriber), (first..30).collect::<Vec<_>>(), "{start:?} on {mode}");
            }
        }
    }
}

#[test]
fn a_sequence_that_is_gone_is_reported_exactly() {
    let scene = Scene::new("gone");
    let bus = scene.open();
    for mode in LOGS {
        for full in [Full::Block, Full::Overwrite] {
            let topic = Topic::<[u8]>::named(format!("gone.{mode}.{full}")).messages(16).full(full);
            let topic = of_mode(mode, topic);
            // Rings for many are longer than asked for.
            publish(&bus, &topic, 0..5000);
            let oldest = 5000 - open(&bus, &topic, Start::Oldest).lag();
            assert!(oldest > 0 && oldest <= 5000 - 16, "{oldest}");
            for asked in [0, oldest - 1] {
                let mut subscriber = open(&bus, &topic, Start::Sequence(Sequence::new(asked)));
                assert_eq!(lagged(subscriber.try_recv()), (asked, oldest), "{mode} {full}");
                assert_eq!(numbers(&mut subscriber), (oldest..5000).collect::<Vec<_>>());
            }
            let mut subscriber = open(&bus, &topic, Start::Sequence(Sequence::new(oldest)));
            assert_eq!(numbers(&mut subscriber), (oldest..5000).collect::<Vec<_>>());
        }
    }
}

/// Reads a topic that goes on without it; everything must be there or be reported lost, and whole.
fn read_with_losses(mut subscriber: Subscriber<[u8]>, until: u64) -> (u64, u64) {
    let (mut next, mut losses, mut pause) = (0, 0, Random::new(until));
    while next < until {
        match subscriber.recv_timeout(LIMIT) {
            Ok(message) => {
                assert_eq!(message.sequence().get(), next);
                assert_eq!(check_message(&message), next);
                next += 1;
                if pause.below(500) == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            Err(RecvError::Lagged { from, to }) => {
                assert_eq!(from.get(), next);
                assert!(to > from);
                losses += to.since(from);
                next = to.get();
            }
            Err(error) => panic!("{error} at {next}"),
        }
    }
    (next, losses)
}

#[test]
fn readers_that_are_overtaken_learn_exactly_what_they_lost() {
    let scene = Scene::new("overtaken");
    let bus = scene.open();
    let count = 20_000;
    for mode in LOGS {
        for full in [Full::Overwrite, Full::Block] {
            let topic = Topic::<[u8]>::named(format!("overtaken.{mode}.{full}")).messages(32).bytes(8192).full(full);
            let topic = of_mode(mode, topic);
            let mut publisher = bus.publisher(topic.clone()).unwrap();
            // On `block` topics: droppable ones, which hold nothing back either.
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let subscriber = bus.subscriber(topic.clone()).droppable().open().unwrap();
                    thread::spawn(move || read_with_losses(subscriber, count))
                })
                .collect();
            let mut random = Random::new(seed());
            for number in 0..count {
                let message = checked_message(number, random.below(300));
                assert_eq!(publisher.try_publish(&message).unwrap().get(), number, "nobody holds it back");
            }
            for reader in readers {
                let (read, losses) = reader.join().unwrap();
                println!("{mode} {full}: {losses} of {read} lost");
                assert!(read == count && losses < count);
            }
        }
    }
}

/// A message that says its number and can be checked.
fn checked_message(number: u64, len: u64) -> Vec<u8> {
    let mut message = number.to_le_bytes().to_vec();
    message.resize(8 + len as usize, number as u8);
    message.extend(checksum(&message).to_le_bytes());
    message
}

fn check_message(message: &[u8]) -> u64 {
    let (body, sum) = message.split_at(message.len() - 8);
    assert_eq!(checksum(body), number(sum), "a torn message");
    number(&body[..8])
}

#[test]
fn subscribers_that_come_and_go_under_fire_miss_nothing_unsaid() {
    let scene = Scene::new("fire");
    let bus = scene.open();
    let mut random = Random::new(seed());
    let messages = 64;
    for (mode, full) in LOGS.into_iter().flat_map(|mode| [(mode, Full::Block), (mode, Full::Overwrite)]) {
        let topic = Topic::<[u8]>::named(format!("fire.{mode}.{full}")).messages(messages).bytes(16 << 10).full(full);
        let topic = of_mode(mode, topic);
        let over = AtomicBool::new(false);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        for number in 0..5000 {
            publisher.publish(&checked_message(number, 100)).unwrap();
        }
        thread::scope(|scope| {
            let (mut lens, stop) = (random.clone(), &over);
            scope.spawn(move || {
                for number in 5000.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let message = checked_message(number, lens.below(200));
                    assert_eq!(publisher.publish_timeout(&message, LIMIT).unwrap().get(), number);
                }
            });
            let _stop = SetAtEnd(stop);
            for _ in 0..200 {
                let count = random.below(messages);
                let start = [Start::Oldest, Start::Last(count), Start::Latest][random.below(3) as usize];
                let builder = bus.subscriber(topic.clone()).start(start);
                let droppable = random.below(2) == 0;
                let builder = if droppable { builder.droppable() } else { builder };
                let mut subscriber = builder.open().unwrap();
                let holds = !droppable && full == Full::Block;
                let lag = subscriber.lag();
                let least = match start {
                    Start::Oldest => messages,
                    Start::Last(count) => count,
                    _ => 0,
                };
                assert!(lag >= least, "{start:?} on {mode} {full}: only {lag} to come");
                let mut next = None;
                for _ in 0..2 * messages {
                    match subscriber.recv_timeout(LIMIT) {
                        Ok(message) => {
                            let sequence = message.sequence().get();
                            assert_eq!(check_message(&message), sequence);
                            assert_eq!(sequence, next.unwrap_or(sequence), "{start:?} on {mode} {full}");
                            next = Some(sequence + 1);
                        }
                        Err(RecvError::Lagged { from, to }) if !holds => {
                            assert_eq!(from.get(), next.unwrap_or(from.get()));
                            assert!(to > from, "{start:?} on {mode} {full}: lost {from}..{to} at {next:?}");
                            next = Some(to.get());
                        }
                        Err(error) => panic!("{start:?} on {mode} {full}: {error}"),
                    }
                }
            }
        });
    }
}

#[test]
fn a_full_ring_names_its_holder_after_exactly_so_many_messages() {
    let scene = Scene::new("full");
    let bus = scene.open();
    for mode in MODES {
        for messages in [2, 4, 16, 31, 100] {
            if mode == Mode::Channel && !u64::is_power_of_two(messages) {
                continue; // it holds the next one
            }
            let topic = Topic::<[u8]>::named(format!("full{messages}.{mode}")).messages(messages).full(Full::Reject);
            let topic = of_mode(mode, topic);
            let mut publisher = bus.publisher(topic.clone()).unwrap();
            let mut first = bus.subscriber(topic.clone()).open().unwrap();
            let second = (mode != Mode::Channel).then(|| bus.subscriber(topic.clone()).open().unwrap());
            for number in 0..messages {
                assert_eq!(publisher.publish(&number.to_le_bytes()).unwrap().get(), number, "{mode} {messages}");
            }
            drop(second);
            await_that("the second one's end", || bus.topic(topic.name()).unwrap().subscribers.len() == 1);
            let cursor = bus.topic(topic.name()).unwrap().subscribers[0].cursor;
            let holder = if mode == Mode::Channel { Holder::Receiver } else { Holder::Subscriber(cursor) };
            for outcome in [publisher.publish(b"x"), publisher.try_publish(b"x")] {
                assert_eq!(outcome, Err(PublishError::Full { holder, held: 0 }), "{mode} {messages}");
            }
            // Nothing of the refused is ever seen, and reading makes room for exactly as much again.
            assert_eq!(numbers(&mut first), (0..messages).collect::<Vec<_>>());
            for number in messages..2 * messages {
                assert_eq!(publisher.publish(&number.to_le_bytes()).unwrap().get(), number);
            }
            assert_eq!(publisher.publish(b"x"), Err(PublishError::Full { holder, held: messages }));
            assert_eq!(numbers(&mut first), (messages..2 * messages).collect::<Vec<_>>());
        }
    }
}

#[test]
fn with_hold_unread_messages_stay_without_a_reader() {
    let scene = Scene::new("hold");
    let bus = scene.open();
    for mode in LOGS {
        let topic = raw(mode, "hold").messages(16).full(Full::Reject).hold();
        publish(&bus, &topic, 0..16);
        let mut publisher = common::publisher_after(&bus, &topic);
        assert_eq!(publisher.publish(b"x"), Err(PublishError::Full { holder: Holder::Hold, held: 0 }));
        let mut subscriber = open(&bus, &topic, Start::Oldest);
        assert_eq!(numbers(&mut subscriber), (0..16).collect::<Vec<_>>());
        assert_eq!(publisher.publish(&16u64.to_le_bytes()).unwrap().get(), 16);
        assert_eq!(numbers(&mut subscriber), [16]);
    }
    // Without it the newest are kept, and nobody is refused.
    for mode in LOGS {
        let topic = raw(mode, "no-hold").messages(16).full(Full::Reject);
        publish(&bus, &topic, 0..3000);
        let kept = numbers(&mut open(&bus, &topic, Start::Oldest));
        assert!(kept.len() >= 16 && *kept.last().unwrap() == 2999, "{kept:?}");
    }
}

#[test]
fn publishers_wait_for_room_and_no_longer_than_they_are_told() {
    let scene = Scene::new("wait");
    let bus = scene.open();
    for mode in MODES {
        for wait in [Wait::Adaptive, Wait::Spin, Wait::Park] {
            let topic = Topic::<[u8]>::named(format!("{mode}-{wait:?}")).messages(4);
            let topic = of_mode(mode, topic);
            let mut publisher = bus.publisher(topic.clone()).unwrap().wait(wait);
            let mut subscriber = bus.subscriber(topic).wait(wait).open().unwrap();
            send(&mut publisher, 0..4);
            let asked = Instant::now();
            let outcome = publisher.publish_timeout(b"x", Duration::from_millis(30)).unwrap_err();
            assert!(matches!(outcome, PublishError::TimedOut { held: 0, .. }), "{outcome}");
            assert!(asked.elapsed() >= Duration::from_millis(30) && asked.elapsed() < Duration::from_secs(5));
            let publishing = thread::spawn(move || send(&mut publisher, 4..100));
            for expected in 0..100u64 {
                assert_eq!(receive(&mut subscriber), (expected, expected.to_le_bytes().to_vec()), "{mode} {wait:?}");
            }
            publishing.join().unwrap();
            let asked = Instant::now();
            let outcome = subscriber.recv_timeout(Duration::from_millis(30)).map(|message| message.sequence());
            assert_eq!(outcome, Err(RecvError::TimedOut));
            assert!(asked.elapsed() >= Duration::from_millis(30) && asked.elapsed() < Duration::from_secs(5));
            let outcome = subscriber.recv_timeout(Duration::ZERO).map(|message| message.sequence());
            assert_eq!(outcome, Err(RecvError::TimedOut));
        }
    }
}

/// Sends numbers to and fro through rings so small that everybody sleeps all the time.
fn no_wake_up_is_lost(mode: Mode) {
    let scene = Scene::new("park");
    let bus = scene.open();
    let count = 10_000u64;
    let topics = ["there", "back"].map(|name| raw(mode, name).messages(2));
    let [mut there, mut back] = topics.clone().map(|topic| bus.publisher(topic).unwrap().wait(Wait::Park));
    let [mut arriving, mut returning] = topics.map(|topic| bus.subscriber(topic).wait(Wait::Park).open().unwrap());
    let echo = thread::spawn(move || {
        for expected in 0..count {
            let (sequence, payload) = receive(&mut arriving);
            assert_eq!(sequence, expected);
            back.publish_timeout(&payload, LIMIT).unwrap();
        }
    });
    let sending = thread::spawn(move || send(&mut there, 0..count));
    let mut slow = 0;
    for expected in 0..count {
        let asked = Instant::now();
        assert_eq!(receive(&mut returning), (expected, expected.to_le_bytes().to_vec()));
        slow += u32::from(asked.elapsed() >= LOOKS_AGAIN);
    }
    sending.join().unwrap();
    echo.join().unwrap();
    // A busy machine may do that to a few.
    assert!(slow < 10, "{slow} messages waited until a sleeper looked again by itself");
}

#[test]
fn no_wake_up_is_lost_on_an_exclusive_topic() {
    no_wake_up_is_lost(Mode::Exclusive);
}

#[test]
fn no_wake_up_is_lost_on_a_topic_with_many_publishers() {
    no_wake_up_is_lost(Mode::Many);
}

#[test]
fn no_wake_up_is_lost_on_a_channel() {
    no_wake_up_is_lost(Mode::Channel);
}

#[test]
fn a_topic_that_goes_delivers_what_it_had_and_wakes_everybody() {
    for stop in [false, true] {
        let scene = Scene::new("going");
        let bus = scene.open();
        let mut sleepers = Vec::new();
        let mut late = Vec::new();
        let mut names = Vec::new();
        let reason = if stop { GoneReason::Stopped } else { GoneReason::Removed };
        for mode in MODES {
            for wait in [Wait::Adaptive, Wait::Park, Wait::Spin] {
                let topic = Topic::<[u8]>::named(format!("{mode}-{wait:?}")).messages(4);
                let topic = of_mode(mode, topic);
                names.push(topic.name().to_owned());
                let mut publisher = bus.publisher(topic.clone()).unwrap().wait(wait);
                let mut subscriber = bus.subscriber(topic.clone()).wait(wait).open().unwrap();
                send(&mut publisher, 0..4);
                if wait == Wait::Spin {
                    // Three messages to come when it hears of the end.
                    assert_eq!(receive(&mut subscriber).0, 0);
                    late.push(subscriber);
                    continue;
                }
                // One sleeps on an empty ring, one on a full one.
                let empty = Topic::<[u8]>::named(format!("{mode}-{wait:?}-empty"));
                let empty = of_mode(mode, empty);
                names.push(empty.name().to_owned());
                bus.create(&empty).unwrap();
                let mut waiting = bus.subscriber(empty).wait(wait).open().unwrap();
                sleepers.push(thread::spawn(move || {
                    let outcome = waiting.recv().map(|message| message.sequence());
                    assert_eq!(outcome, Err(RecvError::Gone(reason)));
                }));
                sleepers.push(thread::spawn(move || {
                    assert_eq!(publisher.publish(b"no room"), Err(PublishError::Gone(reason)));
                    drop(subscriber);
                }));
            }
        }
        thread::sleep(Duration::from_millis(20)); // so that most of them do sleep
        if stop {
            bus.stop().unwrap();
        } else {
            names.iter().for_each(|name| bus.remove_topic(name, true).unwrap());
        }
        await_that("the sleepers", || sleepers.iter().all(thread::JoinHandle::is_finished));
        sleepers.into_iter().for_each(|sleeper| sleeper.join().unwrap());
        for mut subscriber in late {
            for expected in 1..4 {
                assert_eq!(receive(&mut subscriber).0, expected);
            }
            for _ in 0..2 {
                let outcome = subscriber.recv().map(|message| message.sequence());
                assert_eq!(outcome, Err(RecvError::Gone(reason)));
            }
        }
    }
}

#[test]
fn a_borrowed_payload_stays_whole_while_publishers_press_on() {
    let scene = Scene::new("borrowed");
    let bus = scene.open();
    for mode in MODES {
        let topic = raw(mode, "borrowed").messages(4).bytes(4096);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic).open().unwrap();
        for len in [8, 700] {
            let mut next = subscriber.lag();
            assert_eq!(next, 0);
            for _ in 0..50 {
                while publisher.try_publish(&vec![next as u8; len]).is_ok() {
                    next += 1;
                }
                let message = subscriber.try_recv().unwrap().unwrap();
                let first = message[0];
                while publisher.try_publish(&vec![next as u8; len]).is_ok() {
                    next += 1;
                }
                assert!(message.len() == len && message.iter().all(|byte| *byte == first), "{mode}");
            }
            while subscriber.try_recv().unwrap().is_some() {}
        }
    }
}

#[test]
fn with_hold_what_was_read_makes_room_after_its_reader_has_left() {
    let scene = Scene::new("released");
    let bus = scene.open();
    for mode in LOGS {
        let topic = raw(mode, "released").messages(16).full(Full::Reject).hold();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        send(&mut publisher, 0..16);
        assert!(matches!(publisher.try_publish(b"x"), Err(PublishError::Full { holder: Holder::Hold, .. })));
        let mut subscriber = open(&bus, &topic, Start::Oldest);
        for expected in 0..10 {
            assert_eq!(number(&subscriber.recv().unwrap()), expected);
        }
        assert_eq!(numbers(&mut subscriber), [10, 11, 12, 13, 14, 15]);
        drop(subscriber);
        // The coordinator answers in order: it has taken leave of the subscriber by then.
        bus.topic(topic.name()).unwrap();
        send(&mut publisher, 16..32);
        assert!(matches!(publisher.try_publish(b"x"), Err(PublishError::Full { holder: Holder::Hold, .. })));
        assert_eq!(numbers(&mut open(&bus, &topic, Start::Last(16))), (16..32).collect::<Vec<_>>());
    }
}

#[test]
fn a_forked_child_that_drops_its_copies_changes_nothing() {
    let scene = Scene::new("forked");
    let bus = scene.open();
    for mode in LOGS {
        let topic = raw(mode, "forked").messages(64);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = open(&bus, &topic, Start::Oldest);
        send(&mut publisher, 0..8);
        for expected in 0..6 {
            assert_eq!(number(&subscriber.recv().unwrap()), expected);
        }
        // SAFETY: the child drops copies of two handles, which neither allocates nor takes a lock of another thread's,
        // and exits without running anything else of this process.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                drop(std::ptr::read(&raw const subscriber));
                drop(std::ptr::read(&raw const publisher));
                libc::_exit(0);
            }
            assert!(child > 0);
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child ended with {status:#x}");
        }
        let room = (8..200).take_while(|n: &u64| publisher.try_publish(&n.to_le_bytes()).is_ok()).count() as u64;
        assert!((58..=62).contains(&room), "the reader at 6 still holds the ring of 64: {room} more went in");
        assert_eq!(numbers(&mut subscriber), (6..8 + room).collect::<Vec<_>>());
    }
}
