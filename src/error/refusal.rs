//! What the coordinator declines.

use serde::{Deserialize, Serialize};

use super::open::NameError;
#[cfg(not(loom))]
use crate::access::Right;

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
