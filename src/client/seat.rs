//! Where a task, or an event loop, waits: looks at a handle, and has itself called when it is worth another look.

use std::task::{Poll, Waker};
use std::time::Duration;

use crate::client::reactor::Registration;
use crate::ring::doorbell::{Doorbell, arm_all};
use crate::shm::shared::Shared;
use crate::wait::Look;

/// Keeps what has been arranged between two polls. Dropped, nobody is called any more.
#[derive(Default)]
#[cfg_attr(not(feature = "async"), allow(unreachable_pub, reason = "streams have it in a public trait"))]
pub struct Seat {
    registration: Option<Registration>,
}

impl Seat {
    /// Looks; if there is nothing, arranges for `waker` to be called when one of `bells` is rung, or it is time to look all the
    /// same. Nothing is missed: after the bells have been armed it looks once more, and a ring after that look ends the sleep
    /// on what they were when armed (I-7). Where no thread can be had to sleep on them, `waker` is called at once: then
    /// waiting takes a processor, but goes on.
    pub(super) fn poll<S: ?Sized, R>(
        &mut self,
        waker: &Waker,
        state: &mut S,
        bells: impl Fn(&S, &mut Vec<Shared<Doorbell>>),
        mut look: impl FnMut(&mut S) -> Look<R>,
    ) -> Poll<R> {
        let present = |state: &S| {
            let mut present = Vec::new();
            bells(state, &mut present);
            present
        };
        let mut interval = match pause(look(state)) {
            Ok(result) => return self.leave(result),
            Err(interval) => interval,
        };
        loop {
            let armed_bells = present(state);
            // Bells that have not been rung since are armed yet.
            let as_before = |known: &Registration| known.is_for(&armed_bells) && known.renew(waker, interval);
            if self.registration.as_ref().is_some_and(as_before) {
                return Poll::Pending;
            }
            self.registration = None;
            let armed = arm_all(&armed_bells);
            interval = match pause(look(state)) {
                Ok(result) => return self.leave(result),
                Err(interval) => interval,
            };
            match Registration::new(armed_bells, armed, interval, waker) {
                // The look may have brought others to wait on.
                Ok(registration) if registration.is_for(&present(state)) => self.registration = Some(registration),
                Ok(_) => continue,
                Err(_) => waker.wake_by_ref(),
            }
            return Poll::Pending;
        }
    }

    fn leave<R>(&mut self, result: R) -> Poll<R> {
        self.registration = None;
        Poll::Ready(result)
    }
}

/// What was found; else in what time to look again at the latest.
fn pause<R>(seen: Look<R>) -> Result<R, Option<Duration>> {
    match seen {
        Look::Found(result) => Ok(result),
        Look::Within(interval) => Err(Some(interval)),
        Look::Nothing | Look::OtherBells => Err(None),
    }
}
