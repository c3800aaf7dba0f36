//! Coming back by itself: a thread for each connection that sleeps until the coordinator dies. Handles need nothing from
//! a coordinator and would not notice; but one that has lost everything, keeper included, must hear from all who still hold
//! something, and somebody must start it. A good-bye that was not heard is said again from here (`client/control/leave.rs`).
//!
//! A forked child has no such thread, and needs none: its copies are refused, and the bus it opens itself brings one along.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::{Control, Line};
use crate::os::{process, socket};

/// Between two looks while there is no coordinator; doubled up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// The longest for who only wants to say good-bye: perhaps nobody will ever hear it.
const LONGEST_PAUSE_TO_LEAVE: Duration = Duration::from_millis(250);

/// What there is to wait for.
pub(crate) enum Look {
    /// Connected and welcomed: nothing but the end of this connection.
    Connected(Arc<OwnedFd>),
    /// The coordinator has not welcomed us: its answer.
    Asking(Arc<OwnedFd>),
    /// There is something to send for which there was no room.
    Sending,
    /// Nobody is there.
    Away { is_leaving: bool },
    /// The bus has ended.
    Ended,
}

/// Keeps the connection alive from now on, until it is dropped. Without a thread it comes back with the next request only.
pub(crate) fn start(control: &Control) {
    let line = Arc::downgrade(control.line());
    // The program's signals are not for this thread.
    let started =
        process::without_signals(|| thread::Builder::new().name("shmbus-watch".to_owned()).spawn(move || watch(&line)));
    drop(started);
}

fn watch(line: &Weak<Line>) {
    let mut pause = FIRST_PAUSE;
    loop {
        // Held for the look only: the last handle's end is to be the connection's.
        let Some(look) = line.upgrade().map(|line| line.look()) else { return };
        // Whatever a wait says, the next look finds out.
        let _ = match look {
            Look::Connected(socket) => {
                pause = FIRST_PAUSE;
                // Not for what can be read: that is for whoever asked, and wakes nobody here.
                socket::wait(socket.as_fd(), PollFlags::POLLHUP, None)
            }
            Look::Asking(socket) => {
                socket::wait(socket.as_fd(), PollFlags::POLLIN, Some(Instant::now() + LONGEST_PAUSE))
            }
            Look::Sending => Ok(sleep(FIRST_PAUSE)),
            Look::Away { is_leaving } => {
                pause = (pause * 2).min(if is_leaving { LONGEST_PAUSE_TO_LEAVE } else { LONGEST_PAUSE });
                Ok(sleep(pause))
            }
            Look::Ended => return,
        };
    }
}

fn sleep(pause: Duration) -> bool {
    thread::sleep(pause);
    true
}
