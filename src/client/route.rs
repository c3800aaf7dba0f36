//! [`Route`]: copies messages from topics to a topic, filtered and transformed.

mod inputs;
mod plan;
mod sources;

use std::fmt;
use std::time::{Duration, Instant};

use crate::client::bus::Bus;
use crate::client::consumer::Delivery;
use crate::client::envelope::Envelope;
use crate::client::pipeline::{Failure, Outputs, Pipeline};
use crate::client::subscriber::Start;
use crate::client::wildcard::Arrivals;
use crate::error::{AckError, GoneReason, PipelineError, PublishError, RecvError, Refusal, RouteError};
use crate::group::GroupOptions;
use crate::pattern::is_pattern;
use crate::wait::{self, Wait};
use inputs::{PassedOver, When, may_come_back};
use plan::{GROUP_PREFIX, Plan};
use sources::{Sources, Woken};

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
    /// a pattern are passed over then); the output topic is not for many publishers, or has no room for one more.
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
