//! One topic against a model that fits on a page: random publishes, batches, loans, receives, comings and goings.

mod common;

use std::time::Duration;

use common::{Random, Scene, seed};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use shmbus::{
    Bus, Full, GoneReason, Mode, OpenError, PublishError, Publisher, RecvError, Refusal, Sequence, Start, Subscriber,
    Topic, TopicOptions,
};

/// Publishers and subscribers at a time.
const HANDLES: usize = 3;

/// With at most so many messages a reader's cursor is stored at each receive, so the model can tell where it stands.
const MESSAGES: std::ops::RangeInclusive<u64> = 1..=31;

const CASES: u32 = 256;

#[derive(Clone, Debug)]
enum Step {
    OpenPublisher,
    ClosePublisher(usize),
    Publish(usize, u64),
    Loan(usize, u64, bool),
    Batch(usize, Vec<u64>),
    OpenSubscriber(From, bool),
    CloseSubscriber(usize),
    Receive(usize, usize),
}

/// A start position, relative to the tail of the moment.
#[derive(Clone, Copy, Debug)]
enum From {
    Latest,
    Oldest,
    Last(u64),
    Back(u64),
    Beyond(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let handle = 0..HANDLES;
    let len = prop_oneof![Just(0), 1..=56u64, 57..=256u64];
    let from = prop_oneof![
        Just(From::Latest),
        Just(From::Oldest),
        (0..40u64).prop_map(From::Last),
        (0..60u64).prop_map(From::Back),
        (1..4u64).prop_map(From::Beyond),
    ];
    prop_oneof![
        1 => Just(Step::OpenPublisher),
        1 => handle.clone().prop_map(Step::ClosePublisher),
        8 => (handle.clone(), len.clone()).prop_map(|(who, len)| Step::Publish(who, len)),
        3 => (handle.clone(), len.clone(), any::<bool>()).prop_map(|(who, len, publish)| Step::Loan(who, len, publish)),
        3 => (handle.clone(), prop::collection::vec(len, 1..7)).prop_map(|(who, lens)| Step::Batch(who, lens)),
        2 => (from, any::<bool>()).prop_map(|(from, droppable)| Step::OpenSubscriber(from, droppable)),
        1 => handle.clone().prop_map(Step::CloseSubscriber),
        9 => (handle, 1..12usize).prop_map(|(who, count)| Step::Receive(who, count)),
    ]
}

fn options() -> impl Strategy<Value = TopicOptions> {
    let mode = prop_oneof![Just(Mode::Many), Just(Mode::Exclusive), Just(Mode::Channel)];
    let full = prop_oneof![Just(Full::Block), Just(Full::Reject), Just(Full::Overwrite)];
    // Roomy, or so tight that payloads fill the arena before messages fill the ring.
    let bytes = prop_oneof![Just(64 << 10), Just(4096u64)];
    (mode, full, bytes, MESSAGES, any::<bool>()).prop_map(|(mode, full, bytes, messages, hold)| {
        let is_channel = mode == Mode::Channel;
        // A channel has exactly as many slots as a power of two, and nothing is overwritten there.
        let messages = if is_channel { messages.next_power_of_two().max(2) } else { messages };
        let full = if is_channel && full == Full::Overwrite { Full::Block } else { full };
        let hold = hold && !is_channel;
        TopicOptions { mode, full, bytes, messages, hold, ..TopicOptions::default() }
    })
}

/// A message as it must arrive.
struct Expected {
    payload: Vec<u8>,
    publisher: u64,
    number: u64,
    /// On topics with many publishers that of its batch.
    position: u64,
}

struct Writer {
    handle: Publisher<[u8]>,
    published: u64,
}

struct Reader {
    handle: Subscriber<[u8]>,
    gating: bool,
    /// The sequence expected next.
    next: u64,
    /// Reported before anything else.
    lost: Option<(u64, u64)>,
    /// The sequence whose place in the ring its cursor holds.
    holds: u64,
}

/// The topic, twice.
struct World {
    bus: Bus,
    topic: Topic<[u8]>,
    options: TopicOptions,
    log: Vec<Expected>,
    positions: u64,
    writers: Vec<Writer>,
    readers: Vec<Reader>,
    /// A publisher that looked before a reader came may go on up to this position.
    loose_until: u64,
    /// Where a channel's receiver left off.
    head: u64,
    had_reader: bool,
    /// Positions and bytes for which a publisher made room without publishing.
    in_flight: (u64, u64),
    random: Random,
}

type Checked = Result<(), TestCaseError>;

impl World {
    fn new(bus: Bus, topic: Topic<[u8]>, options: TopicOptions) -> World {
        bus.create_topic(topic.name(), &options, false).unwrap();
        World {
            bus,
            topic,
            options,
            log: Vec::new(),
            positions: 0,
            writers: Vec::new(),
            readers: Vec::new(),
            loose_until: 0,
            head: 0,
            had_reader: false,
            in_flight: (0, 0),
            random: Random::new(7),
        }
    }

    fn step(&mut self, step: &Step) -> Checked {
        match step {
            Step::OpenPublisher => self.open_publisher(),
            Step::ClosePublisher(who) => {
                if *who < self.writers.len() {
                    self.writers.remove(*who);
                }
                Ok(())
            }
            Step::Publish(who, len) => self.publish(*who, &[*len], Way::Plain),
            Step::Loan(who, len, publish) => {
                self.publish(*who, &[*len], if *publish { Way::Loan } else { Way::Dropped })
            }
            Step::Batch(who, lens) => self.publish(*who, lens, Way::Batch),
            Step::OpenSubscriber(from, droppable) => self.open_subscriber(*from, *droppable),
            Step::CloseSubscriber(who) => self.close_subscriber(*who),
            Step::Receive(who, count) => (0..*count).try_for_each(|_| self.receive(*who).map(drop)),
        }
    }

    fn tail(&self) -> u64 {
        self.log.len() as u64
    }

    fn position(&self, sequence: u64) -> u64 {
        self.log.get(sequence as usize).map_or(self.positions, |message| message.position)
    }

    fn is_channel(&self) -> bool {
        self.options.mode == Mode::Channel
    }

    fn open_publisher(&mut self) -> Checked {
        let opened = self.bus.publisher(self.topic.clone());
        if self.options.mode != Mode::Many && !self.writers.is_empty() {
            let taken = matches!(opened, Err(OpenError::Refused(Refusal::Taken { .. })));
            prop_assert!(taken, "a second publisher: {:?}", opened.err());
        } else if self.writers.len() < HANDLES {
            self.writers.push(Writer { handle: opened.unwrap(), published: 0 });
        }
        Ok(())
    }

    /// The sequence from which on readers hold the ring; `None`: nobody holds it.
    fn held(&self) -> Option<u64> {
        if self.is_channel() {
            return Some(self.readers.first().map_or(self.head, |reader| reader.holds));
        }
        self.readers.iter().filter(|reader| reader.gating).map(|reader| reader.holds).min()
    }

    /// Bytes of arena that were promised for these payloads at least.
    fn charge(&self, sequence: u64) -> u64 {
        // The table of a batch, and rounding up inside it, are the batch's own.
        self.log[sequence as usize].payload.len() as u64 + 16
    }

    /// Everything from here on must still be there, whoever reads.
    fn surely_retained(&self) -> u64 {
        let (positions, mut bytes) = self.in_flight;
        let (mut first, end) = (self.tail(), self.positions + positions);
        while first > 0 {
            bytes += self.charge(first - 1);
            if bytes > self.options.bytes || self.position(first - 1) + self.options.messages < end {
                break;
            }
            first -= 1;
        }
        first
    }

    /// Whether a publish of these lengths must succeed (`Some(true)`), must not, or may do either.
    fn has_room(&self, lens: &[u64]) -> Option<bool> {
        let count = if self.options.mode == Mode::Many { 1 } else { lens.len() as u64 };
        if self.options.full == Full::Overwrite && !self.is_channel() {
            return Some(true);
        }
        let Some(held) = self.held() else {
            // With `hold`, what the last reader had given back counts only as far as publishers have noticed.
            let over = self.positions + count > self.options.messages;
            return match (self.options.hold, self.had_reader) {
                (false, _) => Some(true),
                (true, false) if over => Some(false),
                (true, true) if over => None,
                (true, _) => self.has_bytes(0, lens),
            };
        };
        if self.positions + count > self.position(held) + self.options.messages {
            return if self.positions + count <= self.loose_until { None } else { Some(false) };
        }
        // The positions of a batch that is being read are held as a whole.
        let held = (0..=held).rev().take_while(|s| self.position(*s) == self.position(held)).last().unwrap_or(held);
        self.has_bytes(held, lens)
    }

    fn has_bytes(&self, held: u64, lens: &[u64]) -> Option<bool> {
        let kept: u64 = (held..self.tail()).map(|sequence| self.charge(sequence)).sum();
        let asked: u64 = lens.iter().map(|len| len + 16).sum();
        (kept + asked <= self.options.bytes).then_some(true)
    }

    fn publish(&mut self, who: usize, lens: &[u64], way: Way) -> Checked {
        if who >= self.writers.len() {
            return Ok(());
        }
        let payloads: Vec<Vec<u8>> = lens.iter().map(|len| vec![0; *len as usize]).collect();
        let payloads: Vec<Vec<u8>> = payloads
            .into_iter()
            .map(|mut payload| {
                self.random.fill(&mut payload);
                payload
            })
            .collect();
        let room = self.has_room(lens);
        // Batches and loans wait on `block` topics, for ever if need be.
        if room != Some(true) && self.options.full != Full::Reject && way != Way::Plain {
            return Ok(());
        }
        let fits_ring = self.options.mode == Mode::Many || lens.len() as u64 <= self.options.messages;
        let held = self.held();
        self.in_flight = (lens.len() as u64, lens.iter().map(|len| len + 16).sum());
        let writer = &mut self.writers[who];
        let outcome = match way {
            Way::Plain if self.random.below(2) == 0 => writer.handle.try_publish(&payloads[0]),
            Way::Plain if self.options.full == Full::Block => {
                writer.handle.publish_timeout(&payloads[0], Duration::from_micros(200)).map_err(as_full)
            }
            Way::Plain => writer.handle.publish(&payloads[0]),
            Way::Batch => writer.handle.publish_batch(payloads.iter().map(Vec::as_slice)),
            Way::Loan => writer.handle.loan_bytes(payloads[0].len()).and_then(|mut loan| {
                loan.copy_from_slice(&payloads[0]);
                loan.publish()
            }),
            Way::Dropped => {
                if let Ok(mut loan) = writer.handle.loan_bytes(payloads[0].len()) {
                    loan.fill(0xdd);
                }
                return Ok(());
            }
        };
        match outcome {
            Ok(sequence) => {
                prop_assert_ne!(room, Some(false), "published past a reader at {:?}", held);
                prop_assert!(fits_ring);
                prop_assert_eq!(sequence, Sequence::new(self.tail()));
                self.committed(who, payloads);
            }
            Err(PublishError::BatchSize { .. }) => prop_assert!(!fits_ring),
            Err(PublishError::Full { held: named, .. }) => {
                prop_assert_ne!(room, Some(true), "a full ring, held at {:?}", held);
                if room == Some(false)
                    && let Some(held) = held
                    && (!self.is_channel() || way == Way::Plain)
                {
                    prop_assert_eq!(named, self.position(held));
                }
            }
            Err(error) => prop_assert!(false, "{error:?}"),
        }
        Ok(())
    }

    fn committed(&mut self, who: usize, payloads: Vec<Vec<u8>>) {
        let many = self.options.mode == Mode::Many;
        for payload in payloads {
            let writer = &mut self.writers[who];
            writer.published += 1;
            let (publisher, number) = (writer.handle.id(), writer.published);
            self.log.push(Expected { payload, publisher, number, position: self.positions });
            self.positions += u64::from(!many);
        }
        self.in_flight = (0, 0);
        self.positions += u64::from(many);
    }

    fn open_subscriber(&mut self, from: From, droppable: bool) -> Checked {
        let tail = self.tail();
        let most = if self.is_channel() { 1 } else { HANDLES };
        if self.readers.len() >= most {
            return Ok(());
        }
        let (start, asked) = match from {
            From::Latest => (Start::Latest, tail),
            From::Oldest => (Start::Oldest, 0),
            From::Last(count) => (Start::Last(count), tail.saturating_sub(count)),
            From::Back(count) => {
                let asked = tail.saturating_sub(count);
                (Start::Sequence(Sequence::new(asked)), asked)
            }
            From::Beyond(count) => (Start::Sequence(Sequence::new(tail + count)), tail + count),
        };
        let mut builder = self.bus.subscriber(self.topic.clone()).start(start);
        let gating = self.is_channel() || (!droppable && self.options.full != Full::Overwrite);
        if droppable && !self.is_channel() {
            builder = builder.droppable();
        }
        let handle = match builder.open() {
            Err(OpenError::Refused(Refusal::BeyondTail { asked: refused, tail: named, .. })) => {
                prop_assert_eq!((refused, named), (asked, tail));
                prop_assert!(asked > tail);
                return Ok(());
            }
            other => other.unwrap(),
        };
        if self.is_channel() {
            let reader = Reader { handle, gating, next: self.head, lost: None, holds: self.head };
            self.readers.push(reader);
            return Ok(());
        }
        prop_assert!(asked <= tail, "a start beyond the tail was granted");
        // Only the ring knows how far back it goes; the lag tells.
        let begins = tail - handle.lag();
        prop_assert!(begins <= self.surely_retained().max(asked), "begins at {begins}, asked for {asked} of {tail}");
        let lost = (matches!(start, Start::Sequence(_)) && asked < begins).then_some((asked, begins));
        self.readers.push(Reader { handle, gating, next: begins.max(asked), lost, holds: begins });
        self.loose_until = self.positions + 64.max(self.options.messages);
        self.had_reader = true;
        Ok(())
    }

    fn close_subscriber(&mut self, who: usize) -> Checked {
        if who < self.readers.len() {
            self.head = self.readers.remove(who).next;
            // Leaving waits for nobody; what is asked next is answered after the cursor has gone.
            self.bus.topic(self.topic.name()).unwrap();
        }
        Ok(())
    }

    /// Receives once and compares. Returns whether something came.
    fn receive(&mut self, who: usize) -> Result<bool, TestCaseError> {
        let (tail, retained) = (self.tail(), self.surely_retained());
        let is_channel = self.is_channel();
        let Some(reader) = self.readers.get_mut(who) else { return Ok(false) };
        let at = reader.next;
        match reader.handle.try_recv() {
            Ok(None) => {
                prop_assert_eq!((at, reader.lost), (tail, None), "nothing came");
                reader.holds = at;
                return Ok(false);
            }
            Ok(Some(message)) => {
                prop_assert_eq!(reader.lost, None);
                prop_assert_eq!(message.sequence(), Sequence::new(at));
                prop_assert!(at < tail);
                let expected = &self.log[at as usize];
                prop_assert_eq!(&*message, &expected.payload[..]);
                let origin = (message.publisher(), message.publisher_number());
                let known = (Some(expected.publisher), Some(expected.number));
                prop_assert_eq!(origin, if is_channel { (None, None) } else { known });
                (reader.holds, reader.next) = (at, at + 1);
            }
            Err(RecvError::Lagged { from, to }) => {
                let (from, to) = (from.get(), to.get());
                if let Some(lost) = reader.lost.take() {
                    prop_assert_eq!((from, to), lost);
                } else {
                    prop_assert!(!reader.gating, "a reader that holds the ring lost {from}..{to}");
                    prop_assert_eq!(from, at);
                    prop_assert!(from < to && to <= retained, "lost {from}..{to} of {tail}, {retained} must be there");
                    (reader.next, reader.holds) = (to, to);
                }
            }
            Err(RecvError::Gone(GoneReason::Removed)) => {
                prop_assert_eq!((at, reader.lost), (tail, None), "gone too early");
                return Ok(false);
            }
            Err(error) => prop_assert!(false, "{error:?} at {at} of {tail}"),
        }
        Ok(true)
    }

    /// Removes the topic: readers get the rest and then hear of it, publishers at once.
    fn end(mut self) -> Checked {
        self.bus.remove_topic(self.topic.name(), true).unwrap();
        for writer in &mut self.writers {
            let outcome = writer.handle.publish(b"too late");
            prop_assert_eq!(outcome, Err(PublishError::Gone(GoneReason::Removed)));
        }
        for who in 0..self.readers.len() {
            while self.receive(who)? {}
            let outcome = self.readers[who].handle.recv().map(|message| message.sequence());
            prop_assert_eq!(outcome, Err(RecvError::Gone(GoneReason::Removed)));
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    Batch,
    Loan,
    Dropped,
}

fn as_full(error: PublishError) -> PublishError {
    match error {
        PublishError::TimedOut { holder, held } => PublishError::Full { holder, held },
        other => other,
    }
}

#[test]
fn a_topic_does_what_the_model_does() {
    let scene = Scene::new("model");
    let bus = scene.open();
    let seed = seed();
    let mut bytes = [0; 32];
    Random::new(seed).fill(&mut bytes);
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let case = std::cell::Cell::new(0);
    let strategy = (options(), prop::collection::vec(step(), 1..200));
    let outcome = runner.run(&strategy, |(options, steps)| {
        case.set(case.get() + 1);
        let topic = Topic::named(format!("case{}", case.get()));
        let mut world = World::new(bus.clone(), topic, options);
        world.open_publisher()?;
        for (index, step) in steps.iter().enumerate() {
            world.step(step).map_err(|error| TestCaseError::fail(format!("step {index}, {step:?}: {error}")))?;
        }
        world.end()
    });
    match outcome {
        Err(TestError::Fail(reason, smallest)) => panic!("seed {seed}: {reason}\nsmallest case: {smallest:?}"),
        other => other.unwrap(),
    }
    assert_eq!(bus.topics().unwrap().len(), 0);
    bus.stop().unwrap();
}
