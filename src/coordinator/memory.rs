//! What the coordinator does to a topic's shared memory: create, adopt, join, leave, recover, report.

mod expiry;
mod groups;
mod retention;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub(crate) use crate::coordinator::memory::expiry::AtFloor;
use crate::coordinator::memory::groups::GroupMemory;
pub(crate) use crate::coordinator::memory::groups::{LedgerCount, ledger_name};
use crate::coordinator::protocol::{Identity, SegmentRef, StartAt, TopicInfo};
use crate::coordinator::state::PublisherEntry;
use crate::error::{Holder, Refusal};
use crate::os::memfd;
use crate::ring::arena::Arena;
use crate::ring::cursor::Cursor;
use crate::ring::doorbell::Doorbell;
use crate::ring::gate::{Gate, Stop, still_retained};
use crate::ring::log::{MAX_PLACE, Place, TopicState, find_place};
use crate::ring::many::{EntryWord, ManyLog, Record};
use crate::ring::spsc::Channel;
use crate::shm::segment::{Access, Promise, Segment};
use crate::shm::topic::{self, LogSegments};
use crate::topic::Mode;

/// How the names of subscribers' own cursors begin.
const OWN_CURSORS: &str = "own-";

/// Garbled records in a row that a search for a start steps over.
const MAX_UNSOUND: u32 = 1024;

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

/// A descriptor that goes into the keeper's store, with its name's last part: "log", "cursors", "arena-3", "ledger-0", "own-5",
/// "channel".
pub(crate) struct StoredSegment<'a> {
    pub(crate) name: String,
    pub(crate) fd: BorrowedFd<'a>,
}

/// Where a subscriber begins. On topics with many publishers this is the batch that holds the sequence asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joined {
    pub(crate) position: u64,
    pub(crate) sequence: u64,
    /// The sequence asked for: what the batch holds below it is not to be delivered.
    pub(crate) asked: u64,
}

impl TopicMemory {
    /// Creates log, cursors and the first arena (a channel: its one segment), reserved in full and sealed.
    pub(crate) fn create(info: &TopicInfo) -> Result<TopicMemory, Refusal> {
        if info.options.mode == Mode::Channel {
            let (fd, segment) = new_segment(info, "channel", &info.channel())?;
            if info.small_slots() {
                topic::channel::<1>(&segment, &info.geometry).0.format();
            } else {
                topic::channel::<7>(&segment, &info.geometry).0.format();
            }
            segment.publish(&info.channel());
            return Ok(TopicMemory::new(info, Parts::Channel { segment, fd }));
        }
        let (log_fd, log) = new_segment(info, "log", &info.log())?;
        let (cursors_fd, cursors) = new_segment(info, "cursors", &info.cursors())?;
        let segments = LogSegments { log, cursors };
        segments.header().format(0);
        segments.cursor_lines(info).iter().for_each(|cursor| cursor.format());
        segments.log.publish(&info.log());
        segments.cursors.publish(&info.cursors());
        let arenas = Vec::new();
        let parts = Parts::Log { segments, log: log_fd, cursors: cursors_fd, arenas };
        let mut memory = TopicMemory::new(info, parts);
        memory.add_arena(info, 0)?;
        Ok(memory)
    }

    /// Bytes that `create` reserves.
    pub(crate) fn footprint_bytes(info: &TopicInfo) -> u64 {
        if info.options.mode == Mode::Channel {
            return info.channel().len_bytes;
        }
        info.log().len_bytes + info.cursors().len_bytes + info.arena(0).len_bytes
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

    /// Creates the arena of a publisher slot.
    pub(crate) fn add_arena(&mut self, info: &TopicInfo, slot: u32) -> Result<(), Refusal> {
        let Parts::Log { arenas, .. } = &mut self.parts else { return Ok(()) };
        let (fd, segment) = new_segment(info, &format!("arena-{slot}"), &info.arena(slot))?;
        segment.publish(&info.arena(slot));
        put_arena(arenas, slot, ArenaPart { fd, arena: topic::arena(&segment, &info.geometry) });
        Ok(())
    }

    /// Creates the segment of a subscriber's own cursor, or one that stands in for one that is lost.
    pub(crate) fn add_own_cursors(&mut self, cursor: u32, stands_in: bool) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else {
            return Err(corrupt(&self.info, "a channel has no cursors".into()));
        };
        let promise = self.info.cursors();
        let (fd, cursors) = new_segment(&self.info, "own-cursors", &promise)?;
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

    /// Puts a publisher in force before it is told: on exclusive topics its tenancy, under an identity (whose last number is
    /// `before`) its note.
    pub(crate) fn begin_publisher(
        &self,
        slot: u32,
        opened: &PublisherEntry,
        before: Option<u64>,
    ) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(()) };
        let header = segments.header();
        if self.info.options.mode == Mode::Exclusive {
            let tail = self.tail()?.position;
            header.begin_tenancy(opened.tenancy, tail, opened.publisher, before.unwrap_or(0) + 1);
        }
        // Last: it says that the tenancy is there, too.
        if let Some(last) = before {
            header.begin_note(slot, opened.opening, last);
        }
        Ok(())
    }

    /// The number that a publisher with an identity committed last; `None` where it never came into force. Final once the
    /// publisher is dead, closed or fenced.
    pub(crate) fn last_number(&self, slot: u32, publisher: &PublisherEntry) -> Result<Option<u64>, Refusal> {
        let last = self.noted_number(slot, publisher)?;
        // Numbers go on from here, and must not overflow.
        match last.filter(|last| *last > MAX_PLACE) {
            Some(last) => Err(corrupt(&self.info, format!("its publisher's last number is said to be {last}"))),
            None => Ok(last),
        }
    }

    fn noted_number(&self, slot: u32, publisher: &PublisherEntry) -> Result<Option<u64>, Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(None) };
        let header = segments.header();
        let note = header.note(slot);
        if self.info.options.mode == Mode::Many {
            let log = segments.many(&self.info);
            return Ok(note.last(publisher.opening, |position| log.owns(slot, position)));
        }
        let noted = note.last(publisher.opening, |position| self.commits(position));
        if noted.is_none() || matches!(publisher.identity, Some(Identity::Origin { .. })) {
            return Ok(noted);
        }
        // A name's numbers are dense, so where nobody else publishes the tail says it.
        let (position, number) = header.tenancy(publisher.tenancy);
        let published = self.tail()?.position.saturating_sub(position);
        Ok(Some(number.saturating_sub(1).saturating_add(published)))
    }

    /// Whether an exclusive topic's message at `position` is committed and still there.
    fn commits(&self, position: u64) -> bool {
        match &self.parts {
            Parts::Log { segments, .. } if self.info.small_slots() => {
                segments.exclusive::<1>(&self.info).tenancy_at(position).is_some()
            }
            Parts::Log { segments, .. } => segments.exclusive::<7>(&self.info).tenancy_at(position).is_some(),
            Parts::Channel { .. } => false,
        }
    }

    /// Whether there is room for a fence; who holds the ring, where there is none.
    pub(crate) fn has_room_for_fence(&self) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(()) };
        let fenced = segments.many(&self.info).has_room_for_fence(&self.info.policy());
        fenced.map_err(|stop| self.cannot_fence(stop))
    }

    /// Commits a fence for a publisher of a topic for many: after this it commits nothing any more.
    pub(crate) fn fence(&self, slot: u32, opening: u64) -> Result<(), Refusal> {
        let Parts::Log { segments, .. } = &self.parts else { return Ok(()) };
        let fenced = segments.many(&self.info).fence(&self.info.policy(), slot, opening);
        fenced.map_err(|stop| self.cannot_fence(stop))?;
        // Readers step over it, and the fenced one may be waiting for room.
        wake(&segments.readers().readers);
        wake(&segments.readers().writers);
        Ok(())
    }

    fn cannot_fence(&self, stop: Stop) -> Refusal {
        match stop {
            Stop::Blocked(blocked) => {
                let holder = blocked.cursor.map_or(Holder::Hold, |cursor| self.holder(cursor));
                Refusal::FullForFence { topic: self.info.name.clone(), holder: holder.to_string() }
            }
            Stop::Corrupt(problem) => corrupt(&self.info, problem.to_owned()),
            Stop::Fenced | Stop::Duplicate(_) => corrupt(&self.info, "the coordinator cannot fence".to_owned()),
        }
    }

    /// Repairs what a dead (or leaves tidy what a departed) publisher left, and wakes the readers that it may have died over
    /// waking. Idempotent.
    pub(crate) fn end_publisher(&self, _slot: u32) -> Result<(), Refusal> {
        let repaired = self.clear_after_publisher();
        match &self.parts {
            Parts::Channel { segment, .. } => topic::channel_header(segment).readers.ring_again(),
            Parts::Log { segments, .. } => segments.readers().readers.ring_again(),
        }
        repaired
    }

    fn clear_after_publisher(&self) -> Result<(), Refusal> {
        match (&self.parts, self.info.options.mode, self.info.small_slots()) {
            (Parts::Channel { segment, .. }, _, true) => clear_channel::<1>(segment, &self.info),
            (Parts::Channel { segment, .. }, _, false) => clear_channel::<7>(segment, &self.info),
            (Parts::Log { segments, .. }, Mode::Exclusive, small) => {
                let tail = self.tail()?;
                if small {
                    segments.exclusive::<1>(&self.info).clear_above(tail.position);
                } else {
                    segments.exclusive::<7>(&self.info).clear_above(tail.position);
                }
                segments.header().store_checkpoint(0, tail);
            }
            // One compare-and-swap leaves nothing behind; the arena passes on with what is in it.
            (Parts::Log { .. }, _, _) => {}
        }
        Ok(())
    }

    /// Puts a subscriber's cursor in force at its start position. Idempotent for one owner.
    pub(crate) fn join(&self, cursor: u32, owner: u64, start: StartAt, droppable: bool) -> Result<Joined, Refusal> {
        self.join_line(cursor, start, |line| line.occupy(owner, droppable))
    }

    /// The same for a group's cursor.
    fn join_group(&self, cursor: u32, group: u32, start: StartAt) -> Result<Joined, Refusal> {
        self.join_line(cursor, start, |line| line.occupy_group(group.into()))
    }

    fn join_line(&self, cursor: u32, start: StartAt, occupy: impl FnOnce(&Cursor)) -> Result<Joined, Refusal> {
        let Some(segments) = self.segments_of(cursor) else { return self.join_channel() };
        let lines = segments.cursor_lines(&self.info);
        let line = lines.get(cursor as usize).ok_or_else(|| corrupt(&self.info, format!("no cursor {cursor}")))?;
        let (header, readers) = (segments.header(), segments.readers());
        let gate = Gate { header: &header, readers: &readers, cursors: &lines };
        let tail = self.tail()?;
        let asked = match start {
            StartAt::Latest => tail.sequence,
            StartAt::Oldest | StartAt::Scan => 0,
            StartAt::Last(count) => tail.sequence.saturating_sub(count),
            StartAt::Sequence(sequence) if sequence > tail.sequence => {
                let topic = self.info.name.clone();
                return Err(Refusal::BeyondTail { topic, asked: sequence, tail: tail.sequence });
            }
            StartAt::Sequence(sequence) => sequence,
        };
        occupy(line);
        let place = self.find_start(&gate, cursor, asked, tail);
        match place {
            Some(place) => line.advance(place.position, place.sequence),
            None => line.vacate(),
        }
        // While the search ran, the cursor stood lower than it stands now: a publisher may have gone to sleep over that.
        wake(&readers.writers);
        let Place { position, sequence } =
            place.ok_or_else(|| corrupt(&self.info, "no record leads to the start position".into()))?;
        Ok(Joined { position, sequence, asked })
    }

    /// Puts the cursor in force at the batch that holds `asked`, or at the oldest retained one.
    fn find_start(&self, gate: &Gate<'_>, cursor: u32, asked: u64, tail: Place) -> Option<Place> {
        if asked >= tail.sequence || self.info.options.mode == Mode::Exclusive {
            let wanted = if asked >= tail.sequence { tail } else { Place { position: asked, sequence: asked } };
            // Not lower than what is retained, not even for a moment: publishers would take it for a reader to wait for.
            let position = gate.join(cursor, wanted.position.max(gate.header.announced()));
            if position == wanted.position {
                return Some(wanted);
            }
            if self.info.options.mode == Mode::Exclusive {
                // Not retained any more. An intent far ahead of the tail is garbage.
                let sane = position <= tail.position.saturating_add(2 * self.info.geometry.slots);
                return sane.then_some(Place { position, sequence: position });
            }
        }
        // In force at the oldest first: from here on the search runs over memory that stays (I-4). Only a reader that
        // holds nothing back can be overtaken by publishers meanwhile; it tries again from what is the oldest then.
        find_place(|| gate.join(cursor, gate.header.announced()), |oldest| self.place_of(asked, oldest, tail))
    }

    fn join_channel(&self) -> Result<Joined, Refusal> {
        let Parts::Channel { segment, .. } = &self.parts else { unreachable!("join handles logs") };
        let (head, _) = channel_ends(segment, &self.info);
        Ok(Joined { position: head, sequence: head, asked: head })
    }

    /// The batch that holds `sequence`, or the oldest from `oldest` on; `None` where it was overwritten during the search.
    fn place_of(&self, sequence: u64, oldest: u64, tail: Place) -> Option<Place> {
        // Invariant: the batch at `low` begins at or before `sequence`, or is the oldest.
        let (mut low, mut high) = (oldest, tail.position.max(oldest));
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match self.place_at(middle) {
                Some(place) if place.sequence > sequence => high = middle,
                // Overwritten meanwhile: later ones are still there.
                _ => low = middle,
            }
        }
        self.place_at(low)
    }

    /// Position and sequence of what is at `position`, or of the tail; `None` where it is neither there nor next.
    fn confirmed_place(&self, position: u64) -> Result<Option<Place>, Refusal> {
        if self.info.options.mode != Mode::Exclusive {
            return Ok(self.place_at(position));
        }
        let tail = self.tail()?.position;
        Ok((position <= tail).then_some(Place { position, sequence: position }))
    }

    /// Position and sequence of the batch at `position`, from its record, or from the next one that has any to say: a fence has
    /// none, and a garbled one tells nothing. Its reader is to meet it: who reads from there on is told.
    fn place_at(&self, position: u64) -> Option<Place> {
        let Parts::Log { segments, .. } = &self.parts else { return None };
        let log: ManyLog = segments.many(&self.info);
        let (mut at, mut between, mut unsound) = (position, 0, 0);
        let sequence = loop {
            let Some(word) = log.committed(at) else {
                break log.tail_from(None).filter(|tail| tail.position == at)?.sequence;
            };
            if !word.is_fence() {
                match self.first_sequence(at, word) {
                    Some(sequence) => break sequence,
                    None if unsound == MAX_UNSOUND => return None,
                    None => unsound += 1,
                }
            }
            between += word.count();
            at += 1;
            if at - position > self.info.geometry.slots {
                return None;
            }
        };
        // Overwritten while it was copied, it may tell the position of one message and the sequence of another.
        let sequence = sequence.checked_sub(between).filter(|_| still_retained(&segments.header(), position))?;
        Some(Place { position, sequence })
    }

    /// What the record of a committed entry says; `None` where it is another's, or none.
    fn first_sequence(&self, position: u64, word: EntryWord) -> Option<u64> {
        let Parts::Log { arenas, .. } = &self.parts else { return None };
        let (slot, offset) = topic::locate(&self.info.geometry, word.unit());
        let record = Record::read(&arenas.get(slot as usize)?.as_ref()?.arena, offset)?;
        (record.position == position).then_some(record.first_sequence)
    }

    /// Takes a cursor out of force and wakes publishers that it held, or died over waking. Idempotent. `from_oldest`: its reader began with the
    /// oldest message, so that on a topic that holds nothing below the cursor is unread.
    pub(crate) fn leave(&self, cursor: u32, from_oldest: bool) {
        let segments = match (&self.parts, self.segments_of(cursor)) {
            (Parts::Channel { segment, .. }, _) => return topic::channel_header(segment).writers.ring_again(),
            (_, Some(segments)) => segments,
            (_, None) => return,
        };
        let (header, readers, lines) = (segments.header(), segments.readers(), segments.cursor_lines(&self.info));
        let Some(line) = lines.get(cursor as usize) else { return };
        if self.info.options.hold
            && from_oldest
            && let Ok(tail) = self.tail()
        {
            Gate { header: &header, readers: &readers, cursors: &lines }.release_read(tail.position);
        }
        line.vacate();
        readers.writers.ring_again();
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

    /// A cursor's sequence.
    pub(crate) fn cursor_sequence(&self, cursor: u32) -> u64 {
        match (&self.parts, self.segments_of(cursor)) {
            (Parts::Channel { segment, .. }, _) => channel_ends(segment, &self.info).0,
            (_, Some(segments)) => {
                segments.cursor_lines(&self.info).get(cursor as usize).map_or(0, |line| line.sequence())
            }
            (_, None) => 0,
        }
    }

    /// Whether a cursor is in force for this owner.
    pub(crate) fn is_in_force(&self, cursor: u32, owner: u64) -> bool {
        let Some(segments) = self.segments_of(cursor) else { return true };
        segments.cursor_lines(&self.info).get(cursor as usize).is_some_and(|line| line.is_in_force_for(owner))
    }

    /// Where a cursor stands; `None` where it is not in force.
    pub(crate) fn cursor_place(&self, cursor: u32) -> Option<Place> {
        let segments = self.segments_of(cursor)?;
        segments.cursor_lines(&self.info).get(cursor as usize)?.place()
    }

    /// Whether a publisher waits for room, or was refused for want of it and no reader has moved since.
    pub(crate) fn is_waited_for(&self) -> bool {
        match &self.parts {
            Parts::Channel { segment, .. } => topic::channel_header(segment).writers.is_waited_on(),
            Parts::Log { segments, .. } => segments.readers().writers.is_waited_on(),
        }
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

fn clear_channel<const W: usize>(segment: &Segment, info: &TopicInfo) {
    let (channel, _): (Channel<W>, _) = topic::channel(segment, &info.geometry);
    let (_, tail) = channel.ends();
    channel.clear_above(tail);
}

fn new_segment(info: &TopicInfo, part: &str, promise: &Promise) -> Result<(OwnedFd, Segment), Refusal> {
    let name = format!("shmbus:{}:{part}", info.name);
    let problem = format!("cannot reserve {} bytes for topic {:?}", promise.len_bytes, info.name);
    Segment::create(&name, promise).map_err(|e| Refusal::System { context: problem, problem: e.to_string() })
}

fn attach(info: &TopicInfo, fd: &OwnedFd, promise: &Promise) -> Result<Segment, Refusal> {
    Segment::attach(fd.as_fd(), promise, Access::ReadWrite).map_err(|e| corrupt(info, e.to_string()))
}

fn corrupt(info: &TopicInfo, problem: String) -> Refusal {
    Refusal::Corrupt { topic: info.name.clone(), problem }
}

fn system(info: &TopicInfo, context: &str, error: std::io::Error) -> Refusal {
    Refusal::System { context: format!("topic {:?}: {context}", info.name), problem: error.to_string() }
}
