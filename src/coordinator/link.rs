//! What keeper and coordinator say to each other, and the coordinator's end of it.
//!
//! One packet is one [`Message`]; `Store` carries a descriptor. Nothing is acknowledged: a descriptor that was sent is
//! kept, by the kernel until the keeper takes it out of its socket, and the keeper empties the socket of a dead
//! coordinator before it starts the next one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use serde::{Deserialize, Serialize};

use crate::error::Refusal;
use crate::os::socket;

/// Longest message: a name of at most a few dozen bytes.
const MAX_MESSAGE_BYTES: usize = 512;

/// How long the coordinator waits for room in the keeper's socket before it declares the keeper stalled.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long either waits while everything is handed over.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(5);

/// Names in the store that every bus has.
pub(crate) const LISTENER: &str = "listener";
/// In the place of [`LISTENER`]: the socket is a service manager's, which made its name and will remove it.
pub(crate) const GIVEN_LISTENER: &str = "given-listener";
pub(crate) const LOCK: &str = "lock";
pub(crate) const REGISTRY: &str = "registry";

/// A topic's segment in the store; `segment` is the name its memory gives it.
pub(crate) fn segment_name(topic: u64, segment: &str) -> String {
    format!("topic-{topic}/{segment}")
}

/// A participant's pidfd in the store.
pub(crate) fn participant_name(incarnation: u64) -> String {
    format!("participant-{incarnation}")
}

/// A participant's address space in the store.
pub(crate) fn space_name(incarnation: u64) -> String {
    format!("space-{incarnation}")
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Keep the descriptor that rides along under this name, in the place of any earlier one.
    Store { name: String },
    /// Close it.
    Forget { name: String },
    /// All there is has been handed over.
    Complete,
    /// From the coordinator: it serves.
    Ready,
    /// From the keeper: end the bus.
    Stop,
    /// From the coordinator: the bus has ended; nothing is to be restarted.
    Leaving,
}

/// What came in.
pub(crate) enum Incoming {
    Message(Message, Option<OwnedFd>),
    Nothing,
    HungUp,
}

/// Sends one message, waiting for room until `deadline`.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
    deadline: Instant,
) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    loop {
        match socket::send(socket, &bytes, fd.as_slice()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !socket::wait(socket, PollFlags::POLLOUT, Some(deadline))? {
                    return Err(error);
                }
            }
            other => return other,
        }
    }
}

/// The next message, without waiting.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> io::Result<Incoming> {
    let mut buffer = [0; MAX_MESSAGE_BYTES];
    match socket::recv(socket, &mut buffer, 1) {
        Ok(packet) if packet.len == 0 => Ok(Incoming::HungUp),
        Ok(packet) => {
            let message = postcard::from_bytes(&buffer[..packet.len]).map_err(io::Error::other)?;
            Ok(Incoming::Message(message, packet.fds.into_iter().next()))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Incoming::Nothing),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Incoming::HungUp),
        Err(error) => Err(error),
    }
}

/// Hands everything over to a process that has just been started.
pub(crate) fn hand_over<'a>(
    socket: BorrowedFd<'_>,
    items: impl IntoIterator<Item = (String, BorrowedFd<'a>)>,
) -> io::Result<()> {
    for (name, fd) in items {
        send(socket, &Message::Store { name }, Some(fd), Instant::now() + HANDOVER_PATIENCE)?;
    }
    send(socket, &Message::Complete, None, Instant::now() + HANDOVER_PATIENCE)
}

/// Takes over everything that [`hand_over`] sends.
pub(crate) fn take_over(socket: BorrowedFd<'_>) -> io::Result<Vec<(String, OwnedFd)>> {
    let mut items = Vec::new();
    loop {
        match receive(socket)? {
            Incoming::Message(Message::Store { name }, Some(fd)) => items.push((name, fd)),
            Incoming::Message(Message::Complete, None) => return Ok(items),
            Incoming::Nothing => {
                // The other side may be stopped for any time; it dying ends the wait.
                socket::wait(socket, PollFlags::POLLIN, None)?;
            }
            Incoming::Message(other, _) => {
                return Err(io::Error::other(format!("unexpected {other:?} in the handover")));
            }
            Incoming::HungUp => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// The coordinator's end.
pub(crate) struct Link {
    socket: OwnedFd,
    /// The keeper, where this coordinator started it.
    child: Option<Child>,
    /// The keeper does not take what it is sent; nothing new is promised until it does.
    stalled: bool,
    /// What could not be said while it was stalled.
    unsent: VecDeque<String>,
}

impl Link {
    pub(crate) fn new(socket: OwnedFd, child: Option<Child>) -> Link {
        Link { socket, child, stalled: false, unsent: VecDeque::new() }
    }

    /// Has the keeper keep `fd`. A keeper that is gone is no error: its successor is handed everything.
    pub(crate) fn store(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Refusal> {
        let deadline = Instant::now() + if self.stalled { Duration::ZERO } else { PATIENCE };
        let message = Message::Store { name: name.to_owned() };
        // What was to be forgotten before this may have the same name.
        let sent =
            self.flush(deadline).and_then(|()| send_unless_gone(self.socket.as_fd(), &message, Some(fd), deadline));
        match sent {
            Ok(()) => {
                self.stalled = false;
                Ok(())
            }
            Err(error) => {
                self.stalled = error.kind() == io::ErrorKind::WouldBlock;
                let problem = format!("the keeper process takes no descriptors ({error}); is it stopped?");
                Err(Refusal::System { context: format!("storing {name}"), problem })
            }
        }
    }

    /// Has the keeper close what it keeps under `name`, now or when it listens again.
    pub(crate) fn forget(&mut self, name: String) {
        self.unsent.push_back(name);
        // What does not fit is said before the next thing that does.
        let _ = self.flush(Instant::now());
    }

    /// Says what could not be said before, in order.
    fn flush(&mut self, deadline: Instant) -> io::Result<()> {
        while let Some(name) = self.unsent.front() {
            let message = Message::Forget { name: name.clone() };
            send_unless_gone(self.socket.as_fd(), &message, None, deadline)?;
            self.unsent.pop_front();
        }
        Ok(())
    }

    /// Tells the keeper something without a descriptor.
    pub(crate) fn tell(&self, message: &Message) {
        // A keeper that is gone or stuck finds out by our hang-up.
        let _ = send(self.socket.as_fd(), message, None, Instant::now() + PATIENCE);
    }

    pub(crate) fn receive(&self) -> io::Result<Incoming> {
        receive(self.socket.as_fd())
    }

    /// The keeper's process.
    pub(crate) fn pid(&self) -> Option<u32> {
        // A keeper that started us has made both ends of the socket.
        let started_us = || socket::peer(self.socket.as_fd()).ok().map(|peer| peer.pid);
        self.child.as_ref().map(Child::id).or_else(started_us)
    }

    /// Makes sure that a keeper which hung up is dead, and reaps it.
    pub(crate) fn reap(self) {
        if let Some(mut child) = self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends to somebody who may be gone: then there is nobody to be told.
fn send_unless_gone(
    socket: BorrowedFd<'_>,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
    deadline: Instant,
) -> io::Result<()> {
    match send(socket, message, fd, deadline) {
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next_name(keeper: &OwnedFd) -> Option<String> {
        match receive(keeper.as_fd()).unwrap() {
            Incoming::Message(Message::Store { name }, _) => Some(format!("+{name}")),
            Incoming::Message(Message::Forget { name }, _) => Some(format!("-{name}")),
            _ => None,
        }
    }

    /// Cursors of a subscriber's own have the name of the ones before them.
    #[test]
    fn what_a_stopped_keeper_is_to_forget_is_not_what_it_is_told_to_keep_later() {
        let (keeper, ours) = socket::pair().unwrap();
        let mut link = Link::new(ours, None);
        let memory = socket::pair().unwrap().0;
        while link.store("other", memory.as_fd()).is_ok() {}
        link.forget("own-5".to_owned());
        link.forget("own-6".to_owned());
        while next_name(&keeper).is_some() {}
        link.store("own-5", memory.as_fd()).unwrap();
        let told: Vec<String> = std::iter::from_fn(|| next_name(&keeper)).collect();
        assert_eq!(told, ["-own-5", "-own-6", "+own-5"]);
    }
}
