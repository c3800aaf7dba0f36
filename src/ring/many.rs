//! The log of a topic with many publishers: one compare-and-swap claims and commits.
//!
//! A publisher writes a record into its own arena and then swaps the entry's word from the previous lap's value to one
//! that points at the record. There is no claimed state between: a publisher that dies or stops anywhere has either
//! published or not, and delays nobody. (RESEARCH: the anonymous claim of fetch-and-add rings is what wedges them.)
//!
//! ```text
//! entry word: 63 .................. u+10   u+9 ......... u    u-1 ...... 0
//!             lap mod (2^(54-u) - 1) + 1   messages - 1      record, in units over all arenas
//! ```
//!
//! where `u` is as many bits as the topic's arenas need. All ones in the record's field make the entry a *fence*: a hole of one
//! sequence, whose other field names the publisher slot that commits nothing behind it. A publisher sees every entry
//! before the one it swaps, so the log itself stops it (ARCHITECTURE.md §4.2).

use crate::ring::arena::{Arena, Span};
use crate::ring::cursor::{Cursor, CursorsHeader};
use crate::ring::gate::{Gate, Policy, Stop, Want};
use crate::ring::log::{COORDINATOR, JUMPS, LogHeader, MAX_PLACE, Place};
use crate::ring::notes::Note;
use crate::ring::slot::Ring;
use crate::shm::layout::{MAX_SLACK, RECORD_HEADER_BYTES};
use crate::shm::shared::Shared;
use crate::sync::{AtomicU64, Ordering};

/// Entries, beyond a few laps, that publishers may put before a fence while it is being written: a few milliseconds of theirs.
const FENCE_STEPS: u64 = 1 << 16;

/// Entries, beyond a few laps, that others may put before a publisher within one publish: seconds of theirs, if they keep to the rules
/// and win every single race.
const PUBLISH_STEPS: u64 = 1 << 26;

/// Fences in a row (for the coordinator: and garbled records) that a search for a place steps over: more than names are ever taken over
/// without a message.
pub(crate) const MAX_BETWEEN: u64 = 1 << 16;

/// Entries between two looks at whether the walk to the tail can be true.
const LOOK_BACK_EVERY: u64 = 1 << 12;

/// What making room is counted as, beside what it walks: about as much as it costs.
const ROOM_STEPS: u64 = 100;

/// Bits of an entry word that count messages.
const COUNT_BITS: u32 = 10;

/// One entry of the ring.
#[repr(transparent)]
pub struct Entry {
    word: AtomicU64,
}

impl Entry {
    /// A zeroed entry outside shared memory.
    #[cfg(loom)]
    pub fn new() -> Self {
        Entry { word: AtomicU64::new(0) }
    }
}

/// How an entry's word is divided: arenas that need more bits leave fewer for the lap.
#[derive(Clone, Copy, Debug)]
struct Format {
    unit_bits: u32,
    /// Units of each publisher slot's arena.
    units_per_slot: u64,
    /// How many laps the field can tell apart.
    laps: u64,
}

/// An entry's word, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryWord {
    raw: u64,
    count: u64,
    /// The record, or `FENCE` and a slot.
    unit: u64,
}

/// Marks an entry that has no record.
const FENCE: u64 = 1 << 63;

impl Format {
    fn new(unit_bits: u32, units_per_slot: u64) -> Self {
        Format { unit_bits, units_per_slot, laps: (1 << (64 - COUNT_BITS - unit_bits)) - 1 }
    }

    /// The lap as stored: never 0, so that zeroed memory is no lap. Laps that lie `laps` apart share a field (I-6).
    #[inline]
    fn lap_field(self, lap: u64) -> u64 {
        // A mask would do but for the 0; laps fit the field for days, so this is one comparison.
        if lap < self.laps { lap + 1 } else { lap % self.laps + 1 }
    }

    fn word(self, lap: u64, count: u64, unit: u64) -> EntryWord {
        let raw = self.lap_field(lap) << (self.unit_bits + COUNT_BITS) | (count - 1) << self.unit_bits | unit;
        EntryWord { raw, count, unit }
    }

    /// What a record's place never is (`Geometry` sees to it).
    #[inline]
    fn no_unit(self) -> u64 {
        (1 << self.unit_bits) - 1
    }

    fn fence(self, lap: u64, slot: u32) -> EntryWord {
        let raw = self.word(lap, u64::from(slot) + 1, self.no_unit()).raw;
        EntryWord { raw, count: 1, unit: FENCE | u64::from(slot) }
    }

    #[inline]
    fn read(self, raw: u64) -> EntryWord {
        let field = raw >> self.unit_bits & ((1 << COUNT_BITS) - 1);
        let unit = raw & self.no_unit();
        if unit == self.no_unit() {
            return EntryWord { raw, count: 1, unit: FENCE | field };
        }
        EntryWord { raw, count: field + 1, unit }
    }

    /// Whether `raw` commits lap `lap`.
    #[inline]
    fn commits(self, raw: u64, lap: u64) -> bool {
        raw >> (self.unit_bits + COUNT_BITS) == self.lap_field(lap)
    }

    /// Whether `raw` is what lap `lap` replaces: the lap before, or nothing at all.
    #[inline]
    fn precedes(self, raw: u64, lap: u64) -> bool {
        raw == 0 || lap > 0 && self.commits(raw, lap - 1)
    }
}

impl EntryWord {
    /// Sequences it takes: the messages of the batch, or one for a fence.
    #[inline]
    pub(crate) fn count(self) -> u64 {
        self.count
    }

    /// Whether it is a hole without a record.
    #[inline]
    pub(crate) fn is_fence(self) -> bool {
        self.unit & FENCE != 0
    }

    /// Whether it fences this publisher slot.
    #[inline]
    fn fences(self, slot: u32) -> bool {
        self.unit == FENCE | u64::from(slot)
    }

    /// The record's place over all arenas; not of a fence.
    #[inline]
    pub(crate) fn unit(self) -> u64 {
        self.unit
    }
}

/// The memory of a log for many, without the arenas.
pub struct ManyLog {
    pub(crate) header: Shared<LogHeader>,
    pub(crate) readers: Shared<CursorsHeader>,
    pub(crate) cursors: Shared<[Cursor]>,
    pub(crate) ring: Ring<Entry>,
    lap_shift: u32,
    format: Format,
}

impl Clone for ManyLog {
    fn clone(&self) -> Self {
        ManyLog {
            header: self.header.clone(),
            readers: self.readers.clone(),
            cursors: self.cursors.clone(),
            ring: self.ring.clone(),
            lap_shift: self.lap_shift,
            format: self.format,
        }
    }
}

/// Where a walk along the entries stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Committed for this lap.
    Committed(EntryWord),
    /// Still what the previous lap left.
    Free(u64),
    /// Already of a later lap.
    Lapped,
}

impl ManyLog {
    /// A log over this memory; entry words say in `unit_bits` bits where a record is, and each publisher slot has
    /// `units_per_slot` of these places.
    pub fn new(
        header: Shared<LogHeader>,
        readers: Shared<CursorsHeader>,
        cursors: Shared<[Cursor]>,
        ring: Ring<Entry>,
        unit_bits: u32,
        units_per_slot: u64,
    ) -> Self {
        let lap_shift = ring.len().trailing_zeros();
        ManyLog { header, readers, cursors, ring, lap_shift, format: Format::new(unit_bits, units_per_slot) }
    }

    pub fn gate(&self) -> Gate<'_> {
        Gate { header: &self.header, readers: &self.readers, cursors: &self.cursors }
    }

    #[inline]
    fn look(&self, position: u64) -> Look {
        let lap = position >> self.lap_shift;
        // Acquire: A-CLAIM pairs with R-CLAIM (Writer::publish).
        let raw = self.ring.at(position).word.load(Ordering::Acquire);
        if self.format.commits(raw, lap) {
            Look::Committed(self.format.read(raw))
        } else if self.format.precedes(raw, lap) {
            Look::Free(raw)
        } else {
            Look::Lapped
        }
    }

    /// Walks from `place`, or from the newest checkpoint where that is further on, to the first free entry.
    pub fn tail_from(&self, place: Option<Place>) -> Option<Place> {
        self.tail_within(place, &mut (4 * self.ring.len()))
    }

    /// The same, by so many steps at most, which are counted down. Where they, or what can be true, come to an end: as far as it came.
    fn tail_within(&self, place: Option<Place>, steps: &mut u64) -> Option<Place> {
        let mut place = place.or_else(|| self.header.newest_checkpoint())?;
        let mut jumps = 0;
        loop {
            match self.look(place.position) {
                Look::Committed(word) => {
                    place = after(place, word);
                    if place.position % LOOK_BACK_EVERY == 0 && self.is_out_of_reach(place.position) {
                        return Some(place);
                    }
                }
                Look::Free(_) => return Some(place),
                Look::Lapped if jumps == JUMPS => return None,
                Look::Lapped => {
                    place = self.header.newest_checkpoint().filter(|c| c.position > place.position)?;
                    jumps += 1;
                }
            }
            // Garbage in the ring must not keep us for ever; publishers that run on while we walk may.
            if *steps == 0 {
                return Some(place);
            }
            *steps -= 1;
        }
    }

    /// Whether nobody who keeps to the rules has committed what we saw committed below `position`: a publisher leaves a checkpoint in
    /// its gate and commits no more than `MAX_SLACK` positions beyond it before it goes there again (`Gate::make_room`), and who sees what it
    /// committed sees that checkpoint (A-CLAIM).
    fn is_out_of_reach(&self, position: u64) -> bool {
        self.header.newest_checkpoint().is_none_or(|newest| newest.position.saturating_add(MAX_SLACK) < position)
    }

    /// The first position from `position` on that is no fence, and thus has a record or is not committed yet: sequences are found
    /// in records, and a fence is one sequence. Where there are too many of them, one of them.
    pub(crate) fn past_fences(&self, position: u64) -> u64 {
        // Saturating: an intent that is garbage must not overflow.
        let end = position.saturating_add(self.ring.len().min(MAX_BETWEEN));
        (position..end).find(|at| !self.committed(*at).is_some_and(EntryWord::is_fence)).unwrap_or(end)
    }

    /// Commits a fence for the publisher that opened `slot` as number `opening`: nothing it publishes comes behind it. For the
    /// coordinator; may use the ring's slack, which publishers may not. Twice is as good as once.
    ///
    /// It ends: whoever takes a swap from it leaves an entry to step over, and there are so many steps. Publishers that keep to the
    /// rules lose some of the races meanwhile, and wait where the ring is full; others have what they make of their topic.
    pub fn fence(&self, policy: &Policy, slot: u32, opening: u64) -> Result<Place, Stop> {
        let mut writer = self.fencer(policy)?;
        // Before the swap: a publisher that slept until the fence is overwritten finds this instead.
        self.header.note(slot).fence(opening);
        let (mut steps, mut jumps) = (FENCE_STEPS + 4 * self.ring.len(), JUMPS);
        while steps > 0 && jumps > 0 {
            steps -= 1;
            match self.look(writer.at.position) {
                Look::Committed(word) => writer.at = after(writer.at, word),
                Look::Free(expected) if writer.at.position < writer.limit => {
                    let fence = self.format.fence(writer.at.position >> self.lap_shift, slot);
                    if writer.claim(expected, fence) {
                        return Ok(writer.at);
                    }
                }
                Look::Free(_) | Look::Lapped => {
                    writer.make_room_within(0, writer.policy.slack, &mut steps)?;
                    jumps -= 1;
                }
            }
        }
        Err(Stop::Corrupt("its publishers leave no room for a fence"))
    }

    /// Whether there is room for a fence. Only fences use that room, so it stays until there is one.
    #[cfg(not(loom))]
    pub(crate) fn has_room_for_fence(&self, policy: &Policy) -> Result<(), Stop> {
        self.fencer(policy)?.make_room(0, 0)
    }

    /// Whether the entry at `position` is there and its record in the arena of `slot`.
    pub fn owns(&self, slot: u32, position: u64) -> bool {
        let owner = |word: EntryWord| word.unit / self.format.units_per_slot;
        self.committed(position).is_some_and(|word| !word.is_fence() && owner(word) == u64::from(slot))
    }

    /// Decides what publishers noted below `floor`, which the caller has walked to or beyond.
    pub(crate) fn settle_notes(&self, floor: u64) {
        self.header.settle_notes(floor, |slot, position| self.owns(slot, position));
    }

    fn fencer(&self, policy: &Policy) -> Result<Writer, Stop> {
        // A chunk of one: the limit of a moment ago is no limit.
        let policy = Policy { messages: policy.slots, slack: 0, ..*policy };
        Writer::new(self.clone(), policy, COORDINATOR).ok_or(Stop::Corrupt("no checkpoint leads to the tail"))
    }

    /// The committed entry at `position`, if it is still there.
    pub(crate) fn committed(&self, position: u64) -> Option<EntryWord> {
        match self.look(position) {
            Look::Committed(word) => Some(word),
            _ => None,
        }
    }
}

fn after(place: Place, word: EntryWord) -> Place {
    Place { position: place.position + 1, sequence: place.sequence + word.count() }
}

/// A record's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) position: u64,
    pub(crate) first_sequence: u64,
    pub(crate) publisher: u64,
    pub(crate) body_bytes: u64,
    pub(crate) first_number: u64,
}

impl Record {
    /// Writes the parts that do not depend on where the record will be committed.
    pub(crate) fn write(arena: &Arena, offset: u64, publisher: u64, body_bytes: u64, first_number: u64) {
        arena.store(offset + 16, publisher << 32 | body_bytes);
        arena.store(offset + 24, first_number);
    }

    fn write_place(arena: &Arena, offset: u64, place: Place) {
        arena.store(offset, place.position);
        arena.store(offset + 8, place.sequence);
    }

    /// Copies the header out once, if all of it and all of the body lie in the arena (I-8).
    #[inline]
    pub(crate) fn read(arena: &Arena, offset: u64) -> Option<Record> {
        if !arena.contains(Span { offset, len: RECORD_HEADER_BYTES }) {
            return None;
        }
        let packed = arena.load(offset + 16);
        let record = Record {
            position: arena.load(offset),
            first_sequence: arena.load(offset + 8),
            publisher: packed >> 32,
            body_bytes: packed & u64::from(u32::MAX),
            first_number: arena.load(offset + 24),
        };
        let body = Span { offset: offset + RECORD_HEADER_BYTES, len: record.body_bytes };
        (record.first_sequence < MAX_PLACE && arena.contains(body)).then_some(record)
    }
}

/// Where a stopped publisher left off.
#[cfg(loom)]
pub struct Claim {
    expected: u64,
    new: EntryWord,
}

/// The writing end: one publisher among many.
pub struct Writer {
    log: ManyLog,
    policy: Policy,
    slot: u32,
    /// Where this publisher last saw the tail.
    at: Place,
    limit: u64,
    /// Which opening of a publisher this is; 0 in models.
    opening: u64,
    /// With an identity: the number committed last.
    last: Option<u64>,
    fenced: bool,
}

impl Writer {
    /// A publisher in `slot`; `at` is any place on the log that is not ahead of the tail.
    pub fn new(log: ManyLog, policy: Policy, slot: u32) -> Option<Self> {
        let at = log.tail_from(None)?;
        Some(Writer { log, policy, slot, at, limit: at.position, opening: 0, last: None, fenced: false })
    }

    /// Which opening of a publisher this is, by which it may be fenced. With an identity, `last` is the number that was
    /// committed last.
    #[must_use]
    pub fn opened_as(self, opening: u64, last: Option<u64>) -> Self {
        Writer { opening, last, ..self }
    }

    pub(crate) fn log(&self) -> &ManyLog {
        &self.log
    }

    /// Where this publisher last saw the tail.
    pub fn at(&self) -> Place {
        self.at
    }

    /// Makes room for one entry at the tail, and gives up what lies below `give_up_below`.
    #[cold]
    pub fn make_room(&mut self, give_up_below: u64, slack: u64) -> Result<(), Stop> {
        self.make_room_within(give_up_below, slack, &mut (4 * self.log.ring.len()))
    }

    /// The same, by a walk of so many steps at most, which are counted down.
    #[cold]
    fn make_room_within(&mut self, give_up_below: u64, slack: u64, steps: &mut u64) -> Result<(), Stop> {
        // A publisher that slept may stand below the floor by now; what it would announce must be true.
        let tail = self.log.tail_within(Some(self.at), steps);
        self.at = tail.ok_or(Stop::Corrupt("no checkpoint leads to the tail"))?;
        // What was walked, or jumped, over may have been a fence.
        self.fenced = self.fenced || self.log.header.note(self.slot).is_fenced(self.opening);
        if self.fenced {
            return Err(Stop::Fenced);
        }
        let want = Want { slot: self.slot, at: self.at, count: 1, give_up_below, slack };
        let settle = |floor| self.log.settle_notes(floor);
        self.limit = self.log.gate().make_room_after(&self.policy, want, settle).map_err(Stop::Blocked)?;
        Ok(())
    }

    /// Publishes the record at `offset` of `arena`, which is number `unit` over all arenas and holds `count` messages, the last
    /// of them with the publisher's own `number`. `check` is asked before each attempt: everything before the place it is given
    /// is committed, and nothing will be put between. On `Stop` nothing has happened. Returns where it was committed.
    pub(crate) fn publish(
        &mut self,
        arena: &Arena,
        offset: u64,
        unit: u64,
        count: u64,
        number: u64,
        mut check: impl FnMut(&ManyLog, Place) -> Result<(), Stop>,
    ) -> Result<Place, Stop> {
        let mut steps = PUBLISH_STEPS + 4 * self.log.ring.len();
        let mut expected = self.walk_to_free(&mut steps)?;
        check(&self.log, self.at)?;
        if let Some(last) = self.last {
            self.note().prepare(self.at.position, last, number);
        }
        loop {
            Record::write_place(arena, offset, self.at);
            let new = self.log.format.word(self.at.position >> self.log.lap_shift, count, unit);
            if self.last.is_some() {
                self.note().pend(self.at.position);
            }
            if self.claim(expected, new) {
                return Ok(self.committed(new, number));
            }
            expected = self.walk_to_free(&mut steps)?;
            check(&self.log, self.at)?;
        }
    }

    #[inline]
    fn committed(&mut self, word: EntryWord, number: u64) -> Place {
        let place = self.at;
        if self.last.is_some() {
            self.note().commit(place.position);
            self.last = Some(number);
        }
        self.at = after(place, word);
        place
    }

    #[inline]
    fn note(&self) -> &Note {
        self.log.header.note(self.slot)
    }

    /// Walks to the first free entry that may be written, by so many steps at most, which are counted down. Returns what it holds now.
    #[inline]
    fn walk_to_free(&mut self, steps: &mut u64) -> Result<u64, Stop> {
        if self.fenced {
            return Err(Stop::Fenced);
        }
        let mut jumps = 0;
        loop {
            match self.log.look(self.at.position) {
                Look::Committed(word) if word.fences(self.slot) => {
                    self.fenced = true;
                    return Err(Stop::Fenced);
                }
                Look::Committed(_) if *steps == 0 => return Err(Stop::Corrupt("its publishers leave no entry free")),
                Look::Committed(word) => {
                    self.at = after(self.at, word);
                    *steps -= 1;
                }
                Look::Free(expected) if self.at.position < self.limit => return Ok(expected),
                // At the limit; or slept for a lap or more: go on from the newest checkpoint, with a limit of today. The rest
                // of the ring cannot have been overwritten each time: then it is garbage.
                Look::Lapped if jumps == JUMPS => return Err(Stop::Corrupt("the ring holds what nobody wrote")),
                Look::Free(_) | Look::Lapped => {
                    jumps += 1;
                    self.make_room_within(0, self.policy.slack, steps)?;
                    *steps = steps.saturating_sub(ROOM_STEPS);
                }
            }
        }
    }

    /// Swaps the entry at `self.at` from exactly what was seen there.
    #[inline]
    fn claim(&self, expected: u64, new: EntryWord) -> bool {
        // Release on success: R-CLAIM pairs with A-CLAIM (ManyLog::look): the record comes before the word. Crash
        // points: before this CAS nobody can tell that we were here, after it the message is whole. Relaxed on
        // failure: `look` reads the word again.
        let word = &self.log.ring.at(self.at.position).word;
        word.compare_exchange(expected, new.raw, Ordering::Release, Ordering::Relaxed).is_ok()
    }

    /// Does all that [`Self::publish_word`] does before its compare-and-swap, which [`Self::claim_late`] may still do
    /// (models: a publisher that stops there).
    #[cfg(loom)]
    pub fn stop_before_claim(&mut self, arena: &Arena, offset: u64, unit: u64, value: u64) -> Result<Claim, Stop> {
        Record::write(arena, offset, 1, 8, 1);
        arena.store(offset + RECORD_HEADER_BYTES, value);
        let expected = self.walk_to_free(&mut PUBLISH_STEPS.clone())?;
        Record::write_place(arena, offset, self.at);
        Ok(Claim { expected, new: self.log.format.word(self.at.position >> self.log.lap_shift, 1, unit) })
    }

    /// The compare-and-swap of a publisher that was stopped. Returns whether it published.
    #[cfg(loom)]
    pub fn claim_late(&self, stopped: Claim) -> bool {
        self.claim(stopped.expected, stopped.new)
    }

    /// Publishes one word under an identity, and dies after some steps (models): 0 the number is prepared, 1 the note is
    /// pending, 2 the entry is swapped, 3 the note says so. Returns whether it was committed.
    #[cfg(loom)]
    pub fn publish_and_die(&mut self, arena: &Arena, offset: u64, unit: u64, number: u64, steps: u32) -> bool {
        let last = self.last.expect("an identity");
        loop {
            let Ok(Claim { expected, new }) = self.stop_before_claim(arena, offset, unit, number) else { return false };
            self.note().prepare(self.at.position, last, number);
            if steps == 0 {
                return false;
            }
            self.note().pend(self.at.position);
            if steps == 1 {
                return false;
            }
            if self.claim(expected, new) {
                if steps == 3 {
                    self.committed(new, number);
                }
                return true;
            }
        }
    }

    /// Wakes readers that sleep.
    #[inline]
    pub fn notify(&self) {
        if !self.log.readers.readers.is_quiet() {
            self.log.readers.readers.ring();
        }
    }

    /// Leaves a fresh checkpoint: for whoever comes next.
    pub fn checkpoint(&self) {
        self.log.header.store_checkpoint(self.slot, self.at);
    }

    /// Publishes one word as a record at `offset` (models and tests; handles use the steps above).
    #[cfg(loom)]
    pub fn publish_word(&mut self, arena: &Arena, offset: u64, unit: u64, value: u64) -> Result<u64, Stop> {
        Record::write(arena, offset, 1, 8, 1);
        arena.store(offset + RECORD_HEADER_BYTES, value);
        self.publish(arena, offset, unit, 1, value, |_, _| Ok(())).map(|place| place.position)
    }
}

/// What a reader finds at its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poll {
    Empty,
    Ready(EntryWord),
    Lapped,
}

/// The reading end.
pub struct Reader {
    log: ManyLog,
    next: Place,
}

impl Reader {
    /// Starts at this position and sequence.
    pub fn new(log: ManyLog, position: u64, sequence: u64) -> Self {
        Reader { log, next: Place { position, sequence } }
    }

    pub(crate) fn log(&self) -> &ManyLog {
        &self.log
    }

    /// Place of the next batch.
    #[inline]
    pub fn next(&self) -> Place {
        self.next
    }

    /// Looks at the next entry.
    #[inline]
    pub fn poll(&self) -> Poll {
        match self.log.look(self.next.position) {
            Look::Committed(word) => Poll::Ready(word),
            Look::Free(_) => Poll::Empty,
            Look::Lapped => Poll::Lapped,
        }
    }

    /// Steps over the batch just read.
    #[inline]
    pub(crate) fn step(&mut self, word: EntryWord) {
        self.next = after(self.next, word);
    }

    /// Steps over the entries that end at or below `sequence`, at most `steps` of them, which are counted down. Says what stopped
    /// it; `None`: there were no more steps to take. As many as the ring is long lead over all that was committed when it began.
    #[inline]
    pub(crate) fn walk_to(&mut self, sequence: u64, steps: &mut u64) -> Option<Poll> {
        while *steps > 0 {
            match self.poll() {
                Poll::Ready(word) if self.next.sequence + word.count() <= sequence => self.step(word),
                other => return Some(other),
            }
            *steps -= 1;
        }
        None
    }

    /// Continues somewhere else.
    pub fn move_to(&mut self, place: Place) {
        self.next = place;
    }

    /// Reads the next entry, if it is there: the word of its record, or `None` for a fence (models).
    #[cfg(loom)]
    pub fn read_word(&mut self, locate: impl Fn(u64) -> (Arena, u64)) -> Option<Option<u64>> {
        let Poll::Ready(word) = self.poll() else { return None };
        let value = (!word.is_fence()).then(|| {
            let (arena, offset) = locate(word.unit());
            arena.load(offset + RECORD_HEADER_BYTES)
        });
        self.step(word);
        Some(value)
    }

    /// Copies the word at the next entry out, if it is there, and stays where it is (models): what the record says
    /// about its position, and the word. Checks nothing, because the record may be overwritten meanwhile.
    #[cfg(loom)]
    pub fn peek_word(&self, locate: impl Fn(u64) -> (Arena, u64)) -> Option<(u64, u64)> {
        let Poll::Ready(word) = self.poll() else { return None };
        let (arena, offset) = locate(word.unit());
        let record = Record::read(&arena, offset).expect("a record in the arena");
        Some((record.position, arena.load(offset + RECORD_HEADER_BYTES)))
    }

    /// Receives one word of a gated log (models and tests): record offset from `locate`.
    #[cfg(loom)]
    pub fn recv_word(&mut self, cursor: u32, locate: impl Fn(u64) -> (Arena, u64)) -> Option<u64> {
        let Poll::Ready(word) = self.poll() else { return None };
        let (arena, offset) = locate(word.unit());
        let record = Record::read(&arena, offset).expect("a record in the arena");
        assert_eq!((record.position, record.first_sequence), (self.next.position, self.next.sequence));
        let value = arena.load(offset + RECORD_HEADER_BYTES);
        self.step(word);
        self.log.cursors[cursor as usize].advance(self.next.position, self.next.sequence);
        if !self.log.readers.writers.is_quiet() {
            self.log.readers.writers.ring();
        }
        Some(value)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn words_tell_their_lap_count_and_record() {
        for unit_bits in [1, 20, 34] {
            let format = Format::new(unit_bits, 1);
            for lap in [1, 5, format.laps - 1, format.laps, format.laps + 1] {
                let fence = format.fence(lap, 63);
                assert!(format.commits(fence.raw, lap) && format.precedes(fence.raw, lap + 1));
                assert_eq!(format.read(fence.raw), fence);
                assert!(fence.is_fence() && fence.fences(63) && !fence.fences(62) && fence.count() == 1);
                let word = format.word(lap, 1024, (1 << unit_bits) - 2);
                assert!(!word.is_fence() && !word.fences(63));
                assert!(format.commits(word.raw, lap) && !format.commits(word.raw, lap - 1));
                assert!(format.precedes(word.raw, lap + 1) && !format.precedes(word.raw, lap + 2));
                assert_eq!(format.read(word.raw), word);
                assert_eq!((word.count(), word.unit()), (1024, (1 << unit_bits) - 2));
            }
            assert!(format.precedes(0, 0) && !format.commits(0, 0));
        }
    }

    const SLOTS: u64 = 1024;

    fn log(slots: u64, unit_bits: u32) -> ManyLog {
        let header = Shared::<[LogHeader]>::zeroed(1).part(|headers| &headers[0]);
        header.format(0);
        let readers = Shared::<[CursorsHeader]>::zeroed(1).part(|headers| &headers[0]);
        ManyLog::new(header, readers, Shared::zeroed(1), Ring::new(Shared::zeroed(slots as usize)), unit_bits, 1)
    }

    /// A log whose walk never ends once it is filled, as where somebody keeps committing ahead of it: there is only one lap to tell
    /// apart.
    fn endless_log() -> ManyLog {
        log(SLOTS, 63 - COUNT_BITS)
    }

    fn fill(log: &ManyLog, word: EntryWord) {
        (0..log.ring.len()).for_each(|at| log.ring.at(at).word.store(word.raw, Ordering::Relaxed));
    }

    fn writer(log: &ManyLog) -> Writer {
        let policy = Policy { messages: SLOTS / 2, slots: SLOTS, overwrite: true, hold: false, slack: SLOTS / 16 };
        Writer::new(log.clone(), policy, 0).unwrap()
    }

    #[test]
    fn a_publisher_gives_up_where_others_commit_ahead_of_it_for_ever() {
        let log = endless_log();
        let mut writer = writer(&log);
        fill(&log, log.format.word(0, 1, 0));
        for mut steps in [1, SLOTS, 10 * SLOTS] {
            let before = writer.at().position;
            assert_eq!(writer.walk_to_free(&mut steps), Err(Stop::Corrupt("its publishers leave no entry free")));
            assert!(steps == 0 && writer.at().position > before);
        }
        let published = writer.publish(&Arena::new(Shared::zeroed(8)), 0, 0, 1, 1, |_, _| Ok(()));
        assert_eq!(published, Err(Stop::Corrupt("its publishers leave no entry free")));
    }

    #[test]
    fn a_tail_is_not_far_from_a_checkpoint() {
        let log = endless_log();
        fill(&log, log.format.word(0, 1, 0));
        let at = |position| Some(Place { position, sequence: position });
        assert_eq!(log.tail_from(None), at(LOOK_BACK_EVERY));
        // Who runs on leaves checkpoints.
        log.header.store_checkpoint(1, Place { position: LOOK_BACK_EVERY - MAX_SLACK, sequence: 7 });
        assert_eq!(log.tail_within(Some(Place::default()), &mut (3 * LOOK_BACK_EVERY)), at(2 * LOOK_BACK_EVERY));
    }

    #[test]
    fn a_ring_of_fences_is_not_walked_round() {
        for (slots, passed) in [(SLOTS, SLOTS), (4 * MAX_BETWEEN, MAX_BETWEEN)] {
            let log = log(slots, 20);
            fill(&log, log.format.fence(0, 3));
            assert_eq!(log.past_fences(0), passed);
        }
    }

    #[test]
    fn a_publisher_is_where_it_was_after_many_laps_of_others() {
        let log = log(SLOTS, 20);
        let (mut others, mut slow) = (writer(&log), writer(&log));
        let publish = |writer: &mut Writer| loop {
            let expected = writer.walk_to_free(&mut SLOTS.clone()).unwrap();
            let new = writer.log.format.word(writer.at.position >> writer.log.lap_shift, 1, 7);
            if writer.claim(expected, new) {
                return writer.committed(new, 0).position;
            }
        };
        for round in 0..5 {
            let last = (0..=round * SLOTS).map(|_| publish(&mut others)).last().unwrap();
            assert_eq!(publish(&mut slow), last + 1);
        }
    }

    #[test]
    fn a_reader_walks_a_lap_at_most_and_goes_on_where_it_stopped() {
        let log = endless_log();
        fill(&log, log.format.word(0, 1, 0));
        let mut reader = Reader::new(log, 5, 50);
        for lap in 1..4 {
            assert_eq!(reader.walk_to(u64::MAX, &mut SLOTS.clone()), None);
            assert_eq!(reader.next(), Place { position: 5 + lap * SLOTS, sequence: 50 + lap * SLOTS });
        }
        let (next, mut steps) = (reader.next(), SLOTS);
        assert!(matches!(reader.walk_to(next.sequence + 9, &mut steps), Some(Poll::Ready(_))));
        assert_eq!((reader.next().position, steps), (next.position + 9, SLOTS - 9));
    }
}
