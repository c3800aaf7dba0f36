//! Arenas: payload memory that one publisher writes, and the publisher's private account of what in it is still
//! referenced by the ring.

use std::collections::VecDeque;

use crate::ring::bytes::{load_bytes, store_bytes};
use crate::shm::layout::ARENA_ALIGN;
use crate::shm::shared::Shared;
use crate::sync::{AtomicU64, Ordering};

/// A payload's place in an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Span {
    /// One word: `offset / 64` in the high half, length in the low one.
    pub(crate) fn pack(self) -> u64 {
        (self.offset / ARENA_ALIGN) << 32 | self.len
    }

    pub(crate) fn unpack(word: u64) -> Self {
        Span { offset: (word >> 32) * ARENA_ALIGN, len: word & u64::from(u32::MAX) }
    }
}

/// An arena's memory.
#[derive(Clone)]
pub struct Arena {
    words: Shared<[AtomicU64]>,
}

impl Arena {
    /// An arena over these words.
    pub fn new(words: Shared<[AtomicU64]>) -> Self {
        Arena { words }
    }

    /// Length in bytes.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// Whether `span` lies inside (I-8).
    #[inline]
    pub(crate) fn contains(&self, span: Span) -> bool {
        span.offset.checked_add(span.len).is_some_and(|end| end <= self.len_bytes())
    }

    /// Copies `bytes` in at `offset` (a multiple of 8; the last word is padded).
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        store_bytes(&self.words[(offset / 8) as usize..], bytes);
    }

    /// Copies out from `offset` (a multiple of 8).
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        load_bytes(&self.words[(offset / 8) as usize..], bytes);
    }

    /// Stores one word at byte `offset` (a multiple of 8).
    #[inline]
    pub(crate) fn store(&self, offset: u64, value: u64) {
        self.words[(offset / 8) as usize].store(value, Ordering::Relaxed);
    }

    /// Loads one word from byte `offset` (a multiple of 8).
    #[inline]
    pub(crate) fn load(&self, offset: u64) -> u64 {
        self.words[(offset / 8) as usize].load(Ordering::Relaxed)
    }

    /// Where `span`'s bytes lie in this process. The caller has checked [`Self::contains`].
    #[cfg(not(loom))]
    pub(crate) fn pointer(&self, span: Span) -> *mut u8 {
        let words = &self.words[(span.offset / 8) as usize..];
        words.as_ptr().cast_mut().cast::<u8>()
    }
}

/// The publisher's private account of its arena: a ring of live allocations in publishing order.
pub(crate) struct Allocator {
    len: u64,
    head: u64,
    live: VecDeque<Live>,
}

/// An allocation the log refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Live {
    /// The position whose commit word refers to it.
    pub(crate) position: u64,
    pub(crate) offset: u64,
    pub(crate) end: u64,
}

impl Allocator {
    /// An account of an arena of `len` bytes. `live` are the records already in it, in the order of positions; the
    /// log is the truth about them.
    pub(crate) fn new(len: u64, live: VecDeque<Live>) -> Self {
        let head = live.back().map_or(0, |last| last.end);
        Allocator { len, head, live }
    }

    /// A free range of `bytes`, aligned to `align`; `None` where live ones are in the way.
    pub(crate) fn find(&self, bytes: u64, align: u64) -> Option<u64> {
        self.find_before(self.live.front(), bytes, align)
    }

    /// The same, if `oldest` were the oldest live range.
    fn find_before(&self, oldest: Option<&Live>, bytes: u64, align: u64) -> Option<u64> {
        let at = self.head.next_multiple_of(align);
        let Some(oldest) = oldest else {
            let at = if at + bytes <= self.len { at } else { 0 };
            return (at + bytes <= self.len).then_some(at);
        };
        if self.head > oldest.offset {
            if at + bytes <= self.len {
                return Some(at);
            }
            return (bytes <= oldest.offset).then_some(0);
        }
        (at + bytes <= oldest.offset).then_some(at)
    }

    /// Notes that the log refers to a range from `find` at `position`.
    pub(crate) fn commit(&mut self, position: u64, offset: u64, bytes: u64) {
        self.head = offset + bytes;
        self.live.push_back(Live { position, offset, end: offset + bytes });
    }

    /// Forgets what lies below `floor`.
    pub(crate) fn reclaim(&mut self, floor: u64) {
        while self.live.front().is_some_and(|live| live.position < floor) {
            self.live.pop_front();
        }
    }

    /// The lowest floor at which `bytes` would fit; `None` where they never do.
    pub(crate) fn floor_for(&self, bytes: u64, align: u64) -> Option<u64> {
        let fits = |kept: usize| self.find_before(self.live.get(kept), bytes, align).is_some();
        let dropped = (0..=self.live.len()).find(|dropped| fits(*dropped))?;
        Some(dropped.checked_sub(1).map_or(0, |last| self.live[last].position + 1))
    }

    /// How many ranges are live.
    pub(crate) fn live(&self) -> u64 {
        self.live.len() as u64
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_overlap_and_space_comes_back() {
        let mut arena = Allocator::new(1024, VecDeque::new());
        for position in 0..10_000u64 {
            let bytes = 1 + position * 37 % 500;
            if arena.find(bytes, 64).is_none() {
                let floor = arena.floor_for(bytes, 64).expect("smaller than the arena");
                assert!(floor <= position, "floor {floor} beyond the tail {position}");
                arena.reclaim(floor);
            }
            let offset = arena.find(bytes, 64).expect("floor_for promised room");
            assert!(offset.is_multiple_of(64) && offset + bytes <= 1024);
            for live in &arena.live {
                assert!(offset + bytes <= live.offset || live.end <= offset, "{live:?} against {offset}+{bytes}");
            }
            arena.commit(position, offset, bytes);
        }
        assert_eq!(arena.floor_for(1025, 64), None);
        assert_eq!(arena.floor_for(1024, 64), Some(10_000));
    }
}
