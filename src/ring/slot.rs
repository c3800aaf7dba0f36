//! Slots: one commit word and a small payload in one piece of a cache line (ARCHITECTURE.md §3.2).
//!
//! ```text
//! 63 ............ 16   15 ........ 8   7 .. 6   5 ..... 0
//! position (low 48)    tenancy index   kind     inline length
//! ```

use crate::ring::arena::Span;
use crate::ring::bytes::{load_bytes, store_bytes};
use crate::shm::shared::Shared;
use crate::sync::{AtomicU64, Ordering};

/// Bytes of the longest inline payload.
pub(crate) const MAX_INLINE_BYTES: usize = 56;

const POSITION_SHIFT: u32 = 16;
const TENANCY_SHIFT: u32 = 8;
const KIND_SHIFT: u32 = 6;
const LENGTH_MASK: u64 = 0x3f;

/// A slot with room for `W` payload words: `Slot<7>` is a cache line, `Slot<1>` a quarter of one.
#[repr(C)]
pub struct Slot<const W: usize> {
    pub(crate) word: AtomicU64,
    payload: [AtomicU64; W],
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Empty = 0,
    Inline = 1,
    Arena = 2,
    Hole = 3,
}

/// A commit word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(pub(crate) u64);

impl Word {
    /// The word that commits `position`.
    #[inline]
    pub(crate) fn new(position: u64, tenancy: u8, kind: Kind, length: usize) -> Self {
        let length = length as u64 & LENGTH_MASK;
        let tenancy = u64::from(tenancy) << TENANCY_SHIFT;
        Word(position << POSITION_SHIFT | tenancy | (kind as u64) << KIND_SHIFT | length)
    }

    /// Whether this word commits `position`.
    #[inline]
    pub(crate) fn commits(self, position: u64) -> bool {
        self.0 >> POSITION_SHIFT == position & (u64::MAX >> POSITION_SHIFT) && self.kind() != Kind::Empty
    }

    #[inline]
    pub(crate) fn kind(self) -> Kind {
        match self.0 >> KIND_SHIFT & 3 {
            0 => Kind::Empty,
            1 => Kind::Inline,
            2 => Kind::Arena,
            _ => Kind::Hole,
        }
    }

    /// Inline length in bytes; up to 63, so check it against the slot.
    #[inline]
    pub(crate) fn length(self) -> usize {
        (self.0 & LENGTH_MASK) as usize
    }

    #[inline]
    pub(crate) fn tenancy(self) -> u8 {
        (self.0 >> TENANCY_SHIFT) as u8
    }

    /// How far this word's position lies from `position`, modularly: negative where it is of an earlier lap.
    pub(crate) fn distance_from(self, position: u64) -> i64 {
        ((self.0 >> POSITION_SHIFT << POSITION_SHIFT).wrapping_sub(position << POSITION_SHIFT) as i64) >> POSITION_SHIFT
    }
}

/// What a message to be published is made of.
#[derive(Clone, Copy)]
pub(crate) enum Body<'a> {
    /// Travels in the slot.
    Inline(&'a [u8]),
    /// Lies in the arena.
    Span(Span),
}

impl Body<'_> {
    /// The word that commits it at `position`.
    #[inline]
    pub(crate) fn word(self, position: u64, tenancy: u8) -> Word {
        match self {
            Body::Inline(bytes) => Word::new(position, tenancy, Kind::Inline, bytes.len()),
            Body::Span(_) => Word::new(position, tenancy, Kind::Arena, 0),
        }
    }
}

impl<const W: usize> Slot<W> {
    /// Bytes of payload that fit.
    pub(crate) const INLINE_BYTES: usize = W * 8;

    /// A zeroed slot outside shared memory.
    #[cfg(loom)]
    pub fn new() -> Self {
        Slot { word: AtomicU64::new(0), payload: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// Stores a payload of at most `INLINE_BYTES`, or where it lies; the commit follows in a store of its own.
    #[inline]
    pub(crate) fn fill(&self, body: Body<'_>) {
        match body {
            Body::Inline(bytes) => store_bytes(&self.payload, bytes),
            Body::Span(span) => self.payload[0].store(span.pack(), Ordering::Relaxed),
        }
    }

    /// Copies the payload's first bytes out. Whole where the slot was not written meanwhile.
    #[inline]
    pub(crate) fn read(&self, bytes: &mut [u8]) {
        load_bytes(&self.payload, bytes);
    }

    /// The payload's first word.
    #[cfg(loom)]
    pub(crate) fn first_word(&self) -> u64 {
        self.payload[0].load(Ordering::Relaxed)
    }

    /// Where the payload lies in this process.
    #[cfg(not(loom))]
    #[inline]
    pub(crate) fn pointer(&self) -> *const u8 {
        self.payload.as_ptr().cast()
    }

    /// The reference to an arena payload; unchecked.
    pub(crate) fn read_span(&self) -> Span {
        Span::unpack(self.payload[0].load(Ordering::Relaxed))
    }
}

/// A power of two of slots, indexed by position.
pub struct Ring<S: 'static> {
    slots: Shared<[S]>,
    mask: u64,
}

impl<S> Clone for Ring<S> {
    fn clone(&self) -> Self {
        Ring { slots: self.slots.clone(), mask: self.mask }
    }
}

impl<S> Ring<S> {
    /// A ring over `slots`, whose number is a power of two.
    pub fn new(slots: Shared<[S]>) -> Self {
        assert!(slots.len().is_power_of_two(), "a ring's length is a power of two, found {}", slots.len());
        let mask = slots.len() as u64 - 1;
        Ring { slots, mask }
    }

    /// The slot of `position`.
    #[inline]
    pub(crate) fn at(&self, position: u64) -> &S {
        &self.slots[(position & self.mask) as usize]
    }

    /// Ring length.
    #[inline]
    pub(crate) fn len(&self) -> u64 {
        self.mask + 1
    }
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Slot<7>>() == 64);
    assert!(size_of::<Slot<1>>() == 16);
};

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn words_tell_their_position_kind_and_length() {
        let word = Word::new((1 << 48) + 7, 200, Kind::Inline, 56);
        assert!(word.commits(7) && word.commits((1 << 48) + 7) && !word.commits(8));
        assert_eq!((word.tenancy(), word.kind(), word.length()), (200, Kind::Inline, 56));
        assert_eq!(Word::new(5, 0, Kind::Hole, 0).distance_from(9), -4);
        assert_eq!(Word::new(1 << 48, 0, Kind::Hole, 0).distance_from((1 << 48) - 1), 1);
        assert!(!Word(0).commits(0), "a zeroed slot commits nothing");
    }
}
