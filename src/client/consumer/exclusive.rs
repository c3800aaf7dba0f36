//! Exclusive groups: who is at work, who stands by, and how the role passes on (ARCHITECTURE.md §4.9, *Exclusive*).
//!
//! The role is a lease in the ledger, renewed by whoever receives. What was taken counts only if the role was still ours
//! afterwards: a consumer that slept anywhere between finds out before its program sees anything.

use super::core::Core;
use crate::group::Guarantee;
use crate::os::clock;
use crate::ring::ledger::{Seen, State};

/// How often the role is renewed in the time it lasts.
const RENEWALS: u64 = 3;

/// When a standby looks again that has asked the coordinator to free the role.
const ASKED_LOOK_MS: u64 = 100;

/// What a consumer of an exclusive group knows of the role.
#[derive(Default)]
pub(super) struct AtWork {
    /// When the role is to be renewed, while it is ours.
    renew_at: u64,
}

impl Core {
    /// Whether this consumer is the one at work, or becomes it.
    pub(super) fn is_at_work(&mut self, now: u64) -> bool {
        let role = self.ledger.role();
        if role.owner() != Some(self.me) {
            return self.stand_by(now);
        }
        if now >= self.at_work.renew_at && !self.renew_role(now) {
            return self.stand_by(now);
        }
        true
    }

    /// Lets the role last as long as a lease that is taken now. `false`: it is ours no more.
    fn renew_role(&mut self, now: u64) -> bool {
        self.at_work.renew_at = now + (self.group.options.lease_ms / RENEWALS).max(1);
        self.ledger.keep_role(self.me, self.lease_end(now))
    }

    /// Another consumer is at work, or nobody. Whether we have become it.
    #[cold]
    fn stand_by(&mut self, now: u64) -> bool {
        // What we had reserved is for whoever is at work.
        self.reserved = 0..0;
        self.scan_idle(now);
        let role = self.ledger.role();
        match role.owner() {
            Some(owner) if self.guarantee() == Guarantee::EffectivelyOnce => {
                // Its outputs may be there, or come yet: until the coordinator has fenced it and freed its role, it works.
                if role.due_in(now) == 0 || self.has_overdue(owner, now) {
                    self.reclaim(owner, now);
                    self.scan.look_by(now + ASKED_LOOK_MS);
                } else {
                    self.scan.look_by(now + role.due_in(now));
                }
            }
            _ if role.due_in(now) > 0 => self.scan.look_by(now + role.due_in(now)),
            _ if self.ledger.take_role(role, self.me, self.lease_end(now)) => {
                self.begin_work(now);
                return true;
            }
            // Another standby was faster.
            _ => self.scan.look_again(now),
        }
        self.candidates.clear();
        false
    }

    /// The role has just become ours: everything begins where the other one ended.
    fn begin_work(&mut self, now: u64) {
        self.at_work.renew_at = now;
        self.ledger.end_other_leases(self.me, now);
        self.scan_all(now);
    }

    /// Whether a scan has found an overdue lease of this consumer.
    fn has_overdue(&self, owner: u8, now: u64) -> bool {
        self.candidates.iter().any(|sequence| {
            let seen = self.ledger.look(*sequence);
            seen.state() == State::Leased && seen.owner() == Some(owner) && seen.is_due(now)
        })
    }

    /// Somebody leased this before it found out that it is at work no more, and will give it back: its program has not
    /// seen it. We do not go past it.
    #[cold]
    pub(super) fn end_late_lease(&mut self, seen: Seen, now: u64) -> Seen {
        self.ledger.give_back_unseen(seen, now);
        self.ledger.look(seen.sequence())
    }

    /// Whether something was taken while we were the one at work. If we were not, nobody has seen it, and it goes back.
    /// The role then lasts as long as what was taken; at most once, what was leased until now is settled.
    pub(super) fn confirm_taken(&mut self, taken: bool) -> bool {
        if !taken {
            // A sleeper wakes in time to renew its role.
            self.scan.look_by(self.at_work.renew_at);
            return false;
        }
        // Read after all leases were taken: the role ends no sooner than they do.
        let now = clock::now_ms();
        if !self.renew_role(now) {
            return self.give_up_taken(now);
        }
        if self.guarantee() == Guarantee::AtMostOnce {
            let (ledger, flush) = (&self.ledger, &mut self.flush);
            self.items.retain_mut(|item| {
                let settled = ledger.settle(item.lease);
                flush.count(settled);
                item.lease = item.lease.settled();
                settled
            });
        }
        !self.items.is_empty()
    }

    #[cold]
    fn give_up_taken(&mut self, now: u64) -> bool {
        for item in self.items.drain(..) {
            self.ledger.give_back_unseen(item.lease, now);
        }
        // Those that we had before are gone with the role as well.
        self.in_flight = 0;
        self.copies.clear();
        self.ring_readers();
        self.scan.look_again(now);
        false
    }

    /// Before a lease is extended until `due`: the role lasts as long. `false`: it is ours no more, and so is no lease.
    pub(super) fn extends_role(&self, due: u64) -> bool {
        !self.group.options.exclusive || self.ledger.keep_role(self.me, due)
    }
}
