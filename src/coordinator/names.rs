//! Identities on a topic: which publisher has which, and what it committed last (ARCHITECTURE.md §4.6).

use crate::coordinator::limits::MAX_IDENTITIES;
use crate::coordinator::protocol::{Identity, NameStatus, TopicInfo};
use crate::coordinator::state::{Event, PublisherEntry, TopicEntry};
use crate::error::Refusal;
use crate::topic::{Mode, check_name};

/// What is known of an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NameEntry {
    /// What its messages carry as their publisher.
    pub(crate) publisher: u64,
    /// What it had committed last when it was last settled.
    pub(crate) last_number: u64,
    /// The slot of who has it.
    pub(crate) holder: Option<u32>,
}

impl TopicEntry {
    /// A publisher comes under an identity.
    pub(super) fn attach_identity(&mut self, slot: u32, opened: &PublisherEntry) {
        let Some(identity) = &opened.identity else { return };
        let new = NameEntry { publisher: opened.publisher, last_number: 0, holder: None };
        let former = self.identities.entry(identity.clone()).or_insert(new).holder.replace(slot);
        // Settled before, unless its memory is garbled: one identity has one holder.
        if let Some(former) = former.and_then(|former| self.publishers.get_mut(&former)) {
            former.identity = None;
        }
    }

    /// A publisher loses its identity, and keeps its slot.
    pub(super) fn settle_identity(&mut self, slot: u32, last_number: u64) {
        let Some(identity) = self.publishers.get_mut(&slot).and_then(|publisher| publisher.identity.take()) else {
            return;
        };
        if let Some(name) = self.identities.get_mut(&identity) {
            (name.last_number, name.holder) = (last_number, None);
        }
    }

    /// A publisher leaves. An identity that it still has could not be settled: the last number stays what it was.
    pub(super) fn remove_publisher(&mut self, slot: u32) -> Option<PublisherEntry> {
        let removed = self.publishers.remove(&slot)?;
        let name = removed.identity.as_ref().and_then(|identity| self.identities.get_mut(identity));
        name.into_iter().for_each(|name| name.holder = None);
        Some(removed)
    }

    /// What a publisher's identity had committed last before it came.
    pub(crate) fn number_before(&self, opened: &PublisherEntry) -> Option<u64> {
        let identity = opened.identity.as_ref()?;
        Some(self.identities.get(identity).map_or(0, |name| name.last_number))
    }

    /// Publishers that are fenced in the registry and may not be in the log.
    pub(crate) fn unsettled(&self) -> Vec<u32> {
        let unsettled = |publisher: &PublisherEntry| publisher.fenced && publisher.identity.is_some();
        self.publishers.iter().filter(|(_, publisher)| unsettled(publisher)).map(|(slot, _)| *slot).collect()
    }

    /// The names greater than `after`, with what `last_number` knows of a holder's slot.
    pub(crate) fn names<'a>(
        &'a self,
        after: Option<&'a str>,
        last_number: impl Fn(u32) -> Option<u64> + 'a,
    ) -> impl Iterator<Item = NameStatus> + 'a {
        self.identities.iter().filter_map(move |(identity, known)| {
            let Identity::Named(name) = identity else { return None };
            let later = after.is_none_or(|after| name.as_str() > after);
            later.then(|| NameStatus {
                name: name.clone(),
                publisher: known.publisher,
                last_number: known.holder.and_then(&last_number).unwrap_or(known.last_number),
                slot: known.holder,
            })
        })
    }
}

/// Whether an identity can be one.
pub(super) fn check(identity: &Identity) -> Result<(), Refusal> {
    match identity {
        Identity::Named(name) => check_name(name).map_err(|source| Refusal::Name { name: shown(name), source }),
        Identity::Origin { .. } => Ok(()),
    }
}

/// The part of a refused name that is repeated in the error.
fn shown(name: &str) -> String {
    name.chars().take(64).collect()
}

/// Whether the topic keeps numbers at all.
pub(super) fn check_mode(info: &TopicInfo) -> Result<(), Refusal> {
    if info.options.mode != Mode::Channel {
        return Ok(());
    }
    let problem = "a channel keeps no names and numbers; use an exclusive topic or one for many".to_owned();
    Err(Refusal::Options { topic: info.name.clone(), problem })
}

/// Whether the topic can remember one more identity of this kind.
pub(super) fn check_room(entry: &TopicEntry, identity: &Identity) -> Result<(), Refusal> {
    let same_kind = |known: &&Identity| std::mem::discriminant(*known) == std::mem::discriminant(identity);
    if entry.identities.contains_key(identity) || entry.identities.keys().filter(same_kind).count() < MAX_IDENTITIES {
        return Ok(());
    }
    let what = format!("names of publishers on topic {:?}", entry.info.name);
    let mend = "use names again, or publish without one".to_owned();
    Err(Refusal::Limit { what, limit: MAX_IDENTITIES as u64, mend })
}

/// What it takes that nobody has an identity any more, where somebody lives who has it. On exclusive topics its slot
/// being taken has refused the newcomer before.
pub(super) fn fencing(entry: &TopicEntry, identity: &Identity) -> Option<Event> {
    let holder = entry.identities.get(identity)?.holder?;
    Some(Event::Fenced { topic: entry.info.id, slot: holder })
}
