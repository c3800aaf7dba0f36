//! What the processes of the random schedule do, and write down.

use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{ForkResult, fork};
use shmbus::{Bus, OpenError, PublishError, Publisher, RecvError, Refusal, Start, Topic, WildcardError};

use super::common::{LIMIT, Random, checksum, end_with_the_test, publisher_after, say};
use super::history::{Event, Journal, Stamp};

/// The topics, by their numbers in the history.
pub(crate) const QUEUE: u32 = 0;
pub(crate) const INPUT: u32 = 1;
pub(crate) const OUTPUT: u32 = 2;
pub(crate) const TOPICS: [u32; 3] = [QUEUE, INPUT, OUTPUT];

pub(crate) const GROUP: &str = "workers";
pub(crate) const PIPE: &str = "pipe";

/// Origins that are no lives.
pub(crate) const NAMED: u64 = 1 << 32;
pub(crate) const OUTPUTS: u64 = 2 << 32;
pub(crate) const LAST: u64 = 3 << 32;

/// Outputs of each input.
pub(crate) const OUTPUTS_EACH: u64 = 2;

/// How long to wait before looking whether the schedule goes on.
const GLANCE: Duration = Duration::from_millis(20);

/// One operation in so many forks.
const FORK_ONE_IN: u64 = 2_000;

pub(crate) fn topic(number: u32) -> Topic<[u8]> {
    let sized = |topic: Topic<[u8]>| topic.messages(1024).bytes(1 << 20);
    match number {
        QUEUE => sized(Topic::new("soak.queue")),
        INPUT => sized(Topic::new("soak.input").exclusive()),
        _ => sized(Topic::new("soak.output")),
    }
}

fn number_of(name: &str) -> u32 {
    TOPICS.into_iter().find(|number| topic(*number).name() == name).expect("one of ours")
}

/// How far the schedule has come; mapped by everybody.
pub(crate) struct Stage(MmapRaw);

/// Publishers end.
pub(crate) const CLOSING: u32 = 1;
/// Everybody ends.
pub(crate) const CLOSED: u32 = 2;

impl Stage {
    pub(crate) fn open(path: &Path) -> Stage {
        let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        file.set_len(64).unwrap();
        Stage(MmapRaw::map_raw(&file).unwrap())
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: the file has 64 bytes, and a mapping is aligned to pages.
        unsafe { &*self.0.as_ptr().cast::<AtomicU32>() }
    }

    pub(crate) fn reach(&self, phase: u32) {
        self.word().store(phase, Ordering::SeqCst);
    }

    fn is_before(&self, phase: u32) -> bool {
        self.word().load(Ordering::SeqCst) < phase
    }
}

/// A message that can be checked by itself.
pub(crate) fn message(stamp: Stamp, filler: usize) -> Vec<u8> {
    let words = [stamp.origin, stamp.number, u64::from(stamp.before), u64::from(stamp.after)];
    let mut message: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    message.extend((0..filler).map(|at| (at as u64 ^ stamp.number) as u8));
    let sum = checksum(&message);
    message.extend(sum.to_le_bytes());
    message
}

/// What it says about itself; `None` where it is torn.
pub(crate) fn stamp_of(message: &[u8]) -> Option<Stamp> {
    let (body, sum) = message.split_last_chunk::<8>()?;
    let word = |index: usize| Some(u64::from_le_bytes(body.get(8 * index..8 * index + 8)?.try_into().ok()?));
    let stamp = Stamp { origin: word(0)?, number: word(1)?, before: word(2)? as u32, after: word(3)? as u32 };
    (checksum(body) == u64::from_le_bytes(*sum)).then_some(stamp)
}

/// One process of the schedule.
struct Life {
    journal: &'static Journal,
    stage: Stage,
    life: u64,
    /// Time between two publishes.
    pace: Duration,
    random: RefCell<Random>,
    bus: Bus,
}

/// Plays a role. Arguments: life, seed, microseconds between publishes, directory of the history.
pub(crate) fn play(role: &str, arguments: &str) {
    end_with_the_test();
    let [life, seed, pace, directory] = arguments.splitn(4, ' ').collect::<Vec<_>>()[..] else { panic!("{arguments}") };
    let directory = Path::new(directory);
    let journal: &Journal = Box::leak(Box::new(Journal::open(&directory.join(life))));
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        journal.write(Event::Failed);
        default_hook(panic);
    }));
    // SAFETY: no handler of this process reads its children's ends.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
    let life = Life {
        journal,
        stage: Stage::open(&directory.join("stage")),
        life: life.parse().unwrap(),
        pace: Duration::from_micros(pace.parse().unwrap()),
        random: RefCell::new(Random::new(seed.parse().unwrap())),
        bus: open_bus(),
    };
    match role {
        "publish" => life.publish(&mut life.bus.publisher(topic(QUEUE)).unwrap(), QUEUE),
        "publish alone" => life.publish(&mut publisher_after(&life.bus, &topic(INPUT)), INPUT),
        "publish as" => life.publish_as(),
        "read" => life.read(TOPICS[life.life as usize % TOPICS.len()]),
        "read all" => life.read_all(),
        "consume" => life.consume(),
        "pipe" => life.pipe(),
        _ => panic!("no role {role}"),
    }
    say("done");
}

/// The bus; whoever starts while nobody serves may have to try again.
fn open_bus() -> Bus {
    let deadline = Instant::now() + LIMIT;
    loop {
        match Bus::open_default() {
            Ok(bus) => return bus,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

impl Life {
    fn below(&self, end: u64) -> u64 {
        self.random.borrow_mut().below(end)
    }

    fn filler(&self) -> usize {
        [0, 16, 200, 3000][self.below(4) as usize] + self.below(8) as usize
    }

    /// Now and then forks a child with copies of all handles, which must be refused, and that outlives its parent if that is
    /// killed just then.
    fn maybe_fork(&self, is_refused: impl FnOnce() -> bool) {
        if self.below(FORK_ONE_IN) > 0 {
            return;
        }
        // SAFETY: the other threads of this process hold no lock for longer than a moment, but for the allocator's, which
        // survives a fork; and the child takes none before it ends without running anything of its parent's.
        if let ForkResult::Child = unsafe { fork() }.unwrap() {
            if !is_refused() {
                self.journal.write(Event::Failed);
            }
            thread::sleep(Duration::from_millis(100));
            // SAFETY: ends the child without the handlers and buffers of its parent.
            unsafe { libc::_exit(0) }
        }
    }

    /// Publishes single messages and batches under the life's number.
    fn publish(&self, publisher: &mut Publisher<[u8]>, topic: u32) {
        let mut next = 1;
        while self.stage.is_before(CLOSING) {
            let count = if self.below(3) == 0 { 2 + self.below(6) as u32 } else { 1 };
            let stamp = |at: u32| {
                let number = next + u64::from(at);
                Stamp { origin: self.life, number, before: at, after: count - 1 - at }
            };
            let stamps: Vec<Stamp> = (0..count).map(stamp).collect();
            stamps.iter().for_each(|stamp| self.journal.write(Event::Attempted { topic, stamp: *stamp }));
            let batch: Vec<Vec<u8>> = stamps.iter().map(|stamp| message(*stamp, self.filler())).collect();
            let first = if count == 1 {
                publisher.publish(&batch[0])
            } else {
                publisher.publish_batch(batch.iter().map(Vec::as_slice))
            };
            let first = first.unwrap().get();
            for (sequence, stamp) in (first..).zip(stamps) {
                self.journal.write(Event::Acknowledged { topic, stamp, sequence });
            }
            next += u64::from(count);
            self.maybe_fork(|| matches!(publisher.try_publish(b"child"), Err(PublishError::Forked { .. })));
            thread::sleep(self.pace);
        }
    }

    /// Publishes numbered messages under a name that many lives have in turn; first what the last one had done, once more.
    fn publish_as(&self) {
        let Some(mut publisher) = self.take_name() else { return };
        let mut number = publisher.last_number().unwrap().max(1);
        while self.stage.is_before(CLOSING) {
            let stamp = Stamp { origin: NAMED, number, before: 0, after: 0 };
            self.journal.write(Event::Attempted { topic: QUEUE, stamp });
            // The filler depends on the number alone: whoever publishes it publishes the same.
            let outcome = publisher.publish_numbered(&message(stamp, (number % 97) as usize), number);
            let sequence = match outcome {
                Ok(sequence) | Err(PublishError::Duplicate { sequence: Some(sequence) }) => Some(sequence),
                Err(PublishError::Duplicate { sequence: None }) => None,
                Err(PublishError::Fenced) => return,
                Err(error) => panic!("{error}"),
            };
            if let Some(sequence) = sequence {
                self.journal.write(Event::Acknowledged { topic: QUEUE, stamp, sequence: sequence.get() });
            }
            number += 1;
            thread::sleep(self.pace);
        }
    }

    /// The name; on a ring that is too full to fence its holder, as soon as there is room.
    fn take_name(&self) -> Option<Publisher<[u8]>> {
        let deadline = Instant::now() + LIMIT;
        while self.stage.is_before(CLOSING) {
            match self.bus.publisher_as(topic(QUEUE), "till-7") {
                Ok(publisher) => return Some(publisher),
                Err(OpenError::Refused(Refusal::FullForFence { .. })) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
        None
    }

    /// Reads one topic to its end, from its oldest message or the latest on.
    fn read(&self, number: u32) {
        let start = if self.below(2) == 0 { Start::Oldest } else { Start::Latest };
        let mut subscriber = self.bus.subscriber(topic(number)).start(start).open().unwrap();
        say("reading");
        loop {
            match subscriber.recv_timeout(LIMIT) {
                Ok(received) => {
                    let stamp = stamp_of(&received);
                    let sequence = received.sequence().get();
                    self.journal.write(Event::Received { topic: number, sequence, stamp });
                    if stamp.is_some_and(|stamp| stamp.origin == LAST) {
                        return;
                    }
                }
                Err(error) => panic!("{error}"),
            }
            self.maybe_fork(|| matches!(subscriber.try_recv(), Err(RecvError::Forked { .. })));
        }
    }

    /// Reads all topics by a wildcard, to their ends.
    fn read_all(&self) {
        let mut subscriber = self.bus.wildcard::<[u8]>("soak.>").start(Start::Oldest).open().unwrap();
        say("reading");
        let mut open = TOPICS.len();
        while open > 0 {
            let received = subscriber.recv_timeout(LIMIT).unwrap();
            let (topic, sequence, stamp) =
                (number_of(received.topic()), received.sequence().get(), stamp_of(received.as_bytes()));
            self.journal.write(Event::Received { topic, sequence, stamp });
            open -= usize::from(stamp.is_some_and(|stamp| stamp.origin == LAST));
            let refused = || matches!(subscriber.try_recv(), Err(WildcardError::Connect(_)));
            self.maybe_fork(refused);
        }
    }

    /// Consumes, by ones or in batches.
    fn consume(&self) {
        let mut consumer = self.bus.consumer(topic(QUEUE), GROUP).existing().open().unwrap();
        let count = if self.below(2) == 0 { 1 } else { 8 };
        while self.stage.is_before(CLOSED) {
            match consumer.recv_batch_timeout(count, GLANCE) {
                Ok(batch) => {
                    let at_ns = now_ns();
                    let sequences: Vec<u64> = batch.iter().map(|item| item.sequence().get()).collect();
                    for item in batch.iter() {
                        let (sequence, stamp) = (item.sequence().get(), stamp_of(item.as_bytes()));
                        let attempt = item.attempt();
                        self.journal.write(Event::Given { topic: QUEUE, sequence, stamp, attempt, at_ns });
                    }
                    batch.ack().unwrap();
                    sequences
                        .into_iter()
                        .for_each(|sequence| self.journal.write(Event::Acked { topic: QUEUE, sequence }));
                }
                Err(RecvError::TimedOut) => {}
                Err(error) => panic!("{error}"),
            }
            self.maybe_fork(|| matches!(consumer.try_recv(), Err(RecvError::Forked { .. })));
        }
    }

    /// Makes two outputs of each input.
    fn pipe(&self) {
        let mut pipeline = self.bus.pipeline(topic(INPUT), PIPE, topic(OUTPUT)).existing().open().unwrap();
        while self.stage.is_before(CLOSED) {
            let step = pipeline.step_timeout(GLANCE, |input, outputs| {
                if stamp_of(input.as_bytes()).is_some_and(|stamp| stamp.origin == LAST) {
                    return Ok(());
                }
                for at in 0..OUTPUTS_EACH {
                    let number = input.sequence().get() * OUTPUTS_EACH + at;
                    let (before, after) = (at as u32, (OUTPUTS_EACH - 1 - at) as u32);
                    let stamp = Stamp { origin: OUTPUTS, number, before, after };
                    self.journal.write(Event::Attempted { topic: OUTPUT, stamp });
                    outputs.push(&message(stamp, self.filler()));
                }
                Ok(())
            });
            step.unwrap();
        }
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
