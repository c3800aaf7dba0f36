//! Waiting without blocking a thread, under several executors: nothing is lost by cancelling, nobody sleeps through a wake-up,
//! whoever is killed or stopped meanwhile.

mod common;

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    LIMIT, MODES, Random, Scene, await_that, end_with_the_test, feeding, hear, number, of_mode, raw, say, seed, small,
    used,
};
use futures_core::Stream;
use nix::sys::signal::Signal;
use shmbus::{
    Bus, Envelope, Full, GoneReason, GroupOptions, Mode, PublishError, Publisher, RecvError, RequestError, Start,
    Subscriber, Topic, WildcardError,
};
use tokio::runtime::Builder;
use tokio::time::timeout;

/// Far less than the second after which every sleeper looks for itself.
const PROMPT: Duration = Duration::from_millis(700);

/// Runs a future on two threads, or fails when it takes too long.
fn run<F: Future>(future: F) -> F::Output {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    runtime.block_on(async { timeout(LIMIT, future).await.expect("it hangs") })
}

/// Runs the same with each executor: two threads, one thread, and the simplest one there is.
fn run_everywhere<F: Future<Output = ()> + Send + 'static>(make: impl Fn() -> F) {
    run(make());
    Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(async { timeout(LIMIT, make()).await })
        .unwrap();
    let future = make();
    let simple = thread::spawn(move || pollster::block_on(future));
    await_that("the simplest executor", || simple.is_finished());
    simple.join().unwrap();
}

/// The next item of a stream.
async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

fn tail(bus: &Bus, topic: &str) -> u64 {
    bus.topic(topic).unwrap().tail_sequence
}

/// Plays the other processes of these tests; nothing to see when run by hand.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    match role.as_str() {
        "publisher" => feeding::publish_when_told(&arguments),
        "flood" => feeding::flood(&arguments, 10, Duration::from_micros(200)),
        "rounds" => publish_rounds(&arguments),
        "holder" => hold(&arguments),
        "relay" => run(relay()),
        "responder" => respond(&arguments),
        "idle" => idle(),
        other => panic!("unknown role {other}"),
    }
}

/// Publishes to each of so many topics, again and again.
fn publish_rounds(arguments: &str) {
    end_with_the_test();
    let (topics, rounds) = arguments.split_once(' ').unwrap();
    let bus = Bus::open_default().unwrap();
    let open = |n: u64| bus.publisher(small(&format!("t.{n}"))).unwrap();
    let mut publishers: Vec<_> = (0..topics.parse::<u64>().unwrap()).map(open).collect();
    for round in 0..rounds.parse::<u64>().unwrap() {
        for publisher in &mut publishers {
            publisher.publish(&round.to_le_bytes()).unwrap();
        }
    }
    thread::sleep(LIMIT);
}

/// Holds a ring back.
fn hold(topic: &str) {
    let bus = Bus::open_default().unwrap();
    let _held = bus.subscriber(small(topic)).start(Start::Oldest).open().unwrap();
    say("holds");
    hear();
}

#[test]
fn every_executor_is_woken_by_another_process() {
    let scene = Scene::new("executors");
    let bus = scene.open();
    let names: Vec<String> = MODES.iter().map(|mode| raw(*mode, "executors").name().to_owned()).collect();
    let other = scene.start("publisher", &names.join(" "));
    let other = Arc::new(std::sync::Mutex::new(other));
    other.lock().unwrap().expect("open");
    run_everywhere(|| {
        let (bus, names, other) = (bus.clone(), names.clone(), other.clone());
        async move {
            for (index, (mode, name)) in MODES.into_iter().zip(&names).enumerate() {
                let mut subscriber = bus.subscriber(of_mode(mode, small(name))).open().unwrap();
                for round in 0..20 {
                    let since = Instant::now();
                    other.lock().unwrap().tell(&format!("{index} round {round}"));
                    let message = subscriber.recv_async().await.unwrap();
                    assert_eq!(message.as_bytes(), format!("round {round}").as_bytes(), "{mode}");
                    assert!(since.elapsed() < PROMPT, "{mode}: a wake-up was lost in round {round}");
                }
            }
        }
    });
}

/// Two thousand tasks, sixteen threads' worth of doorbells, one publishing process that never has more than 16 messages ahead.
#[test]
fn thousands_of_tasks_wait_on_hundreds_of_topics() {
    const TOPICS: u64 = 250;
    const READERS: u64 = 8;
    const ROUNDS: u64 = 20;
    let scene = Scene::new("thousands");
    let bus = scene.open();
    let mut subscribers = Vec::new();
    for n in 0..TOPICS {
        bus.create(&small(&format!("t.{n}"))).unwrap();
        let open = |_| bus.subscriber(small(&format!("t.{n}"))).open().unwrap();
        subscribers.extend((0..READERS).map(open));
    }
    let received = Arc::new(AtomicU64::new(0));
    run(async {
        let read = |mut subscriber: Subscriber<[u8]>| {
            let received = received.clone();
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    let message = subscriber.recv_async().await.unwrap();
                    assert_eq!(number(message.as_bytes()), round);
                    received.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let tasks: Vec<_> = subscribers.into_iter().map(read).collect();
        let _other = scene.start("rounds", &format!("{TOPICS} {ROUNDS}"));
        for task in tasks {
            task.await.unwrap();
        }
    });
    assert_eq!(received.load(Ordering::Relaxed), TOPICS * READERS * ROUNDS);
}

/// What `receive` receives; given up, and then tried anew, when that takes more than a few turns of the executor.
async fn with_little_patience<R>(
    random: &mut Random,
    given_up: &mut u64,
    receive: impl Future<Output = R>,
) -> Option<R> {
    let turns = random.below(20);
    let patience = async {
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        received = receive => Some(received),
        () = patience => {
            *given_up += 1;
            None
        }
    }
}

/// Receives are begun and given up thousands of times while another process publishes.
#[test]
fn giving_up_a_receive_loses_nothing() {
    const COUNT: u64 = 2000;
    let scene = Scene::new("cancel");
    let bus = scene.open();
    for name in ["cancel", "wild.cancel", "queue"] {
        bus.create(&small(name)).unwrap();
    }
    let mut plain = bus.subscriber(small("cancel")).open().unwrap();
    let mut wild = bus.wildcard::<[u8]>("wild.*").open().unwrap();
    let mut consumer = bus.consumer(small("queue"), "group").options(GroupOptions::new()).open().unwrap();
    let (mut random, mut given_up) = (Random::new(seed()), 0);
    let _floods = ["cancel", "wild.cancel", "queue"].map(|name| scene.start("flood", &format!("{name} {COUNT}")));
    run(async {
        let mut expected = 0;
        while expected < COUNT {
            let received = with_little_patience(&mut random, &mut given_up, plain.recv_async()).await;
            let Some(message) = received else { continue };
            assert_eq!(number(message.unwrap().as_bytes()), expected);
            expected += 1;
        }
        let mut expected = 0;
        while expected < COUNT {
            let received = with_little_patience(&mut random, &mut given_up, wild.recv_async()).await;
            let Some(message) = received else { continue };
            assert_eq!(number(message.unwrap().as_bytes()), expected);
            expected += 1;
        }
        let mut expected = 0;
        while expected < COUNT {
            let received = with_little_patience(&mut random, &mut given_up, consumer.recv_async()).await;
            let Some(delivery) = received else { continue };
            let delivery = delivery.unwrap();
            assert_eq!((number(delivery.as_bytes()), delivery.attempt()), (expected, 1), "it was leased in vain");
            delivery.ack().unwrap();
            expected += 1;
        }
    });
    assert!(given_up > 500, "nothing was tested: {given_up}");
}

/// Waits in vain, gives up, waits again: only what resolved was published. Then the reader that holds the ring is killed.
#[test]
fn a_publisher_waits_for_room_until_its_reader_is_killed() {
    for mode in [Mode::Many, Mode::Exclusive] {
        let scene = Scene::new("room");
        let bus = scene.open();
        let topic = of_mode(mode, small("room")).envelope();
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut holder = scene.start("holder", "room");
        holder.expect("holds");
        run(async {
            let mut published = 0;
            while let Ok(sequence) = timeout(Duration::from_millis(50), publisher.publish_async(b"fills")).await {
                assert_eq!(sequence.unwrap().get(), published);
                published += 1;
            }
            for _ in 0..100 {
                let keyed = Envelope::new().key(b"key");
                assert!(
                    timeout(Duration::from_micros(100), publisher.publish_with_async(b"late", &keyed)).await.is_err()
                );
            }
            assert_eq!(tail(&bus, "room"), published, "{mode}: what was given up was published");
            let since = Instant::now();
            let mut waiting = Box::pin(publisher.publish_async(b"last"));
            assert!(timeout(Duration::from_millis(20), &mut waiting).await.is_err());
            holder.kill();
            assert_eq!(waiting.await.unwrap().get(), published, "{mode}");
            assert!(since.elapsed() < PROMPT, "{mode}: a wake-up was lost");
            assert_eq!(tail(&bus, "room"), published + 1, "{mode}");
        });
    }
}

#[test]
fn a_ring_that_rejects_does_so_at_once() {
    let scene = Scene::new("rejects");
    let bus = scene.open();
    let topic = small("rejects").full(Full::Reject);
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let _held = bus.subscriber(topic).open().unwrap();
    run(async {
        let refused = loop {
            if let Err(error) = publisher.publish_async(b"x").await {
                break error;
            }
        };
        assert!(matches!(refused, PublishError::Full { .. }), "{refused}");
        let too_large = publisher.publish_async(&[0; 5000]).await.unwrap_err();
        assert!(matches!(too_large, PublishError::TooLarge { .. }), "{too_large}");
    });
}

/// Everything that waits on a topic is told of its end.
#[test]
fn the_topics_end_ends_every_wait() {
    let scene = Scene::new("gone");
    let bus = scene.open();
    let topic = small("gone");
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let _holds = bus.subscriber(topic.clone()).open().unwrap();
    while publisher.try_publish(b"x").is_ok() {}
    let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
    let mut stream = bus.subscriber(topic.clone()).open().unwrap().into_stream();
    let mut consumer = bus.consumer(topic, "group").options(GroupOptions::new()).open().unwrap();
    run(async {
        let gone = RecvError::Gone(GoneReason::Removed);
        let publishing = tokio::spawn(async move { publisher.publish_async(b"x").await.unwrap_err() });
        let expected = gone.clone();
        let receiving =
            tokio::spawn(async move { assert_eq!(subscriber.recv_async().await.map(|_| ()), Err(expected)) });
        let expected = gone.clone();
        let consuming = tokio::spawn(async move { assert_eq!(consumer.recv_async().await.map(|_| ()), Err(expected)) });
        let streaming = tokio::spawn(async move {
            assert_eq!(next(&mut stream).await.unwrap().map(|_| ()), Err(gone));
            assert!(next(&mut stream).await.is_none() && next(&mut stream).await.is_none());
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        let since = Instant::now();
        bus.remove_topic("gone", true).unwrap();
        assert!(matches!(publishing.await.unwrap(), PublishError::Gone(GoneReason::Removed)));
        for task in [receiving, consuming, streaming] {
            task.await.unwrap();
        }
        assert!(since.elapsed() < PROMPT, "somebody had to look for itself");
    });
    let mut wild = bus.wildcard::<[u8]>(">").open().unwrap();
    run(async {
        let receiving = tokio::spawn(async move { wild.recv_async().await.map(|_| ()).unwrap_err() });
        tokio::time::sleep(Duration::from_millis(20)).await;
        bus.clone().stop().unwrap();
        assert!(matches!(receiving.await.unwrap(), WildcardError::Gone(GoneReason::Stopped)));
    });
}

/// Copies from one topic to another, one task.
async fn relay() {
    end_with_the_test();
    let bus = Bus::open_default().unwrap();
    let mut from = bus.subscriber(small("relay.from")).open().unwrap();
    let mut to = bus.publisher(small("relay.to")).unwrap();
    say("open");
    loop {
        let message = from.recv_async().await.unwrap();
        to.publish_async(message.as_bytes()).await.unwrap();
    }
}

/// A process is stopped wherever it is, also with its sleeping thread about to call a task, and goes on with nothing lost.
#[test]
fn who_is_stopped_goes_on() {
    const COUNT: u64 = 300;
    let scene = Scene::new("stopped");
    let bus = scene.open();
    let mut to = bus.publisher(small("relay.from")).unwrap();
    bus.create(&small("relay.to")).unwrap();
    let mut from = bus.subscriber(small("relay.to")).open().unwrap();
    let mut other = scene.start("relay", "");
    other.expect("open");
    let mut random = Random::new(seed());
    run(async {
        for n in 0..COUNT {
            let sent = to.publish_async(&n.to_le_bytes()).await;
            assert_eq!(sent.unwrap().get(), n);
            thread::sleep(Duration::from_micros(random.below(200)));
            if n % 3 == 0 {
                other.signal(Signal::SIGSTOP);
                thread::sleep(Duration::from_micros(random.below(2000)));
                other.signal(Signal::SIGCONT);
            }
            let since = Instant::now();
            assert_eq!(number(from.recv_async().await.unwrap().as_bytes()), n);
            assert!(since.elapsed() < PROMPT, "a wake-up was lost at {n}");
        }
    });
}

fn respond(name: &str) {
    let bus = Bus::open_default().unwrap();
    let mut responder = bus.responder(Topic::named(name)).unwrap();
    say("serves");
    run(async {
        loop {
            let request = responder.recv_async().await.unwrap();
            match request.payload() {
                b"hold" => {
                    say("holds");
                    end_with_the_test();
                    tokio::time::sleep(LIMIT).await;
                }
                payload => {
                    let reply = [payload, b"!"].concat();
                    request.reply(&reply).unwrap();
                }
            }
        }
    });
}

#[test]
fn requests_are_answered_refused_and_given_up() {
    let scene = Scene::new("requests");
    let bus = scene.open();
    let mut requester = bus.requester(Topic::new("greet")).unwrap();
    run(async {
        let nobody = requester.request_async(b"hello", LIMIT).await.unwrap_err();
        assert!(matches!(nobody, RequestError::NoResponder { .. }), "{nobody}");
        let mut other = scene.start("responder", "greet");
        other.expect("serves");
        for round in 0..30 {
            let question = format!("hello {round}");
            let since = Instant::now();
            let reply = requester.request_async(question.as_bytes(), LIMIT).await.unwrap();
            assert_eq!(&*reply, format!("{question}!").as_bytes());
            assert!(since.elapsed() < PROMPT, "a wake-up was lost in round {round}");
            // Given up at some point: what comes of it is passed over by the next one.
            let _ = timeout(Duration::from_micros(round * 10), requester.request_async(b"in vain", LIMIT)).await;
        }
        let since = Instant::now();
        let late = requester.request_async(b"hold", Duration::from_millis(100)).await.unwrap_err();
        assert!(matches!(late, RequestError::DeadlineExceeded { .. }), "{late}");
        assert!((Duration::from_millis(100)..PROMPT).contains(&since.elapsed()), "{:?}", since.elapsed());
        other.expect("holds");
        let since = Instant::now();
        let (waiting, ()) = tokio::join!(requester.request_async(b"more", LIMIT), async { other.kill() });
        assert!(matches!(waiting, Err(RequestError::NoResponder { .. })), "{waiting:?}");
        assert!(since.elapsed() < PROMPT, "its death was not noticed");
    });
}

#[test]
fn streams_have_the_iterators_items() {
    let scene = Scene::new("streams");
    let bus = scene.open();
    let topic = small("stream.a").full(Full::Overwrite);
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = bus.subscriber(topic).open().unwrap();
    let mut wild = bus.wildcard::<[u8]>("stream.*").open().unwrap();
    run(async {
        publisher.publish(b"first").unwrap();
        assert_eq!(next(&mut subscriber.stream()).await.unwrap().unwrap().as_bytes(), b"first");
        // A stream that was dropped has taken nothing with it.
        publisher.publish(b"second").unwrap();
        drop(subscriber.stream());
        let mut stream = subscriber.stream();
        assert_eq!(next(&mut stream).await.unwrap().unwrap().as_bytes(), b"second");
        for n in 0..20_000u64 {
            publisher.publish(&n.to_le_bytes()).unwrap();
        }
        let lagged = next(&mut stream).await.unwrap().map(|_| ()).unwrap_err();
        let RecvError::Lagged { from, to } = lagged else { panic!("{lagged}") };
        assert_eq!(from.get(), 2);
        let message = next(&mut stream).await.unwrap().unwrap();
        assert_eq!((message.sequence(), number(message.as_bytes())), (to, to.get() - 2));
        // Which may go to another task, whatever becomes of the stream.
        drop(stream);
        tokio::spawn(async move { assert_eq!(message.len(), 8) }).await.unwrap();
        let mut stream = wild.stream();
        let lagged = next(&mut stream).await.unwrap().map(|_| ()).unwrap_err();
        assert!(matches!(lagged, WildcardError::Lagged { .. }), "{lagged}");
        let message = next(&mut stream).await.unwrap().unwrap();
        assert_eq!((message.topic(), message.sequence()), ("stream.a", to));
    });
}

/// Two at a time: the third comes when another task settles one.
#[test]
fn a_stream_of_deliveries_is_settled_by_any_task() {
    let scene = Scene::new("deliveries");
    let bus = scene.open();
    let mut publisher = bus.publisher(small("deliveries")).unwrap();
    let group = bus.consumer(small("deliveries"), "group").options(GroupOptions::new()).max_in_flight(2);
    let mut stream = group.open().unwrap().into_stream();
    for n in 0..10u64 {
        publisher.publish(&n.to_le_bytes()).unwrap();
    }
    run(async {
        let (mut held, mut tasks) = (Vec::new(), Vec::new());
        for n in 0..10 {
            let since = Instant::now();
            let job = next(&mut stream).await.unwrap().unwrap();
            assert!(since.elapsed() < PROMPT, "a wake-up was lost at {n}");
            assert_eq!((number(job.as_bytes()), job.attempt()), (n, 1));
            held.push(job);
            if held.len() == 2 {
                assert!(timeout(Duration::from_millis(5), next(&mut stream)).await.is_err(), "that is the third");
                let job = held.remove(0);
                tasks.push(tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    job.ack().unwrap();
                }));
            }
        }
        for task in tasks {
            task.await.unwrap();
        }
        bus.remove_topic("deliveries", true).unwrap();
        assert_eq!(next(&mut stream).await.unwrap().map(|_| ()), Err(RecvError::Gone(GoneReason::Removed)));
        assert!(next(&mut stream).await.is_none());
    });
}

/// What comes due by itself rings no bell.
#[test]
fn a_delayed_redelivery_comes_in_time() {
    let scene = Scene::new("delayed");
    let bus = scene.open();
    let mut publisher = bus.publisher(small("delayed")).unwrap();
    let mut consumer = bus.consumer(small("delayed"), "group").options(GroupOptions::new()).open().unwrap();
    publisher.publish(b"a").unwrap();
    publisher.publish(b"b").unwrap();
    run(async {
        assert_eq!(consumer.recv_batch_async(0).await.unwrap().len(), 0);
        let batch = consumer.recv_batch_async(10).await.unwrap();
        assert_eq!(batch.len(), 2);
        let since = Instant::now();
        batch.nack_after(Duration::from_millis(200)).unwrap();
        let again = consumer.recv_async().await.unwrap();
        assert_eq!(again.attempt(), 2);
        assert!((Duration::from_millis(200)..PROMPT).contains(&since.elapsed()), "{:?}", since.elapsed());
        again.ack().unwrap();
    });
}

/// Calls nobody, and panics.
struct Panics;

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        panic!("as it should: the test of wakers that panic");
    }
}

#[test]
fn a_waker_that_panics_harms_no_other() {
    let scene = Scene::new("panics");
    let bus = scene.open();
    let mut publisher = bus.publisher(small("panics")).unwrap();
    let mut broken = bus.subscriber(small("panics")).open().unwrap();
    let mut sound = bus.subscriber(small("panics")).open().unwrap();
    for round in 0..10u64 {
        let waker = Arc::new(Panics).into();
        let mut waiting = Box::pin(broken.recv_async());
        assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        let since = thread::scope(|scope| {
            let publish = || {
                thread::sleep(Duration::from_millis(5));
                publisher.publish(&round.to_le_bytes()).unwrap();
                Instant::now()
            };
            let publishing = scope.spawn(publish);
            // The message comes when this task has long looked: it takes a call to go on.
            assert_eq!(number(run(sound.recv_async()).unwrap().as_bytes()), round);
            publishing.join().unwrap()
        });
        assert!(since.elapsed() < PROMPT, "a wake-up was lost in round {round}");
        let Poll::Ready(message) = waiting.as_mut().poll(&mut Context::from_waker(&waker)) else {
            panic!("there is a message")
        };
        assert_eq!(number(message.unwrap().as_bytes()), round);
    }
}

#[test]
fn tasks_that_wait_take_no_processor() {
    let scene = Scene::new("idle");
    let _bus = scene.open();
    let mut other = scene.start("idle", "");
    let used: u64 = other.line_within(2 * LIMIT).parse().unwrap();
    assert!(used < 90, "{used} ms of processor time in 3 s");
}

fn idle() {
    end_with_the_test();
    let bus = Bus::open_default().unwrap();
    let topic = |n: u64| Topic::<u64>::named(format!("idle.{n}")).messages(16).exclusive();
    let _publishers: Vec<Publisher<u64>> = (0..300).map(|n| bus.publisher(topic(n)).unwrap()).collect();
    let handles: Vec<Subscriber<u64>> = (0..300).map(|n| bus.subscriber(topic(n)).open().unwrap()).collect();
    Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
        for mut handle in handles {
            tokio::spawn(async move { handle.recv_async().await.map(|_| ()) });
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let begin = used();
        tokio::time::sleep(Duration::from_secs(3)).await;
        say(&(used() - begin).as_millis().to_string());
        tokio::time::sleep(LIMIT).await;
    });
}

/// Tasks of a runtime with several threads move from one to the other, with whatever they hold.
#[test]
fn tasks_may_move_between_threads() {
    let scene = Scene::new("moves");
    let bus = scene.open();
    let mut publisher = bus.publisher(small("moves")).unwrap();
    let mut subscriber = bus.subscriber(small("moves")).open().unwrap();
    let mut consumer = bus.consumer(small("moves"), "group").options(GroupOptions::new()).open().unwrap();
    run(async move {
        let task = tokio::spawn(async move {
            let message = subscriber.recv_async().await.unwrap();
            let delivery = consumer.recv_async().await.unwrap();
            tokio::task::yield_now().await;
            assert_eq!((message.as_bytes(), delivery.as_bytes()), (&b"x"[..], &b"x"[..]));
            delivery.ack().unwrap();
        });
        publisher.publish_async(b"x").await.unwrap();
        task.await.unwrap();
    });
}
