//! [`Shared`]: a view into memory that somebody keeps alive.

// `pub` below means: visible to the loom models (`crate::model`), not to users.
#![allow(unreachable_pub)]

use std::any::Any;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

/// A reference to `T` together with the owner of the memory it lies in: a mapped segment in production, a heap
/// allocation in tests and models. `T` consists of atomics only, so it may be shared with other processes (I-11).
pub struct Shared<T: ?Sized + 'static> {
    target: NonNull<T>,
    keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a `Shared` is a `&T` with a keep-alive, and `&T` is Send and Sync where T is Sync.
unsafe impl<T: ?Sized + Sync> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: ?Sized + Sync> Sync for Shared<T> {}

impl<T: ?Sized> Shared<T> {
    /// A view of `target`, which lies in memory that `keep` owns.
    ///
    /// # Safety
    /// `target` must be aligned, initialised and stay valid for `T` as long as `keep` lives, and `T` must tolerate
    /// writes by other processes: atomics only.
    #[cfg(not(loom))]
    pub(crate) unsafe fn new(target: NonNull<T>, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Shared { target, keep }
    }

    /// A view of what lies in the memory of this process alone.
    #[cfg(not(loom))]
    pub(crate) fn of(owner: Arc<T>) -> Self
    where
        T: Sized + Send + Sync,
    {
        Shared { target: NonNull::from(&*owner), keep: owner }
    }

    /// A view of a part of the target, which keeps the same memory alive.
    pub(crate) fn part<U: ?Sized>(&self, choose: impl for<'a> FnOnce(&'a T) -> &'a U) -> Shared<U> {
        // What `choose` returns for every lifetime lies in the target, or lives for ever.
        Shared { target: NonNull::from(choose(self)), keep: self.keep.clone() }
    }

    /// Whether both are views of the same place.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        std::ptr::addr_eq(self.target.as_ptr(), other.target.as_ptr())
    }

    /// A heap allocation, shared between threads (models).
    #[cfg(loom)]
    pub fn heap(value: Box<T>) -> Self
    where
        T: Sync + Send,
    {
        let owner = HeapBox(NonNull::from(Box::leak(value)));
        Shared { target: owner.0, keep: Arc::new(owner) }
    }
}

#[cfg(all(test, not(loom)))]
impl<T: Send + Sync> Shared<[T]> {
    /// `count` zeroed `T`s in memory of this process alone. `T` is made of atomics only, as everywhere here.
    pub(crate) fn zeroed(count: usize) -> Self {
        let map = memmap2::MmapRaw::from(memmap2::MmapMut::map_anon(count * size_of::<T>()).expect("memory"));
        let first = NonNull::new(map.as_mut_ptr().cast::<T>()).expect("a mapping is not at 0");
        // SAFETY: page-aligned, as long as `count` of them, zeroed, and kept by the mapping; atomics only.
        unsafe { Shared::new(NonNull::slice_from_raw_parts(first, count), Arc::new(map)) }
    }
}

impl<T: ?Sized> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Shared { target: self.target, keep: self.keep.clone() }
    }
}

impl<T: ?Sized> Deref for Shared<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: I-11: `keep` owns the memory and lives as long as this view.
        unsafe { self.target.as_ref() }
    }
}

#[cfg(loom)]
/// Frees a leaked box; not a `Box` because that would claim sole access while views exist.
struct HeapBox<T: ?Sized>(NonNull<T>);

#[cfg(loom)]
// SAFETY: owns a `T` that is Send and Sync (required by `Shared::heap`).
unsafe impl<T: ?Sized> Send for HeapBox<T> {}
#[cfg(loom)]
// SAFETY: as above.
unsafe impl<T: ?Sized> Sync for HeapBox<T> {}

#[cfg(loom)]
impl<T: ?Sized> Drop for HeapBox<T> {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Box::leak` and every view that used it is gone.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}
