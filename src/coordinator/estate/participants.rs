//! Letting processes in and back in, and releasing everything of those that have gone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::unistd::Uid;

use super::{Estate, broken, system};
use crate::coordinator::link::{participant_name, space_name};
use crate::coordinator::protocol::HandleRef;
use crate::coordinator::state::{Event, Reply};
use crate::error::Refusal;
use crate::os::socket::{Peer, User};
use crate::os::{address_space, pidfd};

impl Estate {
    /// Whether the bus lets a user in.
    pub(crate) fn lets_in(&self, user: &User) -> bool {
        user.uid == 0 || user.uid == Uid::effective().as_raw() || self.state.allows(user)
    }

    /// Lets a process in.
    pub(crate) fn admit(&mut self, pid: u32, user: User, token: u64, pidfd: OwnedFd) -> Result<u64, Refusal> {
        let plan = self.state.join(&self.limits, pid, user.uid, user.gids)?;
        let Reply::Welcome { incarnation } = plan.reply else { return Err(broken("a join without a welcome")) };
        let birth = pidfd::birth(pid, pidfd.as_fd()).map_err(|error| system("looking at a process", &error))?;
        if let Some(link) = &mut self.link {
            link.store(&participant_name(incarnation), pidfd.as_fd())?;
        }
        self.pidfds.insert(incarnation, pidfd);
        let recognized = Event::Recognized { incarnation, birth, token };
        if let Err(refusal) = self.carry_out_all(plan.events.into_iter().chain([recognized]).collect()) {
            self.pidfds.remove(&incarnation);
            self.forget(participant_name(incarnation));
            return Err(refusal);
        }
        Ok(incarnation)
    }

    /// Whom a process without a number was let in as, where the answer to its Hello was lost. Whether it is the same process is
    /// for [`Self::readmit`] to say.
    pub(crate) fn known_as(&self, peer: Peer, token: u64) -> Option<u64> {
        let mut all = self.state.participants().iter();
        all.find(|(_, known)| known.token == token && (known.pid, known.uid) == (peer.pid, peer.uid))
            .map(|(who, _)| *who)
    }

    /// Notes the address space in which a participant has its handles, unless it is known.
    pub(crate) fn watch_space(&mut self, incarnation: u64, space: OwnedFd) {
        if self.spaces.contains_key(&incarnation) {
            return;
        }
        if let Some(link) = &mut self.link {
            // Without it a successor only learns later that the process runs another program.
            let _ = link.store(&space_name(incarnation), space.as_fd());
        }
        self.spaces.insert(incarnation, space);
    }

    /// Whether no store of this participant can follow: its process is dead, or has executed another program and left
    /// the address space behind in which it had its handles. In doubt one can.
    pub(crate) fn is_past(&self, incarnation: u64) -> bool {
        self.spaces.get(&incarnation).is_some_and(|space| address_space::is_gone(space.as_fd()))
            || self.pidfds.get(&incarnation).is_some_and(|pidfd| pidfd::is_dead(pidfd.as_fd()).unwrap_or(false))
    }

    /// Lets a process back in whose connection broke, if it is the one it says it is.
    pub(crate) fn readmit(
        &mut self,
        incarnation: u64,
        peer: Peer,
        pidfd: BorrowedFd<'_>,
        holds: &[HandleRef],
    ) -> Result<(), Refusal> {
        let closed = self.given_up_meanwhile(incarnation, peer, pidfd, holds)?;
        self.carry_out_all(closed)
    }

    /// What a process that comes back has given up since; a refusal, if it is not the one it says it is.
    pub(crate) fn given_up_meanwhile(
        &self,
        incarnation: u64,
        peer: Peer,
        pidfd: BorrowedFd<'_>,
        holds: &[HandleRef],
    ) -> Result<Vec<Event>, Refusal> {
        let known = self.pidfds.get(&incarnation).zip(self.state.participant(incarnation));
        let (registered, participant) = known.ok_or(Refusal::UnknownParticipant { incarnation })?;
        // While the registered process lives nobody else can have its number.
        let lives = !pidfd::is_dead(registered.as_fd()).map_err(|error| system("looking at a process", &error))?;
        let same =
            pidfd::may_be_same(registered.as_fd(), pidfd).map_err(|error| system("comparing processes", &error))?;
        // Who has become another user keeps what it joined as, if it is still the same program: where nobody can tell, it may
        // be anybody's that was executed since.
        let same_program = participant.uid == peer.uid || self.spaces.contains_key(&incarnation);
        if !(lives && same && participant.pid == peer.pid && same_program) || self.is_past(incarnation) {
            return Err(Refusal::UnknownParticipant { incarnation });
        }
        Ok(self.state.rejoin(incarnation, holds)?.events)
    }

    /// Releases everything a participant had: it is dead, or has said good-bye.
    pub(crate) fn release_participant(&mut self, incarnation: u64) -> Result<(), Refusal> {
        if self.state.participant(incarnation).is_none() {
            return Ok(());
        }
        self.carry_out_all(self.state.leave(incarnation))
    }
}
