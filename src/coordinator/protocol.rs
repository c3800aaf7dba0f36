//! The control protocol: what clients and the coordinator say to each other over the Unix seqpacket socket.
//!
//! One packet is one [`Request`] or one [`Answer`], encoded with postcard; descriptors ride along as SCM_RIGHTS in the
//! order the answer's [`SegmentRef`]s give. A request may be followed by a number, greater than any before it: then it is done once,
//! however often it is said, and answered as it was. A client has at most one request open at a time, so answers need no
//! number; [`Answer::ArenaAdded`], [`Answer::WildcardTopic`], [`Answer::WildcardMissed`] and [`Answer::WildcardTold`] may come at any time, before the
//! answer that is waited for.

use serde::{Deserialize, Serialize};

use crate::access::Access;
use crate::error::Refusal;
use crate::group::GroupOptions;
use crate::shm::layout::Geometry;
use crate::topic::{Schema, TopicOptions};

/// Bumped with every change of this file or of anything it refers to.
pub(crate) const PROTOCOL_VERSION: u32 = 7;

/// Largest packet in bytes, either way: room for a Hello that names every handle a process may hold.
pub(crate) const MAX_PACKET_BYTES: usize = 128 << 10;

/// Most descriptors in one packet.
pub(crate) const MAX_PACKET_FDS: usize = 128;

/// From a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// First packet of a connection. A returning participant names its incarnation and what it still holds;
    /// handles it does not name are released, but for the cursors of a wildcard subscription that it names: those it is
    /// told of again. A newcomer is known by its `token`, a number that it has chosen at random: where the answer to its Hello was lost
    /// it says it again, and is the same.
    Hello { protocol: u32, token: u64, incarnation: Option<u64>, holds: Vec<HandleRef> },
    /// Creates a topic. With `exist_ok` an existing topic with the same options is fine. An `ephemeral` one is removed when
    /// the participant that created it leaves or dies. `access`: who else may use it; `None`: nobody, or of one that exists
    /// whoever may.
    CreateTopic { topic: String, options: TopicOptions, access: Option<Access>, exist_ok: bool, ephemeral: bool },
    /// Removes a topic; `force` also while it is in use.
    RemoveTopic { topic: String, force: bool },
    /// Opens a publisher; `create` holds the options to create the topic with where it does not exist.
    /// Under an `identity` it goes on where the last publisher of that identity ended, and takes its place.
    OpenPublisher { topic: String, schema: Option<Schema>, create: Option<TopicOptions>, identity: Option<Identity> },
    /// Opens a subscriber on an existing topic.
    OpenSubscriber { topic: String, schema: Option<Schema>, start: StartAt, droppable: bool },
    /// Creates a group. With `exist_ok` an existing one with the same options is fine.
    CreateGroup { topic: String, group: String, options: GroupOptions, start: StartAt, exist_ok: bool },
    /// Removes a group; `force` also while it has consumers, which are fenced.
    RemoveGroup { topic: String, group: String, force: bool },
    /// Lets a group begin elsewhere; `force` also while it has consumers, which are fenced.
    RewindGroup { topic: String, group: String, start: StartAt, force: bool },
    /// Opens a consumer; `create` says how to create the group where it does not exist.
    OpenConsumer { topic: String, group: String, schema: Option<Schema>, create: Option<(GroupOptions, StartAt)> },
    /// A consumer of the group holds what is overdue: fence it on its output topics and release what it holds.
    Reclaim { topic: u64, group: u32, consumer: u32 },
    /// Opens a subscriber on every topic the pattern stands for, those to come included; existing topics from `start` on.
    OpenWildcard { pattern: String, schema: Option<Schema>, start: StartAt, droppable: bool },
    /// Gives handles back.
    Close { handles: Vec<HandleRef> },
    /// Gives up every message that no gating reader holds.
    Purge { topic: String },
    /// The state of one topic, or of all whose name is greater than `after` (a page at a time).
    Status { topic: Option<String>, after: Option<String> },
    /// The named publishers of a topic whose name is greater than `after` (a page at a time).
    Names { topic: String, after: Option<String> },
    /// To `Present`: segments of a topic, by the names that the keeper gives them; their descriptors ride along.
    Present { info: TopicInfo, names: Vec<String> },
    /// To `Present`: a wildcard subscription's notice; its descriptor rides along.
    PresentNotice { wildcard: u64 },
    /// To `Present`: that was all. `maps_more`: it maps segments of these topics of which it has kept no descriptor.
    AllPresented { maps_more: bool },
    /// Ends the bus.
    Stop,
    /// Who serves the bus, who is on it and who holds whom up.
    Report,
    /// The process has dropped its bus and every handle: whatever it holds is given back, and it is no participant any
    /// more. A connection that ends without it says nothing: only proof of death, or of an address space that is gone,
    /// releases what its process holds.
    Goodbye,
}

impl Request {
    /// Its packet. `once`: the number under which it is done once; 0: it is done as often as it is said.
    pub(crate) fn to_packet(&self, once: u64) -> postcard::Result<Vec<u8>> {
        let mut bytes = postcard::to_stdvec(self)?;
        if once > 0 {
            bytes.extend(postcard::to_stdvec(&once)?);
        }
        Ok(bytes)
    }

    /// What a packet says, and its number.
    pub(crate) fn from_packet(bytes: &[u8]) -> postcard::Result<(Request, u64)> {
        let (request, rest) = postcard::take_from_bytes(bytes)?;
        Ok((request, if rest.is_empty() { 0 } else { postcard::from_bytes(rest)? }))
    }
}

/// Who a publisher is, across processes and restarts: the numbers it gives its messages go on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Identity {
    /// A name that a program chose. Its numbers are dense.
    Named(String),
    /// What a group's consumer publishes for the messages it consumes. Its numbers are inputs of `topic`, see
    /// [`input_number`], the last of which is the newest input whose outputs are all there.
    Origin { topic: u64, group: u32, consumer: u32 },
}

/// The number under which an origin's publisher publishes for the input with this sequence: 0 is for none.
pub(crate) fn input_number(sequence: u64) -> u64 {
    sequence.wrapping_add(1)
}

/// Where a subscriber starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum StartAt {
    Latest,
    Oldest,
    /// Like `Oldest`, for a reader that looks for something: what it has passed it has not read.
    Scan,
    Last(u64),
    Sequence(u64),
}

/// A handle as both sides name it. Consumers come first in their order: they are released before the publishers that say
/// what they had finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum HandleRef {
    Consumer {
        topic: u64,
        group: u32,
        consumer: u32,
    },
    Publisher {
        topic: u64,
        slot: u32,
    },
    Subscriber {
        topic: u64,
        cursor: u32,
    },
    /// A wildcard subscription with all its subscribers.
    Wildcard {
        wildcard: u64,
    },
}

impl HandleRef {
    /// The topic that it is on; a wildcard subscription is on none, its subscribers are.
    pub(crate) fn topic(&self) -> Option<u64> {
        match *self {
            HandleRef::Consumer { topic, .. }
            | HandleRef::Publisher { topic, .. }
            | HandleRef::Subscriber { topic, .. } => Some(topic),
            HandleRef::Wildcard { .. } => None,
        }
    }
}

/// A segment whose descriptor rides along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SegmentRef {
    Log,
    Cursors,
    /// Cursors of which one is used, by a subscriber that may share none: nobody scans them, and nobody rings there.
    OwnCursors,
    /// The arena of this publisher slot.
    Arena(u32),
    Channel,
    Ledger,
}

/// What a consumer must know of its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupInfo {
    /// The group's number on its topic, never given twice: a rewound group has a new one.
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) options: GroupOptions,
    /// Its cursor's line: where the floor stands for publishers.
    pub(crate) cursor: u32,
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
    /// To `CreateTopic`, `CreateGroup`.
    Created { existed: bool },
    /// To `RemoveTopic`, `RemoveGroup`, `RewindGroup`, `Reclaim`, `Close`, `Stop`.
    Done,
    /// To `OpenPublisher`. Segments: log, cursors, own arena (a channel: the channel segment alone); under an identity, and where ids
    /// are compared, also every other arena there is, read-only. `opening` is never given twice, `publisher` goes with the identity.
    PublisherOpened {
        info: TopicInfo,
        slot: u32,
        publisher: u64,
        opening: u64,
        tenancy: u32,
        /// Under an identity: the number committed last, 0 for none.
        last_number: Option<u64>,
        segments: Vec<SegmentRef>,
    },
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
    /// To `OpenConsumer`. Segments: log, cursors, ledger, every arena there is. `position` and `sequence` are a place at or
    /// below the group's floor.
    ConsumerOpened {
        info: TopicInfo,
        group: GroupInfo,
        consumer: u32,
        position: u64,
        sequence: u64,
        segments: Vec<SegmentRef>,
    },
    /// To `Purge`.
    Purged(Purged),
    /// To `Status`, in the order of names. `more`: ask again `after` the last one.
    Status { topics: Vec<TopicStatus>, more: bool },
    /// To `Names`, in the order of names. `more`: ask again `after` the last one.
    Names { names: Vec<NameStatus>, more: bool },
    /// To `Goodbye`: everything has been given back. The last packet of a connection.
    Farewell,
    /// To `Report`.
    Report(BusReport),
    /// The request was declined; nothing changed.
    Refused(Refusal),
    /// To `Hello`, before the welcome: present the segments of these topics and the notices of these wildcard subscriptions, as
    /// far as you have them. The coordinator is new and has lost them, or has given the topics up.
    Present { topics: Vec<u64>, wildcards: Vec<u64> },
    /// Unasked, to every participant that reads the topic as subscriber or consumer (where ids are compared its publishers do,
    /// too): a new arena, its descriptor rides along.
    ArenaAdded { topic: u64, slot: u32 },
    /// To `OpenWildcard`, after the `WildcardTopic` of every existing topic. The notice's descriptor rides along.
    WildcardOpened { wildcard: u64 },
    /// Unasked, to a wildcard subscription's owner: a subscriber on one more topic, as in `SubscriberOpened`. It is the
    /// `told`-th topic of the subscription.
    WildcardTopic {
        wildcard: u64,
        told: u64,
        info: TopicInfo,
        cursor: u32,
        position: u64,
        sequence: u64,
        segments: Vec<SegmentRef>,
    },
    /// Unasked, to a wildcard subscription's owner: what would have been the `told`-th topic of the subscription is none of them.
    WildcardMissed { wildcard: u64, told: u64, topic: String, why: Refusal },
    /// Unasked, to a participant that came back: of its wildcard subscription's topics it has the first `told` now.
    WildcardTold { wildcard: u64, told: u64 },
}

/// What a purge did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Purged {
    /// Oldest sequence that was retained before.
    pub oldest_before: u64,
    /// Oldest sequence that is retained now.
    pub oldest_sequence: u64,
    /// Next sequence to be published.
    pub tail_sequence: u64,
    /// Who holds what has stayed, by its cursor, as `show` prints it; `None` where nobody did.
    pub holder: Option<u32>,
    /// The holder's process, where it is a connected subscriber.
    pub holder_pid: Option<u32>,
    /// The holder's name, where it is a group.
    pub holder_group: Option<String>,
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
    /// Places that it holds: publishers, subscribers, consumers, wildcard subscriptions.
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
    /// Its process, as the coordinator sees it: the subscriber's, or that of the consumer with the group's oldest lease. 0
    /// where a group is behind and nobody has a lease on what it waits for.
    pub pid: u32,
    /// The next sequence it will read; a group's floor.
    pub sequence: u64,
    /// How many sequences it is behind.
    pub lag: u64,
    /// The group whose cursor it is; `None`: a subscriber's.
    pub group: Option<BlockingGroup>,
}

/// A group that holds a full ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlockingGroup {
    /// Its name.
    pub name: String,
    /// How many consumers it has.
    pub consumers: u32,
    /// Messages on their way to the dead-letter topic.
    pub moving: u64,
    /// The lease on the lowest unsettled message; `None` where nobody has one.
    pub oldest_lease: Option<LeaseStatus>,
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
    /// The user who created it.
    pub owner: u32,
    /// Who may use it besides its owner and root.
    pub access: Access,
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
    /// The groups, by name.
    pub groups: Vec<GroupStatus>,
}

/// One group of a topic.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GroupStatus {
    /// Its number on the topic; a rewound group has a new one.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Its cursor's number on the topic, by which a publisher that meets `Full` names it.
    pub cursor: u32,
    /// What it was created with.
    pub options: GroupOptions,
    /// The lowest sequence it has not settled.
    pub floor: u64,
    /// How many sequences lie between the floor and the tail.
    pub lag: u64,
    /// How many messages may be handed out above the floor.
    pub window: u64,
    /// Leased messages.
    pub in_flight: u64,
    /// Messages that were given back and wait for their next delivery.
    pub returned: u64,
    /// Messages on their way to the dead-letter topic.
    pub moving: u64,
    /// Deliveries that were not the first, since the group was created.
    pub redelivered: u64,
    /// Messages whose time-to-live ended before they were delivered.
    pub expired: u64,
    /// Messages that went to the dead-letter topic.
    pub dead_lettered: u64,
    /// Who holds the floor, if it is leased.
    pub oldest_lease: Option<LeaseStatus>,
    /// The consumers, by number.
    pub consumers: Vec<ConsumerStatus>,
}

/// One lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LeaseStatus {
    /// The message.
    pub sequence: u64,
    /// The consumer's number in the group.
    pub consumer: u32,
    /// Its process.
    pub pid: u32,
    /// Which delivery this is.
    pub attempt: u32,
    /// Milliseconds until the lease ends; 0: it has ended.
    pub ends_in_ms: u64,
}

/// One connected consumer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ConsumerStatus {
    /// Its number in the group.
    pub consumer: u32,
    /// Its process.
    pub pid: u32,
    /// Messages it has leased.
    pub in_flight: u64,
    /// Exclusive groups: whether it is the one at work.
    pub active: bool,
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

/// One named publisher, attached or not.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NameStatus {
    /// Its name.
    pub name: String,
    /// The publisher's number, as its messages carry it.
    pub publisher: u64,
    /// The number of the message it committed last; 0 for none. True at some moment while the answer was made.
    pub last_number: u64,
    /// The slot of the publisher that has the name now; `None` while nobody has.
    pub slot: Option<u32>,
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
