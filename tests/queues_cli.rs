//! Groups, routes and dead letters through the command line, with processes that are killed.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, Random, Scene, await_that, seed};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use shmbus::{Envelope, Start, Topic};

/// Kills of routes.
const KILLS: usize = 30;

/// A command on the scene's bus; killed when its test gives up on it.
struct Shell(Child);

impl Shell {
    fn start(scene: &Scene, arguments: &[&str]) -> Shell {
        Shell(scene.shmbus(arguments).stdin(Stdio::piped()).spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }

    fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "process {} does not end", self.0.id());
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn stdout(mut self) -> String {
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        self.exit_code();
        text
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(scene: &Scene, arguments: &[&str]) -> Output {
    scene.shmbus(arguments).output().unwrap()
}

/// What a command that must succeed prints.
fn ok(scene: &Scene, arguments: &[&str]) -> String {
    let output = run(scene, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of a command that must fail with this code.
fn fails(scene: &Scene, code: i32, arguments: &[&str]) -> String {
    let output = run(scene, arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(text.lines().count() == 1 && text.starts_with("shmbus: "), "{arguments:?}: {text}");
    text
}

fn publish(scene: &Scene, arguments: &[&str], lines: &str) {
    let mut child = Shell::start(scene, &[&["pub"], arguments].concat());
    child.0.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert_eq!(child.exit_code(), Some(0));
}

/// `numbers(2, 4)`: "2\n3\n".
fn numbers(from: u32, to: u32) -> String {
    (from..to).map(|number| format!("{number}\n")).collect()
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn show(scene: &Scene, topic: &str) -> Value {
    serde_json::from_str(&ok(scene, &["show", topic, "--json"])).unwrap()
}

fn group(scene: &Scene, topic: &str, name: &str) -> Value {
    let groups = show(scene, topic)["groups"].take();
    groups.as_array().unwrap().iter().find(|group| group["group"] == name).unwrap_or(&Value::Null).clone()
}

#[test]
fn consumers_on_the_command_line_share_a_topic_and_acknowledge_what_they_wrote() {
    let scene = Scene::new("sub-group");
    ok(&scene, &["create", "work"]);
    ok(&scene, &["group", "create", "work", "g", "--from", "oldest"]);
    let consumers = [(); 2].map(|()| Shell::start(&scene, &["sub", "work", "--group", "g", "--idle-exit", "1500"]));
    await_that("both consumers", || group(&scene, "work", "g")["consumers"].as_array().unwrap().len() == 2);
    publish(&scene, &["work"], &numbers(0, 3000));
    let mut lines: Vec<u32> = consumers
        .into_iter()
        .flat_map(|c| c.stdout().lines().map(|l| l.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    lines.sort_unstable();
    assert_eq!(lines, (0..3000).collect::<Vec<_>>());
    assert_eq!(group(&scene, "work", "g")["floor"], 3000);
}

#[test]
fn count_takes_no_more_than_asked_and_says_which_attempt() {
    let scene = Scene::new("sub-count");
    publish(&scene, &["work"], &numbers(0, 10));
    assert_eq!(ok(&scene, &["sub", "work", "--group", "g", "--from", "oldest", "--count", "3"]), numbers(0, 3));
    let status = group(&scene, "work", "g");
    assert_eq!((&status["floor"], &status["in_flight"], &status["returned"]), (&3.into(), &0.into(), &0.into()));
    let rest = json_lines(&ok(&scene, &["sub", "work", "--group", "g", "--count", "7", "--json"]));
    assert!(rest.iter().all(|line| line["attempt"] == 1), "{rest:?}");
    assert_eq!(rest[0]["sequence"], 3);
}

#[test]
fn what_was_not_written_goes_back_to_the_group() {
    let scene = Scene::new("sub-closed");
    ok(&scene, &["create", "work"]);
    ok(&scene, &["group", "create", "work", "g", "--from", "oldest"]);
    // Standard output is closed before there is anything to write.
    let mut reader_gone = Shell::start(&scene, &["sub", "work", "--group", "g"]);
    drop(reader_gone.0.stdout.take());
    publish(&scene, &["work"], &numbers(0, 5));
    assert_eq!(reader_gone.exit_code(), Some(0));
    assert_eq!(group(&scene, "work", "g")["floor"], 0);
    let again = json_lines(&ok(&scene, &["sub", "work", "--group", "g", "--count", "5", "--json"]));
    assert_eq!(again.iter().map(|line| line["payload"].as_str().unwrap()).collect::<String>(), numbers(0, 5));

    // Nobody reads the pipe: what does not fit into it is in hand when Ctrl-C comes.
    let mut stuck = Shell::start(&scene, &["sub", "work", "--group", "g"]);
    publish(&scene, &["work", "--chunk", "64K"], &"x".repeat(10 * 65_536));
    await_that("messages in hand", || group(&scene, "work", "g")["in_flight"].as_u64().unwrap() > 0);
    stuck.signal(Signal::SIGINT);
    assert_eq!(stuck.exit_code(), Some(130));
    await_that("the leases to come back", || group(&scene, "work", "g")["in_flight"] == 0);
    assert!(group(&scene, "work", "g")["lag"].as_u64().unwrap() > 0);
}

#[test]
fn groups_begin_at_a_time_and_go_back_to_one() {
    let scene = Scene::new("group-time");
    ok(&scene, &["create", "t", "--envelope"]);
    publish(&scene, &["t"], "old\n");
    ok(&scene, &["group", "create", "t", "all", "--from", "time:-1h"]);
    ok(&scene, &["group", "create", "t", "none", "--from", "time:-1ms"]);
    assert_eq!([&group(&scene, "t", "all")["floor"], &group(&scene, "t", "none")["floor"]], [0, 1]);
    publish(&scene, &["t"], "new\n");
    let sub = ["sub", "t", "--idle-exit", "300", "--group"];
    assert_eq!(ok(&scene, &[&sub[..], &["none"]].concat()), "new\n");
    ok(&scene, &["group", "rewind", "t", "none", "--to", "time:-1h"]);
    assert_eq!(ok(&scene, &[&sub[..], &["none"]].concat()), "old\nnew\n");
    assert_eq!(ok(&scene, &[&sub[..], &["other", "--from", "time:-1h"]].concat()), "old\nnew\n");
    assert_eq!(show(&scene, "t")["subscribers"].as_array().map(Vec::len), Some(0), "the search leaves nothing behind");
}

#[test]
fn queue_names_of_activemq_are_groups() {
    let scene = Scene::new("virtual");
    publish(&scene, &["VirtualTopic.orders"], &numbers(0, 4));
    for queue in ["Consumer.a.VirtualTopic.orders", "Consumer.b.VirtualTopic.orders"] {
        assert_eq!(ok(&scene, &["sub", queue, "--from", "oldest", "--count", "4"]), numbers(0, 4), "{queue}");
    }
    assert_eq!(group(&scene, "VirtualTopic.orders", "b")["floor"], 4);
    fails(&scene, 2, &["sub", "Consumer.a.VirtualTopic.orders", "--group", "b"]);
}

#[test]
fn a_route_copies_what_its_filters_let_through_with_all_that_goes_with_it() {
    let scene = Scene::new("route");
    ok(&scene, &["create", "in", "--envelope"]);
    for (key, header, lines) in [("c-1", "h=x1", "a yes\n"), ("c-2", "h=y", "b yes\n"), ("d-1", "h=x", "c yes\n")] {
        publish(&scene, &["in", "--key", key, "--header", header], lines);
    }
    publish(&scene, &["in", "--key", "c-3", "--header", "h=x3"], "d no\n");
    let arguments = ["route", "in", "out", "--from", "oldest", "--count", "4", "--json"];
    let filters = ["--filter", "key=c-*", "--filter", "header:h=x*", "--filter", "contains=yes"];
    let summary = &json_lines(&ok(&scene, &[&arguments[..], &filters].concat()))[0];
    assert_eq!(
        (&summary["routed"], &summary["filtered"], &summary["group"]),
        (&1.into(), &3.into(), &"route.out".into())
    );
    let copies = json_lines(&ok(&scene, &["peek", "out", "--json"]));
    assert_eq!(copies.len(), 1);
    assert_eq!((&copies[0]["key"], &copies[0]["payload"]), (&"c-1".into(), &"a yes\n".into()));
    let headers = &copies[0]["headers"];
    assert_eq!(
        (&headers["h"], &headers["origin-topic"], &headers["origin-sequence"]),
        (&"x1".into(), &"in".into(), &"0".into())
    );
    // It goes on where it was, also without --from.
    publish(&scene, &["in", "--key", "c-4", "--header", "h=x"], "yes\n");
    ok(&scene, &[&["route", "in", "out", "--count", "1"][..], &filters].concat());
    assert_eq!(json_lines(&ok(&scene, &["peek", "out", "--json"])).len(), 2);
}

#[test]
fn a_route_of_a_pattern_takes_topics_that_come_later_and_survives_a_rewind() {
    let scene = Scene::new("route-pattern");
    publish(&scene, &["orders.a"], &numbers(0, 3));
    let mut route = Shell::start(&scene, &["route", "orders.*", "all", "--from", "oldest"]);
    await_that("the first topic's", || run(&scene, &["peek", "all"]).stdout == numbers(0, 3).as_bytes());
    publish(&scene, &["orders.b"], &numbers(3, 6));
    await_that("the second topic's", || run(&scene, &["peek", "all"]).stdout == numbers(0, 6).as_bytes());
    fails(&scene, 1, &["group", "rewind", "orders.a", "route.all", "--to", "oldest"]);
    ok(&scene, &["group", "rewind", "orders.a", "route.all", "--to", "oldest", "--force"]);
    let all = numbers(0, 6) + &numbers(0, 3);
    await_that("the first topic's once more", || run(&scene, &["peek", "all"]).stdout == all.as_bytes());
    route.signal(Signal::SIGINT);
    assert_eq!(route.exit_code(), Some(130));
    assert_eq!(route.stdout().trim(), "orders.* to all: routed 9, reopened 1");
}

/// A small ring without a reader would keep the newest alone; whoever publishes waits for the route instead.
#[test]
fn a_route_of_a_pattern_misses_nothing_of_a_topic_that_comes_later() {
    const MESSAGES: u32 = 3000;
    const TOPICS: usize = 5;
    let scene = Scene::new("route-arrivals");
    let bus = scene.open();
    bus.create(&Topic::<[u8]>::named("all").envelope().messages(16_384)).unwrap();
    let _route = Shell::start(&scene, &["route", "orders.*", "all"]);
    // It has begun when it has routed something, which needs the first topic.
    bus.create(&Topic::<[u8]>::new("orders.first")).unwrap();
    await_that("the route", || !bus.topic("orders.first").unwrap().groups.is_empty());
    let mut random = Random::new(seed());
    for round in 0..TOPICS {
        let coordinator = (round % 3 == 2).then(|| scene.server("coordinator"));
        let mut publisher = bus.publisher(Topic::<[u8]>::named(format!("orders.{round}")).messages(16)).unwrap();
        let killing = coordinator.map(|pid| {
            let pause = Duration::from_micros(random.below(3_000));
            thread::spawn(move || {
                thread::sleep(pause);
                kill(pid, Signal::SIGKILL).unwrap();
            })
        });
        for number in 0..MESSAGES {
            publisher.publish_timeout(format!("{round} {number}").as_bytes(), LIMIT).unwrap();
        }
        killing.into_iter().for_each(|killing| killing.join().unwrap());
    }
    let mut copies = bus.subscriber(Topic::<[u8]>::new("all")).start(Start::Oldest).open().unwrap();
    let mut next = [0; TOPICS];
    for _ in 0..TOPICS as u32 * MESSAGES {
        let copy = copies.recv_timeout(LIMIT).unwrap();
        let text = String::from_utf8(copy.to_vec()).unwrap();
        let (round, number) = text.split_once(' ').unwrap();
        let next = &mut next[round.parse::<usize>().unwrap()];
        assert_eq!(number.parse(), Ok(*next), "{text}: something is missing before it");
        *next += 1;
    }
    let subscribers = |topic: &str| bus.topic(topic).unwrap().subscribers.len();
    await_that("its cursors to go", || (0..TOPICS).all(|round| subscribers(&format!("orders.{round}")) == 0));
}

#[test]
fn what_cannot_be_copied_goes_to_the_dead_letters() {
    let scene = Scene::new("route-large");
    ok(&scene, &["create", "small", "--bytes", "4K"]);
    publish(&scene, &["in", "--chunk", "20K"], &"x".repeat(20_000));
    publish(&scene, &["in"], "fits\n");
    let summary =
        &json_lines(&ok(&scene, &["route", "in", "small", "--from", "oldest", "--idle-exit", "500", "--json"]))[0];
    assert_eq!((&summary["routed"], &summary["rejected"]), (&1.into(), &1.into()));
    assert_eq!(ok(&scene, &["peek", "small"]), "fits\n");
    let letters = json_lines(&ok(&scene, &["dlq", "show", "dlq.in.route.small", "--json"]));
    assert!(letters[0]["reason"].as_str().unwrap().contains("20000 bytes"), "{letters:?}");
}

#[test]
fn a_route_of_repeats_copies_each_id_once_and_counts_the_others() {
    let scene = Scene::new("route-ids");
    ok(&scene, &["create", "in", "--envelope"]);
    ok(&scene, &["create", "out", "--envelope", "--dedup"]);
    let bus = scene.open();
    let mut publisher = bus.publisher(Topic::<[u8]>::new("in").envelope()).unwrap();
    for id in ["a", "b", "a", "a", "c"] {
        publisher.publish_with(id.as_bytes(), &shmbus::Envelope::new().id(id.as_bytes())).unwrap();
    }
    let summary =
        &json_lines(&ok(&scene, &["route", "in", "out", "--from", "oldest", "--idle-exit", "300", "--json"]))[0];
    assert_eq!((&summary["routed"], &summary["duplicates"]), (&3.into(), &2.into()));
    let copies = json_lines(&ok(&scene, &["peek", "out", "--json"]));
    assert_eq!(copies.iter().map(|copy| copy["payload"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(group(&scene, "in", "route.out")["floor"], 5);
}

#[test]
fn each_message_is_copied_once_though_routes_are_killed() {
    let scene = Scene::new("route-kills");
    let mut random = Random::new(seed());
    for topic in ["in", "out"] {
        ok(&scene, &["create", topic, "--messages", "16384"]);
    }
    ok(&scene, &["group", "create", "in", "route.out", "--guarantee", "effectively-once", "--from", "oldest"]);
    let start = || Shell::start(&scene, &["route", "in", "out"]);
    let mut routes = [start(), start()];
    for round in 0..KILLS as u32 {
        publish(&scene, &["in"], &numbers(round * 500, round * 500 + 500));
        thread::sleep(Duration::from_micros(random.below(8_000)));
        let victim = &mut routes[random.below(2) as usize];
        victim.signal(Signal::SIGKILL);
        *victim = start();
    }
    let total = KILLS as u32 * 500;
    await_that("all to be routed", || group(&scene, "in", "route.out")["floor"] == total);
    let bus = scene.open();
    let mut copies = bus.subscriber(Topic::<[u8]>::named("out")).start(Start::Oldest).open().unwrap();
    let mut times = BTreeMap::<u32, u32>::new();
    while let Some(copy) = copies.try_recv().unwrap() {
        *times.entry(String::from_utf8(copy.to_vec()).unwrap().trim().parse().unwrap()).or_default() += 1;
    }
    let wrong: Vec<_> = times.iter().filter(|(_, times)| **times != 1).collect();
    assert!(wrong.is_empty(), "copied more than once: {wrong:?}");
    assert_eq!(times.len() as u32, total, "some were not copied");
}

#[test]
fn dead_letters_are_listed_shown_and_moved_back_once() {
    let scene = Scene::new("dlq");
    let bus = scene.open();
    let topic = Topic::<[u8]>::named("orders").envelope();
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut consumer = bus.consumer(topic.clone(), "billing").open().unwrap();
    let mut subscriber = bus.subscriber(topic).open().unwrap();
    for number in 0..4u32 {
        let envelope = Envelope::new().key(b"customer").header("h", b"v");
        publisher.publish_with(format!("order {number}").as_bytes(), &envelope).unwrap();
        consumer.recv().unwrap().reject("no such customer").unwrap();
        subscriber.recv().unwrap();
    }
    let listed = json_lines(&ok(&scene, &["dlq", "ls", "--json"]));
    let place = listed.iter().find(|place| place["topic"] == "dlq.orders.billing").unwrap();
    assert_eq!((&place["waiting"], &place["groups"][0]["group"]), (&4.into(), &"billing".into()));
    assert_eq!(group(&scene, "dlq.orders.billing", "dlq")["lag"], 4);
    // Looking changes nothing; nor does a subscriber that reads them.
    for _ in 0..2 {
        let letters = json_lines(&ok(&scene, &["dlq", "show", "dlq.orders.billing", "--json", "--count", "2"]));
        assert_eq!(letters.len(), 2);
        let letter = &letters[1];
        assert_eq!((&letter["reason"], &letter["attempts"]), (&"no such customer".into(), &1.into()));
        assert_eq!((&letter["origin_topic"], &letter["origin_group"]), (&"orders".into(), &"billing".into()));
        assert_eq!((&letter["origin_sequence"], &letter["payload"]), (&1.into(), &"order 1".into()));
        ok(&scene, &["sub", "dlq.orders.billing", "--from", "oldest", "--count", "4"]);
    }
    assert!(ok(&scene, &["dlq", "ls"]).contains("orders/billing"));
    assert!(ok(&scene, &["dlq", "show", "dlq.orders.billing"]).contains("no such customer"));

    let first = json_lines(&ok(&scene, &["dlq", "retry", "dlq.orders.billing", "--count", "1", "--json"]));
    assert_eq!((&first[0]["retried"], &first[0]["origin_topic"]), (&1.into(), &"orders".into()));
    ok(&scene, &["dlq", "retry", "dlq.orders.billing"]);
    assert!(ok(&scene, &["dlq", "retry", "dlq.orders.billing"]).starts_with("no messages wait"));
    for number in 0..4u32 {
        let delivery = consumer.recv_timeout(LIMIT).unwrap();
        let headers: Vec<_> = delivery.headers().map(|(name, value)| (name.to_owned(), value.to_vec())).collect();
        let expected = [("h", &b"v"[..]), ("retried-from", b"dlq.orders.billing")];
        assert_eq!(headers, expected.map(|(name, value)| (name.to_owned(), value.to_vec())));
        assert_eq!(
            (delivery.as_bytes(), delivery.key()),
            (format!("order {number}").as_bytes(), Some(&b"customer"[..]))
        );
        delivery.ack().unwrap();
        assert_eq!(subscriber.recv_timeout(LIMIT).unwrap().as_bytes(), format!("order {number}").as_bytes());
    }
    assert!(consumer.try_recv().unwrap().is_none(), "moved back twice");
    let waiting = json_lines(&ok(&scene, &["dlq", "ls", "--json"]));
    assert_eq!(waiting.iter().find(|p| p["topic"] == "dlq.orders.billing").unwrap()["waiting"], 0);
}

#[test]
fn what_has_nowhere_to_go_stays_with_the_dead_letters() {
    let scene = Scene::new("dlq-stays");
    let bus = scene.open();
    let topic = Topic::<[u8]>::named("gone");
    bus.publisher(topic.clone()).unwrap().publish(b"x").unwrap();
    let mut consumer = bus.consumer(topic, "g").start(Start::Oldest).open().unwrap();
    consumer.recv().unwrap().reject("").unwrap();
    drop(consumer);
    bus.remove_topic("gone", true).unwrap();
    assert!(fails(&scene, 1, &["dlq", "retry", "dlq.gone.g"]).contains("1 of 1 messages stayed"));
    publish(&scene, &["dlq.plain"], "x\n");
    assert!(fails(&scene, 1, &["dlq", "retry", "dlq.plain"]).contains("name no topic"));
    assert_eq!(json_lines(&ok(&scene, &["dlq", "show", "dlq.plain", "--json"]))[0]["reason"], Value::Null);
    assert_eq!(json_lines(&ok(&scene, &["dlq", "ls", "--json"])).len(), 2);
}

#[test]
fn wrong_use_of_queues_gets_one_line() {
    let scene = Scene::new("queues-wrong");
    ok(&scene, &["create", "t"]);
    ok(&scene, &["create", "channel", "--mode", "channel"]);
    ok(&scene, &["create", "over", "--full", "overwrite"]);
    ok(&scene, &["create", "b"]);
    ok(&scene, &["group", "create", "t", "route.b"]);
    for usage in [
        &["sub", "t.*", "--group", "g"][..],
        &["sub", "t", "--group", "g/h"],
        &["group", "create", "t", "g", "--lease", "0s"],
        &["group", "create", "t", "g", "--unknown"],
        &["group", "create", "t", "ö"],
        &["route", "t", "x", "--filter", "size=3"],
        &["route", "t", "x.*"],
        &["dlq", "show"],
    ] {
        fails(&scene, 2, usage);
    }
    for (refused, why) in [
        (&["sub", "nowhere", "--group", "g"][..], "unknown topic"),
        (&["sub", "channel", "--group", "g"], "a channel has one reader"),
        (&["sub", "over", "--group", "g"], "overwrites"),
        (&["sub", "t", "--group", "g", "--from", "time:5"], "create it with --envelope"),
        (&["group", "create", "t", "g", "--from", "time:99999999999"], "still to come"),
        (&["group", "rewind", "t", "route.b", "--to", "time:-1s"], "create it with --envelope"),
        (&["group", "create", "t", "g", "--from", "last-per-key"], "a group delivers everything"),
        (&["group", "create", "t", "g", "--dead-letter", "t"], "and from there back"),
        (&["group", "create", "t", "g", "--window", "100"], "power of two"),
        (&["group", "rewind", "t", "nobody", "--to", "oldest"], "has no group"),
        (&["group", "rm", "t", "nobody"], "has no group"),
        (&["route", "nowhere", "x"], "unknown topic"),
        (&["route", "t", "t"], "never end"),
        (&["route", ">", "x"], "never end"),
        (&["route", "b", "t"], "group rm t route.b"),
        (&["dlq", "show", "nowhere"], "unknown topic"),
        (&["dlq", "retry", "channel"], "channel"),
    ] {
        let line = fails(&scene, 1, refused);
        assert!(line.contains(why), "{refused:?}: {line}");
    }
    let _live = Shell::start(&scene, &["sub", "t", "--group", "live"]);
    await_that("the consumer", || group(&scene, "t", "live")["consumers"].as_array().is_some_and(|c| c.len() == 1));
    for attempt in [&["group", "rewind", "t", "live", "--to", "0"][..], &["group", "rm", "t", "live"]] {
        assert!(fails(&scene, 1, attempt).contains("is in use by process"), "{attempt:?}");
    }
}
