//! Topics with envelopes: keys, headers, ids, expiry, retention by age, purge and peek, starts that go by them.

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use common::{LIMIT, LOGS, MODES, Random, Scene, SetAtEnd, await_that, of_mode, raw, seed};
use serde_json::Value;
use shmbus::{
    Bus, Channel, Envelope, EnvelopeError, Full, Mode, OpenError, PublishError, Publisher, RecvError, Refusal,
    Sequence, Start, Subscriber, Topic, TopicOptions,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Long enough for anything here to happen, short enough to wait for.
const SHORT: Duration = Duration::from_millis(50);

fn now_ns() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64
}

fn open(bus: &Bus, topic: &Topic<[u8]>, start: Start) -> Subscriber<[u8]> {
    bus.subscriber(topic.clone()).start(start).open().unwrap()
}

/// The payloads that are there now.
fn texts(subscriber: &mut Subscriber<[u8]>) -> Vec<String> {
    let mut texts = Vec::new();
    while let Some(message) = subscriber.try_recv().unwrap() {
        texts.push(String::from_utf8(message.to_vec()).unwrap());
    }
    texts
}

fn send(publisher: &mut Publisher<[u8]>, texts: &[&str]) {
    for text in texts {
        publisher.publish(text.as_bytes()).unwrap();
    }
}

fn shmbus(scene: &Scene, bus: &Bus, arguments: &[&str], input: &[u8]) -> Output {
    use std::io::Write;
    let mut command = Command::new(env!("CARGO_BIN_EXE_shmbus"));
    command.args(arguments).env("SHMBUS_DIR", scene.directory()).env("SHMBUS_BUS", bus.name());
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn ok(scene: &Scene, bus: &Bus, arguments: &[&str], input: &[u8]) -> String {
    let output = shmbus(scene, bus, arguments, input);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn what_goes_with_a_message_comes_back() {
    let scene = Scene::new("back");
    let bus = scene.open();
    for (mode, full) in MODES.into_iter().map(|mode| (mode, Full::Block)).chain(LOGS.map(|m| (m, Full::Overwrite))) {
        let topic = of_mode(mode, Topic::<[u8]>::named(format!("back.{mode}.{full}")).envelope().full(full));
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = open(&bus, &topic, Start::Latest);
        let rich = Envelope::new().key(b"k\0\xff").id(&[7; 32]).header("a", b"1").header("b", b"").header("a", b"2");
        let before = now_ns();
        publisher.publish_with(b"rich", &rich).unwrap();
        publisher.publish(b"plain").unwrap();
        publisher.publish_with(&[5; 300], &Envelope::new().key(&[b'x'; 255])).unwrap();
        let after = now_ns();

        let message = subscriber.recv_timeout(LIMIT).unwrap();
        assert_eq!(&*message, b"rich");
        assert_eq!((message.key(), message.id()), (Some(&b"k\0\xff"[..]), Some(&[7; 32][..])), "{mode}");
        let headers: Vec<_> = message.headers().collect();
        assert_eq!(headers, [("a", &b"1"[..]), ("b", &b""[..]), ("a", &b"2"[..])]);
        assert_eq!((message.header("a"), message.header("c")), (Some(&b"1"[..]), None));
        assert!((before..=after).contains(&message.timestamp_ns().unwrap()));

        let message = subscriber.recv_timeout(LIMIT).unwrap();
        assert_eq!(&*message, b"plain");
        assert_eq!((message.key(), message.id(), message.headers().count()), (None, None, 0));
        assert!((before..=after).contains(&message.timestamp_ns().unwrap()));

        let message = subscriber.recv_timeout(LIMIT).unwrap();
        assert_eq!((&*message, message.key()), (&[5; 300][..], Some(&[b'x'; 255][..])));
    }
}

#[test]
fn batches_and_loans_have_envelopes() {
    let scene = Scene::new("batches");
    let bus = scene.open();
    for mode in MODES {
        let topic = raw(mode, "batches").envelope();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = open(&bus, &topic, Start::Latest);
        let envelopes: Vec<Envelope> = (0..20u8).map(|n| Envelope::new().key(&vec![n; n.into()])).collect();
        let payloads: Vec<Vec<u8>> = (0..20u8).map(|n| vec![n; usize::from(n) * 9]).collect();
        let batch = payloads.iter().map(Vec::as_slice).zip(&envelopes);
        assert_eq!(publisher.publish_batch_with(batch).unwrap(), Sequence::new(0));
        publisher.publish_batch([&b"a"[..], b"b"]).unwrap();
        for len in [0, 24, 25, 5000] {
            let mut loan = publisher.loan_bytes(len).unwrap();
            assert_eq!(loan.len(), len);
            loan.fill(9);
            loan.publish().unwrap();
        }
        for n in 0..20u8 {
            let message = subscriber.recv_timeout(LIMIT).unwrap();
            assert_eq!(&*message, payloads[usize::from(n)], "{mode}");
            assert_eq!(message.key().unwrap_or_default(), vec![n; n.into()]);
        }
        for text in [&b"a"[..], b"b", b"", &[9; 24], &[9; 25], &[9; 5000]] {
            let message = subscriber.recv_timeout(LIMIT).unwrap();
            assert_eq!(&*message, text, "{mode}");
            assert!(message.timestamp_ns().unwrap() > 0);
        }
    }
}

/// As demanding as a payload may be.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Debug, PartialEq)]
#[repr(C, align(32))]
struct Wide([u64; 4]);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Debug, PartialEq)]
#[repr(C, align(16))]
struct Half([u64; 2]);

#[test]
fn typed_payloads_stay_aligned() {
    let scene = Scene::new("typed");
    let bus = scene.open();
    for mode in MODES {
        for full in if mode == Mode::Channel { &[Full::Block][..] } else { &[Full::Block, Full::Overwrite] } {
            let wide = of_mode(mode, Topic::<Wide>::named(format!("wide.{mode}.{full}")).envelope().full(*full));
            let mut publisher = bus.publisher(wide.clone()).unwrap();
            let mut subscriber = bus.subscriber(wide).open().unwrap();
            let keys: Vec<Envelope> = (0..40).map(|n| Envelope::new().key(&vec![b'k'; n])).collect();
            let payloads: Vec<Wide> = (0..40).map(|n| Wide([n; 4])).collect();
            publisher.publish_batch_with(payloads.iter().zip(&keys)).unwrap();
            publisher.publish_with(&Wide([40; 4]), &Envelope::new().header("h", b"v")).unwrap();
            let mut loan = publisher.loan().unwrap();
            *loan = Wide([41; 4]);
            loan.publish().unwrap();
            for n in 0..42 {
                let message = subscriber.recv_timeout(LIMIT).unwrap();
                assert_eq!(*message, Wide([n; 4]), "{mode} {full}");
                assert_eq!(message.key().map_or(0, <[u8]>::len) as u64, if n < 40 { n } else { 0 });
            }
        }
        // Fits in a slot, which is not aligned for it.
        let half = of_mode(mode, Topic::<Half>::named(format!("half.{mode}")).envelope());
        let mut publisher = bus.publisher(half.clone()).unwrap();
        let mut subscriber = bus.subscriber(half).open().unwrap();
        for n in 0..5 {
            publisher.publish(&Half([n; 2])).unwrap();
            assert_eq!(*subscriber.recv_timeout(LIMIT).unwrap(), Half([n; 2]), "{mode}");
        }
        let small = of_mode(mode, Topic::<u64>::named(format!("small.{mode}")).envelope());
        let mut publisher = bus.publisher(small.clone()).unwrap();
        let mut subscriber = bus.subscriber(small).open().unwrap();
        publisher.publish_with(&7, &Envelope::new().id(b"seven")).unwrap();
        let message = subscriber.recv_timeout(LIMIT).unwrap();
        assert_eq!((*message, message.id()), (7, Some(&b"seven"[..])), "{mode}");
    }
    let alone = Channel::create(Topic::<u64>::new("alone").envelope()).unwrap();
    alone.publisher().unwrap().publish_with(&8, &Envelope::new().key(b"eight")).unwrap();
    let mut receiver = alone.subscriber().unwrap();
    let message = receiver.recv_timeout(LIMIT).unwrap();
    assert_eq!((*message, message.key()), (8, Some(&b"eight"[..])));
}

#[test]
fn the_largest_message_fits_with_the_largest_envelope() {
    let scene = Scene::new("largest");
    let bus = scene.open();
    let headers = vec![1; 16_300];
    let envelope = Envelope::new().key(&[2; 255]).id(&[3; 32]).header("h", &headers);
    for mode in MODES {
        let topic = raw(mode, "largest").messages(4).bytes(4096).envelope();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = open(&bus, &topic, Start::Latest);
        for _ in 0..10 {
            publisher.publish_with(&[4; 4096], &envelope).unwrap();
            let message = subscriber.recv_timeout(LIMIT).unwrap();
            assert_eq!((message.as_bytes(), message.header("h")), (&[4; 4096][..], Some(&headers[..])), "{mode}");
            let _ = subscriber.try_recv().unwrap();
        }
        let four = [(&[5; 1024][..], &envelope); 4];
        let refused = publisher.publish_batch_with(four).unwrap_err();
        assert!(matches!(refused, PublishError::Envelope(EnvelopeError::Batch { .. })), "{refused}");
        publisher.publish_batch([&[5; 1024][..]; 4]).unwrap();
        assert_eq!(subscriber.recv_timeout(LIMIT).unwrap().as_bytes(), [5; 1024], "{mode}");
    }
}

#[test]
fn a_garbled_envelope_is_an_error_and_no_crash() {
    // Two header pages, then the first slot: its commit word, then envelope and payload.
    let (body_at, mut random) = (2 * 4096 + 8, Random::new(seed()));
    let topic = Topic::<[u8]>::new("garbled").messages(2).envelope();
    let channel = Channel::create(topic).unwrap();
    let memory = File::from(channel.as_fd().try_clone_to_owned().unwrap());
    let (mut sender, mut receiver) = (channel.publisher().unwrap(), channel.subscriber().unwrap());
    let (mut sound, mut corrupt) = (0, 0);
    for round in 0..2000 {
        sender.publish_with(b"payload", &Envelope::new().key(b"key")).unwrap();
        let mut garbage = [0; 48];
        random.fill(&mut garbage);
        let from = 16 + random.below(24) as usize;
        memory.write_all_at(&garbage[from..from + 1 + random.below(8) as usize], body_at + from as u64).unwrap();
        match receiver.try_recv() {
            Ok(Some(message)) => {
                sound += 1;
                assert!(message.key().unwrap_or_default().len() <= 255 && message.headers().count() < 100);
            }
            Ok(None) => panic!("round {round}: it does not expire"),
            Err(RecvError::Corrupt(_)) => corrupt += 1,
            Err(error) => panic!("{error}"),
        }
        sender.publish(b"next").unwrap();
        assert_eq!(receiver.recv_timeout(LIMIT).unwrap().as_bytes(), b"next", "round {round}");
    }
    assert!(sound > 0 && corrupt > 0, "{sound} sound, {corrupt} corrupt");
}

#[test]
fn what_does_not_fit_is_refused_with_found_and_max() {
    let scene = Scene::new("refused");
    let bus = scene.open();
    for mode in MODES {
        let mut lean = bus.publisher(raw(mode, "lean")).unwrap();
        let error = lean.publish_with(b"m", &Envelope::new().key(b"k")).unwrap_err();
        assert_eq!(error, PublishError::Envelope(EnvelopeError::LeanTopic));
        assert!(error.to_string().contains("--envelope"), "{error}");
        assert!(lean.publish_batch_with([(&b"m"[..], &Envelope::new().ttl(SHORT))]).is_err());
        assert_eq!(
            lean.publish_with(b"m", &Envelope::new()).unwrap(),
            Sequence::new(0),
            "{mode}: an empty one is fine"
        );

        let mut publisher = bus.publisher(raw(mode, "rich").envelope()).unwrap();
        let too_long = publisher.publish_with(b"m", &Envelope::new().key(&[0; 256])).unwrap_err();
        assert_eq!(too_long.to_string(), "a key of 256 bytes; a message takes at most 255");
        assert!(publisher.publish_with(b"m", &Envelope::new().id(&[0; 33])).is_err());
        assert!(publisher.publish_with(b"m", &Envelope::new().header("h", &[0; 16 << 10])).is_err());
        assert_eq!(publisher.publish(b"m").unwrap(), Sequence::new(0), "{mode}: what was refused took no place");
        let large = vec![0; (16 << 20) + 1];
        assert!(matches!(publisher.publish(&large), Err(PublishError::TooLarge { .. })));
    }
}

#[test]
fn options_that_need_the_envelope_say_so() {
    let scene = Scene::new("options");
    let bus = scene.open();
    let alone = [
        TopicOptions { dedup: true, ..TopicOptions::default() },
        TopicOptions { ttl_ms: 5, ..TopicOptions::default() },
        TopicOptions { max_age_ms: 5, ..TopicOptions::default() },
    ];
    for options in alone {
        let error = bus.create_topic("t", &options, false).unwrap_err();
        assert!(matches!(error, OpenError::Refused(Refusal::Options { .. })), "{error}");
        assert!(error.to_string().contains("--envelope"), "{error}");
    }
    let channel = Topic::<[u8]>::new("t").channel().max_age(SHORT);
    assert!(bus.create(&channel).unwrap_err().to_string().contains("until they are read"));
    bus.create(&Topic::<[u8]>::new("t").ttl(Duration::from_secs(5))).unwrap();
    let other = bus.create(&Topic::<[u8]>::new("t").ttl(Duration::from_secs(6))).unwrap_err();
    assert!(other.to_string().contains("ttl_ms is 5000, asked for 6000"), "{other}");
    for flags in [&["--dedup"][..], &["--ttl", "5s"], &["--max-age", "5s"]] {
        let output = shmbus(&scene, &bus, &[&["create", "u"], flags].concat(), b"");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

#[test]
fn expired_messages_are_skipped_and_counted() {
    let scene = Scene::new("expired");
    let bus = scene.open();
    for mode in MODES {
        let topic = raw(mode, "expired").messages(4).ttl(SHORT);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = open(&bus, &topic, Start::Latest);
        publisher.publish(b"dies").unwrap();
        publisher.publish_with(b"dies at once", &Envelope::new().ttl(Duration::ZERO)).unwrap();
        publisher.publish_with(b"lives", &Envelope::new().ttl(Duration::MAX)).unwrap();
        std::thread::sleep(2 * SHORT);
        let message = subscriber.recv_timeout(LIMIT).unwrap();
        assert_eq!((&*message, message.sequence().get()), (&b"lives"[..], 2), "{mode}");
        assert_eq!(subscriber.expired(), 2);
        // They have been read: a full ring of them makes room.
        for _ in 0..20 {
            publisher.publish_with(b"dies at once", &Envelope::new().ttl(Duration::ZERO)).unwrap();
            assert_eq!(subscriber.recv_timeout(Duration::ZERO).unwrap_err(), RecvError::TimedOut, "{mode}");
        }
        assert_eq!((subscriber.expired(), subscriber.lag()), (22, 0), "{mode}");
    }
}

#[test]
fn messages_that_grow_too_old_are_given_up() {
    let scene = Scene::new("age");
    let bus = scene.open();
    for mode in LOGS {
        let topic = raw(mode, "age").max_age(Duration::from_secs(1));
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut holder = open(&bus, &topic, Start::Latest);
        send(&mut publisher, &["a", "b"]);
        publisher.publish(&[b'c'; 500]).unwrap();
        publisher.publish_batch([&b"d"[..], b"e"]).unwrap();
        std::thread::sleep(Duration::from_millis(1200));
        assert_eq!(bus.topic(topic.name()).unwrap().oldest_sequence, 0, "{mode}: a subscriber holds them");
        assert_eq!(texts(&mut open(&bus, &topic, Start::Oldest)), [""; 0], "{mode}: a newcomer gets none");
        assert_eq!(texts(&mut holder).len(), 5, "{mode}");
        await_that("the old to go", || bus.topic(topic.name()).unwrap().oldest_sequence == 5);
        send(&mut publisher, &["young"]);
        assert_eq!(texts(&mut open(&bus, &topic, Start::Oldest)), ["young"], "{mode}");
        drop(holder);
        await_that("the young to grow old", || bus.topic(topic.name()).unwrap().oldest_sequence == 6);
        send(&mut publisher, &["last"]);
        assert_eq!(texts(&mut open(&bus, &topic, Start::Last(1))), ["last"], "{mode}: the topic goes on");
    }
}

#[test]
fn a_restarted_coordinator_goes_on_giving_up() {
    let scene = Scene::new("ageing");
    let bus = scene.open();
    let topic = raw(Mode::Many, "ageing").max_age(Duration::from_secs(1));
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    send(&mut publisher, &["a"]);
    let coordinator = scene.server("coordinator");
    nix::sys::signal::kill(coordinator, nix::sys::signal::Signal::SIGKILL).unwrap();
    await_that("another one", || {
        let servers = scene.servers(Some("coordinator"));
        servers.len() == 1 && servers[0] != coordinator
    });
    await_that("the old to go", || bus.topic(topic.name()).unwrap().oldest_sequence == 1);
}

#[test]
fn a_purge_leaves_what_is_held_and_says_by_whom() {
    let scene = Scene::new("purge");
    let bus = scene.open();
    for mode in LOGS {
        // It needs no envelope.
        let topic = raw(mode, "purge").messages(64).hold();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut holder = open(&bus, &topic, Start::Latest);
        let mut droppable = bus.subscriber(topic.clone()).start(Start::Oldest).droppable().open().unwrap();
        send(&mut publisher, &["0", "1", "2", "3"]);
        assert_eq!(holder.recv_timeout(LIMIT).unwrap().as_bytes(), b"0");
        let purged = bus.purge_topic(topic.name()).unwrap();
        assert_eq!((purged.oldest_before, purged.oldest_sequence, purged.tail_sequence), (0, 0, 4), "{mode}");
        assert_eq!((purged.holder, purged.holder_pid), (Some(0), Some(std::process::id())), "{mode}");
        assert_eq!(texts(&mut holder), ["1", "2", "3"], "{mode}: what is held stays whole");
        send(&mut publisher, &["4"]);
        let purged = bus.purge_topic(topic.name()).unwrap();
        assert_eq!((purged.oldest_sequence, purged.holder), (4, Some(0)), "{mode}");
        let lost = droppable.try_recv().map(|message| message.map(|message| message.to_vec()));
        assert_eq!(lost, Err(RecvError::Lagged { from: Sequence::new(0), to: Sequence::new(4) }), "{mode}");
        drop((holder, droppable));
        let purged = bus.purge_topic(topic.name()).unwrap();
        assert_eq!((purged.oldest_sequence, purged.tail_sequence, purged.holder), (5, 5, None), "{mode}");
        assert_eq!(texts(&mut open(&bus, &topic, Start::Oldest)), [""; 0]);
        // The ring goes round as before.
        let mut reader = open(&bus, &topic, Start::Oldest);
        for n in 0..3000u32 {
            publisher.publish(n.to_string().as_bytes()).unwrap();
            assert_eq!(texts(&mut reader), [n.to_string()]);
            if n % 100 == 0 {
                assert_eq!(bus.purge_topic(topic.name()).unwrap().holder, None);
            }
        }
        drop(publisher);
        send(&mut bus.publisher(topic.clone()).unwrap(), &["next"]);
        assert_eq!(texts(&mut reader), ["next"], "{mode}: the next publisher finds the tail");
    }
    let channel = raw(Mode::Channel, "purge");
    bus.create(&channel).unwrap();
    assert!(bus.purge_topic(channel.name()).unwrap_err().to_string().contains("receiver"));
}

#[test]
fn a_purge_under_fire_loses_nothing_that_is_held() {
    let scene = Scene::new("fire");
    let bus = scene.open();
    for mode in LOGS {
        // The arena holds fewer messages than the ring, so that memory is reused as soon as the gate allows it.
        let topic = raw(mode, "fire").messages(64).bytes(1024);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut reader = open(&bus, &topic, Start::Latest);
        let count = 50_000u64;
        let writer = std::thread::spawn(move || {
            for n in 0..count {
                publisher.publish(&n.to_le_bytes().repeat(100)).unwrap();
            }
        });
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    bus.purge_topic(topic.name()).unwrap();
                }
            });
            let _done = SetAtEnd(&done);
            for n in 0..count {
                let message = reader.recv_timeout(LIMIT).unwrap();
                assert_eq!((message.sequence().get(), message.to_vec()), (n, n.to_le_bytes().repeat(100)), "{mode}");
            }
        });
        writer.join().unwrap();
    }
}

#[test]
fn subscribers_start_at_a_time() {
    let scene = Scene::new("time");
    let bus = scene.open();
    for mode in LOGS {
        let topic = raw(mode, "time").envelope();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        send(&mut publisher, &["a", "b"]);
        std::thread::sleep(Duration::from_millis(2));
        let middle = SystemTime::now();
        publisher.publish_batch([&b"c"[..], b"d"]).unwrap();
        send(&mut publisher, &["e"]);
        assert_eq!(texts(&mut open(&bus, &topic, Start::Time(middle))), ["c", "d", "e"], "{mode}");
        assert_eq!(texts(&mut open(&bus, &topic, Start::Time(SystemTime::UNIX_EPOCH))).len(), 5);
        let mut later = open(&bus, &topic, Start::Time(SystemTime::now()));
        assert_eq!(texts(&mut later), [""; 0]);
        send(&mut publisher, &["f"]);
        assert_eq!(texts(&mut later), ["f"], "{mode}");
        assert_eq!(bus.topic(topic.name()).unwrap().subscribers.len(), 1);
    }
}

#[test]
fn subscribers_start_at_the_last_of_each_key() {
    let scene = Scene::new("keys");
    let bus = scene.open();
    for mode in LOGS {
        let topic = raw(mode, "keys").messages(16).envelope().hold();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let keyed = |publisher: &mut Publisher<[u8]>, key: &str, text: &str| {
            publisher.publish_with(text.as_bytes(), &Envelope::new().key(key.as_bytes())).unwrap();
        };
        for (key, text) in [("x", "x1"), ("y", "y1"), ("", "none1"), ("x", "x2"), ("", "none2"), ("z", "z1")] {
            keyed(&mut publisher, key, text);
        }
        publisher.publish_with(b"z2", &Envelope::new().key(b"z").ttl(Duration::ZERO)).unwrap();
        let mut subscriber = open(&bus, &topic, Start::LastPerKey);
        keyed(&mut publisher, "x", "x3");
        keyed(&mut publisher, "x", "x4");
        let found = ["y1", "x2", "none2", "z1", "x3", "x4"];
        assert_eq!(texts(&mut subscriber), found, "{mode}: then everything");
        assert_eq!(bus.topic(topic.name()).unwrap().subscribers.len(), 1, "{mode}: the search leaves nothing behind");
        drop(subscriber);
        await_that("its cursor to go", || bus.topic(topic.name()).unwrap().subscribers.is_empty());
        let room = (0..100).take_while(|_| publisher.try_publish(b"more").is_ok()).count();
        assert_eq!(room, 16 - 9, "{mode}: and counts as reading nothing");
        assert_eq!(texts(&mut open(&bus, &topic, Start::Oldest)).len(), 15, "{mode}");
    }
}

#[test]
fn starts_that_go_by_the_envelope_need_one() {
    let scene = Scene::new("lean");
    let bus = scene.open();
    for mode in MODES {
        let topic = raw(mode, "lean");
        bus.create(&topic).unwrap();
        for start in [Start::LastPerKey, Start::Time(SystemTime::now())] {
            let error = bus.subscriber(topic.clone()).start(start).open().err().unwrap();
            let what = if mode == Mode::Channel { "one reader" } else { "--envelope" };
            assert!(error.to_string().contains(what), "{mode}: {error}");
        }
        assert_eq!(
            bus.topic(topic.name()).unwrap().subscribers.len(),
            0,
            "{mode}: a refused one leaves nothing behind"
        );
    }
}

#[test]
fn the_command_line_carries_envelopes() {
    let scene = Scene::new("cli");
    let bus = scene.open();
    let run = |arguments: &[&str], input: &str| ok(&scene, &bus, arguments, input.as_bytes());
    run(&["create", "t", "--envelope", "--dedup", "--ttl", "1h", "--max-age", "10m"], "");
    let shown = &json(&run(&["show", "t", "--json"], ""))[0]["options"];
    assert_eq!(
        [&shown["envelope"], &shown["dedup"], &shown["ttl_ms"], &shown["max_age_ms"]],
        [&Value::from(true), &Value::from(true), &Value::from(3_600_000), &Value::from(600_000)]
    );
    let text = run(&["show", "t"], "");
    assert!(text.contains("envelope  timestamp, key, headers, id; expire after 3600s; given up after 600s"), "{text}");

    run(&["pub", "t", "--key", "k", "--header", "a=1", "--header", "b=x=y"], "one\ntwo\n");
    run(&["pub", "t", "--ttl", "1ms"], "dead\n");
    run(&["pub", "t"], "three\n");
    std::thread::sleep(SHORT);
    let lines = json(&run(&["sub", "t", "--from", "oldest", "--count", "3", "--json"], ""));
    assert_eq!((&lines[0]["key"], &lines[0]["payload"]), (&Value::from("k"), &Value::from("one\n")));
    assert_eq!(lines[0]["headers"], serde_json::json!({"a": "1", "b": "x=y"}));
    assert!(lines[0]["timestamp_ns"].as_u64().unwrap() <= now_ns());
    assert!(lines[0]["id"].is_null() && lines[2]["key"].is_null());
    assert_eq!((&lines[2]["payload"], &lines[2]["headers"]), (&Value::from("three\n"), &serde_json::json!({})));
    assert_eq!(lines[3], serde_json::json!({"topic": "t", "expired": 1}));

    let output = shmbus(&scene, &bus, &["sub", "t", "--from", "oldest", "--count", "3"], b"");
    assert_eq!(output.stdout, b"one\ntwo\nthree\n");
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 message had expired"), "{output:?}");
    assert_eq!(run(&["sub", "t", "--from", "last-per-key", "--count", "2"], ""), "two\nthree\n");
    assert_eq!(run(&["sub", "t", "--from", "time:-10m", "--count", "1"], ""), "one\n");

    run(&["pub", "keyed", "--key", "k"], "made\n");
    assert!(json(&run(&["show", "keyed", "--json"], ""))[0]["options"]["envelope"].as_bool().unwrap());
    run(&["create", "lean"], "");
    let refused = shmbus(&scene, &bus, &["pub", "lean", "--key", "k"], b"a\nb\n");
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--envelope"), "{refused:?}");
    run(&["pub", "lean"], "lean\n");
    let line = &json(&run(&["peek", "lean", "--json"], ""))[0];
    assert!(["timestamp_ns", "key", "headers", "id"].iter().all(|field| line[field].is_null()), "{line}");
}

#[test]
fn peek_shows_and_purge_clears() {
    let scene = Scene::new("peek");
    let bus = scene.open();
    let run = |arguments: &[&str]| ok(&scene, &bus, arguments, b"");
    let topic = Topic::<[u8]>::new("t").messages(8).hold();
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    send(&mut publisher, &["a\n", "b\n", "c\n"]);
    assert_eq!(run(&["peek", "t"]), "a\nb\nc\n");
    assert_eq!(run(&["peek", "t", "--count", "1"]), "a\n");
    assert_eq!(run(&["peek", "t", "--from", "last:1"]), "c\n");
    assert_eq!(json(&run(&["peek", "t", "--json", "--from", "1"]))[0]["sequence"], 1);
    send(&mut publisher, &["x\n"; 5]);
    assert_eq!(run(&["peek", "t"]).lines().count(), 8);
    let full = publisher.try_publish(b"one more").unwrap_err();
    assert!(matches!(full, PublishError::Full { .. }), "peeking is not reading: {full}");
    let mut reader = open(&bus, &topic, Start::Oldest);
    assert_eq!(texts(&mut reader).len(), 8);

    send(&mut publisher, &["d\n"]);
    let pid = std::process::id();
    let kept = format!("kept 1 message, sequences 8..9: held by subscriber 0 (process {pid})");
    let output = run(&["purge", "t"]);
    assert!(output.contains("purged 8 messages") && output.contains(&kept), "{output}");
    drop(reader);
    let line = &json(&run(&["purge", "t", "--json"]))[0];
    assert_eq!((&line["purged"], &line["kept"], &line["holder"]), (&Value::from(1), &Value::from(0), &Value::Null));
    assert_eq!(run(&["peek", "t"]), "");
    bus.create(&Topic::<[u8]>::new("c").channel()).unwrap();
    assert_eq!(shmbus(&scene, &bus, &["peek", "c"], b"").status.code(), Some(1));
}
