//! How long it takes from a SIGKILL until the survivors get on.

use std::thread;
use std::time::{Duration, Instant};

use shmbus::{Bus, Consumer, GroupOptions, OpenError, PublishError, Refusal, Start, Topic};

use super::common::{LIMIT, Process, Random, Scene, end_with_the_test, say, seed};
use super::{setting, turn};

/// What SPEC §4.2 allows, at the 99th percentile on a quiet machine.
const PROMISE: Duration = Duration::from_millis(10);

/// The number of kills from which on the promise is demanded.
const MANY: usize = 1_000;

/// What a short run on a busy machine must keep.
const GENEROUS: Duration = Duration::from_secs(2);

/// What a victim has mapped besides a topic of less than 1 MiB and the program itself: the kernel takes a process apart before it
/// says that it is dead, page by page. The promise is for 64 MiB in all.
const BALLAST_BYTES: usize = 56 << 20;

/// Messages that a victim holds leases of.
const LEASES: usize = 8;

fn topic() -> Topic<[u64; 4]> {
    Topic::new("recovery").messages(1024)
}

fn exclusive() -> Topic<[u64; 4]> {
    topic().exclusive()
}

/// What the victims do.
pub(crate) fn play(role: &str) {
    end_with_the_test();
    let _ballast = std::hint::black_box(vec![1u8; BALLAST_BYTES]);
    let bus = Bus::open_default().unwrap();
    match role {
        "publish" | "publish alone" => {
            let topic = if role == "publish" { topic() } else { exclusive() };
            let mut publisher = bus.publisher(topic).unwrap();
            say("ready");
            for number in 0.. {
                publisher.publish(&[number; 4]).unwrap();
            }
        }
        "read" => {
            let _subscriber = bus.subscriber(exclusive()).open().unwrap();
            say("ready");
            thread::park();
        }
        "consume" => {
            let mut consumer = bus.consumer(topic(), "g").existing().open().unwrap();
            let leases: Vec<_> = (0..LEASES).map(|_| consumer.recv_timeout(LIMIT).unwrap().keep()).collect();
            say("ready");
            thread::park();
            drop(leases);
        }
        _ => panic!("no victim {role}"),
    }
}

/// A scene with a bus, and the choice of moments.
struct Theatre {
    scene: Scene,
    bus: Bus,
    random: Random,
}

impl Theatre {
    fn new() -> Theatre {
        let scene = Scene::new("recovery");
        let bus = scene.open();
        Theatre { scene, bus, random: Random::new(seed()) }
    }

    fn victim(&self, role: &str) -> Process {
        let mut victim = self.scene.start(&format!("victim {role}"), "");
        victim.expect("ready");
        victim
    }

    /// Starts a survivor that returns when it has got on, kills the victim while it waits, and says how long it took.
    fn kill<S: Send + 'static>(
        &mut self,
        victim: Process,
        survivor: impl FnOnce() -> S + Send + 'static,
    ) -> (Duration, S) {
        let survivor = thread::spawn(move || {
            let what = survivor();
            (Instant::now(), what)
        });
        thread::sleep(Duration::from_micros(500 + self.random.below(2_000)));
        let killed = Instant::now();
        victim.signal(nix::sys::signal::Signal::SIGKILL);
        let (got_on, what) = survivor.join().unwrap();
        victim.kill();
        (got_on.saturating_duration_since(killed), what)
    }
}

/// Measures and judges.
fn measure(what: &str, mut one: impl FnMut() -> Duration) {
    let kills = setting("SHMBUS_SOAK_KILLS").unwrap_or(30) as usize;
    let mut times: Vec<Duration> = (0..kills).map(|_| one()).collect();
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
    let [p50, p90, p99, max] = [50, 90, 99, 100].map(at);
    println!("{what}: {kills} kills, p50 {p50:.2?}, p90 {p90:.2?}, p99 {p99:.2?}, max {max:.2?}");
    let limit = if kills >= MANY { PROMISE } else { GENEROUS };
    assert!(p99 <= limit, "{what}: p99 is {p99:.2?}, {limit:.0?} are allowed");
}

/// Takes the exclusive place as soon as it is free.
fn take_place(bus: &Bus) {
    let deadline = Instant::now() + LIMIT;
    loop {
        match bus.publisher(exclusive()) {
            Ok(mut publisher) => {
                publisher.publish(&[1; 4]).unwrap();
                return;
            }
            Err(OpenError::Refused(Refusal::Taken { .. })) => assert!(Instant::now() < deadline),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_killed_publishers_place_is_soon_anothers() {
    let _turn = turn();
    let mut theatre = Theatre::new();
    theatre.bus.create(&exclusive()).unwrap();
    measure("publisher killed in publish, until another has its exclusive place and has published", || {
        let (victim, bus) = (theatre.victim("publish alone"), theatre.bus.clone());
        theatre.kill(victim, move || take_place(&bus)).0
    });
}

#[test]
fn a_killed_publisher_delays_no_other_one() {
    let _turn = turn();
    let mut theatre = Theatre::new();
    let mut publisher = theatre.bus.publisher(topic()).unwrap();
    let mut spare = Some(theatre.bus.subscriber(topic()).droppable().open().unwrap());
    measure("publisher killed in publish, until another one's next message on the topic is there", || {
        let victim = theatre.victim("publish");
        thread::sleep(Duration::from_micros(theatre.random.below(2_000)));
        let killed = Instant::now();
        victim.signal(nix::sys::signal::Signal::SIGKILL);
        publisher.publish(&[u64::MAX; 4]).unwrap();
        let reader = spare.as_mut().unwrap();
        while !matches!(reader.try_recv(), Ok(Some(message)) if message[0] == u64::MAX) {
            assert!(killed.elapsed() < LIMIT);
        }
        let time = killed.elapsed();
        victim.kill();
        time
    });
    drop(spare.take());
}

#[test]
fn a_killed_subscriber_soon_lets_the_publisher_go_on() {
    let _turn = turn();
    let mut theatre = Theatre::new();
    let mut held = Some(theatre.bus.publisher(exclusive()).unwrap());
    measure("gating subscriber killed, until the publisher it blocked has published", || {
        let (victim, mut publisher) = (theatre.victim("read"), held.take().unwrap());
        while !matches!(publisher.try_publish(&[0; 4]), Err(PublishError::Full { .. })) {}
        let survivor = move || {
            publisher.publish_timeout(&[1; 4], LIMIT).unwrap();
            publisher
        };
        let (time, publisher) = theatre.kill(victim, survivor);
        held = Some(publisher);
        time
    });
}

#[test]
fn a_killed_consumers_messages_soon_go_to_another() {
    let _turn = turn();
    let mut theatre = Theatre::new();
    let mut publisher = theatre.bus.publisher(topic()).unwrap();
    let options = GroupOptions::new().lease(Duration::from_secs(600));
    theatre.bus.create_group(topic().name(), "g", &options, Start::Oldest, false).unwrap();
    let mut idle: Option<Consumer<[u64; 4]>> = Some(theatre.bus.consumer(topic(), "g").existing().open().unwrap());
    measure("consumer with 8 leases killed, until another one has acknowledged all 8", || {
        publisher.publish_batch(&[[7; 4]; LEASES]).unwrap();
        let (victim, mut consumer) = (theatre.victim("consume"), idle.take().unwrap());
        assert!(matches!(consumer.try_recv(), Ok(None)), "the victim has them all");
        let survivor = move || {
            for _ in 0..LEASES {
                let message = consumer.recv_timeout(LIMIT).unwrap();
                assert_eq!((*message, message.attempt()), ([7; 4], 2));
                message.ack().unwrap();
            }
            consumer
        };
        let (time, consumer) = theatre.kill(victim, survivor);
        idle = Some(consumer);
        time
    });
}
