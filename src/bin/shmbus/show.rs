//! `shmbus show`: one topic in full, and the JSON view that `ls` shares.

use std::time::{Duration, Instant};

use serde::Serialize;
use shmbus::doctor::is_stopped;
use shmbus::{ConsumerStatus, GroupOptions, GroupStatus, LeaseStatus, NameStatus, Schema, TopicOptions, TopicStatus};

use crate::output::{Table, bytes, grouped, json_line, line};
use crate::{Ended, Globals, values};

/// How long a topic is watched to see its rate.
const WATCH: Duration = Duration::from_millis(100);

/// Show one topic: options, publishers, subscribers and their lags, memory, and the rate over 100 ms.
///
/// With --json: {topic, oldest_sequence, tail_sequence, publishers: [{slot, publisher, pid, stopped}], names: [{name, publisher,
/// last_number, slot (null while nobody has the name)}], subscribers: [{cursor, pid, stopped, sequence, lag, droppable}], groups:
/// [{group, id, floor, lag, in_flight, returned, moving, window, redelivered, expired, dead_lettered, oldest_lease: {sequence,
/// consumer, pid, stopped, attempt, ends_in_ms}, consumers: [{consumer, pid, stopped, in_flight, active}], options}], options: {mode,
/// messages, bytes, full, hold, max_publishers, max_subscribers, schema, envelope, ttl_ms, max_age_ms, dedup} (0 ms:
/// none), owner (the user who created it), access: ["RIGHT=WHO"], memory_bytes, messages_per_s}. tail_sequence is the next message's;
/// stopped says that the process is (SIGSTOP), and keeps what it holds.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus show md.ticks --json | jq .subscribers")]
pub(crate) struct Args {
    /// The topic
    #[arg(value_parser = values::topic_name)]
    topic: String,
}

/// A topic as `--json` prints it.
#[derive(Serialize)]
pub(crate) struct TopicView {
    pub(crate) topic: String,
    pub(crate) oldest_sequence: u64,
    pub(crate) tail_sequence: u64,
    pub(crate) publishers: Vec<PublisherView>,
    /// Publishers' names; `ls` does not ask for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    names: Option<Vec<NameView>>,
    pub(crate) subscribers: Vec<SubscriberView>,
    pub(crate) groups: Vec<GroupView>,
    pub(crate) options: OptionsView,
    /// The user who created it.
    owner: u32,
    /// What others may do, as `create --allow` takes it.
    access: Vec<String>,
    pub(crate) memory_bytes: u64,
    pub(crate) messages_per_s: f64,
}

#[derive(Serialize)]
pub(crate) struct PublisherView {
    slot: u32,
    publisher: u64,
    pid: u32,
    stopped: bool,
}

#[derive(Serialize)]
struct NameView {
    name: String,
    publisher: u64,
    last_number: u64,
    slot: Option<u32>,
}

impl From<NameStatus> for NameView {
    fn from(status: NameStatus) -> NameView {
        let NameStatus { name, publisher, last_number, slot, .. } = status;
        NameView { name, publisher, last_number, slot }
    }
}

#[derive(Serialize)]
pub(crate) struct SubscriberView {
    cursor: u32,
    pid: u32,
    stopped: bool,
    sequence: u64,
    pub(crate) lag: u64,
    droppable: bool,
}

/// A group as `--json` prints it.
#[derive(Serialize)]
pub(crate) struct GroupView {
    group: String,
    id: u32,
    floor: u64,
    pub(crate) lag: u64,
    in_flight: u64,
    returned: u64,
    moving: u64,
    window: u64,
    redelivered: u64,
    expired: u64,
    dead_lettered: u64,
    /// Who holds the floor; null where nobody has it leased.
    oldest_lease: Option<LeaseView>,
    consumers: Vec<ConsumerView>,
    options: GroupOptions,
}

#[derive(Serialize)]
struct LeaseView {
    sequence: u64,
    consumer: u32,
    pid: u32,
    stopped: bool,
    attempt: u32,
    ends_in_ms: u64,
}

#[derive(Serialize)]
struct ConsumerView {
    consumer: u32,
    pid: u32,
    stopped: bool,
    in_flight: u64,
    active: bool,
}

impl From<GroupStatus> for GroupView {
    fn from(group: GroupStatus) -> GroupView {
        let lease = |l: LeaseStatus| LeaseView {
            sequence: l.sequence,
            consumer: l.consumer,
            pid: l.pid,
            stopped: is_stopped(l.pid),
            attempt: l.attempt,
            ends_in_ms: l.ends_in_ms,
        };
        let consumer = |c: ConsumerStatus| ConsumerView {
            consumer: c.consumer,
            pid: c.pid,
            stopped: is_stopped(c.pid),
            in_flight: c.in_flight,
            active: c.active,
        };
        GroupView {
            group: group.name,
            id: group.id,
            floor: group.floor,
            lag: group.lag,
            in_flight: group.in_flight,
            returned: group.returned,
            moving: group.moving,
            window: group.window,
            redelivered: group.redelivered,
            expired: group.expired,
            dead_lettered: group.dead_lettered,
            oldest_lease: group.oldest_lease.map(lease),
            consumers: group.consumers.into_iter().map(consumer).collect(),
            options: group.options,
        }
    }
}

#[derive(Serialize)]
pub(crate) struct OptionsView {
    pub(crate) mode: String,
    messages: u64,
    bytes: u64,
    full: String,
    hold: bool,
    max_publishers: u32,
    max_subscribers: u32,
    schema: Option<Schema>,
    envelope: bool,
    ttl_ms: u64,
    max_age_ms: u64,
    dedup: bool,
}

impl From<TopicOptions> for OptionsView {
    fn from(options: TopicOptions) -> OptionsView {
        OptionsView {
            mode: options.mode.to_string(),
            messages: options.messages,
            bytes: options.bytes,
            full: options.full.to_string(),
            hold: options.hold,
            max_publishers: options.max_publishers,
            max_subscribers: options.max_subscribers,
            schema: options.schema,
            envelope: options.envelope,
            ttl_ms: options.ttl_ms,
            max_age_ms: options.max_age_ms,
            dedup: options.dedup,
        }
    }
}

impl TopicView {
    fn new(status: TopicStatus, messages_per_s: f64) -> TopicView {
        let publishers = status.publishers.iter();
        let subscribers = status.subscribers.iter();
        TopicView {
            topic: status.name,
            oldest_sequence: status.oldest_sequence,
            tail_sequence: status.tail_sequence,
            publishers: publishers
                .map(|p| PublisherView { slot: p.slot, publisher: p.publisher, pid: p.pid, stopped: is_stopped(p.pid) })
                .collect(),
            names: None,
            subscribers: subscribers
                .map(|s| SubscriberView {
                    cursor: s.cursor,
                    pid: s.pid,
                    stopped: is_stopped(s.pid),
                    sequence: s.sequence,
                    lag: s.lag,
                    droppable: s.droppable,
                })
                .collect(),
            groups: status.groups.into_iter().map(GroupView::from).collect(),
            options: status.options.into(),
            owner: status.owner,
            access: status.access.entries().map(|(right, who)| format!("{right}={who}")).collect(),
            memory_bytes: status.memory_bytes,
            messages_per_s,
        }
    }
}

/// Asks twice, 100 ms apart, and makes a rate of the difference. A topic that came in between starts at 0.
pub(crate) fn sample(ask: impl Fn() -> anyhow::Result<Vec<TopicStatus>>) -> anyhow::Result<Vec<TopicView>> {
    let before = ask()?;
    if before.is_empty() {
        return Ok(Vec::new());
    }
    let started = Instant::now();
    std::thread::sleep(WATCH);
    let after = ask()?;
    let seconds = started.elapsed().as_secs_f64();
    let rate = |now: &TopicStatus| {
        let earlier = before.iter().find(|b| b.id == now.id).map_or(now.tail_sequence, |b| b.tail_sequence);
        (now.tail_sequence.saturating_sub(earlier) as f64 / seconds).round()
    };
    Ok(after
        .into_iter()
        .map(|status| (rate(&status), status))
        .map(|(rate, status)| TopicView::new(status, rate))
        .collect())
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let bus = globals.open_bus()?;
    let topics = sample(|| Ok(vec![bus.topic(&args.topic)?]))?;
    for mut topic in topics {
        topic.names = Some(bus.publisher_names(&args.topic)?.into_iter().map(NameView::from).collect());
        if globals.json { json_line(&topic)? } else { print(&topic)? }
    }
    Ok(Ended::Well)
}

/// A duration with what it is for; nothing where there is none.
fn after(what: &str, ms: u64) -> String {
    if ms == 0 { String::new() } else { format!("{what} {:?}", Duration::from_millis(ms)) }
}

/// A process in a table. A stopped one keeps what stands beside it.
fn process(pid: u32, stopped: bool) -> String {
    format!("{pid}{}", if stopped { " (stopped)" } else { "" })
}

fn print(topic: &TopicView) -> anyhow::Result<()> {
    let options = &topic.options;
    let held = topic.tail_sequence.saturating_sub(topic.oldest_sequence);
    let payload = options.schema.as_ref().map_or("raw bytes".to_owned(), Schema::to_string);
    let ring = format!("{} messages, {}", grouped(options.messages), bytes(options.bytes));
    let hold = if options.hold { ", held for later subscribers" } else { "" };
    line(format_args!("topic     {}", topic.topic))?;
    line(format_args!("payload   {payload}"))?;
    let others = if topic.access.is_empty() { "nobody else".to_owned() } else { topic.access.join(" ") };
    line(format_args!("access    user {}, root; {others}", topic.owner))?;
    let who = match options.mode.as_str() {
        "many" => format!("{} publishers, {} subscribers at most", options.max_publishers, options.max_subscribers),
        "exclusive" => format!("one publisher, {} subscribers at most", options.max_subscribers),
        _ => "one publisher, one subscriber".to_owned(),
    };
    line(format_args!("mode      {} ({who})", options.mode))?;
    line(format_args!("ring      {ring}; when full: {}{hold}", options.full))?;
    if options.envelope {
        let ttl = after("; expire after", options.ttl_ms);
        let age = after("; given up after", options.max_age_ms);
        let dedup = if options.dedup { "; ids are deduplicated" } else { "" };
        line(format_args!("envelope  timestamp, key, headers, id{ttl}{age}{dedup}"))?;
    }
    line(format_args!(
        "holds     {} messages, sequences {}..{}",
        grouped(held),
        topic.oldest_sequence,
        topic.tail_sequence
    ))?;
    line(format_args!("rate      {} messages/s", grouped(topic.messages_per_s as u64)))?;
    line(format_args!("memory    {}", bytes(topic.memory_bytes)))?;
    let mut publishers = Table::new(&["PUBLISHER", "SLOT", "PROCESS"]);
    for p in &topic.publishers {
        publishers.row([p.publisher.to_string(), p.slot.to_string(), process(p.pid, p.stopped)]);
    }
    let mut names = Table::new(&["NAME", "PUBLISHER", "LAST NUMBER", "SLOT"]);
    for n in topic.names.iter().flatten() {
        let slot = n.slot.map_or("-".to_owned(), |slot| slot.to_string());
        names.row([n.name.clone(), n.publisher.to_string(), grouped(n.last_number), slot]);
    }
    let mut subscribers = Table::new(&["SUBSCRIBER", "PROCESS", "NEXT", "LAG", "DROPPABLE"]);
    for s in &topic.subscribers {
        let droppable = if s.droppable { "yes" } else { "no" };
        subscribers.row([
            s.cursor.to_string(),
            process(s.pid, s.stopped),
            grouped(s.sequence),
            grouped(s.lag),
            droppable.into(),
        ]);
    }
    let mut groups =
        Table::new(&["GROUP", "NUMBER", "GUARANTEE", "FLOOR", "LAG", "LEASED", "WAITING", "MOVING", "DEAD", "HELD BY"]);
    for g in &topic.groups {
        groups.row(g.cells());
    }
    let mut consumers = Table::new(&["CONSUMER OF", "NUMBER", "PROCESS", "LEASED", "ACTIVE"]);
    for (group, c) in topic.groups.iter().flat_map(|g| g.consumers.iter().map(move |c| (&g.group, c))) {
        let active = if c.active { "yes" } else { "-" };
        consumers.row([
            group.clone(),
            c.consumer.to_string(),
            process(c.pid, c.stopped),
            grouped(c.in_flight),
            active.to_owned(),
        ]);
    }
    for table in [publishers, names, subscribers, groups, consumers].iter().filter(|t| !t.is_empty()) {
        line("")?;
        table.print()?;
    }
    Ok(())
}

impl GroupView {
    /// One row of the groups' table.
    fn cells(&self) -> [String; 10] {
        let holder = |l: &LeaseView| {
            format!("process {} (sequence {}, attempt {})", process(l.pid, l.stopped), l.sequence, l.attempt)
        };
        [
            self.group.clone(),
            self.id.to_string(),
            self.options.guarantee.to_string(),
            grouped(self.floor),
            grouped(self.lag),
            grouped(self.in_flight),
            grouped(self.returned),
            grouped(self.moving),
            grouped(self.dead_lettered),
            self.oldest_lease.as_ref().map_or("-".to_owned(), holder),
        ]
    }
}
