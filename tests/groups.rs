//! Groups, with real processes: who gets which message, how often, and what becomes of the messages of the dead.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use common::{
    LIMIT, LOGS, Process, Random, Scene, await_that, end_with_the_test, hear, mode_of, of_mode, raw, say, seed,
};
use nix::sys::signal::{Signal, kill};
use shmbus::{
    AckError, Bus, Consumer, Delivery, Envelope, Full, GroupOptions, Mode, PublishError, Publisher, RecvError,
    Sequence, SettleError, Start, Topic, Wait,
};

/// Long enough never to end in a test.
const LONG: Duration = Duration::from_secs(600);

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "consume" => consume(&bus, &arguments),
        "obey" => obey(&bus, &arguments),
        "pipe" => pipe(&bus, arguments.trim()),
        _ => panic!("no role {role}"),
    }
}

fn topic(mode: &str) -> Topic<[u8]> {
    raw(mode_of(mode), "groups").messages(256).bytes(256 << 10)
}

/// Role: acknowledges everything and reports it on the topic `done`. Arguments: mode, group, messages a time.
fn consume(bus: &Bus, arguments: &str) {
    end_with_the_test();
    let [mode, group, count] = arguments.split(' ').collect::<Vec<_>>()[..] else { panic!("{arguments}") };
    let mut done = bus.publisher(done()).unwrap();
    let mut consumer = bus.consumer(topic(mode), group).existing().open().unwrap();
    let mut report = |sequence: Sequence, payload: &[u8]| {
        assert_eq!(word(payload), sequence.get(), "another message's payload");
        done.publish(&[sequence.get(), u64::from(std::process::id())]).unwrap();
    };
    say("ready");
    loop {
        if count == "1" {
            let message = consumer.recv().unwrap();
            let (sequence, payload) = (message.sequence(), message.to_vec());
            message.ack().unwrap();
            report(sequence, &payload);
        } else {
            let batch = consumer.recv_batch(count.parse().unwrap()).unwrap();
            let messages: Vec<_> = batch.iter().map(|message| (message.sequence(), message.to_vec())).collect();
            batch.ack().unwrap();
            messages.iter().for_each(|(sequence, payload)| report(*sequence, payload));
        }
    }
}

fn done() -> Topic<[u64; 2]> {
    Topic::new("done").messages(8192)
}

/// Role: does as it is told, one command a line. Arguments: mode, group.
fn obey(bus: &Bus, arguments: &str) {
    let [mode, group] = arguments.split(' ').collect::<Vec<_>>()[..] else { panic!("{arguments}") };
    let mut consumer = bus.consumer(topic(mode), group).existing().open().unwrap();
    let mut leases = Vec::new();
    say("ready");
    loop {
        match hear().as_str() {
            "take" => {
                let message = consumer.recv_timeout(LIMIT).unwrap();
                say(&format!("{} {}", message.sequence(), message.attempt()));
                leases.push(message.keep());
            }
            "try" => match consumer.try_recv() {
                Ok(None) => say("nothing"),
                Ok(Some(message)) => {
                    say(&format!("{} {}", message.sequence(), message.attempt()));
                    leases.push(message.keep());
                }
                Err(error) => say(&format!("{error:?}")),
            },
            "reject" => say(&format!("{:?}", consumer.reject(&leases.pop().unwrap(), "bad"))),
            "ack" => say(&format!("{:?}", consumer.ack(&leases.pop().unwrap()))),
            other => panic!("no command {other}"),
        }
    }
}

/// What pipelines of the stage publish: input and the process that transformed it.
fn outputs() -> Topic<[u64; 2]> {
    Topic::new("outputs").messages(512)
}

/// Role: transforms one input after the other when it is told to. Argument: mode.
fn pipe(bus: &Bus, mode: &str) {
    let mut pipeline = bus.pipeline(topic(mode), "g", outputs()).open().unwrap();
    say("ready");
    loop {
        let step = pipeline.step(|input, outputs| {
            say(&format!("{} {}", input.sequence(), input.attempt()));
            hear();
            outputs.push(&[input.sequence().get(), u64::from(std::process::id())]);
            Ok(())
        });
        say(&format!("{step:?}"));
        if step.is_err() {
            hear();
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// A payload that says which it is: small and large ones.
fn payload(number: u64) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.resize(8 + [0, 30, 300][(number % 3) as usize], number as u8);
    bytes
}

/// Publishes the next `count` messages, one by one or, on topics that can, in batches.
fn publish(publisher: &mut Publisher<[u8]>, from: u64, count: u64) {
    let all: Vec<Vec<u8>> = (from..from + count).map(payload).collect();
    for (index, chunk) in all.chunks(5).enumerate() {
        if index % 2 == 0 {
            publisher.publish_batch(chunk.iter().map(Vec::as_slice)).unwrap();
        } else {
            chunk.iter().for_each(|payload| assert!(publisher.publish(payload).is_ok()));
        }
    }
}

/// A bus with a topic, its publisher and a group `g` that has been created from the first message on.
struct Stage {
    bus: Bus,
    mode: Mode,
    publisher: Publisher<[u8]>,
    /// Last, so that it goes last: a connection that outlived its bus would start another.
    scene: Scene,
}

impl Stage {
    fn new(mode: Mode, options: GroupOptions) -> Stage {
        let scene = Scene::new("groups");
        let bus = scene.open();
        let publisher = bus.publisher(topic(&mode.to_string())).unwrap();
        let stage = Stage { scene, bus, mode, publisher };
        assert!(!stage.create_group("g", &options));
        stage
    }

    fn topic(&self) -> Topic<[u8]> {
        topic(&self.mode.to_string())
    }

    /// A process that has taken the first message and does nothing more.
    fn start_stuck(&mut self, group: &str) -> Process {
        let mut stuck = self.start("obey", group);
        self.publish(0, 1);
        stuck.tell("take");
        stuck.expect("0 1");
        stuck
    }

    fn create_group(&self, name: &str, options: &GroupOptions) -> bool {
        self.bus.create_group(self.topic().name(), name, options, Start::Oldest, true).unwrap()
    }

    fn publish(&mut self, from: u64, count: u64) {
        publish(&mut self.publisher, from, count);
    }

    fn consumer(&self) -> Consumer<[u8]> {
        self.bus.consumer(self.topic(), "g").existing().open().unwrap()
    }

    fn start(&self, role: &str, arguments: &str) -> Process {
        let mut process = self.scene.start(role, &format!("{} {arguments}", self.mode));
        process.expect("ready");
        process
    }
}

fn at_least_once() -> GroupOptions {
    GroupOptions::new().lease(LONG)
}

/// Receives or fails the test: sequence and attempt; checks the payload.
fn take(consumer: &mut Consumer<[u8]>) -> Delivery<'_, [u8]> {
    let message = consumer.recv_timeout(LIMIT).unwrap();
    assert_eq!(*message, *payload(message.sequence().get()));
    message
}

fn seen(message: &Delivery<'_, [u8]>) -> (u64, u32) {
    (message.sequence().get(), message.attempt())
}

/// Nothing can be had from this consumer now.
fn expect_nothing(consumer: &mut Consumer<[u8]>) {
    let message = consumer.try_recv().unwrap();
    assert!(message.is_none(), "{:?}", message.as_ref().map(seen));
}

#[test]
fn four_processes_share_the_messages_and_each_group_gets_all() {
    const MESSAGES: u64 = 2000;
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.create_group("h", &at_least_once());
        let mut reports = stage.bus.publisher(done()).map(|_| stage.bus.subscriber(done()).open().unwrap()).unwrap();
        let sharers: Vec<Process> =
            ["g 1", "g 1", "g 7", "g 32", "h 7"].map(|arguments| stage.start("consume", arguments)).into();
        let loner = u64::from(sharers[4].pid().as_raw() as u32);
        stage.publish(0, MESSAGES);
        let (mut shared, mut alone) = (BTreeMap::new(), 0);
        for _ in 0..2 * MESSAGES {
            let [sequence, pid] = *reports.recv_timeout(LIMIT).unwrap();
            if pid == loner {
                alone += 1;
            } else {
                assert_eq!(shared.insert(sequence, pid), None, "{sequence} was delivered twice");
            }
        }
        assert_eq!((shared.len() as u64, alone), (MESSAGES, MESSAGES));
        assert_eq!((shared.keys().next(), shared.keys().last()), (Some(&0), Some(&(MESSAGES - 1))));
    }
}

#[test]
fn a_group_without_consumers_holds_its_messages() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 100);
        let full = (100..).map(|n| stage.publisher.try_publish(&payload(n))).find_map(Result::err);
        assert!(matches!(full, Some(shmbus::PublishError::Full { .. })), "{full:?}");
        let mut consumer = stage.consumer();
        for expected in 0..100 {
            let message = take(&mut consumer);
            assert_eq!(seen(&message), (expected, 1));
            message.ack().unwrap();
        }
        assert_eq!(stage.bus.topic(stage.topic().name()).unwrap().groups.len(), 1);
        await_that("room", || {
            drop(consumer.try_recv());
            stage.publisher.try_publish(&payload(0)).is_ok()
        });
    }
}

#[test]
fn a_late_ack_loses_its_lease_and_disturbs_nobody() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, GroupOptions::new().lease(Duration::from_millis(20)));
        stage.publish(0, 1);
        let (mut late, mut next) = (stage.consumer(), stage.consumer());
        let lease = take(&mut late).keep();
        let message = take(&mut next);
        assert_eq!(seen(&message), (0, 2));
        let lost = AckError::LeaseLost { sequence: Sequence::new(0) };
        let kept = message.keep();
        assert_eq!(late.ack(&lease), Err(lost.clone()));
        assert_eq!(late.nack(&lease), Err(lost.clone()));
        assert_eq!(late.extend(&mut lease.clone(), LONG), Err(lost));
        assert_eq!(late.ack(&kept), Err(AckError::Foreign { sequence: Sequence::new(0) }));
        // Its own lease may have ended as well by now, but nobody else wants it.
        next.ack(&kept).unwrap();
        assert_eq!(next.ack(&kept), Err(AckError::AlreadySettled { sequence: Sequence::new(0) }));
        expect_nothing(&mut late);
    }
}

/// Thirty-two are taken with two swaps. One of them has been taken over, one is kept.
#[test]
fn a_late_batch_loses_only_what_another_has_taken_over() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, GroupOptions::new().lease(Duration::from_millis(20)));
        stage.publish(0, 32);
        let (mut late, mut next) = (stage.consumer(), stage.consumer());
        let batch = late.recv_batch(32).unwrap();
        assert_eq!(batch.len(), 32);
        let kept = batch.iter().nth(19).unwrap().keep();
        let message = take(&mut next);
        assert_eq!(seen(&message), (0, 2));
        let taken_over = message.keep();
        assert_eq!(batch.ack(), Err(AckError::LeaseLost { sequence: Sequence::new(0) }));
        late.ack(&kept).unwrap();
        assert_eq!(late.ack(&kept), Err(AckError::AlreadySettled { sequence: Sequence::new(19) }));
        next.ack(&taken_over).unwrap();
        drop(late);
        expect_nothing(&mut next);
        assert_eq!(next.floor().get(), 32);
    }
}

#[test]
fn a_lease_is_never_short_and_an_extended_one_lasts() {
    let lease = Duration::from_millis(50);
    let mut stage = Stage::new(Mode::Exclusive, GroupOptions::new().lease(lease));
    stage.publish(0, 1);
    let (mut first, mut second) = (stage.consumer(), stage.consumer());
    let taken = Instant::now();
    let mut kept = take(&mut first).keep();
    let taken_latest = Instant::now();
    first.extend(&mut kept, 4 * lease).unwrap();
    let message = take(&mut second);
    assert!(taken.elapsed() >= 4 * lease, "after {:?}", taken_latest.elapsed());
    message.ack().unwrap();
    assert!(matches!(first.ack(&kept), Err(AckError::LeaseLost { .. })));
}

#[test]
fn what_is_given_back_rests_and_comes_again() {
    for mode in LOGS {
        let rest = [Duration::from_millis(30), Duration::from_millis(60)];
        let mut stage = Stage::new(mode, at_least_once().back_off(rest));
        stage.publish(0, 1);
        let mut consumer = stage.consumer();
        let mut given_back = Instant::now();
        take(&mut consumer).nack().unwrap();
        for (attempt, rested) in [(2, rest[0]), (3, rest[1]), (4, rest[1])] {
            let message = take(&mut consumer);
            assert_eq!(seen(&message), (0, attempt));
            assert!(given_back.elapsed() >= rested, "attempt {attempt} after {:?}", given_back.elapsed());
            given_back = Instant::now();
            // Dropped is given back.
            drop(message);
        }
        take(&mut consumer).nack_after(Duration::ZERO).unwrap();
        assert_eq!(seen(&take(&mut consumer)), (0, 6));
    }
}

#[test]
fn a_sleeping_consumer_wakes_for_what_comes_due() {
    let mut stage = Stage::new(Mode::Many, GroupOptions::new().lease(Duration::from_millis(100)));
    stage.publish(0, 1);
    let mut holder = stage.start("obey", "g");
    holder.tell("take");
    holder.expect("0 1");
    holder.signal(Signal::SIGSTOP);
    let mut consumer = stage.bus.consumer(stage.topic(), "g").wait(shmbus::Wait::Park).open().unwrap();
    let message = take(&mut consumer);
    assert_eq!(seen(&message), (0, 2));
    message.ack().unwrap();
    holder.signal(Signal::SIGCONT);
    holder.tell("ack");
    assert!(holder.line().contains("LeaseLost"));
}

#[test]
fn acks_out_of_order_move_the_floor_when_the_gap_closes() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once().window(64));
        stage.publish(0, 100);
        let mut consumer = stage.consumer();
        let leases: Vec<_> = (0..64).map(|_| take(&mut consumer).keep()).collect();
        // The window is full.
        expect_nothing(&mut consumer);
        leases[1..].iter().rev().for_each(|lease| consumer.ack(lease).unwrap());
        expect_nothing(&mut consumer);
        assert_eq!(consumer.floor(), Sequence::new(0));
        consumer.ack(&leases[0]).unwrap();
        let message = take(&mut consumer);
        assert_eq!(message.sequence(), Sequence::new(64));
        message.ack().unwrap();
        assert!(consumer.floor() >= Sequence::new(64));
    }
}

#[test]
fn only_so_many_are_in_flight() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once().max_in_flight(3));
        stage.publish(0, 20);
        let mut small = stage.bus.consumer(stage.topic(), "g").max_in_flight(2).open().unwrap();
        let mut large = stage.consumer();
        let batch = small.recv_batch(10).unwrap();
        let kept: Vec<_> = batch.iter().map(|message| message.keep()).collect();
        drop(batch);
        assert_eq!(kept.len(), 2, "its own limit");
        expect_nothing(&mut small);
        let third = take(&mut large).keep();
        expect_nothing(&mut large);
        small.ack(&kept[0]).unwrap();
        take(&mut large).ack().unwrap();
        small.nack(&kept[1]).unwrap();
        large.ack(&third).unwrap();
        await_that("the one given back", || {
            let message = take(&mut large);
            let again = message.attempt() == 2;
            message.ack().unwrap();
            again
        });
    }
}

/// An ended lease counts no more, so that another message is taken in its place; both are not in flight together.
#[test]
fn an_ended_lease_is_extended_if_there_is_room_for_it() {
    const SHORT: Duration = Duration::from_millis(30);
    for (mode, of_group) in LOGS.into_iter().flat_map(|mode| [(mode, true), (mode, false)]) {
        // Effectively once an ended lease stays with its consumer.
        let options = GroupOptions::new().effectively_once().lease(SHORT);
        let mut stage = Stage::new(mode, if of_group { options.max_in_flight(1) } else { options });
        let own = if of_group { u32::MAX } else { 1 };
        let mut consumer = stage.bus.consumer(stage.topic(), "g").existing().max_in_flight(own).open().unwrap();
        stage.publish(0, 2);
        let mut ended = take(&mut consumer).keep();
        std::thread::sleep(2 * SHORT);
        consumer.extend(&mut ended, SHORT).unwrap();
        expect_nothing(&mut consumer);
        std::thread::sleep(2 * SHORT);
        let mut other = take(&mut consumer).keep();
        assert_eq!(other.sequence(), Sequence::new(1), "in its place");
        consumer.extend(&mut other, LONG).unwrap();
        let refused = Err(AckError::Ended { sequence: Sequence::new(0) });
        assert_eq!(consumer.extend(&mut ended, LONG), refused, "{mode} {of_group}");
        assert_eq!(group_status(&stage).floor, 0);
        consumer.ack(&other).unwrap();
        consumer.extend(&mut ended, LONG).unwrap();
        assert_eq!(consumer.ack(&ended), Ok(()), "{mode}: it was as before");
    }
}

#[test]
fn batches_are_settled_together_except_what_is_kept() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 40);
        let mut consumer = stage.consumer();
        let batch = consumer.recv_batch(32).unwrap();
        assert_eq!(batch.len(), 32);
        for (expected, message) in batch.iter().enumerate() {
            assert_eq!((message.sequence().get(), &*message), (expected as u64, &*payload(expected as u64)));
        }
        let kept = batch.iter().nth(5).unwrap().keep();
        batch.ack().unwrap();
        assert_eq!(consumer.recv_batch(32).unwrap().len(), 8);
        consumer.nack(&kept).unwrap();
        let mut again: Vec<_> = Vec::new();
        await_that("all that were dropped or given back", || {
            let batch = consumer.recv_batch_timeout(32, LIMIT).unwrap();
            again.extend(batch.iter().map(|message| (message.sequence().get(), message.attempt())));
            batch.ack().unwrap();
            again.len() == 9
        });
        again.sort_unstable();
        assert_eq!(again[0], (5, 2));
        assert!(again[1..].iter().zip(32..).all(|(found, expected)| *found == (expected, 2)), "{again:?}");
        expect_nothing(&mut consumer);
    }
}

#[test]
fn what_the_killed_held_is_delivered_again() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 10);
        let mut killed = stage.start("obey", "g");
        for expected in ["0 1", "1 1"] {
            killed.tell("take");
            killed.expect(expected);
        }
        killed.tell("ack");
        killed.expect("Ok(())");
        killed.kill();
        let mut consumer = stage.consumer();
        let mut came: Vec<_> = (0..9)
            .map(|_| {
                let message = take(&mut consumer);
                let came = seen(&message);
                message.ack().unwrap();
                came
            })
            .collect();
        came.sort_unstable();
        let expected: Vec<_> = [(0, 2)].into_iter().chain((2..10).map(|sequence| (sequence, 1))).collect();
        assert_eq!(came, expected);
        expect_nothing(&mut consumer);
    }
}

#[test]
fn what_the_last_consumer_had_settled_holds_nobody_up() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 10);
        let mut last = stage.start("obey", "g");
        for expected in ["0 1", "1 1", "2 1"] {
            last.tell("take");
            last.expect(expected);
            last.tell("ack");
            last.expect("Ok(())");
        }
        last.kill();
        stage.publisher.wait_settled("g", Sequence::new(2), LIMIT).unwrap();
    }
}

#[test]
fn at_most_once_never_delivers_again() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, GroupOptions::new().at_most_once());
        stage.publish(0, 20);
        let mut killed = stage.start("obey", "g");
        killed.tell("take");
        killed.expect("0 1");
        killed.kill();
        let mut consumer = stage.consumer();
        let mut came = Vec::new();
        while came.len() < 19 {
            let batch = consumer.recv_batch_timeout(32, LIMIT).unwrap();
            came.extend(batch.iter().map(|message| message.sequence().get()));
            batch.ack().unwrap();
        }
        came.sort_unstable();
        assert_eq!(came, (1..20).collect::<Vec<_>>(), "only what was in hand is lost");
        expect_nothing(&mut consumer);
    }
}

#[test]
fn dropping_a_consumer_gives_everything_back_at_once() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 3);
        let (mut first, mut second) = (stage.consumer(), stage.consumer());
        (0..3).for_each(|attempt| assert_eq!(take(&mut first).keep().sequence().get(), attempt));
        expect_nothing(&mut second);
        drop(first);
        assert_eq!(
            second.recv_batch_timeout(9, LIMIT).unwrap().iter().map(|m| m.attempt()).collect::<Vec<_>>(),
            [2; 3]
        );
    }
}

#[test]
fn one_consumer_of_an_exclusive_group_works_and_another_takes_over() {
    for mode in LOGS {
        let options = GroupOptions::new().lease(Duration::from_millis(300)).exclusive();
        let mut stage = Stage::new(mode, options);
        stage.publish(0, 30);
        let mut at_work = stage.start("obey", "g");
        at_work.tell("take");
        at_work.expect("0 1");
        let mut standby = stage.consumer();
        expect_nothing(&mut standby);
        at_work.tell("ack");
        at_work.expect("Ok(())");
        expect_nothing(&mut standby);
        // Its death frees the place.
        at_work.kill();
        let message = take(&mut standby);
        assert_eq!(seen(&message), (1, 1));
        message.ack().unwrap();
        // So does a lease that has ended.
        let late = take(&mut standby).keep();
        let mut next = stage.consumer();
        let message = take(&mut next);
        assert_eq!(seen(&message), (2, 2));
        message.ack().unwrap();
        assert!(matches!(standby.ack(&late), Err(AckError::LeaseLost { .. })));
        expect_nothing(&mut standby);
    }
}

#[test]
fn rewinding_fences_and_starts_anew() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.create_group("keeper", &at_least_once());
        stage.publish(0, 10);
        let mut consumer = stage.consumer();
        (0..5).for_each(|_| take(&mut consumer).ack().unwrap());
        let kept = take(&mut consumer).keep();
        let name = stage.topic().name().to_owned();
        stage.bus.rewind_group(&name, "g", Start::Oldest, false).unwrap_err();
        stage.bus.rewind_group(&name, "g", Start::Sequence(Sequence::new(2)), true).unwrap();
        assert_eq!(consumer.try_recv().unwrap_err(), RecvError::Fenced);
        assert_eq!(consumer.ack(&kept), Err(AckError::Fenced));
        let mut anew = stage.consumer();
        assert_eq!(seen(&take(&mut anew)), (2, 1));
        stage.bus.remove_group(&name, "g", true).unwrap();
        assert_eq!(anew.recv().unwrap_err(), RecvError::Fenced);
    }
}

#[test]
fn a_stuck_consumer_delays_other_groups_by_the_full_policy_only_and_is_named() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        let stuck = stage.start_stuck("g");
        stage.create_group("free", &at_least_once());
        let mut free = stage.bus.consumer(stage.topic(), "free").existing().open().unwrap();
        // As long as there is room nobody notices; then the publisher is told who holds it up.
        let mut published = 1;
        let refused = loop {
            match stage.publisher.try_publish(&payload(published)) {
                Ok(sequence) => {
                    assert_eq!(sequence.get(), published);
                    published += 1;
                }
                Err(error) => break error,
            }
            let message = take(&mut free);
            message.ack().unwrap();
        };
        assert!(published >= 256, "the ring holds 256, and was full at {published}");
        let status = stage.bus.topic(stage.topic().name()).unwrap();
        let [first, second] = &status.groups[..] else { panic!("{status:?}") };
        let holder = shmbus::Holder::Group(second.id);
        assert_eq!((first.name.as_str(), second.name.as_str()), ("free", "g"));
        assert!(matches!(refused, PublishError::Full { holder: found, .. } if found == holder), "{refused:?}");
        let lease = second.oldest_lease.as_ref().unwrap();
        assert_eq!((lease.sequence, lease.pid), (0, stuck.pid().as_raw() as u32));
        assert_eq!((second.floor, second.in_flight), (0, 1));
        assert!(first.floor > 200 && first.oldest_lease.is_none(), "{first:?}");
    }
}

#[test]
fn a_publisher_waits_until_a_group_has_settled() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 7);
        let (last, short) = (Sequence::new(6), Duration::from_millis(5));
        assert!(matches!(stage.publisher.wait_settled("g", last, short), Err(SettleError::TimedOut)));
        let mut process = stage.start("obey", "g");
        for sequence in 0..7 {
            process.tell("take");
            process.expect(&format!("{sequence} 1"));
            process.tell("ack");
            process.expect("Ok(())");
        }
        process.tell("try");
        process.expect("nothing");
        stage.publisher.wait_settled("g", last, LIMIT).unwrap();
        assert!(matches!(stage.publisher.wait_settled("none", last, short), Err(SettleError::NoGroup)));
        stage.bus.remove_group(stage.topic().name(), "g", true).unwrap();
        let removed = stage.publisher.wait_settled("g", Sequence::new(9), LIMIT);
        assert!(matches!(removed, Err(SettleError::NoGroup)), "{removed:?}");
    }
}

#[test]
fn a_publisher_waits_no_longer_than_it_wants_for_a_group_that_nobody_can_tell_it_of() {
    let mut stage = Stage::new(Mode::Many, at_least_once());
    stage.publish(0, 1);
    kill(stage.scene.server("coordinator"), Signal::SIGSTOP).unwrap();
    let start = Instant::now();
    let late = stage.publisher.wait_settled("g", Sequence::new(0), Duration::from_millis(5));
    assert!(matches!(late, Err(SettleError::TimedOut)), "{late:?}");
    assert!(start.elapsed() < Duration::from_secs(4), "it took {:?}", start.elapsed());
    // The answer to what was asked then is nobody's now.
    kill(stage.scene.server("coordinator"), Signal::SIGCONT).unwrap();
    let late = stage.publisher.wait_settled("g", Sequence::new(0), Duration::from_millis(5));
    assert!(matches!(late, Err(SettleError::TimedOut)), "{late:?}");
    assert!(matches!(stage.publisher.wait_settled("none", Sequence::new(0), LIMIT), Err(SettleError::NoGroup)));
}

#[test]
fn a_topic_that_goes_takes_its_groups_along() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 1);
        let mut consumer = stage.consumer();
        let kept = take(&mut consumer).keep();
        stage.bus.remove_topic(stage.topic().name(), true).unwrap();
        let gone = shmbus::GoneReason::Removed;
        assert_eq!(consumer.ack(&kept), Err(AckError::Gone(gone)));
        assert_eq!(consumer.recv().unwrap_err(), RecvError::Gone(gone));
    }
}

#[test]
fn typed_messages_and_names_in_the_manner_of_activemq() {
    for mode in LOGS {
        let scene = Scene::new("groups");
        let bus = scene.open();
        let topic = || of_mode(mode, Topic::<[u64; 3]>::named("VirtualTopic.orders"));
        let mut publisher = bus.publisher(topic()).unwrap();
        let mut queue = bus.queue::<[u64; 3]>("Consumer.billing.VirtualTopic.orders").open().unwrap();
        assert_eq!(queue.group(), "billing");
        publisher.publish(&[1, 2, 3]).unwrap();
        let order = queue.recv_timeout(LIMIT).unwrap();
        assert_eq!(*order, [1, 2, 3]);
        assert_eq!((order.publisher(), order.publisher_number()), (Some(publisher.id()), Some(1)));
        order.ack().unwrap();
    }
}

/// The dead-letter topic of the stage's group `g`.
fn letters(stage: &Stage) -> Topic<[u8]> {
    Topic::named(format!("dlq.{}.g", stage.topic().name())).hold().envelope()
}

/// What lies in the dead-letter topic now, in order: origin and reason; checks the payloads.
fn read_letters(stage: &Stage, count: usize) -> Vec<(u64, String)> {
    let mut subscriber = stage.bus.subscriber(letters(stage)).start(Start::Oldest).open().unwrap();
    let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap().to_vec()).unwrap();
    (0..count)
        .map(|_| {
            let letter = subscriber.recv_timeout(LIMIT).unwrap();
            let origin: u64 = text(letter.header("origin-sequence")).parse().unwrap();
            assert_eq!(*letter, *payload(origin));
            assert_eq!(text(letter.header("origin-topic")), stage.topic().name());
            assert_eq!(text(letter.header("origin-group")), "g");
            assert_eq!(text(letter.header("publisher")), stage.publisher.id().to_string());
            (origin, format!("{} {}", text(letter.header("reason")), text(letter.header("attempts"))))
        })
        .collect()
}

fn group_status(stage: &Stage) -> shmbus::GroupStatus {
    stage.bus.topic(stage.topic().name()).unwrap().groups.into_iter().find(|group| group.name == "g").unwrap()
}

#[test]
fn what_fails_too_often_or_is_rejected_goes_to_the_dead_letters() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once().max_attempts(2));
        stage.publish(0, 3);
        let mut consumer = stage.consumer();
        take(&mut consumer).reject("bad").unwrap();
        let message = take(&mut consumer);
        assert_eq!(seen(&message), (1, 1));
        message.ack().unwrap();
        for attempt in [1, 2] {
            let message = take(&mut consumer);
            assert_eq!(seen(&message), (2, attempt));
            message.nack().unwrap();
        }
        expect_nothing(&mut consumer);
        let expected = [(0, "bad 1".to_owned()), (2, "attempts exhausted 2".to_owned())];
        assert_eq!(read_letters(&stage, 2), expected);
        let status = group_status(&stage);
        assert_eq!((status.dead_lettered, status.moving, status.floor), (2, 0, 3));
    }
}

#[test]
fn full_dead_letters_hold_up_nobody_and_lose_nothing_over_a_death() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.bus.create(&letters(&stage).messages(2)).unwrap();
        stage.publish(0, 8);
        let mut killed = stage.start("obey", "g");
        for expected in 0..6 {
            killed.tell("take");
            killed.expect(&format!("{expected} 1"));
            killed.tell("reject");
            killed.expect("Ok(())");
        }
        let waiting = group_status(&stage);
        assert!(waiting.moving > 0 && waiting.dead_lettered + waiting.moving == 6, "{waiting:?}");
        killed.tell("take");
        killed.expect("6 1");
        killed.kill();
        let mut consumer = stage.consumer();
        let mut left = vec![];
        while left.len() < 2 {
            let message = take(&mut consumer);
            left.push(message.sequence().get());
            message.ack().unwrap();
        }
        left.sort_unstable();
        assert_eq!(left, [6, 7]);
        // Somebody reads the letters: the moves of the dead go on.
        let mut subscriber = stage.bus.subscriber(letters(&stage)).start(Start::Oldest).open().unwrap();
        let mut origins = Vec::new();
        await_that("every letter", || {
            expect_nothing(&mut consumer);
            if let Some(letter) = subscriber.try_recv().unwrap() {
                origins.push(std::str::from_utf8(letter.header("origin-sequence").unwrap()).unwrap().to_owned());
            }
            origins.len() == 6
        });
        await_that("the end of the moves", || {
            expect_nothing(&mut consumer);
            group_status(&stage).floor == 8
        });
        assert!(subscriber.try_recv().unwrap().is_none(), "a letter came twice");
        origins.sort();
        assert_eq!(origins, ["0", "1", "2", "3", "4", "5"]);
    }
}

/// A topic with envelopes and group `g` on it.
fn keyed(mode: Mode, options: &GroupOptions) -> (Scene, Bus, Publisher<[u8]>, Topic<[u8]>) {
    let scene = Scene::new("groups");
    let bus = scene.open();
    let topic = || raw(mode, "keyed").messages(256).envelope();
    let publisher = bus.publisher(topic()).unwrap();
    bus.create_group(topic().name(), "g", options, Start::Oldest, true).unwrap();
    (scene, bus, publisher, topic())
}

#[test]
fn messages_of_one_key_come_in_order_and_one_at_a_time() {
    for mode in LOGS {
        let options = at_least_once().ordered_by_key().max_attempts(3);
        let (_scene, bus, mut publisher, topic) = keyed(mode, &options);
        // Keys a, b and none at all, which is a key as well.
        for (number, key) in [b"a", b"a", b"b", b"a", b"b", b"" as &[u8], b""].into_iter().enumerate() {
            publisher.publish_with(&payload(number as u64), &Envelope::new().key(key)).unwrap();
        }
        let open = || bus.consumer(topic.clone(), "g").existing().open().unwrap();
        let (mut first, mut second) = (open(), open());
        let batch = first.recv_batch(2).unwrap();
        let kept: Vec<_> = batch.iter().map(|message| message.keep()).collect();
        drop(batch);
        assert_eq!(kept.iter().map(|lease| lease.sequence().get()).collect::<Vec<_>>(), [0, 2]);
        let message = take(&mut second);
        assert_eq!((message.sequence().get(), message.key()), (5, None));
        message.ack().unwrap();
        let keyless = take(&mut second);
        assert_eq!(keyless.sequence().get(), 6);
        keyless.ack().unwrap();
        expect_nothing(&mut second);
        // Given back, the head comes before its followers, whoever takes it.
        first.nack(&kept[0]).unwrap();
        let head = take(&mut second);
        assert_eq!((seen(&head), head.key()), ((0, 2), Some(b"a" as &[u8])));
        head.ack().unwrap();
        let next = take(&mut second).keep();
        assert_eq!(next.sequence().get(), 1);
        expect_nothing(&mut first);
        // A head that is rejected makes way as well, also for one who joins late.
        second.reject(&next, "bad").unwrap();
        let mut third = open();
        let last = take(&mut third).keep();
        assert_eq!(last.sequence().get(), 3);
        expect_nothing(&mut second);
        first.ack(&kept[1]).unwrap();
        let message = take(&mut second);
        assert_eq!(seen(&message), (4, 1));
        message.ack().unwrap();
        third.ack(&last).unwrap();
        [&mut first, &mut second, &mut third].into_iter().for_each(expect_nothing);
        assert_eq!(third.floor().get(), 7);
    }
}

#[test]
fn expired_messages_are_settled_and_counted() {
    for mode in LOGS {
        for dead_letter in [false, true] {
            let options = if dead_letter { at_least_once().dead_letter_expired() } else { at_least_once() };
            let (_scene, bus, mut publisher, topic) = keyed(mode, &options);
            let short = Envelope::new().ttl(Duration::from_nanos(1));
            publisher.publish_with(&payload(0), &short).unwrap();
            publisher.publish_with(&payload(1), &Envelope::new().header("h", b"v")).unwrap();
            let mut consumer = bus.consumer(topic.clone(), "g").existing().open().unwrap();
            let message = take(&mut consumer);
            assert_eq!((seen(&message), message.header("h")), ((1, 1), Some(b"v" as &[u8])));
            assert!(message.timestamp_ns().is_some());
            message.ack().unwrap();
            expect_nothing(&mut consumer);
            let status = bus.topic(topic.name()).unwrap().groups.remove(0);
            assert_eq!((status.expired, status.dead_lettered), (1, u64::from(dead_letter)));
            assert_eq!(status.floor, 2);
        }
    }
}

/// Nobody consumes, and what has expired holds no publisher back, over deaths of the coordinator too; what lives does.
#[test]
fn what_expires_in_a_group_without_consumers_makes_room() {
    for mode in LOGS {
        let (scene, bus, mut publisher, topic) = keyed(mode, &at_least_once());
        let ttl = Envelope::new().ttl(Duration::from_millis(1));
        let status = || bus.topic(topic.name()).unwrap().groups.remove(0);
        for round in 1..=3 {
            // In batches and one by one, most of the ring each time.
            for number in 0..80 {
                let payload = payload(number);
                let batch = [(&payload[..], &ttl), (&payload[..], &ttl)];
                publisher.publish_batch_with(batch).unwrap();
                publisher.publish_with(&payload, &ttl).unwrap();
            }
            kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
            await_that("all to expire", || status().floor == round * 240);
            assert_eq!((status().expired, status().in_flight), (round * 240, 0), "{mode}");
        }
        publisher.publish_with(&payload(0), &Envelope::new().ttl(LONG)).unwrap();
        publisher.publish_with(&payload(0), &ttl).unwrap();
        let mut consumer = bus.consumer(topic.clone(), "g").existing().open().unwrap();
        assert_eq!(consumer.recv_timeout(LIMIT).unwrap().sequence(), Sequence::new(720), "{mode}: it lives");
        assert_eq!(status().floor, 720);
    }
}

/// The coordinator moves what nobody consumes, and is killed over it: each has one letter, and none holds the publisher back.
#[test]
fn what_expires_in_a_group_without_consumers_goes_to_the_dead_letters_once() {
    let mut random = Random::new(seed());
    for mode in LOGS {
        let (scene, bus, mut publisher, topic) = keyed(mode, &at_least_once().dead_letter_expired());
        let ttl = Envelope::new().ttl(Duration::from_millis(1));
        let status = || bus.topic(topic.name()).unwrap().groups.remove(0);
        for round in 1..=3 {
            (0..240).for_each(|number| assert!(publisher.publish_with(&payload(number), &ttl).is_ok()));
            for _ in 0..2 {
                // Most burials begin half a second after their coordinator.
                std::thread::sleep(Duration::from_millis(490 + random.below(60)));
                kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
            }
            await_that("all to be moved", || status().floor == round * 240);
            await_that("nobody to be left", || status().consumers.is_empty());
        }
        let letters = Topic::<[u8]>::named(format!("dlq.{}.g", topic.name()));
        let mut letters = bus.subscriber(letters).start(Start::Oldest).open().unwrap();
        let mut moved = Vec::new();
        while let Some(letter) = letters.try_recv().unwrap() {
            let header = |name| String::from_utf8(letter.header(name).unwrap().to_vec()).unwrap();
            assert_eq!((header("reason"), header("attempts")), ("expired".to_owned(), "0".to_owned()));
            moved.push(header("origin-sequence").parse::<u64>().unwrap());
        }
        moved.sort_unstable();
        assert_eq!(moved, (0..720).collect::<Vec<_>>(), "{mode}");
    }
}

/// Whatever is published meanwhile: a group delivers exactly what is retained from the first message of its time on.
#[test]
fn a_group_that_starts_at_a_time_misses_nothing_from_then_on() {
    const MESSAGES: u64 = 3000;
    for mode in LOGS {
        let scene = Scene::new("times");
        let bus = scene.open();
        let topic = raw(mode, "times").messages(4096).bytes(1 << 20).envelope();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut reader = bus.subscriber(topic.clone()).start(Start::Oldest).open().unwrap();
        let feeding = std::thread::spawn(move || {
            for number in 0..MESSAGES {
                // Every seventh has expired and is there all the same: a group from then on has to settle it.
                let ttl = if number % 7 == 3 { Duration::from_nanos(1) } else { LONG };
                publisher.publish_with(&payload(number), &Envelope::new().ttl(ttl)).unwrap();
                std::thread::yield_now();
            }
        });
        let mut groups = Vec::new();
        while groups.is_empty() || groups.len() < 50 && !feeding.is_finished() {
            let (name, now) = (format!("g{}", groups.len()), SystemTime::now());
            let since = if groups.len() % 2 == 0 { now } else { now - Duration::from_millis(1) };
            bus.create_group(topic.name(), &name, &at_least_once(), Start::Time(since), false).unwrap();
            groups.push((name, since));
        }
        feeding.join().unwrap();
        let mut published = Vec::new();
        while let Some(message) = reader.try_recv().unwrap() {
            published.push((message.sequence().get(), message.timestamp_ns().unwrap()));
        }
        for (name, since) in groups {
            let since_ns = since.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
            let expected: Vec<u64> =
                published.iter().skip_while(|(_, at)| *at < since_ns).map(|(sequence, _)| *sequence).collect();
            let mut consumer = bus.consumer(topic.clone(), name.as_str()).existing().open().unwrap();
            let mut found = Vec::new();
            while let Some(message) = consumer.try_recv().unwrap() {
                found.push(message.sequence().get());
                message.ack().unwrap();
            }
            // The publisher may have had its next message's time, and not yet its place, when the group began there.
            let more = found.len().saturating_sub(expected.len());
            assert!(found.ends_with(&expected) && more <= 1, "{mode} {name}: {found:?}, expected {expected:?}");
        }
    }
}

/// What has expired before a group's first message that is delivered is the group's all the same.
#[test]
fn a_group_that_starts_at_a_time_settles_what_has_expired_since() {
    for mode in LOGS {
        let scene = Scene::new("expired-since");
        let bus = scene.open();
        let topic = raw(mode, "expired").messages(64).envelope();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let expired = Envelope::new().ttl(Duration::from_nanos(1));
        publisher.publish_with(&payload(0), &expired).unwrap();
        publisher.publish(&payload(1)).unwrap();
        let options = at_least_once().dead_letter_expired();
        bus.create_group(topic.name(), "g", &options, Start::Time(SystemTime::UNIX_EPOCH), false).unwrap();
        let mut consumer = bus.consumer(topic.clone(), "g").existing().open().unwrap();
        let message = take(&mut consumer);
        assert_eq!(seen(&message), (1, 1), "{mode}");
        message.ack().unwrap();
        expect_nothing(&mut consumer);
        assert_eq!(bus.topic(topic.name()).unwrap().groups.remove(0).dead_lettered, 1);
    }
}

#[test]
fn a_batch_without_a_limit_takes_all_there_is() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 20);
        let mut consumer = stage.consumer();
        take(&mut consumer).ack().unwrap();
        let mut taken = 1;
        while taken < 20 {
            let batch = consumer.recv_batch_timeout(usize::MAX, LIMIT).unwrap();
            taken += batch.len();
            batch.ack().unwrap();
        }
        stage.publish(20, 5);
        let batch = consumer.recv_batch_timeout(usize::MAX, LIMIT).unwrap();
        assert!(!batch.is_empty());
        batch.ack().unwrap();
    }
}

#[test]
fn no_letter_is_too_long_to_be_written() {
    let options = at_least_once();
    let (_scene, bus, mut publisher, topic) = keyed(Mode::Many, &options);
    let full = Envelope::new().header("short", b"s").header("long", &[b'x'; 16_000]).header("last", b"l");
    publisher.publish_with(&payload(0), &full).unwrap();
    publisher.publish(&payload(1)).unwrap();
    let mut consumer = bus.consumer(topic.clone(), "g").existing().open().unwrap();
    take(&mut consumer).reject(&"\u{e4}".repeat(20_000)).unwrap();
    take(&mut consumer).reject("bad").unwrap();
    let letters = Topic::<[u8]>::named(format!("dlq.{}.g", topic.name())).hold().envelope();
    let mut subscriber = bus.subscriber(letters).start(Start::Oldest).open().unwrap();
    let letter = subscriber.recv_timeout(LIMIT / 10).unwrap();
    assert_eq!(*letter, *payload(0));
    assert_eq!((letter.header("short"), letter.header("last")), (Some(b"s" as &[u8]), Some(b"l" as &[u8])));
    assert_eq!((letter.header("long"), letter.header("headers-left-out")), (None, Some(b"1" as &[u8])));
    let reason = std::str::from_utf8(letter.header("reason").unwrap()).unwrap();
    assert_eq!(reason, "\u{e4}".repeat(512));
    let letter = subscriber.recv_timeout(LIMIT / 10).unwrap();
    assert_eq!((&*letter, letter.header("reason")), (&*payload(1), Some(b"bad" as &[u8])));
}

#[test]
fn expired_messages_of_one_key_do_not_hide_the_next() {
    for mode in LOGS {
        let options = at_least_once().ordered_by_key();
        let (_scene, bus, mut publisher, topic) = keyed(mode, &options);
        let short = Envelope::new().key(b"a").ttl(Duration::from_nanos(1));
        (0..10).for_each(|number| assert!(publisher.publish_with(&payload(number), &short).is_ok()));
        publisher.publish_with(&payload(10), &Envelope::new().key(b"a")).unwrap();
        let mut consumer = bus.consumer(topic.clone(), "g").existing().open().unwrap();
        let message = consumer.try_recv().unwrap().expect("a living message is there");
        assert_eq!(seen(&message), (10, 1));
        message.ack().unwrap();
    }
}

/// How long a consumer that sleeps takes to receive after `act`, which another one does. Sleepers look again after a
/// second whatever happens, so what comes much sooner has been woken.
fn wake_up(stage: &Stage, act: impl FnOnce()) -> Duration {
    let mut sleeper = stage.bus.consumer(stage.topic(), "g").existing().wait(Wait::Park).open().unwrap();
    let (begin, begun) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let sleeping = scope.spawn(move || {
            begin.send(nix::unistd::gettid()).unwrap();
            sleeper.recv_timeout(LIMIT).unwrap().ack().unwrap();
            Instant::now()
        });
        let status = format!("/proc/self/task/{}/stat", begun.recv().unwrap());
        await_that("a sleeper", || {
            std::thread::sleep(Duration::from_millis(20));
            std::fs::read_to_string(&status).unwrap().contains(") S ")
        });
        let started = Instant::now();
        act();
        sleeping.join().unwrap().saturating_duration_since(started)
    })
}

#[test]
fn a_window_that_opens_wakes_who_sleeps_before_it() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once().window(64));
        let mut consumer = stage.consumer();
        for round in 0..4 {
            stage.publish(round * 65, 65);
            let leases: Vec<_> = (0..64).map(|_| take(&mut consumer).keep()).collect();
            leases[1..].iter().for_each(|lease| consumer.ack(lease).unwrap());
            let waited = wake_up(&stage, || consumer.ack(&leases[0]).unwrap());
            assert!(waited < Duration::from_millis(300), "{mode}: {waited:?}");
        }
    }
}

#[test]
fn a_rejection_makes_room_for_who_sleeps_before_the_limit() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once().max_in_flight(1));
        let mut consumer = stage.consumer();
        for round in 0..4 {
            stage.publish(round * 2, 2);
            let lease = take(&mut consumer).keep();
            let waited = wake_up(&stage, || consumer.reject(&lease, "bad").unwrap());
            assert!(waited < Duration::from_millis(300), "{mode}: {waited:?}");
        }
    }
}

#[test]
fn a_lease_that_had_ended_makes_no_room_when_it_is_settled() {
    for mode in LOGS {
        let options = GroupOptions::new().effectively_once().lease(Duration::from_millis(50));
        let mut stage = Stage::new(mode, options);
        stage.publish(0, 5);
        let mut consumer = stage.bus.consumer(stage.topic(), "g").max_in_flight(2).open().unwrap();
        let ended = take(&mut consumer).keep();
        let mut lasting = take(&mut consumer).keep();
        consumer.extend(&mut lasting, LONG).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        // One lease has ended and counts no more.
        let mut third = take(&mut consumer).keep();
        consumer.extend(&mut third, LONG).unwrap();
        consumer.ack(&ended).unwrap();
        expect_nothing(&mut consumer);
    }
}

#[test]
fn a_pipeline_that_slept_past_its_lease_is_fenced_and_its_input_has_one_output() {
    for mode in LOGS {
        for exclusive in [false, true] {
            let options = GroupOptions::new().effectively_once().lease(Duration::from_millis(100));
            let mut stage = Stage::new(mode, if exclusive { options.exclusive() } else { options });
            stage.bus.create(&outputs()).unwrap();
            let mut subscriber = stage.bus.subscriber(outputs()).start(Start::Oldest).open().unwrap();
            let mut sleeper = stage.start("pipe", "");
            stage.publish(0, 2);
            sleeper.expect("0 1");
            sleeper.signal(Signal::SIGSTOP);
            let mut other = stage.start("pipe", "");
            let mut inputs: Vec<String> = Vec::new();
            while inputs.len() < 2 {
                inputs.push(other.line());
                other.tell("go on");
                other.expect("Ok(())");
            }
            if exclusive {
                assert_eq!(inputs, ["0 2", "1 1"], "one at a time, in order");
            }
            inputs.sort();
            assert_eq!(inputs, ["0 2", "1 1"]);
            sleeper.signal(Signal::SIGCONT);
            sleeper.tell("go on");
            sleeper.expect("Err(Publish(Fenced))");
            let mut found: Vec<_> = (0..2).map(|_| *subscriber.recv_timeout(LIMIT).unwrap()).collect();
            found.sort_unstable();
            let by = other.pid().as_raw() as u64;
            assert_eq!(found, [[0, by], [1, by]]);
            assert!(subscriber.try_recv().unwrap().is_none(), "an input has a second output");
            await_that("the floor", || group_status(&stage).floor == 2);
        }
    }
}

#[test]
fn a_pipeline_has_an_output_on_which_its_outputs_can_be_told() {
    let stage = Stage::new(Mode::Many, GroupOptions::new().effectively_once());
    let refused = |output: Topic<[u8]>| {
        let opened = stage.bus.pipeline(stage.topic(), "g", output).open();
        opened.err().expect("an output that cannot be told apart").to_string()
    };
    let problem = refused(Topic::named("alone").exclusive());
    assert!(problem.contains("many publishers"), "{problem}");
    let problem = refused(letters(&stage));
    assert!(problem.contains("dead-letter topic"), "{problem}");
}

/// An id that is on the output topic, by whomever, is there once; what else its input becomes is published, and it ends.
#[test]
fn outputs_with_known_ids_are_left_out_and_their_input_ends() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, GroupOptions::new().effectively_once().lease(LONG));
        let outputs = Topic::<[u8]>::new("ids").envelope().dedup();
        let mut stranger = stage.bus.publisher(outputs.clone()).unwrap();
        let id = |id: &str| Envelope::new().id(id.as_bytes());
        stranger.publish_with(b"stranger", &id("a")).unwrap();
        let mut pipeline = stage.bus.pipeline(stage.topic(), "g", outputs.clone()).open().unwrap();
        stage.publish(0, 3);
        // All there, some there and one twice, none there.
        for ids in [&["a"][..], &["b", "a", "", "b"], &["c", ""]] {
            let mut inputs = 0;
            let step = pipeline.step_timeout(LIMIT, |input, outputs| {
                inputs += 1;
                assert_eq!(input.attempt(), 1);
                ids.iter().for_each(|name| outputs.push_with(b"output", id(name)));
                Ok(())
            });
            assert_eq!((step.unwrap(), inputs), (true, 1), "{mode} {ids:?}");
        }
        let late = pipeline.step_timeout(Duration::from_millis(20), |input, _| panic!("{} again", input.sequence()));
        assert!(!late.unwrap());
        let mut reader = stage.bus.subscriber(outputs).start(Start::Oldest).open().unwrap();
        let found: Vec<String> = std::iter::from_fn(|| {
            let message = reader.try_recv().unwrap()?;
            Some(String::from_utf8_lossy(message.id().unwrap_or(b"none")).into_owned())
        })
        .collect();
        assert_eq!(found, ["a", "b", "none", "c", "none"], "{mode}");
        assert_eq!(group_status(&stage).floor, 3);
    }
}

#[test]
fn a_letter_too_large_for_its_topic_holds_up_no_other() {
    let mut stage = Stage::new(Mode::Many, at_least_once());
    stage.bus.create(&letters(&stage).messages(64).bytes(64 << 10)).unwrap();
    stage.publisher.publish(&vec![7; 100 << 10]).unwrap();
    stage.publish(1, 1);
    let mut consumer = stage.consumer();
    consumer.recv_timeout(LIMIT).unwrap().reject("large").unwrap();
    take(&mut consumer).reject("small").unwrap();
    assert_eq!(read_letters(&stage, 1), [(1, "small 1".to_owned())]);
    let status = group_status(&stage);
    assert_eq!((status.moving, status.dead_lettered, status.floor), (1, 1, 0), "what waits is visible");
}

#[test]
fn dead_letters_need_a_topic_that_takes_and_keeps_them() {
    let stage = Stage::new(Mode::Many, at_least_once());
    stage.bus.create(&Topic::<[u8]>::new("letters").exclusive().envelope()).unwrap();
    stage.bus.create(&Topic::<u64>::new("numbers").envelope()).unwrap();
    stage.bus.create(&Topic::<[u8]>::new("plain")).unwrap();
    stage.bus.create(&Topic::<[u8]>::new("newest").envelope().full(Full::Overwrite)).unwrap();
    let refused = [
        ("letters", "\"letters\" is exclusive"),
        ("numbers", "\"numbers\" takes u64"),
        ("plain", "\"plain\" has no envelopes"),
        ("newest", "\"newest\" overwrites"),
    ];
    for (letters, said) in refused {
        let options = at_least_once().dead_letter(letters);
        let created = stage.bus.create_group(stage.topic().name(), "other", &options, Start::Oldest, true);
        let problem = created.unwrap_err().to_string();
        assert!(problem.contains(said), "{problem}");
    }
}

/// Somebody has made the dead-letter topic for his own type, after the group.
#[test]
fn a_letter_of_the_wrong_size_holds_up_no_other() {
    let mut stage = Stage::new(Mode::Many, at_least_once());
    stage.bus.create(&Topic::<u64>::named(letters(&stage).name().to_owned()).envelope()).unwrap();
    stage.publisher.publish(b"of no type").unwrap();
    stage.publisher.publish(b"8 bytes.").unwrap();
    let mut consumer = stage.consumer();
    consumer.recv_timeout(LIMIT).unwrap().reject("large").unwrap();
    consumer.recv_timeout(LIMIT).unwrap().reject("fits").unwrap();
    await_that("the one that fits", || {
        expect_nothing(&mut consumer);
        group_status(&stage).dead_lettered == 1
    });
    assert_eq!((group_status(&stage).moving, group_status(&stage).floor), (1, 0), "what waits is visible");
}

/// A topic has 64 publishers.
#[test]
fn more_consumers_than_publishers_can_write_letters() {
    let mut stage = Stage::new(Mode::Many, at_least_once());
    stage.bus.create(&letters(&stage).messages(128).bytes(64 << 10)).unwrap();
    stage.publish(0, 70);
    let mut consumers: Vec<_> = (0..70).map(|_| stage.consumer()).collect();
    consumers.iter_mut().for_each(|consumer| take(consumer).reject("bad").unwrap());
    await_that("every letter", || {
        consumers.iter_mut().for_each(expect_nothing);
        group_status(&stage).floor == 70
    });
    assert_eq!(read_letters(&stage, 70).len(), 70);
}

#[test]
fn a_newcomer_finds_what_another_has_reserved_and_not_taken() {
    for mode in LOGS {
        let mut stage = Stage::new(mode, at_least_once());
        stage.publish(0, 10);
        let mut slow = stage.consumer();
        let kept = take(&mut slow).keep();
        for expected in 1..10 {
            let mut newcomer = stage.consumer();
            let message = newcomer.try_recv().unwrap().expect("nobody works on it");
            assert_eq!(seen(&message), (expected, 1));
            message.ack().unwrap();
        }
        slow.ack(&kept).unwrap();
    }
}
