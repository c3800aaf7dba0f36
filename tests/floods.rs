//! Clients that flood a topic with messages nobody is to have, give messages back without end, or create and remove topics all the
//! time: whoever waits keeps its deadline, and whatever else its thread serves is not delayed (SPEC §7.4). What is to be had behind
//! such messages is found all the same.

mod common;

use std::os::unix::process::CommandExt;
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use common::{LIMIT, Process, Scene, await_that, end_with_the_test, mode_of, of_mode, say};
use nix::sys::signal::{Signal, kill};
use shmbus::{
    Bus, ConsumerBuilder, Envelope, Full, GroupOptions, Mode, Publisher, RecvError, Runner, Topic, TopicOptions,
    WildcardError, wait_any,
};

/// A flood ends by itself after so long: then even who cannot get past it is through.
const FLOOD: Duration = Duration::from_secs(10);

/// What takes a few milliseconds; this is for a machine that is very busy.
const PROMPT: Duration = Duration::from_secs(4);

/// A deadline.
const SOON: Duration = Duration::from_millis(50);

/// Messages of a batch.
const BATCH: usize = 64;

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    match role.as_str() {
        "flood" => flood(&arguments),
        "rival" => rival(&arguments),
        "returner" => returner(&arguments),
        "flicker" => flicker(&arguments),
        _ => panic!("no role {role}"),
    }
}

/// A topic with room for many more messages than one look passes over.
fn topic(mode: Mode, name: &str) -> Topic<[u8]> {
    of_mode(mode, Topic::named(name)).messages(4096).bytes(1 << 16).envelope()
}

/// How long a message of a flood is worth delivering.
fn past() -> Envelope {
    Envelope::new().ttl(Duration::from_nanos(1))
}

/// Role: publishes messages that are past their time as soon as they are there, as fast as it can. Arguments: topic and mode.
fn flood(arguments: &str) {
    end_with_the_test();
    let (name, mode) = arguments.split_once(' ').unwrap();
    let bus = Bus::open_default().unwrap();
    let mut publisher = bus.publisher(topic(mode_of(mode), name)).unwrap();
    let past = past();
    let end = Instant::now() + FLOOD;
    say("open");
    while Instant::now() < end {
        publisher.publish_batch_with([(&b"too late"[..], &past); BATCH]).unwrap();
    }
    say("over");
    std::thread::sleep(LIMIT);
}

/// Role: another consumer of a group, so that what is settled makes room for more. Arguments: topic and group.
fn rival(arguments: &str) {
    end_with_the_test();
    let (topic, group) = arguments.split_once(' ').unwrap();
    let bus = Bus::open_default().unwrap();
    let mut consumer = bus.consumer(Topic::<[u8]>::named(topic), group).existing().open().unwrap();
    say("open");
    // Until the group is removed.
    while consumer.recv().is_ok() {}
}

/// Role: takes all there is and gives it back, to be taken again when the test is over. Arguments: topic and group.
fn returner(arguments: &str) {
    end_with_the_test();
    let (topic, group) = arguments.split_once(' ').unwrap();
    let bus = Bus::open_default().unwrap();
    let mut consumer = bus.consumer(Topic::<[u8]>::named(topic), group).existing().open().unwrap();
    say("open");
    for count in 0.. {
        let Ok(delivery) = consumer.recv() else { return };
        delivery.nack_after(Duration::from_secs(3600)).unwrap();
        if count == 1 << 16 {
            say("half");
        }
    }
}

/// Role: creates and removes topics as fast as it can. Argument: what their names begin with.
fn flicker(prefix: &str) {
    end_with_the_test();
    let bus = Bus::open_default().unwrap();
    let end = Instant::now() + FLOOD;
    say("open");
    for number in 0.. {
        let name = format!("{prefix}{}", number % 8);
        drop(bus.publisher(topic(Mode::Many, &name)).unwrap());
        bus.remove_topic(&name, true).unwrap();
        if Instant::now() >= end {
            break;
        }
    }
    say("over");
    std::thread::sleep(LIMIT);
}

/// A flooded topic; one at a time, since each takes all the processors there are.
struct Flooded {
    scene: Scene,
    _processes: Vec<Process>,
    _turn: MutexGuard<'static, ()>,
}

impl Flooded {
    fn new(mode: Mode, name: &str) -> Flooded {
        let turn = Flooded::turn();
        let scene = Scene::new("floods");
        let publishers = if mode == Mode::Many { 3 } else { 1 };
        let mut processes: Vec<Process> =
            (0..publishers).map(|_| scene.start("flood", &format!("{name} {mode}"))).collect();
        processes.iter_mut().for_each(|process| process.expect("open"));
        Flooded { scene, _processes: processes, _turn: turn }
    }

    fn turn() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Runs `act`, which must not wait for the flood to end.
fn promptly<R>(what: &str, act: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = act();
    let took = start.elapsed();
    assert!(took < PROMPT, "{what} took {took:?}");
    result
}

/// The kinds of group that pass over messages in ways of their own.
fn kinds_of_group() -> [(&'static str, GroupOptions); 5] {
    let options = GroupOptions::new;
    [
        ("plain", options()),
        ("ordered", options().ordered_by_key()),
        ("at-most-once", options().at_most_once()),
        ("exclusive", options().exclusive()),
        ("burying", options().dead_letter_expired()),
    ]
}

fn group(bus: &Bus, topic: &str, kind: &str, options: &GroupOptions) -> ConsumerBuilder<[u8]> {
    bus.consumer(Topic::<[u8]>::named(topic), kind).options(options.clone())
}

#[test]
fn a_subscriber_under_a_flood_keeps_its_deadline() {
    for mode in common::MODES {
        let flooded = Flooded::new(mode, "flood");
        let bus = flooded.scene.open();
        let mut subscriber = bus.subscriber(Topic::<[u8]>::named("flood")).open().unwrap();
        let late = promptly(&format!("a receive ({mode})"), || subscriber.recv_timeout(SOON).map(|_| ()));
        assert_eq!(late, Err(RecvError::TimedOut));
        // However many there are: it has had a share of the processors.
        assert!(subscriber.expired() > 0, "{mode}: there was no flood");
        let none = promptly(&format!("a look ({mode})"), || subscriber.try_recv().map(|found| found.is_none()));
        assert_eq!(none, Ok(true));
    }
}

#[test]
fn a_wildcard_under_a_flood_keeps_its_deadline() {
    let flooded = Flooded::new(Mode::Many, "mixed.flood");
    let mut wildcard = flooded.scene.open().wildcard::<[u8]>("mixed.*").open().unwrap();
    let late = promptly("a receive", || wildcard.recv_timeout(SOON).map(|_| ()));
    assert!(matches!(late, Err(WildcardError::TimedOut)), "{late:?}");
    assert!(promptly("a look", || wildcard.try_recv().unwrap().is_none()));
}

#[test]
fn a_consumer_under_a_flood_keeps_its_deadline() {
    let flooded = Flooded::new(Mode::Many, "flood");
    let bus = flooded.scene.open();
    for (kind, options) in kinds_of_group() {
        let mut consumer = group(&bus, "flood", kind, &options).open().unwrap();
        let mut rival = flooded.scene.start("rival", &format!("flood {kind}"));
        rival.expect("open");
        let late = promptly(&format!("a receive ({kind})"), || consumer.recv_timeout(SOON).map(|_| ()));
        assert_eq!(late, Err(RecvError::TimedOut));
        let late = promptly(&format!("a batch ({kind})"), || consumer.recv_batch_timeout(64, SOON).map(|_| ()));
        assert_eq!(late, Err(RecvError::TimedOut));
        let none = promptly(&format!("a look ({kind})"), || consumer.try_recv().map(|found| found.is_none()));
        assert_eq!(none, Ok(true));
        let mut deliveries = consumer.into_iter();
        let late = promptly(&format!("an item ({kind})"), || deliveries.recv_timeout(SOON).map(|_| ()));
        assert_eq!(late, Err(RecvError::TimedOut));
        drop(deliveries);
        bus.remove_group("flood", kind, true).unwrap();
    }
}

#[cfg(feature = "async")]
#[test]
fn a_task_under_a_flood_leaves_the_others_their_turns() {
    use tokio::time::timeout;

    let flooded = Flooded::new(Mode::Many, "mixed.flood");
    let bus = flooded.scene.open();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    // One after the other: a handle that is not read from would hold the flood back.
    let mut subscriber = bus.subscriber(Topic::<[u8]>::named("mixed.flood")).open().unwrap();
    let late =
        promptly("a receive", || runtime.block_on(async { timeout(SOON, subscriber.recv_async()).await.is_err() }));
    assert!(late);
    drop(subscriber);
    let mut wildcard = bus.wildcard::<[u8]>("mixed.*").open().unwrap();
    let late =
        promptly("a wildcard's", || runtime.block_on(async { timeout(SOON, wildcard.recv_async()).await.is_err() }));
    assert!(late);
    drop(wildcard);
    let mut consumer = bus.consumer(Topic::<[u8]>::named("mixed.flood"), "group").open().unwrap();
    let mut rival = flooded.scene.start("rival", "mixed.flood group");
    rival.expect("open");
    let late =
        promptly("a consumer's", || runtime.block_on(async { timeout(SOON, consumer.recv_async()).await.is_err() }));
    assert!(late);
}

#[test]
fn a_flood_on_one_topic_delays_no_other_topic_of_the_same_thread() {
    let flooded = Flooded::new(Mode::Many, "mixed.flood");
    let bus = flooded.scene.open();
    let mut calm = bus.publisher(topic(Mode::Many, "mixed.calm")).unwrap();

    let mut wildcard = bus.wildcard::<[u8]>("mixed.*").open().unwrap();
    calm.publish(b"to a wildcard").unwrap();
    promptly("a wildcard's other topic", || {
        assert_eq!(wildcard.recv_timeout(LIMIT).unwrap().as_bytes(), b"to a wildcard")
    });
    drop(wildcard);

    let flood = || Topic::<[u8]>::named("mixed.flood");
    let (heard, hears) = channel();
    let mut runner = Runner::new();
    runner.subscribe(bus.subscriber(flood()).open().unwrap(), |message| panic!("{message:?}"));
    runner.subscribe_wildcard(bus.wildcard::<[u8]>("*.flood").open().unwrap(), |message| panic!("{message:?}"));
    for (kind, options) in kinds_of_group() {
        runner.consume(group(&bus, "mixed.flood", kind, &options).open().unwrap(), |message| panic!("{message:?}"));
    }
    runner.subscribe(bus.subscriber(Topic::<[u8]>::named("mixed.calm")).open().unwrap(), move |message| {
        heard.send(message.unwrap().as_bytes().to_vec()).unwrap();
    });
    let running = runner.spawn().unwrap();
    for _ in 0..3 {
        calm.publish(b"to a runner").unwrap();
        promptly("a runner's other topic", || assert_eq!(hears.recv_timeout(LIMIT).unwrap(), b"to a runner"));
    }
    running.stop();
    promptly("a runner's end", || running.join().unwrap());
}

#[test]
fn a_route_under_a_flood_keeps_its_deadline() {
    let flooded = Flooded::new(Mode::Many, "mixed.flood");
    let mut route = flooded.scene.open().route("mixed.*", "routed").open().unwrap();
    assert!(!promptly("a step", || route.step(SOON).unwrap()));
}

/// Publishes more messages that are past their time than a look passes over, then one that is not.
fn publish_behind(publisher: &mut Publisher<[u8]>, last: &[u8]) {
    let past = past();
    for _ in 0..2048 {
        publisher.publish_with(b"too late", &past).unwrap();
    }
    publisher.publish(last).unwrap();
}

#[test]
fn what_lies_behind_many_expired_messages_is_found_in_one_call() {
    let scene = Scene::new("floods");
    let bus = scene.open();
    for mode in common::MODES {
        let name = format!("behind.{mode}");
        let mut publisher = bus.publisher(topic(mode, &name)).unwrap();
        let mut subscriber = bus.subscriber(Topic::<[u8]>::named(&name)).open().unwrap();
        publish_behind(&mut publisher, b"in time");
        assert_eq!(subscriber.try_recv().unwrap().unwrap().as_bytes(), b"in time", "{mode}");
        assert_eq!(subscriber.expired(), 2048);
    }
    for mode in common::LOGS {
        let name = format!("behind.{mode}");
        let mut publisher = bus.publisher(topic(mode, &name)).unwrap();
        let mut wildcard = bus.wildcard::<[u8]>(&name).open().unwrap();
        let mut consumers: Vec<_> =
            kinds_of_group().map(|(kind, options)| group(&bus, &name, kind, &options).open().unwrap()).into();
        publish_behind(&mut publisher, b"in time");
        assert_eq!(wildcard.try_recv().unwrap().unwrap().as_bytes(), b"in time", "{mode}");
        for consumer in &mut consumers {
            let kind = consumer.group().to_owned();
            let delivery = consumer.try_recv().unwrap().unwrap_or_else(|| panic!("{mode} {kind}: nothing"));
            assert_eq!(delivery.as_bytes(), b"in time");
            delivery.ack().unwrap();
        }
    }
}

#[test]
fn a_consumer_keeps_its_deadline_while_another_one_gives_back_a_long_window() {
    let _turn = Flooded::turn();
    let scene = Scene::new("floods");
    let bus = scene.open();
    let jobs = || Topic::<[u8]>::named("jobs");
    let mut publisher = bus.publisher(jobs().messages(1 << 18).bytes(1 << 16)).unwrap();
    let options = GroupOptions::new().window(1 << 18);
    let mut mine = bus.consumer(jobs(), "group").options(options).max_in_flight(1).open().unwrap().into_iter();
    for _ in 0..(1 << 18) / BATCH {
        publisher.publish_batch([&b"a job"[..]; BATCH]).unwrap();
    }
    // What is in hand holds the floor, so that every look at what was handed out sees all of it.
    let in_hand = mine.recv_timeout(LIMIT).unwrap();
    let mut returner = scene.start("returner", "jobs group");
    returner.expect("open");
    returner.expect("half");
    let mut took: Vec<Duration> = Vec::new();
    for _ in 0..8 {
        let start = Instant::now();
        assert_eq!(mine.recv_timeout(SOON).map(|_| ()), Err(RecvError::TimedOut));
        took.push(start.elapsed());
    }
    took.sort();
    // Half of them: this machine may be busy, and the other one may have come to an end.
    assert!(took[took.len() / 2] < 6 * SOON, "receives of {SOON:?} took {took:?}");
    in_hand.ack().unwrap();
}

#[test]
fn a_route_keeps_its_deadline_and_serves_its_inputs_while_topics_come_and_go() {
    let _turn = Flooded::turn();
    let scene = Scene::new("floods");
    let bus = scene.open();
    let mut calm = bus.publisher(topic(Mode::Many, "mixed.calm")).unwrap();
    let mut route = bus.route("mixed.*", "routed").open().unwrap();
    let mut flickers: Vec<Process> = (0..3).map(|at| scene.start("flicker", &format!("mixed.flicker-{at}-"))).collect();
    flickers.iter_mut().for_each(|flicker| flicker.expect("open"));
    for _ in 0..3 {
        calm.publish(b"an input").unwrap();
        assert!(promptly("an input", || route.step(LIMIT).unwrap()));
        assert!(!promptly("a step", || route.step(SOON).unwrap()));
    }
}

#[test]
fn a_wildcard_keeps_its_deadline_and_its_topics_while_others_come_and_go() {
    let _turn = Flooded::turn();
    let scene = Scene::new("floods");
    let bus = scene.open();
    let mut wildcard = bus.wildcard::<[u8]>("mixed.*").open().unwrap();
    let mut calm = bus.publisher(topic(Mode::Many, "mixed.calm")).unwrap();
    let mut flickers: Vec<Process> = (0..3).map(|at| scene.start("flicker", &format!("mixed.flicker-{at}-"))).collect();
    flickers.iter_mut().for_each(|flicker| flicker.expect("open"));
    for _ in 0..3 {
        calm.publish(b"to a wildcard").unwrap();
        promptly("a message", || assert_eq!(wildcard.recv_timeout(LIMIT).unwrap().as_bytes(), b"to a wildcard"));
        let late = promptly("a receive", || wildcard.recv_timeout(SOON).map(|_| ()));
        assert!(matches!(late, Err(WildcardError::TimedOut)), "{late:?}");
    }
}

#[test]
fn a_wildcard_takes_many_topics_at_once_one_after_the_other() {
    // More than a look takes or lets go of.
    const TOPICS: usize = 50;
    let scene = Scene::new("floods");
    let bus = scene.open();
    let open = || bus.wildcard::<[u8]>("many.*").open().unwrap();
    let (mut waited, mut looked, mut served) = (open(), open(), open());
    for number in 0..TOPICS {
        let mut publisher = bus.publisher(topic(Mode::Many, &format!("many.{number}"))).unwrap();
        publisher.publish(&[number as u8]).unwrap();
    }
    let all: Vec<u8> = (0..TOPICS as u8).collect();
    let sorted = |mut seen: Vec<u8>| {
        seen.sort();
        seen
    };
    let mut seen: Vec<u8> = (0..TOPICS).map(|_| waited.recv_timeout(LIMIT).unwrap()[0]).collect();
    assert_eq!(sorted(seen), all);
    // Whoever has been told that there is nothing has been told the truth.
    seen = std::iter::from_fn(|| looked.try_recv().unwrap().map(|message| message[0])).collect();
    assert_eq!(sorted(seen), all);
    seen = Vec::new();
    while wait_any(&mut [&mut served], Some(SOON)).is_some() {
        seen.extend(served.try_recv().unwrap().map(|message| message[0]));
    }
    assert_eq!(sorted(seen), all);
    for number in 0..TOPICS {
        bus.remove_topic(&format!("many.{number}"), true).unwrap();
    }
    assert!(matches!(waited.recv_timeout(SOON), Err(WildcardError::TimedOut)));
    assert!(looked.try_recv().unwrap().is_none());
    assert_eq!((waited.topics().count(), looked.topics().count()), (0, 0));
}

#[test]
fn a_route_of_a_pattern_passes_over_what_cannot_be_its_input() {
    let scene = Scene::new("floods");
    let bus = scene.open();
    let mut calm = bus.publisher(topic(Mode::Many, "mixed.calm")).unwrap();
    let refused =
        |name: &str| drop(bus.publisher(topic(Mode::Many, name).full(shmbus::Full::Overwrite).hold()).unwrap());
    refused("mixed.first");
    let mut route = bus.route("mixed.*", "routed").open().unwrap();
    refused("mixed.second");
    calm.publish(b"an input").unwrap();
    assert!(route.step(LIMIT).unwrap());
    let passed_over: Vec<&str> = route.passed_over().map(|(topic, _)| topic).collect();
    assert_eq!(passed_over, ["mixed.first", "mixed.second"]);
    assert_eq!(route.topics().collect::<Vec<_>>(), ["mixed.calm"]);
    assert!(!route.step(SOON).unwrap());
    assert_eq!((route.counts().routed, route.counts().passed_over), (1, 2));
    // Created anew, it is another topic.
    bus.remove_topic("mixed.first", true).unwrap();
    let mut first = bus.publisher(topic(Mode::Many, "mixed.first")).unwrap();
    first.publish(b"an input").unwrap();
    assert!(route.step(LIMIT).unwrap());
    // Nor does it end the others that somebody sends it away from one.
    bus.remove_group("mixed.first", "route.routed", true).unwrap();
    assert!(!route.step(SOON).unwrap());
    calm.publish(b"an input").unwrap();
    assert!(route.step(LIMIT).unwrap());
    assert_eq!(route.topics().collect::<Vec<_>>(), ["mixed.calm"]);
}

#[test]
fn a_route_takes_from_a_topic_that_was_created_anew_while_it_was_busy() {
    let scene = Scene::new("floods");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic(Mode::Many, "mixed.a")).unwrap();
    let mut route = bus.route("mixed.*", "routed").open().unwrap();
    publisher.publish(b"an input").unwrap();
    assert!(route.step(LIMIT).unwrap());
    bus.remove_topic("mixed.a", true).unwrap();
    let mut publisher = bus.publisher(topic(Mode::Many, "mixed.a")).unwrap();
    publisher.publish(b"another").unwrap();
    assert!(promptly("a step", || route.step(LIMIT).unwrap()));
}

#[test]
fn a_route_takes_from_topics_without_room_once_they_have_some() {
    let scene = Scene::new("floods");
    let mut serve = scene.shmbus(&["serve"]);
    serve.env("SHMBUS_BUDGET", (48 << 20).to_string());
    // The scene kills it.
    #[allow(clippy::zombie_processes)]
    serve.process_group(0).stdout(std::process::Stdio::null()).spawn().unwrap();
    await_that("the bus", || scene.options().spawn(false).open().is_ok());
    let bus = scene.open();
    let small = Topic::<[u8]>::named("mixed.small").messages(64).bytes(1 << 16).envelope();
    bus.create_topic("routed", &small.options(), false).unwrap();
    let mut route = bus.route("mixed.*", "routed").open().unwrap();
    // Its one place for a reader is the route's own, until it has a group there.
    let options = TopicOptions { max_subscribers: 1, ..small.options() };
    bus.create_topic("mixed.narrow", &options, false).unwrap();
    let mut narrow = bus.publisher(Topic::<[u8]>::named("mixed.narrow")).unwrap();
    assert!(!route.step(SOON).unwrap());
    narrow.publish(b"an input").unwrap();
    assert!(promptly("a step", || route.step(LIMIT).unwrap()));
    // Of as many as it opens in more than one look, too, and those are no news for who lists what it passes over.
    for number in 0..20 {
        bus.create_topic(&format!("mixed.narrow{number}"), &options, false).unwrap();
    }
    promptly("finding many", || {
        while route.topics().count() < 21 {
            assert!(!route.step(SOON).unwrap());
            assert_eq!(route.counts().passed_over, 0);
        }
    });

    let mut publisher = bus.publisher(small).unwrap();
    // Take all that is left.
    let fits = |bits: &u32| {
        let options = TopicOptions { mode: Mode::Channel, messages: 64, bytes: 1 << bits, ..TopicOptions::default() };
        bus.create_topic(&format!("ballast.{bits}"), &options, false).is_ok()
    };
    let ballast: Vec<u32> = (8..26).rev().filter(fits).collect();
    assert!(!route.step(SOON).unwrap());
    let passed_over: Vec<&str> = route.passed_over().map(|(topic, _)| topic).collect();
    assert_eq!(passed_over, ["mixed.small"]);
    // Nothing is lost meanwhile, though nobody reads.
    let published = (0..=u8::MAX).take_while(|number| publisher.try_publish(&[*number]).is_ok()).count();
    assert_eq!(published, 64);
    // Inputs need no coordinator, and none that stands still delays them: also when it is time to ask for room again.
    kill(scene.server("coordinator"), Signal::SIGSTOP).unwrap();
    let end = Instant::now() + Duration::from_secs(11);
    while Instant::now() < end {
        narrow.publish(b"an input").unwrap();
        assert!(promptly("a step", || route.step(LIMIT).unwrap()));
        assert!(!promptly("a step without input", || route.step(SOON).unwrap()));
    }
    kill(scene.server("coordinator"), Signal::SIGCONT).unwrap();
    let before = route.counts().routed;
    ballast.iter().for_each(|bits| bus.remove_topic(&format!("ballast.{bits}"), true).unwrap());
    (0..published).for_each(|_| assert!(route.step(LIMIT).unwrap()));
    assert_eq!((route.passed_over().count(), route.counts().routed - before), (0, 64));
}

#[test]
fn who_rests_after_a_look_that_left_off_is_not_fenced_and_holds_nobody_back() {
    let scene = Scene::new("floods");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic(Mode::Many, "jobs")).unwrap();
    let lease = Duration::from_millis(200);
    let options = GroupOptions::new().dead_letter_expired().lease(lease);
    let mut resting = group(&bus, "jobs", "g", &options).open().unwrap();
    let mut other = group(&bus, "jobs", "g", &options).open().unwrap();
    publish_behind(&mut publisher, b"in time");
    // Moves have begun that are as good as done, or somebody would ask for our end.
    assert_eq!(resting.recv_timeout(Duration::ZERO).map(|_| ()), Err(RecvError::TimedOut));
    let end = Instant::now() + 5 * lease;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        // Nobody but it takes messages, so that those behind are there.
        let _ = other.recv_timeout(left.min(lease)).map(|delivery| delivery.nack_after(Duration::ZERO));
    }
    assert_eq!(resting.recv_timeout(LIMIT).unwrap().as_bytes(), b"in time");

    let mut small = bus.publisher(Topic::<[u8]>::named("small").messages(64).envelope()).unwrap();
    let consumer = bus.consumer(Topic::<[u8]>::named("small"), "g").open().unwrap();
    let mut busy = bus.publisher(topic(Mode::Many, "busy")).unwrap();
    let listener = bus.subscriber(Topic::<[u8]>::named("busy")).open().unwrap();
    busy.publish(b"a long task").unwrap();
    for _ in 0..64 {
        small.publish_with(b"too late", &past()).unwrap();
    }
    let (let_go, may_go) = channel::<()>();
    let mut runner = Runner::new();
    runner.consume(consumer, |_| Ok(()));
    runner.subscribe(listener, move |_| {
        let _ = may_go.recv();
    });
    let running = runner.spawn().unwrap();
    // While the other handler is at work, there is room where everything has been settled.
    promptly("a publish", || small.publish(b"in time")).unwrap();
    drop(let_go);
    running.stop();
    running.join().unwrap();
}

#[test]
fn who_holds_what_cannot_be_moved_yet_may_pause_between_its_looks() {
    let scene = Scene::new("pauses");
    let bus = scene.open();
    let letters = Topic::<[u8]>::named("dlq.jobs.g").messages(16).envelope().hold().full(Full::Reject);
    let mut letters = bus.publisher(letters).unwrap();
    // No room for one more.
    while letters.publish(b"a letter").is_ok() {}
    let mut publisher = bus.publisher(topic(Mode::Many, "jobs")).unwrap();
    let lease = Duration::from_secs(4);
    let options = GroupOptions::new().lease(lease);
    let mut pausing = group(&bus, "jobs", "g", &options).open().unwrap();
    let mut other = group(&bus, "jobs", "g", &options).open().unwrap();
    publisher.publish(b"bad").unwrap();
    pausing.recv_timeout(LIMIT).unwrap().reject("bad").unwrap();
    for pause in [45, 75] {
        // Whoever looks meanwhile has what is overdue reclaimed, and its holder fenced.
        assert_eq!(other.recv_timeout(lease * pause / 100).map(|_| ()), Err(RecvError::TimedOut));
        assert!(pausing.try_recv().unwrap().is_none());
    }
}

#[test]
fn what_only_the_coordinator_can_release_keeps_no_look_from_what_is_new() {
    const OVERDUE: usize = 2000;
    let scene = Scene::new("floods");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic(Mode::Many, "jobs")).unwrap();
    let options = GroupOptions::new().effectively_once().lease(Duration::from_millis(50));
    let mut late = group(&bus, "jobs", "g", &options).open().unwrap();
    let consumer = group(&bus, "jobs", "g", &options).open().unwrap();
    let mut busy = bus.publisher(topic(Mode::Many, "busy")).unwrap();
    let listener = bus.subscriber(Topic::<[u8]>::named("busy")).open().unwrap();
    for _ in 0..4096 {
        busy.publish(b"work").unwrap();
    }
    for _ in 0..OVERDUE {
        publisher.publish(b"old").unwrap();
    }
    let mut leases = Vec::new();
    while leases.len() < OVERDUE {
        leases.extend(late.recv_batch(OVERDUE).unwrap().iter().map(|item| item.keep()));
    }
    let servers = [scene.server("keeper"), scene.server("coordinator")];
    servers.iter().for_each(|server| kill(*server, Signal::SIGSTOP).unwrap());
    std::thread::sleep(2 * SOON);
    publisher.publish(b"new").unwrap();
    let (heard, hears) = channel();
    let mut runner = Runner::new();
    runner.subscribe(listener, |_| std::thread::sleep(Duration::from_millis(2)));
    runner.consume(consumer, move |message| {
        heard.send(message.to_vec()).unwrap();
        Ok(())
    });
    let running = runner.spawn().unwrap();
    assert_eq!(hears.recv_timeout(PROMPT).unwrap(), b"new");
    servers.iter().for_each(|server| kill(*server, Signal::SIGCONT).unwrap());
    running.stop();
    running.join().unwrap();
}
