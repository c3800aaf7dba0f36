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
        /// A word outside shared memory.
        pub(crate) fn new() -> Self {
            FutexWord(AtomicU32::new(0))
        }

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

        /// Clears `bits` and wakes everyone who sleeps on the word, in one step: nobody can be stopped in between.
        pub(crate) fn clear_and_wake_all(&self, bits: u32) {
            crate::os::futex::clear_and_wake_all(&self.0, bits);
        }
    }

    /// Sleeps while every word is what is expected of it, until one is woken or `limit` has passed. May wake for no reason.
    pub(crate) fn wait_any(words: &[(&FutexWord, u32)], limit: Duration) {
        let words: Vec<(&AtomicU32, u32)> = words.iter().map(|(word, expected)| (&word.0, *expected)).collect();
        crate::os::futex::wait_any(&words, limit);
    }
}

#[cfg(loom)]
mod model {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    use std::sync::Arc;
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
        /// Those who sleep on several words; the others wait at `woken`.
        queue: loom::sync::Mutex<Vec<Arc<Sleeper>>>,
        woken: loom::sync::Condvar,
    }

    /// One who sleeps on several words.
    struct Sleeper {
        woken: loom::sync::Mutex<bool>,
        wake: loom::sync::Condvar,
    }

    impl FutexWord {
        pub(crate) fn new() -> Self {
            // Here, while there is one thread: whoever comes to a lazy static later synchronizes with who made it.
            FENCES.store(0, Ordering::Relaxed);
            FutexWord {
                word: AtomicU32::new(0),
                queue: loom::sync::Mutex::new(Vec::new()),
                woken: loom::sync::Condvar::new(),
            }
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
            self.clear_and_wake_all(0);
        }

        /// As the kernel's `FUTEX_WAKE_OP`: the word changes and the queue is emptied in one step with respect to who compares and
        /// sleeps.
        pub(crate) fn clear_and_wake_all(&self, bits: u32) {
            let mut queue = self.queue.lock().unwrap();
            if bits != 0 {
                self.word.fetch_and(!bits, Ordering::Relaxed);
            }
            for sleeper in std::mem::take(&mut *queue) {
                *sleeper.woken.lock().unwrap() = true;
                sleeper.wake.notify_all();
            }
            self.woken.notify_all();
        }
    }

    /// As the kernel's `futex_waitv`: for each word compare and queue are one step with respect to its wake; a word that
    /// differs ends the wait, and so does a wake that came between two of them.
    pub(crate) fn wait_any(words: &[(&FutexWord, u32)], _limit: Duration) {
        let sleeper = Sleeper { woken: loom::sync::Mutex::new(false), wake: loom::sync::Condvar::new() };
        let sleeper = Arc::new(sleeper);
        for (word, expected) in words {
            let mut queue = word.queue.lock().unwrap();
            if word.word.load(Ordering::Relaxed) != *expected {
                return;
            }
            queue.push(sleeper.clone());
        }
        let mut woken = sleeper.woken.lock().unwrap();
        while !*woken {
            woken = sleeper.wake.wait(woken).unwrap();
        }
    }
}
