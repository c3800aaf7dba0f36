//! What clients give up while the coordinator is stopped does not stay taken when it goes on, and takes nothing of others along when
//! it is killed.

mod common;

use std::fs;
use std::time::Duration;

use common::{Scene, await_that, hear, publisher_after, raw, receive, say, small};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::{Bus, Mode, Topic, TopicOptions};

/// More packets than fit in a socket, twice.
const MANY: usize = 700;

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, _)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "ask" => {
            // It has a handle, and so a reason to live on.
            let _held = bus.publisher(raw(Mode::Exclusive, "other")).unwrap();
            say("ready");
            hear();
            say(&bus.publisher(topic()).map_or_else(|_| "given up".to_owned(), |_| "granted".to_owned()));
            hear();
        }
        "read much" => {
            // As many to a topic as may be.
            let topics = (0..MANY).map(|number| small(&format!("read.{}", number / 256)));
            let open = |topic: Topic<[u8]>| {
                bus.create_topic(topic.name(), &topic.options(), true).unwrap();
                bus.subscriber(topic).open().unwrap()
            };
            let readers: Vec<_> = topics.map(open).collect();
            give_up((readers, bus.publisher(raw(Mode::Exclusive, "other")).unwrap()), |(readers, _)| {
                drop(readers.drain(..))
            });
        }
        "leave" => give_up(Some((bus.publisher(topic()).unwrap(), bus)), |held| drop(held.take())),
        "leave a topic" => {
            let mut publisher = bus.publisher(small("shared")).unwrap();
            publisher.publish(b"from the leaver").unwrap();
            give_up(Some((publisher, bus)), |held| drop(held.take()));
        }
        "leave one topic" => {
            let _held = bus.publisher(topic()).unwrap();
            let mut publisher = bus.publisher(small("shared")).unwrap();
            publisher.publish(b"from the leaver").unwrap();
            give_up(Some(publisher), |held| drop(held.take()));
        }
        "ask in threads" => {
            say("ready");
            hear();
            let open = || assert!(bus.publisher(topic()).is_err());
            std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(open))));
            say("given up");
            hear();
        }
        "leave unread" => give_up(Some((bus.wildcard::<[u8]>("*").open().unwrap(), bus)), |held| drop(held.take())),
        other => panic!("no role {other}"),
    }
}

/// Role: holds something, gives it up when it is told to, and lives on.
fn give_up<H>(mut held: H, drop: impl FnOnce(&mut H)) {
    say("ready");
    hear();
    drop(&mut held);
    say("given up");
    hear();
}

fn topic() -> Topic<[u8]> {
    raw(Mode::Exclusive, "halts").messages(16).bytes(4096)
}

/// A process that has given up what its role says while the coordinator was stopped, which has gone on.
fn given_up_during_a_halt(scene: &Scene, role: &str, prepare: impl FnOnce()) -> common::Process {
    let mut process = scene.start(role, "");
    process.expect("ready");
    prepare();
    let coordinator = scene.server("coordinator");
    kill(coordinator, Signal::SIGSTOP).unwrap();
    process.tell("give up");
    process.expect("given up");
    kill(coordinator, Signal::SIGCONT).unwrap();
    process
}

fn watches(pid: Pid) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.into_iter().any(|name| name.trim_end() == "shmbus-watch")
}

#[test]
fn an_open_that_was_given_up_takes_nothing_when_it_is_granted_late() {
    let scene = Scene::new("late");
    let bus = scene.open();
    let asker = given_up_during_a_halt(&scene, "ask", || {});
    // Let the grant come first.
    std::thread::sleep(Duration::from_millis(100));
    drop(publisher_after(&bus, &topic()));
    asker.kill();
}

#[test]
fn handles_for_whose_closing_there_was_no_room_are_closed() {
    let scene = Scene::new("unsent");
    let bus = scene.open();
    let reader = given_up_during_a_halt(&scene, "read much", || {});
    await_that("their places", || bus.topics().unwrap().iter().all(|topic| topic.subscribers.is_empty()));
    reader.kill();
}

#[test]
fn who_has_said_good_bye_twice_is_done_with_it() {
    let scene = Scene::new("twice");
    let bus = scene.open();
    let leaver = given_up_during_a_halt(&scene, "leave", || {});
    drop(publisher_after(&bus, &topic()));
    await_that("the end of its thread", || !watches(leaver.pid()));
    leaver.kill();
}

#[test]
fn a_good_bye_behind_what_was_not_read_is_heard() {
    let scene = Scene::new("unread");
    let bus = scene.open();
    let leaver = given_up_during_a_halt(&scene, "leave unread", || {
        let options = TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() };
        (0..MANY).for_each(|number| assert!(!bus.create_topic(&format!("t{number}"), &options, false).unwrap()));
    });
    await_that("its places", || bus.topics().unwrap().iter().all(|topic| topic.subscribers.is_empty()));
    leaver.kill();
}

#[test]
fn who_leaves_a_topic_while_both_are_stopped_and_killed_does_not_take_it_along() {
    for role in ["leave a topic", "leave one topic"] {
        let scene = Scene::new("both");
        let bus = scene.open();
        let mut publisher = bus.publisher(small("shared")).unwrap();
        let mut leaver = scene.start(role, "");
        leaver.expect("ready");
        let stopped = ["keeper", "coordinator"].map(|role| scene.server(role));
        stopped.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
        leaver.tell("give up");
        leaver.expect("given up");
        stopped.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).unwrap());
        await_that("its place to be free", || bus.topic("shared").unwrap().publishers.len() == 1);
        let mut subscriber = bus.subscriber(small("shared")).open().unwrap();
        publisher.publish(b"goes on").unwrap();
        assert_eq!(receive(&mut subscriber).1, b"goes on", "{role}");
        leaver.kill();
    }
}

#[test]
fn who_asks_behind_others_waits_no_longer_than_they() {
    let scene = Scene::new("threads");
    let _bus = scene.open();
    let mut asker = scene.start("ask in threads", "");
    asker.expect("ready");
    let coordinator = scene.server("coordinator");
    kill(coordinator, Signal::SIGSTOP).unwrap();
    asker.tell("ask");
    // Ten seconds, and not for each of them.
    assert_eq!(asker.line_within(Duration::from_secs(18)), "given up");
    asker.kill();
}
