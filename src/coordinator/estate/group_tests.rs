//! Groups across coordinators that die between two steps.

use std::time::{Duration, Instant};

use super::*;
use crate::coordinator::limits::{MAX_CONSUMERS_OF_TOPIC, MAX_GROUPS_OF_TOPIC};
use crate::coordinator::memory::ledger_name;
use crate::coordinator::protocol::{
    ConsumerStatus, GroupInfo, GroupStatus, Identity, MAX_PACKET_BYTES, SegmentRef, SubscriberStatus, input_number,
};
use crate::group::{GroupOptions, Guarantee};
use crate::os::clock;
use crate::ring::doorbell::arm_all;
use crate::ring::ledger::{Ledger, State as Word};
use crate::shm::topic;
use crate::topic::Mode;

fn us() -> u64 {
    1
}

fn in_a_minute() -> u64 {
    clock::now_ms() + 60_000
}

fn ask(estate: &mut Estate, request: Request) -> Result<Answer, Refusal> {
    Ok(estate.request(us(), &request)?.unwrap().0)
}

fn create(group: &str, options: GroupOptions, start: StartAt) -> Request {
    let (topic, group) = ("t".to_owned(), group.to_owned());
    Request::CreateGroup { topic, group, options, start, exist_ok: false }
}

fn open(group: &str) -> Request {
    let (topic, group) = ("t".to_owned(), group.to_owned());
    Request::OpenConsumer { topic, group, schema: None, create: Some((GroupOptions::default(), StartAt::Oldest)) }
}

fn remove(group: &str, force: bool) -> Request {
    Request::RemoveGroup { topic: "t".to_owned(), group: group.to_owned(), force }
}

fn rewind(group: &str, start: StartAt, force: bool) -> Request {
    Request::RewindGroup { topic: "t".to_owned(), group: group.to_owned(), start, force }
}

fn close(group: u32, consumer: u32) -> Request {
    Request::Close { handles: vec![HandleRef::Consumer { topic: 0, group, consumer }] }
}

/// A consumer as far as its memory goes.
struct Consumer {
    group: GroupInfo,
    number: u8,
    ledger: Ledger,
}

impl Consumer {
    fn open(estate: &mut Estate, keeper: &mut Keeper, name: &str) -> Consumer {
        let Answer::ConsumerOpened { info, group, consumer, position, sequence, segments } =
            ask(estate, open(name)).unwrap()
        else {
            panic!("no consumer")
        };
        assert_eq!((position, sequence), (0, 0), "nothing was published");
        assert_eq!(segments[..3], [SegmentRef::Log, SegmentRef::Cursors, SegmentRef::Ledger]);
        keeper.listen();
        let fd = &keeper.store[&segment_name(0, &ledger_name(group.id))];
        let segment = Segment::attach(fd.as_fd(), &info.ledger(&group), Access::ReadWrite).unwrap();
        let ledger = topic::ledger(&segment, &info, &group);
        Consumer { group, number: consumer as u8, ledger }
    }

    /// Leases the message, although nobody published it.
    fn take(&self, sequence: u64, due: u64) {
        self.ledger.raise_hint(sequence + 1);
        self.ledger.take(self.ledger.look(sequence), self.number, due).unwrap();
    }

    fn sees(&self, sequence: u64) -> Word {
        self.ledger.look(sequence).state()
    }
}

fn status(estate: &mut Estate) -> Vec<GroupStatus> {
    match ask(estate, Request::Status { topic: Some("t".to_owned()), after: None }).unwrap() {
        Answer::Status { topics, .. } => topics.into_iter().next().unwrap().groups,
        other => panic!("{other:?}"),
    }
}

fn ledgers(keeper: &Keeper) -> Vec<&str> {
    keeper.store.keys().filter_map(|name| name.strip_prefix("topic-0/ledger-")).collect()
}

/// Which cursors are in force, as publishers see it.
fn in_force(handle: &Handle, estate: &Estate) -> Vec<bool> {
    let lines = handle.0.cursor_lines(&estate.entry(0).unwrap().info);
    lines.iter().take(4).map(|line| line.place().is_some()).collect()
}

#[test]
fn a_consumer_opens_its_group_and_what_it_holds_returns_when_it_closes() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    let consumer = Consumer::open(&mut estate, &mut keeper, "g");
    assert_eq!((consumer.group.id, consumer.group.cursor, consumer.number), (0, 0, 0));
    assert_eq!(in_force(&handle, &estate), [true, false, false, false]);
    consumer.take(0, in_a_minute());
    let before = status(&mut estate).remove(0);
    assert_eq!((before.name.as_str(), before.in_flight, before.floor), ("g", 1, 0));
    assert_eq!(before.oldest_lease.unwrap().pid, std::process::id());
    assert_eq!(before.consumers[0].in_flight, 1);
    ask(&mut estate, close(0, 0)).unwrap();
    assert_eq!(consumer.sees(0), Word::Returned);
    assert!(consumer.ledger.look(0).is_due(clock::now_ms()), "at once, not when the lease would have ended");
    let after = status(&mut estate).remove(0);
    assert_eq!((after.in_flight, after.returned, after.consumers.len()), (0, 1, 0));
    assert_eq!(in_force(&handle, &estate), [true, false, false, false], "the group stays");
}

#[test]
fn a_consumers_end_wakes_publishers_also_where_the_floor_cannot_be_raised() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    let consumer = Consumer::open(&mut estate, &mut keeper, "g");
    // As while another consumer moves the group's cursor on, and its record is not written yet.
    handle.0.cursor_lines(&estate.entry(0).unwrap().info)[0].raise(3, 3);
    assert!(estate.memory(0).unwrap().group_place(consumer.group.cursor).is_err());
    let readers = handle.0.readers();
    let (asleep, _) = arm_all(&[&readers.writers]).hand_over();
    ask(&mut estate, close(0, 0)).unwrap();
    assert!(readers.writers.was_rung_since(asleep[0]));
}

#[test]
fn a_ledger_that_did_not_begin_is_begun_by_the_successor() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    let event =
        estate.state.request(&estate.limits, FOOTPRINT, us(), &create("g", GroupOptions::default(), StartAt::Oldest));
    let event = event.unwrap().events.remove(0);
    estate.prepare(&event).unwrap();
    estate.log(&event).unwrap();
    drop(estate);
    let mut estate = keeper.restart();
    assert_eq!(in_force(&handle, &estate), [true, false, false, false]);
    Consumer::open(&mut estate, &mut keeper, "g").take(0, in_a_minute());
    assert_eq!(status(&mut estate)[0].in_flight, 1);
}

#[test]
fn a_ledger_that_was_not_logged_is_forgotten() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    let event =
        estate.state.request(&estate.limits, FOOTPRINT, us(), &create("g", GroupOptions::default(), StartAt::Oldest));
    estate.prepare(&event.unwrap().events[0]).unwrap();
    drop(estate);
    keeper.listen();
    assert_eq!(ledgers(&keeper), ["0"]);
    let estate = keeper.restart();
    assert_eq!(ledgers(&keeper), [""; 0]);
    assert_eq!(in_force(&handle, &estate), [false; 4]);
}

#[test]
fn what_a_group_has_given_out_survives_its_coordinator() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let consumer = Consumer::open(&mut estate, &mut keeper, "g");
    consumer.take(0, in_a_minute());
    drop(estate);
    let mut estate = keeper.restart();
    assert_eq!(consumer.sees(0), Word::Leased);
    assert_eq!(status(&mut estate)[0].consumers[0].in_flight, 1);
    estate.release_participant(us()).unwrap();
    assert_eq!(consumer.sees(0), Word::Returned, "its holder is dead");
}

#[test]
fn a_rewound_group_begins_anew_and_the_old_one_stays_until_its_consumer_goes() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    let old = Consumer::open(&mut estate, &mut keeper, "g");
    old.take(0, in_a_minute());
    assert!(matches!(
        ask(&mut estate, rewind("g", StartAt::Sequence(1), true)),
        Err(Refusal::BeyondTail { asked: 1, tail: 0, .. })
    ));
    assert!(!old.ledger.is_fenced(old.number), "a refusal changes nothing");
    ask(&mut estate, rewind("g", StartAt::Oldest, true)).unwrap();
    assert!(old.ledger.is_fenced(old.number));
    assert_eq!(in_force(&handle, &estate), [false, true, false, false]);
    let new = Consumer::open(&mut estate, &mut keeper, "g");
    assert_eq!((new.group.id, new.group.cursor, new.sees(0)), (1, 1, Word::Fresh));
    assert_eq!(ledgers(&keeper), ["0", "1"]);
    drop(estate);
    let mut estate = keeper.restart();
    assert_eq!(in_force(&handle, &estate), [false, true, false, false]);
    ask(&mut estate, close(0, 0)).unwrap();
    keeper.listen();
    assert_eq!(ledgers(&keeper), ["1"]);
    assert_eq!(estate.memory(0).unwrap().segments().len(), 4);
}

#[test]
fn an_end_of_a_group_that_was_only_logged_is_finished() {
    for consumers in [0, 1] {
        let (mut keeper, mut estate, handle) = Keeper::with_topic();
        let consumer = Consumer::open(&mut estate, &mut keeper, "g");
        if consumers == 0 {
            ask(&mut estate, close(0, 0)).unwrap();
        }
        estate.log(&Event::GroupRetired { topic: 0, group: 0 }).unwrap();
        drop(estate);
        let mut estate = keeper.restart();
        assert_eq!(in_force(&handle, &estate), [false; 4]);
        assert_eq!(ledgers(&keeper).len(), consumers);
        assert_eq!(consumer.ledger.is_fenced(0), consumers == 1);
        assert!(status(&mut estate).is_empty());
    }
}

#[test]
fn a_removed_group_leaves_nothing() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    let bytes = estate.state.reserved_bytes();
    let consumer = Consumer::open(&mut estate, &mut keeper, "g");
    assert!(matches!(ask(&mut estate, remove("g", false)), Err(Refusal::GroupInUse { .. })));
    ask(&mut estate, remove("g", true)).unwrap();
    assert!(consumer.ledger.is_fenced(consumer.number));
    assert_eq!(in_force(&handle, &estate), [false; 4]);
    ask(&mut estate, close(0, 0)).unwrap();
    keeper.listen();
    assert_eq!(ledgers(&keeper), [""; 0]);
    assert_eq!(estate.state.reserved_bytes(), bytes);
}

#[test]
fn a_topic_that_is_removed_takes_its_ledgers_along() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    Consumer::open(&mut estate, &mut keeper, "g");
    estate.log(&Event::TopicRemoved { topic: 0 }).unwrap();
    drop(estate);
    keeper.restart();
    assert_eq!(keeper.kept_of_topics(), 0);
}

#[test]
fn a_group_keeps_the_bus() {
    for has_group in [false, true] {
        let mut estate = Estate::found(7, None).unwrap();
        estate.admit_us();
        let options = TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() };
        let (topic, create_topic) = ("t".to_owned(), Some(options));
        ask(&mut estate, Request::OpenPublisher { topic, schema: None, create: create_topic, identity: None }).unwrap();
        if has_group {
            ask(&mut estate, create("g", GroupOptions::default(), StartAt::Oldest)).unwrap();
        }
        estate.release_participant(us()).unwrap();
        assert_eq!(estate.is_needed(), has_group);
    }
}

fn reclaim(consumer: u32) -> Request {
    Request::Reclaim { topic: 0, group: 0, consumer }
}

#[test]
fn only_what_is_overdue_is_reclaimed() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let slow = Consumer::open(&mut estate, &mut keeper, "g");
    Consumer::open(&mut estate, &mut keeper, "g");
    let now = clock::now_ms();
    slow.take(0, now + 60_000);
    slow.take(1, now.saturating_sub(1));
    slow.take(2, now + 60_000);
    ask(&mut estate, reclaim(0)).unwrap();
    assert_eq!([0, 1, 2].map(|sequence| slow.sees(sequence)), [Word::Leased, Word::Returned, Word::Leased]);
    assert!(!slow.ledger.is_fenced(slow.number));
    ask(&mut estate, reclaim(9)).unwrap();
}

/// It would keep everybody else waiting: it is done between requests, once, however many ask for it, and followed by a rest.
#[test]
fn a_reclaim_that_takes_long_is_put_off() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let window = 1 << 15;
    ask(&mut estate, create("g", GroupOptions { window, ..GroupOptions::default() }, StartAt::Oldest)).unwrap();
    let slow = Consumer::open(&mut estate, &mut keeper, "g");
    Consumer::open(&mut estate, &mut keeper, "g");
    let due = clock::now_ms().saturating_sub(1);
    slow.take(0, due);
    slow.ledger.raise_hint(window);
    assert_eq!(estate.reclaim_at(), None);
    (0..3).for_each(|_| drop(ask(&mut estate, reclaim(0)).unwrap()));
    let at = estate.reclaim_at().unwrap();
    assert!(at <= Instant::now(), "nothing was done yet, so there is nothing to rest from");
    assert_eq!(slow.sees(0), Word::Leased);
    estate.reclaim_next();
    assert_eq!((slow.sees(0), estate.reclaim_at()), (Word::Returned, None));
    slow.take(0, due);
    ask(&mut estate, reclaim(0)).unwrap();
    assert!(estate.reclaim_at().unwrap() > at);
    // Its consumer goes first.
    ask(&mut estate, close(0, 0)).unwrap();
    estate.reclaim_next();
    assert_eq!((slow.sees(0), estate.reclaim_at()), (Word::Returned, None));
}

/// Who keeps asking about one topic keeps no other of the same owner from its turn, and invented consumers are no work.
#[test]
fn put_off_reclaims_take_turns() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let window = 1 << 15;
    let options = || GroupOptions { window, ..GroupOptions::default() };
    let consumers = ["f", "g"].map(|group| {
        ask(&mut estate, create(group, options(), StartAt::Oldest)).unwrap();
        Consumer::open(&mut estate, &mut keeper, group)
    });
    let due = clock::now_ms().saturating_sub(1);
    let reclaim = |estate: &mut Estate, group: usize, consumer: u32| {
        drop(ask(estate, Request::Reclaim { topic: 0, group: group as u32, consumer }));
    };
    reclaim(&mut estate, 0, 99);
    assert_eq!(estate.reclaim_at(), None);
    consumers.iter().for_each(|consumer| consumer.take(0, due));
    consumers.iter().for_each(|consumer| consumer.ledger.raise_hint(window));
    reclaim(&mut estate, 1, 0);
    for _ in 0..2 {
        reclaim(&mut estate, 0, 0);
        estate.reclaim_next();
    }
    assert_eq!(consumers[1].sees(0), Word::Returned);
}

/// Connections are served before it goes on with the next group; then all of them have had their turn.
#[test]
fn a_look_goes_on_where_the_last_one_had_no_time_left() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let max_age_ms = 60_000;
    let options = TopicOptions { messages: 16, bytes: 4096, envelope: true, max_age_ms, ..TopicOptions::default() };
    let create =
        Request::CreateTopic { topic: "e".to_owned(), options, access: None, exist_ok: false, ephemeral: false };
    ask(&mut estate, create).unwrap();
    keeper.listen();
    let groups = ["f", "g", "h"];
    for group in groups {
        let (topic, group) = ("e".to_owned(), group.to_owned());
        let options = GroupOptions::default();
        ask(&mut estate, Request::CreateGroup { topic, group, options, start: StartAt::Oldest, exist_ok: false })
            .unwrap();
    }
    // A hole is nobody's, and has always been dead.
    let info = estate.entry(1).unwrap().info.clone();
    keeper.listen();
    Handle::on(&keeper, &info).0.many(&info).fence(&info.policy(), 5, 1).unwrap();
    let settled = |estate: &Estate| {
        let floors = (0..3).map(|group| estate.memory(1).unwrap().count_ledger(group).unwrap().floor);
        floors.sum::<u64>()
    };
    for look in 1..=3 {
        let found = estate.settle_expired(Duration::ZERO);
        assert_eq!((found, settled(&estate)), ((look == 3).then(Expired::default), look));
    }
    assert_eq!([(); 4].map(|()| estate.renew_due(Duration::ZERO)), [false, false, true, false]);
    assert!(estate.renew_due(Duration::from_secs(60)));
    assert!(estate.give_up_old(Duration::ZERO), "one topic");
}

fn output() -> Request {
    let identity = Some(Identity::Origin { topic: 0, group: 0, consumer: 0 });
    Request::OpenPublisher { topic: "out".to_owned(), schema: None, create: Some(TopicOptions::default()), identity }
}

/// A consumer of an effectively-once group with leases on 0 to 2, whose outputs to "out" are all there up to input 1.
fn with_outputs(keeper: &mut Keeper, estate: &mut Estate, due: u64) -> Consumer {
    let options = GroupOptions { guarantee: Guarantee::EffectivelyOnce, ..GroupOptions::default() };
    ask(estate, create("g", options, StartAt::Oldest)).unwrap();
    let consumer = Consumer::open(estate, keeper, "g");
    (0..3).for_each(|sequence| consumer.take(sequence, due));
    ask(estate, output()).unwrap();
    keeper.listen();
    let out = &estate.entry(1).unwrap().info;
    let header = Handle::on(keeper, out).0.header();
    // As its publisher would, around a commit of its batch.
    header.note(0).prepare(0, 0, input_number(1));
    header.note(0).commit(0);
    consumer
}

#[test]
fn what_the_dead_had_finished_is_settled_and_the_rest_returns() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let consumer = with_outputs(&mut keeper, &mut estate, in_a_minute());
    estate.release_participant(us()).unwrap();
    let states = [0, 1, 2].map(|sequence| consumer.sees(sequence));
    assert_eq!(states, [Word::Returned, Word::Settled, Word::Returned]);
}

#[test]
fn what_was_finished_is_known_when_publisher_and_coordinator_are_gone() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let consumer = with_outputs(&mut keeper, &mut estate, in_a_minute());
    ask(&mut estate, Request::Close { handles: vec![HandleRef::Publisher { topic: 1, slot: 0 }] }).unwrap();
    drop(estate);
    let mut estate = keeper.restart();
    estate.release_participant(us()).unwrap();
    assert_eq!(consumer.sees(1), Word::Settled);
}

#[test]
fn the_overdue_is_fenced_on_its_outputs_before_another_gets_its_leases() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let consumer = with_outputs(&mut keeper, &mut estate, clock::now_ms());
    for _ in 0..2 {
        ask(&mut estate, reclaim(0)).unwrap();
        assert!(estate.entry(1).unwrap().publishers[&0].fenced);
        assert!(consumer.ledger.is_fenced(0));
        let states = [0, 1, 2].map(|sequence| consumer.sees(sequence));
        assert_eq!(states, [Word::Returned, Word::Settled, Word::Returned]);
    }
    assert!(matches!(ask(&mut estate, output()), Err(Refusal::ConsumerFenced { consumer: 0, .. })));
    assert_eq!(Consumer::open(&mut estate, &mut keeper, "g").number, 1, "its number stays taken");
    ask(&mut estate, close(0, 0)).unwrap();
    assert_eq!(Consumer::open(&mut estate, &mut keeper, "g").number, 0);
    assert!(!consumer.ledger.is_fenced(0), "the next one with this number is not fenced");
}

#[test]
fn a_living_publisher_on_an_exclusive_topic_keeps_its_leases() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let options = TopicOptions { mode: Mode::Exclusive, ..TopicOptions::default() };
    ask(
        &mut estate,
        Request::CreateTopic { topic: "out".to_owned(), options, access: None, exist_ok: false, ephemeral: false },
    )
    .unwrap();
    let consumer = with_outputs(&mut keeper, &mut estate, clock::now_ms());
    ask(&mut estate, reclaim(0)).unwrap();
    assert_eq!([0, 1, 2].map(|sequence| consumer.sees(sequence)), [Word::Leased; 3]);
    estate.release_participant(us()).unwrap();
    assert_eq!(consumer.sees(1), Word::Settled);
}

/// A page of a list of topics counts one long ledger and not all of them; what it says is exact, and what it leaves is on the next.
#[test]
fn a_list_of_topics_with_long_ledgers_comes_in_pages() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let (topics, handed_out) = (["a", "b", "c", "t"], 1 << 18);
    for name in topics {
        let topic = name.to_owned();
        let options = TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() };
        let create = Request::CreateTopic { topic, options, access: None, exist_ok: true, ephemeral: false };
        ask(&mut estate, create).unwrap();
        let (topic, group) = (name.to_owned(), "g".to_owned());
        let options = GroupOptions { window: handed_out, ..GroupOptions::default() };
        let create = (name != "c").then_some((options, StartAt::Oldest));
        let create = create.or(Some((GroupOptions::default(), StartAt::Oldest)));
        let opened = ask(&mut estate, Request::OpenConsumer { topic, group, schema: None, create }).unwrap();
        let Answer::ConsumerOpened { info, group, consumer, .. } = opened else { panic!("{opened:?}") };
        keeper.listen();
        let fd = &keeper.store[&segment_name(info.id, &ledger_name(group.id))];
        let segment = Segment::attach(fd.as_fd(), &info.ledger(&group), Access::ReadWrite).unwrap();
        let ledger = topic::ledger(&segment, &info, &group);
        Consumer { group, number: consumer as u8, ledger: ledger.clone() }.take(3, in_a_minute());
        ledger.raise_hint(if name == "c" { 4 } else { handed_out - 4 });
    }
    let (mut pages, mut after) = (Vec::new(), None);
    loop {
        let answer = ask(&mut estate, Request::Status { topic: None, after }).unwrap();
        let Answer::Status { topics, more } = answer else { panic!("{answer:?}") };
        assert!(
            topics.iter().all(|topic| topic.groups[0].in_flight == 1 && topic.groups[0].consumers[0].in_flight == 1)
        );
        let names: Vec<String> = topics.into_iter().map(|topic| topic.name).collect();
        after = names.last().cloned();
        pages.push(names.concat());
        if !more {
            break;
        }
    }
    assert_eq!(pages, ["a", "b", "c", "t"]);
}

/// Group by group where there is no more time; what was counted before the question is no answer to it.
#[test]
fn long_ledgers_are_counted_piece_by_piece() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let window = 1 << 18;
    let consumers = ["f", "g"].map(|group| {
        let options = GroupOptions { window, ..GroupOptions::default() };
        ask(&mut estate, create(group, options, StartAt::Oldest)).unwrap();
        Consumer::open(&mut estate, &mut keeper, group)
    });
    let request = Request::Status { topic: Some("t".to_owned()), after: None };
    // Whatever is handed out now: that may be more when it is looked at.
    assert_eq!(estate.to_count(us(), &request, Instant::now()), [(0, 0), (0, 1)]);
    let counted = |estate: &mut Estate, taken_meanwhile| {
        let since = Instant::now();
        let mut rest = estate.to_count(us(), &request, since);
        let looks = (0..9).find(|_| {
            let is_done = rest.is_empty();
            estate.count_ahead(&mut rest, since);
            is_done
        });
        assert_eq!(estate.to_count(us(), &request, since), []);
        consumers[1].take(taken_meanwhile, in_a_minute());
        let Answer::Status { topics, .. } = estate.counted_status(us(), &request, since).unwrap() else { panic!() };
        (looks.unwrap(), topics[0].groups.iter().map(|group| group.in_flight).collect::<Vec<_>>())
    };
    consumers[0].take(0, in_a_minute());
    assert_eq!(counted(&mut estate, 0), (2, vec![1, 0]));
    assert_eq!(counted(&mut estate, 1), (2, vec![1, 1]));
    assert_eq!(status(&mut estate)[1].in_flight, 2);
}

#[test]
fn the_largest_status_of_a_topic_fits_in_a_packet() {
    let (name, most) = ("x".repeat(200), u64::MAX);
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let options = GroupOptions {
        back_off_ms: vec![24 * 3600 * 1000; 32],
        dead_letter: Some(name.clone()),
        max_attempts: 4095,
        ..GroupOptions::default()
    };
    ask(&mut estate, create("g", options.clone(), StartAt::Oldest)).unwrap();
    Consumer::open(&mut estate, &mut keeper, "g").take(0, in_a_minute());
    let group = GroupStatus {
        name: name.clone(),
        options,
        id: u32::MAX,
        floor: most,
        lag: most,
        window: most,
        in_flight: most,
        returned: most,
        moving: most,
        redelivered: most,
        expired: most,
        dead_lettered: most,
        ..status(&mut estate).remove(0)
    };
    let bytes = |value: &GroupStatus| postcard::to_stdvec(value).unwrap().len();
    let consumer = ConsumerStatus { consumer: 255, pid: u32::MAX, in_flight: most, active: true };
    let reader = SubscriberStatus { cursor: 1023, pid: u32::MAX, sequence: most, lag: most, droppable: true };
    let consumers = MAX_CONSUMERS_OF_TOPIC * postcard::to_stdvec(&consumer).unwrap().len();
    let subscribers = 1024 * postcard::to_stdvec(&reader).unwrap().len();
    let groups = MAX_GROUPS_OF_TOPIC * bytes(&group);
    let total = groups + consumers + subscribers;
    // What is left is for 64 publishers and the topic's own options.
    assert!(total < MAX_PACKET_BYTES - 8192, "{groups} + {consumers} + {subscribers} = {total} bytes");
}

/// How long the coordinator takes for whoever gives back all consumers of a group at once, or dies, is not for him to say.
#[test]
fn the_consumers_of_a_group_are_released_in_one_walk_of_its_ledger() {
    const CONSUMERS: u32 = 200;
    for by_death in [false, true] {
        let (mut keeper, mut estate, _) = Keeper::with_topic();
        let options = GroupOptions { window: 1 << 18, ..GroupOptions::default() };
        ask(&mut estate, create("g", options, StartAt::Oldest)).unwrap();
        let consumers: Vec<Consumer> = (0..CONSUMERS).map(|_| Consumer::open(&mut estate, &mut keeper, "g")).collect();
        for (sequence, consumer) in (0..).zip(&consumers) {
            consumer.take(sequence, in_a_minute());
        }
        let ledger = consumers[0].ledger.clone();
        ledger.raise_hint(u64::MAX);
        let walk = || {
            let began = Instant::now();
            assert!(ledger.leased(None, clock::now_ms()) <= CONSUMERS.into());
            began.elapsed()
        };
        let (before, began) = (walk(), Instant::now());
        if by_death {
            estate.release_participant(us()).unwrap();
        } else {
            let handles = (0..CONSUMERS).map(|consumer| HandleRef::Consumer { topic: 0, group: 0, consumer });
            ask(&mut estate, Request::Close { handles: handles.collect() }).unwrap();
        }
        let (took, walk) = (began.elapsed(), before.max(walk()));
        assert!((0..CONSUMERS).all(|sequence| consumers[0].sees(sequence.into()) == Word::Returned));
        assert!(took < walk * CONSUMERS / 4, "it took {took:?}, a walk takes {walk:?}");
    }
}
