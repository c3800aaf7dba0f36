//! Wildcard subscriptions and waiting on several handles: nothing of a new topic is missed, whoever dies meanwhile.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, Process, Scene, await_that, end_with_the_test, hear, number, say, small};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use shmbus::{
    Bus, Full, GoneReason, NameError, OpenError, Publisher, Refusal, Start, Topic, TopicOptions, Wait, WildcardError,
    WildcardSubscriber, wait_any,
};

/// What comes next: topic, sequence and payload.
fn next(subscriber: &mut WildcardSubscriber<[u8]>) -> (String, u64, Vec<u8>) {
    let message = subscriber.recv_timeout(LIMIT).unwrap();
    (message.topic().to_owned(), message.sequence().get(), message.to_vec())
}

fn open(bus: &Bus, pattern: &str) -> WildcardSubscriber<[u8]> {
    bus.wildcard(pattern).open().unwrap()
}

fn subscribers(bus: &Bus, topic: &str) -> usize {
    bus.topic(topic).unwrap().subscribers.len()
}

/// Plays the other processes of these tests; nothing to see when run by hand.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    match role.as_str() {
        "creator" => create_and_publish(&arguments),
        "reader" => read(&arguments),
        "parked" => park(&arguments),
        "short" => read_short_of_descriptors(&arguments),
        other => panic!("unknown role {other}"),
    }
}

/// Creates `count` topics, alternately in both ways, and publishes to each at once.
fn create_and_publish(count: &str) {
    end_with_the_test();
    let bus = Bus::open_default().unwrap();
    let mut publishers = Vec::new();
    for number in 0..count.parse::<u64>().unwrap() {
        let topic = small(&format!("race.{number}"));
        let topic = if number % 3 == 0 { topic.exclusive() } else { topic };
        if number % 2 == 0 {
            bus.create(&topic).unwrap();
        }
        let mut publisher = bus.publisher(topic).unwrap();
        publisher.publish(&number.to_le_bytes()).unwrap();
        publisher.publish(&[]).unwrap();
        publishers.push(publisher);
    }
    say("done");
    thread::sleep(LIMIT);
}

/// Opens a wildcard subscription and holds it.
fn read(pattern: &str) {
    let bus = Bus::open_default().unwrap();
    let _subscriber = open(&bus, pattern);
    say("open");
    hear();
}

/// Opens a wildcard subscription and takes all descriptors that the process may have besides.
fn read_short_of_descriptors(pattern: &str) {
    let bus = Bus::open_default().unwrap();
    let mut subscriber = open(&bus, pattern);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.min(256), hard).unwrap();
    let mut taken: Vec<fs::File> = std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect();
    say("ready");
    hear();
    say(&subscriber.recv_timeout(LIMIT).map(drop).unwrap_err().to_string());
    taken.clear();
    say(&next(&mut subscriber).0);
}

/// Sleeps on a pattern, says what woke it.
fn park(pattern: &str) {
    let bus = Bus::open_default().unwrap();
    let mut subscriber = bus.wildcard::<[u8]>(pattern).wait(Wait::Park).open().unwrap();
    say("open");
    loop {
        let message = subscriber.recv().unwrap();
        say(&format!("{} {}", message.topic(), message.len()));
    }
}

/// Creates or opens a publisher and publishes one message of `len` bytes.
fn publish(bus: &Bus, topic: &str, len: usize) -> Publisher<[u8]> {
    let mut publisher = bus.publisher(small(topic)).unwrap();
    publisher.publish(&vec![7; len]).unwrap();
    publisher
}

#[test]
fn patterns_choose_topics_and_starts_choose_messages() {
    let scene = Scene::new("choice");
    let bus = scene.open();
    for topic in ["orders.new", "orders.new.eu", "orders", "others.new"] {
        publish(&bus, topic, 3);
    }
    bus.create(&small("orders.channel").channel()).unwrap();
    let names = |subscriber: &WildcardSubscriber<[u8]>| {
        let mut names: Vec<String> = subscriber.topics().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(names(&open(&bus, "orders.*")), ["orders.new"]);
    assert_eq!(names(&open(&bus, "orders.>")), ["orders.new", "orders.new.eu"]);
    assert_eq!(names(&open(&bus, "*.new")), ["orders.new", "others.new"]);
    assert_eq!(open(&bus, ">").topics().count(), 4);
    assert!(open(&bus, "orders.>").try_recv().unwrap().is_none(), "latest is the default");
    let mut oldest = bus.wildcard::<[u8]>("orders.>").start(Start::Oldest).open().unwrap();
    let mut got = [next(&mut oldest).0, next(&mut oldest).0];
    got.sort();
    assert_eq!(got, ["orders.new", "orders.new.eu"]);
    assert!(oldest.try_recv().unwrap().is_none());
    assert_eq!(bus.wildcard::<u64>(">").open().unwrap().topics().count(), 0, "raw topics are not of a type");
    let bad = bus.wildcard::<[u8]>("orders.>.x").open().err().unwrap();
    assert!(matches!(bad, OpenError::Refused(Refusal::Name { source: NameError::Wildcard, .. })), "{bad}");
}

#[test]
fn the_first_message_of_a_new_topic_is_never_missed() {
    const TOPICS: u64 = 240;
    let scene = Scene::new("race");
    let bus = scene.open();
    let mut subscriber = open(&bus, "race.*");
    let mut creator = scene.start("creator", &TOPICS.to_string());
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    for _ in 0..2 * TOPICS {
        let (topic, sequence, payload) = next(&mut subscriber);
        let expected = seen.entry(topic.clone()).or_default();
        assert_eq!(sequence, *expected, "{topic} is out of order");
        if sequence == 0 {
            let number = number(&payload);
            assert_eq!(topic, format!("race.{number}"));
        }
        *expected += 1;
    }
    assert_eq!(seen.len() as u64, TOPICS);
    creator.expect("done");
}

#[test]
fn topics_take_turns() {
    let scene = Scene::new("turns");
    let bus = scene.open();
    let mut subscriber = open(&bus, "turn.*");
    let mut publishers: Vec<_> = (0..4).map(|n| bus.publisher(small(&format!("turn.{n}"))).unwrap()).collect();
    for publisher in &mut publishers {
        (0..8).for_each(|_| assert!(publisher.publish(b"x").is_ok()));
    }
    for round in 0..8 {
        let mut topics: Vec<String> = (0..4)
            .map(|_| next(&mut subscriber))
            .map(|(topic, at, _)| {
                assert_eq!(at, round);
                topic
            })
            .collect();
        topics.sort();
        topics.dedup();
        assert_eq!(topics.len(), 4, "a topic came twice in one round");
    }
}

#[test]
fn losses_name_their_topic_and_removed_topics_drop_out() {
    let scene = Scene::new("losses");
    let bus = scene.open();
    let mut subscriber = open(&bus, "loss.*");
    let mut fast = bus.publisher(small("loss.fast").full(Full::Overwrite)).unwrap();
    let _slow = publish(&bus, "loss.slow", 5);
    (0..5000).for_each(|_| assert!(fast.publish(b"x").is_ok()));
    let (mut lost, mut slow) = (0, 0);
    while lost == 0 || slow == 0 {
        match subscriber.recv_timeout(LIMIT) {
            Ok(message) if message.topic() == "loss.slow" => slow += 1,
            Ok(_) => {}
            Err(WildcardError::Lagged { topic, from, to }) => {
                assert_eq!((topic.as_str(), from.get()), ("loss.fast", 0));
                lost = to.get();
            }
            Err(error) => panic!("{error}"),
        }
    }
    bus.remove_topic("loss.fast", true).unwrap();
    await_that("the topic's going", || {
        while subscriber.try_recv().unwrap().is_some() {}
        subscriber.topics().count() == 1
    });
    publish(&bus, "loss.fast", 9);
    assert_eq!(next(&mut subscriber), ("loss.fast".to_owned(), 0, vec![7; 9]), "the next topic of that name");
    bus.stop().unwrap();
    let end = loop {
        match subscriber.recv_timeout(LIMIT) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(end, WildcardError::Gone(GoneReason::Stopped)), "{end}");
}

#[test]
fn a_wildcard_without_topics_learns_of_the_buss_end() {
    let scene = Scene::new("empty");
    let bus = scene.open();
    let mut subscriber = bus.wildcard::<[u8]>("none.*").wait(Wait::Park).open().unwrap();
    let stopper = scene.open();
    let waiting = thread::spawn(move || subscriber.recv().map(|message| message.len()).unwrap_err());
    stopper.stop().unwrap();
    assert!(matches!(waiting.join().unwrap(), WildcardError::Gone(GoneReason::Stopped)));
}

#[test]
fn a_wildcard_survives_the_coordinators_death() {
    let scene = Scene::new("survival");
    let bus = scene.open();
    let mut subscriber = open(&bus, "s.>");
    publish(&bus, "s.before", 1);
    for round in 0..5 {
        nix::sys::signal::kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
        // Another process: the subscriber's own connection stays broken until the notice wakes it.
        let other = scene.open();
        let topic = format!("s.after.{round}");
        publish(&other, &topic, 10 + round);
        assert_eq!(subscribers(&other, &topic), 1, "the cursor was not in force");
        loop {
            let (name, sequence, payload) = next(&mut subscriber);
            if name == topic {
                assert_eq!((sequence, payload.len()), (0, 10 + round));
                break;
            }
            assert_eq!((name.as_str(), round), ("s.before", 0));
        }
    }
    drop(subscriber);
    await_that("the cursors' release", || subscribers(&bus, "s.before") == 0 && subscribers(&bus, "s.after.4") == 0);
}

/// A kill at any moment of the creation: the cursor is in force, or the topic does not exist.
#[test]
fn no_kill_of_the_coordinator_makes_a_topic_escape() {
    const TOPICS: u64 = 60;
    let scene = Scene::new("escape");
    let bus = scene.open();
    let mut subscriber = open(&bus, "race.*");
    let mut creator = scene.start("creator", &TOPICS.to_string());
    let firsts = thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..6 {
                thread::sleep(Duration::from_millis(23));
                for pid in scene.servers(Some("coordinator")) {
                    let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
                }
            }
        });
        (0..2 * TOPICS).filter(|_| next(&mut subscriber).1 == 0).count() as u64
    });
    creator.expect("done");
    assert_eq!(firsts, TOPICS);
}

#[test]
fn a_dead_wildcard_reader_releases_everything() {
    let scene = Scene::new("release");
    let bus = scene.open();
    let mut publisher = publish(&bus, "d.old", 1);
    let mut reader = scene.start("reader", "d.>");
    reader.expect("open");
    publish(&bus, "d.new", 1);
    assert_eq!((subscribers(&bus, "d.old"), subscribers(&bus, "d.new")), (1, 1));
    assert_eq!(publisher.readers().subscribers, 1);
    reader.kill();
    await_that("both cursors", || subscribers(&bus, "d.old") == 0 && subscribers(&bus, "d.new") == 0);
    assert_eq!(publisher.readers().subscribers, 0);
    (0..100).for_each(|_| assert!(publisher.publish(b"x").is_ok()));
    publish(&bus, "d.later", 1);
    assert_eq!(subscribers(&bus, "d.later"), 0, "the subscription is gone");
}

#[test]
fn limits_are_told() {
    let scene = Scene::new("limits");
    let bus = scene.open();
    let mut full: Vec<_> = (0..16).map(|_| open(&bus, "limit.*")).collect();
    let refused = bus.wildcard::<[u8]>("limit.*").open().err().unwrap();
    assert!(matches!(refused, OpenError::Refused(Refusal::Limit { limit: 16, .. })), "{refused}");
    let options = TopicOptions { max_subscribers: 15, ..small("limit.a").options() };
    assert!(!bus.create_topic("limit.a", &options, false).unwrap());
    assert_eq!(subscribers(&bus, "limit.a"), 15);
    let missed = full.iter_mut().filter_map(|wildcard| match wildcard.try_recv() {
        Ok(message) => message.map(|message| panic!("{:?}", message.topic())),
        Err(WildcardError::Missed { topic, why }) => Some((topic, why)),
        Err(error) => panic!("{error}"),
    });
    let missed: Vec<_> = missed.collect();
    assert!(matches!(&missed[..], [(topic, Refusal::Limit { limit: 15, .. })] if topic == "limit.a"), "{missed:?}");
    assert!(full.iter_mut().all(|wildcard| wildcard.try_recv().unwrap().is_none()), "it is told once");
    publish(&bus, "limit.a", 1);
    publish(&bus, "limit.b", 1);
    let with_b = full.iter_mut().filter(|wildcard| wildcard.topics().any(|topic| topic == "limit.b")).count();
    let read: usize =
        full.iter_mut().map(|wildcard| std::iter::from_fn(|| wildcard.try_recv().unwrap().map(drop)).count()).sum();
    assert_eq!((read, with_b), (15 + 16, 0), "the others go on");
}

/// Who finds no place on a topic of others has the others all the same.
#[test]
fn a_full_topic_does_not_keep_a_wildcard_from_the_rest() {
    let scene = Scene::new("full");
    let bus = scene.open();
    let options = TopicOptions { max_subscribers: 1, ..small("full.a").options() };
    bus.create_topic("full.a", &options, false).unwrap();
    publish(&bus, "full.b", 1);
    let _taken = bus.subscriber(small("full.a")).open().unwrap();
    let mut wildcard = bus.wildcard::<[u8]>("full.*").start(Start::Oldest).open().unwrap();
    match wildcard.try_recv() {
        Err(WildcardError::Missed { topic, why: Refusal::Limit { limit: 1, .. } }) => assert_eq!(topic, "full.a"),
        other => panic!("{:?}", other.map(drop)),
    }
    assert_eq!(wildcard.recv_timeout(LIMIT).unwrap().topic(), "full.b");
    // A successor of the coordinator does not tell it again.
    kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
    await_that("the next", || bus.topic("full.b").is_ok());
    publish(&bus, "full.c", 1);
    assert_eq!(wildcard.recv_timeout(LIMIT).unwrap().topic(), "full.c");
}

/// The subscription's owner has no room for one more handle; the topic's creator is not concerned.
#[test]
fn a_wildcard_at_its_limit_misses_a_topic_and_is_told() {
    let scene = Scene::new("short");
    let bus = scene.open();
    let mut short = scene.start("short", "short.>");
    short.expect("ready");
    let mut publisher = bus.publisher(small("short.of.descriptors")).unwrap();
    publisher.publish(b"first").unwrap();
    short.tell("look");
    let said = short.line();
    assert!(said.contains("short.of.descriptors") && said.contains("missed") && said.contains("ulimit"), "{said}");
    await_that("the place it could not take", || subscribers(&bus, "short.of.descriptors") == 0);
    publish(&bus, "short.no.more", 1);
    short.expect("short.no.more");
}

#[test]
fn a_parked_wildcard_uses_no_processor_and_wakes() {
    let scene = Scene::new("parked");
    let bus = scene.open();
    let mut publishers: Vec<_> = (0..50).map(|n| bus.publisher(small(&format!("p.{n}"))).unwrap()).collect();
    let mut parked = scene.start("parked", "p.*");
    parked.expect("open");
    let before = processor_time(&parked);
    thread::sleep(Duration::from_millis(1500));
    let used = processor_time(&parked) - before;
    assert!(used <= Duration::from_millis(30), "a sleeper used {used:?} in 1.5 s");
    for round in 0..200 {
        let chosen = round * 7 % publishers.len();
        let since = Instant::now();
        publishers[chosen].publish(&vec![1; round]).unwrap();
        parked.expect(&format!("p.{chosen} {round}"));
        // It looks again after a second by itself, which would hide a lost wake-up.
        assert!(since.elapsed() < Duration::from_millis(900), "a wake-up was lost");
    }
    for round in 0..50 {
        let since = Instant::now();
        publish(&bus, &format!("p.new{round}"), 3);
        parked.expect(&format!("p.new{round} 3"));
        assert!(since.elapsed() < Duration::from_millis(900), "the wake-up for a new topic was lost");
    }
}

/// User and system time of a process, in steps of 10 ms.
fn processor_time(process: &Process) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[test]
fn one_thread_waits_on_several_subscribers() {
    let scene = Scene::new("several");
    let bus = scene.open();
    let mut raw = bus.publisher(small("w.raw")).unwrap();
    let mut typed = bus.publisher(Topic::<u64>::named("w.typed").messages(16).exclusive()).unwrap();
    let mut a = bus.subscriber(small("w.raw")).open().unwrap();
    let mut b = bus.subscriber(Topic::<u64>::named("w.typed").exclusive()).open().unwrap();
    let mut c = open(&bus, "x.*");
    let soon = Some(Duration::from_millis(20));
    assert_eq!(wait_any(&mut [&mut a, &mut b, &mut c], soon), None);
    assert_eq!(wait_any(&mut [], None), None);
    let (go, wait_for_go) = std::sync::mpsc::channel::<u64>();
    let other = scene.open();
    let feeding = thread::spawn(move || {
        for number in wait_for_go {
            match number % 3 {
                0 => drop(raw.publish(&number.to_le_bytes()).unwrap()),
                1 => drop(typed.publish(&number).unwrap()),
                _ => drop(publish(&other, &format!("x.{number}"), number as usize)),
            }
        }
    });
    for number in 0..300 {
        go.send(number).unwrap();
        let since = Instant::now();
        let ready = loop {
            let ready = wait_any(&mut [&mut a, &mut b, &mut c], Some(LIMIT)).unwrap();
            let got = match ready {
                0 => a.try_recv().unwrap().map(|m| u64::from_le_bytes(m.to_vec().try_into().unwrap())),
                1 => b.try_recv().unwrap().map(|m| *m),
                _ => c.try_recv().unwrap().map(|m| m.len() as u64),
            };
            if let Some(got) = got {
                assert_eq!(got, number);
                break ready;
            }
        };
        assert_eq!(ready as u64, number % 3);
        assert!(since.elapsed() < Duration::from_millis(900), "a wake-up was lost at {number}");
    }
    drop(go);
    feeding.join().unwrap();
}

/// Who waits gives back what it has read: a publisher may be waiting for it.
#[test]
fn waiting_on_several_gives_back_what_was_read() {
    let scene = Scene::new("givesback");
    let bus = scene.open();
    for topic in [small("tight.many"), small("tight.exclusive").exclusive()] {
        let topic = topic.messages(64).full(Full::Reject);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic).open().unwrap();
        publisher.publish(b"1").unwrap();
        assert_eq!(subscriber.recv_timeout(LIMIT).unwrap().as_bytes(), b"1");
        assert_eq!(wait_any(&mut [&mut subscriber], Some(Duration::from_millis(5))), None);
        (0..64).for_each(|_| assert!(publisher.publish(b"x").is_ok(), "what was read is held yet"));
    }
}

#[test]
fn an_ephemeral_topic_goes_with_its_creator() {
    let scene = Scene::new("ephemeral");
    let (bus, other) = (scene.open(), scene.open());
    bus.create_ephemeral("mine", &small("mine").options()).unwrap();
    assert!(matches!(
        other.create_ephemeral("mine", &small("mine").options()),
        Err(OpenError::Refused(Refusal::AlreadyExists { .. }))
    ));
    let mut subscriber = other.subscriber(small("mine")).open().unwrap();
    nix::sys::signal::kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
    assert!(bus.topic("mine").is_ok(), "a restart keeps it");
    drop(bus);
    let end = subscriber.recv_timeout(LIMIT).map(|message| message.len()).unwrap_err();
    assert_eq!(end, shmbus::RecvError::Gone(GoneReason::Removed));
    assert!(other.topic("mine").is_err());
}

#[test]
fn readers_are_counted_without_the_coordinator() {
    let scene = Scene::new("counted");
    let bus = scene.open();
    for topic in [small("c.many"), small("c.exclusive").exclusive()] {
        let publisher = bus.publisher(topic.clone()).unwrap();
        assert_eq!((publisher.readers().subscribers, publisher.readers().any()), (0, false));
        let first = bus.subscriber(topic.clone()).open().unwrap();
        let second = bus.subscriber(topic.clone()).droppable().open().unwrap();
        assert_eq!(publisher.readers().subscribers, 2);
        nix::sys::signal::kill(scene.server("keeper"), Signal::SIGSTOP).unwrap();
        drop(first);
        assert_eq!(publisher.readers().subscribers, 1);
        drop(second);
        assert!(!publisher.readers().any());
        nix::sys::signal::kill(scene.server("keeper"), Signal::SIGCONT).unwrap();
    }
}

#[test]
fn the_command_line_reads_patterns() {
    let scene = Scene::new("cli");
    let bus = scene.open();
    publish(&bus, "orders.old", 3);
    let args = ["sub", "orders.>", "--from", "oldest", "--count", "2"];
    let plain = scene.shmbus(&args).spawn().unwrap();
    let json = scene.shmbus(&[&args[..], &["--json"]].concat()).spawn().unwrap();
    await_that("both", || subscribers(&bus, "orders.old") == 2);
    publish(&bus, "orders.new.eu", 4);
    let plain = plain.wait_with_output().unwrap();
    assert_eq!((plain.status.code(), plain.stdout), (Some(0), vec![7; 7]));
    let lines = String::from_utf8(json.wait_with_output().unwrap().stdout).unwrap();
    assert!(lines.contains(r#""topic":"orders.old""#) && lines.contains(r#""topic":"orders.new.eu""#), "{lines}");
    let bad = scene.shmbus(&["sub", "orders.>.x"]).output().unwrap();
    assert_eq!(bad.status.code(), Some(2));
}
