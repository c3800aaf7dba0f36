//! Events carried out, one by one: before they are logged, the log, and after it.

use super::wildcards::NewsOf;
use super::{Estate, broken, system};
use crate::coordinator::estate::groups::ConsumerRef;
use crate::coordinator::link::{participant_name, segment_name, space_name};
use crate::coordinator::memory::{TopicMemory, own_cursors_name};
use crate::coordinator::notices::notice_name;
use crate::coordinator::protocol::{HandleRef, TopicInfo};
use crate::coordinator::state::{Event, TopicEntry, missed_event};
use crate::error::Refusal;
use crate::ring::log::TopicState;

impl Estate {
    pub(super) fn carry_out_all(&mut self, events: Vec<Event>) -> Result<(), Refusal> {
        // Many consumers of a group may be given back at once, and one walk of its ledger will do.
        let closed = events.iter().filter_map(|event| match event.plain() {
            Event::Closed { handle } => Some(*handle),
            _ => None,
        });
        self.released = self.release_consumers_among(&closed.collect());
        let carried_out = events.into_iter().try_for_each(|event| self.carry_out_for_others(event));
        self.released.clear();
        carried_out
    }

    /// A wildcard subscription that cannot have a topic, for want of a descriptor say, misses it and is told so: whoever
    /// creates a topic has nothing to do with that, nor have the subscription's other topics.
    pub(super) fn carry_out_for_others(&mut self, event: Event) -> Result<(), Refusal> {
        let concerned = match &event {
            Event::SubscriberOpened { topic, wildcard: Some(wildcard), .. } => Some((*topic, *wildcard)),
            _ => None,
        };
        match (self.carry_out(event), concerned) {
            (Err(why), Some((topic, wildcard))) => {
                let info = self.entry(topic)?.info.clone();
                self.carry_out(missed_event(wildcard, &info, why))
            }
            (outcome, _) => outcome,
        }
    }

    pub(super) fn carry_out(&mut self, logged: Event) -> Result<(), Refusal> {
        let event = logged.plain();
        self.prepare(event)?;
        self.log(&logged)?;
        // Who is about to lose the topic or participant is known only before the event is applied.
        let (given_up, groups) = (self.names_given_up(event), self.groups_concerned(event));
        self.state.apply(&logged);
        let acted = self.act(event);
        self.follow_groups(groups);
        let recorded = match event {
            Event::TopicCreated { info: TopicInfo { id: topic, .. }, .. }
            | Event::ArenaAdded { topic, .. }
            | Event::GroupCreated { topic, .. }
            | Event::SubscriberOpened { topic, own: Some(_), .. } => self.record_segments(*topic),
            Event::WildcardOpened { wildcard, .. } => self.record_notice(*wildcard),
            _ => Ok(()),
        };
        // Last: as long as the keeper has them a successor can act in our place.
        given_up.into_iter().for_each(|name| self.forget(name));
        acted.and(recorded)
    }

    /// Before the event is logged: new memory is created and stored, what is given back is taken out of force.
    pub(super) fn prepare(&mut self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::TopicCreated { info, .. } => {
                let memory = TopicMemory::create(info, &mut self.at_hand)?;
                if let Err(refusal) = self.store_segments(info.id, &memory) {
                    memory.let_go();
                    return Err(refusal);
                }
                self.memories.insert(info.id, memory);
                self.ageing.extend((info.options.max_age_ms > 0).then_some(info.id));
            }
            Event::ArenaAdded { topic, slot, .. } => self.prepare_arena(*topic, *slot)?,
            Event::GroupCreated { topic, info, start, replaces, .. } => {
                self.prepare_group(*topic, info, *start, *replaces)?;
            }
            Event::GroupRetired { topic, group } => self.fence_group(*topic, *group)?,
            Event::SubscriberOpened { topic, cursor, own: Some(_), .. } => {
                let memory = self.memories.get_mut(topic).ok_or_else(|| broken("a subscriber without a topic"))?;
                memory.add_own_cursors(*cursor, false)?;
                self.store_segment(*topic, &own_cursors_name(*cursor))?;
            }
            // What is there under its number is what a subscriber that was never logged has left.
            Event::SubscriberOpened { topic, cursor, .. } => {
                self.memories.get_mut(topic).into_iter().for_each(|memory| memory.drop_own_cursors(*cursor));
            }
            Event::PublisherOpened { opened, .. } => self.check_origin(opened.identity.as_ref())?,
            // Once it is logged it must succeed.
            Event::Fenced { topic, .. } => self.memory(*topic)?.has_room_for_fence()?,
            Event::WildcardOpened { wildcard, .. } => {
                let fd = self.notices.add(self.state.bus, *wildcard).map_err(|e| system("reserving a notice", &e))?;
                if let Some(link) = &mut self.link {
                    link.store(&notice_name(*wildcard), fd)?;
                }
            }
            Event::Closed { handle } if self.released.remove(handle) => {}
            Event::Closed { handle } => self.release(*handle)?,
            Event::Left { incarnation } => {
                self.release_all(self.state.handles_of(*incarnation).into_iter().collect())?
            }
            _ => {}
        }
        Ok(())
    }

    /// After the event was logged and applied.
    fn act(&mut self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::PublisherOpened { topic, slot, opened } => {
                let before = self.entry(*topic)?.number_before(opened);
                if let Err(refusal) = self.memory(*topic)?.begin_publisher(*slot, opened, before) {
                    self.carry_out(Event::Closed { handle: HandleRef::Publisher { topic: *topic, slot: *slot } })?;
                    return Err(refusal);
                }
            }
            Event::Fenced { topic, slot } => self.fence(*topic, *slot)?,
            Event::SubscriberOpened { topic, cursor, incarnation, start, droppable, wildcard, .. } => {
                match self.memory(*topic)?.join(*cursor, *incarnation, *start, *droppable) {
                    Ok(joined) => match wildcard {
                        Some(wildcard) => {
                            let what = NewsOf::Cursor { topic: *topic, cursor: *cursor };
                            self.add_news(*incarnation, *wildcard, what);
                        }
                        None => self.joined = Some(joined),
                    },
                    Err(refusal) => {
                        let handle = HandleRef::Subscriber { topic: *topic, cursor: *cursor };
                        self.carry_out(Event::Closed { handle })?;
                        return Err(refusal);
                    }
                }
            }
            Event::WildcardMissed { wildcard, .. } => {
                if let Some(incarnation) = self.state.wildcards().get(wildcard).map(|entry| entry.incarnation) {
                    self.add_news(incarnation, *wildcard, NewsOf::Missed);
                }
            }
            Event::ArenaAdded { topic, slot, .. } => self.announcements.push((*topic, *slot)),
            Event::GroupCreated { topic, info, start, .. } => self.begin_group(*topic, info.id, *start)?,
            Event::ConsumerOpened { topic, group, consumer, .. } => {
                self.begin_consumer(ConsumerRef { topic: *topic, group: *group, consumer: *consumer })?;
            }
            Event::TopicRemoved { topic } => {
                if let Some(memory) = self.memories.remove(topic) {
                    memory.end(TopicState::Removed);
                    memory.let_go();
                }
            }
            Event::Left { incarnation } => {
                self.pidfds.remove(incarnation);
                self.spaces.remove(incarnation);
                self.give_up_notices();
            }
            Event::Closed { handle: HandleRef::Wildcard { .. } } => self.give_up_notices(),
            _ => {}
        }
        Ok(())
    }

    /// What the keeper need not hold any longer.
    fn names_given_up(&self, event: &Event) -> Vec<String> {
        match event {
            Event::TopicRemoved { topic } => {
                let names: Vec<String> = match (self.memories.get(topic), self.state.topic(*topic)) {
                    (Some(memory), _) => memory.segments().into_iter().map(|segment| segment.name).collect(),
                    (None, Some(entry)) => segment_parts(entry),
                    (None, None) => Vec::new(),
                };
                names.into_iter().map(|name| segment_name(*topic, &name)).collect()
            }
            Event::Left { incarnation } => {
                let wildcards = self.state.wildcards().iter().filter(|(_, entry)| entry.incarnation == *incarnation);
                let notices = wildcards.map(|(wildcard, _)| notice_name(*wildcard));
                let handles = self.state.handles_of(*incarnation);
                let own: Vec<String> = handles.into_iter().filter_map(|handle| self.own_cursors(handle)).collect();
                notices.chain(own).chain([participant_name(*incarnation), space_name(*incarnation)]).collect()
            }
            Event::Closed { handle: HandleRef::Wildcard { wildcard } } => vec![notice_name(*wildcard)],
            Event::Closed { handle } => self.own_cursors(*handle).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// The keeper's name of the cursors that a subscriber has for itself.
    fn own_cursors(&self, handle: HandleRef) -> Option<String> {
        let HandleRef::Subscriber { topic, cursor } = handle else { return None };
        let subscriber = self.state.topic(topic)?.subscribers.get(&cursor)?;
        subscriber.own.map(|_| segment_name(topic, &own_cursors_name(cursor)))
    }

    pub(super) fn prepare_arena(&mut self, topic: u64, slot: u32) -> Result<(), Refusal> {
        let memory = self.memories.get_mut(&topic).ok_or_else(|| broken("an arena for a topic that is not there"))?;
        // It may be there from an attempt that failed later on.
        if !memory.has_arena(slot) {
            memory.add_arena(slot, &mut self.at_hand)?;
        }
        self.store_segment(topic, &format!("arena-{slot}"))
    }

    /// Has the keeper keep a new segment.
    fn store_segment(&mut self, topic: u64, name: &str) -> Result<(), Refusal> {
        let segments = self.memories.get(&topic).map(TopicMemory::segments).unwrap_or_default();
        let Some(segment) = segments.into_iter().find(|segment| segment.name == name) else {
            return Err(broken("a new segment that is not there"));
        };
        match &mut self.link {
            Some(link) => link.store(&segment_name(topic, name), segment.fd),
            None => Ok(()),
        }
    }

    fn store_segments(&mut self, topic: u64, memory: &TopicMemory) -> Result<(), Refusal> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let mut stored: Vec<String> = Vec::new();
        for segment in memory.segments() {
            let name = segment_name(topic, &segment.name);
            if let Err(refusal) = link.store(&name, segment.fd) {
                stored.into_iter().for_each(|name| link.forget(name));
                return Err(refusal);
            }
            stored.push(name);
        }
        Ok(())
    }
}

/// What the segments of a topic may be called.
pub(super) fn segment_parts(entry: &TopicEntry) -> Vec<String> {
    let fixed = ["log", "cursors", "channel"].map(str::to_owned);
    let own = entry.subscribers.iter().filter(|(_, subscriber)| subscriber.own.is_some());
    let own = own.map(|(cursor, _)| own_cursors_name(*cursor));
    fixed.into_iter().chain(entry.arenas.iter().map(|slot| format!("arena-{slot}"))).chain(own).collect()
}
