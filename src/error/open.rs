//! Names, reaching the bus, opening handles.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::refusal::Refusal;

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
    /// Descriptors were lost on their way: the kernel drops those for which a process has no room.
    #[error("{found} of {expected} descriptors came; this process may have no more open: raise its limit (ulimit -n)")]
    Descriptors {
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
