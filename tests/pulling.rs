//! Messages that outlive their receive, iteration, worker pools and callback runners.

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use std::{fs, thread};

use common::{LIMIT, MODES, Random, Scene, await_that, end_with_the_test, hear, of_mode, say};
use shmbus::{
    AckError, Bus, ConsumerBuilder, Deliveries, Envelope, Failure, Full, GoneReason, GroupOptions, Mode, OwnedDelivery,
    OwnedMessage, Publisher, RecvError, Repeats, Runner, RunnerError, Sequence, Start, Stopper, Topic, Wait,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Long enough never to end in a test.
const LONG: Duration = Duration::from_secs(600);

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, path)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "seek" => seek(&bus, &path),
        "remember" => remember(&bus, &path),
        "iterate" => iterate(&bus),
        "iterate_all" => iterate_all(&bus),
        "pool" => pool(&bus),
        "hoard" => hoard(&bus),
        "flood" => flood(&bus),
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

/// Role: four workers settle what one iterator takes, in whatever order comes; every seventh message fails at first.
fn pool(bus: &Bus) {
    end_with_the_test();
    let jobs = bus.consumer(jobs(), "workers").existing().max_in_flight(16).open().unwrap();
    let (hand_out, taken) = mpsc::channel();
    let taken = Mutex::new(taken);
    say("ready");
    thread::scope(|scope| {
        for worker in 0..4 {
            let taken = &taken;
            scope.spawn(move || {
                let mut done = bus.publisher(done()).unwrap();
                let mut random = Random::new(worker);
                loop {
                    let job: OwnedDelivery<u64> = taken.lock().unwrap().recv().unwrap();
                    (0..random.below(2000)).for_each(|_| std::hint::spin_loop());
                    assert_eq!(job.sequence().get(), *job, "another message's payload");
                    match (*job % 7, job.attempt()) {
                        (0, 1) => job.nack_after(Duration::ZERO).unwrap(),
                        (1, 1) => drop(job),
                        _ => {
                            let report = [*job, job.attempt().into(), std::process::id().into()];
                            job.ack().unwrap();
                            done.publish(&report).unwrap();
                        }
                    }
                }
            });
        }
        jobs.into_iter().for_each(|job| hand_out.send(job.unwrap()).unwrap());
    });
}

/// Role: takes five messages, acknowledges the third, and keeps the others.
fn hoard(bus: &Bus) {
    let jobs = bus.consumer(jobs(), "workers").existing().open().unwrap();
    let mut hand: Vec<_> = jobs.into_iter().take(5).map(Result::unwrap).collect();
    hand.remove(2).ack().unwrap();
    say(&hand.iter().map(|job| job.to_string()).collect::<Vec<_>>().join(" "));
    hear();
}

/// Role: stores each message with its sequence, in one write, and begins behind what is stored.
fn seek(bus: &Bus, path: &str) {
    end_with_the_test();
    let mut store = fs::OpenOptions::new().append(true).open(path).unwrap();
    let next = stored(path).last().map_or(0, |entry| entry[0] + 1);
    let mut messages = bus.subscriber(jobs()).start(Start::Sequence(Sequence::new(next))).open().unwrap();
    loop {
        let message = messages.recv().unwrap();
        store.write_all(format!("{} 0 {}\n", message.sequence(), *message).as_bytes()).unwrap();
        thread::sleep(Duration::from_micros(200));
    }
}

/// Role: stores each message with its publisher and number, in one write, before it acknowledges it; and knows from what is stored
/// what comes again.
fn remember(bus: &Bus, path: &str) {
    end_with_the_test();
    let mut store = fs::OpenOptions::new().append(true).open(path).unwrap();
    let mut repeats = Repeats::new(1000);
    repeats.extend(stored(path).iter().map(|entry| (entry[0], entry[1])));
    let mut jobs = bus.consumer(jobs(), "workers").existing().open().unwrap();
    loop {
        let job = jobs.recv().unwrap();
        let (publisher, number) = (job.publisher().unwrap(), job.publisher_number().unwrap());
        if repeats.is_new(publisher, number) {
            store.write_all(format!("{publisher} {number} {}\n", *job).as_bytes()).unwrap();
        }
        // So that many are killed between the two.
        thread::sleep(Duration::from_micros(200));
        job.ack().unwrap();
    }
}

/// What a store holds: three numbers a line.
fn stored(path: &str) -> Vec<[u64; 3]> {
    let entry =
        |line: &str| line.split(' ').map(|number| number.parse().unwrap()).collect::<Vec<_>>().try_into().unwrap();
    fs::read_to_string(path).unwrap().lines().map(entry).collect()
}

/// Role: publishes to the topic `flood` as fast as it can.
fn flood(bus: &Bus) {
    end_with_the_test();
    let mut publisher = bus.publisher(Topic::<u64>::new("flood")).unwrap();
    loop {
        publisher.publish(&0).unwrap();
    }
}

fn jobs() -> Topic<u64> {
    Topic::new("jobs").messages(4096)
}

/// What was acknowledged: job, attempt, process.
fn done() -> Topic<[u64; 3]> {
    Topic::new("done").messages(8192)
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

/// The topic of jobs with a group that has been created from the first message on.
fn open_jobs(bus: &Bus, options: &GroupOptions) -> Publisher<u64> {
    let publisher = bus.publisher(jobs()).unwrap();
    bus.create_group("jobs", "workers", options, Start::Oldest, false).unwrap();
    publisher
}

/// A consumer that sleeps at once when there is nothing to do.
fn sleeper(bus: &Bus) -> ConsumerBuilder<u64> {
    bus.consumer(jobs(), "workers").existing().wait(Wait::Park)
}

#[test]
fn worker_pools_settle_every_message_once_in_any_order() {
    const MESSAGES: u64 = 3000;
    let scene = Scene::new("pool");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new().back_off([Duration::ZERO]));
    let _done = bus.publisher(done()).unwrap();
    let mut reports = bus.subscriber(done()).open().unwrap();
    let mut pools = [scene.start("pool", ""), scene.start("pool", "")];
    pools.iter_mut().for_each(|pool| pool.expect("ready"));
    (0..MESSAGES).for_each(|number| assert!(publisher.publish(&number).is_ok()));
    let (mut settled, mut by, mut out_of_order) = (BTreeSet::new(), BTreeSet::new(), 0);
    let mut last = 0;
    for _ in 0..MESSAGES {
        let [job, attempt, pid] = *reports.recv_timeout(LIMIT).unwrap();
        assert!(settled.insert(job), "{job} was settled twice");
        assert_eq!(attempt, if job % 7 < 2 { 2 } else { 1 }, "{job}");
        by.insert(pid);
        out_of_order += u64::from(job < last);
        last = job;
    }
    assert_eq!((by.len(), out_of_order > 0), (2, true));
    publisher.wait_settled("workers", Sequence::new(MESSAGES - 1), LIMIT).unwrap();
    assert!(reports.try_recv().unwrap().is_none());
}

#[test]
fn what_a_killed_process_had_in_hand_comes_again_and_what_it_acked_does_not() {
    let scene = Scene::new("pool");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new().lease(LONG));
    (0..6).for_each(|number| assert!(publisher.publish(&number).is_ok()));
    let mut hoarder = scene.start("hoard", "");
    hoarder.expect("0 1 3 4");
    let mut jobs = sleeper(&bus).open().unwrap().into_iter();
    let mut take = || {
        let job = jobs.recv_timeout(LIMIT).unwrap();
        let seen = (*job, job.attempt());
        job.ack().unwrap();
        seen
    };
    assert_eq!(take(), (5, 1));
    hoarder.kill();
    assert_eq!([take(), take(), take(), take()], [(0, 2), (1, 2), (3, 2), (4, 2)]);
    // This look, which finds nothing, also tells the publisher what was settled.
    assert_eq!(jobs.recv_timeout(Duration::ZERO).unwrap_err(), RecvError::TimedOut);
    publisher.wait_settled("workers", Sequence::new(5), LIMIT).unwrap();
}

/// Whoever is killed and started again goes on by what its own store says (SPEC §3.10).
#[test]
fn a_foreign_store_has_each_message_once() {
    const MESSAGES: u64 = 2000;
    for role in ["seek", "remember"] {
        let scene = Scene::new("store");
        let bus = scene.open();
        let mut publisher = open_jobs(&bus, &GroupOptions::new());
        let (path, mut random) = (scene.directory().join(role), Random::new(7));
        fs::write(&path, "").unwrap();
        (0..MESSAGES).for_each(|number| assert!(publisher.publish(&number).is_ok()));
        let path = path.to_str().unwrap();
        let mut lives = 0;
        while stored(path).len() < MESSAGES as usize {
            let (process, before) = (scene.start(role, path), stored(path).len());
            await_that("more to be stored", || stored(path).len() > before);
            thread::sleep(Duration::from_micros(random.below(40_000)));
            process.kill();
            lives += 1;
        }
        let values: Vec<u64> = stored(path).iter().map(|entry| entry[2]).collect();
        assert_eq!(BTreeSet::from_iter(&values).len(), values.len(), "{role}: something is there twice");
        assert_eq!(values.len(), MESSAGES as usize, "{role}: something is lost");
        assert!(lives > 5, "{role}: {lives} lives");
    }
}

/// How long an iterator that sleeps takes to yield the next message after `act`. Sleepers look again after a second whatever
/// happens, so what comes much sooner has been woken.
fn wake_up(mut jobs: Deliveries<u64>, act: impl FnOnce()) -> (Duration, OwnedDelivery<u64>, Deliveries<u64>) {
    let (begin, begun) = mpsc::channel();
    thread::scope(|scope| {
        let sleeping = scope.spawn(move || {
            begin.send(this_thread()).unwrap();
            let job = jobs.recv_timeout(LIMIT).unwrap();
            (Instant::now(), job, jobs)
        });
        await_sleep(&begun.recv().unwrap());
        let started = Instant::now();
        act();
        let (woken, job, jobs) = sleeping.join().unwrap();
        (woken.saturating_duration_since(started), job, jobs)
    })
}

const SOON: Duration = Duration::from_millis(500);

#[test]
fn settling_on_another_thread_wakes_who_sleeps_at_the_limit() {
    let scene = Scene::new("pool");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new().lease(LONG).back_off([Duration::ZERO]));
    (0..8).for_each(|number| assert!(publisher.publish(&number).is_ok()));
    let mut jobs = sleeper(&bus).max_in_flight(2).open().unwrap().into_iter();
    let (mut first, mut second) = (jobs.next().unwrap().unwrap(), jobs.next().unwrap().unwrap());
    let acts: [fn(OwnedDelivery<u64>); 4] =
        [|job| job.ack().unwrap(), |job| job.reject("no").unwrap(), |job| job.nack().unwrap(), drop];
    for settle in acts {
        let (took, job, back) = wake_up(jobs, || settle(first));
        assert!(took < SOON, "{} after {took:?}", *job);
        (first, second, jobs) = (second, job, back);
    }
}

#[test]
fn what_is_settled_while_the_receiver_sleeps_shows_at_once() {
    let scene = Scene::new("pool");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new().lease(LONG));
    (0..2).for_each(|number| assert!(publisher.publish(&number).is_ok()));
    let mut jobs = sleeper(&bus).open().unwrap().into_iter();
    let hand = [jobs.next().unwrap().unwrap(), jobs.next().unwrap().unwrap()];
    let (_, job, _jobs) = wake_up(jobs, || {
        // Nobody waits when they are acknowledged, and the receiver goes on sleeping.
        hand.into_iter().rev().for_each(|job| job.ack().unwrap());
        let started = Instant::now();
        publisher.wait_settled("workers", Sequence::new(1), LIMIT).unwrap();
        assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
        publisher.publish(&2).unwrap();
    });
    job.ack().unwrap();
}

#[test]
fn deliveries_end_with_their_topic_and_outlive_their_iterator() {
    let scene = Scene::new("pool");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new().lease(LONG));
    (0..3).for_each(|number| assert!(publisher.publish(&number).is_ok()));
    let mut jobs = sleeper(&bus).open().unwrap().into_iter();
    let (mut first, second) = (jobs.next().unwrap().unwrap(), jobs.next().unwrap().unwrap());
    drop(jobs);
    first.extend(LONG).unwrap();
    first.ack().unwrap();
    assert_eq!(bus.topic("jobs").unwrap().groups[0].consumers.len(), 1, "one is in hand");
    drop(second);
    await_that("the consumer's end", || bus.topic("jobs").unwrap().groups[0].consumers.is_empty());
    let mut jobs = sleeper(&bus).open().unwrap().into_iter();
    let seen = |job: &OwnedDelivery<u64>| (**job, job.attempt());
    let hand = [jobs.next().unwrap().unwrap(), jobs.next().unwrap().unwrap()];
    let mut all = hand.each_ref().map(seen);
    all.sort();
    assert_eq!(all, [(1, 2), (2, 1)]);
    drop(publisher);
    bus.remove_topic("jobs", true).unwrap();
    assert_eq!(jobs.next().unwrap().unwrap_err(), RecvError::Gone(GoneReason::Removed));
    assert!(jobs.next().is_none());
    for job in hand {
        assert_eq!(job.ack(), Err(AckError::Gone(GoneReason::Removed)));
    }
}

/// The group's dead letters from the first one on: payload, reason and attempts.
fn letters(bus: &Bus, count: usize) -> Vec<(Vec<u8>, String, String)> {
    let topic = Topic::<[u8]>::new("dlq.jobs.workers");
    await_that("the dead-letter topic", || bus.topic(topic.name()).is_ok());
    let mut subscriber = bus.subscriber(topic).start(Start::Oldest).open().unwrap();
    let mut next = || {
        let letter = subscriber.recv_timeout(LIMIT).unwrap();
        let header = |name| String::from_utf8(letter.header(name).unwrap().to_vec()).unwrap();
        (letter.to_vec(), header("reason"), header("attempts"))
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn a_runner_serves_all_kinds_of_handles_on_one_thread() {
    let scene = Scene::new("runner");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new());
    let (tell, told) = mpsc::channel();
    let mut runner = Runner::new();
    let say = |what: &'static str| {
        let tell = tell.clone();
        move |text: String| tell.send((what, text, thread::current().id())).unwrap()
    };
    let (topic, pattern, group) = (say("topic"), say("pattern"), say("group"));
    runner.subscribe(bus.subscriber(jobs()).open().unwrap(), move |job| topic(job.unwrap().to_string()));
    let wildcard = bus.wildcard::<u64>("*").open().unwrap();
    runner.subscribe_wildcard(wildcard, move |job| pattern(job.unwrap().topic().to_owned()));
    runner.consume(sleeper(&bus).open().unwrap(), move |job| {
        group(format!("{} {}", **job, job.attempt()));
        Ok(())
    });
    runner.respond(bus.responder(Topic::new("greetings")).unwrap(), |request| {
        let request = request.unwrap();
        let greeting = [b"hello ", request.payload()].concat();
        request.reply(&greeting).unwrap();
    });
    let running = runner.spawn().unwrap();
    for round in 0..3u64 {
        publisher.publish(&round).unwrap();
        let mut all: Vec<_> = (0..3).map(|_| told.recv_timeout(LIMIT).unwrap()).collect();
        all.sort_by_key(|(what, ..)| *what);
        assert!(all.iter().all(|(.., thread)| *thread == all[0].2));
        let all: Vec<_> = all.iter().map(|(what, text, _)| (*what, text.as_str())).collect();
        let (number, job) = (round.to_string(), format!("{round} 1"));
        assert_eq!(all, [("group", &*job), ("pattern", "jobs"), ("topic", &*number)]);
        let mut requester = bus.requester(Topic::new("greetings")).unwrap();
        assert_eq!(*requester.request(b"you", LIMIT).unwrap(), *b"hello you");
    }
    publisher.wait_settled("workers", Sequence::new(2), LIMIT).unwrap();
    running.stop();
    running.join().unwrap();
    assert!(bus.topic("jobs").unwrap().groups[0].consumers.is_empty(), "its handles are closed");
}

/// Stops a runner at the end of a scope that waits for it, also where that end is a failure.
struct StopAtEnd(Stopper);

impl Drop for StopAtEnd {
    fn drop(&mut self) {
        self.0.stop();
    }
}

#[test]
fn what_a_handler_returns_settles_its_message() {
    let scene = Scene::new("runner");
    let bus = scene.open();
    let options = GroupOptions::new().lease(LONG).back_off([Duration::ZERO]).max_attempts(3);
    let mut publisher = open_jobs(&bus, &options);
    (0..4).for_each(|number| assert!(publisher.publish(&number).is_ok()));
    let calls = Mutex::new(Vec::new());
    let mut runner = Runner::new();
    let stopper = runner.stopper();
    runner.consume(sleeper(&bus).open().unwrap(), |job| {
        calls.lock().unwrap().push((**job, job.attempt()));
        match (**job, job.attempt()) {
            (0, attempt) => Err(Failure::from(format!("failure {attempt}"))),
            (1, _) => Err(Failure::Reject("never".to_owned())),
            (2, 1) => Ok("two".parse::<u64>().map(drop)?),
            _ => Ok(()),
        }
    });
    thread::scope(|scope| {
        // On the caller's thread, with what that one lends.
        let running = scope.spawn(|| runner.run());
        let stop = StopAtEnd(stopper);
        publisher.wait_settled("workers", Sequence::new(3), LIMIT).unwrap();
        let mut letters = letters(&bus, 2);
        letters.sort();
        let letter = |job: u64, reason: &str, attempts: &str| {
            (job.to_le_bytes().to_vec(), reason.to_owned(), attempts.to_owned())
        };
        assert_eq!(letters, [letter(0, "failure 3", "3"), letter(1, "never", "1")]);
        drop(stop);
        running.join().unwrap().unwrap();
    });
    let mut calls = calls.into_inner().unwrap();
    calls.sort();
    assert_eq!(calls, [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 2), (3, 1)]);
}

#[test]
fn a_handler_that_panics_gives_its_message_back_and_ends_the_runner() {
    let scene = Scene::new("runner");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new().lease(LONG));
    publisher.publish(&7).unwrap();
    let mut runner = Runner::new();
    runner.consume(sleeper(&bus).open().unwrap(), |job| panic!("cannot do {}", **job));
    let running = runner.spawn().unwrap();
    let panicked = panic::catch_unwind(AssertUnwindSafe(|| running.join())).unwrap_err();
    assert_eq!(panicked.downcast_ref::<String>().unwrap(), "cannot do 7");
    let mut next = sleeper(&bus).open().unwrap();
    let job = next.recv_timeout(LIMIT).unwrap();
    assert_eq!((*job, job.attempt()), (7, 2));
    job.ack().unwrap();
}

#[test]
fn a_runner_that_sleeps_stops_at_once() {
    let scene = Scene::new("runner");
    let bus = scene.open();
    let _publisher = open_jobs(&bus, &GroupOptions::new());
    let mut runner = Runner::new();
    runner.wait(Wait::Park);
    runner.subscribe(bus.subscriber(jobs()).open().unwrap(), |_| ());
    runner.consume(sleeper(&bus).open().unwrap(), |_| Ok(()));
    let stopper = runner.stopper();
    let (begin, begun) = mpsc::channel();
    let running = thread::spawn(move || {
        begin.send(this_thread()).unwrap();
        runner.run()
    });
    await_sleep(&begun.recv().unwrap());
    let started = Instant::now();
    stopper.stop();
    running.join().unwrap().unwrap();
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    Runner::new().run().unwrap();
}

#[test]
fn stopping_a_runner_loses_no_message_that_it_had_just_found() {
    const ROUNDS: u64 = 200;
    let scene = Scene::new("runner");
    let bus = scene.open();
    // What such a group hands out is not delivered again, handled or not.
    let mut publisher = open_jobs(&bus, &GroupOptions::new().at_most_once());
    let handled = AtomicU64::new(0);
    let count = || {
        handled.fetch_add(1, Ordering::Relaxed);
    };
    for round in 0..ROUNDS {
        let mut runner = Runner::new();
        runner.wait(Wait::Spin).consume(sleeper(&bus).open().unwrap(), |_| {
            count();
            Ok(())
        });
        let stopper = runner.stopper();
        thread::scope(|scope| {
            let running = scope.spawn(|| runner.run());
            let _stop = StopAtEnd(stopper.clone());
            // A few microseconds more each time, so that the stop comes everywhere.
            publisher.publish(&round).unwrap();
            (0..round * 5).for_each(|_| std::hint::spin_loop());
            stopper.stop();
            running.join().unwrap().unwrap();
        });
    }
    let mut rest = sleeper(&bus).open().unwrap();
    while handled.load(Ordering::Relaxed) < ROUNDS {
        rest.recv_timeout(LIMIT).unwrap().ack().unwrap();
        count();
    }
}

#[test]
fn a_flood_on_one_topic_keeps_no_other_waiting() {
    let scene = Scene::new("runner");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new());
    let flood = Topic::<u64>::new("flood");
    let mut flooding = bus.publisher(flood.clone()).unwrap();
    let flooded = bus.subscriber(flood).start(Start::Oldest).open().unwrap();
    (0..1000).for_each(|number| assert!(flooding.publish(&number).is_ok()));
    (0..10).for_each(|number| assert!(publisher.publish(&number).is_ok()));
    let (tell, told) = mpsc::channel();
    let floods = Arc::new(AtomicU64::new(0));
    let (counted, mut runner) = (floods.clone(), Runner::new());
    runner.subscribe(flooded, move |message| {
        assert!(message.is_ok());
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let before = floods.clone();
    runner.consume(sleeper(&bus).open().unwrap(), move |_| Ok(tell.send(before.load(Ordering::Relaxed))?));
    let running = runner.spawn().unwrap();
    // Turn and turn about.
    (1..=10).for_each(|turn| assert_eq!(told.recv_timeout(LIMIT).unwrap(), turn));
    let flooder = scene.start("flood", "");
    await_that("the flood", || floods.load(Ordering::Relaxed) > 2000);
    for number in 10..60 {
        let started = Instant::now();
        publisher.publish(&number).unwrap();
        told.recv_timeout(LIMIT).unwrap();
        assert!(started.elapsed() < SOON, "{number} after {:?}", started.elapsed());
    }
    flooder.kill();
    running.stop();
    running.join().unwrap();
}

#[test]
fn what_ends_leaves_a_runner_and_the_last_one_ends_it() {
    let scene = Scene::new("runner");
    let bus = scene.open();
    let publisher = open_jobs(&bus, &GroupOptions::new());
    let mut other = bus.publisher(Topic::<u64>::new("other")).unwrap();
    let (tell, told) = mpsc::channel();
    let mut runner = Runner::new();
    runner.consume(sleeper(&bus).open().unwrap(), |_| Ok(()));
    let heard = tell.clone();
    runner.subscribe(bus.subscriber(Topic::<u64>::new("other")).open().unwrap(), move |message| {
        heard.send(message.map_or_else(|error| format!("{error:?}"), |message| message.to_string())).unwrap();
    });
    runner.on_trouble(move |trouble| tell.send(trouble.to_string()).unwrap());
    let running = runner.spawn().unwrap();
    let hear = || told.recv_timeout(LIMIT).unwrap();
    drop(publisher);
    bus.remove_topic("jobs", true).unwrap();
    assert_eq!(hear(), "group \"workers\" of topic \"jobs\" is not served any more: the topic is gone: it was removed");
    other.publish(&7).unwrap();
    assert_eq!(hear(), "7");
    assert!(!running.is_finished());
    bus.stop().unwrap();
    assert_eq!(hear(), "Gone(Stopped)");
    assert_eq!(hear(), "topic \"other\" is not served any more: the topic is gone: the bus was stopped");
    let Err(RunnerError::Ended { handle, source }) = running.join() else { panic!("it was not stopped") };
    assert_eq!((handle.as_str(), source), ("topic \"other\"", RecvError::Gone(GoneReason::Stopped)));
}

#[test]
fn a_handler_that_outlives_its_lease_is_told_of() {
    let scene = Scene::new("runner");
    let bus = scene.open();
    let mut publisher = open_jobs(&bus, &GroupOptions::new().lease(Duration::from_millis(20)));
    publisher.publish(&0).unwrap();
    let (tell, told) = mpsc::channel();
    let (hand, handed) = mpsc::channel();
    let handed = Mutex::new(handed);
    let mut runner = Runner::new();
    let begins = tell.clone();
    runner.consume(sleeper(&bus).open().unwrap(), move |_| {
        begins.send("begun".to_owned())?;
        Ok(handed.lock().unwrap().recv()?)
    });
    runner.on_trouble(move |trouble| tell.send(trouble.to_string()).unwrap());
    let running = runner.spawn().unwrap();
    assert_eq!(told.recv_timeout(LIMIT).unwrap(), "begun");
    let mut other = sleeper(&bus).open().unwrap();
    let job = other.recv_timeout(LIMIT).unwrap();
    assert_eq!(job.attempt(), 2);
    hand.send(()).unwrap();
    let trouble = told.recv_timeout(LIMIT).unwrap();
    assert!(trouble.starts_with("group \"workers\" of topic \"jobs\": message 0 was handled, but"), "{trouble}");
    job.ack().unwrap();
    running.stop();
    running.join().unwrap();
}
