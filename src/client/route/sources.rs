//! What a route sleeps on: its inputs' bells, and that of new topics.

use std::time::{Duration, Instant};

use super::Leg;
use crate::client::wildcard::Arrivals;
use crate::error::RecvError;
use crate::ring::doorbell::Doorbell;
use crate::shm::shared::Shared;
use crate::wait::{self, Look};

/// What comes due within this time is waited for awake, so to say: with short naps.
const SOON: Duration = Duration::from_millis(10);

/// Why a route woke up.
pub(super) enum Woken {
    /// A leg has an input, or says why it will have none.
    Input(usize, Result<(), RecvError>),
    /// Topics have come, and there is no input; or a moment to look at is sooner than was planned.
    LookAgain,
}

/// What a route waits on.
pub(super) struct Sources<'a> {
    pub(super) legs: &'a mut Vec<Leg>,
    pub(super) arrivals: Option<&'a Arrivals>,
    pub(super) has_more: bool,
    pub(super) may_ask: bool,
}

impl Sources<'_> {
    pub(super) fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        into.extend(self.arrivals.map(Arrivals::bell));
        into.extend(self.legs.iter().map(|leg| leg.pipeline.consumer().shared_bell()));
    }

    /// Whether topics have come. That the bus has ended its topics say, where there are any.
    pub(super) fn has_news(&self) -> bool {
        let has_ended = self.legs.is_empty() && self.arrivals.is_some_and(Arrivals::have_ended);
        has_ended || self.may_ask && (self.has_more || self.arrivals.is_some_and(Arrivals::has_news))
    }

    /// The earliest moment at which an input comes due, as far as is known.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let naps = self.legs.iter().filter_map(|leg| leg.pipeline.consumer().nap());
        naps.min().and_then(|nap| Instant::now().checked_add(nap))
    }

    /// Takes an input, beginning with the leg whose turn it is; if there is none, says whether there is news.
    pub(super) fn look(&mut self, turn: usize, planned: Option<Instant>) -> Look<Woken> {
        let count = self.legs.len();
        for index in (0..count).map(|at| (turn + at) % count) {
            match self.legs[index].pipeline.consumer_mut().take() {
                Ok(true) => return Look::Found(Woken::Input(index, Ok(()))),
                Ok(false) => {}
                Err(error) => return Look::Found(Woken::Input(index, Err(error))),
            }
        }
        if self.has_news() {
            return Look::Found(Woken::LookAgain);
        }
        if self.legs.iter().any(|leg| leg.pipeline.consumer().has_left_off()) {
            return Look::Within(Duration::ZERO);
        }
        match self.next_due() {
            None => Look::Nothing,
            Some(due) if due <= Instant::now() + SOON => Look::Within(wait::MOMENT),
            // The clock that leases end by is coarse, so that the same moment seems to come a little sooner or later.
            Some(due) if planned.is_none_or(|planned| due + SOON < planned) => Look::Found(Woken::LookAgain),
            Some(_) => Look::Nothing,
        }
    }
}
