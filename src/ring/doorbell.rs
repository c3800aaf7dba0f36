//! The doorbell: an eventcount between whoever stores something and whoever sleeps until something is stored.
//!
//! ```text
//! word:  31 ............ 2   1           0
//!        epoch               attention   somebody waits
//! ```
//!
//! The sleeper writes, then looks; so does the ringer:
//!
//! ```text
//! sleeper: set WAITING ── heavy barrier ── look again ── futex wait (value unchanged)
//! ringer:  store       ── light barrier ── WAITING? ── next epoch ── clear WAITING and wake, in one system call
//! ```
//!
//! The barriers make it impossible that both miss the other's store (I-7). A sleeper that dies leaves WAITING set:
//! the next ringer clears it with one needless wake.
//!
//! WAITING is cleared by the kernel, in one step with the wake: a ringer that is stopped, or loses its processor, anywhere before
//! that leaves it set, and the next one rings in its place. The epoch comes first, for who is armed and not asleep. Who arms between
//! the two has the new epoch and loses WAITING all the same, and nobody rings for him any more; so whoever sets WAITING where it was
//! cleared begins a new epoch, too: set again by another sleeper, WAITING alone would be the old word, and he would sleep on it.
//!
//! One sleeper may wait at several doorbells: it sets WAITING on all of them, needs one barrier behind the last, looks
//! again at everything, and sleeps on all words at once. For each of the ringers that is the protocol above: between the
//! setting of *its* bit and the look at *its* store lies a full barrier. The kernel compares every word before the sleep,
//! so a ring at any of them after the arming prevents it. Where WAITING stays set at the bells that did not wake the
//! sleeper, their next ringers clear it with one needless wake each.
//!
//! Who may not sleep (a task, a foreign event loop) arms and looks, and leaves the sleep to another thread: it hands over the
//! value that each word had when it was armed. Whoever rings after that changes the word, so the other thread does not fall
//! asleep, or wakes, however late it comes to it: what was said of one thread's arming and sleep holds for two.

use std::ops::Deref;
use std::time::Duration;

use crate::sync::{FutexWord, Ordering, heavy_barrier, light_barrier, wait_any};

const WAITING: u32 = 1;
const ATTENTION: u32 = 2;
const EPOCH: u32 = 4;

/// Longest sleep in one go: belt and braces against garbled words, never needed for correctness.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// Longest sleep where the kernel gives no membarrier and a wake-up could be missed.
const LONGEST_SLEEP_UNSURE: Duration = Duration::from_millis(1);

/// See the module's documentation. Zeroed memory is a doorbell nobody waits on.
#[repr(C, align(128))]
pub struct Doorbell {
    futex: FutexWord,
}

/// Proof that WAITING was set; says what to sleep on.
pub struct Armed {
    value: u32,
    longest: Duration,
}

/// The same for several doorbells.
pub struct ArmedAll {
    values: Vec<u32>,
    longest: Duration,
}

/// Announces a sleeper at all of `bells`. Look again at everything after this, then [`sleep_any`].
pub fn arm_all<B: Deref<Target = Doorbell>>(bells: &[B]) -> ArmedAll {
    let values = bells.iter().map(|bell| bell.announce()).collect();
    let longest = longest_sleep(heavy_barrier());
    ArmedAll { values, longest }
}

/// Sleeps until one of `bells`, which must be those that were armed, is rung, for at most `limit`. May return for no reason.
pub fn sleep_any<B: Deref<Target = Doorbell>>(bells: &[B], armed: ArmedAll, limit: Option<Duration>) {
    let words: Vec<(&FutexWord, u32)> = bells.iter().map(|bell| &bell.futex).zip(armed.values).collect();
    wait_any(&words, limit.map_or(armed.longest, |limit| limit.min(armed.longest)));
}

impl ArmedAll {
    /// For a thread that sleeps in the place of the one that armed: the value to sleep on at each bell, in their order, and how
    /// long to sleep at most before somebody looks again.
    pub fn hand_over(self) -> (Vec<u32>, Duration) {
        (self.values, self.longest)
    }
}

/// Sleeps until one of `bells` has been rung since it had the value beside it, or `hatch` is called, for at most `limit`. May
/// return for no reason. Where the kernel cannot sleep on so many words it returns soon.
pub fn sleep_in_place_of_others(hatch: &Hatch, bells: &[(&Doorbell, u32)], limit: Duration) {
    let bells = bells.iter().map(|(bell, armed)| (&bell.futex, *armed));
    let words: Vec<(&FutexWord, u32)> = std::iter::once((&hatch.called, 0)).chain(bells).collect();
    wait_any(&words, limit);
}

/// What calls a thread away from [`sleep_in_place_of_others`]: somebody has left something for it to see.
pub struct Hatch {
    /// 1: called.
    called: FutexWord,
}

impl Hatch {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Hatch { called: FutexWord::new() }
    }

    /// Calls the thread, which will not sleep before it has looked again. After having left what there is to see.
    pub fn call(&self) {
        // Release: R-HATCH pairs with A-HATCH (answer). Who finds it called already needs no wake: the thread is awake, or its
        // sleep is over, until it has answered.
        if self.called.word().swap(1, Ordering::Release) == 0 {
            self.called.wake_all();
        }
    }

    /// Takes note of all calls so far. For the thread, before it looks at what was left.
    pub fn answer(&self) {
        // Acquire: A-HATCH pairs with R-HATCH (call): what was left before is seen by the look that follows.
        self.called.word().swap(0, Ordering::Acquire);
    }
}

fn longest_sleep(sure: bool) -> Duration {
    if sure { LONGEST_SLEEP } else { LONGEST_SLEEP_UNSURE }
}

impl Doorbell {
    /// A doorbell outside shared memory.
    pub fn new() -> Self {
        Doorbell { futex: FutexWord::new() }
    }

    /// Tells whether the ringer may go on without looking closer. For the ringer, right after its store.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        light_barrier();
        // Relaxed: I-7 orders this load after the ringer's store; the value itself carries nothing.
        self.futex.word().load(Ordering::Relaxed) & (WAITING | ATTENTION) == 0
    }

    /// Tells whether somebody waits, without ordering anything: a hint that it is time to release space.
    #[inline]
    pub(crate) fn is_waited_on(&self) -> bool {
        // Relaxed: a hint.
        self.futex.word().load(Ordering::Relaxed) & WAITING != 0
    }

    /// Tells whether the handle should look at the topic's state.
    pub fn wants_attention(&self) -> bool {
        // Acquire: A-ATTENTION pairs with R-ATTENTION (call_attention): the state is visible then.
        self.futex.word().load(Ordering::Acquire) & ATTENTION != 0
    }

    /// Wakes all sleepers, if there are any. For the ringer, after [`Self::is_quiet`] said no.
    #[cold]
    pub fn ring(&self) {
        if self.begin_ring() {
            self.futex.clear_and_wake_all(WAITING);
        }
    }

    /// Whether somebody is to be woken, who does not fall asleep any more from here on.
    fn begin_ring(&self) -> bool {
        let word = self.futex.word();
        // Relaxed: the barriers of I-7 do the ordering; the epoch only has to change.
        let is_waited_on = word.load(Ordering::Relaxed) & WAITING != 0;
        if is_waited_on {
            word.fetch_add(EPOCH, Ordering::Relaxed);
        }
        is_waited_on
    }

    /// A ringer that is stopped before it wakes anybody.
    #[cfg(loom)]
    pub fn stop_amid_ring(&self) {
        self.begin_ring();
    }

    /// Wakes all sleepers in the place of a ringer that died before it did. For the coordinator, after a death.
    #[cfg(not(loom))]
    pub(crate) fn ring_again(&self) {
        // Relaxed: what the dead one stored came before its death was proven; the epoch only has to change, for who is
        // about to sleep.
        self.futex.word().fetch_add(EPOCH, Ordering::Relaxed);
        self.futex.wake_all();
    }

    /// Asks the other side to look sooner than it otherwise would, without sleeping.
    #[cfg(not(loom))]
    pub(crate) fn urge(&self) {
        // As a sleeper would: others may be armed.
        self.announce();
    }

    /// Whether it was rung since its word had this value.
    pub fn was_rung_since(&self, armed: u32) -> bool {
        // Relaxed: whoever is woken because of it arms again before the look that counts (I-7).
        self.futex.word().load(Ordering::Relaxed) != armed
    }

    /// Announces a sleeper. Look again after this, then [`Self::sleep`].
    pub fn arm(&self) -> Armed {
        let value = self.announce();
        Armed { value, longest: longest_sleep(heavy_barrier()) }
    }

    /// Sets WAITING, with the next epoch where it was not set; says what to sleep on. Before a sleep, a heavy barrier must follow.
    fn announce(&self) -> u32 {
        let word = self.futex.word();
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            let epoch = if seen & WAITING == 0 { EPOCH } else { 0 };
            let armed = seen.wrapping_add(epoch) | WAITING;
            // Relaxed: the barriers of I-7 do the ordering.
            match word.compare_exchange_weak(seen, armed, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return armed,
                Err(now) => seen = now,
            }
        }
    }

    /// Sleeps until rung, for at most `limit`. May return for no reason.
    pub fn sleep(&self, armed: Armed, limit: Option<Duration>) {
        let limit = limit.map_or(armed.longest, |limit| limit.min(armed.longest));
        self.futex.wait(armed.value, limit);
    }

    /// Sets the attention bit for good and wakes everyone. For the coordinator, after it stored the new state.
    pub fn call_attention(&self) {
        // Release: R-ATTENTION pairs with A-ATTENTION (wants_attention).
        let word = self.futex.word();
        word.fetch_or(ATTENTION, Ordering::Release);
        word.fetch_add(EPOCH, Ordering::Relaxed);
        self.futex.wake_all();
    }
}
