//! What is done in parts, so that others are served in between: how much one round of the loop may take, the memory that is reserved
//! for who asked for it, and the topics of a new wildcard subscription.

use std::vec;

use super::{Estate, FOOTPRINT};
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

/// What is set aside for others' requests to a user's account.
pub(crate) type Others<'a> = &'a dyn Fn(u32) -> Aside;

/// How far a request has come that is done in parts.
#[derive(Default)]
pub(crate) struct Progress {
    /// Memory for it.
    pub(super) reservation: Reservation,
    pub(super) opening: Option<Opening>,
}

impl Progress {
    /// What counts to a user's limits already.
    pub(crate) fn aside(&self, uid: u32) -> Aside {
        self.reservation.aside(uid)
    }
}

/// A wildcard subscription that is in force and lacks the cursors on these topics, which were there before it. Its owner has not
/// been answered: if that comes back without it, it is closed.
pub(super) struct Opening {
    pub(super) wildcard: u64,
    topics: vec::IntoIter<u64>,
}

impl Estate {
    /// From now on others have had their turn.
    pub(crate) fn begin_round(&mut self) {
        self.worked = 0;
    }

    /// Whether so much was done in this round that the rest is for the next.
    pub(crate) fn has_done_its_part(&self) -> bool {
        self.worked >= WORDS_AT_ONCE
    }

    /// Notes that something was done that takes as long as walking so many words.
    pub(super) fn count_work(&mut self, words: u64) {
        self.worked += words;
    }

    /// Begins with the plan of a new wildcard subscription.
    pub(super) fn begin_opening(&mut self, wildcard: u64, events: Vec<Event>) -> Result<Opening, Refusal> {
        let mut topics = Vec::new();
        for event in events {
            match event {
                Event::SubscriberOpened { topic, .. } | Event::WildcardMissed { topic, .. } => topics.push(topic),
                first => self.carry_out(first)?,
            }
        }
        Ok(Opening { wildcard, topics: topics.into_iter() })
    }

    /// Gives a new wildcard subscription its cursors, in so far as there is time for it in this round. Whether it has them all.
    pub(super) fn go_on_opening(&mut self, opening: &mut Opening) -> Result<bool, Refusal> {
        while !self.has_done_its_part()
            && let Some(topic) = opening.topics.next()
        {
            self.count_work(2 * HANDLE_WORDS);
            // The topic may have gone meanwhile, or its last free cursor.
            let start = self.state.wildcards().get(&opening.wildcard).map(|entry| entry.start);
            let event = start.and_then(|start| self.state.cursor_for(opening.wildcard, topic, start, FOOTPRINT));
            event.map_or(Ok(()), |event| self.carry_out_for_others(event))?;
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
            if wanted.is_empty() {
                *reservation = Reservation::default();
                return Ok(true);
            }
            if self.has_done_its_part() {
                return Ok(false);
            }
            self.check_beside(payer, &wanted, others)?;
            self.count_work(SEGMENT_WORDS * wanted.len() as u64);
            *reservation = Reservation::begin(payer, wanted)?;
        }
        self.reserve(reservation)
    }

    /// Goes on with a reservation in what is left of this round. Whether it is all there.
    pub(super) fn reserve(&mut self, reservation: &mut Reservation) -> Result<bool, Refusal> {
        let missing = reservation.missing();
        if missing == 0 || self.has_done_its_part() {
            return Ok(missing == 0);
        }
        let bytes = missing.min((WORDS_AT_ONCE - self.worked) * BYTES_PER_WORD);
        self.count_work(bytes / BYTES_PER_WORD);
        reservation.reserve(bytes)?;
        Ok(reservation.missing() == 0)
    }

    /// The segments that these events bring into being, and to whose budget they count. Cursors of a subscriber's own are too
    /// small to be put off.
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

    /// What is being reserved for others counts like what they have.
    fn check_beside(&self, payer: u32, wanted: &[Wanted], others: Others<'_>) -> Result<(), Refusal> {
        let bytes = wanted.iter().map(|wanted| wanted.promise.len_bytes).sum();
        let more = Aside { bytes, segments: wanted.len() };
        let topic = wanted.first().map_or("", |wanted| &wanted.topic);
        self.state.check_beside(&self.limits, payer, topic, others(payer), more)
    }
}
