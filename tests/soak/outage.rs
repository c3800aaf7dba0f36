//! What traffic costs while the coordinator is dead and cannot come back, against what it costs while it serves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::{Bus, Publisher, Subscriber, Topic};

use super::common::{Scene, await_that};
use super::{setting, turn};

/// Length of a chunk of traffic and of a canary.
const CHUNK_MESSAGES: u64 = 2_000_000;
const CANARY_ROUNDS: u64 = 5_000;

/// By how much the median may be off.
const TOLERANCE: f64 = 0.05;

/// Pairs that are tried for one that counts: the two cores change their class every few seconds on some machines.
const TRIES_EACH: u64 = 5;

fn topic() -> Topic<[u64; 4]> {
    Topic::new("outage").exclusive().messages(4096)
}

/// Bounds between the classes of the bare round trip, in nanoseconds: as the benchmark's (SMT, CCX, FAR).
const CLASS_BOUNDS_NS: [f64; 2] = [75.0, 250.0];

/// The two processors that this process may use.
fn processors() -> [usize; 2] {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut all = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap());
    [all.next().unwrap(), all.next().expect("two processors")]
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// A word on a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

/// The class of the two processors now: how long a bare round trip takes.
fn class([near, far]: [usize; 2]) -> usize {
    let (ping, pong) = (Line::default(), Line::default());
    let elapsed = thread::scope(|scope| {
        scope.spawn(|| {
            pin(far);
            for number in 1..=CANARY_ROUNDS {
                while ping.0.load(Ordering::Acquire) < number {
                    std::hint::spin_loop();
                }
                pong.0.store(number, Ordering::Release);
            }
        });
        pin(near);
        let started = Instant::now();
        for number in 1..=CANARY_ROUNDS {
            ping.0.store(number, Ordering::Release);
            while pong.0.load(Ordering::Acquire) < number {
                std::hint::spin_loop();
            }
        }
        started.elapsed()
    });
    let nanoseconds = elapsed.as_nanos() as f64 / CANARY_ROUNDS as f64;
    CLASS_BOUNDS_NS.into_iter().filter(|bound| nanoseconds >= *bound).count()
}

/// Messages a second from one processor to the other, and the class, if it was the same before and after.
fn chunk(publisher: &mut Publisher<[u64; 4]>, subscriber: &mut Subscriber<[u64; 4]>) -> Option<(f64, usize)> {
    let processors = processors_of_the_test();
    let before = class(processors);
    let elapsed = thread::scope(|scope| {
        scope.spawn(|| {
            pin(processors[1]);
            for number in 0..CHUNK_MESSAGES {
                publisher.publish(&[number; 4]).unwrap();
            }
        });
        pin(processors[0]);
        let started = Instant::now();
        for number in 0..CHUNK_MESSAGES {
            assert_eq!(*subscriber.recv().unwrap(), [number; 4]);
        }
        started.elapsed()
    });
    (class(processors) == before).then(|| (CHUNK_MESSAGES as f64 / elapsed.as_secs_f64(), before))
}

/// Found once: the threads that are pinned later would find fewer.
fn processors_of_the_test() -> [usize; 2] {
    static FOUND: std::sync::OnceLock<[usize; 2]> = std::sync::OnceLock::new();
    *FOUND.get_or_init(processors)
}

/// Runs `during` while the coordinator is dead and the keeper cannot start another one.
fn without_coordinator<R>(scene: &Scene, bus: &Bus, during: impl FnOnce() -> R) -> R {
    let [keeper, coordinator] = ["keeper", "coordinator"].map(|role| scene.server(role));
    kill(keeper, Signal::SIGSTOP).unwrap();
    kill(coordinator, Signal::SIGKILL).unwrap();
    await_that("the coordinator's death", || scene.servers(Some("coordinator")).is_empty());
    // The first moments belong to the kernel, which takes the dead one apart.
    thread::sleep(Duration::from_millis(20));
    let result = during();
    assert!(scene.servers(Some("coordinator")).is_empty(), "somebody has started another coordinator");
    kill(keeper, Signal::SIGCONT).unwrap();
    await_that("the next coordinator", || bus.topic(topic().name()).is_ok());
    thread::sleep(Duration::from_millis(20));
    result
}

#[test]
fn traffic_is_as_fast_while_the_coordinator_is_dead() {
    let Some(pairs) = setting("SHMBUS_SOAK_PAIRS") else {
        return println!("skipped: set SHMBUS_SOAK_PAIRS=20 to run it");
    };
    let _turn = turn();
    let scene = Scene::new("outage");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic()).unwrap();
    let mut subscriber = bus.subscriber(topic()).open().unwrap();
    let mut ratios: Vec<(usize, f64)> = Vec::new();
    for attempt in 0..pairs * TRIES_EACH {
        let mut alive = None;
        let mut measure = |alive: &mut Option<_>| *alive = chunk(&mut publisher, &mut subscriber);
        let mut dead = None;
        // In turn, so that whatever drifts is on both sides.
        if attempt % 2 == 0 {
            measure(&mut alive);
        }
        without_coordinator(&scene, &bus, || measure(&mut dead));
        if attempt % 2 == 1 {
            measure(&mut alive);
        }
        if let (Some((alive, before)), Some((dead, after))) = (alive, dead)
            && before == after
        {
            ratios.push((before, dead / alive));
        }
        // Pairs of one class only are compared with each other.
        let most = (0..3).max_by_key(|class| ratios.iter().filter(|(of, _)| of == class).count()).unwrap();
        let mut of_class: Vec<f64> = ratios.iter().filter(|(of, _)| *of == most).map(|(_, ratio)| *ratio).collect();
        if of_class.len() as u64 >= pairs {
            of_class.sort_by(f64::total_cmp);
            let [low, median, high] =
                [of_class.len() / 4, of_class.len() / 2, of_class.len() * 3 / 4].map(|at| of_class[at]);
            let class = ["SMT", "CCX", "FAR"][most];
            println!(
                "{pairs} pairs of class {class}: dead / alive median {median:.3}, quartiles {low:.3} and {high:.3}"
            );
            assert!((1.0 - median) <= TOLERANCE, "the median ratio is {median:.3}");
            return;
        }
    }
    panic!("the processors changed their class too often: {ratios:?}");
}
