//! `shmbus create`: a topic with every option.

use std::time::Duration;

use serde::Serialize;
use shmbus::{Access, Schema, TopicOptions};

use crate::output::{json_line, line};
use crate::values::{self, FullArg, Grant, ModeArg};
use crate::{Ended, Globals, wrong_usage};

/// Create a topic with options of its own.
///
/// `shmbus pub` creates a missing topic with the defaults shown here. Sizes take the suffixes K, M and G (powers of
/// 1,024). A topic is typed when --schema is given: every message then has exactly --size bytes.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus create orders --messages 1000000 --bytes 256M --hold --full reject")]
pub(crate) struct Args {
    /// The topic: letters, digits, '-', '_' and dots, as in md.ticks
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// How many messages the ring holds at least
    #[arg(long, value_name = "N", default_value = "4096", value_parser = values::positive_size)]
    messages: u64,
    /// How many payload bytes each publisher's memory holds at least; also the largest message
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = values::positive_size)]
    bytes: u64,
    /// Who may publish
    #[arg(long, value_enum, default_value_t = ModeArg::Many)]
    mode: ModeArg,
    /// What happens when the slowest subscriber or group is a whole ring behind
    #[arg(long, value_enum, default_value_t = FullArg::Block)]
    full: FullArg,
    /// Keep unread messages also while no subscriber or group exists (the ring then fills up)
    #[arg(long)]
    hold: bool,
    /// Messages carry a timestamp and may carry a key, headers, an id and a time-to-live
    #[arg(long)]
    envelope: bool,
    /// Messages that say nothing about it expire after so long, as in 500ms, 5s, 10m, 2h or 1d (with --envelope)
    #[arg(long, value_name = "TIME", requires = "envelope", value_parser = values::duration)]
    ttl: Option<Duration>,
    /// Give messages up when they are older than this and no subscriber or group still needs them (with --envelope)
    #[arg(long, value_name = "TIME", requires = "envelope", value_parser = values::duration)]
    max_age: Option<Duration>,
    /// A message whose id is still on the topic is a duplicate, and not published (with --envelope)
    #[arg(long, requires = "envelope")]
    dedup: bool,
    /// Most publishers at once, with --mode many [default: 64]
    #[arg(long, value_name = "N", value_parser = values::number::<u32>)]
    publishers: Option<u32>,
    /// Most subscribers and groups at once [default: 256]
    #[arg(long, value_name = "N", value_parser = values::number::<u32>)]
    subscribers: Option<u32>,
    /// Make the topic typed: the type's name, as programs declare it
    #[arg(long, value_name = "NAME", requires = "size")]
    schema: Option<String>,
    /// Size of every message of a typed topic
    #[arg(long, value_name = "BYTES", requires = "schema", value_parser = values::size)]
    size: Option<u64>,
    /// Alignment of every message of a typed topic
    #[arg(long, value_name = "BYTES", requires = "schema", default_value_t = 1)]
    align: u32,
    /// What others than you and root may do, as in publish=alice,@traders or subscribe=*
    ///
    /// Rights: publish, subscribe, consume (groups, and to subscribe so that publishers wait), administer (groups, purge, rm). Users by name or number, groups as @NAME, * for everybody whom
    /// the bus lets in (`shmbus serve --allow`).
    #[arg(long, value_name = "RIGHT=WHO", value_parser = values::grant)]
    allow: Vec<Grant>,
    /// Fine if the topic exists already with the same options
    #[arg(long)]
    exist_ok: bool,
}

impl Args {
    /// Refuses numbers that the mode leaves no choice of.
    fn check(&self) -> anyhow::Result<()> {
        match self.mode {
            ModeArg::Exclusive | ModeArg::Channel if self.publishers.is_some_and(|n| n != 1) => {
                Err(wrong_usage("--publishers is for --mode many; other topics have one publisher at a time"))
            }
            ModeArg::Channel if self.subscribers.is_some_and(|n| n != 1) => {
                Err(wrong_usage("--subscribers is for other modes; a channel has one subscriber"))
            }
            _ => Ok(()),
        }
    }

    fn options(&self) -> TopicOptions {
        let defaults = TopicOptions::default();
        TopicOptions {
            mode: self.mode.into(),
            messages: self.messages,
            bytes: self.bytes,
            full: self.full.into(),
            hold: self.hold,
            envelope: self.envelope,
            ttl_ms: self.ttl.map_or(0, values::whole_ms),
            max_age_ms: self.max_age.map_or(0, values::whole_ms),
            dedup: self.dedup,
            max_publishers: self.publishers.unwrap_or(defaults.max_publishers),
            max_subscribers: self.subscribers.unwrap_or(defaults.max_subscribers),
            schema: self.schema.clone().zip(self.size).map(|(name, size_bytes)| Schema {
                name,
                size_bytes,
                align_bytes: self.align,
            }),
        }
    }
}

impl Args {
    fn access(&self) -> Option<Access> {
        let entries = self.allow.iter().flat_map(|(right, all)| all.iter().map(|who| (*right, *who)));
        let access = entries.fold(Access::new(), |access, (right, who)| access.allow(right, who));
        (!self.allow.is_empty()).then_some(access)
    }
}

#[derive(Serialize)]
struct Created<'a> {
    topic: &'a str,
    /// `false`: it existed with the same options.
    created: bool,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    args.check()?;
    let bus = globals.open_bus()?;
    let existed = match args.access() {
        Some(access) => bus.create_topic_with_access(&args.topic, &args.options(), &access, args.exist_ok)?,
        None => bus.create_topic(&args.topic, &args.options(), args.exist_ok)?,
    };
    match (globals.json, existed) {
        (true, _) => json_line(&Created { topic: &args.topic, created: !existed })?,
        (false, false) => line(format_args!("created topic {}", args.topic))?,
        (false, true) => line(format_args!("topic {} exists with these options", args.topic))?,
    }
    Ok(Ended::Well)
}
