//! Connections: accepting them, hearing what they ask, sending, and closing them. None of them is waited for.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{ACCEPTS_PER_ROUND, KIND_CLIENT, Server, token};
use crate::coordinator::connection::{Broken, Connection, Push, Received};
use crate::coordinator::protocol::Answer;
use crate::error::Refusal;
use crate::os::memfd;
use crate::os::socket::{self, Peer};

/// When to try again to send what could not be sent for want of descriptors.
const SHORT_RETRY: Duration = Duration::from_millis(20);

/// Connections of users whom the bus does not let in, which wait to be told so.
const MAX_STRANGERS: usize = 16;

impl Server {
    pub(super) fn accept(&mut self) -> io::Result<()> {
        for _ in 0..ACCEPTS_PER_ROUND {
            match socket::accept(self.listener.as_fd()) {
                Ok(socket) => self.welcome_connection(socket)?,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE) => return self.turn_away(),
                    // Whatever is wrong with one connection is no reason to stop serving the others.
                    _ => return Ok(()),
                },
            }
        }
        Ok(())
    }

    /// Without a descriptor left, the connection would stay at the door and the loop would never sleep again.
    fn turn_away(&mut self) -> io::Result<()> {
        self.spare = None;
        if let Ok(socket) = socket::accept(self.listener.as_fd()) {
            decline(&socket, too_many_connections(self.clients.len()));
        }
        self.spare = spare();
        Ok(())
    }

    fn welcome_connection(&mut self, socket: OwnedFd) -> io::Result<()> {
        let Ok(peer) = socket::peer(socket.as_fd()) else { return Ok(()) };
        let Ok(user) = socket::user(socket.as_fd()) else { return Ok(()) };
        let stranger = !self.estate.lets_in(&user);
        let of_kind = |client: &&Connection| if stranger { client.stranger } else { client.peer.uid == user.uid };
        let alike = self.clients.values().filter(of_kind).count();
        // He is told so when he says Hello, if there are not too many of his kind.
        if stranger && alike >= MAX_STRANGERS {
            return Ok(());
        }
        // Each participant has at most one connection, and as many again may be about to say Hello.
        let limit = self.estate.limits().participants * 2;
        let of_user = self.estate.limits().user_participants * 2;
        if self.clients.len() >= limit || alike >= of_user {
            let limit = if alike >= of_user { of_user } else { limit };
            decline(&socket, too_many_connections(limit));
            return Ok(());
        }
        let id = self.next_client;
        self.next_client += 1;
        self.watch(&socket, token(KIND_CLIENT, id))?;
        let mut connection = Connection::new(socket, peer);
        connection.stranger = stranger;
        self.clients.insert(id, connection);
        Ok(())
    }

    pub(super) fn serve_client(&mut self, id: u64, flags: EpollFlags) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        if client.is_put_off() {
            // It may have hung up: what it said before is done first.
            return Ok(());
        }
        if client.flush(&|push| self.estate.resolve(push)).is_err() {
            self.expel(id);
            return Ok(());
        }
        let gone = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        if gone && client.waits {
            // What it said behind that, a good-bye say, is heard.
            self.stop_counting_for(id);
        }
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        if !client.is_congested() && !client.waits {
            match client.receive(&mut self.buffer) {
                Received::Request(request, once) => self.serve_request(id, request, once)?,
                Received::HungUp => return self.hang_up(id),
                Received::Garbled => self.expel(id),
                Received::Foreign(fds) => self.bar(id, fds),
                Received::Nothing => {}
            }
        } else if gone {
            return self.hang_up(id);
        }
        self.update_interest(id)
    }

    /// A client that does not read is not listened to, nor one whose request is under way.
    pub(super) fn update_interest(&mut self, id: u64) -> io::Result<()> {
        let Some(client) = self.clients.get(&id) else { return Ok(()) };
        let flags = match (client.is_short(), client.is_congested()) {
            _ if client.is_put_off() => EpollFlags::empty(),
            // It could be sent, if we had it: nobody tells us when we can.
            (true, _) => EpollFlags::empty(),
            (_, true) => EpollFlags::EPOLLOUT,
            _ if client.waits => EpollFlags::empty(),
            _ => EpollFlags::EPOLLIN,
        };
        if client.is_short() && self.retry_at.is_none() {
            self.retry_at = Some(Instant::now() + SHORT_RETRY);
        }
        Ok(self.epoll.modify(client, &mut EpollEvent::new(flags, token(KIND_CLIENT, id)))?)
    }

    /// The connection broke without a good-bye: the process is dead, about to be, or runs another program. If it can be
    /// proven right now, so much the better; a living one keeps its places, for it may still write (SPEC §4.2).
    fn hang_up(&mut self, id: u64) -> io::Result<()> {
        match self.disconnect(id) {
            Some(incarnation) if self.estate.is_past(incarnation) => self.release_participant(incarnation),
            _ => Ok(()),
        }
    }

    /// We close the connection. What the process holds stays in force: it may come back, and if not, it will die.
    pub(super) fn expel(&mut self, id: u64) {
        self.disconnect(id);
    }

    /// Somebody presented something else than memory. His user is not asked for descriptors again.
    fn bar(&mut self, id: u64, fds: Vec<OwnedFd>) {
        memfd::close_elsewhere(fds);
        let Some(uid) = self.clients.get(&id).map(|client| client.peer.uid) else { return };
        eprintln!("shmbus coordinator: a process of user {uid} presented something else than a segment");
        self.barred.insert(uid);
        self.clients.values_mut().filter(|client| client.peer.uid == uid).for_each(Connection::refuse_fds);
        self.expel(id);
    }

    /// Forgets a connection; whose it was, if that participant has no other one now.
    fn disconnect(&mut self, id: u64) -> Option<u64> {
        let incarnation = self.clients.remove(&id).and_then(|client| client.incarnation);
        let incarnation = incarnation.filter(|incarnation| self.connected.get(incarnation) == Some(&id))?;
        self.connected.remove(&incarnation);
        self.look_soon();
        Some(incarnation)
    }

    pub(super) fn send(&mut self, id: u64, answer: &Answer, fds: Vec<OwnedFd>) -> io::Result<()> {
        self.queue(id, |client| client.answer(answer, fds))
    }

    /// Tells a client something unasked.
    pub(super) fn push(&mut self, id: u64, push: Push) -> io::Result<()> {
        self.queue(id, |client| client.push(push))
    }

    pub(super) fn queue(&mut self, id: u64, add: impl FnOnce(&mut Connection) -> Result<(), Broken>) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        let sent = add(client).and_then(|()| client.flush(&|push| self.estate.resolve(push)));
        let (uid, waits) = (client.peer.uid, client.queued_fds() > 0);
        if sent.is_err() || waits && self.queued_fds_of(uid) > self.estate.limits().user_queued_fds {
            self.expel(id);
            return Ok(());
        }
        self.update_interest(id)
    }

    /// Descriptors that wait for a user's processes to read.
    fn queued_fds_of(&self, uid: u32) -> usize {
        self.clients.values().filter(|client| client.peer.uid == uid).map(Connection::queued_fds).sum()
    }

    /// Tries again to send what could not be sent for want of descriptors.
    pub(super) fn retry_the_short(&mut self) -> io::Result<()> {
        self.retry_at = None;
        let short: Vec<u64> = self.clients.iter().filter(|(_, client)| client.is_short()).map(|(id, _)| *id).collect();
        short.into_iter().try_for_each(|id| self.queue(id, |_| Ok(())))
    }
}

/// Tells a connection that it is not served; the client may be gone, or read it later.
pub(super) fn decline(socket: &OwnedFd, refusal: Refusal) {
    let mut connection = match socket.try_clone() {
        Ok(socket) => Connection::new(socket, Peer { pid: 0, uid: 0 }),
        Err(_) => return,
    };
    let _ = connection.send(&Answer::Refused(refusal), Vec::new());
}

fn too_many_connections(limit: usize) -> Refusal {
    let mend = "end some programs that use the bus".to_owned();
    Refusal::Limit { what: "connections".to_owned(), limit: limit as u64, mend }
}

pub(super) fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}
