//! Channels without a coordinator: one publisher, one subscriber, one descriptor.

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::client::publisher::{Publisher, PublisherCore};
use crate::client::subscriber::{Subscriber, SubscriberCore};
use crate::coordinator::protocol::TopicInfo;
use crate::error::AttachError;
use crate::os::home::Home;
use crate::ring::spsc::End;
use crate::shm::layout::Geometry;
use crate::shm::segment::{Access, Segment};
use crate::shm::topic;
use crate::topic::{Mode, Payload, Topic};

/// The memory of a stand-alone channel: the SPSC ring alone, for two threads or for two processes that can pass a
/// descriptor to each other (inheritance, SCM_RIGHTS).
///
/// Both sides name the same [`Topic`]; its size options must agree. Nobody watches over a stand-alone channel: the end
/// that is dropped is reported to the other ([`GoneReason::Closed`](crate::GoneReason)), the end whose process is killed is
/// not. Who takes an end keeps it: of two processes that share a channel by forking, each takes its end after the fork;
/// an end taken before it works in the parent alone. A channel opened through a [`Bus`](crate::Bus) (`Topic::channel`) has that, too.
///
/// ```
/// use shmbus::{Channel, Topic};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// const NUMBERS: Topic<u64> = Topic::new("numbers").messages(1024);
///
/// let channel = Channel::create(NUMBERS)?;
/// let (mut sender, mut receiver) = (channel.publisher()?, channel.subscriber()?);
/// std::thread::spawn(move || (0..10).try_for_each(|n| sender.publish(&n).map(drop)));
/// let sum: u64 = (0..10).map(|_| *receiver.recv().unwrap()).sum();
/// assert_eq!(sum, 45);
/// # Ok(())
/// # }
/// ```
pub struct Channel<T: ?Sized> {
    fd: OwnedFd,
    segment: Segment,
    info: TopicInfo,
    payload: PhantomData<fn(&T)>,
}

/// Why a stand-alone channel could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The options cannot work.
    #[error("channel options: {0}")]
    Options(String),
    /// The memory could not be reserved.
    #[error("cannot reserve {bytes} bytes for a channel: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// The descriptor is not this channel's.
    #[error("cannot attach to the channel: {0}")]
    Attach(#[from] AttachError),
    /// Each end can be taken once.
    #[error("the channel has its {0} already; a channel has one of each, taken once")]
    Taken(&'static str),
    /// The page that tells this process from its forked children could not be had.
    #[error("cannot mark this process: {0}")]
    Process(std::io::Error),
}

impl<T: Payload + ?Sized> Channel<T> {
    /// Reserves a channel's memory, sized by the topic's `messages` and `bytes`.
    ///
    /// # Errors
    /// The options are out of range, or there is not enough memory.
    pub fn create(topic: Topic<T>) -> Result<Self, ChannelError> {
        let info = info(&topic)?;
        let promise = info.channel();
        let bytes = promise.len_bytes;
        let created = Segment::create(topic.name(), &promise);
        let (fd, segment) = created.map_err(|source| ChannelError::Memory { bytes, source })?;
        topic::format_channel(&segment, &info.geometry, 0..info.geometry.slots);
        segment.publish(&promise);
        Ok(Channel { fd, segment, info, payload: PhantomData })
    }

    /// Maps a channel that another process created for the same topic.
    ///
    /// # Errors
    /// The descriptor is something else, or was created with other options or by another version.
    pub fn attach(topic: Topic<T>, fd: OwnedFd) -> Result<Self, ChannelError> {
        let info = info(&topic)?;
        let segment = Segment::attach(fd.as_fd(), &info.channel(), Access::ReadWrite)?;
        Ok(Channel { fd, segment, info, payload: PhantomData })
    }

    /// Takes the publishing end.
    ///
    /// # Errors
    /// Somebody has taken it before.
    pub fn publisher(&self) -> Result<Publisher<T>, ChannelError> {
        let home = Home::here().map_err(ChannelError::Process)?;
        if !topic::channel_header(&self.segment).take(End::Sender) {
            return Err(ChannelError::Taken("publisher"));
        }
        Ok(Publisher::from_core(PublisherCore::stand_alone(&self.info, &self.segment, home)))
    }

    /// Takes the subscribing end.
    ///
    /// # Errors
    /// Somebody has taken it before.
    pub fn subscriber(&self) -> Result<Subscriber<T>, ChannelError> {
        let home = Home::here().map_err(ChannelError::Process)?;
        if !topic::channel_header(&self.segment).take(End::Receiver) {
            return Err(ChannelError::Taken("subscriber"));
        }
        Ok(Subscriber::from_core(SubscriberCore::stand_alone(self.info.clone(), &self.segment, home)))
    }
}

impl<T: ?Sized> AsFd for Channel<T> {
    /// The descriptor to pass to the other process.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn info<T: Payload + ?Sized>(topic: &Topic<T>) -> Result<TopicInfo, ChannelError> {
    let mut options = topic.options();
    options.mode = Mode::Channel;
    let geometry = Geometry::from_options(&options).map_err(ChannelError::Options)?;
    Ok(TopicInfo { id: 0, bus: 0, name: topic.name().to_owned(), generation: 0, options, geometry })
}
