//! Consuming without blocking the thread (feature `async`).

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::stream::{FusedStream, Stream};

use super::{Batch, Consumer, Deliveries, Delivery, OwnedDelivery};
use crate::client::seat::Seat;
use crate::error::RecvError;
use crate::topic::Payload;
use crate::wait::Look;

impl<T: Payload + ?Sized> Consumer<T> {
    /// Receives the next message, waiting for it without blocking the thread. Cancel safe: its lease begins when the future
    /// resolves; dropping the future before that leaves the message to the group.
    ///
    /// # Errors
    /// As [`Self::recv`].
    pub async fn recv_async(&mut self) -> Result<Delivery<'_, T>, RecvError> {
        self.taken_async(1).await?;
        Ok(Delivery::new(&mut self.core))
    }

    /// Receives up to `count` messages at once as [`Self::recv_batch`], waiting for the first without blocking the thread. Cancel
    /// safe as [`Self::recv_async`]. An empty batch is returned only for a `count` of 0.
    ///
    /// # Errors
    /// As [`Self::recv_batch`].
    pub async fn recv_batch_async(&mut self, count: usize) -> Result<Batch<'_, T>, RecvError> {
        if count == 0 {
            return self.recv_batch(0);
        }
        self.taken_async(count).await?;
        Ok(Batch::new(&mut self.core))
    }

    /// The messages to come as a stream of deliveries that any task may settle; see [`DeliveryStream`].
    pub fn into_stream(self) -> DeliveryStream<T> {
        DeliveryStream { deliveries: self.into_iter(), seat: Seat::default() }
    }

    /// Takes up to `count` messages, at least one.
    async fn taken_async(&mut self, count: usize) -> Result<(), RecvError> {
        let mut seat = Seat::default();
        let look = |consumer: &mut Self| match consumer.core.look(count) {
            Ok(true) => Look::Found(Ok(())),
            Ok(false) => consumer.nap().map_or(Look::Nothing, Look::Within),
            Err(error) => Look::Found(Err(error)),
        };
        poll_fn(|context| seat.poll(context.waker(), self, |consumer, bells| bells.push(consumer.shared_bell()), look))
            .await
    }
}

/// Waits for message after message of a [`Consumer`] without blocking the thread: a [`Stream`] of what [`Deliveries`], the
/// iterator, yields. Set [`max_in_flight`](crate::ConsumerBuilder::max_in_flight): without it, it takes as much as there is.
///
/// Cancel safe: dropping a future that waits for the next item leaves the message to the group.
#[must_use = "streams do nothing unless they are polled"]
pub struct DeliveryStream<T: ?Sized> {
    deliveries: Deliveries<T>,
    seat: Seat,
}

impl<T: Payload + ?Sized> Stream for DeliveryStream<T> {
    type Item = Result<OwnedDelivery<T>, RecvError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        this.deliveries.poll_next(&mut this.seat, context.waker())
    }
}

impl<T: Payload + ?Sized> FusedStream for DeliveryStream<T> {
    fn is_terminated(&self) -> bool {
        self.deliveries.has_ended()
    }
}
