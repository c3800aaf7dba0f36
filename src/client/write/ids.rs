//! Which message ids the log retains: a cache of the log, brought up to date before each message with an id. What is committed
//! before the place where that message goes is exactly what the cache has seen (SPEC §3.2).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::client::envelope::id_in;
use crate::ring::gate::Stop;

type Id = Arc<[u8]>;

/// The ids of a topic with `dedup`.
#[derive(Default)]
pub(crate) struct Ids {
    /// Positions below this have been looked at.
    looked: u64,
    places: HashMap<Id, Seen>,
    order: VecDeque<(u64, Id)>,
}

#[derive(Clone, Copy)]
struct Seen {
    position: u64,
    sequence: u64,
}

impl Ids {
    /// Looks at what has come since the last time: `read` tells the ids of the messages at a position to what it is given,
    /// with their sequences. Positions from `oldest` on are retained, and all below `end` are committed.
    pub(super) fn catch_up(
        &mut self,
        oldest: u64,
        end: u64,
        mut read: impl FnMut(u64, &mut dyn FnMut(&[u8], u64)) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        self.forget(oldest);
        for position in self.looked.max(oldest)..end {
            read(position, &mut |id, sequence| self.insert(id, Seen { position, sequence }))?;
            self.looked = position + 1;
        }
        Ok(())
    }

    /// Whether none of these bodies has an id that is there already, or that another of them has.
    pub(super) fn check<'a>(&self, bodies: impl Iterator<Item = &'a [u8]>) -> Result<(), Stop> {
        let mut batch = HashSet::new();
        for id in bodies.filter_map(id_in) {
            if let Some(seen) = self.places.get(id) {
                return Err(Stop::Duplicate(Some(seen.sequence)));
            }
            if !batch.insert(id) {
                return Err(Stop::Duplicate(None));
            }
        }
        Ok(())
    }

    /// Whether a message with this id was there at the last look.
    pub(super) fn has(&self, id: &[u8]) -> bool {
        self.places.contains_key(id)
    }

    fn insert(&mut self, id: &[u8], seen: Seen) {
        let id = Id::from(id);
        self.order.push_back((seen.position, id.clone()));
        self.places.insert(id, seen);
    }

    /// Forgets what is no longer retained.
    fn forget(&mut self, oldest: u64) {
        while self.order.front().is_some_and(|(position, _)| *position < oldest) {
            let Some((position, id)) = self.order.pop_front() else { return };
            if self.places.get(&id).is_some_and(|seen| seen.position == position) {
                self.places.remove(&id);
            }
        }
    }
}
