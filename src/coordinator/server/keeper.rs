//! The keeper as the coordinator sees it: listening to it, and starting another in the place of a dead one.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{KIND_KEEPER, Server, token};
use crate::coordinator::link::{self, GIVEN_LISTENER, Incoming, LISTENER, LOCK, Link, Message};
use crate::coordinator::roles::{self, Role};

/// After a keeper could not be started, or takes nothing, the next attempt waits so long.
pub(super) const KEEPER_RETRY: Duration = Duration::from_secs(1);

impl Server {
    pub(super) fn listen_to_keeper(&mut self) -> io::Result<()> {
        let Some(link) = self.estate.link() else { return Ok(()) };
        match link.receive() {
            Ok(Incoming::Message(Message::Stop, _)) => self.stop(),
            Ok(Incoming::Message(..) | Incoming::Nothing) => {}
            Ok(Incoming::HungUp) | Err(_) => {
                if let Some(link) = self.estate.replace_link(None) {
                    self.epoll.delete(&link)?;
                    link.reap();
                }
                self.start_keeper()?;
            }
        }
        Ok(())
    }

    /// Starts a keeper in the place of the dead one and hands it everything.
    pub(super) fn start_keeper(&mut self) -> io::Result<()> {
        self.keeper_at = None;
        if self.hosted {
            return Ok(());
        }
        let started = roles::start(Role::Keeper, &self.place).and_then(|(link, child)| {
            let listener = if self.place.socket_is_given() { GIVEN_LISTENER } else { LISTENER };
            let names = [(LOCK, self.lock.as_fd()), (listener, self.listener.as_fd())];
            let names = names.into_iter().map(|(name, fd)| (name.to_owned(), fd));
            let link = Link::new(link, Some(child));
            let handed = link::hand_over(link.as_fd(), names.chain(self.estate.stored()));
            let watched = handed.and_then(|()| self.watch(&link, token(KIND_KEEPER, 0)));
            match watched {
                Ok(()) => Ok(link),
                Err(error) => {
                    link.reap();
                    Err(error)
                }
            }
        });
        match started {
            Ok(link) => drop(self.estate.replace_link(Some(link))),
            Err(error) => {
                eprintln!("shmbus coordinator: cannot start a keeper: {error}");
                self.keeper_at = Some(Instant::now() + KEEPER_RETRY);
            }
        }
        Ok(())
    }
}
