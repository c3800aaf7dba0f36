//! Every limit of the coordinator, in one place. Those of a topic's options are in `shm/layout.rs` and `topic.rs`.

use std::time::Duration;

use crate::os::{memory_size, process};

/// Environment variable that sets the byte budget of each user.
pub(crate) const BUDGET_VARIABLE: &str = "SHMBUS_BUDGET";

/// How long a bus without participants and messages waits for someone before it goes away.
pub(crate) const LINGER: Duration = Duration::from_millis(200);

/// How often the due times of all ledgers are looked at, so that none comes round: they must be at least once a day
/// (`ring::ledger::Ledger::renew_due`).
pub(crate) const RENEW_DUE: Duration = Duration::from_secs(6 * 3600);

/// Answers that may wait for one client that does not read; one more and it is disconnected.
pub(crate) const MAX_QUEUED_PACKETS: usize = 1024;

/// Topics in one page of a status answer, at most (its bytes are limited too).
pub(crate) const MAX_STATUS_TOPICS: usize = 256;

/// Groups of one topic, those included that were rewound or removed while consumers were connected. With
/// [`MAX_CONSUMERS_OF_TOPIC`] it keeps the status of one topic in one packet.
pub(crate) const MAX_GROUPS_OF_TOPIC: usize = 64;

/// Consumers of one topic's groups together. One group has at most `ring::ledger::MAX_CONSUMERS`.
pub(crate) const MAX_CONSUMERS_OF_TOPIC: usize = 1024;

/// Names of publishers that a topic remembers, and as many identities of consumers that publish.
pub(crate) const MAX_IDENTITIES: usize = 1024;

/// Names in one page of an answer: each has 200 bytes at most, so they fit in a packet.
pub(crate) const MAX_PAGE_NAMES: usize = 256;

/// What the state machine checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Connected processes.
    pub(crate) participants: usize,
    /// Those of one user; the rest is for others.
    pub(crate) user_participants: usize,
    /// Topics.
    pub(crate) topics: usize,
    /// Those of one user.
    pub(crate) user_topics: usize,
    /// Segments of one user: each is a descriptor of the coordinator and one of the keeper.
    pub(crate) user_segments: usize,
    /// Publishers, subscribers and consumers of one process.
    pub(crate) handles: usize,
    /// Wildcard subscriptions of one process. Their subscribers count as handles.
    pub(crate) wildcards: usize,
    /// Shared memory of one user.
    pub(crate) budget_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            participants: 1024,
            user_participants: 1000,
            topics: 16_384,
            user_topics: 16_000,
            user_segments: usize::MAX,
            handles: 16_384,
            wildcards: 16,
            budget_bytes: u64::MAX,
        }
    }
}

impl Limits {
    /// The defaults with the budget of bytes from the environment, or half of what is available, `reserved_bytes` included: a
    /// restarted coordinator must not count against itself what the bus holds already.
    pub(crate) fn from_environment(reserved_bytes: u64) -> Limits {
        let given = std::env::var(BUDGET_VARIABLE).ok().and_then(|text| text.trim().parse().ok());
        let half = || memory_size::available_bytes().saturating_add(reserved_bytes) / 2;
        // What is left is for connections and pidfds.
        let descriptors = process::descriptor_limit();
        let user_segments = usize::try_from(descriptors - descriptors / 4).unwrap_or(usize::MAX);
        Limits { budget_bytes: given.unwrap_or_else(half), user_segments, ..Limits::default() }
    }
}
