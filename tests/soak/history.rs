//! What each process did, written down in a mapped file that outlives whoever is killed.

use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::MmapRaw;

/// Events that one process can write down; the file is sparse.
const EVENTS: usize = 4 << 20;

/// What a message says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Stamp {
    /// Whose message it is: a life, a name, or one of the constants in `schedule`.
    pub(crate) origin: u64,
    /// The origin's how-manieth message, from 1; an output's: 2 × its input's sequence, and the one after that.
    pub(crate) number: u64,
    /// Messages of the same batch before and after it.
    pub(crate) before: u32,
    pub(crate) after: u32,
}

/// What somebody did. Topics are numbers: the checker has no need for names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Is about to publish this.
    Attempted { topic: u32, stamp: Stamp },
    /// The publish returned this sequence (`Ok`, or `Duplicate`).
    Acknowledged { topic: u32, stamp: Stamp, sequence: u64 },
    /// Got this as a subscriber; without a stamp it was torn.
    Received { topic: u32, sequence: u64, stamp: Option<Stamp> },
    /// Got this as a consumer.
    Given { topic: u32, sequence: u64, stamp: Option<Stamp>, attempt: u32, at_ns: u64 },
    /// The ack of this returned.
    Acked { topic: u32, sequence: u64 },
    /// Something returned what it never should; the words are on standard error.
    Failed,
}

/// An event as it lies in the file. `kind` is stored last.
#[repr(C)]
struct Record {
    kind: AtomicU32,
    topic: AtomicU32,
    sequence: AtomicU64,
    origin: AtomicU64,
    number: AtomicU64,
    before: AtomicU32,
    after: AtomicU32,
    attempt: AtomicU32,
    torn: AtomicU32,
    at_ns: AtomicU64,
}

/// One process's file: the number of events begun, then the events. A forked child shares it with its parent.
pub(crate) struct Journal(MmapRaw);

impl Journal {
    pub(crate) fn open(path: &Path) -> Journal {
        let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        file.set_len((64 + EVENTS * size_of::<Record>()) as u64).unwrap();
        Journal(MmapRaw::map_raw(&file).unwrap())
    }

    fn begun(&self) -> &AtomicU64 {
        // SAFETY: the file begins with 64 bytes for it, and a mapping is aligned to pages.
        unsafe { &*self.0.as_ptr().cast::<AtomicU64>() }
    }

    fn record(&self, index: u64) -> &Record {
        assert!(index < EVENTS as u64, "the history is full: make the run shorter");
        // SAFETY: the file has room for `EVENTS` records, which consist of atomics, behind the first 64 bytes.
        unsafe { &*self.0.as_ptr().add(64).cast::<Record>().add(index as usize) }
    }

    /// Writes an event down. Who dies over it has not written it.
    pub(crate) fn write(&self, event: Event) {
        let record = self.record(self.begun().fetch_add(1, Ordering::Relaxed));
        let (kind, topic, sequence, stamp, attempt, at_ns) = match event {
            Event::Attempted { topic, stamp } => (1, topic, 0, Some(stamp), 0, 0),
            Event::Acknowledged { topic, stamp, sequence } => (2, topic, sequence, Some(stamp), 0, 0),
            Event::Received { topic, sequence, stamp } => (3, topic, sequence, stamp, 0, 0),
            Event::Given { topic, sequence, stamp, attempt, at_ns } => (4, topic, sequence, stamp, attempt, at_ns),
            Event::Acked { topic, sequence } => (5, topic, sequence, None, 0, 0),
            Event::Failed => (6, 0, 0, None, 0, 0),
        };
        let Stamp { origin, number, before, after } =
            stamp.unwrap_or(Stamp { origin: 0, number: 0, before: 0, after: 0 });
        record.topic.store(topic, Ordering::Relaxed);
        record.sequence.store(sequence, Ordering::Relaxed);
        record.origin.store(origin, Ordering::Relaxed);
        record.number.store(number, Ordering::Relaxed);
        record.before.store(before, Ordering::Relaxed);
        record.after.store(after, Ordering::Relaxed);
        record.attempt.store(attempt, Ordering::Relaxed);
        record.torn.store(u32::from(stamp.is_none()), Ordering::Relaxed);
        record.at_ns.store(at_ns, Ordering::Relaxed);
        record.kind.store(kind, Ordering::SeqCst);
    }

    /// Everything that was written down, in order.
    pub(crate) fn read(&self) -> Vec<Event> {
        (0..self.begun().load(Ordering::SeqCst)).filter_map(|index| self.event(index)).collect()
    }

    fn event(&self, index: u64) -> Option<Event> {
        let record = self.record(index);
        let kind = record.kind.load(Ordering::SeqCst);
        let (topic, sequence) = (record.topic.load(Ordering::Relaxed), record.sequence.load(Ordering::Relaxed));
        let stamp = Stamp {
            origin: record.origin.load(Ordering::Relaxed),
            number: record.number.load(Ordering::Relaxed),
            before: record.before.load(Ordering::Relaxed),
            after: record.after.load(Ordering::Relaxed),
        };
        let whole = (record.torn.load(Ordering::Relaxed) == 0).then_some(stamp);
        let (attempt, at_ns) = (record.attempt.load(Ordering::Relaxed), record.at_ns.load(Ordering::Relaxed));
        match kind {
            0 => None,
            1 => Some(Event::Attempted { topic, stamp }),
            2 => Some(Event::Acknowledged { topic, stamp, sequence }),
            3 => Some(Event::Received { topic, sequence, stamp: whole }),
            4 => Some(Event::Given { topic, sequence, stamp: whole, attempt, at_ns }),
            5 => Some(Event::Acked { topic, sequence }),
            _ => Some(Event::Failed),
        }
    }
}
