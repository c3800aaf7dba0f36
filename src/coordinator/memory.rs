//! What the coordinator does to a topic's shared memory: create, join, leave, recover, report.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::coordinator::protocol::{StartAt, TopicInfo};
use crate::error::Refusal;

/// A topic's segments as the coordinator holds them: every descriptor, all mapped read-write.
pub(crate) struct TopicMemory {}

/// A descriptor that goes into the keeper's store, with its name's last part: "log", "cursors", "arena-3", "channel".
pub(crate) struct StoredSegment<'a> {
    pub(crate) name: String,
    pub(crate) fd: BorrowedFd<'a>,
}

/// Where a subscriber begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joined {
    pub(crate) position: u64,
    pub(crate) sequence: u64,
}

impl TopicMemory {
    /// Creates log, cursors and the first arena (a channel: its one segment), reserved in full and sealed.
    pub(crate) fn create(info: &TopicInfo) -> Result<TopicMemory, Refusal> { todo!() }
    /// Bytes that `create` reserves.
    pub(crate) fn footprint_bytes(info: &TopicInfo) -> u64 { todo!() }
    /// Bytes that one more arena reserves.
    pub(crate) fn arena_footprint_bytes(info: &TopicInfo) -> u64 { todo!() }
    /// Takes over segments that an earlier coordinator created; checks every header against `info`.
    pub(crate) fn adopt(info: &TopicInfo, segments: Vec<(String, OwnedFd)>) -> Result<TopicMemory, Refusal> { todo!() }
    /// Every segment with the name it is stored under.
    pub(crate) fn segments(&self) -> Vec<StoredSegment<'_>> { todo!() }
    /// Whether slot's arena exists.
    pub(crate) fn has_arena(&self, slot: u32) -> bool { todo!() }
    /// Creates the arena of a publisher slot.
    pub(crate) fn add_arena(&mut self, info: &TopicInfo, slot: u32) -> Result<(), Refusal> { todo!() }
    /// Descriptors for a publisher: log, cursors, own arena, all read-write (a channel: its segment).
    pub(crate) fn publisher_fds(&self, slot: u32) -> Result<Vec<OwnedFd>, Refusal> { todo!() }
    /// Descriptors for a subscriber: log (read-only), cursors (read-write), each arena (read-only) with its slot.
    pub(crate) fn subscriber_fds(&self) -> Result<Vec<(crate::coordinator::protocol::SegmentRef, OwnedFd)>, Refusal> { todo!() }
    /// A read-only descriptor of one arena, to be pushed to subscribers.
    pub(crate) fn arena_fd(&self, slot: u32) -> Result<OwnedFd, Refusal> { todo!() }
    /// Puts a publisher's tenancy in force (before it is told): its id and the tenancy index that goes into slot words.
    pub(crate) fn begin_tenancy(&self, tenancy: u32, publisher: u64) -> Result<(), Refusal> { todo!() }
    /// Repairs what a dead (or leaves tidy what a departed) publisher left. Idempotent.
    pub(crate) fn end_publisher(&self, slot: u32) -> Result<(), Refusal> { todo!() }
    /// Puts a subscriber's cursor in force at its start position. Idempotent for one owner.
    pub(crate) fn join(&self, cursor: u32, owner: u64, start: StartAt, droppable: bool) -> Result<Joined, Refusal> { todo!() }
    /// Takes a cursor out of force and wakes publishers that it held. Idempotent.
    pub(crate) fn leave(&self, cursor: u32) { todo!() }
    /// Oldest retained and next sequence.
    pub(crate) fn range(&self) -> Result<(u64, u64), Refusal> { todo!() }
    /// A cursor's sequence.
    pub(crate) fn cursor_sequence(&self, cursor: u32) -> u64 { todo!() }
    /// Marks the topic as removed (1) or its bus as stopped (2) and wakes everybody.
    pub(crate) fn end(&self, state: u32) { todo!() }
}
