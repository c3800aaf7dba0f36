//! The control protocol: what clients and the coordinator say to each other over the Unix seqpacket socket.
//!
//! One packet is one [`Request`] or one [`Answer`], encoded with postcard; descriptors ride along as SCM_RIGHTS in the
//! order the answer's [`SegmentRef`]s give. A client has at most one request open at a time, so answers need no
//! number; [`Answer::ArenaAdded`] may come at any time, before the answer that is waited for.

use serde::{Deserialize, Serialize};

use crate::error::Refusal;
use crate::shm::layout::Geometry;
use crate::topic::{Schema, TopicOptions};

/// Bumped with every change of this file or of anything it refers to.
pub(crate) const PROTOCOL_VERSION: u32 = 2;

/// Largest packet in bytes, either way: room for a Hello that names every handle a process may hold.
pub(crate) const MAX_PACKET_BYTES: usize = 128 << 10;

/// Most descriptors in one packet.
pub(crate) const MAX_PACKET_FDS: usize = 128;

/// From a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// First packet of a connection. A returning participant names its incarnation and what it still holds;
    /// handles it does not name are released.
    Hello { protocol: u32, incarnation: Option<u64>, holds: Vec<HandleRef> },
    /// Creates a topic. With `exist_ok` an existing topic with the same options is fine.
    CreateTopic { topic: String, options: TopicOptions, exist_ok: bool },
    /// Removes a topic; `force` also while it is in use.
    RemoveTopic { topic: String, force: bool },
    /// Opens a publisher; `create` holds the options to create the topic with where it does not exist.
    OpenPublisher { topic: String, schema: Option<Schema>, create: Option<TopicOptions> },
    /// Opens a subscriber on an existing topic.
    OpenSubscriber { topic: String, schema: Option<Schema>, start: StartAt, droppable: bool },
    /// Gives handles back.
    Close { handles: Vec<HandleRef> },
    /// The state of one topic, or of all whose name is greater than `after` (a page at a time).
    Status { topic: Option<String>, after: Option<String> },
    /// Ends the bus.
    Stop,
    /// Who serves the bus, who is on it and who holds whom up.
    Report,
    /// The process has dropped its bus and every handle: whatever it holds is given back, and it is no participant any
    /// more. A connection that ends without it says nothing: only proof of death, or of an address space that is gone,
    /// releases what its process holds.
    Goodbye,
}

/// Where a subscriber starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum StartAt {
    Latest,
    Oldest,
    Last(u64),
    Sequence(u64),
}

/// A handle as both sides name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum HandleRef {
    Publisher { topic: u64, slot: u32 },
    Subscriber { topic: u64, cursor: u32 },
}

/// A segment whose descriptor rides along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SegmentRef {
    Log,
    Cursors,
    /// The arena of this publisher slot.
    Arena(u32),
    Channel,
}

/// What a handle must know of its topic; trusted, unlike anything in the segments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TopicInfo {
    pub(crate) id: u64,
    pub(crate) bus: u64,
    pub(crate) name: String,
    pub(crate) generation: u32,
    pub(crate) options: TopicOptions,
    pub(crate) geometry: Geometry,
}

/// From the coordinator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// To `Hello`.
    Welcome { protocol: u32, incarnation: u64, bus: u64 },
    /// To `CreateTopic`.
    Created { existed: bool },
    /// To `RemoveTopic`, `Close`, `Stop`.
    Done,
    /// To `OpenPublisher`. Segments: log, cursors, own arena (a channel: the channel segment alone).
    PublisherOpened { info: TopicInfo, slot: u32, publisher: u64, tenancy: u32, segments: Vec<SegmentRef> },
    /// To `OpenSubscriber`. Segments: log, cursors, every arena there is (a channel: the channel segment alone).
    /// It begins with the batch at `position`, whose first sequence may lie below the one asked for.
    SubscriberOpened {
        info: TopicInfo,
        cursor: u32,
        position: u64,
        sequence: u64,
        asked: u64,
        segments: Vec<SegmentRef>,
    },
    /// To `Status`, in the order of names. `more`: ask again `after` the last one.
    Status { topics: Vec<TopicStatus>, more: bool },
    /// To `Goodbye`: everything has been given back. The last packet of a connection.
    Farewell,
    /// To `Report`.
    Report(BusReport),
    /// The request was declined; nothing changed.
    Refused(Refusal),
    /// Unasked, to every participant with a subscriber on the topic: a new arena, its descriptor rides along.
    ArenaAdded { topic: u64, slot: u32 },
}

/// A bus as `shmbus doctor` looks at it. True at some moment while it was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BusReport {
    /// The coordinator's process.
    pub coordinator_pid: u32,
    /// The keeper's process; `None` where the bus is hosted on a thread, or while there is no keeper.
    pub keeper_pid: Option<u32>,
    /// Shared memory that each user may reserve.
    pub budget_bytes: u64,
    /// What the user with most of it has reserved.
    pub most_reserved_bytes: u64,
    /// Every process on the bus, in the order in which they came.
    pub participants: Vec<ParticipantStatus>,
    /// Topics whose publishers have no room, at most 64 of them.
    pub blocked: Vec<BlockedTopic>,
}

/// A process on the bus.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ParticipantStatus {
    /// Its number, never given twice on a bus.
    pub incarnation: u64,
    /// Its process, as the coordinator sees it.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Publishers and subscribers that it holds.
    pub handles: u32,
    /// Whether it has a connection. One without keeps its places; it comes back with its next request.
    pub connected: bool,
}

/// A topic whose publishers have no room, and who keeps it from them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlockedTopic {
    /// The topic.
    pub topic: String,
    /// Whether it is a channel.
    pub channel: bool,
    /// The cursor that is furthest behind.
    pub cursor: u32,
    /// Its process, as the coordinator sees it.
    pub pid: u32,
    /// The next sequence it will read.
    pub sequence: u64,
    /// How many sequences it is behind.
    pub lag: u64,
}

/// One topic as `ls` and `show` print it. Positions and sequences were true at some moment while it was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TopicStatus {
    /// The topic's number on its bus, never given twice.
    pub id: u64,
    /// The topic's name.
    pub name: String,
    /// What it was created with.
    pub options: TopicOptions,
    /// Oldest sequence that is still retained.
    pub oldest_sequence: u64,
    /// Next sequence to be published.
    pub tail_sequence: u64,
    /// Memory reserved for it.
    pub memory_bytes: u64,
    /// The publishers attached, by slot.
    pub publishers: Vec<PublisherStatus>,
    /// The subscribers attached, by cursor.
    pub subscribers: Vec<SubscriberStatus>,
}

/// One attached publisher.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PublisherStatus {
    /// Its slot, and thereby its arena.
    pub slot: u32,
    /// Its number, never given twice on a bus.
    pub publisher: u64,
    /// Its process.
    pub pid: u32,
}

/// One attached subscriber.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SubscriberStatus {
    /// Its cursor's number on the topic.
    pub cursor: u32,
    /// Its process.
    pub pid: u32,
    /// The next sequence it will read.
    pub sequence: u64,
    /// How many sequences it is behind.
    pub lag: u64,
    /// Whether it may be overtaken.
    pub droppable: bool,
}
