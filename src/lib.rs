//! shmbus: a message bus for the processes of one host.
//!
//! Publishers and subscribers share memory-mapped lock-free rings; a message costs a few cache-line transfers and no
//! system call. A coordinator hands out memory and identities and repairs what the dead leave behind; it is never on
//! a message's path.

// The models use the rings and nothing else.
#![cfg_attr(loom, allow(dead_code, missing_docs, unreachable_pub))]

#[cfg(not(loom))]
mod access;
#[cfg(not(loom))]
mod channel;
#[cfg(not(loom))]
mod client;
#[cfg(not(loom))]
pub mod coordinator;
#[cfg(not(loom))]
pub mod doctor;
mod error;
mod group;
#[cfg(not(loom))]
mod os;
#[cfg(not(loom))]
mod pattern;
mod ring;
mod shm;
mod sync;
mod topic;
#[cfg(not(loom))]
mod wait;

#[cfg(not(loom))]
pub use crate::{
    access::{Access, Right, Who},
    channel::{Channel, ChannelError},
    client::{
        Batch, BatchItem, Bus, BusOptions, Consumer, ConsumerBuilder, Deliveries, Delivery, Envelope, Failure,
        Incoming, Lease, Loan, Message, Messages, Outputs, OwnedDelivery, OwnedMessage, OwnedWildcardMessage, Pipeline,
        PipelineBuilder, Pollable, Publisher, Repeats, Reply, Requester, Responder, Route, RouteBuilder, RouteCounts,
        Runner, RunnerHandle, Start, Stopper, Subscriber, SubscriberBuilder, Waitable, WildcardBuilder,
        WildcardMessage, WildcardSubscriber, wait_any,
    },
    coordinator::protocol::{
        BlockedTopic, BlockingGroup, BusReport, ConsumerStatus, GroupStatus, LeaseStatus, NameStatus,
        ParticipantStatus, PublisherStatus, Purged, SubscriberStatus, TopicStatus,
    },
    group::{DEAD_LETTER_GROUP, GroupOptions, Guarantee},
    pattern::{check_pattern, is_pattern},
    ring::cursor::Readers,
    wait::Wait,
};
pub use crate::{
    error::{
        AckError, AttachError, ConnectError, EnvelopeError, GoneReason, Holder, NameError, OpenError, PipelineError,
        PublishError, RecvError, Refusal, ReplyError, RequestError, RouteError, RunnerError, SettleError,
        WildcardError,
    },
    ring::sequence::Sequence,
    topic::{
        Full, MAX_NAME_BYTES, MAX_PAYLOAD_ALIGN, Mode, Payload, Schema, Topic, TopicOptions, check_name, virtual_topic,
    },
};

#[cfg(all(feature = "async", not(loom)))]
pub use crate::client::{DeliveryStream, MessageStream};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;

/// The rings as the loom models see them; exists only under `--cfg loom`.
#[cfg(loom)]
#[allow(missing_docs)]
pub mod model {
    pub use crate::ring::arena::Arena;
    pub use crate::ring::cursor::{Cursor, CursorsHeader};
    pub use crate::ring::doorbell::{Armed, Doorbell, Hatch, arm_all, sleep_any, sleep_in_place_of_others};
    pub use crate::ring::exclusive::{ExclusiveLog, Poll, Reader, Writer};
    pub use crate::ring::gate::{Blocked, Gate, Policy, Stop, Want, still_retained};
    pub use crate::ring::ledger::{Ledger, LedgerHeader, MoveReason, RUN, Run, Seen, State as LedgerState, runs_in};
    pub use crate::ring::log::{LogHeader, Place, TopicState};
    pub use crate::ring::many::{Claim, Entry, ManyLog, Poll as ManyPoll, Reader as ManyReader, Writer as ManyWriter};
    pub use crate::ring::notes::Note;
    pub use crate::ring::slot::{Ring, Slot};
    pub use crate::ring::spsc::{Channel, ChannelHeader, End, Receiver, Sender};
    pub use crate::shm::shared::Shared;
}
