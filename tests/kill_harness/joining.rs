//! Joining and leaving as the operation: who dies while it connects, opens a handle or gives it back leaves nothing behind, and
//! whoever comes next finds its place.

use std::fs;

use shmbus::{Bus, Consumer, GroupOptions, Mode, Start, Subscriber, Topic, Wait};

use crate::checker::{
    DEADLINE, Kill, SURVIVOR, Survivors, Violation, await_buried, await_within, message, publish, publisher, status,
    subscriber,
};
use crate::scenarios::{Grain, Scenario, topic};
use crate::tracer::between_markers;

const GROUP: &str = "group";
const NAME: &str = "name";

/// Messages that go round the ring of the topic.
const ROUND: u64 = 80;

pub(crate) fn all() -> Vec<Scenario> {
    macro_rules! joining {
        ($name:literal, $mode:ident, $operation:expr) => {
            Scenario {
                name: $name,
                stride: 100_000,
                grain: Grain::Access,
                victim: |bus, _| {
                    let operation: fn(&Bus, Topic<[u8]>) = $operation;
                    between_markers(|| operation(bus, topic(Mode::$mode)))
                },
                survivors: |bus| Ok(Box::new(Residents::new(bus, topic(Mode::$mode))?)),
            }
        };
    }
    vec![
        joining!("join bus", Many, |_, _| drop(Bus::open_default().unwrap())),
        joining!("join exclusive publisher", Exclusive, |bus, topic| drop(bus.publisher(topic).unwrap())),
        joining!("join many publisher", Many, |bus, topic| drop(bus.publisher(topic).unwrap())),
        joining!("join many publisher with a name", Many, |bus, topic| drop(bus.publisher_as(topic, NAME).unwrap())),
        joining!("join channel publisher", Channel, |bus, topic| drop(bus.publisher(topic).unwrap())),
        joining!("join exclusive subscriber", Exclusive, subscribe),
        joining!("join many subscriber", Many, subscribe),
        joining!("join channel subscriber", Channel, subscribe),
        joining!("join exclusive consumer", Exclusive, consume),
        joining!("join many consumer", Many, consume),
    ]
}

fn subscribe(bus: &Bus, topic: Topic<[u8]>) {
    drop(bus.subscriber(topic).start(Start::Oldest).open().unwrap());
}

fn consume(bus: &Bus, topic: Topic<[u8]>) {
    drop(bus.consumer(topic, GROUP).existing().open().unwrap());
}

/// Lives through the deaths of newcomers: a subscriber and a consumer, but on channels.
struct Residents {
    bus: Bus,
    topic: Topic<[u8]>,
    reader: Option<Subscriber<[u8]>>,
    consumer: Option<Consumer<[u8]>>,
    number: u64,
    /// What there is while nobody joins, once it is known.
    before: Option<Picture>,
}

/// What the coordinator and the kernel say.
#[derive(Debug, PartialEq, Eq)]
struct Picture {
    participants: usize,
    memory_bytes: u64,
    publishers: usize,
    subscribers: usize,
    consumers: usize,
    coordinator_fds: usize,
    keeper_fds: usize,
}

impl Residents {
    fn new(bus: &Bus, topic: Topic<[u8]>) -> Result<Residents, Violation> {
        let open = |error: shmbus::OpenError| format!("setting up: {error}");
        bus.create(&topic).map_err(open)?;
        let (mut reader, mut consumer) = (None, None);
        if topic.options().mode != Mode::Channel {
            bus.create_group(topic.name(), GROUP, &GroupOptions::new(), Start::Oldest, false).map_err(open)?;
            reader = Some(subscriber(bus, &topic, Start::Oldest, Wait::Adaptive)?);
            consumer = Some(bus.consumer(topic.clone(), GROUP).existing().open().map_err(open)?);
        }
        Ok(Residents { bus: bus.clone(), topic, reader, consumer, number: 0, before: None })
    }

    /// Newcomers take the places, and messages go round the ring.
    fn exchange(&mut self) -> Result<(), Violation> {
        let mut publisher = publisher(&self.bus, &self.topic)?;
        let mut newcomer = match self.topic.options().mode {
            Mode::Channel => Some(subscriber(&self.bus, &self.topic, Start::Oldest, Wait::Adaptive)?),
            _ => None,
        };
        for _ in 0..ROUND {
            self.number += 1;
            let sent = message(SURVIVOR, self.number, 40);
            publish(&mut publisher, &sent)?;
            for reader in self.reader.iter_mut().chain(&mut newcomer) {
                let found = reader.recv_timeout(DEADLINE).map_err(|error| format!("a reader: {error}"))?;
                check(&found, &sent)?;
            }
            if let Some(consumer) = &mut self.consumer {
                let found = consumer.recv_timeout(DEADLINE).map_err(|error| format!("the consumer: {error}"))?;
                check(&found, &sent)?;
                found.ack().map_err(|error| format!("the consumer's ack: {error}"))?;
            }
        }
        Ok(())
    }

    fn picture(&self) -> Result<Picture, Violation> {
        let report = self.bus.report().map_err(|error| format!("report: {error}"))?;
        let status = status(&self.bus, &self.topic)?;
        let fds = |pid: Option<u32>| {
            pid.and_then(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok()).map_or(0, Iterator::count)
        };
        Ok(Picture {
            participants: report.participants.len(),
            memory_bytes: status.memory_bytes,
            publishers: status.publishers.len(),
            subscribers: status.subscribers.len(),
            consumers: status.groups.iter().map(|group| group.consumers.len()).sum(),
            coordinator_fds: fds(Some(report.coordinator_pid)),
            keeper_fds: fds(report.keeper_pid),
        })
    }
}

fn check(found: &[u8], sent: &[u8]) -> Result<(), Violation> {
    if found == sent { Ok(()) } else { Err("another message came than was published".to_owned()) }
}

impl Survivors for Residents {
    fn after(&mut self, kill: Kill) -> Result<(), Violation> {
        await_buried(&self.bus, &self.topic, kill.pid)?;
        self.exchange()?;
        let Some(before) = &self.before else {
            let mut picture = self.picture()?;
            await_within("nobody but the residents is there", || {
                picture = self.picture()?;
                Ok(picture.participants == 1 && picture.publishers == 0)
            })?;
            self.before = Some(picture);
            return Ok(());
        };
        let mut picture = None;
        let same = await_within("all is as before", || Ok(picture.insert(self.picture()?) == before));
        same.map_err(|_| format!("something was left: {picture:?}, before it was {before:?}"))
    }
}
