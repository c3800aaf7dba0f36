//! Where a task, or an event loop, waits: looks at a handle, and has itself called when it is worth another look.

use std::task::{Poll, Waker};
use std::time::Duration;

use crate::client::reactor::Registration;
use crate::ring::doorbell::{Doorbell, arm_all};
use crate::shm::shared::Shared;
use crate::wait::Look;

/// How often one poll arms bells, where each look brings others to wait on.
const TURNS: usize = 4;

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
        for _ in 0..TURNS {
            if interval == Some(Duration::ZERO) {
                break;
            }
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
            if interval == Some(Duration::ZERO) {
                break;
            }
            match Registration::new(armed_bells, armed, interval, waker) {
                // The look may have brought others to wait on.
                Ok(registration) if registration.is_for(&present(state)) => self.registration = Some(registration),
                Ok(_) => continue,
                Err(_) => waker.wake_by_ref(),
            }
            return Poll::Pending;
        }
        // Others of this task's thread have their turn first, and its deadline.
        waker.wake_by_ref();
        Poll::Pending
    }

    fn leave<R>(&mut self, result: R) -> Poll<R> {
        self.registration = None;
        Poll::Ready(result)
    }
}

/// What was found; else in what time to look again at the latest. Zero: at once, but after others have had their turn.
fn pause<R>(seen: Look<R>) -> Result<R, Option<Duration>> {
    match seen {
        Look::Found(result) => Ok(result),
        Look::Within(interval) => Err(Some(interval)),
        Look::Nothing | Look::OtherBells => Err(None),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_poll_ends_though_each_look_brings_other_bells() {
        let (mut seat, mut bell) = (Seat::default(), Arc::new(Doorbell::new()));
        let bells = |bell: &Arc<Doorbell>, into: &mut Vec<Shared<Doorbell>>| into.push(Shared::of(bell.clone()));
        let look = |bell: &mut Arc<Doorbell>| {
            *bell = Arc::new(Doorbell::new());
            Look::<()>::OtherBells
        };
        assert!(seat.poll(Waker::noop(), &mut bell, bells, look).is_pending());
    }
}
