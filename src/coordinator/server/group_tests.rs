//! Groups as a client sees them, on a log with messages.

use super::*;
use crate::client::Bus;
use crate::coordinator::protocol::{GroupInfo, GroupStatus, TopicStatus};
use crate::error::PublishError;
use crate::group::GroupOptions;
use crate::topic::{Full, Topic};

const TOPIC: Topic<u64> = Topic::new("t").messages(16).full(Full::Reject);

impl Stage {
    fn bus(&self) -> Bus {
        Bus::options().name("test").directory(self.directory.path().to_owned()).spawn(false).open().unwrap()
    }
}

fn create_group(control: &Control, start: StartAt) {
    let (topic, group, options) = ("t".to_owned(), "g".to_owned(), GroupOptions::default());
    control.request(&Request::CreateGroup { topic, group, options, start, exist_ok: false }).unwrap();
}

/// The consumer's handle, and position and sequence of where it stands.
fn open_consumer(control: &Control) -> (GroupInfo, HandleRef, (u64, u64)) {
    let (topic, group) = ("t".to_owned(), "g".to_owned());
    let (answer, fds) = control.request(&Request::OpenConsumer { topic, group, schema: None, create: None }).unwrap();
    let Answer::ConsumerOpened { info, group, consumer, position, sequence, segments } = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(segments.len(), fds.len());
    let handle = HandleRef::Consumer { topic: info.id, group: group.id, consumer };
    (group, handle, (position, sequence))
}

fn topic_status(control: &Control) -> TopicStatus {
    let request = Request::Status { topic: Some("t".to_owned()), after: None };
    let (Answer::Status { topics, .. }, _) = control.request(&request).unwrap() else { panic!() };
    topics.into_iter().next().unwrap()
}

fn status(control: &Control) -> GroupStatus {
    topic_status(control).groups.remove(0)
}

#[test]
fn a_group_that_starts_within_a_batch_stands_at_the_batch() {
    let stage = Stage::set();
    let bus = stage.bus();
    let mut publisher = bus.publisher(TOPIC).unwrap();
    publisher.publish(&0).unwrap();
    publisher.publish_batch([&1, &2, &3, &4]).unwrap();
    create_group(bus.control(), StartAt::Sequence(3));
    let (.., place) = open_consumer(bus.control());
    assert_eq!(place, (1, 1), "the batch's position and first sequence");
    let group = status(bus.control());
    assert_eq!((group.floor, group.lag), (3, 2));
}

#[test]
fn a_group_holds_the_ring_without_a_consumer_until_it_is_removed() {
    let stage = Stage::set();
    let bus = stage.bus();
    let mut publisher = bus.publisher(TOPIC).unwrap();
    create_group(bus.control(), StartAt::Oldest);
    let published = (0..100).take_while(|n| publisher.publish(n).is_ok()).count();
    assert_eq!(published, 16);
    assert!(matches!(publisher.publish(&0), Err(PublishError::Full { .. })));
    let (topic, group) = ("t".to_owned(), "g".to_owned());
    bus.control().request(&Request::RemoveGroup { topic, group, force: false }).unwrap();
    publisher.publish(&0).unwrap();
}

#[test]
fn a_rewound_group_begins_where_asked_and_what_it_needs_was_kept_for_it() {
    let stage = Stage::set();
    let bus = stage.bus();
    let mut publisher = bus.publisher(TOPIC).unwrap();
    for n in 0..10 {
        publisher.publish(&n).unwrap();
    }
    create_group(bus.control(), StartAt::Latest);
    assert_eq!(status(bus.control()).floor, 10);
    let (topic, group) = ("t".to_owned(), "g".to_owned());
    bus.control().request(&Request::RewindGroup { topic, group, start: StartAt::Last(4), force: false }).unwrap();
    let (info, _, place) = open_consumer(bus.control());
    assert_eq!((info.id, place, status(bus.control()).floor), (1, (6, 6), 6));
    // A publisher that has looked before the group came may go on for a chunk: nothing is overwritten by that.
    assert!((0..1000).any(|n| publisher.publish(&n).is_err()), "it holds the ring");
    assert!(topic_status(bus.control()).oldest_sequence <= 6);
}

#[test]
fn consumers_are_told_of_new_arenas_and_their_places_end_with_the_connection() {
    let stage = Stage::set();
    let (a, b) = (stage.connect(), stage.connect());
    open_publisher(&a, "t", Mode::Many).unwrap();
    create_group(&a, StartAt::Oldest);
    let (_, handle, _) = open_consumer(&b);
    let HandleRef::Publisher { topic, slot } = open_publisher(&a, "t", Mode::Many).unwrap() else { panic!() };
    assert!(b.arena(topic, slot).is_some(), "it is in the socket before the publisher was answered");
    assert_eq!(status(&a).consumers.len(), 1);
    b.release(handle);
    wait_for("the release", || status(&a).consumers.is_empty());
    open_consumer(&b);
    drop(b);
    wait_for("the departure", || status(&a).consumers.is_empty());
    a.request(&Request::Stop).unwrap();
}
