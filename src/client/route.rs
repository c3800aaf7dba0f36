//! [`Route`]: copies messages from topics to a topic, filtered and transformed.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use crate::client::bus::Bus;
use crate::client::consumer::Delivery;
use crate::client::envelope::Envelope;
use crate::client::pipeline::{End, Failure, Outputs, Pipeline};
use crate::client::subscriber::Start;
use crate::client::wildcard::Arrivals;
use crate::coordinator::protocol::TopicStatus;
use crate::error::{
    AckError, ConnectError, GoneReason, OpenError, PipelineError, PublishError, RecvError, Refusal, RouteError,
};
use crate::group::GroupOptions;
use crate::pattern::{check_pattern, is_pattern, matches};
use crate::ring::doorbell::Doorbell;
use crate::shm::shared::Shared;
use crate::topic::{Topic, check_name};
use crate::wait::{self, Look, Wait};

/// What comes due within this time is waited for awake, so to say: with short naps.
const SOON: Duration = Duration::from_millis(10);

/// How often to ask again whether a topic now has room for us; and how long not to ask a coordinator that did not answer.
const ROOM_LOOK: Duration = Duration::from_secs(10);

/// How long to wait for a part of the list of topics: inputs wait meanwhile, and come without the coordinator.
const LIST_PATIENCE: Duration = Duration::from_millis(500);

/// Topics opened before inputs have their turn again.
const LEGS_A_LOOK: usize = 16;

/// What routes' groups are called: this, and the output topic.
const GROUP_PREFIX: &str = "route.";

/// Decides whether an input is routed.
type Filter = Box<dyn FnMut(&Delivery<'_, [u8]>) -> bool + Send>;

/// Makes outputs of an input.
type Transform = Box<dyn FnMut(&Delivery<'_, [u8]>, &mut Outputs<[u8]>) -> Result<(), Failure> + Send>;

/// Copies the messages of a topic, or of all topics of a pattern, to another topic; each once, whoever dies.
///
/// It is a [`Pipeline`] for each input topic, in a group of that topic: several routes with the same group share the work,
/// and the group holds the messages while no route runs. Where both topics have envelopes a copy keeps key, id and
/// headers, behind two headers of its own, `origin-topic` and `origin-sequence`. What can never be published (too large, say)
/// goes to the group's dead-letter topic; an id that the output topic has had already is not published again.
///
/// Topics that come later are routed from their first message on: until the route has its group there, a cursor of a wildcard
/// subscription holds what is published on them. Whoever creates a topic has no part in the others: one that a pattern stands for,
/// and that cannot be an input, is passed over ([`Route::passed_over`]).
pub struct Route {
    plan: Plan,
    legs: Vec<Leg>,
    filters: Vec<Filter>,
    transform: Option<Transform>,
    counts: RouteCounts,
    /// The input that was taken last.
    last: Option<u64>,
    /// Which leg is asked first.
    turn: usize,
    /// Where topics may come later: of a pattern.
    arrivals: Option<Arrivals>,
    /// Whether there were more than one look opens.
    has_more: bool,
    /// The coordinator did not answer: it is not asked before.
    ask_at: Option<Instant>,
    passed_over: Vec<PassedOver>,
}

/// A topic that cannot be an input.
struct PassedOver {
    /// The topic's number: one that is created anew is another one.
    id: u64,
    name: String,
    why: Refusal,
    /// When to try it again, where all that it lacks is room.
    again_at: Option<Instant>,
}

impl PassedOver {
    fn is_due(&self) -> bool {
        self.again_at.is_some_and(|at| at <= Instant::now())
    }
}

/// How a route is to be opened; ends with [`RouteBuilder::open`].
#[must_use]
pub struct RouteBuilder {
    plan: Plan,
    start: Start,
    filters: Vec<Filter>,
    transform: Option<Transform>,
}

/// What a route has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouteCounts {
    /// Inputs whose outputs are published.
    pub routed: u64,
    /// Inputs that a filter kept back.
    pub filtered: u64,
    /// Inputs that went to the dead-letter topic.
    pub rejected: u64,
    /// Inputs whose id the output topic has had already.
    pub duplicates: u64,
    /// How often it was fenced and began anew.
    pub reopened: u64,
    /// Topics that the pattern stands for and that it does not take from now, because they cannot be inputs of it; see
    /// [`Route::passed_over`].
    pub passed_over: u64,
}

/// From where to where.
struct Plan {
    bus: Bus,
    from: String,
    to: String,
    group: String,
    options: GroupOptions,
}

/// When topics are looked for.
#[derive(Clone, Copy)]
enum When {
    /// While the route is opened: all that are there, and where their groups start.
    AtFirst(Start),
    /// Later, some at a time, from their first message on.
    Later,
}

/// Why a route woke up.
enum Woken {
    /// A leg has an input, or says why it will have none.
    Input(usize, Result<(), RecvError>),
    /// Topics have come, and there is no input; or a moment to look at is sooner than was planned.
    LookAgain,
}

/// What a route waits on.
struct Sources<'a> {
    legs: &'a mut Vec<Leg>,
    arrivals: Option<&'a Arrivals>,
    has_more: bool,
    may_ask: bool,
}

impl Sources<'_> {
    fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        into.extend(self.arrivals.map(Arrivals::bell));
        into.extend(self.legs.iter().map(|leg| leg.pipeline.consumer().shared_bell()));
    }

    /// Whether topics have come. That the bus has ended its topics say, where there are any.
    fn has_news(&self) -> bool {
        let has_ended = self.legs.is_empty() && self.arrivals.is_some_and(Arrivals::have_ended);
        has_ended || self.may_ask && (self.has_more || self.arrivals.is_some_and(Arrivals::has_news))
    }

    /// The earliest moment at which an input comes due, as far as is known.
    fn next_due(&self) -> Option<Instant> {
        let naps = self.legs.iter().filter_map(|leg| leg.pipeline.consumer().nap());
        naps.min().and_then(|nap| Instant::now().checked_add(nap))
    }

    /// Takes an input, beginning with the leg whose turn it is; if there is none, says whether there is news.
    fn look(&mut self, turn: usize, planned: Option<Instant>) -> Look<Woken> {
        let count = self.legs.len();
        for index in (0..count).map(|at| (turn + at) % count) {
            match self.legs[index].pipeline.consumer_mut().take() {
                Ok(true) => return Look::Found(Woken::Input(index, Ok(()))),
                Ok(false) => {}
                Err(error) => return Look::Found(Woken::Input(index, Err(error))),
            }
        }
        if self.has_news() {
            return Look::Found(Woken::LookAgain);
        }
        if self.legs.iter().any(|leg| leg.pipeline.consumer().has_left_off()) {
            return Look::Within(Duration::ZERO);
        }
        match self.next_due() {
            None => Look::Nothing,
            Some(due) if due <= Instant::now() + SOON => Look::Within(wait::MOMENT),
            // The clock that leases end by is coarse, so that the same moment seems to come a little sooner or later.
            Some(due) if planned.is_none_or(|planned| due + SOON < planned) => Look::Found(Woken::LookAgain),
            Some(_) => Look::Nothing,
        }
    }
}

/// One input topic.
struct Leg {
    topic: String,
    pipeline: Pipeline<[u8], [u8]>,
    /// An input that can never be published, which comes again, and why.
    refused: Option<(u64, String)>,
}

impl Bus {
    /// A route from a topic, or from all topics of a pattern, to a topic; to be opened with `.open()`. The output topic is
    /// created, with envelopes, where it does not exist.
    pub fn route(&self, from: impl Into<String>, to: impl Into<String>) -> RouteBuilder {
        let (from, to) = (from.into(), to.into());
        let group = format!("{GROUP_PREFIX}{to}");
        let plan = Plan { bus: self.clone(), from, to, group, options: GroupOptions::new().effectively_once() };
        RouteBuilder { plan, start: Start::default(), filters: Vec::new(), transform: None }
    }
}

impl RouteBuilder {
    /// The group on each input topic (default `route.` and the output topic). Loops are recognized by the default names
    /// alone.
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.plan.group = group.into();
        self
    }

    /// The options with which groups are created where they do not exist (default: effectively once).
    pub fn options(mut self, options: GroupOptions) -> Self {
        self.plan.options = options;
        self
    }

    /// Where groups start where they do not exist (default [`Start::Latest`]).
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Routes only what `filter` says yes to; the rest is settled. Of several filters all must say yes.
    pub fn filter(mut self, filter: impl FnMut(&Delivery<'_, [u8]>) -> bool + Send + 'static) -> Self {
        self.filters.push(Box::new(filter));
        self
    }

    /// Publishes what `transform` makes of an input in its place: any number of messages, all or none. Envelopes are its
    /// own matter then. It may run more than once for an input, its outputs count once.
    pub fn transform(
        mut self,
        transform: impl FnMut(&Delivery<'_, [u8]>, &mut Outputs<[u8]>) -> Result<(), Failure> + Send + 'static,
    ) -> Self {
        self.transform = Some(Box::new(transform));
        self
    }

    /// Opens it. When this returns, the groups of all topics there are hold every message from their start on.
    ///
    /// # Errors
    /// [`RouteError::Loop`], as far as it can be seen; an input topic that is named does not exist, or cannot have groups (those of
    /// a pattern are passed over then); the output topic is not for many publishers.
    pub fn open(self) -> Result<Route, RouteError> {
        let RouteBuilder { plan, start, filters, transform } = self;
        let counts = RouteCounts::default();
        plan.check_names()?;
        let topics = plan.topics()?;
        plan.check_loop(&topics)?;
        let arrivals = if is_pattern(&plan.from) { Some(Arrivals::open(&plan.bus, &plan.from)?) } else { None };
        let (legs, passed_over) = Default::default();
        let (last, turn, has_more, ask_at) = (None, 0, false, None);
        let mut route =
            Route { plan, legs, filters, transform, counts, last, turn, arrivals, has_more, ask_at, passed_over };
        route.open_legs(&topics, When::AtFirst(start))?;
        if route.arrivals.is_some() {
            // Between the list and the subscription some may have come.
            let topics = route.plan.topics()?;
            route.open_new(&topics)?;
        }
        Ok(route)
    }
}

impl Plan {
    fn check_names(&self) -> Result<(), OpenError> {
        let bad = |name: &str, source| Refusal::Name { name: name.to_owned(), source };
        check_pattern(&self.from).map_err(|source| bad(&self.from, source))?;
        check_name(&self.to).map_err(|source| bad(&self.to, source))?;
        Ok(())
    }

    /// The existing topics that are inputs.
    fn topics(&self) -> Result<Vec<TopicStatus>, OpenError> {
        let mut topics = self.bus.topics()?;
        if !is_pattern(&self.from) && topics.iter().all(|topic| topic.name != self.from) {
            // The coordinator's own words about it.
            topics.push(self.bus.topic(&self.from)?);
        }
        Ok(topics)
    }

    /// Refuses what would come back to one of its inputs by routes whose groups have the default names.
    fn check_loop(&self, topics: &[TopicStatus]) -> Result<(), RouteError> {
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
    fn open(&self, topic: &str, bytes: u64, start: Option<Start>) -> Result<Pipeline<[u8], [u8]>, (End, OpenError)> {
        let to = Topic::<[u8]>::named(self.to.as_str()).envelope().bytes(bytes);
        let pipeline = self.bus.pipeline(Topic::<[u8]>::named(topic), self.group.as_str(), to);
        match start {
            Some(start) => pipeline.options(self.options.clone()).start(start).open_ends(),
            None => pipeline.existing().open_ends(),
        }
    }
}

impl Route {
    /// Routes one input, waiting for it for at most `limit`; then, where the output topic is full, for room for as long as it
    /// takes. `false`: none came. Where topics have come it asks the coordinator first: one that does not answer costs half
    /// a second, or ten if it falls silent while topics are opened, and is not asked again for ten.
    ///
    /// # Errors
    /// [`RouteError`]. The input is not lost: it goes back to its group.
    pub fn step(&mut self, limit: Duration) -> Result<bool, RouteError> {
        let deadline = Instant::now().checked_add(limit);
        loop {
            // Then an input, if there is one: who creates and removes topics all the time keeps none from being served.
            if self.sources().has_news() {
                self.find_topics()?;
            }
            let woken = self.wait(deadline);
            let (leg, outcome) = match woken {
                Some(Woken::Input(leg, Ok(()))) => (leg, self.pass_on(leg)),
                Some(Woken::Input(leg, Err(error))) => (leg, Err(error.into())),
                // Nor is the clock anybody else's.
                Some(Woken::LookAgain) | None if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Ok(false);
                }
                Some(Woken::LookAgain) | None => continue,
            };
            match outcome {
                Ok(()) => return Ok(true),
                Err(error) => self.recover(leg, error)?,
            }
        }
    }

    /// What it has done since it was opened.
    pub fn counts(&self) -> RouteCounts {
        RouteCounts { passed_over: self.passed_over.len() as u64, ..self.counts }
    }

    /// The topics it takes from now, in the order in which it found them.
    pub fn topics(&self) -> impl Iterator<Item = &str> {
        self.legs.iter().map(|leg| leg.topic.as_str())
    }

    /// The topics that its pattern stands for and that cannot be inputs of it, and why: no right to consume there, or to create
    /// the group, which somebody has removed under it, a kind of topic that has no groups, garbage, no room. It takes nothing from
    /// them until they are created anew; for room it asks again every 10 s. What is published meanwhile on one that has come since
    /// it was opened is held where only memory is short, and not where places are: a cursor would take one.
    pub fn passed_over(&self) -> impl Iterator<Item = (&str, &Refusal)> {
        self.passed_over.iter().map(|topic| (topic.name.as_str(), &topic.why))
    }

    /// Opens a pipeline for each input topic that has come later, or for some and the others next time.
    fn find_topics(&mut self) -> Result<(), RouteError> {
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
    fn ask_later(&mut self) {
        self.ask_at = Some(Instant::now() + ROOM_LOOK);
        self.has_more = true;
    }

    /// The same for these topics.
    fn open_new(&mut self, topics: &[TopicStatus]) -> Result<(), RouteError> {
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
    fn open_legs(&mut self, topics: &[TopicStatus], when: When) -> Result<bool, RouteError> {
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
    fn take_leg(
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

    fn sources(&mut self) -> Sources<'_> {
        let has_more = self.has_more || self.passed_over.iter().any(PassedOver::is_due);
        let may_ask = self.ask_at.is_none_or(|at| at <= Instant::now());
        Sources { legs: &mut self.legs, arrivals: self.arrivals.as_ref(), has_more, may_ask }
    }

    /// Waits until one of the topics has an input, and takes it; or until there is something else to look at.
    fn wait(&mut self, deadline: Option<Instant>) -> Option<Woken> {
        let turn = self.turn;
        let room_at = self.passed_over.iter().filter_map(|passed| passed.again_at).min();
        let again_at = self.ask_at.filter(|at| *at > Instant::now()).or(room_at);
        let mut sources = self.sources();
        let planned = sources.next_due();
        let until = deadline.into_iter().chain(planned).chain(again_at).min();
        wait::until_any(&mut sources, Wait::Adaptive, until, Sources::bells, |sources| sources.look(turn, planned))
    }

    /// Does with the input that was taken what is to be done.
    fn pass_on(&mut self, leg: usize) -> Result<(), PipelineError> {
        self.turn = leg + 1;
        let Leg { topic, pipeline, refused } = &mut self.legs[leg];
        let (filters, transform) = (&mut self.filters, &mut self.transform);
        let with_envelope = pipeline.output_options().envelope;
        let (mut now, last) = (self.counts, &mut self.last);
        let repeated = pipeline.finish_taken(|input, outputs| {
            *last = Some(input.sequence().get());
            if let Some((_, reason)) = refused.take().filter(|(sequence, _)| *sequence == input.sequence().get()) {
                now.rejected += 1;
                return Err(Failure::Reject(reason));
            }
            if !filters.iter_mut().all(|filter| filter(input)) {
                now.filtered += 1;
                return Ok(());
            }
            let outcome = match transform {
                Some(transform) => transform(input, outputs),
                None if with_envelope => {
                    outputs.push_with(input.as_bytes(), copied_envelope(topic, input));
                    Ok(())
                }
                None => {
                    outputs.push(input.as_bytes());
                    Ok(())
                }
            };
            match &outcome {
                Ok(()) => now.routed += 1,
                Err(Failure::Reject(_)) => now.rejected += 1,
                Err(_) => {}
            }
            outcome
        })?;
        if repeated {
            now.routed -= 1;
            now.duplicates += 1;
        }
        self.counts = now;
        Ok(())
    }

    /// After an input was not routed: what can never be published is rejected when it comes again, who was fenced begins
    /// anew, and a topic of a pattern may go.
    fn recover(&mut self, leg: usize, error: PipelineError) -> Result<(), RouteError> {
        match &error {
            PipelineError::Recv(RecvError::Fenced)
            | PipelineError::Publish(PublishError::Fenced)
            | PipelineError::Ack(AckError::Fenced) => return self.reopen(leg),
            PipelineError::Recv(RecvError::Gone(GoneReason::Removed))
            | PipelineError::Ack(AckError::Gone(GoneReason::Removed))
                if is_pattern(&self.plan.from) =>
            {
                self.legs.remove(leg);
                return Ok(());
            }
            // So says the topic, but not the bus: it lies, or is the first to know.
            PipelineError::Recv(RecvError::Gone(GoneReason::Stopped))
            | PipelineError::Ack(AckError::Gone(GoneReason::Stopped))
                if self.arrivals.as_ref().is_some_and(|arrivals| !arrivals.have_ended()) =>
            {
                self.give_up(leg, "it says that the bus was stopped");
                return Ok(());
            }
            PipelineError::Recv(RecvError::Corrupt(problem)) if is_pattern(&self.plan.from) => {
                self.give_up(leg, problem);
                return Ok(());
            }
            // Given to another, who routes it, or back.
            PipelineError::Ack(AckError::LeaseLost { .. } | AckError::Ended { .. }) => return Ok(()),
            _ => {}
        }
        let reason = match &error {
            PipelineError::Publish(
                PublishError::TooLarge { .. }
                | PublishError::WrongSize { .. }
                | PublishError::BatchSize { .. }
                | PublishError::Envelope(_),
            ) => Some(format!("routing to {:?}: {error}", self.plan.to)),
            _ => None,
        };
        let Leg { topic, refused, .. } = &mut self.legs[leg];
        match (reason, self.last) {
            (Some(reason), Some(sequence)) => {
                *refused = Some((sequence, reason));
                Ok(())
            }
            _ => Err(RouteError::Step { topic: topic.clone(), source: error }),
        }
    }

    /// Takes nothing from a garbled topic any more. What it has not routed stays in the group.
    fn give_up(&mut self, leg: usize, problem: &str) {
        let Leg { topic, pipeline, .. } = self.legs.remove(leg);
        let why = Refusal::Corrupt { topic: topic.clone(), problem: problem.to_owned() };
        self.pass_over(pipeline.consumer().place().0, topic, why);
    }

    /// Takes its place in the group again, which must still be there.
    fn reopen(&mut self, leg: usize) -> Result<(), RouteError> {
        let Leg { topic, pipeline, .. } = self.legs.swap_remove(leg);
        let (id, bytes) = (pipeline.consumer().place().0, pipeline.output_options().bytes);
        // The old consumer's number is free only now.
        drop(pipeline);
        let opened = self.plan.open(&topic, bytes, None);
        self.counts.reopened += u64::from(opened.is_ok());
        match opened {
            Err((_, error)) if is_pattern(&self.plan.from) && may_come_back(&error) => {
                // It is found again as what has come.
                self.ask_later();
                Ok(())
            }
            opened => self.take_leg(id, topic, When::Later, opened),
        }
    }
}

/// Whether a topic, by its number, is an input already.
fn has_leg(legs: &[Leg], topic: u64) -> bool {
    legs.iter().any(|leg| leg.pipeline.consumer().place().0 == topic)
}

/// Whether the coordinator was not there, and may be later.
fn may_come_back(error: &OpenError) -> bool {
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

/// What goes with a copy: whence it is, then all that went with the input.
fn copied_envelope(topic: &str, input: &Delivery<'_, [u8]>) -> Envelope {
    let envelope = Envelope::new()
        .key(input.key().unwrap_or_default())
        .id(input.id().unwrap_or_default())
        .header("origin-topic", topic.as_bytes())
        .header("origin-sequence", input.sequence().to_string().as_bytes());
    input.headers().fold(envelope, |envelope, (name, value)| envelope.header(name, value))
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = f.debug_struct("Route");
        parts.field("from", &self.plan.from).field("to", &self.plan.to).field("counts", &self.counts);
        parts.finish_non_exhaustive()
    }
}
