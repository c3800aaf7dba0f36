//! `shmbus ls`: every topic of the bus.

use crate::output::{Table, bytes, grouped, json_line, line};
use crate::show::sample;
use crate::{Ended, Globals};

/// List the topics with what they hold, who is attached and how fast messages come (measured for 100 ms).
///
/// With --json: one object a topic, with the fields that `shmbus show --json` prints.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus ls")]
pub(crate) struct Args {}

pub(crate) fn run(globals: &Globals, _args: Args) -> anyhow::Result<Ended> {
    let bus = globals.open_bus()?;
    let topics = sample(|| Ok(bus.topics()?))?;
    if globals.json {
        topics.iter().try_for_each(json_line)?;
        return Ok(Ended::Well);
    }
    if topics.is_empty() {
        line(format_args!("no topics on bus {}", globals.bus_name()))?;
        return Ok(Ended::Well);
    }
    let mut table =
        Table::new(&["TOPIC", "MODE", "HELD", "NEXT", "PUBS", "SUBS", "GROUPS", "MAX LAG", "MSG/S", "MEMORY"]);
    for topic in &topics {
        let lag = topic.subscribers.iter().map(|s| s.lag).chain(topic.groups.iter().map(|g| g.lag)).max();
        table.row([
            topic.topic.clone(),
            topic.options.mode.clone(),
            grouped(topic.tail_sequence.saturating_sub(topic.oldest_sequence)),
            grouped(topic.tail_sequence),
            topic.publishers.len().to_string(),
            topic.subscribers.len().to_string(),
            topic.groups.len().to_string(),
            lag.map_or("-".to_owned(), grouped),
            grouped(topic.messages_per_s as u64),
            bytes(topic.memory_bytes),
        ]);
    }
    table.print()?;
    Ok(Ended::Well)
}
