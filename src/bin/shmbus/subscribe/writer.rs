//! Standard output of `sub`: payloads as they are, or JSON lines; buffered until told to flush.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use shmbus::{Message, Sequence};

use crate::signals;

/// Write out when this much has gathered.
const BUFFER_BYTES: usize = 256 << 10;

/// Payloads from this size on are written from shared memory, without a copy of ours.
const DIRECT_BYTES: usize = 32 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
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
    key: Option<&'a str>,
    attempt: Option<u32>,
    /// The payload if it is UTF-8.
    payload: Option<&'a str>,
    /// The payload if it is not.
    payload_base64: Option<String>,
}

/// A loss as `--json` prints it: everything from `lagged_from` up to, not including, `lagged_to`.
#[derive(Serialize)]
struct LossLine<'a> {
    topic: &'a str,
    lagged_from: u64,
    lagged_to: u64,
}

pub(super) struct Writer {
    format: Format,
    buffer: Vec<u8>,
    out: Option<File>,
}

impl Writer {
    pub(super) fn new(format: Format) -> Writer {
        // A descriptor of our own: `Stdout` would look for newlines in every payload.
        let out = io::stdout().as_fd().try_clone_to_owned().ok().map(File::from);
        Writer { format, buffer: Vec::with_capacity(BUFFER_BYTES + DIRECT_BYTES), out }
    }

    pub(super) fn message(&mut self, topic: &str, message: &Message<'_, [u8]>) -> io::Result<()> {
        let payload = message.as_bytes();
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
                let text = std::str::from_utf8(payload).ok();
                let line = MessageLine {
                    topic,
                    sequence: message.sequence().get(),
                    publisher: message.publisher(),
                    publisher_number: message.publisher_number(),
                    timestamp_ns: None,
                    key: None,
                    attempt: None,
                    payload: text,
                    payload_base64: text.is_none().then(|| STANDARD.encode(payload)),
                };
                serde_json::to_writer(&mut self.buffer, &line)?;
                self.buffer.push(b'\n');
                self.flush_if_full()
            }
        }
    }

    pub(super) fn loss(&mut self, topic: &str, from: Sequence, to: Sequence) -> io::Result<()> {
        if self.format == Format::Payload {
            let count = to.since(from);
            eprintln!("shmbus: topic {topic:?} lost {count} messages, sequences {from}..{to}: overwritten");
            return Ok(());
        }
        let line = LossLine { topic, lagged_from: from.get(), lagged_to: to.get() };
        serde_json::to_writer(&mut self.buffer, &line)?;
        self.buffer.push(b'\n');
        Ok(())
    }

    /// Writes everything that has gathered.
    pub(super) fn flush(&mut self) -> io::Result<()> {
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
    pub(super) fn reader_is_gone(&self) -> bool {
        self.out.as_ref().is_none_or(|out| signals::reader_is_gone(out.as_fd()))
    }
}
