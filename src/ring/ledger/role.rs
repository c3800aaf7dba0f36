//! The role of the consumer at work in an exclusive group.

use super::Ledger;
use super::word::*;
use crate::sync::{Ordering, fence};

/// Bits of a role's word that say whose it is.
pub(super) const ROLE_OWNER_BITS: u32 = 9;

/// The role of the consumer at work in an exclusive group, as it was seen: a lease of its own, which its holder renews.
///
/// ```text
/// word: 63 ........... 9   8 ......... 0
///       due (ms)           owner + 1, 0 nobody's
/// ```
///
/// It ends no sooner than any lease of its holder, so whoever finds it overdue knows that all of those are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role(u64);

impl Role {
    fn new(owner: u8, due: u64) -> Self {
        Role(due << ROLE_OWNER_BITS | (u64::from(owner) + 1))
    }

    /// Who is at work.
    pub fn owner(self) -> Option<u8> {
        let owner = (self.0 & ((1 << ROLE_OWNER_BITS) - 1)).checked_sub(1)?;
        u8::try_from(owner).ok()
    }

    fn due(self) -> u64 {
        self.0 >> ROLE_OWNER_BITS
    }

    /// Milliseconds until another may take it: 0 where it is nobody's, has ended, or says what nobody writes.
    pub fn due_in(self, now: u64) -> u64 {
        let ahead = self.due().saturating_sub(now);
        if self.owner().is_none() || ahead > MAX_AHEAD_MS { 0 } else { ahead }
    }
}

impl Ledger {
    /// Who is at work in an exclusive group, and until when at least.
    #[inline]
    pub fn role(&self) -> Role {
        // Relaxed: it only chooses who tries; what it means for the words is ordered by the fences of `keep_role` and
        // `end_other_leases`.
        Role(self.header.role.0.load(Ordering::Relaxed))
    }

    /// Puts `owner` to work in an exclusive group until `due`, in the place of `seen`, which is nobody's or overdue. `false`:
    /// it was not as seen. The newcomer ends what others have leased before it takes anything ([`Self::end_other_leases`]).
    pub fn take_role(&self, seen: Role, owner: u8, due: u64) -> bool {
        self.swap_role(seen, Role::new(owner, due))
    }

    /// Lets `owner` be at work until `due` at least. `false`: it is at work no more.
    ///
    /// After messages were taken it also tells whether that was in time: while nobody else was at work.
    #[inline]
    pub fn keep_role(&self, owner: u8, due: u64) -> bool {
        // SeqCst: R-LEASE, then A-ROLE; pairs with R-ROLE, then A-LEASE (end_other_leases).
        // Store, then look: what we have just leased, then who is at work. Either we see that another is, or it sees that
        // lease, and ends it.
        fence(Ordering::SeqCst);
        let seen = self.role();
        seen.owner() == Some(owner) && (seen.due() >= due || self.swap_role(seen, Role::new(owner, due)))
    }

    /// Ends what others have leased in an exclusive group, for whoever has just been put to work: order would not hold
    /// if they settled it later. What somebody leases after this finds out that it came too late (`keep_role`).
    pub fn end_other_leases(&self, owner: u8, now: u64) {
        // SeqCst: R-ROLE, then A-LEASE; pairs with R-LEASE, then A-ROLE (keep_role).
        // Store, then look: that we are at work, then what others have leased. Whose lease we do not see sees us.
        fence(Ordering::SeqCst);
        for sequence in self.handed_out() {
            let seen = self.look(sequence);
            if seen.is_leased_by_other(owner) {
                self.give_back(seen, now);
            }
        }
    }

    /// The consumer at work of an exclusive group.
    pub fn active(&self) -> Option<u8> {
        self.role().owner()
    }

    /// `owner` is at work no more: another may take the role. Whether it was.
    pub fn leave_role(&self, owner: u8) -> bool {
        // Again where a renewal came between: nobody but the one at work, and whoever speaks for the dead, writes it then.
        loop {
            let seen = self.role();
            if seen.owner() != Some(owner) {
                return false;
            }
            if self.swap_role(seen, Role(0)) {
                return true;
            }
        }
    }

    fn swap_role(&self, seen: Role, new: Role) -> bool {
        // Relaxed: as in `role`. Crash points: before this the role was as seen; after it it is the newcomer's, whose leases
        // are returned, and whose role is freed, when it is proven dead.
        self.header.role.0.compare_exchange(seen.0, new.0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
