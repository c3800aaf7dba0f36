//! Request and reply between processes: who dies, stays away or is late, and what the other side learns of it.

mod common;

use std::io::Write;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, Scene, await_that, end_with_the_test, hear, say};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::{Bus, Envelope, OpenError, Refusal, ReplyError, RequestError, Responder, Topic, Wait};

const TOPIC: Topic<[u8]> = Topic::new("service").messages(64).bytes(65_536);

/// Long enough for any reply, short enough to wait for.
const SOON: Duration = Duration::from_millis(50);

/// Plays the other processes of these tests; nothing to see when run by hand.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "echo" => echo(bus.responder(TOPIC).unwrap(), &arguments),
        "mute" => {
            let mut responder = bus.responder(TOPIC).unwrap();
            say("ready");
            let length = responder.recv().unwrap().payload().len();
            say(&format!("got {length}"));
            hear();
        }
        "asker" => {
            let mut requester = bus.requester(TOPIC).unwrap();
            say("ready");
            hear();
            let _ = requester.request(b"never answered", LIMIT);
        }
        "flood" => flood(&bus),
        other => panic!("unknown role {other}"),
    }
}

/// Replies with `prefix` and what it got.
fn echo(mut responder: Responder, prefix: &str) {
    responder.set_wait(Wait::Park);
    say("ready");
    loop {
        let request = responder.recv().unwrap();
        let reply = [prefix.as_bytes(), request.payload()].concat();
        assert!(request.deadline().is_some());
        // Requesters come and go.
        let _ = request.reply(&reply);
    }
}

/// Fills the only inbox with what nobody has asked for, faster than it is read.
fn flood(bus: &Bus) {
    end_with_the_test();
    let topics = bus.topics().unwrap();
    let inbox = topics.into_iter().find(|topic| topic.name.starts_with("_inbox.")).unwrap().name;
    let mut publisher = bus.publisher(Topic::<[u8]>::named(inbox).envelope()).unwrap();
    say("ready");
    loop {
        let _ = publisher.publish_batch([&b""[..]; 512]);
    }
}

fn inboxes(bus: &Bus) -> usize {
    bus.topics().unwrap().iter().filter(|topic| topic.name.starts_with("_inbox.")).count()
}

#[test]
fn replies_come_back_to_who_asked() {
    let scene = Scene::new("replies");
    let mut responder = scene.start("echo", "re: ");
    responder.expect("ready");
    let askers: Vec<_> = (0..4).map(|asker| (asker, scene.open())).collect();
    thread::scope(|scope| {
        for (asker, bus) in askers {
            scope.spawn(move || {
                let mut requester = bus.requester(TOPIC).unwrap();
                for number in 0..100 {
                    let text = format!("{asker}.{number}");
                    let reply = requester.request(text.as_bytes(), LIMIT).unwrap();
                    assert_eq!(&*reply, format!("re: {text}").as_bytes());
                }
            });
        }
    });
    let bus = scene.open();
    await_that("the inboxes' end", || inboxes(&bus) == 0);
}

#[test]
fn without_a_responder_the_answer_is_immediate() {
    let scene = Scene::new("nobody");
    let bus = scene.open();
    let mut requester = bus.requester(TOPIC).unwrap();
    let since = Instant::now();
    let error = requester.request(b"hello?", LIMIT).unwrap_err();
    assert!(matches!(error, RequestError::NoResponder { .. }), "{error}");
    assert!(since.elapsed() < Duration::from_secs(1), "took {:?}", since.elapsed());
    let responder = bus.responder(TOPIC).unwrap();
    assert!(matches!(requester.request(b"hello?", SOON), Err(RequestError::DeadlineExceeded { .. })));
    drop(responder);
    assert!(matches!(requester.request(b"hello?", LIMIT), Err(RequestError::NoResponder { .. })));
}

#[test]
fn a_deadline_is_kept_and_late_replies_are_passed_over() {
    let scene = Scene::new("late");
    let bus = scene.open();
    let mut requester = bus.requester(TOPIC).unwrap();
    let mut responder = bus.responder(TOPIC).unwrap();
    let since = Instant::now();
    let error = requester.request(b"first", Duration::from_secs(5) / 50).unwrap_err();
    assert!(matches!(error, RequestError::DeadlineExceeded { .. }), "{error}");
    assert!(since.elapsed() >= Duration::from_millis(100) && since.elapsed() < Duration::from_secs(5));
    // Its time to live is over, so no responder works on it in vain.
    assert!(responder.try_recv().unwrap().is_none());
    let answering = thread::spawn(move || {
        let late = responder.recv_timeout(LIMIT).unwrap();
        assert_eq!(late.payload(), b"second");
        thread::sleep(2 * SOON);
        late.reply(b"to the second").unwrap();
        let third = responder.recv_timeout(LIMIT).unwrap();
        assert_eq!(third.payload(), b"third");
        third.reply(b"to the third").unwrap();
    });
    assert!(matches!(requester.request(b"second", SOON), Err(RequestError::DeadlineExceeded { .. })));
    assert_eq!(&*requester.request(b"third", LIMIT).unwrap(), b"to the third");
    answering.join().unwrap();
}

#[test]
fn a_deadline_is_kept_while_others_fill_the_inbox() {
    let scene = Scene::new("flood");
    let bus = scene.open();
    let mut mute = scene.start("mute", "");
    mute.expect("ready");
    let mut requester = bus.requester(TOPIC).unwrap();
    let mut floods = [scene.start("flood", ""), scene.start("flood", "")];
    floods.iter_mut().for_each(|flood| flood.expect("ready"));
    let start = Instant::now();
    for _ in 0..5 {
        let outcome = requester.request(b"never answered", SOON);
        assert!(matches!(outcome, Err(RequestError::DeadlineExceeded { .. })), "{outcome:?}");
    }
    assert!(start.elapsed() < SOON * 5 + LIMIT / 10, "{:?}", start.elapsed());
}

#[test]
fn the_last_responders_death_ends_the_wait() {
    let scene = Scene::new("death");
    let bus = scene.open();
    let mut requester = bus.requester(TOPIC).unwrap();
    requester.set_wait(Wait::Park);
    let mut mute = scene.start("mute", "");
    mute.expect("ready");
    let asking = thread::spawn(move || {
        let since = Instant::now();
        (requester.request(b"four", LIMIT).unwrap_err(), since.elapsed())
    });
    mute.expect("got 4");
    let killed = Instant::now();
    mute.kill();
    let (error, _) = asking.join().unwrap();
    assert!(matches!(error, RequestError::NoResponder { .. }), "{error}");
    assert!(killed.elapsed() < Duration::from_millis(900), "took {:?}", killed.elapsed());
}

#[test]
fn the_first_of_several_replies_counts() {
    let scene = Scene::new("several");
    let mut mute = scene.start("mute", "");
    mute.expect("ready");
    let mut echo = scene.start("echo", "");
    echo.expect("ready");
    let bus = scene.open();
    let mut requester = bus.requester(TOPIC).unwrap();
    assert_eq!(&*requester.request(b"both get it", LIMIT).unwrap(), b"both get it");
    mute.expect("got 11");
    mute.kill();
    assert_eq!(&*requester.request(b"one is left", LIMIT).unwrap(), b"one is left");
}

#[test]
fn a_dead_requester_leaves_no_inbox_and_delays_no_responder() {
    let scene = Scene::new("requester");
    let bus = scene.open();
    let mut responder = bus.responder(TOPIC).unwrap();
    for signal in [Signal::SIGKILL, Signal::SIGSTOP] {
        let mut asker = scene.start("asker", "");
        asker.expect("ready");
        assert_eq!(inboxes(&bus), 1);
        asker.tell("go");
        let request = responder.recv_timeout(LIMIT).unwrap();
        asker.signal(signal);
        if signal == Signal::SIGKILL {
            await_that("the inbox's end", || inboxes(&bus) == 0);
            assert!(matches!(request.reply(b"too late"), Err(ReplyError::Gone)));
        } else {
            let since = Instant::now();
            request.reply(b"to one who is stopped").unwrap();
            assert!(since.elapsed() < Duration::from_secs(1));
        }
        asker.kill();
        await_that("the inbox's end", || inboxes(&bus) == 0);
    }
}

#[test]
fn an_inbox_that_would_have_its_responder_wait_does_not() {
    let scene = Scene::new("trap");
    let bus = scene.open();
    let inbox = || Topic::<[u8]>::named("_inbox.trap").messages(16).envelope();
    bus.create(&inbox()).unwrap();
    let _never_reads = bus.subscriber(inbox()).open().unwrap();
    let mut echo = scene.start("echo", "");
    echo.expect("ready");
    let mut trapper = bus.publisher(TOPIC.envelope()).unwrap();
    let trap = Envelope::new().header("reply-to", b"_inbox.trap").header("correlation-id", b"1");
    let trap = trap.header("deadline-ns", b"1");
    (0..60).for_each(|_| assert!(trapper.publish_with(b"", &trap).is_ok()));
    let reply = bus.requester(TOPIC).unwrap().request(b"honest", LIMIT).unwrap();
    assert_eq!(&*reply, b"honest");
}

#[test]
fn an_inbox_that_no_requester_makes_gets_no_reply() {
    let scene = Scene::new("monster");
    let bus = scene.open();
    let mut responder = bus.responder(TOPIC).unwrap();
    let mut publisher = bus.publisher(TOPIC.envelope()).unwrap();
    let inbox = || Topic::<[u8]>::named("_inbox.monster").messages(16).envelope();
    for monster in [inbox().bytes(65 << 20), inbox().messages(128), inbox().exclusive()] {
        bus.create(&monster).unwrap();
        let ask = Envelope::new().header("reply-to", b"_inbox.monster").header("correlation-id", b"1");
        publisher.publish_with(b"", &ask).unwrap();
        let refused = responder.recv_timeout(LIMIT).unwrap().reply(b"?").unwrap_err();
        assert!(matches!(refused, ReplyError::Open(OpenError::Refused(Refusal::Options { .. }))), "{refused}");
        // It has not even asked for a place there.
        assert_eq!(bus.topic("_inbox.monster").unwrap().publishers.len(), 0);
        bus.remove_topic("_inbox.monster", false).unwrap();
    }
    let refused = bus.requester_for(TOPIC, 65 << 20).err().unwrap();
    assert!(matches!(refused, OpenError::Refused(Refusal::Options { .. })), "{refused}");
}

#[test]
fn what_is_no_request_is_not_replied_to() {
    let scene = Scene::new("forged");
    let bus = scene.open();
    let mut responder = bus.responder(TOPIC).unwrap();
    let mut publisher = bus.publisher(TOPIC).unwrap();
    let forged = Envelope::new().header("reply-to", b"service").header("correlation-id", b"1");
    publisher.publish_with(b"forged", &forged).unwrap();
    publisher.publish(b"plain").unwrap();
    for _ in 0..2 {
        assert!(matches!(responder.recv_timeout(LIMIT).unwrap().reply(b"?"), Err(ReplyError::NoAddress)));
    }
    bus.create(&Topic::<[u8]>::new("bare")).unwrap();
    let refused = bus.requester(Topic::new("bare")).err().unwrap();
    assert!(matches!(refused, OpenError::Refused(Refusal::Options { .. })), "{refused}");
    assert!(bus.responder(Topic::new("bare")).is_err());
}

#[test]
fn the_command_line_asks_and_replies() {
    let scene = Scene::new("cli");
    let bus = scene.open();
    let nobody = scene.shmbus(&["request", "upper"]).output().unwrap();
    assert_eq!((nobody.status.code(), nobody.stdout.len()), (Some(1), 0));
    let said = String::from_utf8(nobody.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("nobody responds on topic \"upper\""), "{said}");
    let mut responder = scene.shmbus(&["respond", "upper", "--exec", "tr a-z A-Z"]).spawn().unwrap();
    await_that("the responder", || bus.topic("upper").is_ok_and(|topic| topic.subscribers.len() == 1));
    let mut asking = scene.shmbus(&["request", "upper"]).stdin(Stdio::piped()).spawn().unwrap();
    asking.stdin.take().unwrap().write_all(b"hello").unwrap();
    let asked = asking.wait_with_output().unwrap();
    assert_eq!((asked.status.code(), asked.stdout), (Some(0), b"HELLO".to_vec()));
    kill(Pid::from_raw(responder.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(responder.wait().unwrap().code(), Some(128 + Signal::SIGTERM as i32));
    let _mute = bus.responder(Topic::new("upper")).unwrap();
    let late = scene.shmbus(&["request", "upper", "--timeout", "50ms"]).output().unwrap();
    assert_eq!(late.status.code(), Some(1));
    assert!(String::from_utf8(late.stderr).unwrap().contains("no reply on topic \"upper\" within 50ms"));
}

/// What a failed opening had created is gone: a program that tries again and again uses nothing up.
#[test]
fn a_requester_that_cannot_be_opened_leaves_no_inbox() {
    let scene = Scene::new("no-inbox");
    let bus = scene.open();
    // As many as an inbox has readers.
    let spies: Vec<_> = (0..8).map(|_| bus.wildcard::<[u8]>("_inbox.*").open().unwrap()).collect();
    for _ in 0..3 {
        assert!(matches!(bus.requester(TOPIC).err(), Some(OpenError::Refused(Refusal::Limit { .. }))));
        assert_eq!(inboxes(&bus), 0);
    }
    drop(spies);
    drop(bus.requester(TOPIC).unwrap());
}
