//! `shmbus purge`: gives up a topic's messages.

use serde::Serialize;

use crate::output::{grouped, json_line, line};
use crate::{Ended, Globals, values};

/// Give up every message that no subscriber or group still needs, and say what stayed and who holds it.
///
/// The topic, its options and whoever is attached stay. Messages kept by --hold alone go too. With --json: {topic,
/// purged, kept, oldest_sequence, tail_sequence, holder, holder_pid, holder_group} (holder: the cursor that `show`
/// prints; holder_group: the name of the group whose cursor it is).
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus purge orders")]
pub(crate) struct Args {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
}

#[derive(Serialize)]
struct PurgedLine<'a> {
    topic: &'a str,
    purged: u64,
    kept: u64,
    oldest_sequence: u64,
    tail_sequence: u64,
    holder: Option<u32>,
    holder_pid: Option<u32>,
    holder_group: Option<&'a str>,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let done = globals.open_bus()?.purge_topic(&args.topic)?;
    let purged = done.oldest_sequence.saturating_sub(done.oldest_before);
    let kept = done.tail_sequence.saturating_sub(done.oldest_sequence);
    if globals.json {
        json_line(&PurgedLine {
            topic: &args.topic,
            purged,
            kept,
            oldest_sequence: done.oldest_sequence,
            tail_sequence: done.tail_sequence,
            holder: done.holder,
            holder_pid: done.holder_pid,
            holder_group: done.holder_group.as_deref(),
        })?;
        return Ok(Ended::Well);
    }
    line(format_args!("purged {} of topic {}", messages(purged), args.topic))?;
    if kept > 0 {
        let process = done.holder_pid.map_or(String::new(), |pid| format!(" (process {pid})"));
        let holder = match (&done.holder_group, done.holder) {
            (Some(group), _) => format!("held by group {group}"),
            (None, Some(n)) => format!("held by subscriber {n}{process}"),
            (None, None) => "came meanwhile".to_owned(),
        };
        let (from, to) = (done.oldest_sequence, done.tail_sequence);
        line(format_args!("kept {}, sequences {from}..{to}: {holder}", messages(kept)))?;
    }
    Ok(Ended::Well)
}

fn messages(count: u64) -> String {
    format!("{} message{}", grouped(count), if count == 1 { "" } else { "s" })
}
