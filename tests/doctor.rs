//! `shmbus doctor` on buses that something is wrong with.

mod common;

use std::any::Any;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Scene, await_that, end_with_the_test, raw, say};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use shmbus::{Bus, GroupOptions, Mode, PublishError, Start, Topic};

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, _)) = common::role() else { return };
    end_with_the_test();
    let bus = Bus::open_default().unwrap();
    let _holder: Box<dyn Any> = match role.as_str() {
        "subscribe" => Box::new(bus.subscriber(topic()).start(Start::Oldest).open().unwrap()),
        "publish" => {
            let mut publisher = bus.publisher(topic()).unwrap();
            (0..4).for_each(|_| assert!(publisher.publish(b"x").is_ok()));
            Box::new(publisher)
        }
        "consume" => {
            let mut consumer = bus.consumer(topic(), "g").open().unwrap();
            let leases = [consumer.recv().unwrap().keep(), consumer.recv().unwrap().keep()];
            Box::new((consumer, leases))
        }
        other => panic!("no role {other}"),
    };
    say("holding");
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
    subscriber.expect("holding");
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
fn a_group_that_holds_a_full_ring_is_named_with_its_consumer() {
    let scene = Scene::new("groups");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic()).unwrap();
    let options = GroupOptions::new().lease(Duration::from_secs(3600));
    bus.create_group(topic().name(), "g", &options, Start::Oldest, false).unwrap();
    while !matches!(publisher.try_publish(b"x"), Err(PublishError::Full { .. })) {}
    let (code, findings) = examine(&scene);
    assert_eq!((code, findings.len()), (1, 1), "{findings:?}");
    let (severity, subject, finding, mend) = text(&findings[0]);
    assert_eq!((severity, subject), ("warning", "topic doctor.exclusive"));
    assert!(finding.starts_with("is full: group g is") && finding.contains("it has no consumer"), "{finding}");
    assert!(mend.contains("shmbus group rm doctor.exclusive g"), "{mend}");

    let mut consumer = scene.start("consume", "");
    consumer.expect("holding");
    let pid = consumer.pid();
    let (_, findings) = examine(&scene);
    assert_eq!(findings.len(), 1, "{findings:?}");
    let (_, _, finding, mend) = text(&findings[0]);
    let holds = format!("consumer 0 (process {pid}) holds the oldest lease, attempt 1 at sequence 0");
    assert!(finding.starts_with("is full: group g is") && finding.ends_with(&holds), "{finding}");
    assert!(mend.contains(&pid.to_string()), "{mend}");

    consumer.signal(Signal::SIGSTOP);
    await_that("the stop", || examine(&scene).1.len() == 3);
    let (_, findings) = examine(&scene);
    assert_eq!(text(&findings[0]).2, format!("process {pid} is stopped and holds 1 places"));
    let (severity, subject, finding, mend) = text(&findings[1]);
    assert_eq!((severity, subject), ("warning", "topic doctor.exclusive"));
    assert_eq!(finding, format!("consumer 0 of group g (process {pid}) is stopped and holds 2 leases"));
    assert!(mend.contains(&format!("kill -CONT {pid}")), "{mend}");
    assert!(text(&findings[2]).2.contains(&format!("(process {pid}), which is stopped, holds the oldest lease")));
}

/// Who is stopped is seen in `show`, beside what he holds: his slot, his place, his leases.
#[test]
fn show_tells_who_is_stopped() {
    let scene = Scene::new("show");
    let bus = scene.open();
    let create = |topic: &Topic<[u8]>| bus.create(topic).unwrap();
    create(&topic());
    let options = GroupOptions::new().lease(Duration::from_secs(3600));
    bus.create_group(topic().name(), "g", &options, Start::Oldest, false).unwrap();
    let mut holders = ["subscribe", "publish", "consume"].map(|role| scene.start(role, ""));
    holders.iter_mut().for_each(|holder| holder.expect("holding"));
    let show = |arguments: &[&str]| {
        let output = scene.shmbus(&[&["show", topic().name()], arguments].concat()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let parts = ["/subscribers/0", "/publishers/0", "/groups/0/consumers/0", "/groups/0/oldest_lease"];
    let all_are = |stopped: bool| {
        let seen: Value = serde_json::from_str(&show(&["--json"])).unwrap();
        let is = |part: &&str| seen.pointer(&format!("{part}/stopped")) == Some(&Value::Bool(stopped));
        parts.iter().all(is).then_some(seen)
    };
    assert!(all_are(false).is_some() && !show(&[]).contains("(stopped)"), "{}", show(&["--json"]));
    holders.iter().for_each(|holder| holder.signal(Signal::SIGSTOP));
    await_that("the stops", || all_are(true).is_some());
    let seen = all_are(true).unwrap();
    for (part, holder) in parts.iter().zip([&holders[0], &holders[1], &holders[2], &holders[2]]) {
        assert_eq!(seen.pointer(&format!("{part}/pid")), Some(&Value::from(holder.pid().as_raw())), "{part}");
    }
    let held = ["/subscribers/0/lag", "/publishers/0/slot", "/groups/0/consumers/0/in_flight"];
    let held = held.map(|part| seen.pointer(part).and_then(Value::as_u64).unwrap());
    assert_eq!(held, [4, 0, 2]);
    let text = show(&[]);
    for (line, holder) in [("SUBSCRIBER", &holders[0]), ("PUBLISHER", &holders[1]), ("CONSUMER OF", &holders[2])] {
        let row = text.lines().skip_while(|row| !row.starts_with(line)).nth(1).unwrap();
        assert!(row.contains(&format!("{} (stopped)", holder.pid())), "{row}");
    }
    assert!(text.contains(&format!("process {} (stopped) (sequence 0, attempt 1)", holders[2].pid())), "{text}");
    holders.iter().for_each(|holder| holder.signal(Signal::SIGCONT));
    await_that("them to go on", || all_are(false).is_some());
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
    assert!(finding.contains("writable by everybody") && mend.contains("0700"), "{finding}; {mend}");
}
