//! `shmbus sub`: messages become standard output.

pub(crate) mod writer;

use std::time::{Duration, Instant};

use anyhow::anyhow;
use shmbus::{GoneReason, RecvError, Start, Subscriber, Topic};

use crate::{Ended, Globals, signals, values};
use writer::{Format, Writer};

/// How often a waiting `sub` looks for signals and for whether its reader is still there.
const LOOK: Duration = Duration::from_millis(100);

/// Write the topic's messages to standard output, as they come, until Ctrl-C.
///
/// Payloads are written exactly as published, with nothing between them. Messages that were overwritten before they
/// could be read are reported on standard error, and so is how many had expired. With --json a message is {topic,
/// sequence, publisher, publisher_number, timestamp_ns, key, key_base64, id, id_base64, headers, attempt, payload,
/// payload_base64} (what is text, else the base64 one; headers is an object, values that are not text are
/// {"base64": "..."}; null where the message or the topic has no such thing), a loss {topic, lagged_from, lagged_to}
/// (lagged_to is still there), and in the end, if any had, {topic, expired}.
/// Ends well when the bus is stopped, and fails when the topic is removed.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus sub logs --from oldest --idle-exit 1000 >copy.log")]
pub(crate) struct Args {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// Where to start: latest, oldest, last:N, a sequence number; on topics with envelopes also last-per-key, time:SECONDS
    /// (since 1970) or time:-10m (so long ago)
    #[arg(long, value_name = "START", default_value = "latest", value_parser = values::start)]
    from: Start,
    /// End after this many messages
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// End when nothing has come for this many milliseconds
    #[arg(long, value_name = "MS")]
    idle_exit: Option<u64>,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let topic = Topic::<[u8]>::named(args.topic.as_str());
    let mut subscriber = globals.open_bus()?.subscriber(topic).start(args.from).open()?;
    // The main thread looks every 100 ms; it can hang only in a write that its reader does not take.
    let stuck = || "ended by a signal while the reader of standard output took nothing".to_owned();
    signals::install(Duration::from_secs(1), Box::new(stuck))?;
    let format = if globals.json { Format::Json } else { Format::Payload };
    let mut writer = Writer::new(args.topic.as_str(), format);
    let ended = pump(&mut subscriber, &mut writer, &args);
    writer.expired(subscriber.expired())?;
    writer.flush()?;
    let ended = ended?;
    Ok(ended)
}

fn pump(subscriber: &mut Subscriber<[u8]>, writer: &mut Writer, args: &Args) -> anyhow::Result<Ended> {
    let idle_exit = args.idle_exit.map(Duration::from_millis);
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut quiet_since = None;
    while left > 0 {
        if let Some(signal) = signals::caught() {
            return Ok(Ended::BySignal(signal));
        }
        match take_one(subscriber, writer, idle_exit)? {
            Taken::Message => {
                left -= 1;
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
    Message,
    /// Word of lost messages.
    Lost,
    Nothing,
    /// The bus was stopped, or a channel's publisher has closed it.
    Ended,
}

/// Takes and writes one message. Everything written so far is flushed before waiting for it.
fn take_one(subscriber: &mut Subscriber<[u8]>, writer: &mut Writer, idle: Option<Duration>) -> anyhow::Result<Taken> {
    let mut received = match subscriber.try_recv() {
        Ok(Some(message)) => return writer.message(&message).map(|()| Taken::Message).map_err(Into::into),
        Ok(None) => Err(RecvError::TimedOut),
        Err(e) => Err(e),
    };
    if received == Err(RecvError::TimedOut) {
        writer.flush()?;
        received = match subscriber.recv_timeout(idle.unwrap_or(LOOK).min(LOOK)) {
            Ok(message) => Ok(writer.message(&message)?),
            Err(e) => Err(e),
        };
    }
    match received {
        Ok(()) => Ok(Taken::Message),
        Err(RecvError::TimedOut) => Ok(Taken::Nothing),
        Err(e) => {
            writer.flush()?; // what was received comes before the bad news
            trouble(e, writer)
        }
    }
}

/// Loss is reported and survived; an end is well or not, depending on who brought it about.
fn trouble(error: RecvError, writer: &mut Writer) -> anyhow::Result<Taken> {
    match error {
        RecvError::Lagged { from, to } => {
            writer.loss(from, to)?;
            Ok(Taken::Lost)
        }
        RecvError::Gone(GoneReason::Closed) => Ok(Taken::Ended),
        RecvError::Gone(GoneReason::Stopped) => {
            eprintln!("shmbus: topic {:?} has ended: the bus was stopped", writer.topic());
            Ok(Taken::Ended)
        }
        other => Err(anyhow!("topic {:?}: {other}", writer.topic())),
    }
}
