//! Messages that outlive their receive, iteration, worker pools and callback runners.

mod common;

use std::{fs, thread};

use common::{MODES, Scene, await_that, hear, of_mode, say};
use shmbus::{Bus, Envelope, Full, Mode, OwnedMessage, RecvError, Topic};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, _)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "iterate" => iterate(&bus),
        "iterate_all" => iterate_all(&bus),
        _ => panic!("no role {role}"),
    }
}

/// Role: says what an iterator over the topic `feed` gives, and begins when it is told to.
fn iterate(bus: &Bus) {
    let mut subscriber = bus.subscriber(feed()).open().unwrap();
    say(&this_thread());
    hear();
    for item in &mut subscriber {
        match item {
            Ok(message) => say(&format!("{} {}", message.sequence(), *message)),
            Err(RecvError::Lagged { from, to }) => say(&format!("lost {from} {to}")),
            Err(error) => say(&format!("{error:?}")),
        }
    }
    say("over");
    // Whoever asks anew is told anew.
    say(&format!("{:?}", subscriber.into_iter().map(Result::unwrap_err).collect::<Vec<_>>()));
    hear();
}

/// Role: the same over the topics `some.*`.
fn iterate_all(bus: &Bus) {
    let subscriber = bus.wildcard::<u64>("some.*").open().unwrap();
    say("ready");
    for item in subscriber {
        match item {
            Ok(message) => say(&format!("{} {}", message.topic(), **message)),
            Err(error) => say(&format!("{error:?}")),
        }
    }
    say("over");
    hear();
}

fn feed() -> Topic<u64> {
    Topic::new("feed").messages(8).full(Full::Overwrite)
}

/// As much alignment as a payload may ask for.
#[repr(C, align(32))]
#[derive(Debug, Clone, Copy, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Wide([u64; 12]);

/// This thread, for [`await_sleep`] in another process.
fn this_thread() -> String {
    nix::unistd::gettid().to_string()
}

/// Waits until a thread sleeps in the kernel.
fn await_sleep(thread: &str) {
    let status = format!("/proc/{thread}/stat");
    await_that("sleep", || fs::read_to_string(&status).unwrap().contains(") S "));
}

#[test]
fn an_owned_message_keeps_everything_and_goes_anywhere() {
    let scene = Scene::new("owned");
    let bus = scene.open();
    for mode in MODES {
        let topic = of_mode(mode, Topic::<Wide>::named(format!("wide.{mode}")).messages(8));
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic).open().unwrap();
        let mut owned: Vec<OwnedMessage<Wide>> = Vec::new();
        // Many times around the ring: what was detached holds nothing back.
        for number in 0..100 {
            publisher.publish(&Wide([number; 12])).unwrap();
            owned.push(subscriber.recv().unwrap().detach());
        }
        let checked = thread::spawn(move || {
            for (number, message) in (0..).zip(&owned) {
                assert_eq!((message.sequence().get(), **message), (number, Wide([number; 12])));
                assert_eq!(message.publisher_number(), (mode != Mode::Channel).then_some(number + 1));
                assert_eq!((message.timestamp_ns(), message.key(), message.headers().count()), (None, None, 0));
            }
        });
        checked.join().unwrap();
    }
}

#[test]
fn an_owned_message_keeps_its_envelope() {
    let scene = Scene::new("owned");
    let bus = scene.open();
    let topic = Topic::<[u8]>::new("orders.eu").envelope();
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = bus.subscriber(topic).open().unwrap();
    let mut all = bus.wildcard::<[u8]>("orders.*").open().unwrap();
    for len in [0, 1, 31, 32, 33, 5000] {
        let key = [b'k'; 7];
        let envelope = Envelope::new().key(&key).id(b"id").header("a", b"1").header("b", b"").header("a", b"2");
        publisher.publish_with(&vec![7; len], &envelope).unwrap();
        publisher.publish(b"another").unwrap();
        let message = subscriber.recv().unwrap();
        let (borrowed_at, owned) = (message.timestamp_ns(), message.detach());
        subscriber.recv().unwrap();
        assert_eq!(*owned, *vec![7; len]);
        assert_eq!(owned.as_bytes().len(), len);
        assert_eq!((owned.key(), owned.id(), owned.timestamp_ns()), (Some(&key[..]), Some(&b"id"[..]), borrowed_at));
        assert_eq!(owned.headers().collect::<Vec<_>>(), [("a", &b"1"[..]), ("b", b""), ("a", b"2")]);
        assert_eq!((owned.header("a"), owned.header("c")), (Some(&b"1"[..]), None));
        let owned = all.recv().unwrap().detach();
        assert_eq!((owned.topic(), owned.len(), owned.key()), ("orders.eu", len, Some(&key[..])));
        let plain = all.recv().unwrap().detach();
        assert_eq!((plain.as_bytes(), plain.key(), plain.headers().count()), (&b"another"[..], None, 0));
    }
}

#[test]
fn iterating_waits_tells_losses_and_ends_with_the_topic() {
    let scene = Scene::new("iterate");
    let bus = scene.open();
    let mut publisher = bus.publisher(feed()).unwrap();
    let mut reader = scene.start("iterate", "");
    let thread = reader.line();
    (0..5000).for_each(|number| assert!(publisher.publish(&number).is_ok()));
    reader.tell("go");
    let lost = reader.line();
    let to: u64 = lost.strip_prefix("lost 0 ").unwrap_or_else(|| panic!("{lost}")).parse().unwrap();
    assert!((1..=4992).contains(&to), "{lost}");
    (to..5000).for_each(|number| reader.expect(&format!("{number} {number}")));
    // It waits by now; what comes then wakes it.
    await_sleep(&thread);
    publisher.publish(&5000).unwrap();
    reader.expect("5000 5000");
    drop(publisher);
    bus.remove_topic("feed", true).unwrap();
    reader.expect("Gone(Removed)");
    reader.expect("over");
    reader.expect("[Gone(Removed)]");
}

#[test]
fn iterating_over_a_pattern_names_topics_and_ends_with_the_bus() {
    let scene = Scene::new("iterate");
    let bus = scene.open();
    let mut reader = scene.start("iterate_all", "");
    reader.expect("ready");
    for name in ["some.a", "some.b"] {
        let mut publisher = bus.publisher(Topic::<u64>::named(name)).unwrap();
        publisher.publish(&7).unwrap();
        reader.expect(&format!("{name} 7"));
        drop(publisher);
        // One topic's end is not the iterator's.
        bus.remove_topic(name, true).unwrap();
    }
    bus.stop().unwrap();
    reader.expect("Gone(Stopped)");
    reader.expect("over");
}
