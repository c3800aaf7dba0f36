//! The notice: how the coordinator tells the sleeping owner of a wildcard subscription that topics have come
//! (ARCHITECTURE.md §3.6).

use crate::ring::doorbell::Doorbell;
use crate::sync::{AtomicU64, Ordering};

/// What a notice segment holds. Zeroed memory is one that says nothing.
#[repr(C)]
pub(crate) struct Notice {
    /// The subscription's owner sleeps here, the coordinator rings.
    pub(crate) bell: Doorbell,
    count: Count,
}

#[repr(C, align(128))]
struct Count {
    /// How many topics have been opened for the subscription since it exists.
    opened: AtomicU64,
    /// 1: the bus was stopped.
    ended: AtomicU64,
}

impl Notice {
    /// Says how many topics there have been, after their descriptors were sent. For the coordinator.
    pub(crate) fn tell(&self, opened: u64) {
        // Release: R-NOTICE pairs with A-NOTICE (opened): the descriptors lie in the reader's socket by then.
        self.count.opened.store(opened, Ordering::Release);
        if !self.bell.is_quiet() {
            self.bell.ring();
        }
    }

    /// How many topics there have been.
    #[inline]
    pub(crate) fn opened(&self) -> u64 {
        // Acquire: A-NOTICE pairs with R-NOTICE (tell).
        self.count.opened.load(Ordering::Acquire)
    }

    /// Says that the bus was stopped, and wakes the reader.
    pub(crate) fn end(&self) {
        // Relaxed: R-ATTENTION, in the bell, comes behind it.
        self.count.ended.store(1, Ordering::Relaxed);
        self.bell.call_attention();
    }

    /// Whether the bus was stopped.
    pub(crate) fn has_ended(&self) -> bool {
        self.bell.wants_attention() && self.count.ended.load(Ordering::Relaxed) != 0
    }
}

const _: () = assert!(size_of::<Notice>() == 256);
