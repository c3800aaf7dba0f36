//! What can happen to a bus; the registry is a sequence of these.

use serde::{Deserialize, Serialize};

use super::PublisherEntry;
use crate::access::{Access, Who};
use crate::coordinator::protocol::{GroupInfo, HandleRef, Identity, StartAt, TopicInfo};
use crate::error::Refusal;
use crate::os::pidfd::Birth;
use crate::topic::Schema;

/// Everything that can happen to the state. What the registry holds is a sequence of these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Event {
    /// First event of a registry: the bus, and whether it stays when nobody needs it.
    Began { bus: u64, stay: bool },
    /// The users who may connect, besides root and who runs the bus.
    Allowed { users: Vec<Who> },
    /// Ids below these have been given away (part of a compacted registry).
    Given { participants: u64, topics: u64, publishers: u64 },
    /// The same for wildcard subscriptions.
    WildcardsGiven { wildcards: u64 },
    /// A process connected.
    Joined { incarnation: u64, pid: u32, uid: u32, gids: Vec<u32> },
    /// Which process a participant is, beside its number: proof of its death for a coordinator that has no descriptor of it.
    /// Its `token` is what it has called itself in its Hello.
    Recognized { incarnation: u64, birth: Birth, token: u64 },
    /// What a participant asked for under a number, and the event that grants it; without one, it was the last that was granted
    /// (part of a compacted registry).
    Once { incarnation: u64, number: u64, event: Option<Box<Event>> },
    /// A process left or died; everything it held has been released.
    Left { incarnation: u64 },
    /// A topic exists. `publishers` of it have been there (0, but for a compacted registry). It goes with its `owner`.
    TopicCreated {
        info: TopicInfo,
        uid: u32,
        access: Access,
        bytes: u64,
        publishers: u64,
        kept: bool,
        owner: Option<u64>,
    },
    /// Inode numbers of a topic's segments by their names: what is presented for one of them must be this one.
    SegmentsKnown { topic: u64, inodes: Vec<(String, u64)> },
    /// It is gone, with all its handles.
    TopicRemoved { topic: u64 },
    /// A publisher slot got its arena.
    ArenaAdded { topic: u64, slot: u32, bytes: u64 },
    /// A publisher holds a slot, and its identity, if it has one.
    PublisherOpened { topic: u64, slot: u32, opened: PublisherEntry },
    /// An identity exists on a topic; what it committed last (part of a compacted registry).
    IdentityKnown { topic: u64, identity: Identity, publisher: u64, last_number: u64 },
    /// A publisher is to be fenced: somebody else asked for its identity. Who reads this and finds its identity not settled
    /// does it (again).
    Fenced { topic: u64, slot: u32 },
    /// A publisher has lost its identity, whose last number is this: it is fenced, dead, or has left.
    IdentitySettled { topic: u64, slot: u32, last_number: u64 },
    /// A subscriber holds a cursor, perhaps for a wildcard subscription. With `own` its cursor lies in a segment of its own, of so
    /// many bytes.
    SubscriberOpened {
        topic: u64,
        cursor: u32,
        incarnation: u64,
        start: StartAt,
        droppable: bool,
        wildcard: Option<u64>,
        own: Option<u64>,
    },
    /// A group exists, in the place of the one it `replaces` (a rewind), which is retired.
    GroupCreated { topic: u64, info: GroupInfo, start: StartAt, bytes: u64, replaces: Option<u32> },
    /// A group has lost its name: it was removed. It goes with its last consumer.
    GroupRetired { topic: u64, group: u32 },
    /// Groups below this number have been on the topic (part of a compacted registry).
    GroupsGiven { topic: u64, groups: u32 },
    /// A consumer holds its number in the group.
    ConsumerOpened { topic: u64, group: u32, consumer: u32, incarnation: u64 },
    /// A wildcard subscription exists. `opened` cursors were opened for it (0, but for a compacted registry).
    WildcardOpened {
        wildcard: u64,
        incarnation: u64,
        pattern: String,
        schema: Option<Schema>,
        start: StartAt,
        droppable: bool,
        opened: u64,
    },
    /// A wildcard subscription does not get a topic that it stands for. Its `number` among the subscription's topics: the next,
    /// or, of a compacted registry, the one that it had.
    WildcardMissed { wildcard: u64, number: Option<u64>, topic: u64, name: String, why: Refusal },
    /// Inode number of a wildcard subscription's notice, as of a topic's segments.
    NoticeKnown { wildcard: u64, inode: u64 },
    /// A handle was given back.
    Closed { handle: HandleRef },
    /// The bus stays from now on, also when nobody needs it.
    Stays,
    /// The bus ends: nothing is granted any more, and whoever reads this finishes it.
    Ending,
}

impl Event {
    /// What happens, whoever asked for it.
    pub(crate) fn plain(&self) -> &Event {
        match self {
            Event::Once { event: Some(event), .. } => event,
            event => event,
        }
    }
}
