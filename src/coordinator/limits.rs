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

/// How long the coordinator looks after the memory of topics before it serves the connections again: what is left is for its next look.
/// One topic's or group's part is done in one go, so it may become a few times as long.
pub(crate) const LOOK: Duration = Duration::from_millis(2);

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
    /// Descriptors that wait in the coordinator for processes of one user to read.
    pub(crate) user_queued_fds: usize,
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
            user_queued_fds: usize::MAX,
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
        let budget_bytes = given.unwrap_or_else(half);
        Limits { budget_bytes, ..Limits::default().within(process::descriptor_limit()) }
    }

    /// What one user may have of `descriptors`, so that he leaves some to others: five eighths for segments, less than a quarter for
    /// processes, each of which takes up to four (two connections, its pidfd and its address space), and a little for what his
    /// processes do not read.
    fn within(self, descriptors: u64) -> Limits {
        let count = |descriptors: u64| usize::try_from(descriptors).unwrap_or(usize::MAX);
        let participants = self.participants.min(count(descriptors / 16).max(8));
        let user_participants = self.user_participants.min(participants - (participants / 42).max(1));
        let (user_segments, user_queued_fds) = (count(descriptors / 8 * 5), count(descriptors / 16));
        Limits { participants, user_participants, user_segments, user_queued_fds, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_leaves_descriptors_to_others() {
        for descriptors in [256, 1024, 4096, 20_000, 1 << 19] {
            let limits = Limits::default().within(descriptors);
            let taken = limits.user_segments + 4 * limits.user_participants + limits.user_queued_fds;
            assert!((taken as u64) < descriptors, "{descriptors}: {limits:?}");
            assert!(limits.user_participants < limits.participants);
        }
        let many = Limits::default().within(1 << 19);
        assert_eq!((many.participants, many.user_participants), (1024, 1000));
    }
}
