//! What the coordinator does to a group's memory: its ledger, and its line among the cursors.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use super::{Parts, Reservation, StoredSegment, TopicMemory, Wanted, corrupt, pages_of, system};
use crate::coordinator::protocol::{GroupInfo, SegmentRef, StartAt, TopicInfo};
use crate::error::{AttachError, Holder, Refusal};
use crate::os::clock;
use crate::os::memfd::free_elsewhere;
use crate::ring::cursor::Cursor;
use crate::ring::ledger::{Ledger, Owners, Seen, State};
use crate::ring::log::{Place, find_place};
use crate::shm::segment::{Access, Segment};
use crate::shm::topic;
use crate::sync::Ordering;
use crate::topic::Mode;

/// A group's ledger as the coordinator holds it.
pub(super) struct GroupMemory {
    info: GroupInfo,
    fd: OwnedFd,
    segment: Segment,
}

/// What a ledger says at some moment.
#[derive(Debug, Default)]
pub(crate) struct LedgerCount {
    pub(crate) floor: u64,
    pub(crate) window: u64,
    pub(crate) returned: u64,
    pub(crate) moving: u64,
    pub(crate) redelivered: u64,
    pub(crate) expired: u64,
    pub(crate) dead_lettered: u64,
    /// Leases by consumer.
    pub(crate) leases: BTreeMap<u32, u64>,
    /// The lease that holds the floor.
    pub(crate) oldest: Option<Seen>,
    /// Exclusive groups: the consumer at work.
    pub(crate) active: Option<u8>,
}

/// What a consumer holds whose time has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Overdue {
    pub(crate) leases: bool,
    pub(crate) moves: bool,
}

/// The name of a group's ledger among its topic's segments.
pub(crate) fn ledger_name(group: u32) -> String {
    format!("ledger-{group}")
}

impl GroupMemory {
    pub(super) fn cursor(&self) -> u32 {
        self.info.cursor
    }

    pub(super) fn ledger(&self, info: &TopicInfo) -> Ledger {
        topic::ledger(&self.segment, info, &self.info)
    }

    pub(super) fn footprint_bytes(&self, info: &TopicInfo) -> u64 {
        TopicMemory::group_footprint_bytes(info, &self.info)
    }
}

impl TopicMemory {
    /// Bytes that a group's ledger reserves.
    pub(crate) fn group_footprint_bytes(info: &TopicInfo, group: &GroupInfo) -> u64 {
        info.ledger(group).len_bytes
    }

    /// The segment that [`Self::create_ledger`] makes.
    pub(crate) fn ledger_segment(info: &TopicInfo, group: &GroupInfo) -> Wanted {
        Wanted::new(info, ledger_name(group.id), info.ledger(group))
    }

    /// Makes a group's ledger of what was `reserved` for it. It is not one yet: [`Self::begin_group`] says where it starts.
    pub(crate) fn create_ledger(&mut self, group: &GroupInfo, reserved: &mut Reservation) -> Result<(), Refusal> {
        let (fd, segment) = reserved.make(TopicMemory::ledger_segment(&self.info, group))?;
        self.groups.insert(group.id, GroupMemory { info: group.clone(), fd, segment });
        Ok(())
    }

    /// Takes over the ledger that an earlier coordinator created. `false`: it had not begun, and nobody knows it.
    pub(crate) fn adopt_ledger(&mut self, group: &GroupInfo, fd: OwnedFd) -> Result<bool, Refusal> {
        let promise = self.info.ledger(group);
        match Segment::attach_with(fd.as_fd(), &promise, Access::ReadWrite, pages_of(&promise)) {
            Ok(segment) => {
                self.groups.insert(group.id, GroupMemory { info: group.clone(), fd, segment });
                Ok(true)
            }
            Err(AttachError::Magic { found: 0, .. }) => Ok(false),
            Err(error) => Err(corrupt(&self.info, error.to_string())),
        }
    }

    /// Whether a group's ledger is there.
    pub(crate) fn has_ledger(&self, group: u32) -> bool {
        self.groups.contains_key(&group)
    }

    /// Fences the consumers of a group that has ended already.
    pub(crate) fn end_ledger(&self, group: u32) {
        if let Ok(memory) = self.group(group) {
            memory.ledger(&self.info).end();
        }
        self.wake_readers();
    }

    /// Lets go of a group's ledger.
    pub(crate) fn drop_ledger(&mut self, group: u32) {
        if let Some(memory) = self.groups.remove(&group) {
            free_elsewhere(memory.footprint_bytes(&self.info), memory);
        }
    }

    /// The ledgers with the names they are stored under.
    pub(super) fn stored_ledgers(&self) -> impl Iterator<Item = StoredSegment<'_>> {
        self.groups.iter().map(|(id, group)| StoredSegment { name: ledger_name(*id), fd: group.fd.as_fd() })
    }

    /// One ledger, to be stored.
    pub(crate) fn stored_ledger(&self, group: u32) -> Result<StoredSegment<'_>, Refusal> {
        let fd = self.group(group)?.fd.as_fd();
        Ok(StoredSegment { name: ledger_name(group), fd })
    }

    /// Whether a group may start there.
    pub(crate) fn check_start(&self, start: StartAt) -> Result<(), Refusal> {
        let StartAt::Sequence(asked) = start else { return Ok(()) };
        let tail = self.tail()?.sequence;
        if asked > tail {
            return Err(Refusal::BeyondTail { topic: self.info.name.clone(), asked, tail });
        }
        Ok(())
    }

    /// Puts a group in force: its cursor, and its ledger from the same sequence on. The ledger's magic comes last (I-1),
    /// so that a successor tells a group that has begun, and may have consumers, from one to begin (again).
    pub(crate) fn begin_group(&self, group: u32, start: StartAt) -> Result<(), Refusal> {
        let memory = self.group(group)?;
        let joined = self.join_group(memory.info.cursor, group, start)?;
        memory.ledger(&self.info).header().format(joined.sequence.max(joined.asked));
        memory.segment.publish(&self.info.ledger(&memory.info));
        Ok(())
    }

    /// Ends a group that was rewound or removed: its consumers are fenced, and it holds nothing back any more.
    /// `from_oldest`: it began with the oldest message. Idempotent.
    pub(crate) fn end_group(&self, group: &GroupInfo, from_oldest: bool) {
        self.leave(group.cursor, from_oldest);
        self.end_ledger(group.id);
    }

    /// Lets a consumer take messages.
    pub(crate) fn begin_consumer(&self, group: u32, consumer: u8) -> Result<(), Refusal> {
        self.group(group)?.ledger(&self.info).set_fenced(consumer, false);
        Ok(())
    }

    /// Gives back what consumers held that are proven dead, have left or are fenced; settles what `committed` says one
    /// had finished. Idempotent. For all of them in one walk: a window may be long.
    pub(crate) fn release_consumers(&self, group: u32, consumers: &Owners, committed: impl Fn(u8, u64) -> bool) {
        let Ok(memory) = self.group(group) else { return };
        let ledger = memory.ledger(&self.info);
        ledger.release_owners(consumers, clock::now_ms(), |consumer, sequence, _| committed(consumer, sequence));
        // Last: what it leases after that, fenced and alive, has no outputs, and is ended by who takes the role.
        if let Some(active) = ledger.active().filter(|active| consumers.contains(*active)) {
            ledger.leave_role(active);
        }
        self.raise_floor(memory);
        self.wake_readers();
        // The dead one may have made room and not come to say so: also where the floor could not be raised right now.
        self.wake_writers();
    }

    /// Moves a group's floor over what is settled: its consumers do so now and then, and the last of them may have gone
    /// before it did.
    pub(super) fn raise_floor(&self, memory: &GroupMemory) {
        let Parts::Log { segments, .. } = &self.parts else { return };
        let floor = memory.ledger(&self.info).advance_floor();
        let Ok(tail) = self.tail() else { return };
        let place = match (self.info.options.mode, self.group_place(memory.info.cursor)) {
            (Mode::Exclusive, _) => Some(Place { position: floor.min(tail.position), sequence: floor }),
            (_, Ok(oldest)) => self.place_of(floor, oldest.position, tail).filter(|place| place.sequence <= floor),
            (_, Err(_)) => None,
        };
        if let Some(place) = place {
            self.with_line(memory.info.cursor, |line| line.raise(place.position, floor));
            segments.readers().writers.ring_again();
        }
    }

    /// Fences a consumer: it takes nothing any more.
    pub(crate) fn fence_consumer(&self, group: u32, consumer: u8) {
        if let Ok(memory) = self.group(group) {
            memory.ledger(&self.info).set_fenced(consumer, true);
        }
    }

    /// Whether a consumer is fenced, or its group has ended.
    pub(crate) fn is_fenced(&self, group: u32, consumer: u8) -> bool {
        self.group(group).is_ok_and(|memory| memory.ledger(&self.info).is_fenced(consumer))
    }

    /// What a consumer holds whose time has come.
    pub(crate) fn overdue(&self, group: u32, consumer: u8, now_ms: u64) -> Overdue {
        let mut found = Overdue::default();
        self.each_overdue(group, consumer, now_ms, |_, seen| {
            found.leases |= seen.state() == State::Leased;
            found.moves |= matches!(seen.state(), State::Moving(_));
        });
        found
    }

    /// One after the other, and never all together: a window may be long, and who garbles its words decides how many there are.
    fn each_overdue(&self, group: u32, consumer: u8, now_ms: u64, mut act: impl FnMut(&Ledger, Seen)) {
        let Ok(memory) = self.group(group) else { return };
        let ledger = memory.ledger(&self.info);
        let held = |seen: &Seen| {
            seen.owner() == Some(consumer)
                && matches!(seen.state(), State::Leased | State::Moving(_))
                && seen.is_due(now_ms)
        };
        ledger.handed_out().map(|sequence| ledger.look(sequence)).filter(held).for_each(|seen| act(&ledger, seen));
    }

    /// Whether a consumer is the one at work of an exclusive group and has given no sign of life for so long that another may be.
    pub(crate) fn is_role_overdue(&self, group: u32, consumer: u8, now_ms: u64) -> bool {
        let role = self.group(group).map(|memory| memory.ledger(&self.info).role());
        role.is_ok_and(|role| role.owner() == Some(consumer) && role.due_in(now_ms) == 0)
    }

    /// Gives back what a consumer has leased and is overdue.
    pub(crate) fn give_back_overdue(&self, group: u32, consumer: u8, now_ms: u64) {
        self.each_overdue(group, consumer, now_ms, |ledger, seen| {
            ledger.give_back(seen, now_ms);
        });
        self.wake_readers();
    }

    /// Keeps due times from coming round in a group on which nobody looks.
    pub(crate) fn renew_due(&self, group: u32, now_ms: u64) {
        if let Ok(memory) = self.group(group) {
            memory.ledger(&self.info).renew_due(now_ms);
        }
    }

    /// The groups that have a ledger.
    pub(crate) fn groups(&self) -> impl Iterator<Item = u32> {
        self.groups.keys().copied()
    }

    /// Tells publishers how many consumers a group has.
    pub(crate) fn count_consumers(&self, cursor: u32, consumers: u64) {
        self.with_line(cursor, |line| line.set_consumers(consumers));
    }

    /// Takes every cursor out of force that `is_owned` does not know: a coordinator that ended a group died before it
    /// came to that.
    pub(crate) fn sweep_cursors(&self, is_owned: impl Fn(u32) -> bool) {
        let Parts::Log { segments, .. } = &self.parts else { return };
        for cursor in 0..segments.cursor_lines(&self.info).len() as u32 {
            let in_force = self.with_line(cursor, |line| line.place().is_some()).unwrap_or(false);
            if in_force && !is_owned(cursor) {
                self.leave(cursor, false);
            }
        }
    }

    /// A place at or below the group's floor, which its cursor keeps in the ring.
    pub(crate) fn group_place(&self, cursor: u32) -> Result<Place, Refusal> {
        // Consumers move it on meanwhile. A cursor that is not in force stands where nothing is.
        let line = || self.with_line(cursor, Cursor::place).flatten().map_or(u64::MAX, |at| at.position);
        // They move position and sequence one after the other: the record knows which belong together.
        let found = find_place(line, |position, _| self.confirmed_place(position).transpose());
        found.unwrap_or_else(|| Err(corrupt(&self.info, format!("the cursor {cursor} of a group stands nowhere"))))
    }

    /// Descriptors for a consumer: as for a subscriber, and the ledger (read-write).
    pub(crate) fn consumer_fds(&self, group: u32) -> Result<Vec<(SegmentRef, OwnedFd)>, Refusal> {
        let mut fds = self.reader_fds(None)?;
        let ledger = self.group(group)?.fd.try_clone();
        let ledger = ledger.map_err(|error| system(&self.info, "cannot duplicate a descriptor", error))?;
        // After log and cursors.
        fds.insert(2.min(fds.len()), (SegmentRef::Ledger, ledger));
        Ok(fds)
    }

    /// How many words there may be to look at. Not how many are said to be handed out: who says so may say something else
    /// when they are looked at.
    pub(crate) fn window_words(&self, group: u32) -> u64 {
        self.group(group).map_or(0, |memory| memory.ledger(&self.info).window())
    }

    /// Counts what lies between floor and hint, which is a window's length at most.
    pub(crate) fn count_ledger(&self, group: u32) -> Option<LedgerCount> {
        let ledger = self.group(group).ok()?.ledger(&self.info);
        // Relaxed: only shown to people.
        let relaxed = Ordering::Relaxed;
        let counters = &ledger.header().counters;
        let mut count = LedgerCount {
            floor: ledger.floor(),
            window: ledger.window(),
            redelivered: counters.redelivered.load(relaxed),
            expired: counters.expired.load(relaxed),
            dead_lettered: counters.dead_lettered.load(relaxed),
            active: ledger.active(),
            ..LedgerCount::default()
        };
        let (mut lowest, mut leases) = (None, [0_u32; 1 << u8::BITS]);
        for seen in ledger.handed_out().map(|sequence| ledger.look(sequence)) {
            if seen.state() != State::Settled {
                lowest = lowest.or(Some(seen));
            }
            match (seen.state(), seen.owner()) {
                (State::Leased, Some(owner)) => leases[usize::from(owner)] += 1,
                (State::Returned, _) => count.returned += 1,
                (State::Moving(_), _) => count.moving += 1,
                _ => {}
            }
        }
        let held = (0..).zip(leases).filter(|(_, leases)| *leases > 0);
        count.leases = held.map(|(owner, leases)| (owner, u64::from(leases))).collect();
        count.oldest = lowest.filter(|seen| seen.state() == State::Leased);
        Some(count)
    }

    pub(super) fn group(&self, group: u32) -> Result<&GroupMemory, Refusal> {
        self.groups.get(&group).ok_or_else(|| corrupt(&self.info, format!("group {group} has no ledger")))
    }

    fn with_line<T>(&self, cursor: u32, use_it: impl FnOnce(&Cursor) -> T) -> Option<T> {
        let Parts::Log { segments, .. } = &self.parts else { return None };
        segments.cursor_lines(&self.info).get(cursor as usize).map(use_it)
    }

    /// Whose cursor this is.
    pub(super) fn holder(&self, cursor: u32) -> Holder {
        let group = self.with_line(cursor, Cursor::group).flatten();
        group.map_or(Holder::Subscriber(cursor), |group| Holder::Group(group as u32))
    }

    fn wake_writers(&self) {
        if let Parts::Log { segments, .. } = &self.parts {
            segments.readers().writers.ring_again();
        }
    }

    /// Also those whom somebody died over waking.
    pub(super) fn wake_readers(&self) {
        if let Parts::Log { segments, .. } = &self.parts {
            segments.readers().readers.ring_again();
        }
    }
}
