//! `shmbus peek`: looks at what a topic retains.

use anyhow::anyhow;
use shmbus::{Mode, RecvError, Start, Topic};

use crate::subscribe::writer::{Format, Writer};
use crate::{Ended, Globals, values};

/// Print the messages that a topic retains now, and end.
///
/// Nothing is held back meanwhile and nothing counts as read: what is overwritten during the look is reported as lost.
/// Output is that of `shmbus sub`, with and without --json.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus peek orders --from last:10 --json")]
pub(crate) struct Args {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// Where to start: oldest, last:N, a sequence number; on topics with envelopes also last-per-key, time:SECONDS (since
    /// 1970) or time:-10m (so long ago)
    #[arg(long, value_name = "START", allow_hyphen_values = true, default_value = "oldest", value_parser = values::start)]
    from: Start,
    /// At most this many messages
    #[arg(long, value_name = "N", default_value_t = u64::MAX, hide_default_value = true, value_parser = values::number::<u64>)]
    count: u64,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let bus = globals.open_bus()?;
    let status = bus.topic(&args.topic)?;
    if status.options.mode == Mode::Channel {
        return Err(anyhow!("topic {:?} is a channel: only its one receiver can read it", args.topic));
    }
    let topic = Topic::<[u8]>::named(args.topic.as_str());
    let mut subscriber = bus.subscriber(topic).start(args.from).droppable().open()?;
    let mut writer = Writer::new(&args.topic, if globals.json { Format::Json } else { Format::Payload });
    let mut left = args.count;
    while left > 0 {
        match subscriber.try_recv() {
            // What came after the look began is not waited for, or a busy topic would never end it.
            Ok(Some(message)) if message.sequence().get() >= status.tail_sequence => break,
            Ok(Some(message)) => writer.message(&message)?,
            Ok(None) => break,
            Err(RecvError::Lagged { from, to }) => {
                writer.loss(from, to)?;
                continue;
            }
            Err(error) => return Err(anyhow!("topic {:?}: {error}", args.topic)),
        }
        left -= 1;
    }
    writer.expired(subscriber.expired())?;
    writer.flush()?;
    Ok(Ended::Well)
}
