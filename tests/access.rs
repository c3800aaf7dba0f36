//! Several users on one bus, with real processes of other users: what each may do on a topic, and what he can do with the
//! descriptors that he gets. They run as root, and say that they are skipped elsewhere.

mod common;

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use common::{LIMIT, Process, Scene, await_that, hear, say};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use shmbus::{Access, Bus, OpenError, Refusal, Right, Start, Topic, TopicOptions, Who};

/// Two users that no file of this machine belongs to.
const ALICE: u32 = 65534;
const BOB: u32 = 65533;
const TRADERS: u32 = 65500;

/// Not a test: what the tests' other processes do, as other users. It hears what to do and says what came of it.
#[test]
fn role() {
    let Some((role, user)) = common::role() else { return };
    let mut numbers = user.split(' ').map(|number| number.parse().unwrap());
    become_user(numbers.next().unwrap(), &numbers.collect::<Vec<u32>>());
    let bus = match Bus::options().spawn(role == "spawner").open() {
        Ok(bus) => bus,
        Err(error) => return say(&error.to_string()),
    };
    say("open");
    let mut kept: Vec<Box<dyn std::any::Any>> = Vec::new();
    loop {
        let order = hear();
        let (what, topic) = order.split_once(' ').unwrap_or((&order, ""));
        say(&obey(&bus, what, topic, &mut kept).unwrap_or_else(|error| error.to_string()));
    }
}

fn become_user(uid: u32, groups: &[u32]) {
    // SAFETY: these only change this process's own credentials, before it has another thread that would need them.
    let changed = unsafe {
        libc::setgroups(groups.len(), groups.as_ptr()) == 0
            && libc::setresgid(uid, uid, uid) == 0
            && libc::setresuid(uid, uid, uid) == 0
    };
    assert!(changed);
}

fn raw(name: &str) -> Topic<[u8]> {
    Topic::named(name.to_owned())
}

fn obey(
    bus: &Bus,
    what: &str,
    topic: &str,
    kept: &mut Vec<Box<dyn std::any::Any>>,
) -> Result<String, Box<dyn std::error::Error>> {
    let before = segments();
    match what {
        "publish" => {
            let mut publisher = bus.publisher(raw(topic))?;
            let sequence = publisher.publish(b"from another user")?;
            kept.push(Box::new(publisher));
            return Ok(sequence.to_string());
        }
        "subscribe" => kept.push(Box::new(bus.subscriber(raw(topic)).start(Start::Oldest).open()?)),
        "watch" => {
            let mut subscriber = bus.subscriber(raw(topic)).start(Start::Oldest).droppable().open()?;
            let found = String::from_utf8(subscriber.recv_timeout(LIMIT)?.to_vec())?;
            kept.push(Box::new(subscriber));
            return Ok(found);
        }
        "again" => {
            let subscriber = kept.last_mut().unwrap().downcast_mut::<shmbus::Subscriber<[u8]>>().unwrap();
            return Ok(String::from_utf8(subscriber.recv_timeout(LIMIT)?.to_vec())?);
        }
        "idle" => {
            let subscriber = kept.last_mut().unwrap().downcast_mut::<shmbus::Subscriber<[u8]>>().unwrap();
            let found = subscriber.try_recv()?.map(|message| message.to_vec());
            return Ok(found.map_or("nothing".to_owned(), |found| String::from_utf8_lossy(&found).into_owned()));
        }
        "consume" => {
            let mut consumer = bus.consumer(raw(topic), "g").open()?;
            consumer.recv_timeout(LIMIT)?.ack()?;
            kept.push(Box::new(consumer));
        }
        "reject" => {
            let mut consumer = bus.consumer(raw(topic), "g").open()?;
            consumer.recv_timeout(LIMIT)?.reject("no good")?;
            kept.push(Box::new(consumer));
        }
        "wildcard" => {
            let wildcard = bus.wildcard::<[u8]>(topic).droppable().open()?;
            kept.push(Box::new(wildcard));
            return obey(bus, "topics of the wildcard", "", kept);
        }
        "topics of the wildcard" => {
            let wildcard = kept.last_mut().unwrap().downcast_mut::<shmbus::WildcardSubscriber<[u8]>>().unwrap();
            while wildcard.try_recv()?.is_some() {}
            return Ok(BTreeSet::from_iter(wildcard.topics()).into_iter().collect::<Vec<_>>().join(" "));
        }
        "attack" => return Ok(attack()),
        "create" => drop(bus.create_topic(topic, &small(), false)?),
        "large" => drop(bus.create_topic(topic, &TopicOptions { bytes: 1 << 30, ..small() }, false)?),
        "remove" => bus.remove_topic(topic, true)?,
        "purge" => drop(bus.purge_topic(topic)?),
        "group" => drop(bus.create_group(topic, "h", &shmbus::GroupOptions::new(), Start::Oldest, false)?),
        "topics" => return Ok(bus.topics()?.iter().map(|topic| topic.name.clone()).collect::<Vec<_>>().join(" ")),
        "show" => drop(bus.topic(topic)?),
        "stop" => bus.clone().stop()?,
        "report" => {
            return Ok(bus.report()?.participants.iter().all(|p| p.uid == Uid::effective().as_raw()).to_string());
        }
        "serve" => {
            let bus = std::env::var("SHMBUS_BUS").unwrap();
            let options = shmbus::coordinator::ServeOptions { bus, ..Default::default() };
            return Ok(shmbus::coordinator::serve(options).unwrap_err().to_string());
        }
        "squat" => {
            let [directory, bus] = ["SHMBUS_DIR", "SHMBUS_BUS"].map(|name| std::env::var(name).unwrap());
            let mut lock = OpenOptions::new();
            kept.push(Box::new(lock.create_new(true).write(true).open(format!("{directory}/{bus}.lock"))?));
        }
        "segments" => return Ok(before.len().to_string()),
        other => panic!("no order {other}"),
    }
    Ok("done".to_owned())
}

fn small() -> TopicOptions {
    TopicOptions { messages: 64, bytes: 1 << 16, max_publishers: 4, max_subscribers: 8, ..TopicOptions::default() }
}

/// This process's descriptors of segments: number and name.
fn segments() -> Vec<(i32, String)> {
    let open =
        fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let named = |fd: i32| Some((fd, fs::read_link(format!("/proc/self/fd/{fd}")).ok()?.to_str()?.to_owned()));
    open.filter_map(named).filter(|(_, name)| name.contains("memfd:shmbus:")).collect()
}

/// Tries to change what it may only read; the names of the segments where anything of it worked.
fn attack() -> String {
    let mut fallen: Vec<String> = Vec::new();
    let mut tried = 0;
    for (fd, name) in segments() {
        if name.contains("own-cursors") {
            continue;
        }
        tried += 1;
        // SAFETY: a descriptor of this process, which nobody closes while this runs.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        let reopened = OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}")).is_ok();
        // SAFETY: a new mapping at a place of the kernel's choice disturbs nobody.
        let mapped = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_WRITE, libc::MAP_SHARED, borrowed.as_raw_fd(), 0)
        } != libc::MAP_FAILED;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let punched = fallocate(borrowed, punch, 0, 4096).is_ok();
        let resealed = fcntl(borrowed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_ok();
        let opened_up = nix::sys::stat::fchmod(borrowed, nix::sys::stat::Mode::from_bits_truncate(0o666)).is_ok();
        if reopened || mapped || punched || resealed || opened_up {
            fallen.push(format!("{name} {reopened} {mapped} {punched} {resealed} {opened_up}"));
        }
    }
    // Its mappings: those of the log and the arenas are not writable, and cannot be made so.
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        if !line.contains("memfd:shmbus:") || line.contains("own-cursors") {
            continue;
        }
        let start = usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        // SAFETY: changes the protection of a page that nothing here has a reference to.
        let changed = unsafe { libc::mprotect(start as *mut libc::c_void, 4096, libc::PROT_READ | libc::PROT_WRITE) };
        if changed == 0 {
            fallen.push(line.to_owned());
        }
    }
    if fallen.is_empty() && tried > 0 { "nothing".to_owned() } else { format!("tried {tried}: {}", fallen.join(", ")) }
}

/// A bus that root runs for others, in a directory that everybody can search.
struct Shared {
    scene: Scene,
    program: PathBuf,
}

impl Shared {
    /// `None`: the tests do not run as root.
    fn new(name: &str, allow: &str) -> Option<Shared> {
        Shared::with_budget(name, allow, None)
    }

    fn with_budget(name: &str, allow: &str, budget: Option<&str>) -> Option<Shared> {
        if !Uid::effective().is_root() {
            println!("skipped: other users take root");
            return None;
        }
        let scene = Scene::new(name);
        fs::set_permissions(scene.directory(), Permissions::from_mode(0o755)).unwrap();
        // Where other users can execute it.
        let program = scene.directory().join("test-program");
        assert!(Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&program).status().unwrap().success());
        let mut serve = scene.shmbus(&["serve", "--allow", allow]);
        serve.envs(budget.map(|budget| ("SHMBUS_BUDGET", budget)));
        // The scene kills it.
        #[allow(clippy::zombie_processes)]
        serve.process_group(0).stdout(std::process::Stdio::null()).spawn().unwrap();
        await_that("the bus", || scene.options().spawn(false).open().is_ok());
        Some(Shared { scene, program })
    }

    fn user(&self, uid: u32, groups: &[u32]) -> Process {
        let numbers: Vec<String> = [uid].iter().chain(groups).map(u32::to_string).collect();
        let mut process = self.scene.start_program(&self.program, "user", &numbers.join(" "));
        process.expect("open");
        process
    }

    fn create(&self, topic: &str, access: &Access) -> Bus {
        let bus = self.scene.open();
        bus.create_topic_with_access(topic, &small(), access, false).unwrap();
        bus
    }
}

fn ask(process: &mut Process, order: &str) -> String {
    process.tell(order);
    process.line()
}

fn refused(process: &mut Process, order: &str, right: Right, uid: u32) {
    let said = ask(process, order);
    assert!(said.contains(&format!("user {uid} may not {right} on topic")), "{order}: {said}");
    assert!(said.contains(&format!("--allow {right}={uid}")), "{order}: {said}");
}

#[test]
fn who_has_no_right_gets_no_descriptor_and_the_reason() {
    let Some(shared) = Shared::new("nothing", "*") else { return };
    let bus = shared.create("private", &Access::new());
    bus.publisher(raw("private")).unwrap().publish(b"secret").unwrap();
    let mut bob = shared.user(BOB, &[]);
    refused(&mut bob, "publish private", Right::Publish, BOB);
    refused(&mut bob, "subscribe private", Right::Subscribe, BOB);
    refused(&mut bob, "watch private", Right::Subscribe, BOB);
    refused(&mut bob, "consume private", Right::Consume, BOB);
    refused(&mut bob, "group private", Right::Administer, BOB);
    refused(&mut bob, "purge private", Right::Administer, BOB);
    refused(&mut bob, "remove private", Right::Administer, BOB);
    refused(&mut bob, "show private", Right::Subscribe, BOB);
    assert_eq!(ask(&mut bob, "topics"), "");
    assert_eq!(ask(&mut bob, "report"), "true", "other users' processes are not his to see");
    assert!(ask(&mut bob, "stop").contains("may not stop this bus"));
    assert_eq!(ask(&mut bob, "segments"), "0");
    assert_eq!(bus.topic("private").unwrap().tail_sequence, 1);
    // His own topics are his own, and closed to the next one.
    assert_eq!(ask(&mut bob, "create bobs"), "done");
    let mut alice = shared.user(ALICE, &[]);
    refused(&mut alice, "publish bobs", Right::Publish, ALICE);
    assert_eq!(ask(&mut bob, "publish bobs"), "0");
    assert_eq!(bus.topic("bobs").unwrap().owner, BOB);
}

#[test]
fn who_may_only_subscribe_writes_nothing_that_others_use() {
    let Some(shared) = Shared::new("subscribe", "*") else { return };
    let bus = shared.create("news", &Access::new().allow(Right::Subscribe, Who::Everybody));
    let mut publisher = bus.publisher(raw("news")).unwrap();
    publisher.publish(b"first").unwrap();
    let mut bob = shared.user(BOB, &[]);
    let said = ask(&mut bob, "subscribe news");
    assert!(said.contains("--droppable") && said.contains(&format!("--allow consume={BOB}")), "{said}");
    assert_eq!(ask(&mut bob, "segments"), "0");
    assert_eq!(ask(&mut bob, "watch news"), "first");
    assert_eq!(ask(&mut bob, "attack"), "nothing");
    publisher.publish(b"second").unwrap();
    assert_eq!(ask(&mut bob, "again"), "second");
    assert_eq!(bus.topic("news").unwrap().subscribers.len(), 1);
    refused(&mut bob, "publish news", Right::Publish, BOB);
    // He holds nobody back.
    bob.signal(Signal::SIGSTOP);
    for _ in 0..10_000 {
        publisher.publish(b"more").unwrap();
    }
    bob.signal(Signal::SIGCONT);
    drop(bob);
    await_that("his cursor to be gone", || bus.topic("news").unwrap().subscribers.is_empty());
    // Who comes after him has a cursor like anybody.
    let mut next = bus.subscriber(raw("news")).open().unwrap();
    publisher.publish(b"for all").unwrap();
    assert_eq!(&*next.recv_timeout(LIMIT).unwrap(), b"for all");
}

#[test]
fn publishing_and_consuming_are_rights_of_their_own() {
    let Some(shared) = Shared::new("rights", "*") else { return };
    let access = Access::new().allow(Right::Publish, Who::User(ALICE)).allow(Right::Consume, Who::Group(TRADERS));
    let bus = shared.create("jobs", &access);
    bus.create_group("jobs", "g", &shmbus::GroupOptions::new(), Start::Oldest, false).unwrap();
    let mut alice = shared.user(ALICE, &[]);
    assert_eq!(ask(&mut alice, "publish jobs"), "0");
    refused(&mut alice, "subscribe jobs", Right::Subscribe, ALICE);
    refused(&mut alice, "consume jobs", Right::Consume, ALICE);
    let mut bob = shared.user(BOB, &[TRADERS]);
    assert_eq!(ask(&mut bob, "consume jobs"), "done");
    assert_eq!(ask(&mut bob, "subscribe jobs"), "done", "who consumes reads as well");
    refused(&mut bob, "publish jobs", Right::Publish, BOB);
    refused(&mut bob, "group jobs", Right::Administer, BOB);
    assert_eq!(ask(&mut alice, "publish jobs"), "1");
    assert_eq!(ask(&mut bob, "reject jobs"), "done");
    // The dead letters are for who administers the topic, and another consumer may add his.
    await_that("the dead letter", || bus.topic("dlq.jobs.g").is_ok_and(|topic| topic.tail_sequence == 1));
    let letters = bus.topic("dlq.jobs.g").unwrap();
    assert_eq!((letters.owner, letters.access.to_string().contains(&format!("publish=0,@{TRADERS}"))), (BOB, true));
    let mut stranger = shared.user(BOB, &[]);
    refused(&mut stranger, "consume jobs", Right::Consume, BOB);
}

/// The name that a group's dead letters go to can be guessed, and names are for who comes first.
#[test]
fn dead_letters_go_to_nobody_who_may_not_consume() {
    let Some(shared) = Shared::new("letters", "*") else { return };
    let bus = shared.create("jobs", &Access::new());
    bus.publisher(raw("jobs")).unwrap().publish(b"secret").unwrap();
    let mut bob = shared.user(BOB, &[]);
    assert_eq!(ask(&mut bob, "create dlq.jobs.g"), "done");
    let create_group = || bus.create_group("jobs", "g", &shmbus::GroupOptions::new(), Start::Oldest, false);
    let said = create_group().unwrap_err().to_string();
    assert!(said.contains(&format!("is user {BOB}'s")) && said.contains("remove it"), "{said}");
    bus.remove_topic("dlq.jobs.g", true).unwrap();
    create_group().unwrap();
    for order in ["create dlq.jobs.g", "publish dlq.jobs.g"] {
        let said = ask(&mut bob, order);
        assert!(said.contains("dead letters") && said.contains(&format!("--allow consume={BOB}")), "{said}");
    }
    let mut consumer = bus.consumer(raw("jobs"), "g").open().unwrap();
    consumer.recv_timeout(LIMIT).unwrap().reject("no good").unwrap();
    assert_eq!(bus.topic("dlq.jobs.g").unwrap().owner, 0);
    assert_eq!(ask(&mut bob, "topics"), "");
}

/// A coordinator of some user moves expired messages as that user: where it may not, no other group waits for that.
#[test]
fn letters_that_the_coordinator_may_not_move_hold_up_no_others() {
    if !Uid::effective().is_root() {
        return println!("skipped: other users take root");
    }
    let scene = Scene::new("burial");
    // Where root alone can have put it, or nobody else would go there.
    let directory = tempfile::Builder::new().prefix("shmbus-test-").tempdir_in("/run").unwrap();
    std::os::unix::fs::chown(directory.path(), Some(BOB), Some(BOB)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("shmbus-program");
    assert!(Command::new("cp").arg(scene.shmbus(&[]).get_program()).arg(&program).status().unwrap().success());
    let mut serve = Command::new(&program);
    serve.args(["--bus", &scene.name, "serve"]).env("SHMBUS_DIR", directory.path());
    // The scene kills it.
    #[allow(clippy::zombie_processes)]
    serve.uid(BOB).gid(BOB).process_group(0).stdout(std::process::Stdio::null()).spawn().unwrap();
    let open = || Bus::options().name(&scene.name).directory(directory.path().into()).spawn(false).open();
    await_that("the bus", || open().is_ok());
    let bus = open().unwrap();
    let options = shmbus::GroupOptions::new().dead_letter_expired();
    let bobs = Access::new().allow(Right::Consume, Who::User(BOB));
    for (topic, access) in [("a", &Access::new()), ("b", &bobs)] {
        bus.create_topic_with_access(topic, &TopicOptions { envelope: true, ..small() }, access, false).unwrap();
        bus.create_group(topic, "g", &options, Start::Oldest, false).unwrap();
        let ttl = shmbus::Envelope::new().ttl(std::time::Duration::from_nanos(1));
        bus.publisher(raw(topic).envelope()).unwrap().publish_with(b"late", &ttl).unwrap();
    }
    let group = |topic: &str| bus.topic(topic).unwrap().groups.remove(0);
    await_that("the letter that may be moved", || group("b").dead_lettered == 1);
    assert_eq!((group("a").floor, group("a").dead_lettered), (0, 0));
}

#[test]
fn wildcards_skip_what_their_owner_may_not_read() {
    let Some(shared) = Shared::new("wildcards", "*") else { return };
    let open = Access::new().allow(Right::Subscribe, Who::User(BOB));
    let bus = shared.create("w.open", &open);
    shared.create("w.closed", &Access::new());
    let mut bob = shared.user(BOB, &[]);
    assert_eq!(ask(&mut bob, "wildcard w.*"), "w.open");
    assert_eq!(ask(&mut bob, "topics"), "w.open");
    bus.create_topic_with_access("w.new", &small(), &open, false).unwrap();
    bus.create_topic("w.hidden", &small(), false).unwrap();
    assert_eq!(ask(&mut bob, "topics of the wildcard"), "w.new w.open");
    assert_eq!(ask(&mut bob, "wildcard w.*"), "w.new w.open");
}

#[test]
fn a_budget_is_the_users_own() {
    let Some(shared) = Shared::with_budget("budget", "*", Some("64000000")) else { return };
    let (mut alice, mut bob) = (shared.user(ALICE, &[]), shared.user(BOB, &[]));
    let said = ask(&mut bob, "large big");
    assert!(said.contains("budget"), "{said}");
    let mut created = 0;
    let said = loop {
        match ask(&mut bob, &format!("create t{created}")) {
            said if said == "done" => created += 1,
            said => break said,
        }
        assert!(created < 10_000);
    };
    assert!(said.contains("budget of 64000000"), "{said}");
    assert_eq!(ask(&mut alice, "create alices"), "done", "another user's budget is his own");
}

#[test]
fn the_lists_outlive_the_coordinator() {
    let Some(shared) = Shared::new("restart", &format!("{BOB},@{TRADERS}")) else { return };
    let bus = shared.create("news", &Access::new().allow(Right::Subscribe, Who::User(BOB)));
    bus.publisher(raw("news")).unwrap().publish(b"first").unwrap();
    let mut bob = shared.user(BOB, &[]);
    assert_eq!(ask(&mut bob, "watch news"), "first");
    let coordinator = shared.scene.server("coordinator");
    kill(coordinator, Signal::SIGKILL).unwrap();
    await_that("the next", || shared.scene.servers(Some("coordinator")).iter().any(|pid| *pid != coordinator));
    refused(&mut bob, "publish news", Right::Publish, BOB);
    assert_eq!(ask(&mut bob, "attack"), "nothing");
    bus.publisher(raw("news")).unwrap().publish(b"second").unwrap();
    assert_eq!(ask(&mut bob, "again"), "second");
    assert_eq!(ask(&mut bob, "watch news"), "first");
    let mut trader = shared.user(ALICE, &[TRADERS]);
    refused(&mut trader, "watch news", Right::Subscribe, ALICE);
    // Whom nobody let in is told so, before and after.
    let mut stranger = shared.scene.start_program(&shared.program, "user", &ALICE.to_string());
    let said = stranger.line();
    assert!(said.contains(&format!("serve --allow {ALICE}")), "{said}");
}

/// Where a subscriber with a cursor of his own stands is seen, whoever serves.
#[test]
fn a_cursor_of_ones_own_outlives_coordinators() {
    let Some(shared) = Shared::new("own", "*") else { return };
    let bus = shared.create("news", &Access::new().allow(Right::Subscribe, Who::User(BOB)));
    let mut publisher = bus.publisher(raw("news")).unwrap();
    publisher.publish(b"0").unwrap();
    let mut bob = shared.user(BOB, &[]);
    assert_eq!(ask(&mut bob, "watch news"), "0");
    let stands_at = |wanted: u64| {
        let status = bus.topic("news").unwrap();
        status.subscribers.iter().map(|subscriber| subscriber.sequence).collect::<Vec<_>>() == [wanted]
    };
    for (round, keeper_too) in [(1, false), (2, true)] {
        await_that("his place", || ask(&mut bob, "idle") == "nothing" && stands_at(round));
        let report = bus.report().unwrap();
        let coordinator = report.coordinator_pid;
        let pids = [Some(coordinator), report.keeper_pid.filter(|_| keeper_too)];
        let pids: Vec<Pid> = pids.into_iter().flatten().map(|pid| Pid::from_raw(pid as i32)).collect();
        pids.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
        pids.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).unwrap());
        await_that("the next", || bus.report().is_ok_and(|report| report.coordinator_pid != coordinator));
        assert!(stands_at(round), "keeper {keeper_too}: {:?}", bus.topic("news").unwrap().subscribers);
        publisher.publish(round.to_string().as_bytes()).unwrap();
        assert_eq!(ask(&mut bob, "again"), round.to_string());
    }
    // A place that is given back is the next one's.
    await_that("his place", || ask(&mut bob, "idle") == "nothing" && stands_at(3));
    drop(bob);
    await_that("his end", || bus.topic("news").unwrap().subscribers.is_empty());
    let mut next = shared.user(BOB, &[]);
    assert_eq!(ask(&mut next, "watch news"), "0");
    await_that("the next one's place", || ask(&mut next, "idle") == "nothing" && stands_at(3));
}

#[test]
fn a_bus_is_closed_to_others_unless_it_is_told_otherwise() {
    if !Uid::effective().is_root() {
        return println!("skipped: other users take root");
    }
    let scene = Scene::new("closed");
    let bus = scene.open();
    let socket = fs::read_dir(scene.directory()).unwrap().map(|entry| entry.unwrap().path());
    let socket = socket.into_iter().find(|path| path.extension().is_some_and(|end| end == "sock")).unwrap();
    assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
    let error = bus.topic("missing").unwrap_err();
    assert!(matches!(error, OpenError::Refused(Refusal::UnknownTopic { .. })), "{error}");
    // Where everybody can write no bus is looked for.
    fs::set_permissions(scene.directory(), Permissions::from_mode(0o777)).unwrap();
    let error = scene.options().open().unwrap_err().to_string();
    assert!(error.contains("writable by everybody") && error.contains("0770"), "{error}");
    for mode in [0o1777, 0o770, 0o775] {
        fs::set_permissions(scene.directory(), Permissions::from_mode(mode)).unwrap();
        scene.options().open().unwrap();
    }
    // Nor where a user has put a directory.
    let foreign = scene.directory().join("foreign");
    fs::create_dir(&foreign).unwrap();
    std::os::unix::fs::chown(&foreign, Some(BOB), None).unwrap();
    let error = Bus::options().directory(foreign).open().unwrap_err().to_string();
    assert!(error.contains(&format!("belongs to user {BOB}")), "{error}");
}

/// `/run/shmbus` with mode 0770 and a group: its members use the bus, and cannot put themselves in its server's place.
#[test]
fn a_groups_directory_is_served_by_its_owner_alone() {
    let Some(shared) = Shared::new("group", &format!("@{TRADERS}")) else { return };
    let directory = shared.scene.directory();
    std::os::unix::fs::chown(directory, None, Some(TRADERS)).unwrap();
    fs::set_permissions(directory, Permissions::from_mode(0o770)).unwrap();
    let bus = shared.create("news", &Access::new().allow(Right::Publish, Who::Group(TRADERS)));
    let mut alice = shared.user(ALICE, &[TRADERS]);
    assert_eq!(ask(&mut alice, "publish news"), "0");
    assert!(ask(&mut alice, "serve").contains("belongs to user 0"));
    bus.stop().unwrap();
    await_that("its end", || shared.scene.servers(None).is_empty());
    // She may write there, and the bus is not hers to start.
    let mut bob = shared.scene.start_program(&shared.program, "spawner", &format!("{BOB} {TRADERS}"));
    let said = bob.line();
    assert!(said.contains("no coordinator serves"), "{said}");
    // What she leaves there under its names is seen.
    assert_eq!(ask(&mut alice, "squat"), "done");
    let served = shared.scene.shmbus(&["serve"]).output().unwrap();
    let said = String::from_utf8(served.stderr).unwrap();
    assert!(said.contains(&format!("belongs to user {ALICE}")), "{said}");
}
