//! What comes from the coordinator: answers, and what it sends unasked.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::holdings::arena_name;
use super::{Control, End, Granted, Identity, Inner, pause};
use crate::coordinator::protocol::{Answer, HandleRef, MAX_PACKET_FDS, PROTOCOL_VERSION, Request};
use crate::error::{ConnectError, Refusal};
use crate::os::socket;

/// How long a reader waits for an arena's descriptor that is not in its socket: the coordinator has it in its queue, or
/// is being restarted.
const ARENA_PATIENCE: Duration = Duration::from_secs(2);

/// Before knocking again at a coordinator that lacks something to have us back with: many may knock.
const TURNED_AWAY_PAUSE: Duration = Duration::from_millis(10);

impl Control {
    /// The descriptor of an arena that came into being after the subscriber was opened. It was sent before anything
    /// was written there, so it waits in our socket, also when the coordinator has died since. If our socket was full it
    /// waits with the coordinator, which goes on as we read; if the connection broke before that, the coordinator is
    /// asked for it by coming back, and likewise if this process had no room for it when it came. `None`: not there, and it
    /// does not come now.
    pub(crate) fn arena(&self, topic: u64, slot: u32) -> Option<OwnedFd> {
        self.check_process().ok()?;
        self.line.hold().leave_for_missed(topic, slot);
        let deadline = Instant::now() + ARENA_PATIENCE;
        loop {
            if let Some(fd) = self.announced_arena(topic, slot) {
                return Some(fd);
            }
            // Packets come in order: what was sent to us before an answer is here with it. So a garbled entry, for whose arena
            // one would wait in vain, costs no more than a question, after that of another thread that has the turn.
            if let Ok(turn) = self.turn.try_lock() {
                let asked = self.exchange(&Request::Status { topic: Some(String::new()), after: None }, 0, deadline);
                drop(turn);
                if asked.is_ok() {
                    return self.announced_arena(topic, slot);
                }
            }
            let mut inner = self.line.hold();
            // Where connecting fails for another reason than the end of the bus, it may succeed in a moment.
            let _ = inner.connect();
            if inner.end.is_some() || Instant::now() >= deadline {
                drop(inner);
                // It may have come while the answer did not.
                return self.announced_arena(topic, slot);
            }
            let socket = inner.socket.clone();
            drop(inner);
            pause(socket.as_deref(), deadline);
        }
    }

    /// The descriptor of an arena, if it has come.
    pub(crate) fn announced_arena(&self, topic: u64, slot: u32) -> Option<OwnedFd> {
        let mut inner = self.line.hold();
        inner.receive_all();
        inner.arenas.get(&(topic, slot))?.try_clone().ok()
    }

    /// Takes the topics that have come for a wildcard subscription, and how many have come in all. Never waits: where
    /// fewer have come than were `announced`, the rest is with the coordinator, to which a broken connection is renewed.
    pub(crate) fn wildcard_topics(&self, wildcard: u64, announced: u64) -> Result<(Vec<Granted>, u64), ConnectError> {
        self.check_process()?;
        let mut inner = self.line.hold();
        inner.receive_all();
        let (granted, told) = inner.pushed.take(wildcard);
        let connected = if told < announced { inner.connect() } else { Ok(()) };
        drop(inner);
        match connected {
            // What has come counts, whatever became of the coordinator.
            Err(error) if granted.is_empty() => Err(error),
            _ => Ok((granted, told)),
        }
    }
}

impl Inner {
    /// Takes everything out of the socket that is there.
    pub(super) fn receive_all(&mut self) {
        while let Some(socket) = self.socket.clone() {
            match socket::recv(socket.as_fd(), &mut self.buffer, MAX_PACKET_FDS) {
                Ok(packet) if packet.len == 0 => self.socket = None,
                Ok(packet) => match postcard::from_bytes(&self.buffer[..packet.len]) {
                    Ok(answer) if !packet.truncated => self.receive(answer, packet.fds),
                    _ => return self.end = Some(End::Garbled("the coordinator sent something unreadable".to_owned())),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It left without having read everything, which is told once, and first: what it said last lies behind that.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => {
                    let lost = self.socket.take();
                    // The program has closed it behind our back: the number is free, or names something of its own that
                    // is not ours to close.
                    if matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOTSOCK)) {
                        std::mem::forget(lost);
                    }
                }
            }
        }
    }

    fn receive(&mut self, answer: Answer, mut fds: Vec<OwnedFd>) {
        if self.welcomed && matches!(answer, Answer::Refused(_)) {
            // What came ahead of a grant that is not made: one request is under way at a time.
            for handle in self.pushed.drop_ungranted(&self.holds) {
                self.let_go(handle);
            }
        }
        match answer {
            Answer::ArenaAdded { topic, slot } if self.holdings.has(topic) => match fds.pop() {
                Some(fd) => {
                    self.holdings.keep(topic, arena_name(slot), &fd);
                    self.arenas.insert((topic, slot), fd);
                }
                None => drop(self.missed_arenas.insert((topic, slot))),
            },
            Answer::ArenaAdded { .. } => {}
            Answer::WildcardTopic { wildcard, told, ref info, cursor, .. } => {
                let subscriber = HandleRef::Subscriber { topic: info.id, cursor };
                if self.pushed.is_awaited(&self.holds, wildcard) {
                    if self.holds.insert(subscriber) {
                        self.holdings.opened(&answer, &fds);
                    }
                    self.pushed.add(wildcard, told, subscriber, (answer, fds));
                }
            }
            Answer::WildcardMissed { wildcard, told, .. } => {
                if self.pushed.is_awaited(&self.holds, wildcard) {
                    self.pushed.miss(wildcard, told, answer);
                }
            }
            Answer::WildcardTold { wildcard, told } => self.pushed.set_told(wildcard, told),
            Answer::Welcome { protocol, incarnation, bus } if !self.welcomed => {
                self.receive_welcome(protocol, Identity { incarnation, bus });
            }
            Answer::Present { topics, wildcards } => {
                self.holdings.plan(&topics, &wildcards);
                self.present();
            }
            // For want of something: it may be there in a moment, and our handles are in force.
            Answer::Refused(Refusal::System { .. } | Refusal::Limit { .. })
                if !self.welcomed && self.identity.is_some() =>
            {
                (self.socket, self.again_at) = (None, Some(Instant::now() + TURNED_AWAY_PAUSE));
            }
            Answer::Refused(refusal) if !self.welcomed => {
                self.end = Some(match refusal {
                    Refusal::UnknownParticipant { .. } => End::Ended,
                    Refusal::Leaving if self.identity.is_some() => End::Ended,
                    Refusal::Leaving => End::Leaving,
                    other => End::Refused(other),
                });
            }
            Answer::Farewell => self.end = Some(End::Ended),
            answer if self.expected.pop_front() != Some(true) => {
                // Opened for somebody who had given up waiting.
                if let Answer::WildcardOpened { wildcard } = answer {
                    self.end_wildcard(wildcard);
                }
                self.unsent.extend(opened_handle(&answer));
                self.send_closes();
            }
            answer => {
                // Noted here and not by whoever asked: a Hello that is sent before it wakes up must name it.
                if opened_handle(&answer).is_some_and(|handle| self.holds.insert(handle)) {
                    self.holdings.opened(&answer, &fds);
                }
                if let Answer::WildcardOpened { wildcard } = answer {
                    self.pushed.begin(wildcard);
                }
                self.answers.push_back((answer, fds));
            }
        }
    }

    /// Gives this connection up if the arena came over it and did not get through.
    fn leave_for_missed(&mut self, topic: u64, slot: u32) {
        if self.missed_arenas.remove(&(topic, slot)) {
            self.hang_up();
        }
    }

    fn receive_welcome(&mut self, protocol: u32, identity: Identity) {
        if protocol != PROTOCOL_VERSION {
            self.end = Some(End::Version(protocol));
        } else if self.identity.is_some_and(|known| known != identity) {
            self.end = Some(End::Ended);
        } else {
            self.identity = Some(identity);
            self.welcomed = true;
        }
    }
}

/// The handle that an answer opened.
pub(super) fn opened_handle(answer: &Answer) -> Option<HandleRef> {
    match answer {
        Answer::PublisherOpened { info, slot, .. } => Some(HandleRef::Publisher { topic: info.id, slot: *slot }),
        Answer::SubscriberOpened { info, cursor, .. } => {
            Some(HandleRef::Subscriber { topic: info.id, cursor: *cursor })
        }
        Answer::ConsumerOpened { info, group, consumer, .. } => {
            Some(HandleRef::Consumer { topic: info.id, group: group.id, consumer: *consumer })
        }
        Answer::WildcardOpened { wildcard } => Some(HandleRef::Wildcard { wildcard: *wildcard }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::coordinator::directory::Place;

    #[test]
    fn what_a_coordinator_said_before_it_left_something_unread_is_heard() {
        let directory = tempfile::tempdir().unwrap();
        let mut inner = Inner::new(Place::find("control", Some(directory.path())).unwrap(), 1);
        let (ours, theirs) = socket::pair().unwrap();
        inner.socket = Some(Arc::new(ours));
        // A Hello that is refused, and a good-bye behind it.
        assert!(inner.send(&Request::Goodbye, 0, false).unwrap());
        let refusal = Answer::Refused(Refusal::UnknownParticipant { incarnation: 1 });
        socket::send(theirs.as_fd(), &postcard::to_stdvec(&refusal).unwrap(), &[]).unwrap();
        drop(theirs);
        inner.receive_all();
        assert!(matches!(inner.end, Some(End::Ended)) && inner.socket.is_none());
    }
}
