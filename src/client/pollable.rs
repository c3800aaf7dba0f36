//! [`Pollable`]: waiting in somebody else's event loop.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::task::{Poll, Wake, Waker};

use crate::client::seat::Seat;
use crate::client::select::{Waitable, all_bells, glance_at_all};
use crate::os::event::Event;
use crate::os::home::Home;

/// A descriptor for `epoll`, `poll` and whatever is built on them (libuv, GLib, `mio`, ..): readable when one of the handles
/// that it is armed for may have something to receive.
///
/// Armed, it stays as it is until the next arming: it becomes readable, and is readable then (level-triggered). So arm it before
/// each wait, and receive what there is whenever it says that there is something:
///
/// ```no_run
/// # use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
/// # use shmbus::{Bus, Pollable, Topic};
/// # use std::os::fd::AsFd;
/// # let bus = Bus::open_default()?;
/// let mut orders = bus.subscriber(Topic::<[u8]>::new("orders")).open()?;
/// let mut prices = bus.subscriber(Topic::<u64>::new("prices")).open()?;
/// let mut pollable = Pollable::new()?;
/// loop {
///     while !pollable.arm(&mut [&mut orders, &mut prices])? {
///         if let Some(order) = orders.try_recv()? {
///             println!("{} bytes", order.len());
///         }
///         if let Some(price) = prices.try_recv()? {
///             println!("{}", *price);
///         }
///     }
///     // Among the program's other descriptors. Only look at it: what is read from it is of no use.
///     poll(&mut [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Publishers pay nothing for it: a thread of this process sleeps where the handle would. It becomes readable once a second
/// without need, to look after publishers that died before they could wake anybody; and every 5 ms for droppable subscribers
/// to topics of other users, whom nobody wakes.
pub struct Pollable {
    event: Arc<Readable>,
    waker: Waker,
    seat: Seat,
    home: Home,
}

/// A call makes the descriptor readable.
struct Readable(Event);

impl Wake for Readable {
    fn wake(self: Arc<Self>) {
        self.0.set();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.set();
    }
}

impl Pollable {
    /// A descriptor that is armed for nothing.
    ///
    /// # Errors
    /// The process has as many descriptors as it may have.
    pub fn new() -> io::Result<Pollable> {
        let event = Arc::new(Readable(Event::new()?));
        Ok(Pollable { waker: event.clone().into(), event, seat: Seat::default(), home: Home::here()? })
    }

    /// Arms it for `handles`, and for those only. `true`: they have nothing to receive as far as one look goes, and the descriptor
    /// becomes readable when that may have changed, or there is more to look at. `false`: one of them may have something already; receive from all of them
    /// with `try_recv`, and arm again before the next wait. Never waits.
    ///
    /// # Errors
    /// It was made by this process's parent, before it forked.
    pub fn arm(&mut self, handles: &mut [&mut dyn Waitable]) -> io::Result<bool> {
        if !self.home.is_here() {
            let (maker, pid) = (self.home.pid(), std::process::id());
            return Err(io::Error::other(format!(
                "this Pollable was made by process {maker}, before a fork; make another in the child (process {pid})"
            )));
        }
        // Before the look: whoever is called after it sets it again.
        self.event.0.clear();
        Ok(self.seat.poll(&self.waker, handles, all_bells, glance_at_all) == Poll::Pending)
    }

    /// Arms it for nothing, so that it keeps nothing of the handles that it was armed for. It may become readable once more.
    pub fn disarm(&mut self) {
        self.seat = Seat::default();
        self.event.0.clear();
    }
}

impl AsFd for Pollable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.0.as_fd()
    }
}

impl AsRawFd for Pollable {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
