//! What a process keeps so that its bus can go on when both coordinator and keeper have died: a descriptor of each
//! segment of the topics on which it has handles, and of the notices of its wildcard subscriptions
//! (`coordinator/adoption.rs`).

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::coordinator::memory::{ledger_name, own_cursors_name};
use crate::coordinator::protocol::{Answer, HandleRef, Request, SegmentRef, TopicInfo};
use crate::os::process;

/// Descriptors in one packet.
const FDS_PER_PACKET: usize = 64;

/// The share of the descriptors that a process may have which is kept here; the program needs some, too.
const SHARE: u64 = 2;

/// Descriptors of segments, by topic.
pub(crate) struct Holdings {
    topics: HashMap<u64, Holding>,
    /// By wildcard subscription. Few, and so not counted.
    notices: HashMap<u64, Arc<OwnedFd>>,
    kept: usize,
    limit: usize,
    /// What the coordinator is still to be sent.
    packets: VecDeque<Packet>,
}

/// A request with the descriptors that ride along: shared, since a process may have no room for others when it is asked.
pub(crate) type Packet = (Request, Vec<Arc<OwnedFd>>);

struct Holding {
    info: TopicInfo,
    handles: usize,
    /// By the names that the keeper gives them.
    segments: HashMap<String, Arc<OwnedFd>>,
    /// Whether there are others, which could not be kept.
    maps_more: bool,
}

impl Holdings {
    pub(crate) fn new() -> Holdings {
        let limit = usize::try_from(process::descriptor_limit() / SHARE).unwrap_or(usize::MAX);
        Holdings { topics: HashMap::new(), notices: HashMap::new(), kept: 0, limit, packets: VecDeque::new() }
    }

    /// A handle was opened: keeps what came with it. A descriptor that cannot be duplicated, or would be one too many, is
    /// not kept, and its topic would be lost.
    pub(crate) fn opened(&mut self, answer: &Answer, fds: &[OwnedFd]) {
        let (info, segments, number) = match answer {
            Answer::PublisherOpened { info, segments, .. } => (info, segments, 0),
            // Of cursors of its own.
            Answer::SubscriberOpened { info, segments, cursor, .. }
            | Answer::WildcardTopic { info, segments, cursor, .. } => (info, segments, *cursor),
            Answer::ConsumerOpened { info, segments, group, .. } => (info, segments, group.id),
            Answer::WildcardOpened { wildcard } => {
                let copy = fds.first().and_then(|fd| fd.try_clone().ok());
                return self.notices.extend(copy.map(|copy| (*wildcard, Arc::new(copy))));
            }
            _ => return,
        };
        let new = || Holding { info: info.clone(), handles: 0, segments: HashMap::new(), maps_more: false };
        self.topics.entry(info.id).or_insert_with(new).handles += 1;
        for (segment, fd) in segments.iter().zip(fds) {
            self.keep(info.id, name_of(*segment, number), fd);
        }
    }

    /// Keeps one descriptor of a topic on which there are handles.
    pub(crate) fn keep(&mut self, topic: u64, name: String, fd: &OwnedFd) {
        let Some(holding) = self.topics.get_mut(&topic) else { return };
        if holding.segments.contains_key(&name) {
            return;
        }
        let copy = if self.kept < self.limit { fd.try_clone().ok() } else { None };
        match copy {
            Some(copy) => {
                self.kept += 1;
                holding.segments.insert(name, Arc::new(copy));
            }
            None => holding.maps_more = true,
        }
    }

    /// Whether there are handles on a topic.
    pub(crate) fn has(&self, topic: u64) -> bool {
        self.topics.contains_key(&topic)
    }

    /// A handle was closed. Its topic, if that has no other.
    pub(crate) fn closed(&mut self, handle: HandleRef) -> Option<u64> {
        if let HandleRef::Wildcard { wildcard } = handle {
            self.notices.remove(&wildcard);
        }
        let topic = handle.topic()?;
        let holding = self.topics.get_mut(&topic)?;
        holding.handles -= 1;
        // The next subscriber under this number has another one.
        if let HandleRef::Subscriber { cursor, .. } = handle
            && holding.segments.remove(&own_cursors_name(cursor)).is_some()
        {
            self.kept -= 1;
        }
        if holding.handles > 0 {
            return None;
        }
        self.kept -= holding.segments.len();
        self.topics.remove(&topic);
        Some(topic)
    }

    /// The coordinator asks for what there is of these topics and wildcard subscriptions.
    pub(crate) fn plan(&mut self, topics: &[u64], wildcards: &[u64]) {
        self.packets.clear();
        let notices = wildcards.iter().filter_map(|wildcard| Some((*wildcard, self.notices.get(wildcard)?)));
        let notices = notices.map(|(wildcard, fd)| (Request::PresentNotice { wildcard }, vec![fd.clone()]));
        self.packets.extend(notices);
        let mut maps_more = false;
        for holding in topics.iter().filter_map(|topic| self.topics.get(topic)) {
            maps_more |= holding.maps_more;
            let mut segments: Vec<_> = holding.segments.iter().map(|(name, fd)| (name.clone(), fd.clone())).collect();
            // Those that a topic has one of go together, and first: who is too late is told of its end through all of them.
            segments.sort_by_key(|(name, _)| !name.contains('-'));
            while !segments.is_empty() {
                let from = segments.len().saturating_sub(FDS_PER_PACKET);
                let (names, fds) = segments.split_off(from).into_iter().unzip();
                self.packets.push_back((Request::Present { info: holding.info.clone(), names }, fds));
            }
        }
        self.packets.push_back((Request::AllPresented { maps_more }, Vec::new()));
    }

    /// Who asked is gone.
    pub(crate) fn forget_plan(&mut self) {
        self.packets.clear();
    }

    /// What is to be sent next, until it is [`Self::sent`].
    pub(crate) fn next(&self) -> Option<&Packet> {
        self.packets.front()
    }

    pub(crate) fn sent(&mut self) {
        self.packets.pop_front();
    }
}

/// What the keeper calls it. `number`: of the group, or of the cursor.
fn name_of(segment: SegmentRef, number: u32) -> String {
    match segment {
        SegmentRef::Log => "log".to_owned(),
        SegmentRef::Cursors => "cursors".to_owned(),
        SegmentRef::Arena(slot) => arena_name(slot),
        SegmentRef::Channel => "channel".to_owned(),
        SegmentRef::Ledger => ledger_name(number),
        SegmentRef::OwnCursors => own_cursors_name(number),
    }
}

/// The name of a publisher slot's arena among its topic's segments.
pub(crate) fn arena_name(slot: u32) -> String {
    format!("arena-{slot}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::protocol::Request;
    use crate::os::memfd;
    use crate::shm::layout::Geometry;
    use crate::topic::TopicOptions;

    #[test]
    fn what_tells_of_a_topics_end_is_in_one_packet() {
        let options = TopicOptions::default();
        let geometry = Geometry::from_options(&options).unwrap();
        let info = TopicInfo { id: 1, bus: 7, name: "t".to_owned(), generation: 0, options, geometry };
        let mut holdings = Holdings { limit: usize::MAX, ..Holdings::new() };
        let arenas = (0..3 * FDS_PER_PACKET as u32).map(SegmentRef::Arena);
        let segments: Vec<SegmentRef> = [SegmentRef::Log, SegmentRef::Cursors].into_iter().chain(arenas).collect();
        let fds: Vec<OwnedFd> = segments.iter().map(|_| memfd::create("shmbus-test", 0).unwrap()).collect();
        let (publisher, opening, tenancy, last_number) = (1, 1, 0, None);
        let opened = Answer::PublisherOpened { info, slot: 0, publisher, opening, tenancy, last_number, segments };
        holdings.opened(&opened, &fds);
        holdings.plan(&[1], &[]);
        let Some((Request::Present { names, .. }, _)) = holdings.next() else { panic!("nothing to present") };
        assert!(["log", "cursors"].iter().all(|name| names.iter().any(|presented| presented == name)), "{names:?}");
    }
}
