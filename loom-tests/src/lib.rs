//! Models of the rings; they live in `tests/`. Here: rings on heap memory, and how far to explore.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;
use shmbus::model::*;

/// Preemptions an execution may contain: switches away from a thread that could have gone on. Each bug these models
/// are made for needs one or two (the joiner stops between store and look, the publisher between scan and floor); a
/// third multiplies the time by five to ten. LOOM_MAX_PREEMPTIONS overrides it.
pub const PREEMPTIONS: usize = 2;

/// For models of two short threads, which can afford one more.
pub const PREEMPTIONS_SMALL: usize = 3;

/// For models of three threads that wait for each other: a thread that waits gives way as often as it likes, and each
/// time is one more branch.
pub const PREEMPTIONS_LARGE: usize = 1;

/// Runs `model` through all its executions with at most `preemptions` preemptions.
pub fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.max_branches = 20_000;
    builder.check(model);
}

/// A ring of zeroed slots.
fn slots<const W: usize>(len: u64) -> Ring<Slot<W>> {
    Ring::new(Shared::heap((0..len).map(|_| Slot::new()).collect::<Box<[_]>>()))
}

fn cursors(count: usize) -> Shared<[Cursor]> {
    Shared::heap((0..count).map(|_| Cursor::new()).collect::<Box<[_]>>())
}

/// An exclusive log of `len` slots, starting at 0, with `readers` cursors that are not in force.
pub fn exclusive(len: u64, readers: usize) -> ExclusiveLog<1> {
    let header = Shared::heap(Box::new(LogHeader::new(0)));
    ExclusiveLog::new(header, Shared::heap(Box::new(CursorsHeader::new())), cursors(readers), slots(len))
}

/// A log for many, of `len` entries, starting at 0, with `readers` cursors that are not in force.
pub fn many(len: u64, readers: usize) -> ManyLog {
    let ring = Ring::new(Shared::heap((0..len).map(|_| Entry::new()).collect::<Box<[_]>>()));
    let header = Shared::heap(Box::new(LogHeader::new(0)));
    ManyLog::new(header, Shared::heap(Box::new(CursorsHeader::new())), cursors(readers), ring, 26, RECORDS)
}

/// A formatted channel of `len` slots.
pub fn channel(len: u64) -> Channel<1> {
    let channel = Channel::new(Shared::heap(Box::new(ChannelHeader::new())), slots(len));
    channel.format(0..len);
    channel
}

/// A ledger of `window` words, starting at `start`.
pub fn ledger(window: u64, start: u64) -> Ledger {
    let words = |count| (0..count).map(|_| AtomicU64::new(0)).collect::<Box<[_]>>();
    let header = Shared::heap(Box::new(LedgerHeader::new(start)));
    Ledger::new(header, Shared::heap(words(window)), Shared::heap(words(runs_in(window))))
}

/// A policy that retains as many messages as a ring of `len` has slots, and raises the floor one further than needed.
pub fn gated(len: u64) -> Policy {
    Policy { messages: len, slots: len, overwrite: false, hold: false, slack: 1 }
}

/// The same for a topic whose readers hold nothing back.
pub fn overwriting(len: u64) -> Policy {
    Policy { overwrite: true, ..gated(len) }
}

/// Puts `cursor` in force at `position`, before any thread runs.
pub fn gate_at(gate: Gate<'_>, cursor: u32, position: u64) {
    gate.cursors[cursor as usize].occupy(1, false);
    assert_eq!(gate.join(cursor, position), position);
}

/// Bytes of a record with one word, rounded up to a line.
pub const RECORD: u64 = 64;

/// Arenas of one publisher each, with room for `RECORDS` records. A record's unit is `arena * RECORDS + record`.
#[derive(Clone)]
pub struct Arenas {
    arenas: Vec<Arena>,
}

/// Records in an arena.
pub const RECORDS: u64 = 2;

impl Arenas {
    /// `count` zeroed arenas.
    pub fn new(count: usize) -> Self {
        let words = || (0..RECORDS * RECORD / 8).map(|_| AtomicU64::new(0)).collect::<Box<[_]>>();
        Arenas { arenas: (0..count).map(|_| Arena::new(Shared::heap(words()))).collect() }
    }

    /// Where the record of `unit` lies.
    pub fn locate(&self, unit: u64) -> (Arena, u64) {
        (self.arenas[(unit / RECORDS) as usize].clone(), unit % RECORDS * RECORD)
    }

    /// Publishes `value` in the record of `unit`.
    pub fn publish(&self, writer: &mut ManyWriter, unit: u64, value: u64) -> Result<u64, Stop> {
        let (arena, offset) = self.locate(unit);
        writer.publish_word(&arena, offset, unit, value)
    }
}

/// Payloads that are borrowed in place, as plain memory. Loom runs no load before the store it reads from, so atomic
/// payloads never show a read that is late; on plain memory it demands that each write happens after the reads of the
/// lap before, and each read after its write.
pub struct Borrowed {
    places: Box<[UnsafeCell<u64>]>,
}

// SAFETY: access is what the models check; loom reports one that is not ordered.
unsafe impl Sync for Borrowed {}
// SAFETY: plain numbers.
unsafe impl Send for Borrowed {}

impl Borrowed {
    /// As many places as a ring has slots.
    pub fn new(len: u64) -> Self {
        Borrowed { places: (0..len).map(|_| UnsafeCell::new(0)).collect() }
    }

    fn at(&self, position: u64) -> &UnsafeCell<u64> {
        &self.places[position as usize % self.places.len()]
    }

    /// Writes the payload of `position`.
    pub fn write(&self, position: u64, value: u64) {
        // SAFETY: loom fails the model if this races.
        self.at(position).with_mut(|place| unsafe { *place = value });
    }

    /// Reads the payload of `position`.
    pub fn read(&self, position: u64) -> u64 {
        // SAFETY: loom fails the model if this races.
        self.at(position).with(|place| unsafe { *place })
    }
}

/// Tries again, letting the other threads run, until `attempt` has something.
pub fn until<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        loom::thread::yield_now();
    }
}

/// Waits for `attempt` to be no longer stopped by a reader.
pub fn until_room<T>(mut attempt: impl FnMut() -> Result<T, Stop>) -> T {
    until(|| match attempt() {
        Ok(value) => Some(value),
        Err(Stop::Blocked(_)) => None,
        Err(stop) => panic!("{stop:?}"),
    })
}

/// The value that the models publish at `position`: no two alike, none zero.
pub fn value_of(position: u64) -> u64 {
    100 + position
}
