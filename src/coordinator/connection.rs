//! One client's connection as the coordinator sees it: it never waits for the client, and what waits is bounded.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::coordinator::limits::MAX_QUEUED_PACKETS;
use crate::coordinator::protocol::{Answer, MAX_PACKET_FDS, Request};
use crate::os::socket::{self, Peer};

/// What came from a client.
pub(crate) enum Received {
    Request(Request),
    Nothing,
    /// The client closed its end, or the process ended.
    HungUp,
    /// Not a request.
    Garbled,
}

/// The connection cannot go on: the client does not read, or the kernel refuses to carry its descriptors.
#[derive(Debug)]
pub(crate) struct Broken;

/// A client's connection.
pub(crate) struct Connection {
    socket: OwnedFd,
    pub(crate) peer: Peer,
    /// Who it is, once it has said Hello.
    pub(crate) incarnation: Option<u64>,
    /// Somebody whom the bus does not let in.
    pub(crate) stranger: bool,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// Descriptors accepted with one request.
    max_fds: usize,
    /// Those of the last one.
    fds: Vec<OwnedFd>,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd, peer: Peer) -> Connection {
        Connection {
            socket,
            peer,
            incarnation: None,
            stranger: false,
            queue: VecDeque::new(),
            max_fds: 0,
            fds: Vec::new(),
        }
    }

    /// Whether answers wait for the client to read. Until it does, its requests wait.
    pub(crate) fn is_congested(&self) -> bool {
        !self.queue.is_empty()
    }

    /// From now on descriptors may ride along: this client was asked to present some.
    pub(crate) fn accept_fds(&mut self) {
        self.max_fds = MAX_PACKET_FDS;
    }

    /// Those that rode along with the last request.
    pub(crate) fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    /// The next request, without waiting. Descriptors are accepted only from who was asked for them.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Received {
        self.fds.clear();
        match socket::recv(self.socket.as_fd(), buffer, self.max_fds) {
            Ok(packet) if packet.len == 0 => Received::HungUp,
            Ok(packet) if packet.truncated => Received::Garbled,
            Ok(packet) => {
                self.fds = packet.fds;
                postcard::from_bytes(&buffer[..packet.len]).map_or(Received::Garbled, Received::Request)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Nothing,
            Err(_) => Received::HungUp,
        }
    }

    /// Sends an answer, or queues it behind those that wait.
    pub(crate) fn send(&mut self, answer: &Answer, fds: Vec<OwnedFd>) -> Result<(), Broken> {
        if self.queue.len() >= MAX_QUEUED_PACKETS {
            return Err(Broken);
        }
        self.send_unbounded(answer, fds)
    }

    /// The same for what is bounded already by what the client holds.
    pub(crate) fn send_unbounded(&mut self, answer: &Answer, fds: Vec<OwnedFd>) -> Result<(), Broken> {
        let bytes = postcard::to_stdvec(answer).map_err(|_| Broken)?;
        self.queue.push_back((bytes, fds));
        self.flush()
    }

    /// Sends what waits, as far as the client reads.
    pub(crate) fn flush(&mut self) -> Result<(), Broken> {
        while let Some((bytes, fds)) = self.queue.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match socket::send(self.socket.as_fd(), bytes, &fds) {
                Ok(()) => drop(self.queue.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // Gone: what it said last, and its hang-up, are received like any other.
                Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                    self.queue.clear();
                    return Ok(());
                }
                Err(_) => return Err(Broken),
            }
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
