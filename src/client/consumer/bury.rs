//! Moving what has expired to the dead-letter topic for a group that nobody consumes, and nothing else: what the coordinator
//! has somebody do, since only a consumer's death or fence decides what became of a move (ARCHITECTURE.md §4.9).

use std::thread;
use std::time::{Duration, Instant};

use super::Consumer;
use super::core::Core;
use super::fetch::Got;
use crate::error::RecvError;
use crate::os::clock;
use crate::ring::ledger::State;

/// Messages looked at in one go.
const AT_A_TIME: u64 = 256;

/// Between two attempts at moves that wait.
const PAUSE: Duration = Duration::from_millis(10);

impl<T: ?Sized> Consumer<T> {
    /// Settles or moves what has expired at the group's floor, and goes on with moves that are nobody's, until nothing is left
    /// of that or `deadline` has passed. Moves that wait by then are nobody's again when the consumer is dropped.
    pub(crate) fn bury_expired(&mut self, deadline: Instant) -> Result<(), RecvError> {
        let core = &mut self.core;
        while !core.ledger.is_fenced(core.me) && core.gone().is_none() {
            core.raise_floor();
            let found = core.expire_at_floor(deadline)?;
            core.work_off_moves();
            if !found && !core.moves.wait() || Instant::now() >= deadline {
                break;
            }
            if core.moves.wait() {
                thread::sleep(PAUSE);
            }
        }
        core.raise_floor();
        Ok(())
    }
}

impl Core {
    /// Whether there was something to settle or to begin to move until `deadline`.
    fn expire_at_floor(&mut self, deadline: Instant) -> Result<bool, RecvError> {
        let (floor, now) = (self.ledger.floor(), clock::now_ms());
        let end = self.log.committed_end(floor, floor.saturating_add(self.ledger.window().min(AT_A_TIME)));
        let mut found = false;
        for sequence in floor..end {
            // Garbage may make each look at a message a long one.
            if Instant::now() >= deadline {
                break;
            }
            let seen = self.ledger.look(sequence);
            match seen.state() {
                State::Settled => continue,
                State::Moving(_) if seen.owner() == Some(self.me) => continue,
                State::Moving(reason) if seen.owner().is_none() => {
                    found |= self.take_move(seen, reason, now);
                    continue;
                }
                State::Fresh | State::Returned => {}
                _ => break,
            }
            // Before the word changes: what is moved is found by those who repair.
            self.ledger.raise_hint(sequence + 1);
            self.copies.clear();
            match self.log.read(sequence, &mut self.copies) {
                Got::Message(body, _) if self.open_envelope(seen, body, now)?.is_some() => break,
                Got::Message(..) => {}
                Got::Hole => {
                    let settled = self.ledger.settle(seen);
                    self.flush.count(settled);
                }
                Got::Unsound(problem) => self.unless_changed(seen, problem)?,
            }
            found = true;
        }
        Ok(found)
    }
}
