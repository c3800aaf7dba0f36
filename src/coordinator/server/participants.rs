//! Participants come, come back, say good-bye, or are found to be past.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::unistd::Uid;

use super::unfinished::Unfinished;
use super::{KIND_PARTICIPANT, Server, token};
use crate::coordinator::connection::{Connection, Push};
use crate::coordinator::protocol::{Answer, HandleRef, PROTOCOL_VERSION, Request};
use crate::coordinator::state::Event;
use crate::error::Refusal;
use crate::os::address_space;
use crate::os::socket::{self, Peer, User};

/// When to look again at participants that have lost their connection and live; doubled from there, since most of them
/// come back or stay for good.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LONGEST_LOOK: Duration = Duration::from_secs(30);

impl Server {
    pub(super) fn hello(
        &mut self,
        id: u64,
        protocol: u32,
        token: u64,
        incarnation: Option<u64>,
        holds: &[HandleRef],
    ) -> io::Result<()> {
        if protocol != PROTOCOL_VERSION {
            // Tells the client our version; it does not get any further.
            self.send(id, &self.estate.welcome(0), Vec::new())?;
            self.expel(id);
            return Ok(());
        }
        let Some(client) = self.clients.get(&id) else { return Ok(()) };
        let peer = client.peer;
        // Whom a predecessor of ours had let in, and could not tell, has no number.
        let known = incarnation.or_else(|| self.estate.known_as(peer, token));
        if known.and_then(|known| self.connected.get(&known)).is_some_and(|later| *later > id) {
            // It has come back once more since, and may hold other things by now.
            self.expel(id);
            return Ok(());
        }
        let user = socket::user(client.as_fd())?;
        if client.stranger {
            let refusal = Refusal::NotAllowed { uid: user.uid, host: Uid::effective().as_raw() };
            self.send(id, &Answer::Refused(refusal), Vec::new())?;
            self.expel(id);
            return Ok(());
        }
        let watched = socket::peer_pidfd(client.as_fd(), peer);
        let space = address_space::open(peer.pid);
        // Who is still connected is still the process and the program that connected: both descriptors are its own, and no
        // newcomer's that was given its number. One that came back only to say good-bye may be gone again.
        let hung_up = socket::is_hung_up(client.as_fd());
        if incarnation.is_none() && hung_up {
            self.expel(id);
            return Ok(());
        }
        let space = space.ok().filter(|_| !hung_up);
        if let (Ok(pidfd), Some(who)) = (&watched, known)
            && let Ok(closed) = self.estate.given_up_meanwhile(who, peer, pidfd.as_fd(), holds)
        {
            let closed = closed.iter().filter_map(|event| match event {
                Event::Closed { handle } => Some(*handle),
                _ => None,
            });
            if self.close_some(closed.collect()) {
                let holds = holds.to_vec();
                self.put_off(id, Request::Hello { protocol, token, incarnation, holds }, 0);
                return Ok(());
            }
        }
        let admitted = match watched {
            Ok(pidfd) => self.let_in((peer, user), token, pidfd, space, known, holds)?,
            Err(error) => {
                Err(Refusal::System { context: "watching the process".to_owned(), problem: error.to_string() })
            }
        };
        match admitted {
            Ok(incarnation) => {
                self.ask_for_lost(id, incarnation, holds)?;
                self.connect(id, incarnation, holds)
            }
            Err(refusal) => {
                self.send(id, &Answer::Refused(refusal), Vec::new())?;
                self.expel(id);
                Ok(())
            }
        }
    }

    /// A participant comes back with handles on topics that are lost: it slept while everybody else presented theirs.
    fn ask_for_lost(&mut self, id: u64, incarnation: u64, holds: &[HandleRef]) -> io::Result<()> {
        let (topics, wildcards) = (self.estate.topics_to_end(holds), self.estate.notices_to_present(incarnation));
        let wanted = !topics.is_empty() || !wildcards.is_empty();
        let asked = |client: &&mut Connection| wanted && !self.barred.contains(&client.peer.uid);
        let Some(client) = self.clients.get_mut(&id).filter(asked) else { return Ok(()) };
        client.accept_fds();
        client.ask_for(&topics);
        self.send(id, &Answer::Present { topics, wildcards }, Vec::new())
    }

    fn let_in(
        &mut self,
        (peer, user): (Peer, User),
        name: u64,
        pidfd: OwnedFd,
        space: Option<OwnedFd>,
        incarnation: Option<u64>,
        holds: &[HandleRef],
    ) -> io::Result<Result<u64, Refusal>> {
        if let Some(incarnation) = incarnation {
            let readmitted = self.estate.readmit(incarnation, peer, pidfd.as_fd(), holds);
            if readmitted.is_ok() {
                // Its address space was known to coordinator and keeper alone; who can say Hello under this number has its
                // handles where it runs now.
                space.into_iter().for_each(|space| self.estate.watch_space(incarnation, space));
            }
            return Ok(readmitted.map(|()| incarnation));
        }
        let admitted = self.estate.admit(peer.pid, user, name, pidfd);
        if let Ok(incarnation) = admitted
            && let Some(pidfd) = self.estate.pidfds().get(&incarnation)
        {
            self.watch(pidfd, token(KIND_PARTICIPANT, incarnation))?;
            space.into_iter().for_each(|space| self.estate.watch_space(incarnation, space));
        }
        Ok(admitted)
    }

    /// Makes this connection the participant's, and tells it every topic and arena it may have missed.
    fn connect(&mut self, id: u64, incarnation: u64, holds: &[HandleRef]) -> io::Result<()> {
        if let Some(earlier) = self.connected.insert(incarnation, id) {
            self.clients.remove(&earlier);
        }
        let welcome = self.estate.welcome(incarnation);
        let arenas = self.estate.arenas_for(incarnation);
        let (news, wildcards) = self.estate.news_for(incarnation, holds);
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        client.incarnation = Some(incarnation);
        let mut queued = client.answer(&welcome, Vec::new());
        // Topics before their arenas: who does not know the topic has no use for an arena. And before the number of topics.
        client.push_all(news.into_iter().map(Push::Wildcard));
        for (wildcard, told) in wildcards {
            queued = queued.and_then(|()| client.answer_unbounded(&Answer::WildcardTold { wildcard, told }));
        }
        client.push_all(arenas.into_iter().map(|(topic, slot)| Push::Arena { topic, slot }));
        self.queue(id, |_| queued)
    }

    pub(super) fn look_soon(&mut self) {
        self.look = Some((Instant::now() + FIRST_LOOK, FIRST_LOOK));
    }

    /// Releases participants without a connection that have executed another program since. Nothing tells us when they do:
    /// their connection may have broken long before, with an earlier coordinator. Deaths are told by the pidfd.
    pub(super) fn look_after_the_lost(&mut self, waited: Duration) -> io::Result<()> {
        let everybody = self.estate.state().participants().keys().copied();
        let lost: Vec<u64> = everybody.filter(|incarnation| !self.connected.contains_key(incarnation)).collect();
        let next = (waited * 2).min(LONGEST_LOOK);
        self.look = (!lost.is_empty()).then(|| (Instant::now() + next, next));
        for incarnation in lost {
            if self.estate.is_past(incarnation) {
                self.release_participant(incarnation)?;
            }
        }
        Ok(())
    }

    /// A participant has dropped everything, and what is long of that is released already. It is told once all is noted, so that it
    /// can turn to our successor if we die before.
    pub(super) fn bid_farewell(&mut self, id: u64, incarnation: u64) -> io::Result<()> {
        let client = self.clients.remove(&id);
        if self.connected.get(&incarnation) == Some(&id) {
            self.let_go_of(incarnation)?;
            self.finish_releasing(incarnation)?;
        }
        if let Some(mut client) = client {
            // Whoever does not wait for it needs it no more.
            let _ = client.send(&Answer::Farewell, Vec::new());
        }
        Ok(())
    }

    /// A participant is past, or has left.
    pub(super) fn release_participant(&mut self, incarnation: u64) -> io::Result<()> {
        if self.is_going(incarnation) {
            return Ok(());
        }
        self.let_go_of(incarnation)?;
        self.go_on_releasing(incarnation)
    }

    /// Neither hears a participant any more nor watches it.
    fn let_go_of(&mut self, incarnation: u64) -> io::Result<()> {
        if let Some(id) = self.connected.remove(&incarnation) {
            self.clients.remove(&id);
        }
        // epoll drops a descriptor only with its last duplicate, and the keeper has one.
        if let Some(pidfd) = self.estate.pidfds().get(&incarnation) {
            self.epoll.delete(pidfd)?;
        }
        Ok(())
    }

    /// Releases what a participant has left, or a part of it.
    pub(super) fn go_on_releasing(&mut self, incarnation: u64) -> io::Result<()> {
        if self.release_some(incarnation) {
            let uid = self.estate.state().participant(incarnation).map_or(0, |participant| participant.uid);
            self.unfinished.add(uid, Unfinished::Gone(incarnation));
            return Ok(());
        }
        self.finish_releasing(incarnation)
    }

    /// Releases all that a participant has left.
    fn finish_releasing(&mut self, incarnation: u64) -> io::Result<()> {
        // A coordinator that cannot write down who left would give their places away wrongly after a restart. It ends,
        // and its successor tries again.
        self.estate.release_participant(incarnation).map_err(io::Error::other)?;
        self.linger();
        Ok(())
    }
}
