//! Request and reply: a request is a message with three headers, its reply a message to the requester's inbox.
//!
//! | header | value |
//! |---|---|
//! | `reply-to` | the inbox, an ephemeral topic of the requester |
//! | `correlation-id` | a number that the reply repeats, in decimal |
//! | `deadline-ns` | when the requester gives up, in nanoseconds since 1970, in decimal |

use std::collections::VecDeque;
#[cfg(feature = "async")]
use std::future::poll_fn;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::client::bus::Bus;
use crate::client::envelope::{Envelope, unix_ns};
use crate::client::message::Message;
use crate::client::publisher::Publisher;
use crate::client::read::Step;
#[cfg(feature = "async")]
use crate::client::seat::Seat;
use crate::client::select::{Parts, Waitable};
use crate::client::subscriber::Subscriber;
use crate::error::{OpenError, PublishError, RecvError, Refusal, ReplyError, RequestError};
use crate::ring::doorbell::Doorbell;
use crate::shm::shared::Shared;
use crate::topic::{Full, Mode, Topic, TopicOptions};
use crate::wait::{self, Look, Wait};

const REPLY_TO: &str = "reply-to";
const CORRELATION_ID: &str = "correlation-id";
const DEADLINE: &str = "deadline-ns";

/// Every inbox's name begins with it; replies go nowhere else, whatever a request says.
const INBOX: &str = "_inbox.";

/// Replies that an inbox holds.
const INBOX_MESSAGES: u64 = 64;

/// The largest reply where nothing else is asked for.
const REPLY_BYTES: u64 = 256 << 10;

/// The largest reply that can be asked for: every responder makes so much memory its own for every requester, and anybody may
/// name an inbox.
const MAX_REPLY_BYTES: u64 = 64 << 20;

/// Publishers to inboxes that a responder keeps open.
const KEPT_INBOXES: usize = 64;

/// Sends requests to a topic and waits for their replies, one at a time; see [`Bus::requester`].
pub struct Requester {
    topic: String,
    requests: Publisher<[u8]>,
    replies: Subscriber<[u8]>,
    inbox: String,
    /// The id of the next request.
    next_id: u64,
    wait: Wait,
    bus: Bus,
}

/// A request about to be sent.
struct Question {
    id: u64,
    envelope: Envelope,
    deadline: Option<Instant>,
}

/// A reply; dereferences to its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    bytes: Vec<u8>,
}

/// Takes requests from a topic and replies to them; see [`Bus::responder`].
pub struct Responder {
    requests: Subscriber<[u8]>,
    replies: Replies,
}

/// A request to be replied to. Dropping it replies nothing: the requester waits until its deadline, or for another
/// responder.
pub struct Incoming<'a> {
    message: Message<'a, [u8]>,
    replies: &'a mut Replies,
}

impl Bus {
    /// Opens the requesting end of a topic. A topic that does not exist is created, with envelopes. Replies have up to
    /// 256 KiB.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use shmbus::{Bus, RequestError, Topic};
    /// # let bus = Bus::open_default()?;
    /// let mut requester = bus.requester(Topic::new("greetings"))?;
    /// match requester.request(b"world", Duration::from_secs(1)) {
    ///     Ok(reply) => println!("{} bytes", reply.len()),
    ///     Err(RequestError::NoResponder { .. }) => println!("nobody is there"),
    ///     Err(error) => return Err(error.into()),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The topic has no envelopes or is a channel; otherwise as [`Bus::publisher`].
    pub fn requester(&self, topic: Topic<[u8]>) -> Result<Requester, OpenError> {
        self.requester_for(topic, REPLY_BYTES)
    }

    /// The same for replies of up to `reply_bytes`, at most 64 MiB: so much memory is reserved for each responder that replies.
    ///
    /// # Errors
    /// `reply_bytes` is more than that ([`Refusal::Options`]); otherwise as [`Self::requester`].
    pub fn requester_for(&self, topic: Topic<[u8]>, reply_bytes: u64) -> Result<Requester, OpenError> {
        let name = topic.name().to_owned();
        if reply_bytes > MAX_REPLY_BYTES {
            let problem = format!("replies have at most {MAX_REPLY_BYTES} bytes, asked for {reply_bytes}");
            return Err(Refusal::Options { topic: name, problem }.into());
        }
        let requests = self.publisher(topic.envelope())?;
        check_options(&name, requests.topic_options())?;
        let inbox = format!("{INBOX}{:016x}", crate::coordinator::random_u64());
        let declared = Topic::<[u8]>::named(inbox.as_str()).messages(INBOX_MESSAGES).bytes(reply_bytes);
        let options = TopicOptions { max_subscribers: 8, ..declared.full(Full::Reject).envelope().options() };
        // Where it exists we have created it, and the coordinator died before it could say so: nobody else has the name.
        self.create_as(&inbox, &options, None, true, true)?;
        let replies = self.subscriber(Topic::named(inbox.as_str())).open().inspect_err(|_| {
            // If this fails, too, the inbox goes with the connection.
            let _ = self.remove_topic(&inbox, true);
        })?;
        let next_id = crate::coordinator::random_u64();
        Ok(Requester { topic: name, requests, replies, inbox, next_id, wait: Wait::default(), bus: self.clone() })
    }

    /// Opens a responding end of a topic, which takes the requests published from now on. A topic that does not exist is
    /// created, with envelopes. Each of several responders gets every request, and the first reply counts.
    ///
    /// ```no_run
    /// # use shmbus::{Bus, Topic};
    /// # let bus = Bus::open_default()?;
    /// let mut responder = bus.responder(Topic::new("greetings"))?;
    /// loop {
    ///     let request = responder.recv()?;
    ///     let greeting = [b"Hello, ", request.payload()].concat();
    ///     // A requester that has given up is no reason to stop.
    ///     let _ = request.reply(&greeting);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The topic has no envelopes or is a channel; otherwise as [`Subscriber`]s.
    pub fn responder(&self, topic: Topic<[u8]>) -> Result<Responder, OpenError> {
        let topic = topic.envelope();
        let open = || self.subscriber(topic.clone()).open();
        let requests = match open() {
            Err(OpenError::Refused(Refusal::UnknownTopic { .. })) => {
                // Held until the subscriber is open, so that the topic stays.
                let _creator = self.publisher(topic.clone())?;
                open()?
            }
            other => other?,
        };
        check_options(topic.name(), requests.topic_options())?;
        Ok(Responder { requests, replies: Replies::new(self) })
    }
}

/// Whoever replies takes the memory of whatever inbox a request names, while others wait: it has to be like those that requesters
/// make.
fn check_inbox(inbox: &str, options: &TopicOptions) -> Result<(), OpenError> {
    let TopicOptions { mode, messages, bytes, envelope, .. } = *options;
    if mode == Mode::Many && envelope && messages <= INBOX_MESSAGES && bytes <= MAX_REPLY_BYTES {
        return Ok(());
    }
    let kind = if envelope { "with envelopes" } else { "without envelopes" };
    let problem = format!(
        "no requester's inbox: it is {mode} {kind}, for {messages} messages and {bytes} bytes; expected one for many with envelopes, for \
         at most {INBOX_MESSAGES} messages and {MAX_REPLY_BYTES} bytes"
    );
    Err(Refusal::Options { topic: inbox.to_owned(), problem }.into())
}

/// Requests need headers, and to know who reads.
fn check_options(topic: &str, options: &TopicOptions) -> Result<(), OpenError> {
    let problem = match (options.envelope, options.mode) {
        (_, Mode::Channel) => "requests do not go over a channel; create the topic for many",
        (false, _) => "requests need headers, and it was created without envelopes; create it with --envelope",
        (true, _) => return Ok(()),
    };
    Err(Refusal::Options { topic: topic.to_owned(), problem: problem.to_owned() }.into())
}

impl Requester {
    /// Chooses how to wait for replies (default [`Wait::Adaptive`]).
    pub fn set_wait(&mut self, wait: Wait) {
        self.wait = wait;
    }

    /// Sends a request and waits for the first reply to it, for at most `limit`. Replies to earlier requests are passed
    /// over.
    ///
    /// # Errors
    /// [`RequestError::NoResponder`] at once where nobody reads the topic, and as soon as the last reader has left without
    /// a reply. Whoever subscribes to the topic counts as a reader, whether or not it replies.
    pub fn request(&mut self, payload: &[u8], limit: Duration) -> Result<Reply, RequestError> {
        let Question { id, envelope, deadline } = self.prepare(limit)?;
        self.requests.publish_with_until(payload, &envelope, deadline)?;
        // A reader that leaves rings for publishers that wait for room: so the last one's end wakes us, too.
        let outcome = wait::until_any(self, self.wait, deadline, Self::bells, |requester| requester.look_for(id));
        outcome.unwrap_or_else(|| Err(self.deadline_exceeded(limit)))
    }

    /// Sends a request and waits for the first reply to it, for at most `limit` from the first poll on; otherwise as
    /// [`Self::request`]. If the future is dropped before it resolves, the request may have been sent; its reply is passed over
    /// then.
    ///
    /// # Errors
    /// As [`Self::request`].
    #[cfg(feature = "async")]
    pub async fn request_async(&mut self, payload: &[u8], limit: Duration) -> Result<Reply, RequestError> {
        let Question { id, envelope, deadline } = self.prepare(limit)?;
        self.requests.core.publish_async(self.requests.checked(payload)?, &envelope, deadline).await?;
        let mut seat = Seat::default();
        let look = |requester: &mut Self| {
            let seen = requester.look_for(id);
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            match (seen, left) {
                (Look::Found(outcome), _) => Look::Found(outcome),
                (_, Some(left)) if left.is_zero() => Look::Found(Err(requester.deadline_exceeded(limit))),
                (Look::Within(again), Some(left)) => Look::Within(again.min(left)),
                (_, Some(left)) => Look::Within(left),
                (nothing, None) => nothing,
            }
        };
        poll_fn(|context| seat.poll(context.waker(), self, Self::bells, look)).await
    }

    /// What goes with a request that is sent now.
    fn prepare(&mut self, limit: Duration) -> Result<Question, RequestError> {
        let (started, now) = (Instant::now(), SystemTime::now());
        let deadline = started.checked_add(limit);
        // What came too late takes room that the next reply needs.
        while self.replies.core.look().map_err(RequestError::Inbox)? != Step::Nothing
            && deadline.is_none_or(|deadline| Instant::now() < deadline)
        {}
        if !self.requests.readers().any() {
            return Err(RequestError::NoResponder { topic: self.topic.clone() });
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let gives_up = now.checked_add(limit).map_or(u64::MAX, unix_ns);
        let envelope = Envelope::new().header(REPLY_TO, self.inbox.as_bytes());
        let envelope = envelope.header(CORRELATION_ID, id.to_string().as_bytes());
        let envelope = envelope.header(DEADLINE, gives_up.to_string().as_bytes()).ttl(limit);
        Ok(Question { id, envelope, deadline })
    }

    fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        self.replies.bells(into);
        into.push(self.requests.space_bell().clone());
    }

    fn deadline_exceeded(&self, limit: Duration) -> RequestError {
        RequestError::DeadlineExceeded { topic: self.topic.clone(), limit }
    }

    fn look_for(&mut self, id: u64) -> Look<Result<Reply, RequestError>> {
        // Asked before the look: who replied and left has replied.
        let alone = !self.requests.readers().any();
        for _ in 0..wait::PASSED_OVER {
            match self.replies.core.look() {
                Ok(Step::Found) => {
                    let message = Message::<[u8]>::new(&self.replies.core);
                    if number(&message, CORRELATION_ID) == Some(id) {
                        return Look::Found(Ok(Reply { bytes: message.as_bytes().to_vec() }));
                    }
                }
                // As many as a look may.
                Ok(Step::Passed) => break,
                Ok(Step::Nothing) if alone => {
                    return Look::Found(Err(RequestError::NoResponder { topic: self.topic.clone() }));
                }
                Ok(Step::Nothing) => return Look::Nothing,
                Err(error) => return Look::Found(Err(RequestError::Inbox(error))),
            }
        }
        Look::Within(Duration::ZERO)
    }
}

impl Drop for Requester {
    fn drop(&mut self) {
        // If it fails, the inbox goes with the good-bye of this process, or its death.
        let _ = self.bus.remove_topic(&self.inbox, true);
    }
}

impl std::ops::Deref for Reply {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl From<Reply> for Vec<u8> {
    fn from(reply: Reply) -> Vec<u8> {
        reply.bytes
    }
}

impl Responder {
    /// The next request, waiting for it.
    ///
    /// # Errors
    /// As [`Subscriber::recv`].
    pub fn recv(&mut self) -> Result<Incoming<'_>, RecvError> {
        Ok(Incoming { message: self.requests.recv()?, replies: &mut self.replies })
    }

    /// The next request, waiting for it for at most `limit`.
    ///
    /// # Errors
    /// As [`Subscriber::recv_timeout`].
    pub fn recv_timeout(&mut self, limit: Duration) -> Result<Incoming<'_>, RecvError> {
        Ok(Incoming { message: self.requests.recv_timeout(limit)?, replies: &mut self.replies })
    }

    /// The next request, if one is there.
    ///
    /// # Errors
    /// As [`Subscriber::try_recv`].
    pub fn try_recv(&mut self) -> Result<Option<Incoming<'_>>, RecvError> {
        let message = self.requests.try_recv()?;
        Ok(message.map(|message| Incoming { message, replies: &mut self.replies }))
    }

    /// What one look finds; see [`Subscriber::look`].
    pub(crate) fn look(&mut self) -> Result<Option<Incoming<'_>>, RecvError> {
        let message = self.requests.look()?;
        Ok(message.map(|message| Incoming { message, replies: &mut self.replies }))
    }

    /// The next request, waiting for it without blocking the thread. Dropping the future loses no request.
    ///
    /// # Errors
    /// As [`Subscriber::recv`].
    #[cfg(feature = "async")]
    pub async fn recv_async(&mut self) -> Result<Incoming<'_>, RecvError> {
        Ok(Incoming { message: self.requests.recv_async().await?, replies: &mut self.replies })
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        self.requests.topic()
    }

    /// Chooses how to wait from now on.
    pub fn set_wait(&mut self, wait: Wait) {
        self.requests.set_wait(wait);
    }
}

impl Waitable for Responder {}

impl Parts for Responder {
    fn glance(&mut self) -> Look<()> {
        self.requests.glance()
    }

    fn bells(&self, into: &mut Vec<Shared<Doorbell>>) {
        self.requests.bells(into);
    }

    fn generation(&self) -> u64 {
        self.requests.generation()
    }
}

impl Incoming<'_> {
    /// The request's bytes.
    pub fn payload(&self) -> &[u8] {
        self.message.as_bytes()
    }

    /// When the requester gives up; `None` where it does not say so.
    pub fn deadline(&self) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_nanos(number(&self.message, DEADLINE)?))
    }

    /// Replies. Never waits for the requester: an inbox that is full refuses.
    ///
    /// # Errors
    /// [`ReplyError`]; the requester will not see the reply.
    pub fn reply(self, payload: &[u8]) -> Result<(), ReplyError> {
        // A forked child may not even look at the message.
        self.replies.bus.control().check_process().map_err(|error| ReplyError::Open(error.into()))?;
        let address = ReplyAddress::of(&self.message).ok_or(ReplyError::NoAddress)?;
        self.replies.send(&address, payload)
    }
}

/// Where a reply goes.
pub(crate) struct ReplyAddress {
    inbox: String,
    id: u64,
}

impl ReplyAddress {
    /// What a request says; `None` where it is none, or names what is no inbox.
    pub(crate) fn of(message: &Message<'_, [u8]>) -> Option<ReplyAddress> {
        let (_, inbox) = message.headers().find(|(name, _)| *name == REPLY_TO)?;
        let inbox = std::str::from_utf8(inbox).ok().filter(|inbox| inbox.starts_with(INBOX))?.to_owned();
        Some(ReplyAddress { inbox, id: number(message, CORRELATION_ID)? })
    }
}

/// Sends replies, and keeps the publishers to the inboxes used last.
pub(crate) struct Replies {
    bus: Bus,
    /// The one used last is the last one.
    inboxes: VecDeque<(String, Publisher<[u8]>)>,
}

impl Replies {
    pub(crate) fn new(bus: &Bus) -> Replies {
        Replies { bus: bus.clone(), inboxes: VecDeque::new() }
    }

    /// Sends a reply.
    pub(crate) fn send(&mut self, address: &ReplyAddress, payload: &[u8]) -> Result<(), ReplyError> {
        let (name, mut publisher) = match self.inboxes.iter().position(|(name, _)| *name == address.inbox) {
            Some(known) => self.inboxes.remove(known).expect("just found"),
            None => (address.inbox.clone(), self.open(&address.inbox)?),
        };
        let envelope = Envelope::new().header(CORRELATION_ID, address.id.to_string().as_bytes());
        // Whoever made the inbox may have said that publishers wait for its readers; we do not.
        match publisher.publish_with_until(payload, &envelope, Some(Instant::now())) {
            Err(PublishError::Gone(_)) => Err(ReplyError::Gone),
            other => {
                self.inboxes.push_back((name, publisher));
                other.map(drop).map_err(ReplyError::Publish)
            }
        }
    }

    /// A publisher to an inbox that exists; nobody creates another's inbox.
    fn open(&mut self, inbox: &str) -> Result<Publisher<[u8]>, ReplyError> {
        // Those whose requesters are gone first, then the one that was not used for longest.
        self.inboxes.retain(|(_, publisher)| publisher.readers().any());
        if self.inboxes.len() >= KEPT_INBOXES {
            self.inboxes.pop_front();
        }
        match self.bus.existing_publisher(Topic::named(inbox), |options| check_inbox(inbox, options)) {
            Ok(publisher) => Ok(publisher),
            Err(OpenError::Refused(Refusal::UnknownTopic { .. })) => Err(ReplyError::Gone),
            Err(error) => Err(ReplyError::Open(error)),
        }
    }
}

/// A header that is a number.
fn number(message: &Message<'_, [u8]>, header: &str) -> Option<u64> {
    let (_, value) = message.headers().find(|(name, _)| *name == header)?;
    std::str::from_utf8(value).ok()?.parse().ok()
}
