//! Taking and settling messages by the run: one swap for sixteen of them (`ring/ledger/run.rs`).

use std::cell::Cell;

use super::core::{Core, Item};
use super::fetch::Got;
use super::take::LONG_COPY_BYTES;
use crate::client::envelope;
use crate::group::Guarantee;
use crate::ring::ledger::{RUN, Run};

impl Core {
    /// Takes the run that what is reserved begins with, if it is wanted as a whole, nobody has touched it, and none of its
    /// messages is out of the ordinary. Otherwise nothing has happened, and its messages are to be taken one by one.
    #[inline]
    pub(super) fn take_run(&mut self, wanted: usize, now: u64) -> bool {
        let first = self.reserved.start;
        let one_by_one = self.is_limited() || self.group.options.exclusive;
        if (wanted as u64) < RUN || self.reserved.end - first < RUN || one_by_one {
            return false;
        }
        let Some(run) = self.ledger.look_at_run(first) else { return false };
        let (items, copies) = (self.items.len(), self.copies.mark());
        let leased = self.ledger.leased_run(run, self.me, self.lease_end(now));
        if !self.copy_run(run, leased) || !self.swap_run(run, leased) {
            self.items.truncate(items);
            self.copies.undo_to(copies);
            return false;
        }
        // At most once there is nothing left to acknowledge.
        self.items[items].run = (self.guarantee() != Guarantee::AtMostOnce).then_some(leased);
        self.reserved.start += RUN;
        true
    }

    /// Copies the messages out and puts them into `items`, as they will be once the run is taken.
    #[inline]
    fn copy_run(&mut self, run: Run, leased: Run) -> bool {
        let at_most_once = self.guarantee() == Guarantee::AtMostOnce;
        let next = run.sequences().end..self.reserved.end.min(run.sequences().end.saturating_add(RUN));
        next.for_each(|sequence| self.log.prefetch(sequence));
        for sequence in run.sequences() {
            // A hole, or what is unsound: met again one by one.
            let Got::Message(body, origin) = self.log.read(sequence, &mut self.copies) else { return false };
            let bytes = self.copies.bytes(body);
            let Some(payload_at) = self.plain_payload_at(bytes) else { return false };
            let lease = self.ledger.lease_in(leased, sequence);
            let lease = if at_most_once { lease.settled() } else { lease };
            self.items.push(Item { lease, run: None, body, payload_at, origin, kept: Cell::new(false) });
        }
        true
    }

    /// Where the payload begins of a message that is to be delivered and quickly copied.
    #[inline]
    fn plain_payload_at(&self, bytes: &[u8]) -> Option<usize> {
        if bytes.len() > LONG_COPY_BYTES {
            return None;
        }
        if !self.info.options.envelope {
            return Some(0);
        }
        let (view, payload) = envelope::split(bytes, self.info.batch_align())?;
        let plain = self.lengths.allow(payload.len() as u64) && !view.is_expired();
        plain.then(|| bytes.len() - payload.len())
    }

    /// Leases the run, or settles it where messages are delivered at most once.
    #[inline]
    fn swap_run(&mut self, run: Run, leased: Run) -> bool {
        if self.guarantee() == Guarantee::AtMostOnce {
            let settled = self.ledger.settle_run(run, self.me);
            self.flush.count_run(settled);
            return settled;
        }
        let taken = self.ledger.take_run(run, leased);
        self.in_flight += if taken { RUN } else { 0 };
        taken
    }

    /// Acknowledges all messages of a run at once. `false`: nothing has happened, they are to be acknowledged one by one.
    #[inline]
    pub(super) fn ack_run(&mut self, run: Run) -> bool {
        if self.check_settle().is_err() || !self.ledger.settle_run(run, self.me) {
            return false;
        }
        self.in_flight = self.in_flight.saturating_sub(RUN);
        self.have_settled(RUN);
        true
    }
}
