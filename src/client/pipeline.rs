//! [`Pipeline`]: consume, transform, publish, as one step whose outputs count once.

use std::fmt;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use crate::client::bus::Bus;
use crate::client::consumer::{Consumer, ConsumerBuilder, Delivery};
use crate::client::envelope::Envelope;
use crate::client::publisher::OriginPublisher;
use crate::client::subscriber::Start;
use crate::coordinator::protocol::Identity;
use crate::error::{AckError, OpenError, PipelineError, PublishError, RecvError, Refusal};
use crate::group::{GroupOptions, Guarantee};
use crate::topic::{Mode, Payload, Topic, TopicOptions};
use crate::wait::Wait;

/// Takes messages of one topic as a consumer of a group and publishes what a transform makes of each to another.
///
/// The outputs of one input are one batch. On a group that is [`EffectivelyOnce`](Guarantee::EffectivelyOnce), the default
/// here, each input has its outputs exactly once, whoever dies or sleeps: a lease passes on only when its holder is proven
/// dead or fenced on the output topic, and what it had committed by then counts. Effects of the transform
/// outside the bus may be repeated; see [`Repeats`](crate::Repeats).
///
/// Where the output topic compares ids (`dedup`), an output whose id is there already is not published again, whoever
/// published it; the others of its input are. So a pipeline that is at least once and gives its outputs ids repeats none of them either.
pub struct Pipeline<I: ?Sized, O: ?Sized> {
    consumer: Consumer<I>,
    publisher: OriginPublisher,
    outputs: Outputs<O>,
    lease: Duration,
}

/// How a pipeline is to be opened; ends with [`PipelineBuilder::open`].
#[must_use]
pub struct PipelineBuilder<I: ?Sized, O: ?Sized> {
    bus: Bus,
    consumer: ConsumerBuilder<I>,
    to: Topic<O>,
}

/// Why a transform, or a runner's handler, has not done its work: what becomes of the message.
///
/// Every error that can be displayed becomes [`Failure::Error`] by `?`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// Try again after the group's back-off, up to its number of attempts.
    Retry,
    /// The same after this time, at most 24 h.
    RetryAfter(Duration),
    /// The same as `Retry`; if it was the last attempt, the letter in the dead-letter topic says this.
    Error(String),
    /// It will never work: to the dead-letter topic, for this reason.
    Reject(String),
}

impl Failure {
    /// Does to a message what is to become of it.
    pub(crate) fn settle<T: ?Sized>(self, message: Delivery<'_, T>) -> Result<(), AckError> {
        match self {
            Failure::Retry => message.nack(),
            Failure::RetryAfter(delay) => message.nack_after(delay),
            Failure::Error(why) => message.fail(&why),
            Failure::Reject(reason) => message.reject(&reason),
        }
    }
}

// A failure itself cannot be displayed, or this would be in its own way.
impl<E: fmt::Display> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Error(error.to_string())
    }
}

/// What one input becomes: any number of messages, published together when the transform returns.
pub struct Outputs<O: ?Sized> {
    bytes: Vec<u8>,
    /// Where each payload ends in `bytes`, and what goes with it.
    messages: Vec<(usize, Envelope)>,
    payload: PhantomData<fn(&O)>,
}

impl<O: Payload + ?Sized> Outputs<O> {
    /// Adds a message.
    pub fn push(&mut self, payload: &O) {
        self.push_with(payload, Envelope::new());
    }

    /// Adds a message with an envelope; the output topic must have envelopes.
    pub fn push_with(&mut self, payload: &O, envelope: Envelope) {
        self.bytes.extend_from_slice(payload.as_bytes());
        self.messages.push((self.bytes.len(), envelope));
    }
}

impl<O: ?Sized> Outputs<O> {
    fn clear(&mut self) {
        self.bytes.clear();
        self.messages.clear();
    }

    /// Each payload with its envelope.
    fn batch(&self) -> Vec<(&[u8], &Envelope)> {
        let starts = std::iter::once(0).chain(self.messages.iter().map(|(end, _)| *end));
        starts.zip(&self.messages).map(|(start, (end, envelope))| (&self.bytes[start..*end], envelope)).collect()
    }
}

impl Bus {
    /// A pipeline from an existing topic, as a consumer of `group`, to a topic for many publishers, which is created where it
    /// does not exist; to be opened with `.open()`.
    pub fn pipeline<I, O>(&self, from: Topic<I>, group: impl Into<String>, to: Topic<O>) -> PipelineBuilder<I, O>
    where
        I: Payload + ?Sized,
        O: Payload + ?Sized,
    {
        let consumer = self.consumer(from, group).options(GroupOptions::new().effectively_once());
        PipelineBuilder { bus: self.clone(), consumer, to }
    }
}

impl<I: Payload + ?Sized, O: Payload + ?Sized> PipelineBuilder<I, O> {
    /// The options with which the group is created where it does not exist (default: effectively once).
    pub fn options(mut self, options: GroupOptions) -> Self {
        self.consumer = self.consumer.options(options);
        self
    }

    /// Where the group starts where it does not exist (default [`Start::Latest`]).
    pub fn start(mut self, start: Start) -> Self {
        self.consumer = self.consumer.start(start);
        self
    }

    /// Refuses to create the group.
    pub fn existing(mut self) -> Self {
        self.consumer = self.consumer.existing();
        self
    }

    /// How to wait for inputs (default [`Wait::Adaptive`]).
    pub fn wait(mut self, wait: Wait) -> Self {
        self.consumer = self.consumer.wait(wait);
        self
    }

    /// Opens it.
    ///
    /// # Errors
    /// As [`ConsumerBuilder::open`] and [`Bus::publisher`]; the output topic is not for many publishers, or is the group's
    /// dead-letter topic.
    pub fn open(self) -> Result<Pipeline<I, O>, OpenError> {
        self.open_ends().map_err(|(_, error)| error)
    }

    /// The same, and if not, which end it is that could not be opened.
    pub(crate) fn open_ends(self) -> Result<Pipeline<I, O>, (End, OpenError)> {
        let consumer = self.consumer.open().map_err(|error| (End::Input, error))?;
        let publisher = open_output(&self.bus, &self.to, &consumer).map_err(|error| (End::Output, error))?;
        let lease = Duration::from_millis(consumer.group_options().lease_ms);
        let outputs = Outputs { bytes: Vec::new(), messages: Vec::new(), payload: PhantomData };
        Ok(Pipeline { consumer, publisher, outputs, lease })
    }
}

/// Opens what a consumer's outputs go through.
fn open_output<I: Payload + ?Sized, O: Payload + ?Sized>(
    bus: &Bus,
    to: &Topic<O>,
    consumer: &Consumer<I>,
) -> Result<OriginPublisher, OpenError> {
    let (topic, group) = consumer.place();
    let origin = Identity::Origin { topic, group, consumer: consumer.number() };
    let publisher = OriginPublisher::open(bus.control(), to.name(), to.options(), origin);
    let publisher = publisher.map_err(|error| match consumer.is_gone() {
        // The topic was removed meanwhile, and its consumers are unknown since.
        true => Refusal::UnknownTopic { topic: consumer.topic().to_owned() }.into(),
        false => error,
    })?;
    check_output(consumer, publisher.options(), to.name())?;
    Ok(publisher)
}

/// An end of a pipeline.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Input,
    Output,
}

/// Whether the coordinator could tell which outputs are there: exclusive topics keep no notes of it, and dead letters on the
/// same topic would go through another publisher of the same consumer, which fences this one.
fn check_output<I: ?Sized + Payload>(
    consumer: &Consumer<I>,
    options: &TopicOptions,
    topic: &str,
) -> Result<(), OpenError> {
    let dead_letters = consumer.group_options().dead_letter_topic(consumer.topic(), consumer.group());
    let problem = if options.mode != Mode::Many {
        format!("a pipeline's output must be a topic for many publishers, this one is {}", options.mode)
    } else if dead_letters == topic {
        "a pipeline's output cannot also be the dead-letter topic of its group; name another".to_owned()
    } else {
        return Ok(());
    };
    Err(Refusal::Options { topic: topic.to_owned(), problem }.into())
}

impl<I: Payload + ?Sized, O: Payload + ?Sized> Pipeline<I, O> {
    /// Takes one input, waiting for it, and publishes what `transform` makes of it. An input without outputs is just
    /// settled.
    ///
    /// # Errors
    /// [`PipelineError`]; after `Fenced` open another pipeline. The input is not lost: it goes back to the group.
    pub fn step(
        &mut self,
        transform: impl FnOnce(&Delivery<'_, I>, &mut Outputs<O>) -> Result<(), Failure>,
    ) -> Result<(), PipelineError> {
        let Pipeline { consumer, publisher, outputs, lease } = self;
        finish(consumer.recv()?, publisher, outputs, *lease, transform).map(drop)
    }

    /// The same, waiting for an input for at most `limit`. `false`: none came.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn step_timeout(
        &mut self,
        limit: Duration,
        transform: impl FnOnce(&Delivery<'_, I>, &mut Outputs<O>) -> Result<(), Failure>,
    ) -> Result<bool, PipelineError> {
        let Pipeline { consumer, publisher, outputs, lease } = self;
        match consumer.recv_timeout(limit) {
            Ok(input) => finish(input, publisher, outputs, *lease, transform).map(|_| true),
            Err(RecvError::TimedOut) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Does with the input that the consumer has taken what [`Self::step`] does. Whether none of its outputs was published
    /// because their ids were there already.
    pub(crate) fn finish_taken(
        &mut self,
        transform: impl FnOnce(&Delivery<'_, I>, &mut Outputs<O>) -> Result<(), Failure>,
    ) -> Result<bool, PipelineError> {
        let Pipeline { consumer, publisher, outputs, lease } = self;
        consumer.taken().map_or(Ok(false), |input| finish(input, publisher, outputs, *lease, transform))
    }

    /// The options the output topic was created with.
    pub fn output_options(&self) -> &TopicOptions {
        self.publisher.options()
    }

    /// Whether each input has its outputs exactly once: the group is effectively once.
    pub fn is_exact(&self) -> bool {
        self.consumer.group_options().guarantee == Guarantee::EffectivelyOnce
    }

    /// The consumer that takes the inputs, for whoever waits on several.
    pub(crate) fn consumer_mut(&mut self) -> &mut Consumer<I> {
        &mut self.consumer
    }

    /// The consumer that takes the inputs.
    pub fn consumer(&self) -> &Consumer<I> {
        &self.consumer
    }
}

/// Transform, publish, settle. Crash points: before the publish the input is another's to take, with nothing done; after
/// it the note says that it is finished, and whoever releases our leases settles it. Whether all outputs were there already.
fn finish<I: Payload + ?Sized, O: Payload + ?Sized>(
    mut input: Delivery<'_, I>,
    publisher: &mut OriginPublisher,
    outputs: &mut Outputs<O>,
    lease: Duration,
    transform: impl FnOnce(&Delivery<'_, I>, &mut Outputs<O>) -> Result<(), Failure>,
) -> Result<bool, PipelineError> {
    outputs.clear();
    if let Err(failure) = transform(&input, outputs) {
        return failure.settle(input).map(|()| false).map_err(Into::into);
    }
    let published = outputs.messages.is_empty() || publish(&mut input, publisher, outputs, lease)?;
    match input.ack() {
        // Somebody found us late, made sure of our outputs and settled it for us.
        Ok(()) | Err(AckError::AlreadySettled { .. }) => Ok(!published),
        Err(error) => Err(error.into()),
    }
}

/// Publishes the outputs of an input but those whose ids are there already. `false`: all are.
fn publish<I: Payload + ?Sized, O: Payload + ?Sized>(
    input: &mut Delivery<'_, I>,
    publisher: &mut OriginPublisher,
    outputs: &Outputs<O>,
    lease: Duration,
) -> Result<bool, PipelineError> {
    let (sequence, mut batch) = (input.sequence().get(), outputs.batch());
    // A full output topic is waited for, and meanwhile the input stays ours: the transform may have used its lease up.
    let mut patience = Duration::ZERO;
    loop {
        match publisher.publish(sequence, &batch, Instant::now() + patience) {
            Ok(_) => return Ok(true),
            Err(PublishError::TimedOut { .. }) => {
                input.extend(lease)?;
                patience = lease / 3;
            }
            Err(error @ PublishError::Duplicate { .. }) => {
                let before = batch.len();
                publisher.leave_out_repeated(&mut batch);
                if batch.is_empty() {
                    return Ok(false);
                }
                if batch.len() == before {
                    return Err(error.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

impl<O: ?Sized> fmt::Debug for Outputs<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outputs").field("messages", &self.messages.len()).finish_non_exhaustive()
    }
}
