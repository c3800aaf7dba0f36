//! Waiting for room without blocking.

use std::future::poll_fn;
use std::time::Instant;

use super::PublisherCore;
use super::port::Port;
use super::room::Attempt;
use crate::client::envelope::Envelope;
use crate::client::seat::Seat;
use crate::client::write::WritePort;
use crate::error::PublishError;
use crate::ring::doorbell::Doorbell;
use crate::ring::sequence::Sequence;
use crate::shm::shared::Shared;
use crate::wait::Look;

impl PublisherCore {
    /// Publishes as soon as there is room, until `deadline`: in the very poll that says so.
    pub(in crate::client) async fn publish_async(
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
