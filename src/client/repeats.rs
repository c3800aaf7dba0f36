//! For consumers whose results go where the bus cannot follow: which messages have been processed already.

use std::collections::{HashSet, VecDeque};

/// Remembers the last messages by publisher and number, and tells a repeat.
///
/// A consumer that dies between its work and its ack gets the message again. Where the work can be part of a transaction,
/// store the sequence in it and start there ([`Start::Sequence`](crate::Start::Sequence)) after a restart. Where it cannot,
/// store what [`Repeats::iter`] gives beside the results, put it back with `extend`, and skip what
/// [`Repeats::is_new`] denies.
///
/// ```
/// # use shmbus::Repeats;
/// let mut repeats = Repeats::new(10_000);
/// assert!(repeats.is_new(7, 1)); // publisher 7, its message 1: process it
/// assert!(!repeats.is_new(7, 1)); // again: skip it, and ack
/// ```
#[derive(Clone, Debug)]
pub struct Repeats {
    capacity: usize,
    known: HashSet<(u64, u64)>,
    order: VecDeque<(u64, u64)>,
}

impl Repeats {
    /// Remembers the last `capacity` messages (at least one): as many as may lie between a message and its repeat.
    pub fn new(capacity: usize) -> Repeats {
        Repeats { capacity: capacity.max(1), known: HashSet::new(), order: VecDeque::new() }
    }

    /// Whether the message has not been seen yet; notes it.
    pub fn is_new(&mut self, publisher: u64, number: u64) -> bool {
        if !self.known.insert((publisher, number)) {
            return false;
        }
        self.order.push_back((publisher, number));
        if self.order.len() > self.capacity
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }

    /// What is remembered, the oldest first: (publisher, number).
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.order.iter().copied()
    }
}

impl Extend<(u64, u64)> for Repeats {
    fn extend<I: IntoIterator<Item = (u64, u64)>>(&mut self, messages: I) {
        for (publisher, number) in messages {
            self.is_new(publisher, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_forgotten_first() {
        let mut repeats = Repeats::new(3);
        assert!((1..=3).all(|number| repeats.is_new(1, number)));
        assert!(!repeats.is_new(1, 1));
        assert!(repeats.is_new(2, 1), "another publisher's");
        assert!(repeats.is_new(1, 1), "1 was the oldest of four");
        let mut restored = Repeats::new(3);
        restored.extend(repeats.iter());
        assert!(!restored.is_new(2, 1) && restored.is_new(1, 2));
    }
}
