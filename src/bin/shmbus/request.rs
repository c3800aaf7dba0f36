//! `shmbus request`: standard input is a request, its reply becomes standard output.

use std::io::{self, Read, Write};
use std::time::Duration;

use shmbus::{RequestError, Topic, TopicOptions};

use crate::{Ended, Globals, values};

/// Send standard input as one request and write the reply to standard output.
///
/// Fails at once when nobody reads the topic, when the last one who did has left without a reply, and when the time is
/// over. A missing topic is created, with envelopes.
#[derive(clap::Args)]
#[command(after_help = "Example: echo world | shmbus request greetings --timeout 1s")]
pub(crate) struct Args {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// How long to wait for the reply, as in 500ms, 5s, 10m, 2h or 1d
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = values::duration)]
    timeout: Duration,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let mut payload = Vec::new();
    io::stdin().read_to_end(&mut payload)?;
    let bus = globals.open_bus()?;
    // Whoever replies may reply with as much as may be asked.
    let most = TopicOptions::default().bytes;
    let mut requester = bus.requester_for(Topic::named(args.topic), most)?;
    let reply = requester.request(&payload, args.timeout).map_err(|error| match error {
        RequestError::NoResponder { topic } => {
            anyhow::anyhow!(
                "nobody responds on topic {topic:?}; start one with `shmbus respond {topic} --exec COMMAND`"
            )
        }
        other => other.into(),
    })?;
    let mut out = io::stdout().lock();
    out.write_all(&reply)?;
    out.flush()?;
    Ok(Ended::Well)
}
