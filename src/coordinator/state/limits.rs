//! What each user has, and may have (`coordinator/limits.rs`). Bytes are counted where memory is given.

use std::iter::Sum;

use super::{Decider, State, TopicEntry};
use crate::coordinator::limits::Limits;
use crate::error::Refusal;
use crate::topic::Mode;

/// What the topics of one user are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owned {
    pub(super) topics: usize,
    pub(super) segments: usize,
}

/// What is being reserved for a user's requests and is not his yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Aside {
    pub(crate) bytes: u64,
    pub(crate) segments: usize,
}

/// What is set aside for a user, by his number.
pub(crate) type AsideOf<'a> = &'a dyn Fn(u32) -> Aside;

impl Sum for Aside {
    fn sum<I: Iterator<Item = Aside>>(all: I) -> Aside {
        all.fold(Aside::default(), |sum, one| Aside {
            bytes: sum.bytes.saturating_add(one.bytes),
            segments: sum.segments + one.segments,
        })
    }
}

/// The segments of a new topic.
pub(super) fn first_segments(mode: Mode) -> usize {
    match mode {
        Mode::Channel => 1,
        // Log, cursors, the first arena.
        Mode::Many | Mode::Exclusive => 3,
    }
}

impl TopicEntry {
    pub(crate) fn segments(&self) -> usize {
        // The first arena is counted among the first segments.
        first_segments(self.info.options.mode) + self.arenas.len() - 1 + self.groups.len()
    }
}

impl State {
    /// Something of a user's has gone.
    pub(super) fn disown(&mut self, uid: u32, topics: usize, segments: usize) {
        let Some(owned) = self.owned.get_mut(&uid) else { return };
        owned.topics = owned.topics.saturating_sub(topics);
        owned.segments = owned.segments.saturating_sub(segments);
        self.owned.retain(|_, owned| *owned != Owned::default());
    }

    /// Counts a segment to the user for whom alone it is, or does so no longer.
    pub(super) fn count_segment(&mut self, uid: u32, bytes: u64, has: bool) {
        if has {
            *self.reserved.entry(uid).or_default() += bytes;
            self.owned.entry(uid).or_default().segments += 1;
            return;
        }
        self.disown(uid, 0, 1);
        if let Some(reserved) = self.reserved.get_mut(&uid) {
            *reserved = reserved.saturating_sub(bytes);
        }
        self.reserved.retain(|_, bytes| *bytes > 0);
    }

    pub(super) fn check_user_participants(&self, limits: &Limits, uid: u32) -> Result<(), Refusal> {
        let connected = self.participants.values().filter(|participant| participant.uid == uid).count();
        let mend = "end some programs of this user that use the bus";
        check(&format!("participants of user {uid}"), connected + 1, limits.user_participants, mend)
    }
}

impl Decider<'_> {
    pub(super) fn check_budget(&self, name: &str, uid: u32, needed: u64) -> Result<(), Refusal> {
        let budget = self.limits.budget_bytes;
        let taken = self.state.reserved.get(&uid).copied().unwrap_or(0) + (self.aside)(uid).bytes;
        let available = budget.saturating_sub(taken);
        if needed <= available {
            return Ok(());
        }
        Err(Refusal::Budget { topic: name.to_owned(), needed, available, budget })
    }

    pub(super) fn check_handles(&self) -> Result<(), Refusal> {
        self.check_handles_of(self.incarnation, 1)
    }

    /// Whether a participant may hold `more` handles.
    pub(super) fn check_handles_of(&self, incarnation: u64, more: usize) -> Result<(), Refusal> {
        let held = self.state.participants.get(&incarnation).map_or(0, |p| p.handles.len());
        if held + more <= self.limits.handles {
            return Ok(());
        }
        let what = "publishers, subscribers and consumers of one process".to_owned();
        Err(Refusal::Limit { what, limit: self.limits.handles as u64, mend: "close some".to_owned() })
    }

    /// Whether a user may have so many more.
    pub(super) fn check_owned(&self, uid: u32, topics: usize, segments: usize) -> Result<(), Refusal> {
        let owned = self.state.owned.get(&uid).copied().unwrap_or_default();
        let mend = "remove some of his topics with `shmbus rm`";
        check(&format!("topics of user {uid}"), owned.topics + topics, self.limits.user_topics, mend)?;
        let segments = owned.segments + (self.aside)(uid).segments + segments;
        let mend = "remove topics or groups, or raise the coordinator's limit of descriptors (ulimit -n)";
        check(&format!("segments of user {uid}"), segments, self.limits.user_segments, mend)
    }
}

fn check(what: &str, wanted: usize, limit: usize, mend: &str) -> Result<(), Refusal> {
    if wanted <= limit {
        return Ok(());
    }
    Err(Refusal::Limit { what: what.to_owned(), limit: limit as u64, mend: mend.to_owned() })
}
