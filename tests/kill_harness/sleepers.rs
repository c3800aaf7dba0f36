//! Victims that sleep until a survivor does something: a publisher for which there is no room, whoever waits for a message.
//!
//! A survivor does what the victim waits for as soon as it sleeps, however slowly it is stepped there. Where the victim is
//! to die in its sleep, nobody does.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::unistd::Pid;
use shmbus::{Bus, Mode, Publisher, Start, Subscriber, Topic, Wait};

use crate::checker::{
    DEADLINE, Kill, Received, SURVIVOR, Survivors, Violation, Writers, await_buried, await_within, check_run, message,
    publish, publisher, status, subscriber,
};
use crate::scenarios::{Grain, Scenario, topic};
use crate::tracer::between_markers;

/// How long the messages are.
const LEN: usize = 48;

/// Between two looks at a thread.
const LOOK: Duration = Duration::from_micros(50);

/// A thread of another process that may sleep on a word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sleeper {
    pub(crate) process: Pid,
    pub(crate) thread: Pid,
}

impl Sleeper {
    /// Whether it sleeps in `futex` or `futex_waitv`.
    pub(crate) fn sleeps(self) -> bool {
        let call = fs::read_to_string(format!("/proc/{}/task/{}/syscall", self.process, self.thread));
        let number = call.ok().and_then(|call| call.split(' ').next()?.parse().ok());
        number.is_some_and(|number: i64| [libc::SYS_futex, libc::SYS_futex_waitv].contains(&number))
    }
}

/// What a survivor does with `T` as soon as the victim sleeps, on a thread of its own.
pub(crate) struct Favour<T> {
    over: Arc<AtomicBool>,
    done: JoinHandle<T>,
}

impl<T: Send + 'static> Favour<T> {
    pub(crate) fn begin(victim: Sleeper, mut with: T, act: impl FnOnce(&mut T) + Send + 'static) -> Favour<T> {
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        let done = thread::spawn(move || {
            // Relaxed: the end of the thread orders everything else.
            while !victim.sleeps() && !is_over.load(Ordering::Relaxed) {
                thread::sleep(LOOK);
            }
            if !is_over.load(Ordering::Relaxed) {
                act(&mut with);
            }
            with
        });
        Favour { over, done }
    }

    /// The victim is dead: gives back what the favour was, or would have been, done with.
    pub(crate) fn end(self) -> Result<T, Violation> {
        // Relaxed: it is only to end some time.
        self.over.store(true, Ordering::Relaxed);
        self.done.join().map_err(|_| "a survivor's thread panicked".to_owned())
    }
}

/// A publisher that waits for room, and a receiver that waits for a message.
pub(crate) fn all() -> Vec<Scenario> {
    macro_rules! sleeping {
        ($name:literal, $mode:ident, $victim:ident, $survivors:expr) => {
            Scenario {
                name: $name,
                stride: 400,
                grain: Grain::Instruction,
                victim: |bus, life| $victim(bus, Mode::$mode, life),
                survivors: |bus| Ok(Box::new($survivors(bus, topic(Mode::$mode))?)),
            }
        };
    }
    vec![
        sleeping!("sleep exclusive, for room", Exclusive, wait_for_room, Drain::new),
        sleeping!("sleep many, for room", Many, wait_for_room, Drain::new),
        sleeping!("sleep channel, for room", Channel, wait_for_room, Drain::new),
        sleeping!("sleep exclusive, for a message", Exclusive, wait_for_message, Writers::for_sleepers),
        sleeping!("sleep many, for a message", Many, wait_for_message, Writers::for_sleepers),
        sleeping!("sleep channel, for a message", Channel, wait_for_message, Writers::for_sleepers),
    ]
}

/// The n-th message of a victim that fills the ring.
fn filling(life: u64, number: u64) -> Vec<u8> {
    message(life, number, LEN)
}

/// Fills the ring, then publishes one message more.
fn wait_for_room(bus: &Bus, mode: Mode, life: u64) -> ! {
    let mut publisher = bus.publisher(topic(mode)).unwrap().wait(Wait::Park);
    let mut number = 0;
    while publisher.try_publish(&filling(life, number)).is_ok() {
        number += 1;
    }
    let last = filling(life, number);
    between_markers(|| publisher.publish(&last).unwrap())
}

fn wait_for_message(bus: &Bus, mode: Mode, _: u64) -> ! {
    let mut subscriber = bus.subscriber(topic(mode)).start(Start::Latest).wait(Wait::Park).open().unwrap();
    between_markers(|| std::hint::black_box(subscriber.recv().unwrap().len()))
}

/// Lives through the deaths of publishers that wait for room: the reader that holds the ring.
struct Drain {
    bus: Bus,
    topic: Topic<[u8]>,
    reader: Option<Reader>,
    favour: Option<Favour<Reader>>,
    /// The first sequence of this life, and the one behind those before its operation.
    first: u64,
    filled: u64,
    number: u64,
}

/// A reader and what it has read.
struct Reader {
    subscriber: Subscriber<[u8]>,
    found: Vec<Received>,
    failed: Option<Violation>,
}

impl Reader {
    fn read(&mut self) {
        match self.subscriber.recv_timeout(DEADLINE) {
            Ok(message) => self.found.push((message.sequence().get(), message.to_vec())),
            Err(error) => self.failed = Some(format!("the reader: {error}")),
        }
    }

    /// Reads what is below `tail` and was not read yet.
    fn read_up_to(&mut self, first: u64, tail: u64) -> Result<(), Violation> {
        while first + (self.found.len() as u64) < tail && self.failed.is_none() {
            self.read();
        }
        self.failed.take().map_or(Ok(()), Err)
    }
}

impl Drain {
    fn new(bus: &Bus, topic: Topic<[u8]>) -> Result<Drain, Violation> {
        bus.create(&topic).map_err(|error| error.to_string())?;
        let subscriber = subscriber(bus, &topic, Start::Oldest, Wait::Adaptive)?;
        let reader = Some(Reader { subscriber, found: Vec::new(), failed: None });
        Ok(Drain { bus: bus.clone(), topic, reader, favour: None, first: 0, filled: 0, number: 0 })
    }
}

impl Survivors for Drain {
    fn ready(&mut self, _life: u64) -> Result<(), Violation> {
        self.filled = status(&self.bus, &self.topic)?.tail_sequence;
        if self.filled == self.first { Err("the victim found no room at all".to_owned()) } else { Ok(()) }
    }

    fn favour(&mut self, victim: Sleeper) -> Result<(), Violation> {
        let reader = self.reader.take().ok_or("no reader")?;
        // The one in hand is given back when the next is taken.
        self.favour = Some(Favour::begin(victim, reader, |reader: &mut Reader| (0..2).for_each(|_| reader.read())));
        Ok(())
    }

    fn after(&mut self, kill: Kill) -> Result<(), Violation> {
        if let Some(favour) = self.favour.take() {
            self.reader = Some(favour.end()?);
        }
        await_buried(&self.bus, &self.topic, kill.pid)?;
        let tail = status(&self.bus, &self.topic)?.tail_sequence;
        let published = tail > self.filled;
        if published && kill.before_all || !published && kill.after_all {
            return Err(format!("the tail is {tail}, before the operation it was {}: {kill:?}", self.filled));
        }
        let mut expected: Vec<_> = (0..tail - self.first).map(|number| filling(kill.life, number)).collect();
        let reader = self.reader.as_mut().ok_or("no reader")?;
        reader.read_up_to(self.first, tail)?;
        // There is room again, for whoever comes next.
        let mut successor: Publisher<[u8]> = publisher(&self.bus, &self.topic)?;
        for _ in 0..self.topic.options().messages + 16 {
            self.number += 1;
            expected.push(message(SURVIVOR, self.number, LEN));
            let sequence = publish(&mut successor, &message(SURVIVOR, self.number, LEN))?;
            reader.read_up_to(self.first, sequence + 1)?;
        }
        let found = std::mem::take(&mut reader.found);
        check_run("the reader", &found, self.first, &expected)?;
        self.first += found.len() as u64;
        drop(successor);
        await_within("only the reader is on the topic", || {
            let status = status(&self.bus, &self.topic)?;
            Ok(status.publishers.is_empty() && status.subscribers.len() == 1)
        })
    }
}
