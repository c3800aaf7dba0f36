//! Consuming without blocking the thread (feature `async`).

use std::future::poll_fn;

use super::{Batch, Consumer, Delivery};
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

    /// Receives up to `count` messages at once, as many as are there, waiting for the first without blocking the thread. Cancel
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

    /// Takes up to `count` messages, at least one.
    async fn taken_async(&mut self, count: usize) -> Result<(), RecvError> {
        let mut seat = Seat::default();
        let look = |consumer: &mut Self| match consumer.core.poll(count) {
            Ok(true) => Look::Found(Ok(())),
            Ok(false) => consumer.nap().map_or(Look::Nothing, Look::Within),
            Err(error) => Look::Found(Err(error)),
        };
        poll_fn(|context| seat.poll(context.waker(), self, |consumer, bells| bells.push(consumer.shared_bell()), look))
            .await
    }
}
