//! Errors: one enum an operation, each with what was expected, what was found and what to do.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[cfg(not(loom))]
use crate::access::Right;
use crate::ring::sequence::Sequence;
use crate::topic::Schema;

/// A topic or bus name that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing was given.
    #[error("the name is empty; use letters, digits, '-', '_' and dots, as in md.ticks")]
    Empty,
    /// More bytes than allowed.
    #[error("the name has {found} bytes; at most {max} are allowed")]
    TooLong {
        /// Bytes given.
        found: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// A character outside the allowed set.
    #[error("the name contains {character:?}; use letters, digits, '-', '_' and dots, as in md.ticks")]
    Character {
        /// The first such character.
        character: char,
    },
    /// A wildcard that is not a whole token, or `>` before the end.
    #[error("a wildcard stands for whole parts: '*' for one, '>' at the end for one or more, as in orders.*.>")]
    Wildcard,
    /// A dot at the start or end, or two in a row.
    #[error("the name has an empty part between dots; write it as in md.ticks")]
    EmptyToken,
    /// ActiveMQ's name for what a group has of a virtual topic, which is no topic of its own.
    #[error("the name stands for a group of a topic, as Consumer.GROUP.TOPIC; name the topic, VirtualTopic.X, itself")]
    Queue,
}

/// Why the bus could not be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The bus name cannot be used.
    #[error("bus name {name:?}: {source}")]
    Name {
        /// The name given.
        name: String,
        /// What is wrong with it.
        source: NameError,
    },
    /// No coordinator runs and none may be started.
    #[error("no coordinator serves bus {bus:?} at {path}; start one with `shmbus serve` or allow spawning")]
    NotRunning {
        /// The bus.
        bus: String,
        /// Its socket.
        path: PathBuf,
    },
    /// The socket or its directory may not be used.
    #[error("{path}: {problem}; {mend}")]
    Refused {
        /// Socket or directory.
        path: PathBuf,
        /// What was found.
        problem: String,
        /// What to do.
        mend: &'static str,
    },
    /// A coordinator was started but did not answer.
    #[error("bus {bus:?}: the coordinator did not answer within {waited_ms} ms; look at `shmbus doctor`")]
    Timeout {
        /// The bus.
        bus: String,
        /// How long was waited.
        waited_ms: u64,
    },
    /// The coordinator speaks another version.
    #[error(
        "the coordinator speaks protocol {found}, this program {expected}; run the same shmbus version on both sides"
    )]
    Version {
        /// Ours.
        expected: u32,
        /// Theirs.
        found: u32,
    },
    /// The other side broke the control protocol.
    #[error("the control connection is garbled: {0}")]
    Garbled(String),
    /// A bus opened before a fork was used in the child.
    #[error("this bus was opened by process {opened_by}, before a fork; open it again in the child (process {pid})")]
    Forked {
        /// The process that opened it.
        opened_by: u32,
        /// The process that used it.
        pid: u32,
    },
    /// The bus that this program was connected to has ended.
    #[error("bus {bus:?} has ended since it was opened; open it and its handles again")]
    Ended {
        /// The bus.
        bus: String,
    },
    /// The coordinator declined the connection.
    #[error(transparent)]
    Declined(Refusal),
    /// Another process serves the bus already.
    #[error("bus {bus:?} is served already; end it with `shmbus stop` or choose another --bus")]
    AlreadyServed {
        /// The bus.
        bus: String,
    },
    /// An operating system error.
    #[error("{context}: {source}")]
    Io {
        /// What was tried.
        context: String,
        /// What the system said.
        source: io::Error,
    },
}

impl ConnectError {
    /// Wraps an operating system error with what was being done.
    pub(crate) fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        ConnectError::Io { context: context.into(), source: source.into() }
    }
}

/// A request the coordinator understood and declined.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Refusal {
    /// The name cannot be used.
    #[error("topic {name:?}: {source}")]
    Name {
        /// As given (shortened where longer than allowed).
        name: String,
        /// What is wrong.
        source: NameError,
    },
    /// No such topic.
    #[error("unknown topic {topic:?}; create it with `shmbus create {topic}` or publish to it")]
    UnknownTopic {
        /// The name asked for.
        topic: String,
    },
    /// The topic exists already, with other options.
    #[error(
        "topic {topic:?} exists with other options: {difference}; remove it with `shmbus rm {topic}` or use it as it is"
    )]
    Exists {
        /// The topic.
        topic: String,
        /// The first difference, as "messages is 4096, asked for 16".
        difference: String,
    },
    /// The topic exists already, and the caller wanted to be the one to create it.
    #[error("topic {topic:?} exists already; use it, or remove it with `shmbus rm {topic}`")]
    AlreadyExists {
        /// The topic.
        topic: String,
    },
    /// Options that cannot work.
    #[error("topic {topic:?}: {problem}")]
    Options {
        /// The topic.
        topic: String,
        /// What is wrong and what would work.
        problem: String,
    },
    /// The topic carries another type.
    #[error("topic {topic:?} carries {expected}, this handle {found}")]
    Schema {
        /// The topic.
        topic: String,
        /// What it was created with, or "raw bytes".
        expected: String,
        /// What the caller opened it with.
        found: String,
    },
    /// An exclusive topic or channel has its publisher, or a channel its subscriber.
    #[error(
        "topic {topic:?} is {mode} and has its {role} (process {pid}); wait for it to end, or create the topic for many"
    )]
    Taken {
        /// The topic.
        topic: String,
        /// "exclusive" or "a channel".
        mode: String,
        /// "publisher" or "subscriber".
        role: String,
        /// Who holds it (as seen by the coordinator).
        pid: u32,
    },
    /// The user lacks a right on the topic.
    #[cfg(not(loom))]
    #[error(
        "user {uid} may not {right} on topic {topic:?}; its owner, user {owner}, or root grants that by creating it with \
             --allow {right}={uid}"
    )]
    NoRight {
        /// The topic.
        topic: String,
        /// What it takes.
        right: Right,
        /// Who asked.
        uid: u32,
        /// Who created the topic.
        owner: u32,
    },
    /// The user may subscribe, but hold no publisher back.
    #[error(
        "user {uid} may only subscribe on topic {topic:?}, and so not hold publishers back: {mend}; or user {owner} or \
             root creates it with --allow consume={uid}"
    )]
    SubscribeOnly {
        /// The topic.
        topic: String,
        /// Who asked.
        uid: u32,
        /// Who created the topic.
        owner: u32,
        /// What works without another right.
        mend: String,
    },
    /// A topic of this name would get what fails in somebody else's group.
    #[error(
        "topic {topic:?} is where group {group:?} of topic {origin:?} sends its dead letters, which user {uid} may not have: \
         choose another name, or user {owner} or root lets him consume there (`create {origin} --allow consume={uid}`)"
    )]
    OthersLetters {
        /// The topic that was to be created.
        topic: String,
        /// The topic whose messages go there.
        origin: String,
        /// By way of this group.
        group: String,
        /// Who asked.
        uid: u32,
        /// Who created the origin.
        owner: u32,
    },
    /// The bus does not let this user in.
    #[error("user {uid} may not use this bus; user {host}, who runs it, lets him in with `shmbus serve --allow {uid}`")]
    NotAllowed {
        /// Who asked.
        uid: u32,
        /// Who runs the bus.
        host: u32,
    },
    /// Only root and who runs the bus may do it.
    #[error("user {uid} may not stop this bus; user {host}, who runs it, or root may")]
    NotHost {
        /// Who asked.
        uid: u32,
        /// Who runs the bus.
        host: u32,
    },
    /// A limit is reached.
    #[error("limit reached: {what} is {limit}; {mend}")]
    Limit {
        /// Which limit, as "subscribers of topic \"a\"".
        what: String,
        /// Its value.
        limit: u64,
        /// What to do.
        mend: String,
    },
    /// The byte budget does not allow it.
    #[error(
        "topic {topic:?} needs {needed} bytes of memory and {available} of the budget of {budget} are left; \
             create it with fewer --bytes, remove topics, or raise SHMBUS_BUDGET"
    )]
    Budget {
        /// The topic.
        topic: String,
        /// Bytes asked for.
        needed: u64,
        /// Bytes left.
        available: u64,
        /// The whole budget.
        budget: u64,
    },
    /// The group's name cannot be used.
    #[error("group {name:?}: {source}")]
    GroupName {
        /// As given (shortened where longer than allowed).
        name: String,
        /// What is wrong.
        source: NameError,
    },
    /// No such group.
    #[error("topic {topic:?} has no group {group:?}; create it, or open a consumer with the options to create it with")]
    UnknownGroup {
        /// The topic.
        topic: String,
        /// The name asked for.
        group: String,
    },
    /// The group exists already, with other options.
    #[error("topic {topic:?} has a group {group:?} with other options: {difference}; remove it or use it as it is")]
    GroupExists {
        /// The topic.
        topic: String,
        /// The group.
        group: String,
        /// The first difference, as "lease is 30000 ms, asked for 5000 ms".
        difference: String,
    },
    /// The group exists already, and the caller wanted to be the one to create it.
    #[error("topic {topic:?} has a group {group:?} already; use it, or remove it")]
    GroupAlreadyExists {
        /// The topic.
        topic: String,
        /// The group.
        group: String,
    },
    /// Options of a group that cannot work, or not on this topic.
    #[error("group {group:?} of topic {topic:?}: {problem}")]
    GroupOptions {
        /// The topic.
        topic: String,
        /// The group.
        group: String,
        /// What is wrong and what would work.
        problem: String,
    },
    /// Another consumer took over what this one held too long, or its group was rewound or removed.
    #[error(
        "consumer {consumer} of group {group:?} of topic {topic:?} is fenced: its lease ended, or its group; open it again"
    )]
    ConsumerFenced {
        /// The topic.
        topic: String,
        /// The group.
        group: String,
        /// Its number in the group.
        consumer: u32,
    },
    /// The group has consumers, which would lose it.
    #[error("group {group:?} of topic {topic:?} is in use by {}; end its consumers or use force", processes(.pids))]
    GroupInUse {
        /// The topic.
        topic: String,
        /// The group.
        group: String,
        /// Connected consumers.
        consumers: u32,
        /// Their processes (as seen by the coordinator).
        pids: Vec<u32>,
    },
    /// The name's present publisher lives and cannot be fenced, because the ring is full.
    #[error(
        "topic {topic:?}: {holder} holds the whole ring, so the name's present publisher cannot be fenced; let it read on"
    )]
    FullForFence {
        /// The topic.
        topic: String,
        /// Who holds the ring.
        holder: String,
    },
    /// The topic is in use.
    #[error(
        "topic {topic:?} has {publishers} publishers, {subscribers} subscribers and {consumers} consumers; \
             end them or use --force"
    )]
    InUse {
        /// The topic.
        topic: String,
        /// Attached publishers.
        publishers: u32,
        /// Attached subscribers.
        subscribers: u32,
        /// Attached consumers of its groups.
        consumers: u32,
    },
    /// The start position lies outside what is there.
    #[error("topic {topic:?} has no sequence {asked} yet; its next is {tail}")]
    BeyondTail {
        /// The topic.
        topic: String,
        /// Asked for.
        asked: u64,
        /// The topic's next sequence.
        tail: u64,
    },
    /// A shared segment holds values that no correct process writes.
    #[error("topic {topic:?} is corrupt: {problem}; remove it with `shmbus rm --force {topic}`")]
    Corrupt {
        /// The topic.
        topic: String,
        /// What was found.
        problem: String,
    },
    /// The incarnation a returning program names is not that of this process on this bus.
    #[error(
        "this bus does not know incarnation {incarnation} of this process; it was started anew: open the bus again"
    )]
    UnknownParticipant {
        /// As given.
        incarnation: u64,
    },
    /// The caller named a handle it does not hold, or asked for something out of turn.
    #[error("the request breaks the control protocol: {problem}; run the same shmbus version on both sides")]
    Protocol {
        /// What was found.
        problem: String,
    },
    /// The bus lost both its processes, and what this process presented of a topic is not what belongs there.
    #[error("topic {topic:?} cannot be taken up from this process: its segment {segment:?} was refused: {problem}")]
    Presented {
        /// The topic.
        topic: String,
        /// Which of its segments.
        segment: String,
        /// What was expected, and what was found.
        problem: String,
    },
    /// The coordinator is going away; the client library tries again by itself.
    #[error("the coordinator is leaving; try again")]
    Leaving,
    /// The operating system refused.
    #[error("{context}: {problem}")]
    System {
        /// What was tried.
        context: String,
        /// What the system said.
        problem: String,
    },
}

/// Processes as an error names them: a few, and how many more there are.
fn processes(pids: &[u32]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = pids.iter().take(SHOWN).map(u32::to_string).collect();
    let more = pids.len().saturating_sub(SHOWN);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("process{} {}{tail}", if pids.len() == 1 { "" } else { "es" }, shown.join(", "))
}

/// A segment that is not what it was promised to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The descriptor is smaller than the smallest segment.
    #[error("segment of {found} bytes; at least {min} expected")]
    TooSmall {
        /// Bytes found.
        found: u64,
        /// Smallest possible.
        min: u64,
    },
    /// Not a segment of this project.
    #[error("not a shmbus segment: magic {found:#018x}, expected {expected:#018x}")]
    Magic {
        /// Found.
        found: u64,
        /// Expected.
        expected: u64,
    },
    /// Written by another version.
    #[error("segment layout version {found}, this program reads {expected}; run the same shmbus version on both sides")]
    Version {
        /// Found.
        found: u32,
        /// Expected.
        expected: u32,
    },
    /// A header field differs from what was promised.
    #[error("segment field `{field}` is {found}, expected {expected}")]
    Field {
        /// Which field.
        field: &'static str,
        /// Found.
        found: u64,
        /// Expected.
        expected: u64,
    },
    /// The segment could shrink under its readers.
    #[error("the segment is not sealed against resizing (seals {found:#x}, expected at least {expected:#x})")]
    NotSealed {
        /// Found.
        found: u32,
        /// Expected.
        expected: u32,
    },
    /// An operating system error.
    #[error("{context}: {source}")]
    Io {
        /// What was tried.
        context: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a handle could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The coordinator could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The coordinator declined.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// What it handed out is not what it promised.
    #[error("cannot attach: {0}")]
    Attach(#[from] AttachError),
}

/// Why a message was not published. Whatever the error, no reader will see the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The ring is full and a reader holds it.
    #[error("the ring is full: {holder} holds sequence {held}")]
    Full {
        /// Who holds it back.
        holder: Holder,
        /// The oldest sequence (position, on topics with many publishers) it has not released.
        held: u64,
    },
    /// The message can never fit.
    #[error("message of {found} bytes; the topic takes at most {max} (create it with --bytes to take more)")]
    TooLarge {
        /// Bytes given.
        found: u64,
        /// Most the topic takes.
        max: u64,
    },
    /// Raw bytes on a typed topic, of the wrong size.
    #[error("message of {found} bytes; the topic carries {expected}")]
    WrongSize {
        /// Bytes given.
        found: u64,
        /// What the topic carries.
        expected: Schema,
    },
    /// More messages in one batch than a batch may have, or none.
    #[error("batch of {found} messages; 1 to {max} are allowed")]
    BatchSize {
        /// Messages given.
        found: usize,
        /// Most allowed.
        max: usize,
    },
    /// The envelope does not go with the topic, or is too long.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// The topic was removed or the bus stopped.
    #[error("the topic is gone: {0}")]
    Gone(GoneReason),
    /// Shared memory holds values that no correct process writes.
    #[error("the topic's shared memory is corrupt: {0}")]
    Corrupt(&'static str),
    /// The publisher's number, or the message's id, has been published already; it was not published again.
    #[error("published already{}", .sequence.map_or(String::new(), |sequence| format!(" as sequence {sequence}")))]
    Duplicate {
        /// Where it is; `None` where the topic no longer retains it.
        sequence: Option<Sequence>,
    },
    /// Numbers are dense: this is not the next one.
    #[error("number {found} leaves a gap; the publisher's next number is {expected}")]
    NumberGap {
        /// The next number.
        expected: u64,
        /// The number given.
        found: u64,
    },
    /// A batch whose first messages have been published and whose last ones have not. A batch is all or nothing, so none
    /// of it was published: give the rest as a batch of its own.
    #[error(
        "the batch begins with number {found}, but all up to number {} are published already; begin with {expected}",
        expected - 1
    )]
    BatchOverlap {
        /// The next number.
        expected: u64,
        /// The number given for the batch's first message.
        found: u64,
    },
    /// Another publisher has been opened under this one's name; this handle publishes nothing any more.
    #[error("fenced: another publisher has taken the name")]
    Fenced,
    /// A `publish_timeout` ran out.
    #[error("timed out: {holder} holds sequence {held}")]
    TimedOut {
        /// Who holds the ring.
        holder: Holder,
        /// The oldest sequence (position, on topics with many publishers) it has not released.
        held: u64,
    },
    /// The handle was opened by this process's parent, before it forked.
    #[error(
        "this handle was opened by process {opened_by}, before a fork; open the bus again in the child (process {pid})"
    )]
    Forked {
        /// The process that opened it.
        opened_by: u32,
        /// The process that used it.
        pid: u32,
    },
}

/// An envelope that cannot be published.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvelopeError {
    /// The topic was created without envelopes.
    #[error(
        "the topic carries no key, id, headers or time-to-live; create it with --envelope (`Topic::envelope`), \
             or publish without them"
    )]
    LeanTopic,
    /// The key, id or headers are too long.
    #[error("{part} of {found} bytes; a message takes at most {max}")]
    TooLong {
        /// "a key", "an id", "headers".
        part: &'static str,
        /// Bytes given; of headers, bytes they have when encoded.
        found: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The envelopes of a batch are too long together.
    #[error("envelopes of {found} bytes in one batch; it takes at most {max}, publish it in parts")]
    Batch {
        /// Bytes of all envelopes.
        found: u64,
        /// Bytes allowed for a batch of so many messages.
        max: u64,
    },
}

/// Why a pipeline's step did not come to its end. The input is not lost: it goes back to its group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// No input was received.
    #[error(transparent)]
    Recv(#[from] RecvError),
    /// The outputs were not published. After [`PublishError::Fenced`] open another pipeline.
    #[error("publishing the outputs: {0}")]
    Publish(#[from] PublishError),
    /// The input could not be settled.
    #[error("settling the input: {0}")]
    Ack(#[from] AckError),
}

/// Why a route was not opened, or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// What the route puts into its output would come back to it.
    #[error("routing {from} to {to} would never end: {path}")]
    Loop {
        /// Topic or pattern.
        from: String,
        /// The output topic.
        to: String,
        /// By what it would come back, and what to do about it.
        path: String,
    },
    /// A topic cannot be read or written.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// An input was not routed.
    #[error("route from topic {topic:?}: {source}")]
    Step {
        /// The input's topic.
        topic: String,
        /// What happened.
        source: PipelineError,
    },
}

/// Who holds a full ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holder {
    /// A subscriber: its cursor's number on the topic (as `shmbus show` prints it).
    Subscriber(u32),
    /// A group that has not settled it: its number on the topic (as `shmbus show` prints it, with who holds the lease).
    Group(u32),
    /// Nobody reads, and the topic was created with `hold`.
    Hold,
    /// A channel's receiver has not read on.
    Receiver,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Holder::Subscriber(n) => write!(f, "subscriber {n}"),
            Holder::Group(n) => write!(f, "group {n}"),
            Holder::Hold => f.write_str("the topic's hold option"),
            Holder::Receiver => f.write_str("the channel's receiver"),
        }
    }
}

/// Why a request brought no reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Nobody reads the topic, or the last who did has left without a reply. In the latter case the request may have been
    /// worked on.
    #[error("nobody responds on topic {topic:?}; start a responder")]
    NoResponder {
        /// The request topic.
        topic: String,
    },
    /// No reply came in time. The request may be worked on yet.
    #[error("no reply on topic {topic:?} within {limit:?}")]
    DeadlineExceeded {
        /// The request topic.
        topic: String,
        /// How long was waited.
        limit: std::time::Duration,
    },
    /// The request was not published.
    #[error("the request was not sent: {0}")]
    Publish(#[from] PublishError),
    /// The inbox cannot be read any more: open another requester.
    #[error("the inbox for replies: {0}")]
    Inbox(RecvError),
}

/// Why a reply was not delivered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplyError {
    /// The message carries no address to reply to, or one that is no inbox.
    #[error("the message is no request: it names no inbox to reply to")]
    NoAddress,
    /// The requester has left.
    #[error("the requester has left")]
    Gone,
    /// Its inbox takes no reply, or none of this size.
    #[error("the requester's inbox: {0}")]
    Publish(PublishError),
    /// Its inbox cannot be opened.
    #[error("the requester's inbox: {0}")]
    Open(OpenError),
}

/// Why a wildcard subscriber received nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WildcardError {
    /// Messages of one topic were overwritten before they were read. The next receive goes on; this topic continues at `to`.
    #[error("topic {topic:?}: lost sequences {from}..{to}: the ring had overwritten them")]
    Lagged {
        /// The topic.
        topic: String,
        /// First lost sequence.
        from: Sequence,
        /// First sequence that is still there.
        to: Sequence,
    },
    /// The timeout ran out.
    #[error("nothing came within the time given")]
    TimedOut,
    /// The bus was stopped, and everything readable has been read.
    #[error("the topics are gone: {0}")]
    Gone(GoneReason),
    /// One topic's shared memory holds values that no correct process writes. The subscription goes on without it.
    #[error("topic {topic:?}: its shared memory is corrupt: {problem}; remove it with `shmbus rm --force {topic}`")]
    Corrupt {
        /// The topic.
        topic: String,
        /// What was found.
        problem: &'static str,
    },
    /// One topic's segments are not what was promised. The subscription goes on without it.
    #[error("topic {topic:?}: cannot attach: {source}")]
    Attach {
        /// The topic.
        topic: String,
        /// What is wrong.
        source: AttachError,
    },
    /// A topic that the pattern stands for is none of the subscription's: there was no room for it, in the topic, in what this
    /// process or user may have, or in the coordinator. Its messages are missed. The subscription goes on without it.
    #[error("topic {topic:?} is missed: {why}")]
    Missed {
        /// The topic.
        topic: String,
        /// What there was no room in.
        why: Refusal,
    },
    /// New topics were announced, and the coordinator that has them cannot be reached any more; or the handle was used in a
    /// forked child ([`ConnectError::Forked`]).
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

impl WildcardError {
    /// Why nothing can come after it, if that is so. What concerns one topic is not the others' end.
    pub(crate) fn end(&self) -> Option<RecvError> {
        match self {
            WildcardError::Gone(reason) => Some(RecvError::Gone(*reason)),
            WildcardError::Connect(ConnectError::Forked { opened_by, pid }) => {
                Some(RecvError::Forked { opened_by: *opened_by, pid: *pid })
            }
            _ => None,
        }
    }
}

/// How a topic went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GoneReason {
    /// `shmbus rm`.
    #[error("it was removed")]
    Removed,
    /// `shmbus stop`.
    #[error("the bus was stopped")]
    Stopped,
    /// A channel's other end was dropped.
    #[error("the other end is closed")]
    Closed,
}

/// Why nothing was received.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// Messages were overwritten before they were read. The next receive continues at `to`.
    #[error("lost sequences {from}..{to}: the ring had overwritten them")]
    Lagged {
        /// First lost sequence.
        from: Sequence,
        /// First sequence that is still there.
        to: Sequence,
    },
    /// The timeout ran out.
    #[error("nothing came within the time given")]
    TimedOut,
    /// The topic was removed or the bus stopped, and everything readable has been read.
    #[error("the topic is gone: {0}")]
    Gone(GoneReason),
    /// Shared memory holds values that no correct process writes.
    #[error("the topic's shared memory is corrupt: {0}")]
    Corrupt(&'static str),
    /// The consumer may not take messages any more.
    #[error("this consumer is fenced: its group was rewound or removed, or its leases were reclaimed; open it again")]
    Fenced,
    /// The handle was opened by this process's parent, before it forked.
    #[error(
        "this handle was opened by process {opened_by}, before a fork; open the bus again in the child (process {pid})"
    )]
    Forked {
        /// The process that opened it.
        opened_by: u32,
        /// The process that used it.
        pid: u32,
    },
}

impl RecvError {
    /// Whether nothing can come after it: another receive would say so again.
    pub(crate) fn is_final(&self) -> bool {
        !matches!(self, RecvError::Lagged { .. } | RecvError::TimedOut)
    }
}

/// What a [`Runner`](crate::Runner) has come upon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunnerError {
    /// Nothing can come from this handle any more; it is not served any longer.
    #[error("{handle} is not served any more: {source}")]
    Ended {
        /// Topic, pattern or group.
        handle: String,
        /// Why.
        source: RecvError,
    },
    /// A handler was done with a message, and settling it failed: its lease had ended, so another consumer gets it, or has it.
    /// Longer leases, or `extend`, prevent that.
    #[error("{handle}: message {sequence} was handled, but could not be settled: {source}")]
    NotSettled {
        /// The group.
        handle: String,
        /// The message.
        sequence: Sequence,
        /// Why.
        source: AckError,
    },
}

/// Why waiting for a group has ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettleError {
    /// The timeout ran out.
    #[error("the group has not settled the message within the time given")]
    TimedOut,
    /// The topic has no such group (any more).
    #[error("the topic has no group of this name; create it, or look at `shmbus show`")]
    NoGroup,
    /// The topic was removed or the bus stopped.
    #[error("the topic is gone: {0}")]
    Gone(GoneReason),
    /// The coordinator could not be asked for the group.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The handle was opened by this process's parent, before it forked.
    #[error(
        "this handle was opened by process {opened_by}, before a fork; open the bus again in the child (process {pid})"
    )]
    Forked {
        /// The process that opened it.
        opened_by: u32,
        /// The process that used it.
        pid: u32,
    },
}

/// Why an ack, nack, reject or extend changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AckError {
    /// The lease had ended and the message was given to another consumer, or back to the group.
    #[error("the lease on sequence {sequence} is lost: it had ended and the message was given away")]
    LeaseLost {
        /// The message.
        sequence: Sequence,
    },
    /// It was to be extended, but it had ended, and there is no room for it any more: as many others are in flight as may be.
    /// It is as it was: until somebody else gets the message it can still be settled or given back.
    #[error(
        "the lease on sequence {sequence} had ended, and as many messages are in flight as may be; it was not extended"
    )]
    Ended {
        /// The message.
        sequence: Sequence,
    },
    /// This very lease was used up before, or the group settles messages when it hands them out.
    #[error("sequence {sequence} was settled before with this lease")]
    AlreadySettled {
        /// The message.
        sequence: Sequence,
    },
    /// The lease was given to another consumer handle.
    #[error("the lease on sequence {sequence} was given to another consumer; use it there")]
    Foreign {
        /// The message.
        sequence: Sequence,
    },
    /// The handle was opened by this process's parent, before it forked.
    #[error(
        "this handle was opened by process {opened_by}, before a fork; open the bus again in the child (process {pid})"
    )]
    Forked {
        /// The process that opened it.
        opened_by: u32,
        /// The process that used it.
        pid: u32,
    },
    /// The consumer's leases are void.
    #[error("this consumer is fenced: its group was rewound or removed, or its leases were reclaimed; open it again")]
    Fenced,
    /// The topic was removed or the bus stopped.
    #[error("the topic is gone: {0}")]
    Gone(GoneReason),
}
