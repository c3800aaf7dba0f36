//! Exclusive groups, with real processes that are stopped, not killed: the role is a lease, and never two work at once.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, LOGS, Process, Random, Scene, await_that, end_with_the_test, hear, mode_of, raw, say, seed};
use nix::sys::signal::Signal;
use shmbus::{AckError, Bus, Consumer, Delivery, GroupOptions, Guarantee, Mode, Publisher, RecvError, Start, Topic};

const GUARANTEES: [Guarantee; 3] = [Guarantee::AtMostOnce, Guarantee::AtLeastOnce, Guarantee::EffectivelyOnce];

/// Ends in a test, but not by itself in a process that runs.
const LEASE: Duration = Duration::from_millis(400);

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "obey" => obey(&bus, &arguments),
        "wait" => wait(&bus, &arguments),
        "work" => work(&bus, &arguments),
        _ => panic!("no role {role}"),
    }
}

fn topic(mode: &str) -> Topic<[u8]> {
    raw(mode_of(mode), "exclusive").messages(1024)
}

fn consumer(bus: &Bus, topic: Topic<[u8]>) -> Consumer<[u8]> {
    bus.consumer(topic, "g").existing().open().unwrap()
}

/// Role: receives, keeps and acknowledges as it is told. Argument: mode.
fn obey(bus: &Bus, mode: &str) {
    let mut consumer = consumer(bus, topic(mode));
    let mut kept = None;
    say("ready");
    loop {
        match hear().as_str() {
            "take" => match consumer.try_recv() {
                Ok(Some(message)) => {
                    say(&format!("{} {}", message.sequence(), message.attempt()));
                    kept = Some(message.keep());
                }
                other => say(&format!("{:?}", other.map(|message| message.is_some()))),
            },
            "extend" => say(&format!("{:?}", consumer.extend(kept.as_mut().unwrap(), 10 * LEASE))),
            "ack" => say(&format!("{:?}", consumer.ack(&kept.take().unwrap()))),
            other => panic!("no command {other}"),
        }
    }
}

/// Role: receives for ever, asleep, and says what. Argument: mode.
fn wait(bus: &Bus, mode: &str) {
    end_with_the_test();
    let mut consumer = bus.consumer(topic(mode), "g").existing().wait(shmbus::Wait::Park).open().unwrap();
    say("ready");
    loop {
        let message = consumer.recv().unwrap();
        let sequence = message.sequence();
        message.ack().unwrap();
        say(&sequence.to_string());
    }
}

/// What workers have done: sequence, attempt, and what came of it.
fn done() -> Topic<[u64; 3]> {
    Topic::new("done").messages(16_384)
}

const DELIVERED: u64 = 0;
const SETTLED: u64 = 1;

/// Role: reports what it is given and what it has settled. Argument: mode.
fn work(bus: &Bus, mode: &str) {
    end_with_the_test();
    let mut done = bus.publisher(done()).unwrap();
    let mut first = Some(consumer(bus, topic(mode)));
    say("ready");
    loop {
        let mut consumer = first.take().unwrap_or_else(|| consumer(bus, topic(mode)));
        let fenced = loop {
            match consumer.recv() {
                Ok(message) => report(message, &mut done),
                Err(error) => break error,
            }
        };
        assert_eq!(fenced, RecvError::Fenced);
    }
}

fn report(message: Delivery<'_, [u8]>, done: &mut Publisher<[u64; 3]>) {
    let (sequence, attempt) = (message.sequence().get(), u64::from(message.attempt()));
    done.publish(&[sequence, attempt, DELIVERED]).unwrap();
    // Work, in which most of those who are stopped are stopped.
    thread::sleep(Duration::from_micros(200));
    match message.ack() {
        Ok(()) => assert!(done.publish(&[sequence, attempt, SETTLED]).is_ok()),
        Err(AckError::LeaseLost { .. } | AckError::Fenced | AckError::AlreadySettled { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

/// A bus with a topic, its publisher and an exclusive group `g` on it.
struct Stage {
    bus: Bus,
    mode: Mode,
    publisher: Publisher<[u8]>,
    /// Last, so that it goes last: a connection that outlived its bus would start another.
    scene: Scene,
}

impl Stage {
    fn new(mode: Mode, guarantee: Guarantee, lease: Duration) -> Stage {
        let scene = Scene::new("exclusive");
        let bus = scene.open();
        let topic = topic(&mode.to_string());
        let publisher = bus.publisher(topic.clone()).unwrap();
        let options = match guarantee {
            Guarantee::AtMostOnce => GroupOptions::new().at_most_once(),
            Guarantee::EffectivelyOnce => GroupOptions::new().effectively_once(),
            _ => GroupOptions::new(),
        };
        bus.create_group(topic.name(), "g", &options.lease(lease).exclusive(), Start::Oldest, false).unwrap();
        Stage { scene, bus, mode, publisher }
    }

    fn publish(&mut self, count: u64) {
        (0..count).for_each(|_| assert!(self.publisher.publish(b"x").is_ok()));
    }

    fn start(&self, role: &str) -> Process {
        let mut process = self.scene.start(role, &self.mode.to_string());
        process.expect("ready");
        process
    }

    fn consumer(&self) -> Consumer<[u8]> {
        consumer(&self.bus, topic(&self.mode.to_string()))
    }
}

/// Stops a process, and waits until it does nothing more.
fn stop(process: &Process) {
    process.signal(Signal::SIGSTOP);
    await_that("it to stop", || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
        stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
    });
}

/// The next message's sequence and attempt; it is acknowledged.
fn next(consumer: &mut Consumer<[u8]>) -> (u64, u32) {
    let message = consumer.recv_timeout(LIMIT).unwrap();
    let seen = (message.sequence().get(), message.attempt());
    message.ack().unwrap();
    seen
}

/// SPEC §4.3: it holds nothing that ends, and is succeeded all the same; awake, it stands by, or is fenced.
#[test]
fn who_is_stopped_idle_at_work_is_succeeded_and_finds_out() {
    for (mode, guarantee) in LOGS.into_iter().flat_map(|mode| GUARANTEES.map(|guarantee| (mode, guarantee))) {
        let mut stage = Stage::new(mode, guarantee, LEASE);
        stage.publish(1);
        let mut at_work = stage.start("obey");
        at_work.tell("take");
        at_work.expect("0 1");
        at_work.tell("ack");
        at_work.expect("Ok(())");
        stop(&at_work);
        stage.publish(2);
        let mut standby = stage.consumer();
        assert!(standby.try_recv().unwrap().is_none(), "{mode} {guarantee}: not before the role has ended");
        assert_eq!(next(&mut standby), (1, 1), "{mode} {guarantee}");
        at_work.signal(Signal::SIGCONT);
        at_work.tell("take");
        let fenced = guarantee == Guarantee::EffectivelyOnce;
        at_work.expect(if fenced { "Err(Fenced)" } else { "Ok(false)" });
        assert_eq!(next(&mut standby), (2, 1), "{mode} {guarantee}");
        assert!(standby.try_recv().unwrap().is_none());
    }
}

/// What it had leased ends with the role, also what it would extend once it is awake.
#[test]
fn the_leases_of_who_was_stopped_end_with_its_role() {
    for mode in LOGS {
        for late in ["ack", "extend"] {
            let mut stage = Stage::new(mode, Guarantee::AtLeastOnce, LEASE);
            stage.publish(3);
            let mut at_work = stage.start("obey");
            for command in ["take", "ack", "take"] {
                at_work.tell(command);
                at_work.line();
            }
            stop(&at_work);
            let mut standby = stage.consumer();
            let message = standby.recv_timeout(LIMIT).unwrap();
            assert_eq!((message.sequence().get(), message.attempt()), (1, 2), "in order");
            let lease = message.keep();
            at_work.signal(Signal::SIGCONT);
            at_work.tell(late);
            at_work.expect("Err(LeaseLost { sequence: Sequence(1) })");
            standby.ack(&lease).unwrap();
            assert_eq!(next(&mut standby), (2, 1), "{mode} {late}");
        }
    }
}

/// As long as it extends what it has, or waits for more, nobody takes its role.
#[test]
fn who_shows_signs_of_life_stays_at_work() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, Guarantee::AtLeastOnce, LEASE);
        stage.publish(1);
        let mut standby = None;
        let mut at_work = stage.start("obey");
        for command in ["take", "extend"] {
            at_work.tell(command);
            at_work.line();
        }
        let began = Instant::now();
        while began.elapsed() < 2 * LEASE {
            let standby = standby.get_or_insert_with(|| stage.consumer());
            assert!(matches!(standby.recv_timeout(LEASE / 4), Err(RecvError::TimedOut)), "{mode}: extended");
        }
        at_work.tell("ack");
        at_work.expect("Ok(())");
        drop((at_work, standby));

        // Asleep in a receive, it wakes to renew its role; a standby, asleep as well, does not get it.
        let mut asleep = stage.start("wait");
        stage.publish(1);
        asleep.expect("1");
        let mut standby = stage.start("wait");
        thread::sleep(3 * LEASE);
        stage.publish(1);
        asleep.expect("2");
        stop(&asleep);
        stage.publish(1);
        standby.expect("3");
    }
}

/// Whoever is stopped anywhere, for however long, and woken: each message is settled once, at most once delivered once.
#[test]
fn who_is_stopped_anywhere_disturbs_nobody() {
    const MESSAGES: u64 = 600;
    let mut random = Random::new(seed());
    for (mode, guarantee) in LOGS.into_iter().flat_map(|mode| GUARANTEES.map(|guarantee| (mode, guarantee))) {
        let mut stage = Stage::new(mode, guarantee, Duration::from_millis(5));
        let mut reports = stage.bus.publisher(done()).map(|_| stage.bus.subscriber(done()).open().unwrap()).unwrap();
        let workers = [(); 3].map(|()| stage.start("work"));
        for _ in 0..MESSAGES / 10 {
            stage.publish(10);
            let stopped = &workers[random.below(3) as usize];
            stopped.signal(Signal::SIGSTOP);
            thread::sleep(Duration::from_micros(random.below(12_000)));
            stopped.signal(Signal::SIGCONT);
        }
        let status = || stage.bus.topic(topic(&mode.to_string()).name()).unwrap().groups.remove(0);
        await_that("all to be settled", || status().floor == MESSAGES);
        let (mut delivered, mut settled) = (BTreeMap::<u64, u64>::new(), BTreeMap::<u64, u64>::new());
        while settled.len() < MESSAGES as usize {
            let [sequence, _, what] = *reports.recv_timeout(LIMIT).unwrap();
            let book = if what == SETTLED { &mut settled } else { &mut delivered };
            *book.entry(sequence).or_default() += 1;
        }
        assert!(settled.values().all(|times| *times == 1), "{mode} {guarantee}: settled twice");
        let once = guarantee != Guarantee::AtMostOnce || delivered.values().all(|times| *times == 1);
        assert!(once, "{mode}: delivered twice");
    }
}
