//! Topics: names, options and the schema of typed payloads.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::NameError;

/// Longest topic or bus name in bytes.
pub const MAX_NAME_BYTES: usize = 200;

/// Largest alignment a typed payload may ask for, in bytes.
pub const MAX_PAYLOAD_ALIGN: usize = 32;

/// What a topic carries: raw bytes (`[u8]`) or any plain-data type that [`zerocopy`] accepts.
///
/// Implemented for `[u8]` and for every `T: FromBytes + IntoBytes + Immutable + KnownLayout`: such a type has no
/// padding, no invalid bit pattern and no interior pointer, so bytes written by another process are always a `T`.
pub trait Payload: FromBytes + IntoBytes + Immutable + KnownLayout + sealed::Sealed + 'static {
    /// Whether all messages have one size, which is compared when a handle is opened.
    #[doc(hidden)]
    const FIXED_SIZE: bool;

    /// The schema every message of this type follows; `None` for raw bytes.
    fn schema() -> Option<Schema>;
}

mod sealed {
    use super::{FromBytes, Immutable, IntoBytes, KnownLayout};

    /// Keeps `Payload` to what the handles check: raw bytes and sized types.
    pub trait Sealed {}

    impl Sealed for [u8] {}

    impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + 'static> Sealed for T {}
}

impl Payload for [u8] {
    const FIXED_SIZE: bool = false;

    fn schema() -> Option<Schema> {
        None
    }
}

impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + 'static> Payload for T {
    const FIXED_SIZE: bool = true;

    fn schema() -> Option<Schema> {
        const { assert!(align_of::<T>() <= MAX_PAYLOAD_ALIGN, "payload types are aligned to at most 32 bytes") };
        Some(Schema {
            name: short_type_name(std::any::type_name::<T>()).to_owned(),
            size_bytes: size_of::<T>() as u64,
            align_bytes: align_of::<T>() as u32,
        })
    }
}

/// The type's own name without its module path, so that two programs that declare the same struct agree.
fn short_type_name(full: &str) -> &str {
    let generic = full.find('<').unwrap_or(full.len());
    let start = full[..generic].rfind("::").map_or(0, |i| i + 2);
    &full[start..]
}

/// Name, size and alignment of a typed topic's messages; compared when a handle is opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schema {
    /// The type's name without its module path.
    pub name: String,
    /// Size of every message in bytes.
    pub size_bytes: u64,
    /// Alignment of every message in bytes.
    pub align_bytes: u32,
}

impl std::fmt::Display for Schema {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes, aligned to {})", self.name, self.size_bytes, self.align_bytes)
    }
}

/// How many may publish at a time, and thereby which ring carries the topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Any number of publishers (64 by default); each publish is one compare-and-swap.
    Many,
    /// One publisher at a time; each publish is a plain store, small payloads lie in the slot.
    Exclusive,
    /// One publisher and one subscriber: the SPSC ring. Messages are kept until that subscriber has read them.
    Channel,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Many => "many",
            Mode::Exclusive => "exclusive",
            Mode::Channel => "channel",
        })
    }
}

/// What happens when the ring is full, that is when the oldest message is still held by a gating reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Full {
    /// `publish` waits, `try_publish` returns `Full`.
    Block,
    /// `publish` and `try_publish` return `Full` at once.
    Reject,
    /// The oldest messages go; a subscriber that had not read them gets `Lagged` with the exact range.
    Overwrite,
}

impl std::fmt::Display for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Full::Block => "block",
            Full::Reject => "reject",
            Full::Overwrite => "overwrite",
        })
    }
}

/// Everything that is chosen when a topic is created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicOptions {
    /// Who may publish.
    pub mode: Mode,
    /// How many messages the ring holds at least. A publisher meets `Full` when the slowest gating reader is this many
    /// positions behind; a position is a message or, on topics for many, a batch. Readers give back what they have read
    /// in steps of a sixteenth, at once when they run dry, and soon after a publisher has met `Full`. Channels round it
    /// up to a power of two.
    pub messages: u64,
    /// How many payload bytes the ring holds at least (for each publisher slot, in payloads of up to a sixteenth of
    /// it: larger ones need their room in one piece); also the largest message.
    pub bytes: u64,
    /// What happens when the ring is full.
    pub full: Full,
    /// Keep messages that nobody has read yet even while no subscriber or group exists.
    pub hold: bool,
    /// How many publishers may be attached at once.
    pub max_publishers: u32,
    /// How many subscribers may be attached at once.
    pub max_subscribers: u32,
    /// What every message must be; `None` for raw bytes.
    pub schema: Option<Schema>,
    /// Every message carries a timestamp and may carry a key, headers, an id and a time-to-live; see
    /// [`Envelope`](crate::Envelope). `bytes` is the payload's alone; a message's envelope has room of its own up to 64
    /// bytes, and what is longer shares the room of the payloads.
    pub envelope: bool,
    /// How long a message lives that says nothing about it, in milliseconds; 0: for ever. Needs `envelope`.
    pub ttl_ms: u64,
    /// How old a message gets before it is given up, unless a gating reader still needs it (also with `hold`), in
    /// milliseconds; 0: as old as the ring allows. The coordinator looks every tenth of it (100 ms to 10 s). Needs `envelope`.
    pub max_age_ms: u64,
    /// A message id that was published before, within the topic's window, is a duplicate. Needs `envelope`.
    pub dedup: bool,
}

impl Default for TopicOptions {
    fn default() -> Self {
        TopicOptions {
            mode: Mode::Many,
            messages: 4096,
            bytes: 16 << 20,
            full: Full::Block,
            hold: false,
            max_publishers: 64,
            max_subscribers: 256,
            schema: None,
            envelope: false,
            ttl_ms: 0,
            max_age_ms: 0,
            dedup: false,
        }
    }
}

/// A topic's name, payload type and, for whoever creates it, its options.
///
/// ```
/// use shmbus::Topic;
/// const LOG_LINES: Topic<[u8]> = Topic::new("log.lines");
/// const PRICES: Topic<u64> = Topic::new("md.prices").exclusive().messages(65_536);
/// ```
#[derive(Debug)]
pub struct Topic<T: ?Sized> {
    name: Cow<'static, str>,
    mode: Mode,
    messages: u64,
    bytes: Option<u64>,
    full: Full,
    hold: bool,
    envelope: bool,
    ttl_ms: u64,
    max_age_ms: u64,
    dedup: bool,
    payload: PhantomData<fn(&T)>,
}

// Derived, it would ask for `T: Clone`, which raw bytes are not.
impl<T: ?Sized> Clone for Topic<T> {
    fn clone(&self) -> Self {
        Topic { name: self.name.clone(), ..*self }
    }
}

impl<T: ?Sized> Topic<T> {
    /// A topic with the default options: many publishers, at least 4,096 messages and 16 MiB, `block`.
    pub const fn new(name: &'static str) -> Self {
        Self::with_name(Cow::Borrowed(name))
    }

    /// A topic whose name is known only at run time.
    pub fn named(name: impl Into<String>) -> Self {
        Self::with_name(Cow::Owned(name.into()))
    }

    const fn with_name(name: Cow<'static, str>) -> Self {
        Topic {
            name,
            mode: Mode::Many,
            messages: 4096,
            bytes: None,
            full: Full::Block,
            hold: false,
            envelope: false,
            ttl_ms: 0,
            max_age_ms: 0,
            dedup: false,
            payload: PhantomData,
        }
    }

    /// One publisher at a time (see [`Mode::Exclusive`]).
    pub const fn exclusive(mut self) -> Self {
        self.mode = Mode::Exclusive;
        self
    }

    /// One publisher and one subscriber (see [`Mode::Channel`]).
    pub const fn channel(mut self) -> Self {
        self.mode = Mode::Channel;
        self
    }

    /// How many messages the ring holds at least.
    pub const fn messages(mut self, messages: u64) -> Self {
        self.messages = messages;
        self
    }

    /// How many payload bytes the ring holds at least; also the largest message. Default 16 MiB, or what the
    /// messages of a typed topic need.
    pub const fn bytes(mut self, bytes: u64) -> Self {
        self.bytes = Some(bytes);
        self
    }

    /// What happens when the ring is full (default [`Full::Block`]).
    pub const fn full(mut self, full: Full) -> Self {
        self.full = full;
        self
    }

    /// Keep unread messages even while no subscriber or group exists.
    pub const fn hold(mut self) -> Self {
        self.hold = true;
        self
    }

    /// Messages carry a timestamp and may carry a key, headers, an id and a time-to-live (see
    /// [`Envelope`](crate::Envelope)).
    pub const fn envelope(mut self) -> Self {
        self.envelope = true;
        self
    }

    /// How long a message lives that says nothing about it, in whole milliseconds, at least one; subscribers skip and
    /// count what has expired. Implies [`Self::envelope`].
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl_ms = whole_ms(ttl);
        self.envelope()
    }

    /// How old a message gets before it is given up, unless a gating reader still needs it; in whole milliseconds, at
    /// least one. Implies [`Self::envelope`].
    pub const fn max_age(mut self, age: Duration) -> Self {
        self.max_age_ms = whole_ms(age);
        self.envelope()
    }

    /// A message id that was published before, within the topic's window, is a duplicate. Implies [`Self::envelope`].
    pub const fn dedup(mut self) -> Self {
        self.dedup = true;
        self.envelope()
    }

    /// The topic's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl<T: Payload + ?Sized> Topic<T> {
    /// The options with which this topic is created where it does not exist yet.
    pub fn options(&self) -> TopicOptions {
        let schema = T::schema();
        let typed_bytes = schema.as_ref().map(|s| s.size_bytes.max(64).saturating_mul(self.messages));
        TopicOptions {
            mode: self.mode,
            messages: self.messages,
            bytes: self.bytes.or(typed_bytes).unwrap_or(16 << 20),
            full: self.full,
            hold: self.hold,
            schema,
            envelope: self.envelope,
            ttl_ms: self.ttl_ms,
            max_age_ms: self.max_age_ms,
            dedup: self.dedup,
            ..TopicOptions::default()
        }
    }
}

/// A duration as options carry it, where 0 means none.
const fn whole_ms(duration: Duration) -> u64 {
    let ms = duration.as_millis();
    match ms {
        0 => 1,
        _ if ms > u64::MAX as u128 => u64::MAX,
        _ => ms as u64,
    }
}

/// Checks a topic or bus name: 1 to 200 bytes of letters, digits, `-`, `_` and single inner dots, and not what
/// [`virtual_topic`] understands.
pub fn check_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(NameError::TooLong { found: name.len(), max: MAX_NAME_BYTES });
    }
    if let Some(character) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || "-_.".contains(*c))) {
        return Err(NameError::Character { character });
    }
    if name.split('.').any(str::is_empty) {
        return Err(NameError::EmptyToken);
    }
    // A topic of that name nobody could consume from: it is understood as another one's group.
    if virtual_topic(name).is_some() {
        return Err(NameError::Queue);
    }
    Ok(())
}

/// Understands the name that ActiveMQ gives to the queue of a group: `Consumer.G.VirtualTopic.X` is group `G` on topic
/// `VirtualTopic.X`.
///
/// ```
/// assert_eq!(shmbus::virtual_topic("Consumer.billing.VirtualTopic.orders"), Some(("billing", "VirtualTopic.orders")));
/// assert_eq!(shmbus::virtual_topic("VirtualTopic.orders"), None);
/// ```
pub fn virtual_topic(name: &str) -> Option<(&str, &str)> {
    let (group, topic) = name.strip_prefix("Consumer.")?.split_once('.')?;
    let is_virtual = topic.strip_prefix("VirtualTopic.").is_some_and(|rest| !rest.is_empty());
    (is_virtual && !group.is_empty()).then_some((group, topic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_of_virtual_topics() {
        assert_eq!(virtual_topic("Consumer.a.VirtualTopic.b.c"), Some(("a", "VirtualTopic.b.c")));
        for other in
            ["orders", "VirtualTopic.b", "Consumer.a.b", "Consumer..VirtualTopic.b", "Consumer.a.VirtualTopic."]
        {
            assert_eq!(virtual_topic(other), None, "{other}");
        }
    }

    #[test]
    fn names_follow_the_token_rules() {
        for good in ["a", "md.ticks", "A-1_b.c"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "a..b", ".a", "a.", "a/b", "a\0b", "a b", "ö", "orders.*", &"x".repeat(201)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn type_names_lose_their_path() {
        assert_eq!(short_type_name("a::b::Tick"), "Tick");
        assert_eq!(short_type_name("u64"), "u64");
        assert_eq!(short_type_name("a::Pair<b::X>"), "Pair<b::X>");
    }
}
