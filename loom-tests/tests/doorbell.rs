//! The doorbell: nobody sleeps through a store. Loom's futex knows no time limit, so a lost wake-up is a deadlock.
#![cfg(loom)]

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use loom_tests::*;
use shmbus::model::*;

/// A doorbell and what is waited for.
struct Door {
    bell: Doorbell,
    stored: AtomicU64,
}

impl Door {
    fn new() -> Arc<Self> {
        Arc::new(Door { bell: Doorbell::new(), stored: AtomicU64::new(0) })
    }

    /// Relaxed on purpose: the doorbell promises that the store is seen, not more.
    fn has(&self, count: u64) -> bool {
        self.stored.load(Ordering::Relaxed) >= count
    }

    fn sleep_until(&self, enough: impl Fn(&Door) -> bool) {
        while !enough(self) {
            let armed = self.bell.arm();
            if enough(self) {
                break;
            }
            self.bell.sleep(armed, None);
        }
    }

    fn store_and_ring(&self) {
        self.stored.fetch_add(1, Ordering::Relaxed);
        if !self.bell.is_quiet() {
            self.bell.ring();
        }
    }
}

#[test]
fn a_sleeper_is_woken() {
    explore(PREEMPTIONS_SMALL, || {
        let door = Door::new();
        let theirs = door.clone();
        let ringing = thread::spawn(move || theirs.store_and_ring());
        door.sleep_until(|door| door.has(1));
        ringing.join().unwrap();
    });
}

/// The second ring finds the bit cleared by the first, or set again by the sleeper that goes back to sleep.
#[test]
fn a_sleeper_is_woken_twice() {
    explore(PREEMPTIONS_SMALL, || {
        let door = Door::new();
        let theirs = door.clone();
        let ringing = thread::spawn(move || (theirs.store_and_ring(), theirs.store_and_ring()));
        door.sleep_until(|door| door.has(1));
        door.sleep_until(|door| door.has(2));
        ringing.join().unwrap();
    });
}

#[test]
fn two_sleepers_are_woken_by_one_ring() {
    explore(PREEMPTIONS, || {
        let door = Door::new();
        let (theirs, others) = (door.clone(), door.clone());
        let ringing = thread::spawn(move || theirs.store_and_ring());
        let sleeping = thread::spawn(move || others.sleep_until(|door| door.has(1)));
        door.sleep_until(|door| door.has(1));
        (ringing.join().unwrap(), sleeping.join().unwrap());
    });
}

#[test]
fn two_ringers_wake_a_sleeper_that_waits_for_both() {
    explore(PREEMPTIONS, || {
        let door = Door::new();
        let ringing = [door.clone(), door.clone()].map(|door| thread::spawn(move || door.store_and_ring()));
        door.sleep_until(|door| door.has(2));
        for thread in ringing {
            thread.join().unwrap();
        }
    });
}

/// Stopped before it wakes anybody, and never going on: the next ringer wakes the sleeper in its place.
#[test]
fn a_ringer_that_is_stopped_delays_nobody() {
    explore(PREEMPTIONS, || {
        let door = Door::new();
        let (theirs, others) = (door.clone(), door.clone());
        let stopping = thread::spawn(move || {
            theirs.stored.fetch_add(1, Ordering::Relaxed);
            if !theirs.bell.is_quiet() {
                theirs.bell.stop_amid_ring();
            }
        });
        let ringing = thread::spawn(move || {
            others.stored.fetch_add(9, Ordering::Relaxed);
            if !others.bell.is_quiet() {
                others.bell.ring();
            }
        });
        door.sleep_until(|door| door.has(9));
        (stopping.join().unwrap(), ringing.join().unwrap());
    });
}

/// A sleeper that arms between the epoch and the waking, and is about to sleep when the bell has been cleared: another one who arms then
/// does not make it look as if nobody had rung. The bell is armed to begin with, as by who has died.
#[test]
fn who_arms_while_the_bell_is_rung_does_not_sleep_because_another_arms_after_it() {
    explore(PREEMPTIONS, || {
        let door = Door::new();
        drop(door.bell.arm());
        let [ringer, sleeper, other] = std::array::from_fn(|_| door.clone());
        let ringing = thread::spawn(move || (ringer.store_and_ring(), ringer.store_and_ring()));
        let sleeping = thread::spawn(move || sleeper.sleep_until(|door| door.has(2)));
        let arming = thread::spawn(move || drop(other.bell.arm()));
        (ringing.join().unwrap(), sleeping.join().unwrap(), arming.join().unwrap());
    });
}

/// One sleeper at two doorbells, which are rung by two threads: whichever rings last, it does not sleep through it.
#[test]
fn a_sleeper_at_two_doorbells_is_woken_by_either() {
    explore(PREEMPTIONS, || {
        let doors = [Door::new(), Door::new()];
        let ringing = doors.clone().map(|door| thread::spawn(move || door.store_and_ring()));
        sleep_until_all(&doors, 1);
        for thread in ringing {
            thread.join().unwrap();
        }
    });
}

/// One ringer for both, which finds the sleeper armed at the one and not yet at the other.
#[test]
fn a_sleeper_at_two_doorbells_is_woken_by_one_ringer() {
    explore(PREEMPTIONS_SMALL, || {
        let doors = [Door::new(), Door::new()];
        let theirs = doors.clone();
        let ringing = thread::spawn(move || theirs.iter().rev().for_each(|door| door.store_and_ring()));
        sleep_until_all(&doors, 1);
        ringing.join().unwrap();
    });
}

/// Where a task leaves its bell with the thread that sleeps in its place.
struct Desk {
    hatch: Hatch,
    left: Mutex<Left>,
    called: Condvar,
}

#[derive(Default)]
struct Left {
    /// What the bell was when it was armed.
    armed: Option<u32>,
    is_called: bool,
    is_over: bool,
}

impl Desk {
    fn new() -> Arc<Self> {
        Arc::new(Desk { hatch: Hatch::new(), left: Mutex::new(Left::default()), called: Condvar::new() })
    }

    /// The thread: calls the task when the bell has been rung.
    fn sleep_for(&self, door: &Door) {
        let mut armed = None;
        loop {
            self.hatch.answer();
            let mut left = self.left.lock().unwrap();
            armed = left.armed.take().or(armed);
            if armed.is_some_and(|armed| door.bell.was_rung_since(armed)) {
                armed = None;
                left.is_called = true;
                self.called.notify_all();
            }
            if left.is_over {
                return;
            }
            drop(left);
            let bells: Vec<(&Doorbell, u32)> = armed.iter().map(|armed| (&door.bell, *armed)).collect();
            sleep_in_place_of_others(&self.hatch, &bells, std::time::Duration::MAX);
        }
    }

    /// The task: arms, looks, leaves the sleep to the thread.
    fn wait_until(&self, enough: impl Fn() -> bool, door: &Door) {
        while !enough() {
            let (values, _) = arm_all(&[&door.bell]).hand_over();
            if enough() {
                break;
            }
            let mut left = self.left.lock().unwrap();
            (left.armed, left.is_called) = (Some(values[0]), false);
            drop(left);
            self.hatch.call();
            let mut left = self.left.lock().unwrap();
            while !left.is_called {
                left = self.called.wait(left).unwrap();
            }
        }
        self.left.lock().unwrap().is_over = true;
        self.hatch.call();
    }
}

/// One thread arms and looks, another one sleeps: wherever the ring falls, the first one hears of it.
#[test]
fn who_leaves_the_sleep_to_another_is_called() {
    explore(PREEMPTIONS_SMALL, || {
        let (door, desk) = (Door::new(), Desk::new());
        let theirs = door.clone();
        let ringing = thread::spawn(move || theirs.store_and_ring());
        let (theirs, place) = (door.clone(), desk.clone());
        let sleeping = thread::spawn(move || place.sleep_for(&theirs));
        desk.wait_until(|| door.has(1), &door);
        (ringing.join().unwrap(), sleeping.join().unwrap());
    });
}

/// The second ring comes while the bell is armed anew, or slept on yet for the first.
#[test]
fn who_leaves_the_sleep_to_another_twice_is_called_twice() {
    explore(PREEMPTIONS, || {
        let (door, desk) = (Door::new(), Desk::new());
        let theirs = door.clone();
        let ringing = thread::spawn(move || (theirs.store_and_ring(), theirs.store_and_ring()));
        let (theirs, place) = (door.clone(), desk.clone());
        let sleeping = thread::spawn(move || place.sleep_for(&theirs));
        desk.wait_until(|| door.has(2), &door);
        (ringing.join().unwrap(), sleeping.join().unwrap());
    });
}

/// Sleeps at all doors at once until each has `count`.
fn sleep_until_all(doors: &[Arc<Door>], count: u64) {
    let bells: Vec<&Doorbell> = doors.iter().map(|door| &door.bell).collect();
    let enough = || doors.iter().all(|door| door.has(count));
    while !enough() {
        let armed = arm_all(&bells);
        if enough() {
            break;
        }
        sleep_any(&bells, armed, None);
    }
}

/// The attention bit is seen by a sleeper that is on its way to sleep, and with it the state that was stored before.
#[test]
fn attention_reaches_a_sleeper() {
    explore(PREEMPTIONS_SMALL, || {
        let door = Door::new();
        let theirs = door.clone();
        let calling = thread::spawn(move || {
            theirs.stored.store(1, Ordering::Relaxed);
            theirs.bell.call_attention();
        });
        door.sleep_until(|door| door.bell.wants_attention());
        assert!(door.has(1), "the state comes before the bit");
        calling.join().unwrap();
    });
}

/// A ring and a call for attention at once: neither swallows the other.
#[test]
fn attention_and_a_ring_do_not_swallow_each_other() {
    explore(PREEMPTIONS_LARGE, || {
        let door = Door::new();
        let (theirs, others) = (door.clone(), door.clone());
        let ringing = thread::spawn(move || theirs.store_and_ring());
        let calling = thread::spawn(move || others.bell.call_attention());
        door.sleep_until(|door| door.has(1));
        door.sleep_until(|door| door.bell.wants_attention());
        (ringing.join().unwrap(), calling.join().unwrap());
    });
}

/// Both ends of a full channel sleep and wake each other.
#[test]
fn a_channels_ends_never_sleep_both() {
    explore(PREEMPTIONS, || {
        let channel = channel(2);
        let theirs = channel.clone();
        let sending = thread::spawn(move || {
            let mut sender = Sender::new(theirs.clone(), 0);
            for value in 1..=3 {
                while !sender.send_word(value) {
                    let armed = theirs.header.writers.arm();
                    if !sender.has_room(1) {
                        theirs.header.writers.sleep(armed, None);
                    }
                }
            }
        });
        let mut receiver = Receiver::new(channel.clone(), 0);
        for value in 1..=3 {
            let received = loop {
                let armed = match receiver.recv_word() {
                    Some(received) => break received,
                    None => channel.header.readers.arm(),
                };
                if receiver.peek_word().is_none() {
                    channel.header.readers.sleep(armed, None);
                }
            };
            assert_eq!(received, value);
        }
        sending.join().unwrap();
    });
}
