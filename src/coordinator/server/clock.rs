//! What is due at its time: the bus's end when nobody needs it, retention, expiry, ledgers, a keeper, another look.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollTimeout;

use super::Server;
use super::keeper::KEEPER_RETRY;
use crate::coordinator::estate::Expired;
use crate::coordinator::limits::{LINGER, LOOK, RENEW_DUE};
use crate::os::socket;

/// How often a bus on which nobody is looks whether it can still be found.
const NAMES_LOOK: Duration = Duration::from_secs(30);

/// How often to look for messages that have expired at groups' floors.
const EXPIRY_LOOK: Duration = Duration::from_millis(500);

impl Server {
    /// Until the next thing to do.
    pub(super) fn timeout(&self) -> EpollTimeout {
        if !self.unfinished.is_empty() {
            return EpollTimeout::ZERO;
        }
        let look_at = self.look.map(|(at, _)| at);
        let sometimes =
            self.leave_at.into_iter().chain(self.keeper_at).chain(self.age_at).chain(self.expiry_at).chain(look_at);
        let sometimes = sometimes.chain(self.retry_at).chain(self.estate.reclaim_at());
        let sometimes = sometimes.chain(self.estate.has_unkept().then_some(self.keep_at));
        let sometimes = sometimes.chain((!self.counting.is_empty()).then(Instant::now));
        let next = sometimes.fold(self.renew_at, Instant::min);
        let wait = socket::round_up(next.saturating_duration_since(Instant::now())).as_millis();
        wait.map_or(EpollTimeout::NONE, |ms| EpollTimeout::try_from(ms).unwrap_or(EpollTimeout::MAX))
    }

    /// Whether it is time to go, to start a keeper, or to look after the ledgers.
    pub(super) fn look_at_the_clock(&mut self) -> io::Result<()> {
        let now = Instant::now();
        if self.age_at.is_some_and(|at| at <= now) {
            // Connections come between.
            self.age_at = (!self.estate.give_up_old(LOOK)).then_some(now);
        }
        if self.age_at.is_none() {
            self.age_at = self.estate.age_look().map(|look| now + look);
        }
        if self.expiry_at.is_some_and(|at| at <= now) {
            self.expiry_at = match self.estate.settle_expired(LOOK) {
                Some(Expired { more, letters }) => {
                    self.burial.begin(&self.place, letters);
                    more.then_some(now)
                }
                None => Some(now),
            };
        }
        if self.expiry_at.is_none() && self.estate.may_expire() {
            self.expiry_at = Some(now + EXPIRY_LOOK);
        }
        if !self.counting.is_empty() {
            self.go_on_counting()?;
        }
        if self.estate.reclaim_at().is_some_and(|at| at <= now) {
            self.estate.reclaim_next();
        }
        if self.renew_at <= now {
            self.renew_at = if self.estate.renew_due(LOOK) { now + RENEW_DUE } else { now };
        }
        if self.keeper_at.is_some_and(|at| at <= now) {
            self.start_keeper()?;
        }
        if self.estate.has_unkept() && self.keep_at <= now {
            self.keep_at = if self.estate.keep_again() { now } else { now + KEEPER_RETRY };
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_the_short()?;
        }
        if let Some((_, waited)) = self.look.filter(|(at, _)| *at <= now) {
            self.look_after_the_lost(waited)?;
        }
        if !self.estate.state().participants().is_empty() {
            self.leave_at = None;
        } else if self.leave_at.is_some_and(|at| at <= now) {
            self.leave_at = None;
            // Who cannot be found is not needed, whatever it keeps.
            if self.estate.is_needed() && self.place.leads_to(self.lock.as_fd()) {
                self.leave_at = Some(now + NAMES_LOOK);
            } else {
                self.stop();
            }
        }
        Ok(())
    }

    /// Somebody or something has gone; perhaps it was the last.
    pub(super) fn linger(&mut self) {
        if self.estate.state().participants().is_empty() {
            self.leave_at = Some(Instant::now() + LINGER);
        }
    }
}
