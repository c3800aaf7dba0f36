//! What a topic carries and who may open it: payloads of every size, types, batches, loans, names.

mod common;

use common::{LIMIT, MODES, Random, Scene, checksum, of_mode, publisher_after, raw, receive, seed};
use shmbus::{Bus, Full, Mode, NameError, OpenError, PublishError, RecvError, Refusal, Start, Topic, TopicOptions};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const LARGEST: usize = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Tick {
    symbol: u32,
    quantity: u32,
    price: u64,
}

/// Larger than a slot, and aligned more strictly than one.
#[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(32))]
struct Aligned {
    words: [u64; 4],
}

fn typed<T: shmbus::Payload>(mode: Mode, name: &str) -> Topic<T> {
    of_mode(mode, Topic::named(format!("{name}.{mode}")))
}

fn refusal<T>(outcome: Result<T, OpenError>) -> Refusal {
    match outcome {
        Err(OpenError::Refused(refusal)) => refusal,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("nothing was refused"),
    }
}

#[test]
fn payloads_of_every_size_arrive_whole() {
    let scene = Scene::new("sizes");
    let bus = scene.open();
    let mut random = Random::new(seed());
    let lens = [0, 1, 7, 8, 9, 48, 55, 56, 57, 63, 64, 65, 4095, 4096, 100_003, 1 << 20, LARGEST, 0, 3];
    for mode in MODES {
        let topic = raw(mode, "sizes").messages(4).bytes(LARGEST as u64);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
        for (number, len) in lens.into_iter().enumerate() {
            let mut payload = vec![0; len];
            random.fill(&mut payload);
            assert_eq!(publisher.publish(&payload).unwrap().get(), number as u64);
            let message = subscriber.recv_timeout(LIMIT).unwrap();
            assert_eq!((message.sequence().get(), message.len()), (number as u64, len), "{mode}");
            assert_eq!(checksum(&message), checksum(&payload), "{len} bytes on {mode}");
        }
        let too_large = publisher.publish(&vec![0; LARGEST + 1]).unwrap_err();
        assert_eq!(too_large, PublishError::TooLarge { found: LARGEST as u64 + 1, max: LARGEST as u64 });
        assert_eq!(publisher.publish(b"still in use").unwrap().get(), lens.len() as u64);
        drop((publisher, subscriber));
        bus.remove_topic(topic.name(), false).unwrap();
    }
}

#[test]
fn payloads_of_every_size_survive_being_copied_out() {
    let scene = Scene::new("copies");
    let bus = scene.open();
    for mode in [Mode::Exclusive, Mode::Many] {
        let topic = raw(mode, "copies").full(Full::Overwrite).bytes(1 << 20);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
        for len in [0, 1, 8, 31, 32, 56, 57, 65, 4097, 1 << 20] {
            let payload: Vec<u8> = (0..len).map(|at: u32| (at % 251) as u8).collect();
            publisher.publish(&payload).unwrap();
            assert_eq!(receive(&mut subscriber).1, payload, "{len} bytes on {mode}");
        }
    }
}

#[test]
fn typed_payloads_arrive_aligned_on_every_ring() {
    fn carries<T: shmbus::Payload + PartialEq + std::fmt::Debug + Copy>(bus: &Bus, name: &str, value: T) {
        for mode in MODES {
            let topic = typed::<T>(mode, name);
            let mut publisher = bus.publisher(topic.clone()).unwrap();
            let mut subscriber = bus.subscriber(topic).open().unwrap();
            publisher.publish(&value).unwrap();
            publisher.publish_batch(&[value; 3]).unwrap();
            let mut loan = publisher.loan().unwrap();
            *loan = value;
            assert_eq!(loan.publish().unwrap().get(), 4);
            for _ in 0..5 {
                let message = subscriber.recv_timeout(LIMIT).unwrap();
                assert_eq!(*message, value);
                assert!((&raw const *message).is_aligned(), "{mode}");
            }
        }
    }
    let scene = Scene::new("types");
    let bus = scene.open();
    carries(&bus, "unit", ());
    carries(&bus, "byte", 7u8);
    carries(&bus, "word", 1u64 << 60);
    carries(&bus, "tick", Tick { symbol: 7, quantity: 1, price: 101 });
    carries(&bus, "aligned", Aligned { words: [1, 2, 3, 4] });
    carries(&bus, "wide", u128::MAX - 5);
    carries(&bus, "array", [9u32; 400]);
}

#[test]
fn another_type_is_refused_and_raw_bytes_of_the_wrong_size_as_well() {
    let scene = Scene::new("schema");
    let bus = scene.open();
    for mode in MODES {
        bus.create(&typed::<Tick>(mode, "typed")).unwrap();
        let publisher = refusal(bus.publisher(typed::<[u64; 2]>(mode, "typed")));
        let subscriber = refusal(bus.subscriber(typed::<[u64; 2]>(mode, "typed")).open());
        assert_eq!(publisher, subscriber);
        let Refusal::Schema { expected, found, .. } = &publisher else { panic!("{publisher}") };
        assert_eq!(expected, "Tick (16 bytes, aligned to 8)");
        assert_eq!(found, "[u64; 2] (16 bytes, aligned to 8)");
        assert!(publisher.to_string().contains("carries Tick (16 bytes, aligned to 8), this handle [u64; 2]"));

        // A program without the type may pass its bytes on.
        let mut bytes = bus.publisher(raw(mode, "typed")).unwrap();
        for len in [0, 15, 17] {
            let wrong = bytes.publish(&vec![0; len]).unwrap_err();
            assert!(matches!(wrong, PublishError::WrongSize { found, .. } if found == len as u64), "{wrong}");
            assert!(matches!(bytes.loan_bytes(len).err(), Some(PublishError::WrongSize { .. })));
        }
        let wrong = bytes.publish_batch([&[0; 16][..], &[0; 15][..]]).unwrap_err();
        assert!(matches!(wrong, PublishError::WrongSize { found: 15, .. }), "{wrong}");
        assert_eq!(bytes.publish(&[0; 16]).unwrap().get(), 0);

        bus.create(&raw(mode, "bytes")).unwrap();
        let refused = refusal(bus.subscriber(typed::<Tick>(mode, "bytes")).open());
        let Refusal::Schema { expected, .. } = refused else { panic!("{refused}") };
        assert_eq!(expected, "raw bytes");
    }
}

#[test]
fn bad_names_and_options_are_refused_in_so_many_words() {
    let scene = Scene::new("names");
    let bus = scene.open();
    let long = "x".repeat(300);
    let names = [
        ("", NameError::Empty),
        ("a/b", NameError::Character { character: '/' }),
        ("a\0b", NameError::Character { character: '\0' }),
        ("a..b", NameError::EmptyToken),
        (&long, NameError::TooLong { found: 300, max: 200 }),
    ];
    for (name, problem) in names {
        for refused in [
            refusal(bus.create_topic(name, &TopicOptions::default(), true)),
            refusal(bus.publisher(Topic::<[u8]>::named(name))),
            refusal(bus.subscriber(Topic::<[u8]>::named(name)).open()),
            refusal(bus.topic(name)),
            refusal(bus.remove_topic(name, false)),
        ] {
            let Refusal::Name { source, .. } = refused else { panic!("{name:?}: {refused}") };
            assert_eq!(source, problem);
        }
    }
    assert!(bus.create_topic(&"x".repeat(200), &TopicOptions::default(), false).is_ok());
    let unknown = refusal(bus.subscriber(Topic::<[u8]>::new("nobody")).open());
    assert_eq!(unknown, Refusal::UnknownTopic { topic: "nobody".to_owned() });

    let options = [
        TopicOptions { messages: 0, ..TopicOptions::default() },
        TopicOptions { bytes: 0, ..TopicOptions::default() },
        TopicOptions { bytes: 1 << 40, ..TopicOptions::default() },
        TopicOptions { max_publishers: 65, ..TopicOptions::default() },
        TopicOptions { mode: Mode::Channel, full: Full::Overwrite, ..TopicOptions::default() },
    ];
    for options in options {
        let refused = refusal(bus.create_topic("bad", &options, true));
        assert!(matches!(refused, Refusal::Options { .. }), "{options:?}: {refused}");
    }

    bus.create(&raw(Mode::Many, "there").messages(16)).unwrap();
    assert!(bus.create(&raw(Mode::Many, "there").messages(16)).unwrap());
    let refused = refusal(bus.create(&raw(Mode::Many, "there").messages(17)));
    assert!(refused.to_string().contains("messages is 16, asked for 17"), "{refused}");
}

#[test]
fn batches_are_consecutive_and_all_or_nothing() {
    let scene = Scene::new("batches");
    let bus = scene.open();
    for mode in MODES {
        let topic = raw(mode, "batches").messages(16).bytes(8192).full(Full::Reject);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic).open().unwrap();
        let payloads: Vec<Vec<u8>> = (0..8u8).map(|n| vec![n; [3, 700][usize::from(n % 2)]]).collect();
        let batch = || payloads.iter().map(Vec::as_slice);
        assert_eq!(publisher.publish_batch(batch()).unwrap().get(), 0);
        assert_eq!(publisher.publish_batch(batch()).unwrap().get(), 8);

        // No third one fits: 16 messages on the slotted rings, 8 KiB on the other one.
        let full = (0..).find_map(|_| publisher.publish_batch(batch()).err()).unwrap();
        assert!(matches!(full, PublishError::Full { .. }), "{full}");
        let most = if mode == Mode::Many { 1024 } else { 16 };
        for found in [0, most + 1] {
            let refused = publisher.publish_batch(vec![&b""[..]; found]).unwrap_err();
            assert_eq!(refused, PublishError::BatchSize { found, max: most });
        }
        let refused = publisher.publish_batch([&[0; 8000][..], &[0; 200][..]]).unwrap_err();
        assert_eq!(refused, PublishError::TooLarge { found: 8200, max: 8192 });

        let mut count = 0;
        while let Some(message) = subscriber.try_recv().unwrap() {
            assert_eq!(message.sequence().get(), count);
            assert_eq!(&*message, &payloads[count as usize % 8][..], "{mode}");
            count += 1;
        }
        assert!(count >= 16 && count % 8 == 0, "{count} messages on {mode}");
        assert_eq!(publisher.publish(b"next").unwrap().get(), count);
    }
}

#[test]
fn a_batch_of_many_small_messages_fits_or_is_refused_as_too_large() {
    let scene = Scene::new("small-batches");
    let bus = scene.open();
    for mode in MODES {
        let topic = raw(mode, "small").messages(2).bytes(1024);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        for count in [1, 2, 3, 64, 512, 1024] {
            match publisher.publish_batch(vec![&b"x"[..]; count]) {
                Ok(_) | Err(PublishError::BatchSize { .. } | PublishError::TooLarge { .. }) => {}
                Err(error) => panic!("a batch of {count} on {mode}: {error}"),
            }
            if mode == Mode::Channel {
                let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
                while subscriber.try_recv().unwrap().is_some() {}
            }
        }
    }
}

#[test]
fn a_dropped_loan_publishes_nothing_and_costs_nothing() {
    let scene = Scene::new("loans");
    let bus = scene.open();
    for mode in MODES {
        let topic = raw(mode, "loans").messages(8).bytes(4096);
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic).open().unwrap();
        for round in 0..200u64 {
            for len in [0, 8, 56, 57, 4096] {
                publisher.loan_bytes(len).unwrap().fill(0xdd);
            }
            let len = [5, 56, 57, 2000][round as usize % 4];
            let mut loan = publisher.loan_bytes(len).unwrap();
            loan.fill(round as u8);
            assert!(loan.iter().all(|byte| *byte == round as u8));
            assert_eq!(loan.publish().unwrap().get(), round);
            assert_eq!(receive(&mut subscriber), (round, vec![round as u8; len]), "{mode}");
            assert!(subscriber.try_recv().unwrap().is_none());
        }
        let refused = publisher.loan_bytes(4097).err();
        assert_eq!(refused, Some(PublishError::TooLarge { found: 4097, max: 4096 }));
    }
}

#[test]
fn messages_name_their_publisher_and_its_number() {
    let scene = Scene::new("origins");
    let bus = scene.open();
    for mode in MODES {
        let topic = raw(mode, "origins");
        let mut ids = Vec::new();
        for _ in 0..3 {
            let mut publisher = publisher_after(&bus, &topic);
            ids.push(publisher.id());
            publisher.publish(b"one").unwrap();
            publisher.publish_batch([&b"two"[..], &[3; 100]]).unwrap();
            drop(publisher);
        }
        assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
        let mut subscriber = bus.subscriber(topic).start(Start::Oldest).open().unwrap();
        for (round, id) in ids.into_iter().enumerate() {
            for number in 1..=3 {
                let message = subscriber.recv_timeout(LIMIT).unwrap();
                assert_eq!(message.sequence().get(), round as u64 * 3 + number - 1);
                let origin = (message.publisher(), message.publisher_number());
                let expected = if mode == Mode::Channel { (None, None) } else { (Some(id), Some(number)) };
                assert_eq!(origin, expected, "{mode}");
            }
        }
    }
}

#[test]
fn an_exclusive_place_is_refused_while_taken_and_given_again_after() {
    let scene = Scene::new("exclusive");
    let bus = scene.open();
    let other = scene.open();
    for mode in [Mode::Exclusive, Mode::Channel] {
        let topic = raw(mode, "place");
        let first = bus.publisher(topic.clone()).unwrap();
        for bus in [&bus, &other] {
            let refused = refusal(bus.publisher(topic.clone()));
            let Refusal::Taken { role, pid, .. } = &refused else { panic!("{refused}") };
            assert_eq!((role.as_str(), *pid), ("publisher", std::process::id()));
        }
        drop(first);
        let mut second = publisher_after(&other, &topic);
        assert_eq!(second.publish(b"x").unwrap().get(), 0);
    }
    let topic = raw(Mode::Channel, "place");
    let first = bus.subscriber(topic.clone()).open().unwrap();
    let refused = refusal(other.subscriber(topic.clone()).open());
    assert!(matches!(&refused, Refusal::Taken { role, .. } if role == "subscriber"), "{refused}");
    drop(first);
    common::await_that("the receiver's place", || other.subscriber(topic.clone()).open().is_ok());
}

#[test]
fn a_topic_in_use_is_removed_by_force_only() {
    let scene = Scene::new("in-use");
    let bus = scene.open();
    let topic = raw(Mode::Many, "used");
    let publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
    let refused = refusal(bus.remove_topic(topic.name(), false));
    assert_eq!(refused, Refusal::InUse { topic: topic.name().to_owned(), publishers: 1, subscribers: 1, consumers: 0 });
    bus.remove_topic(topic.name(), true).unwrap();
    assert!(matches!(subscriber.recv(), Err(RecvError::Gone(_))));
    drop((publisher, subscriber));
    // A new topic of the same name is another topic.
    bus.publisher(topic.clone()).unwrap().publish(b"new").unwrap();
    let mut subscriber = bus.subscriber(topic).start(Start::Oldest).open().unwrap();
    assert_eq!(receive(&mut subscriber), (0, b"new".to_vec()));
}
