//! `shmbus rm`: removes a topic.

use serde::Serialize;

use crate::output::{json_line, line};
use crate::{Ended, Globals, values};

/// Remove a topic and every message it holds.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus rm md.ticks --force")]
pub(crate) struct Args {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// Also while publishers or subscribers are attached; they are told that the topic is gone
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct Removed<'a> {
    topic: &'a str,
    removed: bool,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    globals.open_bus()?.remove_topic(&args.topic, args.force)?;
    if globals.json {
        json_line(&Removed { topic: &args.topic, removed: true })?;
    } else {
        line(format_args!("removed topic {}", args.topic))?;
    }
    Ok(Ended::Well)
}
