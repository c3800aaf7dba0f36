//! Coordinator and keeper killed together, with real processes: what participants hold is taken up again, and whoever died
//! with them is cleared away.

mod common;

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::{
    LIMIT, MODES, Process, Scene, await_that, end_with_the_test, hear, mode_of, number, publisher_after, raw, receive,
    say, small,
};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::unistd::Pid;
use shmbus::{
    Bus, ConnectError, GoneReason, GroupOptions, Mode, OpenError, PublishError, Publisher, RecvError, Start,
    Subscriber, Topic, TopicOptions, Wait,
};

/// How often both are killed in a row.
const KILLS: usize = 3;

/// The longest silence between two messages that a busy machine alone explains.
const SILENCE: Duration = Duration::from_secs(1);

/// Descriptors of a process that has few.
const FEW: u64 = 64;

/// A name that a publisher has.
const NAME: &str = "till-7";

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    if role == "ignore children" {
        return open_without_children();
    }
    if role == "read with few descriptors" {
        // Before there is a bus, which asks how many it may keep.
        setrlimit(Resource::RLIMIT_NOFILE, FEW, FEW).unwrap();
    }
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "publish" => publish_for_ever(&bus, &arguments),
        "hold" => hold_for_ever(&bus, &arguments),
        "consume" => consume_when_told(&bus),
        "park" => park_for_ever(&bus, &arguments),
        "publish few" => publish_few(&bus, topic_that(&arguments)),
        "read" => read_when_told(&bus, topic_that(&arguments)),
        "read with few descriptors" => read_with_few_descriptors(&bus, topic_that(&arguments)),
        "hold many" => hold_many_topics(&bus),
        "exhaust" => hold_without_descriptors(&bus),
        _ => panic!("no role {role}"),
    }
}

fn topic(mode: Mode) -> Topic<[u8]> {
    raw(mode, "adoption").messages(256).bytes(64 << 10)
}

fn of(mode: &str) -> Topic<[u8]> {
    topic(mode_of(mode))
}

/// Role: publishes 0, 1, 2 and so on until it is killed. Arguments: mode.
fn publish_for_ever(bus: &Bus, mode: &str) {
    end_with_the_test();
    let mut publisher = bus.publisher(of(mode)).unwrap();
    say("publishing");
    for number in 0u64.. {
        match publisher.publish(&number.to_le_bytes()) {
            Ok(_) => thread::sleep(Duration::from_micros(50)),
            Err(PublishError::Gone(_)) => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// A topic for many whose messages grow old, or not.
fn topic_that(arguments: &str) -> Topic<[u8]> {
    let many = topic(Mode::Many);
    if arguments == "ageing" { many.envelope().max_age(Duration::from_millis(100)) } else { many }
}

/// Role: publishes 0, 1 and 2, and keeps its place.
fn publish_few(bus: &Bus, topic: Topic<[u8]>) {
    let mut publisher = bus.publisher(topic).unwrap();
    (0..3u64).for_each(|number| assert!(publisher.publish(&number.to_le_bytes()).is_ok()));
    say("published");
    hear();
}

/// Role: reads as it is told.
fn read_when_told(bus: &Bus, topic: Topic<[u8]>) {
    let mut subscriber = bus.subscriber(topic).open().unwrap();
    say("reading");
    loop {
        hear();
        match subscriber.recv_timeout(LIMIT) {
            Ok(message) => say(&number(&message).to_string()),
            Err(error) => say(&format!("{error:?}")),
        }
    }
}

/// Role: the same, having kept no descriptor of the topic's arenas.
fn read_with_few_descriptors(bus: &Bus, topic: Topic<[u8]>) {
    // Log, cursors and an arena each; of half of what it may have, two are left for the topic.
    let others = (0..(FEW / 2 - 2) / 3).map(|number| {
        let other = small(&format!("f{number}"));
        bus.create(&other).unwrap();
        bus.subscriber(other).open().unwrap()
    });
    let _others: Vec<_> = others.collect();
    read_when_told(bus, topic);
}

/// Role: holds more segments than a keeper that is stopped can be sent.
fn hold_many_topics(bus: &Bus) {
    const TOPICS: usize = 150;
    let _publishers: Vec<_> = (0..TOPICS).map(|number| bus.publisher(small(&format!("t{number}"))).unwrap()).collect();
    say("held");
    hear();
}

/// Role: holds a topic that nobody else has, and all the descriptors that it may have.
fn hold_without_descriptors(bus: &Bus) {
    const DESCRIPTORS: u64 = 256;
    let mut publisher = bus.publisher(topic(Mode::Many)).unwrap();
    publisher.publish(b"kept").unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).unwrap();
    let mut files = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        files.push(file);
    }
    say("full");
    hear();
}

/// Role: opens the bus as a program does that lets the kernel reap its children.
fn open_without_children() {
    // SAFETY: no handler of this process waits for its children.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
    say("opening");
    let bus = Bus::open_default().map_err(|error| error.to_string());
    say(&bus.map_or_else(|error| error, |_| "open".to_owned()));
}

fn topic_of_holder(name: &str) -> Topic<[u8]> {
    Topic::named(name.to_owned()).exclusive().messages(64).bytes(8192)
}

/// Role: holds a publisher, and a subscriber that reads nothing, until it is told to look. Arguments: topic.
fn hold_for_ever(bus: &Bus, name: &str) {
    let topic = topic_of_holder(name);
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
    publisher.publish(b"held").unwrap();
    say("held");
    loop {
        let said = match hear().as_str() {
            "read" => {
                subscriber.recv_timeout(LIMIT).map(|message| message.to_vec()).map_err(|error| format!("{error:?}"))
            }
            "publish" => publisher.publish(b"more").map(|at| at.to_string().into_bytes()).map_err(|e| format!("{e:?}")),
            "open" => bus.subscriber(topic.clone()).open().map(|_| b"opened".to_vec()).map_err(|e| format!("{e:?}")),
            "exec" => panic!("{}", Command::new("sleep").arg("1000").exec()),
            other => panic!("no command {other}"),
        };
        say(&said.map_or_else(|error| error, |bytes| String::from_utf8(bytes).unwrap()));
    }
}

/// Role: sleeps on a pattern, and says what woke it.
fn park_for_ever(bus: &Bus, pattern: &str) {
    end_with_the_test();
    let mut subscriber = bus.wildcard::<[u8]>(pattern).wait(Wait::Park).open().unwrap();
    say("parked");
    loop {
        let message = subscriber.recv().unwrap();
        say(&format!("{} {}", message.topic(), String::from_utf8_lossy(&message)));
    }
}

/// Role: takes and acknowledges messages of group `g` as it is told.
fn consume_when_told(bus: &Bus) {
    let mut consumer = bus.consumer(topic(Mode::Many), "g").existing().open().unwrap();
    let mut leases = Vec::new();
    say("ready");
    loop {
        match hear().as_str() {
            "take" => match consumer.recv_timeout(LIMIT) {
                Ok(message) => {
                    say(&format!("{} {}", message.sequence(), message.attempt()));
                    leases.push(message.keep());
                }
                Err(error) => say(&format!("{error:?}")),
            },
            "ack" => say(&format!("{:?}", consumer.ack(&leases.remove(0)))),
            other => panic!("no command {other}"),
        }
    }
}

/// Kills coordinator and keeper so that neither can replace the other.
fn kill_both(scene: &Scene) -> [Pid; 2] {
    let pids = [scene.server("keeper"), scene.server("coordinator")];
    pids.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
    pids.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).unwrap());
    pids
}

/// Waits until others serve, whom nobody but participants can have started.
fn await_successors(scene: &Scene, killed: [Pid; 2]) {
    await_that("a new coordinator and keeper", || {
        let new = |role| scene.servers(Some(role)).iter().any(|pid| !killed.contains(pid));
        new("keeper") && new("coordinator")
    });
}

/// Whether a process holds a pidfd of another one.
fn has_pidfd_of(holder: Pid, of: Pid) -> bool {
    let line = format!("Pid:\t{of}");
    let Ok(descriptors) = fs::read_dir(format!("/proc/{holder}/fdinfo")) else { return false };
    let infos = descriptors.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    infos.into_iter().any(|info| info.lines().any(|found| found == line))
}

fn start(scene: &Scene, role: &str, arguments: &str, says: &str) -> Process {
    let mut process = scene.start(role, arguments);
    process.expect(says);
    process
}

/// Reads consecutive numbers for a while; nothing is missing, and it is never silent for long.
fn read_on(subscriber: &mut Subscriber<[u8]>, next: &mut Option<u64>, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        let asked = Instant::now();
        let (_, payload) = receive(subscriber);
        assert!(asked.elapsed() < SILENCE, "nothing for {:?}", asked.elapsed());
        expect_next(&payload, next);
    }
}

fn expect_next(payload: &[u8], next: &mut Option<u64>) {
    let number = number(payload);
    assert!(next.is_none_or(|expected| expected == number), "expected {next:?}, got {number}");
    *next = Some(number + 1);
}

#[test]
fn traffic_goes_on_and_everything_is_there_when_both_were_killed() {
    for mode in MODES {
        let scene = Scene::new("both");
        let bus = scene.open();
        bus.create(&topic(mode)).unwrap();
        let publisher = start(&scene, "publish", &mode.to_string(), "publishing");
        let mut subscriber = bus.subscriber(topic(mode)).open().unwrap();
        let before = bus.topic(topic(mode).name()).unwrap();
        let mut next = None;
        for _ in 0..KILLS {
            read_on(&mut subscriber, &mut next, Duration::from_millis(50));
            let cursor = bus.topic(topic(mode).name()).unwrap().subscribers[0].sequence;
            let killed = kill_both(&scene);
            read_on(&mut subscriber, &mut next, Duration::from_millis(300));
            await_successors(&scene, killed);
            let newcomer = scene.open();
            let after = newcomer.topic(topic(mode).name()).unwrap();
            assert_eq!((after.id, after.memory_bytes), (before.id, before.memory_bytes), "{mode}");
            assert_eq!(after.publishers[0].pid, publisher.pid().as_raw() as u32);
            assert_eq!(after.subscribers[0].pid, std::process::id());
            assert!(after.subscribers[0].sequence >= cursor, "{mode}: the cursor moved back");
            read_on(&mut subscriber, &mut next, Duration::from_millis(50));
            if mode != Mode::Channel {
                let mut another = newcomer.subscriber(topic(mode)).open().unwrap();
                // Both in turn: whoever does not read holds the publisher back.
                await_that("a message for the newcomer", || {
                    if let Some(message) = subscriber.try_recv().unwrap() {
                        expect_next(&message, &mut next);
                    }
                    another.try_recv().unwrap().is_some()
                });
            }
        }
        bus.stop().unwrap();
        let gone = loop {
            match subscriber.recv() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(gone, RecvError::Gone(GoneReason::Stopped)), "{gone:?}");
        await_that("an orderly end, which leaves nothing", || scene.directory().read_dir().unwrap().count() == 0);
    }
}

#[test]
fn who_dies_together_with_both_is_cleared_away() {
    let scene = Scene::new("all");
    let bus = scene.open();
    let exclusive = topic(Mode::Exclusive);
    bus.create(&exclusive).unwrap();
    // Without it, nobody would be left who holds the topic.
    let mut witness = bus.subscriber(exclusive.clone()).droppable().open().unwrap();
    for _ in 0..KILLS {
        let publisher = start(&scene, "publish", "exclusive", "publishing");
        let mut subscriber = bus.subscriber(exclusive.clone()).open().unwrap();
        receive(&mut subscriber);
        publisher.signal(Signal::SIGSTOP);
        let killed = kill_both(&scene);
        publisher.kill();
        drop(subscriber);
        await_successors(&scene, killed);
        let mut next = publisher_after(&bus, &exclusive);
        // Nobody holds the ring.
        for _ in 0..1000 {
            next.publish_timeout(b"01234567", LIMIT).unwrap();
        }
        drop(next);
        let status = bus.topic(exclusive.name()).unwrap();
        assert_eq!((status.publishers.len(), status.subscribers.len()), (0, 1));
    }
    while !matches!(witness.try_recv(), Ok(None)) {}
}

#[test]
fn who_dies_while_they_gather_takes_no_topic_along() {
    let scene = Scene::new("dying");
    let bus = scene.open();
    let many = topic(Mode::Many);
    let mut publisher = bus.publisher(many.clone()).unwrap();
    let dying = start(&scene, "publish", "many", "publishing");
    // Nobody reads what it publishes: its arena is nobody else's, and they wait for it.
    dying.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    await_that("those who gather to have found it alive", || {
        let successors = scene.servers(Some("coordinator"));
        successors.iter().any(|pid| !killed.contains(pid) && has_pidfd_of(*pid, dying.pid()))
    });
    dying.kill();
    await_successors(&scene, killed);
    let mut subscriber = bus.subscriber(many.clone()).open().unwrap();
    publisher.publish(b"goes on").unwrap();
    assert_eq!(receive(&mut subscriber).1, b"goes on");
    await_that("its place to be free", || bus.topic(many.name()).unwrap().publishers.len() == 1);
}

#[test]
fn who_gives_a_publisher_up_while_nobody_serves_takes_no_topic_along() {
    let scene = Scene::new("giving-up");
    let (bus, other) = (scene.open(), scene.open());
    let many = topic(Mode::Many);
    let mut publisher = bus.publisher(many.clone()).unwrap();
    let given_up = other.publisher(many.clone()).unwrap();
    let _kept = other.publisher(small("kept")).unwrap();
    let pids = [scene.server("keeper"), scene.server("coordinator")];
    pids.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
    // Nobody else has its arena, and nobody hears that it goes. Its process has another handle, and comes back.
    drop(given_up);
    pids.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).unwrap());
    await_successors(&scene, pids);
    let mut subscriber = bus.subscriber(many.clone()).open().unwrap();
    publisher.publish(b"goes on").unwrap();
    assert_eq!(receive(&mut subscriber).1, b"goes on");
    await_that("its place to be free", || bus.topic(many.name()).unwrap().publishers.len() == 1);
    drop(other);
}

#[test]
fn who_has_no_descriptor_left_presents_what_it_has() {
    let scene = Scene::new("exhausted");
    let bus = scene.open();
    let _another = publisher(&bus, "another", b"x");
    let _full = start(&scene, "exhaust", "", "full");
    await_successors(&scene, kill_both(&scene));
    assert_eq!(bus.topic(topic(Mode::Many).name()).unwrap().publishers.len(), 1);
}

#[test]
fn a_reader_that_was_stopped_reads_on_in_a_dead_publishers_arena() {
    let scene = Scene::new("stopped-reader");
    let bus = scene.open();
    let many = topic(Mode::Many);
    let mut publisher = bus.publisher(many.clone()).unwrap();
    let mut reader = start(&scene, "read", "", "reading");
    let dying = start(&scene, "publish few", "", "published");
    reader.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    dying.kill();
    await_successors(&scene, killed);
    await_that("the others to be served without it", || bus.topics().is_ok());
    publisher.publish(&3u64.to_le_bytes()).unwrap();
    // An arena in the place of the one that nobody else has would not be the one that it reads.
    let mut second = bus.publisher(many.clone()).unwrap();
    second.publish(&4u64.to_le_bytes()).unwrap();
    reader.signal(Signal::SIGCONT);
    let read = |reader: &mut Process, numbers: std::ops::Range<u64>| {
        numbers.for_each(|number| {
            reader.tell("take");
            reader.expect(&number.to_string());
        });
    };
    read(&mut reader, 0..5);
    // It presents the one that was given up, and is believed the others.
    await_successors(&scene, kill_both(&scene));
    assert_eq!(bus.topic(many.name()).unwrap().subscribers.len(), 1);
    second.publish(&5u64.to_le_bytes()).unwrap();
    bus.publisher(many.clone()).unwrap().publish(&6u64.to_le_bytes()).unwrap();
    read(&mut reader, 5..7);
}

#[test]
fn who_keeps_no_descriptor_of_an_arena_reads_on_in_it() {
    let scene = Scene::new("unkept");
    let bus = scene.open();
    let many = topic(Mode::Many);
    // There is an arena, but not of anybody who lives.
    let mut reader = {
        let dying = start(&scene, "publish few", "", "published");
        let reader = start(&scene, "read with few descriptors", "", "reading");
        let killed = kill_both(&scene);
        dying.kill();
        await_successors(&scene, killed);
        reader
    };
    bus.publisher(many.clone()).unwrap().publish(&7u64.to_le_bytes()).unwrap();
    reader.tell("take");
    reader.expect("7");
}

#[test]
fn what_lies_in_an_arena_that_was_given_up_grows_too_old_like_the_rest() {
    let scene = Scene::new("ageing");
    let bus = scene.open();
    let many = topic(Mode::Many).envelope().max_age(Duration::from_millis(100));
    let mut publisher = bus.publisher(many.clone()).unwrap();
    let reader = start(&scene, "read", "ageing", "reading");
    let dying = start(&scene, "publish few", "ageing", "published");
    reader.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    dying.kill();
    await_successors(&scene, killed);
    await_that("the others to be served without it", || bus.topics().is_ok());
    publisher.publish(b"beside them").unwrap();
    reader.kill();
    await_that("all to be given up", || {
        let status = bus.topic(many.name()).unwrap();
        status.oldest_sequence == status.tail_sequence
    });
}

#[test]
fn what_comes_while_the_keeper_is_stopped_is_taken_all_the_same() {
    let scene = Scene::new("stopped-keeper");
    let bus = scene.open();
    let holder = start(&scene, "hold many", "", "held");
    let before = bus.topics().unwrap().len();
    let _another = publisher(&bus, "another", b"x");
    holder.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    await_that("those who gather to have found it alive", || {
        let successors = scene.servers(Some("coordinator"));
        successors.iter().any(|pid| !killed.contains(pid) && has_pidfd_of(*pid, holder.pid()))
    });
    let keeper = scene.server("keeper");
    kill(keeper, Signal::SIGSTOP).unwrap();
    holder.signal(Signal::SIGCONT);
    await_that("the others to be served", || bus.topics().is_ok());
    assert_eq!(bus.topics().unwrap().len(), before + 1);
    kill(keeper, Signal::SIGCONT).unwrap();
    // What the keeper was not told of comes from the participants once more.
    kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
    assert_eq!(bus.topics().unwrap().len(), before + 1);
}

/// Leaves a process room for so many more descriptors; the limit that it had.
fn leave_room_for(process: Pid, more: usize) -> libc::rlimit {
    let used = |number: u64| fs::symlink_metadata(format!("/proc/{process}/fd/{number}")).is_ok();
    let first_without = (0..).filter(|number| !used(*number)).nth(more).unwrap();
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit there.
    assert_eq!(unsafe { libc::prlimit(process.as_raw(), libc::RLIMIT_NOFILE, std::ptr::null(), &mut before) }, 0);
    limit_descriptors(process, libc::rlimit { rlim_cur: first_without, ..before });
    before
}

fn limit_descriptors(process: Pid, limit: libc::rlimit) {
    // SAFETY: the kernel reads one rlimit there.
    assert_eq!(unsafe { libc::prlimit(process.as_raw(), libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) }, 0);
}

#[test]
fn who_comes_back_while_the_coordinator_lacks_descriptors_comes_again() {
    let scene = Scene::new("short");
    let bus = scene.open();
    let mut holder = start(&scene, "hold", "held", "held");
    holder.signal(Signal::SIGSTOP);
    let killed = scene.server("coordinator");
    kill(killed, Signal::SIGKILL).unwrap();
    await_that("a successor", || bus.topics().is_ok() && scene.server("coordinator") != killed);
    let coordinator = scene.server("coordinator");
    let before = leave_room_for(coordinator, 1);
    holder.signal(Signal::SIGCONT);
    // It comes back meanwhile, and is refused.
    thread::sleep(Duration::from_millis(300));
    limit_descriptors(coordinator, before);
    holder.tell("open");
    holder.expect("opened");
}

#[test]
fn a_topic_full_of_publishers_loses_the_arena_of_a_dead_one_only() {
    let scene = Scene::new("crowded");
    let bus = scene.open();
    let many = topic(Mode::Many);
    let mut publishers: Vec<_> = (0..63).map(|_| bus.publisher(many.clone()).unwrap()).collect();
    let dying = start(&scene, "publish few", "", "published");
    let killed = kill_both(&scene);
    dying.kill();
    await_successors(&scene, killed);
    let mut subscriber = bus.subscriber(many.clone()).open().unwrap();
    publishers[0].publish(b"goes on").unwrap();
    assert_eq!(receive(&mut subscriber).1, b"goes on");
}

#[test]
fn what_the_dead_have_left_unread_is_given_up_with_their_arenas() {
    let scene = Scene::new("dead-together");
    let bus = scene.open();
    let many = topic(Mode::Many);
    let mut publisher = bus.publisher(many.clone()).unwrap();
    let reader = start(&scene, "read", "", "reading");
    let dying = start(&scene, "publish few", "", "published");
    let killed = kill_both(&scene);
    // Nobody else has its arena, and nobody holds what lies there but who dies as well.
    dying.kill();
    reader.kill();
    await_successors(&scene, killed);
    let mut subscriber = bus.subscriber(many.clone()).start(Start::Oldest).open().unwrap();
    publisher.publish(b"goes on").unwrap();
    assert_eq!(receive(&mut subscriber).1, b"goes on");
}

#[test]
fn what_a_reader_leaves_unread_that_dies_while_they_gather_is_given_up() {
    let scene = Scene::new("dies-later");
    let bus = scene.open();
    let many = topic(Mode::Many);
    let mut publisher = bus.publisher(many.clone()).unwrap();
    let reader = start(&scene, "read", "", "reading");
    let dying = start(&scene, "publish few", "", "published");
    reader.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    dying.kill();
    await_that("those who gather to have found it alive", || {
        let successors = scene.servers(Some("coordinator"));
        successors.iter().any(|pid| !killed.contains(pid) && has_pidfd_of(*pid, reader.pid()))
    });
    reader.kill();
    await_successors(&scene, killed);
    let mut subscriber = bus.subscriber(many.clone()).start(Start::Oldest).open().unwrap();
    publisher.publish(b"goes on").unwrap();
    assert_eq!(receive(&mut subscriber).1, b"goes on");
}

#[test]
fn a_keeper_that_was_stopped_keeps_what_came_meanwhile() {
    let scene = Scene::new("keeper-later");
    let bus = scene.open();
    let holder = start(&scene, "hold many", "", "held");
    let before = bus.topics().unwrap().len();
    let _another = publisher(&bus, "another", b"x");
    holder.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    await_that("those who gather to have found it alive", || {
        let successors = scene.servers(Some("coordinator"));
        successors.iter().any(|pid| !killed.contains(pid) && has_pidfd_of(*pid, holder.pid()))
    });
    let keeper = scene.server("keeper");
    kill(keeper, Signal::SIGSTOP).unwrap();
    holder.signal(Signal::SIGCONT);
    await_that("the others to be served", || bus.topics().is_ok());
    assert_eq!(bus.topics().unwrap().len(), before + 1);
    kill(keeper, Signal::SIGCONT).unwrap();
    let kept = || fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().count();
    await_that("the keeper to have all", || kept() > 3 * before);
    // Nobody else has them any more.
    holder.kill();
    let published = || bus.topics().unwrap().iter().filter(|topic| !topic.publishers.is_empty()).count();
    await_that("its places to be free", || published() == 1);
    kill(scene.server("coordinator"), Signal::SIGKILL).unwrap();
    assert_eq!(bus.topics().unwrap().len(), before + 1);
}

#[test]
fn an_arena_is_replaced_while_the_keeper_is_stopped() {
    let scene = Scene::new("stopped-replace");
    let bus = scene.open();
    let many = topic(Mode::Many);
    let mut publisher = bus.publisher(many.clone()).unwrap();
    let holder = start(&scene, "hold many", "", "held");
    let dying = start(&scene, "publish few", "", "published");
    holder.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    dying.kill();
    await_that("those who gather to have found it alive", || {
        let successors = scene.servers(Some("coordinator"));
        successors.iter().any(|pid| !killed.contains(pid) && has_pidfd_of(*pid, holder.pid()))
    });
    kill(scene.server("keeper"), Signal::SIGSTOP).unwrap();
    holder.signal(Signal::SIGCONT);
    await_that("the others to be served", || bus.topics().is_ok());
    let mut subscriber = bus.subscriber(many.clone()).open().unwrap();
    publisher.publish(b"goes on").unwrap();
    assert_eq!(receive(&mut subscriber).1, b"goes on");
}

#[test]
fn who_presents_while_they_lack_descriptors_comes_again() {
    let scene = Scene::new("short-gathering");
    let _bus = scene.open();
    let mut holder = start(&scene, "hold", "held", "held");
    holder.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    await_that("those who gather to have found it alive", || {
        let successors = scene.servers(Some("coordinator"));
        successors.iter().any(|pid| !killed.contains(pid) && has_pidfd_of(*pid, holder.pid()))
    });
    let coordinator = scene.server("coordinator");
    // Its connection, and three segments; none to open one of them anew.
    thread::sleep(Duration::from_millis(100));
    let before = leave_room_for(coordinator, 4);
    holder.signal(Signal::SIGCONT);
    thread::sleep(Duration::from_millis(300));
    limit_descriptors(coordinator, before);
    holder.tell("open");
    holder.expect("opened");
}

#[test]
fn leases_survive_and_those_of_the_dead_return() {
    let scene = Scene::new("leases");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic(Mode::Many)).unwrap();
    let options = GroupOptions::new().lease(Duration::from_secs(600));
    bus.create_group(topic(Mode::Many).name(), "g", &options, Start::Oldest, false).unwrap();
    let (mut living, mut dying) = (start(&scene, "consume", "", "ready"), start(&scene, "consume", "", "ready"));
    (0..4).for_each(|number: u64| assert!(publisher.publish(&number.to_le_bytes()).is_ok()));
    let take = |who: &mut Process, expected: &str| {
        who.tell("take");
        who.expect(expected);
    };
    take(&mut living, "0 1");
    take(&mut dying, "1 1");
    take(&mut living, "2 1");
    let killed = kill_both(&scene);
    dying.kill();
    take(&mut living, "3 1");
    await_successors(&scene, killed);
    // On proof of death, long before the lease ends.
    take(&mut living, "1 2");
    for _ in 0..4 {
        living.tell("ack");
        living.expect("Ok(())");
    }
    let newcomer = start(&scene, "consume", "", "ready");
    let status = bus.topic(topic(Mode::Many).name()).unwrap();
    assert_eq!((status.groups[0].consumers.len(), status.groups[0].in_flight, status.groups[0].returned), (2, 0, 0));
    drop(newcomer);
}

#[test]
fn a_name_goes_on_where_it_was() {
    let scene = Scene::new("names");
    let bus = scene.open();
    let many = topic(Mode::Many);
    let mut publisher = bus.publisher_as(many.clone(), NAME).unwrap();
    let mut subscriber = bus.subscriber(many.clone()).open().unwrap();
    (1..=5).for_each(|number: u64| assert!(publisher.publish_numbered(b"x", number).is_ok()));
    let killed = kill_both(&scene);
    (6..=9).for_each(|number: u64| assert!(publisher.publish_numbered(b"x", number).is_ok()));
    await_successors(&scene, killed);
    let names = bus.publisher_names(many.name()).unwrap();
    assert_eq!((names[0].name.as_str(), names[0].last_number), (NAME, 9));
    // The successor fences it, as ever.
    let successor = scene.open().publisher_as(many, NAME).unwrap();
    assert_eq!(successor.last_number(), Some(9));
    assert!(publisher.publish(b"late").is_err());
    (0..9).for_each(|_| drop(receive(&mut subscriber)));
}

#[test]
fn both_killed_again_while_they_gather() {
    let scene = Scene::new("again");
    let bus = scene.open();
    let many = topic(Mode::Many);
    let mut publisher = bus.publisher(many.clone()).unwrap();
    let mut subscriber = bus.subscriber(many.clone()).open().unwrap();
    let mut stopped = start(&scene, "hold", "stopped", "held");
    // Those who gather wait for it until they are killed.
    stopped.signal(Signal::SIGSTOP);
    let mut killed = kill_both(&scene);
    for number in 0..KILLS as u64 {
        await_successors(&scene, killed);
        publisher.publish(&number.to_le_bytes()).unwrap();
        killed = kill_both(&scene);
    }
    await_successors(&scene, killed);
    stopped.signal(Signal::SIGCONT);
    let topics: Vec<String> = bus.topics().unwrap().into_iter().map(|status| status.name).collect();
    assert_eq!(topics, [many.name(), "stopped"]);
    (0..KILLS as u64).for_each(|number| assert_eq!(receive(&mut subscriber).1, number.to_le_bytes()));
    stopped.tell("read");
    stopped.expect("held");
    stopped.tell("publish");
    stopped.expect("1");
}

#[test]
fn who_comes_too_late_is_told_that_its_topic_is_lost() {
    let scene = Scene::new("late");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic(Mode::Many)).unwrap();
    let mut stopped = start(&scene, "hold", "stopped", "held");
    stopped.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    await_successors(&scene, killed);
    await_that("the others to be served without it", || bus.topics().is_ok());
    assert_eq!(bus.topics().unwrap().len(), 1);
    stopped.signal(Signal::SIGCONT);
    // Once it has presented it, too late.
    await_that("the end of its topic", || {
        stopped.tell("publish");
        stopped.line() == format!("Gone({:?})", GoneReason::Removed)
    });
    publisher.publish(b"x").unwrap();
    // The name is free.
    drop(start(&scene, "hold", "stopped", "held"));
}

#[test]
fn a_group_of_which_nobody_comes_in_time_is_lost_and_says_so() {
    let scene = Scene::new("group");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic(Mode::Many)).unwrap();
    let create = || bus.create_group(topic(Mode::Many).name(), "g", &GroupOptions::new(), Start::Oldest, false);
    create().unwrap();
    let mut stopped = start(&scene, "consume", "", "ready");
    stopped.signal(Signal::SIGSTOP);
    let killed = kill_both(&scene);
    await_successors(&scene, killed);
    await_that("the others to be served without it", || bus.topics().is_ok());
    assert_eq!(bus.topic(topic(Mode::Many).name()).unwrap().groups.len(), 0);
    create().unwrap();
    stopped.signal(Signal::SIGCONT);
    publisher.publish(&7u64.to_le_bytes()).unwrap();
    await_that("the end of its group", || {
        stopped.tell("take");
        stopped.line() == "Fenced"
    });
    let mut another = start(&scene, "consume", "", "ready");
    another.tell("take");
    another.expect("0 1");
}

#[test]
fn without_the_right_to_start_one_it_waits_for_another() {
    let scene = Scene::new("patient");
    let bus = scene.open();
    let patient = scene.options().spawn(false).open().unwrap();
    let mut publisher = patient.publisher(topic(Mode::Many)).unwrap();
    drop(bus);
    let killed = kill_both(&scene);
    publisher.publish(b"x").unwrap();
    thread::sleep(Duration::from_millis(100));
    assert!(scene.servers(None).iter().all(|pid| killed.contains(pid)), "somebody started a coordinator");
    let another = scene.open();
    assert_eq!(another.topic(topic(Mode::Many).name()).unwrap().tail_sequence, 1);
    assert_eq!(patient.topics().unwrap().len(), 1);
}

#[test]
fn who_ignores_its_children_can_try_again_to_start_a_coordinator() {
    let scene = Scene::new("ignorant");
    let _bus = scene.open();
    // Whoever is started now finds the lock taken, and leaves: it has to be tried again until somebody listens.
    scene.hide();
    let mut ignorant = start(&scene, "ignore children", "", "opening");
    thread::sleep(Duration::from_millis(300));
    scene.show();
    ignorant.expect("open");
}

/// A program that starts the bus and then stops for ever; the second time it does so before.
fn stopping_launcher(scene: &Scene) -> String {
    let (path, shmbus) = (scene.directory().join("launcher"), scene.shmbus(&[]));
    let (program, name) = (shmbus.get_program().display(), &scene.name);
    let stop = format!("exec sh -c 'kill -STOP $$' launcher {name} serve --role launcher");
    let text = format!(
        "#!/bin/sh\nif test -e $0.first && ! test -e $0.second; then touch $0.second; {stop}; fi\n\
         touch $0.first\n{program} \"$@\"\n{stop}\n"
    );
    // By another program: what we have open for writing while some thread forks cannot be executed.
    let mut write = Command::new("sh");
    write.args(["-c", "printf %s \"$2\" > \"$1\" && chmod 700 \"$1\"", "sh"]).arg(&path).arg(text);
    assert!(write.status().unwrap().success());
    path.to_str().unwrap().to_owned()
}

#[test]
fn who_starts_a_bus_does_not_wait_for_a_starter_that_is_stopped() {
    let scene = Scene::new("launcher");
    let launcher = format!("SHMBUS_BIN={}", stopping_launcher(&scene));
    let mut holder = scene.start_inside(&["env", &launcher], "hold", "held");
    holder.expect("held");
    // Nor does it believe for ever that such a one will start another.
    await_successors(&scene, kill_both(&scene));
    holder.tell("read");
    holder.expect("held");
    assert_eq!(scene.open().topics().unwrap().len(), 1);
}

#[test]
fn a_bus_hosted_on_a_thread_is_taken_up_by_another_process() {
    let (scene, elsewhere) = (Scene::new("hosted"), tempfile::tempdir().unwrap());
    let start = |topic: &str| {
        let mut process = scene.start_alone(elsewhere.path(), "hold", topic);
        process.expect("held");
        process
    };
    let (host, mut heir) = (start("first"), start("second"));
    assert!(scene.servers(None).is_empty());
    host.kill();
    // Who serves now has to hear from itself.
    let names = || scene.options().spawn(false).open().ok()?.topics().ok();
    await_that("the heir to serve", || names().is_some_and(|topics| topics.len() == 1 && topics[0].name == "second"));
    heir.tell("read");
    heir.expect("held");
    assert!(scene.servers(None).is_empty());
}

#[test]
fn with_nobody_left_a_new_bus_begins() {
    let scene = Scene::new("nobody");
    let bus = scene.open();
    bus.create(&topic(Mode::Many)).unwrap();
    let holder = start(&scene, "hold", "held", "held");
    holder.signal(Signal::SIGSTOP);
    kill_both(&scene);
    holder.kill();
    // This process held nothing, and learns that the bus is another one.
    let another = scene.open();
    assert_eq!(another.topics().unwrap().len(), 0);
    assert!(matches!(bus.topics(), Err(OpenError::Connect(ConnectError::Ended { .. }))));
}

/// Publishes to a topic of its own, which is there as long as what is returned.
fn publisher(bus: &Bus, name: &str, payload: &[u8]) -> Publisher<[u8]> {
    let mut publisher = bus.publisher(small(name)).unwrap();
    publisher.publish(payload).unwrap();
    publisher
}

#[test]
fn wildcards_sleep_through_it_and_wake_for_what_comes_after() {
    let scene = Scene::new("wildcard");
    let bus = scene.open();
    let mut before = publisher(&bus, "w.before", b"missed");
    let mut parked = start(&scene, "park", "w.>", "parked");
    before.publish(b"first").unwrap();
    parked.expect("w.before first");
    await_successors(&scene, kill_both(&scene));
    before.publish(b"second").unwrap();
    parked.expect("w.before second");
    let asked = Instant::now();
    let _after = publisher(&bus, "w.after", b"new");
    parked.expect("w.after new");
    assert!(asked.elapsed() < SILENCE, "it slept for {:?}: nobody rang", asked.elapsed());
    assert_eq!(bus.topic("w.after").unwrap().subscribers.len(), 1);
    parked.kill();
    await_that("its cursors to go", || bus.topics().unwrap().iter().all(|topic| topic.subscribers.is_empty()));
}

#[test]
fn a_wildcard_that_comes_too_late_has_missed_nothing() {
    let scene = Scene::new("late-wildcard");
    let bus = scene.open();
    let mut held = publisher(&bus, "w.held", b"missed");
    let mut parked = start(&scene, "park", "w.>", "parked");
    let alone = publisher(&bus, "w.lost", b"last");
    parked.expect("w.lost last");
    parked.signal(Signal::SIGSTOP);
    drop(alone);
    await_that("its publisher to go", || bus.topic("w.lost").unwrap().publishers.is_empty());
    await_successors(&scene, kill_both(&scene));
    await_that("the others to be served without it", || bus.topics().is_ok());
    // Nobody else had the one, and the other's cursor is in force.
    let left: Vec<(String, usize)> =
        bus.topics().unwrap().into_iter().map(|topic| (topic.name, topic.subscribers.len())).collect();
    assert_eq!(left, [("w.held".to_owned(), 1)]);
    held.publish(b"meanwhile").unwrap();
    let _new = publisher(&bus, "w.new", b"new");
    let _again = publisher(&bus, "w.lost", b"another");
    parked.signal(Signal::SIGCONT);
    let mut heard = [parked.line(), parked.line(), parked.line()];
    heard.sort();
    assert_eq!(heard, ["w.held meanwhile", "w.lost another", "w.new new"]);
    // It has presented its notice, so it is woken.
    let asked = Instant::now();
    let _later = publisher(&bus, "w.later", b"later");
    parked.expect("w.later later");
    assert!(asked.elapsed() < SILENCE, "it slept for {:?}: nobody rang", asked.elapsed());
}

#[test]
fn ephemeral_topics_and_requests_survive_with_their_owner() {
    let scene = Scene::new("ephemeral");
    let (bus, owner) = (scene.open(), scene.open());
    owner.create_ephemeral("own", &TopicOptions::default()).unwrap();
    let _keeps = owner.publisher(Topic::<[u8]>::new("own")).unwrap();
    let mut responder = bus.responder(Topic::new("service")).unwrap();
    let mut requester = owner.requester(Topic::new("service")).unwrap();
    let inboxes = || bus.topics().unwrap().into_iter().filter(|topic| topic.name.starts_with("_inbox.")).count();
    await_successors(&scene, kill_both(&scene));
    assert_eq!(inboxes(), 1);
    let serve = thread::spawn(move || {
        let request = responder.recv().unwrap();
        request.reply(b"answer").unwrap();
        responder
    });
    assert_eq!(&*requester.request(b"question", LIMIT).unwrap(), b"answer");
    drop(serve.join().unwrap());
    assert!(bus.topic("own").is_ok());
    drop((requester, _keeps, owner));
    assert!(bus.topic("own").is_err(), "it went with its owner");
    assert_eq!(inboxes(), 0);
}

#[test]
fn a_good_bye_counts_while_nobody_serves_yet() {
    let scene = Scene::new("leaver");
    let (bus, leaver) = (scene.open(), scene.open());
    let exclusive = || topic(Mode::Exclusive);
    let mut publisher = leaver.publisher(exclusive()).unwrap();
    publisher.publish(b"kept").unwrap();
    let mut subscriber = bus.subscriber(exclusive()).start(Start::Oldest).open().unwrap();
    // They gather for as long as it does not come.
    let stopped = start(&scene, "hold", "stopped", "held");
    stopped.signal(Signal::SIGSTOP);
    await_successors(&scene, kill_both(&scene));
    drop((publisher, leaver));
    // This process lives on, and so would its place.
    let mut again = bus.publisher(exclusive()).unwrap();
    again.publish(b"again").unwrap();
    assert_eq!(receive(&mut subscriber).1, b"kept");
    assert_eq!(receive(&mut subscriber).1, b"again");
}

#[test]
fn an_exec_is_noticed_after_both_were_killed() {
    let scene = Scene::new("exec");
    let bus = scene.open();
    let mut holder = start(&scene, "hold", "t", "held");
    let _reader = bus.subscriber(topic_of_holder("t")).open().unwrap();
    await_successors(&scene, kill_both(&scene));
    let all_here = || bus.report().is_ok_and(|report| report.participants.iter().all(|process| process.connected));
    await_that("both to come back", all_here);
    assert!(bus.publisher(topic_of_holder("t")).is_err());
    holder.tell("exec");
    await_that("the place of a program that is no more", || bus.publisher(topic_of_holder("t")).is_ok());
}
