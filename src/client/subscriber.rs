//! [`Subscriber`] and how to open one.

use std::collections::{BTreeSet, HashMap};
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::client::bus::{Bus, unexpected};
use crate::client::control::Control;
use crate::client::envelope::{EnvelopeView, unix_ns};
use crate::client::held::Held;
use crate::client::message::Message;
use crate::client::read::{ChannelPort, ExclusivePort, Found, Glance, ManyPort, Opener, ReadPort, Step, Wanted};
use crate::client::select::{Parts, Waitable};
use crate::coordinator::protocol::{Answer, HandleRef, Request, SegmentRef, StartAt, TopicInfo};
use crate::error::{AttachError, OpenError, RecvError, Refusal};
use crate::os::home::Home;
use crate::ring::doorbell::Doorbell;
use crate::ring::log::Place;
use crate::ring::sequence::Sequence;
use crate::shm::segment::{Access, Segment};
use crate::shm::shared::Shared;
use crate::shm::topic::{self, Arenas, LogSegments, SharedInfo};
use crate::topic::{Full, Mode, Payload, Topic, TopicOptions};
use crate::wait::{self, Look, Wait};

/// Where a subscriber starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// With what is published from now on.
    #[default]
    Latest,
    /// With the oldest message retained when the cursor comes into force.
    Oldest,
    /// With the newest `n` messages, or as many of them as are retained.
    Last(u64),
    /// With this sequence. If it is not retained any more, the first receive returns `Lagged`.
    Sequence(Sequence),
    /// With the first retained message that was published at this time or later; needs a topic with envelopes.
    Time(SystemTime),
    /// With the newest message of each key, in their order, then everything published from now on; needs a topic with
    /// envelopes. Messages without a key count as having the same one. Opening reads the topic once, through a second cursor.
    LastPerKey,
}

impl Start {
    /// Where the coordinator is to put the cursor.
    pub(crate) fn at(self) -> StartAt {
        match self {
            Start::Latest => StartAt::Latest,
            Start::Oldest => StartAt::Oldest,
            Start::Last(count) => StartAt::Last(count),
            Start::Sequence(sequence) => StartAt::Sequence(sequence.get()),
            Start::Time(_) | Start::LastPerKey => StartAt::Scan,
        }
    }
}

/// Where a group is to start.
pub(crate) struct GroupStart {
    pub(crate) at: StartAt,
    /// Keeps what was found there in the ring until the group is in force.
    _holds: Option<SubscriberCore>,
}

impl GroupStart {
    /// Where `start` is on a topic now. A group begins at a sequence, so a time is looked for.
    pub(crate) fn find(bus: &Bus, topic: &str, start: Start) -> Result<GroupStart, OpenError> {
        let refused = |problem: &str| Refusal::Options { topic: topic.to_owned(), problem: problem.to_owned() };
        match start {
            Start::LastPerKey => {
                let problem = "a group delivers everything from one place on, so it cannot start at the last of each key; \
                               a subscriber can";
                Err(refused(problem).into())
            }
            Start::Time(time) if time > SystemTime::now() => {
                Err(refused("a group cannot start at a time that is still to come").into())
            }
            Start::Time(time) => {
                let subscriber = bus.subscriber(Topic::<[u8]>::named(topic)).start(start);
                let (core, sequence) = subscriber.find_time(unix_ns(time))?;
                Ok(GroupStart { at: StartAt::Sequence(sequence), _holds: Some(core) })
            }
            _ => Ok(GroupStart { at: start.at(), _holds: None }),
        }
    }
}

/// Reads a topic; every subscriber sees every message.
///
/// On `block` and `reject` topics it holds the ring back until it has read (unless it is droppable). What it has read
/// is given back in steps of a sixteenth of the ring, when it runs dry, and when a publisher waits.
pub struct Subscriber<T: ?Sized> {
    pub(super) core: SubscriberCore,
    payload: PhantomData<fn() -> Box<T>>,
}

/// What does not depend on the payload's type.
pub(crate) struct SubscriberCore {
    port: Port,
    found: Found,
    /// Where the topic has envelopes.
    opener: Option<Opener>,
    info: SharedInfo,
    wait: Wait,
    /// What it sleeps on.
    bell: Shared<Doorbell>,
    /// Whether anybody rings it.
    rung: bool,
    held: Option<Held>,
    home: Home,
}

/// The kinds of ring: closed, so that receiving is a branch and not an indirect call.
enum Port {
    Exclusive(ExclusivePort<7>),
    ExclusiveSmall(ExclusivePort<1>),
    Many(ManyPort),
    Channel(ChannelPort<7>),
    ChannelSmall(ChannelPort<1>),
}

/// How a subscriber is to be opened; ends with [`SubscriberBuilder::open`].
#[must_use]
pub struct SubscriberBuilder<T: ?Sized> {
    bus: Bus,
    topic: Topic<T>,
    start: Start,
    droppable: bool,
    wait: Wait,
}

impl Bus {
    /// A subscriber of an existing topic, to be opened with `.open()`; it starts at [`Start::Latest`].
    pub fn subscriber<T: Payload + ?Sized>(&self, topic: Topic<T>) -> SubscriberBuilder<T> {
        let (bus, start, wait) = (self.clone(), Start::default(), Wait::default());
        SubscriberBuilder { bus, topic, start, droppable: false, wait }
    }
}

impl<T: Payload + ?Sized> SubscriberBuilder<T> {
    /// Where to start (default [`Start::Latest`]).
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Never holds publishers back: where it falls behind by more than the ring, it gets `Lagged` like a reader of an
    /// `overwrite` topic.
    pub fn droppable(mut self) -> Self {
        self.droppable = true;
        self
    }

    /// How to wait for messages (default [`Wait::Adaptive`]).
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// Opens it. When this returns, the cursor is in force: nothing published from now on is missed.
    ///
    /// # Errors
    /// The topic does not exist or carries another type, or a limit is reached; see [`OpenError`].
    pub fn open(self) -> Result<Subscriber<T>, OpenError> {
        let mut core = self.open_core()?;
        let wanted = match self.start {
            Start::Time(time) => Wanted::Since(unix_ns(time)),
            Start::LastPerKey => self.last_per_key()?,
            // What has grown too old may still be there until the coordinator looks next, or because others need it.
            Start::Oldest if core.info.options.max_age_ms > 0 => {
                let age = Duration::from_millis(core.info.options.max_age_ms);
                Wanted::Since(SystemTime::now().checked_sub(age).map_or(0, unix_ns))
            }
            _ => Wanted::All,
        };
        if let Some(opener) = &mut core.opener {
            opener.want(wanted);
        }
        Ok(Subscriber { core, payload: PhantomData })
    }

    /// Reads the topic once as it is now: which sequences are the newest of their keys. The caller's own cursor keeps
    /// in place what this one finds.
    fn last_per_key(&self) -> Result<Wanted, OpenError> {
        let until = self.bus.topic(self.topic.name())?.tail_sequence;
        let mut scan = self.open_core()?;
        let mut newest: HashMap<Box<[u8]>, u64> = HashMap::new();
        loop {
            match scan.poll() {
                Ok(Step::Found) if scan.found.sequence < until => {
                    let key = scan.envelope().and_then(|envelope| envelope.key()).unwrap_or_default();
                    match newest.get_mut(key) {
                        Some(sequence) => *sequence = scan.found.sequence,
                        None => drop(newest.insert(key.into(), scan.found.sequence)),
                    }
                }
                // Who reads it finds that out again.
                Err(RecvError::Lagged { .. }) => {}
                Err(RecvError::Corrupt(problem)) => return Err(self.corrupt(problem)),
                Ok(_) | Err(_) => {
                    return Ok(Wanted::Among { sequences: BTreeSet::from_iter(newest.into_values()), until });
                }
            }
        }
    }

    /// The first retained message that was published at this time or later, expired or not, with a cursor that keeps it in
    /// place; where there is none, the end of what was there.
    fn find_time(&self, since_ns: u64) -> Result<(SubscriberCore, u64), OpenError> {
        let mut core = self.open_core()?;
        if let Some(opener) = &mut core.opener {
            opener.want(Wanted::Since(since_ns));
            opener.want_expired();
        }
        loop {
            match core.poll() {
                Ok(Step::Found) => {
                    let sequence = core.found.sequence;
                    return Ok((core, sequence));
                }
                // A cursor that keeps nothing has been overtaken: what is gone is not looked for.
                Err(RecvError::Lagged { .. }) => {}
                Err(RecvError::Corrupt(problem)) => return Err(self.corrupt(problem)),
                Ok(_) => {
                    let sequence = with_port!(&core.port, port => port.place()).sequence;
                    return Ok((core, sequence));
                }
                // The topic is gone, say: whoever asks for it by its name is told, or it is another one by now.
                Err(_) => {
                    let tail = self.bus.topic(self.topic.name())?.tail_sequence;
                    return Ok((core, tail));
                }
            }
        }
    }

    fn corrupt(&self, problem: &str) -> OpenError {
        Refusal::Corrupt { topic: self.topic.name().to_owned(), problem: problem.to_owned() }.into()
    }

    /// Whether the topic has what the start goes by.
    fn check_start(&self, options: &TopicOptions) -> Result<(), OpenError> {
        let what = match self.start {
            Start::Time(_) => "a time",
            Start::LastPerKey => "the last of each key",
            _ => return Ok(()),
        };
        let lack = match (options.envelope, options.mode) {
            (_, Mode::Channel) => "a channel has one reader, which starts where the last one ended",
            (false, _) => "its messages have no timestamp and no key; create it with --envelope",
            (true, _) => return Ok(()),
        };
        let problem = format!("cannot start at {what}: {lack}");
        Err(Refusal::Options { topic: self.topic.name().to_owned(), problem }.into())
    }

    fn open_core(&self) -> Result<SubscriberCore, OpenError> {
        let control = self.bus.control();
        let start = self.start.at();
        let topic = self.topic.name().to_owned();
        let request = Request::OpenSubscriber { topic, schema: T::schema(), start, droppable: self.droppable };
        let (answer, fds) = control.request(&request)?;
        let Answer::SubscriberOpened { info, cursor, position, sequence, asked, segments } = answer else {
            return Err(unexpected(&answer));
        };
        let held = Held::new(control.clone(), HandleRef::Subscriber { topic: info.id, cursor });
        self.check_start(&info.options)?;
        let opened = Opened {
            info: Arc::new(info),
            control: control.clone(),
            cursor,
            place: Place { position, sequence },
            asked,
            exactly: matches!(self.start, Start::Sequence(_)),
            droppable: self.droppable,
        };
        let (info, opener) = (opened.info.clone(), Opener::new(&opened.info));
        let rung = !segments.contains(&SegmentRef::OwnCursors);
        let port = opened.attach(segments.into_iter().zip(fds))?;
        Ok(SubscriberCore {
            bell: port.bell(),
            port,
            found: Found::nothing(),
            opener,
            info,
            wait: self.wait,
            rung,
            held: Some(held),
            home: control.home(),
        })
    }
}

/// What the coordinator answered, on its way to a port.
struct Opened {
    info: SharedInfo,
    control: Arc<Control>,
    cursor: u32,
    place: Place,
    asked: u64,
    /// Whether the caller named the sequence, and so must be told if it is gone.
    exactly: bool,
    droppable: bool,
}

impl Opened {
    fn attach(self, segments: impl Iterator<Item = (SegmentRef, OwnedFd)>) -> Result<Port, AttachError> {
        let info = &self.info;
        let (mut log, mut cursors, mut arenas) = (None, None, Arenas::new());
        for (segment, fd) in segments {
            let attach = |promise, access| Segment::attach(fd.as_fd(), &promise, access);
            match segment {
                SegmentRef::Log => log = Some(attach(info.log(), Access::ReadOnly)?),
                SegmentRef::Cursors | SegmentRef::OwnCursors => {
                    cursors = Some(attach(info.cursors(), Access::ReadWrite)?);
                }
                SegmentRef::Channel => {
                    return Ok(Port::channel(info, &attach(info.channel(), Access::ReadWrite)?, false));
                }
                SegmentRef::Ledger => {
                    return Err(AttachError::Field { field: "kind of segment", found: 6, expected: 4 });
                }
                SegmentRef::Arena(slot) => {
                    let arena = attach(info.arena(slot), Access::ReadOnly)?;
                    arenas.resize_with(arenas.len().max(slot as usize + 1), || None);
                    arenas[slot as usize] = Some(topic::arena(&arena, &info.geometry));
                }
            }
        }
        let (Some(log), Some(cursors)) = (log, cursors) else {
            return Err(AttachError::Descriptors { found: 0, expected: 2 });
        };
        let segments = LogSegments { log, cursors };
        match (info.options.mode, info.small_slots()) {
            (Mode::Exclusive, true) => Ok(Port::ExclusiveSmall(self.exclusive(&segments, arenas)?)),
            (Mode::Exclusive, false) => Ok(Port::Exclusive(self.exclusive(&segments, arenas)?)),
            _ => Ok(Port::Many(self.many(&segments, arenas))),
        }
    }

    fn exclusive<const W: usize>(
        &self,
        segments: &LogSegments,
        mut arenas: Arenas,
    ) -> Result<ExclusivePort<W>, AttachError> {
        let no_arena = AttachError::Descriptors { found: 2, expected: 3 };
        let arena = arenas.first_mut().and_then(Option::take).ok_or(no_arena)?;
        let log = segments.exclusive(&self.info);
        let (info, gating, lost) = (self.info.clone(), self.gating(), self.lost_from());
        Ok(ExclusivePort::new(log, info, arena, self.cursor, self.place.position, gating, lost))
    }

    fn many(&self, segments: &LogSegments, arenas: Arenas) -> ManyPort {
        let log = segments.many(&self.info);
        let (info, control) = (self.info.clone(), self.control.clone());
        let (gating, skip_below, lost) = (self.gating(), self.asked, self.lost_from());
        ManyPort::new(log, info, arenas, control, self.cursor, self.place, gating, skip_below, lost)
    }

    fn gating(&self) -> bool {
        !self.droppable && self.info.options.full != Full::Overwrite
    }

    /// What was asked for and is not retained any more.
    fn lost_from(&self) -> Option<u64> {
        (self.exactly && self.asked < self.place.sequence).then_some(self.asked)
    }
}

impl Port {
    fn bell(&self) -> Shared<Doorbell> {
        with_port!(self, port => port.bell())
    }

    fn channel(info: &SharedInfo, segment: &Segment, stand_alone: bool) -> Port {
        if info.small_slots() {
            let (channel, arena) = topic::channel::<1>(segment, &info.geometry);
            Port::ChannelSmall(ChannelPort::new(channel, info, arena, stand_alone))
        } else {
            let (channel, arena) = topic::channel::<7>(segment, &info.geometry);
            Port::Channel(ChannelPort::new(channel, info, arena, stand_alone))
        }
    }
}

impl SubscriberCore {
    /// A stand-alone channel's receiver.
    pub(crate) fn stand_alone(info: TopicInfo, segment: &Segment, home: Home) -> Self {
        let info = Arc::new(info);
        let port = Port::channel(&info, segment, true);
        SubscriberCore {
            bell: port.bell(),
            port,
            found: Found::nothing(),
            opener: Opener::new(&info),
            info,
            wait: Wait::default(),
            rung: true,
            held: None,
            home,
        }
    }

    /// One topic of a wildcard subscription, which gives the cursor back.
    pub(crate) fn of_wildcard(
        info: TopicInfo,
        control: Arc<Control>,
        cursor: u32,
        place: Place,
        droppable: bool,
        segments: Vec<(SegmentRef, OwnedFd)>,
    ) -> Result<Self, AttachError> {
        let (asked, home) = (place.sequence, control.home());
        let info = Arc::new(info);
        let opener = Opener::new(&info);
        let rung = segments.iter().all(|(segment, _)| *segment != SegmentRef::OwnCursors);
        let opened = Opened { info: info.clone(), control, cursor, place, asked, exactly: false, droppable };
        let port = opened.attach(segments.into_iter())?;
        let (found, bell, wait) = (Found::nothing(), port.bell(), Wait::default());
        Ok(SubscriberCore { port, found, opener, info, wait, bell, rung, held: None, home })
    }

    pub(crate) fn set_wait(&mut self, wait: Wait) {
        self.wait = wait;
    }

    /// Finds the next message, if there is one, passing over whatever is not for the caller. It goes no further than one
    /// lap: what lies beyond was published while it looked, and has rung the bell if that was armed before.
    #[inline(always)]
    pub(crate) fn poll(&mut self) -> Result<Step, RecvError> {
        match self.look()? {
            Step::Passed => self.poll_lap(),
            step => Ok(step),
        }
    }

    #[cold]
    fn poll_lap(&mut self) -> Result<Step, RecvError> {
        let position = |core: &Self| with_port!(&core.port, port => port.place()).position;
        let end = position(self).saturating_add(with_port!(&self.port, port => port.ring_len()));
        while position(self) < end {
            let step = self.look()?;
            if step != Step::Passed {
                return Ok(step);
            }
        }
        Ok(Step::Nothing)
    }

    /// Finds the next message, or passes over a few that are not for the caller: for who has a deadline, or others to look
    /// after. Compiled into the caller as far as a few loads will do.
    #[inline(always)]
    pub(crate) fn look(&mut self) -> Result<Step, RecvError> {
        if self.opener.is_none() {
            let step = self.step()?;
            if step != Step::Passed {
                return Ok(step);
            }
        }
        self.pass_over()
    }

    /// Finds the next message that is for the caller, and opens its envelope.
    #[inline(never)]
    fn pass_over(&mut self) -> Result<Step, RecvError> {
        for _ in 0..wait::PASSED_OVER {
            let step = self.step()?;
            let is_for_caller = match &mut self.opener {
                Some(opener) if step == Step::Found => opener.open(&mut self.found)?,
                _ => step != Step::Passed,
            };
            if is_for_caller {
                return Ok(step);
            }
        }
        Ok(Step::Passed)
    }

    /// Goes on to what comes next in the ring.
    #[inline(always)]
    fn step(&mut self) -> Result<Step, RecvError> {
        if !self.home.is_here() {
            return Err(self.forked());
        }
        match with_port!(&mut self.port, port => port.poll_fast(&mut self.found)) {
            Glance::Found => Ok(Step::Found),
            Glance::Nothing => Ok(Step::Nothing),
            Glance::Unclear => self.step_slowly(),
        }
    }

    /// A forked child has a copy of its parent's handle; the cursor is the parent's.
    #[cold]
    fn forked(&self) -> RecvError {
        RecvError::Forked { opened_by: self.home.pid(), pid: std::process::id() }
    }

    fn step_slowly(&mut self) -> Result<Step, RecvError> {
        match with_port!(&mut self.port, port => port.poll(&mut self.found)) {
            Ok(Step::Nothing) => self.check_gone(),
            other => other,
        }
    }

    /// Nothing is there: because the topic is gone? Looks once more, since what came before its end counts.
    fn check_gone(&mut self) -> Result<Step, RecvError> {
        let Some(reason) = with_port!(&self.port, port => port.gone()) else { return Ok(Step::Nothing) };
        match with_port!(&mut self.port, port => port.poll(&mut self.found))? {
            Step::Nothing => Err(RecvError::Gone(reason)),
            more => Ok(more),
        }
    }

    #[inline(always)]
    fn recv(&mut self, limit: Option<Duration>) -> Result<(), RecvError> {
        if self.look()? == Step::Found { Ok(()) } else { self.wait(limit) }
    }

    fn wait(&mut self, limit: Option<Duration>) -> Result<(), RecvError> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let look = |core: &mut Self| match core.look() {
            Ok(Step::Nothing) => None,
            other => Some(other),
        };
        loop {
            let step = match self.rung {
                true => wait::until(self, self.wait, deadline, |core| core.bell(), look),
                false => wait::until_seen(self, self.wait, deadline, look),
            };
            match step {
                Some(Ok(Step::Found)) => return Ok(()),
                Some(Err(error)) => return Err(error),
                // Not asleep, so that nobody has looked at the clock.
                Some(Ok(_)) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
                _ => return Err(RecvError::TimedOut),
            }
        }
    }

    pub(crate) fn bell(&self) -> &Shared<Doorbell> {
        &self.bell
    }

    /// Whether publishers ring the bell. For those that may not write among others' cursors they do not.
    pub(crate) fn is_rung(&self) -> bool {
        self.rung
    }

    /// Whether a receive would return at once.
    pub(crate) fn is_ready(&mut self) -> bool {
        // In a forked child with an error, and without giving back what the parent holds.
        !self.home.is_here()
            || with_port!(&mut self.port, port => port.is_ready())
            || with_port!(&self.port, port => port.gone()).is_some()
    }

    /// The message found last. In a forked child it is not ours: our parent reads on.
    #[inline]
    pub(crate) fn found(&self) -> &Found {
        self.home.assert_here("message");
        &self.found
    }

    /// The envelope of the message found last, where the topic has them.
    pub(crate) fn envelope(&self) -> Option<EnvelopeView<'_>> {
        self.home.assert_here("message");
        self.opener.as_ref().map(Opener::envelope)
    }

    /// How many messages were skipped because they had expired.
    pub(crate) fn expired(&self) -> u64 {
        self.opener.as_ref().map_or(0, Opener::expired)
    }

    /// Publisher and its number of the message found last, as far as they are known.
    pub(crate) fn publisher_and_number(&self) -> Option<(u64, u64)> {
        with_port!(&self.port, port => port.publisher_of(self.found().origin()))
    }
}

impl Drop for SubscriberCore {
    fn drop(&mut self) {
        // A forked child drops a copy: the original, and its cursor, are its parent's.
        if !self.home.is_here() {
            return;
        }
        with_port!(&mut self.port, port => port.leave());
        // Only now may the coordinator give the cursor away.
        drop(self.held.take());
    }
}

impl<T: Payload + ?Sized> Waitable for Subscriber<T> {}

impl<T: Payload + ?Sized> Parts for Subscriber<T> {
    fn glance(&mut self) -> Look<()> {
        match self.core.is_ready() {
            true => Look::Found(()),
            false if self.core.is_rung() => Look::Nothing,
            false => Look::Within(wait::MOMENT),
        }
    }

    fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        into.push(self.core.bell().clone());
    }

    fn generation(&self) -> u64 {
        0
    }
}

impl<T: Payload + ?Sized> Subscriber<T> {
    pub(crate) fn from_core(core: SubscriberCore) -> Self {
        Subscriber { core, payload: PhantomData }
    }

    /// Receives the next message if it is there. Never waits, never calls the kernel unless a publisher waits for
    /// room.
    ///
    /// # Errors
    /// [`RecvError::Lagged`] says exactly what was lost; the next call goes on behind it.
    #[inline]
    pub fn try_recv(&mut self) -> Result<Option<Message<'_, T>>, RecvError> {
        let step = self.core.poll()?;
        Ok((step == Step::Found).then(|| Message::new(&self.core)))
    }

    /// Receives the next message if one look finds it. `None` also where it has only passed over a few that are not for us:
    /// for who looks again when [`Parts::glance`] says so, and has others to look after meanwhile.
    pub(crate) fn look(&mut self) -> Result<Option<Message<'_, T>>, RecvError> {
        let step = self.core.look()?;
        Ok((step == Step::Found).then(|| Message::new(&self.core)))
    }

    /// Receives the next message, waiting for it as chosen by [`SubscriberBuilder::wait`].
    ///
    /// # Errors
    /// [`RecvError`]
    #[inline]
    pub fn recv(&mut self) -> Result<Message<'_, T>, RecvError> {
        self.core.recv(None)?;
        Ok(Message::new(&self.core))
    }

    /// Receives the next message, waiting for at most `limit`.
    ///
    /// # Errors
    /// [`RecvError::TimedOut`] when nothing came.
    #[inline]
    pub fn recv_timeout(&mut self, limit: Duration) -> Result<Message<'_, T>, RecvError> {
        self.core.recv(Some(limit))?;
        Ok(Message::new(&self.core))
    }

    /// How many messages lie between this subscriber and the tail. Stale the moment it is read.
    pub fn lag(&self) -> u64 {
        with_port!(&self.core.port, port => port.lag())
    }

    /// How many messages this subscriber has skipped because their time-to-live had run out. They count as read.
    pub fn expired(&self) -> u64 {
        self.core.expired()
    }

    /// The options the topic was created with.
    pub fn topic_options(&self) -> &TopicOptions {
        &self.core.info.options
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        &self.core.info.name
    }

    /// Chooses how to wait from now on.
    pub fn set_wait(&mut self, wait: Wait) {
        self.core.set_wait(wait);
    }
}
