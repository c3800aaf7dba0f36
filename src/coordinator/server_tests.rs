//! Clients against a coordinator hosted on a thread: what one of them does or suffers, and that the others notice
//! nothing of it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::*;
use crate::client::control::{Control, IntroduceError};
use crate::coordinator::connection::Received;
use crate::coordinator::link::Incoming;
use crate::coordinator::protocol::{Answer, HandleRef, PROTOCOL_VERSION, Request, SegmentRef, StartAt, TopicInfo};
use crate::coordinator::registry::Registry;
use crate::coordinator::state::Event;
use crate::error::{ConnectError, OpenError};
use crate::os::socket::Peer;
use crate::shm::layout::BODY_OFFSET;
use crate::topic::{Mode, TopicOptions};

const DEADLINE: Duration = Duration::from_secs(20);

/// A hosted bus; it ends by itself when the test's connections are dropped.
struct Stage {
    directory: tempfile::TempDir,
    thread: JoinHandle<io::Result<()>>,
}

impl Stage {
    fn set() -> Stage {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::find("test", Some(directory.path())).unwrap();
        let (lock, listener) = (place.lock().unwrap().unwrap(), place.listen().unwrap());
        let server = Server::host(place, lock, listener).unwrap();
        Stage { directory, thread: std::thread::spawn(move || server.run()) }
    }

    fn place(&self) -> Place {
        Place::find("test", Some(self.directory.path())).unwrap()
    }

    fn connect(&self) -> Control {
        let socket = socket::connect(self.place().socket()).unwrap();
        Control::introduce(self.place(), crate::coordinator::random_u64(), socket, None, Instant::now() + DEADLINE)
            .unwrap()
    }

    /// A connection that says what a correct client never would.
    fn raw(&self) -> OwnedFd {
        socket::connect(self.place().socket()).unwrap()
    }
}

fn options(mode: Mode) -> TopicOptions {
    TopicOptions { mode, messages: 16, bytes: 4096, ..TopicOptions::default() }
}

fn open_publisher(control: &Control, topic: &str, mode: Mode) -> Result<HandleRef, OpenError> {
    let request =
        Request::OpenPublisher { topic: topic.to_owned(), schema: None, create: Some(options(mode)), identity: None };
    let (answer, fds) = control.request(&request)?;
    let Answer::PublisherOpened { info, slot, segments, .. } = answer else { panic!("{answer:?}") };
    assert_eq!(segments.len(), fds.len());
    Ok(HandleRef::Publisher { topic: info.id, slot })
}

fn open_subscriber(control: &Control, topic: &str) -> Result<(HandleRef, Vec<SegmentRef>), OpenError> {
    let request =
        Request::OpenSubscriber { topic: topic.to_owned(), schema: None, start: StartAt::Latest, droppable: false };
    let (answer, fds) = control.request(&request)?;
    let Answer::SubscriberOpened { info, cursor, segments, .. } = answer else { panic!("{answer:?}") };
    assert_eq!(segments.len(), fds.len());
    Ok((HandleRef::Subscriber { topic: info.id, cursor }, segments))
}

fn attached(control: &Control, name: &str) -> (usize, usize) {
    let request = Request::Status { topic: Some(name.to_owned()), after: None };
    let (Answer::Status { topics, .. }, _) = control.request(&request).unwrap() else { panic!() };
    (topics[0].publishers.len(), topics[0].subscribers.len())
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn say(socket: &OwnedFd, request: &Request) -> io::Result<()> {
    socket::send(socket.as_fd(), &postcard::to_stdvec(request).unwrap(), &[])
}

fn hello() -> Request {
    let token = crate::coordinator::random_u64();
    Request::Hello { protocol: PROTOCOL_VERSION, token, incarnation: None, holds: Vec::new() }
}

fn hears_hang_up(socket: &OwnedFd) -> bool {
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let deadline = Instant::now() + DEADLINE;
    loop {
        match socket::recv(socket.as_fd(), &mut buffer, 8) {
            Ok(packet) if packet.len == 0 => return true,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !socket::wait(socket.as_fd(), nix::poll::PollFlags::POLLIN, Some(deadline)).unwrap() {
                    return false;
                }
            }
            Err(_) => return true,
        }
    }
}

#[test]
fn an_arena_is_with_its_readers_before_its_publisher_may_write() {
    let stage = Stage::set();
    let (a, b) = (stage.connect(), stage.connect());
    open_publisher(&a, "t", Mode::Many).unwrap();
    let (subscriber, segments) = open_subscriber(&b, "t").unwrap();
    assert!(segments.contains(&SegmentRef::Arena(0)));
    let HandleRef::Publisher { topic, slot: 1 } = open_publisher(&a, "t", Mode::Many).unwrap() else { panic!() };
    assert!(b.arena(topic, 1).is_some(), "it is in the socket before the publisher was answered");
    assert!(b.arena(topic, 1).is_some(), "a second subscriber of the process gets it too");
    assert!(b.arena(topic, 2).is_none());
    b.release(subscriber);
    wait_for("the release", || attached(&a, "t") == (2, 0));
}

#[test]
fn the_arena_is_there_after_the_coordinator_has_gone() {
    let stage = Stage::set();
    let (a, b) = (stage.connect(), stage.connect());
    open_publisher(&a, "t", Mode::Many).unwrap();
    open_subscriber(&b, "t").unwrap();
    let HandleRef::Publisher { topic, slot } = open_publisher(&a, "t", Mode::Many).unwrap() else { panic!() };
    a.request(&Request::Stop).unwrap();
    stage.thread.join().unwrap().unwrap();
    assert!(b.arena(topic, slot).is_some());
}

#[test]
fn arenas_that_did_not_fit_in_the_socket_come_as_they_are_asked_for() {
    crate::os::process::raise_descriptor_limit().unwrap();
    let stage = Stage::set();
    let (a, b) = (stage.connect(), stage.connect());
    // More arenas than a socket takes while nobody reads, and fewer than the coordinator queues.
    let topics: Vec<String> = (0..8).map(|n| format!("t{n}")).collect();
    for topic in &topics {
        open_publisher(&a, topic, Mode::Many).unwrap();
        open_subscriber(&b, topic).unwrap();
    }
    for topic in &topics {
        for _ in 1..64 {
            open_publisher(&a, topic, Mode::Many).unwrap();
        }
    }
    for (topic, slot) in [(7, 63), (0, 1), (7, 62)] {
        assert!(b.arena(topic, slot).is_some(), "arena {slot} of topic {topic}");
    }
}

#[test]
fn an_arena_that_comes_late_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let place = Place::find("test", Some(directory.path())).unwrap();
    let listener = place.listen().unwrap();
    let slow_coordinator = std::thread::spawn(move || {
        let readable = |socket: &OwnedFd| {
            let deadline = Some(Instant::now() + DEADLINE);
            assert!(socket::wait(socket.as_fd(), nix::poll::PollFlags::POLLIN, deadline).unwrap());
        };
        readable(&listener);
        let mut connection = Connection::new(socket::accept(listener.as_fd()).unwrap(), Peer { pid: 0, uid: 0 });
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let options = options(Mode::Many);
        let geometry = crate::shm::layout::Geometry::from_options(&options).unwrap();
        let info = TopicInfo { id: 0, bus: 7, name: "t".to_owned(), generation: 0, options, geometry };
        let (cursor, position, sequence, asked, segments) = (0, 0, 0, 0, Vec::new());
        let answers = [
            Answer::Welcome { protocol: PROTOCOL_VERSION, incarnation: 1, bus: 7 },
            Answer::SubscriberOpened { info, cursor, position, sequence, asked, segments },
        ];
        for answer in answers {
            readable(&connection.as_fd().try_clone_to_owned().unwrap());
            assert!(matches!(connection.receive(&mut buffer), Received::Request(..)));
            connection.send(&answer, Vec::new()).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        connection.send(&Answer::ArenaAdded { topic: 0, slot: 1 }, vec![listener]).unwrap();
        connection
    });
    let socket = socket::connect(place.socket()).unwrap();
    let control = Control::introduce(place, 1, socket, None, Instant::now() + DEADLINE).unwrap();
    open_subscriber(&control, "t").unwrap();
    assert!(control.arena(0, 1).is_some());
    slow_coordinator.join().unwrap();
}

#[test]
fn who_waits_no_longer_to_be_let_in_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let place = Place::find("test", Some(directory.path())).unwrap();
    let (theirs, ours) = socket::pair().unwrap();
    let refused = Control::introduce(place, 1, theirs, None, Instant::now());
    assert!(matches!(refused, Err(IntroduceError::Failed(ConnectError::Timeout { .. }))));
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let mut said = std::iter::from_fn(|| {
        let packet = socket::recv(ours.as_fd(), &mut buffer, 0).unwrap();
        (packet.len > 0).then(|| Request::from_packet(&buffer[..packet.len]).unwrap().0)
    });
    assert!(matches!(said.next(), Some(Request::Hello { .. })));
    assert!(matches!(said.next(), Some(Request::Goodbye)));
    assert!(said.next().is_none());
}

#[test]
fn dropping_the_connection_releases_everything_at_once() {
    let stage = Stage::set();
    let (a, b) = (stage.connect(), stage.connect());
    open_publisher(&a, "x", Mode::Exclusive).unwrap();
    let refused = open_publisher(&b, "x", Mode::Exclusive).unwrap_err();
    assert!(matches!(refused, OpenError::Refused(Refusal::Taken { .. })), "{refused}");
    drop(a);
    wait_for("the publisher's place", || open_publisher(&b, "x", Mode::Exclusive).is_ok());
}

#[test]
fn a_participant_that_comes_back_keeps_its_handles() {
    let stage = Stage::set();
    let observer = stage.connect();
    let first = stage.raw();
    say(&first, &hello()).unwrap();
    wait_for("the welcome", || {
        socket::wait(first.as_fd(), nix::poll::PollFlags::POLLIN, Some(Instant::now() + DEADLINE)).unwrap()
    });
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let packet = socket::recv(first.as_fd(), &mut buffer, 0).unwrap();
    let Answer::Welcome { incarnation, .. } = postcard::from_bytes(&buffer[..packet.len]).unwrap() else { panic!() };
    let open = |topic: &str| Request::OpenPublisher {
        topic: topic.to_owned(),
        schema: None,
        create: Some(options(Mode::Exclusive)),
        identity: None,
    };
    say(&first, &open("kept")).unwrap();
    say(&first, &open("dropped")).unwrap();
    wait_for("both", || open_subscriber(&observer, "dropped").is_ok());
    let kept = HandleRef::Publisher { topic: 0, slot: 0 };
    let second = stage.raw();
    let back =
        Request::Hello { protocol: PROTOCOL_VERSION, token: 1, incarnation: Some(incarnation), holds: vec![kept] };
    say(&second, &back).unwrap();
    wait_for("the unnamed handle's release", || attached(&observer, "dropped").0 == 0);
    drop(first);
    assert_eq!(attached(&observer, "kept").0, 1, "the old connection no longer counts");
    drop(second);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(attached(&observer, "kept").0, 1, "we live, and may publish yet");
    let third = stage.raw();
    say(&third, &back).unwrap();
    // It goes without having read the welcome.
    say(&third, &Request::Goodbye).unwrap();
    drop(third);
    wait_for("the kept handle's release", || attached(&observer, "kept").0 == 0);
}

#[test]
fn garbage_hurts_only_whoever_sends_it() {
    let stage = Stage::set();
    let good = stage.connect();
    let sends: [&[u8]; 4] = [&[0xff; 64], &[0x80; 3], b"GET / HTTP/1.1\r\n\r\n", &[7]];
    for bytes in sends {
        let bad = stage.raw();
        socket::send(bad.as_fd(), bytes, &[]).unwrap();
        assert!(hears_hang_up(&bad), "{bytes:?}");
    }
    let with_descriptor = stage.raw();
    let fd = with_descriptor.as_fd();
    socket::send(fd, &postcard::to_stdvec(&hello()).unwrap(), &[fd]).unwrap();
    assert!(hears_hang_up(&with_descriptor));
    let stranger = stage.raw();
    say(&stranger, &Request::Hello { protocol: PROTOCOL_VERSION, token: 1, incarnation: Some(77), holds: vec![] })
        .unwrap();
    assert!(hears_hang_up(&stranger));
    let old = stage.raw();
    say(&old, &Request::Hello { protocol: PROTOCOL_VERSION + 1, token: 1, incarnation: None, holds: vec![] }).unwrap();
    assert!(hears_hang_up(&old));
    open_publisher(&good, "t", Mode::Many).unwrap();
}

#[test]
fn a_client_that_floods_and_never_reads_delays_nobody() {
    let stage = Stage::set();
    let good = stage.connect();
    let flooder = stage.raw();
    say(&flooder, &hello()).unwrap();
    let ask = Request::Status { topic: None, after: None };
    while say(&flooder, &ask).is_ok() {}
    let started = Instant::now();
    for n in 0..100 {
        open_publisher(&good, &format!("t{n}"), Mode::Exclusive).unwrap();
        let _ = say(&flooder, &ask);
    }
    assert!(started.elapsed() < DEADLINE);
}

#[test]
fn a_handle_given_back_while_another_thread_asks_is_given_back() {
    let stage = Stage::set();
    let control = stage.connect();
    for _ in 0..50 {
        let handle = open_publisher(&control, "x", Mode::Exclusive).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| control.request(&Request::Status { topic: None, after: None }).unwrap());
            scope.spawn(|| control.release(handle));
        });
    }
    assert_eq!(attached(&control, "x").0, 0, "closes are processed in order with requests");
}

#[test]
fn an_idle_hosted_bus_goes_and_takes_its_names_along() {
    let stage = Stage::set();
    drop(stage.connect());
    stage.thread.join().unwrap().unwrap();
    assert_eq!(std::fs::read_dir(stage.directory.path()).unwrap().count(), 0);
}

/// Environment variable that turns the test below into the child of the next one.
const CHILD_VARIABLE: &str = "SHMBUS_TEST_CHILD";

#[test]
fn child_that_holds_a_publisher() {
    let Some(directory) = std::env::var_os(CHILD_VARIABLE) else { return };
    let place = Place::find("test", Some(directory.as_ref())).unwrap();
    let socket = socket::connect(place.socket()).unwrap();
    let control = Control::introduce(place, 1, socket, None, Instant::now() + DEADLINE).unwrap();
    open_publisher(&control, "x", Mode::Exclusive).unwrap();
    std::thread::sleep(DEADLINE);
}

#[test]
fn a_dead_process_gives_its_place_up_and_a_stopped_one_keeps_it() {
    let stage = Stage::set();
    let control = stage.connect();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "coordinator::server::tests::child_that_holds_a_publisher"])
        .env(CHILD_VARIABLE, stage.directory.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the child's publisher", || open_subscriber(&control, "x").is_ok());
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let refused = open_publisher(&control, "x", Mode::Exclusive).unwrap_err();
    assert!(matches!(&refused, OpenError::Refused(Refusal::Taken { pid, .. }) if *pid == child.id()), "{refused}");
    child.kill().unwrap();
    wait_for("the dead one's place", || open_publisher(&control, "x", Mode::Exclusive).is_ok());
    child.wait().unwrap();
}

#[path = "server/group_tests.rs"]
mod groups;

/// Says something with descriptors, and hears the answer with its own.
fn ask(socket: &OwnedFd, request: &Request, fds: &[&OwnedFd]) -> (Answer, Vec<OwnedFd>) {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    socket::send(socket.as_fd(), &postcard::to_stdvec(request).unwrap(), &fds).unwrap();
    hear(socket)
}

fn hear(socket: &OwnedFd) -> (Answer, Vec<OwnedFd>) {
    let readable = nix::poll::PollFlags::POLLIN;
    assert!(socket::wait(socket.as_fd(), readable, Some(Instant::now() + DEADLINE)).unwrap());
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let packet = socket::recv(socket.as_fd(), &mut buffer, 8).unwrap();
    (postcard::from_bytes(&buffer[..packet.len]).unwrap(), packet.fds)
}

#[test]
fn the_end_of_a_lost_topic_is_told_once_and_only_where_it_was_asked_for() {
    let stage = Stage::set();
    let first = stage.raw();
    let (Answer::Welcome { incarnation, .. }, _) = ask(&first, &hello(), &[]) else { panic!() };
    let open = |topic: &str| Request::OpenPublisher {
        topic: topic.to_owned(),
        schema: None,
        create: Some(options(Mode::Exclusive)),
        identity: None,
    };
    let [(lost, lost_fds), (other, other_fds)] = ["lost", "other"].map(|topic| {
        let (Answer::PublisherOpened { info, .. }, fds) = ask(&first, &open(topic), &[]) else { panic!() };
        ask(&first, &Request::RemoveTopic { topic: topic.to_owned(), force: true }, &[]);
        (info, fds)
    });
    // Its owner may write it: as if the topic were alive.
    let log = |fds: &[OwnedFd]| std::fs::File::from(fds[0].try_clone().unwrap());
    let state = |fds: &[OwnedFd]| {
        let mut state = [0];
        log(fds).read_exact_at(&mut state, BODY_OFFSET).map(|()| state[0]).unwrap()
    };
    let revive = |fds: &[OwnedFd]| log(fds).write_all_at(&[0], BODY_OFFSET).unwrap();
    let second = stage.raw();
    let holds = vec![HandleRef::Publisher { topic: lost.id, slot: 0 }];
    let back = Request::Hello { protocol: PROTOCOL_VERSION, token: 1, incarnation: Some(incarnation), holds };
    let (Answer::Present { topics, .. }, _) = ask(&second, &back, &[]) else { panic!() };
    assert_eq!(topics, [lost.id]);
    assert!(matches!(hear(&second).0, Answer::Welcome { .. }));
    // Answered in order: what was said before has been heard.
    let present = |info: &TopicInfo, fds: &[OwnedFd]| {
        let names = ["log", "cursors", "log"].map(str::to_owned).to_vec();
        let request = postcard::to_stdvec(&Request::Present { info: info.clone(), names }).unwrap();
        socket::send(second.as_fd(), &request, &[fds[0].as_fd(), fds[1].as_fd(), fds[0].as_fd()]).unwrap();
        assert!(matches!(ask(&second, &Request::Report, &[]).0, Answer::Report(_)));
        state(fds)
    };
    revive(&lost_fds);
    revive(&other_fds);
    assert_eq!(present(&other, &other_fds), 0, "nobody asked for it");
    assert_eq!(present(&lost, &lost_fds), 1);
    revive(&lost_fds);
    assert_eq!(present(&lost, &lost_fds), 0, "it was told");
    say(&second, &Request::AllPresented { maps_more: false }).unwrap();
    let request = postcard::to_stdvec(&Request::Present { info: lost, names: vec!["log".to_owned()] }).unwrap();
    socket::send(second.as_fd(), &request, &[lost_fds[0].as_fd()]).unwrap();
    assert!(hears_hang_up(&second), "that was all, it said");
}

/// A coordinator that lets somebody in and dies before it says so leaves no stranger behind: his next Hello is known by its
/// token. Not so another's.
#[test]
fn a_hello_that_is_repeated_is_the_same_participants() {
    let stage = Stage::set();
    let watch = stage.connect();
    let participants = || match watch.request(&Request::Report).unwrap().0 {
        Answer::Report(report) => report.participants.len(),
        other => panic!("{other:?}"),
    };
    let say_hello = |token| {
        let socket = stage.raw();
        let hello = Request::Hello { protocol: PROTOCOL_VERSION, token, incarnation: None, holds: Vec::new() };
        say(&socket, &hello).unwrap();
        let deadline = Some(Instant::now() + DEADLINE);
        assert!(socket::wait(socket.as_fd(), nix::poll::PollFlags::POLLIN, deadline).unwrap());
        let mut buffer = [0; 256];
        let len = socket::recv(socket.as_fd(), &mut buffer, 0).unwrap().len;
        match postcard::from_bytes(&buffer[..len]).unwrap() {
            Answer::Welcome { incarnation, .. } => incarnation,
            other => panic!("{other:?}"),
        }
    };
    let first = say_hello(77);
    assert_eq!((say_hello(77), participants()), (first, 2));
    assert_ne!(say_hello(78), first);
    assert_eq!(participants(), 3);
}

#[test]
fn a_registry_of_which_the_keeper_was_not_told_is_gone_on_with() {
    let directory = tempfile::tempdir().unwrap();
    let place = Place::find("test", Some(directory.path())).unwrap();
    let (lock, listener) = (place.lock().unwrap().unwrap(), place.listen().unwrap());
    let began = [Event::Began { bus: 7, stay: true }];
    let kept = Registry::create(Some(place.registry()), 7, 4096, &began).unwrap();
    // The coordinator is killed when the larger registry has just taken the name.
    drop(kept.grown(7, &began).unwrap());
    let (keeper, link) = socket::pair().unwrap();
    let items = [(LOCK, lock.as_fd()), (LISTENER, listener.as_fd()), (link::REGISTRY, kept.as_fd())];
    link::hand_over(keeper.as_fd(), items.map(|(name, fd)| (name.to_owned(), fd))).unwrap();
    let signals = crate::os::process::termination_signals().unwrap();
    let server = Server::resume(place.clone(), link, signals).unwrap();
    let stored = server.estate.stored();
    let (_, written) = stored.iter().find(|(name, _)| name == link::REGISTRY).unwrap();
    let named = std::fs::metadata(place.registry()).unwrap().ino();
    assert_eq!(nix::sys::stat::fstat(written).unwrap().st_ino, named, "what is written is found by its name");
    let told = link::receive(keeper.as_fd()).unwrap();
    let Incoming::Message(Message::Store { name }, Some(fd)) = told else { panic!("the keeper was told nothing") };
    assert_eq!((name.as_str(), nix::sys::stat::fstat(&fd).unwrap().st_ino), (link::REGISTRY, named));
}
