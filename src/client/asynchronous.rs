//! Waiting without blocking the thread, for tasks of any runtime (feature `async`).
//!
//! Every future here looks when it is polled, and takes a message only in the poll that resolves it: dropping one that has not
//! resolved loses nothing. They may be polled from any thread, and by any executor: [`Seat`] calls the waker. Consumers have
//! theirs in `consumer/asynchronous.rs`, requests in `request.rs`.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use futures_core::stream::{FusedStream, Stream};

use crate::client::envelope::Envelope;
use crate::client::iterate::Pull;
use crate::client::message::Message;
use crate::client::publisher::Publisher;
use crate::client::read::Step;
use crate::client::seat::Seat;
use crate::client::select::Parts;
use crate::client::subscriber::Subscriber;
use crate::client::wildcard::{WildcardMessage, WildcardSubscriber};
use crate::error::{PublishError, RecvError, WildcardError};
use crate::ring::sequence::Sequence;
use crate::topic::Payload;
use crate::wait::{Look, MOMENT};

impl<T: Payload + ?Sized> Subscriber<T> {
    /// Receives the next message, waiting for it without blocking the thread; how to wait is not chosen here: it never spins.
    ///
    /// Cancel safe: dropping the future before it resolves loses no message. Where messages are always there it resolves at once
    /// each time, so a task that does nothing else should yield now and then.
    ///
    /// ```no_run
    /// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
    /// # let bus = shmbus::Bus::open_default()?;
    /// let mut prices = bus.subscriber(shmbus::Topic::<u64>::new("prices")).open()?;
    /// let price = prices.recv_async().await?;
    /// println!("{}: {}", price.sequence(), *price);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Self::recv`].
    pub async fn recv_async(&mut self) -> Result<Message<'_, T>, RecvError> {
        let mut seat = Seat::default();
        poll_fn(|context| self.poll_found(&mut seat, context.waker())).await?;
        Ok(Message::new(&self.core))
    }

    /// The messages to come as a stream of copies, which borrows the subscriber; see [`MessageStream`].
    pub fn stream(&mut self) -> MessageStream<&mut Self> {
        MessageStream::of(self)
    }

    /// The same, owning the subscriber.
    pub fn into_stream(self) -> MessageStream<Self> {
        MessageStream::of(self)
    }

    /// Finds the next message for [`Message::new`], which must come next.
    fn poll_found(&mut self, seat: &mut Seat, waker: &Waker) -> Poll<Result<(), RecvError>> {
        seat.poll(waker, self, Parts::bells, |handle| match handle.core.look() {
            Ok(Step::Found) => Look::Found(Ok(())),
            Ok(Step::Passed) => Look::Within(Duration::ZERO),
            Ok(Step::Nothing) if handle.core.is_rung() => Look::Nothing,
            Ok(Step::Nothing) => Look::Within(MOMENT),
            Err(error) => Look::Found(Err(error)),
        })
    }
}

impl<T: Payload + ?Sized> WildcardSubscriber<T> {
    /// Receives the next message of any of its topics, waiting for it without blocking the thread. Cancel safe: dropping the
    /// future before it resolves loses no message.
    ///
    /// # Errors
    /// As [`Self::try_recv`].
    pub async fn recv_async(&mut self) -> Result<WildcardMessage<'_, T>, WildcardError> {
        let mut seat = Seat::default();
        poll_fn(|context| self.poll_found(&mut seat, context.waker())).await?;
        Ok(self.message())
    }

    /// The messages to come as a stream of copies, which borrows the subscriber; see [`MessageStream`].
    pub fn stream(&mut self) -> MessageStream<&mut Self> {
        MessageStream::of(self)
    }

    /// The same, owning the subscriber.
    pub fn into_stream(self) -> MessageStream<Self> {
        MessageStream::of(self)
    }

    /// Finds the next message for [`Self::message`], which must come next.
    fn poll_found(&mut self, seat: &mut Seat, waker: &Waker) -> Poll<Result<(), WildcardError>> {
        seat.poll(waker, self, Parts::bells, |handle| handle.core.look())
    }
}

impl<T: Payload + ?Sized> Publisher<T> {
    /// Publishes a message. On a full ring it waits without blocking the thread (`block`) or fails at once (`reject`).
    ///
    /// Cancel safe: if the future is dropped before it resolves, nothing is published.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub async fn publish_async(&mut self, payload: &T) -> Result<Sequence, PublishError> {
        self.publish_with_async(payload, &Envelope::new()).await
    }

    /// The same with a key, headers, an id or a time-to-live. The timestamp is that of the first poll.
    ///
    /// # Errors
    /// As [`Self::publish_with`].
    pub async fn publish_with_async(&mut self, payload: &T, envelope: &Envelope) -> Result<Sequence, PublishError> {
        self.core.publish_async(self.checked(payload)?, envelope, None).await
    }
}

/// Waits for message after message of a [`Subscriber`] or [`WildcardSubscriber`] without blocking the thread: a [`Stream`].
///
/// ```no_run
/// # use std::pin::pin;
/// # use futures_core::Stream;
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// # let bus = shmbus::Bus::open_default()?;
/// let mut prices = bus.subscriber(shmbus::Topic::<u64>::new("prices")).open()?.into_stream();
/// // With `futures::StreamExt` in scope: `while let Some(price) = prices.next().await`.
/// while let Some(price) = std::future::poll_fn(|context| pin!(&mut prices).poll_next(context)).await {
///     println!("{}", *price?);
/// }
/// # Ok(())
/// # }
/// ```
///
/// Its items are those of [`Messages`](crate::Messages), the iterator: copies in memory of their own, and errors, of which one that
/// is final is the last item. Cancel safe: dropping a future that waits for the next item loses none, nor does dropping a
/// stream that borrows.
#[must_use = "streams do nothing unless they are polled"]
pub struct MessageStream<S> {
    source: S,
    seat: Seat,
    has_ended: bool,
}

/// What can be a stream. Not to be implemented outside this crate: it cannot name it.
pub trait PollPull: Pull {
    /// The next message, or `waker` will be called when it is worth another poll.
    fn poll_pull(&mut self, seat: &mut Seat, waker: &Waker) -> Poll<Result<Self::Message, Self::Error>>;
}

impl<T: Payload + ?Sized> PollPull for Subscriber<T> {
    fn poll_pull(&mut self, seat: &mut Seat, waker: &Waker) -> Poll<Result<Self::Message, RecvError>> {
        self.poll_found(seat, waker).map_ok(|()| Message::<T>::new(&self.core).detach())
    }
}

impl<T: Payload + ?Sized> PollPull for WildcardSubscriber<T> {
    fn poll_pull(&mut self, seat: &mut Seat, waker: &Waker) -> Poll<Result<Self::Message, WildcardError>> {
        self.poll_found(seat, waker).map_ok(|()| self.message().detach())
    }
}

impl<S: PollPull> PollPull for &mut S {
    fn poll_pull(&mut self, seat: &mut Seat, waker: &Waker) -> Poll<Result<Self::Message, Self::Error>> {
        S::poll_pull(self, seat, waker)
    }
}

impl<S> MessageStream<S> {
    fn of(source: S) -> Self {
        MessageStream { source, seat: Seat::default(), has_ended: false }
    }
}

impl<S: PollPull + Unpin> Stream for MessageStream<S> {
    type Item = Result<S::Message, S::Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.has_ended {
            return Poll::Ready(None);
        }
        let item = ready!(this.source.poll_pull(&mut this.seat, context.waker()));
        this.has_ended = item.as_ref().is_err_and(S::is_final);
        Poll::Ready(Some(item))
    }
}

impl<S: PollPull + Unpin> FusedStream for MessageStream<S> {
    fn is_terminated(&self) -> bool {
        self.has_ended
    }
}
