//! The head of a log: its state, the floor, checkpoints and tenancies (ARCHITECTURE.md §3.2).

#[cfg(not(loom))]
use std::time::Duration;

#[cfg(not(loom))]
use crate::os::clock;
use crate::ring::notes::Note;
use crate::sync::{AtomicU32, AtomicU64, Ordering, pause};

/// Checkpoints in a log; loom gets fewer, because it tracks every word.
pub(crate) const CHECKPOINTS: usize = if cfg!(loom) { 2 } else { 64 };

/// Tenancies in a log.
pub(crate) const TENANCIES: usize = if cfg!(loom) { 2 } else { 256 };

/// The checkpoint slot of the coordinator, besides those of the publishers.
pub(crate) const COORDINATOR: u32 = CHECKPOINTS as u32;

const NO_CHECKPOINT: u64 = u64::MAX;

/// Times that a walk along the entries goes on from further on, because the ring was overwritten where it stood: from the newest
/// checkpoint, for which all are looked at, or from a group's line. A publisher's within one publish.
pub(crate) const JUMPS: u32 = 100;

/// No log gets this far. What memory says beyond is garbage, and must not overflow what is added to it (I-8).
pub(crate) const MAX_PLACE: u64 = u64::MAX / 2;

/// Looks at a place that others keep moving, and how often it may fail to be there without having moved: more than a
/// race or two takes, and few enough that garbage costs little.
#[cfg(not(loom))]
const PLACE_LOOKS: usize = 1000;
#[cfg(not(loom))]
const SAME_PLACE_LOOKS: usize = 8;

/// How long to follow a place that keeps moving: the coordinator may be the one who looks, and one look at a garbled ring may take as
/// long as many at a sound one. In time of our own: who sleeps between two looks has not looked for longer.
#[cfg(not(loom))]
const PLACE_PATIENCE: Duration = Duration::from_millis(5);

/// First position of a tenancy that is being written: above every message's.
const NO_POSITION: u64 = u64::MAX;

/// Looks at a checkpoint that its writer keeps changing. Each change is a chunk of the writer's messages, so a few
/// suffice; the limit is for garbage.
const CHECKPOINT_LOOKS: usize = 1000;

/// A topic's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicState {
    Live,
    Removed,
    Stopped,
}

/// See the module's documentation. Zeroed memory plus [`LogHeader::format`] is an empty log.
#[repr(C)]
pub struct LogHeader {
    state: StateLine,
    pub(crate) intent: FloorLine,
    pub(crate) floor: FloorLine,
    /// On topics that hold: what has been read by readers that have left.
    pub(crate) released: FloorLine,
    checkpoints: [Checkpoint; CHECKPOINTS],
    tenancies: [Tenancy; TENANCIES],
    /// One line a publisher slot.
    notes: [Note; CHECKPOINTS],
    /// The coordinator's own, for the fences it commits.
    own_checkpoint: Checkpoint,
    identities: IdentitySlots,
}

/// The publisher slots that have ever had an owner with an identity, a bit each.
#[repr(C, align(64))]
struct IdentitySlots(AtomicU64);

#[repr(C, align(128))]
struct StateLine(AtomicU32);

/// A floor word on a line of its own.
#[repr(C, align(128))]
pub(crate) struct FloorLine(pub(crate) AtomicU64);

/// Two (position, sequence) pairs, written in turn by one publisher slot's owner: a death in the middle of one leaves
/// the other.
#[repr(C, align(64))]
struct Checkpoint {
    pairs: [Pair; 2],
}

#[repr(C)]
struct Pair {
    position: AtomicU64,
    sequence: AtomicU64,
}

/// Who published from `first_position` on, until the next tenancy.
#[repr(C, align(32))]
struct Tenancy {
    first_position: AtomicU64,
    publisher: AtomicU64,
    first_number: AtomicU64,
    reserved: AtomicU64,
}

/// A place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Place {
    pub position: u64,
    pub sequence: u64,
}

/// How long a search for a place goes on, in time of this thread.
#[cfg(not(loom))]
pub(crate) struct Patience {
    end: Duration,
}

#[cfg(not(loom))]
impl Patience {
    pub(crate) fn new() -> Self {
        Patience { end: clock::thread_time() + PLACE_PATIENCE }
    }

    fn is_over(&self) -> bool {
        clock::thread_time() >= self.end
    }

    /// Does what may take longer than the search itself, and has its own limit: mapping an arena, of which there are so many.
    pub(crate) fn aside<R>(&mut self, act: impl FnOnce() -> R) -> R {
        let start = clock::thread_time();
        let done = act();
        self.end += clock::thread_time() - start;
        done
    }
}

/// What `find` finds at the position that `at` names, which others may move on meanwhile.
#[cfg(not(loom))]
pub(crate) fn find_place<R>(
    mut at: impl FnMut() -> u64,
    mut find: impl FnMut(u64, &mut Patience) -> Option<R>,
) -> Option<R> {
    let (mut last, mut same, mut patience) = (None, 0, Patience::new());
    for look in 0..PLACE_LOOKS {
        if look > 0 && patience.is_over() {
            return None;
        }
        let position = at();
        same = if last == Some(position) { same + 1 } else { 0 };
        if same == SAME_PLACE_LOOKS {
            return None;
        }
        last = Some(position);
        if let Some(found) = find(position, &mut patience) {
            return Some(found);
        }
    }
    None
}

impl LogHeader {
    /// An empty log outside shared memory, starting at `start`.
    #[cfg(loom)]
    pub fn new(start: u64) -> Self {
        let pair = || Pair { position: AtomicU64::new(0), sequence: AtomicU64::new(0) };
        let header = LogHeader {
            state: StateLine(AtomicU32::new(0)),
            intent: FloorLine(AtomicU64::new(0)),
            floor: FloorLine(AtomicU64::new(0)),
            released: FloorLine(AtomicU64::new(0)),
            checkpoints: std::array::from_fn(|_| Checkpoint { pairs: [pair(), pair()] }),
            tenancies: std::array::from_fn(|_| Tenancy {
                first_position: AtomicU64::new(0),
                publisher: AtomicU64::new(0),
                first_number: AtomicU64::new(0),
                reserved: AtomicU64::new(0),
            }),
            notes: std::array::from_fn(|_| Note::new()),
            own_checkpoint: Checkpoint { pairs: [pair(), pair()] },
            identities: IdentitySlots(AtomicU64::new(0)),
        };
        header.format(start);
        header
    }

    /// Makes zeroed memory an empty log that starts at position (and sequence) `start`.
    pub(crate) fn format(&self, start: u64) {
        // Relaxed: nobody else sees the log before its descriptor is passed on.
        self.intent.0.store(start, Ordering::Relaxed);
        self.floor.0.store(start, Ordering::Relaxed);
        for checkpoint in self.checkpoints.iter().chain([&self.own_checkpoint]) {
            for pair in &checkpoint.pairs {
                pair.position.store(NO_CHECKPOINT, Ordering::Relaxed);
            }
        }
        let first = &self.checkpoints[0].pairs[0];
        first.sequence.store(start, Ordering::Relaxed);
        first.position.store(start, Ordering::Relaxed);
    }

    /// The confirmed floor, as a publisher would look at it (models).
    #[cfg(loom)]
    pub fn floor(&self) -> u64 {
        // Acquire: A-FLOOR pairs with R-FLOOR (gate::raise).
        self.floor.0.load(Ordering::Acquire)
    }

    /// The announced floor: what lies at or above it when this is called is retained, for who has joined (I-4).
    #[inline]
    pub(crate) fn announced(&self) -> u64 {
        // Acquire: A-INTENT pairs with R-INTENT (gate::raise).
        self.intent.0.load(Ordering::Acquire).min(MAX_PLACE)
    }

    /// The topic's life.
    pub fn state(&self) -> TopicState {
        // Acquire: A-STATE pairs with R-STATE (end).
        match self.state.0.load(Ordering::Acquire) {
            0 => TopicState::Live,
            1 => TopicState::Removed,
            _ => TopicState::Stopped,
        }
    }

    /// Why the topic is gone, if it is.
    #[cfg(not(loom))]
    pub(crate) fn gone(&self) -> Option<crate::error::GoneReason> {
        match self.state() {
            TopicState::Live => None,
            TopicState::Removed => Some(crate::error::GoneReason::Removed),
            TopicState::Stopped => Some(crate::error::GoneReason::Stopped),
        }
    }

    /// Ends the topic.
    pub fn end(&self, state: TopicState) {
        // Release: R-STATE pairs with A-STATE (state).
        self.state.0.store(state as u32, Ordering::Release);
    }

    /// Leaves a checkpoint. `slot` is the caller's own: it is the only writer.
    pub fn store_checkpoint(&self, slot: u32, place: Place) {
        let own =
            if slot == COORDINATOR { &self.own_checkpoint } else { &self.checkpoints[slot as usize % CHECKPOINTS] };
        let pairs = &own.pairs;
        // Relaxed: only we write these. The older pair goes; a pair half-written by a dead predecessor goes first.
        let at = |i: usize| pairs[i].position.load(Ordering::Relaxed).wrapping_add(1);
        let pair = &pairs[usize::from(at(1) < at(0))];
        // Release ×3, in this order: R-CHECKPOINT pairs with A-CHECKPOINT (Checkpoint::newest): who sees the new
        // sequence sees the position change to NO_CHECKPOINT or further, and who sees that sees the other pair.
        pair.position.store(NO_CHECKPOINT, Ordering::Release);
        pair.sequence.store(place.sequence, Ordering::Release);
        pair.position.store(place.position, Ordering::Release);
    }

    /// The newest checkpoint of one slot's owner. All below it is committed.
    pub(crate) fn checkpoint(&self, slot: u32) -> Option<Place> {
        self.checkpoints[slot as usize % CHECKPOINTS].newest()
    }

    /// The newest checkpoint of any publisher: never below the floor as it was before the call (I-5).
    pub fn newest_checkpoint(&self) -> Option<Place> {
        let all = self.checkpoints.iter().chain([&self.own_checkpoint]);
        all.filter_map(Checkpoint::newest).max_by_key(|place| place.position)
    }

    /// Puts a tenancy in force, before its publisher learns its index.
    pub fn begin_tenancy(&self, index: u32, first_position: u64, publisher: u64, first_number: u64) {
        let tenancy = &self.tenancies[index as usize % TENANCIES];
        // Relaxed: the Release stores below order it.
        tenancy.first_position.store(NO_POSITION, Ordering::Relaxed);
        // Release ×3: R-TENANCY pairs with A-TENANCY (publisher_at): who sees one of the new values sees the position
        // change, and who sees the new position sees both.
        tenancy.publisher.store(publisher, Ordering::Release);
        tenancy.first_number.store(first_number, Ordering::Release);
        tenancy.first_position.store(first_position, Ordering::Release);
    }

    /// The line of a publisher slot.
    #[inline]
    pub fn note(&self, slot: u32) -> &Note {
        &self.notes[slot as usize % CHECKPOINTS]
    }

    /// Hands a publisher slot's line to a new owner with an identity, before it is answered.
    pub fn begin_note(&self, slot: u32, opening: u64, last: u64) {
        self.note(slot).begin(opening, last);
        // Release: R-IDENTITIES pairs with A-IDENTITIES (settle_notes).
        self.identities.0.fetch_or(1 << (slot as usize % CHECKPOINTS), Ordering::Release);
    }

    /// Decides every note pending below `floor`; `owns` tells whether the entry at a position is a slot's. To be called
    /// before the floor is raised, by who has walked to it or beyond.
    pub(crate) fn settle_notes(&self, floor: u64, owns: impl Fn(u32, u64) -> bool) {
        // Acquire: A-IDENTITIES pairs with R-IDENTITIES (begin_note). Who was answered after that store and has
        // committed below `floor` is seen: its swap (R-CLAIM) lies on the way of whoever walked past it.
        let mut slots = self.identities.0.load(Ordering::Acquire);
        while slots != 0 {
            let slot = slots.trailing_zeros();
            slots &= slots - 1;
            self.note(slot).settle(floor, |position| owns(slot, position));
        }
    }

    /// First position and first number of the tenancy at `index`, for the coordinator, which alone writes them.
    #[cfg(not(loom))]
    pub(crate) fn tenancy(&self, index: u32) -> (u64, u64) {
        let tenancy = &self.tenancies[index as usize % TENANCIES];
        // Relaxed: the coordinator wrote them, or was handed the memory by the one that did.
        (tenancy.first_position.load(Ordering::Relaxed), tenancy.first_number.load(Ordering::Relaxed))
    }

    /// Publisher and its number of the message at `position`; `None` where the tenancy's place has been used again.
    pub fn publisher_at(&self, index: u8, position: u64) -> Option<(u64, u64)> {
        let tenancy = &self.tenancies[index as usize % TENANCIES];
        // Acquire ×3: A-TENANCY pairs with R-TENANCY (begin_tenancy).
        let first = tenancy.first_position.load(Ordering::Acquire);
        let publisher = tenancy.publisher.load(Ordering::Acquire);
        let number = tenancy.first_number.load(Ordering::Acquire);
        // Relaxed: ordered after the loads above. A tenancy that begins meanwhile must not be mixed with this one.
        let unchanged = tenancy.first_position.load(Ordering::Relaxed) == first;
        (unchanged && position >= first).then(|| (publisher, number.wrapping_add(position - first)))
    }
}

impl Checkpoint {
    /// The newest pair that is whole. The older one is rewritten while the newer stands, but one after the other may be
    /// caught in the writing; so both are taken only when neither has moved. A dead writer's torn pair moves no more.
    fn newest(&self) -> Option<Place> {
        // Acquire: A-CHECKPOINT pairs with R-CHECKPOINT (store_checkpoint).
        let positions = || [0, 1].map(|i: usize| self.pairs[i].position.load(Ordering::Acquire));
        for _ in 0..CHECKPOINT_LOOKS {
            let before = positions();
            let sequences = [0, 1].map(|i: usize| self.pairs[i].sequence.load(Ordering::Acquire));
            if positions() == before {
                let places = [0, 1].map(|i| Place { position: before[i], sequence: sequences[i] });
                let whole = places.into_iter().filter(|place| place.position.max(place.sequence) < MAX_PLACE);
                return whole.max_by_key(|place| place.position);
            }
            pause();
        }
        None
    }
}

#[cfg(not(loom))]
const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(LogHeader, intent) == 128);
    assert!(offset_of!(LogHeader, floor) == 256);
    assert!(offset_of!(LogHeader, released) == 384);
    assert!(offset_of!(LogHeader, checkpoints) == 512);
    assert!(offset_of!(LogHeader, tenancies) == 4608);
    assert!(offset_of!(LogHeader, notes) == 12_800);
    assert!(offset_of!(LogHeader, own_checkpoint) == 16_896);
    assert!(offset_of!(LogHeader, identities) == 16_960);
    assert!(size_of::<LogHeader>() <= crate::shm::layout::RING_OFFSET as usize);
};

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_place_that_is_slow_to_look_at_is_looked_at_for_a_limited_time_of_our_own() {
        let (mut position, mut looks) = (0, 0);
        let moving = || {
            position += 1;
            position
        };
        let found = find_place(moving, |_, _| {
            let start = clock::thread_time();
            while clock::thread_time() - start < PLACE_PATIENCE {}
            looks += 1;
            None::<()>
        });
        assert_eq!((found, looks), (None, 1));
    }

    #[test]
    fn who_sleeps_between_two_looks_looks_again() {
        let start = Instant::now();
        let found = find_place(
            || start.elapsed().as_nanos() as u64,
            |_, _| {
                std::thread::sleep(PLACE_PATIENCE);
                (start.elapsed() > 4 * PLACE_PATIENCE).then_some(())
            },
        );
        assert_eq!(found, Some(()));
    }

    #[test]
    fn what_is_done_aside_takes_no_time_of_a_search() {
        let mut position = 0;
        let moving = || {
            position += 1;
            position
        };
        let long = || {
            let start = clock::thread_time();
            while clock::thread_time() - start < 2 * PLACE_PATIENCE {}
        };
        let found = find_place(moving, |position, patience| {
            patience.aside(long);
            (position == 4).then_some(())
        });
        assert_eq!(found, Some(()));
    }
}
