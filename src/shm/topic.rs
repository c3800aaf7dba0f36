//! Which segments a topic has, what each promises, and the rings as views of them.

use std::ops::Range;
use std::sync::Arc;

use crate::coordinator::protocol::{GroupInfo, TopicInfo};
use crate::ring::arena::Arena;
use crate::ring::cursor::{Cursor, CursorsHeader};
use crate::ring::exclusive::ExclusiveLog;
use crate::ring::gate::Policy;
use crate::ring::ledger::{Ledger, LedgerHeader, runs_in};
use crate::ring::log::LogHeader;
use crate::ring::many::ManyLog;
use crate::ring::spsc::{Channel, ChannelHeader};
use crate::shm::layout::{
    ARENA_ALIGN, CHANNEL_RING_OFFSET, Geometry, LEDGER_WORDS_OFFSET, RING_OFFSET, cursors_len_bytes, ledger_len_bytes,
    ledger_runs_offset,
};
use crate::shm::segment::{Kind, Promise, Segment};
use crate::shm::shared::Shared;
use crate::topic::Full;

impl TopicInfo {
    /// What the log segment promises.
    pub(crate) fn log(&self) -> Promise {
        self.promise(Kind::Log, self.geometry.log_len_bytes(), 0)
    }

    /// What the cursors segment promises.
    pub(crate) fn cursors(&self) -> Promise {
        self.promise(Kind::Cursors, cursors_len_bytes(self.options.max_subscribers), 0)
    }

    /// What the arena of a publisher slot promises.
    pub(crate) fn arena(&self, slot: u32) -> Promise {
        self.promise(Kind::Arena, self.geometry.arena_len_bytes(), slot)
    }

    /// What the channel segment promises.
    pub(crate) fn channel(&self) -> Promise {
        self.promise(Kind::Channel, self.geometry.channel_len_bytes(), 0)
    }

    /// What a group's ledger segment promises.
    pub(crate) fn ledger(&self, group: &GroupInfo) -> Promise {
        self.promise(Kind::Ledger, ledger_len_bytes(group.options.window_words(self.options.messages)), group.id)
    }

    fn promise(&self, kind: Kind, len_bytes: u64, index: u32) -> Promise {
        let (bus, topic, generation, geometry) = (self.bus, self.id, self.generation, self.geometry);
        Promise { kind, len_bytes, bus, topic, index, generation, geometry }
    }

    /// What the options say about overwriting.
    pub(crate) fn policy(&self) -> Policy {
        Policy {
            messages: self.options.messages,
            slots: self.geometry.slots,
            overwrite: self.options.full == Full::Overwrite,
            hold: self.options.hold,
            slack: self.geometry.slack(),
        }
    }

    /// Whether slots have room for one word of payload (7 otherwise).
    pub(crate) fn small_slots(&self) -> bool {
        has_small_slots(&self.geometry)
    }

    /// Alignment of each payload in a batch, in bytes.
    pub(crate) fn batch_align(&self) -> u64 {
        self.options.schema.as_ref().map_or(8, |schema| u64::from(schema.align_bytes).max(8))
    }
}

/// The segments of a topic with a log, mapped.
pub(crate) struct LogSegments {
    pub(crate) log: Segment,
    pub(crate) cursors: Segment,
}

impl LogSegments {
    pub(crate) fn header(&self) -> Shared<LogHeader> {
        self.log.view(0)
    }

    pub(crate) fn readers(&self) -> Shared<CursorsHeader> {
        self.cursors.view(0)
    }

    pub(crate) fn cursor_lines(&self, info: &TopicInfo) -> Shared<[Cursor]> {
        self.cursors.view_slice(size_of::<CursorsHeader>() as u64, info.options.max_subscribers.into())
    }

    /// The log of an exclusive topic with slots of `W` payload words.
    pub(crate) fn exclusive<const W: usize>(&self, info: &TopicInfo) -> ExclusiveLog<W> {
        let ring = self.log.ring(RING_OFFSET, info.geometry.slots);
        ExclusiveLog::new(self.header(), self.readers(), self.cursor_lines(info), ring)
    }

    /// The log of a topic with many publishers.
    pub(crate) fn many(&self, info: &TopicInfo) -> ManyLog {
        let ring = self.log.ring(RING_OFFSET, info.geometry.slots);
        let units_per_slot = info.geometry.arena_bytes / ARENA_ALIGN;
        let lines = self.cursor_lines(info);
        ManyLog::new(self.header(), self.readers(), lines, ring, info.geometry.unit_bits, units_per_slot)
    }
}

/// The ledger in a group's ledger segment.
pub(crate) fn ledger(segment: &Segment, info: &TopicInfo, group: &GroupInfo) -> Ledger {
    let header: Shared<LedgerHeader> = segment.view(0);
    let window = group.options.window_words(info.options.messages);
    let words = segment.view_slice(LEDGER_WORDS_OFFSET, window);
    Ledger::new(header, words, segment.view_slice(ledger_runs_offset(window), runs_in(window)))
}

/// An arena segment's memory.
pub(crate) fn arena(segment: &Segment, geometry: &Geometry) -> Arena {
    segment.arena(0, geometry.arena_bytes)
}

/// The channel in a channel segment, with its arena.
pub(crate) fn channel<const W: usize>(segment: &Segment, geometry: &Geometry) -> (Channel<W>, Arena) {
    let header: Shared<ChannelHeader> = segment.view(0);
    let channel = Channel::new(header, segment.ring(CHANNEL_RING_OFFSET, geometry.slots));
    (channel, segment.arena(geometry.channel_arena_offset(), geometry.arena_bytes))
}

/// Formats slots of a channel that nobody uses yet.
pub(crate) fn format_channel(segment: &Segment, geometry: &Geometry, positions: Range<u64>) {
    if has_small_slots(geometry) {
        channel::<1>(segment, geometry).0.format(positions);
    } else {
        channel::<7>(segment, geometry).0.format(positions);
    }
}

fn has_small_slots(geometry: &Geometry) -> bool {
    geometry.slot_bytes == 16
}

/// A channel's head alone.
pub(crate) fn channel_header(segment: &Segment) -> Shared<ChannelHeader> {
    segment.view(0)
}

/// Arenas by publisher slot; readers learn of new ones as they meet them.
pub(crate) type Arenas = Vec<Option<Arena>>;

/// Where a record lies: `unit` counts over all arenas. `None` where it lies in none.
#[inline]
pub(crate) fn locate(geometry: &Geometry, unit: u64) -> (u32, u64) {
    let bytes = unit * ARENA_ALIGN;
    ((bytes / geometry.arena_bytes) as u32, bytes % geometry.arena_bytes)
}

/// The number over all arenas of the record at `offset` of `slot`'s arena.
pub(crate) fn unit_of(geometry: &Geometry, slot: u32, offset: u64) -> u64 {
    (u64::from(slot) * geometry.arena_bytes + offset) / ARENA_ALIGN
}

/// A topic's info as handles share it.
pub(crate) type SharedInfo = Arc<TopicInfo>;

const _: () = {
    assert!(size_of::<CursorsHeader>() == 384);
    assert!(size_of::<Cursor>() == 128);
    assert!(size_of::<ChannelHeader>() <= CHANNEL_RING_OFFSET as usize);
};
