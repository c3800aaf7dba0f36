//! One client's connection as the coordinator sees it: it never waits for the client, and what waits is bounded.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::coordinator::estate::{Granted, News, Progress};
use crate::coordinator::limits::MAX_QUEUED_PACKETS;
use crate::coordinator::protocol::{Answer, MAX_PACKET_FDS, Request};
use crate::error::Refusal;
use crate::os::memfd;
use crate::os::socket::{self, Peer};

/// Packets that are sent to one client before others have their turn, however fast it reads.
const PACKETS_PER_FLUSH: usize = 64;

/// What came from a client.
pub(crate) enum Received {
    /// With the number under which it is to be done once, or 0.
    Request(Request, u64),
    Nothing,
    /// The client closed its end, or the process ended.
    HungUp,
    /// Not a request.
    Garbled,
    /// With a descriptor of something that is no memory: closing it may block for as long as its maker likes.
    Foreign(Vec<OwnedFd>),
}

/// The connection cannot go on: the client does not read, or the kernel refuses to carry its descriptors.
#[derive(Debug)]
pub(crate) struct Broken;

/// What is said to a client unasked. Its descriptors are duplicated when it is its turn to be sent: they are others' topics',
/// and a client that does not read must not keep copies of them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Push {
    Arena { topic: u64, slot: u32 },
    Wildcard(News),
}

/// What waits for a client.
enum Waiting {
    Packet(Vec<u8>, Vec<OwnedFd>),
    Push(Push),
}

/// Makes the packet of a push; `None`: there is nothing to say any more. Fails for want of descriptors.
pub(crate) type Resolve<'a> = &'a dyn Fn(Push) -> Result<Option<Granted>, Refusal>;

/// A client's connection.
pub(crate) struct Connection {
    socket: OwnedFd,
    pub(crate) peer: Peer,
    /// Who it is, once it has said Hello.
    pub(crate) incarnation: Option<u64>,
    /// Somebody whom the bus does not let in.
    pub(crate) stranger: bool,
    /// Its request is answered later; until then it is not listened to.
    pub(crate) waits: bool,
    queue: VecDeque<Waiting>,
    /// How many there are of what is bounded by what the client holds; they come first.
    owed: usize,
    queued_fds: usize,
    /// What waits cannot be sent for want of descriptors: it is tried again in a moment.
    is_short: bool,
    /// Descriptors accepted with one request.
    max_fds: usize,
    /// Those of the last one.
    fds: Vec<OwnedFd>,
    /// Its last request is done in parts: until it is done nothing else is heard.
    put_off: bool,
    /// How far that has come.
    pub(crate) progress: Progress,
    /// Lost topics that it was asked for and has not presented.
    asked: BTreeSet<u64>,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd, peer: Peer) -> Connection {
        Connection {
            socket,
            peer,
            incarnation: None,
            stranger: false,
            waits: false,
            queue: VecDeque::new(),
            owed: 0,
            queued_fds: 0,
            is_short: false,
            max_fds: 0,
            fds: Vec::new(),
            put_off: false,
            progress: Progress::default(),
            asked: BTreeSet::new(),
        }
    }

    /// Whether answers wait for the client to read. Until it does, its requests wait.
    pub(crate) fn is_congested(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether its last request is not done yet.
    pub(crate) fn is_put_off(&self) -> bool {
        self.put_off
    }

    /// Its last request is done in parts, or has been.
    pub(crate) fn set_put_off(&mut self, put_off: bool) {
        self.put_off = put_off;
    }

    /// From now on descriptors may ride along: this client was asked to present some.
    pub(crate) fn accept_fds(&mut self) {
        self.max_fds = MAX_PACKET_FDS;
    }

    /// No more descriptors from this client.
    pub(crate) fn refuse_fds(&mut self) {
        self.max_fds = 0;
    }

    /// Of these lost topics it is asked for what it holds.
    pub(crate) fn ask_for(&mut self, topics: &[u64]) {
        self.asked.extend(topics);
    }

    /// Whether it was asked for this topic, and has not presented it. `is_heard`: now it has.
    pub(crate) fn was_asked_for(&mut self, topic: u64, is_heard: bool) -> bool {
        if is_heard { self.asked.remove(&topic) } else { self.asked.contains(&topic) }
    }

    /// Those that rode along with the last request.
    pub(crate) fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    /// The next request, without waiting. Descriptors are accepted only from who was asked for them.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Received {
        self.fds.clear();
        let mut received = socket::recv(self.socket.as_fd(), buffer, self.max_fds);
        if received.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset) {
            // It left without having read everything, which is told once, and first: what it said last lies behind that.
            received = socket::recv(self.socket.as_fd(), buffer, self.max_fds);
        }
        match received {
            Ok(packet) if packet.len == 0 => Received::HungUp,
            // Nothing else is asked of them before: the file may lie in a file system that does not answer.
            Ok(packet) if packet.fds.iter().any(|fd| !memfd::is_memory(fd.as_fd())) => Received::Foreign(packet.fds),
            Ok(packet) if packet.truncated || packet.lost_fds => Received::Garbled,
            Ok(packet) => {
                self.fds = packet.fds;
                Request::from_packet(&buffer[..packet.len])
                    .map_or(Received::Garbled, |(request, once)| Received::Request(request, once))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Nothing,
            Err(_) => Received::HungUp,
        }
    }

    /// Whether what waits cannot be sent for want of descriptors, here or on their way.
    pub(crate) fn is_short(&self) -> bool {
        self.is_short
    }

    /// Descriptors that wait for the client to read.
    pub(crate) fn queued_fds(&self) -> usize {
        self.queued_fds
    }

    /// Sends an answer, or queues it behind those that wait. For who is pushed nothing.
    pub(crate) fn send(&mut self, answer: &Answer, fds: Vec<OwnedFd>) -> Result<(), Broken> {
        self.answer(answer, fds)?;
        self.flush(&|_| Ok(None))
    }

    /// Queues an answer: [`Self::flush`] sends it.
    pub(crate) fn answer(&mut self, answer: &Answer, fds: Vec<OwnedFd>) -> Result<(), Broken> {
        self.check_room()?;
        let packet = postcard::to_stdvec(answer).map_err(|_| Broken)?;
        self.queued_fds += fds.len();
        self.queue.push_back(Waiting::Packet(packet, fds));
        Ok(())
    }

    /// Queues a push.
    pub(crate) fn push(&mut self, push: Push) -> Result<(), Broken> {
        self.check_room()?;
        self.queue.push_back(Waiting::Push(push));
        Ok(())
    }

    /// Queues an answer that is one of a few.
    pub(crate) fn answer_unbounded(&mut self, answer: &Answer) -> Result<(), Broken> {
        self.queue.push_back(Waiting::Packet(postcard::to_stdvec(answer).map_err(|_| Broken)?, Vec::new()));
        self.owed += 1;
        Ok(())
    }

    /// Queues what is bounded already by what the client holds.
    pub(crate) fn push_all(&mut self, pushes: impl IntoIterator<Item = Push>) {
        let before = self.queue.len();
        self.queue.extend(pushes.into_iter().map(Waiting::Push));
        self.owed += self.queue.len() - before;
    }

    fn check_room(&self) -> Result<(), Broken> {
        if self.queue.len() < MAX_QUEUED_PACKETS + self.owed { Ok(()) } else { Err(Broken) }
    }

    /// Sends what waits, as far as the client reads, and no more than a turn's worth: what is left waits for the next.
    pub(crate) fn flush(&mut self, resolve: Resolve<'_>) -> Result<(), Broken> {
        self.is_short = false;
        for _ in 0..PACKETS_PER_FLUSH {
            let Some(first) = self.queue.front() else { return Ok(()) };
            let sent = match first {
                Waiting::Packet(bytes, fds) => send(self.socket.as_fd(), bytes, fds),
                Waiting::Push(push) => match resolve(*push) {
                    Ok(Some((answer, fds))) => {
                        send(self.socket.as_fd(), &postcard::to_stdvec(&answer).map_err(|_| Broken)?, &fds)
                    }
                    Ok(None) => Ok(()),
                    Err(_) => {
                        self.is_short = true;
                        return Ok(());
                    }
                },
            };
            match sent {
                Ok(()) => self.forget_first(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // As many descriptors of ours are on their way as we may have there.
                Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                    self.is_short = true;
                    return Ok(());
                }
                // Gone: what it said last, and its hang-up, are received like any other.
                Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                    self.queue.clear();
                    (self.owed, self.queued_fds) = (0, 0);
                    return Ok(());
                }
                Err(_) => return Err(Broken),
            }
        }
        Ok(())
    }

    fn forget_first(&mut self) {
        if let Some(Waiting::Packet(_, fds)) = self.queue.pop_front() {
            self.queued_fds -= fds.len();
        }
        self.owed = self.owed.saturating_sub(1);
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    socket::send(socket, bytes, &fds)
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::coordinator::protocol::MAX_PACKET_BYTES;

    fn welcome() -> Answer {
        Answer::Welcome { protocol: 0, incarnation: 1, bus: 1 }
    }

    #[test]
    fn what_is_pushed_takes_no_descriptors_before_it_is_sent() {
        let (theirs, ours) = socket::pair().unwrap();
        let mut connection = Connection::new(ours, Peer { pid: 1, uid: 1 });
        let made = Cell::new(0);
        let resolve = |push| {
            let Push::Arena { topic, slot } = push else { return Ok(None) };
            made.set(made.get() + 1);
            let fd = memfd::create("shmbus-test", 4096).map_err(|_| Refusal::Leaving)?;
            Ok(Some((Answer::ArenaAdded { topic, slot }, vec![fd])))
        };
        for slot in 0..1000 {
            connection.push(Push::Arena { topic: 0, slot }).unwrap();
            connection.flush(&resolve).unwrap();
        }
        assert!(connection.is_congested() && connection.queued_fds() == 0);
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let mut next = 0;
        while next < 1000 {
            let packet = socket::recv(theirs.as_fd(), &mut buffer, 1).unwrap();
            let answer: Answer = postcard::from_bytes(&buffer[..packet.len]).unwrap();
            assert!(matches!(answer, Answer::ArenaAdded { slot, .. } if slot == next));
            assert_eq!(packet.fds.len(), 1);
            next += 1;
            connection.flush(&resolve).unwrap();
        }
        assert!(!connection.is_congested());
    }

    #[test]
    fn a_client_that_reads_fast_is_sent_a_turns_worth_at_a_time() {
        let (theirs, ours) = socket::pair().unwrap();
        let mut connection = Connection::new(ours, Peer { pid: 1, uid: 1 });
        let resolve = |push| {
            let Push::Arena { topic, slot } = push else { return Ok(None) };
            Ok(Some((Answer::ArenaAdded { topic, slot }, Vec::new())))
        };
        let (count, mut buffer) = (MAX_QUEUED_PACKETS as u32 + 10, vec![0; MAX_PACKET_BYTES]);
        connection.push_all((0..count).map(|slot| Push::Arena { topic: 0, slot }));
        // What it is owed leaves as much room for the rest as ever.
        connection.push(Push::Arena { topic: 0, slot: count }).unwrap();
        let (mut next, mut turns) = (0, 0);
        while connection.is_congested() {
            connection.flush(&resolve).unwrap();
            turns += 1;
            let before = next;
            while let Ok(packet) = socket::recv(theirs.as_fd(), &mut buffer, 0) {
                let answer: Answer = postcard::from_bytes(&buffer[..packet.len]).unwrap();
                assert!(matches!(answer, Answer::ArenaAdded { slot, .. } if slot == next));
                next += 1;
            }
            assert!(next - before <= PACKETS_PER_FLUSH as u32);
        }
        assert_eq!((next, turns), (count + 1, (count + 1).div_ceil(PACKETS_PER_FLUSH as u32)));
        (0..MAX_QUEUED_PACKETS).for_each(|_| connection.push(Push::Arena { topic: 0, slot: 0 }).unwrap());
        assert!(connection.push(Push::Arena { topic: 0, slot: 0 }).is_err());
    }

    #[test]
    fn want_of_descriptors_puts_off_what_is_pushed() {
        let (theirs, ours) = socket::pair().unwrap();
        let mut connection = Connection::new(ours, Peer { pid: 1, uid: 1 });
        connection.push(Push::Arena { topic: 0, slot: 0 }).unwrap();
        connection.flush(&|_| Err(Refusal::Leaving)).unwrap();
        assert!(connection.is_short() && connection.is_congested());
        // What comes behind waits: order is kept.
        connection.answer(&welcome(), Vec::new()).unwrap();
        connection.flush(&|_| Err(Refusal::Leaving)).unwrap();
        let mut buffer = vec![0; 64];
        assert!(socket::recv(theirs.as_fd(), &mut buffer, 1).is_err());
        connection.flush(&|_| Ok(None)).unwrap();
        assert!(!connection.is_short() && socket::recv(theirs.as_fd(), &mut buffer, 1).is_ok());
    }
}
