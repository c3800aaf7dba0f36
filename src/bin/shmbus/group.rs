//! `shmbus group`: creates, rewinds and removes the groups of a topic.

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use shmbus::{GroupOptions, Guarantee, Start};

use crate::output::{json_line, line};
use crate::{Ended, Globals, values};

/// Create, rewind or remove a group: a named set of consumers that share a topic's messages.
///
/// A group exists, and holds messages, while no consumer is connected. `shmbus sub TOPIC --group G` creates a missing one
/// with the defaults shown here. With --json one object: {topic, group} and created, rewound or removed.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Create a group with options of its own
    #[command(after_help = "Example: shmbus group create orders billing --lease 5s --max-attempts 5 --back-off 1s,10s")]
    Create(Box<CreateArgs>),
    /// Let a group begin elsewhere; its consumers, if any, are fenced
    #[command(after_help = "Example: shmbus group rewind orders billing --to time:-10m")]
    Rewind(RewindArgs),
    /// Remove a group; what it held goes unless somebody else holds it
    #[command(after_help = "Example: shmbus group rm orders billing")]
    Rm(RemoveArgs),
}

/// Which group.
#[derive(clap::Args)]
struct Which {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// The group: letters, digits, '-', '_' and dots
    #[arg(value_parser = values::topic_name)]
    group: String,
}

#[derive(clap::Args)]
struct CreateArgs {
    #[command(flatten)]
    which: Which,
    /// Where it starts: latest, oldest, last:N, a sequence number; on topics with envelopes also time:SECONDS (since 1970) or
    /// time:-10m (so long ago)
    #[arg(long, value_name = "START", allow_hyphen_values = true, default_value = "latest", value_parser = values::start)]
    from: Start,
    /// What happens to messages in hand when a consumer dies
    #[arg(long, value_enum, default_value_t = GuaranteeArg::AtLeastOnce)]
    guarantee: GuaranteeArg,
    /// How long a consumer has for one message
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::duration)]
    lease: Duration,
    /// Leases of the whole group at a time [default: as many as the window]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = values::number::<u32>)]
    max_in_flight: u32,
    /// Deliveries before a message goes to the dead-letter topic [default: without end]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = values::number::<u32>)]
    max_attempts: u32,
    /// Rest after the first, second, ... failed attempt; the last one repeats
    #[arg(long, value_name = "TIME,...", value_delimiter = ',', value_parser = values::duration)]
    back_off: Vec<Duration>,
    /// Where rejected and failed messages go [default: dlq.TOPIC.GROUP]
    #[arg(long, value_name = "TOPIC", value_parser = values::topic_name)]
    dead_letter: Option<String>,
    /// Messages whose time-to-live ended go there as well
    #[arg(long)]
    dead_letter_expired: bool,
    /// Messages of one key come in order and one at a time (needs a topic with an envelope)
    #[arg(long)]
    ordered_by_key: bool,
    /// One consumer at a time gets everything, the others stand by
    #[arg(long)]
    exclusive: bool,
    /// Messages above the floor that may be handed out, a power of two [default: the ring's messages, at most 65,536]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = values::number::<u64>)]
    window: u64,
    /// Fine if the group exists already with the same options
    #[arg(long)]
    exist_ok: bool,
}

#[derive(clap::Args)]
struct RewindArgs {
    #[command(flatten)]
    which: Which,
    /// Where it starts anew: latest, oldest, last:N, a sequence number; on topics with envelopes also time:SECONDS (since 1970) or
    /// time:-10m (so long ago)
    #[arg(long, value_name = "START", allow_hyphen_values = true, value_parser = values::start)]
    to: Start,
    /// Also while consumers are connected; they are fenced
    #[arg(long)]
    force: bool,
}

#[derive(clap::Args)]
struct RemoveArgs {
    #[command(flatten)]
    which: Which,
    /// Also while consumers are connected; they are fenced
    #[arg(long)]
    force: bool,
}

/// [`Guarantee`] as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(clippy::enum_variant_names, reason = "the words of the contract")]
pub(crate) enum GuaranteeArg {
    /// Never delivered twice; a death loses what was in hand
    AtMostOnce,
    /// Delivered until acknowledged
    AtLeastOnce,
    /// The same, and the output of a pipeline or route counts once
    EffectivelyOnce,
}

impl From<GuaranteeArg> for Guarantee {
    fn from(guarantee: GuaranteeArg) -> Guarantee {
        match guarantee {
            GuaranteeArg::AtMostOnce => Guarantee::AtMostOnce,
            GuaranteeArg::AtLeastOnce => Guarantee::AtLeastOnce,
            GuaranteeArg::EffectivelyOnce => Guarantee::EffectivelyOnce,
        }
    }
}

impl CreateArgs {
    fn options(&self) -> GroupOptions {
        let mut options = GroupOptions::default();
        options.guarantee = self.guarantee.into();
        options.lease_ms = values::whole_ms(self.lease);
        options.max_in_flight = self.max_in_flight;
        options.max_attempts = self.max_attempts;
        options.back_off_ms = self.back_off.iter().copied().map(values::whole_ms).collect();
        options.dead_letter = self.dead_letter.clone();
        options.dead_letter_expired = self.dead_letter_expired;
        options.ordered_by_key = self.ordered_by_key;
        options.exclusive = self.exclusive;
        options.window = self.window;
        options
    }
}

/// What was done, as `--json` prints it.
#[derive(Serialize)]
struct Done<'a> {
    topic: &'a str,
    group: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rewound: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<bool>,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let bus = globals.open_bus()?;
    let (which, done, text) = match &args.command {
        Command::Create(a) => {
            let existed = bus.create_group(&a.which.topic, &a.which.group, &a.options(), a.from, a.exist_ok)?;
            let text = if existed { "exists with these options" } else { "created" };
            (&a.which, Done { created: Some(!existed), ..Done::of(&a.which) }, text)
        }
        Command::Rewind(a) => {
            bus.rewind_group(&a.which.topic, &a.which.group, a.to, a.force)?;
            (&a.which, Done { rewound: Some(true), ..Done::of(&a.which) }, "rewound")
        }
        Command::Rm(a) => {
            bus.remove_group(&a.which.topic, &a.which.group, a.force)?;
            (&a.which, Done { removed: Some(true), ..Done::of(&a.which) }, "removed")
        }
    };
    if globals.json {
        json_line(&done)?;
    } else {
        line(format_args!("group {} of topic {}: {text}", which.group, which.topic))?;
    }
    Ok(Ended::Well)
}

impl Done<'_> {
    fn of(which: &Which) -> Done<'_> {
        Done { topic: &which.topic, group: &which.group, created: None, rewound: None, removed: None }
    }
}
