//! Groups: their events carried out, their answers and their status.
//!
//! A group takes a ledger and a cursor's line: keeper, registry, then the line comes into force, then the ledger begins
//! where the line stands. A ledger that has not begun is not known to anybody, and a successor begins it. A group that
//! ends is logged first, like everything that ends for others too; a successor says so again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use super::{Estate, Granted, broken};
use crate::client::envelope::now_ns;
use crate::coordinator::burial::GroupNames;
use crate::coordinator::link::segment_name;
use crate::coordinator::memory::{AtFloor, LedgerCount, Overdue, ledger_name};
use crate::coordinator::protocol::{
    Answer, ConsumerStatus, GroupInfo, GroupStatus, HandleRef, Identity, LeaseStatus, StartAt, input_number,
};
use crate::coordinator::state::{Event, GroupEntry, TopicEntry};
use crate::error::Refusal;
use crate::group::Guarantee;
use crate::os::clock;
use crate::ring::ledger::Seen;
use crate::topic::Mode;

/// A consumer by topic, group and number in the group.
#[derive(Clone, Copy)]
pub(super) struct ConsumerRef {
    pub(super) topic: u64,
    pub(super) group: u32,
    pub(super) consumer: u32,
}

impl ConsumerRef {
    fn origin(self) -> Identity {
        Identity::Origin { topic: self.topic, group: self.group, consumer: self.consumer }
    }

    /// Its number as the ledger's words name it.
    fn slot(self) -> u8 {
        // The state gives numbers below the ledger's limit only.
        self.consumer as u8
    }
}

/// Events.
impl Estate {
    /// Before a group is logged: its start is possible, nobody publishes for the one that it `replaces`, and its ledger's
    /// memory is there and stored.
    pub(super) fn prepare_group(
        &mut self,
        topic: u64,
        group: &GroupInfo,
        start: StartAt,
        replaces: Option<u32>,
    ) -> Result<(), Refusal> {
        self.memory(topic)?.check_start(start)?;
        replaces.map_or(Ok(()), |old| self.fence_group(topic, old))?;
        let memory = self.memories.get_mut(&topic).ok_or_else(|| broken("a group on a topic that is not there"))?;
        memory.create_ledger(group)?;
        let segment = memory.stored_ledger(group.id)?;
        match &mut self.link {
            Some(link) => link.store(&segment_name(topic, &segment.name), segment.fd),
            None => Ok(()),
        }
    }

    /// Puts a group in force that has been logged.
    pub(super) fn begin_group(&mut self, topic: u64, group: u32, start: StartAt) -> Result<(), Refusal> {
        let begun = self.memory(topic).and_then(|memory| memory.begin_group(group, start));
        self.watch_expiry(topic, group);
        if begun.is_err() {
            self.carry_out(Event::GroupRetired { topic, group })?;
        }
        begun
    }

    /// Lets a consumer take messages that has been logged.
    pub(super) fn begin_consumer(&mut self, who: ConsumerRef) -> Result<(), Refusal> {
        let begun = self.memory(who.topic).and_then(|memory| memory.begin_consumer(who.group, who.slot()));
        if begun.is_err() {
            let ConsumerRef { topic, group, consumer } = who;
            self.carry_out(Event::Closed { handle: HandleRef::Consumer { topic, group, consumer } })?;
        }
        begun
    }

    /// The groups that an event may retire, or whose consumers it changes, as they are before it.
    pub(super) fn groups_concerned(&self, event: &Event) -> Vec<(u64, GroupEntry)> {
        let of = |handle: &HandleRef| match handle {
            HandleRef::Consumer { topic, group, .. } => Some((*topic, *group)),
            _ => None,
        };
        let concerned: BTreeSet<(u64, u32)> = match event {
            Event::GroupRetired { topic, group } | Event::ConsumerOpened { topic, group, .. } => {
                [(*topic, *group)].into()
            }
            Event::GroupCreated { topic, replaces, .. } => replaces.iter().map(|group| (*topic, *group)).collect(),
            Event::Closed { handle } => of(handle).into_iter().collect(),
            Event::Left { incarnation } => self.state.handles_of(*incarnation).iter().filter_map(of).collect(),
            _ => BTreeSet::new(),
        };
        let known = |(topic, group)| Some((topic, self.state.group(topic, group)?.clone()));
        concerned.into_iter().filter_map(known).collect()
    }

    /// Lets memory and keeper know what became of these groups.
    pub(super) fn follow_groups(&mut self, before: Vec<(u64, GroupEntry)>) {
        for (topic, was) in before {
            let Some(memory) = self.memories.get_mut(&topic) else { continue };
            let now = self.state.group(topic, was.info.id);
            if !was.retired && now.is_none_or(|now| now.retired) {
                memory.end_group(&was.info, was.start == StartAt::Oldest);
            }
            match now {
                Some(now) if !now.retired => memory.count_consumers(now.info.cursor, now.consumers.len() as u64),
                Some(_) => {}
                None => {
                    memory.drop_ledger(was.info.id);
                    self.forget(segment_name(topic, &ledger_name(was.info.id)));
                }
            }
        }
    }

    /// Takes back what a consumer holds that is dead, has left or is fenced. Idempotent.
    pub(super) fn release_consumer(&self, who: ConsumerRef) {
        let Ok(memory) = self.memory(who.topic) else { return };
        let finished = self.finished_inputs(who);
        memory.release_consumer(who.group, who.slot(), |sequence| finished.contains(&input_number(sequence)));
    }

    /// Another consumer of the group found that `who` holds what is overdue, be it the role of an exclusive group. Only that, on the ledger's own word, gives
    /// it away: all of it, once its outputs are fenced, where they matter; otherwise what is overdue. Idempotent.
    pub(super) fn reclaim(&mut self, who: ConsumerRef) -> Result<(), Refusal> {
        let Some(group) = self.state.group(who.topic, who.group) else { return Ok(()) };
        if group.retired || !group.consumers.contains_key(&who.consumer) {
            return Ok(());
        }
        let effectively_once = group.info.options.guarantee == Guarantee::EffectivelyOnce;
        let now_ms = clock::now_ms();
        let overdue = self.memory(who.topic)?.overdue(who.group, who.slot(), now_ms);
        // Of other groups a standby takes the role itself.
        let is_idle = effectively_once && self.memory(who.topic)?.is_role_overdue(who.group, who.slot(), now_ms);
        if overdue == Overdue::default() && !is_idle {
            return Ok(());
        }
        if !effectively_once && !overdue.moves {
            self.memory(who.topic)?.give_back_overdue(who.group, who.slot(), now_ms);
            return Ok(());
        }
        if self.fence_outputs(who)? {
            self.memory(who.topic)?.fence_consumer(who.group, who.slot());
            self.release_consumer(who);
        }
        Ok(())
    }

    /// Before a group is rewound or removed: its consumers commit no outputs any more.
    pub(super) fn fence_group(&mut self, topic: u64, group: u32) -> Result<(), Refusal> {
        let consumers = self.state.group(topic, group).map(|group| group.consumers.keys().copied().collect());
        let consumers: Vec<u32> = consumers.unwrap_or_default();
        consumers
            .into_iter()
            .try_for_each(|consumer| self.fence_outputs(ConsumerRef { topic, group, consumer }).map(drop))
    }

    /// A consumer that has been fenced does not begin to publish again.
    pub(super) fn check_origin(&self, identity: Option<&Identity>) -> Result<(), Refusal> {
        let Some(Identity::Origin { topic, group, consumer }) = identity else { return Ok(()) };
        if !self.memory(*topic)?.is_fenced(*group, *consumer as u8) {
            return Ok(());
        }
        let name = self.state.group(*topic, *group).map(|group| group.info.name.clone()).unwrap_or_default();
        Err(Refusal::ConsumerFenced { topic: self.entry(*topic)?.info.name.clone(), group: name, consumer: *consumer })
    }

    /// Takes every group's ledger out of the store, begins what had not begun, ends what had not ended. Returns what is
    /// lost.
    pub(super) fn adopt_groups(&mut self, store: &mut BTreeMap<String, OwnedFd>) -> Vec<Event> {
        let mut losses = Vec::new();
        for (topic, group) in self.all_groups() {
            let id = group.info.id;
            self.watch_expiry(topic, id);
            if let Err(error) = self.adopt_group(topic, &group, store) {
                eprintln!("shmbus coordinator: group {:?} of topic {topic} is lost: {error}", group.info.name);
                losses.push(Event::GroupRetired { topic, group: id });
            }
        }
        for (topic, memory) in &self.memories {
            let Some(entry) = self.state.topic(*topic) else { continue };
            memory.sweep_cursors(|cursor| entry.cursor_in_use(cursor));
        }
        losses
    }

    fn watch_expiry(&mut self, topic: u64, group: u32) {
        let may_expire = self.state.topic(topic).is_some_and(|entry| entry.info.options.envelope);
        self.expiring.extend(may_expire.then_some((topic, group)));
    }

    /// Whether there is a group whose messages may expire.
    pub(crate) fn may_expire(&self) -> bool {
        !self.expiring.is_empty()
    }

    /// Settles what has expired at the groups' floors. Whether there is more, and the groups that nobody consumes where
    /// something is to go to the dead-letter topic.
    pub(crate) fn settle_expired(&mut self) -> (bool, Vec<GroupNames>) {
        let state = &self.state;
        self.expiring.retain(|(topic, group)| state.group(*topic, *group).is_some_and(|group| !group.retired));
        let (now_ns, mut more, mut letters) = (now_ns(), false, Vec::new());
        for (topic, group) in &self.expiring {
            let (Some(entry), Ok(memory)) = (self.state.group(*topic, *group), self.memory(*topic)) else { continue };
            match memory.settle_expired(*group, entry.info.options.dead_letter_expired, now_ns) {
                Ok(AtFloor::More) => more = true,
                Ok(AtFloor::Letter) if entry.consumers.is_empty() => {
                    let topic = self.state.topic(*topic).map(|topic| topic.info.name.clone());
                    letters.extend(topic.map(|topic| (topic, entry.info.name.clone())));
                }
                Ok(_) => {}
                Err(error) => eprintln!("shmbus coordinator: settling what has expired: {error}"),
            }
        }
        (more, letters)
    }

    /// Keeps the due times of all ledgers from coming round; for every few hours.
    pub(crate) fn renew_due(&self) {
        let now_ms = clock::now_ms();
        self.memories.values().for_each(|memory| memory.renew_due(now_ms));
    }

    fn adopt_group(
        &mut self,
        topic: u64,
        group: &GroupEntry,
        store: &mut BTreeMap<String, OwnedFd>,
    ) -> Result<(), Refusal> {
        let memory = self.memories.get_mut(&topic).ok_or_else(|| broken("a group on a lost topic"))?;
        let fd = store.remove(&segment_name(topic, &ledger_name(group.info.id)));
        let fd = fd.ok_or_else(|| broken("the keeper has no ledger of it"))?;
        let has_begun = memory.adopt_ledger(&group.info, fd)?;
        if group.retired {
            memory.end_group(&group.info, group.start == StartAt::Oldest);
        } else if has_begun {
            memory.count_consumers(group.info.cursor, group.consumers.len() as u64);
        } else {
            self.prepare_group(topic, &group.info, group.start, None)?;
            self.memory(topic)?.begin_group(group.info.id, group.start)?;
        }
        Ok(())
    }

    fn all_groups(&self) -> Vec<(u64, GroupEntry)> {
        let groups = |(topic, entry): (&u64, &TopicEntry)| {
            let topic = *topic;
            entry.groups.values().cloned().map(move |group| (topic, group)).collect::<Vec<_>>()
        };
        self.state.topics().iter().flat_map(groups).collect()
    }
}

/// Answers.
impl Estate {
    pub(super) fn consumer_opened(&self, who: ConsumerRef) -> Result<Granted, Refusal> {
        let ConsumerRef { topic, group, consumer } = who;
        let memory = self.memory(topic)?;
        let info = self.entry(topic)?.info.clone();
        let group = self.state.group(topic, group).ok_or_else(|| broken("a consumer without a group"))?.info.clone();
        let place = memory.group_place(group.cursor)?;
        let (segments, fds) = memory.consumer_fds(group.id)?.into_iter().unzip();
        let (position, sequence) = (place.position, place.sequence);
        Ok((Answer::ConsumerOpened { info, group, consumer, position, sequence, segments }, fds))
    }

    /// The groups of a topic whose next sequence is `tail`, by name.
    pub(super) fn group_statuses(&self, entry: &TopicEntry, tail: u64) -> Vec<GroupStatus> {
        let memory = self.memories.get(&entry.info.id);
        let count =
            |group: &GroupEntry| memory.and_then(|memory| memory.count_ledger(group.info.id)).unwrap_or_default();
        let mut groups: Vec<GroupStatus> =
            entry.living_groups().map(|group| self.group_status(group, &count(group), tail)).collect();
        groups.sort_by(|a, b| a.name.cmp(&b.name));
        groups
    }

    fn group_status(&self, group: &GroupEntry, count: &LedgerCount, tail: u64) -> GroupStatus {
        let consumer = |(&consumer, incarnation): (&u32, &u64)| ConsumerStatus {
            consumer,
            pid: self.pid_of(*incarnation),
            in_flight: count.leases.get(&consumer).copied().unwrap_or(0),
            active: group.info.options.exclusive && count.active.map(u32::from) == Some(consumer),
        };
        GroupStatus {
            id: group.info.id,
            name: group.info.name.clone(),
            cursor: group.info.cursor,
            options: group.info.options.clone(),
            floor: count.floor,
            lag: tail.saturating_sub(count.floor),
            window: count.window,
            in_flight: count.leases.values().sum(),
            returned: count.returned,
            moving: count.moving,
            redelivered: count.redelivered,
            expired: count.expired,
            dead_lettered: count.dead_lettered,
            oldest_lease: count.oldest.and_then(|seen| self.lease_status(group, seen)),
            consumers: group.consumers.iter().map(consumer).collect(),
        }
    }

    pub(super) fn lease_status(&self, group: &GroupEntry, seen: Seen) -> Option<LeaseStatus> {
        let consumer = u32::from(seen.owner()?);
        Some(LeaseStatus {
            sequence: seen.sequence(),
            consumer,
            pid: group.consumers.get(&consumer).map_or(0, |incarnation| self.pid_of(*incarnation)),
            attempt: seen.attempt().into(),
            ends_in_ms: seen.due_in(clock::now_ms()),
        })
    }
}

/// Outputs.
impl Estate {
    /// The numbers of the inputs that the consumer committed last, one for each topic that it publishes to: what it still
    /// held of them it had finished. Final once it is dead, closed or fenced.
    fn finished_inputs(&self, who: ConsumerRef) -> Vec<u64> {
        let origin = who.origin();
        let last = |entry: &TopicEntry| {
            let known = entry.identities.get(&origin)?;
            let holder = known.holder.and_then(|slot| Some((slot, entry.publishers.get(&slot)?)));
            let noted = holder.and_then(|(slot, publisher)| {
                self.memory(entry.info.id).and_then(|memory| memory.last_number(slot, publisher)).ok().flatten()
            });
            Some(noted.unwrap_or(known.last_number))
        };
        self.state.topics().values().filter_map(last).collect()
    }

    /// Fences the publishers through which the consumer publishes its outputs and dead letters. `false`: one of them cannot
    /// be, because its topic is exclusive and has no other publisher while it lives.
    fn fence_outputs(&mut self, who: ConsumerRef) -> Result<bool, Refusal> {
        let origin = who.origin();
        let held = |entry: &TopicEntry| {
            let slot = entry.identities.get(&origin)?.holder?;
            Some((entry.info.id, slot, entry.info.options.mode))
        };
        let held: Vec<_> = self.state.topics().values().filter_map(held).collect();
        if held.iter().any(|(.., mode)| *mode != Mode::Many) {
            return Ok(false);
        }
        held.into_iter().try_for_each(|(topic, slot, _)| self.carry_out(Event::Fenced { topic, slot }))?;
        Ok(true)
    }
}
