//! Dead letters of groups that nobody consumes: the coordinator joins its own bus as a consumer, on a thread, for as long as
//! that takes.
//!
//! A move to the dead-letter topic names its owner and is decided by that one's note, whatever dies (ARCHITECTURE.md §4.9).
//! So the coordinator does what any consumer would, as a participant like any other: when it is killed, its successor has proof
//! of that participant's death and releases what it was moving.

use std::collections::HashMap;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Bus;
use crate::coordinator::directory::Place;
use crate::topic::Topic;

/// How long one burial may wait for room in the dead-letter topic.
const PATIENCE: Duration = Duration::from_secs(2);

/// For a group whose letters could not be moved, a topic of somebody else say: nobody can mend that but people.
const PAUSE: Duration = Duration::from_secs(10);

/// A group by the names of its topic and its own.
pub(crate) type GroupNames = (String, String);

/// At most one burial at a time.
#[derive(Default)]
pub(crate) struct Burial {
    /// The groups for which it could not be carried out.
    thread: Option<JoinHandle<Vec<GroupNames>>>,
    /// When to try those again; the others do not wait for them.
    not_before: HashMap<GroupNames, Instant>,
}

impl Burial {
    /// Moves what has expired at the floors of these groups, unless somebody is at it.
    pub(crate) fn begin(&mut self, place: &Place, mut groups: Vec<GroupNames>) {
        if self.is_busy() {
            return;
        }
        let now = Instant::now();
        self.not_before.retain(|_, at| *at > now);
        groups.retain(|group| !self.not_before.contains_key(group));
        if groups.is_empty() {
            return;
        }
        let place = place.clone();
        let bury = move || match Bus::visit(&place) {
            Ok(bus) => groups.into_iter().filter(|group| !bury(&bus, group)).collect(),
            Err(_) => groups,
        };
        self.thread = thread::Builder::new().name("shmbus-burial".to_owned()).spawn(bury).ok();
    }

    fn is_busy(&mut self) -> bool {
        let Some(thread) = self.thread.take() else { return false };
        if !thread.is_finished() {
            self.thread = Some(thread);
            return true;
        }
        let again = Instant::now() + PAUSE;
        self.not_before.extend(thread.join().unwrap_or_default().into_iter().map(|group| (group, again)));
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
