//! [`Publisher`]: plain publishing here, the rest in a file each.

#[cfg(feature = "async")]
mod asynchronous;
mod batch;
mod loan;
mod numbers;
mod open;
mod origin;
mod port;
mod room;
mod sealer;
mod settled;

use std::marker::PhantomData;
use std::time::{Duration, Instant};

pub use loan::Loan;
pub(crate) use origin::OriginPublisher;
use port::Port;
use sealer::Sealer;
use settled::GroupLine;

use crate::client::envelope::Envelope;
use crate::client::held::Held;
use crate::client::write::{Runs, WritePort};
use crate::error::PublishError;
use crate::os::home::Home;
use crate::ring::cursor::Readers;
use crate::ring::doorbell::Doorbell;
use crate::ring::sequence::Sequence;
use crate::shm::shared::Shared;
use crate::topic::{Payload, TopicOptions};
use crate::wait::Wait;

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

impl PublisherCore {
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

    fn space_bell(&self) -> &Shared<Doorbell> {
        &self.space_bell
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
