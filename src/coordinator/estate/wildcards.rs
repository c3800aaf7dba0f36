//! What the owners of wildcard subscriptions are told of topics that come, and the notices that wake them.

use std::collections::HashSet;

use super::{Estate, Granted};
use crate::coordinator::protocol::{Answer, HandleRef};
use crate::error::Refusal;

/// A topic that came for a wildcard subscription.
#[derive(Clone, Copy, Debug)]
pub(crate) struct News {
    pub(crate) incarnation: u64,
    pub(crate) wildcard: u64,
    /// How many the subscription has had, with this one; 0 where the owner learns that in another way.
    pub(crate) told: u64,
    what: NewsOf,
}

/// What became of a topic for a wildcard subscription.
#[derive(Clone, Copy, Debug)]
pub(super) enum NewsOf {
    Cursor { topic: u64, cursor: u32 },
    Missed,
}

impl Estate {
    /// Takes the subscribers of which the owners of wildcard subscriptions are to be told.
    pub(crate) fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// What a returning participant's wildcard subscriptions have and it does not name, and how many each has had.
    pub(crate) fn news_for(&self, incarnation: u64, holds: &[HandleRef]) -> (Vec<News>, Vec<(u64, u64)>) {
        let named: HashSet<HandleRef> = holds.iter().copied().collect();
        let unnamed = self.state.handles_of(incarnation).into_iter().filter(|handle| !named.contains(handle));
        let news = unnamed.filter_map(|handle| {
            let (wildcard, HandleRef::Subscriber { topic, cursor }) = (self.state.wildcard_of(handle)?, handle) else {
                return None;
            };
            Some(News { incarnation, wildcard, told: 0, what: NewsOf::Cursor { topic, cursor } })
        });
        let wildcards = self.state.wildcards().iter().filter(|(_, entry)| entry.incarnation == incarnation);
        let mine = wildcards.clone();
        let missed = mine.flat_map(|(&wildcard, entry)| {
            let of = move |told| News { incarnation, wildcard, told, what: NewsOf::Missed };
            entry.missed.iter().map(move |missed| of(missed.number))
        });
        (news.chain(missed).collect(), wildcards.map(|(wildcard, entry)| (*wildcard, entry.opened)).collect())
    }

    /// A wildcard subscription's new subscriber, for its owner. Its cursor is where it was put in force: nobody reads yet.
    pub(super) fn wildcard_topic(&self, news: News) -> Result<Option<Granted>, Refusal> {
        let News { wildcard, told, what, .. } = news;
        let NewsOf::Cursor { topic, cursor } = what else { return Ok(Some((self.missed(wildcard, told), Vec::new()))) };
        let memory = self.memory(topic).ok();
        let found = memory.and_then(|memory| Some((memory, memory.cursor_place(cursor)?)));
        let subscriber = HandleRef::Subscriber { topic, cursor };
        let Some((memory, place)) = found.filter(|_| self.state.wildcard_of(subscriber) == Some(wildcard)) else {
            return Ok(Some((Answer::WildcardTold { wildcard, told }, Vec::new())));
        };
        let (segments, fds) = memory.subscriber_fds(cursor)?.into_iter().unzip();
        let (info, position, sequence) = (self.entry(topic)?.info.clone(), place.position, place.sequence);
        Ok(Some((Answer::WildcardTopic { wildcard, told, info, cursor, position, sequence, segments }, fds)))
    }

    /// What a wildcard subscription has missed, by its number.
    fn missed(&self, wildcard: u64, told: u64) -> Answer {
        let entry = self.state.wildcards().get(&wildcard);
        match entry.and_then(|entry| entry.missed.iter().find(|missed| missed.number == told)) {
            Some(missed) => {
                Answer::WildcardMissed { wildcard, told, topic: missed.name.clone(), why: missed.why.clone() }
            }
            // It has missed so many since that the last of them have to stand for all.
            None => Answer::WildcardTold { wildcard, told },
        }
    }

    /// Wakes a wildcard subscription's owner, after it has been sent what there is.
    pub(crate) fn tell(&self, wildcard: u64) {
        if let Some(entry) = self.state.wildcards().get(&wildcard) {
            self.notices.tell(wildcard, entry.opened);
        }
    }

    pub(super) fn add_news(&mut self, incarnation: u64, wildcard: u64, what: NewsOf) {
        let told = self.state.wildcards().get(&wildcard).map_or(0, |entry| entry.opened);
        self.news.push(News { incarnation, wildcard, told, what });
    }

    pub(super) fn give_up_notices(&mut self) {
        let held = self.state.wildcards();
        self.notices.retain(|wildcard| held.contains_key(&wildcard));
    }
}
