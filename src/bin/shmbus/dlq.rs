//! `shmbus dlq`: what failed, why, and back with it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use serde::Serialize;
use shmbus::{
    Bus, DEAD_LETTER_GROUP, Delivery, Envelope, Failure, GroupOptions, Message, Mode, OpenError, PipelineError,
    RecvError, Refusal, Sequence, Start, Topic, TopicStatus,
};

use crate::output::{Table, grouped, json_line, line};
use crate::subscribe::writer::text_or_base64;
use crate::{Ended, Globals, signals, values};

/// How long `retry` waits for a message that another process has in hand.
const PATIENCE: Duration = Duration::from_secs(2);

/// The headers that the mover puts before those of the message; `publisher` only where it was known.
const LETTER_HEADERS: [&str; 6] =
    ["reason", "attempts", "origin-topic", "origin-group", "origin-sequence", "publisher"];

/// What a message that was moved back says about it.
const RETRIED: &str = "retried-from";

/// Look at dead letters, the messages that groups gave up, and move them back.
///
/// A group's dead-letter topic is dlq.TOPIC.GROUP unless the group names another. There the messages wait in the group dlq, which is
/// made with the topic; where you create that yourself, add the group, or it keeps letters as any topic does: `shmbus group
/// create TOPIC dlq --from oldest --guarantee effectively-once --back-off 100ms`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the dead-letter topics with how many messages wait there
    ///
    /// Those of all groups, and topics whose name begins with "dlq.". MOVING counts messages on their way, which wait for
    /// room. With --json: {topic, waiting, moving, groups: [{topic, group}]}.
    Ls,
    /// Print the messages that wait, oldest first, with why and whence they came; nothing counts as read
    ///
    /// With --json: {topic, sequence, reason, attempts, origin_topic, origin_group, origin_sequence, key, key_base64, payload,
    /// payload_base64}.
    #[command(after_help = "Example: shmbus dlq show dlq.orders.billing --count 5")]
    Show(WhichArgs),
    /// Move the messages that wait back to the topics they came from, each once
    ///
    /// A message keeps payload, key and headers and gets the header retried-from. It is a new message at the end of its topic:
    /// ALL groups and subscribers of that topic get it again, not only the group that gave it up. With --json an object for
    /// each origin topic: {topic, origin_topic, retried}. Fails when some had to stay.
    #[command(after_help = "Example: shmbus dlq retry dlq.orders.billing")]
    Retry(WhichArgs),
}

#[derive(clap::Args)]
struct WhichArgs {
    /// The dead-letter topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
    /// At most this many, the oldest
    #[arg(long, value_name = "N", default_value_t = u64::MAX, hide_default_value = true, value_parser = values::number::<u64>)]
    count: u64,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let bus = globals.open_bus()?;
    match args.command {
        Command::Ls => list(globals, &bus),
        Command::Show(which) => show(globals, &bus, &which),
        Command::Retry(which) => retry(globals, &bus, &which),
    }
}

/// A dead-letter topic as `ls --json` prints it.
#[derive(Serialize)]
struct Place {
    topic: String,
    waiting: u64,
    moving: u64,
    groups: Vec<Source>,
}

/// A group whose dead letters go there.
#[derive(Serialize)]
struct Source {
    topic: String,
    group: String,
}

fn list(globals: &Globals, bus: &Bus) -> anyhow::Result<Ended> {
    let places = places(&bus.topics()?);
    if globals.json {
        places.iter().try_for_each(json_line)?;
        return Ok(Ended::Well);
    }
    if places.is_empty() {
        line(format_args!("no dead letters on bus {}", globals.bus_name()))?;
        return Ok(Ended::Well);
    }
    let mut table = Table::new(&["TOPIC", "WAITING", "MOVING", "FROM (TOPIC/GROUP)"]);
    for place in &places {
        let sources: Vec<String> = place.groups.iter().map(|s| format!("{}/{}", s.topic, s.group)).collect();
        let sources = if sources.is_empty() { "-".to_owned() } else { sources.join(" ") };
        table.row([place.topic.clone(), grouped(place.waiting), grouped(place.moving), sources]);
    }
    table.print()?;
    Ok(Ended::Well)
}

/// The dead-letter topics that exist or that something is on its way to.
fn places(topics: &[TopicStatus]) -> Vec<Place> {
    let groups = || topics.iter().flat_map(|topic| topic.groups.iter().map(move |group| (topic, group)));
    let mut names: BTreeSet<String> =
        groups().map(|(topic, group)| group.options.dead_letter_topic(&topic.name, &group.name)).collect();
    names.extend(topics.iter().map(|topic| topic.name.clone()).filter(|name| name.starts_with("dlq.")));
    let place = |name: String| {
        let of_this = groups().filter(|(t, group)| group.options.dead_letter_topic(&t.name, &group.name) == name);
        let (mut moving, mut sources) = (0, Vec::new());
        for (topic, group) in of_this {
            moving += group.moving;
            sources.push(Source { topic: topic.name.clone(), group: group.name.clone() });
        }
        let existing = topics.iter().find(|topic| topic.name == name);
        let waiting = existing.map_or(0, |topic| topic.tail_sequence.saturating_sub(first_waiting(topic)));
        (existing.is_some() || moving > 0).then_some(Place { topic: name, waiting, moving, groups: sources })
    };
    names.into_iter().filter_map(place).collect()
}

/// Where the messages that wait begin: at the floor of the group that keeps them, if it is there.
fn first_waiting(topic: &TopicStatus) -> u64 {
    let group = topic.groups.iter().find(|group| group.name == DEAD_LETTER_GROUP);
    group.map_or(topic.oldest_sequence, |group| group.floor)
}

/// A message as `show --json` prints it.
#[derive(Serialize)]
struct Letter<'a> {
    topic: &'a str,
    sequence: u64,
    reason: Option<&'a str>,
    attempts: Option<u64>,
    origin_topic: Option<&'a str>,
    origin_group: Option<&'a str>,
    origin_sequence: Option<u64>,
    key: Option<&'a str>,
    key_base64: Option<String>,
    payload: Option<&'a str>,
    payload_base64: Option<String>,
}

impl<'a> Letter<'a> {
    fn of(topic: &'a str, message: &'a Message<'_, [u8]>) -> Letter<'a> {
        let text = |name: &str| message.header(name).and_then(|value| std::str::from_utf8(value).ok());
        let number = |name: &str| text(name).and_then(|text| text.parse().ok());
        let (key, key_base64) = text_or_base64(message.key());
        let (payload, payload_base64) = text_or_base64(Some(message.as_bytes()));
        Letter {
            topic,
            sequence: message.sequence().get(),
            reason: text("reason"),
            attempts: number("attempts"),
            origin_topic: text("origin-topic"),
            origin_group: text("origin-group"),
            origin_sequence: number("origin-sequence"),
            key,
            key_base64,
            payload,
            payload_base64,
        }
    }

    fn print(&self) -> std::io::Result<()> {
        let reason = self.reason.unwrap_or("no reason given");
        let attempts = self.attempts.filter(|count| *count > 0);
        let attempts = attempts.map_or(String::new(), |count| format!(", attempt {count}"));
        let origin = match (self.origin_topic, self.origin_group, self.origin_sequence) {
            (Some(topic), Some(group), Some(sequence)) => {
                format!("; topic {topic}, sequence {sequence}, group {group}")
            }
            _ => String::new(),
        };
        let key = self.key.or(self.key_base64.as_deref()).map_or(String::new(), |key| format!("; key {key}"));
        line(printable(&format!("sequence {}: {reason}{attempts}{origin}{key}", self.sequence)))?;
        let payload = self.payload.or(self.payload_base64.as_deref()).unwrap_or_default();
        payload.lines().try_for_each(|text| line(format_args!("    {}", printable(text))))
    }
}

/// Without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}

fn show(globals: &Globals, bus: &Bus, which: &WhichArgs) -> anyhow::Result<Ended> {
    let mut shown = 0;
    each_waiting(bus, which, |message| {
        shown += 1;
        let letter = Letter::of(&which.topic, message);
        if globals.json { json_line(&letter) } else { letter.print() }
    })?;
    if shown == 0 && !globals.json {
        line(format_args!("no messages wait in topic {}", which.topic))?;
    }
    Ok(Ended::Well)
}

/// Looks at the messages that wait, oldest first, at most `count` of them.
fn each_waiting(
    bus: &Bus,
    which: &WhichArgs,
    mut visit: impl FnMut(&Message<'_, [u8]>) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    let status = bus.topic(&which.topic)?;
    if status.options.mode == Mode::Channel {
        bail!("topic {:?} is a channel: it has no dead letters", which.topic);
    }
    let start = Start::Sequence(Sequence::new(first_waiting(&status)));
    let topic = Topic::<[u8]>::named(which.topic.as_str());
    let mut subscriber = bus.subscriber(topic).start(start).droppable().open()?;
    let mut left = which.count;
    while left > 0 {
        match subscriber.try_recv() {
            Ok(Some(message)) if message.sequence().get() < status.tail_sequence => visit(&message)?,
            Ok(_) => break,
            // Moved on while we looked.
            Err(RecvError::Lagged { .. }) => continue,
            Err(error) => return Err(anyhow!("topic {:?}: {error}", which.topic)),
        }
        left -= 1;
    }
    Ok(())
}

/// Messages that go back to one topic.
struct Parcel {
    origin: String,
    sequences: BTreeSet<u64>,
}

/// What `retry --json` prints for each origin topic.
#[derive(Serialize)]
struct Retried<'a> {
    topic: &'a str,
    origin_topic: &'a str,
    retried: u64,
}

fn retry(globals: &Globals, bus: &Bus, which: &WhichArgs) -> anyhow::Result<Ended> {
    let (parcels, homeless) = parcels(bus, which)?;
    let stuck = || "ended by a signal while the origin topic had no room; what was in hand stays".to_owned();
    signals::install(Duration::from_secs(1), Box::new(stuck))?;
    let mut problems = Vec::new();
    if homeless > 0 {
        problems.push(format!("{homeless} name no topic they came from"));
    }
    let (mut total, planned) = (0, parcels.iter().map(|parcel| parcel.sequences.len() as u64).sum::<u64>() + homeless);
    for mut parcel in parcels {
        let before = parcel.sequences.len();
        let outcome = send_back(bus, &which.topic, &mut parcel);
        let retried = (before - parcel.sequences.len()) as u64;
        total += retried;
        if globals.json {
            json_line(&Retried { topic: &which.topic, origin_topic: &parcel.origin, retried })?;
        } else {
            line(format_args!("moved {} back to topic {}", grouped(retried), parcel.origin))?;
        }
        if let Some(signal) = signals::caught() {
            return Ok(Ended::BySignal(signal));
        }
        match outcome {
            Err(error) => problems.push(format!("{} of topic {:?}: {error}", parcel.sequences.len(), parcel.origin)),
            Ok(()) if !parcel.sequences.is_empty() => {
                problems.push(format!("{} are in another process's hands or gone", parcel.sequences.len()));
            }
            Ok(()) => {}
        }
    }
    if !problems.is_empty() {
        bail!("topic {:?}: {} of {planned} messages stayed: {}", which.topic, planned - total, problems.join("; "));
    }
    if planned == 0 && !globals.json {
        line(format_args!("no messages wait in topic {}", which.topic))?;
    }
    Ok(Ended::Well)
}

/// What waits, by the topics it came from; and how many do not say.
fn parcels(bus: &Bus, which: &WhichArgs) -> anyhow::Result<(Vec<Parcel>, u64)> {
    let (mut parcels, mut homeless) = (Vec::<Parcel>::new(), 0);
    each_waiting(bus, which, |message| {
        let sequence = message.sequence().get();
        let Some(origin) = Letter::of(&which.topic, message).origin_topic else {
            homeless += 1;
            return Ok(());
        };
        match parcels.iter_mut().find(|parcel| parcel.origin == origin) {
            Some(parcel) => {
                parcel.sequences.insert(sequence);
            }
            None => parcels.push(Parcel { origin: origin.to_owned(), sequences: BTreeSet::from([sequence]) }),
        }
        Ok(())
    })?;
    Ok((parcels, homeless))
}

/// Moves the parcel's messages to their topic; what is left in it has stayed.
fn send_back(bus: &Bus, from: &str, parcel: &mut Parcel) -> anyhow::Result<()> {
    let origin = match bus.topic(&parcel.origin) {
        Err(OpenError::Refused(Refusal::UnknownTopic { .. })) => bail!("it does not exist any more; create it first"),
        other => other?,
    };
    let pipeline =
        bus.pipeline(Topic::<[u8]>::named(from), DEAD_LETTER_GROUP, Topic::<[u8]>::named(parcel.origin.as_str()));
    let mut pipeline = pipeline.options(GroupOptions::for_dead_letters()).start(Start::Oldest).open()?;
    let mut progress = Instant::now();
    while !parcel.sequences.is_empty() && progress.elapsed() < PATIENCE && signals::caught().is_none() {
        let mut moved = None;
        let stepped = pipeline.step_timeout(Duration::from_millis(100), |letter, outputs| {
            let sequence = letter.sequence().get();
            if !parcel.sequences.contains(&sequence) {
                // Another topic's, or beyond --count: it rests for the back-off, and then waits as before.
                return Err(Failure::Retry);
            }
            moved = Some(sequence);
            if origin.options.envelope {
                outputs.push_with(letter.as_bytes(), original_envelope(from, letter));
            } else {
                outputs.push(letter.as_bytes());
            }
            Ok(())
        });
        match (stepped, moved) {
            (Ok(_), Some(sequence)) => {
                parcel.sequences.remove(&sequence);
                progress = Instant::now();
            }
            (Ok(_), None) => {}
            (Err(PipelineError::Recv(RecvError::Fenced)), _) => {
                bail!("the group {DEAD_LETTER_GROUP} was fenced; try again")
            }
            (Err(error), _) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What went with the message before it was given up, and where it has been.
fn original_envelope(from: &str, letter: &Delivery<'_, [u8]>) -> Envelope {
    let mut own = LETTER_HEADERS.into_iter().peekable();
    let envelope = Envelope::new().key(letter.key().unwrap_or_default());
    let envelope = letter.headers().fold(envelope, |envelope, (name, value)| {
        // The mover's come first, in their order.
        if own.next_if(|expected| *expected == name).is_some() || name == RETRIED {
            return envelope;
        }
        own.by_ref().for_each(drop);
        envelope.header(name, value)
    });
    envelope.header(RETRIED, from.as_bytes())
}
