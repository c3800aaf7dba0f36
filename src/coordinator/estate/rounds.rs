//! What is done in parts, so that others are served in between: how much one round of the loop may take, the memory that is reserved
//! for who asked for it, and the topics of a new wildcard subscription.

use std::vec;

use super::{Estate, FOOTPRINT, Outcome};
use crate::coordinator::memory::{Reservation, TopicMemory, Wanted};
use crate::coordinator::state::{Aside, Event};
use crate::error::Refusal;

/// Words of ledgers that are walked before others have their turn: the longest window. It is the measure of all other work.
const WORDS_AT_ONCE: u64 = 1 << 20;

/// Bytes that are reserved in the time in which one word is walked.
const BYTES_PER_WORD: u64 = 2;

/// What making a segment counts, or letting go of it, however short it is.
pub(super) const SEGMENT_WORDS: u64 = 1 << 15;

/// What opening or closing a handle counts.
pub(super) const HANDLE_WORDS: u64 = 1 << 12;

/// Goes through how far others' requests have come.
pub(crate) type Others<'a> = &'a dyn Fn(&mut dyn FnMut(&Progress));

/// What is set aside to a user's account.
pub(super) fn aside_of(others: Others<'_>, uid: u32) -> Aside {
    let mut sum = Aside::default();
    others(&mut |progress| sum = [sum, progress.reservation.aside(uid)].into_iter().sum());
    sum
}

/// What it counts to find that a request has to wait for another one.
const WAITER_WORDS: u64 = 1 << 7;

/// How far a request has come that is done in parts.
#[derive(Default)]
pub(crate) struct Progress {
    /// Memory for it.
    pub(super) reservation: Reservation,
    pub(super) opening: Option<Opening>,
}

impl Progress {
    /// Whether this wildcard subscription is being opened.
    pub(crate) fn opens(&self, wildcard: u64) -> bool {
        self.opening.as_ref().is_some_and(|opening| opening.wildcard == wildcard)
    }
}

/// A wildcard subscription that is in force and lacks the cursors on these topics, which were there before it. Its owner has not
/// been answered: if that comes back without it, it is closed.
pub(super) struct Opening {
    pub(super) wildcard: u64,
    topics: vec::IntoIter<u64>,
}

impl Estate {
    /// From now on others have had their turn: a full share each for what is heard, and for what was put off before.
    pub(crate) fn begin_round(&mut self) {
        self.worked_words = 0;
    }

    /// Whether so much was done in this round that the rest is for the next.
    pub(crate) fn has_done_its_part(&self) -> bool {
        self.worked_words >= WORDS_AT_ONCE
    }

    /// Notes that something was done that takes as long as walking so many words.
    pub(super) fn count_work(&mut self, words: u64) {
        self.worked_words += words;
    }

    /// Begins with the plan of a new wildcard subscription.
    pub(super) fn begin_opening(&mut self, wildcard: u64, events: Vec<Event>) -> Result<Opening, Refusal> {
        let mut topics = Vec::new();
        self.count_work(SEGMENT_WORDS);
        for event in events {
            match event {
                Event::SubscriberOpened { topic, .. } | Event::WildcardMissed { topic, .. } => topics.push(topic),
                first => self.carry_out(first)?,
            }
        }
        Ok(Opening { wildcard, topics: topics.into_iter() })
    }

    /// Gives a new wildcard subscription its cursors, in so far as there is time for it in this round. Whether it has them all.
    pub(super) fn go_on_opening(&mut self, opening: &mut Opening, others: Others<'_>) -> Result<bool, Refusal> {
        let aside = |uid| aside_of(others, uid);
        while !self.has_done_its_part()
            && let Some(topic) = opening.topics.next()
        {
            // The topic may have gone meanwhile, or its last free cursor.
            let event = self.state.cursor_at_opening(&self.limits, FOOTPRINT, &aside, opening.wildcard, topic);
            let Some(event) = event else { continue };
            let is_own = matches!(event, Event::SubscriberOpened { own: Some(_), .. });
            self.count_work(if is_own { SEGMENT_WORDS } else { 2 * HANDLE_WORDS });
            self.carry_out_for_others(event)?;
        }
        Ok(opening.topics.len() == 0)
    }

    /// Reserves what these events need, in so far as there is time for it in this round. Whether it is all there.
    pub(super) fn reserve_for(
        &mut self,
        events: &[Event],
        reservation: &mut Reservation,
        others: Others<'_>,
    ) -> Result<bool, Refusal> {
        let (payer, wanted) = self.wanted_for(events);
        if !reservation.is_for(payer, &wanted) {
            // What it was for is there by now, say.
            *reservation = Reservation::default();
            if wanted.is_empty() || self.has_done_its_part() {
                return Ok(wanted.is_empty());
            }
            if self.is_under_way(events, others) {
                self.put_off();
                return Ok(false);
            }
            self.count_work(SEGMENT_WORDS * wanted.len() as u64);
            *reservation = Reservation::begin(payer, wanted)?;
        }
        self.reserve(reservation)
    }

    /// Whether what these events bring into being is being reserved for another request: programs that start together ask for the
    /// same. The first one makes it, and the others find it.
    pub(super) fn is_under_way(&self, events: &[Event], others: Others<'_>) -> bool {
        let (payer, wanted) = self.wanted_for(events);
        let mut is_under_way = false;
        others(&mut |progress| is_under_way |= progress.reservation.is_ahead_of(payer, &wanted));
        is_under_way
    }

    /// Puts off a request that waits for another one. It counts little: however many wait, that one goes on.
    pub(super) fn put_off(&mut self) -> Outcome {
        self.count_work(WAITER_WORDS);
        Outcome::PutOff
    }

    /// Goes on with a reservation in what is left of this round. Whether it is all there.
    fn reserve(&mut self, reservation: &mut Reservation) -> Result<bool, Refusal> {
        let missing = reservation.missing_bytes();
        if missing > 0 && !self.has_done_its_part() {
            let bytes = missing.min((WORDS_AT_ONCE - self.worked_words) * BYTES_PER_WORD);
            self.count_work(bytes / BYTES_PER_WORD);
            reservation.reserve(bytes)?;
        }
        Ok(reservation.missing_bytes() == 0)
    }

    /// The segments that these events bring into being, and to whose limits they count: those of one event, no plan has two of the
    /// kind. Cursors of a subscriber's own are too small to be put off.
    fn wanted_for(&self, events: &[Event]) -> (u32, Vec<Wanted>) {
        let wanted = events.iter().find_map(|event| match event.plain() {
            Event::TopicCreated { info, uid, .. } => Some((*uid, TopicMemory::first_segments(info))),
            Event::ArenaAdded { topic, slot, .. } => {
                let entry = self.state.topic(*topic)?;
                let is_there = self.memory(*topic).is_ok_and(|memory| memory.has_arena(*slot));
                (!is_there).then(|| (entry.uid, vec![TopicMemory::arena_segment(&entry.info, *slot)]))
            }
            Event::GroupCreated { topic, info, .. } => {
                let entry = self.state.topic(*topic)?;
                Some((entry.uid, vec![TopicMemory::ledger_segment(&entry.info, info)]))
            }
            _ => None,
        });
        wanted.unwrap_or_default()
    }
}
