//! What a message carries beside its payload on topics with envelopes: when, for whom, and until when.
//!
//! ```text
//!  0  timestamp_ns u64 · expires_ns u64 (0 never)
//! 16  key u16 · id u8 · flags u8 (0) · headers u32        lengths in bytes
//! 24  reserved u64 (0)
//! 32  key, id, headers (postcard: a list of name and value); padded to max(8, the payload's alignment)
//!     payload
//! ```

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::EnvelopeError;
use crate::shm::layout::{ENVELOPE_HEAD_BYTES, MAX_HEADERS_BYTES, MAX_ID_BYTES, MAX_KEY_BYTES};

/// What the lengths of a header's name and value take, at most.
pub(crate) const HEADER_LENGTHS_BYTES: usize = 6;

/// What goes with a message: key, headers, the caller's own id, a time-to-live. The timestamp goes by itself.
///
/// ```
/// use std::time::Duration;
/// use shmbus::Envelope;
/// let envelope = Envelope::new().key(b"customer-7").header("content-type", b"text/plain").ttl(Duration::from_secs(5));
/// ```
///
/// Limits: a key of 255 bytes, an id of 32 bytes, headers of 16 KiB encoded. They are checked when it is published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Envelope {
    key: Vec<u8>,
    id: Vec<u8>,
    headers: Vec<(String, Vec<u8>)>,
    ttl: Option<Duration>,
}

impl Envelope {
    /// An envelope with nothing but the timestamp.
    pub const fn new() -> Self {
        Envelope { key: Vec::new(), id: Vec::new(), headers: Vec::new(), ttl: None }
    }

    /// What the message is about. An empty key is no key.
    #[must_use]
    pub fn key(mut self, key: &[u8]) -> Self {
        self.key.clear();
        self.key.extend_from_slice(key);
        self
    }

    /// The caller's own name for the message. An empty id is no id.
    #[must_use]
    pub fn id(mut self, id: &[u8]) -> Self {
        self.id.clear();
        self.id.extend_from_slice(id);
        self
    }

    /// One more header, after those there are. A name may occur more than once.
    #[must_use]
    pub fn header(mut self, name: &str, value: &[u8]) -> Self {
        self.headers.push((name.to_owned(), value.to_vec()));
        self
    }

    /// How long the message lives from its publishing on, in the place of the topic's own time-to-live;
    /// [`Duration::MAX`]: for ever.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Whether there is nothing in it that a topic without envelopes could not carry.
    pub(crate) fn is_empty(&self) -> bool {
        self.key.is_empty() && self.id.is_empty() && self.headers.is_empty() && self.ttl.is_none()
    }

    /// Appends the envelope of a message published at `now_ns` to `out`, which ends aligned; the payload follows.
    /// `default_ttl_ms` is the topic's. On an error `out` is as it was.
    pub(crate) fn seal(
        &self,
        now_ns: u64,
        default_ttl_ms: u64,
        align: u64,
        out: &mut Vec<u8>,
    ) -> Result<(), EnvelopeError> {
        check("a key", self.key.len(), MAX_KEY_BYTES)?;
        check("an id", self.id.len(), MAX_ID_BYTES)?;
        let start = out.len();
        out.resize(start + ENVELOPE_HEAD_BYTES, 0);
        out.extend_from_slice(&self.key);
        out.extend_from_slice(&self.id);
        let headers = self.append_headers(out);
        if let Err(error) = check("headers", headers, MAX_HEADERS_BYTES) {
            out.truncate(start);
            return Err(error);
        }
        let head = Head {
            timestamp_ns: now_ns,
            expires_ns: expiry(now_ns, self.ttl, default_ttl_ms),
            key: self.key.len(),
            id: self.id.len(),
            headers,
        };
        out[start..start + ENVELOPE_HEAD_BYTES].copy_from_slice(&head.encode());
        out.resize(start + head.envelope_bytes(align), 0);
        Ok(())
    }

    /// Appends the encoded headers; how many bytes they are.
    fn append_headers(&self, out: &mut Vec<u8>) -> usize {
        let start = out.len();
        if !self.headers.is_empty() {
            put_varint(out, self.headers.len());
            for (name, value) in &self.headers {
                put_varint(out, name.len());
                out.extend_from_slice(name.as_bytes());
                put_varint(out, value.len());
                out.extend_from_slice(value);
            }
        }
        out.len() - start
    }
}

/// The envelope of a message with nothing but its timestamp and the topic's time-to-live: the head alone, which is as
/// long as any payload's alignment asks for.
pub(crate) fn plain(now_ns: u64, default_ttl_ms: u64) -> [u8; ENVELOPE_HEAD_BYTES] {
    let expires_ns = expiry(now_ns, None, default_ttl_ms);
    Head { timestamp_ns: now_ns, expires_ns, key: 0, id: 0, headers: 0 }.encode()
}

/// CLOCK_REALTIME in nanoseconds; 0 before 1970.
pub(crate) fn now_ns() -> u64 {
    unix_ns(SystemTime::now())
}

/// A moment in nanoseconds since 1970; 0 before that.
pub(crate) fn unix_ns(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, whole_ns)
}

fn whole_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// When a message dies; 0: never.
fn expiry(now_ns: u64, ttl: Option<Duration>, default_ttl_ms: u64) -> u64 {
    match ttl {
        Some(ttl) => now_ns.saturating_add(whole_ns(ttl)),
        None if default_ttl_ms > 0 => now_ns.saturating_add(default_ttl_ms.saturating_mul(1_000_000)),
        None => 0,
    }
}

fn check(part: &'static str, found: usize, max: usize) -> Result<(), EnvelopeError> {
    if found <= max { Ok(()) } else { Err(EnvelopeError::TooLong { part, found, max }) }
}

/// A number as postcard writes it: seven bits a byte, the lowest first.
fn put_varint(out: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// An envelope's head: times, and lengths that are within their limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Head {
    timestamp_ns: u64,
    expires_ns: u64,
    key: usize,
    id: usize,
    headers: usize,
}

impl Head {
    fn encode(&self) -> [u8; ENVELOPE_HEAD_BYTES] {
        let mut bytes = [0; ENVELOPE_HEAD_BYTES];
        bytes[..8].copy_from_slice(&self.timestamp_ns.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.expires_ns.to_le_bytes());
        bytes[16..18].copy_from_slice(&(self.key as u16).to_le_bytes());
        bytes[18] = self.id as u8;
        bytes[20..24].copy_from_slice(&(self.headers as u32).to_le_bytes());
        bytes
    }

    /// Takes a copied head apart; `None` where a length exceeds its limit (I-8).
    fn decode(bytes: [u8; ENVELOPE_HEAD_BYTES]) -> Option<Head> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let head = Head {
            timestamp_ns: word(0),
            expires_ns: word(8),
            key: usize::from(word(16) as u16),
            id: usize::from(bytes[18]),
            headers: (word(16) >> 32) as usize,
        };
        let sound = head.key <= MAX_KEY_BYTES && head.id <= MAX_ID_BYTES && head.headers <= MAX_HEADERS_BYTES;
        sound.then_some(head)
    }

    /// Bytes of key, id and headers.
    fn field_bytes(&self) -> usize {
        self.key + self.id + self.headers
    }

    /// Where the payload begins.
    fn envelope_bytes(&self, align: u64) -> usize {
        (ENVELOPE_HEAD_BYTES + self.field_bytes()).next_multiple_of(align.max(8) as usize)
    }
}

/// The envelope of a received message: a checked head, and the fields it speaks of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EnvelopeView<'a> {
    head: Head,
    /// Key, id and headers, of exactly the lengths that the head says.
    fields: &'a [u8],
}

impl<'a> EnvelopeView<'a> {
    /// `None` where the headers are garbled.
    fn new(head: Head, fields: &'a [u8]) -> Option<Self> {
        let view = EnvelopeView { head, fields };
        headers_are_sound(&fields[head.key + head.id..]).then_some(view)
    }

    /// What it consists of, to be kept elsewhere.
    pub(crate) fn parts(&self) -> (Head, &'a [u8]) {
        (self.head, self.fields)
    }

    /// The view whose [`Self::parts`] have been kept; there may be more behind the fields.
    pub(crate) fn of_parts(head: Head, fields: &'a [u8]) -> Self {
        EnvelopeView { head, fields: &fields[..head.field_bytes()] }
    }

    /// When it was published: CLOCK_REALTIME, in nanoseconds.
    pub(crate) fn timestamp_ns(&self) -> u64 {
        self.head.timestamp_ns
    }

    /// When it dies, on the same clock; `None`: never.
    pub(crate) fn expires_ns(&self) -> Option<u64> {
        (self.head.expires_ns != 0).then_some(self.head.expires_ns)
    }

    /// Whether it is dead by now. Looks at the clock only where there is a time-to-live.
    pub(crate) fn is_expired(&self) -> bool {
        self.expires_ns().is_some_and(|at| at <= now_ns())
    }

    /// The key, if there is one.
    pub(crate) fn key(&self) -> Option<&'a [u8]> {
        let key = &self.fields[..self.head.key];
        (!key.is_empty()).then_some(key)
    }

    /// The caller's own id, if there is one.
    pub(crate) fn id(&self) -> Option<&'a [u8]> {
        let id = &self.fields[self.head.key..self.head.key + self.head.id];
        (!id.is_empty()).then_some(id)
    }

    /// The headers in the order in which they were added.
    pub(crate) fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        Headers::new(&self.fields[self.head.key + self.head.id..])
    }
}

/// Takes a message's body apart: the envelope, and the payload. `None` where it is garbled.
///
/// `body` is private memory: a copy, so that what has been checked stays as it was (I-8). `align` is what
/// `TopicInfo::batch_align` says.
pub(crate) fn split(body: &[u8], align: u64) -> Option<(EnvelopeView<'_>, &[u8])> {
    let head = Head::decode(*body.first_chunk()?)?;
    let payload = body.get(head.envelope_bytes(align)..)?;
    let fields = &body[ENVELOPE_HEAD_BYTES..][..head.field_bytes()];
    Some((EnvelopeView::new(head, fields)?, payload))
}

/// Longest beginning of a body that [`id_in`] needs.
pub(crate) const ID_WITHIN_BYTES: usize = ENVELOPE_HEAD_BYTES + MAX_KEY_BYTES + MAX_ID_BYTES;

/// The id in the envelope that begins `body`, if it has one and is not garbled; `body` may end after
/// [`ID_WITHIN_BYTES`].
pub(crate) fn id_in(body: &[u8]) -> Option<&[u8]> {
    let head = Head::decode(*body.first_chunk()?)?;
    let id = body.get(ENVELOPE_HEAD_BYTES + head.key..)?.get(..head.id)?;
    (!id.is_empty()).then_some(id)
}

/// The envelope of the message a handle found last, copied out of shared memory.
#[derive(Default)]
pub(crate) struct Opened {
    head: Head,
    /// Head, fields and padding.
    copy: Vec<u8>,
}

impl Opened {
    /// Copies and checks the envelope of `body`, which may lie in memory that others write; where in `body` the payload
    /// begins. `None` where it is garbled.
    pub(crate) fn read(&mut self, body: &[u8], align: u64) -> Option<usize> {
        let head: [u8; ENVELOPE_HEAD_BYTES] = *body.first_chunk()?;
        let payload_at = Head::decode(head)?.envelope_bytes(align);
        let fields = body.get(ENVELOPE_HEAD_BYTES..payload_at)?;
        self.copy.clear();
        self.copy.extend_from_slice(&head);
        self.copy.extend_from_slice(fields);
        self.head = split(&self.copy, align)?.0.head;
        Some(payload_at)
    }

    /// What was read last.
    pub(crate) fn view(&self) -> EnvelopeView<'_> {
        let fields = self.copy.get(ENVELOPE_HEAD_BYTES..).unwrap_or_default();
        EnvelopeView::of_parts(self.head, fields)
    }
}

/// Encoded headers being walked; ends early where they are garbled.
struct Headers<'a> {
    left: u32,
    rest: &'a [u8],
}

impl<'a> Headers<'a> {
    fn new(encoded: &'a [u8]) -> Self {
        let (left, rest) = postcard::take_from_bytes(encoded).unwrap_or((0, encoded));
        Headers { left, rest }
    }
}

impl<'a> Iterator for Headers<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let (header, rest) = postcard::take_from_bytes(self.rest).ok()?;
        self.left -= 1;
        self.rest = rest;
        Some(header)
    }
}

/// Whether walking these headers gives as many as they say and leaves nothing over.
fn headers_are_sound(encoded: &[u8]) -> bool {
    let mut headers = Headers::new(encoded);
    while headers.next().is_some() {}
    headers.left == 0 && headers.rest.is_empty()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealed(envelope: &Envelope, align: u64, payload: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        envelope.seal(1_000, 0, align, &mut body).unwrap();
        body.extend_from_slice(payload);
        body
    }

    #[test]
    fn the_wire_form_is_what_it_says() {
        let envelope = Envelope::new().key(b"k").id(b"id").header("h", b"v").ttl(Duration::from_nanos(24));
        let body = sealed(&envelope, 8, b"payload");
        assert_eq!(body[..8], 1_000u64.to_le_bytes());
        assert_eq!(body[8..16], 1_024u64.to_le_bytes());
        assert_eq!(body[16..32], [1, 0, 2, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(body[32..40], *b"kid\x01\x01h\x01v");
        assert_eq!(body[40..], *b"payload");
        let headers = postcard::to_stdvec(&vec![("h".to_owned(), b"v".to_vec())]).unwrap();
        assert_eq!(body[35..40], headers, "postcard's own form");
        assert_eq!(plain(1_000, 0)[..], sealed(&Envelope::new(), 32, b"")[..]);
    }

    #[test]
    fn a_time_to_live_is_the_message_s_own_or_the_topic_s() {
        assert_eq!(expiry(5, None, 0), 0);
        assert_eq!(expiry(5, None, 2), 2_000_005);
        assert_eq!(expiry(5, Some(Duration::from_nanos(7)), 2), 12);
        assert_eq!(expiry(5, Some(Duration::MAX), 2), u64::MAX);
    }

    #[test]
    fn what_is_too_long_is_refused_and_leaves_nothing_behind() {
        let long = vec![b'x'; MAX_HEADERS_BYTES];
        let cases = [
            (Envelope::new().key(&long[..256]), "a key of 256 bytes; a message takes at most 255"),
            (Envelope::new().id(&long[..33]), "an id of 33 bytes; a message takes at most 32"),
            (Envelope::new().header("", &long), "headers of 16389 bytes; a message takes at most 16384"),
        ];
        for (envelope, problem) in cases {
            let mut out = vec![7; 3];
            assert_eq!(envelope.seal(1, 0, 8, &mut out).unwrap_err().to_string(), problem);
            assert_eq!(out, [7; 3]);
        }
    }

    #[test]
    fn truncated_headers_are_garbage() {
        let body = sealed(&Envelope::new().header("name", b"value"), 8, b"");
        assert!(split(&body, 8).is_some());
        for (at, byte) in [(32, 2), (32, 0), (33, 200), (34, 0xff), (38, 6), (38, 4)] {
            let mut garbled = body.clone();
            garbled[at] = byte;
            assert!(split(&garbled, 8).is_none(), "byte {at} is {byte}");
        }
    }

    proptest! {
        #[test]
        fn what_is_sealed_comes_back(
            key in prop::collection::vec(any::<u8>(), 0..=255),
            id in prop::collection::vec(any::<u8>(), 0..=32),
            headers in prop::collection::vec(("[a-zö]{0,9}", prop::collection::vec(any::<u8>(), 0..300)), 0..8),
            payload in prop::collection::vec(any::<u8>(), 0..100),
            align in prop::sample::select(vec![1u64, 8, 16, 32]),
        ) {
            let mut envelope = Envelope::new().key(&key).id(&id);
            for (name, value) in &headers {
                envelope = envelope.header(name, value);
            }
            let body = sealed(&envelope, align, &payload);
            let (view, found) = split(&body, align).unwrap();
            prop_assert_eq!(found, &payload[..]);
            prop_assert!((body.len() - payload.len()).is_multiple_of(align.max(8) as usize));
            prop_assert_eq!(view.key().unwrap_or_default(), &key[..]);
            prop_assert_eq!(view.id().unwrap_or_default(), &id[..]);
            let owned: Vec<(String, Vec<u8>)> = view.headers().map(|(n, v)| (n.to_owned(), v.to_vec())).collect();
            prop_assert_eq!(owned, headers);
            let mut opened = Opened::default();
            prop_assert_eq!(opened.read(&body, align), Some(body.len() - payload.len()));
            prop_assert_eq!(opened.view().headers().count(), view.headers().count());
        }

        #[test]
        fn garbage_never_panics(
            mut body in prop::collection::vec(any::<u8>(), 0..400),
            small in any::<bool>(),
            lengths in (0u16..300, 0u8..40, 0u32..300),
        ) {
            if small && body.len() >= ENVELOPE_HEAD_BYTES {
                body[16..18].copy_from_slice(&lengths.0.to_le_bytes());
                body[18] = lengths.1;
                body[20..24].copy_from_slice(&lengths.2.to_le_bytes());
            }
            for align in [1, 8, 32] {
                if let Some((view, payload)) = split(&body, align) {
                    prop_assert!(payload.len() + ENVELOPE_HEAD_BYTES <= body.len());
                    prop_assert!(view.key().unwrap_or_default().len() <= MAX_KEY_BYTES);
                    view.headers().for_each(drop);
                }
                prop_assert_eq!(split(&body, align).is_some(), Opened::default().read(&body, align).is_some());
            }
        }
    }
}
