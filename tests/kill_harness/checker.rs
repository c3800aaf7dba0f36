//! What the survivors of a kill may expect, seen from outside through the public interface alone.

use std::fs;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::{Pid, gettid};
use shmbus::{Bus, Mode, OpenError, Publisher, Refusal, Sequence, Start, Subscriber, Topic, TopicStatus, Wait};

use crate::common::Random;
use crate::sleepers::{Favour, Sleeper};

/// How long anything may take that the contract does at once; for a machine that is very busy.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);

/// How long a sleeper may sleep on once its waker's death has been noticed: 10 ms by contract, and then what a busy machine
/// adds; less than the second after which a sleeper looks up by itself.
pub(crate) const REPAIR: Duration = Duration::from_millis(500);

/// What the harness's own messages carry in the place of a life.
pub(crate) const SURVIVOR: u64 = u64::MAX;

/// What the contract does not allow.
pub(crate) type Violation = String;

/// The messages of a life: those before its operation, and those in it.
pub(crate) type Messages = (Vec<Vec<u8>>, Vec<Vec<u8>>);

/// A scenario's messages.
pub(crate) type Published = fn(u64) -> Messages;

/// One kill, as far as survivors need to know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kill {
    /// The how-manieth victim.
    pub(crate) life: u64,
    pub(crate) pid: Pid,
    /// Nothing of the operation was executed.
    pub(crate) before_all: bool,
    /// All of it was.
    pub(crate) after_all: bool,
    /// How far the victim said it was.
    pub(crate) progress: u64,
}

/// Those who live through the kills of one scenario.
pub(crate) trait Survivors {
    /// The victim stands before its operation.
    fn ready(&mut self, _life: u64) -> Result<(), Violation> {
        Ok(())
    }

    /// The victim goes on, and is to find what it will wait for as soon as it sleeps.
    fn favour(&mut self, _victim: Sleeper) -> Result<(), Violation> {
        Ok(())
    }

    /// The victim stands where it is to die.
    fn meanwhile(&mut self, _life: u64) -> Result<(), Violation> {
        Ok(())
    }

    /// The victim is dead.
    fn after(&mut self, kill: Kill) -> Result<(), Violation>;
}

/// A message that can be told from every other one, torn or misplaced.
pub(crate) fn message(life: u64, number: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len.max(16)];
    Random::new(life.rotate_left(20) ^ number).fill(&mut bytes);
    bytes[..8].copy_from_slice(&life.to_le_bytes());
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Waits until something holds, within the deadline.
pub(crate) fn await_within(
    what: &str,
    mut condition: impl FnMut() -> Result<bool, Violation>,
) -> Result<(), Violation> {
    let end = Instant::now() + DEADLINE;
    while !condition()? {
        if Instant::now() > end {
            return Err(format!("waited {DEADLINE:?} in vain: {what}"));
        }
        thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

pub(crate) fn status(bus: &Bus, topic: &Topic<[u8]>) -> Result<TopicStatus, Violation> {
    bus.topic(topic.name()).map_err(|error| format!("status: {error}"))
}

/// Waits until a process is on the topic no more.
pub(crate) fn await_buried(bus: &Bus, topic: &Topic<[u8]>, pid: Pid) -> Result<(), Violation> {
    let pid = pid.as_raw() as u32;
    await_within("the dead process's place is free", || {
        let status = status(bus, topic)?;
        Ok(status.publishers.iter().all(|p| p.pid != pid) && status.subscribers.iter().all(|s| s.pid != pid))
    })
}

/// Opens a publisher; on exclusive topics as soon as the place is free.
pub(crate) fn publisher(bus: &Bus, topic: &Topic<[u8]>) -> Result<Publisher<[u8]>, Violation> {
    let mut opened = None;
    await_within("a publisher's place", || match bus.publisher(topic.clone()) {
        Ok(publisher) => Ok(opened.insert(publisher).id() > 0),
        Err(OpenError::Refused(Refusal::Taken { .. })) => Ok(false),
        Err(error) => Err(format!("cannot open a publisher: {error}")),
    })?;
    opened.ok_or_else(|| "no publisher".to_owned())
}

pub(crate) fn subscriber(
    bus: &Bus,
    topic: &Topic<[u8]>,
    start: Start,
    wait: Wait,
) -> Result<Subscriber<[u8]>, Violation> {
    let mut opened = None;
    await_within("a subscriber's place", || match bus.subscriber(topic.clone()).start(start).wait(wait).open() {
        Ok(subscriber) => Ok(opened.insert(subscriber).lag() < u64::MAX),
        Err(OpenError::Refused(Refusal::Taken { .. } | Refusal::Limit { .. })) => Ok(false),
        Err(error) => Err(format!("cannot open a subscriber: {error}")),
    })?;
    opened.ok_or_else(|| "no subscriber".to_owned())
}

pub(crate) fn publish(publisher: &mut Publisher<[u8]>, message: &[u8]) -> Result<u64, Violation> {
    let published = publisher.publish_timeout(message, DEADLINE);
    published.map(|sequence| sequence.get()).map_err(|error| format!("a survivor cannot publish: {error}"))
}

/// Checks that exactly these messages came, without a hole.
pub(crate) fn check_run(who: &str, found: &[Received], first: u64, expected: &[Vec<u8>]) -> Result<(), Violation> {
    for (at, received) in found.iter().enumerate() {
        let (sequence, bytes) = received;
        if *sequence != first + at as u64 {
            return Err(format!("{who} received sequence {sequence}, expected {}", first + at as u64));
        }
        match expected.get(at) {
            Some(message) if message == bytes => {}
            Some(message) => {
                let same = message.iter().zip(bytes).take_while(|(a, b)| a == b).count();
                let (found, expected) = (bytes.len(), message.len());
                return Err(format!(
                    "{who} received a torn or wrong message at {sequence}: {found} bytes, expected {expected}, \
                     different from byte {same} on"
                ));
            }
            None => return Err(format!("{who} received a message too many at {sequence}")),
        }
    }
    if found.len() < expected.len() {
        return Err(format!("{who} received {} messages of {}", found.len(), expected.len()));
    }
    Ok(())
}

pub(crate) type Received = (u64, Vec<u8>);

/// A subscriber that lives through it all.
enum Reader {
    /// Polls when asked.
    Awake(Box<Subscriber<[u8]>>),
    /// Sleeps on a thread of its own until a message wakes it.
    Asleep { thread: Pid, messages: Receiver<Result<Received, Violation>> },
}

impl Reader {
    fn open(bus: &Bus, topic: &Topic<[u8]>, asleep: bool) -> Result<Reader, Violation> {
        let wait = if asleep { Wait::Park } else { Wait::Adaptive };
        let mut subscriber = subscriber(bus, topic, Start::Oldest, wait)?;
        if !asleep {
            return Ok(Reader::Awake(Box::new(subscriber)));
        }
        let ((sender, messages), (tell, told)) = (channel(), channel());
        thread::spawn(move || {
            let _ = tell.send(gettid());
            loop {
                let received = subscriber.recv().map(|message| (message.sequence().get(), message.to_vec()));
                let over = received.is_err();
                if sender.send(received.map_err(|error| format!("a sleeping reader: {error}"))).is_err() || over {
                    return;
                }
            }
        });
        let thread = told.recv().map_err(|error| error.to_string())?;
        Ok(Reader::Asleep { thread, messages })
    }

    /// The next message, if it comes in time.
    fn next(&mut self, patience: Duration) -> Result<Option<Received>, Violation> {
        match self {
            Reader::Awake(subscriber) => match subscriber.recv_timeout(patience) {
                Ok(message) => Ok(Some((message.sequence().get(), message.to_vec()))),
                Err(shmbus::RecvError::TimedOut) => Ok(None),
                Err(error) => Err(format!("a survivor cannot receive: {error}")),
            },
            Reader::Asleep { messages, .. } => match messages.recv_timeout(patience) {
                Ok(received) => received.map(Some),
                Err(RecvTimeoutError::Timeout) => Ok(None),
                Err(RecvTimeoutError::Disconnected) => Err("the sleeping reader is gone".to_owned()),
            },
        }
    }

    /// Everything below `tail`, which is there already.
    fn read_up_to(&mut self, mut next: u64, tail: u64) -> Result<Vec<Received>, Violation> {
        let mut found = Vec::new();
        while next < tail {
            let Some(received) = self.next(REPAIR)? else {
                return Err(format!("a reader sleeps on: sequence {next} is not received, the tail is {tail}"));
            };
            next = received.0 + 1;
            found.push(received);
        }
        Ok(found)
    }

    fn await_asleep(&self) -> Result<(), Violation> {
        match self {
            Reader::Awake(_) => Ok(()),
            Reader::Asleep { thread, .. } => await_asleep(*thread),
        }
    }
}

/// Waits until a thread of ours sleeps in the kernel.
pub(crate) fn await_asleep(thread: Pid) -> Result<(), Violation> {
    await_within("a thread falls asleep", || {
        let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
        Ok(stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('S')))
    })
}

/// Lives through the deaths of publishers: a reader, on topics for many another publisher, and each victim's successor.
pub(crate) struct Readers {
    bus: Bus,
    topic: Topic<[u8]>,
    /// What a victim has published before its operation, and what it publishes in it, all or nothing.
    published: Published,
    reader: Reader,
    publisher: Option<Publisher<[u8]>>,
    next: u64,
    memory_bytes: Option<u64>,
    number: u64,
    /// Whether the survivors go on while the victim stands in its operation.
    goes_on: bool,
    /// Whether they have, and so what the victim has published is read.
    gone_on: bool,
}

impl Readers {
    pub(crate) fn new(bus: &Bus, topic: Topic<[u8]>, asleep: bool, published: Published) -> Result<Readers, Violation> {
        let created = bus.create(&topic).map_err(|error| error.to_string())?;
        assert!(!created, "each scene has its topic to itself");
        let reader = Reader::open(bus, &topic, asleep)?;
        let many = topic.options().mode == Mode::Many;
        let publisher = if many { Some(publisher(bus, &topic)?) } else { None };
        let (bus, goes_on, gone_on) = (bus.clone(), false, false);
        Ok(Readers {
            bus,
            topic,
            published,
            reader,
            publisher,
            next: 0,
            memory_bytes: None,
            number: 0,
            goes_on,
            gone_on,
        })
    }

    /// Survivors that go on while the victim stands in its operation: its stop delays nobody.
    pub(crate) fn of_the_stopped(bus: &Bus, topic: Topic<[u8]>, published: Published) -> Result<Readers, Violation> {
        Ok(Readers { goes_on: true, ..Readers::new(bus, topic, true, published)? })
    }

    /// Publishes a message of the harness's own.
    fn survivor_message(&mut self) -> Vec<u8> {
        self.number += 1;
        message(SURVIVOR, self.number, 40)
    }

    /// What a newcomer reads from `first` on.
    fn read_afresh(&self, first: u64, count: usize) -> Result<Vec<Received>, Violation> {
        let mut newcomer = subscriber(&self.bus, &self.topic, Start::Sequence(Sequence::new(first)), Wait::Adaptive)?;
        let mut found = Vec::new();
        while found.len() < count {
            let message = newcomer.recv_timeout(DEADLINE).map_err(|error| format!("a newcomer: {error}"))?;
            found.push((message.sequence().get(), message.to_vec()));
        }
        Ok(found)
    }

    fn check_nothing_leaked(&mut self, pid: Pid) -> Result<(), Violation> {
        await_buried(&self.bus, &self.topic, pid)?;
        let survivors = usize::from(self.publisher.is_some());
        let mut memory_bytes = 0;
        await_within("only the survivors are on the topic", || {
            let status = status(&self.bus, &self.topic)?;
            memory_bytes = status.memory_bytes;
            Ok(status.publishers.len() == survivors && status.subscribers.len() == 1)
        })?;
        let before = *self.memory_bytes.get_or_insert(memory_bytes);
        if memory_bytes != before {
            return Err(format!("the topic takes {memory_bytes} bytes, before it took {before}"));
        }
        Ok(())
    }
}

impl Survivors for Readers {
    fn ready(&mut self, _life: u64) -> Result<(), Violation> {
        // A survivor that publishes meanwhile would hide a reader that sleeps on, so all are quiet.
        self.reader.await_asleep()
    }

    fn meanwhile(&mut self, life: u64) -> Result<(), Violation> {
        if !self.goes_on {
            return Ok(());
        }
        let (mut expected, operation) = (self.published)(life);
        let (first, tail) = (self.next, status(&self.bus, &self.topic)?.tail_sequence);
        if tail - first > expected.len() as u64 {
            expected.extend(operation);
        }
        // It is this one that wakes the reader, whether or not the stopped one was about to.
        let message = self.survivor_message();
        let last = publish(self.publisher.as_mut().ok_or("no publisher")?, &message)?;
        expected.push(message);
        let found = self.reader.read_up_to(first, last + 1)?;
        (self.next, self.gone_on) = (last + 1, true);
        check_run("a reader beside a stopped publisher", &found, first, &expected)
    }

    fn after(&mut self, kill: Kill) -> Result<(), Violation> {
        let gone_on = std::mem::take(&mut self.gone_on);
        let (mut expected, operation) = if gone_on { Messages::default() } else { (self.published)(kill.life) };
        await_buried(&self.bus, &self.topic, kill.pid)?;
        let (first, tail) = (self.next, status(&self.bus, &self.topic)?.tail_sequence);
        let mut found = self.reader.read_up_to(first, tail)?;
        let published = tail - first > expected.len() as u64;
        if published {
            expected.extend(operation);
        }
        if published && kill.before_all {
            return Err("a message was published before anything was executed".to_owned());
        }
        if !published && kill.after_all && !gone_on {
            return Err("the message is not there, but its publish has returned".to_owned());
        }
        if self.publisher.is_some() {
            let message = self.survivor_message();
            self.publisher.as_mut().map_or(Ok(0), |publisher| publish(publisher, &message))?;
            expected.push(message);
        }
        let mut successor = publisher(&self.bus, &self.topic)?;
        let message = self.survivor_message();
        let last = publish(&mut successor, &message)?;
        expected.push(message);
        self.next = last + 1;
        found.extend(self.reader.read_up_to(first + found.len() as u64, self.next)?);
        check_run("the reader", &found, first, &expected)?;
        drop(successor);
        if self.topic.options().mode != Mode::Channel {
            check_run("a newcomer", &self.read_afresh(first, expected.len())?, first, &expected)?;
        }
        self.check_nothing_leaked(kill.pid)
    }
}

/// Messages that a victim that receives finds.
pub(crate) const TO_RECEIVE: u64 = 3;

/// No topic here keeps so many messages.
const MOST_RETAINED: u64 = 1 << 16;

/// Lives through the deaths of subscribers: a publisher and, but on channels, another reader.
pub(crate) struct Writers {
    bus: Bus,
    topic: Topic<[u8]>,
    publisher: Option<Publisher<[u8]>>,
    reader: Option<Subscriber<[u8]>>,
    /// A publish that waits for the victim, where the scenario has one.
    waiting: Option<Waiting>,
    waits: bool,
    /// A publish that the victim waits for, where it does.
    favour: Option<Favour<Favoured>>,
    awaited: bool,
    /// The victim is to be too late.
    late: bool,
    next: u64,
}

/// The publisher, and what it published if it did.
type Favoured = (Publisher<[u8]>, Option<Result<u64, Violation>>);

struct Waiting {
    outcome: Receiver<Waited>,
}

/// The publisher, when it has done waiting, and what it published.
type Waited = (Publisher<[u8]>, Result<u64, Violation>);

impl Writers {
    /// `waits`: the ring is full and a publisher waits while the victim receives.
    pub(crate) fn new(bus: &Bus, topic: Topic<[u8]>, waits: bool) -> Result<Writers, Violation> {
        bus.create(&topic).map_err(|error| error.to_string())?;
        let publisher = Some(publisher(bus, &topic)?.wait(Wait::Park));
        let many_read = topic.options().mode != Mode::Channel;
        let reader = if many_read { Some(subscriber(bus, &topic, Start::Oldest, Wait::Adaptive)?) } else { None };
        let bus = bus.clone();
        Ok(Writers {
            bus,
            topic,
            publisher,
            reader,
            waiting: None,
            waits,
            favour: None,
            awaited: false,
            late: false,
            next: 0,
        })
    }

    /// The victim sleeps, until a message comes.
    pub(crate) fn for_sleepers(bus: &Bus, topic: Topic<[u8]>) -> Result<Writers, Violation> {
        let writers = Writers::new(bus, topic, false)?;
        Ok(Writers { awaited: true, ..writers })
    }

    /// The victim finds that the ring has gone on without it.
    pub(crate) fn for_the_late(bus: &Bus, topic: Topic<[u8]>) -> Result<Writers, Violation> {
        let writers = Writers::new(bus, topic, false)?;
        Ok(Writers { late: true, ..writers })
    }

    /// Publishes until what comes next now is retained no more.
    fn go_round(&mut self) -> Result<(), Violation> {
        let first = self.next;
        while status(&self.bus, &self.topic)?.oldest_sequence <= first {
            (0..self.topic.options().messages).try_for_each(|_| self.exchange())?;
            if self.next > first + MOST_RETAINED {
                return Err(format!("sequence {first} is retained still, the tail is {}", self.next));
            }
        }
        Ok(())
    }

    fn publisher(&mut self) -> Result<&mut Publisher<[u8]>, Violation> {
        self.publisher.as_mut().ok_or_else(|| "the publisher was lost with an earlier violation".to_owned())
    }

    /// Publishes the next message and has the surviving reader read it.
    fn exchange(&mut self) -> Result<(), Violation> {
        let next = self.next;
        let sequence = publish(self.publisher()?, &message(SURVIVOR, next, 40))?;
        self.count(sequence)
    }

    fn count(&mut self, sequence: u64) -> Result<(), Violation> {
        if sequence != self.next {
            return Err(format!("a survivor published sequence {sequence}, expected {}", self.next));
        }
        self.next += 1;
        let Some(reader) = &mut self.reader else { return Ok(()) };
        let received = reader.recv_timeout(DEADLINE).map_err(|error| format!("the surviving reader: {error}"))?;
        let received = (received.sequence().get(), received.to_vec());
        check_run("the surviving reader", &[received], sequence, &[message(SURVIVOR, sequence, 40)])
    }

    /// Fills the ring, which the victim holds, and lets a publisher wait for room.
    fn start_waiting(&mut self) -> Result<(), Violation> {
        loop {
            let message = message(SURVIVOR, self.next, 40);
            match self.publisher()?.try_publish(&message) {
                Ok(sequence) => self.count(sequence.get())?,
                Err(shmbus::PublishError::Full { .. }) => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        let mut publisher = self.publisher.take().ok_or("no publisher")?;
        let (message, (done, outcome), (tell, told)) = (message(SURVIVOR, self.next, 40), channel(), channel());
        thread::spawn(move || {
            let _ = tell.send(gettid());
            let published = publish(&mut publisher, &message);
            let _ = done.send((publisher, published));
        });
        self.waiting = Some(Waiting { outcome });
        await_asleep(told.recv().map_err(|error| error.to_string())?)
    }

    fn stop_waiting(&mut self) -> Result<(), Violation> {
        let Some(Waiting { outcome }) = self.waiting.take() else { return Ok(()) };
        let woken = outcome.recv_timeout(REPAIR);
        let (publisher, published) = woken.map_err(|_| "a publisher sleeps on though there is room".to_owned())?;
        self.publisher = Some(publisher);
        self.count(published?)
    }

    /// A channel's next receiver goes on where its predecessor was, or at most what was in hand further on.
    fn check_channel(&mut self) -> Result<(), Violation> {
        let mut next = subscriber(&self.bus, &self.topic, Start::Oldest, Wait::Adaptive)?;
        let mut expected = None;
        while expected != Some(self.next) {
            let received = next.recv_timeout(DEADLINE).map_err(|error| format!("the next receiver: {error}"))?;
            let found = (received.sequence().get(), received.to_vec());
            let sequence = expected.unwrap_or(found.0);
            check_run("the next receiver", &[found], sequence, &[message(SURVIVOR, sequence, 40)])?;
            expected = Some(sequence + 1);
        }
        Ok(())
    }
}

impl Survivors for Writers {
    fn ready(&mut self, _life: u64) -> Result<(), Violation> {
        if self.late {
            self.go_round()?;
        }
        if !self.awaited {
            (0..TO_RECEIVE).try_for_each(|_| self.exchange())?;
        }
        if self.waits { self.start_waiting() } else { Ok(()) }
    }

    fn favour(&mut self, victim: Sleeper) -> Result<(), Violation> {
        if self.awaited {
            let publisher = self.publisher.take().ok_or("no publisher")?;
            let message = message(SURVIVOR, self.next, 40);
            let act = move |(publisher, published): &mut Favoured| *published = Some(publish(publisher, &message));
            self.favour = Some(Favour::begin(victim, (publisher, None), act));
        }
        Ok(())
    }

    fn after(&mut self, kill: Kill) -> Result<(), Violation> {
        if let Some(favour) = self.favour.take() {
            let (publisher, published) = favour.end()?;
            self.publisher = Some(publisher);
            published.map_or(Ok(()), |sequence| self.count(sequence?))?;
        }
        if !self.waits && self.reader.is_some() {
            // Nobody waits for the repair.
            self.exchange()?;
        }
        await_buried(&self.bus, &self.topic, kill.pid)?;
        if self.reader.is_none() {
            self.exchange()?;
            self.check_channel()?;
        } else {
            self.stop_waiting()?;
            // The dead one holds nothing: the ring goes round.
            (0..self.topic.options().messages + 16).try_for_each(|_| self.exchange())?;
        }
        let readers = usize::from(self.reader.is_some());
        await_within("only the survivors are on the topic", || {
            let status = status(&self.bus, &self.topic)?;
            Ok(status.subscribers.len() == readers && status.publishers.len() == 1)
        })
    }
}
