//! `shmbus sub`: messages become standard output.

pub(crate) mod writer;

use std::time::{Duration, Instant};

use anyhow::anyhow;
use shmbus::{
    AckError, Batch, Bus, Consumer, GoneReason, Message, RecvError, Sequence, Start, Subscriber, Topic, WildcardError,
    WildcardMessage, WildcardSubscriber, is_pattern, virtual_topic,
};

use crate::{Ended, Globals, signals, values, wrong_usage};
use writer::{Format, Writer};

/// How often a waiting `sub` looks for signals and for whether its reader is still there.
const LOOK: Duration = Duration::from_millis(100);

/// Messages of a group that are written, flushed and acknowledged together, at most.
const BATCH: u64 = 32;

/// Write the topic's messages to standard output, as they come, until Ctrl-C.
///
/// Payloads are written exactly as published, with nothing between them. Messages that were overwritten before they
/// could be read are reported on standard error, and so is how many had expired. With --json a message is {topic,
/// sequence, publisher, publisher_number, timestamp_ns, key, key_base64, id, id_base64, headers, attempt, payload,
/// payload_base64} (what is text, else the base64 one; headers is an object, values that are not text are
/// {"base64": "..."}; null where the message or the topic has no such thing), a loss {topic, lagged_from, lagged_to}
/// (lagged_to is still there), and in the end, if any had, {topic, expired}.
/// Ends well when the bus is stopped, and fails when the topic is removed.
///
/// With --group it is one of the group's consumers: each message goes to one of them, and is acknowledged when it has been
/// written. What was not, because the reader or this process has gone, the group gives to another. The queue name
/// Consumer.G.VirtualTopic.X means topic VirtualTopic.X and group G.
#[derive(clap::Args)]
#[command(after_help = "Examples: shmbus sub logs --from oldest --idle-exit 1000 >copy.log\n          \
    shmbus sub orders --group billing --from oldest")]
pub(crate) struct Args {
    /// The topic, or a pattern: orders.* (any one token), 'orders.>' (one or more), also of topics to come
    #[arg(value_parser = values::topic_or_pattern)]
    topic: String,
    /// Where to start: latest, oldest, last:N, a sequence number; on topics with envelopes also last-per-key, time:SECONDS
    /// (since 1970) or time:-10m (so long ago)
    /// [a group that exists goes on where it is]
    #[arg(long, value_name = "START", allow_hyphen_values = true, default_value = "latest", value_parser = values::start)]
    from: Start,
    /// Share the messages with the other consumers of this group; created where it does not exist
    #[arg(long, value_name = "GROUP", value_parser = values::topic_name)]
    group: Option<String>,
    /// End after this many messages
    #[arg(long, value_name = "N", value_parser = values::number::<u64>)]
    count: Option<u64>,
    /// End when nothing has come for this many milliseconds
    #[arg(long, value_name = "MS")]
    idle_exit: Option<u64>,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let (topic, group) = args.place()?;
    let mut source = Source::open(&globals.open_bus()?, topic, group, args.from)?;
    // The main thread looks every 100 ms; it can hang only in a write that its reader does not take.
    let stuck = || "ended by a signal while the reader of standard output took nothing".to_owned();
    signals::install(Duration::from_secs(1), Box::new(stuck))?;
    let format = if globals.json { Format::Json } else { Format::Payload };
    let mut writer = Writer::new(topic, format);
    let ended = pump(&mut source, &mut writer, &args);
    writer.set_topic(topic);
    writer.expired(source.expired())?;
    writer.flush()?;
    let ended = ended?;
    Ok(ended)
}

fn pump(source: &mut Source, writer: &mut Writer, args: &Args) -> anyhow::Result<Ended> {
    let idle_exit = args.idle_exit.map(Duration::from_millis);
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut quiet_since = None;
    while left > 0 {
        if let Some(signal) = signals::caught() {
            return Ok(Ended::BySignal(signal));
        }
        match take(source, writer, left, idle_exit)? {
            Taken::Messages(count) => {
                left -= count;
                quiet_since = None;
            }
            Taken::Lost => quiet_since = None,
            Taken::Nothing => {
                let since = *quiet_since.get_or_insert_with(Instant::now);
                if writer.reader_is_gone() || idle_exit.is_some_and(|limit| since.elapsed() >= limit) {
                    break;
                }
            }
            Taken::Ended => break,
        }
    }
    Ok(Ended::Well)
}

enum Taken {
    Messages(u64),
    /// Word of lost messages, or of a topic that cannot be read.
    Lost,
    Nothing,
    /// The bus was stopped, or a channel's publisher has closed it.
    Ended,
}

/// Takes and writes what is there, at most so many messages. Everything written so far is flushed before waiting for more.
fn take(source: &mut Source, writer: &mut Writer, most: u64, idle: Option<Duration>) -> anyhow::Result<Taken> {
    match source.take(most, Duration::ZERO, writer)? {
        Taken::Nothing => {
            writer.flush()?;
            source.take(most, idle.unwrap_or(LOOK).min(LOOK), writer)
        }
        taken => Ok(taken),
    }
}

impl Args {
    /// Topic or pattern, and the group if there is one.
    fn place(&self) -> anyhow::Result<(&str, Option<&str>)> {
        let (queue, topic) = virtual_topic(&self.topic).map_or((None, self.topic.as_str()), |(g, t)| (Some(g), t));
        match (queue, self.group.as_deref()) {
            (Some(queue), Some(group)) if queue != group => {
                Err(wrong_usage(format!("{:?} names the group {queue:?}, --group says {group:?}", self.topic)))
            }
            (_, Some(group)) if is_pattern(topic) => {
                let mend = "name one topic, or bring the topics together with `shmbus route`";
                Err(wrong_usage(format!("group {group:?} is a group of one topic, {topic:?} is a pattern: {mend}")))
            }
            (queue, group) => Ok((topic, group.or(queue))),
        }
    }
}

/// One topic, all that a pattern stands for, or a group's share of a topic.
enum Source {
    Group(String, Box<Consumer<[u8]>>),
    Topic(String, Box<Subscriber<[u8]>>),
    Pattern(String, Box<WildcardSubscriber<[u8]>>),
}

impl Source {
    fn open(bus: &Bus, topic: &str, group: Option<&str>, start: Start) -> anyhow::Result<Source> {
        let name = topic.to_owned();
        Ok(if let Some(group) = group {
            Source::Group(name, Box::new(bus.consumer(Topic::named(topic), group).start(start).open()?))
        } else if is_pattern(topic) {
            Source::Pattern(name, Box::new(bus.wildcard(topic).start(start).open()?))
        } else {
            Source::Topic(name, Box::new(bus.subscriber(Topic::named(topic)).start(start).open()?))
        })
    }

    /// How many messages had expired before they were read.
    fn expired(&self) -> u64 {
        match self {
            Source::Topic(_, subscriber) => subscriber.expired(),
            Source::Pattern(_, subscriber) => subscriber.expired(),
            // The group counts them.
            Source::Group(..) => 0,
        }
    }

    /// Takes and writes the next message, or a group's next ones, if any come within `limit`. Loss is reported and survived; an end is well or not,
    /// depending on who brought it about. What was received is flushed before bad news.
    fn take(&mut self, most: u64, limit: Duration, writer: &mut Writer) -> anyhow::Result<Taken> {
        match self {
            Source::Group(name, consumer) => match receive_batch(consumer, most.min(BATCH) as usize, limit) {
                Ok(Some(batch)) => pass_on(batch, writer, name),
                Ok(None) => Ok(Taken::Nothing),
                Err(RecvError::Gone(GoneReason::Stopped)) => stopped(writer, name),
                Err(other) => fail(writer, anyhow!("topic {name:?}: {other}")),
            },
            Source::Topic(name, subscriber) => match receive(subscriber, limit) {
                Ok(Some(message)) => Ok(writer.message(&message).map(|()| Taken::Messages(1))?),
                Ok(None) => Ok(Taken::Nothing),
                Err(RecvError::Lagged { from, to }) => lost(writer, name, from, to),
                Err(RecvError::Gone(GoneReason::Closed)) => Ok(Taken::Ended),
                Err(RecvError::Gone(GoneReason::Stopped)) => stopped(writer, name),
                Err(other) => fail(writer, anyhow!("topic {name:?}: {other}")),
            },
            Source::Pattern(pattern, subscriber) => match receive_any(subscriber, limit) {
                Ok(Some(message)) => {
                    writer.set_topic(message.topic());
                    Ok(writer.message(&*message).map(|()| Taken::Messages(1))?)
                }
                Ok(None) => Ok(Taken::Nothing),
                Err(WildcardError::Lagged { topic, from, to }) => lost(writer, &topic, from, to),
                Err(WildcardError::Gone(GoneReason::Stopped)) => stopped(writer, pattern),
                Err(
                    trouble @ (WildcardError::Missed { .. }
                    | WildcardError::Corrupt { .. }
                    | WildcardError::Attach { .. }),
                ) => dropped(writer, &trouble),
                Err(other) => fail(writer, anyhow!(other)),
            },
        }
    }
}

/// `None`: nothing came in time. Without a wait nothing but a look is taken.
fn receive(subscriber: &mut Subscriber<[u8]>, limit: Duration) -> Result<Option<Message<'_, [u8]>>, RecvError> {
    match limit {
        Duration::ZERO => subscriber.try_recv(),
        _ => match subscriber.recv_timeout(limit) {
            Err(RecvError::TimedOut) => Ok(None),
            other => other.map(Some),
        },
    }
}

/// The same for a pattern.
fn receive_any(
    subscriber: &mut WildcardSubscriber<[u8]>,
    limit: Duration,
) -> Result<Option<WildcardMessage<'_, [u8]>>, WildcardError> {
    match limit {
        Duration::ZERO => subscriber.try_recv(),
        _ => match subscriber.recv_timeout(limit) {
            Err(WildcardError::TimedOut) => Ok(None),
            other => other.map(Some),
        },
    }
}

/// The same for a group.
fn receive_batch(
    consumer: &mut Consumer<[u8]>,
    most: usize,
    limit: Duration,
) -> Result<Option<Batch<'_, [u8]>>, RecvError> {
    match limit {
        Duration::ZERO => consumer.try_recv_batch(most),
        _ => match consumer.recv_batch_timeout(most, limit) {
            Err(RecvError::TimedOut) => Ok(None),
            other => other.map(Some),
        },
    }
}

/// Writes messages out, and only then acknowledges them. What cannot be written goes back to the group.
fn pass_on(batch: Batch<'_, [u8]>, writer: &mut Writer, topic: &str) -> anyhow::Result<Taken> {
    let count = batch.len() as u64;
    batch.iter().try_for_each(|message| writer.message(&message))?;
    writer.flush()?;
    match batch.ack() {
        Ok(()) => Ok(Taken::Messages(count)),
        Err(error @ AckError::LeaseLost { .. }) => {
            eprintln!("shmbus: topic {topic:?}: {error}; another consumer may write it again");
            Ok(Taken::Messages(count))
        }
        Err(error) => Err(anyhow!("topic {topic:?}: written, but not acknowledged: {error}")),
    }
}

fn lost(writer: &mut Writer, topic: &str, from: Sequence, to: Sequence) -> anyhow::Result<Taken> {
    writer.flush()?;
    writer.set_topic(topic);
    writer.loss(from, to)?;
    Ok(Taken::Lost)
}

/// One topic of a pattern cannot be read; the others go on.
fn dropped(writer: &mut Writer, trouble: &WildcardError) -> anyhow::Result<Taken> {
    writer.flush()?;
    eprintln!("shmbus: {trouble}");
    Ok(Taken::Lost)
}

fn stopped(writer: &mut Writer, topic: &str) -> anyhow::Result<Taken> {
    writer.flush()?;
    eprintln!("shmbus: topic {topic:?} has ended: the bus was stopped");
    Ok(Taken::Ended)
}

fn fail(writer: &mut Writer, error: anyhow::Error) -> anyhow::Result<Taken> {
    writer.flush()?;
    Err(error)
}
