//! Saying good-bye.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Control, End, Inner, lock, pause};
use crate::coordinator::protocol::Request;
use crate::os::socket;

/// How long the last handle's end waits for the coordinator's farewell.
const LEAVE_PATIENCE: Duration = Duration::from_millis(100);

impl Drop for Control {
    fn drop(&mut self) {
        if self.check_process().is_err() {
            return;
        }
        let mut inner = lock(&self.line.inner);
        inner.take_leave();
        inner.end = Some(End::Ended);
        if let Some(socket) = &inner.socket {
            socket::shut_down(socket.as_fd());
        }
    }
}

impl Inner {
    /// Makes sure that the coordinator, or its successor if it dies just now, learns that nothing is held any more: a
    /// mere hang-up would leave our places to us until this process ends.
    fn take_leave(&mut self) {
        let deadline = Instant::now() + LEAVE_PATIENCE;
        let mut said_on = None;
        self.holds.clear();
        loop {
            self.receive_all();
            // Farewell is an end, too. Where connecting fails otherwise, it may succeed in a moment.
            let _ = self.connect();
            if self.end.is_some() {
                return;
            }
            if said_on != Some(self.generation) && self.say_goodbye() {
                said_on = Some(self.generation);
            }
            if Instant::now() >= deadline {
                break;
            }
            let socket = self.socket.clone();
            pause(socket.as_deref(), deadline);
        }
        if said_on != Some(self.generation) {
            // The socket is full: its coordinator is stopped. A new one waits for it, and comes behind the full one.
            if let Some(full) = self.socket.take() {
                // Whoever watches over it sleeps until it ends.
                socket::shut_down(full.as_fd());
            }
            let _ = self.connect();
            self.say_goodbye();
        }
    }

    fn say_goodbye(&mut self) -> bool {
        self.send(&Request::Goodbye, 0, false).is_ok_and(|sent| sent)
    }
}
