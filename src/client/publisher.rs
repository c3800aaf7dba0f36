//! [`Publisher`] and [`Loan`].

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::client::bus::{Bus, unexpected};
use crate::client::held::Held;
use crate::client::write::{self, ChannelEnd, ManyPort, SlotPort, WritePort};
use crate::coordinator::protocol::{Answer, HandleRef, Request, TopicInfo};
use crate::error::{AttachError, Holder, OpenError, PublishError};
use crate::os::home::Home;
use crate::ring::arena::Span;
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::{Blocked, Stop};
use crate::ring::sequence::Sequence;
use crate::ring::slot::MAX_INLINE_BYTES;
use crate::ring::{exclusive, many};
use crate::shm::segment::{Access, Segment};
use crate::shm::topic::{self, LogSegments, SharedInfo};
use crate::topic::{Full, Mode, Payload, Topic, TopicOptions};
use crate::wait::{self, Wait};

/// Writes messages to a topic.
///
/// A publisher is used by one thread at a time; open one for each thread. Dropping it gives its place back; what it
/// published stays.
pub struct Publisher<T: ?Sized> {
    core: PublisherCore,
    payload: PhantomData<fn(&T)>,
}

/// What does not depend on the payload's type.
pub(crate) struct PublisherCore {
    port: Port,
    options: TopicOptions,
    id: u64,
    wait: Wait,
    held: Option<Held>,
    home: Home,
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
        let options = topic.options();
        let schema = options.schema.clone();
        let request = Request::OpenPublisher { topic: topic.name().to_owned(), schema, create: Some(options) };
        let (answer, fds) = self.control().request(&request)?;
        let Answer::PublisherOpened { info, slot, publisher, tenancy, .. } = answer else {
            return Err(unexpected(&answer));
        };
        let handle = HandleRef::Publisher { topic: info.id, slot };
        let held = Held::new(self.control().clone(), handle);
        let info = Arc::new(info);
        let port = Port::attach(&info, slot, publisher, tenancy, &fds)?;
        let options = info.options.clone();
        let core = PublisherCore {
            port,
            options,
            id: publisher,
            wait: Wait::default(),
            held: Some(held),
            home: self.control().home(),
        };
        Ok(Publisher { core, payload: PhantomData })
    }
}

impl Port {
    /// Maps what the coordinator handed out.
    fn attach(
        info: &SharedInfo,
        slot: u32,
        publisher: u64,
        tenancy: u32,
        fds: &[OwnedFd],
    ) -> Result<Port, AttachError> {
        if info.options.mode == Mode::Channel {
            let fd = fds.first().ok_or_else(|| missing(0, 1))?;
            let segment = Segment::attach(fd.as_fd(), &info.channel(), Access::ReadWrite)?;
            return Ok(Port::channel(info, &segment, false));
        }
        let [log, cursors, arena] = fds else { return Err(missing(fds.len(), 3)) };
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
                Port::ExclusiveSmall(write::exclusive(writer, arena, messages))
            }
            (Mode::Exclusive, false) => {
                let log = segments.exclusive::<7>(info);
                let tail = log.tail().ok_or_else(no_tail)?;
                let writer = exclusive::Writer::new(log, info.policy(), tenancy as u8, tail);
                Port::Exclusive(write::exclusive(writer, arena, messages))
            }
            _ => {
                let writer = many::Writer::new(segments.many(info), info.policy(), slot).ok_or_else(no_tail)?;
                Port::Many(ManyPort::new(writer, info.clone(), slot, publisher, arena))
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

impl PublisherCore {
    /// A stand-alone channel's sender.
    pub(crate) fn stand_alone(info: &TopicInfo, segment: &Segment, home: Home) -> Self {
        let port = Port::channel(info, segment, true);
        let options = info.options.clone();
        PublisherCore { port, options, id: 0, wait: Wait::default(), held: None, home }
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

    /// Whether there is a topic to publish to, and a publisher to do it: a forked child has neither.
    #[inline]
    fn check_gone(&self) -> Result<(), PublishError> {
        if !self.home.is_here() {
            return Err(PublishError::Forked { opened_by: self.home.pid(), pid: std::process::id() });
        }
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

    fn publish_batch(&mut self, batch: &[&[u8]]) -> Result<Sequence, PublishError> {
        let max = with_port!(&self.port, port => port.max_batch());
        if batch.is_empty() || batch.len() > max {
            return Err(PublishError::BatchSize { found: batch.len(), max });
        }
        let total: u64 = batch.iter().map(|bytes| bytes.len() as u64).sum();
        if total > self.options.bytes {
            return Err(PublishError::TooLarge { found: total, max: self.options.bytes });
        }
        batch.iter().try_for_each(|bytes| self.check_len(bytes.len()))?;
        self.check_gone()?;
        match with_port!(&mut self.port, port => port.publish_batch(batch)) {
            Ok(sequence) => Ok(Sequence::new(sequence)),
            Err(stop) => {
                self.wait_for(stop, None, |port| with_port!(port, port => port.publish_batch(batch))).map(Sequence::new)
            }
        }
    }

    /// Waits until `attempt` succeeds, where the topic's policy is to wait.
    #[cold]
    fn wait_for<R>(
        &mut self,
        stop: Stop,
        deadline: Option<Instant>,
        mut attempt: impl FnMut(&mut Port) -> Result<R, Stop>,
    ) -> Result<R, PublishError> {
        if self.options.full == Full::Reject || matches!(stop, Stop::Corrupt(_)) {
            return Err(self.refused(stop));
        }
        let mut last = stop;
        let outcome = wait::until(
            self,
            self.wait,
            deadline,
            |core| core.space_bell(),
            |core| {
                if let Err(gone) = core.check_gone() {
                    return Some(Err(gone));
                }
                match attempt(&mut core.port) {
                    Ok(done) => Some(Ok(done)),
                    Err(Stop::Blocked(blocked)) => {
                        last = Stop::Blocked(blocked);
                        None
                    }
                    Err(stop) => Some(Err(core.refused(stop))),
                }
            },
        );
        match outcome {
            Some(result) => result,
            None => Err(match self.refused(last) {
                PublishError::Full { holder, held } => PublishError::TimedOut { holder, held },
                other => other,
            }),
        }
    }

    fn space_bell(&self) -> &Doorbell {
        with_port!(&self.port, port => port.space_bell())
    }

    #[cold]
    fn refused(&self, stop: Stop) -> PublishError {
        match stop {
            Stop::Corrupt(problem) => PublishError::Corrupt(problem),
            Stop::Blocked(Blocked { cursor, position }) => {
                // Readers give back in steps; whoever meets a full ring wants what they have read already.
                self.space_bell().urge();
                let holder = match (self.options.mode, cursor) {
                    (Mode::Channel, _) => Holder::Receiver,
                    (_, Some(cursor)) => Holder::Subscriber(cursor),
                    (_, None) => Holder::Hold,
                };
                PublishError::Full { holder, held: position }
            }
        }
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
        match self.core.publish_fast(bytes) {
            Some(sequence) => Ok(sequence),
            None => self.core.publish(bytes, None),
        }
    }

    /// Publishes a message if there is room for it now.
    ///
    /// # Errors
    /// [`PublishError::Full`] names who holds the ring.
    #[inline]
    pub fn try_publish(&mut self, payload: &T) -> Result<Sequence, PublishError> {
        let bytes = self.checked(payload)?;
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
        self.core.publish(self.checked(payload)?, Instant::now().checked_add(limit))
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

    /// The payload's bytes. A fixed size has been compared with the topic's when the handle was opened.
    #[inline]
    fn checked<'a>(&self, payload: &'a T) -> Result<&'a [u8], PublishError> {
        let bytes = payload.as_bytes();
        if !T::FIXED_SIZE {
            self.core.check_len(bytes.len())?;
        }
        Ok(bytes)
    }

    /// This publisher's number on the bus, as messages carry it.
    pub fn id(&self) -> u64 {
        self.core.id
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
        let inline = with_port!(&core.port, port => port.inline_bytes()).min(MAX_INLINE_BYTES);
        let space = if len <= inline {
            Space::Inline(SmallPayload([0; MAX_INLINE_BYTES]), len)
        } else {
            let first = with_port!(&mut core.port, port => port.lend(len as u64));
            let span = match first {
                Ok(span) => span,
                Err(stop) => core.wait_for(stop, None, |port| with_port!(port, port => port.lend(len as u64)))?,
            };
            Space::Arena(span)
        };
        Ok(Loan { core, space, payload: PhantomData })
    }

    /// Publishes what was written. On a full ring it waits (`block`) or fails at once (`reject`).
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    pub fn publish(self) -> Result<Sequence, PublishError> {
        match self.space {
            Space::Inline(small, len) => self.core.publish(&small.0[..len], None),
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

    fn bytes(&self) -> &[u8] {
        self.core.home.assert_here("loan");
        match &self.space {
            Space::Inline(small, len) => &small.0[..*len],
            Space::Arena(span) => {
                let pointer = with_port!(&self.core.port, port => port.pointer(*span));
                // SAFETY: the span lies in our arena (the allocator hands out nothing else), no reader has been told
                // of it, and no other publisher writes this arena (I-9).
                unsafe { std::slice::from_raw_parts(pointer, span.len as usize) }
            }
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
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
