//! Sizes and offsets of everything in a segment (ARCHITECTURE.md §3), derived from a topic's options.

use serde::{Deserialize, Serialize};

use crate::ring::ledger::runs_in;
use crate::topic::{Full, Mode, TopicOptions};

/// Bumped with every change of a byte in any segment.
pub(crate) const LAYOUT_VERSION: u32 = 3;

/// Where a segment's body starts; the header has the first page to itself.
pub(crate) const BODY_OFFSET: u64 = 4096;

/// Where the ring starts in a log's body.
pub(crate) const RING_OFFSET: u64 = 20_480;

/// Where the slots start in a channel's body (after its two doorbells).
pub(crate) const CHANNEL_RING_OFFSET: u64 = 4096;

/// Where the words start in a ledger's body.
pub(crate) const LEDGER_WORDS_OFFSET: u64 = 768;

/// Every record and every payload in an arena starts at a multiple of this.
pub(crate) const ARENA_ALIGN: u64 = 64;

/// Bytes of a record's header (topics with many publishers).
pub(crate) const RECORD_HEADER_BYTES: u64 = 32;

/// Most messages in one batch.
pub(crate) const MAX_BATCH: usize = 1024;

/// Most publishers of one topic.
pub(crate) const MAX_PUBLISHERS: u32 = 64;

/// Most subscribers of one topic.
pub(crate) const MAX_SUBSCRIBERS: u32 = 1024;

/// Most messages a ring may be asked to hold.
pub(crate) const MAX_MESSAGES: u64 = 1 << 30;

/// Most payload bytes a topic may be asked to hold, and the largest message: with its table, the length of a batch of that
/// many bytes still fits in 32 bits.
pub(crate) const MAX_BYTES: u64 = (1 << 32) - (1 << 16);

/// Longest key of a message in bytes.
pub(crate) const MAX_KEY_BYTES: usize = 255;

/// Longest id of a message in bytes.
pub(crate) const MAX_ID_BYTES: usize = 32;

/// Longest headers of a message in bytes, all together and encoded.
pub(crate) const MAX_HEADERS_BYTES: usize = 16 << 10;

/// Bytes of an envelope's head (topics with envelopes).
pub(crate) const ENVELOPE_HEAD_BYTES: usize = 32;

/// Bytes of the longest envelope, rounded up to any payload's alignment.
pub(crate) const MAX_ENVELOPE_BYTES: u64 =
    ((ENVELOPE_HEAD_BYTES + MAX_KEY_BYTES + MAX_ID_BYTES + MAX_HEADERS_BYTES) as u64).next_multiple_of(ARENA_ALIGN);

/// What each envelope is sure to find room for beside the payload bytes: its head and something of a key.
pub(crate) const ENVELOPE_ROOM_BYTES: u64 = 64;

/// Most positions that a publisher writes without asking the gate again, batches of slots aside.
pub(crate) const MAX_SLACK: u64 = 1024;

/// A commit word comes round to the same lap after at least 2 to the power of this many entries (I-6).
const LAP_ROUND_BITS: u32 = 38;

/// Fewest entries of a ring for many publishers.
const MIN_ENTRIES: u64 = 1024;

/// The sizes a topic's segments are built with. A pure function of the options; sent along so that both sides agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Geometry {
    /// Ring length, a power of two.
    pub(crate) slots: u64,
    /// 64 or 16 (slots), 8 (entries).
    pub(crate) slot_bytes: u32,
    /// Bits of an entry word that say where its record is (many publishers; 0 elsewhere).
    pub(crate) unit_bits: u32,
    /// Body length of each arena.
    pub(crate) arena_bytes: u64,
}

impl Geometry {
    /// The geometry for these options, or what is wrong with them.
    pub(crate) fn from_options(options: &TopicOptions) -> Result<Geometry, String> {
        check("--messages", options.messages, 1, MAX_MESSAGES)?;
        check("--bytes", options.bytes, 1, MAX_BYTES - batch_envelopes_bytes(options, MAX_BATCH as u64))?;
        check("the number of publishers", options.max_publishers.into(), 1, MAX_PUBLISHERS.into())?;
        check("the number of subscribers", options.max_subscribers.into(), 1, MAX_SUBSCRIBERS.into())?;
        if options.mode == Mode::Channel && options.full == Full::Overwrite {
            return Err("a channel overwrites nothing; choose block or reject, or an exclusive topic".to_owned());
        }
        let needs = [("a time-to-live", options.ttl_ms > 0), ("retention by age", options.max_age_ms > 0)];
        let needs = needs.into_iter().chain([("dedup", options.dedup)]);
        if let Some((what, _)) = needs.into_iter().find(|(_, asked)| *asked && !options.envelope) {
            return Err(format!("{what} needs the envelope, which carries what it goes by; add --envelope"));
        }
        if options.mode == Mode::Channel && options.dedup {
            return Err("a channel keeps no messages to compare ids with; choose an exclusive topic".to_owned());
        }
        if options.mode == Mode::Channel && options.max_age_ms > 0 {
            return Err("a channel keeps its messages until they are read; leave out --max-age".to_owned());
        }
        if let Some(schema) = &options.schema {
            if schema.size_bytes > options.bytes {
                return Err(format!("a {schema} does not fit in {} bytes; raise --bytes", options.bytes));
            }
            if !schema.align_bytes.is_power_of_two() || schema.align_bytes > crate::topic::MAX_PAYLOAD_ALIGN as u32 {
                return Err(format!("the alignment of {schema} must be 1, 2, 4, 8, 16 or 32"));
            }
        }
        Ok(match options.mode {
            Mode::Many => Self::many(options, log_slots(options.messages)),
            Mode::Exclusive => Self::slotted(options, log_slots(options.messages)),
            // Its slots are freed one by one.
            Mode::Channel => Self::slotted(options, options.messages.next_power_of_two().max(2)),
        })
    }

    /// Small payloads in the slot, the others in one arena.
    fn slotted(options: &TopicOptions, slots: u64) -> Geometry {
        let lean = !options.envelope;
        let small = lean && options.schema.as_ref().is_some_and(|s| s.size_bytes <= 8 && s.align_bytes <= 8);
        let slot_bytes: u32 = if small { 16 } else { 64 };
        let inline_only = lean && options.schema.as_ref().is_some_and(|s| s.size_bytes <= u64::from(slot_bytes) - 8);
        let arena_bytes = if inline_only { ARENA_ALIGN } else { arena_bytes(options, 0) };
        Geometry { slots, slot_bytes, unit_bits: 0, arena_bytes }
    }

    /// Every payload in its publisher's arena.
    fn many(options: &TopicOptions, slots: u64) -> Geometry {
        // A batch is one record: the largest must fit, with its table and each payload rounded up.
        let envelopes = batch_envelopes_bytes(options, MAX_BATCH as u64);
        let batch = options.bytes + envelopes + RECORD_HEADER_BYTES + MAX_BATCH as u64 * (4 + 7) + ARENA_ALIGN;
        let arena_bytes = arena_bytes(options, RECORD_HEADER_BYTES).max(batch.next_multiple_of(ARENA_ALIGN));
        let units = arena_bytes / ARENA_ALIGN * u64::from(options.max_publishers);
        // All ones is no record but a fence.
        let unit_bits = (units + 1).next_power_of_two().trailing_zeros();
        // 10 bits count messages; what is left for the lap and the ring's length together must not come round soon.
        let lap_bits = 54 - unit_bits;
        let fewest = MIN_ENTRIES.max(1 << LAP_ROUND_BITS.saturating_sub(lap_bits));
        Geometry { slots: slots.max(fewest), slot_bytes: 8, unit_bits, arena_bytes }
    }

    /// How far a publisher raises the floor ahead of its need; also how often a reader stores its cursor.
    pub(crate) fn slack(&self) -> u64 {
        slack_for(self.slots)
    }

    /// Length of the whole log segment.
    pub(crate) fn log_len_bytes(&self) -> u64 {
        page_up(BODY_OFFSET + RING_OFFSET + self.slots * u64::from(self.slot_bytes))
    }

    /// Length of one whole arena segment.
    pub(crate) fn arena_len_bytes(&self) -> u64 {
        page_up(BODY_OFFSET + self.arena_bytes)
    }

    /// Length of the whole channel segment.
    pub(crate) fn channel_len_bytes(&self) -> u64 {
        page_up(BODY_OFFSET + self.channel_arena_offset() + self.arena_bytes)
    }

    /// How many of a channel's slots lie in the first bytes of its segment.
    pub(crate) fn channel_slots_within(&self, bytes: u64) -> u64 {
        let ring = bytes.saturating_sub(BODY_OFFSET + CHANNEL_RING_OFFSET);
        (ring / u64::from(self.slot_bytes)).min(self.slots)
    }

    /// Where the arena starts in a channel's body.
    pub(crate) fn channel_arena_offset(&self) -> u64 {
        page_up(CHANNEL_RING_OFFSET + self.slots * u64::from(self.slot_bytes))
    }
}

/// Length of the whole cursors segment.
pub(crate) fn cursors_len_bytes(max_subscribers: u32) -> u64 {
    page_up(BODY_OFFSET + 384 + u64::from(max_subscribers) * 128)
}

/// Length of the whole ledger segment of a group with this window.
pub(crate) fn ledger_len_bytes(window: u64) -> u64 {
    page_up(BODY_OFFSET + ledger_runs_offset(window) + runs_in(window) * 8)
}

/// Where the words of the runs start in a ledger's body: on a line of their own.
pub(crate) fn ledger_runs_offset(window: u64) -> u64 {
    (LEDGER_WORDS_OFFSET + window * 8).next_multiple_of(128)
}

fn check(what: &str, found: u64, min: u64, max: u64) -> Result<(), String> {
    if (min..=max).contains(&found) {
        return Ok(());
    }
    Err(format!("{what} is {found}; {min} to {max} are allowed"))
}

/// The shortest ring of a log that still holds `messages` when its floor has been raised ahead of need.
fn log_slots(messages: u64) -> u64 {
    let slots = (messages + 1).next_power_of_two();
    if slots - slack_for(slots) >= messages { slots } else { slots * 2 }
}

fn slack_for(slots: u64) -> u64 {
    (slots / 16).clamp(1, MAX_SLACK)
}

/// Most bytes that the envelopes of a batch of `count` messages may have together.
pub(crate) fn batch_envelopes_bytes(options: &TopicOptions, count: u64) -> u64 {
    if options.envelope { count * ENVELOPE_ROOM_BYTES + MAX_ENVELOPE_BYTES } else { 0 }
}

/// Room for the payloads, their envelopes, for what rounding up each record costs, and for the gap at the end of a lap.
fn arena_bytes(options: &TopicOptions, header: u64) -> u64 {
    let records = (options.messages + 1) * (header + ARENA_ALIGN - 1);
    let envelopes = batch_envelopes_bytes(options, options.messages + 1);
    let gap = (options.bytes / 16).max(ARENA_ALIGN);
    (options.bytes + records + envelopes + gap).next_multiple_of(ARENA_ALIGN)
}

/// Rounds up to whole pages.
pub(crate) const fn page_up(bytes: u64) -> u64 {
    bytes.next_multiple_of(4096)
}
