//! Processes that die or stop anywhere, with real processes: what they published is whole or absent, and life goes on.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    LIMIT, Process, Random, Scene, await_that, checksum, end_with_the_test, mode_of, publisher_after, raw, receive,
    say, seed,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::{
    Bus, Full, GoneReason, Mode, OpenError, PublishError, Publisher, RecvError, Refusal, Start, Subscriber, Topic,
};

/// Publishers killed on each kind of ring.
const KILLS: u64 = 100;

/// What a publisher calls itself when it says that all is over.
const LAST: u64 = u64::MAX;

/// What one calls itself that lives through it all.
const SURVIVOR: u64 = u64::MAX - 1;

/// Processes killed while memory is reserved for them, and for how much.
const HOARDS: u64 = 12;
const HOARD_BYTES: u64 = 256 << 20;

/// How long repair may take after a death: 10 ms by contract, and then what a busy machine adds.
const REPAIR: Duration = Duration::from_secs(5);

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "publish" => publish_for_ever(&bus, &arguments),
        "subscribe" => subscribe_and_stop(&bus, &arguments),
        "publish when told" => publish_when_told(&bus, &arguments),
        "hoard" => hoard(&bus),
        _ => panic!("no role {role}"),
    }
}

fn topic(mode: &str) -> Topic<[u8]> {
    raw(mode_of(mode), "deaths").messages(64).bytes(64 << 10)
}

/// A message that can be checked by itself and against its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    /// Which publisher.
    life: u64,
    /// Its how-manieth message.
    number: u64,
    /// Messages of the same batch before and after it.
    before: u64,
    after: u64,
}

impl Stamp {
    fn message(self, len: usize, random: &mut Random) -> Vec<u8> {
        let words = [self.life, self.number, self.before, self.after];
        let mut message: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        let filled = message.len();
        message.resize(filled + len, 0);
        random.fill(&mut message[filled..]);
        let sum = checksum(&message);
        message.extend(sum.to_le_bytes());
        message
    }

    fn of(message: &[u8]) -> Stamp {
        let (body, sum) = message.split_at(message.len() - 8);
        assert_eq!(checksum(body), word(sum), "a torn message of {} bytes", message.len());
        let [life, number, before, after] = [0, 8, 16, 24].map(|at| word(&body[at..]));
        Stamp { life, number, before, after }
    }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// Role: publishes messages of every kind until it is killed. Arguments: mode, life, seed.
fn publish_for_ever(bus: &Bus, arguments: &str) {
    end_with_the_test();
    let [mode, life, seed] = arguments.split(' ').collect::<Vec<_>>()[..] else { panic!("{arguments}") };
    let mut random = Random::new(seed.parse().unwrap());
    let mut publisher = publisher_after(bus, &topic(mode));
    let mut number = 0;
    say("publishing");
    loop {
        number = publish_something(&mut publisher, life.parse().unwrap(), number, &mut random);
    }
}

/// One message, batch or loan, small or in the arena; returns the next number.
fn publish_something(publisher: &mut Publisher<[u8]>, life: u64, number: u64, random: &mut Random) -> u64 {
    let len = |random: &mut Random| [0, 16, 200, 3000][random.below(4) as usize] + random.below(8) as usize;
    match random.below(3) {
        0 => {
            let len = len(random);
            let message = Stamp { life, number, before: 0, after: 0 }.message(len, random);
            publisher.publish(&message).unwrap();
            number + 1
        }
        1 => {
            let len = len(random);
            let message = Stamp { life, number, before: 0, after: 0 }.message(len, random);
            let mut loan = publisher.loan_bytes(message.len()).unwrap();
            loan.copy_from_slice(&message);
            loan.publish().unwrap();
            number + 1
        }
        _ => {
            let count = 2 + random.below(9);
            let batch: Vec<Vec<u8>> = (0..count)
                .map(|at| {
                    let len = len(random);
                    let stamp = Stamp { life, number: number + at, before: at, after: count - 1 - at };
                    stamp.message(len, random)
                })
                .collect();
            publisher.publish_batch(batch.iter().map(Vec::as_slice)).unwrap();
            number + count
        }
    }
}

/// Reads until the last message and checks each against the one before; what came, in order.
fn read_all(mut subscriber: Subscriber<[u8]>) -> Vec<Stamp> {
    let mut stamps: Vec<Stamp> = Vec::new();
    let mut next_of = std::collections::HashMap::new();
    loop {
        let message = subscriber.recv_timeout(LIMIT).unwrap();
        let (sequence, stamp) = (message.sequence().get(), Stamp::of(&message));
        assert_eq!(sequence, stamps.len() as u64, "a hole or a repetition");
        let next = next_of.entry(stamp.life).or_insert(0);
        assert_eq!(stamp.number, *next, "publisher {} skipped or repeated something", stamp.life);
        *next += 1;
        let expected = stamps.last().filter(|last| last.after > 0);
        let expected = expected.map(|last| (last.life, last.before + 1, last.after - 1));
        let found = (stamp.life, stamp.before, stamp.after);
        match expected {
            Some(expected) => assert_eq!(found, expected, "a batch is torn at {sequence}"),
            None => assert_eq!(stamp.before, 0, "a batch without its beginning at {sequence}"),
        }
        stamps.push(stamp);
        if stamp.life == LAST {
            return stamps;
        }
    }
}

fn kill_publishers(mode: Mode) {
    let scene = Scene::new("killed");
    let bus = scene.open();
    let seed = seed();
    let mut random = Random::new(seed);
    let topic = topic(&mode.to_string());
    bus.create(&topic).unwrap();
    let readers = if mode == Mode::Channel { 1 } else { 2 };
    let readers: Vec<_> = (0..readers)
        .map(|_| {
            let subscriber = bus.subscriber(topic.clone()).start(Start::Oldest).open().unwrap();
            thread::spawn(move || read_all(subscriber))
        })
        .collect();
    // Another publisher lives through it all, where there may be one.
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        if mode == Mode::Many {
            let (mut survivor, mut random) = (bus.publisher(topic.clone()).unwrap(), random.clone());
            let over = &over;
            scope.spawn(move || {
                let mut number = 0;
                while !over.load(Ordering::Relaxed) {
                    number = publish_something(&mut survivor, SURVIVOR, number, &mut random);
                }
            });
        }
        // The next one starts up while the present one is at work; on exclusive topics it waits for its death.
        let arguments = |life: u64| format!("{mode} {life} {}", seed.wrapping_add(life));
        let mut waiting = scene.start("publish", &arguments(0));
        for life in 0..KILLS {
            let mut publisher = waiting;
            publisher.expect("publishing");
            waiting = scene.start("publish", &arguments(life + 1));
            thread::sleep(Duration::from_micros(random.below(4000)));
            publisher.kill();
        }
        over.store(true, Ordering::Relaxed);
        waiting.kill();
    });
    let mut last = publisher_after(&bus, &topic);
    last.publish(&Stamp { life: LAST, number: 0, before: 0, after: 0 }.message(0, &mut random)).unwrap();
    let mut read = readers.into_iter().map(|reader| reader.join().unwrap());
    let first = read.next().unwrap();
    assert!(read.all(|other| other == first), "two subscribers saw different orders");
    let lives = first.iter().map(|stamp| stamp.life).collect::<std::collections::HashSet<_>>();
    println!("{} messages of {} publishers", first.len(), lives.len());
    // How many do is the scheduler's; on two busy cores it was half of them.
    assert!(lives.len() as u64 > KILLS / 10, "too few publishers got something out before they died to tell anything");
}

#[test]
fn a_killed_exclusive_publisher_leaves_whole_messages_or_none() {
    kill_publishers(Mode::Exclusive);
}

#[test]
fn one_of_many_publishers_killed_leaves_whole_messages_or_none() {
    kill_publishers(Mode::Many);
}

#[test]
fn a_killed_channel_sender_leaves_whole_messages_or_none() {
    kill_publishers(Mode::Channel);
}

/// Role: holds the ring back. Arguments: mode.
fn subscribe_and_stop(bus: &Bus, arguments: &str) {
    end_with_the_test();
    let _subscriber = bus.subscriber(topic(arguments)).start(Start::Oldest).open().unwrap();
    say("subscribed");
    loop {
        thread::park();
    }
}

#[test]
fn a_killed_subscriber_no_longer_holds_the_publisher() {
    let scene = Scene::new("held");
    let bus = scene.open();
    for mode in [Mode::Exclusive, Mode::Many] {
        let topic = topic(&mode.to_string());
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        for _ in 0..5 {
            let mut subscriber = scene.start("subscribe", &mode.to_string());
            subscriber.expect("subscribed");
            let full = loop {
                if let Err(full) = publisher.try_publish(b"x") {
                    break full;
                }
            };
            assert!(matches!(full, PublishError::Full { .. }), "{full}");
            let waiting = thread::spawn(move || {
                let outcome = publisher.publish(b"waited for");
                (publisher, outcome, Instant::now())
            });
            let killed = Instant::now();
            subscriber.kill();
            let (back, outcome, published) = waiting.join().unwrap();
            outcome.unwrap();
            assert!(published - killed < REPAIR, "{mode}: released after {:?}", published - killed);
            publisher = back;
        }
    }
}

#[test]
fn a_killed_receiver_leaves_the_channel_to_the_next() {
    let scene = Scene::new("receiver");
    let bus = scene.open();
    let topic = topic("channel");
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = scene.start("subscribe", "channel");
    subscriber.expect("subscribed");
    publisher.publish(b"kept").unwrap();
    subscriber.kill();
    let mut next = None;
    await_that("the receiver's place", || {
        next = bus.subscriber(topic.clone()).open().ok();
        next.is_some()
    });
    assert_eq!(receive(&mut next.unwrap()), (0, b"kept".to_vec()));
}

#[test]
fn a_stopped_publisher_delays_nobody() {
    let scene = Scene::new("stopped");
    let bus = scene.open();
    let topic = topic("many");
    let mut random = Random::new(seed());
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = bus.subscriber(topic).open().unwrap();
    let mut stopped: Vec<Process> = (0..2).map(|life| scene.start("publish", &format!("many {life} {life}"))).collect();
    stopped.iter_mut().for_each(|process| process.expect("publishing"));
    let mut number = 0;
    for _ in 0..30 {
        // Whatever they are doing just now.
        let moment = Instant::now() + Duration::from_micros(random.below(2000));
        while Instant::now() < moment {
            let _ = subscriber.try_recv().unwrap().map(|message| Stamp::of(&message));
        }
        stopped.iter().for_each(|process| process.signal(Signal::SIGSTOP));
        for _ in 0..100 {
            let message = Stamp { life: LAST, number, before: 0, after: 0 }.message(100, &mut random);
            loop {
                match publisher.try_publish(&message) {
                    Ok(_) => break,
                    // What the others left in the ring is read before ours: nobody waits for them.
                    Err(PublishError::Full { .. }) => drop(Stamp::of(&receive(&mut subscriber).1)),
                    Err(error) => panic!("{error}"),
                }
            }
            while Stamp::of(&receive(&mut subscriber).1) != (Stamp { life: LAST, number, before: 0, after: 0 }) {}
            number += 1;
        }
        stopped.iter().for_each(|process| process.signal(Signal::SIGCONT));
    }
}

#[test]
fn traffic_goes_on_while_the_coordinator_or_its_keeper_dies() {
    let scene = Scene::new("servers");
    let bus = scene.open();
    let topic = topic("many");
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
    let mut number = 0u64;
    let mut exchange = |count: u64| {
        for _ in 0..count {
            publisher.publish(&number.to_le_bytes()).unwrap();
            assert_eq!(receive(&mut subscriber), (number, number.to_le_bytes().to_vec()));
            number += 1;
        }
    };
    exchange(10);
    for victim in ["coordinator", "keeper", "coordinator", "keeper"] {
        let pid = scene.server(victim);
        // Nobody restarts it while the other one is stopped: traffic has to do without.
        let other = scene.server(if victim == "keeper" { "coordinator" } else { "keeper" });
        kill(other, Signal::SIGSTOP).unwrap();
        kill(pid, Signal::SIGKILL).unwrap();
        exchange(1000);
        kill(other, Signal::SIGCONT).unwrap();
        exchange(1000);
        await_that("the successor", || scene.servers(Some(victim)).iter().any(|new| *new != pid));
        // Joining works again, and the newcomer meets the same topic.
        let newcomer = scene.open();
        assert_eq!(newcomer.topic(topic.name()).unwrap().subscribers.len(), 1);
        drop(newcomer.publisher(topic.clone()).unwrap());
        exchange(10);
    }
    bus.stop().unwrap();
    assert!(matches!(subscriber.recv(), Err(RecvError::Gone(GoneReason::Stopped))));
}

#[test]
fn who_dies_together_with_the_coordinator_is_cleared_away_all_the_same() {
    let scene = Scene::new("together");
    let bus = scene.open();
    let topic = topic("exclusive");
    bus.create(&topic).unwrap();
    for life in 0..5 {
        let mut publisher = scene.start("publish", &format!("exclusive {life} {life}"));
        publisher.expect("publishing");
        let mut subscriber = scene.start("subscribe", "exclusive");
        subscriber.expect("subscribed");
        let coordinator = scene.server("coordinator");
        publisher.signal(Signal::SIGKILL);
        subscriber.signal(Signal::SIGKILL);
        kill(coordinator, Signal::SIGKILL).unwrap();
        let mut next = publisher_after(&bus, &topic);
        // The dead reader holds nothing: the ring goes round.
        for _ in 0..200 {
            next.publish_timeout(b"x", LIMIT).unwrap();
        }
    }
    await_that("the dead to be forgotten", || {
        let status = bus.topic(topic.name()).unwrap();
        status.publishers.is_empty() && status.subscribers.is_empty()
    });
}

/// Role: publishes one message for each line it hears. Arguments: what to put in.
fn publish_when_told(bus: &Bus, arguments: &str) {
    let mut publisher = bus.publisher(topic("many")).unwrap();
    say("joined");
    loop {
        let line = common::hear();
        publisher.publish(format!("{arguments} {line}").as_bytes()).unwrap();
        say("published");
    }
}

#[test]
fn a_reader_meets_new_arenas_without_the_coordinator() {
    let scene = Scene::new("arenas");
    let bus = scene.open();
    bus.create(&topic("many")).unwrap();
    let mut subscriber = bus.subscriber(topic("many")).open().unwrap();
    let mut publishers: Vec<Process> =
        (0..3).map(|number| scene.start("publish when told", &format!("p{number}"))).collect();
    publishers.iter_mut().for_each(|publisher| publisher.expect("joined"));
    let coordinator = scene.server("coordinator");
    kill(coordinator, Signal::SIGSTOP).unwrap();
    for round in 0..5 {
        for publisher in &mut publishers {
            publisher.tell(&format!("round {round}"));
            publisher.expect("published");
        }
    }
    for sequence in 0..15 {
        let expected = format!("p{} round {}", sequence % 3, sequence / 3);
        assert_eq!(receive(&mut subscriber), (sequence, expected.into_bytes()));
    }
    assert!(subscriber.try_recv().unwrap().is_none());
    kill(coordinator, Signal::SIGCONT).unwrap();
    assert_eq!(bus.topic(topic("many").name()).unwrap().publishers.len(), 3);
}

#[test]
fn readers_that_hold_nothing_meet_whole_messages_or_an_exact_loss() {
    let scene = Scene::new("overwritten");
    let bus = scene.open();
    let topic = Topic::<[u8]>::new("deaths.exclusive").exclusive().messages(64).bytes(64 << 10).full(Full::Overwrite);
    bus.create(&topic).unwrap();
    let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
    // Readers that hold nothing back meet whole messages or a loss, and the loss is exact.
    let mut expected = 0;
    for life in 0..20 {
        let mut publisher = scene.start("publish", &format!("exclusive {life} {life}"));
        publisher.expect("publishing");
        let end = Instant::now() + Duration::from_millis(2);
        let mut killed = Some(publisher);
        loop {
            match subscriber.try_recv() {
                Ok(Some(message)) => {
                    assert_eq!(message.sequence().get(), expected);
                    Stamp::of(&message);
                    expected += 1;
                }
                Ok(None) if killed.is_none() => break,
                Ok(None) => {}
                Err(RecvError::Lagged { from, to }) => {
                    assert_eq!(from.get(), expected);
                    expected = to.get();
                }
                Err(error) => panic!("{error}"),
            }
            if Instant::now() > end
                && let Some(publisher) = killed.take()
            {
                publisher.kill();
            }
        }
    }
}

/// Not a test: asks for much.
fn hoard(bus: &Bus) {
    end_with_the_test();
    say("asks");
    bus.create(&Topic::<[u8]>::new("hoard").bytes(HOARD_BYTES)).unwrap();
    say("done");
    thread::sleep(LIMIT);
}

/// How many segments of topic `hoard` a process has.
fn hoarded(pid: Pid) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("/memfd:shmbus:hoard:")).count()
}

/// Memory is reserved a piece at a time (SPEC §7.4): a topic is whole or was never there, and what was reserved is given back.
#[test]
fn who_dies_while_memory_is_reserved_for_it_leaves_none_of_it() {
    let scene = Scene::new("hoards");
    let bus = scene.open();
    let (mut random, mut given_back) = (Random::new(seed()), 0);
    for _ in 0..HOARDS {
        let [coordinator, keeper] = ["coordinator", "keeper"].map(|role| scene.server(role));
        let mut victim = scene.start("hoard", "");
        victim.expect("asks");
        await_that("the first segment", || hoarded(coordinator) > 0);
        thread::sleep(Duration::from_millis(random.below(40)));
        victim.kill();
        await_that("the end of what was begun", || {
            let is_whole = bus.topics().unwrap().iter().any(|topic| topic.name == "hoard");
            is_whole || hoarded(coordinator) == 0
        });
        match bus.remove_topic("hoard", false) {
            Ok(()) => {}
            Err(OpenError::Refused(Refusal::UnknownTopic { .. })) => given_back += 1,
            Err(error) => panic!("{error}"),
        }
        await_that("the memory", || hoarded(coordinator) == 0 && hoarded(keeper) == 0);
    }
    println!("{given_back} of {HOARDS} victims died before they had their topic");
    assert!(given_back > 0, "no victim died while its memory was reserved");
}
