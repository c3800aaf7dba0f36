//! Groups: the options of a named set of consumers that share a topic's messages.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a group promises when consumers or publishers die.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Guarantee {
    /// A message counts as done when it is handed out: never delivered twice; a death loses at most what was in hand.
    AtMostOnce,
    /// A message is delivered until a consumer has acknowledged it.
    #[default]
    AtLeastOnce,
    /// The same; and a lease passes on only after its holder was proven dead or fenced on its output topic, so that a
    /// [`Pipeline`](crate::Pipeline)'s output has the output of each input exactly once. A lease that a consumer keeps beyond its end
    /// comes back to nobody while it lives, unless another consumer of the group receives; that one has it fenced.
    EffectivelyOnce,
}

impl std::fmt::Display for Guarantee {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Guarantee::AtMostOnce => "at-most-once",
            Guarantee::AtLeastOnce => "at-least-once",
            Guarantee::EffectivelyOnce => "effectively-once",
        })
    }
}

/// The group in which dead letters wait on their topic until somebody moves them on.
pub const DEAD_LETTER_GROUP: &str = "dlq";

/// Shortest and longest lease in milliseconds.
pub(crate) const LEASE_MS: std::ops::RangeInclusive<u64> = 1..=24 * 3600 * 1000;

/// Fewest and most words of a group's ledger. The coordinator goes through all of them when a consumer has died, and its
/// other work waits: a million take it a few milliseconds.
pub(crate) const WINDOW: std::ops::RangeInclusive<u64> = 64..=1 << 20;

/// Everything that is chosen when a group is created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GroupOptions {
    /// What happens to messages in hand when a consumer dies.
    pub guarantee: Guarantee,
    /// How long a consumer has for one message, in milliseconds (1 ms to 24 h), before it is given to another.
    pub lease_ms: u64,
    /// Leases of the whole group at a time; 0: as many as the window.
    pub max_in_flight: u32,
    /// How often a message is delivered before it goes to the dead-letter topic; 0: without end. At most 4,095.
    pub max_attempts: u32,
    /// How long a message rests after its first, second, ... failed attempt, in milliseconds; the last one repeats.
    /// Empty: it can be taken again at once. At most 32 of up to 24 h.
    pub back_off_ms: Vec<u64>,
    /// Where messages go that failed too often or were rejected. `None`: `dlq.TOPIC.GROUP`, created when it is needed.
    pub dead_letter: Option<String>,
    /// Whether messages whose time-to-live ended go there as well (otherwise they are settled and counted).
    pub dead_letter_expired: bool,
    /// Messages of one key are delivered in order and one at a time. Needs a topic with an envelope; messages without a
    /// key count as one key.
    pub ordered_by_key: bool,
    /// One consumer at a time gets everything; the others stand by, and one of them takes over when that one leaves, dies, or
    /// has neither received nor extended anything for the time of a lease. What it had leased ends then.
    pub exclusive: bool,
    /// How many messages above the floor may be handed out: out-of-order acks reach this far. A power of two; 0: as many
    /// as the topic's ring holds messages, at most 65,536.
    pub window: u64,
}

impl Default for GroupOptions {
    fn default() -> Self {
        GroupOptions {
            guarantee: Guarantee::default(),
            lease_ms: 30_000,
            max_in_flight: 0,
            max_attempts: 0,
            back_off_ms: Vec::new(),
            dead_letter: None,
            dead_letter_expired: false,
            ordered_by_key: false,
            exclusive: false,
            window: 0,
        }
    }
}

impl GroupOptions {
    /// The defaults: at least once, leases of 30 s, no limits.
    pub fn new() -> Self {
        Self::default()
    }

    /// A message counts as done when it is handed out; see [`Guarantee::AtMostOnce`].
    #[must_use]
    pub fn at_most_once(mut self) -> Self {
        self.guarantee = Guarantee::AtMostOnce;
        self
    }

    /// A lease passes on only after its holder was proven dead or fenced; see [`Guarantee::EffectivelyOnce`].
    #[must_use]
    pub fn effectively_once(mut self) -> Self {
        self.guarantee = Guarantee::EffectivelyOnce;
        self
    }

    /// How long a consumer has for one message (1 ms to 24 h; default 30 s). Rounded up to milliseconds.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease_ms = whole_ms(lease);
        self
    }

    /// Leases of the whole group at a time.
    #[must_use]
    pub fn max_in_flight(mut self, leases: u32) -> Self {
        self.max_in_flight = leases;
        self
    }

    /// How often a message is delivered before it goes to the dead-letter topic.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts;
        self
    }

    /// How long a message rests after its first, second, ... failed attempt; the last one repeats. Rounded up to
    /// milliseconds.
    #[must_use]
    pub fn back_off(mut self, delays: impl IntoIterator<Item = Duration>) -> Self {
        self.back_off_ms = delays.into_iter().map(whole_ms).collect();
        self
    }

    /// Where messages go that failed too often or were rejected (default `dlq.TOPIC.GROUP`).
    #[must_use]
    pub fn dead_letter(mut self, topic: impl Into<String>) -> Self {
        self.dead_letter = Some(topic.into());
        self
    }

    /// Messages whose time-to-live ended go to the dead-letter topic as well.
    #[must_use]
    pub fn dead_letter_expired(mut self) -> Self {
        self.dead_letter_expired = true;
        self
    }

    /// Messages of one key are delivered in order and one at a time.
    #[must_use]
    pub fn ordered_by_key(mut self) -> Self {
        self.ordered_by_key = true;
        self
    }

    /// One consumer at a time gets everything; the others stand by.
    #[must_use]
    pub fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }

    /// How many messages above the floor may be handed out; a power of two from 64 to 1,048,576. 0, which is the default: as many
    /// as the ring has, from 1,024 to 65,536.
    #[must_use]
    pub fn window(mut self, messages: u64) -> Self {
        self.window = messages;
        self
    }

    /// What is wrong with them, and what would work.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !LEASE_MS.contains(&self.lease_ms) {
            return Err(format!(
                "the lease is {} ms; {} ms to {} ms are allowed",
                self.lease_ms,
                LEASE_MS.start(),
                LEASE_MS.end()
            ));
        }
        if self.max_attempts > u32::from(crate::ring::ledger::MAX_ATTEMPT) {
            let most = crate::ring::ledger::MAX_ATTEMPT;
            return Err(format!("max attempts is {}; 0 (without end) to {most} are allowed", self.max_attempts));
        }
        if self.back_off_ms.len() > 32 || self.back_off_ms.iter().any(|ms| ms > LEASE_MS.end()) {
            return Err("the back-off list may have up to 32 delays of up to 24 h each".to_owned());
        }
        if self.window != 0 && !(self.window.is_power_of_two() && WINDOW.contains(&self.window)) {
            let (least, most) = (WINDOW.start(), WINDOW.end());
            return Err(format!(
                "the window is {}; 0 or a power of two from {least} to {most} is allowed",
                self.window
            ));
        }
        let of_leases = self.max_attempts > 0 || self.max_in_flight > 0 || !self.back_off_ms.is_empty();
        if self.guarantee == Guarantee::AtMostOnce && of_leases {
            let found = "at-most-once delivers each message once and leases nothing";
            return Err(format!("{found}; leave out max attempts, max in flight and back-off"));
        }
        Ok(())
    }

    /// Words of the ledger on a topic that holds `messages`.
    pub(crate) fn window_words(&self, messages: u64) -> u64 {
        if self.window != 0 { self.window } else { messages.next_power_of_two().clamp(1024, 1 << 16) }
    }

    /// What dead letters wait in: the options of [`DEAD_LETTER_GROUP`].
    pub fn for_dead_letters() -> Self {
        Self::new().effectively_once().back_off([Duration::from_millis(100)])
    }

    /// The dead-letter topic of a group with these options.
    pub fn dead_letter_topic(&self, topic: &str, group: &str) -> String {
        self.dead_letter.clone().unwrap_or_else(|| format!("dlq.{topic}.{group}"))
    }

    /// How long a message rests after `attempt` failed.
    pub(crate) fn rest_ms(&self, attempt: u16) -> u64 {
        let index = usize::from(attempt.max(1)) - 1;
        self.back_off_ms.get(index).or(self.back_off_ms.last()).copied().unwrap_or(0)
    }
}

/// In milliseconds, rounded up.
pub(crate) fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
