//! Connecting, and coming back after the coordinator has died.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::unistd::Uid;

use super::receive::opened_handle;
use super::watch::Look;
use super::{End, Inner, Line};
use crate::coordinator::directory::Place;
use crate::coordinator::protocol::{PROTOCOL_VERSION, Request};
use crate::coordinator::registry;
use crate::error::ConnectError;
use crate::os::socket;

impl Line {
    /// Comes back where the connection is broken; what there is to wait for then.
    pub(crate) fn look(&self) -> Look {
        let mut inner = self.hold();
        inner.receive_all();
        // Where connecting fails for another reason than the end of the bus, it may succeed in a moment.
        let _ = inner.connect();
        inner.present();
        inner.send_closes();
        if inner.end.is_some() {
            // Whoever looks holds it as well.
            drop(inner.lingering.take());
            return Look::Ended;
        }
        inner.say_goodbye();
        match inner.socket.clone() {
            Some(_) if inner.has_to_send() => Look::Sending,
            Some(socket) if !inner.welcomed => Look::Asking(socket),
            Some(socket) => {
                drop(inner);
                if let Some(mut starter) = self.starter.as_ref().and_then(|starter| starter.try_lock().ok()) {
                    starter.finish();
                }
                Look::Connected(socket)
            }
            // Who leaves needs none itself.
            None if inner.absent && !inner.is_leaving => {
                drop(inner);
                // If it cannot be started now, perhaps somebody else does, or the next look.
                let _ = self.revive();
                Look::Away { is_leaving: false }
            }
            None => Look::Away { is_leaving: inner.is_leaving },
        }
    }

    /// Starts a coordinator in the place of the dead one and its keeper, if we may. Never waits.
    pub(super) fn revive(&self) -> Result<(), ConnectError> {
        // Who has it is at it.
        let starter = self.starter.as_ref().and_then(|starter| starter.try_lock().ok());
        starter.map_or(Ok(()), |mut starter| starter.start())
    }
}

impl Inner {
    /// Comes back if the connection is broken; does not wait for the welcome.
    pub(super) fn connect(&mut self) -> Result<(), ConnectError> {
        if let Some(end) = &self.end {
            return Err(end.error(&self.place));
        }
        if self.socket.is_some() {
            return Ok(());
        }
        if self.again_at.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        self.again_at = None;
        // Before we knock: what listens after the end is another bus, or a service manager that would start one.
        if !self.is_left_behind() {
            self.end = Some(End::Ended);
            return Err(End::Ended.error(&self.place));
        }
        let socket = match socket::connect(self.place.socket()) {
            Ok(socket) => socket,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Coordinator and keeper are both dead, and nobody has come in their place yet.
            Err(error) if socket::is_absent(&error) => {
                self.absent = true;
                return Ok(());
            }
            Err(source) => return Err(ConnectError::io("cannot connect to the coordinator again", source)),
        };
        self.absent = false;
        check_peer(&self.place, &socket)?;
        // If it hangs up at once, the next attempt finds out.
        let _ = self.say_hello(socket);
        Ok(())
    }

    /// Whether our bus has a registry: one that ends takes it along.
    fn is_left_behind(&self) -> bool {
        match registry::bus_at(self.place.registry()) {
            Ok(left) => left.is_some() && left == self.identity.map(|identity| identity.bus),
            // Of what cannot be looked at, want of a descriptor say, nobody knows that it has ended.
            Err(_) => true,
        }
    }

    /// Sends what the coordinator asked us to present, as far as there is room.
    pub(super) fn present(&mut self) {
        while let (Some(socket), Some((request, fds))) = (self.socket.clone(), self.holdings.next()) {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            let bytes = postcard::to_stdvec(request).map_err(io::Error::other);
            match bytes.and_then(|bytes| socket::send(socket.as_fd(), &bytes, &fds)) {
                Ok(()) => self.holdings.sent(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // As many descriptors are on their way as a user may have there.
                Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => return,
                // Its hang-up is read next.
                Err(_) => self.holdings.forget_plan(),
            }
        }
    }

    /// Whether there is something to send for which there was no room.
    fn has_to_send(&self) -> bool {
        self.holdings.next().is_some() || !self.unsent.is_empty() || self.has_to_say_goodbye()
    }

    /// Gives a connection up for a new one, which says what we hold. Whoever watches over it sleeps until it ends.
    pub(super) fn hang_up(&mut self) {
        if let Some(socket) = self.socket.take() {
            socket::shut_down(socket.as_fd());
        }
    }

    /// Starts a connection: everything that the former one still owed us is void.
    pub(super) fn say_hello(&mut self, socket: OwnedFd) -> io::Result<()> {
        for (answer, _) in std::mem::take(&mut self.answers) {
            // It was granted, but nobody has taken it: not naming it gives it back.
            if let Some(handle) = opened_handle(&answer) {
                self.let_go(handle);
            }
        }
        for handle in self.pushed.drop_ungranted(&self.holds) {
            self.let_go(handle);
        }
        self.welcomed = false;
        self.expected.clear();
        self.holdings.forget_plan();
        self.unsent.clear();
        self.missed_arenas.clear();
        self.generation += 1;
        let hello = Request::Hello {
            protocol: PROTOCOL_VERSION,
            token: self.token,
            incarnation: self.identity.map(|identity| identity.incarnation),
            holds: self.holds.iter().copied().collect(),
        };
        let bytes = postcard::to_stdvec(&hello).map_err(io::Error::other)?;
        socket::send(socket.as_fd(), &bytes, &[])?;
        self.socket = Some(Arc::new(socket));
        Ok(())
    }
}

/// Refuses a socket that somebody else put there.
pub(super) fn check_peer(place: &Place, socket: &OwnedFd) -> Result<(), ConnectError> {
    let peer =
        socket::peer(socket.as_fd()).map_err(|source| ConnectError::io("cannot see who serves the bus", source))?;
    let us = Uid::effective().as_raw();
    if place.trusts(peer.uid) {
        return Ok(());
    }
    let problem = format!("is served by user {}, expected {us}, root or whose directory it is", peer.uid);
    let mend = "set SHMBUS_DIR to a directory of your own";
    Err(ConnectError::Refused { path: place.socket().to_owned(), problem, mend })
}
