//! Iterating over a subscriber, or over all topics of a wildcard.

use std::iter::FusedIterator;

use crate::client::message::OwnedMessage;
use crate::client::subscriber::Subscriber;
use crate::client::wildcard::{OwnedWildcardMessage, WildcardSubscriber};
use crate::error::{RecvError, WildcardError};
use crate::topic::Payload;

/// Waits for message after message of a [`Subscriber`] or [`WildcardSubscriber`], owned or borrowed mutably.
///
/// ```no_run
/// # use shmbus::{Bus, RecvError, Topic};
/// # let bus = Bus::open_default()?;
/// for price in bus.subscriber(Topic::<u64>::new("md.prices")).open()? {
///     match price {
///         Ok(price) => println!("{}: {}", price.sequence(), *price),
///         Err(RecvError::Lagged { from, to }) => eprintln!("lost {from}..{to}"),
///         Err(error) => return Err(error.into()),
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Each item is a copy in memory of its own; `recv` copies nothing. It waits as the handle does. A loss is an item, and the next
/// one is what comes behind it; an error after which nothing can come (the topic is gone, its memory is corrupt, the
/// process has forked) is the last item. A wildcard survives what is wrong with one of its topics.
#[must_use = "iterators do nothing unless they are asked"]
pub struct Messages<S> {
    source: S,
    has_ended: bool,
}

/// What can be iterated over. Not to be implemented outside this crate: it cannot name it.
pub trait Pull {
    /// A message that borrows nothing.
    type Message;
    /// What a receive may fail with.
    type Error;

    /// Waits for the next message.
    fn pull(&mut self) -> Result<Self::Message, Self::Error>;

    /// Whether nothing can come after this error.
    fn is_final(error: &Self::Error) -> bool;
}

impl<T: Payload + ?Sized> Pull for Subscriber<T> {
    type Message = OwnedMessage<T>;
    type Error = RecvError;

    fn pull(&mut self) -> Result<OwnedMessage<T>, RecvError> {
        self.recv().map(|message| message.detach())
    }

    fn is_final(error: &RecvError) -> bool {
        error.is_final()
    }
}

impl<T: Payload + ?Sized> Pull for WildcardSubscriber<T> {
    type Message = OwnedWildcardMessage<T>;
    type Error = WildcardError;

    fn pull(&mut self) -> Result<OwnedWildcardMessage<T>, WildcardError> {
        self.recv().map(|message| message.detach())
    }

    fn is_final(error: &WildcardError) -> bool {
        error.end().is_some()
    }
}

impl<S: Pull> Pull for &mut S {
    type Message = S::Message;
    type Error = S::Error;

    fn pull(&mut self) -> Result<S::Message, S::Error> {
        S::pull(self)
    }

    fn is_final(error: &S::Error) -> bool {
        S::is_final(error)
    }
}

impl<S> Messages<S> {
    fn of(source: S) -> Self {
        Messages { source, has_ended: false }
    }
}

impl<S: Pull> Iterator for Messages<S> {
    type Item = Result<S::Message, S::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        Some(self.source.pull().inspect_err(|error| self.has_ended = S::is_final(error)))
    }
}

impl<S: Pull> FusedIterator for Messages<S> {}

/// What gives itself away to the iterator, or lends itself: Rust does not let that be said of all that can be pulled from.
macro_rules! iterates {
    ($($handle:ty: $item:ty,)*) => {$(
        impl<T: Payload + ?Sized> IntoIterator for $handle {
            type Item = $item;
            type IntoIter = Messages<Self>;

            fn into_iter(self) -> Messages<Self> {
                Messages::of(self)
            }
        }
    )*};
}

iterates! {
    Subscriber<T>: Result<OwnedMessage<T>, RecvError>,
    &mut Subscriber<T>: Result<OwnedMessage<T>, RecvError>,
    WildcardSubscriber<T>: Result<OwnedWildcardMessage<T>, WildcardError>,
    &mut WildcardSubscriber<T>: Result<OwnedWildcardMessage<T>, WildcardError>,
}
