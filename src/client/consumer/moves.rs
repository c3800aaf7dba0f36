//! Moving messages to the dead-letter topic: word → moving (owner), copy published, word → settled.

use std::collections::VecDeque;

use super::core::Core;
use crate::coordinator::protocol::GroupInfo;
use crate::os::clock;
use crate::ring::ledger::Seen;
use crate::shm::topic::SharedInfo;

/// What this consumer is moving.
pub(super) struct Moves {
    topic: String,
    queue: VecDeque<Move>,
}

struct Move {
    seen: Seen,
    /// What the program said when it rejected the message.
    text: Option<String>,
}

impl Moves {
    pub(super) fn new(info: &SharedInfo, group: &GroupInfo) -> Self {
        let topic = group.options.dead_letter_topic(&info.name, &group.name);
        Moves { topic, queue: VecDeque::new() }
    }

    /// Notes a move that has begun.
    pub(super) fn add(&mut self, seen: Seen, text: Option<&str>) {
        self.queue.push_back(Move { seen, text: text.map(str::to_owned) });
    }
}

impl Core {
    pub(super) fn work_off_moves(&mut self) {}
}
