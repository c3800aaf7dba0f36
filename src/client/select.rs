//! One thread waiting on several handles.

use std::time::{Duration, Instant};

use crate::ring::doorbell::Doorbell;
use crate::shm::shared::Shared;
use crate::wait::{self, Look, Wait};

/// A handle that a thread can wait on together with others; see [`wait_any`].
pub trait Waitable: Parts {}

/// What waiting takes. Not to be implemented outside this crate: it cannot name it.
pub trait Parts {
    /// Whether a receive would return at once: with a message, a loss or the topic's end. It may say so in vain, but never
    /// fails to say so. Gives back what the last receive handed out.
    fn glance(&mut self) -> Look<()>;

    /// The bells that ring when that may have changed.
    fn bells(&self, into: &mut Vec<Shared<Doorbell>>);

    /// Changes whenever the bells are others than before.
    fn generation(&self) -> u64;
}

/// Waits until one of `handles` has something to receive, for at most `limit` (`None`: for ever): spins for about 50 µs,
/// then sleeps in the kernel. Returns the index of the first that is ready; `None` when the time is over or there are no
/// handles.
///
/// Receive from it with `try_recv`, which may still find nothing. Who always serves the first one that is ready starves
/// the others; serve all of them after each wait:
///
/// ```no_run
/// # use shmbus::{Bus, Topic, wait_any};
/// # let bus = Bus::open_default()?;
/// let mut orders = bus.subscriber(Topic::<[u8]>::new("orders")).open()?;
/// let mut prices = bus.subscriber(Topic::<u64>::new("prices")).open()?;
/// while wait_any(&mut [&mut orders, &mut prices], None).is_some() {
///     if let Some(order) = orders.try_recv()? {
///         println!("{} bytes", order.len());
///     }
///     if let Some(price) = prices.try_recv()? {
///         println!("{}", *price);
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Up to 128 topics it sleeps until it is woken; beyond that, and on kernels before 5.16, it looks every 2 ms.
pub fn wait_any(handles: &mut [&mut dyn Waitable], limit: Option<Duration>) -> Option<usize> {
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    if handles.is_empty() {
        return None;
    }
    let generations = |handles: &[&mut dyn Waitable]| handles.iter().map(|handle| handle.generation()).sum::<u64>();
    let mut generation = generations(handles);
    wait::until_any(handles, Wait::Adaptive, deadline, all_bells, |handles| {
        let seen = glance_at_all(handles);
        let now = generations(handles);
        let others = std::mem::replace(&mut generation, now) != now;
        match seen {
            Look::Found(index) => Look::Found(index),
            _ if others => Look::OtherBells,
            nothing => nothing,
        }
    })
}

/// The bells of all `handles`.
pub(super) fn all_bells(handles: &[&mut dyn Waitable], into: &mut Vec<Shared<Doorbell>>) {
    handles.iter().for_each(|handle| handle.bells(into));
}

/// The first that is ready.
pub(super) fn glance_at_all(handles: &mut [&mut dyn Waitable]) -> Look<usize> {
    let mut soonest: Option<Duration> = None;
    for (index, handle) in handles.iter_mut().enumerate() {
        match handle.glance() {
            Look::Found(()) => return Look::Found(index),
            Look::Within(again) => soonest = Some(soonest.map_or(again, |soonest| soonest.min(again))),
            Look::Nothing | Look::OtherBells => {}
        }
    }
    soonest.map_or(Look::Nothing, Look::Within)
}
