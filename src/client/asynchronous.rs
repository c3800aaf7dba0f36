//! Waiting without blocking the thread, for tasks of any runtime (feature `async`).
//!
//! Every future here looks when it is polled, and takes a message only in the poll that resolves it: dropping one that has not
//! resolved loses nothing. They may be polled from any thread, and by any executor: [`Seat`] calls the waker. Consumers have
//! theirs in `consumer/asynchronous.rs`, requests in `request.rs`.

use std::future::poll_fn;

use crate::client::envelope::Envelope;
use crate::client::message::Message;
use crate::client::publisher::Publisher;
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
        poll_fn(|context| seat.poll(context.waker(), self, Parts::bells, Self::look)).await?;
        Ok(Message::new(&self.core))
    }

    fn look(&mut self) -> Look<Result<(), RecvError>> {
        match self.core.poll() {
            Ok(true) => Look::Found(Ok(())),
            Ok(false) if self.core.is_rung() => Look::Nothing,
            Ok(false) => Look::Within(MOMENT),
            Err(error) => Look::Found(Err(error)),
        }
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
        poll_fn(|context| seat.poll(context.waker(), self, Parts::bells, |handle| handle.core.look())).await?;
        Ok(self.message())
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
