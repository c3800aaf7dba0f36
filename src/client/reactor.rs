//! Threads that sleep in the place of those who may not: tasks of an executor, and foreign event loops (ARCHITECTURE.md §4.5).
//!
//! Who waits arms its doorbells, looks again, and leaves them here with the values they had then. A thread sleeps on them and
//! calls the waker when one has been rung: no ringer knows, or pays for it. Between two rings the waker is also called now and
//! then, as every sleeper of this crate looks now and then; that costs a look and nothing else, since the bells stay armed.
//!
//! There is a thread for each 127 doorbells, because the kernel sleeps on 128 words at a time and one of them calls the thread
//! away. It starts with the first one and ends a second after the last. A forked child has no such threads and begins anew.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::thread;
use std::time::{Duration, Instant};

use crate::client::control::lock;
use crate::os::futex::MOST_WORDS;
use crate::os::home::Home;
use crate::os::process;
use crate::ring::doorbell::{ArmedAll, Doorbell, Hatch, sleep_in_place_of_others};
use crate::shm::shared::Shared;

/// Bells of one thread; its hatch is the last word.
const MOST_BELLS: usize = MOST_WORDS - 1;

/// How long a thread with nothing to sleep on waits for more before it ends.
const LINGER: Duration = Duration::from_secs(1);

/// The threads of this process; its parent's, of no use, in a child that has not waited for anything yet.
static CURRENT: AtomicPtr<Reactor> = AtomicPtr::new(ptr::null_mut());

/// All sleeping threads of a process.
struct Reactor {
    home: Home,
    sleepers: Mutex<Vec<Arc<Sleeper>>>,
}

/// One thread, or the place for one.
struct Sleeper {
    hatch: Hatch,
    inbox: Mutex<Inbox>,
    /// How many bells it has been given and has not let go of.
    load: AtomicUsize,
}

/// What a thread has not seen yet.
#[derive(Default)]
struct Inbox {
    watches: Vec<Watch>,
    /// Whether there is a thread.
    is_served: bool,
}

/// A bell to sleep on. The thread owns it while it sleeps, so the mapping outlives the sleep whatever becomes of the handle.
struct Watch {
    bell: Shared<Doorbell>,
    armed: u32,
    call: Arc<Call>,
}

/// Whom to call, once.
struct Call {
    state: Mutex<CallState>,
}

struct CallState {
    /// `None`: it has been called for a ring, or does not want to be any more. Shared, because cloning a waker runs the program's
    /// code, which must not happen under the lock.
    waker: Option<Arc<Waker>>,
    /// Called to look for itself so often, and next at this moment.
    interval: Duration,
    due: Instant,
}

/// Somebody waiting; dropping it ends that.
pub(super) struct Registration {
    home: Home,
    bells: Vec<Shared<Doorbell>>,
    /// Most time between two looks that the bells allow.
    longest: Duration,
    call: Arc<Call>,
    sleepers: Vec<Arc<Sleeper>>,
}

impl Reactor {
    /// This process's.
    fn here() -> io::Result<&'static Reactor> {
        // Acquire: A-REACTOR pairs with R-REACTOR below: it was made before it was made known.
        let known = CURRENT.load(Ordering::Acquire);
        // SAFETY: whatever CURRENT points to was leaked below, in this process or in one it was forked from.
        if let Some(reactor) = unsafe { known.as_ref() }
            && reactor.home.is_here()
        {
            return Ok(reactor);
        }
        let new = Box::into_raw(Box::new(Reactor { home: Home::here()?, sleepers: Mutex::default() }));
        // Release: R-REACTOR pairs with A-REACTOR; on failure the next turn loads it.
        match CURRENT.compare_exchange(known, new, Ordering::Release, Ordering::Relaxed) {
            // SAFETY: just made, and leaked.
            Ok(_) => Ok(unsafe { &*new }),
            Err(_) => {
                // SAFETY: just made, and nobody has learnt of it.
                drop(unsafe { Box::from_raw(new) });
                Reactor::here()
            }
        }
    }

    /// A thread that has room, and for how many bells, `wanted` at most. The room is taken.
    fn sleeper_with_room(&self, wanted: usize) -> (Arc<Sleeper>, usize) {
        let mut sleepers = lock(&self.sleepers);
        // Relaxed: only we add, under the lock; what a thread lets go of meanwhile is room that is not used yet.
        let room = |sleeper: &Sleeper| MOST_BELLS.saturating_sub(sleeper.load.load(Ordering::Relaxed));
        let found = sleepers.iter().find(|sleeper| room(sleeper) > 0).cloned();
        let sleeper = found.unwrap_or_else(|| {
            sleepers.push(Arc::new(Sleeper::new()));
            sleepers[sleepers.len() - 1].clone()
        });
        let taken = room(&sleeper).min(wanted);
        sleeper.load.fetch_add(taken, Ordering::Relaxed);
        (sleeper, taken)
    }
}

impl Sleeper {
    fn new() -> Sleeper {
        Sleeper { hatch: Hatch::new(), inbox: Mutex::default(), load: AtomicUsize::new(0) }
    }

    /// Leaves bells with the thread; starts it where there is none.
    fn give(self: &Arc<Self>, watches: Vec<Watch>) -> io::Result<()> {
        let mut inbox = lock(&self.inbox);
        if !inbox.is_served {
            let this = self.clone();
            // The program's signals are not for this thread.
            process::without_signals(|| {
                thread::Builder::new().name("shmbus-wake".to_owned()).spawn(move || this.run())
            })?;
            inbox.is_served = true;
        }
        inbox.watches.extend(watches);
        drop(inbox);
        self.hatch.call();
        Ok(())
    }

    /// The thread.
    fn run(&self) {
        let mut watches = Vec::new();
        let mut until = Instant::now() + LINGER;
        loop {
            self.hatch.answer();
            let was_idle = watches.is_empty();
            watches.append(&mut lock(&self.inbox).watches);
            let now = Instant::now();
            let next = self.make_calls(&mut watches, now, now >= until);
            until = match next {
                Some(next) => next,
                None if was_idle && now >= until && self.ends() => return,
                None if was_idle && now < until => until,
                None => now + LINGER,
            };
            let bells: Vec<(&Doorbell, u32)> = watches.iter().map(|watch| (&*watch.bell, watch.armed)).collect();
            sleep_in_place_of_others(&self.hatch, &bells, until.saturating_duration_since(Instant::now()));
        }
    }

    /// Calls everyone whose bell has been rung, or who is to look for itself, and lets go of what nobody waits for any more.
    /// When to look at the clock again; `None`: nothing is left. `timed_out`: the thread is awake because of the clock.
    fn make_calls(&self, watches: &mut Vec<Watch>, now: Instant, timed_out: bool) -> Option<Instant> {
        for watch in watches.iter().filter(|watch| watch.bell.was_rung_since(watch.armed)) {
            watch.call.make();
        }
        let (before, mut next) = (watches.len(), None);
        watches.retain(|watch| match watch.call.remind(now, timed_out) {
            Some(due) => {
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
                true
            }
            None => false,
        });
        self.load.fetch_sub(before - watches.len(), Ordering::Relaxed);
        next
    }

    /// Ends the thread, unless something has been left for it meanwhile.
    fn ends(&self) -> bool {
        let mut inbox = lock(&self.inbox);
        inbox.is_served = !inbox.watches.is_empty();
        !inbox.is_served
    }
}

impl Call {
    /// Calls, if that has not been done: a bell has been rung.
    fn make(&self) {
        let waker = lock(&self.state).waker.take();
        if let Some(waker) = waker {
            call(waker);
        }
    }

    /// Calls if it is time to look without a ring; when it is next. `None`: the call has been made or is not wanted any more.
    /// If the thread is awake for somebody's sake anyway (`early`), it is time at half the interval: so that they come together.
    fn remind(&self, now: Instant, early: bool) -> Option<Instant> {
        let mut state = lock(&self.state);
        let waker = state.waker.as_ref()?;
        let ahead = if early { state.interval / 2 } else { Duration::ZERO };
        if now + ahead < state.due {
            return Some(state.due);
        }
        let waker = waker.clone();
        let due = now + state.interval;
        state.due = due;
        drop(state);
        call(waker);
        Some(due)
    }
}

/// A waker is the program's code: if it panics, the others are called all the same.
fn call(waker: Arc<Waker>) {
    // The panic has been reported by its hook; there is nobody here to hand it to. Dropping the waker may panic as well.
    let _ = catch_unwind(AssertUnwindSafe(move || waker.wake_by_ref()));
}

impl Registration {
    /// Calls `waker` when one of `bells` is rung after it was `armed`, and every `interval` at the latest (`None`: once a second).
    ///
    /// # Errors
    /// The thread that this takes could not be started.
    pub(super) fn new(
        bells: Vec<Shared<Doorbell>>,
        armed: ArmedAll,
        interval: Option<Duration>,
        waker: &Waker,
    ) -> io::Result<Registration> {
        let reactor = Reactor::here()?;
        let (values, longest) = armed.hand_over();
        let interval = interval.map_or(longest, |interval| interval.min(longest));
        let state = CallState { waker: Some(Arc::new(waker.clone())), interval, due: Instant::now() + interval };
        let call = Arc::new(Call { state: Mutex::new(state) });
        let watch = |(bell, armed): (&Shared<Doorbell>, u32)| Watch { bell: bell.clone(), armed, call: call.clone() };
        let mut watches: Vec<Watch> = bells.iter().zip(values).map(watch).collect();
        let mut registration = Registration { home: reactor.home, bells, longest, call, sleepers: Vec::new() };
        while !watches.is_empty() {
            let (sleeper, room) = reactor.sleeper_with_room(watches.len());
            if let Err(error) = sleeper.give(watches.split_off(watches.len() - room)) {
                sleeper.load.fetch_sub(room, Ordering::Relaxed);
                return Err(error);
            }
            registration.sleepers.push(sleeper);
        }
        Ok(registration)
    }

    /// Whether it is for just these bells.
    pub(super) fn is_for(&self, bells: &[Shared<Doorbell>]) -> bool {
        // Ours are kept, so no other one can have come to lie in the same place.
        self.bells.len() == bells.len() && self.bells.iter().zip(bells).all(|(ours, theirs)| ours.is_same(theirs))
    }

    /// Calls `waker` from now on, and at this interval. `false`: the call has been made already.
    pub(super) fn renew(&self, waker: &Waker, interval: Option<Duration>) -> bool {
        let interval = interval.map_or(self.longest, |interval| interval.min(self.longest));
        let known = lock(&self.call.state).waker.clone();
        let other = known.is_some_and(|known| !known.will_wake(waker)).then(|| Arc::new(waker.clone()));
        let mut state = lock(&self.call.state);
        let Some(known) = &mut state.waker else { return false };
        let replaced = other.map(|other| std::mem::replace(known, other));
        let before = state.due;
        if interval != state.interval {
            state.interval = interval;
            state.due = Instant::now() + interval;
        }
        let sooner = state.due < before;
        drop(state);
        // The program's code, too.
        drop(replaced);
        if sooner {
            self.call_sleepers();
        }
        true
    }

    fn call_sleepers(&self) {
        self.sleepers.iter().for_each(|sleeper| sleeper.hatch.call());
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // A forked child drops a copy: the threads are its parent's, and so may be the locks.
        if !self.home.is_here() {
            return;
        }
        let waker = lock(&self.call.state).waker.take();
        // Who called has let go of it already, if all bells were that thread's.
        if waker.is_some() || self.sleepers.len() > 1 {
            self.call_sleepers();
        }
    }
}
