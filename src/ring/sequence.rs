//! Places in a topic: [`Sequence`] and its comparisons, and nothing else that compares them.

use std::fmt;

/// A message's place in its topic, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sequence(u64);

impl Sequence {
    /// The sequence with this number.
    pub const fn new(number: u64) -> Self {
        Sequence(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The sequence `count` places further on.
    #[must_use]
    pub const fn advance(self, count: u64) -> Self {
        Sequence(self.0 + count)
    }

    /// How many sequences lie between `earlier` and this one; 0 where `earlier` is not earlier.
    pub const fn since(self, earlier: Sequence) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
