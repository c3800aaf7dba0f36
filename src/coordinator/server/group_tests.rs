//! Groups as a client sees them, on a log with messages.

use super::*;
use crate::client::Bus;
use crate::coordinator::protocol::{GroupInfo, GroupStatus, TopicStatus};
use crate::error::PublishError;
use crate::group::GroupOptions;
use crate::ring::ledger::Ledger;
use crate::shm::segment::{Access, Segment};
use crate::shm::topic;
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

/// Consumers of two groups that have handed out long windows, the first one's number and ledger.
fn with_long_ledgers(control: &Control) -> (u8, Ledger) {
    open_publisher(control, "t", Mode::Many).unwrap();
    let mut consumers = ["g", "h"].map(|group| {
        let (topic, group, window) = ("t".to_owned(), group.to_owned(), 1 << 20);
        let create = Some((GroupOptions { window, ..GroupOptions::default() }, StartAt::Oldest));
        let request = Request::OpenConsumer { topic, group, schema: None, create };
        let (answer, fds) = control.request(&request).unwrap();
        let Answer::ConsumerOpened { info, group, consumer, segments, .. } = answer else { panic!("{answer:?}") };
        let at = segments.iter().position(|segment| *segment == SegmentRef::Ledger).unwrap();
        let segment = Segment::attach(fds[at].as_fd(), &info.ledger(&group), Access::ReadWrite).unwrap();
        let ledger = topic::ledger(&segment, &info, &group);
        ledger.raise_hint(window);
        Some((consumer as u8, ledger))
    });
    consumers[0].take().unwrap()
}

#[test]
fn the_status_of_a_long_ledger_is_answered_exactly_and_in_order() {
    let stage = Stage::set();
    let (a, b) = (stage.connect(), stage.connect());
    let (consumer, ledger) = with_long_ledgers(&a);
    for taken in 1..=3 {
        ledger.take(ledger.look(taken * 1000), consumer, crate::os::clock::now_ms() + 60_000).unwrap();
        let [seen_by_a, seen_by_b] = [&a, &b].map(|control| status(control).in_flight);
        assert_eq!([seen_by_a, seen_by_b], [taken; 2]);
    }
    // Several at once, with something behind one of them.
    let raw = stage.raw();
    say(&raw, &hello()).unwrap();
    let asked = Request::Status { topic: Some("t".to_owned()), after: None };
    (0..3).for_each(|_| say(&raw, &asked).unwrap());
    say(&raw, &Request::Goodbye).unwrap();
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let mut answers = Vec::new();
    while answers.last() != Some(&"farewell") {
        assert!(socket::wait(raw.as_fd(), nix::poll::PollFlags::POLLIN, Some(Instant::now() + DEADLINE)).unwrap());
        let packet = socket::recv(raw.as_fd(), &mut buffer, 1).unwrap();
        answers.push(match postcard::from_bytes(&buffer[..packet.len]).unwrap() {
            Answer::Welcome { .. } => "welcome",
            Answer::Status { topics, .. } if topics[0].groups[0].in_flight == 3 => "status",
            Answer::Farewell => "farewell",
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(answers, ["welcome", "status", "status", "status", "farewell"]);
    a.request(&Request::Stop).unwrap();
}

/// It is neither counted for any more, nor is what it said last lost.
#[test]
fn who_goes_while_a_long_ledger_is_counted_is_heard() {
    let stage = Stage::set();
    let a = stage.connect();
    with_long_ledgers(&a);
    let raw = stage.raw();
    let (topic, start) = ("t".to_owned(), StartAt::Latest);
    say(&raw, &hello()).unwrap();
    say(&raw, &Request::OpenSubscriber { topic, schema: None, start, droppable: false }).unwrap();
    wait_for("the subscriber", || !topic_status(&a).subscribers.is_empty());
    say(&raw, &Request::Status { topic: Some("t".to_owned()), after: None }).unwrap();
    say(&raw, &Request::Goodbye).unwrap();
    drop(raw);
    wait_for("the good-byes", || topic_status(&a).subscribers.is_empty());
    a.request(&Request::Stop).unwrap();
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

const LONG: u32 = 3;

fn open_long(group: u32) -> Request {
    let options = GroupOptions { window: 1 << 20, ..GroupOptions::default() };
    let (topic, group) = ("t".to_owned(), format!("g{group}"));
    Request::OpenConsumer { topic, group, schema: None, create: Some((options, StartAt::Oldest)) }
}

fn consumers(control: &Control) -> usize {
    topic_status(control).groups.iter().map(|group| group.consumers.len()).sum()
}

/// Whoever closes more consumers than others may wait for is answered when all of them are closed, and in order.
#[test]
fn what_takes_long_do_in_parts_and_answered_in_order() {
    let stage = Stage::set();
    let bus = stage.bus();
    drop(bus.publisher(TOPIC).unwrap());
    let client = stage.raw();
    let (Answer::Welcome { incarnation, .. }, _) = ask(&client, &hello(), &[]) else { panic!() };
    let open_all = |client: &OwnedFd| -> Vec<HandleRef> {
        let open = |group| {
            say(client, &open_long(group)).unwrap();
            loop {
                match hear(client).0 {
                    Answer::ConsumerOpened { info, group, consumer, .. } => {
                        return HandleRef::Consumer { topic: info.id, group: group.id, consumer };
                    }
                    // Who comes back is told of what there is.
                    Answer::ArenaAdded { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        };
        (0..LONG).map(open).collect()
    };
    let handles = open_all(&client);
    say(&client, &Request::Close { handles }).unwrap();
    assert!(matches!(ask(&client, &Request::Report, &[]).0, Answer::Done));
    assert!(matches!(hear(&client).0, Answer::Report(_)), "it comes behind");
    assert_eq!(consumers(bus.control()), 0);
    // Who comes back without them.
    let kept = open_all(&client)[1];
    let second = stage.raw();
    let back =
        Request::Hello { protocol: PROTOCOL_VERSION, token: 1, incarnation: Some(incarnation), holds: vec![kept] };
    assert!(matches!(ask(&second, &back, &[]).0, Answer::Welcome { .. }));
    assert_eq!(consumers(bus.control()), 1);
    // Who takes leave and does not wait for the answer.
    open_all(&second);
    say(&second, &Request::Goodbye).unwrap();
    drop(second);
    wait_for("the release of what was left", || consumers(bus.control()) == 0);
}

#[test]
fn the_dead_are_released_in_parts() {
    let stage = tempfile::tempdir().unwrap();
    let place = Place::find("test", Some(stage.path())).unwrap();
    let (lock, listener) = (place.lock().unwrap().unwrap(), place.listen().unwrap());
    let mut server = Server::host(place, lock, listener).unwrap();
    let dead = server.estate.admit_us();
    server.watch(&server.estate.pidfds()[&dead], token(KIND_PARTICIPANT, dead)).unwrap();
    let options = TOPIC.options().clone();
    let create =
        Request::CreateTopic { topic: "t".to_owned(), options, access: None, exist_ok: false, ephemeral: false };
    server.estate.request(dead, &create).unwrap();
    (0..LONG).for_each(|group| drop(server.estate.request(dead, &open_long(group)).unwrap()));
    server.release_participant(dead).unwrap();
    let held = |server: &Server| server.estate.state().handles_of(dead).len() as u32;
    assert_eq!(held(&server), LONG - 1, "others may have something to say");
    // Somebody finds it dead once more.
    server.release_participant(dead).unwrap();
    server.look_after_the_lost(Duration::ZERO).unwrap();
    server.go_on().unwrap();
    assert_eq!(held(&server), LONG - 2);
    server.go_on().unwrap();
    assert!(server.estate.state().participant(dead).is_none() && server.unfinished.is_empty());
}
