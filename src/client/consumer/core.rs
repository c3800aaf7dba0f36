//! What a consumer does that does not depend on its payload's type: settling, the floor, waiting.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::copies::{Copies, Copy};
use super::exclusive::AtWork;
use super::fetch::{Log, Origin};
use super::moves::Moves;
use super::ordered::Ordered;
use super::scan::Scan;
use super::take::Stride;
use super::waiting::wait;
use crate::client::control::Control;
use crate::client::envelope::{self, EnvelopeView};
use crate::client::held::Held;
use crate::client::read::Lengths;
use crate::coordinator::protocol::{GroupInfo, Request};
use crate::error::{AckError, GoneReason, RecvError};
use crate::group::{Guarantee, LEASE_MS, whole_ms};
use crate::os::clock;
use crate::os::home::Home;
use crate::ring::cursor::{Cursor, CursorsHeader};
use crate::ring::ledger::{Ledger, MoveReason, RUN, Run, Seen, State};
use crate::ring::sequence::Sequence;
use crate::shm::shared::Shared;
use crate::shm::topic::SharedInfo;
use crate::sync::Ordering;
use crate::wait::Wait;

/// Acks between two looks at the floor, at most: each look brings words that others have settled to this core.
const ACKS_PER_FLUSH: u64 = 1024;

/// A message in hand.
pub(super) struct Item {
    pub(super) lease: Seen,
    /// Where the messages from this one on were taken with one swap: what it made of their run's word.
    pub(super) run: Option<Run>,
    /// Envelope, where the topic has them, and payload.
    pub(super) body: Copy,
    /// Where in it the payload begins.
    pub(super) payload_at: usize,
    pub(super) origin: Origin,
    /// Whether the program keeps the lease, so that what happens to the rest of a batch does not concern it.
    pub(super) kept: Cell<bool>,
}

/// A consumer without its payload's type.
pub(crate) struct Core {
    pub(super) log: Log,
    pub(super) ledger: Ledger,
    pub(super) readers: Shared<CursorsHeader>,
    pub(super) cursors: Shared<[Cursor]>,
    pub(super) info: SharedInfo,
    pub(super) group: GroupInfo,
    pub(super) control: Arc<Control>,
    /// Our number in the group.
    pub(super) me: u8,
    /// Tells this handle's leases from those of other handles of this process.
    pub(super) token: u64,
    pub(super) wait: Wait,
    /// Most leases at a time; `u64::MAX`: no limit of our own.
    pub(super) max_in_flight: u64,
    /// Leases given out and not settled. Some may be lost by now; they are counted again where it matters.
    pub(super) in_flight: u64,
    /// Sequences reserved for us and not tried yet.
    pub(super) reserved: Range<u64>,
    pub(super) stride: Stride,
    /// The clock at the last poll.
    pub(super) polled_ms: u64,
    /// Older sequences worth trying.
    pub(super) candidates: VecDeque<u64>,
    /// Whether the last look ended before it had seen everything: there may be more to take at once.
    pub(super) left_off: bool,
    pub(super) at_work: AtWork,
    pub(super) scan: Scan,
    pub(super) moves: Moves,
    pub(super) ordered: Ordered,
    /// What the topic allows of payloads.
    pub(super) lengths: Lengths,
    pub(super) copies: Copies,
    pub(super) items: Vec<Item>,
    pub(super) flush: Flush,
    held: Option<Held>,
    pub(super) home: Home,
}

/// When the floor was last looked at.
#[derive(Default)]
pub(super) struct Flush {
    settled: u32,
    /// Acks between two looks: a sixteenth of ring or window, so that nobody waits for much that is settled.
    period: u32,
    at_ms: u64,
    floor: u64,
}

impl Flush {
    /// Counts a word, if it is settled, of which nobody has a lease.
    pub(super) fn count(&mut self, settled: bool) {
        self.settled += u32::from(settled);
    }

    /// Counts the words of a run likewise.
    pub(super) fn count_run(&mut self, settled: bool) {
        self.settled += if settled { RUN as u32 } else { 0 };
    }
}

/// What [`Core`] is made of.
pub(super) struct Parts {
    pub(super) log: Log,
    pub(super) ledger: Ledger,
    pub(super) readers: Shared<CursorsHeader>,
    pub(super) cursors: Shared<[Cursor]>,
    pub(super) info: SharedInfo,
    pub(super) group: GroupInfo,
    pub(super) control: Arc<Control>,
    pub(super) me: u8,
    pub(super) held: Held,
}

impl Core {
    pub(super) fn new(parts: Parts, wait: Wait, max_in_flight: u64) -> Core {
        static TOKENS: AtomicU64 = AtomicU64::new(0);
        let Parts { log, ledger, readers, cursors, info, group, control, me, held } = parts;
        let home = control.home();
        let period = (info.options.messages.min(ledger.window()) / 16).clamp(1, ACKS_PER_FLUSH) as u32;
        let (moves, lengths) = (Moves::new(&info, &group), Lengths::of_payload(&info.options));
        Core {
            log,
            ledger,
            readers,
            cursors,
            info,
            group,
            control,
            me,
            token: TOKENS.fetch_add(1, Ordering::Relaxed),
            wait,
            max_in_flight,
            in_flight: 0,
            reserved: 0..0,
            stride: Stride::default(),
            polled_ms: 0,
            candidates: VecDeque::new(),
            left_off: false,
            at_work: AtWork::default(),
            scan: Scan::default(),
            moves,
            ordered: Ordered::default(),
            lengths,
            copies: Copies::default(),
            items: Vec::new(),
            flush: Flush { period, ..Flush::default() },
            held: Some(held),
            home,
        }
    }

    pub(super) fn guarantee(&self) -> Guarantee {
        self.group.options.guarantee
    }

    /// When a lease taken now ends.
    #[inline]
    pub(super) fn lease_end(&self, now: u64) -> u64 {
        due_after(now, self.group.options.lease_ms)
    }

    pub(super) fn gone(&self) -> Option<GoneReason> {
        if self.readers.readers.wants_attention() { self.log.header().gone() } else { None }
    }

    /// Whether leases still mean anything.
    #[inline]
    pub(super) fn check_settle(&self) -> Result<(), AckError> {
        if !self.home.is_here() {
            return Err(AckError::Forked { opened_by: self.home.pid(), pid: std::process::id() });
        }
        if self.ledger.is_fenced(self.me) {
            return Err(AckError::Fenced);
        }
        match self.gone() {
            Some(reason) => Err(AckError::Gone(reason)),
            None => Ok(()),
        }
    }

    /// The message is done with.
    #[inline]
    pub(super) fn ack(&mut self, lease: Seen) -> Result<(), AckError> {
        self.check_settle()?;
        if lease.state() == State::Settled {
            // At most once: it was done with when it was handed out.
            return Ok(());
        }
        if !self.ledger.settle(lease) {
            return Err(self.why_lost(lease));
        }
        self.has_settled(lease);
        Ok(())
    }

    /// Gives the message back, to rest for `delay` or the group's back-off.
    pub(super) fn nack(&mut self, lease: Seen, delay: Option<Duration>) -> Result<(), AckError> {
        self.give_back(lease, delay, None)
    }

    /// Gives the message back, to rest for the group's back-off; if this was its last attempt, the letter says why.
    pub(super) fn fail(&mut self, lease: Seen, why: &str) -> Result<(), AckError> {
        self.give_back(lease, None, Some(why))
    }

    fn give_back(&mut self, lease: Seen, delay: Option<Duration>, why: Option<&str>) -> Result<(), AckError> {
        self.check_settle()?;
        self.check_unsettled(lease)?;
        let options = &self.group.options;
        if options.max_attempts > 0 && u32::from(lease.attempt()) >= options.max_attempts {
            return self.move_away(lease, MoveReason::Exhausted, why);
        }
        let now = clock::now_ms();
        let rest = delay.map_or_else(|| options.rest_ms(lease.attempt()), whole_ms).min(*LEASE_MS.end());
        let due = if rest == 0 { now } else { due_after(now, rest) };
        if !self.ledger.give_back(lease, due) {
            return Err(self.why_lost(lease));
        }
        self.ring_readers();
        self.has_ended(lease);
        Ok(())
    }

    /// Sends the message to the dead-letter topic.
    pub(super) fn reject(&mut self, lease: Seen, reason: &str) -> Result<(), AckError> {
        self.check_settle()?;
        self.check_unsettled(lease)?;
        self.move_away(lease, MoveReason::Rejected, Some(reason))
    }

    /// Lets a lease end `time` from now.
    pub(super) fn extend(&mut self, lease: Seen, time: Duration) -> Result<Seen, AckError> {
        self.check_settle()?;
        self.check_unsettled(lease)?;
        let time = whole_ms(time).clamp(*LEASE_MS.start(), *LEASE_MS.end());
        let now = clock::now_ms();
        let due = due_after(now, time);
        let extended = if self.extends_role(due) { self.ledger.extend(lease, due) } else { None };
        let Some(extended) = extended else { return Err(self.why_lost(lease)) };
        // Whoever takes another one counted it until it had ended: by a clock that we have not read yet.
        let now = clock::now_ms();
        if lease.is_due(now) {
            if !self.has_room_for_all(now) {
                let undone = self.ledger.undo_extend(extended, lease);
                let sequence = Sequence::new(lease.sequence());
                return Err(if undone { AckError::Ended { sequence } } else { self.why_lost(lease) });
            }
            // It was left out of the count.
            self.in_flight += 1;
        }
        Ok(extended)
    }

    /// Whether no more leases have not ended than this consumer and its group may have.
    fn has_room_for_all(&self, now: u64) -> bool {
        self.beyond_group_limit(now) == 0
            && (self.max_in_flight == u64::MAX || self.ledger.leased(Some(self.me), now) <= self.max_in_flight)
    }

    fn move_away(&mut self, lease: Seen, reason: MoveReason, text: Option<&str>) -> Result<(), AckError> {
        let due = self.lease_end(clock::now_ms());
        let Some(seen) = self.ledger.begin_move(lease, self.me, due, reason) else {
            return Err(self.why_lost(lease));
        };
        self.has_ended(lease);
        if self.group.options.max_in_flight > 0 {
            // There is room for others again.
            self.ring_readers();
        }
        self.moves.add(seen, text);
        self.work_off_moves();
        Ok(())
    }

    fn check_unsettled(&self, lease: Seen) -> Result<(), AckError> {
        let sequence = Sequence::new(lease.sequence());
        if lease.state() == State::Settled { Err(AckError::AlreadySettled { sequence }) } else { Ok(()) }
    }

    /// A swap failed: because this very lease was used before?
    #[cold]
    fn why_lost(&self, lease: Seen) -> AckError {
        let now = self.ledger.look(lease.sequence());
        let used = matches!(now.state(), State::Settled | State::Moving(_));
        let sequence = Sequence::new(lease.sequence());
        if used && now.owner() == lease.owner() && now.attempt() == lease.attempt() {
            AckError::AlreadySettled { sequence }
        } else {
            AckError::LeaseLost { sequence }
        }
    }

    /// One of our leases is no more. One that had run out may not have been among those counted last; counting too many
    /// is mended at the limit, counting too few is not.
    #[inline]
    fn has_ended(&mut self, lease: Seen) {
        let counted = self.max_in_flight == u64::MAX || !lease.is_due(clock::now_ms());
        self.in_flight = self.in_flight.saturating_sub(counted.into());
    }

    /// After one of our leases has been settled.
    #[inline]
    pub(super) fn has_settled(&mut self, lease: Seen) {
        self.has_ended(lease);
        self.have_settled(1);
    }

    /// After so many of our leases have been settled.
    #[inline]
    pub(super) fn have_settled(&mut self, count: u64) {
        self.flush.settled += count as u32;
        let others_wait = || !self.readers.readers.is_quiet() && self.ledger.is_window_full();
        if self.flush.settled >= self.flush.period || self.readers.writers.is_waited_on() || others_wait() {
            self.raise_floor();
        }
        if self.group.options.max_in_flight > 0 || self.group.options.ordered_by_key {
            // There is room for others again, or the next of a key.
            self.ring_readers();
        }
    }

    /// Whether this consumer has a limit of its own on leases.
    pub(super) fn has_own_limit(&self) -> bool {
        self.max_in_flight != u64::MAX
    }

    /// Raises the floor if something was settled and the clock has moved on since it was last raised.
    #[inline]
    pub(super) fn raise_floor_now_and_then(&mut self, now: u64) {
        if self.flush.settled > 0 && (now != self.flush.at_ms || self.readers.writers.is_waited_on()) {
            self.flush.at_ms = now;
            self.raise_floor();
        }
    }

    /// Moves the floor over what is settled, raises the group's line, and wakes publishers and consumers that wait for it.
    /// Also mends what a consumer that died between two of these steps left undone.
    #[cold]
    pub(super) fn raise_floor(&mut self) {
        self.flush.settled = 0;
        let before = self.ledger.floor();
        let floor = self.ledger.advance_floor();
        // The hint after the floor: who found the window full sleeps, or looks once more and finds the new floor.
        if floor > before && self.ledger.hint() >= self.ledger.window_end(before) {
            self.ring_readers();
        }
        let line = &self.cursors[self.group.cursor as usize];
        if floor == self.flush.floor && line.sequence() >= floor {
            return;
        }
        self.flush.floor = floor;
        let position = self.log.position_of_floor(floor);
        line.raise(position, floor);
        if !self.readers.writers.is_quiet() {
            self.readers.writers.ring();
        }
    }

    /// Wakes consumers that sleep: there is something for them to look at.
    pub(super) fn ring_readers(&self) {
        if !self.readers.readers.is_quiet() {
            self.readers.readers.ring();
        }
    }

    /// The payload of a message in hand.
    #[inline]
    pub(super) fn payload(&self, item: &Item) -> &[u8] {
        &self.copies.bytes(item.body)[item.payload_at..]
    }

    /// The envelope of a message in hand, where the topic has them.
    pub(super) fn envelope(&self, item: &Item) -> Option<EnvelopeView<'_>> {
        let body = self.info.options.envelope.then(|| self.copies.bytes(item.body))?;
        envelope::split(body, self.info.batch_align()).map(|(view, _)| view)
    }

    /// Asks the coordinator, at most once a second for each, to fence a consumer that holds what is overdue.
    #[cold]
    pub(super) fn reclaim(&mut self, owner: u8, now: u64) {
        if !self.scan.may_reclaim(owner, now) {
            return;
        }
        let (topic, group, consumer) = (self.info.id, self.group.id, owner.into());
        // If it cannot be told now, the next scan asks again.
        if self.control.tell(&Request::Reclaim { topic, group, consumer }) {
            self.scan.has_reclaimed(owner, now);
        }
    }

    /// Takes up to `count` messages into `items`; waits for the first.
    #[inline]
    pub(super) fn recv(&mut self, count: usize, limit: Option<Duration>) -> Result<(), RecvError> {
        if self.look(count)? { Ok(()) } else { wait(self, limit, |core| Ok(core.look(count)?.then_some(()))) }
    }
}

/// A due time that is not before `ms` milliseconds, a day at most, have passed.
#[inline]
fn due_after(now: u64, ms: u64) -> u64 {
    clock::after(now, ms.min(*LEASE_MS.end()))
}

impl Drop for Core {
    fn drop(&mut self) {
        // A forked child drops a copy: the original, and its leases, are its parent's.
        if !self.home.is_here() {
            return;
        }
        if self.gone().is_none() && !self.ledger.is_fenced(self.me) {
            if self.moves.is_open() {
                self.work_off_moves();
            }
            // What an effectively-once consumer has committed for its leases only the coordinator knows.
            // Until it has said so, nobody else is at work.
            if self.guarantee() != Guarantee::EffectivelyOnce {
                self.ledger.release_owner(self.me, clock::now_ms(), |_, _| false);
                self.ledger.leave_role(self.me);
            }
            self.raise_floor();
            self.ring_readers();
        }
        self.moves.close();
        // Only now may the coordinator give our number away.
        drop(self.held.take());
    }
}
