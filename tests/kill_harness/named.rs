//! Publishers with a name as victims, in the middle of a numbered batch: whoever retries the batch blindly publishes it, or
//! is told that it is there, and readers see it once (SPEC §3 rule 1).

use shmbus::{Bus, Mode, OpenError, PublishError, Publisher, Refusal, Sequence, Start, Subscriber, Topic, Wait};

use crate::checker::{Kill, REPAIR, Survivors, Violation, await_within, message, subscriber};
use crate::scenarios::{Grain, Scenario, topic};
use crate::tracer::between_markers;

const NAME: &str = "feeder";

/// Lengths of a batch's messages: in the slot and beyond it.
const LENGTHS: [usize; 4] = [48, 150, 16, 48];

macro_rules! batching {
    ($name:literal, $mode:ident, stride: $stride:literal) => {
        Scenario {
            name: $name,
            stride: $stride,
            grain: Grain::Instruction,
            victim: |bus, life| publish(bus, topic(Mode::$mode), life),
            survivors: |bus| Ok(Box::new(Retrier::new(bus, topic(Mode::$mode))?)),
        }
    };
}

pub(crate) fn all() -> Vec<Scenario> {
    vec![
        batching!("numbered batch exclusive", Exclusive, stride: 1500),
        batching!("numbered batch many", Many, stride: 1500),
    ]
}

fn batch(life: u64) -> Vec<Vec<u8>> {
    (0..).zip(LENGTHS).map(|(index, len)| message(life, index, len)).collect()
}

fn publish(bus: &Bus, topic: Topic<[u8]>, life: u64) -> ! {
    let mut publisher = bus.publisher_as(topic, NAME).unwrap();
    let (batch, first) = (batch(life), publisher.last_number().unwrap() + 1);
    between_markers(|| publisher.publish_batch_numbered(batch.iter().map(Vec::as_slice), first).unwrap())
}

/// Takes the name of each victim and retries its batch; a reader sees what became of it.
struct Retrier {
    bus: Bus,
    topic: Topic<[u8]>,
    reader: Subscriber<[u8]>,
    /// The name's last number.
    last: u64,
}

impl Retrier {
    fn new(bus: &Bus, topic: Topic<[u8]>) -> Result<Retrier, Violation> {
        bus.create(&topic).map_err(|error| error.to_string())?;
        let reader = subscriber(bus, &topic, Start::Oldest, Wait::Adaptive)?;
        Ok(Retrier { bus: bus.clone(), topic, reader, last: 0 })
    }

    /// The name, as soon as its dead holder has been noticed.
    fn successor(&self) -> Result<Publisher<[u8]>, Violation> {
        let mut opened = None;
        await_within("the name", || match self.bus.publisher_as(self.topic.clone(), NAME) {
            Ok(publisher) => Ok(opened.insert(publisher).id() > 0),
            Err(OpenError::Refused(Refusal::Taken { .. })) => Ok(false),
            Err(error) => Err(format!("cannot open the name: {error}")),
        })?;
        opened.ok_or_else(|| "no publisher".to_owned())
    }

    /// The next message.
    fn receive(&mut self) -> Result<(Sequence, Vec<u8>), Violation> {
        let message = self.reader.recv_timeout(REPAIR).map_err(|error| format!("the reader: {error}"))?;
        Ok((message.sequence(), message.to_vec()))
    }
}

impl Survivors for Retrier {
    fn after(&mut self, kill: Kill) -> Result<(), Violation> {
        let (batch, first) = (batch(kill.life), self.last + 1);
        let mut successor = self.successor()?;
        let found = successor.last_number().unwrap_or(0);
        self.last += batch.len() as u64;
        let was_there = found == self.last;
        if !was_there && found + 1 != first {
            return Err(format!("the last number is {found}: a part of the batch {first}..={}", self.last));
        }
        if was_there && kill.before_all || !was_there && kill.after_all {
            return Err(format!("the last number is {found}, which is not what the victim did"));
        }
        let retried = successor.publish_batch_numbered(batch.iter().map(Vec::as_slice), first);
        let (sequence, received) = self.receive()?;
        let expected = if was_there { Err(PublishError::Duplicate { sequence: Some(sequence) }) } else { Ok(sequence) };
        if retried != expected {
            return Err(format!("the retry said {retried:?}, expected {expected:?}"));
        }
        let mut all = vec![received];
        for _ in 1..batch.len() {
            all.push(self.receive()?.1);
        }
        if all != batch {
            return Err("the batch is torn or out of order".to_owned());
        }
        match self.reader.try_recv() {
            Ok(None) => Ok(()),
            Ok(Some(message)) => Err(format!("a message too many at {}", message.sequence())),
            Err(error) => Err(format!("the reader: {error}")),
        }
    }
}
