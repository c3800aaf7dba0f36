//! Notice segments: one doorbell and a count for each wildcard subscription.

use std::os::fd::{AsFd, OwnedFd};

use crate::error::AttachError;
use crate::ring::notice::Notice;
use crate::shm::layout::{BODY_OFFSET, Geometry, page_up};
use crate::shm::segment::{Access, Kind, Promise, Segment};
use crate::shm::shared::Shared;

/// Bytes that a notice takes.
pub(crate) const LEN_BYTES: u64 = page_up(BODY_OFFSET + size_of::<Notice>() as u64);

/// What the notice of a wildcard subscription promises.
fn promise(bus: u64, wildcard: u64) -> Promise {
    let geometry = Geometry { slots: 0, slot_bytes: 0, unit_bits: 0, arena_bytes: 0 };
    Promise { kind: Kind::Notice, len_bytes: LEN_BYTES, bus, topic: wildcard, index: 0, generation: 0, geometry }
}

/// A new notice that says nothing.
pub(crate) fn create(bus: u64, wildcard: u64) -> std::io::Result<(OwnedFd, Shared<Notice>)> {
    let promise = promise(bus, wildcard);
    let (fd, segment) = Segment::create("shmbus:notice", &promise)?;
    segment.publish(&promise);
    Ok((fd, segment.view(0)))
}

/// The notice behind a descriptor.
pub(crate) fn attach(fd: &OwnedFd, bus: u64, wildcard: u64) -> Result<Shared<Notice>, AttachError> {
    Ok(Segment::attach(fd.as_fd(), &promise(bus, wildcard), Access::ReadWrite)?.view(0))
}
