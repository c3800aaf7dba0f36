//! A topic's segments as the coordinator holds them: created, adopted, handed out. What it does in them is beside this
//! file: for publishers, for readers, for groups, and to give messages up.

mod expiry;
mod groups;
mod publishers;
mod readers;
mod reservation;
mod retention;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub(crate) use crate::coordinator::memory::expiry::AtFloor;
use crate::coordinator::memory::groups::GroupMemory;
pub(crate) use crate::coordinator::memory::groups::{LedgerCount, Overdue, ledger_name};
pub(crate) use crate::coordinator::memory::readers::Joined;
pub(crate) use crate::coordinator::memory::reservation::{Reservation, Wanted};
use crate::coordinator::protocol::{SegmentRef, TopicInfo};
use crate::error::Refusal;
use crate::os::memfd::{self, free_elsewhere};
use crate::ring::arena::Arena;
use crate::ring::doorbell::Doorbell;
use crate::ring::log::{Place, TopicState};
use crate::shm::segment::{Access, Kind, Pages, Promise, Segment};
use crate::shm::topic::{self, LogSegments};
use crate::topic::Mode;

/// Longest segment of which the coordinator maps every page at once.
const POPULATED_BYTES: u64 = 64 << 20;

/// How the names of subscribers' own cursors begin.
const OWN_CURSORS: &str = "own-";

/// A topic's segments as the coordinator holds them: every descriptor, all mapped read-write.
pub(crate) struct TopicMemory {
    info: TopicInfo,
    parts: Parts,
    /// By the group's number.
    groups: BTreeMap<u32, GroupMemory>,
    /// By cursor: of subscribers that share none.
    own: BTreeMap<u32, OwnCursors>,
}

/// A segment of cursors of which a subscriber that may hold nobody uses its own: publishers do not know of it.
struct OwnCursors {
    segments: LogSegments,
    fd: OwnedFd,
    /// Its subscriber uses another one, which nobody has: this one stands for it, and is not kept for anybody.
    stands_in: bool,
}

enum Parts {
    Log { segments: LogSegments, log: OwnedFd, cursors: OwnedFd, arenas: Vec<Option<ArenaPart>> },
    Channel { segment: Segment, fd: OwnedFd },
}

struct ArenaPart {
    fd: OwnedFd,
    arena: Arena,
}

impl ArenaPart {
    fn new(info: &TopicInfo, slot: u32, (fd, segment): (OwnedFd, Segment)) -> ArenaPart {
        segment.publish(&info.arena(slot));
        ArenaPart { fd, arena: topic::arena(&segment, &info.geometry) }
    }
}

/// A descriptor that goes into the keeper's store, with its name's last part: "log", "cursors", "arena-3", "ledger-0", "own-5",
/// "channel".
pub(crate) struct StoredSegment<'a> {
    pub(crate) name: String,
    pub(crate) fd: BorrowedFd<'a>,
}

impl TopicMemory {
    /// The segments that [`Self::create`] makes.
    pub(crate) fn first_segments(info: &TopicInfo) -> Vec<Wanted> {
        if info.options.mode == Mode::Channel {
            return vec![Wanted::new(info, "channel".to_owned(), info.channel())];
        }
        vec![
            Wanted::new(info, "log".to_owned(), info.log()),
            Wanted::new(info, "cursors".to_owned(), info.cursors()),
            TopicMemory::arena_segment(info, 0),
        ]
    }

    /// The segment that [`Self::add_arena`] makes.
    pub(crate) fn arena_segment(info: &TopicInfo, slot: u32) -> Wanted {
        Wanted::new(info, format!("arena-{slot}"), info.arena(slot))
    }

    /// Creates log, cursors and the first arena (a channel: its one segment), reserved in full and sealed, of what was `reserved`
    /// for them.
    pub(crate) fn create(info: &TopicInfo, reserved: &mut Reservation) -> Result<TopicMemory, Refusal> {
        let mut made = Vec::new();
        for wanted in TopicMemory::first_segments(info) {
            made.push(reserved.make(wanted)?);
        }
        let mut made = made.into_iter();
        let mut next = || made.next().ok_or_else(|| corrupt(info, "a segment too few".into()));
        if info.options.mode == Mode::Channel {
            let (fd, segment) = next()?;
            segment.publish(&info.channel());
            return Ok(TopicMemory::new(info, Parts::Channel { segment, fd }));
        }
        let ((log_fd, log), (cursors_fd, cursors)) = (next()?, next()?);
        let segments = LogSegments { log, cursors };
        segments.header().format(0);
        segments.cursor_lines(info).iter().for_each(|cursor| cursor.format());
        segments.log.publish(&info.log());
        segments.cursors.publish(&info.cursors());
        let arenas = vec![Some(ArenaPart::new(info, 0, next()?))];
        let parts = Parts::Log { segments, log: log_fd, cursors: cursors_fd, arenas };
        Ok(TopicMemory::new(info, parts))
    }

    /// Bytes that `create` reserves.
    pub(crate) fn footprint_bytes(info: &TopicInfo) -> u64 {
        TopicMemory::first_segments(info).iter().map(|wanted| wanted.promise.len_bytes).sum()
    }

    /// Bytes that a subscriber's own cursors reserve.
    pub(crate) fn cursors_footprint_bytes(info: &TopicInfo) -> u64 {
        info.cursors().len_bytes
    }

    /// Bytes that one more arena reserves.
    pub(crate) fn arena_footprint_bytes(info: &TopicInfo) -> u64 {
        info.arena(0).len_bytes
    }

    /// Takes over segments that an earlier coordinator created; checks every header against `info`.
    pub(crate) fn adopt(info: &TopicInfo, stored: Vec<(String, OwnedFd)>) -> Result<TopicMemory, Refusal> {
        TopicMemory::adopt_by(attach, info, stored)
    }

    /// The same only to [`Self::end`] the topic, which takes no longer for a large one.
    pub(crate) fn adopt_to_end(info: &TopicInfo, stored: Vec<(String, OwnedFd)>) -> Result<TopicMemory, Refusal> {
        TopicMemory::adopt_by(attach_for_a_word, info, stored)
    }

    fn adopt_by(attach: Attach, info: &TopicInfo, stored: Vec<(String, OwnedFd)>) -> Result<TopicMemory, Refusal> {
        let (mut log, mut cursors, mut channel, mut arenas) = (None, None, None, Vec::new());
        let mut own = Vec::new();
        for (name, fd) in stored {
            if let Some(cursor) = name.strip_prefix(OWN_CURSORS).and_then(|number| number.parse().ok()) {
                own.push((cursor, fd));
                continue;
            }
            match name.as_str() {
                "log" => log = Some((attach(info, &fd, &info.log())?, fd)),
                "cursors" => cursors = Some((attach(info, &fd, &info.cursors())?, fd)),
                "channel" => channel = Some((attach(info, &fd, &info.channel())?, fd)),
                other => {
                    let slot = other.strip_prefix("arena-").and_then(|n| n.parse::<u32>().ok());
                    let slot = slot.filter(|slot| *slot < info.options.max_publishers);
                    let slot = slot.ok_or_else(|| corrupt(info, format!("unknown segment {other:?}")))?;
                    let segment = attach(info, &fd, &info.arena(slot))?;
                    put_arena(&mut arenas, slot, ArenaPart { arena: topic::arena(&segment, &info.geometry), fd });
                }
            }
        }
        let parts = match (log, cursors, channel) {
            (Some((log, log_fd)), Some((cursors, cursors_fd)), None) => {
                Parts::Log { segments: LogSegments { log, cursors }, log: log_fd, cursors: cursors_fd, arenas }
            }
            (None, None, Some((segment, fd))) => Parts::Channel { segment, fd },
            _ => return Err(corrupt(info, "some of its segments are missing".into())),
        };
        let mut memory = TopicMemory::new(info, parts);
        own.into_iter().for_each(|(cursor, fd)| memory.adopt_own_cursors(cursor, fd));
        Ok(memory)
    }

    fn new(info: &TopicInfo, parts: Parts) -> TopicMemory {
        TopicMemory { info: info.clone(), parts, groups: BTreeMap::new(), own: BTreeMap::new() }
    }

    /// Every segment with the name it is stored under.
    pub(crate) fn segments(&self) -> Vec<StoredSegment<'_>> {
        let mut all = match &self.parts {
            Parts::Channel { fd, .. } => vec![StoredSegment { name: "channel".into(), fd: fd.as_fd() }],
            Parts::Log { log, cursors, arenas, .. } => {
                let mut all = vec![
                    StoredSegment { name: "log".into(), fd: log.as_fd() },
                    StoredSegment { name: "cursors".into(), fd: cursors.as_fd() },
                ];
                for (slot, part) in arenas.iter().enumerate() {
                    if let Some(part) = part {
                        all.push(StoredSegment { name: format!("arena-{slot}"), fd: part.fd.as_fd() });
                    }
                }
                all
            }
        };
        all.extend(self.stored_ledgers());
        let own = self.own.iter().filter(|(_, own)| !own.stands_in);
        all.extend(own.map(|(cursor, own)| StoredSegment { name: own_cursors_name(*cursor), fd: own.fd.as_fd() }));
        all
    }

    /// Whether a slot's arena exists.
    pub(crate) fn has_arena(&self, slot: u32) -> bool {
        match &self.parts {
            Parts::Channel { .. } => true,
            Parts::Log { arenas, .. } => arenas.get(slot as usize).is_some_and(Option::is_some),
        }
    }

    /// Creates the arena of a publisher slot, of what was `reserved` for it.
    pub(crate) fn add_arena(&mut self, slot: u32, reserved: &mut Reservation) -> Result<(), Refusal> {
        let (info, Parts::Log { arenas, .. }) = (&self.info, &mut self.parts) else { return Ok(()) };
        let made = reserved.make(TopicMemory::arena_segment(info, slot))?;
        put_arena(arenas, slot, ArenaPart::new(info, slot, made));
        Ok(())
    }

    /// Creates the segment of a subscriber's own cursor, or one that stands in for one that is lost.
    pub(crate) fn add_own_cursors(&mut self, cursor: u32, stands_in: bool) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else {
            return Err(corrupt(&self.info, "a channel has no cursors".into()));
        };
        let promise = self.info.cursors();
        let wanted = Wanted::new(&self.info, "own-cursors".to_owned(), promise);
        let (fd, cursors) = Reservation::default().make(wanted)?;
        let segments = LogSegments { log: segments.log.clone(), cursors };
        segments.cursor_lines(&self.info).iter().for_each(|line| line.format());
        segments.cursors.publish(&promise);
        self.own.insert(cursor, OwnCursors { segments, fd, stands_in });
        Ok(())
    }

    /// Takes over the segment of a subscriber's own cursor, if it is what it should be: its subscriber may have garbled it.
    fn adopt_own_cursors(&mut self, cursor: u32, fd: OwnedFd) {
        let Parts::Log { segments, .. } = &self.parts else { return };
        if let Ok(cursors) = attach(&self.info, &fd, &self.info.cursors()) {
            let segments = LogSegments { log: segments.log.clone(), cursors };
            self.own.insert(cursor, OwnCursors { segments, fd, stands_in: false });
        }
    }

    /// Whether there is the segment of a subscriber's own cursor.
    pub(crate) fn has_own_cursors(&self, cursor: u32) -> bool {
        self.own.contains_key(&cursor)
    }

    /// Gives up the segment of a cursor that is nobody's any more.
    pub(crate) fn drop_own_cursors(&mut self, cursor: u32) {
        self.own.remove(&cursor);
    }

    /// The segments in which a cursor lies; `None` on channels.
    fn segments_of(&self, cursor: u32) -> Option<&LogSegments> {
        match (&self.parts, self.own.get(&cursor)) {
            (_, Some(own)) => Some(&own.segments),
            (Parts::Log { segments, .. }, None) => Some(segments),
            (Parts::Channel { .. }, None) => None,
        }
    }

    /// Descriptors for a publisher: log, cursors, own arena, all read-write (a channel: its segment).
    pub(crate) fn publisher_fds(&self, slot: u32) -> Result<Vec<OwnedFd>, Refusal> {
        let system = |e| system(&self.info, "cannot duplicate a descriptor", e);
        match &self.parts {
            Parts::Channel { fd, .. } => Ok(vec![fd.try_clone().map_err(system)?]),
            Parts::Log { log, cursors, .. } => {
                let arena = &self.arena_part(slot)?.fd;
                [log, cursors, arena].into_iter().map(|fd| fd.try_clone().map_err(system)).collect()
            }
        }
    }

    /// Descriptors for a subscriber: log (read-only), the cursors that its own is among (read-write), each arena (read-only) with its slot; a
    /// channel: its segment.
    pub(crate) fn subscriber_fds(&self, cursor: u32) -> Result<Vec<(SegmentRef, OwnedFd)>, Refusal> {
        self.reader_fds(self.own.get(&cursor))
    }

    fn reader_fds(&self, own: Option<&OwnCursors>) -> Result<Vec<(SegmentRef, OwnedFd)>, Refusal> {
        let system = |e| system(&self.info, "cannot duplicate a descriptor", e);
        let (log, cursors, arenas) = match &self.parts {
            Parts::Channel { fd, .. } => return Ok(vec![(SegmentRef::Channel, fd.try_clone().map_err(system)?)]),
            Parts::Log { log, cursors, arenas, .. } => (log, cursors, arenas),
        };
        let mut fds = vec![
            (SegmentRef::Log, memfd::read_only(log.as_fd()).map_err(system)?),
            match own {
                Some(own) => (SegmentRef::OwnCursors, own.fd.try_clone().map_err(system)?),
                None => (SegmentRef::Cursors, cursors.try_clone().map_err(system)?),
            },
        ];
        for (slot, part) in arenas.iter().enumerate() {
            if let Some(part) = part {
                fds.push((SegmentRef::Arena(slot as u32), memfd::read_only(part.fd.as_fd()).map_err(system)?));
            }
        }
        Ok(fds)
    }

    /// A read-only descriptor of one arena, to be pushed to subscribers.
    pub(crate) fn arena_fd(&self, slot: u32) -> Result<OwnedFd, Refusal> {
        let part = self.arena_part(slot)?;
        memfd::read_only(part.fd.as_fd()).map_err(|e| system(&self.info, "cannot reopen an arena", e))
    }

    fn arena_part(&self, slot: u32) -> Result<&ArenaPart, Refusal> {
        let Parts::Log { arenas, .. } = &self.parts else {
            return Err(corrupt(&self.info, "a channel has none".into()));
        };
        let part = arenas.get(slot as usize).and_then(Option::as_ref);
        part.ok_or_else(|| corrupt(&self.info, format!("publisher slot {slot} has no arena")))
    }

    /// Oldest retained and next sequence.
    pub(crate) fn range(&self) -> Result<(u64, u64), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else {
            let Parts::Channel { segment, .. } = &self.parts else { unreachable!("two kinds of parts") };
            return Ok(channel_ends(segment, &self.info));
        };
        let tail = self.tail()?;
        let floor = segments.header().announced().min(tail.position);
        let oldest = match self.info.options.mode {
            _ if floor == tail.position => tail.sequence,
            Mode::Exclusive => floor,
            _ => self.place_at(floor).map_or(tail.sequence, |place| place.sequence),
        };
        Ok((oldest, tail.sequence))
    }

    fn tail(&self) -> Result<Place, Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { unreachable!("a channel has no log") };
        let info = &self.info;
        let tail = match (info.options.mode, info.small_slots()) {
            (Mode::Exclusive, true) => segments.exclusive::<1>(info).tail(),
            (Mode::Exclusive, false) => segments.exclusive::<7>(info).tail(),
            _ => return segments.many(info).tail_from(None).ok_or_else(|| corrupt(info, "no checkpoint".into())),
        };
        let position = tail.ok_or_else(|| corrupt(info, "no checkpoint".into()))?;
        Ok(Place { position, sequence: position })
    }

    /// Whether a publisher waits for room, or was refused for want of it and no reader has moved since.
    pub(crate) fn is_waited_for(&self) -> bool {
        match &self.parts {
            Parts::Channel { segment, .. } => topic::channel_header(segment).writers.is_waited_on(),
            Parts::Log { segments, .. } => segments.readers().writers.is_waited_on(),
        }
    }

    /// Lets go of all of it. Nobody waits until the kernel has freed it.
    pub(crate) fn let_go(self) {
        let groups: u64 = self.groups.values().map(|group| group.footprint_bytes(&self.info)).sum();
        let arenas = match &self.parts {
            Parts::Log { arenas, .. } => arenas.len() as u64 * TopicMemory::arena_footprint_bytes(&self.info),
            Parts::Channel { .. } => 0,
        };
        free_elsewhere(TopicMemory::footprint_bytes(&self.info) + arenas + groups, self);
    }

    /// Marks the topic as removed or its bus as stopped, and wakes everybody.
    pub(crate) fn end(&self, state: TopicState) {
        match &self.parts {
            Parts::Channel { segment, .. } => topic::channel_header(segment).end(state),
            Parts::Log { segments, .. } => {
                segments.header().end(state);
                segments.readers().readers.call_attention();
                segments.readers().writers.call_attention();
                self.own.values().for_each(|own| own.segments.readers().readers.call_attention());
            }
        }
    }
}

/// Wakes whoever sleeps on the bell, after a store that concerns them.
fn wake(bell: &Doorbell) {
    if !bell.is_quiet() {
        bell.ring();
    }
}

/// The name of a subscriber's own cursors among its topic's segments.
pub(crate) fn own_cursors_name(cursor: u32) -> String {
    format!("{OWN_CURSORS}{cursor}")
}

fn put_arena(arenas: &mut Vec<Option<ArenaPart>>, slot: u32, part: ArenaPart) {
    let index = slot as usize;
    if arenas.len() <= index {
        arenas.resize_with(index + 1, || None);
    }
    arenas[index] = Some(part);
}

fn channel_ends(segment: &Segment, info: &TopicInfo) -> (u64, u64) {
    if info.small_slots() {
        topic::channel::<1>(segment, &info.geometry).0.ends()
    } else {
        topic::channel::<7>(segment, &info.geometry).0.ends()
    }
}

/// How the coordinator maps such a segment. What it walks has all its pages mapped at once, up to this length; a longer log it touches
/// here and there, and payloads hardly ever.
fn pages_of(promise: &Promise) -> Pages {
    let is_walked = !matches!(promise.kind, Kind::Arena | Kind::Channel);
    if is_walked && promise.len_bytes <= POPULATED_BYTES { Pages::Populated } else { Pages::AsTouched }
}

/// Maps a segment of a topic.
type Attach = fn(&TopicInfo, &OwnedFd, &Promise) -> Result<Segment, Refusal>;

fn attach_for_a_word(info: &TopicInfo, fd: &OwnedFd, promise: &Promise) -> Result<Segment, Refusal> {
    Segment::attach_for_a_word(fd.as_fd(), promise).map_err(|e| corrupt(info, e.to_string()))
}

fn attach(info: &TopicInfo, fd: &OwnedFd, promise: &Promise) -> Result<Segment, Refusal> {
    let attached = Segment::attach_with(fd.as_fd(), promise, Access::ReadWrite, pages_of(promise));
    attached.map_err(|e| corrupt(info, e.to_string()))
}

fn corrupt(info: &TopicInfo, problem: String) -> Refusal {
    Refusal::Corrupt { topic: info.name.clone(), problem }
}

fn system(info: &TopicInfo, context: &str, error: std::io::Error) -> Refusal {
    Refusal::System { context: format!("topic {:?}: {context}", info.name), problem: error.to_string() }
}
