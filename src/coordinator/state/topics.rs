//! Topics: what is decided about creating, removing, purging and showing them; what is checked of whoever names one.

use super::limits;
use super::{Decider, Event, Plan, Reply, TopicEntry};
use crate::access::{Access, Right};
use crate::coordinator::limits::MAX_STATUS_TOPICS;
use crate::coordinator::protocol::TopicInfo;
use crate::error::Refusal;
use crate::shm::layout::Geometry;
use crate::topic::{Mode, Schema, TopicOptions, check_name};

/// Longest type name of a schema in bytes; keeps events and answers small.
const MAX_SCHEMA_NAME_BYTES: usize = 1024;

/// Bytes of a refused name that are repeated in the error.
pub(super) const SHOWN_NAME_BYTES: usize = 64;

impl Decider<'_> {
    pub(super) fn create_topic(
        &self,
        name: &str,
        options: &TopicOptions,
        access: Option<&Access>,
        exist_ok: bool,
        ephemeral: bool,
    ) -> Result<Plan, Refusal> {
        checked(name)?;
        let Some(existing) = self.state.names.get(name).and_then(|id| self.state.topics.get(id)) else {
            let (_, events) =
                self.new_topic(name, options, access, !ephemeral, ephemeral.then_some(self.incarnation))?;
            return Ok(Plan { events, reply: Reply::Created { existed: false } });
        };
        if !exist_ok {
            return Err(Refusal::AlreadyExists { topic: name.to_owned() });
        }
        self.check_sees(existing)?;
        let other_access = access.filter(|access| **access != existing.access);
        let other_access = other_access.map(|access| format!("access is {}, asked for {access}", existing.access));
        match difference(&existing.info.options, options).or(other_access) {
            Some(difference) => Err(Refusal::Exists { topic: name.to_owned(), difference }),
            None => Ok(Plan { events: Vec::new(), reply: Reply::Created { existed: true } }),
        }
    }

    pub(super) fn remove_topic(&self, name: &str, force: bool) -> Result<Plan, Refusal> {
        let entry = self.existing(name)?;
        self.check_right(entry, Right::Administer)?;
        let (publishers, subscribers) = (entry.publishers.len() as u32, entry.subscribers.len() as u32);
        let consumers = entry.consuming().count() as u32;
        if !force && publishers + subscribers + consumers > 0 {
            let topic = name.to_owned();
            return Err(Refusal::InUse { topic, publishers, subscribers, consumers });
        }
        Ok(Plan { events: vec![Event::TopicRemoved { topic: entry.info.id }], reply: Reply::Done })
    }

    /// Changes memory alone: what is given up is nobody's.
    pub(super) fn purge(&self, name: &str) -> Result<Plan, Refusal> {
        let entry = self.existing(name)?;
        self.check_right(entry, Right::Administer)?;
        let info = &entry.info;
        if info.options.mode == Mode::Channel {
            let problem = "a channel's messages are its receiver's; read them, or remove the topic".to_owned();
            return Err(Refusal::Options { topic: name.to_owned(), problem });
        }
        Ok(Plan { events: Vec::new(), reply: Reply::Purge { topic: info.id } })
    }

    pub(super) fn status(&self, topic: Option<&str>, after: Option<&str>) -> Result<Plan, Refusal> {
        if let Some(name) = topic {
            let entry = self.existing(name)?;
            self.check_sees(entry)?;
            let topics = vec![entry.info.id];
            return Ok(Plan { events: Vec::new(), reply: Reply::Status { topics, more: false } });
        }
        let start = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let rest = self.state.names.range::<str, _>((start, std::ops::Bound::Unbounded)).map(|(_, id)| *id);
        let seen = |id: &u64| self.state.topics.get(id).is_some_and(|entry| self.sees(entry));
        let mut rest = rest.filter(seen);
        let topics = rest.by_ref().take(MAX_STATUS_TOPICS).collect();
        let more = rest.next().is_some();
        Ok(Plan { events: Vec::new(), reply: Reply::Status { topics, more } })
    }

    pub(super) fn names(&self, topic: &str, after: Option<String>) -> Result<Plan, Refusal> {
        let entry = self.existing(topic)?;
        self.check_sees(entry)?;
        let topic = entry.info.id;
        Ok(Plan { events: Vec::new(), reply: Reply::Names { topic, after } })
    }

    pub(super) fn existing(&self, name: &str) -> Result<&TopicEntry, Refusal> {
        checked(name)?;
        self.state.names.get(name).and_then(|id| self.state.topics.get(id)).ok_or_else(|| unknown(name))
    }

    /// A topic's creation, with the cursors of the wildcard subscriptions that stand for it: they are in force before
    /// anybody is told that it exists.
    pub(super) fn new_topic(
        &self,
        name: &str,
        options: &TopicOptions,
        access: Option<&Access>,
        kept: bool,
        owner: Option<u64>,
    ) -> Result<(TopicInfo, Vec<Event>), Refusal> {
        let topic = name.to_owned();
        if self.state.topics.len() >= self.limits.topics {
            let mend = "remove some with `shmbus rm`".to_owned();
            return Err(Refusal::Limit {
                what: "topics of the bus".to_owned(),
                limit: self.limits.topics as u64,
                mend,
            });
        }
        check_schema_len(options.schema.as_ref())
            .map_err(|problem| Refusal::Options { topic: topic.clone(), problem })?;
        let geometry = Geometry::from_options(options).map_err(|problem| Refusal::Options { topic, problem })?;
        let info = TopicInfo {
            id: self.state.next_topic,
            bus: self.state.bus,
            name: name.to_owned(),
            generation: 0,
            options: options.clone(),
            geometry,
        };
        let bytes = (self.footprint.topic)(&info);
        self.check_budget(name, self.uid, bytes)?;
        self.check_owned(self.uid, 1, limits::first_segments(options.mode))?;
        self.check_letters(name)?;
        let access = access.cloned().or_else(|| self.access_of_dead_letters(name)).unwrap_or_default();
        access.check().map_err(|problem| Refusal::Options { topic: name.to_owned(), problem })?;
        let new = TopicEntry::new(&info, self.uid, &access, bytes, 0, kept, owner);
        let cursors = self.wildcard_cursors(&new);
        let created =
            Event::TopicCreated { info: info.clone(), uid: self.uid, access, bytes, publishers: 0, kept, owner };
        Ok((info, [created].into_iter().chain(cursors).collect()))
    }
}

pub(super) fn checked(name: &str) -> Result<(), Refusal> {
    check_name(name).map_err(|source| Refusal::Name { name: shown(name), source })
}

/// The part of a name that an error repeats.
pub(super) fn shown(name: &str) -> String {
    name.char_indices().take_while(|(at, _)| *at < SHOWN_NAME_BYTES).map(|(_, c)| c).collect()
}

/// Raw handles may open any topic; a typed one only a topic of its own type.
pub(super) fn check_schema(info: &TopicInfo, handle: Option<&Schema>) -> Result<(), Refusal> {
    match handle {
        Some(handle) if info.options.schema.as_ref() != Some(handle) => Err(Refusal::Schema {
            topic: info.name.clone(),
            expected: schema_text(info.options.schema.as_ref()),
            found: handle.to_string(),
        }),
        _ => Ok(()),
    }
}

/// What is kept in the registry is bounded.
pub(super) fn check_schema_len(schema: Option<&Schema>) -> Result<(), String> {
    match schema.map_or(0, |schema| schema.name.len()) {
        0..=MAX_SCHEMA_NAME_BYTES => Ok(()),
        len => Err(format!("the type's name has {len} bytes; at most {MAX_SCHEMA_NAME_BYTES} are allowed")),
    }
}

fn schema_text(schema: Option<&Schema>) -> String {
    schema.map_or_else(|| "raw bytes".to_owned(), Schema::to_string)
}

pub(super) fn unknown(name: &str) -> Refusal {
    Refusal::UnknownTopic { topic: name.to_owned() }
}

/// The first difference between a topic's options and those asked for.
fn difference(have: &TopicOptions, asked: &TopicOptions) -> Option<String> {
    let pairs = [
        ("mode", have.mode.to_string(), asked.mode.to_string()),
        ("messages", have.messages.to_string(), asked.messages.to_string()),
        ("bytes", have.bytes.to_string(), asked.bytes.to_string()),
        ("full", have.full.to_string(), asked.full.to_string()),
        ("hold", have.hold.to_string(), asked.hold.to_string()),
        ("max publishers", have.max_publishers.to_string(), asked.max_publishers.to_string()),
        ("max subscribers", have.max_subscribers.to_string(), asked.max_subscribers.to_string()),
        ("envelope", have.envelope.to_string(), asked.envelope.to_string()),
        ("ttl_ms", have.ttl_ms.to_string(), asked.ttl_ms.to_string()),
        ("max_age_ms", have.max_age_ms.to_string(), asked.max_age_ms.to_string()),
        ("dedup", have.dedup.to_string(), asked.dedup.to_string()),
        ("payload", schema_text(have.schema.as_ref()), schema_text(asked.schema.as_ref())),
    ];
    let (what, have, asked) = pairs.into_iter().find(|(_, have, asked)| have != asked)?;
    Some(format!("{what} is {have}, asked for {asked}"))
}
