//! From where to where: names, loops, and how a pipeline from one input is opened.

use std::collections::BTreeSet;

use crate::client::bus::Bus;
use crate::client::pipeline::{End, Pipeline};
use crate::client::subscriber::Start;
use crate::coordinator::protocol::TopicStatus;
use crate::error::{OpenError, Refusal, RouteError};
use crate::group::GroupOptions;
use crate::pattern::{check_pattern, is_pattern, matches};
use crate::topic::{Topic, check_name};

/// What routes' groups are called: this, and the output topic.
pub(super) const GROUP_PREFIX: &str = "route.";

/// From where to where.
pub(super) struct Plan {
    pub(super) bus: Bus,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) group: String,
    pub(super) options: GroupOptions,
}

impl Plan {
    pub(super) fn check_names(&self) -> Result<(), OpenError> {
        let bad = |name: &str, source| Refusal::Name { name: name.to_owned(), source };
        check_pattern(&self.from).map_err(|source| bad(&self.from, source))?;
        check_name(&self.to).map_err(|source| bad(&self.to, source))?;
        Ok(())
    }

    /// The existing topics that are inputs.
    pub(super) fn topics(&self) -> Result<Vec<TopicStatus>, OpenError> {
        let mut topics = self.bus.topics()?;
        if !is_pattern(&self.from) && topics.iter().all(|topic| topic.name != self.from) {
            // The coordinator's own words about it.
            topics.push(self.bus.topic(&self.from)?);
        }
        Ok(topics)
    }

    /// Refuses what would come back to one of its inputs by routes whose groups have the default names.
    pub(super) fn check_loop(&self, topics: &[TopicStatus]) -> Result<(), RouteError> {
        let refused = |path| RouteError::Loop { from: self.from.clone(), to: self.to.clone(), path };
        if matches(&self.from, &self.to) {
            return Err(refused(format!("{:?} is one of its inputs", self.to)));
        }
        let (mut seen, mut open) = (BTreeSet::new(), vec![self.to.as_str()]);
        while let Some(name) = open.pop() {
            let groups = topics.iter().filter(|topic| topic.name == name).flat_map(|topic| &topic.groups);
            for next in groups.filter_map(|group| group.name.strip_prefix(GROUP_PREFIX)) {
                if matches(&self.from, next) {
                    let mend = format!("if that is over, `shmbus group rm {name} {GROUP_PREFIX}{next}`");
                    return Err(refused(format!("from topic {name:?} there is a route to {next:?}; {mend}")));
                }
                if seen.insert(next) {
                    open.push(next);
                }
            }
        }
        Ok(())
    }

    /// A pipeline from one topic; `start` where its group may be created.
    pub(super) fn open(
        &self,
        topic: &str,
        bytes: u64,
        start: Option<Start>,
    ) -> Result<Pipeline<[u8], [u8]>, (End, OpenError)> {
        let to = Topic::<[u8]>::named(self.to.as_str()).envelope().bytes(bytes);
        let pipeline = self.bus.pipeline(Topic::<[u8]>::named(topic), self.group.as_str(), to);
        match start {
            Some(start) => pipeline.options(self.options.clone()).start(start).open_ends(),
            None => pipeline.existing().open_ends(),
        }
    }
}
