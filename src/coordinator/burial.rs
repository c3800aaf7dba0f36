//! Dead letters of groups that nobody consumes: the coordinator joins its own bus as a consumer, on a thread, for as long as
//! that takes.
//!
//! A move to the dead-letter topic names its owner and is decided by that one's note, whatever dies (ARCHITECTURE.md §4.9).
//! So the coordinator does what any consumer would, as a participant like any other: when it is killed, its successor has proof
//! of that participant's death and releases what it was moving.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Bus;
use crate::coordinator::directory::Place;
use crate::topic::Topic;

/// How long one burial may wait for room in the dead-letter topic.
const PATIENCE: Duration = Duration::from_secs(2);

/// After one that could not be carried out: nobody can mend that but people.
const PAUSE: Duration = Duration::from_secs(10);

/// A group by the names of its topic and its own.
pub(crate) type GroupNames = (String, String);

/// At most one burial at a time.
#[derive(Default)]
pub(crate) struct Burial {
    /// Whether all of it could be carried out.
    thread: Option<JoinHandle<bool>>,
    not_before: Option<Instant>,
}

impl Burial {
    /// Moves what has expired at the floors of these groups, unless somebody is at it.
    pub(crate) fn begin(&mut self, place: &Place, groups: Vec<GroupNames>) {
        if groups.is_empty() || self.is_busy() || self.not_before.is_some_and(|at| Instant::now() < at) {
            return;
        }
        let place = place.clone();
        let bury = move || match Bus::visit(&place) {
            Ok(bus) => groups.iter().all(|group| bury(&bus, group)),
            Err(_) => false,
        };
        self.thread = thread::Builder::new().name("shmbus-burial".to_owned()).spawn(bury).ok();
    }

    fn is_busy(&mut self) -> bool {
        let Some(thread) = self.thread.take() else { return false };
        if !thread.is_finished() {
            self.thread = Some(thread);
            return true;
        }
        if !thread.join().unwrap_or(false) {
            self.not_before = Some(Instant::now() + PAUSE);
        }
        false
    }
}

/// Whether it could be done, or there is nothing to do any more.
fn bury(bus: &Bus, (topic, group): &GroupNames) -> bool {
    match bus.consumer(Topic::<[u8]>::named(topic.as_str()), group.as_str()).existing().open() {
        Ok(mut consumer) => consumer.bury_expired(Instant::now() + PATIENCE).is_ok(),
        Err(_) => false,
    }
}
