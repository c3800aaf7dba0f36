//! [`Runner`]: calls back for what comes on any number of handles, on one thread.

use std::io;
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::client::consumer::{Consumer, Delivery};
use crate::client::message::Message;
use crate::client::pipeline::Failure;
use crate::client::request::{Incoming, Responder};
use crate::client::select::Parts;
use crate::client::subscriber::Subscriber;
use crate::client::wildcard::{WildcardMessage, WildcardSubscriber};
use crate::error::{RecvError, RunnerError, WildcardError};
use crate::os::{clock, membarrier};
use crate::ring::doorbell::Doorbell;
use crate::shm::shared::Shared;
use crate::topic::Payload;
use crate::wait::{self, Look, Wait};

/// Calls handlers for the messages of any number of subscribers, consumers and responders: push instead of pull.
///
/// ```no_run
/// # use shmbus::{Bus, Failure, RecvError, Runner, Topic};
/// # fn bill(order: &[u8]) -> std::io::Result<()> { Ok(()) }
/// let bus = Bus::open_default()?;
/// let prices = bus.subscriber(Topic::<u64>::new("md.prices")).open()?;
/// let orders = bus.consumer(Topic::<[u8]>::new("orders"), "billing").open()?;
///
/// let mut runner = Runner::new();
/// runner.subscribe(prices, |price| match price {
///     Ok(price) => println!("{}", *price),
///     Err(error) => eprintln!("prices: {error}"), // a loss, and it goes on; or the topic's end
/// });
/// runner.consume(orders, |order| {
///     if order.is_empty() {
///         return Err(Failure::Reject("an order of nothing".to_owned()));
///     }
///     bill(order)?; // an error gives the order back: it comes again after the group's back-off
///     Ok(()) // acknowledged
/// });
/// runner.on_trouble(|trouble| eprintln!("{trouble}"));
///
/// let running = runner.spawn()?; // or runner.run() on this thread
/// running.stop();
/// running.join()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Everything happens on one thread, one message at a time: handlers need no locks among themselves, each handle's messages
/// come in its order, and a slow handler delays the others. Handles with messages take turns, one message each. For more
/// threads open more consumers of the group, each with a runner of its own, or iterate over one
/// ([`Deliveries`](crate::Deliveries)).
///
/// A consumer's handler decides by what it returns: `Ok` acknowledges, an error gives the message back, to come again after
/// the group's back-off and, after `max_attempts`, to go to the dead-letter topic, with the error's text if it came last;
/// [`Failure::Reject`] sends it there at once. A handler that takes longer than a lease should
/// [`extend`](Delivery::extend) it. A handler that panics gives its message back, too, and ends the runner; the panic goes on to
/// whoever called [`run`](Self::run) or [`join`](RunnerHandle::join).
///
/// A handle from which nothing can come any more leaves the runner: its topic was removed, the bus stopped, a consumer was fenced.
/// Subscribers' handlers are told so, and [`on_trouble`](Self::on_trouble) is in every case; the others are served on.
///
/// For who comes from elsewhere: `subscribe` is NATS's subscription with a callback, only that all of a runner's share one thread.
/// `consume` is RabbitMQ's `basic_consume` with a prefetch of one and manual acknowledgements, of which the handler's
/// result is one: nothing is acknowledged before its work is done. The runner itself is an Aeron `AgentRunner`,
/// [`wait`](Self::wait) its idle strategy, `run` the invoker on a thread that one has already.
#[derive(Default)]
pub struct Runner<'h> {
    tasks: Vec<Box<dyn Task + 'h>>,
    on_trouble: Option<OnTrouble<'h>>,
    wait: Wait,
    stopper: Stopper,
}

/// Ends a [`Runner`] from wherever it is wanted: another thread, or one of its handlers.
#[derive(Clone, Default)]
pub struct Stopper {
    signal: Arc<Signal>,
}

/// A runner on a thread of its own. Dropped, it runs on; stop it and wait for it to end it in good order.
pub struct RunnerHandle {
    stopper: Stopper,
    thread: JoinHandle<Result<(), RunnerError>>,
}

type OnTrouble<'h> = Box<dyn FnMut(&RunnerError) + Send + 'h>;

/// What a stopper and its runner share.
struct Signal {
    is_stopped: AtomicBool,
    /// The runner sleeps at this one, too.
    bell: Doorbell,
}

/// A handle and its handler.
trait Task: Send {
    /// Whether [`Self::serve`] would find something: in vain at times, but never not.
    fn look(&mut self) -> Look<()>;

    /// Whether a look has taken a message, which must be served then: what is delivered at most once would be lost.
    fn has_taken(&self) -> bool {
        false
    }

    /// As [`Parts::bells`].
    fn bells(&self, into: &mut Vec<Shared<Doorbell>>);

    /// As [`Parts::generation`].
    fn generation(&self) -> u64 {
        0
    }

    /// When to look again without a bell, on the coarse clock.
    fn next_due(&self) -> Option<u64> {
        None
    }

    /// Calls the handler for one message if there is one; whether there was. On an error this task is over.
    fn serve(&mut self, report: &mut dyn FnMut(&RunnerError)) -> Result<bool, RunnerError>;
}

impl<'h> Runner<'h> {
    /// A runner that serves nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `handler` for each message of a subscriber, and for each error: a loss, behind which it goes on, and the end.
    pub fn subscribe<T: Payload + ?Sized>(
        &mut self,
        subscriber: Subscriber<T>,
        handler: impl FnMut(Result<Message<'_, T>, RecvError>) + Send + 'h,
    ) -> &mut Self {
        self.add(Feed { name: format!("topic {:?}", subscriber.topic()), source: subscriber, handler })
    }

    /// Calls `handler` for each message of a wildcard subscriber, and for each error. What concerns one topic alone is not its
    /// end.
    pub fn subscribe_wildcard<T: Payload + ?Sized>(
        &mut self,
        subscriber: WildcardSubscriber<T>,
        handler: impl FnMut(Result<WildcardMessage<'_, T>, WildcardError>) + Send + 'h,
    ) -> &mut Self {
        self.add(Feed { name: format!("pattern {:?}", subscriber.pattern()), source: subscriber, handler })
    }

    /// Calls `handler` for each request of a responder, and for each error.
    pub fn respond(
        &mut self,
        responder: Responder,
        handler: impl FnMut(Result<Incoming<'_>, RecvError>) + Send + 'h,
    ) -> &mut Self {
        self.add(Feed { name: format!("requests of topic {:?}", responder.topic()), source: responder, handler })
    }

    /// Calls `handler` for each message of a consumer, and settles it by what that returns. Every error that can be displayed
    /// becomes a [`Failure`] by `?`.
    pub fn consume<T: Payload + ?Sized>(
        &mut self,
        consumer: Consumer<T>,
        handler: impl FnMut(&mut Delivery<'_, T>) -> Result<(), Failure> + Send + 'h,
    ) -> &mut Self {
        let name = format!("group {:?} of topic {:?}", consumer.group(), consumer.topic());
        self.add(Work { name, consumer, has_taken: false, handler })
    }

    fn add(&mut self, task: impl Task + 'h) -> &mut Self {
        self.tasks.push(Box::new(task));
        self
    }

    /// Calls `handler` for what no other handler is told: a handle has ended, or what a handler was done with could not be
    /// settled, because its lease had ended. Not for errors that handlers return.
    pub fn on_trouble(&mut self, handler: impl FnMut(&RunnerError) + Send + 'h) -> &mut Self {
        self.on_trouble = Some(Box::new(handler));
        self
    }

    /// How to wait for messages (default [`Wait::Adaptive`]); the handles' own choices do not count here.
    pub fn wait(&mut self, wait: Wait) -> &mut Self {
        self.wait = wait;
        self
    }

    /// What stops it.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Serves all handles on this thread until it is stopped; at once where there are none. Then the handles are closed.
    ///
    /// # Errors
    /// [`RunnerError::Ended`]: there is nothing left to serve. It names the handle that ended last.
    ///
    /// # Panics
    /// Where a handler does.
    pub fn run(mut self) -> Result<(), RunnerError> {
        let mut ended = Ok(());
        loop {
            let served = self.serve_round(&mut ended);
            if self.tasks.is_empty() {
                return ended;
            }
            if self.stopper.is_stopped() {
                return Ok(());
            }
            if !served {
                self.sleep();
            }
        }
    }

    /// One message for each handle that has one, until it is stopped; whether any had. What ends is taken out, and noted in
    /// `ended`.
    fn serve_round(&mut self, ended: &mut Result<(), RunnerError>) -> bool {
        let Runner { tasks, on_trouble, stopper, .. } = self;
        let mut report = |trouble: &RunnerError| {
            if let Some(handler) = on_trouble {
                handler(trouble);
            }
        };
        let (mut index, mut any) = (0, false);
        while index < tasks.len() {
            if stopper.is_stopped() && !tasks[index].has_taken() {
                index += 1;
                continue;
            }
            match tasks[index].serve(&mut report) {
                Ok(served) => {
                    any |= served;
                    index += 1;
                }
                Err(error) => {
                    drop(tasks.remove(index));
                    report(&error);
                    (*ended, any) = (Err(error), true);
                }
            }
        }
        any
    }

    /// Sleeps until there may be something to do.
    fn sleep(&mut self) {
        let planned = self.next_due();
        let nap = planned.map(|due| Duration::from_millis(due.saturating_sub(clock::now_ms()).max(1)));
        let until = nap.and_then(|nap| Instant::now().checked_add(nap));
        let mut generation = self.generation();
        wait::until_any(
            self,
            self.wait,
            until,
            |runner, into| {
                into.push(Shared::of(runner.stopper.signal.clone()).part(|signal| &signal.bell));
                runner.tasks.iter().for_each(|task| task.bells(into));
            },
            |runner| {
                let mut look = runner.look();
                let now = runner.generation();
                if std::mem::replace(&mut generation, now) != now && !matches!(look, Look::Found(())) {
                    look = Look::OtherBells;
                }
                // There is a moment to wake at that was not known when the sleep was planned.
                if runner.next_due() != planned { Look::Found(()) } else { look }
            },
        );
    }

    fn look(&mut self) -> Look<()> {
        if self.stopper.is_stopped() {
            return Look::Found(());
        }
        let mut soonest = None;
        for task in &mut self.tasks {
            match task.look() {
                Look::Found(()) => return Look::Found(()),
                Look::Within(again) => soonest = soonest.into_iter().chain([again]).min(),
                Look::Nothing | Look::OtherBells => {}
            }
        }
        soonest.map_or(Look::Nothing, Look::Within)
    }

    fn next_due(&self) -> Option<u64> {
        self.tasks.iter().filter_map(|task| task.next_due()).min()
    }

    fn generation(&self) -> u64 {
        self.tasks.iter().map(|task| task.generation()).sum()
    }
}

impl Runner<'static> {
    /// Does what [`Self::run`] does on a thread of its own.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn spawn(self) -> io::Result<RunnerHandle> {
        let stopper = self.stopper();
        let thread = thread::Builder::new().name("shmbus-runner".to_owned()).spawn(|| self.run())?;
        Ok(RunnerHandle { stopper, thread })
    }
}

impl RunnerHandle {
    /// Stops it; see [`Stopper::stop`].
    pub fn stop(&self) {
        self.stopper.stop();
    }

    /// What stops it.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// What [`Runner::run`] has returned.
    ///
    /// # Panics
    /// A handler did, and this is its panic.
    pub fn join(self) -> Result<(), RunnerError> {
        self.thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
    }
}

impl Stopper {
    /// Lets the runner end as soon as the handler that it is calling has returned; at once if it sleeps.
    pub fn stop(&self) {
        // Relaxed: it carries nothing, and the bell's barriers order it before the look at who sleeps (I-7).
        self.signal.is_stopped.store(true, Ordering::Relaxed);
        if !self.signal.bell.is_quiet() {
            self.signal.bell.ring();
        }
    }

    fn is_stopped(&self) -> bool {
        // Relaxed: as in `stop`.
        self.signal.is_stopped.load(Ordering::Relaxed)
    }
}

impl Default for Signal {
    fn default() -> Self {
        // Whoever rings a bell needs it.
        membarrier::register();
        Signal { is_stopped: AtomicBool::new(false), bell: Doorbell::new() }
    }
}

/// What is received from and answers for itself: its messages are not settled by the runner.
trait Source: Parts + Send + 'static {
    type Message<'a>;
    type Error;

    /// Takes a message if one look finds it; at worst it has only passed over some, and the glance says that there is more.
    fn look(&mut self) -> Result<Option<Self::Message<'_>>, Self::Error>;

    /// What has ended it, if the error says so.
    fn end(error: &Self::Error) -> Option<RecvError>;
}

impl<T: Payload + ?Sized> Source for Subscriber<T> {
    type Message<'a> = Message<'a, T>;
    type Error = RecvError;

    fn look(&mut self) -> Result<Option<Message<'_, T>>, RecvError> {
        Subscriber::look(self)
    }

    fn end(error: &RecvError) -> Option<RecvError> {
        error.is_final().then(|| error.clone())
    }
}

impl<T: Payload + ?Sized> Source for WildcardSubscriber<T> {
    type Message<'a> = WildcardMessage<'a, T>;
    type Error = WildcardError;

    fn look(&mut self) -> Result<Option<WildcardMessage<'_, T>>, WildcardError> {
        WildcardSubscriber::look(self)
    }

    fn end(error: &WildcardError) -> Option<RecvError> {
        error.end()
    }
}

impl Source for Responder {
    type Message<'a> = Incoming<'a>;
    type Error = RecvError;

    fn look(&mut self) -> Result<Option<Incoming<'_>>, RecvError> {
        Responder::look(self)
    }

    fn end(error: &RecvError) -> Option<RecvError> {
        error.is_final().then(|| error.clone())
    }
}

struct Feed<S, H> {
    name: String,
    source: S,
    handler: H,
}

impl<S: Source, H: FnMut(Result<S::Message<'_>, S::Error>) + Send> Task for Feed<S, H> {
    fn look(&mut self) -> Look<()> {
        self.source.glance()
    }

    fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        self.source.bells(into);
    }

    fn generation(&self) -> u64 {
        self.source.generation()
    }

    fn serve(&mut self, _report: &mut dyn FnMut(&RunnerError)) -> Result<bool, RunnerError> {
        match self.source.look() {
            Ok(None) => Ok(false),
            Ok(Some(message)) => {
                (self.handler)(Ok(message));
                Ok(true)
            }
            Err(error) => {
                let end = S::end(&error);
                (self.handler)(Err(error));
                end.map_or(Ok(true), |source| Err(RunnerError::Ended { handle: self.name.clone(), source }))
            }
        }
    }
}

struct Work<T: ?Sized, H> {
    name: String,
    consumer: Consumer<T>,
    /// Whether a look has taken what is served next.
    has_taken: bool,
    handler: H,
}

impl<T: Payload + ?Sized, H: FnMut(&mut Delivery<'_, T>) -> Result<(), Failure> + Send> Task for Work<T, H> {
    fn look(&mut self) -> Look<()> {
        if !self.has_taken {
            match self.consumer.take() {
                Ok(taken) => self.has_taken = taken,
                // Whoever serves meets it again.
                Err(_) => return Look::Found(()),
            }
        }
        match self.has_taken {
            true => Look::Found(()),
            false if self.consumer.has_left_off() => Look::Within(Duration::ZERO),
            false => Look::Nothing,
        }
    }

    fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        into.push(self.consumer.shared_bell());
    }

    fn has_taken(&self) -> bool {
        self.has_taken
    }

    fn next_due(&self) -> Option<u64> {
        self.consumer.next_due()
    }

    fn serve(&mut self, report: &mut dyn FnMut(&RunnerError)) -> Result<bool, RunnerError> {
        let ended = |source| RunnerError::Ended { handle: self.name.clone(), source };
        let has_taken = std::mem::take(&mut self.has_taken) || self.consumer.take().map_err(ended)?;
        let Some(mut delivery) = self.consumer.taken().filter(|_| has_taken) else { return Ok(false) };
        let sequence = delivery.sequence();
        let settled = match (self.handler)(&mut delivery) {
            Ok(()) => delivery.ack(),
            Err(failure) => failure.settle(delivery),
        };
        if let Err(source) = settled {
            report(&RunnerError::NotSettled { handle: self.name.clone(), sequence, source });
        }
        Ok(true)
    }
}
