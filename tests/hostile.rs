//! Hostile programs, as real processes with the memory and the connection that they are given: they write random bytes into all
//! that they may write and say random things, and neither crash nor stop anybody, nor reach another topic (SPEC §7.3,
//! §7.4). `SHMBUS_HOSTILE_SECONDS` says for how long (a few seconds by default).

mod common;

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use common::{LIMIT, MODES, Process, Random, Scene, await_that, end_with_the_test, hear, mode_of, of_mode, say, seed};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
use nix::sys::mman::{MRemapFlags, MapFlags, ProtFlags, mmap, mremap};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    sendmsg, socket,
};
use nix::sys::stat::Mode as FileMode;
use nix::unistd::{Uid, setresuid};
use shmbus::{Bus, Envelope, Full, GroupOptions, Mode, OpenError, RecvError, Sequence, Start, Topic, WildcardError};

/// Where a segment's body begins, and what of it is a log's state.
const BODY: usize = 4096;
const STATE_BYTES: usize = 128;

/// One topic is garbled for so long.
const ROUND: Duration = Duration::from_millis(400);

/// Memory that one asks for, and how often.
const HOARD_BYTES: u64 = 256 << 20;
const HOARDS: usize = 4;

/// Nothing here waits for longer than a few milliseconds; this is for a machine that is very busy.
const PROMPT: Duration = Duration::from_secs(5);

/// Words that have been mistaken for something in many a program.
const WORDS: [u64; 10] =
    [0, 1, 2, u64::MAX, u64::MAX - 1, 1 << 63, u64::MAX >> 1, u64::MAX >> 2, 1 << 32, u32::MAX as u64];

fn long_form() -> Duration {
    let given = std::env::var("SHMBUS_HOSTILE_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(given.unwrap_or(6))
}

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told(panic);
        // At once: other threads, and the test, may be waiting for this one.
        std::process::abort();
    }));
    match role.as_str() {
        "vandal" => vandal(&arguments),
        "honest" => honest(&arguments),
        "bystander" => bystander(),
        "hoard" => hoard(),
        "noise" => noise(&arguments),
        "reader" => reader_without_rights(&arguments),
        _ => panic!("no role {role}"),
    }
}

/// The topic of a round: its options follow from the number.
fn garbled(mode: Mode, number: u64) -> Topic<[u8]> {
    let mut random = Random::new(number);
    let topic = Topic::<[u8]>::named(format!("garbled.{mode}.{number}"));
    let topic = of_mode(mode, topic).messages(16 << random.below(4)).bytes(8192);
    if mode == Mode::Channel {
        return topic;
    }
    let topic = topic.full([Full::Block, Full::Reject, Full::Overwrite][random.below(3) as usize]);
    let topic = if random.below(2) == 0 { topic.dedup() } else { topic };
    let topic = if random.below(3) == 0 { topic.hold() } else { topic };
    if random.below(3) > 0 { topic.envelope() } else { topic }
}

/// "mode number", as the test says it to the roles.
fn parse(said: &str) -> Topic<[u8]> {
    let (mode, number) = said.split_once(' ').unwrap();
    garbled(mode_of(mode), number.parse().unwrap())
}

/// Memory that this process may write, of its own mapping: it stays when the handle is closed.
struct Target {
    start: NonNull<AtomicU64>,
    words: usize,
    is_log: bool,
}

impl Target {
    /// Maps again what a handle of ours has mapped for writing of a topic.
    fn all_of(topic: &str) -> Vec<Target> {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let wanted = format!("/memfd:shmbus:{topic}:");
        maps.lines().filter(|line| line.contains(&wanted) && line.contains(" rw-s ")).map(Target::again).collect()
    }

    fn again(line: &str) -> Target {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|number| usize::from_str_radix(number, 16).unwrap());
        let old = NonNull::new(start as *mut std::ffi::c_void).unwrap();
        // SAFETY: a shared mapping of `end - start` bytes; an old length of 0 leaves it in place and maps it once more.
        let new = unsafe { mremap(old, 0, end - start, MRemapFlags::MREMAP_MAYMOVE, None) }.unwrap();
        Target { start: new.cast(), words: (end - start) / 8, is_log: line.contains(":log ") }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words);
        // SAFETY: inside the mapping, which is never unmapped; page-aligned words.
        unsafe { self.start.add(index).as_ref() }
    }

    /// Overwrites one word.
    fn garble(&self, random: &mut Random, with_state: bool) {
        let body = BODY / 8;
        let index = match random.below(8) {
            0 if with_state => random.below(body as u64) as usize,
            0..3 => body + 16 * random.below(40) as usize + random.below(3) as usize,
            3 => body + random.below(512) as usize,
            _ => body + random.below((self.words - body) as u64) as usize,
        };
        let index = index.min(self.words - 1);
        if self.is_log && !with_state && (body..body + STATE_BYTES / 8).contains(&index) {
            return;
        }
        let word = self.word(index);
        let old = word.load(Ordering::Relaxed);
        let new = match random.below(8) {
            0 | 1 => WORDS[random.below(WORDS.len() as u64) as usize],
            2 => random.next(),
            3 => old ^ 1 << random.below(64),
            4 => old.wrapping_add(1),
            5 => old.wrapping_sub(random.below(100)),
            6 => u64::MAX - random.below(1 << 20),
            _ => self.word(random.below(self.words as u64) as usize).load(Ordering::Relaxed),
        };
        word.store(new, Ordering::Relaxed);
    }
}

/// Role: opens what it was told ("publisher", "subscriber", "consumer"), then writes garbage into what it got.
fn vandal(arguments: &str) {
    let (what, seed) = arguments.split_once(' ').unwrap();
    let mut random = Random::new(seed.parse().unwrap());
    let bus = Bus::open_default().unwrap();
    say("ready");
    loop {
        let topic = parse(&hear());
        let mut handles: Vec<Box<dyn std::any::Any>> = Vec::new();
        match what {
            "publisher" => handles.push(Box::new(bus.publisher(topic.clone()).unwrap())),
            "consumer" if topic.options().mode != Mode::Channel && topic.options().full != Full::Overwrite => {
                handles.push(Box::new(bus.consumer(topic.clone(), "group").open().unwrap()));
            }
            _ => handles.push(Box::new(bus.subscriber(topic.clone()).open().unwrap())),
        }
        let targets = Target::all_of(topic.name());
        assert!(!targets.is_empty(), "{what} may write nothing");
        let (with_state, pause_us) = (random.below(8) == 0, [0, 10, 100, 1000][random.below(4) as usize]);
        if topic.options().mode != Mode::Many || random.below(2) == 0 {
            handles.clear();
        }
        say("begun");
        let end = Instant::now() + ROUND;
        while Instant::now() < end {
            (0..=random.below(4)).for_each(|_| {
                targets[random.below(targets.len() as u64) as usize].garble(&mut random, with_state);
            });
            if pause_us > 0 {
                thread::sleep(Duration::from_micros(random.below(pause_us)));
            }
        }
        drop(handles);
        say("done");
    }
}

/// Times what an honest program does.
#[derive(Default)]
struct Watch {
    longest_us: AtomicU64,
    done: AtomicU64,
    /// What is being done, by which thread, since when.
    doing: Mutex<HashMap<ThreadId, (&'static str, Instant)>>,
}

impl Watch {
    fn time<R>(&self, what: &'static str, work: impl FnOnce() -> R) -> R {
        let (started, me) = (Instant::now(), thread::current().id());
        self.doing.lock().unwrap().insert(me, (what, started));
        let result = work();
        self.doing.lock().unwrap().remove(&me);
        let took = started.elapsed();
        assert!(took < PROMPT, "{what} took {took:?}");
        self.longest_us.fetch_max(took.as_micros() as u64, Ordering::Relaxed);
        self.done.fetch_add(1, Ordering::Relaxed);
        result
    }

    /// Panics over what takes too long, which might never end.
    fn check(&self) {
        for (what, started) in self.doing.lock().unwrap().values() {
            assert!(started.elapsed() < PROMPT, "{what} does not end");
        }
    }
}

/// Role: uses the topic in every way while it is garbled. Outcomes do not matter, the time they take does.
fn honest(arguments: &str) {
    let mut random = Random::new(arguments.parse().unwrap());
    say("ready");
    loop {
        let topic = parse(&hear());
        let (watch, end) = (Watch::default(), Instant::now() + ROUND);
        type Use = fn(&Bus, &Topic<[u8]>, &mut Random, &Watch);
        let uses: &[Use] = match topic.options().mode {
            Mode::Channel => &[publish, subscribe],
            _ => &[publish, publish, subscribe, subscribe, consume, consume, transform, administer],
        };
        let left = AtomicUsize::new(uses.len());
        thread::scope(|scope| {
            for work in uses {
                let (topic, watch, left, mut random) = (&topic, &watch, &left, Random::new(random.next()));
                scope.spawn(move || {
                    let bus = Bus::open_default().unwrap();
                    while Instant::now() < end {
                        work(&bus, topic, &mut random, watch);
                    }
                    left.fetch_sub(1, Ordering::Relaxed);
                });
            }
            while left.load(Ordering::Relaxed) > 0 {
                watch.check();
                thread::sleep(Duration::from_millis(5));
            }
        });
        say(&format!("{} uses, the longest {} us", watch.done.into_inner(), watch.longest_us.into_inner()));
    }
}

fn publish(bus: &Bus, topic: &Topic<[u8]>, random: &mut Random, watch: &Watch) {
    let opened = watch.time("opening a publisher", || match random.below(2) {
        0 => bus.publisher(topic.clone()),
        _ => bus.publisher_as(topic.clone(), "name"),
    });
    let Ok(mut publisher) = opened else { return };
    let soon = Duration::from_millis(1);
    for _ in 0..random.below(40) {
        let payload = vec![7; [1, 8, 56, 57, 300, 2000][random.below(6) as usize]];
        let envelope = Envelope::new().id(&random.below(20).to_le_bytes()).key(b"key");
        watch.time("publishing", || match random.below(6) {
            0 => drop(publisher.publish_timeout(&payload, soon)),
            // A forged reader holds a topic that blocks for as long as it likes: that is what blocking means.
            1..=3 if topic.options().full == Full::Block => {}
            1 => drop(publisher.publish_numbered(&payload, 1 + random.below(10))),
            2 => drop(publisher.publish_with(&payload, &envelope)),
            3 => drop(publisher.loan_bytes(payload.len()).and_then(|loan| loan.publish())),
            _ => drop(publisher.try_publish(&payload)),
        });
    }
    watch.time("waiting for a group", || drop(publisher.wait_settled("group", Sequence::new(3), soon)));
    watch.time("closing a publisher", || drop(publisher));
}

fn subscribe(bus: &Bus, topic: &Topic<[u8]>, random: &mut Random, watch: &Watch) {
    let start = match random.below(5) {
        0 => Start::Latest,
        1 => Start::Last(3),
        2 => Start::Sequence(Sequence::new(2)),
        3 => Start::LastPerKey,
        _ => Start::Oldest,
    };
    let builder = bus.subscriber(topic.clone()).start(start);
    let builder = if random.below(2) == 0 { builder.droppable() } else { builder };
    let Ok(mut subscriber) = watch.time("opening a subscriber", || builder.open()) else { return };
    for _ in 0..random.below(100) {
        let received = watch.time("receiving", || match subscriber.recv_timeout(Duration::from_micros(200)) {
            Ok(message) => {
                std::hint::black_box(common::checksum(&message));
                std::hint::black_box((message.key().map(<[u8]>::len), message.publisher_number()));
                Ok(())
            }
            Err(error) => Err(error),
        });
        if matches!(received, Err(RecvError::Corrupt(_) | RecvError::Gone(_))) {
            break;
        }
    }
    watch.time("asking for the lag", || subscriber.lag());
    watch.time("closing a subscriber", || drop(subscriber));
}

fn consume(bus: &Bus, topic: &Topic<[u8]>, random: &mut Random, watch: &Watch) {
    let lease = Duration::from_millis(1 + random.below(20));
    let (group, options) = match random.below(5) {
        0 => ("keyed", GroupOptions::new().ordered_by_key()),
        1 => ("single", GroupOptions::new().exclusive()),
        2 => ("once", GroupOptions::new().at_most_once()),
        3 => ("effect", GroupOptions::new().effectively_once()),
        _ => ("group", GroupOptions::new().max_attempts(2)),
    };
    let builder = bus.consumer(topic.clone(), group).options(options.lease(lease).window(64)).start(Start::Oldest);
    let Ok(mut consumer) = watch.time("opening a consumer", || builder.open()) else { return };
    for _ in 0..random.below(60) {
        let end = random.below(5);
        let received = watch.time("consuming", || match consumer.recv_timeout(Duration::from_micros(200)) {
            Ok(message) => {
                std::hint::black_box((common::checksum(message.as_bytes()), message.key().map(<[u8]>::len)));
                match end {
                    0 => drop(message.nack()),
                    1 => drop(message.reject("no")),
                    2 => drop(message.keep()),
                    _ => drop(message.ack()),
                }
                Ok(())
            }
            Err(error) => Err(error),
        });
        if matches!(received, Err(RecvError::Corrupt(_) | RecvError::Gone(_) | RecvError::Fenced)) {
            break;
        }
        // Sometimes by the run of sixteen.
        let count = [8, 16, 40][random.below(3) as usize];
        watch.time("consuming a batch", || {
            let Ok(Some(batch)) = consumer.try_recv_batch(count) else { return };
            let kept = batch.iter().nth(random.below(40) as usize).map(|message| message.keep());
            let _ = if end == 0 { batch.nack() } else { batch.ack() };
            let _ = kept.map(|kept| consumer.ack(&kept));
        });
    }
    watch.time("closing a consumer", || drop(consumer));
}

fn transform(bus: &Bus, topic: &Topic<[u8]>, random: &mut Random, watch: &Watch) {
    let out = Topic::<[u8]>::named(format!("{}.out", topic.name())).messages(64).bytes(16 << 10).full(Full::Overwrite);
    let builder = bus.pipeline(topic.clone(), "pipe", out).start(Start::Oldest);
    let Ok(mut pipeline) = watch.time("opening a pipeline", || builder.open()) else { return };
    for _ in 0..random.below(40) {
        let step = || {
            pipeline.step_timeout(Duration::from_micros(200), |message, outputs| {
                outputs.push(message.as_bytes());
                Ok(())
            })
        };
        if watch.time("a step", step).is_err() {
            break;
        }
    }
    watch.time("closing a pipeline", || drop(pipeline));
}

fn administer(bus: &Bus, topic: &Topic<[u8]>, random: &mut Random, watch: &Watch) {
    let name = topic.name();
    watch.time("status", || drop(bus.topic(name)));
    watch.time("all topics", || drop(bus.topics()));
    watch.time("names", || drop(bus.publisher_names(name)));
    watch.time("report", || drop(bus.report()));
    match random.below(8) {
        0 => watch.time("purge", || drop(bus.purge_topic(name))),
        1 => watch.time("rewind", || drop(bus.rewind_group(name, "group", Start::Oldest, true))),
        2 => watch.time("remove group", || drop(bus.remove_group(name, "group", true))),
        _ => thread::sleep(Duration::from_millis(random.below(10))),
    }
}

/// Role: its topics are nobody else's, and exact whatever happens on others; its wildcard reads those, too.
fn bystander() {
    static STOP: AtomicBool = AtomicBool::new(false);
    thread::spawn(|| {
        hear();
        STOP.store(true, Ordering::Relaxed);
    });
    let (bus, watch) = (Bus::open_default().unwrap(), Watch::default());
    let sound = |mode: Mode| of_mode(mode, Topic::<[u8]>::named(format!("sound.{mode}"))).messages(64).bytes(16 << 10);
    let rings = [Mode::Many, Mode::Exclusive].map(|mode| {
        let publisher = bus.publisher(sound(mode)).unwrap();
        let subscriber = bus.subscriber(sound(mode)).open().unwrap();
        (mode, publisher, subscriber, bus.consumer(sound(mode), "group").open().unwrap())
    });
    let mut rings = rings;
    let mut wildcard = bus.wildcard::<[u8]>(">").droppable().open().unwrap();
    say("ready");
    let mut number = 0u64;
    while !STOP.load(Ordering::Relaxed) {
        let payload = number.to_le_bytes().repeat(1 + (number % 20) as usize);
        for (mode, publisher, subscriber, consumer) in &mut rings {
            let sequence = watch.time("publishing", || publisher.publish(&payload)).unwrap();
            assert_eq!(sequence.get(), number);
            let received = watch.time("receiving", || subscriber.recv_timeout(PROMPT).map(|message| message.to_vec()));
            assert_eq!(received, Ok(payload.clone()));
            let message = watch.time("consuming", || consumer.recv_timeout(PROMPT)).unwrap();
            assert_eq!((message.sequence().get(), message.as_bytes()), (number, &payload[..]));
            message.ack().unwrap();
            let name = format!("sound.{mode}");
            watch.time("a wildcard's turn", || while !is_next(&mut wildcard, &name, &payload) {});
            if number.is_multiple_of(16) {
                let joined = watch.time("joining", || bus.subscriber(sound(*mode)).start(Start::Last(1)).open());
                assert_eq!(joined.unwrap().try_recv().unwrap().unwrap().as_bytes(), &payload[..]);
            }
        }
        number += 1;
    }
    say(&format!("{number} rounds, the longest wait {} us", watch.longest_us.into_inner()));
}

/// Whether the wildcard's next message is this one. Whatever else it says must concern a garbled topic.
fn is_next(wildcard: &mut shmbus::WildcardSubscriber<[u8]>, name: &str, payload: &[u8]) -> bool {
    match wildcard.recv_timeout(PROMPT) {
        Ok(message) if message.topic() == name => {
            assert_eq!(message.as_bytes(), payload);
            true
        }
        Ok(message) => {
            assert!(!message.topic().starts_with("sound"), "{} out of turn", message.topic());
            false
        }
        Err(WildcardError::Corrupt { topic, .. } | WildcardError::Lagged { topic, .. }) => {
            assert!(topic.contains("garbled"), "{topic}");
            false
        }
        Err(WildcardError::Attach { topic, .. }) => {
            assert!(topic.contains("garbled"), "{topic}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// Everything but the bystander's topics.
fn remove_the_rest(bus: &Bus) {
    for topic in bus.topics().unwrap() {
        if !topic.name.starts_with("sound") {
            let started = Instant::now();
            match bus.remove_topic(&topic.name, true) {
                Ok(()) | Err(OpenError::Refused(_)) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(started.elapsed() < PROMPT, "removing {} took {:?}", topic.name, started.elapsed());
        }
    }
}

#[test]
fn whoever_writes_garbage_harms_his_own_topic_at_most() {
    let scene = Scene::new("hostile");
    let bus = scene.open();
    let mut random = Random::new(seed());
    let servers = [scene.server("keeper"), scene.server("coordinator")];
    let mut bystander = scene.start("bystander", "");
    bystander.expect("ready");
    let whats = ["publisher", "subscriber", "consumer"];
    let mut start = |role, what: &str| -> Process { scene.start(role, &format!("{what}{}", random.next() >> 1)) };
    let mut vandals = whats.map(|what| start("vandal", &format!("{what} ")));
    let mut honest = start("honest", "");
    vandals.iter_mut().chain([&mut honest]).for_each(|process| process.expect("ready"));
    let end = Instant::now() + long_form();
    let mut round = random.below(1 << 40);
    while Instant::now() < end {
        let topic = garbled(MODES[(round / 3 % 3) as usize], round);
        let told = format!("{} {round}", topic.options().mode);
        println!("{told}: {} {:?}", whats[(round % 3) as usize], topic.options());
        bus.create(&topic).unwrap();
        let vandal = &mut vandals[(round % 3) as usize];
        vandal.tell(&told);
        vandal.expect("begun");
        honest.tell(&told);
        println!("{}", honest.line());
        vandal.expect("done");
        remove_the_rest(&bus);
        assert_eq!([scene.server("keeper"), scene.server("coordinator")], servers, "{told}: a server died");
        round += 1;
    }
    bystander.tell("stop");
    println!("{}", bystander.line());
}

/// A connection to the coordinator that says what it likes.
struct Wire(OwnedFd);

impl Wire {
    /// To the bus of this role.
    fn connect() -> Wire {
        let [directory, bus] = ["SHMBUS_DIR", "SHMBUS_BUS"].map(|name| std::env::var(name).unwrap());
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let path = format!("{directory}/{bus}.sock");
        connect(socket.as_raw_fd(), &UnixAddr::new(path.as_str()).unwrap()).unwrap();
        Wire(socket)
    }

    /// Whether it could be sent at once.
    fn send(&self, bytes: &[u8], fds: &[i32]) -> nix::Result<usize> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &[std::io::IoSlice::new(bytes)], control, flags, None)
    }

    /// The next answer's descriptors.
    fn receive(&self) -> Vec<OwnedFd> {
        let (mut bytes, mut control) = (vec![0; 1 << 17], nix::cmsg_space!([i32; 128]));
        let mut pieces = [std::io::IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(self.0.as_raw_fd(), &mut pieces, Some(&mut control), flags).unwrap();
        let parts = message.cmsgs().unwrap().filter_map(|part| match part {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        });
        // SAFETY: the kernel has just given them to us.
        parts.flatten().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
    }
}

/// The first packet of a connection: a Hello without past (coordinator/protocol.rs, in postcard), under a token of its own.
fn hello() -> [u8; 6] {
    static TOKENS: AtomicU8 = AtomicU8::new(0);
    let version = 7;
    [0, version, 0x80 | TOKENS.fetch_add(1, Ordering::Relaxed), 1 + (std::process::id() % 100) as u8, 0, 0]
}

/// A request to subscribe to a topic of raw messages from the latest on.
fn open_subscriber(topic: &str) -> Vec<u8> {
    let mut bytes = vec![4, topic.len() as u8];
    bytes.extend(topic.as_bytes());
    bytes.extend([0, 0, 0]);
    bytes
}

/// What is left of a descriptor's rights: none may be more than reading.
fn assert_read_only(fd: &OwnedFd, len: usize) {
    let length = std::num::NonZeroUsize::new(len).unwrap();
    let (read, write) = (ProtFlags::PROT_READ, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    // SAFETY: a mapping that nobody uses.
    let mapped = unsafe { mmap(None, length, write, MapFlags::MAP_SHARED, fd, 0) };
    assert_eq!(mapped.err(), Some(Errno::EACCES));
    // SAFETY: as above.
    let mapped = unsafe { mmap(None, length, read, MapFlags::MAP_SHARED, fd, 0) }.unwrap();
    // SAFETY: our own mapping.
    let protected = unsafe { nix::sys::mman::mprotect(mapped, len, write) };
    assert_eq!(protected, Err(Errno::EACCES), "made writable later");
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(fd, punch, 0, len as i64), Err(Errno::EBADF));
    assert_eq!(nix::unistd::write(fd, b"x"), Err(Errno::EBADF));
}

/// Role: what a subscriber is given, tried by hand. Arguments: the topic.
fn reader_without_rights(topic: &str) {
    end_with_the_test();
    let wire = Wire::connect();
    wire.send(&hello(), &[]).unwrap();
    wire.receive();
    wire.send(&open_subscriber(topic), &[]).unwrap();
    let fds = wire.receive();
    assert!(fds.len() >= 3, "log, cursors and arenas: {}", fds.len());
    for (index, fd) in fds.iter().enumerate() {
        let stat = nix::sys::stat::fstat(fd).unwrap();
        assert_eq!(stat.st_mode & 0o777, 0o600);
        let all = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        assert_eq!(fcntl(fd, FcntlArg::F_GET_SEALS).unwrap() & all.bits(), all.bits());
        assert_eq!(fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)), Err(Errno::EPERM));
        assert!(nix::unistd::ftruncate(fd, 0).is_err() && nix::unistd::ftruncate(fd, 1 << 30).is_err());
        let is_cursors = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        if !is_cursors.to_string_lossy().contains(":cursors") {
            assert_read_only(fd, stat.st_size as usize);
        } else {
            assert_eq!(index, 1);
            // It may zero what it may write anyway. (Without the header nobody could join this topic any more.)
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let _ = fallocate(fd, punch, BODY as i64, stat.st_size - BODY as i64);
        }
    }
    if Uid::effective().is_root() {
        let nobody = Uid::from_raw(65534);
        setresuid(nobody, nobody, nobody).unwrap();
        // Else the way to our own descriptors is closed, whatever their modes are.
        nix::sys::prctl::set_dumpable(true).unwrap();
        for fd in &fds {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            for access in [OFlag::O_RDWR, OFlag::O_WRONLY, OFlag::O_RDONLY] {
                assert_eq!(open(path.as_str(), access, FileMode::empty()).err(), Some(Errno::EACCES));
            }
        }
        say("all");
    } else {
        say("not as root: reopening by another user was not tried");
    }
}

#[test]
fn a_subscriber_can_write_nothing_but_cursors() {
    let scene = Scene::new("reader");
    let bus = scene.open();
    let mut publisher = bus.publisher(Topic::<[u8]>::new("read")).unwrap();
    (0..20).for_each(|number| assert_eq!(publisher.publish(&[1; 100]), Ok(Sequence::new(number))));
    let mut reader = scene.start("reader", "read");
    println!("{}", reader.line());
    let mut subscriber = bus.subscriber(Topic::<[u8]>::new("read")).start(Start::Oldest).open().unwrap();
    for number in 0..40 {
        publisher.publish_timeout(&[2; 100], PROMPT).unwrap();
        assert_eq!(common::receive(&mut subscriber).0, number, "what was there is whole");
    }
}

/// Role: connections that are silent, garbled, too long, laden with descriptors, or ask and ask without reading.
fn noise(seed: &str) {
    end_with_the_test();
    let mut random = Random::new(seed.parse().unwrap());
    let null = fs::File::open("/dev/null").unwrap();
    say("ready");
    loop {
        let wires: Vec<Wire> = (0..8).map(|_| Wire::connect()).collect();
        for wire in &wires {
            // A connection that the coordinator has given up refuses what comes next: that is the point.
            match random.below(8) {
                0 => {}
                1 => drop(wire.send(&vec![0xff; 100_000 + random.below(60_000) as usize], &[])),
                2 => drop(wire.send(&hello(), &vec![null.as_raw_fd(); 1 + random.below(250) as usize])),
                3 => drop(wire.send(&hello()[..random.below(6) as usize], &[])),
                kind => {
                    let _ = wire.send(&hello(), &[]);
                    for _ in 0..2000 {
                        let _ = wire.send(&random_request(&mut random, kind), &[]);
                    }
                }
            }
        }
        thread::sleep(Duration::from_millis(random.below(20)));
    }
}

/// Whatever a connection says and does not hear, another's requests are answered soon.
#[test]
fn hostile_clients_delay_nobody() {
    let scene = Scene::new("wire");
    let bus = scene.open();
    let mut random = Random::new(seed());
    ["wire", "calm"].into_iter().for_each(|name| assert!(!bus.create(&Topic::<[u8]>::new(name)).unwrap()));
    let servers = [scene.server("keeper"), scene.server("coordinator")];
    let fds = || fs::read_dir(format!("/proc/{}/fd", servers[1])).map_or(usize::MAX, Iterator::count);
    let before = fds();
    let mut noises = [0, 1].map(|_| scene.start("noise", &random.below(1 << 40).to_string()));
    noises.iter_mut().for_each(|noise| noise.expect("ready"));
    let end = Instant::now() + long_form() / 2;
    let watch = Watch::default();
    while Instant::now() < end {
        watch.time("a request", || bus.topic("calm")).unwrap();
        let joining = || bus.subscriber(Topic::<[u8]>::new("calm")).open();
        let mut subscriber = watch.time("joining", joining).unwrap();
        assert_eq!(subscriber.try_recv().map(|message| message.map(|message| message.len())), Ok(None));
    }
    println!("{} requests, the longest {} us", watch.done.into_inner(), watch.longest_us.into_inner());
    noises.into_iter().for_each(Process::kill);
    assert_eq!([scene.server("keeper"), scene.server("coordinator")], servers, "a server died");
    await_that("its descriptors", || fds() <= before);
}

/// Role: has a topic of much memory created and removed, over and over.
fn hoard() {
    end_with_the_test();
    let bus = Bus::open_default().unwrap();
    say("ready");
    for _ in 0..HOARDS {
        say("begun");
        bus.create(&Topic::<[u8]>::new("hoard").bytes(HOARD_BYTES)).unwrap();
        say("done");
        bus.remove_topic("hoard", false).unwrap();
    }
    thread::sleep(LIMIT);
}

/// What one asks for may take the kernel long: others are answered all the while.
#[test]
fn who_asks_for_much_memory_delays_nobody() {
    let scene = Scene::new("hoard");
    let bus = scene.open();
    bus.create(&Topic::<[u8]>::new("calm")).unwrap();
    let mut hoard = scene.start("hoard", "");
    hoard.expect("ready");
    let (over, end) = (AtomicBool::new(false), Instant::now() + LIMIT);
    let requests = AtomicU64::new(0);
    let answered = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) && Instant::now() < end {
                bus.topic("calm").unwrap();
                requests.fetch_add(1, Ordering::Relaxed);
            }
        });
        let answered = (0..HOARDS).map(|_| {
            hoard.expect("begun");
            let before = requests.load(Ordering::Relaxed);
            hoard.expect("done");
            requests.load(Ordering::Relaxed) - before
        });
        let answered: Vec<u64> = answered.collect();
        over.store(true, Ordering::Relaxed);
        answered
    });
    println!("requests while {HOARD_BYTES} bytes were reserved: {answered:?}");
    // Where they wait for it, it is one that was under way, and perhaps the next.
    let all: u64 = answered.iter().sum();
    assert!(all > 10 * HOARDS as u64, "nobody is answered while memory is reserved for another");
}

/// Something that looks like a request: the kind, then anything; or a good one over and over.
fn random_request(random: &mut Random, kind: u64) -> Vec<u8> {
    match kind {
        4 => open_subscriber("wire"),
        // Status, of all topics.
        5 => vec![13, 0, 0],
        _ => {
            let mut bytes = vec![0; 1 + random.below(60) as usize];
            random.fill(&mut bytes);
            bytes[0] %= 24;
            // Neither Stop nor a purge are meant here: those it may ask for, and gets.
            if bytes[0] == 18 {
                bytes[0] = 19;
            }
            bytes
        }
    }
}
