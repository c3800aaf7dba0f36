//! Consumers as victims: each message of a dead one is settled or delivered again, never both, never neither; its dead
//! letters and outputs are there exactly once (SPEC §3, §4.4).
//!
//! The victim says how far it has come ([`reached`]): of the n-th message 2n + 1 when it has it in hand, 2n + 2 when the call
//! that ends it has returned. What must hold follows from that, message by message ([`Plan::judge`]).

use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::{Pid, gettid};
use shmbus::{Bus, Consumer, GroupOptions, GroupStatus, Mode, Pipeline, Publisher, Start, Subscriber, Topic, Wait};

use crate::checker::{
    DEADLINE, Kill, REPAIR, SURVIVOR, Survivors, Violation, await_asleep, await_within, message, publish, publisher,
    subscriber,
};
use crate::mutant::mapping_of;
use crate::scenarios::{Grain, Scenario, topic};
use crate::sleepers::{Favour, Sleeper};
use crate::tracer::{between_markers, reached};

const GROUP: &str = "group";

/// Messages that a victim finds.
const MESSAGES: u64 = 3;

/// Messages that end together, and so many of them that are taken with one swap: a run, which begins at a multiple of its length.
const BATCH: u64 = RUN + 2;
const RUN: u64 = 16;

/// Which message of a batch is kept, where one is: in the midst of its run.
const KEPT: u64 = 5;

/// Never ends in a test.
const LONG: Duration = Duration::from_secs(3600);

/// Ends before a standby is let loose.
const SHORT: Duration = Duration::from_millis(20);

/// How long a survivor waits for a message before it looks whether all is done.
const LOOK: Duration = Duration::from_millis(2);

/// What the reason of a rejection is, while its consumer lives.
const REASON: &str = "bad";

/// Who made an output.
const BY_VICTIM: u8 = 1;
const BY_SURVIVOR: u8 = 2;

/// Outputs of one input.
const OUTPUTS: usize = 2;

/// How the victim ends its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Acked,
    /// Received and acked as one batch.
    AckedTogether,
    /// The same, but for one that is kept out of it.
    AckedButOne,
    /// Received and given back as one batch.
    GivenBackTogether,
    /// At most once: gone when they are received.
    Taken,
    /// The same, as one batch.
    TakenTogether,
    /// Acked while the ring is full and a publisher sleeps until there is room.
    AckedAwaited,
    /// Acked, and then one more for which it has to sleep.
    AckedAsleep,
    GivenBack,
    /// Given back at its last attempt.
    Exhausted,
    Rejected,
    /// Made into outputs.
    Piped,
    /// Acked, after the first of them, and the place at work, were taken from a consumer that is late.
    TakenOver,
    /// The first of them is a move that is nobody's.
    Adopted,
    /// Fault: the word is settled first, the dead letter published then.
    SettledFirst,
    /// Fault: the lease names nobody.
    Anonymous,
}

#[derive(Clone, Copy)]
struct Plan {
    mode: Mode,
    ending: Ending,
}

macro_rules! consuming {
    ($name:literal, $mode:ident, $ending:ident, stride: $stride:literal, $grain:ident) => {
        Scenario {
            name: $name,
            stride: $stride,
            grain: Grain::$grain,
            victim: |bus, _| Plan { mode: Mode::$mode, ending: Ending::$ending }.work(bus),
            survivors: |bus| Ok(Box::new(Colleagues::new(bus, Plan { mode: Mode::$mode, ending: Ending::$ending })?)),
        }
    };
}

pub(crate) const SETTLES_FIRST: &str = "mutant: settles before the letter is published";
pub(crate) const ANONYMOUS: &str = "mutant: leases in nobody's name";

pub(crate) fn all() -> Vec<Scenario> {
    vec![
        consuming!("consume exclusive ack", Exclusive, Acked, stride: 400, Instruction),
        consuming!("consume many ack", Many, Acked, stride: 800, Instruction),
        consuming!("consume exclusive batch", Exclusive, AckedTogether, stride: 3000, Instruction),
        consuming!("consume many batch", Many, AckedTogether, stride: 4000, Instruction),
        consuming!("consume many batch, one kept", Many, AckedButOne, stride: 4000, Access),
        consuming!("consume many batch nack", Many, GivenBackTogether, stride: 4000, Access),
        consuming!("consume many at most once", Many, Taken, stride: 800, Instruction),
        consuming!("consume many batch at most once", Many, TakenTogether, stride: 4000, Access),
        consuming!("consume exclusive ack, publisher waits", Exclusive, AckedAwaited, stride: 2000, Instruction),
        consuming!("consume many ack, publisher waits", Many, AckedAwaited, stride: 2000, Instruction),
        consuming!("consume exclusive ack, asleep", Exclusive, AckedAsleep, stride: 2000, Instruction),
        consuming!("consume many ack, asleep", Many, AckedAsleep, stride: 2000, Instruction),
        consuming!("consume exclusive nack", Exclusive, GivenBack, stride: 400, Instruction),
        consuming!("move exclusive last attempt", Exclusive, Exhausted, stride: 10_000, Access),
        consuming!("move many reject", Many, Rejected, stride: 10_000, Access),
        consuming!("pipeline exclusive", Exclusive, Piped, stride: 2000, Access),
        consuming!("pipeline many", Many, Piped, stride: 2000, Access),
        consuming!("take-over exclusive", Exclusive, TakenOver, stride: 1000, Access),
        consuming!("take-over many", Many, TakenOver, stride: 1000, Access),
        consuming!("adoption many", Many, Adopted, stride: 10_000, Access),
        consuming!("mutant: settles before the letter is published", Many, SettledFirst, stride: 10_000, Fault),
        consuming!("mutant: leases in nobody's name", Many, Anonymous, stride: 10_000, Fault),
    ]
}

fn text<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> Violation {
    move |error| format!("{what}: {error}")
}

impl Plan {
    fn topic(self) -> Topic<[u8]> {
        topic(self.mode)
    }

    /// Where letters or outputs go.
    fn results(self) -> Topic<[u8]> {
        let topic = Topic::new("results").hold().bytes(64 << 10);
        match self.ending {
            Ending::Piped => topic.messages(64),
            // Soon full, so that moves wait.
            Ending::Adopted => topic.envelope().messages(2),
            _ => topic.envelope().messages(64),
        }
    }

    fn options(self) -> GroupOptions {
        // A pipeline's output cannot take its dead letters, too.
        if let Ending::Piped = self.ending {
            return GroupOptions::new().effectively_once().lease(LONG);
        }
        if let Ending::Taken | Ending::TakenTogether = self.ending {
            return GroupOptions::new().at_most_once();
        }
        let options = GroupOptions::new().dead_letter("results").lease(LONG);
        match self.ending {
            Ending::Exhausted => options.max_attempts(1),
            Ending::TakenOver => options.exclusive().lease(SHORT),
            _ => options,
        }
    }

    /// How many messages, or batches, the victim works on.
    fn worked(self) -> u64 {
        match self.ending {
            Ending::Acked | Ending::Taken | Ending::TakenOver => MESSAGES,
            Ending::AckedAsleep => MESSAGES + 1,
            Ending::Exhausted | Ending::Rejected | Ending::Piped | Ending::AckedAwaited => 2,
            _ => 1,
        }
    }

    /// Whether it works on one batch.
    fn is_together(self) -> bool {
        use Ending::*;
        matches!(self.ending, AckedTogether | AckedButOne | GivenBackTogether | TakenTogether)
    }

    /// The victim's part.
    fn work(self, bus: &Bus) -> ! {
        match self.ending {
            Ending::Piped => self.pipe(bus),
            Ending::SettledFirst => self.settle_first(bus),
            _ => self.consume(bus),
        }
    }

    fn consume(self, bus: &Bus) -> ! {
        let mut consumer = bus.consumer(self.topic(), GROUP).existing().wait(Wait::Park).open().unwrap();
        if self.ending == Ending::Adopted {
            between_markers(|| {
                // To take the move, and to carry it out at the latest.
                for _ in 0..2 {
                    let _kept = consumer.try_recv().unwrap().map(|message| message.keep());
                }
            })
        }
        if self.is_together() {
            between_markers(|| {
                let batch = consumer.try_recv_batch(2 * BATCH as usize).unwrap().unwrap();
                assert_eq!(batch.len() as u64, BATCH);
                if self.ending == Ending::AckedButOne {
                    let _kept = batch.iter().nth(KEPT as usize).unwrap().keep();
                }
                reached(1);
                let ended = if self.ending == Ending::GivenBackTogether { batch.nack() } else { batch.ack() };
                ended.unwrap();
                reached(2);
                if self.ending != Ending::GivenBackTogether {
                    assert!(consumer.try_recv().unwrap().is_none());
                }
            })
        }
        between_markers(|| {
            for number in 0..self.worked() {
                let message = match self.ending {
                    Ending::AckedAsleep => consumer.recv().unwrap(),
                    _ => consumer.try_recv().unwrap().unwrap(),
                };
                if self.ending == Ending::Anonymous {
                    anonymize(message.sequence().get());
                }
                reached(2 * number + 1);
                let ended = match self.ending {
                    Ending::GivenBack | Ending::Exhausted => message.nack(),
                    Ending::Rejected => message.reject(REASON),
                    Ending::Anonymous => Ok(_ = message.keep()),
                    _ => message.ack(),
                };
                ended.unwrap();
                reached(2 * number + 2);
            }
            if self.worked() == MESSAGES {
                // Finding nothing more it moves the floor.
                assert!(consumer.try_recv().unwrap().is_none());
            }
        })
    }

    fn pipe(self, bus: &Bus) -> ! {
        let mut pipeline = bus.pipeline(self.topic(), GROUP, self.results()).open().unwrap();
        between_markers(|| {
            for number in 0..self.worked() {
                let step = pipeline.step(|input, outputs| {
                    reached(2 * number + 1);
                    (0..OUTPUTS).for_each(|_| outputs.push(&output(BY_VICTIM, input)));
                    Ok(())
                });
                step.unwrap();
                reached(2 * number + 2);
            }
        })
    }

    /// What a wrong move would do.
    fn settle_first(self, bus: &Bus) -> ! {
        let mut consumer = bus.consumer(self.topic(), GROUP).existing().open().unwrap();
        let mut letters = bus.publisher(self.results()).unwrap();
        between_markers(|| {
            let message = consumer.try_recv().unwrap().unwrap();
            let (sequence, payload) = (message.sequence().get(), message.to_vec());
            let _lease = message.keep();
            reached(1);
            change_word(sequence, |word| word & !0b111 | 3);
            let headers = [("reason", REASON), ("attempts", "1"), ("origin-topic", "killed"), ("origin-group", GROUP)];
            let letter = headers
                .iter()
                .fold(shmbus::Envelope::new(), |letter, (name, value)| letter.header(name, value.as_bytes()));
            letters.publish_with(&payload, &letter.header("origin-sequence", sequence.to_string().as_bytes())).unwrap();
            reached(2);
        })
    }

    /// Whether this may have become of the victim's message `number`.
    fn judge(self, number: u64, progress: u64, seen: &Outcome) -> Result<(), Violation> {
        let kept = self.ending == Ending::AckedButOne && number == KEPT;
        let (concerned, number) =
            if self.is_together() { (number < BATCH, 0) } else { (number < self.worked(), number) };
        let (might_have, had, done) = (
            concerned && progress >= 2 * number,
            concerned && progress > 2 * number,
            concerned && progress >= 2 * number + 2,
        );
        let first = if self.ending == Ending::TakenOver && number == 0 { 2 } else { 1 };
        // Delivered once, with the attempt that follows.
        let again = match seen.delivered[..] {
            [attempt] => (attempt == first && !had) || (attempt == first + 1 && might_have),
            _ => false,
        };
        let (delivered, results) = (seen.delivered.len(), seen.results.len());
        let right = match self.ending {
            Ending::AckedButOne if kept => results == 0 && again,
            Ending::Acked
            | Ending::AckedTogether
            | Ending::AckedButOne
            | Ending::AckedAwaited
            | Ending::AckedAsleep
            | Ending::TakenOver => results == 0 && (again && !done || delivered == 0 && had),
            Ending::GivenBack | Ending::GivenBackTogether => results == 0 && again,
            Ending::Taken | Ending::TakenTogether => {
                results == 0 && (seen.delivered == [1] && !had || delivered == 0 && might_have)
            }
            Ending::Rejected | Ending::SettledFirst => {
                (again && !done && results == 0) || (delivered == 0 && results == 1 && had)
            }
            Ending::Exhausted => {
                let untouched = seen.delivered == [1] && results == 0 && !had;
                untouched || delivered == 0 && results == 1 && might_have
            }
            Ending::Adopted if number == 0 => delivered == 0 && results == 1,
            Ending::Adopted => matches!(seen.delivered[..], [1 | 2]) && results == 0,
            Ending::Anonymous => results == 0 && again,
            Ending::Piped => {
                let by = |maker: u8| seen.results.len() == OUTPUTS && seen.results.iter().all(|by| *by == maker);
                by(BY_VICTIM) && had || by(BY_SURVIVOR) && !done
            }
        };
        let wrong = || format!("message {number} of the victim, whose progress was {progress}: {seen:?}");
        if right { Ok(()) } else { Err(wrong()) }
    }
}

/// An output says who made it, and of what.
fn output(maker: u8, input: &[u8]) -> Vec<u8> {
    [&[maker; 8], input].concat()
}

/// Takes the owner out of a lease.
fn anonymize(sequence: u64) {
    change_word(sequence, |word| word | 255 << 3);
}

/// Changes a word of the group's ledger behind the library's back.
pub(crate) fn change_word(sequence: u64, change: impl FnOnce(u64) -> u64) {
    // Page of header, the ledger's own, then the words, as many as the default window has (ARCHITECTURE.md §3.4).
    let word = mapping_of(":ledger-") + 4096 + 768 + 8 * (sequence % 1024) as usize;
    let word = word as *mut u64;
    // SAFETY: the word lies in the mapping, aligned, which lives as long as the consumer.
    unsafe { word.write_volatile(change(word.read_volatile())) };
}

/// What became of one message.
#[derive(Debug, Default)]
struct Outcome {
    /// The attempts of its deliveries to survivors.
    delivered: Vec<u32>,
    /// Its dead letters, or its outputs by their maker.
    results: Vec<u8>,
}

/// Takes what the dead leave.
enum Peer {
    Consumer(Box<Consumer<[u8]>>),
    Pipeline(Box<Pipeline<[u8], [u8]>>),
}

/// The publisher that waited, and what it published.
type Waited = (Publisher<[u8]>, Result<u64, Violation>);

/// The publisher, and what it published if it did.
type Favoured = (Publisher<[u8]>, Option<Result<u64, Violation>>);

/// Lives through the deaths of consumers: a publisher, another consumer of the group, and who reads its dead letters or
/// outputs.
struct Colleagues {
    plan: Plan,
    bus: Bus,
    publisher: Option<Publisher<[u8]>>,
    /// Gives it back when it has found room.
    waiting: Option<Receiver<Waited>>,
    /// A publish that the victim waits for, with its message.
    favour: Option<(Favour<Favoured>, Vec<u8>)>,
    peer: Peer,
    results: Subscriber<[u8]>,
    /// The first message of this life.
    first: u64,
    messages: Vec<Vec<u8>>,
    number: u64,
    memory_bytes: Option<u64>,
}

impl Colleagues {
    fn new(bus: &Bus, plan: Plan) -> Result<Colleagues, Violation> {
        let open = |error: shmbus::OpenError| format!("setting up: {error}");
        bus.create(&plan.topic()).map_err(open)?;
        bus.create(&plan.results()).map_err(open)?;
        bus.create_group(plan.topic().name(), GROUP, &plan.options(), Start::Oldest, false).map_err(open)?;
        let peer = match plan.ending {
            Ending::Piped => {
                Peer::Pipeline(Box::new(bus.pipeline(plan.topic(), GROUP, plan.results()).open().map_err(open)?))
            }
            _ => Peer::Consumer(Box::new(bus.consumer(plan.topic(), GROUP).existing().open().map_err(open)?)),
        };
        let results = subscriber(bus, &plan.results(), Start::Oldest, Wait::Adaptive)?;
        let publisher = Some(publisher(bus, &plan.topic())?.wait(Wait::Park));
        let (bus, messages, waiting) = (bus.clone(), Vec::new(), None);
        Ok(Colleagues {
            plan,
            bus,
            publisher,
            waiting,
            favour: None,
            peer,
            results,
            first: 0,
            messages,
            number: 0,
            memory_bytes: None,
        })
    }

    fn tail(&self) -> u64 {
        self.first + self.messages.len() as u64
    }

    /// The next message of the harness's own.
    fn message(&mut self) -> Vec<u8> {
        self.number += 1;
        message(SURVIVOR, self.number, 40)
    }

    fn publisher(&mut self) -> Result<&mut Publisher<[u8]>, Violation> {
        self.publisher.as_mut().ok_or_else(|| "the publisher was lost with an earlier violation".to_owned())
    }

    fn publish(&mut self) -> Result<(), Violation> {
        let message = self.message();
        let sequence = publish(self.publisher()?, &message)?;
        self.note(sequence, message)
    }

    fn note(&mut self, sequence: u64, message: Vec<u8>) -> Result<(), Violation> {
        if sequence != self.tail() {
            return Err(format!("a survivor published sequence {sequence}, expected {}", self.tail()));
        }
        self.messages.push(message);
        Ok(())
    }

    /// Fills the ring, which the group holds, and lets a publisher sleep until there is room.
    fn start_waiting(&mut self) -> Result<(), Violation> {
        loop {
            let message = self.message();
            match self.publisher()?.try_publish(&message) {
                Ok(sequence) => self.note(sequence.get(), message)?,
                Err(shmbus::PublishError::Full { .. }) => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        let mut publisher = self.publisher.take().ok_or("no publisher")?;
        let (message, (done, waiting), (tell, told)) = (self.message(), channel(), channel());
        self.messages.push(message.clone());
        thread::spawn(move || {
            let _ = tell.send(gettid());
            let published = publish(&mut publisher, &message);
            let _ = done.send((publisher, published));
        });
        self.waiting = Some(waiting);
        await_asleep(told.recv().map_err(|error| error.to_string())?)
    }

    /// The publisher is woken as soon as there is room, which the survivors make.
    fn stop_waiting(&mut self, killed: Instant) -> Result<(), Violation> {
        let Some(waiting) = self.waiting.take() else { return Ok(()) };
        let (publisher, published) = waiting.recv_timeout(DEADLINE).map_err(|_| "a publisher sleeps on".to_owned())?;
        self.publisher = Some(publisher);
        let (slept, last) = (killed.elapsed(), self.tail() - 1);
        if slept > REPAIR {
            return Err(format!("a publisher slept for {slept:?} though there was room"));
        }
        if published? == last { Ok(()) } else { Err("the message that waited came elsewhere".to_owned()) }
    }

    fn group(&self) -> Result<GroupStatus, Violation> {
        let status = self.bus.topic(self.plan.topic().name()).map_err(text("status"))?;
        status.groups.into_iter().next().ok_or_else(|| "the group is gone".to_owned())
    }

    /// The survivor takes the first message and is late with it.
    fn be_late(&mut self) -> Result<(), Violation> {
        let Peer::Consumer(consumer) = &mut self.peer else { return Ok(()) };
        let taken = consumer.recv_timeout(DEADLINE).map_err(text("the consumer at work"))?;
        let sequence = taken.keep().sequence().get();
        if sequence != self.first {
            return Err(format!("the consumer at work received {sequence}, expected {}", self.first));
        }
        await_within("the lease ends", || Ok(self.group()?.oldest_lease.is_some_and(|lease| lease.ends_in_ms == 0)))
    }

    /// Somebody begins to move the first message, cannot, and leaves.
    fn leave_a_move(&mut self) -> Result<(), Violation> {
        let mut filler = publisher(&self.bus, &self.plan.results())?;
        while filler.try_publish(b"filler").is_ok() {}
        let opened = self.bus.consumer(self.plan.topic(), GROUP).existing().open();
        let mut consumer = opened.map_err(text("the one who leaves"))?;
        let taken = consumer.recv_timeout(DEADLINE).map_err(text("the one who leaves"))?;
        taken.reject(REASON).map_err(text("the one who leaves"))?;
        drop((consumer, filler));
        while self.results.try_recv().map_err(text("the letters' reader"))?.is_some() {}
        let group = self.group()?;
        if group.moving == 1 { Ok(()) } else { Err(format!("no move was left behind: {group:?}")) }
    }

    /// The survivors take what there is until the group has settled everything.
    fn drain(&mut self) -> Result<Vec<Outcome>, Violation> {
        let mut outcomes: Vec<Outcome> = self.messages.iter().map(|_| Outcome::default()).collect();
        let (end, tail) = (Instant::now() + DEADLINE, self.tail());
        while self.floor() < tail {
            if let Some((sequence, attempt, payload)) = self.take()? {
                let at = sequence.checked_sub(self.first).map_or(usize::MAX, |at| at as usize);
                match self.messages.get(at) {
                    Some(message) if *message == payload => outcomes[at].delivered.push(attempt),
                    _ => {
                        return Err(format!(
                            "sequence {sequence} was delivered, wrong or too late, first {}",
                            self.first
                        ));
                    }
                }
            }
            self.read_results(&mut outcomes)?;
            if Instant::now() > end {
                let (floor, group) = (self.floor(), self.group()?);
                return Err(format!("the floor stays at {floor}, the tail is {tail}: {group:?}; {outcomes:?}"));
            }
        }
        self.read_results(&mut outcomes)?;
        Ok(outcomes)
    }

    fn floor(&self) -> u64 {
        match &self.peer {
            Peer::Consumer(consumer) => consumer.floor().get(),
            Peer::Pipeline(pipeline) => pipeline.consumer().floor().get(),
        }
    }

    /// The survivor's next message, acknowledged; a pipeline's leaves an output instead.
    fn take(&mut self) -> Result<Option<(u64, u32, Vec<u8>)>, Violation> {
        match &mut self.peer {
            Peer::Consumer(consumer) => match consumer.recv_timeout(LOOK) {
                Ok(message) => {
                    let taken = (message.sequence().get(), message.attempt(), message.to_vec());
                    message.ack().map_err(text("a survivor's ack"))?;
                    Ok(Some(taken))
                }
                Err(shmbus::RecvError::TimedOut) => Ok(None),
                Err(error) => Err(format!("a survivor cannot receive: {error}")),
            },
            Peer::Pipeline(pipeline) => {
                let step = pipeline.step_timeout(LOOK, |input, outputs| {
                    (0..OUTPUTS).for_each(|_| outputs.push(&output(BY_SURVIVOR, input)));
                    Ok(())
                });
                step.map(|_| None).map_err(text("the surviving pipeline"))
            }
        }
    }

    fn read_results(&mut self, outcomes: &mut [Outcome]) -> Result<(), Violation> {
        while let Some(result) = self.results.try_recv().map_err(text("the results' reader"))? {
            let (maker, payload) =
                if self.plan.ending == Ending::Piped { (result[0], &result[8..]) } else { (0, &result[..]) };
            let Some(at) = self.messages.iter().position(|message| message == payload) else {
                return Err("a letter or output too many, or of nothing".to_owned());
            };
            if self.plan.ending != Ending::Piped {
                let header = |name| result.header(name).map(|value| String::from_utf8_lossy(value).into_owned());
                let found = ["origin-topic", "origin-group", "origin-sequence", "attempts"].map(header);
                let sequence = (self.first + at as u64).to_string();
                let expected = [self.plan.topic().name(), GROUP, &sequence, "1"].map(|value| Some(value.to_owned()));
                let reason = header("reason").unwrap_or_default();
                let reasons: &[&str] =
                    if self.plan.ending == Ending::Exhausted { &["attempts exhausted"] } else { &[REASON, "rejected"] };
                if found != expected || !reasons.contains(&&*reason) {
                    return Err(format!("a letter says {found:?} and {reason:?}, expected {expected:?}"));
                }
            }
            outcomes[at].results.push(maker);
        }
        Ok(())
    }

    fn check_nothing_leaked(&mut self, pid: Pid) -> Result<(), Violation> {
        let group = self.group()?;
        let held = (group.consumers.len(), group.in_flight, group.returned, group.moving, group.floor);
        if held != (1, 0, 0, 0, self.tail()) {
            return Err(format!("something was left of {pid}: {group:?}"));
        }
        let status = self.bus.topic(self.plan.topic().name()).map_err(text("status"))?;
        let before = *self.memory_bytes.get_or_insert(status.memory_bytes);
        if status.memory_bytes != before || status.publishers.len() != 1 {
            return Err(format!("the topic took {before} bytes before: {status:?}"));
        }
        Ok(())
    }

    fn await_buried(&self, pid: Pid) -> Result<(), Violation> {
        let pid = pid.as_raw() as u32;
        await_within("the dead consumer's place is free", || {
            let results = self.bus.topic(self.plan.results().name()).map_err(text("status"))?;
            let consumers = self.group()?.consumers;
            Ok(consumers.iter().all(|c| c.pid != pid) && results.publishers.iter().all(|p| p.pid != pid))
        })
    }
}

impl Survivors for Colleagues {
    fn ready(&mut self, _life: u64) -> Result<(), Violation> {
        if self.plan.is_together() {
            (0..(RUN - self.tail() % RUN) % RUN).try_for_each(|_| self.publish())?;
            self.drain()?;
        }
        (self.first, self.messages) = (self.tail(), Vec::new());
        let count = if self.plan.is_together() { BATCH } else { MESSAGES };
        (0..count).try_for_each(|_| self.publish())?;
        match self.plan.ending {
            Ending::TakenOver => self.be_late(),
            Ending::Adopted => self.leave_a_move(),
            Ending::AckedAwaited => self.start_waiting(),
            _ => Ok(()),
        }
    }

    fn favour(&mut self, victim: Sleeper) -> Result<(), Violation> {
        if self.plan.ending == Ending::AckedAsleep {
            let (publisher, message) = (self.publisher.take().ok_or("no publisher")?, self.message());
            let sent = message.clone();
            let act = move |(publisher, published): &mut Favoured| *published = Some(publish(publisher, &sent));
            self.favour = Some((Favour::begin(victim, (publisher, None), act), message));
        }
        Ok(())
    }

    fn after(&mut self, kill: Kill) -> Result<(), Violation> {
        let killed = Instant::now();
        if let Some((favour, message)) = self.favour.take() {
            let (publisher, published) = favour.end()?;
            self.publisher = Some(publisher);
            published.map_or(Ok(()), |sequence| self.note(sequence?, message))?;
        }
        if self.waiting.is_none() {
            // Nobody waits for the repair.
            self.publish()?;
        }
        let outcomes = self.drain()?;
        self.stop_waiting(killed)?;
        for (number, outcome) in (0..).zip(&outcomes) {
            self.plan.judge(number, kill.progress, outcome)?;
        }
        if kill.after_all && kill.progress != 2 * self.plan.worked() && self.plan.ending != Ending::Adopted {
            return Err(format!("the operation is over, but its progress was {}", kill.progress));
        }
        self.await_buried(kill.pid)?;
        self.check_nothing_leaked(kill.pid)
    }
}
