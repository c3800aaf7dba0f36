//! `shmbus route`: copies messages from topics to a topic.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde::Serialize;
use shmbus::{
    ConnectError, Delivery, GoneReason, OpenError, PipelineError, PublishError, RecvError, Route, RouteCounts,
    RouteError, Start,
};

use crate::output::{grouped, json_line, line};
use crate::{Ended, Globals, signals, values};

/// How often a waiting `route` looks for signals.
const LOOK: Duration = Duration::from_millis(100);

/// Copy the messages of a topic, or of all topics of a pattern, to another topic, until Ctrl-C.
///
/// Each message is copied once, also when this process is killed and started again, and when several share the work. Its
/// place is kept in a group of each input topic, which holds messages while no route runs. TO is created, with envelopes,
/// where it does not exist. Where both topics have envelopes a copy keeps key, id and headers, behind the headers
/// origin-topic and origin-sequence. What cannot be published to TO goes to the dead-letter topic dlq.FROM.GROUP.
/// A route whose copies would come back to it is refused, as far as the groups' names tell.
///
/// In the end it prints what it did; with --json {from, to, group, routed, filtered, rejected, duplicates, reopened,
/// passed_over}.
#[derive(clap::Args)]
#[command(after_help = "Filters: key=GLOB, header:NAME=GLOB, contains=TEXT; in a GLOB * stands for anything.\n\
    Example: shmbus route 'orders.>' all-orders --from oldest --filter 'key=customer-*'")]
pub(crate) struct Args {
    /// The topic, or a pattern: orders.* (any one token), 'orders.>' (one or more), also of topics to come
    #[arg(value_name = "FROM", value_parser = values::topic_or_pattern)]
    source: String,
    /// The topic to copy to
    #[arg(value_parser = values::topic_name)]
    to: String,
    /// The group that keeps the place [default: route.TO]
    #[arg(long, value_name = "GROUP", value_parser = values::topic_name)]
    group: Option<String>,
    /// Copy only what this says yes to; of several all must
    #[arg(long, value_name = "EXPR", value_parser = Filter::parse)]
    filter: Vec<Filter>,
    /// Where a group that does not exist starts: latest, oldest, last:N, a sequence number, or time:... as of `shmbus group create`
    #[arg(long = "from", value_name = "START", allow_hyphen_values = true, default_value = "latest", value_parser = values::start)]
    start: Start,
    /// End after this many messages, whatever became of them
    #[arg(long, value_name = "N", value_parser = values::number::<u64>)]
    count: Option<u64>,
    /// End when nothing has come for this many milliseconds
    #[arg(long, value_name = "MS")]
    idle_exit: Option<u64>,
}

/// One `--filter`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Filter {
    Key(String),
    Header(String, String),
    Contains(String),
}

impl Filter {
    fn parse(text: &str) -> Result<Filter, String> {
        let wrong = || "write key=GLOB, header:NAME=GLOB or contains=TEXT".to_owned();
        let (what, value) = text.split_once('=').ok_or_else(wrong)?;
        let value = value.to_owned();
        match (what, what.strip_prefix("header:")) {
            ("key", _) => Ok(Filter::Key(value)),
            ("contains", _) if !value.is_empty() => Ok(Filter::Contains(value)),
            (_, Some(name)) if !name.is_empty() => Ok(Filter::Header(name.to_owned(), value)),
            _ => Err(wrong()),
        }
    }

    /// A message without key or without the header does not match, whatever the pattern.
    fn allows(&self, message: &Delivery<'_, [u8]>) -> bool {
        match self {
            Filter::Key(glob) => message.key().is_some_and(|key| matches(glob.as_bytes(), key)),
            Filter::Header(name, glob) => message.header(name).is_some_and(|value| matches(glob.as_bytes(), value)),
            Filter::Contains(text) => message.as_bytes().windows(text.len()).any(|part| part == text.as_bytes()),
        }
    }
}

/// Whether `text` is what `glob` describes, in which `*` stands for any bytes, also none.
fn matches(glob: &[u8], text: &[u8]) -> bool {
    // Where the last star was, and the first byte after what it has taken so far.
    let (mut at, mut read, mut star) = (0, 0, None);
    while read < text.len() {
        if glob.get(at) == Some(&b'*') {
            star = Some((at, read));
            at += 1;
        } else if glob.get(at) == Some(&text[read]) {
            (at, read) = (at + 1, read + 1);
        } else if let Some((star_at, taken)) = star {
            star = Some((star_at, taken + 1));
            (at, read) = (star_at + 1, taken + 1);
        } else {
            return false;
        }
    }
    glob[at..].iter().all(|byte| *byte == b'*')
}

/// What `--json` prints at the end.
#[derive(Serialize)]
struct Summary<'a> {
    from: &'a str,
    to: &'a str,
    group: &'a str,
    routed: u64,
    filtered: u64,
    rejected: u64,
    duplicates: u64,
    reopened: u64,
    passed_over: u64,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let group = args.group.clone().unwrap_or_else(|| format!("route.{}", args.to));
    let mut builder =
        globals.open_bus()?.route(args.source.as_str(), args.to.as_str()).group(group.as_str()).start(args.start);
    for filter in args.filter.clone() {
        builder = builder.filter(move |message| filter.allows(message));
    }
    let mut route = builder.open()?;
    let to = args.to.clone();
    let stuck =
        move || format!("ended by a signal while topic {to:?} had no room; what was in hand goes back to its group");
    signals::install(Duration::from_secs(1), Box::new(stuck))?;
    let ended = pump(&mut route, &args);
    report(globals, &args, &group, route.counts())?;
    ended
}

fn pump(route: &mut Route, args: &Args) -> anyhow::Result<Ended> {
    let idle_exit = args.idle_exit.map(Duration::from_millis);
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut quiet_since = Instant::now();
    let (mut told, mut tell_at) = (BTreeSet::new(), Instant::now());
    while left > 0 {
        if Instant::now() >= tell_at {
            tell_passed_over(route, &mut told);
            tell_at = Instant::now() + LOOK;
        }
        if let Some(signal) = signals::caught() {
            return Ok(Ended::BySignal(signal));
        }
        match route.step(idle_exit.unwrap_or(LOOK).min(LOOK)) {
            Ok(true) => {
                left -= 1;
                quiet_since = Instant::now();
            }
            Ok(false) if idle_exit.is_some_and(|limit| quiet_since.elapsed() >= limit) => break,
            Ok(false) => {}
            Err(error) if is_stopped(&error) => {
                eprintln!("shmbus: the route has ended: the bus was stopped");
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Ended::Well)
}

/// Says of each topic that is not routed that it is not, once.
fn tell_passed_over(route: &Route, told: &mut BTreeSet<String>) {
    for (topic, why) in route.passed_over().filter(|(topic, _)| !told.contains(*topic)) {
        eprintln!("shmbus: topic {topic:?} is passed over: {why}");
    }
    *told = route.passed_over().map(|(topic, _)| topic.to_owned()).collect();
}

fn is_stopped(error: &RouteError) -> bool {
    matches!(
        error,
        RouteError::Open(OpenError::Connect(ConnectError::Ended { .. }))
            | RouteError::Step {
                source: PipelineError::Recv(RecvError::Gone(GoneReason::Stopped))
                    | PipelineError::Publish(PublishError::Gone(GoneReason::Stopped)),
                ..
            }
    )
}

fn report(globals: &Globals, args: &Args, group: &str, counts: RouteCounts) -> std::io::Result<()> {
    let RouteCounts { routed, filtered, rejected, duplicates, reopened, passed_over, .. } = counts;
    let (from, to) = (args.source.as_str(), args.to.as_str());
    if globals.json {
        let summary = Summary { from, to, group, routed, filtered, rejected, duplicates, reopened, passed_over };
        return json_line(&summary);
    }
    let others = [
        ("filtered", filtered),
        ("rejected", rejected),
        ("duplicates", duplicates),
        ("reopened", reopened),
        ("topics passed over", passed_over),
    ];
    let others = others.iter().filter(|(_, count)| *count > 0);
    let others: String = others.map(|(what, count)| format!(", {what} {}", grouped(*count))).collect();
    line(format_args!("{from} to {to}: routed {}{others}", grouped(routed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        let cases = [
            ("", "", true),
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abbcd", false),
            ("*b*", "abc", true),
            ("*ab", "aab", true),
            ("a**", "a", true),
            ("a", "ab", false),
            ("ab", "a", false),
        ];
        for (glob, text, expected) in cases {
            assert_eq!(matches(glob.as_bytes(), text.as_bytes()), expected, "{glob} {text}");
        }
    }

    #[test]
    fn filters() {
        assert_eq!(Filter::parse("key=a=*"), Ok(Filter::Key("a=*".to_owned())));
        assert_eq!(Filter::parse("header:h=x"), Ok(Filter::Header("h".to_owned(), "x".to_owned())));
        for bad in ["", "key", "header:=x", "header=x", "contains=", "id=7"] {
            assert!(Filter::parse(bad).is_err(), "{bad:?}");
        }
    }
}
