//! What takes too long to be done while everybody else waits: whoever holds much, and gives it back or dies, or asks for much, is
//! served in parts, so many a round of the loop as others may wait for (`estate/rounds.rs`), of each user in turn.
//!
//! Of a release each part is done and logged for itself (`Estate::release_in_part`), so there is nothing to be remembered: what
//! began it is looked at anew for the rest. If we die in between, who was not answered comes back without the handles, and who
//! is dead is found dead by our successor. How far what is to be given has come is noted with the connection.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;

use super::Server;
use crate::coordinator::protocol::{HandleRef, Request};

/// What is to be gone on with in the next round.
pub(super) enum Unfinished {
    /// A participant that is past, or has left.
    Gone(u64),
    /// A client's request, with the number under which it is to be done once, or 0. The client is not listened to meanwhile.
    Request { client: u64, request: Request, once: u64 },
}

/// All that is to be gone on with.
#[derive(Default)]
pub(super) struct Queue {
    /// By user, and in the order in which it came.
    waiting: BTreeMap<(u32, u64), Unfinished>,
    added: u64,
    /// Whose turn was the last.
    last_uid: u32,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn add(&mut self, uid: u32, unfinished: Unfinished) {
        self.waiting.insert((uid, self.added), unfinished);
        self.added += 1;
    }

    /// The first of the user whose turn it is.
    fn take_next(&mut self) -> Option<Unfinished> {
        let behind = (Bound::Excluded((self.last_uid, u64::MAX)), Bound::Unbounded);
        let next = self.waiting.range(behind).next().or(self.waiting.first_key_value());
        let key = next.map(|(key, _)| *key)?;
        self.last_uid = key.0;
        self.waiting.remove(&key)
    }
}

impl Server {
    /// Closes some of these handles, if they are more than may be closed at once. Whether they are.
    pub(super) fn close_some(&mut self, handles: Vec<HandleRef>) -> bool {
        // What cannot be done in part fails as a whole, and is answered there.
        self.estate.close_in_part(handles).unwrap_or(false)
    }

    /// Releases some of what a participant has, if it is more than may be released at once. Whether it is.
    pub(super) fn release_some(&mut self, incarnation: u64) -> bool {
        self.estate.release_in_part(incarnation).unwrap_or(false)
    }

    /// Takes a client's request up again in the next round.
    pub(super) fn put_off(&mut self, client: u64, request: Request, once: u64) {
        if let Some(connection) = self.clients.get_mut(&client) {
            connection.set_put_off(true);
            let uid = connection.peer.uid;
            self.unfinished.add(uid, Unfinished::Request { client, request, once });
        }
    }

    /// Does some of a client's request, if it takes longer than others may wait. Whether it does.
    pub(super) fn do_in_part(&mut self, id: u64, request: &Request, once: u64) -> bool {
        let Some(incarnation) = self.clients.get(&id).and_then(|client| client.incarnation) else { return false };
        match request {
            // With a number it is refused.
            Request::Close { handles } if once == 0 => {
                // A set: both lists may be long, and who sends one may be hostile.
                let named: BTreeSet<HandleRef> = handles.iter().copied().collect();
                let state = self.estate.state();
                if !named.iter().any(|handle| matches!(handle, HandleRef::Wildcard { .. })) {
                    let going = named.into_iter().filter(|handle| state.is_held(incarnation, *handle)).collect();
                    return self.close_some(going);
                }
                let held = state.handles_of(incarnation);
                let goes_with = |handle| state.wildcard_of(handle).map(|wildcard| HandleRef::Wildcard { wildcard });
                let goes = |handle: &HandleRef| {
                    named.contains(handle) || goes_with(*handle).is_some_and(|of| named.contains(&of))
                };
                let going = held.into_iter().filter(goes).collect();
                self.close_some(going)
            }
            Request::Goodbye if self.connected.get(&incarnation) == Some(&id) => self.release_some(incarnation),
            _ => false,
        }
    }

    /// Whether a participant is being released.
    pub(super) fn is_going(&self, incarnation: u64) -> bool {
        let is_his = |unfinished: &Unfinished| matches!(unfinished, Unfinished::Gone(who) if *who == incarnation);
        self.unfinished.waiting.values().any(is_his)
    }

    /// Goes on with what takes long, now that others have been served.
    pub(super) fn go_on(&mut self) -> io::Result<()> {
        self.estate.begin_round();
        // Each once at most: some only wait for another.
        for _ in 0..self.unfinished.waiting.len() {
            if self.estate.has_done_its_part() {
                break;
            }
            let Some(next) = self.unfinished.take_next() else { break };
            match next {
                Unfinished::Gone(incarnation) => self.go_on_releasing(incarnation)?,
                Unfinished::Request { client, request, once } => {
                    let Some(connection) = self.clients.get_mut(&client) else { continue };
                    connection.set_put_off(false);
                    self.serve_request(client, request, once)?;
                    self.update_interest(client)?;
                }
            }
            if self.ended {
                break;
            }
        }
        Ok(())
    }
}
