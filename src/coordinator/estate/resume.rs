//! Taking over what an earlier coordinator left: its registry is replayed, its descriptors are taken from the store,
//! and what it had begun is finished.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::events::segment_parts;
use super::{Estate, FOOTPRINT};
use crate::coordinator::adoption::Gathered;
use crate::coordinator::link::{Link, participant_name, segment_name, space_name};
use crate::coordinator::memory::TopicMemory;
use crate::coordinator::notices::notice_name;
use crate::coordinator::protocol::{HandleRef, StartAt};
use crate::coordinator::registry::{Registry, RegistryError};
use crate::coordinator::state::{Event, State, TopicEntry};
use crate::ring::log::TopicState;

impl Estate {
    /// The bus that an earlier coordinator left: `store` is what the keeper kept of it, or its participants, of whom `gathered` says more.
    pub(crate) fn resume(
        mut store: BTreeMap<String, OwnedFd>,
        gathered: &Gathered,
        registry: OwnedFd,
        path: Option<&Path>,
        link: Option<Link>,
    ) -> Result<Estate, (RegistryError, Option<Link>)> {
        let (registry, events) = match Registry::open(registry, path) {
            Ok(opened) => opened,
            Err(error) => return Err((error, link)),
        };
        let (mut state, mut removed) = (State::default(), Vec::new());
        for event in &events {
            if let Event::TopicRemoved { topic } = event.plain() {
                removed.extend(state.topic(*topic).cloned());
            }
            state.apply(event);
        }
        let mut estate = Estate::new(state, registry, link);
        estate.unkept.clone_from(&gathered.unkept);
        removed.iter().for_each(|entry| estate.finish_removal(entry, &mut store));
        let mut losses = estate.adopt(&mut store);
        estate.renew_own_cursors();
        losses.extend(estate.adopt_groups(&mut store));
        for event in losses {
            if let Err(error) = estate.carry_out(event) {
                eprintln!("shmbus coordinator: {error}");
            }
        }
        // What was stored but never logged belongs to nobody; before anything else is stored under such a name.
        store.into_keys().for_each(|name| estate.forget(name));
        estate.replace_lost_arenas(gathered);
        estate.record_all_segments();
        estate.finish_fencing();
        estate.repair_wildcards();
        if estate.state.ending {
            estate.end_topics();
        }
        Ok(estate)
    }

    /// Lets everybody who holds a removed topic know, if the coordinator that removed it may have died before it did:
    /// then the store has the topic yet, and the registry was not compacted since.
    fn finish_removal(&mut self, entry: &TopicEntry, store: &mut BTreeMap<String, OwnedFd>) {
        let segments = segments_of(entry, store);
        let names: Vec<String> = segments.iter().map(|(name, _)| segment_name(entry.info.id, name)).collect();
        // Segments are missing only if their names have been given up, and that comes after the end.
        if let Ok(memory) = TopicMemory::adopt_to_end(&entry.info, segments) {
            memory.end(TopicState::Removed);
        }
        names.into_iter().for_each(|name| self.forget(name));
    }

    /// Fences whom the registry says to be fenced, if the coordinator that wrote it may have died before it did.
    fn finish_fencing(&mut self) {
        let topics = self.state.topics().values();
        let unsettled: Vec<(u64, u32)> =
            topics.flat_map(|entry| entry.unsettled().into_iter().map(|slot| (entry.info.id, slot))).collect();
        for (topic, slot) in unsettled {
            // If it fails now, whoever asks for the identity next tries again.
            if let Err(error) = self.fence(topic, slot) {
                eprintln!("shmbus coordinator: fencing publisher slot {slot} of topic {topic}: {error}");
            }
        }
    }

    /// Takes every descriptor that the registry names out of the store; what cannot be had any more, leaves.
    fn adopt(&mut self, store: &mut BTreeMap<String, OwnedFd>) -> Vec<Event> {
        let mut losses = Vec::new();
        for (&topic, entry) in self.state.topics() {
            match TopicMemory::adopt(&entry.info, segments_of(entry, store)) {
                Ok(memory) => {
                    self.ageing.extend((entry.info.options.max_age_ms > 0).then_some(topic));
                    self.memories.insert(topic, memory);
                }
                Err(error) => {
                    eprintln!("shmbus coordinator: topic {:?} is lost: {error}", entry.info.name);
                    losses.push(Event::TopicRemoved { topic });
                }
            }
        }
        for (&incarnation, participant) in self.state.participants() {
            let pidfd = store.remove(&participant_name(incarnation));
            // Who was not recognized has not been let in, and will come as a newcomer.
            match pidfd.filter(|_| participant.birth.is_some()) {
                Some(pidfd) => drop(self.pidfds.insert(incarnation, pidfd)),
                None => losses.extend(self.state.leave(incarnation)),
            }
            self.spaces.extend(store.remove(&space_name(incarnation)).map(|space| (incarnation, space)));
        }
        for &wildcard in self.state.wildcards().keys() {
            // Its owner may still write its cursors. Without a notice they stay in force all the same, and the owner is asked
            // for it when it comes.
            let fd = store.remove(&notice_name(wildcard));
            let adopted = fd.map(|fd| self.notices.adopt(self.state.bus, wildcard, fd));
            if let Some(Err(error)) = adopted {
                eprintln!("shmbus coordinator: the notice of wildcard subscription {wildcard}: {error}");
            }
        }
        losses
    }

    /// Cursors that one subscriber has for itself hold nobody. Where they are lost to all but it, or garbled by it, others stand in for
    /// them, which show where it began.
    fn renew_own_cursors(&mut self) {
        for (topic, entry) in self.state.topics() {
            let Some(memory) = self.memories.get_mut(topic) else { continue };
            for (&cursor, subscriber) in entry.subscribers.iter().filter(|(_, subscriber)| subscriber.own.is_some()) {
                if memory.has_own_cursors(cursor) {
                    continue;
                }
                let renewed = memory.add_own_cursors(cursor, true);
                let joined = renewed
                    .and_then(|()| memory.join(cursor, subscriber.incarnation, StartAt::Oldest, subscriber.droppable));
                if let Err(error) = joined {
                    eprintln!("shmbus coordinator: cursor {cursor} of topic {topic}: {error}");
                }
            }
        }
    }

    /// Finishes what a dead coordinator had begun for wildcard subscriptions: a topic whose creation was logged may lack
    /// their cursors, or have them in the registry only. Nobody was told of such a topic, so nothing has been missed.
    fn repair_wildcards(&mut self) {
        for (wildcard, topic) in self.state.missing_cursors() {
            let event = self.state.cursor_for(wildcard, topic, StartAt::Oldest, FOOTPRINT);
            if let Err(error) = event.map_or(Ok(()), |event| self.carry_out_for_others(event)) {
                eprintln!("shmbus coordinator: topic {topic} is not in wildcard subscription {wildcard}: {error}");
            }
        }
        for &wildcard in self.state.wildcards().keys() {
            for handle in self.state.cursors_of_wildcard(wildcard) {
                self.repair_cursor(handle);
            }
        }
        // Their owners come back for what was opened while they had no connection.
        self.news.clear();
        self.state.wildcards().keys().for_each(|wildcard| self.tell(*wildcard));
    }

    /// Puts a cursor in force that is so in the registry only.
    fn repair_cursor(&self, handle: HandleRef) {
        let HandleRef::Subscriber { topic, cursor } = handle else { return };
        let entry = self.state.topic(topic).and_then(|entry| entry.subscribers.get(&cursor));
        if let (Some(entry), Ok(memory)) = (entry, self.memory(topic))
            && !memory.is_in_force(cursor, entry.incarnation)
            && let Err(error) = memory.join(cursor, entry.incarnation, entry.start, entry.droppable)
        {
            eprintln!("shmbus coordinator: cursor {cursor} of topic {topic}: {error}");
        }
    }
}

/// A topic's segments in the store; an arena that was never logged stays there, as an orphan.
fn segments_of(entry: &TopicEntry, store: &mut BTreeMap<String, OwnedFd>) -> Vec<(String, OwnedFd)> {
    let names = segment_parts(entry).into_iter();
    names.filter_map(|name| Some((name.clone(), store.remove(&segment_name(entry.info.id, &name))?))).collect()
}
