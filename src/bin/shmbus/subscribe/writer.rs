//! Standard output of `sub` and `peek`: payloads as they are, or JSON lines; buffered until told to flush.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Map, Value, json};
use shmbus::{BatchItem, Message, Sequence};

use crate::signals;

/// Write out when this much has gathered.
const BUFFER_BYTES: usize = 256 << 10;

/// Payloads from this size on are written from shared memory, without a copy of ours.
const DIRECT_BYTES: usize = 32 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Payload,
    Json,
}

/// One message as `--json` prints it; null is what the topic does not carry.
#[derive(Serialize)]
struct MessageLine<'a> {
    topic: &'a str,
    sequence: u64,
    publisher: Option<u64>,
    publisher_number: Option<u64>,
    timestamp_ns: Option<u64>,
    /// The key if it is UTF-8.
    key: Option<&'a str>,
    /// The key if it is not.
    key_base64: Option<String>,
    /// The caller's own id, likewise.
    id: Option<&'a str>,
    id_base64: Option<String>,
    headers: Option<Map<String, Value>>,
    attempt: Option<u32>,
    /// The payload if it is UTF-8.
    payload: Option<&'a str>,
    /// The payload if it is not.
    payload_base64: Option<String>,
}

/// How many had expired, as `--json` prints it.
#[derive(Serialize)]
struct ExpiredLine<'a> {
    topic: &'a str,
    expired: u64,
}

/// A loss as `--json` prints it: everything from `lagged_from` up to, not including, `lagged_to`.
#[derive(Serialize)]
struct LossLine<'a> {
    topic: &'a str,
    lagged_from: u64,
    lagged_to: u64,
}

/// What is printed of a message, however it was received.
pub(crate) trait Received {
    fn sequence(&self) -> Sequence;
    fn publisher(&self) -> Option<u64>;
    fn publisher_number(&self) -> Option<u64>;
    fn timestamp_ns(&self) -> Option<u64>;
    fn key(&self) -> Option<&[u8]>;
    fn id(&self) -> Option<&[u8]>;
    fn headers(&self) -> Vec<(&str, &[u8])>;
    /// Which delivery to the group it is; `None` outside groups.
    fn attempt(&self) -> Option<u32>;
    fn payload(&self) -> &[u8];
}

/// Implements [`Received`] for a type of the library that has methods of these names.
macro_rules! received {
    ($type:ty, $message:ident => $attempt:expr) => {
        impl Received for $type {
            fn sequence(&self) -> Sequence {
                self.sequence()
            }
            fn publisher(&self) -> Option<u64> {
                self.publisher()
            }
            fn publisher_number(&self) -> Option<u64> {
                self.publisher_number()
            }
            fn timestamp_ns(&self) -> Option<u64> {
                self.timestamp_ns()
            }
            fn key(&self) -> Option<&[u8]> {
                self.key()
            }
            fn id(&self) -> Option<&[u8]> {
                self.id()
            }
            fn headers(&self) -> Vec<(&str, &[u8])> {
                self.headers().collect()
            }
            fn attempt(&self) -> Option<u32> {
                let $message = self;
                $attempt
            }
            fn payload(&self) -> &[u8] {
                self.as_bytes()
            }
        }
    };
}

received!(Message<'_, [u8]>, _message => None);
received!(BatchItem<'_, [u8]>, message => Some(message.attempt()));

pub(crate) struct Writer {
    topic: String,
    format: Format,
    buffer: Vec<u8>,
    out: Option<File>,
}

impl Writer {
    pub(crate) fn new(topic: &str, format: Format) -> Writer {
        // A descriptor of our own: `Stdout` would look for newlines in every payload.
        let out = io::stdout().as_fd().try_clone_to_owned().ok().map(File::from);
        Writer { topic: topic.to_owned(), format, buffer: Vec::with_capacity(BUFFER_BYTES + DIRECT_BYTES), out }
    }

    /// The topic of what is written next.
    pub(crate) fn set_topic(&mut self, topic: &str) {
        if self.topic != topic {
            topic.clone_into(&mut self.topic);
        }
    }

    pub(crate) fn message(&mut self, message: &impl Received) -> io::Result<()> {
        let payload = message.payload();
        match self.format {
            Format::Payload if payload.len() >= DIRECT_BYTES => {
                self.flush()?;
                self.write_out(payload)
            }
            Format::Payload => {
                self.buffer.extend_from_slice(payload);
                self.flush_if_full()
            }
            Format::Json => {
                let (payload, payload_base64) = text_or_base64(Some(payload));
                let (key, key_base64) = text_or_base64(message.key());
                let (id, id_base64) = text_or_base64(message.id());
                let line = MessageLine {
                    topic: &self.topic,
                    sequence: message.sequence().get(),
                    publisher: message.publisher(),
                    publisher_number: message.publisher_number(),
                    timestamp_ns: message.timestamp_ns(),
                    key,
                    key_base64,
                    id,
                    id_base64,
                    headers: message.timestamp_ns().map(|_| headers_object(&message.headers())),
                    attempt: message.attempt(),
                    payload,
                    payload_base64,
                };
                serde_json::to_writer(&mut self.buffer, &line)?;
                self.buffer.push(b'\n');
                self.flush_if_full()
            }
        }
    }

    /// Says how many messages had expired, if any had.
    pub(crate) fn expired(&mut self, count: u64) -> io::Result<()> {
        match self.format {
            _ if count == 0 => Ok(()),
            Format::Payload => {
                let (plural, were) = if count == 1 { ("", "was") } else { ("s", "were") };
                eprintln!("shmbus: topic {:?}: {count} message{plural} had expired and {were} skipped", self.topic);
                Ok(())
            }
            Format::Json => {
                serde_json::to_writer(&mut self.buffer, &ExpiredLine { topic: &self.topic, expired: count })?;
                self.buffer.push(b'\n');
                Ok(())
            }
        }
    }

    pub(crate) fn loss(&mut self, from: Sequence, to: Sequence) -> io::Result<()> {
        if self.format == Format::Payload {
            let count = to.since(from);
            eprintln!("shmbus: topic {:?} lost {count} messages, sequences {from}..{to}: overwritten", self.topic);
            return Ok(());
        }
        let line = LossLine { topic: &self.topic, lagged_from: from.get(), lagged_to: to.get() };
        serde_json::to_writer(&mut self.buffer, &line)?;
        self.buffer.push(b'\n');
        Ok(())
    }

    /// Writes everything that has gathered.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let buffer = std::mem::take(&mut self.buffer);
        let written = self.write_out(&buffer);
        self.buffer = buffer;
        self.buffer.clear();
        written
    }

    fn flush_if_full(&mut self) -> io::Result<()> {
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn write_out(&mut self, bytes: &[u8]) -> io::Result<()> {
        let out = self.out.as_mut().ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe))?;
        out.write_all(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::BrokenPipe => e,
            kind => io::Error::new(kind, format!("cannot write standard output: {e}")),
        })
    }

    /// Whether nobody will ever read what would be written.
    pub(crate) fn reader_is_gone(&self) -> bool {
        self.out.as_ref().is_none_or(|out| signals::reader_is_gone(out.as_fd()))
    }
}

/// Bytes as text, or in base64 where they are not text.
pub(crate) fn text_or_base64(bytes: Option<&[u8]>) -> (Option<&str>, Option<String>) {
    let text = bytes.and_then(|bytes| std::str::from_utf8(bytes).ok());
    (text, bytes.filter(|_| text.is_none()).map(|bytes| STANDARD.encode(bytes)))
}

/// The headers as an object; of several with one name, the first, as `Message::header` has it.
pub(crate) fn headers_object(headers: &[(&str, &[u8])]) -> Map<String, Value> {
    let mut object = Map::new();
    for (name, value) in headers {
        let value = match std::str::from_utf8(value) {
            Ok(text) => Value::from(text),
            Err(_) => json!({ "base64": STANDARD.encode(value) }),
        };
        object.entry(*name).or_insert(value);
    }
    object
}
