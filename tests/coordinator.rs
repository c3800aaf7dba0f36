//! Coordinator and keeper as real processes: started by need, killed, restarted, gone without a trace.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::{Bus, PublishError, Publisher, Topic, TopicOptions};

/// Everything here happens within milliseconds; this is for a machine that is very busy.
const DEADLINE: Duration = Duration::from_secs(20);

/// A bus of its own in a directory of its own; nothing of it survives the test.
struct Scene {
    directory: tempfile::TempDir,
    bus: String,
    foreground: Option<Child>,
}

impl Scene {
    /// `shmbus serve` in the foreground.
    fn serve(bus: &str) -> Scene {
        let mut scene = Scene::empty(bus);
        let child = scene.command().args(["--bus", &scene.bus, "serve"]).spawn().unwrap();
        scene.foreground = Some(child);
        scene.wait("the socket", |scene| scene.directory.path().join(format!("{}.sock", scene.bus)).exists());
        scene
    }

    fn empty(bus: &str) -> Scene {
        let bus = format!("{bus}-{}", std::process::id());
        Scene { directory: tempfile::tempdir().unwrap(), bus, foreground: None }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shmbus"));
        command.env("SHMBUS_DIR", self.directory.path()).stdin(Stdio::null());
        command
    }

    fn open(&self) -> Bus {
        Bus::options().name(&self.bus).directory(self.directory.path().to_owned()).open().unwrap()
    }

    /// The living processes of this bus in a role (`None`: all of them).
    fn processes(&self, role: Option<&str>) -> Vec<u32> {
        let numbers =
            fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        numbers.filter(|pid| self.plays(*pid, role)).collect()
    }

    fn plays(&self, pid: u32, role: Option<&str>) -> bool {
        // A zombie has no command line, so it is rightly counted as dead.
        let Ok(line) = fs::read_to_string(format!("/proc/{pid}/cmdline")) else { return false };
        let args: Vec<&str> = line.split('\0').collect();
        let ours = args.contains(&"serve") && args.contains(&self.bus.as_str());
        let played = args.windows(2).find(|pair| pair[0] == "--role").map_or("keeper", |pair| pair[1]);
        ours && role.is_none_or(|role| role == played)
    }

    fn kill(&self, role: &str) -> u32 {
        let pid = self.one(role);
        signal(pid, "-KILL");
        self.wait("its death", |scene| !scene.plays(pid, None));
        pid
    }

    fn one(&self, role: &str) -> u32 {
        self.wait(role, |scene| scene.processes(Some(role)).len() == 1);
        self.processes(Some(role))[0]
    }

    fn wait(&self, what: &str, mut condition: impl FnMut(&Scene) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "waited in vain for {what}; processes: {:?}", self.processes(None));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// No process and no file is left.
    fn assert_gone(&mut self) {
        if let Some(child) = &mut self.foreground {
            let deadline = Instant::now() + DEADLINE;
            while child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "the foreground process stays");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.wait("the end of all processes", |scene| scene.processes(None).is_empty());
        assert_eq!(names_in(self.directory.path()), Vec::<String>::new());
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Keeper and coordinator restart each other, so both must go before either comes back.
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline && !self.processes(None).is_empty() {
            let pids: Vec<String> = self.processes(None).iter().map(u32::to_string).collect();
            let _ = Command::new("kill").arg("-KILL").args(&pids).stderr(Stdio::null()).status();
        }
        if let Some(child) = &mut self.foreground {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn signal(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

fn names_in(directory: &Path) -> Vec<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn small() -> TopicOptions {
    TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() }
}

fn topics(bus: &Bus) -> Vec<(u64, String)> {
    bus.topics().unwrap().into_iter().map(|topic| (topic.id, topic.name)).collect()
}

#[test]
fn a_killed_coordinator_comes_back_with_everything() {
    let mut scene = Scene::serve("coordinator");
    let bus = scene.open();
    for round in 0..12 {
        bus.create_topic(&format!("t{round:02}"), &small(), false).unwrap();
        let before = topics(&bus);
        let killed = scene.kill("coordinator");
        assert_eq!(topics(&bus), before);
        assert_ne!(scene.one("coordinator"), killed);
    }
    assert_eq!(topics(&scene.open()).len(), 12);
    bus.stop().unwrap();
    scene.assert_gone();
}

#[test]
fn a_killed_keeper_is_replaced_and_holds_everything() {
    let mut scene = Scene::serve("keeper");
    let bus = scene.open();
    bus.create_topic("before", &small(), false).unwrap();
    for round in 0..6 {
        let killed = scene.kill("keeper");
        assert_ne!(scene.one("keeper"), killed);
        bus.create_topic(&format!("round{round}"), &small(), false).unwrap();
        let before = topics(&bus);
        scene.kill("coordinator");
        assert_eq!(topics(&bus), before);
    }
    bus.stop().unwrap();
    scene.assert_gone();
}

#[test]
fn a_registry_that_outgrows_its_first_half_survives_a_kill() {
    let mut scene = Scene::serve("growth");
    let bus = scene.open();
    for round in 0..400 {
        let name = format!("{}.{round}", "n".repeat(190));
        bus.create_topic(&name, &small(), false).unwrap();
        if round % 10 != 0 {
            bus.remove_topic(&name, false).unwrap();
        }
    }
    let before = topics(&bus);
    assert_eq!(before.len(), 40);
    scene.kill("coordinator");
    assert_eq!(topics(&bus), before);
    bus.stop().unwrap();
    scene.assert_gone();
}

/// Allows a process so many descriptors; how many it had been allowed.
fn allow_descriptors(pid: u32, count: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit` to where the last argument points, and is given no other.
    let got = unsafe { libc::prlimit(pid as i32, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
    let before = std::mem::replace(&mut limit.rlim_cur, count);
    // SAFETY: the kernel reads one `rlimit` from where the third argument points.
    let set = unsafe { libc::prlimit(pid as i32, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!((got, set), (0, 0), "{}", std::io::Error::last_os_error());
    before
}

#[test]
fn a_keeper_that_cannot_start_a_coordinator_tries_again() {
    let mut scene = Scene::serve("short");
    // Nobody but the keeper has it.
    scene.open().create_topic("t", &small(), false).unwrap();
    let keeper = scene.one("keeper");
    let before = allow_descriptors(keeper, 3);
    scene.kill("coordinator");
    let soon = Instant::now() + Duration::from_millis(200);
    while Instant::now() < soon {
        assert!(scene.plays(keeper, Some("keeper")), "it has given up, and what it kept is lost");
        std::thread::yield_now();
    }
    allow_descriptors(keeper, before);
    scene.one("coordinator");
    let bus = scene.open();
    assert_eq!(topics(&bus).len(), 1);
    bus.stop().unwrap();
    scene.assert_gone();
}

#[test]
fn a_coordinator_that_is_stopped_while_it_takes_over_does_not_wedge_the_bus() {
    let mut scene = Scene::serve("handover");
    let bus = scene.open();
    // More descriptors than fit in the socket between the two.
    (0..300).for_each(|n| assert!(!bus.create_topic(&format!("t{n}"), &small(), false).unwrap()));
    let keeper = scene.one("keeper");
    let first = scene.one("coordinator");
    signal(first, "-KILL");
    let deadline = Instant::now() + DEADLINE;
    let children = format!("/proc/{keeper}/task/{keeper}/children");
    let next = loop {
        assert!(Instant::now() < deadline, "no coordinator comes");
        let children = fs::read_to_string(&children).unwrap();
        let mut started = children.split_whitespace().map(|pid| pid.parse().unwrap()).filter(|pid| *pid != first);
        // Not before it runs its own program: whoever starts it waits for that.
        if let Some(pid) = started.find(|pid| scene.plays(*pid, Some("coordinator"))) {
            break pid;
        }
    };
    kill(Pid::from_raw(next as i32), Signal::SIGSTOP).unwrap();
    // Longer than the keeper waits for it.
    std::thread::sleep(Duration::from_secs(6));
    // It may be no more.
    let _ = kill(Pid::from_raw(next as i32), Signal::SIGCONT);
    scene.wait("its answer", |scene| {
        let options = Bus::options().name(&scene.bus).directory(scene.directory.path().to_owned());
        options.open().is_ok_and(|bus| bus.topics().is_ok_and(|topics| topics.len() == 300))
    });
    bus.stop().unwrap();
    scene.assert_gone();
}

#[test]
fn sigterm_to_either_process_ends_the_bus() {
    for role in ["keeper", "coordinator"] {
        let mut scene = Scene::serve(role);
        let bus = scene.open();
        bus.create_topic("t", &small(), false).unwrap();
        signal(scene.one(role), "-TERM");
        scene.assert_gone();
        assert!(bus.topics().is_err(), "the bus has ended");
    }
}

/// Kills the coordinator some microseconds after the topic of `publisher` is gone, or from now on.
fn kill_soon(coordinator: u32, publisher: &mut Publisher<[u8]>, after_gone: bool, delay_us: u64) {
    let deadline = Instant::now() + DEADLINE;
    while after_gone && publisher.publish(b"early").is_ok() {
        assert!(Instant::now() < deadline, "the topic stays");
    }
    let until = Instant::now() + Duration::from_micros(delay_us);
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    // It may have ended before.
    let _ = kill(Pid::from_raw(coordinator as i32), Signal::SIGKILL);
}

#[test]
fn a_stop_ends_the_bus_whenever_the_coordinator_is_killed_over_it() {
    for round in 0..24 {
        let mut scene = Scene::serve(&format!("stop{round}"));
        let (bus, other) = (scene.open(), scene.open());
        let mut publisher = bus.publisher(Topic::<[u8]>::named("t")).unwrap();
        (0..50).for_each(|n| assert!(!bus.create_topic(&format!("t{n}"), &small(), false).unwrap()));
        let coordinator = scene.one("coordinator");
        std::thread::scope(|scope| {
            scope.spawn(|| other.stop().unwrap());
            kill_soon(coordinator, &mut publisher, round % 2 == 0, round * 5);
        });
        scene.assert_gone();
        let published = publisher.publish(b"late");
        assert!(matches!(published, Err(PublishError::Gone(_))), "{published:?}");
    }
}

#[test]
fn a_topic_is_there_or_gone_whenever_the_coordinator_is_killed_over_its_removal() {
    let mut scene = Scene::serve("removal");
    let (bus, other) = (scene.open(), scene.open());
    for round in 0..8 {
        let name = format!("t{round}");
        let mut publisher = bus.publisher(Topic::<[u8]>::named(name.as_str())).unwrap();
        let coordinator = scene.one("coordinator");
        std::thread::scope(|scope| {
            // Asked again, it may be told that there is no such topic any more.
            scope.spawn(|| drop(other.remove_topic(&name, true)));
            kill_soon(coordinator, &mut publisher, round % 2 == 0, round * 5);
        });
        assert!(topics(&bus).is_empty());
        let published = publisher.publish(b"late");
        assert!(matches!(published, Err(PublishError::Gone(_))), "{published:?}");
    }
    bus.stop().unwrap();
    scene.assert_gone();
}

#[test]
fn a_bus_is_started_by_need_and_goes_when_nobody_needs_it() {
    let mut scene = Scene::empty("need");
    let first = scene.open();
    let second = scene.open();
    assert!(!first.create_topic("t", &small(), true).unwrap());
    assert!(second.create_topic("t", &small(), true).unwrap());
    drop(first);
    assert_eq!(topics(&second).len(), 1);
    second.remove_topic("t", false).unwrap();
    drop(second);
    scene.assert_gone();
    assert_eq!(topics(&scene.open()).len(), 0, "a new bus");
}

#[test]
fn a_bus_that_nobody_can_find_goes_with_its_last_participant() {
    for lost in ["sock", "lock"] {
        let mut scene = Scene::serve(lost);
        let bus = scene.open();
        bus.create_topic("kept", &small(), false).unwrap();
        fs::remove_file(scene.directory.path().join(format!("{}.{lost}", scene.bus))).unwrap();
        assert_eq!(topics(&bus).len(), 1, "who is on it stays");
        drop(bus);
        scene.wait("the end of all processes", |scene| scene.processes(None).is_empty());
        if lost == "sock" {
            scene.assert_gone();
        }
    }
}

#[test]
fn many_programs_that_start_at_once_meet_on_one_bus() {
    let mut scene = Scene::empty("race");
    std::thread::scope(|scope| {
        let scene = &scene;
        for round in 0..8 {
            scope.spawn(move || {
                for again in 0..5 {
                    let bus = scene.open();
                    let name = format!("t{round}.{again}");
                    bus.create_topic(&name, &small(), true).unwrap();
                    bus.remove_topic(&name, false).unwrap();
                }
            });
        }
    });
    scene.assert_gone();
}

#[test]
fn what_the_killed_left_in_the_file_system_blocks_nothing() {
    let scene = Scene::serve("stale");
    let pids = [scene.one("keeper"), scene.one("coordinator")];
    pids.iter().for_each(|pid| signal(*pid, "-STOP"));
    pids.iter().for_each(|pid| signal(*pid, "-KILL"));
    scene.wait("their death", |scene| scene.processes(None).is_empty());
    assert_eq!(names_in(scene.directory.path()).len(), 3, "socket, lock and registry");
    let bus = scene.open();
    bus.create_topic("t", &small(), false).unwrap();
    bus.stop().unwrap();
}

#[test]
fn a_second_server_is_refused_and_an_absent_one_is_reported() {
    let mut scene = Scene::serve("second");
    let output = scene.command().args(["--bus", &scene.bus, "serve"]).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("served already"));
    scene.open().stop().unwrap();
    scene.assert_gone();
    let absent = Bus::options().name(&scene.bus).directory(scene.directory.path().to_owned()).spawn(false).open();
    assert!(absent.unwrap_err().to_string().contains("shmbus serve"));
}
