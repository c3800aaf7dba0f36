//! Forked children with copies of every kind of handle: a clear error at first use, never a shared cursor, and no trace
//! of them when they drop what is not theirs.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{LIMIT, MODES, Scene, of_mode, raw, receive};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use shmbus::{Bus, Channel, ConnectError, Mode, OpenError, PublishError, RecvError, Topic};

/// Runs `body` in a forked child; what it finds wrong fails the test.
fn in_a_child(body: impl FnOnce()) {
    // SAFETY: the other threads are libtest's, which hold no lock that the body needs: it prints nothing but through
    // a panic, after which the child ends at once.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
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
        let mut publisher = bus.publisher(topic(mode)).unwrap();
        let mut subscriber = bus.subscriber(topic(mode)).open().unwrap();
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
