//! What a coordinator does about segments that came back from participants, or did not, after coordinator and keeper had
//! died together (`coordinator/adoption.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::stat::fstat;

use super::{Estate, broken, system};
use crate::coordinator::adoption::{Gathered, check_inode, reopened};
use crate::coordinator::link::segment_name;
use crate::coordinator::memory::{TopicMemory, ledger_name};
use crate::coordinator::notices::notice_name;
use crate::coordinator::protocol::{HandleRef, TopicInfo};
use crate::coordinator::state::{Event, GIVEN_UP};
use crate::error::Refusal;
use crate::ring::log::TopicState;
use crate::shm::layout::Geometry;

impl Estate {
    /// Writes down the inodes of a topic's segments, so that whoever has to do without us and the keeper knows them again.
    /// Before anybody is granted them; what was not written down has not been granted.
    pub(super) fn record_segments(&mut self, topic: u64) -> Result<(), Refusal> {
        // The event that made them may have failed, and taken the topic along.
        let (Ok(memory), Some(entry)) = (self.memory(topic), self.state.topic(topic)) else { return Ok(()) };
        let mut inodes = Vec::new();
        for segment in memory.segments() {
            let inode = fstat(segment.fd).map_err(|error| system("looking at a segment", &error.into()))?.st_ino;
            if entry.inodes.get(&segment.name) != Some(&inode) {
                inodes.push((segment.name, inode));
            }
        }
        if inodes.is_empty() { Ok(()) } else { self.carry_out(Event::SegmentsKnown { topic, inodes }) }
    }

    /// The same for a wildcard subscription's notice. One that cannot be written down is not granted.
    pub(super) fn record_notice(&mut self, wildcard: u64) -> Result<(), Refusal> {
        let recorded = self.try_record_notice(wildcard);
        if recorded.is_err() {
            self.carry_out(Event::Closed { handle: HandleRef::Wildcard { wildcard } })?;
        }
        recorded
    }

    fn try_record_notice(&mut self, wildcard: u64) -> Result<(), Refusal> {
        let Some(fd) = self.notices.stored_one(wildcard) else { return Ok(()) };
        let inode = fstat(fd).map_err(|error| system("looking at a notice", &error.into()))?.st_ino;
        self.carry_out(Event::NoticeKnown { wildcard, inode })
    }

    /// The same for all topics: our predecessor may have died between the two events. What it had opened for a wildcard
    /// subscription then was not granted, and goes with its owner's next Hello.
    pub(super) fn record_all_segments(&mut self) {
        let topics: Vec<u64> = self.memories.keys().copied().collect();
        for topic in topics {
            if let Err(error) = self.record_segments(topic) {
                eprintln!("shmbus coordinator: topic {topic} could not be presented: {error}");
            }
        }
    }

    /// Puts empty arenas in the place of those that nobody has any more. Their publishers are dead or have left, and nobody
    /// reads the topic, or he would have them; so what lay in them is given up, with all that nobody holds. Where a reader that
    /// is stopped, or kept too few descriptors, may map them yet, nobody gets their slots any more.
    pub(super) fn replace_lost_arenas(&mut self, gathered: &Gathered) {
        let topics: Vec<u64> = self.memories.keys().copied().collect();
        for topic in topics {
            if let Err(error) = self.replace_lost_arenas_of(topic, gathered) {
                eprintln!("shmbus coordinator: topic {topic} is lost: {error}");
                if let Err(error) = self.carry_out(Event::TopicRemoved { topic }) {
                    eprintln!("shmbus coordinator: {error}");
                }
            }
        }
    }

    fn replace_lost_arenas_of(&mut self, topic: u64, gathered: &Gathered) -> Result<(), Refusal> {
        let lost = self.lost_arenas(topic);
        let Some(&first) = lost.first() else { return Ok(()) };
        self.release_past_readers(topic)?;
        // It may have gone with its owner.
        let Ok(entry) = self.entry(topic) else { return Ok(()) };
        // Who has died since it was found alive has its pidfd here until its death is looked at.
        let lives = |incarnation: &u64| self.pidfds.contains_key(incarnation);
        let publishes = |slot: &u32| {
            let is_dropped = gathered.dropped.contains(&HandleRef::Publisher { topic, slot: *slot });
            let withholds = |who: &u64| !is_dropped && lives(who) && !self.is_past(*who);
            entry.publishers.get(slot).is_some_and(|publisher| withholds(&publisher.incarnation))
        };
        if lost.iter().any(publishes) {
            return Err(broken("a living publisher has not presented its arena; it may be stopped"));
        }
        // Also who has died since it was to be released: it holds its place yet.
        let is_read = entry.readers().any(|incarnation| gathered.silent.contains(&incarnation) && lives(&incarnation));
        // First: whoever finds another arena in the place of a lost one looks for no messages of the former. No publisher writes the
        // checkpoint that goes with a lost arena.
        self.memory(topic)?.give_up_all(first)?;
        if is_read {
            // It reads on in what it has, and would read there what is published to another arena in its place.
            let inodes = lost.into_iter().map(|slot| (format!("arena-{slot}"), GIVEN_UP)).collect();
            self.carry_out(Event::SegmentsKnown { topic, inodes })
        } else {
            lost.into_iter().try_for_each(|slot| self.replace_arena(topic, slot))
        }
    }

    /// Arenas that nobody has any more.
    fn lost_arenas(&self, topic: u64) -> Vec<u32> {
        // As above, with another one's.
        let (Ok(entry), Ok(memory)) = (self.entry(topic), self.memory(topic)) else { return Vec::new() };
        let is_lost = |slot: &u32| !memory.has_arena(*slot) && !entry.is_given_up(*slot);
        entry.arenas.iter().copied().filter(is_lost).collect()
    }

    /// Releases who read the topic and has died since it was found alive: what it held would keep what nobody else does. The other
    /// dead are released by and by, as always.
    fn release_past_readers(&mut self, topic: u64) -> Result<(), Refusal> {
        let past: BTreeSet<u64> = self.entry(topic)?.readers().filter(|who| self.is_past(*who)).collect();
        past.into_iter().try_for_each(|who| self.release_participant(who))
    }

    /// A keeper that is stopped takes no topic along.
    fn replace_arena(&mut self, topic: u64, slot: u32) -> Result<(), Refusal> {
        let prepared = self.prepare_arena(topic, slot);
        if prepared.is_err() && self.memory(topic)?.has_arena(slot) {
            self.unkept.insert(segment_name(topic, &format!("arena-{slot}")));
            return Ok(());
        }
        prepared
    }

    /// Topics of which these handles are on what is lost or removed, the topic or a group: whoever holds them has to be told
    /// through their memory.
    pub(crate) fn topics_to_end(&self, holds: &[HandleRef]) -> Vec<u64> {
        let lost = |handle: &&HandleRef| match **handle {
            HandleRef::Consumer { topic, group, .. } => {
                self.memory(topic).is_ok_and(|memory| !memory.has_ledger(group)) || self.state.topic(topic).is_none()
            }
            _ => handle.topic().is_some_and(|topic| self.state.topic(topic).is_none()),
        };
        let mut unknown: Vec<u64> = holds.iter().filter(lost).filter_map(HandleRef::topic).collect();
        unknown.sort_unstable();
        unknown.dedup();
        unknown
    }

    /// A participant's wildcard subscriptions whose notices only their owner has.
    pub(crate) fn notices_to_present(&self, incarnation: u64) -> Vec<u64> {
        let wildcards = self.state.wildcards().iter().filter(|(_, entry)| entry.incarnation == incarnation);
        let lacking = wildcards.map(|(wildcard, _)| *wildcard);
        lacking.filter(|wildcard| self.notices.stored_one(*wildcard).is_none()).collect()
    }

    /// Takes the notice of a wildcard subscription whose owner came after everybody else, and says in it what has been said
    /// without it meanwhile.
    pub(crate) fn adopt_presented(&mut self, incarnation: u64, wildcard: u64, fd: OwnedFd) -> Result<(), Refusal> {
        let entry = self.state.wildcards().get(&wildcard).filter(|entry| entry.incarnation == incarnation);
        let Some((entry, inode)) = entry.and_then(|entry| Some((entry, entry.notice?))) else { return Ok(()) };
        if self.notices.stored_one(wildcard).is_some() {
            return Ok(());
        }
        let (label, name) = (entry.pattern.clone(), notice_name(wildcard));
        check_inode(&label, &name, fd.as_fd(), inode)?;
        let fd = reopened(&label, &name, fd)?;
        if let Some(link) = &mut self.link {
            link.store(&name, fd.as_fd())?;
        }
        let adopted = self.notices.adopt(self.state.bus, wildcard, fd);
        adopted.map_err(|error| Refusal::Presented { topic: label, segment: name, problem: error.to_string() })?;
        self.tell(wildcard);
        Ok(())
    }

    /// Tells everybody who holds a topic or group that is lost, through the memory that one of them has presented too late.
    pub(crate) fn end_presented(
        &mut self,
        info: &TopicInfo,
        segments: BTreeMap<String, OwnedFd>,
    ) -> Result<(), Refusal> {
        if self.state.topic(info.id).is_some() {
            return self.end_presented_groups(info.id, segments);
        }
        let ours = info.bus == self.state.bus;
        if !ours || Geometry::from_options(&info.options).as_ref() != Ok(&info.geometry) {
            let problem = "presented a topic that was not asked for".to_owned();
            return Err(Refusal::Protocol { problem });
        }
        let segments = segments.into_iter().filter(|(name, _)| tells_the_end(name));
        let segments = segments.map(|(name, fd)| Ok((name.clone(), reopened(&info.name, &name, fd)?)));
        TopicMemory::adopt_to_end(info, segments.collect::<Result<_, Refusal>>()?)?.end(TopicState::Removed);
        Ok(())
    }

    /// Whether to hear of a topic again of which these segments were presented: the topic as a whole is ended once, its groups
    /// one by one.
    pub(crate) fn is_heard_of(&self, topic: u64, names: &[String]) -> bool {
        self.state.topic(topic).is_none() && names.iter().any(|name| tells_the_end(name))
    }

    /// Ends the groups whose ledgers are among these segments and were lost before.
    fn end_presented_groups(&mut self, topic: u64, segments: BTreeMap<String, OwnedFd>) -> Result<(), Refusal> {
        let (Some(entry), Some(memory)) = (self.state.topic(topic), self.memories.get_mut(&topic)) else {
            return Ok(());
        };
        let lost: Vec<_> = entry.groups.values().filter(|group| !memory.has_ledger(group.info.id)).collect();
        for (name, fd) in segments {
            let group = lost.iter().find(|group| group.retired && ledger_name(group.info.id) == name);
            let Some((group, inode)) = group.zip(entry.inodes.get(&name)) else { continue };
            check_inode(&entry.info.name, &name, fd.as_fd(), *inode)?;
            memory.adopt_ledger(&group.info, reopened(&entry.info.name, &name, fd)?)?;
            // Its line was taken out of force when the group was given up.
            memory.end_ledger(group.info.id);
        }
        Ok(())
    }
}

/// Whether it is through this segment, among others, that those who hold a topic learn of its end.
fn tells_the_end(name: &str) -> bool {
    matches!(name, "log" | "cursors" | "channel")
}
