//! The reading end of each kind of ring behind one interface: the next message's whereabouts, never waits.

use std::ptr::NonNull;
use std::sync::Arc;

use crate::client::control::Control;
use crate::error::{GoneReason, RecvError};
use crate::ring::arena::{Arena, Span};
use crate::ring::cursor::{Cursor, CursorsHeader};
use crate::ring::doorbell::Doorbell;
use crate::ring::exclusive;
use crate::ring::gate::still_retained;
use crate::ring::log::{LogHeader, Place, TopicState};
use crate::ring::many::{self, EntryWord, Record};
use crate::ring::sequence::Sequence;
use crate::ring::slot::{Kind, Slot, Word};
use crate::ring::spsc;
use crate::shm::layout::RECORD_HEADER_BYTES;
use crate::shm::segment::{Access, Segment};
use crate::shm::shared::Shared;
use crate::shm::topic::{self, Arenas, SharedInfo, locate};
use crate::sync::Ordering;

/// The message found last. It lies in the handle and is filled in place: passing it up through results would cost
/// more than finding it.
pub(crate) struct Found {
    pub(crate) sequence: u64,
    /// In the ring or an arena, where it stays whole until the next poll, or in the handle's buffer.
    pub(crate) payload: NonNull<[u8]>,
    origin: Origin,
    buffer: Buffer,
}

/// Who published, in the port's own terms: index and position of a tenancy, or publisher and number.
#[derive(Clone, Copy, Default)]
pub(crate) struct Origin(u64, u64);

// SAFETY: the pointer is only followed through the handle that owns the port whose memory it points to.
unsafe impl Send for Found {}

impl Found {
    /// Nothing found yet.
    pub(crate) fn nothing() -> Self {
        let payload = NonNull::slice_from_raw_parts(NonNull::dangling(), 0);
        Found { sequence: 0, payload, origin: Origin::default(), buffer: Buffer::default() }
    }

    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }

    #[inline]
    fn set(&mut self, sequence: u64, payload: NonNull<[u8]>, origin: Origin) {
        self.sequence = sequence;
        self.payload = payload;
        self.origin = origin;
    }
}

/// `len` bytes at `pointer`, which is not null.
#[inline]
fn payload_at(pointer: *const u8, len: usize) -> NonNull<[u8]> {
    // SAFETY: every caller passes a pointer into a mapping or a buffer.
    NonNull::slice_from_raw_parts(unsafe { NonNull::new_unchecked(pointer.cast_mut()) }, len)
}

/// A kind of ring, seen from its reading end.
pub(crate) trait ReadPort: Send {
    /// Finds the next message if that takes a few loads and nothing else; false: call [`Self::poll`].
    #[inline(always)]
    fn poll_fast(&mut self, _found: &mut Found) -> bool {
        false
    }

    /// Finds the next message, if it is there, after everything handed out before has been given back.
    fn poll(&mut self, found: &mut Found) -> Result<bool, RecvError>;

    /// The bell to wait on for messages.
    fn bell(&self) -> &Doorbell;

    /// Whether the topic is gone. Messages that are still there come first.
    fn gone(&self) -> Option<GoneReason>;

    /// How many messages lie between this reader and the tail; stale at once.
    fn lag(&self) -> u64;

    /// Publisher and its number of a message, as far as they are known.
    fn publisher_of(&self, origin: Origin) -> Option<(u64, u64)>;

    /// Called once, by the handle's drop.
    fn leave(&mut self);
}

/// A handle's own memory for copied payloads, aligned for every payload type.
#[derive(Default)]
pub(crate) struct Buffer {
    blocks: Vec<Block>,
}

#[repr(C, align(32))]
#[derive(Clone, Copy)]
struct Block([u8; 32]);

impl Buffer {
    /// `len` bytes to fill.
    fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        let blocks = len.div_ceil(32);
        if self.blocks.len() < blocks {
            self.blocks.resize(blocks, Block([0; 32]));
        }
        // SAFETY: `Block` is 32 plain bytes without padding, and `len` of them are there (just resized).
        unsafe { std::slice::from_raw_parts_mut(self.blocks.as_mut_ptr().cast::<u8>(), len) }
    }

    /// The first `len` bytes, just filled.
    fn filled(&self, len: usize) -> NonNull<[u8]> {
        payload_at(self.blocks.as_ptr().cast(), len)
    }
}

/// The reader's side of the gate: when to store the cursor, and whom to wake.
struct CursorKeeper {
    readers: Shared<CursorsHeader>,
    cursors: Shared<[Cursor]>,
    index: usize,
    stored: u64,
    period: u64,
}

impl CursorKeeper {
    /// Whether it is time to store the cursor: a period has passed, or a publisher waits.
    #[inline]
    fn is_due(&self, position: u64) -> bool {
        position - self.stored >= self.period || (position != self.stored && self.readers.writers.is_waited_on())
    }

    #[inline]
    fn maybe_store(&mut self, position: u64, sequence: u64) {
        if self.is_due(position) {
            self.store(position, sequence);
        }
    }

    /// Stores the cursor and wakes publishers that wait for it.
    fn store(&mut self, position: u64, sequence: u64) {
        if position == self.stored {
            return;
        }
        self.cursors[self.index].advance(position, sequence);
        self.stored = position;
        if !self.readers.writers.is_quiet() {
            self.readers.writers.ring();
        }
    }
}

fn reason(header: &LogHeader) -> Option<GoneReason> {
    match header.state() {
        TopicState::Live => None,
        TopicState::Removed => Some(GoneReason::Removed),
        TopicState::Stopped => Some(GoneReason::Stopped),
    }
}

/// The publisher may have died or the topic be garbled; either way this message is not one.
const BAD_LENGTH: RecvError = RecvError::Corrupt("a message's length does not fit its place");

/// What every port checks of a payload's length.
#[derive(Clone, Copy)]
struct Lengths {
    min: u64,
    max: u64,
}

impl Lengths {
    fn of(info: &SharedInfo) -> Self {
        match &info.options.schema {
            Some(schema) => Lengths { min: schema.size_bytes, max: schema.size_bytes },
            None => Lengths { min: 0, max: info.options.bytes },
        }
    }

    #[inline]
    fn allow(self, len: u64) -> bool {
        self.min <= len && len <= self.max
    }
}

/// A subscriber of an exclusive topic.
pub(crate) struct ExclusivePort<const W: usize> {
    reader: exclusive::Reader<W>,
    keeper: CursorKeeper,
    lengths: Lengths,
    arena: Arena,
    gating: bool,
    /// Slots are aligned well enough for the payload's type.
    in_place: bool,
    /// First lost sequence, until it has been reported.
    lost_from: Option<u64>,
}

impl<const W: usize> ExclusivePort<W> {
    pub(crate) fn new(
        log: exclusive::ExclusiveLog<W>,
        info: SharedInfo,
        arena: Arena,
        cursor: u32,
        position: u64,
        gating: bool,
        lost_from: Option<u64>,
    ) -> Self {
        let keeper = keeper(log.readers.clone(), log.cursors.clone(), cursor, position, &info);
        let (lengths, in_place) = (Lengths::of(&info), fits_slots(&info));
        let reader = exclusive::Reader::new(log, position);
        ExclusivePort { reader, keeper, lengths, arena, gating, in_place, lost_from }
    }

    #[cold]
    fn lagged(&mut self) -> RecvError {
        let from = self.lost_from.take().unwrap_or(self.reader.next());
        self.reader.skip_to_retained();
        RecvError::Lagged { from: Sequence::new(from), to: Sequence::new(self.reader.next()) }
    }

    /// Nothing new: a good moment to give back what has been read.
    #[cold]
    fn idle(&mut self) {
        self.keeper.store(self.reader.next(), self.reader.next());
    }

    /// The message's payload, copied where nobody keeps it for us; `None`: overwritten meanwhile.
    #[inline]
    fn payload(&self, word: Word, buffer: &mut Buffer) -> Result<Option<NonNull<[u8]>>, RecvError> {
        let slot = self.reader.slot();
        if word.kind() == Kind::Inline && self.gating {
            return inline_in_place(slot, word, self.lengths, self.in_place, buffer).map(Some);
        }
        if self.gating {
            return span_in_place(slot, &self.arena, self.lengths).map(Some);
        }
        self.copy(word, buffer)
    }

    /// Copies a payload that may be overwritten at any time; the copy counts if it was still retained afterwards.
    fn copy(&self, word: Word, buffer: &mut Buffer) -> Result<Option<NonNull<[u8]>>, RecvError> {
        let slot = self.reader.slot();
        let (len, sound) = if word.kind() == Kind::Inline {
            let len = word.length().min(Slot::<W>::INLINE_BYTES);
            slot.read(buffer.bytes_mut(len));
            (len, len == word.length())
        } else {
            let span = slot.read_span();
            let sound = self.arena.contains(span);
            if sound {
                self.arena.read(span.offset, buffer.bytes_mut(span.len as usize));
            }
            (span.len as usize, sound)
        };
        if !still_retained(&self.reader.log().header, self.reader.next()) {
            return Ok(None);
        }
        if sound && self.lengths.allow(len as u64) { Ok(Some(buffer.filled(len))) } else { Err(BAD_LENGTH) }
    }
}

/// A small payload where it lies, whole until the reader gives its slot back. Copied only where the slot's alignment
/// does not do for the payload's type.
#[inline]
fn inline_in_place<const W: usize>(
    slot: &Slot<W>,
    word: Word,
    lengths: Lengths,
    in_place: bool,
    buffer: &mut Buffer,
) -> Result<NonNull<[u8]>, RecvError> {
    let len = word.length();
    if len > Slot::<W>::INLINE_BYTES || !lengths.allow(len as u64) {
        return Err(BAD_LENGTH);
    }
    if !in_place {
        slot.read(buffer.bytes_mut(len));
        return Ok(buffer.filled(len));
    }
    Ok(payload_at(slot.pointer(), len))
}

/// An arena payload where it lies, whole until the reader gives its slot back.
fn span_in_place<const W: usize>(slot: &Slot<W>, arena: &Arena, lengths: Lengths) -> Result<NonNull<[u8]>, RecvError> {
    let span = slot.read_span();
    if !arena.contains(span) || !lengths.allow(span.len) {
        return Err(BAD_LENGTH);
    }
    Ok(payload_at(arena.pointer(span), span.len as usize))
}

/// Whether a slot's payload, which lies 8 bytes into it, is aligned for the payload's type.
fn fits_slots(info: &SharedInfo) -> bool {
    info.options.schema.as_ref().is_none_or(|schema| schema.align_bytes <= 8)
}

fn keeper(
    readers: Shared<CursorsHeader>,
    cursors: Shared<[Cursor]>,
    cursor: u32,
    stored: u64,
    info: &SharedInfo,
) -> CursorKeeper {
    // Often enough that a full ring never waits for a reader that has long read on.
    let period = (info.options.messages / 16).clamp(1, info.geometry.slack());
    CursorKeeper { readers, cursors, index: cursor as usize, stored, period }
}

impl<const W: usize> ReadPort for ExclusivePort<W> {
    #[inline(always)]
    fn poll_fast(&mut self, found: &mut Found) -> bool {
        let position = self.reader.next();
        if !self.gating || !self.in_place || self.lost_from.is_some() || self.keeper.is_due(position) {
            return false;
        }
        let exclusive::Poll::Ready(word) = self.reader.poll() else { return false };
        let len = word.length();
        if word.kind() != Kind::Inline || len > Slot::<W>::INLINE_BYTES || !self.lengths.allow(len as u64) {
            return false;
        }
        found.set(position, payload_at(self.reader.slot().pointer(), len), Origin(word.tenancy().into(), position));
        self.reader.step();
        true
    }

    #[inline]
    fn poll(&mut self, found: &mut Found) -> Result<bool, RecvError> {
        if let Some(from) = self.lost_from.take() {
            let (from, to) = (Sequence::new(from), Sequence::new(self.reader.next()));
            return Err(RecvError::Lagged { from, to });
        }
        let position = self.reader.next();
        self.keeper.maybe_store(position, position);
        loop {
            let position = self.reader.next();
            let word = match self.reader.poll() {
                exclusive::Poll::Ready(word) => word,
                exclusive::Poll::Empty => {
                    self.idle();
                    return Ok(false);
                }
                exclusive::Poll::Lapped if self.gating => {
                    return Err(RecvError::Corrupt("the ring went on past a reader that holds it"));
                }
                exclusive::Poll::Lapped => return Err(self.lagged()),
            };
            if word.kind() == Kind::Hole {
                self.reader.step();
                continue;
            }
            let Some(payload) = self.payload(word, &mut found.buffer)? else { return Err(self.lagged()) };
            self.reader.step();
            found.set(position, payload, Origin(word.tenancy().into(), position));
            return Ok(true);
        }
    }

    fn bell(&self) -> &Doorbell {
        &self.keeper.readers.readers
    }

    fn gone(&self) -> Option<GoneReason> {
        if self.bell().wants_attention() { reason(&self.reader.log().header) } else { None }
    }

    fn lag(&self) -> u64 {
        self.reader.log().tail().map_or(0, |tail| tail.saturating_sub(self.reader.next()))
    }

    fn publisher_of(&self, origin: Origin) -> Option<(u64, u64)> {
        let Origin(index, position) = origin;
        self.reader.log().header.publisher_at(index as u8, position)
    }

    fn leave(&mut self) {
        self.idle();
    }
}

/// A subscriber of a topic with many publishers.
pub(crate) struct ManyPort {
    reader: many::Reader,
    keeper: CursorKeeper,
    info: SharedInfo,
    lengths: Lengths,
    arenas: Arenas,
    control: Arc<Control>,
    gating: bool,
    batch: Option<Batch>,
    /// Sequences below this were not asked for.
    skip_below: u64,
    lost_from: Option<u64>,
}

/// The batch being read; it is given back as a whole.
#[derive(Clone, Copy)]
struct Batch {
    word: EntryWord,
    record: Record,
    slot: u32,
    /// Where the length table begins.
    start: u64,
    index: u64,
    /// Where the next payload begins.
    at: u64,
}

impl ManyPort {
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        log: many::ManyLog,
        info: SharedInfo,
        arenas: Arenas,
        control: Arc<Control>,
        cursor: u32,
        place: Place,
        gating: bool,
        skip_below: u64,
        lost_from: Option<u64>,
    ) -> Self {
        let keeper = keeper(log.readers.clone(), log.cursors.clone(), cursor, place.position, &info);
        let reader = many::Reader::new(log, place.position, place.sequence);
        let lengths = Lengths::of(&info);
        ManyPort { reader, keeper, info, lengths, arenas, control, gating, batch: None, skip_below, lost_from }
    }

    /// The arena of a publisher slot. One that is new since we joined lies in our control socket: the coordinator
    /// pushed it before its publisher could publish.
    fn load_arena(&mut self, slot: u32) -> Result<(), RecvError> {
        if self.arenas.get(slot as usize).is_some_and(Option::is_some) {
            return Ok(());
        }
        if slot >= self.info.options.max_publishers {
            return Err(RecvError::Corrupt("an entry points outside every arena"));
        }
        let fd = self.control.arena(self.info.id, slot).ok_or(RecvError::Corrupt("an entry points to no arena"))?;
        let segment = Segment::attach(std::os::fd::AsFd::as_fd(&fd), &self.info.arena(slot), Access::ReadOnly);
        let segment = segment.map_err(|_| RecvError::Corrupt("a new arena is not what was promised"))?;
        if self.arenas.len() <= slot as usize {
            self.arenas.resize_with(slot as usize + 1, || None);
        }
        self.arenas[slot as usize] = Some(topic::arena(&segment, &self.info.geometry));
        Ok(())
    }

    fn arena(&self, slot: u32) -> &Arena {
        self.arenas[slot as usize].as_ref().expect("loaded before its span was handed out")
    }

    /// Opens the batch that `word` points to. `Ok(None)`: overwritten meanwhile.
    #[inline]
    fn open(&mut self, word: EntryWord) -> Result<Option<Batch>, RecvError> {
        let position = self.reader.next().position;
        let (slot, offset) = locate(&self.info.geometry, word.unit());
        self.load_arena(slot)?;
        let Some(record) = Record::read(self.arena(slot), offset) else {
            return self.unless_overwritten(position, RecvError::Corrupt("a record does not fit its arena"));
        };
        if record.position != position {
            return self.unless_overwritten(position, RecvError::Corrupt("an entry points to another entry's record"));
        }
        let table = if word.count() == 1 { 0 } else { (word.count() * 4).next_multiple_of(self.info.batch_align()) };
        if table > record.body_bytes {
            return self.unless_overwritten(position, RecvError::Corrupt("a batch is too short for its table"));
        }
        let start = offset + RECORD_HEADER_BYTES;
        Ok(Some(Batch { word, record, slot, start, index: 0, at: start + table }))
    }

    /// Nonsense in memory that may have been overwritten is no error.
    #[cold]
    fn unless_overwritten<R>(&self, position: u64, error: RecvError) -> Result<Option<R>, RecvError> {
        if self.gating || still_retained(&self.reader.log().header, position) { Err(error) } else { Ok(None) }
    }

    /// Finds the next message of the open batch. `Ok(false)`: overwritten meanwhile.
    #[inline]
    fn take(&mut self, mut batch: Batch, found: &mut Found) -> Result<bool, RecvError> {
        let position = batch.record.position;
        let arena = self.arena(batch.slot);
        let len = if batch.word.count() == 1 {
            batch.record.body_bytes
        } else {
            arena.load(batch.start + batch.index / 2 * 8) >> (batch.index % 2 * 32) & u64::from(u32::MAX)
        };
        let span = Span { offset: batch.at, len };
        let end = batch.start + batch.record.body_bytes;
        if batch.at + len > end || !self.lengths.allow(len) {
            return self.unless_overwritten(position, BAD_LENGTH).map(|never: Option<()>| never.is_some());
        }
        let payload = if self.gating {
            payload_at(arena.pointer(span), len as usize)
        } else {
            arena.read(span.offset, found.buffer.bytes_mut(len as usize));
            if !still_retained(&self.reader.log().header, position) {
                return Ok(false);
            }
            found.buffer.filled(len as usize)
        };
        let origin = Origin(batch.record.publisher, batch.record.first_number.wrapping_add(batch.index));
        // Our own count, not the record's: what we report follows from the words alone.
        let sequence = self.reader.next().sequence + batch.index;
        batch.index += 1;
        batch.at += len.next_multiple_of(self.info.batch_align());
        self.batch = Some(batch);
        found.set(sequence, payload, origin);
        Ok(true)
    }

    /// Gives back the batch that has been read to its end.
    #[inline]
    fn finish_batch(&mut self) {
        if let Some(batch) = self.batch.filter(|batch| batch.index == batch.word.count()) {
            self.reader.step(batch.word);
            self.batch = None;
        }
        let next = self.reader.next();
        self.keeper.maybe_store(next.position, next.sequence);
    }

    #[cold]
    fn idle(&mut self) {
        let next = self.reader.next();
        self.keeper.store(next.position, next.sequence);
    }

    /// Continues at the oldest batch that is retained for certain, and says what was lost.
    #[cold]
    fn lagged(&mut self) -> RecvError {
        let read = self.batch.take().map_or(0, |batch| batch.index);
        let from = self.reader.next().sequence + read;
        for _ in 0..1000 {
            // Acquire: as in `gate::join`; only a place to look at next.
            let oldest = self.reader.log().header.intent.0.load(Ordering::Acquire);
            if let Some(place) = self.place_at(oldest) {
                self.reader.move_to(place);
                let (from, to) = (Sequence::new(from), Sequence::new(place.sequence));
                return RecvError::Lagged { from, to };
            }
        }
        RecvError::Corrupt("no record leads back into the ring")
    }

    /// Position and sequence of the batch at `position`, if it is still retained.
    fn place_at(&mut self, position: u64) -> Option<Place> {
        let Some(word) = self.reader.log().committed(position) else {
            return self.reader.log().tail_from(None).filter(|tail| tail.position >= position);
        };
        let (slot, offset) = locate(&self.info.geometry, word.unit());
        self.load_arena(slot).ok()?;
        let record = Record::read(self.arena(slot), offset)?;
        let sound = record.position == position && still_retained(&self.reader.log().header, position);
        sound.then_some(Place { position, sequence: record.first_sequence })
    }
}

impl ReadPort for ManyPort {
    #[inline]
    fn poll(&mut self, found: &mut Found) -> Result<bool, RecvError> {
        if let Some(from) = self.lost_from.take() {
            let (from, to) = (Sequence::new(from), Sequence::new(self.reader.next().sequence));
            return Err(RecvError::Lagged { from, to });
        }
        self.finish_batch();
        loop {
            let batch = match self.batch {
                Some(batch) => batch,
                None => match self.reader.poll() {
                    many::Poll::Ready(word) => match self.open(word)? {
                        Some(batch) => batch,
                        None => return Err(self.lagged()),
                    },
                    many::Poll::Empty => {
                        self.idle();
                        return Ok(false);
                    }
                    many::Poll::Lapped if self.gating => {
                        return Err(RecvError::Corrupt("the ring went on past a reader that holds it"));
                    }
                    many::Poll::Lapped => return Err(self.lagged()),
                },
            };
            if !self.take(batch, found)? {
                return Err(self.lagged());
            }
            if found.sequence >= self.skip_below {
                return Ok(true);
            }
            self.finish_batch();
        }
    }

    fn bell(&self) -> &Doorbell {
        &self.keeper.readers.readers
    }

    fn gone(&self) -> Option<GoneReason> {
        if self.bell().wants_attention() { reason(&self.reader.log().header) } else { None }
    }

    fn lag(&self) -> u64 {
        let next = self.reader.next();
        let read = self.batch.map_or(0, |batch| batch.index);
        let tail = self.reader.log().tail_from(Some(next)).or_else(|| self.reader.log().tail_from(None));
        tail.map_or(0, |tail| tail.sequence.saturating_sub(next.sequence + read))
    }

    fn publisher_of(&self, origin: Origin) -> Option<(u64, u64)> {
        let Origin(publisher, number) = origin;
        Some((publisher, number))
    }

    fn leave(&mut self) {
        self.finish_batch();
        self.idle();
    }
}

/// A channel's receiver.
pub(crate) struct ChannelPort<const W: usize> {
    receiver: spsc::Receiver<W>,
    lengths: Lengths,
    in_place: bool,
    arena: Arena,
    /// Stand-alone receivers tell the sender good-bye; on a bus another receiver may follow.
    stand_alone: bool,
}

impl<const W: usize> ChannelPort<W> {
    pub(crate) fn new(channel: spsc::Channel<W>, info: &SharedInfo, arena: Arena, stand_alone: bool) -> Self {
        let (head, _) = channel.ends();
        let (lengths, in_place) = (Lengths::of(info), fits_slots(info));
        ChannelPort { receiver: spsc::Receiver::new(channel, head), lengths, in_place, arena, stand_alone }
    }
}

impl<const W: usize> ReadPort for ChannelPort<W> {
    #[inline(always)]
    fn poll_fast(&mut self, found: &mut Found) -> bool {
        self.receiver.free();
        let Some(word) = self.receiver.poll() else { return false };
        let len = word.length();
        let small = word.kind() == Kind::Inline && len <= Slot::<W>::INLINE_BYTES;
        if !small || !self.in_place || !self.lengths.allow(len as u64) {
            return false;
        }
        found.set(self.receiver.next(), payload_at(self.receiver.slot().pointer(), len), Origin::default());
        self.receiver.step();
        true
    }

    #[inline]
    fn poll(&mut self, found: &mut Found) -> Result<bool, RecvError> {
        self.receiver.free();
        let Some(word) = self.receiver.poll() else { return Ok(false) };
        let sequence = self.receiver.next();
        let slot = self.receiver.slot();
        let payload = if word.kind() == Kind::Inline {
            inline_in_place(slot, word, self.lengths, self.in_place, &mut found.buffer)?
        } else {
            span_in_place(slot, &self.arena, self.lengths)?
        };
        self.receiver.step();
        found.set(sequence, payload, Origin::default());
        Ok(true)
    }

    fn bell(&self) -> &Doorbell {
        &self.receiver.channel().header.readers
    }

    fn gone(&self) -> Option<GoneReason> {
        let header = &self.receiver.channel().header;
        if !header.readers.wants_attention() {
            return None;
        }
        header.ended().or_else(|| header.is_closed(spsc::End::Sender).then_some(GoneReason::Closed))
    }

    fn lag(&self) -> u64 {
        self.receiver.channel().ends().1.saturating_sub(self.receiver.next())
    }

    fn publisher_of(&self, _origin: Origin) -> Option<(u64, u64)> {
        None
    }

    fn leave(&mut self) {
        self.receiver.free();
        if self.stand_alone {
            self.receiver.channel().header.close(spsc::End::Receiver);
        }
    }
}
