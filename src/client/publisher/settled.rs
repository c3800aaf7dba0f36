//! Waiting until a group has settled what was published.

use std::thread;
use std::time::{Duration, Instant};

use super::port::Port;
use super::{Publisher, PublisherCore};
use crate::client::bus::unexpected;
use crate::client::held::Held;
use crate::client::write::WritePort;
use crate::coordinator::protocol::{Answer, Request};
use crate::error::SettleError;
use crate::ring::sequence::Sequence;
use crate::topic::Payload;
use crate::wait;

/// How long to wait for a group's line to be in force before the coordinator is asked again: at first, and after that twice as
/// long each time. Who may write the line could have it asked without end.
const GROUP_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_GROUP_PAUSE: Duration = Duration::from_millis(100);

/// How long the coordinator is waited for in any case, so that who looks and does not wait finds the group.
const LEAST_PATIENCE: Duration = Duration::from_millis(250);

/// A group's line among the cursors.
pub(super) struct GroupLine {
    name: String,
    group: u32,
    cursor: u32,
}

impl<T: Payload + ?Sized> Publisher<T> {
    /// Waits until a group has settled the message with this sequence and all before it: acknowledged, or moved to the
    /// dead-letter topic.
    ///
    /// Consumers say so in steps; at the latest when they next receive or settle something, or find nothing to receive. The first
    /// wait for a group asks the coordinator, for up to 250 ms where `limit` is shorter.
    ///
    /// # Errors
    /// [`SettleError`]
    pub fn wait_settled(&mut self, group: &str, sequence: Sequence, limit: Duration) -> Result<(), SettleError> {
        self.core.wait_settled(group, sequence.get(), limit)
    }
}

impl PublisherCore {
    fn wait_settled(&mut self, group: &str, sequence: u64, limit: Duration) -> Result<(), SettleError> {
        if !self.home.is_here() {
            return Err(SettleError::Forked { opened_by: self.home.pid(), pid: std::process::id() });
        }
        let start = Instant::now();
        let deadline = start.checked_add(limit);
        let ask_until = deadline.map(|deadline| deadline.max(start + LEAST_PATIENCE));
        let mut group_pause = GROUP_PAUSE;
        loop {
            let line = match self.groups.iter().position(|line| line.name == group) {
                Some(index) => index,
                None => self.find_group(group, ask_until)?,
            };
            // Consumers raise their line in steps; whoever waits wants what they have settled already.
            self.space_bell().urge();
            let poll = |core: &mut PublisherCore| {
                if let Some(reason) = with_port!(&core.port, port => port.gone()) {
                    return Some(Err(SettleError::Gone(reason)));
                }
                match core.settled_below(&core.groups[line]) {
                    Some(below) => (below > sequence).then_some(Ok(true)),
                    None => Some(Ok(false)),
                }
            };
            match wait::until(self, self.wait, deadline, |core| core.space_bell(), poll) {
                Some(Ok(true)) => return Ok(()),
                // Rewound or removed: the coordinator knows which. Or garbled: then it says the same as before.
                Some(Ok(false)) => {
                    drop(self.groups.swap_remove(line));
                    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                    if left.is_some_and(|left| left.is_zero()) {
                        return Err(SettleError::TimedOut);
                    }
                    thread::sleep(left.map_or(group_pause, |left| left.min(group_pause)));
                    group_pause = (group_pause * 2).min(LONGEST_GROUP_PAUSE);
                }
                Some(Err(error)) => return Err(error),
                None => return Err(SettleError::TimedOut),
            }
        }
    }

    /// `None`: the group that we knew by this name has ended.
    fn settled_below(&self, line: &GroupLine) -> Option<u64> {
        let cursor = with_port!(&self.port, port => port.cursors()).get(line.cursor as usize)?;
        cursor.settled_below(line.group.into())
    }

    /// Asks the coordinator where a group's line is.
    fn find_group(&mut self, group: &str, deadline: Option<Instant>) -> Result<usize, SettleError> {
        let control = self.held.as_ref().map(Held::control).ok_or(SettleError::NoGroup)?;
        let request = Request::Status { topic: Some(self.name.clone()), after: None };
        let (answer, _) = match deadline {
            Some(deadline) => control.request_until(&request, deadline)?.ok_or(SettleError::TimedOut)?,
            None => control.request(&request)?,
        };
        let Answer::Status { topics, .. } = answer else { return Err(unexpected(&answer).into()) };
        let found = topics.into_iter().flat_map(|topic| topic.groups).find(|found| found.name == group);
        let found = found.ok_or(SettleError::NoGroup)?;
        self.groups.push(GroupLine { name: found.name, group: found.id, cursor: found.cursor });
        Ok(self.groups.len() - 1)
    }
}
