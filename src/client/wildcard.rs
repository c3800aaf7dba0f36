//! [`WildcardSubscriber`]: many topics read as one, each in its own order.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::client::bus::{Bus, unexpected};
use crate::client::control::{Control, Granted};
use crate::client::held::Held;
use crate::client::message::{Message, OwnedMessage};
use crate::client::read::Step;
use crate::client::select::{Parts, Waitable};
use crate::client::subscriber::{Start, SubscriberCore};
use crate::coordinator::protocol::{Answer, HandleRef, Request};
use crate::error::{AttachError, ConnectError, GoneReason, OpenError, RecvError, Refusal, WildcardError};
use crate::ring::doorbell::Doorbell;
use crate::ring::log::Place;
use crate::ring::notice::Notice;
use crate::shm::notice;
use crate::shm::shared::Shared;
use crate::topic::Payload;
use crate::wait::{self, Look, Wait};

/// Topics that one look takes or lets go of at most: whoever creates and removes them delays nobody.
const TOPICS_A_LOOK: usize = 16;

/// Reads every topic that a pattern stands for, those to come included: `*` in the place of a token stands for any
/// one token, `>` at the end for one or more.
///
/// The cursor on a new topic is in force before its creator can publish, so nothing of it is missed. Messages of one topic
/// come in its order; among topics with messages the handle takes turns. Channels are passed over, and so are, by a typed
/// handle, topics of another type. Topics whose names begin with `_` (reply inboxes) are meant only by patterns that
/// begin with it. A removed topic drops out when everything of it has been read.
///
/// On `block` and `reject` topics it holds each ring back until it has read, like any subscriber, unless it is droppable.
pub struct WildcardSubscriber<T: ?Sized> {
    pub(super) core: WildcardCore,
    payload: PhantomData<fn() -> Box<T>>,
}

/// What does not depend on the payload's type.
pub(super) struct WildcardCore {
    // Dropped in this order: the topics' cursors are left before the subscription is given back.
    topics: Vec<Member>,
    /// Whose turn it is.
    next: usize,
    /// Whose message was found last.
    found: usize,
    notice: Shared<Notice>,
    /// How many topics have come.
    told: u64,
    /// Those of them that are not taken yet.
    waiting: VecDeque<Granted>,
    /// What is wrong with topics that came, or did not: each is told by a receive.
    troubles: VecDeque<WildcardError>,
    /// Messages that had expired, of topics that are gone.
    expired: u64,
    /// Changes with `topics`.
    generation: u64,
    pattern: String,
    wildcard: u64,
    droppable: bool,
    wait: Wait,
    control: Arc<Control>,
    _held: Held,
}

/// A topic of the subscription.
struct Member {
    name: Arc<str>,
    handle: HandleRef,
    core: SubscriberCore,
}

/// A received message and the topic it comes from; dereferences to [`Message`], and that to the payload.
pub struct WildcardMessage<'a, T: ?Sized> {
    topic: &'a Arc<str>,
    message: Message<'a, T>,
}

/// The same in memory of its own; dereferences to [`OwnedMessage`], and that to the payload.
pub struct OwnedWildcardMessage<T: ?Sized> {
    topic: Arc<str>,
    message: OwnedMessage<T>,
}

/// How a wildcard subscriber is to be opened; ends with [`WildcardBuilder::open`].
#[must_use]
pub struct WildcardBuilder<T: ?Sized> {
    bus: Bus,
    pattern: String,
    start: Start,
    droppable: bool,
    wait: Wait,
    payload: PhantomData<fn() -> Box<T>>,
}

impl Bus {
    /// A subscriber of every topic that `pattern` stands for (`orders.*`, `orders.>`), to be opened with `.open()`.
    ///
    /// ```no_run
    /// # let bus = shmbus::Bus::open_default()?;
    /// let mut orders = bus.wildcard::<[u8]>("orders.>").open()?;
    /// let order = orders.recv()?;
    /// println!("{} {}: {} bytes", order.topic(), order.sequence(), order.len());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wildcard<T: Payload + ?Sized>(&self, pattern: &str) -> WildcardBuilder<T> {
        let (bus, pattern, start, wait) = (self.clone(), pattern.to_owned(), Start::default(), Wait::default());
        WildcardBuilder { bus, pattern, start, droppable: false, wait, payload: PhantomData }
    }
}

impl<T: Payload + ?Sized> WildcardBuilder<T> {
    /// Where to start on topics that exist already (default [`Start::Latest`]); new ones are read from their first message
    /// on. [`Start::Sequence`] (each topic counts its own), [`Start::Time`] and [`Start::LastPerKey`] are refused. On topics with many publishers [`Start::Last`] begins
    /// with the whole batch.
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Never holds publishers back; see [`SubscriberBuilder::droppable`](crate::SubscriberBuilder::droppable).
    pub fn droppable(mut self) -> Self {
        self.droppable = true;
        self
    }

    /// How to wait for messages (default [`Wait::Adaptive`]).
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// Opens it. When this returns, the cursors on all matching topics are in force.
    ///
    /// # Errors
    /// The pattern is none, or a limit is reached: 16 wildcard subscribers a process, its handles, its user's segments; see
    /// [`OpenError`]. What is wrong with single topics the first receives say ([`WildcardError::Missed`]).
    pub fn open(self) -> Result<WildcardSubscriber<T>, OpenError> {
        let control = self.bus.control();
        let (start, droppable) = (self.start.at(), self.droppable);
        let pattern = self.pattern.clone();
        let request = Request::OpenWildcard { pattern, schema: T::schema(), start, droppable };
        let (answer, fds) = control.request(&request)?;
        let Answer::WildcardOpened { wildcard } = answer else { return Err(unexpected(&answer)) };
        let _held = Held::new(control.clone(), HandleRef::Wildcard { wildcard });
        let missing = AttachError::Descriptors { found: 0, expected: 1 };
        let notice = notice::attach(fds.first().ok_or(missing)?, control.bus_number(), wildcard)?;
        let mut core = WildcardCore {
            topics: Vec::new(),
            next: 0,
            found: 0,
            notice,
            told: 0,
            waiting: VecDeque::new(),
            troubles: VecDeque::new(),
            expired: 0,
            generation: 0,
            pattern: self.pattern,
            wildcard,
            droppable,
            wait: self.wait,
            control: control.clone(),
            _held,
        };
        // Those that existed have come before the answer. What is wrong with one of them the first receive says; being cut off,
        // too.
        let _ = core.take_new_topics(Effort::Whole);
        Ok(WildcardSubscriber { core, payload: PhantomData })
    }
}

/// What one look does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effort {
    /// Little at a time: for who has a deadline, or others to look after.
    Bounded,
    /// All there is to do.
    Whole,
}

impl Effort {
    fn is_spent(self, topics: usize) -> bool {
        self == Effort::Bounded && topics >= TOPICS_A_LOOK
    }
}

/// Whether the topics that were announced have all come.
#[derive(PartialEq, Eq)]
enum News {
    AllHere,
    /// There are more to take at once.
    LeftOff,
    /// The coordinator has them yet, or is away.
    OnTheirWay,
}

impl WildcardCore {
    /// Takes the topics that came since, if any were announced.
    #[inline]
    fn look_for_topics(&mut self, effort: Effort) -> Result<News, ConnectError> {
        if self.notice.opened() == self.told && self.waiting.is_empty() {
            return Ok(News::AllHere);
        }
        self.take_new_topics(effort)
    }

    #[cold]
    fn take_new_topics(&mut self, effort: Effort) -> Result<News, ConnectError> {
        let received = self.receive_topics();
        let (start, mut taken) = (Instant::now(), 0);
        // What goes wrong with one of them is that one's affair: the others are taken all the same.
        while let Some(granted) = self.waiting.pop_front() {
            if let Err(trouble) = self.add(granted) {
                self.troubles.push_back(trouble);
            }
            taken += 1;
            // Large ones take long.
            if effort.is_spent(taken) || effort == Effort::Bounded && start.elapsed() >= wait::MOMENT {
                break;
            }
        }
        // What could not be received is found missing by the look that has taken the rest.
        if self.waiting.is_empty() { received } else { Ok(News::LeftOff) }
    }

    /// Receives the topics that came since.
    fn receive_topics(&mut self) -> Result<News, ConnectError> {
        let announced = self.notice.opened();
        if announced != self.told {
            let (granted, told) = self.control.wildcard_topics(self.wildcard, announced)?;
            self.waiting.extend(granted);
            self.told = told.min(announced).max(self.told);
        }
        Ok(if self.told >= announced { News::AllHere } else { News::OnTheirWay })
    }

    fn add(&mut self, (answer, fds): Granted) -> Result<(), WildcardError> {
        if let Answer::WildcardMissed { topic, why, .. } = answer {
            return Err(WildcardError::Missed { topic, why });
        }
        let Answer::WildcardTopic { info, cursor, position, sequence, segments, .. } = answer else { return Ok(()) };
        let (name, handle) = (info.name.clone(), HandleRef::Subscriber { topic: info.id, cursor });
        if fds.len() < segments.len() {
            // Given back, it holds nobody.
            self.control.release(handle);
            let context = format!("taking {} descriptors", segments.len());
            let problem = "this process has as many open files as it may (ulimit -n)".to_owned();
            return Err(WildcardError::Missed { topic: name, why: Refusal::System { context, problem } });
        }
        let place = Place { position, sequence };
        let segments = segments.into_iter().zip(fds).collect();
        let opened = SubscriberCore::of_wildcard(info, self.control.clone(), cursor, place, self.droppable, segments);
        match opened {
            Ok(core) => {
                self.topics.push(Member { name: name.into(), handle, core });
                self.generation += 1;
                Ok(())
            }
            Err(source) => {
                self.control.release(handle);
                Err(WildcardError::Attach { topic: name, source })
            }
        }
    }

    /// Finds the next message, beginning with the topic whose turn it is. In each it passes over a few messages at most that are
    /// not for us, so that no topic delays the others.
    pub(super) fn look(&mut self) -> Look<Result<(), WildcardError>> {
        self.look_by(Effort::Bounded, SubscriberCore::look)
    }

    /// Finds the next message by looking at each topic in this way.
    fn look_by(
        &mut self,
        effort: Effort,
        look: impl Fn(&mut SubscriberCore) -> Result<Step, RecvError>,
    ) -> Look<Result<(), WildcardError>> {
        if let Err(forked) = self.control.check_process() {
            return Look::Found(Err(forked.into()));
        }
        let before = self.generation;
        // Without its coordinator the subscription goes on with the topics it has, and says so when they have nothing.
        let (news, cut_off) = match self.look_for_topics(effort) {
            Ok(news) => (news, None),
            Err(error) => (News::OnTheirWay, Some(error.into())),
        };
        if let Some(trouble) = self.troubles.pop_front() {
            return Look::Found(Err(trouble));
        }
        let (mut unvisited, mut removed) = (self.topics.len(), 0);
        let mut has_more = news == News::LeftOff;
        while unvisited > 0 {
            unvisited -= 1;
            if effort.is_spent(removed) {
                has_more = true;
                break;
            }
            let turn = if self.next < self.topics.len() { self.next } else { 0 };
            match look(&mut self.topics[turn].core) {
                Ok(Step::Found) => {
                    (self.found, self.next) = (turn, turn + 1);
                    return Look::Found(Ok(()));
                }
                Ok(step) => {
                    self.next = turn + 1;
                    has_more |= step == Step::Passed;
                }
                // Also where it says that the bus was stopped: a publisher can make it say so. The notice knows.
                Err(RecvError::Gone(_)) => {
                    drop(self.remove(turn));
                    removed += 1;
                }
                Err(RecvError::Lagged { from, to }) => {
                    self.next = turn + 1;
                    let topic = self.topics[turn].name.to_string();
                    return Look::Found(Err(WildcardError::Lagged { topic, from, to }));
                }
                Err(RecvError::Corrupt(problem)) => {
                    let topic = self.remove(turn).to_string();
                    return Look::Found(Err(WildcardError::Corrupt { topic, problem }));
                }
                // None of them comes from here: nothing waits, fences are for consumers, and forks were asked about before.
                Err(RecvError::TimedOut | RecvError::Fenced | RecvError::Forked { .. }) => self.next = turn + 1,
            }
        }
        match cut_off {
            _ if has_more => Look::Within(Duration::ZERO),
            Some(error) => Look::Found(Err(error)),
            None => self.nothing(before, &news),
        }
    }

    fn nothing<R>(&self, before: u64, news: &News) -> Look<Result<R, WildcardError>> {
        if self.notice.has_ended() {
            Look::Found(Err(WildcardError::Gone(GoneReason::Stopped)))
        } else if before != self.generation {
            Look::OtherBells
        } else if *news == News::OnTheirWay || !self.is_rung() {
            Look::Within(wait::MOMENT)
        } else {
            Look::Nothing
        }
    }

    /// Whether all its topics ring when there is something.
    fn is_rung(&self) -> bool {
        self.topics.iter().all(|member| member.core.is_rung())
    }

    /// Takes a topic out of the subscription; its name.
    fn remove(&mut self, index: usize) -> Arc<str> {
        let member = self.topics.swap_remove(index);
        self.generation += 1;
        self.expired += member.core.expired();
        drop(member.core);
        self.control.release(member.handle);
        member.name
    }

    fn wait(&mut self, limit: Option<Duration>) -> Result<(), WildcardError> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let found = wait::until_any(self, self.wait, deadline, |core, into| core.bells(into), Self::look);
        found.unwrap_or(Err(WildcardError::TimedOut))
    }

    pub(super) fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        // First: where the kernel can sleep on a part of them only, new topics should not be in the other.
        into.push(self.notice.part(|notice| &notice.bell));
        into.extend(self.topics.iter().map(|member| member.core.bell().clone()));
    }

    fn glance(&mut self) -> Look<()> {
        if self.control.check_process().is_err() {
            return Look::Found(());
        }
        let news = self.look_for_topics(Effort::Bounded);
        let ready = |member: &mut Member| member.core.is_ready();
        match news {
            _ if self.notice.has_ended() || !self.troubles.is_empty() => Look::Found(()),
            _ if self.topics.iter_mut().any(ready) => Look::Found(()),
            Ok(News::LeftOff) => Look::Within(Duration::ZERO),
            Ok(News::AllHere) if self.is_rung() => Look::Nothing,
            Ok(_) => Look::Within(wait::MOMENT),
            // It is found again by the receive.
            Err(_) => Look::Found(()),
        }
    }
}

/// The topics that come to a pattern, for somebody who reads them in a way of its own: what is published on them stays until it
/// has seen to that.
pub(crate) struct Arrivals {
    core: WildcardCore,
    /// The topics that have come since the last release, and our cursors on them.
    taken: Vec<(u64, HandleRef)>,
    /// Those that were kept then.
    kept: Vec<(u64, HandleRef)>,
}

impl Arrivals {
    /// From now on no topic that the pattern stands for comes unnoticed.
    pub(crate) fn open(bus: &Bus, pattern: &str) -> Result<Arrivals, OpenError> {
        let mut core = bus.wildcard::<[u8]>(pattern).open()?.core;
        // Those that exist are the caller's to find.
        while !core.topics.is_empty() {
            drop(core.remove(0));
        }
        Ok(Arrivals { core, taken: Vec::new(), kept: Vec::new() })
    }

    /// Rings when there may be news.
    pub(crate) fn bell(&self) -> Shared<Doorbell> {
        self.core.notice.part(|notice| &notice.bell)
    }

    /// Whether topics have come that were not released.
    pub(crate) fn has_news(&self) -> bool {
        self.core.notice.opened() != self.core.told || !self.taken.is_empty()
    }

    /// Whether the bus was stopped.
    pub(crate) fn have_ended(&self) -> bool {
        self.core.notice.has_ended()
    }

    /// Takes what has come; it is held until [`Self::release`]. While the coordinator is away, that is nothing. A topic that
    /// the subscription has no room for is found all the same, only not held until then.
    pub(crate) fn take(&mut self) {
        let _ = self.core.receive_topics();
        let cursors = self.core.waiting.drain(..).filter_map(|(answer, _)| match answer {
            Answer::WildcardTopic { info, cursor, .. } => {
                Some((info.id, HandleRef::Subscriber { topic: info.id, cursor }))
            }
            _ => None,
        });
        self.taken.extend(cursors);
    }

    /// Lets go of the topics that were taken, but for those that are to be held for longer: until a release that says otherwise.
    /// Which ones those were.
    pub(crate) fn release(&mut self, keep: impl Fn(u64) -> bool) -> BTreeSet<u64> {
        let all = self.kept.drain(..).chain(self.taken.drain(..));
        let (kept, over): (_, Vec<(u64, HandleRef)>) = all.partition(|(topic, _)| keep(*topic));
        self.kept = kept;
        over.iter().for_each(|(_, cursor)| self.core.control.release(*cursor));
        over.into_iter().map(|(topic, _)| topic).collect()
    }
}

impl<T: Payload + ?Sized> Waitable for WildcardSubscriber<T> {}

impl<T: Payload + ?Sized> Parts for WildcardSubscriber<T> {
    fn glance(&mut self) -> Look<()> {
        self.core.glance()
    }

    fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        self.core.bells(into);
    }

    fn generation(&self) -> u64 {
        self.core.generation
    }
}

impl<T: Payload + ?Sized> WildcardSubscriber<T> {
    /// Receives the next message of any of its topics if one is there. Never waits.
    ///
    /// # Errors
    /// [`WildcardError`]; what concerns one topic names it, and the next call goes on with the others.
    #[inline]
    pub fn try_recv(&mut self) -> Result<Option<WildcardMessage<'_, T>>, WildcardError> {
        let seen = self.core.look_by(Effort::Whole, SubscriberCore::poll);
        self.found(seen)
    }

    /// Receives the next message if one look finds it. `None` also where it has only passed over a few that are not for us:
    /// for who looks again when [`Parts::glance`] says so, and has others to look after meanwhile.
    pub(crate) fn look(&mut self) -> Result<Option<WildcardMessage<'_, T>>, WildcardError> {
        let seen = self.core.look();
        self.found(seen)
    }

    fn found(&self, seen: Look<Result<(), WildcardError>>) -> Result<Option<WildcardMessage<'_, T>>, WildcardError> {
        match seen {
            Look::Found(found) => found.map(|()| Some(self.message())),
            Look::Nothing | Look::OtherBells | Look::Within(_) => Ok(None),
        }
    }

    /// Receives the next message of any of its topics, waiting for it as chosen by [`WildcardBuilder::wait`].
    ///
    /// # Errors
    /// As [`Self::try_recv`].
    pub fn recv(&mut self) -> Result<WildcardMessage<'_, T>, WildcardError> {
        self.core.wait(None)?;
        Ok(self.message())
    }

    /// Receives the next message of any of its topics, waiting for at most `limit`.
    ///
    /// # Errors
    /// [`WildcardError::TimedOut`] when nothing came; otherwise as [`Self::try_recv`].
    pub fn recv_timeout(&mut self, limit: Duration) -> Result<WildcardMessage<'_, T>, WildcardError> {
        self.core.wait(Some(limit))?;
        Ok(self.message())
    }

    /// How many messages it has skipped because they had expired.
    pub fn expired(&self) -> u64 {
        self.core.expired + self.core.topics.iter().map(|member| member.core.expired()).sum::<u64>()
    }

    /// What its topics' names are like.
    pub fn pattern(&self) -> &str {
        &self.core.pattern
    }

    /// The topics it reads now.
    pub fn topics(&self) -> impl Iterator<Item = &str> {
        self.core.topics.iter().map(|member| &*member.name)
    }

    /// What was found last.
    pub(super) fn message(&self) -> WildcardMessage<'_, T> {
        let member = &self.core.topics[self.core.found];
        WildcardMessage { topic: &member.name, message: Message::new(&member.core) }
    }
}

impl<T: ?Sized> WildcardMessage<'_, T> {
    /// The topic it comes from.
    pub fn topic(&self) -> &str {
        self.topic
    }

    /// The message in memory of its own, which the next receive leaves alone.
    pub fn detach(&self) -> OwnedWildcardMessage<T> {
        OwnedWildcardMessage { topic: self.topic.clone(), message: self.message.detach() }
    }
}

impl<T: ?Sized> OwnedWildcardMessage<T> {
    /// The topic it comes from.
    pub fn topic(&self) -> &str {
        &self.topic
    }
}

impl<'a, T: ?Sized> Deref for WildcardMessage<'a, T> {
    type Target = Message<'a, T>;

    fn deref(&self) -> &Message<'a, T> {
        &self.message
    }
}

impl<T: ?Sized> Deref for OwnedWildcardMessage<T> {
    type Target = OwnedMessage<T>;

    fn deref(&self) -> &OwnedMessage<T> {
        &self.message
    }
}

impl<T: Payload + fmt::Debug + ?Sized> fmt::Debug for WildcardMessage<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WildcardMessage").field("topic", &self.topic).field("message", &self.message).finish()
    }
}

impl<T: Payload + fmt::Debug + ?Sized> fmt::Debug for OwnedWildcardMessage<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedWildcardMessage").field("topic", &self.topic).field("message", &self.message).finish()
    }
}
