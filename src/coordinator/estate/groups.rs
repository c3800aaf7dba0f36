//! Groups: their events carried out, their answers and their status.
//!
//! A group takes a ledger and a cursor's line: keeper, registry, then the line comes into force, then the ledger begins
//! where the line stands. A ledger that has not begun is not known to anybody, and a successor begins it. A group that
//! ends is logged first, like everything that ends for others too; a successor says so again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::{Estate, Granted, broken};
use crate::client::envelope::now_ns;
use crate::coordinator::burial::GroupNames;
use crate::coordinator::link::segment_name;
use crate::coordinator::memory::{AtFloor, LedgerCount, Overdue, TopicMemory, ledger_name};
use crate::coordinator::names::NameEntry;
use crate::coordinator::protocol::{
    Answer, ConsumerStatus, GroupInfo, GroupStatus, HandleRef, Identity, LeaseStatus, StartAt, input_number,
};
use crate::coordinator::state::{Event, GroupEntry, TopicEntry};
use crate::error::Refusal;
use crate::group::Guarantee;
use crate::os::clock;
use crate::ring::ledger::{Owners, Seen};
use crate::topic::Mode;

/// Words of a ledger that are gone through for a reclaim while who asks for it is served.
const RECLAIM_WORDS: u64 = 1 << 14;

/// How long to rest after a reclaim of more, in times of what it took.
const RECLAIM_REST: u32 = 3;

/// Reclaims that are put off because they take long.
pub(super) struct Reclaims {
    /// Whose the topic is, and from whom to reclaim.
    waiting: BTreeSet<(u32, ConsumerRef)>,
    /// Whose topic the last one was on: it is others' turn.
    last_uid: Option<u32>,
    /// Of each owner the last one: those behind it have their turn before it has the next.
    last_of: BTreeMap<u32, ConsumerRef>,
    not_before: Instant,
}

impl Reclaims {
    pub(super) fn new() -> Reclaims {
        Reclaims { waiting: BTreeSet::new(), last_uid: None, last_of: BTreeMap::new(), not_before: Instant::now() }
    }

    fn take_next(&mut self) -> Option<ConsumerRef> {
        let from = self.last_uid.map_or(0, |uid| uid.wrapping_add(1));
        let behind = self.waiting.range((from, ConsumerRef::FIRST)..).next();
        let first = *behind.or(self.waiting.first())?;
        let uid = first.0;
        let of_owner = |last: &ConsumerRef| {
            let behind = (Bound::Excluded((uid, *last)), Bound::Included((uid, ConsumerRef::LAST)));
            self.waiting.range(behind).next().copied()
        };
        let next = self.last_of.get(&uid).and_then(of_owner).unwrap_or(first);
        self.waiting.remove(&next);
        self.last_uid = Some(uid);
        self.last_of.insert(uid, next.1);
        if self.waiting.is_empty() {
            self.last_of.clear();
        }
        Some(next.1)
    }
}

/// What was found when what has expired was settled.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Expired {
    /// There is more to settle.
    pub(crate) more: bool,
    /// The groups that nobody consumes where something is to go to the dead-letter topic.
    pub(crate) letters: Vec<GroupNames>,
}

/// A consumer by topic, group and number in the group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ConsumerRef {
    pub(super) topic: u64,
    pub(super) group: u32,
    pub(super) consumer: u32,
}

impl ConsumerRef {
    const FIRST: ConsumerRef = ConsumerRef { topic: 0, group: 0, consumer: 0 };
    const LAST: ConsumerRef = ConsumerRef { topic: u64::MAX, group: u32::MAX, consumer: u32::MAX };

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
        memory.create_ledger(group, &mut self.at_hand)?;
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

    /// Takes back what consumers of a group hold that are dead, have left or are fenced. Idempotent.
    pub(super) fn release_consumers(&self, topic: u64, group: u32, consumers: &Owners) {
        let Ok(memory) = self.memory(topic) else { return };
        let finished = self.finished_inputs(topic, group, consumers);
        let committed = |consumer, sequence| finished.contains(&(consumer, input_number(sequence)));
        memory.release_consumers(group, consumers, committed);
    }

    /// Another consumer of the group found that `who` holds what is overdue. Where that takes long it is done later, see
    /// [`Self::reclaim_next`]: who asked does not wait for it, but others would.
    pub(super) fn reclaim(&mut self, who: ConsumerRef) -> Result<(), Refusal> {
        if self.memory(who.topic)?.window_words(who.group) <= RECLAIM_WORDS {
            return self.reclaim_now(who);
        }
        // What waits is no more than there are consumers.
        if self.state.group(who.topic, who.group).is_none_or(|group| !group.consumers.contains_key(&who.consumer)) {
            return Ok(());
        }
        let uid = self.entry(who.topic)?.uid;
        self.reclaims.waiting.insert((uid, who));
        Ok(())
    }

    /// When to call [`Self::reclaim_next`]; `None`: nothing waits for it.
    pub(crate) fn reclaim_at(&self) -> Option<Instant> {
        (!self.reclaims.waiting.is_empty()).then_some(self.reclaims.not_before)
    }

    /// Does one reclaim that was put off, of each topics' owner in turn, and then rests for longer than it took.
    pub(crate) fn reclaim_next(&mut self) {
        let Some(who) = self.reclaims.take_next() else { return };
        let began = Instant::now();
        // Gone meanwhile, say.
        if let Err(error) = self.reclaim_now(who) {
            eprintln!("shmbus coordinator: reclaiming what is overdue: {error}");
        }
        self.reclaims.not_before = Instant::now() + began.elapsed() * RECLAIM_REST;
    }

    /// Gives away what `who` holds and is overdue, be it the role of an exclusive group, on the ledger's own word: all of it, once
    /// its outputs are fenced, where they matter; otherwise what is overdue. Idempotent.
    fn reclaim_now(&mut self, who: ConsumerRef) -> Result<(), Refusal> {
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
            self.release_consumers(who.topic, who.group, &Owners::from_iter([who.slot()]));
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

    /// Settles what has expired at the groups' floors, until `time` is up; what was found, once every group has had its turn.
    pub(crate) fn settle_expired(&mut self, time: Duration) -> Option<Expired> {
        let (end, now_ns) = (Instant::now() + time, now_ns());
        let state = &self.state;
        self.expiring.retain(|(topic, group)| state.group(*topic, *group).is_some_and(|group| !group.retired));
        if self.rest.expiring.is_empty() {
            self.rest.expiring.clone_from(&self.expiring);
        }
        while let Some((topic, group)) = self.rest.expiring.pop() {
            self.settle_expired_of(topic, group, now_ns);
            if Instant::now() >= end {
                break;
            }
        }
        self.rest.expiring.is_empty().then(|| std::mem::take(&mut self.rest.expired))
    }

    fn settle_expired_of(&mut self, topic: u64, group: u32, now_ns: u64) {
        let (Some(entry), Ok(memory)) = (self.state.group(topic, group), self.memory(topic)) else { return };
        match memory.settle_expired(group, entry.info.options.dead_letter_expired, now_ns) {
            Ok(AtFloor::More) => self.rest.expired.more = true,
            Ok(AtFloor::Letter) if entry.consumers.is_empty() => {
                let topic = self.state.topic(topic).map(|topic| topic.info.name.clone());
                self.rest.expired.letters.extend(topic.map(|topic| (topic, entry.info.name.clone())));
            }
            Ok(_) => {}
            Err(error) => eprintln!("shmbus coordinator: settling what has expired: {error}"),
        }
    }

    /// Keeps the due times of all ledgers from coming round, until `time` is up; for every few hours. Whether those were all.
    pub(crate) fn renew_due(&mut self, time: Duration) -> bool {
        let (end, now_ms) = (Instant::now() + time, clock::now_ms());
        if self.rest.to_renew.is_empty() {
            let groups = |(topic, memory): (&u64, &TopicMemory)| {
                let topic = *topic;
                memory.groups().map(move |group| (topic, group)).collect::<Vec<_>>()
            };
            self.rest.to_renew = self.memories.iter().flat_map(groups).collect();
        }
        while let Some((topic, group)) = self.rest.to_renew.pop() {
            self.memories.get(&topic).inspect(|memory| memory.renew_due(group, now_ms));
            if Instant::now() >= end {
                break;
            }
        }
        self.rest.to_renew.is_empty()
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

    /// How many words of ledgers [`Self::group_statuses`] looks at.
    pub(super) fn window_words(&self, entry: &TopicEntry) -> u64 {
        let Some(memory) = self.memories.get(&entry.info.id) else { return 0 };
        entry.living_groups().map(|group| memory.window_words(group.info.id)).sum()
    }

    /// The groups of a topic whose next sequence is `tail`, by name. What was counted `since` then is not counted again.
    pub(super) fn group_statuses(&self, entry: &TopicEntry, tail: u64, since: Instant) -> Vec<GroupStatus> {
        let topic = entry.info.id;
        let memory = self.memories.get(&topic);
        let status = |group: &GroupEntry| match self.counted_since(topic, group.info.id, since) {
            Some(count) => self.group_status(group, count, tail),
            None => {
                let count = memory.and_then(|memory| memory.count_ledger(group.info.id)).unwrap_or_default();
                self.group_status(group, &count, tail)
            }
        };
        let mut groups: Vec<GroupStatus> = entry.living_groups().map(status).collect();
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
    /// The numbers of the inputs that these consumers of a group committed last, one for each topic that one publishes to: what
    /// it still held of them it had finished. Final once it is dead, closed or fenced.
    fn finished_inputs(&self, topic: u64, group: u32, consumers: &Owners) -> BTreeSet<(u8, u64)> {
        let origin = |consumer| Identity::Origin { topic, group, consumer };
        let of_group = origin(0)..=origin(u32::MAX);
        let last = |entry: &TopicEntry, known: &NameEntry| {
            let holder = known.holder.and_then(|slot| Some((slot, entry.publishers.get(&slot)?)));
            let noted = holder.and_then(|(slot, publisher)| {
                self.memory(entry.info.id).and_then(|memory| memory.last_number(slot, publisher)).ok().flatten()
            });
            noted.unwrap_or(known.last_number)
        };
        let of_topic = |entry: &TopicEntry| {
            let known = entry.identities.range(of_group.clone()).filter_map(|(identity, known)| match identity {
                // The state gives numbers below the ledger's limit only.
                Identity::Origin { consumer, .. } => Some((*consumer as u8, known)),
                Identity::Named(_) => None,
            });
            let released = known.filter(|(consumer, _)| consumers.contains(*consumer));
            released.map(|(consumer, known)| (consumer, last(entry, known))).collect::<Vec<_>>()
        };
        self.state.topics().values().flat_map(of_topic).collect()
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
