//! The notices of all wildcard subscriptions, as the coordinator holds them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::AttachError;
use crate::ring::notice::Notice;
use crate::shm::notice;
use crate::shm::shared::Shared;

/// A notice's name in the keeper's store.
pub(crate) fn notice_name(wildcard: u64) -> String {
    format!("wildcard-{wildcard}")
}

/// Every wildcard subscription's notice.
#[derive(Default)]
pub(crate) struct Notices {
    by_wildcard: BTreeMap<u64, (OwnedFd, Shared<Notice>)>,
}

impl Notices {
    /// Creates a subscription's notice.
    pub(crate) fn add(&mut self, bus: u64, wildcard: u64) -> io::Result<BorrowedFd<'_>> {
        let entry = notice::create(bus, wildcard)?;
        self.by_wildcard.insert(wildcard, entry);
        Ok(self.by_wildcard[&wildcard].0.as_fd())
    }

    /// Takes over what an earlier coordinator created.
    pub(crate) fn adopt(&mut self, bus: u64, wildcard: u64, fd: OwnedFd) -> Result<(), AttachError> {
        let notice = notice::attach(&fd, bus, wildcard)?;
        self.by_wildcard.insert(wildcard, (fd, notice));
        Ok(())
    }

    /// A subscription's notice; `None` where everybody who had it has died but its owner, who has not presented it yet.
    pub(crate) fn stored_one(&self, wildcard: u64) -> Option<BorrowedFd<'_>> {
        self.by_wildcard.get(&wildcard).map(|(fd, _)| fd.as_fd())
    }

    /// Gives up those that nobody has any more.
    pub(crate) fn retain(&mut self, is_held: impl Fn(u64) -> bool) {
        self.by_wildcard.retain(|wildcard, _| is_held(*wildcard));
    }

    /// A descriptor for the subscription's owner.
    pub(crate) fn descriptor(&self, wildcard: u64) -> io::Result<OwnedFd> {
        let (fd, _) = self.by_wildcard.get(&wildcard).ok_or(io::ErrorKind::NotFound)?;
        fd.try_clone()
    }

    /// Wakes a subscription's owner: so many topics there have been.
    pub(crate) fn tell(&self, wildcard: u64, opened: u64) {
        if let Some((_, notice)) = self.by_wildcard.get(&wildcard) {
            notice.tell(opened);
        }
    }

    /// Tells everybody that the bus has ended.
    pub(crate) fn end(&self) {
        self.by_wildcard.values().for_each(|(_, notice)| notice.end());
    }

    /// Every descriptor with the name it is stored under.
    pub(crate) fn stored(&self) -> impl Iterator<Item = (String, BorrowedFd<'_>)> {
        self.by_wildcard.iter().map(|(wildcard, (fd, _))| (notice_name(*wildcard), fd.as_fd()))
    }
}
