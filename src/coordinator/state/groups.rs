//! Groups in the state machine: who they are, who consumes, and what is decided about them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use super::topics::{check_schema, shown};
use super::{Decider, Event, Plan, Reply, State, TopicEntry};
use crate::access::Right;
use crate::coordinator::limits::{MAX_CONSUMERS_OF_TOPIC, MAX_GROUPS_OF_TOPIC};
use crate::coordinator::protocol::{GroupInfo, HandleRef, Identity, StartAt, TopicInfo};
use crate::error::Refusal;
use crate::group::GroupOptions;
use crate::ring::ledger::MAX_CONSUMERS;
use crate::topic::{Full, Mode, Schema, check_name};

/// A group and who consumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupEntry {
    pub(crate) info: GroupInfo,
    pub(crate) start: StartAt,
    /// What its ledger takes, counted to the topic's owner.
    pub(crate) bytes: u64,
    /// It was rewound or removed: its name is no longer its own, and it goes with its last consumer.
    pub(crate) retired: bool,
    /// The consumers' participants by consumer number.
    pub(crate) consumers: BTreeMap<u32, u64>,
}

/// Names a group of a topic in a request.
#[derive(Clone, Copy)]
pub(super) struct GroupName<'a> {
    pub(super) topic: &'a str,
    pub(super) group: &'a str,
}

impl State {
    /// A group, living or retired.
    pub(crate) fn group(&self, topic: u64, group: u32) -> Option<&GroupEntry> {
        self.topics.get(&topic)?.groups.get(&group)
    }

    pub(super) fn add_group(&mut self, topic: u64, new: GroupEntry, replaces: Option<u32>) {
        let Some(entry) = self.topics.get_mut(&topic) else { return };
        entry.bytes += new.bytes;
        *self.reserved.entry(entry.uid).or_default() += new.bytes;
        self.owned.entry(entry.uid).or_default().segments += 1;
        entry.next_group = entry.next_group.max(new.info.id.saturating_add(1));
        entry.groups.insert(new.info.id, new);
        if let Some(old) = replaces {
            self.retire_group(topic, old);
        }
    }

    pub(super) fn retire_group(&mut self, topic: u64, group: u32) {
        let Some(entry) = self.topics.get_mut(&topic).and_then(|t| t.groups.get_mut(&group)) else { return };
        entry.retired = true;
        self.drop_deserted_group(topic, group);
    }

    pub(super) fn add_consumer(&mut self, topic: u64, group: u32, consumer: u32, incarnation: u64) {
        self.close(HandleRef::Consumer { topic, group, consumer });
        let Some(entry) = self.topics.get_mut(&topic).and_then(|t| t.groups.get_mut(&group)) else { return };
        entry.consumers.insert(consumer, incarnation);
        self.hold(incarnation, HandleRef::Consumer { topic, group, consumer });
    }

    /// Returns whose it was.
    pub(super) fn remove_consumer(&mut self, topic: u64, group: u32, consumer: u32) -> Option<u64> {
        let entry = self.topics.get_mut(&topic)?.groups.get_mut(&group)?;
        let incarnation = entry.consumers.remove(&consumer);
        self.drop_deserted_group(topic, group);
        incarnation
    }

    /// A retired group goes with its last consumer: until then its ledger and its cursor's line are not anybody else's.
    fn drop_deserted_group(&mut self, topic: u64, group: u32) {
        let Some(entry) = self.topics.get_mut(&topic) else { return };
        if entry.groups.get(&group).is_some_and(|group| group.retired && group.consumers.is_empty())
            && let Some(gone) = entry.groups.remove(&group)
        {
            entry.bytes = entry.bytes.saturating_sub(gone.bytes);
            if let Some(reserved) = self.reserved.get_mut(&entry.uid) {
                *reserved = reserved.saturating_sub(gone.bytes);
            }
            let uid = entry.uid;
            self.disown(uid, 0, 1);
            self.forget_ended(topic, group..=group);
        }
    }

    /// Forgets on every topic what consumers of these groups of `topic` published, which are gone.
    pub(super) fn forget_ended(&mut self, topic: u64, groups: RangeInclusive<u32>) {
        let origin = |group, consumer| Identity::Origin { topic, group, consumer };
        let ended = origin(*groups.start(), 0)..=origin(*groups.end(), u32::MAX);
        let topics: Vec<u64> = self.topics.keys().copied().collect();
        topics.into_iter().for_each(|on| self.forget_among(on, ended.clone()));
    }

    /// Forgets what consumers of groups that are gone published on a topic. For when something has ended, not for a replay in
    /// which their topic has not come yet.
    pub(super) fn forget_origins(&mut self, topic: u64) {
        let origin = |topic, number| Identity::Origin { topic, group: number, consumer: number };
        self.forget_among(topic, origin(0, 0)..=origin(u64::MAX, u32::MAX));
    }

    /// The same for some: identities are in order, names before origins, so others are not looked at.
    fn forget_among(&mut self, topic: u64, origins: RangeInclusive<Identity>) {
        let is_gone = |identity: &Identity| match identity {
            Identity::Origin { topic, group, .. } => self.group(*topic, *group).is_none(),
            Identity::Named(_) => false,
        };
        let identities = self.topics.get(&topic).into_iter().flat_map(|entry| entry.identities.range(origins.clone()));
        let idle = identities.filter(|(_, known)| known.holder.is_none()).map(|(identity, _)| identity);
        let gone: Vec<Identity> = idle.filter(|identity| is_gone(identity)).cloned().collect();
        if let Some(entry) = self.topics.get_mut(&topic) {
            for identity in &gone {
                entry.identities.remove(identity);
            }
        }
    }
}

impl TopicEntry {
    /// The groups that have their names.
    pub(crate) fn living_groups(&self) -> impl Iterator<Item = &GroupEntry> {
        self.groups.values().filter(|group| !group.retired)
    }

    /// Processes with a consumer in any of the groups.
    pub(crate) fn consuming(&self) -> impl Iterator<Item = u64> {
        self.groups.values().flat_map(|group| group.consumers.values().copied())
    }

    /// Whether a subscriber or a living group has the cursor.
    pub(crate) fn cursor_in_use(&self, cursor: u32) -> bool {
        self.subscribers.contains_key(&cursor) || self.living_groups().any(|group| group.info.cursor == cursor)
    }

    fn group_named(&self, name: &str) -> Option<&GroupEntry> {
        self.living_groups().find(|group| group.info.name == name)
    }

    pub(super) fn group_handles(&self) -> impl Iterator<Item = HandleRef> {
        let topic = self.info.id;
        let handle = move |group, consumer| HandleRef::Consumer { topic, group, consumer };
        self.groups.iter().flat_map(move |(&group, entry)| entry.consumers.keys().map(move |&c| handle(group, c)))
    }

    pub(super) fn group_bytes(&self) -> u64 {
        self.groups.values().map(|group| group.bytes).sum()
    }

    pub(super) fn snapshot_groups(&self, events: &mut Vec<Event>) {
        let topic = self.info.id;
        for (&id, group) in &self.groups {
            let (info, start, bytes) = (group.info.clone(), group.start, group.bytes);
            events.push(Event::GroupCreated { topic, info, start, bytes, replaces: None });
            for (&consumer, &incarnation) in &group.consumers {
                events.push(Event::ConsumerOpened { topic, group: id, consumer, incarnation });
            }
            events.extend(group.retired.then_some(Event::GroupRetired { topic, group: id }));
        }
        if self.next_group > 0 {
            events.push(Event::GroupsGiven { topic, groups: self.next_group });
        }
    }
}

/// Decisions.
impl Decider<'_> {
    pub(super) fn create_group(
        &self,
        name: GroupName<'_>,
        options: &GroupOptions,
        start: StartAt,
        exist_ok: bool,
    ) -> Result<Plan, Refusal> {
        let entry = self.existing(name.topic)?;
        checked_group(name.group)?;
        self.check_right(entry, Right::Administer)?;
        let Some(existing) = entry.group_named(name.group) else {
            let (_, event) = self.new_group(entry, name.group, options, start, None)?;
            return Ok(Plan { events: vec![event], reply: Reply::Created { existed: false } });
        };
        let (topic, group) = name.owned();
        if !exist_ok {
            return Err(Refusal::GroupAlreadyExists { topic, group });
        }
        match difference(&existing.info.options, options) {
            Some(difference) => Err(Refusal::GroupExists { topic, group, difference }),
            None => Ok(Plan { events: Vec::new(), reply: Reply::Created { existed: true } }),
        }
    }

    pub(super) fn remove_group(&self, name: GroupName<'_>, force: bool) -> Result<Plan, Refusal> {
        let (entry, group) = self.administered_group(name)?;
        self.check_unused(entry, group, force)?;
        let event = Event::GroupRetired { topic: entry.info.id, group: group.info.id };
        Ok(Plan { events: vec![event], reply: Reply::Done })
    }

    pub(super) fn rewind_group(&self, name: GroupName<'_>, start: StartAt, force: bool) -> Result<Plan, Refusal> {
        let (entry, old) = self.administered_group(name)?;
        self.check_unused(entry, old, force)?;
        let (_, event) = self.new_group(entry, name.group, &old.info.options, start, Some(old.info.id))?;
        Ok(Plan { events: vec![event], reply: Reply::Done })
    }

    pub(super) fn open_consumer(
        &self,
        name: GroupName<'_>,
        schema: Option<&Schema>,
        create: Option<&(GroupOptions, StartAt)>,
    ) -> Result<Plan, Refusal> {
        let entry = self.existing(name.topic)?;
        checked_group(name.group)?;
        self.check_right(entry, Right::Consume)?;
        self.check_handles()?;
        check_schema(&entry.info, schema)?;
        if entry.consuming().count() >= MAX_CONSUMERS_OF_TOPIC {
            return Err(limit("consumers", entry, MAX_CONSUMERS_OF_TOPIC as u64, "close some"));
        }
        let (topic, incarnation) = (entry.info.id, self.incarnation);
        let mut events = Vec::new();
        let (group, consumer) = match (entry.group_named(name.group), create) {
            (Some(group), _) => (group.info.id, free_consumer(entry, group)?),
            (None, Some((options, start))) => {
                self.check_right(entry, Right::Administer)?;
                let (group, event) = self.new_group(entry, name.group, options, *start, None)?;
                events.push(event);
                (group, 0)
            }
            (None, None) => return Err(unknown_group(name)),
        };
        events.push(Event::ConsumerOpened { topic, group, consumer, incarnation });
        Ok(Plan { events, reply: Reply::Consumer { topic, group, consumer } })
    }

    /// Whether the lease time of what `consumer` holds has ended is the ledger's to say.
    pub(super) fn reclaim(&self, topic: u64, group: u32, consumer: u32) -> Result<Plan, Refusal> {
        let asks = |entry: &&GroupEntry| entry.consumers.values().any(|who| *who == self.incarnation);
        if self.state.group(topic, group).filter(asks).is_none() {
            let problem = format!("asked to reclaim in group {group} of topic {topic} without a consumer there");
            return Err(Refusal::Protocol { problem });
        }
        Ok(Plan { events: Vec::new(), reply: Reply::Reclaim { topic, group, consumer } })
    }

    /// Only a consumer publishes as itself.
    pub(super) fn check_origin(&self, identity: Option<&Identity>) -> Result<(), Refusal> {
        let Some(&Identity::Origin { topic, group, consumer }) = identity else { return Ok(()) };
        let itself = HandleRef::Consumer { topic, group, consumer };
        if self.state.participant(self.incarnation).is_some_and(|me| me.handles.contains(&itself)) {
            return Ok(());
        }
        let problem =
            format!("asked to publish as consumer {consumer} of group {group} of topic {topic}, which it is not");
        Err(Refusal::Protocol { problem })
    }

    /// The right comes first: who has none does not learn which groups there are.
    fn administered_group(&self, name: GroupName<'_>) -> Result<(&TopicEntry, &GroupEntry), Refusal> {
        let entry = self.existing(name.topic)?;
        self.check_right(entry, Right::Administer)?;
        checked_group(name.group)?;
        Ok((entry, entry.group_named(name.group).ok_or_else(|| unknown_group(name))?))
    }

    /// Consumers lose a group that is rewound or removed, which takes force.
    fn check_unused(&self, entry: &TopicEntry, group: &GroupEntry, force: bool) -> Result<(), Refusal> {
        if force || group.consumers.is_empty() {
            return Ok(());
        }
        let pid = |incarnation: &u64| self.state.participant(*incarnation).map(|participant| participant.pid);
        let pids: BTreeSet<u32> = group.consumers.values().filter_map(pid).collect();
        Err(Refusal::GroupInUse {
            topic: entry.info.name.clone(),
            group: group.info.name.clone(),
            consumers: group.consumers.len() as u32,
            pids: pids.into_iter().collect(),
        })
    }

    /// The event that creates a group, and its number. `replaces`: the group of the same name that it is put in place of.
    fn new_group(
        &self,
        entry: &TopicEntry,
        name: &str,
        options: &GroupOptions,
        start: StartAt,
        replaces: Option<u32>,
    ) -> Result<(u32, Event), Refusal> {
        self.check_options(entry, name, options)?;
        let letters = options.dead_letter_topic(&entry.info.name, name);
        let letters = self.state.names.get(&letters).and_then(|id| self.state.topics.get(id));
        if let Some(letters) = letters.filter(|_| replaces.is_none()) {
            let whose = if options.dead_letter.is_none() { self.check_letters_of(entry, letters) } else { Ok(()) };
            whose.and_then(|()| check_keeps_letters(&letters.info)).map_err(|problem| {
                let (topic, group) = (entry.info.name.clone(), name.to_owned());
                Refusal::GroupOptions { topic, group, problem }
            })?;
        }
        if entry.groups.len() >= MAX_GROUPS_OF_TOPIC {
            return Err(limit("groups", entry, MAX_GROUPS_OF_TOPIC as u64, "remove some"));
        }
        if entry.next_group == u32::MAX {
            return Err(limit("groups ever created", entry, u32::MAX.into(), "create the topic anew"));
        }
        let Some(cursor) = entry.free_cursor() else {
            let mend = "close or remove some, or create the topic with more";
            return Err(limit("subscribers and groups", entry, entry.max_subscribers().into(), mend));
        };
        let info = GroupInfo { id: entry.next_group, name: name.to_owned(), options: options.clone(), cursor };
        let bytes = (self.footprint.group)(&entry.info, &info);
        self.check_budget(&entry.info.name, entry.uid, bytes)?;
        self.check_owned(entry.uid, 0, 1)?;
        Ok((info.id, Event::GroupCreated { topic: entry.info.id, info, start, bytes, replaces }))
    }

    fn check_options(&self, entry: &TopicEntry, name: &str, options: &GroupOptions) -> Result<(), Refusal> {
        let refused = |problem| {
            let (topic, group) = (entry.info.name.clone(), name.to_owned());
            Err(Refusal::GroupOptions { topic, group, problem })
        };
        if entry.info.options.mode == Mode::Channel {
            return refused(
                "a channel has one reader and no groups; create the topic for many or exclusive".to_owned(),
            );
        }
        if entry.info.options.full == Full::Overwrite {
            let mend = "create the topic with block or reject";
            return refused(format!("the topic overwrites what a group has not settled; {mend}"));
        }
        if let Err(problem) = options.check() {
            return refused(problem);
        }
        let lacking = [(options.ordered_by_key, "keys to order by"), (options.dead_letter_expired, "a time-to-live")];
        if let Some((_, what)) = lacking.iter().find(|(asked, _)| *asked && !entry.info.options.envelope) {
            return refused(format!("the topic's messages have no {what}; create it with --envelope"));
        }
        let dead_letter = options.dead_letter_topic(&entry.info.name, name);
        if let Err(error) = check_name(&dead_letter) {
            let shown = shown(&dead_letter);
            return refused(format!("the dead-letter topic cannot be {shown:?}: {error}; name another"));
        }
        let existing = self.state.names.get(&dead_letter).and_then(|id| self.state.topics.get(id));
        let typed = existing.and_then(|topic| topic.info.options.schema.as_ref());
        if let Some(schema) = typed.filter(|typed| Some(*typed) != entry.info.options.schema.as_ref()) {
            let problem = format!("the dead-letter topic {dead_letter:?} takes {schema} and nothing else");
            return refused(format!("{problem}; name another, or create it without a type"));
        }
        if let Some(mode) = existing.map(|topic| topic.info.options.mode).filter(|mode| *mode != Mode::Many) {
            let mend = "name another, or create it for many publishers";
            return refused(format!(
                "the dead-letter topic {dead_letter:?} is {mode}, so only one could write it; {mend}"
            ));
        }
        if self.dead_letters_reach(&dead_letter, entry.info.id) {
            let topic = &entry.info.name;
            let path = format!("what fails in topic {topic:?} goes to {dead_letter:?} and from there back");
            return refused(format!("{path}; name another dead-letter topic"));
        }
        Ok(())
    }

    /// Whether a message that goes to topic `from` may come to topic `to`, which is there, through groups' dead-letter topics.
    fn dead_letters_reach(&self, from: &str, to: u64) -> bool {
        let names = &self.state.names;
        let (mut seen, mut open) = (BTreeSet::new(), Vec::from_iter(names.get(from).copied()));
        while let Some(topic) = open.pop() {
            if topic == to {
                return true;
            }
            // Many groups may share one.
            let Some(entry) = self.state.topics.get(&topic).filter(|_| seen.insert(topic)) else { continue };
            let next = |group: &GroupEntry| group.info.options.dead_letter_topic(&entry.info.name, &group.info.name);
            let next = entry.living_groups().filter_map(|group| names.get(&next(group)).copied());
            open.extend(next.filter(|next| !seen.contains(next)));
        }
        false
    }
}

impl GroupName<'_> {
    fn owned(self) -> (String, String) {
        (self.topic.to_owned(), self.group.to_owned())
    }
}

/// Whether dead letters keep their headers there, and stay until somebody has read them.
fn check_keeps_letters(letters: &TopicInfo) -> Result<(), String> {
    let lack = match letters.options.full {
        _ if !letters.options.envelope => "has no envelopes, so reasons and origins would be lost",
        Full::Overwrite => "overwrites what nobody has read",
        Full::Block | Full::Reject => return Ok(()),
    };
    let mend = "name another, or create it with --envelope --hold and without overwrite";
    Err(format!("the dead-letter topic {:?} {lack}; {mend}", letters.name))
}

/// The first number that no consumer has.
fn free_consumer(entry: &TopicEntry, group: &GroupEntry) -> Result<u32, Refusal> {
    let free = (0..MAX_CONSUMERS).find(|consumer| !group.consumers.contains_key(consumer));
    free.ok_or_else(|| {
        let what = format!("consumers of group {:?} of topic {:?}", group.info.name, entry.info.name);
        Refusal::Limit { what, limit: MAX_CONSUMERS.into(), mend: "close some, or use another group".to_owned() }
    })
}

fn checked_group(name: &str) -> Result<(), Refusal> {
    check_name(name).map_err(|source| Refusal::GroupName { name: shown(name), source })
}

fn unknown_group(name: GroupName<'_>) -> Refusal {
    let (topic, group) = name.owned();
    Refusal::UnknownGroup { topic, group }
}

fn limit(what: &str, entry: &TopicEntry, limit: u64, mend: &str) -> Refusal {
    Refusal::Limit { what: format!("{what} of topic {:?}", entry.info.name), limit, mend: mend.to_owned() }
}

/// The first difference between a group's options and those asked for.
fn difference(have: &GroupOptions, asked: &GroupOptions) -> Option<String> {
    let dead_letter = |options: &GroupOptions| options.dead_letter.clone().unwrap_or_else(|| "the default".to_owned());
    let back_off = |options: &GroupOptions| format!("{:?} ms", options.back_off_ms);
    let pairs = [
        ("guarantee", have.guarantee.to_string(), asked.guarantee.to_string()),
        ("lease", format!("{} ms", have.lease_ms), format!("{} ms", asked.lease_ms)),
        ("max in flight", have.max_in_flight.to_string(), asked.max_in_flight.to_string()),
        ("max attempts", have.max_attempts.to_string(), asked.max_attempts.to_string()),
        ("back-off", back_off(have), back_off(asked)),
        ("dead-letter topic", dead_letter(have), dead_letter(asked)),
        ("dead letter expired", have.dead_letter_expired.to_string(), asked.dead_letter_expired.to_string()),
        ("ordered by key", have.ordered_by_key.to_string(), asked.ordered_by_key.to_string()),
        ("exclusive", have.exclusive.to_string(), asked.exclusive.to_string()),
        ("window", have.window.to_string(), asked.window.to_string()),
    ];
    let (what, have, asked) = pairs.into_iter().find(|(_, have, asked)| have != asked)?;
    Some(format!("{what} is {have}, asked for {asked}"))
}
