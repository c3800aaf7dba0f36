//! `shmbus pub`: standard input becomes messages.

mod input;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use shmbus::{Envelope, PublishError, Publisher, Sequence, Topic, TopicOptions};

use crate::output::json_line;
use crate::{Ended, Globals, signals, values};
use input::{Cut, Filled, Input};

/// Most messages in one batch, and most bytes: enough to pay for the batch, little enough to flow.
const BATCH_MESSAGES: u64 = 256;
const BATCH_BYTES: u64 = 256 << 10;

/// Publish standard input; done when all of it is visible to subscribers.
///
/// A line is a message, its newline included, so that `shmbus sub` reproduces a text file byte for byte; --chunk cuts
/// at every N bytes (the last message may be shorter), --raw makes one message of everything. A missing topic is
/// created with the defaults of `shmbus create`. Where the ring is full, pub waits, or fails if the topic rejects.
/// --key, --header and --ttl go with every message; they need a topic with envelopes (as `create --envelope` makes it, and
/// pub where it creates the topic itself). With --json the last line is {topic, messages, bytes, first_sequence, last_sequence}.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus pub logs --lines <access.log\n         shmbus pub video --chunk 64K <film.mkv")]
pub(crate) struct Args {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// A line is a message, with its newline [the default]
    #[arg(long, group = "cut")]
    lines: bool,
    /// Every N bytes are a message; takes the suffixes K, M and G
    #[arg(long, group = "cut", value_name = "BYTES", value_parser = values::positive_size)]
    chunk: Option<u64>,
    /// All of standard input is one message
    #[arg(long, group = "cut")]
    raw: bool,
    /// The messages' key
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true)]
    key: String,
    /// A header of the messages; may be given more than once
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = values::header)]
    headers: Vec<(String, String)>,
    /// How long the messages live, as in 500ms, 5s, 10m, 2h or 1d
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    ttl: Option<Duration>,
}

impl Args {
    fn cut(&self) -> Cut {
        match (self.chunk, self.raw) {
            (Some(bytes), _) => Cut::Chunk(bytes as usize),
            (None, true) => Cut::Whole,
            (None, false) => Cut::Lines,
        }
    }

    /// The topic as it is created where it does not exist.
    fn topic(&self) -> Topic<[u8]> {
        let topic = Topic::named(self.topic.as_str());
        if self.envelope() == Envelope::new() { topic } else { topic.envelope() }
    }

    /// What goes with every message.
    fn envelope(&self) -> Envelope {
        let envelope = Envelope::new().key(self.key.as_bytes());
        let envelope = self.ttl.into_iter().fold(envelope, Envelope::ttl);
        self.headers.iter().fold(envelope, |envelope, (name, value)| envelope.header(name, value.as_bytes()))
    }
}

/// What `--json` prints at the end. With other publishers on the topic, the range holds theirs too.
#[derive(Serialize)]
struct Summary<'a> {
    topic: &'a str,
    messages: u64,
    bytes: u64,
    first_sequence: Option<u64>,
    last_sequence: Option<u64>,
}

/// How much is visible to subscribers; shared with the signal thread, which may have the last word.
#[derive(Default)]
struct Published {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl std::fmt::Display for Published {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (messages, bytes) = (self.messages.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        let (plural, were) = if messages == 1 { ("", "was") } else { ("s", "were") };
        write!(f, "{messages} message{plural} ({bytes} bytes) {were} published")
    }
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let publisher = globals.open_bus()?.publisher(args.topic())?;
    let published = Arc::new(Published::default());
    let at_exit = Arc::clone(&published);
    let in_hand = move || format!("ended by a signal: {at_exit}, perhaps also the batch in hand, nothing after it");
    signals::install(Duration::from_millis(500), Box::new(in_hand))?;

    let mut sender = Sender { publisher, envelope: args.envelope(), published, first: None, last: None };
    let ended = pump(&mut sender, &args)?;
    if globals.json {
        json_line(&sender.summary(&args.topic))?;
    }
    Ok(ended)
}

/// Reads, cuts and publishes until the end of standard input or a signal.
fn pump(sender: &mut Sender, args: &Args) -> anyhow::Result<Ended> {
    let mut input = Input::new(args.cut(), sender.publisher.topic_options().bytes)?;
    let progress = progress_bar(input.len_hint());
    loop {
        let filled = input.fill().map_err(|e| anyhow!("cannot read standard input: {e}; {}", sender.published))?;
        progress.set_position(input.read_bytes());
        if let Filled::Signal(signal) = filled {
            eprintln!("shmbus: ended by a signal: {}, nothing after them", sender.published);
            return Ok(Ended::BySignal(signal));
        }
        let (messages, consumed) = input.messages();
        sender.publish_all(&messages).map_err(|e| sender.failed(&args.topic, e))?;
        input.consume(consumed);
        if let Filled::End = filled {
            progress.finish_and_clear();
            return Ok(Ended::Well);
        }
        input.check_room().map_err(|e| sender.failed(&args.topic, e))?;
    }
}

/// Visible on a terminal when standard input is a file, whose length is known.
fn progress_bar(len: Option<u64>) -> ProgressBar {
    let Some(len) = len else { return ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}");
    ProgressBar::new(len).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// The publisher, and the account of what it has published.
struct Sender {
    publisher: Publisher<[u8]>,
    envelope: Envelope,
    published: Arc<Published>,
    first: Option<Sequence>,
    last: Option<Sequence>,
}

impl Sender {
    fn publish_all(&mut self, messages: &[&[u8]]) -> Result<(), PublishError> {
        let limits = BatchLimits::of(self.publisher.topic_options());
        let mut rest = messages;
        while !rest.is_empty() {
            let (batch, after) = rest.split_at(limits.first_batch(rest));
            self.publish_batch(batch)?;
            rest = after;
        }
        Ok(())
    }

    /// A batch is all or nothing, but a line that comes before a bad one deserves to be published: after a failed
    /// batch its messages go one by one, up to the one that fails for itself.
    fn publish_batch(&mut self, batch: &[&[u8]]) -> Result<(), PublishError> {
        match batch {
            [one] => {
                let sequence = self.publisher.publish_with(one, &self.envelope)?;
                self.note(sequence, batch);
                Ok(())
            }
            _ => match self.publisher.publish_batch_with(batch.iter().map(|payload| (*payload, &self.envelope))) {
                Ok(first) => {
                    self.note(first, batch);
                    Ok(())
                }
                Err(e @ (PublishError::Gone(_) | PublishError::Corrupt(_) | PublishError::Envelope(_))) => Err(e),
                Err(_) => batch.chunks(1).try_for_each(|one| self.publish_batch(one)),
            },
        }
    }

    fn note(&mut self, first: Sequence, batch: &[&[u8]]) {
        self.first.get_or_insert(first);
        self.last = Some(first.advance(batch.len() as u64 - 1));
        self.published.messages.fetch_add(batch.len() as u64, Ordering::Relaxed);
        self.published.bytes.fetch_add(batch.iter().map(|m| m.len() as u64).sum(), Ordering::Relaxed);
    }

    /// The error, with the exact place in the input at which it happened.
    fn failed(&self, topic: &str, error: PublishError) -> anyhow::Error {
        let number = self.published.messages.load(Ordering::Relaxed) + 1;
        anyhow!(
            "topic {topic:?}, message {number}: {error}; {}, message {number} and what follows were not",
            self.published
        )
    }

    fn summary<'a>(&self, topic: &'a str) -> Summary<'a> {
        Summary {
            topic,
            messages: self.published.messages.load(Ordering::Relaxed),
            bytes: self.published.bytes.load(Ordering::Relaxed),
            first_sequence: self.first.map(Sequence::get),
            last_sequence: self.last.map(Sequence::get),
        }
    }
}

/// A batch must fit in the ring and leave room for the next, or publisher and subscriber run in lockstep.
struct BatchLimits {
    messages: usize,
    bytes: u64,
}

impl BatchLimits {
    fn of(options: &TopicOptions) -> BatchLimits {
        BatchLimits {
            messages: BATCH_MESSAGES.min(options.messages / 4).max(1) as usize,
            bytes: BATCH_BYTES.min(options.bytes / 4),
        }
    }

    /// How many of these messages go into the next batch; at least one.
    fn first_batch(&self, messages: &[&[u8]]) -> usize {
        let mut bytes = 0;
        let fits = messages.iter().take(self.messages).take_while(|message| {
            bytes += message.len() as u64;
            bytes <= self.bytes
        });
        fits.count().max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_cut_by_count_and_by_bytes() {
        let limits = BatchLimits { messages: 3, bytes: 10 };
        assert_eq!(limits.first_batch(&[b"a", b"b", b"c", b"d"]), 3);
        assert_eq!(limits.first_batch(&[b"12345", b"12345", b"1"]), 2);
        assert_eq!(limits.first_batch(&[&[0; 11], b"1"]), 1, "one message always goes");
    }
}
