//! Notes: which number a publisher with an identity committed last, decided for ever even if it dies between its commit and
//! learning of it (ARCHITECTURE.md §4.2).
//!
//! ```text
//! note word: 63 ............. 2   1 .. 0
//!            position             0 void · 1 pending · 2 committed
//! ```
//!
//! A line says one number at every instant: `number` where its note is committed, or pending at an entry that turns out to be
//! its owner's; `base` in all other cases. Its owner changes only what does not count at that moment.

use crate::sync::{AtomicU64, Ordering};

const STATE_BITS: u32 = 2;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;

const VOID: u64 = 0;
const PENDING: u64 = 1;
const COMMITTED: u64 = 2;

/// Looks at a line that its owner keeps changing. A fenced owner changes it a few times at most; the limit is for
/// garbage.
const LOOKS: usize = 1000;

/// One publisher slot's line. Zeroed memory is a line that nobody has opened.
#[repr(C, align(64))]
pub struct Note {
    note: AtomicU64,
    number: AtomicU64,
    base: AtomicU64,
    /// Which opening of a publisher the line speaks of; stored last by the coordinator.
    opening: AtomicU64,
    /// The newest opening of this slot that has been, or is about to be, fenced.
    fenced: AtomicU64,
}

fn word(position: u64, state: u64) -> u64 {
    position << STATE_BITS | state
}

impl Note {
    /// A line outside shared memory.
    #[cfg(loom)]
    pub fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Note { note: zero(), number: zero(), base: zero(), opening: zero(), fenced: zero() }
    }

    /// Hands the line to a new owner, whose identity's last number is `last`. For the coordinator, while the slot has no
    /// owner. Until the last store the line speaks of an earlier opening.
    pub fn begin(&self, opening: u64, last: u64) {
        // Release ×3: R-NOTE pairs with A-NOTE (last): who sees the opening sees what it begins with.
        self.note.store(word(0, VOID), Ordering::Release);
        self.base.store(last, Ordering::Release);
        self.opening.store(opening, Ordering::Release);
    }

    /// The owner is about to commit a batch that ends with `number`; `last` is what counts until then.
    #[inline]
    pub(crate) fn prepare(&self, at: u64, last: u64, number: u64) {
        // Release ×3, in this order: R-NOTE pairs with A-NOTE (last): who sees one of them sees those before, so each
        // number is in its place before the note makes it count. Crash points: each leaves `last`.
        self.base.store(last, Ordering::Release);
        self.put(word(at, VOID));
        self.number.store(number, Ordering::Release);
    }

    /// The owner is about to swap the entry at `position`.
    #[inline]
    pub(crate) fn pend(&self, position: u64) {
        // Release: R-NOTE pairs with A-NOTE (last, settle). The swap itself (R-CLAIM) shows it to whoever walks past.
        self.put(word(position, PENDING));
    }

    /// The owner's swap at `position` succeeded.
    #[inline]
    pub(crate) fn commit(&self, position: u64) {
        // Release: R-NOTE pairs with A-NOTE (last).
        self.put(word(position, COMMITTED));
    }

    /// Stores the owner's note.
    #[inline]
    fn put(&self, note: u64) {
        #[cfg(not(loom))]
        self.note.store(note, Ordering::Release);
        // What a compare-and-swap writes directly follows what it read, so a later store comes after both. Loom does not
        // know that, and lets the compare-and-swap of `settle` win over stores that come later.
        #[cfg(loom)]
        self.note.swap(note, Ordering::Release);
    }

    /// Decides a note that is pending below `floor`, before what lies there may be overwritten. `committed` looks at an
    /// entry: whether it is there and the owner's.
    pub(crate) fn settle(&self, floor: u64, committed: impl Fn(u64) -> bool) {
        // Acquire: A-NOTE pairs with R-NOTE (pend).
        let seen = self.note.load(Ordering::Acquire);
        let position = seen >> STATE_BITS;
        if seen & STATE_MASK != PENDING || position >= floor {
            return;
        }
        // An entry that has been overwritten was not the owner's: whoever raised the floor beyond it would have decided
        // so, and then the swap below fails.
        let state = if committed(position) { COMMITTED } else { VOID };
        // Release: R-NOTE pairs with A-NOTE (last). From exactly what was seen: the owner may have gone on. A
        // position is pending once for all times, so this is never another pending note.
        let _ = self.note.compare_exchange(seen, word(position, state), Ordering::Release, Ordering::Relaxed);
    }

    /// The number that `opening` committed last; `None` where the line does not speak of it. The owner is dead, has closed
    /// or is fenced, so it commits nothing any more.
    pub fn last(&self, opening: u64, committed: impl Fn(u64) -> bool) -> Option<u64> {
        // Acquire: A-NOTE pairs with R-NOTE (begin).
        if self.opening.load(Ordering::Acquire) != opening {
            return None;
        }
        for _ in 0..LOOKS {
            // Acquire ×3: A-NOTE pairs with R-NOTE (prepare, pend, commit, settle).
            let seen = self.note.load(Ordering::Acquire);
            let number = self.number.load(Ordering::Acquire);
            let base = self.base.load(Ordering::Acquire);
            let counts = match seen & STATE_MASK {
                PENDING => committed(seen >> STATE_BITS),
                state => state == COMMITTED,
            };
            // Relaxed: ordered after the loads above, and after the look at the entry, which is an Acquire: if it has been
            // overwritten, the note has been decided.
            if self.note.load(Ordering::Relaxed) == seen {
                return Some(if counts { number } else { base });
            }
        }
        None
    }

    /// Says that `opening` is being fenced, before the fence is committed.
    pub fn fence(&self, opening: u64) {
        // Release: R-FENCE pairs with A-FENCE (is_fenced).
        self.fenced.store(opening, Ordering::Release);
    }

    /// Whether `opening` has been or is about to be fenced. Every fence before a place that the caller has reached by walking
    /// or from a checkpoint is seen.
    pub fn is_fenced(&self, opening: u64) -> bool {
        // Acquire: A-FENCE pairs with R-FENCE (fence).
        opening != 0 && self.fenced.load(Ordering::Acquire) == opening
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn line() -> Note {
        // SAFETY: five atomic words; all bit patterns are valid.
        unsafe { std::mem::zeroed() }
    }

    #[test]
    fn a_death_after_any_step_leaves_one_number() {
        let line = line();
        assert_eq!(line.last(7, |_| true), None);
        line.begin(7, 10);
        let last = |committed: bool| line.last(7, move |_| committed);
        assert_eq!(last(true), Some(10));
        line.prepare(4, 10, 12);
        assert_eq!(last(true), Some(10));
        line.pend(4);
        assert_eq!((last(false), last(true)), (Some(10), Some(12)));
        line.pend(5);
        line.commit(5);
        assert_eq!(last(false), Some(12));
        line.prepare(6, 12, 13);
        assert_eq!(last(true), Some(12));
        assert_eq!(line.last(8, |_| true), None);
    }

    #[test]
    fn only_what_is_pending_below_the_floor_is_settled() {
        for (committed, expected) in [(true, 1), (false, 0)] {
            let line = line();
            line.begin(7, 0);
            line.prepare(3, 0, 1);
            line.pend(3);
            line.settle(3, |_| committed);
            assert_eq!(line.last(7, |_| !committed), Some(1 - expected), "still pending");
            line.settle(4, |_| committed);
            assert_eq!(line.last(7, |_| !committed), Some(expected));
        }
    }
}
