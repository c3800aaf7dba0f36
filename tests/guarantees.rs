//! What a group promises when its consumers are killed at random: SPEC §3's table, counted message by message.
//!
//! All processes write into one *book*, a mapped file: who was given which message, and whose ack had returned. It
//! survives whoever is killed. `SHMBUS_TEST_LONG=1` runs the sizes that the project promises: a million messages, 200
//! kills.

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, Process, Random, Scene, await_that, end_with_the_test, say, seed};
use memmap2::MmapRaw;
use nix::sys::signal::Signal;
use shmbus::{Bus, Envelope, GroupOptions, GroupStatus, RecvError, Start, Topic};

const INPUT: Topic<[u64; 4]> = Topic::new("guarantees.in").messages(16_384);
const OUTPUT: Topic<[u64; 4]> = Topic::new("guarantees.out").messages(16_384);
const GROUP: &str = "workers";

/// How long a consumer works on each message.
const WORK: Duration = Duration::from_micros(20);

/// Long enough that nothing comes back by the end of a lease: only by proof of death.
const LEASE: Duration = Duration::from_secs(60);

/// Time between two kills.
const KILL_EVERY: Duration = Duration::from_millis(50);

/// Messages that a consumer in batches has in hand at most.
const BATCH: usize = 32;

/// Keys of the test by key, and the messages of each.
const KEYS: u64 = 64;

/// Lives that a book can tell apart.
const LIVES: usize = 1024;

fn long() -> bool {
    std::env::var_os("SHMBUS_TEST_LONG").is_some()
}

fn messages() -> u64 {
    if long() { 1_000_000 } else { 120_000 }
}

fn kills() -> u32 {
    if long() { 200 } else { 30 }
}

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    end_with_the_test();
    let bus = Bus::open_default().unwrap();
    match role.as_str() {
        "publish" => publish(&bus, arguments.parse().unwrap()),
        "consume" => consume(&bus, &Shift::parse(&arguments)),
        "consume in batches" => consume_in_batches(&bus, &Shift::parse(&arguments)),
        "pipe" => pipe(&bus, &Shift::parse(&arguments)),
        "publish with keys" => publish_with_keys(&bus),
        "consume by key" => consume_by_key(&bus, &Shift::parse(&arguments)),
        _ => panic!("no role {role}"),
    }
}

/// What one consumer process is to do.
struct Shift {
    book: PathBuf,
    life: u32,
    work: Duration,
}

impl Shift {
    fn parse(arguments: &str) -> Shift {
        let [book, life, work] = arguments.split(' ').collect::<Vec<_>>()[..] else { panic!("{arguments}") };
        Shift { book: book.into(), life: life.parse().unwrap(), work: Duration::from_nanos(work.parse().unwrap()) }
    }

    fn start(&self, scene: &Scene, role: &str) -> Process {
        scene.start(role, &format!("{} {} {}", self.book.display(), self.life, self.work.as_nanos()))
    }
}

/// What is written down for each message.
#[repr(C)]
struct Line {
    /// How often it was handed to a consumer.
    given: AtomicU32,
    /// How many acks of it returned.
    acked: AtomicU32,
    /// The life that was given it last, plus one.
    holder: AtomicU32,
    reserved: AtomicU32,
}

#[repr(C)]
struct Head {
    /// Times a message was given again though its last holder was not killed, or its ack had returned.
    wrong: AtomicU32,
    over: AtomicU32,
    /// Whether a life has been, or is just being, killed.
    killed: [AtomicU32; LIVES],
    acks_of: [AtomicU32; LIVES],
    /// For each key: who works on it (life plus one; 0: nobody), and which of its messages was given out last, plus one.
    worker: [AtomicU32; KEYS as usize],
    given_of: [AtomicU32; KEYS as usize],
}

struct Book(MmapRaw);

impl Book {
    fn create(scene: &Scene) -> PathBuf {
        let path = scene.directory().join("book");
        let bytes = size_of::<Head>() + messages() as usize * size_of::<Line>();
        std::fs::File::create(&path).unwrap().set_len(bytes as u64).unwrap();
        path
    }

    fn open(path: &Path) -> Book {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        Book(MmapRaw::map_raw(&file).unwrap())
    }

    fn head(&self) -> &Head {
        // SAFETY: the file is longer than a `Head`, which consists of atomics.
        unsafe { &*self.0.as_ptr().cast::<Head>() }
    }

    fn line(&self, sequence: u64) -> &Line {
        assert!(sequence < messages());
        // SAFETY: the file has a line for every message, behind the head; lines consist of atomics.
        unsafe { &*self.0.as_ptr().add(size_of::<Head>()).cast::<Line>().add(sequence as usize) }
    }

    /// Notes that `life` was given the message.
    fn given(&self, sequence: u64, life: u32) {
        let line = self.line(sequence);
        let before = line.holder.swap(life + 1, Ordering::SeqCst);
        if line.given.fetch_add(1, Ordering::SeqCst) > 0 {
            let killed = before > 0 && self.head().killed[before as usize - 1].load(Ordering::SeqCst) == 1;
            if !killed || line.acked.load(Ordering::SeqCst) > 0 {
                self.head().wrong.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    fn acked(&self, sequence: u64, life: u32) {
        self.line(sequence).acked.fetch_add(1, Ordering::SeqCst);
        self.head().acks_of[life as usize].fetch_add(1, Ordering::SeqCst);
    }

    /// Notes that `life` begins to work on the message of this key with this index among them: the one that was given out last
    /// again, or the next one, and nobody else works on the key.
    fn begins(&self, key: u64, index: u32, life: u32) {
        let head = self.head();
        let before = head.worker[key as usize].swap(life + 1, Ordering::SeqCst);
        let alone = before == 0 || head.killed[before as usize - 1].load(Ordering::SeqCst) == 1;
        let last = head.given_of[key as usize].swap(index + 1, Ordering::SeqCst);
        if !alone || (index + 1 != last && index != last) {
            eprintln!("key {key}: message {index} after {last}, worker {before} before {life}");
            head.wrong.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Notes that the work on this key is over, before the message is settled or given back.
    fn ends(&self, key: u64) {
        self.head().worker[key as usize].store(0, Ordering::SeqCst);
    }

    fn is_over(&self) -> bool {
        self.head().over.load(Ordering::SeqCst) == 1
    }

    /// How many messages were given never, once and more often.
    fn count(&self) -> [u64; 3] {
        let mut counts = [0; 3];
        for sequence in 0..messages() {
            counts[self.line(sequence).given.load(Ordering::SeqCst).min(2) as usize] += 1;
        }
        counts
    }
}

/// Role: publishes numbered messages.
fn publish(bus: &Bus, count: u64) {
    let mut publisher = bus.publisher(INPUT).unwrap();
    for number in 0..count {
        publisher.publish(&[number; 4]).unwrap();
    }
    say("published");
    common::hear();
}

/// Role: consumes until all is over.
fn consume(bus: &Bus, shift: &Shift) {
    let book = Book::open(&shift.book);
    let mut consumer = bus.consumer(INPUT, GROUP).open().unwrap();
    say("consuming");
    while !book.is_over() {
        match consumer.recv_timeout(Duration::from_millis(20)) {
            Ok(delivery) => {
                let sequence = delivery.sequence().get();
                assert_eq!(*delivery, [sequence; 4], "a foreign or torn message");
                book.given(sequence, shift.life);
                work(shift.work);
                delivery.ack().unwrap();
                book.acked(sequence, shift.life);
            }
            Err(RecvError::TimedOut) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Role: consumes in batches until all is over; every other life keeps a message of each, to acknowledge it alone.
fn consume_in_batches(bus: &Bus, shift: &Shift) {
    let book = Book::open(&shift.book);
    let mut consumer = bus.consumer(INPUT, GROUP).open().unwrap();
    say("consuming");
    while !book.is_over() {
        let batch = match consumer.recv_batch_timeout(BATCH, Duration::from_millis(20)) {
            Ok(batch) => batch,
            Err(RecvError::TimedOut) => continue,
            Err(error) => panic!("{error}"),
        };
        for message in batch.iter() {
            let sequence = message.sequence().get();
            assert_eq!(*message, [sequence; 4], "a foreign or torn message");
            book.given(sequence, shift.life);
        }
        work(shift.work * batch.len() as u32);
        let sequences: Vec<u64> = batch.iter().map(|message| message.sequence().get()).collect();
        let alone = batch.iter().nth(3).filter(|_| shift.life % 2 == 1).map(|message| message.keep());
        batch.ack().unwrap();
        if let Some(alone) = alone {
            consumer.ack(&alone).unwrap();
        }
        sequences.into_iter().for_each(|sequence| book.acked(sequence, shift.life));
    }
}

/// Role: copies each input to the output, effectively once, until all is over.
fn pipe(bus: &Bus, shift: &Shift) {
    let book = Book::open(&shift.book);
    let mut pipeline = bus.pipeline(INPUT, GROUP, OUTPUT).open().unwrap();
    say("consuming");
    while !book.is_over() {
        let step = pipeline.step_timeout(Duration::from_millis(20), |input, outputs| {
            book.given(input.sequence().get(), shift.life);
            work(shift.work);
            outputs.push(&**input);
            Ok(())
        });
        step.unwrap();
    }
}

fn keyed() -> Topic<[u64; 4]> {
    INPUT.envelope()
}

fn keyed_messages() -> u64 {
    messages() / 10
}

/// Role: publishes messages of 64 keys in turn; each says its key and which of the key's messages it is.
fn publish_with_keys(bus: &Bus) {
    let mut publisher = bus.publisher(keyed()).unwrap();
    for number in 0..keyed_messages() {
        let (key, index) = (number % KEYS, number / KEYS);
        let envelope = Envelope::new().key(&key.to_le_bytes());
        publisher.publish_with(&[number, key, index, 0], &envelope).unwrap();
    }
    say("published");
    common::hear();
}

/// Role: works on messages by key, and gives one in eight back.
fn consume_by_key(bus: &Bus, shift: &Shift) {
    let book = Book::open(&shift.book);
    let mut random = Random::new(u64::from(shift.life) + 1);
    let mut consumer = bus.consumer(keyed(), GROUP).open().unwrap();
    say("consuming");
    while !book.is_over() {
        match consumer.recv_timeout(Duration::from_millis(20)) {
            Ok(delivery) => {
                let [_, key, index, _] = *delivery;
                book.begins(key, index as u32, shift.life);
                work(shift.work);
                book.ends(key);
                if random.below(8) == 0 { delivery.nack().unwrap() } else { delivery.ack().unwrap() }
            }
            Err(RecvError::TimedOut) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn work(time: Duration) {
    let started = Instant::now();
    while started.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// A group with four consumers, two of which are killed at random and started again.
struct Crew<'a> {
    scene: &'a Scene,
    role: &'static str,
    book: PathBuf,
    next_life: u32,
    workers: Vec<(u32, Process)>,
}

impl<'a> Crew<'a> {
    fn new(scene: &'a Scene, role: &'static str) -> Crew<'a> {
        let mut crew = Crew { scene, role, book: Book::create(scene), next_life: 0, workers: Vec::new() };
        for _ in 0..4 {
            crew.hire(WORK);
        }
        crew
    }

    fn hire(&mut self, work: Duration) {
        let shift = Shift { book: self.book.clone(), life: self.next_life, work };
        self.workers.push((shift.life, shift.start(self.scene, self.role)));
        self.next_life += 1;
    }

    /// Kills the first or the second worker, as chance will have it, and starts another in its place.
    fn kill_and_restart(&mut self, random: &mut Random) {
        let (life, worker) = self.workers.swap_remove(random.below(2) as usize);
        Book::open(&self.book).head().killed[life as usize].store(1, Ordering::SeqCst);
        worker.kill();
        self.hire(WORK);
        // The newcomer is to be a victim, too.
        let last = self.workers.len() - 1;
        self.workers.swap(random.below(2) as usize, last);
    }

    fn kill_many(&mut self) {
        let mut random = Random::new(seed());
        for _ in 0..kills() {
            thread::sleep(KILL_EVERY);
            self.kill_and_restart(&mut random);
        }
    }

    /// Waits until the group has settled everything; ends the workers.
    fn finish(&mut self, bus: &Bus) -> Book {
        self.finish_at(bus, messages())
    }

    fn finish_at(&mut self, bus: &Bus, end: u64) -> Book {
        let deadline = Instant::now() + 4 * LIMIT;
        while group(bus).floor < end {
            assert!(Instant::now() < deadline, "the group settled only {:?}", group(bus));
            thread::sleep(Duration::from_millis(10));
        }
        let book = Book::open(&self.book);
        book.head().over.store(1, Ordering::SeqCst);
        book
    }
}

fn group(bus: &Bus) -> GroupStatus {
    let topic = bus.topic(INPUT.name()).unwrap();
    topic.groups.into_iter().find(|group| group.name == GROUP).unwrap()
}

/// A bus with the topic and the group, from its oldest message on.
fn prepare(scene: &Scene, options: GroupOptions) -> Bus {
    let bus = scene.open();
    bus.create(&INPUT).unwrap();
    bus.create_group(INPUT.name(), GROUP, &options, Start::Oldest, false).unwrap();
    bus
}

#[test]
fn four_consumers_share_all_messages_and_the_slow_one_gets_the_fewest() {
    let scene = Scene::new("share");
    let bus = prepare(&scene, GroupOptions::new().lease(LEASE));
    let mut crew =
        Crew { scene: &scene, role: "consume", book: Book::create(&scene), next_life: 0, workers: Vec::new() };
    // Nine microseconds against ninety: the processors are shared, so the slow one must be slow by far.
    let work = if long() { Duration::from_micros(1) } else { Duration::from_micros(5) };
    for life in 0..4 {
        crew.hire(if life == 0 { 10 * work } else { work });
    }
    crew.workers.iter_mut().for_each(|(_, worker)| worker.expect("consuming"));
    let mut publisher = scene.start("publish", &messages().to_string());
    publisher.expect("published");
    let book = crew.finish(&bus);
    assert_eq!(book.count(), [0, messages(), 0], "lost, given once, given again");
    // The last ack may be on its way into the book.
    let acks = || [0, 1, 2, 3].map(|life: usize| book.head().acks_of[life].load(Ordering::SeqCst));
    await_that("the last acks", || acks().iter().map(|n| u64::from(*n)).sum::<u64>() == messages());
    let acks = acks();
    println!("acks by consumer, the slow one first: {acks:?}");
    assert!(acks[1..].iter().all(|others| acks[0] < *others), "{acks:?}");
    assert!((0..messages()).all(|sequence| book.line(sequence).acked.load(Ordering::SeqCst) == 1));
}

#[test]
fn at_least_once_loses_nothing_and_repeats_only_what_the_dead_had() {
    check_at_least_once("consume", 1);
}

#[test]
fn at_least_once_in_batches_repeats_only_what_the_dead_had() {
    check_at_least_once("consume in batches", BATCH as u64);
}

/// Each consumer has up to `in_hand` messages in hand when it is killed.
fn check_at_least_once(role: &'static str, in_hand: u64) {
    let scene = Scene::new("at-least-once");
    let bus = prepare(&scene, GroupOptions::new().lease(LEASE));
    let mut crew = Crew::new(&scene, role);
    let _publisher = scene.start("publish", &messages().to_string());
    crew.kill_many();
    let book = crew.finish(&bus);
    let [lost, once, repeated] = book.count();
    println!("{} kills: {once} given once, {repeated} again", kills());
    assert_eq!(lost, 0);
    assert_eq!(book.head().wrong.load(Ordering::SeqCst), 0, "given again though not in a dead one's hand");
    let had = u64::from(kills()) * in_hand;
    assert!(repeated <= had, "{} had {in_hand} messages in hand, {repeated} came again", kills());
}

#[test]
fn at_most_once_repeats_nothing_and_loses_only_what_the_dead_had() {
    check_at_most_once("consume", 1);
}

#[test]
fn at_most_once_in_batches_loses_only_what_the_dead_had() {
    check_at_most_once("consume in batches", BATCH as u64);
}

/// Each consumer has up to `in_hand` messages in hand when it is killed.
fn check_at_most_once(role: &'static str, in_hand: u64) {
    let scene = Scene::new("at-most-once");
    let bus = prepare(&scene, GroupOptions::new().at_most_once());
    let mut crew = Crew::new(&scene, role);
    let _publisher = scene.start("publish", &messages().to_string());
    crew.kill_many();
    let book = crew.finish(&bus);
    let [lost, once, repeated] = book.count();
    println!("{} kills: {once} given once, {lost} lost", kills());
    assert_eq!(repeated, 0);
    let had = u64::from(kills()) * in_hand;
    assert!(lost <= had, "{} had {in_hand} messages in hand, {lost} were lost", kills());
}

#[test]
fn each_input_of_an_effectively_once_pipeline_has_its_output_once() {
    let scene = Scene::new("pipeline");
    let bus = prepare(&scene, GroupOptions::new().effectively_once().lease(LEASE));
    bus.create(&OUTPUT).unwrap();
    let mut outputs = bus.subscriber(OUTPUT).start(Start::Oldest).open().unwrap();
    let reader = thread::spawn(move || {
        let mut seen = vec![0u8; messages() as usize];
        let mut left = messages();
        while left > 0 {
            let output = outputs.recv_timeout(4 * LIMIT).unwrap();
            let input = output[0];
            assert_eq!(*output, [input; 4], "a torn output");
            seen[input as usize] += 1;
            assert_eq!(seen[input as usize], 1, "input {input} has a second output");
            left -= 1;
        }
        // Whatever came twice would come about now.
        matches!(outputs.recv_timeout(Duration::from_secs(1)), Err(RecvError::TimedOut))
    });
    let mut crew = Crew::new(&scene, "pipe");
    let publisher = scene.start("publish", &messages().to_string());
    crew.kill_many();
    let book = crew.finish(&bus);
    assert!(reader.join().unwrap(), "more outputs than inputs");
    assert_eq!(book.head().wrong.load(Ordering::SeqCst), 0, "given again though not in a dead one's hand");
    let [_, once, again] = book.count();
    println!("{} kills: {once} inputs transformed once, {again} again, all committed once", kills());
    publisher.signal(Signal::SIGKILL);
}

#[test]
fn each_keys_messages_are_worked_on_in_order_and_one_at_a_time() {
    let scene = Scene::new("by-key");
    let bus = scene.open();
    bus.create(&keyed()).unwrap();
    let options = GroupOptions::new().ordered_by_key().lease(LEASE);
    bus.create_group(INPUT.name(), GROUP, &options, Start::Oldest, false).unwrap();
    let mut crew = Crew::new(&scene, "consume by key");
    let _publisher = scene.start("publish with keys", "");
    crew.kill_many();
    let book = crew.finish_at(&bus, keyed_messages());
    assert_eq!(book.head().wrong.load(Ordering::SeqCst), 0, "out of order, skipped, or two at a time");
    let per_key = |key: u64| keyed_messages() / KEYS + u64::from(key < keyed_messages() % KEYS);
    for key in 0..KEYS {
        assert_eq!(u64::from(book.head().given_of[key as usize].load(Ordering::SeqCst)), per_key(key), "key {key}");
    }
}
