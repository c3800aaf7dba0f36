//! Processes that join and are killed, a great many: nothing of them stays (SPEC §4.7).

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe};
use shmbus::{Bus, GroupOptions, Start, Topic};

use super::common::{LIMIT, Random, Scene, await_that, say, seed};
use super::{setting, turn};

/// Children that are alive at a time.
const AT_ONCE: usize = 4;

/// Messages that a child acknowledges; it publishes one at most.
const ACKS: usize = 4;

/// Names that they publish under.
const NAMES: u64 = 4;

/// Publisher slots, cursors and consumers that are used before the first look, so that all memory there will be is there:
/// more than dead and living children ever have at a time.
const WARM: usize = 16;

/// Cycles before the first look.
const WARM_CYCLES: u64 = 100;

/// How long a cycle may take on a busy machine.
const PATIENCE_EACH: Duration = Duration::from_millis(50);

/// How long closed connections' descriptors may take to go.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the allocators of coordinator and keeper may have kept, whatever the number of cycles.
const RSS_SLACK_KIB: u64 = 8 << 10;

fn topic() -> Topic<[u64; 4]> {
    Topic::new("leaks").messages(256)
}

/// Role: forks children that join and are killed, some in the middle of it. Arguments: cycles, seed.
pub(crate) fn nursery(arguments: &str) {
    set_pdeathsig(Signal::SIGKILL).unwrap();
    let (cycles, seed) = arguments.split_once(' ').unwrap();
    let (mut left, mut random) = (cycles.parse::<u64>().unwrap(), Random::new(seed.parse().unwrap()));
    let mut joined = 0;
    while left > 0 {
        let children: Vec<(Pid, OwnedFd)> =
            (0..AT_ONCE.min(left as usize)).map(|_| give_birth(random.next())).collect();
        left -= children.len() as u64;
        for (child, ready) in children {
            // One in four dies wherever it has got to by then, the others with all they can have.
            if random.below(4) == 0 {
                std::thread::sleep(Duration::from_micros(random.below(3_000)));
            } else {
                let said = std::fs::File::from(ready).read(&mut [0]).unwrap();
                assert_eq!(said, 1, "a child ended by itself");
                joined += 1;
            }
            kill(child, Signal::SIGKILL).unwrap();
            waitpid(child, None).unwrap();
        }
    }
    say(&format!("{joined} of {cycles} had joined"));
}

/// A child, and where it says when it has everything.
fn give_birth(choice: u64) -> (Pid, OwnedFd) {
    let (read, write) = pipe().unwrap();
    // SAFETY: this process has no other thread.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => (child, read),
        ForkResult::Child => {
            set_pdeathsig(Signal::SIGKILL).unwrap();
            join_and_wait(choice, std::fs::File::from(write))
        }
    }
}

/// Opens one of everything.
fn join_and_wait(choice: u64, mut ready: std::fs::File) -> ! {
    let bus = Bus::open_default().unwrap();
    let name = format!("name-{}", choice % NAMES);
    let mut publisher =
        if choice.is_multiple_of(2) { bus.publisher(topic()) } else { bus.publisher_as(topic(), &name) }.unwrap();
    let _subscriber = bus.subscriber(topic()).open().unwrap();
    let mut consumer = bus.consumer(topic(), "g").existing().open().unwrap();
    let _wildcard = choice.is_multiple_of(8).then(|| bus.wildcard::<[u64; 4]>("leaks.>").open().unwrap());
    if choice.is_multiple_of(4) {
        let own = format!("own-{}", std::process::id());
        bus.create_ephemeral(&own, &topic().options()).unwrap();
    }
    // May be fenced by a sibling of the same name by now.
    let _ = publisher.try_publish(&[choice; 4]);
    // So much at a time that the group keeps up; the last one is in hand when the end comes.
    for _ in 0..ACKS {
        if let Ok(Some(message)) = consumer.try_recv() {
            message.ack().unwrap();
        }
    }
    let _lease = consumer.try_recv();
    ready.write_all(b"r").unwrap();
    loop {
        std::thread::park();
    }
}

/// What the bus has.
#[derive(Debug, PartialEq, Eq)]
struct Belongings {
    /// Open descriptors of coordinator and keeper.
    descriptors: [usize; 2],
    /// Bytes of the shared memory they keep.
    memfd_bytes: u64,
    participants: usize,
    topics: usize,
    publishers: usize,
    cursors: usize,
    consumers: usize,
    names: usize,
}

impl Belongings {
    fn of(scene: &Scene, bus: &Bus) -> Belongings {
        let topics = bus.topics().unwrap();
        Belongings {
            descriptors: servers(scene).map(|pid| descriptors(pid).len()),
            memfd_bytes: memfd_bytes(scene.server("keeper")),
            participants: bus.report().unwrap().participants.len(),
            topics: topics.len(),
            publishers: topics.iter().map(|topic| topic.publishers.len()).sum(),
            cursors: topics.iter().map(|topic| topic.subscribers.len() + topic.groups.len()).sum(),
            consumers: topics.iter().flat_map(|topic| &topic.groups).map(|group| group.consumers.len()).sum(),
            names: bus.publisher_names(topic().name()).unwrap().len(),
        }
    }
}

fn servers(scene: &Scene) -> [Pid; 2] {
    ["coordinator", "keeper"].map(|role| scene.server(role))
}

fn descriptors(pid: Pid) -> Vec<PathBuf> {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    all.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// Bytes of shared memory that a process keeps.
fn memfd_bytes(pid: Pid) -> u64 {
    let is_memory =
        |path: &PathBuf| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
    let mut files: Vec<(u64, u64)> = descriptors(pid)
        .into_iter()
        .filter(is_memory)
        .filter_map(|path| std::fs::metadata(path).ok())
        .map(|file| (file.ino(), file.blocks() * 512))
        .collect();
    files.sort_unstable();
    files.dedup();
    files.into_iter().map(|(_, bytes)| bytes).sum()
}

/// Private memory of coordinator and keeper.
fn rss_anon_kib(scene: &Scene) -> [u64; 2] {
    servers(scene).map(|pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    })
}

/// Takes more places at once than the children will.
fn warm_up(scene: &Scene, bus: &Bus) {
    bus.create(&topic()).unwrap();
    bus.create_group(topic().name(), "g", &GroupOptions::new(), Start::Oldest, false).unwrap();
    let _named: Vec<_> =
        (0..NAMES).map(|number| bus.publisher_as(topic(), &format!("name-{number}")).unwrap()).collect();
    let _places: Vec<_> = (0..WARM)
        .map(|_| {
            let subscriber = bus.subscriber(topic()).open().unwrap();
            let consumer = bus.consumer(topic(), "g").existing().open().unwrap();
            (bus.publisher(topic()).unwrap(), subscriber, consumer)
        })
        .collect();
    run(scene, WARM_CYCLES);
}

fn run(scene: &Scene, cycles: u64) -> String {
    let mut nursery = scene.start("nursery", &format!("{cycles} {}", seed()));
    nursery.line_within(LIMIT + PATIENCE_EACH * cycles as u32)
}

#[test]
fn processes_that_join_and_are_killed_leave_nothing() {
    let _turn = turn();
    let cycles = setting("SHMBUS_SOAK_CYCLES").unwrap_or(1_000);
    let scene = Scene::new("leaks");
    let bus = scene.open();
    warm_up(&scene, &bus);
    let is_calm = || {
        let now = Belongings::of(&scene, &bus);
        (now.participants, now.publishers, now.cursors, now.consumers) == (1, 0, 1, 0)
    };
    await_that("the dead of the warm-up to be forgotten", is_calm);
    // A connection's descriptor goes a moment after its process.
    let mut before = Belongings::of(&scene, &bus);
    await_that("calm", || {
        let now = Belongings::of(&scene, &bus);
        std::mem::replace(&mut before, now) == Belongings::of(&scene, &bus)
    });
    let rss_before = rss_anon_kib(&scene);
    let joined = run(&scene, cycles);
    await_that("the dead to be forgotten", is_calm);
    let mut after = Belongings::of(&scene, &bus);
    let patience = Instant::now() + PATIENCE;
    while after != before && Instant::now() < patience {
        after = Belongings::of(&scene, &bus);
    }
    let rss_after = rss_anon_kib(&scene);
    println!("{joined}; {after:?}; private memory {rss_before:?} KiB before, {rss_after:?} after");
    assert_eq!(after, before);
    for (before, after) in rss_before.into_iter().zip(rss_after) {
        assert!(after <= before + RSS_SLACK_KIB, "private memory grew from {before} to {after} KiB");
    }
}
