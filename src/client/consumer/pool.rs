//! A consumer whose messages are settled by several threads, in any order.
//!
//! One thread receives ([`Deliveries`]), any thread settles what it has in hand ([`OwnedDelivery`]). They share the consumer behind
//! a lock that is held for a look or a settling, never in sleep. What the receiving thread sleeps for, settling may bring
//! about, and what it does before it sleeps, settling may give new reason for; so who settles also does for a sleeper
//! what that one would have done ([`Pool::settle`]).

use std::iter::FusedIterator;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
#[cfg(feature = "async")]
use std::task::{Poll, Waker, ready};
use std::time::Duration;

use super::Consumer;
use super::core::Core;
use super::delivery::{Delivery, Lease};
use super::waiting::{Waiting, wait};
use crate::client::envelope::EnvelopeView;
use crate::client::message::OwnedMessage;
use crate::client::received::{Received, received_message};
#[cfg(feature = "async")]
use crate::client::seat::Seat;
use crate::error::{AckError, RecvError};
use crate::os::home::Home;
use crate::ring::cursor::CursorsHeader;
use crate::ring::doorbell::Doorbell;
use crate::ring::ledger::Seen;
use crate::shm::shared::Shared;
use crate::topic::Payload;
#[cfg(feature = "async")]
use crate::wait::Look;

/// Waits for message after message of a [`Consumer`]: each an [`OwnedDelivery`], which any thread may settle.
///
/// ```no_run
/// # use std::thread;
/// # use shmbus::{Bus, Topic};
/// # let bus = Bus::open_default()?;
/// let jobs = bus.consumer(Topic::<[u8]>::new("jobs"), "workers").max_in_flight(8).open()?;
/// for job in jobs {
///     let job = job?;
///     // At most eight of them at a time: the next one comes when one of them is settled.
///     thread::spawn(move || {
///         println!("{} bytes, attempt {}", job.len(), job.attempt());
///         job.ack()
///     });
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Set [`max_in_flight`](crate::ConsumerBuilder::max_in_flight): without it, it takes as much as there is. It waits as the consumer
/// does. Every error is the last item ([`RecvError::Gone`], `Fenced`, `Corrupt`, `Forked`). The consumer stays as long as
/// deliveries of it are in hand; what is left of them when the process ends goes to others, like all that a consumer held.
#[must_use = "iterators do nothing unless they are asked"]
pub struct Deliveries<T: ?Sized> {
    pool: Arc<Pool>,
    has_ended: bool,
    payload: PhantomData<fn() -> Box<T>>,
}

/// A leased message that borrows nothing and may be settled by any thread; dereferences to its payload.
///
/// End it with [`ack`](Self::ack), [`nack`](Self::nack) or [`reject`](Self::reject). Dropped without any of these it is given
/// back like with `nack`. See [`Deliveries`] for where it comes from.
#[must_use = "dropping a delivery gives the message back"]
pub struct OwnedDelivery<T: ?Sized> {
    message: OwnedMessage<T>,
    lease: Lease,
    is_settled: bool,
    pool: Arc<Pool>,
}

/// What they share.
struct Pool {
    core: Mutex<Core>,
    bells: Shared<CursorsHeader>,
    home: Home,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Core> {
        // Whatever panicked meanwhile: what others rely on lies in the ledger, one swap each.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something about a lease.
    fn settle<R>(&self, act: impl FnOnce(&mut Core) -> Result<R, AckError>) -> Result<R, AckError> {
        // In a forked child some thread of the parent may have the lock for ever.
        if !self.home.is_here() {
            return Err(AckError::Forked { opened_by: self.home.pid(), pid: std::process::id() });
        }
        let mut core = self.lock();
        let outcome = act(&mut core);
        // A sleeper has set the bell's bit before it took the lock for its last look. So either we see the bit, or that look,
        // which does all this too, comes after us.
        if self.bell().is_waited_on() {
            core.raise_floor();
            // What waits to be moved is tried again by whoever receives, and its own limit nobody else rings for.
            if core.has_own_limit() || core.has_moves() {
                core.ring_readers();
            }
        }
        outcome
    }
}

impl Waiting for &Pool {
    fn with<R>(&mut self, act: impl FnOnce(&mut Core) -> R) -> R {
        act(&mut self.lock())
    }

    fn bell(&self) -> &Doorbell {
        Pool::bell(self)
    }
}

impl Pool {
    fn bell(&self) -> &Doorbell {
        &self.bells.readers
    }
}

impl<T: Payload + ?Sized> IntoIterator for Consumer<T> {
    type Item = Result<OwnedDelivery<T>, RecvError>;
    type IntoIter = Deliveries<T>;

    fn into_iter(self) -> Deliveries<T> {
        let (bells, home) = (self.core.readers.clone(), self.core.home);
        let pool = Arc::new(Pool { core: Mutex::new(self.core), bells, home });
        Deliveries { pool, has_ended: false, payload: PhantomData }
    }
}

impl<T: Payload + ?Sized> Deliveries<T> {
    /// Receives the next message, waiting for at most `limit`: for who has something else to look after.
    ///
    /// # Errors
    /// [`RecvError::TimedOut`] when nothing came; otherwise what ends the iteration.
    pub fn recv_timeout(&mut self, limit: Duration) -> Result<OwnedDelivery<T>, RecvError> {
        self.recv(Some(limit))
    }

    fn recv(&mut self, limit: Option<Duration>) -> Result<OwnedDelivery<T>, RecvError> {
        let mut pool = &*self.pool;
        if !pool.home.is_here() {
            return Err(RecvError::Forked { opened_by: pool.home.pid(), pid: std::process::id() });
        }
        let (message, lease) = wait(&mut pool, limit, take)?;
        Ok(OwnedDelivery { message, lease, is_settled: false, pool: self.pool.clone() })
    }
}

/// Takes the next message, if there is one.
fn take<T: Payload + ?Sized>(core: &mut Core) -> Result<Option<(OwnedMessage<T>, Lease)>, RecvError> {
    Ok(core.look(1)?.then(|| {
        let delivery = Delivery::<T>::new(core);
        (OwnedMessage::copy_of(&delivery, delivery.as_bytes()), delivery.keep())
    }))
}

#[cfg(feature = "async")]
impl<T: Payload + ?Sized> Deliveries<T> {
    /// The next item, or `waker` will be called when it is worth another poll.
    pub(super) fn poll_next(
        &mut self,
        seat: &mut Seat,
        waker: &Waker,
    ) -> Poll<Option<Result<OwnedDelivery<T>, RecvError>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        let pool = &*self.pool;
        let taken = if pool.home.is_here() {
            let bells =
                |pool: &Pool, bells: &mut Vec<Shared<Doorbell>>| bells.push(pool.bells.part(|all| &all.readers));
            let look = |pool: &mut &Pool| {
                let mut core = pool.lock();
                match take(&mut core) {
                    Ok(Some(taken)) => Look::Found(Ok(taken)),
                    Ok(None) => core.nap().map_or(Look::Nothing, Look::Within),
                    Err(error) => Look::Found(Err(error)),
                }
            };
            ready!(seat.poll(waker, &mut &*pool, |pool, into| bells(pool, into), look))
        } else {
            Err(RecvError::Forked { opened_by: pool.home.pid(), pid: std::process::id() })
        };
        self.has_ended = taken.as_ref().is_err_and(RecvError::is_final);
        let deliver = |(message, lease)| OwnedDelivery { message, lease, is_settled: false, pool: self.pool.clone() };
        Poll::Ready(Some(taken.map(deliver)))
    }

    /// Whether there is nothing to come.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }
}

impl<T: Payload + ?Sized> Iterator for Deliveries<T> {
    type Item = Result<OwnedDelivery<T>, RecvError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        Some(self.recv(None).inspect_err(|error| self.has_ended = error.is_final()))
    }
}

impl<T: Payload + ?Sized> FusedIterator for Deliveries<T> {}

impl<T: ?Sized> OwnedDelivery<T> {
    /// Which delivery of the message to this group this is, from 1. Above 4,095 it counts no further.
    pub fn attempt(&self) -> u32 {
        self.lease.attempt()
    }

    /// The payload as bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        self.message.as_bytes()
    }

    /// Acknowledges the message: it is never delivered to this group again.
    ///
    /// # Errors
    /// [`AckError::LeaseLost`]: the lease had ended and the message was given to another; nothing has changed then.
    pub fn ack(self) -> Result<(), AckError> {
        self.settle(Core::ack)
    }

    /// Gives the message back; it rests for the group's back-off.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn nack(self) -> Result<(), AckError> {
        self.settle(|core, lease| core.nack(lease, None))
    }

    /// Gives the message back; it rests for `delay`, at most 24 h.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn nack_after(self, delay: Duration) -> Result<(), AckError> {
        self.settle(|core, lease| core.nack(lease, Some(delay)))
    }

    /// Sends the message to the dead-letter topic; it is never delivered to this group again.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn reject(self, reason: &str) -> Result<(), AckError> {
        self.settle(|core, lease| core.reject(lease, reason))
    }

    /// Lets the lease end `time` from now, and not before.
    ///
    /// # Errors
    /// [`AckError`]; nothing has changed then.
    pub fn extend(&mut self, time: Duration) -> Result<(), AckError> {
        let seen = self.lease.seen();
        self.lease.replace(self.pool.settle(|core| core.extend(seen, time))?);
        Ok(())
    }

    fn settle(mut self, act: impl FnOnce(&mut Core, Seen) -> Result<(), AckError>) -> Result<(), AckError> {
        self.is_settled = true;
        self.pool.settle(|core| act(core, self.lease.seen()))
    }
}

impl<T: ?Sized> Drop for OwnedDelivery<T> {
    fn drop(&mut self) {
        if !self.is_settled && self.lease.is_unsettled() {
            // Where it cannot be given back, it is not ours any more.
            let _ = self.pool.settle(|core| core.nack(self.lease.seen(), None));
        }
    }
}

impl<T: ?Sized> Received for OwnedDelivery<T> {
    #[inline]
    fn place(&self) -> u64 {
        self.message.place()
    }

    fn author(&self) -> Option<(u64, u64)> {
        self.message.author()
    }

    fn envelope(&self) -> Option<EnvelopeView<'_>> {
        self.message.envelope()
    }
}

received_message!(OwnedDelivery<T>, attempt);
