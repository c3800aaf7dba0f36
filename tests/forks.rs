//! Forked children with copies of every kind of handle: a clear error at first use, never a shared cursor, and no trace
//! of them when they drop what is not theirs.

mod common;

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use common::{LIMIT, MODES, Scene, of_mode, raw, receive};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, alarm, fork};
use shmbus::{
    AckError, Bus, Channel, ConnectError, Delivery, Mode, OpenError, Outputs, PipelineError, Pollable, PublishError,
    RecvError, ReplyError, RequestError, SettleError, Start, Topic, Wait, WildcardError, wait_any,
};

/// Runs `body` in a forked child; what it finds wrong fails the test.
fn in_a_child(body: impl FnOnce()) {
    // SAFETY: the other threads are libtest's, which hold no lock that the body needs: it prints nothing but through
    // a panic, after which the child ends at once.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            // Should it hang, that is its end.
            alarm::set(LIMIT.as_secs() as u32);
            let code = i32::from(catch_unwind(AssertUnwindSafe(body)).is_err());
            // SAFETY: ends the child without the handlers and buffers of its parent.
            unsafe { libc_exit(code) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, 0) => {}
            other => panic!("the child failed: {other:?}"),
        },
    }
}

unsafe extern "C" {
    #[link_name = "_exit"]
    fn libc_exit(code: i32) -> !;
}

/// The words of the panic that `use_it` ends with.
fn panic_of<R>(use_it: impl FnOnce() -> R) -> String {
    std::panic::set_hook(Box::new(|_| {}));
    let panic = catch_unwind(AssertUnwindSafe(|| drop(use_it()))).expect_err("it was usable");
    panic.downcast_ref::<String>().cloned().unwrap_or_default()
}

fn topic(mode: Mode) -> Topic<[u8]> {
    raw(mode, "forks").messages(16).bytes(64 << 10)
}

#[test]
fn a_childs_copies_are_refused_and_change_nothing() {
    let scene = Scene::new("forks");
    let bus = scene.open();
    let parent = std::process::id();
    for mode in MODES {
        let mut publisher = bus.publisher(topic(mode)).unwrap();
        let mut subscriber = bus.subscriber(topic(mode)).open().unwrap();
        publisher.publish(b"before").unwrap();
        in_a_child(|| {
            let refused = |error: PublishError| {
                assert!(matches!(error, PublishError::Forked { opened_by, .. } if opened_by == parent), "{error}")
            };
            refused(publisher.publish(b"child").unwrap_err());
            refused(publisher.try_publish(&[7; 3000]).unwrap_err());
            refused(publisher.publish_timeout(b"child", LIMIT).unwrap_err());
            refused(publisher.publish_batch([&b"a"[..], b"b"]).unwrap_err());
            refused(publisher.loan_bytes(8).map(drop).unwrap_err());
            let refused = |error: RecvError| {
                assert!(matches!(error, RecvError::Forked { opened_by, .. } if opened_by == parent), "{error}")
            };
            refused(subscriber.try_recv().map(drop).unwrap_err());
            refused(subscriber.recv().map(drop).unwrap_err());
            refused(subscriber.recv_timeout(LIMIT).map(drop).unwrap_err());
            let error = bus.topics().unwrap_err();
            assert!(matches!(error, OpenError::Connect(ConnectError::Forked { opened_by, .. }) if opened_by == parent));
        });
        assert_eq!(receive(&mut subscriber), (0, b"before".to_vec()), "{mode}");
        // What a child drops is its parent's.
        let mut kept = Some((publisher, subscriber, bus.clone()));
        in_a_child(|| drop(kept.take()));
        let (mut publisher, mut subscriber, bus) = kept.unwrap();
        let status = bus.topic(topic(mode).name()).unwrap();
        assert_eq!((status.publishers.len(), status.subscribers.len()), (1, 1), "{mode}");
        for sequence in 1..40 {
            assert_eq!(publisher.publish_timeout(b"after", LIMIT).unwrap().get(), sequence, "{mode}");
            assert_eq!(receive(&mut subscriber), (sequence, b"after".to_vec()));
        }
    }
}

#[test]
fn a_childs_copy_of_a_loan_or_message_is_refused() {
    let scene = Scene::new("borrowed");
    let bus = scene.open();
    for mode in MODES {
        let topic = if mode == Mode::Many { topic(mode).envelope() } else { topic(mode) };
        let mut publisher = bus.publisher(topic.clone()).unwrap();
        let mut subscriber = bus.subscriber(topic).open().unwrap();
        for len in [8, 3000] {
            let mut loan = Some(publisher.loan_bytes(len).unwrap());
            loan.as_mut().unwrap().fill(1);
            in_a_child(|| {
                let mut loan = loan.take().unwrap();
                assert!(panic_of(|| loan[0]).contains("loan belongs to process"));
                assert!(panic_of(|| loan.fill(2)).contains("loan belongs to process"));
                assert!(matches!(loan.publish(), Err(PublishError::Forked { .. })));
            });
            loan.unwrap().publish().unwrap();
            let message = subscriber.recv_timeout(LIMIT).unwrap();
            in_a_child(|| assert!(panic_of(|| message[0]).contains("message belongs to process")));
            assert_eq!(*message, vec![1; len]);
        }
    }
}

#[test]
fn a_child_opens_handles_of_its_own_and_its_child_cannot_use_them() {
    let scene = Scene::new("own");
    let bus = scene.open();
    let topic = topic(Mode::Many);
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut subscriber = bus.subscriber(topic.clone()).open().unwrap();
    in_a_child(|| {
        let own: Bus = scene.open();
        let mut mine = own.publisher(topic.clone()).unwrap();
        assert_eq!(mine.publish(b"child").unwrap().get(), 0);
        assert!(matches!(publisher.publish(b"x"), Err(PublishError::Forked { .. })), "the old one stays foreign");
        in_a_child(|| assert!(matches!(mine.publish(b"x"), Err(PublishError::Forked { .. }))));
        assert_eq!(mine.publish(b"child").unwrap().get(), 1);
    });
    publisher.publish(b"parent").unwrap();
    for (sequence, payload) in [&b"child"[..], b"child", b"parent"].into_iter().enumerate() {
        assert_eq!(receive(&mut subscriber), (sequence as u64, payload.to_vec()));
    }
}

#[test]
fn a_channel_is_shared_by_forking_and_its_ends_are_not() {
    let topic = of_mode(Mode::Channel, Topic::<[u8]>::new("alone").messages(16).bytes(4096));
    let channel = Channel::create(topic).unwrap();
    let mut receiver = channel.subscriber().unwrap();
    in_a_child(|| {
        assert!(matches!(receiver.try_recv().map(drop), Err(RecvError::Forked { .. })));
        let mut sender = channel.publisher().unwrap();
        assert_eq!(sender.publish(b"from the child").unwrap().get(), 0);
        in_a_child(|| assert!(matches!(sender.publish(b"x"), Err(PublishError::Forked { .. }))));
        std::mem::forget(sender);
    });
    assert_eq!(receive(&mut receiver), (0, b"from the child".to_vec()));
}

/// How many consumers, leases, publishers, subscribers and inboxes the bus has.
fn census(bus: &Bus) -> [u64; 5] {
    let topics = bus.topics().unwrap();
    let groups = || topics.iter().flat_map(|topic| &topic.groups);
    [
        groups().map(|group| group.consumers.len() as u64).sum(),
        groups().map(|group| group.in_flight).sum(),
        topics.iter().map(|topic| topic.publishers.len() as u64).sum(),
        topics.iter().map(|topic| topic.subscribers.len() as u64).sum(),
        topics.iter().filter(|topic| topic.name.starts_with("_inbox.")).count() as u64,
    ]
}

#[test]
fn a_childs_consumer_and_its_leases_are_refused_and_stay() {
    let scene = Scene::new("consumers");
    let bus = scene.open();
    for mode in [Mode::Exclusive, Mode::Many] {
        let mut publisher = bus.publisher(topic(mode)).unwrap();
        let mut consumer = bus.consumer(topic(mode), "g").start(Start::Oldest).open().unwrap();
        let first = publisher.publish(b"first").unwrap();
        publisher.publish(b"second").unwrap();
        let mut kept = consumer.recv_timeout(LIMIT).unwrap().keep();
        // From now on the publisher knows the group.
        assert!(matches!(publisher.wait_settled("g", first, Duration::ZERO), Err(SettleError::TimedOut)));
        in_a_child(|| {
            let refused = |error: AckError| assert!(matches!(error, AckError::Forked { .. }), "{error}");
            refused(consumer.ack(&kept).unwrap_err());
            refused(consumer.nack(&kept).unwrap_err());
            refused(consumer.reject(&kept, "child").unwrap_err());
            refused(consumer.extend(&mut kept, LIMIT).unwrap_err());
            let refused = |error: RecvError| assert!(matches!(error, RecvError::Forked { .. }), "{error}");
            refused(consumer.try_recv().map(drop).unwrap_err());
            refused(consumer.recv().map(drop).unwrap_err());
            refused(consumer.recv_batch(2).map(drop).unwrap_err());
            let error = publisher.wait_settled("g", first, LIMIT).unwrap_err();
            assert!(matches!(error, SettleError::Forked { .. }), "{error}");
        });
        let mut second = Some(consumer.recv_timeout(LIMIT).unwrap());
        in_a_child(|| {
            let delivery = second.take().unwrap();
            assert_eq!(*delivery, b"second"[..], "a private copy");
            assert!(matches!(delivery.ack(), Err(AckError::Forked { .. })));
        });
        in_a_child(|| drop(second.take()));
        let second = second.unwrap().keep();
        let before = census(&bus);
        let mut copied = Some(consumer);
        in_a_child(|| drop(copied.take()));
        let mut consumer = copied.unwrap();
        assert_eq!(census(&bus), before, "{mode}");
        consumer.ack(&kept).unwrap();
        consumer.ack(&second).unwrap();
        publisher.wait_settled("g", first, LIMIT).unwrap();
    }
}

#[test]
fn a_childs_pipeline_wildcard_and_requests_are_refused_and_stay() {
    let scene = Scene::new("patterns");
    let bus = scene.open();
    let (input, service) = (topic(Mode::Many), || Topic::<[u8]>::new("service"));
    let mut publisher = bus.publisher(input.clone()).unwrap();
    let mut pipeline = bus.pipeline(input.clone(), "p", Topic::<[u8]>::new("out")).start(Start::Oldest).open().unwrap();
    let mut wildcard = bus.wildcard::<[u8]>("forks.*").wait(Wait::Park).open().unwrap();
    let mut responder = bus.responder(service()).unwrap();
    let mut requester = bus.requester(service()).unwrap();
    publisher.publish(b"input").unwrap();
    let before = census(&bus);
    in_a_child(|| {
        let error = pipeline.step(|_, _| panic!("an input of its parent's")).unwrap_err();
        assert!(matches!(error, PipelineError::Recv(RecvError::Forked { .. })), "{error}");
        assert_eq!(wait_any(&mut [&mut wildcard], Some(LIMIT)), Some(0));
        let refused = |error: WildcardError| {
            assert!(matches!(error, WildcardError::Connect(ConnectError::Forked { .. })), "{error}");
        };
        refused(wildcard.try_recv().map(drop).unwrap_err());
        refused(wildcard.recv().map(drop).unwrap_err());
        let error = requester.request(b"child", LIMIT).unwrap_err();
        assert!(matches!(error, RequestError::Inbox(RecvError::Forked { .. })), "{error}");
        let error = responder.recv().map(drop).unwrap_err();
        assert!(matches!(error, RecvError::Forked { .. }), "{error}");
    });
    let mut copied = Some((pipeline, wildcard, requester, responder));
    in_a_child(|| drop(copied.take()));
    let (mut pipeline, mut wildcard, mut requester, mut responder) = copied.unwrap();
    assert_eq!(census(&bus), before);
    assert_eq!(**wildcard.recv_timeout(LIMIT).unwrap(), b"input"[..]);
    let copy = |input: &Delivery<'_, [u8]>, outputs: &mut Outputs<[u8]>| {
        outputs.push(input);
        Ok(())
    };
    assert!(pipeline.step_timeout(LIMIT, copy).unwrap());
    std::thread::scope(|scope| {
        let reply = scope.spawn(|| requester.request(b"request", LIMIT).unwrap());
        let mut incoming = Some(responder.recv_timeout(LIMIT).unwrap());
        in_a_child(|| {
            let error = incoming.take().unwrap().reply(b"child").unwrap_err();
            assert!(matches!(error, ReplyError::Open(OpenError::Connect(ConnectError::Forked { .. }))), "{error}");
        });
        incoming.unwrap().reply(b"parent").unwrap();
        assert_eq!(*reply.join().unwrap(), b"parent"[..]);
    });
}

#[test]
fn a_childs_owned_deliveries_are_refused_whoever_had_the_lock() {
    let scene = Scene::new("forks");
    let bus = scene.open();
    let parent = std::process::id();
    let topic = topic(Mode::Many);
    let mut publisher = bus.publisher(topic.clone()).unwrap();
    let mut jobs = bus.consumer(topic, "g").wait(Wait::Spin).open().unwrap().into_iter();
    publisher.publish(b"job").unwrap();
    let mut job = Some(jobs.next().unwrap().unwrap());
    std::thread::scope(|scope| {
        // Looks, and so has the lock, most of the time.
        let receiving = scope.spawn(move || jobs.next().unwrap().unwrap().to_vec());
        for _ in 0..20 {
            in_a_child(|| {
                let job = job.take().unwrap();
                assert_eq!(*job, *b"job", "a private copy");
                let refused = job.ack().unwrap_err();
                assert!(matches!(refused, AckError::Forked { opened_by, .. } if opened_by == parent), "{refused}");
            });
        }
        publisher.publish(b"last").unwrap();
        assert_eq!(receiving.join().unwrap(), b"last");
    });
    job.unwrap().ack().unwrap();
}

/// The threads that sleep for a parent's event loop are not there in a child, and a child's own waiting is not its parent's.
#[test]
fn a_childs_event_loop_is_its_own() {
    let scene = Scene::new("loops");
    let bus = scene.open();
    let mut publisher = bus.publisher(topic(Mode::Many)).unwrap();
    let mut subscriber = bus.subscriber(topic(Mode::Many)).open().unwrap();
    let mut pollable = Some(Pollable::new().unwrap());
    assert!(pollable.as_mut().unwrap().arm(&mut [&mut subscriber]).unwrap());
    let readable = |pollable: &Pollable| {
        let mut fds = [nix::poll::PollFd::new(pollable.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, 700u16).unwrap() == 1
    };
    in_a_child(|| {
        let copy = pollable.as_mut().unwrap();
        assert!(copy.arm(&mut [&mut subscriber]).unwrap_err().to_string().contains("before a fork"));
        drop(pollable.take());
        let mut own = Pollable::new().unwrap();
        assert!(!own.arm(&mut [&mut subscriber]).unwrap(), "the error is something to receive");
        assert!(matches!(subscriber.try_recv(), Err(RecvError::Forked { .. })));
        let bus = scene.open();
        let mut mine = bus.subscriber(topic(Mode::Many)).open().unwrap();
        assert!(own.arm(&mut [&mut mine]).unwrap());
        bus.publisher(topic(Mode::Many)).unwrap().publish(b"child").unwrap();
        assert!(readable(&own));
        assert_eq!(mine.try_recv().unwrap().unwrap().as_bytes(), b"child");
    });
    assert!(readable(pollable.as_ref().unwrap()), "the child published");
    assert_eq!(receive(&mut subscriber), (0, b"child".to_vec()));
    assert!(pollable.as_mut().unwrap().arm(&mut [&mut subscriber]).unwrap());
    publisher.publish(b"parent").unwrap();
    assert!(readable(pollable.as_ref().unwrap()));
}
