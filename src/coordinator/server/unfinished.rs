//! What takes too long to be done while everybody else waits: whoever holds consumers on many ledgers, and gives them back or dies,
//! is served in parts, one a round of the loop.
//!
//! Each part is done and logged for itself (`Estate::close_in_part`), so there is nothing to be remembered: what began it is looked
//! at anew for the rest. If we die in between, who was not answered comes back without the handles, and who is dead is
//! found dead by our successor.

use std::collections::BTreeSet;
use std::io;

use super::Server;
use crate::coordinator::protocol::{HandleRef, Request};

/// What is to be gone on with in the next round.
pub(super) enum Unfinished {
    /// A participant that is past, or has left.
    Gone(u64),
    /// A client's request. The client is not listened to meanwhile.
    Request { client: u64, request: Request },
}

impl Server {
    /// Whether these handles are more than may be closed at once: then some of them have been.
    pub(super) fn is_put_off(&mut self, handles: Vec<HandleRef>) -> bool {
        // What cannot be done in part fails as a whole, and is answered there.
        self.estate.close_in_part(handles).unwrap_or(false)
    }

    /// Takes a client's request up again in the next round.
    pub(super) fn put_off(&mut self, client: u64, request: Request) {
        if let Some(connection) = self.clients.get_mut(&client) {
            connection.set_put_off(true);
            self.unfinished.push_back(Unfinished::Request { client, request });
        }
    }

    /// Whether a client's request is done in part only, for now.
    pub(super) fn is_done_in_part(&mut self, id: u64, request: &Request) -> bool {
        let Some(incarnation) = self.clients.get(&id).and_then(|client| client.incarnation) else { return false };
        let held = self.estate.state().handles_of(incarnation);
        match request {
            Request::Close { handles } => {
                // A set: both lists may be long, and who sends one may be hostile.
                let named: BTreeSet<HandleRef> = handles.iter().copied().collect();
                self.is_put_off(held.into_iter().filter(|handle| named.contains(handle)).collect())
            }
            Request::Goodbye if self.connected.get(&incarnation) == Some(&id) => self.is_put_off(held),
            _ => false,
        }
    }

    /// Whether a participant is being released.
    pub(super) fn is_going(&self, incarnation: u64) -> bool {
        self.unfinished.iter().any(|unfinished| matches!(unfinished, Unfinished::Gone(who) if *who == incarnation))
    }

    /// One step on with what takes long.
    pub(super) fn go_on(&mut self) -> io::Result<()> {
        match self.unfinished.pop_front() {
            Some(Unfinished::Gone(incarnation)) => self.go_on_releasing(incarnation),
            Some(Unfinished::Request { client, request }) => {
                let Some(connection) = self.clients.get_mut(&client) else { return Ok(()) };
                connection.set_put_off(false);
                self.serve_request(client, request, 0)?;
                self.update_interest(client)
            }
            None => Ok(()),
        }
    }
}
