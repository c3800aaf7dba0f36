//! Who counts as dead, with real processes: whoever cannot write any more, and nobody else.

mod common;

use std::fs;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{LIMIT, Scene, await_that, hear, publisher_after, raw, receive, say};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::{ForkResult, Pid, fork, pause};
use shmbus::{Bus, Mode, OpenError, Refusal, Start, Topic};

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, _)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "hold" => hold(bus),
        "hold everything" => hold_everything(bus),
        other => panic!("no role {other}"),
    }
}

fn topic() -> Topic<[u8]> {
    raw(Mode::Exclusive, "liveness").messages(16).bytes(4096)
}

/// Role: holds the topic's one publisher, and does what it is told.
fn hold(bus: Bus) {
    let mut handles = Some((bus.publisher(topic()).unwrap(), bus));
    say("holding");
    loop {
        match hear().as_str() {
            "publish" => {
                let (publisher, _) = handles.as_mut().unwrap();
                say(&publisher.publish(b"alive").unwrap().to_string());
            }
            "ask" => {
                let (_, bus) = handles.as_ref().unwrap();
                say(&bus.topics().map_or_else(|error| error.to_string(), |topics| topics.len().to_string()));
            }
            "drop" => {
                drop(handles.take());
                say("dropped");
            }
            "close the socket" => {
                close_sockets();
                say("closed");
            }
            "fork" => match unsafe_fork() {
                ForkResult::Child => loop {
                    pause();
                },
                ForkResult::Parent { child } => say(&child.to_string()),
            },
            "exec" => panic!("{}", Command::new("sleep").arg("1000").exec()),
            "exit" => std::process::exit(0),
            other => panic!("{other}"),
        }
    }
}

/// Role: holds a place of every kind that a group, a pattern or a requester takes, and a lease.
fn hold_everything(bus: Bus) {
    let work = || Topic::<[u8]>::new("work");
    let mut consumer = bus.consumer(work(), "g").start(Start::Oldest).open().unwrap();
    let pipeline = bus.pipeline(work(), "p", Topic::<[u8]>::new("out")).start(Start::Oldest).open().unwrap();
    let wildcard = bus.wildcard::<[u8]>("*").open().unwrap();
    let requester = bus.requester(Topic::new("service")).unwrap();
    let lease = consumer.recv().unwrap().keep();
    say("holding");
    let mut handles = Some((consumer, lease, pipeline, wildcard, requester, bus));
    loop {
        match hear().as_str() {
            "drop" => {
                drop(handles.take());
                say("dropped");
            }
            "hang up" => {
                sockets().into_iter().for_each(|socket| shutdown(socket, Shutdown::Both).unwrap());
                say("hung up");
            }
            "exec" => panic!("{}", Command::new("sleep").arg("1000").exec()),
            other => panic!("{other}"),
        }
    }
}

/// Consumers, leases, publishers of outputs, cursors on "work", inboxes.
fn places(bus: &Bus) -> [u64; 5] {
    let topics = bus.topics().unwrap();
    let groups = || topics.iter().flat_map(|topic| &topic.groups);
    let of = |name: &str| topics.iter().find(|topic| topic.name == name);
    [
        groups().map(|group| group.consumers.len() as u64).sum(),
        groups().map(|group| group.in_flight).sum(),
        of("out").map_or(0, |topic| topic.publishers.len() as u64),
        of("work").map_or(0, |topic| topic.subscribers.len() as u64),
        topics.iter().filter(|topic| topic.name.starts_with("_inbox.")).count() as u64,
    ]
}

#[test]
fn every_kind_of_place_goes_by_good_bye_or_proof_and_not_by_a_hang_up() {
    for end in ["drop", "kill", "exec"] {
        let scene = Scene::new("everything");
        let bus = scene.open();
        let mut publisher = bus.publisher(Topic::<[u8]>::new("work")).unwrap();
        publisher.publish(b"one").unwrap();
        let mut holder = scene.start("hold everything", "");
        holder.expect("holding");
        let held = [2, 1, 1, 1, 1];
        assert_eq!(places(&bus), held);
        if end != "drop" {
            // It would come back at once.
            scene.hide();
            holder.tell("hang up");
            holder.expect("hung up");
            let lost = || bus.report().unwrap().participants.iter().any(|participant| !participant.connected);
            await_that("the hang-up", lost);
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(places(&bus), held, "it can still write");
        }
        match end {
            "drop" => {
                holder.tell("drop");
                holder.expect("dropped");
                assert_eq!(places(&bus), [0; 5], "given back before the drop returned");
            }
            "kill" => holder.signal(Signal::SIGKILL),
            _ => holder.tell("exec"),
        }
        await_that("its places", || places(&bus) == [0; 5]);
        let mut consumer = bus.consumer(Topic::<[u8]>::new("work"), "g").open().unwrap();
        let again = consumer.recv_timeout(LIMIT).unwrap();
        assert_eq!((&*again, again.attempt()), (&b"one"[..], 2), "{end}");
    }
}

fn unsafe_fork() -> ForkResult {
    // SAFETY: the child does nothing but wait for signals.
    unsafe { fork() }.unwrap()
}

/// Closes the bus's descriptors as a program does that "closes everything it does not know". The thread that watches over the
/// connection sleeps on it, so it stays open until the program asks for something.
fn close_sockets() {
    sockets().into_iter().for_each(|socket| nix::unistd::close(socket).unwrap());
}

fn sockets() -> Vec<RawFd> {
    let entries = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap());
    let is_socket = |path: &Path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
    let sockets = entries.filter(|entry| is_socket(&entry.path()));
    sockets.map(|entry| entry.file_name().to_str().unwrap().parse().unwrap()).collect()
}

fn is_taken(bus: &Bus) -> bool {
    match bus.publisher(topic()) {
        Err(OpenError::Refused(Refusal::Taken { .. })) => true,
        Ok(_) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_good_bye_releases_at_once() {
    let scene = Scene::new("goodbye");
    let bus = scene.open();
    let mut holder = scene.start("hold", "");
    holder.expect("holding");
    assert!(is_taken(&bus));
    holder.tell("drop");
    holder.expect("dropped");
    assert!(!is_taken(&bus), "given back before the drop returned");
}

#[test]
fn a_good_bye_that_died_with_a_stopped_coordinator_is_said_again() {
    for roles in [&["coordinator"][..], &["keeper", "coordinator"]] {
        let scene = Scene::new("unheard");
        let bus = scene.open();
        let mut holder = scene.start("hold", "");
        holder.expect("holding");
        let stopped: Vec<Pid> = roles.iter().map(|role| scene.server(role)).collect();
        stopped.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
        holder.tell("drop");
        holder.expect("dropped");
        stopped.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).unwrap());
        // The holder lives on, and so would its place.
        drop(publisher_after(&bus, &topic()));
        holder.kill();
    }
}

#[test]
fn a_living_process_that_hung_up_keeps_its_places_and_may_come_back() {
    let scene = Scene::new("hungup");
    let bus = scene.open();
    let mut holder = scene.start("hold", "");
    holder.expect("holding");
    let mut subscriber = bus.subscriber(topic()).open().unwrap();
    holder.tell("close the socket");
    holder.expect("closed");
    for sequence in 0..3 {
        assert!(is_taken(&bus), "it can still write");
        holder.tell("publish");
        holder.expect(&sequence.to_string());
        assert_eq!(receive(&mut subscriber), (sequence, b"alive".to_vec()));
    }
    holder.tell("ask");
    holder.expect("1");
    assert!(is_taken(&bus), "it came back as itself");
    holder.tell("close the socket");
    holder.expect("closed");
    holder.kill();
    drop(publisher_after(&bus, &topic()));
}

#[test]
fn a_process_that_executes_another_program_has_left() {
    let scene = Scene::new("exec");
    let bus = scene.open();
    let mut holder = scene.start("hold", "");
    holder.expect("holding");
    holder.tell("exec");
    drop(publisher_after(&bus, &topic()));
    assert!(fs::read_to_string(format!("/proc/{}/comm", holder.pid())).unwrap().starts_with("sleep"), "it lives");
}

#[test]
fn an_exec_is_noticed_though_the_coordinator_was_killed_before_it() {
    let scene = Scene::new("exec");
    let bus = scene.open();
    let mut holder = scene.start("hold", "");
    holder.expect("holding");
    let coordinator = scene.server("coordinator");
    kill(coordinator, Signal::SIGKILL).unwrap();
    await_that("its successor", || scene.servers(Some("coordinator")).iter().any(|pid| *pid != coordinator));
    assert!(is_taken(&bus));
    holder.tell("exec");
    drop(publisher_after(&bus, &topic()));
}

#[test]
fn who_exits_without_dropping_anything_has_left() {
    let scene = Scene::new("exit");
    let bus = scene.open();
    let mut holder = scene.start("hold", "");
    holder.expect("holding");
    holder.tell("exit");
    drop(publisher_after(&bus, &topic()));
}

#[test]
fn a_child_that_survives_does_not_keep_its_parents_places() {
    let scene = Scene::new("orphan");
    let bus = scene.open();
    let mut holder = scene.start("hold", "");
    holder.expect("holding");
    holder.tell("fork");
    let child = Pid::from_raw(holder.line().parse().unwrap());
    holder.kill();
    drop(publisher_after(&bus, &topic()));
    kill(child, Signal::SIGKILL).expect("it lives, and has its parent's socket");
}

#[test]
fn a_participant_in_another_pid_namespace_is_watched_like_any_other() {
    let inside = ["unshare", "--pid", "--fork", "--kill-child"];
    if !Command::new(inside[0]).args(&inside[1..]).arg("true").status().is_ok_and(|status| status.success()) {
        println!("skipped: no pid namespaces for us here");
        return;
    }
    let scene = Scene::new("namespace");
    let bus = scene.open();
    for end in ["kill", "exec", "drop"] {
        let mut holder = scene.start_inside(&inside, "hold", "");
        holder.expect("holding");
        let pid = bus.topic(topic().name()).unwrap().publishers[0].pid;
        assert_ne!(pid, holder.pid().as_raw() as u32, "the process inside, not its starter");
        match end {
            "kill" => kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap(),
            command => holder.tell(command),
        }
        drop(publisher_after(&bus, &topic()));
        // What lives in there yet would outlive its starter.
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
}
