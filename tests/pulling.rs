//! Messages that outlive their receive, iteration, worker pools and callback runners.

mod common;

use std::thread;

use common::{MODES, Scene, of_mode};
use shmbus::{Bus, Envelope, Mode, OwnedMessage, Topic};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, _)) = common::role() else { return };
    let _bus = Bus::open_default().unwrap();
    panic!("no role {role}");
}

/// As much alignment as a payload may ask for.
#[repr(C, align(32))]
#[derive(Debug, Clone, Copy, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Wide([u64; 12]);

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
