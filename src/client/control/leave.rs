//! Saying good-bye, until it is heard: a mere hang-up would leave our places to us until this process ends.
//!
//! Whoever drops the last handle waits for the farewell, but not for long: the coordinator may be stopped, and the good-bye is lost
//! if it dies so. From then on the thread that watches over the connection has the line to itself, and says good-bye to each
//! successor until one has heard it.

use std::os::fd::AsFd;
use std::sync::Arc;
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
        let is_watched = Arc::weak_count(&self.line) > 0;
        if !inner.take_leave() && is_watched {
            inner.lingering = Some(self.line.clone());
            return;
        }
        inner.end = Some(End::Ended);
        if let Some(socket) = &inner.socket {
            socket::shut_down(socket.as_fd());
        }
    }
}

impl Inner {
    /// Tells the coordinator, or its successor if it dies just now, that nothing is held any more. Whether it was heard, or need
    /// not be.
    fn take_leave(&mut self) -> bool {
        let deadline = Instant::now() + LEAVE_PATIENCE;
        self.is_leaving = true;
        self.holds.clear();
        loop {
            self.receive_all();
            // Farewell is an end, too. Where connecting fails otherwise, it may succeed in a moment.
            let _ = self.connect();
            if self.end.is_some() {
                return true;
            }
            self.say_goodbye();
            if Instant::now() >= deadline {
                break;
            }
            let socket = self.socket.clone();
            pause(socket.as_deref(), deadline);
        }
        // Its coordinator is stopped, and there may be no room in it; or more is to be read before the good-bye is heard, and nobody
        // would. A new one waits for it, and comes behind this one.
        self.hang_up();
        let _ = self.connect();
        self.say_goodbye();
        false
    }

    /// Says good-bye on this connection, whether it is heard or not.
    pub(super) fn leave_at_once(&mut self) {
        self.is_leaving = true;
        self.say_goodbye();
    }

    /// Whether we leave, and have not said so on this connection.
    pub(super) fn has_to_say_goodbye(&self) -> bool {
        self.is_leaving && self.goodbye_on != Some(self.generation)
    }

    /// Says good-bye, if we leave; once on each connection.
    pub(super) fn say_goodbye(&mut self) {
        if self.has_to_say_goodbye() && self.send(&Request::Goodbye, 0, false).is_ok_and(|sent| sent) {
            self.goodbye_on = Some(self.generation);
        }
    }
}
