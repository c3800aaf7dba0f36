//! [`Publisher`] and [`Loan`].

use std::collections::HashSet;
#[cfg(feature = "async")]
use std::future::poll_fn;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::client::bus::{Bus, unexpected};
use crate::client::control::Control;
use crate::client::envelope::{self, Envelope};
use crate::client::held::Held;
#[cfg(feature = "async")]
use crate::client::seat::Seat;
use crate::client::write::{self, ChannelEnd, ManyPort, Others, Runs, SlotPort, WritePort};
use crate::coordinator::protocol::{Answer, HandleRef, Identity, Request, SegmentRef, TopicInfo, input_number};
use crate::error::{AttachError, EnvelopeError, Holder, OpenError, PublishError, SettleError};
use crate::os::home::Home;
use crate::ring::arena::Span;
use crate::ring::cursor::Cursor;
use crate::ring::cursor::Readers;
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::{Blocked, Stop};
use crate::ring::sequence::Sequence;
use crate::ring::slot::MAX_INLINE_BYTES;
use crate::ring::{exclusive, many};
use crate::shm::layout::{ENVELOPE_HEAD_BYTES, batch_envelopes_bytes};
use crate::shm::segment::{Access, Segment};
use crate::shm::shared::Shared;
use crate::shm::topic::{self, LogSegments, SharedInfo};
use crate::topic::{Full, Mode, Payload, Topic, TopicOptions};
#[cfg(feature = "async")]
use crate::wait::Look;
use crate::wait::{self, Wait};

/// Writes messages to a topic.
///
/// A publisher is used by one thread at a time; open one for each thread. Dropping it gives its place back; what it
/// published stays.
pub struct Publisher<T: ?Sized> {
    pub(super) core: PublisherCore,
    payload: PhantomData<fn(&T)>,
}

/// What does not depend on the payload's type.
pub(crate) struct PublisherCore {
    port: Port,
    options: TopicOptions,
    /// Where the topic has envelopes.
    sealer: Option<Sealer>,
    /// The topic's; empty where it has no coordinator.
    name: String,
    /// The lines of groups that have been waited for, with the groups' names.
    groups: Vec<GroupLine>,
    id: u64,
    named: bool,
    /// The number before this handle's first.
    before: u64,
    runs: Runs,
    wait: Wait,
    /// What it sleeps on for room.
    space_bell: Shared<Doorbell>,
    held: Option<Held>,
    home: Home,
}

/// Puts messages into envelopes.
struct Sealer {
    align: u64,
    default_ttl_ms: u64,
    /// Where messages are put together; kept, so that publishing does not allocate.
    scratch: Vec<u8>,
}

/// A sealer does not keep more memory than this for the next message.
const KEPT_SCRATCH_BYTES: usize = 1 << 20;

/// How long to wait for a group's line to be in force before the coordinator is asked again.
const GROUP_PAUSE: Duration = Duration::from_millis(1);

/// What came of one attempt to publish.
enum Attempt<R> {
    Done(Result<R, PublishError>),
    /// There is no room, and the topic's policy is to wait.
    NoRoom(Blocked),
}

/// A group's line among the cursors.
struct GroupLine {
    name: String,
    group: u32,
    cursor: u32,
}

/// The kinds of ring: closed, so that publishing is a branch and not an indirect call.
enum Port {
    Exclusive(SlotPort<7, exclusive::Writer<7>>),
    ExclusiveSmall(SlotPort<1, exclusive::Writer<1>>),
    Many(ManyPort),
    Channel(SlotPort<7, ChannelEnd<7>>),
    ChannelSmall(SlotPort<1, ChannelEnd<1>>),
}

impl Bus {
    /// Opens a publisher; creates the topic where it does not exist yet.
    ///
    /// # Errors
    /// The topic carries another type, is exclusive and has its publisher, or a limit is reached; see [`OpenError`].
    pub fn publisher<T: Payload + ?Sized>(&self, topic: Topic<T>) -> Result<Publisher<T>, OpenError> {
        self.open_publisher(topic, true, None)
    }

    /// The same for a topic that somebody else must have created.
    pub(crate) fn existing_publisher<T: Payload + ?Sized>(&self, topic: Topic<T>) -> Result<Publisher<T>, OpenError> {
        self.open_publisher(topic, false, None)
    }

    /// Opens a publisher under a name, which goes on where the last publisher of that name ended: see
    /// [`Publisher::last_number`] and [`Publisher::publish_numbered`]. A name belongs to its topic.
    ///
    /// On a topic for many, a publisher that has the name and lives is *fenced*: whatever it was doing, nothing it publishes
    /// comes after this, and it gets [`PublishError::Fenced`]. On an exclusive topic it keeps its place, and the
    /// name, until it ends.
    ///
    /// # Errors
    /// As [`Self::publisher`]; the topic is a channel, has 1,024 names already, or its ring is so full that its present
    /// publisher cannot be fenced.
    pub fn publisher_as<T: Payload + ?Sized>(&self, topic: Topic<T>, name: &str) -> Result<Publisher<T>, OpenError> {
        self.open_publisher(topic, true, Some(Identity::Named(name.to_owned())))
    }

    fn open_publisher<T: Payload + ?Sized>(
        &self,
        topic: Topic<T>,
        create: bool,
        identity: Option<Identity>,
    ) -> Result<Publisher<T>, OpenError> {
        let core = PublisherCore::open(self.control(), topic.name(), topic.options(), create, identity)?;
        Ok(Publisher { core, payload: PhantomData })
    }
}

impl PublisherCore {
    /// A publisher's place on a topic with these options; with `create` the topic is created where it does not exist.
    fn open(
        control: &Arc<Control>,
        topic: &str,
        options: TopicOptions,
        create: bool,
        identity: Option<Identity>,
    ) -> Result<PublisherCore, OpenError> {
        let schema = options.schema.clone();
        let create = create.then_some(options);
        let request = Request::OpenPublisher { topic: topic.to_owned(), schema, create, identity };
        let (answer, fds) = control.request(&request)?;
        let Answer::PublisherOpened { info, slot, publisher, opening, tenancy, last_number, segments } = answer else {
            return Err(unexpected(&answer));
        };
        let handle = HandleRef::Publisher { topic: info.id, slot };
        let held = Held::new(control.clone(), handle);
        let info = Arc::new(info);
        let place = Tenure { slot, publisher, opening, tenancy, last_number };
        let port = Port::attach(&info, place, &segments, fds, control)?;
        let options = info.options.clone();
        Ok(PublisherCore {
            space_bell: port.space_bell(),
            port,
            sealer: Sealer::new(&info),
            options,
            name: info.name.clone(),
            groups: Vec::new(),
            id: publisher,
            named: last_number.is_some(),
            before: last_number.unwrap_or(0),
            runs: Runs::default(),
            wait: Wait::default(),
            held: Some(held),
            home: control.home(),
        })
    }
}

/// Publishes what belongs to messages of a group: outputs of a pipeline, dead letters. For each it leaves a note that says
/// which message was finished last, whatever dies, so that the coordinator can tell (ARCHITECTURE.md §4.9).
pub(crate) struct OriginPublisher {
    core: PublisherCore,
}

impl OriginPublisher {
    /// Opens it for a consumer of a group; the topic is created with these options where it does not exist.
    pub(crate) fn open(
        control: &Arc<Control>,
        topic: &str,
        options: TopicOptions,
        origin: Identity,
    ) -> Result<OriginPublisher, OpenError> {
        Ok(OriginPublisher { core: PublisherCore::open(control, topic, options, true, Some(origin))? })
    }

    /// Publishes everything that belongs to the message `input`, all or nothing, waiting for room until `deadline`.
    pub(crate) fn publish(
        &mut self,
        input: u64,
        batch: &[(&[u8], &Envelope)],
        deadline: Instant,
    ) -> Result<Sequence, PublishError> {
        with_port!(&mut self.core.port, port => port.note_as(input_number(input)));
        self.core.publish_sealed_batch(batch, Some(deadline))
    }

    /// After [`PublishError::Duplicate`]: leaves out what has an id that is on the topic already, or earlier in the batch.
    pub(crate) fn leave_out_repeated(&self, batch: &mut Vec<(&[u8], &Envelope)>) {
        let mut ids = HashSet::new();
        let is_there = |id: &[u8]| with_port!(&self.core.port, port => port.has_id(id));
        batch.retain(|(_, envelope)| {
            let id = envelope.id_bytes();
            id.is_empty() || !is_there(id) && ids.insert(id)
        });
    }

    /// The options the topic was created with.
    pub(crate) fn options(&self) -> &TopicOptions {
        &self.core.options
    }
}

/// What a publisher has been given on its topic.
#[derive(Clone, Copy)]
struct Tenure {
    slot: u32,
    publisher: u64,
    opening: u64,
    tenancy: u32,
    last_number: Option<u64>,
}

impl Port {
    fn space_bell(&self) -> Shared<Doorbell> {
        with_port!(self, port => port.space_bell())
    }

    /// Maps what the coordinator handed out.
    fn attach(
        info: &SharedInfo,
        tenure: Tenure,
        named: &[SegmentRef],
        mut fds: Vec<OwnedFd>,
        control: &Arc<Control>,
    ) -> Result<Port, AttachError> {
        let Tenure { slot, publisher, opening, tenancy, last_number } = tenure;
        if info.options.mode == Mode::Channel {
            let fd = fds.first().ok_or_else(|| missing(0, 1))?;
            let segment = Segment::attach(fd.as_fd(), &info.channel(), Access::ReadWrite)?;
            return Ok(Port::channel(info, &segment, false));
        }
        let others = fds.split_off(fds.len().min(3));
        let [log, cursors, arena] = &fds[..] else { return Err(missing(fds.len(), 3)) };
        let others = Others::new(named.iter().skip(3).zip(others).filter_map(|(part, fd)| match part {
            SegmentRef::Arena(slot) => Some((*slot, fd)),
            _ => None,
        }));
        let others = if info.options.dedup { others.and_later(control.clone()) } else { others };
        let segments = LogSegments {
            log: Segment::attach(log.as_fd(), &info.log(), Access::ReadWrite)?,
            cursors: Segment::attach(cursors.as_fd(), &info.cursors(), Access::ReadWrite)?,
        };
        let arena = Segment::attach(arena.as_fd(), &info.arena(slot), Access::ReadWrite)?;
        let arena = topic::arena(&arena, &info.geometry);
        let messages = info.options.messages;
        let no_tail = || AttachError::Field { field: "checkpoints", found: 0, expected: 1 };
        Ok(match (info.options.mode, info.small_slots()) {
            (Mode::Exclusive, true) => {
                let log = segments.exclusive::<1>(info);
                let tail = log.tail().ok_or_else(no_tail)?;
                let writer = exclusive::Writer::new(log, info.policy(), tenancy as u8, tail);
                Port::ExclusiveSmall(write::exclusive(writer, arena, messages, info.options.dedup))
            }
            (Mode::Exclusive, false) => {
                let log = segments.exclusive::<7>(info);
                let tail = log.tail().ok_or_else(no_tail)?;
                let writer = exclusive::Writer::new(log, info.policy(), tenancy as u8, tail);
                Port::Exclusive(write::exclusive(writer, arena, messages, info.options.dedup))
            }
            _ => {
                let writer = many::Writer::new(segments.many(info), info.policy(), slot).ok_or_else(no_tail)?;
                let writer = writer.opened_as(opening, last_number);
                let before = last_number.unwrap_or(0);
                Port::Many(ManyPort::new(writer, info.clone(), slot, publisher, before, arena, others))
            }
        })
    }

    fn channel(info: &TopicInfo, segment: &Segment, stand_alone: bool) -> Port {
        let messages = info.options.messages;
        if info.small_slots() {
            let (channel, arena) = topic::channel::<1>(segment, &info.geometry);
            Port::ChannelSmall(write::channel(channel, arena, messages, stand_alone))
        } else {
            let (channel, arena) = topic::channel::<7>(segment, &info.geometry);
            Port::Channel(write::channel(channel, arena, messages, stand_alone))
        }
    }
}

fn missing(found: usize, expected: u64) -> AttachError {
    AttachError::Field { field: "number of descriptors", found: found as u64, expected }
}

impl Sealer {
    fn new(info: &TopicInfo) -> Option<Sealer> {
        let default_ttl_ms = info.options.ttl_ms;
        let sealer = || Sealer { align: info.batch_align(), default_ttl_ms, scratch: Vec::new() };
        info.options.envelope.then(sealer)
    }

    /// Puts a batch together in `bodies`; where each message ends.
    fn seal_batch(&self, batch: &[(&[u8], &Envelope)], bodies: &mut Vec<u8>) -> Result<Vec<usize>, EnvelopeError> {
        bodies.clear();
        let now_ns = envelope::now_ns();
        let seal = |(payload, envelope): &(&[u8], &Envelope)| {
            self.seal(payload, envelope, now_ns, bodies)?;
            Ok(bodies.len())
        };
        batch.iter().map(seal).collect()
    }

    /// Appends envelope and payload to `body`.
    fn seal(&self, payload: &[u8], envelope: &Envelope, now_ns: u64, body: &mut Vec<u8>) -> Result<(), EnvelopeError> {
        envelope.seal(now_ns, self.default_ttl_ms, self.align, body)?;
        body.extend_from_slice(payload);
        Ok(())
    }
}

impl PublisherCore {
    /// A stand-alone channel's sender.
    pub(crate) fn stand_alone(info: &TopicInfo, segment: &Segment, home: Home) -> Self {
        let port = Port::channel(info, segment, true);
        let options = info.options.clone();
        PublisherCore {
            space_bell: port.space_bell(),
            port,
            options,
            sealer: Sealer::new(info),
            name: String::new(),
            groups: Vec::new(),
            id: 0,
            named: false,
            before: 0,
            runs: Runs::default(),
            wait: Wait::default(),
            held: None,
            home,
        }
    }

    pub(crate) fn set_wait(&mut self, wait: Wait) {
        self.wait = wait;
    }

    #[inline]
    fn check_len(&self, len: usize) -> Result<(), PublishError> {
        let len = len as u64;
        if len > self.options.bytes {
            return Err(PublishError::TooLarge { found: len, max: self.options.bytes });
        }
        if let Some(schema) = &self.options.schema
            && schema.size_bytes != len
        {
            return Err(PublishError::WrongSize { found: len, expected: schema.clone() });
        }
        Ok(())
    }

    /// A forked child has a copy of its parent's handle; the place is the parent's.
    #[inline]
    fn check_home(&self) -> Result<(), PublishError> {
        if self.home.is_here() {
            return Ok(());
        }
        Err(PublishError::Forked { opened_by: self.home.pid(), pid: std::process::id() })
    }

    /// Whether there is a topic to publish to, and a publisher to do it.
    #[inline]
    fn check_gone(&self) -> Result<(), PublishError> {
        self.check_home()?;
        match with_port!(&self.port, port => port.gone()) {
            None => Ok(()),
            Some(reason) => Err(PublishError::Gone(reason)),
        }
    }

    /// The few stores that publish a small message where nothing stands in the way.
    #[inline(always)]
    fn publish_fast(&mut self, bytes: &[u8]) -> Option<Sequence> {
        if !self.home.is_here() {
            return None;
        }
        with_port!(&mut self.port, port => port.publish_fast(bytes)).map(Sequence::new)
    }

    fn try_publish(&mut self, bytes: &[u8]) -> Result<Sequence, PublishError> {
        self.check_gone()?;
        match with_port!(&mut self.port, port => port.publish(bytes)) {
            Ok(sequence) => Ok(Sequence::new(sequence)),
            Err(stop) => Err(self.refused(stop)),
        }
    }

    fn publish(&mut self, bytes: &[u8], deadline: Option<Instant>) -> Result<Sequence, PublishError> {
        self.check_gone()?;
        match with_port!(&mut self.port, port => port.publish(bytes)) {
            Ok(sequence) => Ok(Sequence::new(sequence)),
            Err(stop) => {
                self.wait_for(stop, deadline, |port| with_port!(port, port => port.publish(bytes))).map(Sequence::new)
            }
        }
    }

    /// Publishes a payload in an envelope with `publish`, which gets both in one piece.
    #[inline(never)]
    fn publish_sealed(
        &mut self,
        payload: &[u8],
        envelope: &Envelope,
        publish: impl FnOnce(&mut Self, &[u8]) -> Result<Sequence, PublishError>,
    ) -> Result<Sequence, PublishError> {
        let Some(body) = self.seal(payload, envelope)? else { return publish(self, payload) };
        let outcome = publish(self, &body);
        self.keep_scratch(body);
        outcome
    }

    /// A payload in its envelope; `None`: the topic has none.
    fn seal(&mut self, payload: &[u8], envelope: &Envelope) -> Result<Option<Vec<u8>>, PublishError> {
        let Some(sealer) = &mut self.sealer else {
            return if envelope.is_empty() { Ok(None) } else { Err(EnvelopeError::LeanTopic.into()) };
        };
        let mut body = std::mem::take(&mut sealer.scratch);
        body.clear();
        sealer.seal(payload, envelope, envelope::now_ns(), &mut body)?;
        Ok(Some(body))
    }

    /// The same with a batch, whose messages all get one timestamp.
    fn publish_sealed_batch(
        &mut self,
        batch: &[(&[u8], &Envelope)],
        deadline: Option<Instant>,
    ) -> Result<Sequence, PublishError> {
        self.check_batch(batch.iter().map(|(payload, _)| payload.len()))?;
        let Some(sealer) = &mut self.sealer else {
            if batch.iter().any(|(_, envelope)| !envelope.is_empty()) {
                return Err(EnvelopeError::LeanTopic.into());
            }
            let payloads: Vec<&[u8]> = batch.iter().map(|(payload, _)| *payload).collect();
            return self.publish_bodies(&payloads, deadline);
        };
        let mut bodies = std::mem::take(&mut sealer.scratch);
        let ends = sealer.seal_batch(batch, &mut bodies);
        let outcome = ends.map_err(PublishError::from).and_then(|ends| {
            let found = bodies.len() as u64 - batch.iter().map(|(payload, _)| payload.len() as u64).sum::<u64>();
            let max = batch_envelopes_bytes(&self.options, batch.len() as u64);
            if found > max {
                return Err(EnvelopeError::Batch { found, max }.into());
            }
            let starts = std::iter::once(0).chain(ends.iter().copied());
            let bodies: Vec<&[u8]> = starts.zip(&ends).map(|(start, end)| &bodies[start..*end]).collect();
            self.publish_bodies(&bodies, deadline)
        });
        self.keep_scratch(bodies);
        outcome
    }

    /// Memory for the next message.
    fn keep_scratch(&mut self, scratch: Vec<u8>) {
        if let Some(sealer) = &mut self.sealer
            && scratch.capacity() <= KEPT_SCRATCH_BYTES
        {
            sealer.scratch = scratch;
        }
    }

    fn publish_batch(&mut self, batch: &[&[u8]]) -> Result<Sequence, PublishError> {
        if self.sealer.is_some() {
            let plain = Envelope::new();
            return self
                .publish_sealed_batch(&batch.iter().map(|payload| (*payload, &plain)).collect::<Vec<_>>(), None);
        }
        self.check_batch(batch.iter().map(|payload| payload.len()))?;
        self.publish_bodies(batch, None)
    }

    /// Whether payloads of these lengths may be a batch.
    fn check_batch(&self, lengths: impl ExactSizeIterator<Item = usize> + Clone) -> Result<(), PublishError> {
        let max = with_port!(&self.port, port => port.max_batch());
        let found = lengths.len();
        if found == 0 || found > max {
            return Err(PublishError::BatchSize { found, max });
        }
        let total: u64 = lengths.clone().map(|len| len as u64).sum();
        if total > self.options.bytes {
            return Err(PublishError::TooLarge { found: total, max: self.options.bytes });
        }
        lengths.into_iter().try_for_each(|len| self.check_len(len))
    }

    /// Publishes what goes into the ring, all or nothing.
    fn publish_bodies(&mut self, batch: &[&[u8]], deadline: Option<Instant>) -> Result<Sequence, PublishError> {
        self.check_gone()?;
        match with_port!(&mut self.port, port => port.publish_batch(batch)) {
            Ok(sequence) => Ok(Sequence::new(sequence)),
            Err(stop) => {
                let attempt = |port: &mut Port| with_port!(port, port => port.publish_batch(batch));
                self.wait_for(stop, deadline, attempt).map(Sequence::new)
            }
        }
    }

    /// The number of the message published last.
    fn last_number(&self) -> u64 {
        self.before + with_port!(&self.port, port => port.published())
    }

    /// Whether `count` messages, numbered from `number` on, come next. A batch is committed whole, so a retry of it finds
    /// all of its numbers published or none; any other overlap is a batch cut differently.
    fn check_numbers(&mut self, number: u64, count: u64) -> Result<(), PublishError> {
        self.check_home()?;
        let last = self.last_number();
        let expected = last + 1;
        if number == expected {
            return Ok(());
        }
        if number == 0 || number > last {
            return Err(PublishError::NumberGap { expected, found: number });
        }
        if expected - number < count {
            return Err(PublishError::BatchOverlap { expected, found: number });
        }
        let (port, id) = (&mut self.port, self.id);
        let sequence = self.runs.sequence_of(number, last, || with_port!(port, port => port.runs_of(id)));
        Err(PublishError::Duplicate { sequence: sequence.map(Sequence::new) })
    }

    /// Waits until `attempt` succeeds, where the topic's policy is to wait.
    #[cold]
    fn wait_for<R>(
        &mut self,
        stop: Stop,
        deadline: Option<Instant>,
        mut attempt: impl FnMut(&mut Port) -> Result<R, Stop>,
    ) -> Result<R, PublishError> {
        let mut last = match stop {
            Stop::Blocked(blocked) if self.options.full != Full::Reject => blocked,
            stop => return Err(self.refused(stop)),
        };
        let poll = |core: &mut Self| match core.attempt(&mut attempt) {
            Attempt::Done(outcome) => Some(outcome),
            Attempt::NoRoom(blocked) => {
                last = blocked;
                None
            }
        };
        let outcome = wait::until(self, self.wait, deadline, |core| core.space_bell(), poll);
        outcome.unwrap_or_else(|| Err(self.timed_out(last)))
    }

    /// Tries once, where the topic may have gone meanwhile.
    fn attempt<R>(&mut self, attempt: impl FnOnce(&mut Port) -> Result<R, Stop>) -> Attempt<R> {
        if let Err(gone) = self.check_gone() {
            return Attempt::Done(Err(gone));
        }
        match attempt(&mut self.port) {
            Ok(done) => Attempt::Done(Ok(done)),
            Err(Stop::Blocked(blocked)) if self.options.full != Full::Reject => Attempt::NoRoom(blocked),
            Err(stop) => Attempt::Done(Err(self.refused(stop))),
        }
    }

    /// There was no room in time.
    fn timed_out(&self, blocked: Blocked) -> PublishError {
        match self.refused(Stop::Blocked(blocked)) {
            PublishError::Full { holder, held } => PublishError::TimedOut { holder, held },
            other => other,
        }
    }

    fn space_bell(&self) -> &Shared<Doorbell> {
        &self.space_bell
    }

    #[cold]
    fn refused(&self, stop: Stop) -> PublishError {
        match stop {
            Stop::Corrupt(problem) => PublishError::Corrupt(problem),
            Stop::Fenced => PublishError::Fenced,
            Stop::Duplicate(sequence) => PublishError::Duplicate { sequence: sequence.map(Sequence::new) },
            Stop::Blocked(Blocked { cursor, position }) => {
                // Readers give back in steps; whoever meets a full ring wants what they have read already.
                self.space_bell().urge();
                let holder = match (self.options.mode, cursor) {
                    (Mode::Channel, _) => Holder::Receiver,
                    (_, Some(cursor)) => self.holder(cursor),
                    (_, None) => Holder::Hold,
                };
                PublishError::Full { holder, held: position }
            }
        }
    }
}

/// Waiting for room without blocking.
#[cfg(feature = "async")]
impl PublisherCore {
    /// Publishes as soon as there is room, until `deadline`: in the very poll that says so.
    pub(super) async fn publish_async(
        &mut self,
        payload: &[u8],
        envelope: &Envelope,
        deadline: Option<Instant>,
    ) -> Result<Sequence, PublishError> {
        let sealed = self.seal(payload, envelope)?;
        let body = sealed.as_deref().unwrap_or(payload);
        let mut seat = Seat::default();
        let published = poll_fn(|context| {
            let bells = |core: &Self, bells: &mut Vec<Shared<Doorbell>>| bells.push(core.space_bell.clone());
            seat.poll(context.waker(), self, bells, |core| core.look_for_room(body, deadline))
        });
        let outcome = published.await;
        if let Some(body) = sealed {
            self.keep_scratch(body);
        }
        outcome
    }

    fn look_for_room(&mut self, body: &[u8], deadline: Option<Instant>) -> Look<Result<Sequence, PublishError>> {
        let blocked = match self.attempt(|port| with_port!(port, port => port.publish(body))) {
            Attempt::Done(outcome) => return Look::Found(outcome.map(Sequence::new)),
            Attempt::NoRoom(blocked) => blocked,
        };
        match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            None => Look::Nothing,
            Some(left) if left.is_zero() => Look::Found(Err(self.timed_out(blocked))),
            Some(left) => Look::Within(left),
        }
    }
}

/// Waiting for groups.
impl PublisherCore {
    /// Whose cursor holds the ring.
    fn holder(&self, cursor: u32) -> Holder {
        let lines = with_port!(&self.port, port => port.cursors());
        let group = lines.get(cursor as usize).and_then(Cursor::group);
        group.map_or(Holder::Subscriber(cursor), |group| Holder::Group(group as u32))
    }

    fn wait_settled(&mut self, group: &str, sequence: u64, limit: Duration) -> Result<(), SettleError> {
        if !self.home.is_here() {
            return Err(SettleError::Forked { opened_by: self.home.pid(), pid: std::process::id() });
        }
        let deadline = Instant::now().checked_add(limit);
        loop {
            let line = match self.groups.iter().position(|line| line.name == group) {
                Some(index) => index,
                None => self.find_group(group)?,
            };
            // Consumers raise their line in steps; whoever waits wants what they have settled already.
            self.space_bell().urge();
            let poll = |core: &mut PublisherCore| {
                if let Some(reason) = with_port!(&core.port, port => port.gone()) {
                    return Some(Err(SettleError::Gone(reason)));
                }
                match core.settled_below(&core.groups[line]) {
                    Some(below) => (below > sequence).then_some(Ok(true)),
                    None => Some(Ok(false)),
                }
            };
            match wait::until(self, self.wait, deadline, |core| core.space_bell(), poll) {
                Some(Ok(true)) => return Ok(()),
                // Rewound or removed: the coordinator knows which. Or garbled: then it says the same as before.
                Some(Ok(false)) => {
                    drop(self.groups.swap_remove(line));
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        return Err(SettleError::TimedOut);
                    }
                    thread::sleep(GROUP_PAUSE);
                }
                Some(Err(error)) => return Err(error),
                None => return Err(SettleError::TimedOut),
            }
        }
    }

    /// `None`: the group that we knew by this name has ended.
    fn settled_below(&self, line: &GroupLine) -> Option<u64> {
        let cursor = with_port!(&self.port, port => port.cursors()).get(line.cursor as usize)?;
        cursor.settled_below(line.group.into())
    }

    /// Asks the coordinator where a group's line is.
    fn find_group(&mut self, group: &str) -> Result<usize, SettleError> {
        let control = self.held.as_ref().map(Held::control).ok_or(SettleError::NoGroup)?;
        let request = Request::Status { topic: Some(self.name.clone()), after: None };
        let (answer, _) = control.request(&request)?;
        let Answer::Status { topics, .. } = answer else { return Err(unexpected(&answer).into()) };
        let found = topics.into_iter().flat_map(|topic| topic.groups).find(|found| found.name == group);
        let found = found.ok_or(SettleError::NoGroup)?;
        self.groups.push(GroupLine { name: found.name, group: found.id, cursor: found.cursor });
        Ok(self.groups.len() - 1)
    }
}

impl Drop for PublisherCore {
    fn drop(&mut self) {
        // A forked child drops a copy: the original is its parent's.
        if !self.home.is_here() {
            return;
        }
        with_port!(&mut self.port, port => port.leave());
        // Only now may the coordinator give the place away.
        drop(self.held.take());
    }
}

impl<T: Payload + ?Sized> Publisher<T> {
    pub(crate) fn from_core(core: PublisherCore) -> Self {
        Publisher { core, payload: PhantomData }
    }

    /// Chooses how to wait for room (default [`Wait::Adaptive`]).
    #[must_use]
    pub fn wait(mut self, wait: Wait) -> Self {
        self.core.set_wait(wait);
        self
    }

    /// Publishes a message. On a full ring it waits (`block`) or fails at once (`reject`).
    ///
    /// The message is visible to every subscriber when this returns. Costs no system call unless somebody sleeps.
    ///
    /// # Errors
    /// [`PublishError`]; whichever it is, no reader will see the message.
    #[inline]
    pub fn publish(&mut self, payload: &T) -> Result<Sequence, PublishError> {
        let bytes = self.checked(payload)?;
        if self.core.sealer.is_some() {
            return self.core.publish_sealed(bytes, &Envelope::new(), |core, body| core.publish(body, None));
        }
        match self.core.publish_fast(bytes) {
            Some(sequence) => Ok(sequence),
            None => self.core.publish(bytes, None),
        }
    }

    /// Publishes a message with a key, headers, an id or a time-to-live of its own. On a full ring it waits (`block`) or
    /// fails at once (`reject`).
    ///
    /// # Errors
    /// [`PublishError::Envelope`] where the topic was created without envelopes (unless this one is empty), or the
    /// envelope is too long; otherwise as [`Self::publish`].
    pub fn publish_with(&mut self, payload: &T, envelope: &Envelope) -> Result<Sequence, PublishError> {
        let bytes = self.checked(payload)?;
        self.core.publish_sealed(bytes, envelope, |core, body| core.publish(body, None))
    }

    /// The same, waiting for room until `deadline`.
    pub(crate) fn publish_with_until(
        &mut self,
        payload: &T,
        envelope: &Envelope,
        deadline: Option<Instant>,
    ) -> Result<Sequence, PublishError> {
        let bytes = self.checked(payload)?;
        self.core.publish_sealed(bytes, envelope, |core, body| core.publish(body, deadline))
    }

    /// Rings when a reader has made room, or has left.
    pub(crate) fn space_bell(&self) -> &Shared<Doorbell> {
        self.core.space_bell()
    }

    /// Publishes a message if there is room for it now.
    ///
    /// # Errors
    /// [`PublishError::Full`] names who holds the ring.
    #[inline]
    pub fn try_publish(&mut self, payload: &T) -> Result<Sequence, PublishError> {
        let bytes = self.checked(payload)?;
        if self.core.sealer.is_some() {
            return self.core.publish_sealed(bytes, &Envelope::new(), PublisherCore::try_publish);
        }
        match self.core.publish_fast(bytes) {
            Some(sequence) => Ok(sequence),
            None => self.core.try_publish(bytes),
        }
    }

    /// Publishes a message, waiting for room for at most `limit`.
    ///
    /// # Errors
    /// [`PublishError::TimedOut`] names who holds the ring.
    pub fn publish_timeout(&mut self, payload: &T, limit: Duration) -> Result<Sequence, PublishError> {
        let (bytes, deadline) = (self.checked(payload)?, Instant::now().checked_add(limit));
        self.core.publish_sealed(bytes, &Envelope::new(), |core, body| core.publish(body, deadline))
    }

    /// Publishes the message with this number, once: a publisher under a name ([`Bus::publisher_as`]) that does not know how
    /// far it came asks [`Self::last_number`], or tries again from wherever it likes.
    ///
    /// Numbers are dense and begin with 1. Without a name they count this handle's messages.
    ///
    /// # Errors
    /// [`PublishError::Duplicate`] for a number that has been published, [`PublishError::NumberGap`] for one that
    /// is not the next; otherwise as [`Self::publish`].
    pub fn publish_numbered(&mut self, payload: &T, number: u64) -> Result<Sequence, PublishError> {
        self.core.check_numbers(number, 1)?;
        self.publish(payload)
    }

    /// Publishes a batch ([`Self::publish_batch`]) whose messages have the numbers from `first` on, once: the batch of a
    /// publisher that was killed between its commit and the answer is given again as it was.
    ///
    /// # Errors
    /// [`PublishError::Duplicate`] where all of its numbers have been published, with the sequence of the first (the others
    /// follow it if they were one batch then too); [`PublishError::NumberGap`] where `first` is above the next number;
    /// [`PublishError::BatchOverlap`] where some of its numbers have been published and some have not, which only a batch
    /// that is cut differently can meet; otherwise as [`Self::publish_batch`]. Nothing of it is published then.
    pub fn publish_batch_numbered<'a>(
        &mut self,
        payloads: impl IntoIterator<Item = &'a T>,
        first: u64,
    ) -> Result<Sequence, PublishError>
    where
        T: 'a,
    {
        let batch: Vec<&[u8]> = payloads.into_iter().map(|payload| payload.as_bytes()).collect();
        // What could never have been published is no duplicate.
        self.core.check_batch(batch.iter().map(|payload| payload.len()))?;
        self.core.check_numbers(first, batch.len() as u64)?;
        self.core.publish_batch(&batch)
    }

    /// Under a name: the number of the message that was published last under it, 0 for none. `None` without a name.
    pub fn last_number(&self) -> Option<u64> {
        self.core.named.then(|| self.core.last_number())
    }

    /// Waits until a group has settled the message with this sequence and all before it: acknowledged, or moved to the
    /// dead-letter topic.
    ///
    /// Consumers say so in steps; at the latest when they next receive or settle something, or find nothing to receive.
    ///
    /// # Errors
    /// [`SettleError`]
    pub fn wait_settled(&mut self, group: &str, sequence: Sequence, limit: Duration) -> Result<(), SettleError> {
        self.core.wait_settled(group, sequence.get(), limit)
    }

    /// Publishes up to 1,024 messages, all or nothing and consecutively, for little more than the price of one.
    /// Returns the sequence of the first.
    ///
    /// # Errors
    /// [`PublishError::BatchSize`] for an empty batch or one that the ring could never hold; otherwise as
    /// [`Self::publish`].
    pub fn publish_batch<'a>(&mut self, payloads: impl IntoIterator<Item = &'a T>) -> Result<Sequence, PublishError>
    where
        T: 'a,
    {
        let batch: Vec<&[u8]> = payloads.into_iter().map(|payload| payload.as_bytes()).collect();
        self.core.publish_batch(&batch)
    }

    /// The same with an envelope for each message.
    ///
    /// # Errors
    /// As [`Self::publish_batch`] and [`Self::publish_with`].
    pub fn publish_batch_with<'a>(
        &mut self,
        messages: impl IntoIterator<Item = (&'a T, &'a Envelope)>,
    ) -> Result<Sequence, PublishError>
    where
        T: 'a,
    {
        let batch: Vec<(&[u8], &Envelope)> =
            messages.into_iter().map(|(payload, envelope)| (payload.as_bytes(), envelope)).collect();
        self.core.publish_sealed_batch(&batch, None)
    }

    /// The payload's bytes. A fixed size has been compared with the topic's when the handle was opened.
    #[inline]
    pub(super) fn checked<'a>(&self, payload: &'a T) -> Result<&'a [u8], PublishError> {
        let bytes = payload.as_bytes();
        if !T::FIXED_SIZE {
            self.core.check_len(bytes.len())?;
        }
        Ok(bytes)
    }

    /// This publisher's number on the bus, as messages carry it; the same for everyone who publishes under one name.
    pub fn id(&self) -> u64 {
        self.core.id
    }

    /// Who reads the topic now, counted in shared memory without asking anybody. A subscriber whose `open` has returned is
    /// counted until it is dropped or its death is noticed.
    pub fn readers(&self) -> Readers {
        with_port!(&self.core.port, port => port.readers())
    }

    /// The options the topic was created with.
    pub fn topic_options(&self) -> &TopicOptions {
        &self.core.options
    }
}

impl<T: Payload> Publisher<T> {
    /// Lends memory for one message, to be filled in place. It holds a valid `T` of unspecified content.
    ///
    /// # Errors
    /// As [`Self::publish`]: the room is taken now.
    pub fn loan(&mut self) -> Result<Loan<'_, T>, PublishError> {
        Loan::new(&mut self.core, size_of::<T>())
    }
}

impl Publisher<[u8]> {
    /// Lends memory for a message of `len` bytes, to be filled in place. Its content is unspecified.
    ///
    /// # Errors
    /// As [`Self::publish`]: the room is taken now.
    pub fn loan_bytes(&mut self, len: usize) -> Result<Loan<'_, [u8]>, PublishError> {
        Loan::new(&mut self.core, len)
    }
}

/// Memory lent by a publisher; dereferences to the payload. Dropping it without [`Loan::publish`] publishes nothing.
pub struct Loan<'a, T: ?Sized> {
    core: &'a mut PublisherCore,
    space: Space,
    /// Bytes at the front of an arena space that are the envelope's.
    envelope_bytes: usize,
    payload: PhantomData<fn(&T)>,
}

/// A small payload before it is copied to its slot, aligned for every payload type.
#[repr(C, align(32))]
struct SmallPayload([u8; MAX_INLINE_BYTES]);

/// Where a loan lies.
enum Space {
    /// Will travel in the slot: a copy of a cache line is cheaper than a visit to the arena.
    Inline(SmallPayload, usize),
    Arena(Span),
}

impl<'a, T: Payload + ?Sized> Loan<'a, T> {
    fn new(core: &'a mut PublisherCore, len: usize) -> Result<Self, PublishError> {
        core.check_len(len)?;
        core.check_gone()?;
        let envelope_bytes = if core.sealer.is_some() { ENVELOPE_HEAD_BYTES } else { 0 };
        let inline = with_port!(&core.port, port => port.inline_bytes()).min(MAX_INLINE_BYTES);
        let space = if len + envelope_bytes <= inline {
            Space::Inline(SmallPayload([0; MAX_INLINE_BYTES]), len)
        } else {
            let body = (len + envelope_bytes) as u64;
            let first = with_port!(&mut core.port, port => port.lend(body));
            let span = match first {
                Ok(span) => span,
                Err(stop) => core.wait_for(stop, None, |port| with_port!(port, port => port.lend(body)))?,
            };
            Space::Arena(span)
        };
        Ok(Loan { core, space, envelope_bytes, payload: PhantomData })
    }

    /// Publishes what was written. On a full ring it waits (`block`) or fails at once (`reject`).
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    pub fn publish(mut self) -> Result<Sequence, PublishError> {
        self.core.check_home()?;
        self.write_envelope();
        match self.space {
            Space::Inline(small, len) => {
                let publish = |core: &mut PublisherCore, body: &[u8]| core.publish(body, None);
                self.core.publish_sealed(&small.0[..len], &Envelope::new(), publish)
            }
            Space::Arena(span) => {
                self.core.check_gone()?;
                let first = with_port!(&mut self.core.port, port => port.publish_lent(span));
                let sequence = match first {
                    Ok(sequence) => sequence,
                    Err(stop) => {
                        self.core.wait_for(stop, None, |port| with_port!(port, port => port.publish_lent(span)))?
                    }
                };
                Ok(Sequence::new(sequence))
            }
        }
    }

    /// Says when the message was published, where the topic wants to know.
    fn write_envelope(&mut self) {
        if let (Some(sealer), Space::Arena(_)) = (&self.core.sealer, &self.space) {
            let head = envelope::plain(envelope::now_ns(), sealer.default_ttl_ms);
            self.body_mut()[..ENVELOPE_HEAD_BYTES].copy_from_slice(&head);
        }
    }

    /// The payload.
    fn bytes(&self) -> &[u8] {
        self.core.home.assert_here("loan");
        match &self.space {
            Space::Inline(small, len) => &small.0[..*len],
            Space::Arena(span) => {
                let pointer = with_port!(&self.core.port, port => port.pointer(*span));
                // SAFETY: the span lies in our arena (the allocator hands out nothing else), no reader has been told
                // of it, and no other publisher writes this arena (I-9).
                let body = unsafe { std::slice::from_raw_parts(pointer, span.len as usize) };
                &body[self.envelope_bytes..]
            }
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let payload_at = if matches!(self.space, Space::Arena(_)) { self.envelope_bytes } else { 0 };
        &mut self.body_mut()[payload_at..]
    }

    /// All of the space.
    fn body_mut(&mut self) -> &mut [u8] {
        self.core.home.assert_here("loan");
        match &mut self.space {
            Space::Inline(small, len) => &mut small.0[..*len],
            Space::Arena(span) => {
                let pointer = with_port!(&self.core.port, port => port.pointer(*span));
                // SAFETY: as in `bytes`, and `&mut self` is the only path to it.
                unsafe { std::slice::from_raw_parts_mut(pointer, span.len as usize) }
            }
        }
    }
}

impl<T: Payload + ?Sized> Deref for Loan<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match T::ref_from_bytes(self.bytes()) {
            Ok(payload) => payload,
            Err(_) => unreachable!("a loan has the payload's size and alignment"),
        }
    }
}

impl<T: Payload + ?Sized> DerefMut for Loan<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match T::mut_from_bytes(self.bytes_mut()) {
            Ok(payload) => payload,
            Err(_) => unreachable!("a loan has the payload's size and alignment"),
        }
    }
}
