//! Waiting for messages: asleep no longer than to the earliest moment at which something comes due.

use std::time::{Duration, Instant};

use super::core::Core;
use crate::error::RecvError;
use crate::ring::doorbell::Doorbell;
use crate::wait;

/// Whoever waits: a consumer by itself, or the threads that share one (`pool.rs`).
pub(super) trait Waiting {
    /// Does something with the consumer, which is nobody else's meanwhile.
    fn with<R>(&mut self, act: impl FnOnce(&mut Core) -> R) -> R;

    /// Rings when there may be something to take.
    fn bell(&self) -> &Doorbell;
}

impl Waiting for Core {
    #[inline]
    fn with<R>(&mut self, act: impl FnOnce(&mut Core) -> R) -> R {
        act(self)
    }

    fn bell(&self) -> &Doorbell {
        &self.readers.readers
    }
}

enum Outcome<R> {
    Taken(R),
    /// There is a moment to wake at that was not known when we began to wait, or more to look at now.
    Sooner,
    Failed(RecvError),
}

/// Waits until `take` takes something, for at most `limit`.
pub(super) fn wait<W: Waiting, R>(
    waiting: &mut W,
    limit: Option<Duration>,
    mut take: impl FnMut(&mut Core) -> Result<Option<R>, RecvError>,
) -> Result<R, RecvError> {
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let (how, nap, planned) =
            waiting.with(|core| (core.wait, core.scan.nap(), core.scan.next_due().unwrap_or(u64::MAX)));
        let until = match (deadline, nap.and_then(|nap| Instant::now().checked_add(nap))) {
            (Some(deadline), Some(nap)) => Some(deadline.min(nap)),
            (deadline, nap) => deadline.or(nap),
        };
        let mut look = |core: &mut Core| match take(core) {
            Ok(Some(taken)) => Some(Outcome::Taken(taken)),
            Ok(None) => {
                let sooner = core.left_off || core.scan.next_due().is_some_and(|next| next < planned);
                sooner.then_some(Outcome::Sooner)
            }
            Err(error) => Some(Outcome::Failed(error)),
        };
        match wait::until(waiting, how, until, |waiting| waiting.bell(), |waiting| waiting.with(&mut look)) {
            Some(Outcome::Taken(taken)) => return Ok(taken),
            Some(Outcome::Failed(error)) => return Err(error),
            Some(Outcome::Sooner) | None => {
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Err(RecvError::TimedOut);
                }
            }
        }
    }
}
