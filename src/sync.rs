//! The one path to atomics, futexes and asymmetric barriers: the real ones, or loom's when the models run
//! (`--cfg loom`). The rings are written against this module only, so the code that loom checks is the code that ships.

#[cfg(not(loom))]
pub(crate) use real::*;

#[cfg(loom)]
pub(crate) use model::*;

#[cfg(not(loom))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    pub(crate) use crate::os::membarrier::{heavy_barrier, light_barrier};

    use std::time::Duration;

    /// One poll of a spin loop.
    #[inline]
    pub(crate) fn pause() {
        std::hint::spin_loop();
    }

    /// A 32-bit word in shared memory that processes sleep on.
    #[repr(transparent)]
    pub(crate) struct FutexWord(AtomicU32);

    impl FutexWord {
        /// The word itself.
        #[inline]
        pub(crate) fn word(&self) -> &AtomicU32 {
            &self.0
        }

        /// Sleeps while the word is `expected`, until woken or `limit` has passed. May wake for no reason.
        pub(crate) fn wait(&self, expected: u32, limit: Duration) {
            crate::os::futex::wait(&self.0, expected, limit);
        }

        /// Wakes everyone who sleeps on the word.
        pub(crate) fn wake_all(&self) {
            crate::os::futex::wake_all(&self.0);
        }
    }
}

#[cfg(loom)]
mod model {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    use std::time::Duration;

    loom::lazy_static! {
        /// Stored to before each fence, read by nobody.
        static ref FENCES: AtomicU64 = AtomicU64::new(0);
    }

    /// Loom runs a fence in one step with the access before it, and so never stops a thread between an announcement and
    /// the fence behind it. A store of its own gives the fence a step of its own; nobody reads it, so it orders nothing.
    pub(crate) fn fence(ordering: Ordering) {
        FENCES.store(0, Ordering::Relaxed);
        loom::sync::atomic::fence(ordering);
    }

    /// Under loom a spinning thread lets the others run.
    pub(crate) fn pause() {
        loom::thread::yield_now();
    }

    /// The kernel's membarrier runs a full barrier on every other thread; loom gets both halves as fences.
    pub(crate) fn heavy_barrier() -> bool {
        fence(Ordering::SeqCst);
        true
    }

    /// The other half of [`heavy_barrier`].
    pub(crate) fn light_barrier() {
        fence(Ordering::SeqCst);
    }

    /// A futex as the kernel defines it: compare and sleep are one step with respect to wake. The time limit is left
    /// out on purpose, so that a lost wake-up is a deadlock that loom reports.
    pub struct FutexWord {
        word: AtomicU32,
        queue: loom::sync::Mutex<()>,
        woken: loom::sync::Condvar,
    }

    impl FutexWord {
        pub(crate) fn new() -> Self {
            // Here, while there is one thread: whoever comes to a lazy static later synchronizes with who made it.
            FENCES.store(0, Ordering::Relaxed);
            FutexWord { word: AtomicU32::new(0), queue: loom::sync::Mutex::new(()), woken: loom::sync::Condvar::new() }
        }

        pub(crate) fn word(&self) -> &AtomicU32 {
            &self.word
        }

        pub(crate) fn wait(&self, expected: u32, _limit: Duration) {
            let queue = self.queue.lock().unwrap();
            if self.word.load(Ordering::Relaxed) == expected {
                drop(self.woken.wait(queue).unwrap());
            }
        }

        pub(crate) fn wake_all(&self) {
            drop(self.queue.lock().unwrap());
            self.woken.notify_all();
        }
    }
}
