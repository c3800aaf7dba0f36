//! Handles in foreign event loops: a descriptor that tells `poll` and `epoll` when there is something to receive.

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, MODES, Scene, await_that, end_with_the_test, feeding, number, raw, say, small, used};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;
use shmbus::{Bus, GoneReason, Mode, Pollable, Publisher, RecvError, Start, Subscriber, Topic, Waitable};

/// Far less than the second after which every sleeper looks for itself.
const PROMPT: Duration = Duration::from_millis(700);

/// Whether the descriptor becomes readable within `limit`.
fn is_readable(pollable: &Pollable, limit: Duration) -> bool {
    let mut fds = [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(limit).unwrap()).unwrap() == 1
}

fn is_readable_now(pollable: &Pollable) -> bool {
    is_readable(pollable, Duration::ZERO)
}

/// How many threads sleep in the place of others in this process.
fn sleepers() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.ok()?.path().join("comm")).ok();
    tasks.filter_map(name).filter(|name| name.trim_end() == "shmbus-wake").count()
}

/// Plays the other processes of these tests; nothing to see when run by hand.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    match role.as_str() {
        "publisher" => feeding::publish_when_told(&arguments),
        "flood" => feeding::flood(&arguments, 50, Duration::from_micros(300)),
        "idle" => idle(),
        "ends" => ends(),
        other => panic!("unknown role {other}"),
    }
}

#[test]
fn it_becomes_readable_when_another_process_publishes() {
    let scene = Scene::new("readable");
    let bus = scene.open();
    let names: Vec<String> = MODES.iter().map(|mode| raw(*mode, "readable").name().to_owned()).collect();
    let mut other = scene.start("publisher", &names.join(" "));
    other.expect("open");
    for (index, (mode, name)) in MODES.into_iter().zip(&names).enumerate() {
        let mut subscriber = bus.subscriber(common::of_mode(mode, small(name))).open().unwrap();
        let mut pollable = Pollable::new().unwrap();
        for round in 0..20 {
            assert!(pollable.arm(&mut [&mut subscriber]).unwrap(), "{mode}: there is nothing");
            assert!(!is_readable_now(&pollable), "{mode}");
            other.tell(&format!("{index} round {round}"));
            assert!(is_readable(&pollable, PROMPT), "{mode}: a wake-up was lost in round {round}");
            // Level-triggered: reading nothing changes nothing.
            assert!(is_readable_now(&pollable), "{mode}");
            assert!(!pollable.arm(&mut [&mut subscriber]).unwrap(), "{mode}: there is something");
            assert_eq!(subscriber.try_recv().unwrap().unwrap().as_bytes(), format!("round {round}").as_bytes());
        }
    }
}

/// An event loop with everything in it: two topics, a pattern whose topics come later, and a descriptor of its own.
#[test]
fn several_handles_share_a_descriptor_in_an_epoll_loop() {
    let scene = Scene::new("epoll");
    let bus = scene.open();
    let mut a = bus.publisher(small("a.many")).unwrap();
    let mut b = bus.publisher(Topic::<u64>::named("b.typed").messages(16).exclusive()).unwrap();
    let mut raw = bus.subscriber(small("a.many")).open().unwrap();
    let mut typed = bus.subscriber(Topic::<u64>::named("b.typed").exclusive()).open().unwrap();
    let mut pattern = bus.wildcard::<[u8]>("c.*").open().unwrap();
    let mut pollable = Pollable::new().unwrap();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    epoll.add(&pollable, EpollEvent::new(EpollFlags::EPOLLIN, 7)).unwrap();
    let other = scene.open();
    let (go, wait_for_go) = std::sync::mpsc::channel::<u64>();
    let feeding = thread::spawn(move || {
        for number in wait_for_go {
            match number % 3 {
                0 => drop(a.publish(&number.to_le_bytes()).unwrap()),
                1 => drop(b.publish(&number).unwrap()),
                _ => {
                    let mut new = other.publisher(small(&format!("c.{number}"))).unwrap();
                    new.publish(&number.to_le_bytes()).unwrap();
                }
            }
        }
    });
    for round in 0..150 {
        go.send(round).unwrap();
        let since = Instant::now();
        let mut got = None;
        while got.is_none() {
            while got.is_none() && !pollable.arm(&mut [&mut raw, &mut typed, &mut pattern]).unwrap() {
                got = raw.try_recv().unwrap().map(|message| number(message.as_bytes()));
                got = got.or(typed.try_recv().unwrap().map(|message| *message));
                got = got.or(pattern.try_recv().unwrap().map(|message| number(message.as_bytes())));
            }
            if got.is_none() {
                let mut events = [EpollEvent::empty()];
                let limit = EpollTimeout::try_from(LIMIT).unwrap();
                assert_eq!(epoll.wait(&mut events, limit), Ok(1), "nothing came for {round}");
                assert_eq!(events[0].data(), 7);
            }
        }
        assert_eq!(got, Some(round));
        assert!(since.elapsed() < PROMPT, "a wake-up was lost at {round}");
    }
    drop(go);
    feeding.join().unwrap();
}

/// Two processes publish, are stopped and go on; nothing is lost, and no wait lasts until the second that looks for itself.
#[test]
fn nothing_is_lost_between_arming_and_sleep() {
    const COUNT: u64 = 3000;
    let scene = Scene::new("nothinglost");
    let bus = scene.open();
    let open = |name: &str| {
        bus.create(&small(name)).unwrap();
        bus.subscriber(small(name)).start(Start::Oldest).open().unwrap()
    };
    let mut feeds = [open("flood.0"), open("flood.1")];
    let mut others = [0, 1].map(|n| scene.start("flood", &format!("flood.{n} {COUNT}")));
    let mut next = [0; 2];
    let mut pollable = Pollable::new().unwrap();
    let mut sleeps = 0;
    while next != [COUNT; 2] {
        let [first, second] = &mut feeds;
        if pollable.arm(&mut [first, second]).unwrap() {
            assert!(is_readable(&pollable, PROMPT), "a wake-up was lost after {next:?}");
            sleeps += 1;
            if sleeps % 100 == 0 {
                others[0].signal(Signal::SIGSTOP);
                thread::sleep(Duration::from_millis(5));
                others[0].signal(Signal::SIGCONT);
            }
        }
        for (feed, next) in feeds.iter_mut().zip(&mut next) {
            while let Some(message) = feed.try_recv().unwrap() {
                assert_eq!(message.as_bytes(), next.to_le_bytes());
                *next += 1;
            }
        }
    }
    assert!(sleeps > 50, "it never slept, so nothing was tested: {sleeps}");
    for other in &mut others {
        other.expect("open");
        other.expect("done");
    }
}

/// One message a round, at any moment around the arming.
#[test]
fn no_moment_around_the_arming_is_missed() {
    const ROUNDS: u64 = 10_000;
    let scene = Scene::new("moments");
    let bus = scene.open();
    let topic = Topic::<u64>::named("moments").messages(16).exclusive();
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = bus.subscriber(topic).open().unwrap();
    let round = Arc::new(AtomicU64::new(0));
    let (begun, mut random) = (round.clone(), common::Random::new(common::seed()));
    let publishing = thread::spawn(move || {
        for number in 1..=ROUNDS {
            while begun.load(Ordering::Acquire) < number {
                std::hint::spin_loop();
            }
            (0..random.below(6000)).for_each(|_| std::hint::spin_loop());
            publisher.publish(&number).unwrap();
        }
    });
    let mut pollable = Pollable::new().unwrap();
    let (mut sleeps, mut received) = (0, 0);
    for number in 1..=ROUNDS {
        round.store(number, Ordering::Release);
        while received < number {
            if pollable.arm(&mut [&mut subscriber]).unwrap() {
                sleeps += 1;
                assert!(is_readable(&pollable, PROMPT), "a wake-up was lost in round {number}");
            }
            if let Some(message) = subscriber.try_recv().unwrap() {
                received = *message;
            }
        }
    }
    publishing.join().unwrap();
    assert!(sleeps > ROUNDS / 100, "it hardly ever slept: {sleeps}");
}

/// More bells than the kernel takes in one sleep.
#[test]
fn hundreds_of_handles_share_a_descriptor() {
    const HANDLES: usize = 300;
    let scene = Scene::new("hundreds");
    let bus = scene.open();
    let topic = |n: usize| Topic::<u64>::named(format!("many.{n}")).messages(16).exclusive();
    let mut publishers: Vec<Publisher<u64>> = (0..HANDLES).map(|n| bus.publisher(topic(n)).unwrap()).collect();
    let mut subscribers: Vec<Subscriber<u64>> =
        (0..HANDLES).map(|n| bus.subscriber(topic(n)).open().unwrap()).collect();
    let mut pollable = Pollable::new().unwrap();
    let mut random = common::Random::new(common::seed());
    for round in 0..60 {
        let mut all: Vec<&mut dyn Waitable> = subscribers.iter_mut().map(|handle| handle as _).collect();
        assert!(pollable.arm(&mut all).unwrap());
        let chosen = random.below(HANDLES as u64) as usize;
        publishers[chosen].publish(&round).unwrap();
        assert!(is_readable(&pollable, PROMPT), "a wake-up was lost in round {round}: topic {chosen}");
        assert!(!pollable.arm(&mut all).unwrap());
        assert_eq!(*subscribers[chosen].try_recv().unwrap().unwrap(), round);
    }
}

#[test]
fn the_topics_end_is_something_to_receive() {
    let scene = Scene::new("end");
    let bus = scene.open();
    bus.create(&small("end")).unwrap();
    let mut subscriber = bus.subscriber(small("end")).open().unwrap();
    let mut pollable = Pollable::new().unwrap();
    assert!(pollable.arm(&mut [&mut subscriber]).unwrap());
    bus.remove_topic("end", true).unwrap();
    assert!(is_readable(&pollable, PROMPT));
    assert!(!pollable.arm(&mut [&mut subscriber]).unwrap());
    assert_eq!(subscriber.try_recv().map(|_| ()), Err(RecvError::Gone(GoneReason::Removed)));
}

/// What it is armed for may go first, and another may come in its place.
#[test]
fn handles_may_go_while_it_is_armed() {
    let scene = Scene::new("go");
    let bus = scene.open();
    let mut pollable = Pollable::new().unwrap();
    assert!(pollable.arm(&mut []).unwrap());
    for round in 0..200 {
        let topic = small(&format!("go.{}", round % 3));
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic).open().unwrap();
        assert!(pollable.arm(&mut [&mut subscriber]).unwrap(), "round {round}");
        match round % 4 {
            0 => drop(subscriber),
            1 => drop(publisher),
            2 => pollable.disarm(),
            _ => {
                publisher.publish(b"x").unwrap();
                assert!(is_readable(&pollable, PROMPT), "round {round}");
                drop(subscriber);
            }
        }
    }
}

/// Armed for hundreds of handles and left alone, a process sleeps.
#[test]
fn waiting_takes_no_processor() {
    let scene = Scene::new("idle");
    let _bus = scene.open();
    let mut other = scene.start("idle", "");
    let used: u64 = other.line_within(2 * LIMIT).parse().unwrap();
    assert!(used < 60, "{used} ms of processor time in 3 s");
}

fn idle() {
    end_with_the_test();
    let bus = Bus::open_default().unwrap();
    let topic = |n: u64| Topic::<u64>::named(format!("idle.{n}")).messages(16).exclusive();
    let _publishers: Vec<Publisher<u64>> = (0..200).map(|n| bus.publisher(topic(n)).unwrap()).collect();
    let mut handles: Vec<Subscriber<u64>> = (0..200).map(|n| bus.subscriber(topic(n)).open().unwrap()).collect();
    let mut pollable = Pollable::new().unwrap();
    let (begin, until) = (used(), Instant::now() + Duration::from_secs(3));
    let mut rounds = 0;
    while Instant::now() < until {
        let mut all: Vec<&mut dyn Waitable> = handles.iter_mut().map(|handle| handle as _).collect();
        assert!(pollable.arm(&mut all).unwrap());
        is_readable(&pollable, until.saturating_duration_since(Instant::now()));
        rounds += 1;
    }
    assert!(rounds <= 10, "woken {rounds} times for nothing");
    say(&(used() - begin).as_millis().to_string());
    thread::sleep(LIMIT);
}

#[test]
fn threads_come_with_the_first_handle_and_go_after_the_last() {
    let scene = Scene::new("threads");
    let _bus = scene.open();
    scene.start("ends", "").expect("well");
}

fn ends() {
    let bus = Bus::open_default().unwrap();
    let topic = |n: usize| common::of_mode(Mode::Exclusive, small(&format!("ends.{n}")));
    let mut publishers: Vec<Publisher<[u8]>> = (0..130).map(|n| bus.publisher(topic(n)).unwrap()).collect();
    let mut handles: Vec<Subscriber<[u8]>> = (0..130).map(|n| bus.subscriber(topic(n)).open().unwrap()).collect();
    for _ in 0..2 {
        assert_eq!(sleepers(), 0);
        let mut all: Vec<&mut dyn Waitable> = handles.iter_mut().map(|handle| handle as _).collect();
        let mut pollable = Pollable::new().unwrap();
        assert!(pollable.arm(&mut all).unwrap());
        await_that("two threads for 130 bells", || sleepers() == 2);
        publishers[0].publish(b"x").unwrap();
        assert!(is_readable(&pollable, PROMPT));
        assert!(handles[0].try_recv().unwrap().is_some());
        let mut all: Vec<&mut dyn Waitable> = handles.iter_mut().map(|handle| handle as _).collect();
        assert!(pollable.arm(&mut all).unwrap());
        drop(pollable);
        await_that("the threads' end", || sleepers() == 0);
    }
    say("well");
}
