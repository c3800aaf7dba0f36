//! What a publisher of a topic may write into the topic's memory harms that topic at most: errors, but no crash, no hang, and no
//! effect on the coordinator or on other topics (SPEC §7.3).

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{LIMIT, Random, Scene, await_that, of_mode, seed};
use nix::sys::signal::{Signal, kill};
use shmbus::{
    Bus, Envelope, Full, GroupOptions, Mode, OpenError, PublishError, RecvError, Refusal, Sequence, Start, Topic,
    WildcardError,
};

/// Topics whose memory is garbled, of each kind.
const TOPICS: u64 = 12;

/// Rounds of garbage on each.
const ROUNDS: u64 = 6;

/// Where a segment's body begins, and a log's ring in it.
const BODY: u64 = 4096;
const RING: u64 = 20_480;

/// In a log's body: intent, floor, released, and the first checkpoint's two pairs. The state, before them, is left alone: a topic
/// that says it is gone is gone.
const PLACES: [u64; 7] = [128, 256, 384, 512, 520, 528, 536];

/// Words that have been mistaken for something in many a program.
const WORDS: [u64; 8] = [0, 1, u64::MAX, u64::MAX - 1, 1 << 63, u64::MAX >> 1, u64::MAX >> 2, 1 << 32];

/// A segment of a topic, found with the coordinator, which has it open for writing as a publisher has.
fn segment(scene: &Scene, name: &str) -> File {
    let fds = fs::read_dir(format!("/proc/{}/fd", scene.server("coordinator"))).unwrap();
    let wanted = format!("/memfd:shmbus:{name} (deleted)");
    let of_name = |path: &std::path::PathBuf| fs::read_link(path).is_ok_and(|to| to.to_str() == Some(&wanted));
    let path = fds.map(|entry| entry.unwrap().path()).find(of_name).unwrap_or_else(|| panic!("no {wanted}"));
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Overwrites a few words of a log's head or ring, or of an arena.
fn garble(random: &mut Random, log: &File, arena: &File) {
    for _ in 0..=random.below(3) {
        let word = match random.below(3) {
            0 => random.below(u64::MAX),
            _ => WORDS[random.below(WORDS.len() as u64) as usize],
        };
        let (file, at) = match random.below(5) {
            0 | 1 => (log, BODY + PLACES[random.below(PLACES.len() as u64) as usize]),
            2 => (log, BODY + 128 + 8 * random.below((RING - 128) / 8)),
            3 => (log, BODY + RING + 8 * random.below(64)),
            _ => (arena, BODY + 8 * random.below(512)),
        };
        let len = file.metadata().unwrap().len();
        if at + 8 <= len {
            file.write_all_at(&word.to_le_bytes(), at).unwrap();
        }
    }
}

/// Uses the topic in every way that looks at what publishers wrote. Outcomes do not matter.
fn use_it(bus: &Bus, topic: &Topic<[u8]>, random: &mut Random) {
    let id = |random: &mut Random| Envelope::new().id(&random.below(20).to_le_bytes());
    for name in [None, Some("name")] {
        let opened = match name {
            None => bus.publisher(topic.clone()),
            Some(name) => bus.publisher_as(topic.clone(), name),
        };
        let Ok(mut publisher) = opened else { continue };
        let _ = publisher.publish_timeout(b"plain", Duration::from_millis(1));
        let envelopes = [id(random), id(random)];
        let _ = publisher.publish_numbered(b"again", 1 + random.below(10));
        // No reader holds the topic, so these wait for nobody.
        let _ = publisher.publish_with(&[7; 300], &envelopes[0]);
        let _ = publisher.publish_batch_with(envelopes.iter().map(|envelope| (&b"batch"[..], envelope)));
    }
    let starts = [Start::Oldest, Start::Latest, Start::Last(3), Start::Sequence(Sequence::new(2)), Start::LastPerKey];
    for start in starts {
        let Ok(mut subscriber) = bus.subscriber(topic.clone()).start(start).open() else { continue };
        (0..100).for_each(|_| drop(subscriber.try_recv().map(|message| message.map(|m| m.as_bytes().to_vec()))));
        let _ = subscriber.lag();
    }
    let _ = (bus.topic(topic.name()), bus.publisher_names(topic.name()), bus.purge_topic(topic.name()));
}

#[test]
fn a_garbled_topic_harms_nobody_else() {
    let scene = Scene::new("garbage");
    let bus = scene.open();
    let coordinator = scene.server("coordinator");
    let mut random = Random::new(seed());
    let mut sound = bus.publisher(Topic::<[u8]>::new("sound")).unwrap();
    let mut reader = bus.subscriber(Topic::<[u8]>::new("sound")).open().unwrap();
    for mode in [Mode::Many, Mode::Exclusive] {
        for n in 0..TOPICS {
            let topic = Topic::<[u8]>::named(format!("garbled-{mode}-{n}")).messages(16).bytes(4096).max_age(LIMIT);
            let topic = of_mode(mode, topic).full(Full::Overwrite).dedup();
            bus.create(&topic).unwrap();
            let log = segment(&scene, &format!("{}:log", topic.name()));
            let arena = segment(&scene, &format!("{}:arena-0", topic.name()));
            (0..3).for_each(|_| use_it(&bus, &topic, &mut random));
            for round in 0..ROUNDS {
                garble(&mut random, &log, &arena);
                let started = Instant::now();
                use_it(&bus, &topic, &mut random);
                assert!(started.elapsed() < LIMIT, "{mode} {n} {round}");
                sound.publish(b"sound").unwrap();
                assert_eq!(reader.recv_timeout(LIMIT).unwrap().as_bytes(), b"sound");
            }
            bus.remove_topic(topic.name(), true).unwrap();
            assert_eq!(scene.server("coordinator"), coordinator, "{mode} {n}: the coordinator died");
        }
    }
}

/// A garbled message is its readers' affair: whoever begins elsewhere does not meet it, and whoever begins at it is told.
#[test]
fn one_garbled_message_keeps_nobody_from_joining() {
    let scene = Scene::new("joining");
    let bus = scene.open();
    let topic = of_mode(Mode::Many, Topic::<[u8]>::new("one.garbled")).messages(64).bytes(4096);
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    publisher.publish(&[0]).unwrap();
    publisher.publish_batch([&[1][..], &[2]]).unwrap();
    (3..7u8).for_each(|number| assert_eq!(publisher.publish(&[number]).unwrap().get(), number.into()));
    let log = segment(&scene, "one.garbled:log");
    // The batch, and message 4: their records' places.
    for garbled in [1, 3] {
        let (entry, mut word) = (BODY + RING + 8 * garbled, [0; 8]);
        log.read_exact_at(&mut word, entry).unwrap();
        log.write_all_at(&(u64::from_le_bytes(word) ^ 1 << 4).to_le_bytes(), entry).unwrap();
    }
    let open = |start| bus.subscriber(topic.clone()).start(start).open().unwrap();
    for (asked, begins) in [(1, 1), (2, 1), (4, 4)] {
        let mut subscriber = open(Start::Sequence(Sequence::new(asked)));
        assert_eq!(bus.topic("one.garbled").unwrap().subscribers[0].sequence, begins);
        let outcome = subscriber.try_recv().map(|message| message.map(|m| m.as_bytes().to_vec()));
        assert!(matches!(outcome, Err(RecvError::Corrupt(_))), "{asked}: {outcome:?}");
    }
    let sound = [(Start::Oldest, 0), (Start::Sequence(Sequence::new(3)), 3), (Start::Last(2), 5), (Start::Last(1), 6)];
    for (start, expected) in sound {
        let mut subscriber = open(start);
        let message = subscriber.try_recv().unwrap().unwrap();
        assert_eq!((message.sequence().get(), message.as_bytes()), (expected, &[expected as u8][..]), "{start:?}");
    }
}

/// A topic that dropped out because it was garbled has been read in part: a new coordinator does not begin it again.
#[test]
fn what_a_wildcard_has_given_up_stays_away() {
    let scene = Scene::new("given-up");
    let bus = scene.open();
    let mut wildcard = bus.wildcard::<[u8]>("given.*").open().unwrap();
    let topic = of_mode(Mode::Many, Topic::<[u8]>::new("given.up")).messages(64).bytes(4096);
    let mut publisher = bus.publisher(topic).unwrap();
    publisher.publish(b"sound").unwrap();
    assert_eq!(wildcard.recv_timeout(LIMIT).unwrap().as_bytes(), b"sound");
    let (log, second) = (segment(&scene, "given.up:log"), BODY + RING + 8);
    publisher.publish(b"garbled").unwrap();
    // Its record's place.
    let mut word = [0; 8];
    log.read_exact_at(&mut word, second).unwrap();
    log.write_all_at(&(u64::from_le_bytes(word) ^ 1 << 4).to_le_bytes(), second).unwrap();
    let outcome = wildcard.recv_timeout(LIMIT).map(|message| message.as_bytes().to_vec());
    assert!(matches!(outcome, Err(WildcardError::Corrupt { .. })), "{outcome:?}");
    // What is sound again could be read again.
    log.write_all_at(&word, second).unwrap();
    await_that("its end", || bus.topic("given.up").unwrap().subscribers.is_empty());
    kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
    // In force before it is answered.
    bus.publisher(Topic::<[u8]>::new("given.new")).unwrap().publish(b"new").unwrap();
    assert_eq!(wildcard.recv_timeout(LIMIT).unwrap().as_bytes(), b"new");
    assert_eq!(wildcard.topics().collect::<Vec<_>>(), ["given.new"]);
}

/// Who may write one of a route's inputs has no part in the others.
#[test]
fn a_route_gives_up_a_garbled_input_and_goes_on_with_the_others() {
    let scene = Scene::new("routed");
    let bus = scene.open();
    let input = |name: &str| of_mode(Mode::Many, Topic::<[u8]>::named(name)).messages(64).bytes(4096);
    let mut garbled = bus.publisher(input("in.garbled")).unwrap();
    let _liar = bus.publisher(input("in.liar")).unwrap();
    let mut sound = bus.publisher(input("in.sound")).unwrap();
    let mut route = bus.route("in.*", "out").open().unwrap();
    garbled.publish(b"sound").unwrap();
    garbled.publish(b"garbled").unwrap();
    assert!(route.step(LIMIT).unwrap());
    let (log, second) = (segment(&scene, "in.garbled:log"), BODY + RING + 8);
    // Its record's place.
    let mut word = [0; 8];
    log.read_exact_at(&mut word, second).unwrap();
    log.write_all_at(&(u64::from_le_bytes(word) ^ 1 << 4).to_le_bytes(), second).unwrap();
    // The topic's state, that the bus was stopped, and that readers are to look at it.
    segment(&scene, "in.liar:log").write_all_at(&2_u32.to_le_bytes(), BODY).unwrap();
    segment(&scene, "in.liar:cursors").write_all_at(&2_u32.to_le_bytes(), BODY).unwrap();
    for _ in 0..3 {
        sound.publish(b"sound").unwrap();
        assert!(route.step(LIMIT).unwrap());
    }
    assert!(!route.step(Duration::from_millis(100)).unwrap());
    let is_corrupt = |(name, why): (&str, &Refusal)| matches!(why, Refusal::Corrupt { topic, .. } if topic == name);
    assert!(route.passed_over().all(is_corrupt));
    let given_up: BTreeSet<&str> = route.passed_over().map(|(name, _)| name).collect();
    assert_eq!(given_up, BTreeSet::from(["in.garbled", "in.liar"]));
    assert_eq!(route.topics().collect::<Vec<_>>(), ["in.sound"]);
    bus.stop().unwrap();
    assert!(route.step(LIMIT).is_err());
}

/// What a look at garbage may take at most, a debug build and other tests at work included; a few milliseconds otherwise.
const PROMPT: Duration = Duration::from_secs(1);

/// Of a ring with 131,072 entries.
const MANY: u64 = 1 << 16;

fn prompt<R>(what: &str, work: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let result = work();
    assert!(started.elapsed() < PROMPT, "{what} took {:?}", started.elapsed());
    result
}

/// Commits every entry from `from` on in the first lap of a ring of many: one message each, whose record is at `unit`.
fn fill(log: &File, from: u64, unit: impl FnOnce(u64) -> u64) {
    let number = |at| {
        let mut bytes = [0; 8];
        log.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    };
    let (slots, unit_bits) = (number(48), number(56) >> 32);
    let word = 1 << (unit_bits + 10) | unit(unit_bits);
    let words = word.to_le_bytes().repeat((slots - from) as usize);
    log.write_all_at(&words, BODY + RING + 8 * from).unwrap();
}

/// The coordinator looks for where a group stands, and others wait for it meanwhile.
#[test]
fn a_group_whose_cursor_is_garbled_is_refused_at_once() {
    let scene = Scene::new("nowhere");
    let bus = scene.open();
    let topic = of_mode(Mode::Many, Topic::<[u8]>::new("nowhere")).messages(MANY).bytes(4096);
    bus.create(&topic).unwrap();
    bus.create_group("nowhere", "group", &GroupOptions::new(), Start::Oldest, false).unwrap();
    let cursors = segment(&scene, "nowhere:cursors");
    cursors.write_all_at(&(1u64 << 40).to_le_bytes(), BODY + 384).unwrap();
    // So that the tail is far from every checkpoint.
    fill(&segment(&scene, "nowhere:log"), 0, |_| 0);
    let refused = prompt("opening a consumer", || bus.consumer(topic.clone(), "group").open()).err();
    assert!(matches!(refused, Some(OpenError::Refused(Refusal::Corrupt { .. }))), "{refused:?}");
}

/// Fences have no record that says where they are, so it is counted from the next one that has.
#[test]
fn a_ring_of_fences_does_not_keep_the_coordinator() {
    let scene = Scene::new("fences");
    let bus = scene.open();
    let topic = of_mode(Mode::Many, Topic::<[u8]>::new("fences")).messages(MANY).bytes(4096).envelope();
    bus.create(&topic).unwrap();
    let options = GroupOptions::new().window(1 << 14);
    bus.create_group("fences", "group", &options, Start::Oldest, false).unwrap();
    fill(&segment(&scene, "fences:log"), 0, |unit_bits| (1 << unit_bits) - 1);
    // Longer than it takes until the coordinator looks at what has expired.
    let end = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < end {
        prompt("a request", || bus.topics().unwrap());
    }
}

/// Who looks for a number's sequence meets all that is retained, and asks once for what is not there.
#[test]
fn entries_that_point_to_no_arena_cost_one_question() {
    let scene = Scene::new("no-arena");
    let bus = scene.open();
    let topic = of_mode(Mode::Many, Topic::<[u8]>::new("no.arena")).messages(MANY).bytes(4096).dedup();
    let mut publisher = bus.publisher_as(topic, "name").unwrap();
    publisher.publish_numbered(b"first", 1).unwrap();
    let log = segment(&scene, "no.arena:log");
    let mut arena_bytes = [0; 8];
    log.read_exact_at(&mut arena_bytes, 64).unwrap();
    fill(&log, 1, |_| 5 * u64::from_le_bytes(arena_bytes) / 64);
    let again = prompt("a repeated number", || publisher.publish_numbered(b"first", 1));
    assert_eq!(again, Err(PublishError::Duplicate { sequence: Some(Sequence::new(0)) }));
}
