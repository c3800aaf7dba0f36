//! Finding a route's inputs: those that come later, those that cannot be any, and those that there was no room for.

use std::time::{Duration, Instant};

use super::{Leg, Route};
use crate::client::pipeline::{End, Pipeline};
use crate::client::subscriber::Start;
use crate::client::wildcard::Arrivals;
use crate::coordinator::protocol::TopicStatus;
use crate::error::{ConnectError, OpenError, Refusal, RouteError};
use crate::pattern::{is_pattern, matches};
use crate::topic::Topic;

/// How often to ask again whether a topic now has room for us; and how long not to ask a coordinator that did not answer.
const ROOM_LOOK: Duration = Duration::from_secs(10);

/// How long to wait for a part of the list of topics: inputs wait meanwhile, and come without the coordinator.
const LIST_PATIENCE: Duration = Duration::from_millis(500);

/// Topics opened before inputs have their turn again.
const LEGS_A_LOOK: usize = 16;

/// A topic that cannot be an input.
pub(super) struct PassedOver {
    /// The topic's number: one that is created anew is another one.
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) why: Refusal,
    /// When to try it again, where all that it lacks is room.
    pub(super) again_at: Option<Instant>,
}

impl PassedOver {
    pub(super) fn is_due(&self) -> bool {
        self.again_at.is_some_and(|at| at <= Instant::now())
    }
}

/// When topics are looked for.
#[derive(Clone, Copy)]
pub(super) enum When {
    /// While the route is opened: all that are there, and where their groups start.
    AtFirst(Start),
    /// Later, some at a time, from their first message on.
    Later,
}

impl Route {
    /// Opens a pipeline for each input topic that has come later, or for some and the others next time.
    pub(super) fn find_topics(&mut self) -> Result<(), RouteError> {
        if let Some(arrivals) = &mut self.arrivals {
            // Before the list, which then has them all.
            arrivals.take();
        }
        let has_ended = self.arrivals.as_ref().is_some_and(Arrivals::have_ended);
        let listed = match has_ended {
            // There is nothing else to come: why, the coordinator or its absence says.
            true => self.plan.bus.topics().map(Some),
            false => self.plan.bus.topics_within(LIST_PATIENCE),
        };
        let found = match listed {
            Ok(Some(topics)) => self.open_new(&topics).map(|()| true),
            Ok(None) => Ok(false),
            Err(error) => Err(error.into()),
        };
        let is_away = match &found {
            Ok(is_there) => !is_there,
            Err(RouteError::Open(error)) => may_come_back(error) && !has_ended,
            Err(_) => false,
        };
        if is_away {
            self.ask_later();
            return Ok(());
        }
        found.map(drop)
    }

    /// The coordinator does not answer. Inputs come without it.
    pub(super) fn ask_later(&mut self) {
        self.ask_at = Some(Instant::now() + ROOM_LOOK);
        self.has_more = true;
    }

    /// Opens a pipeline for each of these topics that is new, or for some and the others next time, and lets go of those that need
    /// not be held any more.
    pub(super) fn open_new(&mut self, topics: &[TopicStatus]) -> Result<(), RouteError> {
        self.ask_at = None;
        self.passed_over.retain(|topic| topics.iter().any(|there| there.id == topic.id));
        self.has_more = !self.open_legs(topics, When::Later)?;
        let Some(arrivals) = &mut self.arrivals else { return Ok(()) };
        // Our groups hold their messages now, but for those that memory lacked for, or whose turn is to come.
        let lacks = |topic: u64| self.passed_over.iter().find(|passed| passed.id == topic).map(|passed| &passed.why);
        let let_go = arrivals.release(|topic| match lacks(topic) {
            Some(why) => matches!(why, Refusal::Budget { .. }),
            None => self.has_more && !has_leg(&self.legs, topic),
        });
        // What took the room may have been the cursor that held the messages for us.
        let again =
            |topic: &&TopicStatus| let_go.contains(&topic.id) && matches!(lacks(topic.id), Some(Refusal::Limit { .. }));
        let again: Vec<&TopicStatus> = topics.iter().filter(again).collect();
        again.into_iter().try_for_each(|topic| self.open_leg(topic, When::Later))
    }

    /// Opens a pipeline for each of these that is an input topic and has none, or for some of them. Whether those are all.
    pub(super) fn open_legs(&mut self, topics: &[TopicStatus], when: When) -> Result<bool, RouteError> {
        let is_new = |topic: &&TopicStatus| {
            matches(&self.plan.from, &topic.name)
                && !has_leg(&self.legs, topic.id)
                && self.passed_over.iter().all(|passed| passed.id != topic.id || passed.is_due())
        };
        let new: Vec<&TopicStatus> = topics.iter().filter(is_new).collect();
        if !new.is_empty() {
            self.plan.check_loop(topics)?;
        }
        let count = match when {
            When::AtFirst(_) => new.len(),
            When::Later => new.len().min(LEGS_A_LOOK),
        };
        for topic in &new[..count] {
            self.open_leg(topic, when)?;
        }
        Ok(count == new.len())
    }

    fn open_leg(&mut self, topic: &TopicStatus, when: When) -> Result<(), RouteError> {
        let start = match when {
            When::AtFirst(start) => start,
            When::Later => Start::Oldest,
        };
        let least = Topic::<[u8]>::named(self.plan.to.as_str()).options().bytes;
        let opened = self.plan.open(&topic.name, least.max(topic.options.bytes), Some(start));
        self.take_leg(topic.id, topic.name.clone(), when, opened)
    }

    /// Takes from a topic from now on, or passes over it.
    pub(super) fn take_leg(
        &mut self,
        id: u64,
        name: String,
        when: When,
        opened: Result<Pipeline<[u8], [u8]>, (End, OpenError)>,
    ) -> Result<(), RouteError> {
        match opened {
            Ok(pipeline) => {
                self.passed_over.retain(|passed| passed.id != id);
                self.legs.push(Leg { topic: name, pipeline, refused: None });
            }
            // It was there a moment ago.
            Err((_, OpenError::Refused(Refusal::UnknownTopic { .. }))) if is_pattern(&self.plan.from) => {}
            Err((end, OpenError::Refused(why)))
                if is_pattern(&self.plan.from) && is_passed_over(&name, when, end, &why) =>
            {
                self.pass_over(id, name, why);
            }
            Err((_, error)) => return Err(error.into()),
        }
        Ok(())
    }

    fn pass_over(&mut self, id: u64, name: String, why: Refusal) {
        let lacks_room = matches!(why, Refusal::Limit { .. } | Refusal::Budget { .. });
        let again_at = lacks_room.then(|| Instant::now() + ROOM_LOOK);
        match self.passed_over.iter_mut().find(|passed| passed.id == id) {
            Some(passed) => (passed.why, passed.again_at) = (why, again_at),
            None => self.passed_over.push(PassedOver { id, name, why, again_at }),
        }
    }

    /// Takes nothing from a garbled topic any more. What it has not routed stays in the group.
    pub(super) fn give_up(&mut self, leg: usize, problem: &str) {
        let Leg { topic, pipeline, .. } = self.legs.remove(leg);
        let why = Refusal::Corrupt { topic: topic.clone(), problem: problem.to_owned() };
        self.pass_over(pipeline.consumer().place().0, topic, why);
    }
}

/// Whether a topic, by its number, is an input already.
fn has_leg(legs: &[Leg], topic: u64) -> bool {
    legs.iter().any(|leg| leg.pipeline.consumer().place().0 == topic)
}

/// Whether the coordinator was not there, and may be later.
pub(super) fn may_come_back(error: &OpenError) -> bool {
    let OpenError::Connect(error) = error else { return false };
    matches!(error, ConnectError::Timeout { .. } | ConnectError::NotRunning { .. } | ConnectError::Io { .. })
}

/// Whether the route goes on without this input: because of who created it, or because there is no room for one more. An output
/// that has no room for it is an error only to who opens the route.
fn is_passed_over(input: &str, when: When, refused: End, why: &Refusal) -> bool {
    match why {
        Refusal::NoRight { topic, .. }
        | Refusal::Options { topic, .. }
        | Refusal::Schema { topic, .. }
        | Refusal::GroupExists { topic, .. }
        | Refusal::UnknownGroup { topic, .. }
        | Refusal::GroupOptions { topic, .. }
        | Refusal::Corrupt { topic, .. } => topic == input,
        Refusal::Limit { .. } | Refusal::Budget { .. } => refused == End::Input || matches!(when, When::Later),
        _ => false,
    }
}
