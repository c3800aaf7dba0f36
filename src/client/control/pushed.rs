//! What the coordinator has pushed for wildcard subscriptions, until their handles take it.

use std::collections::{HashMap, HashSet, VecDeque};

use super::Granted;
use crate::coordinator::protocol::{Answer, HandleRef};

/// Pushed topics by wildcard subscription.
#[derive(Default)]
pub(super) struct Pushed {
    by_wildcard: HashMap<u64, Subscription>,
    /// Every subscription up to this number has been granted, or given up: what comes for others is ahead of its grant.
    newest: u64,
}

#[derive(Default)]
struct Subscription {
    /// So many of its topics have arrived, those that went again before they could among them.
    told: u64,
    waiting: VecDeque<Granted>,
    subscribers: Vec<HandleRef>,
}

impl Pushed {
    /// Whether there is somebody for whom a topic of this subscription comes.
    pub(super) fn is_awaited(&self, holds: &HashSet<HandleRef>, wildcard: u64) -> bool {
        wildcard > self.newest || holds.contains(&HandleRef::Wildcard { wildcard })
    }

    /// A topic has come.
    pub(super) fn add(&mut self, wildcard: u64, told: u64, subscriber: HandleRef, granted: Granted) {
        let subscription = self.by_wildcard.entry(wildcard).or_default();
        subscription.told = subscription.told.max(told);
        subscription.waiting.push_back(granted);
        subscription.subscribers.push(subscriber);
    }

    /// A topic does not come. Who comes back is told again of what it knows.
    pub(super) fn miss(&mut self, wildcard: u64, told: u64, answer: Answer) {
        let subscription = self.by_wildcard.entry(wildcard).or_default();
        if told > subscription.told {
            subscription.told = told;
            subscription.waiting.push_back((answer, Vec::new()));
        }
    }

    /// Everything up to the `told`-th topic has come.
    pub(super) fn set_told(&mut self, wildcard: u64, told: u64) {
        if let Some(subscription) = self.by_wildcard.get_mut(&wildcard) {
            subscription.told = subscription.told.max(told);
        }
    }

    /// A subscription was granted.
    pub(super) fn begin(&mut self, wildcard: u64) {
        self.newest = self.newest.max(wildcard);
        self.by_wildcard.entry(wildcard).or_default();
    }

    /// A subscription is given up. Returns the subscribers that go with it.
    pub(super) fn end(&mut self, wildcard: u64) -> Vec<HandleRef> {
        self.newest = self.newest.max(wildcard);
        self.by_wildcard.remove(&wildcard).map_or_else(Vec::new, |subscription| subscription.subscribers)
    }

    /// A subscriber of some subscription is given up alone.
    pub(super) fn forget(&mut self, subscriber: HandleRef) {
        let all = self.by_wildcard.values_mut();
        all.for_each(|subscription| subscription.subscribers.retain(|known| *known != subscriber));
    }

    /// The connection broke: what came ahead of its grant is void with it. Returns the subscribers that go.
    pub(super) fn drop_ungranted(&mut self, holds: &HashSet<HandleRef>) -> Vec<HandleRef> {
        let is_held = |wildcard: u64| holds.contains(&HandleRef::Wildcard { wildcard });
        let void: Vec<u64> = self.by_wildcard.keys().copied().filter(|wildcard| !is_held(*wildcard)).collect();
        void.into_iter().flat_map(|wildcard| self.end(wildcard)).collect()
    }

    /// Takes what has come, and how many topics have come in all.
    pub(super) fn take(&mut self, wildcard: u64) -> (Vec<Granted>, u64) {
        let subscription = self.by_wildcard.entry(wildcard).or_default();
        (subscription.waiting.drain(..).collect(), subscription.told)
    }
}
