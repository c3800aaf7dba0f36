//! Moving messages to the dead-letter topic: word → moving (owner), copy published, word → settled.
//!
//! The copy goes through a publisher whose note says which message it belongs to. If we die between copy and settling, the
//! coordinator reads the note and settles for us; if we die before, the move is anybody's.

use std::collections::VecDeque;
use std::time::Instant;

use super::core::Core;
use super::fetch::Got;
use crate::client::envelope::{self, Envelope, EnvelopeView, HEADER_LENGTHS_BYTES};
use crate::client::publisher::OriginPublisher;
use crate::coordinator::protocol::{Answer, GroupInfo, Identity, Request, StartAt, TopicInfo};
use crate::error::PublishError;
use crate::group::{DEAD_LETTER_GROUP, GroupOptions};
use crate::os::clock;
use crate::ring::ledger::{MoveReason, Seen, State};
use crate::shm::layout::MAX_HEADERS_BYTES;
use crate::sync::Ordering;
use crate::topic::{Mode, Topic, TopicOptions};

/// How long a move waits that met a full dead-letter topic.
const FULL_RETRY_MS: u64 = 10;

/// How long moves wait when the dead-letter topic could not be opened or used: that takes the coordinator, or people.
const BROKEN_RETRY_MS: u64 = 1000;

/// Moves carried out in one look, and as many stuck ones tried again.
const MOVES_A_LOOK: usize = 256;

/// How long the publisher stays open without moves.
const UNUSED_MS: u64 = 1000;

/// What a letter tells of the reason, at most.
const MAX_REASON_BYTES: usize = 1024;

/// Room for the original's headers in a letter: what is left by the letter's own, whose names and numbers are short.
const COPIED_HEADERS_BYTES: usize = MAX_HEADERS_BYTES - 4096;

/// What this consumer is moving.
pub(super) struct Moves {
    topic: String,
    options: TopicOptions,
    queue: VecDeque<Move>,
    /// Those that cannot be moved themselves, and wait to be tried again: the one tried first comes first.
    stuck: VecDeque<Move>,
    /// Opened for the first move.
    outlet: Option<OriginPublisher>,
    used_at: u64,
    /// Not before this moment.
    retry_at: u64,
    /// When to see that they stay ours; nothing of that is due before.
    keep_at: u64,
}

struct Move {
    seen: Seen,
    /// What the program said when it rejected the message.
    text: Option<String>,
    /// Where it is the message itself that cannot be moved: not before this moment.
    retry_at: u64,
}

/// How far a move came.
enum Outcome {
    /// The word is settled, or not ours any more.
    Over,
    /// To be tried again, and all others with it.
    Later(u64),
    /// This one cannot be moved: the dead-letter topic takes no such message, or it is garbled. The others can.
    Stuck,
}

impl Moves {
    pub(super) fn new(info: &TopicInfo, group: &GroupInfo) -> Self {
        let topic = group.options.dead_letter_topic(&info.name, &group.name);
        // Whatever the topic carries must fit.
        let least = Topic::<[u8]>::named(topic.clone()).hold().envelope().options();
        let options = TopicOptions { bytes: least.bytes.max(info.options.bytes), ..least };
        let (queue, stuck) = Default::default();
        Moves { topic, options, queue, stuck, outlet: None, used_at: 0, retry_at: 0, keep_at: 0 }
    }

    /// Notes a move that has begun.
    pub(super) fn add(&mut self, seen: Seen, text: Option<&str>) {
        self.queue.push_back(Move { seen, text: text.map(str::to_owned), retry_at: 0 });
    }

    /// Closes the publisher: before the consumer's own place is given back, so that its note is final by then.
    pub(super) fn close(&mut self) {
        self.outlet = None;
    }

    /// Closes a publisher that has not been used for a while: a topic has so many, and a group may have more consumers.
    pub(super) fn close_unused(&mut self, now: u64) {
        if self.is_open() && !self.wait() && now >= self.used_at + UNUSED_MS {
            self.close();
        }
    }

    /// Whether there are moves that are not done.
    pub(super) fn wait(&self) -> bool {
        !self.queue.is_empty() || !self.stuck.is_empty()
    }

    /// Whether there are moves that a look has left over, and the next one need not wait for.
    pub(super) fn are_left_over(&self, now: u64) -> bool {
        !self.queue.is_empty() && now >= self.retry_at
    }

    /// Whether moves can be carried out without asking the coordinator.
    pub(super) fn is_open(&self) -> bool {
        self.outlet.is_some()
    }
}

impl Core {
    /// Whether moves wait.
    pub(super) fn has_moves(&self) -> bool {
        self.moves.wait()
    }

    /// Goes on with the moves that wait, if there are any.
    #[inline]
    pub(super) fn work_off_moves(&mut self) {
        if self.has_moves() {
            self.carry_moves_on();
        }
    }

    #[cold]
    fn carry_moves_on(&mut self) {
        let now = clock::now_ms();
        self.moves.used_at = now;
        self.keep_moves(now);
        self.retry_stuck(now);
        for _ in 0..MOVES_A_LOOK {
            if now < self.moves.retry_at {
                return;
            }
            let Some(mut next) = self.moves.queue.pop_front() else { return };
            match self.carry_out(&next) {
                Outcome::Over => {}
                Outcome::Later(ms) => {
                    self.moves.queue.push_front(next);
                    self.moves.retry_at = now + ms;
                }
                Outcome::Stuck => {
                    next.retry_at = now + BROKEN_RETRY_MS;
                    self.moves.stuck.push_back(next);
                }
            }
        }
    }

    /// Puts some of those that were stuck, and have waited long enough, with the others.
    fn retry_stuck(&mut self, now: u64) {
        let Moves { queue, stuck, .. } = &mut self.moves;
        let due = stuck.iter().take(MOVES_A_LOOK).take_while(|stuck| stuck.retry_at <= now).count();
        queue.extend(stuck.drain(..due));
    }

    /// Moves that wait stay ours: an overdue one would be reclaimed, and we fenced.
    fn keep_moves(&mut self, now: u64) {
        if now < self.moves.keep_at {
            return;
        }
        let (due, lease) = (self.lease_end(now), self.group.options.lease_ms);
        let quarter = lease / 4;
        // What has three quarters of its time left now, or comes later, has half of it left then: who pauses between two looks
        // may do so for that long.
        self.moves.keep_at = now + quarter;
        let (ledger, me) = (&self.ledger, self.me);
        let mut keep = |waiting: &mut Move| {
            let State::Moving(reason) = waiting.seen.state() else { return false };
            if waiting.seen.due_in(now) > lease - quarter {
                return true;
            }
            let kept = ledger.begin_move(waiting.seen, me, due, reason);
            kept.map(|seen| waiting.seen = seen).is_some()
        };
        self.moves.queue.retain_mut(&mut keep);
        self.moves.stuck.retain_mut(&mut keep);
    }

    fn carry_out(&mut self, next: &Move) -> Outcome {
        let sequence = next.seen.sequence();
        if !self.moves.is_open() && !self.open_outlet() {
            return Outcome::Later(BROKEN_RETRY_MS);
        }
        let (copy, origin) = match self.log.read(sequence, &mut self.copies) {
            Got::Message(copy, origin) => (copy, origin),
            Got::Hole => {
                let settled = self.ledger.settle(next.seen);
                self.flush.count(settled);
                return Outcome::Over;
            }
            Got::Unsound(_) if self.ledger.look(sequence) == next.seen => return Outcome::Stuck,
            Got::Unsound(_) => return Outcome::Over,
        };
        let publisher = self.log.publisher_of(origin).map(|(publisher, _)| publisher);
        let body = self.copies.bytes(copy);
        let parts = if self.info.options.envelope {
            envelope::split(body, self.info.batch_align()).map(|(view, payload)| (Some(view), payload))
        } else {
            Some((None, body))
        };
        let published = match (parts, &mut self.moves.outlet) {
            (Some((view, payload)), Some(outlet)) => {
                let letter = letter(next, &self.info, &self.group, publisher, view);
                publish(outlet, sequence, payload, &letter)
            }
            _ => {
                self.copies.undo(copy);
                return Outcome::Stuck;
            }
        };
        self.copies.undo(copy);
        match published {
            Ok(()) => {
                self.count_letter(next.seen);
                Outcome::Over
            }
            Err(PublishError::Full { .. } | PublishError::TimedOut { .. }) => Outcome::Later(FULL_RETRY_MS),
            Err(PublishError::TooLarge { .. } | PublishError::WrongSize { .. } | PublishError::Envelope(_)) => {
                Outcome::Stuck
            }
            Err(_) => {
                // Removed, perhaps: opening it again creates it again. Where we have been fenced, that is refused.
                self.moves.close();
                Outcome::Later(BROKEN_RETRY_MS)
            }
        }
    }

    /// Dead letters wait in a group of their own, so that nobody reads them away: made with the topic. One that somebody
    /// else has created is used as it is.
    fn create_dead_letter_topic(&self) {
        let (topic, options) = (self.moves.topic.clone(), self.moves.options.clone());
        let create =
            Request::CreateTopic { topic: topic.clone(), options, access: None, exist_ok: true, ephemeral: false };
        if let Ok((Answer::Created { existed: false }, _)) = self.control.request_once(&create) {
            let (group, options) = (DEAD_LETTER_GROUP.to_owned(), GroupOptions::for_dead_letters());
            let create = Request::CreateGroup { topic, group, options, start: StartAt::Oldest, exist_ok: true };
            // Without it the topic's `hold` keeps the letters until somebody reads them.
            let _ = self.control.request(&create);
        }
    }

    fn open_outlet(&mut self) -> bool {
        self.create_dead_letter_topic();
        let (topic, group, consumer) = (self.info.id, self.group.id, self.me.into());
        let origin = Identity::Origin { topic, group, consumer };
        let opened = OriginPublisher::open(&self.control, &self.moves.topic, self.moves.options.clone(), origin);
        // An exclusive topic, made by hand, keeps no note of what was moved: a death would move it twice. So the move waits.
        self.moves.outlet = opened.ok().filter(|outlet| outlet.options().mode == Mode::Many);
        self.moves.is_open()
    }

    /// The copy is there: the end of a move. If the coordinator was faster, it has settled the word by our note.
    fn count_letter(&mut self, seen: Seen) {
        let settled = self.ledger.settle(seen);
        self.flush.count(settled);
        // Relaxed: only shown to people.
        self.ledger.header().counters.dead_lettered.fetch_add(u64::from(settled), Ordering::Relaxed);
        if self.group.options.ordered_by_key {
            self.ring_readers();
        }
    }
}

/// What goes with the copy: why and whence, then what went with the message.
fn letter(
    next: &Move,
    info: &TopicInfo,
    group: &GroupInfo,
    publisher: Option<u64>,
    original: Option<EnvelopeView<'_>>,
) -> Envelope {
    let reason = match (&next.text, next.seen.state()) {
        (Some(text), _) => text,
        (None, State::Moving(MoveReason::Rejected)) => "rejected",
        (None, State::Moving(MoveReason::Expired)) => "expired",
        _ => "attempts exhausted",
    };
    let reason = shortened(reason);
    let number = |number: u64| number.to_string();
    let mut letter = Envelope::new()
        .ttl(std::time::Duration::MAX)
        .header("reason", reason.as_bytes())
        .header("attempts", number(next.seen.attempt().into()).as_bytes())
        .header("origin-topic", info.name.as_bytes())
        .header("origin-group", group.name.as_bytes())
        .header("origin-sequence", number(next.seen.sequence()).as_bytes());
    if let Some(publisher) = publisher {
        letter = letter.header("publisher", number(publisher).as_bytes());
    }
    let Some(original) = original else { return letter };
    letter = letter.key(original.key().unwrap_or_default());
    // A letter that was too long to be published would hold the group's floor for ever.
    let (mut copied_bytes, mut left_out) = (0, 0);
    for (name, value) in original.headers() {
        let bytes = name.len() + value.len() + HEADER_LENGTHS_BYTES;
        if copied_bytes + bytes > COPIED_HEADERS_BYTES {
            left_out += 1;
            continue;
        }
        copied_bytes += bytes;
        letter = letter.header(name, value);
    }
    if left_out > 0 { letter.header("headers-left-out", number(left_out).as_bytes()) } else { letter }
}

/// As much of a reason as a letter has room for.
fn shortened(reason: &str) -> &str {
    let ends = reason.char_indices().map(|(at, char)| at + char.len_utf8());
    &reason[..ends.take_while(|end| *end <= MAX_REASON_BYTES).last().unwrap_or(0)]
}

/// Publishes the copy without waiting. A topic that somebody made without envelopes gets the payload alone.
fn publish(outlet: &mut OriginPublisher, sequence: u64, payload: &[u8], letter: &Envelope) -> Result<(), PublishError> {
    let plain = Envelope::new();
    let letter = if outlet.options().envelope { letter } else { &plain };
    outlet.publish(sequence, &[(payload, letter)], Instant::now()).map(drop)
}
