//! `shmbus doctor` on buses that something is wrong with.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use common::{Scene, await_that, end_with_the_test, raw, say};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use shmbus::{Bus, Mode, PublishError, Start, Topic};

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, _)) = common::role() else { return };
    assert_eq!(role, "subscribe");
    end_with_the_test();
    let _subscriber = Bus::open_default().unwrap().subscriber(topic()).start(Start::Oldest).open().unwrap();
    say("subscribed");
    loop {
        std::thread::park();
    }
}

fn topic() -> Topic<[u8]> {
    raw(Mode::Exclusive, "doctor").messages(16).bytes(4096)
}

/// Exit code and findings about this directory; what is wrong with the machine is not ours.
fn examine(scene: &Scene) -> (i32, Vec<Value>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shmbus"));
    command.args(["doctor", "--json"]).env("SHMBUS_DIR", scene.directory()).env_remove("SHMBUS_BUS");
    let output = command.stdin(Stdio::null()).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let findings = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let machine = ["kernel", "limits", "memory"];
    let ours = findings.filter(|finding| !machine.contains(&finding["subject"].as_str().unwrap()));
    (output.status.code().unwrap(), ours.collect())
}

fn text(finding: &Value) -> (&str, &str, &str, &str) {
    let field = |name: &str| finding[name].as_str().unwrap();
    (field("severity"), field("subject"), field("finding"), field("mend"))
}

#[test]
fn a_healthy_bus_and_an_empty_directory_give_nothing() {
    let scene = Scene::new("healthy");
    assert_eq!(examine(&scene).1, Vec::<Value>::new());
    let bus = scene.open();
    let mut publisher = bus.publisher(topic()).unwrap();
    let _subscriber = bus.subscriber(topic()).open().unwrap();
    publisher.publish(b"x").unwrap();
    assert_eq!(examine(&scene).1, Vec::<Value>::new());
    assert_eq!(bus.report().unwrap().coordinator_pid as i32, scene.server("coordinator").as_raw());
    assert_eq!(bus.report().unwrap().keeper_pid.unwrap() as i32, scene.server("keeper").as_raw());
}

#[test]
fn a_stopped_reader_that_holds_a_full_ring_is_named() {
    let scene = Scene::new("blocked");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic()).unwrap();
    let mut subscriber = scene.start("subscribe", "");
    subscriber.expect("subscribed");
    let pid = subscriber.pid();
    subscriber.signal(Signal::SIGSTOP);
    while !matches!(publisher.try_publish(b"x"), Err(PublishError::Full { .. })) {}
    let (code, findings) = examine(&scene);
    assert_eq!((code, findings.len()), (1, 2), "{findings:?}");
    let (severity, _, finding, mend) = text(&findings[0]);
    assert_eq!((severity, finding), ("warning", &*format!("process {pid} is stopped and holds 1 places")));
    assert!(mend.contains(&format!("kill -CONT {pid}")), "{mend}");
    let (severity, subject, finding, _) = text(&findings[1]);
    assert_eq!((severity, subject), ("warning", "topic doctor.exclusive"));
    assert!(finding.starts_with(&format!("is full: subscriber 0 (process {pid}), which is stopped,")), "{finding}");
    subscriber.kill();
    await_that("its end", || examine(&scene).1.is_empty());
}

#[test]
fn a_stopped_server_is_named_and_not_waited_for() {
    let scene = Scene::new("stopped");
    let _bus = scene.open();
    for role in ["coordinator", "keeper"] {
        let pid = scene.server(role);
        kill(pid, Signal::SIGSTOP).unwrap();
        await_that("the stop", || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") T "));
        let started = std::time::Instant::now();
        let (code, findings) = examine(&scene);
        assert_eq!((code, findings.len()), (1, 1), "{findings:?}");
        let (severity, _, finding, mend) = text(&findings[0]);
        assert_eq!((severity, mend), ("error", &*format!("kill -CONT {pid}")), "{finding}");
        assert!(started.elapsed().as_secs() < 4);
        kill(pid, Signal::SIGCONT).unwrap();
    }
    await_that("health", || examine(&scene).1.is_empty());
}

#[test]
fn what_the_dead_left_and_an_open_directory_are_told() {
    let scene = Scene::new("stale");
    drop(scene.open());
    await_that("its end", || scene.servers(None).is_empty());
    fs::write(scene.directory().join("old.lock"), "").unwrap();
    let (code, findings) = examine(&scene);
    assert_eq!((code, findings.len()), (1, 1), "{findings:?}");
    let (severity, subject, finding, _) = text(&findings[0]);
    assert_eq!((severity, subject), ("warning", "bus old"));
    assert!(finding.contains("nobody serves it") && finding.contains("old.lock"), "{finding}");
    fs::set_permissions(scene.directory(), fs::Permissions::from_mode(0o777)).unwrap();
    let (_, findings) = examine(&scene);
    let (severity, subject, finding, mend) = text(&findings[0]);
    assert_eq!((severity, subject), ("error", "socket directory"));
    assert!(finding.contains("writable by others") && mend.contains("0700"), "{finding}; {mend}");
}
