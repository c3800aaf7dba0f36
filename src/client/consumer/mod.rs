//! [`Consumer`]: takes messages from a group, and how to open one.

#[cfg(feature = "async")]
mod asynchronous;
mod batch;
mod bury;
mod copies;
mod core;
mod delivery;
mod exclusive;
mod fetch;
mod moves;
mod ordered;
mod pool;
mod runs;
mod scan;
mod take;
mod waiting;

use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use self::core::{Core, Parts};
use self::fetch::{EntryLog, Log, SlotLog};
use crate::client::bus::{Bus, unexpected};
use crate::client::control::Control;
use crate::client::held::Held;
use crate::client::subscriber::{GroupStart, Start};
use crate::coordinator::protocol::{Answer, GroupInfo, HandleRef, Request, SegmentRef, TopicInfo};
use crate::error::{AckError, AttachError, OpenError, RecvError, Refusal};
use crate::group::GroupOptions;
use crate::ring::doorbell::Doorbell;
use crate::ring::log::Place;
use crate::ring::sequence::Sequence;
use crate::shm::segment::{Access, Segment};
use crate::shm::shared::Shared;
use crate::shm::topic::{self, Arenas, LogSegments};
use crate::topic::{Mode, Payload, Topic, TopicOptions, virtual_topic};
use crate::wait::Wait;

#[cfg(feature = "async")]
pub use asynchronous::DeliveryStream;
pub use batch::{Batch, BatchItem};
pub use delivery::{Delivery, Lease};
pub use pool::{Deliveries, OwnedDelivery};

/// One of the consumers of a group: each message of the topic goes to one of them.
///
/// A message is leased to the consumer that receives it, until it is acknowledged, given back or the lease ends. Several
/// groups of one topic get every message each. A consumer is used by one thread at a time; open one for each thread.
/// Dropping it gives all its leases back at once. Iterated over, it yields deliveries that any thread may settle; see [`Deliveries`].
pub struct Consumer<T: ?Sized> {
    core: Core,
    payload: PhantomData<fn() -> Box<T>>,
}

/// How a consumer is to be opened; ends with [`ConsumerBuilder::open`].
#[must_use]
pub struct ConsumerBuilder<T: ?Sized> {
    bus: Bus,
    topic: Topic<T>,
    group: String,
    create: Option<(GroupOptions, Start)>,
    max_in_flight: u64,
    wait: Wait,
}

impl Bus {
    /// A consumer of a group on an existing topic, to be opened with `.open()`; the group is created where it does not
    /// exist.
    pub fn consumer<T: Payload + ?Sized>(&self, topic: Topic<T>, group: impl Into<String>) -> ConsumerBuilder<T> {
        ConsumerBuilder {
            bus: self.clone(),
            topic,
            group: group.into(),
            create: Some((GroupOptions::new(), Start::default())),
            max_in_flight: u64::MAX,
            wait: Wait::default(),
        }
    }

    /// A consumer by the name of a queue in the manner of ActiveMQ: `Consumer.G.VirtualTopic.X` is group `G` on topic
    /// `VirtualTopic.X`. Every other name is a topic with one group, called `queue`.
    pub fn queue<T: Payload + ?Sized>(&self, name: &str) -> ConsumerBuilder<T> {
        let (group, topic) = virtual_topic(name).unwrap_or(("queue", name));
        self.consumer(Topic::named(topic), group)
    }

    /// Creates a group. With `exist_ok`, one that exists with the same options is fine. From now on it holds the topic's messages, also
    /// while it has no consumer. Returns whether it existed.
    ///
    /// To find a [`Start::Time`] it reads the topic through a cursor of its own, for which it needs the right to read and, for that
    /// moment, a subscriber's place. All that is retained from the first message of that time on is delivered.
    pub fn create_group(
        &self,
        topic: &str,
        group: &str,
        options: &GroupOptions,
        start: Start,
        exist_ok: bool,
    ) -> Result<bool, OpenError> {
        let start = GroupStart::find(self, topic, start)?;
        let (topic, group, options) = (topic.to_owned(), group.to_owned(), options.clone());
        let request = Request::CreateGroup { topic, group, options, start: start.at, exist_ok };
        match self.control().request_once(&request)?.0 {
            Answer::Created { existed } => Ok(existed),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes a group and gives up what it holds; `force` also while it has consumers, which get `Fenced`.
    pub fn remove_group(&self, topic: &str, group: &str, force: bool) -> Result<(), OpenError> {
        self.done_once(&Request::RemoveGroup { topic: topic.to_owned(), group: group.to_owned(), force })
    }

    /// Lets a group begin elsewhere, with no message delivered yet; `force` also while it has consumers, which get
    /// `Fenced`. A [`Start::Time`] is found as in [`Self::create_group`].
    pub fn rewind_group(&self, topic: &str, group: &str, start: Start, force: bool) -> Result<(), OpenError> {
        let start = GroupStart::find(self, topic, start)?;
        let (topic, group) = (topic.to_owned(), group.to_owned());
        self.done_once(&Request::RewindGroup { topic, group, start: start.at, force })
    }
}

impl<T: Payload + ?Sized> ConsumerBuilder<T> {
    /// The options with which the group is created where it does not exist. An existing group keeps its own.
    pub fn options(mut self, options: GroupOptions) -> Self {
        let start = self.create.map_or(Start::default(), |(_, start)| start);
        self.create = Some((options, start));
        self
    }

    /// Where the group starts where it does not exist (default [`Start::Latest`]).
    pub fn start(mut self, start: Start) -> Self {
        let options = self.create.map_or_else(GroupOptions::new, |(options, _)| options);
        self.create = Some((options, start));
        self
    }

    /// Refuses to create the group.
    pub fn existing(mut self) -> Self {
        self.create = None;
        self
    }

    /// Most messages that this consumer has leased at a time. At the limit it receives nothing.
    pub fn max_in_flight(mut self, leases: u32) -> Self {
        self.max_in_flight = leases.max(1).into();
        self
    }

    /// How to wait for messages (default [`Wait::Adaptive`]).
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// Opens it. When this returns, the group holds every message from its start on.
    ///
    /// # Errors
    /// The topic does not exist, carries another type or is a channel, the group does not exist and may not be created,
    /// or a limit is reached; see [`OpenError`].
    pub fn open(self) -> Result<Consumer<T>, OpenError> {
        let control = self.bus.control();
        let (answer, fds) = self.ask()?;
        let Answer::ConsumerOpened { info, group, consumer, position, sequence, segments } = answer else {
            return Err(unexpected(&answer));
        };
        let held = Held::new(control.clone(), HandleRef::Consumer { topic: info.id, group: group.id, consumer });
        let me = u8::try_from(consumer);
        let me = me.map_err(|_| AttachError::Field { field: "consumer", found: consumer.into(), expected: 0 })?;
        let opened = Opened { info, group, control: control.clone(), me, place: Place { position, sequence }, held };
        let parts = opened.attach(segments.into_iter().zip(fds))?;
        Ok(Consumer { core: Core::new(parts, self.wait, self.max_in_flight), payload: PhantomData })
    }

    /// Asks the coordinator for a place in the group, which is created where it may be.
    fn ask(&self) -> Result<(Answer, Vec<OwnedFd>), OpenError> {
        let topic = self.topic.name();
        let request = |create| {
            let (topic, group) = (topic.to_owned(), self.group.clone());
            self.bus.control().request(&Request::OpenConsumer { topic, group, schema: T::schema(), create })
        };
        let Some((options, start)) = &self.create else { return request(None) };
        if let Start::Time(_) = start {
            // A group that exists has its start, so that nothing need be looked for.
            match request(None) {
                Err(OpenError::Refused(Refusal::UnknownGroup { .. })) => {}
                other => return other,
            }
        }
        let start = GroupStart::find(&self.bus, topic, *start)?;
        request(Some((options.clone(), start.at)))
    }
}

/// What the coordinator answered.
struct Opened {
    info: TopicInfo,
    group: GroupInfo,
    control: Arc<Control>,
    me: u8,
    place: Place,
    held: Held,
}

impl Opened {
    fn attach(self, handed: impl Iterator<Item = (SegmentRef, OwnedFd)>) -> Result<Parts, AttachError> {
        let info = Arc::new(self.info);
        let (mut log, mut cursors, mut ledger, mut arenas) = (None, None, None, Arenas::new());
        for (segment, fd) in handed {
            let attach = |promise, access| Segment::attach(fd.as_fd(), &promise, access);
            match segment {
                SegmentRef::Log => log = Some(attach(info.log(), Access::ReadOnly)?),
                SegmentRef::Cursors | SegmentRef::OwnCursors => {
                    cursors = Some(attach(info.cursors(), Access::ReadWrite)?)
                }
                SegmentRef::Ledger => ledger = Some(attach(info.ledger(&self.group), Access::ReadWrite)?),
                SegmentRef::Arena(slot) => {
                    let arena = attach(info.arena(slot), Access::ReadOnly)?;
                    arenas.resize_with(arenas.len().max(slot as usize + 1), || None);
                    arenas[slot as usize] = Some(topic::arena(&arena, &info.geometry));
                }
                SegmentRef::Channel => {
                    return Err(AttachError::Field { field: "kind of segment", found: 5, expected: 6 });
                }
            }
        }
        let missing = AttachError::Descriptors { found: 0, expected: 3 };
        let (Some(log), Some(cursors), Some(ledger)) = (log, cursors, ledger) else { return Err(missing) };
        if self.group.cursor >= info.options.max_subscribers {
            let (found, expected) = (self.group.cursor.into(), info.options.max_subscribers.into());
            return Err(AttachError::Field { field: "cursor", found, expected });
        }
        let ledger = topic::ledger(&ledger, &info, &self.group);
        let segments = LogSegments { log, cursors };
        let slot_arena = |arenas: &mut Arenas| arenas.first_mut().and_then(Option::take).ok_or(missing);
        let log = match (info.options.mode, info.small_slots()) {
            (Mode::Exclusive, true) => {
                Log::ExclusiveSmall(SlotLog::new(segments.exclusive(&info), slot_arena(&mut arenas)?, &info))
            }
            (Mode::Exclusive, false) => {
                Log::Exclusive(SlotLog::new(segments.exclusive(&info), slot_arena(&mut arenas)?, &info))
            }
            _ => {
                let (log, line) = (segments.many(&info), self.group.cursor);
                Log::Many(EntryLog::new(log, info.clone(), arenas, self.control.clone(), line, self.place))
            }
        };
        let (readers, cursors) = (segments.readers(), segments.cursor_lines(&info));
        let Opened { group, control, me, held, .. } = self;
        Ok(Parts { log, ledger, readers, cursors, info, group, control, me, held })
    }
}

impl<T: Payload + ?Sized> Consumer<T> {
    /// Receives the next message if there is one. Never waits: of more that have expired than the group's window holds it passes over
    /// so many at a call.
    ///
    /// # Errors
    /// [`RecvError`]; never `Lagged` or `TimedOut`.
    #[inline]
    pub fn try_recv(&mut self) -> Result<Option<Delivery<'_, T>>, RecvError> {
        let found = self.core.poll(1)?;
        Ok(found.then(|| Delivery::new(&mut self.core)))
    }

    /// Receives the next message, waiting for it as chosen by [`ConsumerBuilder::wait`].
    ///
    /// # Errors
    /// [`RecvError`]; never `Lagged` or `TimedOut`.
    #[inline]
    pub fn recv(&mut self) -> Result<Delivery<'_, T>, RecvError> {
        self.core.recv(1, None)?;
        Ok(Delivery::new(&mut self.core))
    }

    /// Receives the next message, waiting for at most `limit`.
    ///
    /// # Errors
    /// [`RecvError::TimedOut`] when nothing came.
    #[inline]
    pub fn recv_timeout(&mut self, limit: Duration) -> Result<Delivery<'_, T>, RecvError> {
        self.core.recv(1, Some(limit))?;
        Ok(Delivery::new(&mut self.core))
    }

    /// Receives up to `count` messages at once, as many as are there, waiting for the first. Together they cost little
    /// more than one. It does not look for more behind many that have expired. An empty batch is returned only for a
    /// `count` of 0.
    ///
    /// # Errors
    /// [`RecvError`]; never `Lagged` or `TimedOut`.
    #[inline]
    pub fn recv_batch(&mut self, count: usize) -> Result<Batch<'_, T>, RecvError> {
        self.recv_some(count, None)
    }

    /// Receives up to `count` messages at once if there are any; it does not look for more behind many that have expired. Never
    /// waits.
    ///
    /// # Errors
    /// [`RecvError`]; never `Lagged` or `TimedOut`.
    #[inline]
    pub fn try_recv_batch(&mut self, count: usize) -> Result<Option<Batch<'_, T>>, RecvError> {
        let found = self.core.poll(count.max(1))?;
        Ok(found.then(|| Batch::new(&mut self.core)))
    }

    /// The same as [`Self::recv_batch`], waiting for at most `limit`.
    ///
    /// # Errors
    /// [`RecvError::TimedOut`] when nothing came.
    pub fn recv_batch_timeout(&mut self, count: usize, limit: Duration) -> Result<Batch<'_, T>, RecvError> {
        self.recv_some(count, Some(limit))
    }

    #[inline]
    fn recv_some(&mut self, count: usize, limit: Option<Duration>) -> Result<Batch<'_, T>, RecvError> {
        if count > 0 {
            self.core.recv(count, limit)?;
        } else {
            self.core.items.clear();
        }
        Ok(Batch::new(&mut self.core))
    }

    /// Acknowledges a message that was kept: it is never delivered to the group again.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn ack(&mut self, lease: &Lease) -> Result<(), AckError> {
        let seen = self.own(lease)?;
        self.core.ack(seen)
    }

    /// Gives a kept message back; it rests for the group's back-off.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn nack(&mut self, lease: &Lease) -> Result<(), AckError> {
        let seen = self.own(lease)?;
        self.core.nack(seen, None)
    }

    /// Gives a kept message back; it rests for `delay`, at most 24 h.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn nack_after(&mut self, lease: &Lease, delay: Duration) -> Result<(), AckError> {
        let seen = self.own(lease)?;
        self.core.nack(seen, Some(delay))
    }

    /// Sends a kept message to the dead-letter topic; it is never delivered to the group again.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn reject(&mut self, lease: &Lease, reason: &str) -> Result<(), AckError> {
        let seen = self.own(lease)?;
        self.core.reject(seen, reason)
    }

    /// Lets the lease end `time` from now, and not before. One that has ended, and is still nobody else's, is extended if
    /// there is room for it in flight.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn extend(&mut self, lease: &mut Lease, time: Duration) -> Result<(), AckError> {
        let seen = self.own(lease)?;
        lease.replace(self.core.extend(seen, time)?);
        Ok(())
    }

    /// Rings when there may be something to receive.
    pub(crate) fn shared_bell(&self) -> Shared<Doorbell> {
        self.core.readers.part(|header| &header.readers)
    }

    /// Takes a message for [`Self::taken`], which must come next, if one look finds it. Never waits.
    pub(crate) fn take(&mut self) -> Result<bool, RecvError> {
        self.core.look(1)
    }

    /// Whether the last [`Self::take`] has found nothing because it ended before it had seen everything.
    pub(crate) fn has_left_off(&self) -> bool {
        self.core.left_off
    }

    /// What was taken.
    pub(crate) fn taken(&mut self) -> Option<Delivery<'_, T>> {
        (!self.core.items.is_empty()).then(|| Delivery::new(&mut self.core))
    }

    /// Whether the topic is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.core.gone().is_some()
    }

    /// How long to sleep at most before the next look; `None`: until the bell rings.
    pub(crate) fn nap(&self) -> Option<Duration> {
        self.core.nap()
    }

    /// When something comes due, as far as is known.
    pub(crate) fn next_due(&self) -> Option<u64> {
        self.core.scan.next_due()
    }

    fn own(&self, lease: &Lease) -> Result<crate::ring::ledger::Seen, AckError> {
        lease.of(self.core.token).ok_or(AckError::Foreign { sequence: lease.sequence() })
    }

    /// The group's name.
    pub fn group(&self) -> &str {
        &self.core.group.name
    }

    /// The options the group was created with.
    pub fn group_options(&self) -> &GroupOptions {
        &self.core.group.options
    }

    /// The options the topic was created with.
    pub fn topic_options(&self) -> &TopicOptions {
        &self.core.info.options
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        &self.core.info.name
    }

    /// Topic and group by their numbers on the bus.
    pub(crate) fn place(&self) -> (u64, u32) {
        (self.core.info.id, self.core.group.id)
    }

    /// This consumer's number in the group, as `shmbus show` prints it.
    pub fn number(&self) -> u32 {
        self.core.me.into()
    }

    /// The lowest sequence that the group has not settled. Stale the moment it is read.
    pub fn floor(&self) -> Sequence {
        Sequence::new(self.core.ledger.floor())
    }
}
